//! The document against the router, and against what reads the fields.

use std::collections::BTreeSet;

use engine::SamplingParams;

use super::*;
use crate::fields::{Fields, asked};
use crate::openapi::{document, properties};
use crate::{refused, responses};

type Names = BTreeSet<String>;

/// The routes as they are written in the router: method and path.
fn written() -> Names {
    let source: String = include_str!("../../routes.rs").split_whitespace().collect();
    let (_, router) = source.split_once("fnrouter(").unwrap();
    let (router, _) = router.split_once(".with_state(").unwrap();
    let routes = router.split(".route(\"").skip(1);
    let named = routes.flat_map(|route| {
        let (path, rest) = route.split_once("\",").unwrap();
        let path = path.replace("{*", "{");
        let methods = ["get", "post", "put", "delete"];
        let with = methods.into_iter().filter(move |m| {
            rest.starts_with(&format!("{m}(")) || rest.contains(&format!(").{m}("))
        });
        with.map(move |method| format!("{method} {path}")).collect::<Vec<_>>()
    });
    named.collect()
}

#[test]
fn every_route_is_documented_and_the_other_way_round() {
    let document = document();
    assert_eq!(
        (&document["openapi"], &document["info"]["version"]),
        (&json!("3.1.0"), &json!(env!("CARGO_PKG_VERSION")))
    );
    let documented: Names = document["paths"]
        .as_object()
        .unwrap()
        .iter()
        .flat_map(|(path, methods)| {
            methods.as_object().unwrap().keys().map(move |method| format!("{method} {path}"))
        })
        .collect();
    let written = written();
    assert!(written.len() >= 15, "{written:?}");
    assert_eq!(documented, written);
}

fn check_references(document: &Value, value: &Value) {
    match value {
        Value::Object(map) => {
            if let Some(Value::String(path)) = map.get("$ref") {
                let target = path.strip_prefix('#').unwrap();
                assert!(document.pointer(target).is_some(), "{path}");
            }
            map.values().for_each(|value| check_references(document, value));
        }
        Value::Array(list) => list.iter().for_each(|value| check_references(document, value)),
        _ => {}
    }
}

fn body_of<'a>(document: &'a Value, path: &str) -> &'a Value {
    &document["paths"][path]["post"]["requestBody"]["content"]["application/json"]
}

#[tokio::test]
async fn it_is_served_and_its_examples_are_answered() {
    let server = Server::new();
    let response = server.send(get_request("/openapi.json")).await;
    assert_eq!(response.headers()[header::CONTENT_TYPE], "application/json");
    let served = json_of(response).await;
    assert_eq!(served, document());
    check_references(&served, &served);
    let mut posts = 0;
    for (path, methods) in served["paths"].as_object().unwrap() {
        let get = methods.get("get").map(|_| path.replace("{name}", "tiny"));
        if let Some(path) = get {
            assert_eq!(server.send(get_request(&path)).await.status(), StatusCode::OK, "{path}");
            continue;
        }
        let (status, answer) = server.post(path, &body_of(&served, path)["example"]).await;
        assert_eq!(status, StatusCode::OK, "{path}: {answer}");
        posts += 1;
    }
    assert!(posts >= 7);
    let unknown = |event: &LogEvent| matches!(event, LogEvent::UnknownField { .. });
    assert!(!server.log.lock().unwrap().iter().any(unknown));
    let server = Server::with(|config| config.api_keys = vec!["secret".to_owned()]);
    assert_eq!(server.send(get_request("/openapi.json")).await.status(), StatusCode::UNAUTHORIZED);
}

fn documented(document: &Value, schema: &Value) -> Names {
    properties(document, schema).into_iter().collect()
}

/// What is taken before anything else, and changes nothing or is refused.
fn off() -> Names {
    refused::names().chain(refused::IGNORED).map(str::to_owned).collect()
}

/// The fields a job looks for in this body.
fn job_fields(server: &Server, api: Api, body: &Value) -> Names {
    asked::by(|| {
        let visit = server.app.live.enter().unwrap();
        let fields = Fields::parse(body.to_string().as_bytes()).unwrap();
        Job::start(&server.app, visit, (api, engine::LogprobsMode::Raw), fields).unwrap();
    })
}

