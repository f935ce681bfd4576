//! Trained values on disk: our own file, a run's or an export's folder, or a folder that PEFT wrote.
//!
//! An adapter is valid only on the weights it was trained on. It holds those of them that no file has, because they were
//! drawn at random and do not train, and the fingerprint of the others.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use peft_grammar::model::{Model, Origin, Param, Trainable};
use peft_grammar::names;
use peft_runtime::adapter::{self, Data, Stored, TensorFile};
use peft_runtime::artifact::{Entry, Manifest, Storage};
use peft_runtime::fingerprint::fingerprint;
use peft_runtime::safefile::SafeFile;
use peft_runtime::weights::Loaded;
use peft_runtime::{Inputs, Numbers, Program, RuntimeError, Session};

use crate::failure::Failure;
use crate::hub::checkpoint;
use crate::hub::peft::{self, Imported, Residual, Tensors};
use crate::meaning;

/// What the trained values of a run (or an export) are kept in.
pub const ADAPTER: &str = "adapter.safetensors";
/// Those of a run at its best evaluation.
pub const BEST: &str = "best.safetensors";

const FORMAT: &str = "peftc adapter 1";

/// Notes in an adapter's file.
mod note {
    /// What the values mean: [`crate::meaning::record`].
    pub const OF: &str = "of";
    /// The seed from which frozen tensors that are not in the file are drawn again.
    pub const SEED: &str = "seed";
    /// [`super::Base::fingerprint`].
    pub const BASE: &str = "base";
    /// The keys of [`super::Base::drawn`], as a list in JSON.
    pub const DRAWN: &str = "drawn";
}

/// The weights below an adapter.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Base {
    /// `files HASH` or `random HASH`; empty if it is not known.
    pub fingerprint: String,
    /// Frozen tensors that the checkpoint lacks, as they were drawn at random. The key is the tensor's name, or
    /// `NAME[start:end]` if only these rows are missing there.
    pub drawn: Tensors,
    /// The seed that tensors were drawn from.
    pub seed: Option<u64>,
}

impl Base {
    /// The base that these weights are.
    pub fn of(model: &Model, loaded: &Loaded) -> Self {
        let mut drawn = Tensors::new();
        for (index, param, rows) in drawn_parts(model, loaded) {
            // A base that is random as a whole is determined by the seed.
            if !is_random(loaded) && !trains(param, rows) {
                let (key, shape, numbers) = rows_of(param, &loaded.tensors[index], rows);
                drawn.insert(key, Stored::f32(shape, numbers.to_vec()));
            }
        }
        Base { fingerprint: base_fingerprint(model, loaded, &drawn), drawn, seed: Some(model.train.seed) }
    }

    fn random(&self) -> bool {
        self.fingerprint.starts_with(RANDOM)
    }
}

const RANDOM: &str = "random ";
const FILES: &str = "files ";

/// Whether every tensor was drawn at random.
fn is_random(loaded: &Loaded) -> bool {
    loaded.held.iter().all(Option::is_none)
}

/// The backbone's and head's tensors that the checkpoint lacks: the index of each parameter and the rows `start..end`
/// that are missing.
fn drawn_parts<'a>(model: &'a Model, loaded: &'a Loaded) -> impl Iterator<Item = (usize, &'a Param, (u64, u64))> {
    let all = model.params.iter().zip(&loaded.held).enumerate();
    all.filter(|(_, (param, _))| !matches!(param.origin, Origin::Method(_))).filter_map(|(index, (param, held))| {
        let (start, end) = (held.map_or(0, |held| held.rows), rows(param));
        (start < end).then_some((index, param, (start, end)))
    })
}

/// Whether all of these rows train.
fn trains(param: &Param, rows: (u64, u64)) -> bool {
    param.trained_rows().is_some_and(|(start, end)| start <= rows.0 && rows.1 <= end)
}

fn rows(param: &Param) -> u64 {
    param.shape.first().copied().unwrap_or(1)
}

