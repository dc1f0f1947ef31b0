//! The backward pass over packed sequences, those of a family with their common beginning only once.
//!
//! With P = softmax(scale Q K^T), recomputed, and D_r = sum over j of P_rj dP_rj:
//!
//! ```text
//! dV = P^T dOut     dP = dOut V^T     dS = scale * P * (dP - D)     dQ = dS K     dK = dS^T Q
//! ```
//!
//! D_r is dout_r . out_r too, which needs no second look at a row's dP (FlashAttention, arXiv 2205.14135). But where outputs
//! are mixed of rounded weights, the dS of a row would then not sum to zero, and their error reaches the gradients of keys.
//!
//! One task is one (family, kv head): it owns its gradients, adds up its rows in ascending order
//! and keeps P and dS of a few products' rows at a time. 10 d FLOP per (row, position).
//!
//! ```text
//! positions   0 ............ prompt.len() ........... longest sequence
//! rows        | prompt       | branch 0              |
//!                            | branch 1       |      the branches take turns in these places
//! ```
//! The prompt's keys and values are rounded once and stay; its dK and dV grow with the rows of every
//! branch. Each branch puts its own behind them, and finds zeros in the places of its dK and dV.

use super::tiles::{
    Fetch, Grow, MAX_ROWS, MixedOut, Panel, Products, ScoresOut, Softmax, Weighting, Weights,
    ask_for, ask_for_lines, stride,
};
use super::{AttnScratch, Lane, check_groups};
use crate::cpu::Isa;
use crate::disjoint::Disjoint;
use crate::gemm::Write;
use crate::gemm::convert::{per_word, round_bf16};
use crate::kv::{
    MAX_HEAD_DIM, TILE, check_head_dim, round_words, write_key, write_keys, write_value,
};
use crate::simd::{Job, LANES, Simd};
use crate::{Dtype, Kernels};
use std::ops::Range;

/// Products whose rows' probabilities are held at once: several, so that a gradient of keys and
/// values is loaded and stored once for all of them.
const CHUNK_PRODUCTS: usize = 4;

/// The rows of sequences that begin alike: those of their common beginning, once, and those that
/// follow in each sequence.
#[derive(Clone, Debug)]
pub struct AttnFamily<'a> {
    /// The rows that all of them share, from position 0 on; all rows of a sequence that shares none.
    pub prompt: Range<usize>,
    /// The other rows of each sequence, from position `prompt.len()` on; may be empty.
    pub branches: &'a [Range<usize>],
}

impl AttnFamily<'_> {
    /// All rows in pieces, each with the rows that all of the piece sees before its own.
    pub(super) fn pieces(&self) -> impl Iterator<Item = (Range<usize>, &Range<usize>)> {
        let nothing = self.prompt.start..self.prompt.start;
        let behind = self.branches.iter().map(|branch| (self.prompt.clone(), branch));
        std::iter::once((nothing, &self.prompt)).chain(behind)
    }

    /// Positions of the longest sequence.
    fn positions(&self) -> usize {
        self.prompt.len() + self.branches.iter().map(Range::len).max().unwrap_or(0)
    }
}

/// What [`Kernels::attention_backward`] reads and writes.
pub struct AttnBackward<'a> {
    /// The format of the cache in the forward pass.
    pub dtype: Dtype,
    /// Queries as given to the forward pass, `[rows, heads * head_dim]`.
    pub q: &'a [f32],
    /// Keys as given to the cache, `[rows, kv_heads * head_dim]`.
    pub k: &'a [f32],
    /// Values as given to the cache, `[rows, kv_heads * head_dim]`.
    pub v: &'a [f32],
    /// The gradient of the output, shaped as `q`.
    pub dout: &'a [f32],
    /// The rows of all sequences, ascending, without overlap.
    pub families: &'a [AttnFamily<'a>],
    /// Query heads.
    pub heads: usize,
    /// Heads of keys and values.
    pub kv_heads: usize,
    /// Elements of one head.
    pub head_dim: usize,
    /// Factor of the scores.
    pub scale: f32,
    /// Gradient of `q`: set.
    pub dq: &'a mut [f32],
    /// Gradient of `k`: set.
    pub dk: &'a mut [f32],
    /// Gradient of `v`: set.
    pub dv: &'a mut [f32],
}

