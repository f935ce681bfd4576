//! Adapters, the trained values on disk: a file in peftc's own format, the folder of a run or an export, or a folder
//! that Hugging Face PEFT wrote.
//!
//! An adapter is valid only on the base weights that it was trained on. Base tensors that the checkpoint lacks were
//! drawn at random; the adapter stores those of them that do not train, and a fingerprint of the base tensors that the
//! checkpoint holds.

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

/// The file in a run's or an export's folder that holds the trained values after the last step.
pub const ADAPTER: &str = "adapter.safetensors";
/// The file in a run's folder that holds the trained values of the best evaluation.
pub const BEST: &str = "best.safetensors";

/// The format that this version reads and writes, recorded in the note `format`.
const FORMAT: &str = "peftc adapter 1";

/// Keys of the notes in an adapter's file.
mod note {
    /// The model that the values belong to, as [`crate::meaning::record`] describes it.
    pub const OF: &str = "of";
    /// The seed from which frozen tensors are drawn that are not stored in the file.
    pub const SEED: &str = "seed";
    /// The fingerprint of the base weights, [`super::Base::fingerprint`].
    pub const BASE: &str = "base";
    /// The keys of [`super::Base::drawn`], as a JSON list.
    pub const DRAWN: &str = "drawn";
}

/// The base weights of an adapter.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Base {
    /// The hash of the base weights: `files HASH` if they come from a checkpoint, `random HASH` if all were drawn at
    /// random, empty if unknown.
    pub fingerprint: String,
    /// The values of frozen tensors that the checkpoint lacks and that were drawn at random. The key is the tensor's
    /// name, or `NAME[start:end]` if the checkpoint lacks only these rows.
    pub drawn: Tensors,
    /// The seed of the random tensors.
    pub seed: Option<u64>,
}

impl Base {
    /// The base that the loaded weights of `model` form.
    pub fn of(model: &Model, loaded: &Loaded) -> Self {
        let mut drawn = Tensors::new();
        for (index, param, rows) in drawn_parts(model, loaded) {
            // A base that is random as a whole is reproduced from the seed, so its tensors are not stored.
            if !is_random(loaded) && !trains(param, rows) {
                let (key, shape, numbers) = rows_of(param, &loaded.tensors[index], rows);
                drawn.insert(key, Stored::f32(shape, numbers.to_vec()));
            }
        }
        Base { fingerprint: base_fingerprint(model, loaded, &drawn), drawn, seed: Some(model.train.seed) }
    }

    /// Whether all base weights were drawn at random.
    fn random(&self) -> bool {
        self.fingerprint.starts_with(RANDOM)
    }
}

/// The beginnings of a fingerprint.
const RANDOM: &str = "random ";
const FILES: &str = "files ";

/// Whether all tensors were drawn at random.
fn is_random(loaded: &Loaded) -> bool {
    loaded.from_files.iter().all(Option::is_none)
}

/// The tensors of backbone and head that the checkpoint lacks, in whole or in part: the index of each parameter, the
/// parameter, and the missing rows `start..end`.
fn drawn_parts<'a>(model: &'a Model, loaded: &'a Loaded) -> impl Iterator<Item = (usize, &'a Param, (u64, u64))> {
    let all = model.params.iter().zip(&loaded.from_files).enumerate();
    all.filter(|(_, (param, _))| !matches!(param.origin, Origin::Method(_))).filter_map(|(index, (param, held))| {
        let (start, end) = (held.map_or(0, |held| held.rows), rows(param));
        (start < end).then_some((index, param, (start, end)))
    })
}

/// Whether all rows `rows.0..rows.1` of a parameter train.
fn trains(param: &Param, rows: (u64, u64)) -> bool {
    param.trained_rows().is_some_and(|(start, end)| start <= rows.0 && rows.1 <= end)
}

/// The length of a parameter's first axis; 1 for a scalar.
fn rows(param: &Param) -> u64 {
    param.shape.first().copied().unwrap_or(1)
}

