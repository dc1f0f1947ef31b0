//! Saves that succeed, fail, are interrupted, and are damaged afterwards.

use super::*;
use crate::error::ErrorKind;
use crate::testing::TestDir;

fn state(step: u64) -> TrainState {
    TrainState {
        format: 1,
        step,
        optimizer_step: 8 * step,
        seed: 1,
        data_seed: 2,
        cursor: Cursor { epoch: 1, position: 5 },
        data_hash: "d".into(),
        config_hash: "c".into(),
        weights_version: step,
        kl_coef: Some(1e-3),
        dtype: Some("bf16".into()),
        program_version: "0.1.0".into(),
    }
}

fn save(store: &CheckpointStore, step: u64) -> Checkpoint {
    let writer = store.begin(step).unwrap();
    writer.file("model.safetensors", |out| out.write_all(&[step as u8; 5000])).unwrap();
    writer.state(&state(step), "[model]\n").unwrap();
    fs::write(writer.path().join("config.json"), "{}").unwrap();
    writer.publish().unwrap()
}

fn names(dir: &Path) -> Vec<String> {
    entries(dir).unwrap().into_iter().map(|(name, _)| name).collect()
}

#[test]
fn a_published_checkpoint_is_whole_latest_and_the_oldest_goes() {
    let dir = TestDir::new("checkpoint");
    let store = CheckpointStore::open(dir.path(), 2).unwrap();
    assert_eq!(store.find_latest().unwrap(), Found::default());
    for step in [5, 10, 100] {
        let checkpoint = save(&store, step);
        assert_eq!(store.find_latest().unwrap().checkpoint, Some(checkpoint.clone()));
        assert_eq!(TrainState::read(&checkpoint.path).unwrap(), state(step));
    }
    assert_eq!(names(&dir.path().join("checkpoints")), ["step_10", "step_100"]);
    let latest = fs::read_to_string(dir.path().join("latest")).unwrap();
    assert_eq!(latest, "checkpoints/step_100\n");
    let files = names(&dir.path().join("checkpoints/step_100"));
    assert_eq!(files, ["MANIFEST.sha256", "config.json", "model.safetensors", "trainer"]);
}

#[test]
fn the_coefficient_of_the_divergence_comes_back_to_the_bit() {
    let dir = TestDir::new("exact");
    let store = CheckpointStore::open(dir.path(), 0).unwrap();
    let writer = store.begin(1).unwrap();
    for kl_coef in [Some(0.21073409111503882), Some(5e-324), Some(1e300 / 3.0), Some(0.0), None] {
        writer.state(&TrainState { kl_coef, ..state(1) }, "").unwrap();
        let read = TrainState::read(writer.path()).unwrap().kl_coef;
        assert_eq!(read.map(f64::to_bits), kl_coef.map(f64::to_bits));
    }
    // As older programs wrote it, and as none did.
    let path = writer.path().join(STATE);
    let text = fs::read_to_string(&path).unwrap();
    fs::write(&path, text.replace("\"kl_coef\": null,", "")).unwrap();
    assert_eq!(TrainState::read(writer.path()).unwrap(), TrainState { kl_coef: None, ..state(1) });
    fs::write(&path, text.replace("\"kl_coef\": null", "\"kl_coef\": \"much\"")).unwrap();
    assert!(TrainState::read(writer.path()).is_err());
}

#[test]
fn a_new_run_moves_the_files_of_an_older_one_aside() {
    let dir = TestDir::new("restart");
    let store = CheckpointStore::open(dir.path(), 0).unwrap();
    assert_eq!(store.restart(None).unwrap(), None);
    let records =
        ["config.toml", "metrics.jsonl", "report.html", "samples/step_4.jsonl", "tensorboard/x"];
    for number in 1..=2 {
        save(&store, 3);
        for name in records {
            fs::create_dir_all(dir.path().join(name).parent().unwrap()).unwrap();
            dir.write(name, name);
        }
        let aside = dir.path().join(format!("checkpoints.old-{number}"));
        assert_eq!(store.restart(None).unwrap(), Some(aside.clone()));
        assert_eq!(store.find_latest().unwrap(), Found::default());
        assert!(!dir.path().join("latest").exists());
        verify(&aside.join("step_3")).unwrap();
        for name in records {
            assert!(!dir.path().join(name).exists(), "{name}");
            assert_eq!(fs::read_to_string(aside.join(name)).unwrap(), name);
        }
    }
    let own = save(&store, 1);
    let elsewhere = dir.path().join("checkpoints.old-1/step_3");
    let third = dir.path().join("checkpoints.old-3");
    assert_eq!(store.restart(Some(&elsewhere)).unwrap(), Some(third.clone()));
    assert_eq!(store.find_latest().unwrap(), Found::default());
    assert!(!own.path.exists());
    verify(&third.join("step_1")).unwrap();
    assert!(store.restart(Some(&dir.path().join("absent"))).is_err());
    // Records of a run that ended before its first checkpoint are kept, an empty file is none.
    dir.write("metrics.jsonl", "");
    assert_eq!(store.restart(None).unwrap(), None);
    dir.write("metrics.jsonl", "{}\n");
    assert_eq!(store.restart(None).unwrap(), Some(dir.path().join("checkpoints.old-4")));
}

