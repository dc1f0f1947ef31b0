//! What callers put in their place of the configured parts, at its worst, and runs that go on.
#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use engine::model::hub::Builtin;
use engine::model::open_builtin;
use engine::{Engine, EngineConfig, ModelSource};
use trainer::advantage::{Advantages, Estimated, Estimator, Outcomes, Scale, estimate};
use trainer::data::{Prompt, Row};
use trainer::loss::{ChoiceKey, LossOutput, PolicyLoss, TokenBatch};
use trainer::metrics::Metrics;
use trainer::samples::Sample;
use trainer::{
    Algorithm, ErrorKind, Interrupt, Parts, Progress, Result, Resume, RlConfig, Trainer, run_rl,
};

fn engine(checkpoint: Option<&Path>) -> Engine {
    let config = EngineConfig {
        threads: Some(1),
        kv_cache_memory_bytes: Some(8 << 20),
        max_model_len: Some(64),
        ..EngineConfig::default()
    };
    let source = match checkpoint {
        Some(path) => ModelSource::open(path).unwrap(),
        None => open_builtin(Builtin::Arith).unwrap(),
    };
    Engine::load(&source, &config).unwrap()
}

fn config(method: &str, pairs: &[(&str, &str)]) -> RlConfig {
    let small = [
        ("data.train_batch_size", "2"),
        ("data.max_prompt_length", "32"),
        ("data.max_response_length", "8"),
        ("rollout.n", "4"),
        ("algorithm.mini_batch_size", "1"),
        ("optimizer.lr", "1e-4"),
    ];
    let set: Vec<(String, String)> =
        small.iter().chain(pairs).map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    RlConfig::resolve(Some(method), None, &set).unwrap()
}

/// Sums of two digits, without a source: only a reward of one's own can judge them.
fn rows() -> Vec<Row> {
    let row = |n: u32| Row {
        data_source: None,
        prompt: Prompt::Text(format!("{}+{}=", n + 10, n + 20)),
        ground_truth: (2 * n + 30).to_string(),
        extra: serde_json::Value::Null,
    };
    (0..16).map(row).collect()
}

fn step(pairs: &[(&str, &str)], parts: Parts) -> Result<(Metrics, Vec<Sample>)> {
    let mut trainer = Trainer::with_parts(engine(None), config("grpo", pairs), parts.rows(rows()))?;
    trainer.step()
}

fn failures(metrics: &Metrics) -> f64 {
    metrics.get("reward/failures").unwrap()
}

#[test]
fn rewards_that_are_none_or_not_finite_count_as_failed() {
    let half = |row: &Row, _: &str| (row.ground_truth.ends_with(['0', '4'])).then_some(1.0);
    let bad = |_: &Row, _: &str| f64::NAN;
    let (metrics, samples) =
        step(&[("data.train_batch_size", "16")], Parts::new().reward(half)).unwrap();
    let none = samples.iter().filter(|s| !s.ground_truth.ends_with(['0', '4'])).count();
    assert!(0 < none && none < samples.len());
    assert_eq!(failures(&metrics), none as f64);
    let failed = |s: &&Sample| s.predicted == "reward failed: it gave no score";
    assert_eq!(samples.iter().filter(failed).count(), none);

    let value = [("reward.on_error", "value"), ("reward.error_value", "-0.25")];
    let (metrics, samples) = step(&value, Parts::new().reward(bad)).unwrap();
    assert_eq!(failures(&metrics), 8.0);
    assert!(samples.iter().all(|s| s.reward == -0.25 && !s.correct && s.advantage == 0.0));

    let e = step(&[("reward.on_error", "fail")], Parts::new().reward(bad)).unwrap_err();
    assert!(matches!(e.kind(), ErrorKind::Reward(_)));
    assert_eq!(e.to_string(), "the reward function: the score is NaN");
}

#[test]
fn a_batch_of_rewards_of_the_wrong_length_fails_as_a_whole() {
    let short = Parts::new().reward_batch(|all| vec![Some(1.0); all.len() - 1]);
    let (metrics, samples) = step(&[], short).unwrap();
    assert_eq!(failures(&metrics), 8.0);
    let reason = "reward failed: it gave 7 rewards for 8 responses";
    assert!(samples.iter().all(|s| s.reward == 0.0 && s.predicted == reason));
    let none = Parts::new().reward_batch(|_| Vec::new());
    let e = step(&[("reward.on_error", "fail")], none).unwrap_err();
    assert_eq!(e.to_string(), "the reward function: it gave 0 rewards for 8 responses");
    // In order, whatever the order in which responses end.
    let places = |all: &[trainer::verifier::Answered]| {
        all.iter().enumerate().map(|(place, _)| Some(place as f64)).collect()
    };
    let (metrics, samples) = step(&[], Parts::new().reward_batch(places)).unwrap();
    assert_eq!(
        samples.iter().map(|s| s.reward).collect::<Vec<_>>(),
        [0., 1., 2., 3., 4., 5., 6., 7.]
    );
    assert_eq!(failures(&metrics), 0.0);
}

