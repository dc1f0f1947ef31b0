//! `engine rl` from end to end on a tiny model of its own: what a run leaves, that it is reproducible,
//! and that it can be stopped anywhere. What it refuses is in `rl_faults.rs`.

use std::fs;
use std::io::Read;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use super::process::{Process, send, write_request};
use super::support::{Folder, SMALL, engine, json_lines, run};

/// A folder with a tiny model and data to train it on.
pub(super) struct Lab {
    pub(super) folder: Folder,
    pub(super) model: PathBuf,
    pub(super) data: PathBuf,
}

impl Lab {
    /// A model of random weights that has seen a few sums, so that some of its answers are right.
    pub(super) fn new() -> Self {
        let folder = Folder::new();
        let shape = folder.path("shape");
        fs::create_dir(&shape).unwrap();
        let assets = Path::new(env!("CARGO_MANIFEST_DIR")).join("engine/assets/arith");
        for name in ["tokenizer.json", "tokenizer_config.json"] {
            fs::write(shape.join(name), fs::read(assets.join(name)).unwrap()).unwrap();
        }
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 272,
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
            "hidden_act": "silu", "max_position_embeddings": 128, "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0, "tie_word_embeddings": true, "eos_token_id": 256,
            "pad_token_id": 259,
        });
        fs::write(shape.join("config.json"), config.to_string()).unwrap();
        let sums = || (0..100).map(|i| (i / 10, i % 10));
        let pairs: String = sums()
            .map(|(a, b)| {
                let (prompt, completion) = (format!("{a}+{b}="), (a + b).to_string());
                json!({"prompt": prompt, "completion": completion}).to_string() + "\n"
            })
            .collect();
        let pairs = folder.write("pairs.jsonl", &pairs);
        let tasks: String =
            sums().filter(|(a, b)| *a < 6 && *b < 4).map(|(a, b)| task(a, b)).collect();
        let data = folder.write("train.jsonl", &tasks);
        let mut sft = engine();
        sft.arg("sft").args(SMALL).arg("--config-json").arg(shape.join("config.json"));
        sft.arg("--train-files").arg(&pairs).arg("--output").arg(folder.path("sft"));
        set(&mut sft, &["trainer.total_steps=60", "data.train_batch_size=32"]);
        set(&mut sft, &["trainer.test_freq=0", "optimizer.lr=3e-3"]);
        let ran = run(&mut sft);
        assert_eq!(ran.code, Some(0), "{ran:?}");
        let model = folder.path("sft/checkpoints/step_60");
        Self { folder, model, data }
    }

    /// A small run of the model on the data into the folder `output`, on one thread.
    pub(super) fn rl(&self, output: &str, settings: &[&str]) -> Command {
        self.rl_on("1", output, settings)
    }

    fn rl_on(&self, threads: &str, output: &str, settings: &[&str]) -> Command {
        let mut command = engine();
        command.args(["rl", "--kv-cache-memory-bytes", "4MiB", "--threads", threads, "--model"]);
        command.arg(&self.model).arg("--train-files").arg(&self.data);
        command.arg("--val-files").arg(&self.data).arg("--output").arg(self.folder.path(output));
        set(&mut command, &["algorithm.method=kl_cov", "algorithm.kl_cov_ratio=0.02"]);
        set(&mut command, &["data.train_batch_size=8", "rollout.n=4", "optimizer.lr=1e-3"]);
        set(&mut command, &["data.max_response_length=8", "algorithm.mini_batch_size=2"]);
        set(&mut command, &["trainer.total_steps=4", "trainer.test_freq=1"]);
        set(&mut command, settings);
        command
    }

    /// Runs to the end and returns what is left.
    fn finish(&self, command: &mut Command, output: &str) -> Left {
        let ran = run(command);
        assert_eq!(ran.code, Some(0), "{ran:?}");
        Left::read(&self.folder.path(output))
    }
}

/// A row of verl's schema.
pub(super) fn task(a: u32, b: u32) -> String {
    let truth = json!({"style": "rule", "ground_truth": (a + b).to_string()});
    let prompt = json!([{"role": "user", "content": format!("{a}+{b}=")}]);
    json!({"data_source": "arith", "prompt": prompt, "reward_model": truth}).to_string() + "\n"
}

