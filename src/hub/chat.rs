//! Renders conversations with a checkpoint's own chat template, a Jinja template, as transformers renders it.
//!
//! | task | module |
//! | --- | --- |
//! | conversion of data rows to messages | `conversation` |
//! | the template's environment, with limits on its work | `engine` |
//! | the tags `{% generation %}` | `marks` |
//! | the text and the parts of it that carry the loss | [`Chat::render`] |

mod conversation;
mod date;
mod engine;
mod marks;

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aho_corasick::{AhoCorasick, MatchKind};
use minijinja::Value;
use serde_json::Value as Json;

pub use conversation::Conversation;
use engine::Engine;

use crate::data::{DataError, Tokenizer};
use crate::hub::tokenizer::{DEFAULT, Templates};

/// The name of the template that transformers uses for a conversation with tools, if there is one.
const WITH_TOOLS: &str = "tool_use";

/// The environment variable that fixes the date, in seconds since 1970 (reproducible-builds.org).
const EPOCH: &str = "SOURCE_DATE_EPOCH";

/// A checkpoint's chat template, compiled.
pub struct Chat {
    templates: Arc<ChatTemplates>,
    /// Whether a rendering exceeded its limits. Its thread may still run, so no other rendering is started.
    faulty: AtomicBool,
    /// The date that `strftime_now` returns, if the template calls it.
    date: Option<String>,
    /// Notes about the template for the user.
    notes: Vec<String>,
}

/// The parts of [`Chat`] that rendering threads share.
struct ChatTemplates {
    default: Engine,
    with_tools: Option<Engine>,
    /// Finds the texts of added tokens; `None` if the tokenizer has none.
    added: Option<AhoCorasick>,
}

/// The longest time that a template may take for a conversation. The limit on its steps is usually reached in a second
/// or two.
const TIME_LIMIT: Duration = Duration::from_secs(60);

/// A rendered conversation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rendered {
    /// The text to encode, without the special tokens that the tokenizer would add itself.
    pub text: String,
    /// The byte ranges of `text` that carry the loss, in order and disjoint.
    pub loss_ranges: Vec<Range<usize>>,
    /// The number of places where a message's own text holds the text of an added token, and is encoded as that token.
    pub special: usize,
}

impl Chat {
    /// The template of a tokenizer. Its date is today's in UTC, or that of `SOURCE_DATE_EPOCH`.
    ///
    /// # Errors
    ///
    /// As [`Chat::at`], or `SOURCE_DATE_EPOCH` is not a number.
    pub fn of(tokenizer: &Tokenizer) -> Result<Self, DataError> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs() as i64);
        let fixed = std::env::var(EPOCH).ok();
        let fixed = fixed.map(|text| {
            text.trim().parse::<i64>().map_err(|_| DataError::Settings {
                path: tokenizer.source().to_owned(),
                message: format!("`{EPOCH}` is `{text}`, and should be a whole number of seconds since 1970"),
            })
        });
        Chat::at(tokenizer, fixed.transpose()?.unwrap_or(now))
    }

    /// The template of a tokenizer, with the date and time `now` in seconds since 1970.
    ///
    /// # Errors
    ///
    /// The tokenizer has no template, none of its templates is called `default`, or one has a syntax error.
    pub fn at(tokenizer: &Tokenizer, now: i64) -> Result<Self, DataError> {
        let refused = |message: String| DataError::Settings { path: tokenizer.source().to_owned(), message };
        let templates = tokenizer.templates().ok_or_else(|| {
            refused(
                "the tokenizer has no chat template (`chat_template.jinja`, or `chat_template` of \
                 `tokenizer_config.json`), so it does not define how a conversation is written: name the folder of a \
                 tokenizer that has one, such as the model's own instruction-tuned variant, with `--tokenizer`, or \
                 give the spec's \
                 task a `template`"
                    .into(),
            )
        })?;
        Chat::new(templates, tokenizer.added(), now).map_err(refused)
    }

    fn new(templates: &Templates, added: Vec<String>, now: i64) -> Result<Self, String> {
        let names = || templates.named.iter().map(|(name, _)| format!("`{name}`")).collect::<Vec<_>>().join(", ");
        let engine = |name: &str| {
            let place = match name {
                DEFAULT => templates.from.clone(),
                name => format!("{}, template `{name}`", templates.from),
            };
            templates.get(name).map(|source| Engine::new(source, place, &templates.tokens, now)).transpose()
        };
        let default = engine(DEFAULT)?.ok_or_else(|| {
            format!(
                "{} has the templates {}, and none is called `{DEFAULT}`: rename the one to use",
                templates.from,
                names()
            )
        })?;
        let with_tools = engine(WITH_TOOLS)?;
        let mut notes = vec![];
        if templates.named.len() > 1 {
            let tools =
                if with_tools.is_some() { format!(", `{WITH_TOOLS}` for rows with tools") } else { String::new() };
            notes.push(format!("the tokenizer has the chat templates {}; `{DEFAULT}` is used{tools}", names()));
        }
        let dated = default.dated() || with_tools.as_ref().is_some_and(Engine::dated);
        let date = dated.then(|| date::format("%Y-%m-%d", now).unwrap_or_default());
        if let Some(date) = &date {
            notes.push(format!(
                "the chat template may write the date, which is {date} (UTC) for the whole run; a run that is resumed \
                 on \
                 another day has other data unless `{EPOCH}` fixes the date"
            ));
        }
        let added: Vec<String> = added.into_iter().filter(|token| !token.trim().is_empty()).collect();
        let build = || AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(&added);
        let added = (!added.is_empty()).then(build).transpose().map_err(|e| e.to_string())?;
        Ok(Chat {
            templates: Arc::new(ChatTemplates { default, with_tools, added }),
            faulty: AtomicBool::new(false),
            date,
            notes,
        })
    }

    /// The date for the template, such as `2026-11-30`, if the template calls `strftime_now`.
    pub fn date(&self) -> Option<&str> {
        self.date.as_deref()
    }

    /// Notes about the template for the user, a line each.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Renders a conversation to its text and the ranges that carry the loss.
    ///
    /// The loss is on the assistant's messages. If the template marks them with `{% generation %}`, it is on the marked
    /// ranges; otherwise on what each of these messages adds after the generation prompt, its end token included. A
    /// message of the assistant with `"weight": 0` carries no loss.
    ///
    /// # Errors
    ///
    /// The template fails or exceeds its limits, ignores the tools, or the ranges cannot be determined.
    pub fn render(&self, conversation: &Conversation) -> Result<Rendered, String> {
        let (templates, conversation) = (self.templates.clone(), conversation.clone());
        engine::run_with_limits(TIME_LIMIT, &self.faulty, move || templates.render(&conversation))
    }
}

