//! Attention within packed sequences: fused on a CPU ([`cpu`]) and on a GPU ([`gpu`]), where the score matrix is never
//! materialised (FlashAttention, Dao et al. 2022), and operation by operation ([`unfused`]).

pub mod cpu;
pub mod gpu;
pub mod shape;
pub mod unfused;