/// The key in [`Base::drawn`], the shape and the numbers of some rows of a parameter.
fn rows_of<'a>(param: &Param, numbers: &'a [f32], (start, end): (u64, u64)) -> (String, Vec<u64>, &'a [f32]) {
    let mut shape = param.shape.clone();
    shape.iter_mut().take(1).for_each(|rows| *rows = end - start);
    let row = numbers.len() / rows(param).max(1) as usize;
    let key = match (start, end) == (0, rows(param)) {
        true => param.name.clone(),
        false => format!("{}[{start}:{end}]", param.name),
    };
    (key, shape, &numbers[start as usize * row..end as usize * row])
}

/// The parameter, with its index, and the rows that a key of [`Base::drawn`] names.
fn locate<'a>(model: &'a Model, key: &str) -> Option<(usize, &'a Param, (u64, u64))> {
    let find = |name: &str| model.params.iter().enumerate().find(|(_, p)| p.name == name);
    if let Some((index, param)) = find(key) {
        return Some((index, param, (0, rows(param))));
    }
    let (name, range) = key.strip_suffix(']')?.rsplit_once('[')?;
    let (start, end) = range.split_once(':')?;
    let (start, end) = (start.parse().ok()?, end.parse().ok()?);
    let (index, param) = find(name)?;
    (start < end && end <= rows(param)).then_some((index, param, (start, end)))
}

/// The fingerprint of the frozen base weights without those in `drawn`: of what the files hold, or of all tensors if
/// everything is random.
fn base_fingerprint(model: &Model, loaded: &Loaded, drawn: &Tensors) -> String {
    let random = is_random(loaded);
    let mut own = BTreeMap::new();
    for key in drawn.keys() {
        if let Some((index, _, (start, _))) = locate(model, key) {
            own.insert(index, start);
        }
    }
    let mut parts = vec![];
    for (index, param) in model.params.iter().enumerate() {
        let Some(held) = (if random { Some(rows(param)) } else { loaded.held[index].map(|held| held.rows) }) else {
            continue;
        };
        if matches!(param.origin, Origin::Method(_)) {
            continue;
        }
        let end = own.get(&index).map_or(held, |&start| held.min(start));
        // The adapter has its own values for rows that train.
        let (from, to) = param.trained_rows().unwrap_or((end, end));
        for (start, end) in [(0, end.min(from)), (to, end)] {
            if start < end {
                parts.push(rows_of(param, &loaded.tensors[index], (start, end)));
            }
        }
    }
    let parts: Vec<_> = parts.iter().map(|(key, shape, numbers)| (key.as_str(), shape.clone(), *numbers)).collect();
    format!("{}{}", if random { RANDOM } else { FILES }, fingerprint(&parts))
}

/// Loads every tensor of the model and the adapter at `path`, whose drawn tensors take the place of missing ones. Tensors
/// that are drawn at random are listed on standard error.
pub fn weights(from: &Path, model: &Model, path: Option<&Path>) -> Result<(Loaded, Option<Adapter>), Failure> {
    let mut loaded = checkpoint::weights(from, model)?;
    let adapter = path.map(|path| load(model, path)).transpose()?;
    if let Some(adapter) = &adapter {
        adapter.settle(model, &mut loaded)?;
    }
    tell_drawn(model, &loaded, adapter.as_ref())?;
    Ok((loaded, adapter))
}

/// Lists on standard error the tensors that neither the checkpoint nor `adapter` holds, so that they are random. With an
/// adapter, which was trained beside others, that is an error; one of an older peftc may have been trained beside these.
fn tell_drawn(model: &Model, loaded: &Loaded, adapter: Option<&Adapter>) -> Result<(), RuntimeError> {
    if is_random(loaded) {
        return Ok(());
    }
    let name = |(index, param, rows): (usize, &Param, (u64, u64))| {
        let key = rows_of(param, &loaded.tensors[index], rows).0;
        let brought = adapter.is_some_and(|a| a.drawn.contains_key(&key) || trains(param, rows));
        (!brought).then_some(key)
    };
    let all: Vec<String> = drawn_parts(model, loaded).filter_map(name).collect();
    if all.is_empty() {
        return Ok(());
    }
    if let Some(Adapter { path, .. }) = adapter.filter(|a| a.notes.is_empty() || a.notes.contains_key(note::OF)) {
        let message = format!(
            "  neither the weights nor the adapter hold {}, so that the adapter would be used beside random numbers; use \
             the weights that it was trained on",
            all.join(", ")
        );
        return Err(RuntimeError::weights(path, message));
    }
    crate::commands::say(&format!("new here, drawn at random: {}", all.join(", ")));
    Ok(())
}

