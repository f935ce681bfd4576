//! Kernels as LLVM writes them, each compared with the same computation in Rust; kernels that are broken on purpose,
//! for each check; single instructions.

mod checks;
mod instructions;
mod kernels;

use half::{bf16, f16};
use ptx_sim::Module;

/// A test case, parsed.
fn case(name: &str) -> Module {
    parse(&text(name))
}

fn text(name: &str) -> String {
    let path = format!("{}/tests/cases/{name}.ptx", env!("CARGO_MANIFEST_DIR"));
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn parse(text: &str) -> Module {
    Module::parse(text).unwrap_or_else(|error| panic!("{error}"))
}

/// Pseudo-random numbers in [−1, 1).
fn uniform(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

fn to_f16(x: &[f32]) -> Vec<u16> {
    x.iter().map(|&x| f16::from_f32(x).to_bits()).collect()
}

fn to_bf16(x: &[f32]) -> Vec<u16> {
    x.iter().map(|&x| bf16::from_f32(x).to_bits()).collect()
}

fn from_f16(x: &[u16]) -> Vec<f32> {
    x.iter().map(|&x| f16::from_bits(x).to_f32()).collect()
}

fn from_bf16(x: &[u16]) -> Vec<f32> {
    x.iter().map(|&x| bf16::from_bits(x).to_f32()).collect()
}

#[track_caller]
fn assert_close(ours: &[f32], theirs: &[f32], tolerance: f32) {
    assert_eq!(ours.len(), theirs.len());
    for (n, (a, b)) in ours.iter().zip(theirs).enumerate() {
        assert!((a - b).abs() <= tolerance, "{n}: {a} and {b}");
    }
}
