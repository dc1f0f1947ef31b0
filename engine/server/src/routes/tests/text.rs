//! Tokens in and out, metrics, and the queue's limit.

use engine::PauseMode;

use super::signs::metrics_of;
use super::*;

#[tokio::test]
async fn text_becomes_tokens_and_comes_back() {
    let server = Server::new();
    let (status, body) = server.post("/tokenize", &json!({"prompt": "héllo"})).await;
    assert_eq!(status, StatusCode::OK);
    let tokens = body["tokens"].clone();
    assert_eq!(body["count"], tokens.as_array().unwrap().len());
    assert_eq!(body["max_model_len"], server.app.service.max_model_len());
    assert_eq!(body["token_strs"], Value::Null);
    let plain = json!({"prompt": "héllo", "add_special_tokens": false, "return_token_strs": true});
    let (_, body) = server.post("/tokenize", &plain).await;
    // The tokenizer of the tests has a token for each byte.
    assert_eq!(body["count"], 6);
    assert_eq!(body["token_strs"].as_array().unwrap().len(), 6);
    let (status, back) = server.post("/detokenize", &json!({"tokens": body["tokens"]})).await;
    assert_eq!((status, &back["prompt"]), (StatusCode::OK, &json!("héllo")));
    let chat = json!({"messages": [{"role": "user", "content": "hi"}]});
    let (status, body) = server.post("/tokenize", &chat).await;
    assert_eq!(status, StatusCode::OK);
    assert!(body["count"].as_u64().unwrap() > 2);
}

#[tokio::test]
async fn a_conversation_counts_the_tokens_that_the_chat_runs() {
    let server = Server::new();
    let call = json!({"id": "c", "type": "function",
        "function": {"name": "f", "arguments": "{\"<s>\": 1}"}});
    let body = json!({"model": "tiny", "messages": [
        {"role": "user", "content": "hi", "name": null},
        {"role": "assistant", "content": null, "tool_calls": [call], "reasoning_content": "hm"},
        {"role": "tool", "content": "3", "tool_call_id": "c"},
    ], "tools": [{"type": "function", "function": {"name": "f"}}]});
    let (status, counted) = server.post("/tokenize", &body).await;
    assert_eq!(status, StatusCode::OK, "{counted}");
    let (_, answer) = server.post(CHAT, &greedy(body.clone())).await;
    assert_eq!(answer["usage"]["prompt_tokens"], counted["count"], "{answer}");
    let mut open = body;
    open["add_generation_prompt"] = json!(false);
    let (_, shorter) = server.post("/tokenize", &open).await;
    assert!(shorter["count"].as_u64() < counted["count"].as_u64(), "{shorter}");
    for (path, body) in [
        ("/tokenize", json!({"model": "other", "prompt": "a"})),
        ("/detokenize", json!({"model": "other", "tokens": [5]})),
    ] {
        assert_eq!(server.post(path, &body).await.0, StatusCode::NOT_FOUND, "{path}");
    }
}

#[tokio::test]
async fn a_text_that_cannot_fit_is_refused_before_it_is_tokenized() {
    let server = Server::new();
    let text = "a".repeat((1 << 20) + 1);
    let bodies = [
        (TEXT, json!({"prompt": text}), "prompt"),
        (TEXT, json!({"prompt": ["a", text]}), "prompt"),
        (CHAT, json!({"messages": [{"role": "user", "content": text}]}), "messages"),
    ];
    for (path, body, param) in bodies {
        let (status, answer) = server.post(path, &body).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{answer}");
        assert_eq!(answer["error"]["code"], "context_length_exceeded");
        assert_eq!(answer["error"]["param"], param);
        let said = answer["error"]["message"].as_str().unwrap();
        assert!(said.contains(" bytes, limit is "), "{said}");
    }
    // What is counted, or cut, may be longer.
    let (_, counted) = server.post("/tokenize", &json!({"prompt": text})).await;
    assert!(counted["count"].as_u64().unwrap() > 1 << 20);
    let cut = greedy(json!({"prompt": text, "truncate_prompt_tokens": 4}));
    assert_eq!(server.post(TEXT, &cut).await.0, StatusCode::OK);
}