/// Trained values with what they were trained on.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Adapter {
    path: PathBuf,
    /// Exactly the tensors that the model trains.
    pub values: Tensors,
    /// As [`Base::drawn`].
    pub drawn: Tensors,
    /// What it takes out of the base's matrices.
    residuals: Vec<Residual>,
    notes: BTreeMap<String, String>,
}

impl Adapter {
    /// Copies the adapter's drawn tensors into the weights and compares the others with those it was trained on: a
    /// difference is a warning, or an error if either is random.
    fn settle(&self, model: &Model, loaded: &mut Loaded) -> Result<(), Failure> {
        for key in self.drawn.keys() {
            if let Some((index, _, (start, end))) = locate(model, key)
                && loaded.held[index].is_some_and(|held| held.rows > start && end > start)
            {
                crate::commands::say(&match self.notes.is_empty() {
                    true => format!("note: the adapter holds `{key}`, which is used in place of that of these weights"),
                    false => format!(
                        "note: these weights hold `{key}`; the adapter was trained beside one drawn at random, which is used"
                    ),
                });
            }
        }
        self.check_base(model, loaded)?;
        Ok(self.change_base(model, &mut loaded.tensors)?)
    }

    fn check_base(&self, model: &Model, loaded: &Loaded) -> Result<(), RuntimeError> {
        let Some(there) = self.notes.get(note::BASE) else { return Ok(()) };
        let here = base_fingerprint(model, loaded, &self.drawn);
        let hash = |fingerprint: &str| fingerprint.rsplit(' ').next().map(String::from);
        if hash(&here) == hash(there) {
            return Ok(());
        }
        let path = self.path.display();
        let (seed, now) = (self.notes.get(note::SEED), model.train.seed);
        match (there.starts_with(RANDOM), here.starts_with(RANDOM), seed) {
            (true, true, Some(seed)) if *seed != now.to_string() => Err(RuntimeError::weights(
                &self.path,
                format!(
                    "  all weights were drawn from the seed, which was {seed} in training; use `--set train.seed={seed}`"
                ),
            )),
            (true, true, _) => Err(RuntimeError::weights(
                &self.path,
                "  it was trained on weights drawn at random, and the backbone of this spec draws others: its shape or its \
                 initialisation has changed",
            )),
            (true, false, seed) => Err(RuntimeError::weights(
                &self.path,
                format!(
                    "  it was trained on weights drawn at random; use `--weights random --set train.seed={}`",
                    seed.map_or("1", String::as_str)
                ),
            )),
            (false, _, _) => {
                crate::commands::say(&format!(
                    "warning: {path} was trained on other base weights than these ({there} there, {here} here); results \
                     are those of training only if these are the same numbers, rounded"
                ));
                Ok(())
            }
        }
    }

    /// Copies the adapter's drawn tensors into `tensors`, which are all of the model's in their order, and takes its
    /// residuals out of them.
    pub fn change_base(&self, model: &Model, tensors: &mut [Numbers]) -> Result<(), RuntimeError> {
        for (key, value) in &self.drawn {
            if let (Some((index, param, (start, _))), Data::F32(numbers)) = (locate(model, key), &value.data) {
                let row = tensors[index].len() / rows(param).max(1) as usize;
                tensors[index][start as usize * row..][..numbers.len()].copy_from_slice(numbers);
            }
        }
        self.take_out(model, Some(tensors))
    }

    /// Its values mean what they do without the base at hand: refuses an adapter that takes something out of it.
    pub fn stands_alone(&self, model: &Model) -> Result<(), RuntimeError> {
        self.take_out(model, None)
    }

