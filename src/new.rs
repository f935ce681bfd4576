//! Writes a first spec for a checkpoint: the backbone of its family with the sizes of its configuration, a method with
//! the settings that its file shows, and a task that fits the data.
//!
//! Sizes are taken from [`checkpoint::Description::compare`], the comparison that judges a spec against a checkpoint.
//! The spec therefore agrees with the checkpoint by the same rules.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use peft_grammar::library::{self, Usage};
use peft_grammar::model::{Columns, Model};
use peft_runtime::RuntimeError;
use serde_json::Value;

use crate::data::{self, Dataset, Schema};
use crate::failure::Failure;
use crate::hub::checkpoint::{self, Comparison, Description};
use crate::hub::tokenizer;

/// The least number of steps that a proposed recipe aims at, however few the examples are.
const MIN_STEPS: f64 = 300.0;
/// The least and the largest number of epochs of a proposed recipe.
const EPOCH_RANGE: (f64, f64) = (3.0, 60.0);
/// `max_tokens` of a task if there is no data.
const DEFAULT_MAX_TOKENS: u64 = 128;

/// The largest `max_tokens` for a model without a limit of its own, such as one with rotary positions.
const MAX_TOKENS_IF_UNLIMITED: u64 = 4096;

/// The file name in diagnostics of the spec that is being written.
const SPEC_NAME: &str = "new.peft";

/// A proposed spec.
pub struct Proposal {
    /// The text of the spec, which checks and is formatted.
    pub text: String,
    /// Lines for the user about the choices that were made.
    pub notes: Vec<String>,
}

/// The arguments of a backbone by name, as values of JSON.
type Arguments = BTreeMap<String, Value>;

/// Proposes a spec for the checkpoint `from` with the library's method `method`, and with a task for `data` if it is
/// given.
///
/// # Errors
///
/// The library has no such method or no backbone that reads the checkpoint, the checkpoint does not say its sizes, or
/// the data cannot be read or do not fit the model.
pub fn propose(from: &Path, method: &str, data: Option<&Path>) -> Result<Proposal, Failure> {
    let Some(mut usage) = library::usage(method) else {
        let methods = library::methods();
        let mut names: Vec<&str> = methods.iter().map(|m| m.name.as_str()).collect();
        names.dedup();
        return Err(Failure::Usage(format!("the library has no method `{method}`; it has {}", names.join(", "))));
    };
    let Some(description) = Description::read(from)? else {
        return Err(RuntimeError::file(
            from,
            "it holds no `config.json`, so the model's sizes are not known; fetch that file, too",
        )
        .into());
    };
    let backbone = backbone(from, &description)?;
    let (model, arguments) = arguments_of_checkpoint(from, &backbone, &description)?;
    let mut notes = vec![format!("backbone `{backbone}`, with the sizes of the checkpoint")];

    let why_rate = scale_rate(&mut usage, &model);
    // Methods such as a prefix add arguments to the backbone, which reduce the task's positions.
    let call_of = call(&backbone, &arguments, &usage.model);
    let model = untuned(&backbone, &call_of)?;
    let mut task = Task::of(&model, &call_of, &description, from, data)?;
    notes.append(&mut task.notes);
    notes.push(format!("method `{method}`, with the settings of its file (`peftc methods {method}` shows it)"));
    let text = spec_text(&backbone, &arguments, &usage, &task, from, &why_rate);
    let text = peft_grammar::format(SPEC_NAME, &text).map_err(|d| Failure::Spec(d.render(false)))?;
    check(&text)?;
    Ok(Proposal { text, notes })
}

/// Checks the text of a spec without imports of files.
fn check(text: &str) -> Result<Model, Failure> {
    peft_grammar::check(SPEC_NAME, text, &peft_grammar::no_imports).map_err(|d| Failure::Spec(d.render(false)))
}

/// The model of a backbone's call such as `llama(layers: 2)`, without a method.
fn untuned(backbone: &str, call: &str) -> Result<Model, Failure> {
    check(&format!("import backbones.{backbone}\nmodel = {call}\n"))
}

