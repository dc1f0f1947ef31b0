//! The bf16 product with AMX tiles: 32 rows by 32 outputs at a time.
//!
//! ```text
//! a group of 32 rows and a panel of 2 blocks (32 outputs):
//!     four 16 x 16 tiles = 0, or what is in out
//!     for each 32 inputs, ascending:            2 tiles of x, 2 of w, 4 tile products
//!         even and odd inputs are summed apart by the instruction, then added to the tile
//!     out = tiles (+ bias)
//!
//! few rows:  for each panel, for each group     weights come from memory: each step asks for a
//!                                               share of the next panel, or, where there is one
//!                                               group, for the weights some steps ahead
//! many rows: for each part of the inputs, for each group, for each panel
//!                                               weights and outputs stay in the second-level cache
//! ```
//! Tiles of the operand that the inner loop changes are loaded by `tileloaddt1`, which leaves the other
//! one's in the first-level cache.
//!
//! An operand's rows are allocated in multiples of 32, so a group may run past the last row; what it
//! computes there is dropped. An odd last block is multiplied twice and the copy dropped. Both keep
//! one tile shape, hence one order of summation, for every size. The `asm!` functions in
//! [`tiles`] are the only part that needs the processor: [`Multiply`] states their contract,
//! and the tests run everything else on an emulation of it. Leaves out f32 (AVX-512 does that).

#[cfg(target_arch = "x86_64")]
pub(crate) mod tiles;

use super::Write;
use super::buffer::{Line, WORDS};
use super::gated::Gated;
use super::product::{Product, Rectangle};
use crate::cpu::{Amx, Isa};
use crate::disjoint::Disjoint;
use crate::prefetch;
use crate::simd::{Job, Simd};

/// Rows and outputs of a group of tiles.
pub(super) const GROUP: usize = 2 * WORDS;
/// Rows up to which each panel goes past all of them before the next: more take longer to multiply than
/// the panel takes to come from memory.
pub(super) const FEW_ROWS: usize = 4 * GROUP;
/// Steps of which 32 rows stay in the first-level cache while panels pass.
const MOST_STEPS: usize = 18;

/// Steps that many rows multiply at a time, of `depth`; their sums wait in the output.
pub(super) fn steps_of_part(depth: usize) -> usize {
    depth.div_ceil(depth.div_ceil(MOST_STEPS).max(1)).max(1)
}

/// The outputs of a group, row-major, two lines a row.
#[repr(C, align(64))]
struct Group([[f32; GROUP]; GROUP]);

/// The product of up to 32 rows and two blocks of 16 outputs.
pub(crate) struct Multiply<'a> {
    /// Lines of 32 inputs.
    pub(crate) x: Rows<'a>,
    /// 16 rows each, of 16 outputs, a row for each pair of inputs.
    pub(crate) w: [Rows<'a>; 2],
    /// Steps of 32 inputs.
    pub(crate) depth: usize,
    /// What to ask for meanwhile.
    pub(crate) ahead: Ahead,
    /// The operand that the next product does not have.
    pub(crate) passing: Passing,
}

/// What a product asks for beside its steps; there need not be memory.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Ahead {
    Nothing,
    /// From there on this many lines a step, into the second-level cache: its share of what many groups of
    /// rows will read.
    Share(*const Line, usize),
    /// Its own blocks of w some steps ahead, then those that begin there, into the first-level cache: what
    /// is read once.
    Stream([*const Line; 2]),
}

/// An operand whose tiles are to leave those of the other one in the first-level cache.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Passing {
    X,
    W,
}

/// Rows that tiles are loaded from: row `r` at step `k` is line `r * row + k * step`.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a> {
    pub(crate) lines: &'a [Line],
    pub(crate) row: usize,
    pub(crate) step: usize,
}

impl Rows<'_> {
    /// What makes the pointers of the tile loads stay inside the slice.
    fn check(&self, rows: usize, depth: usize) {
        let last = (rows - 1) * self.row + depth.saturating_sub(1) * self.step;
        assert!(depth == 0 || self.lines.len() > last, "line {last} of {}", self.lines.len());
    }
}

