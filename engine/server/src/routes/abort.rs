//! `POST /inference/v1/abort_requests`: ends requests by name, with vLLM's body `{"request_ids": [...]}`.
//!
//! Works while the server drains, too. A name that nothing has is no error: what it named may have ended.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::{Body, read_body};
use crate::api_error::ApiError;
use crate::app::App;
use crate::fields::{BadField, Fields};
use crate::params::at_most;

/// Most names in one request.
const MAX_NAMES: usize = 4096;

/// Ends what the body names; the answer lists the names that something had.
pub(super) async fn abort(State(app): State<Arc<App>>, headers: HeaderMap, body: Body) -> Response {
    match ended(app, &headers, body).await {
        Ok(names) => Json(json!({"aborted": names})).into_response(),
        Err(error) => error.into_response(),
    }
}

async fn ended(app: Arc<App>, headers: &HeaderMap, body: Body) -> Result<Vec<String>, ApiError> {
    let body = read_body(&app, headers, body)?;
    // A long body takes processor time.
    let read = move || {
        let names = names(&app, &body)?;
        Ok(app.live.named.abort(&app.service, &names))
    };
    tokio::task::spawn_blocking(read)
        .await
        .map_err(|_panicked| ApiError::internal("the request could not be read"))?
}

fn names(app: &App, body: &[u8]) -> Result<Vec<String>, ApiError> {
    const NAME: &str = "request_ids";
    let mut fields = Fields::parse(body)?;
    let wrong = |what: &str| BadField::new(NAME, format!("{NAME} {what}"));
    let list = fields.take(NAME).ok_or_else(|| wrong("is missing"))?;
    let Value::Array(list) = list else {
        return Err(wrong("is no array, expected an array of strings").into());
    };
    at_most(NAME, list.len(), MAX_NAMES)?;
    app.report_unknown(&fields)?;
    let names = list.iter().map(|name| name.as_str().map(str::to_owned));
    let names = names.collect::<Option<_>>();
    Ok(names.ok_or_else(|| wrong("has an entry that is no string"))?)
}
