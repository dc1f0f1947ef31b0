//! Choosing a token from each row of logits: by chance or the largest.
//!
//! A draw inverts the distribution function: the smallest index whose cumulated probability exceeds a
//! uniform number. The sums that `softmax.rs` takes of each chunk tell the chunk, a walk through it in
//! ascending order the place; sums are in f64, so the order is the same for every number of rows and
//! threads. Leaves out random numbers, which the caller brings, and the penalties and cut-offs of a
//! sampler: whoever applies them writes -infinity into the logits.

use crate::{
    Kernels, VOCAB_CHUNK,
    cpu::Isa,
    simd::{Job, LANES, Simd},
    softmax::{Parts, SoftmaxSums, TokenMask, Total, vocabulary},
};

impl Kernels {
    /// Draws an index from each row's softmax by inverting its distribution function at `uniform`.
    ///
    /// The smallest index whose cumulated probability exceeds the uniform number, which lies in
    /// [0, 1). Never one of probability 0, but 0 for a row without any finite logit.
    ///
    /// # Panics
    /// When the lengths do not agree.
    pub fn sample(
        &self,
        logits: &[f32],
        inv_temperature: &[f32],
        uniform: &[f64],
        out: &mut [u32],
    ) {
        self.sample_of(logits, &self.softmax_sums(logits, inv_temperature, &[]), uniform, out);
    }

    /// [`Kernels::sample`] from logits whose sums are these, among the tokens of their masks.
    ///
    /// # Panics
    /// As there.
    pub fn sample_of(
        &self,
        logits: &[f32],
        sums: &SoftmaxSums<'_>,
        uniform: &[f64],
        out: &mut [u32],
    ) {
        let inv_temperature = sums.inv_temperature();
        let rows = inv_temperature.len();
        let cols = vocabulary(logits, rows);
        assert_eq!([uniform.len(), out.len()], [rows; 2], "lengths against {rows} rows");
        if let Isa::Reference = self.isa {
            for (row, out) in out.iter_mut().enumerate() {
                let z = sums.masked(row, &logits[row * cols..][..cols]);
                *out = reference_sample(&z, inv_temperature[row], uniform[row]);
            }
            return;
        }
        self.fill(out, VOCAB_CHUNK, &|row| {
            let parts = sums.parts(row, cols);
            let logits = &logits[row * cols..][..cols];
            let (inv_temperature, uniform) = (inv_temperature[row], uniform[row]);
            let mask = sums.mask(row);
            self.isa.vectorize(Pick { logits, inv_temperature, parts, mask, uniform })
        });
    }

    /// The index of each row's largest logit, the lowest one of equals; NaN is passed over.
    ///
    /// # Panics
    /// When `logits` is not `out.len()` whole rows.
    pub fn argmax(&self, logits: &[f32], out: &mut [u32]) {
        let cols = vocabulary(logits, out.len());
        if let Isa::Reference = self.isa {
            for (row, out) in out.iter_mut().enumerate() {
                *out = reference_argmax(&logits[row * cols..][..cols]);
            }
            return;
        }
        self.fill(out, cols, &|row| self.isa.vectorize(Argmax(&logits[row * cols..][..cols])));
    }
}

/// Finds the drawn index of one row: first its chunk by the sums, then its place in the chunk.
struct Pick<'a> {
    logits: &'a [f32],
    inv_temperature: f32,
    parts: &'a [Parts],
    mask: Option<TokenMask<'a>>,
    uniform: f64,
}

impl Job for Pick<'_> {
    type Output = u32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> u32 {
        let mut total = Total::EMPTY;
        self.parts.iter().for_each(|parts| total.join(parts.counted));
        let mut rest = self.uniform * total.sum;
        let mut chosen = None;
        for (chunk, part) in self.parts.iter().map(|parts| parts.counted).enumerate() {
            let scale = (f64::from(part.max) - total.max).exp();
            let weight = scale * f64::from(part.sum);
            if weight > 0.0 {
                chosen = Some((chunk, rest / scale));
                if rest < weight {
                    break;
                }
                rest -= weight;
            }
        }
        let Some((chunk, rest)) = chosen else { return 0 };
        let from = chunk * VOCAB_CHUNK;
        let logits = &self.logits[from..self.logits.len().min(from + VOCAB_CHUNK)];
        let mask = self.mask.map(|mask| mask.from(from));
        (from + self.within(s, (logits, mask), self.parts[chunk].counted.max, rest)) as u32
    }
}

