//! What all requests share: the service, the configuration, the drain and who is being served.

use std::collections::HashSet;
use std::fmt;
use std::hash::RandomState;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use engine::{Event, LogprobsMode, SamplingParams, Service};
use tokio::sync::watch;

use crate::access::Keys;
use crate::admin::Admin;
use crate::api_error::ApiError;
use crate::cors::Cors;
use crate::encode::Turns;
use crate::error::{Error, Result};
use crate::fields::{BadField, Fields};
use crate::limits::Limits;
use crate::load_report::LoadReport;
use crate::metrics::{Metrics, MetricsNames};
use crate::named::{Name, Named};
use crate::outbox::Outbox;
use crate::request_log::RequestLog;
use crate::run_state::RunState;
use crate::structured::Grammars;

/// Most unknown field names that are remembered, so that a client cannot fill memory with them.
const MAX_UNKNOWN: usize = 256;
/// Longest unknown field name that is reported, in characters.
const MAX_NAME_CHARS: usize = 64;

/// How the server behaves.
#[derive(Clone)]
pub struct ServerConfig {
    /// Names the model answers to; the first stands in answers. At least one.
    pub model_names: Vec<String>,
    /// Keys of which a client must show one; without any, everybody is served.
    pub api_keys: Vec<String>,
    /// Sampling parameters where a request gives none; `None` takes the recommendation that comes
    /// with the model (`generation_config.json`).
    pub default_params: Option<SamplingParams>,
    /// Longest request body that is read.
    pub max_body_bytes: usize,
    /// How long running requests may take to finish after the shutdown began.
    pub shutdown_timeout: Duration,
    /// Sequences that may wait for room; further requests get 429. `None` lets all wait. Counted as of
    /// the engine's last step, so requests that come together may all be let in.
    pub max_queued_requests: Option<usize>,
    /// How long a request may take, queue included; then its samples are aborted. `None`: any time.
    pub request_timeout: Option<Duration>,
    /// Time without a token after which a stream gets a comment, so that proxies keep it open.
    pub keep_alive: Duration,
    /// Names of the series under `/metrics`.
    pub metrics: MetricsNames,
    /// What becomes of a request with a field that nothing here knows.
    pub unknown_fields: UnknownFields,
    /// Which distribution reported log-probabilities are of; those of prompts are always raw, and those of
    /// `/inference/v1/generate` of the one that was drawn from.
    pub logprobs_mode: LogprobsMode,
    /// Receives what is worth a log line; must not block.
    pub log: Option<Log>,
    /// How often a [`LogEvent::Load`] is reported while there is work; `None` for never.
    pub log_stats: Option<Duration>,
    /// Time without a step, while steps are to be expected, after which `/health` says 503; `None` for
    /// never.
    pub heartbeat_timeout: Option<Duration>,
    /// Whether requests are logged when they are taken in, beside the line of their answer.
    pub request_log: RequestLog,
    /// Keys of which the operator must show one on the admin listener; without any, whoever reaches it may
    /// administrate.
    pub admin_api_keys: Vec<String>,
    /// What pages of other sites may do; `None` for nothing.
    pub cors: Option<Cors>,
    /// What a connection may take.
    pub limits: Limits,
    /// The curves of the run that trains the served weights, if one does.
    pub run: Option<RunState>,
}

/// What becomes of a request with a field that nothing here knows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum UnknownFields {
    /// It is answered as if the field were not there; the name is reported once.
    #[default]
    Report,
    /// It is a 400 that names the field.
    Refuse,
}

/// Receives what is worth a log line.
pub type Log = Arc<dyn Fn(&LogEvent) + Send + Sync>;

