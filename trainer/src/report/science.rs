//! The paper's three views of a run: reward against entropy with its fit, the change of entropy that
//! theory predicts against the one measured, and the distribution of token covariances.
//!
//! Reward and entropy are those of one line of the metrics. The entropy is that of the step's own
//! rollouts, before its updates; a validation comes after them.

use super::chart::{Chart, Mark, Scale, Shape};
use super::data::{Run, StepSamples, step_of};
use super::text::short;
use crate::covariance::token_covariances;
use crate::dynamics::correlation;
use crate::fit::{Fit, MIN_POINTS, Point};
use crate::metrics::name;

/// What is fitted against entropy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reward {
    Validation,
    Training,
}

impl Reward {
    /// For tables and titles.
    pub(super) fn label(self) -> &'static str {
        match self {
            Self::Validation => "validation accuracy",
            Self::Training => "training accuracy",
        }
    }

    /// Its value in a line of metrics. A validation without one overall accuracy counts as the mean of
    /// its sources; training without any accuracy, as its mean score.
    fn of(self, line: &serde_json::Map<String, serde_json::Value>) -> Option<f64> {
        let get = |name: &str| line.get(name)?.as_f64();
        match self {
            Self::Training => get(name::ACCURACY).or_else(|| get(name::SCORE_MEAN)),
            Self::Validation => get(name::VAL_ACCURACY).or_else(|| {
                let source = |n: &&String| n.starts_with("val-core/") && n.contains("/acc/mean@");
                let values: Vec<f64> = line.keys().filter(source).filter_map(|n| get(n)).collect();
                let n = values.len() as f64;
                (!values.is_empty()).then(|| values.iter().sum::<f64>() / n)
            }),
        }
    }
}

/// The points of a run and their fit.
pub(super) struct RunFit {
    pub(super) label: String,
    pub(super) reward: Reward,
    /// Up to the step that was asked for.
    pub(super) fitted: Vec<Point>,
    /// After it.
    pub(super) rest: Vec<Point>,
    /// `None` if there are too few points, or entropy does not vary.
    pub(super) fit: Option<Fit>,
}

/// The fits of each run: of its validations if there are any, and of its training.
pub(super) fn fits(runs: &[Run], until: Option<u64>) -> Vec<RunFit> {
    let one = |run: &Run, reward: Reward| {
        let (mut fitted, mut rest) = (Vec::new(), Vec::new());
        for line in &run.steps {
            let entropy = line.get(name::ENTROPY).and_then(serde_json::Value::as_f64);
            let (Some(h), Some(r), Some(step)) = (entropy, reward.of(line), step_of(line)) else {
                continue;
            };
            let part =
                if until.is_none_or(|until| step <= until) { &mut fitted } else { &mut rest };
            part.push((h, r));
        }
        let fit = Fit::new(&fitted);
        RunFit { label: run.label.clone(), reward, fitted, rest, fit }
    };
    let both = |run| [Reward::Validation, Reward::Training].map(|reward| one(run, reward));
    let some = |fit: &RunFit| !fit.fitted.is_empty() || !fit.rest.is_empty();
    runs.iter().flat_map(both).filter(some).collect()
}