impl Pick<'_> {
    /// The first index where the cumulated weight exceeds `rest`, or else the last with any weight.
    #[inline(always)]
    fn within<S: Simd>(
        &self,
        s: S,
        (logits, mask): (&[f32], Option<TokenMask<'_>>),
        max: f32,
        rest: f64,
    ) -> usize {
        let (scale, max) = (s.splat(self.inv_temperature), s.splat(max));
        let mut cumulated = 0.0;
        let mut last = 0;
        for at in (0..logits.len()).step_by(LANES) {
            let z = s.mul(s.read(logits, at, f32::NEG_INFINITY), scale);
            let mut weights = [0.0; LANES];
            s.store(&mut weights, s.exp(s.sub(z, max)));
            let lanes = mask.map_or(u16::MAX, |mask| mask.lanes(at));
            for (i, &weight) in weights.iter().enumerate() {
                if weight > 0.0 && lanes >> i & 1 == 1 {
                    last = at + i;
                    cumulated += f64::from(weight);
                    if cumulated > rest {
                        return last;
                    }
                }
            }
        }
        last
    }
}

/// The index of the largest of some logits.
struct Argmax<'a>(&'a [f32]);

impl Job for Argmax<'_> {
    type Output = u32;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> u32 {
        let (mut best, mut best_chunk) = (f32::NEG_INFINITY, 0);
        for (i, chunk) in self.0.chunks(VOCAB_CHUNK).enumerate() {
            let mut max = s.splat(f32::NEG_INFINITY);
            for at in (0..chunk.len()).step_by(LANES) {
                // The second operand wins over NaN, so NaN never stays.
                max = s.max(s.read(chunk, at, f32::NEG_INFINITY), max);
            }
            let max = s.max_lane(max);
            if max > best {
                (best, best_chunk) = (max, i);
            }
        }
        let from = best_chunk * VOCAB_CHUNK;
        let place = self.0[from..].iter().position(|&x| x == best);
        place.map_or(0, |place| (from + place) as u32)
    }
}

/// The definition of a draw, in f64.
fn reference_sample(logits: &[f32], inv_temperature: f32, uniform: f64) -> u32 {
    let z = |v: usize| f64::from(logits[v] * inv_temperature);
    let max = (0..logits.len()).map(z).fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = (0..logits.len()).map(|v| (z(v) - max).exp()).sum();
    let (mut cumulated, mut last) = (0.0, 0);
    for v in 0..logits.len() {
        let p = (z(v) - max).exp();
        if p > 0.0 {
            last = v;
            cumulated += p;
            if cumulated > uniform * sum {
                break;
            }
        }
    }
    last as u32
}

fn reference_argmax(logits: &[f32]) -> u32 {
    let mut best: Option<usize> = None;
    for (v, &x) in logits.iter().enumerate() {
        if !x.is_nan() && best.is_none_or(|best| x > logits[best]) {
            best = Some(v);
        }
    }
    best.unwrap_or(0) as u32
}

#[cfg(test)]
mod tests {
    use crate::{
        VOCAB_CHUNK,
        testing::{Random, every_level},
    };

