//! Server-sent events: a running job told piece by piece, whatever the API that words the pieces.
//!
//! The status line is out before the first token, so a later failure becomes an event. A silent stream
//! gets comments. Dropping the stream, as happens when the client leaves, drops the job and so aborts it.

use std::convert::Infallible;

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::Response;
use engine::Event;
use futures_util::stream;
use tokio::time::timeout;

use crate::api_error::ApiError;
use crate::job::Job;

/// Ends the streams of all APIs but Responses.
pub(crate) const DONE: &str = "data: [DONE]\n\n";

/// A comment that keeps a stream open while there is nothing to say.
const KEEP_ALIVE: &str = ": keep-alive\n\n";

/// Length of a piece, in bytes, from which on the events that have come with it wait for the next. What a reader
/// who does not read holds up stays in the bounded queue of events, which ends the request when it is full.
const PIECE_BYTES: usize = 64 << 10;

/// How an API words the events of a job; each method appends to `text` what is to be sent.
pub(crate) trait Wording: Send + 'static {
    /// The job whose events are told.
    fn job(&mut self) -> &mut Job;

    /// Tells an event of a choice; may say nothing yet.
    fn piece(&mut self, choice: usize, event: Event, text: &mut String);

    /// Tells the end, when every choice has ended.
    fn finish(&mut self, text: &mut String);

    /// Tells a failure, which ends the stream.
    fn fail(&mut self, error: &ApiError, text: &mut String) {
        text.push_str(&format!("data: {}\n\n{DONE}", error.to_json()));
    }
}

/// The answer that says `opening` and then what `wording` makes of its job's events.
pub(crate) fn response(wording: impl Wording, opening: String) -> Response {
    let told = Told { wording, ready: opening, over: false };
    let body = stream::unfold(told, async |mut told| {
        let bytes = told.next().await?;
        Some((Ok::<_, Infallible>(bytes), told))
    });
    let mut response = Response::new(Body::from_stream(body));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Tells nginx not to hold the pieces back.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

struct Told<W> {
    wording: W,
    /// What is to be sent next.
    ready: String,
    over: bool,
}

impl<W: Wording> Told<W> {
    /// The next bytes; `None` after the last.
    async fn next(&mut self) -> Option<Bytes> {
        let mut text = std::mem::take(&mut self.ready);
        while text.is_empty() {
            if self.over {
                return None;
            }
            let patience = self.wording.job().keep_alive;
            // Cut short before the next event only, so nothing is lost.
            match timeout(patience, self.gather(&mut text)).await {
                Err(_elapsed) => text.push_str(KEEP_ALIVE),
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    self.wording.fail(&error, &mut text);
                    self.over = true;
                }
            }
        }
        Some(Bytes::from(text))
    }

    /// Appends the next event, and those that have come with it, to `text`, which stays a piece.
    async fn gather(&mut self, text: &mut String) -> Result<(), ApiError> {
        let mut next = self.wording.job().generation.next().await?;
        if next.is_none() {
            self.wording.finish(text);
            self.over = true;
        }
        while let Some((index, event)) = next {
            self.wording.piece(index, event, text);
            if text.len() >= PIECE_BYTES {
                break;
            }
            next = self.wording.job().generation.try_next()?;
        }
        Ok(())
    }
}
