//! Structured output: the fields that ask for a grammar, and its compilation.
//!
//! `response_format` as OpenAI has it, `structured_outputs` and the older `guided_*` fields as vLLM has
//! them. One request has one grammar. Leaves out structural tags.

use std::sync::OnceLock;

use engine::{Constraint, ErrorKind, Grammar, GrammarCompiler, Service, UnknownKeywords};
use serde_json::Value;

use crate::api_error::ApiError;
use crate::fields::{BadField, Fields, kind};
use crate::job::needs;
use crate::params::at_most;
use crate::refused::unsupported;

/// Most texts a choice may be among.
const MAX_CHOICES: usize = 4096;

/// A grammar and the field that asked for it.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Structured {
    pub(crate) param: &'static str,
    pub(crate) grammar: Grammar,
}

/// The model's grammar compiler, built by the first request that needs it.
#[derive(Debug, Default)]
pub(crate) struct Grammars {
    compiler: OnceLock<Result<GrammarCompiler, String>>,
}

impl Grammars {
    /// Compiles what a request asks for. Takes processor time: not for an async thread.
    ///
    /// # Errors
    /// When the grammar is at fault, others are being compiled, or the model cannot have one.
    pub(crate) fn compile(
        &self,
        service: &Service,
        asked: &Structured,
    ) -> Result<Constraint, ApiError> {
        let param = asked.param;
        let Some(tokenizer) = service.tokenizer() else {
            return Err(needs(param, "a tokenizer"));
        };
        let eos = match service.eos() {
            [] => tokenizer.eos_ids(),
            eos => eos,
        };
        let build = || {
            GrammarCompiler::new(tokenizer, service.model().vocab_size, eos)
                .map_err(|error| error.to_string())
        };
        let compiler = self.compiler.get_or_init(build).as_ref().map_err(|why| {
            let message = format!("{param} cannot be had with this model: {why}");
            BadField::new(param, message).with_code("unsupported_parameter")
        })?;
        compiler.compile(&asked.grammar).map_err(|error| match error.kind() {
            ErrorKind::Busy(_) => ApiError::compilers_busy(),
            _ => BadField::new(param, format!("{param}: {error}")).into(),
        })
    }
}

