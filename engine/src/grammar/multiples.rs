//! What a grammar's `multipleOf` cost, found out before it is compiled.
//!
//! The compiler follows a number's remainder, by as many states as the divisor has remainders, and makes them
//! before it counts its work: a large divisor, or several without a common one, would take a processor and
//! memory for minutes. Leaves out all else that a grammar costs, which the compiler's own limits bound.

use serde_json::Value;

use crate::error::{Error, Result};

/// Limit of the least common multiple of all `multipleOf` of a grammar, their decimal points left out: a
/// compiler makes that many states of them before it counts its work. 100,000 take it 2 s.
const MAX_MULTIPLE: u64 = 10_000;
/// Keywords whose arrays are data and ask for nothing. What else is data may be a property of that name, and counts.
const DATA: [&str; 2] = ["enum", "examples"];

/// The schemas behind each `%json` of a Lark grammar; what does not parse there is the compiler's to refuse.
pub(super) fn schemas_of(lark: &str) -> Vec<Value> {
    let behind = lark.split("%json").skip(1);
    behind
        .filter_map(|text| serde_json::Deserializer::from_str(text).into_iter().next()?.ok())
        .collect()
}

/// Fails where the multiples that schemas ask for have more states than [`MAX_MULTIPLE`].
pub(super) fn check_multiples(schemas: &[Value]) -> Result<()> {
    let mut multiple = 1;
    let mut left: Vec<&Value> = schemas.iter().collect();
    while let Some(value) = left.pop() {
        match value {
            Value::Object(fields) => {
                if let Some(divisor) = fields.get("multipleOf").and_then(digits) {
                    multiple = least_common_multiple(multiple, divisor);
                }
                let is_data =
                    |name: &String, part: &Value| part.is_array() && DATA.contains(&name.as_str());
                let parts = fields.iter().filter(|(name, part)| !is_data(name, part));
                left.extend(parts.map(|(_, part)| part));
            }
            Value::Array(items) => left.extend(items),
            _ => {}
        }
    }
    if multiple <= MAX_MULTIPLE {
        return Ok(());
    }
    Err(Error::request(format!(
        "grammar's multipleOf have the least common multiple {multiple}, decimal points left out, limit is \
         {MAX_MULTIPLE}"
    )))
}

/// The digits of a number as the compiler takes them: 25 of 0.25, 1 of 1.0 and -1, none of what it refuses.
fn digits(value: &Value) -> Option<u64> {
    let mut number = value.as_f64()?.abs();
    let mut point = false;
    while number.fract() != 0.0 {
        (number, point) = (number * 10.0, true);
    }
    if number == 0.0 || number > f64::from(u32::MAX) {
        return None;
    }
    let mut digits = number as u64;
    while point && digits.is_multiple_of(10) {
        digits /= 10;
    }
    Some(digits)
}

/// The least common multiple of two positive numbers, or the most there is.
fn least_common_multiple(a: u64, b: u64) -> u64 {
    let (mut x, mut y) = (a, b);
    while y > 0 {
        (x, y) = (y, x % y);
    }
    (a / x).saturating_mul(b)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grammar::{Grammar, UnknownKeywords};

    #[test]
    fn multiples_that_make_too_many_states_are_refused_before_they_do() {
        let schema = |text: &str| serde_json::from_str::<Value>(text).expect("JSON");
        let lower = |text: &str| {
            let unknown = UnknownKeywords::Ignore;
            Grammar::JsonSchema { schema: schema(text), unknown }.lower().map(drop)
        };
        for good in [
            r#"{"multipleOf": 0.01}"#,
            r#"{"allOf": [{"multipleOf": 2.5}, {"multipleOf": -400}], "items": {"multipleOf": 12}}"#,
            r#"{"properties": {"multipleOf": {"multipleOf": 1e4}}}"#,
            r#"{"enum": [{"multipleOf": 99999}], "examples": [{"multipleOf": 99999}]}"#,
        ] {
            assert_eq!(lower(good).map_err(|e| e.to_string()), Ok(()), "{good}");
        }
        for bad in [
            r#"{"multipleOf": 99999999}"#,
            r#"{"multipleOf": 1.0001}"#,
            r#"{"properties": {"enum": {"multipleOf": 99999999}}}"#,
            r#"{"allOf": [{"multipleOf": 9973}, {"items": [{"multipleOf": 9967}]}]}"#,
            r#"{"\u006dultipleOf": 99999999}"#,
        ] {
            let error = lower(bad).expect_err(bad).to_string();
            assert!(error.contains("least common multiple"), "{error}");
            let lark = format!(r#"start: "%json" a a: %json {bad}"#);
            assert!(Grammar::Lark(lark).lower().is_err(), "{bad}");
        }
        let coprime = r#"a: %json {"multipleOf": 9973} %json{"multipleOf": 9967}"#;
        assert!(Grammar::Lark(coprime.to_owned()).lower().is_err());
    }
}