/// Something worth a log line. Never holds a prompt, an answer or a key.
#[non_exhaustive]
#[derive(Clone, Debug, PartialEq)]
pub enum LogEvent {
    /// A request has a field that nothing here knows; once per name.
    UnknownField {
        /// The field's name, cut to 64 characters.
        name: String,
    },
    /// An answer begins; or, with status 499, its client has left before it was whole.
    Answered {
        /// The request's method.
        method: String,
        /// The request's path, without its query.
        path: String,
        /// The answer's HTTP status.
        status: u16,
        /// The request's id, as in the header `x-request-id`; `-` if the client left before the head.
        request_id: String,
        /// Time from the request's head to the answer's head.
        elapsed: Duration,
    },
    /// How busy the server is.
    Load(LoadReport),
    /// A request was taken in, where [`RequestLog`] asks for that.
    Request {
        /// The request's id, as in the header `x-request-id`.
        request_id: String,
        /// The answer's id.
        answer_id: String,
        /// How many prompts it has.
        prompts: usize,
        /// Tokens of its prompts.
        prompt_tokens: usize,
        /// Names and values of how it samples.
        parameters: Vec<(&'static str, String)>,
    },
    /// Connections are turned away; once until one is taken in again.
    ConnectionsFull {
        /// Connections that may be open.
        limit: u32,
    },
    /// A generation failed for a reason that is not its request's, which gets 500.
    Failed {
        /// What went wrong; nothing of a prompt or an answer.
        why: String,
    },
    /// The weights were replaced.
    WeightsUpdated {
        /// Their version.
        version: u64,
    },
    /// The shutdown began.
    Draining {
        /// Requests that still run.
        running: usize,
    },
    /// The time for the shutdown is over: what still runs is aborted.
    DrainTimeout {
        /// Requests that still ran.
        running: usize,
    },
}

impl ServerConfig {
    /// The defaults, for a model of that name: no keys, bodies up to 32 MiB, 30 s to drain.
    pub fn new(model_name: impl Into<String>) -> Self {
        Self {
            model_names: vec![model_name.into()],
            api_keys: Vec::new(),
            default_params: None,
            max_body_bytes: 32 << 20,
            shutdown_timeout: Duration::from_secs(30),
            max_queued_requests: None,
            request_timeout: None,
            keep_alive: Duration::from_secs(15),
            metrics: MetricsNames::Own,
            unknown_fields: UnknownFields::Report,
            logprobs_mode: LogprobsMode::Raw,
            log: None,
            log_stats: Some(Duration::from_secs(5)),
            heartbeat_timeout: Some(Duration::from_secs(300)),
            request_log: RequestLog::Off,
            admin_api_keys: Vec::new(),
            cors: None,
            limits: Limits::default(),
            run: None,
        }
    }
}

impl fmt::Debug for ServerConfig {
    /// Leaves out the keys.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerConfig")
            .field("model_names", &self.model_names)
            .field("max_body_bytes", &self.max_body_bytes)
            .field("shutdown_timeout", &self.shutdown_timeout)
            .finish_non_exhaustive()
    }
}

/// The state behind the routes.
pub(crate) struct App {
    pub(crate) service: Arc<Service>,
    pub(crate) config: ServerConfig,
    pub(crate) keys: Keys,
    pub(crate) admin: Admin,
    pub(crate) defaults: SamplingParams,
    /// Most tokens of a chat's answer where the request does not say; a long prompt may leave it fewer.
    pub(crate) default_max_tokens: Option<usize>,
    pub(crate) live: Arc<Live>,
    pub(crate) metrics: Arc<Metrics>,
    /// Events with the choice of their request that they belong to.
    pub(crate) outbox: Arc<Outbox<(usize, Event)>>,
    pub(crate) grammars: Grammars,
    pub(crate) encoding: Turns,
    /// Samples that the engine has been handed and not taken in.
    pub(crate) handed: Arc<AtomicUsize>,
    /// Turns cache salts into numbers, by keys that nobody knows.
    pub(crate) salts: RandomState,
    started_s: u64,
    ids: AtomicU64,
    unknown: Mutex<HashSet<String>>,
}

impl App {
    /// # Errors
    /// When the configuration is invalid.
    ///
    /// # Panics
    /// Outside of an async runtime.
    pub(crate) fn new(service: Arc<Service>, config: ServerConfig) -> Result<Arc<Self>> {
        if config.model_names.is_empty() {
            return Err(Error::config("model_names is empty, at least one is needed"));
        }
        let keys = Keys::new(&config.api_keys)?;
        let admin = Admin::new(&config.admin_api_keys)?;
        let recommended = || crate::params::default_params(service.generation_defaults());
        let mut defaults = config.default_params.clone().unwrap_or_else(recommended);
        let default_max_tokens = defaults.max_tokens.take();
        Ok(Arc::new(Self {
            keys,
            admin,
            defaults,
            default_max_tokens,
            live: Arc::new(Live::new()),
            metrics: Arc::new(Metrics::new()),
            outbox: Outbox::open(&service),
            grammars: Grammars::default(),
            encoding: Turns::of_processors(),
            handed: Arc::default(),
            salts: RandomState::new(),
            started_s: now_s(),
            ids: AtomicU64::new(0),
            unknown: Mutex::new(HashSet::new()),
            service,
            config,
        }))
    }

