//! What the server says of itself: series, the dashboard over them, log lines, and its heart.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::mpsc::channel;

use engine::Host;

use super::*;
use crate::{LoadReport, MetricsNames};

/// The value of a series, by its whole name and labels.
fn value(text: &str, series: &str) -> f64 {
    let prefix = format!("{series} ");
    let line = text.lines().find(|line| line.starts_with(&prefix));
    let line = line.unwrap_or_else(|| panic!("{series} in\n{text}"));
    line[prefix.len()..].parse().unwrap()
}

pub(super) async fn metrics_of(server: &Server) -> String {
    text_of(server.send(get_request("/metrics")).await).await
}

#[tokio::test]
async fn requests_are_measured_from_their_queue_to_their_end() {
    let server = Server::with(|config| config.metrics = MetricsNames::Vllm);
    let whole = greedy(json!({"prompt": [[5, 6, 7], [8, 9]], "n": 2, "max_tokens": 6}));
    assert_eq!(server.post(TEXT, &whole).await.0, 200);
    let mut free = greedy(json!({"prompt": [5], "stop_token_ids": [3]}));
    free["logit_bias"] = json!({"3": 100.0});
    free.as_object_mut().unwrap().remove("max_tokens");
    assert_eq!(server.post(TEXT, &free).await.0, 200);
    let text = metrics_of(&server).await;
    for (prefix, label) in
        [("engine_", "model_name=\"tiny\""), ("vllm:", "model_name=\"tiny\",engine=\"0\"")]
    {
        let of = |name: &str| value(&text, &format!("{prefix}{name}{{{label}}}"));
        for name in ["queue", "prefill", "decode", "inference"] {
            assert_eq!(of(&format!("request_{name}_time_seconds_count")), 5.0, "{name}");
        }
        let [queue, prefill, decode, inference, e2e] = [
            "request_queue_time_seconds_sum",
            "request_prefill_time_seconds_sum",
            "request_decode_time_seconds_sum",
            "request_inference_time_seconds_sum",
            "e2e_request_latency_seconds_sum",
        ]
        .map(of);
        assert!((prefill + decode - inference).abs() < 1e-6, "{prefill} {decode} {inference}");
        assert!(decode > 0.0 && queue + inference <= e2e, "{queue} {inference} {e2e}");
        // Where nothing is said, completions have at most 16 tokens.
        assert_eq!(of("request_params_max_tokens_count"), 3.0);
        assert_eq!(of("request_params_max_tokens_sum"), 28.0);
        assert_eq!(of("request_max_num_generation_tokens_count"), 3.0);
        assert_eq!(of("request_max_num_generation_tokens_sum"), 13.0);
        assert_eq!(of("request_generation_tokens_sum"), 25.0);
        // All positions but the last of each sample, and what was guessed wrong; the samples of a prompt may read
        // it together.
        let [guessed, right] = ["draft_tokens", "accepted_tokens"]
            .map(|what| of(&format!("spec_decode_num_{what}_total")));
        assert!(right <= guessed, "{right} of {guessed}");
        let computed = of("iteration_tokens_total_sum") - (guessed - right);
        assert!((5.0 + 1.0 + 20.0..=10.0 + 1.0 + 20.0).contains(&computed), "{computed}");
        assert_eq!(of("nan_logits_total"), 0.0);
        let plan = server.app.service.memory_plan();
        let info = format!(
            "{prefix}cache_config_info{{{label},block_size=\"16\",cache_dtype=\"bf16\",\
             enable_prefix_caching=\"True\",kv_cache_memory_bytes=\"{}\",num_gpu_blocks=\"{}\"}}",
            plan.kv_bytes, plan.kv_blocks
        );
        assert_eq!(value(&text, &info), 1.0);
    }
}

