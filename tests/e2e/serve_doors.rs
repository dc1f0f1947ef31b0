//! The doors of `engine serve` as a process: the operator's socket, a public Unix socket, lines of the log as
//! JSON, signals that end nothing, and flags that are refused.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;

use serde_json::{Value, json};

use super::process::{Process, ask};
use super::support::{Folder, engine, fails};

/// Sends a request with an id and reads the answer: status and body.
fn send(stream: impl Read + Write, head: &str, body: &Value) -> (u16, Value) {
    let body = if body.is_null() { String::new() } else { body.to_string() };
    let (status, body) = ask(stream, &format!("{head}\r\nx-request-id: run-7"), &body).unwrap();
    (status, serde_json::from_str(&body).unwrap())
}

#[test]
fn an_operator_pauses_and_replaces_weights_by_a_socket() {
    let folder = Folder::new();
    let (model, path) = (folder.tiny_model(), folder.path("admin.sock"));
    let at = format!("unix:{}", path.display());
    let mut server = Process::serve(&model, &["--port", "0", "--admin-listen", &at]);
    let public = server.address();
    server.line("administrated at unix:");
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let admin = |head: &str, body: Value| send(UnixStream::connect(&path).unwrap(), head, &body);
    let client = |head: &str, body: Value| send(TcpStream::connect(&public).unwrap(), head, &body);

    let (status, answer) = client("POST /pause", Value::Null);
    assert_eq!((status, &answer["error"]["type"]), (403, &json!("permission_error")));
    let paused = json!({"status": "paused", "mode": "keep"});
    assert_eq!(admin("POST /pause?mode=keep", Value::Null), (200, paused));
    assert_eq!(admin("POST /resume", Value::Null), (200, json!({"status": "resumed"})));
    let body = json!({"path": model.to_str().unwrap(), "mode": "wait"});
    let updated = json!({"status": "updated", "weights_version": 1});
    assert_eq!(admin("POST /update_weights_from_disk", body), (200, updated));
    let ask = json!({"prompt": "a", "max_tokens": 2, "ignore_eos": true, "return_token_ids": true});
    let (status, answer) = client("POST /v1/completions", ask);
    assert_eq!((status, &answer["choices"][0]["weights_versions"]), (200, &json!([1, 1])));
    server.end();
    assert!(!path.exists(), "the socket's file is left");
}

#[test]
fn lines_are_json_and_hangups_end_nothing() {
    let folder = Folder::new();
    let path = folder.path("public.sock");
    let flags = ["--log-format", "json", "--enable-log-requests", "--uds", path.to_str().unwrap()];
    let mut server = Process::serve(&folder.tiny_model(), &flags);
    server.line("serving at unix:");
    server.signal("-HUP");
    let ask = json!({"prompt": "hush", "max_tokens": 2, "zebra": 1});
    let stream = UnixStream::connect(&path).unwrap();
    assert_eq!(send(stream, "POST /v1/completions", &ask).0, 200);
    let log = server.end();
    assert!(!log.contains("hush"), "{log}");
    let lines: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for line in &lines {
        assert!(line["ts"].as_f64().unwrap() > 1.6e9, "{line}");
        assert!(["info", "warning"].contains(&line["level"].as_str().unwrap()), "{line}");
        assert!(line["message"].is_string(), "{line}");
    }
    let answered = lines.iter().find(|line| line["status"] == 200).unwrap();
    assert_eq!(answered["path"], "/v1/completions");
    assert_eq!(answered["request_id"], "run-7");
    assert!(answered["ms"].as_f64().unwrap() > 0.0, "{answered}");
    let taken_in = lines.iter().find(|line| line["prompt_tokens"] == 4).unwrap();
    assert_eq!((&taken_in["request_id"], &taken_in["max_tokens"]), (&json!("run-7"), &json!("2")));
    assert!(lines.iter().any(|line| line["field"] == "zebra"), "{log}");
}

#[test]
fn doors_that_cannot_be_are_usage_errors() {
    for (flags, part) in [
        (&["--admin-listen", "0.0.0.0:0"][..], "--admin-api-key is needed"),
        (&["--admin-api-key", "k"], "--admin-api-key has no effect without --admin-listen"),
        (&["--allowed-origins", "*"], "expected a JSON list of strings"),
        (&["--allowed-origins", "[\"x\"]"], "allowed origin \"x\" is none"),
        (&["--allowed-origins", "[\"*\"]", "--allow-credentials"], "allowed origins are *"),
        (&["--max-connections", "0"], "max_connections is 0, limit is at least 1"),
        (&["--h11-max-incomplete-event-size", "1K"], "max_header_bytes is 1024, limit is"),
        (&["--stall-timeout", "0"], "--stall-timeout is 0, limit is more than 0 and at most"),
        (
            &["--body-timeout", "1e19"],
            "--body-timeout is 10000000000000000000, limit is more than 0 and at most",
        ),
        (&["--request-timeout", "1e18"], "at most 31536000 seconds"),
    ] {
        fails(engine().args(["serve", "/nowhere", "--port", "0"]).args(flags), 2, part);
    }
}