    #[test]
    fn draws_follow_the_probabilities() {
        const DRAWS: usize = 20_000;
        let p = [0.5f32, 0.0, 0.25, 0.125, 0.125];
        // The five logits lie in three different chunks.
        let cols = 2 * VOCAB_CHUNK + 40;
        let places = [3, 700, VOCAB_CHUNK - 1, VOCAB_CHUNK, 2 * VOCAB_CHUNK + 39];
        let mut logits = vec![f32::NEG_INFINITY; cols];
        places.iter().zip(p).for_each(|(&v, p)| logits[v] = p.ln() * 2.0);
        for kernels in every_level(2) {
            let mut random = Random::new(64);
            let mut counts = [0usize; 5];
            for _ in 0..DRAWS / 100 {
                let uniform: Vec<f64> = (0..100).map(|_| random.uniform()).collect();
                let mut out = [0; 100];
                kernels.sample(&logits.repeat(100), &[0.5; 100], &uniform, &mut out);
                for v in out {
                    let place = places.iter().position(|&p| p == v as usize);
                    counts[place.expect("a draw has some probability")] += 1;
                }
            }
            for (count, p) in counts.iter().zip(p) {
                let expected = f64::from(p) * DRAWS as f64;
                let spread = (expected * (1.0 - f64::from(p))).sqrt();
                assert!((*count as f64 - expected).abs() <= 4.0 * spread, "{counts:?}");
            }
        }
    }

    #[test]
    fn a_draw_inverts_the_distribution_function() {
        let mut random = Random::new(65);
        let cols = 5003;
        let logits = random.vec(cols, 3.0);
        let exact: Vec<f64> = logits.iter().map(|&x| f64::from(x * 1.25).exp()).collect();
        let total: f64 = exact.iter().sum();
        for kernels in every_level(1) {
            for u in [0.0, 1e-9, 0.1, 0.5, 0.77, 0.999_999, 1.0 - f64::EPSILON / 2.0] {
                let mut out = [u32::MAX];
                kernels.sample(&logits, &[1.25], &[u], &mut out);
                let v = out[0] as usize;
                let before: f64 = exact[..v].iter().sum::<f64>() / total;
                assert!(before <= u + 1e-6, "{u} drew {v}, which starts at {before}");
                assert!(before + exact[v] / total >= u - 1e-6, "{u} drew {v}, from {before}");
            }
        }
    }

    #[test]
    fn a_row_is_drawn_alike_in_any_company() {
        let mut random = Random::new(66);
        let (rows, cols) = (30, 4999);
        let logits = random.vec(rows * cols, 5.0);
        let uniform: Vec<f64> = (0..rows).map(|_| random.uniform()).collect();
        for (one, three) in every_level(1).zip(every_level(3)) {
            let mut all = vec![0; rows];
            three.sample(&logits, &vec![1.0; rows], &uniform, &mut all);
            for row in 0..rows {
                let mut alone = [0];
                let part = &logits[row * cols..][..cols];
                one.sample(part, &[1.0], &uniform[row..=row], &mut alone);
                assert_eq!(alone[0], all[row]);
            }
        }
    }

    #[test]
    fn the_lowest_index_of_the_largest_logits_wins() {
        let mut random = Random::new(67);
        for kernels in every_level(2) {
            for cols in [1, 16, 33, 5000] {
                let rows = 9;
                let mut logits: Vec<f32> =
                    (0..rows * cols).map(|_| random.below(50) as f32 - 60.0).collect();
                logits[0] = f32::NAN;
                let expected: Vec<u32> = logits
                    .chunks(cols)
                    .map(|row| {
                        let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                        row.iter().position(|&x| x == max).unwrap_or(0) as u32
                    })
                    .collect();
                let mut out = vec![u32::MAX; rows];
                kernels.argmax(&logits, &mut out);
                assert_eq!(out, expected);
            }
        }
    }

    #[test]
    fn a_row_without_any_logit_left_yields_the_first_index() {
        for kernels in every_level(1) {
            for logit in [f32::NEG_INFINITY, f32::NAN] {
                let (mut drawn, mut largest) = ([9], [9]);
                kernels.sample(&[logit; 40], &[1.0], &[0.7], &mut drawn);
                kernels.argmax(&[logit; 40], &mut largest);
                assert_eq!((drawn, largest), ([0], [0]));
            }
        }
    }
}
