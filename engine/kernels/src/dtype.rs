//! The two number formats weights and KV caches are kept in.
//!
//! Leaves out every quantised format: those are turned into one of these when a model is loaded.

/// Storage and multiply format of weights, activations entering a product, and the KV cache.
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
