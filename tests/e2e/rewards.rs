//! Rewards of a training run from a program: judged, counted, and what a failure does.

use std::fs;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::rl::Lab;
use super::support::{fails, json_lines, run};

/// Scores 1, but for every fourth request, which gets no valid answer.
const PROGRAM: &str = r#"n=0
while read -r line; do
    id=${line#*\"id\":}; id=${id%%,*}; n=$((n+1))
    if [ $((n % 4)) = 0 ]; then echo "{\"id\":$id,\"score\":NaN}"
    else echo "{\"id\":$id,\"score\":1}"; fi
done
"#;

#[test]
fn a_program_judges_a_run_and_its_failures_are_counted() {
    let lab = Lab::new();
    let program = lab.folder.write("score.sh", PROGRAM);
    let reward = format!("command:sh {}", program.display());
    let few = ["trainer.total_steps=1", "reward.workers=1", "trainer.val_before_train=false"];
    let ran = run(lab.rl("run", &few).args(["--reward", &reward]));
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let metrics = fs::read_to_string(lab.folder.path("run/metrics.jsonl")).unwrap();
    let step = &json_lines(&metrics)[0];
    assert_eq!(step["reward/failures"].as_f64(), Some(8.0), "{step}");
    assert_eq!(step["reward/timeouts"].as_f64(), Some(0.0), "{step}");
    assert_eq!(step["critic/score/mean"].as_f64(), Some(0.75), "{step}");

    // A validation's are its own, and one worker's program goes on counting through it: 24 rows, 6 of them.
    let tested = ["trainer.total_steps=1", "reward.workers=1", "trainer.test_freq=1"];
    let ran = run(lab.rl("tested", &tested).args(["--reward", &reward]));
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let metrics = fs::read_to_string(lab.folder.path("tested/metrics.jsonl")).unwrap();
    let [before, step] = &json_lines(&metrics)[..] else { panic!("{metrics}") };
    assert_eq!(before["val/reward_failures"].as_f64(), Some(6.0), "{before}");
    assert_eq!(before.get("reward/failures"), None, "{before}");
    for (name, failures) in [("reward/failures", 8.0), ("val/reward_failures", 6.0)] {
        assert_eq!(step[name].as_f64(), Some(failures), "{name}: {step}");
    }
    assert_eq!(step["val/reward_timeouts"].as_f64(), Some(0.0), "{step}");
    assert!(ran.stderr.contains("on 24 rows, 6 rewards failed"), "{ran:?}");
    assert!(ran.stderr.contains("  failures 8"), "{ran:?}");
    let why = "8 of 32 rewards failed; the first: the score is not finite";
    assert!(ran.stderr.contains(why), "{ran:?}");

    let fail = [&few[..], &["reward.on_error=fail"]].concat();
    fails(lab.rl("failed", &fail).args(["--reward", &reward]), 5, "the score is not finite");
    let absent = ["--reward", "command:false"];
    fails(
        lab.rl("absent", &few).args(absent),
        5,
        "all 32 rewards of a rollout failed; the first: ",
    );
    fails(lab.rl("none", &few).args(["--reward", "magic"]), 2, "\"magic\" is unknown");
}

/// Whether a process is there and has not ended.
#[cfg(target_os = "linux")]
fn runs(id: &str) -> bool {
    let status = fs::read_to_string(format!("/proc/{id}/status")).unwrap_or_default();
    !status.is_empty() && !status.contains("State:\tZ")
}

#[test]
#[cfg(target_os = "linux")]
fn a_program_ends_with_the_run_whatever_ends_it() {
    let lab = Lab::new();
    for signal in ["-KILL", "-INT"] {
        let id = lab.folder.path(&format!("id{signal}"));
        // It never reads, so that no closed pipe ends it.
        let name = id.display();
        let reward =
            format!("command:sh -c 'echo $$ >{name}.new; mv {name}.new {name}; exec sleep 600'");
        let mut command = lab.rl("run", &["reward.workers=1", "reward.timeout_s=600"]);
        command.args(["--reward", &reward]).stdout(Stdio::null()).stderr(Stdio::null());
        let mut engine = command.spawn().unwrap();
        while !id.exists() {
            assert_eq!(engine.try_wait().unwrap(), None, "it ended before it asked");
            sleep(Duration::from_millis(20));
        }
        let program = fs::read_to_string(&id).unwrap();
        assert!(runs(program.trim()), "{program}");
        // Of interrupts the second ends it.
        while engine.try_wait().unwrap().is_none() {
            let kill = Command::new("kill").args([signal, &engine.id().to_string()]).output();
            assert!(kill.is_ok(), "{kill:?}");
            sleep(Duration::from_millis(20));
        }
        let begun = Instant::now();
        while runs(program.trim()) {
            assert!(begun.elapsed() < Duration::from_secs(30), "{signal}: it goes on");
            sleep(Duration::from_millis(20));
        }
    }
}
