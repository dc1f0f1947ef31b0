//! Rewards from the caller's own code, in place of the configured ones.

use std::fmt;

use super::external::Failure;
use super::{Verdict, external};
use crate::data::Row;

/// A response to be judged.
#[derive(Clone, Debug, PartialEq)]
pub struct Answered {
    /// The row whose prompt it answers.
    pub row: Row,
    /// Its text, without special tokens.
    pub response: String,
}

type Each = dyn Fn(&Row, &str) -> Option<f64> + Send + Sync;
type Batch = dyn Fn(&[Answered]) -> Vec<Option<f64>> + Send + Sync;

/// A reward function of one's own. A response is right where its reward is above 0. A reward that is
/// `None` or not finite has failed, and so have all of a batch of which too few or too many come back; what
/// that does is `reward.on_error`, and it is counted. The function has no time limit.
pub struct OwnReward(Function);

enum Function {
    /// Asked as each response ends.
    Each(Box<Each>),
    /// Asked once a rollout, for all of its responses in their order.
    Batch(Box<Batch>),
}

impl OwnReward {
    /// A function of the row and the text of one response, which returns a number or an option of one.
    ///
    /// ```
    /// use trainer::verifier::OwnReward;
    /// let brief = OwnReward::each(|row, response| {
    ///     f64::from(u8::from(response == row.ground_truth)) - 0.01 * response.len() as f64
    /// });
    /// let known = OwnReward::each(|row, _| row.ground_truth.parse::<f64>().ok());
    /// # let _ = (brief, known);
    /// ```
    pub fn each<R: Into<Option<f64>>>(
        function: impl Fn(&Row, &str) -> R + Send + Sync + 'static,
    ) -> Self {
        Self(Function::Each(Box::new(move |row, response| function(row, response).into())))
    }

    /// A function of all responses of a rollout at a time, which returns as many rewards.
    ///
    /// ```
    /// use trainer::verifier::OwnReward;
    /// // 1 for the longest.
    /// let longest = OwnReward::batch(|all| {
    ///     let most = all.iter().map(|one| one.response.len()).max();
    ///     all.iter().map(|one| Some(f64::from(u8::from(Some(one.response.len()) == most)))).collect()
    /// });
    /// # let _ = longest;
    /// ```
    pub fn batch(
        function: impl Fn(&[Answered]) -> Vec<Option<f64>> + Send + Sync + 'static,
    ) -> Self {
        Self(Function::Batch(Box::new(function)))
    }

    /// The answer on one response, if the function judges them one by one.
    pub(super) fn now(&self, row: &Row, response: &str) -> Option<external::Answer> {
        match &self.0 {
            Function::Each(function) => Some(answer(function(row, response))),
            Function::Batch(_) => None,
        }
    }

    /// The answers on what was put off; there is none to put off for a function of one response.
    pub(super) fn later(&self, all: &[Answered]) -> Vec<external::Answer> {
        let rewards = match &self.0 {
            Function::Each(function) => {
                all.iter().map(|one| function(&one.row, &one.response)).collect()
            }
            Function::Batch(function) => function(all),
        };
        if rewards.len() == all.len() {
            return rewards.into_iter().map(answer).collect();
        }
        let reason = format!("it gave {} rewards for {} responses", rewards.len(), all.len());
        vec![Err(Failure::Broken(reason)); all.len()]
    }
}

fn answer(reward: Option<f64>) -> external::Answer {
    match reward {
        Some(score) if score.is_finite() => {
            Ok(Verdict { score, correct: score > 0.0, predicted: String::new() })
        }
        Some(score) => Err(Failure::Broken(format!("the score is {score}"))),
        None => Err(Failure::Broken("it gave no score".to_owned())),
    }
}

impl fmt::Debug for OwnReward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match &self.0 {
            Function::Each(_) => "each",
            Function::Batch(_) => "batch",
        };
        write!(f, "OwnReward::{kind}")
    }
}
