//! Folds trained values into the backbone's weights and writes a model directory that transformers loads.
//!
//! [`peft_passes::fold`] decides which methods can be folded. This module runs the entry `merge` that it compiles, puts
//! the results into the weights, and writes `config.json` and the tokenizer.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use peft_grammar::model::{ConfigValue, Model, Origin, TaskKind};
use peft_passes::pipeline::{Entry, Options};
use peft_runtime::adapter::{self, Float, Stored, TensorFile};
use peft_runtime::json::object;
use peft_runtime::weights::Loaded;
use peft_runtime::{Inputs, Program, RuntimeError, Session, files};
use serde_json::{Map, Value, json};

use crate::data::{DataError, Tokenizer};
use crate::failure::Failure;
use crate::hub::checkpoint::labels;
use crate::hub::model_folder::{self, CONFIG, MODEL, SideFiles};
use crate::hub::peft::Tensors;
use crate::{adapters, compiler};

/// A tensor to be written: its name, shape and values, and the type that the values are rounded to.
struct Tensor {
    name: String,
    shape: Vec<u64>,
    numbers: Vec<f32>,
    dtype: Float,
}

/// The weights of a merged model.
pub struct Merged {
    /// The tensors of backbone and head, in the order of the model's parameters.
    tensors: Vec<Tensor>,
    /// The number of projections and trained tensors that were folded, as text.
    pub folded: String,
    /// The types in which the tensors are written, and the reason, as text.
    pub types: String,
}

/// Folds the trained `values` into the backbone. `loaded` holds all tensors of the model in the order of its
/// parameters. Each tensor keeps its type in the files unless `dtype` is given; a tensor that the files do not hold
/// takes the type of most values.
///
/// # Errors
///
/// A method of the model cannot be folded, or the compiler or the session fails.
pub fn merge(
    model: &Model,
    loaded: Loaded,
    values: &Tensors,
    dtype: Option<Float>,
    options: &Options,
) -> Result<Merged, Failure> {
    let Loaded { tensors: weights, from_files, .. } = loaded;
    let own = |origin: &Origin| matches!(origin, Origin::Backbone | Origin::Head);
    let kept: Vec<Option<Float>> = from_files.iter().map(|held| held.and_then(|held| held.dtype)).collect();
    // The type of most values is also that of tensors that the files do not hold.
    let values_in = |dtype: Float| {
        let of = model.params.iter().zip(&kept).filter(|(_, kept)| **kept == Some(dtype));
        of.map(|(p, _)| p.elements()).sum::<u64>()
    };
    let usual = Float::ALL.into_iter().max_by_key(|&dtype| (values_in(dtype), dtype == Float::F32));
    let usual = usual.unwrap_or(Float::F32);
    let written = |index: usize| {
        let foreign = from_files[index].is_some_and(|held| held.dtype.is_none());
        dtype.or(kept[index]).unwrap_or(if foreign { Float::F32 } else { usual })
    };
    let plain = model.params.iter().zip(&weights).enumerate().filter(|(_, (p, _))| own(&p.origin));
    let mut tensors: Vec<Tensor> = plain
        .map(|(index, (p, x))| Tensor {
            name: p.name.clone(),
            shape: p.shape.clone(),
            numbers: x.to_vec(),
            dtype: written(index),
        })
        .collect();
    // Trained tensors of backbone and head replace those of the files.
    for param in model.params.iter().filter(|p| own(&p.origin)) {
        let (Some((start, _)), Some(value)) = (param.trained_rows(), values.get(&param.name)) else { continue };
        let row = param.shape.iter().skip(1).product::<u64>();
        let (to, adapter::Data::F32(from)) = (values_of(&mut tensors, &param.name)?, &value.data) else { continue };
        to[(start * row) as usize..][..from.len()].copy_from_slice(from);
    }
    let mut count = 0;
    if model.params.iter().any(|p| matches!(p.origin, Origin::Method(_))) {
        let artifact = compiler::compile_entries(model, &[Entry::Merge], options)?;
        let program = Program::new(artifact.manifest, &artifact.library)?;
        let mut session = Session::new(program, weights, 0)?;
        adapters::apply(&mut session, values)?;
        session.run(Entry::Merge.name(), &Inputs::default())?;
        for projection in &model.projections {
            if let Some((shape, folded)) = session.output(&format!("{}.weight", projection.path)) {
                let first = projection.columns.map_or(0, |(start, _)| start as usize);
                let (inputs, outputs) = (shape[0] as usize, shape[1] as usize);
                let to = values_of(&mut tensors, &projection.weight)?;
                let width = to.len() / inputs;
                for (i, row) in folded.chunks(outputs).enumerate() {
                    for (o, &x) in row.iter().enumerate() {
                        let at = if projection.transposed { (first + o) * inputs + i } else { i * width + first + o };
                        to[at] = x;
                    }
                }
                count += 1;
            }
            if let (Some((_, folded)), Some(bias)) =
                (session.output(&format!("{}.bias", projection.path)), &projection.bias)
            {
                let first = projection.columns.map_or(0, |(start, _)| start as usize);
                values_of(&mut tensors, bias)?[first..first + folded.len()].copy_from_slice(&folded);
            }
        }
    }
    let trained = model.params.iter().filter(|p| own(&p.origin) && p.trained_rows().is_some()).count();
    let folded = match (count, trained) {
        (0, trained) => format!("{trained} trained tensors"),
        (count, 0) => format!("{count} projections"),
        (count, trained) => format!("{count} projections and {trained} trained tensors"),
    };
    let why = match (dtype.is_some(), from_files.iter().flatten().all(|held| held.dtype.is_some())) {
        (true, _) => "as asked for by `--dtype`",
        (false, false) => "as in the files, except for types that cannot be written",
        _ if from_files.iter().all(Option::is_none) => "because the weights are random",
        (false, true) => "as in the files",
    };
    let types = format!("written in {}, {why}", type_names(&tensors));
    Ok(Merged { tensors, folded, types })
}