impl AttnBackward<'_> {
    pub(super) fn check(&self) {
        let Self { heads, kv_heads, head_dim, .. } = *self;
        check_head_dim(head_dim);
        check_groups(heads, kv_heads);
        let (len, width) = (self.q.len(), heads * head_dim);
        assert!(len.is_multiple_of(width), "{len} elements of q are no rows of {width}");
        let kv_len = len / heads * kv_heads;
        for (name, x) in [("dout", self.dout), ("dq", &*self.dq)] {
            assert!(x.len() == len, "{} elements of {name}, q has {len}", x.len());
        }
        for (name, x) in [("k", self.k), ("v", self.v), ("dk", &*self.dk), ("dv", &*self.dv)] {
            assert!(x.len() == kv_len, "{} elements of {name}, {kv_len} are needed", x.len());
        }
        let mut end = 0;
        for (_, rows) in self.families.iter().flat_map(AttnFamily::pieces) {
            assert!(
                rows.start >= end && rows.end >= rows.start,
                "rows {rows:?}, expected {end} on"
            );
            end = rows.end;
        }
        assert!(end * width <= len, "sequences end at row {end}, q has {}", len / width);
    }
}

/// The buffers of one thread.
#[derive(Default)]
pub(super) struct Buffers {
    key_tiles: Grow<u32>,
    key_rows: Grow<u32>,
    value_tiles: Grow<u32>,
    q: Grow<f32>,
    dout: Grow<f32>,
    p: Grow<f32>,
    ds: Grow<f32>,
    dk: Grow<f32>,
    dv: Grow<f32>,
}

/// The gradients, each part owned by one task.
struct Gradients<'a> {
    dq: Disjoint<'a, f32>,
    dk: Disjoint<'a, f32>,
    dv: Disjoint<'a, f32>,
}

/// What a task reads.
struct Backward<'a, P> {
    kernels: &'a Kernels,
    products: P,
    dtype: Dtype,
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    dout: &'a [f32],
    heads: usize,
    kv_heads: usize,
    d: usize,
    scale: f32,
}

pub(super) fn run<P: Products>(
    kernels: &Kernels,
    products: P,
    task: AttnBackward<'_>,
    scratch: &mut AttnScratch,
) {
    let AttnBackward { dtype, q, k, v, dout, heads, kv_heads, head_dim: d, scale, .. } = task;
    let pass = Backward { kernels, products, dtype, q, k, v, dout, heads, kv_heads, d, scale };
    let gradients = Gradients {
        dq: Disjoint::new(task.dq),
        dk: Disjoint::new(task.dk),
        dv: Disjoint::new(task.dv),
    };
    let tasks = task.families.len() * kv_heads;
    let threads = kernels.pool().threads().min(tasks);
    kernels.run_in_lanes(tasks, scratch.lanes(threads), &|i, lane| {
        pass.compute(&task.families[i / kv_heads], i % kv_heads, lane, &gradients);
    });
}

/// Neighbouring rows of a task that follow each other in position.
#[derive(Clone, Copy)]
struct Piece<'a> {
    rows: &'a Range<usize>,
    /// The position of the first.
    start: usize,
    kv_head: usize,
}

/// Rows of a piece, counted as token * group + head in group.
struct Chunk<'a> {
    piece: Piece<'a>,
    first: usize,
    /// Positions that each row sees.
    lens: &'a [usize],
    stride: usize,
}

