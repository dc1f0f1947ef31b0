//! `engine generate`: results, resumption, and lines it refuses.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use super::support::{Folder, SMALL, engine, fails, json_lines, run};

fn generate(model: &Path, prompts: &Path) -> Command {
    let mut command = engine();
    command.arg("generate").arg(model).arg("--prompts").arg(prompts).args(SMALL);
    command
}

/// Ten prompts of all three forms.
fn prompts() -> String {
    let line = |i: usize| match i % 3 {
        0 => json!({"prompt": "x".repeat(i + 1), "id": format!("p{i}")}),
        1 => json!({"prompt_token_ids": [100, 101, i], "temperature": 0}),
        _ => json!({"messages": [{"role": "user", "content": "hi"}], "n": 3}),
    };
    (0..10).map(|i| line(i).to_string() + "\n").collect()
}

/// Results by prompt and sample.
fn sorted(text: &str) -> Vec<Value> {
    let mut lines = json_lines(text);
    lines.sort_by_key(|line| (line["index"].as_u64(), line["sample"].as_u64()));
    lines
}

#[test]
fn results_have_everything_and_do_not_depend_on_the_batch() {
    let folder = Folder::new();
    let model = folder.tiny_model();
    let input = folder.write("in.jsonl", &prompts());
    let flags = ["--max-tokens", "12", "--ignore-eos", "--seed", "7"];
    let all = run(generate(&model, &input).args(flags));
    assert_eq!(all.code, Some(0), "{all:?}");
    let lines = sorted(&all.stdout);
    assert_eq!(lines.len(), 16);
    assert_eq!((&lines[0]["id"], &lines[0]["text"].is_string()), (&json!("p0"), &true));
    for line in &lines {
        for key in ["token_ids", "logprobs", "raw_logprobs"] {
            assert_eq!(line[key].as_array().unwrap().len(), 12, "{key}");
        }
        assert_eq!(line["finish_reason"], "length");
        assert_eq!(line["stop_reason"], Value::Null);
    }
    assert_eq!(lines[1]["prompt_token_ids"], json!([100, 101, 1]));
    let single = ["--max-num-seqs", "1", "--max-num-batched-tokens", "16"];
    let alone = run(generate(&model, &input).args(flags).args(single));
    assert_eq!(sorted(&alone.stdout), lines);
    let guesses = r#"{"num_speculative_tokens": 16, "prompt_lookup_min": 1}"#;
    for guesses in ["off", guesses] {
        let same =
            run(generate(&model, &input).args(flags).args(["--speculative-config", guesses]));
        assert_eq!(sorted(&same.stdout), lines, "{guesses}");
    }
    let other =
        run(generate(&model, &input).args(["--max-tokens", "12", "--ignore-eos", "--seed", "8"]));
    assert_ne!(sorted(&other.stdout), lines);
}

#[test]
fn an_interrupted_output_is_continued() {
    let folder = Folder::new();
    let model = folder.tiny_model();
    let input = folder.write("in.jsonl", &prompts());
    let output = folder.path("out.jsonl");
    let go = || {
        let mut command = generate(&model, &input);
        command.args(["--max-tokens", "9", "--output"]).arg(&output);
        let ran = run(&mut command);
        assert_eq!((ran.code, ran.stdout.as_str()), (Some(0), ""), "{ran:?}");
        fs::read_to_string(&output).unwrap()
    };
    let whole = go();
    assert_eq!(go(), whole, "a finished output is left alone");
    // Seven lines and a part of the eighth are left, and one sample of a group is missing.
    let lines: Vec<&str> = whole.lines().collect();
    let mut cut = lines[..7].join("\n") + "\n";
    cut.push_str(&lines[7][..lines[7].len() / 2]);
    fs::write(&output, cut).unwrap();
    let resumed = go();
    assert!(resumed.starts_with(&(lines[..7].join("\n") + "\n")));
    assert_eq!(sorted(&resumed), sorted(&whole));

    // What is done is kept only if the same would be drawn again.
    let again = |model: &Path, flags: &[&str]| {
        let mut command = generate(model, &input);
        command.args(flags).arg("--output").arg(&output);
        command
    };
    let other = folder.path("other");
    fs::rename(folder.path("tiny"), &other).unwrap();
    assert_eq!(run(&mut again(&other, &["--max-tokens", "9"])).code, Some(0));
    let refused = "out.jsonl has samples of another model, seed or other sampling parameters";
    let nine = ["--max-tokens", "9"];
    for flags in [["--seed", "1"], ["--temperature", "0.5"], ["--top-k", "3"], ["--dtype", "f32"]] {
        fails(&mut again(&other, &[nine, flags].concat()), 3, refused);
    }
    fails(&mut again(&other, &["--max-tokens", "8"]), 3, refused);
    fails(&mut again(Path::new("builtin:arith"), &nine), 3, "out.jsonl has ");
    assert_eq!(fs::read_to_string(&output).unwrap(), resumed);
    // An older program did not say what its samples are of.
    let old: Vec<String> = json_lines(&whole)
        .into_iter()
        .map(|mut line| {
            line.as_object_mut().unwrap().remove("fingerprint").unwrap();
            line.to_string() + "\n"
        })
        .collect();
    fs::write(&output, old.concat()).unwrap();
    let ran = run(&mut again(&other, &["--seed", "1"]));
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(ran.stderr.contains("out.jsonl has samples of an older program"), "{ran:?}");
    assert_eq!(fs::read_to_string(&output).unwrap(), old.concat());
    let model = other;

    fs::write(&input, "{\"prompt\": \"another\"}\n").unwrap();
    fails(generate(&model, &input).arg("--output").arg(&output), 3, "another prompt for index 0");
    fs::write(&output, "not json\n").unwrap();
    fails(generate(&model, &input).arg("--output").arg(&output), 3, "out.jsonl: line 1");
}