/// Adds `--set` for each.
pub(super) fn set(command: &mut Command, settings: &[&str]) {
    for setting in settings {
        command.args(["--set", setting]);
    }
}

/// The lines of `metrics.jsonl` of a run, without what depends on time.
pub(super) fn metrics(run: &Path) -> Vec<Value> {
    let mut lines = json_lines(&fs::read_to_string(run.join("metrics.jsonl")).unwrap());
    for line in &mut lines {
        let line = line.as_object_mut().unwrap();
        line.retain(|name, _| !name.starts_with("timing_s/"));
        line.retain(|name, _| !["perf/time_per_step", "perf/throughput"].contains(&&**name));
    }
    lines
}

/// What a run has left behind that does not depend on time.
#[derive(PartialEq)]
struct Left {
    metrics: Vec<Value>,
    weights: Vec<u8>,
    /// The samples of every step.
    samples: Vec<String>,
}

impl Left {
    fn read(run: &Path) -> Self {
        let metrics = metrics(run);
        let weights = fs::read(latest(run).join("model.safetensors")).unwrap();
        let samples = (1..metrics.len())
            .map(|step| fs::read_to_string(run.join(format!("samples/step_{step}.jsonl"))).unwrap())
            .collect();
        Self { metrics, weights, samples }
    }
}

/// The checkpoint that `latest` names.
pub(super) fn latest(run: &Path) -> PathBuf {
    let name = fs::read_to_string(run.join("latest")).unwrap();
    run.join(name.strip_suffix('\n').unwrap())
}

/// Fails with the first difference only: two runs are long to print.
fn assert_same(left: &Left, right: &Left) {
    for (a, b) in left.metrics.iter().zip(&right.metrics) {
        assert_eq!(a, b);
    }
    assert_eq!(left.metrics.len(), right.metrics.len());
    for (step, (a, b)) in left.samples.iter().zip(&right.samples).enumerate() {
        assert!(a == b, "samples of step {} differ", step + 1);
    }
    assert!(left == right, "weights differ");
}

fn number(line: &Value, name: &str) -> f64 {
    line[name].as_f64().unwrap_or_else(|| panic!("no {name} in {line}"))
}

#[test]
fn a_run_leaves_everything_it_should() {
    let lab = Lab::new();
    let left = lab.finish(&mut lab.rl("run", &["trainer.save_freq=1"]), "run");
    let dir = lab.folder.path("run");
    let config: toml::Table = fs::read_to_string(dir.join("config.toml")).unwrap().parse().unwrap();
    assert_eq!(config["algorithm"]["method"].as_str(), Some("kl_cov"));
    assert_eq!(
        config["algorithm"]["ppo_kl_coef"].as_float(),
        Some(1.0),
        "defaults are written too"
    );
    assert_eq!(config["rollout"]["n"].as_integer(), Some(4));

    assert_eq!(left.metrics.len(), 5, "the validation before the first step, and four steps");
    for (step, line) in left.metrics.iter().enumerate() {
        assert_eq!(number(line, "training/global_step"), step as f64);
        assert!(line.as_object().unwrap().values().all(Value::is_number), "{line}");
        assert!((0.0..=1.0).contains(&number(line, "val/accuracy")), "{line}");
    }
    for line in &left.metrics[1..] {
        assert_eq!(number(line, "mismatch/tokens_ne"), 0.0, "{line}");
        assert_eq!(number(line, "mismatch/max_abs_logp_diff"), 0.0, "{line}");
        assert_eq!(number(line, "actor/updates"), 4.0, "{line}");
        assert!(number(line, "actor/entropy") > 0.0, "{line}");
        assert!(number(line, "response_length/max") <= 8.0, "{line}");
    }
    let touched: f64 = left.metrics[1..].iter().map(|m| number(m, "actor/touched_tokens")).sum();
    assert!(touched > 0.0, "KL-Cov has penalised tokens");

    for (step, text) in left.samples.iter().enumerate() {
        let samples = json_lines(text);
        let line = &left.metrics[step + 1];
        assert_eq!(samples.len(), 8 * 4);
        let rewards: f64 = samples.iter().map(|s| number(s, "reward")).sum();
        assert!((rewards / 32.0 - number(line, "critic/score/mean")).abs() < 1e-12, "{line}");
        for sample in &samples {
            assert_eq!(sample["step"], json!(step + 1));
            let right = sample["text"] == sample["ground_truth"];
            assert_eq!(sample["correct"], json!(right), "{sample}");
            let lens = ["token_ids", "log_probs"].map(|key| sample[key].as_array().unwrap().len());
            assert!(lens[0] == lens[1] && (1..=8).contains(&lens[0]), "{sample}");
        }
    }
    assert_ne!(left.samples[0], left.samples[1]);

    let kept: Vec<_> = fs::read_dir(dir.join("checkpoints")).unwrap().collect();
    assert_eq!(kept.len(), 2, "trainer.keep_checkpoints is 2: {kept:?}");
    assert_eq!(latest(&dir), dir.join("checkpoints/step_4"));
    let report = fs::read_to_string(dir.join("report.html")).unwrap();
    assert!(report.starts_with("<!DOCTYPE html>") && report.trim_end().ends_with("</html>"));
    assert!(report.contains("kl_cov on "), "no title");

    // Others can load the checkpoint.
    let prompts = lab.folder.write("prompts.jsonl", "{\"prompt\": \"1+2=\", \"temperature\": 0}\n");
    let mut generate = engine();
    generate.arg("generate").arg(latest(&dir)).arg("--prompts").arg(prompts).args(SMALL);
    let ran = run(generate.args(["--max-tokens", "8"]));
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let answer = &json_lines(&ran.stdout)[0];
    assert!(answer["logprobs"].as_array().unwrap().iter().all(Value::is_number), "{answer}");
    assert!(!answer["token_ids"].as_array().unwrap().is_empty(), "{answer}");
}