#[test]
fn a_program_that_gives_no_reward_at_all_ends_the_run_and_a_single_failure_is_told() {
    let dir = std::env::temp_dir().join(format!("trainer-outage-{}", std::process::id()));
    let folder = dir.display().to_string();
    let run = |command: &str| {
        let function = format!("command:{command}");
        let pairs = [
            ("reward.function", function.as_str()),
            ("reward.workers", "1"),
            ("trainer.total_steps", "1"),
            ("trainer.test_freq", "0"),
            ("trainer.val_before_train", "false"),
            ("trainer.output", &folder),
        ];
        let mut notes = Vec::new();
        let mut open = |checkpoint: Option<&Path>, _| Ok(engine(checkpoint));
        let mut tell = |progress: Progress| {
            if let Progress::Note(note) = progress {
                notes.push(note);
            }
        };
        let start = (&Resume::Auto, Parts::new().rows(rows()));
        let ran = run_rl(&config("grpo", &pairs), start, &mut open, &|| false, &mut tell);
        (ran, notes)
    };
    let error = run("sh -c 'exit 3'").0.unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Reward(_)), "{error:?}");
    assert_eq!(
        error.to_string(),
        "command:sh -c 'exit 3': all 8 rewards of a rollout failed; the first: it ended with exit status: 3"
    );
    assert!(!dir.join("samples").exists(), "nothing was learned");
    // Ids count from 0.
    let half = r#"sh -c 'while read -r line; do id=${line#*\"id\":}; id=${id%%,*}
        [ $id = 5 ] && score=NaN || score=1; echo "{\"id\":$id,\"score\":$score}"; done'"#;
    let (ran, notes) = run(half);
    ran.unwrap();
    let told = "1 of 8 rewards failed; the first: the score is not finite";
    assert!(
        notes.iter().any(|note| note.starts_with("step 1: command:sh") && note.ends_with(told)),
        "{notes:?}"
    );
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn no_rows_of_ones_own_are_an_error_that_says_so() {
    let parts = Parts::new().rows(Vec::new());
    let e = Trainer::with_parts(engine(None), config("kl_cov", &[]), parts).err().unwrap();
    assert_eq!(e.to_string(), "own rows: no row is left: 0 rows read, 0 kept");
}

/// GRPO with something wrong.
enum Wrong {
    Advantages,
    NotFinite,
    Derivatives,
}

impl Algorithm for Wrong {
    fn advantages(&self, outcomes: &Outcomes<'_>) -> Result<Estimated> {
        let n = outcomes.scores.len();
        match self {
            Self::Advantages => Ok(Estimated {
                responses: Advantages {
                    values: vec![0.0; n - 1],
                    groups: 1,
                    zero_variance_groups: 0,
                },
                tokens: Vec::new(),
                returns: None,
            }),
            Self::NotFinite | Self::Derivatives => {
                let mut all = estimate(Estimator::Grpo(Scale::None), outcomes)?;
                if let Self::NotFinite = self {
                    all.tokens[1] = f64::INFINITY;
                }
                Ok(all)
            }
        }
    }

    fn loss(&self, batch: &TokenBatch<'_, f32>, key: ChoiceKey) -> Result<LossOutput> {
        let out = PolicyLoss::Gpg.evaluate(batch, key)?;
        Ok(LossOutput { dlogp: out.dlogp[1..].to_vec(), ..out })
    }
}

#[test]
fn an_algorithm_is_held_to_its_sizes_and_to_numbers() {
    let error = |wrong: Wrong| {
        let reward = |row: &Row, text: &str| f64::from(u8::from(text == row.ground_truth));
        step(&[], Parts::new().reward(reward).algorithm(wrong)).unwrap_err().to_string()
    };
    assert_eq!(error(Wrong::Advantages), "the algorithm gave 7 advantages for 8 responses");
    assert_eq!(error(Wrong::NotFinite), "the advantage of token 1 is inf");
    let text = error(Wrong::Derivatives);
    assert!(
        text.starts_with("the algorithm gave ") && text.contains(" derivatives for "),
        "{text}"
    );
}

