//! One forward product cut into tasks: rectangles of the output, never parts of a sum.
//!
//! All three products come down to this one, on operands re-arranged where needed. A rectangle is
//! some rows of the left operand times some 16-row blocks of the weights; the rows of one rectangle
//! fit into a core's second-level cache, through which the weights are streamed once per rectangle.

use std::ops::Range;

use super::buffer::{Line, WORDS};
use super::gated::Gated;
use super::{Operand, Write, amx, avx2, avx512, pack, portable};
use crate::cpu::{Amx, Isa};
use crate::disjoint::Disjoint;
use crate::quant::expand;
use crate::{Dtype, Kernels, Matrix, QuantMatrix};

/// Bytes of the left operand that a rectangle may take: half of a common second-level cache.
const ROW_CHUNK_BYTES: usize = 512 << 10;
/// Rows of a chunk are a multiple of this, which the row groups of all kernels divide.
const ROW_CHUNK: usize = 96;
/// Blocks of a rectangle are a multiple of this, the widest kernel's, where few rows meet them.
const BLOCK_CHUNK: usize = 8;
/// Rows from which kernels are at most [`ROWS_BLOCK_CHUNK`] blocks wide.
const MANY_ROWS: usize = 16;
/// Blocks of a rectangle with many rows are a multiple of this.
const ROWS_BLOCK_CHUNK: usize = 2;
/// Multiplications of words below which a task is not worth its hand-over (a few microseconds).
const TASK_PRODUCTS: usize = 1 << 18;
/// Reading a word of the weights from memory takes as long as this many multiplications.
const READ_PRODUCTS: usize = 8;
/// Tasks per thread that make up for threads of unequal speed.
const TASKS_PER_THREAD: usize = 8;
/// With tiles: rows of a rectangle, bytes of weights, and tasks per thread. Multiplying is so fast there
/// that it waits for the third-level cache, from which larger rectangles need less.
const TILED_ROWS: usize = 256;
const TILED_BYTES: usize = 600 << 10;
const TILED_TASKS: usize = 2;
/// Bytes of a left operand that a task transposes for itself, which then is in the second-level cache when it
/// is multiplied; tasks per thread with tiles and without.
const TRANSPOSED_BYTES: usize = 800 << 10;
const TRANSPOSED_TASKS: (usize, usize) = (1, 4);
/// Bytes of weights that are expanded at a time, and blocks below which that is more: rows of many inputs
/// would pass too often.
const EXPANDED_BYTES: usize = 600 << 10;
const EXPANDED_BLOCKS: usize = 16;

/// `out[m, j] = sum over lines of x[m] * w[j]`, in words.
pub(super) struct Product<'a> {
    pub(super) dtype: Dtype,
    /// Rows of the left operand, `stride` lines each, and unspecified ones up to a multiple of 32.
    pub(super) x: &'a [Line],
    pub(super) stride: usize,
    pub(super) rows: usize,
    /// Blocks of 16 weight rows, `block_lines` lines each, from block `from` on.
    pub(super) w: &'a [Line],
    pub(super) from: usize,
    /// Weights that are expanded where they are multiplied; there are no lines of `w` then.
    pub(super) stored: Option<Stored<'a>>,
    pub(super) block_lines: usize,
    /// Words of a row of `x`, lines of a block, that are summed over: the rest is padding.
    pub(super) depth: usize,
    /// Outputs, at most 16 times the blocks.
    pub(super) outputs: usize,
    pub(super) bias: Option<&'a [f32]>,
    pub(super) write: Write,
}

/// Quantised weights, and which of their blocks the first one of a product is.
#[derive(Clone, Copy)]
pub(super) struct Stored<'a> {
    w: &'a QuantMatrix,
    first: usize,
}

#[cfg(target_arch = "x86_64")]
impl Stored<'_> {
    /// The product of a group of rows by two blocks.
    ///
    /// # Safety
    /// The target's rows, as many as the tiles are configured for, of 32 elements may be written.
    pub(super) unsafe fn multiply(
        self,
        token: Amx,
        tiles: &amx::tiles::Tiles,
        x: amx::Rows<'_>,
        blocks: [usize; 2],
        to: &amx::Target,
    ) {
        let blocks = blocks.map(|block| self.first + block);
        // SAFETY: promised.
        unsafe { expand::multiply(token.bf16, tiles, x, (self.w, blocks), to) };
    }
}

/// What one task computes.
pub(super) struct Rectangle {
    pub(super) rows: Range<usize>,
    pub(super) blocks: Range<usize>,
}

/// Outputs cut into rectangles of so many rows and blocks.
struct Cut {
    rows: usize,
    blocks: usize,
    chunks: (usize, usize),
}

