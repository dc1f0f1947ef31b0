//! Tokenizers from GGUF metadata, on a small vocabulary.

use super::*;

fn build(pre: &str) -> Tokenizer {
    Tokenizer::from_gguf(small_vocab(pre)).unwrap()
}

fn pieces(tokenizer: &Tokenizer, text: &str) -> Vec<String> {
    let ids = tokenizer.encode(text, AddSpecial::No).unwrap();
    ids.into_iter().map(|id| tokenizer.id_to_token(id).unwrap()).collect()
}

#[test]
fn every_rule_keeps_every_byte() {
    for pre in PRE_TOKENIZERS {
        let tokenizer = build(pre);
        for text in NASTY {
            let ids = tokenizer.encode(text, AddSpecial::No).unwrap();
            let decoded = tokenizer.decode(&ids, SkipSpecial::No).unwrap();
            let bytes: Vec<u8> =
                ids.iter().flat_map(|id| tokenizer.token_bytes(*id)).copied().collect();
            assert_eq!(decoded.as_bytes(), bytes, "{pre}: {text:?}");
            if tokenizer.to_json().unwrap().contains("\"NFC\"") {
                // The rule composes characters; what it makes is stable.
                assert_eq!(tokenizer.encode(&decoded, AddSpecial::No).unwrap(), ids, "{text:?}");
            } else {
                assert_eq!(decoded, text, "{pre}");
            }
        }
    }
}

#[test]
fn rules_split_as_their_models_do() {
    assert_eq!(pieces(&build("gpt-2"), "12 hello"), ["12", "Ġh", "e", "ll", "o"]);
    assert_eq!(pieces(&build("smollm"), "12"), ["1", "2"]);
    assert_eq!(pieces(&build("qwen2"), "12"), ["1", "2"]);
    assert_eq!(pieces(&build("llama-bpe"), "12"), ["12"]);
    assert_eq!(pieces(&build("qwen2"), "e\u{301}"), ["Ã©"], "composed first");
    assert_eq!(pieces(&build("llama-bpe"), "e\u{301}"), ["e", "Ì", "ģ"], "not composed");
}

#[test]
fn special_tokens_are_found_in_text_and_marked() {
    let tokenizer = build("smollm");
    assert_eq!(pieces(&tokenizer, "<|bos|>h<tool><|eos|>"), ["<|bos|>", "h", "<tool>", "<|eos|>"]);
    let (bos, eos) = (tokenizer.bos_id().unwrap(), tokenizer.eos_id().unwrap());
    let tool = tokenizer.token_to_id("<tool>").unwrap();
    assert!(tokenizer.is_special(bos) && tokenizer.is_special(eos) && !tokenizer.is_special(tool));
    assert_eq!(tokenizer.decode(&[bos, tool, eos], SkipSpecial::Yes).unwrap(), "<tool>");
    assert_eq!(tokenizer.decode(&[bos, tool], SkipSpecial::No).unwrap(), "<|bos|><tool>");
    assert_eq!(tokenizer.token_bytes(bos), b"<|bos|>");
    assert_eq!(tokenizer.token_to_id("[PAD]"), None, "unused rows are no tokens");
    assert_eq!(tokenizer.vocab_size(), 269);
    assert_eq!(tokenizer.decode(&[9999], SkipSpecial::Yes).unwrap(), "");
}

#[test]
fn beginning_is_added_where_the_model_wants_it() {
    let encode = |vocab: GgufVocab, add| {
        Tokenizer::from_gguf(vocab).unwrap().encode("h", add).unwrap().len()
    };
    let with = |pre: &str, add_bos| GgufVocab { add_bos, ..small_vocab(pre) };
    assert_eq!(encode(with("smollm", None), AddSpecial::Yes), 1);
    assert_eq!(encode(with("llama-bpe", None), AddSpecial::Yes), 2, "the rule of Llama 3");
    assert_eq!(encode(with("llama-bpe", Some(false)), AddSpecial::Yes), 1);
    assert_eq!(encode(with("gpt-2", Some(true)), AddSpecial::Yes), 2);
    assert_eq!(encode(with("gpt-2", Some(true)), AddSpecial::No), 1);
    let both = GgufVocab { add_eos: Some(true), ..with("gpt-2", Some(true)) };
    let tokenizer = Tokenizer::from_gguf(both).unwrap();
    let ids = tokenizer.encode("h", AddSpecial::Yes).unwrap();
    assert_eq!(
        (ids.first(), ids.last()),
        (tokenizer.bos_id().as_ref(), tokenizer.eos_id().as_ref())
    );
}

