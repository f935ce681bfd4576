//! A model as text for people, and as JSON for machines.

use std::fmt;

use crate::graph::{Attr, Graph, Role};
use crate::model::{Model, Origin, Param, Trainable};

impl Model {
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("a model is plain data")
    }

    /// Reads what [`Model::to_json`] writes, and checks the graph.
    pub fn from_json(text: &str) -> Result<Model, String> {
        let model: Model = serde_json::from_str(text).map_err(|e| format!("this is no model: {e}"))?;
        model.graph.verify()?;
        Ok(model)
    }

    /// Values that train.
    pub fn trainable_elements(&self) -> u64 {
        self.params.iter().map(Param::trainable_elements).sum()
    }

    /// The learning rates beside that of the recipe, in the order of the tensors, and how many values train at each.
    pub fn own_rates(&self) -> Vec<(f64, u64)> {
        let mut rates: Vec<(f64, u64)> = vec![];
        for (lr, values) in self.params.iter().filter_map(|p| Some((p.lr?, p.trainable_elements()))) {
            match rates.iter_mut().find(|(known, _)| *known == lr) {
                Some((_, count)) => *count += values,
                None => rates.push((lr, values)),
            }
        }
        rates
    }
}

/// A tensor a line, an equation a line.
impl fmt::Display for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let total: u64 = self.params.iter().map(Param::elements).sum();
        writeln!(f, "model {} on {}", self.name, self.backbone.name)?;
        writeln!(f, "{} of {} values train", grouped(self.trainable_elements()), grouped(total))?;
        writeln!(f, "\ntensors")?;
        for param in &self.params {
            writeln!(f, "  {param}")?;
        }
        writeln!(f, "\ngraph")?;
        write!(f, "{}", Equations(&self.graph))
    }
}

impl fmt::Display for Param {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shape: Vec<String> = self.shape.iter().map(u64::to_string).collect();
        write!(f, "{} : f32[{}] ", self.name, shape.join(","))?;
        match &self.trainable {
            Trainable::No => write!(f, "frozen")?,
            Trainable::All => write!(f, "trainable")?,
            Trainable::Rows(start, end) => write!(f, "rows {start}..{end} trainable")?,
        }
        if self.origin == Origin::Head {
            write!(f, ", head")?;
        }
        self.lr.map_or(Ok(()), |lr| write!(f, ", lr {lr}"))
    }
}

/// A graph, one line for each operation.
struct Equations<'a>(&'a Graph);

impl fmt::Display for Equations<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let graph = self.0;
        for arg in &graph.args {
            let role = match arg.role {
                Role::Input => "input",
                Role::Frozen => "frozen",
                Role::Trainable => "trainable",
            };
            writeln!(f, "  %{} = {role} {} : {}", arg.value.0, arg.label(), graph.ty(arg.value))?;
        }
        for node in &graph.nodes {
            let operands: Vec<String> = node.operands.iter().map(|v| format!("%{}", v.0)).collect();
            let attributes: Vec<String> =
                node.op.attributes().iter().map(|(name, value)| format!("{name}: {}", Shown(value))).collect();
            let inside = [operands, attributes].concat().join(", ");
            let results: Vec<String> = node.results.iter().map(|v| format!("%{}", v.0)).collect();
            let types: Vec<String> = node.results.iter().map(|&v| graph.ty(v).to_string()).collect();
            writeln!(f, "  {} = {}({inside}) : {}", results.join(", "), node.op.name(), types.join(", "))?;
        }
        for (name, value) in &graph.outputs {
            writeln!(f, "  output {name} = %{} : {}", value.0, graph.ty(*value))?;
        }
        Ok(())
    }
}

struct Shown<'a>(&'a Attr);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Attr::Int(n) => write!(f, "{n}"),
            Attr::Float(x) => write!(f, "{x}"),
            Attr::Bool(b) => write!(f, "{b}"),
            Attr::Ints(all) => write!(f, "{all:?}"),
            Attr::Dims(dims) => write!(f, "[{}]", crate::graph::join(dims)),
        }
    }
}

/// 2002320 as 2,002,320.
pub fn grouped(n: u64) -> String {
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
