//! The paged cache of keys and values: one allocation, made once, cut into blocks of positions.
//!
//! A slot is `block * block_size + offset`; which sequence owns which block is the scheduler's
//! business and not known here. Nothing is ever cleared: readers look only at positions that their
//! sequence has written.
//!
//! Everything is kept in 32-bit words, one f32, two bf16 or four 8-bit integers each (the first in the
//! lowest bits). Layout: `[layer][block][kv head]`, and for each of those first the keys, then the values
//! of the block's positions, then, for integers, the scales of the keys and those of the values, as f32.
//! Both lie in tiles of [`TILE`] positions, as the products sum them:
//!
//! ```text
//! keys    [tile][w][16]       a word holds p elements of one position; a line, one word of 16 positions
//! values  [tile][16 / p][d]   a word holds one element of p positions that follow each other
//! ```
//! where p is what fits into a word and w = d / p. Every tile starts on a 64-byte line.
//!
//! Values are finite, so that a weight of zero hides what a row does not see. Whoever sees a position whose
//! value is not finite has to know: the key there is stored as not a number (integers: the scale).

use crate::cpu::Isa;
use crate::disjoint::Disjoint;
use crate::gemm::buffer::Line;
use crate::gemm::convert::{element, pack_line, pair, per_word, round_bf16};
use crate::gemm::pack::transpose;
use crate::simd::{Job, Simd, magnitude};
use crate::{Dtype, Kernels, KvDtype, huge, prefetch};

/// Positions in one tile of keys: the lanes of a 512-bit register.
pub(crate) const TILE: usize = 16;

/// The largest head size.
pub(crate) const MAX_HEAD_DIM: usize = 256;

/// Below this many rows a write is not worth waking the other threads.
const SERIAL_ROWS: usize = 16;

/// Words of a huge page, where the cache begins if it is larger than that.
const HUGE_PAGE_WORDS: usize = huge::HUGE_PAGE / 4;

/// Keys and values of all layers, in blocks of positions.
///
/// ```
/// use kernels::{Dtype, Kernels, KvCache, Level};
/// let kernels = Kernels::new(Level::detect(), 1).unwrap();
/// let mut kv = KvCache::new(Dtype::Bf16, 1, 4, 16, 1, 16);
/// kernels.kv_write(&mut kv, 0, &[1.0; 16], &[2.0; 16], &[35]);
/// assert_eq!(kv.key(0, 35, 0)[3], 1.0);
/// assert_eq!(kv.value(0, 35, 0)[3], 2.0);
/// ```
pub struct KvCache {
    shape: Shape,
    /// The cache begins at `lead`.
    words: Vec<u32>,
    lead: usize,
}

/// Where things lie; see the layout above.
#[derive(Clone, Copy)]
struct Shape {
    dtype: KvDtype,
    layers: usize,
    num_blocks: usize,
    block_size: usize,
    kv_heads: usize,
    head_dim: usize,
}

impl KvCache {
    /// A cache of `num_blocks` blocks of `block_size` positions in each of `layers` layers, all zero.
    ///
    /// The system hands out the memory when it is first written to.
    ///
    /// # Panics
    /// When `block_size` is no positive multiple of 16, `head_dim` no multiple of 16 from 16 to 256, or the
    /// bytes of all blocks exceed an address.
    pub fn new(
        dtype: impl Into<KvDtype>,
        layers: usize,
        num_blocks: usize,
        block_size: usize,
        kv_heads: usize,
        head_dim: usize,
    ) -> Self {
        assert!(
            block_size > 0 && block_size.is_multiple_of(TILE),
            "block size is {block_size}, must be a multiple of {TILE}"
        );
        check_head_dim(head_dim);
        let dtype = dtype.into();
        let bytes = Self::bytes_per_block(dtype, layers, block_size, kv_heads, head_dim);
        let bytes = num_blocks.checked_mul(bytes).expect("the bytes of all blocks fit an address");
        let (words, lead) = zeroed(bytes / 4);
        let shape = Shape { dtype, layers, num_blocks, block_size, kv_heads, head_dim };
        Self { shape, words, lead }
    }

