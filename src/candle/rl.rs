//! `engine rl` on a device of candle: the trainer's rewards, advantages and losses around candle's
//! gradients.
//!
//! Sample, judge, compare within groups, learn in mini-batches; `config.toml`, `metrics.jsonl` and a
//! progress line a step. Log-probabilities under the sampling weights are computed anew by the path that
//! trains, so the first mini-batch's ratios are exactly 1. Episodes pass one at a time whatever
//! `trainer.max_tokens_per_microbatch` says. Leaves out validation, samples, checkpoints (so nothing can be
//! resumed and the trained weights are gone at the end) and the report.

use std::cell::RefCell;
use std::fs;
use std::ops::Range;
use std::path::Path;
use std::time::Instant;

use candle_backend::{
    AdamW, Completion, Episode, GenerateSettings, ResponseScore, Seed, StepReport, StepSettings,
};
use engine::{EngineConfig, FinishReason};
use trainer::advantage::{self, Advantages, EPSILON, Scale};
use trainer::agg::{self, AggScope};
use trainer::config::{AdvEstimator, CovScope, RolloutIs};
use trainer::data::{Cursor, Row, Sampler};
use trainer::loss::{ChoiceKey, LossOutput, TokenBatch};
use trainer::metrics::{Metrics, name};
use trainer::trackers::Trackers;
use trainer::verifier::{Judge, Verdict};
use trainer::{Progress, PromptEncoder, RlConfig, Rows, begin_anew, train_rows};

use super::{Opened, text};
use crate::exit::{Failure, Result};
use crate::output;
use crate::signals::Signals;
use crate::terminal::Terminal;

/// Runs `config` on the device called `device`.
pub(crate) fn run(
    device: &str,
    config: &RlConfig,
    engine: &EngineConfig,
    terminal: &Terminal,
) -> Result<()> {
    supported(device, config)?;
    let signals = Signals::listen()?;
    config.warnings().iter().for_each(|warning| terminal.info(warning));
    let rows = train_rows(&config.data)?;
    let opened = Opened::new(device, &config.model.path, engine, terminal)?;
    let mut learner = Learner::new(config, opened, rows)?;
    terminal.warn(&format!(
        "--device {device} leaves out validation, samples, checkpoints, --resume and the report"
    ));
    let folder = Path::new(&config.trainer.output);
    let _lock = begin_anew(folder, &config.model.path, &mut |progress| {
        if let Progress::Note(note) = progress {
            terminal.info(&note);
        }
    })?;
    let path = folder.join("config.toml");
    fs::write(&path, config.to_toml()).map_err(|error| Failure::unwritable(&path, &error))?;
    let path = folder.join("metrics.jsonl");
    let mut trackers = Trackers::open(&config.trainer, None)?;
    let total = config.trainer.total_steps;
    for step in 1..=total {
        let metrics = learner.step(step)?;
        trackers.write(&metrics)?;
        if config.trainer.tracks("console") {
            terminal.info(&metrics.progress(total));
        }
        if signals.asked() && step < total {
            return Err(Failure::interrupted(format!("interrupted after step {step} of {total}")));
        }
    }
    output::print(&format!("metrics {}", path.display()))
}

/// Fails for a configuration that asks for what this path does not do.
fn supported(device: &str, config: &RlConfig) -> Result<()> {
    let (rollout, algorithm) = (&config.rollout, &config.algorithm);
    let asked = [
        ("rollout.top_p", rollout.top_p < 1.0),
        ("rollout.top_k", rollout.top_k != -1),
        ("rollout.stop", !rollout.stop.is_empty()),
        ("algorithm.entropy_coeff", algorithm.entropy_coeff != 0.0),
        ("trainer.recompute", config.trainer.recompute),
        ("algorithm.cov_scope = microbatch", algorithm.cov_scope == CovScope::Microbatch),
        ("algorithm.agg_scope = legacy", algorithm.agg_scope == AggScope::Legacy),
        (
            "an algorithm.adv_estimator other than grpo",
            algorithm.adv_estimator != AdvEstimator::Grpo,
        ),
        ("algorithm.use_kl_loss", algorithm.use_kl_loss),
        ("algorithm.use_kl_in_reward", algorithm.use_kl_in_reward),
        ("algorithm.mask_truncated", algorithm.mask_truncated),
        ("algorithm.filter_groups", algorithm.filter_groups),
        ("algorithm.overlong_buffer", algorithm.overlong_buffer.enable),
        (
            "algorithm.rollout_correction",
            algorithm.rollout_correction.rollout_is != RolloutIs::None,
        ),
    ];
    match asked.into_iter().find(|(_, asked)| *asked) {
        None => Ok(()),
        Some((key, _)) => Err(Failure::usage(format!("--device {device} does not support {key}"))),
    }
}

