//! Connections that break, servers that lie or refuse, disks that are full.

use std::fs;
use std::sync::atomic::{AtomicUsize, Ordering};

use engine::model::hub::{HubSettings, Located};
use engine::{ErrorKind, ModelSource};

use super::support::{Cache, find, refused, tiny};
use crate::stand_in::{Asked, End, Reply, SHA, StandIn};

const WEIGHTS: &str = "model.safetensors";

/// A hub whose answers with weights are changed by `change`, given how many there were before.
fn hub(change: impl Fn(usize, &Asked, Reply) -> Reply + Send + Sync + 'static) -> StandIn {
    let (files, number) = (tiny(), AtomicUsize::new(0));
    StandIn::start(move |asked| {
        let reply = files.answer(asked);
        if asked.method != "GET" || !asked.path.ends_with(WEIGHTS) {
            return reply;
        }
        change(number.fetch_add(1, Ordering::Relaxed), asked, reply)
    })
}

/// The ranges that were asked of the weights.
fn ranges(hub: &StandIn) -> Vec<Option<String>> {
    let asked = hub.take();
    let weights = asked.iter().filter(|a| a.method == "GET" && a.path.ends_with(WEIGHTS));
    weights.map(|a| a.header("range").map(str::to_owned)).collect()
}

#[test]
fn a_dropped_connection_is_resumed() {
    let hub = hub(|number, _, reply| match number {
        0 => Reply { end: End::Closed(100_000), ..reply },
        1 => Reply { end: End::Closed(50_000), ..reply },
        _ => reply,
    });
    let cache = Cache::new();
    let (found, retries) = find("org/tiny", &cache.settings(&hub.url));
    assert_eq!(found.unwrap(), Located::Path(cache.snapshot()));
    assert_eq!(retries.len(), 2, "{retries:?}");
    assert!(retries[0].contains("after 100000 of 327504 bytes"), "{retries:?}");
    let resumed = ["bytes=100000-", "bytes=150000-"].map(|range| Some(range.to_owned()));
    assert_eq!(ranges(&hub), [&[None], resumed.as_slice()].concat());
    ModelSource::open(&cache.snapshot()).unwrap();
}

#[test]
fn a_silent_connection_is_given_up_and_resumed() {
    let hub = hub(|number, _, reply| match number {
        0 => Reply { end: End::Silent(1000), ..reply },
        _ => reply,
    });
    let cache = Cache::new();
    let (found, retries) = find("org/tiny", &cache.settings(&hub.url));
    assert_eq!(found.unwrap(), Located::Path(cache.snapshot()));
    assert_eq!(retries.len(), 1, "{retries:?}");
    assert_eq!(ranges(&hub), [None, Some("bytes=1000-".to_owned())]);
}

#[test]
fn a_server_without_ranges_begins_anew() {
    let whole = tiny();
    let hub = hub(move |number, asked, reply| match number {
        0 => Reply { end: End::Closed(1000), ..reply },
        _ => {
            let bytes = whole.answer(&asked.without_range()).body;
            Reply::body(bytes)
        }
    });
    let cache = Cache::new();
    assert_eq!(
        find("org/tiny", &cache.settings(&hub.url)).0.unwrap(),
        Located::Path(cache.snapshot())
    );
    ModelSource::open(&cache.snapshot()).unwrap();
}

#[test]
fn a_later_run_goes_on_where_an_earlier_one_ended() {
    let hub = hub(|number, _, reply| match number {
        0..=2 => Reply { end: End::Closed(1000), ..reply },
        _ => reply,
    });
    let cache = Cache::new();
    let settings = cache.settings(&hub.url);
    let message = refused("org/tiny", &settings);
    assert!(message.contains("after 3000 of 327504 bytes"), "{message}");
    assert!(message.ends_with("tried 3 times"), "{message}");
    assert!(!cache.folder().join("refs/main").exists());
    assert!(!cache.snapshot().join(WEIGHTS).exists());
    hub.take();
    assert_eq!(find("org/tiny", &settings).0.unwrap(), Located::Path(cache.snapshot()));
    assert_eq!(ranges(&hub), [Some("bytes=3000-".to_owned())]);
    ModelSource::open(&cache.snapshot()).unwrap();
}

#[test]
fn damaged_and_wrongly_sized_files_are_refused() {
    let damaged = hub(|_, _, mut reply| {
        reply.body[200_000] ^= 1;
        reply
    });
    let short = hub(|_, _, mut reply| {
        reply.body.truncate(1000);
        reply
    });
    // Without a length the end of the connection is the end of the body.
    let long = hub(|_, _, mut reply| {
        reply.body.extend([0; 4096]);
        reply.header("content-length", "")
    });
    let cases = [
        (damaged, "model.safetensors: damaged on the way, sha256 is"),
        (short, "1000 bytes, announced were 327504"),
        (long, "model.safetensors: more than the 327504 bytes announced"),
    ];
    for (hub, part) in cases {
        let cache = Cache::new();
        let settings = cache.settings(&hub.url);
        let (found, retries) = find("org/tiny", &settings);
        let error = found.unwrap_err();
        assert!(matches!(error.kind(), ErrorKind::Network(_)), "{error:?}");
        assert!(error.to_string().contains(part), "no {part:?}: {error}");
        assert_eq!(retries, Vec::<String>::new());
        assert!(!cache.folder().join("refs/main").exists());
        assert!(!cache.snapshot().join(WEIGHTS).exists());
        let blobs = cache.blobs();
        let (partial, whole): (Vec<_>, Vec<_>) =
            blobs.iter().partition(|name| name.ends_with(".incomplete"));
        assert_eq!(whole.len(), 3, "{part}");
        for name in partial {
            let left = cache.folder().join("blobs").join(name);
            assert_eq!(fs::metadata(left).unwrap().len(), 0, "{part}");
        }
    }
}