#[tokio::test]
async fn of_a_list_the_first_prompt_that_cannot_fit_is_the_last_that_is_read() {
    let server = Server::new();
    let long = "a".repeat(server.app.service.max_model_len());
    // What is no prompt would be found behind it.
    for list in [json!(["a", long, {}]), json!([[5], vec![5; long.len()], {}])] {
        let (status, answer) = server.post(TEXT, &json!({"prompt": list})).await;
        let code = &answer["error"]["code"];
        assert_eq!((status.as_u16(), code), (400, &json!("context_length_exceeded")), "{answer}");
        let cut = json!({"prompt": list, "truncate_prompt_tokens": 4});
        let (status, answer) = server.post(TEXT, &cut).await;
        assert_eq!((status.as_u16(), &answer["error"]["code"]), (400, &json!("invalid_value")));
    }
}

#[tokio::test]
async fn texts_that_are_long_together_wait_for_their_turn() {
    let mut server = Server::new();
    let app = Arc::get_mut(&mut server.app).unwrap();
    app.encoding = crate::encode::Turns::new(0, Duration::ZERO);
    let text = "a".repeat(1 << 19);
    for (prompts, status) in [(vec![&text; 2], 200), (vec![&text; 3], 429)] {
        let body = json!({"prompt": prompts, "max_tokens": 1, "truncate_prompt_tokens": 4});
        assert_eq!(server.post(TEXT, &body).await.0.as_u16(), status);
    }
}

#[tokio::test]
async fn as_many_prompts_as_may_be_asked_for_are_answered_together() {
    let server = Server::new();
    let prompts: Vec<String> = (0..1024).map(|i| format!("p{i}")).collect();
    let body = greedy(json!({"prompt": prompts, "max_tokens": 80, "ignore_eos": true}));
    let (status, answer) = server.post(TEXT, &body).await;
    assert_eq!(status, StatusCode::OK, "{}", answer["error"]);
    assert_eq!(answer["choices"].as_array().unwrap().len(), 1024);
    assert_eq!(answer["usage"]["completion_tokens"], 80 * 1024);
    let (_, alone) = server
        .post(TEXT, &greedy(json!({"prompt": "p1000", "max_tokens": 80, "ignore_eos": true})))
        .await;
    assert_eq!(answer["choices"][1000]["text"], alone["choices"][0]["text"]);
}

#[tokio::test]
async fn of_several_prompts_one_that_is_refused_stops_all_and_aborts_nobody() {
    let server = Server::new();
    let (status, answer) =
        server.post(TEXT, &json!({"prompt": [[5, 6], [5, 99_999], [7]], "n": 4})).await;
    assert_eq!(status, StatusCode::BAD_REQUEST);
    let said = answer["error"]["message"].as_str().unwrap();
    assert!(said.starts_with("prompt has token 99999"), "{said}");
    let text = metrics_of(&server).await;
    let aborted = "engine_request_success_total{model_name=\"tiny\",finished_reason=\"abort\"} 0";
    assert!(text.contains(aborted), "{text}");
    let idle = greedy(json!({"prompt": "a", "max_tokens": 2}));
    assert_eq!(server.post(TEXT, &idle).await.0, StatusCode::OK);
}

#[tokio::test]
async fn what_cannot_be_tokenized_is_named() {
    let server = Server::new();
    for (path, body, param) in [
        ("/tokenize", json!({}), "prompt"),
        ("/tokenize", json!({"prompt": "a", "messages": []}), "prompt"),
        ("/tokenize", json!({"prompt": 3}), "prompt"),
        ("/detokenize", json!({}), "tokens"),
        ("/detokenize", json!({"tokens": [-1]}), "tokens"),
        ("/detokenize", json!({"tokens": [4_000_000]}), "tokens"),
    ] {
        let (status, answer) = server.post(path, &body).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{path} {body}");
        assert_eq!(answer["error"]["param"], param, "{path} {body}");
    }
}

