//! From candle's errors to the engine's.
//!
//! The crate has no error type of its own: callers treat it as another engine and match on the same
//! kinds. What a user can get wrong is checked at the doors, so an error out of candle is a fault of this
//! crate or of the device.

use engine::Error;

/// A candle error as `ErrorKind::Internal`, without its backtrace.
pub(crate) fn internal(error: candle_core::Error) -> Error {
    let text = error.to_string();
    Error::internal(format!("candle: {}", text.lines().next().unwrap_or("unknown error")))
}
