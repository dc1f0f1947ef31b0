//! Models named by hub id, from a hub that stands in for the real one.

use std::fs;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::stand_in::{End, Reply, Repository, StandIn};
use super::support::{Folder, SMALL, engine, run};

/// The tiny model as `org/tiny`.
fn repository(folder: &Folder) -> Repository {
    let model = folder.tiny_model();
    let names = [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ];
    Repository::new(names.map(|name| (name, fs::read(model.join(name)).unwrap())))
}

/// The command with a hub at `url` and a home of its own.
fn with(folder: &Folder, url: &str) -> Command {
    let mut command = engine();
    command.env_remove("HF_HUB_OFFLINE").env("HF_ENDPOINT", url);
    command.env("HF_HOME", folder.path("home"));
    command
}

#[test]
fn a_hub_id_is_downloaded_once_and_runs_like_its_directory() {
    let folder = Folder::new();
    let hub = StandIn::of(repository(&folder));
    let prompts =
        folder.write("in.jsonl", "{\"messages\": [{\"role\": \"user\", \"content\": \"hi\"}]}\n");
    let flags = ["--max-tokens", "8", "--seed", "3", "--ignore-eos"];
    let generate = |command: &mut Command, model: &str| {
        command.args(["generate", model, "--prompts"]).arg(&prompts).args(flags).args(SMALL);
        let ran = run(command.env("HF_TOKEN", "secret"));
        assert_eq!(ran.code, Some(0), "{ran:?}");
        ran
    };
    let first = generate(&mut with(&folder, &hub.url), "org/tiny");
    assert!(first.stderr.contains("downloading org/tiny from http://127.0.0.1:"), "{first:?}");
    assert!(first.stderr.contains("model.safetensors: 0.3/0.3 MB"), "{first:?}");
    let asked = hub.take();
    assert_eq!(asked.len(), 13);
    assert!(asked.iter().all(|a| a.header("authorization") == Some("Bearer secret")));
    assert!(folder.path("home/hub/models--org--tiny/refs/main").is_file());

    let again = generate(&mut with(&folder, &hub.url), "org/tiny");
    let local = generate(&mut engine(), folder.path("tiny").to_str().unwrap());
    assert_eq!(first.stdout, local.stdout);
    assert_eq!(again.stdout, local.stdout);
    let doctor = run(with(&folder, &hub.url).args(["doctor", "org/tiny"]).args(SMALL));
    assert_eq!(doctor.code, Some(0), "{doctor:?}");
    assert!(doctor.stdout.contains("vocabulary 512"), "{doctor:?}");
    assert_eq!(hub.take().len(), 0);
}

#[test]
fn every_command_takes_a_hub_id() {
    let folder = Folder::new();
    let url = StandIn::of(repository(&folder)).url;
    let input = folder.write("in.jsonl", "{\"text\": \"a\"}\n");
    let commands: [&[&str]; 3] = [
        &["doctor", "org/tiny"],
        &["rl", "--model", "org/tiny", "--dry-run"],
        &["score", "org/tiny", "--input", input.to_str().unwrap()],
    ];
    for (number, arguments) in commands.into_iter().enumerate() {
        let home = folder.path(&format!("home{number}"));
        let ran = run(with(&folder, &url).env("HF_HOME", &home).args(arguments).args(SMALL));
        assert_eq!(ran.code, Some(0), "{ran:?}");
        assert!(home.join("hub/models--org--tiny/refs/main").is_file(), "{ran:?}");
    }
}

#[test]
fn downloads_that_fail_say_so_in_one_line() {
    let folder = Folder::new();
    let doctor = |url: &str| {
        let mut command = with(&folder, url);
        command.args(["doctor", "org/tiny"]);
        command
    };
    // The machine is described before the model is looked for.
    let fails = |command: &mut Command, code: i32, part: &str| {
        let ran = run(command.arg("--quiet"));
        assert_eq!(ran.code, Some(code), "{ran:?}");
        assert_eq!(ran.stderr.lines().count(), 1, "{ran:?}");
        assert!(ran.stderr.contains(part), "no {part:?}: {ran:?}");
    };
    let gated = StandIn::start(|_| Reply::status(401));
    fails(&mut doctor(&gated.url), 3, "set HF_TOKEN");
    let empty = StandIn::start(|_| Reply::status(404));
    fails(&mut doctor(&empty.url), 3, "no path org/tiny, and http://");
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    fails(&mut doctor(&format!("http://{closed}")), 1, "refused");
    fails(&mut doctor("nowhere"), 2, "HF_ENDPOINT");
    fails(doctor(&empty.url).env("HF_HUB_OFFLINE", "1"), 3, "the hub is offline");
}

#[test]
fn a_signal_ends_a_download_at_once() {
    let folder = Folder::new();
    let files = repository(&folder);
    let hub = StandIn::start(move |asked| {
        let reply = files.answer(asked);
        let weights = asked.path.ends_with(".safetensors") && asked.method == "GET";
        if weights { Reply { end: End::Silent(1000), ..reply } } else { reply }
    });
    let prompts = folder.write("in.jsonl", "{\"prompt\": \"a\"}\n");
    let mut command = with(&folder, &hub.url);
    command.args(["generate", "org/tiny", "--prompts"]).arg(&prompts).args(SMALL);
    let mut child = command.stderr(Stdio::null()).spawn().unwrap();
    let blobs = folder.path("home/hub/models--org--tiny/blobs");
    let begun = |entry: std::io::Result<fs::DirEntry>| {
        let entry = entry.unwrap();
        let partial = entry.file_name().to_string_lossy().ends_with(".incomplete");
        partial && entry.metadata().is_ok_and(|meta| meta.len() == 1000)
    };
    let started = Instant::now();
    while !fs::read_dir(&blobs).is_ok_and(|mut entries| entries.any(begun)) {
        assert!(started.elapsed() < Duration::from_secs(60), "no download");
        sleep(Duration::from_millis(10));
    }
    let killed = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(killed.success());
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(!folder.path("home/hub/models--org--tiny/refs").exists());
}
