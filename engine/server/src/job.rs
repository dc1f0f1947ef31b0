//! A request that has been read, checked and handed to the engine, which takes it in when it is there.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::http::StatusCode;
use engine::{
    Continuation, LogprobsMode, Phase, Request, SamplingParams, Service, Status, Tokenizer,
};

use crate::access::unique_name;
use crate::answer::Choice;
use crate::api_error::ApiError;
use crate::app::{App, Visit, now_s};
use crate::echo::{Echoed, PromptLogprobs};
use crate::fields::{BadField, Fields};
use crate::generation::Generation;
use crate::logprobs::Speller;
use crate::params::{at_most, refusal};
use crate::prompt_params::PromptParams;
use crate::request_log::Parameters;
use crate::structured::Structured;
use crate::tool_calls::CallParser;
use crate::tools::{self, Tools};
use crate::{chat, completions, refused, request_log, structured};

/// Most choices (prompts times samples) one request may ask for.
const MAX_CHOICES: usize = 1024;
/// Most log-probabilities of prompt tokens one answer may have.
const MAX_PROMPT_LOGPROBS: usize = 1 << 20;

/// The two generating APIs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Api {
    Chat,
    Completions,
}

/// Whether the answer comes whole or in pieces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Delivery {
    Whole,
    Stream { usage: StreamUsage },
}

/// Whether a stream ends with the usage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum StreamUsage {
    Omit,
    /// In a piece of its own.
    Last,
    /// And in each other piece as of then.
    Each,
}

/// What is reported beside the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Report {
    pub(crate) logprobs: bool,
    /// Alternatives beside each token.
    pub(crate) top: usize,
    /// Alternatives beside each token of the prompt, where those are reported on their own.
    pub(crate) prompt_top: Option<usize>,
    pub(crate) token_ids: bool,
}

/// What the body asks for, with prompts as token ids.
pub(crate) struct Asked {
    pub(crate) prompts: Vec<Vec<u32>>,
    pub(crate) params: SamplingParams,
    pub(crate) logprobs: bool,
    /// Whether the answer begins with its prompt.
    pub(crate) echo: bool,
    pub(crate) continuation: Continuation,
}

impl Asked {
    /// An answer to each prompt, without the prompts.
    pub(crate) fn new(prompts: Vec<Vec<u32>>, params: SamplingParams, logprobs: bool) -> Self {
        Self { prompts, params, logprobs, echo: false, continuation: Continuation::Sample }
    }

    /// Tokens of room that an answer has to have.
    pub(crate) fn answer_tokens(&self) -> usize {
        match self.continuation {
            Continuation::Sample => self.params.max_tokens.unwrap_or(1),
            Continuation::Omit => 0,
        }
    }
}

/// A request that runs.
pub(crate) struct Job {
    pub(crate) api: Api,
    pub(crate) id: String,
    pub(crate) created_s: u64,
    pub(crate) model: String,
    pub(crate) prompts: Vec<Vec<u32>>,
    /// Samples of each prompt.
    pub(crate) samples: usize,
    pub(crate) report: Report,
    /// The text of each prompt, where the answer begins with it; else empty.
    pub(crate) echo: Vec<Echoed>,
    pub(crate) delivery: Delivery,
    pub(crate) tokenizer: Option<Arc<Tokenizer>>,
    /// The tools that were offered, whose calls are looked for in the answer.
    pub(crate) tools: Option<Tools>,
    pub(crate) generation: Generation,
    /// Which distribution reported log-probabilities are of.
    logprobs_mode: LogprobsMode,
    /// Time without an event after which a stream gets a comment.
    pub(crate) keep_alive: Duration,
    /// Keeps the drain waiting until the answer is out, and the names of the job.
    pub(crate) visit: Visit,
}

