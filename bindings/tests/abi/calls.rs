//! The entry points called from Rust: answers equal the engine's own, mistakes have their statuses.

use std::ffi::{CStr, c_void};
use std::path::Path;
use std::ptr::{null, null_mut};

use engine::{
    Dtype, Engine, EngineConfig, EosRule, Event, KvDtype, ModelSource, Request, SamplingParams,
};
use engine_c::*;

use crate::{bare_model, text_model};

const PROMPT: [i32; 4] = [5, 17, 300, 42];
const MAX_TOKENS: usize = 10;
const SEED: u64 = 11;

fn last_error() -> String {
    // SAFETY: NULL asks for no length.
    let message = unsafe { engine_last_error(null_mut()) };
    // SAFETY: ends in a NUL; no other call has been made on this thread since.
    unsafe { CStr::from_ptr(message) }.to_str().unwrap().to_owned()
}

fn config() -> Config {
    Config {
        dtype: 1,
        max_model_len: 96,
        max_num_seqs: 4,
        threads: 2,
        kv_cache_memory_bytes: 8 << 20,
        ..Config::default()
    }
}

fn try_open(path: &Path, config: &Config) -> (Status, *mut Handle) {
    let (path, mut handle) = (path.to_str().unwrap(), std::ptr::dangling_mut());
    // SAFETY: all are locals of the sizes given.
    let status = unsafe { engine_open(path.as_ptr().cast(), path.len(), config, &mut handle) };
    (status, handle)
}

fn open(path: &Path) -> *mut Handle {
    let (status, handle) = try_open(path, &config());
    assert_eq!(status, ENGINE_OK, "{}", last_error());
    handle
}

fn sampling() -> Sampling {
    Sampling {
        max_tokens: MAX_TOKENS as u32,
        temperature: 0.8,
        eos_rule: 1,
        seed_rule: 1,
        seed: SEED,
        ..Sampling::default()
    }
}

/// Ids and the bits of their log-probabilities.
type Answer = Vec<(i32, u32)>;

fn generate(handle: *const Handle, sampling: &Sampling) -> (Status, Answer) {
    let (mut tokens, mut logprobs) = ([0; MAX_TOKENS], [0.0f32; MAX_TOKENS]);
    let mut output = Output {
        tokens: tokens.as_mut_ptr(),
        logprobs: logprobs.as_mut_ptr(),
        capacity: MAX_TOKENS,
        ..Output::default()
    };
    // SAFETY: all are locals of the sizes given.
    let status =
        unsafe { engine_generate(handle, PROMPT.as_ptr(), PROMPT.len(), sampling, &mut output) };
    let answer = tokens.into_iter().zip(logprobs.map(f32::to_bits)).take(output.count);
    (status, answer.collect())
}

/// The same without the ABI.
fn expected() -> Answer {
    expected_with(None)
}

/// The same with keys and values in this format.
fn expected_with(kv_dtype: Option<KvDtype>) -> Answer {
    let config = EngineConfig {
        max_model_len: Some(96),
        max_num_seqs: 4,
        threads: Some(1),
        kv_cache_memory_bytes: Some(8 << 20),
        dtype: Some(Dtype::F32),
        kv_dtype,
        ..EngineConfig::default()
    };
    let mut engine = Engine::load(&ModelSource::open(&bare_model()).unwrap(), &config).unwrap();
    let params = SamplingParams {
        max_tokens: Some(MAX_TOKENS),
        temperature: 0.8,
        eos: EosRule::Ignore,
        seed: Some(SEED),
        ..SamplingParams::default()
    };
    engine.add(Request::new(PROMPT.map(i32::cast_unsigned).to_vec(), params)).unwrap();
    let mut answer = Vec::new();
    while engine.has_work() {
        for event in engine.step().unwrap() {
            if let Event::Token(token) = event {
                answer.push((token.token.cast_signed(), token.logprob.to_bits()));
            }
        }
    }
    answer
}

#[test]
fn answers_are_the_engines_own_bit_for_bit_alone_and_from_many_threads() {
    let expected = expected();
    assert_eq!(expected.len(), MAX_TOKENS);
    let handle = open(&bare_model());
    assert_eq!((engine_vocab_size(handle), engine_max_model_len(handle)), (512, 96));
    assert_eq!(generate(handle, &sampling()), (ENGINE_OK, expected.clone()));
    let name = handle.addr();
    let ask = || generate(std::ptr::without_provenance(name), &sampling());
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..6).map(|_| scope.spawn(ask)).collect();
        for thread in threads {
            assert_eq!(thread.join().unwrap(), (ENGINE_OK, expected.clone()));
        }
    });
    assert_eq!(engine_free(handle), ENGINE_OK);
}

