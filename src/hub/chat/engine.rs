//! The environment of a chat template, configured as in transformers (`utils/chat_template_utils.py`), with limits on
//! steps, time and memory, since a template comes from a stranger's checkpoint.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, Serde, ValueKind};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State, UndefinedBehavior, Value};
use serde_json::Value as Json;

use super::{date, marks};

/// The largest number of steps (minijinja's fuel) that a template may take for one conversation. 64 bytes of text that
/// it writes or reads count as a step.
const FUEL: u64 = 2_000_000;

/// The largest depth of nested macro calls.
const MAX_MACRO_DEPTH: usize = 100;

/// The largest depth of lists and objects that `tojson` writes.
const MAX_JSON_DEPTH: usize = 100;

/// The name of the environment's only template.
const TEMPLATE_NAME: &str = "chat";

/// Variables with the characters that are written before and after a marked range; undefined if none are.
const SENTINEL_VARIABLES: [&str; 2] = ["__generation_open__", "__generation_close__"];

/// A compiled chat template.
pub struct Engine {
    environment: Environment<'static>,
    source: String,
    /// The place of the template, for messages.
    place: String,
    /// Variables such as `bos_token`, with their texts.
    tokens: Vec<(String, String)>,
    marked: bool,
    dated: bool,
}

/// The message that the template passes to `raise_exception`.
#[derive(Debug)]
struct Raised(String);

