//! Advantages: from rewards of whole responses to a number per response or per token.
//!
//! With `s_i` the reward of response `i`, `n` the responses to its prompt, `mean` and `std` (unbiased)
//! over them:
//!
//! | estimator | of response i | source |
//! |---|---|---|
//! | [`Estimator::Grpo`] | (s_i - mean) / (std + eps), or s_i - mean (Dr.GRPO) | 2402.03300, 2503.20783 |
//! | [`Estimator::GrpoPassK`] | largest less second largest for the best, 0 for the others; over std + eps | verl; pass@k |
//! | [`Estimator::Rloo`] | s_i less the mean of the others | 2402.14740 |
//! | [`Estimator::ReinforcePp`] | return of each token, whitened over all tokens | 2501.03262 |
//! | [`Estimator::ReinforcePpBaseline`] | s_i - mean, whitened over all tokens | 2501.03262 |
//! | [`Estimator::Remax`] | return of each token less the reward of the greedy response | 2310.10505 |
//! | [`Estimator::Opo`] | s_i less the mean weighted by length | 2505.23585 |
//! | [`Estimator::Gpg`] | (s_i - mean) times responses over those with a reward other than 0 | 2504.02546 |
//!
//! Rules where a literal reading leaves room: a group of one keeps its reward under every estimator
//! that compares within groups (mean 0, std 1, as verl computes), but for pass@k, which gives it 0; a
//! group whose rewards are equal up to rounding gets exactly 0, where verl in f32 can return 1e-2.
//! Rewards of single tokens (a KL penalty) are added up for all but the estimators of returns.
//! Leaves out a critic: [`gae`] takes values that somebody else predicted.

mod token;

use crate::error::{Error, Result};

pub use token::{gae, whiten};

/// What verl adds to the standard deviation.
pub const EPSILON: f64 = 1e-6;

/// A standard deviation below this share of the largest reward is rounding, not signal.
const ROUNDING: f64 = 1e-9;

/// What the centred rewards of a group are divided by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// The group's standard deviation.
    GroupStd,
    /// Nothing (Dr.GRPO).
    None,
}

/// How advantages are estimated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Estimator {
    /// Compared with the group's mean.
    Grpo(Scale),
    /// Only the best of a group, by its lead.
    GrpoPassK(Scale),
    /// Compared with the mean of the others.
    Rloo,
    /// Returns, whitened over the step.
    ReinforcePp,
    /// Compared with the group's mean, whitened over the step.
    ReinforcePpBaseline,
    /// Compared with the greedy response.
    Remax,
    /// Compared with the group's mean weighted by length.
    Opo,
    /// Compared with the group's mean, scaled up by the share of rewards that are 0.
    Gpg,
}

/// The rewards of a step. All slices but `token_rewards` have one entry per response.
#[derive(Clone, Copy, Debug)]
pub struct Outcomes<'a> {
    /// Reward of each response.
    pub scores: &'a [f64],
    /// The group of each response: any numbers, members need not be neighbours.
    pub groups: &'a [usize],
    /// Tokens of each response.
    pub lengths: &'a [usize],
    /// Reward of the greedy response to the same prompt; used by ReMax alone, may be empty for others.
    pub baselines: &'a [f64],
    /// Reward of each token besides, one response after the other; empty for none.
    pub token_rewards: &'a [f64],
}

/// Advantages of the responses of one step.
#[derive(Clone, Debug, PartialEq)]
pub struct Advantages {
    /// One value per response; where tokens differ, their mean.
    pub values: Vec<f64>,
    /// Number of groups.
    pub groups: usize,
    /// Groups that carry no signal because their rewards are equal (groups of one do not count).
    pub zero_variance_groups: usize,
}

/// The advantages of a step, per response and per token.
#[derive(Clone, Debug, PartialEq)]
pub struct Estimated {
    /// Per response.
    pub responses: Advantages,
    /// Per token, one response after the other.
    pub tokens: Vec<f64>,
    /// The returns of the tokens that they were made of; `None`, as in verl: the advantages themselves.
    pub returns: Option<Vec<f64>>,
}

