//! Statistics of the softmax over the vocabulary.
//!
//! With z = logit * inverse temperature, per row and per chunk of [`VOCAB_CHUNK`] logits:
//! ```text
//! max = max z       sum = sum e^(z - max)       dot = sum e^(z - max) (z - max)
//! ```
//! in 16 lanes, ascending, then the fixed tree. The chunks of a row are joined in ascending order, in
//! f64, relative to the running maximum; then
//! ```text
//! log-sum-exp = max + ln sum     entropy = ln sum - dot / sum     log-prob = z_target - log-sum-exp
//! ```
//! A logit of -infinity has probability 0 and adds nothing to the entropy; a mask says which logits count
//! as that. Leaves out the choice of a token, which is `sample.rs`.

use crate::{
    Kernels,
    cpu::Isa,
    simd::{Job, LANES, Simd},
};

/// Logits whose exponentials are summed by one chain of additions.
pub const VOCAB_CHUNK: usize = 2048;

/// What is known of one token's distribution; natural logarithms.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct TokenStats {
    /// Log-probability of the target; NaN where there was none.
    pub log_prob: f32,
    /// Entropy of the distribution, in nats.
    pub entropy: f32,
    /// Logarithm of the sum of the exponentials of logits times inverse temperature.
    pub log_sum_exp: f32,
}

/// What makes a distribution of a row's logits: softmax is e^(z - max) / sum.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SoftmaxTotal {
    /// The largest z, a logit times the inverse temperature; negative infinity where none is finite.
    pub max: f32,
    /// The sum of e^(z - max).
    pub sum: f64,
}

/// The sums over one chunk of a row, relative to its largest z.
#[derive(Clone, Copy, Default)]
pub(crate) struct Part {
    pub(crate) max: f32,
    pub(crate) sum: f32,
    dot: f32,
}

/// The sums over all chunks of a row so far, relative to the largest z so far.
#[derive(Clone, Copy)]
pub(crate) struct Total {
    pub(crate) max: f64,
    pub(crate) sum: f64,
    dot: f64,
}

impl Total {
    pub(crate) const EMPTY: Self = Self { max: f64::NEG_INFINITY, sum: 0.0, dot: 0.0 };

    /// Joins the next chunk. One without any probability changes nothing.
    pub(crate) fn join(&mut self, part: Part) {
        if part.sum == 0.0 {
            return;
        }
        let (sum, dot) = (f64::from(part.sum), f64::from(part.dot));
        let below = f64::from(part.max) - self.max;
        if self.sum == 0.0 {
            *self = Self { max: f64::from(part.max), sum, dot };
        } else if below <= 0.0 {
            let scale = below.exp();
            self.sum += scale * sum;
            self.dot += scale * (dot + below * sum);
        } else {
            let scale = (-below).exp();
            self.dot = scale * (self.dot - below * self.sum) + dot;
            self.sum = scale * self.sum + sum;
            self.max = f64::from(part.max);
        }
    }

    /// The statistics, `target` being the target's logit times the inverse temperature.
    pub(crate) fn stats(&self, target: Option<f32>) -> TokenStats {
        let log_sum = self.sum.ln();
        let log_sum_exp = self.max + log_sum;
        TokenStats {
            log_prob: target.map_or(f32::NAN, |z| (f64::from(z) - log_sum_exp) as f32),
            entropy: (log_sum - self.dot / self.sum) as f32,
            log_sum_exp: log_sum_exp as f32,
        }
    }
}

/// Which tokens count: a bit each, from the lowest of the first word on. What is missing does not.
#[derive(Clone, Copy, Debug)]
pub struct TokenMask<'a>(pub &'a [u32]);

impl<'a> TokenMask<'a> {
    /// Whether a token counts.
    pub fn allows(self, token: usize) -> bool {
        self.0.get(token / 32).is_some_and(|word| word >> (token % 32) & 1 == 1)
    }

    /// The bits of sixteen tokens from `at` on, a multiple of 16.
    #[inline(always)]
    pub(crate) fn lanes(self, at: usize) -> u16 {
        self.0.get(at / 32).map_or(0, |word| (word >> (at % 32)) as u16)
    }