#[test]
fn lines_of_steps_are_a_tracker_and_metrics_are_always_written() {
    let lab = Lab::new();
    let few = ["trainer.total_steps=1", "trainer.test_freq=0"];
    for (trackers, lines) in [("console,jsonl", 1), ("[]", 0), ("tensorboard", 0)] {
        let setting = format!("trainer.trackers={trackers}");
        let mut command = lab.rl("run", &[&few[..], &[&setting]].concat());
        let ran = run(command.args(["--resume", "never"]));
        assert_eq!(ran.code, Some(0), "{ran:?}");
        assert_eq!(ran.stderr.matches("step 1/1").count(), lines, "{trackers}: {ran:?}");
        assert!(ran.stderr.contains("step 0: validation"), "{trackers}: {ran:?}");
        let metrics = fs::read_to_string(lab.folder.path("run/metrics.jsonl")).unwrap();
        assert_eq!(metrics.lines().count(), 2, "{trackers}");
    }
}

#[test]
fn a_seed_gives_the_same_run_on_any_number_of_threads_and_in_any_batch() {
    let lab = Lab::new();
    let first = lab.finish(&mut lab.rl("a", &[]), "a");
    let again = lab.finish(&mut lab.rl("b", &[]), "b");
    assert_same(&again, &first);
    let threads = lab.finish(&mut lab.rl_on("2", "c", &[]), "c");
    assert_same(&threads, &first);
    let mut small = lab.rl("d", &[]);
    small.args(["--max-num-seqs", "3", "--max-num-batched-tokens", "7"]);
    assert_same(&lab.finish(&mut small, "d"), &first);
    let cut = lab.finish(&mut lab.rl("e", &["trainer.max_tokens_per_microbatch=16"]), "e");
    assert_eq!(cut.metrics[1]["actor/entropy"], first.metrics[1]["actor/entropy"]);
    assert_eq!(cut.samples[0], first.samples[0]);

    let other = lab.finish(lab.rl("f", &[]).args(["--seed", "1"]), "f");
    assert_ne!(other.samples[0], first.samples[0]);
    assert_ne!(other.weights, first.weights);
}

