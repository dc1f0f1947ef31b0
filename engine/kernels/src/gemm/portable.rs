//! The product in safe Rust: two rows by one block of 16 outputs at a time, vectorised by the
//! compiler with what the baseline processor has. Bit for bit the reference's sums.

use super::buffer::{Line, WORDS};
use super::convert::{high, low};
use super::product::{Product, Rectangle};
use crate::{Dtype, disjoint::Disjoint};

/// Computes a rectangle of the output; block after block, so that a block stays in the cache.
pub(super) fn rectangle(p: &Product<'_>, part: &Rectangle, out: &Disjoint<'_, f32>) {
    for block in part.blocks.clone() {
        let mut row = part.rows.start;
        while row < part.rows.end {
            if row + 2 <= part.rows.end {
                store(p, &sums::<2>(p, row, block), row, block, out);
                row += 2;
            } else {
                store(p, &sums::<1>(p, row, block), row, block, out);
                row += 1;
            }
        }
    }
}

/// The sums of `R` rows times one block, the reduced index ascending.
fn sums<const R: usize>(p: &Product<'_>, row: usize, block: usize) -> [[f32; WORDS]; R] {
    let mut sums = [[0.0; WORDS]; R];
    let x: [&[Line]; R] = std::array::from_fn(|r| &p.x[(row + r) * p.stride..][..p.stride]);
    let word = |x: &[Line], i: usize| x[i / WORDS].0[i % WORDS];
    let w = &p.w[block * p.block_lines..][..p.depth];
    match p.dtype {
        Dtype::F32 => {
            for (i, line) in w.iter().enumerate() {
                for (sums, x) in sums.iter_mut().zip(&x) {
                    let x = f32::from_bits(word(x, i));
                    sums.iter_mut().zip(&line.0).for_each(|(s, &w)| *s += x * f32::from_bits(w));
                }
            }
        }
        Dtype::Bf16 => {
            for (i, line) in w.iter().enumerate() {
                for (sums, x) in sums.iter_mut().zip(&x) {
                    let x = word(x, i);
                    let (even, odd) = (low(x), high(x));
                    for (s, &w) in sums.iter_mut().zip(&line.0) {
                        *s += even * low(w);
                        *s += odd * high(w);
                    }
                }
            }
        }
    }
    sums
}

fn store<const R: usize>(
    p: &Product<'_>,
    sums: &[[f32; WORDS]; R],
    row: usize,
    block: usize,
    out: &Disjoint<'_, f32>,
) {
    for (r, sums) in sums.iter().enumerate() {
        let place = p.place(row + r, block, 1);
        // SAFETY: no other task has outputs of this row and block.
        let targets = unsafe { out.part(place.start, place.end) };
        for (j, (target, &sum)) in targets.iter_mut().zip(sums).enumerate() {
            let sum = p.bias.map_or(sum, |bias| sum + bias[block * WORDS + j]);
            p.write.apply(target, sum);
        }
    }
}
