//! Causal attention with grouped query heads: forward over the paged cache, backward over packed
//! sequences.
//!
//! For a query at position t: s_j = scale * (q . k_j) and p_j = exp(s_j - max s) for j <= t, and
//! out = sum_j p_j v_j / sum_j p_j. q is rounded to the format that is multiplied; sums are f32.
//!
//! **Row invariance.** Each number of a row's result is one chain of operations in the order of the
//! elements (scores) or positions (maximum, sum in 16 lanes by tiles of 16, output) that ends at the
//! row's own position; with AMX tiles a link of the chain is 32 of them, filled up with zeros. Which
//! rows share a tile, how a prompt was cut, where the blocks lie and which thread works change nothing,
//! not even a bit. What the cache holds behind a row's position is computed with where that is cheaper,
//! but reaches no result, not even as NaN times zero.
//!
//! Work item: as many rows (token, query head of a group) of one sequence and kv head as the products
//! take at once; so keys and values are loaded once for all of them. Neighbours with one row each whose
//! first blocks are the same are one item: what they share is multiplied with the rows of all, what each has
//! for itself with its own, which goes on where the shared chain ends. Integers of the cache are expanded
//! to bf16 or f32 once for a thread's items of a sequence and kv head, into a buffer of the thread. Costs
//! 4 d FLOP per (row, position) and reads each key and value once per item. Leaves out sliding windows,
//! soft caps and sinks.

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod backward;
mod forward;
mod lanes;
mod reference;
#[cfg(target_arch = "x86_64")]
mod rounded;
#[cfg(test)]
mod tests;
mod tiles;

pub use backward::{AttnBackward, AttnFamily};

use crate::kv::{KvCache, TILE};
use crate::{Dtype, Kernels, KvDtype, Level};
use tiles::{Grow, MAX_ROWS};

/// The rows of one sequence in a call of [`Kernels::attention`].
#[derive(Clone, Copy, Debug)]
pub struct AttnSeq<'a> {
    /// Its first row of `q` and of the output.
    pub first_row: usize,
    /// How many rows it has; may be 0.
    pub rows: usize,
    /// The position of its first row; the others follow.
    pub start: usize,
    /// The cache blocks that hold its positions from 0 on, in order; there may be more than needed.
    pub blocks: &'a [u32],
}

/// What [`Kernels::attention`] reads besides the cache.
#[derive(Clone, Copy, Debug)]
pub struct Attention<'a> {
    /// The layer of the cache.
    pub layer: usize,
    /// Queries, `[rows, heads * head_dim]`.
    pub q: &'a [f32],
    /// The sequences, in ascending order of their rows, without overlap.
    pub seqs: &'a [AttnSeq<'a>],
    /// Query heads: a multiple of the cache's kv heads; a group shares one.
    pub heads: usize,
    /// Factor of the scores, positive, usually 1 / sqrt(head_dim).
    pub scale: f32,
}

/// Buffers of the attention kernels, kept between calls; they grow to the longest sequence seen.
#[derive(Default)]
pub struct AttnScratch {
    lanes: Vec<Lane>,
    bunches: Vec<forward::Bunch>,
}

/// The buffers of one thread.
#[derive(Default)]
struct Lane {
    /// Where the tiles of the sequence begin in the cache.
    tiles: Vec<usize>,
    /// The same for the next work item.
    next_tiles: Vec<usize>,
    packed: Grow<u32>,
    scores: Grow<f32>,
    mixed: Grow<f32>,
    expanded: forward::Expanded,
    products: tiles::Buffers,
    backward: backward::Buffers,
}

impl AttnScratch {
    /// No memory yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes room for forward passes of `threads` threads over contexts of up to `context_tokens`,
    /// so that such calls allocate nothing.
    pub fn reserve(&mut self, threads: usize, context_tokens: usize) {
        let lanes = self.lanes(threads);
        for lane in lanes {
            lane.tiles.reserve(context_tokens.div_ceil(TILE));
            lane.next_tiles.reserve(context_tokens.div_ceil(TILE));
            lane.scores.slice(MAX_ROWS * tiles::stride(context_tokens));
        }
    }

    fn lanes(&mut self, threads: usize) -> &mut [Lane] {
        if self.lanes.len() < threads {
            self.lanes.resize_with(threads, Lane::default);
        }
        &mut self.lanes[..threads]
    }
}

