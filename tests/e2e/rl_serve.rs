//! `engine rl --serve`: requests are answered by the weights in training, through its updates, and the run
//! learns what it would have learnt alone.

use std::collections::BTreeSet;
use std::fs;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use super::process::{self, Process};
use super::rl::{set, task};
use super::support::{Folder, engine, fails, run};

/// A short run of the built-in model on small sums, whose rewards take their time.
fn rl(folder: &Folder, output: &str) -> Command {
    let data = folder.write("sums.jsonl", &(0..24).map(|i| task(i % 6, i / 6)).collect::<String>());
    let mut command = engine();
    command.args(["rl", "--method", "grpo", "--model", "builtin:arith", "--threads", "1"]);
    command.args(["--kv-cache-memory-bytes", "8MiB", "--train-files"]).arg(data);
    command.arg("--output").arg(folder.path(output));
    set(&mut command, &["data.train_batch_size=6", "rollout.n=4", "data.max_response_length=12"]);
    set(&mut command, &["algorithm.mini_batch_size=3", "optimizer.lr=1e-3"]);
    set(&mut command, &["trainer.total_steps=6", "trainer.test_freq=0", "trainer.save_freq=0"]);
    // By the response alone: in which order responses end is not the same with guests.
    let judge = "while read -r line; do sleep 0.02; id=${line#*\\\"id\\\":}; id=${id%%,*}; \
                 case ${line#*\\\"response\\\":} in *[13579]*) score=1;; *) score=0;; esac; \
                 echo \"{\\\"id\\\": $id, \\\"score\\\": $score}\"; done";
    let judge = folder.write("judge.sh", judge);
    command.arg("--reward").arg(format!("command:sh {}", judge.display()));
    set(&mut command, &["reward.workers=1", "trainer.val_before_train=false"]);
    command
}

/// Weights of the last checkpoint and the samples of every step.
fn left(output: &Path) -> (Vec<u8>, Vec<String>) {
    let weights = fs::read(output.join("checkpoints/step_6/model.safetensors")).unwrap();
    let sample = |step| fs::read_to_string(output.join(format!("samples/step_{step}.jsonl")));
    (weights, (1..=6).map(|step| sample(step).unwrap()).collect())
}

/// Status and body; `None` when nobody answers any more.
fn ask(address: &str, key: &str, body: &str) -> Option<(u16, String)> {
    let head = format!("POST /v1/completions\r\nauthorization: Bearer {key}");
    process::ask(TcpStream::connect(address).ok()?, &head, body)
}

/// Asks again and again until the server goes; returns the versions of each answer's tokens.
fn hammer(address: &str, client: u64) -> Vec<Vec<u64>> {
    let mut answers = Vec::new();
    for seed in 0.. {
        let body = json!({"prompt": "12+34=", "max_tokens": 20 + 17 * client, "seed": seed,
            "ignore_eos": true, "return_token_ids": true});
        match ask(address, "key", &body.to_string()) {
            Some((200, body)) => {
                let answer: Value = serde_json::from_str(&body).unwrap();
                let choice = &answer["choices"][0];
                let versions: Vec<u64> =
                    serde_json::from_value(choice["weights_versions"].clone()).unwrap();
                assert_eq!(versions.len(), choice["token_ids"].as_array().unwrap().len());
                assert!(versions.is_sorted(), "{versions:?}");
                answers.push(versions);
            }
            // The end of the run: turned away, or nobody there.
            Some((503, _)) | None => break,
            Some(other) => panic!("{other:?}"),
        }
    }
    answers
}

#[test]
fn a_run_answers_requests_and_learns_the_same() {
    let folder = Folder::new();
    let ran = run(&mut rl(&folder, "alone"));
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let alone: PathBuf = folder.path("alone");

    let mut command = rl(&folder, "served");
    command.args(["--api-key", "key", "--served-model-name", "policy"]);
    let mut run = Process::start(command.args(["--serve", "127.0.0.1:0"]));
    let address = run.address();
    // Read on, so that the run can go on logging.
    let ended = std::thread::spawn(move || run.ended(0));
    assert_eq!(ask(&address, "other", "{}").unwrap().0, 401);
    let answers: Vec<Vec<u64>> = std::thread::scope(|scope| {
        let address = &address;
        let clients: Vec<_> =
            (0..4).map(|client| scope.spawn(move || hammer(address, client))).collect();
        clients.into_iter().flat_map(|client| client.join().unwrap()).collect()
    });
    let log = ended.join().unwrap();
    assert!(log.contains("shutting down"), "{log}");
    let versions: BTreeSet<u64> = answers.iter().flatten().copied().collect();
    assert!(versions.len() > 3, "answers of many versions: {versions:?}");
    let spans = answers.iter().filter(|versions| versions.first() != versions.last()).count();
    assert!(spans > 0, "none of {} answers outlived an update", answers.len());
    assert!(left(&alone) == left(&folder.path("served")), "serving changed what was learnt");
}

#[test]
fn a_signal_stops_the_run_at_a_checkpoint_and_lets_requests_finish() {
    let folder = Folder::new();
    let mut command = rl(&folder, "run");
    set(&mut command, &["trainer.total_steps=1000"]);
    command.args(["--served-model-name", "policy", "--serve", "127.0.0.1:0"]);
    let mut run = Process::start(&mut command);
    let address = run.address();
    // Its 900 tokens take many steps of the run.
    let body = json!({"prompt": "1+", "max_tokens": 900, "ignore_eos": true}).to_string();
    let answer = std::thread::spawn(move || ask(&address, "", &body));
    run.line("step 2/");
    run.signal("-TERM");
    let rest = run.ended(75);
    assert!(!rest.contains("step 2/"), "the run went on: {rest}");
    let (status, body) = answer.join().unwrap().unwrap();
    let answer: Value = serde_json::from_str(&body).unwrap();
    assert_eq!((status, &answer["usage"]["completion_tokens"]), (200, &json!(900)));
}

#[test]
fn what_cannot_be_served_is_refused_at_once() {
    let folder = Folder::new();
    fails(rl(&folder, "a").args(["--serve", "8000"]), 2, "8000: expected HOST:PORT");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    fails(rl(&folder, "b").args(["--serve", &address]), 1, &address);
}
