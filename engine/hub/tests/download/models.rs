//! Whole downloads, and the layout they leave.

use std::fs;
use std::path::PathBuf;
use std::thread;

use engine::ModelSource;
use engine::model::hub::{HubSettings, Located};
use hub::{Event, Patience, download};

use super::support::{Cache, find, refused, tiny};
use crate::stand_in::{Reply, Repository, SHA, StandIn, etag};

#[test]
fn a_model_is_downloaded_once_into_the_layout_of_the_hub_tools() {
    let (cache, hub) = (Cache::new(), StandIn::of(tiny()));
    let settings = cache.settings(&hub.url);
    let (found, retries) = find("org/tiny", &settings);
    assert_eq!(found.unwrap(), Located::Path(cache.snapshot()));
    assert_eq!(retries, Vec::<String>::new());
    let mut lines = vec!["GET /api/models/org/tiny/revision/main".to_owned()];
    for name in ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"] {
        lines.push(format!("HEAD /org/tiny/resolve/{SHA}/{name}"));
        lines.push(format!("GET /org/tiny/resolve/{SHA}/{name}"));
    }
    assert_eq!(hub.lines(), lines);

    let weights = cache.snapshot().join("model.safetensors");
    let data = fs::read(&weights).unwrap();
    let target = PathBuf::from(format!("../../blobs/{}", etag("model.safetensors", &data)));
    assert_eq!(fs::read_link(&weights).unwrap(), target);
    assert_eq!(fs::read_to_string(cache.folder().join("refs/main")).unwrap(), SHA);
    let mut there: Vec<_> =
        fs::read_dir(cache.folder()).unwrap().map(|e| e.unwrap().file_name()).collect();
    there.sort();
    assert_eq!(there, ["blobs", "refs", "snapshots"]);
    assert_eq!(cache.blobs().len(), 4);
    let model = ModelSource::open(&cache.snapshot()).unwrap();
    assert_eq!((model.config().vocab_size, model.config().layers), (512, 3));

    assert_eq!(find("org/tiny", &settings).0.unwrap(), Located::Path(cache.snapshot()));
    let offline = HubSettings { offline: true, ..settings };
    assert_eq!(find("org/tiny", &offline).0.unwrap(), Located::Path(cache.snapshot()));
    assert_eq!(hub.lines(), Vec::<String>::new());
}

#[test]
fn only_what_is_missing_is_fetched() {
    let (cache, hub) = (Cache::new(), StandIn::of(tiny()));
    let settings = cache.settings(&hub.url);
    find("org/tiny", &settings).0.unwrap();
    hub.take();
    fs::remove_file(cache.snapshot().join("tokenizer.json")).unwrap();
    fs::remove_file(cache.snapshot().join("model.safetensors").canonicalize().unwrap()).unwrap();
    assert_eq!(find("org/tiny", &settings).0.unwrap(), Located::Path(cache.snapshot()));
    let gets: Vec<String> =
        hub.lines().into_iter().filter(|line| line.starts_with("GET /org")).collect();
    assert_eq!(gets, [format!("GET /org/tiny/resolve/{SHA}/model.safetensors")]);
    ModelSource::open(&cache.snapshot()).unwrap();
}

#[test]
fn the_shards_of_an_index_are_fetched() {
    let index = r#"{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}"#;
    let files = |shard| {
        [
            ("config.json", b"{}".to_vec()),
            ("tokenizer.json", b"{}".to_vec()),
            ("model.safetensors.index.json", index.into()),
            ("one.safetensors", b"1".to_vec()),
            (shard, b"2".to_vec()),
        ]
    };
    let (cache, hub) = (Cache::new(), StandIn::of(Repository::new(files("two.safetensors"))));
    let settings = cache.settings(&hub.url);
    assert_eq!(find("org/tiny", &settings).0.unwrap(), Located::Path(cache.snapshot()));
    assert_eq!(fs::read(cache.snapshot().join("two.safetensors")).unwrap(), b"2");
    hub.take();
    find("org/tiny", &settings).0.unwrap();
    assert_eq!(hub.lines(), Vec::<String>::new());

    let (cache, hub) = (Cache::new(), StandIn::of(Repository::new(files("three.safetensors"))));
    let message = refused("org/tiny", &cache.settings(&hub.url));
    assert!(message.contains("\"two.safetensors\" is not in the repository"), "{message}");
    assert!(!cache.folder().join("refs/main").exists());
}

#[test]
fn a_gguf_file_is_chosen_by_name() {
    let files = [("a.gguf", b"A".to_vec()), ("q/b.gguf", b"B".to_vec())];
    let (cache, hub) = (Cache::new(), StandIn::of(Repository::new(files)));
    let settings = cache.settings(&hub.url);
    let message = refused("org/tiny", &settings);
    assert!(message.contains("name one, for example org/tiny:a.gguf"), "{message}");
    let path = cache.snapshot().join("q/b.gguf");
    assert_eq!(find("org/tiny:q/b.gguf", &settings).0.unwrap(), Located::Path(path.clone()));
    assert_eq!(fs::read(path).unwrap(), b"B");
    hub.take();
    find("org/tiny:q/b.gguf", &settings).0.unwrap();
    assert_eq!(hub.lines(), Vec::<String>::new());
}

