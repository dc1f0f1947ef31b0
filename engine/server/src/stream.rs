//! An answer of the chat or the completions API in pieces: one `data: {...}` each, ending with
//! `data: [DONE]`. A failure is an event with the same body as an error answer.

use axum::response::Response;
use engine::Event;
use serde::Serialize;

use crate::answer::{Meter, Usage};
use crate::chat::{self, ChunkChoice};
use crate::completions::{self, TextChoice};
use crate::echo::Opener;
use crate::job::{Api, Delivery, Job, StreamUsage};
use crate::sse::{self, DONE, Wording, push};
use crate::tool_calls::CallParser;

/// The answer to `job` as a stream.
pub(crate) fn response(job: Job) -> Response {
    let mut opening = String::new();
    let streamer = Streamer::new(job, &mut opening);
    sse::response(streamer, opening)
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
    /// Choices of completions whose prompt's tokens are still to be told.
    untold: Vec<bool>,
}

impl Streamer {
    /// Appends what opens the stream to `text`.
    fn new(job: Job, text: &mut String) -> Self {
        let offsets = vec![0; job.choices()];
        let calls = (0..job.choices()).map(|choice| job.call_parser(choice)).collect();
        let opener = Opener::new(&job);
        let untold = vec![job.report.token_ids; job.choices()];
        let streamer = Self { job, meter: Meter::default(), offsets, opener, calls, untold };
        if streamer.job.api == Api::Chat {
            for index in 0..streamer.job.choices() {
                let prompt = streamer.job.report.token_ids.then(|| streamer.job.prompt(index));
                let chunk = Chunk {
                    prompt_token_ids: prompt,
                    ..streamer.chunk(Choices::Chat([chat::opening(index)]))
                };
                push(text, &chunk);
            }
        }
        streamer
    }

    /// A piece of a completion; the first of its choice tells the prompt's tokens where tokens are asked for.
    fn text_piece(&mut self, mut piece: TextChoice) -> Choices {
        if std::mem::take(&mut self.untold[piece.index]) {
            piece.prompt_token_ids = Some(self.job.prompt(piece.index).to_vec());
        }
        Choices::Text([piece])
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

impl Wording for Streamer {
    fn job(&mut self) -> &mut Job {
        &mut self.job
    }

    fn piece(&mut self, index: usize, mut event: Event, text: &mut String) {
        let begin = &mut self.offsets[index];
        if let Some(prompt) = self.opener.open(&self.job, (index, &mut event), begin) {
            let prompt = self.text_piece(prompt);
            push(text, &self.chunk(prompt));
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
                    .map(|piece| self.text_piece(piece))
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
    }
}
