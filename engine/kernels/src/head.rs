//! The output head fused with its softmax: from hidden states to the log-probability of a target and
//! the entropy, and back.
//!
//! ```text
//! z = h W^T / temperature      p = softmax(z)      H = -sum p ln p
//! dz_v = g ([v = target] - p_v) - e p_v (ln p_v + H)      g = dL/dlog-prob, e = dL/dentropy
//! dh = dz W / temperature                                 dW += dz^T h / temperature
//! ```
//! `h` is `[rows, K]`, `W` `[vocabulary, K]`. Logits exist for [`ROW_BLOCK`] rows and one chunk of
//! [`VOCAB_CHUNK`] outputs at a time: the forward pass joins the chunks' sums as they come, the
//! backward pass computes each chunk again. An output's bits do not depend on the blocks: those of
//! [`Kernels::head_forward`] are the ones of the whole product and [`Kernels::softmax_stats`].

use std::ops::Range;

use crate::{
    Dtype, Input, Kernels, Linear, Matrix, Operand, Part, Scratch, Write,
    cpu::Isa,
    disjoint::Disjoint,
    simd::{Job, LANES, Simd},
    softmax::{Chunk, TokenStats, Total, VOCAB_CHUNK, check_targets},
};

/// Hidden states that share one pass over the weights; logits of so many rows are held at once.
pub const ROW_BLOCK: usize = 1536;

/// Reusable memory of the head, whatever the number of tokens: logits of [`ROW_BLOCK`] rows and [`VOCAB_CHUNK`]
/// words (12.6 MB), and in the backward their gradient and its operands.
pub struct HeadScratch {
    hidden: Operand,
    logits: Vec<f32>,
    totals: Vec<RowTotal>,
    gradient: Operand,
    products: Scratch,
}

/// What the chunks so far have shown of a row: the sums, and the target's logit when it was there.
#[derive(Clone, Copy)]
struct RowTotal {
    total: Total,
    target: Option<f32>,
}

impl HeadScratch {
    /// Empty; grows to what the largest block needs.
    pub fn new() -> Self {
        Self {
            hidden: Operand::new(Dtype::F32),
            logits: Vec::new(),
            totals: Vec::new(),
            gradient: Operand::new(Dtype::F32),
            products: Scratch::new(),
        }
    }
}

impl Default for HeadScratch {
    fn default() -> Self {
        Self::new()
    }
}

/// Sets the logits of some hidden states and a range of the vocabulary.
type BlockProduct<'a> = dyn FnMut(&Operand, Range<usize>, &mut [f32]) + 'a;

/// Computes the logits of a block of rows and a chunk of the vocabulary.
type ChunkProduct<'a> = dyn FnMut(Range<usize>, Range<usize>, &mut [f32]) + 'a;

/// The targets of all rows, and where their statistics go.
struct RowsOut<'a> {
    targets: &'a [u32],
    inv_temperature: f32,
    out: &'a mut [TokenStats],
}

/// What [`Kernels::head_backward`] reads and writes.
pub struct HeadBackward<'a> {
    /// Hidden states `[rows, K]`, as given to the forward pass.
    pub h: &'a Operand,
    /// Weights `[vocabulary, K]`.
    pub w: &'a Matrix,
    /// One target for each row.
    pub targets: &'a [u32],
    /// One over the temperature.
    pub inv_temperature: f32,
    /// What the forward pass returned.
    pub stats: &'a [TokenStats],
    /// Gradient of each row's log-probability.
    pub dlogp: &'a [f32],
    /// Gradient of each row's entropy; `None` for zeros.
    pub dentropy: Option<&'a [f32]>,
    /// Set to the gradient of the hidden states, `[rows, K]`.
    pub dh: &'a mut [f32],
    /// The gradient of the weights is added here, `[vocabulary, K]`, row-major.
    pub dw: &'a mut [f32],
}

impl Kernels {
    /// Log-probability of each target, entropy and log-sum-exp of `h W^T * inv_temperature`.
    ///
    /// # Panics
    /// When formats or shapes do not agree or a target lies beyond the vocabulary.
    pub fn head_forward(
        &self,
        h: &Operand,
        w: &Matrix,
        targets: &[u32],
        inv_temperature: f32,
        out: &mut [TokenStats],
        scratch: &mut HeadScratch,
    ) {
        if let Isa::Reference = self.isa {
            check_rows(h.rows(), targets, out, w.rows());
            return self.reference_forward(h, w, targets, inv_temperature, out);
        }
        let rows = RowsOut { targets, inv_temperature, out };
        self.stats_of_blocks((h, w.rows()), rows, scratch, &mut |hidden, chunk, logits| {
            self.matmul(hidden, w, chunk, None, Write::Set, logits);
        });
    }