#[tokio::test]
async fn http_is_counted_by_patterns_of_routes() {
    let server = Server::with(|config| config.metrics = MetricsNames::Vllm);
    let body = greedy(json!({"prompt": "a"})).to_string();
    let mut request = post_request(TEXT, body.clone());
    request.headers_mut().insert(header::CONTENT_LENGTH, body.len().into());
    let whole = text_of(server.send(request).await).await.len();
    let stream = greedy(json!({"prompt": "a", "stream": true})).to_string();
    let streamed = text_of(server.send(post_request(TEXT, stream)).await).await.len();
    for path in ["/v1/models/tiny", "/v1/models/other", "/secret/1", "/secret/2"] {
        server.send(get_request(path)).await;
    }
    let odd = HttpRequest::builder().method("BREW").uri(TEXT).body(HttpBody::empty()).unwrap();
    assert_eq!(server.send(odd).await.status(), 405);
    let text = metrics_of(&server).await;
    let completions = "handler=\"/v1/completions\"";
    let post = format!("{completions},method=\"POST\"");
    for (series, expected) in [
        (format!("engine_http_requests_total{{{post},status=\"200\"}}"), 2.0),
        (format!("http_requests_total{{{post},status=\"2xx\"}}"), 2.0),
        (
            format!("engine_http_requests_total{{{completions},method=\"other\",status=\"405\"}}"),
            1.0,
        ),
        (format!("engine_http_request_duration_seconds_count{{{post}}}"), 2.0),
        (format!("http_request_duration_seconds_bucket{{{post},le=\"+Inf\"}}"), 2.0),
        (format!("engine_http_request_size_bytes_sum{{{completions}}}"), body.len() as f64),
        (format!("engine_http_response_size_bytes_count{{{completions}}}"), 3.0),
    ] {
        assert_eq!(value(&text, &series), expected, "{series}");
    }
    let bytes = value(&text, &format!("engine_http_response_size_bytes_sum{{{completions}}}"));
    assert!(bytes > (whole + streamed) as f64, "{bytes} of {whole}, {streamed} and an error");
    let models = "handler=\"/v1/models/{*name}\",method=\"GET\"";
    let none = "handler=\"none\",method=\"GET\"";
    for (label, expected) in [
        (format!("{models},status=\"200\""), 1.0),
        (format!("{models},status=\"404\""), 1.0),
        (format!("{none},status=\"404\""), 2.0),
    ] {
        assert_eq!(value(&text, &format!("engine_http_requests_total{{{label}}}")), expected);
    }
    assert!(!text.contains("secret"), "{text}");
}

#[tokio::test]
async fn an_answer_whose_client_leaves_is_a_499() {
    let server = Server::new();
    let room = server.app.service.max_model_len() - 2;
    let endless = greedy(json!({"prompt": "a", "max_tokens": room, "stream": true}));
    drop(server.send(post_request(TEXT, endless.to_string())).await);
    server.app.live.idle().await;
    let whole = post_request(TEXT, greedy(json!({"prompt": "a", "max_tokens": room})).to_string());
    // Left before there is a head.
    assert!(timeout(Duration::from_millis(5), server.send(whole)).await.is_err());
    server.app.live.idle().await;
    let text = metrics_of(&server).await;
    let label = "handler=\"/v1/completions\",method=\"POST\",status=\"499\"";
    assert_eq!(value(&text, &format!("engine_http_requests_total{{{label}}}")), 2.0);
    let log = server.log.lock().unwrap();
    let gone = log.iter().filter_map(|event| match event {
        LogEvent::Answered { status: 499, path, request_id, .. } => {
            Some((path.as_str(), request_id.len()))
        }
        _ => None,
    });
    assert_eq!(gone.collect::<Vec<_>>(), [(TEXT, 32), (TEXT, 1)]);
}

