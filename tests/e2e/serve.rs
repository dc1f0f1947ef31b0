//! `engine serve`, as a process: it answers, it drains on SIGTERM, it reports a taken port at once, nobody waits
//! for it while it loads.

use std::fs;
use std::io::{ErrorKind, Read};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

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

#[cfg(target_os = "linux")]
#[test]
fn while_it_loads_nobody_connects_and_a_signal_ends_it_at_once() {
    let folder = Folder::new();
    let model = folder.tiny_model();
    // It loads for as long as nobody writes to this pipe.
    let pipe = model.join("model.safetensors");
    fs::remove_file(&pipe).unwrap();
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let admin = folder.path("admin.sock");
    let at = format!("unix:{}", admin.display());
    let flags = ["--port", &free.port().to_string(), "--admin-listen", &at];
    let mut server = Process::serve(&model, &flags);
    // The signals that it catches are bits of a number: SIGTERM is among them before it loads.
    let status = format!("/proc/{}/status", server.child.id());
    let catches = |status: &str| {
        let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
        u64::from_str_radix(caught.unwrap().trim(), 16).unwrap() >> (15 - 1) & 1 == 1
    };
    while !catches(&fs::read_to_string(&status).unwrap()) {
        assert_eq!(server.child.try_wait().unwrap(), None);
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(TcpStream::connect(free).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    assert!(!admin.exists());
    server.signal("-TERM");
    let begun = Instant::now();
    while server.child.try_wait().unwrap().is_none() {
        assert!(begun.elapsed() < Duration::from_secs(60), "it goes on loading");
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(server.ended(130), "");
}
