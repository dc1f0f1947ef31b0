//! Group-relative advantages (GRPO, arXiv 2402.03300; without the division, Dr.GRPO, 2503.20783).
//!
//! `A_i = (s_i - mean) / (std + eps)` over the responses of one prompt, with the unbiased standard
//! deviation (n - 1). One number per response; it applies to each of its tokens. Two rules differ
//! from a literal reading: a group of one keeps its reward (mean 0, std 1, as verl computes), and a
//! group whose rewards are equal up to rounding gets exactly 0, where verl in f32 can return 1e-2.
//! Leaves out other estimators.

use crate::error::{Error, Result};

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

/// Advantages of the responses of one step.
#[derive(Clone, Debug, PartialEq)]
pub struct Advantages {
    /// One value per response.
    pub values: Vec<f64>,
    /// Number of groups.
    pub groups: usize,
    /// Groups that carry no signal because their rewards are equal (groups of one do not count).
    pub zero_variance_groups: usize,
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
    let mut members: Vec<usize> = (0..scores.len()).collect();
    members.sort_by_key(|i| groups[*i]);
    let mut out =
        Advantages { values: vec![0.0; scores.len()], groups: 0, zero_variance_groups: 0 };
    for group in members.chunk_by(|a, b| groups[*a] == groups[*b]) {
        out.groups += 1;
        let (mean, std) = mean_and_std(group, scores);
        let largest = group.iter().fold(0.0f64, |m, i| m.max(scores[*i].abs()));
        if group.len() > 1 && std <= ROUNDING * largest {
            out.zero_variance_groups += 1;
            continue;
        }
        let divisor = match scale {
            Scale::GroupStd => std + epsilon,
            Scale::None => 1.0,
        };
        for i in group {
            out.values[*i] = (scores[*i] - mean) / divisor;
        }
    }
    Ok(out)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    #[test]
    fn equal_rewards_give_exact_zeros_and_nan_is_refused() {
        let a = grpo(&[0.1; 3], &[4; 3], Scale::GroupStd, EPSILON).unwrap();
        assert_eq!((a.values, a.zero_variance_groups), (vec![0.0; 3], 1));
        let e = grpo(&[0.0, f64::NAN], &[0, 0], Scale::None, EPSILON).unwrap_err();
        assert!(matches!(e.kind(), ErrorKind::Reward(_)));
        assert_eq!(e.to_string(), "reward of response 1 is NaN");
    }

    #[test]
    fn a_group_of_one_keeps_its_reward() {
        let a = grpo(&[0.5], &[0], Scale::GroupStd, EPSILON).unwrap();
        assert_eq!(a.values, [0.5 / (1.0 + 1e-6)]);
        assert_eq!(a.zero_variance_groups, 0);
        assert_eq!(grpo(&[1e12], &[0], Scale::None, EPSILON).unwrap().values, [1e12]);
        let none = grpo(&[], &[], Scale::None, EPSILON).unwrap();
        assert_eq!((none.values.len(), none.groups), (0, 0));
    }
}
