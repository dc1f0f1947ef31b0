//! Makes way in the folder of a run for one that begins there: what is not its own is moved aside, never removed.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use super::{
    CHECKPOINTS, CheckpointStore, LATEST, METRICS, STEP, entries, step_of, steps, sync_dir,
};
use crate::error::{Error, Result};

/// What a run leaves besides checkpoints and samples.
const RECORDS: [&str; 4] = ["config.toml", METRICS, REPORT, "tensorboard"];
const REPORT: &str = "report.html";
const SAMPLES: &str = "samples";

impl CheckpointStore {
    /// Makes way for a run that goes on from the checkpoint `from`, or begins anew: whoever looks for the
    /// newest checkpoint from here on finds that one, if it is one of this folder, or else none.
    ///
    /// What an older run left, or this one at later steps, is moved into the next free `checkpoints.old-N`:
    /// checkpoints, samples, the report, metrics and configuration, the last two as copies where this run goes
    /// on in them. Returns that folder if there was anything to move.
    ///
    /// # Errors
    /// If the folder cannot be changed; what is left is moved when the next run begins here.
    pub fn restart(&self, from: Option<&Path>) -> Result<Option<PathBuf>> {
        let own = from.map_or(Ok(None), |from| self.own_step(from))?;
        let later = |step: u64| own.is_none_or(|own| step > own);
        let mut checkpoints = steps(&self.run)?;
        checkpoints.retain(|step| later(*step));
        let samples = self.samples(later)?;
        let metrics = fs::metadata(self.run.join(METRICS)).is_ok_and(|file| file.len() > 0);
        if checkpoints.is_empty() && samples.is_empty() && !(own.is_none() && metrics) {
            own.map_or(Ok(()), |step| self.point_latest(step))?;
            return Ok(None);
        }
        let mut names = (1_u64..).map(|n| self.run.join(format!("{CHECKPOINTS}.old-{n}")));
        let aside = names.find(|path| !path.exists()).expect("there is always another number");
        let swap = || {
            match own {
                Some(_) => self.take_later(&checkpoints, &aside)?,
                None => self.take_all(&aside)?,
            }
            for name in RECORDS.iter().filter(|name| self.run.join(name).exists()) {
                let (from, to) = (self.run.join(name), aside.join(name));
                match own.is_some() && *name != REPORT {
                    // The run goes on in them, from where it goes back to.
                    true => copy(&from, &to)?,
                    false => relocate(&from, &to)?,
                }
            }
            if !samples.is_empty() {
                fs::create_dir_all(aside.join(SAMPLES))?;
            }
            for name in samples.iter().map(|name| Path::new(SAMPLES).join(name)) {
                relocate(&self.run.join(&name), &aside.join(&name))?;
            }
            sync_dir(&self.run)
        };
        swap().map_err(|e: io::Error| Error::io(&aside, e))?;
        own.map_or(Ok(()), |step| self.point_latest(step))?;
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

    /// Moves all checkpoints: at once, or one by one where their folder is a link, which stays.
    fn take_all(&self, aside: &Path) -> io::Result<()> {
        let (dir, latest) = (self.run.join(CHECKPOINTS), self.run.join(LATEST));
        if dir.is_symlink() {
            fs::create_dir(aside)?;
            for entry in fs::read_dir(&dir)? {
                let entry = entry?;
                relocate(&entry.path(), &aside.join(entry.file_name()))?;
            }
        } else {
            fs::rename(&dir, aside)?;
            fs::create_dir(&dir)?;
        }
        if latest.exists() { fs::remove_file(&latest) } else { Ok(()) }
    }

    /// Moves the checkpoints of these steps.
    fn take_later(&self, steps: &[u64], aside: &Path) -> io::Result<()> {
        fs::create_dir(aside)?;
        steps.iter().try_for_each(|step| {
            relocate(&self.step_dir(*step), &aside.join(format!("{STEP}{step}")))
        })
    }

    /// Fails where the model that a run begins from lies among what [`restart`](Self::restart) moves for it.
    ///
    /// # Errors
    /// `ErrorKind::Config`, naming both.
    pub(crate) fn check_start(&self, model: &str) -> Result<()> {
        let checkpoints = self.run.join(CHECKPOINTS).canonicalize();
        let within =
            |dir: PathBuf| Path::new(model).canonicalize().is_ok_and(|m| m.starts_with(dir));
        if !checkpoints.is_ok_and(within) {
            return Ok(());
        }
        Err(Error::config(format!(
            "model.path {model} lies among the checkpoints of {}, which make way for a run that begins there: \
             choose another --output",
            self.run.display()
        )))
    }
}

/// Moves a file or a folder, to another file system too.
fn relocate(from: &Path, to: &Path) -> io::Result<()> {
    match fs::rename(from, to) {
        Err(error) if error.kind() == io::ErrorKind::CrossesDevices => copy_over(from, to),
        done => done,
    }
}

/// Moves a file or a folder by copying it: what it was is removed once the copy is durable.
fn copy_over(from: &Path, to: &Path) -> io::Result<()> {
    copy(from, to)?;
    to.parent().map_or(Ok(()), sync_dir)?;
    if from.is_dir() { fs::remove_dir_all(from) } else { fs::remove_file(from) }
}

/// Copies a file, or a folder with all that is in it, and syncs what it writes.
fn copy(from: &Path, to: &Path) -> io::Result<()> {
    if !from.is_dir() {
        fs::copy(from, to)?;
        return File::open(to)?.sync_all();
    }
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        copy(&entry.path(), &to.join(entry.file_name()))?;
    }
    sync_dir(to)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestDir;

    #[test]
    fn what_is_moved_by_copying_is_in_one_place_only() {
        let dir = TestDir::new("copy-over");
        fs::create_dir_all(dir.path().join("step_1/trainer")).unwrap();
        dir.write("step_1/model", "m");
        dir.write("step_1/trainer/state.json", "s");
        let to = dir.path().join("aside");
        copy_over(&dir.path().join("step_1"), &to).unwrap();
        for (name, text) in [("model", "m"), ("trainer/state.json", "s")] {
            assert_eq!(fs::read_to_string(to.join(name)).unwrap(), text);
        }
        copy_over(&to.join("model"), &dir.path().join("model")).unwrap();
        assert!(!to.join("model").exists() && !dir.path().join("step_1").exists());
        // A copy that fails costs nothing.
        let absent = dir.path().join("absent/model");
        assert!(copy_over(&dir.path().join("model"), &absent).is_err());
        assert!(dir.path().join("model").is_file());
    }
}