/// The name of the backbone that reads the checkpoint. If there is none, the error names the backbone that knows most
/// keys of the configuration, and what differs from it.
fn backbone(from: &Path, description: &Description) -> Result<String, Failure> {
    let (family, reader) = description.family();
    if let Some(reader) = reader {
        return Ok(reader);
    }
    let family = family
        .map_or("it does not name its model".into(), |name| format!("the library has no backbone that reads `{name}`"));
    let keys = description.keys();
    // The nearest backbone is the one that knows most keys of the file.
    let mut nearest: Option<(usize, Model)> = None;
    for backbone in library::backbones() {
        let model = untuned(&backbone.name, &format!("{}()", backbone.name))?;
        let known = keys.iter().filter(|key| model.backbone.checkpoint.keys.contains_key(**key)).count();
        if known > nearest.as_ref().map_or(0, |(most, _)| *most) {
            nearest = Some((known, model));
        }
    }
    let Some((_, model)) = nearest else {
        return Err(RuntimeError::file(from, format!("{family}, and no backbone knows any of its keys")).into());
    };
    let name = &model.backbone.name;
    let lacks = match description {
        Description::Config(config) => {
            let mut config = config.clone();
            let own = model.backbone.checkpoint.model_types.first().cloned().unwrap_or_default();
            config.insert("model_type".into(), own.into());
            let found = fit_arguments(name, &Description::Config(config))?.1;
            [found.wrong, found.warnings.iter().map(|w| format!("  {w}")).collect()].concat()
        }
        Description::Gguf(_) => vec![],
    };
    let lacks = match lacks.is_empty() {
        true => "the keys agree with it: if the model has the same equations, a copy of that backbone's file in \
                 `models/backbones` \
                 with this `model_type` reads it"
            .to_owned(),
        false => format!("it differs in:\n{}", lacks.join("\n")),
    };
    Err(RuntimeError::file(from, format!("{family}; the nearest is `{name}`; {lacks}")).into())
}

/// The backbone with the arguments that the checkpoint gives, the comparison that remains, and these arguments.
fn fit_arguments(backbone: &str, description: &Description) -> Result<(Model, Comparison, Arguments), Failure> {
    let mut arguments = Arguments::new();
    loop {
        let model = untuned(backbone, &call(backbone, &arguments, &[]))?;
        let found = description.compare(&model);
        // The default of an absent key may depend on other arguments, such as a width of four times another. Each round
        // fixes at least one argument, so the loop reaches a fixed point.
        let new = found.arguments.iter().any(|(name, value)| arguments.get(name) != Some(value));
        if !new {
            return Ok((model, found, arguments));
        }
        arguments = found.arguments;
    }
}

/// The backbone and its arguments that agree with the checkpoint's configuration and its tensors. An argument that only
/// the tensors determine, such as weight tying in a GGUF file, is set by the `--set` option that the refusal of the
/// weights recommends.
fn arguments_of_checkpoint(
    from: &Path,
    backbone: &str,
    description: &Description,
) -> Result<(Model, Arguments), Failure> {
    let (model, found, mut arguments) = fit_arguments(backbone, description)?;
    if !found.wrong.is_empty() {
        return Err(RuntimeError::weights(from, found.wrong.join("\n")).into());
    }
    let Err(error) = checkpoint::weights(from, &model) else { return Ok((model, arguments)) };
    let message = error.to_string();
    let mend = message.split_once("`--set model.").and_then(|(_, rest)| rest.split_once('`')?.0.split_once('='));
    let Some((name, value)) = mend else { return Err(error) };
    let Ok(value) = serde_json::from_str(value) else { return Err(error) };
    arguments.insert(name.to_owned(), value);
    let model = untuned(backbone, &call(backbone, &arguments, &[]))?;
    match checkpoint::weights(from, &model) {
        Ok(_) => Ok((model, arguments)),
        Err(_) => Err(error),
    }
}

/// The call of a backbone, such as `llama(layers: 2, hidden: 64)`, with arguments in the order of its signature and
/// `more` behind them. Strings and flags that have their default are left out.
fn call(backbone: &str, arguments: &Arguments, more: &[String]) -> String {
    let signature =
        library::backbones().into_iter().find(|b| b.name == backbone).map(|b| b.signature).unwrap_or_default();
    let place = |name: &str| signature.find(&format!("{name}: ")).unwrap_or(usize::MAX);
    let usual = |name: &str, value: &Value| {
        matches!(value, Value::String(_) | Value::Bool(_))
            && signature.contains(&format!(
                "{name}: {} = {value}",
                match value {
                    Value::Bool(_) => "bool",
                    _ => "string",
                }
            ))
    };
    let mut arguments: Vec<(&String, &Value)> = arguments.iter().filter(|(name, value)| !usual(name, value)).collect();
    arguments.sort_by_key(|(name, _)| place(name));
    let written = |value: &Value| match value.as_f64() {
        Some(x) if value.is_f64() => format!("{x:?}"),
        _ => value.to_string(),
    };
    let all: Vec<String> = arguments
        .iter()
        .map(|(name, value)| format!("{name}: {}", written(value)))
        .chain(more.iter().cloned())
        .collect();
    format!("{backbone}({})", all.join(", "))
}

