//! Server-sent events: a running job told piece by piece, whatever the API that words the pieces.
//!
//! The status line is out before the first token, so a later failure becomes an event. A silent stream
//! gets comments. Dropping the stream, as happens when the client leaves, drops the job and so aborts it.

use std::convert::Infallible;
use std::ops::ControlFlow;
use std::pin::Pin;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::{HeaderValue, header};
use axum::response::Response;
use engine::Event;
use futures_util::stream;
use serde::Serialize;
use tokio::time::{Instant, Sleep, sleep};

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

/// Appends an event that says `data` in JSON.
pub(crate) fn push(text: &mut String, data: &impl Serialize) {
    let json = serde_json::to_string(data).expect("what is sent has string keys");
    let parts = ["data: ", &json, "\n\n"];
    text.reserve(parts.iter().map(|part| part.len()).sum());
    text.extend(parts);
}

/// The answer that says `opening` and then what `wording` makes of its job's events.
pub(crate) fn response(mut wording: impl Wording, opening: String) -> Response {
    let silence = Silence::begin(wording.job().keep_alive);
    // Passed on by value for every piece, so in a box.
    let told = Box::new(Told { wording, ready: opening, silence, over: false });
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
    silence: Silence,
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
            self.silence.restart();
            // Cut short before the next event only, so nothing is lost.
            let gathered = tokio::select! {
                biased;
                gathered = gather(&mut self.wording, &mut text) => gathered,
                () = self.silence.lasted() => {
                    text.push_str(KEEP_ALIVE);
                    continue;
                }
            };
            match gathered {
                Ok(flow) => self.over = flow.is_break(),
                Err(error) => {
                    self.wording.fail(&error, &mut text);
                    self.over = true;
                }
            }
        }
        Some(Bytes::from(text))
    }
}

/// Appends the next event, and those that have come with it, to `text`, which stays a piece; breaks at the
/// end.
async fn gather(
    wording: &mut impl Wording,
    text: &mut String,
) -> Result<ControlFlow<()>, ApiError> {
    let mut next = wording.job().generation.next().await?;
    if next.is_none() {
        wording.finish(text);
        return Ok(ControlFlow::Break(()));
    }
    while let Some((index, event)) = next {
        wording.piece(index, event, text);
        if text.len() >= PIECE_BYTES {
            break;
        }
        next = wording.job().generation.try_next()?;
    }
    Ok(ControlFlow::Continue(()))
}

/// The time for which a stream has said nothing.
struct Silence {
    patience: Duration,
    since: Instant,
    /// Runs out when the silence may have lasted long enough. Not set for every event: that takes a lock
    /// which all timers share.
    timer: Pin<Box<Sleep>>,
}

impl Silence {
    fn begin(patience: Duration) -> Self {
        Self { patience, since: Instant::now(), timer: Box::pin(sleep(patience)) }
    }

    fn restart(&mut self) {
        self.since = Instant::now();
    }

    /// Waits until it has lasted for its patience.
    async fn lasted(&mut self) {
        loop {
            self.timer.as_mut().await;
            if self.since.elapsed() >= self.patience {
                return;
            }
            self.timer.as_mut().reset(self.since + self.patience);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_silence_lasts_from_what_was_said_last() {
        let patience = Duration::from_millis(2);
        let mut silence = Silence::begin(patience);
        for _ in 0..2 {
            silence.restart();
            silence.lasted().await;
            assert!(silence.since.elapsed() >= patience);
        }
        // The timer has run out, and something was said meanwhile.
        silence.patience = Duration::from_secs(3600);
        silence.restart();
        let lasted = tokio::time::timeout(patience, silence.lasted()).await;
        assert!(lasted.is_err());
        assert_eq!(silence.timer.deadline(), silence.since + silence.patience);
    }
}
