//! Runs planned slices through the decoder: from integers to residual streams and logits.
//!
//! The only place that knows both the scheduler's block tables and the kernels' buffers.

use kernels::{AttnSeq, HeadScratch, Kernels, KvCache, KvDtype, TokenStats};
use scheduler::{Scheduler, Slice};

use crate::decoder::{Batch, Decoder, HeadInput, Keep, KvLayers, Tape};
use crate::memory::{LOGIT_ROWS, MemoryPlan};

/// The model, its KV memory and the buffers of a step.
pub(crate) struct Runner {
    pub(crate) kernels: Kernels,
    pub(crate) decoder: Decoder,
    kv: KvCache,
    block_size: usize,
    tape: Tape,
    tokens: Vec<u32>,
    positions: Vec<u32>,
    slots: Vec<u32>,
    head: HeadInput,
    head_scratch: HeadScratch,
    /// `[up to LOGIT_ROWS, V]`.
    logits: Vec<f32>,
    /// `[up to CHANGED_ROWS, V]`.
    changed: Vec<f32>,
}

/// Rows of logits, and memory for those that are changed before a draw.
pub(crate) struct Logits<'a> {
    pub(crate) kernels: &'a Kernels,
    /// `[rows, V]`.
    pub(crate) rows: &'a mut [f32],
    /// Room for at most [`CHANGED_ROWS`](crate::memory::CHANGED_ROWS) rows; it only grows.
    pub(crate) changed: &'a mut Vec<f32>,
}

impl Runner {
    pub(crate) fn new(
        kernels: Kernels,
        decoder: Decoder,
        plan: &MemoryPlan,
        kv_dtype: KvDtype,
    ) -> Self {
        let (config, dtype) = (&decoder.config, decoder.weights.dtype());
        let kv = KvCache::new(
            kv_dtype,
            config.layers,
            plan.kv_blocks,
            plan.block_size,
            config.kv_heads,
            config.head_dim,
        );
        let tape = Tape::new(config, dtype, Keep::OneLayer);
        Self {
            kernels,
            decoder,
            kv,
            block_size: plan.block_size,
            tape,
            tokens: Vec::new(),
            positions: Vec::new(),
            slots: Vec::new(),
            head: HeadInput::new(dtype),
            head_scratch: HeadScratch::default(),
            logits: Vec::new(),
            changed: Vec::new(),
        }
    }

    /// Runs the layers over `slices`, one after the other in rows; keys and values go to their blocks.
    pub(crate) fn forward(&mut self, scheduler: &Scheduler, slices: &[Slice]) {
        self.tokens.clear();
        self.positions.clear();
        self.slots.clear();
        let mut seqs = Vec::with_capacity(slices.len());
        for slice in slices {
            let blocks = scheduler.blocks(slice.seq);
            let range = slice.start..slice.start + slice.rows();
            seqs.push(AttnSeq {
                first_row: self.tokens.len(),
                rows: slice.rows(),
                start: slice.start,
                blocks,
            });
            let tokens = scheduler.tokens_and_guesses(slice.seq);
            self.tokens.extend_from_slice(&tokens[range.clone()]);
            for position in range {
                let block = blocks[position / self.block_size] as usize;
                self.positions.push(position as u32);
                self.slots.push((block * self.block_size + position % self.block_size) as u32);
            }
        }
        let batch = Batch {
            tokens: &self.tokens,
            positions: &self.positions,
            slots: &self.slots,
            copies: &[],
            seqs: &seqs,
        };
        let kv = (&mut self.kv, KvLayers::Own);
        self.decoder.forward(&self.kernels, &batch, kv, &mut self.tape);
    }

    /// Statistics of the next token of these rows of the last pass, with `targets` as next tokens.
    pub(crate) fn head_stats(
        &mut self,
        rows: &[usize],
        targets: &[u32],
        inv_temperature: f32,
    ) -> Vec<TokenStats> {
        self.decoder.head_input(&self.kernels, &self.tape, rows, &mut self.head);
        let mut stats = vec![TokenStats::default(); rows.len()];
        let (input, head) = (&self.head.input, self.decoder.weights.head());
        let scratch = &mut self.head_scratch;
        self.kernels.head_stats(input, head, targets, inv_temperature, &mut stats, scratch);
        stats
    }

    /// Logits `[rows, V]` of these rows of the last pass, at most [`LOGIT_ROWS`] of them.
    pub(crate) fn logits(&mut self, rows: &[usize]) -> Logits<'_> {
        assert!(rows.len() <= LOGIT_ROWS, "{} rows of logits, limit is {LOGIT_ROWS}", rows.len());
        self.decoder.head_input(&self.kernels, &self.tape, rows, &mut self.head);
        let head = self.decoder.weights.head();
        let len = rows.len() * head.rows();
        if self.logits.len() < len {
            self.logits.resize(len, 0.0);
        }
        let (input, write) = (&self.head.input, kernels::Write::Set);
        let logits = &mut self.logits[..len];
        self.kernels.linear(input, head, 0..head.rows(), None, write, logits);
        Logits { kernels: &self.kernels, rows: logits, changed: &mut self.changed }
    }
}
