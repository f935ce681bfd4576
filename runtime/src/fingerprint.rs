//! Fingerprints of weights, which tell checkpoints apart.

use rayon::prelude::*;

/// A tensor, or its first rows: name, shape, numbers.
pub type Part<'a> = (&'a str, Vec<u64>, &'a [f32]);

/// A BLAKE3 hash of names, shapes and numbers, in hexadecimal, shortened to 32 digits. Numbers are hashed as f32, so a
/// checkpoint in bf16 has the fingerprint of the same numbers in f32. The order of the parts does not matter.
pub fn fingerprint(parts: &[Part]) -> String {
    let one = |(name, shape, numbers): &Part| {
        let mut hash = blake3::Hasher::new();
        hash.update(format!("{name} {shape:?}").as_bytes());
        let mut bytes = Vec::with_capacity(4 * CHUNK);
        for chunk in numbers.chunks(CHUNK) {
            bytes.clear();
            bytes.extend(chunk.iter().flat_map(|x| x.to_le_bytes()));
            hash.update(&bytes);
        }
        *hash.finalize().as_bytes()
    };
    let mut all: Vec<[u8; 32]> = parts.par_iter().map(one).collect();
    all.sort_unstable();
    blake3::hash(&all.concat()).to_hex()[..32].to_string()
}

/// Numbers that are converted to bytes at a time.
const CHUNK: usize = 1 << 14;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fingerprint_depends_on_names_shapes_and_numbers_but_not_on_order() {
        let numbers = [1.0, 2.0, 3.0, 4.0];
        let a = ("a", vec![2, 2], &numbers[..]);
        let b = ("b", vec![4], &numbers[..]);
        let all = fingerprint(&[a.clone(), b.clone()]);
        assert_eq!(all, fingerprint(&[b.clone(), a.clone()]));
        for other in [("a", vec![4, 1], &numbers[..]), ("c", vec![2, 2], &numbers[..]), ("a", vec![2, 2], &[0.0; 4])] {
            assert_ne!(all, fingerprint(&[other, b.clone()]));
        }
    }
}
