//! Real models against what `transformers` makes of them.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde_json::Value;

use super::*;
use crate::model::gguf::Gguf;

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Opens a model file, or says that its test is left out.
fn open(name: &str) -> Option<Gguf> {
    let folder = std::env::var_os("ENGINE_MODELS_DIR")
        .map_or_else(|| workspace().join("models"), PathBuf::from);
    let path = folder.join(format!("{name}.gguf"));
    if !path.exists() {
        // Written past the harness, which keeps the output of tests that pass to itself.
        let line =
            format!("left out: models/{name}.gguf is missing; scripts/fetch-models.sh gets it");
        std::io::Write::write_all(&mut std::io::stderr(), format!("{line}\n").as_bytes()).unwrap();
        return None;
    }
    Some(Gguf::open(&path).unwrap())
}

fn golden(name: &str) -> Value {
    let path = workspace().join(format!("tests/data/golden/models/{name}.json"));
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    let list = value.as_array().unwrap();
    list.iter().map(|id| u32::try_from(id.as_u64().unwrap()).unwrap()).collect()
}

/// Everything the golden file says, then what holds for any text.
fn check(name: &str) {
    let Some(file) = open(name) else { return };
    let golden = golden(name);
    let tokenizer = Tokenizer::from_gguf(GgufVocab::read(&file).unwrap()).unwrap();
    for case in golden["cases"].as_array().unwrap() {
        let text = case["text"].as_str().unwrap();
        let expected = ids(&case["input_ids"]);
        assert_eq!(tokenizer.encode(text, AddSpecial::No).unwrap(), expected, "{text:?}");
        let decoded = tokenizer.decode(&expected, SkipSpecial::No).unwrap();
        assert_eq!(decoded, case["decoded"].as_str().unwrap());
    }
    let template = ChatTemplate::from_config(tokenizer.config()).unwrap();
    for case in golden["chat_template"].as_array().unwrap() {
        let messages: Vec<Message> = case["messages"]
            .as_array()
            .unwrap()
            .iter()
            .map(|message| Message::from_json(message.clone()).unwrap())
            .collect();
        let options = RenderOptions::new(SystemTime::UNIX_EPOCH);
        let rendered = template.render(&messages, &options).unwrap();
        assert_eq!(rendered, case["rendered"].as_str().unwrap());
    }
    check_files(&tokenizer);
    super::detokenizer::check_model(name, tokenizer);
}

/// The files of a checkpoint give the same ids; text comes back.
fn check_files(tokenizer: &Tokenizer) {
    let json = tokenizer.to_json().unwrap();
    let again = Tokenizer::from_json_bytes(json.as_bytes()).unwrap();
    for text in NASTY {
        let ids = tokenizer.encode(text, AddSpecial::Yes).unwrap();
        assert_eq!(again.encode(text, AddSpecial::Yes).unwrap(), ids, "{text:?}");
        let decoded = tokenizer.decode(&ids, SkipSpecial::No).unwrap();
        let encoded = again.encode(&decoded, AddSpecial::Yes).unwrap();
        assert_eq!(encoded, ids, "what is decoded is encoded the same: {text:?}");
        if !json.contains("\"NFC\"") && !text.contains('\0') {
            assert_eq!(decoded, text);
        }
    }
}

#[test]
fn smollm2_agrees_with_transformers() {
    check("smollm2-135m");
}

#[test]
fn qwen2_agrees_with_transformers() {
    check("qwen2.5-coder-0.5b");
}