#[test]
fn the_format_of_keys_and_values_is_the_one_asked_for() {
    let expected = expected_with(Some(KvDtype::Int8));
    assert_ne!(expected, self::expected());
    for speculation in [0, 1] {
        let config = Config { kv_cache_dtype: 1, speculation, ..config() };
        let (status, handle) = try_open(&bare_model(), &config);
        assert_eq!(status, ENGINE_OK);
        assert_eq!(generate(handle, &sampling()), (ENGINE_OK, expected.clone()));
        assert_eq!(engine_free(handle), ENGINE_OK);
    }
}

/// What a callback meddles with and has seen.
struct Meddler {
    engine: usize,
    seen: Answer,
    inner: Option<Answer>,
    freed: Option<Status>,
}

/// At its first token, generates on the engine it is called for, then closes it.
unsafe extern "C" fn meddle(user_data: *mut c_void, token: *const Token) -> i32 {
    // SAFETY: the test's own, which nobody else holds during the call.
    let meddler = unsafe { &mut *user_data.cast::<Meddler>() };
    // SAFETY: lives as long as this call.
    let token = unsafe { &*token };
    meddler.seen.push((token.id, token.logprob.to_bits()));
    if meddler.freed.is_none() {
        let handle = std::ptr::without_provenance_mut(meddler.engine);
        meddler.inner = Some(generate(handle, &sampling()).1);
        meddler.freed = Some(engine_free(handle));
    }
    1
}

#[test]
fn a_callback_may_use_and_close_its_engine() {
    let handle = open(&bare_model());
    let mut meddler = Meddler { engine: handle.addr(), seen: vec![], inner: None, freed: None };
    let mut output = Output {
        on_token: Some(meddle),
        user_data: (&raw mut meddler).cast(),
        ..Output::default()
    };
    // SAFETY: all are locals of the sizes given.
    let status =
        unsafe { engine_generate(handle, PROMPT.as_ptr(), PROMPT.len(), &sampling(), &mut output) };
    assert_eq!((status, output.finish_reason, output.count), (ENGINE_OK, 2, MAX_TOKENS));
    assert_eq!((&meddler.seen, meddler.inner), (&expected(), Some(expected())));
    assert_eq!(meddler.freed, Some(ENGINE_OK));
    assert_eq!(engine_free(handle), ENGINE_ERR_HANDLE);
    assert_eq!(generate(handle, &sampling()), (ENGINE_ERR_HANDLE, vec![]));
}

#[test]
fn mistakes_of_opening_have_their_statuses() {
    let set = |change: fn(&mut Config)| {
        let mut config = config();
        change(&mut config);
        config
    };
    let cases = [
        (set(|c| c.struct_size = 0), ENGINE_ERR_ARGUMENT, "engine_config.struct_size is 0"),
        (set(|c| c.dtype = 3), ENGINE_ERR_ARGUMENT, "dtype is 3, limit is 0 to 2"),
        (set(|c| c.prefix_cache = -1), ENGINE_ERR_ARGUMENT, "prefix_cache is -1, limit is 0 to 1"),
        (set(|c| c.quantization = 2), ENGINE_ERR_ARGUMENT, "quantization is 2, limit is 0 to 1"),
        (set(|c| c.kv_cache_dtype = 2), ENGINE_ERR_ARGUMENT, "kv_cache_dtype is 2, limit is 0"),
        (set(|c| c.speculation = 7), ENGINE_ERR_ARGUMENT, "speculation is 7, limit is 0 to 1"),
        (set(|c| c.max_num_seqs = 0), ENGINE_ERR_CONFIG, "max_num_seqs is 0, limit is 1 to 65536"),
        (set(|c| c.block_size = 24), ENGINE_ERR_CONFIG, "block_size is 24"),
    ];
    for (config, status, message) in cases {
        assert_eq!(try_open(&bare_model(), &config), (status, null_mut()), "{message}");
        assert!(last_error().starts_with(message), "{}", last_error());
    }
    for path in ["builtin:other", "no/such/model"] {
        assert_eq!(try_open(path.as_ref(), &config()), (ENGINE_ERR_MODEL, null_mut()), "{path}");
        assert!(last_error().contains(path), "{}", last_error());
    }
    let mut handle = null_mut();
    // SAFETY: the path has the length given, the rest is NULL or a local.
    let status = unsafe { engine_open(c"\xff".as_ptr(), 1, null(), &mut handle) };
    assert_eq!(status, ENGINE_ERR_ARGUMENT);
    // SAFETY: NULL is what is to be noticed.
    let status = unsafe { engine_open(null(), 1, null(), &mut handle) };
    assert_eq!((status, last_error().as_str()), (ENGINE_ERR_ARGUMENT, "path is NULL"));
    // SAFETY: as above.
    let status = unsafe { engine_open(null(), 0, null(), null_mut()) };
    assert_eq!((status, last_error().as_str()), (ENGINE_ERR_ARGUMENT, "out is NULL"));
}