    /// Bytes of one block in all layers: keys and values.
    ///
    /// # Panics
    /// When they exceed an address.
    pub fn bytes_per_block(
        dtype: impl Into<KvDtype>,
        layers: usize,
        block_size: usize,
        kv_heads: usize,
        head_dim: usize,
    ) -> usize {
        [layers, kv_heads, 2, block_size]
            .into_iter()
            .try_fold(dtype.into().head_bytes(head_dim), usize::checked_mul)
            .expect("the bytes of a block fit an address")
    }

    /// Bytes of all blocks.
    pub fn bytes(&self) -> usize {
        let Shape { dtype, layers, num_blocks, block_size, kv_heads, head_dim } = self.shape;
        num_blocks * Self::bytes_per_block(dtype, layers, block_size, kv_heads, head_dim)
    }

    /// The storage format.
    pub fn dtype(&self) -> KvDtype {
        self.shape.dtype
    }

    /// Layers.
    pub fn layers(&self) -> usize {
        self.shape.layers
    }

    /// Blocks in each layer.
    pub fn num_blocks(&self) -> usize {
        self.shape.num_blocks
    }

    /// Positions in a block.
    pub fn block_size(&self) -> usize {
        self.shape.block_size
    }

    /// Heads of keys and values.
    pub fn kv_heads(&self) -> usize {
        self.shape.kv_heads
    }

    /// Elements of one head.
    pub fn head_dim(&self) -> usize {
        self.shape.head_dim
    }

    /// The key at `slot` of one head, as stored. For tests and tools; slow.
    ///
    /// # Panics
    /// When layer, slot or head do not exist.
    pub fn key(&self, layer: usize, slot: u32, head: usize) -> Vec<f32> {
        let (start, lane) = self.shape.key_tile(layer, slot, head);
        let scale = self.shape.scale_of_key(layer, slot, head);
        let word = |w: usize| self.words()[start + w * TILE + lane];
        (0..self.head_dim()).map(|i| self.expand(word, i, scale)).collect()
    }

    /// The value at `slot` of one head, as stored. For tests and tools; slow.
    ///
    /// # Panics
    /// When layer, slot or head do not exist.
    pub fn value(&self, layer: usize, slot: u32, head: usize) -> Vec<f32> {
        let (start, lane) = self.shape.value_row(layer, slot, head);
        let scale = self.shape.scale_of_key(layer, slot, head) + self.block_size();
        let one = |i: usize| self.expand(|_| self.words()[start + i], lane, scale);
        (0..self.head_dim()).map(one).collect()
    }

    /// Element `i` of those in some words, whose scale is word `scale` if they have one.
    fn expand(&self, word: impl Fn(usize) -> u32, i: usize, scale: usize) -> f32 {
        match self.shape.dtype {
            KvDtype::Plain(dtype) => element(dtype, word, i),
            KvDtype::Int8 => f32::from_bits(self.words()[scale]) * integer(word(i / 4), i % 4),
        }
    }

    /// Copies key and value of one position to another, in one layer; all heads, bit by bit.
    ///
    /// # Panics
    /// When the layer or one of the slots does not exist.
    pub fn copy_slot(&mut self, layer: usize, from: u32, to: u32) {
        let (shape, words) = (self.shape, self.shape.head_words());
        let cache = &mut self.words[self.lead..];
        for head in 0..shape.kv_heads {
            let (source, lane) = shape.key_tile(layer, from, head);
            let (target, target_lane) = shape.key_tile(layer, to, head);
            for line in (0..words * TILE).step_by(TILE) {
                cache[target + line + target_lane] = cache[source + line + lane];
            }
            let (source, lane) = shape.value_row(layer, from, head);
            let (target, target_lane) = shape.value_row(layer, to, head);
            for i in 0..shape.head_dim {
                let value = cache[source + i] >> (lane * shape.bits());
                put(&mut cache[target + i], target_lane, shape.bits(), value);
            }
            if shape.dtype == KvDtype::Int8 {
                let source = shape.scale_of_key(layer, from, head);
                let target = shape.scale_of_key(layer, to, head);
                for after in [0, shape.block_size] {
                    cache[target + after] = cache[source + after];
                }
            }
        }
    }

