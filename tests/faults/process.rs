//! Rows 22, 23, 25, 26, 29 and 31 to 33: memory, threads, ports and signals.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::server::{JSON, Server, TEXT, until};
use crate::support::{engine, fails};

/// A sampled completion whose tokens are reported.
fn drawn(seed: u64) -> Value {
    json!({"prompt": format!("{seed}+{}=", seed * 7), "max_tokens": 200, "ignore_eos": true,
        "seed": seed, "return_token_ids": true, "logprobs": 0})
}

/// Token ids and log-probabilities of `requests` sent together.
fn together(server: &Server, requests: u64) -> Vec<(Value, Value)> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..requests)
            .map(|seed| scope.spawn(move || server.post(TEXT, &drawn(seed))))
            .collect();
        let answers = threads.into_iter().map(|thread| {
            let (status, answer) = thread.join().unwrap();
            assert_eq!(status, 200, "{answer}");
            let choice = &answer["choices"][0];
            assert_eq!(choice["token_ids"].as_array().unwrap().len(), 200);
            (choice["token_ids"].clone(), choice["logprobs"]["token_logprobs"].clone())
        });
        answers.collect()
    })
}

#[test]
fn row_22_without_room_for_all_some_start_again_and_say_the_same() {
    let roomy = Server::arith(&[]);
    let expected = together(&roomy, 8);
    assert_eq!(roomy.metric("engine_num_preemptions_total"), 0.0);
    let narrow = Server::arith(&["--max-model-len", "256", "--kv-cache-memory-bytes", NARROW_KV]);
    assert_eq!(together(&narrow, 8), expected);
    let preemptions = narrow.metric("engine_num_preemptions_total");
    assert!(preemptions > 0.0, "the cache was not too small");
    narrow.wait_until_idle();
    narrow.is_well();
}

/// Room for about two of the sequences of row 22.
const NARROW_KV: &str = "1MiB";

#[test]
fn row_23_a_request_that_can_never_fit_is_refused_at_once() {
    let server = Server::arith(&["--max-model-len", "128"]);
    let error = server.refuses(TEXT, &json!({"prompt": "1".repeat(128), "max_tokens": 1}));
    assert_eq!(error["code"], "context_length_exceeded");
    // A small cache is the limit, too, of a request and of what may be asked for.
    let narrow = Server::arith(&["--kv-cache-memory-bytes", "64KiB"]);
    let limit = narrow.get("/v1/models").json()["data"][0]["max_model_len"].as_u64().unwrap();
    assert!(limit < 128, "{limit}");
    let error = narrow.refuses(TEXT, &json!({"prompt": "1+1=", "max_tokens": limit - 3}));
    assert_eq!(error["code"], "context_length_exceeded");
    let fits = json!({"prompt": "1+1=", "max_tokens": limit - 4, "ignore_eos": true, "n": 3});
    assert_eq!(narrow.post(TEXT, &fits).1["usage"]["completion_tokens"], 3 * (limit - 4));
    let flags = ["--kv-cache-memory-bytes", "64KiB", "--max-model-len", "128"];
    let said = format!("holds {limit} tokens, max_model_len is 128");
    fails(engine().args(["serve", "builtin:arith", "--port", "0"]).args(flags), 2, &said);
}

#[test]
fn row_25_memory_that_is_not_there_is_said_at_the_start() {
    let huge = ["serve", "builtin:arith", "--port", "0", "--kv-cache-memory-bytes", "900000GiB"];
    fails(engine().args(huge), 2, "keys and values 966367641600000 for sequences of");
}

/// A port that was free a moment ago.
fn free_port() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port().to_string()
}

#[test]
fn row_26_clients_of_a_killed_process_notice_and_it_starts_again_on_its_port() {
    let port = free_port();
    let mut server = Server::arith(&["--port", &port]);
    let body = json!({"prompt": "1", "n": 64, "max_tokens": 900, "ignore_eos": true,
        "stream": true});
    let mut stream = server.begin(TEXT, &body);
    let mut first = [0; 15];
    stream.read_exact(&mut first).unwrap();
    server.signal("-KILL");
    let mut rest = Vec::new();
    // Cut off: the end of the stream, or an error.
    let _cut = stream.read_to_end(&mut rest);
    assert!(!String::from_utf8_lossy(&rest).contains("[DONE]"));
    assert_eq!(server.ends_within(Duration::from_secs(5)).code(), None);
    let again = Server::arith(&["--port", &port]);
    again.is_well();
}

#[test]
fn row_29_the_number_of_threads_changes_no_token() {
    let [one, many] = ["1", "5"].map(|threads| {
        let server = Server::arith(&["--threads", threads]);
        let answers = together(&server, 6);
        // Alone, too.
        assert_eq!(together(&server, 1)[0], answers[0]);
        answers
    });
    assert_eq!(one, many);
}

