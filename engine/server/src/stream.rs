//! An answer in pieces: server-sent events, one `data: {...}` each, ending with `data: [DONE]`.
//!
//! The status line is out before the first token, so a later failure becomes an event with the same
//! body as an error answer. Dropping the stream, as happens when the client leaves, drops the job and
//! so aborts it.

use std::collections::VecDeque;
use std::convert::Infallible;

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::Response;
use engine::Event;
use futures_util::stream;
use serde::Serialize;
use tokio::time::timeout;

use crate::answer::{Meter, Usage};
use crate::api_error::ApiError;
use crate::chat::{self, ChunkChoice};
use crate::completions::{self, TextChoice};
use crate::echo::Opener;
use crate::job::{Api, Delivery, Job, StreamUsage};
use crate::tool_calls::CallParser;

/// Ends every stream.
const DONE: &str = "data: [DONE]\n\n";

/// A comment that keeps a stream open while there is nothing to say.
const KEEP_ALIVE: &str = ": keep-alive\n\n";

/// The answer to `job` as a stream.
pub(crate) fn response(job: Job) -> Response {
    let streamer = Streamer::new(job);
    let body = stream::unfold(streamer, async |mut streamer| {
        let bytes = streamer.next().await?;
        Some((Ok::<_, Infallible>(bytes), streamer))
    });
    let mut response = Response::new(Body::from_stream(body));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Tells nginx not to hold the pieces back.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

/// One piece, as both APIs frame it.
#[derive(Serialize)]
struct Chunk<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: Choices,
    /// Absent unless asked for; then `null` in all pieces but the last, or in none.
    #[serde(skip_serializing_if = "Option::is_none")]
    usage: Option<Option<Usage>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    prompt_token_ids: Option<&'a [u32]>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Choices {
    None([(); 0]),
    Chat([ChunkChoice; 1]),
    Text([TextChoice; 1]),
}

struct Streamer {
    job: Job,
    meter: Meter,
    /// Characters of each choice so far, where log-probabilities report offsets.
    offsets: Vec<usize>,
    /// Puts the prompt before each choice, where it is echoed.
    opener: Opener,
    /// Finds the calls of each choice, where tools were offered.
    calls: Vec<Option<CallParser>>,
    ready: VecDeque<Bytes>,
    over: bool,
}

impl Streamer {
    fn new(job: Job) -> Self {
        let offsets = vec![0; job.choices()];
        let calls = (0..job.choices()).map(|choice| job.call_parser(choice)).collect();
        let (ready, opener) = (VecDeque::new(), Opener::new(&job));
        let mut streamer =
            Self { job, meter: Meter::default(), offsets, opener, calls, ready, over: false };
        if streamer.job.api == Api::Chat {
            let mut text = String::new();
            for index in 0..streamer.job.choices() {
                let prompt = streamer.job.report.token_ids.then(|| streamer.job.prompt(index));
                let chunk = Chunk {
                    prompt_token_ids: prompt,
                    ..streamer.chunk(Choices::Chat([chat::opening(index)]))
                };
                push(&mut text, &chunk);
            }
            streamer.ready.push_back(Bytes::from(text));
        }
        streamer
    }

    /// The next bytes; `None` after the last.
    async fn next(&mut self) -> Option<Bytes> {
        while self.ready.is_empty() {
            if self.over {
                return None;
            }
            let mut text = String::new();
            // Cut short before the next event only, so nothing is lost.
            let gathered = timeout(self.job.keep_alive, self.gather(&mut text)).await;
            let Ok(gathered) = gathered else {
                self.ready.push_back(Bytes::from_static(KEEP_ALIVE.as_bytes()));
                continue;
            };
            if let Err(error) = gathered {
                text.push_str(&format!("data: {}\n\n{DONE}", error.to_json()));
                self.over = true;
            }
            if !text.is_empty() {
                self.ready.push_back(Bytes::from(text));
            }
        }
        self.ready.pop_front()
    }

    /// Appends the next event, and those that have come with it, to `text`.
    async fn gather(&mut self, text: &mut String) -> Result<(), ApiError> {
        let mut next = self.job.generation.next().await?;
        if next.is_none() {
            self.finish(text);
        }
        while let Some((index, event)) = next {
            self.piece(index, event, text);
            next = self.job.generation.try_next()?;
        }
        Ok(())
    }

    fn piece(&mut self, index: usize, mut event: Event, text: &mut String) {
        let begin = &mut self.offsets[index];
        if let Some(prompt) = self.opener.open(&self.job, (index, &mut event), begin) {
            push(text, &self.chunk(Choices::Text([prompt])));
        }
        self.meter.count(&event);
        let choice = match self.job.api {
            Api::Chat => {
                let calls = self.calls[index].as_mut();
                chat::piece(&self.job, index, event, calls).map(|piece| Choices::Chat([piece]))
            }
            Api::Completions => {
                let offset = &mut self.offsets[index];
                completions::piece(&self.job, index, event, offset)
                    .map(|piece| Choices::Text([piece]))
            }
        };
        if let Some(choice) = choice {
            push(text, &self.chunk(choice));
        }
    }

    fn finish(&mut self, text: &mut String) {
        if self.usage() != StreamUsage::Omit {
            let usage = self.meter.usage(self.job.prompt_tokens());
            let chunk = Chunk { usage: Some(Some(usage)), ..self.chunk(Choices::None([])) };
            push(text, &chunk);
        }
        text.push_str(DONE);
        self.over = true;
    }

    fn usage(&self) -> StreamUsage {
        match self.job.delivery {
            Delivery::Stream { usage } => usage,
            Delivery::Whole => StreamUsage::Omit,
        }
    }

    fn chunk(&self, choices: Choices) -> Chunk<'_> {
        Chunk {
            id: &self.job.id,
            object: match self.job.api {
                Api::Chat => "chat.completion.chunk",
                Api::Completions => "text_completion",
            },
            created: self.job.created_s,
            model: &self.job.model,
            choices,
            usage: match self.usage() {
                StreamUsage::Omit => None,
                StreamUsage::Last => Some(None),
                StreamUsage::Each => Some(Some(self.meter.usage_so_far(self.job.prompt_tokens()))),
            },
            prompt_token_ids: None,
        }
    }
}

fn push(text: &mut String, chunk: &Chunk<'_>) {
    let json = serde_json::to_string(chunk).expect("chunks have string keys");
    text.push_str(&format!("data: {json}\n\n"));
}
