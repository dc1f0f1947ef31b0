//! The forward pass: work items shared out to the threads.

use super::tiles::{
    Divide, Fetch, Grow, MAX_ROWS, MixedOut, Panel, Products, ScoresOut, Softmax, Softmaxed,
    Weighting, ask_for, stride,
};
use super::{Attention, AttnScratch, AttnSeq, Lane};
use crate::disjoint::Disjoint;
use crate::gemm::Write;
use crate::gemm::convert::{pair, per_word};
use crate::kv::{KvCache, TILE, integer};
use crate::simd::{Job, Simd};
use crate::{Dtype, Kernels, KvDtype};
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Everything an item needs to know.
struct Forward<'a, P> {
    kernels: &'a Kernels,
    products: P,
    /// What they multiply.
    dtype: Dtype,
    kv: &'a KvCache,
    task: Attention<'a>,
    /// Query heads that share a kv head.
    group: usize,
}

/// Tiles that sequences share for one product to read them for all.
const FEWEST_SHARED: usize = 2;
/// Tiles of integers that are asked for ahead of their expansion.
const TILES_AHEAD: usize = 2;
/// Items of a thread that a bunch has to leave.
const ITEMS_PER_THREAD: usize = 4;

/// A sequence, or neighbours with one row each whose first positions lie in the same blocks.
#[derive(Clone, Copy)]
pub(super) struct Bunch {
    /// Its sequences: the first and how many.
    first: usize,
    seqs: usize,
    /// Tiles that all of them have and see whole; 0 for one sequence.
    shared: usize,
    /// The number of its first work item.
    first_item: usize,
}

/// Rows `first..first + rows` of a kv head, counted as token * group + head in group; with several sequences,
/// which have one token each, as sequence * group + head in group.
struct Item<'a> {
    seqs: &'a [AttnSeq<'a>],
    shared: usize,
    kv_head: usize,
    first: usize,
    rows: usize,
}

/// Rows of an item that see the same tiles of its list, which hold their positions from `start` on.
struct Part {
    rows: Range<usize>,
    tiles: Range<usize>,
    start: usize,
}

