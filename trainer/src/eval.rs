//! What several responses to each problem say about a model: mean@n, pass@k, maj@k, best@k.
//!
//! A problem is a row of the data; copies of a row are problems of their own. Exact, without resampling:
//!
//! | name | value for n responses of which c are right |
//! |---|---|
//! | mean@n | c / n |
//! | pass@k | 1 - C(n-c, k) / C(n, k): some of k responses is right, over all subsets (arXiv 2107.03374) |
//! | maj@k | the most frequent answer of k responses is right, over all subsets; ties share the vote |
//! | best@k, worst@k | expected maximum, minimum of k responses drawn with replacement |
//!
//! verl estimates best@k and maj@k from 1000 resamples with replacement. Its best@k is ours up to that
//! noise, and low against pass@k; its maj@k draws with replacement too, ours is the vote itself at k = n.
//! A response without an answer votes for no answer. Values of a source are means over its problems.

mod run;

use std::collections::BTreeMap;

use serde::Serialize;

use crate::metrics::Metrics;
use crate::verifier::Verdict;

pub use run::{EvalSettings, Judge, Response, evaluate};

/// Most responses to a problem that [`maj_at_k`] takes: binomials of more do not fit into an f64.
pub const MAX_RESPONSES: usize = 1000;

/// The source of rows that name none, as verl calls it.
const UNNAMED: &str = "unknown";

/// Probability that some of `k` of `n` responses is right, if `right` are; `None` unless 1 <= k <= n.
///
/// ```
/// use trainer::eval::pass_at_k;
/// assert_eq!(pass_at_k(4, 1, 2), Some(0.5));
/// assert_eq!(pass_at_k(4, 3, 2), Some(1.0));
/// assert_eq!(pass_at_k(4, 1, 5), None);
/// ```
///
/// # Panics
/// If more are right than there are.
pub fn pass_at_k(n: usize, right: usize, k: usize) -> Option<f64> {
    assert!(right <= n, "{right} of {n} responses are right");
    // C(n-c, k) / C(n, k) as a product of c factors in [0, 1): nothing overflows or cancels.
    let miss = |i: usize| (1.0 - k as f64 / i as f64).max(0.0);
    (1..=n).contains(&k).then(|| 1.0 - (n - right + 1..=n).map(miss).product::<f64>())
}

/// Probability that the most frequent answer among `k` of the responses is right, over all subsets; the
/// answers of a tie are taken equally often. `None` unless 1 <= k <= n.
///
/// # Panics
/// If there are more than [`MAX_RESPONSES`].
pub fn maj_at_k(verdicts: &[Verdict], k: usize) -> Option<f64> {
    let n = verdicts.len();
    assert!(n <= MAX_RESPONSES, "{n} responses, limit is {MAX_RESPONSES}");
    if !(1..=n).contains(&k) {
        return None;
    }
    let answers = answers(verdicts);
    let most = answers.iter().map(|(count, _)| *count).max().unwrap_or(0);
    if k == n {
        // There is one subset only.
        let winners = answers.iter().filter(|(count, _)| *count == most);
        return Some(moments(&winners.map(|(_, share)| *share).collect::<Vec<_>>()).mean);
    }
    let won: f64 = (1..=k.min(most)).map(|top| votes_won(&answers, k, top)).sum();
    Some((won / binomial(n, k)).min(1.0))
}

/// How often each answer was given, and the share of those that are right.
fn answers(verdicts: &[Verdict]) -> Vec<(usize, f64)> {
    let mut counts: BTreeMap<&str, (usize, usize)> = BTreeMap::new();
    for verdict in verdicts {
        let (all, right) = counts.entry(&verdict.predicted).or_default();
        *all += 1;
        *right += usize::from(verdict.correct);
    }
    counts.into_values().map(|(all, right)| (all, right as f64 / all as f64)).collect()
}

/// Over all subsets of `k` responses whose most frequent answers occur `top` times: the sum of the share of
/// right ones among those answers.
///
/// Answer by answer, `ways[s][t]` counts the choices of `s` responses in which `t` answers have reached
/// `top`, and `right[s][t]` sums over them how many of those answers are right.
fn votes_won(answers: &[(usize, f64)], k: usize, top: usize) -> f64 {
    let ties = k / top;
    let mut ways = vec![vec![0.0; ties + 1]; k + 1];
    let mut right = ways.clone();
    ways[0][0] = 1.0;
    for (count, share) in answers {
        let choices: Vec<f64> = (0..=top.min(*count)).map(|b| binomial(*count, b)).collect();
        for s in (0..=k).rev() {
            for t in (0..=ties).rev() {
                let (mut new_ways, mut new_right) = (0.0, 0.0);
                for (b, choice) in choices.iter().enumerate().filter(|(b, _)| *b <= s) {
                    let reaches = usize::from(b == top);
                    if reaches > t {
                        continue;
                    }
                    let (w, r) = (ways[s - b][t - reaches], right[s - b][t - reaches]);
                    new_ways += w * choice;
                    new_right += (r + w * share * reaches as f64) * choice;
                }
                (ways[s][t], right[s][t]) = (new_ways, new_right);
            }
        }
    }
    (1..=ties).map(|t| right[k][t] / t as f64).sum()
}