#[tokio::test]
async fn failures_are_ends_of_their_own() {
    let mut engine = engine();
    let spoilt = b'~' as u32 + 3;
    engine.inject_fault(move |batch| {
        assert!(batch.iter().all(|tokens| !tokens.contains(&spoilt)), "injected");
    });
    let service = Arc::new(Service::start(engine).unwrap());
    let app = App::new(service, ServerConfig::new("tiny")).unwrap();
    let server = Server { app, log: Arc::default() };
    for (prompt, expected) in [("~", 500), ("a", 200)] {
        assert_eq!(server.post(TEXT, &greedy(json!({"prompt": prompt}))).await.0, expected);
    }
    let text = metrics_of(&server).await;
    for (reason, expected) in [("stop", 0.0), ("length", 1.0), ("abort", 0.0), ("error", 1.0)] {
        let label = format!("model_name=\"tiny\",finished_reason=\"{reason}\"");
        assert_eq!(value(&text, &format!("engine_request_success_total{{{label}}}")), expected);
    }
}

#[tokio::test]
async fn logits_that_are_no_numbers_fail_their_request_alone() {
    // A head of its own: a bad row of the embeddings reaches only prompts that have its token.
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/data/golden/models/tiny-qwen3");
    let config = EngineConfig {
        kv_cache_memory_bytes: Some(16 << 20),
        threads: Some(1),
        ..EngineConfig::default()
    };
    let mut engine =
        Engine::load(&ModelSource::open(FilePath::new(model)).unwrap(), &config).unwrap();
    let mut update = engine.begin_update().unwrap();
    let embed = &mut update.decoder().0.weights.embed;
    let mut row = vec![0.0; embed.cols()];
    row[1] = f32::NAN;
    embed.full_mut().set_row(77, &row);
    drop(update);
    let mut config = ServerConfig::new("tiny");
    config.default_params = Some(engine::SamplingParams::default());
    let app = App::new(Arc::new(Service::start(engine).unwrap()), config).unwrap();
    let server = Server { app, log: Arc::default() };
    let ask = |prompt: [u32; 3]| {
        greedy(json!({"prompt": prompt, "logit_bias": {"77": -100.0}, "return_token_ids": true}))
    };
    let (good, bad) = (ask([20, 21, 22]), ask([20, 77, 22]));
    let alone = server.post(TEXT, &good).await.1;
    let (good, bad) = tokio::join!(server.post(TEXT, &good), server.post(TEXT, &bad));
    assert_eq!((good.0.as_u16(), bad.0.as_u16()), (200, 500));
    assert_eq!(good.1["choices"][0]["token_ids"], alone["choices"][0]["token_ids"]);
    assert_eq!(good.1["usage"]["completion_tokens"], 8);
    assert_eq!(bad.1["error"]["code"], "internal_error");
    let text = metrics_of(&server).await;
    assert_eq!(value(&text, "engine_nan_logits_total{model_name=\"tiny\"}"), 1.0);
    let error = "engine_request_success_total{model_name=\"tiny\",finished_reason=\"error\"}";
    assert_eq!(value(&text, error), 1.0);
    assert_eq!(server.send(get_request("/health")).await.status(), 200);
}

/// Names of series as `/metrics` declares them, those of a histogram or summary by their suffixes.
fn declared(text: &str) -> BTreeSet<String> {
    let types = text.lines().filter_map(|line| line.strip_prefix("# TYPE "));
    let kinds: BTreeMap<&str, &str> = types.map(|line| line.split_once(' ').unwrap()).collect();
    let suffixes = |kind: &str| match kind {
        "histogram" => &["_bucket", "_sum", "_count"][..],
        "summary" => &["_sum", "_count"],
        _ => &[""],
    };
    let names = kinds.iter().flat_map(|(name, kind)| {
        suffixes(kind).iter().map(move |suffix| format!("{name}{suffix}"))
    });
    names.collect()
}

/// Words of a query that look like our series.
fn series_in(query: &str) -> BTreeSet<String> {
    let words = query.split(|c: char| !(c.is_ascii_alphanumeric() || "_:".contains(c)));
    words.filter(|word| word.starts_with("engine_")).map(str::to_owned).collect()
}

