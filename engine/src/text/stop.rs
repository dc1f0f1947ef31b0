//! Finds stop strings in text that arrives in pieces.
//!
//! The match that is complete first wins; of those complete at the same byte the longest, so that
//! no part of a stop string is ever shown. The result therefore does not depend on how the text was
//! cut into pieces. Each stop string keeps the length of its prefix matched so far (Knuth, Morris
//! and Pratt 1977): O(1) amortised per byte and stop string. Matching is by bytes; no case folding,
//! no normalisation.

use std::sync::Arc;

use crate::error::{Error, Result};

/// Most stop strings of one request.
pub const MAX_STOP_STRINGS: usize = 64;
/// Most bytes of one stop string.
pub const MAX_STOP_BYTES: usize = 1024;

/// What a piece of text led to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StopScan {
    /// Nothing is held back.
    None {
        /// Text to show: all that had been held back, and this piece.
        text: String,
    },
    /// The end of the text may be the beginning of a stop string.
    Hold {
        /// Text to show, without what is held back.
        text: String,
        /// Bytes held back.
        held_bytes: usize,
    },
    /// A stop string is complete; what follows it is dropped.
    Found {
        /// Which stop string.
        index: usize,
        /// Text to show that stands before it.
        text_before: String,
    },
}

/// Checks number and lengths of stop strings.
///
/// # Errors
/// `ErrorKind::Request`, naming the value and its limit.
pub(crate) fn check_stop_strings(stop: &[String]) -> Result<()> {
    if stop.len() > MAX_STOP_STRINGS {
        let count = stop.len();
        return Err(Error::request(format!(
            "stop has {count} strings, limit is {MAX_STOP_STRINGS}"
        )));
    }
    for (index, text) in stop.iter().enumerate() {
        if text.is_empty() {
            return Err(Error::request(format!("stop string {index} is empty")));
        }
        if text.len() > MAX_STOP_BYTES {
            let bytes = text.len();
            return Err(Error::request(format!(
                "stop string {index} has {bytes} bytes, limit is {MAX_STOP_BYTES}"
            )));
        }
    }
    Ok(())
}

/// Stop strings made ready, once for all texts that are watched for them: three bytes a byte.
#[derive(Clone, Debug)]
pub(crate) struct StopPatterns(Arc<[Pattern]>);

impl StopPatterns {
    /// Makes these ready.
    ///
    /// # Errors
    /// As [`StopMatcher::new`].
    pub(crate) fn new(stop: &[String]) -> Result<Self> {
        check_stop_strings(stop)?;
        Ok(Self(stop.iter().map(|text| Pattern::new(text)).collect()))
    }
}

/// Watches a stream of text for stop strings. Its own are a few bytes for each of them, and the text it holds.
#[derive(Clone, Debug)]
pub struct StopMatcher {
    patterns: StopPatterns,
    /// How much of each stop string the end of the text matches, in bytes.
    matched: Vec<u16>,
    held: String,
    found: Option<usize>,
}

impl StopMatcher {
    /// A matcher for these stop strings; with none it passes everything on.
    ///
    /// ```
    /// use engine::text::{StopMatcher, StopScan};
    /// let mut stop = StopMatcher::new(vec!["END".into()])?;
    /// assert_eq!(stop.push("a E"), StopScan::Hold { text: "a ".into(), held_bytes: 1 });
    /// assert_eq!(stop.push("NDz"), StopScan::Found { index: 0, text_before: String::new() });
    /// # Ok::<(), engine::Error>(())
    /// ```
    ///
    /// # Errors
    /// When there are more than [`MAX_STOP_STRINGS`], or one is empty or longer than
    /// [`MAX_STOP_BYTES`].
    pub fn new(stop: Vec<String>) -> Result<Self> {
        Ok(Self::of(StopPatterns::new(&stop)?))
    }

    /// A matcher for stop strings that are ready.
    pub(crate) fn of(patterns: StopPatterns) -> Self {
        let matched = vec![0; patterns.0.len()];
        Self { patterns, matched, held: String::new(), found: None }
    }

    /// Takes the next piece of text. After a match every further call reports the same match with
    /// no text.
    pub fn push(&mut self, delta: &str) -> StopScan {
        self.scan(delta, Complete::Ends)
    }

    /// Takes the next piece of a text that may not end in it: a stop string that is complete there is text
    /// like any other, one that only begins there is held back as ever.
    pub fn pass(&mut self, delta: &str) -> StopScan {
        self.scan(delta, Complete::Passes)
    }

