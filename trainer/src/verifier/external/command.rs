//! A program that is asked over its standard input and output, line by line.
//!
//! It is a line for the shell, started when first asked, stays, and is killed with its children when it does not
//! answer in time, for which it has longer when it has just been started; the next request starts it anew.
//! Lines that are no answer to what was asked, such as what a library prints, are passed over. Its standard
//! error is this process's. It ends with this process, however that ends: what this process holds open tells a
//! second shell, which kills it.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::time::{Duration, Instant};

use super::{Answer, Asker, Failure, Limits, MAX_ANSWER_BYTES, read};

/// How often a wait looks whether the run is over.
const LOOK: Duration = Duration::from_millis(50);
/// Lines of a program that are held until somebody looks at them; a program that prints more waits.
const LINES: usize = 64;
/// How long a program may take to go once it has closed its output.
const GRACE: Duration = Duration::from_millis(500);

/// A program, running or not.
pub(super) struct Program {
    command: String,
    limits: Limits,
    closing: Arc<AtomicBool>,
    running: Option<Running>,
}

struct Running {
    /// Whether it has answered, so that it is known to have started.
    answered: bool,
    child: Child,
    watcher: Option<Child>,
    requests: Sender<String>,
    lines: Receiver<String>,
}

impl Program {
    pub(super) fn new(command: &str, limits: Limits, closing: Arc<AtomicBool>) -> Self {
        Self { command: command.to_owned(), limits, closing, running: None }
    }

    /// The answer to request `id` among the lines that come in time; `None` when there are no more.
    fn wait(&self, id: u64, running: &Running) -> Option<Answer> {
        let Limits { answer, start } = self.limits;
        let (limit, late) = match running.answered {
            true => (answer, self.limits.late()),
            false => (answer.max(start), self.limits.late_start()),
        };
        let end = Instant::now() + limit;
        let mut passed_over: Option<String> = None;
        loop {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() || self.closing.load(Ordering::Relaxed) {
                let last = passed_over.map(|why| format!("; last line: {why}"));
                return Some(Err(Failure::Timeout(late + &last.unwrap_or_default())));
            }
            match running.lines.recv_timeout(left.min(LOOK)).map(|line| read(&line, id)) {
                Ok(Ok(answer)) => return Some(answer),
                Ok(Err(reason)) => passed_over = Some(reason),
                Err(RecvTimeoutError::Disconnected) => return None,
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }
}

impl Asker for Program {
    fn ask(&mut self, id: u64, request: &str) -> Answer {
        let mut running = match self.running.take() {
            Some(running) => running,
            None => Running::start(&self.command)?,
        };
        // If its writer has ended, so has the program, and that is found below.
        let _ended = running.requests.send(format!("{request}\n"));
        match self.wait(id, &running) {
            Some(Err(late @ Failure::Timeout(_))) => Err(late),
            Some(answer) => {
                running.answered = true;
                self.running = Some(running);
                answer
            }
            None => Err(Failure::Broken(running.obituary())),
        }
    }
}

impl Running {
    fn start(command: &str) -> Result<Self, Failure> {
        let mut shell = Command::new("sh");
        shell.arg("-c").arg(command);
        shell.stdin(Stdio::piped()).stdout(Stdio::piped());
        // A group of its own, to be killed as a whole.
        let mut child = spawn_in_own_group(&mut shell)?;
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
        let stdin = stdin.expect("it is piped");
        let stdout = stdout.expect("it is piped");
        let (requests, to_write) = channel();
        let (read, lines) = sync_channel(LINES);
        std::thread::spawn(move || write_all(stdin, &to_write));
        std::thread::spawn(move || read_all(stdout, &read));
        let mut running = Self { answered: false, child, watcher: None, requests, lines };
        running.watcher = Some(watch(running.child.id())?);
        Ok(running)
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
        // Before the group's number is free for others.
        if let Some(watcher) = &mut self.watcher {
            let _gone = watcher.kill();
            let _reaped = watcher.wait();
        }
        let _reaped = self.child.wait();
    }
}

/// Starts a shell that kills a group of processes once this process is gone: its input, which is open as long
/// as this process lives, then ends. No signal of a terminal reaches it.
fn watch(group: u32) -> Result<Child, Failure> {
    let mut shell = Command::new("sh");
    shell.arg("-c").arg(format!("read -r _; kill -s KILL -- -{group}"));
    shell.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    spawn_in_own_group(&mut shell)
}

fn spawn_in_own_group(shell: &mut Command) -> Result<Child, Failure> {
    #[cfg(unix)]
    std::os::unix::process::CommandExt::process_group(shell, 0);
    let started = shell.spawn();
    started.map_err(|error| Failure::Broken(format!("it could not be started: {error}")))
}

/// Writes requests until there are no more or nobody reads.
fn write_all(mut stdin: ChildStdin, requests: &Receiver<String>) {
    while let Ok(request) = requests.recv() {
        if stdin.write_all(request.as_bytes()).and_then(|()| stdin.flush()).is_err() {
            return;
        }
    }
}

/// Reads lines until the output ends, one is too long, or nobody wants them.
fn read_all(stdout: ChildStdout, lines: &SyncSender<String>) {
    let mut output = BufReader::new(stdout);
    loop {
        let mut line = Vec::new();
        let limited = output.by_ref().take(MAX_ANSWER_BYTES).read_until(b'\n', &mut line);
        match limited {
            Ok(_) if line.ends_with(b"\n") => {
                let line = String::from_utf8_lossy(&line).into_owned();
                if lines.send(line).is_err() {
                    return;
                }
            }
            _ => return,
        }
    }
}
