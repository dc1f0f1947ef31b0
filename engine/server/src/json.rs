//! A request's body as JSON, looked through before anything of it is kept: what it lists cannot take memory.
//!
//! Fields that hold lists have a limit of entries each; what is beyond it is counted and no more. A key that
//! comes twice in one object is an error. Leaves out what the fields mean.

use std::cell::RefCell;
use std::collections::HashSet;
use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use crate::fields::{BadField, kind};
use crate::params::{MAX_BIASES, MAX_MESSAGES, MAX_STOP_TOKENS, MAX_STOPS, at_most};

/// Most values a body may hold, those within others counted too.
const MAX_VALUES: usize = 1 << 20;
/// Longest key that an error repeats, in characters.
const MAX_KEY_CHARS: usize = 64;

/// Most entries that the value of a field may list.
fn limit(name: &str) -> usize {
    match name {
        "stop" => MAX_STOPS,
        "stop_token_ids" => MAX_STOP_TOKENS,
        "logit_bias" => MAX_BIASES,
        "messages" => MAX_MESSAGES,
        _ => usize::MAX,
    }
}

/// The members of the object that `json` spells.
///
/// # Errors
/// When `json` is not JSON, has a key twice (both with line and column), is not an object, or lists more
/// than its fields may hold.
pub(crate) fn object(json: &[u8]) -> Result<Map<String, Value>, BadField> {
    let bad = |error| BadField::body(format!("body is not valid JSON: {error}"));
    let reading = Reading::default();
    let mut deserializer = serde_json::Deserializer::from_slice(json);
    Node { reading: &reading, name: None, depth: 0 }
        .deserialize(&mut deserializer)
        .and_then(|()| deserializer.end())
        .map_err(bad)?;
    if let Some(bad) = reading.state.into_inner().bad {
        return Err(bad);
    }
    match serde_json::from_slice(json).map_err(bad)? {
        Value::Object(map) => Ok(map),
        other => Err(BadField::body(format!("body is {}, expected an object", kind(&other)))),
    }
}

/// What the nodes of one body share.
#[derive(Default)]
struct Reading {
    state: RefCell<State>,
}

#[derive(Default)]
struct State {
    values: usize,
    /// The first list that is too long.
    bad: Option<BadField>,
}

impl Reading {
    /// Counts a value in; false when the rest is only to be passed over.
    fn goes_on(&self, name: Option<&str>) -> bool {
        let mut state = self.state.borrow_mut();
        if state.bad.is_some() {
            return false;
        }
        state.values += 1;
        if state.values > MAX_VALUES {
            let message = format!("body has more than {MAX_VALUES} values");
            let param = name.map(str::to_owned);
            state.bad = Some(BadField { param, message, code: "invalid_value" });
            return false;
        }
        true
    }
}

/// A value still to be read.
#[derive(Clone, Copy)]
struct Node<'a> {
    reading: &'a Reading,
    /// The field of the body that it belongs to.
    name: Option<&'a str>,
    /// Objects and arrays around it.
    depth: usize,
}

impl<'a> Node<'a> {
    /// Most entries of this value. The parameters of `sampling_params` are those of a body.
    fn limit(self) -> usize {
        match (self.name, self.depth) {
            (Some(name), 1) => limit(name),
            _ => usize::MAX,
        }
    }

    /// The value of `key` within this one.
    fn member<'b>(self, key: &'b str) -> Node<'b>
    where
        'a: 'b,
    {
        match self.name {
            Some("sampling_params") if self.depth == 1 => Node { name: Some(key), ..self },
            Some(_) => Node { depth: self.depth + 1, ..self },
            None => Node { name: Some(key), depth: 1, ..self },
        }
    }

    fn check(self, entries: usize) {
        if let Err(bad) = at_most(self.name.unwrap_or_default(), entries, self.limit()) {
            self.reading.state.borrow_mut().bad.get_or_insert(bad);
        }
    }
}