    /// Joins what `product` gives for blocks of rows and chunks of the vocabulary.
    fn stats_of_blocks(
        &self,
        (h, vocabulary): (&Operand, usize),
        rows: RowsOut<'_>,
        scratch: &mut HeadScratch,
        product: &mut BlockProduct<'_>,
    ) {
        check_rows(h.rows(), rows.targets, rows.out, vocabulary);
        let HeadScratch { hidden, logits, totals, .. } = scratch;
        self.stats_by_chunks(vocabulary, rows, (logits, totals), &mut |rows, chunk, logits| {
            // The block of rows stays the same for all chunks of the vocabulary.
            if chunk.start == 0 && rows.len() < h.rows() {
                copy_rows(h, &rows, hidden);
            }
            let hidden = if rows.len() < h.rows() { &*hidden } else { h };
            product(hidden, chunk, logits);
        });
    }

    /// [`Kernels::head_forward`] with weights in full or quantised.
    ///
    /// # Panics
    /// When formats or shapes do not agree or a target lies beyond the vocabulary.
    pub fn head_stats(
        &self,
        h: &Input,
        w: &Linear,
        targets: &[u32],
        inv_temperature: f32,
        out: &mut [TokenStats],
        scratch: &mut HeadScratch,
    ) {
        let w = match w {
            Linear::Full(w) => {
                return self.head_forward(h.full(), w, targets, inv_temperature, out, scratch);
            }
            Linear::Quantised(w) => w,
        };
        if self.expands(h.full().dtype()) {
            let rows = RowsOut { targets, inv_temperature, out };
            return self.stats_of_blocks(
                (h.full(), w.rows()),
                rows,
                scratch,
                &mut |hidden, rows, out| {
                    self.matmul_stored(hidden, w, Write::Set, [Part { rows, bias: None, out }]);
                },
            );
        }
        let h = h.quantised();
        check_rows(h.rows(), targets, out, w.rows());
        let to = (&mut scratch.logits, &mut scratch.totals);
        let rows = RowsOut { targets, inv_temperature, out };
        self.stats_by_chunks(w.rows(), rows, to, &mut |rows, chunk, logits| {
            self.quant_logits((h, rows), w, chunk, logits);
        });
    }

    /// Goes over blocks of rows and chunks of the vocabulary, whose logits `product` computes.
    fn stats_by_chunks(
        &self,
        vocabulary: usize,
        io: RowsOut<'_>,
        (logits, totals): (&mut Vec<f32>, &mut Vec<RowTotal>),
        product: &mut ChunkProduct<'_>,
    ) {
        for rows in blocks(io.targets.len(), ROW_BLOCK) {
            totals.clear();
            totals.resize(rows.len(), RowTotal { total: Total::EMPTY, target: None });
            for chunk in blocks(vocabulary, VOCAB_CHUNK) {
                let logits = prefix(logits, rows.len() * chunk.len());
                product(rows.clone(), chunk.clone(), logits);
                let targets = &io.targets[rows.clone()];
                self.join_chunk(logits, &chunk, targets, io.inv_temperature, totals);
            }
            for (out, row) in io.out[rows].iter_mut().zip(&*totals) {
                *out = row.total.stats(row.target);
            }
        }
    }

    /// Joins one chunk of logits to the totals of its rows.
    fn join_chunk(
        &self,
        logits: &[f32],
        chunk: &Range<usize>,
        targets: &[u32],
        inv_temperature: f32,
        totals: &mut [RowTotal],
    ) {
        let totals = Disjoint::new(totals);
        self.split_rows(targets.len(), chunk.len(), &|range| {
            for row in range {
                let logits = &logits[row * chunk.len()..][..chunk.len()];
                // SAFETY: every row belongs to one task.
                let state = &mut unsafe { totals.part(row, row + 1) }[0];
                state.total.join(self.isa.vectorize(Chunk { logits, inv_temperature }));
                let target = targets[row] as usize;
                if chunk.contains(&target) {
                    state.target = Some(logits[target - chunk.start] * inv_temperature);
                }
            }
        });
    }

