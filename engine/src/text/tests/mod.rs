//! Tests of the module as a whole: real models, hostile strings, random ids.

mod chat;
mod detokenizer;
mod gguf;
mod models;

use tokenizers::pre_tokenizers::byte_level::ByteLevel;

use super::*;

/// Strings that break tokenizers: joined emoji, combining marks, mixed line ends, null bytes,
/// four-byte scripts, right-to-left text, look-alikes of special tokens.
const NASTY: [&str; 16] = [
    "",
    " ",
    "  \t \u{a0}\u{3000} ",
    "\r\n\r\n\n\r",
    "a\0b\0\0",
    "👩\u{200d}👩\u{200d}👧\u{200d}👦🏽🇩🇪🏴\u{e0067}\u{e0062}\u{e007f}",
    "e\u{301}\u{323}\u{30a} \u{1100}\u{1161}\u{11a8} ñ n\u{303}",
    "𝔘𝔫𝔦 𐍈 𒀀𒀁 𠜎𠜱",
    "שָׁלוֹם العربية\u{200f} हिन्दी ไทย",
    "\u{feff}\u{fffd}\u{ffff}\u{10ffff}",
    "1234567890 ٣٤٥ ½ Ⅷ 3.14e-10",
    "it's WE'LL don\u{2019}t 'Tis",
    "<|im_start|>user\n<|im_end|><|im_st art|><|endoftext|>",
    "▁▁x ▁<0xE5> Ġ Ċ",
    "fn f<'a>(x: &'a [u8]) -> u8 {\n\t\tx[0]  //  …\n}\n\n\n",
    "ﬁ ﷺ ㎏ Å Å Ω K İ ı ß ẞ",
];

/// A small generator for tests: Knuth's multiplier, upper bits.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 33) as usize % limit
    }
}

/// A byte-level vocabulary: all bytes, some merges (also of parts of characters), control tokens,
/// and one row that only pads.
fn small_vocab(pre: &str) -> GgufVocab {
    let mut alphabet: Vec<char> = ByteLevel::alphabet().into_iter().collect();
    alphabet.sort_unstable();
    let mut tokens: Vec<String> = alphabet.iter().map(char::to_string).collect();
    // `Ã` and `Ģ` are the bytes C3 and A2 or 80; `ðŁ` begins most emoji.
    let merges = ["Ġ h", "h e", "l l", "he ll", "hell o", "Ġ Ġ", "ð Ł", "Ã ©", "1 2", "Ġ Ã"];
    tokens.extend(merges.iter().map(|merge| merge.replace(' ', "")));
    let plain = tokens.len();
    tokens.extend(["<|bos|>", "<|eos|>", "<tool>", "[PAD]"].map(String::from));
    let mut token_types = vec![1; plain];
    token_types.extend([3, 3, 4, 5]);
    let special = |offset: usize| u32::try_from(plain + offset).ok();
    GgufVocab {
        model: "gpt2".into(),
        pre: Some(pre.into()),
        tokens,
        merges: merges.map(String::from).to_vec(),
        token_types,
        bos: special(0),
        eos: special(1),
        ..GgufVocab::default()
    }
}

/// Feeds `ids` one by one.
fn stream(tokenizer: &std::sync::Arc<Tokenizer>, skip: SkipSpecial, ids: &[u32]) -> String {
    let mut detokenizer = Detokenizer::new(std::sync::Arc::clone(tokenizer), skip);
    let mut text = String::new();
    for id in ids {
        text.push_str(detokenizer.push(*id).unwrap());
    }
    text + &detokenizer.finish().unwrap()
}