impl Cut {
    /// How many rectangles there are.
    fn tasks(&self) -> usize {
        self.rows.div_ceil(self.chunks.0) * self.blocks.div_ceil(self.chunks.1)
    }

    /// One of them; neighbours have the same blocks.
    fn part(&self, task: usize) -> Rectangle {
        let (rows, blocks) = self.chunks;
        let row_chunks = self.rows.div_ceil(rows);
        let (row, block) = (task % row_chunks * rows, task / row_chunks * blocks);
        Rectangle {
            rows: row..self.rows.min(row + rows),
            blocks: block..self.blocks.min(block + blocks),
        }
    }
}

/// The proof of tiles, where products of this format are computed with them.
pub(super) fn tiles(isa: Isa, dtype: Dtype) -> Option<Amx> {
    match isa {
        Isa::Amx(token) if dtype == Dtype::Bf16 => Some(token),
        _ => None,
    }
}

impl<'a> Product<'a> {
    /// `x` times the weight rows `rows`, which start at a whole block.
    pub(super) fn new(x: &'a Operand, w: &'a Matrix, rows: Range<usize>) -> Self {
        assert_eq!((x.dtype(), x.cols()), (w.dtype(), w.cols()), "left operand against weights");
        assert!(rows.start.is_multiple_of(WORDS), "range starts inside a block at {}", rows.start);
        let block_lines = w.block_lines();
        let blocks = rows.start / WORDS..rows.end.div_ceil(WORDS);
        let lines = &w.lines()[blocks.start * block_lines..blocks.end * block_lines];
        Self { w: lines, ..Self::without_weights(x, rows.len(), block_lines) }
    }

    /// `x` times the weight rows `rows`, which start at a whole block and are expanded to the format of `x`:
    /// for tiles only.
    pub(super) fn of_stored(x: &'a Operand, w: &'a QuantMatrix, rows: Range<usize>) -> Self {
        assert_eq!((x.dtype(), x.cols()), (Dtype::Bf16, w.cols()), "left operand against weights");
        assert!(rows.start.is_multiple_of(WORDS), "range starts inside a block at {}", rows.start);
        let stored = Some(Stored { w, first: rows.start / WORDS });
        Self { stored, ..Self::without_weights(x, rows.len(), expand::block_lines(w)) }
    }

    /// All but the weights, of which a block is so many lines; set, without a bias.
    fn without_weights(x: &'a Operand, outputs: usize, block_lines: usize) -> Self {
        Self {
            dtype: x.dtype(),
            x: x.lines(),
            stride: x.stride(),
            rows: x.rows(),
            w: &[],
            from: 0,
            stored: None,
            block_lines,
            depth: x.cols().div_ceil(super::convert::per_word(x.dtype())),
            outputs,
            bias: None,
            write: Write::Set,
        }
    }

