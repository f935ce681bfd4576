//! Matrix fragments in the registers of a warp, and their products.
//!
//! It is unspecified which lane holds which element of a `wmma` fragment, and the layout differs between chips. The
//! layout here is therefore a random permutation, drawn from the seed for each kind of fragment: elementwise work on a
//! fragment gives correct results, and code that relies on a particular layout fails. `mma` and `ldmatrix` have the
//! layouts that the PTX ISA documents.

use crate::approx::{mix, signed_fraction};
use crate::arithmetic::Lanes;
use crate::number::Rounding;
use crate::types::Float;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    A,
    B,
    Accumulator,
}

/// d = a·b + c, where a is m×k and b is k×n.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Shape {
    pub m: usize,
    pub n: usize,
    pub k: usize,
}

/// A kind of fragment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fragment {
    pub role: Role,
    pub shape: Shape,
    pub float: Float,
    /// For a factor: whether it was loaded column-major, which must agree with its use.
    pub column_major: bool,
    /// True for `wmma`, false for `mma`.
    pub opaque: bool,
}

/// The index (row-major) of the element in each register, lane and, for 16-bit elements, half of the register.
pub struct FragmentLayout {
    elements: Vec<u16>,
    per_register: usize,
}

impl Fragment {
    pub fn rows(&self) -> usize {
        if self.role == Role::B { self.shape.k } else { self.shape.m }
    }

    pub fn columns(&self) -> usize {
        if self.role == Role::A { self.shape.k } else { self.shape.n }
    }

    fn per_register(&self) -> usize {
        if self.float == Float::F32 { 1 } else { 2 }
    }

    /// Number of 32-bit registers in each lane.
    pub fn registers(&self) -> usize {
        let exact = self.rows() * self.columns() / (32 * self.per_register());
        // Factors in f16 have eight registers whatever their shape, so each element is held by several lanes.
        if self.opaque && self.role != Role::Accumulator && self.float == Float::F16 { 8 } else { exact }
    }

    /// A small number that identifies the kind.
    pub fn index(&self) -> u32 {
        match (self.role, self.column_major) {
            (Role::A, false) => 0,
            (Role::A, true) => 1,
            (Role::B, false) => 2,
            (Role::B, true) => 3,
            (Role::Accumulator, _) => 4 + u32::from(self.float == Float::F32),
        }
    }

    pub fn layout(&self, seed: u64) -> FragmentLayout {
        let per_register = self.per_register();
        let slots = self.registers() * 32 * per_register;
        let size = self.rows() * self.columns();
        let mut elements: Vec<u16> = (0..slots).map(|slot| (slot % size) as u16).collect();
        if self.opaque {
            let Shape { m, n, .. } = self.shape;
            let float = self.float as u64;
            let mut state = mix(seed ^ mix(u64::from(self.index()) | float << 8 | (m as u64) << 16 | (n as u64) << 32));
            for last in (1..slots).rev() {
                state = mix(state);
                elements.swap(last, (state % (last as u64 + 1)) as usize);
            }
        } else {
            for (slot, element) in elements.iter_mut().enumerate() {
                let (register, lane, half) =
                    (slot / (32 * per_register), slot / per_register % 32, slot % per_register);
                let (group, member) = (lane / 4, lane % 4);
                let (row, column) = match self.role {
                    Role::A => (group + 8 * (register % 2), 2 * member + 8 * (register / 2) + half),
                    Role::B => (2 * member + 8 * register + half, group),
                    Role::Accumulator if per_register == 1 => (group + 8 * (register / 2), 2 * member + register % 2),
                    Role::Accumulator => (group + 8 * register, 2 * member + half),
                };
                *element = (row * self.columns() + column) as u16;
            }
        }
        FragmentLayout { elements, per_register }
    }
}

impl FragmentLayout {
    /// Moves elements, in row-major order, to registers.
    pub fn scatter(&self, elements: &[u64]) -> Vec<Lanes> {
        let per = 32 * self.per_register;
        let mut out = vec![[0; 32]; self.elements.len() / per];
        for (slot, &element) in self.elements.iter().enumerate() {
            out[slot / per][slot / self.per_register % 32] |=
                elements[element as usize] << (16 * (slot % self.per_register));
        }
        out
    }

