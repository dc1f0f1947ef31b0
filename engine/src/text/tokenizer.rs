//! Text to token ids and back, over the `tokenizers` crate.
//!
//! [`Tokenizer`] adds to it what an engine needs: the bytes of every token (for incremental
//! decoding and grammars), which tokens are special, checks that make a hostile `tokenizer.json` an
//! error instead of a panic, and the files of a checkpoint. Decoders it knows: byte-level (GPT-2
//! and after) and sequences of `Replace`, `ByteFallback`, `Fuse`, `Strip` and `Metaspace` (Llama 2,
//! Mistral, Gemma); others are refused, because their text cannot be streamed exactly. Truncation
//! and padding settings of the file are dropped, as `transformers` does unless asked.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::OnceLock;

use serde_json::{Map, Value, json};
use tokenizers::decoders::DecoderWrapper;
use tokenizers::{Decoder, Model, PostProcessorWrapper};

use super::{Controls, TokenizerConfig, one_line};
use crate::error::{Error, Result};

/// Largest token id a tokenizer may have; a larger one is a damaged file.
pub const MAX_TOKEN_ID: u32 = (1 << 22) - 1;

/// Whether encoding adds the tokens that begin (and end) a text, e.g. `<s>`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddSpecial {
    /// As the model wants a fresh text to begin.
    Yes,
    /// Only the text's own tokens: for rendered chats and continuations.
    No,
}

/// Whether decoding leaves special tokens out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SkipSpecial {
    /// They leave no text.
    Yes,
    /// They appear as written.
    No,
}

/// A tokenizer with what a model says about it.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    table: TokenTable,
    style: DecodeStyle,
    config: TokenizerConfig,
    bos: Option<u32>,
    eos: Vec<u32>,
    /// Looked for by the first chat.
    controls: OnceLock<Controls>,
}

impl Tokenizer {
    /// Reads a `tokenizer.json`.
    ///
    /// ```
    /// use engine::text::{AddSpecial, SkipSpecial, Tokenizer};
    /// let json = br#"{"version": "1.0", "added_tokens": [], "decoder": null, "model":
    ///     {"type": "WordLevel", "vocab": {"hello": 0, "[UNK]": 1}, "unk_token": "[UNK]"}}"#;
    /// let tokenizer = Tokenizer::from_json_bytes(json)?;
    /// assert_eq!(tokenizer.encode("hello", AddSpecial::No)?, [0]);
    /// assert_eq!(tokenizer.decode(&[0], SkipSpecial::Yes)?, "hello");
    /// # Ok::<(), engine::Error>(())
    /// ```
    ///
    /// # Errors
    /// When the file is not a tokenizer, contradicts itself, or uses an unknown part.
    pub fn from_json_bytes(json: &[u8]) -> Result<Self> {
        let value: Value = serde_json::from_slice(json).map_err(unreadable)?;
        check_model(&value)?;
        drop(value);
        guarded(|| Self::from_inner(tokenizers::Tokenizer::from_bytes(json).map_err(unreadable)?))
    }

    /// Wraps a tokenizer that is already built.
    pub(super) fn from_inner(mut inner: tokenizers::Tokenizer) -> Result<Self> {
        inner.with_padding(None);
        inner.with_truncation(None).map_err(unreadable)?;
        let style = DecodeStyle::of(inner.get_decoder())?;
        let table = TokenTable::new(&inner, &style)?;
        let config = TokenizerConfig::default();
        let controls = OnceLock::new();
        Ok(Self { inner, table, style, config, bos: None, eos: Vec::new(), controls })
    }

    /// The same tokenizer with the model's `tokenizer_config.json`, which names its special tokens, and for
    /// tokenizers of Llama's classes says which of them are put around a text.
    ///
    /// # Errors
    /// When it names a beginning or end token that is not in the vocabulary.
    pub fn with_config(mut self, config: TokenizerConfig) -> Result<Self> {
        let find = |name: &str| match config.token(name) {
            None => Ok(None),
            Some(token) => self.inner.token_to_id(token).map(Some).ok_or_else(|| {
                Error::model(format!("{name} {token:?} is not in the tokenizer's vocabulary"))
            }),
        };
        let (bos, eos) = (find("bos_token")?, find("eos_token")?);
        if let Some(ends) = config.ends() {
            let token = |name, id: Option<u32>| config.token(name).zip(id);
            let bos = token("bos_token", bos).filter(|_| ends.bos);
            let eos = token("eos_token", eos).filter(|_| ends.eos);
            // A token that is wanted and has no name is whatever the file says.
            if bos.is_some() == ends.bos && eos.is_some() == ends.eos {
                self.inner.with_post_processor(Some(put_around(bos, eos).map_err(unreadable)?));
            }
        }
        self.bos = bos;
        self.eos = eos.into_iter().collect();
        self.config = config;
        Ok(self)
    }

