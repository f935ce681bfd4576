//! Conversations, by the checkpoint's own chat template. Their loss is on what the assistant says, in every turn.

use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;

use super::rows::{At, Fault, File, Format, Row, Rows};
use super::{DataError, Example, Goal, Maker, Placed, Tokenizer};
use crate::hub::chat::{Chat, Conversation, Rendered};

/// Makes examples of conversations, one each.
pub struct Conversations<'t> {
    chat: Chat,
    tokenizer: &'t Tokenizer,
    /// How many messages' own texts hold a special token.
    special: AtomicUsize,
}

impl<'t> Conversations<'t> {
    /// The tokenizer has to have a chat template.
    pub fn new(tokenizer: &'t Tokenizer) -> Result<Self, DataError> {
        Ok(Conversations { chat: Chat::of(tokenizer)?, tokenizer, special: AtomicUsize::new(0) })
    }
}

impl Maker for Conversations<'_> {
    type Draft = Conversation;

    fn open<'f>(&self, file: &'f File) -> Result<Rows<'f>, DataError> {
        let rows = Rows::of(file, Format::Json, None, |_| true).map_err(|fault| DataError::at(&file.path, fault))?;
        let why = "its `entries` are triples and texts, as WebNLG has them, and this task is chat";
        rows.without_entries(&file.path, why)
    }

    /// Which columns there have to be depends on the form of a row.
    fn check(&self, _: &[&str]) -> Result<(), String> {
        Ok(())
    }

    fn draft(&self, row: &Row, _: bool) -> Result<Conversation, String> {
        Conversation::of(&row.json())
    }

    fn encode(&self, drafts: Vec<(At, Conversation)>) -> Result<Vec<Result<Vec<Placed>, Fault>>, DataError> {
        let render = |(at, conversation): &(At, Conversation)| {
            self.chat.render(conversation).map_err(|message| Fault::row(at.clone(), message))
        };
        let rendered: Vec<Result<Rendered, Fault>> = drafts.par_iter().map(render).collect();
        let texts: Vec<_> = rendered.iter().flatten().map(|r| (r.text.as_str(), r.learned.as_slice())).collect();
        let mut encoded = self.tokenizer.encode_spans(&texts)?.into_iter();
        let one = |(rendered, (at, _)): (Result<Rendered, Fault>, (At, Conversation))| {
            let special = rendered?.special;
            let spanned = encoded.next().unwrap_or_default();
            // The first token has none before it.
            let mut ranges = spanned.spans;
            ranges.iter_mut().for_each(|range| range.start = range.start.max(1));
            ranges.retain(|range| range.start < range.end);
            if ranges.is_empty() {
                return Err(Fault::row(at, "the tokenizer makes no token of what the assistant says"));
            }
            self.special.fetch_add(special, Ordering::Relaxed);
            let example = Example { types: vec![0; spanned.ids.len()], ids: spanned.ids, goal: Goal::Tokens(ranges) };
            Ok(vec![Placed { at, length: example.ids.len(), example }])
        };
        Ok(rendered.into_iter().zip(drafts).map(one).collect())
    }

    fn empty(&self) -> &'static str {
        "write one conversation a line, `{\"messages\": [{\"role\": \"user\", \"content\": \"…\"}, …]}`"
    }

    fn notes(&self) -> Vec<String> {
        let mut notes = self.chat.notes().to_vec();
        match self.special.load(Ordering::Relaxed) {
            0 => {}
            count => notes.push(format!(
                "messages hold the text of a special token in {count} places, and it is that token there, as in transformers"
            )),
        }
        notes
    }
}