/// The advantages of `outcomes`. A response without tokens takes part in its group and has no token.
///
/// # Errors
/// If a reward or a baseline is not finite.
///
/// # Panics
/// If slices differ in length.
///
/// ```
/// use trainer::advantage::{Estimator, Outcomes, estimate};
/// let outcomes = Outcomes {
///     scores: &[1.0, 0.0, 0.5],
///     groups: &[0, 0, 0],
///     lengths: &[2, 1, 0],
///     baselines: &[],
///     token_rewards: &[],
/// };
/// let advantages = estimate(Estimator::Rloo, &outcomes)?;
/// assert_eq!(advantages.responses.values, [0.75, -0.75, 0.0]);
/// assert_eq!(advantages.tokens, [0.75, 0.75, -0.75]);
/// # Ok::<(), trainer::error::Error>(())
/// ```
pub fn estimate(estimator: Estimator, outcomes: &Outcomes<'_>) -> Result<Estimated> {
    let totals = outcomes.totals()?;
    let groups = outcomes.groups;
    let spread = |tokens: &[f64]| spread(tokens, outcomes.lengths);
    let mut returns = None;
    let (responses, tokens) = match estimator {
        Estimator::Grpo(scale) => {
            let a = grpo(&totals, groups, scale, EPSILON)?;
            let tokens = spread(&a.values);
            (a, tokens)
        }
        Estimator::GrpoPassK(scale) => {
            by_group(&totals, groups, spread, &|group| pass_k(group, &totals, scale))
        }
        Estimator::Rloo => by_group(&totals, groups, spread, &|group| rloo(group, &totals)),
        Estimator::Opo => {
            by_group(&totals, groups, spread, &|group| opo(group, &totals, outcomes.lengths))
        }
        Estimator::Gpg => {
            let rewarded = totals.iter().filter(|s| **s != 0.0).count().max(1) as f64;
            let alpha = totals.len() as f64 / rewarded;
            by_group(&totals, groups, spread, &|group| {
                centred(group, &totals).into_iter().map(|a| alpha * a).collect()
            })
        }
        Estimator::ReinforcePpBaseline => {
            let (mut a, mut tokens) =
                by_group(&totals, groups, spread, &|group| centred(group, &totals));
            whiten(&mut tokens);
            a.values = token::means(&tokens, outcomes.lengths);
            (a, tokens)
        }
        Estimator::ReinforcePp | Estimator::Remax => {
            let mut tokens = token::returns(outcomes);
            returns = Some(tokens.clone());
            match estimator {
                Estimator::Remax => token::subtract(&mut tokens, outcomes),
                _ => whiten(&mut tokens),
            }
            let (mut a, _) = by_group(&totals, groups, |_| Vec::new(), &|g| vec![0.0; g.len()]);
            a.values = token::means(&tokens, outcomes.lengths);
            (a, tokens)
        }
    };
    Ok(Estimated { responses, tokens, returns })
}

/// Advantages of one's own that compare the responses of a group: `one` gives those of a group from its
/// rewards. A group of equal rewards gets zeros, rounding aside, without being asked.
///
/// # Errors
/// If a reward is not finite, or `one` returns another number of values than it was given.
///
/// # Panics
/// If slices differ in length.
///
/// ```
/// use trainer::advantage::{Outcomes, within_groups};
/// let outcomes = Outcomes {
///     scores: &[1.0, 0.0, 0.5, 3.0, 3.0],
///     groups: &[0, 0, 0, 1, 1],
///     lengths: &[2, 1, 0, 1, 1],
///     baselines: &[],
///     token_rewards: &[],
/// };
/// // Against the worst of the group.
/// let advantages = within_groups(&outcomes, |rewards| {
///     let worst = rewards.iter().copied().fold(f64::INFINITY, f64::min);
///     rewards.iter().map(|reward| reward - worst).collect()
/// })?;
/// assert_eq!(advantages.responses.values, [1.0, 0.0, 0.5, 0.0, 0.0]);
/// assert_eq!(advantages.tokens, [1.0, 1.0, 0.0, 0.0, 0.0]);
/// # Ok::<(), trainer::error::Error>(())
/// ```
pub fn within_groups(
    outcomes: &Outcomes<'_>,
    one: impl Fn(&[f64]) -> Vec<f64>,
) -> Result<Estimated> {
    let totals = outcomes.totals()?;
    let short = std::cell::Cell::new(None);
    let of = |group: &[usize]| {
        let rewards: Vec<f64> = group.iter().map(|i| totals[*i]).collect();
        let values = one(&rewards);
        if values.len() != rewards.len() {
            short.set(Some((values.len(), rewards.len())));
        }
        values
    };
    let spread = |values: &[f64]| spread(values, outcomes.lengths);
    let (responses, tokens) = by_group(&totals, outcomes.groups, spread, &of);
    match short.get() {
        Some((got, wanted)) => Err(Error::config(format!(
            "the algorithm gave {got} advantages for a group of {wanted} responses"
        ))),
        None => Ok(Estimated { responses, tokens, returns: None }),
    }
}