impl<'a> Multiply<'a> {
    /// One that asks for nothing meanwhile.
    pub(crate) fn of(x: Rows<'a>, w: [Rows<'a>; 2], depth: usize) -> Self {
        Self { x, w, depth, ahead: Ahead::Nothing, passing: Passing::W }
    }

    fn new(p: &Product<'a>, x: Rows<'a>, blocks: [usize; 2]) -> Self {
        let w = blocks.map(|block| Rows { lines: p.block(block), row: 1, step: WORDS });
        Self::of(x, w, p.block_lines / WORDS)
    }

    fn check(&self, rows: usize) {
        self.x.check(rows, self.depth);
        self.w.iter().for_each(|w| w.check(WORDS, self.depth));
    }
}

/// Where a group's outputs go: rows of two lines, `stride` elements apart.
#[derive(Clone, Copy)]
pub(crate) struct Target {
    pub(crate) to: *mut f32,
    pub(crate) stride: usize,
    /// What happens to what is there: with [`Write::Add`] the sum begins with it.
    pub(crate) write: Write,
}

/// Computes a rectangle of the output.
pub(super) fn rectangle(token: Amx, p: &Product<'_>, part: &Rectangle, out: &Disjoint<'_, f32>) {
    #[cfg(target_arch = "x86_64")]
    {
        let tiles = p.tiles(token, part);
        let multiply = &|multiply: &Multiply<'_>, to: &Target, mut ask: AskForOutputs| {
            // SAFETY: `Blocked` gives targets that are its own.
            unsafe { tiles.multiply_beside(multiply, to, &mut ask) };
        };
        if let Some(stored) = p.stored.filter(|_| part.rows.len() <= GROUP) {
            let (x, mut sums) = (Rows::group(p, part.rows.start), Group::ZERO);
            for block in part.blocks.clone().step_by(2) {
                let last = part.blocks.end.min(block + 2) - 1;
                let product = |to: &Target| {
                    // SAFETY: `write_group` gives targets that are its own.
                    unsafe { stored.multiply(token, &tiles, x, [block, last], to) };
                };
                let how = (p.write, p.bias);
                let place = (part.rows.clone(), block..last + 1);
                write_group(p, out, &product, place, how, &mut sums);
            }
            return;
        }
        p.with_weights(token, part, None, |p, part, _| {
            Blocked { p, out, multiply }.rectangle(part);
        });
    }
    #[cfg(not(target_arch = "x86_64"))]
    super::avx512::rectangle(token.avx512, p, part, out);
}

#[cfg(target_arch = "x86_64")]
impl Product<'_> {
    /// Configures this thread's tiles for a rectangle.
    fn tiles(&self, token: Amx, part: &Rectangle) -> tiles::Tiles {
        match part.rows.len() {
            1 if self.stored.is_some() => tiles::Tiles::by_rows(token),
            rows => tiles::Tiles::of_rows(token, rows.min(GROUP)),
        }
    }
}

/// The loops around `multiply`, which writes a group's products to a target and meanwhile asks for the
/// outputs of the next one.
struct Blocked<'a, F> {
    p: &'a Product<'a>,
    out: &'a Disjoint<'a, f32>,
    multiply: F,
}

/// A group of a rectangle.
struct Place<'a> {
    x: Rows<'a>,
    /// The first of its rows and of its two blocks.
    row: usize,
    block: usize,
    /// Where there are a few groups of rows, each asks for its share of the next panel: the first line of
    /// it and how many at each step.
    share: Option<(usize, usize)>,
    /// Whether there is one group of rows only, past which all panels stream.
    alone: bool,
    /// Whether another panel follows.
    more: bool,
}

