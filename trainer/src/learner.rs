//! Forward and backward over packed sequences: from tokens to log-probabilities, and from their
//! derivatives to gradients.
//!
//! Sequences lie one after the other without padding. Keys and values go through the same paged
//! kernels as in a rollout, over one layer's worth of blocks in plain order, so a log-probability here
//! has the bits of the rollout's. Leaves out recomputation of layers in the backward pass.

use std::ops::Range;

use engine::decoder::{Batch, Decoder, Gradients, HeadGradient, HeadInput, Keep, KvLayers, Tape};
use kernels::{AttnFamily, AttnSeq, Dtype, HeadScratch, Kernels, KvCache, TokenStats};

/// Tokens of a block of the packed pass's KV memory.
const BLOCK_SIZE: usize = 16;

/// One sequence to learn from: its tokens, of which those from `prompt_len` on are targets.
#[derive(Clone, Copy, Debug)]
pub struct Packed<'a> {
    /// Prompt, then response; at least `prompt_len` tokens.
    pub tokens: &'a [u32],
    /// Tokens that are given; at least 1.
    pub prompt_len: usize,
}

impl Packed<'_> {
    /// Tokens whose log-probability is asked for.
    pub fn targets(&self) -> usize {
        self.tokens.len() - self.prompt_len
    }

    /// Rows it takes in a forward pass: nothing follows the last token, so it is not run.
    pub fn rows(&self) -> usize {
        self.tokens.len() - 1
    }
}

/// Buffers of packed passes, for one model.
pub struct Learner {
    dtype: Dtype,
    tape: Tape,
    kv: Option<(KvCache, usize)>,
    head: HeadInput,
    scratch: HeadScratch,
    layout: Layout,
}

/// Where everything lies in a packed pass of `M` rows with `R` targets.
#[derive(Default)]
struct Layout {
    tokens: Vec<u32>,
    positions: Vec<u32>,
    slots: Vec<u32>,
    /// Rows of each sequence.
    seqs: Vec<Range<usize>>,
    /// Blocks of each sequence, in plain order.
    blocks: Vec<u32>,
    block_ranges: Vec<Range<usize>>,
    /// `[R]` rows whose next token is a target, and those tokens.
    rows: Vec<usize>,
    targets: Vec<u32>,
}

impl Layout {
    fn fill(&mut self, sequences: &[Packed<'_>]) {
        *self = Self::default();
        for sequence in sequences {
            let (first, rows) = (self.tokens.len(), sequence.rows());
            let first_block = self.blocks.len();
            let blocks = rows.div_ceil(BLOCK_SIZE);
            self.blocks.extend((first_block..first_block + blocks).map(|block| block as u32));
            self.block_ranges.push(first_block..first_block + blocks);
            self.seqs.push(first..first + rows);
            self.tokens.extend_from_slice(&sequence.tokens[..rows]);
            self.positions.extend((0..rows).map(|position| position as u32));
            let first_slot = first_block * BLOCK_SIZE;
            self.slots.extend((first_slot..first_slot + rows).map(|slot| slot as u32));
            self.rows.extend(first + sequence.prompt_len - 1..first + rows);
            self.targets.extend_from_slice(&sequence.tokens[sequence.prompt_len..]);
        }
    }
}

impl Learner {
    /// A learner that can run backward (`Keep::AllLayers`) or forward only.
    pub fn new(decoder: &Decoder, keep: Keep) -> Self {
        let dtype = decoder.weights.dtype();
        Self {
            dtype,
            tape: Tape::new(&decoder.config, dtype, keep),
            kv: None,
            head: HeadInput::new(dtype),
            scratch: HeadScratch::default(),
            layout: Layout::default(),
        }
    }

    /// Log-probability, entropy and log-sum-exp of every target of `sequences`, in their order, with
    /// logits divided by the temperature.
    ///
    /// # Panics
    /// When a sequence has no prompt token.
    pub fn forward(
        &mut self,
        decoder: &Decoder,
        kernels: &Kernels,
        sequences: &[Packed<'_>],
        inv_temperature: f32,
    ) -> Vec<TokenStats> {
        self.layout.fill(sequences);
        self.run_layers(decoder, kernels);
        let layout = &self.layout;
        decoder.head_input(kernels, &self.tape, &layout.rows, &mut self.head);
        let mut stats = vec![TokenStats::default(); layout.targets.len()];
        let (input, head) = (&self.head.operand, decoder.weights.head());
        let scratch = &mut self.scratch;
        kernels.head_forward(input, head, &layout.targets, inv_temperature, &mut stats, scratch);
        stats
    }

    fn run_layers(&mut self, decoder: &Decoder, kernels: &Kernels) {
        let layout = &self.layout;
        let blocks = layout.blocks.len().max(1);
        if self.kv.as_ref().is_none_or(|(_, have)| *have < blocks) {
            let (kv_heads, head_dim) = (decoder.config.kv_heads, decoder.config.head_dim);
            let cache = KvCache::new(self.dtype, 1, blocks, BLOCK_SIZE, kv_heads, head_dim);
            self.kv = Some((cache, blocks));
        }
        let seqs: Vec<AttnSeq<'_>> = layout
            .seqs
            .iter()
            .zip(&layout.block_ranges)
            .map(|(rows, blocks)| AttnSeq {
                first_row: rows.start,
                rows: rows.len(),
                start: 0,
                blocks: &layout.blocks[blocks.clone()],
            })
            .collect();
        let batch = Batch {
            tokens: &layout.tokens,
            positions: &layout.positions,
            slots: &layout.slots,
            seqs: &seqs,
        };
        let (kv, _) = self.kv.as_mut().expect("made above");
        decoder.forward(kernels, &batch, (kv, KvLayers::Shared), &mut self.tape);
    }

    /// Adds to `grads` the gradient of a loss whose derivatives by the targets' log-probabilities (and
    /// entropies) of the last [`Learner::forward`] are `dlogp` (and `dentropy`).
    ///
    /// # Panics
    /// When the last forward pass kept no layers, or lengths differ from its targets.
    pub fn backward(
        &mut self,
        decoder: &Decoder,
        kernels: &Kernels,
        loss: &LossGradient<'_>,
        grads: &mut Gradients,
    ) {
        let layout = &self.layout;
        let head = HeadGradient {
            rows: &layout.rows,
            input: &self.head,
            targets: &layout.targets,
            inv_temperature: loss.inv_temperature,
            stats: loss.stats,
            dlogp: loss.dlogp,
            dentropy: loss.dentropy,
        };
        let alone = |rows: &Range<usize>| AttnFamily { prompt: rows.clone(), branches: &[] };
        let families: Vec<AttnFamily<'_>> = layout.seqs.iter().map(alone).collect();
        let pass = (&layout.tokens[..], &layout.positions[..], &families[..]);
        decoder.backward(kernels, pass, &head, &mut self.tape, grads);
    }
}

/// What a loss wants of the targets of a forward pass; all of the length of its targets.
pub struct LossGradient<'a> {
    /// What [`Learner::forward`] returned.
    pub stats: &'a [TokenStats],
    /// The temperature that was used there, inverted.
    pub inv_temperature: f32,
    /// Derivative of the loss by each log-probability.
    pub dlogp: &'a [f32],
    /// Derivative of the loss by each entropy, if it depends on them.
    pub dentropy: Option<&'a [f32]>,
}
