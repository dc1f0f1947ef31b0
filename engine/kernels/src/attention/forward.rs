//! The forward pass: work items shared out to the threads.

use super::tiles::{
    Divide, Fetch, Grow, MAX_ROWS, Panel, Products, ScoresOut, Softmax, Weights, stride,
};
use super::{Attention, AttnScratch, AttnSeq, Lane};
use crate::disjoint::Disjoint;
use crate::kv::{KvCache, TILE, integer};
use crate::simd::{Job, Simd};
use crate::{Dtype, Kernels, KvDtype};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Everything an item needs to know.
struct Forward<'a, P> {
    kernels: &'a Kernels,
    products: P,
    kv: &'a KvCache,
    task: Attention<'a>,
    /// Query heads that share a kv head.
    group: usize,
}

/// Rows `first..first + rows` of a sequence and kv head, counted as token * group + head in group.
struct Item<'a> {
    seq: &'a AttnSeq<'a>,
    kv_head: usize,
    first: usize,
    rows: usize,
}

/// All threads take items until none is left. Item numbers run through rows first, then kv heads,
/// then sequences, so that neighbours find keys and values in the cache.
pub(super) fn run<P: Products>(
    kernels: &Kernels,
    products: P,
    (kv, task): (&KvCache, Attention<'_>),
    out: &mut [f32],
    scratch: &mut AttnScratch,
) {
    let pass = Forward { kernels, products, kv, task, group: task.heads / kv.kv_heads() };
    let mut firsts = std::mem::take(&mut scratch.first_items);
    firsts.clear();
    let mut items = 0;
    for seq in task.seqs {
        firsts.push(items);
        items += pass.chunks(seq) * kv.kv_heads();
    }
    let threads = kernels.pool().threads().min(items);
    let lanes = Disjoint::new(scratch.lanes(threads));
    let out = Disjoint::new(out);
    let next = AtomicUsize::new(threads);
    kernels.pool().run(threads, &|thread| {
        // SAFETY: each thread number has its own lane.
        let lane = unsafe { lanes.part(thread, thread + 1) };
        let lane = &mut lane[0];
        let mut next_tiles = std::mem::take(&mut lane.next_tiles);
        let find = |number: usize, tiles: &mut Vec<usize>| {
            // Sequences without rows have no items: the last of equals is meant.
            let seq = firsts.partition_point(|&first| first <= number) - 1;
            let item = pass.item(&task.seqs[seq], number - firsts[seq]);
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
            pass.compute(&current, lane, ahead, &out);
            std::mem::swap(&mut lane.tiles, &mut next_tiles);
        }
        lane.next_tiles = next_tiles;
    });
    scratch.first_items = firsts;
}

impl<P: Products> Forward<'_, P> {
    /// Items of one kv head of a sequence.
    fn chunks(&self, seq: &AttnSeq<'_>) -> usize {
        (seq.rows * self.group).div_ceil(P::ROWS)
    }

    fn item<'a>(&self, seq: &'a AttnSeq<'a>, number: usize) -> Item<'a> {
        let chunks = self.chunks(seq);
        let first = number % chunks * P::ROWS;
        let rows = (seq.rows * self.group - first).min(P::ROWS);
        Item { seq, kv_head: number / chunks, first, rows }
    }

    /// Where a row of an item lies in `q` and in the output.
    fn place(&self, item: &Item<'_>, row: usize) -> usize {
        let row = item.first + row;
        let token = item.seq.first_row + row / self.group;
        let head = item.kv_head * self.group + row % self.group;
        (token * self.task.heads + head) * self.kv.head_dim()
    }

    /// Works on an item whose tiles are in `lane`; `next` are those of the next one, to fetch meanwhile.
    fn compute(&self, item: &Item<'_>, lane: &mut Lane, next: &[usize], out: &Disjoint<'_, f32>) {
        let d = self.kv.head_dim();
        let rows = item.rows;
        let mut lens = [0; MAX_ROWS];
        let lens = &mut lens[..rows];
        for (row, len) in lens.iter_mut().enumerate() {
            *len = item.seq.start + (item.first + row) / self.group + 1;
        }
        let positions = lens[rows - 1];
        let Lane { tiles, expanded, expanded_tiles, .. } = lane;
        let mut meanwhile = [Fetch::nothing(), Fetch::nothing()];
        let (keys, values) = match self.kv.dtype() {
            KvDtype::Int8 => self.expand(item, tiles, (expanded, expanded_tiles)),
            KvDtype::Plain(dtype) => {
                let (head_words, shift) = (self.kv.head_words(), self.kv.values_after());
                let words = self.kv.words();
                let fetch = |tiles, shift| Fetch::new(words, tiles, shift, head_words);
                // Later items of this head find the values in the processor's cache.
                if item.first == 0 {
                    meanwhile[0] = fetch(tiles, shift);
                }
                meanwhile[1] = fetch(next, 0);
                let keys = Panel { dtype, words, tiles, shift: 0, head_words };
                (keys, Panel { shift, ..keys })
            }
        };
        let [first, second] = &mut meanwhile;

        let q = (0..rows).map(|row| &self.task.q[self.place(item, row)..][..d]);
        let packed = lane.packed.slice(rows * d);
        self.products.pack(keys.dtype, q, packed);

        let stride = stride(positions);
        let scores = lane.scores.slice(rows * stride);
        let to = ScoresOut { to: scores, stride, rows };
        self.products.scores(packed, keys, to, first);
        let mut sums = [0.0; MAX_ROWS];
        let scale = self.task.scale;
        let softmax = Softmax {
            scale,
            scores,
            stride,
            lens,
            sums: &mut sums,
            fetch: (first, keys.head_words.div_ceil(2 * rows)),
        };
        self.kernels.isa.vectorize(softmax);
        first.rest();
        let mixed = lane.mixed.slice(rows * d);
        let weights = Weights { rows: scores, stride, lens };
        self.products.mix(weights, values, mixed, (&mut lane.products, second));
        second.rest();
        for (row, mixed) in mixed.chunks_exact(d).enumerate() {
            let place = self.place(item, row);
            // SAFETY: sequences do not overlap, and each row and head belongs to one item.
            let out = unsafe { out.part(place, place + d) };
            self.kernels.isa.vectorize(Divide { mixed, sum: sums[row], out });
        }
    }

    /// Keys and values of a cache of integers, as tiles of f32.
    fn expand<'l>(
        &self,
        item: &Item<'_>,
        tiles: &[usize],
        (expanded, starts): (&'l mut Grow<u32>, &'l mut Vec<usize>),
    ) -> (Panel<'l>, Panel<'l>) {
        let (d, words) = (self.kv.head_dim(), self.kv.head_words());
        let (per_block, len) = (self.kv.block_size() / TILE, tiles.len() * TILE * d);
        let all = expanded.slice(2 * len);
        let (keys, values) = all.split_at_mut(len);
        let targets = keys.chunks_exact_mut(TILE * d).zip(values.chunks_exact_mut(TILE * d));
        for (i, (&tile, (keys, values))) in tiles.iter().zip(targets).enumerate() {
            let block = item.seq.blocks[i / per_block] as usize;
            let start = self.kv.keys_start(self.task.layer, block, item.kv_head);
            let [key_scales, value_scales] = self.kv.tile_scales(start, tile);
            let packed = &self.kv.words()[tile..][..TILE * words];
            let to = ExpandTo { scales: key_scales, to: keys };
            self.kernels.isa.vectorize(ExpandKeys { packed, to });
            let packed = &self.kv.words()[tile + self.kv.values_after()..][..TILE * words];
            let to = ExpandTo { scales: value_scales, to: values };
            self.kernels.isa.vectorize(ExpandValues { packed, to });
        }
        starts.clear();
        starts.extend((0..tiles.len()).map(|i| i * TILE * d));
        let (words, dtype) = (&*all, Dtype::F32);
        let keys = Panel { dtype, words, tiles: starts, shift: 0, head_words: d };
        (keys, Panel { shift: len, ..keys })
    }

    /// Where the tiles of the positions that an item sees begin.
    fn find_tiles(&self, item: &Item<'_>, tiles: &mut Vec<usize>) {
        let positions = item.seq.start + (item.first + item.rows - 1) / self.group + 1;
        tiles.clear();
        let tile_words = TILE * self.kv.head_words();
        let per_block = self.kv.block_size() / TILE;
        let mut left = positions.div_ceil(TILE);
        for &block in item.seq.blocks {
            let start = self.kv.keys_start(self.task.layer, block as usize, item.kv_head);
            tiles.extend((0..per_block.min(left)).map(|i| start + i * tile_words));
            left -= per_block.min(left);
            if left == 0 {
                return;
            }
        }
    }
}

