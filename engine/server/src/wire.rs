//! A connection's bytes on their way.
//!
//! Out: fails when the client has taken none of them for too long, and puts OpenAI's error form in place of the
//! bare answers that hyper gives to heads it cannot read (400, 414, 431): those reach no route.
//!
//! In: notices that the client has left while hyper does not read, as it does not before an answer is out when
//! bytes have come behind its request.

use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::http::StatusCode;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};

use crate::access::unique_name;
use crate::api_error::ApiError;
use crate::limits::Limits;

/// Bytes that are read ahead of hyper. Behind as many, a client that leaves is noticed when its answer is written;
/// until then it has its place among the connections.
const AHEAD_BYTES: usize = 64 << 10;
/// Bytes that are read at once then.
const PIECE_BYTES: usize = 2 << 10;

/// A socket, watched.
pub(crate) struct Wire<I> {
    io: I,
    limits: Limits,
    /// Runs while the client takes nothing.
    stalled: Option<Pin<Box<Sleep>>>,
    own: Option<Own>,
    /// What has been read and hyper has not taken.
    ahead: Vec<u8>,
    /// Whether hyper waits for bytes.
    awaited: bool,
}

/// A wire that hyper uses and whoever drives hyper looks after.
pub(crate) struct SharedWire<I>(Arc<Mutex<Wire<I>>>);

/// Bytes that are written in place of others.
struct Own {
    bytes: Vec<u8>,
    written: usize,
    /// How many bytes they stand for.
    instead_of: usize,
}

impl<I> Clone for SharedWire<I> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<I> SharedWire<I> {
    pub(crate) fn new(io: I, limits: Limits) -> Self {
        Self(Arc::new(Mutex::new(Wire::new(io, limits))))
    }

    fn locked(&self) -> MutexGuard<'_, Wire<I>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<I: AsyncRead + Unpin> SharedWire<I> {
    /// Drives `connection`, which is hyper's over this wire, to its end, or until the client has left.
    pub(crate) async fn drive(&self, mut connection: Pin<&mut impl Future>) {
        std::future::poll_fn(|cx| {
            self.locked().awaited = false;
            if connection.as_mut().poll(cx).is_ready() {
                return Poll::Ready(());
            }
            self.locked().poll_left(cx)
        })
        .await;
    }
}

impl<I> Wire<I> {
    fn new(io: I, limits: Limits) -> Self {
        let (ahead, awaited) = (Vec::new(), false);
        Self { io, limits, stalled: None, own: None, ahead, awaited }
    }

    /// The same outcome, unless it is to wait and there was too much of that.
    fn watched<T>(
        &mut self,
        cx: &mut Context<'_>,
        outcome: Poll<io::Result<T>>,
    ) -> Poll<io::Result<T>> {
        if outcome.is_ready() {
            self.stalled = None;
            return outcome;
        }
        let patience: Duration = self.limits.stall_timeout;
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(sleep(patience)));
        ready!(stalled.as_mut().poll(cx));
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, "the client takes no bytes")))
    }
}

impl<I: AsyncRead + Unpin> Wire<I> {
    /// Ready when the client has left and hyper, which does not wait for bytes, cannot notice it.
    fn poll_left(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        while !self.awaited && self.ahead.len() < AHEAD_BYTES {
            let mut piece = [0; PIECE_BYTES];
            let mut buf = ReadBuf::new(&mut piece);
            let read = ready!(Pin::new(&mut self.io).poll_read(cx, &mut buf));
            // How it has left (end or reset) is its own business.
            if read.is_err() || buf.filled().is_empty() {
                return Poll::Ready(());
            }
            self.ahead.extend_from_slice(buf.filled());
        }
        Poll::Pending
    }
}

impl<I: AsyncRead + Unpin> AsyncRead for Wire<I> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.ahead.is_empty() {
            let taken = this.ahead.len().min(buf.remaining());
            buf.put_slice(&this.ahead[..taken]);
            this.ahead.drain(..taken);
            this.awaited = false;
            return Poll::Ready(Ok(()));
        }
        let read = Pin::new(&mut this.io).poll_read(cx, buf);
        this.awaited = read.is_pending();
        read
    }
}

impl<I: AsyncRead + Unpin> AsyncRead for SharedWire<I> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.locked()).poll_read(cx, buf)
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for SharedWire<I> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.locked()).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.locked()).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.locked()).poll_shutdown(cx)
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for Wire<I> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        if this.own.is_none()
            && let Some(error) = bare(buf, &this.limits)
        {
            let bytes = whole_answer(&error);
            this.own = Some(Own { bytes, written: 0, instead_of: buf.len() });
        }
        while let Some(own) = &this.own {
            if own.written == own.bytes.len() {
                let instead_of = own.instead_of;
                this.own = None;
                return Poll::Ready(Ok(instead_of));
            }
            let outcome = Pin::new(&mut this.io).poll_write(cx, &own.bytes[own.written..]);
            let written = ready!(this.watched(cx, outcome))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            if let Some(own) = &mut this.own {
                own.written += written;
            }
        }
        let outcome = Pin::new(&mut this.io).poll_write(cx, buf);
        this.watched(cx, outcome)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let outcome = Pin::new(&mut this.io).poll_flush(cx);
        this.watched(cx, outcome)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let outcome = Pin::new(&mut this.io).poll_shutdown(cx);
        this.watched(cx, outcome)
    }
}

/// The error that an answer without a body stands for; `None` for every answer of a route, as those of
/// these codes have a body.
fn bare(answer: &[u8], limits: &Limits) -> Option<ApiError> {
    let code = answer.strip_prefix(b"HTTP/1.1 ")?.first_chunk::<3>()?;
    if !matches!(code, b"400" | b"414" | b"431") {
        return None;
    }
    let empty = b"\r\ncontent-length: 0\r\n";
    let found = answer.ends_with(b"\r\n\r\n") && answer.windows(empty.len()).any(|w| w == empty);
    found.then(|| match code {
        b"414" => ApiError::invalid(
            StatusCode::URI_TOO_LONG,
            "uri_too_long",
            format!("request target is too long, limit is {} bytes", u16::MAX - 1),
        ),
        b"431" => ApiError::invalid(
            StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            "headers_too_large",
            format!(
                "head is too large, limit is {} bytes and {} lines",
                limits.max_header_bytes, limits.max_headers
            ),
        ),
        _ => ApiError::invalid(
            StatusCode::BAD_REQUEST,
            "invalid_request",
            "head is not valid HTTP/1.1".to_owned(),
        ),
    })
}

/// An answer as bytes, after which the connection is closed.
pub(crate) fn whole_answer(error: &ApiError) -> Vec<u8> {
    let (status, body) = (error.status(), error.to_json());
    let retry = if status == StatusCode::SERVICE_UNAVAILABLE { "retry-after: 5\r\n" } else { "" };
    format!(
        "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\
         x-request-id: {}\r\n{retry}connection: close\r\n\r\n{body}",
        body.len(),
        unique_name(0)
    )
    .into_bytes()
}
