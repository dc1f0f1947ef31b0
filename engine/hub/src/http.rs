//! Requests to a hub: the token, redirects, time limits, and what failures mean. Touches no file.
//!
//! Redirects are followed here, not by the HTTP client, because the token may go to the hub's own origin
//! only, and because the answer that redirects to a store of large files is the one that tells their hash.

use std::time::Duration;

use engine::model::hub::HubSettings;
use engine::{Error, Result};
use ureq::http::Response;
use ureq::{Agent, Body, Proxy, Timeout};

use crate::Patience;

/// Redirects followed for one request.
const MAX_REDIRECTS: usize = 8;
/// How the standard library says that a name has no address, for which it has no kind.
const LOOKUP: &str = "failed to lookup address";
/// Longest wait that a server may ask for.
const MAX_RETRY_AFTER: Duration = Duration::from_secs(60);

/// Sends requests to one hub.
#[derive(Debug)]
pub(crate) struct Client<'a> {
    agent: Agent,
    hub: &'a HubSettings,
    patience: &'a Patience,
}

/// Why a request did not give what was asked.
#[derive(Debug)]
pub(crate) enum Trouble {
    /// A later try may succeed; the server asked to wait this long, if at all.
    Again { why: String, wait: Duration },
    /// No later try can.
    Final(Error),
}

impl Trouble {
    pub(crate) fn again(why: impl Into<String>) -> Self {
        Self::Again { why: why.into(), wait: Duration::ZERO }
    }
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Self {
        Self::Final(error)
    }
}

/// What is asked of an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ask {
    /// What a file is.
    Head,
    /// Its bytes from this one on.
    Bytes { from: u64 },
}

impl<'a> Client<'a> {
    /// # Errors
    /// When the proxy's address is malformed.
    pub(crate) fn new(hub: &'a HubSettings, patience: &'a Patience) -> Result<Self> {
        let proxy = match &hub.proxy {
            // The variable is for https; what it says about other schemes is not known.
            Some(proxy) if hub.endpoint.starts_with("https:") => Some(
                self::proxy(proxy, hub.no_proxy.as_deref())
                    .map_err(|_| Error::config("HTTPS_PROXY is not the address of a proxy"))?,
            ),
            _ => None,
        };
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .proxy(proxy)
            .user_agent(concat!("engine/", env!("CARGO_PKG_VERSION")))
            .accept_encoding("identity")
            .timeout_connect(Some(patience.connect))
            .timeout_recv_response(Some(patience.stall))
            .timeout_per_read(Some(patience.stall));
        Ok(Self { agent: config.build().new_agent(), hub, patience })
    }

    /// The answer at the end of all redirects: 200, 206, or 416 for bytes that are not there. For
    /// [`Ask::Head`] also the redirect that tells the hash.
    pub(crate) fn ask(&self, ask: Ask, url: &str) -> Result<Response<Body>, Trouble> {
        let mut url = url.to_owned();
        for _ in 0..=MAX_REDIRECTS {
            let response = self.send(ask, &url)?;
            match response.status().as_u16() {
                301 | 302 | 303 | 307 | 308 => {}
                _ => return self.checked(response, &url),
            }
            if ask == Ask::Head && header(&response, "x-linked-etag").is_some() {
                return Ok(response);
            }
            let location = header(&response, "location");
            url = location
                .and_then(|to| join(&url, to))
                .ok_or_else(|| Error::network(format!("{}: a redirect to nowhere", shown(&url))))?;
        }
        let message = format!("{}: more than {MAX_REDIRECTS} redirects", shown(&url));
        Err(Error::network(message).into())
    }