/// Where a tile of integers goes as f32 bits, and the scales of its positions.
struct ExpandTo<'a> {
    scales: &'a [u32],
    to: &'a mut [u32],
}

/// `[w / 4][16 positions]` words of four integers become `[w][16]`.
struct ExpandKeys<'a> {
    packed: &'a [u32],
    to: ExpandTo<'a>,
}

impl Job for ExpandKeys<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _s: S) {
        let Some(scales) = self.to.scales.first_chunk::<TILE>() else { return };
        let lines = self.packed.as_chunks::<TILE>().0;
        for (line, to) in lines.iter().zip(self.to.to.as_chunks_mut::<{ 4 * TILE }>().0) {
            for (i, to) in to.as_chunks_mut::<TILE>().0.iter_mut().enumerate() {
                for ((to, &word), &scale) in to.iter_mut().zip(line).zip(scales) {
                    *to = (f32::from_bits(scale) * integer(word, i)).to_bits();
                }
            }
        }
    }
}

/// `[16 positions / 4][d]` words of four integers become `[16][d]`.
struct ExpandValues<'a> {
    packed: &'a [u32],
    to: ExpandTo<'a>,
}

impl Job for ExpandValues<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _s: S) {
        let d = self.to.to.len() / TILE;
        for (i, (to, &scale)) in self.to.to.chunks_exact_mut(d).zip(self.to.scales).enumerate() {
            let words = &self.packed[i / 4 * d..][..d];
            for (to, &word) in to.iter_mut().zip(words) {
                *to = (f32::from_bits(scale) * integer(word, i % 4)).to_bits();
            }
        }
    }
}
