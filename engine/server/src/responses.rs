//! `POST /v1/responses` by conversion to a chat: what the body asks for in the words of
//! `/v1/chat/completions`, and ([`output`]) the chat's events in the words of Responses.
//!
//! Nothing is stored: `store: true`, `previous_response_id`, `conversation`, `background` and `prompt`
//! are refused by name. So are the tools that OpenAI's servers run, images, files and reasoning. Sampling
//! parameters beyond OpenAI's, and structured output by vLLM's fields, are those of the chat API.
//! Form: OpenAI's API reference, "Responses".

use serde_json::{Map, Value, json};

use crate::api_error::ApiError;
use crate::app::App;
use crate::fields::{BadField, Fields, kind};
use crate::refused::unsupported;

mod input;
pub(crate) mod output;

/// Features with the values that leave them off, as far as Responses has them and chat has not.
fn refused() -> [(&'static str, Vec<Value>); 10] {
    let off = || vec![json!(false)];
    let none = Vec::new;
    [
        ("store", off()),
        ("background", off()),
        ("previous_response_id", none()),
        ("conversation", none()),
        ("prompt", none()),
        ("max_tool_calls", none()),
        ("truncation", vec![json!("disabled")]),
        ("reasoning", vec![json!({}), json!({"effort": "none"})]),
        ("stream_options", vec![json!({}), json!({"include_obfuscation": false})]),
        ("context_management", vec![json!([])]),
    ]
}

/// Fields of the chat API that would ask for what an answer here cannot say, or say it twice.
const CHATS_OWN: [&str; 12] = [
    "messages",
    "max_tokens",
    "max_completion_tokens",
    "response_format",
    "n",
    "logprobs",
    "prompt_logprobs",
    "return_token_ids",
    "echo",
    "functions",
    "function_call",
    "include_reasoning",
];

/// The names of both.
pub(crate) fn refused_names() -> impl Iterator<Item = &'static str> {
    refused().into_iter().map(|(name, _)| name).chain(CHATS_OWN)
}

/// How the fields that are converted are called on both sides, for errors.
const RENAMED: [(&str, &str); 5] = [
    ("messages", "input"),
    ("prompt", "input"),
    ("max_tokens", "max_output_tokens"),
    ("max_completion_tokens", "max_output_tokens"),
    ("response_format", "text"),
];

/// A request in the words of the chat API.
pub(crate) struct Converted {
    /// The chat's body.
    pub(crate) chat: Fields,
    /// What the answer repeats of the request.
    pub(crate) echo: Map<String, Value>,
}

/// Reads a body.
///
/// # Errors
/// A field of a wrong form, or a feature that is not offered. What the fields share with the chat API is
/// checked when the chat is read.
pub(crate) fn convert(app: &App, body: &[u8]) -> Result<Converted, ApiError> {
    let mut fields = Fields::parse(body)?;
    for (name, off) in refused() {
        if fields.take(name).is_some_and(|value| !off.contains(&value)) {
            return Err(unsupported(name).into());
        }
    }
    for name in CHATS_OWN {
        if fields.take(name).is_some() {
            return Err(unsupported(name).into());
        }
    }
    let mut chat = Map::new();
    let mut echo = Map::new();
    let instructions = fields.string("instructions")?;
    let input = fields.take("input").ok_or_else(|| BadField::new("input", "input is missing"))?;
    chat.insert("messages".to_owned(), input::messages(instructions.as_deref(), &input)?);
    echo.insert("instructions".to_owned(), json!(instructions));
    let limit = fields.count("max_output_tokens")?;
    echo.insert("max_output_tokens".to_owned(), json!(limit));
    chat.insert("max_completion_tokens".to_owned(), json!(limit));
    text(&mut fields, &mut chat, &mut echo)?;
    tools(&mut fields, &mut chat, &mut echo)?;
    logprobs(&mut fields, &mut chat, &mut echo)?;
    let defaults = [("temperature", app.defaults.temperature), ("top_p", app.defaults.top_p)];
    for (name, default) in defaults {
        let given = fields.take(name);
        echo.insert(name.to_owned(), given.clone().unwrap_or_else(|| json!(default)));
        chat.insert(name.to_owned(), json!(given));
    }
    let metadata = fields.take("metadata").unwrap_or_else(|| json!({}));
    echo.insert("metadata".to_owned(), metadata);
    // What is left is read, refused or reported by the chat API.
    for name in fields.names().map(str::to_owned).collect::<Vec<_>>() {
        let value = fields.take(&name);
        chat.insert(name, json!(value));
    }
    Ok(Converted { chat: Fields::new(chat), echo })
}

/// A chat's error in the words of this route.
pub(crate) fn renamed(error: ApiError) -> ApiError {
    error.renamed(&RENAMED)
}

