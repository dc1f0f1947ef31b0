//! `engine bench`: every benchmark once, tiny; what it prints and the keys of its JSON.

use std::fs;
use std::path::Path;

use serde_json::Value;

use super::process::Process;
use super::support::{Folder, engine, fails, run};

/// Flags that keep an engine small; the KV cache holds what the runs below ask for.
const ONE_THREAD: [&str; 4] = ["--threads", "1", "--kv-cache-memory-bytes", "16MiB"];

/// Runs a benchmark; what it printed and what it wrote.
fn bench(folder: &Folder, words: &[&str], flags: &[&str]) -> (String, Value) {
    let path = folder.path("results.json");
    let mut command = engine();
    command.arg("bench").args(words).args(flags).arg("--quiet").arg("--json").arg(&path);
    let ran = run(&mut command);
    assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""), "{ran:?}");
    (ran.stdout, serde_json::from_str(&fs::read_to_string(path).unwrap()).unwrap())
}

fn number(results: &Value, key: &str) -> f64 {
    results.pointer(key).and_then(Value::as_f64).unwrap_or_else(|| panic!("no {key}: {results}"))
}

#[test]
fn every_benchmark_has_help_with_examples() {
    for what in ["throughput", "latency", "serve", "rl", "kernels"] {
        let help = run(engine().args(["bench", what, "--help"]));
        assert_eq!(help.code, Some(0));
        for part in ["Examples:", "--json", "--threads", "--seed", "--config"] {
            assert!(help.stdout.contains(part), "bench {what} has no {part}");
        }
    }
    let ran = run(engine().arg("bench"));
    assert_eq!(ran.code, Some(2));
    assert!(ran.stderr.contains("known are throughput latency serve rl kernels"), "{ran:?}");
}

#[test]
fn throughput_and_latency_count_what_they_generate() {
    let folder = Folder::new();
    let sizes = ["--random-input-len", "8", "--random-output-len", "3", "--num-prompts", "4"];
    let words =
        [&["throughput", "--n", "2", "--repeats", "2", "--logprobs", "0"][..], &sizes].concat();
    let (text, results) = bench(&folder, &words, &ONE_THREAD);
    assert!(text.starts_with("Throughput: ") && text.contains(" output tokens/s\n"), "{text}");
    assert_eq!(number(&results, "/num_requests"), 8.0);
    assert_eq!(number(&results, "/total_num_tokens"), 4.0 * 8.0 + 8.0 * 3.0);
    let elapsed = number(&results, "/elapsed_time");
    assert!((number(&results, "/requests_per_second") * elapsed - 8.0).abs() < 1e-6);
    assert!(
        (number(&results, "/share_of_limit") * elapsed / number(&results, "/limit_s") - 1.0).abs()
            < 1e-6
    );
    assert_eq!(number(&results, "/elapsed/count"), 2.0);

    let words = ["latency", "--batch-size", "2", "--output-len", "3", "--num-iters", "3"];
    let (text, results) =
        bench(&folder, &words, &[&ONE_THREAD[..], &["--num-iters-warmup", "1"]].concat());
    assert!(
        text.starts_with("Avg latency: ") && text.contains("99% percentile latency: "),
        "{text}"
    );
    assert_eq!(results["latencies"].as_array().unwrap().len(), 3);
    assert!(number(&results, "/percentiles/99") >= number(&results, "/percentiles/10"));
}

#[test]
fn prompts_come_from_data_sets() {
    let folder = Folder::new();
    let custom = folder.write("in.jsonl", "{\"prompt\": \"1+2=\"}\n\n{\"prompt\": \"10+20=\"}\n");
    let talk = |prompt: &str, answer: &str| {
        format!("{{\"conversations\": [{{\"value\": \"{prompt}\"}}, {{\"value\": \"{answer}\"}}]}}")
    };
    let (short, long) = (talk("1", "2"), talk("12345+1=", "12346"));
    let sharegpt = folder.write("talks.json", &format!("[{short}, {long}, {{}}]"));
    let with = |name: &str, path: &Path, more: &[&str]| {
        let words = ["throughput", "--repeats", "1", "--num-warmups", "0", "--num-prompts", "2"];
        let path = path.to_str().unwrap();
        let words = [&words[..], &["--dataset-name", name, "--dataset-path", path], more].concat();
        bench(&folder, &words, &ONE_THREAD).1
    };
    let results = with("custom", &custom, &["--output-len", "2"]);
    assert_eq!(number(&results, "/total_input_tokens"), 4.0 + 6.0);
    assert_eq!(number(&results, "/total_output_tokens"), 4.0);
    // The one conversation that is long enough, twice.
    let results = with("sharegpt", &sharegpt, &[]);
    assert_eq!(number(&results, "/total_input_tokens"), 2.0 * 8.0);
    assert_eq!(number(&results, "/total_output_tokens"), 2.0 * 5.0);
    let mut command = engine();
    command.args(["bench", "throughput", "--dataset-name", "custom", "--dataset-path"]);
    let bad = folder.write("bad.jsonl", "{\"prompt\": \"1\"}\n{\"text\": \"1\"}\n");
    fails(command.arg(bad), 3, "line 2: expected an object with a string \"prompt\"");
}

