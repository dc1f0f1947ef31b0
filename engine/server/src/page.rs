//! The web page at `/` and the state it shows at `/engine/state`.
//!
//! The page is one file compiled in; it fetches nothing from elsewhere and needs no key itself. Its
//! content security policy admits only its own script and style, by a nonce. What the page asks the
//! server for passes the same key as every other request. Leaves out sessions and stored chats.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderValue, header};
use axum::response::{Html, IntoResponse, Response};
use serde::Serialize;
use serde_json::{Value, json};

use crate::access::unique_name;
use crate::app::App;

const PAGE: &str = include_str!("page/index.html");
/// Stands in the page where the nonce goes.
const NONCE: &str = "%NONCE%";
/// Most steps whose values are kept; older ones are dropped first.
const MAX_STEPS: usize = 2048;

/// Live curves of a training run that serves at the same time. Clones share the curves: the run
/// fills one, [`crate::ServerConfig::curves`] holds the other.
#[derive(Clone, Debug, Default)]
pub struct Curves(Arc<Mutex<Option<Run>>>);

#[derive(Clone, Debug, Default, Serialize)]
struct Run {
    step: u64,
    series: BTreeMap<String, Vec<Option<f64>>>,
}

impl Curves {
    /// Appends a step's values, each under its name (`reward` in the reward's unit, `entropy` in
    /// nats per token). A value that is not finite leaves a gap. The last 2048 values of a series
    /// are kept.
    pub fn push(&self, step: u64, values: &[(&str, f64)]) {
        let mut run = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let run = run.get_or_insert_default();
        run.step = step;
        for (name, value) in values {
            let series = run.series.entry((*name).to_owned()).or_default();
            if series.len() == MAX_STEPS {
                series.remove(0);
            }
            series.push(value.is_finite().then_some(*value));
        }
    }

    /// `null` before the first step.
    fn json(&self) -> Value {
        json!(*self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
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
    let total = status.stats.total_blocks;
    let used = status.stats.used_blocks;
    Json(json!({
        "model": app.model_name(),
        "running": status.running,
        "waiting": status.waiting,
        "kv_usage": if total == 0 { 0.0 } else { used as f64 / total as f64 },
        "generated_tokens": status.generated_tokens,
        "heartbeat_ms": u64::try_from(status.heartbeat.elapsed().as_millis()).unwrap_or(u64::MAX),
        "rl": app.config.curves.json(),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn curves_are_null_then_shared_and_bounded() {
        let curves = Curves::default();
        assert_eq!(curves.json(), Value::Null);
        curves.clone().push(1, &[("reward", 0.5), ("entropy", f64::NAN)]);
        let said = json!({"step": 1, "series": {"reward": [0.5], "entropy": [null]}});
        assert_eq!(curves.json(), said);
        (2..3000).for_each(|step| curves.push(step, &[("reward", 1.0)]));
        assert_eq!(curves.json()["series"]["reward"].as_array().unwrap().len(), MAX_STEPS);
        assert_eq!(curves.json()["step"], 2999);
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
