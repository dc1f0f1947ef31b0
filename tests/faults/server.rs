//! A real `engine serve`, its clients, and what can be seen of it from outside: its log, its metrics, its memory.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::{Folder, engine};

pub(crate) const TEXT: &str = "/v1/completions";
pub(crate) const CHAT: &str = "/v1/chat/completions";

/// A running server; killed when dropped.
pub(crate) struct Server {
    pub(crate) child: Child,
    pub(crate) address: String,
    log: Arc<Mutex<String>>,
    /// The folder of its model.
    _folder: Option<Folder>,
}

/// The head of an answer and its body.
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: String,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {:?}", self.body))
    }

    /// The value of a header; empty when there is none.
    pub(crate) fn header(&self, name: &str) -> String {
        let name = format!("{name}: ");
        let line = self.head.lines().find(|line| line.to_lowercase().starts_with(&name));
        line.map_or_else(String::new, |line| line[name.len()..].to_owned())
    }
}

impl Server {
    /// `builtin:arith` as `arith`, on one thread.
    pub(crate) fn arith(flags: &[&str]) -> Self {
        Self::start(Path::new("builtin:arith"), flags, None)
    }

    /// The same with an allocator that gives large pieces back at once, so that its memory is what it needs.
    pub(crate) fn measured() -> Self {
        let mut command = engine();
        command.envs([("MALLOC_ARENA_MAX", "1"), ("MALLOC_MMAP_THRESHOLD_", "131072")]);
        Self::run(command, Path::new("builtin:arith"), &[], None)
    }

    /// The one that tests share which change nothing for others; ends with the last of them.
    pub(crate) fn shared() -> Arc<Self> {
        static SHARED: Mutex<Weak<Server>> = Mutex::new(Weak::new());
        let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
        shared.upgrade().unwrap_or_else(|| {
            let server = Arc::new(Self::arith(&[]));
            *shared = Arc::downgrade(&server);
            server
        })
    }

    /// The random tiny model, whose tokens are bytes, after `change` of its folder.
    pub(crate) fn tiny(flags: &[&str], change: impl FnOnce(&Path)) -> Self {
        let folder = Folder::new();
        let model = folder.tiny_model();
        change(&model);
        Self::start(&model, flags, Some(folder))
    }

    fn start(model: &Path, flags: &[&str], folder: Option<Folder>) -> Self {
        Self::run(engine(), model, flags, folder)
    }

    fn run(mut command: Command, model: &Path, flags: &[&str], folder: Option<Folder>) -> Self {
        command.arg("serve").arg(model).args(["--served-model-name", "arith"]);
        if !flags.contains(&"--port") {
            command.args(["--port", "0"]);
        }
        if !flags.contains(&"--threads") {
            command.args(["--threads", "1"]);
        }
        if !flags.contains(&"--kv-cache-memory-bytes") {
            command.args(["--kv-cache-memory-bytes", "16MiB"]);
        }
        // It reads nothing, so nothing is there to be read.
        command.stdin(Stdio::null());
        let mut child = command.args(flags).stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap());
        let log = Arc::new(Mutex::new(String::new()));
        let mut line = String::new();
        let address = loop {
            line.clear();
            let read = lines.read_line(&mut line).unwrap();
            assert_ne!(read, 0, "the server ended early: {}", log.lock().unwrap());
            log.lock().unwrap().push_str(&line);
            if let Some((_, rest)) = line.split_once("serving at http://") {
                break rest.trim().trim_end_matches("/v1").to_owned();
            }
        };
        let sink = Arc::clone(&log);
        std::thread::spawn(move || {
            for line in lines.lines().map_while(Result::ok) {
                sink.lock().unwrap().push_str(&(line + "\n"));
            }
        });
        Self { child, address, log, _folder: folder }
    }

    /// What it has logged so far.
    pub(crate) fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    /// Sends a request and reads the answer to its end. `headers` end with a line end each.
    pub(crate) fn ask(&self, target: &str, headers: &str, body: &[u8]) -> Answer {
        let mut stream = self.connect();
        write_request(&mut stream, target, &format!("connection: close\r\n{headers}"), body);
        read_to_end(stream)
    }

    pub(crate) fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(&self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream
    }

    pub(crate) fn get(&self, path: &str) -> Answer {
        self.ask(&format!("GET {path}"), "", b"")
    }

    /// Posts JSON.
    pub(crate) fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let answer = self.ask(&format!("POST {path}"), JSON, body.to_string().as_bytes());
        (answer.status, answer.json())
    }

    /// Sends a request and leaves its answer to the caller.
    pub(crate) fn begin(&self, path: &str, body: &Value) -> TcpStream {
        let mut stream = self.connect();
        write_request(&mut stream, &format!("POST {path}"), JSON, body.to_string().as_bytes());
        stream
    }

    /// The pieces of a stream, each with the time it came; without the closing `[DONE]`.
    pub(crate) fn pieces(&self, path: &str, body: &Value) -> Vec<(Instant, Value)> {
        let mut lines = BufReader::new(self.begin(path, body)).lines().map_while(Result::ok);
        let mut pieces = Vec::new();
        loop {
            let line = lines.next().expect("a stream ends with [DONE]");
            match line.strip_prefix("data: ") {
                Some("[DONE]") => return pieces,
                Some(piece) => {
                    pieces.push((Instant::now(), serde_json::from_str(piece).unwrap()));
                }
                None => assert!(!line.starts_with('{'), "{line}"),
            }
        }
    }

    /// A good request is answered, and rightly.
    pub(crate) fn is_well(&self) {
        let body = json!({"prompt": "a", "max_tokens": 3, "temperature": 0, "ignore_eos": true});
        let (status, answer) = self.post(TEXT, &body);
        assert_eq!(status, 200, "{answer}");
        assert_eq!(answer["usage"]["completion_tokens"], 3, "{answer}");
    }

    /// Asserts a 400 in OpenAI's form, and a good answer after it; returns the error.
    pub(crate) fn refuses(&self, path: &str, body: &Value) -> Value {
        let error = self.refuses_raw(path, body.to_string().as_bytes(), 400);
        assert_ne!(error["code"], "invalid_json", "{error}");
        error
    }

    /// The same for any body and status.
    pub(crate) fn refuses_raw(&self, path: &str, body: &[u8], status: u16) -> Value {
        let shown = String::from_utf8_lossy(&body[..body.len().min(100)]).into_owned();
        let answer = self.ask(&format!("POST {path}"), JSON, body);
        assert_eq!(answer.status, status, "{shown}: {}", answer.body);
        let error = error_of(&answer.json());
        self.is_well();
        error
    }

    /// The sum of the series whose names begin with `name`.
    pub(crate) fn metric(&self, name: &str) -> f64 {
        let text = self.get("/metrics").body;
        let lines = text.lines().filter(|line| line.starts_with(name));
        lines.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum()
    }

    /// Waits until nothing runs or waits, no block is in use, and that is what the metrics say.
    pub(crate) fn wait_until_idle(&self) {
        let idle = || {
            let names = ["num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"];
            names.iter().all(|name| self.metric(&format!("engine_{name}")) == 0.0)
        };
        until("the server is idle", idle);
    }

    /// A value of its `/proc/PID/status`, in bytes: `VmRSS`, `VmHWM`.
    #[cfg(target_os = "linux")]
    pub(crate) fn memory(&self, name: &str) -> u64 {
        let path = format!("/proc/{}/status", self.child.id());
        let text = std::fs::read_to_string(path).unwrap();
        let line = text.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
    }

    pub(crate) fn signal(&self, name: &str) {
        let id = self.child.id().to_string();
        assert!(Command::new("kill").args([name, &id]).status().unwrap().success());
    }

    /// Waits for its end, which must come soon.
    pub(crate) fn ends_within(&mut self, limit: Duration) -> ExitStatus {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(begun.elapsed() < limit, "the server does not end: {}", self.log());
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Already gone in some tests.
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}

