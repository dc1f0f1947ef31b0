//! What Python would print: `str`, `repr`, `json.dumps` and `strftime` for chat templates; and what
//! jinja2's tests say of Python's types.
//!
//! Templates are written against jinja2, where `{{ none }}` prints `None` and `tojson` is
//! `json.dumps(x, ensure_ascii=False)`. Left out: locales and time zones (dates are in UTC, names
//! in English), and types that JSON does not have.

use std::fmt::Write;
use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::value::{Kwargs, ValueKind};
use minijinja::{Error, ErrorKind, Value};

/// Deepest nesting that is printed.
const MAX_DEPTH: usize = 100;

fn failure(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.into())
}

fn too_deep() -> Error {
    failure(format!("value is nested deeper than {MAX_DEPTH} levels"))
}

/// jinja2's `is iterable`: what `iter` takes; its undefined value is one.
pub(super) fn is_iterable(value: &Value) -> bool {
    !value.is_none() && value.try_iter().is_ok()
}

/// jinja2's `is sequence`: what has a length and `__getitem__`; its undefined value has. Slices and ranges
/// are iterables here, and so are `items` of a dict, which to jinja2 are no sequence.
pub(super) fn is_sequence(value: &Value) -> bool {
    use ValueKind::{Iterable, Map, Seq, String, Undefined};
    matches!(value.kind(), Seq | Iterable | String | Map | Undefined)
}

/// jinja2's `is number`; a Python `bool` is one.
pub(super) fn is_number(value: &Value) -> bool {
    matches!(value.kind(), ValueKind::Number | ValueKind::Bool)
}

/// `str(value)`; an undefined value prints nothing, as in jinja2.
pub(super) fn to_str(value: &Value) -> Result<String, Error> {
    match value.as_str() {
        Some(text) => Ok(text.to_owned()),
        None if value.is_undefined() => Ok(String::new()),
        None => {
            let mut out = String::new();
            repr(&mut out, value, 0)?;
            Ok(out)
        }
    }
}

fn repr(out: &mut String, value: &Value, depth: usize) -> Result<(), Error> {
    if depth > MAX_DEPTH {
        return Err(too_deep());
    }
    match value.kind() {
        ValueKind::Undefined => out.push_str("Undefined"),
        ValueKind::None => out.push_str("None"),
        ValueKind::Bool => out.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number => push_number(out, value),
        ValueKind::String => push_str_repr(out, value.as_str().unwrap_or_default()),
        ValueKind::Seq => {
            out.push('[');
            for (index, item) in value.try_iter()?.enumerate() {
                out.push_str(if index > 0 { ", " } else { "" });
                repr(out, &item, depth + 1)?;
            }
            out.push(']');
        }
        ValueKind::Map => {
            out.push('{');
            for (index, key) in value.try_iter()?.enumerate() {
                out.push_str(if index > 0 { ", " } else { "" });
                repr(out, &key, depth + 1)?;
                out.push_str(": ");
                repr(out, &value.get_item(&key)?, depth + 1)?;
            }
            out.push('}');
        }
        _ => {
            let _ = write!(out, "{value}");
        }
    }
    Ok(())
}

/// Python's `repr` of a string: single quotes unless only they occur in it.
fn push_str_repr(out: &mut String, text: &str) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    out.push(quote);
    for letter in text.chars() {
        let code = u32::from(letter);
        let _ = match letter {
            '\\' => write!(out, "\\\\"),
            '\n' => write!(out, "\\n"),
            '\r' => write!(out, "\\r"),
            '\t' => write!(out, "\\t"),
            _ if letter == quote => write!(out, "\\{quote}"),
            _ if code < 0x20 || (0x7f..0xa1).contains(&code) || code == 0xad => {
                write!(out, "\\x{code:02x}")
            }
            _ => write!(out, "{letter}"),
        };
    }
    out.push(quote);
}