/// The rows `start..end` of a parameter: their key in [`Base::drawn`], their shape and their values.
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

/// The index of the parameter that a key of [`Base::drawn`] names, the parameter, and the rows. `None` if the model has
/// no such rows.
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

/// The fingerprint of the frozen base weights: of the rows that the checkpoint holds and `drawn` does not replace, or
/// of all tensors if everything is random.
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
        let Some(held) = (if random { Some(rows(param)) } else { loaded.from_files[index].map(|held| held.rows) })
        else {
            continue;
        };
        if matches!(param.origin, Origin::Method(_)) {
            continue;
        }
        let end = own.get(&index).map_or(held, |&start| held.min(start));
        // Rows that train are in the adapter, so their initial values do not matter.
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

/// Loads all tensors of the model from the checkpoint `from`, and the adapter at `path`. Tensors that the checkpoint
/// lacks come from the adapter if it stores them; others are drawn at random and listed on standard error. `resumed`:
/// the trained tensors are about to be replaced by those of a run's saved state, so they do not count as drawn at
/// random.
///
/// # Errors
///
/// The checkpoint or the adapter cannot be read or does not fit the model, or the adapter was trained on other weights
/// in a way that changes its meaning.
pub fn weights(
    from: &Path,
    model: &Model,
    path: Option<&Path>,
    resumed: bool,
) -> Result<(Loaded, Option<Adapter>), Failure> {
    let mut loaded = checkpoint::weights(from, model)?;
    let adapter = path.map(|path| load(model, path)).transpose()?;
    if let Some(adapter) = &adapter {
        adapter.restore_drawn(model, &mut loaded)?;
    }
    report_drawn(model, &loaded, adapter.as_ref(), resumed)?;
    Ok((loaded, adapter))
}

/// Lists on standard error the tensors that neither the checkpoint nor the adapter nor a resumed state holds, and that
/// are therefore random.
///
/// With an adapter that is an error, since it was trained together with other values. An adapter of an older peftc,
/// which does not record what it was trained in, may have been trained with these, so the tensors are only listed.
fn report_drawn(model: &Model, loaded: &Loaded, adapter: Option<&Adapter>, resumed: bool) -> Result<(), RuntimeError> {
    if is_random(loaded) {
        return Ok(());
    }
    let name = |(index, param, rows): (usize, &Param, (u64, u64))| {
        let key = rows_of(param, &loaded.tensors[index], rows).0;
        let in_adapter = adapter.is_some_and(|a| a.drawn.contains_key(&key));
        let trained = (adapter.is_some() || resumed) && trains(param, rows);
        (!in_adapter && !trained).then_some(key)
    };
    let all: Vec<String> = drawn_parts(model, loaded).filter_map(name).collect();
    if all.is_empty() {
        return Ok(());
    }
    if let Some(Adapter { path, .. }) = adapter.filter(|a| a.notes.is_empty() || a.notes.contains_key(note::OF)) {
        let message = format!(
            "  neither the weights nor the adapter hold {}, so the adapter would be used with random values for them; \
             use the weights that it was trained on",
            all.join(", ")
        );
        return Err(RuntimeError::weights(path, message));
    }
    crate::commands::say(&format!("not in the weights, so drawn at random: {}", all.join(", ")));
    Ok(())
}

/// Trained values, with the description of what they were trained on.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Adapter {
    /// The file or folder that it was read from.
    path: PathBuf,
    /// The values of exactly the tensors that the model trains.
    pub values: Tensors,
    /// Frozen base tensors that the adapter stores, keyed as [`Base::drawn`].
    pub drawn: Tensors,
    /// Matrices to be subtracted from the base weights before the adapter is used (PiSSA, OLoRA).
    residuals: Vec<Residual>,
    /// The notes of a file in peftc's own format; empty for an adapter of PEFT.
    notes: BTreeMap<String, String>,
}