    /// The gradients of [`Kernels::head_forward`].
    ///
    /// # Panics
    /// When formats or shapes do not agree or a target lies beyond the vocabulary.
    pub fn head_backward(&self, io: HeadBackward<'_>, scratch: &mut HeadScratch) {
        let HeadBackward { h, w, targets, inv_temperature, stats, dlogp, dentropy, dh, dw } = io;
        let (count, cols) = (h.rows(), h.cols());
        assert_eq!([targets.len(), stats.len(), dlogp.len()], [count; 3], "lengths against rows");
        let entropies = dentropy.map_or(count, <[f32]>::len);
        assert_eq!(entropies, count, "entropy gradients against rows");
        assert_eq!(dh.len(), count * cols, "gradient of the hidden states");
        assert_eq!(dw.len(), w.rows() * cols, "gradient of the weights");
        check_targets(targets, w.rows());
        if scratch.gradient.dtype() != h.dtype() {
            scratch.gradient = Operand::new(h.dtype());
        }
        for rows in blocks(count, ROW_BLOCK) {
            let hidden = block(h, &rows, &mut scratch.hidden);
            let part = Rows {
                inv_temperature,
                targets: &targets[rows.clone()],
                stats: &stats[rows.clone()],
                dlogp: &dlogp[rows.clone()],
                dentropy: dentropy.map(|e| &e[rows.clone()]),
            };
            let dh = &mut dh[rows.start * cols..rows.end * cols];
            for chunk in blocks(w.rows(), VOCAB_CHUNK) {
                let logits = prefix(&mut scratch.logits, rows.len() * chunk.len());
                self.matmul(hidden, w, chunk.clone(), None, Write::Set, logits);
                self.gradient_of_logits(&part, &chunk, logits, &mut scratch.gradient);
                let write = if chunk.start == 0 { Write::Set } else { Write::Add };
                let products = &mut scratch.products;
                self.matmul_dx(&scratch.gradient, w, chunk.clone(), write, dh, products);
                let dw = &mut dw[chunk.start * cols..chunk.end * cols];
                self.matmul_dw(&scratch.gradient, hidden, Write::Add, dw, products);
            }
        }
    }

    /// Makes `out` the rounded gradient of one chunk of logits, which change.
    fn gradient_of_logits(
        &self,
        rows: &Rows<'_>,
        chunk: &Range<usize>,
        logits: &mut [f32],
        out: &mut Operand,
    ) {
        let width = chunk.len();
        let logits = Disjoint::new(logits);
        let out = out.rounded_rows(rows.targets.len(), width);
        self.split_rows(rows.targets.len(), width, &|range| {
            for row in range {
                // SAFETY: every row belongs to one task.
                let logits = unsafe { logits.part(row * width, (row + 1) * width) };
                let slope = rows.slope(row);
                match self.isa {
                    Isa::Reference => reference_gradient(slope, logits),
                    _ => self.isa.vectorize(Gradient { slope, logits }),
                }
                let target = rows.targets[row] as usize;
                if chunk.contains(&target) {
                    logits[target - chunk.start] += slope.log_prob;
                }
                // SAFETY: as above.
                unsafe { out.set(self.isa, row, logits) };
            }
        });
    }

    /// The definition: all logits of one row at a time.
    fn reference_forward(
        &self,
        h: &Operand,
        w: &Matrix,
        targets: &[u32],
        inv_temperature: f32,
        out: &mut [TokenStats],
    ) {
        let mut hidden = Operand::new(h.dtype());
        let mut logits = vec![0.0; w.rows()];
        for row in 0..h.rows() {
            copy_rows(h, &(row..row + 1), &mut hidden);
            self.matmul(&hidden, w, 0..w.rows(), None, Write::Set, &mut logits);
            let one = row..row + 1;
            let target = Some(&targets[one.clone()]);
            self.softmax_stats(&logits, &[inv_temperature], target, &mut out[one]);
        }
    }
}

/// What the gradient of some rows' logits depends on.
struct Rows<'a> {
    inv_temperature: f32,
    targets: &'a [u32],
    stats: &'a [TokenStats],
    dlogp: &'a [f32],
    dentropy: Option<&'a [f32]>,
}

