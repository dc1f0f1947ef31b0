//! Standard error: log lines as text or JSON.

use std::io::{IsTerminal, Write, stderr};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::json;

use crate::args::{CommonArgs, LogFormat};

/// Where logs and progress go.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Terminal {
    format: LogFormat,
    loudness: Loudness,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Loudness {
    Normal,
    Quiet,
}

/// How progress is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shown {
    /// A line that is drawn over.
    Bar,
    /// A log line now and then.
    Lines,
    Nothing,
}

impl Terminal {
    /// As the flags ask.
    pub(crate) fn new(common: &CommonArgs) -> Self {
        let loudness = if common.quiet { Loudness::Quiet } else { Loudness::Normal };
        Self { format: common.log_format, loudness }
    }

    /// Before any flag is known.
    pub(crate) fn plain() -> Self {
        Self { format: LogFormat::Text, loudness: Loudness::Normal }
    }

    /// A line that is good to know.
    pub(crate) fn info(&self, message: &str) {
        if self.loudness == Loudness::Normal {
            self.line("info", message);
        }
    }

    /// A line about something that is probably not meant.
    pub(crate) fn warn(&self, message: &str) {
        if self.loudness == Loudness::Normal {
            self.line("warning", message);
        }
    }

    /// The line that says why the command ends; never left out.
    pub(crate) fn error(&self, message: &str) {
        self.line("error", message);
    }

    /// How progress is to be shown.
    pub(crate) fn progress(&self) -> Shown {
        match (self.loudness, self.format) {
            (Loudness::Quiet, _) => Shown::Nothing,
            (_, LogFormat::Text) if stderr().is_terminal() => Shown::Bar,
            _ => Shown::Lines,
        }
    }

    fn line(&self, level: &str, message: &str) {
        let line = match self.format {
            LogFormat::Json => {
                let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                let time = (now.as_secs_f64() * 1e3).round() / 1e3;
                json!({"time": time, "level": level, "message": message}).to_string()
            }
            LogFormat::Text if level == "info" => message.to_owned(),
            LogFormat::Text => format!("{level}: {message}"),
        };
        // Without a reader of standard error there is nobody left to tell.
        let _closed = writeln!(stderr().lock(), "{line}");
    }
}
