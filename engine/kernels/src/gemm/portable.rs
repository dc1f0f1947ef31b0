//! The product in safe Rust: up to four rows by half a block (8 outputs) at a time, vectorised by the
//! compiler with what the baseline processor has. Bit for bit the reference's sums.

use super::buffer::{Line, WORDS};
use super::convert::{high, low};
use super::product::{Product, Rectangle};
use crate::{Dtype, disjoint::Disjoint};

/// Outputs whose sums, for four rows, fit into sixteen registers of four.
const HALF: usize = WORDS / 2;

/// Computes a rectangle of the output; block after block, so that a block stays in the cache.
pub(super) fn rectangle(p: &Product<'_>, part: &Rectangle, out: &Disjoint<'_, f32>) {
    for block in part.blocks.clone() {
        let mut row = part.rows.start;
        while row < part.rows.end {
            let rows = if row + 4 <= part.rows.end { 4 } else { 1 };
            for half in 0..2 {
                match rows {
                    4 => store(p, &sums::<4>(p, row, block, half), (row, block, half), out),
                    _ => store(p, &sums::<1>(p, row, block, half), (row, block, half), out),
                }
            }
            row += rows;
        }
    }
}

/// The sums of `R` rows times half a block, the reduced index ascending.
fn sums<const R: usize>(
    p: &Product<'_>,
    row: usize,
    block: usize,
    half: usize,
) -> [[f32; HALF]; R] {
    let mut sums = [[0.0; HALF]; R];
    let x: [&[Line]; R] = std::array::from_fn(|r| &p.x[(row + r) * p.stride..][..p.stride]);
    let w = &p.w[block * p.block_lines..][..p.depth];
    // One line of the rows, 16 words each, meets 16 lines of the block.
    for (i, lines) in w.chunks(WORDS).enumerate() {
        let x: [&Line; R] = std::array::from_fn(|r| &x[r][i]);
        for (i, line) in lines.iter().enumerate() {
            let words = &line.0[half * HALF..][..HALF];
            let words = words.first_chunk::<HALF>().expect("half a line");
            match p.dtype {
                Dtype::F32 => {
                    add(&mut sums, |r| f32::from_bits(x[r].0[i]), &words.map(f32::from_bits))
                }
                Dtype::Bf16 => {
                    add(&mut sums, |r| low(x[r].0[i]), &words.map(low));
                    add(&mut sums, |r| high(x[r].0[i]), &words.map(high));
                }
            }
        }
    }
    sums
}

/// One step of all chains.
#[inline(always)]
fn add<const R: usize>(sums: &mut [[f32; HALF]; R], x: impl Fn(usize) -> f32, w: &[f32; HALF]) {
    for (r, sums) in sums.iter_mut().enumerate() {
        let x = x(r);
        for (sum, w) in sums.iter_mut().zip(w) {
            *sum += x * w;
        }
    }
}

/// Adds bias and earlier values as asked and writes the sums of rows from `row` on.
fn store<const R: usize>(
    p: &Product<'_>,
    sums: &[[f32; HALF]; R],
    (row, block, half): (usize, usize, usize),
    out: &Disjoint<'_, f32>,
) {
    for (r, sums) in sums.iter().enumerate() {
        let place = p.place(row + r, block, 1);
        // SAFETY: no other task has outputs of this row and block.
        let targets = unsafe { out.part(place.start, place.end) };
        for (j, (target, &sum)) in targets.iter_mut().skip(half * HALF).zip(sums).enumerate() {
            let at = block * WORDS + half * HALF + j;
            let sum = p.bias.map_or(sum, |bias| sum + bias[at]);
            p.write.apply(target, sum);
        }
    }
}