impl Job {
    /// Reads a body and hands what it asks for to the engine, which is to report log-probabilities by `logprobs_mode`.
    /// Takes processor time (template, tokenizer): not for an async thread.
    pub(crate) fn start(
        app: &App,
        visit: Visit,
        (api, logprobs_mode): (Api, LogprobsMode),
        mut fields: Fields,
    ) -> Result<Submitted, ApiError> {
        check_model(app, &mut fields)?;
        let delivery = delivery(app, &mut fields)?;
        visit.name.given(fields.string("request_id")?)?;
        let token_ids = fields.flag("return_token_ids")?.unwrap_or(false);
        let tools = match api {
            Api::Chat => tools::read(&mut fields)?,
            Api::Completions => None,
        };
        let grammar = grammar(&mut fields, tools.as_ref())?;
        let limit = app.service.max_model_len();
        let about = PromptParams::read(&mut fields, &app.salts, limit)?;
        refused::refuse(&mut fields)?;
        let mut asked = match api {
            Api::Chat => chat::read(app, &mut fields, tools.as_ref(), about.truncate.into())?,
            Api::Completions => completions::read(app, &mut fields, about.truncate.into())?,
        };
        app.report_unknown(&fields)?;
        let room = asked.answer_tokens();
        about.cut(&mut asked.prompts, room, limit);
        check(&app.service, &asked)?;
        if api == Api::Chat {
            let min = asked.params.min_tokens;
            let default = app.default_max_tokens.map(|max| max.max(min));
            asked.params.max_tokens = asked.params.max_tokens.or(default);
        }
        let scored = scored_prompts(&asked, about.logprobs, delivery)?;
        check_queue(app)?;
        let echo = echoes(app, &asked)?;
        let parameters = request_log::parameters(app, &asked.params);
        let compile = |asked| app.grammars.compile(&app.service, asked);
        let constraint = grammar.as_ref().map(compile).transpose()?;
        let Asked { prompts, params, logprobs, continuation, .. } = asked;
        let samples = params.n;
        let requests = prompts.iter().map(|prompt| Request {
            constraint: constraint.clone(),
            cache_salt: about.salt,
            prompt_logprobs: scored,
            logprobs_mode,
            continuation,
            ..Request::new(prompt.clone(), params.clone())
        });
        let generation = Generation::submit(app, requests.collect(), samples);
        let (top, prompt_top) = (params.logprobs.unwrap_or(0), about.logprobs);
        let prefix = match api {
            Api::Chat => "chatcmpl",
            Api::Completions => "cmpl",
        };
        let id = format!("{prefix}-{}", unique_name(app.next_id()));
        visit.name.also(&id);
        let job = Self {
            api,
            id,
            created_s: now_s(),
            model: app.model_name().to_owned(),
            prompts,
            samples,
            report: Report { logprobs, top, prompt_top, token_ids },
            echo,
            delivery,
            tokenizer: app.service.tokenizer().cloned(),
            tools,
            generation,
            logprobs_mode,
            keep_alive: app.config.keep_alive,
            visit,
        };
        Ok(Submitted { job, parameters })
    }

    /// Gives the job an id that begins with `prefix`, beside the one it has had.
    pub(crate) fn rename(&mut self, prefix: &str) {
        self.id = format!("{prefix}{}", self.unique());
        self.visit.name.also(&self.id);
    }

    /// The part of the id that no other job has.
    pub(crate) fn unique(&self) -> &str {
        self.id.rsplit(['-', '_']).next().unwrap_or_default()
    }

    /// How many choices the answer has.
    pub(crate) fn choices(&self) -> usize {
        self.prompts.len() * self.samples
    }

    /// The prompt of a choice.
    pub(crate) fn prompt(&self, choice: usize) -> &[u32] {
        &self.prompts[choice / self.samples]
    }

    /// Tokens of all prompts, each counted once.
    pub(crate) fn prompt_tokens(&self) -> usize {
        self.prompts.iter().map(Vec::len).sum()
    }

    /// Finds the calls of a choice; `None` where no tools were offered.
    pub(crate) fn call_parser(&self, choice: usize) -> Option<CallParser> {
        let tools = self.tools.as_ref()?;
        let id = self.unique();
        let most = if tools.parallel { usize::MAX } else { 1 };
        Some(CallParser::new(format!("{id}_{choice}"), most))
    }

    /// Spells this model's tokens.
    pub(crate) fn speller(&self) -> Speller<'_> {
        Speller { tokenizer: self.tokenizer.as_deref(), mode: self.logprobs_mode }
    }

    /// The log-probabilities of the prompt of `choice`, where they were asked for.
    pub(crate) fn prompt_logprobs(&self, choice: &Choice) -> Option<PromptLogprobs> {
        let (top, told) = (self.report.prompt_top?, choice.prompt.as_deref()?);
        Some(PromptLogprobs::new(told, top, self.speller()))
    }
}

/// A job that the engine has been handed.
pub(crate) struct Submitted {
    job: Job,
    /// What is to be logged of it.
    parameters: Option<Parameters>,
}

impl Submitted {
    pub(crate) fn delivery(&self) -> Delivery {
        self.job.delivery
    }

    /// Waits until the engine has taken the job in; its clock runs.
    pub(crate) async fn taken_in(self, app: &App) -> Result<Job, ApiError> {
        let Self { mut job, parameters } = self;
        job.generation.taken_in().await?;
        job.visit.name.runs(&app.service, job.generation.ids());
        request_log::taken_in(app, &job, parameters);
        Ok(job)
    }
}

/// Turns a request away while too many wait.
fn check_queue(app: &App) -> Result<(), ApiError> {
    let Some(limit) = app.config.max_queued_requests else { return Ok(()) };
    let Status { waiting, running, pause, phase, .. } = app.service.status();
    // An engine that is away does not say what has come since.
    let waiting = match phase {
        Phase::Serving => waiting,
        Phase::Away => waiting.saturating_add(app.handed.load(Ordering::Relaxed)),
    };
    let steps = phase == Phase::Serving && pause.is_none();
    let runs_at_once = steps && waiting == 0 && running < app.service.config().max_num_seqs;
    if runs_at_once || waiting < limit { Ok(()) } else { Err(ApiError::queue_full(waiting, limit)) }
}

/// Takes `model`; without one the model that is served is meant.
pub(crate) fn check_model(app: &App, fields: &mut Fields) -> Result<(), ApiError> {
    match fields.string("model")? {
        Some(model) if !app.config.model_names.contains(&model) => {
            let shown: String = model.chars().take(128).collect();
            Err(ApiError::no_model(&shown))
        }
        _ => Ok(()),
    }
}

