//! `instructions` and `input` as the messages of a chat.
//!
//! An item is a message, a call that the model made, or what a call gave. Calls that follow each other
//! are one message of the assistant's, as they were when they were made.

use serde_json::{Map, Value, json};

use crate::fields::{BadField, kind};
use crate::params::at_most;

/// Most items, as many as a chat may have messages.
const MAX_ITEMS: usize = 4096;

/// The messages; `instructions` come first, for the system.
///
/// # Errors
/// When an item is of an unknown form or a kind that is not offered.
pub(super) fn messages(instructions: Option<&str>, input: &Value) -> Result<Value, BadField> {
    let bad = |message: String| BadField::new("input", message);
    let mut list: Vec<Value> = Vec::new();
    list.extend(instructions.map(|text| json!({"role": "system", "content": text})));
    match input {
        Value::String(text) => list.push(json!({"role": "user", "content": text})),
        Value::Array(items) if items.is_empty() => return Err(bad("input is empty".to_owned())),
        Value::Array(items) => {
            at_most("input", items.len(), MAX_ITEMS)?;
            for (index, item) in items.iter().enumerate() {
                let Value::Object(map) = item else {
                    let what = kind(item);
                    return Err(bad(format!("input[{index}] is {what}, expected an object")));
                };
                push(&mut list, map).map_err(|why| bad(format!("input[{index}] {why}")))?;
            }
        }
        other => {
            let what = kind(other);
            return Err(bad(format!("input is {what}, expected a string or an array of items")));
        }
    }
    Ok(Value::Array(list))
}

/// Appends an item; an error is the end of a sentence.
fn push(list: &mut Vec<Value>, item: &Map<String, Value>) -> Result<(), String> {
    match item.get("type").map_or(Some("message"), Value::as_str) {
        Some("message") => list.push(message(item)?),
        Some("function_call") => {
            let call = json!({
                "id": string(item, "call_id")?,
                "type": "function",
                "function": {"name": string(item, "name")?, "arguments": string(item, "arguments")?},
            });
            let calls = list.last_mut().and_then(|last| last.get_mut("tool_calls"));
            match calls.and_then(Value::as_array_mut) {
                Some(calls) => calls.push(call),
                None => list.push(json!({"role": "assistant", "tool_calls": [call]})),
            }
        }
        Some("function_call_output") => {
            let id = string(item, "call_id")?;
            let output = content(item.get("output")).map_err(|why| format!("output {why}"))?;
            list.push(json!({"role": "tool", "tool_call_id": id, "content": output}));
        }
        Some(_) => {
            return Err("is neither a message nor a function call nor its output; others are not \
                        offered"
                .to_owned());
        }
        None => return Err("has a type that is no string".to_owned()),
    }
    Ok(())
}

fn message(item: &Map<String, Value>) -> Result<Value, String> {
    let role = match string(item, "role")? {
        role @ ("user" | "assistant" | "system" | "developer") => role,
        _ => return Err("has a role other than user, assistant, system and developer".to_owned()),
    };
    let content = content(item.get("content")).map_err(|why| format!("content {why}"))?;
    Ok(json!({"role": role, "content": content}))
}

/// Text, or the text of its parts, which become lines as those of a chat do.
fn content(value: Option<&Value>) -> Result<String, String> {
    match value {
        Some(Value::String(text)) => Ok(text.clone()),
        Some(Value::Array(parts)) => {
            Ok(parts.iter().map(part).collect::<Result<Vec<_>, _>>()?.join("\n"))
        }
        Some(other) => Err(format!("is {}, expected a string or an array of parts", kind(other))),
        None => Err("is missing".to_owned()),
    }
}

fn part(part: &Value) -> Result<&str, String> {
    let text = |name: &str| part.get(name).and_then(Value::as_str);
    match text("type") {
        Some("input_text" | "output_text" | "text") => text("text"),
        Some("refusal") => text("refusal"),
        Some(_) => return Err("has a part that is not text; others are not offered".to_owned()),
        None => return Err("has a part without a type".to_owned()),
    }
    .ok_or_else(|| "has a text part without text".to_owned())
}

fn string<'a>(item: &'a Map<String, Value>, name: &str) -> Result<&'a str, String> {
    match item.get(name) {
        Some(Value::String(text)) => Ok(text),
        Some(other) => Err(format!("has {name} that is {}, expected a string", kind(other))),
        None => Err(format!("has no {name}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_become_messages_and_neighbouring_calls_become_one() {
        let call = |id: &str| json!({"type": "function_call", "id": "fc_1", "call_id": id, "name": "f", "arguments": "{}", "status": "completed"});
        let input = json!([
            {"role": "developer", "content": "be brief"},
            {"type": "message", "role": "user", "content": [
                {"type": "input_text", "text": "a"}, {"type": "input_text", "text": "b"}]},
            call("1"), call("2"),
            {"type": "function_call_output", "call_id": "1", "output": "x"},
            {"type": "function_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "y"}]},
            {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
                "content": [{"type": "output_text", "text": "done", "annotations": []}]},
        ]);
        let chats = |id: &str| json!({"id": id, "type": "function", "function": {"name": "f", "arguments": "{}"}});
        let expected = json!([
            {"role": "system", "content": "rules"},
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": "a\nb"},
            {"role": "assistant", "tool_calls": [chats("1"), chats("2")]},
            {"role": "tool", "tool_call_id": "1", "content": "x"},
            {"role": "tool", "tool_call_id": "2", "content": "y"},
            {"role": "assistant", "content": "done"},
        ]);
        assert_eq!(messages(Some("rules"), &input).unwrap(), expected);
        let plain = messages(None, &json!("hi")).unwrap();
        assert_eq!(plain, json!([{"role": "user", "content": "hi"}]));
    }

    #[test]
    fn faults_say_which_item() {
        let cases = [
            (json!(3), "input is a number, expected a string or an array of items"),
            (json!([]), "input is empty"),
            (json!(["a"]), "input[0] is a string, expected an object"),
            (json!([{"role": "user"}]), "input[0] content is missing"),
            (json!([{"content": "a"}]), "input[0] has no role"),
            (
                json!([{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]),
                "input[0] content has a part that is not text; others are not offered",
            ),
            (
                json!([{"type": "item_reference", "id": "msg_1"}]),
                "input[0] is neither a message nor a function call nor its output; others are not offered",
            ),
            (
                json!([{"type": "function_call", "call_id": 1}]),
                "input[0] has call_id that is a number, expected a string",
            ),
        ];
        for (input, message) in cases {
            let bad = messages(None, &input).unwrap_err();
            assert_eq!((bad.param.as_deref(), bad.message.as_str()), (Some("input"), message));
        }
    }
}
