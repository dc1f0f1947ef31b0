//! Where results go: standard output or a file.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::exit::{Failure, Result};
use crate::signals;

/// Takes results, one JSON object a line.
pub(crate) struct Output {
    sink: Sink,
    /// Whole lines that are not written yet.
    pending: Vec<u8>,
}

enum Sink {
    Stdout,
    /// Lines go straight to the file.
    Direct {
        file: File,
        path: PathBuf,
    },
    /// Written beside the file, which it becomes when all is done.
    Replace {
        file: File,
        part: PathBuf,
        path: PathBuf,
    },
}

impl Output {
    /// Standard output.
    pub(crate) fn stdout() -> Self {
        Self { sink: Sink::Stdout, pending: Vec::new() }
    }

    /// Adds to a file, which is made if need be.
    pub(crate) fn append(path: &Path) -> Result<Self> {
        Self::direct(path, OpenOptions::new().create(true).append(true))
    }

    /// Makes a file that appears under its name only when it is whole. What is there and is no file, a
    /// pipe or a device, is written to as it is.
    pub(crate) fn replace(path: &Path) -> Result<Self> {
        if is_special(path) {
            return Self::direct(path, OpenOptions::new().append(true));
        }
        let path = target(path)?;
        let mut part = path.as_os_str().to_owned();
        part.push(".part");
        let part = PathBuf::from(part);
        let file = File::create(&part).map_err(|error| Failure::unwritable(&part, &error))?;
        Ok(Self { sink: Sink::Replace { file, part, path }, pending: Vec::new() })
    }

    /// Fails when [`Output::replace`] could make no file; leaves a pipe's reader alone.
    pub(crate) fn check(path: &Path) -> Result<()> {
        if is_special(path) { Ok(()) } else { Self::replace(path).map(drop) }
    }

    fn direct(path: &Path, options: &OpenOptions) -> Result<Self> {
        // Opening a pipe waits for its reader.
        let _at_once = signals::end_at_once();
        let file = options.open(path).map_err(|error| Failure::unwritable(path, &error))?;
        Ok(Self { sink: Sink::Direct { file, path: path.to_owned() }, pending: Vec::new() })
    }

    /// Adds a line.
    pub(crate) fn line(&mut self, record: &impl Serialize) {
        serde_json::to_writer(&mut self.pending, record).expect("records have string keys");
        self.pending.push(b'\n');
    }

    /// Writes what has been added, whole lines only.
    pub(crate) fn flush(&mut self) -> Result<()> {
        if self.pending.is_empty() {
            return Ok(());
        }
        match &mut self.sink {
            Sink::Stdout => {
                let mut stdout = io::stdout().lock();
                let written = stdout.write_all(&self.pending).and_then(|()| stdout.flush());
                written.map_err(|error| Failure::stdout(&error))?;
            }
            Sink::Direct { file, path } | Sink::Replace { file, path, .. } => {
                file.write_all(&self.pending).map_err(|error| Failure::unwritable(path, &error))?;
            }
        }
        self.pending.clear();
        Ok(())
    }

    /// Writes the rest and gives the file its name.
    pub(crate) fn finish(mut self) -> Result<()> {
        self.flush()?;
        if let Sink::Replace { file, part, path } = &self.sink {
            file.sync_all()
                .and_then(|()| fs::rename(part, path))
                .map_err(|error| Failure::unwritable(path, &error))?;
        }
        Ok(())
    }
}

impl Drop for Output {
    /// Removes a file that is not whole; after [`Output::finish`] there is none of that name.
    fn drop(&mut self) {
        if let Sink::Replace { part, .. } = &self.sink {
            let _absent = fs::remove_file(part);
        }
    }
}

/// Whether something is there that is neither a file nor a folder, or stands for what this process has open,
/// such as `/dev/stdout`.
pub(crate) fn is_special(path: &Path) -> bool {
    let special = |found: fs::Metadata| !found.is_file() && !found.is_dir();
    fs::metadata(path).is_ok_and(special) || links(path).any(|link| is_descriptor(&link))
}

/// Whether a path is that of something a process has open.
fn is_descriptor(path: &Path) -> bool {
    let Some(folder) = path.parent() else { return false };
    folder == Path::new("/dev/fd") || (folder.starts_with("/proc") && folder.ends_with("fd"))
}

/// `path` and what it is a link to, one after the other; as many links as Linux follows.
fn links(path: &Path) -> impl Iterator<Item = PathBuf> {
    let next = |path: &PathBuf| {
        let link = fs::read_link(path).ok()?;
        Some(path.parent().unwrap_or(Path::new("")).join(link))
    };
    std::iter::successors(Some(path.to_owned()), next).take(41)
}

/// What `path` is in the end a link to, which need not exist.
fn target(path: &Path) -> Result<PathBuf> {
    let last = links(path).last().unwrap_or_else(|| path.to_owned());
    if last.is_dir() {
        return Err(Failure::usage(format!("{} is a folder, expected a file", path.display())));
    }
    match fs::read_link(&last) {
        Ok(_) => Err(Failure::usage(format!("{}: links lead in a circle", path.display()))),
        Err(_) => Ok(last),
    }
}

/// Prints text to standard output.
pub(crate) fn print(text: &str) -> Result<()> {
    let mut stdout = io::stdout().lock();
    let written = writeln!(stdout, "{text}").and_then(|()| stdout.flush());
    written.map_err(|error| Failure::stdout(&error))
}
