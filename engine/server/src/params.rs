//! Sampling parameters and chat messages out of JSON, by vLLM's names.
//!
//! Shared by both APIs and by the offline batch command, so a parameter means the same everywhere.

use engine::{ChatTemplate, EosRule, GenerationDefaults, Message, SamplingParams, StopText};
use serde_json::{Map, Value};

use crate::fields::{BadField, Fields, kind};

/// Most stop strings a request may have.
pub(crate) const MAX_STOPS: usize = 64;
/// Longest stop string, in bytes.
const MAX_STOP_BYTES: usize = 1024;
/// Most tokens a request may list in `stop_token_ids`.
pub(crate) const MAX_STOP_TOKENS: usize = 1024;
/// Most tokens a request may bias.
pub(crate) const MAX_BIASES: usize = 1024;
/// Most messages a chat may have.
pub(crate) const MAX_MESSAGES: usize = 4096;
/// Temperatures below it count as 0: logits divided by less would overflow.
const GREEDY_BELOW: f32 = 1e-5;

/// Neutral parameters, changed by what the model's `generation_config.json` recommends. Its `do_sample` is left
/// out, as in vLLM: a temperature says the same.
pub fn default_params(generation: &GenerationDefaults) -> SamplingParams {
    let neutral = SamplingParams::default();
    SamplingParams {
        temperature: generation.temperature.unwrap_or(neutral.temperature),
        top_p: generation.top_p.unwrap_or(neutral.top_p),
        top_k: generation.top_k.filter(|k| *k > 0).map(|k| k as usize),
        min_p: generation.min_p.unwrap_or(neutral.min_p),
        repetition_penalty: generation.repetition_penalty.unwrap_or(neutral.repetition_penalty),
        max_tokens: generation.max_new_tokens.filter(|max| *max > 0),
        ..neutral
    }
}

/// Takes the sampling parameters out of `fields`; those not given are as in `defaults`.
///
/// Leaves `logprobs` alone: each API spells it in its own way.
///
/// # Errors
/// When a field has the wrong type or is beyond its limit. Ranges are checked by
/// [`SamplingParams::validate`].
pub fn sampling_params(
    fields: &mut Fields,
    defaults: &SamplingParams,
) -> Result<SamplingParams, BadField> {
    let mut params = defaults.clone();
    let numbers = [
        ("temperature", &mut params.temperature),
        ("top_p", &mut params.top_p),
        ("min_p", &mut params.min_p),
        ("presence_penalty", &mut params.presence_penalty),
        ("frequency_penalty", &mut params.frequency_penalty),
        ("repetition_penalty", &mut params.repetition_penalty),
    ];
    for (name, value) in numbers {
        if let Some(given) = fields.number(name)? {
            *value = given;
        }
    }
    if (0.0..GREEDY_BELOW).contains(&params.temperature) {
        params.temperature = 0.0;
    }
    if let Some(k) = fields.integer("top_k")? {
        params.top_k = top_k(k)?;
    }
    if let Some(max) = fields.count("max_tokens")? {
        params.max_tokens = Some(max);
    }
    params.min_tokens = fields.count("min_tokens")?.unwrap_or(params.min_tokens);
    params.n = fields.count("n")?.unwrap_or(params.n);
    if let Some(seed) = fields.integer("seed")? {
        params.seed = Some(seed.cast_unsigned());
    }
    if let Some(bias) = fields.take("logit_bias") {
        params.logit_bias = logit_bias(&bias)?;
    }
    stopping(fields, &mut params)?;
    Ok(params)
}

/// The `top_k` of the engine for that of a request: 0 and -1 switch it off.
fn top_k(k: i64) -> Result<Option<usize>, BadField> {
    match k {
        -1 | 0 => Ok(None),
        k => usize::try_from(k)
            .map(Some)
            .map_err(|_| BadField::new("top_k", format!("top_k is {k}, limit is at least -1"))),
    }
}

