//! `report.html`: the curves, the numbers and some samples of a run, in one file.
//!
//! Made from `metrics.jsonl` and the newest file of `samples/`. Plain HTML with inline SVG: no
//! script, nothing loaded from anywhere; light or dark as the reader's system is set. All text from
//! the run is escaped. Leaves out comparisons of several runs.

mod chart;

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::data::Prompt;
use crate::error::{Error, Result};
use crate::metrics::name;
use crate::samples::Sample;
use chart::{Series, chart, escape};

/// Samples shown, and characters of a text shown.
const SHOWN_SAMPLES: usize = 24;
const SHOWN_CHARS: usize = 600;

/// The charts: title, and the metrics drawn together with their labels. A metric whose name ends in
/// `*` stands for all that begin so.
const CHARTS: [(&str, &[(&str, &str)]); 8] = [
    ("Reward", &[(name::SCORE_MEAN, "mean score"), (name::ACCURACY, "accuracy")]),
    ("Validation", &[("val-core/*", "")]),
    (
        "Entropy (nats)",
        &[(name::ENTROPY, "per token"), (name::ENTROPY_PER_RESPONSE, "per response")],
    ),
    (
        "Response length (tokens)",
        &[(name::RESPONSE_LENGTH_MEAN, "mean"), ("response_length/max", "max")],
    ),
    ("Gradient norm", &[(name::GRAD_NORM, "before clipping")]),
    (
        "Covariance",
        &[(name::COV_MEAN, "mean"), (name::COV_P99, "99th percentile"), (name::COV_MAX, "max")],
    ),
    (
        "Tokens the method acted on",
        &[(name::COV_SELECTED_TOKENS, "selected"), (name::TOUCHED_TOKENS, "touched")],
    ),
    (
        "Clipping and divergence",
        &[(name::PG_CLIPFRAC, "share clipped"), (name::PPO_KL, "KL(old || new)")],
    ),
];

/// The metrics of a run: for each step an object, in order.
pub type Steps = [serde_json::Map<String, Value>];

/// Writes `report.html` into the folder of a run, and returns its path.
///
/// # Errors
/// If there are no metrics, they are not JSON lines, or the report cannot be written.
pub fn write_report(run: &Path, title: &str) -> Result<PathBuf> {
    let steps = read_metrics(&run.join("metrics.jsonl"))?;
    let config = fs::read_to_string(run.join("config.toml")).unwrap_or_default();
    let samples = newest_samples(&run.join("samples"))?;
    let path = run.join("report.html");
    let html = render(title, &steps, &samples, &config);
    fs::write(&path, html).map_err(|e| Error::io(&path, e))?;
    Ok(path)
}

/// Reads `metrics.jsonl`.
///
/// # Errors
/// If the file cannot be read, or a line is not an object.
pub fn read_metrics(path: &Path) -> Result<Vec<serde_json::Map<String, Value>>> {
    let text = fs::read_to_string(path).map_err(|e| Error::io(path, e))?;
    let read = |(index, line): (usize, &str)| {
        serde_json::from_str(line).map_err(|e| Error::data(path, index + 1, e.to_string()))
    };
    text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()).map(read).collect()
}

/// The report as HTML.
pub fn render(title: &str, steps: &Steps, samples: &[Sample], config: &str) -> String {
    let title = escape(title);
    let charts: String = CHARTS.iter().map(|(title, lines)| draw(title, lines, steps)).collect();
    let step_count = steps.len();
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <title>{title}</title><style>{STYLE}</style></head><body><h1>{title}</h1>\
         <p>{step_count} steps.</p><div class=\"charts\">{charts}</div>\
         <h2>Numbers</h2>{}{}\
         <details><summary>Configuration</summary><pre>{}</pre></details></body></html>\n",
        summary_table(steps),
        sample_table(samples),
        escape(config)
    )
}

