//! `engine serve`: the OpenAI-compatible server over one model.

use std::num::NonZero;
use std::sync::Arc;
use std::time::Duration;

use engine::{LogprobsMode, SamplingParams, Service};
use serde_json::{Value, json};
use server::{
    Cors, Credentials, Limits, Listeners, LogEvent, MetricsNames, RequestLog, ServerConfig,
    UnknownFields,
};

use crate::args::{ApiArgs, GenerationConfig, LogprobsArg, MetricsCompat, ServeArgs};
use crate::args_api::{DoorArgs, JsonList};
use crate::exit::{Failure, Result};
use crate::model;
use crate::signals::{self, Signals};
use crate::sockets::{self, Access, Socket, Sockets};
use crate::terminal::Terminal;

/// Runs the command until a signal ends it.
pub(crate) fn run(args: ServeArgs, terminal: &Terminal) -> Result<()> {
    let config = model::serving_config(&args.common, &args.engine)?;
    // A port in use is reported before minutes are spent on loading.
    let public = match &args.uds {
        Some(path) => sockets::unix(path, Access::Umask)?,
        None => {
            let name = format!("{}:{}", args.host, args.port);
            Socket::Tcp(sockets::tcp(&name, (args.host.as_str(), args.port))?)
        }
    };
    let sockets = Sockets::new(public, &args.api.door)?;
    let server_config = server_config(&args.model, &args.api, *terminal)?;
    let at_once = signals::end_at_once();
    let signals = Signals::listen()?;
    let service = Service::start(model::load(&args.model, &config, terminal)?)?;
    drop(at_once);
    host(service, server_config, sockets, (terminal, signals.wait()))
}

/// Serves until `shutdown` or a failure of the engine.
pub(crate) fn host(
    service: Service,
    config: ServerConfig,
    sockets: Sockets,
    (terminal, shutdown): (&Terminal, impl Future<Output = ()>),
) -> Result<()> {
    let failed = |error: std::io::Error| Failure::running(format!("server: {error}"));
    let runtime = runtime().map_err(failed)?;
    let (model, name) = (config.model_names[0].clone(), sockets.name().map_err(failed)?);
    let admin_name = sockets.admin_name().map_err(failed)?;
    runtime.block_on(async {
        let (public, _public_file) = sockets.public.listen()?;
        let (admin, _admin_file) = sockets.admin.map(Socket::listen).transpose()?.unzip();
        terminal.info(&format!("{model}: serving at {name}"));
        if let Some(name) = admin_name {
            terminal.info(&format!("{model}: administrated at {name}"));
        }
        let listeners = Listeners { public, admin };
        server::serve(Arc::new(service), config, listeners, shutdown).await?;
        Ok(())
    })
}

/// Threads for connections: a quarter of the processors, as the engine computes on all of them and a thread
/// that wakes for a piece of an answer takes one of them away. What takes long runs on threads of its own.
pub(crate) fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    let processors = std::thread::available_parallelism().map_or(1, NonZero::get);
    let threads = processors.div_ceil(4);
    tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build()
}

/// How a server of `model` behaves.
pub(crate) fn server_config(
    model: &str,
    args: &ApiArgs,
    terminal: Terminal,
) -> Result<ServerConfig> {
    let mut config = ServerConfig::new(model);
    if !args.served_model_name.is_empty() {
        config.model_names.clone_from(&args.served_model_name);
    }
    config.api_keys.clone_from(&args.api_key);
    config.default_params = match args.generation_config {
        GenerationConfig::Auto => None,
        GenerationConfig::None => Some(SamplingParams::default()),
    };
    config.max_body_bytes = usize::try_from(args.max_body_bytes).unwrap_or(usize::MAX);
    config.shutdown_timeout = Duration::from_secs(args.shutdown_timeout);
    config.max_queued_requests = args.max_queued_requests;
    let timeout = args.request_timeout;
    config.request_timeout = timeout.map(|given| seconds("request", given)).transpose()?;
    if args.disable_log_stats {
        config.log_stats = None;
    }
    config.heartbeat_timeout = match args.heartbeat_timeout {
        0 => None,
        seconds => Some(Duration::from_secs(seconds)),
    };
    config.metrics = match args.metrics_compat {
        MetricsCompat::Own => MetricsNames::Own,
        MetricsCompat::Vllm => MetricsNames::Vllm,
    };
    if args.strict_params {
        config.unknown_fields = UnknownFields::Refuse;
    }
    config.logprobs_mode = match args.logprobs_mode {
        LogprobsArg::Raw => LogprobsMode::Raw,
        LogprobsArg::Processed => LogprobsMode::Processed,
    };
    config.log = Some(Arc::new(move |event| log(&terminal, event)));
    set_door(&mut config, &args.door)?;
    Ok(config)
}

