//! The web page at `/` and the state it shows at `/engine/state`.
//!
//! The page is one file compiled in; it fetches nothing from elsewhere and needs no key itself. Its
//! content security policy admits only its own script and style, by a nonce. What the page asks the
//! server for passes the same key as every other request. Leaves out sessions and stored chats.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderValue, header};
use axum::response::{Html, IntoResponse, Response};
use serde_json::{Value, json};

use crate::access::unique_name;
use crate::app::App;
use crate::run_state::{RunPoint, RunState};

const PAGE: &str = include_str!("page/index.html");
/// Stands in the page where the nonce goes.
const NONCE: &str = "%NONCE%";
/// Most steps that are drawn: the last ones.
const MAX_STEPS: usize = 2048;

/// A run's last steps as the page draws them: `null` before the first; values that are not numbers are
/// gaps.
fn curves(run: Option<&RunState>) -> Value {
    let points = run.map(RunState::points).unwrap_or_default();
    let points = &points[points.len().saturating_sub(MAX_STEPS)..];
    let Some(last) = points.last() else { return Value::Null };
    let series = |value: fn(&RunPoint) -> Option<f64>| points.iter().map(value).collect::<Vec<_>>();
    let series = json!({"reward": series(|p| p.reward), "entropy": series(|p| p.entropy)});
    json!({"step": last.step, "series": series})
}

/// `GET /`.
pub(crate) async fn page(State(app): State<Arc<App>>) -> Response {
    let nonce = unique_name(app.next_id());
    let policy = format!(
        "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; \
         connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    );
    let mut response = Html(PAGE.replace(NONCE, &nonce)).into_response();
    let headers = response.headers_mut();
    if let Ok(policy) = HeaderValue::from_str(&policy) {
        headers.insert(header::CONTENT_SECURITY_POLICY, policy);
    }
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    response
}

/// `GET /engine/state`: what runs and waits (sequences), the share of the KV cache in use (0 to 1),
/// tokens generated since the start, milliseconds since the engine's last step, and the curves of a
/// run (`rl`, else null). A rate of tokens is the difference of two answers.
pub(crate) async fn state(State(app): State<Arc<App>>) -> Json<Value> {
    let status = app.service.status();
    Json(json!({
        "model": app.model_name(),
        "running": status.running,
        "waiting": status.waiting,
        "kv_usage": status.kv_usage(),
        "generated_tokens": status.generated_tokens,
        "heartbeat_ms": u64::try_from(status.heartbeat.elapsed().as_millis()).unwrap_or(u64::MAX),
        "rl": curves(app.config.run.as_ref()),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn curves_are_null_before_the_first_step_and_bounded() {
        let run = RunState::new(3000);
        assert_eq!(curves(None), Value::Null);
        assert_eq!(curves(Some(&run)), Value::Null);
        run.push(RunPoint { step: 1, reward: Some(0.5), entropy: None });
        let said = json!({"step": 1, "series": {"reward": [0.5], "entropy": [null]}});
        assert_eq!(curves(Some(&run)), said);
        (2..3000).for_each(|step| run.push(RunPoint { step, reward: Some(1.0), entropy: None }));
        let said = curves(Some(&run));
        assert_eq!(said["series"]["reward"].as_array().unwrap().len(), MAX_STEPS);
        assert_eq!(said["step"], 2999);
    }

    #[test]
    fn the_page_is_self_contained() {
        let page = PAGE.replace("http://www.w3.org/2000/svg", "");
        for foreign in ["http://", "https://", "src=", "innerHTML", "outerHTML", "document.write"] {
            assert!(!page.contains(foreign), "{foreign}");
        }
        assert_eq!(PAGE.matches(NONCE).count(), 2);
    }
}
