//! `POST /v1/chat/completions`: from messages to a prompt, from events to OpenAI's objects.

use std::time::SystemTime;

use engine::text::{GenerationPrompt, RenderOptions};
use engine::{ChatTemplate, Event};
use serde::Serialize;
use serde_json::{Map, Value, json};

use crate::answer::{Choice, Usage};
use crate::api_error::ApiError;
use crate::app::App;
use crate::echo::PromptLogprobs;
use crate::encode::{Texts, encode};
use crate::fields::{BadField, Fields};
use crate::job::{Asked, Job, needs, unprocessable};
use crate::logprobs::{ChatLogprobs, chat_token};
use crate::params::{messages, sampling_params};
use crate::prompt_params::template_variables;
use crate::refused::off_only;
use crate::tool_calls::{self, Call, CallDelta, CallParser};
use crate::tools::Tools;

/// Reads what a body asks for.
pub(crate) fn read(
    app: &App,
    fields: &mut Fields,
    tools: Option<&Tools>,
    texts: Texts,
) -> Result<Asked, ApiError> {
    off_only(fields, "echo", &[json!(false)])?;
    let mut params = sampling_params(fields, &app.defaults)?;
    // The newer name wins where both are given, as in vLLM.
    params.max_tokens = fields.count("max_completion_tokens")?.or(params.max_tokens);
    let logprobs = fields.flag("logprobs")?.unwrap_or(false);
    let top = fields.count("top_logprobs")?;
    if top.is_some_and(|top| top > 0) && !logprobs {
        let message = "top_logprobs needs logprobs to be true";
        return Err(BadField::new("top_logprobs", message).into());
    }
    params.logprobs = logprobs.then(|| top.unwrap_or(0));
    let Some(list) = fields.take("messages") else {
        return Err(BadField::new("messages", "messages is missing").into());
    };
    let how = (tools, variables(app, fields)?, GenerationPrompt::Add);
    let prompt = prompt(app, &list, how, texts)?;
    Ok(Asked::new(vec![prompt], params, logprobs))
}

/// Takes the variables that a request gives to the chat template.
pub(crate) fn variables(app: &App, fields: &mut Fields) -> Result<Map<String, Value>, ApiError> {
    Ok(template_variables(fields, template(app)?)?)
}

fn template(app: &App) -> Result<&ChatTemplate, ApiError> {
    let template = app.service.chat_template();
    template.map(AsRef::as_ref).ok_or_else(|| needs("messages", "a chat template"))
}

/// The tokens of a conversation, a list of messages, with the tools that are offered, further variables of the
/// template and how it ends.
pub(crate) fn prompt(
    app: &App,
    list: &Value,
    (tools, extra, generation_prompt): (Option<&Tools>, Map<String, Value>, GenerationPrompt),
    texts: Texts,
) -> Result<Vec<u32>, ApiError> {
    let tokenizer = app.service.tokenizer().ok_or_else(|| needs("messages", "a tokenizer"))?;
    let template = template(app)?;
    let messages = messages(list, template)?;
    let spoken = tokenizer.controls().mark(&messages, tools.map(|tools| &tools.list));
    let spoken = spoken.map_err(|error| unprocessable("messages", &error))?;
    let options = RenderOptions {
        generation_prompt,
        tools: spoken.tools.as_ref(),
        extra,
        ..RenderOptions::new(SystemTime::now())
    };
    let text = template
        .render(&spoken.messages, &options)
        .map_err(|error| unprocessable("messages", &error))?;
    encode(app, ("messages", &text), texts, |tokenizer| spoken.encode(&text, tokenizer))
}

/// A whole answer.
#[derive(Serialize)]
pub(crate) struct Completion<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: Vec<WholeChoice>,
    usage: Usage,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a [u32]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_logprobs: Option<PromptLogprobs>,
}

#[derive(Serialize)]
struct WholeChoice {
    index: usize,
    message: Message,
    logprobs: Option<ChatLogprobs>,
    finish_reason: Option<&'static str>,
    stop_reason: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    weights_versions: Option<Vec<u64>>,
}

#[derive(Serialize)]
struct Message {
    role: &'static str,
    /// `null` beside calls that nothing precedes.
    content: Option<String>,
    refusal: Option<()>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<Call>,
}

