//! What every request passes: its id, its key, its log line.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::Arc;
use std::time::Instant;

use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use subtle::{Choice, ConstantTimeEq};

use crate::admin;
use crate::api_error::ApiError;
use crate::app::{App, LogEvent};
use crate::error::{Error, Result};

/// The header that carries a request's id.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Longest id taken from a client, in bytes.
pub(crate) const MAX_ID_BYTES: usize = 128;
/// Longest API key, in bytes; comparisons always look at this many.
const MAX_KEY_BYTES: usize = 256;

/// The keys of which a client must show one.
pub(crate) struct Keys {
    keys: Vec<Key>,
}

/// A key, padded so that comparing takes the same time for every key.
struct Key {
    bytes: [u8; MAX_KEY_BYTES],
    len: u64,
}

impl Key {
    fn new(key: &[u8]) -> Option<Self> {
        let mut bytes = [0; MAX_KEY_BYTES];
        bytes.get_mut(..key.len())?.copy_from_slice(key);
        Some(Self { bytes, len: key.len() as u64 })
    }

    fn same(&self, other: &Self) -> Choice {
        self.bytes.ct_eq(&other.bytes) & self.len.ct_eq(&other.len)
    }
}

impl Keys {
    pub(crate) fn new(keys: &[String]) -> Result<Self> {
        let keys = keys.iter().map(|key| match Key::new(key.as_bytes()) {
            Some(_) if key.is_empty() => Err(Error::config("an API key is empty")),
            Some(key) => Ok(key),
            None => {
                let bytes = key.len();
                Err(Error::config(format!("API key has {bytes} bytes, limit is {MAX_KEY_BYTES}")))
            }
        });
        Ok(Self { keys: keys.collect::<Result<_>>()? })
    }

    /// Whether these headers show one of the keys, compared in constant time.
    pub(crate) fn admit(&self, headers: &HeaderMap) -> bool {
        if self.keys.is_empty() {
            return true;
        }
        let shown =
            headers.get(header::AUTHORIZATION).map(HeaderValue::as_bytes).unwrap_or_default();
        let (scheme, key) = shown.split_at_checked(7).unwrap_or_default();
        let Some(key) = Key::new(key) else { return false };
        let known = self.keys.iter().fold(Choice::from(0), |found, one| found | one.same(&key));
        scheme.eq_ignore_ascii_case(b"bearer ") && bool::from(known)
    }
}

/// Names the request, asks for its key, and logs its answer.
pub(crate) async fn guard(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let admitted = admission(&app, &request);
    answered(app, admitted, request, next).await
}

fn admission(app: &App, request: &Request) -> std::result::Result<(), ApiError> {
    let path = request.uri().path();
    if admin::PATHS.contains(&path) {
        return Err(ApiError::forbidden(
            "this route is answered on the listener of --admin-listen",
        ));
    }
    match matches!(path, "/" | "/health") || app.keys.admit(request.headers()) {
        true => Ok(()),
        false => Err(ApiError::unauthorized()),
    }
}

/// Names the request, has it answered if it was admitted, and logs that.
pub(crate) async fn answered(
    app: Arc<App>,
    admitted: std::result::Result<(), ApiError>,
    mut request: Request,
    next: Next,
) -> Response {
    let begun = Instant::now();
    let method = request.method().to_string();
    let path = request.uri().path().to_owned();
    let name = request_name(request.headers(), app.next_id());
    let value = HeaderValue::from_str(&name).ok();
    if let Some(value) = &value {
        request.headers_mut().insert(REQUEST_ID, value.clone());
    }
    let mut response = match admitted {
        Ok(()) => next.run(request).await,
        Err(error) => error.into_response(),
    };
    if let Some(value) = value {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    let status = response.status().as_u16();
    let elapsed = begun.elapsed();
    app.log(&LogEvent::Answered { method, path, status, request_id: name, elapsed });
    response
}

/// The id that a request was given here.
pub(crate) fn given_name(headers: &HeaderMap) -> String {
    headers.get(REQUEST_ID).and_then(|name| name.to_str().ok()).unwrap_or_default().to_owned()
}

/// The id the client gave, when it is short and plain; else a new one.
fn request_name(headers: &HeaderMap, number: u64) -> String {
    let given = headers.get(REQUEST_ID).and_then(|value| value.to_str().ok());
    let id = given.filter(|id| is_plain_name(id));
    id.map_or_else(|| unique_name(number), str::to_owned)
}

/// Whether a client's name for a request is short, without white space and of ASCII.
pub(crate) fn is_plain_name(id: &str) -> bool {
    !id.is_empty() && id.len() <= MAX_ID_BYTES && id.bytes().all(|byte| byte.is_ascii_graphic())
}

/// 32 hexadecimal digits that no other request has, here or on another server.
pub(crate) fn unique_name(number: u64) -> String {
    let word = || {
        // The standard library's only source of randomness: the keys of a new hasher.
        let mut hasher = RandomState::new().build_hasher();
        hasher.write_u64(number);
        hasher.finish()
    };
    format!("{:016x}{:016x}", word(), word())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(authorization: &str) -> HeaderMap {
        HeaderMap::from_iter([(
            header::AUTHORIZATION,
            HeaderValue::from_str(authorization).unwrap(),
        )])
    }

    #[test]
    fn any_of_the_keys_is_admitted_and_nothing_else() {
        let keys = Keys::new(&["alpha".to_owned(), "beta".to_owned()]).unwrap();
        for good in ["Bearer alpha", "bearer beta"] {
            assert!(keys.admit(&headers(good)), "{good}");
        }
        let long = format!("Bearer {}", "a".repeat(10_000));
        for bad in ["alpha", "Basic alpha", "Bearer ", "Bearer alph", "Bearer alpha\t", &long] {
            assert!(!keys.admit(&headers(bad)), "{bad}");
        }
        assert!(!keys.admit(&HeaderMap::new()));
        assert!(Keys::new(&[]).unwrap().admit(&HeaderMap::new()));
    }

    #[test]
    fn keys_are_neither_empty_nor_endless() {
        assert_eq!(Keys::new(&[String::new()]).err().unwrap().to_string(), "an API key is empty");
        let long = Keys::new(&["k".repeat(257)]).err().unwrap().to_string();
        assert_eq!(long, "API key has 257 bytes, limit is 256");
    }

    #[test]
    fn ids_are_kept_when_plain() {
        let with =
            |id: &str| HeaderMap::from_iter([(REQUEST_ID, HeaderValue::from_str(id).unwrap())]);
        assert_eq!(request_name(&with("run-7"), 0), "run-7");
        assert_eq!(request_name(&with("two words"), 0).len(), 32);
        assert_eq!(request_name(&with(&"x".repeat(129)), 0).len(), 32);
        assert_ne!(unique_name(1), unique_name(1));
    }
}
