//! The backward pass over sequences that share their first rows.

use super::*;

/// The lengths of the families of one batch: the prompt's, and those of the branches behind it.
const FAMILIES: [(usize, &[usize]); 9] = [
    (33, &[7, 0, 20, 1, 16]),
    (5, &[]),
    (1, &[1, 40]),
    (16, &[16, 3]),
    (0, &[]),
    (15, &[0]),
    (0, &[9, 2]),
    (17, &[2, 31, 15]),
    (48, &[60]),
];

/// A batch of families.
struct Families {
    packed: Packed,
    families: Vec<(Range<usize>, Vec<Range<usize>>)>,
}

impl Families {
    fn new(dtype: Dtype, shape: Heads, lens: &[(usize, &[usize])], seed: u64) -> Self {
        let mut end = 0;
        let mut take = |len: usize| {
            end += len;
            end - len..end
        };
        let families: Vec<_> = lens
            .iter()
            .map(|(prompt, branches)| {
                (take(*prompt), branches.iter().map(|len| take(*len)).collect::<Vec<_>>())
            })
            .collect();
        let mut random = Random::new(seed);
        let tokens = Tokens::random(&mut random, shape, end);
        let dout = random.normal(tokens.q.len());
        Self { packed: Packed { shape, dtype, tokens, seqs: vec![], dout }, families }
    }

    /// The rows of each whole sequence; a family without branches is one.
    fn sequences(&self) -> Vec<Vec<usize>> {
        let whole = |(prompt, branches): &(Range<usize>, Vec<Range<usize>>)| match &branches[..] {
            [] => vec![prompt.clone().collect()],
            branches => branches
                .iter()
                .map(|branch| prompt.clone().chain(branch.clone()).collect())
                .collect::<Vec<Vec<usize>>>(),
        };
        self.families.iter().flat_map(whole).collect()
    }

    /// The same sequences with nothing shared. Of a row that comes several times only the first has a
    /// gradient of its output.
    fn apart(&self, tokens: &Tokens) -> (Packed, Vec<usize>) {
        let Heads { heads, kv_heads, d } = self.packed.shape;
        let mut end = 0;
        let mut seqs = vec![];
        for sequence in self.sequences() {
            seqs.push(end..end + sequence.len());
            end += sequence.len();
        }
        let rows = self.sequences().concat();
        let gather = |x: &[f32], width: usize| -> Vec<f32> {
            rows.iter().flat_map(|row| x[row * width..][..width].to_vec()).collect()
        };
        let mut dout = gather(&self.packed.dout, heads * d);
        for (i, dout) in dout.chunks_exact_mut(heads * d).enumerate() {
            if rows[..i].contains(&rows[i]) {
                dout.fill(0.0);
            }
        }
        let tokens = Tokens {
            len: end,
            q: gather(&tokens.q, heads * d),
            k: gather(&tokens.k, kv_heads * d),
            v: gather(&tokens.v, kv_heads * d),
        };
        (Packed { tokens, seqs, dout, ..self.packed }, rows)
    }

    /// What attention returns for each row, by the definition and with nothing shared.
    fn forward(&self, tokens: &Tokens) -> Vec<f32> {
        let (apart, rows) = self.apart(tokens);
        let width = self.packed.shape.heads * self.packed.shape.d;
        let mut out = vec![0.0; tokens.q.len()];
        let found = apart.forward(&kernels(Level::Reference, 1), &apart.tokens);
        for (row, found) in rows.into_iter().zip(found.chunks_exact(width)) {
            out[row * width..][..width].copy_from_slice(found);
        }
        out
    }

    fn backward(&self, kernels: &Kernels) -> [Vec<f32>; 3] {
        let families: Vec<AttnFamily<'_>> = self
            .families
            .iter()
            .map(|(prompt, branches)| AttnFamily { prompt: prompt.clone(), branches })
            .collect();
        self.packed.backward_of(kernels, &families)
    }
}