impl fmt::Display for Raised {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

impl Engine {
    /// Compiles a template. `place` names it in messages, `tokens` are its variables of special tokens, `now` is the
    /// time for `strftime_now` in seconds since 1970.
    ///
    /// # Errors
    ///
    /// The template has a syntax error.
    pub fn new(source: &str, place: String, tokens: &[(String, String)], now: i64) -> Result<Self, String> {
        let mut environment = Environment::new();
        let mut syntax = SyntaxConfig::builder();
        syntax.trim_blocks(true).lstrip_blocks(true);
        let syntax = syntax.build().map_err(|e| e.to_string())?;
        environment.set_syntax(syntax);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment.set_fuel(Some(FUEL));
        environment.set_recursion_limit(MAX_MACRO_DEPTH);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_formatter(|out, state, value| match f64::try_from(value.clone()) {
            Ok(number) if value.is_number() && !value.is_integer() => Ok(out.write_str(&float(number))?),
            _ => minijinja::escape_formatter(out, state, value),
        });
        environment.remove_global("debug");
        // These filters are not Jinja2's, and minijinja does not charge fuel for their work.
        for filter in ["chain", "zip", "split", "lines", "bool"] {
            environment.remove_filter(filter);
        }
        environment.add_function("raise_exception", |message: Value| -> Result<Value, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, "raised").with_source(Raised(message.to_string())))
        });
        environment.add_function("strftime_now", move |format: &str| date::format(format, now).map_err(invalid));
        environment.add_function(marks::FUNCTION, mark);
        environment.add_filter("tojson", to_json);
        let (rewritten, marked) = marks::rewrite(source);
        environment
            .add_template_owned(TEMPLATE_NAME, rewritten)
            .map_err(|error| format!("{place}{}: {}; correct the template", line_suffix(&error), error_text(&error)))?;
        let names = environment.get_template(TEMPLATE_NAME).map_err(|e| e.to_string())?.undeclared_variables(false);
        let dated = names.contains("strftime_now");
        Ok(Engine { environment, source: source.to_owned(), place, tokens: tokens.to_vec(), marked, dated })
    }

    /// Whether the template has `{% generation %}` tags.
    pub fn marked(&self) -> bool {
        self.marked
    }

    /// Whether the template calls `strftime_now`.
    pub fn dated(&self) -> bool {
        self.dated
    }

    /// Renders messages. `prompt`: the generation prompt follows them.
    ///
    /// # Errors
    ///
    /// The template raises an error or exceeds its limits.
    pub fn render(&self, messages: &[Value], tools: Option<&Json>, prompt: bool) -> Result<String, String> {
        self.text(messages, tools, prompt, None)
    }

    /// Renders messages with the characters `around` before and after each marked range.
    ///
    /// # Errors
    ///
    /// As [`Engine::render`].
    pub fn render_marked(&self, messages: &[Value], tools: Option<&Json>, around: [char; 2]) -> Result<String, String> {
        self.text(messages, tools, false, Some(around))
    }

    /// Two private-use characters that occur neither in the template nor in the conversation.
    pub fn sentinels(&self, messages: &[Json], tools: Option<&Json>) -> (char, char) {
        let held = |c: char| {
            let in_json = |value: &Json| holds(value, c);
            self.source.contains(c)
                || self.tokens.iter().any(|(_, token)| token.contains(c))
                || messages.iter().any(in_json)
                || tools.is_some_and(in_json)
        };
        let mut free = ('\u{e000}'..='\u{f8ff}').chain('\u{f0000}'..='\u{ffffd}').filter(|c| !held(*c));
        (free.next().unwrap_or('\u{10fffc}'), free.next().unwrap_or('\u{10fffd}'))
    }

    fn text(
        &self,
        messages: &[Value],
        tools: Option<&Json>,
        prompt: bool,
        around: Option<[char; 2]>,
    ) -> Result<String, String> {
        let mut context: Vec<(&str, Value)> =
            self.tokens.iter().map(|(name, token)| (name.as_str(), Value::from(token.as_str()))).collect();
        context.push(("messages", Value::from(messages.to_vec())));
        context.push(("tools", tools.map_or(Value::from(()), |tools| Value::from(Serde(tools)))));
        context.push(("documents", Value::from(())));
        context.push(("add_generation_prompt", Value::from(prompt)));
        for (name, c) in SENTINEL_VARIABLES.iter().zip(around.into_iter().flatten()) {
            context.push((name, Value::from(c.to_string())));
        }
        let template = self.environment.get_template(TEMPLATE_NAME).map_err(|e| e.to_string())?;
        template
            .render(Value::from(context.into_iter().collect::<BTreeMap<_, _>>()))
            .map_err(|error| self.refusal(&error))
    }

    /// The message for an error of rendering.
    fn refusal(&self, error: &Error) -> String {
        let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
        while let Some(inner) = cause {
            if let Some(Raised(message)) = inner.downcast_ref() {
                return format!("the chat template refuses it: {message}");
            }
            if inner.downcast_ref::<Error>().is_some_and(|e| e.kind() == ErrorKind::OutOfFuel) {
                return format!(
                    "{}{}: the template does not come to an end within {FUEL} steps, or writes more than {} MB of \
                     text; \
                     the template is faulty, or the conversation is too long for it",
                    self.place,
                    line_suffix(error),
                    FUEL * 64 / 1_000_000
                );
            }
            cause = inner.source();
        }
        format!("{}{}: {}", self.place, line_suffix(error), error_text(error))
    }
}