impl Adapter {
    /// Copies the adapter's drawn tensors into the base weights, subtracts its residuals, and compares the other base
    /// weights with those it was trained on. A difference is a warning, or an error if either base is random.
    fn restore_drawn(&self, model: &Model, loaded: &mut Loaded) -> Result<(), Failure> {
        for key in self.drawn.keys() {
            if let Some((index, _, (start, end))) = locate(model, key)
                && loaded.from_files[index].is_some_and(|held| held.rows > start && end > start)
            {
                crate::commands::say(&match self.notes.is_empty() {
                    true => format!("note: the adapter holds `{key}`, which replaces that of these weights"),
                    false => format!(
                        "note: these weights hold `{key}`; the adapter was trained with a random one, which replaces it"
                    ),
                });
            }
        }
        self.check_base(model, loaded)?;
        Ok(self.apply_to_base(model, &mut loaded.tensors)?)
    }

    /// Compares the fingerprint of the base weights with that in the adapter's notes.
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
                    "  all weights were drawn from the seed, which was {seed} in training; use `--set \
                     train.seed={seed}`"
                ),
            )),
            (true, true, _) => Err(RuntimeError::weights(
                &self.path,
                "  it was trained on weights drawn at random, and the backbone of this spec draws others: its shape \
                 or its \
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
                    "warning: {path} was trained on other base weights than these ({there} there, {here} here); \
                     results \
                     are those of training only if these are the same numbers, rounded"
                ));
                Ok(())
            }
        }
    }

    /// Copies the adapter's drawn tensors into `tensors`, all tensors of the model in the order of its parameters, and
    /// subtracts its residuals from them.
    ///
    /// # Errors
    ///
    /// A matrix has no residual of the required rank.
    pub fn apply_to_base(&self, model: &Model, tensors: &mut [Numbers]) -> Result<(), RuntimeError> {
        for (key, value) in &self.drawn {
            if let (Some((index, param, (start, _))), Data::F32(numbers)) = (locate(model, key), &value.data) {
                let row = tensors[index].len() / rows(param).max(1) as usize;
                tensors[index][start as usize * row..][..numbers.len()].copy_from_slice(numbers);
            }
        }
        self.subtract_residuals(model, Some(tensors))
    }

    /// Refuses an adapter with residuals, for commands that do not read the base weights.
    ///
    /// # Errors
    ///
    /// The adapter has a residual.
    pub fn reject_residuals(&self, model: &Model) -> Result<(), RuntimeError> {
        self.subtract_residuals(model, None)
    }

    /// Refuses an adapter with residuals as the start of a training run: the run's own adapter would be valid only with
    /// the residuals subtracted, and it cannot record them.
    ///
    /// # Errors
    ///
    /// The adapter has a residual.
    pub fn reject_residuals_for_training(&self) -> Result<(), RuntimeError> {
        let Some(first) = self.residuals.first() else { return Ok(()) };
        let why = format!(
            "  its initial values are subtracted from `{}` of the base model (PiSSA or OLoRA), and a run's adapter is \
             used with the unchanged base model; convert it with PEFT's `save_pretrained(…, \
             path_initial_model_for_weight_conversion=…)`",
            first.tensor
        );
        Err(RuntimeError::weights(&self.path, why))
    }

    /// A hash of its values, which differs from that of an adapter with other values.
    pub fn fingerprint(&self) -> String {
        let all = self.values.iter().chain(&self.drawn);
        let parts = all.filter_map(|(name, Stored { shape, data })| match data {
            Data::F32(numbers) => Some((name.as_str(), shape.clone(), &numbers[..])),
            _ => None,
        });
        fingerprint(&parts.collect::<Vec<_>>())
    }

    /// Subtracts the residuals from `base`; without `base`, any residual is an error.
    fn subtract_residuals(&self, model: &Model, base: Option<&mut [Numbers]>) -> Result<(), RuntimeError> {
        let unfit = |why| RuntimeError::weights(&self.path, format!("  {why}"));
        peft::subtract_residuals(model, &self.residuals, base).map_err(unfit)
    }

    /// The base that the adapter was trained on.
    pub fn base(&self) -> Base {
        let fingerprint = self.notes.get(note::BASE).cloned().unwrap_or_default();
        let seed = self.notes.get(note::SEED).and_then(|seed| seed.parse().ok());
        Base { fingerprint, drawn: self.drawn.clone(), seed }
    }
}

