//! What a step sampled: groups as they come from the engine, and all of them as one batch to learn from.

use std::ops::Range;

use engine::FinishReason;

use crate::advantage::Estimated;
use crate::dynamics;
use crate::learner::Packed;
use crate::metrics::{Metrics, name};
use crate::rollout::Episode;
use crate::update::{MiniBatch, WeightsAge};
use crate::verifier::Verdict;

/// The responses to one prompt, with all that is known once they are sampled and judged.
#[derive(Clone, Debug)]
pub(crate) struct Group {
    /// Row of the data set.
    pub(crate) row: usize,
    pub(crate) prompt: Vec<u32>,
    pub(crate) responses: Vec<Response>,
    /// Reward of the greedy response, where one was sampled; else 0.
    pub(crate) baseline: f64,
}

/// One response.
#[derive(Clone, Debug)]
pub(crate) struct Response {
    pub(crate) episode: Episode,
    pub(crate) verdict: Verdict,
    /// The verdict's score after shaping.
    pub(crate) reward: f64,
    /// Log-probability of each token under the whole distribution of the weights that sampled it.
    pub(crate) old: Vec<f32>,
}

/// What a step learns from; one entry per response, groups together.
pub(crate) struct Rollouts {
    pub(crate) rows: Vec<usize>,
    pub(crate) prompts: Vec<Vec<u32>>,
    pub(crate) baselines: Vec<f64>,
    /// Their `prompt` is an index into `prompts`.
    pub(crate) responses: Vec<Response>,
    /// Prompt and response of each.
    pub(crate) sequences: Vec<Vec<u32>>,
    /// Log-probabilities under the reference policy; empty without one.
    pub(crate) reference: Vec<Vec<f32>>,
}

/// Which responses of a step a mini-batch takes, and how.
pub(crate) struct Part {
    pub(crate) range: Range<usize>,
    pub(crate) age: WeightsAge,
    pub(crate) truncated: Truncated,
}

/// What becomes of responses that were cut off at the longest length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Truncated {
    /// They are learned from as all others.
    Kept,
    /// Their tokens are masked.
    Masked,
}

impl Response {
    pub(crate) fn is_truncated(&self) -> bool {
        self.episode.finish == FinishReason::Length
    }
}

impl Rollouts {
    /// All groups of a step, in their order.
    pub(crate) fn new(groups: Vec<Group>) -> Self {
        let mut out = Self {
            rows: Vec::new(),
            prompts: Vec::new(),
            baselines: Vec::new(),
            responses: Vec::new(),
            sequences: Vec::new(),
            reference: Vec::new(),
        };
        for (index, mut group) in groups.into_iter().enumerate() {
            for response in &mut group.responses {
                response.episode.prompt = index;
                let tokens = &response.episode.tokens;
                out.sequences.push([&group.prompt[..], tokens].concat());
                out.baselines.push(group.baseline);
            }
            out.rows.push(group.row);
            out.prompts.push(group.prompt);
            out.responses.append(&mut group.responses);
        }
        out
    }

    pub(crate) fn packed(&self, i: usize) -> Packed<'_> {
        let prompt_len = self.prompts[self.responses[i].episode.prompt].len();
        Packed { tokens: &self.sequences[i], prompt_len }
    }

    /// Tokens of each response.
    pub(crate) fn lengths(&self) -> Vec<usize> {
        self.responses.iter().map(|r| r.old.len()).collect()
    }

    /// Whether all responses of a range were sampled by the weights of this version.
    pub(crate) fn is_fresh(&self, range: &Range<usize>, version: u64) -> bool {
        self.responses[range.clone()].iter().all(|r| r.episode.version == version)
    }

    pub(crate) fn mini_batch(&self, part: &Part, advantages: &Estimated) -> MiniBatch<'_> {
        let range = part.range.clone();
        let first: usize = self.responses[..range.start].iter().map(|r| r.old.len()).sum();
        let responses = &self.responses[range.clone()];
        let tokens: usize = responses.iter().map(|r| r.old.len()).sum();
        MiniBatch {
            sequences: range.clone().map(|i| self.packed(i)).collect(),
            old: responses.iter().flat_map(|r| &r.old).copied().collect(),
            sampled: responses.iter().flat_map(|r| &r.episode.logprobs).copied().collect(),
            reference: self.reference.get(range).map(<[_]>::concat),
            advantages: advantages.tokens[first..first + tokens]
                .iter()
                .map(|a| *a as f32)
                .collect(),
            mask: mask(responses, part.truncated).collect(),
            weights: part.age,
        }
    }

    /// Statistics of responses and, of advantages and returns, of the tokens that are learned from.
    pub(crate) fn record(
        &self,
        metrics: &mut Metrics,
        estimated: &Estimated,
        truncated: Truncated,
    ) {
        let n = self.responses.len().max(1) as f64;
        let episodes = || self.episodes();
        metrics.summarize(name::SCORE, self.responses.iter().map(|r| r.verdict.score));
        let advantages = &estimated.responses;
        let returns = estimated.returns.as_ref().unwrap_or(&estimated.tokens);
        for (name, tokens) in [(name::ADVANTAGES, &estimated.tokens), (name::RETURNS, returns)] {
            let valid = tokens.iter().zip(mask(&self.responses, truncated));
            metrics.summarize(name, valid.filter(|(_, valid)| *valid).map(|(value, _)| *value));
        }
        let right = self.responses.iter().filter(|r| r.verdict.correct).count() as f64;
        metrics.set(name::ACCURACY, right / n);
        let flat = advantages.zero_variance_groups as f64 / advantages.groups.max(1) as f64;
        metrics.set(name::ZERO_VARIANCE_GROUPS, flat);
        metrics.summarize(name::RESPONSE_LENGTH, episodes().map(|e| e.tokens.len() as f64));
        let cut = self.responses.iter().filter(|r| r.is_truncated()).count() as f64;
        metrics.set(name::RESPONSE_CLIP_RATIO, cut / n);
        metrics.summarize(name::PROMPT_LENGTH, self.prompts.iter().map(|p| p.len() as f64));
        let empty = episodes().filter(|e| e.tokens.is_empty()).count() as f64;
        metrics.set(name::EMPTY_RESPONSES, empty);
        let versions = || episodes().map(|e| e.version);
        metrics.set(name::VERSION_MIN, versions().min().unwrap_or(0) as f64);
        metrics.set(name::VERSION_MAX, versions().max().unwrap_or(0) as f64);
        // Sampling and training read the same memory.
        metrics.set(name::SYNC_BYTES, 0.0);
        metrics.set(name::SYNC_SECONDS, 0.0);
    }

    /// Statistics of the covariances of all tokens of the step, before its first update, and what they
    /// predict; `advantages` are those of the tokens.
    pub(crate) fn record_covariances(&self, metrics: &mut Metrics, advantages: &[f64], lr: f64) {
        let log_probs: Vec<f64> =
            self.responses.iter().flat_map(|r| &r.old).map(|l| f64::from(*l)).collect();
        let rounded: Vec<f64> = advantages.iter().map(|a| f64::from(*a as f32)).collect();
        dynamics::record_covariances(metrics, &log_probs, &rounded, lr);
    }

    /// What was sampled, in order.
    pub(crate) fn episodes(&self) -> impl Iterator<Item = &Episode> {
        self.responses.iter().map(|response| &response.episode)
    }
}