/// Runs a template's work on its own thread, with a limit on its time and on the growth of the process's memory.
///
/// The thread's stack of 1 GiB is large enough for values nested as deep as the template's steps allow, since values
/// are written, compared and freed by recursion; only the used part of the stack takes memory. Memory is limited
/// because the concatenation of lists counts as one step, whatever their length. A thread that exceeds a limit cannot
/// be stopped: it runs until the process ends. `faulty` is then set, and later calls fail at once.
///
/// # Errors
///
/// The work fails, panics or exceeds a limit, or earlier work did.
pub fn run_with_limits<T: Send + 'static>(
    limit: Duration,
    faulty: &AtomicBool,
    work: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Result<T, String> {
    const STACK: usize = 1 << 30;
    const PAUSE: Duration = Duration::from_secs(1);
    if faulty.load(Ordering::Relaxed) {
        return Err("the chat template did not come to an end for another conversation, so it is not run again".into());
    }
    let (sender, receiver) = mpsc::channel();
    // The receiver is gone if the time limit has passed.
    let run = move || drop(sender.send(work()));
    let thread = std::thread::Builder::new().name("chat template".into()).stack_size(STACK).spawn(run);
    thread.map_err(|e| format!("no thread could be started for the chat template: {e}"))?;
    let (start, mut first) = (Instant::now(), None);
    loop {
        match receiver.recv_timeout(PAUSE.min(limit)) {
            Ok(result) => return result,
            Err(RecvTimeoutError::Disconnected) => return Err("crate `minijinja` panics on the chat template".into()),
            Err(RecvTimeoutError::Timeout) => {
                let now = resident_bytes();
                let grown = now.saturating_sub(*first.get_or_insert(now));
                if start.elapsed() >= limit || grown > MAX_MEMORY_GROWTH {
                    faulty.store(true, Ordering::Relaxed);
                    return Err(format!(
                        "the chat template does not come to an end: it took {:.0} s, and the memory grew by {:.1} GB; \
                         the template is faulty",
                        start.elapsed().as_secs_f64(),
                        grown as f64 / 1e9
                    ));
                }
            }
        }
    }
}

/// The largest growth of the process's resident memory, in bytes (2 GiB), while a template runs for more than a second.
const MAX_MEMORY_GROWTH: u64 = 2 << 30;

/// The resident memory of the process in bytes; 0 if the system does not report it.
fn resident_bytes() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm").ok();
    let pages = pages.and_then(|text| text.split_whitespace().nth(1)?.parse::<u64>().ok());
    pages.unwrap_or(0) * 4096
}

/// The line of an error for a message, such as `, line 3`.
fn line_suffix(error: &Error) -> String {
    error.line().map_or(String::new(), |line| format!(", line {line}"))
}

/// The kind and the detail of an error.
fn error_text(error: &Error) -> String {
    match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    }
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.into())
}

/// Whether a text or a key in `value` contains the character.
fn holds(value: &Json, c: char) -> bool {
    match value {
        Json::String(text) => text.contains(c),
        Json::Array(items) => items.iter().any(|item| holds(item, c)),
        Json::Object(entries) => entries.iter().any(|(key, item)| key.contains(c) || holds(item, c)),
        _ => false,
    }
}

/// The function behind a `{% generation %}` tag: the block's text, between the two sentinel characters if they are
/// defined.
fn mark(state: &mut State, kwargs: Kwargs) -> Result<String, Error> {
    let caller: Value = kwargs.get("caller")?;
    let text = caller.call(state, &[])?;
    let [open, close] = SENTINEL_VARIABLES.map(|name| state.lookup(name).map_or(String::new(), |c| c.to_string()));
    Ok(format!("{open}{text}{close}"))
}

/// Python's `json.dumps(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
fn to_json(state: &mut State, value: &Value, arguments: Rest<Value>, kwargs: Kwargs) -> Result<String, Error> {
    let argument = |at: usize, name: &str| -> Result<Option<Value>, Error> {
        let named: Option<Value> = kwargs.get(name)?;
        Ok(arguments.get(at).cloned().or(named).filter(|value| !value.is_none() && !value.is_undefined()))
    };
    let ascii = argument(0, "ensure_ascii")?.is_some_and(|flag| flag.is_true());
    let indent = match argument(1, "indent")? {
        None => None,
        Some(text) if text.as_str().is_some() => text.as_str().map(str::to_owned),
        Some(number) => Some(" ".repeat(usize::try_from(number)?.min(100))),
    };
    let separators: Option<Vec<String>> = match argument(2, "separators")? {
        None => None,
        Some(pair) => Some(pair.try_iter()?.map(|text| text.to_string()).collect()),
    };
    let sort = argument(3, "sort_keys")?.is_some_and(|flag| flag.is_true());
    kwargs.assert_all_used()?;
    let (item, key) = match separators.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => return Err(invalid("`separators` of `tojson` are two texts")),
        None => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
    };
    let mut writer = JsonWriter { out: String::new(), indent, item, key, ascii, sort, charged: 0 };
    writer.value(state, value, 0)?;
    Ok(writer.out)
}