    /// The mask of the tokens from `at` on, a multiple of 32.
    pub(crate) fn from(self, at: usize) -> Self {
        Self(self.0.get(at / 32..).unwrap_or_default())
    }
}

/// The sums over rows of logits times their inverse temperatures, which draws and statistics share: taking
/// them is most of the work of either.
pub struct SoftmaxSums<'a> {
    inv_temperature: Vec<f32>,
    /// One for each row, or none at all.
    masks: &'a [Option<TokenMask<'a>>],
    /// The parts of all chunks, row by row, and those of all tokens; none at the reference level, which has
    /// no use for them.
    parts: Vec<Parts>,
}

/// The sums over a chunk: of the tokens that count, and of all.
#[derive(Clone, Copy, Default)]
pub(crate) struct Parts {
    pub(crate) counted: Part,
    all: Part,
}

impl SoftmaxSums<'_> {
    /// The rows' inverse temperatures.
    pub(crate) fn inv_temperature(&self) -> &[f32] {
        &self.inv_temperature
    }

    /// The mask of a row.
    pub(crate) fn mask(&self, row: usize) -> Option<TokenMask<'_>> {
        self.masks.get(row).copied().flatten()
    }

    /// A row of logits, as the definitions read them: negative infinity where they do not count.
    pub(crate) fn masked(&self, row: usize, logits: &[f32]) -> Vec<f32> {
        let counts = |token: usize| self.mask(row).is_none_or(|mask| mask.allows(token));
        let masked = |(i, &z)| if counts(i) { z } else { f32::NEG_INFINITY };
        logits.iter().enumerate().map(masked).collect()
    }

    /// The parts of the chunks of one of the rows, which have `cols` columns.
    pub(crate) fn parts(&self, row: usize, cols: usize) -> &[Parts] {
        let chunks = cols.div_ceil(VOCAB_CHUNK);
        &self.parts[row * chunks..][..chunks]
    }

    /// The parts of a row joined: of the tokens that count, or of `all`.
    fn total(&self, row: usize, cols: usize, all: bool) -> Total {
        let mut total = Total::EMPTY;
        for parts in self.parts(row, cols) {
            total.join(if all { parts.all } else { parts.counted });
        }
        total
    }
}

