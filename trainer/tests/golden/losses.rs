//! `policy_loss_vanilla.json`, `policy_loss_clip_cov.json`, `policy_loss_kl_cov.json`.

use std::ops::Range;

use serde_json::{Value, from_value};
use trainer::agg::{AggMode, reduce, weights};
use trainer::covariance::token_covariances;
use trainer::loss::{
    Clip, ClipCov, ClipRange, KlCov, LOG_RATIO_CLAMP, LossOutput, PolicyLoss, TokenBatch,
    clip_cov_candidates, clip_cov_count, kl_cov_count, kl_cov_select,
};

use crate::common::{
    REDUCED, SINGLE, TOKEN, Tolerance, close, close_tokens, known, lengths, mask, matrix, required,
    row_ranges, single, tokens,
};

/// The inputs of a case, and weights of 1 so that derivatives come out un-aggregated.
pub(crate) struct Inputs {
    log_prob: Vec<f64>,
    old_log_prob: Vec<f64>,
    advantage: Vec<f64>,
    pub(crate) mask: Vec<bool>,
    pub(crate) weight: Vec<f64>,
    pub(crate) lengths: Vec<usize>,
    scopes: Vec<Range<usize>>,
    responses: Vec<Range<usize>>,
}

impl Inputs {
    pub(crate) fn new(case: &Value) -> Self {
        let mask = mask(&case["response_mask"]);
        Self {
            log_prob: matrix(&case["log_prob"]),
            old_log_prob: matrix(&case["old_log_prob"]),
            advantage: matrix(&case["advantages"]),
            weight: vec![1.0; mask.len()],
            responses: row_ranges(&lengths(&case["response_mask"])),
            lengths: lengths(&case["response_mask"]),
            scopes: std::iter::once(0..mask.len()).collect(),
            mask,
        }
    }

    pub(crate) fn batch(&self) -> TokenBatch<'_, f64> {
        TokenBatch {
            log_prob: &self.log_prob,
            old_log_prob: &self.old_log_prob,
            advantage: &self.advantage,
            mask: &self.mask,
            weight: &self.weight,
            scopes: &self.scopes,
            responses: &self.responses,
        }
    }

    pub(crate) fn columns(&self) -> usize {
        self.lengths[0]
    }

    /// Applies a loss to the inputs rounded to f32.
    pub(crate) fn apply_single(&self, loss: &PolicyLoss, selected: &[usize]) -> LossOutput {
        let (log_prob, old) = (single(&self.log_prob), single(&self.old_log_prob));
        let advantage = single(&self.advantage);
        let batch = TokenBatch {
            log_prob: &log_prob,
            old_log_prob: &old,
            advantage: &advantage,
            mask: &self.mask,
            weight: &self.weight,
            scopes: &self.scopes,
            responses: &self.responses,
        };
        let mut out = loss.apply(&batch, selected.to_vec()).unwrap();
        out.token_loss.iter_mut().for_each(|l| *l = f64::from(*l as f32));
        out.dlogp.iter_mut().for_each(|l| *l = f64::from(*l as f32));
        out
    }
}

/// Fails for a case of another shape.
fn known_fields(case: &Value) {
    let fields = "name log_prob old_log_prob advantages response_mask expected note clip_ratio_low \
                  clip_ratio_high clip_ratio_c clip_cov_ratio clip_cov_lb clip_cov_ub torch_seed \
                  kl_cov_ratio k_percent_prime_rl ppo_kl_coef microbatches";
    known(case, &fields.split_whitespace().collect::<Vec<_>>());
}

/// Token losses, derivatives and every aggregation of them.
fn compare(
    got: &LossOutput,
    want: &Value,
    losses: &Value,
    inputs: &Inputs,
    how: (Tolerance, &str),
) {
    let (tolerance, what) = how;
    close_tokens(&got.token_loss, &want["pg_losses"], &inputs.mask, tolerance, what);
    close_tokens(&got.dlogp, &want["d_loss_d_logprob"], &inputs.mask, tolerance, what);
    let reduced = Tolerance { relative: tolerance.relative.max(1e-6), ..REDUCED };
    let reduced = if tolerance.relative > 1e-6 { SINGLE } else { reduced };
    let modes = losses.as_object().unwrap();
    assert_eq!(modes.len(), 4, "{what}");
    for (mode_name, want) in modes {
        let mode: AggMode = from_value(Value::from(mode_name.as_str())).unwrap();
        let w = weights(mode, &inputs.lengths, &inputs.mask, inputs.columns() as f64);
        let got = reduce(&w, &got.token_loss);
        close(got, required(want), reduced, &format!("{what}, {mode_name}"));
    }
}

