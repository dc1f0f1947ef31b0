//! Quantised weights expanded to bf16 while they are multiplied, where tiles do the multiplying.
//!
//! ```text
//! for each 32 inputs of a block of 16 rows:
//!     for each row:  values = fma(integer - zero, scale, minimum), rounded to bf16
//!         4, 5 bits: of all 16 or 32 integers, once; then each input looks its own up
//!         6, 8 bits: of the integers of all inputs
//! one row of x:      a block of rows by x, as they are
//! more:              16 x 16 pairs of inputs transposed, x by the block, as in the dense product
//! ```
//! The sums are those of a product with the same weights in full, to the bit: what a file quantises is then
//! only a way to store them. Leaves out processors without tiles, where products of integers are faster
//! (`product`).

use std::cell::RefCell;

use super::QuantMatrix;
use crate::cpu::Avx512Bf16;
use crate::gemm::buffer::{Buffer, Line};

thread_local! {
    /// The blocks that this thread multiplies by.
    static BLOCKS: RefCell<Buffer> = RefCell::new(Buffer::zeros(0));
}

/// Lines of a block: all pairs of inputs, whose number needs no padding.
pub(crate) fn block_lines(w: &QuantMatrix) -> usize {
    w.cols() / 2
}

/// Calls `with` with some blocks of 16 rows of `w`, one after the other, in the layout of a bf16 matrix.
pub(crate) fn with_blocks<R>(
    token: Avx512Bf16,
    w: &QuantMatrix,
    blocks: impl ExactSizeIterator<Item = usize>,
    with: impl FnOnce(&[Line]) -> R,
) -> R {
    BLOCKS.with_borrow_mut(|lines| {
        let block_lines = block_lines(w);
        let len = blocks.len() * block_lines;
        lines.reserve(len);
        for (block, lines) in blocks.zip(lines.chunks_exact_mut(block_lines.max(1))) {
            expand(token, w, block, lines);
        }
        with(&lines[..len])
    })
}

#[cfg(target_arch = "x86_64")]
use x86::expand;
#[cfg(target_arch = "x86_64")]
pub(crate) use x86::multiply;

