//! Group-relative policy optimisation on the engine's own rollouts, with Clip-Cov and KL-Cov (arXiv
//! 2505.22617; GRPO: 2402.03300).
//!
//! Leaves out a critic and asynchronous rollouts: sampling and learning alternate on one copy of the
//! weights. Rollouts are stale only where dynamic sampling kept a group from the step before; its
//! log-probabilities are those of the weights that sampled it.

use std::ops::Range;
use std::path::Path;
use std::time::Instant;

use engine::decoder::Decoder;
use engine::{Engine, EngineConfig, Guests, Host};

use crate::advantage::{Advantages, Estimated, Outcomes};
use crate::algorithm::{self, Algorithm};
use crate::batch::{Group, Part, Response, Rollouts, Truncated};
use crate::config::{KlControl, RlConfig, kept_for_backward};
use crate::data::{Cursor, Row, Sampler};
use crate::dynamics::Dynamics;
use crate::encode::PromptEncoder;
use crate::error::{Error, Result};
use crate::kl::adapted_coefficient;
use crate::learner::Packed;
use crate::loss::ChoiceKey;
use crate::memory::{Demand, planned_tokens_beside};
use crate::metrics::{Metrics, name};
use crate::parts::Parts;
use crate::reference::Reference;
use crate::samples::Sample;
use crate::save::{ModelFiles, save_model};
use crate::source::{Rows, train_rows};
use crate::update::{UpdateReport, UpdateState, WeightsAge};
use crate::verifier::Judge;

/// An engine that learns.
///
/// ```
/// use engine::model::{hub::Builtin, open_builtin};
/// use engine::{Engine, EngineConfig};
/// use trainer::{Parts, RlConfig, Trainer};
///
/// let engine = Engine::load(&open_builtin(Builtin::Arith)?, &EngineConfig::default())?;
/// let set = [("data.train_batch_size".to_owned(), "4".to_owned())];
/// let config = RlConfig::resolve(Some("kl_cov"), None, &set)?;
/// let parts = Parts::new()
///     .reward(|row, response| f64::from(u8::from(response == row.ground_truth)));
/// let mut trainer = Trainer::with_parts(engine, config, parts)?;
/// let (metrics, samples) = trainer.step()?;
/// assert_eq!(samples.len(), 4 * 8);
/// assert_eq!(metrics.get("mismatch/tokens_ne"), Some(0.0));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Trainer {
    pub(crate) engine: Engine,
    /// Others whom the engine serves between and beside the rollouts.
    pub(crate) guests: Option<Guests>,
    pub(crate) config: RlConfig,
    pub(crate) state: UpdateState,
    pub(crate) rows: Rows,
    pub(crate) sampler: Sampler,
    /// Training steps done.
    pub(crate) steps: u64,
    /// Whether the weights are those after `steps` steps; false once a step has failed between its updates.
    pub(crate) whole: bool,
    /// Groups sampled for an earlier step that had enough.
    pub(crate) surplus: Vec<Group>,
    /// Coefficient of the divergence in the reward.
    pub(crate) kl_coef: f64,
    pub(crate) encoder: PromptEncoder,
    pub(crate) rewards: Judge,
    /// Why rewards failed that could not be had: the first rollout of the latest step or validation with any.
    pub(crate) failure: Option<String>,
    /// The configured method, or the caller's own.
    algorithm: Box<dyn Algorithm>,
    reference: Option<Reference>,
    pub(crate) dynamics: Dynamics,
}

impl Trainer {
    /// A trainer of `engine` on `rows`, at its first step; the rest is as configured.
    ///
    /// # Errors
    /// As [`Trainer::with_parts`].
    pub fn new(engine: Engine, config: RlConfig, rows: Rows) -> Result<Self> {
        Self::with_parts(engine, config, Parts::new().rows(rows))
    }