impl Outcomes<'_> {
    /// The whole reward of each response.
    pub(crate) fn totals(&self) -> Result<Vec<f64>> {
        let n = self.scores.len();
        assert_eq!([self.groups.len(), self.lengths.len()], [n; 2], "one entry per response");
        let bad = |values: &[f64]| values.iter().position(|v| !v.is_finite());
        if let Some(i) = bad(self.scores) {
            return Err(Error::reward(format!("reward of response {i} is {}", self.scores[i])));
        }
        if let Some(i) = bad(self.baselines) {
            let value = self.baselines[i];
            return Err(Error::reward(format!("reward of greedy response {i} is {value}")));
        }
        if let Some(i) = bad(self.token_rewards) {
            let value = self.token_rewards[i];
            return Err(Error::numeric(format!("penalty of token {i} is {value}")));
        }
        if self.token_rewards.is_empty() {
            return Ok(self.scores.to_vec());
        }
        let sums = token::rows(self.token_rewards, self.lengths).map(|row| row.iter().sum::<f64>());
        Ok(self.scores.iter().zip(sums).map(|(score, sum)| score + sum).collect())
    }
}

/// GRPO's advantages of `scores`, where `groups[i]` names the group of response `i` (any numbers,
/// members need not be neighbours). `epsilon` is added to the standard deviation.
///
/// # Errors
/// If a score is not finite.
///
/// # Panics
/// If the slices differ in length.
///
/// ```
/// use trainer::advantage::{EPSILON, Scale, grpo};
/// let a = grpo(&[1.0, 0.0, 1.0, 1.0], &[0, 0, 1, 1], Scale::None, EPSILON)?;
/// assert_eq!(a.values, [0.5, -0.5, 0.0, 0.0]);
/// assert_eq!((a.groups, a.zero_variance_groups), (2, 1));
/// # Ok::<(), trainer::error::Error>(())
/// ```
pub fn grpo(scores: &[f64], groups: &[usize], scale: Scale, epsilon: f64) -> Result<Advantages> {
    assert_eq!(scores.len(), groups.len(), "each score needs a group");
    if let Some(i) = scores.iter().position(|s| !s.is_finite()) {
        return Err(Error::reward(format!("reward of response {i} is {}", scores[i])));
    }
    let one = |group: &[usize]| {
        let (mean, std) = mean_and_std(group, scores);
        let divisor = divisor(scale, std, epsilon);
        group.iter().map(|i| (scores[*i] - mean) / divisor).collect()
    };
    Ok(by_group(scores, groups, |_| Vec::new(), &one).0)
}

/// Whether the rewards of a group differ, rounding aside: what dynamic sampling keeps. A group of one
/// is kept, an empty one is not.
///
/// ```
/// use trainer::advantage::has_signal;
/// assert!(has_signal(&[0.0, 1.0]) && has_signal(&[0.3]));
/// assert!(!has_signal(&[0.1, 0.1, 0.1]) && !has_signal(&[]));
/// ```
pub fn has_signal(rewards: &[f64]) -> bool {
    let all: Vec<usize> = (0..rewards.len()).collect();
    !rewards.is_empty() && !is_flat(&all, rewards)
}