/// Never called: no token exists on other processors.
#[cfg(not(target_arch = "x86_64"))]
fn expand(_token: Avx512Bf16, _w: &QuantMatrix, _block: usize, _to: &mut [Line]) {}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::marker::PhantomData;

    use super::super::X_GROUP;
    use super::super::avx512::halves;
    use super::super::matrix::{Order, of_format};
    use super::{Avx512Bf16, Line, QuantMatrix, block_lines};
    use crate::QuantFormat;
    use crate::gemm::amx::{Rows, Target, tiles::Tiles};
    use crate::gemm::buffer::WORDS;
    use crate::gemm::pack::{Square, transpose_words};
    use crate::prefetch;

    /// How far ahead of their use weights are asked for, in bytes.
    const AHEAD_BYTES: usize = 2048;

    /// Writes a block of weights, all of its lines.
    pub(super) fn expand(_token: Avx512Bf16, w: &QuantMatrix, block: usize, to: &mut [Line]) {
        let expand: unsafe fn(&QuantMatrix, usize, &mut [Line]) = of_format!(w.format(), block_of);
        // SAFETY: the token proves the features.
        unsafe { expand(w, block, to) };
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,avx512bf16")]
    fn block_of<const BITS: u32, const GROUP: usize>(
        w: &QuantMatrix,
        block: usize,
        to: &mut [Line],
    ) {
        assert_eq!(to.len(), block_lines(w), "lines of a block");
        let mut records = Records::of_block::<BITS, GROUP>(w, block, 0);
        let mut rows = [Line::ZERO; WORDS];
        for to in to.as_chunks_mut().0 {
            records.next::<BITS, GROUP>(&mut rows);
            *to = transpose_words(&rows);
        }
    }

    /// The product of up to 32 rows by two blocks, whose weights are expanded a step ahead.
    ///
    /// # Safety
    /// The target's rows, as many as the tiles are configured for, of 32 elements may be written.
    pub(crate) unsafe fn multiply(
        _token: Avx512Bf16,
        tiles: &Tiles,
        x: Rows<'_>,
        (w, blocks): (&QuantMatrix, [usize; 2]),
        to: &Target,
    ) {
        let multiply: unsafe fn(&Tiles, Rows<'_>, (&QuantMatrix, [usize; 2]), &Target) =
            of_format!(w.format(), product_of);
        // SAFETY: the token proves the features; promised for the target.
        unsafe { multiply(tiles, x, (w, blocks), to) };
    }

    /// # Safety
    /// As [`multiply`].
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,avx512bf16")]
    unsafe fn product_of<const BITS: u32, const GROUP: usize>(
        tiles: &Tiles,
        x: Rows<'_>,
        (w, blocks): (&QuantMatrix, [usize; 2]),
        to: &Target,
    ) {
        let steps = w.cols() / X_GROUP;
        // Of neighbours, each asks for its own successor but one.
        let others = usize::from(blocks[0] + 1 == blocks[1]);
        let mut records = [
            Records::of_block::<BITS, GROUP>(w, blocks[0], others),
            Records::of_block::<BITS, GROUP>(w, blocks[1], others),
        ];
        let mut turns = [const { [[Line::ZERO; WORDS]; 2] }; 2];
        let [mut now, mut next] = turns.each_mut();
        let mut rows = [Line::ZERO; WORDS];
        // SAFETY: promised.
        let mut product = unsafe { tiles.begin(x, steps, to) };
        let by_rows = product.by_rows();
        for step in 0..=steps {
            if step < steps {
                for (records, to) in records.iter_mut().zip(&mut *next) {
                    if by_rows {
                        records.next::<BITS, GROUP>(to);
                    } else {
                        records.next::<BITS, GROUP>(&mut rows);
                        *to = transpose_words(&rows);
                    }
                }
            }
            if step > 0 {
                product.step(now);
            }
            std::mem::swap(&mut now, &mut next);
        }
        product.end();
    }

    /// The records of a block from some input on.
    struct Records<'a> {
        next: *const u8,
        /// Records left, of 32 inputs each.
        left: usize,
        /// Where they end, and how much of what follows is somebody else's.
        end: *const u8,
        skip: usize,
        format: QuantFormat,
        unit: f32,
        /// Bytes of a group's scales and minima, of the low planes, and of all.
        bytes: [usize; 3],
        /// Of the next record.
        scales: Numbers,
        offsets: Numbers,
        /// Whose they are.
        of: PhantomData<&'a QuantMatrix>,
    }

    /// 16 numbers a group, as f32.
    type Numbers = [Line; 2];

    impl<'a> Records<'a> {
        #[inline]
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,avx512bf16")]
        fn of_block<const BITS: u32, const GROUP: usize>(
            w: &'a QuantMatrix,
            block: usize,
            others: usize,
        ) -> Self {
            assert_eq!(w.order(), Order::Rows, "order of weights that are expanded");
            let (format, left) = (w.format(), w.cols() / X_GROUP);
            let groups = const { X_GROUP / GROUP };
            let start = 2 * w.record(block * WORDS, 0);
            let bytes = left * groups * 2 * format.record_lanes();
            assert!(start + bytes <= size_of_val(w.lines()), "block {block}");
            let next = w.lines().as_ptr().cast::<u8>().wrapping_add(start);
            let lanes =
                [format.head_lanes(), groups * format.low_lanes(), groups * format.record_lanes()];
            let mut records = Self {
                next,
                left,
                end: next.wrapping_add(bytes),
                skip: others * bytes,
                format,
                unit: format.unit(),
                bytes: lanes.map(|lanes| 2 * lanes),
                scales: [Line::ZERO; 2],
                offsets: [Line::ZERO; 2],
                of: PhantomData,
            };
            records.numbers::<BITS, GROUP>();
            records
        }

        /// Expands the weights of the next 32 inputs, a line a row.
        #[inline]
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,avx512bf16")]
        fn next<const BITS: u32, const GROUP: usize>(&mut self, to: &mut Square) {
            assert!(self.left > 0, "records of a block");
            let (record, [head, low, all]) = (self.next, self.bytes);
            let ahead = record.wrapping_add(AHEAD_BYTES);
            let ahead = if ahead < self.end { ahead } else { ahead.wrapping_add(self.skip) };
            for line in (0..all).step_by(size_of::<Line>()) {
                prefetch::near(ahead.wrapping_add(line));
            }
            let planes = record.wrapping_add(const { X_GROUP / GROUP } * head);
            // In memory, from where a load copies a number to all lanes; in registers that takes shuffles.
            let [scales, offsets] = std::hint::black_box([&self.scales, &self.offsets]);
            let from = Planes {
                low: planes,
                high: planes.wrapping_add(low),
                scales,
                offsets,
                subtract: if self.adds_zero::<BITS>() { 0 } else { self.format.zero() },
            };
            match (BITS, from.subtract) {
                // SAFETY: all of a record can be read, and this is one of those that are left.
                (4 | 5, _) => unsafe { from.look_up::<BITS, GROUP>(to) },
                // SAFETY: as above.
                (_, 0) => unsafe { from.compute::<BITS, GROUP, false>(to) },
                // SAFETY: as above.
                _ => unsafe { from.compute::<BITS, GROUP, true>(to) },
            }
            self.next = record.wrapping_add(all);
            self.left -= 1;
            self.numbers::<BITS, GROUP>();
        }

        /// Sets what the next record's integers are multiplied by and what is added. A record ahead, since
        /// what was just stored takes a while to load.
        #[inline]
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,avx512bf16")]
        fn numbers<const BITS: u32, const GROUP: usize>(&mut self) {
            if self.left == 0 {
                return;
            }
            let unit = _mm512_set1_ps(self.unit);
            for group in 0..const { X_GROUP / GROUP } {
                let head = self.next.wrapping_add(group * self.bytes[0]);
                // SAFETY: scales, and minima where there are any, are the head of a record, and there is one.
                let scale = _mm512_mul_ps(unsafe { halves(head) }, unit);
                let offset = if self.format.minimum() {
                    // SAFETY: as above.
                    _mm512_mul_ps(unsafe { halves(head.wrapping_add(32)) }, unit)
                } else if self.adds_zero::<BITS>() {
                    let zero = _mm512_set1_ps(f32::from(self.format.zero()));
                    _mm512_fnmadd_ps(zero, scale, _mm512_setzero_ps())
                } else {
                    _mm512_setzero_ps()
                };
                store(&mut self.scales[group], _mm512_castps_si512(scale));
                store(&mut self.offsets[group], _mm512_castps_si512(offset));
            }
        }

        /// Whether zero is part of what is added, which then is exact as well as the sum; with few bits, and
        /// where there is a minimum, it is taken off the integers.
        #[inline(always)]
        fn adds_zero<const BITS: u32>(&self) -> bool {
            BITS > 5 && !self.format.minimum()
        }
    }

    /// A record of 32 inputs by 16 rows.
    struct Planes<'a> {
        low: *const u8,
        high: *const u8,
        /// Of each row and group.
        scales: &'a Numbers,
        /// What is added to integer times scale.
        offsets: &'a Numbers,
        /// What is taken off the integers first.
        subtract: u8,
    }

    impl Planes<'_> {
        /// By tables of all values of a row. With groups of 32 and 4 bits, one of two rows: a lane's fifth bit
        /// says which; with groups of 16, one of both groups.
        ///
        /// # Safety
        /// The planes can be read.
        #[inline]
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,avx512bf16")]
        unsafe fn look_up<const BITS: u32, const GROUP: usize>(&self, to: &mut Square) {
            let first = _mm512_sub_ps(sixteen(), _mm512_set1_ps(f32::from(self.subtract)));
            let fifth = _mm512_set1_epi16(16);
            let none = _mm512_setzero_si512();
            let second_half = _mm512_inserti64x4::<1>(none, _mm256_set1_epi16(16));
            let second = _mm512_add_ps(first, _mm512_set1_ps(16.0));
            let mut pair = none;
            for four in 0..4 {
                // SAFETY: promised.
                let [lows, uppers] = unsafe { self.four_rows::<BITS>(four) };
                for i in 0..4 {
                    let row = 4 * four + i;
                    let (table, upper) = match (BITS, GROUP) {
                        (4, 32) => {
                            if i.is_multiple_of(2) {
                                let other = self.values(first, row + 1, 0);
                                pair = pack(self.values(first, row, 0), other);
                            }
                            (pair, if i.is_multiple_of(2) { none } else { fifth })
                        }
                        (4, _) => {
                            let other = self.values(first, row, 1);
                            (pack(self.values(first, row, 0), other), second_half)
                        }
                        _ => {
                            let other = self.values(second, row, 0);
                            (pack(self.values(first, row, 0), other), uppers[i])
                        }
                    };
                    let index = nibble_or(lows[i], upper);
                    store(&mut to[row], _mm512_permutexvar_epi16(index, table));
                }
            }
        }

        /// Each by itself.
        ///
        /// # Safety
        /// The planes can be read.
        #[inline]
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,avx512bf16")]
        unsafe fn compute<const BITS: u32, const GROUP: usize, const SUBTRACT: bool>(
            &self,
            to: &mut Square,
        ) {
            for four in 0..4 {
                let [lows, uppers] = match BITS {
                    // SAFETY: promised.
                    6 => unsafe { self.four_rows::<BITS>(four) },
                    _ => [[_mm512_setzero_si512(); 4]; 2],
                };
                for i in 0..4 {
                    let row = 4 * four + i;
                    let (first, second) = if BITS == 6 {
                        let six = _mm512_set1_epi16(63);
                        let all = _mm512_and_si512(nibble_or(lows[i], uppers[i]), six);
                        let second = _mm512_extracti64x4_epi64::<1>(all);
                        let first = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(all));
                        (first, _mm512_cvtepu16_epi32(second))
                    } else {
                        let at = self.low.wrapping_add(row * X_GROUP);
                        // SAFETY: promised.
                        let first = unsafe { _mm_loadu_si128(at.cast()) };
                        // SAFETY: promised.
                        let second = unsafe { _mm_loadu_si128(at.wrapping_add(WORDS).cast()) };
                        (_mm512_cvtepu8_epi32(first), _mm512_cvtepu8_epi32(second))
                    };
                    let first = self.values(self.float::<SUBTRACT>(first), row, 0);
                    let second = self.values(self.float::<SUBTRACT>(second), row, WORDS / GROUP);
                    store(&mut to[row], pack(first, second));
                }
            }
        }

        /// The low planes' bits of four rows as the lowest of lanes, and the high planes' above the fourth,
        /// among others.
        ///
        /// # Safety
        /// The planes can be read.
        #[inline]
        #[target_feature(enable = "avx512f,avx512bw")]
        unsafe fn four_rows<const BITS: u32>(&self, four: usize) -> [[__m512i; 4]; 2] {
            // SAFETY: promised.
            let low = unsafe { vector(self.low, four) };
            let lows = [
                low,
                _mm512_srli_epi16::<4>(low),
                _mm512_srli_epi16::<8>(low),
                _mm512_srli_epi16::<12>(low),
            ];
            let (vectors, skip) = match BITS {
                5 => (4, four % 4 * 4),
                6 => (2, four % 2 * 8),
                _ => return [lows; 2],
            };
            // SAFETY: promised.
            let high = unsafe { vector(self.high, four / vectors) };
            let high = _mm512_srl_epi16(high, _mm_cvtsi32_si128(skip as i32));
            let uppers = match BITS {
                5 => [
                    _mm512_slli_epi16::<4>(high),
                    _mm512_slli_epi16::<3>(high),
                    _mm512_slli_epi16::<2>(high),
                    _mm512_slli_epi16::<1>(high),
                ],
                _ => [
                    _mm512_slli_epi16::<4>(high),
                    _mm512_slli_epi16::<2>(high),
                    high,
                    _mm512_srli_epi16::<2>(high),
                ],
            };
            [lows, uppers]
        }

        /// Integers as numbers, less what is taken off, if anything is.
        #[inline]
        #[target_feature(enable = "avx512f")]
        fn float<const SUBTRACT: bool>(&self, integers: __m512i) -> __m512 {
            if SUBTRACT {
                let subtract = _mm512_set1_epi32(i32::from(self.subtract));
                return _mm512_cvtepi32_ps(_mm512_sub_epi32(integers, subtract));
            }
            _mm512_cvtepi32_ps(integers)
        }

        /// The values of integers, those of a row and group.
        #[inline]
        #[target_feature(enable = "avx512f")]
        fn values(&self, integers: __m512, row: usize, group: usize) -> __m512 {
            let scale = _mm512_set1_ps(f32::from_bits(self.scales[group].0[row]));
            let offset = _mm512_set1_ps(f32::from_bits(self.offsets[group].0[row]));
            _mm512_fmadd_ps(integers, scale, offset)
        }
    }

    /// The lowest four bits of the first, the others of the second.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw")]
    fn nibble_or(low: __m512i, upper: __m512i) -> __m512i {
        // nibble ? low : upper
        _mm512_ternarylogic_epi32::<0xca>(_mm512_set1_epi16(15), low, upper)
    }

    /// Rounds 32 numbers.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bf16")]
    fn pack(first: __m512, second: __m512) -> __m512i {
        let rounded = _mm512_cvtne2ps_pbh(second, first);
        // SAFETY: both types are 64 bytes of plain numbers.
        unsafe { std::mem::transmute(rounded) }
    }

    /// 0 to 15.
    #[inline]
    #[target_feature(enable = "avx512f")]
    fn sixteen() -> __m512 {
        _mm512_setr_ps(
            0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0,
        )
    }

    /// A vector of a plane.
    ///
    /// # Safety
    /// It can be read.
    #[inline]
    #[target_feature(enable = "avx512f")]
    unsafe fn vector(plane: *const u8, i: usize) -> __m512i {
        // SAFETY: promised.
        unsafe { _mm512_loadu_si512(plane.wrapping_add(64 * i).cast()) }
    }

    #[inline]
    #[target_feature(enable = "avx512f")]
    fn store(to: &mut Line, vector: __m512i) {
        // SAFETY: a line is a vector.
        unsafe { _mm512_store_si512(std::ptr::from_mut(to).cast(), vector) };
    }
}