/// The header that bodies need.
pub(crate) const JSON: &str = "content-type: application/json\r\n";

/// Waits for something that must come soon.
pub(crate) fn until(what: &str, is: impl Fn() -> bool) {
    let begun = Instant::now();
    while !is() {
        assert!(begun.elapsed() < Duration::from_secs(20), "not after 20 s: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The error in an answer, which has OpenAI's form.
pub(crate) fn error_of(answer: &Value) -> Value {
    let error = answer["error"].as_object().unwrap_or_else(|| panic!("{answer}"));
    let keys: Vec<&str> = error.keys().map(String::as_str).collect();
    assert_eq!(keys, ["message", "type", "param", "code"]);
    let message = error["message"].as_str().unwrap();
    assert!(message.len() < 400 && !message.contains('\n'), "{message}");
    answer["error"].clone()
}

/// Writes a request: `target` is its method and path.
pub(crate) fn write_request(stream: &mut TcpStream, target: &str, headers: &str, body: &[u8]) {
    let length = body.len();
    let head = format!("{target} HTTP/1.1\r\nhost: x\r\n{headers}content-length: {length}\r\n\r\n");
    // One write, as the server may answer before it has read a body that is too long.
    stream.write_all(&[head.as_bytes(), body].concat()).unwrap();
}

fn read_to_end(mut stream: TcpStream) -> Answer {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    let text = String::from_utf8(bytes).expect("an answer is UTF-8");
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{text:?}"));
    Answer { status: head[9..12].parse().unwrap(), head: head.to_owned(), body: body.to_owned() }
}

/// A connection that is used again and again.
pub(crate) struct Link {
    stream: BufReader<TcpStream>,
}

impl Link {
    pub(crate) fn open(server: &Server) -> Self {
        Self { stream: BufReader::new(server.connect()) }
    }

    /// Sends a request and reads one answer.
    pub(crate) fn ask(&mut self, target: &str, headers: &str, body: &[u8]) -> Answer {
        write_request(self.stream.get_mut(), target, headers, body);
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            assert_ne!(self.stream.read_line(&mut head).unwrap(), 0, "closed after {head:?}");
        }
        let mut answer = Answer { status: head[9..12].parse().unwrap(), head, body: String::new() };
        let mut body = vec![0; answer.header("content-length").parse().unwrap()];
        self.stream.read_exact(&mut body).unwrap();
        answer.body = String::from_utf8(body).unwrap();
        answer
    }
}
