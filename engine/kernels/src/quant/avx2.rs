//! The product with AVX2: a vector is eight outputs by two inputs.
//!
//! ```text
//! for each block of 16 outputs, for each group of inputs:
//!     w[p] = the group's integers, pair by pair of inputs, from the planes     2 vectors a pair
//!     for each row m:
//!         dot = sum over pairs p of  x[m][p] in all lanes * w[p], added in twos     vpmaddwd
//!         sum[m] = fma(dot - zero x_sum, scale x_scale, sum[m])   (and the minima's share)
//! ```
//!
//! One row takes the integers straight from registers; more rows have them laid out once for all, which
//! stay in the first-level cache while the rows pass by.

#[cfg(target_arch = "x86_64")]
pub(super) use x86::rectangle;

/// Never called: no token exists on other processors.
#[cfg(not(target_arch = "x86_64"))]
pub(super) fn rectangle(
    _token: crate::cpu::Avx2,
    _product: &super::product::Product<'_>,
    _part: &super::product::Rectangle,
    _out: &crate::disjoint::Disjoint<'_, f32>,
) {
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use crate::cpu::Avx2;
    use crate::disjoint::Disjoint;
    use crate::gemm::buffer::WORDS;
    use crate::prefetch;
    use crate::quant::matrix::of_format;
    use crate::quant::product::{Product, Rectangle};

    /// How far ahead of their use weights are asked for, in bytes.
    const AHEAD_BYTES: usize = 2048;
    /// Most rows of a rectangle.
    const MOST_ROWS: usize = 64;
    /// Most pairs of inputs in a group.
    const PAIRS: usize = 16;

    /// Outputs 0 to 7 and 8 to 15.
    type Ints = [__m256i; 2];
    type Floats = [__m256; 2];

    type Kernel = unsafe fn(&Product<'_>, &Rectangle, usize, &Disjoint<'_, f32>);

    /// Computes a rectangle of the output.
    pub(in crate::quant) fn rectangle(
        _token: Avx2,
        p: &Product<'_>,
        part: &Rectangle,
        out: &Disjoint<'_, f32>,
    ) {
        assert!(part.rows.len() <= MOST_ROWS, "{} rows, limit is {MOST_ROWS}", part.rows.len());
        let kernel: Kernel = of_format!(p.w.format(), block);
        for block in part.blocks.clone() {
            // SAFETY: the token proves the features.
            unsafe { kernel(p, part, block, out) };
        }
    }

    /// One block of 16 outputs for the rows of a rectangle.
    #[target_feature(enable = "avx2,fma,f16c")]
    fn block<const BITS: u32, const GROUP: usize>(
        p: &Product<'_>,
        part: &Rectangle,
        block: usize,
        out: &Disjoint<'_, f32>,
    ) {
        let mut sums = [[_mm256_setzero_ps(); 2]; MOST_ROWS];
        let sums = &mut sums[..part.rows.len()];
        let format = p.w.format();
        let record = 2 * format.record_lanes();
        let groups = p.w.cols() / GROUP;
        let lines = p.w.lines();
        let start = 2 * p.w.record(p.first + block * WORDS, 0);
        assert!(start + groups * record <= size_of_val(lines), "block {block} of the weights");
        assert!((p.rows.start + part.rows.end) * p.x.stride() <= p.x.values.len(), "rows of x");
        let w = lines.as_ptr().cast::<u8>();
        let first = p.rows.start + part.rows.start;
        for group in 0..groups {
            let at = w.wrapping_add(start + group * record);
            for line in (0..record).step_by(64) {
                prefetch::near(at.wrapping_add(AHEAD_BYTES + line));
            }
            // SAFETY: by the first assertion the record can be read.
            unsafe { rows::<BITS, GROUP>(p, first, (at, group), sums) };
        }
        for (row, sums) in part.rows.clone().zip(sums) {
            let mut lanes = [0.0f32; WORDS];
            for (lanes, &sum) in lanes.chunks_exact_mut(8).zip(sums.iter()) {
                // SAFETY: eight elements are there.
                unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), sum) };
            }
            p.store(row, block, &lanes, out);
        }
    }

    /// Adds one group to the sums of the rows from `first` on.
    ///
    /// # Safety
    /// The record can be read, and the operand's rows.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn rows<const BITS: u32, const GROUP: usize>(
        p: &Product<'_>,
        first: usize,
        (record, group): (*const u8, usize),
        sums: &mut [Floats],
    ) {
        let format = p.w.format();
        let planes = record.wrapping_add(2 * format.head_lanes());
        let high = planes.wrapping_add(2 * format.low_lanes());
        let x = |row: usize| {
            let line = p.x.values.as_ptr().wrapping_add((first + row) * p.x.stride());
            line.cast::<i32>().wrapping_add(group * GROUP / 2)
        };
        // SAFETY: scales, and minima where there are any, are the head of the record.
        let scales = unsafe { halves(record, p.unit) };
        let minima = if format.minimum() {
            // SAFETY: as above.
            Some(unsafe { halves(record.wrapping_add(32), p.unit) })
        } else {
            None
        };
        let join = |row: usize, dot: Ints, sum: &mut Floats| {
            join::<GROUP>(p, (first + row, group), (scales, minima), dot, sum);
        };
        if let [sum] = sums {
            let mut dot = [_mm256_setzero_si256(); 2];
            for quad in 0..GROUP / 8 {
                // SAFETY: the planes can be read.
                let w = unsafe { integers::<BITS>(planes, high, quad) };
                for (i, w) in w.iter().enumerate() {
                    // SAFETY: the row has this pair.
                    let pair = unsafe { x(0).wrapping_add(quad * 4 + i).read() };
                    dot = add_products(dot, w, pair);
                }
            }
            return join(0, dot, sum);
        }
        let mut laid_out = [[_mm256_setzero_si256(); 2]; PAIRS];
        for (quad, laid_out) in laid_out[..GROUP / 2].as_chunks_mut::<4>().0.iter_mut().enumerate()
        {
            // SAFETY: the planes can be read.
            *laid_out = unsafe { integers::<BITS>(planes, high, quad) };
        }
        let w = &laid_out[..GROUP / 2];
        let (fours, rest) = sums.as_chunks_mut::<4>();
        let done = 4 * fours.len();
        for (i, sums) in fours.iter_mut().enumerate() {
            let rows = std::array::from_fn(|r| x(4 * i + r));
            // SAFETY: the rows have all pairs of the group.
            let dots = unsafe { dots::<4>(w, rows) };
            for (r, (dot, sum)) in dots.into_iter().zip(sums).enumerate() {
                join(4 * i + r, dot, sum);
            }
        }
        for (i, sum) in rest.iter_mut().enumerate() {
            // SAFETY: as above.
            let [dot] = unsafe { dots::<1>(w, [x(done + i)]) };
            join(done + i, dot, sum);
        }
    }

    /// The integer sums of R rows over the pairs of a group.
    ///
    /// # Safety
    /// Each of the rows has as many pairs as there are weights.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn dots<const R: usize>(w: &[Ints], x: [*const i32; R]) -> [Ints; R] {
        let mut dots = [[_mm256_setzero_si256(); 2]; R];
        for (pair, w) in w.iter().enumerate() {
            for (dot, x) in dots.iter_mut().zip(x) {
                // SAFETY: by the contract.
                *dot = add_products(*dot, w, unsafe { x.wrapping_add(pair).read() });
            }
        }
        dots
    }

    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn add_products(dot: Ints, w: &Ints, pair: i32) -> Ints {
        let x = _mm256_set1_epi32(pair);
        [
            _mm256_add_epi32(dot[0], _mm256_madd_epi16(w[0], x)),
            _mm256_add_epi32(dot[1], _mm256_madd_epi16(w[1], x)),
        ]
    }

    /// Scales the integer sums of a group and adds them, and the share of the minima.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    fn join<const GROUP: usize>(
        p: &Product<'_>,
        (row, group): (usize, usize),
        (scales, minima): (Floats, Option<Floats>),
        dot: Ints,
        sum: &mut Floats,
    ) {
        let x_sum = p.x_sum(row, group, GROUP);
        let x_scale = _mm256_set1_ps(p.x_scale(row, group, GROUP));
        let zeros = _mm256_set1_epi32(x_sum as i32 * i32::from(p.w.format().zero()));
        for (half, sum) in sum.iter_mut().enumerate() {
            let dot = _mm256_cvtepi32_ps(_mm256_sub_epi32(dot[half], zeros));
            *sum = _mm256_fmadd_ps(dot, _mm256_mul_ps(scales[half], x_scale), *sum);
            if let Some(minima) = minima {
                let x_sum = _mm256_set1_ps(x_sum);
                *sum = _mm256_fmadd_ps(x_sum, _mm256_mul_ps(minima[half], x_scale), *sum);
            }
        }
    }

    /// Sixteen f16 times `unit`.
    ///
    /// # Safety
    /// 32 bytes can be read.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn halves(at: *const u8, unit: f32) -> Floats {
        // SAFETY: by the contract.
        let both = unsafe { _mm256_loadu_si256(at.cast()) };
        let high = _mm256_extracti128_si256::<1>(both);
        let unit = _mm256_set1_ps(unit);
        [_mm256_castsi256_si128(both), high].map(|half| _mm256_mul_ps(_mm256_cvtph_ps(half), unit))
    }

    /// The integers of pairs `4 quad .. 4 quad + 4` of a group.
    ///
    /// # Safety
    /// The planes hold these pairs.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c")]
    unsafe fn integers<const BITS: u32>(low: *const u8, high: *const u8, quad: usize) -> [Ints; 4] {
        // SAFETY: by the contract.
        let vector = |plane: *const u8, i: usize| unsafe {
            _mm256_loadu_si256(plane.cast::<__m256i>().wrapping_add(i))
        };
        let mut w = [[_mm256_setzero_si256(); 2]; 4];
        for half in 0..2 {
            if BITS == 8 {
                let byte = _mm256_set1_epi16(0xff);
                for i in 0..2 {
                    let two = vector(low, (2 * quad + i) * 2 + half);
                    w[2 * i][half] = _mm256_and_si256(two, byte);
                    w[2 * i + 1][half] = _mm256_srli_epi16::<8>(two);
                }
                continue;
            }
            let nibble = _mm256_set1_epi16(15);
            let four = vector(low, quad * 2 + half);
            w[0][half] = _mm256_and_si256(four, nibble);
            w[1][half] = _mm256_and_si256(_mm256_srli_epi16::<4>(four), nibble);
            w[2][half] = _mm256_and_si256(_mm256_srli_epi16::<8>(four), nibble);
            w[3][half] = _mm256_srli_epi16::<12>(four);
            if BITS > 4 {
                let bits = BITS - 4;
                let per_vector = (16 / bits) as usize;
                let all = vector(high, quad * 4 / per_vector * 2 + half);
                let skip = (quad * 4 % per_vector) as i32 * bits as i32;
                let mut rest = _mm256_srl_epi16(all, _mm_cvtsi32_si128(skip));
                let mask = _mm256_set1_epi16(((1 << bits) - 1) << 4);
                for w in &mut w {
                    let upper = _mm256_and_si256(_mm256_slli_epi16::<4>(rest), mask);
                    w[half] = _mm256_or_si256(w[half], upper);
                    rest = _mm256_srl_epi16(rest, _mm_cvtsi32_si128(bits as i32));
                }
            }
        }
        w
    }
}
