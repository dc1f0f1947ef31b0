//! Rows 16 to 21 and 24: clients that do not read, leave, come too often, or show the wrong key.

use std::io::{BufRead, BufReader, Read};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::server::{CHAT, JSON, Server, TEXT, error_of, until};

/// Samples that keep the server busy for far longer than a test waits.
fn endless(change: Value) -> Value {
    let mut body = json!({"prompt": "12+34=", "n": 128, "max_tokens": 1000, "ignore_eos": true});
    body.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
    body
}

/// Two sequences at a time, so that `endless` has most of its samples wait.
const NARROW: [&str; 4] = ["--max-num-seqs", "2", "--max-num-batched-tokens", "16"];

fn running(server: &Server) -> (f64, f64) {
    let count = |name: &str| server.metric(&format!("engine_num_requests_{name}"));
    (count("running"), count("waiting"))
}

fn aborted(server: &Server) -> f64 {
    let text = server.get("/metrics").body;
    let lines = text.lines().filter(|line| {
        line.starts_with("engine_request_success_total") && line.contains("\"abort\"")
    });
    lines.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum()
}

#[cfg(target_os = "linux")]
#[test]
fn row_16_a_reader_that_stalls_is_given_up_and_holds_nobody_up() {
    // Room for others beside its 90 samples.
    let flags = ["--max-num-seqs", "160", "--kv-cache-memory-bytes", "256MiB"];
    let server = Server::arith(&flags);
    server.is_well();
    let before = server.memory("VmRSS");
    // It stalls for less than what ends a stalled connection.
    let body = endless(json!({"n": 90, "stream": true, "logprobs": 20}));
    let mut stalled = server.begin(TEXT, &body);
    let mut first = [0; 1];
    stalled.read_exact(&mut first).unwrap();
    until("it runs", || running(&server).0 > 0.0);
    // More than 70 MB were to come. What the sockets and the buffer do not take ends the request.
    let begun = Instant::now();
    while running(&server) != (0.0, 0.0) {
        let asked = Instant::now();
        server.is_well();
        assert!(asked.elapsed() < Duration::from_secs(5), "held up by {:?}", asked.elapsed());
        assert!(begun.elapsed() < Duration::from_secs(60), "the request goes on for nobody");
    }
    let drawn = server.metric("engine_generation_tokens_total");
    assert!(drawn < 90_000.0, "{drawn} tokens were drawn for nobody");
    let kept = server.memory("VmRSS").saturating_sub(before);
    assert!(kept < 256 << 20, "{kept} bytes are kept for it");
    assert_eq!(server.metric("engine_kv_cache_usage_perc"), 0.0);
    // Should it read on, it learns that its answer was cut.
    let lines = BufReader::new(stalled).lines().map_while(Result::ok);
    let data = lines.filter(|line| line.starts_with("data: "));
    let data: Vec<String> = data.take_while(|line| line != "data: [DONE]").collect();
    let error = data.last().unwrap();
    let error: Value = serde_json::from_str(&error["data: ".len()..]).unwrap();
    assert_eq!(error_of(&error)["type"], "internal_error");
    server.is_well();
}

#[test]
fn row_17_whoever_leaves_gives_everything_back_streaming_or_not() {
    let server = Server::arith(&NARROW);
    let mut given_up = 0.0;
    for stream in [true, false] {
        let mut client = server.begin(TEXT, &endless(json!({ "stream": stream })));
        if stream {
            let mut first = [0; 15];
            client.read_exact(&mut first).unwrap();
        }
        until("two samples run", || running(&server) == (2.0, 126.0));
        assert!(server.metric("engine_kv_cache_usage_perc") > 0.0);
        // One who waits behind it leaves first.
        let queued = server.begin(
            CHAT,
            &json!({"messages": [{"role": "user", "content": "1+1="}],
            "stream": stream}),
        );
        until("another waits", || running(&server).1 == 127.0);
        drop(queued);
        until("it waits no more", || running(&server).1 == 126.0);
        drop(client);
        server.wait_until_idle();
        given_up += 129.0;
        until("all are counted", || aborted(&server) == given_up);
        server.is_well();
    }
}

#[test]
fn row_17_whoever_leaves_while_a_prompt_is_read_gives_everything_back() {
    let server = Server::arith(&NARROW);
    // 64 prompts of 900 tokens, 16 tokens a step.
    let prompt = |i: u32| (0..900).map(|j| 20 + (i * 7 + j) % 200).collect::<Vec<u32>>();
    let prompts: Vec<_> = (0..64).map(prompt).collect();
    for stream in [true, false] {
        let body = json!({"prompt": prompts, "max_tokens": 100, "ignore_eos": true,
            "stream": stream});
        let client = server.begin(TEXT, &body);
        until("all have come", || running(&server).0 + running(&server).1 >= 50.0);
        assert!(server.metric("engine_kv_cache_usage_perc") > 0.0);
        drop(client);
        server.wait_until_idle();
        server.is_well();
    }
}