impl<P: Products> Backward<'_, P> {
    fn compute(
        &self,
        family: &AttnFamily<'_>,
        kv_head: usize,
        lane: &mut Lane,
        to: &Gradients<'_>,
    ) {
        self.clear(family.positions().div_ceil(TILE), lane);
        let prompt = Piece { rows: &family.prompt, start: 0, kv_head };
        self.piece(prompt, lane, &to.dq);
        for rows in family.branches {
            let branch = Piece { rows, start: prompt.rows.len(), kv_head };
            let (dk, dv) = self.key_gradients(lane);
            dk[branch.start * self.d..].fill(0.0);
            dv[branch.start * self.d..].fill(0.0);
            self.piece(branch, lane, &to.dq);
            self.hand_over(branch, lane, to);
        }
        self.hand_over(prompt, lane, to);
    }

    /// Makes room for that many tiles of positions; the last is filled up with zeros.
    fn clear(&self, tiles: usize, lane: &mut Lane) {
        let tile_words = TILE * self.d / per_word(self.dtype);
        lane.tiles.clear();
        lane.tiles.extend((0..tiles).map(|tile| tile * tile_words));
        let Buffers { key_tiles, key_rows, value_tiles, dk, dv, .. } = &mut lane.backward;
        for words in [key_tiles, key_rows, value_tiles] {
            words.zeros(tiles * tile_words);
        }
        dk.zeros(tiles * TILE * self.d);
        dv.zeros(tiles * TILE * self.d);
    }

    /// Gradients of the keys and values of all positions, `[positions][d]`.
    fn key_gradients<'l>(&self, lane: &'l mut Lane) -> (&'l mut [f32], &'l mut [f32]) {
        let len = lane.tiles.len() * TILE * self.d;
        (lane.backward.dk.slice(len), lane.backward.dv.slice(len))
    }

    /// dQ of a piece's rows, and what they add to dK and dV.
    fn piece(&self, piece: Piece<'_>, lane: &mut Lane, dq: &Disjoint<'_, f32>) {
        let group = self.heads / self.kv_heads;
        let most = CHUNK_PRODUCTS * P::ROWS;
        self.ask_for(piece, 0..most / group);
        self.round_keys_and_values(piece, lane);
        for first in (0..piece.rows.len() * group).step_by(most) {
            self.ask_for(piece, (first + most) / group..(first + 2 * most) / group);
            let rows = most.min(piece.rows.len() * group - first);
            let mut lens = [0; CHUNK_PRODUCTS * MAX_ROWS];
            let lens = &mut lens[..rows];
            for (row, len) in lens.iter_mut().enumerate() {
                *len = piece.start + (first + row) / group + 1;
            }
            let chunk = Chunk { piece, first, lens, stride: stride(lens[rows - 1]) };
            self.chunk(&chunk, lane, dq);
        }
    }

    /// Asks for what is read of some tokens of a piece, counted from its first, which need not be there.
    fn ask_for(&self, piece: Piece<'_>, tokens: Range<usize>) {
        let width = self.heads / self.kv_heads * self.d;
        let tokens = tokens.start..tokens.end.min(piece.rows.len());
        for token in tokens.map(|token| piece.rows.start + token) {
            let place = token * self.kv_heads * width + piece.kv_head * width;
            for x in [self.q, self.dout] {
                ask_for_lines(&x[place..][..width]);
            }
        }
    }

    /// Writes dK and dV of a piece's own positions to their place.
    fn hand_over(&self, piece: Piece<'_>, lane: &mut Lane, to: &Gradients<'_>) {
        let (dk, dv) = self.key_gradients(lane);
        let skip = piece.start * self.d;
        let each = dk[skip..].chunks_exact(self.d).zip(dv[skip..].chunks_exact(self.d));
        for (token, (dk, dv)) in piece.rows.clone().zip(each) {
            let place = (token * self.kv_heads + piece.kv_head) * self.d;
            // SAFETY: families do not overlap, and each (family, kv head) is one task.
            unsafe { to.dk.part(place, place + self.d) }.copy_from_slice(dk);
            // SAFETY: as above.
            unsafe { to.dv.part(place, place + self.d) }.copy_from_slice(dv);
        }
    }

    /// Keys as tiles of keys and of values, values as tiles of keys.
    fn round_keys_and_values(&self, piece: Piece<'_>, lane: &mut Lane) {
        let len = lane.tiles.len() * TILE * self.d / per_word(self.dtype);
        let isa = self.kernels.isa;
        let (first, stride) = (piece.rows.start * self.kv_heads + piece.kv_head, self.kv_heads);
        let of = |x| Head { x, d: self.d, first: first * self.d, stride: stride * self.d };
        let Buffers { key_tiles, key_rows, value_tiles, .. } = &mut lane.backward;
        isa.vectorize(RoundPiece {
            isa,
            dtype: self.dtype,
            start: piece.start,
            rows: piece.rows.len(),
            keys: of(self.k),
            values: of(self.v),
            key_tiles: key_tiles.slice(len),
            key_rows: key_rows.slice(len),
            value_tiles: value_tiles.slice(len),
        });
    }

    /// Where a row of a chunk lies in `q` and what is shaped like it.
    fn place(&self, chunk: &Chunk<'_>, row: usize) -> usize {
        let group = self.heads / self.kv_heads;
        let row = chunk.first + row;
        let head = chunk.piece.kv_head * group + row % group;
        ((chunk.piece.rows.start + row / group) * self.heads + head) * self.d
    }

    fn chunk(&self, chunk: &Chunk<'_>, lane: &mut Lane, dq: &Disjoint<'_, f32>) {
        let (d, rows, stride) = (self.d, chunk.lens.len(), chunk.stride);
        let q = lane.backward.q.slice(rows * d);
        let dout = lane.backward.dout.slice(rows * d);
        let isa = self.kernels.isa;
        for row in 0..rows {
            let place = self.place(chunk, row);
            let (x, out) = (&self.q[place..][..d], &mut q[row * d..][..d]);
            isa.vectorize(RoundRow { dtype: self.dtype, x, out });
            let (x, out) = (&self.dout[place..][..d], &mut dout[row * d..][..d]);
            isa.vectorize(RoundRow { dtype: self.dtype, x, out });
        }
        let (mut first, mut rest) = (0, chunk.lens);
        lane.backward.p.slice(rows * stride);
        lane.backward.ds.slice(rows * stride);
        while !rest.is_empty() {
            let lens;
            (lens, rest) = rest.split_at(P::ROWS.min(rest.len()));
            self.score_gradients(chunk, first, lens, lane, dq);
            first += lens.len();
        }
        let Buffers { q, dout, p, ds, dk, dv, .. } = &mut lane.backward;
        let padded = lane.tiles.len() * TILE;
        let p = Weights { rows: p.slice(rows * stride), stride, lens: chunk.lens };
        let to = dv.slice(padded * d);
        self.products.mix_transposed(p, dout.slice(rows * d), to, &mut lane.products);
        let ds = Weights { rows: ds.slice(rows * stride), stride, lens: chunk.lens };
        let to = dk.slice(padded * d);
        self.products.mix_transposed(ds, q.slice(rows * d), to, &mut lane.products);
    }

    /// P, dS and dQ of the chunk's rows from `first` on, as many as `lens`.
    fn score_gradients(
        &self,
        chunk: &Chunk<'_>,
        first: usize,
        lens: &[usize],
        lane: &mut Lane,
        dq: &Disjoint<'_, f32>,
    ) {
        let (d, stride, rows) = (self.d, chunk.stride, lens.len());
        let all = chunk.lens.len();
        let tiles = &lane.tiles[..lens[rows - 1].div_ceil(TILE)];
        let Buffers { key_tiles, key_rows, value_tiles, q, dout, p, ds, .. } = &mut lane.backward;
        let head_words = d / per_word(self.dtype);
        let words = lane.tiles.len() * TILE * head_words;
        let panel = |words| Panel { dtype: self.dtype, words, tiles, shift: 0, head_words };
        let nothing = &mut Fetch::nothing();
        let part = first * d..(first + rows) * d;
        let (q, dout) = (&q.slice(all * d)[part.clone()], &dout.slice(all * d)[part]);
        let part = first * stride..(first + rows) * stride;
        let p = &mut p.slice(all * stride)[part.clone()];
        let ds = &mut ds.slice(all * stride)[part];

        let packed = lane.packed.slice(rows * d);
        self.products.pack(q.chunks_exact(d), packed);
        let to = ScoresOut { to: p, stride, rows };
        self.products.scores(packed, panel(key_tiles.slice(words)), to, nothing);
        self.products.pack(dout.chunks_exact(d), packed);
        let to = ScoresOut { to: ds, stride, rows };
        self.products.scores(packed, panel(value_tiles.slice(words)), to, nothing);

        let isa = self.kernels.isa;
        let mut sums = [0.0; MAX_ROWS];
        let scale = self.scale;
        let fetch = (&mut *nothing, 0);
        let before_row: &dyn Fn(usize) = &|_| ();
        let softmax =
            Softmax { scale, scores: p, stride, lens, sums: &mut sums, fetch, before_row };
        isa.vectorize(softmax);
        for (row, &len) in lens.iter().enumerate() {
            let place = self.place(chunk, first + row);
            ask_for(dq.address(place), d);
            let tiles = row * stride..row * stride + len.next_multiple_of(TILE);
            isa.vectorize(RowGradient {
                p: &mut p[tiles.clone()],
                ds: &mut ds[tiles],
                sum: sums[row],
                scale: self.scale,
            });
        }

        let mixed = lane.mixed.slice(rows * d);
        let (ds, keys) = (Weights { rows: ds, stride, lens }, panel(key_rows.slice(words)));
        let to = MixedOut { to: &mut *mixed, write: Write::Set };
        let ds = self.products.weighting().of(ds, &mut lane.products);
        self.products.mix(ds, keys, to, nothing);
        for (row, mixed) in mixed.chunks_exact(d).enumerate() {
            let place = self.place(chunk, first + row);
            // SAFETY: families do not overlap, and each row and head belongs to one task.
            unsafe { dq.part(place, place + d) }.copy_from_slice(mixed);
        }
    }
}

