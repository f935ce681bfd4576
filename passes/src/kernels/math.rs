//! Functions of floats without branches and without calls, for any number of lanes.
//!
//! The coefficients are minimax fits for the ranges used here (Lawson's iteration on Chebyshev nodes). The tests check
//! that each function keeps the error bound that its documentation names, on floats of every magnitude, with and
//! without fused multiply-add. Bounds in units in the last place hold for normal results; subnormal results may be 0 or
//! the smallest normal number.

use crate::builder::{Kernel, Order, Val};

/// c₀ + c₁x + c₂x² + … by Horner's rule.
fn polynomial(k: &mut Kernel, x: Val, coefficients: &[f64]) -> Val {
    let (last, rest) = coefficients.split_last().expect("a polynomial has coefficients");
    let start = k.float(*last, x.ty);
    rest.iter().rev().fold(start, |sum, &c| {
        let c = k.float(c, x.ty);
        k.fma(sum, x, c)
    })
}

/// 1.5 · 2²³. Adding it rounds a float below 2²² to an integer, which is then in the low bits of the sum.
const ROUNDING: f64 = 12_582_912.0;

/// |x|
pub fn magnitude(k: &mut Kernel, x: Val) -> Val {
    let bits = k.bits(x);
    let rest = k.int(0x7FFF_FFFF, bits.ty);
    let bits = k.and(bits, rest);
    k.from_bits(bits)
}

/// `x` ≥ 0 with the sign of `sign`.
fn with_sign(k: &mut Kernel, x: Val, sign: Val) -> Val {
    let (bits, sign) = (k.bits(x), k.bits(sign));
    let top = k.int(i64::from(i32::MIN), sign.ty);
    let sign = k.and(sign, top);
    let bits = k.or(bits, sign);
    k.from_bits(bits)
}

/// x · 2ⁿ, given n + [`ROUNDING`]: n is added to the exponent bits.
fn times_power_of_two(k: &mut Kernel, x: Val, shifted: Val) -> Val {
    let (bits, shifted) = (k.bits(x), k.bits(shifted));
    let place = k.int(23, bits.ty);
    let n = k.shift_left(shifted, place);
    let bits = k.add(bits, n);
    k.from_bits(bits)
}

/// eˣ to 1 unit in the last place. Results below the normal numbers are 0.
pub fn exp(k: &mut Kernel, x: Val) -> Val {
    let ty = x.ty;
    // x = n ln 2 + r, |r| ≤ ln 2 / 2.
    let (log2e, magic) = (k.float(std::f64::consts::LOG2_E, ty), k.float(ROUNDING, ty));
    // Beyond these limits, adding n to the exponent would leave the normal numbers.
    let (lowest, highest) = (k.float(-87.336_54, ty), k.float(88.722_83, ty));
    let shifted = k.fma(x, log2e, magic);
    let n = k.sub(shifted, magic);
    // ln 2 in two parts (Cody & Waite); the first has so few bits that its product with n is exact.
    let (high, low) = (k.float(-0.693_359_375, ty), k.float(2.121_944_4e-4, ty));
    let r = k.fma(n, high, x);
    let r = k.fma(n, low, r);
    let q = polynomial(k, r, &[0.5, 0.166_666_669, 4.166_626_87e-2, 8.333_265_21e-3, 1.394_616_33e-3, 1.991_795_23e-4]);
    let square = k.mul(r, r);
    let tail = k.fma(q, square, r);
    let one = k.float(1.0, ty);
    let power = k.add(one, tail);
    let value = times_power_of_two(k, power, shifted);
    let (zero, infinity) = (k.float(0.0, ty), k.float(f64::INFINITY, ty));
    let small = k.compare(x, Order::Lt, lowest);
    let value = k.select(small, zero, value);
    let large = k.compare(x, Order::Gt, highest);
    let value = k.select(large, infinity, value);
    // NaN passes both comparisons; it is returned unchanged.
    let number = k.compare(x, Order::Eq, x);
    k.select(number, value, x)
}