    /// The lines of a block of weights.
    pub(super) fn block(&self, block: usize) -> &'a [Line] {
        &self.w[(block - self.from) * self.block_lines..][..self.block_lines]
    }

    /// Calls `each` with the product and `part`; where weights are expanded for several groups of rows, with
    /// some of its blocks at a time, whose weights are there, and with those `ups` blocks further on, if there
    /// are any, behind them.
    pub(super) fn with_weights(
        &self,
        token: Amx,
        part: &Rectangle,
        ups: Option<usize>,
        mut each: impl FnMut(&Product<'_>, &Rectangle, Option<usize>),
    ) {
        let Some(Stored { w, first }) = self.stored.filter(|_| part.rows.len() > amx::GROUP) else {
            return each(self, part, ups);
        };
        let most = match part.rows.len() > amx::FEW_ROWS {
            true => {
                let block_bytes = self.block_lines * size_of::<Line>();
                (EXPANDED_BYTES / block_bytes.max(1) / 2 * 2).max(EXPANDED_BLOCKS)
            }
            false => 2,
        };
        for from in part.blocks.clone().step_by(most) {
            let blocks = from..part.blocks.end.min(from + most);
            let len = blocks.len();
            let count = len * if ups.is_some() { 2 } else { 1 };
            let of = |i: usize| match i.checked_sub(len) {
                None => first + from + i,
                Some(i) => first + from + i + ups.unwrap_or(0),
            };
            expand::with_blocks(token.bf16, w, (0..count).map(of), |lines| {
                let product = Product { w: lines, from, stored: None, ..*self };
                let part = Rectangle { rows: part.rows.clone(), blocks };
                each(&product, &part, ups.map(|_| len));
            });
        }
    }

    /// Computes all outputs.
    pub(super) fn run(self, kernels: &Kernels, out: &mut [f32]) {
        Self::run_all(kernels, [(self, out)]);
    }

    /// Computes all outputs of several products, which the threads take as one operation.
    pub(super) fn run_all<const N: usize>(kernels: &Kernels, products: [(Self, &mut [f32]); N]) {
        let products = products.map(|(product, out)| {
            assert_eq!(out.len(), product.rows * product.outputs, "outputs against the product");
            let blocks = product.outputs.div_ceil(WORDS);
            let cut = Cut { rows: product.rows, blocks, chunks: product.rectangles(kernels) };
            (product, Disjoint::new(out), cut)
        });
        let tasks = products.iter().map(|(_, _, cut)| cut.tasks()).sum();
        kernels.pool.run(tasks, &|mut task| {
            for (product, out, cut) in &products {
                match task.checked_sub(cut.tasks()) {
                    None => return product.rectangle(kernels.isa, &cut.part(task), out),
                    Some(later) => task = later,
                }
            }
        });
    }

    /// Rows and blocks of a rectangle.
    fn rectangles(&self, kernels: &Kernels) -> (usize, usize) {
        let threads = kernels.pool.threads();
        match kernels.isa {
            _ if self.rows == 0 || self.outputs == 0 => (1, 1),
            isa if tiles(isa, self.dtype).is_some() && self.rows > amx::FEW_ROWS => {
                self.tiled_chunks(threads)
            }
            isa => self.chunks(isa, threads),
        }
    }

    fn rectangle(&self, isa: Isa, part: &Rectangle, out: &Disjoint<'_, f32>) {
        match isa {
            Isa::Reference | Isa::Portable => portable::rectangle(self, part, out),
            Isa::Avx2(token) => avx2::rectangle(token, self, part, out),
            Isa::Avx512(token) => avx512::rectangle(token, self, part, out),
            Isa::Amx(token) if self.dtype == Dtype::Bf16 => {
                amx::rectangle(token, self, part, out);
            }
            Isa::Amx(token) => avx512::rectangle(token.avx512, self, part, out),
        }
    }

    /// Rows and blocks of a rectangle.
    fn chunks(&self, isa: Isa, threads: usize) -> (usize, usize) {
        let row_bytes = size_of::<u32>() * self.depth.max(1);
        let fit = (ROW_CHUNK_BYTES / row_bytes).next_multiple_of(ROW_CHUNK);
        let row_chunks = self.rows.div_ceil(fit);
        let row_chunk = self.rows.div_ceil(row_chunks).next_multiple_of(ROW_CHUNK);
        let blocks = self.outputs.div_ceil(WORDS);
        let products = row_chunk.min(self.rows).max(READ_PRODUCTS) * self.depth.max(1) * WORDS;
        let smallest = TASK_PRODUCTS.div_ceil(products);
        let (unit, most) = match isa {
            _ if tiles(isa, self.dtype).is_some() => (ROWS_BLOCK_CHUNK, 1),
            _ if self.rows < MANY_ROWS => (BLOCK_CHUNK, TASKS_PER_THREAD),
            _ => (ROWS_BLOCK_CHUNK, TASKS_PER_THREAD),
        };
        let of_tasks = |per_thread: usize| {
            let tasks = (threads * per_thread).div_ceil(row_chunks);
            blocks.div_ceil(tasks).max(smallest).next_multiple_of(unit)
        };
        // What the busiest thread has to do decides; of equals, the smallest tasks.
        let busiest =
            |chunk: &usize| (row_chunks * blocks.div_ceil(*chunk)).div_ceil(threads) * chunk;
        let chunks = (1..=most).rev().map(of_tasks);
        (row_chunk, chunks.min_by_key(busiest).unwrap_or(unit))
    }

    /// How many blocks of gates there are, as many as of what they let through, where [`Self::run_gated`]
    /// computes this product.
    pub(super) fn gates(&self, isa: Isa) -> Option<usize> {
        let computes = match isa {
            Isa::Amx(_) => true,
            Isa::Avx512(_) => self.rows >= avx512::GATED_ROWS,
            Isa::Reference | Isa::Portable | Isa::Avx2(_) => false,
        };
        let gates = self.outputs / (2 * WORDS);
        let whole = self.outputs == 2 * WORDS * gates && gates.is_multiple_of(2);
        (computes && self.dtype == Dtype::Bf16 && whole).then_some(gates)
    }

    /// Computes `silu(gate) * up` of all rows into `out`, rounded, and gates and ups into `kept`.
    pub(super) fn run_gated(
        self,
        kernels: &Kernels,
        gates: usize,
        kept: Option<&mut Operand>,
        out: &mut Operand,
    ) {
        let (rows, cols) = (self.rows, gates * WORDS);
        // Of a rectangle the gates are half of the weights.
        let (row_chunk, block_chunk) = self.rectangles(kernels);
        let block_chunk = (block_chunk / 2).next_multiple_of(2);
        let cut = Cut { rows: self.rows, blocks: gates, chunks: (row_chunk, block_chunk) };
        let kept = kept.map(|kept| kept.rounded_rows(rows, 2 * cols));
        let gated = Gated { product: self, gates, kept, out: out.rounded_rows(rows, cols) };
        kernels.pool.run(cut.tasks(), &|task| match kernels.isa {
            Isa::Amx(token) => amx::gated_rectangle(token, &gated, &cut.part(task)),
            Isa::Avx512(token) => avx512::gated_rectangle(token, &gated, &cut.part(task)),
            Isa::Reference | Isa::Portable | Isa::Avx2(_) => unreachable!("no such kernel"),
        });
    }

    /// Rows and blocks of a rectangle of many rows with tiles.
    fn tiled_chunks(&self, threads: usize) -> (usize, usize) {
        let row_chunks = self.rows.div_ceil(TILED_ROWS);
        let row_chunk = self.rows.div_ceil(row_chunks).next_multiple_of(amx::GROUP);
        let tasks = (threads * TILED_TASKS).div_ceil(row_chunks);
        let even = self.outputs.div_ceil(WORDS).div_ceil(tasks).next_multiple_of(2);
        (row_chunk, even.clamp(2, self.fitting_blocks()))
    }

    /// Computes all outputs on this thread, so many blocks at a time that their weights stay in the
    /// second-level cache.
    fn in_one_task(&self, isa: Isa, out: &Disjoint<'_, f32>) {
        let blocks = self.outputs.div_ceil(WORDS);
        let chunk = match tiles(isa, self.dtype) {
            Some(_) => self.fitting_blocks(),
            None => blocks,
        };
        for first in (0..blocks).step_by(chunk) {
            let blocks = first..blocks.min(first + chunk);
            self.rectangle(isa, &Rectangle { rows: 0..self.rows, blocks }, out);
        }
    }

    /// Blocks of a rectangle with tiles, at most: what of their weights is multiplied at a time stays in the
    /// second-level cache.
    fn fitting_blocks(&self) -> usize {
        let steps = amx::steps_of_part(self.block_lines / WORDS);
        let fit = TILED_BYTES / (steps * WORDS * size_of::<Line>());
        fit.max(2).next_multiple_of(2)
    }

    /// Where the outputs of `row` in the blocks from `block` on lie, and how many there are.
    pub(super) fn place(&self, row: usize, block: usize, blocks: usize) -> Range<usize> {
        let start = row * self.outputs;
        start + block * WORDS..start + self.outputs.min((block + blocks) * WORDS)
    }
}