/// The elements of one head: row i begins at `first + i * stride`.
#[derive(Clone, Copy)]
struct Head<'a> {
    x: &'a [f32],
    d: usize,
    first: usize,
    stride: usize,
}

impl<'a> Head<'a> {
    #[inline(always)]
    fn row(&self, row: usize) -> &'a [f32] {
        &self.x[self.first + row * self.stride..][..self.d]
    }
}

/// Rounds `rows` rows from position `start` on: keys into tiles of keys and of values, values into tiles of
/// keys.
struct RoundPiece<'a> {
    isa: Isa,
    dtype: Dtype,
    start: usize,
    rows: usize,
    keys: Head<'a>,
    values: Head<'a>,
    key_tiles: &'a mut [u32],
    key_rows: &'a mut [u32],
    value_tiles: &'a mut [u32],
}

impl Job for RoundPiece<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _s: S) {
        let Self { isa, dtype, start, rows, keys, values, .. } = self;
        round_keys((isa, dtype), (start, rows), keys, self.key_tiles);
        round_keys((isa, dtype), (start, rows), values, self.value_tiles);
        for row in 0..rows {
            write_value(dtype, keys.row(row), start + row, self.key_rows);
        }
    }
}

/// Rounds rows into tiles of keys, sixteen at once where they fill a tile.
#[inline(always)]
fn round_keys(
    (isa, dtype): (Isa, Dtype),
    (start, rows): (usize, usize),
    head: Head<'_>,
    tiles: &mut [u32],
) {
    let words = head.d / per_word(dtype);
    let mut rounded = [0; MAX_HEAD_DIM];
    let mut row = 0;
    while row < rows {
        let position = start + row;
        let tile = &mut tiles[position / TILE * TILE * words..][..TILE * words];
        if position.is_multiple_of(TILE) && rows - row >= TILE {
            let mut keys = [&[][..]; TILE];
            keys.iter_mut().enumerate().for_each(|(i, key)| *key = head.row(row + i));
            write_keys(isa, dtype, keys, tile);
            row += TILE;
            continue;
        }
        round_words(dtype, head.row(row), &mut rounded[..words]);
        write_key(rounded[..words].iter().copied(), position % TILE, tile);
        row += 1;
    }
}

