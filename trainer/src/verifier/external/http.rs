//! A server that is asked by POST, one request each, over kept connections.

use ureq::Agent;

use super::{Answer, Asker, Failure, Limits, MAX_ANSWER_BYTES, read};

/// An address, and the connections to it.
pub(super) struct Server {
    agent: Agent,
    address: String,
    limits: Limits,
}

impl Server {
    pub(super) fn new(address: &str, limits: Limits) -> Self {
        let config = Agent::config_builder()
            .timeout_global(Some(limits.answer))
            .proxy(None)
            .http_status_as_error(false)
            .max_redirects(0)
            .build();
        Self { agent: config.into(), address: address.to_owned(), limits }
    }
}

impl Asker for Server {
    fn ask(&mut self, id: u64, request: &str) -> Answer {
        let failed = |error: ureq::Error| match error {
            ureq::Error::Timeout(_) => Failure::Timeout(self.limits.late()),
            error => Failure::Broken(error.to_string()),
        };
        let post = self.agent.post(&self.address).header("content-type", "application/json");
        let mut response = post.send(request).map_err(failed)?;
        if !response.status().is_success() {
            return Err(Failure::Broken(format!("it answered {}", response.status())));
        }
        let body = response.body_mut().with_config().limit(MAX_ANSWER_BYTES);
        let text = body.read_to_string().map_err(failed)?;
        read(&text, id).unwrap_or_else(|reason| Err(Failure::Broken(reason)))
    }
}