/// Whether each token of `responses` is learned from.
fn mask(responses: &[Response], truncated: Truncated) -> impl Iterator<Item = bool> {
    let kept = move |r: &Response| truncated == Truncated::Kept || !r.is_truncated();
    responses.iter().flat_map(move |r| std::iter::repeat_n(kept(r), r.old.len()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::advantage::{Estimator, Outcomes, Scale, estimate};

    fn response(tokens: &[u32], score: f64) -> Response {
        let n = tokens.len();
        let episode = Episode {
            prompt: 0,
            sample: 0,
            tokens: tokens.to_vec(),
            logprobs: vec![-1.0; n],
            entropies: vec![0.5; n],
            text: String::new(),
            text_ends: vec![0; n],
            finish: FinishReason::Stop,
            version: 3,
        };
        let verdict = Verdict { score, correct: score > 0.0, predicted: String::new() };
        Response { episode, verdict, reward: score, old: vec![-1.0; n] }
    }

    #[test]
    fn responses_without_a_token_count_in_their_group_and_have_nothing_to_learn_from() {
        let responses = vec![response(&[], 1.0), response(&[8, 9], 0.0)];
        let group = Group { row: 0, prompt: vec![5, 6], responses, baseline: 0.0 };
        let rollouts = Rollouts::new(vec![group]);
        let outcomes = Outcomes {
            scores: &[1.0, 0.0],
            groups: &[0, 0],
            lengths: &rollouts.lengths(),
            baselines: &rollouts.baselines,
            token_rewards: &[],
        };
        let advantages = estimate(Estimator::Grpo(Scale::None), &outcomes).unwrap();
        let mut metrics = Metrics::new();
        rollouts.record(&mut metrics, &advantages, Truncated::Kept);
        assert_eq!(metrics.get(name::EMPTY_RESPONSES), Some(1.0));
        assert_eq!(metrics.get("response_length/min"), Some(0.0));
        assert_eq!(metrics.get("critic/advantages/max"), Some(-0.5), "no token has more");
        let part = Part { range: 0..2, age: WeightsAge::Same, truncated: Truncated::Kept };
        let mini = rollouts.mini_batch(&part, &advantages);
        assert_eq!(mini.advantages, [-0.5, -0.5]);
        assert_eq!(mini.responses(), [0..0, 0..2]);
    }

    #[test]
    fn statistics_of_tokens_leave_out_those_that_are_masked() {
        let mut responses =
            vec![response(&[7, 8, 9], 2.0), response(&[8], 1.0), response(&[9], 0.0)];
        responses[2].episode.finish = FinishReason::Length;
        let rollouts =
            Rollouts::new(vec![Group { row: 0, prompt: vec![5], responses, baseline: 0.5 }]);
        let outcomes = Outcomes {
            scores: &[2.0, 1.0, 0.0],
            groups: &[0; 3],
            lengths: &rollouts.lengths(),
            baselines: &rollouts.baselines,
            token_rewards: &[],
        };
        let means = |estimator, truncated| {
            let mut metrics = Metrics::new();
            rollouts.record(&mut metrics, &estimate(estimator, &outcomes).unwrap(), truncated);
            ["critic/advantages/mean", "critic/returns/mean"].map(|n| metrics.get(n).unwrap())
        };
        let grpo = Estimator::Grpo(Scale::None);
        assert_eq!(means(grpo, Truncated::Kept), [0.4; 2]);
        assert_eq!(means(grpo, Truncated::Masked), [0.75; 2]);
        // Its advantages are returns less 0.5.
        assert_eq!(means(Estimator::Remax, Truncated::Masked), [1.25, 1.75]);
    }
}