#[tokio::test]
async fn token_ids_go_in_and_out_with_the_weights_that_drew_them() {
    let server = Server::new();
    let ids = [5, 6, 7];
    let params = json!({"temperature": 0, "max_tokens": 6, "ignore_eos": true, "n": 2});
    let body = json!({"model": "tiny", "token_ids": ids, "sampling_params": params});
    let (status, answer) = server.post("/inference/v1/generate", &body).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    let (_, same) = server
        .post(
            TEXT,
            &greedy(
                json!({"prompt": ids, "max_tokens": 6, "logprobs": 0, "return_token_ids": true}),
            ),
        )
        .await;
    for choice in answer["choices"].as_array().unwrap() {
        assert_eq!(choice["token_ids"], same["choices"][0]["token_ids"]);
        let bits = |list: &Value| -> Vec<u32> {
            let list = list.as_array().unwrap().iter();
            list.map(|x| (x.as_f64().unwrap() as f32).to_bits()).collect()
        };
        let logprobs = &same["choices"][0]["logprobs"]["token_logprobs"];
        assert_eq!(bits(&choice["logprobs"]), bits(logprobs));
        assert_eq!(choice["finish_reason"], "length");
        assert_eq!(choice["weight_versions"], json!([{"version": 0, "start": 0, "end": 6}]));
    }
    assert_eq!(answer["choices"].as_array().unwrap().len(), 2);
    assert_eq!(answer["usage"]["completion_tokens"], 12);
}

#[tokio::test]
async fn a_bad_request_for_tokens_names_its_field() {
    let server = Server::new();
    for (body, param) in [
        (json!({}), "token_ids"),
        (json!({"token_ids": "text"}), "token_ids"),
        (json!({"token_ids": [1], "stream": "yes"}), "stream"),
        (json!({"token_ids": [1], "sampling_params": 3}), "sampling_params"),
        (json!({"token_ids": [1], "sampling_params": {"prompt": "x"}}), "sampling_params"),
        (json!({"token_ids": [1], "sampling_params": {"temperature": -1}}), "temperature"),
        (json!({"token_ids": [], "sampling_params": {}}), "prompt"),
        (json!({"token_ids": [1], "n": "2"}), "n"),
    ] {
        let (status, answer) = server.post("/inference/v1/generate", &body).await;
        assert_eq!(status, StatusCode::BAD_REQUEST, "{body}");
        assert_eq!(answer["error"]["param"], param, "{body}");
    }
}

/// The value of the series that starts with `name`.
fn series(text: &str, name: &str) -> f64 {
    let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{name}"));
    line.rsplit(' ').next().unwrap().parse().unwrap()
}

#[tokio::test]
async fn metrics_count_what_was_served() {
    let server = Server::with(|config| config.metrics = crate::MetricsNames::Vllm);
    let (_, answer) = server.post(TEXT, &greedy(json!({"prompt": [5, 6, 7], "n": 2}))).await;
    assert_eq!(answer["usage"]["completion_tokens"], 16);
    let response = server.send(get_request("/metrics")).await;
    assert_eq!(response.headers()[header::CONTENT_TYPE], "text/plain; version=0.0.4");
    let text = text_of(response).await;
    for prefix in ["engine_", "vllm:"] {
        let value = |name: &str| series(&text, &format!("{prefix}{name}"));
        assert_eq!(value("prompt_tokens_total{"), 3.0);
        assert_eq!(value("generation_tokens_total{"), 16.0);
        assert_eq!(value("time_to_first_token_seconds_count"), 2.0);
        assert_eq!(value("inter_token_latency_seconds_count"), 14.0);
        assert_eq!(value("e2e_request_latency_seconds_count"), 2.0);
        assert_eq!(value("request_generation_tokens_bucket{model_name=\"tiny\""), 0.0);
        assert_eq!(value("request_generation_tokens_sum"), 16.0);
        assert_eq!(value("kv_cache_usage_perc"), 0.0);
    }
    let length = "engine_request_success_total{model_name=\"tiny\",finished_reason=\"length\"}";
    assert_eq!(series(&text, length), 2.0);
    let own = Server::new().send(get_request("/metrics")).await;
    assert!(!text_of(own).await.contains("vllm:"));
}

