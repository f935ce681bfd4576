//! Checks `task` and `train` blocks: all keys are known, and all values are in range.

use std::collections::HashMap;

use super::frame::Frame;
use super::template::{self, Template};
use super::value::Val;
use super::{Call, Checker, Located, Purpose};
use crate::ast::*;
use crate::diagnostic::Diagnostic;
use crate::model::{
    BatchSize, Columns, DecayScope, Every, Optimizer, Phase, Precision, Recipe, Schedule, Task, TaskKind, item_name,
};
use crate::recipe::{EPS, LR_DECAY, POWER};
use crate::source::FileId;

const GENERATION: &[&str] = &["kind", "max_tokens", "special", "each", "pack", "template", "target"];
const CHAT: &[&str] = &["kind", "max_tokens"];
const TEXT: &[&str] = &["kind", "max_tokens", "text", "end"];
const CLASSIFICATION: &[&str] = &["kind", "max_tokens", "labels", "text", "pair", "label"];
const REGRESSION: &[&str] = &["kind", "max_tokens", "text", "pair", "label"];
const TOKEN_CLASSIFICATION: &[&str] = &["kind", "max_tokens", "labels", "tokens", "tags"];
const RECIPE: &[&str] = &[
    "lr",
    "betas",
    "eps",
    "weight_decay",
    "clip",
    "label_smoothing",
    "schedule",
    "warmup",
    "batch",
    "epochs",
    "steps",
    "seed",
    "precision",
    "lr_end",
    "power",
    "lr_decay",
    "optimizer",
    "momentum",
    "save",
    "evaluate",
    "patience",
    "accumulate",
    "hold_out",
    "decays",
    "average",
];

/// The hint for `pack` in a task of another kind.
const OF_GENERATION: &str =
    "only a task of `kind: generation` with `each` has `pack`; the turns of a chat always share one sequence";

/// The default of `max_tokens`, in tokens, if the backbone accepts that many.
const DEFAULT_MAX_TOKENS: u64 = 512;

/// The settings of some kinds of tasks, to recognise a setting of another kind.
const KINDS: &[(&str, &[&str])] = &[
    ("generation", GENERATION),
    ("classification", CLASSIFICATION),
    ("token_classification", TOKEN_CLASSIFICATION),
    ("text", TEXT),
];

/// The values of a block by key.
type Entries<'a> = HashMap<&'a str, &'a Expr>;

