//! The routes and the life of the server: listen, answer, drain.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::rejection::{BytesRejection, PathRejection};
use axum::extract::{DefaultBodyLimit, Path, State};
use axum::http::{HeaderMap, Method, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router, middleware};
use engine::{Phase, Service, Status};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use crate::access::{given_name, guard};
use crate::answer::whole;
use crate::api_error::ApiError;
use crate::app::{App, LogEvent, ServerConfig, Visit};
use crate::connection::{Listeners, accept};
use crate::error::{Error, Result};
use crate::fields::Fields;
use crate::job::{Api, Delivery, Job, transport};
use crate::limits::{bound_body, check_timeout, unreadable};
use crate::metrics::http::measure;
use crate::{admin, load_report, openapi, page, stream};

mod abort;
mod responses;
mod text;
mod tokens;

/// How long aborted requests may take to end, and written answers to leave.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// How often the server looks whether its engine has failed.
const LOOK: Duration = Duration::from_millis(200);

/// Serves until `shutdown` completes and the server has drained: newcomers get 503 from then on,
/// running requests finish, and are aborted when [`ServerConfig::shutdown_timeout`] is over. When the
/// engine fails, all get 503 for two seconds before the error is returned.
///
/// # Errors
/// When the configuration is invalid, the socket fails or the engine fails.
pub async fn serve(
    service: Arc<Service>,
    config: ServerConfig,
    listeners: impl Into<Listeners>,
    shutdown: impl Future<Output = ()>,
) -> Result<()> {
    let app = App::new(service, config)?;
    app.config.limits.check()?;
    app.config.request_timeout.map_or(Ok(()), |limit| check_timeout("request_timeout", limit))?;
    let cors = app.config.cors.as_ref().map(|cors| cors.layer()).transpose()?;
    let (stop, stopped) = watch::channel(());
    let Listeners { public, admin } = listeners.into();
    if let Some(listener) = admin {
        let router = admin::router(Arc::clone(&app));
        tokio::spawn(accept(listener, router, Arc::clone(&app), stopped.clone()));
    }
    let mut router = router(Arc::clone(&app));
    if let Some(cors) = cors {
        // Outermost: a preflight shows no key.
        router = router.layer(cors);
    }
    tokio::select! {
        () = accept(public, router, Arc::clone(&app), stopped) => Ok(()),
        () = drain(&app, shutdown, stop) => Ok(()),
        never = load_report::reports(&app) => match never {},
        failure = engine_failure(&app) => Err(Error::engine(format!("engine: {failure}"))),
    }
}

/// Waits until the engine has failed, and lets the health route say so for a while; returns why.
async fn engine_failure(app: &App) -> String {
    loop {
        if let Some(failure) = app.service.status().failure {
            sleep(LAST_WORDS).await;
            return failure;
        }
        sleep(LOOK).await;
    }
}

/// Waits for `shutdown` and for the visitors to leave, then closes the listener.
async fn drain(app: &App, shutdown: impl Future<Output = ()>, stop: watch::Sender<()>) {
    shutdown.await;
    app.live.drain();
    app.log(&LogEvent::Draining { running: app.live.visits() });
    if timeout(app.config.shutdown_timeout, app.live.idle()).await.is_err() {
        app.log(&LogEvent::DrainTimeout { running: app.live.visits() });
        app.live.named.abort_all(&app.service);
        // Whoever does not leave now is cut off when the process ends.
        let _cut = timeout(LAST_WORDS, app.live.idle()).await;
    }
    drop(stop);
    sleep(LAST_WORDS).await;
}

/// All routes over `app`.
pub(crate) fn router(app: Arc<App>) -> Router {
    Router::new()
        .route("/", get(page::page))
        .route("/engine/state", get(page::state))
        .route("/health", get(health))
        .route("/v1/models", get(models))
        .route("/v1/models/{*name}", get(model))
        .route("/v1/chat/completions", post(chat_completions))
        .route("/v1/completions", post(completions))
        .route("/v1/responses", post(responses::create))
        .route("/tokenize", post(text::tokenize))
        .route("/detokenize", post(text::detokenize))
        .route("/inference/v1/generate", post(text::generate))
        .route("/inference/v1/abort_requests", post(abort::abort))
        .route("/version", get(text::version))
        .route("/openapi.json", get(openapi::serve))
        .route("/metrics", get(metrics))
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .layer(DefaultBodyLimit::max(app.config.max_body_bytes))
        .layer(middleware::from_fn_with_state(Arc::clone(&app), bound_body))
        .layer(middleware::from_fn_with_state(Arc::clone(&app), guard))
        .layer(middleware::from_fn_with_state(Arc::clone(&app), measure))
        .with_state(app)
}

