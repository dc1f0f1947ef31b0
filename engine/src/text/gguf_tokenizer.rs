//! A tokenizer from GGUF metadata (`tokenizer.ggml.*`): byte-level BPE.
//!
//! What GGUF leaves unsaid is how text is split before BPE; it only names the rule in
//! `tokenizer.ggml.pre`. The rules here are those of the models' own `tokenizer.json` files. An
//! unknown name is an error: a wrong split gives other tokens without any sign. Left out:
//! SentencePiece (`llama`, `t5`), WordPiece (`bert`) and RWKV vocabularies.

use std::collections::HashMap;

use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use tokenizers::PreTokenizerWrapper;
use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::{AddedToken, DecoderWrapper, NormalizerWrapper, PostProcessorWrapper};

use super::tokenizer::put_around;
use super::{Tokenizer, TokenizerConfig, one_line};
use crate::error::{Error, Result};
use crate::model::gguf::Gguf;

/// Values of `tokenizer.ggml.pre` that are known.
pub const PRE_TOKENIZERS: [&str; 9] = [
    "gpt-2",
    "phi-2",
    "smollm",
    "starcoder",
    "llama-bpe",
    "llama3",
    "llama-v3",
    "qwen2",
    "deepseek-r1-qwen",
];

const LLAMA3_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2_SPLIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Token types of GGUF that mean something here.
const TYPE_UNKNOWN: i32 = 2;
const TYPE_CONTROL: i32 = 3;
const TYPE_USER_DEFINED: i32 = 4;
const TYPE_UNUSED: i32 = 5;

/// The tokenizer's part of GGUF metadata, as stored.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GgufVocab {
    /// `tokenizer.ggml.model`; only `gpt2` is known.
    pub model: String,
    /// `tokenizer.ggml.pre`; one of [`PRE_TOKENIZERS`].
    pub pre: Option<String>,
    /// `tokenizer.ggml.tokens`, by id.
    pub tokens: Vec<String>,
    /// `tokenizer.ggml.merges`, most important first.
    pub merges: Vec<String>,
    /// `tokenizer.ggml.token_type`, by id; empty when absent.
    pub token_types: Vec<i32>,
    /// `tokenizer.ggml.bos_token_id`.
    pub bos: Option<u32>,
    /// `tokenizer.ggml.eos_token_id`.
    pub eos: Option<u32>,
    /// `tokenizer.ggml.eot_token_id`: ends a turn.
    pub eot: Option<u32>,
    /// `tokenizer.ggml.unknown_token_id`.
    pub unk: Option<u32>,
    /// `tokenizer.ggml.padding_token_id`.
    pub pad: Option<u32>,
    /// `tokenizer.ggml.add_bos_token`; when absent, only Llama 3 adds one.
    pub add_bos: Option<bool>,
    /// `tokenizer.ggml.add_eos_token`; when absent, none is added.
    pub add_eos: Option<bool>,
    /// `tokenizer.chat_template`.
    pub chat_template: Option<String>,
}

impl GgufVocab {
    /// Takes the tokenizer's part out of a file's metadata.
    ///
    /// # Errors
    /// When there is no tokenizer, or an entry is of the wrong type.
    pub fn read(gguf: &Gguf) -> Result<Self> {
        let types = match entry(gguf, "tokenizer.ggml.token_type", Gguf::integers)? {
            None => Vec::new(),
            // A number that is no type of token is treated like any unknown type.
            Some(types) => types.iter().map(|kind| i32::try_from(*kind).unwrap_or(0)).collect(),
        };
        let strings = |key: &str| Ok(entry(gguf, key, Gguf::strings)?.unwrap_or_default().to_vec());
        let string = |key: &str| Ok(entry(gguf, key, Gguf::string)?.map(str::to_owned));
        let Some(model) = string("tokenizer.ggml.model")? else {
            return Err(Error::model("tokenizer.ggml.model is missing"));
        };
        Ok(Self {
            model,
            pre: string("tokenizer.ggml.pre")?,
            tokens: strings("tokenizer.ggml.tokens")?,
            merges: strings("tokenizer.ggml.merges")?,
            token_types: types,
            bos: token_id(gguf, "bos")?,
            eos: token_id(gguf, "eos")?,
            eot: token_id(gguf, "eot")?,
            unk: token_id(gguf, "unknown")?,
            pad: token_id(gguf, "padding")?,
            add_bos: entry(gguf, "tokenizer.ggml.add_bos_token", Gguf::boolean)?,
            add_eos: entry(gguf, "tokenizer.ggml.add_eos_token", Gguf::boolean)?,
            chat_template: string("tokenizer.chat_template")?,
        })
    }
}

/// A metadata entry; it may be absent, but not of another type.
fn entry<'a, T>(
    gguf: &'a Gguf,
    key: &str,
    get: impl Fn(&'a Gguf, &str) -> Option<T>,
) -> Result<Option<T>> {
    let value = get(gguf, key);
    if value.is_none() && gguf.metadata(key).is_some() {
        return Err(Error::model(format!("{key} has the wrong type")));
    }
    Ok(value)
}

