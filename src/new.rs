//! A first spec for a checkpoint: the backbone by its family, every size as its configuration says, a method as its file
//! shows it, a task for the data at hand.
//!
//! Sizes are not read here: [`checkpoint::Description::compare`] says what a file gives each argument of the backbone, so
//! that a spec is written by the rules by which it is judged.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::Path;

use peft_grammar::library::{self, Usage};
use peft_grammar::model::{Columns, Model};
use peft_runtime::RuntimeError;
use serde_json::Value;

use crate::data::{self, Dataset, Form};
use crate::failure::Failure;
use crate::hub::checkpoint::{self, Comparison, Description};
use crate::hub::tokenizer;

/// Steps that a recipe takes at least, however few the examples are.
const STEPS: f64 = 300.0;
/// Times that it goes through the examples at least, and at most.
const EPOCHS: (f64, f64) = (3.0, 60.0);
/// Tokens of an example where there is no data to go by.
const TOKENS: u64 = 128;

/// Tokens of an example at most, where a model takes any number.
const LONGEST: u64 = 4096;

/// What diagnostics call the spec that is being written.
const NAME: &str = "new.peft";

/// A spec that checks, and what there is to be said of how it came about.
pub struct Proposal {
    pub text: String,
    pub said: Vec<String>,
}

/// The arguments of a backbone as a spec writes them.
type Arguments = BTreeMap<String, Value>;

/// Proposes a spec for the weights in `from` by the method of this name, for the data if there is some.
pub fn propose(from: &Path, method: &str, data: Option<&Path>) -> Result<Proposal, Failure> {
    let Some(mut usage) = library::usage(method) else {
        let methods = library::methods();
        let mut names: Vec<&str> = methods.iter().map(|m| m.name.as_str()).collect();
        names.dedup();
        return Err(Failure::Usage(format!("the library has no method `{method}`; it has {}", names.join(", "))));
    };
    let Some(description) = Description::read(from)? else {
        return Err(RuntimeError::file(from, "it holds no `config.json`, so the model's sizes are not known").into());
    };
    let backbone = backbone(from, &description)?;
    let (model, arguments) = sized(from, &backbone, &description)?;
    let mut said = vec![format!("backbone `{backbone}`, its sizes as the checkpoint says")];

    let why_rate = scaled(&mut usage, &model);
    // A prefix takes positions from the task.
    let call_of = call(&backbone, &arguments, &usage.model);
    let model = untuned(&backbone, &call_of)?;
    let mut task = Task::of(&model, &call_of, &description, from, data)?;
    said.append(&mut task.said);
    said.push(format!("method `{method}` as its file shows it (`peftc methods {method}`)"));
    let text = written(&backbone, &arguments, &usage, &task, from, &why_rate);
    let text = peft_grammar::format(NAME, &text).map_err(|d| Failure::Spec(d.render(false)))?;
    check(&text)?;
    Ok(Proposal { text, said })
}

fn check(text: &str) -> Result<Model, Failure> {
    peft_grammar::check(NAME, text, &peft_grammar::no_imports).map_err(|d| Failure::Spec(d.render(false)))
}

/// The model of a call such as `llama(layers: 2)`, to which no method is applied.
fn untuned(backbone: &str, call: &str) -> Result<Model, Failure> {
    check(&format!("import backbones.{backbone}\nmodel = {call}\n"))
}