/// Turns a row into what the given format holds of it.
struct RoundRow<'a> {
    dtype: Dtype,
    x: &'a [f32],
    out: &'a mut [f32],
}

impl Job for RoundRow<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _simd: S) {
        match self.dtype {
            Dtype::F32 => self.out.copy_from_slice(self.x),
            Dtype::Bf16 => {
                for (out, &x) in self.out.iter_mut().zip(self.x) {
                    *out = f32::from_bits(round_bf16(x) << 16);
                }
            }
        }
    }
}

/// Divides `p` by its sum and turns `ds` from dP into scale * p * (dP - sum of p dP). Both are whole
/// tiles; where `p` is 0 so is `ds`.
struct RowGradient<'a> {
    p: &'a mut [f32],
    ds: &'a mut [f32],
    sum: f32,
    scale: f32,
}

impl Job for RowGradient<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (factor, scale) = (s.splat(1.0 / self.sum), s.splat(self.scale));
        let mut delta = s.splat(0.0);
        let chunks = self.p.as_chunks::<LANES>().0.iter();
        for (p, ds) in chunks.zip(self.ds.as_chunks::<LANES>().0) {
            delta = s.add(delta, s.weigh(s.load(p), s.load(ds)));
        }
        let delta = s.splat(s.sum(delta) / self.sum);
        let chunks = self.p.as_chunks_mut::<LANES>().0.iter_mut();
        for (p, ds) in chunks.zip(self.ds.as_chunks_mut::<LANES>().0) {
            let weight = s.mul(s.load(p), factor);
            s.store(p, weight);
            s.store(ds, s.weigh(s.mul(weight, scale), s.sub(s.load(ds), delta)));
        }
    }
}
