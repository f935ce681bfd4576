//! Tensors as files of them hold them, whatever the format.

use std::collections::BTreeMap;

use half::{bf16, f16};

/// A tensor as files hold it.
#[derive(Clone, Debug, PartialEq)]
pub enum Data {
    F32(Vec<f32>),
    F16(Vec<f16>),
    BF16(Vec<bf16>),
    I64(Vec<i64>),
}

/// A floating-point type that tensors are written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Float {
    F32,
    F16,
    BF16,
}

impl Float {
    pub const ALL: [Float; 3] = [Float::F32, Float::F16, Float::BF16];

    /// As the command line and messages write it.
    pub fn name(self) -> &'static str {
        match self {
            Float::F32 => "f32",
            Float::F16 => "f16",
            Float::BF16 => "bf16",
        }
    }

    /// How far a number may be off for having been rounded to this type, relative to itself.
    pub fn rounding(self) -> f64 {
        match self {
            Float::F32 => f64::powi(2.0, -24),
            Float::F16 => f64::powi(2.0, -11),
            Float::BF16 => f64::powi(2.0, -8),
        }
    }

    /// As PyTorch and `config.json` write it.
    pub fn torch(self) -> &'static str {
        match self {
            Float::F32 => "float32",
            Float::F16 => "float16",
            Float::BF16 => "bfloat16",
        }
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct Stored {
    pub shape: Vec<u64>,
    pub data: Data,
}

impl Stored {
    pub fn f32(shape: Vec<u64>, data: Vec<f32>) -> Self {
        Stored { shape, data: Data::F32(data) }
    }

    /// The numbers rounded to the nearest that `dtype` has, ties to even. `Err` holds a finite number that becomes
    /// infinite there.
    pub fn rounded(shape: Vec<u64>, data: Vec<f32>, dtype: Float) -> Result<Self, f32> {
        let data = match dtype {
            Float::F32 => Data::F32(data),
            Float::F16 => Data::F16(narrowed(&data, f16::from_f32, f16::is_finite)?),
            Float::BF16 => Data::BF16(narrowed(&data, bf16::from_f32, bf16::is_finite)?),
        };
        Ok(Stored { shape, data })
    }
}

fn narrowed<T>(data: &[f32], round: fn(f32) -> T, finite: fn(T) -> bool) -> Result<Vec<T>, f32>
where
    T: Copy,
{
    let one = |&x: &f32| {
        let narrow = round(x);
        if finite(narrow) || !x.is_finite() { Ok(narrow) } else { Err(x) }
    };
    data.iter().map(one).collect()
}

/// Named tensors and what is noted beside them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TensorFile {
    pub tensors: BTreeMap<String, Stored>,
    pub notes: BTreeMap<String, String>,
}