fn token_id(gguf: &Gguf, name: &str) -> Result<Option<u32>> {
    let key = format!("tokenizer.ggml.{name}_token_id");
    let Some(id) = entry(gguf, &key, Gguf::unsigned)? else { return Ok(None) };
    match u32::try_from(id) {
        // Converters write the largest id for none.
        Ok(u32::MAX) => Ok(None),
        Ok(id) => Ok(Some(id)),
        Err(_) => Err(Error::model(format!("{key} is {id}, limit is {}", u32::MAX))),
    }
}

impl Tokenizer {
    /// Builds the tokenizer that GGUF metadata describes.
    ///
    /// ```
    /// use engine::text::{AddSpecial, GgufVocab, Tokenizer};
    /// let vocab = GgufVocab {
    ///     model: "gpt2".into(),
    ///     pre: Some("gpt-2".into()),
    ///     tokens: ["h", "i", "hi"].map(String::from).to_vec(),
    ///     merges: vec!["h i".into()],
    ///     ..GgufVocab::default()
    /// };
    /// assert_eq!(Tokenizer::from_gguf(vocab)?.encode("hi", AddSpecial::Yes)?, [2]);
    /// # Ok::<(), engine::Error>(())
    /// ```
    ///
    /// # Errors
    /// When the vocabulary is of another kind, splits text by an unknown rule, or contradicts
    /// itself.
    pub fn from_gguf(vocab: GgufVocab) -> Result<Self> {
        if vocab.model != "gpt2" {
            return Err(Error::unsupported(format!(
                "tokenizer.ggml.model is {:?}, supported is \"gpt2\" (byte-level BPE)",
                vocab.model
            )));
        }
        let rule = PreRule::named(vocab.pre.as_deref())?;
        check(&vocab)?;
        let mut inner = tokenizers::Tokenizer::new(bpe(&vocab, &rule)?);
        if let Some(normalizer) = rule.normalizer() {
            inner.with_normalizer(Some(normalizer?)).map_err(unusable)?;
        }
        inner.with_pre_tokenizer(Some(rule.pre_tokenizer()?));
        let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false,
            "trim_offsets": true, "use_regex": true});
        inner.with_decoder(Some(part::<DecoderWrapper>(byte_level)?));
        let ends = Ends::of(&vocab, &rule);
        inner.with_post_processor(Some(ends.post_processor(&vocab)?));
        inner.add_tokens(added_tokens(&vocab)).map_err(unusable)?;
        let mut tokenizer = Self::from_inner(inner)?.with_config(config(&vocab, &ends))?;
        if let Some(eot) = vocab.eot {
            tokenizer.add_eos(eot);
        }
        Ok(tokenizer)
    }
}

/// How text is split before BPE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PreRule {
    Gpt2,
    Smollm,
    Llama3,
    Qwen2,
}

impl PreRule {
    fn named(name: Option<&str>) -> Result<Self> {
        match name {
            Some("gpt-2" | "phi-2") => Ok(Self::Gpt2),
            Some("smollm" | "starcoder") => Ok(Self::Smollm),
            Some("llama-bpe" | "llama3" | "llama-v3") => Ok(Self::Llama3),
            Some("qwen2" | "deepseek-r1-qwen") => Ok(Self::Qwen2),
            Some(other) => Err(Error::unsupported(format!(
                "tokenizer.ggml.pre is {other:?}, supported are {}",
                PRE_TOKENIZERS.join(", ")
            ))),
            None => Err(Error::unsupported(format!(
                "tokenizer.ggml.pre is missing, supported are {}",
                PRE_TOKENIZERS.join(", ")
            ))),
        }
    }

    fn normalizer(self) -> Option<Result<NormalizerWrapper>> {
        (self == Self::Qwen2).then(|| part(json!({"type": "NFC"})))
    }

    fn pre_tokenizer(self) -> Result<PreTokenizerWrapper> {
        let byte_level = |use_regex: bool| {
            json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
                "use_regex": use_regex})
        };
        let split = |pattern: &str| {
            json!({"type": "Sequence", "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false},
                byte_level(false)]})
        };
        part(match self {
            Self::Gpt2 => byte_level(true),
            Self::Smollm => json!({"type": "Sequence", "pretokenizers": [
                {"type": "Digits", "individual_digits": true}, byte_level(true)]}),
            Self::Llama3 => split(LLAMA3_SPLIT),
            Self::Qwen2 => split(QWEN2_SPLIT),
        })
    }
}

/// One part of a `tokenizer.json`.
fn part<T: DeserializeOwned>(json: Value) -> Result<T> {
    serde_json::from_value(json).map_err(unusable)
}

fn unusable(error: impl std::fmt::Display) -> Error {
    Error::model(format!("tokenizer in gguf metadata: {}", one_line(error)))
}