impl Kernels {
    /// The sums of each row of `logits` `[rows, vocabulary]` times its inverse temperature, which is
    /// positive. `masks` has one for each row or is empty.
    ///
    /// # Panics
    /// When `logits` is not a row for each inverse temperature, or there are masks for some rows only.
    pub fn softmax_sums<'a>(
        &self,
        logits: &[f32],
        inv_temperature: &[f32],
        masks: &'a [Option<TokenMask<'a>>],
    ) -> SoftmaxSums<'a> {
        let (rows, cols) = (inv_temperature.len(), vocabulary(logits, inv_temperature.len()));
        assert!([0, rows].contains(&masks.len()), "{} masks, {rows} rows", masks.len());
        let chunks = match self.isa {
            Isa::Reference => 0,
            _ => cols.div_ceil(VOCAB_CHUNK),
        };
        let mut parts = vec![Parts::default(); rows * chunks];
        self.fill(&mut parts, 2 * VOCAB_CHUNK, &|i| {
            let (row, from) = (i / chunks, i % chunks * VOCAB_CHUNK);
            let logits = &logits[row * cols..][from..cols.min(from + VOCAB_CHUNK)];
            let mask = masks.get(row).copied().flatten().map(|mask| mask.from(from));
            let inv_temperature = inv_temperature[row];
            match mask {
                None => {
                    let all = self.isa.vectorize(Chunk { logits, inv_temperature });
                    Parts { counted: all, all }
                }
                Some(mask) => self.isa.vectorize(MaskedChunk { logits, inv_temperature, mask }),
            }
        });
        SoftmaxSums { inv_temperature: inv_temperature.to_vec(), masks, parts }
    }

    /// Statistics of each row of `logits` `[rows, vocabulary]` times its inverse temperature, which
    /// is positive.
    ///
    /// A row without any finite logit gives nothing finite.
    ///
    /// # Panics
    /// When the lengths do not agree or a target lies beyond the vocabulary.
    pub fn softmax_stats(
        &self,
        logits: &[f32],
        inv_temperature: &[f32],
        targets: Option<&[u32]>,
        out: &mut [TokenStats],
    ) {
        let sums = self.softmax_sums(logits, inv_temperature, &[]);
        self.stats_of(logits, (&sums, true), targets, out);
    }

    /// [`Kernels::softmax_stats`] of logits whose sums are these, of the tokens that count or of `all`.
    ///
    /// # Panics
    /// As there.
    pub fn stats_of(
        &self,
        logits: &[f32],
        (sums, all): (&SoftmaxSums<'_>, bool),
        targets: Option<&[u32]>,
        out: &mut [TokenStats],
    ) {
        let inv_temperature = sums.inv_temperature();
        let cols = vocabulary(logits, inv_temperature.len());
        assert_eq!(out.len(), inv_temperature.len(), "statistics against rows");
        if let Some(targets) = targets {
            assert_eq!(targets.len(), out.len(), "targets against rows");
            check_targets(targets, cols);
        }
        let target = |row: usize| targets.map(|targets| targets[row] as usize);
        if let Isa::Reference = self.isa {
            for (row, out) in out.iter_mut().enumerate() {
                let z = &logits[row * cols..][..cols];
                let z = if all { z.to_vec() } else { sums.masked(row, z) };
                *out = reference(&z, inv_temperature[row], target(row));
            }
            return;
        }
        for (row, out) in out.iter_mut().enumerate() {
            let total = sums.total(row, cols, all);
            let z = target(row).map(|t| logits[row * cols + t] * inv_temperature[row]);
            *out = total.stats(z);
        }
    }

    /// The totals of logits whose sums are these, of all tokens, whatever the masks.
    ///
    /// # Panics
    /// As [`Kernels::softmax_sums`].
    pub fn totals_of(&self, logits: &[f32], sums: &SoftmaxSums<'_>) -> Vec<SoftmaxTotal> {
        let rows = sums.inv_temperature().len();
        let cols = vocabulary(logits, rows);
        let total = |row| match self.isa {
            Isa::Reference => {
                reference_total(&logits[row * cols..][..cols], sums.inv_temperature()[row])
            }
            _ => {
                let Total { max, sum, .. } = sums.total(row, cols, true);
                SoftmaxTotal { max: max as f32, sum }
            }
        };
        (0..rows).map(total).collect()
    }
}

/// Columns of `rows` rows of logits.
pub(crate) fn vocabulary(logits: &[f32], rows: usize) -> usize {
    let cols = logits.len().checked_div(rows).unwrap_or(0);
    assert_eq!(logits.len(), rows * cols, "logits against {rows} whole rows");
    assert!(rows == 0 || cols > 0, "no logits to choose from");
    cols
}

/// Refuses targets beyond the vocabulary.
pub(crate) fn check_targets(targets: &[u32], vocabulary: usize) {
    let highest = targets.iter().copied().max().unwrap_or(0) as usize;
    assert!(
        targets.is_empty() || highest < vocabulary,
        "target {highest}, vocabulary has {vocabulary}"
    );
}

/// The sums over one chunk, of at most [`VOCAB_CHUNK`] logits.
pub(crate) struct Chunk<'a> {
    pub(crate) logits: &'a [f32],
    pub(crate) inv_temperature: f32,
}

impl Job for Chunk<'_> {
    type Output = Part;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Part {
        let scale = s.splat(self.inv_temperature);
        let (whole, tail) = self.logits.as_chunks::<LANES>();
        let tail = s.load_tail(tail, f32::NEG_INFINITY);
        let mut max = s.mul(tail, scale);
        for x in whole {
            max = s.max(max, s.mul(s.load(x), scale));
        }
        let max = s.max_lane(max);
        // Of a wholly masked chunk nothing is left but a NaN that hid among the masked logits.
        let max = if max == f32::NEG_INFINITY { 0.0 } else { max };
        let (mut sum, mut dot) = (s.splat(0.0), s.splat(0.0));
        for x in whole {
            (sum, dot) = weigh(s, s.mul(s.load(x), scale), max, sum, dot);
        }
        (sum, dot) = weigh(s, s.mul(tail, scale), max, sum, dot);
        Part { max, sum: s.sum(sum), dot: s.sum(dot) }
    }
}

