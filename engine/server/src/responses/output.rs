//! A chat's events as output items, and as the events of a Responses stream.
//!
//! Whole answers and streams go through the same steps, so they say the same. The end of an item is
//! known when another begins or the text ends. Events: `response.created`, `response.in_progress`; for a
//! message `response.output_item.added`, `response.content_part.added`, `response.output_text.delta`...,
//! `response.output_text.done`, `response.content_part.done`, `response.output_item.done`; for a call
//! `response.output_item.added`, `response.function_call_arguments.delta`..., `.done`,
//! `response.output_item.done`; at last `response.completed`, or `response.incomplete` when the answer
//! was cut off (by a limit, or, with the status `cancelled`, by name); a failure is an `error`.

use axum::Json;
use axum::response::{IntoResponse, Response};
use engine::Event;
use serde_json::{Map, Value, json};

use super::renamed;
use crate::answer::Meter;
use crate::api_error::ApiError;
use crate::job::Job;
use crate::logprobs::chat_token;
use crate::sse::{self, Wording};
use crate::tool_calls::{CallDelta, CallParser, Parsed};

/// Waits for the whole answer.
///
/// # Errors
/// When the generation fails.
pub(crate) async fn whole(job: Job, echo: Map<String, Value>) -> Result<Response, ApiError> {
    let mut output = Output::new(job, echo);
    let mut unsaid = String::new();
    while let Some((_, event)) = output.job.generation.next().await.map_err(renamed)? {
        output.event(event, &mut unsaid);
        unsaid.clear();
    }
    Ok(Json(output.response(output.status())).into_response())
}

/// The answer as a stream.
pub(crate) fn streamed(job: Job, echo: Map<String, Value>) -> Response {
    let mut output = Output::new(job, echo);
    let mut opening = String::new();
    for kind in ["response.created", "response.in_progress"] {
        let response = output.response("in_progress");
        output.say(kind, json!({"response": response}), &mut opening);
    }
    sse::response(output, opening)
}

struct Output {
    job: Job,
    /// What the answer repeats of the request.
    echo: Map<String, Value>,
    calls: Option<CallParser>,
    meter: Meter,
    /// Items that have ended.
    items: Vec<Value>,
    open: Option<Item>,
    /// Log-probabilities of tokens whose text has not been said yet.
    logprobs: Vec<Value>,
    /// How the generation ended.
    reason: Option<&'static str>,
    /// Number of the next event.
    sequence: usize,
}

/// An item that goes on.
enum Item {
    Message { id: String, text: String, logprobs: Vec<Value> },
    Call { id: String, call_id: String, name: String, arguments: String },
}

impl Item {
    fn id(&self) -> &str {
        match self {
            Self::Message { id, .. } | Self::Call { id, .. } => id,
        }
    }

    fn to_json(&self, status: &str) -> Value {
        match self {
            Self::Message { id, .. } => json!({
                "id": id, "type": "message", "role": "assistant", "status": status,
                "content": if status == "in_progress" { json!([]) } else { json!([self.part()]) },
            }),
            Self::Call { id, call_id, name, arguments } => json!({
                "id": id, "type": "function_call", "status": status, "call_id": call_id,
                "name": name, "arguments": arguments,
            }),
        }
    }

