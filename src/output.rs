//! Where results go: standard output or a file.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::exit::{Failure, Result};

/// Takes results, one JSON object a line.
pub(crate) struct Output {
    sink: Sink,
    /// Whole lines that are not written yet.
    pending: Vec<u8>,
}

enum Sink {
    Stdout,
    /// Lines are added to the file.
    Append {
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
        let file = OpenOptions::new().create(true).append(true).open(path);
        let file = file.map_err(|error| Failure::unwritable(path, &error))?;
        Ok(Self { sink: Sink::Append { file, path: path.to_owned() }, pending: Vec::new() })
    }

    /// Makes a file that appears under its name only when it is whole.
    pub(crate) fn replace(path: &Path) -> Result<Self> {
        let mut part = path.as_os_str().to_owned();
        part.push(".part");
        let part = PathBuf::from(part);
        let file = File::create(&part).map_err(|error| Failure::unwritable(&part, &error))?;
        Ok(Self { sink: Sink::Replace { file, part, path: path.to_owned() }, pending: Vec::new() })
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
            Sink::Append { file, path } | Sink::Replace { file, path, .. } => {
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

/// Prints text to standard output.
pub(crate) fn print(text: &str) -> Result<()> {
    let mut stdout = io::stdout().lock();
    let written = writeln!(stdout, "{text}").and_then(|()| stdout.flush());
    written.map_err(|error| Failure::stdout(&error))
}
