//! The product cut into tasks, and its plain definition.

use std::ops::Range;

use super::matrix::Order;
use super::{FINE_GROUP, QuantMatrix, QuantOperand, X_GROUP, avx2, avx512};
use crate::cpu::{Amx, Isa};
use crate::gemm::buffer::WORDS;
use crate::{Kernels, Write, disjoint::Disjoint};

/// Bytes of activations that a task may go over again and again: most of a second-level cache.
const ROW_CHUNK_BYTES: usize = 320 << 10;
/// Most rows of a task.
const MOST_ROWS: usize = 64;
/// Weights below which a task is not worth its hand-over.
const TASK_WEIGHTS: usize = 1 << 16;
/// Tasks for each thread that make up for threads of unequal speed.
const TASKS_PER_THREAD: usize = 8;

/// `out[m, j] = x[rows.start + m] . w[first + j] + bias[j]`.
pub(super) struct Product<'a> {
    pub(super) x: &'a QuantOperand,
    pub(super) rows: Range<usize>,
    pub(super) w: &'a QuantMatrix,
    /// First weight row, a multiple of 16.
    pub(super) first: usize,
    pub(super) outputs: usize,
    /// What the weights' scales are to be multiplied by.
    pub(super) unit: f32,
    pub(super) bias: Option<&'a [f32]>,
    pub(super) write: Write,
}

/// What one task computes: rows of `out`, blocks of 16 outputs.
pub(super) struct Rectangle {
    pub(super) rows: Range<usize>,
    pub(super) blocks: Range<usize>,
}

impl Kernels {
    /// `out[m, j] = sum_k x[m, k] w[rows.start + j, k] + bias[j]`, set or added; see the module.
    ///
    /// `x` is `[M, K]`, `out` `[M, rows.len()]`; a range of `w` gives the bits of the whole.
    ///
    /// # Panics
    /// When shapes do not agree or `rows` does not start at a multiple of 16.
    pub fn quant_matmul(
        &self,
        x: &QuantOperand,
        w: &QuantMatrix,
        rows: Range<usize>,
        bias: Option<&[f32]>,
        write: Write,
        out: &mut [f32],
    ) {
        let all = 0..x.rows();
        let (first, outputs) = (rows.start, rows.len());
        assert!(rows.end <= w.rows(), "rows {first}..{} of {}", rows.end, w.rows());
        if let Some(bias) = bias {
            assert_eq!(bias.len(), outputs, "bias length against {outputs} outputs");
        }
        let unit = w.format().unit();
        Product { x, rows: all, w, first, outputs, unit, bias, write }.run(self, out);
    }

    /// The same for some rows of `x`, set, without a bias.
    pub(crate) fn quant_logits(
        &self,
        (x, x_rows): (&QuantOperand, Range<usize>),
        w: &QuantMatrix,
        rows: Range<usize>,
        out: &mut [f32],
    ) {
        let (first, outputs, unit) = (rows.start, rows.len(), w.format().unit());
        let (bias, write) = (None, Write::Set);
        Product { x, rows: x_rows, w, first, outputs, unit, bias, write }.run(self, out);
    }
}

