//! Floating-point rounding as PTX defines it.
//!
//! Every operation in a narrower format is computed in f64, rounded to odd where it is inexact, and then rounded once
//! to its own format. Rounding to odd preserves what the second rounding needs, so the result equals that of a single
//! rounding (Boldo and Melquiond 2008).

use crate::types::Float;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rounding {
    /// To nearest, ties to even.
    Nearest,
    Zero,
    Down,
    Up,
}

impl Rounding {
    pub fn integral(self, x: f64) -> f64 {
        match self {
            Rounding::Nearest => x.round_ties_even(),
            Rounding::Zero => x.trunc(),
            Rounding::Down => x.floor(),
            Rounding::Up => x.ceil(),
        }
    }
}

impl Float {
    /// Bits of the mantissa without the leading one, and the exponent of the smallest normal number.
    fn shape(self) -> (i32, i32) {
        match self {
            Float::F16 => (10, -14),
            Float::BF16 => (7, -126),
            Float::F32 => (23, -126),
            Float::F64 => (52, -1022),
        }
    }

    pub fn smallest_normal(self) -> f64 {
        power(self.shape().1)
    }

    pub fn largest(self) -> f64 {
        let (mantissa, least) = self.shape();
        (2.0 - power(-mantissa)) * power(1 - least)
    }

    /// The distance from a finite `x` to the next number.
    pub fn ulp(self, x: f64) -> f64 {
        let (mantissa, least) = self.shape();
        power(exponent(x).max(least) - mantissa)
    }

    pub fn round(self, x: f64, rounding: Rounding) -> f64 {
        if self == Float::F64 || !x.is_finite() || x == 0.0 {
            return x;
        }
        if self == Float::F32 && rounding == Rounding::Nearest {
            return f64::from(x as f32);
        }
        let quantum = self.ulp(x);
        let rounded = rounding.integral(x / quantum) * quantum;
        let largest = self.largest();
        if rounded.abs() <= largest {
            return rounded;
        }
        let to_infinity = match rounding {
            Rounding::Nearest => true,
            Rounding::Zero => false,
            Rounding::Down => x < 0.0,
            Rounding::Up => x > 0.0,
        };
        if to_infinity { f64::INFINITY.copysign(x) } else { largest.copysign(x) }
    }

    /// The bits of a number that is exact in this format; any NaN becomes PTX's canonical one.
    pub fn encode(self, x: f64) -> u64 {
        match self {
            Float::F64 => return if x.is_nan() { 0x7FFF_FFFF_FFFF_FFFF } else { x.to_bits() },
            Float::F32 => return if x.is_nan() { 0x7FFF_FFFF } else { u64::from((x as f32).to_bits()) },
            // bf16 is the upper 16 bits of f32.
            Float::BF16 => return if x.is_nan() { 0x7FFF } else { u64::from((x as f32).to_bits() >> 16) },
            Float::F16 => {}
        }
        if x.is_nan() {
            return 0x7FFF;
        }
        let sign = u64::from(x.is_sign_negative()) << 15;
        let (mantissa, least) = self.shape();
        let size = x.abs();
        sign | if size > self.largest() {
            0x7C00
        } else if size < self.smallest_normal() {
            (size / power(least - mantissa)) as u64
        } else {
            let biased = (exponent(size) - least + 1) as u64;
            biased << mantissa | (size.to_bits() >> (52 - mantissa)) & ((1 << mantissa) - 1)
        }
    }

    pub fn decode(self, bits: u64) -> f64 {
        match self {
            Float::F64 => f64::from_bits(bits),
            Float::F32 => f64::from(f32::from_bits(bits as u32)),
            Float::BF16 => f64::from(f32::from_bits((bits as u32) << 16)),
            Float::F16 => f64::from(half_to_f32(bits as u16)),
        }
    }

    /// Replaces subnormal numbers by zero of the same sign.
    pub fn flush(self, x: f64) -> f64 {
        if x.abs() < self.smallest_normal() { 0.0f64.copysign(x) } else { x }
    }
}

/// Converts f16 to f32 exactly. A multiplication adjusts the exponent, which normalises subnormal numbers.
pub fn half_to_f32(bits: u16) -> f32 {
    let (sign, rest) = (u32::from(bits & 0x8000) << 16, u32::from(bits & 0x7FFF));
    if rest >= 0x7C00 {
        return f32::from_bits(sign | 0x7F80_0000 | (rest & 0x3FF) << 13);
    }
    let scaled = f32::from_bits(rest << 13) * f32::from_bits((127 + 112) << 23);
    f32::from_bits(sign | scaled.to_bits())
}

fn power(exponent: i32) -> f64 {
    if exponent >= -1022 {
        f64::from_bits(((exponent + 1023) as u64) << 52)
    } else {
        f64::from_bits(1 << (exponent + 1074))
    }
}

/// The exponent of the leading bit.
fn exponent(x: f64) -> i32 {
    match (x.to_bits() >> 52 & 0x7FF) as i32 {
        0 => -1022,
        biased => biased - 1023,
    }
}