#[test]
fn a_folder_of_checkpoints_that_is_a_link_stays_one() {
    let (dir, disk) = (TestDir::new("link"), TestDir::new("disk"));
    std::os::unix::fs::symlink(disk.path(), dir.path().join("checkpoints")).unwrap();
    let store = CheckpointStore::open(dir.path(), 0).unwrap();
    save(&store, 1);
    let aside = dir.path().join("checkpoints.old-1");
    assert_eq!(store.restart(None).unwrap(), Some(aside.clone()));
    verify(&aside.join("step_1")).unwrap();
    assert!(dir.path().join("checkpoints").is_symlink());
    let again = save(&store, 2);
    assert!(disk.path().join("step_2").is_dir());
    // A run that begins here would move what it begins from.
    let model = again.path.to_string_lossy();
    let e = store.check_start(&model).unwrap_err().to_string();
    assert!(e.starts_with(&format!("model.path {model} lies among")), "{e}");
    store.check_start(&aside.join("step_1").to_string_lossy()).unwrap();
    store.check_start("builtin:arith").unwrap();
}

#[test]
fn a_run_that_goes_back_moves_later_steps_aside() {
    let dir = TestDir::new("back");
    let store = CheckpointStore::open(dir.path(), 0).unwrap();
    let [first, second, third] = [1, 2, 3].map(|step| save(&store, step));
    fs::create_dir(dir.path().join("samples")).unwrap();
    let names = ["metrics.jsonl", "report.html", "samples/step_2.jsonl", "samples/step_3.jsonl"];
    names.iter().for_each(|name| drop(dir.write(name, "x")));
    assert_eq!(store.restart(Some(&third.path)).unwrap(), None);
    let aside = dir.path().join("checkpoints.old-1");
    assert_eq!(store.restart(Some(&second.path)).unwrap(), Some(aside.clone()));
    assert_eq!(store.find_latest().unwrap().checkpoint, Some(second));
    verify(&aside.join("step_3")).unwrap();
    let moved = ["report.html", "samples/step_3.jsonl", "metrics.jsonl"];
    assert!(moved.iter().all(|name| aside.join(name).exists()));
    let left = ["checkpoints/step_1", "metrics.jsonl", "samples/step_2.jsonl"];
    assert!(left.iter().all(|name| dir.path().join(name).exists()) && !third.path.exists());
    // Samples alone are enough.
    dir.write("samples/step_4.jsonl", "x");
    assert_eq!(
        store.restart(Some(&first.path)).unwrap(),
        Some(dir.path().join("checkpoints.old-2"))
    );
    assert_eq!(store.find_latest().unwrap().checkpoint, Some(first));
}

#[test]
fn errors_name_the_place_a_file_was_to_have() {
    let dir = TestDir::new("named");
    let store = CheckpointStore::open(dir.path(), 0).unwrap();
    let writer = store.begin(7).unwrap();
    let full = || io::Error::from(io::ErrorKind::StorageFull);
    let inside = writer.path().join("trainer/x");
    let step = dir.path().join("checkpoints/step_7/trainer/x");
    for error in [
        Error::io(&inside, full()),
        Error::engine(engine::Error::io(&inside, full())),
        Error::io(&step, full()),
    ] {
        let message = writer.named(error).to_string();
        assert_eq!(message, format!("{}: {}", step.display(), full()));
    }
}

#[test]
fn a_step_can_be_saved_again() {
    let dir = TestDir::new("again");
    let store = CheckpointStore::open(dir.path(), 0).unwrap();
    save(&store, 3);
    save(&store, 3);
    assert_eq!(names(&dir.path().join("checkpoints")), ["step_3"]);
    assert_eq!(store.find_latest().unwrap().checkpoint.unwrap().step, 3);
}