    /// All words, the first one on a 64-byte line.
    pub(crate) fn words(&self) -> &[u32] {
        &self.words[self.lead..]
    }

    /// Words of one head of one position.
    pub(crate) fn head_words(&self) -> usize {
        self.shape.head_words()
    }

    /// The scales of keys and values of the 16 positions whose tile of keys begins at word `tile`; for
    /// caches of integers.
    pub(crate) fn tile_scales(&self, tile: usize) -> [&[u32]; 2] {
        let keys = tile - tile % self.shape.region();
        let first = keys + 2 * self.values_after() + (tile - keys) / self.head_words();
        [first, first + self.block_size()].map(|at| &self.words()[at..at + TILE])
    }

    /// Where the keys of one head in one block begin.
    pub(crate) fn keys_start(&self, layer: usize, block: usize, head: usize) -> usize {
        self.shape.keys_start(layer, block, head)
    }

    /// How far behind a block's keys its values begin.
    pub(crate) fn values_after(&self) -> usize {
        self.shape.values_after()
    }
}

impl Shape {
    #[inline(always)]
    fn head_words(self) -> usize {
        match self.dtype {
            KvDtype::Plain(dtype) => self.head_dim / per_word(dtype),
            KvDtype::Int8 => self.head_dim / 4,
        }
    }

    /// Bits of an element.
    #[inline(always)]
    fn bits(self) -> usize {
        32 * self.head_words() / self.head_dim
    }

    /// Words of one head in one block.
    #[inline(always)]
    fn region(self) -> usize {
        2 * self.block_size * self.dtype.head_bytes(self.head_dim) / 4
    }

    /// The block of a slot and the offset there.
    #[inline(always)]
    fn place(self, slot: u32) -> (usize, usize) {
        let block_size = self.block_size as u32;
        ((slot / block_size) as usize, (slot % block_size) as usize)
    }

    /// Where the scale of the key of a slot lies, in caches of integers; that of the value lies a block's
    /// positions further.
    fn scale_of_key(self, layer: usize, slot: u32, head: usize) -> usize {
        let (block, offset) = self.place(slot);
        self.keys_start(layer, block, head) + 2 * self.values_after() + offset
    }

    #[inline(always)]
    fn values_after(self) -> usize {
        self.block_size * self.head_words()
    }

    #[inline(always)]
    fn keys_start(self, layer: usize, block: usize, head: usize) -> usize {
        assert!(layer < self.layers, "layer {layer}, the cache has {}", self.layers);
        assert!(block < self.num_blocks, "block {block}, the cache has {}", self.num_blocks);
        assert!(head < self.kv_heads, "kv head {head}, the cache has {}", self.kv_heads);
        ((layer * self.num_blocks + block) * self.kv_heads + head) * self.region()
    }

    /// Where the tile with the key of a slot begins, and the lane of the key.
    #[inline(always)]
    fn key_tile(self, layer: usize, slot: u32, head: usize) -> (usize, usize) {
        let (block, offset) = self.place(slot);
        let start = self.keys_start(layer, block, head);
        (start + offset / TILE * TILE * self.head_words(), offset % TILE)
    }

    /// Where the words with the value of a slot begin, and its part of each.
    #[inline(always)]
    fn value_row(self, layer: usize, slot: u32, head: usize) -> (usize, usize) {
        let (block, offset) = self.place(slot);
        let start = self.keys_start(layer, block, head) + self.values_after();
        let per_word = 32 / self.bits();
        (start + offset / per_word * self.head_dim, offset % per_word)
    }
}

