//! Token ids to text, one token at a time, never showing half a character.
//!
//! The pieces given out are, together, exactly what [`Tokenizer::decode`] makes of all ids at once,
//! for every sequence of ids; bytes that are not UTF-8 become the same U+FFFD. Byte-level
//! tokenizers: the bytes of the token are appended to at most three held bytes, and what is certain
//! is given out. Others: the new tokens are decoded after the last token already given out, and the
//! text of that one is cut off; a run of byte tokens (`<0xE5><0x8F>...`) is held until it ends,
//! since one bad byte changes how the whole run is shown. Both take O(1) amortised per token.

use std::sync::Arc;

use super::{SkipSpecial, Tokenizer};
use crate::error::Result;

/// Turns a stream of ids into a stream of text.
#[derive(Clone, Debug)]
pub struct Detokenizer {
    tokenizer: Arc<Tokenizer>,
    skip: SkipSpecial,
    /// Bytes of an unfinished character (byte-level tokenizers).
    bytes: Vec<u8>,
    /// The last ids given out, then the ids that are held (other tokenizers).
    window: Vec<u32>,
    /// How many ids of `window` are given out.
    shown: usize,
    delta: String,
}

impl Detokenizer {
    /// A detokenizer at the beginning of a text.
    pub fn new(tokenizer: Arc<Tokenizer>, skip: SkipSpecial) -> Self {
        Self {
            tokenizer,
            skip,
            bytes: Vec::new(),
            window: Vec::new(),
            shown: 0,
            delta: String::new(),
        }
    }

    /// A detokenizer that goes on after these ids: the space between the prompt and the first word,
    /// which some tokenizers drop at the beginning of a text, is kept. Half a character at the end
    /// of the prompt is not completed.
    pub fn after_prompt(tokenizer: Arc<Tokenizer>, skip: SkipSpecial, tail: &[u32]) -> Self {
        let mut this = Self::new(tokenizer, skip);
        if !this.tokenizer.is_byte_level() {
            let decoded = tail.iter().filter(|id| this.tokenizer.is_decoded(**id, skip));
            this.window = decoded.copied().collect();
            this.keep_context();
        }
        this
    }

    /// Takes the next id and gives the text that became certain; often one word, sometimes nothing.
    ///
    /// # Errors
    /// When the tokenizer's own rules fail on these tokens.
    pub fn push(&mut self, id: u32) -> Result<&str> {
        self.delta.clear();
        if !self.tokenizer.is_decoded(id, self.skip) {
            return Ok("");
        }
        if self.tokenizer.is_byte_level() {
            self.bytes.extend_from_slice(self.tokenizer.token_bytes(id));
            self.show_characters();
        } else {
            self.window.push(id);
            if !self.tokenizer.is_fallback_byte(id) {
                self.show_window()?;
            }
        }
        Ok(&self.delta)
    }

    /// The text is over: gives out what was held.
    ///
    /// # Errors
    /// When the tokenizer's own rules fail on these tokens.
    pub fn finish(&mut self) -> Result<String> {
        self.delta.clear();
        if self.tokenizer.is_byte_level() {
            self.delta.push_str(&String::from_utf8_lossy(&self.bytes));
            self.bytes.clear();
        } else if self.shown < self.window.len() {
            self.show_window()?;
        }
        Ok(std::mem::take(&mut self.delta))
    }

    /// Moves every complete character, and U+FFFD for what can be none, from `bytes` to `delta`.
    fn show_characters(&mut self) {
        let mut start = 0;
        loop {
            match std::str::from_utf8(&self.bytes[start..]) {
                Ok(text) => {
                    self.delta.push_str(text);
                    start = self.bytes.len();
                    break;
                }
                Err(error) => {
                    let valid = start + error.valid_up_to();
                    self.delta.push_str(&String::from_utf8_lossy(&self.bytes[start..valid]));
                    start = valid;
                    let Some(invalid) = error.error_len() else { break };
                    self.delta.push(char::REPLACEMENT_CHARACTER);
                    start += invalid;
                }
            }
        }
        self.bytes.drain(..start);
    }

    /// Puts the text of the held ids into `delta`.
    fn show_window(&mut self) -> Result<()> {
        let before = self.tokenizer.decode(&self.window[..self.shown], self.skip)?;
        let after = self.tokenizer.decode(&self.window, self.skip)?;
        // Only half a character at the end of a prompt makes `before` anything but a prefix.
        let common = before.chars().zip(after.chars()).take_while(|(a, b)| a == b);
        let length: usize = common.map(|(letter, _)| letter.len_utf8()).sum();
        self.delta.push_str(&after[length..]);
        self.keep_context();
        Ok(())
    }

    /// Marks all of `window` as given out and keeps of it only what decides how the next ids are
    /// decoded: its last token that is not empty.
    fn keep_context(&mut self) {
        let last = self.window.iter().rposition(|id| !self.tokenizer.token_bytes(*id).is_empty());
        let keep = last.unwrap_or(self.window.len().saturating_sub(1));
        self.window.drain(..keep);
        self.shown = self.window.len();
    }
}
