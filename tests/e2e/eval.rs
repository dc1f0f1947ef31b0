//! `engine eval`: values that agree with each other and with the responses they are made of, and what it
//! refuses; the same metrics during training.

use std::fs;
use std::process::Command;

use serde_json::Value;

use super::rl::{Lab, task};
use super::support::{Folder, SMALL, engine, fails, json_lines, run};

fn eval(flags: &[&str]) -> Command {
    let mut command = engine();
    command.arg("eval").args(SMALL).args(flags);
    command
}

fn number(value: &Value, path: &str) -> f64 {
    value.pointer(path).and_then(Value::as_f64).unwrap_or_else(|| panic!("no {path} in {value}"))
}

#[test]
fn values_are_consistent_and_repeat() {
    let folder = Folder::new();
    let (output, samples) = (folder.path("eval.json"), folder.path("samples.jsonl"));
    let flags = ["--data", "builtin:arith", "--n", "4", "--k", "1,2,4", "--temperature", "1"];
    let once = |seed: &str| {
        let mut command = eval(&flags);
        command.args(["--seed", seed, "--json", "--quiet", "--max-tokens", "8"]);
        let ran = run(command.arg("--output").arg(&output).arg("--samples").arg(&samples));
        assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""), "{ran:?}");
        assert_eq!(fs::read_to_string(&output).unwrap(), ran.stdout);
        ran.stdout
    };
    let first = once("3");
    let responses = json_lines(&fs::read_to_string(&samples).unwrap());
    let result: Value = serde_json::from_str(&first).unwrap();
    let at = |name: &str| number(&result, &format!("/sources/arith/{name}"));
    let right = responses.iter().filter(|line| line["correct"] == true).count();
    assert_eq!((responses.len(), at("problems"), at("n")), (1024, 256.0, 4.0));
    assert!((at("mean") - right as f64 / 1024.0).abs() < 1e-12, "{result}");
    assert!((at("pass/1") - at("mean")).abs() < 1e-12, "{result}");
    assert!((at("best/1") - at("mean")).abs() < 1e-12 && (at("maj/1") - at("mean")).abs() < 1e-12);
    assert!(at("pass/1") < at("pass/2") && at("pass/2") < at("pass/4"), "{result}");
    assert!(at("best/4") <= at("pass/4") && at("maj/4") <= at("pass/4"), "{result}");
    assert!(at("mean") > 0.3 && at("mean") < 0.9, "{result}");
    assert_eq!(
        (&result["all"], number(&result, "/mean_of_sources")),
        (&result["sources"]["arith"], at("mean"))
    );
    let solved =
        responses.chunks(4).filter(|of_row| of_row.iter().any(|one| one["correct"] == true));
    assert!((at("pass/4") - solved.count() as f64 / 256.0).abs() < 1e-12, "{result}");
    assert_eq!(once("3"), first);
    assert_ne!(once("4"), first);
}

#[test]
fn sources_have_lines_and_greedy_ones_one_response() {
    let folder = Folder::new();
    let row = |source: &str, prompt: &str, truth: &str| {
        format!(
            "{{\"data_source\": \"{source}\", \"prompt\": \"{prompt}\", \"reward_model\": \
             {{\"style\": \"rule\", \"ground_truth\": \"{truth}\"}}}}\n"
        )
    };
    let text = [row("arith", "1+1=", "2"), row("aime24", "2+2=", "4"), row("arith", "1+1=", "2")];
    let data = folder.write("data.jsonl", &text.concat());
    let mut command = eval(&["--n", "3", "--max-tokens", "8", "--deduplicate", "--data"]);
    let ran = run(command.arg(&data));
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(ran.stderr.contains("data: 3 rows read, 1 duplicates, 2 kept"), "{ran:?}");
    assert!(ran.stderr.contains("1 response a row instead of 3: arith;"), "{ran:?}");
    let lines: Vec<Vec<&str>> =
        ran.stdout.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(
        lines[0][..8],
        ["source", "rows", "n", "mean@n", "+-", "pass@1", "pass@2", "pass@3"]
    );
    // Whether the one greedy answer is right depends on the processor's rounding.
    let right = lines[1][3];
    assert!(["0.0", "100.0"].contains(&right), "{ran:?}");
    assert_eq!(lines[1][..8], ["arith", "1", "1", right, "0.0", right, "-", "-"], "{ran:?}");
    assert_eq!(lines[2][..3], ["aime24", "1", "3"], "{ran:?}");
    assert_eq!(lines[3][..3], ["all", "2", "1"], "{ran:?}");
    assert_eq!(lines.len(), 4);
}

/// Scores 1, but ends at one prompt.
const FLAKY: &str = r#"while read -r line; do
    id=${line#*\"id\":}
    case $line in *2+1=*) exit 3;; esac
    echo "{\"id\":${id%%,*},\"score\":1}"
done
"#;

#[test]
fn failed_rewards_are_reported_and_nothing_but_failures_is_an_error() {
    let folder = Folder::new();
    let data = folder.write("data.jsonl", &(0..4).map(|i| task(i, 1)).collect::<String>());
    let program = folder.write("score.sh", FLAKY);
    let samples = folder.path("samples.jsonl");
    let judged = |reward: &str| {
        let mut command = eval(&["--max-tokens", "2", "--json", "--reward", reward, "--data"]);
        command.arg(&data).arg("--samples").arg(&samples);
        command
    };
    let ran = run(&mut judged(&format!("command:sh {}", program.display())));
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let result: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(number(&result, "/reward_failures"), 1.0);
    assert_eq!(number(&result, "/reward_timeouts"), 0.0);
    assert_eq!(number(&result, "/all/reward"), 0.75);
    let told =
        "1 of 4 rewards failed and count as 0, 0 of them timed out; the first: it ended with";
    assert!(ran.stderr.contains(told), "{ran:?}");

    fails(&mut judged("command:false"), 5, "command:false: 4 of 4 rewards failed");
    let lines = json_lines(&fs::read_to_string(&samples).unwrap());
    assert_eq!(lines[0]["predicted"], "reward failed: it ended with exit status: 1");
    fails(&mut judged("http://127.0.0.1:9/"), 5, "4 of 4 rewards failed");
}