impl<'de> DeserializeSeed<'de> for Node<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        if self.reading.goes_on(self.name) {
            deserializer.deserialize_any(self)
        } else {
            deserializer.deserialize_ignored_any(IgnoredAny).map(|_| ())
        }
    }
}

impl<'de> Visitor<'de> for Node<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_unit<E: Error>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_bool<E: Error>(self, _value: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E: Error>(self, _value: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E: Error>(self, _value: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E: Error>(self, _value: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E: Error>(self, _value: &str) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<(), A::Error> {
        let mut entries = 0;
        let inner = Self { depth: self.depth + 1, ..self };
        while if entries < self.limit() {
            seq.next_element_seed(inner)?.is_some()
        } else {
            seq.next_element::<IgnoredAny>()?.is_some()
        } {
            entries += 1;
        }
        self.check(entries);
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut object: A) -> Result<(), A::Error> {
        let (mut keys, mut entries) = (HashSet::new(), 0);
        loop {
            if entries < self.limit() {
                let Some(key) = object.next_key::<String>()? else { break };
                if keys.contains(&key) {
                    let shown: String = key.chars().take(MAX_KEY_CHARS).collect();
                    return Err(A::Error::custom(format_args!("key {shown:?} comes twice")));
                }
                object.next_value_seed(self.member(&key))?;
                keys.insert(key);
            } else if object.next_entry::<IgnoredAny, IgnoredAny>()?.is_none() {
                break;
            }
            entries += 1;
        }
        self.check(entries);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn bodies_are_read_as_they_are() {
        let body = json!({"a": [1, -2, 3.5, null, true, "x", {"b": {"c": []}}], "d": "\u{1f600}",
            "stop": vec!["s"; MAX_STOPS], "sampling_params": {"n": 1}, "e": u64::MAX});
        let read = object(body.to_string().as_bytes()).unwrap();
        assert_eq!(Value::Object(read), body);
    }

    #[test]
    fn a_key_comes_once() {
        for (text, key) in [(r#"{"n": 1, "n": 1}"#, "n"), (r#"{"a": [{"b": 1, "b": 2}]}"#, "b")] {
            let bad = object(text.as_bytes()).unwrap_err();
            let expected =
                format!("body is not valid JSON: key {key:?} comes twice at line 1 column");
            assert!(bad.message.starts_with(&expected), "{}", bad.message);
        }
    }

    #[test]
    fn what_is_too_long_is_counted_and_not_kept() {
        let stops = json!({"stop": vec!["s"; 100_000]});
        let bias: Map<_, _> = (0..5000).map(|i| (i.to_string(), json!(1))).collect();
        let cases = [
            (stops.clone(), "stop has 100000 entries, limit is 64"),
            (json!({ "sampling_params": stops }), "stop has 100000 entries, limit is 64"),
            (json!({ "logit_bias": bias }), "logit_bias has 5000 entries, limit is 1024"),
            (
                json!({"messages": vec![json!({}); 5000], "stop": []}),
                "messages has 5000 entries, limit is 4096",
            ),
        ];
        for (body, message) in cases {
            let bad = object(body.to_string().as_bytes()).unwrap_err();
            assert_eq!(bad.message, message);
            assert_eq!(bad.param.as_deref(), message.split(' ').next());
        }
        let many = format!(r#"{{"prompt": [{}1]}}"#, "1,".repeat(MAX_VALUES));
        let bad = object(many.as_bytes()).unwrap_err();
        assert_eq!(bad.param.as_deref(), Some("prompt"));
        assert_eq!(bad.message, "body has more than 1048576 values");
        // A stray word is one even behind a list that is too long.
        let cut = format!(r#"{{"stop": [{}"#, r#""x","#.repeat(100));
        assert_eq!(object(cut.as_bytes()).unwrap_err().code, "invalid_json");
    }
}