impl<'a> Checker<'a> {
    /// The settings of a block, of which `known` are allowed. A setting of one of the other `kinds` gets a hint that
    /// names that kind.
    fn entries(&mut self, block: &'a Settings, what: &str, known: &[&str], kinds: &[(&str, &[&str])]) -> Entries<'a> {
        let mut entries = Entries::new();
        for entry in &block.entries {
            let key = &entry.key;
            if !known.contains(&&*key.text) {
                let error = Diagnostic::error(key.span, format!("{what} has no setting `{}`", key.text));
                let made = |kind: &str| self.purposes.contains(&Purpose::of(kind));
                let of = kinds.iter().find(|(kind, keys)| keys.contains(&&*key.text) && made(kind));
                self.report(match (&*key.text, of) {
                    (_, Some((kind, _))) => {
                        error.hint(format!("a task of another kind has it; set the kind, `kind: {kind}`"))
                    }
                    ("pack", _) => error.hint(OF_GENERATION),
                    (unknown, _) => error.suggest(unknown, known.iter().copied()),
                });
            } else if let Some(first) = entries.insert(&key.text, &entry.value) {
                let error = Diagnostic::error(key.span, format!("`{}` is set twice", key.text));
                self.report(error.related(first.span, "first here"));
            }
        }
        entries
    }

    /// A number for which `fits` holds; `range` describes those numbers.
    fn setting(&mut self, entries: &Entries<'a>, key: &str, or: f64, range: &str, fits: fn(f64) -> bool) -> f64 {
        let Some(&value) = entries.get(key) else { return or };
        let Some(number) = self.number(&Frame::empty(), value) else { return or };
        if !fits(number) {
            self.report(Diagnostic::error(value.span, format!("`{key}` is {range}, found {number}")));
        }
        number
    }

    /// An integer of at least `least`.
    fn count(&mut self, entries: &Entries<'a>, key: &str, least: i64) -> Option<u64> {
        let &value = entries.get(key)?;
        let number = self.integer(&Frame::empty(), value)?;
        if number < least {
            self.report(Diagnostic::error(value.span, format!("`{key}` is at least {least}, found {number}")));
            return None;
        }
        Some(number as u64)
    }

    /// One of several words.
    fn word<'w>(&mut self, entries: &Entries<'a>, key: &str, words: &[&'w str]) -> Option<&'w str> {
        let &value = entries.get(key)?;
        let (ExprKind::Name(found) | ExprKind::String(found)) = &value.kind else {
            let error = Diagnostic::error(value.span, format!("`{key}` is a word"));
            self.report(error.suggest("", words.iter().copied()));
            return None;
        };
        let word = words.iter().find(|w| *w == found).copied();
        if word.is_none() {
            let error = Diagnostic::error(value.span, format!("there is no {key} `{found}`"));
            self.report(error.suggest(found, words.iter().copied()));
        }
        word
    }

    fn text(&mut self, entries: &Entries<'a>, key: &str) -> Option<Text> {
        let &value = entries.get(key)?;
        if let ExprKind::String(text) = &value.kind {
            return Some(Text { text: text.clone(), span: value.span });
        }
        self.report(Diagnostic::error(value.span, format!("`{key}` is a string")).hint("write it in double quotes"));
        None
    }

    /// A list of distinct strings.
    fn texts(&mut self, entries: &Entries<'a>, key: &str) -> Option<Vec<String>> {
        let &value = entries.get(key)?;
        let ExprKind::List(items) = &value.kind else {
            let error = Diagnostic::error(value.span, format!("`{key}` is a list of strings"));
            self.report(error.hint("such as `[\"a\", \"b\"]`"));
            return None;
        };
        let mut texts: Vec<String> = Vec::new();
        for item in items {
            match &item.kind {
                ExprKind::String(text) if texts.contains(text) => {
                    self.report(Diagnostic::error(item.span, format!("`{text}` is listed twice")));
                }
                ExprKind::String(text) if text.is_empty() => {
                    self.report(Diagnostic::error(item.span, "this string is empty"));
                }
                // The data reader trims labels, so two names that differ in blanks would be the same label.
                ExprKind::String(text) if key == "labels" && text.trim() != text => {
                    let error = Diagnostic::error(item.span, "this label begins or ends with a blank");
                    self.report(error.hint(format!("write it as `{:?}`", text.trim())));
                }
                ExprKind::String(text) => texts.push(text.clone()),
                _ => self.report(Diagnostic::error(item.span, "expected a string").hint("write it in double quotes")),
            }
        }
        Some(texts)
    }

    fn report_missing(&mut self, block: &Name, key: &str, example: &str) {
        let error = Diagnostic::error(block.span, format!("the task does not set `{key}`"));
        let module = crate::library::task_module(&block.text);
        self.report(error.hint(match module {
            Some(module) => {
                format!("`import {module}` takes the missing settings from the library's task of this name")
            }
            None => format!("add `{key}: {example}`"),
        }));
    }

    /// Checks the `task` block. Without a block the task has no data, so that the model can run but not train.
    pub(super) fn task(&mut self, block: Option<&'a Settings>, model: &ModelDef) -> Option<Task> {
        let before = self.errors.len();
        let Some(block) = block else {
            let (labels, columns) = (vec!["0".into(), "1".into()], Columns::default());
            let kind = match self.purpose {
                Purpose::Generation => {
                    let (special, template, target, each) = (vec![], vec![], String::new(), vec![]);
                    TaskKind::Generation { special, template, target, each, pack: false }
                }
                Purpose::Classification => TaskKind::Classification { labels, columns },
                Purpose::Regression => TaskKind::Regression { columns },
                Purpose::TokenClassification => TaskKind::TokenClassification { labels, tokens: None, tags: None },
            };
            return Some(Task { name: "none".into(), max_tokens: DEFAULT_MAX_TOKENS, bidirectional: false, kind });
        };
        let kind_entry = block.entries.iter().find(|e| e.key.text == "kind");
        let given = kind_entry.map(|e| Entries::from([("kind", &e.value)])).unwrap_or_default();
        self.calls.push(Call { span: block.name.span, label: String::new() });
        let task = self.task_of(block, &given, model);
        self.calls.pop();
        (self.errors.len() == before).then_some(task?)
    }

    fn task_of(&mut self, block: &'a Settings, given: &Entries<'a>, model: &ModelDef) -> Option<Task> {
        let kind_entry = block.entries.iter().find(|e| e.key.text == "kind");
        let kind = self.word(given, "kind", &TaskKind::KEYWORDS);
        let purpose = match kind {
            None if kind_entry.is_some() => return None,
            None => self.purpose,
            Some(kind) => Purpose::of(kind),
        };
        if !self.purposes.contains(&purpose) {
            let made: Vec<&str> = self.purposes.iter().map(|purpose| purpose.keyword()).collect();
            let span = kind_entry.map_or(block.name.span, |e| e.value.span);
            let title = format!(
                "`{}` is made for {}, and this task is {}",
                model.backbone.text,
                made.join(", "),
                kind.unwrap_or(purpose.keyword())
            );
            self.report(Diagnostic::error(span, title).related(model.span, "the model"));
            return None;
        }
        self.purpose = purpose;
        let what = format!("task `{}`", block.name.text);
        let known = match (kind, purpose) {
            (Some("chat"), _) => CHAT,
            (Some("text"), _) => TEXT,
            (_, Purpose::Generation) => GENERATION,
            (_, Purpose::Classification) => CLASSIFICATION,
            (_, Purpose::Regression) => REGRESSION,
            (_, Purpose::TokenClassification) => TOKEN_CLASSIFICATION,
        };
        let entries = self.entries(block, &what, known, if kind.is_none() { KINDS } else { &[] });
        let max_tokens = self.count(&entries, "max_tokens", 1);
        self.max_tokens = max_tokens.map(|number| {
            let span = entries["max_tokens"].span;
            // A setting of the library's task is reported where the spec names the task.
            let library = self.sources.get(span.file).library;
            Located { number, span: if library { block.name.span } else { span } }
        });
        let max_tokens = max_tokens.unwrap_or(DEFAULT_MAX_TOKENS);
        let kind = match (kind, purpose) {
            (Some("chat"), _) => Some(TaskKind::Chat),
            (Some("text"), _) => Some(self.plain_text(&entries)),
            (_, Purpose::Generation) => self.generation(block, &entries),
            (_, Purpose::Classification) => self.classification(block, &entries),
            (_, Purpose::Regression) => {
                self.classes = 1;
                Some(TaskKind::Regression { columns: self.columns(&entries, ["text", "pair", "label"]).into() })
            }
            (_, Purpose::TokenClassification) => self.token_classification(block, &entries),
        };
        Some(Task { name: block.name.text.clone(), max_tokens, bidirectional: false, kind: kind? })
    }

    fn generation(&mut self, block: &Settings, entries: &Entries<'a>) -> Option<TaskKind> {
        let special = self.texts(entries, "special").unwrap_or_default();
        let each = self.each(entries);
        let pack = self.pack(entries);
        let (template, target) = (self.text(entries, "template"), self.text(entries, "target"));
        for (key, example) in [("template", "\"<in> … <out> {text} <end>\""), ("target", "\"<out>\"")] {
            if !entries.contains_key(key) {
                self.report_missing(&block.name, key, example);
            }
        }
        let (template, target) = (template?, target?);
        match template::parse(&template, &special, &target) {
            Ok(Template { pieces, target }) => {
                if let Some(name) = template::unread_list(&pieces, &each) {
                    let title =
                        format!("the template has no field of the item of `{name}`: its examples would be alike");
                    let error = Diagnostic::error(template.span, title);
                    self.report(error.hint(format!("such as `{{{}.text}}`, outside of `( … )*`", item_name(name))));
                }
                Some(TaskKind::Generation { special, template: pieces, target, each, pack })
            }
            Err(error) => {
                self.report(*error);
                None
            }
        }
    }

    /// The lists whose items become examples: one list, or several that are iterated in step.
    fn each(&mut self, entries: &Entries<'a>) -> Vec<String> {
        let Some(&value) = entries.get("each") else { return vec![] };
        let names = match &value.kind {
            ExprKind::String(text) => vec![text.clone()],
            ExprKind::List(_) => self.texts(entries, "each").unwrap_or_default(),
            _ => vec![],
        };
        if names.is_empty() || names.iter().any(|name| item_name(name).trim().is_empty()) {
            let error = Diagnostic::error(value.span, "`each` names a list of the row, or several that go in step");
            self.report(error.hint("such as `\"turns\"` or `[\"questions\", \"answers\"]`"));
            return vec![];
        }
        let same = (1..names.len()).find(|&i| names[..i].iter().any(|name| item_name(name) == item_name(&names[i])));
        if let Some(i) = same {
            let title = format!("the items of two lists would both be called `{}`", item_name(&names[i]));
            self.report(Diagnostic::error(value.span, title));
        }
        names
    }

    /// Whether the examples that `each` makes from a row share sequences.
    fn pack(&mut self, entries: &Entries<'a>) -> bool {
        let Some(&value) = entries.get("pack") else { return false };
        let found = self.eval(&Frame::empty(), value);
        let pack = self.as_bool(Some((found, value.span))).unwrap_or(false);
        if pack && !entries.contains_key("each") {
            let title = "`pack: true` puts the examples of a row into one sequence, and without `each` a row makes one";
            let error = Diagnostic::error(value.span, title);
            self.report(error.hint("name the list of the row's turns, `each: \"turns\"`, or leave `pack` out"));
        }
        pack
    }

    fn plain_text(&mut self, entries: &Entries<'a>) -> TaskKind {
        let [text, end] = ["text", "end"].map(|key| self.text(entries, key));
        for (key, value) in [("text", &text), ("end", &end)] {
            if let Some(value) = value.as_ref().filter(|value| value.text.trim().is_empty()) {
                let what = if key == "text" { "column" } else { "token" };
                self.report(Diagnostic::error(value.span, format!("`{key}` names no {what}")));
            }
        }
        TaskKind::Text { text: text.map(|text| text.text), end: end.map(|end| end.text) }
    }

    fn classification(&mut self, block: &Settings, entries: &Entries<'a>) -> Option<TaskKind> {
        let labels = self.labels(block, entries, "[\"negative\", \"positive\"]")?;
        Some(TaskKind::Classification { labels, columns: self.columns(entries, ["text", "pair", "label"]).into() })
    }

    fn token_classification(&mut self, block: &Settings, entries: &Entries<'a>) -> Option<TaskKind> {
        let labels = self.labels(block, entries, "[\"O\", \"B-PER\", \"I-PER\"]")?;
        let [tokens, tags] = self.columns(entries, ["tokens", "tags"]);
        Some(TaskKind::TokenClassification { labels, tokens, tags })
    }

    /// The names of the classes, in order.
    fn labels(&mut self, block: &Settings, entries: &Entries<'a>, example: &str) -> Option<Vec<String>> {
        if !entries.contains_key("labels") {
            self.report_missing(&block.name, "labels", example);
        }
        let labels = self.texts(entries, "labels")?;
        if labels.len() < 2 {
            let error = Diagnostic::error(entries["labels"].span, "a classification has two labels or more");
            self.report(error.hint(format!("such as `{example}`")));
            return None;
        }
        self.classes = labels.len() as u64;
        Some(labels)
    }

    /// The data columns that the task names. Names are not empty and distinct.
    fn columns<const N: usize>(&mut self, entries: &Entries<'a>, keys: [&str; N]) -> [Option<String>; N] {
        let names = keys.map(|key| self.text(entries, key));
        for (i, (key, name)) in keys.iter().zip(&names).enumerate() {
            let Some(name) = name else { continue };
            if name.text.trim().is_empty() {
                let error = Diagnostic::error(name.span, format!("`{key}` names no column"));
                self.report(error.hint(format!("such as `{key}: \"{key}\"`")));
            }
            let same = (0..i).find(|&j| names[j].as_ref().is_some_and(|other| other.text == name.text));
            if let Some(j) = same {
                let title = format!("`{}` and `{key}` are the same column `{}`", keys[j], name.text);
                self.report(Diagnostic::error(name.span, title));
            }
        }
        names.map(|name| name.map(|name| name.text))
    }

    /// Checks the `train` block. Settings that it omits have PyTorch's usual values.
    pub(super) fn recipe(&mut self, block: Option<&'a Settings>) -> Option<Recipe> {
        let before = self.errors.len();
        let named = block.and_then(|block| block.of.as_ref());
        self.calls.extend(named.map(|name| Call { span: name.span, label: String::new() }));
        let entries = block.map(|b| self.entries(b, "a recipe", RECIPE, &[])).unwrap_or_default();
        let share = |x: f64| (0.0..1.0).contains(&x);
        let optimizer = self.optimizer(&entries);
        self.unused_smoothing = entries.get("label_smoothing").map(|value| value.span);
        let recipe = Recipe {
            optimizer,
            lr: self.setting(&entries, "lr", 1e-3, "above 0 and at most 10", |x| x > 0.0 && x <= 10.0),
            betas: self.betas(&entries, optimizer.betas()),
            eps: self.setting(&entries, "eps", EPS, "above 0", |x| x > 0.0),
            weight_decay: self.setting(&entries, "weight_decay", 0.0, "0 or more", |x| x >= 0.0),
            decays: self.decays(&entries),
            clip: self.setting(&entries, "clip", 1.0, "0 (no clipping) or more", |x| x >= 0.0),
            label_smoothing: self.setting(&entries, "label_smoothing", 0.0, "at least 0 and below 1", share),
            schedule: self.schedule(&entries),
            lr_end: self.setting(&entries, "lr_end", 0.0, "0 or more", |x| x >= 0.0),
            warmup: self.phase(&entries, "warmup", Phase::Steps(0), "500 steps: `500`; six percent: `0.06`"),
            batch: self.batch(&entries),
            accumulate: self.count(&entries, "accumulate", 1).unwrap_or(1),
            epochs: self.setting(&entries, "epochs", 3.0, "above 0", |x| x > 0.0),
            steps: self.count(&entries, "steps", 1),
            seed: self.count(&entries, "seed", 0).unwrap_or(1),
            precision: {
                let word = self.word(&entries, "precision", &Precision::KEYWORDS);
                Precision::ALL.into_iter().find(|precision| Some(precision.keyword()) == word).unwrap_or_default()
            },
            save: self.every(&entries, "save", true),
            evaluate: self.every(&entries, "evaluate", false),
            patience: self.count(&entries, "patience", 1),
            hold_out: self.count(&entries, "hold_out", 0).unwrap_or(0),
            average: entries
                .contains_key("average")
                .then(|| self.setting(&entries, "average", 0.0, "above 0 and below 1", |x| x > 0.0 && x < 1.0)),
        };
        if let Some(&value) = entries.get("lr_end") {
            if recipe.schedule == Schedule::Constant {
                self.reject_unread(&entries, "lr_end", "`schedule: constant`");
            } else if recipe.lr_end > recipe.lr {
                let title = format!("`lr_end` is at most `lr`, {}, found {}", recipe.lr, recipe.lr_end);
                self.report(Diagnostic::error(value.span, title));
            }
        }
        self.calls.clear();
        (self.errors.len() == before).then_some(recipe)
    }

    /// An interval: `epoch`, a number of steps or, if `times` are allowed, a duration.
    fn every(&mut self, entries: &Entries<'a>, key: &str, times: bool) -> Every {
        let Some(&value) = entries.get(key) else { return Every::Epoch };
        let found = match &value.kind {
            ExprKind::Name(word) | ExprKind::String(word) if word == "epoch" => Some(Every::Epoch),
            ExprKind::String(text) if times => crate::recipe::seconds(text).map(Every::Seconds),
            ExprKind::Name(_) | ExprKind::String(_) => None,
            _ => match self.eval(&Frame::empty(), value) {
                Val::Int(steps) if steps > 0 => Some(Every::Steps(steps as u64)),
                Val::Unknown => return Every::Epoch,
                _ => None,
            },
        };
        found.unwrap_or_else(|| {
            let (time, example) = if times { (", a time", "; every ten minutes: `\"10min\"`") } else { ("", "") };
            let error = Diagnostic::error(value.span, format!("`{key}` is a number of steps{time} or `epoch`"));
            self.report(error.hint(format!("every 20 steps: `20`{example}")));
            Every::Epoch
        })
    }

    fn optimizer(&mut self, entries: &Entries<'a>) -> Optimizer {
        let momentum = self.setting(entries, "momentum", 0.0, "at least 0 and below 1", |x| (0.0..1.0).contains(&x));
        let word = self.word(entries, "optimizer", &Optimizer::ALL.map(Optimizer::keyword));
        let chosen = Optimizer::ALL.into_iter().find(|optimizer| Some(optimizer.keyword()) == word);
        let optimizer = chosen.unwrap_or_default().with_momentum(momentum);
        let choice = format!("`optimizer: {}`", optimizer.keyword());
        optimizer.unread_settings().iter().for_each(|key| self.reject_unread(entries, key, &choice));
        optimizer
    }

    fn batch(&mut self, entries: &Entries<'a>) -> BatchSize {
        let measured = match entries.get("batch").map(|value| &value.kind) {
            Some(ExprKind::Measured { number, .. }) => Some(Entries::from([("batch", &**number)])),
            _ => None,
        };
        let number = self.count(measured.as_ref().unwrap_or(entries), "batch", 1);
        match (number, measured) {
            (Some(tokens), Some(_)) => BatchSize::Tokens { tokens },
            (number, _) => BatchSize::Sequences(number.unwrap_or(16)),
        }
    }

    fn decays(&mut self, entries: &Entries<'a>) -> DecayScope {
        if let (Some(value), None) = (entries.get("decays"), entries.get("weight_decay")) {
            let error = Diagnostic::error(value.span, "`decays` has no effect without `weight_decay`");
            self.report(error.hint("such as `weight_decay: 0.01`"));
        }
        match self.word(entries, "decays", &DecayScope::KEYWORDS) {
            Some("all") => DecayScope::All,
            _ => DecayScope::Matrices,
        }
    }

    fn schedule(&mut self, entries: &Entries<'a>) -> Schedule {
        let power = self.setting(entries, "power", POWER, "above 0", |x| x > 0.0);
        let decay = self.phase(entries, "lr_decay", LR_DECAY, "500 steps: `500`; ten percent: `0.1`");
        let schedule = match self.word(entries, "schedule", &Schedule::KEYWORDS) {
            Some("constant") => Schedule::Constant,
            Some("cosine") => Schedule::Cosine,
            Some("polynomial") => Schedule::Polynomial { power },
            Some("wsd") => Schedule::Wsd { decay },
            _ => Schedule::Linear,
        };
        let choice = format!("`schedule: {}`", schedule.keyword());
        if !matches!(schedule, Schedule::Polynomial { .. }) {
            self.reject_unread(entries, "power", &choice);
        }
        if !matches!(schedule, Schedule::Wsd { .. }) {
            self.reject_unread(entries, "lr_decay", &choice);
        }
        schedule
    }

    /// Rejects a setting that the chosen optimizer or schedule does not read.
    fn reject_unread(&mut self, entries: &Entries<'a>, key: &str, choice: &str) {
        if let Some(value) = entries.get(key) {
            let error = Diagnostic::error(value.span, format!("{choice} does not read `{key}`"));
            let file = self.sources.get(value.span.file);
            self.report(error.hint(match value.span.file == FileId(0) || file.name == "--set" {
                true => "leave it out",
                false => "the named recipe sets it; write all settings in a `train` block without a name",
            }));
        }
    }

    fn betas(&mut self, entries: &Entries<'a>, or: (f64, f64)) -> (f64, f64) {
        let Some(&value) = entries.get("betas") else { return or };
        let numbers = match self.eval(&Frame::empty(), value) {
            Val::List(items) => items.iter().filter_map(Val::number).collect(),
            _ => vec![],
        };
        match numbers[..] {
            [first, second] if [first, second].iter().all(|b| (0.0..1.0).contains(b)) => (first, second),
            _ => {
                let error = Diagnostic::error(value.span, "`betas` are two numbers of at least 0 and below 1");
                self.report(error.hint("such as `[0.9, 0.999]`"));
                or
            }
        }
    }

    /// A number of steps if the value is an integer, or a fraction of all steps if it is a float.
    fn phase(&mut self, entries: &Entries<'a>, key: &str, or: Phase, examples: &str) -> Phase {
        let Some(&value) = entries.get(key) else { return or };
        match self.eval(&Frame::empty(), value) {
            Val::Int(n) if n >= 0 => return Phase::Steps(n as u64),
            Val::Float(x) if (0.0..=1.0).contains(&x) => return Phase::Share(x),
            Val::Unknown => {}
            other => {
                let title =
                    format!("`{key}` is a number of steps or a share of them, found {}", other.describe(&self.graph));
                self.report(Diagnostic::error(value.span, title).hint(examples));
            }
        }
        or
    }
}
