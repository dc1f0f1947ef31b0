//! Engines over the golden tiny models, and the events of a request put together.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, channel};

use engine::{
    Engine, EngineConfig, EosRule, ErrorKind, Event, Finished, Level, ModelSource, Request,
    RequestId, SamplingParams, Sent, Sink, Token,
};

/// The golden models with random weights and a vocabulary of 512.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Model {
    /// Tied head.
    Llama,
    /// Biases, tied head.
    Qwen2,
    /// Norms of queries and keys, a head of its own.
    Qwen3,
}

fn data() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data")
}

fn folder(model: Model) -> PathBuf {
    data().join("golden/models").join(match model {
        Model::Llama => "tiny-llama",
        Model::Qwen2 => "tiny-qwen2",
        Model::Qwen3 => "tiny-qwen3",
    })
}

/// A sink that hands every event on, and the other end of it.
pub(crate) fn sink() -> (Sink, Receiver<Event>) {
    let (sender, receiver) = channel();
    let sink = move |event| match sender.send(event) {
        Ok(()) => Sent::Ok,
        Err(_) => Sent::Gone,
    };
    (Box::new(sink), receiver)
}

/// An engine without a tokenizer, small, with a context of 256.
pub(crate) fn load(model: Model, change: impl FnOnce(&mut EngineConfig)) -> Engine {
    open(&folder(model), change)
}

/// The tiny Llama with a tokenizer of bytes: token `b + 3` is the byte `b`.
pub(crate) fn load_with_text(change: impl FnOnce(&mut EngineConfig)) -> Engine {
    let folder = TempFolder::new();
    for name in ["config.json", "generation_config.json", "model.safetensors"] {
        std::fs::copy(self::folder(Model::Llama).join(name), folder.0.join(name)).unwrap();
    }
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        std::fs::copy(data().join("tiny-text").join(name), folder.0.join(name)).unwrap();
    }
    open(&folder.0, change)
}

fn open(path: &Path, change: impl FnOnce(&mut EngineConfig)) -> Engine {
    let mut config = EngineConfig {
        max_model_len: Some(256),
        kv_cache_memory_bytes: Some(4 << 20),
        threads: Some(1),
        level: std::env::var("ENGINE_CPU").ok().and_then(|name| Level::parse(&name)),
        ..EngineConfig::default()
    };
    change(&mut config);
    Engine::load(&ModelSource::open(path).unwrap(), &config).unwrap()
}

/// A folder that is removed again.
struct TempFolder(PathBuf);

impl TempFolder {
    fn new() -> Self {
        use std::sync::atomic::{AtomicUsize, Ordering};
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("engine-doors-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir(&path).unwrap();
        Self(path)
    }
}

impl Drop for TempFolder {
    fn drop(&mut self) {
        // Left behind, it is in the way of nobody.
        let _left = std::fs::remove_dir_all(&self.0);
    }
}

/// `len` tokens that depend on `seed` only, none of them special.
pub(crate) fn prompt(seed: u64, len: usize) -> Vec<u32> {
    (0..len as u64).map(|i| 3 + (engine::random::hash(&[seed, i]) % 256) as u32).collect()
}

/// The most likely tokens, `max` of them.
pub(crate) fn greedy(max: usize) -> SamplingParams {
    SamplingParams { temperature: 0.0, ..sampled(max) }
}

/// Draws of a fixed seed, `max` of them.
pub(crate) fn sampled(max: usize) -> SamplingParams {
    SamplingParams {
        max_tokens: Some(max),
        eos: EosRule::Ignore,
        seed: Some(17),
        ..SamplingParams::default()
    }
}

/// One sample, put together from its events.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Answer {
    pub(crate) tokens: Vec<Token>,
    pub(crate) finished: Finished,
}

impl Answer {
    /// The ids of its tokens.
    pub(crate) fn tokens(&self) -> Vec<u32> {
        self.tokens.iter().map(|token| token.token).collect()
    }

    /// What a reader has seen at the end.
    pub(crate) fn text(&self) -> String {
        let shown: String = self.tokens.iter().map(|token| token.text.as_str()).collect();
        shown + &self.finished.text
    }
}

/// Answers by request and sample.
pub(crate) type Answers = BTreeMap<(RequestId, usize), Answer>;

/// Puts events together; nothing may follow an end, and every sample must have one.
pub(crate) fn collect(events: impl IntoIterator<Item = Event>) -> Answers {
    let mut open: BTreeMap<(RequestId, usize), Vec<Token>> = BTreeMap::new();
    let mut answers = Answers::new();
    for event in events {
        match event {
            Event::Token(token) => {
                let key = (token.request, token.sample);
                assert!(!answers.contains_key(&key), "a token after the end: {token:?}");
                open.entry(key).or_default().push(token);
            }
            Event::Finished(finished) => {
                let key = (finished.request, finished.sample);
                let tokens = open.remove(&key).unwrap_or_default();
                let twice = answers.insert(key, Answer { tokens, finished });
                assert_eq!(twice, None, "a sample ended twice");
            }
        }
    }
    assert!(open.is_empty(), "samples without an end: {:?}", open.keys());
    answers
}

/// Runs the engine until nothing is left to do.
pub(crate) fn drain(engine: &mut Engine) -> Answers {
    let mut events = Vec::new();
    while engine.has_work() {
        events.extend(engine.step().unwrap());
    }
    collect(events)
}

/// Runs the engine until nothing is left to do, by steps that contain panics.
pub(crate) fn drain_contained(engine: &mut Engine) -> Answers {
    let mut events = Vec::new();
    while engine.has_work() {
        events.extend(engine.step_contained().unwrap());
    }
    collect(events)
}

/// Runs one request of one sample alone.
pub(crate) fn answer(engine: &mut Engine, prompt: &[u32], params: &SamplingParams) -> Answer {
    let id = engine.add(Request::new(prompt.to_vec(), params.clone())).unwrap();
    drain(engine).remove(&(id, 0)).unwrap()
}

/// The message of an error that blames the request.
pub(crate) fn request_error<T>(result: engine::Result<T>) -> String {
    let error = result.err().expect("a bad request is refused");
    assert!(matches!(error.kind(), ErrorKind::Request(_)), "{error:?}");
    error.to_string()
}