impl Kernels {
    /// Stores keys and values of rows at their slots (`block * block_size + offset`), rounded to the
    /// cache's format (to nearest even).
    ///
    /// `k` and `v` are `[rows, kv_heads * head_dim]`. A slot that appears twice keeps the later row.
    ///
    /// # Panics
    /// When a slice has the wrong length or a layer or slot does not exist.
    pub fn kv_write(&self, kv: &mut KvCache, layer: usize, k: &[f32], v: &[f32], slots: &[u32]) {
        let len = slots.len() * kv.kv_heads() * kv.head_dim();
        assert!(k.len() == len, "{} elements of k, {} rows need {len}", k.len(), slots.len());
        assert!(v.len() == len, "{} elements of v, {} rows need {len}", v.len(), slots.len());
        let write = Write { isa: self.isa, shape: kv.shape, layer, slots };
        let cache = Disjoint::new(&mut kv.words[kv.lead..]);
        // No two tasks touch the same words, even where slots repeat.
        let task = |i: usize| {
            self.isa.vectorize(WriteHead {
                write: &write,
                head: i / 2,
                k,
                v,
                cache: &cache,
                keys: i.is_multiple_of(2),
            });
        };
        let tasks = 2 * kv.shape.kv_heads;
        if slots.len() < SERIAL_ROWS {
            (0..tasks).for_each(task);
        } else {
            self.pool().run(tasks, &task);
        }
    }
}

/// A call of `kv_write`.
struct Write<'a> {
    isa: Isa,
    shape: Shape,
    layer: usize,
    slots: &'a [u32],
}

/// The keys of one head, or its values.
struct WriteHead<'a> {
    write: &'a Write<'a>,
    head: usize,
    k: &'a [f32],
    v: &'a [f32],
    cache: &'a Disjoint<'a, u32>,
    keys: bool,
}

impl Job for WriteHead<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _simd: S) {
        match self.keys {
            true => self.keys(),
            false => self.values(),
        }
    }
}

