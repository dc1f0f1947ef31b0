//! `engine generate`: a file of prompts in, a file of samples out, in order of completion.
//!
//! Every line is read and checked before the first token is computed. A line without a seed gets one
//! made of `--seed` and its index, so a run that was interrupted goes on with the samples it would have
//! had.

use std::collections::{HashMap, VecDeque};

use engine::text::{AddSpecial, RenderOptions};
use engine::{
    Engine, Event, FinishReason, Finished, Request, RequestId, SamplingParams, StopReason, Token,
};
use engine::{EosRule, random};
use serde::Serialize;
use serde_json::Value;
use server::{BadField, Fields};

use crate::args::{GenerateArgs, SamplingArgs};
use crate::exit::{Failure, Result};
use crate::input::{Input, Line};
use crate::output::Output;
use crate::progress::Progress;
use crate::resume::Done;
use crate::signals::Signals;
use crate::terminal::Terminal;
use crate::{device, model};

/// Runs the command.
pub(crate) fn run(args: GenerateArgs, terminal: &Terminal) -> Result<()> {
    device::check(args.device)?;
    let path = args.prompts.as_ref();
    let path = path.ok_or_else(|| Failure::usage("--prompts IN.jsonl is missing"))?;
    let input = Input::read(path)?;
    let signals = Signals::listen()?;
    let config = model::engine_config(&args.common, &args.engine)?;
    let mut engine = model::load(&args.model, &config, terminal)?;
    let defaults = defaults(&args.sampling, &engine)?;
    let jobs = read_jobs(
        &input,
        &engine,
        &Defaults { params: defaults, seed: args.common.seed },
        terminal,
    )?;
    let (done, output) = match &args.output {
        Some(path) => (Done::read(path)?, Output::append(path)?),
        None => (Done::default(), Output::stdout()),
    };
    check_done(&done, &jobs)?;
    if done.prompts() > 0 {
        let left = jobs.iter().filter(|job| done.count(job.index, job.samples()) < job.samples());
        terminal.info(&format!("going on: {} of {} prompts are left", left.count(), jobs.len()));
    }
    let window = config.max_num_seqs.saturating_mul(2);
    Run::new(jobs, done, output, terminal).finish(&mut engine, &signals, window)
}

/// What a line does not say.
struct Defaults {
    params: SamplingParams,
    seed: u64,
}

/// One prompt to work on.
struct Job {
    index: usize,
    id: Option<Value>,
    request: Request,
}

impl Job {
    fn samples(&self) -> usize {
        self.request.params.n
    }
}

/// The model's recommendation, changed by the flags.
fn defaults(flags: &SamplingArgs, engine: &Engine) -> Result<SamplingParams> {
    let mut params = server::default_params(engine.generation_defaults());
    let numbers = [
        (&mut params.temperature, flags.temperature),
        (&mut params.top_p, flags.top_p),
        (&mut params.min_p, flags.min_p),
        (&mut params.presence_penalty, flags.presence_penalty),
        (&mut params.frequency_penalty, flags.frequency_penalty),
        (&mut params.repetition_penalty, flags.repetition_penalty),
    ];
    for (value, flag) in numbers {
        *value = flag.unwrap_or(*value);
    }
    if let Some(k) = flags.top_k {
        params.top_k = match k {
            -1 | 0 => None,
            k => Some(
                usize::try_from(k)
                    .map_err(|_| Failure::usage(format!("--top-k is {k}, limit is at least -1")))?,
            ),
        };
    }
    params.n = flags.n.unwrap_or(params.n);
    params.max_tokens = flags.max_tokens;
    params.min_tokens = flags.min_tokens.unwrap_or(params.min_tokens);
    params.stop.clone_from(&flags.stop);
    params.stop_token_ids.clone_from(&flags.stop_token_ids);
    params.logprobs = flags.logprobs;
    if flags.ignore_eos {
        params.eos = EosRule::Ignore;
    }
    params.validate(engine.model().vocab_size)?;
    Ok(params)
}