fn minus(names: &Names, others: &[&Names]) -> Names {
    let known = |name: &&String| !others.iter().any(|others| others.contains(*name));
    names.iter().filter(known).cloned().collect()
}

#[tokio::test]
async fn fields_are_documented_where_they_are_read_and_read_where_they_are_documented() {
    let server = Server::new();
    let document = document();
    let none = Names::new();
    let mut jobs = Vec::new();
    for (path, api) in [(TEXT, Api::Completions), (CHAT, Api::Chat)] {
        let body = body_of(&document, path);
        let documented = documented(&document, &body["schema"]);
        let read = job_fields(&server, api, &body["example"]);
        assert_eq!(minus(&documented, &[&read]), none, "{path}: documented, not read");
        assert_eq!(minus(&read, &[&documented, &off()]), none, "{path}: read, not documented");
        jobs.push(read);
    }
    let body = body_of(&document, "/v1/responses");
    let fields = documented(&document, &body["schema"]);
    let converted =
        asked::by(|| drop(responses::convert(&server.app, body["example"].to_string().as_bytes())));
    let own: Names = responses::refused_names().map(str::to_owned).collect();
    let read: Names = minus(&jobs[1], &[&own]).union(&converted).cloned().collect();
    assert_eq!(minus(&fields, &[&read]), none, "responses: documented, not read");
    assert_eq!(minus(&read, &[&fields, &own, &off()]), none, "responses: read, not documented");

    let schema = &body_of(&document, "/inference/v1/generate")["schema"];
    let top = documented(&document, schema);
    let parts = &document["components"]["schemas"]["GenerateRequest"]["allOf"];
    let inner = &parts[1]["properties"]["sampling_params"];
    let sampling = documented(&document, inner);
    assert_eq!(minus(&sampling, &[&jobs[0]]), none, "sampling_params: documented, not read");
    let replaced = ["prompt", "return_token_ids", "echo", "chat_template_kwargs"];
    let replaced = replaced.map(str::to_owned).into();
    let rest = minus(&jobs[0], &[&top, &sampling, &replaced, &off()]);
    assert_eq!(rest, none, "sampling_params: read, not documented");
}

#[tokio::test]
async fn documented_ranges_and_defaults_are_the_servers() {
    let server = Server::new();
    let schemas = &document()["components"]["schemas"];
    let own = schemas["CompletionRequest"]["allOf"][3]["properties"].as_object().unwrap();
    let sampling = schemas["Sampling"]["properties"].as_object().unwrap();
    let mut edges = 0;
    for (name, schema) in sampling.iter().chain(own) {
        let whole = schema["type"] == "integer";
        let step = if whole { 1.0 } else { 0.0625 };
        let bound = |key: &str| schema[key].as_f64();
        let at = |value: f64| if whole { json!(value as i64) } else { json!(value) };
        let mut cases: Vec<(Value, u16)> = Vec::new();
        for (edge, outwards) in [(bound("minimum"), -step), (bound("maximum"), step)] {
            cases.extend(edge.map(|edge| (at(edge), 200)));
            cases.extend(edge.map(|edge| (at(edge + outwards), 400)));
        }
        cases.extend(bound("exclusiveMinimum").map(|edge| (at(edge), 400)));
        for (value, expected) in cases {
            let body = json!({"prompt": "a", "max_tokens": 1, name: value});
            let (status, answer) = server.post(TEXT, &body).await;
            assert_eq!(status.as_u16(), expected, "{name} {value}: {answer}");
            if expected == 400 {
                assert_eq!(answer["error"]["param"], *name);
            }
            edges += 1;
        }
        if let Some(default) = schema.get("default").filter(|_| sampling.contains_key(name)) {
            let read = |body: Value| {
                let mut fields = Fields::new(body.as_object().unwrap().clone());
                crate::sampling_params(&mut fields, &SamplingParams::default()).unwrap()
            };
            assert_eq!(read(json!({name: default})), read(json!({})), "{name}");
        }
    }
    assert!(edges >= 30, "{edges}");
}
