//! Tools: what a request may have called, the form that a call is forced into, and calls in a history.
//!
//! Hermes' and Qwen's form: `<tool_call>`, a JSON object with `name` and `arguments`, `</tool_call>`,
//! each on lines of their own. The functions themselves are the client's to run.

use engine::{Grammar, UnknownKeywords, json_schema};
use serde_json::{Map, Value, json};

use crate::fields::{BadField, Fields, kind};
use crate::params::at_most;
use crate::structured::Structured;

/// Most tools a request may offer.
const MAX_TOOLS: usize = 128;
/// Longest name of a function, in bytes, as in OpenAI's API.
const MAX_NAME_BYTES: usize = 64;
/// Longest list of tools, in bytes of JSON.
const MAX_BYTES: usize = 256 << 10;
/// Most calls one message of a history may have.
const MAX_CALLS: usize = 128;

/// The tools that a request offers to the model.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Tools {
    /// The list as given, for the template.
    pub(crate) list: Value,
    /// Whether an answer may have more than one call.
    pub(crate) parallel: bool,
    /// Functions of which one must be called; none when the model decides.
    forced: Vec<Function>,
}

#[derive(Clone, Debug, PartialEq)]
struct Function {
    name: String,
    parameters: Value,
    unknown: UnknownKeywords,
}

/// Takes the tools of a chat; `None` when there are none or none may be called.
///
/// # Errors
/// When they are not functions, too many or too long, or the choice names none of them.
pub(crate) fn read(fields: &mut Fields) -> Result<Option<Tools>, BadField> {
    let parallel = fields.flag("parallel_tool_calls")?.unwrap_or(true);
    let list = fields.take("tools").unwrap_or_else(|| json!([]));
    let choice = fields.take("tool_choice");
    let functions = functions(&list)?;
    let bad = |message: &str| BadField::new("tool_choice", format!("tool_choice {message}"));
    let forced = match &choice {
        Some(Value::String(word)) => match word.as_str() {
            "none" => return Ok(None),
            "auto" => Vec::new(),
            "required" if functions.is_empty() => return Err(bad("is required, tools is empty")),
            "required" => functions.clone(),
            _ => return Err(bad("is an unknown word, expected none, auto or required")),
        },
        None => Vec::new(),
        Some(Value::Object(named)) => {
            let name = named.get("function").and_then(|f| f.get("name")).and_then(Value::as_str);
            let name = name.ok_or_else(|| bad("names no function"))?;
            let one = functions.iter().filter(|function| function.name == name).cloned();
            let one: Vec<Function> = one.take(1).collect();
            if one.is_empty() {
                return Err(bad("names a function that is not among tools"));
            }
            one
        }
        Some(other) => {
            return Err(bad(&format!("is {}, expected a word or an object", kind(other))));
        }
    };
    // A choice that names a function is for one call of it.
    let parallel = parallel && !matches!(choice, Some(Value::Object(_)));
    Ok((!functions.is_empty()).then_some(Tools { list, parallel, forced }))
}

fn functions(list: &Value) -> Result<Vec<Function>, BadField> {
    let bad = |message: String| BadField::new("tools", message);
    let Value::Array(items) = list else {
        return Err(bad(format!("tools is {}, expected an array", kind(list))));
    };
    at_most("tools", items.len(), MAX_TOOLS)?;
    let bytes = list.to_string().len();
    if bytes > MAX_BYTES {
        return Err(bad(format!("tools has {bytes} bytes, limit is {MAX_BYTES}")));
    }
    let one = |(index, item): (usize, &Value)| {
        function(item).map_err(|why| bad(format!("tools[{index}] {why}")))
    };
    items.iter().enumerate().map(one).collect()
}

