//! Kernels: what each computes, written out in the builder's terms.

pub mod math;
pub mod philox;
