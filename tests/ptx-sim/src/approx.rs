//! Approximate functions, within the error bounds that the PTX ISA (9.1) documents.
//!
//! The exact value is computed first. Unless the options disable it, the value is then perturbed by up to the
//! documented error, depending on the seed and the operands only. Equal inputs therefore give equal outputs, as on
//! hardware, and no test can rely on more accuracy than hardware has.

use crate::number::Rounding;
use crate::types::Float;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Function {
    Ex2,
    Lg2,
    Rcp,
    Sqrt,
    Rsqrt,
    Sin,
    Cos,
    Tanh,
    /// `div.approx` and `div.full`.
    Div,
}

/// The bound on the distance between a result and the exact value.
enum ErrorBound {
    Ulp(f64),
    Relative(f64),
    Absolute(f64),
}

impl Function {
    fn exact(self, a: f64, b: f64) -> f64 {
        match self {
            Function::Ex2 => a.exp2(),
            Function::Lg2 => a.log2(),
            Function::Rcp => 1.0 / a,
            Function::Sqrt => a.sqrt(),
            Function::Rsqrt => 1.0 / a.sqrt(),
            Function::Sin => a.sin(),
            Function::Cos => a.cos(),
            Function::Tanh => a.tanh(),
            Function::Div => a / b,
        }
    }

    fn error(self, float: Float, a: f64) -> ErrorBound {
        let power = |n: f64| n.exp2();
        match (self, float) {
            (Function::Ex2, Float::F16) => ErrorBound::Relative(power(-9.9)),
            (Function::Ex2, Float::BF16) => ErrorBound::Relative(power(-7.0)),
            (Function::Ex2, _) => ErrorBound::Ulp(2.0),
            (Function::Lg2, _) if a > 0.5 && a < 2.0 => ErrorBound::Absolute(power(-22.0)),
            (Function::Lg2, _) => ErrorBound::Relative(power(-22.0)),
            (Function::Rcp, _) => ErrorBound::Ulp(1.0),
            (Function::Sqrt, _) => ErrorBound::Relative(power(-23.0)),
            (Function::Rsqrt, _) => ErrorBound::Relative(power(-22.9)),
            (Function::Sin | Function::Cos, _) if a.abs() <= std::f64::consts::TAU => {
                ErrorBound::Absolute(power(-20.5))
            }
            (Function::Sin | Function::Cos, _) => ErrorBound::Absolute(power(-14.7)),
            (Function::Tanh, Float::F16) => ErrorBound::Absolute(power(-10.987)),
            (Function::Tanh, Float::BF16) => ErrorBound::Absolute(power(-8.0)),
            (Function::Tanh, _) => ErrorBound::Relative(power(-11.0)),
            (Function::Div, _) => ErrorBound::Ulp(2.0),
        }
    }

    /// Maps the bits of the operands to those of the result. `seed` determines the perturbation, `None` disables it.
    pub fn apply(self, float: Float, flush: bool, a: u64, b: u64, seed: Option<u64>) -> u64 {
        let operand = |bits: u64| {
            let x = float.decode(bits);
            if flush { float.flush(x) } else { x }
        };
        let (x, y) = (operand(a), operand(b));
        let exact = self.exact(x, y);
        let near = float.round(exact, Rounding::Nearest);
        // Zeros, infinities and the value at zero are exact by the ISA's tables of special cases.
        let fixed = x == 0.0 || near == 0.0 || !near.is_finite();
        let result = match seed {
            Some(seed) if !fixed => {
                let ulp = float.ulp(near);
                let spread = match self.error(float, x) {
                    // The bound counts units in the last place from the rounded result, so the perturbation is a whole
                    // number of them.
                    ErrorBound::Ulp(n) => n * ulp,
                    ErrorBound::Relative(e) => e * exact.abs() - ulp / 2.0,
                    ErrorBound::Absolute(e) => e - ulp / 2.0,
                };
                let moved = exact + signed_fraction(seed ^ (self as u64) << 56, a, b) * spread.max(0.0);
                let moved = float.round(moved, Rounding::Nearest);
                if matches!(self.error(float, x), ErrorBound::Ulp(_)) {
                    moved.clamp(near - spread, near + spread)
                } else {
                    moved
                }
            }
            _ => near,
        };
        float.encode(if flush { float.flush(result) } else { result })
    }
}

/// A pseudo-random number in [−1, 1], determined by the seed and the operands.
pub fn signed_fraction(seed: u64, a: u64, b: u64) -> f64 {
    mix(seed ^ mix(a ^ mix(b))) as i64 as f64 / -(i64::MIN as f64)
}

/// The finaliser of SplitMix64 (Steele, Lea and Flood 2014).
pub fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let x = (x ^ x >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ x >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ x >> 31
}

#[cfg(test)]
mod tests {
    use super::*;

    fn apply(function: Function, x: f32, seed: Option<u64>) -> f32 {
        f32::from_bits(function.apply(Float::F32, false, x.to_bits().into(), 0, seed) as u32)
    }

    #[test]
    fn perturbed_results_are_within_the_documented_error() {
        let (mut moved, mut count) = (0, 0);
        for n in 1..20_000u32 {
            let x = n as f32 * 7e-4;
            for (function, bound) in [
                (Function::Ex2, 2.5 * 2f64.powi(-23) * f64::from(x).exp2()),
                (Function::Rsqrt, (-22.9f64).exp2() / f64::from(x).sqrt()),
                (Function::Tanh, (-11f64).exp2()),
            ] {
                let exact = function.exact(x.into(), 0.0);
                let error = (f64::from(apply(function, x, Some(1))) - exact).abs();
                assert!(error <= bound, "{function:?} of {x}: {error:e} > {bound:e}");
                moved += u32::from(apply(function, x, Some(1)) != apply(function, x, None));
                count += 1;
            }
        }
        assert!(moved > count / 3, "{moved} of {count}");
    }

    #[test]
    fn special_values_are_exact() {
        for (function, x, y) in [
            (Function::Ex2, 0.0, 1.0),
            (Function::Ex2, f32::NEG_INFINITY, 0.0),
            (Function::Lg2, 0.0, f32::NEG_INFINITY),
            (Function::Rcp, -0.0, f32::NEG_INFINITY),
            (Function::Rsqrt, f32::INFINITY, 0.0),
            (Function::Cos, 0.0, 1.0),
        ] {
            assert_eq!(apply(function, x, Some(3)).to_bits(), y.to_bits(), "{function:?}({x})");
        }
        assert!(apply(Function::Lg2, -1.0, Some(3)).is_nan());
    }
}