/// The task block and the settings of the recipe that depend on the task.
struct Task {
    name: &'static str,
    /// The lines of the task block.
    settings: Vec<String>,
    /// Sequences of a step.
    batch: u64,
    epochs: f64,
    /// The reason for the number of epochs, for the comment in front of the recipe.
    recipe_comment: String,
    /// Whether the task has a head, which trains.
    has_head: bool,
    /// Lines for the user.
    notes: Vec<String>,
}

impl Task {
    /// The task for the data, or for the kind of the model if there is no data. `call` is the backbone's call, `from`
    /// the checkpoint.
    fn of(
        model: &Model,
        call: &str,
        description: &Description,
        from: &Path,
        data: Option<&Path>,
    ) -> Result<Self, Failure> {
        let limit = model.backbone.max_sequence_tokens.unwrap_or(MAX_TOKENS_IF_UNLIMITED);
        let writes = model.task.kind.generates();
        let form = data.map(|data| data::infer_schema(data, writes)).transpose()?;
        let backbone = &model.backbone.name;
        let mut task = match (writes, form) {
            (_, Some(Schema::Labelled { columns, labels })) => {
                Task::classification(&columns, in_checkpoint_order(labels, description))
            }
            (_, Some(Schema::Numbered(columns))) => Task::regression(&columns),
            (_, Some(Schema::Tagged { tokens, tags, labels })) => {
                Task::token_classification([&tokens, &tags], in_checkpoint_order(labels, description))
            }
            (true, Some(Schema::Records)) => Task::generation(model, description, from, &[]),
            (true, Some(Schema::Texts(columns))) => Task::generation(model, description, from, &columns),
            (true, Some(Schema::Conversations(columns))) => {
                let tokenizer = data::Tokenizer::load(from, &model.task, model.params[0].shape[0])?;
                match (tokenizer.templates(), &columns[..]) {
                    (None, [_, ..]) => Task::generation(model, description, from, &columns),
                    _ => Task::chat(),
                }
            }
            (true, Some(Schema::Plain)) => Task::text(end_token(model, description, from)),
            (false, Some(Schema::Records | Schema::Texts(_) | Schema::Conversations(_) | Schema::Plain)) => {
                return Err(Failure::Usage(format!(
                    "{}: the data hold texts to be generated, and `{backbone}` classifies; take the weights of a \
                     model that generates",
                    data.unwrap_or(from).display()
                )));
            }
            (false, None) => {
                let labels = ["negative", "positive"].map(String::from).to_vec();
                let mut task = Task::classification(&Columns::default(), in_checkpoint_order(labels, description));
                task.notes.push("there are no data, so the labels are a guess: write your own".into());
                task
            }
            (true, None) => {
                let mut task = Task::generation(model, description, from, &[]);
                task.notes
                    .push("there are no data, so the template is the one for WebNLG's records: write your own".into());
                task
            }
        };
        let mut max_tokens = DEFAULT_MAX_TOKENS.min(limit);
        if let Some(data) = data {
            let settings = task.settings.join("\n");
            let name = task.name;
            let spec = format!(
                "import backbones.{backbone}\nmodel = {call}\ntask {name} {{\n{settings}\n  max_tokens: {limit}\n}}\n"
            );
            let model = check(&spec)?;
            let tokenizer = tokenizer::find(None, from, data, &model)?;
            let read = Dataset::load(data, &model.task, &tokenizer)?;
            max_tokens = (read.longest() as u64).next_multiple_of(8).max(8).min(limit);
            let count = read.len() as f64;
            let steps = MIN_STEPS * task.batch as f64 / count;
            task.epochs = steps.ceil().clamp(EPOCH_RANGE.0, EPOCH_RANGE.1);
            task.recipe_comment = format!(
                "{} examples, {} a step: {} epochs are {} steps",
                read.len(),
                task.batch,
                task.epochs,
                (task.epochs * (count / task.batch as f64).ceil()) as u64
            );
            task.notes.push(format!("the longest example has {} tokens: `max_tokens` is {max_tokens}", read.longest()));
        }
        task.settings.insert(1, format!("  max_tokens: {max_tokens}"));
        Ok(task)
    }

