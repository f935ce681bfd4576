//! Trained values on disk: our own file, a run's or an export's folder, or a folder that PEFT wrote.

use std::path::Path;

use peft_grammar::model::{Model, Origin, Trainable};
use peft_runtime::adapter::{self, Data, Stored, TensorFile};
use peft_runtime::artifact::{Entry, Manifest, Storage};
use peft_runtime::{Inputs, Numbers, Program, RuntimeError, Session};

use crate::failure::Failure;
use crate::hub::peft::{self, Tensors};

/// What the trained values of a run (or an export) are kept in.
pub const ADAPTER: &str = "adapter.safetensors";

/// The trained values under their canonical names; of a table of which rows train, those rows.
pub fn trained(session: &Session, model: &Model, step: u64) -> Result<TensorFile, RuntimeError> {
    let mut file = TensorFile::default();
    file.notes.insert("step".into(), step.to_string());
    for (index, param) in model.params.iter().enumerate() {
        let Some(shape) = param.trained_shape() else { continue };
        if let Trainable::Rows(start, end) = param.trainable {
            file.notes.insert(format!("rows of {}", param.name), format!("{start}:{end}"));
        }
        file.tensors.insert(param.name.clone(), Stored::f32(shape, session.values(index)?.into_owned()));
    }
    Ok(signed(file, model))
}

/// With the notes every adapter carries.
pub fn signed(mut file: TensorFile, model: &Model) -> TensorFile {
    file.notes.insert("format".into(), "peftc adapter 1".into());
    file.notes.insert("spec".into(), model.name.clone());
    file.notes.insert("backbone".into(), model.backbone.name.clone());
    // What is frozen and drawn, VeRA's projections or a head, is not in the file: the seed brings it back.
    if drawn(model).is_some() {
        file.notes.insert(SEED.into(), model.train.seed.to_string());
    }
    file
}

const SEED: &str = "seed";

/// A tensor that no checkpoint has and that does not train.
fn drawn(model: &Model) -> Option<&str> {
    let frozen = model.params.iter().find(|p| p.origin != Origin::Backbone && p.trainable == Trainable::No);
    frozen.map(|p| p.name.as_str())
}

/// The seed must be the one the adapter was trained beside.
fn check_seed(model: &Model, file: &TensorFile, path: &Path) -> Result<(), RuntimeError> {
    let (Some(tensor), Some(seed)) = (drawn(model), file.notes.get(SEED)) else { return Ok(()) };
    match *seed == model.train.seed.to_string() {
        true => Ok(()),
        false => Err(RuntimeError::weights(
            path,
            format!("  `{tensor}` is drawn from the seed, which was {seed} in training; use `--set train.seed={seed}`"),
        )),
    }
}

/// Reads an adapter for `model`: exactly the tensors it trains, in their shapes. Some adapters of PEFT's take their
/// beginning out of the base model: of `base`, all weights of the model; without them such an adapter is refused.
pub fn load(model: &Model, path: &Path, base: Option<&mut [Numbers]>) -> Result<Tensors, Failure> {
    let file = match path {
        folder if folder.join(peft::CONFIG).is_file() => {
            let adapter = peft::Adapter::load(folder)?;
            let unfit = |why: String| RuntimeError::weights(folder, format!("  {why}"));
            let imported = peft::import(model, &adapter).map_err(unfit)?;
            peft::take_out(model, &imported.residuals, base).map_err(unfit)?;
            imported.values
        }
        own => {
            let own = if own.is_dir() { own.join(ADAPTER) } else { own.to_path_buf() };
            let ours = own.is_file() && path.is_dir();
            if let (false, Some(other)) = (ours, peft::foreign::recognised(path)) {
                return Err(other.into());
            }
            let file = adapter::load(&own)?;
            if !file.notes.contains_key("spec") {
                let frozen = |name: &str| model.params.iter().any(|p| p.name == name && p.trainable == Trainable::No);
                peft::foreign::check_own(&own, &file.tensors.keys().collect::<Vec<_>>(), frozen)?;
            }
            check_seed(model, &file, &own)?;
            file.tensors
        }
    };
    let wanted: Vec<(&str, Vec<u64>)> =
        model.params.iter().filter_map(|p| Some((p.name.as_str(), p.trained_shape()?))).collect();
    let mut wrong = vec![];
    for (name, shape) in &wanted {
        match file.get(*name) {
            Some(Stored { shape: found, data: Data::F32(_) }) if found == shape => {}
            Some(found) => wrong.push(format!("  `{name}` is {:?}, the spec wants {shape:?}", found.shape)),
            None => wrong.push(format!("  `{name}` is missing")),
        }
    }
    let known = |name: &String| wanted.iter().any(|(n, _)| n == name);
    wrong.extend(file.keys().filter(|n| !known(n)).map(|n| format!("  `{n}` is no tensor the spec trains")));
    if wrong.is_empty() {
        return Ok(file);
    }
    wrong.truncate(12);
    Err(RuntimeError::weights(path, wrong.join("\n")).into())
}

/// Puts an adapter's values, as [`load`] gives them, into the session.
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
    const STORE: &str = "store";
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
