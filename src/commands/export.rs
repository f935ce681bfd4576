use std::path::{Path, PathBuf};

use clap::ValueEnum;
use peft_grammar::model::{Model, Origin, Param, Trainable};
use peft_runtime::adapter::{self, Stored, TensorFile};
use serde_json::json;

use super::overwrite::Overwrite;
use super::source::Source;
use crate::adapters::{self, ADAPTER, Base};
use crate::failure::Failure;
use crate::hub::checkpoint;
use crate::hub::peft::{self, Tensors};
use crate::spec;
use crate::train::state::STATE;

/// The spec beside an adapter in our own format.
const SPEC: &str = "spec.peft";

#[derive(Debug, clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    source: Source,
    /// Trained values: `adapter.safetensors`, or a folder that a run wrote
    #[arg(long)]
    adapter: PathBuf,
    /// The base model, a Hugging Face model directory, a GGUF file, or `random` as in training: a head that does not
    /// train comes from it, and its name
    #[arg(long)]
    weights: Option<PathBuf>,
    /// What PEFT is to load as the base model, such as `meta-llama/Llama-2-7b-hf`
    #[arg(long, value_name = "NAME")]
    base: Option<String>,
    /// The folder to write
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    #[command(flatten)]
    overwrite: Overwrite,
    /// `peft` or nothing; `own`; or, by default, `peft` where PEFT has the method
    #[arg(long, value_enum, default_value_t = Format::Auto)]
    format: Format,
}

#[derive(Clone, Copy, Debug, PartialEq, ValueEnum)]
enum Format {
    Auto,
    /// adapter_config.json and adapter_model.safetensors
    Peft,
    /// adapter.safetensors under canonical names, with the spec beside it
    Own,
}

pub fn run(mut arguments: Arguments) -> Result<(), Failure> {
    arguments.weights = arguments.weights.as_deref().map(checkpoint::resolve).transpose()?;
    let out = &arguments.output;
    let inputs = [&arguments.adapter, &arguments.source.path];
    arguments.overwrite.folder(out, &inputs.map(PathBuf::as_path), exported)?;
    let (model, kept, base) = kept(&arguments)?;
    if arguments.format != Format::Own {
        let frozen = frozen(&arguments, &model, &base)?;
        match holds_all(&model, &base).and_then(|()| peft::export(&model, &kept, &frozen)) {
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
                        "note: `base_model_name_or_path` is null, so that PEFT has to be told the base; name it by `--base`",
                    );
                }
                return report(out, "PEFT's format", &adapter.tensors);
            }
            Err(why) if arguments.format == Format::Peft => {
                let spec = arguments.source.path.display();
                return Err(Failure::Usage(format!("{spec}: not in PEFT's format: {why}\n`--format own` writes ours")));
            }
            Err(why) => super::say(&format!("not in PEFT's format: {why}")),
        }
    }
    let file = adapters::signed(TensorFile { tensors: kept, ..TensorFile::default() }, &model, &base);
    clear(out)?;
    adapter::save(&out.join(ADAPTER), &file)?;
    if !arguments.source.is_artifact() {
        write_spec(&arguments.source, out, &model)?;
    }
    report(out, "our own format", &file.tensors)
}

fn report(out: &Path, format: &str, tensors: &Tensors) -> Result<(), Failure> {
    let values: u64 = tensors.values().map(|t| t.shape.iter().product::<u64>()).sum();
    super::print(&format!("{}: {} tensors, {values} values, in {format}", out.display(), tensors.len()));
    Ok(())
}

/// A folder that an export wrote, and not a run.
fn exported(folder: &Path) -> bool {
    let holds = |name: &str| folder.join(name).is_file();
    (holds(ADAPTER) || holds(peft::CONFIG)) && !holds(STATE)
}

/// Removes what an earlier export wrote: the other format's files would be taken for a part of this one.
fn clear(folder: &Path) -> Result<(), Failure> {
    for path in [ADAPTER, SPEC, peft::CONFIG, peft::MODEL].map(|name| folder.join(name)) {
        if path.is_file() {
            std::fs::remove_file(&path).map_err(Failure::file(&path))?;
        }
    }
    Ok(())
}