impl<'a> Place<'a> {
    /// All groups of `part`, in the order that this file begins with.
    fn all(p: &'a Product<'a>, part: &Rectangle) -> impl Iterator<Item = Self> {
        let (first_row, first_block) = (part.rows.start, part.blocks.start);
        let (rows, panels) = (part.rows.len().div_ceil(GROUP), part.blocks.len().div_ceil(2));
        let few = part.rows.len() <= FEW_ROWS;
        (0..rows * panels).map(move |i| {
            let (row, panel) = if few { (i % rows, i / rows) } else { (i / panels, i % panels) };
            let (lines, more) = (GROUP.div_ceil(rows), panel + 1 < panels);
            let share =
                (few && rows > 1 && more).then(|| (row * lines * p.block_lines / WORDS, lines));
            let (row, block) = (first_row + row * GROUP, first_block + 2 * panel);
            Self { x: Rows::group(p, row), row, block, share, alone: rows == 1, more }
        })
    }
}

impl<'a> Rows<'a> {
    /// The group of rows from `row` on.
    fn group(p: &'a Product<'a>, row: usize) -> Self {
        Self { lines: &p.x[row * p.stride..][..GROUP * p.stride], row: p.stride, step: 1 }
    }

    /// What is behind the first `steps` steps.
    fn after(self, steps: usize) -> Self {
        Self { lines: &self.lines[steps * self.step..], ..self }
    }
}

/// Asks for the outputs of a group, which are to be written: a few of its rows of two lines at each step.
#[derive(Clone, Copy)]
struct AskForOutputs {
    to: *const f32,
    stride: usize,
    rows: usize,
    share: usize,
}

impl AskForOutputs {
    const NOTHING: Self = Self { to: std::ptr::null(), stride: 0, rows: 0, share: 0 };
}

impl Beside for AskForOutputs {
    #[inline(always)]
    fn step(&mut self) {
        for _ in 0..self.share.min(self.rows) {
            prefetch::near(self.to);
            prefetch::near(self.to.wrapping_add(WORDS));
            self.to = self.to.wrapping_add(self.stride);
        }
        self.rows = self.rows.saturating_sub(self.share);
    }
}

