//! `engine serve`, as a process: it answers, it drains on SIGTERM, it reports a taken port at once.

use std::io::Read;
use std::net::{TcpListener, TcpStream};

use serde_json::{Value, json};

use super::process::{Process, send, write_request};
use super::support::{Folder, engine, fails};

#[test]
fn a_process_answers_and_drains_on_sigterm() {
    let folder = Folder::new();
    let flags = ["--port", "0", "--served-model-name", "tiny", "--shutdown-timeout", "20"];
    let mut server = Process::serve(&folder.tiny_model(), &flags);
    let address = server.address();
    assert_eq!(send(&address, "GET /health", "").0, 200);
    let (status, body) = send(&address, "GET /v1/models", "");
    assert_eq!(status, 200);
    let models: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(models["data"][0]["id"], "tiny");
    let chat = json!({"model": "tiny", "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 5, "ignore_eos": true, "temperature": 0});
    let (status, body) = send(&address, "POST /v1/chat/completions", &chat.to_string());
    let answer: Value = serde_json::from_str(&body).unwrap();
    assert_eq!((status, &answer["usage"]["completion_tokens"]), (200, &json!(5)), "{answer}");
    let (status, body) = send(&address, "POST /v1/chat/completions", "{");
    assert_eq!(status, 400, "{body}");

    // A stream that has begun is finished after the signal, and newcomers are turned away.
    let mut stream = TcpStream::connect(&address).unwrap();
    let long =
        json!({"prompt": "a", "stream": true, "ignore_eos": true, "max_tokens": 600}).to_string();
    write_request(&mut stream, "POST /v1/completions", &long).unwrap();
    let mut first = [0; 15];
    stream.read_exact(&mut first).unwrap();
    server.signal("-TERM");
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("\"finish_reason\":\"length\""), "{rest}");
    assert!(rest.contains("data: [DONE]"), "{rest}");
    let log = server.ended(0);
    assert!(log.contains("shutting down"), "{log}");
}

#[test]
fn a_taken_port_is_reported_before_loading() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    fails(engine().args(["serve", "/nowhere", "--port", &port]), 1, &format!("127.0.0.1:{port}"));
}
