//! The border between Rust and C: statuses, the last error, and the end of unwinding.
//!
//! A panic stops here and becomes [`ENGINE_ERR_INTERNAL`]. The message of Rust's panic hook is not suppressed:
//! hooks belong to the process, not to a library.

use std::any::Any;
use std::cell::RefCell;
use std::ffi::{CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};

use engine::{Error, ErrorKind};

/// How a call went: `engine_status` of the header.
pub type Status = i32;

/// The call did what it says.
pub const ENGINE_OK: Status = 0;
/// The library is at fault.
pub const ENGINE_ERR_INTERNAL: Status = 1;
/// An argument that no engine could accept.
pub const ENGINE_ERR_ARGUMENT: Status = 2;
/// No engine of this name is open.
pub const ENGINE_ERR_HANDLE: Status = 3;
/// A buffer is too small.
pub const ENGINE_ERR_BUFFER: Status = 4;
/// A model is missing, damaged or of an unknown kind.
pub const ENGINE_ERR_MODEL: Status = 5;
/// Something that is not implemented.
pub const ENGINE_ERR_UNSUPPORTED: Status = 6;
/// The configuration is out of range.
pub const ENGINE_ERR_CONFIG: Status = 7;
/// A request is out of range.
pub const ENGINE_ERR_REQUEST: Status = 8;
/// Not now.
pub const ENGINE_ERR_BUSY: Status = 9;
/// An answer ended early.
pub const ENGINE_ERR_GENERATION: Status = 10;
/// The operating system refused to read a file.
pub const ENGINE_ERR_IO: Status = 11;

/// Why a call failed.
#[derive(Debug)]
pub(crate) struct Fault {
    status: Status,
    message: String,
}

impl Fault {
    pub(crate) fn new(status: Status, message: impl Into<String>) -> Self {
        Self { status, message: message.into() }
    }

    pub(crate) fn argument(message: impl Into<String>) -> Self {
        Self::new(ENGINE_ERR_ARGUMENT, message)
    }

    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self::new(ENGINE_ERR_INTERNAL, message)
    }
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        let status = match error.kind() {
            ErrorKind::Model(_) => ENGINE_ERR_MODEL,
            ErrorKind::Unsupported(_) => ENGINE_ERR_UNSUPPORTED,
            ErrorKind::Config(_) => ENGINE_ERR_CONFIG,
            ErrorKind::Request(_) => ENGINE_ERR_REQUEST,
            ErrorKind::Busy(_) => ENGINE_ERR_BUSY,
            ErrorKind::Numeric(_) => ENGINE_ERR_GENERATION,
            ErrorKind::Io { .. } => ENGINE_ERR_IO,
            _ => ENGINE_ERR_INTERNAL,
        };
        Self::new(status, error.to_string())
    }
}

thread_local! {
    static LAST: RefCell<CString> = RefCell::default();
}

/// Runs the body of an entry point: a panic becomes a fault, a fault the thread's last error and a status.
pub(crate) fn ffi(call: impl FnOnce() -> Result<(), Fault>) -> Status {
    // What a panic leaves half done is reached through a `Service`, which owns its engine and reports a dead
    // thread, or is the caller's own memory.
    let outcome = catch_unwind(AssertUnwindSafe(call))
        .unwrap_or_else(|panic| Err(Fault::internal(panic_text(&*panic))));
    let (status, message) = match outcome {
        Ok(()) => (ENGINE_OK, CString::default()),
        Err(fault) => (fault.status, c_string(&fault.message)),
    };
    // Fails while the thread is ending, when nobody can ask any more.
    let _ending = LAST.try_with(|last| last.replace(message));
    status
}

fn c_string(message: &str) -> CString {
    CString::new(message.replace('\0', "\\0")).expect("NULs were replaced")
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    let literal = panic.downcast_ref::<&str>().copied();
    literal.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("panic")
}

/// The message of this thread's last call, empty if it succeeded.
///
/// # Safety
/// `len` is NULL or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn engine_last_error(len: *mut usize) -> *const c_char {
    let place = |last: &RefCell<CString>| {
        let last = last.borrow();
        (last.as_ptr(), last.count_bytes())
    };
    let (message, bytes) = LAST.try_with(place).unwrap_or((c"".as_ptr(), 0));
    if !len.is_null() {
        // SAFETY: the caller says it is writable.
        unsafe { len.write(bytes) };
    }
    message
}

#[cfg(test)]
mod tests {
    use std::ffi::CStr;

    use super::*;

    fn last_error() -> String {
        let mut len = 0;
        // SAFETY: `len` is a local.
        let message = unsafe { engine_last_error(&mut len) };
        // SAFETY: nothing else has been called on this thread since.
        let message = unsafe { CStr::from_ptr(message) };
        assert_eq!(message.count_bytes(), len);
        message.to_str().unwrap().to_owned()
    }

    #[test]
    fn a_panic_becomes_a_status_with_its_message() {
        assert_eq!(ffi(|| panic!("the dog\0 ate it")), ENGINE_ERR_INTERNAL);
        assert_eq!(last_error(), "the dog\\0 ate it");
        let n = 7;
        assert_eq!(ffi(|| panic!("{n} dogs")), ENGINE_ERR_INTERNAL);
        assert_eq!(last_error(), "7 dogs");
        assert_eq!(ffi(|| std::panic::panic_any(n)), ENGINE_ERR_INTERNAL);
        assert_eq!(last_error(), "panic");
        assert_eq!(ffi(|| Ok(())), ENGINE_OK);
        assert_eq!(last_error(), "");
    }

    #[test]
    fn the_last_error_is_the_threads_own() {
        assert_eq!(ffi(|| Err(Fault::argument("mine"))), ENGINE_ERR_ARGUMENT);
        std::thread::spawn(|| assert_eq!(last_error(), "")).join().unwrap();
        assert_eq!(last_error(), "mine");
    }

    #[test]
    fn every_kind_of_error_has_its_status() {
        let io = std::io::Error::from(std::io::ErrorKind::NotFound);
        let cases = [
            (Error::model(""), ENGINE_ERR_MODEL),
            (Error::unsupported(""), ENGINE_ERR_UNSUPPORTED),
            (Error::config(""), ENGINE_ERR_CONFIG),
            (Error::request(""), ENGINE_ERR_REQUEST),
            (Error::busy(""), ENGINE_ERR_BUSY),
            (Error::numeric(""), ENGINE_ERR_GENERATION),
            (Error::internal(""), ENGINE_ERR_INTERNAL),
            (Error::io("x", io), ENGINE_ERR_IO),
        ];
        for (error, status) in cases {
            let name = format!("{error:?}");
            assert_eq!(Fault::from(error).status, status, "{name}");
        }
    }
}
