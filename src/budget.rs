//! Counts what a model trains and what is stored of it, by module.

use peft_grammar::group_digits;
use peft_grammar::model::{AppliedMethod, ConfigValue, Model, Origin, Param, Trainable};
use serde::Serialize;

/// The parameter counts of a model.
#[derive(Debug, Serialize)]
pub struct Budget {
    /// Parameters that the methods (and `full`, `bitfit`) train, without the task head and special tokens.
    pub trainable_parameters: u64,
    /// Parameters that are stored after training in place of `trainable_parameters`.
    pub stored_parameters: u64,
    /// Parameters of the task head that train.
    pub head_parameters: u64,
    /// Parameters of special tokens that train: their rows of the token embedding.
    pub special_parameters: u64,
    /// Parameters of the backbone, without the rows that the task's special tokens add.
    pub backbone_parameters: u64,
    /// `trainable_parameters` in percent of `backbone_parameters`.
    pub trainable_percent: f64,
    /// `stored_parameters` in percent of `backbone_parameters`.
    pub stored_percent: f64,
    /// Bytes of the optimizer's moments of everything that trains, and of the averaged values if the recipe averages.
    pub optimizer_bytes: u64,
    /// Bytes of the gradients of everything that trains, in f32.
    pub gradient_bytes: u64,
    /// The counts of each module, in the order of the model.
    pub modules: Vec<Module>,
}

/// The parameter counts of a module.
#[derive(Debug, Serialize)]
pub struct Module {
    /// The module's path, such as `layers.0.attention.q`.
    pub name: String,
    /// The method that trains it, or `head`, `backbone` or `special tokens`.
    pub method: String,
    /// Parameters that train.
    pub trainable: u64,
    /// Parameters that are stored after training.
    pub stored: u64,
}

impl Budget {
    /// Counts the parameters of `model`. `appended` is the number of the vocabulary's rows that the task's new tokens
    /// add: the count of `Tokenizer::appended`, or of all the task's special tokens if there is no tokenizer.
    pub fn of(model: &Model, appended: u64) -> Self {
        let mut budget = Budget {
            trainable_parameters: 0,
            stored_parameters: 0,
            head_parameters: 0,
            special_parameters: 0,
            backbone_parameters: 0,
            trainable_percent: 0.0,
            stored_percent: 0.0,
            optimizer_bytes: 0,
            gradient_bytes: 0,
            modules: vec![],
        };
        for param in &model.params {
            let trains = param.trainable_elements();
            let special = special_elements(model, param, appended);
            if param.origin == Origin::Backbone {
                budget.backbone_parameters += param.elements() - special;
            }
            match (&param.origin, &param.trainable) {
                (_, Trainable::No) => continue,
                (Origin::Head, _) => budget.head_parameters += trains,
                (Origin::Backbone, Trainable::Rows(..)) => budget.special_parameters += trains,
                _ => {
                    budget.special_parameters += special;
                    budget.trainable_parameters += trains - special;
                }
            }
            budget.gradient_bytes += 4 * trains;
            let kept = if model.replaced.contains(&param.name) { 0 } else { trains };
            let (name, method) = module(model, param);
            add(&mut budget.modules, name, method, trains, kept);
        }
        for (name, value) in &model.stored {
            let kept = model.graph.ty(*value).elements().unwrap_or(0);
            let (path, method) = model.applied_to(name).map(|a| (a.path(), a.method.clone())).unwrap_or_default();
            add(&mut budget.modules, path, method, 0, kept);
        }
        let other = budget.head_parameters + budget.special_parameters;
        budget.stored_parameters = budget.modules.iter().map(|m| m.stored).sum::<u64>() - other;
        let percent = |n: u64| 100.0 * n as f64 / budget.backbone_parameters.max(1) as f64;
        budget.trainable_percent = percent(budget.trainable_parameters);
        budget.stored_percent = percent(budget.stored_parameters);
        let kept = model.train.optimizer.moments().len() + usize::from(model.train.average.is_some());
        budget.optimizer_bytes = kept as u64 * budget.gradient_bytes;
        budget
    }

    /// The counts as a table for the terminal, with one line for all layers.
    pub fn table(&self) -> String {
        // Modules whose names differ only in the number of the layer share a line.
        let mut lines: Vec<(String, u64, u64, u64)> = vec![];
        for Module { name, trainable, stored, .. } in &self.modules {
            let pattern = name.split('.').map(|s| if s.parse::<u64>().is_ok() { "*" } else { s });
            let pattern = pattern.collect::<Vec<_>>().join(".");
            match lines.iter_mut().find(|line| line.0 == pattern) {
                Some(line) => *line = (pattern, line.1 + 1, line.2 + trainable, line.3 + stored),
                None => lines.push((pattern, 1, *trainable, *stored)),
            }
        }
        let width = lines.iter().map(|line| line.0.len()).max().unwrap_or(0).max(24);
        let mut text: Vec<String> = lines
            .iter()
            .map(|(pattern, count, trainable, stored)| {
                let times = if *count > 1 { format!("{count} ×") } else { String::new() };
                let kept =
                    if stored == trainable { String::new() } else { format!("  {} stored", group_digits(*stored)) };
                format!("  {times:>5} {pattern:<width$} {:>13}{kept}", group_digits(*trainable))
            })
            .collect();
        let mut total = format!(
            "trainable: {} ({:.2}% of the backbone's {})",
            group_digits(self.trainable_parameters),
            self.trainable_percent,
            group_digits(self.backbone_parameters)
        );
        for (count, what) in [(self.head_parameters, "task head"), (self.special_parameters, "special tokens")] {
            if count > 0 {
                total += &format!(" + {} {what}", group_digits(count));
            }
        }
        text.push(total);
        if self.stored_parameters != self.trainable_parameters {
            text.push(format!("stored:    {} ({:.2}%)", group_digits(self.stored_parameters), self.stored_percent));
        }
        text.join("\n")
    }
}

/// The elements of `param` in the rows that the task's new tokens add, if it is a table over the vocabulary. No
/// checkpoint has these rows, and the backbone's parameter count leaves them out.
fn special_elements(model: &Model, param: &Param, appended: u64) -> u64 {
    let vocabulary = model.backbone.config.get("vocab_size");
    match param.shape[..] {
        [rows, width] if vocabulary == Some(&ConfigValue::Int(rows as i64)) => appended * width,
        _ => 0,
    }
}

/// Adds counts to the module `name`, which is appended if it is new.
fn add(modules: &mut Vec<Module>, name: String, method: String, trainable: u64, stored: u64) {
    match modules.iter_mut().find(|m| m.name == name) {
        Some(module) => {
            module.trainable += trainable;
            module.stored += stored;
        }
        None => modules.push(Module { name, method, trainable, stored }),
    }
}

/// The module that a trainable tensor belongs to, and the method that trains it.
fn module(model: &Model, param: &Param) -> (String, String) {
    let parent = || param.name.rsplit_once('.').map_or(&param.name[..], |(m, _)| m).to_string();
    match &param.origin {
        Origin::Method(method) => {
            // Tensors that all sites share belong to the method itself.
            (model.applied_to(&param.name).map_or(method.clone(), AppliedMethod::path), method.clone())
        }
        Origin::Head => (parent(), "head".into()),
        Origin::Backbone => {
            let what = if let Trainable::Rows(..) = param.trainable { "special tokens" } else { "backbone" };
            (parent(), what.into())
        }
    }
}
