//! What a MODEL argument names: a path, a model that ships with the program, or a hub id.
//!
//! A hub id (`org/name`, or `org/name:file.gguf`) is looked up in the local cache of Hugging Face's tools:
//! `CACHE/models--org--name/refs/main` holds a revision, `snapshots/REVISION/` the files. Leaves out
//! downloading: [`resolve`] takes it as a function, and a program without one passes [`no_download`].
//! Reads no environment; [`HubSettings::from_lookup`] is given a way to look variables up.

use crate::error::{Error, ErrorKind, Result};
use crate::model::{ModelSource, open_builtin};
use std::collections::BTreeSet;
use std::fmt;
use std::path::{Path, PathBuf};

/// Where hub models are kept and come from.
#[derive(Clone, PartialEq, Eq)]
pub struct HubSettings {
    /// The cache directory (`HF_HUB_CACHE`).
    pub cache: PathBuf,
    /// The hub's address without a final slash (`HF_ENDPOINT`).
    pub endpoint: String,
    /// Sent as a bearer token (`HF_TOKEN`); never shown.
    pub token: Option<String>,
    /// Never download (`HF_HUB_OFFLINE`).
    pub offline: bool,
    /// Proxy for `https` addresses (`HTTPS_PROXY`); may hold a password, never shown.
    pub proxy: Option<String>,
    /// Hosts reached without the proxy, separated by commas (`NO_PROXY`).
    pub no_proxy: Option<String>,
}

/// A checked hub id: `org/name`, or `org/name:file.gguf` for one file of several.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubId {
    name: String,
    file: Option<String>,
}

/// What the cache holds of a hub model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cached {
    /// Weights, configuration and tokenizer: what to open.
    Whole(PathBuf),
    /// A GGUF file alone, where none was named; the repository may hold more than was fetched of it.
    Alone(PathBuf),
    /// A snapshot in which some of that is missing: its directory.
    Part(PathBuf),
}

/// A model that ships with the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Builtin {
    /// `builtin:arith`, the small policy for arithmetic.
    Arith,
}

/// What a MODEL argument turned out to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Located {
    /// A model that ships with the program.
    Builtin(Builtin),
    /// A Hugging Face directory or a GGUF file.
    Path(PathBuf),
}

impl Located {
    /// Opens the model.
    ///
    /// # Errors
    /// As [`ModelSource::open`].
    pub fn open(&self) -> Result<ModelSource> {
        match self {
            Self::Path(path) => ModelSource::open(path),
            Self::Builtin(builtin) => open_builtin(*builtin),
        }
    }
}

impl HubSettings {
    /// Settings from variables, with the defaults of Hugging Face's tools. `lookup` returns the value of
    /// a variable; empty values count as not set.
    ///
    /// ```
    /// # use engine::model::hub::HubSettings;
    /// let hub = HubSettings::from_lookup(|name| (name == "HOME").then(|| "/home/me".into()));
    /// assert_eq!(hub.cache.to_str(), Some("/home/me/.cache/huggingface/hub"));
    /// assert_eq!(hub.endpoint, "https://huggingface.co");
    /// ```
    pub fn from_lookup(lookup: impl Fn(&str) -> Option<String>) -> Self {
        let get = |name| lookup(name).filter(|value| !value.is_empty());
        let home = PathBuf::from(get("HOME").unwrap_or_else(|| ".".into()));
        let expand = |path: String| match path.strip_prefix("~/") {
            Some(rest) => home.join(rest),
            None => PathBuf::from(path),
        };
        let caches = get("XDG_CACHE_HOME").map_or_else(|| home.join(".cache"), expand);
        let hf_home = get("HF_HOME").map_or_else(|| caches.join("huggingface"), expand);
        let endpoint = get("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
        let on =
            |value: String| matches!(value.to_lowercase().as_str(), "1" | "true" | "yes" | "on");
        Self {
            cache: get("HF_HUB_CACHE").map_or_else(|| hf_home.join("hub"), expand),
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token: get("HF_TOKEN"),
            offline: get("HF_HUB_OFFLINE").is_some_and(on),
            proxy: get("HTTPS_PROXY").or_else(|| get("https_proxy")),
            no_proxy: get("NO_PROXY").or_else(|| get("no_proxy")),
        }
    }
}

impl fmt::Debug for HubSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HubSettings")
            .field("cache", &self.cache)
            .field("endpoint", &self.endpoint)
            .field("token", &self.token.as_ref().map(|_| "(set)"))
            .field("offline", &self.offline)
            .field("proxy", &self.proxy.as_ref().map(|_| "(set)"))
            .field("no_proxy", &self.no_proxy)
            .finish()
    }
}

