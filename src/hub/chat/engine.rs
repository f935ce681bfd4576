//! A chat template's environment, as transformers sets one up (`utils/chat_template_utils.py`), with a bound on its work.

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

/// Steps that a template may take for one conversation; 64 bytes of text that it makes or reads count as a step.
const FUEL: u64 = 2_000_000;

/// Calls of macros inside each other.
const RECURSION: usize = 100;

/// Lists and objects inside each other that are written as JSON.
const DEPTH: usize = 100;

/// The one template of an environment.
const NAME: &str = "chat";

/// Variables that hold the characters around a mark.
const SENTINELS: [&str; 2] = ["__generation_open__", "__generation_close__"];

pub struct Engine {
    environment: Environment<'static>,
    source: String,
    /// Where the template is from, for messages.
    place: String,
    tokens: Vec<(String, String)>,
    marked: bool,
    dated: bool,
}

/// What `raise_exception` says.
#[derive(Debug)]
struct Raised(String);

impl fmt::Display for Raised {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

impl Engine {
    pub fn new(source: &str, place: String, tokens: &[(String, String)], now: i64) -> Result<Self, String> {
        let mut environment = Environment::new();
        let mut syntax = SyntaxConfig::builder();
        syntax.trim_blocks(true).lstrip_blocks(true);
        let syntax = syntax.build().map_err(|e| e.to_string())?;
        environment.set_syntax(syntax);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment.set_fuel(Some(FUEL));
        environment.set_recursion_limit(RECURSION);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.set_formatter(|out, state, value| match f64::try_from(value.clone()) {
            Ok(number) if value.is_number() && !value.is_integer() => Ok(out.write_str(&float(number))?),
            _ => minijinja::escape_formatter(out, state, value),
        });
        environment.remove_global("debug");
        // Not of Jinja2, and not held to the bound on work.
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
            .add_template_owned(NAME, rewritten)
            .map_err(|error| format!("{place}{}: {}; correct the template", line(&error), said(&error)))?;
        let names = environment.get_template(NAME).map_err(|e| e.to_string())?.undeclared_variables(false);
        let dated = names.contains("strftime_now");
        Ok(Engine { environment, source: source.to_owned(), place, tokens: tokens.to_vec(), marked, dated })
    }

    /// It marks what the assistant says.
    pub fn marked(&self) -> bool {
        self.marked
    }

    /// It asks for the date.
    pub fn dated(&self) -> bool {
        self.dated
    }

    pub fn render(&self, messages: &[Value], tools: Option<&Json>, prompt: bool) -> Result<String, String> {
        self.text(messages, tools, prompt, None)
    }

    /// The text of a conversation with a character before and one behind what is marked.
    pub fn render_marked(&self, messages: &[Value], tools: Option<&Json>, around: [char; 2]) -> Result<String, String> {
        self.text(messages, tools, false, Some(around))
    }

    /// Two characters of private use that neither the template nor the conversation holds.
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
        for (name, c) in SENTINELS.iter().zip(around.into_iter().flatten()) {
            context.push((name, Value::from(c.to_string())));
        }
        let template = self.environment.get_template(NAME).map_err(|e| e.to_string())?;
        template
            .render(Value::from(context.into_iter().collect::<BTreeMap<_, _>>()))
            .map_err(|error| self.refusal(&error))
    }

    /// Why a conversation is not rendered.
    fn refusal(&self, error: &Error) -> String {
        let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
        while let Some(inner) = cause {
            if let Some(Raised(message)) = inner.downcast_ref() {
                return format!("the chat template refuses it: {message}");
            }
            if inner.downcast_ref::<Error>().is_some_and(|e| e.kind() == ErrorKind::OutOfFuel) {
                return format!(
                    "{}{}: the template does not come to an end within {FUEL} steps, or makes more than {} MB of text; \
                     it is faulty, or the conversation is too long for it",
                    self.place,
                    line(error),
                    FUEL * 64 / 1_000_000
                );
            }
            cause = inner.source();
        }
        format!("{}{}: {}", self.place, line(error), said(error))
    }
}