#[test]
fn a_step_of_learning_is_split_into_its_parts() {
    let folder = Folder::new();
    let sizes = ["--prompts", "2", "--group", "2", "--prompt-len", "6", "--response-len", "4"];
    let words = [&["rl", "--repeats", "1", "--num-warmups", "0", "--compare-unshared"][..], &sizes]
        .concat();
    let (text, results) = bench(&folder, &words, &ONE_THREAD);
    let parts = ["generate", "reward", "forward", "backward", "optimizer"];
    let sum: f64 =
        parts.iter().map(|part| number(&results, &format!("/parts/{part}/seconds"))).sum();
    assert!((sum - number(&results, "/elapsed_time")).abs() < 1e-9);
    assert!(parts.iter().all(|part| text.contains(part)), "{text}");
    assert!(
        number(&results, "/parts/backward/limit_s") > number(&results, "/parts/forward/limit_s")
    );
    assert_eq!(number(&results, "/shared_prompts/unshared/count"), 1.0);
}

#[test]
fn kernels_print_a_table_beside_the_limits() {
    let folder = Folder::new();
    let words = [
        "kernels",
        "--models",
        "tiny",
        "--seconds",
        "0.001",
        "--rows",
        "1,64",
        "--compare-threads",
    ];
    let mut flags = vec!["--threads", "2"];
    // The reference is not measured.
    if std::env::var("ENGINE_CPU").is_ok_and(|level| level == "reference") {
        flags.extend(["--log-format", "text"]);
        let mut command = engine();
        return fails(command.arg("bench").args(words), 2, "reference kernels");
    }
    let (text, results) = bench(&folder, &words, &flags);
    let rows = results["operations"].as_array().unwrap();
    let table = text.lines().filter(|line| line.starts_with("| ")).count();
    assert_eq!(table, rows.len() + 1);
    for name in
        ["product forward", "attention decode", "attention prefill", "sampling", "rope", "adamw"]
    {
        let row = rows.iter().find(|row| row["operation"] == name).unwrap();
        assert!(number(row, "/limit_s") > 0.0 && number(row, "/one_thread_s") > 0.0, "{row}");
    }
    let product = rows.iter().find(|row| row["shape"] == "down, M 64, N 64, K 96").unwrap();
    assert_eq!([number(product, "/flop"), number(product, "/bytes")], [786_432.0, 12_288.0]);
    fails(engine().args(["bench", "kernels", "--models", "huge"]), 2, "known are smollm2-135m");
}

#[test]
fn a_server_is_loaded_over_http() {
    let folder = Folder::new();
    let sizes = ["--random-input-len", "8", "--random-output-len", "3", "--num-prompts", "5"];
    // A server of its own.
    let words =
        [&["serve", "--idle-connections", "3", "--max-concurrency", "2"][..], &sizes].concat();
    let (text, results) = bench(&folder, &words, &ONE_THREAD);
    assert!(text.starts_with("============ Serving Benchmark Result ============\n"), "{text}");
    assert_eq!([number(&results, "/completed"), number(&results, "/failed")], [5.0, 0.0]);
    assert_eq!(number(&results, "/total_output_tokens"), 15.0);
    assert_eq!(number(&results, "/idle_connections/held"), 3.0);
    assert!((1.0..=2.0).contains(&number(&results, "/max_concurrent_requests")));
    assert!(number(&results, "/server_memory/peak_bytes") > 1e6);
    assert!(number(&results, "/p99_ttft_ms") >= number(&results, "/p50_ttft_ms"));

    // A running one, whose requests take place for a while; and one request too long for it.
    let flags = ["--port", "0", "--served-model-name", "tiny"];
    let mut server = Process::serve(&folder.tiny_model(), &flags);
    let url = format!("http://{}", server.address());
    let id = server.child.id().to_string();
    let soak = ["serve", "--base-url", &url, "--server-pid", &id, "--duration", "0.3"];
    let sizes = ["--random-input-len", "4", "--random-output-len", "2", "--max-concurrency", "2"];
    let (_, results) = bench(&folder, &[&soak[..], &sizes].concat(), &["--backend", "openai-chat"]);
    assert_eq!(results["model_id"], "tiny");
    assert!(number(&results, "/completed") >= 2.0 && number(&results, "/duration") >= 0.3);
    let mut long = engine();
    long.args(["bench", "serve", "--quiet", "--base-url", &url, "--random-input-len", "100000"]);
    let ran = run(long.args(["--num-prompts", "1", "--num-warmups", "0"]));
    assert_eq!(ran.code, Some(1), "{ran:?}");
    assert!(ran.stdout.contains("Failed requests:                         1\n"), "{ran:?}");
    assert!(ran.stderr.starts_with("error: no request was answered: status 400"), "{ran:?}");
}

#[test]
fn results_are_saved_under_the_name_of_the_run() {
    let folder = Folder::new();
    let dir = folder.path("results");
    let mut command = engine();
    command.args(["bench", "serve", "--quiet", "--num-prompts", "2", "--random-output-len", "2"]);
    command.args(ONE_THREAD).args([
        "--label",
        "night",
        "--metadata",
        "commit=abc",
        "--save-detailed",
    ]);
    command.args(["--request-rate", "100", "--save-result", "--result-dir"]).arg(&dir);
    let ran = run(&mut command);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let entry = fs::read_dir(&dir).unwrap().next().unwrap().unwrap();
    let name = entry.file_name().into_string().unwrap();
    assert!(name.starts_with("night-100qps-builtin-arith-") && name.ends_with(".json"), "{name}");
    let results: Value = serde_json::from_str(&fs::read_to_string(entry.path()).unwrap()).unwrap();
    assert_eq!(results["commit"], "abc");
    assert_eq!((&results["output_lens"], &results["errors"]), (&[2, 2].into(), &["", ""].into()));
}
