//! Agreement with the definition, and equality to the bit where the module promises it.

mod bunches;
mod families;

use super::*;
use crate::testing::Random;
use crate::{Dtype, KvDtype};
use std::ops::Range;

/// Heads of queries, of keys, and their size.
#[derive(Clone, Copy, Debug)]
struct Heads {
    heads: usize,
    kv_heads: usize,
    d: usize,
}

const SHAPES: [Heads; 8] = [
    Heads { heads: 3, kv_heads: 3, d: 16 },
    Heads { heads: 4, kv_heads: 2, d: 32 },
    Heads { heads: 9, kv_heads: 3, d: 64 },
    Heads { heads: 7, kv_heads: 1, d: 80 },
    Heads { heads: 6, kv_heads: 2, d: 96 },
    Heads { heads: 2, kv_heads: 1, d: 128 },
    Heads { heads: 13, kv_heads: 1, d: 48 },
    Heads { heads: 5, kv_heads: 1, d: 256 },
];

const DTYPES: [Dtype; 2] = [Dtype::F32, Dtype::Bf16];
const KV_DTYPES: [KvDtype; 3] =
    [KvDtype::Plain(Dtype::F32), KvDtype::Plain(Dtype::Bf16), KvDtype::Int8];

/// The tokens of one sequence: what a model would have computed for its positions.
struct Tokens {
    len: usize,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
}

impl Tokens {
    fn random(random: &mut Random, shape: Heads, len: usize) -> Self {
        Self {
            len,
            q: random.normal(len * shape.heads * shape.d),
            k: random.normal(len * shape.kv_heads * shape.d),
            v: random.normal(len * shape.kv_heads * shape.d),
        }
    }
}

/// A cache of two layers that starts full of NaN, and the blocks given to each sequence.
struct Paged {
    kv: KvCache,
    tables: Vec<Vec<u32>>,
    shape: Heads,
}

const LAYER: usize = 1;

impl Paged {
    fn new(
        kernels: &Kernels,
        (dtype, block_size): (impl Into<KvDtype>, usize),
        shape: Heads,
        lens: &[usize],
        order: impl Fn(usize) -> Vec<u32>,
    ) -> Self {
        let blocks: Vec<usize> = lens.iter().map(|len| len.div_ceil(block_size)).collect();
        let total = blocks.iter().sum::<usize>() + 2;
        let mut kv = KvCache::new(dtype, 2, total, block_size, shape.kv_heads, shape.d);
        let slots: Vec<u32> = (0..(total * block_size) as u32).collect();
        let nan = vec![f32::NAN; slots.len() * shape.kv_heads * shape.d];
        kernels.kv_write(&mut kv, 0, &nan, &nan, &slots);
        kernels.kv_write(&mut kv, 1, &nan, &nan, &slots);
        let mut free = order(total).into_iter();
        let tables = blocks.iter().map(|&n| free.by_ref().take(n).collect()).collect();
        Self { kv, tables, shape }
    }

    /// Writes the given positions of each sequence, attends, and gives the outputs by sequence.
    fn step(
        &mut self,
        kernels: &Kernels,
        tokens: &[&Tokens],
        ranges: &[Range<usize>],
        scratch: &mut AttnScratch,
    ) -> Vec<Vec<f32>> {
        let Heads { heads, kv_heads, d } = self.shape;
        let (mut q, mut k, mut v, mut slots) = (vec![], vec![], vec![], vec![]);
        let mut seqs = vec![];
        let size = self.kv.block_size();
        for ((tokens, range), table) in tokens.iter().zip(ranges).zip(&self.tables) {
            let first_row = slots.len();
            seqs.push(AttnSeq { first_row, rows: range.len(), start: range.start, blocks: table });
            q.extend(&tokens.q[range.start * heads * d..range.end * heads * d]);
            k.extend(&tokens.k[range.start * kv_heads * d..range.end * kv_heads * d]);
            v.extend(&tokens.v[range.start * kv_heads * d..range.end * kv_heads * d]);
            slots.extend(range.clone().map(|t| table[t / size] * size as u32 + (t % size) as u32));
        }
        kernels.kv_write(&mut self.kv, LAYER, &k, &v, &slots);
        let mut out = vec![f32::NAN; q.len()];
        let task = Attention { layer: LAYER, q: &q, seqs: &seqs, heads, scale: scale(d) };
        kernels.attention(&self.kv, task, &mut out, scratch);
        let mut rest = &out[..];
        ranges
            .iter()
            .map(|range| {
                let part;
                (part, rest) = rest.split_at(range.len() * heads * d);
                part.to_vec()
            })
            .collect()
    }
}

