//! Errors as OpenAI's API words them: `{"error": {"message", "type", "param", "code"}}`.

use std::time::Duration;

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use crate::fields::BadField;

/// Seconds a client is told to wait after a 429 or 503.
const RETRY_AFTER_S: HeaderValue = HeaderValue::from_static("5");

/// An error on its way to a client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ApiError {
    status: StatusCode,
    body: Body,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Body {
    message: String,
    r#type: &'static str,
    param: Option<String>,
    code: &'static str,
}

#[derive(Serialize)]
struct Wrapped<'a> {
    error: &'a Body,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, code: &'static str, message: String) -> Self {
        Self { status, body: Body { message, r#type: kind, param: None, code } }
    }

    /// A request that asks for something wrong.
    pub(crate) fn invalid(status: StatusCode, code: &'static str, message: String) -> Self {
        Self::new(status, "invalid_request_error", code, message)
    }

    pub(crate) fn unauthorized() -> Self {
        let message = "missing or wrong API key".to_owned();
        Self::new(StatusCode::UNAUTHORIZED, "authentication_error", "invalid_api_key", message)
    }

    /// A route or a key that is not for this.
    pub(crate) fn forbidden(message: &str) -> Self {
        let (status, message) = (StatusCode::FORBIDDEN, message.to_owned());
        Self::new(status, "permission_error", "permission_denied", message)
    }

    /// Something else is going on that rules this out.
    pub(crate) fn conflict(message: String) -> Self {
        Self::new(StatusCode::CONFLICT, "conflict_error", "conflict", message)
    }

    pub(crate) fn connections_full(limit: u32) -> Self {
        let message = format!("too many connections, limit is {limit}");
        let status = StatusCode::SERVICE_UNAVAILABLE;
        Self::new(status, "unavailable_error", "too_many_connections", message)
    }

    pub(crate) fn body_too_large(limit: usize) -> Self {
        let message = format!("body is too large, limit is {limit} bytes");
        Self::invalid(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", message)
    }

    /// The body took longer than it may.
    pub(crate) fn body_late(limit: Duration) -> Self {
        let message = format!("body did not come in time, limit is {} s", limit.as_secs_f64());
        Self::invalid(StatusCode::REQUEST_TIMEOUT, "body_timeout", message)
    }

    pub(crate) fn no_route(path: &str) -> Self {
        let message = format!("no route {path}");
        Self::new(StatusCode::NOT_FOUND, "not_found_error", "not_found", message)
    }

    pub(crate) fn no_model(model: &str) -> Self {
        let message = format!("model `{model}` does not exist");
        let mut error =
            Self::new(StatusCode::NOT_FOUND, "not_found_error", "model_not_found", message);
        error.body.param = Some("model".to_owned());
        error
    }

    pub(crate) fn draining() -> Self {
        let message = "server is shutting down".to_owned();
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable_error", "draining", message)
    }

    /// The request took longer than it may.
    pub(crate) fn deadline(limit: Duration) -> Self {
        let message = format!("request was not done in time, limit is {} s", limit.as_secs_f64());
        Self::new(StatusCode::GATEWAY_TIMEOUT, "timeout_error", "deadline_exceeded", message)
    }

    fn try_later(message: String) -> Self {
        Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", "queue_full", message)
    }

    /// The queue is full.
    pub(crate) fn queue_full(waiting: usize, limit: usize) -> Self {
        Self::try_later(format!("{waiting} sequences wait, limit is {limit}"))
    }

    pub(crate) fn engine_dead() -> Self {
        let message = "engine has stopped".to_owned();
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable_error", "engine_dead", message)
    }

    /// The engine has not finished a step for longer than `limit`.
    pub(crate) fn engine_stalled(limit: Duration) -> Self {
        let message = format!("engine has finished no step for over {} s", limit.as_secs_f64());
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable_error", "engine_stalled", message)
    }

    pub(crate) fn compilers_busy() -> Self {
        Self::try_later("too many grammars are being compiled".to_owned())
    }

    pub(crate) fn texts_busy() -> Self {
        Self::try_later("too many long texts are being tokenized".to_owned())
    }

    /// Our fault; the text says nothing about the inside.
    pub(crate) fn internal(message: &str) -> Self {
        let message = message.to_owned();
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal_error", "internal_error", message)
    }

    /// The same error where fields have other names: of each pair the first becomes the second, in
    /// `param` and at the beginning of the message.
    pub(crate) fn renamed(mut self, names: &[(&str, &str)]) -> Self {
        let param = self.body.param.as_deref();
        if let Some((old, new)) = names.iter().find(|(old, _)| param == Some(*old)) {
            if let Some(rest) = self.body.message.strip_prefix(old) {
                self.body.message = format!("{new}{rest}");
            }
            self.body.param = Some((*new).to_owned());
        }
        self
    }

    /// The body as JSON.
    pub(crate) fn to_value(&self) -> serde_json::Value {
        serde_json::json!(Wrapped { error: &self.body })
    }

    pub(crate) fn status(&self) -> StatusCode {
        self.status
    }

    /// The body, as it also stands in an event of a stream.
    pub(crate) fn to_json(&self) -> String {
        serde_json::to_string(&Wrapped { error: &self.body }).expect("strings serialise")
    }
}

impl From<BadField> for ApiError {
    fn from(bad: BadField) -> Self {
        let mut error = Self::invalid(StatusCode::BAD_REQUEST, bad.code, bad.message);
        error.body.param = bad.param;
        error
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(Wrapped { error: &self.body })).into_response();
        if matches!(self.status, StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS) {
            response.headers_mut().insert(header::RETRY_AFTER, RETRY_AFTER_S);
        }
        response
    }
}
