//! Chat data sets: conversations rendered by the checkpoint's own chat template. The loss covers the assistant's
//! messages of every turn.

use std::sync::atomic::{AtomicUsize, Ordering};

use rayon::prelude::*;

use super::rows::{Fault, File, FileRows, Format, Location, Row};
use super::{DataError, Example, ExampleBuilder, Goal, LocatedExample, Tokenizer};
use crate::hub::chat::{Chat, Conversation, Rendered};

/// Builds one example of each conversation.
pub struct Conversations<'t> {
    chat: Chat,
    tokenizer: &'t Tokenizer,
    /// The number of messages whose text contains a special token.
    special: AtomicUsize,
}

impl<'t> Conversations<'t> {
    /// # Errors
    ///
    /// The tokenizer has no chat template, or one that cannot be parsed.
    pub fn new(tokenizer: &'t Tokenizer) -> Result<Self, DataError> {
        Ok(Conversations { chat: Chat::of(tokenizer)?, tokenizer, special: AtomicUsize::new(0) })
    }
}

impl ExampleBuilder for Conversations<'_> {
    type Draft = Conversation;

    fn open<'f>(&self, file: &'f File) -> Result<FileRows<'f>, DataError> {
        let rows =
            FileRows::of(file, Format::Json, None, |_| true).map_err(|fault| DataError::at(&file.path, fault))?;
        let why = "its `entries` are triples and texts, as WebNLG has them, and this task is chat";
        rows.without_entries(&file.path, why)
    }

    /// The columns that a row needs depend on its layout, so a header cannot be checked.
    fn check(&self, _: &[&str]) -> Result<(), String> {
        Ok(())
    }

    fn draft(&self, row: &Row, _: bool) -> Result<Conversation, String> {
        Conversation::of(&row.json())
    }

    fn encode(
        &self,
        drafts: Vec<(Location, Conversation)>,
    ) -> Result<Vec<Result<Vec<LocatedExample>, Fault>>, DataError> {
        let render = |(at, conversation): &(Location, Conversation)| {
            self.chat.render(conversation).map_err(|message| Fault::row(at.clone(), message))
        };
        let rendered: Vec<Result<Rendered, Fault>> = drafts.par_iter().map(render).collect();
        let texts: Vec<_> = rendered.iter().flatten().map(|r| (r.text.as_str(), r.loss_ranges.as_slice())).collect();
        let mut encoded = self.tokenizer.encode_spans(&texts)?.into_iter();
        let one = |(rendered, (at, _)): (Result<Rendered, Fault>, (Location, Conversation))| {
            let special = rendered?.special;
            let spanned = encoded.next().unwrap_or_default();
            // A sequence's first token cannot be predicted.
            let mut ranges = spanned.spans;
            ranges.iter_mut().for_each(|range| range.start = range.start.max(1));
            ranges.retain(|range| range.start < range.end);
            if ranges.is_empty() {
                return Err(Fault::row(at, "the tokenizer makes no token of what the assistant says"));
            }
            self.special.fetch_add(special, Ordering::Relaxed);
            let example = Example { types: vec![0; spanned.ids.len()], ids: spanned.ids, goal: Goal::Tokens(ranges) };
            Ok(vec![LocatedExample { at, length: example.ids.len(), example }])
        };
        Ok(rendered.into_iter().zip(drafts).map(one).collect())
    }

    fn empty(&self) -> &'static str {
        "write one conversation per line, `{\"messages\": [{\"role\": \"user\", \"content\": \"…\"}, …]}`"
    }

    fn notes(&self) -> Vec<String> {
        let mut notes = self.chat.notes().to_vec();
        match self.special.load(Ordering::Relaxed) {
            0 => {}
            count => notes.push(format!(
                "messages contain the text of a special token {count} times, which is read as that token, as in transformers"
            )),
        }
        notes
    }
}