#[test]
fn mistakes_of_asking_have_their_statuses() {
    let handle = open(&bare_model());
    let set = |change: fn(&mut Sampling)| {
        let mut sampling = sampling();
        change(&mut sampling);
        sampling
    };
    let cases = [
        (set(|s| s.temperature = f32::NAN), ENGINE_ERR_REQUEST, "temperature is NaN"),
        (set(|s| s.top_p = 0.0), ENGINE_ERR_REQUEST, "top_p is 0"),
        (set(|s| s.min_tokens = 99), ENGINE_ERR_REQUEST, "min_tokens is 99"),
        (set(|s| s.eos_rule = 9), ENGINE_ERR_ARGUMENT, "eos_rule is 9, limit is 0 to 1"),
        (set(|s| s.seed_rule = 2), ENGINE_ERR_ARGUMENT, "seed_rule is 2, limit is 0 to 1"),
        (set(|s| s.stop_token_count = 1), ENGINE_ERR_ARGUMENT, "stop_tokens is NULL"),
        (set(|s| s.max_tokens = 0), ENGINE_ERR_BUFFER, "buffer has room for 10 elements, 92"),
    ];
    for (sampling, status, message) in cases {
        assert_eq!(generate(handle, &sampling).0, status, "{message}");
        assert!(last_error().starts_with(message), "{}", last_error());
    }
    let mut count = 0;
    // SAFETY: the text has the length given, the rest is NULL or a local.
    let status = unsafe { engine_tokenize(handle, c"a".as_ptr(), 1, 0, null_mut(), 0, &mut count) };
    assert_eq!(status, ENGINE_ERR_UNSUPPORTED);
    assert_eq!(last_error(), "the model has no tokenizer");
    // SAFETY: as above.
    let status = unsafe { engine_generate(handle, null(), 0, null(), null_mut()) };
    assert_eq!((status, last_error().as_str()), (ENGINE_ERR_ARGUMENT, "output is NULL"));
    assert_eq!(engine_free(handle), ENGINE_OK);
    assert_eq!(engine_vocab_size(null()), 0);
    assert_eq!(last_error(), "the engine is NULL");
}

#[test]
fn special_tokens_are_added_and_shown_when_asked_for() {
    let handle = open(&text_model("special"));
    let show = |special: i32| {
        let (mut text, mut len) = ([0u8; 16], 0);
        let (at, ids) = (text.as_mut_ptr().cast(), [1, 2]);
        // SAFETY: all are locals of the sizes given.
        let status = unsafe {
            engine_detokenize(handle, ids.as_ptr(), ids.len(), special, at, text.len(), &mut len)
        };
        (status, String::from_utf8(text[..len].to_vec()).unwrap())
    };
    assert_eq!(show(0), (ENGINE_OK, String::new()));
    assert_eq!(show(1), (ENGINE_OK, "<s></s>".to_owned()));
    assert_eq!(show(2), (ENGINE_ERR_ARGUMENT, String::new()));
    assert_eq!(engine_free(handle), ENGINE_OK);
}

#[test]
fn the_built_in_model_is_there_with_its_tokenizer() {
    let handle = open("builtin:arith".as_ref());
    let (text, mut ids, mut count) = ("12+7=", [0; 8], 0);
    let at = text.as_ptr().cast();
    // SAFETY: all are locals of the sizes given.
    let status = unsafe {
        engine_tokenize(handle, at, text.len(), 0, ids.as_mut_ptr(), ids.len(), &mut count)
    };
    assert_eq!((status, count), (ENGINE_OK, text.len()), "bytes are tokens");
    assert!(
        ids[..count].iter().all(|id| *id > 0 && id.cast_unsigned() < engine_vocab_size(handle))
    );
    assert_eq!(engine_free(handle), ENGINE_OK);
}
