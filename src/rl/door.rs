//! `engine rl --serve`: the server beside a run, from the address to its end.
//!
//! The run drives the engine; the server has a thread of its own and only asks. A failure of the server is
//! told and does not end the run.

use std::thread::JoinHandle;

use engine::Service;
use server::{RunPoint, RunState};
use tokio::sync::oneshot;
use trainer::RlConfig;
use trainer::metrics::{Metrics, name};

use crate::args_run::RlArgs;
use crate::exit::Result;
use crate::serve;
use crate::sockets::{self, Socket, Sockets};
use crate::terminal::Terminal;

/// What the curves show of a step.
pub(super) fn point(metrics: &Metrics) -> RunPoint {
    RunPoint {
        step: metrics.get(name::GLOBAL_STEP).unwrap_or(0.0) as u64,
        reward: metrics.get(name::SCORE_MEAN),
        entropy: metrics.get(name::ENTROPY),
    }
}

/// An address that is held before the run begins, and how it is going to be served.
pub(super) struct Door {
    sockets: Sockets,
    config: server::ServerConfig,
}

impl Door {
    /// The address of `--serve`, if it is given.
    pub(super) fn open(
        args: &RlArgs,
        config: &RlConfig,
        terminal: &Terminal,
    ) -> Result<Option<Self>> {
        let Some(address) = &args.serve else { return Ok(None) };
        let public = Socket::Tcp(sockets::tcp(address, address)?);
        let sockets = Sockets::new(public, &args.api.door)?;
        let mut server = serve::server_config(&config.model.path, &args.api, *terminal)?;
        server.run = Some(RunState::new(config.trainer.total_steps));
        Ok(Some(Self { sockets, config: server }))
    }

    /// Where the curves of the run go.
    pub(super) fn curves(&self) -> Option<RunState> {
        self.config.run.clone()
    }

    /// Serves on a thread from here on. What goes wrong there is told, and does not end the run.
    pub(super) fn serve(self, service: Service, terminal: Terminal) -> Served {
        let (stop, stopped) = oneshot::channel();
        let shutdown = async {
            // A dropped sender means the same as a sent word.
            let _dropped = stopped.await;
        };
        let serve = move || serve::host(service, self.config, self.sockets, (&terminal, shutdown));
        let thread = std::thread::Builder::new().name("server".to_owned()).spawn(serve);
        Served { stop: Some(stop), thread }
    }
}

/// A server beside a run.
pub(super) struct Served {
    stop: Option<oneshot::Sender<()>>,
    thread: std::io::Result<JoinHandle<Result<()>>>,
}

impl Served {
    /// Turns newcomers away, and lets the server end when those that are served have their answers.
    pub(super) fn shut_down(&mut self) {
        self.stop = None;
    }

    /// Waits until the server has ended.
    pub(super) fn join(mut self, terminal: &Terminal) {
        self.shut_down();
        match self.thread.map(JoinHandle::join) {
            Ok(Ok(Ok(()))) => {}
            Ok(Ok(Err(failure))) => terminal.warn(&failure.to_string()),
            Ok(Err(_panic)) => terminal.warn("the server's thread panicked"),
            Err(error) => terminal.warn(&format!("no thread for the server: {error}")),
        }
    }
}
