//! `engine sft` from end to end: that it goes on where it was killed, what it leaves of an older run, and what it
//! refuses before the first step.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use super::process::Process;
use super::rl::{latest, make_fifo, metrics, set};
use super::support::{Folder, SMALL, engine, fails, run};

fn sft(folder: &Folder, model: &Path, data: &Path, sets: &[&str]) -> Command {
    let mut command = engine();
    command.arg("sft").args(SMALL).arg("--model").arg(model).arg("--train-files").arg(data);
    command.arg("--val-files").arg(data).arg("--output").arg(folder.path("run"));
    set(&mut command, &["trainer.total_steps=1", "data.train_batch_size=1", "data.shuffle=false"]);
    set(&mut command, sets);
    command
}

const PAIR: &str = "{\"prompt\": \"1+1=\", \"completion\": \"2\"}\n";

#[test]
fn a_second_run_leaves_the_first_one_whole() {
    let folder = Folder::new();
    let (model, data) = (folder.tiny_model(), folder.write("pairs.jsonl", PAIR));
    let first = run(&mut sft(&folder, &model, &data, &["trainer.total_steps=2"]));
    assert_eq!(first.code, Some(0), "{first:?}");
    let dir = folder.path("run");
    let metrics = fs::read(dir.join("metrics.jsonl")).unwrap();
    let second = run(sft(&folder, &model, &data, &[]).args(["--resume", "never"]));
    assert_eq!(second.code, Some(0), "{second:?}");
    let aside = dir.join("checkpoints.old-1");
    let note = format!("what an older run left is now in {}", aside.display());
    assert!(second.stderr.contains(&note), "{second:?}");
    assert!(aside.join("step_2/model.safetensors").is_file());
    assert_eq!(fs::read(aside.join("metrics.jsonl")).unwrap(), metrics);
    let lines = fs::read_to_string(dir.join("metrics.jsonl")).unwrap().lines().count();
    assert_eq!((lines, dir.join("checkpoints/step_1").is_dir()), (1, true));
}

/// The metrics of a run, and of its last checkpoint the files that do not name the run.
fn left(dir: &Path) -> (Vec<Value>, [Vec<u8>; 2]) {
    let files = ["model.safetensors", "trainer/optimizer.safetensors"];
    (metrics(dir), files.map(|name| fs::read(latest(dir).join(name)).unwrap()))
}

#[test]
fn a_killed_run_goes_on_to_the_same_bits() {
    let folder = Folder::new();
    let model = folder.tiny_model();
    let pair = |i: usize| PAIR.replace("\"2\"", &format!("\"{i}\""));
    let data = folder.write("pairs.jsonl", &(0..7).map(pair).collect::<String>());
    let sft = |output: &str, sets: &[&str]| {
        let mut command = engine();
        command.arg("sft").args(SMALL).arg("--output").arg(folder.path(output));
        command.arg("--train-files").arg(&data).arg("--val-files").arg(&data);
        set(&mut command, &["data.train_batch_size=3", "trainer.save_freq=2"]);
        set(&mut command, &["trainer.total_steps=9", "trainer.test_freq=4"]);
        set(&mut command, sets);
        command
    };
    let shape = model.join("config.json");
    let fresh = |output: &str, sets: &[&str]| {
        let mut command = sft(output, sets);
        command.arg("--config-json").arg(&shape);
        command
    };
    let whole = run(&mut fresh("whole", &[]));
    assert_eq!(whole.code, Some(0), "{whole:?}");
    // Opening a pipe that nobody reads holds the run up between a checkpoint's appearance and `latest`.
    let dir = folder.path("killed");
    fs::create_dir(&dir).unwrap();
    let pipe = dir.join("latest.tmp");
    make_fifo(&pipe);
    let mut killed = Process::start(&mut fresh("killed", &[]));
    killed.line("step 2/9");
    while !dir.join("checkpoints/step_2").exists() {
        std::thread::yield_now();
    }
    killed.signal("-KILL");
    killed.ended(None);
    fs::remove_file(&pipe).unwrap();
    let ran = run(&mut fresh("killed", &[]));
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(ran.stderr.contains("going on after step 2"), "{ran:?}");
    assert!(!ran.stderr.contains(" up to step "), "{ran:?}");
    assert!(left(&dir) == left(&folder.path("whole")));

    let ran = run(&mut fresh("killed", &["trainer.test_freq=2"]));
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(ran.stderr.contains("nothing is left to do: trainer.total_steps is 9; "), "{ran:?}");
    assert!(left(&dir) == left(&folder.path("whole")));
    fails(&mut fresh("killed", &["trainer.seed=5"]), 3, "trainer.seed was 0 when the checkpoint");
    let mut other = sft("killed", &[]);
    let copy = folder.write("other.json", &fs::read_to_string(model.join("config.json")).unwrap());
    fails(other.arg("--config-json").arg(copy), 2, "model.config_json is ");
    let mut rl = engine();
    rl.arg("rl").args(SMALL).arg("--output").arg(&dir);
    fails(&mut rl, 2, " was written by engine sft, engine rl cannot go on from it");
}

