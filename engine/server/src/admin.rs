//! The operator's routes, on a listener of their own: `POST /pause?mode=abort|wait|keep`, `POST /resume`,
//! `GET /is_paused` and `POST /update_weights_from_disk` with `{"path", "mode"?}`. Names and modes are vLLM's
//! and SGLang's.
//!
//! Requests that come during a pause wait for its end, as in vLLM. New weights are checked as a whole before
//! the first of them is written; `mode` says what becomes of the requests on their way, which by default
//! go on with the new weights. The other listener answers these paths with 403. `/health` is here too.

use std::path::Path;
use std::sync::Arc;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, Uri, header};
use axum::middleware::{self, Next};
use axum::response::Response;
use axum::routing::{get, post};
use axum::{Json, Router};
use engine::{ErrorKind, ModelSource, PauseMode, WeightsVersion};
use serde_json::{Value, json};
use tokio::sync::{Mutex, OwnedMutexGuard};

use crate::access::{Keys, answered};
use crate::api_error::ApiError;
use crate::app::{App, LogEvent};
use crate::error::Result;
use crate::fields::{BadField, Fields};
use crate::limits::bound_body;
use crate::routes::{Body, read_body};

/// The routes that are the operator's alone.
pub(crate) const PATHS: [&str; 4] =
    ["/pause", "/resume", "/is_paused", "/update_weights_from_disk"];

/// Who may come, and who changes something at the moment.
pub(crate) struct Admin {
    keys: Keys,
    guarded: bool,
    turn: Arc<Mutex<()>>,
}

impl Admin {
    pub(crate) fn new(keys: &[String]) -> Result<Self> {
        Ok(Self { keys: Keys::new(keys)?, guarded: !keys.is_empty(), turn: Arc::default() })
    }

    /// Waits for nobody.
    fn turn(&self) -> std::result::Result<OwnedMutexGuard<()>, ApiError> {
        let busy = |_| ApiError::conflict("weights are being updated".to_owned());
        Arc::clone(&self.turn).try_lock_owned().map_err(busy)
    }
}

/// The operator's routes over `app`.
pub(crate) fn router(app: Arc<App>) -> Router {
    Router::new()
        .route("/pause", post(pause))
        .route("/resume", post(resume))
        .route("/is_paused", get(is_paused))
        .route("/update_weights_from_disk", post(update))
        .route("/health", get(crate::routes::health))
        .fallback(crate::routes::no_route)
        .method_not_allowed_fallback(crate::routes::no_method)
        .layer(middleware::from_fn_with_state(Arc::clone(&app), bound_body))
        .layer(middleware::from_fn_with_state(Arc::clone(&app), guard))
        .with_state(app)
}

async fn guard(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let admitted = admission(&app, request.headers());
    answered(app, admitted, request, next).await
}

/// Asks for the operator's key. Where there is none, pages of other sites are turned away, whose requests
/// a browser would otherwise carry to this machine.
fn admission(app: &App, headers: &HeaderMap) -> std::result::Result<(), ApiError> {
    let admin = &app.admin;
    if !admin.guarded && headers.contains_key(header::ORIGIN) {
        return Err(ApiError::forbidden("pages cannot administrate without a key"));
    }
    if admin.keys.admit(headers) {
        return Ok(());
    }
    if !app.config.api_keys.is_empty() && app.keys.admit(headers) {
        return Err(ApiError::forbidden("this key does not administrate"));
    }
    Err(ApiError::unauthorized())
}

type Answer = std::result::Result<Json<Value>, ApiError>;

async fn is_paused(State(app): State<Arc<App>>) -> Json<Value> {
    let status = app.service.status();
    let mode = status.pause.map(mode_name);
    Json(json!({
        "is_paused": status.pause.is_some(),
        "mode": mode,
        "running": status.running,
        "waiting": status.waiting,
        "weights_version": status.version.0,
    }))
}

/// Answers when the pause is reached.
async fn pause(State(app): State<Arc<App>>, uri: Uri) -> Answer {
    let mode = asked_mode(uri.query().unwrap_or_default())?.unwrap_or(PauseMode::Abort);
    drop(app.admin.turn()?);
    blocking(move || app.service.pause(mode).map_err(|error| refusal(&error))).await?;
    Ok(Json(json!({"status": "paused", "mode": mode_name(mode)})))
}