#[test]
fn a_pair_of_estimator_and_loss_is_the_configured_method() {
    let weights = |parts: Parts| {
        let reward = |row: &Row, text: &str| f64::from(u8::from(text == row.ground_truth));
        let parts = parts.rows(rows()).reward(reward);
        let config = config("rloo", &[("data.train_batch_size", "8")]);
        let mut trainer = Trainer::with_parts(engine(None), config, parts).unwrap();
        trainer.step().unwrap();
        let scores = trainer.engine().score(&[(40..60).collect()], 1.0).unwrap();
        scores[0].logprobs.clone()
    };
    let loss = config("grpo", &[]).algorithm.policy_loss();
    let pair = weights(Parts::new().algorithm((Estimator::Rloo, loss)));
    assert_eq!(pair, weights(Parts::new()));
    let other =
        weights(Parts::new().algorithm((Estimator::Grpo(Scale::GroupStd), PolicyLoss::Gpg)));
    assert_ne!(pair, other);
}

/// A run of dynamic sampling that has groups left over after each step, in its folder of `output`.
fn run(output: &Path, total_steps: &str) -> (PathBuf, Vec<String>) {
    let (checkpoint, notes, _) = run_as(output, total_steps, ("rollout.n", "4"));
    (checkpoint, notes)
}

/// The same with another setting; returns the notes too.
fn run_as(
    output: &Path,
    total_steps: &str,
    other: (&str, &str),
) -> (PathBuf, Vec<String>, Vec<String>) {
    let folder = output.display().to_string();
    let pairs = [
        ("algorithm.filter_groups", "true"),
        ("algorithm.gen_batch_size", "16"),
        ("trainer.total_steps", total_steps),
        ("trainer.test_freq", "0"),
        ("trainer.val_before_train", "false"),
        ("trainer.output", &folder),
        other,
    ];
    let config = config("grpo", &pairs);
    let mut notes = Vec::new();
    let mut open = |checkpoint: Option<&Path>, _| Ok(engine(checkpoint));
    let mut steps = Vec::new();
    let mut tell = |progress: Progress| match progress {
        Progress::Step(metrics) => {
            let get = |name| metrics.get(name).unwrap().to_string();
            let names = ["train/num_gen_batches", "train/groups_surplus", "critic/score/mean"];
            steps.push(names.map(get).join(" "));
        }
        Progress::Note(note) => notes.push(note),
        _ => {}
    };
    let start = (&Resume::Auto, Parts::new());
    match run_rl(&config, start, &mut open, &|| false, &mut tell).unwrap() {
        Interrupt::Done { checkpoint, .. } => (checkpoint, steps, notes),
        Interrupt::Resumable(_) => panic!("nobody asked it to stop"),
    }
}

#[test]
fn groups_left_over_go_on_with_the_run() {
    let dir = std::env::temp_dir().join(format!("trainer-left-over-{}", std::process::id()));
    let (whole, all) = run(&dir.join("whole"), "4");
    let (first, mut parts) = run(&dir.join("parts"), "2");
    let kept = std::fs::read_to_string(first.join("trainer/surplus.jsonl")).unwrap();
    assert!(kept.lines().count() >= 2, "16 groups were sampled, 2 learned from a step");
    let (second, rest) = run(&dir.join("parts"), "4");
    parts.extend(rest);
    assert_eq!(parts, all);
    for file in ["model.safetensors", "trainer/optimizer.safetensors"] {
        let read = |path: &Path| std::fs::read(path.join(file)).unwrap();
        assert!(read(&whole) == read(&second), "{file} differs");
    }
    std::fs::remove_dir_all(&dir).unwrap();
}

/// Copies a folder with all that is in it.
fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let (entry, to) = entry.map(|e| (e.path(), to.join(e.file_name()))).unwrap();
        match entry.is_dir() {
            true => copy(&entry, &to),
            false => drop(std::fs::copy(&entry, &to).unwrap()),
        }
    }
}