impl WriteHead<'_> {
    /// The row's elements of this head in `x`.
    #[inline(always)]
    fn of<'x>(&self, x: &'x [f32], row: usize) -> &'x [f32] {
        let d = self.write.shape.head_dim;
        &x[(row * self.write.shape.kv_heads + self.head) * d..][..d]
    }

    #[inline(always)]
    fn keys(&self) {
        let Write { shape, layer, slots, .. } = *self.write;
        let words = shape.head_words();
        let mut row = 0;
        while row < slots.len() {
            let slot = slots[row];
            let (start, lane) = shape.key_tile(layer, slot, self.head);
            let whole = lane == 0
                && shape.dtype != KvDtype::Int8
                && slots[row..].len() >= TILE
                && (slot..).zip(&slots[row..row + TILE]).all(|(a, &b)| a == b);
            let rows = if whole { TILE } else { 1 };
            if let Some(&next) = slots.get(row + rows + 1) {
                self.ask_for(shape.key_tile(layer, next, self.head).0, TILE * words);
            }
            // SAFETY: only this task writes keys of this head.
            let tile = unsafe { self.cache.part(start, start + TILE * words) };
            match shape.dtype {
                KvDtype::Plain(dtype) if whole => self.tile_of_keys(row, dtype, tile),
                KvDtype::Plain(dtype) => {
                    let mut key = [0; MAX_HEAD_DIM];
                    round_words(dtype, self.key(row), &mut key[..words]);
                    write_key(key[..words].iter().copied(), lane, tile);
                }
                KvDtype::Int8 => {
                    let mut key = [0; MAX_HEAD_DIM];
                    let scale = quantize(self.key(row), &mut key);
                    let words = key.as_chunks().0.iter().map(|bytes| u32::from_le_bytes(*bytes));
                    write_key(words, lane, tile);
                    self.scale(shape.scale_of_key(layer, slot, self.head), scale);
                }
            }
            row += rows;
        }
    }

    /// The key of a row, or what stands for it where the value is not finite.
    #[inline(always)]
    fn key(&self, row: usize) -> &[f32] {
        const BROKEN: [f32; MAX_HEAD_DIM] = [f32::NAN; MAX_HEAD_DIM];
        match finite(self.write.shape.dtype, self.of(self.v, row)) {
            true => self.of(self.k, row),
            false => &BROKEN[..self.write.shape.head_dim],
        }
    }

    /// Sixteen rows from `row` on as one tile.
    #[inline(always)]
    fn tile_of_keys(&self, row: usize, dtype: Dtype, tile: &mut [u32]) {
        // Not by `from_fn`, which the compiler keeps apart and then compiles for any processor.
        let mut keys = [&[][..]; TILE];
        keys.iter_mut().enumerate().for_each(|(i, key)| *key = self.key(row + i));
        write_keys(self.write.isa, dtype, keys, tile);
    }

    #[inline(always)]
    fn values(&self) {
        let Write { shape, layer, slots, .. } = *self.write;
        let (d, bits) = (shape.head_dim, shape.bits());
        for (row, &slot) in slots.iter().enumerate() {
            if let Some(&next) = slots.get(row + 2) {
                self.ask_for(shape.value_row(layer, next, self.head).0, d);
            }
            let source = self.of(self.v, row);
            let (start, lane) = shape.value_row(layer, slot, self.head);
            // SAFETY: only this task writes values of this head.
            let target = unsafe { self.cache.part(start, start + d) };
            match shape.dtype {
                KvDtype::Plain(dtype) => write_value(dtype, source, lane, target),
                KvDtype::Int8 => {
                    let mut bytes = [0; MAX_HEAD_DIM];
                    let scale = match finite(KvDtype::Int8, source) {
                        true => quantize(source, &mut bytes),
                        false => 0.0,
                    };
                    let each = target.iter_mut().zip(bytes);
                    each.for_each(|(to, byte)| put(to, lane, bits, byte.into()));
                    let place = shape.scale_of_key(layer, slot, self.head) + shape.block_size;
                    self.scale(place, scale);
                }
            }
        }
    }

    /// Writes the scale of a key or of a value.
    fn scale(&self, place: usize, scale: f32) {
        // SAFETY: only one task writes scales of keys of a head, and one those of values.
        let word = unsafe { self.cache.part(place, place + 1) };
        word[0] = scale.to_bits();
    }

    /// Asks for words that will be written: their lines lie apart and come from memory.
    #[inline(always)]
    fn ask_for(&self, start: usize, words: usize) {
        (start..start + words).step_by(TILE).for_each(|i| prefetch::near(self.cache.address(i)));
    }
}

/// Whether elements are finite once they are rounded, or are what integers stand for.
#[inline(always)]
fn finite(dtype: KvDtype, elements: &[f32]) -> bool {
    /// From here on bf16 rounds to infinity.
    const BF16_LIMIT: u32 = 0x7f7f_8000;
    let limit = match dtype {
        KvDtype::Plain(Dtype::F32) => f32::INFINITY.to_bits(),
        KvDtype::Plain(Dtype::Bf16) => BF16_LIMIT,
        // They may be multiplied as bf16; 127 times the scale can be a unit more than what it was made of.
        KvDtype::Int8 => BF16_LIMIT - 1,
    };
    elements.iter().fold(0, |most, x| (x.to_bits() & 0x7fff_ffff).max(most)) < limit
}

/// Writes the value of a position into tiles of values, zeros where it is not finite.
#[inline(always)]
pub(crate) fn write_value(dtype: Dtype, elements: &[f32], position: usize, tiles: &mut [u32]) {
    let (d, per_word) = (elements.len(), per_word(dtype));
    let words = &mut tiles[position / per_word * d..][..d];
    let keep = if finite(KvDtype::Plain(dtype), elements) { u32::MAX } else { 0 };
    for (to, &x) in words.iter_mut().zip(elements) {
        match dtype {
            Dtype::F32 => *to = x.to_bits() & keep,
            Dtype::Bf16 => put(to, position % per_word, 16, round_bf16(x) & keep),
        }
    }
}

