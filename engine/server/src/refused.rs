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
fn refused() -> [(&'static str, Vec<Value>); 28] {
    let off = || vec![json!(false)];
    let none = Vec::new;
    [
        ("tools", vec![json!([])]),
        ("tool_choice", vec![json!("none"), json!("auto")]),
        ("functions", vec![json!([])]),
        ("function_call", vec![json!("none"), json!("auto")]),
        ("suffix", vec![json!("")]),
        ("guided_decoding_backend", none()),
        ("guided_whitespace_pattern", none()),
        ("grammar", vec![json!("")]),
        ("allowed_token_ids", vec![json!([])]),
        ("bad_words", vec![json!([])]),
        ("use_beam_search", off()),
        ("length_penalty", vec![json!(1), json!(1.0)]),
        ("prompt_embeds", none()),
        ("chat_template", none()),
        ("documents", vec![json!([])]),
        ("add_generation_prompt", vec![json!(true)]),
        ("continue_final_message", off()),
        ("add_special_tokens", none()),
        ("skip_special_tokens", vec![json!(true)]),
        ("spaces_between_special_tokens", vec![json!(true)]),
        ("return_tokens_as_token_ids", off()),
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
    // As many as are answered with is what is sampled anyway.
    let n = fields.peek("n").cloned().unwrap_or_else(|| json!(1));
    off_only(fields, "best_of", &[n])?;
    for (name, off) in refused() {
        off_only(fields, name, &off)?;
    }
    for name in IGNORED {
        fields.take(name);
    }
    Ok(())
}

/// Takes a field whose feature is not offered.
///
/// # Errors
/// When its value is not one of those that leave it off.
pub(crate) fn off_only(fields: &mut Fields, name: &str, off: &[Value]) -> Result<(), BadField> {
    match fields.take(name) {
        Some(value) if !off.contains(&value) => Err(unsupported(name)),
        _ => Ok(()),
    }
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

    #[test]
    fn best_of_may_only_say_what_n_says() {
        let read = |body: Value| refuse(&mut Fields::new(body.as_object().unwrap().clone()));
        assert_eq!(read(json!({"best_of": 1})), Ok(()));
        assert_eq!(read(json!({"best_of": 3, "n": 3})), Ok(()));
        for body in [json!({"best_of": 2}), json!({"best_of": 1, "n": 3}), json!({"best_of": "1"})]
        {
            assert_eq!(read(body).unwrap_err().param.as_deref(), Some("best_of"));
        }
    }
}