/// The trained values of a session after `step` steps, as the contents of an adapter's file. A table of which only rows
/// train is stored as these rows.
///
/// # Errors
///
/// The values cannot be copied from the device.
pub fn trained_values(session: &Session, model: &Model, base: &Base, step: u64) -> Result<TensorFile, RuntimeError> {
    let mut file = TensorFile::default();
    file.notes.insert("step".into(), step.to_string());
    for (index, param) in model.params.iter().enumerate() {
        let Some(shape) = param.trained_shape() else { continue };
        if let Trainable::Rows(start, end) = param.trainable {
            file.notes.insert(format!("rows of {}", param.name), format!("{start}:{end}"));
        }
        file.tensors.insert(param.name.clone(), Stored::f32(shape, session.values(index)?.into_owned()));
    }
    Ok(annotated(file, model, base))
}

/// The number of steps after which the values in this file were saved; `None` if the file cannot be read or does not
/// say it.
pub fn step_of(path: &Path) -> Option<u64> {
    SafeFile::open(path).ok()?.notes.get("step")?.parse().ok()
}

/// Adds to a file of trained values the base's drawn tensors and the notes of an adapter.
pub fn annotated(mut file: TensorFile, model: &Model, base: &Base) -> TensorFile {
    let mut note = |key: &str, value: String| drop(file.notes.insert(key.into(), value));
    note("format", FORMAT.into());
    note("spec", model.name.clone());
    note("backbone", model.backbone.name.clone());
    // A file that stores other tensors in place of the trained ones belongs to another spec, so the record is left out.
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
    // Frozen tensors of a method, such as VeRA's projections, are drawn from the seed alone, whatever the base.
    let of_method = |p: &Param| p.trainable == Trainable::No && matches!(p.origin, Origin::Method(_));
    if base.random() || model.params.iter().any(of_method) {
        note(note::SEED, base.seed.unwrap_or(model.train.seed).to_string());
    }
    file.tensors.extend(base.drawn.clone());
    file
}

/// The name of a frozen tensor that is drawn from the seed and not stored in the adapter: one of a method, or else of
/// the head.
fn seeded_tensor<'a>(model: &'a Model, drawn: &Tensors) -> Option<&'a str> {
    let frozen = |p: &&Param| p.origin != Origin::Backbone && p.trainable == Trainable::No;
    let mut names: Vec<_> = model.params.iter().filter(frozen).collect();
    names.sort_by_key(|p| p.origin == Origin::Head);
    names.into_iter().map(|p| p.name.as_str()).find(|name| !drawn.contains_key(*name))
}

