//! Conversations as a model sees them: a checkpoint's own chat template, rendered as transformers renders it.
//!
//! | what | where |
//! | --- | --- |
//! | rows of people's files become messages | [`conversation`] |
//! | the template's environment, with bounds on its work | [`engine`] |
//! | `{% generation %}` marks | [`marks`] |
//! | the text, and which of it carries the loss | [`Chat::render`] |

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

/// The template that transformers takes for a conversation with tools, where there is one.
const WITH_TOOLS: &str = "tool_use";

/// The environment variable that fixes the date of reproducible builds, in seconds since 1970.
const EPOCH: &str = "SOURCE_DATE_EPOCH";

/// A checkpoint's template of conversations, ready to render.
pub struct Chat {
    inner: Arc<Inner>,
    /// A template went on for too long, and still does.
    faulty: AtomicBool,
    /// The date that it is told, if it may ask for it.
    date: Option<String>,
    notes: Vec<String>,
}

struct Inner {
    default: Engine,
    with_tools: Option<Engine>,
    /// Finds the texts of added tokens; `None` where there are none.
    added: Option<AhoCorasick>,
}

/// How long a template may take for a conversation. Its bound in steps is reached in a second or two.
const LIMIT: Duration = Duration::from_secs(60);

/// A conversation as the model sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rendered {
    /// What is encoded, without marks of the tokenizer's own.
    pub text: String,
    /// The bytes of `text` that carry the loss, in order and apart from each other.
    pub learned: Vec<Range<usize>>,
    /// How often a message's own text holds the text of a special token, which becomes that token.
    pub special: usize,
}

impl Chat {
    /// The template of a tokenizer. Its date is today's in UTC, or that of `SOURCE_DATE_EPOCH`.
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