/// The head of the table of fits, and its rows.
pub(super) fn fit_table(fits: &[RunFit]) -> Vec<Vec<String>> {
    let head =
        ["run", "R", "points", "a", "b", "R2", "RMSE", "ceiling b-a", "points after", "RMSE after"];
    let interval = |e: crate::fit::Estimate| {
        format!("{:.4} [{:.4}, {:.4}]", e.value, e.value - e.half, e.value + e.half)
    };
    let row = |f: &RunFit| -> Vec<String> {
        let mut row =
            vec![f.label.clone(), f.reward.label().to_owned(), f.fitted.len().to_string()];
        match &f.fit {
            Some(fit) => row.extend([
                interval(fit.a),
                interval(fit.b),
                format!("{:.3}", fit.r2),
                format!("{:.4}", fit.rmse),
                interval(fit.ceiling()),
            ]),
            None => {
                let why = match f.fitted.len() < MIN_POINTS {
                    true => format!("no fit: needs {MIN_POINTS} points"),
                    false => "no fit: entropy does not vary".to_owned(),
                };
                row.extend([why, "-".into(), "-".into(), "-".into(), "-".into()]);
            }
        }
        let after = f.fit.as_ref().and_then(|fit| fit.rmse_on(&f.rest));
        row.push(f.rest.len().to_string());
        row.push(after.map_or("-".to_owned(), |rmse| format!("{rmse:.4}")));
        row
    };
    let head = head.iter().map(|cell| (*cell).to_owned()).collect();
    std::iter::once(head).chain(fits.iter().map(row)).collect()
}

/// Reward against entropy, a chart for each kind of reward.
pub(super) fn fit_charts(fits: &[RunFit]) -> Vec<Chart> {
    let chart = |reward: Reward| {
        let of: Vec<&RunFit> = fits.iter().filter(|f| f.reward == reward).collect();
        let names = of.len() > 1;
        let marks = of.iter().enumerate().flat_map(|(i, f)| f.marks(i, names)).collect();
        Chart {
            title: format!("{} against entropy, with R = -a exp(H) + b", capital(reward.label())),
            x_label: "entropy H (nats)",
            scale: Scale::Linear,
            marks,
        }
    };
    let charts = [Reward::Validation, Reward::Training].map(chart);
    charts.into_iter().filter(|chart| !chart.is_empty()).collect()
}

impl RunFit {
    /// Band, curve and points.
    fn marks(&self, colour: usize, named: bool) -> Vec<Mark> {
        let label = |what: &str| match named {
            true => format!("{} {what}", self.label),
            false => what.to_owned(),
        };
        let mark = |label, shape| Mark { label, colour, dash: 0, shape };
        let mut out = Vec::new();
        if let Some(fit) = &self.fit {
            let entropies = || self.fitted.iter().chain(&self.rest).map(|(h, _)| *h);
            // The curve goes on to entropy 0, where the ceiling is.
            let (low, high) = (entropies().fold(0.0, f64::min), entropies().fold(0.0, f64::max));
            let at = (0..=48).map(|i| low + (high - low) * f64::from(i) / 48.0);
            let curve: Vec<_> = at.map(|h| (h, fit.at(h))).collect();
            let band = curve.iter().map(|(h, e)| (*h, e.value - e.half, e.value + e.half));
            out.push(mark(label("95 % band"), Shape::Band(band.collect())));
            let line = curve.iter().map(|(h, e)| (*h, Some(e.value))).collect();
            out.push(mark(label("fit"), Shape::Line(line)));
        }
        let (fitted, rest) = match self.rest.is_empty() {
            true => ("steps", ""),
            false => ("steps fitted", "steps after"),
        };
        out.push(mark(label(fitted), Shape::Dots(self.fitted.clone())));
        if !self.rest.is_empty() {
            out.push(mark(label(rest), Shape::Rings(self.rest.clone())));
        }
        out
    }
}

/// Measured against predicted change of entropy, a chart for each theorem.
pub(super) fn dynamics_charts(runs: &[Run]) -> Vec<Chart> {
    let chart = |(theorem, metric): (&str, &str)| {
        let marks = runs.iter().enumerate().filter_map(|(colour, run)| {
            let (x, y) = changes(run, metric);
            let r = correlation(&x, &y).map_or("undefined".to_owned(), |r| format!("{r:.3}"));
            let points: Vec<Point> = x.into_iter().zip(y).collect();
            let label = format!("{}: correlation {r}, {} steps", run.label, points.len());
            (!points.is_empty()).then_some(Mark {
                label,
                colour,
                dash: 0,
                shape: Shape::Dots(points),
            })
        });
        Chart {
            title: format!("Measured change of entropy (nats) against theorem {theorem}"),
            x_label: "predicted change, up to a factor",
            scale: Scale::Linear,
            marks: marks.collect(),
        }
    };
    let charts = [("1", name::ENTROPY_PREDICTED_1), ("2", name::ENTROPY_PREDICTED_2)].map(chart);
    charts.into_iter().filter(|chart| !chart.is_empty()).collect()
}

