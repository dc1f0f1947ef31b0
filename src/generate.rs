//! `engine generate`: a file of prompts in, a file of samples out, in order of completion.
//!
//! Every line is read and checked before the first token is computed. A line without a seed gets one
//! made of `--seed` and its index, so a run that was interrupted goes on with the samples it would have
//! had. Results of another model, seed or other parameters are never gone on with.

mod jobs;

use std::collections::{HashMap, VecDeque};
use std::path::Path;

use engine::{Engine, Event, FinishReason, Finished, RequestId, StopReason, Token};
use serde::Serialize;
use serde_json::Value;

use crate::args::GenerateArgs;
use crate::device::DeviceArg;
use crate::exit::{Failure, Result};
use crate::input::Input;
use crate::output::Output;
use crate::progress::Progress;
use crate::resume::{Difference, Done};
use crate::signals::Signals;
use crate::terminal::Terminal;
use crate::{candle, fingerprint, model};

pub(crate) use jobs::{Job, Reader};

/// Runs the command.
pub(crate) fn run(args: &GenerateArgs, terminal: &Terminal) -> Result<()> {
    if let DeviceArg::Candle(name) = &args.device {
        return candle::generate(name, args, terminal);
    }
    let input = prompts(args)?;
    let signals = Signals::listen()?;
    let config = model::serving_config(&args.common, &args.engine)?;
    let source = model::open(&args.model, terminal)?;
    let mut engine = model::load_source(&source, &config, terminal)?;
    let quantised = engine.decoder().weights.quantised();
    let form = format!("{} {quantised} {:?}", engine.dtype().name(), config.kv_dtype);
    let model = fingerprint::model(&source, engine.eos(), &form)?;
    let jobs = Reader::of(&engine, model).read(&input, args, terminal)?;
    let (done, output) = results(args, &jobs, terminal)?;
    let window = config.max_num_seqs.saturating_mul(2);
    Run::new(jobs, done, output, terminal).finish(&mut engine, &signals, window)
}

/// The file of prompts.
pub(crate) fn prompts(args: &GenerateArgs) -> Result<Input> {
    let path = args.prompts.as_ref();
    Input::read(path.ok_or_else(|| Failure::usage("--prompts IN.jsonl is missing"))?)
}

/// Where results go, and those of `jobs` that are there already.
pub(crate) fn results(
    args: &GenerateArgs,
    jobs: &[Job],
    terminal: &Terminal,
) -> Result<(Done, Output)> {
    let (done, output) = match &args.output {
        Some(path) => (Done::read(path)?, Output::append(path)?),
        None => (Done::default(), Output::stdout()),
    };
    if let Some(path) = &args.output {
        check_done(&done, jobs, path, terminal)?;
    }
    if done.prompts() > 0 {
        let left = jobs.iter().filter(|job| done.count(job.index, job.samples()) < job.samples());
        terminal.info(&format!("going on: {} of {} prompts are left", left.count(), jobs.len()));
    }
    Ok((done, output))
}

/// Fails when the output at `path` has samples that these jobs would not draw.
fn check_done(done: &Done, jobs: &[Job], path: &Path, terminal: &Terminal) -> Result<()> {
    let path = path.display();
    for job in jobs {
        let index = job.index;
        let what = match done.difference(index, &job.request.prompt, &job.fingerprint) {
            None => continue,
            Some(Difference::Prompt) => format!("another prompt for index {index}"),
            Some(Difference::Settings) => format!(
                "samples of another model, seed or other sampling parameters for index {index}; choose another \
                 --output"
            ),
        };
        return Err(Failure::data(format!("--output {path} has {what}")));
    }
    if done.unknown(jobs.iter().map(|job| job.index)) {
        terminal.warn(&format!(
            "--output {path} has samples of an older program, which may be of another model, seed or other \
             sampling parameters; they are kept"
        ));
    }
    Ok(())
}

/// A result, as it stands in the output.
#[derive(Serialize)]
struct Record<'a> {
    index: usize,
    id: Option<&'a Value>,
    sample: usize,
    prompt_token_ids: &'a [u32],
    token_ids: &'a [u32],
    text: &'a str,
    logprobs: &'a [f32],
    raw_logprobs: &'a [f32],
    #[serde(skip_serializing_if = "Option::is_none")]
    top_logprobs: Option<&'a [Vec<(u32, f32)>]>,
    finish_reason: &'static str,
    stop_reason: Option<Value>,
    /// What the sample depends on besides its prompt.
    fingerprint: &'a str,
}

/// A sample as far as it has come.
#[derive(Clone, Default)]
pub(crate) struct Sample {
    pub(crate) tokens: Vec<u32>,
    pub(crate) text: String,
    pub(crate) logprobs: Vec<f32>,
    pub(crate) raw_logprobs: Vec<f32>,
    pub(crate) top: Vec<Vec<(u32, f32)>>,
}

