//! `POST /tokenize` and `/detokenize` with vLLM's bodies, `GET /version`, and `POST /inference/v1/generate`:
//! token ids in, token ids with log-probabilities and the weights that drew them out, whole or (`tokens.rs`) streamed.
//!
//! The last keeps text out of the loop of whoever trains elsewhere: what is sampled is what is trained on, and
//! log-probabilities, those of alternatives too, are of the distribution that was drawn from, whatever
//! [`ServerConfig::logprobs_mode`](crate::ServerConfig::logprobs_mode) says.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use engine::text::{AddSpecial, GenerationPrompt, SkipSpecial};
use engine::{Event, LogprobsMode, Tokenizer};
use serde_json::{Map, Value, json};

use super::{Body, read, tokens};
use crate::answer::{Meter, stop_reason};
use crate::api_error::ApiError;
use crate::app::App;
use crate::chat;
use crate::echo::PromptLogprobs;
use crate::encode::{Texts, encode};
use crate::fields::{BadField, Fields};
use crate::job::{Api, Delivery, Job, StreamUsage, check_model, needs, unprocessable};
use crate::refused::{off_only, unsupported};
use crate::tools;

/// `GET /version`.
pub(super) async fn version() -> Json<Value> {
    Json(json!({"version": env!("CARGO_PKG_VERSION")}))
}

/// `POST /tokenize`: `prompt` or `messages` become `tokens`.
pub(super) async fn tokenize(app: State<Arc<App>>, headers: HeaderMap, body: Body) -> Response {
    let made = read(&app.0, &headers, body, |app, _visit, body| {
        let fields = &mut Fields::parse(body)?;
        check_model(app, fields)?;
        let strings = fields.flag("return_token_strs")?.unwrap_or(false);
        let special = fields.flag("add_special_tokens")?.unwrap_or(true);
        let tokenizer = tokenizer(app)?;
        let tokens = match (fields.string("prompt")?, fields.take("messages")) {
            (Some(text), None) => {
                let add = if special { AddSpecial::Yes } else { AddSpecial::No };
                encode(app, ("prompt", &text), Texts::All, |tokenizer| {
                    tokenizer.encode(&text, add)
                })?
            }
            (None, Some(list)) => {
                let tools = tools::read(fields)?;
                let end = match fields.flag("add_generation_prompt")? {
                    Some(false) => GenerationPrompt::Omit,
                    Some(true) | None => GenerationPrompt::Add,
                };
                let with = (tools.as_ref(), chat::variables(app, fields)?, end);
                chat::prompt(app, &list, with, Texts::All)?
            }
            _ => return Err(BadField::new("prompt", "either prompt or messages is needed").into()),
        };
        app.report_unknown(fields)?;
        let spelled: Option<Vec<String>> = strings.then(|| {
            let one = |id: &u32| tokenizer.id_to_token(*id).unwrap_or_default();
            tokens.iter().map(one).collect()
        });
        Ok(json!({
            "count": tokens.len(),
            "max_model_len": app.service.max_model_len(),
            "tokens": tokens,
            "token_strs": spelled,
        }))
    });
    answer(made.await)
}

/// `POST /detokenize`: `tokens` become `prompt`.
pub(super) async fn detokenize(app: State<Arc<App>>, headers: HeaderMap, body: Body) -> Response {
    let made = read(&app.0, &headers, body, |app, _visit, body| {
        let fields = &mut Fields::parse(body)?;
        check_model(app, fields)?;
        let tokenizer = tokenizer(app)?;
        let tokens = fields.tokens("tokens")?;
        let tokens = tokens.ok_or_else(|| BadField::new("tokens", "tokens is missing"))?;
        let size = app.service.model().vocab_size;
        if let Some(id) = tokens.iter().find(|id| **id as usize >= size) {
            let message = format!("token id is {id}, limit is {}", size - 1);
            return Err(BadField::new("tokens", message).into());
        }
        app.report_unknown(fields)?;
        let text = tokenizer.decode(&tokens, SkipSpecial::No);
        Ok(json!({"prompt": text.map_err(|error| unprocessable("tokens", &error))?}))
    });
    answer(made.await)
}

/// `POST /inference/v1/generate`: `token_ids` and `sampling_params` become choices of token ids.
pub(super) async fn generate(app: State<Arc<App>>, headers: HeaderMap, body: Body) -> Response {
    generated(&app.0, &headers, body).await.unwrap_or_else(IntoResponse::into_response)
}

async fn generated(app: &Arc<App>, headers: &HeaderMap, body: Body) -> Result<Response, ApiError> {
    let start = |app: &App, visit, body: &[u8]| {
        let fields = completion_fields(Fields::parse(body)?)?;
        // What a trainer compares its own log-probabilities with is what was drawn from.
        let how = (Api::Completions, LogprobsMode::Processed);
        let submitted = Job::start(app, visit, how, fields)?;
        if submitted.delivery() == (Delivery::Stream { usage: StreamUsage::Each }) {
            return Err(unsupported("continuous_usage_stats").into());
        }
        Ok(submitted)
    };
    let job = read(app, headers, body, start).await?.taken_in(app).await?;
    Ok(match job.delivery {
        Delivery::Whole => answer(choices(job).await),
        Delivery::Stream { .. } => tokens::streamed(job),
    })
}

