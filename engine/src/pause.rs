//! A service that pauses: what becomes of its requests, and who waits for the pause to be reached.
//!
//! Whoever asks while it pauses waits without an error. Leaves out who may pause it.

use std::collections::HashSet;

use crossbeam::channel::Sender;

use crate::engine::Engine;
use crate::error::{Error, Result};
use crate::request::RequestId;

/// What becomes of the requests that have been taken in before a pause; later ones wait for its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PauseMode {
    /// They end as they are, with [`FinishReason::Abort`](crate::FinishReason::Abort).
    Abort,
    /// They finish.
    Wait,
    /// They stand still, and go on after the pause.
    Keep,
}

/// Whether a service pauses, on the side of whoever drives its engine.
#[derive(Default)]
pub(crate) struct Gate {
    mode: Option<PauseMode>,
    /// Requests taken in since the pause began.
    held: HashSet<RequestId>,
    /// Those who wait for the pause to be reached.
    askers: Vec<Sender<Result<()>>>,
}

impl Gate {
    pub(crate) fn mode(&self) -> Option<PauseMode> {
        self.mode
    }

    /// Whether not even requests from before the pause may go on.
    pub(crate) fn frozen(&self) -> bool {
        self.mode == Some(PauseMode::Keep)
    }

    /// A request was taken in.
    pub(crate) fn entered(&mut self, id: RequestId) {
        if self.mode.is_some() {
            self.held.insert(id);
        }
    }

    /// A request is over.
    pub(crate) fn left(&mut self, id: RequestId) {
        self.held.remove(&id);
    }

    /// Begins a pause or changes how it is held; `open` are the requests on their way.
    pub(crate) fn close(
        &mut self,
        engine: &mut Engine,
        mode: PauseMode,
        (open, asker): (Vec<RequestId>, Sender<Result<()>>),
    ) {
        self.overtake();
        engine.hold_newcomers();
        self.mode = Some(mode);
        if mode == PauseMode::Abort {
            open.into_iter().filter(|id| !self.held.contains(id)).for_each(|id| {
                engine.abort(id);
            });
        }
        self.askers.push(asker);
    }

    /// Ends a pause, if there is one.
    pub(crate) fn open(&mut self, engine: &mut Engine) {
        self.overtake();
        engine.admit_newcomers();
        self.mode = None;
        self.held.clear();
    }

    /// Tells those who wait for a pause, once it is reached; `open` requests are on their way.
    pub(crate) fn settle(&mut self, open: usize) {
        if self.frozen() || (self.mode.is_some() && open == self.held.len()) {
            for asker in self.askers.drain(..) {
                // Whoever has left does not want to know.
                let _left = asker.send(Ok(()));
            }
        }
    }

    fn overtake(&mut self) {
        for asker in self.askers.drain(..) {
            let overtaken =
                Error::busy("another pause or a resume came before the pause was reached");
            // As above.
            let _left = asker.send(Err(overtaken));
        }
    }
}