fn scale(d: usize) -> f32 {
    1.0 / (d as f32).sqrt()
}

fn identity(len: usize) -> Vec<u32> {
    (0..len as u32).collect()
}

fn fast_levels() -> impl Iterator<Item = Level> {
    Level::ALL.into_iter().filter(|level| *level != Level::Reference && level.available())
}

fn kernels(level: Level, threads: usize) -> Kernels {
    Kernels::new(level, threads).unwrap()
}

/// Asserts that the largest difference is within `tolerance` of the largest expected number.
fn assert_close(found: &[f32], expected: &[f32], tolerance: f32, what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let size = expected.iter().fold(1e-3f32, |size, x| size.max(x.abs()));
    for (i, (a, b)) in found.iter().zip(expected).enumerate() {
        assert!((a - b).abs() <= tolerance * size, "{what}: {a} at {i}, expected {b} of {size}");
    }
}

fn bits(x: &[f32]) -> Vec<u32> {
    x.iter().map(|x| x.to_bits()).collect()
}

/// One ragged batch: whole prompts, chunks in the middle, decode steps, sequences without rows.
const BATCH: [(usize, Range<usize>); 9] = [
    (1, 0..1),
    (37, 0..37),
    (50, 50..50),
    (64, 63..64),
    (45, 17..31),
    (16, 0..16),
    (200, 199..200),
    (130, 100..130),
    (0, 0..0),
];

fn run_batch(kernels: &Kernels, dtype: KvDtype, shape: Heads, seed: u64) -> Vec<Vec<f32>> {
    let mut random = Random::new(seed);
    let tokens: Vec<Tokens> =
        BATCH.iter().map(|(len, _)| Tokens::random(&mut random, shape, *len)).collect();
    let tokens: Vec<&Tokens> = tokens.iter().collect();
    let lens: Vec<usize> = tokens.iter().map(|tokens| tokens.len).collect();
    let order = random.shuffled(100);
    let order = |total| order.iter().copied().filter(|&b| (b as usize) < total).collect();
    let mut paged = Paged::new(kernels, (dtype, 16), shape, &lens, order);
    let mut scratch = AttnScratch::new();
    let earlier: Vec<_> = BATCH.iter().map(|(_, range)| 0..range.start).collect();
    paged.step(kernels, &tokens, &earlier, &mut scratch);
    let ranges: Vec<_> = BATCH.iter().map(|(_, range)| range.clone()).collect();
    paged.step(kernels, &tokens, &ranges, &mut scratch)
}

#[test]
fn ragged_batches_agree_with_the_definition() {
    for (seed, shape) in SHAPES.into_iter().enumerate() {
        for dtype in KV_DTYPES {
            let expected = run_batch(&kernels(Level::Reference, 1), dtype, shape, seed as u64);
            assert!(expected.iter().flatten().all(|x| x.is_finite()));
            for level in fast_levels() {
                let kernels = kernels(level, 2);
                let found = run_batch(&kernels, dtype, shape, seed as u64);
                for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
                    let what = format!("{level} {dtype:?} {shape:?} sequence {i}");
                    // With dot products of bf16 the weights of values are rounded, and so is what integers stand
                    // for.
                    let dots = kernels.isa.avx512().is_some_and(|token| token.bf16().is_some());
                    let tolerance = match dtype {
                        KvDtype::Plain(Dtype::Bf16) if dots => 4e-3,
                        KvDtype::Int8 if dots => 1e-2,
                        _ => 2e-6,
                    };
                    assert_close(found, expected, tolerance, &what);
                }
            }
        }
    }
}

