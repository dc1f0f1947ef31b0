//! The live curves of a training run that serves at the same time.
//!
//! The run pushes a point a step; whoever answers requests reads. Holds no more than what is drawn; the
//! run's files have the rest.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::Serialize;

/// What a finished step has come to.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct RunPoint {
    /// The step, from 1.
    pub step: u64,
    /// Mean reward of its responses; `None` where it is not a finite number.
    pub reward: Option<f64>,
    /// Mean entropy in nats of the distributions its tokens were drawn from; `None` as above.
    pub entropy: Option<f64>,
}

/// A run's curves so far, shared by all clones.
///
/// ```
/// use server::{RunPoint, RunState};
/// let run = RunState::new(100);
/// run.push(RunPoint { step: 1, reward: Some(0.25), entropy: Some(1.5) });
/// assert_eq!((run.points()[0].step, run.total_steps()), (1, 100));
/// ```
#[derive(Clone, Debug)]
pub struct RunState {
    points: Arc<Mutex<Vec<RunPoint>>>,
    total_steps: u64,
}

impl RunState {
    /// A run of `total_steps` steps, before its first.
    pub fn new(total_steps: u64) -> Self {
        Self { points: Arc::default(), total_steps }
    }

    /// Steps that the run is to take.
    pub fn total_steps(&self) -> u64 {
        self.total_steps
    }

    /// Appends the point of a finished step.
    pub fn push(&self, point: RunPoint) {
        self.locked().push(point);
    }

    /// The points of all finished steps, in their order.
    pub fn points(&self) -> Vec<RunPoint> {
        self.locked().clone()
    }

    fn locked(&self) -> MutexGuard<'_, Vec<RunPoint>> {
        self.points.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
