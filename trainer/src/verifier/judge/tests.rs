//! Rewards from outside, with a shell or a listener standing in for a program or a server.

use std::time::Instant;

use serde_json::Value;

use super::*;
use crate::data::Prompt;

fn config(function: &str, on_error: OnError) -> RewardConfig {
    RewardConfig {
        function: function.to_owned(),
        timeout_s: 30.0,
        start_timeout_s: 30.0,
        on_error,
        error_value: -0.5,
        workers: 2,
    }
}

fn row(truth: &str) -> Row {
    Row {
        data_source: Some("own".to_owned()),
        prompt: Prompt::Text("1+1?\n\"quoted\"".to_owned()),
        ground_truth: truth.to_owned(),
        extra: Value::Null,
    }
}

/// The verdicts on `responses`, all to one row, and the counts.
fn judged(config: &RewardConfig, responses: &[&str]) -> (Result<Vec<Verdict>>, Counts) {
    let judge = Judge::new(config).unwrap();
    judge.check(&row("2")).unwrap();
    let mut session = judge.session(responses.len());
    for (place, response) in responses.iter().enumerate() {
        session.submit(place, &row("2"), response);
    }
    let verdicts = session.finish();
    (verdicts, judge.take_counts())
}

fn scores(verdicts: Result<Vec<Verdict>>) -> Vec<f64> {
    verdicts.unwrap().iter().map(|verdict| verdict.score).collect()
}

/// A program that scores 1 when the response contains the word right, hangs at the word hang, ends at
/// the word end, and answers NaN at the word nan.
const PROGRAM: &str = r#"command:sh -c 'while read -r line; do
    id=${line#*\"id\":}; id=${id%%,*}
    case $line in
        *right*) echo "{\"id\":$id,\"score\":1,\"pred\":\"yes\"}";;
        *hang*) sleep 600;;
        *end*) exit 3;;
        *nan*) echo "{\"id\":$id,\"score\":NaN}";;
        *) echo "{\"id\":$id,\"score\":0}";;
    esac
done'"#;

#[test]
fn a_program_judges_and_stays() {
    let (verdicts, counts) = judged(&config(PROGRAM, OnError::Fail), &["right", "no", "right"]);
    let verdicts = verdicts.unwrap();
    assert_eq!(verdicts[0], Verdict { score: 1.0, correct: true, predicted: "yes".to_owned() });
    assert_eq!(scores(Ok(verdicts)), [1.0, 0.0, 1.0]);
    assert_eq!(counts, Counts::default());
}

#[test]
fn a_program_in_python_sees_the_whole_request() {
    let program = concat!(
        "command:python3 -c 'import json,sys\n",
        "for line in sys.stdin:\n",
        "    r = json.loads(line)\n",
        "    right = r[\"response\"] == r[\"ground_truth\"] and \"quoted\" in r[\"prompt\"]\n",
        "    print(json.dumps({\"id\": r[\"id\"], \"score\": 2.5 * right, \"acc\": right}), flush=True)'",
    );
    let found = std::process::Command::new("python3").arg("--version").output();
    if found.is_err() {
        println!("left out: there is no python3 here");
        return;
    }
    assert_eq!(scores(judged(&config(program, OnError::Fail), &["2", "3"]).0), [2.5, 0.0]);
}

#[test]
fn a_hanging_program_is_killed_and_counted_and_the_next_request_is_judged() {
    let start = Instant::now();
    // It has answered, and then it is slow: the limit is not that of a start.
    let quick = RewardConfig { timeout_s: 1.0, workers: 1, ..config(PROGRAM, OnError::Value) };
    let slow = RewardConfig { start_timeout_s: 600.0, ..quick.clone() };
    assert_eq!(scores(judged(&slow, &["right", "hang", "right"]).0), [1.0, -0.5, 1.0]);
    let quick = RewardConfig { start_timeout_s: 1.0, ..quick };
    let (verdicts, counts) = judged(&quick, &["hang", "right"]);
    let verdicts = verdicts.unwrap();
    assert_eq!(verdicts[0].predicted, "reward failed: no answer within reward.timeout_s (1 s)");
    assert_eq!(scores(Ok(verdicts)), [-0.5, 1.0]);
    assert_eq!(counts, Counts { failures: 1, timeouts: 1 });
    assert!(start.elapsed().as_secs() < 300, "it waited for the program");
}

