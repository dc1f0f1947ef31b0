//! Weights in the tile layout that every product reads.
//!
//! A matrix `[rows = N outputs, cols = K inputs]` is kept in blocks of 16 rows, a block as 64-byte
//! lines of 16 words, word `r` of a line belonging to row `r` of the block:
//!
//! ```text
//! f32   [N/16 blocks][K       lines][16 rows]       line k: the 16 weights of input k
//! bf16  [N/16 blocks][K'/2    lines][16 rows][2]    line i: the 16 pairs of inputs (2i, 2i + 1)
//! ```
//!
//! K' is K rounded up to a multiple of 32; padding rows and columns are zero. A bf16 line is one
//! operand of `vdpbf16ps` and one row of an AMX tile. Leaves out quantised formats.

use crate::cpu::Isa;
use crate::gemm::buffer::{Buffer, Line, WORDS};
use crate::gemm::convert::{element, per_word};
use crate::gemm::pack;
use crate::{Dtype, Kernels, disjoint::Disjoint};

/// Inputs that a bf16 block is padded to: the depth of one AMX tile.
const BF16_DEPTH: usize = 32;

/// Weights `[rows, cols]` of a product `y = x W^T`, in tile layout.
///
/// ```
/// use kernels::{Dtype, Matrix};
/// let mut w = Matrix::zeros(Dtype::Bf16, 3, 2);
/// w.set_row(1, &[0.5, -2.0]);
/// let mut row = [0.0; 2];
/// w.get_row(1, &mut row);
/// assert_eq!(row, [0.5, -2.0]);
/// ```
pub struct Matrix {
    dtype: Dtype,
    rows: usize,
    cols: usize,
    block_lines: usize,
    buffer: Buffer,
}

impl Matrix {
    /// All weights zero.
    pub fn zeros(dtype: Dtype, rows: usize, cols: usize) -> Self {
        let mut matrix = Self { dtype, rows, cols, block_lines: 0, buffer: Buffer::zeros(0) };
        matrix.block_lines = Self::lines_of(dtype, cols);
        matrix.buffer = Buffer::shared_zeros(rows.div_ceil(WORDS) * matrix.block_lines);
        matrix
    }

    /// Number of outputs.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of inputs.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Format of the weights.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Memory held, padding included.
    pub fn bytes(&self) -> usize {
        std::mem::size_of_val::<[Line]>(&self.buffer)
    }

    /// Rounds `values` to nearest even into row `row`.
    ///
    /// # Panics
    /// When there is no such row or `values` is not `cols` long.
    pub fn set_row(&mut self, row: usize, values: &[f32]) {
        self.set_rows(row, values);
        assert!(row < self.rows, "row {row} of a matrix with {} rows", self.rows);
    }

    /// Writes row `row` as f32 into `out`.
    ///
    /// # Panics
    /// When there is no such row or `out` is not `cols` long.
    pub fn get_row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows, "row {row} of a matrix with {} rows", self.rows);
        assert_eq!(out.len(), self.cols, "output length against the matrix's columns");
        let lines = &self.buffer[row / WORDS * self.block_lines..];
        for (col, x) in out.iter_mut().enumerate() {
            *x = element(self.dtype, |word| lines[word].0[row % WORDS], col);
        }
    }

    /// Rounds row-major `values`, a whole number of rows, into the rows from `first_row` on.
    ///
    /// # Panics
    /// When `values` is not a whole number of rows or reaches past the last one.
    pub fn set_rows(&mut self, first_row: usize, values: &[f32]) {
        let Some(count) = values.len().checked_div(self.cols) else { return };
        assert_eq!(values.len(), count * self.cols, "values against rows of {}", self.cols);
        let end = first_row + count;
        assert!(end <= self.rows, "rows {first_row}..{end} of a matrix with {}", self.rows);
        let (dtype, cols) = (self.dtype, self.cols);
        let mut row = first_row;
        while row < end {
            let part = (WORDS - row % WORDS).min(end - row);
            let source = &values[(row - first_row) * cols..][..part * cols];
            let block = self.block_mut(row / WORDS);
            pack::pack_block(Isa::Portable, dtype, source, cols, row % WORDS, block);
            row += part;
        }
    }

    /// One element.
    pub(crate) fn get(&self, row: usize, col: usize) -> f32 {
        let lines = &self.buffer[row / WORDS * self.block_lines..];
        element(self.dtype, |word| lines[word].0[row % WORDS], col)
    }

    /// Lines of one block of 16 rows.
    pub(crate) fn block_lines(&self) -> usize {
        self.block_lines
    }

    /// All blocks.
    pub(crate) fn lines(&self) -> &[Line] {
        &self.buffer
    }

    fn block_mut(&mut self, block: usize) -> &mut [Line] {
        let len = self.block_lines;
        &mut self.buffer[block * len..][..len]
    }

    fn lines_of(dtype: Dtype, cols: usize) -> usize {
        let padded = match dtype {
            Dtype::F32 => cols,
            Dtype::Bf16 => cols.next_multiple_of(BF16_DEPTH),
        };
        padded / per_word(dtype)
    }

    /// Takes another shape; the content is unspecified until every block is written whole.
    pub(crate) fn reshape(&mut self, dtype: Dtype, rows: usize, cols: usize) {
        let block_lines = Self::lines_of(dtype, cols);
        self.buffer.reserve(rows.div_ceil(WORDS) * block_lines);
        (self.dtype, self.rows, self.cols, self.block_lines) = (dtype, rows, cols, block_lines);
    }

    /// The lines of all blocks, to be written by several tasks.
    pub(crate) fn disjoint(&mut self) -> Disjoint<'_, Line> {
        Disjoint::new(&mut self.buffer)
    }
}

impl Kernels {
    /// Rounds row-major `values` `[rows, cols]`, for example f32 master weights, into `w`.
    ///
    /// # Panics
    /// When `values` does not have exactly the elements of `w`.
    pub fn load_matrix(&self, values: &[f32], w: &mut Matrix) {
        let (dtype, rows, cols, block_lines) = (w.dtype, w.rows, w.cols, w.block_lines);
        assert_eq!(values.len(), rows * cols, "values against a matrix of {rows} x {cols}");
        let blocks = rows.div_ceil(WORDS);
        let per_task = (1 << 15) / (cols * WORDS).max(1) + 1;
        let (isa, lines) = (self.isa, w.disjoint());
        self.pool.run(blocks.div_ceil(per_task), &|task| {
            for block in task * per_task..blocks.min((task + 1) * per_task) {
                // SAFETY: every block belongs to one task.
                let target = unsafe { lines.part(block * block_lines, (block + 1) * block_lines) };
                let end = rows.min((block + 1) * WORDS);
                let source = &values[block * WORDS * cols..end * cols];
                pack::pack_block(isa, dtype, source, cols, 0, target);
            }
        });
    }
}
