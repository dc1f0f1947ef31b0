//! What a request says of its prompt besides its tokens, in vLLM's words: `prompt_logprobs`,
//! `truncate_prompt_tokens`, `cache_salt`, `chat_template_kwargs`; and `priority`, which is not offered.

use std::hash::BuildHasher;

use engine::{ChatTemplate, MAX_LOGPROBS};
use serde_json::{Map, Value};

use crate::fields::{BadField, Fields, kind};
use crate::params::at_most;

/// Longest `cache_salt`, in bytes.
const MAX_SALT_BYTES: usize = 1024;
/// Most variables in `chat_template_kwargs`.
const MAX_VARIABLES: usize = 64;
/// Longest name of such a variable, in bytes.
const MAX_VARIABLE_NAME_BYTES: usize = 64;
/// Longest string that is the value of such a variable, in bytes.
const MAX_VARIABLE_BYTES: usize = 4096;

/// How much of a prompt is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Truncate {
    /// All of it.
    Keep,
    /// Its last tokens, this many.
    To(usize),
    /// As many of its last tokens as leave room for the answer.
    ToFit,
}

/// What both APIs' requests may say of their prompts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PromptParams {
    /// Alternatives beside each prompt token, where those are reported.
    pub(crate) logprobs: Option<usize>,
    pub(crate) truncate: Truncate,
    /// The engine's salt; 0 is shared by all who give none.
    pub(crate) salt: u64,
}

impl PromptParams {
    /// Takes them out of `fields`, and a `priority` of 0. `hasher` turns salts into numbers: keyed at
    /// random, so that nobody can find two salts of the same number. `max_len` is the longest sequence.
    ///
    /// # Errors
    /// When a field has the wrong type or is beyond its limit.
    pub(crate) fn read(
        fields: &mut Fields,
        hasher: &impl BuildHasher,
        max_len: usize,
    ) -> Result<Self, BadField> {
        priority(fields)?;
        Ok(Self {
            logprobs: logprobs(fields)?,
            truncate: truncate(fields, max_len)?,
            salt: salt(fields, hasher)?,
        })
    }

    /// Cuts `prompts` as asked, where `answer` tokens are to follow in a sequence of at most `max_len`.
    pub(crate) fn cut(&self, prompts: &mut [Vec<u32>], answer: usize, max_len: usize) {
        let keep = match self.truncate {
            Truncate::Keep => return,
            Truncate::To(keep) => keep,
            // An answer that fits with no prompt is refused with the lengths as they are.
            Truncate::ToFit if answer >= max_len => return,
            Truncate::ToFit => max_len - answer,
        };
        for prompt in prompts {
            prompt.drain(..prompt.len().saturating_sub(keep));
        }
    }
}

/// vLLM's sense: lower is first, and other values than 0 need a scheduler that heeds them.
fn priority(fields: &mut Fields) -> Result<(), BadField> {
    match fields.integer("priority")? {
        None | Some(0) => Ok(()),
        Some(priority) => {
            let message =
                format!("priority is {priority}, limit is 0: priority scheduling is not offered");
            Err(BadField::new("priority", message).with_code("unsupported_parameter"))
        }
    }
}

fn logprobs(fields: &mut Fields) -> Result<Option<usize>, BadField> {
    let Some(asked) = fields.integer("prompt_logprobs")? else { return Ok(None) };
    match usize::try_from(asked) {
        Ok(k) if k <= MAX_LOGPROBS => Ok(Some(k)),
        _ => {
            let whole = if asked == -1 { ": the whole vocabulary is not offered" } else { "" };
            let message =
                format!("prompt_logprobs is {asked}, limit is 0 to {MAX_LOGPROBS}{whole}");
            Err(BadField::new("prompt_logprobs", message))
        }
    }
}

fn truncate(fields: &mut Fields, max_len: usize) -> Result<Truncate, BadField> {
    let Some(asked) = fields.integer("truncate_prompt_tokens")? else { return Ok(Truncate::Keep) };
    match (asked, usize::try_from(asked)) {
        (-1, _) => Ok(Truncate::ToFit),
        (_, Ok(keep)) if (1..=max_len).contains(&keep) => Ok(Truncate::To(keep)),
        _ => {
            let message =
                format!("truncate_prompt_tokens is {asked}, limit is -1 or 1 to {max_len}");
            Err(BadField::new("truncate_prompt_tokens", message))
        }
    }
}