/// Returns what `run` does with the fastest products that a level has for keys and values of a format and
/// heads of a size.
macro_rules! with_products {
    (($isa:expr, $dtype:expr, $d:expr), |$products:ident| $run:expr) => {{
        #[cfg(target_arch = "x86_64")]
        if let Some($products) = amx::Tiled::new($isa, $dtype, $d) {
            return $run;
        }
        #[cfg(target_arch = "x86_64")]
        if let Some($products) = avx512::Dots::new($isa, $dtype) {
            return $run;
        }
        #[cfg(target_arch = "x86_64")]
        if let Some($products) = avx512::Fast::new($isa, $dtype) {
            return $run;
        }
        let $products = lanes::Lanes($isa, $dtype);
        $run
    }};
}

impl Kernels {
    /// Attention of each row over the positions of its sequence up to its own, all of which must be in
    /// the cache. `out` is `[rows, heads * head_dim]`; rows of no sequence are left as they are.
    ///
    /// # Panics
    /// When a slice has the wrong length, the sequences overlap or are out of order, blocks or the
    /// layer do not exist, or the scale is not positive.
    pub fn attention(
        &self,
        kv: &KvCache,
        task: Attention<'_>,
        out: &mut [f32],
        scratch: &mut AttnScratch,
    ) {
        task.check(kv, out.len());
        if self.level() == Level::Reference {
            return reference::forward(kv, &task, out);
        }
        // Integers of the cache are expanded before they are multiplied: to bf16 where that is faster.
        let dots = self.isa.avx512().is_some_and(|token| token.bf16().is_some());
        let dtype = match kv.dtype() {
            KvDtype::Int8 if dots => Dtype::Bf16,
            dtype => dtype.multiplied(),
        };
        with_products!((self.isa, dtype, kv.head_dim()), |products| {
            forward::run(self, (products, dtype), (kv, task), out, scratch)
        })
    }

    /// Gradients of attention over packed sequences, each from position 0; rows that several share are
    /// there once. `dq`, `dk` and `dv` are set; rows of no sequence are left as they are.
    ///
    /// The keys, values and queries are rounded inside as the forward pass rounds them, and the
    /// probabilities recomputed. In bf16 the gradient of the output is rounded as well. A gradient of
    /// keys and values sums over the rows of its own family in ascending order, so it depends neither
    /// on the rest of the batch nor on the number of threads.
    ///
    /// # Panics
    /// When a slice has the wrong length or the rows overlap or are out of order.
    pub fn attention_backward(&self, task: AttnBackward<'_>, scratch: &mut AttnScratch) {
        task.check();
        if self.level() == Level::Reference {
            return reference::backward(task);
        }
        with_products!((self.isa, task.dtype, task.head_dim), |products| {
            backward::run(self, products, task, scratch)
        })
    }
}

impl Attention<'_> {
    fn check(&self, kv: &KvCache, out_len: usize) {
        check_groups(self.heads, kv.kv_heads());
        let width = self.heads * kv.head_dim();
        let len = self.q.len();
        assert!(len.is_multiple_of(width), "{len} elements of q are no rows of {width}");
        assert!(out_len == len, "{out_len} elements of output, q has {len}");
        assert!(self.scale > 0.0, "scale is {}, must be positive", self.scale);
        assert!(self.layer < kv.layers(), "layer {}, the cache has {}", self.layer, kv.layers());
        let mut end = 0;
        for seq in self.seqs {
            assert!(seq.first_row >= end, "row {} of a sequence, expected {end} on", seq.first_row);
            end = seq.first_row + seq.rows;
            let blocks = (seq.start + seq.rows).div_ceil(kv.block_size());
            let given = seq.blocks.len();
            assert!(seq.rows == 0 || given >= blocks, "{given} blocks, {blocks} are needed");
        }
        assert!(end * width <= len, "sequences end at row {end}, q has {}", len / width);
    }
}

/// Panics unless query heads form whole groups.
fn check_groups(heads: usize, kv_heads: usize) {
    assert!(
        kv_heads > 0 && heads > 0 && heads.is_multiple_of(kv_heads),
        "{heads} heads do not share {kv_heads} kv heads evenly"
    );
}