impl<F: Fn(&Multiply<'_>, &Target, AskForOutputs)> Blocked<'_, F> {
    fn rectangle(&self, part: &Rectangle) {
        if part.rows.len() > FEW_ROWS {
            return self.many_rows(part);
        }
        let mut sums = Group::ZERO;
        for Place { x, row, block, share, alone, more } in Place::all(self.p, part) {
            let blocks = 2.min(part.blocks.end - block);
            let mut multiply = Multiply::new(self.p, x, [block, block + blocks - 1]);
            let next = multiply.w.map(|w| w.lines.as_ptr().wrapping_add(2 * self.p.block_lines));
            match share {
                Some((skip, lines)) => {
                    multiply.ahead = Ahead::Share(next[0].wrapping_add(skip), lines);
                }
                None if alone && more => multiply.ahead = Ahead::Stream(next),
                None => {}
            }
            if !alone {
                multiply.passing = Passing::X;
            }
            let (write, bias) = (self.p.write, self.p.bias);
            let place = (row..part.rows.end, block..block + blocks);
            let product = |to: &Target| (self.multiply)(&multiply, to, AskForOutputs::NOTHING);
            write_group(self.p, self.out, &product, place, (write, bias), &mut sums);
        }
    }

    /// Rows of more inputs than stay in the first-level cache go past the panels in parts, whose sums
    /// wait in the output.
    fn many_rows(&self, part: &Rectangle) {
        let depth = self.p.block_lines / WORDS;
        let steps = steps_of_part(depth);
        let groups = || part.rows.clone().step_by(GROUP);
        let mut sums = Group::ZERO;
        for (from, row) in
            (0..depth.max(1)).step_by(steps).flat_map(|from| groups().map(move |row| (from, row)))
        {
            let x = Rows::group(self.p, row).after(from);
            let write = if from == 0 { self.p.write } else { Write::Add };
            let bias = self.p.bias.filter(|_| from + steps >= depth);
            for block in part.blocks.clone().step_by(2) {
                let blocks = 2.min(part.blocks.end - block);
                let all = Multiply::new(self.p, x, [block, block + blocks - 1]);
                let w = all.w.map(|w| w.after(from));
                let multiply = Multiply::of(x, w, steps.min(depth - from));
                let ask = match block + 2 < part.blocks.end {
                    true => self.ask(part, row, block + 2, multiply.depth),
                    false => self.ask(part, row + GROUP, part.blocks.start, multiply.depth),
                };
                let place = (row..part.rows.end, block..block + blocks);
                let product = |to: &Target| (self.multiply)(&multiply, to, ask);
                write_group(self.p, self.out, &product, place, (write, bias), &mut sums);
            }
        }
    }

    /// Asks for the outputs of the group that begins there, in so many steps.
    fn ask(&self, part: &Rectangle, row: usize, block: usize, steps: usize) -> AskForOutputs {
        let rows = GROUP.min(part.rows.end.saturating_sub(row));
        let to = self.out.address(self.p.place(row, block, 2).start);
        AskForOutputs { to, stride: self.p.outputs, rows, share: GROUP.div_ceil(steps.max(1)) }
    }
}

/// Computes a group by `product`, which writes to the target that it is given, and writes what of it there is:
/// at once, or by way of `sums`.
fn write_group(
    p: &Product<'_>,
    out: &Disjoint<'_, f32>,
    product: &impl Fn(&Target),
    (rows, blocks): (std::ops::Range<usize>, std::ops::Range<usize>),
    (write, bias): (Write, Option<&[f32]>),
    sums: &mut Group,
) {
    let place = |row: usize| p.place(row, blocks.start, blocks.len());
    let first = place(rows.start);
    if rows.len() >= GROUP && first.len() == GROUP && bias.is_none() {
        let to = out.pointer(first.start, place(rows.start + GROUP - 1).end);
        return product(&Target { to, stride: p.outputs, write });
    }
    let rows = rows.take(GROUP).map(|row| {
        let place = place(row);
        // SAFETY: no other task has outputs of this row and these blocks.
        unsafe { out.part(place.start, place.end) }
    });
    if write == Write::Add {
        rows.clone().zip(&mut sums.0).for_each(|(to, sums)| {
            sums[..to.len()].copy_from_slice(to);
        });
    }
    product(&Target { write, ..sums.target() });
    for (to, sums) in rows.zip(&sums.0) {
        match bias {
            Some(bias) => {
                let bias = &bias[blocks.start * WORDS..][..to.len()];
                let sums = sums.iter().zip(bias).map(|(sum, bias)| sum + bias);
                to.iter_mut().zip(sums).for_each(|(to, sum)| *to = sum);
            }
            None => to.copy_from_slice(&sums[..to.len()]),
        }
    }
}

impl Group {
    const ZERO: Self = Self([[0.0; GROUP]; GROUP]);

    /// All of it, to be set.
    fn target(&mut self) -> Target {
        Target { to: self.0.as_mut_ptr().cast(), stride: GROUP, write: Write::Set }
    }
}

/// Computes a rectangle of `swiglu`: `part` counts blocks of gates, with those of `up` the same number of
/// blocks further on. Writes rows of `out` in lines of two blocks, which are this task's.
pub(super) fn gated_rectangle(token: Amx, gated: &Gated<'_>, part: &Rectangle) {
    #[cfg(target_arch = "x86_64")]
    {
        let tiles = gated.product.tiles(token, part);
        gated.product.with_weights(token, part, Some(gated.gates), |product, part, ups| {
            let ups = ups.unwrap_or(gated.gates);
            let tiles = &tiles;
            Isa::Amx(token).vectorize(GatedRectangle { token, tiles, product, ups, gated, part });
        });
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (token, gated, part);
}

/// A rectangle of it, two blocks of gates at a time, which make a line of every row of the output.
///
/// ```text
/// for each group:  multiply its gates and ups; beside each step activate a row of the last group
/// ```
#[cfg(target_arch = "x86_64")]
struct GatedRectangle<'a> {
    token: Amx,
    tiles: &'a tiles::Tiles,
    product: &'a Product<'a>,
    /// Blocks from a gate to its up.
    ups: usize,
    gated: &'a Gated<'a>,
    part: &'a Rectangle,
}

#[cfg(target_arch = "x86_64")]
impl Job for GatedRectangle<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let Self { token, tiles, product: p, ups, gated, part } = self;
        let share = match p.stored {
            Some(_) => GROUP,
            None => GROUP.div_ceil(2 * (p.block_lines / WORDS).max(1)),
        };
        let mut sums = [const { [Group::ZERO, Group::ZERO] }; 2];
        let [mut now, mut last] = sums.each_mut();
        let mut rows = 0..0;
        let mut line = 0;
        for Place { x, row, block, share: ahead, alone, more } in Place::all(p, part) {
            let mut activation = Activation { s, gated, sums: last, rows, line, done: 0, share };
            for (half, sums) in now.iter_mut().enumerate() {
                let blocks = [block + half, ups + block + half];
                if let Some(stored) = p.stored {
                    // SAFETY: the target is a whole group.
                    unsafe { stored.multiply(token, tiles, x, blocks, &sums.target()) };
                    continue;
                }
                let mut multiply = Multiply::new(p, x, blocks);
                let next = multiply.w.map(|w| w.lines.as_ptr().wrapping_add(p.block_lines));
                match ahead {
                    Some((skip, lines)) => {
                        // The first half asks for the next gates, the second for what they let through.
                        let next = p.block(half * ups + block + 2).as_ptr();
                        multiply.ahead = Ahead::Share(next.wrapping_add(skip), lines);
                    }
                    None if alone && (half == 0 || more) => multiply.ahead = Ahead::Stream(next),
                    None => {}
                }
                // SAFETY: the target is a whole group.
                unsafe { tiles.multiply_beside(&multiply, &sums.target(), &mut activation) };
            }
            if p.stored.is_some() {
                activation.step();
            }
            debug_assert_eq!(activation.done, activation.rows.len(), "rows activated");
            std::mem::swap(&mut now, &mut last);
            (rows, line) = (row..part.rows.end.min(row + GROUP), block / 2);
        }
        let share = rows.len();
        Activation { s, gated, sums: last, rows, line, done: 0, share }.step();
    }
}