/// All threads take items until none is left. Item numbers run through rows first, then kv heads,
/// then sequences, so that neighbours find keys and values in the cache.
pub(super) fn run<P: Products>(
    kernels: &Kernels,
    (products, dtype): (P, Dtype),
    (kv, task): (&KvCache, Attention<'_>),
    out: &mut [f32],
    scratch: &mut AttnScratch,
) {
    let pass = Forward { kernels, products, dtype, kv, task, group: task.heads / kv.kv_heads() };
    let mut bunches = std::mem::take(&mut scratch.bunches);
    let items = pass.bunch(&mut bunches);
    let threads = kernels.pool().threads().min(items);
    let lanes = Disjoint::new(scratch.lanes(threads));
    let out = Disjoint::new(out);
    let next = AtomicUsize::new(threads);
    kernels.pool().run(threads, &|thread| {
        // SAFETY: each thread number has its own lane.
        let lane = unsafe { lanes.part(thread, thread + 1) };
        let lane = &mut lane[0];
        // Other keys and values than in an earlier call.
        lane.expanded.of = None;
        let mut next_tiles = std::mem::take(&mut lane.next_tiles);
        let find = |number: usize, tiles: &mut Vec<usize>| {
            let bunch = bunches.partition_point(|bunch| bunch.first_item <= number) - 1;
            let item = pass.item(&bunches[bunch], number);
            pass.find_tiles(&item, tiles);
            item
        };
        let mut item = Some(find(thread, &mut lane.tiles));
        while let Some(current) = item {
            // Taken ahead of time, to fetch its keys while the current one is finished.
            next_tiles.clear();
            let number = next.fetch_add(1, Ordering::Relaxed);
            item = (number < items).then(|| find(number, &mut next_tiles));
            let ahead = match &item {
                Some(next) if next.first == 0 => &*next_tiles,
                _ => &[],
            };
            pass.compute(&current, lane, (item.as_ref(), ahead), &out);
            std::mem::swap(&mut lane.tiles, &mut next_tiles);
        }
        lane.next_tiles = next_tiles;
    });
    scratch.bunches = bunches;
}

impl<'a, P: Products> Forward<'a, P> {
    /// Puts neighbours that begin alike together; returns the number of work items.
    fn bunch(&self, bunches: &mut Vec<Bunch>) -> usize {
        let kv_heads = self.kv.kv_heads();
        let threads = self.kernels.pool().threads();
        let most = match self.kv.dtype() {
            KvDtype::Plain(_) => self.task.seqs.len() * kv_heads / (ITEMS_PER_THREAD * threads),
            // What is expanded of one sequence at a time is memory enough.
            KvDtype::Int8 => 1,
        };
        let most = most.min(P::ROWS / self.group);
        bunches.clear();
        let mut items = 0;
        for (i, seq) in self.task.seqs.iter().enumerate().filter(|(_, seq)| seq.rows > 0) {
            if let Some(last) = bunches.last_mut()
                && last.first + last.seqs == i
                && last.seqs < most
                && let shared = self.shared(&self.task.seqs[last.first], seq)
                && shared >= last.shared.max(FEWEST_SHARED)
            {
                last.shared = if last.seqs == 1 { shared } else { last.shared };
                last.seqs += 1;
                continue;
            }
            bunches.push(Bunch { first: i, seqs: 1, shared: 0, first_item: items });
            // Others that join it fit into the same items.
            items += self.chunks(seq) * kv_heads;
        }
        items
    }

    /// Tiles that both sequences have, and see whole but for their last; an even number, as
    /// [`Weighting::of_softmax`] wants it.
    fn shared(&self, a: &AttnSeq<'_>, b: &AttnSeq<'_>) -> usize {
        if (a.rows, b.rows) != (1, 1) {
            return 0;
        }
        let blocks = a.blocks.iter().zip(b.blocks).take_while(|(a, b)| a == b).count();
        let shared = (blocks * (self.kv.block_size() / TILE)).min(a.start.min(b.start) / TILE);
        shared / 2 * 2
    }

    /// Items of one kv head of a bunch that begins with this sequence.
    fn chunks(&self, seq: &AttnSeq<'_>) -> usize {
        (seq.rows * self.group).div_ceil(P::ROWS)
    }

    fn item(&self, bunch: &Bunch, number: usize) -> Item<'a> {
        let seqs = &self.task.seqs[bunch.first..bunch.first + bunch.seqs];
        let (number, chunks) = (number - bunch.first_item, self.chunks(&seqs[0]));
        let first = number % chunks * P::ROWS;
        let rows = (seqs[0].rows * self.group * seqs.len() - first).min(P::ROWS);
        Item { seqs, shared: bunch.shared, kv_head: number / chunks, first, rows }
    }

    /// The sequence of a row of an item, and which of the sequence's rows it is.
    fn row(&self, item: &Item<'a>, row: usize) -> (&'a AttnSeq<'a>, usize) {
        match item.seqs {
            [seq] => (seq, item.first + row),
            seqs => (&seqs[row / self.group], row % self.group),
        }
    }

    /// Where a row of an item lies in `q` and in the output.
    fn place(&self, item: &Item<'a>, row: usize) -> usize {
        let (seq, row) = self.row(item, row);
        let token = seq.first_row + row / self.group;
        let head = item.kv_head * self.group + row % self.group;
        (token * self.task.heads + head) * self.kv.head_dim()
    }

    /// The parts of an item whose rows see so many positions: what all share, then what each sequence has
    /// for itself.
    fn parts(&self, item: &Item<'_>, lens: &[usize]) -> impl Iterator<Item = Part> {
        let (shared, rows, count) = (item.shared, item.rows, item.seqs.len());
        let common = Part { rows: 0..rows, tiles: 0..shared, start: 0 };
        let each = rows / count;
        let mut tiles = shared..shared;
        let own = (0..count).map(move |seq| {
            let rows = seq * each..(seq + 1) * each;
            tiles = tiles.end..tiles.end + lens[rows.end - 1].div_ceil(TILE) - shared;
            Part { rows, tiles: tiles.clone(), start: shared * TILE }
        });
        std::iter::once(common).filter(move |_| shared > 0).chain(own)
    }

    /// Works on an item whose tiles are in `lane`; `next` is the next one with the tiles of it to fetch
    /// meanwhile.
    fn compute(
        &self,
        item: &Item<'a>,
        lane: &mut Lane,
        next: (Option<&Item<'a>>, &[usize]),
        out: &Disjoint<'_, f32>,
    ) {
        let d = self.kv.head_dim();
        let rows = item.rows;
        let mut lens = [0; MAX_ROWS];
        let lens = &mut lens[..rows];
        for (row, len) in lens.iter_mut().enumerate() {
            let (seq, row) = self.row(item, row);
            *len = seq.start + row / self.group + 1;
        }
        let lens = &*lens;
        let Lane { tiles, expanded, .. } = lane;
        let dtype = self.dtype;
        let mut meanwhile = [Fetch::nothing(), Fetch::nothing()];
        let (keys, values) = match self.kv.dtype() {
            KvDtype::Int8 => self.expand(item, tiles, expanded),
            KvDtype::Plain(_) => {
                let (head_words, shift) = (self.kv.head_words(), self.kv.values_after());
                let words = self.kv.words();
                let fetch = |tiles, shift| Fetch::new(words, tiles, shift, head_words);
                // Later items of this head find the values in the processor's cache.
                if item.first == 0 {
                    meanwhile[0] = fetch(tiles, shift);
                }
                meanwhile[1] = fetch(next.1, 0);
                let keys = Panel { dtype, words, tiles, shift: 0, head_words };
                (keys, Panel { shift, ..keys })
            }
        };
        let [first, second] = &mut meanwhile;
        let stride = stride(lens.iter().copied().max().unwrap_or(0));
        let scores = lane.scores.slice(rows * stride);
        for Part { rows, tiles, start } in self.parts(item, lens) {
            let count = rows.len();
            let packed = lane.packed.slice(count * d);
            let q = rows.clone().map(|row| &self.task.q[self.place(item, row)..][..d]);
            self.products.pack(q, packed);
            let to = &mut scores[rows.start * stride + start..];
            let to = ScoresOut { to, stride, rows: count };
            let keys = Panel { tiles: &keys.tiles[tiles], ..keys };
            self.products.scores(packed, keys, to, first);
        }
        let mut sums = [0.0; MAX_ROWS];
        let scale = self.task.scale;
        let softmax = Softmax {
            scale,
            scores,
            stride,
            lens,
            sums: &mut sums,
            fetch: (first, keys.head_words.div_ceil(2 * rows)),
            before_row: &|row| {
                ask_for(out.address(self.place(item, row)), d);
                if let Some(next) = next.0.filter(|next| row < next.rows) {
                    ask_for(self.task.q[self.place(next, row)..].as_ptr(), d);
                }
            },
        };
        self.products.weighting().softmax(softmax, &mut lane.products);
        first.rest();
        let mixed = lane.mixed.slice(rows * d);
        for Part { rows, tiles, start } in self.parts(item, lens) {
            let mut seen = [tiles.len() * TILE; MAX_ROWS];
            if tiles.end > item.shared {
                let own = seen.iter_mut().zip(&lens[rows.clone()]);
                own.for_each(|(seen, len)| *seen = len - start);
            }
            let (row, lens) = (rows.start, &seen[..rows.len()]);
            let weights = Softmaxed { scores, stride, row, start, lens };
            let values = Panel { tiles: &values.tiles[tiles], ..values };
            let write = if start == 0 { Write::Set } else { Write::Add };
            let to = MixedOut { to: &mut mixed[rows.start * d..rows.end * d], write };
            let weights = self.products.weighting().of_softmax(weights, &lane.products);
            self.products.mix(weights, values, to, second);
        }
        second.rest();
        for (row, mixed) in mixed.chunks_exact(d).enumerate() {
            let place = self.place(item, row);
            // SAFETY: sequences do not overlap, and each row and head belongs to one item.
            let out = unsafe { out.part(place, place + d) };
            self.kernels.isa.vectorize(Divide { mixed, sum: sums[row], out });
        }
    }

    /// Keys and values of a cache of integers, expanded. Later items of a head find what earlier ones of this
    /// thread have left.
    fn expand<'l>(
        &self,
        item: &Item<'_>,
        tiles: &[usize],
        Expanded { words, starts, of }: &'l mut Expanded,
    ) -> (Panel<'l>, Panel<'l>) {
        let words_of = |per_word| TILE * self.kv.head_dim() / per_word;
        let (packed, len) = (words_of(4), words_of(per_word(self.dtype)));
        let seq = &item.seqs[0];
        // Room for all that the head's items see, which so stays where it is.
        let words = words.slice(2 * len * (seq.start + seq.rows).div_ceil(TILE));
        let whose = Some((seq.first_row, item.kv_head));
        if *of != whose {
            starts.clear();
            *of = whose;
        }
        let (dtype, after) = (self.dtype, self.kv.values_after());
        let isa = self.kernels.isa;
        let cache = self.kv.words();
        for i in starts.len()..tiles.len() {
            if let Some(&ahead) = tiles.get(i + TILES_AHEAD) {
                ask_for(cache[ahead..].as_ptr().cast(), packed);
                ask_for(cache[ahead + after..].as_ptr().cast(), packed);
            }
            let (keys, values) = words[2 * len * i..][..2 * len].split_at_mut(len);
            let [key_scales, value_scales] = self.kv.tile_scales(tiles[i]);
            let packed = |start: usize| &cache[start..][..packed];
            let (scales, to) = (key_scales, keys);
            isa.vectorize(ExpandKeys { dtype, packed: packed(tiles[i]), scales, to });
            let (scales, to) = (value_scales, values);
            isa.vectorize(ExpandValues { dtype, packed: packed(tiles[i] + after), scales, to });
            starts.push(2 * len * i);
        }
        let (tiles, head_words) = (&starts[..tiles.len()], len / TILE);
        let keys = Panel { dtype, words, tiles, shift: 0, head_words };
        (keys, Panel { shift: len, ..keys })
    }

    /// Where the tiles of the positions that an item sees begin: those that are shared, then each sequence's.
    fn find_tiles(&self, item: &Item<'_>, tiles: &mut Vec<usize>) {
        tiles.clear();
        let shared = 0..item.shared;
        tiles.extend(self.tiles(item.seqs[0].blocks, item.kv_head, shared));
        for seq in item.seqs {
            let last = if item.seqs.len() == 1 { item.first + item.rows - 1 } else { 0 };
            let positions = seq.start + last / self.group + 1;
            let own = item.shared..positions.div_ceil(TILE);
            tiles.extend(self.tiles(seq.blocks, item.kv_head, own));
        }
    }

    /// Where some tiles begin that lie in `blocks`.
    fn tiles(
        &self,
        blocks: &[u32],
        kv_head: usize,
        tiles: Range<usize>,
    ) -> impl Iterator<Item = usize> {
        let (tile_words, per_block) = (TILE * self.kv.head_words(), self.kv.block_size() / TILE);
        tiles.map(move |tile| {
            let block = blocks[tile / per_block] as usize;
            self.kv.keys_start(self.task.layer, block, kv_head) + tile % per_block * tile_words
        })
    }
}