/// What the gradient of one row's logits depends on.
#[derive(Clone, Copy)]
struct Slope {
    inv_temperature: f32,
    log_sum_exp: f32,
    total_entropy: f32,
    /// Gradients of log-probability and entropy, times the inverse temperature.
    log_prob: f32,
    entropy: f32,
}

impl Rows<'_> {
    fn slope(&self, row: usize) -> Slope {
        Slope {
            inv_temperature: self.inv_temperature,
            log_sum_exp: self.stats[row].log_sum_exp,
            total_entropy: self.stats[row].entropy,
            log_prob: self.dlogp[row] * self.inv_temperature,
            entropy: self.dentropy.map_or(0.0, |e| e[row]) * self.inv_temperature,
        }
    }
}

/// Turns a row's logits into their gradient, but for the target's own term.
struct Gradient<'a> {
    slope: Slope,
    logits: &'a mut [f32],
}

impl Job for Gradient<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let scale = s.splat(self.slope.inv_temperature);
        let log_sum_exp = s.splat(self.slope.log_sum_exp);
        let total_entropy = s.splat(self.slope.total_entropy);
        let (g, e) = (s.splat(-self.slope.log_prob), s.splat(-self.slope.entropy));
        for at in (0..self.logits.len()).step_by(LANES) {
            let z = s.mul(s.read(self.logits, at, 0.0), scale);
            let log_p = s.sub(z, log_sum_exp);
            let p = s.exp(log_p);
            let surplus = s.weigh(p, s.add(log_p, total_entropy));
            s.write(self.logits, at, s.mul_add(surplus, e, s.mul(p, g)));
        }
    }
}

fn reference_gradient(slope: Slope, logits: &mut [f32]) {
    for logit in logits {
        let z = f64::from(*logit * slope.inv_temperature);
        let log_p = z - f64::from(slope.log_sum_exp);
        let p = log_p.exp();
        let surplus = if p == 0.0 { 0.0 } else { p * (log_p + f64::from(slope.total_entropy)) };
        *logit = (-f64::from(slope.log_prob) * p - f64::from(slope.entropy) * surplus) as f32;
    }
}

/// Refuses targets and statistics that are not one for each row, and words that do not exist.
fn check_rows(rows: usize, targets: &[u32], out: &[TokenStats], vocabulary: usize) {
    assert_eq!([targets.len(), out.len()], [rows; 2], "lengths against rows");
    check_targets(targets, vocabulary);
}

/// Ranges of `size` that cover `0..len`.
fn blocks(len: usize, size: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len).step_by(size).map(move |start| start..len.min(start + size))
}

/// The first `len` elements of a buffer, which grows to hold them.
fn prefix(buffer: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    &mut buffer[..len]
}

/// Some rows of `h`: itself when they are all, else a copy.
fn block<'a>(h: &'a Operand, rows: &Range<usize>, copy: &'a mut Operand) -> &'a Operand {
    if rows.len() == h.rows() {
        return h;
    }
    copy_rows(h, rows, copy);
    copy
}

fn copy_rows(h: &Operand, rows: &Range<usize>, copy: &mut Operand) {
    let stride = h.stride();
    copy.reshape(h.dtype(), rows.len(), h.cols());
    let lines = copy.disjoint();
    // SAFETY: the only part there is.
    let lines = unsafe { lines.part(0, rows.len() * stride) };
    lines.copy_from_slice(&h.lines()[rows.start * stride..rows.end * stride]);
}

#[cfg(test)]
mod tests {
    use std::{ops::Range, rc::Rc};

    use super::{HeadBackward, HeadScratch, ROW_BLOCK};
    use crate::{
        Dtype, Kernels, Matrix, Operand, TokenStats, VOCAB_CHUNK, Write,
        testing::{Random, assert_close, bits, differences, every_level, reference},
    };

    const INV: f32 = 0.8;

    /// Hidden states, weights, targets and the gradients of the two outputs.
    struct Case {
        hidden: Vec<f32>,
        cols: usize,
        h: Operand,
        w: Rc<Matrix>,
        targets: Vec<u32>,
        dlogp: Vec<f32>,
        dentropy: Vec<f32>,
    }

