//! `engine serve`: the OpenAI-compatible server over one model.

use std::io::ErrorKind;
use std::net::{TcpListener, ToSocketAddrs};
use std::sync::Arc;
use std::time::Duration;

use engine::{LogprobsMode, SamplingParams, Service};
use serde_json::json;
use server::{LogEvent, MetricsNames, ServerConfig, UnknownFields};

use crate::args::{ApiArgs, GenerationConfig, LogprobsArg, MetricsCompat, ServeArgs};
use crate::exit::{Failure, Result};
use crate::model;
use crate::signals::Signals;
use crate::terminal::Terminal;

/// Runs the command until a signal ends it.
pub(crate) fn run(args: ServeArgs, terminal: &Terminal) -> Result<()> {
    let config = model::serving_config(&args.common, &args.engine)?;
    // A port in use is reported before minutes are spent on loading.
    let name = format!("{}:{}", args.host, args.port);
    let listener = listen(&name, (args.host.as_str(), args.port))?;
    let signals = Signals::listen()?;
    let service = Service::start(model::load(&args.model, &config, terminal)?)?;
    let server_config = server_config(&args.model, &args.api, *terminal)?;
    host(service, server_config, listener, (terminal, signals.wait()))
}

/// Serves until `shutdown` or a failure of the engine.
pub(crate) fn host(
    service: Service,
    config: ServerConfig,
    listener: TcpListener,
    (terminal, shutdown): (&Terminal, impl Future<Output = ()>),
) -> Result<()> {
    let failed = |error: std::io::Error| Failure::running(format!("server: {error}"));
    let address = listener.local_addr().map_err(failed)?;
    terminal.info(&format!("{}: serving at http://{address}/v1", config.model_names[0]));
    let runtime = tokio::runtime::Runtime::new().map_err(failed)?;
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::from_std(listener).map_err(failed)?;
        server::serve(Arc::new(service), config, listener, shutdown).await?;
        Ok(())
    })
}

/// Takes the address, which messages call `name`.
pub(crate) fn listen(name: &str, address: impl ToSocketAddrs) -> Result<TcpListener> {
    let failed = |error: std::io::Error| Failure::running(format!("{name}: {error}"));
    let listener = TcpListener::bind(address).map_err(|error| match error.kind() {
        ErrorKind::InvalidInput => {
            Failure::usage(format!("{name}: expected HOST:PORT to listen on"))
        }
        _ => failed(error),
    })?;
    listener.set_nonblocking(true).map_err(failed)?;
    Ok(listener)
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
    config.request_timeout = args.request_timeout.map(seconds).transpose()?;
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
    Ok(config)
}

/// A time limit in seconds.
fn seconds(given: f64) -> Result<Duration> {
    match Duration::try_from_secs_f64(given) {
        Ok(limit) if !limit.is_zero() => Ok(limit),
        _ => Err(Failure::usage(format!(
            "--request-timeout is {given}, limit is more than 0 seconds"
        ))),
    }
}

fn log(terminal: &Terminal, event: &LogEvent) {
    match event {
        LogEvent::UnknownField { name } => {
            terminal.warn(&format!("request field {name:?} is not known and has no effect"));
        }
        LogEvent::Answered { method, path, status, request_id, elapsed } => {
            let ms = elapsed.as_secs_f64() * 1e3;
            terminal.info(&format!("{method} {path:?} {status} {ms:.1} ms {request_id}"));
        }
        LogEvent::Load(report) => terminal.info_with(
            &report.to_string(),
            &json!({
                "prompt_tokens_per_s": report.prompt_tokens_per_s,
                "generation_tokens_per_s": report.generation_tokens_per_s,
                "running": report.running,
                "waiting": report.waiting,
                "kv_cache_usage": report.kv_usage,
                "prefix_cache_hit_rate": report.prefix_hit_rate,
            }),
        ),
        LogEvent::Draining { running } => {
            terminal.info(&format!("shutting down, {running} requests to finish"));
        }
        LogEvent::DrainTimeout { running } => {
            terminal.warn(&format!("shutdown timeout, {running} requests are aborted"));
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
        let listener = listen("test", "127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let client = std::thread::spawn(move || {
            let mut stream = TcpStream::connect(address).unwrap();
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
        let failure = host(service, config, listener, (&terminal, std::future::pending()));
        let failure = failure.unwrap_err();
        assert!(client.join().unwrap().starts_with("HTTP/1.1 500"));
        assert_eq!(failure.to_string(), "engine: a step panicked twice");
        // Codes can only be compared as they print.
        assert_eq!(format!("{:?}", failure.exit_code()), format!("{:?}", ExitCode::from(1)));
    }
}