/// Applies `one` to each group's members; a group of equal rewards gets zeros.
fn by_group(
    scores: &[f64],
    groups: &[usize],
    spread: impl Fn(&[f64]) -> Vec<f64>,
    one: &dyn Fn(&[usize]) -> Vec<f64>,
) -> (Advantages, Vec<f64>) {
    let mut members: Vec<usize> = (0..scores.len()).collect();
    members.sort_by_key(|i| groups[*i]);
    let mut out =
        Advantages { values: vec![0.0; scores.len()], groups: 0, zero_variance_groups: 0 };
    for group in members.chunk_by(|a, b| groups[*a] == groups[*b]) {
        out.groups += 1;
        if is_flat(group, scores) {
            out.zero_variance_groups += 1;
            continue;
        }
        for (i, value) in group.iter().zip(one(group)) {
            out.values[*i] = value;
        }
    }
    let tokens = spread(&out.values);
    (out, tokens)
}

/// Whether a group of several has equal rewards, rounding aside.
fn is_flat(group: &[usize], scores: &[f64]) -> bool {
    let largest = group.iter().fold(0.0f64, |m, i| m.max(scores[*i].abs()));
    group.len() > 1 && mean_and_std(group, scores).1 <= ROUNDING * largest
}

/// Less the mean.
fn centred(group: &[usize], scores: &[f64]) -> Vec<f64> {
    let (mean, _) = mean_and_std(group, scores);
    group.iter().map(|i| scores[*i] - mean).collect()
}

/// Less the mean of the others.
fn rloo(group: &[usize], scores: &[f64]) -> Vec<f64> {
    let n = group.len() as f64;
    let factor = if group.len() > 1 { n / (n - 1.0) } else { 1.0 };
    centred(group, scores).into_iter().map(|a| a * factor).collect()
}

/// The lead of the best over the second best.
fn pass_k(group: &[usize], scores: &[f64], scale: Scale) -> Vec<f64> {
    let mut out = vec![0.0; group.len()];
    let mut ranked: Vec<usize> = (0..group.len()).collect();
    ranked.sort_by(|a, b| scores[group[*b]].total_cmp(&scores[group[*a]]));
    if let [best, second, ..] = ranked[..] {
        let lead = scores[group[best]] - scores[group[second]];
        out[best] = lead / divisor(scale, mean_and_std(group, scores).1, EPSILON);
    }
    out
}

/// Less the mean weighted by length.
fn opo(group: &[usize], scores: &[f64], lengths: &[usize]) -> Vec<f64> {
    let tokens = group.iter().map(|i| lengths[*i]).sum::<usize>() as f64;
    let weighted = group.iter().map(|i| lengths[*i] as f64 * scores[*i]).sum::<f64>();
    let baseline = if group.len() == 1 || tokens == 0.0 { 0.0 } else { weighted / tokens };
    group.iter().map(|i| scores[*i] - baseline).collect()
}

fn divisor(scale: Scale, std: f64, epsilon: f64) -> f64 {
    match scale {
        Scale::GroupStd => std + epsilon,
        Scale::None => 1.0,
    }
}

/// Mean and unbiased standard deviation; (0, 1) for a group of one.
fn mean_and_std(group: &[usize], scores: &[f64]) -> (f64, f64) {
    if group.len() == 1 {
        return (0.0, 1.0);
    }
    let n = group.len() as f64;
    let mean = group.iter().map(|i| scores[*i]).sum::<f64>() / n;
    let squares = group.iter().map(|i| (scores[*i] - mean).powi(2)).sum::<f64>();
    (mean, (squares / (n - 1.0)).sqrt())
}

/// A value per response as one per token.
fn spread(values: &[f64], lengths: &[usize]) -> Vec<f64> {
    values.iter().zip(lengths).flat_map(|(v, n)| std::iter::repeat_n(*v, *n)).collect()
}

#[cfg(test)]
mod tests;
