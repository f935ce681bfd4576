//! The state of a run, from which it is resumed: trained values, the optimizer's moments, the step, and what they belong to.
//!
//! A resumed run gives the bits of one that was never stopped only if its spec, recipe, base weights and data are the
//! same. The state records them, and is refused with others.

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use peft_grammar::model::{Model, Recipe, Schedule, TaskKind, written};
use peft_grammar::names::Vector;
use peft_runtime::adapter::{self, Stored, TensorFile};
use peft_runtime::safefile::SafeFile;
use peft_runtime::source::TensorSource;
use peft_runtime::{RuntimeError, Session};
use serde_json::{Map, Value, json};

use crate::adapters::{Adapter, Base};
use crate::data::{Dataset, Goal};
use crate::failure::Failure;
use crate::meaning::{equations, settings};
use crate::train::{rate, stable};

/// A run's state, in its folder.
pub const STATE: &str = "state.safetensors";
/// The one that was saved before it.
pub const PREVIOUS: &str = "state.previous.safetensors";

const FORMAT: &str = "peftc state 3";
/// The first format, which records the name of the spec and nothing else.
const OLD_FORMAT: &str = "peftc state 1";

/// The note that holds the hash of all else: see [`begin_checksum`].
const CHECKSUM: &str = "checksum";

/// What the values of a run depend on: each setting, tensor and data set by the name that messages give it.
#[derive(Clone, Debug, PartialEq)]
pub struct Identity(Map<String, Value>);

// Keys that stand for something else than a setting or a tensor of the spec.
const BASE: &str = "base weights";
const BEGINNING: &str = "the adapter it begins with";
const DATA: &str = "training data";
const DEV: &str = "held-out data";
const STEPS: &str = "steps in all";
const EQUATIONS: &str = "the equations' hash";
/// The prefix of the recipe's keys.
const RECIPE: &str = "train.";

impl Identity {
    /// `total` is the number of steps of the whole run.
    pub fn of(model: &Model, base: &Base, train: &Dataset, dev: Option<&Dataset>, total: u64) -> Self {
        let mut all = Map::new();
        let mut put = |key: String, value: Value| drop(all.insert(key, value));
        put("the backbone".into(), json!(model.backbone.name));
        settings(model).into_iter().for_each(|(key, value)| put(key, value));
        model.applied.iter().for_each(|applied| put(applied.path(), json!("applied")));
        match &model.task.kind {
            TaskKind::Generation { special, template, target, each, pack } => {
                put("task".into(), json!("generation"));
                put("task.special".into(), json!(special));
                put("task.template".into(), json!(written(template)));
                put("task.target".into(), json!(target));
                if !each.is_empty() {
                    put("task.each".into(), json!(each));
                }
                if *pack {
                    put("task.pack".into(), json!(pack));
                }
            }
            TaskKind::Chat | TaskKind::Text { .. } => put("task".into(), json!(model.task.kind)),
            kind => {
                put("task".into(), json!(kind.word()));
                put("task.labels".into(), json!(kind.labels()));
            }
        }
        put("task.max_tokens".into(), json!(model.task.max_tokens));
        for param in &model.params {
            let mut about = vec![json!(param.shape), json!(param.trainable), json!(param.init), json!(param.decay)];
            about.extend(param.lr.map(|lr| json!(lr)));
            put(param.name.clone(), json!(about));
        }
        put(EQUATIONS.into(), json!(equations(model)));
        if let Value::Object(recipe) = json!(model.train) {
            let recipe = recipe.into_iter().filter(|(key, _)| !Recipe::FREE.contains(&key.as_str()));
            recipe.for_each(|(key, value)| put(format!("{RECIPE}{key}"), value));
        }
        put(STEPS.into(), json!(total));
        put(BASE.into(), json!(base.fingerprint));
        put(DATA.into(), json!(content(train)));
        put(DEV.into(), json!(dev.map(content)));
        Identity(all)
    }

    /// The same of a run that begins with the values of an adapter.
    pub fn begun_with(mut self, adapter: Option<&Adapter>) -> Self {
        self.0.extend(adapter.map(|adapter| (BEGINNING.into(), json!(adapter.fingerprint()))));
        self
    }

    /// Every key whose values differ.
    fn differences<'a>(&'a self, now: &'a Identity) -> Vec<Difference<'a>> {
        let was = self.0.iter().map(|(key, was)| Difference { key, was, is: now.0.get(key).unwrap_or(&Value::Null) });
        let new = now.0.iter().filter(|(key, _)| !self.0.contains_key(*key));
        let new = new.map(|(key, is)| Difference { key, was: &Value::Null, is });
        was.chain(new).filter(|d| d.was != d.is).collect()
    }
}