impl Product<'_> {
    fn run(&self, kernels: &Kernels, out: &mut [f32]) {
        let (rows, blocks) = (self.rows.len(), self.outputs.div_ceil(WORDS));
        assert_eq!(self.x.cols(), self.w.cols(), "columns of the operand against the weights'");
        assert_eq!(self.w.order(), Order::Pairs, "order of the weights for products of integers");
        assert!(self.first.is_multiple_of(WORDS), "range start {} inside a block", self.first);
        assert!(self.rows.end <= self.x.rows(), "rows of the operand");
        assert_eq!(out.len(), rows * self.outputs, "output length against {rows} rows");
        if out.is_empty() {
            return;
        }
        let fit = ROW_CHUNK_BYTES / (2 * self.x.cols().max(1));
        let row_chunk = fit.clamp(4, MOST_ROWS) / 4 * 4;
        let row_chunks = rows.div_ceil(row_chunk);
        let tasks = (kernels.pool.threads() * TASKS_PER_THREAD).div_ceil(row_chunks);
        let smallest = TASK_WEIGHTS.div_ceil(WORDS * self.x.cols().max(1) * rows.min(row_chunk));
        let block_chunk = blocks.div_ceil(tasks).max(smallest);
        let out = Disjoint::new(out);
        kernels.pool.run(row_chunks * blocks.div_ceil(block_chunk), &|task| {
            let (row, block) = (task % row_chunks * row_chunk, task / row_chunks * block_chunk);
            let part = Rectangle {
                rows: row..rows.min(row + row_chunk),
                blocks: block..blocks.min(block + block_chunk),
            };
            match kernels.isa {
                Isa::Reference | Isa::Portable => self.rectangle(&part, &out),
                Isa::Avx2(token) => avx2::rectangle(token, self, &part, &out),
                Isa::Avx512(token) | Isa::Amx(Amx { avx512: token, .. }) => match token.vnni() {
                    Some(vnni) => avx512::rectangle(vnni, self, &part, &out),
                    None => avx2::rectangle(token.avx2(), self, &part, &out),
                },
            }
        });
    }

    /// The definition.
    fn rectangle(&self, part: &Rectangle, out: &Disjoint<'_, f32>) {
        for row in part.rows.clone() {
            for block in part.blocks.clone() {
                let sums: [f32; WORDS] =
                    std::array::from_fn(|j| self.dot(row, self.first + block * WORDS + j));
                self.store(row, block, &sums, out);
            }
        }
    }

    fn dot(&self, row: usize, output: usize) -> f32 {
        if output >= self.w.rows() {
            return 0.0;
        }
        let (format, row) = (self.w.format(), self.rows.start + row);
        let group_len = format.group();
        let mut sum = 0.0f32;
        for group in 0..self.w.cols() / group_len {
            let inputs = group * group_len..(group + 1) * group_len;
            let x_sum: i32 = inputs.clone().map(|k| self.x.integer(row, k)).sum();
            let product: i32 =
                inputs.map(|k| self.x.integer(row, k) * self.w.integer(output, k)).sum();
            let (scale, minimum) = self.w.scale(output, group);
            let (scale, minimum) = (scale * self.unit, minimum * self.unit);
            let x_scale = self.x_scale(row, group, group_len);
            let product = product - i32::from(format.zero()) * x_sum;
            sum = (product as f32).mul_add(scale * x_scale, sum);
            if format.minimum() {
                sum = (x_sum as f32).mul_add(minimum * x_scale, sum);
            }
        }
        sum
    }

    /// The activations' scale of a group of `len` weights.
    #[inline(always)]
    pub(super) fn x_scale(&self, row: usize, group: usize, len: usize) -> f32 {
        let per_row = self.x.cols() / X_GROUP;
        self.x.scales[row * per_row + group * len / X_GROUP]
    }

    /// The sum of the activations' integers of a group of `len` weights.
    #[inline(always)]
    pub(super) fn x_sum(&self, row: usize, group: usize, len: usize) -> f32 {
        let fine = len / FINE_GROUP;
        let at = row * (self.x.cols() / FINE_GROUP) + group * fine;
        self.x.sums[at..at + fine].iter().sum()
    }

    /// Adds bias and earlier values as asked and writes the outputs of a block.
    #[inline(always)]
    pub(super) fn store(&self, row: usize, block: usize, sums: &[f32], out: &Disjoint<'_, f32>) {
        let start = row * self.outputs;
        let (from, to) = (block * WORDS, self.outputs.min((block + 1) * WORDS));
        // SAFETY: no other task has outputs of this row and this block.
        let out = unsafe { out.part(start + from, start + to) };
        match self.bias {
            Some(bias) => {
                for ((out, sum), bias) in out.iter_mut().zip(sums).zip(&bias[from..to]) {
                    self.write.apply(out, sum + bias);
                }
            }
            None => out.iter_mut().zip(sums).for_each(|(out, sum)| self.write.apply(out, *sum)),
        }
    }
}