/// Runs sequences from position 0 to their ends in chunks that `cut` chooses.
fn run_in_chunks(
    kernels: &Kernels,
    paged: &mut Paged,
    tokens: &[&Tokens],
    mut cut: impl FnMut(usize) -> usize,
) -> Vec<Vec<u32>> {
    let mut scratch = AttnScratch::new();
    let mut done = vec![0; tokens.len()];
    let mut out = vec![vec![]; tokens.len()];
    while done.iter().zip(tokens).any(|(&done, tokens)| done < tokens.len) {
        let ranges: Vec<Range<usize>> = done
            .iter()
            .zip(tokens)
            .map(|(&done, tokens)| done..done + cut(tokens.len - done).min(tokens.len - done))
            .collect();
        for (i, part) in paged.step(kernels, tokens, &ranges, &mut scratch).iter().enumerate() {
            out[i].extend(bits(part));
            done[i] = ranges[i].end;
        }
    }
    out
}

#[test]
fn a_row_has_the_same_bits_in_every_batch_chunking_table_and_team() {
    let lens = [70, 1, 33, 16, 101];
    for (seed, shape) in SHAPES.into_iter().enumerate() {
        let mut random = Random::new(100 + seed as u64);
        let tokens = lens.map(|len| Tokens::random(&mut random, shape, len));
        for (level, dtype) in Level::ALL.into_iter().flat_map(|l| KV_DTYPES.map(|dtype| (l, dtype)))
        {
            if !level.available() || (level == Level::Reference && seed > 1) {
                continue;
            }
            let one = kernels(level, 1);
            let alone: Vec<Vec<u32>> = tokens
                .iter()
                .map(|tokens| {
                    let mut paged = Paged::new(&one, (dtype, 16), shape, &[tokens.len], identity);
                    run_in_chunks(&one, &mut paged, &[tokens], |left| left).remove(0)
                })
                .collect();
            let all: Vec<&Tokens> = tokens.iter().collect();
            for (case, (threads, block_size)) in
                [(1, 16), (2, 32), (3, 48), (2, 16)].into_iter().enumerate()
            {
                let team = kernels(level, threads);
                let order = random.shuffled(64);
                let order =
                    |total| order.iter().copied().filter(|&b| (b as usize) < total).collect();
                let mut paged = Paged::new(&team, (dtype, block_size), shape, &lens, order);
                let found = run_in_chunks(&team, &mut paged, &all, |left| match case {
                    0 => left,
                    3 => 1,
                    _ => random.below(left.min(29) + 1),
                });
                for (i, (found, alone)) in found.iter().zip(&alone).enumerate() {
                    assert!(found == alone, "{level} {dtype:?} {shape:?} case {case} sequence {i}");
                }
            }
        }
    }
}

#[test]
fn later_positions_reach_no_row_even_as_nan() {
    let shape = Heads { heads: 4, kv_heads: 2, d: 32 };
    for (level, dtype) in Level::ALL.into_iter().flat_map(|l| KV_DTYPES.map(|dtype| (l, dtype))) {
        if !level.available() {
            continue;
        }
        let kernels = kernels(level, 1);
        let mut tokens = Tokens::random(&mut Random::new(7), shape, 40);
        let run = |tokens: &Tokens| {
            let mut paged = Paged::new(&kernels, (dtype, 16), shape, &[40], identity);
            run_in_chunks(&kernels, &mut paged, &[tokens], |left| left).remove(0)
        };
        let clean = run(&tokens);
        tokens.v[25 * 64..].fill(f32::NAN);
        tokens.k[25 * 64..].fill(f32::INFINITY);
        let spoiled = run(&tokens);
        assert!(clean[..25 * 128] == spoiled[..25 * 128], "{level} {dtype:?}");
        assert!(spoiled[25 * 128..].iter().all(|x| f32::from_bits(*x).is_nan()));
    }
}