/// The sum, rounded to odd: an inexact result is the neighbour whose last bit is set.
pub fn add(a: f64, b: f64) -> f64 {
    let sum = a + b;
    if !sum.is_finite() {
        return sum;
    }
    // The rounding error of the sum (Knuth's two-sum).
    let bb = sum - a;
    to_odd(sum, (a - (sum - bb)) + (b - bb))
}

fn to_odd(x: f64, lost: f64) -> f64 {
    if lost == 0.0 || x.to_bits() & 1 == 1 {
        return x;
    }
    let bits = x.to_bits();
    f64::from_bits(if (lost > 0.0) == (x > 0.0) { bits + 1 } else { bits - 1 })
}

/// `a·b + c` of numbers of at most 24 bits, whose product is exact in f64.
pub fn fma(a: f64, b: f64, c: f64) -> f64 {
    add(a * b, c)
}

/// An integer as f64, rounded to odd.
pub fn from_integer(x: i128) -> f64 {
    let near = x as f64;
    to_odd(near, (x - near as i128) as f64)
}

/// PTX's `min` and `max`: a NaN yields to a number, and −0 is below +0.
pub fn min(a: f64, b: f64) -> f64 {
    match (a.is_nan(), b.is_nan()) {
        (true, _) => b,
        (_, true) => a,
        _ if a == b => {
            if a.is_sign_negative() {
                a
            } else {
                b
            }
        }
        _ => a.min(b),
    }
}

pub fn max(a: f64, b: f64) -> f64 {
    -min(-a, -b)
}

#[cfg(test)]
mod tests {
    use super::*;
    use half::{bf16, f16};

    #[test]
    fn every_f16_survives_a_round_trip() {
        for bits in 0..=u16::MAX {
            let (ours, theirs) = (Float::F16.decode(bits.into()), f16::from_bits(bits).to_f64());
            assert!(ours == theirs || ours.is_nan() && theirs.is_nan(), "{bits:#x}: {ours} {theirs}");
            if !ours.is_nan() {
                assert_eq!(Float::F16.encode(ours), bits.into());
                assert_eq!(Float::BF16.encode(Float::BF16.decode(bits.into())), u64::from(bits).min(0xFFFF));
            }
        }
    }

    /// Numbers around every tie, subnormal and overflow.
    fn samples() -> impl Iterator<Item = f32> {
        (0..1 << 20).map(|n: u32| f32::from_bits(n.wrapping_mul(0x9E37_79B1))).chain((0u32..0x7C01).flat_map(|bits| {
            let (a, b) = (f16::from_bits(bits as u16).to_f32(), f16::from_bits((bits + 1).min(0x7BFF) as u16).to_f32());
            let middle = (a + b) / 2.0;
            [middle, middle.next_up(), middle.next_down()]
        }))
    }

    #[test]
    fn rounding_to_nearest_agrees_with_the_half_crate() {
        for x in samples().filter(|x| !x.is_nan()) {
            let ours = Float::F16.encode(Float::F16.round(x.into(), Rounding::Nearest));
            assert_eq!(ours, f16::from_f32(x).to_bits().into(), "{x:e}");
            let ours = Float::BF16.encode(Float::BF16.round(x.into(), Rounding::Nearest));
            assert_eq!(ours, bf16::from_f32(x).to_bits().into(), "{x:e}");
        }
    }

    #[test]
    fn directed_roundings_enclose_the_exact_value() {
        for x in samples().filter(|x| x.is_finite()).map(f64::from) {
            for float in [Float::F16, Float::BF16] {
                let (down, up) = (float.round(x, Rounding::Down), float.round(x, Rounding::Up));
                assert!(down <= x && x <= up, "{x:e}: {down:e} {up:e}");
                let near = float.round(x, Rounding::Nearest);
                assert!(near == down || near == up);
                assert_eq!(float.round(x, Rounding::Zero), if x < 0.0 { up } else { down });
            }
        }
    }

    #[test]
    fn results_are_rounded_once_not_twice() {
        // Halfway between two f32, plus a little that f64 would lose.
        let (a, b) = (1.0, f64::from(f32::EPSILON) / 2.0);
        assert_eq!(Float::F32.round(add(add(a, b), 1e-30), Rounding::Nearest), f64::from(1.0f32.next_up()));
        for n in 0..1u64 << 16 {
            let bits = |k: u64| f32::from_bits((n.wrapping_mul(0x9E37_79B9_7F4A_7C15 ^ k) >> 20) as u32 & 0xBFFF_FFFF);
            let (a, b, c) = (bits(1), bits(2), bits(3));
            let ours = Float::F32.round(fma(a.into(), b.into(), c.into()), Rounding::Nearest) as f32;
            let theirs = a.mul_add(b, c);
            assert!(ours == theirs || ours.is_nan() && theirs.is_nan(), "{a:e} {b:e} {c:e}");
        }
    }

    #[test]
    fn minimum_and_maximum_of_zeros_and_nans() {
        assert!(min(0.0, -0.0).is_sign_negative() && min(-0.0, 0.0).is_sign_negative());
        assert!(max(0.0, -0.0).is_sign_positive() && max(-0.0, 0.0).is_sign_positive());
        assert_eq!((min(f64::NAN, 1.0), max(1.0, f64::NAN)), (1.0, 1.0));
        assert!(min(f64::NAN, f64::NAN).is_nan());
    }
}