#[test]
fn groups_left_over_are_dropped_where_the_run_samples_others() {
    let dir = std::env::temp_dir().join(format!("trainer-other-groups-{}", std::process::id()));
    run(&dir.join("before"), "1");
    for (index, (key, value, why)) in [
        ("rollout.n", "8", "rollout.n was 4, is 8"),
        ("rollout.temperature", "0.5", "rollout.temperature was 1.0, is 0.5"),
        ("algorithm.adv_estimator", "remax", "algorithm.adv_estimator was \"grpo\", is \"remax\""),
    ]
    .into_iter()
    .enumerate()
    {
        let folder = dir.join(format!("after-{index}"));
        copy(&dir.join("before"), &folder);
        let (_, steps, notes) = run_as(&folder, "2", (key, value));
        let told = |note: &String| note.ends_with(&format!(" are dropped: {why}"));
        assert!(notes.iter().any(told), "{notes:?}");
        assert!(!steps[0].starts_with("0 "), "{steps:?}: groups were sampled anew");
        let samples = std::fs::read_to_string(folder.join("samples/step_2.jsonl")).unwrap();
        let n = if key == "rollout.n" { value.parse().unwrap() } else { 4 };
        assert_eq!(samples.lines().count(), 2 * n, "{key} {value}");
    }
    std::fs::remove_dir_all(&dir).unwrap();
}

/// A run of dynamic sampling in its folder of `output`, whose rewards fail after step `failing`.
fn run_failing(output: &Path, failing: Option<u64>) -> Result<PathBuf> {
    let folder = output.display().to_string();
    let pairs = [
        ("algorithm.filter_groups", "true"),
        ("algorithm.gen_batch_size", "3"),
        ("algorithm.use_kl_in_reward", "true"),
        ("algorithm.kl_ctrl.type", "adaptive"),
        ("reward.on_error", "fail"),
        ("trainer.total_steps", "5"),
        ("trainer.test_freq", "0"),
        ("trainer.val_before_train", "false"),
        ("trainer.output", &folder),
    ];
    let fails = Arc::new(AtomicBool::new(false));
    let broken = Arc::clone(&fails);
    let reward = move |_: &Row, text: &str| match broken.load(Ordering::Relaxed) {
        true => f64::NAN,
        false => text.bytes().map(f64::from).sum::<f64>() % 7.0,
    };
    let mut open = |checkpoint: Option<&Path>, _| Ok(engine(checkpoint));
    let mut tell = |progress: Progress| {
        if let Progress::Step(metrics) = progress {
            let step = metrics.get("training/global_step").unwrap();
            fails.store(failing.is_some_and(|failing| step >= failing as f64), Ordering::Relaxed);
        }
    };
    let start = (&Resume::Auto, Parts::new().rows(rows()).reward(reward));
    match run_rl(&config("grpo", &pairs), start, &mut open, &|| false, &mut tell)? {
        Interrupt::Done { checkpoint, .. } => Ok(checkpoint),
        Interrupt::Resumable(_) => panic!("nobody asked it to stop"),
    }
}