#[cfg(unix)]
#[test]
fn a_pipe_gets_the_samples() {
    let folder = Folder::new();
    let model = folder.tiny_model();
    let input = folder.write("in.jsonl", &prompts());
    let pipe = folder.path("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let mut command = generate(&model, &input);
    command.args(["--max-tokens", "9", "--quiet"]);
    let expected = run(&mut command).stdout;
    command.arg("--output").arg(&pipe);
    let reader = std::thread::spawn({
        let pipe = pipe.clone();
        move || fs::read_to_string(pipe).unwrap()
    });
    assert_eq!(run(&mut command).code, Some(0));
    assert_eq!(sorted(&reader.join().unwrap()), sorted(&expected));
}

#[test]
fn bad_lines_are_refused_by_number_before_anything_runs() {
    let folder = Folder::new();
    let model = folder.tiny_model();
    let long = "a".repeat(300);
    let cases = [
        ("{\"prompt\": \"a\"}\n\n{\"prompt\": ", "in.jsonl: line 3 is not valid JSON"),
        ("[1]\n", "line 1 is an array, expected an object"),
        ("{}\n", "line 1 has not exactly one of prompt"),
        ("{\"prompt\": \"a\", \"messages\": []}\n", "line 1 has not exactly one of prompt"),
        ("{\"prompt\": \"a\"}\n{\"prompt\": \"a\", \"n\": \"2\"}\n", "line 2 n is a string"),
        ("{\"prompt\": \"a\", \"top_p\": 2}\n", "top_p is 2"),
        ("{\"prompt_token_ids\": [512]}\n", "token 512, vocabulary has 512"),
        ("{\"prompt_token_ids\": []}\n", "prompt has 0 tokens"),
        (&format!("{{\"prompt\": \"{long}\"}}\n"), "prompt has 300 tokens, limit is 255"),
    ];
    for (text, message) in cases {
        let input = folder.write("in.jsonl", text);
        let output = folder.path("out.jsonl");
        let mut command = generate(&model, &input);
        command.args(["--max-model-len", "256", "--output"]).arg(&output);
        fails(&mut command, 3, message);
        assert!(!output.exists(), "{message}");
    }
    fails(&mut generate(&model, &folder.path("absent.jsonl")), 3, "absent.jsonl: No such file");
}

#[test]
fn a_message_that_spells_a_control_token_is_text() {
    let folder = Folder::new();
    let chat = json!({"messages": [{"role": "user", "content": "a</s>"}], "max_tokens": 1});
    let text = json!({"prompt": "a</s>", "max_tokens": 1});
    let input = folder.write("in.jsonl", &format!("{chat}\n{text}\n"));
    let ran = run(&mut generate(&folder.tiny_model(), &input));
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let bytes = |text: &str| text.bytes().map(|byte| u32::from(byte) + 3).collect::<Vec<u32>>();
    let lines = sorted(&ran.stdout);
    assert_eq!(lines[0]["prompt_token_ids"], json!(bytes("[user] a</s>\n[assistant] ")));
    // The text of a prompt is the caller's own to steer.
    assert_eq!(lines[1]["prompt_token_ids"].as_array().unwrap().last(), Some(&json!(2)));
}

#[test]
fn stops_and_alternatives_are_reported() {
    let folder = Folder::new();
    let model = folder.tiny_model();
    let greedy = json!({"prompt_token_ids": [100, 101], "temperature": 0, "max_tokens": 6,
        "ignore_eos": true, "logprobs": 2});
    let input = folder.write("in.jsonl", &format!("{greedy}\n"));
    let first = &json_lines(&run(&mut generate(&model, &input)).stdout)[0];
    let tokens = first["token_ids"].as_array().unwrap();
    assert_eq!(first["top_logprobs"].as_array().unwrap().len(), 6);
    assert_eq!(first["top_logprobs"][0][0][0], tokens[0]);
    assert_eq!(first["top_logprobs"][0][0][1], first["raw_logprobs"][0], "{first}");
    let mut stopped = greedy;
    stopped["stop_token_ids"] = json!([tokens[3]]);
    let input = folder.write("in.jsonl", &format!("{stopped}\n"));
    let second = &json_lines(&run(&mut generate(&model, &input)).stdout)[0];
    let stop = tokens.iter().position(|token| token == &tokens[3]).unwrap();
    assert_eq!(second["token_ids"].as_array().unwrap()[..], tokens[..=stop]);
    assert_eq!((&second["finish_reason"], &second["stop_reason"]), (&json!("stop"), &tokens[3]));
}
