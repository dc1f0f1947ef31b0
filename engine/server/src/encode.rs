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

/// Texts up to so many bytes are tokenized in any case, and at once where a request has no more in all.
const CHEAP_BYTES: usize = 1 << 20;
/// How long longer ones wait for their turn.
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
    let encoder = Encoder::of(app, param, texts, &[text])?;
    encoder.encode(encode)
}

/// Whoever may tokenize the texts of a request.
pub(crate) struct Encoder<'a> {
    tokenizer: &'a Tokenizer,
    param: &'a str,
    /// Held while it tokenizes.
    _turn: Option<Turn<'a>>,
}

impl<'a> Encoder<'a> {
    /// For `all` texts of a request, values of `param` or made of it. Many or long ones wait for others.
    ///
    /// # Errors
    /// When there is no tokenizer, one of the texts cannot fit, or others take too long.
    pub(crate) fn of(
        app: &'a App,
        param: &'a str,
        texts: Texts,
        all: &[&str],
    ) -> Result<Self, ApiError> {
        let tokenizer = app.service.tokenizer().ok_or_else(|| needs(param, "a tokenizer"))?;
        let bytes = all.iter().map(|text| text.len());
        let longest = bytes.clone().max().filter(|bytes| *bytes > CHEAP_BYTES);
        if let Some(bytes) = longest.filter(|_| texts == Texts::Fitting) {
            let context = app.service.max_model_len();
            let token = tokenizer.longest_token_bytes();
            let limit = context.saturating_mul(token).saturating_mul(SHRINKING).max(CHEAP_BYTES);
            if bytes > limit {
                let message = format!(
                    "{param} has {bytes} bytes, limit is {limit} for a context of {context} tokens"
                );
                return Err(BadField::new(param, message)
                    .with_code("context_length_exceeded")
                    .into());
            }
        }
        let turn = || app.encoding.take().ok_or_else(ApiError::texts_busy);
        let turn = (bytes.sum::<usize>() > CHEAP_BYTES).then(turn).transpose()?;
        Ok(Self { tokenizer, param, _turn: turn })
    }

    /// What `encode` makes of one of the texts.
    ///
    /// # Errors
    /// When it cannot be tokenized.
    pub(crate) fn encode(
        &self,
        encode: impl FnOnce(&Tokenizer) -> engine::Result<Vec<u32>>,
    ) -> Result<Vec<u32>, ApiError> {
        encode(self.tokenizer).map_err(|error| unprocessable(self.param, &error))
    }
}

/// Places for those who do something that few may do at once.
#[derive(Debug)]
pub(crate) struct Turns {
    free: Mutex<usize>,
    freed: Condvar,
    /// How long one waits for a place.
    patience: Duration,
}

/// A place, given back when dropped.
#[must_use]
struct Turn<'a>(&'a Turns);

impl Turns {
    /// One for each processor.
    pub(crate) fn of_processors() -> Self {
        let free = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Self::new(free, PATIENCE)
    }

    pub(crate) fn new(places: usize, patience: Duration) -> Self {
        Self { free: Mutex::new(places), freed: Condvar::new(), patience }
    }

    /// Waits for a place; `None` where there is none in time.
    fn take(&self) -> Option<Turn<'_>> {
        let free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.freed.wait_timeout_while(free, self.patience, |free| *free == 0);
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
        let turns = Turns::new(2, PATIENCE);
        let (inside, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        let _turn = turns.take().unwrap();
                        most.fetch_max(inside.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                        std::thread::yield_now();
                        inside.fetch_sub(1, Ordering::SeqCst);
                    }
                });
            }
        });
        assert!((1..=2).contains(&most.into_inner()));
        let turns = Turns::new(2, Duration::from_millis(1));
        let _both = [0; 2].map(|_| turns.take().unwrap());
        assert!(turns.take().is_none());
    }
}