/// An engine of candle that learns from rows.
struct Learner<'a> {
    config: &'a RlConfig,
    opened: Opened,
    encoder: PromptEncoder,
    rewards: Judge,
    rows: Vec<Row>,
    sampler: Sampler,
}

/// What a step sampled, with its judgement; one entry per response, groups together.
struct Rollouts {
    prompts: Vec<Vec<u32>>,
    completions: Vec<Completion>,
    /// Prompt and response of each completion.
    sequences: Vec<Vec<u32>>,
    verdicts: Vec<Verdict>,
    /// Under the weights that sampled, by the path that trains.
    old: Vec<ResponseScore>,
    advantages: Advantages,
}

/// One update.
struct Update {
    report: StepReport,
    loss: LossOutput,
}

impl<'a> Learner<'a> {
    fn new(config: &'a RlConfig, opened: Opened, mut rows: Rows) -> Result<Self> {
        let text = (opened.tokenizer.as_ref(), opened.chat_template.as_ref());
        let data = &config.data;
        let encoder = PromptEncoder::new(text, data.prompt_template, data.max_prompt_length)?;
        let rewards = Judge::new(&config.reward)?;
        rows.rows.iter().try_for_each(|row| rewards.check(row))?;
        encoder.fit(&mut rows, data.overlong())?;
        let sampler = rows.sampler(data, Cursor::default())?;
        Ok(Self { config, opened, encoder, rewards, rows: rows.rows, sampler })
    }

    /// Step `step`, from 1.
    fn step(&mut self, step: u64) -> Result<Metrics> {
        let start = Instant::now();
        let mut metrics = Metrics::new();
        metrics.set(name::GLOBAL_STEP, step as f64);
        let rollouts = self.sample(step, &mut metrics)?;
        let learning = Instant::now();
        let lr = self.config.optimizer.schedule(self.config.trainer.total_steps).rate(step);
        let mut updates = Vec::new();
        for (index, range) in
            self.config.mini_batches(self.config.data.train_batch_size).enumerate()
        {
            let key = ChoiceKey { seed: self.config.trainer.seed, step, update: index as u64 };
            updates.push(self.update(&rollouts, range, key, lr)?);
        }
        metrics.set(name::TIME_UPDATE_ACTOR, learning.elapsed().as_secs_f64());
        metrics.set(name::LR, lr);
        rollouts.record(&mut metrics);
        record_updates(&mut metrics, &updates);
        let tokens: usize = rollouts.sequences.iter().map(Vec::len).sum();
        let seconds = start.elapsed().as_secs_f64();
        metrics.set(name::TOTAL_TOKENS, tokens as f64);
        metrics.set(name::TIME_STEP, seconds);
        metrics.set(name::THROUGHPUT, tokens as f64 / seconds);
        Ok(metrics)
    }

    /// Samples a group of responses to each prompt of the next batch, judges and scores them.
    fn sample(&mut self, step: u64, metrics: &mut Metrics) -> Result<Rollouts> {
        let config = self.config;
        let rows = self.sampler.next_batch(config.data.train_batch_size);
        let prompts: Vec<Vec<u32>> =
            rows.iter().map(|row| self.encode(&self.rows[*row])).collect::<Result<_>>()?;
        let settings = GenerateSettings {
            samples: config.rollout.n,
            temperature: config.rollout.temperature as f32,
            max_tokens: config.data.max_response_length,
            eos: self.opened.eos.clone(),
            seed: Seed::Derived(engine::random::hash(&[config.trainer.seed, step])),
        };
        let begin = Instant::now();
        let completions = self.opened.engine.generate(&prompts, &settings)?;
        metrics.set(name::TIME_GEN, begin.elapsed().as_secs_f64());
        let begin = Instant::now();
        let mut session = self.rewards.session(completions.len());
        for (place, completion) in completions.iter().enumerate() {
            let text = self.shown(&prompts[completion.prompt], completion)?;
            session.submit(place, &self.rows[rows[completion.prompt]], &text);
        }
        let verdicts = session.finish()?;
        self.rewards.take_counts().record(metrics);
        metrics.set(name::TIME_REWARD, begin.elapsed().as_secs_f64());
        let advantages = self.advantages(&completions, &verdicts)?;
        let join = |one: &Completion| [&prompts[one.prompt][..], &one.tokens].concat();
        let sequences = completions.iter().map(join).collect();
        let old = Vec::new();
        let mut rollouts = Rollouts { prompts, completions, sequences, verdicts, old, advantages };
        let begin = Instant::now();
        let all = rollouts.episodes(0..rollouts.completions.len());
        rollouts.old = self.opened.engine.score_responses(&all, settings.temperature)?;
        metrics.set(name::TIME_OLD_LOG_PROB, begin.elapsed().as_secs_f64());
        Ok(rollouts)
    }

