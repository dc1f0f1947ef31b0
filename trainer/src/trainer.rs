//! Group-relative policy optimisation on the engine's own rollouts, with Clip-Cov and KL-Cov (arXiv
//! 2505.22617; GRPO: 2402.03300).
//!
//! Leaves out a reference policy, a critic, and asynchronous rollouts: sampling and learning alternate
//! on one copy of the weights, so rollouts are never stale.

use std::ops::Range;
use std::time::Instant;

use engine::{Engine, EosRule, FinishReason};

use crate::advantage::{self, Advantages, EPSILON, Scale};
use crate::config::RlConfig;
use crate::covariance::{CovStats, token_covariances};
use crate::data::{Cursor, Row, Sampler, Visit};
use crate::encode::PromptEncoder;
use crate::error::{Error, ErrorKind, Result};
use crate::learner::Packed;
use crate::loss::ChoiceKey;
use crate::metrics::{Metrics, name};
use crate::rollout::{self, Episode, RolloutSettings};
use crate::samples::Sample;
use crate::source::Rows;
use crate::update::{MiniBatch, UpdateReport, UpdateState, WeightsAge};
use crate::verifier::{Judge, Verdict};

/// Mean reward and accuracy on held-out rows.
#[derive(Clone, Debug, PartialEq)]
pub struct Validation {
    /// Mean of the rewards.
    pub reward: f64,
    /// Share of right answers.
    pub accuracy: f64,
    /// Rows judged.
    pub rows: usize,
}

/// An engine that learns.
pub struct Trainer {
    pub(crate) engine: Engine,
    pub(crate) config: RlConfig,
    pub(crate) state: UpdateState,
    pub(crate) rows: Rows,
    pub(crate) sampler: Sampler,
    /// Training steps done.
    pub(crate) steps: u64,
    encoder: PromptEncoder,
    rewards: Judge,
}

/// What a step sampled, with its judgement; one entry per response, groups together.
struct Rollouts {
    rows: Vec<usize>,
    prompts: Vec<Vec<u32>>,
    episodes: Vec<Episode>,
    verdicts: Vec<Verdict>,
    /// Prompt and response of each episode.
    sequences: Vec<Vec<u32>>,
}

impl Trainer {
    /// A trainer of `engine` on `rows`, at its first step.
    ///
    /// # Errors
    /// When a prompt does not fit, rows have no known reward, or the engine is busy.
    pub fn new(mut engine: Engine, config: RlConfig, rows: Rows) -> Result<Self> {
        let max_prompt = config.data.max_prompt_length;
        let text = (engine.tokenizer(), engine.chat_template());
        let encoder = PromptEncoder::new(text, config.data.prompt_template, max_prompt)?;
        let rewards = Judge::new(&config.reward)?;
        rows.rows.iter().try_for_each(|row| rewards.check(row))?;
        let (longest, room) = (config.data.max_response_length, engine.max_model_len());
        if longest + 1 > room {
            return Err(Error::config(format!(
                "data.max_response_length is {longest}, the context of {room} tokens is too short for it"
            )));
        }
        let visit = match config.data.shuffle {
            true => Visit::Shuffled(config.data.seed),
            false => Visit::InOrder,
        };
        let sampler = Sampler::new(rows.rows.len(), visit, Cursor::default());
        let mut update = engine.begin_update().map_err(Error::engine)?;
        let state = UpdateState::new(update.decoder().0);
        drop(update);
        let trainer = Self { engine, config, state, rows, sampler, steps: 0, encoder, rewards };
        trainer.check_prompts(&trainer.rows.rows, &trainer.config.data.train_files)?;
        Ok(trainer)
    }

    /// Checks that every prompt of `rows`, which come from `files`, fits.
    ///
    /// # Errors
    /// `ErrorKind::Data`, naming the row, its tokens and the limit.
    pub(crate) fn check_prompts(&self, rows: &[Row], files: &[String]) -> Result<()> {
        let check = |(index, row): (usize, &Row)| match self.encode(std::iter::once(row)) {
            Ok(_) => Ok(()),
            Err(error) => Err(match error.kind() {
                ErrorKind::Config(message) => {
                    Error::data(files.join(", "), None, format!("row {}: {message}", index + 1))
                }
                _ => error,
            }),
        };
        rows.iter().enumerate().try_for_each(check)
    }