#[tokio::test]
async fn the_dashboard_asks_for_series_that_exist() {
    let board: Value =
        serde_json::from_str(include_str!("../../../grafana/dashboard.json")).unwrap();
    let server = Server::new();
    let known = declared(&metrics_of(&server).await);
    let mut asked = BTreeSet::new();
    let mut ids = BTreeSet::new();
    for panel in board["panels"].as_array().unwrap() {
        assert!(ids.insert(panel["id"].as_u64().unwrap()), "{panel}");
        let place = &panel["gridPos"];
        assert!(place["x"].as_u64().unwrap() + place["w"].as_u64().unwrap() <= 24, "{panel}");
        if panel["type"] == "row" {
            continue;
        }
        assert_eq!(panel["datasource"]["uid"], "${datasource}");
        let targets = panel["targets"].as_array().unwrap();
        assert!(!targets.is_empty(), "{panel}");
        for target in targets {
            let names = series_in(target["expr"].as_str().unwrap());
            assert!(!names.is_empty(), "{target}");
            asked.extend(names);
        }
    }
    let variables = board["templating"]["list"].as_array().unwrap();
    assert_eq!(
        variables.iter().map(|v| v["name"].as_str().unwrap()).collect::<Vec<_>>(),
        ["datasource", "model_name"]
    );
    asked.extend(series_in(variables[1]["definition"].as_str().unwrap()));
    assert_eq!(asked.difference(&known).collect::<Vec<_>>(), Vec::<&String>::new());
    // What an operator looks for first is there.
    for name in [
        "engine_generation_tokens_total",
        "engine_time_to_first_token_seconds_bucket",
        "engine_inter_token_latency_seconds_bucket",
        "engine_num_requests_running",
        "engine_num_requests_waiting",
        "engine_kv_cache_usage_perc",
        "engine_prefix_cache_hits_total",
        "engine_num_preemptions_total",
        "engine_http_requests_total",
        "engine_weights_version",
    ] {
        assert!(asked.contains(name), "{name}");
    }
}

#[tokio::test]
async fn every_family_is_declared_once_and_together() {
    let server = Server::with(|config| config.metrics = MetricsNames::Vllm);
    server.post(TEXT, &greedy(json!({"prompt": "a"}))).await;
    let text = metrics_of(&server).await;
    let mut seen = BTreeSet::new();
    let mut family = String::new();
    for line in text.lines() {
        if let Some(declaration) = line.strip_prefix("# TYPE ") {
            family = declaration.split(' ').next().unwrap().to_owned();
            assert!(seen.insert(family.clone()), "{family} twice");
        } else if !line.starts_with('#') {
            assert!(line.starts_with(&family), "{line} stands under {family}");
            assert!(line.rsplit(' ').next().unwrap().parse::<f64>().is_ok(), "{line}");
        }
    }
    assert!(seen.len() > 50, "{seen:?}");
}

#[tokio::test]
async fn the_load_is_logged_while_there_is_work() {
    let log: Arc<Mutex<Vec<LoadReport>>> = Arc::default();
    let sink = Arc::clone(&log);
    let mut config = ServerConfig::new("tiny");
    config.log_stats = Some(Duration::from_millis(10));
    config.log = Some(Arc::new(move |event| {
        if let LogEvent::Load(report) = event {
            sink.lock().unwrap().push(*report);
        }
    }));
    let app = App::new(service(), config).unwrap();
    let server = Server { app: Arc::clone(&app), log: Arc::default() };
    let reporting = tokio::spawn(async move { load_report::reports(&app).await });
    sleep(Duration::from_millis(50)).await;
    assert_eq!(*log.lock().unwrap(), [], "idle");
    let body = greedy(json!({"prompt": "abc", "max_tokens": 200}));
    assert_eq!(server.post(TEXT, &body).await.0, 200);
    let some = async {
        while log.lock().unwrap().is_empty() {
            tokio::task::yield_now().await;
        }
    };
    timeout(Duration::from_secs(20), some).await.unwrap();
    // The interval that saw the end.
    sleep(Duration::from_millis(50)).await;
    let reported = log.lock().unwrap().len();
    sleep(Duration::from_millis(50)).await;
    let log = log.lock().unwrap();
    assert_eq!(log.len(), reported, "idle again");
    assert!(log.iter().any(|report| report.prompt_tokens_per_s > 0.0), "{log:?}");
    assert!(log.iter().any(|report| report.generation_tokens_per_s > 0.0), "{log:?}");
    assert!(log.iter().all(|report| (0.0..=1.0).contains(&report.kv_usage)), "{log:?}");
    reporting.abort();
}