/// Replaces part `lane` of a word, `bits` wide, by the lowest bits of `value`.
#[inline(always)]
fn put(word: &mut u32, lane: usize, bits: usize, value: u32) {
    let mask = u32::MAX >> (32 - bits);
    *word = *word & !(mask << (lane * bits)) | (value & mask) << (lane * bits);
}

/// Integer `i` of the four in a word.
#[inline(always)]
pub(crate) fn integer(word: u32, i: usize) -> f32 {
    f32::from((word >> (8 * i)) as u8 as i8)
}

/// Rounds a head's key or value to 8-bit integers, ties to even; returns the scale. An element that is
/// not finite makes the scale not a number.
#[inline(always)]
fn quantize(elements: &[f32], bytes: &mut [u8; MAX_HEAD_DIM]) -> f32 {
    const LARGEST: f32 = 127.0;
    let (largest, faults) = magnitude(elements);
    if faults != 0.0 {
        return f32::NAN;
    }
    // Below this the inverse overflows; nothing so small changes a score.
    if largest < LARGEST * f32::MIN_POSITIVE {
        return 0.0;
    }
    let inverse = LARGEST / largest;
    for (byte, x) in bytes.iter_mut().zip(elements) {
        *byte = ((x * inverse).round_ties_even() as i8).cast_unsigned();
    }
    largest / LARGEST
}

/// Rounds elements into words.
#[inline(always)]
pub(crate) fn round_words(dtype: Dtype, elements: &[f32], words: &mut [u32]) {
    match dtype {
        Dtype::F32 => words.iter_mut().zip(elements).for_each(|(w, x)| *w = x.to_bits()),
        Dtype::Bf16 => words
            .iter_mut()
            .zip(elements.chunks_exact(2))
            .for_each(|(word, x)| *word = pair(x[0], x[1])),
    }
}

/// Rounds sixteen keys into a tile.
#[inline(always)]
pub(crate) fn write_keys(isa: Isa, dtype: Dtype, keys: [&[f32]; TILE], tile: &mut [u32]) {
    let elements = TILE * per_word(dtype);
    for (i, to) in tile.chunks_mut(TILE * TILE).enumerate() {
        let mut square = [Line::ZERO; TILE];
        for (line, key) in square.iter_mut().zip(keys) {
            pack_line(dtype, &key[i * elements..key.len().min((i + 1) * elements)], line);
        }
        let square = transpose(isa, &square);
        to.as_chunks_mut::<TILE>().0.iter_mut().zip(square).for_each(|(to, line)| *to = line.0);
    }
}

/// Puts the words of a key into lane `lane` of a tile.
#[inline(always)]
pub(crate) fn write_key(key: impl Iterator<Item = u32>, lane: usize, tile: &mut [u32]) {
    tile.chunks_exact_mut(TILE).zip(key).for_each(|(line, word)| line[lane] = word);
}

/// Panics unless the kernels can work with heads of this size.
pub(crate) fn check_head_dim(head_dim: usize) {
    assert!(
        (TILE..=MAX_HEAD_DIM).contains(&head_dim) && head_dim.is_multiple_of(TILE),
        "head size is {head_dim}, must be a multiple of {TILE} up to {MAX_HEAD_DIM}"
    );
}