#[test]
fn row_31_what_cannot_be_listened_on_is_said_within_a_second() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let cases = [
        (vec!["--port", port.as_str()], 1, format!("127.0.0.1:{port}: ")),
        (vec!["--host", "256.1.1.1"], 1, "256.1.1.1:8000: ".to_owned()),
        (vec!["--host", "192.0.2.7"], 1, "192.0.2.7:8000: ".to_owned()),
        (vec!["--host", ""], 1, ":8000: ".to_owned()),
        (vec!["--port", "70000"], 2, "70000".to_owned()),
        (vec!["--port", "x"], 2, "x".to_owned()),
    ];
    for (flags, code, said) in cases {
        let begun = Instant::now();
        let ran = crate::support::run(engine().args(["serve", "builtin:arith"]).args(&flags));
        assert!(begun.elapsed() < Duration::from_secs(10), "{flags:?}: {:?}", begun.elapsed());
        assert_eq!(ran.code, Some(code), "{flags:?}: {ran:?}");
        assert!(ran.stderr.contains(&said), "{flags:?}: {ran:?}");
        assert!(ran.stderr.lines().next().unwrap().starts_with("error: "), "{flags:?}: {ran:?}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn row_31_a_log_that_cannot_be_written_stops_nothing() {
    let port = free_port();
    let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    let mut command = engine();
    command.args(["serve", "builtin:arith", "--threads", "1", "--port", &port]);
    command.args(["--kv-cache-memory-bytes", "8MiB"]).stderr(full).stdout(Stdio::null());
    let mut child = command.spawn().unwrap();
    let ask = || {
        let mut stream = std::net::TcpStream::connect(format!("127.0.0.1:{port}")).ok()?;
        let head = "GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
        stream.write_all(head.as_bytes()).ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        Some(answer)
    };
    until("it serves", || ask().is_some());
    for _ in 0..3 {
        assert!(ask().unwrap().starts_with("HTTP/1.1 200"));
    }
    assert_eq!(child.try_wait().unwrap(), None);
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn row_32_sigterm_drains_and_newcomers_are_turned_away() {
    let mut server = Server::arith(&["--shutdown-timeout", "30"]);
    let body = json!({"prompt": "1", "n": 32, "max_tokens": 900, "ignore_eos": true,
        "stream": true});
    let mut stream = server.begin(TEXT, &body);
    let mut first = [0; 15];
    stream.read_exact(&mut first).unwrap();
    server.signal("-TERM");
    until("it drains", || server.get("/health").status == 503);
    let answer = server.ask(&format!("POST {TEXT}"), JSON, b"{\"prompt\": \"a\"}");
    assert_eq!((answer.status, &answer.json()["error"]["code"]), (503, &json!("draining")));
    assert!(!answer.header("retry-after").is_empty());
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();
    assert_eq!(rest.matches("\"finish_reason\":\"length\"").count(), 32);
    assert!(rest.contains("data: [DONE]"));
    assert_eq!(server.ends_within(Duration::from_secs(10)).code(), Some(0));
}

#[test]
fn row_32_what_outlasts_the_drain_is_aborted() {
    let mut server = Server::arith(&["--shutdown-timeout", "0", "--max-num-seqs", "2"]);
    let body = json!({"prompt": "1", "n": 128, "max_tokens": 1000, "ignore_eos": true,
        "stream": true});
    let mut stream = server.begin(TEXT, &body);
    let mut first = [0; 15];
    stream.read_exact(&mut first).unwrap();
    server.signal("-TERM");
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();
    assert!(
        rest.contains("\"finish_reason\":\"abort\"") && rest.contains("data: [DONE]"),
        "{rest}"
    );
    assert_eq!(server.ends_within(Duration::from_secs(10)).code(), Some(0));
}

#[test]
fn row_32_a_second_signal_ends_it_at_once() {
    for signals in [["-TERM", "-TERM"], ["-INT", "-TERM"]] {
        let mut server = Server::arith(&["--max-num-seqs", "2"]);
        let body = json!({"prompt": "1", "n": 128, "max_tokens": 1000, "ignore_eos": true});
        let _client = server.begin(TEXT, &body);
        until("it runs", || server.metric("engine_num_requests_running") > 0.0);
        server.signal(signals[0]);
        until("it drains", || server.get("/health").status == 503);
        server.signal(signals[1]);
        // To drain would take three times as long.
        assert_eq!(server.ends_within(Duration::from_secs(10)).code(), Some(130));
    }
}

#[test]
fn row_33_hangups_broken_pipes_and_a_closed_input_are_ignored() {
    // Its standard input is at its end from the start.
    let mut server = Server::arith(&[]);
    for signal in ["-HUP", "-PIPE", "-HUP"] {
        server.signal(signal);
        server.is_well();
    }
    assert_eq!(server.child.try_wait().unwrap(), None);
    server.signal("-TERM");
    assert_eq!(server.ends_within(Duration::from_secs(10)).code(), Some(0));
}
