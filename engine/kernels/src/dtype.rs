//! The number formats that weights in full and KV caches are kept in.
//!
//! Leaves out the formats of quantised weights: see `quant`.

/// Storage and multiply format of weights and of activations entering a product.
///
/// Sums are always kept in f32, whatever the format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE 754 single precision.
    F32,
    /// bfloat16: the upper half of an f32, rounded to nearest even.
    Bf16,
}

impl Dtype {
    /// Bytes of one element.
    pub const fn size_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }

    /// The name used on the command line and in configuration files.
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        }
    }
}

/// Storage format of a KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KvDtype {
    /// Keys and values rounded to a [`Dtype`].
    Plain(Dtype),
    /// 8-bit integers with one f32 scale for each key and each value of a head: x = scale q, the scale
    /// being the largest magnitude over 127. Attention multiplies in bf16 where that is fast, else in f32.
    Int8,
}

impl KvDtype {
    /// Bytes of one head's key or value, `head_dim` elements.
    pub const fn head_bytes(self, head_dim: usize) -> usize {
        match self {
            Self::Plain(dtype) => head_dim * dtype.size_bytes(),
            Self::Int8 => head_dim + size_of::<f32>(),
        }
    }

    /// The name used on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Plain(dtype) => dtype.name(),
            Self::Int8 => "int8",
        }
    }

    /// What queries are rounded to, and keys and values are expanded to, by the definition.
    pub(crate) const fn multiplied(self) -> Dtype {
        match self {
            Self::Plain(dtype) => dtype,
            Self::Int8 => Dtype::F32,
        }
    }
}

impl From<Dtype> for KvDtype {
    fn from(dtype: Dtype) -> Self {
        Self::Plain(dtype)
    }
}
