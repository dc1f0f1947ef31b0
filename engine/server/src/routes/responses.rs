//! `POST /v1/responses`: a chat in other words, see [`crate::responses`].

use std::sync::Arc;

use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::{IntoResponse, Response};

use super::{Body, read};
use crate::app::App;
use crate::job::{Api, Delivery, Job};
use crate::responses::{Converted, convert, output, renamed};

/// Answers whole or as a stream.
pub(super) async fn create(app: State<Arc<App>>, headers: HeaderMap, body: Body) -> Response {
    let start = |app: &App, visit, body: &[u8]| {
        let Converted { chat, echo } = convert(app, body)?;
        let how = (Api::Chat, app.config.logprobs_mode);
        let mut job = Job::start(app, visit, how, chat).map_err(renamed)?;
        job.rename("resp_");
        Ok((job, echo))
    };
    match read(app.0, &headers, body, start).await {
        Ok((job, echo)) if job.delivery == Delivery::Whole => {
            output::whole(job, echo).await.unwrap_or_else(IntoResponse::into_response)
        }
        Ok((job, echo)) => output::streamed(job, echo),
        Err(error) => error.into_response(),
    }
}