/// The number of examples, and the hash of their tokens and labels as the model sees them.
fn content(data: &Dataset) -> String {
    let mut hash = blake3::Hasher::new();
    for example in data.examples.iter() {
        // What stands before each range, and where all but the last token of the example are no targets, its end.
        let spans = |ranges: &[Range<usize>]| -> Vec<i32> {
            let numbers = ranges.iter().flat_map(|range| [range.start - 1, range.end]);
            let mut numbers: Vec<i32> = numbers.map(|n| n as i32).collect();
            numbers.pop_if(|end| *end as usize == example.ids.len());
            numbers
        };
        let goal: Vec<i32> = match &example.goal {
            Goal::Tokens(ranges) => [vec![0], spans(ranges)].concat(),
            Goal::Turns(ranges, asides) => {
                let pairs: Vec<i32> = asides.iter().flat_map(|aside| [aside.at as i32, aside.label]).collect();
                [vec![2, pairs.len() as i32], pairs, spans(ranges)].concat()
            }
            Goal::Class(class) => vec![1, *class],
            Goal::Number(number) => vec![3, number.to_bits().cast_signed()],
            Goal::Tags(tags) => std::iter::once(4).chain(tags.iter().copied()).collect(),
        };
        let numbers = [&[example.ids.len() as i32], &goal[..], &example.ids, &example.types].concat();
        hash.update(&numbers.iter().flat_map(|n| n.to_le_bytes()).collect::<Vec<u8>>());
    }
    format!("{} examples, {}", data.len(), &hash.finalize().to_hex()[..16])
}

/// A key whose value was one thing in the state and is another now; null where there is none.
struct Difference<'a> {
    key: &'a str,
    was: &'a Value,
    is: &'a Value,
}

impl Difference<'_> {
    /// What the state belongs to instead, as a message names it; `None` if a run may change this key.
    fn concerns(&self) -> Option<&'static str> {
        match self.key {
            DEV => None,
            STEPS => match (self.was.as_u64(), self.is.as_u64()) {
                (Some(was), Some(is)) if is > was => None,
                _ => Some("another recipe"),
            },
            BASE => Some("other base weights"),
            BEGINNING => Some("another beginning"),
            DATA => Some("other data"),
            key if key.starts_with(RECIPE) => Some("another recipe"),
            _ => Some("another spec"),
        }
    }

    fn say(&self) -> String {
        let value = |value: &Value| match value {
            Value::Null if self.key.starts_with(RECIPE) => "its default".to_string(),
            Value::Null => "none".to_string(),
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        format!("  {}: {} in the state, {} now", self.key, value(self.was), value(self.is))
    }
}

/// What evaluations on held-out data have found in a run.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Judged {
    /// The step of the latest one.
    pub step: Option<u64>,
    pub best: Option<Best>,
    /// Evaluations since the best one.
    pub since: u64,
}

/// The evaluation with the lowest loss.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Best {
    pub step: u64,
    pub loss: f64,
}

impl Judged {
    /// Takes note of an evaluation; gives whether it is the best one so far.
    pub fn add(&mut self, step: u64, loss: f64) -> bool {
        let better = self.best.is_none_or(|best| loss < best.loss);
        self.step = Some(step);
        if better {
            self.best = Some(Best { step, loss });
        }
        self.since = if better { 0 } else { self.since + 1 };
        better
    }

    /// Notes of a state, by key.
    fn notes(&self) -> Vec<(&'static str, String)> {
        let step = self.step.map(|step| ("judged", step.to_string()));
        let best = self.best.map(|best| ("best", format!("{} {:?}", best.step, best.loss)));
        let since = (self.since > 0).then(|| ("since best", self.since.to_string()));
        [step, best, since].into_iter().flatten().collect()
    }

    fn read(notes: &BTreeMap<String, String>) -> Self {
        let best = notes.get("best").and_then(|note| {
            let (step, loss) = note.split_once(' ')?;
            Some(Best { step: step.parse().ok()?, loss: loss.parse().ok()? })
        });
        let number = |key: &str| notes.get(key).and_then(|note| note.parse().ok());
        Judged { step: number("judged"), best, since: number("since best").unwrap_or(0) }
    }
}

/// A state on disk. Its vectors are read by [`State::restore`].
pub struct State {
    path: PathBuf,
    file: SafeFile,
    /// Steps that are done.
    pub step: u64,
    /// `None` in a file of the older format.
    of: Option<Identity>,
    judged: Judged,
    /// Why it is not the newest one of its folder.
    pub fallback: Option<String>,
}