/// What was predicted for each step, and the change measured: on the step's own tokens where a run has
/// probed them, else from the step to the next.
fn changes(run: &Run, metric: &str) -> (Vec<f64>, Vec<f64>) {
    let get = |line: &serde_json::Map<String, serde_json::Value>, name: &str| {
        line.get(name).and_then(serde_json::Value::as_f64)
    };
    let probed = run
        .steps
        .iter()
        .filter_map(|line| Some((get(line, metric)?, get(line, name::ENTROPY_PROBE_DELTA)?)));
    let pairs: (Vec<f64>, Vec<f64>) = probed.unzip();
    if !pairs.0.is_empty() {
        return pairs;
    }
    let two = run.steps.windows(2).filter_map(|two| {
        let next = step_of(&two[0]).map(|step| step + 1) == step_of(&two[1]);
        let (from, to) = (get(&two[0], name::ENTROPY)?, get(&two[1], name::ENTROPY)?);
        next.then_some((get(&two[0], metric)?, to - from))
    });
    two.unzip()
}

/// Bars of a histogram.
const BINS: usize = 50;

/// How the covariances of the tokens of a step are distributed, for the steps with samples.
pub(super) fn histograms(runs: &[Run]) -> Vec<Chart> {
    let chart = |(colour, run, samples): (usize, &Run, &StepSamples)| {
        let n = samples.log_probs.len();
        let (mask, scope) = (vec![true; n], 0..n);
        let (log_probs, advantages) = (&samples.log_probs, &samples.advantages);
        let covariances =
            token_covariances(log_probs, advantages, &mask, std::slice::from_ref(&scope));
        let bars = bars(&covariances);
        let label =
            format!("{n} tokens, mean {}", short(covariances.iter().sum::<f64>() / n as f64));
        let run = if runs.len() > 1 { format!(", {}", run.label) } else { String::new() };
        Chart {
            title: format!("Token covariances of step {}{run} (tokens)", samples.step),
            x_label: "covariance",
            scale: Scale::Log,
            marks: vec![Mark { label, colour, dash: 0, shape: Shape::Bars(bars) }],
        }
    };
    let steps = runs
        .iter()
        .enumerate()
        .flat_map(|(i, run)| run.samples.iter().map(move |samples| (i, run, samples)));
    steps.map(chart).filter(|chart| !chart.is_empty()).collect()
}

/// Counts of values in [`BINS`] equal parts of their range; values that are not finite are left out.
fn bars(values: &[f64]) -> Vec<(f64, f64, f64)> {
    let finite = || values.iter().copied().filter(|v| v.is_finite());
    let (low, high) =
        finite().fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
    if low > high {
        return Vec::new();
    }
    let width = if high > low { (high - low) / BINS as f64 } else { 1.0 };
    let mut counts = vec![0.0; BINS];
    finite().for_each(|v| counts[(((v - low) / width) as usize).min(BINS - 1)] += 1.0);
    let bar =
        |(i, count): (usize, f64)| (low + i as f64 * width, low + (i + 1) as f64 * width, count);
    counts.into_iter().enumerate().map(bar).collect()
}

