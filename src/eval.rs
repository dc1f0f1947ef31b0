//! `engine eval`: how often a model's responses are right, by verifier, for each data source.
//!
//! Everything is read and checked before the first token is computed; the maths is the trainer's. Files
//! appear when they are whole.

use serde_json::{Value, json};
use trainer::config::PromptTemplate;
use trainer::data::{Duplicates, Row, Scripts, Selection};
use trainer::eval::{EvalSettings, Evaluation, Judge, Response, Summary, evaluate};
use trainer::verifier::{self, Counts};
use trainer::{Overlong, PromptEncoder, RlConfig, eval_rows};

use crate::args_eval::{EvalArgs, TemplateArg};
use crate::exit::{Failure, Result};
use crate::model;
use crate::output::{self, Output};
use crate::progress::Progress;
use crate::signals::{self, Signals};
use crate::terminal::Terminal;

/// What the results of all rows are called.
const ALL: &str = "all";

/// Runs the command.
pub(crate) fn run(args: &EvalArgs, terminal: &Terminal) -> Result<()> {
    let settings = settings(args)?;
    let ks = ks(args)?;
    let reward =
        [("reward.function", &args.reward), ("reward.timeout_s", &args.reward_timeout.to_string())];
    let reward = reward.map(|(key, value)| (key.to_owned(), value.clone()));
    let rewards = verifier::Judge::new(&RlConfig::resolve(None, None, &reward)?.reward)?;
    let duplicates = if args.deduplicate { Duplicates::Drop } else { Duplicates::Keep };
    let mut rows = eval_rows(&args.data, Selection { duplicates, scripts: Scripts::All })?;
    rows.rows.iter().try_for_each(|row| rewards.check(row))?;
    let _signals = Signals::listen()?;
    let _at_once = signals::end_at_once();
    let config = model::engine_config(&args.common, &args.engine)?;
    let mut engine = model::load(&args.model, &config, terminal)?;
    // One token at least is left to the response.
    let room = engine.max_model_len() - 1;
    let text = (engine.tokenizer(), engine.chat_template());
    let encoder = PromptEncoder::new(text, template(args.prompt_template), room)?.within(room);
    let overlong = match args.filter_overlong_prompts {
        true => Overlong::Drop,
        false => Overlong::Refuse,
    };
    encoder.fit(&mut rows, overlong)?;
    terminal.info(&format!("data: {}", rows.report));
    note_greedy(args, &settings, &rows.rows, terminal);
    // Made to find out early whether they can be, and removed: a signal leaves nothing behind.
    args.output.iter().chain(&args.samples).try_for_each(|path| Output::check(path))?;

    let total = rows.rows.iter().map(|row| settings.sampling(row.data_source.as_deref()).samples);
    let mut progress = Progress::new(terminal, "responses", total.sum());
    let (mut done, mut tokens) = (0, 0);
    let mut tell = |response: &Response| {
        done += 1;
        tokens += response.tokens.len();
        progress.update(done, tokens);
    };
    let judge = Judge { encoder: &encoder, rewards: &rewards, rows: &rows.rows };
    let responses = evaluate(&mut engine, judge, &settings, &mut tell)?;
    progress.finish(done, tokens);
    let failed = rewards.take_counts();
    let results = Results::new(Evaluation::of(&rows.rows, &responses), &ks);
    let json = results.json(args, failed);
    Files::open(args)?.finish(&rows.rows, &responses, &json)?;
    note_failures(&args.reward, failed, &responses, terminal)?;
    match args.json {
        true => output::print(&json.to_string()),
        false => output::print(&results.table()),
    }
}

