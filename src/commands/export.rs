//! `peftc export`: writes trained values in PEFT's format or in peftc's own.

use std::path::{Path, PathBuf};

use clap::ValueEnum;
use peft_grammar::model::{Model, Origin, Param, Trainable};
use peft_runtime::adapter::{self, Stored, TensorFile};
use serde_json::json;

use super::model_args::ModelArgs;
use super::overwrite::Overwrite;
use crate::adapters::{self, ADAPTER, Base};
use crate::failure::Failure;
use crate::hub::checkpoint;
use crate::hub::peft::{self, Tensors};
use crate::spec;
use crate::train::state::STATE;

/// The name of the spec that is exported with an adapter in peftc's own format.
const SPEC: &str = "spec.peft";

/// The command line of `peftc export`.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    source: ModelArgs,
    /// The trained values: `adapter.safetensors`, or a folder that a run wrote
    #[arg(long)]
    adapter: PathBuf,
    /// The base model: a Hugging Face model directory, a GGUF file, or `random`, as in training. A head that does not
    /// train is taken from it, and so is the base model's name for PEFT
    #[arg(long)]
    weights: Option<PathBuf>,
    /// The name under which PEFT loads the base model, such as `meta-llama/Llama-2-7b-hf`
    #[arg(long, value_name = "NAME")]
    base: Option<String>,
    /// The folder to write
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    #[command(flatten)]
    overwrite: Overwrite,
    /// The format to write. `peft` fails if PEFT cannot hold the values
    #[arg(long, value_enum, default_value_t = Format::Auto)]
    format: Format,
}

/// The format of an export.
#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
enum Format {
    /// PEFT's format if it can hold the values, else peftc's own
    Auto,
    /// PEFT's format: adapter_config.json and adapter_model.safetensors
    Peft,
    /// peftc's own format: adapter.safetensors with canonical names, and the spec
    Own,
}

/// Writes the export and prints what it holds.
///
/// # Errors
///
/// The adapter does not fit the model, PEFT's format was asked for and cannot hold it, or a file cannot be written.
pub fn run(mut arguments: Arguments) -> Result<(), Failure> {
    arguments.weights = arguments.weights.as_deref().map(checkpoint::resolve).transpose()?;
    let out = &arguments.output;
    let inputs = [&arguments.adapter, &arguments.source.path];
    arguments.overwrite.folder(out, &inputs.map(PathBuf::as_path), is_export)?;
    let (model, kept, base) = stored_values(&arguments)?;
    if arguments.format != Format::Own {
        let frozen = frozen_tensors(&arguments, &model, &base)?;
        match check_drawn_is_head(&model, &base).and_then(|()| peft::export(&model, &kept, &frozen)) {
            Ok(mut adapter) => {
                clear(out)?;
                let name = base_name(&arguments);
                adapter.config.insert("base_model_name_or_path".into(), json!(name));
                adapter.save(out)?;
                for note in peft::notes(&model) {
                    super::say(&note);
                }
                if name.is_none() {
                    super::say(
                        "note: `base_model_name_or_path` is null, so the user of PEFT has to name the base model; \
                         `--base` sets it",
                    );
                }
                return report(out, "PEFT's format", &adapter.tensors);
            }
            Err(why) if arguments.format == Format::Peft => {
                let spec = arguments.source.path.display();
                return Err(Failure::Usage(format!(
                    "{spec}: not in PEFT's format: {why}\n`--format own` writes peftc's own format"
                )));
            }
            Err(why) => super::say(&format!("not in PEFT's format: {why}")),
        }
    }
    let file = adapters::annotated(TensorFile { tensors: kept, ..TensorFile::default() }, &model, &base);
    clear(out)?;
    adapter::save(&out.join(ADAPTER), &file)?;
    if !arguments.source.is_artifact() {
        write_spec(&arguments.source, out, &model)?;
    }
    report(out, "peftc's own format", &file.tensors)
}

/// Prints the number of tensors and values that were written.
fn report(out: &Path, format: &str, tensors: &Tensors) -> Result<(), Failure> {
    let values: u64 = tensors.values().map(|t| t.shape.iter().product::<u64>()).sum();
    super::print(&format!("{}: {} tensors, {values} values, in {format}", out.display(), tensors.len()));
    Ok(())
}

/// Whether an export wrote the folder, and not a run, whose folder holds a state.
fn is_export(folder: &Path) -> bool {
    let holds = |name: &str| folder.join(name).is_file();
    (holds(ADAPTER) || holds(peft::CONFIG)) && !holds(STATE)
}

