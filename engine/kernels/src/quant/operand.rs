//! Activations as 16-bit integers, with a scale for each 32 of a row.

use super::{FINE_GROUP, X_GROUP};
use crate::gemm::buffer::{Buffer, Line, WORDS};
use crate::gemm::pack::widened;
use crate::simd::magnitude;
use crate::{Kernels, cpu::Isa, disjoint::Disjoint};

/// Largest magnitude of an integer.
const LARGEST: f32 = 32_767.0;
/// Adding it to a number of magnitude below 2^22 leaves the nearest integer (ties to even) in the low bits.
const ROUNDER: f32 = 12_582_912.0;

/// Activations `[rows, cols]`, the left operand of products with quantised weights.
///
/// The memory is reused from one [`Kernels::quant_operand`] to the next and only grows. A group with a
/// value that is not finite has a scale that is not a number, so the fault reaches every output.
pub struct QuantOperand {
    rows: usize,
    cols: usize,
    /// Lines from one row to the next.
    stride: usize,
    /// Two integers a word, the lower half first.
    pub(super) values: Buffer,
    /// `[rows, cols / 32]`.
    pub(super) scales: Vec<f32>,
    /// `[rows, cols / 16]`: sums of the integers, which are exact.
    pub(super) sums: Vec<f32>,
}

impl QuantOperand {
    /// No rows yet.
    pub fn new() -> Self {
        let (values, scales, sums) = (Buffer::zeros(0), Vec::new(), Vec::new());
        Self { rows: 0, cols: 0, stride: 0, values, scales, sums }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Elements of a row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Lines from one row to the next.
    pub(super) fn stride(&self) -> usize {
        self.stride
    }

    /// One integer.
    pub(super) fn integer(&self, row: usize, col: usize) -> i32 {
        let word = self.values[row * self.stride + col / (2 * WORDS)].0[col % (2 * WORDS) / 2];
        i32::from((word >> (col % 2 * 16)) as u16 as i16)
    }

    fn reshape(&mut self, rows: usize, cols: usize) {
        // An odd number of lines, so that the rows of a block do not fall into the same cache set.
        let stride = (cols / (2 * WORDS)) | 1;
        self.values.reserve(rows * stride);
        self.scales.resize(rows * (cols / X_GROUP), 0.0);
        self.sums.resize(rows * (cols / FINE_GROUP), 0.0);
        (self.rows, self.cols, self.stride) = (rows, cols, stride);
    }
}

impl Default for QuantOperand {
    fn default() -> Self {
        Self::new()
    }
}

impl Kernels {
    /// Rounds `x` `[rows, cols]` to integers, as the left operand of products with quantised weights.
    ///
    /// # Panics
    /// When `x` is not whole rows or `cols` not a multiple of 32.
    pub fn quant_operand(&self, x: &[f32], cols: usize, out: &mut QuantOperand) {
        assert!(cols.is_multiple_of(X_GROUP), "{cols} columns, limit is a multiple of {X_GROUP}");
        let rows = crate::split::whole_rows(x.len(), cols);
        out.reshape(rows, cols);
        let (stride, groups) = (out.stride, cols / X_GROUP);
        let lines = Disjoint::new(&mut out.values);
        let scales = Disjoint::new(&mut out.scales);
        let sums = Disjoint::new(&mut out.sums);
        self.split_rows(rows, cols, &|range| {
            for row in range {
                // SAFETY: every row belongs to one task.
                let lines = unsafe { lines.part(row * stride, (row + 1) * stride) };
                // SAFETY: as above.
                let scales = unsafe { scales.part(row * groups, (row + 1) * groups) };
                // SAFETY: as above.
                let sums = unsafe { sums.part(row * groups * 2, (row + 1) * groups * 2) };
                let to = Target { lines, scales, sums };
                quantize_row(self.isa, &x[row * cols..(row + 1) * cols], to);
            }
        });
    }
}

/// Where one row goes.
struct Target<'a> {
    lines: &'a mut [Line],
    scales: &'a mut [f32],
    sums: &'a mut [f32],
}

widened! {
    fn quantize_row(row: &[f32], to: Target<'_>) = quantize_row_body
}

#[inline(always)]
fn quantize_row_body(_isa: Isa, row: &[f32], to: Target<'_>) {
    let groups = row.as_chunks::<X_GROUP>().0.iter();
    let targets = to.lines.iter_mut().zip(to.scales).zip(to.sums.as_chunks_mut::<2>().0);
    for (group, ((line, scale), sums)) in groups.zip(targets) {
        let (largest, faults) = magnitude(group);
        // Below this the inverse overflows; nothing so small changes a sum.
        let small = largest < LARGEST * f32::MIN_POSITIVE;
        let inverse = if small || faults != 0.0 { 0.0 } else { LARGEST / largest };
        *scale = if small { 0.0 } else { largest / LARGEST } + faults;
        let mut integers = [0i32; X_GROUP];
        for (q, x) in integers.iter_mut().zip(group) {
            *q = (x * inverse + ROUNDER).to_bits() as i32 - ROUNDER.to_bits() as i32;
        }
        let valid = faults == 0.0;
        for (word, pair) in line.0.iter_mut().zip(integers.as_chunks::<2>().0) {
            let [even, odd] = if valid { *pair } else { [0, 0] };
            *word = even as u32 & 0xffff | (odd as u32) << 16;
        }
        let (first, second) = integers.split_at(FINE_GROUP);
        let sum = |integers: &[i32]| integers.iter().sum::<i32>() as f32;
        *sums = if valid { [sum(first), sum(second)] } else { [0.0; 2] };
    }
}