/// The backbone that reads the checkpoint. The error says which is nearest, and what it lacks.
fn backbone(from: &Path, description: &Description) -> Result<String, Failure> {
    let (family, reader) = description.family();
    if let Some(reader) = reader {
        return Ok(reader);
    }
    let family = family.map_or("it does not say what model it is".into(), |name| {
        format!("the library has no backbone that reads `{name}`")
    });
    let keys = description.keys();
    // How many keys of the file each backbone knows.
    let mut nearest: Option<(usize, Model)> = None;
    for backbone in library::backbones() {
        let model = untuned(&backbone.name, &format!("{}()", backbone.name))?;
        let known = keys.iter().filter(|key| model.backbone.checkpoint.keys.contains_key(**key)).count();
        if known > nearest.as_ref().map_or(0, |(most, _)| *most) {
            nearest = Some((known, model));
        }
    }
    let Some((_, model)) = nearest else {
        return Err(RuntimeError::file(from, format!("{family}, and none knows any of its keys")).into());
    };
    let name = &model.backbone.name;
    let lacks = match description {
        Description::Config(config) => {
            let mut config = config.clone();
            let own = model.backbone.checkpoint.model_types.first().cloned().unwrap_or_default();
            config.insert("model_type".into(), own.into());
            let found = fitted(name, &Description::Config(config))?.1;
            [found.wrong, found.warnings.iter().map(|w| format!("  {w}")).collect()].concat()
        }
        Description::Gguf(_) => vec![],
    };
    let lacks = match lacks.is_empty() {
        true => "by the keys alone it would fit: if its equations are those, a copy of its file in `models/backbones` \
                 under another `model_type` reads it"
            .to_owned(),
        false => format!("of it, it lacks:\n{}", lacks.join("\n")),
    };
    Err(RuntimeError::file(from, format!("{family}; the nearest is `{name}`; {lacks}")).into())
}

/// The backbone with the checkpoint's arguments, and what of the comparison is left then.
fn fitted(backbone: &str, description: &Description) -> Result<(Model, Comparison, Arguments), Failure> {
    let mut arguments = Arguments::new();
    loop {
        let model = untuned(backbone, &call(backbone, &arguments, &[]))?;
        let found = description.compare(&model);
        // What is absent may depend on what is there: a width of four times another. Each round settles one at least.
        let new = found.arguments.iter().any(|(name, value)| arguments.get(name) != Some(value));
        if !new {
            return Ok((model, found, arguments));
        }
        arguments = found.arguments;
    }
}