    /// A trainer of `engine` made of `parts`, at its first step; what they leave out is as configured. A
    /// budget of tokens that the configuration leaves open is planned from the memory that is free.
    ///
    /// # Errors
    /// When there is no row, a prompt does not fit, rows have no known reward, or the engine is busy.
    pub fn with_parts(mut engine: Engine, mut config: RlConfig, parts: Parts) -> Result<Self> {
        let Parts { rows, reward, algorithm, .. } = parts;
        let mut rows = rows.map_or_else(|| train_rows(&config.data), Ok)?;
        let max_prompt = config.data.max_prompt_length;
        let text = (engine.tokenizer(), engine.chat_template());
        let encoder = PromptEncoder::new(text, config.data.prompt_template, max_prompt)?;
        let rewards = match reward {
            Some(own) => Judge::own(&config.reward, own)?,
            None => Judge::new(&config.reward)?,
        };
        rows.rows.iter().try_for_each(|row| rewards.check(row))?;
        let (longest, room) = (config.data.max_response_length, engine.max_model_len());
        if longest + 1 > room {
            return Err(Error::config(format!(
                "data.max_response_length is {longest}, the context of {room} tokens is too short for it"
            )));
        }
        let encoder = encoder.within(room - longest);
        encoder.fit(&mut rows, config.data.overlong())?;
        let sampler = rows.sampler(&config.data, Cursor::default())?;
        if config.trainer.max_tokens_per_microbatch == 0 {
            let demand = Demand::rl(&config, &EngineConfig::default());
            config.trainer.max_tokens_per_microbatch = planned_tokens_beside(&engine, &demand);
        }
        let mut update = engine.begin_update().map_err(Error::engine)?;
        let state =
            UpdateState::new(update.decoder().0, kept_for_backward(config.trainer.recompute));
        drop(update);
        Ok(Self {
            kl_coef: config.algorithm.kl_ctrl.kl_coef,
            algorithm: algorithm.unwrap_or_else(|| Box::new(config.algorithm.clone())),
            engine,
            guests: None,
            config,
            state,
            rows,
            sampler,
            steps: 0,
            whole: true,
            surplus: Vec::new(),
            dynamics: Dynamics::default(),
            rewards,
            failure: None,
            reference: None,
            encoder,
        })
    }

    /// Keeps `decoder`, a model of the same vocabulary, as the reference policy.
    ///
    /// # Errors
    /// When its vocabulary has another size.
    pub fn set_reference(&mut self, decoder: Decoder) -> Result<()> {
        let (own, other) = (self.engine.model().vocab_size, decoder.config.vocab_size);
        if own != other {
            return Err(Error::config(format!(
                "the reference policy has a vocabulary of {other}, the policy one of {own}"
            )));
        }
        self.reference = Some(Reference::new(decoder));
        Ok(())
    }

    /// One step: sample, judge, compare within groups, and learn in mini-batches.
    ///
    /// # Errors
    /// When a prompt is too long, a reward is not finite, a program or a server gives no reward at all, no group
    /// carries signal, a reference policy is missing, or numbers are not finite; the weights are then those
    /// of the last finished update. Where that is the last one of the step before, all else is as it was
    /// then too.
    pub fn step(&mut self) -> Result<(Metrics, Vec<Sample>)> {
        let start = Instant::now();
        let mut metrics = Metrics::new();
        self.failure = None;
        let (rollouts, advantages) = self.prepare_or_go_back(&mut metrics)?;
        let step = self.steps + 1;
        let lr = self.config.optimizer.schedule(self.config.trainer.total_steps).rate(step);
        let parts = self.parts(&rollouts);
        let learning = Instant::now();
        let mut reports = Vec::with_capacity(parts.len());
        self.whole = false;
        let host = Host::new(&mut self.engine, self.guests.as_mut());
        let mut update = host.begin_update().map_err(Error::engine)?;
        for (index, part) in parts.iter().enumerate() {
            let mini = rollouts.mini_batch(part, &advantages);
            let key = ChoiceKey { seed: self.config.trainer.seed, step, update: index as u64 };
            let how = (&self.config, &*self.algorithm);
            reports.push(self.state.run(update.decoder(), how, &mini, (key, lr))?);
        }
        drop(update);
        (self.steps, self.whole) = (step, true);

        metrics.set(name::TIME_UPDATE_ACTOR, learning.elapsed().as_secs_f64());
        self.dynamics.record_entropies(&mut metrics, rollouts.episodes());
        self.probe(&rollouts, &mut metrics);
        self.record(&mut metrics, (&rollouts, &advantages), (&reports, lr), start);
        let samples = self.samples(rollouts, &advantages.responses);
        Ok((metrics, samples))
    }

