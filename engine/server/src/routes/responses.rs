//! `POST /v1/responses`: a chat in other words, see [`crate::responses`].

use std::sync::Arc;

use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};

use super::{Body, read};
use crate::api_error::ApiError;
use crate::app::App;
use crate::job::{Api, Delivery, Job};
use crate::responses::{Converted, convert, output, renamed};

/// Answers whole or as a stream.
pub(super) async fn create(app: State<Arc<App>>, headers: HeaderMap, body: Body) -> Response {
    answer(&app.0, &headers, body).await.unwrap_or_else(IntoResponse::into_response)
}

async fn answer(app: &Arc<App>, headers: &HeaderMap, body: Body) -> Result<Response, ApiError> {
    let start = |app: &App, visit, body: &[u8]| {
        let Converted { chat, echo } = convert(app, body)?;
        let how = (Api::Chat, app.config.logprobs_mode);
        Ok((Job::start(app, visit, how, chat).map_err(renamed)?, echo))
    };
    let (submitted, echo) = read(app, headers, body, start).await?;
    let mut job = submitted.taken_in(app).await.map_err(renamed)?;
    job.rename("resp_");
    match job.delivery {
        Delivery::Whole => output::whole(job, echo).await,
        Delivery::Stream { .. } => Ok(output::streamed(job, echo)),
    }
}
