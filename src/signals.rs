//! SIGINT and SIGTERM: the first asks the command to end, the second ends it at once. SIGHUP is ignored.

use std::process::exit;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::runtime::Builder;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::exit::{Failure, Result};

/// The exit code of an interrupted process.
const INTERRUPTED: i32 = 130;

/// Whether the first signal is enough.
static AT_ONCE: AtomicBool = AtomicBool::new(false);

/// While this lives, the first signal ends the command at once.
#[must_use]
pub(crate) struct AtOnce {
    /// Whether it was so before.
    before: bool,
}

/// Lets the first signal end the command at once: for work that loses nothing by it.
pub(crate) fn end_at_once() -> AtOnce {
    AtOnce { before: AT_ONCE.swap(true, Ordering::Relaxed) }
}

impl Drop for AtOnce {
    fn drop(&mut self) {
        AT_ONCE.store(self.before, Ordering::Relaxed);
    }
}

/// Knows whether the command has been asked to end.
#[derive(Clone, Debug)]
pub(crate) struct Signals {
    asked: watch::Receiver<bool>,
}

impl Signals {
    /// Listens from here on, on a thread of its own.
    pub(crate) fn listen() -> Result<Self> {
        let failed = |error: std::io::Error| Failure::running(format!("signals: {error}"));
        let runtime = Builder::new_current_thread().enable_io().build().map_err(failed)?;
        let (mut interrupt, mut terminate) = {
            let _context = runtime.enter();
            let interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
            // Caught once, it no longer ends the process, whoever listens.
            let _ignored = signal(SignalKind::hangup()).map_err(failed)?;
            (interrupt, signal(SignalKind::terminate()).map_err(failed)?)
        };
        let (ask, asked) = watch::channel(false);
        let listen = async move {
            for attempt in 0..2 {
                tokio::select! {
                    _ = interrupt.recv() => {}
                    _ = terminate.recv() => {}
                }
                if attempt == 1 || AT_ONCE.load(Ordering::Relaxed) {
                    exit(INTERRUPTED);
                }
                ask.send_replace(true);
            }
        };
        std::thread::Builder::new()
            .name("signals".to_owned())
            .spawn(move || runtime.block_on(listen))
            .map_err(failed)?;
        Ok(Self { asked })
    }

    /// Whether a signal has come.
    pub(crate) fn asked(&self) -> bool {
        *self.asked.borrow()
    }

    /// Waits for a signal.
    pub(crate) async fn wait(mut self) {
        // The sender lives as long as the process.
        let _ended = self.asked.wait_for(|asked| *asked).await;
    }
}
