//! Downloads models from a Hugging Face hub into the cache that Hugging Face's tools share.
//!
//! [`download`] asks the hub for the files of `main`, chooses those an engine reads, and fetches each one
//! it lacks: resumed where an earlier attempt ended, checked by size and SHA-256, and only then put where
//! readers look. `refs/main` is written last, so a half-fetched model is never taken for a whole one.
//! Several processes may download the same model at once; they take the locks that Python's
//! `huggingface_hub` takes.
//!
//! Leaves out uploading, revisions other than `main`, and printing: [`Event`]s tell how far it is.
//! Reads no environment, all settings come in [`HubSettings`].
//!
//! ```no_run
//! use engine::model::hub::{HubSettings, Located, resolve};
//! use hub::{Patience, download};
//!
//! let settings = HubSettings::from_lookup(|_| None);
//! let found = resolve("Qwen/Qwen2.5-0.5B-Instruct", &settings, |id, settings| {
//!     download(id, settings, &Patience::default(), &mut |_| {})
//! })?;
//! assert!(matches!(found, Located::Path(_)));
//! # Ok::<(), engine::Error>(())
//! ```
#![forbid(unsafe_code)]

mod cache;
mod fetch;
mod http;
mod select;

use std::path::PathBuf;
use std::time::Duration;

use engine::model::hub::{HubId, HubSettings};
use engine::model::safetensors;
use engine::{Error, ErrorKind, Result};
use serde::Deserialize;

use cache::Layout;
use fetch::Fetch;
use http::Client;
use select::{Choice, choose};

/// Longest answer of the hub about one model, in bytes.
const MAX_LISTING_BYTES: u64 = 64 << 20;

/// How long a download waits, and for how many tries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// Longest time to connect.
    pub connect: Duration,
    /// Longest time without a byte once connected.
    pub stall: Duration,
    /// Tries of one request after the first, as long as none of them makes progress.
    pub retries: u32,
    /// Wait before the first retry; doubles with each.
    pub backoff: Duration,
}

impl Default for Patience {
    /// 10 s to connect, 30 s without a byte, 5 retries after 1, 2, 4, 8 and 16 s.
    fn default() -> Self {
        let seconds = Duration::from_secs;
        Self { connect: seconds(10), stall: seconds(30), retries: 5, backoff: seconds(1) }
    }
}

/// What a download tells while it runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// So much of a file is there; told first when its transfer begins and last when it is whole.
    Progress {
        /// Its name in the repository.
        file: &'a str,
        /// Bytes on disk.
        done_bytes: u64,
        /// Bytes of the whole file.
        total_bytes: u64,
    },
    /// Another process is downloading this file.
    Waiting {
        /// Its name in the repository.
        file: &'a str,
    },
    /// A request failed and is made again.
    Retry {
        /// What failed.
        why: &'a str,
        /// Time until the next try.
        wait: Duration,
    },
}

/// Receives what a download tells.
pub type Tell<'a> = dyn FnMut(Event<'_>) + 'a;

/// What the hub says about a model.
#[derive(Deserialize)]
struct Listing {
    sha: String,
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
struct Sibling {
    rfilename: String,
}

/// Downloads what an engine reads of `main` of a model, as far as the cache lacks it, and returns the
/// directory or GGUF file to open.
///
/// # Errors
/// [`ErrorKind::Model`] when the model is not there, not for this token, or holds nothing to read;
/// [`ErrorKind::Network`] when the hub cannot be reached or keeps failing; [`ErrorKind::Io`] when the
/// cache cannot be written; [`ErrorKind::Config`] when an address or the token is malformed.
pub fn download(
    id: &HubId,
    hub: &HubSettings,
    patience: &Patience,
    tell: &mut Tell<'_>,
) -> Result<PathBuf> {
    let client = Client::new(hub, patience)?;
    let layout = Layout::new(id, &hub.cache);
    let mut fetch = Fetch::new(&client, &layout, patience, tell);
    let listing = listing(id, hub, &mut fetch)?;
    let names: Vec<&str> = listing.siblings.iter().map(|s| s.rfilename.as_str()).collect();
    let choice = choose(id, &names)?;
    let sha = &listing.sha;
    let mut get = |name: &str| -> Result<PathBuf> {
        let url = format!("{}/{}/resolve/{sha}/{}", hub.endpoint, id.as_str(), http::encode(name));
        let etag = fetch.file(name, &url)?;
        layout.link(sha, name, &etag)
    };
    for name in choice.files() {
        get(name)?;
    }
    if let Choice::Sharded { index, .. } = &choice {
        let path = layout.snapshot(sha).join(index);
        for name in &safetensors::shards(&path)? {
            if !names.contains(&name.as_str()) {
                let message = format!("{name:?} is not in the repository {id}");
                return Err(Error::model(message).in_file(&path));
            }
            get(name)?;
        }
    }
    if id.file().is_none() && matches!(choice, Choice::Gguf { .. }) {
        // A cache that cannot be written to is asked about again the next time.
        let _unwritable = layout.note(&id.only_gguf(&hub.cache, sha));
    }
    layout.publish(sha)?;
    Ok(match choice {
        Choice::Gguf { files } => layout.snapshot(sha).join(&files[0]),
        Choice::Single { .. } | Choice::Sharded { .. } => layout.snapshot(sha),
    })
}

/// Asks for the revision of `main` and its files.
fn listing(id: &HubId, hub: &HubSettings, fetch: &mut Fetch<'_>) -> Result<Listing> {
    let url = format!("{}/api/models/{}/revision/main", hub.endpoint, id.as_str());
    let text = fetch.text(&url, MAX_LISTING_BYTES).map_err(|error| match error.kind() {
        ErrorKind::Model(why) => Error::model(format!("no path {id}, and {why}")),
        _ => error,
    })?;
    let listing: Listing = serde_json::from_str(&text)
        .map_err(|error| Error::network(format!("{url}: not the answer of a hub: {error}")))?;
    let plain = |c: char| c.is_ascii_alphanumeric();
    if listing.sha.is_empty() || listing.sha.len() > 64 || !listing.sha.chars().all(plain) {
        return Err(Error::network(format!("{url}: {:?} is not a revision", listing.sha)));
    }
    Ok(listing)
}
