//! Memory that loading takes, as Linux counts it for a process of its own: little more than the weights.

use std::fs;
use std::path::Path;

use ::engine::model::safetensors::Writer;
use ::engine::{Dtype, ModelConfig, ModelSource};
use serde_json::json;

use super::serve::Server;
use super::support::Folder;

/// Most memory at any time while loading, in bytes for each byte of weights kept.
const LIMIT: f64 = 1.3;

/// Loads `model` as bf16 in a process of its own; prints and checks its peak.
fn check(model: &Path) {
    let config = ModelSource::open(model).unwrap().config().clone();
    let kept = config.weights_bytes(Dtype::Bf16);
    // Few sequences and short steps, so that weights are nearly all there is.
    let flags = ["--max-num-seqs", "1", "--max-num-batched-tokens", "16", "--dtype", "bf16"];
    let server = Server::start(model, &flags);
    let status = fs::read_to_string(format!("/proc/{}/status", server.child.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let peak: u64 = line.trim().strip_suffix(" kB").unwrap().parse().unwrap();
    let ratio = (peak << 10) as f64 / kept as f64;
    let mib = |bytes: u64| bytes >> 20;
    let name = model.file_name().unwrap().to_string_lossy();
    println!("{name}: {} MiB of weights, peak {} MiB: {ratio:.3}", mib(kept), peak >> 10);
    assert!(ratio < LIMIT, "peak is {ratio:.3} of the weights, limit is {LIMIT}");
}

#[test]
fn loading_safetensors_takes_little_more_than_the_weights() {
    let folder = Folder::new();
    let model = folder.tiny_model();
    let shape = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 49152,
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 3,
        "num_attention_heads": 16, "num_key_value_heads": 16, "head_dim": 64,
        "hidden_act": "silu", "max_position_embeddings": 256, "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0, "tie_word_embeddings": true, "eos_token_id": 2,
    });
    fs::write(model.join("config.json"), shape.to_string()).unwrap();
    let tensors = ModelConfig::from_hf_json(&shape.to_string()).unwrap().tensors();
    let path = model.join("model.safetensors");
    let mut writer = Writer::create(&path, &tensors, Dtype::Bf16).unwrap();
    let row = vec![0.01; 1024];
    for tensor in &tensors {
        assert_eq!(tensor.elements() % 1024, 0);
        (0..tensor.elements() / 1024).for_each(|_| writer.append(&row).unwrap());
    }
    writer.finish().unwrap();
    assert!(fs::metadata(&path).unwrap().len() > 190 << 20);
    check(&model);
}

#[test]
fn loading_gguf_takes_little_more_than_the_weights() {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/smollm2-135m.gguf");
    if !model.exists() {
        println!("left out: {} is not there", model.display());
        return;
    }
    check(&model);
}
