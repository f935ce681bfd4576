//! GGUF's tensor types and their dequantisation.
//!
//! The block layouts are those of ggml's `ggml-common.h`. Products and sums are rounded to f32 one by one, in the order
//! of ggml's `dequantize_row_*`, so that the results are bit-identical to ggml's.

use half::{bf16, f16};

use crate::source::decode;

/// A tensor type of ggml.
#[derive(Debug)]
pub struct Type {
    /// ggml's number for the type.
    pub id: u32,
    /// ggml's name for the type.
    pub name: &'static str,
    /// Numbers in a block.
    pub numbers: u64,
    /// Bytes of a block.
    pub bytes: u64,
    /// Decodes whole blocks and returns the index of the first number that is not finite; `None` if the type is not
    /// supported.
    pub dequantize: Option<Dequantize>,
}

type Dequantize = fn(&[u8], &mut [f32]) -> Option<usize>;

const fn ty(id: u32, name: &'static str, numbers: u64, bytes: u64, dequantize: Option<Dequantize>) -> Type {
    Type { id, name, numbers, bytes, dequantize }
}

/// Every type of ggml at the time of writing.
pub const TYPES: &[Type] = &[
    ty(0, "F32", 1, 4, Some(|bytes, out| decode(bytes, out, |&b, x: &mut [f32; 1]| x[0] = f32::from_le_bytes(b)))),
    ty(
        1,
        "F16",
        1,
        2,
        Some(|bytes, out| decode(bytes, out, |&b, x: &mut [f32; 1]| x[0] = f16::from_le_bytes(b).into())),
    ),
    ty(2, "Q4_0", 32, 18, Some(|bytes, out| decode(bytes, out, q4_0))),
    ty(3, "Q4_1", 32, 20, Some(|bytes, out| decode(bytes, out, q4_1))),
    ty(6, "Q5_0", 32, 22, Some(|bytes, out| decode(bytes, out, q5_0))),
    ty(7, "Q5_1", 32, 24, Some(|bytes, out| decode(bytes, out, q5_1))),
    ty(8, "Q8_0", 32, 34, Some(|bytes, out| decode(bytes, out, q8_0))),
    ty(9, "Q8_1", 32, 40, None),
    ty(10, "Q2_K", 256, 84, Some(|bytes, out| decode(bytes, out, q2_k))),
    ty(11, "Q3_K", 256, 110, Some(|bytes, out| decode(bytes, out, q3_k))),
    ty(12, "Q4_K", 256, 144, Some(|bytes, out| decode(bytes, out, q4_k))),
    ty(13, "Q5_K", 256, 176, Some(|bytes, out| decode(bytes, out, q5_k))),
    ty(14, "Q6_K", 256, 210, Some(|bytes, out| decode(bytes, out, q6_k))),
    ty(15, "Q8_K", 256, 292, None),
    ty(16, "IQ2_XXS", 256, 66, None),
    ty(17, "IQ2_XS", 256, 74, None),
    ty(18, "IQ3_XXS", 256, 98, None),
    ty(19, "IQ1_S", 256, 50, None),
    ty(20, "IQ4_NL", 32, 18, None),
    ty(21, "IQ3_S", 256, 110, None),
    ty(22, "IQ2_S", 256, 82, None),
    ty(23, "IQ4_XS", 256, 136, None),
    ty(24, "I8", 1, 1, None),
    ty(25, "I16", 1, 2, None),
    ty(26, "I32", 1, 4, None),
    ty(27, "I64", 1, 8, None),
    ty(28, "F64", 1, 8, None),
    ty(29, "IQ1_M", 256, 56, None),
    ty(
        30,
        "BF16",
        1,
        2,
        Some(|bytes, out| decode(bytes, out, |&b, x: &mut [f32; 1]| x[0] = bf16::from_le_bytes(b).into())),
    ),
    ty(34, "TQ1_0", 256, 54, None),
    ty(35, "TQ2_0", 256, 66, None),
    ty(39, "MXFP4", 32, 17, None),
    ty(40, "NVFP4", 64, 36, None),
    ty(41, "Q1_0", 128, 18, None),
];

/// The names of the supported types, for messages.
pub fn readable() -> String {
    TYPES.iter().filter(|t| t.dequantize.is_some()).map(|t| t.name).collect::<Vec<_>>().join(", ")
}