    /// A classification of sequences.
    fn classification(columns: &Columns, labels: Vec<String>) -> Self {
        let names: Vec<String> = labels.iter().map(|l| format!("\"{l}\"")).collect();
        let settings = vec!["  kind: classification".into(), format!("  labels: [{}]", names.join(", "))];
        Task::with_head("labels", settings, columns, format!("a classification into {}", labels.join(", ")))
    }

    /// A regression, one number for each sequence.
    fn regression(columns: &Columns) -> Self {
        Task::with_head("numbers", vec!["  kind: regression".into()], columns, "a number for each text".into())
    }

    /// A classification of tokens, with the columns of the words and of their tags.
    fn token_classification([tokens, tags]: [&str; 2], labels: Vec<String>) -> Self {
        let names: Vec<String> = labels.iter().map(|l| format!("\"{l}\"")).collect();
        let settings = vec![
            "  kind: token_classification".into(),
            format!("  labels: [{}]", names.join(", ")),
            format!("  tokens: \"{tokens}\""),
            format!("  tags: \"{tags}\""),
        ];
        let notes = format!("each word is one of {}", labels.join(", "));
        Task::with_head("tags", settings, &Columns::default(), notes)
    }

    /// A task whose model has a head.
    fn with_head(name: &'static str, mut settings: Vec<String>, columns: &Columns, notes: String) -> Self {
        let Columns { text, pair, label } = columns;
        let named = [("text", text), ("pair", pair), ("label", label)];
        settings.extend(named.into_iter().filter_map(|(key, name)| Some(format!("  {key}: \"{}\"", name.as_ref()?))));
        Task {
            name,
            settings,
            batch: 16,
            epochs: EPOCH_RANGE.0,
            recipe_comment: "three times through the data".into(),
            has_head: true,
            notes: vec![notes],
        }
    }

    /// A task whose model generates text.
    fn generating(name: &'static str, settings: Vec<String>, notes: String) -> Self {
        Task {
            name,
            settings,
            batch: 8,
            epochs: EPOCH_RANGE.0,
            recipe_comment: "three times through the data".into(),
            has_head: false,
            notes: vec![notes],
        }
    }

    /// Conversations in the checkpoint's own chat template.
    fn chat() -> Self {
        Task::generating(
            "chat",
            vec!["  kind: chat".into()],
            "conversations in the checkpoint's own chat template; the loss is on the assistant's messages".into(),
        )
    }

    /// Plain texts without a template, each ended by the token `end` if there is one.
    fn text(end: Option<String>) -> Self {
        let mut settings = vec!["  kind: text".to_owned()];
        settings.extend(end.as_ref().map(|token| format!("  end: \"{token}\"")));
        let ends =
            end.map_or("no token ends a text, since the checkpoint names none".into(), |t| format!("`{t}` ends each"));
        Task::generating("texts", settings, format!("plain texts, the loss is on every token; {ends}"))
    }

    /// Text generation from rows with these columns, of which the last is generated; from WebNLG's records if there are
    /// none. The checkpoint's end token ends a text if its tokenizer has one.
    fn generation(model: &Model, description: &Description, from: &Path, columns: &[String]) -> Self {
        let end = end_token(model, description, from);
        let mut settings = vec!["  kind: generation".to_owned()];
        settings.extend(end.as_ref().map(|token| format!("  special: [\"{token}\"]")));
        let last = end.as_ref().map(|token| format!(" {token}")).unwrap_or_default();
        let (template, target, what) = match columns.split_last() {
            None => {
                let triples = "({subject} ' : ' {property} ' : ' {object} '\\n')*".to_owned();
                (format!("{triples} 'Text: ' {{text}}"), "'Text: '".to_owned(), "a text from triples".to_owned())
            }
            Some((written, given)) => {
                let fields: String =
                    given.iter().map(|name| format!("'{}: ' {{{name}}} '\\n' ", field_title(name))).collect();
                let target = format!("'{}: '", field_title(written));
                (
                    format!("{fields}{target} {{{written}}}"),
                    target,
                    match given {
                        [] => format!("`{written}` alone"),
                        _ => format!("`{written}` from `{}`", given.join("`, `")),
                    },
                )
            }
        };
        settings.push(format!("  template: \"{template}{last}\""));
        settings.push(format!("  target: \"{target}\""));
        let ends = end.map_or("no token ends it, since the checkpoint names none".into(), |t| format!("`{t}` ends it"));
        Task::generating("texts", settings, format!("{what}; {ends}"))
    }
}

