//! Products whose outputs are gates and what these let through: `silu(gate) * up` leaves the kernel, rounded.
//!
//! ```text
//! for each rectangle of rows x blocks of gates, two blocks at a time:
//!     for each group of rows:  multiply its gates and ups; write a line of silu(gate) * up of each row
//! ```
//! The sums of gates and ups go through no memory but the first-level cache. Leaves out the products: see `amx`
//! and `avx512`.

use super::buffer::WORDS;
use super::operand::RoundedRows;
use super::product::Product;
use crate::simd::Simd;
use crate::swiglu::swiglu;

/// A product whose outputs are gates and, as many blocks further on, what they let through.
pub(super) struct Gated<'a> {
    pub(super) product: Product<'a>,
    /// Blocks of gates.
    pub(super) gates: usize,
    /// Where both go, if they are kept, and what is let through.
    pub(super) kept: Option<RoundedRows<'a>>,
    pub(super) out: RoundedRows<'a>,
}

impl Gated<'_> {
    /// Rounds `silu(gate) * up` of two blocks into a line of a row, and gates and ups where they are kept.
    ///
    /// # Safety
    /// No other task writes this line.
    #[inline(always)]
    pub(super) unsafe fn set_line<S: Simd>(
        &self,
        s: S,
        (row, line): (usize, usize),
        gates: [S::V; 2],
        ups: [S::V; 2],
    ) {
        let of = |vectors: [S::V; 2]| {
            let mut values = [0.0; 2 * WORDS];
            let halves = values.as_chunks_mut().0.iter_mut();
            halves.zip(vectors).for_each(|(to, vector)| s.store(to, vector));
            values
        };
        let values = [swiglu(s, gates[0], ups[0]), swiglu(s, gates[1], ups[1])];
        // SAFETY: promised.
        unsafe { self.out.set_line(row, line, &of(values)) };
        if let Some(kept) = &self.kept {
            // SAFETY: promised.
            unsafe { kept.set_line(row, line, &of(gates)) };
            // SAFETY: promised.
            unsafe { kept.set_line(row, self.gates / 2 + line, &of(ups)) };
        }
    }
}