    /// The name of the model in answers.
    pub(crate) fn model_name(&self) -> &str {
        &self.config.model_names[0]
    }

    /// When the server started, in seconds since 1970.
    pub(crate) fn started_s(&self) -> u64 {
        self.started_s
    }

    /// A number no other request of this server has.
    pub(crate) fn next_id(&self) -> u64 {
        self.ids.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn log(&self, event: &LogEvent) {
        if let Some(log) = &self.config.log {
            log(event);
        }
    }

    /// Reports the names that are left in `fields`, each once in the server's life.
    ///
    /// # Errors
    /// When there is one and unknown fields are refused.
    pub(crate) fn report_unknown(&self, fields: &Fields) -> std::result::Result<(), BadField> {
        self.report_unknown_in("", fields)
    }

    /// The same for the fields of an object whose own name, with a dot, is `outer`.
    pub(crate) fn report_unknown_in(
        &self,
        outer: &str,
        fields: &Fields,
    ) -> std::result::Result<(), BadField> {
        for name in fields.names() {
            let name: String = outer.chars().chain(name.chars()).take(MAX_NAME_CHARS).collect();
            if self.config.unknown_fields == UnknownFields::Refuse {
                let message = format!("{name:?} is no field of this request");
                return Err(BadField::new(&name, message).with_code("unsupported_parameter"));
            }
            let mut unknown = self.unknown.lock().unwrap_or_else(PoisonError::into_inner);
            if unknown.len() < MAX_UNKNOWN && unknown.insert(name.clone()) {
                drop(unknown);
                self.log(&LogEvent::UnknownField { name });
            }
        }
        Ok(())
    }
}

/// Seconds since 1970.
pub(crate) fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// Who is being served, and whether newcomers still are.
pub(crate) struct Live {
    draining: AtomicBool,
    visits: watch::Sender<usize>,
    /// What runs for the visitors, and its names.
    pub(crate) named: Arc<Named>,
}

impl Live {
    fn new() -> Self {
        let visits = watch::Sender::new(0);
        Self { draining: AtomicBool::new(false), visits, named: Arc::new(Named::default()) }
    }

    /// Counts one visitor in until the guard is dropped.
    ///
    /// # Errors
    /// When the server is draining.
    pub(crate) fn enter(self: &Arc<Self>) -> std::result::Result<Visit, ApiError> {
        // Counted first: a visitor is either seen by the drain or sees it.
        self.visits.send_modify(|visits| *visits += 1);
        let name = self.named.enter();
        let visit = Visit { live: Arc::clone(self), name, request_id: String::new() };
        if self.is_draining() { Err(ApiError::draining()) } else { Ok(visit) }
    }

    pub(crate) fn is_draining(&self) -> bool {
        self.draining.load(Ordering::SeqCst)
    }

    /// Turns newcomers away from here on.
    pub(crate) fn drain(&self) {
        self.draining.store(true, Ordering::SeqCst);
    }

    /// Requests being served.
    pub(crate) fn visits(&self) -> usize {
        *self.visits.borrow()
    }

    /// Waits until nobody is being served.
    pub(crate) async fn idle(&self) {
        let mut visits = self.visits.subscribe();
        // The sender lives as long as `self`, so waiting cannot fail.
        let _ = visits.wait_for(|visits| *visits == 0).await;
    }
}

/// One visitor being served.
#[must_use]
pub(crate) struct Visit {
    live: Arc<Live>,
    /// The names by which clients can end it.
    pub(crate) name: Name,
    /// The request's id, as in the header `x-request-id`.
    pub(crate) request_id: String,
}

impl Drop for Visit {
    fn drop(&mut self) {
        self.live.visits.send_modify(|visits| *visits -= 1);
    }
}
