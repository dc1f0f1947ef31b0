//! What has brought down or opened other servers, and is not a row of its own: fetched links, tools with bad
//! patterns, bodies in hostile chunks, times and texts that tell secrets.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpListener};

use serde_json::{Value, json};

use crate::server::{CHAT, Server, TEXT, error_of};

#[test]
fn links_in_requests_are_never_followed() {
    let server = Server::shared();
    let trap = TcpListener::bind("127.0.0.1:0").unwrap();
    trap.set_nonblocking(true).unwrap();
    let link = format!("http://{}/x", trap.local_addr().unwrap());
    let user = |content: Value| json!({"messages": [{"role": "user", "content": content}]});
    let part = |kind: &str| json!([{"type": kind, kind: {"url": link}}]);
    for body in [
        user(part("image_url")),
        user(part("video_url")),
        user(part("audio_url")),
        user(json!([{"type": "input_audio", "input_audio": {"data": link}}])),
        user(json!([{"type": "file", "file": {"file_id": link}}])),
    ] {
        assert_eq!(server.refuses(CHAT, &body)["param"], "messages", "{body}");
    }
    for body in [
        json!({"prompt": "a", "guided_json": {"$ref": link}}),
        json!({"prompt": "a", "guided_json": {"$schema": link, "$id": link, "$ref": "y"}}),
        json!({"prompt": "a", "guided_grammar": format!("%import {link}\nstart: \"a\"")}),
    ] {
        server.refuses(TEXT, &body);
    }
    assert_eq!(trap.accept().unwrap_err().kind(), ErrorKind::WouldBlock, "somebody came");
}

#[test]
fn tools_and_schemas_that_are_none_are_refused() {
    let server = Server::shared();
    let ask = |tools: Value| {
        json!({"messages": [{"role": "user", "content": "1+1="}], "tools": tools,
            "tool_choice": "required", "max_tokens": 20})
    };
    let function = |parameters: Value| json!([{"type": "function", "function": {"name": "f", "parameters": parameters}}]);
    let field = |schema: Value| function(json!({"type": "object", "properties": {"a": schema}}));
    for tools in [
        json!({}),
        json!([1]),
        json!([{"type": "function"}]),
        json!([{"type": "code", "function": {"name": "f"}}]),
        json!([{"type": "function", "function": {"name": ""}}]),
        json!([{"type": "function", "function": {"name": 5}}]),
        function(json!([])),
        function(json!("object")),
        field(json!({"type": "something"})),
        field(json!({"type": 5})),
        field(json!({"type": "string", "pattern": "("})),
        field(json!({"type": "string", "pattern": "\\N"})),
        field(json!({"type": "string", "pattern": 5})),
        field(json!({"type": "string", "minLength": -1})),
        field(json!({"$ref": "#/$defs/nothing"})),
    ] {
        let error = server.refuses(CHAT, &ask(tools.clone()));
        assert_eq!(error["param"], "tools", "{tools}: {error}");
    }
}

#[test]
fn bodies_in_hostile_chunks_are_refused_and_plain_ones_read() {
    let server = Server::shared();
    // A client that has said all closes its side, unless it waits for a good answer.
    let send = |chunks: &[u8], close: bool| {
        let mut stream = server.connect();
        let head = format!(
            "POST {TEXT} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\
             content-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
        );
        // Whoever is refused may be cut off while he writes and reads.
        let _cut = stream.write_all(&[head.as_bytes(), chunks].concat());
        let _cut = close.then(|| stream.shutdown(Shutdown::Write));
        let mut answer = Vec::new();
        let _cut = stream.read_to_end(&mut answer);
        server.is_well();
        String::from_utf8_lossy(&answer).into_owned()
    };
    let body = "{\"prompt\": \"a\", \"max_tokens\": 2}";
    let bytes: String = body.chars().map(|character| format!("1\r\n{character}\r\n")).collect();
    let whole = send(format!("{bytes}0\r\n\r\n").as_bytes(), false);
    assert!(whole.starts_with("HTTP/1.1 200"), "{whole}");
    for size in ["FFFFFFFFFFFFFFFF", "FFFFFFFFFFFFFFFFFF", "-1", "zz", "", "1; x=\x00"] {
        let answer = send(format!("{size}\r\n{body}\r\n0\r\n\r\n").as_bytes(), true);
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{size}: {answer}");
    }
    let endless = format!("1;{}\r\nx\r\n", "e".repeat(100_000));
    let answer = send(endless.as_bytes(), true);
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{answer}");
}

#[test]
fn a_body_beyond_its_limit_is_not_read_to_its_end() {
    let server = Server::arith(&["--max-body-bytes", "10000"]);
    for length in ["10001", "99999999999", "18446744073709551615"] {
        let mut stream = server.connect();
        let head = format!(
            "POST {TEXT} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\
             content-type: application/json\r\ncontent-length: {length}\r\n\r\n{{"
        );
        stream.write_all(head.as_bytes()).unwrap();
        // Answered though most of the body never comes.
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        if length.len() < 20 {
            let (head, body) = answer.split_once("\r\n\r\n").unwrap();
            assert!(head.starts_with("HTTP/1.1 413"), "{length}: {head}");
            let error = error_of(&serde_json::from_str(body).unwrap());
            assert_eq!(error["message"], "body is too large, limit is 10000 bytes");
        } else {
            assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{length}: {answer}");
        }
        server.is_well();
    }
}

#[test]
fn errors_repeat_neither_text_nor_addresses() {
    let server = Server::shared();
    let secret = "s3cret-text";
    for body in [
        json!({"prompt": {"a": secret}}),
        json!({"prompt": "a", "temperature": secret}),
        json!({"prompt": "a", "stop": {"a": secret}}),
        json!({"prompt": "a", "logit_bias": {secret: secret}}),
        json!({"prompt": [secret, 1]}),
        json!({"prompt": secret.repeat(1000)}),
    ] {
        let error = server.refuses(TEXT, &body).to_string();
        assert!(!error.contains(secret) && !error.contains("0x"), "{error}");
    }
    let error = server.refuses(CHAT, &json!({"messages": [{"role": "user", "content": [secret]}]}));
    assert!(!error.to_string().contains(secret), "{error}");
}