/// The backbone as the checkpoint has it, tensors included. What only they say (whether logits have a matrix of their
/// own, in a GGUF file) is set by the mend that the refusal names.
fn sized(from: &Path, backbone: &str, description: &Description) -> Result<(Model, Arguments), Failure> {
    let (model, found, mut arguments) = fitted(backbone, description)?;
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

/// `llama(layers: 2, hidden: 64)`, in the order of the backbone's file. Words that are defaults are left out.
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

/// The task block and the recipe that suits it.
struct Task {
    name: &'static str,
    settings: Vec<String>,
    batch: u64,
    epochs: f64,
    /// A line of comment in front of the recipe.
    why: String,
    /// A head is new.
    heads: bool,
    said: Vec<String>,
}

impl Task {
    fn of(
        model: &Model,
        call: &str,
        description: &Description,
        from: &Path,
        data: Option<&Path>,
    ) -> Result<Self, Failure> {
        let limit = model.backbone.longest.unwrap_or(LONGEST);
        let writes = model.task.kind.generates();
        let form = data.map(|data| data::form(data, writes)).transpose()?;
        let backbone = &model.backbone.name;
        let mut task = match (writes, form) {
            (_, Some(Form::Labelled { columns, labels })) => Task::classification(&columns, named(labels, description)),
            (_, Some(Form::Numbered(columns))) => Task::regression(&columns),
            (_, Some(Form::Tagged { tokens, tags, labels })) => {
                Task::token_classification([&tokens, &tags], named(labels, description))
            }
            (true, Some(Form::Records)) => Task::generation(model, description, from, &[]),
            (true, Some(Form::Texts(columns))) => Task::generation(model, description, from, &columns),
            (true, Some(Form::Conversations(columns))) => {
                let tokenizer = data::Tokenizer::load(from, &model.task, model.params[0].shape[0])?;
                match (tokenizer.templates(), &columns[..]) {
                    (None, [_, ..]) => Task::generation(model, description, from, &columns),
                    _ => Task::chat(),
                }
            }
            (true, Some(Form::Plain)) => Task::text(ending(model, description, from)),
            (false, Some(Form::Records | Form::Texts(_) | Form::Conversations(_) | Form::Plain)) => {
                return Err(Failure::Usage(format!(
                    "{}: texts to be written, and `{backbone}` classifies; take weights of a model that generates",
                    data.unwrap_or(from).display()
                )));
            }
            (false, None) => {
                let labels = ["negative", "positive"].map(String::from).to_vec();
                let mut task = Task::classification(&Columns::default(), named(labels, description));
                task.said.push("no data: the labels are a guess, write your own".into());
                task
            }
            (true, None) => {
                let mut task = Task::generation(model, description, from, &[]);
                task.said.push("no data: the template is for WebNLG's records, write your own".into());
                task
            }
        };
        let mut max_tokens = TOKENS.min(limit);
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
            let steps = STEPS * task.batch as f64 / count;
            task.epochs = steps.ceil().clamp(EPOCHS.0, EPOCHS.1);
            task.why = format!(
                "{} examples, {} a step: {} times through them are {} steps",
                read.len(),
                task.batch,
                task.epochs,
                (task.epochs * (count / task.batch as f64).ceil()) as u64
            );
            task.said.push(format!("the longest example has {} tokens: `max_tokens` is {max_tokens}", read.longest()));
        }
        task.settings.insert(1, format!("  max_tokens: {max_tokens}"));
        Ok(task)
    }

    fn classification(columns: &Columns, labels: Vec<String>) -> Self {
        let names: Vec<String> = labels.iter().map(|l| format!("\"{l}\"")).collect();
        let settings = vec!["  kind: classification".into(), format!("  labels: [{}]", names.join(", "))];
        Task::heads("labels", settings, columns, format!("a classification into {}", labels.join(", ")))
    }

    fn regression(columns: &Columns) -> Self {
        Task::heads("numbers", vec!["  kind: regression".into()], columns, "a number for each text".into())
    }

    fn token_classification([tokens, tags]: [&str; 2], labels: Vec<String>) -> Self {
        let names: Vec<String> = labels.iter().map(|l| format!("\"{l}\"")).collect();
        let settings = vec![
            "  kind: token_classification".into(),
            format!("  labels: [{}]", names.join(", ")),
            format!("  tokens: \"{tokens}\""),
            format!("  tags: \"{tags}\""),
        ];
        let said = format!("each word is one of {}", labels.join(", "));
        Task::heads("tags", settings, &Columns::default(), said)
    }

    /// Of a model with a head for what the data ask.
    fn heads(name: &'static str, mut settings: Vec<String>, columns: &Columns, said: String) -> Self {
        let Columns { text, pair, label } = columns;
        let named = [("text", text), ("pair", pair), ("label", label)];
        settings.extend(named.into_iter().filter_map(|(key, name)| Some(format!("  {key}: \"{}\"", name.as_ref()?))));
        Task {
            name,
            settings,
            batch: 16,
            epochs: EPOCHS.0,
            why: "three times through the data".into(),
            heads: true,
            said: vec![said],
        }
    }

    /// Of a model that writes, with what there is to be said of it.
    fn writes(name: &'static str, settings: Vec<String>, said: String) -> Self {
        Task {
            name,
            settings,
            batch: 8,
            epochs: EPOCHS.0,
            why: "three times through the data".into(),
            heads: false,
            said: vec![said],
        }
    }

    /// Of conversations, by the checkpoint's own template.
    fn chat() -> Self {
        Task::writes(
            "chat",
            vec!["  kind: chat".into()],
            "conversations by the checkpoint's own chat template; the loss is on what the assistant says".into(),
        )
    }

    /// Of texts as they stand, which a token may close.
    fn text(end: Option<String>) -> Self {
        let mut settings = vec!["  kind: text".to_owned()];
        settings.extend(end.as_ref().map(|token| format!("  end: \"{token}\"")));
        let ends = end.map_or("nothing ends one: the checkpoint names no token".into(), |t| format!("`{t}` ends one"));
        Task::writes("texts", settings, format!("texts as they stand, every token of them predicted; {ends}"))
    }

    /// Of rows with these columns, the last of which is to be written; of WebNLG's records if there are none. The model's
    /// own token ends a text where its tokenizer has one.
    fn generation(model: &Model, description: &Description, from: &Path, columns: &[String]) -> Self {
        let end = ending(model, description, from);
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
                    given.iter().map(|name| format!("'{}: ' {{{name}}} '\\n' ", titled(name))).collect();
                let target = format!("'{}: '", titled(written));
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
        let ends = end.map_or("nothing ends it: the checkpoint names no token".into(), |t| format!("`{t}` ends it"));
        Task::writes("texts", settings, format!("{what}; {ends}"))
    }
}