    fn scan(&mut self, delta: &str, complete: Complete) -> StopScan {
        if let Some(index) = self.found {
            return StopScan::Found { index, text_before: String::new() };
        }
        let base = self.held.len();
        self.held.push_str(delta);
        for (position, byte) in delta.bytes().enumerate() {
            let Some(index) = self.advance(byte) else { continue };
            if complete == Complete::Passes {
                self.fall_back();
                continue;
            }
            let start = base + position + 1 - self.patterns.0[index].text.len();
            self.held.truncate(start);
            self.found = Some(index);
            return StopScan::Found { index, text_before: std::mem::take(&mut self.held) };
        }
        let held_bytes = self.matched.iter().max().map_or(0, |matched| usize::from(*matched));
        // A stop string begins with a character, so what is held back does too.
        let tail = self.held.split_off(self.held.len() - held_bytes);
        let text = std::mem::replace(&mut self.held, tail);
        if held_bytes == 0 { StopScan::None { text } } else { StopScan::Hold { text, held_bytes } }
    }

    /// The text is over: gives back what was held, which was no stop string after all.
    pub fn finish(&mut self) -> String {
        self.matched.fill(0);
        std::mem::take(&mut self.held)
    }

    /// Moves every pattern on by one byte; the longest that is complete, if any.
    fn advance(&mut self, byte: u8) -> Option<usize> {
        let mut best: Option<(usize, usize)> = None;
        for (index, (pattern, matched)) in self.patterns.0.iter().zip(&mut self.matched).enumerate()
        {
            *matched = pattern.advance(*matched, byte);
            let length = pattern.text.len();
            let complete = usize::from(*matched) == length;
            if complete && best.is_none_or(|(_, best)| length > best) {
                best = Some((index, length));
            }
        }
        best.map(|(index, _)| index)
    }

    /// Leaves of every complete pattern the longest part that may begin another one.
    fn fall_back(&mut self) {
        for (pattern, matched) in self.patterns.0.iter().zip(&mut self.matched) {
            if usize::from(*matched) == pattern.text.len() {
                *matched = pattern.border[pattern.text.len() - 1];
            }
        }
    }
}

/// What a complete stop string is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Complete {
    /// The end of the text.
    Ends,
    /// Text.
    Passes,
}

/// One stop string; its lengths fit in 16 bits, see [`MAX_STOP_BYTES`].
#[derive(Clone, Debug)]
struct Pattern {
    text: Box<[u8]>,
    /// `border[i]`: length of the longest proper prefix of `text[..=i]` that is also its suffix.
    border: Box<[u16]>,
}

impl Pattern {
    fn new(text: &str) -> Self {
        let bytes = text.as_bytes();
        let mut this = Self { text: bytes.into(), border: vec![0; bytes.len()].into() };
        for (i, byte) in bytes.iter().enumerate().skip(1) {
            this.border[i] = this.advance(this.border[i - 1], *byte);
        }
        this
    }