    /// Adds a token that ends a text besides `eos_token`.
    pub fn add_eos(&mut self, id: u32) {
        if !self.eos.contains(&id) {
            self.eos.push(id);
        }
    }

    /// Token ids of `text`. Special tokens written in the text are recognised.
    ///
    /// # Errors
    /// When the tokenizer's own rules fail on this text.
    pub fn encode(&self, text: &str, add: AddSpecial) -> Result<Vec<u32>> {
        guarded(|| {
            self.inner
                .encode_fast(text, add == AddSpecial::Yes)
                .map(|encoding| encoding.get_ids().to_vec())
                .map_err(|error| Error::request(format!("cannot tokenize: {}", one_line(error))))
        })
    }

    /// Text of `ids`. Ids that are not in the vocabulary leave no text; bytes that are not UTF-8
    /// become U+FFFD.
    ///
    /// # Errors
    /// When the tokenizer's own rules fail on these tokens.
    pub fn decode(&self, ids: &[u32], skip: SkipSpecial) -> Result<String> {
        guarded(|| {
            self.inner
                .decode(ids, skip == SkipSpecial::Yes)
                .map_err(|error| Error::request(format!("cannot decode: {}", one_line(error))))
        })
    }

    /// The id of a token as it is written in the vocabulary.
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The token of an id as it is written in the vocabulary.
    pub fn id_to_token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// One more than the largest id. A model may have more rows than this.
    pub fn vocab_size(&self) -> usize {
        self.table.ends.len()
    }

    /// The bytes a token stands for in running text; none for an id that is not in the vocabulary.
    /// Special tokens stand for their name.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.table.bytes(id)
    }

    /// Bytes of the longest token, at least 1.
    pub fn longest_token_bytes(&self) -> usize {
        self.table.longest().max(1)
    }

    /// Whether a token is special: it steers the model and is left out of text.
    pub fn is_special(&self, id: u32) -> bool {
        self.table.has(id, SPECIAL)
    }

    /// The special tokens as text, which messages of a chat may spell.
    pub fn controls(&self) -> &Controls {
        self.controls.get_or_init(|| Controls::of(self))
    }

    /// The token that begins a text.
    pub fn bos_id(&self) -> Option<u32> {
        self.bos
    }

    /// The token that ends a text.
    pub fn eos_id(&self) -> Option<u32> {
        self.eos.first().copied()
    }

    /// All tokens that end a text or a turn; the first is [`eos_id`](Self::eos_id).
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos
    }

    /// What the model says about its tokenizer, chat templates included.
    pub fn config(&self) -> &TokenizerConfig {
        &self.config
    }

    /// A `tokenizer.json` that Python's `tokenizers` and `transformers` load.
    ///
    /// # Errors
    /// When the tokenizer cannot be written.
    pub fn to_json(&self) -> Result<String> {
        self.inner.to_string(false).map_err(|error| {
            Error::model(format!("cannot write the tokenizer: {}", one_line(error)))
        })
    }

    /// The `tokenizer_config.json` that goes with [`to_json`](Self::to_json).
    pub fn tokenizer_config_json(&self) -> String {
        self.config.to_json()
    }

    /// Whether decoding is the concatenation of [`token_bytes`](Self::token_bytes).
    pub(super) fn is_byte_level(&self) -> bool {
        matches!(self.style, DecodeStyle::Bytes)
    }

    /// Whether a token is one byte of a run that is decoded together (`<0xE5>`).
    pub(super) fn is_fallback_byte(&self, id: u32) -> bool {
        self.table.has(id, FALLBACK_BYTE)
    }

    /// Whether `id` leaves anything for the decoder under this rule.
    pub(super) fn is_decoded(&self, id: u32, skip: SkipSpecial) -> bool {
        self.table.has(id, KNOWN) && !(skip == SkipSpecial::Yes && self.is_special(id))
    }
}

