//! What a model trains and stores, by module.

use peft_grammar::grouped;
use peft_grammar::model::{Applied, ConfigValue, Model, Origin, Param, Trainable};
use serde::Serialize;

#[derive(Debug, Serialize)]
pub struct Budget {
    /// What the methods (and `full`, `bitfit`) train, without task head and special tokens.
    pub trainable_parameters: u64,
    /// What is left of it when training is over.
    pub stored_parameters: u64,
    pub head_parameters: u64,
    /// Rows of special tokens that train.
    pub special_parameters: u64,
    /// Of the backbone, without rows that special tokens were given.
    pub backbone_parameters: u64,
    pub trainable_percent: f64,
    pub stored_percent: f64,
    /// The optimizer's moments of everything that trains, and the averages if there are some, in bytes.
    pub optimizer_bytes: u64,
    pub gradient_bytes: u64,
    pub modules: Vec<Module>,
}

#[derive(Debug, Serialize)]
pub struct Module {
    pub name: String,
    pub method: String,
    pub trainable: u64,
    pub stored: u64,
}

impl Budget {
    /// `appended` rows of the vocabulary are new tokens of the task: what `Tokenizer::appended` counts, or all of the
    /// task's special tokens where no tokenizer is at hand.
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
        let beside = budget.head_parameters + budget.special_parameters;
        budget.stored_parameters = budget.modules.iter().map(|m| m.stored).sum::<u64>() - beside;
        let percent = |n: u64| 100.0 * n as f64 / budget.backbone_parameters.max(1) as f64;
        budget.trainable_percent = percent(budget.trainable_parameters);
        budget.stored_percent = percent(budget.stored_parameters);
        let kept = model.train.optimizer.moments().len() + usize::from(model.train.average.is_some());
        budget.optimizer_bytes = kept as u64 * budget.gradient_bytes;
        budget
    }

    pub fn table(&self) -> String {
        // Layers alike are one line.
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
                let kept = if stored == trainable { String::new() } else { format!("  {} stored", grouped(*stored)) };
                format!("  {times:>5} {pattern:<width$} {:>13}{kept}", grouped(*trainable))
            })
            .collect();
        let mut total = format!(
            "trainable: {} ({:.2}% of the backbone's {})",
            grouped(self.trainable_parameters),
            self.trainable_percent,
            grouped(self.backbone_parameters)
        );
        for (count, what) in [(self.head_parameters, "task head"), (self.special_parameters, "special tokens")] {
            if count > 0 {
                total += &format!(" + {} {what}", grouped(count));
            }
        }
        text.push(total);
        if self.stored_parameters != self.trainable_parameters {
            text.push(format!("stored:    {} ({:.2}%)", grouped(self.stored_parameters), self.stored_percent));
        }
        text.join("\n")
    }
}

/// Rows that the task's new tokens were given in a table over the vocabulary: no checkpoint has them, and
/// parameter counts leave them out.
fn special_elements(model: &Model, param: &Param, appended: u64) -> u64 {
    let vocabulary = model.backbone.config.get("vocab_size");
    match param.shape[..] {
        [rows, width] if vocabulary == Some(&ConfigValue::Int(rows as i64)) => appended * width,
        _ => 0,
    }
}

/// Counts towards the module `name`. Modules stand in the order in which they are first met.
fn add(modules: &mut Vec<Module>, name: String, method: String, trainable: u64, stored: u64) {
    match modules.iter_mut().find(|m| m.name == name) {
        Some(module) => {
            module.trainable += trainable;
            module.stored += stored;
        }
        None => modules.push(Module { name, method, trainable, stored }),
    }
}

/// The module a trainable tensor is of, and its method.
fn module(model: &Model, param: &Param) -> (String, String) {
    let parent = || param.name.rsplit_once('.').map_or(&param.name[..], |(m, _)| m).to_string();
    match &param.origin {
        Origin::Method(method) => {
            // What its sites share is the method's as a whole.
            (model.applied_to(&param.name).map_or(method.clone(), Applied::path), method.clone())
        }
        Origin::Head => (parent(), "head".into()),
        Origin::Backbone => {
            let what = if let Trainable::Rows(..) = param.trainable { "special tokens" } else { "backbone" };
            (parent(), what.into())
        }
    }
}
