//! Tool calls in the text of an answer: Hermes' and Qwen's form, read while it comes.
//!
//! What precedes the first call is content. A call whose object begins with its name and goes on with
//! its arguments is told piece by piece; any other is told at its end, and what is no call after all
//! is content as it was written.

use serde::Serialize;
use serde_json::Value;

const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";

/// A piece of a call, as OpenAI's streams have it; whole calls are made of them.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct CallDelta {
    index: usize,
    /// Given by the first piece of a call.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    r#type: Option<&'static str>,
    pub(crate) function: FunctionDelta,
}

/// What a piece says of the function.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct FunctionDelta {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) name: Option<String>,
    pub(crate) arguments: String,
}

/// What a piece of text amounts to.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Parsed {
    pub(crate) content: String,
    pub(crate) calls: Vec<CallDelta>,
}

/// A whole call.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct Call {
    id: String,
    r#type: &'static str,
    function: FunctionDelta,
}

/// Reads the text of one choice.
#[derive(Clone, Debug)]
pub(crate) struct CallParser {
    /// Begins the ids of the calls.
    id: String,
    /// Calls that are told; the rest of the text is skipped after them.
    most: usize,
    /// Text that is not settled yet.
    held: String,
    state: State,
    calls: usize,
}

#[derive(Clone, Debug, PartialEq)]
enum State {
    /// Outside of calls.
    Content,
    /// After `<tool_call>`; nothing of the call has been told.
    Head,
    /// Inside arguments that are told as they come.
    Arguments(Nesting),
    /// After the arguments, before `</tool_call>`.
    Tail,
}

/// Where a JSON value that is being read stands.
#[derive(Clone, Debug, Default, PartialEq)]
struct Nesting {
    depth: usize,
    quoted: bool,
    escaped: bool,
}

impl CallParser {
    /// A parser whose calls have ids that begin with `id`; tells at most `most` of them.
    pub(crate) fn new(id: String, most: usize) -> Self {
        Self { id, most, held: String::new(), state: State::Content, calls: 0 }
    }

    /// Whether a call has been told.
    pub(crate) fn has_calls(&self) -> bool {
        self.calls > 0
    }

    /// Takes in more text.
    pub(crate) fn push(&mut self, text: &str) -> Parsed {
        self.held.push_str(text);
        let mut parsed = Parsed::default();
        while self.step(&mut parsed) {}
        parsed
    }

    /// Takes in the end of the text.
    pub(crate) fn finish(&mut self, text: &str) -> Parsed {
        let mut parsed = self.push(text);
        if self.state == State::Head {
            if !self.tell_whole(&mut parsed) {
                parsed.content.push_str(OPEN);
                parsed.content.push_str(&self.held);
            }
        } else if self.state == State::Content {
            // White space between calls is nobody's.
            if self.calls == 0 || !self.held.trim().is_empty() {
                parsed.content.push_str(&self.held);
            }
        }
        self.held.clear();
        parsed
    }

    /// Settles some of the held text; false when that takes more of it.
    fn step(&mut self, parsed: &mut Parsed) -> bool {
        match &mut self.state {
            State::Content => self.content(parsed),
            State::Head => self.head(parsed),
            State::Arguments(nesting) => {
                let Some(end) = nesting.end(&self.held) else {
                    let rest = std::mem::take(&mut self.held);
                    self.tell(rest, parsed);
                    return false;
                };
                let rest = self.held.split_off(end);
                let last = std::mem::replace(&mut self.held, rest);
                self.tell(last, parsed);
                self.state = State::Tail;
                true
            }
            State::Tail => {
                let Some(at) = self.held.find(CLOSE) else { return false };
                self.held.drain(..at + CLOSE.len());
                self.state = State::Content;
                true
            }
        }
    }

