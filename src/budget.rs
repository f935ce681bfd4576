//! What a model trains and stores, by module, and what a token costs.

use std::collections::BTreeMap;

use peft_grammar::graph::{Dim, Graph, Op};
use peft_grammar::model::{Model, Origin, Param, Trainable};
use serde::Serialize;

#[derive(Debug, Serialize)]
pub struct Budget {
    /// What the methods (and `full`, `bitfit`) train, without task head and special tokens.
    pub trainable_parameters: u64,
    pub stored_parameters: u64,
    pub head_parameters: u64,
    /// Rows of special tokens that train.
    pub special_parameters: u64,
    pub backbone_parameters: u64,
    /// Of matrix products of the forward pass, multiplications and additions apart.
    pub forward_flops_per_token: u64,
    pub forward_flops_per_target: u64,
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
    pub fn of(model: &Model) -> Self {
        let mut modules: BTreeMap<(usize, String), Module> = BTreeMap::new();
        let mut budget = Budget {
            trainable_parameters: 0,
            stored_parameters: 0,
            head_parameters: 0,
            special_parameters: 0,
            backbone_parameters: 0,
            forward_flops_per_token: flops(&model.graph, Dim::Tokens),
            forward_flops_per_target: flops(&model.graph, Dim::Targets),
            modules: vec![],
        };
        for (at, param) in model.params.iter().enumerate() {
            let trains = param.trainable_elements();
            if param.origin == Origin::Backbone {
                budget.backbone_parameters += param.elements();
            }
            match (&param.origin, &param.trainable) {
                (_, Trainable::No) => continue,
                (Origin::Head, _) => budget.head_parameters += trains,
                (_, Trainable::Rows(..)) => budget.special_parameters += trains,
                _ => budget.trainable_parameters += trains,
            }
            let (name, method) = module(param);
            let first = modules.keys().find(|(_, n)| *n == name).map_or(at, |(at, _)| *at);
            let entry = modules.entry((first, name.clone()));
            let module = entry.or_insert(Module { name, method, trainable: 0, stored: 0 });
            module.trainable += trains;
            module.stored += trains;
        }
        let replaced = |name: &str| model.replaced.iter().any(|r| r == name);
        let dropped = model.params.iter().filter(|p| replaced(&p.name)).map(Param::trainable_elements).sum::<u64>();
        let kept = model.stored.iter().filter_map(|(_, value)| model.graph.ty(*value).elements()).sum::<u64>();
        budget.stored_parameters = budget.trainable_parameters - dropped + kept;
        budget.modules = modules.into_values().collect();
        budget
    }

    pub fn table(&self) -> String {
        // Layers alike are one line.
        let mut lines: Vec<(String, u64, u64)> = vec![];
        for module in &self.modules {
            let pattern = module.name.split('.').map(|s| if s.parse::<u64>().is_ok() { "*" } else { s });
            let pattern = pattern.collect::<Vec<_>>().join(".");
            match lines.iter_mut().find(|(p, ..)| *p == pattern) {
                Some((_, count, trainable)) => (*count, *trainable) = (*count + 1, *trainable + module.trainable),
                None => lines.push((pattern, 1, module.trainable)),
            }
        }
        let width = lines.iter().map(|(p, ..)| p.len()).max().unwrap_or(0).max(24);
        let mut text: Vec<String> = lines
            .iter()
            .map(|(pattern, count, trainable)| {
                let times = if *count > 1 { format!("{count} ×") } else { String::new() };
                format!("  {times:>5} {pattern:<width$} {:>13}", grouped(*trainable))
            })
            .collect();
        let share = 100.0 * self.trainable_parameters as f64 / self.backbone_parameters.max(1) as f64;
        let mut total = format!(
            "trainable: {} ({share:.2}% of the backbone's {})",
            grouped(self.trainable_parameters),
            grouped(self.backbone_parameters)
        );
        for (count, what) in [(self.head_parameters, "task head"), (self.special_parameters, "special tokens")] {
            if count > 0 {
                total += &format!(" + {} {what}", grouped(count));
            }
        }
        text.push(total);
        let (token, target) = (self.forward_flops_per_token as f64 / 1e6, self.forward_flops_per_target as f64 / 1e6);
        text.push(format!("forward: {token:.1} MFLOP a token, {target:.1} a target, without attention"));
        text.join("\n")
    }
}

/// The module a trainable tensor is of, and its method.
fn module(param: &Param) -> (String, String) {
    match &param.origin {
        Origin::Method(method) => {
            let cut = param.name.find(&format!(".{method}."));
            let end = cut.map_or(param.name.len(), |at| at + 1 + method.len());
            (param.name[..end].to_string(), method.clone())
        }
        Origin::Head => (param.name.rsplit_once('.').map_or(&param.name[..], |(m, _)| m).to_string(), "head".into()),
        Origin::Backbone => {
            let what = if let Trainable::Rows(..) = param.trainable { "special tokens" } else { "backbone" };
            (param.name.rsplit_once('.').map_or(&param.name[..], |(m, _)| m).to_string(), what.into())
        }
    }
}

/// Two for each multiplication of matrix products whose rows run along `rows`.
fn flops(graph: &Graph, rows: Dim) -> u64 {
    let mut total = 0;
    for node in &graph.nodes {
        let Op::Matmul { transpose_x, .. } = node.op else { continue };
        let (x, z) = (graph.ty(node.operands[0]), graph.ty(node.result));
        if !z.shape.contains(&rows) {
            continue;
        }
        let inner = x.shape[x.rank() - if transpose_x { 2 } else { 1 }].constant().unwrap_or(0);
        total += 2 * inner * z.shape.iter().filter_map(|d| d.constant()).product::<u64>();
    }
    total
}

fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}
