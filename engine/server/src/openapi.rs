//! `GET /openapi.json`: what is served, as an OpenAPI 3.1 document.
//!
//! The document is `openapi.json` beside this file, written by hand. What has its own list in the code
//! is filled in: the version, and for each generating route the features that are refused (`x-refused`)
//! and the fields that are accepted and change nothing (`x-ignored`). Tests hold the rest against the
//! router and against what reads the fields.

use std::sync::OnceLock;

use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::{refused, responses};

const WRITTEN: &str = include_str!("openapi.json");

/// `GET /openapi.json`.
pub(crate) async fn serve() -> Response {
    static TEXT: OnceLock<String> = OnceLock::new();
    let text = TEXT.get_or_init(|| document().to_string()).as_str();
    ([(header::CONTENT_TYPE, "application/json")], text).into_response()
}

/// The whole document.
pub(crate) fn document() -> Value {
    let mut document: Value = serde_json::from_str(WRITTEN).expect("a test reads it");
    document["info"]["version"] = json!(env!("CARGO_PKG_VERSION"));
    let refused: Vec<&str> = refused::names().collect();
    let here: Vec<&str> = responses::refused_names().chain(refused.iter().copied()).collect();
    let requests = [
        ("CompletionRequest", &refused),
        ("ChatRequest", &refused),
        ("GenerateRequest", &refused),
        ("ResponsesRequest", &here),
    ];
    for (name, refused) in requests {
        let documented = properties(&document, &json!({"$ref": reference(name)}));
        let unknown = |names: &[&str]| -> Value {
            let unknown = |name: &&str| !documented.iter().any(|known| known == *name);
            names.iter().copied().filter(unknown).collect()
        };
        let (refused, ignored) = (unknown(refused), unknown(&refused::IGNORED));
        let schema = &mut document["components"]["schemas"][name];
        schema["x-refused"] = refused;
        schema["x-ignored"] = ignored;
    }
    document
}

fn reference(name: &str) -> String {
    format!("#/components/schemas/{name}")
}

/// The names of a schema's properties, with those of the schemas it is made of.
pub(crate) fn properties(document: &Value, schema: &Value) -> Vec<String> {
    let mut names = Vec::new();
    if let Some(target) = schema["$ref"].as_str().and_then(|path| path.strip_prefix('#')) {
        names.extend(document.pointer(target).iter().flat_map(|s| properties(document, s)));
    }
    names.extend(
        schema["allOf"].as_array().into_iter().flatten().flat_map(|s| properties(document, s)),
    );
    names.extend(schema["properties"].as_object().into_iter().flat_map(|map| map.keys().cloned()));
    names
}