/// A post-processor that puts these tokens, by name and id, before and behind a text.
pub(super) fn put_around(
    bos: Option<(&str, u32)>,
    eos: Option<(&str, u32)>,
) -> serde_json::Result<PostProcessorWrapper> {
    let named = [bos, eos].into_iter().flatten();
    let tokens: Map<String, Value> = named
        .map(|(name, id)| (name.to_owned(), json!({"id": name, "ids": [id], "tokens": [name]})))
        .collect();
    let around = |sequence: &str, type_id: u32| {
        let special = |end: Option<(&str, u32)>| {
            end.map(|(name, _)| json!({"SpecialToken": {"id": name, "type_id": type_id}}))
        };
        let text = json!({"Sequence": {"id": sequence, "type_id": type_id}});
        [special(bos), Some(text), special(eos)].into_iter().flatten()
    };
    let single: Vec<Value> = around("A", 0).collect();
    let pair: Vec<Value> = around("A", 0).chain(around("B", 1)).collect();
    serde_json::from_value(json!({"type": "TemplateProcessing", "single": single, "pair": pair,
        "special_tokens": tokens}))
}

/// The crate has `expect`s that a hostile file might still reach; what it has half done is thrown away.
fn guarded<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(work))
        .unwrap_or_else(|_| Err(Error::model("tokenizer.json contradicts itself")))
}

fn unreadable(error: impl std::fmt::Display) -> Error {
    Error::model(format!("tokenizer.json: {}", one_line(error)))
}

/// How a sequence of tokens becomes text.
#[derive(Clone, Debug)]
enum DecodeStyle {
    /// Every character of a token is a byte; the bytes of all tokens are the text's UTF-8.
    Bytes,
    /// The decoder's parts up to `Fuse` turn each token into a piece of text by itself, but for
    /// runs of byte tokens and the space before the first token.
    Pieces(Vec<DecoderWrapper>),
}

impl DecodeStyle {
    fn of(decoder: Option<&DecoderWrapper>) -> Result<Self> {
        let mut parts = Vec::new();
        if let Some(decoder) = decoder {
            flatten(decoder, &mut parts);
        }
        if matches!(parts[..], [DecoderWrapper::ByteLevel(_)]) {
            return Ok(Self::Bytes);
        }
        let mut fused = false;
        for part in &parts {
            let known = match part {
                DecoderWrapper::Fuse(_) => {
                    fused = true;
                    true
                }
                DecoderWrapper::Strip(strip) => strip.start <= 1 && strip.stop == 0,
                DecoderWrapper::Replace(_)
                | DecoderWrapper::ByteFallback(_)
                | DecoderWrapper::Metaspace(_) => !fused,
                _ => false,
            };
            if !known {
                let name = serde_json::to_string(part).map_err(unreadable)?;
                return Err(Error::unsupported(format!(
                    "tokenizer.json: decoder {name} is not supported here; supported are ByteLevel \
                     and sequences of Replace, ByteFallback, Metaspace, Fuse, Strip"
                )));
            }
        }
        Ok(Self::Pieces(parts))
    }

    /// The bytes of one token, and whether it is a fallback byte.
    fn bytes(&self, token: String) -> Result<(Vec<u8>, bool)> {
        let parts = match self {
            Self::Bytes => return Ok((byte_level(&token), false)),
            Self::Pieces(parts) => parts,
        };
        let mut piece = token;
        for part in parts {
            match part {
                DecoderWrapper::ByteFallback(_) => {
                    if let Some(byte) = fallback_byte(&piece) {
                        return Ok((vec![byte], true));
                    }
                }
                DecoderWrapper::Replace(replace) => {
                    piece = replace.decode_chain(vec![piece]).map_err(unreadable)?.concat();
                }
                DecoderWrapper::Metaspace(space) => {
                    piece = piece.replace(space.get_replacement(), " ");
                }
                DecoderWrapper::Fuse(_) => break,
                _ => {}
            }
        }
        Ok((piece.into_bytes(), false))
    }
}