#[test]
fn every_method_runs_and_its_first_update_is_on_policy() {
    let lab = Lab::new();
    let mut weights = Vec::new();
    // Bounds that so short a run meets.
    for (method, bounds) in [
        ("grpo", ["algorithm.clip_ratio_low=0.01", "algorithm.clip_ratio_high=0"]),
        ("clip_higher", ["algorithm.clip_ratio_low=0.01", "algorithm.clip_ratio_high=10"]),
        ("clip_cov", ["algorithm.clip_cov_ratio=0.05", "algorithm.clip_cov_lb=0.1"]),
        ("kl_cov", ["algorithm.kl_cov_ratio=0.05", "algorithm.ppo_kl_coef=1"]),
    ] {
        let method_key = format!("algorithm.method={method}");
        let once = [&*method_key, "algorithm.mini_batch_size=8", "trainer.total_steps=2"];
        let left =
            lab.finish(&mut lab.rl(&format!("{method}-once"), &once), &format!("{method}-once"));
        for line in &left.metrics[1..] {
            // With one update a step, the policy that is trained is the one that sampled.
            for name in ["actor/ppo_kl", "actor/ppo_kl_abs", "mismatch/max_abs_logp_diff"] {
                assert_eq!(number(line, name), 0.0, "{method} {name}: {line}");
            }
        }
        let settings = [&*method_key, bounds[0], bounds[1]];
        let left = lab.finish(&mut lab.rl(method, &settings), method);
        assert!(left.metrics.iter().all(|m| m.as_object().unwrap().values().all(Value::is_number)));
        let moved: f64 = left.metrics[1..].iter().map(|m| number(m, "actor/ppo_kl_abs")).sum();
        assert!(moved > 0.0, "{method}: later updates are off policy");
        let touched: f64 =
            left.metrics[1..].iter().map(|m| number(m, "actor/touched_tokens")).sum();
        assert!(touched > 0.0, "{method}: no token met a bound");
        weights.push(left.weights);
    }
    weights.sort();
    weights.dedup();
    assert_eq!(weights.len(), 4, "four methods, four results");
}

#[test]
fn a_run_that_goes_on_equals_one_that_never_stopped() {
    let lab = Lab::new();
    let settings = ["trainer.save_freq=1", "optimizer.lr_warmup_steps=3"];
    let whole = lab.finish(&mut lab.rl("whole", &settings), "whole");
    let two = lab.finish(
        &mut lab.rl(
            "parts",
            &["trainer.save_freq=1", "optimizer.lr_warmup_steps=3", "trainer.total_steps=2"],
        ),
        "parts",
    );
    assert_eq!(two.metrics, whole.metrics[..3]);
    assert_same(&lab.finish(&mut lab.rl("parts", &settings), "parts"), &whole);
    // Nothing is left to do, and nothing is done.
    assert_same(&lab.finish(&mut lab.rl("parts", &settings), "parts"), &whole);
    // From a checkpoint by name into another folder, and anew in a used one.
    let from = lab.folder.path("whole/checkpoints/step_3");
    let mut named = lab.rl("named", &settings);
    let ran = run(named.arg("--resume").arg(&from));
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let model = |run: &str| fs::read(latest(&lab.folder.path(run)).join("model.safetensors"));
    assert_eq!(model("named").unwrap(), whole.weights);
    let anew = lab.finish(lab.rl("parts", &settings).args(["--resume", "never"]), "parts");
    assert_same(&anew, &whole);
}

