//! The C ABI of the engine: `include/engine.h` is its documentation, this crate carries it out.
//!
//! Every entry point checks what it was given, runs inside `ffi::ffi`, which stops unwinding, and answers with
//! a status. Leaves out what the header says it leaves out; has no logic of its own.
//!
//! Built as a shared and a static library, `engine_c`; the Rust library is for tests.
//!
//! ```
//! use engine_c::{ENGINE_ERR_MODEL, engine_last_error, engine_open};
//!
//! let (path, mut handle) = ("no/such/model", std::ptr::null_mut());
//! // SAFETY: `path` has the length given; NULL asks for the default configuration.
//! let status = unsafe { engine_open(path.as_ptr().cast(), path.len(), std::ptr::null(), &mut handle) };
//! assert_eq!(status, ENGINE_ERR_MODEL);
//! // SAFETY: NULL is fine for a length nobody wants.
//! let message = unsafe { engine_last_error(std::ptr::null_mut()) };
//! // SAFETY: the message ends in a NUL and no other call was made since.
//! let message = unsafe { std::ffi::CStr::from_ptr(message) };
//! assert_eq!(message.to_str(), Ok("no/such/model: no such file or directory"));
//! ```
#![deny(unsafe_op_in_unsafe_fn)]

mod abi;
mod ffi;
mod generate;
mod handles;
mod memory;

use std::ffi::c_char;
use std::path::Path;

use engine::model::hub::{self, HubSettings};
use engine::text::{AddSpecial, SkipSpecial};
use engine::{Engine, ModelSource, Service, Tokenizer};

pub use abi::*;
pub use ffi::*;
pub use generate::engine_generate;
pub use handles::Handle;

use ffi::{Fault, ffi};
use memory::{array, fill, text, token_ids, write};

/// Activations and keys on lines and huge pages: what the library computes with is its own memory.
#[global_allocator]
static ALLOCATOR: kernels::HugePages = kernels::HugePages;

/// The version of the ABI: `ENGINE_ABI_VERSION` of the header.
#[unsafe(no_mangle)]
pub extern "C" fn engine_abi_version() -> u32 {
    1
}

/// Fills in the default configuration.
///
/// # Safety
/// `config` is NULL or points to `struct_size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engine_default_config(config: *mut Config, struct_size: usize) -> Status {
    // SAFETY: handed on from the caller.
    ffi(|| unsafe { memory::write_default(config, struct_size) })
}

/// Fills in the default sampling.
///
/// # Safety
/// `sampling` is NULL or points to `struct_size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engine_default_sampling(
    sampling: *mut Sampling,
    struct_size: usize,
) -> Status {
    // SAFETY: handed on from the caller.
    ffi(|| unsafe { memory::write_default(sampling, struct_size) })
}

/// Opens a model.
///
/// # Safety
/// `path` has `path_len` bytes; `config` is NULL or a struct of its `struct_size`; `out` is NULL or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engine_open(
    path: *const c_char,
    path_len: usize,
    config: *const Config,
    out: *mut *mut Handle,
) -> Status {
    ffi(|| {
        // SAFETY: `out` is the caller's, as said above.
        unsafe { write("out", out, std::ptr::null_mut()) }?;
        // SAFETY: `path` is the caller's, as said above, and used only here.
        let path = unsafe { text("path", path, path_len) }?;
        // SAFETY: `config` is the caller's, as said above.
        let config = unsafe { memory::read(config) }?.resolve()?;
        handles::check_process()?;
        let service = Service::start(Engine::load(&source(path)?, &config)?)?;
        // SAFETY: `out` is the caller's, as said above.
        unsafe { write("out", out, handles::insert(service)) }
    })
}

/// The model that `path` names.
fn source(path: &str) -> Result<ModelSource, Fault> {
    if !path.starts_with("builtin:") {
        return Ok(ModelSource::open(Path::new(path))?);
    }
    let nowhere = HubSettings::from_lookup(|_| None);
    Ok(hub::resolve(path, &nowhere, hub::no_download)?.open()?)
}

/// Closes an engine.
#[unsafe(no_mangle)]
pub extern "C" fn engine_free(e: *mut Handle) -> Status {
    ffi(|| if e.is_null() { Ok(()) } else { handles::remove(e).map(drop) })
}

/// The number of tokens the model knows; 0 after a failure.
#[unsafe(no_mangle)]
pub extern "C" fn engine_vocab_size(e: *const Handle) -> u32 {
    count(e, |service| service.model().vocab_size)
}

/// The longest sequence in tokens; 0 after a failure.
#[unsafe(no_mangle)]
pub extern "C" fn engine_max_model_len(e: *const Handle) -> u32 {
    count(e, Service::max_model_len)
}

fn count(e: *const Handle, of: impl FnOnce(&Service) -> usize) -> u32 {
    let mut count = 0;
    ffi(|| {
        let value = of(&*handles::get(e)?);
        count =
            u32::try_from(value).map_err(|_| Fault::internal(format!("{value} is too large")))?;
        Ok(())
    });
    count
}

/// Token ids of a text.
///
/// # Safety
/// `text` has `text_len` bytes, `tokens` room for `capacity` ids; `count` is NULL or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engine_tokenize(
    e: *const Handle,
    text: *const c_char,
    text_len: usize,
    special: i32,
    tokens: *mut i32,
    capacity: usize,
    count: *mut usize,
) -> Status {
    ffi(|| {
        let service = handles::get(e)?;
        let add = if yes(special)? { AddSpecial::Yes } else { AddSpecial::No };
        // SAFETY: `text` is the caller's, as said above; the reference ends on this line.
        let ids = unsafe { memory::text("text", text, text_len) }
            .and_then(|text| Ok(tokenizer(&service)?.encode(text, add)?))?;
        let ids: Vec<i32> = ids.into_iter().map(u32::cast_signed).collect();
        // SAFETY: the buffer and the place of its count are the caller's, as said above.
        unsafe { fill(&ids, (tokens, capacity), count) }
    })
}

/// The text of tokens.
///
/// # Safety
/// `tokens` has `count` ids, `text` room for `capacity` bytes; `text_len` is NULL or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engine_detokenize(
    e: *const Handle,
    tokens: *const i32,
    count: usize,
    special: i32,
    text: *mut c_char,
    capacity: usize,
    text_len: *mut usize,
) -> Status {
    ffi(|| {
        let service = handles::get(e)?;
        let skip = if yes(special)? { SkipSpecial::No } else { SkipSpecial::Yes };
        // SAFETY: `tokens` is the caller's, as said above; the reference ends on this line.
        let ids = token_ids("tokens", unsafe { array("tokens", tokens, count) }?)?;
        let decoded = tokenizer(&service)?.decode(&ids, skip)?;
        // SAFETY: the buffer and the place of its count are the caller's, as said above.
        unsafe { fill(decoded.as_bytes(), (text.cast(), capacity), text_len) }
    })
}

fn tokenizer(service: &Service) -> Result<&Tokenizer, Fault> {
    let missing = || engine::Error::unsupported("the model has no tokenizer");
    Ok(service.tokenizer().ok_or_else(missing)?)
}

/// Whether a constant says yes.
fn yes(special: i32) -> Result<bool, Fault> {
    match special {
        0 => Ok(false),
        1 => Ok(true),
        other => Err(Fault::argument(format!("special is {other}, limit is 0 to 1"))),
    }
}
