//! Texts become tokens here, after a look at their length, and long ones a few at a time.
//!
//! Tokenizing takes up to forty times the memory of its text, and a text that no context holds is refused by its
//! length in tokens at the end: so one that cannot fit is refused before, and long ones wait for their turn, in
//! which they hold up nobody but each other.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use engine::Tokenizer;

use crate::api_error::ApiError;
use crate::app::App;
use crate::fields::BadField;
use crate::job::{needs, unprocessable};
use crate::prompt_params::Truncate;

/// Texts up to so many bytes are tokenized in any case and at once.
const CHEAP_BYTES: usize = 1 << 20;
/// How long a longer one waits for its turn.
const PATIENCE: Duration = Duration::from_secs(10);
/// Some normalisations make a text shorter before it is cut: this many times at most, generously.
const SHRINKING: usize = 4;

/// Which texts are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Texts {
    /// Those that may fit into the context.
    Fitting,
    /// All: they are counted, or cut.
    All,
}

impl From<Truncate> for Texts {
    fn from(truncate: Truncate) -> Self {
        match truncate {
            Truncate::Keep => Self::Fitting,
            Truncate::To(_) | Truncate::ToFit => Self::All,
        }
    }
}

/// What `encode` makes of `text`, the value of `param` or made of it. A long one waits for other long ones.
///
/// # Errors
/// When there is no tokenizer, the text cannot fit, others take too long, or it cannot be tokenized.
pub(crate) fn encode(
    app: &App,
    (param, text): (&str, &str),
    texts: Texts,
    encode: impl FnOnce(&Tokenizer) -> engine::Result<Vec<u32>>,
) -> Result<Vec<u32>, ApiError> {
    let tokenizer = app.service.tokenizer().ok_or_else(|| needs(param, "a tokenizer"))?;
    let encoded = || encode(tokenizer).map_err(|error| unprocessable(param, &error));
    let (bytes, context) = (text.len(), app.service.max_model_len());
    if bytes <= CHEAP_BYTES {
        return encoded();
    }
    let longest = tokenizer.longest_token_bytes();
    let limit = context.saturating_mul(longest).saturating_mul(SHRINKING).max(CHEAP_BYTES);
    if texts == Texts::Fitting && bytes > limit {
        let message = format!(
            "{param} has {bytes} bytes, limit is {limit} for a context of {context} tokens"
        );
        return Err(BadField::new(param, message).with_code("context_length_exceeded").into());
    }
    let _turn = app.encoding.take(PATIENCE).ok_or_else(ApiError::texts_busy)?;
    encoded()
}

/// Places for those who do something that few may do at once.
#[derive(Debug)]
pub(crate) struct Turns {
    free: Mutex<usize>,
    freed: Condvar,
}

/// A place, given back when dropped.
#[must_use]
struct Turn<'a>(&'a Turns);

impl Turns {
    /// One for each processor.
    pub(crate) fn of_processors() -> Self {
        let free = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Self { free: Mutex::new(free), freed: Condvar::new() }
    }

    /// Waits for a place; `None` where there is none in time.
    fn take(&self, patience: Duration) -> Option<Turn<'_>> {
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.freed.wait_timeout_while(free, patience, |free| *free == 0);
        let (mut free, _) = waited.unwrap_or_else(PoisonError::into_inner);
        *free = free.checked_sub(1)?;
        Some(Turn(self))
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        *self.0.free.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.0.freed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn no_more_take_their_turn_than_there_are_places() {
        let turns = Turns { free: Mutex::new(2), freed: Condvar::new() };
        let (inside, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        let _turn = turns.take(PATIENCE).unwrap();
                        most.fetch_max(inside.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                        std::thread::yield_now();
                        inside.fetch_sub(1, Ordering::SeqCst);
                    }
                });
            }
        });
        assert!((1..=2).contains(&most.into_inner()));
        let _both = [0; 2].map(|_| turns.take(Duration::ZERO).unwrap());
        assert!(turns.take(Duration::from_millis(1)).is_none());
    }
}