#[test]
fn row_19_requests_of_one_name_are_independent() {
    let server = Server::shared();
    let body = |seed: u64| {
        json!({"prompt": "1+1=", "max_tokens": 30, "ignore_eos": true, "seed": seed}).to_string()
    };
    let headers = format!("{JSON}x-request-id: same\r\n");
    let ask = |seed| server.ask(&format!("POST {TEXT}"), &headers, body(seed).as_bytes());
    let alone = [ask(1).json(), ask(2).json()];
    let together: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = [1, 2].map(|seed| scope.spawn(move || ask(seed))).into();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    for (answer, alone) in together.iter().zip(&alone) {
        assert_eq!((answer.status, answer.header("x-request-id").as_str()), (200, "same"));
        assert_eq!(answer.json()["choices"], alone["choices"]);
        assert_ne!(answer.json()["id"], alone["id"]);
    }
    assert_ne!(together[0].json()["id"], together[1].json()["id"]);
}

#[test]
fn row_20_wrong_keys_are_refused_and_never_logged() {
    let server = Server::arith(&["--api-key", "right-key-5261"]);
    let wrong = format!("Bearer wrong-key-{}", "9".repeat(6000));
    let shown =
        ["", "Bearer ", "Bearer right-key-526", "Basic right-key-5261", "right-key-5261", &wrong];
    let good = json!({"prompt": "1+1=", "max_tokens": 2}).to_string();
    let target = format!("POST {TEXT}");
    let right = format!("{JSON}authorization: Bearer right-key-5261\r\n");
    for shown in shown {
        let headers = match shown {
            "" => JSON.to_owned(),
            shown => format!("{JSON}authorization: {shown}\r\n"),
        };
        for target in [target.as_str(), "GET /v1/models", "GET /metrics", "GET /nothing"] {
            let answer = server.ask(target, &headers, good.as_bytes());
            assert_eq!(answer.status, 401, "{target}");
            assert_eq!(error_of(&answer.json())["code"], "invalid_api_key");
        }
        assert_eq!(server.ask(&target, &right, good.as_bytes()).status, 200);
    }
    for query in ["api_key=right-key-5261", "key=right-key-5261", "authorization=right-key-5261"] {
        let answer = server.ask(&format!("POST {TEXT}?{query}"), JSON, good.as_bytes());
        assert_eq!(answer.status, 401, "{query}");
    }
    assert_eq!(server.get("/health").status, 200);
    until("the requests are logged", || server.log().contains("\"/v1/completions\" 401"));
    let log = server.log();
    assert!(!log.contains("right-key") && !log.contains("wrong-key"), "{log}");
}

#[test]
fn row_21_unknown_fields_are_accepted_with_one_warning() {
    let server = Server::arith(&[]);
    let name = "n".repeat(100_000);
    let body = json!({"prompt": "1+1=", "max_tokens": 2, "zebra": {"a": 1}, name: 2, "a\nb": 3});
    for _ in 0..3 {
        let (status, answer) = server.post(TEXT, &body);
        assert_eq!(status, 200, "{answer}");
    }
    until("warnings", || server.log().contains("zebra"));
    assert_eq!(server.log().matches("zebra").count(), 1, "{}", server.log());
    assert!(server.log().lines().all(|line| line.len() < 300));
    assert!(server.log().contains("a\\nb"), "a line end is not a log's");
    server.is_well();
    drop(server);
    let strict = Server::arith(&["--strict-params"]);
    let error = strict.refuses(TEXT, &json!({"prompt": "1+1=", "max_tokens": 2, "zebra": 1}));
    assert_eq!(error["param"], "zebra");
}

#[test]
fn row_24_a_full_queue_turns_requests_away_until_there_is_room() {
    let server = Server::arith(&["--max-num-seqs", "1", "--max-queued-requests", "4"]);
    let client = server.begin(TEXT, &endless(json!({"n": 32})));
    until("the queue is full", || running(&server) == (1.0, 31.0));
    let body = json!({"prompt": "1+1=", "max_tokens": 2});
    for path in [TEXT, CHAT] {
        let mut body = body.clone();
        if path == CHAT {
            body = json!({"messages": [{"role": "user", "content": "1+1="}]});
        }
        let answer = server.ask(&format!("POST {path}"), JSON, body.to_string().as_bytes());
        assert_eq!(answer.status, 429, "{}", answer.body);
        let error = error_of(&answer.json());
        assert_eq!(
            (&error["type"], &error["code"]),
            (&json!("rate_limit_error"), &json!("queue_full"))
        );
        let wait: u64 = answer.header("retry-after").parse().unwrap();
        assert!((1..=60).contains(&wait), "{wait} s");
    }
    drop(client);
    server.wait_until_idle();
    server.is_well();
}
