//! Pauses and new weights through the operator's routes.

use super::*;
use engine::PauseMode;

impl Server {
    /// Sends a request to the operator's listener.
    async fn admin(&self, request: HttpRequest<HttpBody>) -> (u16, Value) {
        let router = crate::admin::router(Arc::clone(&self.app));
        let response = router.oneshot(request).await.unwrap();
        (response.status().as_u16(), json_of(response).await)
    }

    async fn pause(&self, mode: &str) {
        let request = HttpRequest::post(format!("/pause?mode={mode}")).body(HttpBody::empty());
        let expected = json!({"status": "paused", "mode": mode});
        assert_eq!(self.admin(request.unwrap()).await, (200, expected));
    }

    async fn resume(&self) {
        let request = HttpRequest::post("/resume").body(HttpBody::empty());
        assert_eq!(self.admin(request.unwrap()).await, (200, json!({"status": "resumed"})));
    }

    async fn update(&self, path: &FilePath) -> (u16, Value) {
        let body = json!({"path": path.to_str().unwrap()});
        self.admin(post_request("/update_weights_from_disk", body.to_string())).await
    }

    /// Starts a request on a task of its own.
    fn begin(self: &Arc<Self>, body: Value) -> tokio::task::JoinHandle<(StatusCode, Value)> {
        let server = Arc::clone(self);
        tokio::spawn(async move { server.post(TEXT, &greedy(body)).await })
    }

