//! Checkpoints that are either whole or not there.
//!
//! ```text
//! RUN/latest                     one line, `checkpoints/step_20`, for whoever looks for the newest
//! RUN/checkpoints/step_20/       model files, trainer/..., MANIFEST.sha256
//! RUN/checkpoints/.tmp-step_30-  being written; removed at the next start
//! RUN/checkpoints.old-1/         those of an older run, with its samples, metrics and report, or of later
//!                                steps than the one gone on from, when another run began in its folder
//! ```
//!
//! Order of a save: files into the temporary folder; the manifest (as `sha256sum` writes it) last;
//! fsync of every file and folder, and of the run's metrics up to here; rename; fsync of the parent;
//! `latest` written aside, fsynced, renamed; only then older checkpoints are removed. A crash or a full
//! disk at any point leaves the previous checkpoint as it was. Reading verifies the manifest and walks
//! back to the newest checkpoint that is whole, which after a crash may be a later one than `latest`
//! names. Leaves out what the files hold, but for [`TrainState`].

mod manifest;
mod restart;

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;

use crate::data::Cursor;
use crate::error::{Error, ErrorKind, Result};

pub use manifest::{MANIFEST, verify};

/// Where [`TrainState`] is, within a checkpoint.
pub const STATE: &str = "trainer/state.json";
/// Where the resolved configuration of the run is, within a checkpoint.
pub const CONFIG: &str = "trainer/config.toml";
const CHECKPOINTS: &str = "checkpoints";
/// The lines of a run's steps.
const METRICS: &str = "metrics.jsonl";
const LATEST: &str = "latest";
const TEMPORARY: &str = ".tmp-";
/// A checkpoint whose step is being saved once more.
const REPLACED: &str = ".tmp-old-";
const STEP: &str = "step_";

/// What resuming needs besides weights and optimizer moments.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainState {
    /// Version of this layout: 1.
    pub format: u32,
    /// Training steps completed.
    pub step: u64,
    /// Optimizer updates made: the step of Adam's bias correction.
    pub optimizer_step: u64,
    /// `trainer.seed`.
    pub seed: u64,
    /// `data.seed`.
    pub data_seed: u64,
    /// Where the data set stands.
    pub cursor: Cursor,
    /// [`crate::data::digest`] of the training rows.
    pub data_hash: String,
    /// Hash of the resolved configuration.
    pub config_hash: String,
    /// Version of the weights.
    pub weights_version: u64,
    /// Coefficient of the divergence in the reward, to the bit; checkpoints of older programs have none.
    #[serde(default, deserialize_with = "exact")]
    pub kl_coef: Option<f64>,
    /// Name of the format that the run computes in; checkpoints of older programs have none.
    #[serde(default)]
    pub dtype: Option<String>,
    /// Version of the program that wrote it.
    pub program_version: String,
}

impl TrainState {
    /// Reads the state of a checkpoint.
    ///
    /// # Errors
    /// If it is missing, not as written by [`CheckpointWriter::state`], or of another version.
    pub fn read(checkpoint: &Path) -> Result<Self> {
        let path = checkpoint.join(STATE);
        let text = fs::read(&path).map_err(|e| Error::io(&path, e))?;
        let state: Self = serde_json::from_slice(&text)
            .map_err(|e| Error::checkpoint(format!("{}: {e}", path.display())))?;
        if state.format != 1 {
            let message = format!("{}: format is {}, limit is 1", path.display(), state.format);
            return Err(Error::checkpoint(message));
        }
        Ok(state)
    }
}

/// Reads a number as the standard library does, to the nearest float; `serde_json` may be one off in the last place.
fn exact<'de, D: Deserializer<'de>>(json: D) -> std::result::Result<Option<f64>, D::Error> {
    let text = Option::<Box<RawValue>>::deserialize(json)?;
    let number = |text: Box<RawValue>| text.get().parse().map_err(serde::de::Error::custom);
    text.map(number).transpose()
}

/// The checkpoints of a run.
#[derive(Debug)]
pub struct CheckpointStore {
    run: PathBuf,
    keep: usize,
}

/// A checkpoint that is whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// Its folder.
    pub path: PathBuf,
    /// Its training step.
    pub step: u64,
}

/// The newest whole checkpoint, and why newer ones were passed over.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// The checkpoint; `None` if no checkpoint is whole.
    pub checkpoint: Option<Checkpoint>,
    /// One line for each that is not whole.
    pub skipped: Vec<String>,
}