fn stopping(fields: &mut Fields, params: &mut SamplingParams) -> Result<(), BadField> {
    if let Some(stop) = fields.take("stop") {
        params.stop = stop_strings(&stop)?;
    }
    if let Some(tokens) = fields.tokens("stop_token_ids")? {
        at_most("stop_token_ids", tokens.len(), MAX_STOP_TOKENS)?;
        params.stop_token_ids = tokens;
    }
    if let Some(ignore) = fields.flag("ignore_eos")? {
        params.eos = if ignore { EosRule::Ignore } else { EosRule::Stop };
    }
    if let Some(include) = fields.flag("include_stop_str_in_output")? {
        params.stop_text = if include { StopText::Include } else { StopText::Exclude };
    }
    Ok(())
}

fn stop_strings(value: &Value) -> Result<Vec<String>, BadField> {
    let list = match value {
        Value::String(one) => vec![one.clone()],
        Value::Array(list) => {
            at_most("stop", list.len(), MAX_STOPS)?;
            let strings = list.iter().map(|item| item.as_str().map(str::to_owned));
            strings.collect::<Option<_>>().ok_or_else(|| stop_type("an array"))?
        }
        other => return Err(stop_type(kind(other))),
    };
    for stop in &list {
        if stop.is_empty() {
            return Err(BadField::new("stop", "stop has an empty string"));
        }
        if stop.len() > MAX_STOP_BYTES {
            let bytes = stop.len();
            let message = format!("stop has a string of {bytes} bytes, limit is {MAX_STOP_BYTES}");
            return Err(BadField::new("stop", message));
        }
    }
    Ok(list)
}

fn stop_type(found: &str) -> BadField {
    BadField::new("stop", format!("stop is {found}, expected a string or an array of strings"))
}

fn logit_bias(value: &Value) -> Result<Vec<(u32, f32)>, BadField> {
    const EXPECTED: &str = "expected an object of token id to number";
    let bad =
        |found: &str| BadField::new("logit_bias", format!("logit_bias is {found}, {EXPECTED}"));
    let map = value.as_object().ok_or_else(|| bad(kind(value)))?;
    at_most("logit_bias", map.len(), MAX_BIASES)?;
    map.iter()
        .map(|(token, bias)| Some((token.parse().ok()?, bias.as_f64()? as f32)))
        .collect::<Option<_>>()
        .ok_or_else(|| bad("an object with other entries"))
}

/// Fails when `name` has more than `limit` entries.
pub(crate) fn at_most(name: &str, entries: usize, limit: usize) -> Result<(), BadField> {
    if entries <= limit {
        return Ok(());
    }
    Err(BadField::new(name, format!("{name} has {entries} entries, limit is {limit}")))
}

/// The messages of a chat; content is a string or an array of text parts, which become lines as in vLLM.
/// OpenAI's newer name for the role `system`, `developer`, is kept where `template` mentions it.
///
/// # Errors
/// When they are not a non-empty array of objects with a role, or hold something other than text.
pub fn messages(value: &Value, template: &ChatTemplate) -> Result<Vec<Message>, BadField> {
    let bad = |message: String| BadField::new("messages", message);
    let Value::Array(list) = value else {
        return Err(bad(format!("messages is {}, expected an array of messages", kind(value))));
    };
    if list.is_empty() {
        return Err(bad("messages is empty".to_owned()));
    }
    at_most("messages", list.len(), MAX_MESSAGES)?;
    list.iter()
        .enumerate()
        .map(|(index, item)| {
            let Value::Object(map) = item else {
                return Err(bad(format!(
                    "messages[{index}] is {}, expected an object",
                    kind(item)
                )));
            };
            message(map, template).map_err(|why| bad(format!("messages[{index}] {why}")))
        })
        .collect()
}