    /// One step: sample, judge, compare within groups, and learn in mini-batches.
    ///
    /// # Errors
    /// When a prompt is too long, a reward is not finite, or numbers are not; the weights are then
    /// those of the last finished update.
    pub fn step(&mut self) -> Result<(Metrics, Vec<Sample>)> {
        let start = Instant::now();
        let mut metrics = Metrics::new();
        let rollouts = self.sample(&mut metrics)?;
        let scores: Vec<f64> = rollouts.verdicts.iter().map(|v| v.score).collect();
        let groups: Vec<usize> = rollouts.episodes.iter().map(|e| e.prompt).collect();
        let advantages = advantage::grpo(&scores, &groups, self.scale(), EPSILON)?;
        let old = self.old_log_probs(&rollouts);

        let step = self.steps + 1;
        let lr = self.config.optimizer.schedule(self.config.trainer.total_steps).rate(step);
        let mini_batches = self.mini_batches(&rollouts);
        let learning = Instant::now();
        let mut reports = Vec::with_capacity(mini_batches.len());
        let mut update = self.engine.begin_update().map_err(Error::engine)?;
        for (index, range) in mini_batches.into_iter().enumerate() {
            let age = if index == 0 { WeightsAge::Same } else { WeightsAge::Newer };
            let mini = rollouts.mini_batch(range, &old, &advantages, age);
            let key = ChoiceKey { seed: self.config.trainer.seed, step, update: index as u64 };
            reports.push(self.state.run(update.decoder(), &self.config, &mini, (key, lr))?);
        }
        drop(update);
        self.steps = step;

        metrics.set(name::TIME_UPDATE_ACTOR, learning.elapsed().as_secs_f64());
        self.record(&mut metrics, (&rollouts, &advantages, &old), (&reports, lr), start);
        let samples = self.samples(rollouts, &advantages);
        Ok((metrics, samples))
    }

    /// Samples a group of responses to each prompt of the next batch, and judges each as it ends.
    fn sample(&mut self, metrics: &mut Metrics) -> Result<Rollouts> {
        let rows = self.sampler.next_batch(self.config.data.train_batch_size);
        let prompts = self.encode(rows.iter().map(|row| &self.rows.rows[*row]))?;
        let settings = self.settings(self.config.rollout.n);
        self.roll(rows, prompts, &settings, metrics)
    }

    fn roll(
        &mut self,
        rows: Vec<usize>,
        prompts: Vec<Vec<u32>>,
        settings: &RolloutSettings,
        metrics: &mut Metrics,
    ) -> Result<Rollouts> {
        let start = Instant::now();
        let mut session = self.rewards.session(prompts.len() * settings.samples);
        let mut judging = 0.0;
        let data = &self.rows.rows;
        let mut judge = |episode: &Episode| {
            let begin = Instant::now();
            let place = episode.prompt * settings.samples + episode.sample;
            session.submit(place, &data[rows[episode.prompt]], &episode.text);
            judging += begin.elapsed().as_secs_f64();
        };
        let episodes = rollout::generate(&mut self.engine, &prompts, settings, &mut judge)?;
        metrics.set(name::TIME_GEN, start.elapsed().as_secs_f64() - judging);
        let waiting = Instant::now();
        let verdicts = session.finish()?;
        metrics.set(name::TIME_REWARD, judging + waiting.elapsed().as_secs_f64());
        self.rewards.take_counts().record(metrics);
        let sequences =
            episodes.iter().map(|e| [&prompts[e.prompt][..], &e.tokens].concat()).collect();
        Ok(Rollouts { rows, prompts, episodes, verdicts, sequences })
    }