/// Who administrates, which pages may ask, what a connection may take, what is logged.
fn set_door(config: &mut ServerConfig, args: &DoorArgs) -> Result<()> {
    config.admin_api_keys.clone_from(&args.admin_api_key);
    let list = |given: &Option<JsonList>| {
        given.as_ref().map_or_else(|| vec!["*".to_owned()], |list| list.0.clone())
    };
    config.cors = args.allowed_origins.as_ref().map(|origins| Cors {
        origins: origins.0.clone(),
        methods: list(&args.allowed_methods),
        headers: list(&args.allowed_headers),
        credentials: match args.allow_credentials {
            true => Credentials::Allow,
            false => Credentials::Omit,
        },
    });
    if let Some(cors) = &config.cors {
        cors.check()?;
    }
    if args.enable_log_requests {
        config.request_log = RequestLog::Parameters;
    }
    config.limits = Limits {
        header_timeout: seconds("header", args.header_timeout)?,
        body_timeout: seconds("body", args.body_timeout)?,
        stall_timeout: seconds("stall", args.stall_timeout)?,
        max_connections: args.max_connections,
        max_header_bytes: usize::try_from(args.h11_max_incomplete_event_size).unwrap_or(usize::MAX),
        max_headers: args.h11_max_header_count,
    };
    Ok(config.limits.check()?)
}

/// A time limit in seconds, of the flag `--<name>-timeout`.
fn seconds(name: &str, given: f64) -> Result<Duration> {
    match Duration::try_from_secs_f64(given) {
        Ok(limit) if !limit.is_zero() && limit <= Limits::MAX_TIMEOUT => Ok(limit),
        _ => Err(Failure::usage(format!(
            "--{name}-timeout is {given}, limit is more than 0 and at most {} seconds",
            Limits::MAX_TIMEOUT.as_secs()
        ))),
    }
}