/// The moment between the two renames of a save in place of an older one.
#[test]
fn an_interrupted_replacement_keeps_the_old_checkpoint() {
    let dir = TestDir::new("replace");
    let store = CheckpointStore::open(dir.path(), 0).unwrap();
    let saved = save(&store, 3);
    fs::rename(&saved.path, saved.path.with_file_name(".tmp-old-step_3")).unwrap();
    let store = CheckpointStore::open(dir.path(), 0).unwrap();
    assert_eq!(store.find_latest().unwrap().checkpoint, Some(saved));
}

#[test]
fn a_full_disk_names_the_file_and_leaves_no_trace() {
    let dir = TestDir::new("full");
    let store = CheckpointStore::open(dir.path(), 1).unwrap();
    save(&store, 1);
    let writer = store.begin(2).unwrap();
    writer.file("config.json", |out| out.write_all(b"{}")).unwrap();
    let e = writer
        .file("model.safetensors", |out| {
            out.write_all(&[0; 100])?;
            Err(io::Error::from(io::ErrorKind::StorageFull))
        })
        .unwrap_err();
    assert!(matches!(e.kind(), ErrorKind::Io { .. }));
    assert!(e.to_string().contains("checkpoints/step_2/model.safetensors: "), "{e}");
    drop(writer);
    assert_eq!(names(&dir.path().join("checkpoints")), ["step_1"]);
    assert_eq!(store.find_latest().unwrap().checkpoint.unwrap().step, 1);
    assert!(store.begin(2).unwrap().publish().is_err(), "a checkpoint without files");
}

#[test]
fn what_an_interrupted_save_left_is_removed_at_the_next_start() {
    let dir = TestDir::new("stray");
    let store = CheckpointStore::open(dir.path(), 1).unwrap();
    let writer = store.begin(2).unwrap();
    writer.file("model.safetensors", |out| out.write_all(&[0; 100])).unwrap();
    // As a killed process would: the writer is never dropped.
    std::mem::forget(writer);
    assert_eq!(names(&dir.path().join("checkpoints")).len(), 1);
    assert_eq!(store.find_latest().unwrap().checkpoint, None);
    let store = CheckpointStore::open(dir.path(), 1).unwrap();
    assert_eq!(names(&dir.path().join("checkpoints")).len(), 0);
    save(&store, 2);
}

#[test]
fn damage_of_any_kind_is_noticed_and_an_older_checkpoint_found() {
    type Damage = fn(&Path);
    let damages: [(Damage, &str); 5] = [
        (|c| fs::write(c.join("config.json"), "[]").unwrap(), "config.json is not the file"),
        (|c| fs::remove_file(c.join("trainer/state.json")).unwrap(), "state.json"),
        (|c| fs::remove_file(c.join(MANIFEST)).unwrap(), "MANIFEST.sha256 cannot be read"),
        (|c| fs::write(c.join(MANIFEST), "").unwrap(), "cut short"),
        (|c| fs::write(c.join(MANIFEST), "00  ../../x\n").unwrap(), "has the line"),
    ];
    for (index, (damage, message)) in damages.into_iter().enumerate() {
        let dir = TestDir::new(&format!("damage-{index}"));
        let store = CheckpointStore::open(dir.path(), 0).unwrap();
        save(&store, 9);
        let newest = save(&store, 10);
        damage(&newest.path);
        let found = find_latest(dir.path()).unwrap();
        assert_eq!(found.checkpoint.unwrap().step, 9);
        assert_eq!(found.skipped.len(), 1);
        assert!(found.skipped[0].contains(message), "{:?}", found.skipped);
    }
}

#[test]
fn the_newest_whole_checkpoint_is_found_whatever_latest_names() {
    let dir = TestDir::new("latest");
    let store = CheckpointStore::open(dir.path(), 0).unwrap();
    save(&store, 1);
    save(&store, 2);
    let step = || find_latest(dir.path()).unwrap().checkpoint.unwrap().step;
    // As a crash leaves it between the two renames of a save.
    fs::write(dir.path().join("latest"), "checkpoints/step_1\n").unwrap();
    assert_eq!(step(), 2);
    for nonsense in ["", "checkpoints", "checkpoints/step_7", "é"] {
        fs::write(dir.path().join("latest"), nonsense).unwrap();
        assert_eq!(step(), 2);
    }
    fs::remove_file(dir.path().join("latest")).unwrap();
    assert_eq!(step(), 2);
    assert_eq!(find_latest(&dir.path().join("none")).unwrap(), Found::default());
}