fn flatten(decoder: &DecoderWrapper, parts: &mut Vec<DecoderWrapper>) {
    match decoder {
        DecoderWrapper::Sequence(sequence) => {
            for part in sequence.get_decoders() {
                flatten(part, parts);
            }
        }
        part => parts.push(part.clone()),
    }
}

/// The byte of a token like `<0xE5>`.
fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() != 2 {
        return None;
    }
    u8::from_str_radix(digits, 16).ok()
}

/// The bytes of a token whose characters each stand for a byte (GPT-2's `bytes_to_unicode`); a
/// token with any other character stands for its own UTF-8.
fn byte_level(token: &str) -> Vec<u8> {
    let bytes: Option<Vec<u8>> = token.chars().map(byte_of_char).collect();
    bytes.unwrap_or_else(|| token.as_bytes().to_vec())
}

/// Printable Latin-1 characters are their own byte; the other 68 bytes, in order, are U+0100
/// onward.
fn byte_of_char(letter: char) -> Option<u8> {
    let code = u32::from(letter);
    match code {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => u8::try_from(code).ok(),
        0x100..=0x120 => u8::try_from(code - 0x100).ok(),
        0x121..=0x142 => u8::try_from(code - 0x121 + 0x7f).ok(),
        0x143 => Some(0xad),
        _ => None,
    }
}

const KNOWN: u8 = 1;
const SPECIAL: u8 = 2;
const FALLBACK_BYTE: u8 = 4;

/// Bytes and kind of every id: one allocation for all bytes, about 1 MB for 150,000 tokens.
#[derive(Clone, Debug)]
struct TokenTable {
    bytes: Vec<u8>,
    /// Where the bytes of each id end; they begin where those of the id before end.
    ends: Vec<u32>,
    flags: Vec<u8>,
}

impl TokenTable {
    fn new(inner: &tokenizers::Tokenizer, style: &DecodeStyle) -> Result<Self> {
        let last = inner.get_vocab(true).into_values().max();
        let Some(last) = last else {
            return Err(Error::model("tokenizer.json: the vocabulary is empty"));
        };
        check_id(last)?;
        let added = inner.get_added_vocabulary();
        let mut table = Self { bytes: Vec::new(), ends: Vec::new(), flags: Vec::new() };
        for id in 0..=last {
            let token = added.simple_id_to_token(id).or_else(|| inner.get_model().id_to_token(id));
            let mut flags = 0;
            if let Some(token) = token {
                flags |= KNOWN;
                flags |= if added.is_special_token(&token) { SPECIAL } else { 0 };
                let (bytes, fallback) = style.bytes(token)?;
                flags |= if fallback { FALLBACK_BYTE } else { 0 };
                table.bytes.extend(bytes);
            }
            let end = u32::try_from(table.bytes.len());
            table
                .ends
                .push(end.map_err(|_| Error::model("tokenizer has more than 4 GiB of text"))?);
            table.flags.push(flags);
        }
        Ok(table)
    }

    fn bytes(&self, id: u32) -> &[u8] {
        let Some(end) = self.ends.get(id as usize) else { return &[] };
        let start = (id as usize).checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.bytes[start as usize..*end as usize]
    }

    fn longest(&self) -> usize {
        let ends = self.ends.iter();
        let starts = std::iter::once(&0).chain(&self.ends);
        ends.zip(starts).map(|(end, start)| (end - start) as usize).max().unwrap_or(0)
    }

    fn has(&self, id: u32, flag: u8) -> bool {
        self.flags.get(id as usize).is_some_and(|flags| flags & flag != 0)
    }
}

/// Fails on an id that no real tokenizer has: tables are sized by the largest.
fn check_id(id: u32) -> Result<()> {
    if id <= MAX_TOKEN_ID {
        return Ok(());
    }
    Err(Error::model(format!("tokenizer.json: token id is {id}, limit is {MAX_TOKEN_ID}")))
}