    fn encode(&self, row: &Row) -> Result<Vec<u32>> {
        let tokens = self.encoder.encode(&row.prompt)?;
        let (len, response) = (tokens.len(), self.config.data.max_response_length);
        let limit = self.opened.engine.max_model_len();
        if len + response <= limit {
            return Ok(tokens);
        }
        Err(Failure::usage(format!(
            "prompt has {len} tokens and the response up to {response}, limit is {limit} together"
        )))
    }

    /// The text of a response, without the end of text.
    fn shown(&self, prompt: &[u32], completion: &Completion) -> Result<String> {
        let Completion { tokens, finish, .. } = completion;
        let shown = tokens.len() - usize::from(*finish == FinishReason::Stop);
        Ok(text(self.opened.tokenizer.as_ref(), prompt, &tokens[..shown])?)
    }

    fn advantages(&self, completions: &[Completion], verdicts: &[Verdict]) -> Result<Advantages> {
        let scores: Vec<f64> = verdicts.iter().map(|verdict| verdict.score).collect();
        let groups: Vec<usize> = completions.iter().map(|one| one.prompt).collect();
        let scale = match self.config.algorithm.norm_adv_by_std_in_grpo {
            true => Scale::GroupStd,
            false => Scale::None,
        };
        Ok(advantage::grpo(&scores, &groups, scale, EPSILON)?)
    }

    /// One update on the responses in `range` at learning rate `lr`.
    fn update(
        &mut self,
        rollouts: &Rollouts,
        range: Range<usize>,
        key: ChoiceKey,
        lr: f64,
    ) -> Result<Update> {
        let (config, o) = (self.config, &self.config.optimizer);
        let settings = StepSettings {
            temperature: config.rollout.temperature as f32,
            max_grad_norm: o.grad_clip,
            adamw: AdamW {
                lr,
                beta1: o.betas[0],
                beta2: o.betas[1],
                eps: o.eps,
                weight_decay: o.weight_decay,
            },
        };
        // The step takes no error from the loss: it is kept here, and the step ends at a NaN.
        let outcome = RefCell::new(None);
        let loss = |new: &[f32]| {
            let result = rollouts.loss(config, range.clone(), new, key);
            let answer = match &result {
                Ok(loss) => (loss.loss, loss.dlogp.iter().map(|d| *d as f32).collect()),
                Err(_) => (f64::NAN, vec![0.0; new.len()]),
            };
            *outcome.borrow_mut() = Some(result);
            answer
        };
        let episodes = rollouts.episodes(range.clone());
        let report = self.opened.engine.rl_step(&episodes, &settings, &loss);
        match (outcome.into_inner(), report) {
            (Some(Err(error)), _) => Err(error.into()),
            (Some(Ok(loss)), report) => Ok(Update { report: report?, loss }),
            (None, Err(error)) => Err(error.into()),
            (None, Ok(_)) => unreachable!("a step asks for its loss"),
        }
    }
}