/// What is done beside the steps of a product: in registers, since the tiles keep memory busy.
pub(crate) trait Beside {
    /// A step's share. Mark it with `#[inline(always)]`.
    fn step(&mut self);
}

impl Beside for () {
    #[inline(always)]
    fn step(&mut self) {}
}

/// Rounds `silu(gate) * up` of a group into a line of each of its rows. The sums of two blocks are given,
/// each as its gates and its ups.
#[cfg(target_arch = "x86_64")]
struct Activation<'a, S> {
    s: S,
    gated: &'a Gated<'a>,
    sums: &'a [Group; 2],
    rows: std::ops::Range<usize>,
    line: usize,
    /// Rows that are done, and those of a step.
    done: usize,
    share: usize,
}

#[cfg(target_arch = "x86_64")]
impl<S: Simd> Beside for Activation<'_, S> {
    #[inline(always)]
    fn step(&mut self) {
        let s = self.s;
        for r in self.done..self.rows.len().min(self.done + self.share) {
            let [mut gates, mut ups] = [[s.splat(0.0); 2]; 2];
            for (half, sums) in self.sums.iter().enumerate() {
                let [gate, up] = [0, 1].map(|i| s.load(&sums.0[r].as_chunks::<WORDS>().0[i]));
                (gates[half], ups[half]) = (gate, up);
            }
            // SAFETY: the line is this task's.
            unsafe { self.gated.set_line(s, (self.rows.start + r, self.line), gates, ups) };
            self.done += 1;
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
    fn emulated(operands: &Multiply<'_>, to: &Target) {
        operands.check(GROUP);
        let Rows { lines, row, step: next } = operands.x;
        for (m, n) in (0..GROUP * GROUP).map(|i| (i / GROUP, i % GROUP)) {
            // SAFETY: a target has 32 rows of 32 elements.
            let to_element = unsafe { &mut *to.to.wrapping_add(m * to.stride + n) };
            let mut sum = if to.write == Write::Add { *to_element } else { 0.0 };
            for step in 0..operands.depth {
                let (mut evens, mut odds) = (0.0, 0.0);
                for pair in 0..WORDS {
                    let x = lines[m * row + step * next].0[pair];
                    let w = &operands.w[n / WORDS];
                    let w = w.lines[step * w.step + pair * w.row].0[n % WORDS];
                    evens = fma(evens, low(x), low(w));
                    odds = fma(odds, high(x), high(w));
                }
                sum = flushed(sum + flushed(evens + odds));
            }
            *to_element = sum;
        }
    }

    fn target(sums: &mut [[f32; GROUP]; GROUP]) -> Target {
        Target { to: sums.as_mut_ptr().cast(), stride: GROUP, write: Write::Set }
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
            let out = &Disjoint::new(out);
            let multiply = |multiply: &Multiply<'_>, to: &Target, _| emulated(multiply, to);
            Blocked { p: &p, out, multiply }.rectangle(&part);
        }
    }

    #[test]
    fn loops_around_the_tiles_agree_with_f64_sums() {
        for (m, n, k) in
            [(1, 1, 1), (3, 17, 33), (32, 32, 64), (33, 48, 31), (65, 50, 95), (163, 50, 95)]
        {
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
        let (m, n, k) = (150, 37, 45);
        let case = Case::new(m, n, k);
        let mut all = vec![0.0; m * n];
        case.product(0..m, Write::Set, &mut all);
        for rows in [0..1, 3..4, 31..33, 5..69, 69..70, 16..48, 16..149] {
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
        let x = Rows { lines: &x, row: 1, step: 1 };
        let w = Rows { lines: &w, row: 1, step: WORDS };
        emulated(&Multiply::of(x, [w, w], 1), &target(&mut sums));
        assert_eq!(sums, [[0.0; GROUP]; GROUP]);
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn the_configuration_has_eight_full_tiles() {
        let bytes = tiles::Configuration::of_rows(GROUP).0;
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
        let Some(token) = Amx::new() else {
            println!("left out: this processor has no AMX");
            return;
        };
        let case = Case::new(32, 2, 32 * 7);
        let x: Vec<Line> = (0..32 * 7)
            .map(|i| Line(std::array::from_fn(|j| round_bf16(case.x[i * WORDS + j]) * 0x1_0001)))
            .collect();
        let w: Vec<Line> = (0..16 * 7)
            .map(|i| Line(std::array::from_fn(|j| round_bf16(case.w[(i + j) % 400]) * 0x1_0001)))
            .collect();
        let held = tiles::Tiles::new(token);
        let next = w.as_ptr();
        let cases = [
            ((7, 1), Ahead::Nothing),
            ((1, 32), Ahead::Share(next, 8)),
            ((7, 1), Ahead::Share(next, 16)),
            ((7, 1), Ahead::Stream([next; 2])),
        ];
        for (((row, step), ahead), passing) in cases
            .into_iter()
            .flat_map(|case| [Passing::X, Passing::W].map(|passing| (case, passing)))
        {
            let x = Rows { lines: &x, row, step };
            let w = Rows { lines: &w, row: 1, step: WORDS };
            let operands = Multiply { ahead, passing, ..Multiply::of(x, [w, w], 7) };
            let mut sums = [[[0.0; GROUP]; GROUP]; 2];
            // SAFETY: the target is all of the sums.
            unsafe { held.multiply(&operands, &target(&mut sums[0])) };
            emulated(&operands, &target(&mut sums[1]));
            assert_eq!(sums[0], sums[1]);
        }
    }
}
