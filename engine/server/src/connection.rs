//! From a listening socket to connections, each of them within its limits.
//!
//! Connections have their places counted: one beyond the limit is told so and closed, so that whoever comes
//! never waits for others to leave. Requests on a connection are answered one after the other, also when they
//! come together. Leaves out TLS and HTTP/2.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{Semaphore, watch};
use tokio::time::timeout;

use crate::api_error::ApiError;
use crate::app::{App, LogEvent};
use crate::limits::Limits;
use crate::wire::{SharedWire, whole_answer};

/// Connections that are being told that there is no place.
const TURNED_AWAY: usize = 64;
/// How long one that is turned away has to read why.
const GOODBYE: Duration = Duration::from_secs(1);

/// A socket that listens.
#[derive(Debug)]
pub enum Listener {
    /// An address of the network.
    Tcp(TcpListener),
    /// A socket in the file system.
    Unix(UnixListener),
}

/// The sockets of a server.
#[derive(Debug)]
pub struct Listeners {
    /// Where clients come.
    pub public: Listener,
    /// Where the operator comes: `/pause`, `/resume`, `/is_paused` and `/update_weights_from_disk` are
    /// answered here only.
    pub admin: Option<Listener>,
}

impl From<TcpListener> for Listeners {
    /// Without a place for the operator.
    fn from(listener: TcpListener) -> Self {
        Self { public: Listener::Tcp(listener), admin: None }
    }
}

/// Takes in connections and answers them by `router` until `stop` ends; returns when all have left.
pub(crate) async fn accept(
    listener: Listener,
    router: Router,
    app: Arc<App>,
    stop: watch::Receiver<()>,
) {
    match listener {
        Listener::Tcp(listener) => {
            let listener = axum::serve::ListenerExt::tap_io(listener, |stream| {
                // Without it a token would wait for the previous one's acknowledgement; with it refused
                // the server still works.
                let _refused = stream.set_nodelay(true);
            });
            accept_from(listener, router, app, stop).await;
        }
        Listener::Unix(listener) => accept_from(listener, router, app, stop).await,
    }
}

async fn accept_from<L: axum::serve::Listener>(
    mut listener: L,
    router: Router,
    app: Arc<App>,
    mut stop: watch::Receiver<()>,
) {
    let limits = app.config.limits;
    let seats = Arc::new(Semaphore::new(limits.max_connections as usize));
    let doorstep = Arc::new(Semaphore::new(TURNED_AWAY));
    let told = AtomicBool::new(false);
    loop {
        let (io, _peer) = tokio::select! {
            connection = listener.accept() => connection,
            // A dropped sender means the same as a sent word.
            _ = stop.changed() => break,
        };
        if let Ok(seat) = Arc::clone(&seats).try_acquire_owned() {
            told.store(false, Ordering::Relaxed);
            let (router, stop) = (router.clone(), stop.clone());
            tokio::spawn(async move {
                serve(io, router, limits, stop).await;
                drop(seat);
            });
        } else {
            if !told.swap(true, Ordering::Relaxed) {
                app.log(&LogEvent::ConnectionsFull { limit: limits.max_connections });
            }
            // Beyond even that they are closed without a word.
            if let Ok(place) = Arc::clone(&doorstep).try_acquire_owned() {
                tokio::spawn(async move {
                    let _late = timeout(GOODBYE, turn_away(io, limits.max_connections)).await;
                    drop(place);
                });
            }
        }
    }
    drop(listener);
    // Nobody closes the semaphore.
    let _all = seats.acquire_many(limits.max_connections).await;
}

/// Answers the requests of one connection.
async fn serve<I>(io: I, router: Router, limits: Limits, mut stop: watch::Receiver<()>)
where
    I: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(limits.header_timeout)
        .max_headers(limits.max_headers)
        .max_header_size(limits.max_header_bytes)
        .max_buf_size(limits.max_header_bytes.max(Limits::MIN_HEADER_BYTES));
    let wire = SharedWire::new(io, limits);
    let (io, router) = (TokioIo::new(wire.clone()), TowerToHyperService::new(router));
    let mut connection = pin!(http.serve_connection(io, router));
    // How a connection fails (reset, too slow, not HTTP) is its client's business, who has been told what
    // can be told; what it asked for has a log line of its own.
    let stopped = tokio::select! {
        () = wire.drive(connection.as_mut()) => return,
        _ = stop.changed() => connection.as_mut(),
    };
    stopped.graceful_shutdown();
    wire.drive(connection).await;
}

/// Says that there is no place, and waits until that is read.
async fn turn_away(mut io: impl AsyncRead + AsyncWrite + Unpin, limit: u32) {
    let answer = whole_answer(&ApiError::connections_full(limit));
    // Whoever leaves before has lost nothing.
    let _left = io.write_all(&answer).await;
    let _left = io.shutdown().await;
    let mut unread = [0; 1024];
    while io.read(&mut unread).await.is_ok_and(|bytes| bytes > 0) {}
}
