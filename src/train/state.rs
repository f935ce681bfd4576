//! The saved state of a run: trained values, the optimizer's moments, the step, and the run's identity.
//!
//! A resumed run is bit-identical to an uninterrupted one only if spec, recipe, base weights and data are the same. The
//! state records them, and resuming with others is refused.

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use peft_grammar::model::{Model, Recipe, Schedule, TaskKind, template_source};
use peft_grammar::names::Vector;
use peft_runtime::adapter::{self, Stored, TensorFile};
use peft_runtime::safefile::SafeFile;
use peft_runtime::source::TensorSource;
use peft_runtime::{RuntimeError, Session};
use serde_json::{Map, Value, json};

use crate::adapters::{Adapter, Base};
use crate::data::{Dataset, Goal};
use crate::failure::Failure;
use crate::meaning::{equations_hash, settings};
use crate::train::{decay_start, rate};

/// The file name of a run's newest state.
pub const STATE: &str = "state.safetensors";
/// The file name of the state before the newest.
pub const PREVIOUS: &str = "state.previous.safetensors";

const FORMAT: &str = "peftc state 3";
/// The first format, which records only the name of the spec.
const OLD_FORMAT: &str = "peftc state 1";

/// The key of the note that holds the checksum of the rest of the state: see [`begin_checksum`].
const CHECKSUM: &str = "checksum";

/// Everything that a run's values depend on: settings, tensors and data sets by the names used in messages.
#[derive(Clone, Debug, PartialEq)]
pub struct Identity(Map<String, Value>);

// Keys that are neither a setting nor a tensor of the spec.
const BASE: &str = "base weights";
const BEGINNING: &str = "the adapter it begins with";
const DATA: &str = "training data";
const DEV: &str = "held-out data";
const STEPS: &str = "steps in all";
const EQUATIONS: &str = "the equations' hash";
/// The prefix of the recipe's keys.
const RECIPE: &str = "train.";

impl Identity {
    /// The identity of a run of `total` steps.
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
                put("task.template".into(), json!(template_source(template)));
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
                put("task".into(), json!(kind.keyword()));
                put("task.labels".into(), json!(kind.labels()));
            }
        }
        put("task.max_tokens".into(), json!(model.task.max_tokens));
        for param in &model.params {
            let mut about = vec![json!(param.shape), json!(param.trainable), json!(param.init), json!(param.decay)];
            about.extend(param.lr.map(|lr| json!(lr)));
            put(param.name.clone(), json!(about));
        }
        put(EQUATIONS.into(), json!(equations_hash(model)));
        if let Value::Object(recipe) = json!(model.train) {
            let recipe = recipe.into_iter().filter(|(key, _)| !Recipe::RESUME_MAY_CHANGE.contains(&key.as_str()));
            recipe.for_each(|(key, value)| put(format!("{RECIPE}{key}"), value));
        }
        put(STEPS.into(), json!(total));
        put(BASE.into(), json!(base.fingerprint));
        put(DATA.into(), json!(content(train)));
        put(DEV.into(), json!(dev.map(content)));
        Identity(all)
    }

    /// Adds the adapter whose values the run begins with.
    pub fn starting_from(mut self, adapter: Option<&Adapter>) -> Self {
        self.0.extend(adapter.map(|adapter| (BEGINNING.into(), json!(adapter.fingerprint()))));
        self
    }

    /// The keys whose values differ.
    fn differences<'a>(&'a self, now: &'a Identity) -> Vec<Difference<'a>> {
        let was = self.0.iter().map(|(key, was)| Difference { key, was, is: now.0.get(key).unwrap_or(&Value::Null) });
        let new = now.0.iter().filter(|(key, _)| !self.0.contains_key(*key));
        let new = new.map(|(key, is)| Difference { key, was: &Value::Null, is });
        was.chain(new).filter(|d| d.was != d.is).collect()
    }
}