    /// Waits until the service is as `state` wants it: running and waiting sequences.
    async fn until(&self, state: impl Fn(usize, usize) -> bool) {
        let reached = async {
            loop {
                let status = self.app.service.status();
                if state(status.running, status.waiting) {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        timeout(Duration::from_secs(30), reached).await.expect("the state is reached");
    }
}

/// A server whose steps take a millisecond at least, so that a long answer can be met on its way.
fn slow() -> Server {
    let mut engine = engine();
    engine.inject_fault(|_batch| std::thread::sleep(Duration::from_millis(1)));
    Server::of(Arc::new(Service::start(engine).unwrap()))
}

/// The same model with other numbers: those of its norms, scaled.
fn other_model() -> Dir {
    let dir = tiny_model();
    let path = dir.0.join("model.safetensors");
    let mut bytes = std::fs::read(&path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let tensor = &header["model.norm.weight"];
    let ends = &tensor["data_offsets"];
    let at = |end: usize| 8 + length + ends[end].as_u64().unwrap() as usize;
    let size = if tensor["dtype"] == "BF16" { 2 } else { 4 };
    // The sign bit of every second number of the last norm.
    for number in bytes[at(0)..at(1)].chunks_exact_mut(size).step_by(2) {
        number[size - 1] ^= 0x80;
    }
    std::fs::write(&path, bytes).unwrap();
    dir
}

fn tokens_of(answer: &Value) -> Value {
    answer["choices"][0]["token_ids"].clone()
}

#[tokio::test]
async fn admin_paths_are_forbidden_to_clients() {
    let server = Server::with(|config| config.api_keys = vec!["user".to_owned()]);
    for path in crate::admin::PATHS {
        for request in [get_request(path), post_request(path, "{}")] {
            let response = server.send(request).await;
            assert_eq!(response.status(), 403, "{path}");
            assert_eq!(json_of(response).await["error"]["type"], "permission_error");
        }
    }
}

#[tokio::test]
async fn the_operator_has_a_key_of_its_own() {
    let server = Server::with(|config| {
        config.api_keys = vec!["user".to_owned()];
        config.admin_api_keys = vec!["operator".to_owned()];
    });
    for (key, status, kind) in [
        ("Bearer user", 403, json!("permission_error")),
        ("Bearer other", 401, json!("authentication_error")),
        ("Bearer operator", 200, Value::Null),
    ] {
        let mut request = get_request("/is_paused");
        request.headers_mut().insert(header::AUTHORIZATION, key.parse().unwrap());
        let (got, answer) = server.admin(request).await;
        assert_eq!((got, &answer["error"]["type"]), (status, &kind), "{key}");
    }
    // Without a key, no page of another site may ask.
    let server = Server::new();
    let mut request = post_request("/pause", "");
    request.headers_mut().insert(header::ORIGIN, "https://example.org".parse().unwrap());
    let (status, answer) = server.admin(request).await;
    assert_eq!((status, &answer["error"]["type"]), (403, &json!("permission_error")));
    assert_eq!(server.admin(get_request("/is_paused")).await.1["is_paused"], false);
    assert_eq!(server.admin(get_request("/v1/models")).await.0, 404);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keep_freezes_what_runs_and_newcomers_wait() {
    let server = Arc::new(slow());
    let body = json!({"prompt": "a", "max_tokens": 600, "return_token_ids": true});
    let expected = server.post(TEXT, &greedy(body.clone())).await.1;
    // The answer is out before the state says that its request is over.
    server.until(|running, _| running == 0).await;
    let before = server.app.service.status().generated_tokens;
    let running = server.begin(body);
    server.until(|running, _| running == 1).await;
    server.pause("keep").await;
    let frozen = server.app.service.status();
    assert_eq!(frozen.pause, Some(PauseMode::Keep));
    assert!(frozen.generated_tokens < before + 600, "it was frozen on its way");
    let newcomer = server.begin(json!({"prompt": "q", "max_tokens": 3}));
    server.until(|running, waiting| (running, waiting) == (1, 1)).await;
    // Who leaves while all stands still gives up its place.
    let gone = server.begin(json!({"prompt": "w", "max_tokens": 3}));
    server.until(|running, waiting| (running, waiting) == (1, 2)).await;
    gone.abort();
    server.until(|running, waiting| (running, waiting) == (1, 1)).await;
    assert_eq!(server.app.service.status().generated_tokens, frozen.generated_tokens);
    let (_, state) = server.admin(get_request("/is_paused")).await;
    let expected_state = json!({"is_paused": true, "mode": "keep", "running": 1, "waiting": 1,
        "weights_version": 0});
    assert_eq!(state, expected_state);
    assert!(!running.is_finished() && !newcomer.is_finished());
    server.resume().await;
    let (status, answer) = running.await.unwrap();
    assert_eq!((status.as_u16(), tokens_of(&answer)), (200, tokens_of(&expected)));
    assert_eq!(newcomer.await.unwrap().1["usage"]["completion_tokens"], 3);
    assert_eq!(server.admin(get_request("/is_paused")).await.1["is_paused"], false);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wait_lets_those_finish_that_run() {
    let server = Arc::new(slow());
    let running = server.begin(json!({"prompt": "a", "max_tokens": 300}));
    server.until(|running, _| running == 1).await;
    let pausing = {
        let server = Arc::clone(&server);
        tokio::spawn(async move { server.pause("wait").await })
    };
    while server.app.service.status().pause.is_none() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let newcomer = server.begin(json!({"prompt": "q", "max_tokens": 3}));
    pausing.await.unwrap();
    let (_, answer) = running.await.unwrap();
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    assert_eq!(answer["usage"]["completion_tokens"], 300);
    server.until(|running, waiting| (running, waiting) == (0, 1)).await;
    assert!(!newcomer.is_finished());
    server.resume().await;
    assert_eq!(newcomer.await.unwrap().0, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn abort_ends_those_that_run_with_that_reason() {
    let server = Arc::new(Server::new());
    let room = server.app.service.max_model_len() - 2;
    let running = server.begin(json!({"prompt": "a", "max_tokens": room, "n": 2}));
    server.until(|running, _| running == 2).await;
    server.pause("abort").await;
    let (status, answer) = running.await.unwrap();
    assert_eq!(status, 200);
    for choice in answer["choices"].as_array().unwrap() {
        assert_eq!(choice["finish_reason"], "abort");
    }
    let newcomer = server.begin(json!({"prompt": "q", "max_tokens": 3}));
    server.until(|_, waiting| waiting == 1).await;
    // A second pause is one for those who came before the first.
    server.pause("abort").await;
    server.resume().await;
    let (_, answer) = newcomer.await.unwrap();
    assert_eq!(answer["choices"][0]["finish_reason"], "length");
    // The default, and what is not known.
    assert_eq!(server.admin(post_request("/pause", "")).await.1["mode"], "abort");
    server.resume().await;
    for path in ["/pause?mode=stop", "/pause?clear_cache=true", "/resume?mode=keep"] {
        let (status, answer) = server.admin(post_request(path, "")).await;
        let kind = &answer["error"]["type"];
        assert_eq!((status, kind), (400, &json!("invalid_request_error")), "{path}");
    }
    assert_eq!(server.admin(get_request("/is_paused")).await.1["is_paused"], false);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn new_weights_are_used_by_what_runs_and_by_what_comes() {
    let server = Arc::new(slow());
    let other = other_model();
    let body = json!({"prompt": "a".repeat(40), "max_tokens": 20, "return_token_ids": true});
    let (_, old) = server.post(TEXT, &greedy(body.clone())).await;
    // What the same weights say when they are loaded from the start.
    let fresh = Service::start(engine_of(&other)).unwrap();
    let expected = Server::of(Arc::new(fresh)).post(TEXT, &greedy(body.clone())).await.1;
    assert_ne!(tokens_of(&old), tokens_of(&expected), "the models differ");

    let long = json!({"prompt": "b", "max_tokens": 900, "return_token_ids": true});
    server.until(|running, _| running == 0).await;
    let running = server.begin(long);
    server.until(|running, _| running == 1).await;
    let (status, answer) = server.update(&other.0).await;
    assert_eq!((status, answer), (200, json!({"status": "updated", "weights_version": 1})));
    let (_, new) = server.post(TEXT, &greedy(body)).await;
    assert_eq!(tokens_of(&new), tokens_of(&expected));
    assert_eq!(new["usage"]["prompt_tokens_details"]["cached_tokens"], 0);
    assert_eq!(new["choices"][0]["weights_versions"], json!(vec![1; 20]));
    let (status, answer) = running.await.unwrap();
    assert_eq!(status, 200, "{answer}");
    let versions = answer["choices"][0]["weights_versions"].as_array().unwrap();
    let old = versions.iter().take_while(|version| **version == 0).count();
    assert!(0 < old && old < 900, "{old} tokens were drawn before");
    assert!(versions[old..].iter().all(|version| *version == 1));
    let updated = LogEvent::WeightsUpdated { version: 1 };
    assert!(server.log.lock().unwrap().contains(&updated));
}

#[tokio::test]
async fn weights_that_do_not_fit_leave_the_old_ones() {
    let server = Server::new();
    let body = greedy(json!({"prompt": "a", "return_token_ids": true}));
    let before = server.post(TEXT, &body).await.1;
    let wide = tiny_model();
    rewrite(&wide, "\"vocab_size\": 512", "\"vocab_size\": 511");
    let narrow = tiny_model();
    rewrite(&narrow, "\"rope_theta\": 10000.0", "\"rope_theta\": 5000.0");
    let broken = tiny_model();
    let weights = broken.0.join("model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    let end = bytes.len();
    bytes[end - 4..].fill(0xff);
    std::fs::write(&weights, bytes).unwrap();
    for (dir, part) in [
        (&wide.0, "tensor \"model.embed_tokens.weight\" has shape [512, 64], expected [511, 64]"),
        (&narrow.0, "rope is "),
        (&broken.0, " has NaN in row "),
        (&wide.0.join("nowhere"), "no such file or directory"),
    ] {
        let (status, answer) = server.update(dir).await;
        let error = &answer["error"];
        assert_eq!((status, &error["param"]), (400, &json!("path")), "{answer}");
        assert!(error["message"].as_str().unwrap().contains(part), "{answer}");
    }
    for (body, param) in [
        (json!({}), "path"),
        (json!({"path": 3}), "path"),
        (json!({"path": "x", "mode": "now"}), "mode"),
        (json!({"path": "x", "zebra": 1}), "zebra"),
    ] {
        let (status, answer) =
            server.admin(post_request("/update_weights_from_disk", body.to_string())).await;
        assert_eq!((status, &answer["error"]["param"]), (400, &json!(param)), "{answer}");
    }
    let after = server.post(TEXT, &body).await.1;
    assert_eq!(tokens_of(&before), tokens_of(&after));
    assert_eq!(server.app.service.status().version.0, 0);
}

/// Replaces a part of a model's configuration.
fn rewrite(dir: &Dir, from: &str, to: &str) {
    let path = dir.0.join("config.json");
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.contains(from));
    std::fs::write(&path, text.replace(from, to)).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_update_at_a_time_and_none_of_weights_in_training() {
    let server = Arc::new(slow());
    let other = other_model();
    let running = server.begin(json!({"prompt": "a", "max_tokens": 600}));
    server.until(|running, _| running == 1).await;
    let body = json!({"path": other.0.to_str().unwrap(), "mode": "wait"}).to_string();
    let first = {
        let (server, body) = (Arc::clone(&server), body.clone());
        tokio::spawn(
            async move { server.admin(post_request("/update_weights_from_disk", body)).await },
        )
    };
    while server.app.service.status().pause.is_none() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    for (path, body) in [("/update_weights_from_disk", &body[..]), ("/pause", ""), ("/resume", "")]
    {
        let (status, answer) = server.admin(post_request(path, body.to_owned())).await;
        assert_eq!((status, &answer["error"]["type"]), (409, &json!("conflict_error")), "{path}");
    }
    assert_eq!(first.await.unwrap().0, 200);
    assert_eq!(running.await.unwrap().1["usage"]["completion_tokens"], 600);
    assert_eq!(server.app.service.status().pause, None);

    let engine = engine();
    let (service, _guests) = Service::attach(&engine);
    let server = Server::of(Arc::new(service));
    for (status, answer) in
        [server.update(&other.0).await, server.admin(post_request("/pause", "")).await]
    {
        assert_eq!((status, &answer["error"]["type"]), (409, &json!("conflict_error")));
        assert!(answer["error"]["message"].as_str().unwrap().contains("in training"), "{answer}");
    }
}
