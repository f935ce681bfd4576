//! The tensors of a model by canonical name.

use std::collections::HashMap;

use crate::memory::TensorData;

/// Tensors by name, handed over to a session.
#[derive(Debug, Default)]
pub struct Weights {
    tensors: HashMap<String, TensorData>,
}

impl Weights {
    pub fn insert(&mut self, name: impl Into<String>, data: TensorData) {
        self.tensors.insert(name.into(), data);
    }

    pub fn get(&self, name: &str) -> Option<&[f32]> {
        self.tensors.get(name).map(TensorData::as_slice)
    }

    pub fn take(&mut self, name: &str) -> Option<TensorData> {
        self.tensors.remove(name)
    }
}