/// Removes the files of an earlier export. Files of the other format would be taken for a part of this export.
fn clear(folder: &Path) -> Result<(), Failure> {
    for path in [ADAPTER, SPEC, peft::CONFIG, peft::MODEL].map(|name| folder.join(name)) {
        if path.is_file() {
            std::fs::remove_file(&path).map_err(Failure::file(&path))?;
        }
    }
    Ok(())
}

/// Checks that PEFT's format can hold the random base tensors of the adapter: only those of a head can be saved.
fn check_drawn_is_head(model: &Model, base: &Base) -> Result<(), String> {
    let head = |key: &str| model.params.iter().any(|p| p.name == key && p.origin == Origin::Head);
    match base.drawn.keys().find(|key| !head(key)) {
        None => Ok(()),
        Some(key) => Err(format!(
            "`{key}` was drawn at random in training, the checkpoint does not hold it, and an adapter of PEFT cannot"
        )),
    }
}

/// The model, the values to be stored of it, and the base that they were trained on.
fn stored_values(arguments: &Arguments) -> Result<(Model, Tensors, Base), Failure> {
    let model = arguments.source.model()?;
    let adapter = adapters::load(&model, &arguments.adapter)?;
    adapter.reject_residuals(&model)?;
    let (base, values) = (adapter.base(), adapter.values);
    let kept = match model.stored.is_empty() {
        true => values,
        false => adapters::stored_values(&model, arguments.source.store(&model)?, values)?,
    };
    Ok((model, kept, base))
}

/// The frozen tensors of `--weights` that PEFT's format needs: a head, which PEFT saves with the adapter whether it
/// trained or not, and the other tensors of a module of which a part trains.
fn frozen_tensors(arguments: &Arguments, model: &Model, base: &Base) -> Result<Tensors, Failure> {
    let mut tensors = Tensors::new();
    let wanted = |p: &Param| match p.origin {
        Origin::Head => p.trainable == Trainable::No,
        Origin::Backbone => p.trainable == Trainable::No && model.params.iter().any(|o| trains_in_module_of(o, p)),
        Origin::Method(_) => false,
    };
    if let (Some(from), true) = (&arguments.weights, model.params.iter().any(wanted)) {
        let weights = checkpoint::weights(from, model)?;
        for (param, numbers) in model.params.iter().zip(weights.tensors).filter(|(p, _)| wanted(p)) {
            tensors.insert(param.name.clone(), Stored::f32(param.shape.clone(), numbers.to_vec()));
        }
    }
    // Tensors that the adapter stores are those of training, so they replace the ones drawn now.
    tensors.extend(base.drawn.clone());
    Ok(tensors)
}

/// Whether `one` trains and is a tensor of the same module as `other`.
fn trains_in_module_of(one: &Param, other: &Param) -> bool {
    let module = |p: &Param| p.name.rsplit_once('.').map(|(module, _)| module.to_owned());
    one.trainable != Trainable::No && module(one) == module(other)
}

/// The name of the base model: that of `--base`, else that in its `config.json`, else its folder.
fn base_name(arguments: &Arguments) -> Option<String> {
    if arguments.base.is_some() {
        return arguments.base.clone();
    }
    let from = arguments.weights.as_ref().filter(|w| w.as_path() != Path::new("random"))?;
    let config = peft_runtime::json::object(&from.join("config.json")).ok();
    let name = config.and_then(|c| Some(c.get("_name_or_path")?.as_str()?.to_owned()));
    name.filter(|name| !name.is_empty()).or_else(|| Some(from.to_string_lossy().into_owned()))
}

/// Copies the spec and its imports. Values that `--set` changed are listed in a comment at the top.
fn write_spec(source: &ModelArgs, out: &Path, model: &Model) -> Result<(), Failure> {
    let text = spec::read(&source.path)?;
    let mut head = String::new();
    for (key, value) in &source.set {
        head += &format!("// changed by --set: {key}={value}\n");
    }
    if !model.replaced.is_empty() {
        head += &format!(
            "// `{ADAPTER}` holds the values that the methods store in place of {}\n",
            model.replaced.join(", ")
        );
    }
    for (path, text) in spec::imports(&source.path)? {
        // An import outside the spec's folder has no corresponding path in the export.
        if path.components().all(|c| matches!(c, std::path::Component::Normal(_))) {
            super::write(&out.join(path), &text)?;
        } else {
            super::say(&format!("{}: this import is outside the spec's folder, so it is not copied", path.display()));
        }
    }
    super::write(&out.join(SPEC), &(head + &text))
}
