//! The `asm!` that multiplies with AMX tiles, and what holds them: see the file above for how they are used.
//!
//! Tiles 0 to 3 are sums, 4 and 5 rows of x, 6 and 7 weights. Leaves out loops over groups and panels, and every
//! decision.

use std::arch::asm;
use std::marker::PhantomData;

use super::{Ahead, Amx, Beside, GROUP, Line, Multiply, Passing, Rows, Target, WORDS, Write};

/// Steps that a stream is asked for ahead: what memory takes to answer at the rate of the tiles.
const STEPS_AHEAD: usize = 6;

/// Pairs of inputs in a step of [`Tiles::multiply_pairs`].
const PAIRS: usize = WORDS / 2;

/// Eight tiles of up to 16 rows by 64 bytes, held by this thread while this value lives.
///
/// Bound to its thread: the configuration is the thread's. What tiles hold lasts from one `asm!` to the
/// next, since compiled code never uses them.
pub(crate) struct Tiles {
    /// Rows of x and of the sums.
    rows: usize,
    /// Pairs of inputs in a step.
    pairs: usize,
    /// Whether the left operand is weights, and x one row.
    by_rows: bool,
    thread: PhantomData<*const ()>,
}

/// The operand of `ldtilecfg`: palette 1; bytes per row from byte 16 on, rows from byte 48 on.
#[repr(C, align(64))]
pub(super) struct Configuration(pub(super) [u8; 64]);

impl Configuration {
    /// For products of that many rows, from 1 to 32: those of the sums 0 to 3 and of x, 4 and 5.
    pub(super) const fn of_rows(rows: usize) -> Self {
        Self::of(rows, WORDS)
    }

    /// For [`Tiles::by_rows`]: of the sums, 0 and 1, and of x, 4; weights are 6 and 7.
    const BY_ROWS: Self = {
        let mut all = Self::of(WORDS, WORDS);
        let mut tile = 0;
        while tile < 6 {
            all.0[16 + 2 * tile] = 4;
            tile += 1;
        }
        all
    };

    /// Of that many rows of x and pairs of inputs a step.
    const fn of(rows: usize, pairs: usize) -> Self {
        let upper = if rows < WORDS { rows } else { WORDS };
        let lower = if rows > WORDS { rows - WORDS } else { upper };
        let rows = [upper, upper, lower, lower, upper, lower, pairs, pairs];
        let mut bytes = [0; 64];
        bytes[0] = 1;
        let mut tile = 0;
        while tile < 8 {
            let x = tile == 4 || tile == 5;
            bytes[16 + 2 * tile] = if x { 4 * pairs as u8 } else { 64 };
            bytes[48 + tile] = rows[tile] as u8;
            tile += 1;
        }
        Self(bytes)
    }
}

impl Tiles {
    /// Configures this thread's tiles for groups of 32 rows.
    pub(crate) fn new(token: Amx) -> Self {
        Self::of_rows(token, GROUP)
    }

    /// Configures this thread's tiles for products of `rows` rows, 1 to 32.
    pub(crate) fn of_rows(_token: Amx, rows: usize) -> Self {
        assert!((1..=GROUP).contains(&rows), "{rows} rows of tiles");
        // SAFETY: the token proves AMX; the configuration is valid for palette 1.
        unsafe { configure(&Configuration::of_rows(rows)) };
        Self { rows, pairs: WORDS, by_rows: false, thread: PhantomData }
    }

    /// Configures this thread's tiles for one row of x, which weights are multiplied by that lie in rows:
    /// the sums of 16 of them are the 16 rows of a tile of one column.
    pub(crate) fn by_rows(_token: Amx) -> Self {
        // SAFETY: the token proves AMX; the configuration is valid for palette 1.
        unsafe { configure(&Configuration::BY_ROWS) };
        Self { rows: 1, pairs: WORDS, by_rows: true, thread: PhantomData }
    }

