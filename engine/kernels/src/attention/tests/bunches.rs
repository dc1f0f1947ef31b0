//! Neighbours that begin in the same blocks, read together, against each of them alone.

use super::*;

const SEQS: usize = 48;

/// A cache full of numbers and sequences with one row each, many of which have the first blocks of the one
/// before them; every tenth has two rows. With the queries of all rows.
fn begin_alike(
    kernels: &Kernels,
    kind: (KvDtype, usize),
    shape: Heads,
    random: &mut Random,
) -> (Paged, Vec<Range<usize>>, Vec<f32>) {
    let lens: Vec<usize> = (0..SEQS).map(|_| 1 + random.below(9 * 16)).collect();
    let order = random.shuffled(2000);
    let order = |total| order.iter().copied().filter(|&b| (b as usize) < total).collect();
    let mut paged = Paged::new(kernels, kind, shape, &lens, order);
    let ranges: Vec<Range<usize>> = (lens.iter().enumerate())
        .map(|(i, &len)| len - if i % 10 == 9 { len.min(2) } else { 1 }..len)
        .collect();
    for i in 1..SEQS {
        let whole = |i: usize| ranges[i].start / kind.1;
        let shared = if random.below(5) == 0 { 0 } else { whole(i).min(whole(i - 1)) };
        let (before, rest) = paged.tables.split_at_mut(i);
        rest[0][..shared].copy_from_slice(&before[i - 1][..shared]);
    }
    let slots: Vec<u32> = (0..(paged.kv.num_blocks() * kind.1) as u32).collect();
    let width = shape.kv_heads * shape.d;
    let [k, v] = [0; 2].map(|_| random.normal(slots.len() * width));
    kernels.kv_write(&mut paged.kv, LAYER, &k, &v, &slots);
    let rows: usize = ranges.iter().map(Range::len).sum();
    let q = random.normal(rows * shape.heads * shape.d);
    (paged, ranges, q)
}

#[test]
fn sequences_that_begin_alike_have_the_bits_they_have_alone() {
    for (seed, shape) in SHAPES.into_iter().enumerate() {
        for (dtype, block_size) in KV_DTYPES.into_iter().flat_map(|d| [(d, 16), (d, 32)]) {
            for level in fast_levels() {
                let kernels = kernels(level, 1 + seed % 2);
                let mut random = Random::new(seed as u64);
                let (paged, ranges, q) =
                    begin_alike(&kernels, (dtype, block_size), shape, &mut random);
                let mut first_row = 0;
                let mut seqs = Vec::new();
                for (range, blocks) in ranges.iter().zip(&paged.tables) {
                    seqs.push(AttnSeq { first_row, rows: range.len(), start: range.start, blocks });
                    first_row += range.len();
                }
                let (heads, scale) = (shape.heads, scale(shape.d));
                let mut scratch = AttnScratch::new();
                let mut run = |seqs: &[AttnSeq<'_>]| {
                    let mut out = vec![0.0; q.len()];
                    let task = Attention { layer: LAYER, q: &q, seqs, heads, scale };
                    kernels.attention(&paged.kv, task, &mut out, &mut scratch);
                    (out, scratch.bunches.len())
                };
                let (together, bunches) = run(&seqs);
                let what = format!("{level} {dtype:?} {shape:?} {block_size}");
                // Otherwise nothing is tested here.
                let fits = matches!(dtype, KvDtype::Plain(_)) && shape.heads / shape.kv_heads < 7;
                assert_eq!(bunches < SEQS - 8, fits, "{what}: {bunches} bunches");
                for (i, seq) in seqs.iter().enumerate() {
                    let (alone, _) = run(std::slice::from_ref(seq));
                    let width = heads * shape.d;
                    let part = seq.first_row * width..(seq.first_row + seq.rows) * width;
                    assert!(together[part.clone()].iter().any(|&x| x != 0.0), "{what}");
                    assert_eq!(
                        bits(&together[part.clone()]),
                        bits(&alone[part]),
                        "{what} sequence {i}"
                    );
                }
            }
        }
    }
}