impl CheckpointStore {
    /// The checkpoints of the run in folder `run`, of which the newest `keep` are kept (0: all).
    /// Creates the folder and removes what an interrupted save left behind.
    ///
    /// # Errors
    /// If the folder cannot be created or cleaned.
    pub fn open(run: &Path, keep: usize) -> Result<Self> {
        let dir = run.join(CHECKPOINTS);
        fs::create_dir_all(&dir).map_err(|e| Error::io(&dir, e))?;
        for (name, path) in entries(&dir)? {
            let replaced = name.strip_prefix(REPLACED).map(|step| dir.join(step));
            let cleaned = match replaced {
                // The save was interrupted between taking the old one away and putting the new one.
                Some(step) if !step.exists() => fs::rename(&path, step),
                _ if name.starts_with(TEMPORARY) => fs::remove_dir_all(&path),
                _ => Ok(()),
            };
            cleaned.map_err(|e| Error::io(&path, e))?;
        }
        Ok(Self { run: run.to_owned(), keep })
    }

    /// Begins the checkpoint of a step; nothing is visible before [`CheckpointWriter::publish`].
    ///
    /// # Errors
    /// If its folder cannot be created.
    pub fn begin(&self, step: u64) -> Result<CheckpointWriter<'_>> {
        let name = format!("{TEMPORARY}{STEP}{step}-{}", std::process::id());
        let path = self.run.join(CHECKPOINTS).join(name);
        let create = || {
            if path.exists() {
                fs::remove_dir_all(&path)?;
            }
            fs::create_dir(&path)
        };
        create().map_err(|e| Error::io(&path, e))?;
        Ok(CheckpointWriter { store: self, step, path })
    }

    /// The newest whole checkpoint, whatever `latest` names.
    ///
    /// # Errors
    /// If the folder cannot be read.
    pub fn find_latest(&self) -> Result<Found> {
        find_latest(&self.run)
    }

    fn step_dir(&self, step: u64) -> PathBuf {
        self.run.join(CHECKPOINTS).join(format!("{STEP}{step}"))
    }

    /// Makes `latest` name `step`, atomically.
    fn point_latest(&self, step: u64) -> Result<()> {
        let temporary = self.run.join("latest.tmp");
        let write = || {
            let mut file = File::create(&temporary)?;
            writeln!(file, "{CHECKPOINTS}/{STEP}{step}")?;
            file.sync_all()?;
            fs::rename(&temporary, self.run.join(LATEST))?;
            sync_dir(&self.run)
        };
        write().map_err(|e| Error::io(self.run.join(LATEST), e))
    }

    /// Removes all but the newest `keep`, and never `current`.
    fn prune(&self, current: u64) -> Result<()> {
        if self.keep == 0 {
            return Ok(());
        }
        let others = steps(&self.run)?.into_iter().filter(|step| *step != current);
        for step in others.skip(self.keep - 1) {
            let path = self.step_dir(step);
            fs::remove_dir_all(&path).map_err(|e| Error::io(&path, e))?;
        }
        Ok(())
    }
}

/// The newest whole checkpoint of the run in folder `run`, whatever `latest` names; none if there is no such
/// folder. Later ones than a run has gone back to are none of it: [`CheckpointStore::restart`] moves them aside.
///
/// # Errors
/// If the folder cannot be read.
pub fn find_latest(run: &Path) -> Result<Found> {
    let mut found = Found::default();
    if !run.join(CHECKPOINTS).is_dir() {
        return Ok(found);
    }
    for step in steps(run)? {
        let path = run.join(CHECKPOINTS).join(format!("{STEP}{step}"));
        match verify(&path) {
            Ok(()) => {
                found.checkpoint = Some(Checkpoint { path, step });
                break;
            }
            Err(e) => found.skipped.push(e.to_string()),
        }
    }
    Ok(found)
}

/// A checkpoint being written. Dropped before [`Self::publish`], it leaves nothing behind.
#[derive(Debug)]
#[must_use = "a checkpoint that is not published is removed"]
pub struct CheckpointWriter<'a> {
    store: &'a CheckpointStore,
    step: u64,
    path: PathBuf,
}