/// `len` words that the system zeroes when they are first touched, from the returned index on:
/// a 64-byte line, and for large caches the start of a huge page.
pub(crate) fn zeroed(len: usize) -> (Vec<u32>, usize) {
    let align = if len >= HUGE_PAGE_WORDS { HUGE_PAGE_WORDS } else { TILE };
    let words = vec![0; len + align];
    let lead = words.as_ptr().align_offset(4 * align).min(align);
    if len >= HUGE_PAGE_WORDS {
        let cache = &words[lead..];
        huge::ask_for_huge_pages(cache.as_ptr().cast(), size_of_val(cache));
    }
    (words, lead)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Level;

    /// Numbers that differ in every bit that bf16 drops.
    fn numbers(len: usize, seed: u32) -> Vec<f32> {
        (0..len as u32).map(|i| ((i ^ seed).wrapping_mul(2_654_435_761) as f32) / 4e9).collect()
    }

    const DTYPES: [KvDtype; 3] =
        [KvDtype::Plain(Dtype::F32), KvDtype::Plain(Dtype::Bf16), KvDtype::Int8];

    fn stored(dtype: KvDtype, x: &[f32]) -> Vec<f32> {
        match dtype {
            KvDtype::Plain(Dtype::F32) => x.to_vec(),
            KvDtype::Plain(Dtype::Bf16) => {
                x.iter().map(|&x| half::bf16::from_f32(x).to_f32()).collect()
            }
            KvDtype::Int8 => {
                let largest = x.iter().fold(0.0f32, |m, x| m.max(x.abs()));
                let (scale, inverse) = (largest / 127.0, 127.0 / largest);
                x.iter().map(|x| (x * inverse).round_ties_even() * scale).collect()
            }
        }
    }

    #[test]
    fn rows_come_back_rounded_from_their_slots() {
        for dtype in DTYPES {
            for (threads, rows) in [(1, 5), (3, 200)] {
                let kernels = Kernels::new(Level::Portable, threads).unwrap();
                let (heads, d) = (3, 48);
                let mut kv = KvCache::new(dtype, 2, 9, 32, heads, d);
                let slots: Vec<u32> = (0..rows).map(|i| (i * 37 + 5) % (9 * 32)).collect();
                let k = numbers(slots.len() * heads * d, 1);
                let v = numbers(slots.len() * heads * d, 2);
                kernels.kv_write(&mut kv, 1, &k, &v, &slots);
                for (row, &slot) in slots.iter().enumerate() {
                    for head in 0..heads {
                        let part = (row * heads + head) * d..(row * heads + head + 1) * d;
                        assert_eq!(kv.key(1, slot, head), stored(dtype, &k[part.clone()]));
                        assert_eq!(kv.value(1, slot, head), stored(dtype, &v[part]));
                    }
                }
                let used: std::collections::HashSet<u32> = slots.into_iter().collect();
                for slot in (0..9 * 32).filter(|slot| !used.contains(slot)) {
                    assert_eq!(kv.key(1, slot, 0), vec![0.0; d]);
                }
                assert!((0..9 * 32).all(|slot| kv.value(0, slot, 2) == vec![0.0; d]));
            }
        }
    }

    #[test]
    fn integers_keep_faults_and_zeros() {
        let kernels = Kernels::new(Level::Portable, 1).unwrap();
        let mut kv = KvCache::new(KvDtype::Int8, 1, 1, 16, 1, 16);
        let mut k = [0.5; 16];
        k[3] = f32::INFINITY;
        kernels.kv_write(&mut kv, 0, &k, &[0.0; 16], &[4]);
        assert!(kv.key(0, 4, 0).iter().all(|x| x.is_nan()));
        assert_eq!(kv.value(0, 4, 0), vec![0.0; 16]);
    }

    #[test]
    fn a_value_that_is_not_finite_is_told_by_its_key() {
        let formats = [(Dtype::F32, f32::INFINITY), (Dtype::Bf16, 3.4e38)];
        let formats = formats.map(|(dtype, broken)| (KvDtype::Plain(dtype), broken));
        for (dtype, broken) in
            formats.into_iter().chain([(KvDtype::Int8, f32::from_bits(0x7f7f_7fff))])
        {
            for level in Level::ALL.into_iter().filter(|level| level.isa().is_some()) {
                let kernels = Kernels::new(level, 1).unwrap();
                let mut kv = KvCache::new(dtype, 1, 2, 16, 1, 32);
                let mut v = [0.5; 20 * 32];
                v[3 * 32 + 7] = broken;
                v[17 * 32] = f32::NAN;
                let slots: Vec<u32> = (0..20).collect();
                kernels.kv_write(&mut kv, 0, &[1.0; 20 * 32], &v, &slots);
                for slot in slots {
                    let (key, value) = (kv.key(0, slot, 0), kv.value(0, slot, 0));
                    if slot == 3 || slot == 17 {
                        assert!(key.iter().all(|x| x.is_nan()), "{level} {dtype:?} slot {slot}");
                        assert_eq!(value, [0.0; 32]);
                    } else {
                        assert_eq!((key, value), (vec![1.0; 32], vec![0.5; 32]));
                    }
                }
            }
        }
    }

    #[test]
    fn a_repeated_slot_keeps_the_later_row() {
        let kernels = Kernels::new(Level::Portable, 2).unwrap();
        let mut kv = KvCache::new(Dtype::Bf16, 1, 1, 16, 1, 16);
        let k: Vec<f32> = (0..200 * 16).map(|i| (i / 16) as f32).collect();
        kernels.kv_write(&mut kv, 0, &k, &k, &[7; 200]);
        assert_eq!(kv.key(0, 7, 0), vec![199.0; 16]);
        assert_eq!(kv.value(0, 7, 0), vec![199.0; 16]);
    }

    #[test]
    fn a_slot_is_copied_in_one_layer_and_nothing_else_changes() {
        let kernels = Kernels::new(Level::Portable, 1).unwrap();
        for dtype in DTYPES {
            let (heads, d) = (2, 32);
            let mut kv = KvCache::new(dtype, 2, 3, 16, heads, d);
            let k = numbers(3 * 16 * heads * d, 3);
            let v = numbers(3 * 16 * heads * d, 4);
            let slots: Vec<u32> = (0..48).collect();
            (0..2).for_each(|layer| kernels.kv_write(&mut kv, layer, &k, &v, &slots));
            kv.copy_slot(1, 5, 38);
            for (layer, slot) in (0..2).flat_map(|layer| slots.iter().map(move |s| (layer, *s))) {
                let row = if (layer, slot) == (1, 38) { 5 } else { slot as usize };
                for head in 0..heads {
                    let part = (row * heads + head) * d..(row * heads + head + 1) * d;
                    assert_eq!(kv.key(layer, slot, head), stored(dtype, &k[part.clone()]));
                    assert_eq!(kv.value(layer, slot, head), stored(dtype, &v[part]));
                }
            }
        }
    }

    #[test]
    fn sizes_add_up_and_large_caches_start_on_huge_pages() {
        assert_eq!(KvCache::bytes_per_block(Dtype::Bf16, 30, 16, 3, 64), 30 * 3 * 2 * 16 * 64 * 2);
        assert_eq!(KvCache::bytes_per_block(KvDtype::Int8, 30, 16, 3, 64), 30 * 3 * 2 * 16 * 68);
        let kv = KvCache::new(Dtype::F32, 2, 100, 16, 3, 64);
        assert_eq!(kv.bytes(), 100 * 2 * 3 * 2 * 16 * 64 * 4);
        assert!(kv.words().len() * 4 >= kv.bytes());
        assert_eq!(kv.words().as_ptr() as usize % (2 << 20), 0);
        let kv = KvCache::new(Dtype::Bf16, 1, 1, 16, 1, 16);
        assert_eq!(kv.words().as_ptr() as usize % 64, 0);
    }

    #[test]
    #[should_panic(expected = "block 4, the cache has 4")]
    fn a_slot_outside_the_cache_is_refused() {
        let kernels = Kernels::new(Level::Portable, 1).unwrap();
        let mut kv = KvCache::new(Dtype::F32, 1, 4, 16, 1, 16);
        kernels.kv_write(&mut kv, 0, &[0.0; 16], &[0.0; 16], &[64]);
    }

    #[test]
    #[should_panic(expected = "fit an address")]
    fn a_cache_beyond_the_address_space_is_refused() {
        KvCache::new(Dtype::F32, 1, usize::MAX / 1024, 16, 1, 16);
    }
}
