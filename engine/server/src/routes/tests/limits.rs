//! Connections at their limits, over real sockets.

use super::*;
use crate::connection::Listener;
use crate::{Cors, Credentials, Limits, RequestLog};

/// A server behind a socket.
struct Open {
    address: std::net::SocketAddr,
    service: Arc<Service>,
    log: Arc<Mutex<Vec<LogEvent>>>,
    /// Dropped, it ends the server.
    _down: oneshot::Sender<()>,
}

async fn open(change: impl FnOnce(&mut ServerConfig)) -> Open {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let log = Arc::new(Mutex::new(Vec::new()));
    let mut config = ServerConfig::new("tiny");
    let sink = Arc::clone(&log);
    config.log = Some(Arc::new(move |event| sink.lock().unwrap().push(event.clone())));
    change(&mut config);
    let service = service();
    let (down, shutdown) = oneshot::channel::<()>();
    tokio::spawn(serve(Arc::clone(&service), config, listener, async {
        let _dropped = shutdown.await;
    }));
    Open { address, service, log, _down: down }
}

impl Open {
    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    /// Sends bytes on a connection of their own and reads until the server closes it.
    async fn send(&self, bytes: &[u8]) -> (u16, String, Value) {
        let mut stream = self.connect().await;
        // It may have closed already, with its answer on the way.
        let _closed = stream.write_all(bytes).await;
        answer(&mut stream).await
    }
}

/// The last answer of a connection that the server closes: status, head and body.
async fn answer(stream: &mut TcpStream) -> (u16, String, Value) {
    let mut bytes = Vec::new();
    let read = timeout(Duration::from_secs(20), stream.read_to_end(&mut bytes)).await;
    // A reset after the answer is a close too.
    let _reset = read.expect("the server closes the connection");
    let text = String::from_utf8(bytes).unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or_else(|| panic!("no head: {text:?}"));
    let body = serde_json::from_str(body).unwrap_or_default();
    (head[9..12].parse().unwrap(), head.to_owned(), body)
}

