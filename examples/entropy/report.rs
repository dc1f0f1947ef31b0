//! The table, the curves and the page.

use std::error::Error;
use std::fmt::Write as _;
use std::fs;

use serde_json::{Map, Value};
use trainer::config::Method;
use trainer::fit::Fit;
use trainer::metrics::name;
use trainer::report::{Run, render};

use super::measure::KS;
use super::plan::Plan;
use super::runs::Done;

/// Steps at the end over which entropy and reward are meant.
const LAST: usize = 10;

/// A method's runs, one for each seed.
struct Series {
    method: Method,
    runs: Vec<Run>,
}

/// Writes everything into the plan's folder; returns the table.
pub(crate) fn write(plan: &Plan, done: &[Done]) -> Result<String, Box<dyn Error>> {
    let read = |method: &Method| {
        let runs = plan.seeds.iter().map(|seed| Run::read(&plan.folder(*method, *seed)));
        Ok(Series { method: *method, runs: runs.collect::<trainer::Result<_>>()? })
    };
    let all: Vec<Series> = plan.methods.iter().map(read).collect::<trainer::Result<_>>()?;
    let means: Vec<Run> = all.iter().map(Series::mean).collect();
    let seeds = plan.seeds.len();
    let page = render(&means, &format!("Entropy and reward, means of {seeds} seeds"), None);
    fs::write(plan.output.join("report.html"), page.html)?;
    let charts = plan.output.join("charts");
    fs::create_dir_all(&charts)?;
    for (file, svg) in page.svgs {
        fs::write(charts.join(file), svg)?;
    }
    fs::write(plan.output.join("curves.csv"), curves(&all))?;
    let table = table(plan, &all, done);
    fs::write(plan.output.join("results.md"), &table)?;
    Ok(table)
}

impl Series {
    /// Every metric's mean over the seeds, step by step.
    fn mean(&self) -> Run {
        let mut run = Run::default();
        self.method.name().clone_into(&mut run.label);
        let shortest = self.runs.iter().map(|run| run.steps.len()).min().unwrap_or(0);
        for index in 0..shortest {
            let mut line = Map::new();
            for key in self.runs[0].steps[index].keys() {
                let values: Vec<f64> =
                    self.runs.iter().filter_map(|r| r.steps[index].get(key)?.as_f64()).collect();
                line.insert(key.clone(), Value::from(mean(&values)));
            }
            let step = self.runs[0].steps[index][name::GLOBAL_STEP].clone();
            line.insert(name::GLOBAL_STEP.to_owned(), step);
            run.steps.push(line);
        }
        run
    }

    /// The mean of a metric over the last steps of each seed.
    fn last(&self, metric: &str) -> Vec<f64> {
        let of = |run: &Run| {
            let values: Vec<f64> = run.series(metric).into_iter().filter_map(|(_, v)| v).collect();
            mean(&values[values.len().saturating_sub(LAST)..])
        };
        self.runs.iter().map(of).collect()
    }

    /// R = -a exp(H) + b over the steps of all seeds that have a reward of this name.
    fn fit(&self, reward: &str) -> Option<Fit> {
        let points = self.runs.iter().flat_map(|run| &run.steps).filter_map(|line| {
            Some((line.get(name::ENTROPY)?.as_f64()?, line.get(reward)?.as_f64()?))
        });
        Fit::new(&points.collect::<Vec<_>>())
    }
}

/// The table in Markdown: means over the seeds, with the standard deviation where there are several.
fn table(plan: &Plan, all: &[Series], done: &[Done]) -> String {
    let seeds = plan.seeds.len();
    let mut out = String::from(
        "| method | entropy | x first | reward | greedy | mean@n | pass@2 | pass@8 | pass@32 | a | b | R2 | R2 held out |\n\
         |---|---|---|---|---|---|---|---|---|---|---|---|---|\n",
    );
    let first = all.first().map_or(f64::NAN, |series| mean(&series.last(name::ENTROPY)));
    for series in all {
        let of = |value: &dyn Fn(&Done) -> f64| -> Vec<f64> {
            done.iter().filter(|run| run.method == series.method).map(value).collect()
        };
        let entropy = series.last(name::ENTROPY);
        let mut cells = vec![
            series.method.name().to_owned(),
            spread(&entropy),
            format!("{:.1}", mean(&entropy) / first),
            spread(&series.last(name::SCORE_MEAN)),
            spread(&of(&|run| run.measured.greedy)),
            spread(&of(&|run| run.measured.sampled.mean)),
        ];
        cells.extend(KS.map(|k| match k <= plan.samples {
            true => spread(&of(&|run| run.measured.sampled.pass[&k])),
            false => "-".to_owned(),
        }));
        let fit = series.fit(name::ACCURACY);
        cells.extend(match &fit {
            Some(fit) => [fit.a.value, fit.b.value, fit.r2].map(|value| format!("{value:.2}")),
            None => ["-", "-", "-"].map(str::to_owned),
        });
        let held_out = series.fit("val/accuracy");
        cells.push(held_out.map_or("-".to_owned(), |fit| format!("{:.2}", fit.r2)));
        writeln!(out, "| {} |", cells.join(" | ")).expect("a string takes everything");
    }
    out += &format!(
        "\nMeans over {seeds} seeds (+- standard deviation). entropy: of the tokens of the last {LAST} steps, nats, and as \
         multiples of the first method's; reward: of training, over the same; greedy, mean@n, pass@k: the last weights on \
         held-out tasks, sampled at temperature 1; a, b, R2: R = -a exp(H) + b over all steps, R the accuracy of training; R2 held out: of a fit to the validations.\n"
    );
    out
}

/// One line a step of a run.
fn curves(all: &[Series]) -> String {
    let columns = [name::ENTROPY, name::ENTROPY_PER_RESPONSE, name::SCORE_MEAN, "val/accuracy"];
    let mut out = format!("method,seed,step,{}\n", columns.join(","));
    for series in all {
        for (seed, run) in series.runs.iter().enumerate() {
            for line in &run.steps {
                let cell = |column: &str| match line.get(column).and_then(Value::as_f64) {
                    Some(value) => value.to_string(),
                    None => String::new(),
                };
                let cells: Vec<String> = columns.iter().map(|column| cell(column)).collect();
                let (method, step) = (series.method.name(), &line[name::GLOBAL_STEP]);
                writeln!(out, "{method},{seed},{step},{}", cells.join(","))
                    .expect("a string takes everything");
            }
        }
    }
    out
}

fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}

/// Mean, and standard deviation of several.
fn spread(values: &[f64]) -> String {
    let (n, mean) = (values.len() as f64, mean(values));
    match values.len() {
        0 | 1 => format!("{mean:.3}"),
        _ => {
            let squares = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>();
            format!("{mean:.3} +- {:.3}", (squares / (n - 1.0)).sqrt())
        }
    }
}
