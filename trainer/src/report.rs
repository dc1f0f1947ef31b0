//! The report of one run or several: curves, the fit of reward against entropy, what theory says of
//! the entropy's change, samples and numbers, in one HTML file, and each chart as SVG.
//!
//! Made from what runs leave in their folders ([`Run`]). Plain HTML with inline SVG: no script,
//! nothing loaded from anywhere; light or dark as the reader's system is set. All text from runs is
//! escaped. Leaves out live views of a run in progress, which TensorBoard has.

mod chart;
mod csv;
mod curves;
mod data;
mod science;
mod text;
mod tokens;

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::error::{Error, Result};
use chart::Chart;
use science::RunFit;
use text::{escape, short};

pub use csv::csv;
pub use data::Run;

/// A report, in memory.
#[derive(Clone, Debug)]
pub struct Report {
    /// The page.
    pub html: String,
    /// File name and content of each chart.
    pub svgs: Vec<(String, String)>,
    /// The fits of `R = -a exp(H) + b` as a table of text; intervals are those of 95 % confidence.
    pub fits: String,
    /// What could not be used of the runs, one line each.
    pub notes: Vec<String>,
}

/// Writes `report.html` into the folder of a run, and returns its path.
///
/// # Errors
/// If there are no metrics, a file cannot be read, or the report cannot be written.
pub fn write_report(run: &Path, title: &str) -> Result<PathBuf> {
    let report = render(&read_runs(&[run])?, title, None);
    let path = run.join("report.html");
    fs::write(&path, report.html).map_err(|e| Error::io(&path, e))?;
    Ok(path)
}

/// Reads the folders of some runs, and gives them different labels.
///
/// # Errors
/// As [`Run::read`], and if no folder has a `metrics.jsonl`.
pub fn read_runs(folders: &[impl AsRef<Path>]) -> Result<Vec<Run>> {
    let runs: Result<Vec<Run>> = folders.iter().map(|folder| Run::read(folder.as_ref())).collect();
    let mut runs = runs?;
    if !runs.iter().any(|run| run.folder.join("metrics.jsonl").exists()) {
        let names: Vec<String> = runs.iter().map(|run| run.folder.display().to_string()).collect();
        return Err(Error::data(names.join(", "), None, "no metrics.jsonl, so no run to show"));
    }
    data::distinguish(&mut runs);
    Ok(runs)
}

/// The report of `runs`. With `fit_until` only steps up to it are fitted, and the others are compared
/// with what the fit predicts.
///
/// ```
/// use trainer::report::{Run, render};
/// let report = render(&[Run::default()], "an empty run", None);
/// assert!(report.html.starts_with("<!DOCTYPE html>"));
/// assert!(report.svgs.is_empty());
/// ```
pub fn render(runs: &[Run], title: &str, fit_until: Option<u64>) -> Report {
    let fits = science::fits(runs, fit_until);
    let notes = data::notes(runs);
    let sections = [
        ("Curves", String::new(), curves::charts(runs)),
        ("Reward against entropy", fit_section(&fits, fit_until), science::fit_charts(&fits)),
        ("What moves the entropy", DYNAMICS.to_owned(), science::dynamics_charts(runs)),
        ("Covariances", COVARIANCES.to_owned(), science::histograms(runs)),
    ];
    let mut body = format!("<h1>{}</h1>{}", escape(title), head(runs, &notes));
    let mut svgs: Vec<(String, String)> = Vec::new();
    for (heading, text, charts) in sections {
        if charts.is_empty() {
            continue;
        }
        let figures: String = charts.iter().map(Chart::figure).collect();
        body += &format!("<h2>{heading}</h2>{text}<div class=\"charts\">{figures}</div>");
        for chart in charts {
            svgs.push((file_name(&chart.title, svgs.len() + 1), chart.file()));
        }
    }
    body += &tokens::tables(runs);
    body += &numbers(runs);
    Report { html: page(title, &body), svgs, fits: plain_table(&science::fit_table(&fits)), notes }
}

const DYNAMICS: &str = "<p>Each dot is a step: the change of entropy by its updates, and what a theorem predicts, \
 -lr Cov(log π, π A) (1, policy gradient) or -lr Cov(log π, A) (2, natural policy gradient). Both are \
estimated from the tokens of the batch and hold up to a factor only; look at the correlation. Runs with trainer.probe_entropy \
measure the change on the step's own tokens; for others it is that from one step's tokens to the next one's, with the \
noise of other prompts.</p>";

const COVARIANCES: &str = "<p>How many tokens have which covariance (log π - mean)(A - mean), under the weights \
that sampled them; the upright axis is logarithmic. Few tokens far to the right carry most of the fall in \
entropy.</p>";