const STYLE: &str = "\
:root{color-scheme:light dark;--bg:#fff;--fg:#1a1c20;--dim:#666d78;--line:#d9dde3;\
--s0:#1f6fd1;--s1:#c4501b;--s2:#2a8c4a;--s3:#8b4fb5;--good:#2a8c4a;--bad:#b3261e}\
@media(prefers-color-scheme:dark){:root{--bg:#15171b;--fg:#e4e7ec;--dim:#98a1ae;--line:#343a44;\
--s0:#6cabff;--s1:#ff9a62;--s2:#6bd08b;--s3:#c795ee;--good:#6bd08b;--bad:#ff8a80}}\
body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;\
background:var(--bg);color:var(--fg)}\
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2rem}\
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(20rem,1fr));gap:1.5rem}\
figure{margin:0}figcaption{font-weight:600}svg{width:100%;height:auto}\
svg text{fill:var(--dim);font-size:11px}.axis{stroke:var(--line);stroke-width:1}\
.line{fill:none;stroke-width:1.6}.c0{stroke:var(--s0)}.c1{stroke:var(--s1)}.c2{stroke:var(--s2)}\
.c3{stroke:var(--s3)}.k0{color:var(--s0)}.k1{color:var(--s1)}.k2{color:var(--s2)}.k3{color:var(--s3)}\
.key{font-size:.85rem;margin-right:1rem}.scroll{overflow-x:auto}\
table{border-collapse:collapse;font-size:.85rem}th,td{text-align:left;vertical-align:top;\
padding:.25rem .75rem .25rem 0;border-bottom:1px solid var(--line)}\
td.n{text-align:right;font-variant-numeric:tabular-nums}\
td.t{white-space:pre-wrap;overflow-wrap:anywhere;min-width:12rem;font-family:ui-monospace,monospace}\
.good{color:var(--good)}.bad{color:var(--bad)}pre{overflow-x:auto;font-size:.85rem}";

/// One chart, or nothing if the run has none of its metrics.
fn draw(title: &str, lines: &[(&str, &str)], steps: &Steps) -> String {
    let mut series = Vec::new();
    for (metric, label) in lines {
        match metric.strip_suffix('*') {
            None => series.extend(line(metric, label, steps)),
            Some(prefix) => {
                let names = names(steps);
                let matching = names.iter().filter(|n| n.starts_with(prefix));
                series.extend(matching.filter_map(|n| line(n, &n[prefix.len()..], steps)));
            }
        }
    }
    chart(title, &series)
}

fn line(metric: &str, label: &str, steps: &Steps) -> Option<Series> {
    let points: Vec<(f64, Option<f64>)> = steps
        .iter()
        .filter_map(|s| Some((s.get(name::GLOBAL_STEP)?.as_f64()?, s.get(metric)?.as_f64())))
        .collect();
    let any = points.iter().any(|(_, value)| value.is_some());
    any.then(|| Series { label: label.to_owned(), points })
}

/// All metrics of a run, in the order they first appear.
fn names(steps: &Steps) -> Vec<&str> {
    let mut seen = std::collections::HashSet::new();
    steps.iter().flat_map(|s| s.keys()).map(String::as_str).filter(|n| seen.insert(*n)).collect()
}

fn summary_table(steps: &Steps) -> String {
    let mut rows = String::new();
    for metric in names(steps) {
        let values: Vec<f64> =
            steps.iter().filter_map(|s| s.get(metric).and_then(Value::as_f64)).collect();
        let (Some(first), Some(last)) = (values.first(), values.last()) else { continue };
        let min = values.iter().copied().fold(f64::INFINITY, f64::min);
        let max = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        rows += &format!("<tr><td>{}</td>", escape(metric));
        for value in [*first, *last, mean, min, max] {
            rows += &format!("<td class=\"n\">{}</td>", chart::short(value));
        }
        rows += "</tr>";
    }
    format!(
        "<details open><summary>All metrics</summary><div class=\"scroll\"><table><tr><th>metric\
         </th><th>first</th><th>last</th><th>mean</th><th>min</th><th>max</th></tr>{rows}</table>\
         </div></details>"
    )
}

fn sample_table(samples: &[Sample]) -> String {
    let Some(first) = samples.first() else { return String::new() };
    let mut rows = String::new();
    for sample in samples.iter().take(SHOWN_SAMPLES) {
        let prompt = match &sample.prompt {
            Prompt::Text(text) => text.clone(),
            Prompt::Messages(messages) => {
                let turns = messages.iter().map(|m| format!("{}: {}", m.role, m.content));
                turns.collect::<Vec<_>>().join("\n")
            }
        };
        let verdict = if sample.correct { "good" } else { "bad" };
        rows += &format!(
            "<tr><td class=\"t\">{}</td><td class=\"t\">{}</td><td>{}</td><td>{}</td>\
             <td class=\"n {verdict}\">{}</td><td class=\"n\">{}</td><td>{}</td></tr>",
            escape(&cut(&prompt)),
            escape(&cut(&sample.text)),
            escape(&cut(&sample.predicted)),
            escape(&cut(&sample.ground_truth)),
            chart::short(sample.reward),
            chart::short(sample.advantage),
            escape(&sample.finish_reason)
        );
    }
    format!(
        "<h2>Samples of step {}</h2><div class=\"scroll\"><table><tr><th>prompt</th>\
         <th>response</th><th>read as</th><th>truth</th><th>reward</th><th>advantage</th>\
         <th>ended by</th></tr>{rows}</table></div>",
        first.step
    )
}

