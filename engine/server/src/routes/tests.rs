//! The routes over a tiny random model with a tokenizer of bytes (id = byte + 3).

use std::path::{Path as FilePath, PathBuf};
use std::sync::Mutex;

use axum::body::{Body as HttpBody, to_bytes};
use axum::http::Request as HttpRequest;
use engine::{Engine, EngineConfig, ModelSource};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tower::ServiceExt;

use super::*;

mod abort;
mod admin;
mod limits;
mod openapi;
mod panics;
mod params;
mod responses;
mod signs;
mod structured;
mod text;
mod tokens;

/// A directory that is removed again.
struct Dir(PathBuf);

impl Drop for Dir {
    fn drop(&mut self) {
        // Left behind, it is in the way of nobody.
        let _left = std::fs::remove_dir_all(&self.0);
    }
}

/// Copies the golden model and the tokenizer of the tests into a new directory.
fn tiny_model() -> Dir {
    let data = FilePath::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data");
    let name = format!("engine-server-{}", crate::access::unique_name(0));
    let dir = Dir(std::env::temp_dir().join(name));
    std::fs::create_dir(&dir.0).unwrap();
    for (from, files) in [
        (
            "golden/models/tiny-llama",
            &["config.json", "generation_config.json", "model.safetensors"][..],
        ),
        ("tiny-text", &["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"][..]),
    ] {
        for file in files {
            std::fs::copy(data.join(from).join(file), dir.0.join(file)).unwrap();
        }
    }
    dir
}

fn engine() -> Engine {
    engine_of(&tiny_model())
}

fn engine_of(dir: &Dir) -> Engine {
    let source = ModelSource::open(&dir.0).unwrap();
    let config = EngineConfig {
        kv_cache_memory_bytes: Some(16 << 20),
        threads: Some(1),
        max_num_batched_tokens: 256,
        ..EngineConfig::default()
    };
    Engine::load(&source, &config).unwrap()
}

fn service() -> Arc<Service> {
    Arc::new(Service::start(engine()).unwrap())
}

struct Server {
    app: Arc<App>,
    log: Arc<Mutex<Vec<LogEvent>>>,
}

impl Server {
    fn new() -> Self {
        Self::with(|_| {})
    }

    fn with(change: impl FnOnce(&mut ServerConfig)) -> Self {
        Self::over(service(), change)
    }

    fn of(service: Arc<Service>) -> Self {
        Self::over(service, |_| {})
    }

    fn over(service: Arc<Service>, change: impl FnOnce(&mut ServerConfig)) -> Self {
        let log = Arc::new(Mutex::new(Vec::new()));
        let mut config = ServerConfig::new("tiny");
        config.default_params = Some(engine::SamplingParams::default());
        let sink = Arc::clone(&log);
        config.log = Some(Arc::new(move |event| sink.lock().unwrap().push(event.clone())));
        change(&mut config);
        Self { app: App::new(service, config).unwrap(), log }
    }

    async fn send(&self, request: HttpRequest<HttpBody>) -> Response {
        router(Arc::clone(&self.app)).oneshot(request).await.unwrap()
    }

    async fn post(&self, path: &str, body: &Value) -> (StatusCode, Value) {
        let response = self.send(post_request(path, body.to_string())).await;
        (response.status(), json_of(response).await)
    }

    /// The events of a stream, without `data: ` and without the closing `[DONE]`.
    async fn events(&self, path: &str, body: &Value) -> Vec<Value> {
        let response = self.send(post_request(path, body.to_string())).await;
        assert_eq!(response.headers()[header::CONTENT_TYPE], "text/event-stream");
        let text = text_of(response).await;
        let rest = text.strip_suffix("data: [DONE]\n\n").unwrap();
        let events =
            rest.split_terminator("\n\n").map(|event| event.strip_prefix("data: ").unwrap());
        events.map(|event| serde_json::from_str(event).unwrap()).collect()
    }
}

fn post_request(path: &str, body: impl Into<HttpBody>) -> HttpRequest<HttpBody> {
    let request = HttpRequest::post(path).header("content-type", "application/json");
    request.body(body.into()).unwrap()
}