/// The sums over one chunk, of the tokens that count and of all, in one pass: both relative to the largest
/// of all, unless so little counts that its own largest has to be the measure.
struct MaskedChunk<'a> {
    logits: &'a [f32],
    inv_temperature: f32,
    /// Of these logits.
    mask: TokenMask<'a>,
}

/// Below this a sum relative to the largest of all has lost what makes it.
const LEAST_SUM: f32 = 1e-30;

impl Job for MaskedChunk<'_> {
    type Output = Parts;

    #[inline(always)]
    fn run<S: Simd>(self, s: S) -> Parts {
        let parts = self.sums(s, self.largest(s, |_| u16::MAX));
        if parts.counted.sum >= LEAST_SUM {
            return parts;
        }
        let largest = self.largest(s, |at| self.mask.lanes(at));
        Parts { counted: self.sums(s, largest).counted, ..parts }
    }
}

impl MaskedChunk<'_> {
    /// The largest z of some lanes; 0 where there is none.
    #[inline(always)]
    fn largest<S: Simd>(&self, s: S, lanes: impl Fn(usize) -> u16) -> f32 {
        let none = s.splat(f32::NEG_INFINITY);
        let mut max = none;
        for at in (0..self.logits.len()).step_by(LANES) {
            max = s.max(max, s.keep(self.z(s, at), lanes(at), none));
        }
        match s.max_lane(max) {
            f32::NEG_INFINITY => 0.0,
            max => max,
        }
    }

    #[inline(always)]
    fn z<S: Simd>(&self, s: S, at: usize) -> S::V {
        let scale = s.splat(self.inv_temperature);
        s.mul(s.read(self.logits, at, f32::NEG_INFINITY), scale)
    }

    /// The sums relative to `max`.
    #[inline(always)]
    fn sums<S: Simd>(&self, s: S, max: f32) -> Parts {
        let zero = s.splat(0.0);
        let [mut all, mut counted] = [(zero, zero); 2];
        for at in (0..self.logits.len()).step_by(LANES) {
            let below = s.sub(self.z(s, at), s.splat(max));
            let p = s.exp(below);
            let dot = s.weigh(p, below);
            all = (s.add(all.0, p), s.add(all.1, dot));
            let keep = |v| s.keep(v, self.mask.lanes(at), zero);
            counted = (s.add(counted.0, keep(p)), s.add(counted.1, keep(dot)));
        }
        let [counted, all] =
            [counted, all].map(|(sum, dot)| Part { max, sum: s.sum(sum), dot: s.sum(dot) });
        Parts { counted, all }
    }
}

/// Adds e^(z - max) and e^(z - max) (z - max).
#[inline(always)]
fn weigh<S: Simd>(s: S, z: S::V, max: f32, sum: S::V, dot: S::V) -> (S::V, S::V) {
    let below = s.sub(z, s.splat(max));
    let p = s.exp(below);
    (s.add(sum, p), s.add(dot, s.weigh(p, below)))
}

/// The definition of a total, in f64.
fn reference_total(logits: &[f32], inv_temperature: f32) -> SoftmaxTotal {
    let z = |v: usize| logits[v] * inv_temperature;
    let max = (0..logits.len()).map(z).fold(f32::NEG_INFINITY, f32::max);
    let counted = (0..logits.len()).map(z).filter(|z| *z > f32::NEG_INFINITY);
    SoftmaxTotal { max, sum: counted.map(|z| f64::from(z - max).exp()).sum() }
}

/// The definition of the statistics, in f64.
fn reference(logits: &[f32], inv_temperature: f32, target: Option<usize>) -> TokenStats {
    let z = |v: usize| f64::from(logits[v] * inv_temperature);
    let max = (0..logits.len()).map(z).fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = (0..logits.len()).map(|v| (z(v) - max).exp()).sum();
    let log_sum_exp = max + sum.ln();
    let surprise = |v: usize| {
        let log_prob = z(v) - log_sum_exp;
        if log_prob == f64::NEG_INFINITY { 0.0 } else { -log_prob.exp() * log_prob }
    };
    TokenStats {
        log_prob: target.map_or(f32::NAN, |t| (z(t) - log_sum_exp) as f32),
        entropy: (0..logits.len()).map(surprise).sum::<f64>() as f32,
        log_sum_exp: log_sum_exp as f32,
    }
}