/// Checks lengths and ids; padding is never used, so its id may be anything.
fn check(vocab: &GgufVocab) -> Result<()> {
    let count = vocab.tokens.len();
    let types = vocab.token_types.len();
    if types != 0 && types != count {
        return Err(Error::model(format!(
            "tokenizer.ggml.token_type has {types} entries, tokenizer.ggml.tokens has {count}"
        )));
    }
    let named =
        [("bos", vocab.bos), ("eos", vocab.eos), ("eot", vocab.eot), ("unknown", vocab.unk)];
    for (name, id) in named {
        let Some(id) = id else { continue };
        if id as usize >= count {
            return Err(Error::model(format!(
                "tokenizer.ggml.{name}_token_id is {id}, vocabulary has {count} tokens"
            )));
        }
    }
    Ok(())
}

/// The model: all tokens but the unused rows that only pad the embedding.
fn bpe(vocab: &GgufVocab, rule: &PreRule) -> Result<BPE> {
    let mut ids: HashMap<&str, u32> = HashMap::with_capacity(vocab.tokens.len());
    for (id, token) in (0_u32..).zip(&vocab.tokens) {
        if vocab.token_types.get(id as usize) == Some(&TYPE_UNUSED) {
            continue;
        }
        if let Some(other) = ids.insert(token, id) {
            return Err(unusable(format!("tokens {other} and {id} are both {token:?}")));
        }
    }
    let mut merges = Vec::with_capacity(vocab.merges.len());
    for (index, merge) in vocab.merges.iter().enumerate() {
        // A token may begin with a space only in a damaged file: byte-level writes it as `Ġ`.
        let pair = merge.split_once(' ');
        match pair {
            Some((left, right)) if ids.contains_key(format!("{left}{right}").as_str()) => {
                merges.push((left.to_owned(), right.to_owned()));
            }
            _ => {
                return Err(unusable(format!(
                    "merge {index} {merge:?} makes no token of the vocabulary"
                )));
            }
        }
    }
    let ids: Vocab = ids.into_iter().map(|(token, id)| (token.to_owned(), id)).collect();
    BPE::builder()
        .vocab_and_merges(ids, merges)
        .ignore_merges(*rule == PreRule::Llama3)
        .build()
        .map_err(unusable)
}

/// Tokens that are recognised in text before anything else.
fn added_tokens(vocab: &GgufVocab) -> Vec<AddedToken> {
    let types = vocab.token_types.iter().zip(&vocab.tokens);
    types
        .filter_map(|(kind, token)| {
            let special = match *kind {
                TYPE_UNKNOWN | TYPE_CONTROL => true,
                TYPE_USER_DEFINED => false,
                _ => return None,
            };
            Some(AddedToken::from(token.clone(), special).normalized(false))
        })
        .collect()
}

/// Tokens put around a text.
struct Ends {
    bos: Option<u32>,
    eos: Option<u32>,
}

impl Ends {
    fn of(vocab: &GgufVocab, rule: &PreRule) -> Self {
        let add_bos = vocab.add_bos.unwrap_or(*rule == PreRule::Llama3);
        let add_eos = vocab.add_eos.unwrap_or(false);
        Self { bos: vocab.bos.filter(|_| add_bos), eos: vocab.eos.filter(|_| add_eos) }
    }

    fn post_processor(&self, vocab: &GgufVocab) -> Result<PostProcessorWrapper> {
        if self.bos.is_none() && self.eos.is_none() {
            return part(json!({"type": "ByteLevel", "add_prefix_space": false,
                "trim_offsets": false, "use_regex": true}));
        }
        let named = |id: Option<u32>| id.map(|id| (vocab.tokens[id as usize].as_str(), id));
        put_around(named(self.bos), named(self.eos)).map_err(unusable)
    }
}

/// The `tokenizer_config.json` that says the same as the metadata.
fn config(vocab: &GgufVocab, ends: &Ends) -> TokenizerConfig {
    let mut fields = Map::new();
    fields.insert("add_bos_token".into(), ends.bos.is_some().into());
    fields.insert("add_eos_token".into(), ends.eos.is_some().into());
    fields.insert("add_prefix_space".into(), false.into());
    fields.insert("clean_up_tokenization_spaces".into(), false.into());
    let named = [
        ("bos_token", vocab.bos),
        ("eos_token", vocab.eos),
        ("unk_token", vocab.unk),
        ("pad_token", vocab.pad),
    ];
    for (name, id) in named {
        if let Some(token) = id.and_then(|id| vocab.tokens.get(id as usize)) {
            fields.insert(name.into(), token.clone().into());
        }
    }
    if let Some(template) = &vocab.chat_template {
        fields.insert("chat_template".into(), template.clone().into());
    }
    fields.insert("tokenizer_class".into(), "PreTrainedTokenizerFast".into());
    TokenizerConfig::from_fields(fields)
}
