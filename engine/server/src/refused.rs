//! Features of the API that are not offered: asking for one is an error that names it.
//!
//! The value that means "off" is accepted, because many clients send it. What is neither known nor
//! refused is accepted too, and reported once.

use serde_json::{Value, json};

use crate::fields::{BadField, Fields};

/// Fields that belong to the API, change nothing here and deserve no warning.
pub(crate) const IGNORED: [&str; 8] = [
    "user",
    "metadata",
    "store",
    "service_tier",
    "parallel_tool_calls",
    "safety_identifier",
    "prompt_cache_key",
    "request_id",
];

/// Features with the values that leave them off.
fn refused() -> [(&'static str, Vec<Value>); 35] {
    let off = || vec![json!(false)];
    let none = Vec::new;
    [
        ("tools", vec![json!([])]),
        ("tool_choice", vec![json!("none"), json!("auto")]),
        ("functions", vec![json!([])]),
        ("function_call", vec![json!("none"), json!("auto")]),
        ("best_of", vec![json!(1)]),
        ("suffix", vec![json!("")]),
        ("prompt_logprobs", off()),
        ("echo", off()),
        ("guided_decoding_backend", none()),
        ("guided_whitespace_pattern", none()),
        ("grammar", vec![json!("")]),
        ("allowed_token_ids", vec![json!([])]),
        ("bad_words", vec![json!([])]),
        ("truncate_prompt_tokens", none()),
        ("use_beam_search", off()),
        ("length_penalty", vec![json!(1), json!(1.0)]),
        ("prompt_embeds", none()),
        ("chat_template", none()),
        ("chat_template_kwargs", vec![json!({})]),
        ("documents", vec![json!([])]),
        ("add_generation_prompt", vec![json!(true)]),
        ("continue_final_message", off()),
        ("add_special_tokens", none()),
        ("skip_special_tokens", vec![json!(true)]),
        ("spaces_between_special_tokens", vec![json!(true)]),
        ("return_tokens_as_token_ids", off()),
        ("priority", vec![json!(0)]),
        ("cache_salt", vec![json!("")]),
        ("modalities", vec![json!(["text"])]),
        ("audio", none()),
        ("prediction", none()),
        ("web_search_options", none()),
        ("logits_processors", vec![json!([])]),
        ("mm_processor_kwargs", vec![json!({})]),
        ("kv_transfer_params", vec![json!({})]),
    ]
}

/// The names of the features.
pub(crate) fn names() -> impl Iterator<Item = &'static str> {
    refused().into_iter().map(|(name, _)| name)
}

/// Takes every refused and every ignored field.
///
/// # Errors
/// The first feature that is asked for.
pub(crate) fn refuse(fields: &mut Fields) -> Result<(), BadField> {
    for (name, off) in refused() {
        if fields.take(name).is_some_and(|value| !off.contains(&value)) {
            return Err(unsupported(name));
        }
    }
    for name in IGNORED {
        fields.take(name);
    }
    Ok(())
}

/// The error for a feature that is not offered.
pub(crate) fn unsupported(name: &str) -> BadField {
    BadField::new(name, format!("{name} is not offered by this server"))
        .with_code("unsupported_parameter")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn features_are_refused_by_name_unless_off() {
        for (name, off) in refused() {
            let mut fields =
                Fields::parse(json!({name: {"on": 1}}).to_string().as_bytes()).unwrap();
            let bad = refuse(&mut fields).unwrap_err();
            assert_eq!((bad.param.as_deref(), bad.code), (Some(name), "unsupported_parameter"));
            for value in off.into_iter().chain([Value::Null]) {
                let mut fields =
                    Fields::parse(json!({name: value}).to_string().as_bytes()).unwrap();
                assert_eq!(refuse(&mut fields), Ok(()), "{name}");
                assert_eq!(fields.names().count(), 0);
            }
        }
    }
}
