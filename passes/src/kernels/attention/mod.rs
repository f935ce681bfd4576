//! Attention within sequences: without its square, on a processor and on a GPU, and as its equations stand.

pub mod cpu;
pub mod gpu;
pub mod shape;
pub mod unfused;
