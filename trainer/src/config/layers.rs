//! Lays a file and overrides over defaults, key by key.
//!
//! The defaults, written as a TOML table, say which keys exist and of which type they are: an unknown
//! key is named together with the nearest known one, a value of the wrong type together with the type
//! expected. An integer serves where a number is expected, a text where a list of texts is.

use serde::Serialize;
use serde::de::DeserializeOwned;
use toml::{Table, Value};

use crate::error::{Error, Result};

/// A file and overrides, read but not yet checked against keys.
pub(super) struct Layers {
    file: Table,
    overrides: Vec<(String, String)>,
}

impl Layers {
    /// Reads the text of a file, if there is one.
    pub(super) fn new(file: Option<&str>, overrides: &[(String, String)]) -> Result<Self> {
        let file = file.unwrap_or("").parse::<Table>().map_err(|e| {
            let line = e.span().map_or(0, |s| {
                1 + file.unwrap_or("").as_bytes()[..s.start].iter().filter(|b| **b == b'\n').count()
            });
            Error::config(format!("line {line} of the file is not TOML: {}", one_line(e.message())))
        })?;
        Ok(Self { file, overrides: overrides.to_vec() })
    }

    /// The last override of a key, as it was written, without quotes.
    pub(super) fn overridden(&self, key: &str) -> Option<&str> {
        let last = self.overrides.iter().rev().find(|(k, _)| k == key);
        last.map(|(_, value)| value.trim().trim_matches(['"', '\'']))
    }

    /// A text of the file.
    pub(super) fn in_file(&self, section: &str, key: &str) -> Option<&str> {
        self.file.get(section)?.get(key)?.as_str()
    }

    /// `defaults`, under the file, under the overrides.
    pub(super) fn resolve<T: Serialize + DeserializeOwned>(&self, defaults: &T) -> Result<T> {
        let mut table =
            Table::try_from(defaults).expect("the sections hold only what TOML can say");
        let mut known = Vec::new();
        collect(&table, "", &mut known);
        lay(&mut table, &self.file, "", &known)?;
        for (key, text) in &self.overrides {
            set(&mut table, key, text, &known)?;
        }
        // Types are right by now: what can fail is a word that is not among those allowed.
        table.try_into().map_err(|e: toml::de::Error| Error::config(one_line(&e.to_string())))
    }
}

/// The known name nearest to `name` by edit distance; of equally near ones the first. A name without
/// its section is compared with the keys of every section.
pub(super) fn nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> &'a str {
    let distance = |candidate: &str| {
        let last = candidate.rsplit('.').next().unwrap_or(candidate);
        let own_last = name.rsplit('.').next().unwrap_or(name);
        let same_depth = edit_distance(name, candidate);
        same_depth.min(1 + edit_distance(own_last, last))
    };
    known.into_iter().min_by_key(|candidate| distance(candidate)).unwrap_or("")
}

/// Levenshtein's distance, in characters.
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, cb) in b.iter().enumerate() {
            let replace = diagonal + usize::from(ca != *cb);
            diagonal = row[j + 1];
            row[j + 1] = replace.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

/// All dotted keys of a table.
fn collect(table: &Table, prefix: &str, out: &mut Vec<String>) {
    for (name, value) in table {
        match value {
            Value::Table(inner) => collect(inner, &format!("{prefix}{name}."), out),
            _ => out.push(format!("{prefix}{name}")),
        }
    }
}

/// Lays `over` onto `base`; `prefix` is the dotted name of both, with a dot after it.
fn lay(base: &mut Table, over: &Table, prefix: &str, known: &[String]) -> Result<()> {
    for (name, value) in over {
        let key = format!("{prefix}{name}");
        match (base.get_mut(name), value) {
            (None, _) => return Err(unknown(&key, known)),
            (Some(Value::Table(base)), Value::Table(over)) => {
                lay(base, over, &format!("{key}."), known)?;
            }
            (Some(Value::Table(_)), other) => {
                return Err(Error::config(format!("{key} is {other}, expected a section")));
            }
            (Some(old), new) => *old = coerce(&key, old, new.clone())?,
        }
    }
    Ok(())
}

/// Sets a dotted key from the text of its value.
fn set(table: &mut Table, key: &str, text: &str, known: &[String]) -> Result<()> {
    if !known.iter().any(|k| k == key) {
        return Err(unknown(key, known));
    }
    let old = slot(table, key);
    // A text stays one even if it looks like a number: `trainer.output=2024`.
    let new = if old.is_str() { unquoted(text) } else { parse(text) };
    *old = coerce(key, old, new)?;
    Ok(())
}

/// Where the value of a known dotted key is.
fn slot<'a>(table: &'a mut Table, key: &str) -> &'a mut Value {
    let known = "the key is among those of the table";
    match key.split_once('.') {
        None => table.get_mut(key).expect(known),
        Some((section, rest)) => {
            slot(table.get_mut(section).and_then(Value::as_table_mut).expect(known), rest)
        }
    }
}

fn parse(text: &str) -> Value {
    let document = format!("v = {text}").parse::<Table>().ok().filter(|t| t.len() == 1);
    document.and_then(|mut t| t.remove("v")).unwrap_or_else(|| Value::String(text.to_owned()))
}

fn unquoted(text: &str) -> Value {
    match parse(text) {
        quoted @ Value::String(_) => quoted,
        _ => Value::String(text.to_owned()),
    }
}

/// Lists of numbers that are empty by default.
const NUMBERS: [&str; 1] = ["data.weights"];

/// `new` in the type of `old`.
fn coerce(key: &str, old: &Value, new: Value) -> Result<Value> {
    let numbers = NUMBERS.contains(&key);
    match (old, new) {
        (Value::Float(_), Value::Integer(i)) => Ok(Value::Float(i as f64)),
        (Value::Array(_), Value::String(text)) if numbers => match parse(&format!("[{text}]")) {
            list @ Value::Array(_) => coerce(key, old, list),
            _ => Err(Error::config(format!("{key} is {text:?}, expected numbers"))),
        },
        (Value::Array(_), Value::String(text)) => {
            let parts = text.split(',').map(str::trim).filter(|p| !p.is_empty());
            Ok(Value::Array(parts.map(|p| Value::String(p.to_owned())).collect()))
        }
        (Value::Array(old), Value::Array(new)) => {
            // The element types of a list are those of its defaults; an empty list holds texts, or numbers.
            let any = if numbers { Value::Float(0.0) } else { Value::String(String::new()) };
            let element = old.first().unwrap_or(&any);
            new.into_iter()
                .map(|v| coerce(key, element, v))
                .collect::<Result<_>>()
                .map(Value::Array)
        }
        (Value::Integer(_), Value::Integer(i)) if i < 0 && !key.ends_with(".top_k") => {
            Err(Error::config(format!("{key} is {i}, limit is 0 or more")))
        }
        (old, new) if old.same_type(&new) => Ok(new),
        (old, new) => {
            let wanted = match old {
                Value::Float(_) => "a number",
                Value::Integer(_) => "an integer",
                Value::Boolean(_) => "true or false",
                Value::Array(_) => "a list",
                _ => "text",
            };
            Err(Error::config(format!("{key} is {new}, expected {wanted}")))
        }
    }
}

fn unknown(key: &str, known: &[String]) -> Error {
    let near = nearest(key, known.iter().map(String::as_str));
    Error::config(format!("unknown key {key}, did you mean {near}?"))
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