pub(crate) fn vanilla(cases: &[Value]) {
    for case in cases {
        known_fields(case);
        let inputs = Inputs::new(case);
        let setting = |key: &str| required(&case[key]);
        let range = ClipRange { low: setting("clip_ratio_low"), high: setting("clip_ratio_high") };
        for (reference, dual, log_ratio_clamp) in [
            ("prime_rl", None, None),
            ("verl", Some(setting("clip_ratio_c")), Some(LOG_RATIO_CLAMP)),
        ] {
            let what = format!("{}, {reference}", case["name"]);
            let want = &case["expected"][reference];
            let loss = PolicyLoss::Clip(Clip { range, dual, log_ratio_clamp });
            let got = loss.apply(&inputs.batch(), vec![]).unwrap();
            let mut losses = want["loss"].clone();
            if losses["seq-mean-token-mean"] == "nan" {
                // The original divides 0 by 0 in a row without tokens; verl leaves the row out.
                losses = case["expected"]["verl"]["loss"].clone();
            }
            compare(&got, want, &losses, &inputs, (TOKEN, &what));
            compare(&inputs.apply_single(&loss, &[]), want, &losses, &inputs, (SINGLE, &what));
            close(got.stats.pg_clipfrac, required(&want["pg_clipfrac"]), REDUCED, &what);
            close(got.stats.ppo_kl, required(&want["ppo_kl"]), REDUCED, &what);
            if reference == "verl" {
                let lower = required(&want["pg_clipfrac_lower"]);
                close(got.stats.pg_clipfrac_lower, lower, REDUCED, &what);
            }
        }
    }
}

pub(crate) fn clip_cov(cases: &[Value]) {
    for case in cases {
        known_fields(case);
        let inputs = Inputs::new(case);
        let setting = |key: &str| required(&case[key]);
        let settings = ClipCov {
            range: ClipRange { low: setting("clip_ratio_low"), high: setting("clip_ratio_high") },
            ratio: setting("clip_cov_ratio"),
            lower: setting("clip_cov_lb"),
            upper: setting("clip_cov_ub"),
            log_ratio_clamp: None,
        };
        let (want, what) = (&case["expected"], case["name"].as_str().unwrap());
        let columns = inputs.columns();
        let clipped = tokens(&want["clipped_by_ppo"], columns);
        let mut cov = covariances(&inputs);
        clipped.iter().for_each(|i| cov[*i] = f64::NEG_INFINITY);
        close_tokens(&cov, &want["cov"], &inputs.mask, REDUCED, what);
        let valid = inputs.mask.iter().filter(|m| **m).count();
        assert_eq!(valid as f64, required(&want["num_valid"]), "{what}");
        let count = clip_cov_count(settings.ratio, valid);
        assert_eq!(count as f64, required(&want["clip_num"]), "{what}");
        let candidates = tokens(&want["candidates_row_major"], columns);
        assert_eq!(clip_cov_candidates(&inputs.batch(), &settings), [candidates], "{what}");
        let selected = tokens(&want["selected"], columns);
        let loss = PolicyLoss::ClipCov(settings);
        let got = loss.apply(&inputs.batch(), selected.clone()).unwrap();
        let losses = &want["loss_verl"];
        compare(&got, want, losses, &inputs, (TOKEN, what));
        compare(&inputs.apply_single(&loss, &selected), want, losses, &inputs, (SINGLE, what));
        close(got.stats.pg_clipfrac, required(&want["pg_clipfrac"]), REDUCED, what);
        close(got.stats.ppo_kl, required(&want["ppo_kl"]), REDUCED, what);
    }
}

pub(crate) fn kl_cov(cases: &[Value]) {
    for case in cases {
        known_fields(case);
        let mut inputs = Inputs::new(case);
        let settings = KlCov {
            ratio: required(&case["kl_cov_ratio"]),
            coef: required(&case["ppo_kl_coef"]),
            log_ratio_clamp: None,
        };
        let (want, what) = (&case["expected"], case["name"].as_str().unwrap());
        close_tokens(&covariances(&inputs), &want["cov"], &inputs.mask, TOKEN, what);
        let valid = inputs.mask.iter().filter(|m| **m).count();
        assert_eq!(valid as f64, required(&want["num_valid"]), "{what}");
        let count = kl_cov_count(settings.ratio, valid);
        assert_eq!(count as f64, required(&want["k"]), "{what}");
        let loss = PolicyLoss::KlCov(settings);
        let selected = kl_cov_select(&inputs.batch(), settings.ratio);
        let got = loss.apply(&inputs.batch(), selected.clone()).unwrap();
        close(got.stats.ppo_kl_abs, required(&want["ppo_kl_abs"]), REDUCED, what);
        if what == "all_zero_advantages" {
            // Every covariance is 0, so the reference's choice is arbitrary and not given.
            assert!(want.get("selected_sorted").is_none());
            continue;
        }
        assert_eq!(selected, tokens(&want["selected_sorted"], inputs.columns()), "{what}");
        let losses = &want["loss_verl"];
        compare(&got, want, losses, &inputs, (TOKEN, what));
        compare(&inputs.apply_single(&loss, &selected), want, losses, &inputs, (SINGLE, what));
        if let Some(batches) = case.get("microbatches") {
            let rows: Vec<Vec<usize>> = from_value(batches.clone()).unwrap();
            let columns = inputs.columns();
            inputs.scopes =
                rows.iter().map(|r| r[0] * columns..(r[r.len() - 1] + 1) * columns).collect();
            let selected = kl_cov_select(&inputs.batch(), settings.ratio);
            let per_micro_batch = tokens(&want["selected_if_scoped_per_microbatch"], columns);
            assert_eq!(selected, per_micro_batch, "{what}");
        }
    }
}

fn covariances(inputs: &Inputs) -> Vec<f64> {
    token_covariances(&inputs.log_prob, &inputs.advantage, &inputs.mask, &inputs.scopes)
}
