//! The policy at the start, kept as a second set of weights to measure the divergence from.

use engine::decoder::{Decoder, Keep};
use kernels::Kernels;

use crate::learner::{Learner, Packed};
use crate::packing::{Order, pack};

/// Weights that only run forward.
pub(crate) struct Reference {
    decoder: Decoder,
    learner: Learner,
}

impl Reference {
    pub(crate) fn new(decoder: Decoder) -> Self {
        let learner = Learner::new(&decoder, Keep::OneLayer);
        Self { decoder, learner }
    }

    /// Log-probabilities of the targets of each sequence, in passes of at most `budget` rows.
    pub(crate) fn log_probs(
        &mut self,
        kernels: &Kernels,
        sequences: &[Packed<'_>],
        (budget, inv_temperature): (usize, f32),
    ) -> Vec<Vec<f32>> {
        let mut out = Vec::with_capacity(sequences.len());
        for members in pack(sequences, budget, Order::Given) {
            let part = &sequences[members[0]..members[members.len() - 1] + 1];
            let stats = self.learner.forward(&self.decoder, kernels, part, inv_temperature);
            let mut rest = stats.iter().map(|s| s.log_prob);
            out.extend(part.iter().map(|s| rest.by_ref().take(s.targets()).collect::<Vec<_>>()));
        }
        out
    }
}