#[cfg(target_arch = "x86_64")]
#[test]
fn bf16_without_dot_products_agrees_with_the_definition() {
    let kernels = kernels(Level::detect(), 2);
    let Some(token) = kernels.isa.avx512() else {
        println!("left out: this processor has no AVX-512");
        return;
    };
    let isa = crate::cpu::Isa::Avx512(token.without_dots());
    let products = avx512::Fast::new(isa, Dtype::Bf16).expect("the level has AVX-512");
    for shape in SHAPES {
        let Heads { heads, kv_heads, d } = shape;
        let tokens = Tokens::random(&mut Random::new(11), shape, 83);
        let mut paged = Paged::new(&kernels, (Dtype::Bf16, 16), shape, &[83], identity);
        let slots: Vec<u32> = (0..83).collect();
        kernels.kv_write(&mut paged.kv, LAYER, &tokens.k, &tokens.v, &slots);
        let blocks = identity(6);
        let seqs = [AttnSeq { first_row: 0, rows: 83, start: 0, blocks: &blocks }];
        let task = Attention { layer: LAYER, q: &tokens.q, seqs: &seqs, heads, scale: scale(d) };
        let mut expected = vec![0.0; tokens.q.len()];
        reference::forward(&paged.kv, &task, &mut expected);
        let mut found = vec![0.0; tokens.q.len()];
        let mut scratch = AttnScratch::new();
        forward::run(
            &kernels,
            (products, Dtype::Bf16),
            (&paged.kv, task),
            &mut found,
            &mut scratch,
        );
        assert_close(&found, &expected, 2e-6, &format!("{heads} {kv_heads} {d}"));
    }
}

/// Inputs of a backward pass over packed sequences.
struct Packed {
    shape: Heads,
    dtype: Dtype,
    tokens: Tokens,
    seqs: Vec<Range<usize>>,
    dout: Vec<f32>,
}

impl Packed {
    fn new(dtype: Dtype, shape: Heads, lens: &[usize], seed: u64) -> Self {
        let mut random = Random::new(seed);
        let mut end = 0;
        let mut seqs = vec![];
        for len in lens {
            seqs.push(end..end + len);
            end += len;
        }
        let tokens = Tokens::random(&mut random, shape, end);
        let dout = random.normal(tokens.q.len());
        Self { shape, dtype, tokens, seqs, dout }
    }

    /// The forward pass as training runs it: a cache with one block row after the other.
    fn forward(&self, kernels: &Kernels, tokens: &Tokens) -> Vec<f32> {
        let Heads { heads, kv_heads, d } = self.shape;
        let blocks: Vec<usize> = self.seqs.iter().map(|seq| seq.len().div_ceil(16)).collect();
        let ids = identity(blocks.iter().sum());
        let mut kv = KvCache::new(self.dtype, 1, ids.len().max(1), 16, kv_heads, d);
        let (mut slots, mut seqs, mut first) = (vec![], vec![], 0);
        for (seq, blocks) in self.seqs.iter().zip(blocks) {
            slots.extend((0..seq.len()).map(|t| (first * 16 + t) as u32));
            let (first_row, rows) = (seq.start, seq.len());
            seqs.push(AttnSeq { first_row, rows, start: 0, blocks: &ids[first..first + blocks] });
            first += blocks;
        }
        kernels.kv_write(&mut kv, 0, &tokens.k, &tokens.v, &slots);
        let mut out = vec![0.0; tokens.q.len()];
        let task = Attention { layer: 0, q: &tokens.q, seqs: &seqs, heads, scale: scale(d) };
        kernels.attention(&kv, task, &mut out, &mut AttnScratch::new());
        out
    }

