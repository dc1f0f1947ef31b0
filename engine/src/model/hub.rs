//! What a MODEL argument names: a path, a model that ships with the program, or a hub id.
//!
//! A hub id (`org/name`) is looked up in the local cache of Hugging Face's tools:
//! `CACHE/models--org--name/refs/main` holds a revision, `snapshots/REVISION/` the files. Leaves out
//! downloading: [`resolve`] takes it as a function, and a program without one passes [`no_download`].
//! Reads no environment; [`HubSettings::from_lookup`] is given a way to look variables up.

use crate::error::{Error, Result};
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
}

/// A checked hub id, `org/name`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubId(String);

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
            .finish()
    }
}

impl HubId {
    /// Accepts `org/name` of letters, digits, `-`, `_` and `.`, as the hub does.
    pub fn parse(text: &str) -> Option<Self> {
        let plain = |part: &str| {
            let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            (1..=96).contains(&part.len()) && part.chars().all(allowed) && !part.starts_with('.')
        };
        let (org, name) = text.split_once('/')?;
        (plain(org) && plain(name)).then(|| Self(text.to_owned()))
    }

    /// The id as it was given.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// This model's folder in a cache directory.
    pub fn folder(&self, cache: &Path) -> PathBuf {
        cache.join(format!("models--{}", self.0.replace('/', "--")))
    }
}

impl fmt::Display for HubId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
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
        Some(id) if !model.ends_with(".gguf") => id,
        _ => {
            return Err(Error::model(format!(
                "no model at {model:?}: expected a directory, a .gguf file, a hub id like org/name or \
                 builtin:arith"
            )));
        }
    };
    if let Some(snapshot) = cached(&id, hub)? {
        return Ok(Located::Path(snapshot));
    }
    if hub.offline { no_download(&id, hub) } else { download(&id, hub) }.map(Located::Path)
}

/// The snapshot of `main` in the cache, if there is one.
///
/// # Errors
/// When the cache holds a revision that is not a plain name.
pub fn cached(id: &HubId, hub: &HubSettings) -> Result<Option<PathBuf>> {
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
    Ok(snapshot.is_dir().then_some(snapshot))
}

/// The download of a program that cannot: says where the model was looked for.
///
/// # Errors
/// Always.
pub fn no_download(id: &HubId, hub: &HubSettings) -> Result<PathBuf> {
    let folder = id.folder(&hub.cache);
    let why = if hub.offline { "and the hub is offline" } else { "and this build cannot download" };
    let looked = folder.join("refs/main");
    Err(Error::model(format!("no path {id}, no cached model at {}, {why}", looked.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(cache: &Path) -> HubSettings {
        let (endpoint, token) = ("http://hub".to_owned(), Some("secret".to_owned()));
        HubSettings { cache: cache.to_owned(), endpoint, token, offline: false }
    }

    #[test]
    fn variables_follow_the_precedence_of_the_hub_tools() {
        let with = |pairs: &'static [(&str, &str)]| {
            HubSettings::from_lookup(move |name| {
                pairs.iter().find(|(n, _)| *n == name).map(|(_, v)| (*v).to_owned())
            })
        };
        let hub = with(&[("HOME", "/h"), ("HF_HOME", "~/hf"), ("HF_ENDPOINT", "http://m/")]);
        assert_eq!((hub.cache.to_str(), hub.endpoint.as_str()), (Some("/h/hf/hub"), "http://m"));
        let hub = with(&[("HF_HUB_CACHE", "/c"), ("HF_HOME", "/hf"), ("HF_HUB_OFFLINE", "1")]);
        assert_eq!((hub.cache.to_str(), hub.offline), (Some("/c"), true));
        assert!(!with(&[("HF_HUB_OFFLINE", "0")]).offline);
        let shown = format!("{:?}", settings(Path::new("/c")));
        assert!(!shown.contains("secret"), "{shown}");
    }

    #[test]
    fn ids_are_checked() {
        assert_eq!(
            HubId::parse("Qwen/Qwen2.5-0.5B").map(|i| i.0),
            Some("Qwen/Qwen2.5-0.5B".into())
        );
        for bad in ["gpt2", "../x", "a/b/c", "a/", "/a", "a/..", "a b/c", "./dir"] {
            assert_eq!(HubId::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_cached_model_is_found_and_a_missing_one_is_explained() {
        let cache = crate::model::source::tests::scratch("hub");
        let hub = settings(&cache.path);
        let folder = cache.path.join("models--org--name");
        let error = resolve("org/name", &hub, no_download).unwrap_err().to_string();
        assert!(error.contains("models--org--name/refs/main"), "{error}");
        let fetched = resolve("org/name", &hub, |id, hub| Ok(hub.cache.join(id.as_str())));
        assert_eq!(fetched.unwrap(), Located::Path(cache.path.join("org/name")));
        let offline = HubSettings { offline: true, ..hub.clone() };
        let error = resolve("org/name", &offline, |_, _| panic!("offline")).unwrap_err();
        assert!(error.to_string().contains("offline"), "{error}");

        std::fs::create_dir_all(folder.join("refs")).unwrap();
        std::fs::create_dir_all(folder.join("snapshots/abc123")).unwrap();
        std::fs::write(folder.join("refs/main"), "abc123\n").unwrap();
        let found = resolve("org/name", &hub, no_download).unwrap();
        assert_eq!(found, Located::Path(folder.join("snapshots/abc123")));
        std::fs::write(folder.join("refs/main"), "../../..").unwrap();
        assert!(resolve("org/name", &hub, no_download).is_err());
    }

    #[test]
    fn paths_and_builtins_come_first() {
        let dir = crate::model::source::tests::scratch("hub-path");
        let hub = settings(&dir.path);
        let text = dir.path.to_str().unwrap();
        assert_eq!(resolve(text, &hub, no_download).unwrap(), Located::Path(dir.path.clone()));
        assert!(resolve("builtin:other", &hub, no_download).is_err());
        let error = resolve("missing/model.gguf", &hub, no_download).unwrap_err().to_string();
        assert!(error.starts_with("no model at \"missing/model.gguf\""), "{error}");
    }
}