pub(crate) async fn health(State(app): State<Arc<App>>) -> Response {
    let status = app.service.status();
    if status.failure.is_some() {
        return ApiError::engine_dead().into_response();
    }
    if let Some(limit) = app.config.heartbeat_timeout.filter(|limit| is_stalled(&status, *limit)) {
        return ApiError::engine_stalled(limit).into_response();
    }
    if app.live.is_draining() {
        return ApiError::draining().into_response();
    }
    Json(json!({"status": "ok"})).into_response()
}

/// Whether steps are expected and none has ended for longer than `limit`. An idle engine looks for work
/// more often than that, so its heart beats too.
fn is_stalled(status: &Status, limit: Duration) -> bool {
    status.phase == Phase::Serving && status.heartbeat.elapsed() > limit
}

/// Prometheus' text format.
async fn metrics(State(app): State<Arc<App>>) -> Response {
    let text = app.metrics.text(&app.service, app.model_name(), app.config.metrics);
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response()
}

async fn models(State(app): State<Arc<App>>) -> Json<Value> {
    let cards: Vec<Value> = app.config.model_names.iter().map(|name| card(&app, name)).collect();
    Json(json!({"object": "list", "data": cards}))
}

async fn model(
    State(app): State<Arc<App>>,
    name: std::result::Result<Path<String>, PathRejection>,
) -> Response {
    // A name that is no text names no model.
    let name = name.map_or_else(|_| String::new(), |Path(name)| name);
    if app.config.model_names.contains(&name) {
        Json(card(&app, &name)).into_response()
    } else {
        ApiError::no_model(&name).into_response()
    }
}

fn card(app: &App, name: &str) -> Value {
    json!({
        "id": name,
        "object": "model",
        "created": app.started_s(),
        "owned_by": "engine",
        "root": app.model_name(),
        "parent": null,
        "max_model_len": app.service.max_model_len(),
        "permission": [],
    })
}

pub(crate) type Body = std::result::Result<Bytes, BytesRejection>;

async fn chat_completions(app: State<Arc<App>>, headers: HeaderMap, body: Body) -> Response {
    generate(app.0, Api::Chat, &headers, body).await.unwrap_or_else(IntoResponse::into_response)
}

async fn completions(app: State<Arc<App>>, headers: HeaderMap, body: Body) -> Response {
    generate(app.0, Api::Completions, &headers, body)
        .await
        .unwrap_or_else(IntoResponse::into_response)
}

async fn generate(
    app: Arc<App>,
    api: Api,
    headers: &HeaderMap,
    body: Body,
) -> std::result::Result<Response, ApiError> {
    let start = move |app: &App, visit, body: &[u8]| {
        Job::start(app, visit, (api, app.config.logprobs_mode), Fields::parse(body)?)
    };
    let job = read(&app, headers, body, start).await?.taken_in(&app).await?;
    match job.delivery {
        Delivery::Whole => whole(job).await,
        Delivery::Stream { .. } => Ok(stream::response(job)),
    }
}

/// Lets a request in and has `make` read its body, which takes processor time, away from the async
/// threads. Those it takes up are few: what waits for the engine does so here.
async fn read<T: Send + 'static>(
    app: &Arc<App>,
    headers: &HeaderMap,
    body: Body,
    make: impl FnOnce(&App, Visit, &[u8]) -> std::result::Result<T, ApiError> + Send + 'static,
) -> std::result::Result<T, ApiError> {
    let mut visit = app.live.enter()?;
    visit.request_id = given_name(headers);
    visit.name.also(&visit.request_id);
    let body = read_body(app, headers, body)?;
    let app = Arc::clone(app);
    tokio::task::spawn_blocking(move || make(&app, visit, &body))
        .await
        .map_err(|_panicked| ApiError::internal("the request could not be read"))?
}

/// A body that has been read, of the type that is read here.
pub(crate) fn read_body(
    app: &App,
    headers: &HeaderMap,
    body: Body,
) -> std::result::Result<Bytes, ApiError> {
    let body = body.map_err(|rejection| match rejection.status() {
        StatusCode::PAYLOAD_TOO_LARGE => ApiError::body_too_large(app.config.max_body_bytes),
        _ => unreadable(app, &rejection),
    })?;
    check_content_type(headers)?;
    Ok(body)
}

/// A page of another site cannot send this type without asking first.
fn check_content_type(headers: &HeaderMap) -> std::result::Result<(), ApiError> {
    let shown = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let essence = shown.and_then(|shown| shown.split(';').next()).unwrap_or_default().trim();
    if essence.eq_ignore_ascii_case("application/json") {
        return Ok(());
    }
    let message = "content-type is not application/json".to_owned();
    Err(transport(StatusCode::UNSUPPORTED_MEDIA_TYPE, message))
}

pub(crate) async fn no_route(uri: Uri) -> ApiError {
    ApiError::no_route(uri.path())
}

pub(crate) async fn no_method(method: Method, uri: Uri) -> ApiError {
    let message = format!("method {method} is not allowed for {}", uri.path());
    transport(StatusCode::METHOD_NOT_ALLOWED, message)
}

#[cfg(test)]
mod tests;
