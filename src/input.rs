//! JSONL files as lines with numbers.

use std::fs;
use std::io::Read;
use std::path::Path;

use server::{BadField, Fields};

use crate::exit::{Failure, Result};

/// One line of a file that is not blank.
#[derive(Debug)]
pub(crate) struct Line {
    /// Counted from 0, blank lines included.
    pub(crate) index: usize,
    /// The object it holds.
    pub(crate) fields: Fields,
}

/// A file of JSON objects; `-` is standard input.
#[derive(Debug)]
pub(crate) struct Input {
    name: String,
    text: String,
}

impl Input {
    /// Reads the file.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        if path == Path::new("-") {
            let mut text = String::new();
            std::io::stdin()
                .read_to_string(&mut text)
                .map_err(|error| Failure::data(format!("standard input: {error}")))?;
            return Ok(Self { name: "standard input".to_owned(), text });
        }
        let text = fs::read_to_string(path).map_err(|error| Failure::unreadable(path, &error))?;
        Ok(Self { name: path.display().to_string(), text })
    }

    /// Its lines, parsed.
    pub(crate) fn lines(&self) -> impl Iterator<Item = Result<Line>> {
        let text = self.text.strip_prefix('\u{feff}').unwrap_or(&self.text);
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        lines.map(|(index, line)| {
            let fields = Fields::parse(line.as_bytes()).map_err(|bad| self.bad(index, &bad))?;
            Ok(Line { index, fields })
        })
    }

    /// The failure for a fault in line `index`.
    pub(crate) fn bad(&self, index: usize, bad: &BadField) -> Failure {
        // The position inside the line is known, that of the line in the file is not.
        let message =
            bad.message.replace("body is", "is").replace(" at line 1 column", " at column");
        Failure::data(format!("{}: line {} {message}", self.name, index + 1))
    }

    /// The failure for an error of the engine's about line `index`.
    pub(crate) fn refused(&self, index: usize, error: engine::Error) -> Failure {
        Failure::from(error).blame_data().at(format!("{}: line {}", self.name, index + 1))
    }
}