#[test]
fn a_damaged_checkpoint_is_passed_over() {
    let lab = Lab::new();
    let settings = ["trainer.save_freq=1"];
    let whole = lab.finish(&mut lab.rl("run", &settings), "run");
    let weights = lab.folder.path("run/checkpoints/step_4/model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&weights, bytes).unwrap();
    let mut command = lab.rl("run", &settings);
    let ran = run(&mut command);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(
        ran.stderr.contains("step_4") && ran.stderr.contains("going on after step 3"),
        "{ran:?}"
    );
    assert_same(&Left::read(&lab.folder.path("run")), &whole);
}

pub(super) fn make_fifo(path: &Path) {
    assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
}

#[test]
fn a_killed_run_goes_on_with_the_same_command() {
    let lab = Lab::new();
    let settings = ["trainer.save_freq=2", "trainer.total_steps=6"];
    let whole = lab.finish(&mut lab.rl("whole", &settings), "whole");

    // Opening a pipe that nobody reads holds the run up where it writes the samples of step 5.
    let run_dir = lab.folder.path("killed");
    fs::create_dir_all(run_dir.join("samples")).unwrap();
    let pipe = run_dir.join("samples/.tmp-step_5.jsonl");
    make_fifo(&pipe);
    let mut killed = Process::start(&mut lab.rl("killed", &settings));
    killed.line("step 4/6");
    killed.signal("-KILL");
    killed.ended(None);
    fs::remove_file(&pipe).unwrap();
    assert_same(&lab.finish(&mut lab.rl("killed", &settings), "killed"), &whole);

    // And here between a checkpoint's appearance and `latest`, for the first time.
    let run_dir = lab.folder.path("unnamed");
    fs::create_dir(&run_dir).unwrap();
    let pipe = run_dir.join("latest.tmp");
    make_fifo(&pipe);
    let mut killed = Process::start(&mut lab.rl("unnamed", &settings));
    killed.line("step 1/6");
    while !run_dir.join("checkpoints/step_2").exists() {
        std::thread::yield_now();
    }
    killed.signal("-KILL");
    killed.ended(None);
    assert!(!run_dir.join("latest").exists());
    fs::remove_file(&pipe).unwrap();
    let ran = run(&mut lab.rl("unnamed", &settings));
    assert!(ran.stderr.contains("going on after step 2"), "{ran:?}");
    assert_same(&Left::read(&run_dir), &whole);
}

#[test]
fn sigterm_leaves_a_checkpoint_to_go_on_from() {
    let lab = Lab::new();
    let mut stopped = Process::start(&mut lab.rl("run", &["trainer.total_steps=1000000"]));
    stopped.line("step 3/");
    stopped.signal("-TERM");
    let rest = stopped.ended(75);
    let last = rest.lines().last().unwrap();
    assert!(last.starts_with("error: interrupted, ") && last.contains("--resume auto"), "{last}");
    let checkpoint = latest(&lab.folder.path("run"));
    let state = fs::read_to_string(checkpoint.join("trainer/state.json")).unwrap();
    let state: Value = serde_json::from_str(&state).unwrap();
    let total = format!("trainer.total_steps={}", state["step"].as_u64().unwrap() + 2);
    let resumed = lab.finish(&mut lab.rl("run", &[&total]), "run");
    let whole = lab.finish(&mut lab.rl("whole", &[&total]), "whole");
    assert_same(&resumed, &whole);
}

#[test]
fn a_checkpoint_is_served() {
    let lab = Lab::new();
    let left = lab.finish(&mut lab.rl("run", &["trainer.total_steps=1"]), "run");
    assert!(!left.weights.is_empty());
    let model = latest(&lab.folder.path("run"));
    let mut server = Process::serve(&model, &["--port", "0", "--served-model-name", "sums"]);
    let address = server.address();
    let body = json!({"model": "sums", "messages": [{"role": "user", "content": "1+2="}],
        "max_tokens": 8, "temperature": 0});
    let (status, text) = send(&address, "POST /v1/chat/completions", &body.to_string());
    let answer: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(status, 200, "{text}");
    let content = answer["choices"][0]["message"]["content"].as_str().unwrap().to_owned();
    assert_eq!(answer["usage"]["prompt_tokens"], 4, "the checkpoint has its chat template: {text}");

    // The same answer in pieces, over one connection.
    let mut body = body;
    body["stream"] = json!(true);
    let mut stream = TcpStream::connect(&address).unwrap();
    write_request(&mut stream, "POST /v1/chat/completions", &body.to_string()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n") && answer.contains("text/event-stream"));
    let data = answer.lines().filter_map(|line| line.strip_prefix("data: "));
    let (done, events): (Vec<&str>, Vec<&str>) = data.partition(|data| *data == "[DONE]");
    assert_eq!(done.len(), 1, "{answer}");
    let events: Vec<Value> = events.iter().map(|e| serde_json::from_str(e).unwrap()).collect();
    let pieces = events.iter().filter_map(|e| e["choices"][0]["delta"]["content"].as_str());
    assert_eq!(pieces.collect::<String>(), content);

    // What the command line generates from the checkpoint is the same too.
    let prompts = lab.folder.write("p.jsonl", "{\"prompt\": \"1+2=\", \"temperature\": 0}\n");
    let mut generate = engine();
    generate.arg("generate").arg(&model).arg("--prompts").arg(prompts).args(SMALL);
    let ran = run(generate.args(["--max-tokens", "8"]));
    assert_eq!(json_lines(&ran.stdout)[0]["text"], json!(content), "{ran:?}");

    server.end();
}