impl HubId {
    /// Accepts `org/name` of letters, digits, `-`, `_` and `.`, as the hub does, with or without
    /// `:file.gguf`.
    ///
    /// ```
    /// # use engine::model::hub::HubId;
    /// let id = HubId::parse("org/name:small/q4.gguf").expect("a hub id");
    /// assert_eq!((id.as_str(), id.file()), ("org/name", Some("small/q4.gguf")));
    /// ```
    pub fn parse(text: &str) -> Option<Self> {
        let plain = |part: &str| {
            let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            (1..=96).contains(&part.len()) && part.chars().all(allowed) && !part.starts_with('.')
        };
        let (name, file) = match text.split_once(':') {
            Some((name, file)) => (name, Some(file)),
            None => (text, None),
        };
        let (org, model) = name.split_once('/')?;
        let gguf = |file: &str| file.ends_with(".gguf") && is_file_name(file);
        let valid = plain(org) && plain(model) && file.is_none_or(gguf);
        valid.then(|| Self { name: name.to_owned(), file: file.map(str::to_owned) })
    }

    /// `org/name`.
    pub fn as_str(&self) -> &str {
        &self.name
    }

    /// The file that was named, if one was.
    pub fn file(&self) -> Option<&str> {
        self.file.as_deref()
    }

    /// This model's folder in a cache directory.
    pub fn folder(&self, cache: &Path) -> PathBuf {
        cache.join(format!("models--{}", self.name.replace('/', "--")))
    }

    /// A file that a download leaves in the folder when all that a revision holds to open is one GGUF
    /// file. Hugging Face's tools do not look at it.
    pub fn only_gguf(&self, cache: &Path, revision: &str) -> PathBuf {
        self.folder(cache).join(".only-gguf").join(revision)
    }
}

impl fmt::Display for HubId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)?;
        self.file.as_ref().map_or(Ok(()), |file| write!(f, ":{file}"))
    }
}

/// Finds the model a MODEL argument names. A path that exists wins; a hub id that is not cached is handed
/// to `download`, unless `hub.offline`.
///
/// ```
/// # use engine::model::hub::{Builtin, HubSettings, Located, no_download, resolve};
/// let hub = HubSettings::from_lookup(|_| None);
/// assert_eq!(resolve("builtin:arith", &hub, no_download)?, Located::Builtin(Builtin::Arith));
/// # Ok::<(), engine::Error>(())
/// ```
///
/// # Errors
/// When nothing of that name is found, or the download fails.
pub fn resolve(
    model: &str,
    hub: &HubSettings,
    download: impl FnOnce(&HubId, &HubSettings) -> Result<PathBuf>,
) -> Result<Located> {
    if let Some(name) = model.strip_prefix("builtin:") {
        return match name {
            "arith" => Ok(Located::Builtin(Builtin::Arith)),
            _ => Err(Error::model(format!(
                "unknown model {model:?}, the builtin one is builtin:arith"
            ))),
        };
    }
    let path = Path::new(model);
    if path.exists() {
        return Ok(Located::Path(path.to_owned()));
    }
    let id = match HubId::parse(model) {
        Some(id) if id.file().is_some() || !model.ends_with(".gguf") => id,
        _ => {
            return Err(Error::model(format!(
                "no model at {model:?}: expected a directory, a .gguf file, a hub id like org/name or \
                 builtin:arith"
            )));
        }
    };
    match cached(&id, hub)? {
        Some(Cached::Whole(path)) => Ok(Located::Path(path)),
        // Opening a part names what is missing.
        Some(Cached::Alone(path) | Cached::Part(path)) if hub.offline => Ok(Located::Path(path)),
        _ if hub.offline => no_download(&id, hub).map(Located::Path),
        // Without a network it is all there is.
        Some(Cached::Alone(path)) => match download(&id, hub) {
            Err(error) if matches!(error.kind(), ErrorKind::Network(_)) => Ok(Located::Path(path)),
            found => found.map(Located::Path),
        },
        _ => download(&id, hub).map(Located::Path),
    }
}