    /// Moves registers to elements; `None` if the copies of an element differ.
    pub fn gather(&self, registers: &[Lanes], size: usize) -> Option<Vec<u64>> {
        const UNSEEN: u64 = u64::MAX;
        let mut out = vec![UNSEEN; size];
        let per = 32 * self.per_register;
        let mask = if self.per_register == 1 { 0xFFFF_FFFF } else { 0xFFFF };
        for (slot, &element) in self.elements.iter().enumerate() {
            let bits = registers[slot / per][slot / self.per_register % 32] >> (16 * (slot % self.per_register)) & mask;
            let seen = &mut out[element as usize];
            if *seen != UNSEEN && *seen != bits {
                return None;
            }
            *seen = bits;
        }
        Some(out)
    }
}

/// a·b + c in f64, with one rounding per element.
///
/// Tensor cores add in an unspecified order and with at least the precision of f32. With a seed, an element is
/// therefore perturbed by up to 2⁻²³ of the sum of the magnitudes of its terms.
pub fn multiply(shape: Shape, a: &[f64], b: &[f64], c: &[f64], float: Float, seed: Option<u64>) -> Vec<u64> {
    let Shape { m, n, k } = shape;
    let mut out = Vec::with_capacity(m * n);
    for i in 0..m {
        let row = &c[i * n..][..n];
        let (mut sums, mut sizes) = (row.to_vec(), row.iter().map(|c| c.abs()).collect::<Vec<f64>>());
        for l in 0..k {
            for ((sum, size), b) in sums.iter_mut().zip(&mut sizes).zip(&b[l * n..][..n]) {
                let term = a[i * k + l] * b;
                *sum += term;
                *size += term.abs();
            }
        }
        for (mut sum, size) in sums.into_iter().zip(sizes) {
            if let Some(seed) = seed
                && size.is_finite()
            {
                sum += signed_fraction(seed, sum.to_bits(), size.to_bits()) * size * 2f64.powi(-23);
            }
            out.push(float.encode(float.round(sum, Rounding::Nearest)));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPES: [Shape; 3] =
        [Shape { m: 16, n: 16, k: 16 }, Shape { m: 32, n: 8, k: 16 }, Shape { m: 8, n: 32, k: 16 }];

    fn fragments() -> Vec<Fragment> {
        let mut out = vec![];
        for shape in SHAPES {
            for (role, float) in [
                (Role::A, Float::F16),
                (Role::A, Float::BF16),
                (Role::B, Float::F16),
                (Role::B, Float::BF16),
                (Role::Accumulator, Float::F16),
                (Role::Accumulator, Float::F32),
            ] {
                out.push(Fragment { role, shape, float, column_major: false, opaque: true });
            }
        }
        let shape = Shape { m: 16, n: 8, k: 16 };
        for (role, float) in [(Role::A, Float::F16), (Role::B, Float::BF16), (Role::Accumulator, Float::F32)] {
            out.push(Fragment { role, shape, float, column_major: false, opaque: false });
        }
        out
    }

    #[test]
    fn every_element_is_in_some_register() {
        for fragment in fragments() {
            let size = fragment.rows() * fragment.columns();
            let elements: Vec<u64> = (0..size as u64).collect();
            for seed in 0..3 {
                let layout = fragment.layout(seed);
                let registers = layout.scatter(&elements);
                assert_eq!(registers.len(), fragment.registers());
                assert_eq!(layout.gather(&registers, size).unwrap(), elements, "{fragment:?}");
            }
        }
    }

    #[test]
    fn register_counts_are_the_documented_ones() {
        let counts: Vec<usize> = fragments().iter().map(Fragment::registers).collect();
        assert_eq!(counts, [8, 4, 8, 4, 4, 8, 8, 8, 8, 2, 4, 8, 8, 2, 8, 8, 4, 8, 4, 2, 4]);
    }

    #[test]
    fn layouts_differ_between_seeds_and_kinds() {
        let [a, b] = [fragments()[0], fragments()[2]];
        assert_ne!(a.layout(1).elements, a.layout(2).elements);
        assert_ne!(a.layout(1).elements, Fragment { column_major: true, ..a }.layout(1).elements);
        assert_ne!(a.layout(1).elements, b.layout(1).elements);
    }
}
