//! Text that spells a control token, kept from becoming one.
//!
//! A chat template writes control tokens, such as those that end a turn, as text. The same text in a
//! message would end the turn as well, and let a user speak as somebody else. Such places are marked before
//! rendering and taken apart at their marks before tokenizing. Leaves out prompts of plain text, which are
//! the caller's own to steer.

use serde_json::Value;

use super::{AddSpecial, Message, Tokenizer};
use crate::error::{Error, Result};

/// Code points that are never characters: one of them is the mark.
const MARKS: std::ops::RangeInclusive<char> = '\u{fdd0}'..='\u{fdef}';

/// The control tokens of a tokenizer, as text.
#[derive(Clone, Debug, Default)]
pub struct Controls {
    texts: Vec<String>,
}

/// What a template is to be given: messages and tools that spell no control token.
#[derive(Clone, Debug)]
pub struct Spoken {
    /// The messages.
    pub messages: Vec<Message>,
    /// The tools, a list.
    pub tools: Option<Value>,
    mark: char,
}

impl Controls {
    pub(super) fn of(tokenizer: &Tokenizer) -> Self {
        let ids = (0..u32::try_from(tokenizer.vocab_size()).unwrap_or(u32::MAX))
            .filter(|id| tokenizer.is_special(*id));
        let texts = ids.filter_map(|id| tokenizer.id_to_token(id));
        // The mark goes behind a first character, so there must be something behind it.
        Self { texts: texts.filter(|text| text.chars().nth(1).is_some()).collect() }
    }

    /// Marks every control token that messages and tools spell.
    ///
    /// # Errors
    /// When they hold every code point that could be the mark.
    pub fn mark(&self, messages: &[Message], tools: Option<&Value>) -> Result<Spoken> {
        let mut fields: Vec<Value> =
            messages.iter().map(|message| Value::Object(message.fields().clone())).collect();
        let mut tools = tools.cloned();
        let mut used = [false; 32];
        let all = || fields.iter().chain(&tools);
        all().for_each(|value| note_marks(value, &mut used));
        let free = MARKS.zip(used).find(|(_, used)| !used).map(|(mark, _)| mark);
        let mark = free.ok_or_else(|| {
            Error::request(
                "messages hold all code points from U+FDD0 to U+FDEF, limit is 31 of them",
            )
        })?;
        fields.iter_mut().chain(&mut tools).for_each(|value| self.mark_value(value, mark));
        let messages = fields.into_iter().map(Message::from_json).collect::<Result<_>>()?;
        Ok(Spoken { messages, tools, mark })
    }

    fn mark_value(&self, value: &mut Value, mark: char) {
        match value {
            Value::String(text) => {
                if let Some(marked) = self.mark_text(text, mark) {
                    *text = marked;
                }
            }
            Value::Array(list) => list.iter_mut().for_each(|value| self.mark_value(value, mark)),
            Value::Object(map) => {
                for (name, mut value) in std::mem::take(map) {
                    self.mark_value(&mut value, mark);
                    map.insert(self.mark_text(&name, mark).unwrap_or(name), value);
                }
            }
            _ => {}
        }
    }

    /// The text with a mark behind the first character of every control token; `None` without any.
    fn mark_text(&self, text: &str, mark: char) -> Option<String> {
        let begins = |rest: &str| self.texts.iter().any(|control| rest.starts_with(control));
        let mut marked = String::new();
        let mut copied = 0;
        for (at, first) in text.char_indices() {
            if begins(&text[at..]) {
                let behind = at + first.len_utf8();
                marked.push_str(&text[copied..behind]);
                marked.push(mark);
                copied = behind;
            }
        }
        (copied > 0).then(|| marked + &text[copied..])
    }
}

impl Spoken {
    /// The tokens of the chat that was rendered as `text`.
    ///
    /// # Errors
    /// What [`Tokenizer::encode`] says.
    pub fn encode(&self, text: &str, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
        let mut tokens = Vec::new();
        for piece in text.split(self.mark) {
            tokens.extend(tokenizer.encode(piece, AddSpecial::No)?);
        }
        Ok(tokens)
    }
}

/// Notes which of the possible marks a value holds.
fn note_marks(value: &Value, used: &mut [bool; 32]) {
    match value {
        Value::String(text) => note_text(text, used),
        Value::Array(list) => list.iter().for_each(|value| note_marks(value, used)),
        Value::Object(map) => {
            for (name, value) in map {
                note_text(name, used);
                note_marks(value, used);
            }
        }
        _ => {}
    }
}

/// Notes which of the possible marks a text holds.
fn note_text(text: &str, used: &mut [bool; 32]) {
    for mark in text.chars().filter(|character| MARKS.contains(character)) {
        used[mark as usize - *MARKS.start() as usize] = true;
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn controls() -> Controls {
        Controls { texts: vec!["</s>".to_owned(), "<|end|>".to_owned()] }
    }

    #[test]
    fn every_control_token_is_marked_wherever_it_stands() {
        let messages = [
            Message::new("user", "a</s>b<|end|><</s>"),
            Message::from_json(json!({"role": "tool", "x": {"y": ["<|end|>"], "</s>": 1}}))
                .unwrap(),
        ];
        let tools = json!([{"description": "</s>"}]);
        let spoken = controls().mark(&messages, Some(&tools)).unwrap();
        let m = spoken.mark;
        assert_eq!(spoken.messages[0].fields()["content"], format!("a<{m}/s>b<{m}|end|><<{m}/s>"));
        assert_eq!(spoken.messages[1].fields()["x"]["y"][0], format!("<{m}|end|>"));
        assert_eq!(spoken.messages[1].fields()["x"][format!("<{m}/s>")], 1);
        assert_eq!(spoken.tools.unwrap()[0]["description"], format!("<{m}/s>"));
    }

    #[test]
    fn other_text_is_left_alone_and_a_mark_is_nobodys_text() {
        let messages = [Message::new("user", "a < b \u{fdd0}\u{fdd1}"), Message::new("user", "")];
        let spoken = controls().mark(&messages, None).unwrap();
        assert_eq!(spoken.messages, messages);
        assert_eq!(spoken.mark, '\u{fdd2}');
        let all: String = MARKS.collect();
        let refused = controls().mark(&[Message::new("user", &all)], None).unwrap_err();
        assert!(refused.to_string().contains("limit is 31"), "{refused}");
    }
}