fn get_request(path: &str) -> HttpRequest<HttpBody> {
    HttpRequest::get(path).body(HttpBody::empty()).unwrap()
}

async fn text_of(response: Response) -> String {
    let bytes = to_bytes(response.into_body(), 1 << 24).await.unwrap();
    String::from_utf8(bytes.to_vec()).unwrap()
}

async fn json_of(response: Response) -> Value {
    serde_json::from_str(&text_of(response).await).unwrap()
}

/// Greedy and without an end, so that lengths are known.
fn greedy(extra: Value) -> Value {
    let mut body = json!({"model": "tiny", "temperature": 0, "ignore_eos": true, "max_tokens": 8});
    let fields = extra.as_object().unwrap().clone();
    body.as_object_mut().unwrap().extend(fields);
    body
}

fn chat(extra: Value) -> Value {
    let mut body = greedy(extra);
    body["messages"] = json!([{"role": "user", "content": "hi"}]);
    body
}

const CHAT: &str = "/v1/chat/completions";
const TEXT: &str = "/v1/completions";

#[tokio::test]
async fn models_and_health() {
    let server = Server::new();
    let list = json_of(server.send(get_request("/v1/models")).await).await;
    assert_eq!(list["object"], "list");
    assert_eq!(list["data"][0]["id"], "tiny");
    assert_eq!(list["data"][0]["max_model_len"], server.app.service.max_model_len());
    assert_eq!(server.send(get_request("/v1/models/tiny")).await.status(), 200);
    assert_eq!(server.send(get_request("/v1/models/other")).await.status(), 404);
    assert_eq!(server.send(get_request("/health")).await.status(), 200);
    server.app.live.drain();
    let response = server.send(get_request("/health")).await;
    assert_eq!(response.status(), 503);
    assert_eq!(response.headers()["retry-after"], "5");
    assert_eq!(json_of(response).await["error"]["code"], "draining");
    let (status, body) = server.post(TEXT, &greedy(json!({"prompt": "a"}))).await;
    assert_eq!((status.as_u16(), &body["error"]["type"]), (503, &json!("unavailable_error")));
}