/// How responses are drawn.
fn settings(args: &EvalArgs) -> Result<EvalSettings> {
    let refuse = |name: &str, value: String, limit: &str| {
        Err(Failure::usage(format!("--{name} is {value}, limit is {limit}")))
    };
    let most = engine::MAX_SAMPLES;
    if args.n == 0 || args.n > most {
        return refuse("n", args.n.to_string(), &format!("1 to {most}"));
    }
    if let Some(t) = args.temperature.filter(|t| !(0.0..=100.0).contains(t)) {
        return refuse("temperature", t.to_string(), "0 to 100");
    }
    if !(args.top_p > 0.0 && args.top_p <= 1.0) {
        return refuse("top-p", args.top_p.to_string(), "above 0, up to 1");
    }
    if args.top_k < -1 {
        return refuse("top-k", args.top_k.to_string(), "-1 or more");
    }
    if args.max_tokens == 0 {
        return refuse("max-tokens", "0".to_owned(), "1 or more");
    }
    Ok(EvalSettings {
        samples: args.n,
        temperature: args.temperature,
        top_p: args.top_p,
        top_k: usize::try_from(args.top_k).ok().filter(|k| *k > 0),
        max_tokens: args.max_tokens,
        stop: args.stop.clone(),
        seed: args.common.seed,
    })
}

/// The numbers of responses that results are given for.
fn ks(args: &EvalArgs) -> Result<Vec<usize>> {
    if let Some(k) = args.k.iter().find(|k| !(1..=args.n).contains(*k)) {
        return Err(Failure::usage(format!("--k is {k}, limit is 1 to --n ({})", args.n)));
    }
    if !args.k.is_empty() {
        return Ok(args.k.clone());
    }
    let powers = std::iter::successors(Some(1), |k| Some(k * 2)).take_while(|k| *k < args.n);
    Ok(powers.chain([args.n]).collect())
}

fn template(template: TemplateArg) -> PromptTemplate {
    match template {
        TemplateArg::Chat => PromptTemplate::Chat,
        TemplateArg::R1Zero => PromptTemplate::R1Zero,
        TemplateArg::Raw => PromptTemplate::Raw,
    }
}

/// Says which sources get fewer responses than asked for.
fn note_greedy(args: &EvalArgs, settings: &EvalSettings, rows: &[Row], terminal: &Terminal) {
    let greedy = |row: &&Row| settings.sampling(row.data_source.as_deref()).samples < args.n;
    let mut names: Vec<&str> = rows
        .iter()
        .filter(greedy)
        .map(|row| row.data_source.as_deref().unwrap_or("unknown"))
        .collect();
    names.sort_unstable();
    names.dedup();
    if !names.is_empty() {
        terminal.warn(&format!(
            "decoded greedily, so 1 response a row instead of {}: {}; --temperature samples them",
            args.n,
            names.join(", ")
        ));
    }
}

/// Says how many rewards could not be had, and fails if none could.
fn note_failures(
    reward: &str,
    failed: Counts,
    responses: &[Response],
    terminal: &Terminal,
) -> Result<()> {
    let Some(reason) = responses.iter().find_map(|response| response.verdict.failure()) else {
        return Ok(());
    };
    let (Counts { failures, timeouts }, all) = (failed, responses.len());
    let text = format!(
        "{reward}: {failures} of {all} rewards failed and count as 0, {timeouts} of them timed out; the first: {reason}"
    );
    if failures as usize == all {
        return Err(Failure::reward(text));
    }
    terminal.warn(&text);
    Ok(())
}

/// The files asked for, which get their names when they are whole.
struct Files {
    output: Option<Output>,
    samples: Option<Output>,
}

impl Files {
    fn open(args: &EvalArgs) -> Result<Self> {
        let open =
            |path: &Option<std::path::PathBuf>| path.as_deref().map(Output::replace).transpose();
        Ok(Self { output: open(&args.output)?, samples: open(&args.samples)? })
    }

    fn finish(self, rows: &[Row], responses: &[Response], results: &Value) -> Result<()> {
        if let Some(mut samples) = self.samples {
            for response in responses {
                samples.line(&record(&rows[response.row], response));
                samples.flush()?;
            }
            samples.finish()?;
        }
        if let Some(mut output) = self.output {
            output.line(results);
            output.finish()?;
        }
        Ok(())
    }
}

