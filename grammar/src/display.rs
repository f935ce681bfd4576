//! A model as text, and as JSON.

use std::fmt;

use crate::graph::{Attr, Graph, Role};
use crate::model::{Model, Origin, Param, Trainable};

impl Model {
    /// The model as indented JSON.
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("a model is plain data")
    }

    /// Reads the JSON of [`Model::to_json`] and verifies the graph.
    ///
    /// # Errors
    ///
    /// The text is not the JSON of a model, or its graph is malformed.
    pub fn from_json(text: &str) -> Result<Model, String> {
        let model: Model = serde_json::from_str(text).map_err(|e| format!("this is not a model: {e}"))?;
        model.graph.verify()?;
        Ok(model)
    }

    /// The number of trainable values.
    pub fn trainable_elements(&self) -> u64 {
        self.params.iter().map(Param::trainable_elements).sum()
    }

    /// The learning rates other than the recipe's, in tensor order, with the number of values that train at each.
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

/// One line for each tensor and each operation.
impl fmt::Display for Model {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let total: u64 = self.params.iter().map(Param::elements).sum();
        writeln!(f, "model {} on {}", self.name, self.backbone.name)?;
        writeln!(f, "{} of {} values train", group_digits(self.trainable_elements()), group_digits(total))?;
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

/// A graph with one line for each operation.
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
                node.op.attributes().iter().map(|(name, value)| format!("{name}: {}", AttrText(value))).collect();
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

struct AttrText<'a>(&'a Attr);

impl fmt::Display for AttrText<'_> {
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

/// A number with digits in groups of three: 2,002,320.
pub fn group_digits(n: u64) -> String {
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