/// The types of all tensors, such as `f32 and bf16`.
fn type_names(tensors: &[Tensor]) -> String {
    let mut all: Vec<Float> = tensors.iter().map(|t| t.dtype).collect();
    all.sort_unstable();
    all.dedup();
    all.into_iter().map(Float::name).collect::<Vec<_>>().join(" and ")
}

/// The values of the tensor `name`.
fn values_of<'a>(tensors: &'a mut [Tensor], name: &str) -> Result<&'a mut Vec<f32>, RuntimeError> {
    let found = tensors.iter_mut().find(|t| t.name == name);
    found.map(|t| &mut t.numbers).ok_or_else(|| RuntimeError::input(name, "is not a tensor of the backbone"))
}

/// The folders that a merged model's other files are copied from.
pub struct Sources<'a> {
    /// The base model's folder or GGUF file, or `random`.
    pub weights: &'a Path,
    /// A folder with the tokenizer, if it is not the base model's.
    pub tokenizer: Option<&'a Path>,
}

impl<'a> Sources<'a> {
    /// The folders whose side files are copied.
    fn folders(&self) -> impl Iterator<Item = &'a Path> {
        [self.weights.is_dir().then_some(self.weights), self.tokenizer].into_iter().flatten()
    }
}

/// The files that [`save`] may write, by their paths relative to the output folder.
///
/// # Errors
///
/// A source folder cannot be read.
pub fn files(from: &Sources) -> Result<BTreeSet<PathBuf>, Failure> {
    let mut all: BTreeSet<PathBuf> =
        [CONFIG, MODEL].into_iter().chain(model_folder::TOKENS).map(PathBuf::from).collect();
    for folder in from.folders() {
        all.extend(SideFiles::of(folder)?.files);
    }
    Ok(all)
}