impl ChatTemplates {
    fn render(&self, conversation: &Conversation) -> Result<Rendered, String> {
        let engine = match (&conversation.tools, &self.with_tools) {
            (Some(_), Some(engine)) => engine,
            _ => &self.default,
        };
        let turn = TurnRenderer { engine, added: self.added.as_ref(), conversation, messages: conversation.values() };
        let (text, learned) = if engine.marked() { turn.by_generation_tags()? } else { turn.by_generation_prompt()? };
        if let Some((kind, name)) = conversation.names().into_iter().find(|(_, name)| !text.contains(name)) {
            return Err(format!(
                "the chat template does not write {kind} `{name}`: it does not support tools; leave rows with tools \
                 out, \
                 or take a tokenizer whose template supports them"
            ));
        }
        if learned.is_empty() {
            return Err("no token would carry the loss: no turn of the assistant has a weight, or the template marks \
                        none with `{% generation %}`"
                .into());
        }
        let special = self
            .added
            .as_ref()
            .map_or(0, |added| conversation.messages.iter().map(|message| occurrences(added, message)).sum());
        Ok(Rendered { text, loss_ranges: learned, special })
    }
}

/// The number of occurrences of added tokens in the texts of a message.
fn occurrences(added: &AhoCorasick, value: &Json) -> usize {
    match value {
        Json::String(text) => added.find_iter(text).count(),
        Json::Array(items) => items.iter().map(|item| occurrences(added, item)).sum(),
        Json::Object(entries) => entries.values().map(|item| occurrences(added, item)).sum(),
        _ => 0,
    }
}

/// Renders a conversation and its prefixes, to find the ranges that carry the loss.
struct TurnRenderer<'a> {
    engine: &'a Engine,
    added: Option<&'a AhoCorasick>,
    conversation: &'a Conversation,
    messages: Vec<Value>,
}

/// A text, and its byte ranges that carry the loss.
type TextWithLoss = (String, Vec<Range<usize>>);