fn push_number(out: &mut String, value: &Value) {
    match f64::try_from(value.clone()) {
        Ok(float) if !value.is_integer() => push_float(out, float),
        _ => {
            let _ = write!(out, "{value}");
        }
    }
}

/// Python's `repr` of a float: the shortest digits that read back, with an exponent below 1e-4 and
/// from 1e16.
fn push_float(out: &mut String, float: f64) {
    if !float.is_finite() {
        out.push_str(match float {
            _ if float.is_nan() => "NaN",
            _ if float > 0.0 => "Infinity",
            _ => "-Infinity",
        });
        return;
    }
    let scientific = format!("{float:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    let _ = if float != 0.0 && !(-4..16).contains(&exponent) {
        let sign = if exponent < 0 { '-' } else { '+' };
        write!(out, "{digits}e{sign}{:02}", exponent.abs())
    } else if float.fract() == 0.0 {
        write!(out, "{float:.1}")
    } else {
        write!(out, "{float}")
    };
}

/// Arguments of `json.dumps` that templates use.
#[derive(Default)]
struct JsonStyle {
    ascii: bool,
    sort: bool,
    indent: Option<String>,
    item: String,
    key: String,
}

/// The `tojson` filter as `transformers` defines it: `json.dumps` with `ensure_ascii=False` by
/// default, key order kept, nothing escaped for HTML.
pub(super) fn tojson(
    value: &Value,
    indent: Option<Value>,
    kwargs: Kwargs,
) -> Result<String, Error> {
    let indent = match indent {
        Some(indent) => Some(indent),
        None => kwargs.get::<Option<Value>>("indent")?,
    };
    let indent = match indent.filter(|indent| !indent.is_none()) {
        None => None,
        Some(text) if text.as_str().is_some() => text.as_str().map(str::to_owned),
        Some(count) => Some(" ".repeat(usize::try_from(count)?.min(64))),
    };
    let separators: Option<Vec<String>> = kwargs.get("separators")?;
    let item = if indent.is_some() { "," } else { ", " };
    let (item, key) = match separators.as_deref() {
        None => (item.to_owned(), ": ".to_owned()),
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => return Err(failure("tojson: separators must be a pair")),
    };
    let ascii = kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    let sort = kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    kwargs.assert_all_used()?;
    let mut out = String::new();
    JsonStyle { ascii, sort, indent, item, key }.push(&mut out, value, 0)?;
    Ok(out)
}

impl JsonStyle {
    fn push(&self, out: &mut String, value: &Value, depth: usize) -> Result<(), Error> {
        if depth > MAX_DEPTH {
            return Err(too_deep());
        }
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => push_number(out, value),
            ValueKind::String => self.push_string(out, value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => self.push_list(out, value, depth)?,
            ValueKind::Map => self.push_object(out, value, depth)?,
            kind => return Err(failure(format!("tojson: {kind} is not JSON serializable"))),
        }
        Ok(())
    }

    fn push_list(&self, out: &mut String, value: &Value, depth: usize) -> Result<(), Error> {
        out.push('[');
        let mut empty = true;
        for item in value.try_iter()? {
            self.push_gap(out, if empty { "" } else { &self.item }, depth + 1);
            self.push(out, &item, depth + 1)?;
            empty = false;
        }
        if !empty {
            self.push_gap(out, "", depth);
        }
        out.push(']');
        Ok(())
    }

    fn push_object(&self, out: &mut String, value: &Value, depth: usize) -> Result<(), Error> {
        let mut keys: Vec<Value> = value.try_iter()?.collect();
        if self.sort {
            keys.sort();
        }
        out.push('{');
        for (index, key) in keys.iter().enumerate() {
            self.push_gap(out, if index == 0 { "" } else { &self.item }, depth + 1);
            let mut name = String::new();
            match key.as_str() {
                Some(text) => name.push_str(text),
                None => self.push(&mut name, key, depth + 1)?,
            }
            self.push_string(out, &name);
            out.push_str(&self.key);
            self.push(out, &value.get_item(key)?, depth + 1)?;
        }
        if !keys.is_empty() {
            self.push_gap(out, "", depth);
        }
        out.push('}');
        Ok(())
    }

