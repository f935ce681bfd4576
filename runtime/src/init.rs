//! Weights drawn from their initial distributions.
//!
//! Every value is a function of the seed, its tensor's name and its index, so neither the order of tensors
//! nor the number of threads changes a bit.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::philox::philox4x32;

/// How a tensor starts, in the form the checked model has it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Init {
    Zeros,
    Ones,
    /// N(0, std).
    Normal {
        std: f64,
    },
    /// fmod(N(0,1), 2) · scale.
    Truncated {
        scale: f64,
    },
    /// U(−bound, bound).
    Uniform {
        bound: f64,
    },
}

/// Elements a thread draws at a time; a multiple of four.
const CHUNK: usize = 1 << 14;

/// Draws the elements `first..` of the tensor `name` into `values`.
pub fn draw(values: &mut [f32], first: u64, init: &Init, seed: u64, name: &str) {
    let key = key(seed, name);
    values.par_chunks_mut(CHUNK).enumerate().for_each(|(chunk, values)| {
        let first = first + (chunk * CHUNK) as u64;
        let mut block = [0.0; 4];
        for (i, value) in values.iter_mut().enumerate() {
            let at = first + i as u64;
            if i == 0 || at.is_multiple_of(4) {
                block = draw_block(at / 4, init, key);
            }
            *value = block[(at % 4) as usize] as f32;
        }
    });
}

fn key(seed: u64, name: &str) -> [u32; 2] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes()).update(name.as_bytes());
    let hash = hasher.finalize();
    let (words, _) = hash.as_bytes().as_chunks::<4>();
    [u32::from_le_bytes(words[0]), u32::from_le_bytes(words[1])]
}

/// Elements 4·block to 4·block + 3.
fn draw_block(block: u64, init: &Init, key: [u32; 2]) -> [f64; 4] {
    let words = || philox4x32([block as u32, (block >> 32) as u32, 0, 0], key);
    match init {
        Init::Zeros => [0.0; 4],
        Init::Ones => [1.0; 4],
        Init::Normal { std } => normals(words()).map(|x| x * std),
        Init::Truncated { scale } => normals(words()).map(|x| x % 2.0 * scale),
        Init::Uniform { bound } => words().map(|word| (2.0 * unit(word) - 1.0) * bound),
    }
}

/// In (0, 1), both ends excluded.
fn unit(word: u32) -> f64 {
    (f64::from(word) + 0.5) / (f64::from(u32::MAX) + 1.0)
}

/// Two pairs by Box and Muller: √(−2 ln u) (cos 2πv, sin 2πv).
fn normals(words: [u32; 4]) -> [f64; 4] {
    let pair = |u, v| {
        let radius = (-2.0 * unit(u).ln()).sqrt();
        let (sin, cos) = (std::f64::consts::TAU * unit(v)).sin_cos();
        (radius * cos, radius * sin)
    };
    let ((a, b), (c, d)) = (pair(words[0], words[1]), pair(words[2], words[3]));
    [a, b, c, d]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drawn(len: usize, init: &Init, name: &str) -> Vec<f32> {
        let mut values = vec![0.0; len];
        draw(&mut values, 0, init, 7, name);
        values
    }

    #[test]
    fn moments() {
        let n = 200_000;
        let mean = |x: &[f32]| x.iter().map(|&x| f64::from(x)).sum::<f64>() / x.len() as f64;
        let std = |x: &[f32]| (x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / x.len() as f64).sqrt();
        let normal = drawn(n, &Init::Normal { std: 0.02 }, "a");
        assert!(mean(&normal).abs() < 2e-4 && (std(&normal) - 0.02).abs() < 2e-4);
        let truncated = drawn(n, &Init::Truncated { scale: 0.01 }, "a");
        assert!(truncated.iter().all(|x| x.abs() < 0.02) && (std(&truncated) - 0.00866).abs() < 1e-4);
        let uniform = drawn(n, &Init::Uniform { bound: 0.5 }, "a");
        assert!(uniform.iter().all(|x| x.abs() < 0.5) && (std(&uniform) - 0.5 / 3f64.sqrt()).abs() < 2e-3);
        assert_eq!(drawn(3, &Init::Ones, "a"), [1.0; 3]);
        assert_eq!(drawn(3, &Init::Zeros, "a"), [0.0; 3]);
    }

    #[test]
    fn a_function_of_seed_name_and_index() {
        let init = Init::Normal { std: 1.0 };
        let whole = drawn(100_003, &init, "a");
        let single = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        assert_eq!(single.install(|| drawn(100_003, &init, "a")), whole);
        let mut tail = vec![0.0; 100_003 - 50_257];
        draw(&mut tail, 50_257, &init, 7, "a");
        assert_eq!(tail, whole[50_257..]);
        assert_ne!(drawn(8, &init, "b"), whole[..8]);
        let mut other = vec![0.0; 8];
        draw(&mut other, 0, &init, 8, "a");
        assert_ne!(other, whole[..8]);
    }
}
