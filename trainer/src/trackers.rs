//! Where the numbers of a run go as they come: `metrics.jsonl`, always, and TensorBoard events where
//! `trainer.trackers` has `tensorboard`. Leaves out `console`, which is the caller's.

use std::path::Path;

use crate::config::TrainerConfig;
use crate::error::Result;
use crate::metrics::{Metrics, MetricsWriter};
use crate::tensorboard::EventWriter;

/// Writes each step to every tracker of a run.
#[derive(Debug)]
pub struct Trackers {
    lines: MetricsWriter,
    events: Option<EventWriter>,
}

impl Trackers {
    /// Opens the files in `trainer.output`: anew, or after a step that was resumed, in which case
    /// later steps go from them.
    ///
    /// # Errors
    /// If a file cannot be read or written.
    pub fn open(config: &TrainerConfig, after: Option<u64>) -> Result<Self> {
        let run = Path::new(&config.output);
        let path = run.join("metrics.jsonl");
        let wanted = config.tracks("tensorboard");
        let (lines, events) = match after {
            Some(step) => (
                MetricsWriter::resume(&path, step)?,
                wanted.then(|| EventWriter::resume(run, step)).transpose()?,
            ),
            None => (
                MetricsWriter::create(&path)?,
                wanted.then(|| EventWriter::create(run)).transpose()?,
            ),
        };
        Ok(Self { lines, events })
    }

    /// A value of the last step that was there when the run was resumed.
    pub fn last(&self, name: &str) -> Option<f64> {
        self.lines.last(name)
    }

    /// Writes a step.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn write(&mut self, metrics: &Metrics) -> Result<()> {
        self.lines.write(metrics)?;
        self.events.as_mut().map_or(Ok(()), |events| events.write(metrics))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::RlConfig;
    use crate::metrics::name;
    use crate::testing::TestDir;

    #[test]
    fn events_are_written_where_they_are_asked_for() {
        let dir = TestDir::new("trackers");
        let output = dir.path().to_string_lossy().into_owned();
        let config = |trackers: &str| {
            let set = |key: &str, value: &str| (key.to_owned(), value.to_owned());
            let overrides = [
                set("trainer.output", &format!("\"{output}\"")),
                set("trainer.trackers", &format!("[{trackers}]")),
            ];
            RlConfig::resolve(None, None, &overrides).unwrap().trainer
        };
        let mut step = Metrics::new();
        step.set(name::GLOBAL_STEP, 1.0);
        step.set(name::SCORE_MEAN, 0.5);
        Trackers::open(&config("\"jsonl\""), None).unwrap().write(&step).unwrap();
        assert!(!dir.path().join("tensorboard").exists());
        let both = config("\"jsonl\", \"tensorboard\"");
        Trackers::open(&both, None).unwrap().write(&step).unwrap();
        let file = dir.path().join("tensorboard/events.out.tfevents.1.engine");
        let size = || std::fs::metadata(&file).unwrap().len();
        let first = size();
        assert!(first > 0);
        let mut resumed = Trackers::open(&both, Some(1)).unwrap();
        assert_eq!(resumed.last(name::SCORE_MEAN), Some(0.5));
        assert_eq!(size(), first, "step 1 is kept");
        step.set(name::GLOBAL_STEP, 2.0);
        resumed.write(&step).unwrap();
        assert!(size() > first);
        drop(Trackers::open(&both, Some(1)).unwrap());
        assert_eq!(size(), first, "step 2 is gone");
        let lines = std::fs::read_to_string(dir.path().join("metrics.jsonl")).unwrap();
        assert_eq!(lines.lines().count(), 1);
    }
}
