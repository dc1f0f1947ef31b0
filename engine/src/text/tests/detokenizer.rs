//! Incremental decoding equals decoding at once, whatever the ids.

use std::sync::Arc;

use serde_json::{Value, json};

use super::*;

/// A tokenizer of the Llama 2 kind: `▁` for space, byte tokens for what is not in the vocabulary.
fn sentence_pieces(decoder: Value) -> Tokenizer {
    let mut tokens = vec!["<unk>".to_owned(), "<s>".to_owned(), "</s>".to_owned()];
    tokens.extend((0..=255_u8).map(|byte| format!("<0x{byte:02X}>")));
    tokens
        .extend(["▁", "▁▁", "▁Hello", "▁w", "orld", "é", "数", "a", "b▁c", "🙂"].map(String::from));
    let vocab: serde_json::Map<String, Value> =
        tokens.into_iter().zip(0..).map(|(token, id): (String, u32)| (token, id.into())).collect();
    let added: Vec<Value> = ["<unk>", "<s>", "</s>"]
        .iter()
        .zip(0..)
        .map(|(content, id)| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": true})
        })
        .collect();
    let file = json!({"version": "1.0", "added_tokens": added, "normalizer": {"type": "Sequence",
        "normalizers": [{"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
        "decoder": decoder, "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": true,
            "byte_fallback": true, "vocab": vocab, "merges": []}});
    Tokenizer::from_json_bytes(file.to_string().as_bytes()).unwrap()
}

fn decoders() -> Vec<(&'static str, Value)> {
    let replace = json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "});
    let (bytes, fuse) = (json!({"type": "ByteFallback"}), json!({"type": "Fuse"}));
    let strip = json!({"type": "Strip", "content": " ", "start": 1, "stop": 0});
    let metaspace = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": false});
    vec![
        ("llama 2", json!({"type": "Sequence", "decoders": [replace, bytes, fuse, strip]})),
        ("gemma", json!({"type": "Sequence", "decoders": [replace, bytes, fuse]})),
        ("metaspace", metaspace.clone()),
        ("bytes and metaspace", json!({"type": "Sequence", "decoders": [bytes, metaspace]})),
        ("none", Value::Null),
    ]
}

/// Random ids, some of them in runs, some of them unknown.
fn random_ids(random: &mut Random, vocab_size: usize, favourites: &[u32]) -> Vec<u32> {
    let length = random.below(24);
    (0..length)
        .map(|_| {
            if random.below(3) > 0 && !favourites.is_empty() {
                favourites[random.below(favourites.len())]
            } else {
                u32::try_from(random.below(vocab_size + 2)).unwrap()
            }
        })
        .collect()
}

fn check(name: &str, tokenizer: Tokenizer, favourites: &[u32], rounds: usize) {
    let tokenizer = Arc::new(tokenizer);
    let seed = 11;
    println!("{name}: seed {seed}");
    let mut random = Random(seed);
    for round in 0..rounds {
        let ids = random_ids(&mut random, tokenizer.vocab_size(), favourites);
        for skip in [SkipSpecial::Yes, SkipSpecial::No] {
            let whole = tokenizer.decode(&ids, skip).unwrap();
            assert_eq!(stream(&tokenizer, skip, &ids), whole, "{name} round {round}: {ids:?}");
        }
    }
}

/// Ids of the bytes of characters, their parts and of things around them.
pub(super) fn byte_ids(tokenizer: &Tokenizer) -> Vec<u32> {
    let bytes =
        [0xf0, 0x9f, 0x99, 0x82, 0xe6, 0x95, 0xb0, 0xc3, 0xa9, 0xed, 0xa0, 0x80, 0xff, b' '];
    (0..tokenizer.vocab_size())
        .filter_map(|id| u32::try_from(id).ok())
        .filter(|id| bytes.iter().any(|byte| tokenizer.token_bytes(*id) == [*byte]))
        .collect()
}

pub(super) fn check_model(name: &str, tokenizer: Tokenizer) {
    let favourites = byte_ids(&tokenizer);
    check(name, tokenizer, &favourites, 2000);
}

#[test]
fn byte_level_streams_exactly() {
    check_model("byte level", Tokenizer::from_gguf(small_vocab("smollm")).unwrap());
}

#[test]
fn sentence_pieces_stream_exactly() {
    for (name, decoder) in decoders() {
        let tokenizer = sentence_pieces(decoder);
        let mut favourites = byte_ids(&tokenizer);
        favourites.extend(259..tokenizer.vocab_size() as u32);
        check(name, tokenizer, &favourites, 3000);
    }
}

#[test]
fn characters_appear_whole() {
    let tokenizer = Arc::new(Tokenizer::from_gguf(small_vocab("smollm")).unwrap());
    let ids = tokenizer.encode("a🙂é", AddSpecial::No).unwrap();
    let mut detokenizer = Detokenizer::new(Arc::clone(&tokenizer), SkipSpecial::Yes);
    let deltas: Vec<String> =
        ids.iter().map(|id| detokenizer.push(*id).unwrap().to_owned()).collect();
    assert_eq!(deltas, ["a", "", "", "🙂", "é"]);
    assert_eq!(detokenizer.finish().unwrap(), "");
    assert_eq!(stream(&tokenizer, SkipSpecial::Yes, &ids[..3]), "a\u{fffd}");
}

#[test]
fn byte_runs_are_held_until_they_end() {
    let tokenizer = Arc::new(sentence_pieces(decoders()[0].1.clone()));
    let id = |token: &str| tokenizer.token_to_id(token).unwrap();
    let ids = ["▁Hello", "<0xC3>", "<0xA9>", "▁w", "orld", "<0x61>", "<0xFF>"].map(id);
    let mut detokenizer = Detokenizer::new(Arc::clone(&tokenizer), SkipSpecial::Yes);
    let deltas: Vec<String> =
        ids.iter().map(|id| detokenizer.push(*id).unwrap().to_owned()).collect();
    assert_eq!(deltas, ["Hello", "", "", "é w", "orld", "", ""]);
    assert_eq!(detokenizer.finish().unwrap(), "\u{fffd}\u{fffd}", "one bad byte spoils its run");
}

#[test]
fn the_space_after_a_prompt_is_kept() {
    let tokenizer = Arc::new(sentence_pieces(decoders()[0].1.clone()));
    let id = |token: &str| tokenizer.token_to_id(token).unwrap();
    let prompt = [id("<s>"), id("▁Hello")];
    let mut detokenizer =
        Detokenizer::after_prompt(Arc::clone(&tokenizer), SkipSpecial::Yes, &prompt);
    assert_eq!(detokenizer.push(id("▁w")).unwrap(), " w");
    let mut fresh = Detokenizer::new(Arc::clone(&tokenizer), SkipSpecial::Yes);
    assert_eq!(fresh.push(id("▁w")).unwrap(), "w");
}

#[test]
fn work_per_token_does_not_grow() {
    let tokenizer = Arc::new(sentence_pieces(decoders()[0].1.clone()));
    let hello = tokenizer.token_to_id("▁Hello").unwrap();
    let mut detokenizer = Detokenizer::new(Arc::clone(&tokenizer), SkipSpecial::Yes);
    let mut bytes = 0;
    for _ in 0..200_000 {
        bytes += detokenizer.push(hello).unwrap().len();
    }
    assert_eq!(bytes, 200_000 * 6 - 1, "quadratic work would not end");
}
