//! The pieces both passes are made of: products of a few rows with tiles of 16 positions, and the
//! softmax between them.

use crate::cpu::Isa;
use crate::gemm::Write;
use crate::kv::TILE;
use crate::simd::{Job, LANES, Simd};
use crate::{Dtype, prefetch};

/// Most rows of one product, whatever computes it.
pub(super) const MAX_ROWS: usize = 32;

/// Keys or values of one head of one sequence.
#[derive(Clone, Copy)]
pub(super) struct Panel<'a> {
    pub(super) dtype: Dtype,
    pub(super) words: &'a [u32],
    /// Where each tile of 16 positions begins, `shift` left out.
    pub(super) tiles: &'a [usize],
    pub(super) shift: usize,
    /// Words of one position.
    pub(super) head_words: usize,
}

impl<'a> Panel<'a> {
    /// The words of one tile.
    pub(super) fn tile(&self, i: usize) -> &'a [u32] {
        &self.words[self.tiles[i] + self.shift..][..TILE * self.head_words]
    }
}

/// Lines of tiles that will be needed soon, to be asked for beside other work. They are asked for evenly,
/// since memory has to be busy all the time and cannot be asked for much at a time. Reaches no result.
pub(super) struct Fetch<'a> {
    words: &'a [u32],
    /// Where the tiles that are left begin, `shift` left out.
    tiles: std::slice::Iter<'a, usize>,
    shift: usize,
    /// Lines of a tile.
    tile_lines: usize,
    /// The next word to ask for and how many lines follow in its tile.
    next: usize,
    left: usize,
}

impl<'a> Fetch<'a> {
    /// Nothing: it is in the processor's cache already, or soon will be.
    pub(super) fn nothing() -> Self {
        Self::new(&[], &[], 0, 0)
    }

    /// Tiles of `tile_lines` lines that begin in `words` `shift` behind `tiles`; there need not be memory.
    pub(super) fn new(
        words: &'a [u32],
        tiles: &'a [usize],
        shift: usize,
        tile_lines: usize,
    ) -> Self {
        Self { words, tiles: tiles.iter(), shift, tile_lines, next: 0, left: 0 }
    }

    /// Asks for `lines` lines, or as many as are left.
    #[inline(always)]
    pub(super) fn lines(&mut self, mut lines: usize) {
        while lines > 0 {
            if self.left == 0 {
                let Some(tile) = self.tiles.next() else { return };
                (self.next, self.left) = (tile + self.shift, self.tile_lines);
            }
            let here = lines.min(self.left);
            (0..here).for_each(|i| {
                prefetch::far(self.words.as_ptr().wrapping_add(self.next + i * TILE))
            });
            (self.next, self.left) = (self.next + here * TILE, self.left - here);
            lines -= here;
        }
    }

    /// Asks for all that is left.
    pub(super) fn rest(&mut self) {
        self.lines(usize::MAX);
    }
}

/// Asks for the lines of `len` values that are needed at once.
pub(super) fn ask_for(values: *const f32, len: usize) {
    (0..len).step_by(LANES).for_each(|i| prefetch::near(values.wrapping_add(i)));
}

/// Asks for the lines of values that are needed soon.
pub(super) fn ask_for_lines(values: &[f32]) {
    values.chunks(LANES).for_each(|line| prefetch::far(line.as_ptr()));
}

/// Up to [`MAX_ROWS`] rows of weights of positions, `stride` apart. Row r has `lens[r]` of them (in
/// ascending order), followed by zeros up to a whole tile.
#[derive(Clone, Copy)]
pub(super) struct Weights<'a> {
    pub(super) rows: &'a [f32],
    pub(super) stride: usize,
    pub(super) lens: &'a [usize],
}

/// What scores become, and what values are multiplied with.
pub(super) trait Weighting: Copy + Send + Sync {
    /// Rows of weights.
    type Rows<'a>;

    /// Turns scores into weights, in their place or in the buffers.
    fn softmax(self, task: Softmax<'_, '_>, buffers: &mut Buffers);