/// The end of a long text, where answers are.
fn cut(text: &str) -> String {
    let count = text.chars().count();
    if count <= SHOWN_CHARS {
        return text.to_owned();
    }
    let tail: String = text.chars().skip(count - SHOWN_CHARS).collect();
    format!("… {tail}")
}

/// The samples of the newest step that has any; none if there is no folder.
fn newest_samples(dir: &Path) -> Result<Vec<Sample>> {
    if !dir.is_dir() {
        return Ok(Vec::new());
    }
    let step = |path: &PathBuf| -> Option<u64> {
        path.file_name()?.to_str()?.strip_prefix("step_")?.strip_suffix(".jsonl")?.parse().ok()
    };
    let entries = fs::read_dir(dir).map_err(|e| Error::io(dir, e))?;
    let newest = entries.filter_map(|e| Some(e.ok()?.path())).filter_map(|p| Some((step(&p)?, p)));
    let Some((_, path)) = newest.max() else { return Ok(Vec::new()) };
    let text = fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
    let read = |(index, line): (usize, &str)| {
        serde_json::from_str(line).map_err(|e| Error::data(&path, index + 1, e.to_string()))
    };
    text.lines().take(SHOWN_SAMPLES).enumerate().map(read).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::{Metrics, MetricsWriter};
    use crate::samples::write_samples;
    use crate::testing::TestDir;

    fn sample() -> Sample {
        Sample {
            step: 3,
            prompt_index: 0,
            sample_index: 0,
            data_source: None,
            prompt: Prompt::Text("1<2?".into()),
            prompt_token_ids: vec![],
            token_ids: vec![],
            text: "<script>alert(1)</script> & \"so\"".into(),
            text_ends: vec![],
            log_probs: vec![],
            entropies: vec![],
            finish_reason: "stop".into(),
            ground_truth: "2".into(),
            predicted: "3".into(),
            correct: false,
            reward: -1.0,
            advantage: -0.5,
            weights_version: 0,
        }
    }

    #[test]
    fn a_report_holds_curves_numbers_and_escaped_samples_and_loads_nothing() {
        let dir = TestDir::new("report");
        let mut writer = MetricsWriter::create(&dir.path().join("metrics.jsonl")).unwrap();
        for step in 1..=3 {
            let mut m = Metrics::new();
            m.set(name::GLOBAL_STEP, f64::from(step));
            m.set(name::SCORE_MEAN, f64::from(step) * 0.25);
            m.set(name::GRAD_NORM, if step == 2 { f64::NAN } else { 1.5 });
            if step == 3 {
                m.set("val-core/arith/acc/mean@1", 0.625);
            }
            writer.write(&m).unwrap();
        }
        write_samples(dir.path(), 2, &[]).unwrap();
        write_samples(dir.path(), 3, &[sample()]).unwrap();
        let path = write_report(dir.path(), "run <1>").unwrap();
        let html = std::fs::read_to_string(path).unwrap();
        assert!(html.contains("<title>run &lt;1&gt;</title>"));
        assert_eq!(html.matches("<svg").count(), 3, "reward, validation, gradient norm");
        assert!(html.contains(
            "<td>critic/score/mean</td><td class=\"n\">0.25</td><td class=\"n\">0.75</td>"
        ));
        assert!(html.contains("&lt;script&gt;alert(1)&lt;/script&gt; &amp; &quot;so&quot;"));
        assert!(html.contains("prefers-color-scheme:dark"));
        for loaded in ["<script", "http:", "https:", "src=", "href=", "url(", "NaN"] {
            assert!(!html.contains(loaded), "{loaded}");
        }
    }

    #[test]
    fn a_run_without_metrics_is_an_error_and_without_steps_an_empty_report() {
        let dir = TestDir::new("report-none");
        assert!(write_report(dir.path(), "x").is_err());
        dir.write("metrics.jsonl", "{\"training/global_step\":1}\nnot json\n");
        let e = write_report(dir.path(), "x").unwrap_err().to_string();
        assert!(e.contains("metrics.jsonl:2: "), "{e}");
        dir.write("metrics.jsonl", "");
        write_report(dir.path(), "x").unwrap();
    }
}
