//! Instructions that compute one register from up to three: each becomes a function on the 32 lanes of a warp.
//!
//! The functions compute all lanes; the caller keeps the results of the active ones.

use std::array::from_fn;

use crate::number::{self, Rounding};
use crate::opcode::{Decoded, Opcode, unknown, wrong};
use crate::report::Kind;
use crate::types::{Float, Type};

/// The value of a register in each lane; the bits above its width are zero.
pub type Lanes = [u64; 32];

pub type Map = Box<dyn Fn(&Lanes, &Lanes, &Lanes) -> Lanes + Send + Sync>;

/// What an instruction computes, and the types of its operands.
pub struct Arithmetic {
    pub kind: Kind,
    pub map: Map,
    pub result: Type,
    pub operands: Vec<Type>,
    /// Registers may be wider than the types.
    pub loose: bool,
}

fn map1(f: impl Fn(u64) -> u64 + Send + Sync + 'static) -> Map {
    Box::new(move |a, _, _| from_fn(|l| f(a[l])))
}

fn map2(f: impl Fn(u64, u64) -> u64 + Send + Sync + 'static) -> Map {
    Box::new(move |a, b, _| from_fn(|l| f(a[l], b[l])))
}

fn map3(f: impl Fn(u64, u64, u64) -> u64 + Send + Sync + 'static) -> Map {
    Box::new(move |a, b, c| from_fn(|l| f(a[l], b[l], c[l])))
}

pub fn mask(bits: u32) -> u64 {
    if bits >= 64 { u64::MAX } else { (1 << bits) - 1 }
}

/// The signed number that the lowest `bits` bits represent.
fn signed(x: u64, bits: u32) -> i64 {
    (x << (64 - bits)) as i64 >> (64 - bits)
}

fn integer(x: u64, ty: Type) -> i128 {
    if ty.signed() { signed(x, ty.bits()).into() } else { (x & mask(ty.bits())).into() }
}

pub fn sign_extend(x: u64, from: u32, to: u32) -> u64 {
    signed(x, from) as u64 & mask(to)
}

/// `None` if the instruction is not of this kind.
pub fn decode(op: &mut Opcode) -> Option<Decoded<Arithmetic>> {
    Some(match op.name {
        "add" | "sub" | "mul" | "mad" | "fma" | "div" | "rem" | "min" | "max" | "neg" | "abs" => arithmetic(op),
        "and" | "or" | "xor" | "not" | "shl" | "shr" | "shf" => logic(op),
        "bfe" | "bfi" | "prmt" | "popc" | "clz" | "brev" | "bfind" => bits(op),
        "sqrt" | "rcp" | "copysign" | "testp" => float_functions(op),
        "selp" => select(op),
        "set" => set(op),
        "cvt" => convert(op),
        _ => return None,
    })
}

