//! An update by hand, so that its parts can be timed: forward, loss, backward, clip, AdamW.

use std::time::Instant;

use engine::Engine;
use engine::decoder::{Gradients, Keep};
use kernels::{AdamW, TokenStats};
use serde_json::{Value, json};
use trainer::config::RlConfig;
use trainer::loss::{ChoiceKey, TokenBatch};
use trainer::packing::pack;
use trainer::rollout::Episode;
use trainer::{Learner, LossGradient, Optimizer, Packed, clip_scale, global_norm};

use crate::bench::dataset::Shape;
use crate::bench::numbers::Values;
use crate::exit::{Failure, Result};
use crate::output;

/// What an update changes besides the weights.
pub(super) struct Learning {
    optimizer: Optimizer,
    learner: Learner,
    grads: Gradients,
    config: RlConfig,
    /// Rows of a pass.
    budget: usize,
}

impl Learning {
    pub(super) fn new(engine: &mut Engine, keep: Keep, budget: usize) -> Result<Self> {
        let mut update = engine.begin_update()?;
        let (decoder, _) = update.decoder();
        Ok(Self {
            optimizer: Optimizer::new(decoder),
            learner: Learner::new(decoder, keep),
            grads: Gradients::new(&decoder.config, decoder.weights.dtype()),
            config: RlConfig::resolve(Some("grpo"), None, &[])?,
            budget,
        })
    }

    /// One update; seconds of forward, backward and optimizer.
    pub(super) fn learn(
        &mut self,
        engine: &mut Engine,
        prompts: &[Vec<u32>],
        episodes: &[Episode],
    ) -> Result<[f64; 3]> {
        let sequences: Vec<Vec<u32>> =
            episodes.iter().map(|e| [&prompts[e.prompt][..], &e.tokens].concat()).collect();
        let packed = pack_all(&sequences, prompts[0].len());
        let tokens = packed.iter().map(Packed::targets).sum();
        let (mut forward, mut backward) = (0.0, 0.0);
        let mut update = engine.begin_update()?;
        let (decoder, kernels) = update.decoder();
        self.grads.clear();
        for members in pack(&packed, self.budget) {
            let clock = Instant::now();
            let packed = &packed[members.clone()];
            let stats = self.learner.forward(decoder, kernels, packed, 1.0);
            forward += clock.elapsed().as_secs_f64();
            let dlogp = derivatives(&self.config, &episodes[members], &stats, tokens)?;
            let gradient =
                LossGradient { stats: &stats, inv_temperature: 1.0, dlogp: &dlogp, dentropy: None };
            let clock = Instant::now();
            self.learner.backward(decoder, kernels, &gradient, &mut self.grads);
            backward += clock.elapsed().as_secs_f64();
        }
        let clock = Instant::now();
        let settings = AdamW {
            lr: 1e-6,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.0,
            step: 0,
            grad_scale: clip_scale(global_norm(kernels, &self.grads), 1.0),
        };
        self.optimizer.apply(decoder, kernels, &self.grads, &settings);
        Ok([forward, backward, clock.elapsed().as_secs_f64()])
    }

    /// Seconds of forward and backward, for some loss.
    fn pass(&mut self, engine: &Engine, packed: &[Packed<'_>]) -> f64 {
        let (decoder, kernels) = (engine.decoder(), engine.kernels());
        let clock = Instant::now();
        for members in pack(packed, self.budget) {
            let packed = &packed[members];
            let stats = self.learner.forward(decoder, kernels, packed, 1.0);
            let dlogp = vec![1e-3; stats.len()];
            let gradient =
                LossGradient { stats: &stats, inv_temperature: 1.0, dlogp: &dlogp, dentropy: None };
            self.learner.backward(decoder, kernels, &gradient, &mut self.grads);
        }
        clock.elapsed().as_secs_f64()
    }

    /// Forward and backward over the samples of some prompts, in an order in which those of a prompt are
    /// neighbours and pass with it once, and in one in which nothing is shared; medians.
    pub(super) fn compare(
        &mut self,
        engine: &Engine,
        shape: &Shape,
        (group, repeats): (usize, usize),
    ) -> Result<Value> {
        let tails = Shape { count: shape.count * group, input: shape.output, ..*shape };
        let (heads, tails) = (shape.prompts(u64::MAX), tails.prompts(u64::MAX - 1));
        let sequence =
            |p: usize, i: usize| [heads[p].tokens(), tails[p * group + i].tokens()].concat();
        let samples = |p: usize| (0..group).map(move |i| (p, i));
        let together = (0..shape.count).flat_map(samples).map(|(p, i)| sequence(p, i));
        let together: Vec<Vec<u32>> = together.collect();
        let apart = (0..group).flat_map(|i| (0..shape.count).map(move |p| (p, i)));
        let apart: Vec<Vec<u32>> = apart.map(|(p, i)| sequence(p, i)).collect();
        let mut seconds = [Vec::new(), Vec::new()];
        for _ in 0..repeats {
            for (seconds, sequences) in seconds.iter_mut().zip([&together, &apart]) {
                seconds.push(self.pass(engine, &pack_all(sequences, shape.input)));
            }
        }
        let [shared, unshared] = seconds.map(Values::new);
        output::print(&format!(
            "forward and backward: {:.3} s, {:.3} s with nothing shared",
            shared.median(),
            unshared.median()
        ))?;
        Ok(json!({"shared": shared.to_json(), "unshared": unshared.to_json()}))
    }
}

fn pack_all(sequences: &[Vec<u32>], prompt_len: usize) -> Vec<Packed<'_>> {
    sequences.iter().map(|tokens| Packed { tokens, prompt_len }).collect()
}

/// Derivatives of the GRPO loss by the log-probabilities of a pass, as a mean over `tokens` tokens; every
/// other response counts as right.
fn derivatives(
    config: &RlConfig,
    episodes: &[Episode],
    stats: &[TokenStats],
    tokens: usize,
) -> Result<Vec<f32>> {
    let new: Vec<f32> = stats.iter().map(|s| s.log_prob).collect();
    let old: Vec<f32> = episodes.iter().flat_map(|e| e.logprobs.iter().copied()).collect();
    if new != old {
        return Err(Failure::numeric(
            "log-probabilities of training differ from those of sampling",
        ));
    }
    let advantage =
        |e: &Episode| vec![if e.sample.is_multiple_of(2) { 1.0 } else { -1.0 }; e.tokens.len()];
    let advantages: Vec<f32> = episodes.iter().flat_map(advantage).collect();
    let scope = 0..new.len();
    let batch = TokenBatch {
        log_prob: &new,
        old_log_prob: &old,
        advantage: &advantages,
        mask: &vec![true; new.len()],
        weight: &vec![1.0 / tokens as f64; new.len()],
        scopes: std::slice::from_ref(&scope),
        responses: &[],
    };
    let key = ChoiceKey { seed: 0, step: 0, update: 0 };
    let loss = config.algorithm.policy_loss().evaluate(&batch, key)?;
    Ok(loss.dlogp.iter().map(|d| *d as f32).collect())
}