fn page(title: &str, body: &str) -> String {
    format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <title>{}</title><style>{}{STYLE}{}</style></head><body>{body}</body></html>\n",
        escape(title),
        chart::STYLE,
        tokens::STYLE
    )
}

const STYLE: &str = "\
:root{--good:#00704f;--bad:#b3261e}@media(prefers-color-scheme:dark){:root{--good:#6bd0a0;--bad:#ff8a80}}\
body{font:15px/1.5 system-ui,sans-serif;max-width:76rem;margin:1.5rem auto;padding:0 1rem;\
background:var(--bg);color:var(--fg)}\
h1{font-size:1.5rem;overflow-wrap:anywhere}h2{font-size:1.2rem;margin:2.2rem 0 .6rem}p{max-width:46rem}\
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(22rem,100%),1fr));gap:1.2rem 1.5rem}\
figure{margin:0;min-width:0}figcaption{font-weight:600;font-size:.95rem}svg{display:block;width:100%;height:auto}\
.scroll{overflow-x:auto}summary{cursor:pointer;font-weight:600;margin:.6rem 0}\
table{border-collapse:collapse;font-size:.85rem;margin:.4rem 0 1rem}th,td{text-align:left;vertical-align:top;\
padding:.25rem .9rem .25rem 0;border-bottom:1px solid var(--line)}th{white-space:nowrap}\
td.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}\
td.t{white-space:pre-wrap;overflow-wrap:anywhere;min-width:12rem;font-family:ui-monospace,monospace}\
.note{border-left:3px solid var(--s1);padding-left:.6rem;margin:.3rem 0}\
.good{color:var(--good)}.bad{color:var(--bad)}pre{overflow-x:auto;font-size:.85rem}";

/// What the runs are, and what could not be used of them.
fn head(runs: &[Run], notes: &[String]) -> String {
    let steps = |run: &Run| match runs.len() {
        1 => format!("{} steps", run.last_step()),
        _ => format!("{}: {} steps", run.label, run.last_step()),
    };
    let lengths: Vec<String> = runs.iter().map(steps).collect();
    let notes: String =
        notes.iter().map(|note| format!("<p class=\"note\">{}</p>", escape(note))).collect();
    format!("<p>{}</p>{notes}", escape(&(lengths.join("; ") + ".")))
}

/// What stands above the charts of the fit.
fn fit_section(fits: &[RunFit], until: Option<u64>) -> String {
    let rows: String = science::fit_table(fits)
        .iter()
        .enumerate()
        .map(|(index, row)| {
            let cell = if index == 0 { "th" } else { "td" };
            let cells = row.iter().map(|text| format!("<{cell}>{}</{cell}>", escape(text)));
            format!("<tr>{}</tr>", cells.collect::<String>())
        })
        .collect();
    let part = until.map_or(String::new(), |step| {
        format!(" Fitted to steps up to {step}; the later ones are what it is tested on.")
    });
    format!(
        "<p>R = -a exp(H) + b by least squares, H the mean entropy of tokens. In brackets and bands, 95 % \
         confidence if errors are independent, which neighbouring steps are not quite. b - a is the reward \
         predicted at entropy 0.{part}</p><div class=\"scroll\"><table>{rows}</table></div>"
    )
}