#[test]
fn every_built_in_task_has_a_verifier() {
    let data =
        ["--data", "builtin:sum", "builtin:countdown", "--max-tokens", "2", "--quiet", "--json"];
    let ran = run(&mut eval(&data));
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let result: Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(number(&result, "/sources/sum/problems"), 256.0);
    assert_eq!(number(&result, "/sources/countdown/mean"), 0.0);
}

#[test]
fn bad_flags_and_data_are_refused_in_one_line() {
    let folder = Folder::new();
    fails(&mut eval(&["--n", "0"]), 2, "--n is 0, limit is 1 to 128");
    fails(&mut eval(&["--n", "2", "--k", "4"]), 2, "--k is 4, limit is 1 to --n (2)");
    fails(&mut eval(&["--temperature=-1"]), 2, "--temperature is -1, limit is 0 to 100");
    fails(&mut eval(&["--top-p", "0"]), 2, "--top-p is 0");
    fails(&mut eval(&["--reward-timeout", "0"]), 2, "reward.timeout_s is 0, limit is above 0");
    fails(&mut eval(&["--reward", "exat"]), 2, "\"exat\" is unknown");
    fails(&mut eval(&["--data", "builtin:chess"]), 2, "there are no tasks builtin:chess");
    fails(&mut eval(&["--output", "/absent/eval.json"]), 1, "/absent/eval.json");
    let good = task(1, 2);
    let bad = |text: &str, part: &str| {
        let data = folder.write("rows.jsonl", text);
        let output = folder.path("eval.json");
        let mut command = eval(&["--data"]);
        fails(command.arg(&data).arg("--output").arg(&output), 3, part);
        assert!(!output.exists() && !folder.path("eval.json.part").exists(), "{part}");
    };
    bad("", "rows.jsonl: the file has no rows");
    bad(&format!("{good}{{\"prompt\"\n"), "rows.jsonl:2: not JSON");
    bad(
        r#"{"question": "1+1", "answer": "2"}"#,
        "no column \"prompt\"; columns are: question, answer",
    );
    let long = good.replace("1+2", &"1+".repeat(5000));
    bad(&format!("{good}{long}"), "rows.jsonl: row 2: prompt has");
    let data = folder.write("rows.jsonl", &format!("{good}{long}"));
    let mut command = eval(&["--filter-overlong-prompts", "--max-tokens", "4", "--data"]);
    let ran = run(command.arg(&data));
    assert!(ran.stderr.contains("data: 2 rows read, 1 too long, 1 kept"), "{ran:?}");
    let cut = folder.write("rows.parquet", "PAR1 cut short");
    let part = if cfg!(feature = "parquet") {
        "rows.parquet: not a Parquet file"
    } else {
        "--features parquet"
    };
    fails(eval(&["--data"]).arg(&cut), 3, part);
}

#[test]
fn training_reports_verls_metrics_on_data_that_was_filtered_and_mixed() {
    let mut lab = Lab::new();
    let copies = task(1, 1).repeat(3) + &task(2, 1) + &task(1, 1).replace("1+1", "一加一");
    lab.data = lab.folder.write("copies.jsonl", &copies);
    let other = lab.folder.write("other.jsonl", &(0..6).map(|i| task(i, 3)).collect::<String>());
    let files = format!("data.train_files={},{}", lab.data.display(), other.display());
    let mut command = lab.rl(
        "run",
        &[
            "trainer.total_steps=1",
            "data.deduplicate=true",
            "data.drop_cjk_prompts=true",
            "data.weights=1,1",
            "validation.n=2",
            "validation.temperature=1",
            &files,
        ],
    );
    // The flag would win over the key.
    let args: Vec<_> = command.get_args().map(ToOwned::to_owned).collect();
    command = engine();
    let flag = args.iter().position(|arg| arg == "--train-files").unwrap();
    command.args(&args[..flag]).args(&args[flag + 2..]);
    let ran = run(&mut command);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let training = "training data: 11 rows read, 2 duplicates, 1 with Chinese, Japanese or Korean text, 8 kept";
    assert!(ran.stderr.contains(training), "{ran:?}");
    let lines = fs::read_to_string(lab.folder.path("run/metrics.jsonl")).unwrap();
    for line in json_lines(&lines) {
        let mean = line["val-core/arith/acc/mean@2"].as_f64().unwrap();
        assert_eq!(line["val/accuracy"].as_f64().unwrap(), mean, "{line}");
        let pass = line["val-aux/arith/acc/pass@2"].as_f64().unwrap();
        assert!(line["val-core/arith/acc/maj@2/mean"].is_number() && pass >= mean, "{line}");
        assert!(line["val-core/arith/acc/best@2/mean"].as_f64().unwrap() <= pass, "{line}");
    }
    let samples = fs::read_to_string(lab.folder.path("run/samples/step_1.jsonl")).unwrap();
    let threes =
        json_lines(&samples).iter().filter(|s| s["prompt"].to_string().contains("+3=")).count();
    assert_eq!(threes, 4 * 4, "8 prompts of 4 samples, half of them from the second file");
}
