//! One row of a data file, and how it is read from its columns.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;

use super::Columns;

/// One turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant`.
    pub role: String,
    /// What is said.
    pub content: String,
}

/// What the model is given, before any template.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Prompt {
    /// Plain text.
    Text(String),
    /// A conversation.
    Messages(Vec<Message>),
}

/// A task: a prompt and what a right answer is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Chooses the verifier and names the row's metrics.
    pub data_source: Option<String>,
    /// The prompt.
    pub prompt: Prompt,
    /// What the verifier compares with.
    pub ground_truth: String,
    /// `extra_info`, or all other columns of a row that has none.
    pub extra: Value,
}

/// A prompt and the completion to learn.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SftRow {
    /// The prompt.
    pub prompt: Prompt,
    /// The completion, without end of text.
    pub completion: String,
}

/// Columns that are not part of `extra`.
const OWN: [&str; 6] =
    ["data_source", "prompt", "reward_model", "ground_truth", "solution", "answer"];

/// Where a truth may be, the first first.
const TRUTHS: [&[&str]; 4] =
    [&["reward_model", "ground_truth"], &["ground_truth"], &["solution"], &["answer"]];

impl Row {
    /// Reads verl's or TRL's columns, which `line` holds; the error is a message without file and line.
    pub(super) fn parse(columns: &Columns, line: &[u8]) -> Result<Self, String> {
        let prompt = prompt(columns)?;
        let Some((path, truth)) = first(columns, &TRUTHS) else {
            return Err(missing(
                columns,
                "\"reward_model.ground_truth\" (or \"ground_truth\", \"solution\", \"answer\")",
            ));
        };
        let data_source = match columns.get("data_source") {
            None | Some(Value::Null) => None,
            Some(source) => Some(text(source, &["data_source"], line)?),
        };
        let rest = || {
            let rest = columns.iter().filter(|(n, _)| !OWN.contains(&n.as_str()));
            Value::Object(rest.map(|(n, v)| (n.clone(), v.clone())).collect())
        };
        Ok(Self {
            data_source,
            prompt,
            ground_truth: match truth {
                // Rules that need more than a text, such as countdown's, read it back.
                Value::Array(_) | Value::Object(_) => truth.to_string(),
                _ => text(truth, path, line)?,
            },
            extra: present(columns, "extra_info").cloned().unwrap_or_else(rest),
        })
    }
}

impl SftRow {
    /// Reads a supervised pair, which `line` holds; the error is a message without file and line.
    pub(super) fn parse(columns: &Columns, line: &[u8]) -> Result<Self, String> {
        if let Some(conversation) = present(columns, "messages") {
            let mut all = messages(conversation, "messages")?;
            let last = all.pop().ok_or("messages has no messages")?;
            if last.role != "assistant" {
                return Err(format!(
                    "the last of messages is from {:?}, expected \"assistant\"",
                    last.role
                ));
            }
            return Ok(Self { prompt: Prompt::Messages(all), completion: last.content });
        }
        let prompt = prompt(columns)?;
        let Some((path, completion)) = first(columns, &[&["completion"], &["response"]]) else {
            return Err(missing(columns, "\"completion\" (or \"response\")"));
        };
        Ok(Self { prompt, completion: text(completion, path, line)? })
    }
}

/// The value of a column; in a Parquet file every row has every column, some of them null.
fn present<'a>(columns: &'a Columns, name: &str) -> Option<&'a Value> {
    columns.get(name).filter(|value| !value.is_null())
}

/// The first of some places that has a value.
fn first<'a, 'p>(
    columns: &'a Columns,
    paths: &[&'p [&'p str]],
) -> Option<(&'p [&'p str], &'a Value)> {
    let at = |path: &[&str]| {
        let (column, fields) = path.split_first()?;
        let mut fields = fields.iter();
        fields.try_fold(present(columns, column)?, |value, name| value.get(name))
    };
    paths.iter().find_map(|path| Some((*path, at(path).filter(|value| !value.is_null())?)))
}

fn prompt(columns: &Columns) -> Result<Prompt, String> {
    match columns.get("prompt") {
        Some(Value::String(text)) => Ok(Prompt::Text(text.clone())),
        Some(value) => messages(value, "prompt").map(Prompt::Messages),
        None => Err(missing(columns, "\"prompt\"")),
    }
}

fn messages(value: &Value, column: &str) -> Result<Vec<Message>, String> {
    let Value::Array(items) = value else {
        return Err(format!("{column} is {}, expected text or messages", kind(value)));
    };
    if items.is_empty() {
        return Err(format!("{column} has no messages"));
    }
    let read = |(index, item): (usize, &Value)| {
        let part = |part: &str| match item.get(part) {
            Some(Value::String(text)) => Ok(text.clone()),
            Some(other) => {
                Err(format!("{column}[{index}].{part} is {}, expected text", kind(other)))
            }
            None => Err(format!("{column}[{index}] has no {part:?}")),
        };
        Ok(Message { role: part("role")?, content: part("content")? })
    };
    items.iter().enumerate().map(read).collect()
}

/// A value as text; a number as the line has it, which may be longer than any number type holds.
fn text(value: &Value, path: &[&str], line: &[u8]) -> Result<String, String> {
    match value {
        Value::String(text) => Ok(text.clone()),
        Value::Number(number) => Ok(written(line, path).unwrap_or_else(|| number.to_string())),
        other => {
            let column = path.last().copied().unwrap_or_default();
            Err(format!("{column} is {}, expected text", kind(other)))
        }
    }
}

/// What a line of JSON has at a place, as it is written; `None` without a line.
fn written(line: &[u8], path: &[&str]) -> Option<String> {
    let mut value: &RawValue = serde_json::from_slice(line).ok()?;
    for name in path {
        // Of fields of the same name the last counts, as in the columns.
        let fields: HashMap<String, &RawValue> = serde_json::from_str(value.get()).ok()?;
        value = fields.get(*name)?;
    }
    Some(value.get().to_owned())
}

fn missing(columns: &Columns, wanted: &str) -> String {
    let present: Vec<&str> = columns.keys().map(String::as_str).collect();
    format!("no column {wanted}; columns are: {}", present.join(", "))
}

/// The kind of a JSON value, for messages.
pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "text",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}
