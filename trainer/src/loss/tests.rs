//! Every loss against finite differences, on policy, and at its edges.

use super::*;
use crate::error::ErrorKind;
use crate::random::{Purpose, Stream};

const KEY: ChoiceKey = ChoiceKey { seed: 3, step: 1, update: 0 };

fn losses() -> [PolicyLoss; 8] {
    let range = ClipRange { low: 0.2, high: 0.28 };
    let log_ratio_clamp = Some(LOG_RATIO_CLAMP);
    [
        PolicyLoss::Clip(Clip { range, dual: Some(3.0), log_ratio_clamp }),
        PolicyLoss::ClipCov(ClipCov { range, ratio: 0.2, lower: 0.1, upper: 5.0, log_ratio_clamp }),
        PolicyLoss::KlCov(KlCov { ratio: 0.2, coef: 1.0, log_ratio_clamp }),
        PolicyLoss::Sapo(Sapo { tau_pos: 1.0, tau_neg: 1.05, log_ratio_clamp }),
        PolicyLoss::Gpg,
        PolicyLoss::Cispo(Cispo { range, log_ratio_clamp }),
        PolicyLoss::Gspo(Gspo { range }),
        PolicyLoss::GeoMean(GeoMean { low: 0.4, high: 0.4 }),
    ]
}

/// Slopes against central differences, the selection held fixed. Advantages and weights are those of whole
/// responses, as in training: only then is the derivative of the sequence losses that of their tokens.
/// CISPO is left out, whose loss is not what it differentiates.
#[test]
fn slopes_agree_with_finite_differences() {
    let mut random = Stream::keyed(11, Purpose::Tasks, &[]);
    let n = 60;
    let responses: Vec<Range<usize>> = vec![0..20, 20..21, 21..21, 21..52, 52..60];
    let old: Vec<f64> = (0..n).map(|_| -3.0 * random.uniform()).collect();
    let log_prob: Vec<f64> = old.iter().map(|o| o + 0.4 * random.normal()).collect();
    let mut advantage = vec![0.0; n];
    responses.iter().for_each(|r| advantage[r.clone()].fill(random.normal()));
    let mask: Vec<bool> = (0..n).map(|i| i % 7 != 0).collect();
    let weight = vec![1.0 / n as f64; n];
    let whole = 0..n;
    let batch = TokenBatch {
        log_prob: &log_prob[..],
        old_log_prob: &old,
        advantage: &advantage,
        mask: &mask,
        weight: &weight,
        scopes: std::slice::from_ref(&whole),
        responses: &responses,
    };
    for loss in losses().into_iter().filter(|loss| !matches!(loss, PolicyLoss::Cispo(_))) {
        let out = loss.evaluate(&batch, KEY).unwrap();
        for i in 0..n {
            let at = |step: f64| {
                let mut moved = log_prob.clone();
                moved[i] += step;
                let batch = TokenBatch { log_prob: &moved, ..batch };
                loss.apply(&batch, out.selected.clone()).unwrap().loss
            };
            let slope = (at(1e-6) - at(-1e-6)) / 2e-6;
            assert!((slope - out.dlogp[i]).abs() < 1e-7, "seed 11, {loss:?}, token {i}");
        }
    }
}

#[test]
fn on_policy_every_loss_is_plain_policy_gradient_but_for_dropped_tokens() {
    let log_prob = [-0.1f32, -2.0, -0.5, -1.0];
    let advantage = [1.0f32, -1.0, 0.5, 2.0];
    for loss in losses() {
        let batch = TokenBatch {
            log_prob: &log_prob,
            old_log_prob: &log_prob,
            advantage: &advantage,
            mask: &[true; 4],
            weight: &[1.0; 4],
            scopes: &[0..2, 2..4],
            responses: &[],
        };
        let out = loss.evaluate(&batch, KEY).unwrap();
        assert_eq!(out.stats.max_abs_log_ratio, 0.0);
        for (i, a) in advantage.iter().enumerate() {
            let dropped = matches!(loss, PolicyLoss::ClipCov(_)) && out.selected.contains(&i);
            assert_eq!(out.dlogp[i], if dropped { 0.0 } else { f64::from(-a) });
        }
    }
}

#[test]
fn beyond_the_clamp_only_the_penalty_pulls_and_nan_is_refused() {
    let batch = |log_prob| TokenBatch {
        log_prob,
        old_log_prob: &[-30.0f64],
        advantage: &[1.0],
        mask: &[true],
        weight: &[1.0],
        scopes: &[],
        responses: &[],
    };
    let [clip, _, kl_cov, ..] = losses();
    let out = kl_cov.apply(&batch(&[-5.0]), vec![0]).unwrap();
    assert_eq!((out.token_loss[0], out.dlogp[0]), (25.0 - 20f64.exp(), 1.0));
    let e = clip.apply(&batch(&[f64::NAN]), vec![]).unwrap_err();
    assert!(matches!(e.kind(), ErrorKind::Numeric(_)), "{e}");
}

#[test]
fn an_empty_batch_has_loss_zero() {
    let none: [f32; 0] = [];
    let batch = TokenBatch {
        log_prob: &none,
        old_log_prob: &none,
        advantage: &none,
        mask: &[],
        weight: &[],
        scopes: &[],
        responses: &[],
    };
    for loss in losses() {
        let out = loss.evaluate(&batch, KEY).unwrap();
        assert_eq!((out.loss, out.stats), (0.0, LossStats::default()));
    }
}

/// Two responses of equal mean ratio 1.5: GSPO clips whole responses, GMPO single tokens.
#[test]
fn the_sequence_losses_look_at_whole_responses() {
    let high = 1.5f64.ln();
    let batch = TokenBatch {
        log_prob: &[2.0 * high, 0.0, high, high],
        old_log_prob: &[0.0; 4],
        advantage: &[1.0, 1.0, -1.0, -1.0],
        mask: &[true; 4],
        weight: &[1.0; 4],
        scopes: &[],
        responses: &[0..2, 2..4],
    };
    let range = ClipRange { low: 0.2, high: 0.2 };
    let gspo = PolicyLoss::Gspo(Gspo { range }).apply(&batch, vec![]).unwrap();
    assert_eq!(gspo.token_loss[..2], [-1.2, -1.2]);
    assert_eq!(gspo.dlogp[..2], [0.0, 0.0]);
    assert!((gspo.dlogp[2] - 1.5).abs() < 1e-12 && gspo.dlogp[2] == gspo.dlogp[3]);
    assert_eq!((gspo.stats.pg_clipfrac, gspo.stats.touched_tokens), (0.5, 2));
    let gmpo = PolicyLoss::GeoMean(GeoMean { low: 0.4, high: 0.4 });
    let gmpo = gmpo.apply(&batch, vec![]).unwrap();
    assert!((gmpo.token_loss[0] + 0.2f64.exp()).abs() < 1e-12);
    assert_eq!((gmpo.dlogp[0], gmpo.dlogp[1]), (0.0, gmpo.token_loss[1]));
    assert!((gmpo.dlogp[2] - 1.5).abs() < 1e-12);
    assert_eq!((gmpo.stats.pg_clipfrac, gmpo.stats.pg_clipfrac_lower), (0.25, 0.5));
}
