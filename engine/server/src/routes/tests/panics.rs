//! What clients see of a panic in the engine: a 500 for the offender, and 503 when the engine is lost.

use super::*;
use crate::error::ErrorKind;

/// The byte `~` as a token.
const POISON: u32 = b'~' as u32 + 3;

fn app(fault: impl FnMut(&[&[u32]]) + Send + 'static) -> Arc<App> {
    let mut engine = engine();
    engine.inject_fault(fault);
    App::new(Arc::new(Service::start(engine).unwrap()), ServerConfig::new("tiny")).unwrap()
}

#[tokio::test]
async fn the_request_that_makes_a_step_panic_gets_500_and_the_server_lives_on() {
    let app = app(|batch| assert!(batch.iter().all(|t| !t.contains(&POISON)), "secret"));
    let server = Server { app, log: Arc::default() };
    for _ in 0..3 {
        let [good, bad] = ["good", "~bad"].map(|prompt| greedy(json!({"prompt": prompt})));
        let request = post_request(TEXT, bad.to_string());
        let (good, bad) = tokio::join!(server.post(TEXT, &good), server.send(request));
        assert_eq!((good.0, &good.1["usage"]["completion_tokens"]), (StatusCode::OK, &json!(8)));
        assert_eq!(bad.status(), StatusCode::INTERNAL_SERVER_ERROR);
        assert!(bad.headers().contains_key("x-request-id"));
        let expected = json!({"error": {"message": "generation failed", "type": "internal_error",
            "param": null, "code": "internal_error"}});
        assert_eq!(json_of(bad).await, expected);
        assert_eq!(server.send(get_request("/health")).await.status(), StatusCode::OK);
    }
    let bad = greedy(json!({"prompt": "~", "stream": true}));
    let events = server.events(TEXT, &bad).await;
    assert_eq!(events.last().unwrap()["error"]["code"], "internal_error");
    assert_eq!(server.app.service.status().stats.used_blocks, 0);
}

#[tokio::test]
async fn an_engine_at_fault_turns_health_to_503_and_ends_the_server() {
    let mut engine = engine();
    engine.inject_fault(|batch| assert!(batch.len() < 2, "secret"));
    let service = Arc::new(Service::start(engine).unwrap());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let forever = std::future::pending();
    let server = tokio::spawn(serve(service, ServerConfig::new("tiny"), listener, forever));
    let ask = async |head: &str, body: &str| {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let length = body.len();
        let request = format!(
            "{head} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: application/json\r\n\
             content-length: {length}\r\n\r\n{body}"
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    };
    assert!(ask("GET /health", "").await.starts_with("HTTP/1.1 200"));
    let two = greedy(json!({"prompt": "x", "n": 2})).to_string();
    let answer = ask("POST /v1/completions", &two).await;
    assert!(answer.starts_with("HTTP/1.1 500") && !answer.contains("secret"), "{answer}");
    assert!(ask("GET /health", "").await.starts_with("HTTP/1.1 503"));
    assert!(ask("POST /v1/completions", &two).await.starts_with("HTTP/1.1 503"));
    let error = server.await.unwrap().unwrap_err();
    assert_eq!(
        (error.kind(), error.to_string().as_str()),
        (ErrorKind::Engine, "engine: a step panicked twice")
    );
}