/// The number of examples, and a hash of their tokens, types and targets.
fn content(data: &Dataset) -> String {
    let mut hash = blake3::Hasher::new();
    for example in data.examples.iter() {
        // For each range the index before its start and its end. An end at the example's end is omitted.
        let spans = |ranges: &[Range<usize>]| -> Vec<i32> {
            let numbers = ranges.iter().flat_map(|range| [range.start - 1, range.end]);
            let mut numbers: Vec<i32> = numbers.map(|n| n as i32).collect();
            numbers.pop_if(|end| *end as usize == example.ids.len());
            numbers
        };
        let goal: Vec<i32> = match &example.goal {
            Goal::Tokens(ranges) => [vec![0], spans(ranges)].concat(),
            Goal::Turns(ranges, extra_targets) => {
                let pairs: Vec<i32> = extra_targets.iter().flat_map(|extra| [extra.at as i32, extra.label]).collect();
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

/// A key with its value in the state and its current value. A missing value is null.
struct Difference<'a> {
    key: &'a str,
    was: &'a Value,
    is: &'a Value,
}

impl Difference<'_> {
    /// What differs, for a message. `None` if a resumed run may change this key.
    fn concerns(&self) -> Option<&'static str> {
        match self.key {
            DEV => None,
            STEPS => match (self.was.as_u64(), self.is.as_u64()) {
                (Some(was), Some(is)) if is > was => None,
                _ => Some("another recipe"),
            },
            BASE => Some("other base weights"),
            BEGINNING => Some("another initial adapter"),
            DATA => Some("other data"),
            key if key.starts_with(RECIPE) => Some("another recipe"),
            _ => Some("another spec"),
        }
    }

    fn describe(&self) -> String {
        let value = |value: &Value| match value {
            Value::Null if self.key.starts_with(RECIPE) => "its default".to_string(),
            Value::Null => "none".to_string(),
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        format!("  {}: {} in the state, {} now", self.key, value(self.was), value(self.is))
    }
}

/// The results of a run's evaluations on held-out data.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct EvaluationHistory {
    /// The step of the latest evaluation.
    pub step: Option<u64>,
    /// The evaluation with the lowest loss.
    pub best: Option<Best>,
    /// The number of evaluations since the best one.
    pub since: u64,
}

/// The evaluation with the lowest loss.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Best {
    /// The number of steps done before the evaluation.
    pub step: u64,
    /// The loss on the held-out data.
    pub loss: f64,
}

impl EvaluationHistory {
    /// Adds an evaluation. Returns whether its loss is the lowest so far.
    pub fn add(&mut self, step: u64, loss: f64) -> bool {
        let better = self.best.is_none_or(|best| loss < best.loss);
        self.step = Some(step);
        if better {
            self.best = Some(Best { step, loss });
        }
        self.since = if better { 0 } else { self.since + 1 };
        better
    }

    /// The notes of a state that record the evaluations.
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
        EvaluationHistory { step: number("judged"), best, since: number("since best").unwrap_or(0) }
    }
}

/// A state on disk. [`State::restore`] reads its vectors.
pub struct State {
    path: PathBuf,
    file: SafeFile,
    /// The number of steps done.
    pub step: u64,
    /// The run's identity. `None` in a file of the first format.
    of: Option<Identity>,
    evaluations: EvaluationHistory,
    /// A warning if this is not the newest state of its folder.
    pub fallback: Option<String>,
}

/// The reason why a state cannot be read.
enum Unreadable {
    /// The file is damaged, and the previous state may be intact.
    Damaged(RuntimeError),
    Other(RuntimeError),
}

impl State {
    /// Opens the state of the run in the folder `out`. If the newest state is damaged or missing, the previous one is
    /// opened.
    ///
    /// # Errors
    ///
    /// There is no readable state (exit code 3).
    pub fn open(out: &Path) -> Result<Self, Failure> {
        let [newest, previous] = [STATE, PREVIOUS].map(|name| out.join(name));
        if !newest.is_file() && !previous.is_file() {
            let why = match out.join(crate::train::metrics::LINES).is_file() {
                true => "no state was saved there, as one is when an epoch ends; start over with `--overwrite`",
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
                Err(RuntimeError::file(&newest, format!("{}; start over with `--overwrite`", reason(&why))).into())
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
                for name in Vector::UPDATED.map(Vector::name).into_iter().filter(|name| file.shape(name).is_some()) {
                    checksum.update(file.raw(name).map_err(Damaged)?.1);
                }
                if note(CHECKSUM) != Some(&checksum.finalize().to_hex()) {
                    return Err(Damaged(wrong("it is damaged: its checksum does not match its content")));
                }
                let of = note("of").and_then(|of| serde_json::from_str(of).ok());
                Some(Identity(of.ok_or_else(|| Other(wrong("it is damaged: it does not record its run's identity")))?))
            }
            _ => {
                return Err(Other(wrong("its format is unknown to this peftc; use the one that wrote it")));
            }
        };
        let evaluations = EvaluationHistory::read(&file.notes);
        Ok(State { path: path.to_owned(), file, step, of, evaluations, fallback: None })
    }

    /// The best evaluation, on whichever held-out data.
    pub fn best(&self) -> Option<Best> {
        self.evaluations.best
    }

    /// The evaluations so far, if they used the held-out data of `now`; else none.
    pub fn evaluations(&self, now: &Identity) -> EvaluationHistory {
        let same = self.of.as_ref().is_some_and(|of| of.0.get(DEV) == now.0.get(DEV));
        if same { self.evaluations } else { EvaluationHistory::default() }
    }