#[tokio::test]
async fn a_full_queue_turns_requests_away() {
    let server = Server::with(|config| config.max_queued_requests = Some(0));
    let body = greedy(json!({"prompt": "a", "max_tokens": 2}));
    assert_eq!(server.post(TEXT, &body).await.0, StatusCode::OK, "nothing has to wait");
    let service = Arc::clone(&server.app.service);
    tokio::task::spawn_blocking(move || service.pause(PauseMode::Keep)).await.unwrap().unwrap();
    let response = server.send(post_request(TEXT, body.to_string())).await;
    assert_eq!(response.status(), StatusCode::TOO_MANY_REQUESTS);
    assert!(response.headers().contains_key(header::RETRY_AFTER));
    let body = json_of(response).await;
    assert_eq!(body["error"]["type"], "rate_limit_error");
    assert_eq!(body["error"]["code"], "queue_full");
    assert_eq!(body["error"]["message"], "0 sequences wait, limit is 0");
}

#[tokio::test]
async fn the_version_is_the_packages() {
    let body = json_of(Server::new().send(get_request("/version")).await).await;
    assert_eq!(body["version"], env!("CARGO_PKG_VERSION"));
}

/// A server whose engine takes 20 ms for each batch.
pub(super) fn slow(change: impl FnOnce(&mut ServerConfig)) -> Server {
    let mut engine = engine();
    engine.inject_fault(|_| std::thread::sleep(Duration::from_millis(20)));
    let mut config = ServerConfig::new("tiny");
    change(&mut config);
    let app = App::new(Arc::new(Service::start(engine).unwrap()), config).unwrap();
    Server { app, log: Arc::default() }
}

#[tokio::test]
async fn a_request_that_takes_too_long_ends_with_504_and_is_counted() {
    let server = slow(|config| config.request_timeout = Some(Duration::from_millis(50)));
    let body = greedy(json!({"prompt": "a", "max_tokens": 200}));
    let (status, answer) = server.post(TEXT, &body).await;
    assert_eq!(status, StatusCode::GATEWAY_TIMEOUT);
    assert_eq!(answer["error"]["type"], "timeout_error");
    assert_eq!(answer["error"]["code"], "deadline_exceeded");
    assert_eq!(answer["error"]["message"], "request was not done in time, limit is 0.05 s");
    let text = text_of(server.send(get_request("/metrics")).await).await;
    let aborted = "engine_request_success_total{model_name=\"tiny\",finished_reason=\"abort\"}";
    assert_eq!(series(&text, aborted), 1.0);
    // In a stream, the status is out already: the error is its last event.
    let mut body = body;
    body["stream"] = json!(true);
    let events = server.events(TEXT, &body).await;
    assert_eq!(events.last().unwrap()["error"]["code"], "deadline_exceeded");
}

#[tokio::test]
async fn a_silent_stream_is_kept_open_by_comments() {
    let server = slow(|config| config.keep_alive = Duration::from_millis(1));
    let body = greedy(json!({"prompt": "a", "stream": true}));
    let text = text_of(server.send(post_request(TEXT, body.to_string())).await).await;
    assert!(text.contains(": keep-alive\n\n"), "{text}");
    let tokens = text.lines().filter(|line| line.starts_with("data: {")).count();
    assert!(tokens >= 8 && text.ends_with("data: [DONE]\n\n"), "{text}");
}

#[tokio::test]
async fn alternatives_come_with_token_ids() {
    let server = Server::new();
    let params = json!({"temperature": 0, "max_tokens": 2, "ignore_eos": true, "logprobs": 3});
    let body = json!({"token_ids": [5, 6], "sampling_params": params, "echo": false});
    let (status, answer) = server.post("/inference/v1/generate", &body).await;
    assert_eq!(status, StatusCode::OK, "{answer}");
    let choice = &answer["choices"][0];
    let top = choice["top_logprobs"][0].as_array().unwrap();
    assert!(top.len() >= 3);
    assert_eq!(top[0][0], choice["token_ids"][0]);
}