/// Checks that the recipe's seed is that of the adapter's training, if a frozen tensor depends on it.
fn check_seed(model: &Model, adapter: &Adapter) -> Result<(), RuntimeError> {
    let (Some(tensor), Some(seed)) = (seeded_tensor(model, &adapter.drawn), adapter.notes.get(note::SEED)) else {
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

/// Reads the adapter at `path` for `model`.
///
/// # Errors
///
/// The path is not an adapter, or it does not hold exactly the tensors that the model trains in their shapes, or it was
/// trained in a model that computes another function or with another seed.
pub fn load(model: &Model, path: &Path) -> Result<Adapter, Failure> {
    if path.join(peft::CONFIG).is_file() {
        let unfit = |why: String| RuntimeError::weights(path, format!("  {why}"));
        let Imported { values, residuals, drawn } = peft::import(model, &peft::Adapter::load(path)?).map_err(unfit)?;
        let adapter = Adapter { path: path.to_path_buf(), values, residuals, drawn, ..Adapter::default() };
        return fits(model, adapter).map_err(Failure::from);
    }
    let own = if path.is_dir() { path.join(ADAPTER) } else { path.to_path_buf() };
    let ours = own.is_file() && path.is_dir();
    if let (false, Some(other)) = (ours, peft::foreign::identify(path)) {
        return Err(other.into());
    }
    let path = own;
    let TensorFile { mut tensors, notes } = adapter::load(&path)?;
    if !notes.contains_key("spec") {
        let frozen = |name: &str| model.params.iter().any(|p| p.name == name && p.trainable == Trainable::No);
        peft::foreign::check_own(&path, &tensors.keys().collect::<Vec<_>>(), frozen)?;
    }
    let damaged = |_| RuntimeError::file(&path, "its note `drawn` is not a list of names; it is damaged");
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

/// Checks that `model` computes the same function as the model in which the adapter was trained.
fn check_meaning(model: &Model, Adapter { path, notes, .. }: &Adapter) -> Result<(), RuntimeError> {
    if let Some(format) = notes.get("format").filter(|format| *format != FORMAT) {
        let message = format!("its format is `{format}`, and this peftc reads `{FORMAT}`; use the peftc that wrote it");
        return Err(RuntimeError::file(path, message));
    }
    if let Some(backbone) = notes.get("backbone").filter(|backbone| **backbone != model.backbone.name) {
        let here = &model.backbone.name;
        return Err(RuntimeError::weights(
            path,
            format!("  it was trained on the backbone `{backbone}`, and the spec's is `{here}`"),
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

/// Checks that an adapter holds exactly the tensors that the model trains, and that the model has its drawn tensors.
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
                "  `{name}` was drawn at random and did not train, but in the spec it trains; use the spec of the \
                 training"
            )),
            None => wrong.push(format!("  `{name}` is missing")),
        }
    }
    let known = |name: &String| wanted.iter().any(|(n, _)| n == name);
    wrong.extend(values.keys().filter(|n| !known(n)).map(|n| format!("  `{n}` is not a tensor that the spec trains")));
    for (key, value) in drawn {
        let shape = locate(model, key).map(|(_, param, rows)| {
            let mut shape = param.shape.clone();
            shape.iter_mut().take(1).for_each(|n| *n = rows.1 - rows.0);
            shape
        });
        match shape {
            Some(shape) if shape == value.shape && matches!(value.data, Data::F32(_)) => {}
            Some(shape) => wrong.push(format!("  `{key}` is {:?}, the spec wants {shape:?}", value.shape)),
            None => wrong.push(format!("  `{key}` was drawn in training and is not a tensor of the spec")),
        }
    }
    if wrong.is_empty() {
        return Ok(adapter);
    }
    wrong.truncate(12);
    Err(RuntimeError::weights(path, wrong.join("\n")))
}

/// Copies trained values, as [`load`] returns them, into the session.
///
/// # Errors
///
/// The session refuses a tensor or the copy fails.
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

/// The values to be stored after training: the values that the model `stores` are computed from the trained `values`
/// and take the place of those that they replace. `program` must have the entry `store`.
///
/// # Errors
///
/// The stored values depend on weights that do not train, or the session fails.
pub fn stored_values(model: &Model, program: Program, mut values: Tensors) -> Result<Tensors, Failure> {
    const STORE: &str = names::Entry::Store.name();
    let Manifest { tensors, buffers, entries, .. } = &program.manifest;
    // The backbone's weights are not loaded: the stored values depend on trained tensors alone, which is checked here.
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
        return Err(Failure::Usage("the spec stores values that depend on weights that do not train".into()));
    }
    let zeros = tensors.iter().map(|t| Numbers::zeros(t.shape.iter().product::<u64>() as usize)).collect();
    let mut session = Session::new(program.retain_entries(&[STORE]), zeros, 0)?;
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
