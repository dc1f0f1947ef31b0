//! One row of a data file, and how it is read from its columns.

use serde::{Deserialize, Serialize};
use serde_json::Value;

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

impl Row {
    /// Reads verl's or TRL's columns; the error is a message without file and line.
    pub(super) fn parse(columns: &Columns) -> Result<Self, String> {
        let prompt = prompt(columns)?;
        let nested = columns.get("reward_model").and_then(|r| r.get("ground_truth"));
        let flat =
            || ["ground_truth", "solution", "answer"].iter().find_map(|n| present(columns, n));
        let Some(truth) = nested.filter(|v| !v.is_null()).or_else(flat) else {
            return Err(missing(
                columns,
                "\"reward_model.ground_truth\" (or \"ground_truth\", \"solution\", \"answer\")",
            ));
        };
        let data_source = match columns.get("data_source") {
            None | Some(Value::Null) => None,
            Some(source) => Some(text(source, "data_source")?),
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
                _ => text(truth, "ground_truth")?,
            },
            extra: present(columns, "extra_info").cloned().unwrap_or_else(rest),
        })
    }
}

impl SftRow {
    /// Reads a supervised pair; the error is a message without file and line.
    pub(super) fn parse(columns: &Columns) -> Result<Self, String> {
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
        let Some(completion) =
            present(columns, "completion").or_else(|| present(columns, "response"))
        else {
            return Err(missing(columns, "\"completion\" (or \"response\")"));
        };
        Ok(Self { prompt, completion: text(completion, "completion")? })
    }
}

/// The value of a column; in a Parquet file every row has every column, some of them null.
fn present<'a>(columns: &'a Columns, name: &str) -> Option<&'a Value> {
    columns.get(name).filter(|value| !value.is_null())
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

fn text(value: &Value, column: &str) -> Result<String, String> {
    match value {
        Value::String(text) => Ok(text.clone()),
        Value::Number(number) => Ok(number.to_string()),
        other => Err(format!("{column} is {}, expected text", kind(other))),
    }
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
