//! Tensors in memory as tensor files hold them, independent of the file format.

use std::collections::BTreeMap;

use half::{bf16, f16};

/// The numbers of a tensor, row-major.
#[derive(Clone, Debug, PartialEq)]
pub enum Data {
    /// Single precision.
    F32(Vec<f32>),
    /// IEEE half precision.
    F16(Vec<f16>),
    /// bfloat16.
    BF16(Vec<bf16>),
    /// Integers.
    I64(Vec<i64>),
}

/// A floating-point type that tensors can be written in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Float {
    /// Single precision, 24 significant bits.
    F32,
    /// IEEE half precision, 11 significant bits.
    F16,
    /// bfloat16, 8 significant bits.
    BF16,
}

impl Float {
    /// Every type.
    pub const ALL: [Float; 3] = [Float::F32, Float::F16, Float::BF16];

    /// The name on the command line and in messages.
    pub fn name(self) -> &'static str {
        match self {
            Float::F32 => "f32",
            Float::F16 => "f16",
            Float::BF16 => "bf16",
        }
    }

    /// The largest relative error from rounding a number to this type: half a unit in the last place.
    pub fn rounding(self) -> f64 {
        match self {
            Float::F32 => f64::powi(2.0, -24),
            Float::F16 => f64::powi(2.0, -11),
            Float::BF16 => f64::powi(2.0, -8),
        }
    }

    /// The name in PyTorch and in `config.json`.
    pub fn torch(self) -> &'static str {
        match self {
            Float::F32 => "float32",
            Float::F16 => "float16",
            Float::BF16 => "bfloat16",
        }
    }
}

/// A tensor of a [`TensorFile`].
#[derive(Clone, Debug, PartialEq)]
pub struct Stored {
    /// Shape, outermost dimension first.
    pub shape: Vec<u64>,
    /// As many numbers as the shape has elements.
    pub data: Data,
}

impl Stored {
    /// A tensor in single precision.
    pub fn f32(shape: Vec<u64>, data: Vec<f32>) -> Self {
        Stored { shape, data: Data::F32(data) }
    }

    /// Rounds numbers to the nearest of type `dtype`, ties to even.
    ///
    /// # Errors
    ///
    /// The first finite number that would become infinite.
    pub fn rounded(shape: Vec<u64>, data: Vec<f32>, dtype: Float) -> Result<Self, f32> {
        let data = match dtype {
            Float::F32 => Data::F32(data),
            Float::F16 => Data::F16(round_all(&data, f16::from_f32, f16::is_finite)?),
            Float::BF16 => Data::BF16(round_all(&data, bf16::from_f32, bf16::is_finite)?),
        };
        Ok(Stored { shape, data })
    }
}

fn round_all<T>(data: &[f32], round: fn(f32) -> T, finite: fn(T) -> bool) -> Result<Vec<T>, f32>
where
    T: Copy,
{
    let one = |&x: &f32| {
        let narrow = round(x);
        if finite(narrow) || !x.is_finite() { Ok(narrow) } else { Err(x) }
    };
    data.iter().map(one).collect()
}

/// The content of a tensor file: named tensors and metadata.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TensorFile {
    /// Tensors by name.
    pub tensors: BTreeMap<String, Stored>,
    /// Metadata by key (`__metadata__` in safetensors).
    pub notes: BTreeMap<String, String>,
}