fn log(terminal: &Terminal, event: &LogEvent) {
    match event {
        LogEvent::UnknownField { name } => {
            let message = format!("request field {name:?} is not known and has no effect");
            terminal.warn_with(&message, &[("field", json!(name))]);
        }
        LogEvent::Answered { method, path, status, request_id, elapsed } => {
            let ms = elapsed.as_secs_f64() * 1e3;
            let message = format!("{method} {path:?} {status} {ms:.1} ms {request_id}");
            let ms = (ms * 10.0).round() / 10.0;
            terminal.info_with(
                &message,
                &[
                    ("method", json!(method)),
                    ("path", json!(path)),
                    ("status", json!(status)),
                    ("ms", json!(ms)),
                    ("request_id", json!(request_id)),
                ],
            );
        }
        LogEvent::Load(report) => terminal.info_with(
            &report.to_string(),
            &[
                ("prompt_tokens_per_s", json!(report.prompt_tokens_per_s)),
                ("generation_tokens_per_s", json!(report.generation_tokens_per_s)),
                ("running", json!(report.running)),
                ("waiting", json!(report.waiting)),
                ("kv_cache_usage", json!(report.kv_usage)),
                ("prefix_cache_hit_rate", json!(report.prefix_hit_rate)),
            ],
        ),
        LogEvent::Draining { running } => {
            let message = format!("shutting down, {running} requests to finish");
            terminal.info_with(&message, &[("running", json!(running))]);
        }
        LogEvent::DrainTimeout { running } => {
            let message = format!("shutdown timeout, {running} requests are aborted");
            terminal.warn_with(&message, &[("running", json!(running))]);
        }
        LogEvent::Request { request_id, answer_id, prompts, prompt_tokens, parameters } => {
            let named: Vec<String> =
                parameters.iter().map(|(name, value)| format!("{name}={value}")).collect();
            let message = format!(
                "request {request_id} {answer_id} prompts={prompts} prompt_tokens={prompt_tokens} {}",
                named.join(" ")
            );
            let mut fields: Vec<(&str, Value)> =
                parameters.iter().map(|(name, value)| (*name, json!(value))).collect();
            fields.extend([
                ("request_id", json!(request_id)),
                ("answer_id", json!(answer_id)),
                ("prompts", json!(prompts)),
                ("prompt_tokens", json!(prompt_tokens)),
            ]);
            terminal.info_with(&message, &fields);
        }
        LogEvent::ConnectionsFull { limit } => {
            let message = format!("connections are turned away, limit is {limit}");
            terminal.warn_with(&message, &[("limit", json!(limit))]);
        }
        LogEvent::Failed { why } => {
            terminal.warn_with(&format!("a generation failed: {why}"), &[("why", json!(why))]);
        }
        LogEvent::WeightsUpdated { version } => {
            let message = format!("weights replaced, version {version}");
            terminal.info_with(&message, &[("weights_version", json!(version))]);
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpStream;
    use std::process::ExitCode;

    use clap::Parser;
    use engine::{Engine, EngineConfig};

    use super::*;
    use crate::args::{Cli, Command};

    #[test]
    fn a_name_in_the_api_leaves_the_model_alone() {
        let line = "engine serve --served-model-name a --served-model-name b m.gguf";
        let Command::Serve(args) = Cli::try_parse_from(line.split(' ')).unwrap().command else {
            panic!("another command");
        };
        assert_eq!((&*args.model, args.api.served_model_name.join(" ")), ("m.gguf", "a b".into()));
    }

    #[test]
    fn signs_of_life_are_told_unless_they_are_turned_off() {
        let config = |flags: &[&str]| {
            let line = ["engine", "serve"].iter().chain(flags);
            let Command::Serve(args) = Cli::try_parse_from(line).unwrap().command else {
                panic!("another command");
            };
            server_config("m", &args.api, Terminal::plain()).unwrap()
        };
        let default = config(&[]);
        assert_eq!(default.log_stats, Some(Duration::from_secs(5)));
        assert_eq!(default.heartbeat_timeout, Some(Duration::from_secs(300)));
        let off = config(&["--disable-log-stats", "--heartbeat-timeout", "0"]);
        assert_eq!((off.log_stats, off.heartbeat_timeout), (None, None));
        let short = config(&["--heartbeat-timeout", "9"]);
        assert_eq!(short.heartbeat_timeout, Some(Duration::from_secs(9)));
    }

    #[test]
    fn an_engine_that_has_failed_ends_the_command_with_code_1() {
        let terminal = Terminal::plain();
        let config = EngineConfig { threads: Some(1), ..EngineConfig::default() };
        let source = model::source("builtin:arith", &terminal).unwrap();
        let mut engine = Engine::load(&source, &config).unwrap();
        engine.inject_fault(|batch| assert!(batch.len() < 2, "injected"));
        let service = Service::start(engine).unwrap();
        let listener = sockets::tcp("test", "127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let client = std::thread::spawn(move || {
            // It listens when the server begins.
            let mut streams = std::iter::repeat_with(|| TcpStream::connect(address));
            let mut stream = streams.find_map(Result::ok).unwrap();
            let body = r#"{"prompt": "1+1=", "n": 2}"#;
            let length = body.len();
            write!(
                stream,
                "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
                 content-length: {length}\r\nconnection: close\r\n\r\n{body}"
            )
            .unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            answer
        });
        let config = ServerConfig::new("arith");
        let sockets = Sockets { public: Socket::Tcp(listener), admin: None };
        let failure = host(service, config, sockets, (&terminal, std::future::pending()));
        let failure = failure.unwrap_err();
        assert!(client.join().unwrap().starts_with("HTTP/1.1 500"));
        assert_eq!(failure.to_string(), "engine: a step panicked twice");
        // Codes can only be compared as they print.
        assert_eq!(format!("{:?}", failure.exit_code()), format!("{:?}", ExitCode::from(1)));
    }
}
