//! `POST /v1/completions`: prompts as text or token ids, from events to OpenAI's objects.

use engine::text::AddSpecial;
use engine::{Continuation, Event, PromptToken};
use serde::Serialize;
use serde_json::{Value, json};

use crate::answer::{Choice, Usage};
use crate::api_error::ApiError;
use crate::app::App;
use crate::echo::PromptLogprobs;
use crate::encode::{Encoder, Texts};
use crate::fields::{BadField, Fields, kind, tokens};
use crate::job::{Asked, Job, check_length};
use crate::logprobs::TextLogprobs;
use crate::params::{at_most, sampling_params};
use crate::refused::off_only;

/// Tokens generated when a request does not say, as in OpenAI's API.
const DEFAULT_MAX_TOKENS: usize = 16;
/// Most prompts one request may have.
const MAX_PROMPTS: usize = 1024;

/// Reads what a body asks for.
pub(crate) fn read(app: &App, fields: &mut Fields, texts: Texts) -> Result<Asked, ApiError> {
    off_only(fields, "chat_template_kwargs", &[json!({})])?;
    let mut params = sampling_params(fields, &app.defaults)?;
    params.max_tokens = params.max_tokens.or(Some(DEFAULT_MAX_TOKENS));
    params.logprobs = fields.count("logprobs")?;
    let echo = fields.flag("echo")?.unwrap_or(false);
    let mut continuation = Continuation::Sample;
    if echo && params.max_tokens == Some(0) {
        if params.min_tokens > 0 {
            let message = format!("min_tokens is {}, limit is max_tokens 0", params.min_tokens);
            return Err(BadField::new("min_tokens", message).into());
        }
        (params.max_tokens, continuation) = (None, Continuation::Omit);
    }
    let Some(prompt) = fields.take("prompt") else {
        return Err(BadField::new("prompt", "prompt is missing").into());
    };
    let logprobs = params.logprobs.is_some();
    let asked = Asked { echo, continuation, ..Asked::new(Vec::new(), params, logprobs) };
    let prompts = prompts(app, &prompt, (texts, asked.answer_tokens()))?;
    Ok(Asked { prompts, ..asked })
}

/// A prompt is a string, token ids, or an array of either. Of those that have to fit, with `room` tokens for an
/// answer, the first that does not is the last that is tokenized.
fn prompts(
    app: &App,
    value: &Value,
    (texts, room): (Texts, usize),
) -> Result<Vec<Vec<u32>>, ApiError> {
    let wrong = |found: &str| -> ApiError {
        let expected = "expected a string, token ids, or an array of either";
        BadField::new("prompt", format!("prompt is {found}, {expected}")).into()
    };
    let Value::Array(list) = value else {
        let Value::String(text) = value else { return Err(wrong(kind(value))) };
        let encoder = Encoder::of(app, "prompt", texts, &[text])?;
        return Ok(vec![encode(&encoder, text)?]);
    };
    if list.first().is_some_and(Value::is_number) {
        return tokens(value)
            .map(|tokens| vec![tokens])
            .ok_or_else(|| wrong("an array with other entries"));
    }
    if list.is_empty() {
        return Err(BadField::new("prompt", "prompt is empty").into());
    }
    at_most("prompt", list.len(), MAX_PROMPTS)?;
    let strings: Vec<&str> = list.iter().filter_map(Value::as_str).collect();
    let encoder = match strings.as_slice() {
        [] => None,
        strings => Some(Encoder::of(app, "prompt", texts, strings)?),
    };
    let limit = app.service.max_model_len();
    let one = |item: &Value| {
        let tokens = match (item, &encoder) {
            (Value::String(text), Some(encoder)) => encode(encoder, text)?,
            _ => tokens(item).ok_or_else(|| wrong("an array with other entries"))?,
        };
        if texts == Texts::Fitting {
            check_length(tokens.len(), room, limit)?;
        }
        Ok(tokens)
    };
    list.iter().map(one).collect()
}

fn encode(encoder: &Encoder<'_>, text: &str) -> Result<Vec<u32>, ApiError> {
    encoder.encode(|tokenizer| tokenizer.encode(text, AddSpecial::Yes))
}

