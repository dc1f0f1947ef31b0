//! How a step comes to its responses: sampled, judged, shaped, and under dynamic sampling filtered.
//!
//! Groups that dynamic sampling has too many of are kept for the next step, with the log-probabilities of the
//! weights that sampled them, in memory and in checkpoints.

use std::time::Instant;

use engine::{EosRule, Host};

use crate::advantage::has_signal;
use crate::batch::{Group, Response, Rollouts};
use crate::config::{AdvEstimator, FilterMetric, OnError, RlConfig};
use crate::error::{Error, Result};
use crate::filter::{GroupFilter, Next};
use crate::learner::Packed;
use crate::metrics::{Metrics, name};
use crate::rollout::{self, Episode, RolloutSettings};
use crate::shaping::overlong_penalty;
use crate::trainer::Trainer;
use crate::verifier::Verdict;

impl Trainer {
    /// Samples a group of responses to each prompt of the next batch, and under dynamic sampling further
    /// batches until enough groups carry signal. Groups beyond that stay for the next step.
    pub(crate) fn sample(&mut self, metrics: &mut Metrics) -> Result<Rollouts> {
        let (wanted, algorithm) = (self.config.data.train_batch_size, &self.config.algorithm);
        if !algorithm.filter_groups {
            let groups = self.generate(wanted, 0, metrics)?;
            return Ok(Rollouts::new(groups));
        }
        let metric = algorithm.filter_groups_metric;
        let size = match algorithm.gen_batch_size {
            0 => wanted,
            size => size,
        };
        let limit = algorithm.max_num_gen_batches;
        let mut filter = GroupFilter::new(wanted, limit, std::mem::take(&mut self.surplus));
        while filter.next() == Next::Generate {
            let groups = self.generate(size, filter.batches() as u64, metrics)?;
            filter.offer(groups.into_iter().map(|group| {
                let signal = group.has_signal(metric);
                (group, signal)
            }));
        }
        metrics.set(name::GEN_BATCHES, filter.batches() as f64);
        metrics.set(name::GROUPS_DROPPED, filter.dropped() as f64);
        let groups = filter.take();
        if groups.is_empty() {
            return Err(Error::reward(format!(
                "all {} groups of {} batches {}: {}set algorithm.filter_groups to false, make \
                 algorithm.max_num_gen_batches (now {limit}) or rollout.n larger, or train on \
                 prompts of another difficulty",
                filter.dropped(),
                filter.batches(),
                metric.flat(),
                metric.hint()
            )));
        }
        metrics.set(name::GROUPS_SHORT, (wanted - groups.len()) as f64);
        self.surplus = filter.into_kept();
        metrics.set(name::GROUPS_SURPLUS, self.surplus.len() as f64);
        Ok(Rollouts::new(groups))
    }

    /// Samples and judges the groups of the next `count` prompts, the `batch`-th such batch of this step.
    fn generate(&mut self, count: usize, batch: u64, metrics: &mut Metrics) -> Result<Vec<Group>> {
        let rows = self.sampler.next_batch(count);
        let prompts = self.encode(rows.iter().map(|row| &self.rows.rows[*row]))?;
        let settings = self.settings(self.config.rollout.n, batch);
        let responses = self.roll((&rows, &prompts), &settings, metrics)?;
        if self.config.algorithm.overlong_buffer.enable {
            let long = responses.iter().filter(|r| r.reward != r.verdict.score).count();
            metrics.add(name::OVERLONG_RESPONSES, long as f64);
        }
        let baselines = match self.config.algorithm.adv_estimator {
            AdvEstimator::Remax => {
                let greedy = RolloutSettings { samples: 1, ..greedy(settings) };
                let responses = self.roll((&rows, &prompts), &greedy, metrics)?;
                responses.iter().map(|r| r.reward).collect()
            }
            _ => vec![0.0; count],
        };
        let mut responses = responses.into_iter();
        let groups = rows.into_iter().zip(prompts).zip(baselines);
        let groups = groups.map(|((row, prompt), baseline)| {
            let responses = responses.by_ref().take(self.config.rollout.n).collect();
            Group { row, prompt, responses, baseline }
        });
        let mut groups: Vec<Group> = groups.collect();
        self.set_old_log_probs(&mut groups, metrics);
        Ok(groups)
    }

    /// Samples responses to `prompts`, which come from `rows`, and judges each as it ends.
    fn roll(
        &mut self,
        (rows, prompts): (&[usize], &[Vec<u32>]),
        settings: &RolloutSettings,
        metrics: &mut Metrics,
    ) -> Result<Vec<Response>> {
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
        let mut host = Host::new(&mut self.engine, self.guests.as_mut());
        let episodes = rollout::generate(host.reborrow(), prompts, settings, &mut judge)?;
        metrics.add(name::TIME_GEN, start.elapsed().as_secs_f64() - judging);
        let waiting = Instant::now();
        let mut verdicts = session.finish_beside(&mut host)?;
        metrics.add(name::TIME_REWARD, judging + waiting.elapsed().as_secs_f64());
        let failed = settle(&mut verdicts, self.config.reward.on_error)?;
        self.rewards.take_counts().record(metrics);
        let failure = self.rewards.first_failure(verdicts.iter())?;
        self.failure = self.failure.take().or(failure);
        metrics.add(name::REWARD_FAILURES, failed as f64);
        let respond = |(episode, verdict): (Episode, Verdict)| {
            let reward = verdict.score + penalty(&self.config, episode.tokens.len());
            Response { episode, verdict, reward, old: Vec::new() }
        };
        Ok(episodes.into_iter().zip(verdicts).map(respond).collect())
    }