    fn send(&self, ask: Ask, url: &str) -> Result<Response<Body>, Trouble> {
        let mut request = match ask {
            Ask::Head => self.agent.head(url),
            Ask::Bytes { .. } => self.agent.get(url),
        };
        if let (Some(token), true) = (&self.hub.token, self.is_hub(url)) {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        if let Ask::Bytes { from: from @ 1.. } = ask {
            request = request.header("range", format!("bytes={from}-"));
        }
        request.call().map_err(|error| self.failed(url, error))
    }

    fn is_hub(&self, url: &str) -> bool {
        origin(url).eq_ignore_ascii_case(origin(&self.hub.endpoint))
    }

    /// Turns a status that is not an answer into what it means.
    fn checked(&self, response: Response<Body>, url: &str) -> Result<Response<Body>, Trouble> {
        let (status, place) = (response.status().as_u16(), shown(url));
        Err(match status {
            200 | 206 | 416 => return Ok(response),
            401 | 403 if self.is_hub(url) => {
                let token = match self.hub.token {
                    None => "set HF_TOKEN to a token that may read it",
                    Some(_) => "the token in HF_TOKEN may not read it",
                };
                let why = "the model is gated, private or not there";
                Error::model(format!("{place}: status {status}, {why}: {token}")).into()
            }
            // A signed address has expired; the hub gives a new one.
            403 => Trouble::again(format!("{place}: status 403")),
            404 => Error::model(format!("{place}: status 404, no such model or file")).into(),
            408 | 429 | 500..=599 => {
                let seconds = header(&response, "retry-after").and_then(|text| text.parse().ok());
                let wait = Duration::from_secs(seconds.unwrap_or(0)).min(MAX_RETRY_AFTER);
                Trouble::Again { why: format!("{place}: status {status}"), wait }
            }
            _ => Error::network(format!("{place}: unexpected status {status}")).into(),
        })
    }

    /// What a request without an answer means.
    fn failed(&self, url: &str, error: ureq::Error) -> Trouble {
        use std::io::ErrorKind as Io;
        let (host, place) = (origin(url), shown(url));
        match error {
            ureq::Error::HostNotFound => Error::network(format!("{host}: unknown host")).into(),
            ureq::Error::Timeout(Timeout::Connect | Timeout::Resolve) => {
                let limit = self.patience.connect.as_secs_f64();
                Trouble::again(format!("{host}: no connection in {limit} s"))
            }
            ureq::Error::Timeout(_) => {
                let limit = self.patience.stall.as_secs_f64();
                Trouble::again(format!("{place}: no answer in {limit} s"))
            }
            // Refused connections and certificates stay as they are for longer than a retry waits.
            ureq::Error::Io(error)
                if matches!(error.kind(), Io::ConnectionRefused | Io::InvalidData) =>
            {
                Error::network(format!("{host}: {error}")).into()
            }
            ureq::Error::Io(error) if error.to_string().contains(LOOKUP) => {
                Error::network(format!("{host}: unknown host")).into()
            }
            ureq::Error::Io(error) => Trouble::again(format!("{place}: {error}")),
            ureq::Error::Protocol(error) => Trouble::again(format!("{place}: {error}")),
            ureq::Error::BadUri(why) => {
                Error::config(format!("HF_ENDPOINT: {place} is not an address: {why}")).into()
            }
            ureq::Error::Http(error) => {
                Error::config(format!("{place}: HF_ENDPOINT or HF_TOKEN: {error}")).into()
            }
            error => Error::network(format!("{host}: {error}")).into(),
        }
    }
}

/// A header's text.
pub(crate) fn header<'r>(response: &'r Response<Body>, name: &str) -> Option<&'r str> {
    response.headers().get(name).and_then(|value| value.to_str().ok())
}

/// A file's name as part of an address.
pub(crate) fn encode(name: &str) -> String {
    let mut encoded = String::with_capacity(name.len());
    for byte in name.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}

/// An address without what comes after `?`, which may be a signature.
pub(crate) fn shown(url: &str) -> &str {
    url.split_once('?').map_or(url, |(place, _)| place)
}

/// Scheme, host and port.
fn origin(url: &str) -> &str {
    let host = url.find("://").map_or(0, |at| at + 3);
    let end = url[host..].find(['/', '?', '#']).map_or(url.len(), |at| host + at);
    &url[..end]
}

/// Where a redirect from `url` leads.
fn join(url: &str, to: &str) -> Option<String> {
    if to.starts_with("http://") || to.starts_with("https://") {
        Some(to.to_owned())
    } else if to.starts_with("//") {
        url.split_once("//").map(|(scheme, _)| format!("{scheme}{to}"))
    } else {
        to.starts_with('/').then(|| format!("{}{to}", origin(url)))
    }
}

fn proxy(address: &str, no_proxy: Option<&str>) -> Result<Proxy, ureq::Error> {
    let parsed = Proxy::new(address)?;
    let mut proxy = Proxy::builder(parsed.protocol()).host(parsed.host()).port(parsed.port());
    if let Some(name) = parsed.username() {
        proxy = proxy.username(name);
    }
    if let Some(password) = parsed.password() {
        proxy = proxy.password(password);
    }
    let hosts = no_proxy.unwrap_or_default().split(',').map(str::trim);
    hosts.filter(|host| !host.is_empty()).fold(proxy, |proxy, host| proxy.no_proxy(host)).build()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_taken_apart_and_joined() {
        assert_eq!(origin("https://a.b:8/c/d?e"), "https://a.b:8");
        assert_eq!(origin("http://a?x=/y"), "http://a");
        assert_eq!(join("https://a/b", "/c?d").as_deref(), Some("https://a/c?d"));
        assert_eq!(join("https://a/b", "//c/d").as_deref(), Some("https://c/d"));
        assert_eq!(join("https://a/b", "http://c").as_deref(), Some("http://c"));
        assert_eq!(join("https://a/b", "c"), None);
        assert_eq!(encode("a b/ü.gguf"), "a%20b/%C3%BC.gguf");
        assert_eq!(shown("https://cdn/x?Signature=1"), "https://cdn/x");
    }

    #[test]
    fn a_proxy_keeps_its_exceptions() {
        let proxy = proxy("http://me:word@proxy:3128", Some("localhost, .internal")).unwrap();
        assert_eq!((proxy.host(), proxy.port()), ("proxy", 3128));
        assert_eq!((proxy.username(), proxy.password()), (Some("me"), Some("word")));
        let direct = |url: &str| proxy.is_no_proxy(&url.parse().unwrap());
        assert!(direct("https://hf.internal/x") && !direct("https://huggingface.co/x"));
    }
}