fn arithmetic(op: &mut Opcode) -> Decoded<Arithmetic> {
    let width = op.one_of(&[("lo", Width::Low), ("hi", Width::High), ("wide", Width::Wide)]);
    let rounding = op.rounding();
    let flush = op.take("ftz");
    let saturate = op.take("sat");
    let relu = op.take("relu");
    let keep_nan = op.take("NaN");
    let ty = op.ty()?;
    match ty {
        Type::Float(float) | Type::Pair(float) => {
            let modes = Modes { float, rounding: rounding.unwrap_or(Rounding::Nearest), flush, saturate, relu };
            if width.is_some() {
                return unknown(format!("`{}` of floats with an integer's width", op.name));
            }
            if keep_nan {
                op.needs(80);
            }
            float_arithmetic(op, ty, modes, keep_nan)
        }
        Type::Bits(_) | Type::Pred => unknown(format!("`{}` of untyped bits", op.name)),
        _ if rounding.is_some() || flush || relu || keep_nan => unknown(format!("`{}` of integers, rounded", op.name)),
        _ => integer_arithmetic(op, ty, width, saturate),
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Width {
    Low,
    High,
    Wide,
}

fn integer_arithmetic(op: &Opcode, ty: Type, width: Option<Width>, saturate: bool) -> Decoded<Arithmetic> {
    let bits = ty.bits();
    let all = mask(bits);
    let wide = if ty.signed() { Type::Signed(bits * 2) } else { Type::Unsigned(bits * 2) };
    // The part of a product that `width` selects.
    let part = move |x: i128, width: Width| match width {
        Width::Low => x as u64 & all,
        Width::High => (x >> bits) as u64 & all,
        Width::Wide => x as u64 & mask(2 * bits),
    };
    let int = move |x: u64| integer(x, ty);
    let mut result = ty;
    let mut operands = vec![ty, ty];
    if saturate && !(matches!(op.name, "add" | "sub") && ty == Type::Signed(32)) {
        return unknown(format!("`{}.sat` of this type", op.name));
    }
    if width.is_some() != matches!(op.name, "mul" | "mad") {
        return wrong(format!("`{}` is with or without `.lo`, `.hi` or `.wide`", op.name));
    }
    if width == Some(Width::Wide) {
        if bits == 64 {
            return wrong("a wide product of 64 bits");
        }
        result = wide;
    }
    let map = match (op.name, width) {
        ("add", _) if saturate => map2(|a, b| u64::from((a as i32).saturating_add(b as i32) as u32)),
        ("sub", _) if saturate => map2(|a, b| u64::from((a as i32).saturating_sub(b as i32) as u32)),
        ("add", _) => map2(move |a, b| a.wrapping_add(b) & all),
        ("sub", _) => map2(move |a, b| a.wrapping_sub(b) & all),
        ("mul", Some(Width::Low)) => map2(move |a, b| a.wrapping_mul(b) & all),
        ("mul", Some(width)) if bits <= 32 => {
            map2(move |a, b| part((int(a) as i64).wrapping_mul(int(b) as i64).into(), width))
        }
        ("mul", Some(width)) => map2(move |a, b| part(int(a).wrapping_mul(int(b)), width)),
        ("mad", Some(Width::Low)) => {
            operands.push(ty);
            map3(move |a, b, c| a.wrapping_mul(b).wrapping_add(c) & all)
        }
        ("mad", Some(Width::High)) => {
            operands.push(ty);
            map3(move |a, b, c| part(int(a).wrapping_mul(int(b)), Width::High).wrapping_add(c) & all)
        }
        ("mad", Some(Width::Wide)) => {
            operands.push(wide);
            map3(move |a, b, c| part(int(a).wrapping_mul(int(b)), Width::Wide).wrapping_add(c) & mask(2 * bits))
        }
        // Division by zero has an undefined result; this is the result of hardware.
        ("div", _) => map2(move |a, b| if b == 0 { all } else { (int(a) / int(b)) as u64 & all }),
        ("rem", _) => map2(move |a, b| if b == 0 { a } else { (int(a) % int(b)) as u64 & all }),
        ("min", _) => map2(move |a, b| if int(a) < int(b) { a } else { b }),
        ("max", _) => map2(move |a, b| if int(a) > int(b) { a } else { b }),
        ("neg", _) | ("abs", _) => {
            if !ty.signed() {
                return wrong(format!("`{}` of an unsigned number", op.name));
            }
            operands.pop();
            if op.name == "neg" {
                map1(move |a| a.wrapping_neg() & all)
            } else {
                map1(move |a| signed(a, bits).unsigned_abs() & all)
            }
        }
        _ => return unknown(format!("`{}` of integers", op.name)),
    };
    Ok(Arithmetic { kind: Kind::Integer, map, result, operands, loose: false })
}

/// Rounding, flushing and saturation of a floating-point operation.
#[derive(Clone, Copy)]
struct Modes {
    float: Float,
    rounding: Rounding,
    flush: bool,
    saturate: bool,
    relu: bool,
}

impl Modes {
    fn operand(self, bits: u64) -> f64 {
        let x = self.float.decode(bits);
        if self.flush { self.float.flush(x) } else { x }
    }

    fn result(self, x: f64) -> u64 {
        let mut x = self.float.round(x, self.rounding);
        if self.flush {
            x = self.float.flush(x);
        }
        if self.saturate {
            // A NaN saturates to zero.
            x = number::min(number::max(x, 0.0), 1.0);
        }
        if self.relu && x < 0.0 {
            x = 0.0;
        }
        self.float.encode(x)
    }

    /// True if this is f32 or f64 arithmetic that rounds to nearest and does nothing else, as native arithmetic does.
    fn plain(self) -> bool {
        matches!(self.float, Float::F32 | Float::F64)
            && self.rounding == Rounding::Nearest
            && !(self.flush || self.saturate || self.relu)
    }

    /// Turns an operation on f64 that is exact (or rounded to odd) into one on the bits of numbers or packed pairs.
    fn lift<const N: usize>(
        self,
        pair: bool,
        f: impl Fn([f64; N]) -> f64 + Send + Sync + 'static,
    ) -> impl Fn([u64; N]) -> u64 + Send + Sync + 'static {
        let one = move |args: [u64; N]| self.result(f(args.map(|bits| self.operand(bits))));
        move |args: [u64; N]| {
            if pair { one(args.map(|bits| bits & 0xFFFF)) | one(args.map(|bits| bits >> 16)) << 16 } else { one(args) }
        }
    }
}

fn out32(x: f32) -> u64 {
    if x.is_nan() { 0x7FFF_FFFF } else { u64::from(x.to_bits()) }
}

fn out64(x: f64) -> u64 {
    Float::F64.encode(x)
}

fn f32s(x: u64) -> f32 {
    f32::from_bits(x as u32)
}

fn float_arithmetic(op: &mut Opcode, ty: Type, modes: Modes, keep_nan: bool) -> Decoded<Arithmetic> {
    let Modes { float, .. } = modes;
    let pair = matches!(ty, Type::Pair(_));
    if float == Float::BF16 {
        // add, sub and mul came with sm_90; earlier targets have only fma.
        op.needs(if matches!(op.name, "add" | "sub" | "mul") { 90 } else { 80 });
    }
    if modes.relu {
        op.needs(80);
    }
    if float == Float::F64 && (modes.rounding != Rounding::Nearest || modes.flush || modes.saturate) {
        return unknown("f64 other than rounded to nearest");
    }
    let two = |f: fn(f64, f64) -> f64| {
        let f = modes.lift(pair, move |[a, b]| f(a, b));
        map2(move |a, b| f([a, b]))
    };
    let (plain, float32) = (modes.plain(), float == Float::F32);
    let map = match op.name {
        "add" if plain && float32 => map2(|a, b| out32(f32s(a) + f32s(b))),
        "sub" if plain && float32 => map2(|a, b| out32(f32s(a) - f32s(b))),
        "mul" if plain && float32 => map2(|a, b| out32(f32s(a) * f32s(b))),
        "fma" if plain && float32 => map3(|a, b, c| out32(f32s(a).mul_add(f32s(b), f32s(c)))),
        "add" if plain => map2(|a, b| out64(f64::from_bits(a) + f64::from_bits(b))),
        "sub" if plain => map2(|a, b| out64(f64::from_bits(a) - f64::from_bits(b))),
        "mul" if plain => map2(|a, b| out64(f64::from_bits(a) * f64::from_bits(b))),
        "fma" if plain => map3(|a, b, c| out64(f64::from_bits(a).mul_add(f64::from_bits(b), f64::from_bits(c)))),
        "add" => two(number::add),
        "sub" => two(|a, b| number::add(a, -b)),
        // The product is exact, since both factors have at most 24 bits.
        "mul" => two(|a, b| a * b),
        "fma" => {
            let f = modes.lift(pair, |[a, b, c]| number::fma(a, b, c));
            map3(move |a, b, c| f([a, b, c]))
        }
        // f64 has enough digits that a second rounding to f32 is harmless (Figueroa 1995).
        "div" => two(|a, b| a / b),
        "min" if keep_nan => two(|a, b| if a.is_nan() || b.is_nan() { f64::NAN } else { number::min(a, b) }),
        "max" if keep_nan => two(|a, b| if a.is_nan() || b.is_nan() { f64::NAN } else { number::max(a, b) }),
        "min" => two(number::min),
        "max" => two(number::max),
        "neg" | "abs" => sign_map(op.name == "neg", modes, pair),
        _ => return unknown(format!("`{}` of floats", op.name)),
    };
    if op.name == "div" && !matches!(float, Float::F32 | Float::F64) {
        return unknown("`div` of this type");
    }
    if matches!(op.name, "min" | "max") && matches!(float, Float::F16 | Float::BF16) {
        op.needs(80);
    }
    let half = matches!(float, Float::F16 | Float::BF16);
    let kind = match op.name {
        "fma" if half => Kind::HalfFma,
        "fma" => Kind::Fma,
        _ if half => Kind::Half,
        _ => Kind::Float,
    };
    let count = match op.name {
        "fma" => 3,
        "neg" | "abs" => 1,
        _ => 2,
    };
    Ok(Arithmetic { kind, map, result: ty, operands: vec![ty; count], loose: false })
}

/// `neg` and `abs` change only the sign bit, also of a NaN.
fn sign_map(neg: bool, modes: Modes, pair: bool) -> Map {
    let bits = modes.float.bits();
    let sign = 1u64 << (bits - 1) | if pair { 1 << 31 } else { 0 };
    if modes.flush && !pair {
        return map1(move |a| {
            let x = modes.operand(a);
            modes.float.encode(if neg { -x } else { x.abs() })
        });
    }
    if neg { map1(move |a| a ^ sign) } else { map1(move |a| a & !sign) }
}

fn logic(op: &mut Opcode) -> Decoded<Arithmetic> {
    let direction = op.one_of(&[("l", true), ("r", false)]);
    let wrap = op.one_of(&[("wrap", true), ("clamp", false)]);
    let ty = op.ty()?;
    let (bits, all) = (ty.bits(), mask(ty.bits()));
    let shift = Type::Unsigned(32);
    let (map, operands) = match (op.name, direction, wrap) {
        ("and", None, None) => (map2(|a, b| a & b), vec![ty, ty]),
        ("or", None, None) => (map2(|a, b| a | b), vec![ty, ty]),
        ("xor", None, None) => (map2(|a, b| a ^ b), vec![ty, ty]),
        ("not", None, None) => (map1(move |a| !a & all), vec![ty]),
        // A shift beyond the width gives the same result as shifting bit by bit.
        ("shl", None, None) => (map2(move |a, n| if n >= bits.into() { 0 } else { a << n & all }), vec![ty, shift]),
        ("shr", None, None) if ty.signed() => {
            (map2(move |a, n| (signed(a, bits) >> n.min(63)) as u64 & all), vec![ty, shift])
        }
        ("shr", None, None) => (map2(move |a, n| if n >= bits.into() { 0 } else { a >> n }), vec![ty, shift]),
        ("shf", Some(left), Some(wrap)) if bits == 32 => {
            let funnel = move |a: u64, b: u64, n: u64| {
                let n = if wrap { n & 31 } else { n.min(32) };
                let both = b << 32 | a;
                if left { ((u128::from(both) << n >> 32) as u64) & all } else { both >> n & all }
            };
            (map3(funnel), vec![ty, ty, shift])
        }
        _ => return unknown(format!("`{}` in this form", op.name)),
    };
    if matches!(ty, Type::Float(_) | Type::Pair(_)) || ty == Type::Pred && matches!(op.name, "shl" | "shr" | "shf") {
        return wrong(format!("`{}` of this type", op.name));
    }
    Ok(Arithmetic { kind: Kind::Integer, map, result: ty, operands, loose: false })
}

fn bits(op: &mut Opcode) -> Decoded<Arithmetic> {
    let amount = op.take("shiftamt");
    let ty = op.ty()?;
    let bits = ty.bits();
    let count = Type::Unsigned(32);
    if bits < 32 || matches!(ty, Type::Float(_) | Type::Pair(_)) || amount && op.name != "bfind" {
        return wrong(format!("`{}` of this type", op.name));
    }
    let (map, result, operands): (Map, _, _) = match op.name {
        "popc" => (map1(|a| a.count_ones().into()), count, vec![ty]),
        "clz" => (map1(move |a| u64::from(a.leading_zeros()) - u64::from(64 - bits)), count, vec![ty]),
        "brev" => (map1(move |a| a.reverse_bits() >> (64 - bits)), ty, vec![ty]),
        "bfind" => {
            let find = move |a: u64| {
                let negative = ty.signed() && signed(a, bits) < 0;
                let a = if negative { !a & mask(bits) } else { a };
                match a.checked_ilog2() {
                    None => mask(32),
                    Some(n) => u64::from(if amount { bits - 1 - n } else { n }),
                }
            };
            (map1(find), count, vec![ty])
        }
        "bfe" => {
            let extract = move |a: u64, start: u64, length: u64| {
                let (start, length) = (start & 0xFF, length & 0xFF);
                let a = integer(a, ty);
                if length == 0 {
                    return 0;
                }
                // Bits above the top are copies of the sign, or zero.
                let field = (a >> start.min(127)) as u64;
                let kept = length.min(u64::from(bits)) as u32;
                if ty.signed() { sign_extend(field, kept, bits) } else { field & mask(kept) }
            };
            (map3(extract), ty, vec![ty, count, count])
        }
        "bfi" => return unknown("`bfi` with registers as position and length"),
        "prmt" => {
            let permute = |a: u64, b: u64, selector: u64| {
                let bytes = (b << 32 | a).to_le_bytes();
                (0..4).fold(0, |out, n| {
                    let select = selector >> (4 * n);
                    let byte = bytes[(select & 7) as usize];
                    let byte = if select & 8 != 0 { ((byte as i8) >> 7) as u8 } else { byte };
                    out | u64::from(byte) << (8 * n)
                })
            };
            (map3(permute), ty, vec![ty, ty, ty])
        }
        _ => return unknown(format!("`{}`", op.name)),
    };
    Ok(Arithmetic { kind: Kind::Integer, map, result, operands, loose: false })
}

/// `bfi d, a, b, position, length`: inserts the lowest `length` bits of `a` into `b` at bit `position`.
pub fn insert_bits(bits: u32, position: u32, length: u32) -> Map {
    let (position, length) = (position & 0xFF, length & 0xFF);
    let field = if position >= bits { 0 } else { mask(length) << position & mask(bits) };
    map2(move |a, b| b & !field | (a.checked_shl(position).unwrap_or(0)) & field)
}

/// Applies any function of three bits to each bit position: `table` holds the result for each of the eight inputs.
pub fn lookup_bits(table: u8) -> Map {
    map3(move |a, b, c| {
        (0..8).filter(|n| table >> n & 1 == 1).fold(0, |out, n| {
            let pick = |x: u64, bit: u32| if n >> bit & 1 == 1 { x } else { !x };
            out | pick(a, 2) & pick(b, 1) & pick(c, 0)
        }) & mask(32)
    })
}

/// The exact forms only; the approximate ones are decoded elsewhere.
fn float_functions(op: &mut Opcode) -> Decoded<Arithmetic> {
    let test = (op.name == "testp").then(|| {
        op.needed_one_of(&[
            ("finite", 0),
            ("infinite", 1),
            ("number", 2),
            ("notanumber", 3),
            ("normal", 4),
            ("subnormal", 5),
        ])
    });
    let rounding = op.rounding();
    let flush = op.take("ftz");
    let ty = op.ty()?;
    let Type::Float(float @ (Float::F32 | Float::F64)) = ty else {
        return wrong(format!("`{}` of this type", op.name));
    };
    let modes = Modes { float, rounding: Rounding::Nearest, flush, saturate: false, relu: false };
    let exact = matches!(op.name, "sqrt" | "rcp");
    if exact && rounding != Some(Rounding::Nearest) {
        return unknown(format!("`{}` rounded other than to nearest", op.name));
    }
    let one = |f: fn(f64) -> f64| {
        let f = modes.lift(false, move |[a]| f(a));
        map1(move |a| f([a]))
    };
    let (map, result, operands) = match op.name {
        // f64 has enough digits that a second rounding to f32 is harmless (Figueroa 1995).
        "sqrt" => (one(f64::sqrt), ty, vec![ty]),
        "rcp" => (one(|a| 1.0 / a), ty, vec![ty]),
        "copysign" => {
            let sign = 1u64 << (ty.bits() - 1);
            (map2(move |from, size| size & !sign | from & sign), ty, vec![ty, ty])
        }
        "testp" => {
            let test = test.expect("made for it")?;
            let check = move |bits: u64| {
                let x = float.decode(bits);
                u64::from(match test {
                    0 => x.is_finite(),
                    1 => x.is_infinite(),
                    2 => !x.is_nan(),
                    3 => x.is_nan(),
                    4 => x.is_finite() && x.abs() >= float.smallest_normal(),
                    _ => x != 0.0 && x.abs() < float.smallest_normal(),
                })
            };
            (map1(check), Type::Pred, vec![ty])
        }
        _ => return unknown(format!("`{}`", op.name)),
    };
    Ok(Arithmetic { kind: Kind::Float, map, result, operands, loose: false })
}

fn select(op: &mut Opcode) -> Decoded<Arithmetic> {
    let ty = op.ty()?;
    let map = map3(|a, b, p| if p != 0 { a } else { b });
    Ok(Arithmetic { kind: Kind::Compare, map, result: ty, operands: vec![ty, ty, Type::Pred], loose: false })
}

#[derive(Clone, Copy, PartialEq)]
enum Order {
    Equal,
    NotEqual,
    Less,
    LessEqual,
    Greater,
    GreaterEqual,
    /// True if both operands are numbers (and for `NotNumbers`, if not both are).
    Numbers,
    NotNumbers,
}

/// Maps two operands to the mask of the lanes in which a comparison holds.
pub type Compare = Box<dyn Fn(&Lanes, &Lanes) -> u32 + Send + Sync>;

/// The mask of the lanes whose predicate is set.
pub fn to_mask(predicate: &Lanes) -> u32 {
    (0..32).fold(0, |mask, lane| mask | u32::from(predicate[lane] != 0) << lane)
}

pub fn from_mask(mask: u32) -> Lanes {
    from_fn(|lane| u64::from(mask >> lane & 1))
}

fn compare(f: impl Fn(u64, u64) -> bool + Send + Sync + 'static) -> Compare {
    Box::new(move |a, b| (0..32).fold(0, |mask, lane| mask | u32::from(f(a[lane], b[lane])) << lane))
}

/// Decodes a comparison; `flush` is `.ftz`, `ty` the type of the operands, `unordered` the result if one is a NaN.
pub fn comparison(op: &mut Opcode, ty: Type, flush: bool, (order, unordered): (Comparison, bool)) -> Decoded<Compare> {
    let order = order.0;
    let float = matches!(ty, Type::Float(_) | Type::Pair(_));
    let of_floats = unordered || matches!(order, Order::Numbers | Order::NotNumbers);
    if of_floats && !float {
        return wrong(format!("`{}` of integers as of floats", op.name));
    }
    if matches!(ty, Type::Bits(_)) && !matches!(order, Order::Equal | Order::NotEqual) {
        return wrong("untyped bits have no order");
    }
    match ty {
        Type::Float(float) | Type::Pair(float) => {
            if float == Float::BF16 {
                op.needs(90);
            }
            Ok(compare(move |a, b| {
                let operand = |bits: u64| {
                    let x = float.decode(bits);
                    if flush { float.flush(x) } else { x }
                };
                let (a, b) = (operand(a), operand(b));
                let nan = a.is_nan() || b.is_nan();
                match order {
                    Order::Numbers => !nan,
                    Order::NotNumbers => nan,
                    _ if nan => unordered,
                    Order::Equal => a == b,
                    Order::NotEqual => a != b,
                    Order::Less => a < b,
                    Order::LessEqual => a <= b,
                    Order::Greater => a > b,
                    Order::GreaterEqual => a >= b,
                }
            }))
        }
        _ => {
            // Unsigned numbers compare as their bits; signed numbers do so after their top bit has been flipped.
            let bits = ty.bits();
            let top = if ty.signed() { 1 << (bits - 1) } else { 0 };
            let key = move |x: u64| (x & mask(bits)) ^ top;
            Ok(match order {
                Order::Equal => compare(move |a, b| key(a) == key(b)),
                Order::NotEqual => compare(move |a, b| key(a) != key(b)),
                Order::Less => compare(move |a, b| key(a) < key(b)),
                Order::LessEqual => compare(move |a, b| key(a) <= key(b)),
                Order::Greater => compare(move |a, b| key(a) > key(b)),
                _ => compare(move |a, b| key(a) >= key(b)),
            })
        }
    }
}

/// The relation that the opcode names.
#[derive(Clone, Copy)]
pub struct Comparison(Order);

/// The comparison of a `set` or `setp`, and its result if one of the operands is a NaN.
pub fn take_comparison(op: &mut Opcode) -> Decoded<(Comparison, bool)> {
    op.needed_one_of(&[
        ("eq", (Comparison(Order::Equal), false)),
        ("ne", (Comparison(Order::NotEqual), false)),
        ("lt", (Comparison(Order::Less), false)),
        ("le", (Comparison(Order::LessEqual), false)),
        ("gt", (Comparison(Order::Greater), false)),
        ("ge", (Comparison(Order::GreaterEqual), false)),
        ("lo", (Comparison(Order::Less), false)),
        ("ls", (Comparison(Order::LessEqual), false)),
        ("hi", (Comparison(Order::Greater), false)),
        ("hs", (Comparison(Order::GreaterEqual), false)),
        ("equ", (Comparison(Order::Equal), true)),
        ("neu", (Comparison(Order::NotEqual), true)),
        ("ltu", (Comparison(Order::Less), true)),
        ("leu", (Comparison(Order::LessEqual), true)),
        ("gtu", (Comparison(Order::Greater), true)),
        ("geu", (Comparison(Order::GreaterEqual), true)),
        ("num", (Comparison(Order::Numbers), false)),
        ("nan", (Comparison(Order::NotNumbers), false)),
    ])
}

fn set(op: &mut Opcode) -> Decoded<Arithmetic> {
    let order = take_comparison(op)?;
    let flush = op.take("ftz");
    let result = op.ty()?;
    let ty = op.ty()?;
    if matches!(ty, Type::Pair(_)) {
        return unknown("`set` of pairs");
    }
    let compare = comparison(op, ty, flush, order)?;
    let yes = match result {
        Type::Float(float) => float.encode(1.0),
        _ => mask(result.bits()),
    };
    let map: Map = Box::new(move |a, b, _| from_mask(compare(a, b)).map(|holds| holds * yes));
    Ok(Arithmetic { kind: Kind::Compare, map, result, operands: vec![ty, ty], loose: false })
}

fn convert(op: &mut Opcode) -> Decoded<Arithmetic> {
    let to_integral = op.one_of(&[
        ("rni", Rounding::Nearest),
        ("rzi", Rounding::Zero),
        ("rmi", Rounding::Down),
        ("rpi", Rounding::Up),
    ]);
    let rounding = op.rounding();
    let flush = op.take("ftz");
    let saturate = op.take("sat");
    let relu = op.take("relu");
    let finite = op.take("satfinite");
    let to = op.ty()?;
    let from = op.ty()?;
    if relu || matches!(to, Type::Pair(_)) || to == Type::Float(Float::BF16) {
        op.needs(80);
    }
    if from == Type::Float(Float::BF16) && to != Type::Float(Float::F32) {
        op.needs(90);
    }
    let flushed = move |float: Float, x: f64| if flush && float == Float::F32 { float.flush(x) } else { x };
    let finish = move |float: Float, x: f64| {
        let mut x = flushed(float, float.round(x, rounding.unwrap_or(Rounding::Nearest)));
        if saturate {
            x = number::min(number::max(x, 0.0), 1.0);
        }
        if relu && x < 0.0 {
            x = 0.0;
        }
        if finite && !x.is_nan() {
            x = x.clamp(-float.largest(), float.largest());
        }
        float.encode(x)
    };
    let map = match (to, from) {
        (Type::Pair(narrow), Type::Float(Float::F32)) => {
            // The first operand becomes the upper half.
            let half = move |bits: u64| finish(narrow, flushed(Float::F32, Float::F32.decode(bits)));
            let map = map2(move |high, low| half(high) << 16 | half(low));
            return Ok(Arithmetic { kind: Kind::Convert, map, result: to, operands: vec![from; 2], loose: false });
        }
        (Type::Pair(_), _)
        | (_, Type::Pair(_))
        | (Type::Pred, _)
        | (_, Type::Pred)
        | (Type::Bits(_), _)
        | (_, Type::Bits(_)) => return unknown("a conversion between these types"),
        (Type::Float(wide), Type::Float(narrow)) => {
            let widens = narrow.bits() < wide.bits();
            if rounding.is_none() && !widens && wide != narrow {
                return wrong("a conversion to fewer bits needs a rounding mode");
            }
            map1(move |bits| {
                let x = flushed(narrow, narrow.decode(bits));
                finish(wide, to_integral.map_or(x, |rounding| rounding.integral(x)))
            })
        }
        (Type::Float(float), _) => map1(move |bits| {
            let x = integer(bits, from);
            finish(float, if float == Float::F64 { x as f64 } else { number::from_integer(x) })
        }),
        (_, Type::Float(float)) => {
            let Some(rounding) = to_integral else {
                return wrong("a conversion to an integer needs a rounding mode such as `.rzi`");
            };
            let (least, most) = range(to);
            let nan = if float == Float::F64 || to.bits() == 64 { 1 << (to.bits() - 1) } else { 0 };
            map1(move |bits| {
                let x = flushed(float, float.decode(bits));
                if x.is_nan() {
                    return nan;
                }
                // A value out of range becomes the nearest integer in range.
                (rounding.integral(x) as i128).clamp(least, most) as u64 & mask(to.bits())
            })
        }
        _ => {
            let (least, most) = range(to);
            map1(move |bits| {
                let x = integer(bits, from);
                (if saturate { x.clamp(least, most) } else { x }) as u64 & mask(to.bits())
            })
        }
    };
    Ok(Arithmetic { kind: Kind::Convert, map, result: to, operands: vec![from], loose: true })
}

fn range(ty: Type) -> (i128, i128) {
    let bits = ty.bits();
    if ty.signed() { (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) } else { (0, (1 << bits) - 1) }
}