#[test]
fn a_run_that_fails_keeps_what_it_has_learnt() {
    let dir = std::env::temp_dir().join(format!("trainer-fails-{}", std::process::id()));
    let whole = run_failing(&dir.join("whole"), None).unwrap();
    let parts = dir.join("parts");
    let e = run_failing(&parts, Some(2)).unwrap_err();
    assert!(matches!(e.kind(), ErrorKind::Reward(_)), "{e}");
    // Groups left over may have served for a step more.
    let saved = std::fs::read_to_string(parts.join("latest")).unwrap();
    assert!(["checkpoints/step_2\n", "checkpoints/step_3\n"].contains(&&*saved), "{saved}");
    assert!(parts.join("report.html").is_file());
    let resumed = run_failing(&parts, None).unwrap();
    for file in ["model.safetensors", "trainer/optimizer.safetensors"] {
        let read = |path: &Path| std::fs::read(path.join(file)).unwrap();
        assert!(read(&whole) == read(&resumed), "{file} differs");
    }
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn rows_to_validate_on_are_checked_before_anything_is_written() {
    let dir = std::env::temp_dir().join(format!("trainer-val-rows-{}", std::process::id()));
    let folder = dir.display().to_string();
    let run = |test_freq: &str| {
        let pairs = [
            ("trainer.total_steps", "1"),
            ("trainer.test_freq", test_freq),
            ("trainer.val_before_train", "false"),
            ("trainer.output", &folder),
        ];
        let train = rows().into_iter().map(|row| Row { data_source: Some("exact".into()), ..row });
        let parts = Parts::new().rows(train.collect::<Vec<_>>()).validation(rows());
        let mut open = |checkpoint: Option<&Path>, _| Ok(engine(checkpoint));
        let start = (&Resume::Never, parts);
        run_rl(&config("grpo", &pairs), start, &mut open, &|| false, &mut |_| ())
    };
    run("0").unwrap();
    let before = std::fs::read(dir.join("metrics.jsonl")).unwrap();
    let error = run("100").unwrap_err().to_string();
    assert!(error.contains("rows without data_source need reward.function"), "{error}");
    assert_eq!(std::fs::read(dir.join("metrics.jsonl")).unwrap(), before);
    assert!(!dir.join("checkpoints.old-1").exists());
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn a_validation_that_fails_is_made_good_when_the_run_goes_on() {
    let dir = std::env::temp_dir().join(format!("trainer-owed-{}", std::process::id()));
    let folder = dir.display().to_string();
    let pairs = [
        ("reward.on_error", "fail"),
        ("trainer.total_steps", "2"),
        ("trainer.test_freq", "2"),
        ("trainer.val_before_train", "false"),
        ("trainer.output", &folder),
    ];
    let run_on = |broken: bool, held_out: usize| {
        let held_out = || {
            let named = |row| Row { data_source: Some("val".into()), ..row };
            rows().into_iter().take(held_out).map(named)
        };
        let reward = move |row: &Row, text: &str| match broken && row.data_source.is_some() {
            true => f64::NAN,
            false => text.len() as f64,
        };
        let parts = Parts::new().rows(rows()).validation(held_out().collect::<Vec<_>>());
        let mut open = |checkpoint: Option<&Path>, _| Ok(engine(checkpoint));
        let start = (&Resume::Auto, parts.reward(reward));
        run_rl(&config("grpo", &pairs), start, &mut open, &|| false, &mut |_| ())
    };
    let run = |broken| run_on(broken, 16);
    let validated = || {
        let lines = std::fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
        lines.lines().filter(|line| line.contains("\"val/accuracy\"")).count()
    };
    for _ in 0..2 {
        run(true).unwrap_err();
        assert_eq!(validated(), 0);
    }
    for _ in 0..2 {
        run(false).unwrap();
        assert_eq!(validated(), 1);
    }
    // What the step has learned is there beside it.
    let read = trainer::report::Run::read(&dir).unwrap();
    for metric in ["val/accuracy", "critic/score/mean"] {
        assert!(read.series(metric).iter().any(|(step, _)| *step == 2.0), "{metric}");
    }
    assert!(read.notes.is_empty(), "{:?}", read.notes);
    std::fs::remove_dir_all(&dir).unwrap();
    // Nothing is owed where there is nothing to validate on.
    for _ in 0..2 {
        run_on(false, 0).unwrap();
        let lines = std::fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
        assert_eq!(lines.lines().count(), 2, "{lines}");
    }
    std::fs::remove_dir_all(&dir).unwrap();
}

/// GRPO whose second update of step 2 fails.
struct HalfWay;

impl Algorithm for HalfWay {
    fn advantages(&self, outcomes: &Outcomes<'_>) -> Result<Estimated> {
        estimate(Estimator::Grpo(Scale::GroupStd), outcomes)
    }

    fn loss(&self, batch: &TokenBatch<'_, f32>, key: ChoiceKey) -> Result<LossOutput> {
        match (key.step, key.update) {
            (2, 1) => Err(trainer::Error::reward("half way")),
            _ => PolicyLoss::Gpg.evaluate(batch, key),
        }
    }
}

#[test]
fn weights_between_the_updates_of_a_step_are_not_saved() {
    let dir = std::env::temp_dir().join(format!("trainer-half-{}", std::process::id()));
    let folder = dir.display().to_string();
    let config =
        config("grpo", &[("trainer.val_before_train", "false"), ("trainer.output", &folder)]);
    let reward = |row: &Row, text: &str| f64::from(u8::from(text == row.ground_truth));
    let parts = Parts::new().rows(rows()).reward(reward).algorithm(HalfWay);
    let mut open = |checkpoint: Option<&Path>, _| Ok(engine(checkpoint));
    let start = (&Resume::Auto, parts);
    let e = run_rl(&config, start, &mut open, &|| false, &mut |_| ()).unwrap_err();
    assert_eq!(e.to_string(), "half way");
    assert!(!dir.join("latest").exists());
    assert!(dir.join("report.html").is_file());
    std::fs::remove_dir_all(&dir).unwrap();
}