    fn encode<'a>(&self, rows: impl Iterator<Item = &'a Row>) -> Result<Vec<Vec<u32>>> {
        let room = self.engine.max_model_len() - self.config.data.max_response_length;
        rows.map(|row| {
            let tokens = self.encoder.encode(&row.prompt)?;
            match tokens.len() <= room {
                true => Ok(tokens),
                false => Err(Error::config(format!(
                    "prompt has {} tokens, the context leaves {room} before the response",
                    tokens.len()
                ))),
            }
        })
        .collect()
    }

    /// How this step samples; the random streams are keyed by seed and step.
    fn settings(&self, samples: usize) -> RolloutSettings {
        let rollout = &self.config.rollout;
        RolloutSettings {
            samples,
            temperature: rollout.temperature as f32,
            top_p: rollout.top_p as f32,
            top_k: usize::try_from(rollout.top_k).ok(),
            max_tokens: self.config.data.max_response_length,
            stop: rollout.stop.clone(),
            eos: EosRule::Stop,
            seed: engine::random::hash(&[self.config.trainer.seed, self.steps + 1]),
        }
    }

    fn scale(&self) -> Scale {
        match self.config.algorithm.norm_adv_by_std_in_grpo {
            true => Scale::GroupStd,
            false => Scale::None,
        }
    }

    /// Log-probabilities under the sampling weights: those returned with the samples or, where sampling
    /// was truncated, those of the whole distribution.
    fn old_log_probs(&mut self, rollouts: &Rollouts) -> Vec<Vec<f32>> {
        if self.settings(1).is_untruncated() {
            return rollouts.episodes.iter().map(|e| e.logprobs.clone()).collect();
        }
        let (decoder, kernels) = (self.engine.decoder(), self.engine.kernels());
        let inv_temperature = (1.0 / self.config.rollout.temperature) as f32;
        let mut one = |i: usize| {
            let packed = [rollouts.packed(i)];
            let stats = self.state.learner.forward(decoder, kernels, &packed, inv_temperature);
            stats.iter().map(|s| s.log_prob).collect()
        };
        (0..rollouts.episodes.len()).map(&mut one).collect()
    }

    /// Ranges of episodes, one per update: whole groups, `mini_batch_size` prompts each, as often as
    /// `ppo_epochs` says.
    fn mini_batches(&self, rollouts: &Rollouts) -> Vec<Range<usize>> {
        let (size, n) = (self.config.algorithm.mini_batch_size, self.config.rollout.n);
        let prompts = rollouts.prompts.len();
        let epoch = (0..prompts).step_by(size).map(|from| from * n..(from + size).min(prompts) * n);
        (0..self.config.algorithm.ppo_epochs).flat_map(|_| epoch.clone()).collect()
    }

    /// Greedy accuracy on `rows`.
    ///
    /// # Errors
    /// As [`Trainer::step`].
    pub fn validate(&mut self, rows: &[Row]) -> Result<Validation> {
        let prompts = self.encode(rows.iter())?;
        let settings =
            RolloutSettings { temperature: 0.0, top_p: 1.0, top_k: None, ..self.settings(1) };
        let mut session = self.rewards.session(rows.len());
        let mut judge = |episode: &Episode| {
            session.submit(episode.prompt, &rows[episode.prompt], &episode.text);
        };
        rollout::generate(&mut self.engine, &prompts, &settings, &mut judge)?;
        let mut sum = Validation { reward: 0.0, accuracy: 0.0, rows: rows.len() };
        for verdict in session.finish()? {
            sum.reward += verdict.score / rows.len() as f64;
            sum.accuracy += f64::from(u8::from(verdict.correct)) / rows.len() as f64;
        }
        Ok(sum)
    }

    /// The engine, to generate or score with between steps.
    pub fn engine(&mut self) -> &mut Engine {
        &mut self.engine
    }

    /// Training steps done.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// Gives the engine back, with the weights as they are now.
    pub fn into_engine(self) -> Engine {
        self.engine
    }

    fn record(
        &self,
        metrics: &mut Metrics,
        (rollouts, advantages, old): (&Rollouts, &Advantages, &[Vec<f32>]),
        (reports, lr): (&[UpdateReport], f64),
        start: Instant,
    ) {
        metrics.set(name::GLOBAL_STEP, self.steps as f64);
        metrics.set(name::EPOCH, self.sampler.cursor().epoch as f64);
        metrics.set(name::LR, lr);
        rollouts.record(metrics, advantages);
        record_covariance(metrics, old, advantages);
        record_updates(metrics, reports);
        let tokens: usize = rollouts.sequences.iter().map(Vec::len).sum();
        let seconds = start.elapsed().as_secs_f64();
        metrics.set(name::TOTAL_TOKENS, tokens as f64);
        metrics.set(name::TIME_STEP, seconds);
        metrics.set(name::TIME_PER_STEP, seconds);
        metrics.set(name::THROUGHPUT, tokens as f64 / seconds);
    }

    fn samples(&self, rollouts: Rollouts, advantages: &Advantages) -> Vec<Sample> {
        let Rollouts { rows, prompts, episodes, verdicts, .. } = rollouts;
        let one = |((e, verdict), advantage): ((Episode, Verdict), &f64)| {
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
                log_probs: e.logprobs,
                finish_reason: e.finish.name().to_owned(),
                ground_truth: row.ground_truth.clone(),
                predicted: verdict.predicted,
                correct: verdict.correct,
                reward: verdict.score,
                advantage: *advantage,
                weights_version: e.version,
            }
        };
        episodes.into_iter().zip(verdicts).zip(&advantages.values).map(one).collect()
    }
}