fn capital(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or(String::new(), |first| first.to_uppercase().chain(chars).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Map, Value};

    fn run(lines: &[&[(&str, f64)]]) -> Run {
        let line = |line: &&[(&str, f64)]| -> Map<String, Value> {
            line.iter()
                .map(|(name, value)| {
                    let whole = value.fract() == 0.0;
                    let value =
                        if whole { Value::from(*value as i64) } else { Value::from(*value) };
                    ((*name).to_owned(), value)
                })
                .collect()
        };
        Run { label: "run".into(), steps: lines.iter().map(line).collect(), ..Run::default() }
    }

    /// Reward 0.8 - 0.2 exp(H), at ten entropies.
    fn exact() -> Run {
        let lines: Vec<Vec<(&str, f64)>> = (1..=10)
            .map(|i| {
                let h = f64::from(i) / 16.0 + 0.01;
                let r = 0.8 - 0.2 * h.exp();
                vec![(name::GLOBAL_STEP, f64::from(i)), (name::ENTROPY, h), (name::ACCURACY, r)]
            })
            .collect();
        run(&lines.iter().map(Vec::as_slice).collect::<Vec<_>>())
    }

    #[test]
    fn the_first_part_predicts_the_rest() {
        let fits = fits(&[exact()], Some(4));
        assert_eq!(fits.len(), 1, "there is no validation");
        let rows = fit_table(&fits);
        assert_eq!(rows[1][..3], ["run", "training accuracy", "4"]);
        assert_eq!(rows[1][3], "0.2000 [0.2000, 0.2000]");
        assert_eq!(rows[1][7..], ["0.6000 [0.6000, 0.6000]", "6", "0.0000"]);
        let svg = fit_charts(&fits)[0].figure();
        assert_eq!(svg.matches("<circle class=\"f0\"").count(), 4 + 1);
        assert_eq!(svg.matches("<circle class=\"o c0\"").count(), 6 + 1);
        let few = fit_table(&self::fits(&[exact()], Some(2)));
        assert_eq!(few[1][3], "no fit: needs 3 points");
    }

    #[test]
    fn validations_count_as_the_mean_of_their_sources() {
        let line = [
            (name::GLOBAL_STEP, 1.0),
            (name::ENTROPY, 0.5),
            ("val-core/a/acc/mean@4", 0.25),
            ("val-core/b/acc/mean@4", 0.75),
            ("val-core/b/acc/best@4", 0.9),
        ];
        let fits = fits(&[run(&[&line])], None);
        assert_eq!(fits[0].reward, Reward::Validation);
        assert_eq!(fits[0].fitted, [(0.5, 0.5)]);
    }

    #[test]
    fn a_prediction_is_about_the_next_step_only() {
        let line = |step: f64, h: f64, p: f64| {
            [(name::GLOBAL_STEP, step), (name::ENTROPY, h), (name::ENTROPY_PREDICTED_1, p)]
        };
        let lines = [
            line(1.0, 0.5, -0.1),
            line(2.0, 0.25, -0.2),
            line(3.0, 0.125, 0.3),
            line(5.0, 0.75, 0.4),
        ];
        let run = run(&[&lines[0], &lines[1], &lines[2], &lines[3]]);
        assert_eq!(
            changes(&run, name::ENTROPY_PREDICTED_1),
            (vec![-0.1, -0.2], vec![-0.25, -0.125])
        );
        let charts = dynamics_charts(std::slice::from_ref(&run));
        let mut probed = run.clone();
        probed.steps[1].insert(name::ENTROPY_PROBE_DELTA.to_owned(), Value::from(-0.5));
        assert_eq!(changes(&probed, name::ENTROPY_PREDICTED_1), (vec![-0.2], vec![-0.5]));
        assert_eq!(charts.len(), 1, "theorem 2 was not recorded");
        assert!(charts[0].figure().contains("run: correlation -1.000, 2 steps"));
    }

    #[test]
    fn histograms_count_every_value() {
        let counted = bars(&[0.0, 0.01, 1.0, f64::NEG_INFINITY]);
        assert_eq!(counted.len(), BINS);
        assert_eq!((counted[0].2, counted[BINS - 1].2), (2.0, 1.0));
        assert_eq!(bars(&[2.0, 2.0])[0], (2.0, 3.0, 2.0));
        assert_eq!(bars(&[f64::NAN]), []);
    }
}
