//! The one error type of the crate.
//!
//! Opaque: callers match on [`Error::kind`]. The command maps kinds to exit codes, the server to HTTP
//! status codes; neither mapping lives here.

use std::fmt;
use std::path::{Path, PathBuf};

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
    /// A model is missing, truncated, of the wrong shape or of an unknown architecture.
    Model(String),
    /// A model is well formed but asks for something that is not implemented.
    Unsupported(String),
    /// A setting of the engine is invalid.
    Config(String),
    /// A request is invalid; no retry can help.
    Request(String),
    /// The engine cannot take this now; a later retry can succeed.
    Busy(String),
    /// A computation produced a value that is not finite.
    Numeric(String),
    /// A machine that holds models did not answer as it should; a later try can succeed.
    Network(String),
    /// The engine itself is at fault.
    Internal(String),
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

    /// A missing or invalid model.
    pub fn model(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Model(message.into()))
    }

    /// A model that needs what is not implemented.
    pub fn unsupported(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Unsupported(message.into()))
    }

    /// An invalid setting.
    pub fn config(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Config(message.into()))
    }

    /// An invalid request.
    pub fn request(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Request(message.into()))
    }

    /// A request that came at the wrong time.
    pub fn busy(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Busy(message.into()))
    }

    /// A value that is not finite.
    pub fn numeric(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Numeric(message.into()))
    }

    /// A download that failed on its way.
    pub fn network(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Network(message.into()))
    }

    /// A fault of the engine itself.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Internal(message.into()))
    }

    /// A failed operation on `path`.
    pub fn io(path: impl Into<PathBuf>, source: std::io::Error) -> Self {
        Self::new(ErrorKind::Io { path: path.into(), source })
    }

    /// Puts the file an error was found in before its message; an [`ErrorKind::Io`] names its own.
    #[must_use]
    pub fn in_file(self, path: &Path) -> Self {
        let name = |message: String| format!("{}: {message}", path.display());
        Self::new(match self.kind {
            ErrorKind::Model(m) => ErrorKind::Model(name(m)),
            ErrorKind::Unsupported(m) => ErrorKind::Unsupported(name(m)),
            ErrorKind::Config(m) => ErrorKind::Config(name(m)),
            ErrorKind::Request(m) => ErrorKind::Request(name(m)),
            ErrorKind::Busy(m) => ErrorKind::Busy(name(m)),
            ErrorKind::Numeric(m) => ErrorKind::Numeric(name(m)),
            ErrorKind::Network(m) => ErrorKind::Network(name(m)),
            ErrorKind::Internal(m) => ErrorKind::Internal(name(m)),
            io @ ErrorKind::Io { .. } => io,
        })
    }
}

impl fmt::Display for Error {
    /// One line whatever names a hostile file brought along: control characters are escaped.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match &self.kind {
            ErrorKind::Model(m)
            | ErrorKind::Unsupported(m)
            | ErrorKind::Config(m)
            | ErrorKind::Request(m)
            | ErrorKind::Busy(m)
            | ErrorKind::Numeric(m)
            | ErrorKind::Network(m)
            | ErrorKind::Internal(m) => m.clone(),
            ErrorKind::Io { path, source } => format!("{}: {source}", path.display()),
        };
        write_on_one_line(f, &text)
    }
}

/// Writes a message with its control characters escaped, so that what a file or a request says can neither
/// break a line nor steer a terminal.
pub fn write_on_one_line(f: &mut fmt::Formatter<'_>, message: &str) -> fmt::Result {
    for c in message.chars() {
        if c.is_control() {
            write!(f, "{}", c.escape_default())?;
        } else {
            write!(f, "{c}")?;
        }
    }
    Ok(())
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match &self.kind {
            ErrorKind::Io { source, .. } => Some(source),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn display_is_one_line_and_names_the_file() {
        let e = Error::model("tensor \"a\nb\" is missing").in_file(Path::new("m/x.gguf"));
        assert_eq!(e.to_string(), "m/x.gguf: tensor \"a\\nb\" is missing");
        assert!(matches!(e.kind(), ErrorKind::Model(_)));
    }

    #[test]
    fn io_keeps_its_source() {
        let e = Error::io("x", std::io::Error::from(std::io::ErrorKind::NotFound));
        let e = e.in_file(Path::new("other"));
        assert!(e.to_string().starts_with("x: "), "{e}");
        assert!(std::error::Error::source(&e).is_some());
    }
}
