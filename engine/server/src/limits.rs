//! What a connection may take: time, bytes, places.
//!
//! A body that comes too slowly is cut off here; heads and readers that are too slow are the business of
//! `connection.rs` and `wire.rs`.

use std::error::Error as StdError;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, HttpBody};
use axum::extract::{Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use futures_util::StreamExt;
use futures_util::stream;
use tokio::time::{Instant, timeout_at};

use crate::api_error::ApiError;
use crate::app::App;
use crate::error::{Error, Result};

/// Limits of a connection, whatever is asked on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// How long the head of a request may take, and how long a connection may stay idle before it; then it
    /// is closed.
    pub header_timeout: Duration,
    /// How long a request's body may take from its head on; then it gets 408.
    pub body_timeout: Duration,
    /// How long a client may take none of the bytes that are there for it; then its connection is closed
    /// and what it asked for is aborted.
    pub stall_timeout: Duration,
    /// Connections that are open at once, at least 1; further ones get 503 and are closed.
    pub max_connections: u32,
    /// Longest head of a request in bytes, at least 8192; a longer one gets 431.
    pub max_header_bytes: usize,
    /// Most header lines of a request, at least 1; more get 431.
    pub max_headers: usize,
}

impl Default for Limits {
    /// 60 s for a head, a body and a reader that stalls; 16,384 connections; heads of 64 KiB and 256 lines.
    fn default() -> Self {
        Self {
            header_timeout: Duration::from_secs(60),
            body_timeout: Duration::from_secs(60),
            stall_timeout: Duration::from_secs(60),
            max_connections: 16_384,
            max_header_bytes: 64 << 10,
            max_headers: 256,
        }
    }
}

impl Limits {
    /// Longest time limit of a server: a year, which any clock can add.
    pub const MAX_TIMEOUT: Duration = Duration::from_secs(365 * 86_400);

    /// Least of [`max_header_bytes`](Self::max_header_bytes): what a connection reads at once.
    pub const MIN_HEADER_BYTES: usize = 8192;

    /// Checks every value against its range.
    ///
    /// # Errors
    /// Names the value and its limit.
    pub fn check(&self) -> Result<()> {
        let at_least = [
            ("max_connections", self.max_connections as usize, 1),
            ("max_header_bytes", self.max_header_bytes, Self::MIN_HEADER_BYTES),
            ("max_headers", self.max_headers, 1),
        ];
        for (name, value, least) in at_least {
            if value < least {
                return Err(Error::config(format!("{name} is {value}, limit is at least {least}")));
            }
        }
        let timeouts = [
            ("header_timeout", self.header_timeout),
            ("body_timeout", self.body_timeout),
            ("stall_timeout", self.stall_timeout),
        ];
        timeouts.into_iter().try_for_each(|(name, value)| check_timeout(name, value))
    }
}

/// Refuses a time limit beyond [`Limits::MAX_TIMEOUT`].
pub(crate) fn check_timeout(name: &str, value: Duration) -> Result<()> {
    if value <= Limits::MAX_TIMEOUT {
        return Ok(());
    }
    let (value, most) = (value.as_secs_f64(), Limits::MAX_TIMEOUT.as_secs());
    Err(Error::config(format!("{name} is {value} s, limit is {most} s")))
}

/// A body that did not come in time.
#[derive(Debug)]
struct Late;

impl fmt::Display for Late {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the body did not come in time")
    }
}

impl StdError for Late {}

/// Refuses a body that says it is too large before it is read, and gives every other one a deadline.
pub(crate) async fn bound_body(
    State(app): State<Arc<App>>,
    request: Request,
    next: Next,
) -> Response {
    let said = request.headers().get(header::CONTENT_LENGTH).and_then(|said| said.to_str().ok());
    let limit = app.config.max_body_bytes;
    if said.and_then(|said| said.parse::<u64>().ok()).is_some_and(|said| said > limit as u64) {
        return ApiError::body_too_large(limit).into_response();
    }
    if request.body().is_end_stream() {
        return next.run(request).await;
    }
    let deadline = Instant::now() + app.config.limits.body_timeout;
    next.run(request.map(|body| in_time(body, deadline))).await
}

/// The same body, which fails at `deadline`.
fn in_time(body: Body, deadline: Instant) -> Body {
    let pieces = stream::unfold(Some(body.into_data_stream()), move |pieces| async move {
        let mut pieces = pieces?;
        match timeout_at(deadline, pieces.next()).await {
            Ok(piece) => Some((piece?.map_err(axum::BoxError::from), Some(pieces))),
            Err(_elapsed) => Some((Err(axum::BoxError::from(Late)), None)),
        }
    });
    Body::from_stream(pieces)
}

/// The answer to a body that could not be read because of `error`.
pub(crate) fn unreadable(app: &App, error: &(dyn StdError + 'static)) -> ApiError {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if error.is::<Late>() {
            return ApiError::body_late(app.config.limits.body_timeout);
        }
        cause = error.source();
    }
    let message = "body could not be read".to_owned();
    ApiError::invalid(StatusCode::BAD_REQUEST, "invalid_request", message)
}
