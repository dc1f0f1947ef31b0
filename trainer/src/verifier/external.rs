//! Rewards from outside: a program, or a server.
//!
//! One request a response, `{"id", "data_source", "prompt", "response", "ground_truth",
//! "extra_info"}`, answered by `{"id", "score"[, "acc", "pred"]}`. A pool of workers asks, each one
//! request at a time, so a request that hangs is known and ends alone. What else a program prints is
//! passed over. Leaves out batching.

mod command;
#[cfg(feature = "http")]
mod http;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use serde_json::{Map, Value};

use super::Verdict;
use crate::error::{Error, Result};

/// Bytes of an answer; a longer one is a failure.
const MAX_ANSWER_BYTES: u64 = 1 << 20;

/// Who is asked for rewards.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Endpoint {
    /// A command line, run by the shell.
    Command(String),
    /// An address.
    Http(String),
}

/// Why there is no verdict.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    /// It took longer than a limit: which, and why what came meanwhile was no answer, in words.
    Timeout(String),
    /// Anything else, in words.
    Broken(String),
}

/// A verdict, or why there is none.
pub(super) type Answer = std::result::Result<Verdict, Failure>;

/// How long who is asked may take.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// For an answer, `reward.timeout_s`.
    pub(super) answer: Duration,
    /// For the first one of a program, which has to start, `reward.start_timeout_s`.
    pub(super) start: Duration,
}

impl Limits {
    /// That an answer did not come in time.
    fn late(&self) -> String {
        format!("no answer within reward.timeout_s ({} s)", self.answer.as_secs_f64())
    }

    /// The same of a program that had to start.
    fn late_start(&self) -> String {
        match self.start > self.answer {
            true => {
                let start = self.start.as_secs_f64();
                format!(
                    "no answer of a program just started within reward.start_timeout_s ({start} s)"
                )
            }
            false => self.late(),
        }
    }
}

/// One who can be asked, one request at a time.
trait Asker: Send {
    /// The answer to `request` of this id, which is one line of JSON.
    fn ask(&mut self, id: u64, request: &str) -> Answer;
}

struct Job {
    id: u64,
    request: String,
    place: usize,
    reply: Sender<(usize, Answer)>,
}

/// Workers that ask.
#[derive(Debug)]
pub(super) struct Pool {
    jobs: Option<Sender<Job>>,
    closing: Arc<AtomicBool>,
    /// Those that have programs to end. A worker that waits for a server cannot be told to stop: it ends alone, at
    /// its time limit at the latest.
    workers: Vec<JoinHandle<()>>,
}

impl Endpoint {
    /// Reads `command:PROGRAM` or an address; `None` if it is neither.
    ///
    /// # Errors
    /// If there is nothing after `command:`, or HTTP is not built in.
    pub(super) fn parse(text: &str) -> Result<Option<Self>> {
        if let Some(command) = text.strip_prefix("command:") {
            return match command.trim() {
                "" => Err(Error::config("reward function \"command:\" names no program")),
                command => Ok(Some(Self::Command(command.to_owned()))),
            };
        }
        if !(text.starts_with("http://") || text.starts_with("https://")) {
            return Ok(None);
        }
        match cfg!(feature = "http") {
            true => Ok(Some(Self::Http(text.to_owned()))),
            false => Err(Error::config(format!("reward function {text:?} needs the feature http"))),
        }
    }

    fn asker(&self, limits: Limits, closing: &Arc<AtomicBool>) -> Box<dyn Asker> {
        match self {
            Self::Command(command) => {
                Box::new(command::Program::new(command, limits, closing.clone()))
            }
            #[cfg(feature = "http")]
            Self::Http(address) => Box::new(http::Server::new(address, limits)),
            #[cfg(not(feature = "http"))]
            Self::Http(_) => unreachable!("parsing refuses addresses"),
        }
    }
}

impl Pool {
    /// Starts `workers` threads; programs are started when they are first needed.
    pub(super) fn new(endpoint: &Endpoint, workers: usize, limits: Limits) -> Self {
        let (jobs, queue) = channel::<Job>();
        let queue = Arc::new(Mutex::new(queue));
        let closing = Arc::new(AtomicBool::new(false));
        let work = |_| {
            let (queue, asker) = (queue.clone(), endpoint.asker(limits, &closing));
            let closing = closing.clone();
            std::thread::spawn(move || work(&queue, asker, &closing))
        };
        let mut workers: Vec<JoinHandle<()>> = (0..workers).map(work).collect();
        workers.retain(|_| matches!(endpoint, Endpoint::Command(_)));
        Self { jobs: Some(jobs), workers, closing }
    }

    /// Sends a request whose answer goes to `reply` together with `place`.
    pub(super) fn submit(
        &self,
        (id, place): (u64, usize),
        request: String,
        reply: &Sender<(usize, Answer)>,
    ) {
        let job = Job { id, request, place, reply: reply.clone() };
        let jobs = self.jobs.as_ref().expect("it is there until the pool is dropped");
        jobs.send(job).expect("the workers wait until the pool is dropped");
    }
}