    /// Configures this thread's tiles for [`Self::multiply_pairs`] with `rows` rows.
    pub(crate) fn of_pairs(_token: Amx, rows: usize) -> Self {
        assert!((1..=GROUP).contains(&rows), "{rows} rows of tiles");
        // SAFETY: the token proves AMX; the configuration is valid for palette 1.
        unsafe { configure(&Configuration::of(rows, PAIRS)) };
        Self { rows, pairs: PAIRS, by_rows: false, thread: PhantomData }
    }

    /// # Safety
    /// The target's rows, as many as configured, of 32 elements may be written.
    pub(crate) unsafe fn multiply(&self, operands: &Multiply<'_>, to: &Target) {
        // SAFETY: as promised.
        unsafe { self.multiply_beside(operands, to, &mut ()) };
    }

    /// Does something else beside each step.
    ///
    /// # Safety
    /// As [`Self::multiply`].
    #[inline(always)]
    pub(crate) unsafe fn multiply_beside(
        &self,
        operands: &Multiply<'_>,
        to: &Target,
        beside: &mut impl Beside,
    ) {
        operands.check(self.rows);
        assert!(!self.by_rows, "tiles of weights by rows");
        assert_eq!(self.pairs, WORDS, "pairs of inputs in a step");
        macro_rules! products {
            ($share:literal, $stream:literal, $both:literal, $x:literal) => {
                // SAFETY: the tiles are configured; `check` holds for the operands; promised for
                // the target.
                unsafe { products::<$share, $stream, $both, $x>(operands, to, beside) }
            };
        }
        let x_passes = operands.passing == Passing::X;
        match (operands.ahead, self.rows > WORDS, x_passes) {
            (Ahead::Nothing, true, true) => products!(0, false, true, true),
            (Ahead::Nothing, true, false) => products!(0, false, true, false),
            (Ahead::Nothing, false, _) => products!(0, false, false, false),
            (Ahead::Share(_, ..=8), true, true) => products!(8, false, true, true),
            (Ahead::Share(_, ..=8), true, false) => products!(8, false, true, false),
            (Ahead::Share(..), true, true) => products!(16, false, true, true),
            (Ahead::Share(..), true, false) => products!(16, false, true, false),
            (Ahead::Share(..), false, _) => products!(16, false, false, false),
            (Ahead::Stream(_), true, _) => products!(0, true, true, false),
            (Ahead::Stream(_), false, _) => products!(0, true, false, false),
        }
    }
}

impl Tiles {
    /// The product of half a line of `x` a step, 16 inputs, and 8 pairs of these, of which each `w` holds
    /// 32 outputs a row, `row` words apart: `to[m][n] = sum over w, i of x[m][2i] w[i][n][0] +
    /// x[m][2i + 1] w[i][n][1]`, in the order of [`Self::multiply`].
    ///
    /// # Safety
    /// The target's rows, as many as configured, of 32 elements may be written.
    pub(crate) unsafe fn multiply_pairs<'a>(
        &self,
        x: Rows<'_>,
        (w, row): (impl ExactSizeIterator<Item = &'a [u32]>, usize),
        to: &Target,
        beside: &mut impl Beside,
    ) {
        x.check(self.rows, w.len().div_ceil(2));
        assert_eq!(self.pairs, PAIRS, "pairs of inputs in a step");
        if self.rows > WORDS {
            // SAFETY: the tiles are configured, x is checked; promised for the target.
            unsafe { products_of_pairs::<true>(x, (w, row), to, beside) };
        } else {
            // SAFETY: as above.
            unsafe { products_of_pairs::<false>(x, (w, row), to, beside) };
        }
    }
}

