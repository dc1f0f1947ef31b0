//! Re-arranging operands: row-major rows into tile blocks, and the transposes of the backward
//! products. All of them move squares of 16 x 16 words; bf16 squares hold pairs of rows or columns.

use std::ops::Range;

use super::buffer::{Line, WORDS};
use super::convert::{high, low, pack_line, pack_row, per_word};
use super::operand::Operand;
use crate::cpu::Isa;
use crate::{Dtype, Kernels, Matrix, prefetch};

/// A square of 16 x 16 words.
pub(crate) type Square = [Line; WORDS];

/// Defines a function that runs `$body`, which is inlined, compiled for what the level may use.
macro_rules! widened {
    ($(#[$doc:meta])* $visible:vis fn $name:ident($($argument:ident: $kind:ty),*) = $body:ident) => {
        $(#[$doc])*
        $visible fn $name(isa: Isa, $($argument: $kind),*) {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
            fn wide(isa: Isa, $($argument: $kind),*) {
                $body(isa, $($argument),*);
            }
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn half_wide(isa: Isa, $($argument: $kind),*) {
                $body(isa, $($argument),*);
            }
            #[cfg(target_arch = "x86_64")]
            if isa.avx512().is_some() {
                // SAFETY: the token proves AVX-512.
                return unsafe { wide(isa, $($argument),*) };
            }
            #[cfg(target_arch = "x86_64")]
            if isa.avx2().is_some() {
                // SAFETY: the token proves AVX2.
                return unsafe { half_wide(isa, $($argument),*) };
            }
            $body(isa, $($argument),*);
        }
    };
}
pub(crate) use widened;

widened! {
    /// Rounds row-major `rows` of `cols` values into the rows of a block from `first` on.
    ///
    /// The other rows of the block and the padding of its columns stay as they are.
    pub(crate) fn pack_block(
        dtype: Dtype, rows: &[f32], cols: usize, first: usize, block: &mut [Line]
    ) = pack_block_body
}

#[inline(always)]
fn pack_block_body(
    isa: Isa,
    dtype: Dtype,
    rows: &[f32],
    cols: usize,
    first: usize,
    block: &mut [Line],
) {
    let Some(count) = rows.len().checked_div(cols) else { return };
    let last = first + count;
    let per_line = WORDS * per_word(dtype);
    for (i, lines) in block.chunks_mut(WORDS).enumerate() {
        let mut square = [Line::ZERO; WORDS];
        for (line, row) in square[first..last].iter_mut().zip(rows.chunks_exact(cols)) {
            let end = cols.min((i + 1) * per_line);
            pack_line(dtype, &row[(i * per_line).min(end)..end], line);
        }
        let square = transpose(isa, &square);
        for (to, from) in lines.iter_mut().zip(&square) {
            if count == WORDS {
                *to = *from;
            } else {
                to.0[first..last].copy_from_slice(&from.0[first..last]);
            }
        }
    }
}

widened! {
    /// Rounds rows of `cols` values into rows of `stride` lines, filled up with zeros.
    pub(crate) fn pack_rows(
        dtype: Dtype, rows: &[f32], cols: usize, stride: usize, to: &mut [Line]
    ) = pack_rows_body
}

#[inline(always)]
fn pack_rows_body(
    _isa: Isa,
    dtype: Dtype,
    rows: &[f32],
    cols: usize,
    stride: usize,
    to: &mut [Line],
) {
    for (values, lines) in rows.chunks_exact(cols).zip(to.chunks_exact_mut(stride)) {
        pack_row(dtype, values, lines);
    }
}

widened! {
    /// Values of a row as f32, as many as there is room for.
    pub(crate) fn unpack_row(dtype: Dtype, lines: &[Line], values: &mut [f32]) = unpack_row_body
}

#[inline(always)]
fn unpack_row_body(_isa: Isa, dtype: Dtype, lines: &[Line], values: &mut [f32]) {
    for (values, line) in values.chunks_mut(WORDS * per_word(dtype)).zip(lines) {
        let mut whole = [0.0; 2 * WORDS];
        match dtype {
            Dtype::F32 => whole[..WORDS].copy_from_slice(&line.0.map(f32::from_bits)),
            Dtype::Bf16 => {
                for (pair, &word) in whole.chunks_exact_mut(2).zip(&line.0) {
                    (pair[0], pair[1]) = (low(word), high(word));
                }
            }
        }
        match values.first_chunk_mut() {
            Some(all) => *all = whole,
            None => values.copy_from_slice(&whole[..values.len()]),
        }
    }
}

/// Makes `out` the transpose of rows `rows` of `w`: `[w.cols, rows.len()]`.
pub(super) fn transpose_weights(
    kernels: &Kernels,
    w: &Matrix,
    rows: Range<usize>,
    out: &mut Matrix,
) {
    let (dtype, count) = (w.dtype(), rows.len());
    out.reshape(dtype, w.cols(), count);
    let block_lines = w.block_lines();
    let source = &w.lines()[rows.start / WORDS * block_lines..];
    each_output_block(kernels, out, |column, to_lines, target| {
        let first = (column * WORDS).min(block_lines);
        let lines = first..block_lines.min(first + WORDS);
        let from = WeightsColumn { source, block_lines, lines, count };
        transpose_weights_column(kernels.isa, dtype, from, to_lines, target);
    });
}

/// The lines of 16 words of inputs, one square of each block, of `count` rows of weights.
struct WeightsColumn<'a> {
    source: &'a [Line],
    block_lines: usize,
    lines: Range<usize>,
    count: usize,
}

widened! {
    fn transpose_weights_column(
        dtype: Dtype, from: WeightsColumn<'_>, to_lines: usize, target: &mut [Line]
    ) = transpose_weights_body
}

#[inline(always)]
fn transpose_weights_body(
    isa: Isa,
    dtype: Dtype,
    from: WeightsColumn<'_>,
    to_lines: usize,
    target: &mut [Line],
) {
    let per_word = per_word(dtype);
    for (b, row) in (0..from.count).step_by(WORDS).enumerate() {
        let lines = &from.source[b * from.block_lines..][from.lines.clone()];
        let mut square = match lines.first_chunk::<WORDS>() {
            Some(square) => transpose(isa, square),
            None => {
                let mut square = [Line::ZERO; WORDS];
                square[..lines.len()].copy_from_slice(lines);
                transpose(isa, &square)
            }
        };
        // Rows of the last block that are past the range are none of its business.
        let valid = (from.count - row).min(WORDS);
        square[valid..].fill(Line::ZERO);
        let written = &square[..valid.next_multiple_of(per_word)];
        interleave(isa, dtype, written, row / per_word, to_lines, target);
    }
}

/// Makes `out` the transpose of `x` as weights: `[x.cols, x.rows]`.
pub(super) fn transpose_rows(kernels: &Kernels, x: &Operand, out: &mut Matrix) {
    let dtype = x.dtype();
    out.reshape(dtype, x.cols(), x.rows());
    each_output_block(kernels, out, |column, to_lines, target| {
        transpose_rows_column(kernels.isa, x, column, to_lines, target);
    });
}

widened! {
    fn transpose_rows_column(
        x: &Operand, column: usize, to_lines: usize, target: &mut [Line]
    ) = transpose_rows_body
}

#[inline(always)]
fn transpose_rows_body(isa: Isa, x: &Operand, column: usize, to_lines: usize, target: &mut [Line]) {
    let per_word = per_word(x.dtype());
    for row in (0..x.rows()).step_by(per_word) {
        let line = |row: usize| match row < x.rows() {
            true => x.lines()[row * x.stride() + column],
            false => Line::ZERO,
        };
        let rows = [line(row), line(row + 1)];
        interleave(isa, x.dtype(), &rows[..per_word], row / per_word, to_lines, target);
    }
}

/// Has `fill` write the blocks of `out` that come from one line of words of a row: one block of f32,
/// two of bf16. `fill` gets the index of that line, the length of a block, and the blocks, and leaves
/// alone the lines after the last column, which become zero.
fn each_output_block(
    kernels: &Kernels,
    out: &mut Matrix,
    fill: impl Fn(usize, usize, &mut [Line]) + Sync,
) {
    let (lines, per_word) = (out.block_lines(), per_word(out.dtype()));
    let (blocks, written) = (out.rows().div_ceil(WORDS), out.cols().div_ceil(per_word));
    let target = out.disjoint();
    kernels.pool.run(blocks.div_ceil(per_word), &|task| {
        let (first, last) = (task * per_word, blocks.min((task + 1) * per_word));
        // SAFETY: the blocks of a task are its own.
        let target = unsafe { target.part(first * lines, last * lines) };
        fill(task, lines, target);
        target.chunks_mut(lines.max(1)).for_each(|block| block[written..].fill(Line::ZERO));
    });
}

widened! {
    /// Makes `out` the transpose of columns `columns` of `y`, which begin at a whole line: `[columns.len(),
    /// y.rows]`.
    pub(super) fn transpose_columns(
        y: &Operand, columns: Range<usize>, out: &mut Operand
    ) = transpose_columns_body
}

/// Goes over squares of a line of columns by as many rows, each of which is a line of rows of `out`, and asks
/// for the next rows' meanwhile.
#[inline(always)]
fn transpose_columns_body(isa: Isa, y: &Operand, columns: Range<usize>, out: &mut Operand) {
    let dtype = y.dtype();
    let size = WORDS * per_word(dtype);
    out.reshape(dtype, columns.len(), y.rows());
    let stride = out.stride();
    let target = out.lines_mut();
    for at in 0..y.rows().div_ceil(size) {
        let line = |row: usize, column: usize| match at * size + row {
            row if row < y.rows() => y.lines()[row * y.stride() + column / size],
            _ => Line::ZERO,
        };
        for column in columns.clone().step_by(size) {
            ask_for_square(y, (at + 1) * size, column / size);
            let mut squares = [[Line::ZERO; WORDS]; 2];
            match dtype {
                Dtype::F32 => squares[0] = std::array::from_fn(|i| line(i, column)),
                Dtype::Bf16 => {
                    let [first, second] = &mut squares;
                    for (pair, (first, second)) in first.iter_mut().zip(second).enumerate() {
                        let rows = [line(2 * pair, column), line(2 * pair + 1, column)];
                        [*first, *second] = interleave_pair(isa, &rows);
                    }
                }
            }
            let first = column - columns.start;
            for (half, square) in squares.iter().take(per_word(dtype)).enumerate() {
                let first = first + half * WORDS;
                let square = transpose(isa, square);
                let rows = (first..columns.len().min(first + WORDS)).zip(&square);
                rows.for_each(|(row, line)| target[row * stride + at] = *line);
            }
        }
    }
    // What pads the rows to an odd number of lines.
    let written = y.rows().div_ceil(size);
    let rows = target.chunks_exact_mut(stride).take(columns.len());
    rows.for_each(|row| row[written..].fill(Line::ZERO));
}

/// Asks for a line of each of 32 rows.
#[inline(always)]
fn ask_for_square(y: &Operand, row: usize, column: usize) {
    for row in row..y.rows().min(row + 2 * WORDS) {
        prefetch::near(&raw const y.lines()[row * y.stride() + column]);
    }
}

/// Writes row-major lines into the blocks of `target` (one of f32, up to two of bf16) from line
/// `at` on: f32 rows as they are, bf16 rows two by two, so that a word holds one column of both.
#[inline(always)]
fn interleave(
    isa: Isa,
    dtype: Dtype,
    rows: &[Line],
    at: usize,
    block_lines: usize,
    target: &mut [Line],
) {
    if dtype == Dtype::F32 {
        target[at..at + rows.len()].copy_from_slice(rows);
        return;
    }
    for (i, rows) in rows.as_chunks().0.iter().enumerate() {
        let words = interleave_pair(isa, rows);
        for (words, block) in words.iter().zip(target.chunks_exact_mut(block_lines)) {
            block[at + i] = *words;
        }
    }
}

/// Two rows of 32 bf16 as words with an element of both: those of the first 16 columns, then the others.
#[inline(always)]
fn interleave_pair(isa: Isa, rows: &[Line; 2]) -> [Line; 2] {
    #[cfg(target_arch = "x86_64")]
    if isa.avx512().is_some() {
        // SAFETY: the token proves AVX-512.
        return unsafe { x86::interleave_pair(rows) };
    }
    let _ = isa;
    let mut words = [Line::ZERO; 2];
    for (half, words) in words.iter_mut().enumerate() {
        let [even, odd] = rows.each_ref().map(|row| &row.0[half * WORDS / 2..][..WORDS / 2]);
        for (to, (even, odd)) in words.0.chunks_exact_mut(2).zip(even.iter().zip(odd)) {
            (to[0], to[1]) = (even & 0xffff | odd << 16, even >> 16 | odd & 0xffff_0000);
        }
    }
    words
}

/// Word `j` of line `i` becomes word `i` of line `j`.
#[inline(always)]
pub(crate) fn transpose(isa: Isa, square: &Square) -> Square {
    #[cfg(target_arch = "x86_64")]
    if isa.avx512().is_some() {
        // SAFETY: the token proves AVX-512.
        return unsafe { x86::transpose(square) };
    }
    #[cfg(target_arch = "x86_64")]
    if isa.avx2().is_some() {
        // SAFETY: the token proves AVX2.
        return unsafe { x86::transpose_quarters(square) };
    }
    let _ = isa;
    std::array::from_fn(|i| Line(std::array::from_fn(|j| square[j].0[i])))
}

#[cfg(target_arch = "x86_64")]
pub(crate) use x86::transpose as transpose_words;

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Line, Square, WORDS};

    /// Interleaves words, then pairs of words, within 128-bit lanes, then the lanes.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    pub(crate) fn transpose(square: &Square) -> Square {
        let mut a = [_mm512_setzero_si512(); WORDS];
        for (a, line) in a.iter_mut().zip(square) {
            // SAFETY: a line is 64 aligned bytes.
            *a = unsafe { _mm512_load_si512(std::ptr::from_ref(line).cast()) };
        }
        let mut b = a;
        for i in (0..WORDS).step_by(2) {
            b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
            b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
        }
        let mut c = b;
        for i in (0..WORDS).step_by(4) {
            for j in 0..2 {
                c[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + 2 + j]);
                c[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + 2 + j]);
            }
        }
        // c[4g + j], lane l: column 4l + j of rows 4g..4g + 4.
        let mut d = c;
        for j in 0..4 {
            let low = _mm512_shuffle_i32x4::<0x88>(c[j], c[4 + j]);
            let high = _mm512_shuffle_i32x4::<0x88>(c[8 + j], c[12 + j]);
            d[j] = _mm512_shuffle_i32x4::<0x88>(low, high);
            d[8 + j] = _mm512_shuffle_i32x4::<0xdd>(low, high);
            let low = _mm512_shuffle_i32x4::<0xdd>(c[j], c[4 + j]);
            let high = _mm512_shuffle_i32x4::<0xdd>(c[8 + j], c[12 + j]);
            d[4 + j] = _mm512_shuffle_i32x4::<0x88>(low, high);
            d[12 + j] = _mm512_shuffle_i32x4::<0xdd>(low, high);
        }
        let mut out = [Line::ZERO; WORDS];
        for (line, d) in out.iter_mut().zip(d) {
            // SAFETY: as above.
            unsafe { _mm512_store_si512(std::ptr::from_mut(line).cast(), d) };
        }
        out
    }

    /// Interleaves halves of words within 128-bit lanes, once quarters of the rows are where that puts the
    /// first half of the columns into one result.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
    pub(super) fn interleave_pair(rows: &[Line; 2]) -> [Line; 2] {
        let order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
        let [even, odd] = rows.each_ref().map(|row| {
            // SAFETY: a line is 64 aligned bytes.
            let row = unsafe { _mm512_load_si512(std::ptr::from_ref(row).cast()) };
            _mm512_permutexvar_epi64(order, row)
        });
        [_mm512_unpacklo_epi16(even, odd), _mm512_unpackhi_epi16(even, odd)].map(|words| {
            // SAFETY: any 512 bits are a line.
            unsafe { std::mem::transmute::<__m512i, Line>(words) }
        })
    }

    /// The four quarters of 8 x 8 words, each transposed and put where the opposite one was.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    pub(super) fn transpose_quarters(square: &Square) -> Square {
        const HALF: usize = WORDS / 2;
        let mut out = [Line::ZERO; WORDS];
        for (row, column) in [(0, 0), (0, HALF), (HALF, 0), (HALF, HALF)] {
            let mut a = [_mm256_setzero_si256(); HALF];
            for (a, line) in a.iter_mut().zip(&square[row..]) {
                // SAFETY: half a line is 32 aligned bytes.
                *a = unsafe { _mm256_load_si256(line.0[column..].as_ptr().cast()) };
            }
            let mut b = a;
            for i in (0..HALF).step_by(2) {
                b[i] = _mm256_unpacklo_epi32(a[i], a[i + 1]);
                b[i + 1] = _mm256_unpackhi_epi32(a[i], a[i + 1]);
            }
            let mut c = b;
            for i in (0..HALF).step_by(4) {
                for j in 0..2 {
                    c[i + 2 * j] = _mm256_unpacklo_epi64(b[i + j], b[i + 2 + j]);
                    c[i + 2 * j + 1] = _mm256_unpackhi_epi64(b[i + j], b[i + 2 + j]);
                }
            }
            // c[4g + j], lane l: column 4l + j of rows 4g..4g + 4.
            for j in 0..4 {
                let low = _mm256_permute2x128_si256::<0x20>(c[j], c[4 + j]);
                let high = _mm256_permute2x128_si256::<0x31>(c[j], c[4 + j]);
                for (line, words) in [(j, low), (4 + j, high)] {
                    let to = &mut out[column + line].0[row..];
                    // SAFETY: as above.
                    unsafe { _mm256_store_si256(to.as_mut_ptr().cast(), words) };
                }
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn squares_are_transposed_at_every_level() {
        let square: Square =
            std::array::from_fn(|i| Line(std::array::from_fn(|j| (i * WORDS + j) as u32)));
        for level in crate::Level::ALL {
            let Some(isa) = level.isa() else { continue };
            let turned = transpose(isa, &square);
            for (i, line) in turned.iter().enumerate() {
                for (j, &word) in line.0.iter().enumerate() {
                    assert_eq!(word as usize, j * WORDS + i, "{level}: line {i}, word {j}");
                }
            }
        }
    }
}