    /// What a step does before its updates. If it fails, the rows it took, the groups it found and the
    /// coefficient of the divergence are as before.
    fn prepare_or_go_back(&mut self, metrics: &mut Metrics) -> Result<(Rollouts, Estimated)> {
        let (cursor, surplus, kl_coef) =
            (self.sampler.cursor(), self.surplus.clone(), self.kl_coef);
        let prepared = self.prepare(metrics);
        if prepared.is_err() {
            self.sampler = self.rows.sampler(&self.config.data, cursor)?;
            (self.surplus, self.kl_coef) = (surplus, kl_coef);
        }
        prepared
    }

    /// Samples, judges and compares within groups.
    fn prepare(&mut self, metrics: &mut Metrics) -> Result<(Rollouts, Estimated)> {
        let mut rollouts = self.sample(metrics)?;
        self.score_by_reference(&mut rollouts, metrics)?;
        let comparing = Instant::now();
        let advantages = self.advantages(&rollouts, metrics)?;
        metrics.set(name::TIME_ADV, comparing.elapsed().as_secs_f64());
        Ok((rollouts, advantages))
    }

    /// How the entropy of the step's own tokens has changed by its updates, where that is asked for.
    fn probe(&mut self, rollouts: &Rollouts, metrics: &mut Metrics) {
        if !self.config.trainer.probe_entropy {
            return;
        }
        let inv_temperature = (1.0 / self.config.rollout.temperature) as f32;
        let how = (self.config.trainer.max_tokens_per_microbatch, inv_temperature);
        let sequences: Vec<Packed<'_>> =
            (0..rollouts.responses.len()).map(|i| rollouts.packed(i)).collect();
        let model = (self.engine.decoder(), self.engine.kernels());
        let stats = self.state.learner.forward_all(model, &sequences, how);
        let before = rollouts.episodes().flat_map(|e| &e.entropies).map(|h| f64::from(*h));
        let after = stats.iter().map(|s| f64::from(s.entropy));
        let change = after.sum::<f64>() - before.sum::<f64>();
        if !stats.is_empty() {
            metrics.set(name::ENTROPY_PROBE_DELTA, change / stats.len() as f64);
        }
    }

    /// Log-probabilities of all responses under the reference policy, if it is asked for.
    fn score_by_reference(&mut self, rollouts: &mut Rollouts, metrics: &mut Metrics) -> Result<()> {
        if !self.config.algorithm.needs_reference() {
            return Ok(());
        }
        let Some(reference) = &mut self.reference else {
            return Err(Error::config("a divergence is asked for, and no reference policy is set"));
        };
        let begin = Instant::now();
        let budget = self.config.trainer.max_tokens_per_microbatch;
        let inv_temperature = (1.0 / self.config.rollout.temperature) as f32;
        let sequences: Vec<Packed<'_>> =
            (0..rollouts.responses.len()).map(|i| rollouts.packed(i)).collect();
        let kernels = self.engine.kernels();
        let log_probs = reference.log_probs(kernels, &sequences, (budget, inv_temperature));
        rollouts.reference = log_probs;
        metrics.set(name::TIME_REF, begin.elapsed().as_secs_f64());
        Ok(())
    }

