//! What can go wrong with the server itself; mistakes in requests are answered, not returned.

use std::fmt;

/// The result of this crate's operations.
pub type Result<T> = std::result::Result<T, Error>;

/// A failure of the server.
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    message: String,
}

/// What kind of failure it is.
#[non_exhaustive]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ErrorKind {
    /// The configuration asks for something that cannot be.
    Config,
    /// The engine failed, and can serve nobody any more.
    Engine,
}

impl Error {
    pub(crate) fn config(message: impl Into<String>) -> Self {
        Self { kind: ErrorKind::Config, message: message.into() }
    }

    pub(crate) fn engine(message: impl Into<String>) -> Self {
        Self { kind: ErrorKind::Engine, message: message.into() }
    }

    /// What kind of failure it is.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Error {}