#[cfg(test)]
mod tests {
    use super::{TokenMask, TokenStats, VOCAB_CHUNK};
    use crate::{
        Kernels,
        testing::{Random, assert_close, every_level, reference},
    };

    fn stats(kernels: &Kernels, logits: &[f32], inv: &[f32], targets: &[u32]) -> Vec<TokenStats> {
        let mut out = vec![TokenStats::default(); inv.len()];
        kernels.softmax_stats(logits, inv, Some(targets), &mut out);
        out
    }

    fn bits(stats: &[TokenStats]) -> Vec<[u32; 3]> {
        stats
            .iter()
            .map(|s| [s.log_prob.to_bits(), s.entropy.to_bits(), s.log_sum_exp.to_bits()])
            .collect()
    }

    fn column(stats: &[TokenStats], of: impl Fn(&TokenStats) -> f32) -> Vec<f32> {
        stats.iter().map(of).collect()
    }

    #[test]
    fn totals_are_the_largest_and_what_is_relative_to_it() {
        let mut random = Random::new(3);
        let cols = VOCAB_CHUNK + 77;
        let mut logits = random.vec(2 * cols, 6.0);
        logits[..cols].fill(f32::NEG_INFINITY);
        let z = |i: usize| logits[cols + i] * 0.7;
        let max = (0..cols).map(z).fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = (0..cols).map(|i| f64::from(z(i) - max).exp()).sum();
        // Masks are not looked at.
        let masks = [None, Some(TokenMask(&[1]))];
        for kernels in every_level(2) {
            let sums = kernels.softmax_sums(&logits, &[1.0, 0.7], &masks);
            let totals = kernels.totals_of(&logits, &sums);
            assert_eq!((totals[0].max, totals[0].sum), (f32::NEG_INFINITY, 0.0));
            assert_eq!(totals[1].max, max, "{:?}", kernels.level());
            assert!((totals[1].sum / sum - 1.0).abs() < 1e-5, "{} and {sum}", totals[1].sum);
        }
    }

    /// What counts is as if all else were negative infinity, and the rest does not hear of it.
    #[test]
    fn masks_leave_what_counts() {
        let mut random = Random::new(77);
        let cols = 2 * VOCAB_CHUNK + 77;
        let logits = random.vec(2 * cols, 6.0);
        let mut logits: Vec<f32> = logits.iter().map(|x| x * 3.0).collect();
        // Far above what counts: relative to it nothing would be left.
        logits[5] = 300.0;
        for share in [1, 2, 40, 5000] {
            let words = cols.div_ceil(32);
            let mut mask = vec![0_u32; words];
            (0..cols)
                .filter(|i| i % share == share / 2)
                .for_each(|i| mask[i / 32] |= 1 << (i % 32));
            let counts = TokenMask(&mask);
            let mut cut = logits.clone();
            let out = |i: usize| !counts.allows(i);
            (0..cols).filter(|&i| out(i)).for_each(|i| cut[i] = f32::NEG_INFINITY);
            let target = (share / 2) as u32;
            for kernels in every_level(2).chain([reference()]) {
                let masks = [Some(counts), None];
                let sums = kernels.softmax_sums(&logits, &[1.0; 2], &masks);
                let mut got = [TokenStats::default(); 2];
                let targets = [target, 9];
                kernels.stats_of(&logits, (&sums, false), Some(&targets), &mut got);
                let expected = stats(&kernels, &cut, &[1.0; 2], &targets);
                let of: [fn(&TokenStats) -> f32; 3] =
                    [|s| s.log_prob, |s| s.entropy, |s| s.log_sum_exp];
                for of in of {
                    assert_close(&column(&got, of), &column(&expected, of), 2e-6);
                }
                kernels.stats_of(&logits, (&sums, true), Some(&targets), &mut got);
                assert_eq!(bits(&got), bits(&stats(&kernels, &logits, &[1.0; 2], &targets)));
                let mut drawn = [0; 2];
                for uniform in [0.0, 0.3, 0.999_999] {
                    kernels.sample_of(&logits, &sums, &[uniform; 2], &mut drawn);
                    assert!(counts.allows(drawn[0] as usize), "{} is not allowed", drawn[0]);
                }
            }
        }
    }