/// The checkpoint's end-of-text token, if its tokenizer has one that can be written in a template.
fn end_token(model: &Model, description: &Description, from: &Path) -> Option<String> {
    let id = description.eos_token_id()?;
    let tokenizer = data::Tokenizer::load(from, &model.task, model.params[0].shape[0]).ok()?;
    let (token, _) = tokenizer.ids().into_iter().find(|(_, of)| *of == id)?;
    (!token.contains(['"', '\'', ' ', '(', ')', '{', '}'])).then_some(token)
}

/// The heading of a column in a template: its name with a capital letter, without characters that a template's literal
/// cannot hold.
fn field_title(name: &str) -> String {
    let plain = name.replace(['\'', '"', '\\'], "");
    let mut letters = plain.chars();
    letters.next().map(|first| first.to_uppercase().chain(letters).collect()).unwrap_or_default()
}

/// The hidden size of the models for which the learning rates in the methods' files were chosen.
const REFERENCE_WIDTH: f64 = 768.0;

/// Raises the learning rate for a model narrower than [`REFERENCE_WIDTH`], in proportion to 1 / width, which is the
/// scaling of Adam's best rate (Yang et al. 2021, table 3). Returns the reason for the rate as text.
fn scale_rate(usage: &mut Usage, model: &Model) -> String {
    let table = model.params.iter().find(|p| p.shape.len() == 2);
    let width = table.map_or(REFERENCE_WIDTH, |table| table.shape[1] as f64);
    let factor = (REFERENCE_WIDTH / width.max(1.0)).max(1.0);
    let rate = usage.train.iter_mut().find(|(key, _)| key == "lr");
    match rate.and_then(|(_, value)| Some((value.parse::<f64>().ok()?, value))) {
        Some((rate, value)) if factor > 1.0 => {
            *value = format!("{:.1e}", rate * factor);
            format!(
                "The learning rate of the method's file, {rate:e}, scaled from a width of {REFERENCE_WIDTH} to \
                 {width}"
            )
        }
        _ => "The learning rate of the method's file".into(),
    }
}

/// The labels, in the order of the checkpoint's `id2label` if that holds the same labels.
fn in_checkpoint_order(labels: Vec<String>, description: &Description) -> Vec<String> {
    let Description::Config(config) = description else { return labels };
    let Some(Value::Object(names)) = config.get("id2label") else { return labels };
    let own = (0..names.len()).map(|id| names.get(&id.to_string())?.as_str().map(str::to_owned));
    let own: Option<Vec<String>> = own.collect();
    let same = |own: &Vec<String>| own.len() == labels.len() && own.iter().all(|name| labels.contains(name));
    own.filter(same).unwrap_or(labels)
}

/// The text of the spec, before it is formatted.
fn spec_text(backbone: &str, arguments: &Arguments, usage: &Usage, task: &Task, from: &Path, why: &str) -> String {
    let mut text = format!("// For {}.\nimport backbones.{backbone}\n\n", from.display());
    let _ = writeln!(text, "// The sizes of the checkpoint.\nmodel = {}\n", call(backbone, arguments, &usage.model));
    let _ = writeln!(text, "tune {{\n{}", usage.tune.join("\n"));
    if task.has_head {
        text += "// The head is drawn at random if the checkpoint holds none.\nhead trainable\n";
    }
    let _ = writeln!(text, "}}\n\ntask {} {{\n{}\n}}\n", task.name, task.settings.join("\n"));
    let own = |key: &str| usage.train.iter().any(|(k, _)| k == key);
    let mut train: Vec<String> = usage.train.iter().map(|(key, value)| format!("{key}: {value}")).collect();
    let others = [
        ("schedule", "linear".to_owned()),
        ("warmup", "0.06".into()),
        ("clip", "1.0".into()),
        ("weight_decay", "0.0".into()),
        ("batch", task.batch.to_string()),
        ("epochs", task.epochs.to_string()),
    ];
    train.extend(others.iter().filter(|(key, _)| !own(key)).map(|(key, value)| format!("{key}: {value}")));
    let _ = writeln!(text, "// {why}; {}.\ntrain {{\n{}\n}}", task.recipe_comment, train.join("\n"));
    text
}