fn salt(fields: &mut Fields, hasher: &impl BuildHasher) -> Result<u64, BadField> {
    let Some(salt) = fields.string("cache_salt")? else { return Ok(0) };
    match salt.len() {
        0 => Err(BadField::new("cache_salt", "cache_salt is empty")),
        bytes if bytes > MAX_SALT_BYTES => {
            let message = format!("cache_salt has {bytes} bytes, limit is {MAX_SALT_BYTES}");
            Err(BadField::new("cache_salt", message))
        }
        // 0 is for those who share.
        _ => Ok(hasher.hash_one(&salt).max(1)),
    }
}

/// Takes `chat_template_kwargs`: variables for `template`, each a boolean, a number, a string or null.
///
/// # Errors
/// When one is of another type, too long, or has a name that the template is given in any case.
pub(crate) fn template_variables(
    fields: &mut Fields,
    template: &ChatTemplate,
) -> Result<Map<String, Value>, BadField> {
    const NAME: &str = "chat_template_kwargs";
    let Some(given) = fields.take(NAME) else { return Ok(Map::new()) };
    let Value::Object(map) = given else {
        let message = format!("{NAME} is {}, expected an object", kind(&given));
        return Err(BadField::new(NAME, message));
    };
    at_most(NAME, map.len(), MAX_VARIABLES)?;
    for (name, value) in &map {
        check_variable(name, value, template)
            .map_err(|why| BadField::new(NAME, format!("{NAME} {why}")))?;
    }
    Ok(map)
}

fn check_variable(name: &str, value: &Value, template: &ChatTemplate) -> Result<(), String> {
    let (bytes, limit) = (name.len(), MAX_VARIABLE_NAME_BYTES);
    if bytes == 0 || bytes > limit {
        return Err(format!("has a name of {bytes} bytes, limit is 1 to {limit}"));
    }
    if template.is_given(name) {
        return Err(format!("has {name:?}, which the template is given in any case"));
    }
    match value {
        Value::Array(_) | Value::Object(_) => Err(format!(
            "has {name:?} that is {}, expected a boolean, a number, a string or null",
            kind(value)
        )),
        Value::String(text) if text.len() > MAX_VARIABLE_BYTES => {
            let bytes = text.len();
            Err(format!("has {name:?} of {bytes} bytes, limit is {MAX_VARIABLE_BYTES}"))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::hash::RandomState;

    use serde_json::json;

    use super::*;

    fn read(body: Value) -> Result<PromptParams, String> {
        let mut fields = Fields::parse(body.to_string().as_bytes()).unwrap();
        PromptParams::read(&mut fields, &RandomState::new(), 100).map_err(|bad| bad.message)
    }

    #[test]
    fn each_is_read_and_bounded() {
        let none = PromptParams { logprobs: None, truncate: Truncate::Keep, salt: 0 };
        assert_eq!(read(json!({})), Ok(none));
        assert_eq!(read(json!({"priority": 0, "prompt_logprobs": 20})).unwrap().logprobs, Some(20));
        let truncate = |k: i64| read(json!({"truncate_prompt_tokens": k})).map(|p| p.truncate);
        assert_eq!(truncate(-1), Ok(Truncate::ToFit));
        assert_eq!(truncate(100), Ok(Truncate::To(100)));
        for k in [0, -2, 101] {
            let message = format!("truncate_prompt_tokens is {k}, limit is -1 or 1 to 100");
            assert_eq!(truncate(k), Err(message));
        }
        let message = |body| read(body).unwrap_err();
        assert_eq!(
            message(json!({"prompt_logprobs": -1})),
            "prompt_logprobs is -1, limit is 0 to 20: the whole vocabulary is not offered"
        );
        assert_eq!(
            message(json!({"prompt_logprobs": 21})),
            "prompt_logprobs is 21, limit is 0 to 20"
        );
        assert_eq!(message(json!({"cache_salt": ""})), "cache_salt is empty");
        assert_eq!(
            message(json!({"cache_salt": "x".repeat(1025)})),
            "cache_salt has 1025 bytes, limit is 1024"
        );
        assert_eq!(
            message(json!({"priority": -3})),
            "priority is -3, limit is 0: priority scheduling is not offered"
        );
    }

    #[test]
    fn prompts_keep_their_last_tokens() {
        let cut = |truncate, answer| {
            let mut prompts = vec![(0..9).collect(), vec![7]];
            PromptParams { logprobs: None, truncate, salt: 0 }.cut(&mut prompts, answer, 10);
            prompts
        };
        assert_eq!(cut(Truncate::To(2), 1), [vec![7, 8], vec![7]]);
        assert_eq!(cut(Truncate::ToFit, 6), [vec![5, 6, 7, 8], vec![7]]);
        assert_eq!(cut(Truncate::ToFit, 10)[0].len(), 9);
        assert_eq!(cut(Truncate::Keep, 6)[0].len(), 9);
    }
}