    impl Case {
        fn new(seed: u64, dtype: Dtype, [rows, vocabulary, cols]: [usize; 3]) -> (Self, Vec<f32>) {
            let mut random = Random::new(seed);
            let hidden = random.vec(rows * cols, 1.5);
            let weights = random.vec(vocabulary * cols, 1.5);
            let mut w = Matrix::zeros(dtype, vocabulary, cols);
            w.set_rows(0, &weights);
            let targets = (0..rows).map(|_| random.below(vocabulary) as u32).collect();
            let (dlogp, dentropy) = (random.vec(rows, 1.0), random.vec(rows, 1.0));
            let h = operand(dtype, &hidden, cols);
            (Self { hidden, cols, h, w: Rc::new(w), targets, dlogp, dentropy }, weights)
        }

        /// The same with some of the rows.
        fn part(&self, rows: Range<usize>) -> Self {
            let hidden = self.hidden[rows.start * self.cols..rows.end * self.cols].to_vec();
            Self {
                h: operand(self.w.dtype(), &hidden, self.cols),
                hidden,
                cols: self.cols,
                w: Rc::clone(&self.w),
                targets: self.targets[rows.clone()].to_vec(),
                dlogp: self.dlogp[rows.clone()].to_vec(),
                dentropy: self.dentropy[rows].to_vec(),
            }
        }

        fn forward(&self, kernels: &Kernels, scratch: &mut HeadScratch) -> Vec<TokenStats> {
            let mut out = vec![TokenStats::default(); self.targets.len()];
            kernels.head_forward(&self.h, &self.w, &self.targets, INV, &mut out, scratch);
            out
        }

        /// The gradients of the hidden states and of the weights, the latter on top of 0.5.
        fn backward(&self, kernels: &Kernels, stats: &[TokenStats]) -> (Vec<f32>, Vec<f32>) {
            let mut dw = vec![0.5; self.w.rows() * self.cols];
            let dh = self.backward_into(kernels, stats, &mut dw);
            (dh, dw)
        }

        fn backward_into(
            &self,
            kernels: &Kernels,
            stats: &[TokenStats],
            dw: &mut [f32],
        ) -> Vec<f32> {
            let mut dh = vec![f32::NAN; self.hidden.len()];
            let io = HeadBackward {
                h: &self.h,
                w: &self.w,
                targets: &self.targets,
                inv_temperature: INV,
                stats,
                dlogp: &self.dlogp,
                dentropy: Some(&self.dentropy),
                dh: &mut dh,
                dw,
            };
            kernels.head_backward(io, &mut HeadScratch::new());
            dh
        }

        /// sum of dlogp log-prob + dentropy entropy, in f64.
        fn loss(&self, hidden: &[f64], weights: &[f64]) -> f64 {
            let row = |row: usize| -> f64 {
                let h = &hidden[row * self.cols..][..self.cols];
                let z: Vec<f64> = weights
                    .chunks(self.cols)
                    .map(|w| w.iter().zip(h).map(|(w, h)| w * h).sum::<f64>() * f64::from(INV))
                    .collect();
                let sum: f64 = z.iter().map(|z| z.exp()).sum();
                let mean = z.iter().map(|z| z.exp() * z).sum::<f64>() / sum;
                f64::from(self.dlogp[row]) * (z[self.targets[row] as usize] - sum.ln())
                    + f64::from(self.dentropy[row]) * (sum.ln() - mean)
            };
            (0..self.targets.len()).map(row).sum()
        }
    }

    fn operand(dtype: Dtype, values: &[f32], cols: usize) -> Operand {
        let mut h = Operand::new(dtype);
        reference().operand(values, cols, &mut h);
        h
    }

    fn stat_bits(stats: &[TokenStats]) -> Vec<u32> {
        bits(&stats.iter().flat_map(|s| [s.log_prob, s.entropy, s.log_sum_exp]).collect::<Vec<_>>())
    }