/// The message that a finished text is, and the reason for its end.
fn message(
    job: &Job,
    index: usize,
    (text, reason): (String, Option<&'static str>),
) -> (Message, Option<&'static str>) {
    let (content, tool_calls) = match job.call_parser(index) {
        Some(parser) => tool_calls::whole(parser, &text),
        None => (text, Vec::new()),
    };
    let reason = reason.map(|reason| finish_reason(reason, !tool_calls.is_empty()));
    let content = (tool_calls.is_empty() || !content.is_empty()).then_some(content);
    (Message { role: "assistant", content, refusal: None, tool_calls }, reason)
}

/// OpenAI's word for the end of an answer that has called tools, or has not.
fn finish_reason(reason: &'static str, calls: bool) -> &'static str {
    if calls && reason == "stop" { "tool_calls" } else { reason }
}

/// The whole answer made of finished choices.
pub(crate) fn completion<'a>(job: &'a Job, choices: Vec<Choice>, usage: Usage) -> Completion<'a> {
    let prompt_logprobs = choices.first().and_then(|choice| job.prompt_logprobs(choice));
    let choices = choices.into_iter().enumerate().map(|(index, choice)| {
        let (message, finish_reason) = message(job, index, (choice.text, choice.finish_reason));
        WholeChoice {
            index,
            message,
            logprobs: job.report.logprobs.then(|| ChatLogprobs {
                content: choice
                    .tokens
                    .iter()
                    .map(|token| chat_token(token, job.speller()))
                    .collect(),
                refusal: None,
            }),
            finish_reason,
            stop_reason: choice.stop_reason,
            token_ids: job.report.token_ids.then_some(choice.token_ids),
            weights_versions: job.report.token_ids.then_some(choice.weights_versions),
        }
    });
    Completion {
        id: &job.id,
        object: "chat.completion",
        created: job.created_s,
        model: &job.model,
        choices: choices.collect(),
        usage,
        prompt_token_ids: job.report.token_ids.then(|| job.prompt(0)),
        prompt_logprobs,
    }
}

/// A piece of a choice.
#[derive(Serialize)]
pub(crate) struct ChunkChoice {
    index: usize,
    delta: Delta,
    logprobs: Option<ChatLogprobs>,
    finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    stop_reason: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    token_ids: Option<[u32; 1]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    weights_versions: Option<[u64; 1]>,
}

#[derive(Default, Serialize)]
struct Delta {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    content: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    tool_calls: Vec<CallDelta>,
}

/// The piece that opens a choice: whose turn it is.
pub(crate) fn opening(index: usize) -> ChunkChoice {
    let delta = Delta { role: Some("assistant"), content: Some(String::new()), ..Delta::default() };
    ChunkChoice { delta, ..empty(index) }
}

/// The piece for an event; `None` when there is nothing to say yet.
pub(crate) fn piece(
    job: &Job,
    index: usize,
    event: Event,
    calls: Option<&mut CallParser>,
) -> Option<ChunkChoice> {
    match event {
        Event::Token(token) => {
            let logprobs = job.report.logprobs.then(|| ChatLogprobs {
                content: vec![chat_token(&token, job.speller())],
                refusal: None,
            });
            let token_ids = job.report.token_ids.then_some([token.token]);
            let weights_versions = token_ids.map(|_| [token.version.0]);
            let delta = match calls {
                None => Delta { content: Some(token.text), ..Delta::default() },
                Some(parser) => delta(parser.push(&token.text)),
            };
            let said = delta.content.as_ref().is_some_and(|content| !content.is_empty())
                || !delta.tool_calls.is_empty();
            let wanted = job.report.logprobs || job.report.token_ids || said;
            wanted.then(|| ChunkChoice {
                delta,
                logprobs,
                token_ids,
                weights_versions,
                ..empty(index)
            })
        }
        Event::Finished(end) => {
            let (delta, called) = match calls {
                None => {
                    let content = (!end.text.is_empty()).then_some(end.text);
                    (Delta { content, ..Delta::default() }, false)
                }
                Some(parser) => (delta(parser.finish(&end.text)), parser.has_calls()),
            };
            Some(ChunkChoice {
                delta,
                finish_reason: Some(finish_reason(end.reason.name(), called)),
                stop_reason: end.stop_reason.map(crate::answer::stop_reason),
                ..empty(index)
            })
        }
    }
}

fn delta(parsed: tool_calls::Parsed) -> Delta {
    let content = (!parsed.content.is_empty()).then_some(parsed.content);
    Delta { role: None, content, tool_calls: parsed.calls }
}

fn empty(index: usize) -> ChunkChoice {
    ChunkChoice {
        index,
        delta: Delta::default(),
        logprobs: None,
        finish_reason: None,
        stop_reason: None,
        token_ids: None,
        weights_versions: None,
    }
}