/// A whole answer.
#[derive(Serialize)]
pub(crate) struct Completion<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: Vec<TextChoice>,
    usage: Usage,
}

/// A choice, whole or a piece of it.
#[derive(Serialize)]
pub(crate) struct TextChoice {
    pub(crate) index: usize,
    text: String,
    logprobs: Option<TextLogprobs>,
    finish_reason: Option<&'static str>,
    stop_reason: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<PromptLogprobs>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) prompt_token_ids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    weights_versions: Option<Vec<u64>>,
}

/// The whole answer made of finished choices.
pub(crate) fn completion<'a>(job: &'a Job, choices: Vec<Choice>, usage: Usage) -> Completion<'a> {
    let choices = choices.into_iter().enumerate().map(|(index, choice)| TextChoice {
        index,
        logprobs: job.report.logprobs.then(|| whole_logprobs(job, index, &choice)),
        prompt_logprobs: job.prompt_logprobs(&choice),
        text: match job.echo.get(index / job.samples) {
            Some(echoed) => echoed.text.clone() + &choice.text,
            None => choice.text,
        },
        finish_reason: choice.finish_reason,
        stop_reason: choice.stop_reason,
        prompt_token_ids: job.report.token_ids.then(|| job.prompt(index).to_vec()),
        token_ids: job.report.token_ids.then_some(choice.token_ids),
        weights_versions: job.report.token_ids.then_some(choice.weights_versions),
    });
    Completion {
        id: &job.id,
        object: "text_completion",
        created: job.created_s,
        model: &job.model,
        choices: choices.collect(),
        usage,
    }
}

/// The log-probabilities of a finished choice, behind those of its prompt where that is echoed.
fn whole_logprobs(job: &Job, index: usize, choice: &Choice) -> TextLogprobs {
    let mut logprobs = TextLogprobs::default();
    let mut begin = 0;
    if let Some(echoed) = job.echo.get(index / job.samples) {
        let told = choice.prompt.as_deref().unwrap_or_default();
        let shape = (echoed, job.speller());
        logprobs.push_prompt(job.prompt(index), (told, job.report.top), shape);
        begin = echoed.chars;
    }
    choice.tokens.iter().fold(begin, |at, token| logprobs.push(token, at, job.speller()));
    logprobs
}

/// The piece that is the prompt of choice `index`, of which the engine `told`.
pub(crate) fn opening(job: &Job, index: usize, told: &[PromptToken]) -> TextChoice {
    let echoed = &job.echo[index / job.samples];
    let logprobs = job.report.logprobs.then(|| {
        let mut logprobs = TextLogprobs::default();
        let shape = (echoed, job.speller());
        logprobs.push_prompt(job.prompt(index), (told, job.report.top), shape);
        logprobs
    });
    TextChoice { logprobs, ..with_text(index, echoed.text.clone()) }
}

/// The piece for an event, whose token begins at `offset` characters; `None` when there is nothing to
/// say yet.
pub(crate) fn piece(
    job: &Job,
    index: usize,
    event: Event,
    offset: &mut usize,
) -> Option<TextChoice> {
    match event {
        Event::Token(token) => {
            let wanted = job.report.logprobs || job.report.token_ids || !token.text.is_empty();
            let logprobs = job.report.logprobs.then(|| {
                let mut logprobs = TextLogprobs::default();
                *offset = logprobs.push(&token, *offset, job.speller());
                logprobs
            });
            let token_ids = job.report.token_ids.then(|| vec![token.token]);
            let weights_versions = job.report.token_ids.then(|| vec![token.version.0]);
            wanted.then(|| TextChoice {
                logprobs,
                token_ids,
                weights_versions,
                ..with_text(index, token.text)
            })
        }
        Event::Finished(end) => Some(TextChoice {
            finish_reason: Some(end.reason.name()),
            stop_reason: end.stop_reason.map(crate::answer::stop_reason),
            ..with_text(index, end.text)
        }),
    }
}

fn with_text(index: usize, text: String) -> TextChoice {
    TextChoice {
        index,
        text,
        logprobs: None,
        finish_reason: None,
        stop_reason: None,
        prompt_logprobs: None,
        prompt_token_ids: None,
        token_ids: None,
        weights_versions: None,
    }
}