    /// Compares the state's identity with that of the current run. Returns one line for each permitted difference.
    ///
    /// # Errors
    ///
    /// Spec, recipe, base weights or data differ.
    pub fn check(&self, model: &Model, now: &Identity) -> Result<Vec<String>, Failure> {
        let Some(of) = &self.of else {
            return Ok(vec![format!(
                "warning: {}: an older peftc wrote it without recording its run, so spec, recipe, weights and data \
                 are not checked",
                self.path.display()
            )]);
        };
        let differences = of.differences(now);
        let mut concerned: Vec<&str> = differences.iter().filter_map(Difference::concerns).collect();
        concerned.dedup();
        let refused: Vec<&Difference> = differences.iter().filter(|d| d.concerns().is_some()).collect();
        if !refused.is_empty() {
            const SHOWN: usize = 8;
            let mut lines: Vec<String> = refused.iter().take(SHOWN).map(|d| d.describe()).collect();
            if refused.len() > SHOWN {
                lines.push(format!("  and {} more", refused.len() - SHOWN));
            }
            let message = format!(
                "it belongs to {}:\n{}\nresume with the same spec, recipe, weights and data, or start over with \
                 `--overwrite` or another `--out`",
                concerned.join(", "),
                lines.join("\n")
            );
            return Err(RuntimeError::file(&self.path, message).into());
        }
        Ok(differences.iter().map(|d| self.allowed(model, d)).collect())
    }

    /// The line for a permitted difference.
    fn allowed(&self, model: &Model, Difference { key, was, is }: &Difference) -> String {
        let (Some(was), Some(is)) = (was.as_u64(), is.as_u64()) else {
            return format!("note: {key}: other examples than before, so the results are not comparable");
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
                decay_start(&model.train, is) + 1
            ),
        };
        format!("note: the run grows from {was} steps to {is}: {schedule}")
    }

    /// Copies values and moments into the session. If the newest state is damaged, this one replaces it.
    ///
    /// # Errors
    ///
    /// The file cannot be read, or its vectors have another length than the session's.
    pub fn restore(&self, session: &mut Session) -> Result<(), Failure> {
        let count = session.trainable();
        let mut numbers = vec![0.0; count];
        for vector in session.updated_vectors() {
            if self.file.shape(vector.name()) != Some(&[count as u64]) {
                let message = "it belongs to another spec: the number of trained values differs; use another `--out`";
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

/// The message of a file error without its path.
fn reason(error: &RuntimeError) -> String {
    match error {
        RuntimeError::File { message, .. } => message.clone(),
        other => other.to_string(),
    }
}

/// Starts the hash of a state with its notes, without the checksum itself. The bytes of the vectors follow in order.
fn begin_checksum(notes: &BTreeMap<String, String>) -> blake3::Hasher {
    let mut hash = blake3::Hasher::new();
    for (key, value) in notes.iter().filter(|(key, _)| *key != CHECKSUM) {
        for text in [key, value] {
            hash.update(&(text.len() as u64).to_le_bytes()).update(text.as_bytes());
        }
    }
    hash
}

/// Makes the newest state the previous one. A state exists at every moment.
fn keep_previous(out: &Path) -> Result<(), RuntimeError> {
    let [newest, previous] = [STATE, PREVIOUS].map(|name| out.join(name));
    let Ok(newest) = newest.canonicalize() else { return Ok(()) };
    let failed = |error: std::io::Error| RuntimeError::file(&previous, format!("cannot be written: {error}"));
    match fs::remove_file(&previous) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    // If the file system has no hard links, the newest state is renamed until the next one is written.
    fs::hard_link(&newest, &previous).or_else(|_| fs::rename(&newest, &previous)).map_err(failed)
}

/// Writes the state of a session after `step` steps. `again` tells that the newest state belongs to this step too and
/// is overwritten.
///
/// # Errors
///
/// A file cannot be written, or the session's vectors cannot be read.
pub fn save(
    out: &Path,
    session: &Session,
    model: &Model,
    of: &Identity,
    step: u64,
    evaluations: &EvaluationHistory,
    again: bool,
) -> Result<(), RuntimeError> {
    let mut file = TensorFile::default();
    let mut note = |key: &str, value: String| drop(file.notes.insert(key.into(), value));
    note("format", FORMAT.into());
    note("spec", model.name.clone());
    note("step", step.to_string());
    note("of", Value::Object(of.0.clone()).to_string());
    evaluations.notes().into_iter().for_each(|(key, value)| note(key, value));
    let mut checksum = begin_checksum(&file.notes);
    for vector in session.updated_vectors() {
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
