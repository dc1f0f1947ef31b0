//! The product with AVX-512: lanes are 16 outputs, one line of the weights is one register.
//!
//! ```text
//! for each panel of C blocks, for each group of R rows:
//!     ask for the outputs that are added to
//!     sum[r][c] = 0                                    R * C independent chains
//!     for i in 0..depth:                               ascending: the only order there is
//!         weight[c] = line i of block c                64 bytes, read once for R rows
//!         for r: sum[r][c] = dot(sum[r][c], word i of row r in all lanes, weight[c])
//!     out = sum + bias (+ out)
//! ```
//!
//! `dot` is a fused multiply-add (f32), `vdpbf16ps` (bf16), or two fused multiply-adds of widened
//! halves where that instruction is missing. A chain is the same for every R and C, so they are
//! chosen by speed: enough chains to cover the latency, few enough for 32 registers.

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{gated_rectangle, rectangle};

/// Rows from which gates are activated as they leave a product: fewer take panels wider than the two blocks
/// that make a line of outputs.
pub(super) const GATED_ROWS: usize = 6;

/// Never called: no token exists on other processors.
#[cfg(not(target_arch = "x86_64"))]
pub(super) fn gated_rectangle(
    _token: crate::cpu::Avx512,
    _gated: &super::gated::Gated<'_>,
    _part: &super::product::Rectangle,
) {
}