/// Writes values as Python's `json.dumps` does.
struct JsonWriter {
    out: String,
    indent: Option<String>,
    item: String,
    key: String,
    ascii: bool,
    sort: bool,
    /// Bytes of `out` that fuel was consumed for.
    charged: usize,
}

impl JsonWriter {
    fn value(&mut self, state: &State, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > MAX_JSON_DEPTH {
            return Err(invalid(format!("`tojson` of more than {MAX_JSON_DEPTH} lists and objects inside each other")));
        }
        state.consume_fuel(1 + (self.out.len() - self.charged) as u64 / 64)?;
        self.charged = self.out.len();
        match value.kind() {
            ValueKind::None => self.out += "null",
            ValueKind::Bool => self.out += if value.is_true() { "true" } else { "false" },
            ValueKind::Number => self.number(value),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let mut empty = true;
                self.out.push('[');
                for item in value.try_iter()? {
                    self.next(&mut empty, depth);
                    self.value(state, &item, depth + 1)?;
                }
                self.close(empty, depth, ']');
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort {
                    keys.sort();
                }
                let mut empty = true;
                self.out.push('{');
                for key in keys {
                    self.next(&mut empty, depth);
                    match key.kind() {
                        ValueKind::None => self.out += "\"null\"",
                        ValueKind::Bool => self.out += if key.is_true() { "\"true\"" } else { "\"false\"" },
                        _ => self.string(&key.to_string()),
                    }
                    self.out += &self.key;
                    self.value(state, &value.get_item(&key)?, depth + 1)?;
                }
                self.close(empty, depth, '}');
            }
            other => return Err(invalid(format!("`tojson` of {other}"))),
        }
        Ok(())
    }

    fn next(&mut self, empty: &mut bool, depth: usize) {
        if !std::mem::replace(empty, false) {
            self.out += &self.item;
        }
        self.line(depth + 1);
    }

    fn close(&mut self, empty: bool, depth: usize, end: char) {
        if !empty {
            self.line(depth);
        }
        self.out.push(end);
    }

    fn line(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.out.push('\n');
            self.out += &indent.repeat(depth);
        }
    }

    fn number(&mut self, value: &Value) {
        match f64::try_from(value.clone()) {
            Ok(number) if !value.is_integer() => self.out += &float(number),
            _ => self.out += &value.to_string(),
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out += "\\\"",
                '\\' => self.out += "\\\\",
                '\n' => self.out += "\\n",
                '\r' => self.out += "\\r",
                '\t' => self.out += "\\t",
                '\u{8}' => self.out += "\\b",
                '\u{c}' => self.out += "\\f",
                c if c < ' ' || self.ascii && !c.is_ascii() => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        self.out += &format!("\\u{unit:04x}");
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

/// A floating-point number as Python writes it: the shortest digits that read back as the same number, with an exponent
/// below 10⁻⁴ and from 10¹⁶.
fn float(number: f64) -> String {
    if !number.is_finite() {
        return if number.is_nan() {
            "NaN"
        } else if number > 0.0 {
            "Infinity"
        } else {
            "-Infinity"
        }
        .into();
    }
    let shortest = format!("{number:e}");
    let (digits, exponent) = shortest.split_once('e').unwrap_or((&shortest, "0"));
    match exponent.parse::<i32>() {
        Ok(exponent) if !(-4..16).contains(&exponent) => {
            let sign = if exponent < 0 { '-' } else { '+' };
            format!("{digits}e{sign}{:02}", exponent.abs())
        }
        _ => format!("{number:?}"),
    }
}