fn read_jobs(
    input: &Input,
    engine: &Engine,
    defaults: &Defaults,
    terminal: &Terminal,
) -> Result<Vec<Job>> {
    let mut unknown = Vec::new();
    let mut jobs = Vec::new();
    for line in input.lines() {
        let Line { index, mut fields } = line?;
        let id = fields.take("id");
        let bad = |bad: BadField| input.bad(index, &bad);
        let mut params = server::sampling_params(&mut fields, &defaults.params).map_err(bad)?;
        params.logprobs = fields.count("logprobs").map_err(bad)?.or(params.logprobs);
        let seed = || random::hash(&[defaults.seed, index as u64]);
        params.seed = Some(params.seed.unwrap_or_else(seed));
        let prompt = prompt(&mut fields, engine).map_err(|fault| match fault {
            Fault::Field(bad) => input.bad(index, &bad),
            Fault::Engine(error) => input.refused(index, error),
        })?;
        check(&prompt, &params, engine).map_err(|error| input.refused(index, error))?;
        for name in fields.names() {
            if !unknown.iter().any(|known| known == name) {
                terminal.warn(&format!("field `{name}` is not known and has no effect"));
                unknown.push(name.to_owned());
            }
        }
        jobs.push(Job { index, id, request: Request::new(prompt, params) });
    }
    Ok(jobs)
}

/// What is wrong with a line.
enum Fault {
    Field(BadField),
    Engine(engine::Error),
}

impl From<BadField> for Fault {
    fn from(bad: BadField) -> Self {
        Self::Field(bad)
    }
}

impl From<engine::Error> for Fault {
    fn from(error: engine::Error) -> Self {
        Self::Engine(error)
    }
}

/// The token ids of a line's prompt, in whichever form it is given.
fn prompt(fields: &mut Fields, engine: &Engine) -> Result<Vec<u32>, Fault> {
    let ids = fields.tokens("prompt_token_ids")?;
    let text = fields.string("prompt")?;
    let chat = fields.take("messages");
    let missing = |what: &str| {
        BadField::new(what, format!("has {what}, which the model has no tokenizer or template for"))
    };
    match (ids, text, chat) {
        (Some(ids), None, None) => Ok(ids),
        (None, Some(text), None) => {
            let tokenizer = engine.tokenizer().ok_or_else(|| missing("prompt"))?;
            Ok(tokenizer.encode(&text, AddSpecial::Yes)?)
        }
        (None, None, Some(chat)) => {
            let messages = server::messages(&chat)?;
            let template = engine.chat_template().ok_or_else(|| missing("messages"))?;
            let tokenizer = engine.tokenizer().ok_or_else(|| missing("messages"))?;
            let options = RenderOptions::new(std::time::SystemTime::now());
            Ok(tokenizer.encode(&template.render(&messages, &options)?, AddSpecial::No)?)
        }
        _ => {
            let message = "has not exactly one of prompt, prompt_token_ids and messages";
            Err(BadField::new("prompt", message).into())
        }
    }
}

/// What the engine would say later, said before anything runs.
fn check(prompt: &[u32], params: &SamplingParams, engine: &Engine) -> engine::Result<()> {
    let vocab_size = engine.model().vocab_size;
    params.validate(vocab_size)?;
    let (len, limit) = (prompt.len(), engine.max_model_len());
    if len == 0 {
        return Err(engine::Error::request("prompt has 0 tokens, limit is at least 1"));
    }
    if len >= limit {
        let limit = limit - 1;
        return Err(engine::Error::request(format!("prompt has {len} tokens, limit is {limit}")));
    }
    if let Some(token) = prompt.iter().find(|token| **token as usize >= vocab_size) {
        let message = format!("prompt has token {token}, vocabulary has {vocab_size}");
        return Err(engine::Error::request(message));
    }
    Ok(())
}

/// Fails when the output belongs to other prompts.
fn check_done(done: &Done, jobs: &[Job]) -> Result<()> {
    match jobs.iter().find(|job| done.differs(job.index, &job.request.prompt)) {
        None => Ok(()),
        Some(job) => {
            let index = job.index;
            Err(Failure::data(format!("--output has another prompt for index {index}")))
        }
    }
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
}

/// A sample as far as it has come.
#[derive(Clone, Default)]
struct Sample {
    tokens: Vec<u32>,
    text: String,
    logprobs: Vec<f32>,
    raw_logprobs: Vec<f32>,
    top: Vec<Vec<(u32, f32)>>,
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
                    self.output.line(&record(job, &sample, &end));
                }
                if running.open == 0 {
                    self.running.remove(&id);
                }
            }
        }
    }
}

fn record<'a>(job: &'a Job, sample: &'a Sample, end: &Finished) -> Record<'a> {
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
    }
}