    /// Advantages of the shaped rewards, less the divergence where it is part of them.
    fn advantages(&mut self, rollouts: &Rollouts, metrics: &mut Metrics) -> Result<Estimated> {
        let rewards: Vec<f64> = rollouts.responses.iter().map(|r| r.reward).collect();
        let groups: Vec<usize> = rollouts.responses.iter().map(|r| r.episode.prompt).collect();
        let token_rewards = match self.config.algorithm.use_kl_in_reward {
            true => self.charge_divergence(rollouts, metrics),
            false => Vec::new(),
        };
        let outcomes = Outcomes {
            scores: &rewards,
            groups: &groups,
            lengths: &rollouts.lengths(),
            baselines: &rollouts.baselines,
            token_rewards: &token_rewards,
        };
        metrics.summarize(name::REWARDS, outcomes.totals()?);
        algorithm::advantages(&*self.algorithm, &outcomes)
    }

    /// What the divergence takes from the reward of each token; the coefficient then follows it.
    fn charge_divergence(&mut self, rollouts: &Rollouts, metrics: &mut Metrics) -> Vec<f64> {
        let algorithm = &self.config.algorithm;
        let divergence = |(old, reference): (&f32, &f32)| {
            algorithm.kl_penalty.evaluate(f64::from(*old), f64::from(*reference)).0
        };
        let pairs = rollouts.responses.iter().zip(&rollouts.reference);
        let rows: Vec<Vec<f64>> = pairs
            .map(|(r, reference)| r.old.iter().zip(reference).map(divergence).collect())
            .collect();
        let mean = |row: &Vec<f64>| row.iter().sum::<f64>() / row.len().max(1) as f64;
        let responses = rows.len().max(1) as f64;
        let current = rows.iter().map(mean).sum::<f64>() / responses;
        let (beta, control) = (self.kl_coef, &algorithm.kl_ctrl);
        metrics.set(name::REWARD_KL, current);
        metrics.set(name::REWARD_KL_COEF, beta);
        if control.r#type == KlControl::Adaptive {
            let span = (responses, control.horizon);
            self.kl_coef = adapted_coefficient(beta, current, control.target_kl, span);
        }
        rows.concat().into_iter().map(|kl| -beta * kl).collect()
    }

    pub(crate) fn encode<'a>(&self, rows: impl Iterator<Item = &'a Row>) -> Result<Vec<Vec<u32>>> {
        rows.map(|row| self.encoder.encode(&row.prompt)).collect()
    }

    /// What each update of the step learns from: whole groups, `mini_batch_size` prompts each, as often as
    /// `ppo_epochs` says.
    fn parts(&self, rollouts: &Rollouts) -> Vec<Part> {
        let truncated = self.truncated();
        let version = self.engine.version().0;
        let part = |(index, range): (usize, Range<usize>)| {
            let same = index == 0 && rollouts.is_fresh(&range, version);
            let age = if same { WeightsAge::Same } else { WeightsAge::Newer };
            Part { range, age, truncated }
        };
        self.config.mini_batches(rollouts.prompts.len()).enumerate().map(part).collect()
    }

    /// What becomes of responses that were cut off.
    fn truncated(&self) -> Truncated {
        match self.config.algorithm.mask_truncated {
            true => Truncated::Masked,
            false => Truncated::Kept,
        }
    }

    /// The engine, to generate or score with between steps.
    pub fn engine(&mut self) -> &mut Engine {
        &mut self.engine
    }

    /// Writes the model, as it is now, into the folder `dir`: the files that `transformers` reads.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn save_model(&self, dir: &Path) -> Result<()> {
        let optimizer = &self.state.optimizer;
        save_model(&ModelFiles::new(&self.engine)?, dir, optimizer.specs(), optimizer.masters())
    }

    /// Training steps done.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    fn record(
        &self,
        metrics: &mut Metrics,
        (rollouts, advantages): (&Rollouts, &Estimated),
        (reports, lr): (&[UpdateReport], f64),
        start: Instant,
    ) {
        metrics.set(name::GLOBAL_STEP, self.steps as f64);
        metrics.set(name::EPOCH, self.sampler.cursor().epoch as f64);
        metrics.set(name::LR, lr);
        rollouts.record(metrics, advantages, self.truncated());
        rollouts.record_covariances(metrics, &advantages.tokens, lr);
        record_updates(metrics, reports);
        let masked = match self.config.algorithm.mask_truncated {
            true => rollouts.responses.iter().filter(|r| r.is_truncated()).count(),
            false => 0,
        };
        metrics.set(name::MASKED_RESPONSES, masked as f64);
        let tokens: usize = rollouts.sequences.iter().map(Vec::len).sum();
        let seconds = start.elapsed().as_secs_f64();
        metrics.set(name::TOTAL_TOKENS, tokens as f64);
        metrics.set(name::TIME_STEP, seconds);
        metrics.set(name::TIME_PER_STEP, seconds);
        metrics.set(name::THROUGHPUT, tokens as f64 / seconds);
    }

    fn samples(&self, rollouts: Rollouts, advantages: &Advantages) -> Vec<Sample> {
        let Rollouts { rows, prompts, responses, .. } = rollouts;
        let one = |(response, advantage): (Response, &f64)| {
            let Response { episode: e, verdict, reward, .. } = response;
            let row = &self.rows.rows[rows[e.prompt]];
            Sample {
                step: self.steps,
                prompt_index: e.prompt,
                sample_index: e.sample,
                data_source: row.data_source.clone(),
                prompt: row.prompt.clone(),
                prompt_token_ids: prompts[e.prompt].clone(),
                token_ids: e.tokens,
                text: e.text,
                text_ends: e.text_ends,
                log_probs: e.logprobs,
                entropies: e.entropies,
                finish_reason: e.finish.name().to_owned(),
                ground_truth: row.ground_truth.clone(),
                predicted: verdict.predicted,
                correct: verdict.correct,
                reward,
                advantage: *advantage,
                weights_version: e.version,
            }
        };
        responses.into_iter().zip(&advantages.values).map(one).collect()
    }
}