/// The f16 in bytes `at` and `at + 1` of the block.
fn half(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// x = d · (q − 8). d is f16; q is 16 bytes, whose low nibbles are the first 16 numbers.
fn q4_0(block: &[u8; 18], out: &mut [f32; 32]) {
    let d = half(block, 0);
    for (i, &q) in block[2..].iter().enumerate() {
        out[i] = d * (f32::from(q & 15) - 8.0);
        out[i + 16] = d * (f32::from(q >> 4) - 8.0);
    }
}

/// x = d · q + m. d and m are f16; q as in Q4_0.
fn q4_1(block: &[u8; 20], out: &mut [f32; 32]) {
    let (d, m) = (half(block, 0), half(block, 2));
    for (i, &q) in block[4..].iter().enumerate() {
        out[i] = d * f32::from(q & 15) + m;
        out[i + 16] = d * f32::from(q >> 4) + m;
    }
}

/// Quants of 5 bits: 4 bytes with the 32 high bits, then the low nibbles as in Q4_0.
fn five_bits(bytes: &[u8]) -> [f32; 32] {
    let high = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    std::array::from_fn(|i| {
        let low = if i < 16 { bytes[4 + i] & 15 } else { bytes[4 + i - 16] >> 4 };
        f32::from(low | ((high >> i & 1) << 4) as u8)
    })
}

/// x = d · (q − 16). d is f16; q has 5 bits.
fn q5_0(block: &[u8; 22], out: &mut [f32; 32]) {
    let d = half(block, 0);
    *out = five_bits(&block[2..]).map(|q| d * (q - 16.0));
}

/// x = d · q + m. d and m are f16; q has 5 bits.
fn q5_1(block: &[u8; 24], out: &mut [f32; 32]) {
    let (d, m) = (half(block, 0), half(block, 2));
    *out = five_bits(&block[4..]).map(|q| d * q + m);
}

/// x = d · q. d is f16; q is 32 signed bytes.
fn q8_0(block: &[u8; 34], out: &mut [f32; 32]) {
    let d = half(block, 0);
    out.iter_mut().zip(&block[2..]).for_each(|(x, &q)| *x = d * f32::from(q as i8));
}

/// x = (d · s) · q − (e · m) for 16 groups of 16. s and m are the nibbles of a byte, q has 2 bits; d and e are f16 at
/// the end.
fn q2_k(block: &[u8; 84], out: &mut [f32; 256]) {
    let (d, e) = (half(block, 80), half(block, 82));
    for (i, x) in out.iter_mut().enumerate() {
        let scale = block[i / 16];
        let q = two_bits(&block[16..80], i);
        *x = d * f32::from(scale & 15) * f32::from(q) - e * f32::from(scale >> 4);
    }
}

/// Quant `i` of 256 that have 2 bits each: 32 bytes hold 4 rows of 32.
fn two_bits(bytes: &[u8], i: usize) -> u8 {
    bytes[i / 128 * 32 + i % 32] >> (2 * (i / 32 % 4)) & 3
}

/// x = (d · (s − 32)) · q for 16 groups of 16. q has 2 bits, minus 4 where its bit in the first 32 bytes is 0; s has 6
/// bits; d is f16 at the end.
fn q3_k(block: &[u8; 110], out: &mut [f32; 256]) {
    let (mask, quants, scales) = (&block[..32], &block[32..96], &block[96..108]);
    let d = half(block, 108);
    let scale: [f32; 16] = std::array::from_fn(|j| {
        let low = if j < 8 { scales[j] & 15 } else { scales[j - 8] >> 4 };
        let high = scales[8 + j % 4] >> (2 * (j / 4)) & 3;
        d * (f32::from(low | high << 4) - 32.0)
    });
    for (i, x) in out.iter_mut().enumerate() {
        let less = if mask[i % 32] >> (i / 32) & 1 == 1 { 0.0 } else { 4.0 };
        *x = scale[i / 16] * (f32::from(two_bits(quants, i)) - less);
    }
}

/// Eight scales and eight minima of 6 bits each, in 12 bytes. The high bits of the last four are the top bits of the
/// first eight bytes.
fn scales(bytes: &[u8]) -> [(f32, f32); 8] {
    std::array::from_fn(|j| {
        let (scale, min) = match j {
            0..4 => (bytes[j] & 63, bytes[j + 4] & 63),
            _ => (bytes[j + 4] & 15 | bytes[j - 4] >> 6 << 4, bytes[j + 4] >> 4 | bytes[j] >> 6 << 4),
        };
        (f32::from(scale), f32::from(min))
    })
}

/// x = (d · s) · q − (e · m) for 8 groups of 32. d and e are f16, s and m have 6 bits, q has 4 bits.
fn q4_k(block: &[u8; 144], out: &mut [f32; 256]) {
    let (d, e, quants) = (half(block, 0), half(block, 2), &block[16..]);
    for ((group, (scale, min)), out) in scales(&block[4..16]).into_iter().enumerate().zip(out.as_chunks_mut::<32>().0) {
        let (scale, min) = (d * scale, e * min);
        for (i, x) in out.iter_mut().enumerate() {
            let q = quants[group / 2 * 32 + i] >> (4 * (group % 2)) & 15;
            *x = scale * f32::from(q) - min;
        }
    }
}

/// As Q4_K, but q has a fifth bit, in 32 bytes before the low nibbles.
fn q5_k(block: &[u8; 176], out: &mut [f32; 256]) {
    let (d, e, high, low) = (half(block, 0), half(block, 2), &block[16..48], &block[48..]);
    for ((group, (scale, min)), out) in scales(&block[4..16]).into_iter().enumerate().zip(out.as_chunks_mut::<32>().0) {
        let (scale, min) = (d * scale, e * min);
        for (i, x) in out.iter_mut().enumerate() {
            let q = low[group / 2 * 32 + i] >> (4 * (group % 2)) & 15 | (high[i] >> group & 1) << 4;
            *x = scale * f32::from(q) - min;
        }
    }
}

/// x = (d · s) · (q − 32) for 16 groups of 16. q has 4 low and 2 high bits, s is a signed byte, d is f16.
fn q6_k(block: &[u8; 210], out: &mut [f32; 256]) {
    let (low, high, scales) = (&block[..128], &block[128..192], &block[192..208]);
    let d = half(block, 208);
    for (i, x) in out.iter_mut().enumerate() {
        let (part, group) = (i / 128, i / 32 % 4);
        let low = low[part * 64 + group % 2 * 32 + i % 32] >> (4 * (group / 2)) & 15;
        let high = high[part * 32 + i % 32] >> (2 * group) & 3;
        *x = d * f32::from(scales[i / 16] as i8) * (f32::from(low | high << 4) - 32.0);
    }
}