/// Why a state cannot be read.
enum Unreadable {
    /// The one before it may be whole.
    Damaged(RuntimeError),
    Other(RuntimeError),
}

impl State {
    /// Opens the state of the run in the folder `out`: the newest, or if that is damaged or missing the one before it.
    /// Fails with exit code 3 if there is none.
    pub fn open(out: &Path) -> Result<Self, Failure> {
        let [newest, previous] = [STATE, PREVIOUS].map(|name| out.join(name));
        if !newest.is_file() && !previous.is_file() {
            let why = match out.join(crate::train::metrics::LINES).is_file() {
                true => "no state was saved there, as one is when an epoch ends; begin anew with `--overwrite`",
                false => "no run was stopped there; begin one without `--resume`, or name its folder with `--out`",
            };
            return Err(RuntimeError::file(out, format!("`--resume` finds no `{STATE}`: {why}")).into());
        }
        let why = match newest.is_file().then(|| State::read(&newest)) {
            Some(Ok(state)) => return Ok(state),
            Some(Err(Unreadable::Other(error))) => return Err(error.into()),
            Some(Err(Unreadable::Damaged(error))) => error,
            None => RuntimeError::file(&newest, "it is missing"),
        };
        match State::read(&previous) {
            Ok(state) => {
                let step = state.step;
                let fallback =
                    Some(format!("warning: {why}; the run goes on from the state before it, of step {step}"));
                Ok(State { fallback, ..state })
            }
            Err(_) => {
                Err(RuntimeError::file(&newest, format!("{}; begin anew with `--overwrite`", reason(&why))).into())
            }
        }
    }

    fn read(path: &Path) -> Result<Self, Unreadable> {
        use Unreadable::{Damaged, Other};
        let file = SafeFile::open(path).map_err(Damaged)?;
        let wrong = |message: &str| RuntimeError::file(path, message);
        let note = |key: &str| file.notes.get(key).map(String::as_str);
        let step = note("step").and_then(|s| s.parse().ok());
        let step = step.ok_or_else(|| Damaged(wrong("it names no step: this is no state of a run")))?;
        let of = match note("format") {
            Some(OLD_FORMAT) => None,
            Some(FORMAT) => {
                let mut checksum = begin_checksum(&file.notes);
                for name in Vector::CHANGED.map(Vector::name).into_iter().filter(|name| file.shape(name).is_some()) {
                    checksum.update(file.stored(name).map_err(Damaged)?.1);
                }
                if note(CHECKSUM) != Some(&checksum.finalize().to_hex()) {
                    return Err(Damaged(wrong("it is damaged: its checksum is that of other content")));
                }
                let of = note("of").and_then(|of| serde_json::from_str(of).ok());
                Some(Identity(of.ok_or_else(|| Other(wrong("it does not say what it is of: it is damaged")))?))
            }
            _ => {
                return Err(Other(wrong("it is of a format that this peftc does not know; use the one that wrote it")));
            }
        };
        let judged = Judged::read(&file.notes);
        Ok(State { path: path.to_owned(), file, step, of, judged, fallback: None })
    }

    /// The best evaluation, on whatever data.
    pub fn found(&self) -> Option<Best> {
        self.judged.best
    }

    /// What evaluations have found, if they were on the held-out data of `now`.
    pub fn judged(&self, now: &Identity) -> Judged {
        let same = self.of.as_ref().is_some_and(|of| of.0.get(DEV) == now.0.get(DEV));
        if same { self.judged } else { Judged::default() }
    }

    /// Refuses a state whose spec, recipe, base weights or data differ from `now`. Returns a line for each difference
    /// that is allowed.
    pub fn check(&self, model: &Model, now: &Identity) -> Result<Vec<String>, Failure> {
        let Some(of) = &self.of else {
            return Ok(vec![format!(
                "warning: {}: an older peftc wrote it, without what it is of: spec, recipe, weights and data are taken on \
                 trust",
                self.path.display()
            )]);
        };
        let differences = of.differences(now);
        let mut concerned: Vec<&str> = differences.iter().filter_map(Difference::concerns).collect();
        concerned.dedup();
        let refused: Vec<&Difference> = differences.iter().filter(|d| d.concerns().is_some()).collect();
        if !refused.is_empty() {
            const SHOWN: usize = 8;
            let mut lines: Vec<String> = refused.iter().take(SHOWN).map(|d| d.say()).collect();
            if refused.len() > SHOWN {
                lines.push(format!("  and {} more", refused.len() - SHOWN));
            }
            let message = format!(
                "it is of {}:\n{}\nresume with what it is of, or begin anew with `--overwrite` or another `--out`",
                concerned.join(", "),
                lines.join("\n")
            );
            return Err(RuntimeError::file(&self.path, message).into());
        }
        Ok(differences.iter().map(|d| self.allowed(model, d)).collect())
    }