/// The checkpoint's own token at the end of a text, where its tokenizer has one that a template can hold.
fn ending(model: &Model, description: &Description, from: &Path) -> Option<String> {
    let id = description.end()?;
    let tokenizer = data::Tokenizer::load(from, &model.task, model.params[0].shape[0]).ok()?;
    let (token, _) = tokenizer.ids().into_iter().find(|(_, of)| *of == id)?;
    (!token.contains(['"', '\'', ' ', '(', ')', '{', '}'])).then_some(token)
}

/// A column's name as the head of its text, `Question`; what a template's literal cannot hold is left out.
fn titled(name: &str) -> String {
    let plain = name.replace(['\'', '"', '\\'], "");
    let mut letters = plain.chars();
    letters.next().map(|first| first.to_uppercase().chain(letters).collect()).unwrap_or_default()
}

/// Width of the models that methods' rates are of.
const WIDTH: f64 = 768.0;

/// Raises the rate for a narrower model, whose best one grows as its width falls (Yang et al., 2021, table 3: Adam's, as
/// 1 / width). Gives why the rate is what it is.
fn scaled(usage: &mut Usage, model: &Model) -> String {
    let table = model.params.iter().find(|p| p.shape.len() == 2);
    let width = table.map_or(WIDTH, |table| table.shape[1] as f64);
    let factor = (WIDTH / width.max(1.0)).max(1.0);
    let rate = usage.train.iter_mut().find(|(key, _)| key == "lr");
    match rate.and_then(|(_, value)| Some((value.parse::<f64>().ok()?, value))) {
        Some((rate, value)) if factor > 1.0 => {
            *value = format!("{:.1e}", rate * factor);
            format!("The rate of the method's file, {rate:e}, for a width of {width} in place of {WIDTH}")
        }
        _ => "The rate is that of the method's file".into(),
    }
}

/// The labels in the order of the checkpoint's own where that has the same ones.
fn named(labels: Vec<String>, description: &Description) -> Vec<String> {
    let Description::Config(config) = description else { return labels };
    let Some(Value::Object(names)) = config.get("id2label") else { return labels };
    let own = (0..names.len()).map(|id| names.get(&id.to_string())?.as_str().map(str::to_owned));
    let own: Option<Vec<String>> = own.collect();
    let same = |own: &Vec<String>| own.len() == labels.len() && own.iter().all(|name| labels.contains(name));
    own.filter(same).unwrap_or(labels)
}

/// The spec's text, to be laid out.
fn written(backbone: &str, arguments: &Arguments, usage: &Usage, task: &Task, from: &Path, why: &str) -> String {
    let mut text = format!("// For {}.\nimport backbones.{backbone}\n\n", from.display());
    let _ = writeln!(text, "// As the checkpoint has it.\nmodel = {}\n", call(backbone, arguments, &usage.model));
    let _ = writeln!(text, "tune {{\n{}", usage.tune.join("\n"));
    if task.heads {
        text += "// The head is new, unless the checkpoint holds one.\nhead trainable\n";
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
    let _ = writeln!(text, "// {why}; {}.\ntrain {{\n{}\n}}", task.why, train.join("\n"));
    text
}