    /// Gradients of q, k and v.
    fn backward(&self, kernels: &Kernels) -> [Vec<f32>; 3] {
        let alone = |rows: &Range<usize>| AttnFamily { prompt: rows.clone(), branches: &[] };
        let families: Vec<AttnFamily<'_>> = self.seqs.iter().map(alone).collect();
        self.backward_of(kernels, &families)
    }

    /// The same where the rows belong to these families.
    fn backward_of(&self, kernels: &Kernels, families: &[AttnFamily<'_>]) -> [Vec<f32>; 3] {
        let mut dq = vec![f32::NAN; self.tokens.q.len()];
        let mut dk = vec![f32::NAN; self.tokens.k.len()];
        let mut dv = vec![f32::NAN; self.tokens.v.len()];
        let task = AttnBackward {
            dtype: self.dtype,
            q: &self.tokens.q,
            k: &self.tokens.k,
            v: &self.tokens.v,
            dout: &self.dout,
            families,
            heads: self.shape.heads,
            kv_heads: self.shape.kv_heads,
            head_dim: self.shape.d,
            scale: scale(self.shape.d),
            dq: &mut dq,
            dk: &mut dk,
            dv: &mut dv,
        };
        kernels.attention_backward(task, &mut AttnScratch::new());
        [dq, dk, dv]
    }
}

#[test]
fn the_definition_of_backward_matches_finite_differences() {
    let shape = Heads { heads: 4, kv_heads: 2, d: 16 };
    let kernels = kernels(Level::Reference, 1);
    let packed = Packed::new(Dtype::F32, shape, &[7, 0, 1, 4], 21);
    let [dq, dk, dv] = packed.backward(&kernels);
    let loss = |tokens: &Tokens| -> f64 {
        let out = packed.forward(&kernels, tokens);
        out.iter().zip(&packed.dout).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    };
    let mut random = Random::new(22);
    for (which, gradient) in [dq, dk, dv].iter().enumerate() {
        for _ in 0..60 {
            let i = random.below(gradient.len());
            let step = 2.0f32.powi(-8);
            let losses = [step, -step].map(|step| {
                let mut moved = Tokens {
                    len: packed.tokens.len,
                    q: packed.tokens.q.clone(),
                    k: packed.tokens.k.clone(),
                    v: packed.tokens.v.clone(),
                };
                [&mut moved.q, &mut moved.k, &mut moved.v][which][i] += step;
                loss(&moved)
            });
            let slope = ((losses[0] - losses[1]) / f64::from(2.0 * step)) as f32;
            let found = gradient[i];
            assert!((found - slope).abs() < 3e-4, "input {which} at {i}: {found}, slope {slope}");
        }
    }
}

#[test]
fn backward_agrees_with_the_definition() {
    for (seed, shape) in SHAPES.into_iter().enumerate() {
        for (dtype, tolerance) in [(Dtype::F32, 1e-5), (Dtype::Bf16, 5e-3)] {
            let lens = [40, 1, 0, 16, 67, 33];
            let packed = Packed::new(dtype, shape, &lens, 30 + seed as u64);
            let expected = packed.backward(&kernels(Level::Reference, 1));
            for level in fast_levels() {
                let found = packed.backward(&kernels(level, 2));
                for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
                    let what = format!("{level} {dtype:?} {shape:?} gradient {i}");
                    assert_close(found, expected, tolerance, &what);
                }
            }
        }
    }
}