#[test]
fn one_gguf_file_in_the_cache_is_not_taken_for_the_model() {
    let (cache, hub) = (Cache::new(), StandIn::of(tiny().with("a.gguf", b"A")));
    let settings = cache.settings(&hub.url);
    let file = Located::Path(cache.snapshot().join("a.gguf"));
    assert_eq!(find("org/tiny:a.gguf", &settings).0.unwrap(), file);
    let offline = HubSettings { offline: true, ..settings.clone() };
    assert_eq!(find("org/tiny", &offline).0.unwrap(), file, "it is all there is to find");
    assert_eq!(find("org/tiny", &settings).0.unwrap(), Located::Path(cache.snapshot()));
    assert_eq!(find("org/tiny", &offline).0.unwrap(), Located::Path(cache.snapshot()));
}

#[test]
fn the_only_gguf_file_needs_no_network_once_it_is_there() {
    let hub = StandIn::of(Repository::new([("a.gguf", b"A".to_vec())]));
    let cache = Cache::new();
    let settings = cache.settings(&hub.url);
    let file = Located::Path(cache.snapshot().join("a.gguf"));
    assert_eq!(find("org/tiny:a.gguf", &settings).0.unwrap(), file);
    assert_eq!(find("org/tiny", &settings).0.unwrap(), file, "the hub says that it is alone");
    hub.take();
    assert_eq!(find("org/tiny", &settings).0.unwrap(), file);
    assert_eq!(hub.lines(), Vec::<String>::new());
}

#[test]
fn the_token_goes_to_the_hub_and_not_to_the_store_it_redirects_to() {
    let store = StandIn::of(tiny());
    let (to, files) = (store.url.clone(), tiny());
    let hub = StandIn::start(move |asked| {
        let there = files.answer(asked);
        if !asked.path.ends_with(".safetensors") {
            return there;
        }
        let tag = there.headers.iter().find(|(name, _)| *name == "etag").unwrap().1.clone();
        Reply::status(302)
            .header("location", format!("{to}{}?signature=s", asked.path))
            .header("x-linked-etag", tag)
            .header("x-linked-size", there.body.len())
            .header("etag", "\"of-the-redirect\"")
    });
    let cache = Cache::new();
    let settings = HubSettings { token: Some("secret".into()), ..cache.settings(&hub.url) };
    assert_eq!(find("org/tiny", &settings).0.unwrap(), Located::Path(cache.snapshot()));
    ModelSource::open(&cache.snapshot()).unwrap();
    assert!(hub.take().iter().all(|a| a.header("authorization") == Some("Bearer secret")));
    let asked = store.take();
    assert_eq!(asked.len(), 1);
    assert_eq!((asked[0].method.as_str(), asked[0].header("authorization")), ("GET", None));
    assert!(asked[0].path.ends_with("/model.safetensors?signature=s"), "{}", asked[0].path);
}

#[test]
fn a_signature_is_not_shown() {
    let store = StandIn::start(|_| Reply::status(404));
    let to = store.url.clone();
    let hub = StandIn::start(move |asked| {
        Reply::status(302).header("location", format!("{to}{}?signature=s", asked.path))
    });
    let cache = Cache::new();
    let message = refused("org/tiny", &cache.settings(&hub.url));
    assert!(message.contains(&store.url) && message.contains("status 404"), "{message}");
    assert!(!message.contains("signature"), "{message}");
}

#[test]
fn redirects_inside_the_hub_keep_the_token() {
    let files = tiny();
    let hub = StandIn::start(move |asked| {
        if let Some(path) = asked.path.strip_prefix("/cache") {
            let mut asked = asked.clone();
            asked.path = path.to_owned();
            return files.answer(&asked);
        }
        Reply::status(307).header("location", format!("/cache{}", asked.path))
    });
    let cache = Cache::new();
    let settings = HubSettings { token: Some("secret".into()), ..cache.settings(&hub.url) };
    assert_eq!(find("org/tiny", &settings).0.unwrap(), Located::Path(cache.snapshot()));
    ModelSource::open(&cache.snapshot()).unwrap();
    let asked = hub.take();
    assert_eq!(asked.len(), 18);
    assert!(asked.iter().all(|a| a.header("authorization") == Some("Bearer secret")));
}

#[test]
fn several_downloads_at_once_fetch_every_file_once() {
    let (cache, hub) = (Cache::new(), StandIn::of(tiny()));
    let settings = cache.settings(&hub.url);
    let id = engine::model::hub::HubId::parse("org/tiny").unwrap();
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let found = download(&id, &settings, &Patience::default(), &mut |_| {});
                assert_eq!(found.unwrap(), cache.snapshot());
            });
        }
    });
    ModelSource::open(&cache.snapshot()).unwrap();
    let gets = hub.lines().into_iter().filter(|line| line.starts_with("GET /org")).count();
    assert_eq!((gets, cache.blobs().len()), (4, 4));
}

#[test]
fn progress_ends_with_every_file_whole() {
    let (cache, hub) = (Cache::new(), StandIn::of(tiny()));
    let id = engine::model::hub::HubId::parse("org/tiny").unwrap();
    let mut told = Vec::new();
    let mut tell = |event: Event<'_>| match event {
        Event::Progress { file, done_bytes, total_bytes } => {
            told.push((file.to_owned(), done_bytes, total_bytes));
        }
        other => panic!("{other:?}"),
    };
    download(&id, &cache.settings(&hub.url), &Patience::default(), &mut tell).unwrap();
    let weights: Vec<_> = told.iter().filter(|(name, ..)| name == "model.safetensors").collect();
    assert_eq!(weights.first().unwrap().1, 0);
    assert_eq!(weights.last().unwrap().1, 327_504);
    assert!(weights.iter().all(|(_, done, total)| done <= total && *total == 327_504));
}