    /// Log-probabilities under the sampling weights: those returned with the samples or, where sampling
    /// was truncated, those of the whole distribution.
    fn set_old_log_probs(&mut self, groups: &mut [Group], metrics: &mut Metrics) {
        let whole = self.settings(1, 0).is_untruncated();
        let begin = Instant::now();
        let (decoder, kernels) = (self.engine.decoder(), self.engine.kernels());
        let inv_temperature = (1.0 / self.config.rollout.temperature) as f32;
        for group in groups {
            for response in &mut group.responses {
                if whole {
                    response.old.clone_from(&response.episode.logprobs);
                    continue;
                }
                let tokens = [&group.prompt[..], &response.episode.tokens].concat();
                let packed = [Packed { tokens: &tokens, prompt_len: group.prompt.len() }];
                let stats = self.state.learner.forward(decoder, kernels, &packed, inv_temperature);
                response.old = stats.iter().map(|s| s.log_prob).collect();
            }
        }
        if !whole {
            metrics.add(name::TIME_OLD_LOG_PROB, begin.elapsed().as_secs_f64());
        }
    }

    /// How a batch is sampled; the random streams are keyed by seed, step and the batch within it.
    pub(crate) fn settings(&self, samples: usize, batch: u64) -> RolloutSettings {
        let rollout = &self.config.rollout;
        let key = [self.config.trainer.seed, self.steps + 1, batch];
        let words = if batch == 0 { &key[..2] } else { &key[..] };
        RolloutSettings {
            samples,
            temperature: rollout.temperature as f32,
            top_p: rollout.top_p as f32,
            top_k: usize::try_from(rollout.top_k).ok(),
            max_tokens: self.config.data.max_response_length,
            stop: rollout.stop.clone(),
            eos: EosRule::Stop,
            seed: engine::random::hash(words),
        }
    }
}

impl FilterMetric {
    /// What is said of groups without signal.
    pub(crate) fn flat(self) -> &'static str {
        match self {
            Self::Acc => "are all right or all wrong",
            Self::Score => "have equal rewards",
        }
    }

    /// What may bring signal where there is none, before other advice.
    pub(crate) fn hint(self) -> &'static str {
        match self {
            Self::Acc => "set algorithm.filter_groups_metric to score to compare rewards, ",
            Self::Score => "",
        }
    }
}

impl Group {
    /// Whether the responses differ in what they are compared by.
    fn has_signal(&self, metric: FilterMetric) -> bool {
        let value = |r: &Response| match metric {
            FilterMetric::Acc => f64::from(r.verdict.correct),
            FilterMetric::Score => r.verdict.score,
        };
        has_signal(&self.responses.iter().map(value).collect::<Vec<_>>())
    }
}

/// The same, drawn greedily.
pub(crate) fn greedy(settings: RolloutSettings) -> RolloutSettings {
    RolloutSettings { temperature: 0.0, top_p: 1.0, top_k: None, ..settings }
}

/// What shaping adds to the reward of a response of this many tokens.
fn penalty(config: &RlConfig, tokens: usize) -> f64 {
    let buffer = &config.algorithm.overlong_buffer;
    match buffer.enable {
        true => {
            let longest = config.data.max_response_length;
            overlong_penalty(tokens, longest, buffer.len, buffer.penalty_factor)
        }
        false => 0.0,
    }
}

/// Deals with rewards that are not finite, as asked; returns how many there are.
fn settle(verdicts: &mut [Verdict], on_error: OnError) -> Result<usize> {
    let mut failed = 0;
    for (i, verdict) in verdicts.iter_mut().enumerate().filter(|(_, v)| !v.score.is_finite()) {
        if on_error == OnError::Fail {
            return Err(Error::reward(format!("reward of response {i} is {}", verdict.score)));
        }
        *verdict = Verdict { score: 0.0, correct: false, ..std::mem::replace(verdict, none()) };
        failed += 1;
    }
    Ok(failed)
}

/// A verdict on nothing.
fn none() -> Verdict {
    Verdict { score: 0.0, correct: false, predicted: String::new() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn groups_are_compared_by_what_the_metric_says() {
        let response = |score: f64| Response {
            episode: Episode {
                prompt: 0,
                sample: 0,
                tokens: Vec::new(),
                logprobs: Vec::new(),
                entropies: Vec::new(),
                text: String::new(),
                text_ends: Vec::new(),
                finish: engine::FinishReason::Stop,
                version: 0,
            },
            verdict: Verdict { score, correct: score > 0.0, predicted: String::new() },
            reward: score,
            old: Vec::new(),
        };
        let responses = [0.1, 0.9].map(response).to_vec();
        let group = Group { row: 0, prompt: Vec::new(), responses, baseline: 0.0 };
        assert!(group.has_signal(FilterMetric::Score));
        assert!(!group.has_signal(FilterMetric::Acc));
        assert_eq!(FilterMetric::Acc.flat(), "are all right or all wrong");
    }

    #[test]
    fn rewards_that_are_not_finite_become_0_and_are_counted_or_end_the_run() {
        let verdict = |score| Verdict { score, correct: true, predicted: "7".into() };
        let mut verdicts = [verdict(1.0), verdict(f64::NAN), verdict(f64::NEG_INFINITY)];
        let e = settle(&mut verdicts.clone(), OnError::Fail).unwrap_err();
        assert!(matches!(e.kind(), ErrorKind::Reward(_)));
        assert_eq!(e.to_string(), "reward of response 1 is NaN");
        assert_eq!(settle(&mut verdicts, OnError::Zero).unwrap(), 2);
        assert_eq!(
            verdicts.each_ref().map(|v| (v.score, v.correct)),
            [(1.0, true), (0.0, false), (0.0, false)]
        );
    }
}