const HEALTH: &[u8] = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn heads_have_limits_and_answers_with_a_body() {
    let server = open(|config| {
        config.limits = Limits { max_header_bytes: 16 << 10, max_headers: 20, ..config.limits };
    })
    .await;
    let lines = |count: usize| (0..count).map(|i| format!("x-{i}: 1\r\n")).collect::<String>();
    let head = |rest: &str| format!("GET /health HTTP/1.1\r\n{rest}connection: close\r\n\r\n");
    assert_eq!(server.send(head(&lines(18)).as_bytes()).await.0, 200);
    let long = format!("x: {}\r\n", "a".repeat(17 << 10));
    let target = format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(17 << 10));
    let cases = [
        (head(&lines(40)), 431, "headers_too_large"),
        (head(&long), 431, "headers_too_large"),
        (target, 431, "headers_too_large"),
        ("GET / HTTP/1.1\r\nno colon\r\n\r\n".to_owned(), 400, "invalid_request"),
        ("\0\r\n\r\n".to_owned(), 400, "invalid_request"),
    ];
    for (request, status, code) in cases {
        let (got, head, body) = server.send(request.as_bytes()).await;
        assert_eq!((got, &body["error"]["code"]), (status, &json!(code)), "{head}");
        assert_eq!(body["error"]["type"], "invalid_request_error");
        assert!(head.contains("x-request-id: "), "{head}");
        assert_eq!(server.send(HEALTH).await.0, 200);
    }
    let roomy = open(|config| config.limits.max_header_bytes = 256 << 10).await;
    let target = format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(70_000));
    let (status, _, body) = roomy.send(target.as_bytes()).await;
    assert_eq!((status, &body["error"]["code"]), (414, &json!("uri_too_long")));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_heads_and_bodies_are_cut_off() {
    let server = open(|config| {
        let brief = Duration::from_millis(300);
        config.limits = Limits { header_timeout: brief, body_timeout: brief, ..config.limits };
    })
    .await;
    for sent in [&b""[..], b"GET /health HTTP/1.1\r\nx-slow: "] {
        let mut stream = server.connect().await;
        stream.write_all(sent).await.unwrap();
        let mut rest = Vec::new();
        let closed = timeout(Duration::from_secs(20), stream.read_to_end(&mut rest)).await;
        assert_eq!((closed.unwrap().unwrap(), rest.len()), (0, 0));
    }
    let head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n";
    for rest in ["content-length: 100\r\n\r\n{", "transfer-encoding: chunked\r\n\r\n1\r\n{\r\n"] {
        let (status, _, body) = server.send(format!("{head}{rest}").as_bytes()).await;
        assert_eq!((status, &body["error"]["code"]), (408, &json!("body_timeout")));
        assert_eq!(body["error"]["message"], "body did not come in time, limit is 0.3 s");
    }
    assert_eq!(server.send(HEALTH).await.0, 200);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_beyond_the_limit_are_told_so() {
    let server = open(|config| config.limits.max_connections = 3).await;
    let mut idle = Vec::new();
    for _ in 0..3 {
        let mut stream = server.connect().await;
        // Only a connection that has answered is surely taken in.
        stream.write_all(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n").await.unwrap();
        let mut first = [0; 12];
        stream.read_exact(&mut first).await.unwrap();
        assert_eq!(&first, b"HTTP/1.1 200");
        idle.push(stream);
    }
    for _ in 0..2 {
        let (status, head, body) = server.send(HEALTH).await;
        assert_eq!((status, &body["error"]["code"]), (503, &json!("too_many_connections")));
        assert!(head.contains("retry-after: 5"), "{head}");
    }
    idle.pop();
    let served = async {
        while server.send(HEALTH).await.0 != 200 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(Duration::from_secs(20), served).await.expect("a place comes free");
    let log = server.log.lock().unwrap();
    let full = log.iter().filter(|event| matches!(event, LogEvent::ConnectionsFull { limit: 3 }));
    assert!((1..=2).contains(&full.count()), "{log:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn idle_connections_are_in_nobodys_way() {
    let server = open(|_| {}).await;
    let mut idle = Vec::new();
    for _ in 0..300 {
        idle.push(server.connect().await);
    }
    assert_eq!(server.send(HEALTH).await.0, 200);
    assert_eq!(idle.len(), 300);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pipelined_requests_are_answered_in_their_order() {
    let server = open(|_| {}).await;
    let get = |path: &str, more: &str| format!("GET {path} HTTP/1.1\r\nhost: x\r\n{more}\r\n");
    let body = r#"{"prompt": "a", "max_tokens": 2}"#;
    let post = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n\
         content-length: {}\r\n\r\n{body}",
        body.len()
    );
    let all = [
        get("/health", "x-request-id: one\r\n"),
        post,
        get("/nowhere", "x-request-id: three\r\n"),
        get("/version", "x-request-id: four\r\nconnection: close\r\n"),
    ];
    let mut stream = server.connect().await;
    stream.write_all(all.concat().as_bytes()).await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    let statuses: Vec<&str> = text.split("HTTP/1.1 ").skip(1).map(|answer| &answer[..3]).collect();
    assert_eq!(statuses, ["200", "200", "404", "200"], "{text}");
    let places =
        ["x-request-id: one", "text_completion", "x-request-id: three", "x-request-id: four"]
            .map(|part| text.find(part).unwrap());
    assert!(places.is_sorted(), "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_stalls_is_cut_off_and_its_request_aborted() {
    let server = open(|config| config.limits.stall_timeout = Duration::from_millis(300)).await;
    let service = &server.service;
    // Log-probabilities make pieces large enough to fill the sockets' buffers.
    let room = service.max_model_len() - 2;
    let body = greedy(json!({"prompt": "a", "n": 64, "max_tokens": room, "stream": true,
        "logprobs": 20, "temperature": 1}));
    let mut stalled = server.connect().await;
    write_post(&mut stalled, &body).await;
    let mut first = [0; 12];
    stalled.read_exact(&mut first).await.unwrap();
    assert_eq!(&first, b"HTTP/1.1 200");
    let aborted = async {
        while service.status().running + service.status().waiting > 0 {
            // Others are served all the while.
            assert_eq!(server.send(HEALTH).await.0, 200);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(Duration::from_secs(60), aborted).await.expect("the request is aborted");
    let generated = service.status().generated_tokens;
    assert!(generated < 64 * room as u64, "it was aborted on its way");
    let stats = service.status().stats;
    assert_eq!((stats.used_blocks, stats.finished), (0, 0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn preflights_need_no_key_and_other_sites_need_permission() {
    let preflight = |origin: &str| {
        format!(
            "OPTIONS /v1/completions HTTP/1.1\r\nhost: x\r\norigin: {origin}\r\n\
             access-control-request-method: POST\r\n\
             access-control-request-headers: authorization\r\nconnection: close\r\n\r\n"
        )
    };
    let list = |entries: &[&str]| entries.iter().map(|entry| (*entry).to_owned()).collect();
    let server = open(|config| {
        config.api_keys = vec!["secret".to_owned()];
        config.cors = Some(Cors {
            origins: list(&["https://a.example"]),
            methods: list(&["POST"]),
            headers: list(&["authorization", "content-type"]),
            credentials: Credentials::Allow,
        });
    })
    .await;
    let (status, head, _) = server.send(preflight("https://a.example").as_bytes()).await;
    assert_eq!(status, 200);
    for line in [
        "access-control-allow-origin: https://a.example",
        "access-control-allow-methods: POST",
        "access-control-allow-headers: authorization,content-type",
        "access-control-allow-credentials: true",
    ] {
        assert!(head.contains(line), "{head}");
    }
    let (_, head, _) = server.send(preflight("https://b.example").as_bytes()).await;
    assert!(!head.contains("access-control-allow-origin"), "{head}");
    // A page can read why it was refused.
    let request = "GET /v1/models HTTP/1.1\r\nhost: x\r\norigin: https://a.example\r\n\
                   connection: close\r\n\r\n";
    let (status, head, _) = server.send(request.as_bytes()).await;
    assert_eq!(status, 401);
    assert!(head.contains("access-control-allow-origin: https://a.example"), "{head}");

    let closed = open(|_| {}).await;
    let (status, head, _) = closed.send(preflight("https://a.example").as_bytes()).await;
    assert_eq!(status, 405);
    assert!(!head.contains("access-control"), "{head}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_are_logged_without_what_they_say() {
    for (request_log, expected) in [(RequestLog::Off, 0), (RequestLog::Parameters, 1)] {
        let server = Server::with(|config| config.request_log = request_log);
        let body = json!({"prompt": "hush", "max_tokens": 2, "stop": ["secret"], "seed": 5});
        let mut request = post_request(TEXT, body.to_string());
        request.headers_mut().insert("x-request-id", "run-7".parse().unwrap());
        let answer = json_of(server.send(request).await).await;
        let log = server.log.lock().unwrap();
        assert!(!format!("{log:?}").contains("hush") && !format!("{log:?}").contains("secret"));
        let requests: Vec<_> =
            log.iter().filter(|event| matches!(event, LogEvent::Request { .. })).collect();
        assert_eq!(requests.len(), expected);
        let Some(LogEvent::Request { request_id, answer_id, prompt_tokens, parameters, .. }) =
            requests.first()
        else {
            continue;
        };
        assert_eq!((&request_id[..], *prompt_tokens), ("run-7", 4));
        assert_eq!(answer["id"], **answer_id);
        for pair in [("max_tokens", "2"), ("seed", "5"), ("stop_strings", "1")] {
            assert!(parameters.contains(&(pair.0, pair.1.to_owned())), "{parameters:?}");
        }
    }
}

#[tokio::test]
async fn a_unix_socket_serves_like_any_other() {
    let path = std::env::temp_dir().join(format!("engine-{}", crate::access::unique_name(0)));
    let public = Listener::Unix(tokio::net::UnixListener::bind(&path).unwrap());
    let (_down, shutdown) = oneshot::channel::<()>();
    let listeners = crate::Listeners { public, admin: None };
    tokio::spawn(serve(service(), ServerConfig::new("tiny"), listeners, async {
        let _dropped = shutdown.await;
    }));
    let mut stream = tokio::net::UnixStream::connect(&path).await.unwrap();
    stream.write_all(HEALTH).await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    assert!(text.starts_with("HTTP/1.1 200") && text.ends_with("{\"status\":\"ok\"}"), "{text}");
    std::fs::remove_file(&path).unwrap();
}

/// Held back, the requests would not end by themselves.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_leaves_is_noticed_whatever_came_behind_the_request() {
    let server = open(|_| {}).await;
    server.service.pause(engine::PauseMode::Keep).unwrap();
    let waits = async |waiting: usize| {
        let reached = async {
            while server.service.status().waiting != waiting {
                tokio::task::yield_now().await;
            }
        };
        timeout(Duration::from_secs(20), reached).await.expect("as many requests wait");
    };
    let next = String::from_utf8(HEALTH.to_vec()).unwrap();
    for behind in ["", "\r\n", &next, &next.repeat(100)] {
        for half in [true, false] {
            let mut client = server.connect().await;
            write_post(&mut client, &greedy(json!({"prompt": "a"}))).await;
            waits(1).await;
            client.write_all(behind.as_bytes()).await.unwrap();
            if half {
                client.shutdown().await.unwrap();
                waits(0).await;
            }
            drop(client);
            waits(0).await;
        }
    }
    // What was read ahead is answered in its turn.
    let mut client = server.connect().await;
    write_post(&mut client, &greedy(json!({"prompt": "a"}))).await;
    client.write_all(HEALTH).await.unwrap();
    waits(1).await;
    server.service.resume().unwrap();
    let mut text = String::new();
    client.read_to_string(&mut text).await.unwrap();
    let status = |line: &str| text.matches(line).count();
    assert_eq!(
        (status("HTTP/1.1 200"), text.ends_with("{\"status\":\"ok\"}")),
        (2, true),
        "{text}"
    );
}