/// Asks until the answer has this status.
async fn health_becomes(server: &Server, status: u16) -> Value {
    let asked = async {
        loop {
            let response = server.send(get_request("/health")).await;
            if response.status().as_u16() == status {
                return json_of(response).await;
            }
            sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(Duration::from_secs(20), asked).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_step_that_hangs_turns_health_to_503_until_it_ends() {
    let mut engine = engine();
    let (release, released) = channel::<()>();
    let mut hangs = true;
    engine.inject_fault(move |_| {
        if std::mem::replace(&mut hangs, false) {
            released.recv().unwrap();
        }
    });
    let mut config = ServerConfig::new("tiny");
    // More than the pause between two looks for work of an idle engine.
    config.heartbeat_timeout = Some(Duration::from_secs(1));
    let app = App::new(Arc::new(Service::start(engine).unwrap()), config).unwrap();
    let server = Arc::new(Server { app, log: Arc::default() });
    assert_eq!(server.send(get_request("/health")).await.status(), 200);
    let asking = Arc::clone(&server);
    let asked =
        tokio::spawn(async move { asking.post(TEXT, &greedy(json!({"prompt": "a"}))).await });
    let body = health_becomes(&server, 503).await;
    assert_eq!(body["error"]["type"], "unavailable_error");
    assert_eq!(body["error"]["code"], "engine_stalled");
    assert_eq!(body["error"]["message"], "engine has finished no step for over 1 s");
    release.send(()).unwrap();
    let (status, answer) = asked.await.unwrap();
    assert_eq!((status.as_u16(), &answer["usage"]["completion_tokens"]), (200, &json!(8)));
    assert_eq!(health_becomes(&server, 200).await, json!({"status": "ok"}));
}

#[tokio::test]
async fn a_run_that_trains_is_no_stall_and_one_that_stops_sampling_is() {
    let mut engine = engine();
    let (service, mut guests) = Service::attach(&engine);
    let mut config = ServerConfig::new("tiny");
    let limit = Duration::from_millis(20);
    config.heartbeat_timeout = Some(limit);
    let app = App::new(Arc::new(service), config).unwrap();
    let server = Server { app, log: Arc::default() };
    sleep(2 * limit).await;
    assert_eq!(server.send(get_request("/health")).await.status(), 200, "not begun");
    let mut host = Host::new(&mut engine, Some(&mut guests));
    host.step().unwrap();
    assert_eq!(health_becomes(&server, 503).await["error"]["code"], "engine_stalled");
    let update = host.begin_update().unwrap();
    sleep(2 * limit).await;
    assert_eq!(server.send(get_request("/health")).await.status(), 200, "an update takes its time");
    drop(update);
    sleep(2 * limit).await;
    assert_eq!(server.send(get_request("/health")).await.status(), 200, "so does a checkpoint");
}

/// A server over an engine that nobody drives yet.
fn away(engine: &Engine, change: impl FnOnce(&mut ServerConfig)) -> (Server, engine::Guests) {
    let (service, guests) = Service::attach(engine);
    (Server::over(Arc::new(service), change), guests)
}

#[tokio::test]
async fn the_time_of_a_request_is_over_also_while_the_engine_is_away() {
    let mut engine = engine();
    let limit = Duration::from_millis(20);
    let (server, mut guests) = away(&engine, |config| config.request_timeout = Some(limit));
    for (path, body) in [
        (TEXT, greedy(json!({"prompt": "a"}))),
        (CHAT, chat(json!({"stream": true}))),
        ("/v1/responses", json!({"input": "hi"})),
        ("/inference/v1/generate", json!({"token_ids": [5]})),
    ] {
        let asked = timeout(Duration::from_secs(20), server.post(path, &body)).await;
        let (status, answer) = asked.expect("it is answered in time");
        assert_eq!((status.as_u16(), &answer["error"]["code"]), (504, &json!("deadline_exceeded")));
    }
    // The engine finds nobody waiting.
    assert_eq!(guests.step(&mut engine).unwrap(), []);
    assert!(!engine.has_work());
    drop(guests);
    let (status, answer) = server.post(TEXT, &greedy(json!({"prompt": "a"}))).await;
    assert_eq!((status.as_u16(), &answer["error"]["code"]), (503, &json!("engine_dead")));
}

#[tokio::test]
async fn what_an_engine_that_is_away_has_not_taken_in_waits_too() {
    let mut engine = engine();
    let (server, mut guests) = away(&engine, |config| config.max_queued_requests = Some(3));
    let two = greedy(json!({"prompt": "a", "n": 2, "max_tokens": 2}));
    let mut first = Box::pin(server.post(TEXT, &two));
    let soon = Duration::from_millis(20);
    assert!(timeout(soon, &mut first).await.is_err());
    // Those that still find room wait, too, also when nobody waits for them any more.
    let full = async {
        loop {
            match timeout(soon, server.post(TEXT, &two)).await {
                Err(_waits) => {}
                Ok(answer) => return answer,
            }
        }
    };
    let (status, answer) = timeout(Duration::from_secs(20), full).await.expect("it is full");
    assert_eq!((status.as_u16(), &answer["error"]["type"]), (429, &json!("rate_limit_error")));
    let run = async {
        loop {
            guests.step(&mut engine).unwrap();
            tokio::task::yield_now().await;
        }
    };
    let (status, _) = tokio::select! { () = run => unreachable!(), answer = first => answer };
    assert_eq!(status.as_u16(), 200);
}

#[test]
fn requests_that_wait_for_an_engine_that_is_away_take_no_thread_from_others() {
    let mut threads = tokio::runtime::Builder::new_current_thread();
    let runtime = threads.max_blocking_threads(1).enable_all().build().unwrap();
    runtime.block_on(async {
        let mut engine = engine();
        let (server, mut guests) = away(&engine, |_| {});
        let body = greedy(json!({"prompt": "a"}));
        let tokenize = async {
            let body = json!({"prompt": "ab"});
            let asked = timeout(Duration::from_secs(20), server.post("/tokenize", &body)).await;
            let (status, _) = asked.expect("a thread is free");
            assert_eq!(status, 200);
            // The engine comes back.
            while server.app.live.visits() > 0 {
                guests.step(&mut engine).unwrap();
                tokio::task::yield_now().await;
            }
        };
        // It asks first.
        let ((status, answer), ()) = tokio::join!(server.post(TEXT, &body), tokenize);
        assert_eq!((status.as_u16(), &answer["usage"]["completion_tokens"]), (200, &json!(8)));
    });
}

#[tokio::test]
async fn who_leaves_before_hearing_that_a_request_was_taken_in_aborts_it() {
    let mut engine = engine();
    let (server, mut guests) = away(&engine, |_| {});
    let params = engine::SamplingParams {
        eos: engine::EosRule::Ignore,
        max_tokens: Some(64),
        ..Default::default()
    };
    let request = engine::Request::new(vec![5], params);
    let generation = crate::generation::Generation::submit(&server.app, vec![request], 1);
    guests.step(&mut engine).unwrap();
    assert!(engine.has_work());
    let drawn = server.app.service.status().generated_tokens;
    drop(generation);
    guests.step(&mut engine).unwrap();
    assert!(!engine.has_work());
    assert_eq!(server.app.service.status().generated_tokens, drawn);
}