/// `text.format` becomes `response_format`.
fn text(
    fields: &mut Fields,
    chat: &mut Map<String, Value>,
    echo: &mut Map<String, Value>,
) -> Result<(), BadField> {
    let mut format = Value::Null;
    if let Some(mut text) = fields.object("text")? {
        format = text.take("format").unwrap_or_default();
        let verbosity = text.string("verbosity")?;
        if verbosity.is_some_and(|verbosity| verbosity != "medium") {
            return Err(unsupported("text.verbosity"));
        }
        if text.names().next().is_some() {
            return Err(BadField::new("text", "text has a field other than format and verbosity"));
        }
    }
    if format.is_null() {
        format = json!({"type": "text"});
    }
    let chats = match format["type"].as_str() {
        Some("text" | "json_object") => json!({"type": format["type"]}),
        Some("json_schema") => {
            let mut inner = format.as_object().cloned().unwrap_or_default();
            inner.shift_remove("type");
            json!({"type": "json_schema", "json_schema": inner})
        }
        _ => {
            let expected = "expected text, json_object or json_schema";
            return Err(BadField::new("text", format!("text.format has no such type, {expected}")));
        }
    };
    chat.insert("response_format".to_owned(), chats);
    echo.insert("text".to_owned(), json!({"format": format}));
    Ok(())
}

/// Functions are nested one level deeper in chats.
fn tools(
    fields: &mut Fields,
    chat: &mut Map<String, Value>,
    echo: &mut Map<String, Value>,
) -> Result<(), BadField> {
    let list = fields.take("tools").unwrap_or_else(|| json!([]));
    let wrong = |found: &str| BadField::new("tools", format!("tools {found}"));
    let Value::Array(items) = &list else {
        return Err(wrong(&format!("is {}, expected an array", kind(&list))));
    };
    let nested = items.iter().enumerate().map(|(index, item)| {
        let is_function = item.get("type").and_then(Value::as_str) == Some("function");
        let Some(function) = item.as_object().filter(|_| is_function) else {
            let message = format!("[{index}] is no function, others are not offered");
            return Err(BadField::new("tools", format!("tools{message}"))
                .with_code("unsupported_parameter"));
        };
        let mut function = function.clone();
        function.shift_remove("type");
        Ok(json!({"type": "function", "function": function}))
    });
    let nested = nested.collect::<Result<Vec<_>, _>>()?;
    let choice = fields.take("tool_choice").unwrap_or_else(|| json!("auto"));
    let chats = match &choice {
        Value::Object(named) if named.get("type").and_then(Value::as_str) == Some("function") => {
            json!({"type": "function", "function": {"name": named.get("name")}})
        }
        Value::Object(_) => return Err(unsupported("tool_choice")),
        word => word.clone(),
    };
    let parallel = fields.flag("parallel_tool_calls")?.unwrap_or(true);
    chat.insert("tools".to_owned(), json!(nested));
    chat.insert("tool_choice".to_owned(), chats);
    chat.insert("parallel_tool_calls".to_owned(), json!(parallel));
    echo.insert("tools".to_owned(), list);
    echo.insert("tool_choice".to_owned(), choice);
    echo.insert("parallel_tool_calls".to_owned(), json!(parallel));
    Ok(())
}

/// Log-probabilities are asked for through `include`.
fn logprobs(
    fields: &mut Fields,
    chat: &mut Map<String, Value>,
    echo: &mut Map<String, Value>,
) -> Result<(), BadField> {
    const WANTED: &str = "message.output_text.logprobs";
    let mut logprobs = false;
    match fields.take("include") {
        None => {}
        Some(Value::Array(list)) => {
            for item in &list {
                match item.as_str() {
                    Some(WANTED) => logprobs = true,
                    // There is no reasoning to encrypt.
                    Some("reasoning.encrypted_content") => {}
                    _ => return Err(unsupported("include")),
                }
            }
        }
        Some(other) => {
            let message = format!("include is {}, expected an array of strings", kind(&other));
            return Err(BadField::new("include", message));
        }
    }
    let top = fields.count("top_logprobs")?;
    if top.is_some_and(|top| top > 0) && !logprobs {
        let message = format!("top_logprobs needs include to have {WANTED}");
        return Err(BadField::new("top_logprobs", message));
    }
    chat.insert("logprobs".to_owned(), json!(logprobs));
    if logprobs {
        chat.insert("top_logprobs".to_owned(), json!(top));
    }
    echo.insert("top_logprobs".to_owned(), json!(top.unwrap_or(0)));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_in_the_words_of_the_route() {
        let chats = BadField::new("response_format", "response_format: schema is too large");
        let error = renamed(chats.into()).to_json();
        let error: Value = serde_json::from_str(&error).unwrap();
        assert_eq!(error["error"]["param"], "text");
        assert_eq!(error["error"]["message"], "text: schema is too large");
        let other = BadField::new("top_p", "top_p is 2, limit is 1");
        assert_eq!(renamed(other.clone().into()), ApiError::from(other));
    }
}