fn message(map: &Map<String, Value>, template: &ChatTemplate) -> Result<Message, String> {
    let role = match map.get("role") {
        // A template that does not know it would leave the message out.
        Some(Value::String(role)) if role == "developer" && !template.mentions(role) => "system",
        Some(Value::String(role)) => role,
        Some(other) => return Err(format!("has a role that is {}", kind(other))),
        None => return Err("has no role".to_owned()),
    };
    // Clients say `null` and `[]` for what they leave out.
    let used = |value: &Value| !value.is_null() && *value != Value::Array(Vec::new());
    if map.get("function_call").is_some_and(used) {
        return Err("has function_call, which this server does not offer".to_owned());
    }
    let called = role == "assistant" && map.get("tool_calls").is_some_and(used);
    let content = match map.get("content") {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(parts)) => {
            parts.iter().map(part).collect::<Result<Vec<_>, _>>()?.join("\n")
        }
        None | Some(Value::Null) if called => String::new(),
        None | Some(Value::Null) => return Err("has no content".to_owned()),
        Some(other) => return Err(format!("has content that is {}", kind(other))),
    };
    // The template reads what else it knows: `name`, `reasoning_content`.
    let mut fields: Map<String, Value> =
        map.iter().filter(|(_, v)| used(v)).map(|(k, v)| (k.clone(), v.clone())).collect();
    fields.insert("role".to_owned(), Value::from(role));
    fields.insert("content".to_owned(), Value::String(content));
    match role {
        "assistant" if called => {
            fields.insert("tool_calls".to_owned(), crate::tools::calls(map)?);
        }
        "tool" => crate::tools::check_result(map)?,
        _ => {}
    }
    Message::from_json(Value::Object(fields)).map_err(|error| error.to_string())
}

/// The text of one part of a message.
fn part(part: &Value) -> Result<&str, String> {
    match (part.get("type").and_then(Value::as_str), part.get("text").and_then(Value::as_str)) {
        (Some("text"), Some(text)) => Ok(text),
        (Some("text"), None) => Err("has a text part without text".to_owned()),
        (Some(_), _) => Err("has a part that is not text, which this server does not offer".into()),
        (None, _) => Err("has a part without a type".to_owned()),
    }
}

/// The fault that an engine's refusal amounts to; its message begins with the parameter's name.
pub(crate) fn refusal(error: &engine::Error) -> BadField {
    let message = error.to_string();
    let first = message.split_whitespace().next().unwrap_or_default();
    let named = KNOWN.contains(&first).then(|| first.to_owned());
    BadField { param: named, message, code: "invalid_value" }
}