impl Tiles {
    /// Begins a product whose weights are given step by step.
    ///
    /// # Safety
    /// Until it ends, the target's rows, as many as configured, of 32 elements may be written, and nothing
    /// else uses tiles.
    #[inline(always)]
    pub(crate) unsafe fn begin<'a>(&'a self, x: Rows<'a>, steps: usize, to: &Target) -> Steps<'a> {
        x.check(self.rows, steps);
        assert_eq!(self.pairs, WORDS, "pairs of inputs in a step");
        let shape = match (self.by_rows, self.rows > WORDS) {
            (true, _) => Shape::ByRows,
            (false, true) => Shape::Two,
            (false, false) => Shape::One,
        };
        let to = match shape {
            // The sums of a row of x lie one below the other in their tiles.
            Shape::ByRows => Target { stride: 1, ..*to },
            Shape::One | Shape::Two => *to,
        };
        match shape {
            // SAFETY: promised.
            Shape::Two => unsafe { begin::<true>(&to) },
            // SAFETY: promised.
            Shape::ByRows | Shape::One => unsafe { begin::<false>(&to) },
        }
        Steps { x, at: 0, steps, shape, to }
    }
}

/// A product that is under way.
pub(crate) struct Steps<'a> {
    x: Rows<'a>,
    /// Steps that are done, and all of them.
    at: usize,
    steps: usize,
    shape: Shape,
    to: Target,
}

/// What the tiles of a product are.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Shape {
    /// Up to 16 rows of x by 32 outputs.
    One,
    /// Up to 32.
    Two,
    /// 32 rows of weights by a row of x.
    ByRows,
}

impl Steps<'_> {
    /// Whether a line of weights is 32 inputs of a row, for one row of x.
    pub(crate) fn by_rows(&self) -> bool {
        self.shape == Shape::ByRows
    }

    /// Adds the products of 32 inputs and two blocks of weights, a line of which is a pair of inputs of all
    /// rows, or a row.
    #[inline(always)]
    pub(crate) fn step(&mut self, w: &[[Line; WORDS]; 2]) {
        assert!(self.at < self.steps, "step {} of {}", self.at, self.steps);
        let x0 = self.x.lines.as_ptr().wrapping_add(self.at * self.x.step);
        let x = [x0, x0.wrapping_add(WORDS * self.x.row)];
        let w = [w[0].as_ptr(), w[1].as_ptr()];
        let rows = [self.x.row, 1].map(|row| row * size_of::<Line>());
        match self.shape {
            // SAFETY: the tiles are this product's; x was checked for all steps.
            Shape::ByRows => unsafe { step_by_rows(x0, w) },
            // SAFETY: as above.
            Shape::Two => unsafe { step::<0, false, true, false>(x, w, w, rows) },
            // SAFETY: as above.
            Shape::One => unsafe { step::<0, false, false, false>(x, w, w, rows) },
        }
        self.at += 1;
    }

    /// Writes the sums.
    #[inline(always)]
    pub(crate) fn end(self) {
        match self.shape {
            // SAFETY: promised when it began.
            Shape::Two => unsafe { end::<true>(&self.to) },
            // SAFETY: as above.
            Shape::ByRows | Shape::One => unsafe { end::<false>(&self.to) },
        }
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

/// A tile's load; if the flag is set, the one that leaves what it reads out of the first-level cache.
macro_rules! load {
    ($tile:literal, $passes:literal) => {
        concat!(
            ".if {",
            $passes,
            "}\ntileloaddt1 ",
            $tile,
            "\n.else\ntileloadd ",
            $tile,
            "\n.endif"
        )
    };
}

/// Sets the sums, tiles 0 to 3, to zero or to what is in the target.
///
/// # Safety
/// This thread holds [`Tiles`], and the target may be read.
#[inline(always)]
unsafe fn begin<const BOTH: bool>(target: &Target) {
    if target.write == Write::Set {
        // SAFETY: no compiled code uses tiles.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                options(nostack, nomem),
            );
        }
        return;
    }
    // SAFETY: no compiled code uses tiles; the rows of the target are there.
    unsafe {
        asm!(
            "tileloadd tmm0, [{upper} + {stride}*1]",
            "tileloadd tmm1, [{upper} + {stride}*1 + 64]",
            ".if {both}",
            "tileloadd tmm2, [{lower} + {stride}*1]",
            "tileloadd tmm3, [{lower} + {stride}*1 + 64]",
            ".endif",
            both = const BOTH as usize,
            upper = in(reg) target.to,
            lower = in(reg) target.to.wrapping_add(WORDS * target.stride),
            stride = in(reg) target.stride * size_of::<f32>(),
            options(nostack, readonly),
        );
    }
}

