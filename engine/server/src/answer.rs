//! A whole answer: events gathered until every sample has ended.

use std::sync::Arc;

use axum::Json;
use axum::response::{IntoResponse, Response};
use engine::{Event, PromptToken, StopReason, Token};
use serde::Serialize;
use serde_json::Value;

use crate::api_error::ApiError;
use crate::job::{Api, Job};
use crate::{chat, completions};

/// Tokens that a request took.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct Usage {
    pub(crate) prompt_tokens: usize,
    pub(crate) completion_tokens: usize,
    pub(crate) total_tokens: usize,
    /// Absent as long as it is not known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) prompt_tokens_details: Option<PromptDetails>,
}

/// Where a prompt's tokens came from.
#[derive(Clone, Debug, Default, Serialize)]
pub(crate) struct PromptDetails {
    pub(crate) cached_tokens: usize,
}

/// Counts tokens while events pass by.
#[derive(Clone, Debug, Default)]
pub(crate) struct Meter {
    completion_tokens: usize,
    cached_tokens: usize,
}

impl Meter {
    pub(crate) fn count(&mut self, event: &Event) {
        match event {
            Event::Token(_) => self.completion_tokens += 1,
            // A group shares its prompt, which is counted once.
            Event::Finished(end) if end.sample == 0 => self.cached_tokens += end.cached_tokens,
            Event::Finished(_) => {}
        }
    }

    pub(crate) fn usage(&self, prompt_tokens: usize) -> Usage {
        Usage {
            prompt_tokens,
            completion_tokens: self.completion_tokens,
            total_tokens: prompt_tokens + self.completion_tokens,
            prompt_tokens_details: Some(PromptDetails { cached_tokens: self.cached_tokens }),
        }
    }

    /// The usage while samples run, which says nothing of the cache.
    pub(crate) fn usage_so_far(&self, prompt_tokens: usize) -> Usage {
        Usage { prompt_tokens_details: None, ..self.usage(prompt_tokens) }
    }
}

/// A choice as far as it is known.
#[derive(Clone, Debug, Default)]
pub(crate) struct Choice {
    pub(crate) text: String,
    pub(crate) token_ids: Vec<u32>,
    /// The version of the weights that drew each token.
    pub(crate) weights_versions: Vec<u64>,
    /// Kept only where log-probabilities are reported.
    pub(crate) tokens: Vec<Token>,
    pub(crate) finish_reason: Option<&'static str>,
    pub(crate) stop_reason: Option<Value>,
    /// What the engine told of the prompt, where it was asked.
    pub(crate) prompt: Option<Arc<[PromptToken]>>,
}

/// What stopped a sample, as vLLM reports it: a token id or a string.
pub(crate) fn stop_reason(reason: StopReason) -> Value {
    match reason {
        StopReason::Token(token) => Value::from(token),
        StopReason::Text(text) => Value::from(text),
    }
}

/// Waits for the whole answer.
///
/// # Errors
/// When a sample fails: the answer is whole or an error, never a part.
pub(crate) async fn whole(mut job: Job) -> Result<Response, ApiError> {
    let mut choices = vec![Choice::default(); job.choices()];
    let mut meter = Meter::default();
    while let Some((index, mut event)) = job.generation.next().await? {
        meter.count(&event);
        if let Some(prompt) = event.take_prompt().map(Arc::from) {
            let first = index - index % job.samples;
            let group = &mut choices[first..first + job.samples];
            group.iter_mut().for_each(|choice| choice.prompt = Some(Arc::clone(&prompt)));
        }
        let choice = &mut choices[index];
        match event {
            Event::Token(token) => {
                choice.text.push_str(&token.text);
                choice.token_ids.push(token.token);
                choice.weights_versions.push(token.version.0);
                if job.report.logprobs {
                    choice.tokens.push(token);
                }
            }
            Event::Finished(end) => {
                choice.text.push_str(&end.text);
                choice.finish_reason = Some(end.reason.name());
                choice.stop_reason = end.stop_reason.map(stop_reason);
            }
        }
    }
    let usage = meter.usage(job.prompt_tokens());
    Ok(match job.api {
        Api::Chat => Json(chat::completion(&job, choices, usage)).into_response(),
        Api::Completions => Json(completions::completion(&job, choices, usage)).into_response(),
    })
}
