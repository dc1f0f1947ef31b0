//! `engine serve`, as a process: it answers, it drains on SIGTERM, it reports a taken port at once.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

use super::support::{Folder, SMALL, engine, fails};

/// A running server; killed when dropped.
pub(super) struct Server {
    pub(super) child: Child,
    pub(super) address: String,
    /// Kept open, so that the server can go on logging.
    log: BufReader<std::process::ChildStderr>,
}

impl Server {
    pub(super) fn start(model: &Path, flags: &[&str]) -> Self {
        let mut command = engine();
        command.arg("serve").arg(model).args(SMALL).args(flags);
        command.args(["--port", "0", "--served-model-name", "tiny"]).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut log = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        let address = loop {
            line.clear();
            assert_ne!(log.read_line(&mut line).unwrap(), 0, "the server ended early");
            if let Some((_, rest)) = line.split_once("serving at http://") {
                break rest.trim().trim_end_matches("/v1").to_owned();
            }
        };
        Self { child, address, log }
    }

    /// Sends a request and reads the answer to its end: status and body.
    pub(super) fn send(&self, head: &str, body: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(&self.address).unwrap();
        let length = body.len();
        write!(
            stream,
            "{head} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n\
             content-length: {length}\r\n\r\n{body}"
        )
        .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        (head[9..12].parse().unwrap(), body.to_owned())
    }

    pub(super) fn terminate(&self) {
        let id = self.child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &id]).status().unwrap().success());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Already gone in most tests.
        let _gone = self.child.kill();
        let _reaped = self.child.wait();
    }
}

#[test]
fn a_process_answers_and_drains_on_sigterm() {
    let folder = Folder::new();
    let mut server = Server::start(&folder.tiny_model(), &["--shutdown-timeout", "20"]);
    assert_eq!(server.send("GET /health", "").0, 200);
    let (status, body) = server.send("GET /v1/models", "");
    assert_eq!(status, 200);
    let models: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(models["data"][0]["id"], "tiny");
    let chat = json!({"model": "tiny", "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 5, "ignore_eos": true, "temperature": 0});
    let (status, body) = server.send("POST /v1/chat/completions", &chat.to_string());
    let answer: Value = serde_json::from_str(&body).unwrap();
    assert_eq!((status, &answer["usage"]["completion_tokens"]), (200, &json!(5)), "{answer}");
    let (status, body) = server.send("POST /v1/chat/completions", "{");
    assert_eq!(status, 400, "{body}");

    // A stream that has begun is finished after the signal, and newcomers are turned away.
    let mut stream = TcpStream::connect(&server.address).unwrap();
    let long =
        json!({"prompt": "a", "stream": true, "ignore_eos": true, "max_tokens": 600}).to_string();
    write!(
        stream,
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n{long}",
        long.len()
    )
    .unwrap();
    let mut first = [0; 15];
    stream.read_exact(&mut first).unwrap();
    server.terminate();
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("\"finish_reason\":\"length\""), "{rest}");
    assert!(rest.contains("data: [DONE]"), "{rest}");
    assert_eq!(server.child.wait().unwrap().code(), Some(0));
    let mut log = String::new();
    server.log.read_to_string(&mut log).unwrap();
    assert!(log.contains("shutting down"), "{log}");
}

#[test]
fn a_taken_port_is_reported_before_loading() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    fails(engine().args(["serve", "/nowhere", "--port", &port]), 1, &format!("127.0.0.1:{port}"));
}