async fn resume(State(app): State<Arc<App>>, uri: Uri) -> Answer {
    if let Some(query) = uri.query().filter(|query| !query.is_empty()) {
        return Err(unknown_parameter(query));
    }
    drop(app.admin.turn()?);
    blocking(move || app.service.resume().map_err(|error| refusal(&error))).await?;
    Ok(Json(json!({"status": "resumed"})))
}

async fn update(State(app): State<Arc<App>>, headers: HeaderMap, body: Body) -> Answer {
    let body = read_body(&app, &headers, body)?;
    let fields = &mut Fields::parse(&body)?;
    let path = fields.string("path")?.ok_or_else(|| BadField::new("path", "path is missing"))?;
    let mode = match fields.string("mode")? {
        None => PauseMode::Keep,
        Some(name) => named_mode(&name)?,
    };
    if let Some(name) = fields.names().next() {
        let message = format!("{name} is not known, known are path and mode");
        return Err(BadField::new(name, message).with_code("unsupported_parameter").into());
    }
    let turn = app.admin.turn()?;
    // Goes on to its end though whoever asked may leave.
    let version = blocking(move || {
        let _turn = turn;
        replace(&app, &path, mode)
    });
    let version = version.await?;
    Ok(Json(json!({"status": "updated", "weights_version": version.0})))
}

/// Checks the model at `path`, lets the requests on their way end as `mode` says, and takes its weights.
fn replace(
    app: &App,
    path: &str,
    mode: PauseMode,
) -> std::result::Result<WeightsVersion, ApiError> {
    let wrong =
        |error: engine::Error| -> ApiError { BadField::new("path", error.to_string()).into() };
    let source = ModelSource::open(Path::new(path)).map_err(wrong)?;
    app.service.check_weights(&source).map_err(|error| refusal(&error))?;
    let paused = mode != PauseMode::Keep && app.service.status().pause.is_none();
    if paused {
        app.service.pause(mode).map_err(|error| refusal(&error))?;
    }
    let replaced = app.service.replace_weights(source);
    if let Ok(version) = &replaced {
        app.log(&LogEvent::WeightsUpdated { version: version.0 });
    }
    let resumed = if paused { app.service.resume() } else { Ok(()) };
    let version = replaced.map_err(|error| refusal(&error))?;
    resumed.map_err(|error| refusal(&error))?;
    Ok(version)
}

/// Does what waits for the engine, away from the async threads.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> std::result::Result<T, ApiError> + Send + 'static,
) -> std::result::Result<T, ApiError> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|_panicked| ApiError::internal("the request could not be carried out"))?
}

/// The answer to what the engine refuses.
fn refusal(error: &engine::Error) -> ApiError {
    match error.kind() {
        ErrorKind::Busy(_) | ErrorKind::Unsupported(_) => ApiError::conflict(error.to_string()),
        ErrorKind::Internal(_) => ApiError::engine_dead(),
        _ => BadField::new("path", error.to_string()).into(),
    }
}

/// The mode of a query such as `mode=keep`.
fn asked_mode(query: &str) -> std::result::Result<Option<PauseMode>, ApiError> {
    let mut mode = None;
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        match pair.split_once('=') {
            Some(("mode", name)) => mode = Some(named_mode(name)?),
            _ => return Err(unknown_parameter(pair)),
        }
    }
    Ok(mode)
}

fn unknown_parameter(pair: &str) -> ApiError {
    let name: String = pair.split('=').next().unwrap_or_default().chars().take(64).collect();
    let message = format!("query parameter {name:?} is not known");
    ApiError::invalid(StatusCode::BAD_REQUEST, "unsupported_parameter", message)
}

fn named_mode(name: &str) -> std::result::Result<PauseMode, ApiError> {
    let modes = [PauseMode::Abort, PauseMode::Wait, PauseMode::Keep];
    modes.into_iter().find(|mode| mode_name(*mode) == name).ok_or_else(|| {
        let name: String = name.chars().take(64).collect();
        BadField::new("mode", format!("mode is {name:?}, known are abort, wait, keep")).into()
    })
}

fn mode_name(mode: PauseMode) -> &'static str {
    match mode {
        PauseMode::Abort => "abort",
        PauseMode::Wait => "wait",
        PauseMode::Keep => "keep",
    }
}
