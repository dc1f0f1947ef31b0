//! Standard error: log lines as text or JSON.

use std::io::{IsTerminal, Write, stderr};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};

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
        self.info_with(message, &[]);
    }

    /// The same with what it says as fields, where lines are JSON.
    pub(crate) fn info_with(&self, message: &str, fields: &[(&str, Value)]) {
        if self.loudness == Loudness::Normal {
            self.line("info", message, fields);
        }
    }

    /// A line about something that is probably not meant.
    pub(crate) fn warn(&self, message: &str) {
        self.warn_with(message, &[]);
    }

    /// The same with what it says as fields, where lines are JSON.
    pub(crate) fn warn_with(&self, message: &str, fields: &[(&str, Value)]) {
        if self.loudness == Loudness::Normal {
            self.line("warning", message, fields);
        }
    }

    /// Where lines are JSON, lets a panic be one too.
    pub(crate) fn report_panics(self) {
        if self.format == LogFormat::Json {
            std::panic::set_hook(Box::new(move |panic| {
                let place =
                    panic.location().map(|place| format!("{}:{}", place.file(), place.line()));
                let what = panic.payload_as_str().unwrap_or("no message");
                self.line("error", &format!("panic: {what}"), &[("place", json!(place))]);
            }));
        }
    }

    /// The line that says why the command ends; never left out.
    pub(crate) fn error(&self, message: &str) {
        self.line("error", message, &[]);
    }

    /// How progress is to be shown.
    pub(crate) fn progress(&self) -> Shown {
        match (self.loudness, self.format) {
            (Loudness::Quiet, _) => Shown::Nothing,
            (_, LogFormat::Text) if stderr().is_terminal() => Shown::Bar,
            _ => Shown::Lines,
        }
    }

    fn line(&self, level: &str, message: &str, fields: &[(&str, Value)]) {
        // Without a reader of standard error there is nobody left to tell.
        let _closed =
            writeln!(stderr().lock(), "{}", rendered(self.format, level, message, fields));
    }
}

/// A line as it is written. `fields` stand in JSON only.
fn rendered(format: LogFormat, level: &str, message: &str, fields: &[(&str, Value)]) -> String {
    match format {
        LogFormat::Json => {
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            let time = (now.as_secs_f64() * 1e3).round() / 1e3;
            let head = [("ts", json!(time)), ("level", json!(level)), ("message", json!(message))];
            let all = head.iter().chain(fields);
            let all = all.map(|(name, value)| ((*name).to_owned(), value.clone()));
            Value::Object(all.collect::<Map<_, _>>()).to_string()
        }
        LogFormat::Text if level == "info" => message.to_owned(),
        LogFormat::Text => format!("{level}: {message}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_stand_in_json_only() {
        let fields = [("running", json!(3))];
        let text = rendered(LogFormat::Text, "info", "Running: 3 reqs", &fields);
        assert_eq!(text, "Running: 3 reqs");
        let line = rendered(LogFormat::Json, "info", "Running: 3 reqs", &fields);
        let mut line: Value = serde_json::from_str(&line).unwrap();
        assert!(line["ts"].is_f64());
        line["ts"] = Value::Null;
        let expected =
            json!({"ts": null, "level": "info", "message": "Running: 3 reqs", "running": 3});
        assert_eq!(line, expected);
    }
}