impl Rollouts {
    fn packed(&self, i: usize) -> Packed<'_> {
        let prompt_len = self.prompts[self.episodes[i].prompt].len();
        Packed { tokens: &self.sequences[i], prompt_len }
    }

    fn mini_batch(
        &self,
        range: Range<usize>,
        old: &[Vec<f32>],
        advantages: &Advantages,
        weights: WeightsAge,
    ) -> MiniBatch<'_> {
        let per_token = |i: usize| vec![advantages.values[i] as f32; old[i].len()];
        MiniBatch {
            sequences: range.clone().map(|i| self.packed(i)).collect(),
            old: old[range.clone()].concat(),
            advantages: range.flat_map(per_token).collect(),
            weights,
        }
    }

    fn record(&self, metrics: &mut Metrics, advantages: &Advantages) {
        let scores = || self.verdicts.iter().map(|v| v.score);
        metrics.summarize(name::SCORE, scores());
        metrics.summarize(name::REWARDS, scores());
        metrics.summarize(name::ADVANTAGES, advantages.values.iter().copied());
        let n = self.episodes.len() as f64;
        let right = self.verdicts.iter().filter(|v| v.correct).count() as f64;
        metrics.set(name::ACCURACY, right / n);
        let flat = advantages.zero_variance_groups as f64 / advantages.groups as f64;
        metrics.set(name::ZERO_VARIANCE_GROUPS, flat);
        let lengths = self.episodes.iter().map(|e| e.tokens.len() as f64);
        metrics.summarize(name::RESPONSE_LENGTH, lengths);
        let cut = self.episodes.iter().filter(|e| e.finish == FinishReason::Length).count() as f64;
        metrics.set(name::RESPONSE_CLIP_RATIO, cut / n);
        metrics.summarize(name::PROMPT_LENGTH, self.prompts.iter().map(|p| p.len() as f64));
        let all = || self.episodes.iter().flat_map(|e| &e.entropies);
        let tokens = all().count() as f64;
        metrics.set(name::ENTROPY, all().map(|h| f64::from(*h)).sum::<f64>() / tokens);
        let per_response = |e: &Episode| {
            e.entropies.iter().map(|h| f64::from(*h)).sum::<f64>() / e.entropies.len() as f64
        };
        let mean = self.episodes.iter().map(per_response).sum::<f64>() / n;
        metrics.set(name::ENTROPY_PER_RESPONSE, mean);
        let versions = || self.episodes.iter().map(|e| e.version);
        metrics.set(name::VERSION_MIN, versions().min().unwrap_or(0) as f64);
        metrics.set(name::VERSION_MAX, versions().max().unwrap_or(0) as f64);
        // Sampling and training read the same memory.
        metrics.set(name::SYNC_BYTES, 0.0);
        metrics.set(name::SYNC_SECONDS, 0.0);
    }
}

/// Statistics of the covariances of all tokens of the step, before its first update.
fn record_covariance(metrics: &mut Metrics, old: &[Vec<f32>], advantages: &Advantages) {
    let log_probs = old.concat();
    let per_token: Vec<f32> = old
        .iter()
        .zip(&advantages.values)
        .flat_map(|(old, a)| vec![*a as f32; old.len()])
        .collect();
    let mask = vec![true; log_probs.len()];
    let scope = 0..log_probs.len();
    let covariances =
        token_covariances(&log_probs, &per_token, &mask, std::slice::from_ref(&scope));
    if let Some(stats) = CovStats::new(&covariances) {
        stats.record(metrics);
    }
}

/// Means over the updates of a step; counts are summed.
fn record_updates(metrics: &mut Metrics, reports: &[UpdateReport]) {
    let n = reports.len() as f64;
    let mean = |of: &dyn Fn(&UpdateReport) -> f64| reports.iter().map(of).sum::<f64>() / n;
    let sum = |of: &dyn Fn(&UpdateReport) -> usize| reports.iter().map(of).sum::<usize>() as f64;
    metrics.set(name::PG_LOSS, mean(&|r| r.loss.loss));
    metrics.set(name::PG_CLIPFRAC, mean(&|r| r.loss.stats.pg_clipfrac));
    metrics.set(name::PG_CLIPFRAC_LOWER, mean(&|r| r.loss.stats.pg_clipfrac_lower));
    metrics.set(name::PPO_KL, mean(&|r| r.loss.stats.ppo_kl));
    metrics.set(name::PPO_KL_ABS, mean(&|r| r.loss.stats.ppo_kl_abs));
    metrics.set(name::GRAD_NORM, mean(&|r| r.grad_norm));
    metrics.set(name::UPDATES, sum(&|r| usize::from(r.applied)));
    metrics.set(name::UPDATES_SKIPPED, sum(&|r| usize::from(!r.applied)));
    metrics.set(name::TOUCHED_TOKENS, sum(&|r| r.loss.stats.touched_tokens));
    metrics.set(name::COV_SELECTED_TOKENS, sum(&|r| r.loss.selected.len()));
    metrics.set(name::MISMATCH_MAX, reports.iter().map(|r| r.mismatch_max).fold(0.0, f64::max));
    metrics.set(name::MISMATCH_TOKENS, sum(&|r| r.mismatch_tokens));
}