/// Tiles of a cache of integers as they are multiplied.
#[derive(Default)]
pub(super) struct Expanded {
    /// Keys and values of one tile after the other.
    words: Grow<u32>,
    /// Where these begin.
    starts: Vec<usize>,
    /// Whose they are: the sequence's first row and the kv head.
    of: Option<(usize, usize)>,
}

/// `[w / 4][16 positions]` words of four integers become `[w][16]` f32 or `[w / 2][16]` pairs of bf16.
struct ExpandKeys<'a> {
    dtype: Dtype,
    packed: &'a [u32],
    scales: &'a [u32],
    to: &'a mut [u32],
}

impl Job for ExpandKeys<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _s: S) {
        let Some(scales) = self.scales.first_chunk::<TILE>() else { return };
        let lines = self.packed.as_chunks::<TILE>().0;
        let number = |word, i, scale| f32::from_bits(scale) * integer(word, i);
        // The rows that a line becomes are a number that the compiler knows.
        match self.dtype {
            Dtype::F32 => {
                for (line, to) in lines.iter().zip(self.to.as_chunks_mut::<{ 4 * TILE }>().0) {
                    for (i, to) in to.as_chunks_mut::<TILE>().0.iter_mut().enumerate() {
                        for ((to, &word), &scale) in to.iter_mut().zip(line).zip(scales) {
                            *to = number(word, i, scale).to_bits();
                        }
                    }
                }
            }
            Dtype::Bf16 => {
                for (line, to) in lines.iter().zip(self.to.as_chunks_mut::<{ 2 * TILE }>().0) {
                    for (i, to) in to.as_chunks_mut::<TILE>().0.iter_mut().enumerate() {
                        for ((to, &word), &scale) in to.iter_mut().zip(line).zip(scales) {
                            *to = pair(number(word, 2 * i, scale), number(word, 2 * i + 1, scale));
                        }
                    }
                }
            }
        }
    }
}

/// `[16 positions / 4][d]` words of four integers become `[16][d]` f32 or `[16 / 2][d]` pairs of bf16.
struct ExpandValues<'a> {
    dtype: Dtype,
    packed: &'a [u32],
    scales: &'a [u32],
    to: &'a mut [u32],
}

impl Job for ExpandValues<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _s: S) {
        let Some(scales) = self.scales.first_chunk::<TILE>() else { return };
        let d = self.packed.len() * 4 / TILE;
        let number =
            |word, position: usize| f32::from_bits(scales[position]) * integer(word, position % 4);
        for (row, to) in self.to.chunks_exact_mut(d).enumerate() {
            let position = row * per_word(self.dtype);
            for (to, &word) in to.iter_mut().zip(&self.packed[position / 4 * d..][..d]) {
                *to = match self.dtype {
                    Dtype::F32 => number(word, position).to_bits(),
                    Dtype::Bf16 => pair(number(word, position), number(word, position + 1)),
                };
            }
        }
    }
}
