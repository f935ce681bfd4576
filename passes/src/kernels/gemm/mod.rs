//! Products: on a processor, and on a GPU in `f32`, of few columns, and by tensor cores.

pub mod cpu;
pub mod epilogue;
pub mod mma;
pub mod pack;
pub mod simt;
pub mod skinny;
