//! A server in this process, at a free port of this machine.

use std::sync::Arc;

use engine::{Engine, Service};
use server::ServerConfig;
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::exit::{Failure, Result};

/// A running server.
pub(super) struct OwnServer {
    /// Host and port.
    pub(super) address: String,
    stop: oneshot::Sender<()>,
    serving: JoinHandle<server::Result<()>>,
}

impl OwnServer {
    /// Serves `engine` under `name`.
    pub(super) fn start(runtime: &Runtime, engine: Engine, name: &str) -> Result<Self> {
        let failed = |error: std::io::Error| Failure::running(format!("server: {error}"));
        let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?.to_string();
        let service = Arc::new(Service::start(engine)?);
        let (stop, stopped) = oneshot::channel();
        let config = ServerConfig::new(name);
        let serving = runtime.spawn(async move {
            let end = async {
                // Dropped or sent: both are the end.
                let _end = stopped.await;
            };
            server::serve(service, config, listener, end).await
        });
        Ok(Self { address, stop, serving })
    }

    /// Ends it.
    pub(super) fn stop(self, runtime: &Runtime) -> Result<()> {
        let Self { stop, serving, .. } = self;
        drop(stop);
        let ended = runtime.block_on(serving);
        ended.map_err(|error| Failure::running(format!("server: {error}")))??;
        Ok(())
    }
}