    #[test]
    fn two_logits_by_hand() {
        for kernels in every_level(1) {
            let got = stats(&kernels, &[0.0, 3f32.ln() * 2.0], &[0.5], &[1])[0];
            let entropy = -(0.75 * 0.75f32.ln() + 0.25 * 0.25f32.ln());
            let got = [got.log_prob, got.entropy, got.log_sum_exp];
            assert_close(&got, &[0.75f32.ln(), entropy, 4f32.ln()], 1e-6);
        }
    }

    #[test]
    fn every_level_agrees_with_the_definition() {
        let mut random = Random::new(61);
        for (rows, cols) in [(0, 5), (1, 1), (3, 15), (2, 16), (5, 17), (3, 2047), (2, 9001)] {
            for scale in [1.0, 30.0] {
                let logits = random.vec(rows * cols, scale);
                let inv: Vec<f32> = (0..rows).map(|r| 0.5 + r as f32 * 0.4).collect();
                let targets: Vec<u32> = (0..rows).map(|_| random.below(cols) as u32).collect();
                let expected = stats(&reference(), &logits, &inv, &targets);
                for kernels in every_level(2) {
                    let got = stats(&kernels, &logits, &inv, &targets);
                    for of in [
                        |s: &TokenStats| s.log_prob,
                        |s: &TokenStats| s.entropy,
                        |s: &TokenStats| s.log_sum_exp,
                    ] {
                        assert_close(&column(&got, of), &column(&expected, of), 2e-6);
                    }
                }
            }
        }
    }

    #[test]
    fn masked_logits_count_for_nothing() {
        let mut random = Random::new(62);
        let cols = 3 * VOCAB_CHUNK + 5;
        let mut logits = random.vec(cols, 4.0);
        // The first and the third chunk wholly, every other logit of the second.
        for (v, logit) in logits.iter_mut().enumerate() {
            if v / VOCAB_CHUNK != 1 && v < 3 * VOCAB_CHUNK || v % 2 == 1 {
                *logit = f32::NEG_INFINITY;
            }
        }
        let kept: Vec<f32> = logits.iter().copied().filter(|x| x.is_finite()).collect();
        let target = logits.iter().position(|x| x.is_finite()).expect("some are kept") as u32;
        let expected = stats(&reference(), &kept, &[0.9], &[0])[0];
        for kernels in every_level(2) {
            let got = stats(&kernels, &logits, &[0.9], &[target])[0];
            assert_close(
                &[got.entropy, got.log_prob],
                &[expected.entropy, expected.log_prob],
                1e-6,
            );
            let masked = stats(&kernels, &logits, &[0.9], &[0])[0];
            assert_eq!(masked.log_prob, f32::NEG_INFINITY);
        }
    }

    #[test]
    fn not_a_number_spreads() {
        for kernels in every_level(1) {
            for others in [0.5, f32::NEG_INFINITY] {
                let mut logits = vec![others; VOCAB_CHUNK + 40];
                logits[33] = f32::NAN;
                logits[VOCAB_CHUNK + 1] = 0.25;
                let got = stats(&kernels, &logits, &[1.0], &[0])[0];
                assert!(got.entropy.is_nan() && got.log_sum_exp.is_nan() && got.log_prob.is_nan());
            }
        }
    }

    #[test]
    fn neither_neighbours_nor_threads_change_a_bit() {
        let mut random = Random::new(63);
        let (rows, cols) = (7, 10_007);
        let logits = random.vec(rows * cols, 9.0);
        let inv = vec![0.8; rows];
        let targets: Vec<u32> = (0..rows).map(|_| random.below(cols) as u32).collect();
        for (one, three) in every_level(1).zip(every_level(3)) {
            let all = stats(&one, &logits, &inv, &targets);
            assert_eq!(bits(&stats(&three, &logits, &inv, &targets)), bits(&all));
            for row in 0..rows {
                let part = &logits[row * cols..][..cols];
                let alone = stats(&three, part, &inv[..1], &targets[row..=row]);
                assert_eq!(bits(&alone), bits(&all[row..=row]));
            }
        }
    }

    #[test]
    #[should_panic(expected = "target 4, vocabulary has 4")]
    fn a_target_beyond_the_vocabulary_is_refused() {
        stats(&reference(), &[0.0; 4], &[1.0], &[4]);
    }
}