fn function(item: &Value) -> Result<Function, String> {
    if item.get("type").and_then(Value::as_str) != Some("function") {
        return Err("is not of type function".to_owned());
    }
    let function = item.get("function").and_then(Value::as_object).ok_or("has no function")?;
    let name = function.get("name").and_then(Value::as_str).ok_or("has no name")?;
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.');
    if name.is_empty() || name.len() > MAX_NAME_BYTES || !name.bytes().all(plain) {
        let what = "letters, digits, `_`, `-` or `.`";
        return Err(format!("has a name that is not 1 to {MAX_NAME_BYTES} {what}"));
    }
    let parameters = match function.get("parameters") {
        None | Some(Value::Null) => json!({"type": "object", "properties": {}}),
        Some(Value::Object(schema)) => {
            let mut schema = schema.clone();
            schema.entry("type").or_insert_with(|| json!("object"));
            Value::Object(schema)
        }
        Some(other) => return Err(format!("has parameters that are {}", kind(other))),
    };
    let strict = function.get("strict").and_then(Value::as_bool).unwrap_or(false);
    let unknown = if strict { UnknownKeywords::Refuse } else { UnknownKeywords::Ignore };
    Ok(Function { name: name.to_owned(), parameters, unknown })
}

impl Tools {
    /// The grammar of an answer that calls one of the forced functions; `None` when none is forced.
    ///
    /// # Errors
    /// When the parameters of one are no schema.
    pub(crate) fn structured(&self) -> Result<Option<Structured>, BadField> {
        if self.forced.is_empty() {
            return Ok(None);
        }
        let rest = if self.parallel { " (\"\\n\" call)*" } else { "" };
        let bodies: Vec<String> = (0..self.forced.len()).map(|i| format!("body_{i}")).collect();
        let mut lark = format!(
            "start: call{rest}\ncall: \"<tool_call>\\n\" body \"\\n</tool_call>\"\nbody: {}\n",
            bodies.join(" | ")
        );
        for (i, function) in self.forced.iter().enumerate() {
            let schema = json_schema(function.parameters.clone(), function.unknown)
                .map_err(|error| BadField::new("tools", format!("tools: {error}")))?;
            let name = &function.name;
            lark.push_str(&format!(
                "body_{i}: \"{{\\\"name\\\": \\\"{name}\\\", \\\"arguments\\\": \" args_{i} \"}}\"\n"
            ));
            lark.push_str(&format!("args_{i}: %json {schema}\n"));
        }
        Ok(Some(Structured { param: "tools", grammar: Grammar::Lark(lark) }))
    }
}

/// The calls in an assistant's message of a history, with arguments as JSON.
///
/// # Errors
/// What is wrong with them, as the end of a sentence.
pub(crate) fn calls(map: &Map<String, Value>) -> Result<Value, String> {
    let Some(Value::Array(calls)) = map.get("tool_calls") else {
        return Err("has tool_calls that are no array".to_owned());
    };
    if calls.len() > MAX_CALLS {
        return Err(format!("has {} tool_calls, limit is {MAX_CALLS}", calls.len()));
    }
    let calls = calls.iter().map(call).collect::<Option<Vec<_>>>();
    Ok(calls.ok_or("has a tool call without a name and JSON arguments")?.into())
}

fn call(call: &Value) -> Option<Value> {
    let function = call.get("function")?;
    let name = function.get("name")?.as_str()?;
    let arguments = match function.get("arguments")? {
        Value::String(text) if text.trim().is_empty() => json!({}),
        Value::String(text) => serde_json::from_str(text).ok()?,
        other => other.clone(),
    };
    let id = call.get("id").and_then(Value::as_str).unwrap_or_default();
    Some(json!({
        "id": id, "type": "function", "function": {"name": name, "arguments": arguments},
    }))
}

/// Checks the message with which a client hands in what a tool gave.
///
/// # Errors
/// What is wrong with it, as the end of a sentence.
pub(crate) fn check_result(map: &Map<String, Value>) -> Result<(), String> {
    for name in ["tool_call_id", "name"] {
        match map.get(name) {
            None | Some(Value::Null | Value::String(_)) => {}
            Some(other) => return Err(format!("has a {name} that is {}", kind(other))),
        }
    }
    Ok(())
}
