//! The hand-written decoder over whole sequences: packed forward, head, backward.

use std::collections::BTreeMap;

use engine::decoder::{
    Batch, Decoder, Gradients, HeadGradient, HeadInput, Keep, KvLayers, PackedPass, Tape, Weights,
};
use engine::{Dtype, Level, ModelConfig, ModelSource, Quantization};
use kernels::{AttnFamily, AttnSeq, HeadScratch, Kernels, KvCache, TokenStats};

const BLOCK_SIZE: usize = 16;

/// The decoder in f32 with the kernels of this machine.
pub(crate) struct Fast {
    kernels: Kernels,
    decoder: Decoder,
}

impl Fast {
    pub(crate) fn load(config: ModelConfig, source: &ModelSource) -> Self {
        let kernels = Kernels::new(Level::detect(), 2).unwrap();
        let full = Quantization::None;
        let weights = Weights::load(source, Dtype::F32, full, &kernels).unwrap();
        Self { kernels, decoder: Decoder::new(config, weights, 512) }
    }

    /// Log-probabilities of the tokens from `prompt_len` on, and gradients by name of a loss whose
    /// derivatives by them `derivatives` gives.
    pub(crate) fn pass(
        &self,
        tokens: &[u32],
        prompt_len: usize,
        derivatives: &dyn Fn(&[f32]) -> Vec<f32>,
    ) -> (Vec<f32>, BTreeMap<String, Vec<f32>>) {
        let Self { kernels, decoder } = self;
        let config = &decoder.config;
        let n = tokens.len() - 1;
        let positions: Vec<u32> = (0..n as u32).collect();
        let blocks: Vec<u32> = (0..n.div_ceil(BLOCK_SIZE) as u32).collect();
        let mut kv =
            KvCache::new(Dtype::F32, 1, blocks.len(), BLOCK_SIZE, config.kv_heads, config.head_dim);
        let seqs = [AttnSeq { first_row: 0, rows: n, start: 0, blocks: &blocks }];
        let batch = Batch {
            tokens: &tokens[..n],
            positions: &positions,
            slots: &positions,
            copies: &[],
            seqs: &seqs,
        };
        let mut tape = Tape::new(config, Dtype::F32, Keep::AllLayers);
        decoder.forward(kernels, &batch, (&mut kv, KvLayers::Shared), &mut tape);
        let rows: Vec<usize> = (prompt_len - 1..n).collect();
        let mut input = HeadInput::new(Dtype::F32);
        decoder.head_input(kernels, &tape, &rows, &mut input);
        let targets = &tokens[prompt_len..];
        let mut stats = vec![TokenStats::default(); targets.len()];
        let (weights, mut scratch) = (decoder.weights.head(), HeadScratch::default());
        kernels.head_stats(&input.input, weights, targets, 1.0, &mut stats, &mut scratch);
        let log_probs: Vec<f32> = stats.iter().map(|s| s.log_prob).collect();
        let dlogp = derivatives(&log_probs);
        let head = HeadGradient {
            rows: &rows,
            input: &input,
            targets,
            inv_temperature: 1.0,
            stats: &stats,
            dlogp: &dlogp,
            dentropy: None,
        };
        let mut gradients = Gradients::new(config, Dtype::F32);
        let whole = [AttnFamily { prompt: 0..n, branches: &[] }];
        let pass = PackedPass { batch: &batch, families: &whole, kv: &mut kv };
        decoder.backward(kernels, pass, &head, &mut tape, &mut gradients);
        (log_probs, by_name(&gradients))
    }
}

fn by_name(gradients: &Gradients) -> BTreeMap<String, Vec<f32>> {
    let mut named = BTreeMap::new();
    for (spec, sum) in gradients.specs().iter().zip(gradients.sums()) {
        // A vector's ranges count elements, a matrix's count rows.
        let width = if spec.rows == 1 { 1 } else { spec.cols };
        for (name, range) in &spec.tensors {
            named.insert(name.clone(), sum[range.start * width..range.end * width].to_vec());
        }
    }
    named
}
