//! Which metrics of a run are drawn over its steps, and with which others.
//!
//! One run: a chart a group of metrics, a colour a metric. Several: a chart a metric, a colour a run,
//! so that runs stand side by side.

use super::chart::{Chart, Mark};
use super::data::Run;
use crate::metrics::name;

/// A title, and the metrics drawn together with their labels. A metric whose name ends in `*` stands
/// for all that begin so.
type Group = (&'static str, &'static [(&'static str, &'static str)]);

const GROUPS: [Group; 15] = [
    ("Reward", &[(name::SCORE_MEAN, "mean score"), (name::ACCURACY, "accuracy")]),
    ("Validation", &[("val/accuracy", "accuracy"), ("val/reward", "reward"), ("val-core/*", "")]),
    (
        "Entropy (nats)",
        &[(name::ENTROPY, "mean of tokens"), (name::ENTROPY_PER_RESPONSE, "mean of responses")],
    ),
    ("Change of entropy since the step before (nats)", &[(name::ENTROPY_DELTA, "measured")]),
    (
        "Response length (tokens)",
        &[(name::RESPONSE_LENGTH_MEAN, "mean"), ("response_length/max", "max")],
    ),
    ("Share of responses cut off", &[(name::RESPONSE_CLIP_RATIO, "cut off")]),
    (
        "Share of tokens clipped",
        &[(name::PG_CLIPFRAC, "clipped"), (name::PG_CLIPFRAC_LOWER, "by the lower bound")],
    ),
    (
        "Covariance of tokens",
        &[(name::COV_MEAN, "mean"), (name::COV_P99, "99th percentile"), (name::COV_MAX, "max")],
    ),
    (
        "Mean covariance of the largest",
        &[
            ("cov/top_0.02pct_mean", "0.02 %"),
            ("cov/top_0.2pct_mean", "0.2 %"),
            ("cov/top_2pct_mean", "2 %"),
            ("cov/top_20pct_mean", "20 %"),
            ("cov/top_50pct_mean", "50 %"),
            (name::COV_MEAN, "all"),
        ],
    ),
    ("Share of tokens with covariance in [1, 5]", &[(name::COV_SHARE_1_TO_5, "in [1, 5]")]),
    (
        "Tokens the method acted on",
        &[(name::COV_SELECTED_TOKENS, "selected"), (name::TOUCHED_TOKENS, "touched")],
    ),
    ("Gradient norm", &[(name::GRAD_NORM, "before clipping")]),
    (
        "Divergence from the sampling policy (nats)",
        &[
            (name::PPO_KL, "KL"),
            (name::PPO_KL_ABS, "mean absolute"),
            ("actor/kl_loss", "KL to the reference"),
        ],
    ),
    (
        "Time of a step (s)",
        &[
            (name::TIME_STEP, "all"),
            (name::TIME_GEN, "sampling"),
            (name::TIME_REWARD, "rewards"),
            (name::TIME_UPDATE_ACTOR, "learning"),
            (name::TIME_TESTING, "validation"),
        ],
    ),
    ("Throughput (tokens/s)", &[(name::THROUGHPUT, "prompts and responses")]),
];

/// The charts of some runs; those without a point are left out.
pub(super) fn charts(runs: &[Run]) -> Vec<Chart> {
    let mut out = Vec::new();
    for (title, metrics) in GROUPS {
        let metrics = expanded(runs, metrics);
        match runs {
            [run] => {
                let marks = metrics
                    .iter()
                    .enumerate()
                    .map(|(i, (metric, label))| Mark::line(label, i, run.series(metric)));
                out.push(Chart::over_steps(title, marks.collect()));
            }
            _ => out.extend(metrics.iter().map(|(metric, label)| {
                let marks = runs
                    .iter()
                    .enumerate()
                    .map(|(i, run)| Mark::line(&run.label, i, run.series(metric)));
                let title = match metrics.len() {
                    1 => title.to_owned(),
                    _ => format!("{title}: {label}"),
                };
                Chart::over_steps(title, marks.collect())
            })),
        }
    }
    out.retain(|chart| !chart.is_empty());
    out
}

/// Metrics and labels, with those that any run has in place of a `*`.
fn expanded(runs: &[Run], metrics: &[(&str, &str)]) -> Vec<(String, String)> {
    let mut out: Vec<(String, String)> = Vec::new();
    for (metric, label) in metrics {
        let Some(prefix) = metric.strip_suffix('*') else {
            out.push(((*metric).to_owned(), (*label).to_owned()));
            continue;
        };
        for name in runs.iter().flat_map(Run::names).filter(|name| name.starts_with(prefix)) {
            if !out.iter().any(|(known, _)| known == name) {
                out.push((name.to_owned(), name[prefix.len()..].to_owned()));
            }
        }
    }
    out
}
