//! `extra_policy_losses_tis.json`: the losses. Gradients there are of the aggregated loss.

use serde_json::{Value, from_value};
use trainer::agg::{AggMode, reduce, weights};
use trainer::loss::{
    Cispo, ClipRange, GeoMean, Gspo, LOG_RATIO_CLAMP, LossOutput, PolicyLoss, Sapo,
};

use crate::common::{REDUCED, SINGLE, TOKEN, Tolerance, close, close_tokens, known, required};
use crate::correction;
use crate::losses::Inputs;

const FIELDS: [&str; 9] = [
    "name",
    "log_prob",
    "old_log_prob",
    "advantages",
    "response_mask",
    "rollout_log_prob",
    "expected",
    "rollout_is_threshold",
    "tis",
];

pub(crate) fn losses_and_correction(cases: &[Value]) {
    for case in cases {
        known(case, &FIELDS);
        for (name, want) in case["expected"].as_object().unwrap() {
            let what = format!("{}, {name}", case["name"]);
            one_loss(case, (name, want), &what);
        }
        correction::weights(case);
    }
}

/// The loss of a name with verl's settings: tau as in its defaults, CISPO's and GMPO's ranges given.
fn loss(name: &str, want: &Value) -> PolicyLoss {
    let (low, high) = (required(&want["clip_ratio_low"]), required(&want["clip_ratio_high"]));
    let range = ClipRange { low, high };
    let log_ratio_clamp = Some(LOG_RATIO_CLAMP);
    match name {
        "gspo" => PolicyLoss::Gspo(Gspo { range }),
        "cispo" => PolicyLoss::Cispo(Cispo { range, log_ratio_clamp }),
        "sapo" => PolicyLoss::Sapo(Sapo { tau_pos: 1.0, tau_neg: 1.05, log_ratio_clamp }),
        "gpg" => PolicyLoss::Gpg,
        "geo_mean" => PolicyLoss::GeoMean(GeoMean { low, high }),
        other => panic!("unknown loss {other}"),
    }
}

fn one_loss(case: &Value, (name, want): (&str, &Value), what: &str) {
    known(want, &["clip_ratio_low", "clip_ratio_high", "agg", "loss", "grad_logprob", "metrics"]);
    let loss = loss(name, want);
    let mut inputs = Inputs::new(case);
    // verl's GMPO takes the mean over responses, whichever mode is asked for.
    let mode = match name {
        "geo_mean" => AggMode::SeqMeanTokenMean,
        _ => from_value(want["agg"].clone()).unwrap(),
    };
    let columns = inputs.columns() as f64;
    inputs.weight = weights(mode, &inputs.lengths, &inputs.mask, columns);
    let got = loss.apply(&inputs.batch(), vec![]).unwrap();
    // Means over a response carry +1e-8 in GSPO and GMPO, and so do their ratios.
    let shared = ["gspo", "geo_mean", "sapo"].contains(&name);
    compare(&got, want, &inputs, (if shared { REDUCED } else { TOKEN }, what));
    compare(&inputs.apply_single(&loss, &[]), want, &inputs, (SINGLE, what));
    known(&want["metrics"], &["pg_clipfrac", "ppo_kl", "pg_clipfrac_lower"]);
    for (metric, value) in want["metrics"].as_object().unwrap() {
        let got = match metric.as_str() {
            "pg_clipfrac" => got.stats.pg_clipfrac,
            "ppo_kl" => got.stats.ppo_kl,
            _ => got.stats.pg_clipfrac_lower,
        };
        close(got, required(value), REDUCED, &format!("{what}, {metric}"));
    }
}

fn compare(got: &LossOutput, want: &Value, inputs: &Inputs, how: (Tolerance, &str)) {
    let (tolerance, what) = how;
    close_tokens(&got.dlogp, &want["grad_logprob"], &inputs.mask, tolerance, what);
    let reduced = if tolerance.relative > 1e-6 { SINGLE } else { REDUCED };
    close(reduce(&inputs.weight, &got.token_loss), required(&want["loss"]), reduced, what);
}