    /// The line for a difference that is allowed.
    fn allowed(&self, model: &Model, Difference { key, was, is }: &Difference) -> String {
        let (Some(was), Some(is)) = (was.as_u64(), is.as_u64()) else {
            return format!("note: {key}: other examples than before; figures on them do not compare");
        };
        let next = rate(&model.train, self.step, is);
        let step = self.step.saturating_add(1);
        let schedule = match model.train.schedule {
            Schedule::Constant => format!("the rate is constant, {next:.2e} at step {step}"),
            Schedule::Linear | Schedule::Cosine | Schedule::Polynomial { .. } => {
                format!("the rate goes on as in a run of {is} steps, with {next:.2e} at step {step}")
            }
            Schedule::Wsd { .. } => format!(
                "the rate goes on as in a run of {is} steps, with {next:.2e} at step {step}, and decays from step {} on",
                stable(&model.train, is) + 1
            ),
        };
        format!("note: the run grows from {was} steps to {is}: {schedule}")
    }

    /// Copies values and moments into the session. A damaged newer state makes room for this one.
    pub fn restore(&self, session: &mut Session) -> Result<(), Failure> {
        let count = session.trainable();
        let mut numbers = vec![0.0; count];
        for vector in session.optimized() {
            if self.file.shape(vector.name()) != Some(&[count as u64]) {
                let message = "it is of another spec: the trained values differ in number; use another `--out`";
                return Err(RuntimeError::file(&self.path, message).into());
            }
            self.file.floats(vector.name(), &mut numbers)?;
            session.set_flat(vector, &numbers)?;
        }
        if self.fallback.is_some() {
            let newest = self.path.with_file_name(STATE);
            fs::rename(&self.path, &newest).map_err(Failure::file(&newest))?;
        }
        Ok(())
    }
}

/// What an error says of its file.
fn reason(error: &RuntimeError) -> String {
    match error {
        RuntimeError::File { message, .. } => message.clone(),
        other => other.to_string(),
    }
}

/// Begins the hash of a state: its notes, but for the checksum itself. The bytes of the vectors follow, in their order.
fn begin_checksum(notes: &BTreeMap<String, String>) -> blake3::Hasher {
    let mut hash = blake3::Hasher::new();
    for (key, value) in notes.iter().filter(|(key, _)| *key != CHECKSUM) {
        for text in [key, value] {
            hash.update(&(text.len() as u64).to_le_bytes()).update(text.as_bytes());
        }
    }
    hash
}

/// The newest state becomes the one before it. There is one at every moment.
fn keep_previous(out: &Path) -> Result<(), RuntimeError> {
    let [newest, previous] = [STATE, PREVIOUS].map(|name| out.join(name));
    let Ok(newest) = newest.canonicalize() else { return Ok(()) };
    let failed = |error: std::io::Error| RuntimeError::file(&previous, format!("cannot be written: {error}"));
    match fs::remove_file(&previous) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    // Where a file system has no second names, the state has this one until the next is written.
    fs::hard_link(&newest, &previous).or_else(|_| fs::rename(&newest, &previous)).map_err(failed)
}

/// Writes the state of a session after `step` steps. `again`: the newest state is of this step too, and is replaced.
pub fn save(
    out: &Path,
    session: &Session,
    model: &Model,
    of: &Identity,
    step: u64,
    judged: &Judged,
    again: bool,
) -> Result<(), RuntimeError> {
    let mut file = TensorFile::default();
    let mut note = |key: &str, value: String| drop(file.notes.insert(key.into(), value));
    note("format", FORMAT.into());
    note("spec", model.name.clone());
    note("step", step.to_string());
    note("of", Value::Object(of.0.clone()).to_string());
    judged.notes().into_iter().for_each(|(key, value)| note(key, value));
    let mut checksum = begin_checksum(&file.notes);
    for vector in session.optimized() {
        let flat = session.flat(vector)?.into_owned();
        for part in flat.chunks(1 << 16) {
            checksum.update(&part.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>());
        }
        file.tensors.insert(vector.name().into(), Stored::f32(vec![flat.len() as u64], flat));
    }
    file.notes.insert(CHECKSUM.into(), checksum.finalize().to_hex().to_string());
    if !again {
        keep_previous(out)?;
    }
    adapter::save(&out.join(STATE), &file)
}

#[cfg(test)]
mod tests;
