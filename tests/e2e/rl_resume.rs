//! What a run of `engine rl` that goes on keeps, refuses and says.

use std::fs;
use std::path::Path;

use serde_json::Value;

use super::process::Process;
use super::rl::{Lab, latest, make_fifo};
use super::support::{Folder, Ran, SMALL, engine, fails, json_lines, run};

/// Runs to the end.
fn done(lab: &Lab, output: &str, settings: &[&str]) -> Ran {
    let ran = run(&mut lab.rl(output, settings));
    assert_eq!(ran.code, Some(0), "{ran:?}");
    ran
}

/// Makes `checkpoint` one of a program that did not write its file `name`.
fn without(checkpoint: &Path, name: &str) {
    fs::remove_file(checkpoint.join(name)).unwrap();
    let manifest = checkpoint.join("MANIFEST.sha256");
    let text = fs::read_to_string(&manifest).unwrap();
    let kept = text.lines().filter(|line| !line.ends_with(&format!("  {name}")));
    fs::write(&manifest, kept.map(|line| format!("{line}\n")).collect::<String>()).unwrap();
}

#[test]
fn another_model_is_refused_and_other_settings_are_said() {
    let lab = Lab::new();
    done(&lab, "run", &["trainer.total_steps=1"]);
    let dir = lab.folder.path("run");
    let config = fs::read(dir.join("config.toml")).unwrap();
    let other =
        Lab { folder: Folder::new(), model: "builtin:arith".into(), data: lab.data.clone() };
    let (output, two) = (dir.to_str().unwrap(), ["trainer.total_steps=2"]);
    let (model, place) = (lab.model.display(), dir.join("checkpoints/step_1"));
    let part = format!(
        "model.path is builtin:arith, {} was trained from {model}: go on with --model {model}, or begin \
         anew with --resume never or another --output",
        place.display()
    );
    fails(&mut other.rl(output, &two), 2, &part);
    fails(other.rl("elsewhere", &two).arg("--resume").arg(&place), 2, &part);
    assert_eq!(fs::read(dir.join("config.toml")).unwrap(), config);

    let ran = done(&lab, "run", &["trainer.total_steps=2", "algorithm.method=grpo"]);
    let note = "algorithm.method was \"kl_cov\" up to step 1, is \"grpo\"";
    assert!(ran.stderr.contains(note), "{ran:?}");
    let ran = done(&lab, "run", &["trainer.total_steps=3", "algorithm.method=grpo"]);
    assert!(!ran.stderr.contains(" up to step "), "{ran:?}");
}

#[test]
fn a_checkpoint_of_an_older_program_is_gone_on_from() {
    let lab = Lab::new();
    let one = ["trainer.total_steps=1", "trainer.max_tokens_per_microbatch=16"];
    done(&lab, "run", &one);
    without(&latest(&lab.folder.path("run")), "trainer/config.toml");
    let ran = done(&lab, "run", &["trainer.total_steps=2", "optimizer.lr=2e-3"]);
    assert!(ran.stderr.contains("going on after step 1"), "{ran:?}");
    assert!(!ran.stderr.contains(" up to step "), "{ran:?}");
    let text = fs::read_to_string(lab.folder.path("run/config.toml")).unwrap();
    assert!(text.contains("max_tokens_per_microbatch = 16\n"), "{text}");
}

#[test]
fn one_run_at_a_time_writes_to_a_folder() {
    let lab = Lab::new();
    // Opening a pipe that nobody reads holds the run up where it writes the samples of step 1.
    let dir = lab.folder.path("run");
    fs::create_dir_all(dir.join("samples")).unwrap();
    let pipe = dir.join("samples/.tmp-step_1.jsonl");
    make_fifo(&pipe);
    let mut first = Process::start(&mut lab.rl("run", &[]));
    first.line("step 0: validation");
    let part = format!("another run writes to {}", dir.display());
    fails(&mut lab.rl("run", &[]), 2, &part);
    let mut sft = engine();
    sft.arg("sft").args(SMALL).arg("--model").arg(&lab.model).arg("--output").arg(&dir);
    fails(&mut sft, 2, &part);
    first.signal("-KILL");
    first.ended(None);
    fs::remove_file(&pipe).unwrap();
    done(&lab, "run", &["trainer.total_steps=1"]);
}