#[test]
fn an_interrupted_run_says_where_it_goes_on() {
    let folder = Folder::new();
    let (model, data) = (folder.tiny_model(), folder.write("pairs.jsonl", PAIR));
    let mut process =
        Process::start(&mut sft(&folder, &model, &data, &["trainer.total_steps=100000"]));
    process.line("step 1/");
    process.signal("-INT");
    let said = process.ended(75);
    assert!(said.contains(" goes on from here with --resume auto"), "{said}");
    let checkpoint = latest(&folder.path("run"));
    assert!(said.contains(checkpoint.to_str().unwrap()), "{said}");
    // A checkpoint of a program that could not go on.
    fs::remove_file(checkpoint.join("trainer/state.json")).unwrap();
    let manifest = checkpoint.join("MANIFEST.sha256");
    let text = fs::read_to_string(&manifest).unwrap();
    let kept: String = text
        .lines()
        .filter(|line| !line.contains("state.json"))
        .map(|l| format!("{l}\n"))
        .collect();
    fs::write(&manifest, kept).unwrap();
    fails(&mut sft(&folder, &model, &data, &[]), 2, "has no trainer/state.json");
}

#[test]
fn a_row_that_is_too_long_is_named_before_the_first_step() {
    let folder = Folder::new();
    let model = folder.tiny_model();
    let long = PAIR.replace("1+1", &"1+".repeat(40));
    let data = folder.write("pairs.jsonl", &format!("{PAIR}\n{PAIR}{long}"));
    let sets = ["data.max_length=60"];
    let mut command = sft(&folder, &model, &data, &sets);
    fails(&mut command, 3, "pairs.jsonl:4: prompt and completion have ");
    let good = folder.write("good.jsonl", PAIR);
    let mut command = sft(&folder, &model, &good, &sets);
    fails(
        command.arg("--val-files").arg(&data),
        3,
        "pairs.jsonl:4: prompt and one token to answer",
    );
    assert!(!folder.path("run/metrics.jsonl").exists());
}

#[test]
fn a_dry_run_plans_for_the_shape_that_is_asked_for() {
    let folder = Folder::new();
    let model = folder.tiny_model();
    let plan = |flags: &[&str]| {
        let mut command = engine();
        command.arg("sft").args(SMALL).arg("--dry-run").args(flags);
        command
    };
    let weights = |flags: &[&str]| {
        let ran = run(&mut plan(flags));
        assert_eq!(ran.code, Some(0), "{ran:?}");
        let line = ran.stdout.lines().find(|line| line.starts_with("# weights")).unwrap();
        line.to_owned()
    };
    let shape = model.join("config.json");
    let shape = shape.to_str().unwrap();
    assert_eq!(weights(&["--config-json", shape]), weights(&["--model", model.to_str().unwrap()]));
    assert_ne!(weights(&["--config-json", shape]), weights(&[]));
    let absent = folder.path("absent.json");
    fails(&mut plan(&["--config-json", absent.to_str().unwrap()]), 3, "absent.json");
    let bad = folder.write("bad.json", "{}");
    fails(&mut plan(&["--config-json", bad.to_str().unwrap()]), 3, "bad.json");
}
