//! A process that goes on, such as a server or a run, and requests to one that serves, over a stream of any kind.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, ChildStderr, Command, Stdio};

use super::support::{SMALL, engine};

/// A process that goes on, and what it logs; killed when dropped.
pub(super) struct Process {
    pub(super) child: Child,
    /// Kept open, so that it can go on logging.
    log: BufReader<ChildStderr>,
}

impl Process {
    pub(super) fn start(command: &mut Command) -> Self {
        // Nothing is read from standard input.
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let log = BufReader::new(child.stderr.take().unwrap());
        Self { child, log }
    }

    /// `engine serve` of a model.
    pub(super) fn serve(model: &Path, flags: &[&str]) -> Self {
        Self::start(engine().arg("serve").arg(model).args(SMALL).args(flags))
    }

    /// The next line of the log with this part.
    pub(super) fn line(&mut self, part: &str) -> String {
        let mut line = String::new();
        while !line.contains(part) {
            line.clear();
            assert_ne!(self.log.read_line(&mut line).unwrap(), 0, "no line with {part}");
        }
        line.trim_end().to_owned()
    }

    /// The address that the next line about serving names.
    pub(super) fn address(&mut self) -> String {
        let line = self.line("serving at http://");
        line.split_once("http://").unwrap().1.trim_end_matches("/v1").to_owned()
    }

    pub(super) fn signal(&self, name: &str) {
        let id = self.child.id().to_string();
        assert!(Command::new("kill").args([name, &id]).status().unwrap().success());
    }

    /// Waits for its end with this code, none if a signal ends it; returns what else it has logged.
    pub(super) fn ended(mut self, code: impl Into<Option<i32>>) -> String {
        let mut rest = String::new();
        self.log.read_to_string(&mut rest).unwrap();
        assert_eq!(self.child.wait().unwrap().code(), code.into(), "{rest}");
        rest
    }

    /// Ends it; returns what else it has logged.
    pub(super) fn end(self) -> String {
        self.signal("-TERM");
        self.ended(0)
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Already gone in most tests.
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}

/// Writes a request of the method and path, and further lines, in `head`.
pub(super) fn write_request(
    stream: &mut impl Write,
    head: &str,
    body: &str,
) -> std::io::Result<()> {
    let (first, more) = head.split_once("\r\n").unwrap_or((head, ""));
    let more = if more.is_empty() { String::new() } else { format!("{more}\r\n") };
    write!(
        stream,
        "{first} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n{more}\
         content-length: {}\r\n\r\n{body}",
        body.len()
    )
}

/// Sends a request as [`write_request`] and reads the answer to its end: status and body. `None` when nobody
/// answers.
pub(super) fn ask(mut stream: impl Read + Write, head: &str, body: &str) -> Option<(u16, String)> {
    write_request(&mut stream, head, body).ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    let (head, body) = answer.split_once("\r\n\r\n")?;
    Some((head[9..12].parse().unwrap(), body.to_owned()))
}

/// The same over a connection of its own to `address`, where somebody answers.
pub(super) fn send(address: &str, head: &str, body: &str) -> (u16, String) {
    ask(TcpStream::connect(address).unwrap(), head, body).expect("an answer")
}
