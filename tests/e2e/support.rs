//! The built command, a tiny random model, and a folder that is removed again.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::Value;

/// A folder of one test.
pub(crate) struct Folder(PathBuf);

impl Folder {
    pub(crate) fn new() -> Self {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("engine-e2e-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    pub(crate) fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, text).unwrap();
        path
    }

    /// The golden tiny Llama with a tokenizer of bytes (id = byte + 3) and a chat template.
    pub(crate) fn tiny_model(&self) -> PathBuf {
        let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
        let path = self.path("tiny");
        fs::create_dir(&path).unwrap();
        let golden = ["config.json", "generation_config.json", "model.safetensors"];
        let text = ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"];
        for name in golden {
            let from = data.join("golden/models/tiny-llama").join(name);
            fs::write(path.join(name), fs::read(from).unwrap()).unwrap();
        }
        for name in text {
            fs::write(path.join(name), fs::read(data.join("tiny-text").join(name)).unwrap())
                .unwrap();
        }
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // Left behind, it is in the way of nobody.
        let _left = fs::remove_dir_all(&self.0);
    }
}

/// The command, with no setting of the caller's environment.
pub(crate) fn engine() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_engine"));
    for (name, _) in std::env::vars_os() {
        let name = name.to_string_lossy();
        let ours = name.starts_with("ENGINE_") && name != "ENGINE_CPU";
        if ours || name.starts_with("HF_") {
            command.env_remove(&*name);
        }
    }
    command.env("HF_HUB_OFFLINE", "1");
    command
}

/// Flags that keep a run small.
pub(crate) const SMALL: [&str; 4] = ["--kv-cache-memory-bytes", "8MiB", "--threads", "1"];

/// What the command did.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

pub(crate) fn run(command: &mut Command) -> Ran {
    command.output().unwrap().into()
}

/// Runs a command that must fail with `code` and one line that contains `part`.
pub(crate) fn fails(command: &mut Command, code: i32, part: &str) {
    let ran = run(command.arg("--quiet"));
    assert_eq!(ran.code, Some(code), "{ran:?}");
    assert_eq!(ran.stderr.lines().count(), 1, "{ran:?}");
    assert!(ran.stderr.starts_with("error: ") && ran.stderr.contains(part), "no {part:?}: {ran:?}");
    assert_eq!(ran.stdout, "", "{ran:?}");
}

pub(crate) fn json_lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}
