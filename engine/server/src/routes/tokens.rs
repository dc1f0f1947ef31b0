//! `POST /inference/v1/generate` as a stream: an event for each token, one for each end, one with the
//! usage, then `[DONE]`.
//!
//! An event has the form of the whole answer, with a single choice that holds what is new: joined, the
//! lists of a choice's events are those of the whole answer, and a span of weights counts from the
//! choice's first token.

use axum::response::Response;
use engine::Event;
use serde_json::{Value, json};

use crate::answer::{Meter, stop_reason};
use crate::job::Job;
use crate::sse::{self, DONE, Wording};

/// The answer to `job` as a stream.
pub(super) fn streamed(job: Job) -> Response {
    let lengths = vec![0; job.choices()];
    sse::response(Tokens { job, meter: Meter::default(), lengths }, String::new())
}

struct Tokens {
    job: Job,
    meter: Meter,
    /// Tokens of each choice so far.
    lengths: Vec<usize>,
}

impl Tokens {
    fn push(&self, choices: &[Value], usage: &Value, text: &mut String) {
        let event = json!({
            "request_id": self.job.id,
            "model": self.job.model,
            "choices": choices,
            "usage": usage,
        });
        sse::push(text, &event);
    }
}

impl Wording for Tokens {
    fn job(&mut self) -> &mut Job {
        &mut self.job
    }

    fn piece(&mut self, index: usize, event: Event, text: &mut String) {
        self.meter.count(&event);
        let choice = match event {
            Event::Token(token) => {
                let start = self.lengths[index];
                self.lengths[index] += 1;
                let span = json!({"version": token.version.0, "start": start, "end": start + 1});
                json!({
                    "index": index,
                    "token_ids": [token.token],
                    "logprobs": [token.logprob],
                    "top_logprobs": (!token.top.is_empty()).then_some([token.top]),
                    "finish_reason": null,
                    "stop_reason": null,
                    "weight_versions": [span],
                })
            }
            Event::Finished(end) => json!({
                "index": index,
                "token_ids": [],
                "logprobs": [],
                "top_logprobs": null,
                "finish_reason": end.reason.name(),
                "stop_reason": end.stop_reason.map(stop_reason),
                "weight_versions": [],
            }),
        };
        self.push(&[choice], &Value::Null, text);
    }

    fn finish(&mut self, text: &mut String) {
        let usage = json!(self.meter.usage(self.job.prompt_tokens()));
        self.push(&[], &usage, text);
        text.push_str(DONE);
    }
}