    /// A run may begin with it: refuses one that takes something out of its base, beside which alone the values of the
    /// run would mean what they do.
    pub fn trains_on(&self) -> Result<(), RuntimeError> {
        let Some(first) = self.residuals.first() else { return Ok(()) };
        let why = format!(
            "  it takes its beginning out of `{}` of the base model, and what a run saves is used beside the whole base; \
             let PEFT save it once more by `save_pretrained(…, path_initial_model_for_weight_conversion=…)`",
            first.tensor
        );
        Err(RuntimeError::weights(&self.path, why))
    }

    /// Tells its values from those of another adapter.
    pub fn fingerprint(&self) -> String {
        let all = self.values.iter().chain(&self.drawn);
        let parts = all.filter_map(|(name, Stored { shape, data })| match data {
            Data::F32(numbers) => Some((name.as_str(), shape.clone(), &numbers[..])),
            _ => None,
        });
        fingerprint(&parts.collect::<Vec<_>>())
    }

    fn take_out(&self, model: &Model, base: Option<&mut [Numbers]>) -> Result<(), RuntimeError> {
        let unfit = |why| RuntimeError::weights(&self.path, format!("  {why}"));
        peft::take_out(model, &self.residuals, base).map_err(unfit)
    }

    /// The base that the adapter was trained on.
    pub fn base(&self) -> Base {
        let fingerprint = self.notes.get(note::BASE).cloned().unwrap_or_default();
        let seed = self.notes.get(note::SEED).and_then(|seed| seed.parse().ok());
        Base { fingerprint, drawn: self.drawn.clone(), seed }
    }
}

/// The trained values under their canonical names; of a table of which rows train, those rows.
pub fn trained(session: &Session, model: &Model, base: &Base, step: u64) -> Result<TensorFile, RuntimeError> {
    let mut file = TensorFile::default();
    file.notes.insert("step".into(), step.to_string());
    for (index, param) in model.params.iter().enumerate() {
        let Some(shape) = param.trained_shape() else { continue };
        if let Trainable::Rows(start, end) = param.trainable {
            file.notes.insert(format!("rows of {}", param.name), format!("{start}:{end}"));
        }
        file.tensors.insert(param.name.clone(), Stored::f32(shape, session.values(index)?.into_owned()));
    }
    Ok(signed(file, model, base))
}

/// The step of a run after which the values in this file were saved; none where no sound file says it.
pub fn step_of(path: &Path) -> Option<u64> {
    SafeFile::open(path).ok()?.notes.get("step")?.parse().ok()
}

/// Adds the base's drawn tensors, and the notes that every adapter has.
pub fn signed(mut file: TensorFile, model: &Model, base: &Base) -> TensorFile {
    let mut note = |key: &str, value: String| drop(file.notes.insert(key.into(), value));
    note("format", FORMAT.into());
    note("spec", model.name.clone());
    note("backbone", model.backbone.name.clone());
    // What is kept in place of trained tensors is of another spec, which holds it itself.
    if model.params.iter().all(|p| p.trainable == Trainable::No || file.tensors.contains_key(&p.name)) {
        file.notes.insert(note::OF.into(), meaning::record(model));
    }
    let mut note = |key: &str, value: String| drop(file.notes.insert(key.into(), value));
    if !base.fingerprint.is_empty() {
        note(note::BASE, base.fingerprint.clone());
    }
    if !base.drawn.is_empty() {
        let keys: Vec<&String> = base.drawn.keys().collect();
        note(note::DRAWN, serde_json::to_string(&keys).expect("plain data"));
    }
    // Frozen tensors of a method, such as VeRA's projections, are the same on every base: the seed determines them.
    let of_method = |p: &Param| p.trainable == Trainable::No && matches!(p.origin, Origin::Method(_));
    if base.random() || model.params.iter().any(of_method) {
        note(note::SEED, base.seed.unwrap_or(model.train.seed).to_string());
    }
    file.tensors.extend(base.drawn.clone());
    file
}