    /// The content of a message; `null` for a call.
    fn part(&self) -> Value {
        let Self::Message { text, logprobs, .. } = self else { return Value::Null };
        json!({"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs})
    }
}

impl Output {
    fn new(job: Job, echo: Map<String, Value>) -> Self {
        let calls = job.call_parser(0);
        Self {
            job,
            echo,
            calls,
            meter: Meter::default(),
            items: Vec::new(),
            open: None,
            logprobs: Vec::new(),
            reason: None,
            sequence: 0,
        }
    }

    /// Takes in an event of the only choice.
    fn event(&mut self, event: Event, out: &mut String) {
        self.meter.count(&event);
        match event {
            Event::Token(token) => {
                if self.job.report.logprobs {
                    self.logprobs.push(json!(chat_token(&token, self.job.speller())));
                }
                let parsed = match &mut self.calls {
                    None => Parsed { content: token.text, calls: Vec::new() },
                    Some(parser) => parser.push(&token.text),
                };
                self.parsed(parsed, out);
            }
            Event::Finished(end) => {
                let parsed = match &mut self.calls {
                    None => Parsed { content: end.text, calls: Vec::new() },
                    Some(parser) => parser.finish(&end.text),
                };
                self.parsed(parsed, out);
                self.reason = Some(end.reason.name());
                if self.open.is_none() && self.items.is_empty() {
                    self.open_message(out);
                }
                let status = if self.status() == "completed" { "completed" } else { "incomplete" };
                self.close(status, out);
            }
        }
    }

    fn parsed(&mut self, parsed: Parsed, out: &mut String) {
        if !parsed.content.is_empty() {
            self.text(&parsed.content, out);
        }
        for call in parsed.calls {
            self.call(call, out);
        }
    }

    fn text(&mut self, delta: &str, out: &mut String) {
        if !matches!(self.open, Some(Item::Message { .. })) {
            self.close("completed", out);
            self.open_message(out);
        }
        let new = std::mem::take(&mut self.logprobs);
        let fields = json!({"content_index": 0, "delta": delta, "logprobs": new});
        if let Some(Item::Message { text, logprobs, .. }) = &mut self.open {
            text.push_str(delta);
            logprobs.extend(new);
        }
        self.say_of_item("response.output_text.delta", fields, out);
    }

    fn call(&mut self, delta: CallDelta, out: &mut String) {
        // Log-probabilities belong to texts.
        self.logprobs.clear();
        let function = delta.function;
        if let Some(call_id) = delta.id {
            self.close("completed", out);
            let (id, name) = (self.item_id("fc"), function.name.unwrap_or_default());
            let item = Item::Call { id, call_id, name, arguments: String::new() };
            self.added(item, out);
        }
        if function.arguments.is_empty() {
            return;
        }
        if let Some(Item::Call { arguments, .. }) = &mut self.open {
            arguments.push_str(&function.arguments);
            let fields = json!({"delta": function.arguments});
            self.say_of_item("response.function_call_arguments.delta", fields, out);
        }
    }

    fn open_message(&mut self, out: &mut String) {
        let id = self.item_id("msg");
        self.added(Item::Message { id, text: String::new(), logprobs: Vec::new() }, out);
        let part = json!({"type": "output_text", "text": "", "annotations": [], "logprobs": []});
        let fields = json!({"content_index": 0, "part": part});
        self.say_of_item("response.content_part.added", fields, out);
    }

    fn added(&mut self, item: Item, out: &mut String) {
        let fields = json!({"output_index": self.items.len(), "item": item.to_json("in_progress")});
        self.open = Some(item);
        self.say("response.output_item.added", fields, out);
    }

    /// Ends the item that goes on, if one does.
    fn close(&mut self, status: &str, out: &mut String) {
        match &mut self.open {
            None => return,
            Some(Item::Message { text, logprobs, .. }) => {
                logprobs.append(&mut self.logprobs);
                let fields = json!({"content_index": 0, "text": text, "logprobs": logprobs});
                self.say_of_item("response.output_text.done", fields, out);
                let part = self.open.as_ref().map(Item::part);
                let fields = json!({"content_index": 0, "part": part});
                self.say_of_item("response.content_part.done", fields, out);
            }
            Some(Item::Call { name, arguments, .. }) => {
                let fields = json!({"name": name, "arguments": arguments});
                self.say_of_item("response.function_call_arguments.done", fields, out);
            }
        }
        if let Some(item) = self.open.take() {
            let item = item.to_json(status);
            let fields = json!({"output_index": self.items.len(), "item": item});
            self.say("response.output_item.done", fields, out);
            self.items.push(item);
        }
    }

    /// Appends an event about the item that goes on.
    fn say_of_item(&mut self, kind: &str, mut fields: Value, out: &mut String) {
        fields["item_id"] = json!(self.open.as_ref().map(Item::id));
        fields["output_index"] = json!(self.items.len());
        self.say(kind, fields, out);
    }

    fn say(&mut self, kind: &str, mut fields: Value, out: &mut String) {
        fields["type"] = json!(kind);
        fields["sequence_number"] = json!(self.sequence);
        self.sequence += 1;
        out.push_str(&format!("event: {kind}\ndata: {fields}\n\n"));
    }

    fn item_id(&self, prefix: &str) -> String {
        format!("{prefix}_{}_{}", self.job.unique(), self.items.len())
    }

    fn status(&self) -> &'static str {
        match self.reason {
            None => "in_progress",
            Some("length") => "incomplete",
            Some("abort") => "cancelled",
            Some(_) => "completed",
        }
    }

    /// The response as far as it is known.
    fn response(&self, status: &str) -> Value {
        let limit = (status == "incomplete").then(|| json!({"reason": "max_output_tokens"}));
        let mut response = json!({
            "id": self.job.id,
            "object": "response",
            "created_at": self.job.created_s,
            "status": status,
            "background": false,
            "error": null,
            "incomplete_details": limit,
            "model": self.job.model,
            "output": self.items,
            "previous_response_id": null,
            "reasoning": {"effort": null, "summary": null},
            "store": false,
            "truncation": "disabled",
            "usage": (status != "in_progress").then(|| self.usage()),
        });
        if let Some(map) = response.as_object_mut() {
            map.extend(self.echo.clone());
        }
        response
    }

    fn usage(&self) -> Value {
        let usage = self.meter.usage(self.job.prompt_tokens());
        let cached = usage.prompt_tokens_details.map_or(0, |details| details.cached_tokens);
        json!({
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": cached},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.total_tokens,
        })
    }
}

impl Wording for Output {
    fn job(&mut self) -> &mut Job {
        &mut self.job
    }

    fn piece(&mut self, _choice: usize, event: Event, text: &mut String) {
        self.event(event, text);
    }

    fn finish(&mut self, text: &mut String) {
        let status = self.status();
        let kind = if status == "completed" { "response.completed" } else { "response.incomplete" };
        let response = self.response(status);
        self.say(kind, json!({"response": response}), text);
    }

    /// In both forms that clients know: the fields on top, and as `error`.
    fn fail(&mut self, error: &ApiError, text: &mut String) {
        let mut event = error.to_value();
        for name in ["message", "param", "code"] {
            event[name] = event["error"][name].clone();
        }
        self.say("error", event, text);
    }
}
