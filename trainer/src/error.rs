//! The one error type of the crate.
//!
//! Opaque: callers match on [`Error::kind`]. The command maps kinds to exit codes (2 configuration,
//! 3 data, 4 numerical, 5 reward, 1 the rest); that mapping does not live here.

use std::fmt;
use std::path::PathBuf;

use engine::error::write_on_one_line;

/// Shorthand for results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, as one line of text and a kind to act on.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
}

/// The kinds of [`Error`].
#[derive(Debug)]
#[non_exhaustive]
pub enum ErrorKind {
    /// A setting is unknown or outside its limits.
    Config(String),
    /// A data file holds something that cannot be used.
    Data {
        /// The file.
        path: PathBuf,
        /// The line, from 1; `None` when the file as a whole is meant.
        line: Option<usize>,
        /// What is wrong with it.
        message: String,
    },
    /// A reward is missing, not finite, or its function failed.
    Reward(String),
    /// A computation produced a value that is not finite.
    Numeric(String),
    /// A checkpoint is incomplete or does not belong to this run.
    Checkpoint(String),
    /// The engine could not load, run or save the model.
    Engine(engine::Error),
    /// The operating system refused an operation on a file.
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the system answered.
        source: std::io::Error,
    },
}

impl Error {
    /// An error of any kind.
    pub fn new(kind: ErrorKind) -> Self {
        Self { kind }
    }

    /// The kind, to match on.
    pub fn kind(&self) -> &ErrorKind {
        &self.kind
    }

    /// The kind, to take apart.
    pub fn into_kind(self) -> ErrorKind {
        self.kind
    }

    /// An invalid setting.
    pub fn config(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Config(message.into()))
    }

    /// An invalid line (from 1) of a data file, or the file as a whole.
    pub fn data(
        path: impl Into<PathBuf>,
        line: impl Into<Option<usize>>,
        message: impl Into<String>,
    ) -> Self {
        Self::new(ErrorKind::Data { path: path.into(), line: line.into(), message: message.into() })
    }

    /// A failed reward.
    pub fn reward(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Reward(message.into()))
    }

    /// A value that is not finite.
    pub fn numeric(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Numeric(message.into()))
    }

    /// An unusable checkpoint.
    pub fn checkpoint(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Checkpoint(message.into()))
    }

    /// A failure of the engine.
    pub fn engine(error: engine::Error) -> Self {
        Self::new(ErrorKind::Engine(error))
    }

    /// A failed operation on `path`.
    pub fn io(path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Self::new(ErrorKind::Io { path: path.into(), source })
    }
}

impl fmt::Display for Error {
    /// One line whatever a hostile file brought along: control characters are escaped.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match &self.kind {
            ErrorKind::Config(m)
            | ErrorKind::Reward(m)
            | ErrorKind::Numeric(m)
            | ErrorKind::Checkpoint(m) => m.clone(),
            ErrorKind::Data { path, line: Some(line), message } => {
                format!("{}:{line}: {message}", path.display())
            }
            ErrorKind::Data { path, line: None, message } => {
                format!("{}: {message}", path.display())
            }
            ErrorKind::Engine(error) => error.to_string(),
            ErrorKind::Io { path, source } => format!("{}: {source}", path.display()),
        };
        write_on_one_line(f, &text)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match &self.kind {
            ErrorKind::Engine(error) => error.source(),
            ErrorKind::Io { source, .. } => Some(source),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_data_error_names_file_and_line_on_one_line() {
        let e = Error::data("add.jsonl", 17, "no column \"a\nb\"");
        assert_eq!(e.to_string(), "add.jsonl:17: no column \"a\\nb\"");
        assert_eq!(Error::data("x", None, "empty").to_string(), "x: empty");
        assert!(matches!(e.kind(), ErrorKind::Data { line: Some(17), .. }));
    }
}
