//! One policy step by candle's autograd, blind to the algorithm.
//!
//! The loss is a function from the log-probabilities of all response tokens to its value and its
//! derivatives `d = dL/dlogp`. The weights' gradient is that of the surrogate `sum(d logp)` with `d` held
//! fixed, taken one episode at a time, so that only one episode's graph is in memory; the price is a
//! second forward pass. Then clipping by global norm and AdamW on the f32 variables. Leaves out losses,
//! advantages, schedules of the learning rate, and losses that depend on entropies.

use candle_core::Tensor;
use engine::{Error, Result};

use crate::adamw::{AdamW, Moments};
use crate::error::internal;
use crate::generate::CandleEngine;
use crate::model::{CandleModel, Gradients, Record};

/// From the log-probabilities of all response tokens, episode after episode, to the loss and its
/// derivative by each of them.
pub type LossFn<'a> = dyn Fn(&[f32]) -> (f64, Vec<f32>) + 'a;

/// One sequence to learn from: its tokens, of which those from `prompt_len` on are the response.
#[derive(Clone, Copy, Debug)]
pub struct Episode<'a> {
    /// Prompt, then response.
    pub tokens: &'a [u32],
    /// Tokens that are given; at least 1, and fewer than there are.
    pub prompt_len: usize,
}

/// Settings of one step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepSettings {
    /// Temperature that log-probabilities are taken at: the one the responses were sampled at.
    pub temperature: f32,
    /// Gradients whose global norm is larger are scaled down to it; infinity for no limit.
    pub max_grad_norm: f64,
    /// The optimizer's settings.
    pub adamw: AdamW,
}

/// What the model says about the response of one episode.
#[derive(Clone, Debug, PartialEq)]
pub struct ResponseScore {
    /// Log-probabilities in nats of its tokens.
    pub log_probs: Vec<f32>,
    /// Entropies in nats of the distributions they were drawn from.
    pub entropies: Vec<f32>,
}

/// What a step did.
#[derive(Clone, Debug, PartialEq)]
pub struct StepReport {
    /// The loss before the step.
    pub loss: f64,
    /// Global norm of its gradient, before clipping.
    pub grad_norm: f64,
    /// Log-probabilities of all response tokens before the step, episode after episode.
    pub log_probs: Vec<f32>,
}

impl CandleEngine {
    /// Scores the responses of `episodes` at `temperature`. Until the weights change,
    /// [`CandleEngine::rl_step`] computes the same log-probabilities to the bit.
    ///
    /// # Errors
    /// `ErrorKind::Request` for an episode or a temperature out of range; `ErrorKind::Numeric` when the model gives no
    /// finite numbers.
    pub fn score_responses(
        &self,
        episodes: &[Episode<'_>],
        temperature: f32,
    ) -> Result<Vec<ResponseScore>> {
        let score = |episode: &Episode<'_>| {
            let pass = (episode.tokens, episode.prompt_len);
            let (log_probs, entropies) = self.model.response_stats(pass, temperature)?;
            if log_probs.iter().chain(&entropies).all(|x| x.is_finite()) {
                return Ok(ResponseScore { log_probs, entropies });
            }
            Err(Error::numeric("the model's log-probabilities are not finite numbers"))
        };
        episodes.iter().map(score).collect()
    }

    /// One optimizer step on `episodes`.
    ///
    /// Changes the weights, the moments and the weights version, and empties the prefix cache.
    ///
    /// # Errors
    /// `ErrorKind::Request` for no episodes, or one or a temperature out of range; `ErrorKind::Numeric` when the loss
    /// or its gradient is not finite. The weights are as before then.
    ///
    /// # Panics
    /// When `loss` does not return one derivative per log-probability.
    pub fn rl_step(
        &mut self,
        episodes: &[Episode<'_>],
        settings: &StepSettings,
        loss: &LossFn<'_>,
    ) -> Result<StepReport> {
        self.scheduler.begin_update().map_err(|e| Error::busy(e.to_string()))?;
        let report = step(&self.model, &mut self.moments, (episodes, settings), loss);
        self.scheduler.end_update();
        report
    }
}

fn step(
    model: &CandleModel,
    moments: &mut Option<Moments>,
    (episodes, settings): (&[Episode<'_>], &StepSettings),
    loss: &LossFn<'_>,
) -> Result<StepReport> {
    if episodes.is_empty() {
        return Err(Error::request("step has 0 episodes, limit is at least 1"));
    }
    let mut log_probs = Vec::new();
    for episode in episodes {
        let pass = (episode.tokens, episode.prompt_len);
        let values = model.response_log_probs(pass, settings.temperature, Record::No)?;
        log_probs.extend(values.to_vec1::<f32>().map_err(internal)?);
    }
    let (loss, derivatives) = loss(&log_probs);
    assert_eq!(derivatives.len(), log_probs.len(), "derivatives against log-probabilities");
    let gradients = gradients(model, (episodes, settings.temperature), &derivatives)?;
    let grad_norm = gradients.norm()?;
    if !loss.is_finite() || !grad_norm.is_finite() {
        let message =
            format!("loss is {loss}, its gradient's norm {grad_norm}, both must be finite");
        return Err(Error::numeric(message));
    }
    let moments = match moments {
        Some(moments) => moments,
        None => moments.insert(Moments::new(model.vars()).map_err(internal)?),
    };
    let scale = (settings.max_grad_norm / (grad_norm + 1e-6)).min(1.0);
    moments.apply(model.vars(), (&gradients, scale), &settings.adamw).map_err(internal)?;
    Ok(StepReport { loss, grad_norm, log_probs })
}

/// The gradient of a loss whose derivatives by all response tokens' log-probabilities are `derivatives`.
fn gradients(
    model: &CandleModel,
    (episodes, temperature): (&[Episode<'_>], f32),
    mut derivatives: &[f32],
) -> Result<Gradients> {
    let mut gradients = model.zero_gradients()?;
    for episode in episodes {
        let (now, later) = derivatives.split_at(episode.tokens.len() - episode.prompt_len);
        derivatives = later;
        if now.iter().all(|d| *d == 0.0) {
            continue;
        }
        let pass = (episode.tokens, episode.prompt_len);
        let log_probs = model.response_log_probs(pass, temperature, Record::Yes)?;
        let surrogate = Tensor::new(now, model.device()).and_then(|d| (log_probs * d)?.sum_all());
        let mut store = surrogate.and_then(|sum| sum.backward()).map_err(internal)?;
        gradients.add(model.vars(), &mut store)?;
    }
    Ok(gradients)
}
