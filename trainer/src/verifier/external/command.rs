//! A program that is asked over its standard input and output, line by line.
//!
//! It is started when first asked, stays, and is killed with its children when it does not answer in
//! time; the next request starts it anew. Its standard error is this process's.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use super::{Asker, Failure, MAX_ANSWER_BYTES};

/// How often a wait looks whether the run is over.
const LOOK: Duration = Duration::from_millis(50);
/// How long a program may take to go once it has closed its output.
const GRACE: Duration = Duration::from_millis(500);

/// A program, running or not.
pub(super) struct Program {
    command: String,
    timeout: Duration,
    closing: Arc<AtomicBool>,
    running: Option<Running>,
}

struct Running {
    child: Child,
    requests: Sender<String>,
    answers: Receiver<String>,
}

impl Program {
    pub(super) fn new(command: &str, timeout: Duration, closing: Arc<AtomicBool>) -> Self {
        Self { command: command.to_owned(), timeout, closing, running: None }
    }

    fn wait(&self, answers: &Receiver<String>) -> Result<String, Failure> {
        let end = Instant::now() + self.timeout;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            match answers.recv_timeout(left.min(LOOK)) {
                Ok(answer) => return Ok(answer),
                Err(RecvTimeoutError::Disconnected) => return Err(Failure::Broken(String::new())),
                Err(RecvTimeoutError::Timeout) if left.is_zero() => return Err(Failure::Timeout),
                Err(RecvTimeoutError::Timeout) if self.closing.load(Ordering::Relaxed) => {
                    return Err(Failure::Timeout);
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }
}

impl Asker for Program {
    fn ask(&mut self, request: &str) -> Result<String, Failure> {
        let running = match self.running.take() {
            Some(running) => running,
            None => Running::start(&self.command)?,
        };
        // If its writer has ended, so has the program, and that is found below.
        let _ended = running.requests.send(format!("{request}\n"));
        match self.wait(&running.answers) {
            Ok(answer) => {
                self.running = Some(running);
                Ok(answer)
            }
            Err(Failure::Timeout) => Err(Failure::Timeout),
            Err(Failure::Broken(_)) => Err(Failure::Broken(running.obituary())),
        }
    }
}

impl Running {
    fn start(command: &str) -> Result<Self, Failure> {
        let mut shell = Command::new("sh");
        shell.arg("-c").arg(format!("exec {command}"));
        shell.stdin(Stdio::piped()).stdout(Stdio::piped());
        // A group of its own, to be killed as a whole.
        #[cfg(unix)]
        std::os::unix::process::CommandExt::process_group(&mut shell, 0);
        let started = shell.spawn();
        let mut child = started
            .map_err(|error| Failure::Broken(format!("it could not be started: {error}")))?;
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
        let stdin = stdin.expect("it is piped");
        let stdout = stdout.expect("it is piped");
        let (requests, to_write) = channel();
        let (read, answers) = channel();
        std::thread::spawn(move || write_all(stdin, &to_write));
        std::thread::spawn(move || read_all(stdout, &read));
        Ok(Self { child, requests, answers })
    }

    /// How a program that closed its output ended.
    fn obituary(mut self) -> String {
        let end = Instant::now() + GRACE;
        loop {
            match self.child.try_wait() {
                Ok(Some(status)) => return format!("it ended with {status}"),
                Ok(None) if Instant::now() < end => std::thread::sleep(LOOK / 10),
                _ => {
                    return "it closed its output, or answered more than a line may hold"
                        .to_owned();
                }
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        #[cfg(unix)]
        if let Some(group) = rustix::process::Pid::from_raw(self.child.id() as i32) {
            // Gone already is as good.
            let _gone = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
        }
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}

/// Writes requests until there are no more or nobody reads.
fn write_all(mut stdin: ChildStdin, requests: &Receiver<String>) {
    while let Ok(request) = requests.recv() {
        if stdin.write_all(request.as_bytes()).and_then(|()| stdin.flush()).is_err() {
            return;
        }
    }
}

/// Reads answers until the output ends, a line is too long, or nobody wants them.
fn read_all(stdout: ChildStdout, answers: &Sender<String>) {
    let mut lines = BufReader::new(stdout);
    loop {
        let mut line = Vec::new();
        let limited = lines.by_ref().take(MAX_ANSWER_BYTES).read_until(b'\n', &mut line);
        match limited {
            Ok(_) if line.ends_with(b"\n") => {
                let line = String::from_utf8_lossy(&line).into_owned();
                if answers.send(line).is_err() {
                    return;
                }
            }
            _ => return,
        }
    }
}