/// `to[m][n] = sum over i, pairs of inputs, of x[m][2i] w[i][n][0] + x[m][2i + 1] w[i][n][1]`,
/// 16 pairs at a time: the evens of these and the odds of these are each summed in ascending
/// order by fused multiply-adds that flush denormals, then both, then added to the tile. `SHARE` and
/// `STREAM` are those of `ahead`; `BOTH` says that there are rows from the 16th on, `X` that x passes.
///
/// # Safety
/// This thread holds [`Tiles`], [`Multiply::check`] passes, and the target may be written.
#[inline(always)]
unsafe fn products<const SHARE: usize, const STREAM: bool, const BOTH: bool, const X: bool>(
    operands: &Multiply<'_>,
    target: &Target,
    beside: &mut impl Beside,
) {
    // SAFETY: promised.
    unsafe { begin::<BOTH>(target) };
    let (x, [w, other]) = (operands.x, operands.w);
    let line = size_of::<Line>();
    let rows = [x.row * line, w.row * line];
    let (mut x0, mut w0, mut w1) = (x.lines.as_ptr(), w.lines.as_ptr(), other.lines.as_ptr());
    let mut x1 = x0.wrapping_add(WORDS * x.row);
    let (mut next, then) = match operands.ahead {
        Ahead::Nothing => ([w0; 2], [w0; 2]),
        Ahead::Share(next, _) => ([next; 2], [next; 2]),
        Ahead::Stream(then) => ([w0, w1].map(|at| at.wrapping_add(STEPS_AHEAD * w.step)), then),
    };
    // From here on it is what follows that is asked for.
    let own = operands.depth.saturating_sub(STEPS_AHEAD);
    for k in 0..operands.depth {
        if STREAM && k == own {
            next = then;
        }
        // SAFETY: by `check`, every load stays inside the slices.
        unsafe { step::<SHARE, STREAM, BOTH, X>([x0, x1], [w0, w1], next, rows) };
        (x0, x1) = (x0.wrapping_add(x.step), x1.wrapping_add(x.step));
        (w0, w1) = (w0.wrapping_add(w.step), w1.wrapping_add(w.step));
        next = next.map(|next| next.wrapping_add(if STREAM { w.step } else { SHARE }));
        beside.step();
    }
    // SAFETY: promised.
    unsafe { end::<BOTH>(target) };
}

/// [`Tiles::multiply_pairs`]; `BOTH` says that there are rows from the 16th on.
///
/// # Safety
/// This thread holds [`Tiles`] of pairs, x has half a line for each `w`, and the target may be written.
#[inline(always)]
unsafe fn products_of_pairs<'a, const BOTH: bool>(
    x: Rows<'_>,
    (w, row): (impl Iterator<Item = &'a [u32]>, usize),
    target: &Target,
    beside: &mut impl Beside,
) {
    // SAFETY: promised.
    unsafe { begin::<BOTH>(target) };
    let rows = [x.row * size_of::<Line>(), row * size_of::<u32>()];
    let mut x0 = x.lines.as_ptr();
    for w in w {
        let w = w[..(PAIRS - 1) * row + GROUP].as_ptr().cast::<Line>();
        let x = [x0, x0.wrapping_add(WORDS * x.row)];
        // SAFETY: promised for x; the slice holds all that is read of w.
        unsafe { step::<0, false, BOTH, false>(x, [w, w.wrapping_add(1)], [w; 2], rows) };
        x0 = x0.wrapping_byte_add(size_of::<Line>() / 2);
        beside.step();
    }
    // SAFETY: promised.
    unsafe { end::<BOTH>(target) };
}