#[tokio::test]
async fn chat_whole_and_streamed_say_the_same() {
    let server = Server::new();
    let (status, whole) =
        server.post(CHAT, &chat(json!({"logprobs": true, "top_logprobs": 2}))).await;
    assert_eq!(status, 200, "{whole}");
    assert_eq!(whole["object"], "chat.completion");
    assert!(whole["id"].as_str().unwrap().starts_with("chatcmpl-"));
    let choice = &whole["choices"][0];
    assert_eq!(choice["finish_reason"], "length");
    assert_eq!(choice["message"]["role"], "assistant");
    let tokens = choice["logprobs"]["content"].as_array().unwrap();
    assert_eq!(tokens.len(), 8);
    for token in tokens {
        assert_eq!(token["top_logprobs"].as_array().unwrap().len(), 2);
        assert!(token["logprob"].as_f64().unwrap() <= 0.0);
        assert!(token["bytes"].is_array());
    }
    // "[user] hi\n[assistant] ", one token a byte.
    assert_eq!(whole["usage"]["prompt_tokens"], 22);
    assert_eq!(whole["usage"]["completion_tokens"], 8);
    assert_eq!(whole["usage"]["total_tokens"], 30);

    let body = chat(json!({"stream": true, "stream_options": {"include_usage": true},
        "logprobs": true, "top_logprobs": 2}));
    let events = server.events(CHAT, &body).await;
    assert_eq!(events[0]["object"], "chat.completion.chunk");
    assert_eq!(events[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    let (last, pieces) = events.split_last().unwrap();
    assert_eq!((&last["choices"], &last["usage"]["total_tokens"]), (&json!([]), &json!(30)));
    let mut text = String::new();
    let mut streamed = Vec::new();
    for piece in pieces {
        for key in ["id", "created", "model", "object"] {
            assert_eq!(piece[key], events[0][key]);
        }
        assert_eq!(piece["usage"], Value::Null);
        let choice = &piece["choices"][0];
        text.push_str(choice["delta"]["content"].as_str().unwrap_or_default());
        streamed.extend(choice["logprobs"]["content"].as_array().cloned().unwrap_or_default());
    }
    assert_eq!(choice["message"]["content"], text);
    assert_eq!(tokens, &streamed);
    assert_eq!(pieces.last().unwrap()["choices"][0]["finish_reason"], "length");
}

#[tokio::test]
async fn completions_take_every_form_of_prompt() {
    let server = Server::new();
    // "ab" is the tokens 100 and 101.
    let forms = [json!("ab"), json!([100, 101]), json!(["ab"]), json!([[100, 101]])];
    let mut texts = Vec::new();
    for prompt in forms {
        let body = greedy(json!({"prompt": prompt, "return_token_ids": true}));
        let (status, answer) = server.post(TEXT, &body).await;
        assert_eq!(status, 200, "{answer}");
        assert_eq!(answer["object"], "text_completion");
        assert_eq!(answer["choices"][0]["prompt_token_ids"], json!([100, 101]));
        assert_eq!(answer["choices"][0]["token_ids"].as_array().unwrap().len(), 8);
        texts.push(answer["choices"][0]["text"].clone());
    }
    assert!(texts.iter().all(|text| *text == texts[0]));
    let body = greedy(json!({"prompt": ["ab", [104]], "n": 2, "logprobs": 1, "max_tokens": 3}));
    let (_, answer) = server.post(TEXT, &body).await;
    let choices = answer["choices"].as_array().unwrap();
    assert_eq!(choices.iter().map(|c| &c["index"]).collect::<Vec<_>>(), [0, 1, 2, 3]);
    assert_eq!(choices[0]["text"], choices[1]["text"], "greedy samples of one prompt");
    assert_eq!(answer["usage"]["prompt_tokens"], 3);
    assert_eq!(answer["usage"]["completion_tokens"], 12);
    let logprobs = &choices[3]["logprobs"];
    for key in ["tokens", "token_logprobs", "top_logprobs", "text_offset"] {
        assert_eq!(logprobs[key].as_array().unwrap().len(), 3, "{key}");
    }
    let chosen = logprobs["tokens"][0].as_str().unwrap();
    let [top, own] =
        [&logprobs["top_logprobs"][0][chosen], &logprobs["token_logprobs"][0]].map(|x| x.as_f64());
    assert!((top.unwrap() - own.unwrap()).abs() < 1e-5, "{logprobs}");
}

#[tokio::test]
async fn a_completion_stream_covers_all_choices() {
    let server = Server::new();
    let whole = greedy(json!({"prompt": ["ab", "q"], "logprobs": 0}));
    let (_, answer) = server.post(TEXT, &whole).await;
    let mut body = whole;
    body["stream"] = json!(true);
    let events = server.events(TEXT, &body).await;
    for index in 0..2 {
        let mine = || events.iter().map(|e| &e["choices"][0]).filter(|c| c["index"] == index);
        let text: String = mine().map(|c| c["text"].as_str().unwrap()).collect();
        assert_eq!(answer["choices"][index]["text"], text);
        assert_eq!(mine().next_back().unwrap()["finish_reason"], "length");
        let offsets = mine()
            .filter(|c| c["logprobs"].is_object())
            .map(|c| c["logprobs"]["text_offset"][0].clone());
        assert_eq!(
            answer["choices"][index]["logprobs"]["text_offset"],
            Value::Array(offsets.collect())
        );
        assert!(events.iter().all(|event| event.get("usage").is_none()));
    }
}

#[tokio::test]
async fn faults_are_answered_in_one_form_and_the_next_request_is_served() {
    let server = Server::new();
    let long = "a".repeat(server.app.service.max_model_len());
    let cases = [
        (json!({"temperature": "hot"}), 400, "temperature", "invalid_value"),
        (json!({"temperature": -1}), 400, "temperature", "invalid_value"),
        (json!({"top_p": 1.5}), 400, "top_p", "invalid_value"),
        (json!({"n": 0}), 400, "n", "invalid_value"),
        (json!({"n": 1_000_000}), 400, "n", "invalid_value"),
        (json!({"logprobs": 21}), 400, "logprobs", "invalid_value"),
        (json!({"stop": [""]}), 400, "stop", "invalid_value"),
        (json!({"stop_token_ids": [512]}), 400, "stop_token_ids", "invalid_value"),
        (json!({"logit_bias": {"9": 101}}), 400, "logit_bias", "invalid_value"),
        (json!({"prompt": []}), 400, "prompt", "invalid_value"),
        (json!({"prompt": [[[1]]]}), 400, "prompt", "invalid_value"),
        (json!({"prompt": [600]}), 400, "prompt", "invalid_value"),
        (json!({"prompt": [-1]}), 400, "prompt", "invalid_value"),
        (json!({"prompt": ""}), 400, "prompt", "invalid_value"),
        (json!({"prompt": long}), 400, "prompt", "context_length_exceeded"),
        (
            json!({"max_tokens": 9_223_372_036_854_775_807_u64}),
            400,
            "prompt",
            "context_length_exceeded",
        ),
        (json!({"stream_options": {}}), 400, "stream_options", "invalid_value"),
        (json!({"best_of": 4}), 400, "best_of", "unsupported_parameter"),
        (json!({"model": "gpt-4"}), 404, "model", "model_not_found"),
    ];
    for (change, status, param, code) in cases {
        let mut body = greedy(json!({"prompt": "a"}));
        body.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        let (got, answer) = server.post(TEXT, &body).await;
        let error = &answer["error"];
        assert_eq!(got.as_u16(), status, "{change}: {answer}");
        assert_eq!((&error["param"], &error["code"]), (&json!(param), &json!(code)), "{change}");
        assert!(error["message"].as_str().unwrap().len() > 5 && error["type"].is_string());
        let (ok, _) = server.post(TEXT, &greedy(json!({"prompt": "a", "max_tokens": 1}))).await;
        assert_eq!(ok, 200);
    }
    let tools = greedy(json!({"prompt": "a", "tools": [{"type": "function"}]}));
    let (status, answer) = server.post(TEXT, &tools).await;
    assert_eq!((status.as_u16(), &answer["error"]["param"]), (400, &json!("tools")));
}

#[tokio::test]
async fn transport_faults_have_the_same_form() {
    let server = Server::with(|config| config.max_body_bytes = 100);
    let mut plain = post_request(TEXT, "{}");
    plain.headers_mut().insert(header::CONTENT_TYPE, "text/plain".parse().unwrap());
    let cases = [
        (get_request("/v2/nothing"), 404, "not_found"),
        (get_request(TEXT), 405, "method_not_allowed"),
        (post_request(TEXT, "x".repeat(101)), 413, "body_too_large"),
        (post_request(TEXT, "{\"prompt\": "), 400, "invalid_json"),
        (post_request(TEXT, "\u{feff}{}"), 400, "invalid_json"),
        (post_request(TEXT, &b"{\"prompt\": \"\xff\"}"[..]), 400, "invalid_json"),
        (post_request(TEXT, "{\"temperature\": 1e400}"), 400, "invalid_json"),
        (post_request(TEXT, "{\"temperature\": NaN}"), 400, "invalid_json"),
        (plain, 415, "unsupported_media_type"),
    ];
    for (request, status, code) in cases {
        let response = server.send(request).await;
        assert_eq!(response.status().as_u16(), status, "{code}");
        assert_eq!(response.headers()["x-request-id"].len(), 32);
        assert_eq!(json_of(response).await["error"]["code"], code);
    }
}

#[tokio::test]
async fn keys_guard_everything_but_health() {
    let server = Server::with(|config| config.api_keys = vec!["secret".to_owned()]);
    for path in ["/v1/models", "/nothing"] {
        let response = server.send(get_request(path)).await;
        assert_eq!(response.status(), 401);
        assert_eq!(json_of(response).await["error"]["code"], "invalid_api_key");
    }
    assert_eq!(server.send(get_request("/health")).await.status(), 200);
    let mut request = get_request("/v1/models");
    request.headers_mut().insert(header::AUTHORIZATION, "Bearer secret".parse().unwrap());
    request.headers_mut().insert("x-request-id", "run-7".parse().unwrap());
    let response = server.send(request).await;
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers()["x-request-id"], "run-7");
}

#[tokio::test]
async fn unknown_fields_are_reported_once_and_seeds_reproduce() {
    let server = Server::new();
    let body = json!({"prompt": "a", "seed": 5, "zebra": 1, "max_tokens": 8, "ignore_eos": true,
        "return_token_ids": true, "user": "me"});
    let mut answers = Vec::new();
    for _ in 0..2 {
        answers.push(server.post(TEXT, &body).await.1["choices"][0]["token_ids"].clone());
    }
    assert_eq!(answers[0], answers[1]);
    let log = server.log.lock().unwrap();
    let unknown = log.iter().filter(|event| matches!(event, LogEvent::UnknownField { .. }));
    let expected = LogEvent::UnknownField { name: "zebra".to_owned() };
    assert_eq!(unknown.collect::<Vec<_>>(), [&expected]);
}

#[tokio::test]
async fn dropping_an_answer_aborts_its_request() {
    let server = Server::new();
    let room = server.app.service.max_model_len() - 2;
    let endless = greedy(json!({"prompt": "a", "max_tokens": room, "stream": true}));
    let response = server.send(post_request(TEXT, endless.to_string())).await;
    assert_eq!(server.app.live.visits(), 1);
    assert_eq!(server.app.live.named.running(), 1);
    drop(response);
    server.app.live.idle().await;
    assert_eq!(server.app.live.named.running(), 0);
    wait_until_idle(&server.app.service).await;
}

/// Waits until nothing runs or waits; far sooner than the request could have ended by itself.
async fn wait_until_idle(service: &Service) {
    let idle = async {
        loop {
            let status = service.status();
            if status.running + status.waiting == 0 {
                return status.generated_tokens;
            }
            tokio::task::yield_now().await;
        }
    };
    let tokens = timeout(Duration::from_secs(20), idle).await.expect("the request was aborted");
    assert!(tokens < service.max_model_len() as u64 / 2, "{tokens} tokens were generated");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_real_client_leaves_and_the_server_drains() {
    let service = service();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (down, shutdown) = oneshot::channel::<()>();
    let mut config = ServerConfig::new("tiny");
    config.shutdown_timeout = Duration::from_millis(20);
    let running = tokio::spawn(serve(Arc::clone(&service), config, listener, async {
        shutdown.await.unwrap();
    }));
    let room = service.max_model_len() - 2;
    // Not streamed: the client hears nothing before it leaves.
    let mut gone = TcpStream::connect(address).await.unwrap();
    write_post(&mut gone, &greedy(json!({"prompt": "a", "max_tokens": room}))).await;
    while service.status().running == 0 {
        tokio::task::yield_now().await;
    }
    drop(gone);
    wait_until_idle(&service).await;

    // A stream that outlasts the drain ends as one, with the reason.
    let mut slow = TcpStream::connect(address).await.unwrap();
    let body = greedy(json!({"prompt": "a", "max_tokens": room, "n": 16, "stream": true}));
    write_post(&mut slow, &body).await;
    let mut head = [0; 15];
    slow.read_exact(&mut head).await.unwrap();
    assert_eq!(&head, b"HTTP/1.1 200 OK");
    down.send(()).unwrap();
    let mut rest = String::new();
    slow.read_to_string(&mut rest).await.unwrap();
    assert!(rest.contains("\"finish_reason\":\"abort\""), "{rest}");
    assert!(rest.contains("data: [DONE]\n\n"));
    running.await.unwrap().unwrap();
}

async fn write_post(stream: &mut TcpStream, body: &Value) {
    let body = body.to_string();
    let head = format!(
        "POST {TEXT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all((head + &body).as_bytes()).await.unwrap();
}
