//! The phase lock: weights change only through a [`WeightsUpdate`], and only while nothing runs.

use kernels::Kernels;
use scheduler::Scheduler;

use crate::decoder::Decoder;

/// Exclusive access to the weights. While it lives the engine cannot run; when it is dropped, on every
/// path out, the weights version rises by one and the prefix cache is emptied.
#[must_use = "the update ends when this is dropped"]
pub struct WeightsUpdate<'a> {
    pub(crate) decoder: &'a mut Decoder,
    pub(crate) kernels: &'a Kernels,
    pub(crate) scheduler: &'a mut Scheduler,
}

impl WeightsUpdate<'_> {
    /// The model, to run and to change.
    pub fn decoder(&mut self) -> (&mut Decoder, &Kernels) {
        (self.decoder, self.kernels)
    }
}

impl Drop for WeightsUpdate<'_> {
    fn drop(&mut self) {
        self.scheduler.end_update();
    }
}
