//! What `engine rl` refuses, and what a full disk leaves behind.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::rl::{Lab, latest, task};
use super::support::{Folder, fails, run};

#[test]
fn unknown_words_name_the_nearest() {
    let lab = Lab::new();
    let bad = |settings: &[&str], part: &str| {
        fails(&mut lab.rl("run", settings), 2, part);
        assert!(!lab.folder.path("run").exists(), "{part}");
    };
    bad(&["algorithm.method=kl_cop"], "did you mean kl_cov?");
    bad(&["rollout.temprature=1"], "did you mean rollout.temperature?");
    bad(&["trainer.total_stepz=1"], "did you mean trainer.total_steps?");
    bad(&["data.train_batch_size=eight"], "data.train_batch_size");
    bad(&["optimizer.lr=-1"], "optimizer.lr is -1, limit is 0 or more");
    bad(&["algorithm.mini_batch_size=9"], "algorithm.mini_batch_size is 9");
}

#[test]
fn bad_rows_are_named() {
    let lab = Lab::new();
    let bad = |row: &str, settings: &[&str], part: &str| {
        let text = format!("{}{}\n{row}\n", task(1, 1), task(1, 2));
        let mut lab = Lab { folder: Folder::new(), model: lab.model.clone(), data: PathBuf::new() };
        lab.data = lab.folder.write("rows.jsonl", &text);
        fails(&mut lab.rl("run", settings), 3, part);
        assert!(!lab.folder.path("run/latest").exists(), "{part}");
        assert!(!lab.folder.path("run/samples").exists(), "nothing ran before: {part}");
    };
    let truth = r#""reward_model": {"ground_truth": "2"}"#;
    bad("{\"prompt\": ", &[], "rows.jsonl:4: not JSON");
    bad("[1]", &[], "rows.jsonl:4: the line is an array");
    bad(
        &format!("{{{truth}}}"),
        &[],
        "rows.jsonl:4: no column \"prompt\"; columns are: reward_model",
    );
    bad(r#"{"prompt": "1+1="}"#, &[], "rows.jsonl:4: no column \"reward_model.ground_truth\"");
    let long =
        format!("{{\"data_source\": \"arith\", \"prompt\": \"{}=\", {truth}}}", "1+".repeat(20));
    let limit = ["data.max_prompt_length=40"];
    bad(&long, &limit, "rows.jsonl: row 3: prompt has 41 tokens, data.max_prompt_length is 40");
    let longer = long.replace("1+1", &"1+".repeat(50));
    bad(&longer, &["data.max_prompt_length=2000"], "the context leaves 120 before the response");
}

#[test]
fn data_files_that_hold_nothing_to_train_on_are_refused() {
    let mut lab = Lab::new();
    let good = lab.data.clone();
    lab.data = lab.folder.write("empty.jsonl", "\n");
    fails(&mut lab.rl("run", &[]), 3, "empty.jsonl: the file has no rows");
    // As a download that stopped leaves it.
    lab.data = lab.folder.write("cut.parquet", "PAR1\x15\x04\x15");
    let part = match cfg!(feature = "parquet") {
        true => "cut.parquet: not a Parquet file, or one cut short",
        false => {
            "cut.parquet: Parquet is not part of this program, build it with cargo build --release --features parquet"
        }
    };
    fails(&mut lab.rl("run", &[]), 3, part);
    lab.data = lab.folder.write("long.jsonl", &task(1, 1).replace("1+1", &"1+".repeat(60)));
    let drop = ["data.filter_overlong_prompts=true"];
    let part = "long.jsonl: no row is left: 1 rows read, 1 too long, 0 kept";
    fails(&mut lab.rl("run", &drop), 3, part);
    assert!(!lab.folder.path("run/samples").exists());
    // Beside rows that fit, it is dropped and said.
    let mixed = fs::read_to_string(&lab.data).unwrap() + &fs::read_to_string(good).unwrap();
    lab.data = lab.folder.write("mixed.jsonl", &mixed);
    let ran = run(lab.rl("run", &drop).args(["--set", "trainer.total_steps=1"]));
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let note = "training data: 25 rows read, 1 too long, 24 kept";
    assert!(ran.stderr.contains(note), "{ran:?}");
}

/// Replaces the file `name` of the model by what `change` makes of it.
fn change(model: &Path, name: &str, change: impl FnOnce(Vec<u8>) -> Vec<u8>) {
    let path = model.join(name);
    fs::write(&path, change(fs::read(&path).unwrap())).unwrap();
}

#[test]
fn bad_models_are_refused_before_anything_is_written() {
    let lab = Lab::new();
    let model = lab.model.clone();
    let bad = |part: &str| {
        fails(&mut lab.rl("run", &[]), 3, part);
        assert!(!lab.folder.path("run/metrics.jsonl").exists(), "{part}");
    };
    let weights = fs::read(model.join("model.safetensors")).unwrap();
    let config = fs::read(model.join("config.json")).unwrap();
    change(&model, "model.safetensors", |bytes| bytes[..bytes.len() - 1000].to_vec());
    bad("model.safetensors");
    fs::write(model.join("model.safetensors"), &weights).unwrap();
    let replace = |from: &str, to: &str| {
        let text = String::from_utf8(config.clone()).unwrap();
        let (from, to) = (format!("\"{from}"), format!("\"{to}"));
        assert!(text.contains(&from), "{text}");
        fs::write(model.join("config.json"), text.replace(&from, &to)).unwrap();
    };
    replace("intermediate_size\": 128", "intermediate_size\": 96");
    bad("shape");
    replace("LlamaForCausalLM", "MambaForCausalLM");
    bad("supported are llama");
    fs::remove_file(model.join("config.json")).unwrap();
    bad("config.json");
    fs::remove_dir_all(&model).unwrap();
    bad("step_60");
}

#[test]
fn a_run_does_not_go_on_with_other_data_seeds_or_models() {
    let mut lab = Lab::new();
    let ran = run(&mut lab.rl("run", &["trainer.total_steps=1"]));
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let before = fs::read(lab.folder.path("run/metrics.jsonl")).unwrap();
    fails(&mut lab.rl("run", &["trainer.seed=5"]), 3, "trainer.seed was 0");
    fails(&mut lab.rl("run", &["data.seed=5"]), 3, "data.seed was 1");
    let absent = lab.folder.path("absent");
    fails(lab.rl("run", &[]).arg("--resume").arg(&absent), 3, "absent");
    lab.data = lab.folder.write("other.jsonl", &task(3, 4));
    fails(&mut lab.rl("run", &[]), 3, "the training data's digest was");
    assert_eq!(fs::read(lab.folder.path("run/metrics.jsonl")).unwrap(), before);
}

/// Checks that a run with no room for its checkpoint has said so in one line and left none.
fn assert_no_checkpoint(run_dir: &Path) {
    assert!(!run_dir.join("latest").exists() && !run_dir.join("latest.tmp").exists());
    let left: Vec<_> = fs::read_dir(run_dir.join("checkpoints")).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_checkpoint_that_does_not_fit_is_not_there() {
    let lab = Lab::new();
    // The largest file that may be written, in blocks of 512 or 1024 bytes, is below the optimizer's.
    let inner = lab.rl("limited", &["trainer.total_steps=1"]);
    let mut limited = Command::new("sh");
    limited.args(["-c", "trap '' XFSZ; ulimit -f 1000; exec \"$0\" \"$@\""]);
    limited.arg(inner.get_program()).args(inner.get_args());
    let optimizer = "limited/checkpoints/step_1/trainer/optimizer.safetensors: File too large";
    fails(&mut limited, 1, optimizer);
    assert_no_checkpoint(&lab.folder.path("limited"));
}

#[test]
fn a_run_begun_anew_never_goes_on_from_an_older_one() {
    let lab = Lab::new();
    let two = ["trainer.total_steps=2"];
    assert_eq!(run(&mut lab.rl("run", &two)).code, Some(0));
    // The new run ends before its first checkpoint.
    let mut inner = lab.rl("run", &two);
    inner.args(["--resume", "never"]);
    let mut limited = Command::new("sh");
    limited.args(["-c", "trap '' XFSZ; ulimit -f 1000; exec \"$0\" \"$@\""]);
    let ran = run(limited.arg(inner.get_program()).args(inner.get_args()));
    assert_eq!(ran.code, Some(1), "{ran:?}");
    let dir = lab.folder.path("run");
    let aside = dir.join("checkpoints.old-1");
    let note = format!("what an older run left is now in {}", aside.display());
    assert!(ran.stderr.contains(&note), "{ran:?}");
    assert_no_checkpoint(&dir);
    for file in ["step_2/model.safetensors", "metrics.jsonl", "samples/step_2.jsonl", "report.html"]
    {
        assert!(aside.join(file).is_file(), "{file}");
    }
    let ran = run(&mut lab.rl("run", &two));
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(!ran.stderr.contains("going on after"), "{ran:?}");
}

/// A file system of a given size, taken away when dropped.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(path: PathBuf, size: &str) -> Option<Self> {
        fs::create_dir(&path).unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"]).arg(&path);
        let mounted = mount.output().is_ok_and(|output| output.status.success());
        mounted.then_some(Self(path))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // A failure shows when the folder cannot be removed; there is nothing to do about it.
        let _left = Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn a_full_disk_spares_the_checkpoint_before() {
    let lab = Lab::new();
    // A checkpoint takes 1.6 MiB: one fits, a second does not.
    let Some(disk) = SmallDisk::mount(lab.folder.path("disk"), "2560k") else {
        println!("left out: a full disk, as mounting one is not permitted here");
        return;
    };
    let settings = ["trainer.save_freq=1", "trainer.total_steps=3"];
    fails(&mut lab.rl("disk/run", &settings), 1, "No space left on device");
    let run_dir = disk.0.join("run");
    let whole = latest(&run_dir);
    assert_eq!(whole, run_dir.join("checkpoints/step_1"));
    let left: Vec<_> = fs::read_dir(run_dir.join("checkpoints")).unwrap().collect();
    assert_eq!(left.len(), 1, "{left:?}");
    // With room, the run goes on from there as if nothing had happened.
    let mut resumed = lab.rl("roomy", &settings);
    let ran = run(resumed.arg("--resume").arg(&whole));
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let ran = run(&mut lab.rl("never-full", &settings));
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let weights = |name: &str| {
        fs::read(lab.folder.path(name).join("checkpoints/step_3/model.safetensors")).unwrap()
    };
    assert_eq!(weights("roomy"), weights("never-full"));

    let Some(disk) = SmallDisk::mount(lab.folder.path("tiny-disk"), "1m") else { return };
    fails(&mut lab.rl("tiny-disk/run", &settings), 1, "No space left on device");
    assert_no_checkpoint(&disk.0.join("run"));
}