#[test]
fn written_files_give_the_same_tokenizer() {
    for pre in PRE_TOKENIZERS {
        let vocab = GgufVocab {
            add_bos: Some(true),
            chat_template: Some("{{ bos_token }}".into()),
            ..small_vocab(pre)
        };
        let tokenizer = Tokenizer::from_gguf(vocab).unwrap();
        let config = tokenizer.tokenizer_config_json();
        let again = Tokenizer::from_json_bytes(tokenizer.to_json().unwrap().as_bytes())
            .unwrap()
            .with_config(TokenizerConfig::from_json_bytes(config.as_bytes()).unwrap())
            .unwrap();
        assert_eq!(again.eos_ids(), tokenizer.eos_ids());
        assert_eq!(again.config(), tokenizer.config());
        for text in NASTY {
            for add in [AddSpecial::Yes, AddSpecial::No] {
                let ids = tokenizer.encode(text, add).unwrap();
                assert_eq!(again.encode(text, add).unwrap(), ids, "{pre}: {text:?}");
            }
        }
    }
}

#[test]
fn turns_end_at_eot_too() {
    let vocab = GgufVocab { eot: Some(3), ..small_vocab("qwen2") };
    let tokenizer = Tokenizer::from_gguf(vocab).unwrap();
    assert_eq!(tokenizer.eos_ids(), [tokenizer.eos_id().unwrap(), 3]);
}

#[test]
fn damaged_metadata_is_an_error() {
    let base = || small_vocab("smollm");
    let cases = [
        (
            GgufVocab { model: "llama".into(), ..base() },
            "tokenizer.ggml.model is \"llama\", supported is \"gpt2\"",
        ),
        (
            GgufVocab { pre: Some("mpt".into()), ..base() },
            "tokenizer.ggml.pre is \"mpt\", supported are gpt-2, phi-2, smollm",
        ),
        (GgufVocab { pre: None, ..base() }, "tokenizer.ggml.pre is missing, supported are gpt-2"),
        (
            GgufVocab { token_types: vec![1; 7], ..base() },
            "tokenizer.ggml.token_type has 7 entries, tokenizer.ggml.tokens has 270",
        ),
        (
            GgufVocab { eos: Some(270), ..base() },
            "tokenizer.ggml.eos_token_id is 270, vocabulary has 270 tokens",
        ),
        (
            GgufVocab { merges: vec!["x y".into()], ..base() },
            "tokenizer in gguf metadata: merge 0 \"x y\" makes no token",
        ),
        (
            GgufVocab { merges: vec!["xy".into()], ..base() },
            "tokenizer in gguf metadata: merge 0 \"xy\" makes no token",
        ),
        (
            GgufVocab { merges: vec!["zz ".into()], ..base() },
            "tokenizer in gguf metadata: merge 0 \"zz \" makes no token",
        ),
        (
            GgufVocab {
                tokens: vec!["a".into(); 2],
                token_types: vec![],
                bos: None,
                eos: None,
                ..base()
            },
            "tokenizer in gguf metadata: tokens 0 and 1 are both \"a\"",
        ),
        (
            GgufVocab {
                tokens: vec![],
                token_types: vec![],
                merges: vec![],
                bos: None,
                eos: None,
                ..base()
            },
            "tokenizer.json: the vocabulary is empty",
        ),
    ];
    for (vocab, expected) in cases {
        let error = Tokenizer::from_gguf(vocab).unwrap_err().to_string();
        assert!(error.starts_with(expected), "{error}\nexpected: {expected}");
    }
    // A merge whose result exists but whose halves do not.
    let tokens = vec!["ab".into()];
    let vocab = GgufVocab {
        tokens,
        merges: vec!["a b".into()],
        token_types: vec![],
        bos: None,
        eos: None,
        ..base()
    };
    assert!(Tokenizer::from_gguf(vocab).is_err());
}

#[test]
fn a_padding_token_may_be_anything() {
    let tokenizer = Tokenizer::from_gguf(GgufVocab { pad: Some(999), ..small_vocab("gpt-2") });
    assert_eq!(tokenizer.unwrap().config().token("pad_token"), None);
}