/// What the cache holds of the snapshot of `main`, if there is one.
///
/// # Errors
/// When the cache holds a revision that is not a plain name.
pub fn cached(id: &HubId, hub: &HubSettings) -> Result<Option<Cached>> {
    let folder = id.folder(&hub.cache);
    let reference = folder.join("refs").join("main");
    if !reference.is_file() {
        return Ok(None);
    }
    let revision = super::source::read_text(&reference, 256)?;
    let revision = revision.trim();
    if revision.is_empty() || !revision.chars().all(|c| c.is_ascii_alphanumeric()) {
        let message = format!("{revision:?} is not a revision");
        return Err(Error::model(message).in_file(&reference));
    }
    let snapshot = folder.join("snapshots").join(revision);
    if !snapshot.is_dir() {
        return Ok(None);
    }
    if let Some(file) = id.file() {
        let path = snapshot.join(file);
        let whole = gguf_is_whole(&path);
        return Ok(Some(if whole { Cached::Whole(path) } else { Cached::Part(snapshot) }));
    }
    if directory_is_whole(&snapshot) {
        return Ok(Some(Cached::Whole(snapshot)));
    }
    Ok(Some(match super::source::gguf_files(&snapshot)?.as_slice() {
        [one] if !gguf_is_whole(one) => Cached::Part(snapshot),
        [one] if id.only_gguf(&hub.cache, revision).exists() => Cached::Whole(one.clone()),
        [one] => Cached::Alone(one.clone()),
        _ => Cached::Part(snapshot),
    }))
}

/// Whether a snapshot holds a model of safetensors with all that goes with it.
fn directory_is_whole(snapshot: &Path) -> bool {
    let has = |name: &str| snapshot.join(name).exists();
    let index = snapshot.join("model.safetensors.index.json");
    let shards = || {
        let shards = index.exists().then(|| super::safetensors::shards(&index));
        // A broken index is fetched again.
        let shards: BTreeSet<String> = shards.and_then(Result::ok).unwrap_or_default();
        !shards.is_empty() && shards.iter().all(|name| has(name))
    };
    has("config.json") && has("tokenizer.json") && (has("model.safetensors") || shards())
}

/// Whether a GGUF file is there with all parts it is split into, by their names.
fn gguf_is_whole(path: &Path) -> bool {
    let name = path.to_string_lossy();
    gguf_parts(&name).iter().all(|part| Path::new(part).exists())
}

/// The files that make up the model that begins in `first`: itself, or `x-00001-of-0000N.gguf` to
/// `x-0000N-of-0000N.gguf`.
pub fn gguf_parts(first: &str) -> Vec<String> {
    let split = || {
        let (stem, count) = first.strip_suffix(".gguf")?.rsplit_once("-00001-of-")?;
        let parts: u16 = count.parse().ok().filter(|n| (1..=999).contains(n))?;
        Some((1..=parts).map(|part| format!("{stem}-{part:05}-of-{count}.gguf")).collect())
    };
    split().unwrap_or_else(|| vec![first.to_owned()])
}

/// Whether this names a part other than the first of a split GGUF file: `x-00002-of-00003.gguf`.
pub fn is_later_part(name: &str) -> bool {
    let digits = |text: &str| text.len() == 5 && text.bytes().all(|b| b.is_ascii_digit());
    let part = || {
        let (rest, count) = name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
        let (_, number) = rest.rsplit_once('-')?;
        Some(digits(number) && digits(count) && number != "00001")
    };
    part().unwrap_or(false)
}

/// Whether this names a file inside a repository and nothing outside of it.
pub fn is_file_name(name: &str) -> bool {
    let plain = |part: &str| !part.is_empty() && !part.starts_with('.');
    let safe = |c: char| !c.is_control() && !"\\:".contains(c);
    name.len() <= 255 && name.chars().all(safe) && name.split('/').all(plain)
}

/// The download of a program that cannot: takes a GGUF file that is alone for the only one.
///
/// # Errors
/// When there is none; says where the model was looked for.
pub fn no_download(id: &HubId, hub: &HubSettings) -> Result<PathBuf> {
    if let Some(Cached::Alone(path)) = cached(id, hub)? {
        return Ok(path);
    }
    let folder = id.folder(&hub.cache);
    let why = if hub.offline { "and the hub is offline" } else { "and this build cannot download" };
    let looked = folder.join("refs/main");
    Err(Error::model(format!("no path {id}, no cached model at {}, {why}", looked.display())))
}

#[cfg(test)]
mod tests;
