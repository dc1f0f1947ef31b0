//! Counts, times and sizes of HTTP messages, by the pattern of their route.
//!
//! Labels come from small sets: patterns of routes (`none` where no route matched), known methods (else
//! `other`) and statuses. Answers count when their last byte has been handed over; one whose client left
//! before counts as 499. Own names carry exact statuses; vLLM's carry their classes (`2xx`), as there.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use axum::body::{Body, HttpBody};
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderMap, Method, header};
use axum::middleware::Next;
use axum::response::Response;
use engine::Histogram;
use futures_util::{StreamExt, stream};

use super::text::{head, histogram, line};
use super::{Metrics, MetricsNames};
use crate::app::{App, LogEvent};

/// Upper bounds of the time of a request, in seconds.
const SECONDS: &[f64] = &[0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 60.0];
/// The status of an answer whose client has left; it is never sent.
const CLIENT_GONE: u16 = 499;
/// Where no route matches.
const NO_ROUTE: &str = "none";
/// What stands for an id that is not known.
const NO_ID: &str = "-";

/// What has been counted since the start.
#[derive(Clone, Debug, Default)]
pub(super) struct HttpCounts {
    /// By pattern, method and status.
    requests: BTreeMap<(String, &'static str, u16), u64>,
    /// By pattern and method.
    seconds: BTreeMap<(String, &'static str), Histogram>,
    /// Bytes of bodies of requests and of answers, by pattern.
    sizes: BTreeMap<String, [Sum; 2]>,
}

/// How many values there were, and what they add up to.
#[derive(Clone, Copy, Debug, Default)]
struct Sum {
    count: u64,
    sum: u64,
}

impl Sum {
    fn add(&mut self, value: u64) {
        self.count += 1;
        self.sum = self.sum.saturating_add(value);
    }
}

impl HttpCounts {
    /// The series; those of HTTP have no label of the model.
    pub(super) fn write(&self, out: &mut String, prefix: &str, names: MetricsNames) {
        let name = "http_requests_total";
        head(out, (prefix, name), "counter", "Requests, by route, method and status.");
        let mut requests = BTreeMap::new();
        for ((handler, method, status), count) in &self.requests {
            let status = match names {
                MetricsNames::Own => status.to_string(),
                MetricsNames::Vllm => format!("{}xx", status / 100),
            };
            *requests.entry((handler, method, status)).or_insert(0) += count;
        }
        for ((handler, method, status), count) in requests {
            let label = format!("handler=\"{handler}\",method=\"{method}\",status=\"{status}\"");
            line(out, (prefix, name, ""), &label, count as f64);
        }
        let name = "http_request_duration_seconds";
        head(out, (prefix, name), "histogram", "Until an answer's last byte.");
        for ((handler, method), seconds) in &self.seconds {
            let label = format!("handler=\"{handler}\",method=\"{method}\"");
            histogram(out, (prefix, name), &label, seconds);
        }
        for (place, name, help) in [
            (0, "http_request_size_bytes", "Bytes of requests' bodies, as they announce them."),
            (1, "http_response_size_bytes", "Bytes of answers' bodies."),
        ] {
            head(out, (prefix, name), "summary", help);
            for (handler, sizes) in &self.sizes {
                let label = format!("handler=\"{handler}\"");
                line(out, (prefix, name, "_sum"), &label, sizes[place].sum as f64);
                line(out, (prefix, name, "_count"), &label, sizes[place].count as f64);
            }
        }
    }
}

impl Metrics {
    fn count_http(&self, record: &Record) {
        let mut http = self.http();
        let handler = || record.handler.clone();
        *http.requests.entry((handler(), record.method, record.status)).or_insert(0) += 1;
        let seconds = http.seconds.entry((handler(), record.method));
        seconds
            .or_insert_with(|| Histogram::new(SECONDS))
            .add(record.begun.elapsed().as_secs_f64());
        let [request, response] = http.sizes.entry(handler()).or_default();
        request.add(record.request_bytes);
        response.add(record.response_bytes);
    }
}

/// Measures a request and its answer.
pub(crate) async fn measure(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let record = Record::new(app, &request);
    record.answered(next.run(request).await)
}

/// One request on its way; counted when it is dropped.
struct Record {
    app: Arc<App>,
    handler: String,
    method: &'static str,
    path: String,
    request_id: String,
    begun: Instant,
    request_bytes: u64,
    response_bytes: u64,
    /// The status of the answer, once its last byte is out; else [`CLIENT_GONE`].
    status: u16,
}

impl Record {
    fn new(app: Arc<App>, request: &Request) -> Self {
        let matched = request.extensions().get::<MatchedPath>().map(MatchedPath::as_str);
        Self {
            app,
            handler: matched.unwrap_or(NO_ROUTE).to_owned(),
            method: method(request.method()),
            path: request.uri().path().to_owned(),
            request_id: NO_ID.to_owned(),
            begun: Instant::now(),
            request_bytes: announced(request.headers()),
            response_bytes: 0,
            status: CLIENT_GONE,
        }
    }

    /// The answer, measured as it is read if its length is not known.
    fn answered(mut self, response: Response) -> Response {
        let shown = response.headers().get("x-request-id").and_then(|id| id.to_str().ok());
        self.request_id = shown.unwrap_or(NO_ID).to_owned();
        let status = response.status().as_u16();
        if let Some(bytes) = response.body().size_hint().exact() {
            self.response_bytes = bytes;
            self.status = status;
            return response;
        }
        response.map(|body| {
            let pieces = (body.into_data_stream(), self, status);
            Body::from_stream(stream::unfold(pieces, async |(mut body, mut record, status)| {
                let piece = body.next().await;
                match &piece {
                    Some(Ok(bytes)) => record.response_bytes += bytes.len() as u64,
                    Some(Err(_)) => {}
                    None => record.status = status,
                }
                piece.map(|piece| (piece, (body, record, status)))
            }))
        })
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        self.app.metrics.count_http(self);
        if self.status == CLIENT_GONE {
            self.app.log(&LogEvent::Answered {
                method: self.method.to_owned(),
                path: std::mem::take(&mut self.path),
                status: CLIENT_GONE,
                request_id: std::mem::take(&mut self.request_id),
                elapsed: self.begun.elapsed(),
            });
        }
    }
}

/// A method as a label.
fn method(method: &Method) -> &'static str {
    let known = ["GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "CONNECT", "TRACE"];
    known.into_iter().find(|name| *name == method.as_str()).unwrap_or("other")
}

/// Length of the body in bytes, as the head announces it; else 0.
fn announced(headers: &HeaderMap) -> u64 {
    let shown = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok());
    shown.and_then(|shown| shown.parse().ok()).unwrap_or(0)
}
