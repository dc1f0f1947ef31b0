//! The left operand of a product: activation rows rounded to the compute format.

use super::buffer::{Buffer, Line, WORDS};
use super::convert::{element, pack_line, per_word};
use super::pack::{pack_rows, unpack_row};
use crate::cpu::Isa;
use crate::{Dtype, disjoint::Disjoint};

/// Rows are allocated in multiples of this, so that a tile may read past the last one.
const ROW_PADDING: usize = 32;

/// Activations `[rows, cols]` in a compute format, row-major, each row padded with zeros.
///
/// The memory is reused from one [`crate::Kernels::operand`] to the next and only grows.
///
/// ```
/// use kernels::{Dtype, Kernels, Level, Operand};
/// let kernels = Kernels::new(Level::detect(), 1).expect("a detected level");
/// let mut x = Operand::new(Dtype::Bf16);
/// kernels.operand(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 3, &mut x);
/// let mut row = [0.0; 3];
/// x.row_to_f32(1, &mut row);
/// assert_eq!((x.rows(), row), (2, [4.0, 5.0, 6.0]));
/// ```
pub struct Operand {
    dtype: Dtype,
    rows: usize,
    cols: usize,
    stride: usize,
    buffer: Buffer,
}

impl Operand {
    /// No rows yet, of format `dtype`.
    pub fn new(dtype: Dtype) -> Self {
        Self { dtype, rows: 0, cols: 0, stride: 0, buffer: Buffer::zeros(0) }
    }

    /// The compute format.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Elements of a row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Writes row `row` as f32 into `out`.
    ///
    /// # Panics
    /// When there is no such row or `out` is not `cols` long.
    pub fn row_to_f32(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows, "row {row} of an operand with {} rows", self.rows);
        assert_eq!(out.len(), self.cols, "output length against the operand's columns");
        out.iter_mut().enumerate().for_each(|(col, x)| *x = self.get(row, col));
    }

    /// One element.
    pub(crate) fn get(&self, row: usize, col: usize) -> f32 {
        let lines = &self.buffer[row * self.stride..];
        element(self.dtype, |word| lines[word / WORDS].0[word % WORDS], col)
    }

    /// Lines from one row to the next.
    pub(crate) fn stride(&self) -> usize {
        self.stride
    }

    /// All rows, and after them unspecified ones up to a multiple of 32.
    pub(crate) fn lines(&self) -> &[Line] {
        &self.buffer
    }

    /// Takes a shape; the content is unspecified until every row is written to its padded end.
    pub(crate) fn reshape(&mut self, dtype: Dtype, rows: usize, cols: usize) {
        // An odd number of lines, so that the rows of a block do not fall into the same cache set.
        let stride = cols.div_ceil(per_word(dtype) * WORDS) | 1;
        self.buffer.reserve(rows.next_multiple_of(ROW_PADDING) * stride);
        (self.dtype, self.rows, self.cols, self.stride) = (dtype, rows, cols, stride);
    }

    /// [`Self::lines`], to be written.
    pub(super) fn lines_mut(&mut self) -> &mut [Line] {
        &mut self.buffer
    }

    /// Writes row `row` as f32 into `out`, `cols` values.
    pub(crate) fn expand(&self, isa: Isa, row: usize, out: &mut [f32]) {
        unpack_row(isa, self.dtype, &self.buffer[row * self.stride..], &mut out[..self.cols]);
    }

    /// Takes a shape, and its rows to be written by several tasks.
    pub(crate) fn rounded_rows(&mut self, rows: usize, cols: usize) -> RoundedRows<'_> {
        let dtype = self.dtype;
        self.reshape(dtype, rows, cols);
        let stride = self.stride;
        RoundedRows { dtype, cols, stride, lines: self.disjoint() }
    }

    /// The lines of all rows, to be written by several tasks.
    pub(crate) fn disjoint(&mut self) -> Disjoint<'_, Line> {
        Disjoint::new(&mut self.buffer)
    }
}

/// The rows of an operand while several tasks compute them.
pub(crate) struct RoundedRows<'a> {
    dtype: Dtype,
    cols: usize,
    stride: usize,
    lines: Disjoint<'a, Line>,
}

impl RoundedRows<'_> {
    /// Rounds `values` into line `line` of a row.
    ///
    /// # Safety
    /// No other task writes this line.
    #[inline(always)]
    pub(super) unsafe fn set_line(&self, row: usize, line: usize, values: &[f32]) {
        let at = row * self.stride + line;
        // SAFETY: promised.
        pack_line(self.dtype, values, &mut unsafe { self.lines.part(at, at + 1) }[0]);
    }

    /// Rounds `values` into a row.
    ///
    /// # Safety
    /// No other task writes this row.
    pub(crate) unsafe fn set(&self, isa: Isa, row: usize, values: &[f32]) {
        // SAFETY: promised.
        let to = unsafe { self.lines.part(row * self.stride, (row + 1) * self.stride) };
        pack_rows(isa, self.dtype, values, self.cols, self.stride, to);
    }
}
