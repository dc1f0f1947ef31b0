//! `engine sft` from end to end: what it leaves of an older run, and what it refuses before the first step.

use std::fs;
use std::path::Path;
use std::process::Command;

use super::rl::set;
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
    let second = run(&mut sft(&folder, &model, &data, &[]));
    assert_eq!(second.code, Some(0), "{second:?}");
    let aside = dir.join("checkpoints.old-1");
    let note = format!("what an older run left is now in {}", aside.display());
    assert!(second.stderr.contains(&note), "{second:?}");
    assert!(aside.join("step_2/model.safetensors").is_file());
    assert_eq!(fs::read(aside.join("metrics.jsonl")).unwrap(), metrics);
    let lines = fs::read_to_string(dir.join("metrics.jsonl")).unwrap().lines().count();
    assert_eq!((lines, dir.join("checkpoints/step_1").is_dir()), (1, true));
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
