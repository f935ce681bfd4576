//! Hugging Face PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! The `counterpart` block of a method's file declares the corresponding method of PEFT; this module interprets it. The
//! names of modules come from the model: a projection knows the tensor that holds its matrix, and the name of PEFT's
//! module is the tensor's name without `.weight`.

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
pub use residual::{Residual, subtract_residuals};

/// Tensors by their canonical names.
pub type Tensors = BTreeMap<String, Stored>;

/// The file with an adapter's settings.
pub const CONFIG: &str = "adapter_config.json";
/// The file with an adapter's tensors.
pub const MODEL: &str = "adapter_model.safetensors";

/// An adapter in PEFT's format.
#[derive(Clone, Debug, PartialEq)]
pub struct Adapter {
    /// The contents of `adapter_config.json`.
    pub config: Map<String, Value>,
    /// The tensors, with PEFT's names.
    pub tensors: Tensors,
}

impl Adapter {
    /// Reads a folder that PEFT wrote.
    ///
    /// # Errors
    ///
    /// A file is missing or damaged, or another program wrote the folder, which the error names.
    pub fn load(dir: &Path) -> Result<Self, RuntimeError> {
        let path = dir.join(CONFIG);
        let config = json::object(&path)?;
        foreign::check_folder(dir, &config)?;
        let tensors = adapter::load(&dir.join(MODEL))?.tensors;
        foreign::check_names(&dir.join(MODEL), tensors.keys())?;
        Ok(Adapter { config, tensors })
    }

    /// Writes both files into a folder.
    ///
    /// # Errors
    ///
    /// A file cannot be written.
    pub fn save(&self, dir: &Path) -> Result<(), RuntimeError> {
        let mut text = serde_json::to_string_pretty(&self.config).expect("plain data");
        text.push('\n');
        // The note `format` tells readers that the tensors are laid out as PyTorch's.
        let notes = BTreeMap::from([("format".to_string(), "pt".to_string())]);
        adapter::save(&dir.join(MODEL), &TensorFile { tensors: self.tensors.clone(), notes })?;
        files::write_atomic(&dir.join(CONFIG), text.as_bytes())
    }
}

/// Whether the tensor is a tied table: the token embedding is gathered from it, and the logits are a product with it.
fn tied(model: &Model, name: &str) -> bool {
    let graph = &model.graph;
    let mut values: Vec<_> = graph.args.iter().filter(|a| a.name == name).map(|a| a.value).collect();
    // Concatenations and permutations of the table count as the table.
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

/// Up to six names, quoted, for a message.
fn list(names: &[&str]) -> String {
    let shown: Vec<String> = names.iter().take(6).map(|n| format!("`{n}`")).collect();
    let more = if names.len() > 6 { format!(" and {} more", names.len() - 6) } else { String::new() };
    shown.join(", ") + &more
}