/// A frozen tensor that is drawn from the seed: a method's, or a head's in files that do not hold it.
fn pinned<'a>(model: &'a Model, drawn: &Tensors) -> Option<&'a str> {
    let frozen = |p: &&Param| p.origin != Origin::Backbone && p.trainable == Trainable::No;
    let mut names: Vec<_> = model.params.iter().filter(frozen).collect();
    names.sort_by_key(|p| p.origin == Origin::Head);
    names.into_iter().map(|p| p.name.as_str()).find(|name| !drawn.contains_key(*name))
}

/// The seed must be the one the adapter was trained beside.
fn check_seed(model: &Model, adapter: &Adapter) -> Result<(), RuntimeError> {
    let (Some(tensor), Some(seed)) = (pinned(model, &adapter.drawn), adapter.notes.get(note::SEED)) else {
        return Ok(());
    };
    match *seed == model.train.seed.to_string() {
        true => Ok(()),
        false => Err(RuntimeError::weights(
            &adapter.path,
            format!("  `{tensor}` is drawn from the seed, which was {seed} in training; use `--set train.seed={seed}`"),
        )),
    }
}

/// Reads an adapter for `model`: exactly the tensors it trains, in their shapes.
pub fn load(model: &Model, path: &Path) -> Result<Adapter, Failure> {
    if path.join(peft::CONFIG).is_file() {
        let unfit = |why: String| RuntimeError::weights(path, format!("  {why}"));
        let Imported { values, residuals, drawn } = peft::import(model, &peft::Adapter::load(path)?).map_err(unfit)?;
        let adapter = Adapter { path: path.to_path_buf(), values, residuals, drawn, ..Adapter::default() };
        return fits(model, adapter).map_err(Failure::from);
    }
    let own = if path.is_dir() { path.join(ADAPTER) } else { path.to_path_buf() };
    let ours = own.is_file() && path.is_dir();
    if let (false, Some(other)) = (ours, peft::foreign::recognised(path)) {
        return Err(other.into());
    }
    let path = own;
    let TensorFile { mut tensors, notes } = adapter::load(&path)?;
    if !notes.contains_key("spec") {
        let frozen = |name: &str| model.params.iter().any(|p| p.name == name && p.trainable == Trainable::No);
        peft::foreign::check_own(&path, &tensors.keys().collect::<Vec<_>>(), frozen)?;
    }
    let damaged = |_| RuntimeError::file(&path, "its note `drawn` is no list of names; it is damaged");
    let keys: Vec<String> = match notes.get(note::DRAWN) {
        Some(keys) => serde_json::from_str(keys).map_err(damaged)?,
        None => vec![],
    };
    let drawn = keys.into_iter().filter_map(|key| tensors.remove_entry(&key)).collect();
    let adapter = Adapter { path, values: tensors, drawn, notes, residuals: vec![] };
    check_seed(model, &adapter)?;
    let adapter = fits(model, adapter)?;
    check_meaning(model, &adapter)?;
    Ok(adapter)
}

/// The model must compute with the values what the one did in which they were trained.
fn check_meaning(model: &Model, Adapter { path, notes, .. }: &Adapter) -> Result<(), RuntimeError> {
    if let Some(format) = notes.get("format").filter(|format| *format != FORMAT) {
        let message = format!("its format is `{format}`, and this peftc reads `{FORMAT}`; use the peftc that wrote it");
        return Err(RuntimeError::file(path, message));
    }
    if let Some(backbone) = notes.get("backbone").filter(|backbone| **backbone != model.backbone.name) {
        let here = &model.backbone.name;
        return Err(RuntimeError::weights(
            path,
            format!("  it was trained on `{backbone}`, and the spec's model is `{here}`"),
        ));
    }
    let Some(record) = notes.get(note::OF) else { return Ok(()) };
    let damaged = |_| RuntimeError::file(path, "its note `of` cannot be read; it is damaged");
    let mut lines = meaning::differences(record, model).map_err(damaged)?;
    if lines.is_empty() {
        return Ok(());
    }
    if lines.len() > 8 {
        let more = lines.split_off(8).len();
        lines.push(format!("  and {more} more"));
    }
    lines.insert(0, "  it was trained as a part of another function:".into());
    lines.push("  use the spec of the training".into());
    Err(RuntimeError::weights(path, lines.join("\n")))
}