    /// What [`Self::softmax`] made of the scores of some rows, from an even tile on.
    fn of_softmax<'a>(self, p: Softmaxed<'a>, buffers: &'a Buffers) -> Self::Rows<'a>;

    /// The given weights.
    fn of<'a>(self, p: Weights<'a>, buffers: &'a mut Buffers) -> Self::Rows<'a>;
}

/// Weights in f32, in place of the scores.
#[derive(Clone, Copy)]
pub(super) struct Exact(pub(super) Isa);

impl Weighting for Exact {
    type Rows<'a> = Weights<'a>;

    fn softmax(self, task: Softmax<'_, '_>, _buffers: &mut Buffers) {
        self.0.vectorize(task);
    }

    fn of_softmax<'a>(self, p: Softmaxed<'a>, _buffers: &'a Buffers) -> Weights<'a> {
        let Softmaxed { scores, stride, row, start, lens } = p;
        Weights { rows: &scores[row * stride + start..], stride, lens }
    }

    fn of<'a>(self, p: Weights<'a>, _buffers: &'a mut Buffers) -> Weights<'a> {
        p
    }
}

/// The products for keys and values of one format. All sums are f32, in an order that depends on what is
/// summed over only, whatever the number of rows and tiles: chains in ascending order, but for those of AMX
/// tiles.
pub(super) trait Products: Copy + Send + Sync {
    /// Most rows of one product.
    const ROWS: usize;

    /// The form of the weights that values are multiplied with.
    type Weighting: Weighting;

    fn weighting(self) -> Self::Weighting;

    /// Rounds rows of elements into the left operand of `scores`; `out` has as many words, on a line.
    fn pack<'x>(self, rows: impl ExactSizeIterator<Item = &'x [f32]>, out: &mut [u32]);

    /// `out[r][j] = x_r . k_j` for all positions of all tiles of `keys`; one more tile may be written to.
    fn scores(self, x: &[u32], keys: Panel<'_>, out: ScoresOut<'_>, fetch: &mut Fetch<'_>);

    /// `out[r] = sum over j < lens[r] of p_rj v_j`. Values are finite.
    fn mix(
        self,
        p: <Self::Weighting as Weighting>::Rows<'_>,
        values: Panel<'_>,
        out: MixedOut<'_>,
        fetch: &mut Fetch<'_>,
    );

    /// `out[j] += sum over r with lens[r] > j of p_rj x_r`; `x` is `[rows][d]`, `out` `[positions][d]`
    /// with whole tiles of positions. Any number of rows.
    fn mix_transposed(self, p: Weights<'_>, x: &[f32], out: &mut [f32], buffers: &mut Buffers);
}

#[cfg(target_arch = "x86_64")]
pub(super) use super::rounded::Buffers;

/// What products work in: nothing.
#[cfg(not(target_arch = "x86_64"))]
#[derive(Default)]
pub(super) struct Buffers;

/// Scores after [`Weighting::softmax`]: those of some rows from row `row` and position `start` on, of which
/// they see `lens`.
#[derive(Clone, Copy)]
pub(super) struct Softmaxed<'a> {
    pub(super) scores: &'a [f32],
    pub(super) stride: usize,
    pub(super) row: usize,
    pub(super) start: usize,
    pub(super) lens: &'a [usize],
}

/// Where `mix` goes, `[rows][d]`; with [`Write::Add`] the sums go on from what is there.
pub(super) struct MixedOut<'a> {
    pub(super) to: &'a mut [f32],
    pub(super) write: Write,
}

/// Where `scores` go: `rows` rows, `stride` apart.
pub(super) struct ScoresOut<'a> {
    pub(super) to: &'a mut [f32],
    pub(super) stride: usize,
    pub(super) rows: usize,
}

/// Distance of two rows of scores of that many positions; one tile more than needed, so that rows of
/// a power of two do not meet in one set of the first-level cache.
pub(super) fn stride(positions: usize) -> usize {
    positions.next_multiple_of(TILE) + TILE
}