/// The same request in the words of the completions API.
fn completion_fields(mut fields: Fields) -> Result<Fields, ApiError> {
    let tokens = fields.tokens("token_ids")?;
    let tokens = tokens.ok_or_else(|| BadField::new("token_ids", "token_ids is missing"))?;
    off_only(&mut fields, "echo", &[Value::from(false)])?;
    let mut body = match fields.take("sampling_params") {
        None => Map::new(),
        Some(Value::Object(map)) => map,
        Some(_) => {
            let message = "sampling_params is no object, expected one";
            return Err(BadField::new("sampling_params", message).into());
        }
    };
    for name in ["prompt", "stream", "stream_options", "return_token_ids", "echo"] {
        if body.contains_key(name) {
            let message = format!("{name} is no sampling parameter");
            return Err(BadField::new("sampling_params", message).into());
        }
    }
    for name in ["model", "stream", "stream_options", "request_id", "cache_salt", "priority"] {
        if let Some(value) = fields.take(name) {
            body.insert(name.to_owned(), value);
        }
    }
    body.insert("prompt".to_owned(), Value::from(tokens));
    body.entry("logprobs").or_insert(Value::from(0));
    // What is left is reported, or refused, by the completions API.
    for name in fields.names().map(str::to_owned).collect::<Vec<_>>() {
        if let Some(value) = fields.take(&name) {
            body.entry(name).or_insert(value);
        }
    }
    Ok(Fields::new(body))
}

/// What is known of a sample.
#[derive(Default)]
struct Sample {
    tokens: Vec<u32>,
    logprobs: Vec<f32>,
    /// The most likely tokens of each place, as many as were asked for.
    top: Vec<Vec<(u32, f32)>>,
    versions: Vec<u64>,
    finish_reason: Option<&'static str>,
    stop_reason: Option<Value>,
}

async fn choices(mut job: Job) -> Result<Value, ApiError> {
    let mut samples: Vec<Sample> = (0..job.choices()).map(|_| Sample::default()).collect();
    let mut meter = Meter::default();
    let mut prompt = None;
    while let Some((index, mut event)) = job.generation.next().await? {
        meter.count(&event);
        prompt = event.take_prompt().or(prompt);
        let sample = &mut samples[index];
        match event {
            Event::Token(token) => {
                sample.tokens.push(token.token);
                sample.logprobs.push(token.logprob);
                sample.top.push(token.top);
                sample.versions.push(token.version.0);
            }
            Event::Finished(end) => {
                sample.finish_reason = Some(end.reason.name());
                sample.stop_reason = end.stop_reason.map(stop_reason);
            }
        }
    }
    let choices = samples.into_iter().enumerate().map(|(index, sample)| {
        let asked = sample.top.iter().any(|top| !top.is_empty());
        json!({
            "index": index,
            "token_ids": sample.tokens,
            "logprobs": sample.logprobs,
            "top_logprobs": asked.then_some(sample.top),
            "finish_reason": sample.finish_reason,
            "stop_reason": sample.stop_reason,
            "weight_versions": spans(&sample.versions),
        })
    });
    Ok(json!({
        "request_id": job.id,
        "model": job.model,
        "choices": choices.collect::<Vec<_>>(),
        "prompt_logprobs": prompt.map(|told| {
            PromptLogprobs::new(&told, job.report.prompt_top.unwrap_or(0), job.speller())
        }),
        "usage": meter.usage(job.prompt_tokens()),
    }))
}

/// Runs of tokens that the same weights drew: version, first token, end.
fn spans(versions: &[u64]) -> Vec<Value> {
    let mut start = 0;
    let runs = versions.chunk_by(|a, b| a == b).map(|run| {
        let end = start + run.len();
        let span = json!({"version": run[0], "start": start, "end": end});
        start = end;
        span
    });
    runs.collect()
}

fn answer(made: Result<Value, ApiError>) -> Response {
    made.map_or_else(IntoResponse::into_response, |value| Json(value).into_response())
}

fn tokenizer(app: &App) -> Result<Arc<Tokenizer>, ApiError> {
    app.service.tokenizer().cloned().ok_or_else(|| needs("prompt", "a tokenizer"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_join_tokens_of_the_same_weights() {
        assert_eq!(spans(&[]), Vec::<Value>::new());
        let expected = [
            json!({"version": 4, "start": 0, "end": 2}),
            json!({"version": 5, "start": 2, "end": 3}),
            json!({"version": 4, "start": 3, "end": 4}),
        ];
        assert_eq!(spans(&[4, 4, 5, 4]), expected);
    }
}