/// ln x to 1 unit in the last place; −∞ at 0, and NaN below. Subnormal numbers count as 0.
pub fn log(k: &mut Kernel, x: Val) -> Val {
    let ty = x.ty;
    // x = 2ⁿ (1 + f), √½ ≤ 1 + f < √2.
    let bits = k.bits(x);
    let root_half = k.int(0x3F35_04F3, bits.ty);
    let offset = k.sub(bits, root_half);
    let exponent = k.int(0xFF80_0000_u32 as i32 as i64, bits.ty);
    let scale = k.and(offset, exponent);
    let mantissa = k.sub(bits, scale);
    let mantissa = k.from_bits(mantissa);
    let one = k.float(1.0, ty);
    let f = k.sub(mantissa, one);
    let n = k.to_float(scale);
    let unit = k.float(1.0 / 8_388_608.0, ty);
    let n = k.mul(n, unit);
    let q = polynomial(
        k,
        f,
        &[
            0.333_333_106,
            -0.249_999_866,
            0.200_022_193,
            -0.166_692_453,
            0.142_187_804,
            -0.123_844_943,
            0.118_723_092,
            -0.117_887_994,
            0.069_155_784,
        ],
    );
    let square = k.mul(f, f);
    let cube = k.mul(square, f);
    let (high, low) = (k.float(0.693_359_375, ty), k.float(-2.121_944_4e-4, ty));
    let minus_half = k.float(-0.5, ty);
    let tail = k.mul(q, cube);
    let tail = k.fma(n, low, tail);
    let tail = k.fma(minus_half, square, tail);
    let value = k.add(f, tail);
    let value = k.fma(n, high, value);
    let (zero, infinity) = (k.float(0.0, ty), k.float(f64::INFINITY, ty));
    let (lowest, nan) = (k.float(f64::NEG_INFINITY, ty), k.float(f64::NAN, ty));
    let smallest = k.float(f64::from(f32::MIN_POSITIVE), ty);
    let finite = k.compare(x, Order::Lt, infinity);
    let value = k.select(finite, value, x);
    let vanishing = k.compare(x, Order::Lt, smallest);
    let value = k.select(vanishing, lowest, value);
    let negative = k.compare(x, Order::Lt, zero);
    k.select(negative, nan, value)
}

/// sin x to 10⁻⁷ for |x| ≤ 10⁵.
pub fn sin(k: &mut Kernel, x: Val) -> Val {
    turn(k, x, 0)
}

/// cos x to 10⁻⁷ for |x| ≤ 10⁵.
pub fn cos(k: &mut Kernel, x: Val) -> Val {
    turn(k, x, 1)
}

/// sin(x + quarters · π/2)
fn turn(k: &mut Kernel, x: Val, quarters: i64) -> Val {
    let ty = x.ty;
    // x = n π/2 + r, |r| ≤ π/4, with n as in `exp`.
    let (inverse, magic) = (k.float(std::f64::consts::FRAC_2_PI, ty), k.float(ROUNDING, ty));
    let shifted = k.fma(x, inverse, magic);
    let n = k.sub(shifted, magic);
    // π/2 in three parts (Cody & Waite). The first two have 8 bits, so that their products with n < 2¹⁶ and the
    // differences are exact.
    let (high, middle) = (1.570_312_5, 4.844_665_527_343_75e-4);
    let r = [high, middle, std::f64::consts::FRAC_PI_2 - high - middle].into_iter().fold(x, |r, part| {
        let part = k.float(-part, ty);
        k.fma(n, part, r)
    });
    let square = k.mul(r, r);
    let q = polynomial(k, square, &[-0.166_666_523, 8.332_013_23e-3, -1.949_546_34e-4]);
    let cube = k.mul(square, r);
    let sine = k.fma(q, cube, r);
    let cosine = polynomial(k, square, &[1.0, -0.5, 4.166_664_3e-2, -1.388_717_76e-3, 2.441_650_21e-5]);
    // Odd quarters use the other function; the third and the fourth quarter change the sign.
    let bits = k.bits(shifted);
    let (quarters, one, two) = (k.int(quarters, bits.ty), k.int(1, bits.ty), k.int(2, bits.ty));
    let quarter = k.add(bits, quarters);
    let odd = k.and(quarter, one);
    let odd = k.compare(odd, Order::Eq, one);
    let value = k.select(odd, cosine, sine);
    let half = k.and(quarter, two);
    let place = k.int(30, bits.ty);
    let sign = k.shift_left(half, place);
    let value = k.bits(value);
    let value = k.xor(value, sign);
    k.from_bits(value)
}

/// tanh x to 1.5 units in the last place, also near 0.
pub fn tanh(k: &mut Kernel, x: Val) -> Val {
    let ty = x.ty;
    let a = magnitude(k, x);
    let square = k.mul(x, x);
    let q = polynomial(
        k,
        square,
        &[-0.333_333_310, 0.133_332_122, -0.053_947_458, 0.021_704_159, -0.008_185_271, 0.002_149_675],
    );
    let cube = k.mul(square, x);
    let near = k.fma(q, cube, x);
    // 1 − 2 / (e²ˣ + 1)
    let twice = k.add(a, a);
    let e = exp(k, twice);
    let (one, two) = (k.float(1.0, ty), k.float(2.0, ty));
    let e = k.add(e, one);
    let rest = k.div(two, e);
    let far = k.sub(one, rest);
    let far = with_sign(k, far, x);
    let limit = k.float(0.625, ty);
    let is_near = k.compare(a, Order::Lt, limit);
    k.select(is_near, near, far)
}

/// 1 / (1 + e⁻ˣ) to 2.5 units in the last place.
pub fn sigmoid(k: &mut Kernel, x: Val) -> Val {
    let (zero, one) = (k.float(0.0, x.ty), k.float(1.0, x.ty));
    let minus = k.sub(zero, x);
    let e = exp(k, minus);
    let e = k.add(e, one);
    k.div(one, e)
}