/// Never called: no token exists on other processors.
#[cfg(not(target_arch = "x86_64"))]
pub(super) fn rectangle(
    _token: crate::cpu::Avx512,
    p: &super::product::Product<'_>,
    part: &super::product::Rectangle,
    out: &crate::disjoint::Disjoint<'_, f32>,
) {
    super::portable::rectangle(p, part, out);
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::ops::Range;

    use crate::Dtype;
    use crate::cpu::{Avx512, Isa};
    use crate::disjoint::Disjoint;
    use crate::gemm::Write;
    use crate::gemm::buffer::{Line, WORDS};
    use crate::gemm::gated::Gated;
    use crate::gemm::product::{Product, Rectangle};
    use crate::prefetch;
    use crate::simd::avx512::dot_bf16;
    use crate::simd::{Job, Simd};
    use crate::split::even_parts;

    /// Most rows of a group: 12 x 2 sums, 2 weights and a word of x fit into 32 registers.
    const GROUP_ROWS: usize = 12;
    /// Lines that each stream of weights is asked for ahead of its use (2 KB).
    const AHEAD_LINES: usize = 32;

    /// Steps between two bursts of requests for weights of the next panel.
    const BURST_STEPS: usize = 32;

    /// Outputs of two blocks.
    const GATED_OUTPUTS: usize = 2 * WORDS;

    /// Where a micro-kernel works: its first row and its first block; and which of how many groups of rows
    /// it is.
    #[derive(Clone, Copy)]
    struct Corner {
        row: usize,
        block: usize,
        group: usize,
        groups: usize,
    }

    impl Corner {
        /// Where in the next panel, in lines, this group begins to ask for weights, and how many a burst.
        ///
        /// Each group asks for its share, so that memory has the time of all of them. One group or two leave no
        /// time: their products take no longer than reading the panel.
        fn asks(self, panel_lines: usize, depth: usize) -> (usize, usize) {
            match self.groups {
                ..=2 => (0, 0),
                groups => {
                    let share = panel_lines.div_ceil(groups);
                    (self.group * share, share.div_ceil(depth.div_ceil(BURST_STEPS).max(1)))
                }
            }
        }
    }

    type Kernel = unsafe fn(&Product<'_>, Corner, &Disjoint<'_, f32>);

    /// Computes a rectangle of the output.
    pub(in crate::gemm) fn rectangle(
        token: Avx512,
        p: &Product<'_>,
        part: &Rectangle,
        out: &Disjoint<'_, f32>,
    ) {
        let kernel = kernel(token, p.dtype);
        let rows = part.rows.len();
        let widest = widest(rows.div_ceil(rows.div_ceil(GROUP_ROWS)));
        let mut block = part.blocks.start;
        while block < part.blocks.end {
            let blocks = widest.min(1 << (part.blocks.end - block).ilog2());
            for (rows, (group, groups)) in groups(&part.rows) {
                let at = Corner { row: rows.start, block, group, groups };
                // SAFETY: the token (and its bf16 part) proves the features of the chosen kernels.
                unsafe { kernel(rows.len(), blocks)(p, at, out) };
            }
            block += blocks;
        }
    }

    /// Computes a rectangle of `gated`, of which `part` counts blocks of gates.
    pub(in crate::gemm) fn gated_rectangle(token: Avx512, gated: &Gated<'_>, part: &Rectangle) {
        Isa::Avx512(token).vectorize(GatedRectangle { token, gated, part });
    }

    struct GatedRectangle<'a> {
        token: Avx512,
        gated: &'a Gated<'a>,
        part: &'a Rectangle,
    }

    impl Job for GatedRectangle<'_> {
        type Output = ();

        #[inline(always)]
        fn run<S: Simd>(self, s: S) {
            let Self { token, gated, part } = self;
            let p = &gated.product;
            let kernel = kernel(token, p.dtype);
            let mut sums = [[0.0; GATED_OUTPUTS * GROUP_ROWS]; 2];
            for block in part.blocks.clone().step_by(2) {
                for (rows, (group, groups)) in groups(&part.rows) {
                    let at = Corner { row: 0, block: 0, group, groups };
                    for (half, sums) in [0, gated.gates].into_iter().zip(&mut sums) {
                        // Its outputs are those of two blocks alone.
                        let product = Product {
                            x: &p.x[rows.start * p.stride..],
                            w: &p.w[(half + block) * p.block_lines..],
                            outputs: GATED_OUTPUTS,
                            ..*p
                        };
                        // SAFETY: the token proves the features, as for `rectangle`.
                        unsafe { kernel(rows.len(), 2)(&product, at, &Disjoint::new(sums)) };
                    }
                    for (r, row) in rows.enumerate() {
                        let [gates, ups] = sums.each_ref().map(|sums| {
                            let of_row = sums[r * GATED_OUTPUTS..].as_chunks().0;
                            [s.load(&of_row[0]), s.load(&of_row[1])]
                        });
                        // SAFETY: the line is this task's.
                        unsafe { gated.set_line(s, (row, block / 2), gates, ups) };
                    }
                }
            }
        }
    }

    /// The micro-kernels of a format.
    fn kernel(token: Avx512, dtype: Dtype) -> fn(usize, usize) -> Kernel {
        match dtype {
            Dtype::F32 => f32_kernel,
            Dtype::Bf16 if token.bf16().is_some() => bf16_kernel,
            Dtype::Bf16 => widened_kernel,
        }
    }

    /// Rows cut into groups of nearly the same size, each with its number and how many there are.
    fn groups(rows: &Range<usize>) -> impl Iterator<Item = (Range<usize>, (usize, usize))> + use<> {
        let (start, groups) = (rows.start, rows.len().div_ceil(GROUP_ROWS));
        even_parts(rows.len(), GROUP_ROWS)
            .enumerate()
            .map(move |(i, rows)| (start + rows.start..start + rows.end, (i, groups)))
    }

    /// Blocks of a panel for groups of at most `rows` rows.
    fn widest(rows: usize) -> usize {
        match rows {
            ..=2 => 8,
            3..=5 => 4,
            _ => 2,
        }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn dot_f32(sum: __m512, x: __m512i, w: __m512i) -> __m512 {
        _mm512_fmadd_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(w), sum)
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn dot_widened(sum: __m512, x: __m512i, w: __m512i) -> __m512 {
        let upper = _mm512_set1_epi32(0xffff_0000_u32 as i32);
        let sum = dot_f32(sum, _mm512_slli_epi32::<16>(x), _mm512_slli_epi32::<16>(w));
        dot_f32(sum, _mm512_and_si512(x, upper), _mm512_and_si512(w, upper))
    }

    /// The weights of one step.
    ///
    /// # Safety
    /// `line` can be read.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn load(line: *const Line) -> __m512i {
        // SAFETY: by the contract.
        unsafe { _mm512_load_si512(line.cast()) }
    }

    /// Asks for a row's outputs of `C` blocks, which will be read and written.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn prefetch_outputs<const C: usize>(
        p: &Product<'_>,
        row: usize,
        block: usize,
        out: &Disjoint<'_, f32>,
    ) {
        let place = p.place(row, block, C);
        // SAFETY: no other task has outputs of this row and these blocks.
        let outputs = unsafe { out.part(place.start, place.end) }.as_ptr();
        for c in 0..C {
            prefetch::near(outputs.wrapping_add(c * WORDS));
        }
    }

    /// Adds bias and earlier values as asked and writes one row's sums, the last block's as far as there
    /// are outputs.
    #[target_feature(enable = "avx512f")]
    fn store_part(p: &Product<'_>, sums: &[[f32; WORDS]], block: usize, to: &mut [f32]) {
        for (c, (sums, to)) in sums.iter().zip(to.chunks_mut(WORDS)).enumerate() {
            let bias = p.bias.map(|bias| &bias[(block + c) * WORDS..]);
            for (i, (to, &sum)) in to.iter_mut().zip(sums).enumerate() {
                p.write.apply(to, bias.map_or(sum, |bias| sum + bias[i]));
            }
        }
    }

    /// Defines a micro-kernel of `R` rows by `C` blocks and the function that picks R and C.
    macro_rules! micro_kernel {
        ($pick:ident, $kernel:ident, $features:literal, $dot:ident) => {
            #[target_feature(enable = $features)]
            fn $kernel<const R: usize, const C: usize>(
                p: &Product<'_>,
                at: Corner,
                out: &Disjoint<'_, f32>,
            ) {
                let (stride, lines) = (p.stride * WORDS, p.block_lines);
                let x = &p.x[at.row * p.stride..][..R * p.stride];
                let w = &p.w[at.block * lines..][..C * lines];
                assert!(p.depth <= stride && p.depth <= lines, "depth {} beyond a row", p.depth);
                let (x, w) = (x.as_ptr().cast::<i32>(), w.as_ptr());
                if p.write == Write::Add {
                    (0..R).for_each(|r| prefetch_outputs::<C>(p, at.row + r, at.block, out));
                }
                let mut sums = [[_mm512_setzero_ps(); C]; R];
                let (from, burst) = at.asks(C * lines, p.depth);
                let mut next = w.wrapping_add(C * lines + from);
                for start in (0..p.depth).step_by(BURST_STEPS) {
                    (0..burst).for_each(|line| prefetch::far(next.wrapping_add(line)));
                    next = next.wrapping_add(burst);
                    for i in start..p.depth.min(start + BURST_STEPS) {
                        let ahead = i + AHEAD_LINES;
                        let ahead = if ahead < lines { ahead } else { ahead + (C - 1) * lines };
                        let mut weights = [_mm512_setzero_si512(); C];
                        for (c, weight) in weights.iter_mut().enumerate() {
                            // SAFETY: `c < C` and `i < depth <= lines`.
                            *weight = unsafe { load(w.wrapping_add(c * lines + i)) };
                            prefetch::near(w.wrapping_add(c * lines + ahead));
                        }
                        for (r, sums) in sums.iter_mut().enumerate() {
                            // SAFETY: `r < R` and `i < depth <= stride`.
                            let word = unsafe { *x.wrapping_add(r * stride + i) };
                            let word = _mm512_set1_epi32(word);
                            for (sum, &weight) in sums.iter_mut().zip(&weights) {
                                *sum = $dot(*sum, word, weight);
                            }
                        }
                    }
                }
                // The sums are not handed on by reference, and every loop over them is small: else they would lie in
                // memory.
                if (at.block + C) * WORDS <= p.outputs {
                    let of_row = |r| p.place(at.row + r, at.block, C);
                    // No other task has outputs of these rows and blocks.
                    let to = out.pointer(of_row(0).start, of_row(R - 1).end);
                    let to = |r: usize, c: usize| to.wrapping_add(r * p.outputs + c * WORDS);
                    if let Some(bias) = p.bias {
                        let bias = bias[at.block * WORDS..][..C * WORDS].as_ptr();
                        for c in 0..C {
                            // SAFETY: there is a bias of C blocks.
                            let bias = unsafe { _mm512_loadu_ps(bias.wrapping_add(c * WORDS)) };
                            for r in 0..R {
                                sums[r][c] = _mm512_add_ps(sums[r][c], bias);
                            }
                        }
                    }
                    if p.write == Write::Add {
                        for r in 0..R {
                            for c in 0..C {
                                // SAFETY: the rows have outputs of C blocks.
                                let earlier = unsafe { _mm512_loadu_ps(to(r, c)) };
                                sums[r][c] = _mm512_add_ps(earlier, sums[r][c]);
                            }
                        }
                    }
                    for r in 0..R {
                        for c in 0..C {
                            // SAFETY: as above.
                            unsafe { _mm512_storeu_ps(to(r, c), sums[r][c]) };
                        }
                    }
                    return;
                }
                let mut stored = [[[0.0_f32; WORDS]; C]; R];
                for r in 0..R {
                    for c in 0..C {
                        // SAFETY: sixteen elements are there.
                        unsafe { _mm512_storeu_ps(stored[r][c].as_mut_ptr(), sums[r][c]) };
                    }
                }
                for (r, sums) in stored.iter().enumerate() {
                    let place = p.place(at.row + r, at.block, C);
                    // SAFETY: no other task has outputs of this row and these blocks.
                    store_part(p, sums, at.block, unsafe { out.part(place.start, place.end) });
                }
            }

            fn $pick(rows: usize, blocks: usize) -> Kernel {
                match (rows, blocks) {
                    (1, 8) => $kernel::<1, 8>,
                    (1, 4) => $kernel::<1, 4>,
                    (1, 2) => $kernel::<1, 2>,
                    (1, 1) => $kernel::<1, 1>,
                    (2, 8) => $kernel::<2, 8>,
                    (2, 4) => $kernel::<2, 4>,
                    (2, 2) => $kernel::<2, 2>,
                    (2, 1) => $kernel::<2, 1>,
                    (3, 4) => $kernel::<3, 4>,
                    (3, 2) => $kernel::<3, 2>,
                    (3, 1) => $kernel::<3, 1>,
                    (4, 4) => $kernel::<4, 4>,
                    (4, 2) => $kernel::<4, 2>,
                    (4, 1) => $kernel::<4, 1>,
                    (5, 4) => $kernel::<5, 4>,
                    (5, 2) => $kernel::<5, 2>,
                    (5, 1) => $kernel::<5, 1>,
                    (6, 2) => $kernel::<6, 2>,
                    (6, 1) => $kernel::<6, 1>,
                    (7, 2) => $kernel::<7, 2>,
                    (7, 1) => $kernel::<7, 1>,
                    (8, 2) => $kernel::<8, 2>,
                    (8, 1) => $kernel::<8, 1>,
                    (9, 2) => $kernel::<9, 2>,
                    (9, 1) => $kernel::<9, 1>,
                    (10, 2) => $kernel::<10, 2>,
                    (10, 1) => $kernel::<10, 1>,
                    (11, 2) => $kernel::<11, 2>,
                    (11, 1) => $kernel::<11, 1>,
                    (12, 2) => $kernel::<12, 2>,
                    (12, 1) => $kernel::<12, 1>,
                    _ => unreachable!("groups have 1..=12 rows, panels 1, 2, 4 or 8 blocks"),
                }
            }
        };
    }

    micro_kernel!(f32_kernel, f32_sums, "avx512f", dot_f32);
    micro_kernel!(bf16_kernel, bf16_sums, "avx512f,avx512bf16", dot_bf16);
    micro_kernel!(widened_kernel, widened_sums, "avx512f", dot_widened);
}

