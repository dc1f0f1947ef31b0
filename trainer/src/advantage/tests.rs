//! Groups of every awkward kind, under every estimator.

use super::*;
use crate::error::ErrorKind;

const ALL: [Estimator; 10] = [
    Estimator::Grpo(Scale::GroupStd),
    Estimator::Grpo(Scale::None),
    Estimator::GrpoPassK(Scale::GroupStd),
    Estimator::GrpoPassK(Scale::None),
    Estimator::Rloo,
    Estimator::ReinforcePp,
    Estimator::ReinforcePpBaseline,
    Estimator::Remax,
    Estimator::Opo,
    Estimator::Gpg,
];

fn outcomes<'a>(scores: &'a [f64], groups: &'a [usize], lengths: &'a [usize]) -> Outcomes<'a> {
    Outcomes { scores, groups, lengths, baselines: scores, token_rewards: &[] }
}

#[test]
fn equal_rewards_give_exact_zeros_under_every_estimator() {
    for reward in [0.1, 0.0, -1.0, 1e-300, 0.3] {
        for estimator in ALL {
            let scores = [reward; 3];
            let a = estimate(estimator, &outcomes(&scores, &[4; 3], &[2, 0, 5])).unwrap();
            assert_eq!(a.responses.values, [0.0; 3], "{estimator:?}, {reward}");
            assert_eq!(a.tokens, [0.0; 7], "{estimator:?}, {reward}");
            assert_eq!((a.responses.groups, a.responses.zero_variance_groups), (1, 1));
        }
    }
}

#[test]
fn rewards_that_are_not_finite_are_refused_by_name() {
    for estimator in ALL {
        let e = estimate(estimator, &outcomes(&[0.0, f64::NAN], &[0, 0], &[1, 1])).unwrap_err();
        assert!(matches!(e.kind(), ErrorKind::Reward(_)));
        assert_eq!(e.to_string(), "reward of response 1 is NaN");
    }
    let bad =
        Outcomes { baselines: &[f64::INFINITY, 0.0], ..outcomes(&[0.0, 1.0], &[0, 0], &[1, 1]) };
    let e = estimate(Estimator::Remax, &bad).unwrap_err().to_string();
    assert_eq!(e, "reward of greedy response 0 is inf");
}

#[test]
fn a_group_of_one_keeps_its_reward_where_groups_are_compared() {
    let a = grpo(&[0.5], &[0], Scale::GroupStd, EPSILON).unwrap();
    assert_eq!((&a.values[..], a.zero_variance_groups), (&[0.5 / (1.0 + 1e-6)][..], 0));
    assert_eq!(grpo(&[1e12], &[0], Scale::None, EPSILON).unwrap().values, [1e12]);
    for (estimator, want) in [
        (Estimator::Rloo, 0.5),
        (Estimator::Opo, 0.5),
        (Estimator::Gpg, 0.5),
        (Estimator::GrpoPassK(Scale::None), 0.0),
        (Estimator::ReinforcePp, 0.0),
        (Estimator::ReinforcePpBaseline, 0.0),
        (Estimator::Remax, 0.25),
    ] {
        let one = Outcomes { baselines: &[0.25], ..outcomes(&[0.5], &[0], &[3]) };
        let a = estimate(estimator, &one).unwrap();
        assert_eq!((a.responses.values, a.tokens), (vec![want], vec![want; 3]), "{estimator:?}");
    }
}

#[test]
fn nothing_and_responses_without_tokens_have_defined_results() {
    for estimator in ALL {
        let a = estimate(estimator, &outcomes(&[], &[], &[])).unwrap();
        assert_eq!((a.responses.values.len(), a.responses.groups, a.tokens.len()), (0, 0, 0));
        let a = estimate(estimator, &outcomes(&[1.0, 0.0], &[0, 0], &[0, 0])).unwrap();
        assert!(a.tokens.is_empty() && a.responses.values.iter().all(|v| v.is_finite()));
    }
}

#[test]
fn the_best_by_its_lead_and_gpg_by_the_share_of_zeros() {
    let scores = [0.5, 1.0, 0.75, 0.0];
    let of = |estimator| {
        estimate(estimator, &outcomes(&scores, &[0; 4], &[1; 4])).unwrap().responses.values
    };
    assert_eq!(of(Estimator::GrpoPassK(Scale::None)), [0.0, 0.25, 0.0, 0.0]);
    let scaled = of(Estimator::GrpoPassK(Scale::GroupStd))[1];
    assert!((scaled - 0.25 / ((0.546875f64 / 3.0).sqrt() + 1e-6)).abs() < 1e-12);
    let alpha = 4.0 / 3.0;
    let want: Vec<f64> = scores.iter().map(|s| alpha * (s - 0.5625)).collect();
    assert_eq!(of(Estimator::Gpg), want);
}

/// A penalty per token enters the sum of a response, and the returns from each token on.
#[test]
fn rewards_of_tokens_are_added_up_or_returned() {
    let with = Outcomes {
        token_rewards: &[-0.25, -0.5, 0.0],
        baselines: &[0.5, 0.5],
        ..outcomes(&[1.0, 1.0], &[0, 0], &[2, 1])
    };
    let a = estimate(Estimator::Grpo(Scale::None), &with).unwrap();
    assert_eq!(a.tokens, [-0.375, -0.375, 0.375]);
    let a = estimate(Estimator::Remax, &with).unwrap();
    assert_eq!(a.tokens, [-0.25, 0.0, 0.5]);
    assert_eq!(a.responses.values, [-0.125, 0.5]);
}