/// The line of a response.
fn record(row: &Row, response: &Response) -> Value {
    json!({
        "row": response.row,
        "sample": response.sample,
        "data_source": row.data_source,
        "prompt": row.prompt,
        "token_ids": response.tokens,
        "text": response.text,
        "finish_reason": response.finish.name(),
        "ground_truth": row.ground_truth,
        "predicted": response.verdict.predicted,
        "correct": response.verdict.correct,
        "reward": response.verdict.score,
    })
}

/// Results by source, then those of all rows.
struct Results {
    sources: Vec<(String, Summary)>,
    all: Summary,
}

impl Results {
    fn new(evaluation: Evaluation, ks: &[usize]) -> Self {
        let sources = evaluation.summaries(ks).into_iter();
        Self {
            sources: sources.map(|(name, summary)| (name.to_owned(), summary)).collect(),
            all: evaluation.overall(ks).expect("data without rows is refused"),
        }
    }

    fn json(&self, args: &EvalArgs, failed: Counts) -> Value {
        let sources: serde_json::Map<String, Value> =
            self.sources.iter().map(|(name, summary)| (name.clone(), json!(summary))).collect();
        let mean =
            self.sources.iter().map(|(_, s)| s.mean).sum::<f64>() / self.sources.len() as f64;
        json!({
            "model": args.model,
            "data": args.data,
            "seed": args.common.seed,
            "n": args.n,
            "temperature": args.temperature,
            "top_p": args.top_p,
            "top_k": args.top_k,
            "max_tokens": args.max_tokens,
            "sources": sources,
            "all": self.all,
            "mean_of_sources": mean,
            "reward_failures": failed.failures,
            "reward_timeouts": failed.timeouts,
        })
    }

    /// Names to the left, numbers to the right; shares are in percent.
    fn table(&self) -> String {
        let ks: Vec<usize> = {
            let every = self.sources.iter().flat_map(|(_, summary)| summary.pass.keys().copied());
            every.collect::<std::collections::BTreeSet<_>>().into_iter().collect()
        };
        let mut head =
            vec!["source".to_owned(), "rows".into(), "n".into(), "mean@n".into(), "+-".into()];
        for name in ["pass", "maj", "best"] {
            head.extend(ks.iter().map(|k| format!("{name}@{k}")));
        }
        head.extend(["reward", "tokens", "cut"].map(str::to_owned));
        let mut lines = vec![head];
        lines.extend(self.sources.iter().map(|(name, summary)| cells(name, summary, &ks)));
        if self.sources.len() > 1 {
            lines.push(cells(ALL, &self.all, &ks));
        }
        aligned(&lines)
    }
}

fn cells(name: &str, summary: &Summary, ks: &[usize]) -> Vec<String> {
    let percent = |share: f64| format!("{:.1}", 100.0 * share);
    let mut cells = vec![name.escape_default().to_string()];
    cells.extend([summary.problems.to_string(), summary.n.to_string()]);
    cells.extend([percent(summary.mean), percent(summary.mean_error)]);
    for values in [&summary.pass, &summary.maj, &summary.best] {
        cells.extend(ks.iter().map(|k| values.get(k).map_or("-".to_owned(), |v| percent(*v))));
    }
    cells.push(format!("{:.3}", summary.reward));
    cells.push(format!("{:.1}", summary.tokens));
    cells.push(percent(summary.truncated));
    cells
}

/// Columns as wide as their widest cell, the first to the left.
fn aligned(lines: &[Vec<String>]) -> String {
    let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max();
    let widths: Vec<usize> = (0..lines[0].len()).map(|column| width(column).unwrap_or(0)).collect();
    let line = |cells: &Vec<String>| {
        let cell = |(column, text): (usize, &String)| {
            let width = widths[column];
            if column == 0 { format!("{text:<width$}") } else { format!("{text:>width$}") }
        };
        cells.iter().enumerate().map(cell).collect::<Vec<_>>().join("  ")
    };
    lines.iter().map(line).collect::<Vec<_>>().join("\n")
}