/// Means over the updates of a step; counts are summed.
fn record_updates(metrics: &mut Metrics, reports: &[UpdateReport]) {
    let n = reports.len().max(1) as f64;
    let mean = |of: &dyn Fn(&UpdateReport) -> f64| reports.iter().map(of).sum::<f64>() / n;
    let sum = |of: &dyn Fn(&UpdateReport) -> usize| reports.iter().map(of).sum::<usize>() as f64;
    metrics.set(name::PG_LOSS, mean(&|r| r.objective.loss.loss));
    metrics.set(name::PG_CLIPFRAC, mean(&|r| r.objective.loss.stats.pg_clipfrac));
    metrics.set(name::PG_CLIPFRAC_LOWER, mean(&|r| r.objective.loss.stats.pg_clipfrac_lower));
    metrics.set(name::PPO_KL, mean(&|r| r.objective.loss.stats.ppo_kl));
    metrics.set(name::PPO_KL_ABS, mean(&|r| r.objective.loss.stats.ppo_kl_abs));
    metrics.set(name::GRAD_NORM, mean(&|r| r.grad_norm));
    metrics.set(name::UPDATES, sum(&|r| usize::from(r.applied)));
    metrics.set(name::UPDATES_SKIPPED, sum(&|r| usize::from(!r.applied)));
    metrics.set(name::VALID_TOKENS, sum(&|r| r.objective.loss.stats.tokens));
    metrics.set(name::TOUCHED_TOKENS, sum(&|r| r.objective.loss.stats.touched_tokens));
    metrics.set(name::COV_SELECTED_TOKENS, sum(&|r| r.objective.loss.selected.len()));
    metrics.set(name::MISMATCH_MAX, reports.iter().map(|r| r.mismatch_max).fold(0.0, f64::max));
    metrics.set(name::MISMATCH_TOKENS, sum(&|r| r.mismatch_tokens));
    if reports.iter().any(|r| r.objective.kl.is_some()) {
        metrics.set(name::KL_LOSS, mean(&|r| r.objective.kl.unwrap_or(0.0)));
    }
    // The ratios are those of the rollout; the first update's stand for all.
    if let Some(correction) = reports.first().and_then(|r| r.objective.correction) {
        correction.record(metrics);
        let truncated =
            sum(&|r| r.objective.correction.map_or(0, |correction| correction.truncated_tokens));
        metrics.set("rollout_corr/truncated_tokens", truncated);
    }
}