    fn content(&mut self, parsed: &mut Parsed) -> bool {
        if let Some(at) = self.held.find(OPEN) {
            parsed.content.push_str(self.held[..at].trim_end());
            self.held.drain(..at + OPEN.len());
            self.state = State::Head;
            return true;
        }
        // What could be the beginning of a call, and the white space before it, is not settled.
        let may_open = |i: &usize| OPEN.starts_with(&self.held[*i..]);
        let ends = self.held.char_indices().map(|(i, _)| i);
        let from = self.held.len().saturating_sub(OPEN.len());
        let open = ends.filter(|i| *i >= from).find(may_open).unwrap_or(self.held.len());
        let settled = self.held[..open].trim_end().len();
        parsed.content.extend(self.held.drain(..settled));
        false
    }

    fn head(&mut self, parsed: &mut Parsed) -> bool {
        if let Some((name, at)) = canonical(&self.held) {
            self.held.drain(..at);
            self.open(name, String::new(), parsed);
            self.state = State::Arguments(Nesting::default());
            return true;
        }
        let Some(at) = self.held.find(CLOSE) else { return false };
        let rest = self.held.split_off(at);
        if !self.tell_whole(parsed) {
            parsed.content.push_str(&format!("{OPEN}{}{CLOSE}", self.held));
        }
        self.held = rest[CLOSE.len()..].to_owned();
        self.state = State::Content;
        true
    }

    /// Tells the call that the held text spells as a whole; false when it spells none.
    fn tell_whole(&mut self, parsed: &mut Parsed) -> bool {
        let Ok(value) = serde_json::from_str::<Value>(&self.held) else { return false };
        let Some(name) = value.get("name").and_then(Value::as_str) else { return false };
        let arguments = match value.get("arguments").or_else(|| value.get("parameters")) {
            Some(Value::String(text)) => text.clone(),
            Some(other) => other.to_string(),
            None => "{}".to_owned(),
        };
        self.open(name.to_owned(), arguments, parsed);
        true
    }

    /// Counts a call and tells its beginning, unless there have been as many as may be.
    fn open(&mut self, name: String, arguments: String, parsed: &mut Parsed) {
        let index = self.calls;
        if index < self.most {
            parsed.calls.push(CallDelta {
                index,
                id: Some(format!("call_{}_{index}", self.id)),
                r#type: Some("function"),
                function: FunctionDelta { name: Some(name), arguments },
            });
        }
        self.calls += 1;
    }

    /// Tells a piece of the arguments of the call that is being read.
    fn tell(&self, arguments: String, parsed: &mut Parsed) {
        let index = self.calls - 1;
        if arguments.is_empty() || index >= self.most {
            return;
        }
        // Clients that accumulate a stream expect one entry of a call in each of its pieces.
        if let Some(last) = parsed.calls.last_mut().filter(|last| last.index == index) {
            last.function.arguments.push_str(&arguments);
            return;
        }
        let function = FunctionDelta { name: None, arguments };
        parsed.calls.push(CallDelta { index, id: None, r#type: None, function });
    }
}

impl Nesting {
    /// Where the value that goes on in `text` ends; `None` when that is further on.
    fn end(&mut self, text: &str) -> Option<usize> {
        for (at, byte) in text.bytes().enumerate() {
            if self.quoted {
                match byte {
                    _ if self.escaped => self.escaped = false,
                    b'\\' => self.escaped = true,
                    b'"' => self.quoted = false,
                    _ => {}
                }
                continue;
            }
            match byte {
                b'"' => self.quoted = true,
                b'{' | b'[' => self.depth += 1,
                b'}' | b']' => self.depth = self.depth.saturating_sub(1),
                _ => {}
            }
            if self.depth == 0 {
                return Some(at + 1);
            }
        }
        None
    }
}

/// The name of a call that begins `{"name": "...", "arguments": {`, and where its arguments begin.
fn canonical(text: &str) -> Option<(String, usize)> {
    let rest = after(text, "{")?;
    let rest = after(rest, "\"name\"")?;
    let rest = after(rest, ":")?;
    let rest = after(rest, "\"")?;
    let (name, rest) = rest.split_once('"')?;
    let rest = after(rest, ",")?;
    let rest = after(rest, "\"arguments\"")?;
    let rest = after(rest, ":")?.trim_start();
    let plain = rest.starts_with('{') && !name.contains('\\');
    plain.then(|| (name.to_owned(), text.len() - rest.len()))
}

fn after<'a>(text: &'a str, what: &str) -> Option<&'a str> {
    text.trim_start().strip_prefix(what)
}