/// `out[j, k] = sum over m of y[m, j] w[k, m]`: the product of y's transpose and w.
///
/// A task is some rows of the output. It transposes the columns of y that these are.
pub(super) fn transposed(
    kernels: &Kernels,
    y: &Operand,
    (w, write): (&Matrix, Write),
    out: &mut [f32],
    lanes: &mut Vec<Operand>,
) {
    let (rows, outputs) = (y.cols(), w.rows());
    if rows * outputs == 0 {
        return;
    }
    let threads = kernels.pool.threads();
    let (unit, per_thread) = match tiles(kernels.isa, y.dtype()).is_some() {
        true => (amx::GROUP, TRANSPOSED_TASKS.0),
        false => (ROW_CHUNK, TRANSPOSED_TASKS.1),
    };
    let fit = TRANSPOSED_BYTES / (w.block_lines() * size_of::<u32>()).max(1);
    let least = rows.div_ceil(fit.max(1)).next_multiple_of(threads).max(threads * per_thread);
    let chunk_of = |tasks: usize| rows.div_ceil(tasks).next_multiple_of(unit);
    // What the thread with most of them does: tasks are of whole units.
    let longest = |chunk: usize| rows.div_ceil(chunk).div_ceil(threads) * chunk;
    let chunk =
        (least..2 * least).map(chunk_of).min_by_key(|&chunk| longest(chunk)).unwrap_or(unit);
    let tasks = rows.div_ceil(chunk);
    if lanes.len() < threads {
        lanes.resize_with(threads, || Operand::new(y.dtype()));
    }
    let out = Disjoint::new(out);
    kernels.run_in_lanes(tasks, lanes, &|task, lane| {
        let part = task * chunk..rows.min((task + 1) * chunk);
        pack::transpose_columns(kernels.isa, y, part.clone(), lane);
        // SAFETY: these rows are this task's.
        let out = unsafe { out.part(part.start * outputs, part.end * outputs) };
        let product = Product { write, ..Product::new(lane, w, 0..outputs) };
        product.in_one_task(kernels.isa, &Disjoint::new(out));
    });
}