/// Checks what the `tokenizers` crate takes on trust: the size of ids, and that every merge of a
/// BPE model makes a token of the vocabulary.
fn check_model(tokenizer: &Value) -> Result<()> {
    let model = &tokenizer["model"];
    let Value::Object(vocab) = &model["vocab"] else { return Ok(()) };
    for id in vocab.values().filter_map(Value::as_u64) {
        check_id(u32::try_from(id).unwrap_or(u32::MAX))?;
    }
    let Value::Array(merges) = &model["merges"] else { return Ok(()) };
    let prefix = model["continuing_subword_prefix"].as_str().unwrap_or("");
    for merge in merges {
        let pair = match merge {
            Value::String(line) => line.split_once(' '),
            Value::Array(pair) => {
                pair.first().and_then(Value::as_str).zip(pair.get(1).and_then(Value::as_str))
            }
            _ => None,
        };
        let made =
            pair.and_then(|(left, right)| Some(format!("{left}{}", right.strip_prefix(prefix)?)));
        // A `#version` line heads the merges of old files; the crate skips it.
        let is_comment = merge.as_str().is_some_and(|line| line.starts_with("#version"));
        if !is_comment && !made.is_some_and(|made| vocab.contains_key(&made)) {
            return Err(Error::model(format!(
                "tokenizer.json: merge {merge} makes no token of the vocabulary"
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_stand_for_bytes_as_in_gpt2() {
        let mut seen = [false; 256];
        let alphabet = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet();
        for letter in &alphabet {
            seen[byte_of_char(*letter).unwrap() as usize] = true;
        }
        assert_eq!(alphabet.len(), 256);
        assert!(seen.iter().all(|seen| *seen));
        assert_eq!(byte_level("ĠaĊ"), b" a\n");
        assert_eq!(byte_level("ÃĦ"), "Ä".as_bytes());
        assert_eq!(byte_level("数"), "数".as_bytes(), "outside the alphabet: its own UTF-8");
        for code in (0..0x400).filter_map(char::from_u32) {
            assert_eq!(byte_of_char(code).is_some(), alphabet.contains(&code), "{code:?}");
        }
    }

    #[test]
    fn hostile_files_are_errors() {
        let bpe = |vocab: &str, merges: &str| {
            format!(
                r#"{{"version":"1.0","decoder":null,"model":{{"type":"BPE","vocab":{vocab},"merges":{merges}}}}}"#
            )
        };
        let cases = [
            ("{".to_owned(), "tokenizer.json: EOF while parsing"),
            ("{}".to_owned(), "tokenizer.json:"),
            (bpe("{}", "[]"), "tokenizer.json: the vocabulary is empty"),
            (bpe(r#"{"a":0,"b":1}"#, r#"["a b"]"#), "tokenizer.json: merge \"a b\" makes no token"),
            (bpe(r#"{"a":0}"#, r#"[["a"]]"#), "tokenizer.json: merge [\"a\"] makes no token"),
            (bpe(r#"{"a":4294967295}"#, "[]"), "tokenizer.json: token id is 4294967295, limit is 4194303"),
            (
                r#"{"version":"1.0","decoder":{"type":"WordPiece","prefix":"\#\#","cleanup":true},"model":
                {"type":"WordLevel","vocab":{"a":0},"unk_token":"a"}}"#.replace("\\#", "#"),
                "tokenizer.json: decoder {\"type\":\"WordPiece\"",
            ),
        ];
        for (json, expected) in cases {
            let error = Tokenizer::from_json_bytes(json.as_bytes()).unwrap_err().to_string();
            assert!(error.starts_with(expected), "{json}\n{error}");
            assert!(!error.contains('\n'), "{error}");
        }
    }

    /// The post-processor puts a token before a text that it does not say the id of.
    #[test]
    fn a_file_that_fails_only_in_use_is_an_error_then() {
        let json = br#"{"version":"1.0","decoder":null,"model":{"type":"WordLevel","vocab":{"a":0},"unk_token":"a"},
            "post_processor":{"type":"TemplateProcessing","single":[{"SpecialToken":{"id":"<q>","type_id":0}},
            {"Sequence":{"id":"A","type_id":0}}],"pair":[{"Sequence":{"id":"A","type_id":0}},
            {"Sequence":{"id":"B","type_id":0}}],"special_tokens":{}}}"#;
        let tokenizer = Tokenizer::from_json_bytes(json).unwrap();
        let error = tokenizer.encode("a", AddSpecial::Yes).unwrap_err();
        assert_eq!(error.to_string(), "tokenizer.json contradicts itself");
        assert_eq!(tokenizer.encode("a", AddSpecial::No).unwrap(), [0]);
    }

    #[test]
    fn config_must_name_known_tokens() {
        let json = br#"{"version":"1.0","decoder":null,"model":{"type":"WordLevel","vocab":{"a":0,"b":1},"unk_token":"a"}}"#;
        let tokenizer = Tokenizer::from_json_bytes(json).unwrap();
        let config = |text: &str| TokenizerConfig::from_json_bytes(text.as_bytes()).unwrap();
        let error = tokenizer.clone().with_config(config(r#"{"eos_token":"</s>"}"#)).unwrap_err();
        assert_eq!(error.to_string(), "eos_token \"</s>\" is not in the tokenizer's vocabulary");
        let mut tokenizer = tokenizer.with_config(config(r#"{"eos_token":"b"}"#)).unwrap();
        assert_eq!((tokenizer.bos_id(), tokenizer.eos_id()), (None, Some(1)));
        tokenizer.add_eos(0);
        tokenizer.add_eos(1);
        assert_eq!(tokenizer.eos_ids(), [1, 0]);
        assert_eq!(tokenizer.token_bytes(1), b"b");
        assert_eq!(tokenizer.token_bytes(2), b"");
        assert_eq!(tokenizer.vocab_size(), 2);
    }
    /// What transformers 4 makes of the flags: `LlamaTokenizerFast` replaces the post-processor, others keep it.
    #[test]
    fn flags_of_llamas_tokenizers_say_what_is_put_around_a_text() {
        let encode = |around: &str, config: &str| {
            let json = format!(
                r#"{{"version":"1.0","decoder":null,"post_processor":{around},"model":{{"type":"WordLevel",
                "vocab":{{"a":0,"<s>":1,"</s>":2}},"unk_token":"a"}}}}"#
            );
            let config = TokenizerConfig::from_json_bytes(config.as_bytes()).unwrap();
            let tokenizer = Tokenizer::from_json_bytes(json.as_bytes()).unwrap();
            let tokenizer = tokenizer.with_config(config.clone()).unwrap();
            let ids = tokenizer.encode("a", AddSpecial::Yes).unwrap();
            assert_eq!(tokenizer.encode("a", AddSpecial::No).unwrap(), [0]);
            // A checkpoint that is written says the same.
            let again =
                Tokenizer::from_json_bytes(tokenizer.to_json().unwrap().as_bytes()).unwrap();
            let again = again.with_config(config).unwrap();
            assert_eq!(again.encode("a", AddSpecial::Yes).unwrap(), ids);
            ids
        };
        let config = |class: &str, flags: &str| {
            format!(
                r#"{{"tokenizer_class":"{class}","bos_token":"<s>","eos_token":"</s>"{flags}}}"#
            )
        };
        let with_bos = serde_json::to_string(&put_around(Some(("<s>", 1)), None).unwrap()).unwrap();
        let cases: [(&str, &str, &str, &[u32]); 10] = [
            ("LlamaTokenizerFast", "null", "", &[0]),
            ("LlamaTokenizerFast", "null", r#","add_bos_token":true"#, &[1, 0]),
            ("LlamaTokenizer", "null", r#","add_bos_token":true,"add_eos_token":true"#, &[1, 0, 2]),
            ("CodeLlamaTokenizer", "null", r#","add_eos_token":true"#, &[1, 0, 2]),
            ("PreTrainedTokenizerFast", "null", r#","add_bos_token":true"#, &[0]),
            ("LlamaTokenizerFast", &with_bos, "", &[1, 0]),
            ("LlamaTokenizerFast", &with_bos, r#","add_bos_token":null"#, &[1, 0]),
            ("LlamaTokenizerFast", &with_bos, r#","add_bos_token":false"#, &[0]),
            ("LlamaTokenizerFast", &with_bos, r#","add_bos_token":true"#, &[1, 0]),
            ("Qwen2Tokenizer", &with_bos, r#","add_bos_token":false"#, &[1, 0]),
        ];
        for (class, around, flags, expected) in cases {
            assert_eq!(encode(around, &config(class, flags)), expected, "{class} {flags}");
        }
        let nameless = r#"{"tokenizer_class":"LlamaTokenizerFast","add_bos_token":true}"#;
        assert_eq!(encode(&with_bos, nameless), [1, 0], "no name for what is to be added");
    }
}