    fn push_gap(&self, out: &mut String, separator: &str, depth: usize) {
        out.push_str(separator);
        if let Some(indent) = &self.indent {
            out.push('\n');
            for _ in 0..depth {
                out.push_str(indent);
            }
        }
    }

    fn push_string(&self, out: &mut String, text: &str) {
        out.push('"');
        for letter in text.chars() {
            let _ = match letter {
                '"' => write!(out, "\\\""),
                '\\' => write!(out, "\\\\"),
                '\n' => write!(out, "\\n"),
                '\r' => write!(out, "\\r"),
                '\t' => write!(out, "\\t"),
                '\u{8}' => write!(out, "\\b"),
                '\u{c}' => write!(out, "\\f"),
                '\0'..='\u{1f}' => write!(out, "\\u{:04x}", u32::from(letter)),
                '\u{7f}'.. if self.ascii && letter != '\u{7f}' => {
                    let mut units = [0; 2];
                    letter
                        .encode_utf16(&mut units)
                        .iter()
                        .try_for_each(|unit| write!(out, "\\u{unit:04x}"))
                }
                _ => write!(out, "{letter}"),
            };
        }
        out.push('"');
    }
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] =
    ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// A point in time, taken apart, in UTC.
struct Civil {
    year: i64,
    month: usize,
    day: i64,
    year_day: i64,
    week_day: usize,
    second: i64,
}

impl Civil {
    /// Days to year, month, day: Howard Hinnant, "chrono-compatible low-level date algorithms".
    fn of(time: SystemTime) -> Self {
        let seconds = match time.duration_since(UNIX_EPOCH) {
            Ok(after) => i64::try_from(after.as_secs()).unwrap_or(i64::MAX / 2),
            Err(before) => -i64::try_from(before.duration().as_secs()).unwrap_or(i64::MAX / 2),
        };
        let days = seconds.div_euclid(86_400);
        let shifted = days + 719_468;
        let era = shifted.div_euclid(146_097);
        let in_era = shifted.rem_euclid(146_097);
        let year_of_era = (in_era - in_era / 1460 + in_era / 36_524 - in_era / 146_096) / 365;
        let from_march = in_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month_from_march = (5 * from_march + 2) / 153;
        let day = from_march - (153 * month_from_march + 2) / 5 + 1;
        let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
        let year = year_of_era + era * 400 + i64::from(month <= 2);
        let leap = (year % 4 == 0 && year % 100 != 0) || year % 400 == 0;
        let year_day = if month > 2 { from_march + 59 + i64::from(leap) } else { from_march - 306 };
        Self {
            year,
            month: usize::try_from(month).unwrap_or(1),
            day,
            year_day: year_day + 1,
            week_day: usize::try_from((days + 4).rem_euclid(7)).unwrap_or(0),
            second: seconds.rem_euclid(86_400),
        }
    }
}

/// `strftime` in the C locale and UTC.
///
/// # Errors
/// On a directive that is not known.
pub(super) fn strftime(format: &str, time: SystemTime) -> Result<String, Error> {
    let civil = Civil::of(time);
    let mut out = String::new();
    let mut letters = format.chars();
    while let Some(letter) = letters.next() {
        if letter != '%' {
            out.push(letter);
            continue;
        }
        let Some(directive) = letters.next() else {
            return Err(failure("strftime_now: format ends in %"));
        };
        if directive == '-' {
            let mut padded = String::new();
            push_directive(&mut padded, letters.next().unwrap_or('-'), &civil)?;
            let trimmed = padded.trim_start_matches('0');
            out.push_str(if trimmed.is_empty() { "0" } else { trimmed });
        } else {
            push_directive(&mut out, directive, &civil)?;
        }
    }
    Ok(out)
}