/// A buffer that only grows; its slices start on a 64-byte line.
#[derive(Default)]
pub(super) struct Grow<T>(Vec<T>);

impl<T: Copy + Default> Grow<T> {
    /// `len` elements with anything in them: what was in them, if there have been as many before.
    pub(super) fn slice(&mut self, len: usize) -> &mut [T] {
        if self.0.len() < len + TILE {
            self.0 = Vec::new();
            self.0.resize(len + TILE, T::default());
        }
        let lead = self.0.as_ptr().align_offset(64).min(TILE);
        &mut self.0[lead..lead + len]
    }

    /// `len` zeros.
    pub(super) fn zeros(&mut self, len: usize) -> &mut [T] {
        let slice = self.slice(len);
        slice.fill(T::default());
        slice
    }
}

/// Turns scores into exp(scale * score - maximum), in place, and gives the sums. Each row uses only its
/// first `len` scores, and becomes zero from there to the end of the tile.
pub(super) struct Softmax<'a, 'f> {
    pub(super) scale: f32,
    pub(super) scores: &'a mut [f32],
    pub(super) stride: usize,
    pub(super) lens: &'a [usize],
    pub(super) sums: &'a mut [f32],
    /// What to ask for meanwhile, this many lines for sixteen scores.
    pub(super) fetch: (&'a mut Fetch<'f>, usize),
    /// Called before each row, to ask for what belongs to it.
    pub(super) before_row: &'a dyn Fn(usize),
}

/// The largest of the scores of a row. Several chains, since each link waits for the one before it.
#[inline(always)]
pub(super) fn largest<S: Simd>(s: S, scores: &[f32]) -> f32 {
    let (whole, tail) = scores.as_chunks::<LANES>();
    let mut max = [s.splat(f32::NEG_INFINITY); 4];
    max[0] = s.load_tail(tail, f32::NEG_INFINITY);
    let (fours, rest) = whole.as_chunks::<4>();
    for chunks in fours {
        max.iter_mut().zip(chunks).for_each(|(max, chunk)| *max = s.max(s.load(chunk), *max));
    }
    max.iter_mut().zip(rest).for_each(|(max, chunk)| *max = s.max(s.load(chunk), *max));
    s.max_lane(s.max(s.max(max[0], max[1]), s.max(max[2], max[3])))
}

impl Job for Softmax<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(mut self, s: S) {
        let rows = self.scores.chunks_mut(self.stride).zip(self.lens);
        for (r, ((row, &len), sum)) in rows.zip(self.sums).enumerate() {
            (self.before_row)(r);
            let scale = s.splat(self.scale);
            // The factor is positive: the largest stays the largest.
            let max = s.splat(largest(s, &row[..len]) * self.scale);
            let (whole, tail) =
                row[..len.next_multiple_of(LANES)].split_at_mut(len / LANES * LANES);
            let tail_len = len % LANES;
            let (whole, _) = whole.as_chunks_mut::<LANES>();
            let mut total = s.splat(0.0);
            let (fetch, lines) = &mut self.fetch;
            for chunk in whole {
                fetch.lines(*lines);
                let p = s.exp(s.sub(s.mul(s.load(chunk), scale), max));
                s.store(chunk, p);
                total = s.add(total, p);
            }
            if tail_len > 0 {
                let score = s.load_tail(&tail[..tail_len], f32::NEG_INFINITY);
                let p = s.exp(s.sub(s.mul(score, scale), max));
                total = s.add(total, p);
                s.store_tail(&mut tail[..tail_len], p);
                tail[tail_len..].fill(0.0);
            }
            *sum = s.sum(total);
        }
    }
}

/// Divides what was mixed for a row by the sum of its weights.
pub(super) struct Divide<'a> {
    pub(super) mixed: &'a [f32],
    pub(super) sum: f32,
    pub(super) out: &'a mut [f32],
}

impl Job for Divide<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _s: S) {
        let share = 1.0 / self.sum;
        self.out.iter_mut().zip(self.mixed).for_each(|(out, x)| *out = x * share);
    }
}