/// The steps of `metrics.jsonl` in a folder.
fn steps(dir: &Path) -> Vec<u64> {
    let lines = json_lines(&fs::read_to_string(dir.join("metrics.jsonl")).unwrap());
    let step = |line: &Value| line["training/global_step"].as_u64().unwrap();
    lines.iter().map(step).collect()
}

#[test]
fn a_run_that_goes_back_leaves_no_later_step_in_its_place() {
    let lab = Lab::new();
    let keep = ["trainer.save_freq=1", "trainer.keep_checkpoints=0", "trainer.total_steps=3"];
    done(&lab, "run", &keep);
    let dir = lab.folder.path("run");
    let mut back = lab.rl("run", &[&keep[..2], &["trainer.total_steps=2"]].concat());
    back.args(["--set", "optimizer.lr=2e-3", "--resume"]).arg(dir.join("checkpoints/step_1"));
    let ran = run(&mut back);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let aside = dir.join("checkpoints.old-1");
    assert!(ran.stderr.contains(&format!("is now in {}", aside.display())), "{ran:?}");
    for name in ["step_2", "step_3", "samples/step_2.jsonl", "samples/step_3.jsonl", "report.html"]
    {
        assert!(aside.join(name).exists(), "{name}");
    }
    assert!(!dir.join("checkpoints/step_3").exists());
    assert!(!dir.join("samples/step_3.jsonl").exists());
    assert_eq!(steps(&dir), [0, 1, 2]);
    assert!(fs::read_to_string(dir.join("report.html")).unwrap().contains("2 steps"));

    // Anew, with fewer steps: the report is of these, and the old run is a run of its own.
    let one = ["trainer.total_steps=1"];
    let ran = run(lab.rl("run", &one).args(["--resume", "never"]));
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let old = dir.join("checkpoints.old-2");
    assert_eq!((steps(&dir), steps(&old)), (vec![0, 1], vec![0, 1, 2]));
    assert!(!dir.join("samples/step_2.jsonl").exists() && old.join("config.toml").is_file());
    let ran = run(engine().arg("plot").arg(&old).arg("--output").arg(lab.folder.path("plot.html")));
    assert_eq!(ran.code, Some(0), "{ran:?}");
}

#[test]
fn a_refused_setting_leaves_the_older_run_alone() {
    let lab = Lab::new();
    done(&lab, "run", &["trainer.total_steps=1"]);
    let dir = lab.folder.path("run");
    let before = fs::read(dir.join("metrics.jsonl")).unwrap();
    for (set, part) in [
        ("rollout.n=129", "rollout.n is 129, limit is 1 to 128"),
        ("rollout.temperature=200", "rollout.temperature is 200, limit is 0 to 100"),
        ("rollout.stop=[\"\"]", "rollout.stop string 0 is empty"),
    ] {
        fails(lab.rl("run", &[set]).args(["--resume", "never"]), 2, part);
        fails(lab.rl("run", &[set]).arg("--dry-run"), 2, part);
    }
    assert_eq!(fs::read(dir.join("metrics.jsonl")).unwrap(), before);
    assert!(latest(&dir).is_dir());
}

#[test]
fn a_run_goes_on_in_its_own_format_and_with_its_own_passes() {
    let lab = Lab::new();
    let settings = ["trainer.total_steps=1", "trainer.max_tokens_per_microbatch=16"];
    let ran = run(lab.rl("run", &settings).args(["--dtype", "f32"]));
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let dir = lab.folder.path("run");
    let other = "dtype is bf16, the run that wrote ";
    let two = ["trainer.total_steps=2"];
    fails(lab.rl("run", &two).args(["--dtype", "bf16"]), 2, other);
    // Wherever the checkpoint is, and whatever lies around it.
    let copy = lab.folder.path("copy");
    let copied = std::process::Command::new("cp").arg("-r").arg(latest(&dir)).arg(&copy).status();
    assert!(copied.unwrap().success());
    let ran = run(lab.rl("elsewhere", &two).arg("--resume").arg(&copy));
    assert_eq!(ran.code, Some(0), "{ran:?}");
    done(&lab, "run", &two);
    let weights = |output: &str| {
        let path = latest(&lab.folder.path(output)).join("model.safetensors");
        fs::read(path).unwrap()
    };
    assert!(weights("elsewhere") == weights("run"));
    let whole = [two[0], settings[1]];
    let ran = run(lab.rl("whole", &whole).args(["--dtype", "f32"]));
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(weights("whole") == weights("run"));
}
