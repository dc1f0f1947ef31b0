//! The policy at the start, kept as a second set of weights to measure the divergence from.

use engine::decoder::{Decoder, Keep};
use kernels::Kernels;

use crate::learner::{Learner, Packed};

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
        let how = (budget, inv_temperature);
        let stats = self.learner.forward_all((&self.decoder, kernels), sequences, how);
        let mut rest = stats.iter().map(|s| s.log_prob);
        sequences.iter().map(|s| rest.by_ref().take(s.targets()).collect()).collect()
    }
}