type Read = fn(&'static str, Value) -> Result<Grammar, BadField>;

/// Kinds of grammars: the name within `structured_outputs`, the older one of a field, and what reads its value.
const KINDS: [(&str, &str, Read); 4] = [
    ("json", "guided_json", json),
    ("regex", "guided_regex", regex),
    ("choice", "guided_choice", choice),
    ("grammar", "guided_grammar", lark),
];

/// Takes the fields that ask for a grammar.
///
/// # Errors
/// When one of them has a wrong type, or several grammars are asked for.
pub(crate) fn read(fields: &mut Fields) -> Result<Option<Structured>, BadField> {
    let mut found = Vec::new();
    if let Some(mut format) = fields.object("response_format")? {
        found.extend(response_format(&mut format)?.map(|g| ("response_format", g)));
    }
    if let Some(mut inner) = fields.object("structured_outputs")? {
        found.extend(structured_outputs(&mut inner)?);
    }
    for (_, name, read) in KINDS {
        if let Some(value) = fields.take(name) {
            found.push((name, read(name, value)?));
        }
    }
    let mut found = found.into_iter();
    let first = found.next().map(|(param, grammar)| Structured { param, grammar });
    match found.next() {
        None => Ok(first),
        Some((param, _)) => Err(only_one(param)),
    }
}

/// The error for a second grammar.
pub(crate) fn only_one(param: &str) -> BadField {
    BadField::new(param, format!("{param} is given beside another constraint, limit is 1"))
}

fn response_format(format: &mut Fields) -> Result<Option<Grammar>, BadField> {
    const NAME: &str = "response_format";
    match format.string("type")?.as_deref() {
        Some("text") => Ok(None),
        Some("json_object") => Ok(Some(Grammar::json_object())),
        Some("json_schema") => {
            let missing =
                || BadField::new(NAME, "response_format has no json_schema with a schema");
            let mut outer = format.object("json_schema")?.ok_or_else(missing)?;
            let unknown = match outer.flag("strict")? {
                Some(true) => UnknownKeywords::Refuse,
                _ => UnknownKeywords::Ignore,
            };
            let schema = outer.take("schema").ok_or_else(missing)?;
            Ok(Some(Grammar::JsonSchema { schema, unknown }))
        }
        _ => {
            let expected = "expected text, json_object or json_schema";
            Err(BadField::new(NAME, format!("response_format has an unknown type, {expected}")))
        }
    }
}

fn structured_outputs(inner: &mut Fields) -> Result<Vec<(&'static str, Grammar)>, BadField> {
    const NAME: &str = "structured_outputs";
    let mut found = Vec::new();
    for (name, _, read) in KINDS {
        if let Some(value) = inner.take(name) {
            found.push((NAME, read(NAME, value)?));
        }
    }
    if inner.flag("json_object")?.unwrap_or(false) {
        found.push((NAME, Grammar::json_object()));
    }
    for off in ["disable_fallback", "disable_any_whitespace", "disable_additional_properties"] {
        if inner.flag(off)?.unwrap_or(false) {
            return Err(unsupported(NAME));
        }
    }
    if inner.names().next().is_some() {
        return Err(unsupported(NAME));
    }
    Ok(found)
}

/// A schema, as it is or as text.
fn json(name: &'static str, value: Value) -> Result<Grammar, BadField> {
    let schema = match value {
        Value::String(text) => serde_json::from_str(&text).map_err(|error| {
            BadField::new(name, format!("{name} has a schema that is not JSON: {error}"))
        })?,
        other => other,
    };
    Ok(Grammar::JsonSchema { schema, unknown: UnknownKeywords::Refuse })
}

fn regex(name: &'static str, value: Value) -> Result<Grammar, BadField> {
    text(name, value).map(Grammar::Regex)
}

fn lark(name: &'static str, value: Value) -> Result<Grammar, BadField> {
    text(name, value).map(Grammar::Lark)
}

fn text(name: &'static str, value: Value) -> Result<String, BadField> {
    match value {
        Value::String(text) => Ok(text),
        other => Err(BadField::new(name, format!("{name} is {}, expected a string", kind(&other)))),
    }
}

fn choice(name: &'static str, value: Value) -> Result<Grammar, BadField> {
    let wrong = || BadField::new(name, format!("{name} has a choice that is no array of strings"));
    let list = value.as_array().ok_or_else(wrong)?;
    at_most(name, list.len(), MAX_CHOICES)?;
    let texts = list.iter().map(|item| item.as_str().map(str::to_owned));
    texts.collect::<Option<Vec<_>>>().map(Grammar::Choice).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn of(body: Value) -> Result<Option<Structured>, BadField> {
        read(&mut Fields::new(body.as_object().unwrap().clone()))
    }

    #[test]
    fn both_spellings_ask_for_the_same() {
        let pairs = [
            (json!({"guided_regex": "a+"}), json!({"structured_outputs": {"regex": "a+"}})),
            (json!({"guided_json": "{}"}), json!({"structured_outputs": {"json": {}}})),
            (json!({"guided_choice": ["a"]}), json!({"structured_outputs": {"choice": ["a"]}})),
            (json!({"guided_grammar": "x"}), json!({"structured_outputs": {"grammar": "x"}})),
        ];
        for (old, new) in pairs {
            assert_eq!(of(old).unwrap().unwrap().grammar, of(new).unwrap().unwrap().grammar);
        }
        let object = of(json!({"response_format": {"type": "json_object"}})).unwrap().unwrap();
        assert_eq!(object.grammar, Grammar::json_object());
        assert_eq!(of(json!({"response_format": {"type": "text"}})).unwrap(), None);
    }

    #[test]
    fn faults_name_the_field() {
        let cases = [
            (json!({"guided_regex": 5}), "guided_regex"),
            (json!({"guided_choice": [1]}), "guided_choice"),
            (json!({"guided_json": "{"}), "guided_json"),
            (json!({"guided_regex": "a", "guided_json": {}}), "guided_regex"),
            (json!({"response_format": {"type": "json_schema"}}), "response_format"),
            (json!({"response_format": {"type": "xml"}}), "response_format"),
            (json!({"structured_outputs": {"structural_tag": "x"}}), "structured_outputs"),
            (json!({"structured_outputs": {"json": {}, "regex": "a"}}), "structured_outputs"),
        ];
        for (body, param) in cases {
            assert_eq!(of(body).unwrap_err().param.as_deref(), Some(param));
        }
    }
}
