//! The bf16 product with AMX tiles: 32 rows by 32 outputs at a time, both operands read in place.
//!
//! ```text
//! for each panel of 2 blocks (32 outputs), for each group of 32 rows:
//!     four 16 x 16 tiles = 0
//!     for each 32 inputs, ascending:            2 tiles of x, 2 of w, 4 tile products
//!         even and odd inputs are summed apart by the instruction, then added to the tile
//!     out = tiles + bias (+ out)
//! ```
//!
//! An operand's rows are allocated in multiples of 32, so a group may run past the last row; what it
//! computes there is dropped. An odd last block is multiplied twice and the copy dropped. Both keep
//! one tile shape, hence one order of summation, for every size. The three `asm!` functions at the
//! end of [`tiles`] are the only part that needs the processor: [`Multiply`] states their contract,
//! and the tests run everything else on an emulation of it. Leaves out f32 (AVX-512 does that).

use super::buffer::{Line, WORDS};
use super::pack::widened;
use super::product::{Product, Rectangle};
use crate::cpu::{Amx, Isa};
use crate::disjoint::Disjoint;

/// Rows and outputs of a group of tiles.
const GROUP: usize = 2 * WORDS;

/// The outputs of a group, row-major, two lines a row.
type Group = [[f32; GROUP]; GROUP];

/// The product of 32 rows and two blocks.
struct Multiply<'a> {
    /// 32 rows, `stride` lines apart, of which the first `depth` lines count.
    x: &'a [Line],
    stride: usize,
    /// `16 * depth` lines each: 16 pairs of inputs for every line of `x`.
    w: [&'a [Line]; 2],
    depth: usize,
}

impl<'a> Multiply<'a> {
    fn new(p: &Product<'a>, row: usize, block: usize, blocks: usize) -> Self {
        let block = |b: usize| &p.w[(block + b) * p.block_lines..][..p.block_lines];
        Self {
            x: &p.x[row * p.stride..][..GROUP * p.stride],
            stride: p.stride,
            w: [block(0), block(blocks - 1)],
            depth: p.block_lines / WORDS,
        }
    }

    /// What makes the pointers of the tile loads stay inside the slices.
    fn check(&self) {
        let (stride, depth) = (self.stride, self.depth);
        assert!(depth <= stride, "{depth} lines of rows with {stride}");
        assert!(self.x.len() >= GROUP * stride, "{} lines of x, stride {stride}", self.x.len());
        let lines = self.w.map(<[Line]>::len);
        assert!(lines.iter().all(|&n| n >= depth * WORDS), "{lines:?} lines of w, depth {depth}");
    }
}

/// Computes a rectangle of the output.
pub(super) fn rectangle(token: Amx, p: &Product<'_>, part: &Rectangle, out: &Disjoint<'_, f32>) {
    #[cfg(target_arch = "x86_64")]
    {
        let tiles = tiles::Tiles::new(token);
        blocked(Isa::Amx(token), p, part, out, |multiply, sums| tiles.multiply(multiply, sums));
    }
    #[cfg(not(target_arch = "x86_64"))]
    super::avx512::rectangle(token.avx512, p, part, out);
}

