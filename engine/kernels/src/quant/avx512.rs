//! The product with AVX-512 VNNI: a vector is sixteen outputs by two inputs.
//!
//! ```text
//! for each block of 16 outputs, for R rows at a time:
//!     sum[r] = 0
//!     for each group of inputs, ascending:
//!         dot[r] = 0                                           R independent chains
//!         for each pair p of inputs, four at a time:
//!             w[p] = its integers, from the planes, - zero     1 vector a pair, for R rows
//!             dot[r] += x[r][p] in all lanes * w[p], in twos   vpdpwssd
//!         sum[r] = fma(dot[r], scale x_scale, sum[r])          (and the minima's share)
//! ```
//!
//! What a group's integers are made of is in the first-level cache when the next R rows come by.
//! Without VNNI the AVX2 kernel runs.

#[cfg(target_arch = "x86_64")]
pub(super) use x86::{halves, rectangle};

/// Never called: no token exists on other processors.
#[cfg(not(target_arch = "x86_64"))]
pub(super) fn rectangle(
    _token: crate::cpu::Avx512Vnni,
    _product: &super::product::Product<'_>,
    _part: &super::product::Rectangle,
    _out: &crate::disjoint::Disjoint<'_, f32>,
) {
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use crate::Write;
    use crate::cpu::Avx512Vnni;
    use crate::disjoint::Disjoint;
    use crate::gemm::buffer::WORDS;
    use crate::prefetch;
    use crate::quant::matrix::of_format;
    use crate::quant::product::{Product, Rectangle};
    use crate::quant::{FINE_GROUP, X_GROUP};
    use crate::simd::avx512::broadcast;

    /// How far ahead of their use weights are asked for, in bytes.
    const AHEAD_BYTES: usize = 8192;

    /// Where a micro-kernel works: its first row, as the operand counts, and its block.
    #[derive(Clone, Copy)]
    struct Corner {
        row: usize,
        block: usize,
    }

    type Kernel = unsafe fn(&Product<'_>, Corner, &Disjoint<'_, f32>);

    /// Computes a rectangle of the output.
    pub(in crate::quant) fn rectangle(
        _token: Avx512Vnni,
        p: &Product<'_>,
        part: &Rectangle,
        out: &Disjoint<'_, f32>,
    ) {
        let kernel: fn(usize) -> Kernel = of_format!(p.w.format(), of_rows);
        for block in part.blocks.clone() {
            let mut row = part.rows.start;
            while row < part.rows.end {
                let rows = (part.rows.end - row).min(8);
                let rows = 1 << rows.ilog2();
                // SAFETY: the token proves the features.
                unsafe { kernel(rows)(p, Corner { row, block }, out) };
                row += rows;
            }
        }
    }

    /// The kernel for 1, 2, 4 or 8 rows.
    fn of_rows<const BITS: u32, const GROUP: usize>(rows: usize) -> Kernel {
        match rows {
            1 => sums::<BITS, GROUP, 1>,
            2 => sums::<BITS, GROUP, 2>,
            4 => sums::<BITS, GROUP, 4>,
            8 => sums::<BITS, GROUP, 8>,
            _ => unreachable!("groups have 1, 2, 4 or 8 rows"),
        }
    }

    /// R rows by one block of 16 outputs.
    #[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
    fn sums<const BITS: u32, const GROUP: usize, const R: usize>(
        p: &Product<'_>,
        at: Corner,
        out: &Disjoint<'_, f32>,
    ) {
        let (format, groups) = (p.w.format(), p.w.cols() / GROUP);
        let record_bytes = 2 * format.record_lanes();
        let (low, high) = (2 * format.head_lanes(), 2 * (format.head_lanes() + format.low_lanes()));
        let lines = p.w.lines();
        let start = 2 * p.w.record(p.first + at.block * WORDS, 0);
        assert!(start + groups * record_bytes <= size_of_val(lines), "block {}", at.block);
        let mut record = lines.as_ptr().cast::<u8>().wrapping_add(start);
        let first = p.rows.start + at.row;
        assert!((first + R) * p.x.stride() <= p.x.values.len(), "rows of x");
        assert!(groups * GROUP <= 2 * WORDS * p.x.stride(), "a row of x");
        let x: [_; R] = std::array::from_fn(|r| {
            p.x.values.as_ptr().wrapping_add((first + r) * p.x.stride()).cast::<i32>()
        });
        let zero = _mm512_set1_epi16(i16::from(format.zero()));
        let unit = _mm512_set1_ps(p.unit);
        let of_groups = p.x.cols() / X_GROUP;
        let x_scales = p.x.scales[first * of_groups..][..R * of_groups].as_ptr();
        let x_sums = p.x.sums[first * of_groups * 2..][..R * of_groups * 2].as_ptr();
        let mut sums = [_mm512_setzero_ps(); R];
        for group in 0..groups {
            for line in (0..record_bytes).step_by(64) {
                prefetch::near(record.wrapping_add(AHEAD_BYTES + line));
            }
            let mut dots = [_mm512_setzero_si512(); R];
            for quad in 0..GROUP / 8 {
                // SAFETY: by the first assertion the record can be read.
                let w = unsafe {
                    integers::<BITS>(record.wrapping_add(low), record.wrapping_add(high), quad)
                };
                for (i, w) in w.into_iter().enumerate() {
                    let w = _mm512_sub_epi16(w, zero);
                    for (dot, x) in dots.iter_mut().zip(x) {
                        let pair = x.wrapping_add(group * GROUP / 2 + 4 * quad + i);
                        // SAFETY: by the other assertions the row has all pairs of the groups.
                        *dot = unsafe { dot_pair(*dot, w, pair) };
                    }
                }
            }
            // SAFETY: scales, and minima where there are any, are the head of the record.
            let scales = _mm512_mul_ps(unsafe { halves(record) }, unit);
            let at = group * GROUP / X_GROUP;
            let mut x_scale = [_mm512_setzero_ps(); R];
            for r in 0..R {
                // SAFETY: the rows have scales for all groups.
                x_scale[r] = unsafe { broadcast(x_scales.wrapping_add(r * of_groups + at)) };
                let scale = _mm512_mul_ps(scales, x_scale[r]);
                sums[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[r]), scale, sums[r]);
            }
            if format.minimum() {
                // SAFETY: as above.
                let minima = _mm512_mul_ps(unsafe { halves(record.wrapping_add(32)) }, unit);
                let at = group * GROUP / FINE_GROUP;
                for r in 0..R {
                    let x_sums = x_sums.wrapping_add(r * of_groups * 2 + at);
                    // SAFETY: the rows have two sums for each scale.
                    let mut x_sum = unsafe { broadcast(x_sums) };
                    if GROUP > FINE_GROUP {
                        // SAFETY: as above.
                        x_sum = _mm512_add_ps(x_sum, unsafe { broadcast(x_sums.wrapping_add(1)) });
                    }
                    sums[r] = _mm512_fmadd_ps(x_sum, _mm512_mul_ps(minima, x_scale[r]), sums[r]);
                }
            }
            record = record.wrapping_add(record_bytes);
        }
        for (r, &sum) in sums.iter().enumerate() {
            store(p, at.row + r, at.block, sum, out);
        }
    }

    /// Adds bias and earlier values as asked and writes the outputs of a block.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn store(p: &Product<'_>, row: usize, block: usize, sum: __m512, out: &Disjoint<'_, f32>) {
        let (from, to) = (block * WORDS, (block + 1) * WORDS);
        if to > p.outputs {
            let mut lanes = [0.0f32; WORDS];
            // SAFETY: sixteen elements are there.
            unsafe { _mm512_storeu_ps(lanes.as_mut_ptr(), sum) };
            return store_part(p, row, block, &lanes, out);
        }
        let mut sum = sum;
        if let Some(bias) = p.bias {
            // SAFETY: sixteen elements are there.
            sum = _mm512_add_ps(sum, unsafe { _mm512_loadu_ps(bias[from..to].as_ptr()) });
        }
        // No other task has outputs of this row and this block.
        let to = out.pointer(row * p.outputs + from, row * p.outputs + to);
        if p.write == Write::Add {
            // SAFETY: sixteen elements are there.
            sum = _mm512_add_ps(unsafe { _mm512_loadu_ps(to) }, sum);
        }
        // SAFETY: as above.
        unsafe { _mm512_storeu_ps(to, sum) };
    }

    /// The last block, of which only a part are outputs.
    #[cold]
    #[inline(never)]
    fn store_part(
        p: &Product<'_>,
        row: usize,
        block: usize,
        lanes: &[f32; WORDS],
        out: &Disjoint<'_, f32>,
    ) {
        p.store(row, block, lanes, out);
    }

    /// Adds the products of two integers in each word of `w` with those at `pair`.
    ///
    /// In assembler, since the compiler makes two instructions of `vpdpwssd` where it counts latencies alone.
    ///
    /// # Safety
    /// A word can be read.
    #[inline]
    #[target_feature(enable = "avx512f,avx512vnni")]
    unsafe fn dot_pair(mut sum: __m512i, w: __m512i, pair: *const i32) -> __m512i {
        // SAFETY: promised; the instruction reads a word and changes its target only.
        unsafe {
            std::arch::asm!(
                "vpdpwssd {sum}, {w}, dword ptr [{pair}]{{1to16}}",
                sum = inout(zmm_reg) sum,
                w = in(zmm_reg) w,
                pair = in(reg) pair,
                options(pure, readonly, nostack, preserves_flags),
            );
        }
        sum
    }

    /// Sixteen f16.
    ///
    /// # Safety
    /// 32 bytes can be read.
    #[inline]
    #[target_feature(enable = "avx512f")]
    pub(in crate::quant) unsafe fn halves(at: *const u8) -> __m512 {
        // SAFETY: by the contract.
        _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(at.cast()) })
    }

    /// The integers of pairs `4 quad .. 4 quad + 4` of a group.
    ///
    /// # Safety
    /// The planes hold these pairs.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    unsafe fn integers<const BITS: u32>(
        low: *const u8,
        high: *const u8,
        quad: usize,
    ) -> [__m512i; 4] {
        // SAFETY: by the contract.
        let vector = |plane: *const u8, i: usize| unsafe {
            _mm512_loadu_si512(plane.wrapping_add(64 * i).cast())
        };
        if BITS == 8 {
            let byte = _mm512_set1_epi16(0xff);
            let [first, second] = [vector(low, 2 * quad), vector(low, 2 * quad + 1)];
            return [
                _mm512_and_si512(first, byte),
                _mm512_srli_epi16::<8>(first),
                _mm512_and_si512(second, byte),
                _mm512_srli_epi16::<8>(second),
            ];
        }
        let nibble = _mm512_set1_epi16(15);
        let four = vector(low, quad);
        let mut w = [
            _mm512_and_si512(four, nibble),
            _mm512_and_si512(_mm512_srli_epi16::<4>(four), nibble),
            _mm512_and_si512(_mm512_srli_epi16::<8>(four), nibble),
            _mm512_srli_epi16::<12>(four),
        ];
        if BITS > 4 {
            let bits = BITS - 4;
            let per_vector = (16 / bits) as usize;
            let all = vector(high, quad * 4 / per_vector);
            let skip = (quad * 4 % per_vector) as i32 * bits as i32;
            // The upper bits of the first pair where they belong, those of the others above them.
            let mut rest = _mm512_slli_epi16::<4>(_mm512_srl_epi16(all, _mm_cvtsi32_si128(skip)));
            let mask = _mm512_set1_epi16(((1 << bits) - 1) << 4);
            for w in &mut w {
                // w | rest & mask
                *w = _mm512_ternarylogic_epi32::<0xf8>(*w, rest, mask);
                rest = if bits == 1 {
                    _mm512_srli_epi16::<1>(rest)
                } else {
                    _mm512_srli_epi16::<2>(rest)
                };
            }
        }
        w
    }
}