/// Runs the work of a template on a thread of its own, for `limit` at most.
///
/// Its stack holds as many values inside each other as the template has steps for, since they are written, compared and
/// freed by recursion; of the stack only what is used takes memory. A sum of lists counts as one step, whatever its
/// length, so the memory of the process is watched as well. A thread that has gone too far cannot be stopped: it ends
/// with the process, which the error is to end. `faulty` is set then, and no other work is begun.
pub fn watched<T: Send + 'static>(
    limit: Duration,
    faulty: &AtomicBool,
    work: impl FnOnce() -> Result<T, String> + Send + 'static,
) -> Result<T, String> {
    const STACK: usize = 1 << 30;
    const PAUSE: Duration = Duration::from_secs(1);
    if faulty.load(Ordering::Relaxed) {
        return Err("the chat template did not come to an end for another conversation".into());
    }
    let (sender, receiver) = mpsc::channel();
    // Nobody may be there to receive any more.
    let run = move || drop(sender.send(work()));
    let thread = std::thread::Builder::new().name("chat template".into()).stack_size(STACK).spawn(run);
    thread.map_err(|e| format!("no thread could be started for the chat template: {e}"))?;
    let (start, mut first) = (Instant::now(), None);
    loop {
        match receiver.recv_timeout(PAUSE.min(limit)) {
            Ok(result) => return result,
            Err(RecvTimeoutError::Disconnected) => return Err("crate `minijinja` panics on the chat template".into()),
            Err(RecvTimeoutError::Timeout) => {
                let now = resident();
                let grown = now.saturating_sub(*first.get_or_insert(now));
                if start.elapsed() >= limit || grown > MEMORY {
                    faulty.store(true, Ordering::Relaxed);
                    return Err(format!(
                        "the chat template does not come to an end: it took {:.0} s, and {:.1} GB of memory were added \
                         meanwhile; it is faulty",
                        start.elapsed().as_secs_f64(),
                        grown as f64 / 1e9
                    ));
                }
            }
        }
    }
}

/// By how much the process may grow while a template that takes seconds runs.
const MEMORY: u64 = 2 << 30;

/// Bytes of the process's memory that are in use, 0 where the system does not say.
fn resident() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm").ok();
    let pages = pages.and_then(|text| text.split_whitespace().nth(1)?.parse::<u64>().ok());
    pages.unwrap_or(0) * 4096
}

fn line(error: &Error) -> String {
    error.line().map_or(String::new(), |line| format!(", line {line}"))
}

fn said(error: &Error) -> String {
    match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    }
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.into())
}

fn holds(value: &Json, c: char) -> bool {
    match value {
        Json::String(text) => text.contains(c),
        Json::Array(items) => items.iter().any(|item| holds(item, c)),
        Json::Object(entries) => entries.iter().any(|(key, item)| key.contains(c) || holds(item, c)),
        _ => false,
    }
}

/// What a mark holds, between two characters where they are asked for.
fn mark(state: &mut State, kwargs: Kwargs) -> Result<String, Error> {
    let caller: Value = kwargs.get("caller")?;
    let text = caller.call(state, &[])?;
    let [open, close] = SENTINELS.map(|name| state.lookup(name).map_or(String::new(), |c| c.to_string()));
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
    let mut writer = Writer { out: String::new(), indent, item, key, ascii, sort, paid: 0 };
    writer.value(state, value, 0)?;
    Ok(writer.out)
}

struct Writer {
    out: String,
    indent: Option<String>,
    item: String,
    key: String,
    ascii: bool,
    sort: bool,
    /// Bytes that fuel was taken for.
    paid: usize,
}

impl Writer {
    fn value(&mut self, state: &State, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > DEPTH {
            return Err(invalid(format!("`tojson` of more than {DEPTH} lists and objects inside each other")));
        }
        state.consume_fuel(1 + (self.out.len() - self.paid) as u64 / 64)?;
        self.paid = self.out.len();
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

/// A floating-point number as Python writes it: the fewest digits that are read back as the number, with an exponent
/// below 10⁻⁴ and from 10¹⁶ on.
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
