//! OpenAI-compatible HTTP over an [`engine::Service`].
//!
//! A web page at `/`, `GET /v1/models`, `POST /v1/chat/completions`, `POST /v1/completions`, `POST /v1/responses`,
//! `/tokenize`, `/detokenize`, `/inference/v1/generate`, `/inference/v1/abort_requests`, `/version`, `/metrics`, `/health`,
//! and `/openapi.json`, which describes them; answers whole or as server-sent events. Parameters are spelled as vLLM spells them, errors have OpenAI's form on every path. Answers
//! follow grammars, and call tools in the form of Hermes and Qwen. Pauses and updates of the weights
//! are asked for on a second listener only ([`Listeners`]). A feature that is not offered is a 400 that names it. Nothing here prints, reads the environment or handles signals:
//! what is worth a log line goes to the callback of [`ServerConfig`].
//!
//! ```no_run
//! # async fn example(service: std::sync::Arc<engine::Service>) -> server::Result<()> {
//! let listener = tokio::net::TcpListener::bind("127.0.0.1:8000").await.expect("a free port");
//! let config = server::ServerConfig::new("my-model");
//! server::serve(service, config, listener, std::future::pending()).await
//! # }
//! ```
#![forbid(unsafe_code)]

mod access;
mod admin;
mod answer;
mod api_error;
mod app;
mod chat;
mod completions;
mod connection;
mod cors;
mod echo;
mod encode;
mod error;
mod fields;
mod generation;
mod job;
mod json;
mod limits;
mod load_report;
mod logprobs;
mod metrics;
mod named;
mod openapi;
mod outbox;
mod page;
mod params;
mod prompt_params;
mod refused;
mod request_log;
mod responses;
mod routes;
mod run_state;
mod sse;
mod stream;
mod structured;
mod tool_calls;
mod tools;
mod wire;

pub use app::{Log, LogEvent, ServerConfig, UnknownFields};
pub use connection::{Listener, Listeners};
pub use cors::{Cors, Credentials};
pub use error::{Error, ErrorKind, Result};
pub use fields::{BadField, Fields};
pub use limits::Limits;
pub use load_report::LoadReport;
pub use metrics::MetricsNames;
pub use params::{default_params, messages, sampling_params};
pub use request_log::RequestLog;
pub use routes::serve;
pub use run_state::{RunPoint, RunState};