#[test]
fn failures_have_a_reason_and_a_value_or_end_the_run() {
    let (verdicts, counts) = judged(&config(PROGRAM, OnError::Zero), &["end", "nan", "right"]);
    let verdicts = verdicts.unwrap();
    assert_eq!(verdicts[0].predicted, "reward failed: it ended with exit status: 3");
    assert_eq!(verdicts[1].predicted, "reward failed: the score is not finite");
    assert_eq!(scores(Ok(verdicts)), [0.0, 0.0, 1.0]);
    assert_eq!(counts, Counts { failures: 2, timeouts: 0 });

    let error = judged(&config(PROGRAM, OnError::Fail), &["nan"]).0.unwrap_err();
    assert!(matches!(error.kind(), crate::ErrorKind::Reward(_)), "{error:?}");
    assert!(error.to_string().ends_with("the score is not finite"), "{error}");
    let missing = config("command:/no/such/program", OnError::Zero);
    let verdicts = judged(&missing, &["right"]).0.unwrap();
    assert!(verdicts[0].predicted.contains("127"), "{verdicts:?}");
}

#[test]
fn a_command_is_any_line_of_the_shell() {
    let program = PROGRAM.strip_prefix("command:").unwrap();
    for before in ["WORD=1", "cd / &&", "true;"] {
        let line = config(&format!("command:{before} {program}"), OnError::Fail);
        assert_eq!(scores(judged(&line, &["right", "no"]).0), [1.0, 0.0], "{before}");
    }
}

#[test]
fn a_program_has_longer_for_its_first_answer() {
    // A limit that is over before any process can start.
    let program = config(PROGRAM, OnError::Fail);
    let slow = RewardConfig { timeout_s: 1e-9, workers: 1, ..program };
    assert_eq!(scores(judged(&slow, &["right"]).0), [1.0]);
}

#[test]
fn lines_that_are_no_answer_are_passed_over() {
    let stray =
        PROGRAM.replace("*right*)", r#"*right*) echo loss NaN; echo "{\"epoch\":1}"; echo;"#);
    let one = RewardConfig { workers: 1, ..config(&stray, OnError::Fail) };
    let (verdicts, counts) = judged(&one, &["right", "no", "right", "right", "no"]);
    assert_eq!(scores(verdicts), [1.0, 0.0, 1.0, 1.0, 0.0]);
    assert_eq!(counts, Counts::default());
    // An answer of an older id.
    let late = PROGRAM.replace(r#"$id,\"score\":0"#, r#"$((id-1)),\"score\":0"#);
    let late = RewardConfig { timeout_s: 1.0, workers: 1, ..config(&late, OnError::Zero) };
    let (verdicts, counts) = judged(&late, &["right", "no", "right"]);
    let verdicts = verdicts.unwrap();
    assert_eq!(
        verdicts[1].predicted,
        "reward failed: no answer within reward.timeout_s (1 s); last line: the answer is not to request 1"
    );
    assert_eq!(scores(Ok(verdicts)), [1.0, 0.0, 1.0]);
    assert_eq!(counts, Counts { failures: 1, timeouts: 1 });
}

#[test]
fn a_program_that_prints_without_end_fails_in_time_and_is_started_anew() {
    let endless = PROGRAM.replace("sleep 600", "yes");
    let quick = RewardConfig { timeout_s: 1.0, workers: 1, ..config(&endless, OnError::Zero) };
    let (verdicts, counts) = judged(&quick, &["right", "hang", "right"]);
    assert_eq!(scores(verdicts), [1.0, 0.0, 1.0]);
    assert_eq!(counts, Counts { failures: 1, timeouts: 1 });
}

#[test]
fn a_program_that_floods_or_does_not_read_is_a_failure() {
    let flood = config("command:yes aaaaaaaa | tr -d '\\n'", OnError::Zero);
    assert_eq!(scores(judged(&flood, &["right"]).0), [0.0]);
    let deaf = config("command:sleep 600", OnError::Zero);
    let deaf = RewardConfig { timeout_s: 1.0, start_timeout_s: 1.5, ..deaf };
    let long = "right".repeat(1 << 18);
    let (verdicts, counts) = judged(&deaf, &[&long]);
    assert_eq!(
        verdicts.as_ref().unwrap()[0].predicted,
        "reward failed: no answer of a program just started within reward.start_timeout_s (1.5 s)"
    );
    assert_eq!((scores(verdicts), counts.timeouts), (vec![0.0], 1));
}

#[test]
fn built_in_rules_report_rows_they_cannot_judge() {
    let judge = Judge::new(&config("auto", OnError::Zero)).unwrap();
    assert!(judge.check(&row("2")).unwrap_err().to_string().contains("\"own\""));
    let nameless = Row { data_source: None, ..row("2") };
    assert!(judge.check(&nameless).unwrap_err().to_string().contains("without data_source"));
    let judge = Judge::new(&config("regex", OnError::Zero)).unwrap();
    let mut session = judge.session(1);
    session.submit(0, &row("("), "2");
    assert!(session.finish().unwrap_err().to_string().contains("regular expression"));
    assert!(judge.session(1).finish().is_err(), "nothing was submitted");
}

#[cfg(feature = "http")]
mod http;