#[cfg(test)]
mod tests {
    use crate::cpu::Isa;
    use crate::{Dtype, Kernels, Level, Matrix, Operand, Write};

    /// The path of processors without `vdpbf16ps`, which the tests at the door cannot choose.
    #[test]
    fn widened_halves_agree_with_the_reference_and_keep_rows_apart() {
        let Some(mut kernels) = Kernels::new(Level::Avx512, 2) else {
            println!("left out: this processor has no AVX-512");
            return;
        };
        kernels.isa = Isa::Avx512(kernels.isa.avx512().unwrap().without_dots());
        let reference = Kernels::new(Level::Reference, 1).unwrap();
        let (n, k) = (83, 57);
        let values = |n: usize| (0..n).map(|i| (i * 7919 % 1009) as f32 / 500.0 - 1.0);
        let mut w = Matrix::zeros(Dtype::Bf16, n, k);
        kernels.load_matrix(&values(n * k).collect::<Vec<_>>(), &mut w);
        let x: Vec<f32> = values(30 * k).map(|x| x * 0.7).collect();
        let product = |kernels: &Kernels, rows: usize| {
            let (mut operand, mut out) = (Operand::new(Dtype::Bf16), vec![0.0; rows * n]);
            kernels.operand(&x[..rows * k], k, &mut operand);
            kernels.matmul(&operand, &w, 0..n, None, Write::Set, &mut out);
            out
        };
        let whole = product(&kernels, 30);
        for (got, expected) in whole.iter().zip(product(&reference, 30)) {
            assert!((got - expected).abs() < 1e-4, "{got} {expected}");
        }
        for rows in 1..30 {
            assert_eq!(product(&kernels, rows), whole[..rows * n], "{rows} rows");
        }
    }
}