/// How a sample has ended.
pub(crate) struct End {
    pub(crate) sample: usize,
    pub(crate) reason: FinishReason,
    pub(crate) stop_reason: Option<StopReason>,
}

impl From<Finished> for End {
    fn from(end: Finished) -> Self {
        Self { sample: end.sample, reason: end.reason, stop_reason: end.stop_reason }
    }
}

impl Sample {
    fn push(&mut self, token: Token) {
        self.tokens.push(token.token);
        self.text.push_str(&token.text);
        self.logprobs.push(token.logprob);
        self.raw_logprobs.push(token.raw_logprob);
        self.top.push(token.top);
    }
}

/// A prompt in the engine.
struct Running {
    job: Job,
    samples: Vec<Sample>,
    /// Samples that have not ended.
    open: usize,
}

/// Prompts that wait, prompts that run, and what has come of them.
struct Run<'a> {
    waiting: VecDeque<Job>,
    running: HashMap<RequestId, Running>,
    /// Samples that run.
    open: usize,
    done: Done,
    output: Output,
    progress: Progress<'a>,
    /// Samples in the output.
    written: usize,
    total: usize,
    tokens: usize,
    failed: usize,
}

impl<'a> Run<'a> {
    fn new(jobs: Vec<Job>, done: Done, output: Output, terminal: &'a Terminal) -> Self {
        let total = jobs.iter().map(Job::samples).sum();
        let written = jobs.iter().map(|job| done.count(job.index, job.samples())).sum();
        let left = |job: &Job| done.count(job.index, job.samples()) < job.samples();
        let waiting = jobs.into_iter().filter(left).collect();
        Self {
            waiting,
            running: HashMap::new(),
            open: 0,
            done,
            output,
            progress: Progress::new(terminal, "samples", total),
            written,
            total,
            tokens: 0,
            failed: 0,
        }
    }

    /// Works until everything is done, keeping about `window` samples in the engine.
    fn finish(mut self, engine: &mut Engine, signals: &Signals, window: usize) -> Result<()> {
        while !self.waiting.is_empty() || self.open > 0 {
            if signals.asked() {
                self.output.flush()?;
                let (written, total) = (self.written, self.total);
                return Err(Failure::interrupted(format!(
                    "interrupted with {written} of {total} samples done"
                )));
            }
            while self.open < window
                && let Some(job) = self.waiting.pop_front()
            {
                let id = engine.add(job.request.clone())?;
                let open = job.samples();
                self.open += open;
                let samples = vec![Sample::default(); open];
                self.running.insert(id, Running { job, samples, open });
            }
            for event in engine.step()? {
                self.take(event);
            }
            self.output.flush()?;
            self.progress.update(self.written, self.tokens);
        }
        self.output.finish()?;
        self.progress.finish(self.written, self.tokens);
        match self.failed {
            0 => Ok(()),
            failed => Err(Failure::numeric(format!(
                "{failed} of {} samples failed: the model's numbers are not finite",
                self.total
            ))),
        }
    }

    fn take(&mut self, event: Event) {
        let id = event.request();
        let running = self.running.get_mut(&id).expect("events belong to what runs");
        match event {
            Event::Token(token) => {
                self.tokens += 1;
                running.samples[token.sample].push(token);
            }
            Event::Finished(end) => {
                let mut sample = std::mem::take(&mut running.samples[end.sample]);
                sample.text.push_str(&end.text);
                self.open -= 1;
                running.open -= 1;
                let job = &running.job;
                if end.reason == FinishReason::Abort {
                    self.failed += 1;
                } else if !self.done.has(job.index, end.sample) {
                    self.written += 1;
                    self.output.line(&record(job, &sample, &end.into()));
                }
                if running.open == 0 {
                    self.running.remove(&id);
                }
            }
        }
    }
}

/// The line of a sample.
pub(crate) fn record<'a>(job: &'a Job, sample: &'a Sample, end: &End) -> impl Serialize + use<'a> {
    Record {
        index: job.index,
        id: job.id.as_ref(),
        sample: end.sample,
        prompt_token_ids: &job.request.prompt,
        token_ids: &sample.tokens,
        text: &sample.text,
        logprobs: &sample.logprobs,
        raw_logprobs: &sample.raw_logprobs,
        top_logprobs: job.request.params.logprobs.map(|_| sample.top.as_slice()),
        finish_reason: end.reason.name(),
        stop_reason: end.stop_reason.as_ref().map(|reason| match reason {
            StopReason::Token(token) => Value::from(*token),
            StopReason::Text(text) => Value::from(text.as_str()),
        }),
        fingerprint: &job.fingerprint,
    }
}