/// C(n, k).
fn binomial(n: usize, k: usize) -> f64 {
    (0..k.min(n - k)).fold(1.0, |c, i| c * (n - i) as f64 / (i + 1) as f64)
}

/// Mean and standard deviation of a random quantity.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Moments {
    /// The mean.
    pub mean: f64,
    /// The standard deviation, with the number of values as its denominator.
    pub std: f64,
}

/// Mean and spread of the values themselves.
///
/// # Panics
/// If there are none.
pub fn moments(values: &[f64]) -> Moments {
    assert!(!values.is_empty(), "no values");
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let var = values.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
    Moments { mean, std: var.sqrt() }
}

/// Mean and spread of the largest of `k` of the values, drawn with replacement.
///
/// ```
/// use trainer::eval::best_at_k;
/// // Of two draws from {0, 1} the best is 1 in three of four cases.
/// assert_eq!(best_at_k(&[1.0, 0.0], 2).mean, 0.75);
/// ```
///
/// # Panics
/// If there are no values.
pub fn best_at_k(values: &[f64], k: usize) -> Moments {
    assert!(!values.is_empty(), "no values");
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let below =
        |i: usize| (i as f64 / sorted.len() as f64).powi(i32::try_from(k).unwrap_or(i32::MAX));
    let weight = |i: usize| below(i + 1) - below(i);
    let mean: f64 = sorted.iter().enumerate().map(|(i, x)| weight(i) * x).sum();
    let var: f64 = sorted.iter().enumerate().map(|(i, x)| weight(i) * (x - mean).powi(2)).sum();
    Moments { mean, std: var.max(0.0).sqrt() }
}

/// Mean and spread of the smallest of `k` of the values, drawn with replacement.
///
/// # Panics
/// If there are no values.
pub fn worst_at_k(values: &[f64], k: usize) -> Moments {
    let negated: Vec<f64> = values.iter().map(|x| -x).collect();
    let best = best_at_k(&negated, k);
    Moments { mean: -best.mean, ..best }
}

/// The responses to one problem.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Problem {
    /// How they were judged.
    pub verdicts: Vec<Verdict>,
    /// Tokens of all of them.
    pub tokens: usize,
    /// How many were cut off at the limit.
    pub truncated: usize,
}

impl Problem {
    fn right(&self) -> usize {
        self.verdicts.iter().filter(|verdict| verdict.correct).count()
    }

    fn accuracies(&self) -> Vec<f64> {
        self.verdicts.iter().map(|verdict| f64::from(u8::from(verdict.correct))).collect()
    }

    fn rewards(&self) -> Vec<f64> {
        self.verdicts.iter().map(|verdict| verdict.score).collect()
    }
}

/// What is known of the problems of a source, or of all. Values by k hold those k for which every problem
/// has enough responses.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Summary {
    /// Problems.
    pub problems: usize,
    /// Responses to each; the smallest number, if they differ.
    pub n: usize,
    /// mean@n: the share of right responses.
    pub mean: f64,
    /// Standard error of it over the problems; 0 for a single one.
    pub mean_error: f64,
    /// Mean reward.
    pub reward: f64,
    /// pass@k by k.
    pub pass: BTreeMap<usize, f64>,
    /// maj@k by k.
    pub maj: BTreeMap<usize, f64>,
    /// best@k of the accuracy, as verl has it, by k.
    pub best: BTreeMap<usize, f64>,
    /// Mean length of a response, in tokens.
    pub tokens: f64,
    /// Share of responses cut off at the limit.
    pub truncated: f64,
}

impl Summary {
    /// Summarises problems, with values for each of `ks`.
    ///
    /// # Panics
    /// If there are no problems, or one has no response or more than [`MAX_RESPONSES`].
    pub fn new(problems: &[&Problem], ks: &[usize]) -> Self {
        let count = problems.len() as f64;
        let average = |of: &dyn Fn(&Problem) -> f64| {
            problems.iter().map(|problem| of(problem)).sum::<f64>() / count
        };
        let n = problems.iter().map(|p| p.verdicts.len()).min().expect("there are problems");
        let by_k = |of: &dyn Fn(&Problem, usize) -> f64| -> BTreeMap<usize, f64> {
            let known = ks.iter().copied().filter(|k| (1..=n).contains(k));
            known.map(|k| (k, average(&|problem| of(problem, k)))).collect()
        };
        let share = |p: &Problem| moments(&p.accuracies()).mean;
        let mean = average(&share);
        let spread = average(&|p| (share(p) - mean).powi(2)).sqrt();
        let responses: usize = problems.iter().map(|p| p.verdicts.len()).sum();
        let sum = |of: &dyn Fn(&Problem) -> usize| problems.iter().map(|p| of(p)).sum::<usize>();
        Self {
            problems: problems.len(),
            n,
            mean,
            mean_error: spread / (count - 1.0).max(1.0).sqrt(),
            reward: average(&|p| moments(&p.rewards()).mean),
            pass: by_k(&|p, k| pass_at_k(p.verdicts.len(), p.right(), k).expect("k is up to n")),
            maj: by_k(&|p, k| maj_at_k(&p.verdicts, k).expect("k is up to n")),
            best: by_k(&|p, k| best_at_k(&p.accuracies(), k).mean),
            tokens: sum(&|p| p.tokens) as f64 / responses as f64,
            truncated: sum(&|p| p.truncated) as f64 / responses as f64,
        }
    }
}