impl Drop for Pool {
    /// Ends the workers and their programs; whoever waits for a server's answer is not waited for.
    fn drop(&mut self) {
        self.closing.store(true, Ordering::Relaxed);
        self.jobs = None;
        for worker in self.workers.drain(..) {
            // A worker that panicked has nothing left to end.
            let _ended = worker.join();
        }
    }
}

/// Answers jobs until there are no more, or they are no longer wanted.
fn work(queue: &Mutex<Receiver<Job>>, mut asker: Box<dyn Asker>, closing: &AtomicBool) {
    loop {
        let job = queue.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Job { id, request, place, reply }) = job else { return };
        if closing.load(Ordering::Relaxed) {
            return;
        }
        let answer = asker.ask(id, &request);
        // Who asked may have given up because of another answer.
        let _gone = reply.send((place, answer));
    }
}

/// Reads the answer to request `id`; an error says why the text is none.
fn read(text: &str, id: u64) -> std::result::Result<Answer, String> {
    let whole = serde_json::from_str::<Value>(text);
    let finite = whole.is_ok();
    // Python writes numbers that are not finite in a way that JSON does not have.
    let words = || text.replace("-Infinity", "null").replace("Infinity", "null");
    let nulls = || words().replace("NaN", "null");
    let answer = whole
        .or_else(|error| serde_json::from_str(&nulls()).map_err(|_| error))
        .map_err(|error| format!("the answer is not JSON: {error}"))?;
    let Value::Object(answer) = answer else {
        return Err("the answer is not one object".to_owned());
    };
    match answer.get("id").map(Value::as_u64) {
        Some(Some(got)) if got == id => {}
        // Who scores without saying what will do so again.
        None | Some(None) if answer.contains_key("score") => {
            let message =
                format!("the answer does not repeat the id {id} of its request, a number");
            return Ok(Err(Failure::Broken(message)));
        }
        _ => return Err(format!("the answer is not to request {id}")),
    }
    Ok(if finite { verdict(&answer) } else { Err("the score is not finite".to_owned()) }
        .map_err(Failure::Broken))
}

/// The verdict that an answer states; an error says what is wrong with it.
fn verdict(answer: &Map<String, Value>) -> std::result::Result<Verdict, String> {
    let score = match answer.get("score") {
        Some(Value::Number(score)) => score.as_f64().filter(|score| score.is_finite()),
        Some(Value::Bool(right)) => Some(f64::from(u8::from(*right))),
        Some(other) => return Err(format!("the score is {other}, expected a number")),
        None => return Err("the answer has no score".to_owned()),
    };
    let score = score.ok_or("the score is not finite")?;
    let correct = match answer.get("acc") {
        None | Some(Value::Null) => score > 0.0,
        Some(Value::Bool(right)) => *right,
        Some(Value::Number(n)) => n.as_f64() == Some(1.0),
        Some(other) => return Err(format!("acc is {other}, expected true or false")),
    };
    let predicted = match answer.get("pred") {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
    };
    Ok(Verdict { score, correct, predicted })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read_or_refused_with_a_reason() {
        let good = r#"{"id": 3, "score": 0.5, "acc": false, "pred": "x"}"#;
        let good = read(good, 3).unwrap().unwrap();
        assert_eq!((good.score, good.correct, good.predicted.as_str()), (0.5, false, "x"));
        let short = read(r#"{"id": 3, "score": true}"#, 3).unwrap().unwrap();
        assert_eq!((short.score, short.correct), (1.0, true));
        for (text, reason) in [
            (r#"{"id": 3, "score": NaN}"#, "the score is not finite"),
            (r#"{"id": 3, "score": null}"#, "the score is null, expected a number"),
            (r#"{"id": 3, "score": [1, 0]}"#, "the score is [1,0], expected a number"),
            (r#"{"id": 3, "score": -Infinity}"#, "the score is not finite"),
            (r#"{"id": 3}"#, "the answer has no score"),
            (
                r#"{"id": "3", "score": 1}"#,
                "the answer does not repeat the id 3 of its request, a number",
            ),
            (r#"{"score": 1}"#, "the answer does not repeat the id 3 of its request, a number"),
        ] {
            assert_eq!(read(text, 3), Ok(Err(Failure::Broken(reason.to_owned()))), "{text}");
        }
        for (text, reason) in [
            (r#"{"id": 4, "score": 1}"#, "the answer is not to request 3"),
            (r#"{"id": 2, "score": NaN}"#, "the answer is not to request 3"),
            (r#"[{"id": 3, "score": 1}]"#, "the answer is not one object"),
            ("loss: NaN", "the answer is not JSON: expected value at line 1 column 1"),
        ] {
            assert_eq!(read(text, 3), Err(reason.to_owned()), "{text}");
        }
    }

    #[test]
    fn endpoints_are_told_from_rules() {
        let parse = |text| Endpoint::parse(text).unwrap();
        assert_eq!(parse("command: ./a b"), Some(Endpoint::Command("./a b".to_owned())));
        assert_eq!(parse("exact"), None);
        assert!(Endpoint::parse("command:").is_err());
    }
}