impl TurnRenderer<'_> {
    /// The text of the first `count` messages. `prompt`: the generation prompt follows them.
    fn render_prefix(&self, count: usize, prompt: bool) -> Result<String, String> {
        self.engine.render(&self.messages[..count], self.conversation.tools.as_ref(), prompt)
    }

    /// The indices of the assistant's messages, and whether each carries the loss.
    fn assistants(&self) -> impl Iterator<Item = (usize, bool)> {
        let messages = self.conversation.messages.iter().enumerate();
        messages.filter(|(_, m)| m["role"] == "assistant").map(|(at, m)| (at, conversation::carries_loss(m)))
    }

    /// The ranges that the template marks with `{% generation %}`.
    fn by_generation_tags(&self) -> Result<TextWithLoss, String> {
        let (messages, tools) = (&self.messages[..], self.conversation.tools.as_ref());
        let text = self.engine.render(messages, tools, false)?;
        let (open, close) = self.engine.sentinels(&self.conversation.messages, tools);
        let marked = self.engine.render_marked(messages, tools, [open, close])?;
        let (stripped, mut learned) = marks::strip_markers(&marked, open, close);
        if stripped != text {
            return Err(
                "the chat template processes the text that it has marked with `{% generation %}` (trims or measures \
                 it), so the marked ranges cannot be determined; mark the text where it is written"
                    .into(),
            );
        }
        let assistants: Vec<(usize, bool)> = self.assistants().collect();
        if assistants.iter().any(|(_, weighs)| !weighs) {
            if assistants.len() != learned.len() {
                return Err(format!(
                    "a `weight` is 0, and the chat template has {} marks for {} messages of the assistant, so it is \
                     not \
                     known which message a mark belongs to; leave `weight` out",
                    learned.len(),
                    assistants.len()
                ));
            }
            let mut weighs = assistants.iter().map(|(_, weighs)| *weighs);
            learned.retain(|_| weighs.next().unwrap_or(true));
        }
        learned.retain(|range| !range.is_empty());
        Ok((text, learned))
    }

    /// The ranges that each message of the assistant adds after the generation prompt.
    fn by_generation_prompt(&self) -> Result<TextWithLoss, String> {
        let whole = self.render_prefix(self.messages.len(), false)?;
        let mut learned: Vec<Range<usize>> = vec![];
        for (at, _) in self.assistants().filter(|(_, weighs)| *weighs) {
            let number = at + 1;
            let before = self.render_prefix(at, true).map_err(|why| match at {
                0 => format!(
                    "message 1 is the assistant's, and the chat template renders no prompt without a message before it \
                     ({why}); put the message that it answers before it"
                ),
                _ => format!("up to message {at}: {why}"),
            })?;
            if !whole.starts_with(&before) {
                return Err(self.changed_message(number, "what it answers", &before, &whole));
            }
            let through = match number == self.messages.len() {
                true => whole.clone(),
                false => self.render_prefix(number, false).map_err(|why| format!("up to message {number}: {why}"))?,
            };
            let end = match self.end_of_prefix(&through, &whole) {
                Some(end) if end >= before.len() => end,
                _ => return Err(self.changed_message(number, "it", &through, &whole)),
            };
            self.check_generation_prompt(at, &before, &whole[before.len()..end])?;
            learned.push(before.len()..end);
        }
        learned.retain(|range| !range.is_empty());
        Ok((whole, learned))
    }

    /// The end in `whole` of a prefix of the conversation, which renders to `through`. Special tokens such as
    /// `<|endoftext|>` that a template writes only after the last message are ignored. `None` if `through` is not a
    /// prefix otherwise.
    fn end_of_prefix(&self, through: &str, whole: &str) -> Option<usize> {
        if whole.starts_with(through) {
            return Some(through.len());
        }
        let mut common = common_prefix(through, whole);
        // A common prefix that ends inside an added token is cut before it, since two different tokens share no text.
        for text in [through, whole] {
            let inside = self.added?.find_iter(text).find(|found| found.start() < common && common < found.end());
            common = inside.map_or(common, |found| found.start());
        }
        let rest = self.added?.replace_all(&through[common..], &vec![""; self.added?.patterns_len()]);
        rest.trim().is_empty().then_some(common)
    }

    /// Refuses a template that ignores `add_generation_prompt` and writes a header before the assistant's message: the
    /// loss would be on the header.
    fn check_generation_prompt(&self, at: usize, before: &str, turn: &str) -> Result<(), String> {
        let content = self.conversation.messages[at]["content"].as_str().unwrap_or_default().trim();
        let header = match turn.find(content) {
            Some(from) if !content.is_empty() => &turn[..from],
            _ => return Ok(()),
        };
        if header.trim().is_empty() || self.render_prefix(at, false)? != before {
            return Ok(());
        }
        Err(format!(
            "the chat template has no generation prompt: it writes {} before the assistant's message whether or not \
             `add_generation_prompt` is set, so the loss would be on that; add `{{% if add_generation_prompt %}}…{{% \
             endif \
             %}}` at its end, or mark the assistant's messages with `{{% generation %}}…{{% endgeneration %}}`",
            excerpt(header)
        ))
    }

    /// The error for a message whose rendering, or that of what precedes it (`what`), changes when messages follow.
    fn changed_message(&self, number: usize, what: &str, before: &str, whole: &str) -> String {
        let at = common_prefix(before, whole);
        format!(
            "message {number}, the assistant's: the chat template writes {what} differently when messages follow ({} \
             if the \
             conversation ends there, {} in the whole), as templates do that drop earlier reasoning or move the system \
             message; so the range that carries the loss is not known. Give this message `\"weight\": 0`, so that only \
             later messages carry it, or mark the assistant's messages in the template with `{{% generation %}}…{{% \
             endgeneration %}}`",
            excerpt(&before[at..]),
            excerpt(&whole[at..])
        )
    }
}

/// The length in bytes of the common prefix of two texts, in whole characters.
fn common_prefix(one: &str, other: &str) -> usize {
    let pairs = one.char_indices().zip(other.chars());
    pairs.take_while(|((_, a), b)| a == b).last().map_or(0, |((at, c), _)| at + c.len_utf8())
}

/// The first 30 characters of a text, quoted for a message.
fn excerpt(text: &str) -> String {
    let end = text.char_indices().nth(30);
    match end {
        Some((at, _)) => format!("`{}…`", text[..at].escape_debug()),
        None if text.is_empty() => "nothing".into(),
        None => format!("`{}`", text.escape_debug()),
    }
}

#[cfg(test)]
mod tests;