/// Content and calls of a whole text.
pub(crate) fn whole(mut parser: CallParser, text: &str) -> (String, Vec<Call>) {
    let parsed = parser.finish(text);
    let mut calls: Vec<Call> = Vec::new();
    for delta in parsed.calls {
        match (delta.id, calls.last_mut()) {
            (Some(id), _) => calls.push(Call { id, r#type: "function", function: delta.function }),
            (None, Some(last)) => last.function.arguments.push_str(&delta.function.arguments),
            (None, None) => {}
        }
    }
    (parsed.content, calls)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn calls(text: &str) -> (String, Vec<(String, String)>) {
        let (content, calls) = whole(CallParser::new("x".to_owned(), 9), text);
        let calls = calls.into_iter().map(|c| (c.function.name.unwrap(), c.function.arguments));
        (content, calls.collect())
    }

    /// The same text in pieces of `len` bytes.
    fn pieces(text: &str, len: usize) -> (String, Vec<(String, String)>) {
        let mut parser = CallParser::new("x".to_owned(), 9);
        let (mut content, mut calls) = (String::new(), Vec::<(String, String)>::new());
        let mut take = |parsed: Parsed| {
            content.push_str(&parsed.content);
            assert!(parsed.calls.windows(2).all(|two| two[0].index < two[1].index), "{parsed:?}");
            for delta in parsed.calls {
                if let Some(name) = delta.function.name {
                    assert_eq!((delta.index, delta.id.is_some()), (calls.len(), true));
                    calls.push((name, String::new()));
                }
                calls[delta.index].1.push_str(&delta.function.arguments);
            }
        };
        for piece in text.as_bytes().chunks(len) {
            take(parser.push(std::str::from_utf8(piece).unwrap()));
        }
        take(parser.finish(""));
        (content, calls)
    }

    #[test]
    fn whole_and_in_pieces_are_the_same() {
        let call = |name: &str, arguments: &str| (name.to_owned(), arguments.to_owned());
        let one = "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"a\": \"}\\\"]\", \"b\": [1]}}\n</tool_call>";
        let args = "{\"a\": \"}\\\"]\", \"b\": [1]}";
        let cases = [
            (one.to_owned(), "", vec![call("f", args)]),
            (format!("I look.\n{one}\n{one}\n"), "I look.", vec![call("f", args), call("f", args)]),
            ("a < b <tool".to_owned(), "a < b <tool", vec![]),
            ("<tool_call>no</tool_call> x".to_owned(), "<tool_call>no</tool_call> x", vec![]),
            ("<tool_call>{\"name\": \"f\"".to_owned(), "<tool_call>{\"name\": \"f\"", vec![]),
            (
                "<tool_call>{\"arguments\": \"{}\", \"name\": \"g\"}</tool_call>".to_owned(),
                "",
                vec![call("g", "{}")],
            ),
            ("plain text \n".to_owned(), "plain text \n", vec![]),
        ];
        for (text, content, expected) in cases {
            let want = (content.to_owned(), expected);
            assert_eq!(calls(&text), want, "{text}");
            for len in [1, 2, 3, 7, text.len()] {
                assert_eq!(pieces(&text, len), want, "{text} in pieces of {len}");
            }
        }
    }

    #[test]
    fn a_limit_of_one_tells_one() {
        let one = "<tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_call>";
        let (_, calls) = whole(CallParser::new("x".to_owned(), 1), &format!("{one}{one}"));
        assert_eq!(calls.len(), 1);
        let json = serde_json::to_value(&calls[0]).unwrap();
        let function = json!({"name": "f", "arguments": "{}"});
        assert_eq!(json, json!({"id": "call_x_0", "type": "function", "function": function}));
    }
}
