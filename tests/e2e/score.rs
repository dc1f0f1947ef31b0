//! `engine score`: both paths, in the order of the input, equal to the bit.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use super::support::{Folder, SMALL, engine, fails, json_lines, run};

fn score(model: &Path, input: &Path) -> Command {
    let mut command = engine();
    command.arg("score").arg(model).arg("--input").arg(input).args(SMALL);
    command
}

#[test]
fn both_paths_give_what_sampling_gave() {
    let folder = Folder::new();
    let model = folder.tiny_model();
    let prompts: String = (0..6)
        .map(|i| {
            json!({"prompt_token_ids": [100, 101 + i], "n": 2, "temperature": 0.75}).to_string()
                + "\n"
        })
        .collect();
    let prompts = folder.write("prompts.jsonl", &prompts);
    let mut generate = engine();
    generate.arg("generate").arg(&model).arg("--prompts").arg(prompts).args(SMALL);
    let sampled = run(generate.args(["--max-tokens", "20", "--seed", "3"]));
    let sampled = json_lines(&sampled.stdout);
    assert_eq!(sampled.len(), 12);
    let texts: String = sampled
        .iter()
        .map(|line| {
            let mut tokens = line["prompt_token_ids"].as_array().unwrap().clone();
            tokens.extend(line["token_ids"].as_array().unwrap().clone());
            json!({"token_ids": tokens, "id": line["index"], "temperature": 0.75}).to_string()
                + "\n"
        })
        .collect();
    let input = folder.write("texts.jsonl", &texts);
    let rollout = run(&mut score(&model, &input));
    assert_eq!(rollout.code, Some(0), "{rollout:?}");
    let scored = json_lines(&rollout.stdout);
    assert_eq!(scored.len(), 12);
    for (i, (line, sample)) in scored.iter().zip(&sampled).enumerate() {
        assert_eq!((&line["index"], &line["id"]), (&json!(i), &sample["index"]));
        let len = line["token_ids"].as_array().unwrap().len();
        let logprobs = line["logprobs"].as_array().unwrap();
        assert_eq!((logprobs.len(), &logprobs[0]), (len, &Value::Null));
        assert_eq!(line["entropy"].as_array().unwrap().len(), len);
        // The tail of the text was sampled with these log-probabilities.
        assert_eq!(&logprobs[2..], sample["logprobs"].as_array().unwrap().as_slice());
        let bits = line["logprob_bits"][1].as_u64().unwrap();
        let value = f64::from(f32::from_bits(u32::try_from(bits).unwrap()));
        assert!((value - logprobs[1].as_f64().unwrap()).abs() < 1e-6);
    }
    let output = folder.path("scores.jsonl");
    let train = run(score(&model, &input).args(["--path", "train", "--output"]).arg(&output));
    assert_eq!((train.code, train.stdout.as_str()), (Some(0), ""), "{train:?}");
    assert_eq!(fs::read_to_string(&output).unwrap(), rollout.stdout);
}

#[test]
fn bad_lines_leave_no_output() {
    let folder = Folder::new();
    let model = folder.tiny_model();
    let cases = [
        ("{\"text\": \"a\"}\n{\"text\": 1}\n", "texts.jsonl: line 2 text is 1, expected a string"),
        ("{\"token_ids\": []}\n", "line 1: text has 0 tokens"),
        ("{\"token_ids\": [7, 900]}\n", "text has token 900, vocabulary has 512"),
        ("{\"text\": \"a\", \"temperature\": 0}\n", "temperature is 0, limit is above 0"),
        ("{\"id\": 1}\n", "has not exactly one of token_ids and text"),
    ];
    for (text, message) in cases {
        let input = folder.write("texts.jsonl", text);
        let output = folder.path("scores.jsonl");
        fails(score(&model, &input).arg("--output").arg(&output), 3, message);
        assert!(!output.exists(), "{message}");
    }
}

#[cfg(unix)]
#[test]
fn links_stay_links_and_pipes_are_written_to() {
    use std::os::unix::fs::{FileTypeExt, symlink};

    let folder = Folder::new();
    let model = folder.tiny_model();
    let input = folder.write("texts.jsonl", "{\"text\": \"ab\"}\n");
    let expected = run(&mut score(&model, &input)).stdout;
    let to = |output: &Path| {
        let ran = run(score(&model, &input).arg("--output").arg(output));
        assert_eq!((ran.code, ran.stdout.as_str()), (Some(0), ""), "{ran:?}");
    };
    // A link to a file that is not there yet, then to one that is.
    fs::create_dir(folder.path("other")).unwrap();
    let link = folder.path("link.jsonl");
    symlink("other/scores.jsonl", &link).unwrap();
    for _ in 0..2 {
        to(&link);
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        assert_eq!(fs::read_to_string(folder.path("other/scores.jsonl")).unwrap(), expected);
    }
    let pipe = folder.path("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let link = folder.path("link-to-pipe");
    symlink("pipe", &link).unwrap();
    for output in [&pipe, &link] {
        let reader = std::thread::spawn({
            let pipe = pipe.clone();
            move || fs::read_to_string(pipe).unwrap()
        });
        to(output);
        assert_eq!(reader.join().unwrap(), expected);
        assert!(fs::symlink_metadata(&pipe).unwrap().file_type().is_fifo());
    }
    assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
    let names = fs::read_dir(folder.path("other")).unwrap().count();
    assert_eq!(names, 1, "nothing is left beside the file");
    fails(
        score(&model, &input).arg("--output").arg(folder.path("other")),
        2,
        "other is a folder, expected a file",
    );
    let circle = folder.path("circle");
    symlink("circle", &circle).unwrap();
    fails(score(&model, &input).arg("--output").arg(&circle), 2, "links lead in a circle");
    // What a shell has opened to add to keeps what it has.
    let log = folder.write("log.jsonl", "before\n");
    let added = fs::OpenOptions::new().append(true).open(&log).unwrap();
    let mut command = score(&model, &input);
    let status = command.args(["--output", "/dev/stdout"]).stdout(added).status().unwrap();
    assert!(status.success());
    assert_eq!(fs::read_to_string(&log).unwrap(), format!("before\n{expected}"));
}
