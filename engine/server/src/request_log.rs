//! What a log line may say of a request before it runs: how it samples, never what it says.
//!
//! Stop strings, biases and grammars are the client's text too, so only their number is told.

use engine::SamplingParams;

use crate::app::{App, LogEvent};
use crate::job::Job;

/// Whether requests have a log line when they are taken in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RequestLog {
    /// They have not.
    #[default]
    Off,
    /// They have, with their parameters.
    Parameters,
}

/// Names and values.
pub(crate) type Parameters = Vec<(&'static str, String)>;

/// The parameters of a request, if they are to be logged.
pub(crate) fn parameters(app: &App, params: &SamplingParams) -> Option<Parameters> {
    if app.config.request_log == RequestLog::Off {
        return None;
    }
    let number = |value: Option<usize>| value.map_or_else(|| "none".to_owned(), |n| n.to_string());
    Some(vec![
        ("n", params.n.to_string()),
        ("max_tokens", number(params.max_tokens)),
        ("min_tokens", params.min_tokens.to_string()),
        ("temperature", params.temperature.to_string()),
        ("top_p", params.top_p.to_string()),
        ("top_k", number(params.top_k)),
        ("min_p", params.min_p.to_string()),
        ("seed", params.seed.map_or_else(|| "none".to_owned(), |seed| seed.to_string())),
        ("stop_strings", params.stop.len().to_string()),
        ("logprobs", number(params.logprobs)),
    ])
}

/// Logs a request that has been taken in, if that is asked for.
pub(crate) fn taken_in(app: &App, job: &Job, parameters: Option<Parameters>) {
    if let Some(parameters) = parameters {
        app.log(&LogEvent::Request {
            request_id: job.visit.request_id.clone(),
            answer_id: job.id.clone(),
            prompts: job.prompts.len(),
            prompt_tokens: job.prompt_tokens(),
            parameters,
        });
    }
}
