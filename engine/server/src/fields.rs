//! The fields of a JSON request, taken one by one so that a wrong one can be named.
//!
//! A `null` counts as absent, as in OpenAI's API. What nobody took is left over and can be listed.

use std::fmt;

use serde_json::{Map, Value};

/// A field that cannot be used, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadField {
    /// The field's name; `None` when the body as a whole is at fault.
    pub param: Option<String>,
    /// What is wrong, with the value and the limit.
    pub message: String,
    /// OpenAI's machine-readable code, such as `invalid_value`.
    pub code: &'static str,
}

impl BadField {
    /// A field with a wrong value.
    pub fn new(param: &str, message: impl Into<String>) -> Self {
        Self { param: Some(param.to_owned()), message: message.into(), code: "invalid_value" }
    }

    /// A body that is at fault as a whole.
    pub fn body(message: impl Into<String>) -> Self {
        Self { param: None, message: message.into(), code: "invalid_json" }
    }

    /// The same fault under another code.
    pub(crate) fn with_code(mut self, code: &'static str) -> Self {
        self.code = code;
        self
    }
}

impl fmt::Display for BadField {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for BadField {}

/// The fields of one JSON object that have not been taken yet.
#[derive(Clone, Debug)]
pub struct Fields {
    map: Map<String, Value>,
}

impl Fields {
    /// The fields of the object that `json` spells.
    ///
    /// # Errors
    /// When `json` is not JSON (with line and column), has a key twice, is not an object, or lists more
    /// than its fields may hold.
    pub fn parse(json: &[u8]) -> Result<Self, BadField> {
        crate::json::object(json).map(Self::new)
    }

    /// The fields of `map`.
    pub fn new(map: Map<String, Value>) -> Self {
        Self { map }
    }

    /// Takes a field of any type.
    pub fn take(&mut self, name: &str) -> Option<Value> {
        #[cfg(test)]
        asked::ASKED.with_borrow_mut(|asked| asked.insert(name.to_owned()));
        self.map.shift_remove(name).filter(|value| !value.is_null())
    }

    /// A field of any type, which stays; `null` counts as absent.
    pub(crate) fn peek(&self, name: &str) -> Option<&Value> {
        self.map.get(name).filter(|value| !value.is_null())
    }

    /// Takes a number.
    ///
    /// # Errors
    /// When it is not a number.
    pub fn number(&mut self, name: &str) -> Result<Option<f32>, BadField> {
        self.typed(name, "a number", |value| value.as_f64().map(|number| number as f32))
    }

    /// Takes a whole number.
    ///
    /// # Errors
    /// When it is not a whole number of 64 bits.
    pub fn integer(&mut self, name: &str) -> Result<Option<i64>, BadField> {
        self.typed(name, "a whole number", Value::as_i64)
    }

    /// Takes a count.
    ///
    /// # Errors
    /// When it is not a whole number of at least 0.
    pub fn count(&mut self, name: &str) -> Result<Option<usize>, BadField> {
        self.typed(name, "a whole number of at least 0", |value| {
            value.as_u64().map(|count| usize::try_from(count).unwrap_or(usize::MAX))
        })
    }

    /// Takes a flag.
    ///
    /// # Errors
    /// When it is neither `true` nor `false`.
    pub fn flag(&mut self, name: &str) -> Result<Option<bool>, BadField> {
        self.typed(name, "true or false", Value::as_bool)
    }

    /// Takes a string.
    ///
    /// # Errors
    /// When it is not a string.
    pub fn string(&mut self, name: &str) -> Result<Option<String>, BadField> {
        self.typed(name, "a string", |value| value.as_str().map(str::to_owned))
    }

    /// Takes a list of token ids.
    ///
    /// # Errors
    /// When it is not an array of whole numbers of 32 bits.
    pub fn tokens(&mut self, name: &str) -> Result<Option<Vec<u32>>, BadField> {
        self.typed(name, "an array of token ids", tokens)
    }

    /// Takes an object, as fields of its own.
    ///
    /// # Errors
    /// When it is not an object.
    pub fn object(&mut self, name: &str) -> Result<Option<Self>, BadField> {
        self.typed(name, "an object", |value| value.as_object().cloned().map(Self::new))
    }

    /// The names nobody has taken.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.map.keys().map(String::as_str)
    }

    fn typed<T>(
        &mut self,
        name: &str,
        expected: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<T>, BadField> {
        let Some(value) = self.take(name) else { return Ok(None) };
        match read(&value) {
            Some(read) => Ok(Some(read)),
            None => {
                Err(BadField::new(name, format!("{name} is {}, expected {expected}", show(&value))))
            }
        }
    }
}

/// The token ids that `value` lists.
pub(crate) fn tokens(value: &Value) -> Option<Vec<u32>> {
    let list = value.as_array()?;
    list.iter().map(|token| token.as_u64().and_then(|token| u32::try_from(token).ok())).collect()
}

/// What sort of value it is, with its article.
pub(crate) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

/// A number as it is, anything else by its sort: an error never repeats a caller's text.
fn show(value: &Value) -> String {
    match value {
        Value::Number(number) => number.to_string(),
        other => kind(other).to_owned(),
    }
}

/// Which fields this thread has looked for, so that tests can hold documentation against it.
#[cfg(test)]
pub(crate) mod asked {
    use std::cell::RefCell;
    use std::collections::BTreeSet;

    thread_local! {
        pub(crate) static ASKED: RefCell<BTreeSet<String>> = RefCell::default();
    }

    /// The names that `read` looks for.
    pub(crate) fn by(read: impl FnOnce()) -> BTreeSet<String> {
        ASKED.take();
        read();
        ASKED.take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_type_names_the_field_and_what_was_expected() {
        let mut fields = Fields::parse(br#"{"n": "3", "k": -1, "s": 5, "t": [1, -2]}"#).unwrap();
        let message = |bad: BadField| (bad.param.unwrap(), bad.message);
        let bad = message(fields.count("n").unwrap_err());
        assert_eq!(bad.0, "n");
        assert_eq!(bad.1, "n is a string, expected a whole number of at least 0");
        let bad = message(fields.count("k").unwrap_err());
        assert_eq!(bad.1, "k is -1, expected a whole number of at least 0");
        assert_eq!(message(fields.string("s").unwrap_err()).1, "s is 5, expected a string");
        assert_eq!(
            message(fields.tokens("t").unwrap_err()).1,
            "t is an array, expected an array of token ids"
        );
    }

    #[test]
    fn null_is_absent_and_the_rest_is_listed() {
        let mut fields = Fields::parse(br#"{"seed": null, "zebra": 1, "apple": 2}"#).unwrap();
        assert_eq!(fields.integer("seed").unwrap(), None);
        assert_eq!(fields.names().collect::<Vec<_>>(), ["zebra", "apple"]);
    }

    #[test]
    fn bad_json_says_where() {
        let bad = Fields::parse(b"{\"n\": 1,").unwrap_err();
        assert_eq!(bad.param, None);
        assert_eq!(
            bad.message,
            "body is not valid JSON: EOF while parsing a value at line 1 column 8"
        );
        assert_eq!(
            Fields::parse(b"[]").unwrap_err().message,
            "body is an array, expected an object"
        );
        assert!(Fields::parse(&[0xff, b'{', b'}']).is_err());
    }
}
