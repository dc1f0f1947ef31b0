//! The C ABI at its door: called from Rust as C would, and built and called from C and C++.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod c;
mod calls;

use std::fs;
use std::path::{Path, PathBuf};

/// A file or folder of the repository.
fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
}

/// A model without a tokenizer, of 512 tokens.
fn bare_model() -> PathBuf {
    repository("tests/data/golden/models/tiny-llama")
}

/// A model with a tokenizer: the bare one's weights, and 259 byte-level tokens. `name` keeps the folders of tests
/// that run at once apart.
fn text_model(name: &str) -> PathBuf {
    let model = Path::new(env!("CARGO_TARGET_TMPDIR")).join("abi").join(name);
    fs::create_dir_all(&model).unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(bare_model().join(file), model.join(file)).unwrap();
    }
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(repository("tests/data/tiny-text").join(file), model.join(file)).unwrap();
    }
    model
}
