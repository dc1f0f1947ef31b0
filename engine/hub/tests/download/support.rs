//! A cache that is removed again, a tiny model, and calls that collect what they are told.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use engine::Result;
use engine::model::hub::{HubId, HubSettings, Located, resolve};
use hub::{Event, Patience, download};

use crate::stand_in::{Repository, SHA, etag};

/// Waits that a test can afford.
pub(crate) const QUICK: Patience = Patience {
    connect: Duration::from_secs(5),
    stall: Duration::from_millis(200),
    retries: 2,
    backoff: Duration::from_millis(1),
};

/// A cache of one test.
pub(crate) struct Cache(pub(crate) PathBuf);

impl Cache {
    pub(crate) fn new() -> Self {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("engine-hub-{}-{number}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    pub(crate) fn settings(&self, endpoint: &str) -> HubSettings {
        HubSettings {
            cache: self.0.clone(),
            endpoint: endpoint.to_owned(),
            token: None,
            offline: false,
            proxy: None,
            no_proxy: None,
        }
    }

    pub(crate) fn folder(&self) -> PathBuf {
        self.0.join("models--org--tiny")
    }

    pub(crate) fn snapshot(&self) -> PathBuf {
        self.folder().join("snapshots").join(SHA)
    }

    pub(crate) fn blob(&self, name: &str, data: &[u8]) -> PathBuf {
        self.folder().join("blobs").join(etag(name, data))
    }

    /// Names in the folder of blobs, sorted.
    pub(crate) fn blobs(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.folder().join("blobs")) else { return Vec::new() };
        let name = |entry: std::io::Result<fs::DirEntry>| entry.unwrap().file_name();
        let mut names: Vec<String> =
            entries.map(|entry| name(entry).into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// That no reader finds a model here.
    pub(crate) fn assert_nothing_is_whole(&self) {
        assert!(!self.folder().join("refs/main").exists());
        let whole: Vec<String> =
            self.blobs().into_iter().filter(|name| !name.ends_with(".incomplete")).collect();
        assert_eq!(whole, Vec::<String>::new());
    }
}

impl Drop for Cache {
    fn drop(&mut self) {
        // Left behind, it is in the way of nobody.
        let _left = fs::remove_dir_all(&self.0);
    }
}

/// The golden tiny Llama with a tokenizer of bytes.
pub(crate) fn tiny() -> Repository {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data");
    let read = |name: &'static str| {
        let folder = if name.contains("tok") { "tiny-text" } else { "golden/models/tiny-llama" };
        (name, fs::read(data.join(folder).join(name)).unwrap())
    };
    let names = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"];
    let unread = ("pytorch_model.bin", b"never fetched".to_vec());
    Repository::new(names.into_iter().map(read).chain([unread]))
}

/// Resolves `id` with downloads; the texts of retries come with it.
pub(crate) fn find(id: &str, settings: &HubSettings) -> (Result<Located>, Vec<String>) {
    let mut retries = Vec::new();
    let mut tell = |event: Event<'_>| {
        if let Event::Retry { why, .. } = event {
            retries.push(why.to_owned());
        }
    };
    let found =
        resolve(id, settings, |id: &HubId, settings| download(id, settings, &QUICK, &mut tell));
    (found, retries)
}

/// The same, where it must fail; returns the message.
pub(crate) fn refused(id: &str, settings: &HubSettings) -> String {
    let (found, _) = find(id, settings);
    let message = found.unwrap_err().to_string();
    assert_eq!(message.lines().count(), 1, "{message}");
    message
}
