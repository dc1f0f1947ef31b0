//! The numbers: forward and backward of what a decoder, its losses and its optimizer need.
//!
//! Operations work on plain slices. What costs time exists as a naive reference, a portable version and
//! versions for AVX2 and AVX-512 (or AMX), chosen once when [`Kernels`] is made; what only moves or adds up
//! numbers exists once. No models, no candle.

mod adamw;
mod add;
mod attention;
mod bias;
mod cpu;
mod disjoint;
mod dtype;
mod embedding;
#[cfg(all(feature = "emulated-tiles", target_os = "linux", target_arch = "x86_64"))]
mod emulated_tiles;
mod gemm;
mod head;
mod huge;
mod kv;
mod linear;
mod matrix;
mod norm;
mod pool;
mod prefetch;
pub mod probe;
mod quant;
mod rope;
mod sample;
mod simd;
mod softmax;
mod split;
mod swiglu;
#[cfg(test)]
mod testing;

pub use adamw::AdamW;
pub use attention::{Attention, AttnBackward, AttnFamily, AttnScratch, AttnSeq};
pub use cpu::{Level, features};
pub use dtype::{Dtype, KvDtype};
pub use gemm::{Operand, Part, Scratch, Write};
pub use head::{HeadBackward, HeadScratch, ROW_BLOCK};
pub use huge::HugePages;
pub use kv::KvCache;
pub use linear::{GatedBuffers, Input, Linear};
pub use matrix::Matrix;
pub use norm::RmsNormBackward;
pub use pool::ThreadPool;
pub use quant::{QuantFormat, QuantMatrix, QuantOperand, QuantRow, ScaleOutOfRange};
pub use rope::RopeTable;
pub use softmax::{SoftmaxSums, SoftmaxTotal, TokenMask, TokenStats, VOCAB_CHUNK};

/// The chosen kernels and the threads that run them.
pub struct Kernels {
    pub(crate) isa: cpu::Isa,
    level: Level,
    pool: ThreadPool,
}

impl Kernels {
    /// Kernels of `level` on `threads` threads; `None` when this processor cannot run that level.
    pub fn new(level: Level, threads: usize) -> Option<Self> {
        Some(Self { isa: level.isa()?, level, pool: ThreadPool::new(threads) })
    }

    /// The level in use.
    pub fn level(&self) -> Level {
        self.level
    }

    /// The compute threads.
    pub fn pool(&self) -> &ThreadPool {
        &self.pool
    }
}
