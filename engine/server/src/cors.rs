//! Requests of pages from other sites: which may be made, as the operator says. None are by default.
//!
//! Lists are vLLM's `--allowed-origins`, `--allowed-methods` and `--allowed-headers`, where `*` is any.

use axum::http::{HeaderName, HeaderValue, Method};
use tower_http::cors::{AllowHeaders, AllowMethods, Any, CorsLayer};

use crate::error::{Error, Result};

/// Whether a page may send cookies and keys that its browser keeps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Credentials {
    /// It may not.
    #[default]
    Omit,
    /// It may; the sites must be named then.
    Allow,
}

/// What pages of other sites may do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cors {
    /// Sites, such as `https://example.org`.
    pub origins: Vec<String>,
    /// Methods.
    pub methods: Vec<String>,
    /// Headers of requests.
    pub headers: Vec<String>,
    /// Whether browsers may send what they keep for this server.
    pub credentials: Credentials,
}

impl Cors {
    /// Checks the lists.
    ///
    /// # Errors
    /// When an entry is none of its kind, or any site may come with credentials.
    pub fn check(&self) -> Result<()> {
        self.layer().map(drop)
    }

    /// Makes the layer that answers preflights and adds headers.
    ///
    /// # Errors
    /// As [`check`](Self::check).
    pub(crate) fn layer(&self) -> Result<CorsLayer> {
        let any = |list: &[String]| list.iter().any(|entry| entry == "*");
        if self.credentials == Credentials::Allow && any(&self.origins) {
            let message =
                "allowed origins are *, limit is named ones where credentials are allowed";
            return Err(Error::config(message));
        }
        let mut layer = CorsLayer::new();
        layer = match any(&self.origins) {
            true => layer.allow_origin(Any),
            false => layer.allow_origin(each("origin", &self.origins, origin)?),
        };
        layer = match any(&self.methods) {
            true => layer.allow_methods(AllowMethods::mirror_request()),
            false => {
                layer.allow_methods(each("method", &self.methods, |m| m.parse::<Method>().ok())?)
            }
        };
        layer = match any(&self.headers) {
            // A `*` on the wire would not cover `authorization`.
            true => layer.allow_headers(AllowHeaders::mirror_request()),
            false => layer
                .allow_headers(each("header", &self.headers, |h| h.parse::<HeaderName>().ok())?),
        };
        Ok(layer
            .allow_credentials(self.credentials == Credentials::Allow)
            .expose_headers([HeaderName::from_static("x-request-id")]))
    }
}

/// A site has a scheme and no path.
fn origin(text: &str) -> Option<HeaderValue> {
    let (_, host) = text.split_once("://")?;
    let plain = !host.is_empty() && !host.contains('/');
    HeaderValue::from_str(text).ok().filter(|_| plain)
}

fn each<T>(what: &str, list: &[String], read: impl Fn(&str) -> Option<T>) -> Result<Vec<T>> {
    let one = |entry: &String| {
        read(entry).ok_or_else(|| Error::config(format!("allowed {what} {entry:?} is none")))
    };
    list.iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cors(origin: &str, credentials: Credentials) -> Cors {
        let list = |entry: &str| vec![entry.to_owned()];
        let (origins, methods) = (list(origin), list("POST"));
        Cors { origins, methods, headers: list("authorization"), credentials }
    }

    #[test]
    fn lists_are_checked() {
        for good in ["*", "https://example.org", "http://localhost:3000"] {
            assert!(cors(good, Credentials::Omit).layer().is_ok(), "{good}");
        }
        for bad in ["example.org", "https://", "https://example.org/", "null"] {
            let error = cors(bad, Credentials::Omit).layer().unwrap_err().to_string();
            assert_eq!(error, format!("allowed origin {bad:?} is none"));
        }
        assert!(cors("https://a.b", Credentials::Allow).layer().is_ok());
        assert!(cors("*", Credentials::Allow).layer().is_err());
    }
}