#[test]
fn gradients_depend_neither_on_the_team_nor_on_the_neighbours() {
    let shape = Heads { heads: 9, kv_heads: 3, d: 64 };
    for (level, dtype) in fast_levels().flat_map(|level| DTYPES.map(|dtype| (level, dtype))) {
        let packed = Packed::new(dtype, shape, &[40, 1, 75], 50);
        let one = packed.backward(&kernels(level, 1)).map(|x| bits(&x));
        for threads in [2, 3] {
            assert!(packed.backward(&kernels(level, threads)).map(|x| bits(&x)) == one);
        }
        let (row, rows) = (41 * 9 * 64, 75 * 9 * 64);
        let last = Packed {
            tokens: Tokens {
                len: 75,
                q: packed.tokens.q[row..].to_vec(),
                k: packed.tokens.k[row / 3..].to_vec(),
                v: packed.tokens.v[row / 3..].to_vec(),
            },
            seqs: std::iter::once(0..75).collect(),
            dout: packed.dout[row..].to_vec(),
            ..packed
        };
        let [dq, dk, dv] = last.backward(&kernels(level, 1)).map(|x| bits(&x));
        assert_eq!(dq.len(), rows);
        assert!(dq == one[0][row..] && dk == one[1][row / 3..] && dv == one[2][row / 3..]);
    }
}

#[test]
fn the_packed_forward_of_training_equals_the_paged_one() {
    for (seed, shape) in SHAPES.into_iter().enumerate() {
        for (level, dtype) in fast_levels().flat_map(|level| DTYPES.map(|dtype| (level, dtype))) {
            let kernels = kernels(level, 2);
            let packed = Packed::new(dtype, shape, &[35, 18], 60 + seed as u64);
            let trained = bits(&packed.forward(&kernels, &packed.tokens));
            let width = shape.heads * shape.d;
            for seq in &packed.seqs {
                let part = |x: &[f32], width: usize| x[seq.start * width..seq.end * width].to_vec();
                let tokens = Tokens {
                    len: seq.len(),
                    q: part(&packed.tokens.q, width),
                    k: part(&packed.tokens.k, shape.kv_heads * shape.d),
                    v: part(&packed.tokens.v, shape.kv_heads * shape.d),
                };
                let mut paged = Paged::new(&kernels, (dtype, 16), shape, &[seq.len()], |n| {
                    identity(n).into_iter().rev().collect()
                });
                let rolled = run_in_chunks(&kernels, &mut paged, &[&tokens], |_| 1).remove(0);
                assert!(rolled == trained[seq.start * width..seq.end * width], "{level} {shape:?}");
            }
        }
    }
}

#[test]
fn reserved_scratch_is_not_allocated_again() {
    let shape = Heads { heads: 9, kv_heads: 3, d: 64 };
    let kernels = kernels(Level::detect(), 1);
    let tokens = Tokens::random(&mut Random::new(70), shape, 300);
    let mut paged = Paged::new(&kernels, (Dtype::Bf16, 16), shape, &[300], identity);
    let mut scratch = AttnScratch::new();
    scratch.reserve(1, 300);
    let before = scratch.lanes[0].scores.slice(1).as_ptr();
    let all = 0..300;
    paged.step(&kernels, &[&tokens], &[all], &mut scratch);
    assert_eq!(scratch.lanes[0].scores.slice(1).as_ptr(), before);
}

#[test]
#[should_panic(expected = "1 blocks, 2 are needed")]
fn a_sequence_longer_than_its_blocks_is_refused() {
    let kv = KvCache::new(Dtype::F32, 1, 4, 16, 1, 16);
    let seqs = [AttnSeq { first_row: 0, rows: 1, start: 16, blocks: &[0] }];
    let task = Attention { layer: 0, q: &[0.0; 16], seqs: &seqs, heads: 1, scale: 1.0 };
    kernels(Level::Portable, 1).attention(&kv, task, &mut [0.0; 16], &mut AttnScratch::new());
}

#[test]
#[should_panic(expected = "expected 2 on")]
fn overlapping_sequences_are_refused() {
    let kv = KvCache::new(Dtype::F32, 1, 4, 16, 1, 16);
    let seq = AttnSeq { first_row: 0, rows: 2, start: 0, blocks: &[0] };
    let seqs = [seq, AttnSeq { first_row: 1, ..seq }];
    let task = Attention { layer: 0, q: &[0.0; 48], seqs: &seqs, heads: 1, scale: 1.0 };
    kernels(Level::Portable, 1).attention(&kv, task, &mut [0.0; 48], &mut AttnScratch::new());
}