/// PEFT's format has a place for a head that was drawn at random, and for nothing else of the base model.
fn holds_all(model: &Model, base: &Base) -> Result<(), String> {
    let head = |key: &str| model.params.iter().any(|p| p.name == key && p.origin == Origin::Head);
    match base.drawn.keys().find(|key| !head(key)) {
        None => Ok(()),
        Some(key) => Err(format!(
            "`{key}` was drawn at random in training, lies in no checkpoint, and PEFT's adapters would leave it out"
        )),
    }
}

/// The model, what is kept of its trained values, and what they were trained on.
fn kept(arguments: &Arguments) -> Result<(Model, Tensors, Base), Failure> {
    let model = arguments.source.model()?;
    let adapter = adapters::load(&model, &arguments.adapter)?;
    adapter.stands_alone(&model)?;
    let (base, values) = (adapter.base(), adapter.values);
    let kept = match model.stored.is_empty() {
        true => values,
        false => adapters::kept(&model, arguments.source.store(&model)?, values)?,
    };
    Ok((model, kept, base))
}

/// What does not train, from `--weights`: PEFT wants a head beside the adapter, whether it was trained or drawn once,
/// and all of a module of which a part trains.
fn frozen(arguments: &Arguments, model: &Model, base: &Base) -> Result<Tensors, Failure> {
    let mut tensors = Tensors::new();
    let wanted = |p: &Param| match p.origin {
        Origin::Head => p.trainable == Trainable::No,
        Origin::Backbone => p.trainable == Trainable::No && model.params.iter().any(|o| beside(o, p)),
        Origin::Method(_) => false,
    };
    if let (Some(from), true) = (&arguments.weights, model.params.iter().any(wanted)) {
        let weights = checkpoint::weights(from, model)?;
        for (param, numbers) in model.params.iter().zip(weights.tensors).filter(|(p, _)| wanted(p)) {
            tensors.insert(param.name.clone(), Stored::f32(param.shape.clone(), numbers.to_vec()));
        }
    }
    // What the adapter brings along was there in training, whatever the seed.
    tensors.extend(base.drawn.clone());
    Ok(tensors)
}

/// `one` trains and lies in the module of `other`.
fn beside(one: &Param, other: &Param) -> bool {
    let module = |p: &Param| p.name.rsplit_once('.').map(|(module, _)| module.to_owned());
    one.trainable != Trainable::No && module(one) == module(other)
}

/// What the base model is called: as `--base` says, else as its own files say, else by its folder.
fn base_name(arguments: &Arguments) -> Option<String> {
    if arguments.base.is_some() {
        return arguments.base.clone();
    }
    let from = arguments.weights.as_ref().filter(|w| w.as_path() != Path::new("random"))?;
    let config = peft_runtime::json::object(&from.join("config.json")).ok();
    let name = config.and_then(|c| Some(c.get("_name_or_path")?.as_str()?.to_owned()));
    name.filter(|name| !name.is_empty()).or_else(|| Some(from.to_string_lossy().into_owned()))
}

/// The spec and what it imports. What was set from outside stands in a comment at its head.
fn write_spec(source: &Source, out: &Path, model: &Model) -> Result<(), Failure> {
    let text = spec::read(&source.path)?;
    let mut head = String::new();
    for (key, value) in &source.set {
        head += &format!("// set by hand: {key}={value}\n");
    }
    if !model.replaced.is_empty() {
        head += &format!("// `{ADAPTER}` holds what the methods store in place of {}\n", model.replaced.join(", "));
    }
    for (path, text) in spec::imports(&source.path)? {
        // A path that leaves the folder has no place in another one.
        if path.components().all(|c| matches!(c, std::path::Component::Normal(_))) {
            super::write(&out.join(path), &text)?;
        } else {
            super::say(&format!("{}: outside of the spec's folder, so it is not copied", path.display()));
        }
    }
    super::write(&out.join(SPEC), &(head + &text))
}