/// The problems of each source, in the order in which sources first occur.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Evaluation {
    sources: Vec<(String, Vec<Problem>)>,
}

impl Evaluation {
    /// Adds a problem of `source`.
    pub fn add(&mut self, source: Option<&str>, problem: Problem) {
        let source = source.unwrap_or(UNNAMED);
        match self.sources.iter_mut().find(|(name, _)| name == source) {
            Some((_, problems)) => problems.push(problem),
            None => self.sources.push((source.to_owned(), vec![problem])),
        }
    }

    /// Each source with its summary.
    pub fn summaries(&self, ks: &[usize]) -> Vec<(&str, Summary)> {
        let of = |problems: &[Problem]| Summary::new(&problems.iter().collect::<Vec<_>>(), ks);
        self.sources.iter().map(|(name, problems)| (name.as_str(), of(problems))).collect()
    }

    /// All problems together, each with the same weight; `None` if there are none.
    pub fn overall(&self, ks: &[usize]) -> Option<Summary> {
        let all: Vec<&Problem> = self.sources.iter().flat_map(|(_, problems)| problems).collect();
        (!all.is_empty()).then(|| Summary::new(&all, ks))
    }

    /// Writes verl's metrics: under `val-core/SOURCE/acc/` mean, best and maj at the number of responses,
    /// under `val-aux/` the rest, for 2, 4, 8 ... responses too.
    pub fn record(&self, metrics: &mut Metrics) {
        for (source, problems) in &self.sources {
            let n = problems.iter().map(|p| p.verdicts.len()).min().unwrap_or(0);
            for (variable, of) in [
                ("acc", Problem::accuracies as fn(&Problem) -> Vec<f64>),
                ("reward", Problem::rewards),
            ] {
                for (name, value) in verl_values(problems, n, of) {
                    let core = variable == "acc" && is_core(&name, n);
                    let section = if core { "val-core" } else { "val-aux" };
                    metrics.set(&format!("{section}/{source}/{variable}/{name}"), value);
                }
            }
            for k in powers_up_to(n) {
                let mean = |of: &dyn Fn(&Problem) -> Option<f64>| {
                    problems.iter().filter_map(of).sum::<f64>() / problems.len() as f64
                };
                let section = if k == n { "val-core" } else { "val-aux" };
                let maj = mean(&|p| maj_at_k(&p.verdicts, k));
                metrics.set(&format!("{section}/{source}/acc/maj@{k}/mean"), maj);
                let pass = mean(&|p| pass_at_k(p.verdicts.len(), p.right(), k));
                metrics.set(&format!("val-aux/{source}/acc/pass@{k}"), pass);
            }
        }
    }
}

/// verl calls these of the accuracy the core.
fn is_core(name: &str, n: usize) -> bool {
    let core = ["mean", "maj", "best"].iter().any(|prefix| name.starts_with(prefix));
    core && name.split('/').next().is_some_and(|head| head.ends_with(&format!("@{n}")))
}

/// 2, 4, 8 ... below `n`, and `n`; nothing for a single response.
fn powers_up_to(n: usize) -> Vec<usize> {
    let powers = std::iter::successors(Some(2), |k| Some(k * 2)).take_while(|k| *k < n);
    powers.chain((n > 1).then_some(n)).collect()
}

/// verl's names and values of a variable, averaged over problems.
fn verl_values(
    problems: &[Problem],
    n: usize,
    of: impl Fn(&Problem) -> Vec<f64>,
) -> Vec<(String, f64)> {
    let values: Vec<Vec<f64>> = problems.iter().map(of).collect();
    let average = |of: &dyn Fn(&[f64]) -> f64| {
        values.iter().map(|values| of(values)).sum::<f64>() / values.len() as f64
    };
    let mut out = vec![(format!("mean@{n}"), average(&|v| moments(v).mean))];
    if n > 1 {
        out.push((format!("std@{n}"), average(&|v| moments(v).std)));
    }
    for k in powers_up_to(n) {
        out.push((format!("best@{k}/mean"), average(&|v| best_at_k(v, k).mean)));
        out.push((format!("best@{k}/std"), average(&|v| best_at_k(v, k).std)));
        out.push((format!("worst@{k}/mean"), average(&|v| worst_at_k(v, k).mean)));
        out.push((format!("worst@{k}/std"), average(&|v| worst_at_k(v, k).std)));
    }
    out
}

#[cfg(test)]
mod tests;
