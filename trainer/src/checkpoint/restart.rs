//! Makes way in the folder of a run for one that begins there: what is not its own is moved aside, never removed.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::{CHECKPOINTS, CheckpointStore, LATEST, STEP, entries, step_of, steps, sync_dir};
use crate::error::{Error, Result};

/// What a run leaves besides checkpoints and samples.
const RECORDS: [&str; 4] = ["config.toml", METRICS, REPORT, "tensorboard"];
const METRICS: &str = "metrics.jsonl";
const REPORT: &str = "report.html";
const SAMPLES: &str = "samples";

impl CheckpointStore {
    /// Makes way for a run that goes on from the checkpoint `from`, or begins anew: whoever looks for the
    /// newest checkpoint from here on finds that one, if it is one of this folder, or else none.
    ///
    /// What an older run left, or this one at later steps, is moved into the next free `checkpoints.old-N`:
    /// checkpoints, samples and the report, and of an older run also metrics and configuration. Returns that
    /// folder if there was anything to move.
    ///
    /// # Errors
    /// If the folder cannot be changed; what is left is moved when the next run begins here.
    pub fn restart(&self, from: Option<&Path>) -> Result<Option<PathBuf>> {
        let own = from.map_or(Ok(None), |from| self.own_step(from))?;
        if let Some(step) = own {
            self.point_latest(step)?;
        }
        let later = |step: u64| own.is_none_or(|own| step > own);
        let mut checkpoints = steps(&self.run)?;
        checkpoints.retain(|step| later(*step));
        let samples = self.samples(later)?;
        let metrics = fs::metadata(self.run.join(METRICS)).is_ok_and(|file| file.len() > 0);
        if checkpoints.is_empty() && samples.is_empty() && !(own.is_none() && metrics) {
            return Ok(None);
        }
        let mut names = (1_u64..).map(|n| self.run.join(format!("{CHECKPOINTS}.old-{n}")));
        let aside = names.find(|path| !path.exists()).expect("there is always another number");
        let swap = || {
            match own {
                Some(_) => self.take_later(&checkpoints, &aside)?,
                None => self.take_all(&aside)?,
            }
            let records = if own.is_none() { &RECORDS[..] } else { &[REPORT] };
            for name in records.iter().filter(|name| self.run.join(name).exists()) {
                fs::rename(self.run.join(name), aside.join(name))?;
            }
            if !samples.is_empty() {
                fs::create_dir_all(aside.join(SAMPLES))?;
            }
            for name in samples.iter().map(|name| Path::new(SAMPLES).join(name)) {
                fs::rename(self.run.join(&name), aside.join(&name))?;
            }
            sync_dir(&self.run)
        };
        swap().map_err(|e: io::Error| Error::io(&aside, e))?;
        Ok(Some(aside))
    }

    /// The step of a checkpoint, if it is one of this folder.
    fn own_step(&self, checkpoint: &Path) -> Result<Option<u64>> {
        let checkpoint = checkpoint.canonicalize().map_err(|e| Error::io(checkpoint, e))?;
        let dir = self.run.join(CHECKPOINTS).canonicalize();
        let ours = dir.is_ok_and(|dir| checkpoint.parent() == Some(&dir));
        let step = checkpoint.file_name().and_then(|name| step_of(&name.to_string_lossy()));
        Ok(step.filter(|_| ours))
    }

    /// The names of the files of samples of the steps that `wanted` says.
    fn samples(&self, wanted: impl Fn(u64) -> bool) -> Result<Vec<String>> {
        let dir = self.run.join(SAMPLES);
        if !dir.is_dir() {
            return Ok(Vec::new());
        }
        let mut names: Vec<String> = entries(&dir)?.into_iter().map(|(name, _)| name).collect();
        names.retain(|name| name.strip_suffix(".jsonl").and_then(step_of).is_some_and(&wanted));
        Ok(names)
    }

    /// Moves all checkpoints, at once.
    fn take_all(&self, aside: &Path) -> io::Result<()> {
        let (dir, latest) = (self.run.join(CHECKPOINTS), self.run.join(LATEST));
        fs::rename(&dir, aside)?;
        fs::create_dir(&dir)?;
        if latest.exists() { fs::remove_file(&latest) } else { Ok(()) }
    }

    /// Moves the checkpoints of these steps.
    fn take_later(&self, steps: &[u64], aside: &Path) -> io::Result<()> {
        fs::create_dir(aside)?;
        steps.iter().try_for_each(|step| {
            fs::rename(self.step_dir(*step), aside.join(format!("{STEP}{step}")))
        })
    }
}
