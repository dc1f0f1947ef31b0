//! Settings, ids, and what a cache of Hugging Face's tools holds.

use super::*;

const INDEX: &str = r#"{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}"#;

fn settings(cache: &Path) -> HubSettings {
    let (endpoint, token) = ("http://hub".to_owned(), Some("secret".to_owned()));
    let proxy = Some("http://me:secret@proxy".to_owned());
    let cache = cache.to_owned();
    HubSettings { cache, endpoint, token, offline: false, proxy, no_proxy: None }
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
    let id = HubId::parse("Qwen/Qwen2.5-0.5B").unwrap();
    assert_eq!((id.as_str(), id.file()), ("Qwen/Qwen2.5-0.5B", None));
    let id = HubId::parse("a/b:c/d.gguf").unwrap();
    assert_eq!((id.to_string().as_str(), id.file()), ("a/b:c/d.gguf", Some("c/d.gguf")));
    let names = ["gpt2", "../x", "a/b/c", "a/", "/a", "a/..", "a b/c", "./dir"];
    for bad in names.into_iter().chain(["a/b:", "a/b:c.bin", "a/b:../c.gguf", "a/b:/c.gguf"]) {
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
    let snapshot = folder.join("snapshots/abc123");
    let part = resolve("org/name", &offline, no_download).unwrap();
    assert_eq!(part, Located::Path(snapshot.clone()));
    assert!(resolve("org/name", &hub, no_download).is_err(), "nothing is in it");
    let write = |name: &str, text: &str| std::fs::write(snapshot.join(name), text).unwrap();
    write("config.json", "{}");
    write("tokenizer.json", "{}");
    write("model.safetensors.index.json", INDEX);
    write("1.safetensors", "");
    assert!(resolve("org/name", &hub, no_download).is_err(), "a shard is missing");
    write("2.safetensors", "");
    let found = resolve("org/name", &hub, no_download).unwrap();
    assert_eq!(found, Located::Path(snapshot.clone()));
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

#[test]
fn gguf_files_of_the_cache_are_opened_by_name_or_alone() {
    let cache = crate::model::source::tests::scratch("hub-gguf");
    let hub = settings(&cache.path);
    let folder = cache.path.join("models--org--name");
    let snapshot = folder.join("snapshots/abc123");
    std::fs::create_dir_all(folder.join("refs")).unwrap();
    std::fs::create_dir_all(&snapshot).unwrap();
    std::fs::write(folder.join("refs/main"), "abc123").unwrap();
    let find = |id| resolve(id, &hub, no_download).ok();
    std::fs::write(snapshot.join("a-00001-of-00002.gguf"), "").unwrap();
    assert_eq!(find("org/name"), None, "the second part is missing");
    std::fs::write(snapshot.join("a-00002-of-00002.gguf"), "").unwrap();
    let first = Some(Located::Path(snapshot.join("a-00001-of-00002.gguf")));
    assert_eq!(find("org/name"), first);
    assert_eq!(find("org/name:a-00001-of-00002.gguf"), first);
    assert_eq!(find("org/name:b.gguf"), None);
    // The repository may hold more; it is asked, and where nobody answers this is all there is.
    let asked = |answer: fn() -> Result<PathBuf>| resolve("org/name", &hub, |_, _| answer());
    assert_eq!(asked(|| Ok("other".into())).ok(), Some(Located::Path("other".into())));
    assert_eq!(asked(|| Err(Error::network("refused"))).ok(), first);
    assert!(asked(|| Err(Error::model("no such repository"))).is_err());
    std::fs::write(snapshot.join("b.gguf"), "").unwrap();
    assert_eq!(find("org/name:b.gguf"), Some(Located::Path(snapshot.join("b.gguf"))));
    assert_eq!(find("org/name"), None, "there are two");
}

#[test]
fn later_parts_are_told_by_their_numbers() {
    let later = ["x-00002-of-00003.gguf", "q/a-of-b-00010-of-00010.gguf"];
    let first =
        ["x-00001-of-00003.gguf", "jack-of-all-trades.gguf", "2-of-3.gguf", "x-00002-of-00003"];
    assert!(later.iter().all(|name| is_later_part(name)));
    assert!(!first.iter().any(|name| is_later_part(name)));
}