    #[test]
    fn chunks_and_blocks_give_the_bits_of_the_whole() {
        for dtype in [Dtype::F32, Dtype::Bf16] {
            let mut scratch: Vec<_> = every_level(2).map(|k| (k, HeadScratch::new())).collect();
            for rows in [0, 1, 3, 64, ROW_BLOCK + 9] {
                let shape = [rows, 2 * VOCAB_CHUNK + 37, 9];
                let (case, _) = Case::new(71, dtype, shape);
                for (kernels, scratch) in &mut scratch {
                    let mut logits = vec![0.0; rows * shape[1]];
                    let all = 0..shape[1];
                    kernels.matmul(&case.h, &case.w, all, None, Write::Set, &mut logits);
                    let mut expected = vec![TokenStats::default(); rows];
                    let inv = vec![INV; rows];
                    kernels.softmax_stats(&logits, &inv, Some(&case.targets), &mut expected);
                    let got = case.forward(kernels, scratch);
                    assert_eq!(stat_bits(&got), stat_bits(&expected), "{rows} rows");
                }
            }
        }
    }

    #[test]
    fn the_gradient_is_that_of_the_definition() {
        let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<f64>>();
        for shape in [[3, 23, 5], [2, VOCAB_CHUNK + 20, 2]] {
            let (case, weights) = Case::new(72, Dtype::F32, shape);
            let expected_dh = differences(&case.hidden, |h| case.loss(h, &wide(&weights)));
            let expected_dw = differences(&weights, |w| case.loss(&wide(&case.hidden), w));
            for kernels in every_level(2) {
                let stats = case.forward(&kernels, &mut HeadScratch::new());
                let (dh, dw) = case.backward(&kernels, &stats);
                let dw: Vec<f32> = dw.into_iter().map(|x| x - 0.5).collect();
                assert_close(&dh, &expected_dh, 1e-5);
                assert_close(&dw, &expected_dw, 1e-5);
            }
        }
    }

    #[test]
    fn every_level_agrees_with_the_definition_in_bf16() {
        let (case, _) = Case::new(73, Dtype::Bf16, [17, VOCAB_CHUNK + 51, 33]);
        let expected = case.forward(&reference(), &mut HeadScratch::new());
        let (dh, dw) = case.backward(&reference(), &expected);
        for kernels in every_level(2) {
            let stats = case.forward(&kernels, &mut HeadScratch::new());
            for (got, expected) in stats.iter().zip(&expected) {
                let got = [got.log_prob, got.entropy, got.log_sum_exp];
                let expected = [expected.log_prob, expected.entropy, expected.log_sum_exp];
                assert_close(&got, &expected, 1e-5);
            }
            let (dh2, dw2) = case.backward(&kernels, &stats);
            // The gradient of a logit may round to the other neighbour in bf16.
            assert_close(&dh2, &dh, 4e-3);
            assert_close(&dw2, &dw, 4e-3);
        }
    }

    #[test]
    fn neither_neighbours_nor_threads_change_a_bit() {
        let shape = [ROW_BLOCK + 5, 300, 18];
        let (case, _) = Case::new(74, Dtype::Bf16, shape);
        for (one, three) in every_level(1).zip(every_level(3)) {
            let stats = case.forward(&one, &mut HeadScratch::new());
            let (dh, dw) = case.backward(&one, &stats);
            assert_eq!(
                stat_bits(&case.forward(&three, &mut HeadScratch::new())),
                stat_bits(&stats)
            );
            let (dh3, dw3) = case.backward(&three, &stats);
            assert_eq!((bits(&dh3), bits(&dw3)), (bits(&dh), bits(&dw)));
            for row in [0, 100, ROW_BLOCK + 2] {
                let alone = case.part(row..row + 1);
                let own = alone.forward(&three, &mut HeadScratch::new());
                assert_eq!(stat_bits(&own), stat_bits(&stats[row..=row]));
                let part = row * shape[2]..(row + 1) * shape[2];
                assert_eq!(bits(&alone.backward(&three, &own).0), bits(&dh[part]));
            }
        }
    }

    #[test]
    fn blocks_of_rows_add_up() {
        let shape = [ROW_BLOCK + 70, 90, 6];
        let (case, _) = Case::new(75, Dtype::F32, shape);
        for kernels in every_level(2) {
            let stats = case.forward(&kernels, &mut HeadScratch::new());
            let (dh, dw) = case.backward(&kernels, &stats);
            let mut sum = vec![0.5; dw.len()];
            let mut rows = Vec::new();
            for part in [0..200, 200..400, 400..shape[0]] {
                let stats = &stats[part.clone()];
                rows.extend(case.part(part).backward_into(&kernels, stats, &mut sum));
            }
            assert_eq!(bits(&rows), bits(&dh));
            assert_close(&sum, &dw, 1e-5);
        }
    }
}