/// 2ˣ for |x| ≤ 126, to a relative error of 1.1·10⁻⁷.
fn power_of_two(k: &mut Kernel, x: Val) -> Val {
    let ty = x.ty;
    // x = n + r, |r| ≤ ½, with n as in `exp`.
    let magic = k.float(ROUNDING, ty);
    let shifted = k.add(x, magic);
    let n = k.sub(shifted, magic);
    let r = k.sub(x, n);
    let power =
        polynomial(k, r, &[1.0, 0.693_146_978, 0.240_222_421, 5.550_733_74e-2, 9.671_512_64e-3, 1.326_472_71e-3]);
    times_power_of_two(k, power, shifted)
}

/// x clamped to −`limit` ≤ x ≤ `limit`; NaN stays NaN.
fn bounded(k: &mut Kernel, x: Val, limit: f64) -> Val {
    let (least, limit) = (k.float(-limit, x.ty), k.float(limit, x.ty));
    let x = k.max(least, x);
    k.min(limit, x)
}

/// The normal distribution's Φ(x) to 1.7·10⁻⁷, and e^(−x²/2).
fn normal(k: &mut Kernel, x: Val) -> (Val, Val) {
    // Beyond 13 the power would leave the normal numbers.
    let a = magnitude(k, x);
    let limit = k.float(13.0, x.ty);
    let a = k.min(limit, a);
    let square = k.mul(a, a);
    let weight = k.float(-0.5 * std::f64::consts::LOG2_E, x.ty);
    let exponent = k.mul(weight, square);
    let bell = power_of_two(k, exponent);
    // Mills' ratio, (1 − Φ(a)) / e^(−a²/2), is smooth where its factors are steep.
    let ratio = polynomial(
        k,
        a,
        &[
            0.5,
            -0.398_938_354,
            0.249_931_023,
            -0.132_562_599,
            6.124_438_45e-2,
            -2.441_013_52e-2,
            8.002_670_74e-3,
            -2.000_308_4e-3,
            3.459_868_84e-4,
            -3.604_039_89e-5,
            1.678_249_37e-6,
        ],
    );
    let tail = k.mul(bell, ratio);
    let (zero, one) = (k.float(0.0, x.ty), k.float(1.0, x.ty));
    let rest = k.sub(one, tail);
    let below = k.compare(x, Order::Lt, zero);
    (k.select(below, tail, rest), bell)
}

/// x Φ(x), to 1.7·10⁻⁷ of x.
pub fn gelu(k: &mut Kernel, x: Val) -> Val {
    let (phi, _) = normal(k, x);
    k.mul(x, phi)
}

/// Φ(x) + x φ(x) to 2·10⁻⁷, where φ is the normal density.
pub fn gelu_grad(k: &mut Kernel, x: Val) -> Val {
    let (phi, bell) = normal(k, x);
    let x = bounded(k, x, 13.0);
    let factor = k.float(1.0 / (2.0 * std::f64::consts::PI).sqrt(), x.ty);
    let density = k.mul(bell, factor);
    k.fma(x, density, phi)
}

/// The common part of gelu's approximation, for u = √(2/π) (x + 0.044715 x³) and tanh u = 2σ(2u) − 1: e^(−2u), and 2x
/// du/dx, which the derivative uses.
fn gelu_tanh_core(k: &mut Kernel, x: Val) -> (Val, Val) {
    let twice_root = 2.0 * (2.0 / std::f64::consts::PI).sqrt();
    let (linear, cubic) = (twice_root, twice_root * 0.044_715);
    // Beyond 10 the power would leave the normal numbers.
    let x = bounded(k, x, 10.0);
    let square = k.mul(x, x);
    let mut line = |constant: f64, slope: f64| {
        let (constant, slope) = (k.float(constant, x.ty), k.float(slope, x.ty));
        k.fma(slope, square, constant)
    };
    let log2e = std::f64::consts::LOG2_E;
    let (exponent, slope) = (line(-linear * log2e, -cubic * log2e), line(linear, 3.0 * cubic));
    let [exponent, slope] = [exponent, slope].map(|y| k.mul(x, y));
    (power_of_two(k, exponent), slope)
}

/// x σ(2u) to 1.5·10⁻⁷ of x, with u as above.
pub fn gelu_tanh(k: &mut Kernel, x: Val) -> Val {
    let (e, _) = gelu_tanh_core(k, x);
    let one = k.float(1.0, x.ty);
    let e = k.add(e, one);
    k.div(x, e)
}

/// σ + x σ (1 − σ) 2 du/dx to 2.5·10⁻⁷, with σ = σ(2u).
pub fn gelu_tanh_grad(k: &mut Kernel, x: Val) -> Val {
    let (e, slope) = gelu_tanh_core(k, x);
    let one = k.float(1.0, x.ty);
    let whole = k.add(e, one);
    let sigma = k.div(one, whole);
    // 1 − σ = e^(−2u) σ avoids the cancellation.
    let rest = k.mul(e, sigma);
    let slope = k.mul(slope, rest);
    k.fma(slope, sigma, sigma)
}

#[cfg(test)]
mod tests;