impl Rollouts {
    fn episodes(&self, range: Range<usize>) -> Vec<Episode<'_>> {
        let episode = |i: usize| Episode {
            tokens: &self.sequences[i],
            prompt_len: self.prompts[self.completions[i].prompt].len(),
        };
        range.map(episode).collect()
    }

    /// The loss of the responses in `range`, whose log-probabilities are `new` by now.
    fn loss(
        &self,
        config: &RlConfig,
        range: Range<usize>,
        new: &[f32],
        key: ChoiceKey,
    ) -> trainer::Result<LossOutput> {
        let lengths: Vec<usize> = range.clone().map(|i| self.completions[i].tokens.len()).collect();
        let (all, mask) = (0..new.len(), vec![true; new.len()]);
        let norm = config.data.max_response_length as f64;
        let mode = config.algorithm.loss_agg_mode;
        let old: Vec<f32> =
            self.old[range.clone()].iter().flat_map(|score| &score.log_probs).copied().collect();
        let advantage: Vec<f32> = range
            .zip(&lengths)
            .flat_map(|(i, len)| vec![self.advantages.values[i] as f32; *len])
            .collect();
        let mut end = 0;
        let range = |len: &usize| {
            end += len;
            end - len..end
        };
        let responses: Vec<Range<usize>> = lengths.iter().map(range).collect();
        let batch = TokenBatch {
            log_prob: new,
            old_log_prob: &old,
            advantage: &advantage,
            mask: &mask,
            weight: &agg::weights(mode, &lengths, &mask, norm),
            scopes: std::slice::from_ref(&all),
            responses: &responses,
        };
        config.algorithm.policy_loss().evaluate(&batch, key)
    }

    fn record(&self, metrics: &mut Metrics) {
        metrics.summarize(name::SCORE, self.verdicts.iter().map(|v| v.score));
        let tokens = self.completions.iter().map(|one| one.tokens.len());
        let spread = || self.advantages.values.iter().zip(tokens.clone());
        let spread = || spread().flat_map(|(value, tokens)| std::iter::repeat_n(*value, tokens));
        metrics.summarize(name::ADVANTAGES, spread());
        metrics.summarize(name::RETURNS, spread());
        let n = self.completions.len() as f64;
        let right = self.verdicts.iter().filter(|v| v.correct).count() as f64;
        metrics.set(name::ACCURACY, right / n);
        let flat = self.advantages.zero_variance_groups as f64 / self.advantages.groups as f64;
        metrics.set(name::ZERO_VARIANCE_GROUPS, flat);
        let lengths = self.completions.iter().map(|one| one.tokens.len() as f64);
        metrics.summarize(name::RESPONSE_LENGTH, lengths);
        let cut = self.completions.iter().filter(|one| one.finish == FinishReason::Length).count();
        metrics.set(name::RESPONSE_CLIP_RATIO, cut as f64 / n);
        metrics.summarize(name::PROMPT_LENGTH, self.prompts.iter().map(|p| p.len() as f64));
        let entropies = || self.old.iter().flat_map(|score| &score.entropies);
        let sum: f64 = entropies().map(|h| f64::from(*h)).sum();
        metrics.set(name::ENTROPY, sum / entropies().count() as f64);
        let sampled = self.completions.iter().flat_map(|one| &one.logprobs);
        let computed = self.old.iter().flat_map(|score| &score.log_probs);
        let apart = sampled.zip(computed).map(|(a, b)| f64::from((a - b).abs()));
        metrics.set(name::MISMATCH_MAX, apart.fold(0.0, f64::max));
    }
}

/// Means over the updates of a step; counts are summed.
fn record_updates(metrics: &mut Metrics, updates: &[Update]) {
    let n = updates.len() as f64;
    let mean = |of: &dyn Fn(&Update) -> f64| updates.iter().map(of).sum::<f64>() / n;
    let sum = |of: &dyn Fn(&Update) -> usize| updates.iter().map(of).sum::<usize>() as f64;
    metrics.set(name::PG_LOSS, mean(&|u| u.report.loss));
    metrics.set(name::PG_CLIPFRAC, mean(&|u| u.loss.stats.pg_clipfrac));
    metrics.set(name::PG_CLIPFRAC_LOWER, mean(&|u| u.loss.stats.pg_clipfrac_lower));
    metrics.set(name::PPO_KL, mean(&|u| u.loss.stats.ppo_kl));
    metrics.set(name::PPO_KL_ABS, mean(&|u| u.loss.stats.ppo_kl_abs));
    metrics.set(name::GRAD_NORM, mean(&|u| u.report.grad_norm));
    metrics.set(name::UPDATES, n);
    metrics.set(name::TOUCHED_TOKENS, sum(&|u| u.loss.stats.touched_tokens));
    metrics.set(name::COV_SELECTED_TOKENS, sum(&|u| u.loss.selected.len()));
}
