//! The product with AVX2: lanes are 16 outputs, one line of the weights is two registers.
//!
//! ```text
//! for as many groups of R rows as fit the second-level cache, for each chunk of blocks that does:
//!     for each group, for each panel of C blocks of the chunk:
//!         sum[r][c] = 0                                    2 R C registers, independent chains
//!         for i in 0..depth:                               ascending: the only order there is
//!             for each half of a word (f32: the whole word):
//!                 weight[c] = that half of line i of block c, as f32
//!                 for r: sum[r][c] += the same element of row r, in all lanes, * weight[c]
//!         out = sum + bias (+ out)
//! ```
//!
//! A chain is the same for every R and C, and that of the AVX-512 kernels without bf16 dot products;
//! R and C are chosen so that sums, weights and one element of x fit into 16 registers. A chunk comes from
//! memory for the first group and from the cache for the others; the rows are widened to f32 once.

#[cfg(target_arch = "x86_64")]
pub(super) use x86::rectangle;

/// Never called: no token exists on other processors.
#[cfg(not(target_arch = "x86_64"))]
pub(super) fn rectangle(
    _token: crate::cpu::Avx2,
    p: &super::product::Product<'_>,
    part: &super::product::Rectangle,
    out: &crate::disjoint::Disjoint<'_, f32>,
) {
    super::portable::rectangle(p, part, out);
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::cell::RefCell;
    use std::ops::Range;

    use crate::Dtype;
    use crate::cpu::Avx2;
    use crate::disjoint::Disjoint;
    use crate::gemm::buffer::{Line, WORDS};
    use crate::gemm::convert::{high, low};
    use crate::gemm::product::{Product, Rectangle};
    use crate::prefetch;
    use crate::split::even_parts;

    /// Most rows of a group: 6 x 2 sums, 2 weights and an element of x fit into 16 registers.
    const GROUP_ROWS: usize = 6;
    /// Widened elements that stay in the second-level cache while blocks pass by (128 KB).
    const WIDE_VALUES: usize = 32 << 10;
    /// Lines of weights that stay there while groups of rows pass by (128 KB).
    const CHUNK_LINES: usize = 2 << 10;
    /// Lines that each stream of weights is asked for ahead of its use (2 KB).
    const AHEAD_LINES: usize = 32;

    thread_local! {
        /// The rows of this thread's group as f32: a buffer that only grows.
        static WIDE: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    }

    /// The rows of a group as f32, `stride` apart.
    #[derive(Clone, Copy)]
    struct Rows<'a> {
        values: &'a [f32],
        stride: usize,
    }

    /// Where a micro-kernel works: its first row and its first block.
    #[derive(Clone, Copy)]
    struct Corner {
        row: usize,
        block: usize,
    }

    type Kernel = unsafe fn(&Product<'_>, Rows<'_>, Corner, &Disjoint<'_, f32>);

    /// Computes a rectangle of the output.
    pub(in crate::gemm) fn rectangle(
        _token: Avx2,
        p: &Product<'_>,
        part: &Rectangle,
        out: &Disjoint<'_, f32>,
    ) {
        let groups: Vec<_> = even_parts(part.rows.len(), GROUP_ROWS)
            .map(|group| part.rows.start + group.start..part.rows.start + group.end)
            .collect();
        let per_wide = (WIDE_VALUES / (GROUP_ROWS * wide_stride(p)).max(1)).max(1);
        WIDE.with_borrow_mut(|wide| {
            for groups in groups.chunks(per_wide) {
                // SAFETY: the token proves the features.
                unsafe { chunks(p, groups, part, wide, out) };
            }
        });
    }

    /// Elements of a widened row.
    fn wide_stride(p: &Product<'_>) -> usize {
        p.stride * WORDS * if p.dtype == Dtype::Bf16 { 2 } else { 1 }
    }

    /// All blocks of a rectangle for some groups of rows.
    #[target_feature(enable = "avx2,fma")]
    fn chunks(
        p: &Product<'_>,
        groups: &[Range<usize>],
        part: &Rectangle,
        wide: &mut Vec<f32>,
        out: &Disjoint<'_, f32>,
    ) {
        let (first, last) = (groups[0].start, groups[groups.len() - 1].end);
        let stride = wide_stride(p);
        wide.resize(wide.len().max((last - first) * stride), 0.0);
        let lines = p.x[first * p.stride..last * p.stride].chunks_exact(p.stride);
        for (row, to) in lines.zip(wide.chunks_exact_mut(stride)) {
            widen(p.dtype, &row[..p.depth.div_ceil(WORDS)], to);
        }
        let chunk = match groups.len() {
            1 => part.blocks.len(),
            _ => (CHUNK_LINES / p.block_lines.max(1)).max(1),
        };
        for start in part.blocks.clone().step_by(chunk.max(1)) {
            let blocks = start..part.blocks.end.min(start + chunk);
            for group in groups {
                let values = &wide[(group.start - first) * stride..(group.end - first) * stride];
                panels(p, group, &blocks, Rows { values, stride }, out);
            }
        }
    }

    /// A chunk of blocks for one group of rows.
    #[target_feature(enable = "avx2,fma")]
    fn panels(
        p: &Product<'_>,
        group: &Range<usize>,
        blocks: &Range<usize>,
        rows: Rows<'_>,
        out: &Disjoint<'_, f32>,
    ) {
        let (count, mut block) = (group.len(), blocks.start);
        while block < blocks.end {
            let width = widest(count).min(1 << (blocks.end - block).ilog2());
            let bf16 = p.dtype == Dtype::Bf16;
            let kernel = if bf16 { halves(count, width) } else { single(count, width) };
            // SAFETY: the caller's features are those of the kernels.
            unsafe { kernel(p, rows, Corner { row: group.start, block }, out) };
            block += width;
        }
    }

    /// The elements of a row as f32: those of whole words in their order, of bf16 the first of each word in
    /// the first half of `to` and the second in the other.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn widen(dtype: Dtype, row: &[Line], to: &mut [f32]) {
        match dtype {
            Dtype::F32 => {
                for (line, to) in row.iter().zip(to.as_chunks_mut::<WORDS>().0) {
                    *to = line.0.map(f32::from_bits);
                }
            }
            Dtype::Bf16 => {
                let (first, second) = to.split_at_mut(to.len() / 2);
                let (first, second) = (first.as_chunks_mut::<WORDS>().0, second.as_chunks_mut().0);
                for (line, (first, second)) in row.iter().zip(first.iter_mut().zip(second)) {
                    *first = line.0.map(low);
                    *second = line.0.map(high);
                }
            }
        }
    }

    /// Blocks of a panel for groups of `rows` rows.
    fn widest(rows: usize) -> usize {
        match rows {
            1 => 4,
            2..=3 => 2,
            _ => 1,
        }
    }

    /// Which elements of a line of weights are factors: whole words, or one bf16 of each two.
    #[derive(Clone, Copy)]
    enum Part {
        Whole,
        Low,
        High,
    }

    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn factor(part: Part, words: __m256i) -> __m256 {
        _mm256_castsi256_ps(match part {
            Part::Whole => words,
            Part::Low => _mm256_slli_epi32::<16>(words),
            Part::High => _mm256_and_si256(words, _mm256_set1_epi32(0xffff_0000_u32 as i32)),
        })
    }

    /// The sums of one row: for each block lanes 0 to 7 and lanes 8 to 15.
    type Sums<const C: usize> = [[__m256; 2]; C];

    /// One step of all chains: one element of each of R rows meets a line of each of C blocks.
    ///
    /// # Safety
    /// The elements `x` and the lines `w + c * lines` can be read.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn step<const R: usize, const C: usize>(
        part: Part,
        x: [*const f32; R],
        (w, lines): (*const Line, usize),
        mut sums: [Sums<C>; R],
    ) -> [Sums<C>; R] {
        let mut weights = [[_mm256_setzero_ps(); 2]; C];
        for (c, weights) in weights.iter_mut().enumerate() {
            let line = w.wrapping_add(c * lines).cast::<__m256i>();
            for (half, weight) in weights.iter_mut().enumerate() {
                // Volatile, so that the second half of a word is loaded again rather than kept in a
                // register that the sums need.
                // SAFETY: by the contract; a line is two aligned registers.
                *weight = factor(part, unsafe { line.wrapping_add(half).read_volatile() });
            }
        }
        for (x, sums) in x.into_iter().zip(&mut sums) {
            // SAFETY: by the contract.
            let x = _mm256_set1_ps(unsafe { x.read() });
            for (sums, weights) in sums.iter_mut().zip(&weights) {
                for (sum, &weight) in sums.iter_mut().zip(weights) {
                    *sum = _mm256_fmadd_ps(x, weight, *sum);
                }
            }
        }
        sums
    }

    /// R rows by C blocks; `BF16` says what a word of the weights is.
    #[target_feature(enable = "avx2,fma")]
    fn kernel<const R: usize, const C: usize, const BF16: bool>(
        p: &Product<'_>,
        rows: Rows<'_>,
        at: Corner,
        out: &Disjoint<'_, f32>,
    ) {
        let (lines, per_word) = (p.block_lines, if BF16 { 2 } else { 1 });
        let w = &p.w[at.block * lines..][..C * lines];
        assert!(p.depth * per_word <= rows.stride && p.depth <= lines, "depth {}", p.depth);
        assert!(rows.values.len() >= R * rows.stride, "{R} rows of {}", rows.stride);
        let x = std::array::from_fn(|r| rows.values[r * rows.stride..].as_ptr());
        // SAFETY: by the assertions, the depth is within R rows and C blocks.
        let sums =
            unsafe { chains::<R, C, BF16>(p.depth, (x, rows.stride / 2), (w.as_ptr(), lines)) };
        for (r, sums) in sums.iter().enumerate() {
            let place = p.place(at.row + r, at.block, C);
            // SAFETY: no other task has outputs of this row and these blocks.
            let to = unsafe { out.part(place.start, place.end) };
            for (c, (to, sums)) in to.chunks_mut(WORDS).zip(sums).enumerate() {
                store(p, sums, at.block + c, to);
            }
        }
    }

    /// The sums of R rows by C blocks over `depth` words. A function of its own so that the compiler
    /// keeps all of them in registers.
    ///
    /// # Safety
    /// Each of the rows `x` has `depth` words' elements, the second of each word `half` behind the first;
    /// each of the C blocks, `lines` apart, has as many lines.
    #[inline(never)]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn chains<const R: usize, const C: usize, const BF16: bool>(
        depth: usize,
        (x, half): ([*const f32; R], usize),
        (w, lines): (*const Line, usize),
    ) -> [Sums<C>; R] {
        let mut sums = [[[_mm256_setzero_ps(); 2]; C]; R];
        for i in 0..depth {
            let ahead = i + AHEAD_LINES;
            let ahead = if ahead < lines { ahead } else { ahead + (C - 1) * lines };
            for c in 0..C {
                prefetch::near(w.wrapping_add(c * lines + ahead));
            }
            let w = (w.wrapping_add(i), lines);
            let element = |at: usize| x.map(|x| x.wrapping_add(at + i));
            if BF16 {
                // SAFETY: by the contract, as `i < depth`.
                sums = unsafe { step(Part::Low, element(0), w, sums) };
                // SAFETY: as above.
                sums = unsafe { step(Part::High, element(half), w, sums) };
            } else {
                // SAFETY: as above.
                sums = unsafe { step(Part::Whole, element(0), w, sums) };
            }
        }
        sums
    }

    /// Adds bias and earlier values as asked and writes one row's sums of a block.
    #[inline]
    #[target_feature(enable = "avx2,fma")]
    fn store(p: &Product<'_>, sums: &[__m256; 2], block: usize, to: &mut [f32]) {
        let mut lanes = [0.0f32; WORDS];
        for (lanes, &sum) in lanes.chunks_exact_mut(WORDS / 2).zip(sums) {
            // SAFETY: eight elements are there.
            unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), sum) };
        }
        match p.bias {
            Some(bias) => {
                let bias = &bias[block * WORDS..][..to.len()];
                for ((to, sum), bias) in to.iter_mut().zip(lanes).zip(bias) {
                    p.write.apply(to, sum + bias);
                }
            }
            None => to.iter_mut().zip(lanes).for_each(|(to, sum)| p.write.apply(to, sum)),
        }
    }

    /// Defines the function that picks R and C.
    macro_rules! pick {
        ($pick:ident, $bf16:literal) => {
            fn $pick(rows: usize, blocks: usize) -> Kernel {
                match (rows, blocks) {
                    (1, 4) => kernel::<1, 4, $bf16>,
                    (1, 2) => kernel::<1, 2, $bf16>,
                    (1, 1) => kernel::<1, 1, $bf16>,
                    (2, 2) => kernel::<2, 2, $bf16>,
                    (2, 1) => kernel::<2, 1, $bf16>,
                    (3, 2) => kernel::<3, 2, $bf16>,
                    (3, 1) => kernel::<3, 1, $bf16>,
                    (4, 1) => kernel::<4, 1, $bf16>,
                    (5, 1) => kernel::<5, 1, $bf16>,
                    (6, 1) => kernel::<6, 1, $bf16>,
                    _ => unreachable!("groups have 1..=6 rows, panels 1, 2 or 4 blocks"),
                }
            }
        };
    }

    pick!(single, false);
    pick!(halves, true);
}
