//! A listener stands in for a server of rewards.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};

use super::*;

/// A server that answers each request as `reply` says, until the listener's process ends; `None`: it
/// never answers.
fn server(reply: fn(&Value) -> Option<String>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}/score", listener.local_addr().unwrap());
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            std::thread::spawn(move || serve(stream.unwrap(), reply));
        }
    });
    address
}

fn serve(mut stream: TcpStream, reply: fn(&Value) -> Option<String>) {
    let mut lines = BufReader::new(stream.try_clone().unwrap());
    loop {
        let mut length = 0;
        loop {
            let mut line = String::new();
            if lines.read_line(&mut line).unwrap_or(0) == 0 {
                return;
            }
            let lower = line.to_lowercase();
            if let Some(value) = lower.strip_prefix("content-length:") {
                length = value.trim().parse().unwrap();
            }
            if line.trim().is_empty() {
                break;
            }
        }
        let mut body = vec![0; length];
        lines.read_exact(&mut body).unwrap();
        let Some(text) = reply(&serde_json::from_slice(&body).unwrap()) else {
            // Held open until whoever asked hangs up.
            let mut rest = Vec::new();
            let _hung_up = lines.read_to_end(&mut rest);
            return;
        };
        let status = if text.is_empty() { "500 Broken" } else { "200 OK" };
        let head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n", text.len());
        if stream.write_all(format!("{head}{text}").as_bytes()).is_err() {
            return;
        }
    }
}

#[test]
fn a_failure_is_told_though_the_server_owes_other_answers() {
    let start = Instant::now();
    let address = server(|request| (request["response"] != "hang").then(String::new));
    let patient = RewardConfig { timeout_s: 600.0, ..config(&address, OnError::Fail) };
    let error = judged(&patient, &["hang", "broken"]).0.unwrap_err().to_string();
    assert!(error.contains("it answered 500"), "{error}");
    assert!(start.elapsed().as_secs() < 300, "it waited for the server");
}

#[test]
fn a_server_judges_and_its_failures_are_counted() {
    let address = server(|request| match request["response"].as_str().unwrap() {
        "hang" => None,
        "broken" => Some(String::new()),
        "nan" => Some(format!("{{\"id\": {}, \"score\": NaN}}", request["id"])),
        response => {
            let right = response == request["ground_truth"];
            Some(json!({"id": request["id"], "score": f64::from(u8::from(right))}).to_string())
        }
    });
    let quick = RewardConfig { timeout_s: 2.0, ..config(&address, OnError::Value) };
    let (verdicts, counts) = judged(&quick, &["2", "3", "hang", "broken", "nan", "2"]);
    let verdicts = verdicts.unwrap();
    assert!(verdicts[3].predicted.contains("it answered 500"), "{verdicts:?}");
    assert!(verdicts[4].predicted.contains("not finite"), "{verdicts:?}");
    assert_eq!(scores(Ok(verdicts)), [1.0, 0.0, -0.5, -0.5, -0.5, 1.0]);
    assert_eq!(counts, Counts { failures: 3, timeouts: 1 });
}