#[test]
fn the_definition_over_families_matches_finite_differences() {
    let shape = Heads { heads: 4, kv_heads: 2, d: 16 };
    let lens: [(usize, &[usize]); 4] = [(3, &[2, 0, 4]), (2, &[]), (1, &[1, 2]), (0, &[2])];
    let families = Families::new(Dtype::F32, shape, &lens, 80);
    let gradients = families.backward(&kernels(Level::Reference, 1));
    let loss = |tokens: &Tokens| -> f64 {
        let out = families.forward(tokens);
        out.iter().zip(&families.packed.dout).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    };
    let mut random = Random::new(81);
    for (which, gradient) in gradients.iter().enumerate() {
        for _ in 0..60 {
            let i = random.below(gradient.len());
            let step = 2.0f32.powi(-8);
            let losses = [step, -step].map(|step| {
                let Tokens { len, q, k, v } = &families.packed.tokens;
                let mut moved = Tokens { len: *len, q: q.clone(), k: k.clone(), v: v.clone() };
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
fn families_agree_with_the_definition() {
    for (seed, shape) in SHAPES.into_iter().enumerate() {
        for (dtype, tolerance) in [(Dtype::F32, 1e-5), (Dtype::Bf16, 5e-3)] {
            let families = Families::new(dtype, shape, &FAMILIES, 90 + seed as u64);
            let expected = families.backward(&kernels(Level::Reference, 1));
            assert!(expected.iter().flatten().all(|x| x.is_finite()));
            for level in fast_levels() {
                let found = families.backward(&kernels(level, 2));
                for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
                    let what = format!("{level} {dtype:?} {shape:?} gradient {i}");
                    assert_close(found, expected, tolerance, &what);
                }
            }
        }
    }
}

#[test]
fn random_families_agree_with_the_definition() {
    let shape = Heads { heads: 6, kv_heads: 2, d: 32 };
    let mut random = Random::new(100);
    for round in 0..40 {
        let branches: Vec<Vec<usize>> = (0..1 + random.below(3))
            .map(|_| (0..random.below(6)).map(|_| random.below(36)).collect())
            .collect();
        let lens: Vec<(usize, &[usize])> =
            branches.iter().map(|lens| (random.below(50), &lens[..])).collect();
        let dtype = DTYPES[round % 2];
        let tolerance = if dtype == Dtype::F32 { 1e-5 } else { 5e-3 };
        let families = Families::new(dtype, shape, &lens, 101 + round as u64);
        let expected = families.backward(&kernels(Level::Reference, 1));
        for level in fast_levels() {
            let found = families.backward(&kernels(level, 2));
            for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
                assert_close(found, expected, tolerance, &format!("{level} {lens:?} gradient {i}"));
            }
        }
    }
}

#[test]
fn a_family_has_the_summed_gradients_of_its_sequences() {
    let shape = Heads { heads: 9, kv_heads: 3, d: 64 };
    for level in Level::ALL.into_iter().filter(|level| level.available()) {
        for (dtype, tolerance) in [(Dtype::F32, 2e-6), (Dtype::Bf16, 2e-6)] {
            let families = Families::new(dtype, shape, &FAMILIES, 150);
            let (apart, rows) = families.apart(&families.packed.tokens);
            let kernels = kernels(level, 2);
            let found = families.backward(&kernels);
            for (i, (found, parts)) in found.iter().zip(apart.backward(&kernels)).enumerate() {
                let width = parts.len() / rows.len();
                let mut sums = vec![0.0; found.len()];
                for (row, part) in rows.iter().zip(parts.chunks_exact(width)) {
                    let sums = &mut sums[row * width..][..width];
                    sums.iter_mut().zip(part).for_each(|(sum, x)| *sum += x);
                }
                assert_close(found, &sums, tolerance, &format!("{level} {dtype:?} gradient {i}"));
            }
        }
    }
}

#[test]
fn gradients_of_families_depend_neither_on_the_team_nor_on_the_neighbours() {
    let shape = Heads { heads: 4, kv_heads: 2, d: 32 };
    for (level, dtype) in fast_levels().flat_map(|level| DTYPES.map(|dtype| (level, dtype))) {
        let families = Families::new(dtype, shape, &FAMILIES, 160);
        let one = families.backward(&kernels(level, 1)).map(|x| bits(&x));
        for threads in [2, 3] {
            assert!(families.backward(&kernels(level, threads)).map(|x| bits(&x)) == one);
        }
        for (prompt, branches) in &families.families {
            let family = AttnFamily { prompt: prompt.clone(), branches };
            let alone =
                families.packed.backward_of(&kernels(level, 1), std::slice::from_ref(&family));
            for (alone, one) in alone.iter().zip(&one) {
                let width = alone.len() / families.packed.tokens.len;
                for (_, rows) in family.pieces() {
                    let part = rows.start * width..rows.end * width;
                    assert!(bits(&alone[part.clone()]) == one[part], "{level} {prompt:?}");
                }
            }
        }
    }
}

#[test]
fn a_branch_that_is_not_finite_leaves_its_sisters_alone() {
    let shape = Heads { heads: 4, kv_heads: 2, d: 32 };
    let lens: [(usize, &[usize]); 1] = [(20, &[3, 15, 4])];
    for (level, dtype) in Level::ALL.into_iter().flat_map(|l| DTYPES.map(|dtype| (l, dtype))) {
        if !level.available() {
            continue;
        }
        let kernels = kernels(level, 1);
        let mut families = Families::new(dtype, shape, &lens, 170);
        let clean = families.backward(&kernels);
        let spoiled = families.families[0].1[1].clone();
        let packed = &mut families.packed;
        for (x, width) in [
            (&mut packed.tokens.q, 128),
            (&mut packed.tokens.k, 64),
            (&mut packed.tokens.v, 64),
            (&mut packed.dout, 128),
        ] {
            x[spoiled.start * width..spoiled.end * width].fill(f32::NAN);
        }
        let found = families.backward(&kernels);
        for (i, (found, clean)) in found.iter().zip(&clean).enumerate() {
            let width = found.len() / 42;
            for sister in [&families.families[0].1[0], &families.families[0].1[2]] {
                let part = sister.start * width..sister.end * width;
                assert!(bits(&found[part.clone()]) == bits(&clean[part]), "{level} gradient {i}");
            }
        }
    }
}