/// Writes the model folder `out` atomically: weights, `config.json`, and copies of the other files of the base model's
/// folder, with the task's special tokens added to the tokenizer. Returns notes for the user.
///
/// # Errors
///
/// A value is out of range for its type, the tokenizer cannot be used or would give a token another id, or a file
/// cannot be read or written.
pub fn save(model: &Model, merged: Merged, from: &Sources, out: &Path) -> Result<Vec<String>, Failure> {
    let path = from.weights.join(CONFIG);
    let config = match path.is_file() {
        true => object(&path)?,
        // Random weights have no `config.json`, so it is written from the spec alone.
        false => Map::from_iter([("model_type".to_string(), json!(model.backbone.name))]),
    };
    let config = merged_config(model, config, &merged.tensors);
    let mut copied = vec![];
    for folder in from.folders() {
        copied.push((folder, SideFiles::of(folder)?));
    }
    let mut notes = vec![];
    let of_last = matches!(model.task.kind, TaskKind::Classification { .. } | TaskKind::Regression { .. });
    if of_last && !model.task.bidirectional && config.get("pad_token_id").is_none_or(Value::is_null) {
        notes.push(
            "note: config.json has no `pad_token_id`, without which transformers takes one text at a time; set it to \
             the \
             id of a token that no text ends with"
                .to_owned(),
        );
    }
    let folder = from.tokenizer.unwrap_or(from.weights);
    let tokenizer = tokenizer(model, folder)?;
    if tokenizer.is_none() && !model.task.special_tokens().is_empty() {
        notes.push(format!(
            "note: {} holds no tokenizer to write the task's tokens into; `--tokenizer DIR` takes one from elsewhere",
            folder.display()
        ));
    }
    let skipped: Vec<&PathBuf> = copied.iter().flat_map(|(_, side)| &side.skipped).collect();
    if !skipped.is_empty() {
        let names: Vec<String> = skipped.iter().map(|path| path.display().to_string()).collect();
        notes.push(format!("note: these folders hold weights and were not copied: {}", names.join(", ")));
    }
    let mut file = TensorFile::default();
    file.notes.insert("format".into(), "pt".into());
    for Tensor { name, shape, numbers, dtype } in merged.tensors {
        let stored = Stored::rounded(shape, numbers, dtype).map_err(|x| {
            let dtype = dtype.name();
            Failure::Usage(format!(
                "`{name}` holds {x:e}, which is out of range for {dtype}; choose `--dtype f32` or `--dtype bf16`"
            ))
        })?;
        file.tensors.insert(name, stored);
    }
    files::write_folder(out, |fresh| {
        for (folder, side) in &copied {
            side.copy(folder, fresh)?;
        }
        adapter::save(&fresh.join(MODEL), &file)?;
        model_folder::write_object(&fresh.join(CONFIG), &config)?;
        match tokenizer.as_ref().filter(|tokenizer| tokenizer.appended() > 0) {
            Some(tokenizer) => add_tokens(model, tokenizer, fresh),
            None => Ok(()),
        }
    })?;
    Ok(notes)
}