/// Rows of cells as text, in columns.
fn plain_table(rows: &[Vec<String>]) -> String {
    let columns = rows.first().map_or(0, Vec::len);
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// All metrics in numbers, and the configuration, of each run.
fn numbers(runs: &[Run]) -> String {
    let mut out = "<h2>Numbers</h2>".to_owned();
    for run in runs {
        let of = if runs.len() > 1 { format!(" of {}", escape(&run.label)) } else { String::new() };
        out += &format!(
            "<details><summary>All metrics{of}</summary><div class=\"scroll\"><table><tr><th>metric</th>\
             <th>first</th><th>last</th><th>mean</th><th>min</th><th>max</th></tr>{}</table></div></details>\
             <details><summary>Configuration{of}</summary><pre>{}</pre></details>",
            summary_rows(run),
            escape(&run.config)
        );
    }
    out
}

fn summary_rows(run: &Run) -> String {
    let mut rows = String::new();
    for metric in run.names() {
        let values: Vec<f64> =
            run.steps.iter().filter_map(|s| s.get(metric).and_then(Value::as_f64)).collect();
        let (Some(first), Some(last)) = (values.first(), values.last()) else { continue };
        let min = values.iter().copied().fold(f64::INFINITY, f64::min);
        let max = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let mean = values.iter().sum::<f64>() / values.len() as f64;
        rows += &format!("<tr><td>{}</td>", escape(metric));
        for value in [*first, *last, mean, min, max] {
            rows += &format!("<td class=\"n\">{}</td>", short(value));
        }
        rows += "</tr>";
    }
    rows
}

/// A file name made of a title; the number keeps names apart and in order.
fn file_name(title: &str, number: usize) -> String {
    let mut name = String::new();
    for c in title.chars().map(|c| c.to_ascii_lowercase()) {
        match c {
            'a'..='z' | '0'..='9' => name.push(c),
            _ if name.ends_with('-') || name.is_empty() => {}
            _ => name.push('-'),
        }
    }
    let name: String = name.chars().take(60).collect();
    format!("{number:02}-{}.svg", name.trim_end_matches('-'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::{Metrics, MetricsWriter, name};
    use crate::samples::write_samples;
    use crate::testing::TestDir;

    fn leave(run: &Path, steps: u32) {
        fs::create_dir_all(run).unwrap();
        let mut writer = MetricsWriter::create(&run.join("metrics.jsonl")).unwrap();
        for step in 1..=steps {
            let mut m = Metrics::new();
            m.set(name::GLOBAL_STEP, f64::from(step));
            m.set(name::SCORE_MEAN, f64::from(step) * 0.25);
            m.set(name::GRAD_NORM, if step == 2 { f64::NAN } else { 1.5 });
            m.set(name::ENTROPY, 1.0 / f64::from(step));
            if step == 3 {
                m.set("val-core/<b>/acc/mean@1", 0.625);
            }
            writer.write(&m).unwrap();
        }
    }

    #[test]
    fn a_report_holds_everything_escaped_and_loads_nothing() {
        let dir = TestDir::new("report");
        leave(dir.path(), 3);
        dir.write("config.toml", "# </pre><script>\n[trainer]\ntotal_steps = 4\n");
        write_samples(dir.path(), 2, &[]).unwrap();
        write_samples(dir.path(), 3, &[tokens::tests::hostile()]).unwrap();
        let path = write_report(dir.path(), "run <1>").unwrap();
        let html = fs::read_to_string(path).unwrap();
        assert!(html.contains("<title>run &lt;1&gt;</title>"));
        assert!(html.contains(": 3 of 4 steps are done</p>"), "{html}");
        // Reward, validation, entropy, gradient norm, two fits, one histogram.
        assert_eq!(html.matches("<svg").count(), 7);
        assert!(html.contains(
            "<td>critic/score/mean</td><td class=\"n\">0.25</td><td class=\"n\">0.75</td>"
        ));
        assert!(html.contains("&lt;/pre&gt;&lt;script&gt;"));
        assert!(html.contains("prefers-color-scheme:dark"));
        for loaded in
            ["<script", "http:", "https:", "src=", "href=", "url(", "NaN", "onload='", "<b>"]
        {
            assert!(!html.contains(loaded), "{loaded}");
        }
    }

    #[test]
    fn runs_stand_side_by_side_in_the_page_and_as_files() {
        let dir = TestDir::new("report-several");
        let folders = ["<i>", "b", "empty"].map(|name| dir.path().join(name));
        leave(&folders[0], 6);
        leave(&folders[1], 4);
        fs::create_dir(&folders[2]).unwrap();
        let report = render(&read_runs(&folders).unwrap(), "several", Some(4));
        assert_eq!(
            report.notes,
            ["empty: no metrics.jsonl", "runs differ in length: last steps are <i> 6, b 4"]
        );
        let names: Vec<&str> = report.svgs.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names[0], "01-reward-mean-score.svg");
        assert_eq!(report.svgs[0].1.matches("<polyline").count(), 2);
        assert!(report.svgs[0].1.contains(">&lt;i&gt;</text>"));
        let rows: Vec<&str> = report.fits.lines().collect();
        assert!(rows[0].starts_with("run  R                    points  a "), "{}", report.fits);
        assert!(rows[1].starts_with("<i>  validation accuracy  1       no fit: needs 3 points"));
        assert!(rows[2].starts_with("<i>  training accuracy    4       "), "{}", report.fits);
        assert!(report.html.contains("Fitted to steps up to 4"));
        assert!(!report.html.contains("<i>") || !report.html.contains("<i>:"));
    }

    #[test]
    fn a_run_without_metrics_is_an_error_and_without_steps_an_empty_report() {
        let dir = TestDir::new("report-none");
        let error = write_report(dir.path(), "x").unwrap_err().to_string();
        assert!(error.ends_with("no metrics.jsonl, so no run to show"), "{error}");
        dir.write("metrics.jsonl", "{\"training/global_step\":1}\nnot json\n");
        let html = fs::read_to_string(write_report(dir.path(), "x").unwrap()).unwrap();
        assert!(html.contains("1 damaged lines of metrics.jsonl, the first is 2</p>"));
        dir.write("metrics.jsonl", "");
        let html = fs::read_to_string(write_report(dir.path(), "x").unwrap()).unwrap();
        assert!(html.contains("no steps yet</p>"));
    }
}
