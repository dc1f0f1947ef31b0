//! Memory that loading takes, as Linux counts it for a process of its own: little more than the weights;
//! and that of a training run beside its plan.

use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;

use ::engine::model::safetensors::Writer;
use ::engine::{Dtype, ModelConfig, ModelSource, ResidentMemory};
use serde_json::json;

use super::process::Process;
use super::support::{Folder, engine, run};

/// Most memory at any time while loading, in bytes for each byte of weights kept.
const LIMIT: f64 = 1.3;

/// Loads `model` as bf16 in a process of its own; prints and checks its peak.
fn check(model: &Path) {
    let config = ModelSource::open(model).unwrap().config().clone();
    let kept = config.weights_bytes(Dtype::Bf16);
    // Few sequences and short steps, so that weights are nearly all there is.
    let flags = ["--max-num-seqs", "1", "--max-num-batched-tokens", "16", "--dtype", "bf16"];
    let mut server = Process::serve(model, &[&flags[..], &["--port", "0"]].concat());
    server.address();
    let peak = ResidentMemory::of(server.child.id()).unwrap().peak_bytes;
    let ratio = peak as f64 / kept as f64;
    let mib = |bytes: u64| bytes >> 20;
    let name = model.file_name().unwrap().to_string_lossy();
    println!("{name}: {} MiB of weights, peak {} MiB: {ratio:.3}", mib(kept), mib(peak));
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

/// The largest difference between a plan and what a run takes, as a share of what it takes.
const PLAN_ERROR: f64 = 0.15;

/// The peak that `rl --dry-run` with these flags plans, in MiB.
fn planned(flags: &[&str]) -> f64 {
    let ran = run(engine().arg("rl").args(flags).arg("--dry-run"));
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let line = ran.stdout.lines().find_map(|line| line.strip_prefix("# peak ")).unwrap();
    line.trim().strip_suffix(" MiB").unwrap().parse().unwrap()
}

/// The peak of a run with these flags, in MiB: the largest that was seen while it went on.
fn taken(flags: &[&str]) -> f64 {
    let mut child = engine().arg("rl").args(flags).arg("--quiet").spawn().unwrap();
    let mut peak = 0;
    let status = loop {
        peak = ResidentMemory::of(child.id()).map_or(0, |memory| memory.peak_bytes).max(peak);
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        thread::sleep(Duration::from_millis(5));
    };
    assert!(status.success(), "{status}");
    peak as f64 / f64::from(1 << 20)
}

/// Plans a run of one step and takes it; prompts have `prompt` tokens.
fn check_plan(model: &str, folder: &Folder, (prompt, response): (usize, usize)) {
    let (output, data) = (folder.path("run"), folder.path("train.jsonl"));
    let row = |i: usize| {
        let prompt = json!([{"role": "user", "content": format!("{}+{}=", 10 + i, 90 - i)}]);
        json!({"data_source": "arith", "prompt": prompt,
            "reward_model": {"ground_truth": "100"}})
    };
    let rows: Vec<String> = (0..8).map(|i| row(i).to_string()).collect();
    fs::write(&data, rows.join("\n")).unwrap();
    let (prompt, response) = (
        format!("data.max_prompt_length={prompt}"),
        format!("data.max_response_length={response}"),
    );
    let sets = ["data.train_batch_size=4", "algorithm.mini_batch_size=4", "rollout.n=8"];
    let rest = ["trainer.total_steps=1", "trainer.test_freq=0", "trainer.val_before_train=false"];
    let mut flags = vec!["--model", model, "--output", output.to_str().unwrap()];
    flags.extend(["--train-files", data.to_str().unwrap()]);
    for set in sets.iter().chain(&rest).copied().chain([prompt.as_str(), response.as_str()]) {
        flags.extend(["--set", set]);
    }
    let (planned, taken) = (planned(&flags), taken(&flags));
    println!("{model}: {planned:.1} MiB planned, {taken:.1} MiB taken: {:.3}", planned / taken);
    let error = (planned / taken - 1.0).abs();
    assert!(error < PLAN_ERROR, "{planned:.1} MiB planned, {taken:.1} MiB taken");
}

#[test]
fn a_dry_run_knows_the_peak_of_a_run() {
    check_plan("builtin:arith", &Folder::new(), (8, 4));
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/smollm2-135m.gguf");
    if !model.exists() {
        println!("left out: {} is not there", model.display());
        return;
    }
    check_plan(model.to_str().unwrap(), &Folder::new(), (40, 8));
}
