//! Hugging Face PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! What a method is there stands in the method's file (`counterpart`), and is only interpreted here. Names come from
//! the model: a projection knows the tensor its matrix lies in, and PEFT's modules are those tensors' names without
//! `.weight`.

mod config;
mod export;
pub mod foreign;
mod import;
mod modules;
mod names;
mod residual;
mod tables;

use std::collections::BTreeMap;
use std::path::Path;

use peft_grammar::graph::Op;
use peft_grammar::model::Model;
use peft_runtime::adapter::{self, Stored, TensorFile};
use peft_runtime::{RuntimeError, files, json};
use serde_json::{Map, Value};

pub use export::{export, notes};
pub use import::{Imported, import};
pub use residual::{Residual, take_out};

/// Tensors under canonical names.
pub type Tensors = BTreeMap<String, Stored>;

pub const CONFIG: &str = "adapter_config.json";
pub const MODEL: &str = "adapter_model.safetensors";

/// An adapter as PEFT has it.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapter {
    pub config: Map<String, Value>,
    pub tensors: Tensors,
}

impl Adapter {
    /// Reads a folder that PEFT wrote. The error says what else it is.
    pub fn load(dir: &Path) -> Result<Self, RuntimeError> {
        let path = dir.join(CONFIG);
        let config = json::object(&path)?;
        foreign::check_folder(dir, &config)?;
        let tensors = adapter::load(&dir.join(MODEL))?.tensors;
        foreign::check_names(&dir.join(MODEL), tensors.keys())?;
        Ok(Adapter { config, tensors })
    }

    pub fn save(&self, dir: &Path) -> Result<(), RuntimeError> {
        let mut text = serde_json::to_string_pretty(&self.config).expect("plain data");
        text.push('\n');
        // Other readers want to know which framework wrote a file; its numbers are laid out as PyTorch's.
        let notes = BTreeMap::from([("format".to_string(), "pt".to_string())]);
        adapter::save(&dir.join(MODEL), &TensorFile { tensors: self.tensors.clone(), notes })?;
        files::write_whole(&dir.join(CONFIG), text.as_bytes())
    }
}

/// The tensor is a table that tokens are looked up in and that logits are computed from.
fn tied(model: &Model, name: &str) -> bool {
    let graph = &model.graph;
    let mut values: Vec<_> = graph.args.iter().filter(|a| a.name == name).map(|a| a.value).collect();
    // Its parts, put together, and what is a mere view of it.
    for node in &graph.nodes {
        let view = matches!(node.op, Op::Concat { .. } | Op::Permute { .. });
        if view && node.operands.iter().any(|v| values.contains(v)) {
            values.push(node.result());
        }
    }
    let reads = |of_kind: fn(&Op) -> bool| {
        graph.nodes.iter().any(|n| of_kind(&n.op) && n.operands.iter().any(|v| values.contains(v)))
    };
    reads(|op| matches!(op, Op::Matmul { .. })) && reads(|op| matches!(op, Op::Gather { .. }))
}

fn list(names: &[&str]) -> String {
    let shown: Vec<String> = names.iter().take(6).map(|n| format!("`{n}`")).collect();
    let more = if names.len() > 6 { format!(" and {} more", names.len() - 6) } else { String::new() };
    shown.join(", ") + &more
}