/// The grammar that is asked for, by a field of its own or by a tool that must be called.
fn grammar(fields: &mut Fields, tools: Option<&Tools>) -> Result<Option<Structured>, BadField> {
    let asked = structured::read(fields)?;
    let forced = tools.map(Tools::structured).transpose()?.flatten();
    match (asked, forced) {
        (Some(asked), Some(_)) => Err(structured::only_one(asked.param)),
        (asked, forced) => Ok(asked.or(forced)),
    }
}

fn delivery(app: &App, fields: &mut Fields) -> Result<Delivery, BadField> {
    let stream = fields.flag("stream")?.unwrap_or(false);
    let options = fields.object("stream_options")?;
    if !stream {
        return match options {
            None => Ok(Delivery::Whole),
            Some(_) => {
                Err(BadField::new("stream_options", "stream_options needs stream to be true"))
            }
        };
    }
    let mut usage = StreamUsage::Omit;
    if let Some(mut options) = options {
        if options.flag("include_usage")?.unwrap_or(false) {
            usage = StreamUsage::Last;
        }
        if options.flag("continuous_usage_stats")?.unwrap_or(false) {
            if usage == StreamUsage::Omit {
                let message = "continuous_usage_stats needs include_usage to be true";
                return Err(BadField::new("stream_options", message));
            }
            usage = StreamUsage::Each;
        }
        app.report_unknown_in("stream_options.", &options)?;
    }
    Ok(Delivery::Stream { usage })
}

/// Checks parameters and lengths before anything is handed to the engine.
fn check(service: &Service, asked: &Asked) -> Result<(), BadField> {
    let Asked { prompts, params, .. } = asked;
    let room = asked.answer_tokens();
    params.validate(service.model().vocab_size).map_err(|error| refusal(&error))?;
    at_most("n", prompts.len() * params.n, MAX_CHOICES)?;
    let limit = service.max_model_len();
    for prompt in prompts {
        let len = prompt.len();
        if len == 0 {
            return Err(BadField::new("prompt", "prompt has 0 tokens, limit is at least 1"));
        }
        check_length(len, room, limit)?;
    }
    Ok(())
}

/// Fails when a prompt of `len` tokens leaves no `room` tokens for an answer.
pub(crate) fn check_length(len: usize, room: usize, limit: usize) -> Result<(), BadField> {
    if len.saturating_add(room) <= limit {
        return Ok(());
    }
    let message =
        format!("prompt has {len} tokens and {room} are asked for, limit is {limit} together");
    Err(BadField::new("prompt", message).with_code("context_length_exceeded"))
}

/// Alternatives that the engine is asked for beside prompt tokens, for `prompt_logprobs` and for `echo`.
fn scored_prompts(
    asked: &Asked,
    prompt_logprobs: Option<usize>,
    delivery: Delivery,
) -> Result<Option<usize>, BadField> {
    if prompt_logprobs.is_some() && delivery != Delivery::Whole {
        let message = "prompt_logprobs needs stream to be false";
        return Err(BadField::new("prompt_logprobs", message));
    }
    let echoed = asked.params.logprobs.filter(|_| asked.echo);
    let Some(top) = prompt_logprobs.max(echoed) else { return Ok(None) };
    let tokens: usize = asked.prompts.iter().map(Vec::len).sum();
    let all = tokens * asked.params.n * (top + 1);
    if all > MAX_PROMPT_LOGPROBS {
        let name = if prompt_logprobs.is_some() { "prompt_logprobs" } else { "echo" };
        let message = format!(
            "{name} asks for {all} log-probabilities of prompts, limit is {MAX_PROMPT_LOGPROBS}"
        );
        return Err(BadField::new(name, message));
    }
    Ok(Some(top))
}

/// The texts that the answers begin with.
fn echoes(app: &App, asked: &Asked) -> Result<Vec<Echoed>, ApiError> {
    let echoed = asked.prompts.iter().filter(|_| asked.echo);
    echoed.map(|prompt| Echoed::new(app.service.tokenizer(), prompt)).collect()
}

/// The error for text where the model has no tokenizer.
pub(crate) fn needs(param: &str, what: &str) -> ApiError {
    let message = format!("{param} needs {what}, the model has none");
    let mut bad = BadField::new(param, message).with_code("unsupported_parameter");
    bad.param = Some(param.to_owned());
    bad.into()
}

/// The error for a body that holds no usable text or template.
pub(crate) fn unprocessable(param: &str, error: &engine::Error) -> ApiError {
    BadField::new(param, error.to_string()).into()
}

/// An error of the transport below the API.
pub(crate) fn transport(status: StatusCode, message: String) -> ApiError {
    let code = match status {
        StatusCode::PAYLOAD_TOO_LARGE => "body_too_large",
        StatusCode::UNSUPPORTED_MEDIA_TYPE => "unsupported_media_type",
        StatusCode::METHOD_NOT_ALLOWED => "method_not_allowed",
        _ => "invalid_request",
    };
    ApiError::invalid(status, code, message)
}