/// Checks that an adapter holds the tensors that the model trains and, beside its drawn ones, no others.
fn fits(model: &Model, adapter: Adapter) -> Result<Adapter, RuntimeError> {
    let Adapter { path, values, drawn, .. } = &adapter;
    let wanted: Vec<(&str, Vec<u64>)> =
        model.params.iter().filter_map(|p| Some((p.name.as_str(), p.trained_shape()?))).collect();
    let mut wrong = vec![];
    for (name, shape) in &wanted {
        match values.get(*name) {
            Some(Stored { shape: found, data: Data::F32(_) }) if found == shape => {}
            Some(found) => wrong.push(format!("  `{name}` is {:?}, the spec wants {shape:?}", found.shape)),
            None if drawn.contains_key(*name) => wrong.push(format!(
                "  `{name}` was drawn at random and did not train, in the spec it trains; use the spec of the training"
            )),
            None => wrong.push(format!("  `{name}` is missing")),
        }
    }
    let known = |name: &String| wanted.iter().any(|(n, _)| n == name);
    wrong.extend(values.keys().filter(|n| !known(n)).map(|n| format!("  `{n}` is no tensor the spec trains")));
    for (key, value) in drawn {
        let shape = locate(model, key).map(|(_, param, rows)| {
            let mut shape = param.shape.clone();
            shape.iter_mut().take(1).for_each(|n| *n = rows.1 - rows.0);
            shape
        });
        match shape {
            Some(shape) if shape == value.shape && matches!(value.data, Data::F32(_)) => {}
            Some(shape) => wrong.push(format!("  `{key}` is {:?}, the spec wants {shape:?}", value.shape)),
            None => wrong.push(format!("  `{key}` was drawn in training and is no tensor of the spec")),
        }
    }
    if wrong.is_empty() {
        return Ok(adapter);
    }
    wrong.truncate(12);
    Err(RuntimeError::weights(path, wrong.join("\n")))
}

/// Puts trained values, as [`load`] gives them, into the session.
pub fn apply(session: &mut Session, values: &Tensors) -> Result<(), RuntimeError> {
    for index in 0..session.manifest().tensors.len() {
        let tensor = &session.manifest().tensors[index];
        if tensor.trainable.is_some()
            && let Some(Stored { data: Data::F32(x), .. }) = values.get(&tensor.name)
        {
            session.set_values(index, x)?;
        }
    }
    Ok(())
}

/// What is kept of trained values: what the model `stores`, in place of what that replaces. `program` has the entry
/// `store`.
pub fn kept(model: &Model, program: Program, mut values: Tensors) -> Result<Tensors, Failure> {
    const STORE: &str = names::Entry::Store.name();
    let Manifest { tensors, buffers, entries, .. } = &program.manifest;
    // Weights of the backbone are not there, and need not be: what is stored is made of what trains.
    let frozen = |buffer: usize| match buffers[buffer].storage {
        Storage::Tensor { index, rows } => !tensors[index].trains(rows),
        Storage::Prepared => true,
        _ => false,
    };
    let reads_frozen = |Entry { launches, outputs }: &Entry| {
        let read = launches.iter().flat_map(|l| &l.buffers).copied();
        read.chain(outputs.iter().map(|o| o.buffer)).any(frozen)
    };
    if entries.get(STORE).is_some_and(reads_frozen) {
        return Err(Failure::Usage("what the spec stores is made of weights that do not train".into()));
    }
    let zeros = tensors.iter().map(|t| Numbers::zeros(t.shape.iter().product::<u64>() as usize)).collect();
    let mut session = Session::new(program.only(&[STORE]), zeros, 0)?;
    apply(&mut session, &values)?;
    session.run(STORE, &Inputs::default())?;
    for name in &model.replaced {
        values.remove(name);
    }
    for name in session.outputs() {
        if let Some((shape, x)) = session.output(&name) {
            values.insert(name.clone(), Stored::f32(shape, x.to_vec()));
        }
    }
    Ok(values)
}