fn push_directive(out: &mut String, directive: char, civil: &Civil) -> Result<(), Error> {
    let Civil { year, month, day, year_day, week_day, second } = *civil;
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let hour12 = (hour + 11) % 12 + 1;
    let half = if hour < 12 { "AM" } else { "PM" };
    let written = match directive {
        'Y' => write!(out, "{year}"),
        'y' => write!(out, "{:02}", year.rem_euclid(100)),
        'm' => write!(out, "{month:02}"),
        'B' => write!(out, "{}", MONTHS[month - 1]),
        'b' | 'h' => write!(out, "{}", &MONTHS[month - 1][..3]),
        'd' => write!(out, "{day:02}"),
        'e' => write!(out, "{day:2}"),
        'j' => write!(out, "{year_day:03}"),
        'A' => write!(out, "{}", DAYS[week_day]),
        'a' => write!(out, "{}", &DAYS[week_day][..3]),
        'H' => write!(out, "{hour:02}"),
        'I' => write!(out, "{hour12:02}"),
        'M' => write!(out, "{minute:02}"),
        'S' => write!(out, "{second:02}"),
        'p' => write!(out, "{half}"),
        'F' => write!(out, "{year}-{month:02}-{day:02}"),
        'D' => write!(out, "{month:02}/{day:02}/{:02}", year.rem_euclid(100)),
        'T' => write!(out, "{hour:02}:{minute:02}:{second:02}"),
        'R' => write!(out, "{hour:02}:{minute:02}"),
        'Z' => write!(out, "UTC"),
        'z' => write!(out, "+0000"),
        'n' => out.write_char('\n'),
        't' => out.write_char('\t'),
        '%' => write!(out, "%"),
        other => return Err(failure(format!("strftime_now: directive %{other} is not known"))),
    };
    written.map_err(|_| failure("strftime_now: cannot write"))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn floats_print_as_in_python() {
        let cases = [
            (0.0, "0.0"),
            (-0.0, "-0.0"),
            (1.0, "1.0"),
            (0.1, "0.1"),
            (-2.5, "-2.5"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.5e300, "1.5e+300"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (123456.789, "123456.789"),
        ];
        for (float, expected) in cases {
            assert_eq!(to_str(&Value::from(float)).unwrap(), expected);
        }
    }

    #[test]
    fn values_print_as_in_python() {
        let json = serde_json::json!({"a": [1, true, null, "it's"], "b": {"c": "\n\"'\u{1}é"}});
        let text = to_str(&Value::from_serialize(&json)).unwrap();
        assert_eq!(text, r#"{'a': [1, True, None, "it's"], 'b': {'c': '\n"\'\x01é'}}"#);
        assert_eq!(to_str(&Value::UNDEFINED).unwrap(), "");
        assert_eq!(to_str(&Value::from("plain")).unwrap(), "plain");
    }

    #[test]
    fn dates_print_as_in_python() {
        let at = |seconds: u64| UNIX_EPOCH + Duration::from_secs(seconds);
        let cases = [
            (0, "%Y-%m-%d %H:%M:%S %A %j", "1970-01-01 00:00:00 Thursday 001"),
            (951_782_400, "%d %b %Y %j %a", "29 Feb 2000 060 Tue"),
            (1_735_689_599, "%B %-d, %Y %I:%M %p %y %j", "December 31, 2024 11:59 PM 24 366"),
            (1_709_251_199, "%F %T %e %%", "2024-02-29 23:59:59 29 %"),
            (1_772_323_200, "%F %j", "2026-03-01 060"),
        ];
        for (seconds, format, expected) in cases {
            assert_eq!(strftime(format, at(seconds)).unwrap(), expected);
        }
        assert!(strftime("%Q", at(0)).is_err());
        assert!(strftime("%", at(0)).is_err());
        assert_eq!(strftime("%F", UNIX_EPOCH - Duration::from_secs(1)).unwrap(), "1969-12-31");
    }
}
