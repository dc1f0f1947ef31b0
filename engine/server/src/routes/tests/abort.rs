//! Requests ended by name.

use super::text::slow;
use super::*;

const ABORT: &str = "/inference/v1/abort_requests";

/// A request under a name of the client's, and the name's header.
fn named(path: &str, name: &str, body: &Value) -> HttpRequest<HttpBody> {
    let mut request = post_request(path, body.to_string());
    request.headers_mut().insert("x-request-id", name.parse().unwrap());
    request
}

fn endless(server: &Server, extra: Value) -> Value {
    let mut body = greedy(extra);
    body["max_tokens"] = json!(server.app.service.max_model_len() - 64);
    body
}

/// Asks until the name is known.
async fn abort(server: &Server, name: &str) {
    loop {
        let (status, answer) =
            server.post(ABORT, &json!({"request_ids": [name, "other", name]})).await;
        assert_eq!(status, StatusCode::OK);
        if answer == json!({"aborted": [name]}) {
            return;
        }
        assert_eq!(answer, json!({"aborted": []}));
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whole_answers_end_with_what_there_is_and_give_their_blocks_back() {
    let server = slow(|_| {});
    let messages = json!([{"role": "user", "content": "hi"}]);
    for (path, extra) in [
        (TEXT, json!({"prompt": "a", "n": 2})),
        (CHAT, json!({"messages": messages})),
        ("/inference/v1/generate", json!({"token_ids": [5]})),
    ] {
        let body = endless(&server, extra);
        let (response, ()) =
            tokio::join!(server.send(named(path, "mine", &body)), abort(&server, "mine"));
        assert_eq!(response.status(), StatusCode::OK);
        let answer = json_of(response).await;
        for choice in answer["choices"].as_array().unwrap() {
            assert_eq!(choice["finish_reason"], "abort", "{answer}");
        }
        wait_until_idle(&server.app.service).await;
        assert_eq!(server.app.service.status().stats.used_blocks, 0);
        // What has ended is nobody's any more.
        let (_, again) = server.post(ABORT, &json!({"request_ids": ["mine"]})).await;
        assert_eq!(again, json!({"aborted": []}));
    }
    let text = text_of(server.send(get_request("/metrics")).await).await;
    let aborted = "engine_request_success_total{model_name=\"tiny\",finished_reason=\"abort\"} 4";
    assert!(text.lines().any(|line| line == aborted), "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_end_by_the_id_of_their_answer_and_others_go_on() {
    let server = slow(|_| {});
    let other = greedy(json!({"prompt": "b", "max_tokens": 12}));
    let first = endless(&server, json!({"prompt": "a", "stream": true, "request_id": "run-7"}));
    let response = server.send(post_request(TEXT, first.to_string())).await;
    let mut body = response.into_body().into_data_stream();
    let head = futures_util::StreamExt::next(&mut body).await.unwrap().unwrap();
    let head = String::from_utf8(head.to_vec()).unwrap();
    let event: Value =
        serde_json::from_str(head.lines().next().unwrap().strip_prefix("data: ").unwrap()).unwrap();
    let id = event["id"].as_str().unwrap();
    let ((status, answer), ()) = tokio::join!(server.post(TEXT, &other), abort(&server, id));
    assert_eq!(status, StatusCode::OK);
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    let mut rest = String::new();
    while let Some(bytes) = futures_util::StreamExt::next(&mut body).await {
        rest.push_str(std::str::from_utf8(&bytes.unwrap()).unwrap());
    }
    assert!(rest.contains("\"finish_reason\":\"abort\""), "{rest}");
    assert!(rest.ends_with("data: [DONE]\n\n"), "{rest}");
    wait_until_idle(&server.app.service).await;
    assert_eq!(server.app.service.status().stats.used_blocks, 0);

    // By the name in the body; a stream of token ids.
    let body = json!({"token_ids": [5], "stream": true, "request_id": "run-7",
        "sampling_params": {"max_tokens": 64, "ignore_eos": true}});
    let (events, ()) =
        tokio::join!(server.events("/inference/v1/generate", &body), abort(&server, "run-7"));
    let ends = events.iter().map(|event| &event["choices"][0]["finish_reason"]);
    assert_eq!(ends.filter(|end| end.is_string()).collect::<Vec<_>>(), ["abort"]);
}

#[tokio::test]
async fn a_request_that_the_engine_has_not_seen_yet_ends_when_it_does() {
    let server = Server::new();
    let visit = server.app.live.enter().unwrap();
    visit.name.also("early");
    let (_, answer) = server.post(ABORT, &json!({"request_ids": ["early"]})).await;
    assert_eq!(answer, json!({"aborted": ["early"]}));
    let body = endless(&server, json!({"prompt": "a"})).to_string();
    let fields = Fields::parse(body.as_bytes()).unwrap();
    let how = (Api::Completions, engine::LogprobsMode::Raw);
    let submitted = Job::start(&server.app, visit, how, fields).unwrap();
    let job = submitted.taken_in(&server.app).await.unwrap();
    let answer = json_of(whole(job).await.unwrap()).await;
    assert_eq!(answer["choices"][0]["finish_reason"], "abort");
}

#[tokio::test]
async fn only_names_are_taken_and_a_key_is_needed() {
    let server = Server::with(|config| config.api_keys = vec!["secret".to_owned()]);
    let response = server.send(post_request(ABORT, "{\"request_ids\": []}")).await;
    assert_eq!(response.status(), StatusCode::UNAUTHORIZED);
    let server = Server::new();
    let many = vec!["x"; 4097];
    for body in [
        json!({}),
        json!({"request_ids": "all"}),
        json!({"request_ids": [1]}),
        json!({"request_ids": many}),
    ] {
        let (status, answer) = server.post(ABORT, &body).await;
        assert_eq!(status, StatusCode::BAD_REQUEST);
        assert_eq!(answer["error"]["param"], "request_ids");
    }
    server.app.live.drain();
    let (status, answer) = server.post(ABORT, &json!({"request_ids": ["*", ""]})).await;
    assert_eq!((status, answer), (StatusCode::OK, json!({"aborted": []})));
    let server = Server::new();
    let (status, answer) =
        server.post(TEXT, &greedy(json!({"prompt": "a", "request_id": "a b"}))).await;
    assert_eq!((status.as_u16(), &answer["error"]["param"]), (400, &json!("request_id")));
}