    /// How much of the stop string is matched with this byte, when `matched` bytes, not all, were before it.
    fn advance(&self, mut matched: u16, byte: u8) -> u16 {
        while matched > 0 && self.text[usize::from(matched)] != byte {
            matched = self.border[usize::from(matched) - 1];
        }
        matched + u16::from(self.text[usize::from(matched)] == byte)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matcher(stop: &[&str]) -> StopMatcher {
        StopMatcher::new(stop.iter().map(|text| (*text).to_owned()).collect()).unwrap()
    }

    /// What a reader sees and which stop string ended it, fed in the given pieces.
    fn run(stop: &[&str], pieces: &[String]) -> (String, Option<usize>) {
        let mut matcher = matcher(stop);
        let mut shown = String::new();
        for piece in pieces {
            match matcher.push(piece) {
                StopScan::None { text } | StopScan::Hold { text, .. } => shown.push_str(&text),
                StopScan::Found { index, text_before } => {
                    return (shown + &text_before, Some(index));
                }
            }
        }
        (shown + &matcher.finish(), None)
    }

    /// The definition, by trying every end and every stop string.
    fn naive(stop: &[&str], text: &str) -> (String, Option<usize>) {
        for end in 0..=text.len() {
            let mut best: Option<usize> = None;
            for (index, pattern) in stop.iter().enumerate() {
                let complete = text.as_bytes()[..end].ends_with(pattern.as_bytes());
                if complete && best.is_none_or(|best| pattern.len() > stop[best].len()) {
                    best = Some(index);
                }
            }
            if let Some(index) = best {
                return (text[..end - stop[index].len()].to_owned(), Some(index));
            }
        }
        (text.to_owned(), None)
    }

    #[test]
    fn holds_what_may_become_a_stop_string() {
        let mut matcher = matcher(&["\n\nUser:", "</s>"]);
        assert_eq!(
            matcher.push("Hi\n"),
            StopScan::Hold { text: "Hi".into(), held_bytes: 1 },
            "one newline may begin the stop string"
        );
        assert_eq!(matcher.push("\n"), StopScan::Hold { text: String::new(), held_bytes: 2 });
        assert_eq!(matcher.push("Us"), StopScan::Hold { text: String::new(), held_bytes: 4 });
        assert_eq!(matcher.push("es"), StopScan::None { text: "\n\nUses".into() });
        assert_eq!(
            matcher.push(" <</s> more"),
            StopScan::Found { index: 1, text_before: " <".into() }
        );
        assert_eq!(matcher.push("later"), StopScan::Found { index: 1, text_before: String::new() });
    }

    #[test]
    fn finish_returns_held_text() {
        let mut matcher = matcher(&["🙂🙂"]);
        assert_eq!(matcher.push("a🙂"), StopScan::Hold { text: "a".into(), held_bytes: 4 });
        assert_eq!(matcher.finish(), "🙂");
        assert_eq!(matcher.finish(), "");
    }

    #[test]
    fn agrees_with_the_definition_however_the_text_is_cut() {
        let sets: [&[&str]; 6] =
            [&["ab", "b"], &["aab"], &["abab", "ba"], &["é", "aé"], &["aaa", "aa"], &[]];
        let mut seed = 7_u64;
        for round in 0..4000 {
            let stop = sets[round % sets.len()];
            let mut text = String::new();
            let mut pieces = vec![String::new()];
            for _ in 0..12 {
                seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                let draw = (seed >> 33) as usize;
                let letter = ['a', 'b', 'é', 'è'][[0, 0, 0, 1, 1, 1, 2, 3][draw % 8]];
                text.push(letter);
                if (draw >> 8).is_multiple_of(2) {
                    pieces.push(String::new());
                }
                pieces.last_mut().unwrap().push(letter);
            }
            assert_eq!(run(stop, &pieces), naive(stop, &text), "round {round}: {pieces:?}");
        }
    }

    /// By trying every end: those up to the byte `early` pass.
    #[test]
    fn early_stop_strings_are_text_and_their_ends_may_begin_others() {
        let sets: [&[&str]; 4] = [&["ab", "b"], &["aba"], &["abab", "ba"], &["aaa"]];
        for round in 0..4096_usize {
            let text: String = (0..10).map(|i| ['a', 'b'][round >> i & 1]).collect();
            let early = round / 1024 * 3;
            for stop in sets {
                let complete = |end: usize| {
                    let ends = |s: &&&str| text[..end].ends_with(**s);
                    stop.iter().filter(ends).map(|s| s.len()).max()
                };
                let end = (early + 1..=text.len()).find_map(|end| Some(end - complete(end)?));
                let mut matcher = matcher(stop);
                let mut shown = String::new();
                let mut found = false;
                for (i, letter) in text.char_indices() {
                    let piece = letter.to_string();
                    let scan = if i < early { matcher.pass(&piece) } else { matcher.push(&piece) };
                    match scan {
                        StopScan::None { text } | StopScan::Hold { text, .. } => shown += &text,
                        StopScan::Found { text_before, .. } => {
                            shown += &text_before;
                            found = true;
                        }
                    }
                }
                let expected = &text[..end.unwrap_or(text.len())];
                assert_eq!(
                    (shown + &matcher.finish(), found),
                    (expected.to_owned(), end.is_some())
                );
            }
        }
    }

    #[test]
    fn patterns_are_shared_and_small() {
        let stop = vec!["x".repeat(MAX_STOP_BYTES); MAX_STOP_STRINGS];
        let patterns = StopPatterns::new(&stop).unwrap();
        let bytes: usize = patterns.0.iter().map(|p| p.text.len() + 2 * p.border.len()).sum();
        assert_eq!(bytes, 3 * MAX_STOP_STRINGS * MAX_STOP_BYTES);
        let (one, other) = (StopMatcher::of(patterns.clone()), StopMatcher::of(patterns));
        assert!(Arc::ptr_eq(&one.patterns.0, &other.patterns.0));
        assert_eq!(one.matched.len() * size_of::<u16>(), 128);
    }

    #[test]
    fn limits_are_named() {
        let error = StopMatcher::new(vec![String::new()]).unwrap_err();
        assert_eq!(error.to_string(), "stop string 0 is empty");
        let error = StopMatcher::new(vec!["x".repeat(2000)]).unwrap_err();
        assert_eq!(error.to_string(), "stop string 0 has 2000 bytes, limit is 1024");
        let error = StopMatcher::new(vec!["x".to_owned(); 65]).unwrap_err();
        assert_eq!(error.to_string(), "stop has 65 strings, limit is 64");
    }
}
