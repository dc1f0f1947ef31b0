//! `engine serve`: the OpenAI-compatible server over one model.

use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;

use engine::{SamplingParams, Service};
use server::{LogEvent, ServerConfig};

use crate::args::{GenerationConfig, ServeArgs};
use crate::exit::{Failure, Result};
use crate::model;
use crate::signals::Signals;
use crate::terminal::Terminal;

/// Runs the command until a signal ends it.
pub(crate) fn run(args: ServeArgs, terminal: &Terminal) -> Result<()> {
    let config = model::serving_config(&args.common, &args.engine)?;
    // A port in use is reported before minutes are spent on loading.
    let listener = listen(&args.host, args.port)?;
    let signals = Signals::listen()?;
    let service = Service::start(model::load(&args.model, &config, terminal)?)?;
    let failed = |error: std::io::Error| Failure::running(format!("server: {error}"));
    let address = listener.local_addr().map_err(failed)?;
    let server_config = server_config(&args, *terminal);
    let name = &server_config.model_names[0];
    terminal.info(&format!("{name}: serving at http://{address}/v1"));
    let runtime = tokio::runtime::Runtime::new().map_err(failed)?;
    let service = Arc::new(service);
    runtime.block_on(async {
        let listener = tokio::net::TcpListener::from_std(listener).map_err(failed)?;
        server::serve(service, server_config, listener, signals.wait()).await?;
        Ok(())
    })
}

fn listen(host: &str, port: u16) -> Result<TcpListener> {
    let failed = |error: std::io::Error| Failure::running(format!("{host}:{port}: {error}"));
    let listener = TcpListener::bind((host, port)).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    Ok(listener)
}

fn server_config(args: &ServeArgs, terminal: Terminal) -> ServerConfig {
    let mut config = ServerConfig::new(&args.model);
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
    config.log = Some(Arc::new(move |event| log(&terminal, event)));
    config
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
        LogEvent::Draining { running } => {
            terminal.info(&format!("shutting down, {running} requests to finish"));
        }
        LogEvent::DrainTimeout { running } => {
            terminal.warn(&format!("shutdown timeout, {running} requests are aborted"));
        }
        _ => {}
    }
}