/// The loops around `multiply`, which replaces a group by the product.
fn blocked(
    isa: Isa,
    p: &Product<'_>,
    part: &Rectangle,
    out: &Disjoint<'_, f32>,
    multiply: impl Fn(&Multiply<'_>, &mut Group),
) {
    let mut sums = [[0.0; GROUP]; GROUP];
    for block in part.blocks.clone().step_by(2) {
        let blocks = 2.min(part.blocks.end - block);
        for row in part.rows.clone().step_by(GROUP) {
            multiply(&Multiply::new(p, row, block, blocks), &mut sums);
            for (row, sums) in (row..part.rows.end).zip(&sums) {
                let place = p.place(row, block, blocks);
                // SAFETY: no other task has outputs of this row and these blocks.
                let to = unsafe { out.part(place.start, place.end) };
                store(isa, p, sums, block, to);
            }
        }
    }
}

widened! {
    /// Adds bias and earlier values as asked and writes one row of a group.
    fn store(
        p: &Product<'_>, sums: &[f32; GROUP], block: usize, to: &mut [f32]
    ) = store_body
}

#[inline(always)]
fn store_body(_isa: Isa, p: &Product<'_>, sums: &[f32; GROUP], block: usize, to: &mut [f32]) {
    match p.bias {
        Some(bias) => {
            let bias = &bias[block * WORDS..][..to.len()];
            for ((to, &sum), bias) in to.iter_mut().zip(sums).zip(bias) {
                p.write.apply(to, sum + bias);
            }
        }
        None => to.iter_mut().zip(sums).for_each(|(to, &sum)| p.write.apply(to, sum)),
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) mod tiles {
    use std::arch::asm;
    use std::marker::PhantomData;

    use super::{Amx, Group, Line, Multiply};

    /// Eight tiles of 16 rows by 64 bytes, held by this thread while this value lives.
    ///
    /// Bound to its thread: the configuration is the thread's.
    pub(crate) struct Tiles(PhantomData<*const ()>);

    /// The operand of `ldtilecfg`: palette 1; bytes per row from byte 16 on, rows from byte 48 on.
    #[repr(C, align(64))]
    pub(super) struct Configuration(pub(super) [u8; 64]);

    impl Configuration {
        pub(super) const fn all_full() -> Self {
            let mut bytes = [0; 64];
            bytes[0] = 1;
            let mut tile = 0;
            while tile < 8 {
                bytes[16 + 2 * tile] = 64;
                bytes[48 + tile] = 16;
                tile += 1;
            }
            Self(bytes)
        }
    }

    static CONFIGURATION: Configuration = Configuration::all_full();

    impl Tiles {
        /// Configures this thread's tiles.
        pub(crate) fn new(_token: Amx) -> Self {
            // SAFETY: the token proves AMX; the configuration is valid for palette 1.
            unsafe { configure(&CONFIGURATION) };
            Self(PhantomData)
        }

        pub(super) fn multiply(&self, operands: &Multiply<'_>, sums: &mut Group) {
            operands.check();
            // SAFETY: the tiles are configured; `check` holds for the operands.
            unsafe { multiply(operands, sums) };
        }
    }

    impl Drop for Tiles {
        fn drop(&mut self) {
            // SAFETY: AMX is there, or this value would not be.
            unsafe { release() };
        }
    }

    /// # Safety
    /// The processor has AMX and the process may use it.
    unsafe fn configure(configuration: &Configuration) {
        // SAFETY: reads 64 bytes; no compiled code uses tiles.
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) configuration, options(nostack, readonly));
        }
    }

    /// # Safety
    /// The processor has AMX and the process may use it.
    unsafe fn release() {
        // SAFETY: no compiled code uses tiles.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }

    /// `sums[m][n] = sum over i, pairs of inputs, of x[m][2i] w[i][n][0] + x[m][2i + 1] w[i][n][1]`,
    /// 16 pairs at a time: the evens of these and the odds of these are each summed in ascending
    /// order by fused multiply-adds that flush denormals, then both, then added to the tile.
    ///
    /// # Safety
    /// This thread holds [`Tiles`] and [`Multiply::check`] passes.
    unsafe fn multiply(operands: &Multiply<'_>, sums: &mut Group) {
        let (x, stride) = (operands.x.as_ptr(), operands.stride);
        if operands.depth == 0 {
            return sums.iter_mut().for_each(|row| row.fill(0.0));
        }
        let x_bytes = stride * size_of::<Line>();
        // SAFETY: by `check`, every load stays inside the slices (prefetches may not, and need not);
        // the stores fill `sums`: 32 rows of 128 bytes, 16 rows being 2048.
        unsafe {
            asm!(
                "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
                "2:",
                "tileloadd tmm6, [{w0} + {line}*1]",
                "tileloadd tmm4, [{x0} + {xs}*1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{w1} + {line}*1]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{x1} + {xs}*1]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                ".irp at, 0, 64, 128, 192, 256, 320, 384, 448, 512, 576, 640, 704, 768, 832, 896, 960",
                "prefetcht0 [{w0} + 4096 + \\at]",
                "prefetcht0 [{w1} + 4096 + \\at]",
                ".endr",
                "add {x0}, 64", "add {x1}, 64", "add {w0}, 1024", "add {w1}, 1024",
                "dec {depth}", "jnz 2b",
                "tilestored [{sums} + {row}*1], tmm0",
                "tilestored [{sums} + {row}*1 + 64], tmm1",
                "tilestored [{sums} + {row}*1 + 2048], tmm2",
                "tilestored [{sums} + {row}*1 + 2112], tmm3",
                x0 = inout(reg) x => _,
                x1 = inout(reg) x.wrapping_add(16 * stride) => _,
                w0 = inout(reg) operands.w[0].as_ptr() => _,
                w1 = inout(reg) operands.w[1].as_ptr() => _,
                depth = inout(reg) operands.depth => _,
                xs = in(reg) x_bytes,
                line = in(reg) size_of::<Line>(),
                row = in(reg) 2 * size_of::<Line>(),
                sums = in(reg) sums.as_mut_ptr(),
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gemm::convert::{high, low, round_bf16};
    use crate::gemm::{Operand, Write};
    use crate::{Dtype, Kernels, Level, Matrix};

    fn flushed(x: f32) -> f32 {
        if x.is_subnormal() { 0.0_f32.copysign(x) } else { x }
    }

    fn fma(sum: f32, x: f32, w: f32) -> f32 {
        flushed(flushed(x).mul_add(flushed(w), sum))
    }

    /// `tdpbf16ps` as documented, in the order of `tiles::multiply`.
    fn emulated(operands: &Multiply<'_>, sums: &mut Group) {
        operands.check();
        *sums = [[0.0; GROUP]; GROUP];
        for (m, n) in (0..GROUP * GROUP).map(|i| (i / GROUP, i % GROUP)) {
            for step in 0..operands.depth {
                let (mut evens, mut odds) = (0.0, 0.0);
                for pair in 0..WORDS {
                    let x = operands.x[m * operands.stride + step].0[pair];
                    let w = operands.w[n / WORDS][step * WORDS + pair].0[n % WORDS];
                    evens = fma(evens, low(x), low(w));
                    odds = fma(odds, high(x), high(w));
                }
                sums[m][n] = flushed(sums[m][n] + flushed(evens + odds));
            }
        }
    }

    struct Case {
        x: Vec<f32>,
        w: Vec<f32>,
        depth: usize,
        outputs: usize,
    }

    impl Case {
        fn new(rows: usize, outputs: usize, depth: usize) -> Self {
            let mut state = (rows * 1009 + outputs * 31 + depth) as u32;
            let mut value = || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 8) as f32 / (1 << 23) as f32 - 1.0
            };
            let x = (0..rows * depth).map(|_| value()).collect();
            let w = (0..outputs * depth).map(|_| value()).collect();
            Self { x, w, depth, outputs }
        }

        /// The product of some rows by the loops of this file around the emulation.
        fn product(&self, rows: std::ops::Range<usize>, write: Write, out: &mut [f32]) {
            let kernels = Kernels::new(Level::Portable, 1).unwrap();
            let mut x = Operand::new(Dtype::Bf16);
            // Leaves values in the rows past the end, which must not show.
            kernels.operand(&vec![f32::NAN; 96 * self.depth], self.depth, &mut x);
            let values = &self.x[rows.start * self.depth..rows.end * self.depth];
            kernels.operand(values, self.depth, &mut x);
            let mut w = Matrix::zeros(Dtype::Bf16, self.outputs, self.depth);
            kernels.load_matrix(&self.w, &mut w);
            let bias: Vec<f32> = (0..self.outputs).map(|n| n as f32).collect();
            let p = Product { write, bias: Some(&bias), ..Product::new(&x, &w, 0..self.outputs) };
            let part = Rectangle { rows: 0..rows.len(), blocks: 0..self.outputs.div_ceil(WORDS) };
            let isa = Level::detect().isa().expect("a detected level");
            blocked(isa, &p, &part, &Disjoint::new(out), emulated);
        }
    }

    #[test]
    fn loops_around_the_tiles_agree_with_f64_sums() {
        for (m, n, k) in [(1, 1, 1), (3, 17, 33), (32, 32, 64), (33, 48, 31), (65, 50, 95)] {
            let case = Case::new(m, n, k);
            let mut out = vec![0.5; m * n];
            case.product(0..m, Write::Add, &mut out);
            let at = |values: &[f32], i: usize| f64::from(low(round_bf16(values[i])));
            for (i, &y) in out.iter().enumerate() {
                let sum: f64 =
                    (0..k).map(|j| at(&case.x, i / n * k + j) * at(&case.w, i % n * k + j)).sum();
                let expected = sum + (i % n) as f64 + 0.5;
                assert!((f64::from(y) - expected).abs() < 1e-4, "{m} x {n} x {k}: {y} {expected}");
            }
        }
    }

    #[test]
    fn rows_keep_their_bits_in_every_batch() {
        let (m, n, k) = (70, 37, 45);
        let case = Case::new(m, n, k);
        let mut all = vec![0.0; m * n];
        case.product(0..m, Write::Set, &mut all);
        for rows in [0..1, 3..4, 31..33, 5..69, 69..70, 16..48] {
            let mut out = vec![0.0; rows.len() * n];
            case.product(rows.clone(), Write::Set, &mut out);
            let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&out), bits(&all[rows.start * n..rows.end * n]), "rows {rows:?}");
        }
    }

    #[test]
    fn denormals_are_flushed_as_the_instruction_does() {
        let tiny = f32::from_bits(0x0001_0000);
        let (x, w) = ([Line([tiny.to_bits(); WORDS]); GROUP], [Line([0x3f80_3f80; WORDS]); WORDS]);
        let mut sums = [[1.0; GROUP]; GROUP];
        emulated(&Multiply { x: &x, stride: 1, w: [&w, &w], depth: 1 }, &mut sums);
        assert_eq!(sums, [[0.0; GROUP]; GROUP]);
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn the_configuration_has_eight_full_tiles() {
        let bytes = tiles::Configuration::all_full().0;
        let mut expected = [0; 64];
        expected[0] = 1;
        for tile in 0..8 {
            (expected[16 + 2 * tile], expected[48 + tile]) = (64, 16);
        }
        assert_eq!(bytes, expected);
    }

    /// Where there is AMX, the instructions give the emulation's bits.
    #[cfg(target_arch = "x86_64")]
    #[test]
    fn tiles_agree_with_their_emulation() {
        let Some(token) = Amx::new() else { return };
        let case = Case::new(32, 2, 32 * 7);
        let x: Vec<Line> = (0..32 * 7)
            .map(|i| Line(std::array::from_fn(|j| round_bf16(case.x[i * WORDS + j]) * 0x1_0001)))
            .collect();
        let w: Vec<Line> = (0..16 * 7)
            .map(|i| Line(std::array::from_fn(|j| round_bf16(case.w[(i + j) % 400]) * 0x1_0001)))
            .collect();
        let operands = Multiply { x: &x, stride: 7, w: [&w, &w[..]], depth: 7 };
        let mut sums = [[[0.0; GROUP]; GROUP]; 2];
        tiles::Tiles::new(token).multiply(&operands, &mut sums[0]);
        emulated(&operands, &mut sums[1]);
        assert_eq!(sums[0], sums[1]);
    }
}