/// The tokenizer that the task's special tokens are added to; `None` if the task has none, or the folder has no
/// tokenizer.
fn tokenizer(model: &Model, folder: &Path) -> Result<Option<Tokenizer>, Failure> {
    if model.task.special_tokens().is_empty() || !folder.exists() {
        return Ok(None);
    }
    match Tokenizer::load(folder, &model.task, vocabulary_rows(model)) {
        Ok(tokenizer) => Ok(Some(tokenizer)),
        Err(DataError::NoTokenizer { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Rows of the token embedding, the model's first matrix.
fn vocabulary_rows(model: &Model) -> u64 {
    model.params.iter().find(|p| p.shape.len() == 2).map_or(0, |p| p.shape[0])
}

/// Adds the tokens behind the vocabulary to the tokenizer's files in `fresh`, and reads these files again to check that
/// each token has the id that it had in training.
fn add_tokens(model: &Model, tokenizer: &Tokenizer, fresh: &Path) -> Result<(), Failure> {
    model_folder::add_tokens(fresh, &tokenizer.behind())?;
    let written = Tokenizer::load(fresh, &model.task, vocabulary_rows(model))?;
    let (wanted, found) = (tokenizer.ids(), written.ids());
    let shown = |id: Option<&u64>| id.map_or("none".to_owned(), u64::to_string);
    let names = wanted.keys().chain(found.keys());
    match names.into_iter().find(|token| wanted.get(*token) != found.get(*token)) {
        Some(token) => Err(Failure::Data(DataError::Tokenizer {
            path: tokenizer.source().to_owned(),
            message: format!(
                "with the task's tokens added to its files, `{token}` has the id {}, but it had {} in training; \
                 save the tokenizer once more with transformers, and merge again",
                shown(found.get(token)),
                shown(wanted.get(token))
            ),
        })),
        None => Ok(()),
    }
}

/// The base model's `config.json` with the keys that merging changes: sizes, flags, labels, the class of the head, and
/// the type of the weights.
fn merged_config(model: &Model, mut config: Map<String, Value>, tensors: &[Tensor]) -> Map<String, Value> {
    let new = config.len() == 1;
    for (key, value) in &model.backbone.config {
        // Only the vocabulary may have grown and flags such as weight tying may follow the tensors; all other keys were
        // compared with the model when the weights were read.
        if new || key == "vocab_size" || matches!(value, ConfigValue::Bool(_)) {
            let value = match value {
                ConfigValue::Bool(b) => json!(b),
                ConfigValue::Int(n) => json!(n),
                ConfigValue::Float(x) => json!(x),
                ConfigValue::Str(s) => json!(s),
            };
            config.insert(key.clone(), value);
        }
    }
    if let Some(labels) = model.task.kind.labels() {
        let names = labels.iter().enumerate().map(|(i, l)| (i.to_string(), json!(l))).collect::<Map<_, _>>();
        let ids = labels.iter().enumerate().map(|(i, l)| (l.clone(), json!(i))).collect::<Map<_, _>>();
        config.insert("id2label".into(), Value::Object(names));
        config.insert("label2id".into(), Value::Object(ids));
        // The number of labels follows from `id2label`.
        for count in ["num_labels", "_num_labels"] {
            config.remove(count);
        }
    }
    match &model.task.kind {
        TaskKind::Classification { .. } => {
            config.insert("problem_type".into(), json!("single_label_classification"));
        }
        TaskKind::Regression { .. } => {
            config.insert("problem_type".into(), json!("regression"));
            // Without these keys transformers assumes two labels.
            ["id2label", "label2id", "_num_labels"].iter().for_each(|key| drop(config.remove(*key)));
            config.insert("num_labels".into(), json!(1));
        }
        _ => {}
    }
    if let Some(class) = config.get("architectures").and_then(|all| all.get(0)?.as_str()).map(str::to_owned) {
        match architecture_with_head(&class, &model.task.kind) {
            Some(class) => drop(config.insert("architectures".into(), json!([class]))),
            None => drop(config.remove("architectures")),
        }
    } else if !model.task.kind.generates() {
        config.remove("architectures");
    }
    let values_in = |dtype: Float| tensors.iter().filter(|t| t.dtype == dtype).map(|t| t.numbers.len()).sum::<usize>();
    if let Some(usual) = Float::ALL.into_iter().max_by_key(|&dtype| values_in(dtype)) {
        // transformers renamed `torch_dtype` to `dtype`; the key that the file has is updated.
        let there: Vec<&str> = ["dtype", "torch_dtype"].into_iter().filter(|key| config.contains_key(*key)).collect();
        for key in if there.is_empty() { vec!["torch_dtype"] } else { there } {
            config.insert(key.into(), json!(usual.torch()));
        }
    }
    config
}

/// The class of transformers for the task's head, derived from the name of the base model's class. If it is `None`,
/// transformers chooses by `model_type`.
fn architecture_with_head(class: &str, task: &TaskKind) -> Option<String> {
    const ENDS: [&str; 4] = ["WithLMHeadModel", "LMHeadModel", "DoubleHeadsModel", "Model"];
    let Some((head, _)) = labels::head(task) else {
        let generates = class.ends_with("LMHeadModel") || class.ends_with("ForCausalLM");
        return generates.then(|| class.to_owned());
    };
    let family = match class.find("For") {
        Some(at) => Some(&class[..at]),
        None => ENDS.iter().find_map(|end| class.strip_suffix(end)),
    };
    family.filter(|family| !family.is_empty()).map(|family| format!("{family}{head}"))
}

/// Notes for the user: arguments of the backbone that `config.json` has no key for, so that transformers ignores them.
pub fn notes(model: &Model) -> Vec<String> {
    let say = |(key, value): (&String, &ConfigValue)| {
        let value = serde_json::to_string(value).unwrap_or_default();
        format!(
            "note: `{key}: {value}` cannot be written to config.json, so transformers computes the model without it"
        )
    };
    model.backbone.extra_args.iter().map(say).collect()
}
