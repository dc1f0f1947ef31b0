//! What ends the command before its work is done, and with which exit code.
//!
//! The one place where kinds of errors become codes: 0 done, 1 failure while running, 2 usage or
//! configuration, 3 model or data invalid, 4 numerical failure, 5 reward failure, 75 interrupted with
//! a resumable checkpoint, 130 interrupted.

use std::fmt;
use std::io;
use std::path::Path;
use std::process::ExitCode;

use engine::ErrorKind;

/// The result of everything in this program.
pub(crate) type Result<T, E = Failure> = std::result::Result<T, E>;

/// Why the command ends early.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Cause {
    Running,
    Usage,
    Data,
    Numeric,
    Reward,
    Resumable,
    Interrupted,
    /// The reader of standard output has left: nobody is to be told.
    ClosedPipe,
}

/// An error on its way to the terminal: one line and an exit code.
#[derive(Debug)]
pub(crate) struct Failure {
    cause: Cause,
    /// What happened, and around it the places where it did.
    error: anyhow::Error,
}

impl Failure {
    fn new(cause: Cause, message: impl Into<String>) -> Self {
        Self { cause, error: anyhow::Error::msg(message.into()) }
    }

    /// Something failed while running.
    pub(crate) fn running(message: impl Into<String>) -> Self {
        Self::new(Cause::Running, message)
    }

    /// The command line, the environment or a configuration file is wrong.
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self::new(Cause::Usage, message)
    }

    /// A model or data file is wrong.
    pub(crate) fn data(message: impl Into<String>) -> Self {
        Self::new(Cause::Data, message)
    }

    /// A computation gave something that is not a finite number.
    pub(crate) fn numeric(message: impl Into<String>) -> Self {
        Self::new(Cause::Numeric, message)
    }

    /// No reward could be had.
    pub(crate) fn reward(message: impl Into<String>) -> Self {
        Self::new(Cause::Reward, message)
    }

    /// A signal ended it, and a run goes on from this checkpoint.
    pub(crate) fn resumable(checkpoint: &Path) -> Self {
        let place = checkpoint.display();
        let message = format!("interrupted, {place} goes on from here with --resume auto");
        Self::new(Cause::Resumable, message)
    }

    /// A signal ended it.
    pub(crate) fn interrupted(message: impl Into<String>) -> Self {
        Self::new(Cause::Interrupted, message)
    }

    /// Standard output could not be written.
    pub(crate) fn stdout(error: &io::Error) -> Self {
        if error.kind() == io::ErrorKind::BrokenPipe {
            Self::new(Cause::ClosedPipe, "standard output was closed")
        } else {
            Self::running(format!("standard output: {error}"))
        }
    }

    /// A file of the caller's could not be read.
    pub(crate) fn unreadable(path: &Path, error: &io::Error) -> Self {
        Self::data(format!("{}: {error}", path.display()))
    }

    /// A file could not be written.
    pub(crate) fn unwritable(path: &Path, error: &io::Error) -> Self {
        Self::running(format!("{}: {error}", path.display()))
    }

    /// The same failure, blamed on the model or the data; what the engine calls a request came from
    /// a file here.
    pub(crate) fn blame_data(self) -> Self {
        match self.cause {
            Cause::Running | Cause::Usage => Self { cause: Cause::Data, ..self },
            _ => self,
        }
    }

    /// The same failure with `place` before its message.
    pub(crate) fn at(self, place: impl fmt::Display) -> Self {
        Self { error: self.error.context(place.to_string()), ..self }
    }

    /// Whether it only means that nobody reads the output any more.
    pub(crate) fn is_closed_pipe(&self) -> bool {
        self.cause == Cause::ClosedPipe
    }

    /// The code to exit with.
    pub(crate) fn exit_code(&self) -> ExitCode {
        ExitCode::from(match self.cause {
            Cause::ClosedPipe => 0,
            Cause::Running => 1,
            Cause::Usage => 2,
            Cause::Data => 3,
            Cause::Numeric => 4,
            Cause::Reward => 5,
            Cause::Resumable => 75,
            Cause::Interrupted => 130,
        })
    }
}

impl fmt::Display for Failure {
    /// One line, whatever a message brought along.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let message = format!("{:#}", self.error);
        let mut words = message.lines().map(str::trim).filter(|line| !line.is_empty());
        f.write_str(words.next().unwrap_or("failed"))?;
        words.try_for_each(|line| write!(f, "; {line}"))
    }
}

impl From<engine::Error> for Failure {
    fn from(error: engine::Error) -> Self {
        Self::new(engine_cause(&error), error.to_string())
    }
}

impl From<server::Error> for Failure {
    fn from(error: server::Error) -> Self {
        let cause = match error.kind() {
            server::ErrorKind::Config => Cause::Usage,
            _ => Cause::Running,
        };
        Self::new(cause, error.to_string())
    }
}

impl From<trainer::Error> for Failure {
    fn from(error: trainer::Error) -> Self {
        use trainer::ErrorKind as Kind;
        let cause = match error.kind() {
            Kind::Config(_) => Cause::Usage,
            Kind::Data { .. } | Kind::Checkpoint(_) => Cause::Data,
            Kind::Reward(_) => Cause::Reward,
            Kind::Numeric(_) => Cause::Numeric,
            Kind::Engine(inner) => engine_cause(inner),
            // What is not there was to be read: a run makes the folders it writes to.
            Kind::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => Cause::Data,
            _ => Cause::Running,
        };
        Self::new(cause, error.to_string())
    }
}

fn engine_cause(error: &engine::Error) -> Cause {
    match error.kind() {
        ErrorKind::Model(_) | ErrorKind::Unsupported(_) => Cause::Data,
        ErrorKind::Config(_) | ErrorKind::Request(_) => Cause::Usage,
        ErrorKind::Numeric(_) => Cause::Numeric,
        _ => Cause::Running,
    }
}