    /// The template of a tokenizer, which is told that it is `now`, in seconds since 1970.
    pub fn at(tokenizer: &Tokenizer, now: i64) -> Result<Self, DataError> {
        let refused = |message: String| DataError::Settings { path: tokenizer.source().to_owned(), message };
        let templates = tokenizer.templates().ok_or_else(|| {
            refused(
                "the tokenizer has no chat template (`chat_template.jinja`, or `chat_template` of \
                 `tokenizer_config.json`), so it does not say how a conversation is written: name the folder of one \
                 that has, such as the model's own instruction-tuned variant, with `--tokenizer`, or give the spec's \
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
            format!("{} has the templates {}, and none is called `{DEFAULT}`: name one so", templates.from, names())
        })?;
        let with_tools = engine(WITH_TOOLS)?;
        let mut notes = vec![];
        if templates.named.len() > 1 {
            let tools =
                if with_tools.is_some() { format!(", `{WITH_TOOLS}` for rows with tools") } else { String::new() };
            notes.push(format!("of the chat templates {} `{DEFAULT}` is used{tools}", names()));
        }
        let dated = default.dated() || with_tools.as_ref().is_some_and(Engine::dated);
        let date = dated.then(|| date::format("%Y-%m-%d", now).unwrap_or_default());
        if let Some(date) = &date {
            notes.push(format!(
                "the chat template may write the date, which is taken as {date} (UTC) for the whole run; a run that goes on \
                 on another day has other data unless `{EPOCH}` fixes the date"
            ));
        }
        let added: Vec<String> = added.into_iter().filter(|token| !token.trim().is_empty()).collect();
        let build = || AhoCorasick::builder().match_kind(MatchKind::LeftmostLongest).build(&added);
        let added = (!added.is_empty()).then(build).transpose().map_err(|e| e.to_string())?;
        Ok(Chat { inner: Arc::new(Inner { default, with_tools, added }), faulty: AtomicBool::new(false), date, notes })
    }

    /// The date that the template is told, if it may ask for it: `2026-11-30`.
    pub fn date(&self) -> Option<&str> {
        self.date.as_deref()
    }

    /// What to know about the template, a line each.
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// A conversation as the model sees it: its text, and which of it carries the loss.
    ///
    /// The loss is on what the assistant says. Where the template marks that (`{% generation %}`), the marks count;
    /// elsewhere it is what a turn adds behind the generation prompt, the end of the turn included. An assistant's
    /// message with `"weight": 0` carries none.
    pub fn render(&self, conversation: &Conversation) -> Result<Rendered, String> {
        let (inner, conversation) = (self.inner.clone(), conversation.clone());
        engine::watched(LIMIT, &self.faulty, move || inner.render(&conversation))
    }
}

impl Inner {
    fn render(&self, conversation: &Conversation) -> Result<Rendered, String> {
        let engine = match (&conversation.tools, &self.with_tools) {
            (Some(_), Some(engine)) => engine,
            _ => &self.default,
        };
        let turn = Turns { engine, added: self.added.as_ref(), conversation, messages: conversation.values() };
        let (text, learned) = if engine.marked() { turn.marked()? } else { turn.by_prompt()? };
        if let Some((kind, name)) = conversation.names().into_iter().find(|(_, name)| !text.contains(name)) {
            return Err(format!(
                "the chat template does not write {kind} `{name}`: the model's template knows no tools; leave rows with \
                 tools out, or take a tokenizer whose template has them"
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
        Ok(Rendered { text, learned, special })
    }
}

/// How often a message's texts hold an added token.
fn occurrences(added: &AhoCorasick, value: &Json) -> usize {
    match value {
        Json::String(text) => added.find_iter(text).count(),
        Json::Array(items) => items.iter().map(|item| occurrences(added, item)).sum(),
        Json::Object(entries) => entries.values().map(|item| occurrences(added, item)).sum(),
        _ => 0,
    }
}

/// Renders a conversation and its beginnings.
struct Turns<'a> {
    engine: &'a Engine,
    added: Option<&'a AhoCorasick>,
    conversation: &'a Conversation,
    messages: Vec<Value>,
}

type Learned = (String, Vec<Range<usize>>);

impl Turns<'_> {
    fn first(&self, count: usize, prompt: bool) -> Result<String, String> {
        self.engine.render(&self.messages[..count], self.conversation.tools.as_ref(), prompt)
    }

    /// The messages of the assistant, and whether they carry loss.
    fn assistants(&self) -> impl Iterator<Item = (usize, bool)> {
        let messages = self.conversation.messages.iter().enumerate();
        messages.filter(|(_, m)| m["role"] == "assistant").map(|(at, m)| (at, conversation::weighs(m)))
    }

    /// By the template's own marks.
    fn marked(&self) -> Result<Learned, String> {
        let (messages, tools) = (&self.messages[..], self.conversation.tools.as_ref());
        let text = self.engine.render(messages, tools, false)?;
        let (open, close) = self.engine.sentinels(&self.conversation.messages, tools);
        let marked = self.engine.render_marked(messages, tools, [open, close])?;
        let (stripped, mut learned) = marks::take(&marked, open, close);
        if stripped != text {
            return Err(
                "the chat template works on what it has marked with `{% generation %}` (trims or measures it), so \
                        that what the marks hold cannot be told; mark what is written last"
                    .into(),
            );
        }
        let assistants: Vec<(usize, bool)> = self.assistants().collect();
        if assistants.iter().any(|(_, weighs)| !weighs) {
            if assistants.len() != learned.len() {
                return Err(format!(
                    "a `weight` is 0, and the chat template has {} marks for {} turns of the assistant, so that it cannot \
                     be told which turn a mark belongs to; leave `weight` out",
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

    /// By what each turn adds behind the generation prompt.
    fn by_prompt(&self) -> Result<Learned, String> {
        let whole = self.first(self.messages.len(), false)?;
        let mut learned: Vec<Range<usize>> = vec![];
        for (at, _) in self.assistants().filter(|(_, weighs)| *weighs) {
            let number = at + 1;
            let before = self.first(at, true).map_err(|why| match at {
                0 => format!(
                    "message 1 is the assistant's, and the chat template gives no prompt for it ({why}); put the message \
                     that it answers before it"
                ),
                _ => format!("up to message {at}: {why}"),
            })?;
            if !whole.starts_with(&before) {
                return Err(self.changed(number, "what it answers", &before, &whole));
            }
            let through = match number == self.messages.len() {
                true => whole.clone(),
                false => self.first(number, false).map_err(|why| format!("up to message {number}: {why}"))?,
            };
            let end = match self.end(&through, &whole) {
                Some(end) if end >= before.len() => end,
                _ => return Err(self.changed(number, "it", &through, &whole)),
            };
            self.prompted(at, &before, &whole[before.len()..end])?;
            learned.push(before.len()..end);
        }
        learned.retain(|range| !range.is_empty());
        Ok((whole, learned))
    }

    /// Where in the whole a conversation ends that is its beginning. What a template writes behind a last message alone,
    /// special tokens such as `<|endoftext|>`, is no part of the whole.
    fn end(&self, through: &str, whole: &str) -> Option<usize> {
        if whole.starts_with(through) {
            return Some(through.len());
        }
        let mut common = common(through, whole);
        // Two tokens that begin alike have nothing in common.
        for text in [through, whole] {
            let inside = self.added?.find_iter(text).find(|found| found.start() < common && common < found.end());
            common = inside.map_or(common, |found| found.start());
        }
        let rest = self.added?.replace_all(&through[common..], &vec![""; self.added?.patterns_len()]);
        rest.trim().is_empty().then_some(common)
    }

    /// A template that ignores `add_generation_prompt` and writes a header before what the assistant says would put the
    /// loss on the header.
    fn prompted(&self, at: usize, before: &str, turn: &str) -> Result<(), String> {
        let content = self.conversation.messages[at]["content"].as_str().unwrap_or_default().trim();
        let header = match turn.find(content) {
            Some(from) if !content.is_empty() => &turn[..from],
            _ => return Ok(()),
        };
        if header.trim().is_empty() || self.first(at, false)? != before {
            return Ok(());
        }
        Err(format!(
            "the chat template has no generation prompt: it writes {} before what the assistant says whether or not \
             `add_generation_prompt` is set, and the loss would be on that; add `{{% if add_generation_prompt %}}…{{% endif \
             %}}` at its end, or mark what the assistant says with `{{% generation %}}…{{% endgeneration %}}`",
            shown(header)
        ))
    }

    /// Why what a message carries cannot be told.
    fn changed(&self, number: usize, what: &str, before: &str, whole: &str) -> String {
        let at = common(before, whole);
        format!(
            "message {number}, the assistant's: the chat template writes {what} otherwise when messages follow ({} where the \
             conversation ends there, {} in the whole), as templates do that drop earlier reasoning or move the system \
             message; so it cannot be told what of it carries the loss. Give this message `\"weight\": 0`, so that only \
             later turns carry it, or mark what the assistant says in the template with `{{% generation %}}…{{% \
             endgeneration %}}`",
            shown(&before[at..]),
            shown(&whole[at..])
        )
    }
}

/// How many bytes two texts have in common at their beginnings, in whole characters.
fn common(one: &str, other: &str) -> usize {
    let pairs = one.char_indices().zip(other.chars());
    pairs.take_while(|((_, a), b)| a == b).last().map_or(0, |((at, c), _)| at + c.len_utf8())
}

/// The beginning of a text, for a message.
fn shown(text: &str) -> String {
    let end = text.char_indices().nth(30);
    match end {
        Some((at, _)) => format!("`{}…`", text[..at].escape_debug()),
        None if text.is_empty() => "nothing".into(),
        None => format!("`{}`", text.escape_debug()),
    }
}

#[cfg(test)]
mod tests;