/// Adds the products of a step to the sums; asks for `SHARE` lines from `next` on, or, to `STREAM`, for a
/// step of both blocks. Rows lie that many bytes apart.
///
/// # Safety
/// This thread holds [`Tiles`], and all tiles can be read; prefetches may be given any address.
#[inline(always)]
unsafe fn step<const SHARE: usize, const STREAM: bool, const BOTH: bool, const X: bool>(
    [x0, x1]: [*const Line; 2],
    [w0, w1]: [*const Line; 2],
    [next, other]: [*const Line; 2],
    [x_row, w_row]: [usize; 2],
) {
    // SAFETY: promised; no compiled code uses tiles.
    unsafe {
        asm!(
            load!("tmm6, [{w0} + {w_row}*1]", "w_passes"),
            load!("tmm4, [{x0} + {x_row}*1]", "x_passes"),
            "tdpbf16ps tmm0, tmm4, tmm6",
            load!("tmm7, [{w1} + {w_row}*1]", "w_passes"),
            "tdpbf16ps tmm1, tmm4, tmm7",
            ".if {both}",
            load!("tmm5, [{x1} + {x_row}*1]", "x_passes"),
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            ".endif",
            ".rept {share}",
            "prefetcht1 [{next}]", "add {next}, 64",
            ".endr",
            ".rept {stream}",
            "prefetcht0 [{next}]", "prefetcht0 [{other}]", "add {next}, 64", "add {other}, 64",
            ".endr",
            share = const SHARE,
            stream = const if STREAM { WORDS } else { 0 },
            both = const BOTH as usize,
            x_passes = const X as usize,
            w_passes = const !X as usize,
            x0 = in(reg) x0,
            x1 = in(reg) x1,
            w0 = in(reg) w0,
            w1 = in(reg) w1,
            next = inout(reg) next => _,
            other = inout(reg) other => _,
            x_row = in(reg) x_row,
            w_row = in(reg) w_row,
            options(nostack, readonly),
        );
    }
}

/// [`step`] of one row of x and two times 16 rows of weights.
///
/// # Safety
/// This thread holds [`Tiles::by_rows`], and all tiles can be read.
#[inline(always)]
unsafe fn step_by_rows(x: *const Line, [w0, w1]: [*const Line; 2]) {
    // SAFETY: promised; no compiled code uses tiles.
    unsafe {
        asm!(
            "tileloadd tmm4, [{x} + {pair}*1]",
            "tileloadd tmm6, [{w0} + {line}*1]",
            "tdpbf16ps tmm0, tmm6, tmm4",
            "tileloadd tmm7, [{w1} + {line}*1]",
            "tdpbf16ps tmm1, tmm7, tmm4",
            x = in(reg) x,
            w0 = in(reg) w0,
            w1 = in(reg) w1,
            pair = in(reg) size_of::<u32>(),
            line = in(reg) size_of::<Line>(),
            options(nostack, readonly),
        );
    }
}

/// Writes the sums to the target.
///
/// # Safety
/// This thread holds [`Tiles`], and the target may be written.
#[inline(always)]
unsafe fn end<const BOTH: bool>(target: &Target) {
    // SAFETY: the rows of the target are there.
    unsafe {
        asm!(
            "tilestored [{upper} + {stride}*1], tmm0",
            "tilestored [{upper} + {stride}*1 + 64], tmm1",
            ".if {both}",
            "tilestored [{lower} + {stride}*1], tmm2",
            "tilestored [{lower} + {stride}*1 + 64], tmm3",
            ".endif",
            both = const BOTH as usize,
            upper = in(reg) target.to,
            lower = in(reg) target.to.wrapping_add(WORDS * target.stride),
            stride = in(reg) target.stride * size_of::<f32>(),
            options(nostack),
        );
    }
}