impl CheckpointWriter<'_> {
    /// The folder to write into; files put there by other means are part of the checkpoint too.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes one file, named relative to the checkpoint, through `write`.
    ///
    /// # Errors
    /// If it cannot be written; the error names the file.
    pub fn file(
        &self,
        name: &str,
        write: impl FnOnce(&mut dyn Write) -> io::Result<()>,
    ) -> Result<()> {
        let path = self.path.join(name);
        let run = || {
            if let Some(parent) = path.parent() {
                fs::create_dir_all(parent)?;
            }
            let mut file = BufWriter::with_capacity(1 << 20, File::create(&path)?);
            write(&mut file)?;
            file.flush()
        };
        run().map_err(|e| self.named(Error::io(&path, e)))
    }

    /// Writes [`STATE`] and [`CONFIG`], which gets the text `config`.
    ///
    /// # Errors
    /// If they cannot be written.
    pub fn state(&self, state: &TrainState, config: &str) -> Result<()> {
        self.file(CONFIG, |out| out.write_all(config.as_bytes()))?;
        self.file(STATE, |out| {
            serde_json::to_writer_pretty(&mut *out, state)?;
            out.write_all(b"\n")
        })
    }

    /// The same error; a file of this checkpoint is named by the place it was to have.
    #[must_use]
    pub fn named(&self, error: Error) -> Error {
        let place = |path: PathBuf| match path.strip_prefix(&self.path) {
            Ok(name) => self.store.step_dir(self.step).join(name),
            Err(_) => path,
        };
        match error.into_kind() {
            ErrorKind::Io { path, source } => Error::io(place(path), source),
            ErrorKind::Engine(inner) => Error::engine(match inner.into_kind() {
                engine::ErrorKind::Io { path, source } => engine::Error::io(place(path), source),
                kind => engine::Error::new(kind),
            }),
            kind => Error::new(kind),
        }
    }

    /// Makes the checkpoint visible, durable and the latest, then removes the oldest.
    ///
    /// # Errors
    /// If a file cannot be written or synced. Then the checkpoints are as they were before, or this one is there,
    /// whole, and only `latest` or older ones could not be brought up to date.
    pub fn publish(self) -> Result<Checkpoint> {
        let written = manifest::write(&self.path).and_then(|()| sync_tree(&self.path));
        written.map_err(|e| self.named(e))?;
        // Whoever goes on from it finds the lines of all its steps.
        let metrics = self.store.run.join(METRICS);
        if metrics.exists() {
            sync_file(&metrics)?;
        }
        let path = self.store.step_dir(self.step);
        let old = self.path.with_file_name(format!("{REPLACED}{STEP}{}", self.step));
        let swap = || {
            if path.exists() {
                fs::rename(&path, &old)?;
            }
            fs::rename(&self.path, &path).inspect_err(|_| {
                // Best effort: if this fails too, the next start puts it back.
                let _ = fs::rename(&old, &path);
            })?;
            sync_dir(&self.store.run.join(CHECKPOINTS))?;
            if old.exists() { fs::remove_dir_all(&old) } else { Ok(()) }
        };
        swap().map_err(|e| Error::io(&path, e))?;
        self.store.point_latest(self.step)?;
        self.store.prune(self.step)?;
        Ok(Checkpoint { path, step: self.step })
    }
}

impl Drop for CheckpointWriter<'_> {
    fn drop(&mut self) {
        // After publishing there is nothing at this path; what cannot be removed goes at next start.
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// Steps of the checkpoints of a run, newest first.
fn steps(run: &Path) -> Result<Vec<u64>> {
    let names = entries(&run.join(CHECKPOINTS))?;
    let mut steps: Vec<u64> = names.iter().filter_map(|(name, _)| step_of(name)).collect();
    steps.sort_unstable_by(|a, b| b.cmp(a));
    Ok(steps)
}

fn step_of(name: &str) -> Option<u64> {
    name.strip_prefix(STEP)?.parse().ok()
}

/// Names (those that are UTF-8) and paths in a folder.
fn entries(dir: &Path) -> Result<Vec<(String, PathBuf)>> {
    let read = || {
        let mut out = Vec::new();
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            out.push((entry.file_name().to_string_lossy().into_owned(), entry.path()));
        }
        out.sort();
        Ok(out)
    };
    read().map_err(|e| Error::io(dir, e))
}

/// Syncs every file and folder below and including `dir`.
fn sync_tree(dir: &Path) -> Result<()> {
    for (_, path) in entries(dir)? {
        if path.is_dir() { sync_tree(&path)? } else { sync_file(&path)? }
    }
    sync_dir(dir).map_err(|e| Error::io(dir, e))
}

fn sync_file(path: &Path) -> Result<()> {
    let synced = File::open(path).and_then(|file| file.sync_all());
    synced.map_err(|e| Error::io(path, e))
}

/// Makes names in a folder durable.
pub(crate) fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests;