/// Parameters that an engine's refusal may name.
const KNOWN: [&str; 15] = [
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "n",
    "max_tokens",
    "min_tokens",
    "logprobs",
    "prompt_logprobs",
    "logit_bias",
    "stop_token_ids",
    "prompt",
];

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<SamplingParams, BadField> {
        let mut fields = Fields::parse(json.as_bytes())?;
        sampling_params(&mut fields, &SamplingParams::default())
    }

    #[test]
    fn every_parameter_arrives() {
        let params = parse(
            r#"{"temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "presence_penalty": 1,
            "frequency_penalty": -1, "repetition_penalty": 1.5, "logit_bias": {"7": -100, "8": 2.5},
            "stop": "END", "stop_token_ids": [3, 4], "ignore_eos": true, "max_tokens": 9,
            "min_tokens": 2, "seed": -1, "n": 3, "include_stop_str_in_output": true}"#,
        )
        .unwrap();
        let expected = SamplingParams {
            temperature: 0.5,
            top_k: Some(40),
            top_p: 0.9,
            min_p: 0.1,
            presence_penalty: 1.0,
            frequency_penalty: -1.0,
            repetition_penalty: 1.5,
            logit_bias: vec![(7, -100.0), (8, 2.5)],
            stop: vec!["END".to_owned()],
            stop_text: StopText::Include,
            stop_token_ids: vec![3, 4],
            eos: EosRule::Ignore,
            max_tokens: Some(9),
            min_tokens: 2,
            seed: Some(u64::MAX),
            n: 3,
            logprobs: None,
        };
        assert_eq!(params, expected);
    }

    #[test]
    fn what_a_model_recommends_is_the_default() {
        let generation = GenerationDefaults {
            temperature: Some(0.5),
            top_k: Some(0),
            max_new_tokens: Some(7),
            ..GenerationDefaults::default()
        };
        let params = default_params(&generation);
        assert_eq!((params.temperature, params.top_k, params.max_tokens), (0.5, None, Some(7)));
        let silent =
            GenerationDefaults { max_new_tokens: Some(0), ..GenerationDefaults::default() };
        assert_eq!(default_params(&silent), SamplingParams::default());
    }

    #[test]
    fn off_values_and_tiny_temperatures() {
        assert_eq!(parse(r#"{"top_k": -1}"#).unwrap().top_k, None);
        assert_eq!(parse(r#"{"top_k": 0}"#).unwrap().top_k, None);
        assert_eq!(
            parse(r#"{"top_k": -2}"#).unwrap_err().message,
            "top_k is -2, limit is at least -1"
        );
        assert_eq!(parse(r#"{"temperature": 1e-30}"#).unwrap().temperature, 0.0);
        assert_eq!(parse(r#"{"temperature": -1.0}"#).unwrap().temperature, -1.0);
        assert_eq!(
            parse(r#"{"max_tokens": 9223372036854775807}"#).unwrap().max_tokens,
            Some(i64::MAX as usize)
        );
    }

    #[test]
    fn stops_are_bounded_and_not_empty() {
        assert_eq!(parse(r#"{"stop": ["a", "b"]}"#).unwrap().stop, ["a", "b"]);
        assert_eq!(
            parse(r#"{"stop": ["a", ""]}"#).unwrap_err().message,
            "stop has an empty string"
        );
        let many = format!(r#"{{"stop": [{}"x"]}}"#, r#""x","#.repeat(64));
        assert_eq!(parse(&many).unwrap_err().message, "stop has 65 entries, limit is 64");
        let bias = r#"{"logit_bias": {"a": 1}}"#;
        assert_eq!(parse(bias).unwrap_err().param.as_deref(), Some("logit_bias"));
    }

    #[test]
    fn messages_are_text() {
        let template = ChatTemplate::new("", Map::new()).unwrap();
        let read = |json: &str| messages(&serde_json::from_str(json).unwrap(), &template);
        let parts = r#"[{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]"#;
        assert_eq!(read(parts).unwrap()[0], Message::new("user", "a\nb"));
        // The template reads what it knows of the rest; what a client leaves out it says with null.
        let history = r#"[{"role": "assistant", "content": null, "name": null, "reasoning_content": "hm",
            "tool_calls": [{"id": "c", "function": {"name": "f", "arguments": "{\"a\": 1}"}}]}]"#;
        let fields = serde_json::Value::Object(read(history).unwrap()[0].fields().clone());
        let call = serde_json::json!({"id": "c", "type": "function",
            "function": {"name": "f", "arguments": {"a": 1}}});
        assert_eq!(
            fields,
            serde_json::json!({"role": "assistant", "content": "", "reasoning_content": "hm",
                "tool_calls": [call]})
        );
        let message = |json: &str| read(json).unwrap_err().message;
        assert_eq!(message("{}"), "messages is an object, expected an array of messages");
        assert_eq!(message("[]"), "messages is empty");
        assert_eq!(message(r#"[{"role": "user"}]"#), "messages[0] has no content");
        assert_eq!(message(r#"[{"content": "x"}]"#), "messages[0] has no role");
        let image = r#"[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]"#;
        assert_eq!(
            message(image),
            "messages[0] has a part that is not text, which this server does not offer"
        );
    }

    #[test]
    fn developers_are_systems_where_the_template_does_not_know_them() {
        let list = serde_json::json!([{"role": "developer", "content": "x"}]);
        for (source, role) in [
            ("{% if m.role == 'system' %}", "system"),
            ("{% if m.role == 'developer' %}", "developer"),
        ] {
            let template =
                ChatTemplate::new(&format!("{source}{{% endif %}}"), Map::new()).unwrap();
            assert_eq!(messages(&list, &template).unwrap(), [Message::new(role, "x")]);
        }
    }
}