#[test]
fn refusals_say_what_to_do() {
    let cache = Cache::new();
    let says = |status: u16, token: Option<&str>| {
        let hub = StandIn::start(move |_| Reply::status(status));
        let settings = HubSettings { token: token.map(str::to_owned), ..cache.settings(&hub.url) };
        let message = refused("org/tiny", &settings);
        assert_eq!(hub.take().len(), 1, "{message}");
        assert!(message.starts_with("no path org/tiny, and http://127.0.0.1:"), "{message}");
        message
    };
    let message = says(401, None);
    assert!(message.contains("status 401, the model is gated, private or not there"), "{message}");
    assert!(message.contains("set HF_TOKEN"), "{message}");
    let message = says(403, Some("secret"));
    assert!(message.contains("the token in HF_TOKEN may not read it"), "{message}");
    assert!(!message.contains("secret"), "{message}");
    assert!(says(404, None).contains("status 404, no such model or file"));
    cache.assert_nothing_is_whole();
}

#[test]
fn a_busy_hub_is_asked_again_but_not_for_ever() {
    let (files, number) = (tiny(), AtomicUsize::new(0));
    let hub = StandIn::start(move |asked| match number.fetch_add(1, Ordering::Relaxed) {
        0 => Reply::status(429).header("retry-after", "0"),
        1 => Reply::status(503),
        _ => files.answer(asked),
    });
    let cache = Cache::new();
    let (found, retries) = find("org/tiny", &cache.settings(&hub.url));
    assert_eq!(found.unwrap(), Located::Path(cache.snapshot()));
    let ends: Vec<&str> = retries.iter().map(|why| &why[why.len() - 10..]).collect();
    assert_eq!(ends, ["status 429", "status 503"]);

    let hub = StandIn::start(|_| Reply::status(500));
    let cache = Cache::new();
    let message = refused("org/tiny", &cache.settings(&hub.url));
    assert!(message.ends_with("status 500, tried 3 times"), "{message}");
    assert_eq!(hub.take().len(), 3);
}

#[test]
fn offline_asks_nobody() {
    let (cache, hub) = (Cache::new(), StandIn::of(tiny()));
    let settings = HubSettings { offline: true, ..cache.settings(&hub.url) };
    let message = refused("org/tiny", &settings);
    assert!(message.contains("the hub is offline"), "{message}");
    assert_eq!(hub.take().len(), 0);
}

#[test]
fn addresses_that_do_not_work_are_named() {
    let cache = Cache::new();
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (found, retries) = find("org/tiny", &cache.settings(&format!("http://{closed}")));
    let message = found.unwrap_err().to_string();
    assert!(message.starts_with(&format!("http://{closed}: ")), "{message}");
    assert_eq!(retries, Vec::<String>::new());
    // No resolver asks anybody about an empty label.
    let (found, retries) = find("org/tiny", &cache.settings("http://a..b"));
    assert_eq!(found.unwrap_err().to_string(), "http://a..b: unknown host");
    assert_eq!(retries, Vec::<String>::new());
    let message = refused("org/tiny", &cache.settings("hub.example"));
    assert!(message.contains("HF_ENDPOINT"), "{message}");
    let hub = StandIn::start(|_| Reply::body("<html>"));
    let message = refused("org/tiny", &cache.settings(&hub.url));
    assert!(message.contains("not the answer of a hub"), "{message}");
    let hub = StandIn::start(|asked| Reply::status(302).header("location", &asked.path));
    let message = refused("org/tiny", &cache.settings(&hub.url));
    assert!(message.contains("more than 8 redirects"), "{message}");
}

#[test]
fn hostile_names_stay_out_of_the_cache() {
    let cache = Cache::new();
    let hub = StandIn::start(|_| Reply::body(r#"{"sha": "../../x", "siblings": []}"#));
    let message = refused("org/tiny", &cache.settings(&hub.url));
    assert!(message.contains("\"../../x\" is not a revision"), "{message}");
    let files = tiny();
    let hub = StandIn::start(move |asked| files.answer(asked).header("etag", "\"../../../x\""));
    let message = refused("org/tiny", &cache.settings(&hub.url));
    assert!(message.contains("without etag or size"), "{message}");
    assert_eq!(fs::read_dir(&cache.0).unwrap().count(), 0);
}

#[test]
#[cfg(target_os = "linux")]
fn a_full_disk_is_said_with_the_file() {
    let (cache, hub) = (Cache::new(), StandIn::of(tiny()));
    let asked = Asked::get(&format!("/org/tiny/resolve/{SHA}/config.json"));
    let blob = cache.blob("config.json", &tiny().answer(&asked).body);
    fs::create_dir_all(blob.parent().unwrap()).unwrap();
    let partial = blob.with_extension("incomplete");
    std::os::unix::fs::symlink("/dev/full", &partial).unwrap();
    let message = refused("org/tiny", &cache.settings(&hub.url));
    assert!(message.ends_with("disk full after 0 of 715 bytes of config.json"), "{message}");
    cache.assert_nothing_is_whole();
}
