//! Methods of Python's strings, lists and dicts that chat templates call.
//!
//! Most are those of `minijinja-contrib`'s `pycompat`; here are those it lacks (`index`, `partition`,
//! `removeprefix`, `rsplit`, `zfill`, ...) and those it has otherwise than Python: `find` counts
//! characters, and `''.isdigit()` is false. Positions and widths are in characters. Left out: methods that
//! change a list or dict, and `center`, `encode`, `expandtabs`, `isidentifier`, `istitle`, `translate`;
//! `casefold` is `lower` with `ss` for `ß`.

use minijinja::value::{ValueKind, from_args};
use minijinja::{Error, ErrorKind, State, Value};

use super::MAX_RENDERED_BYTES;

/// Calls a method that the value's own type does not have.
pub(super) fn call(
    state: &State<'_, '_>,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, Error> {
    let called = match (value.as_str(), value.kind()) {
        (Some(text), _) => of_string(text, method, args)?,
        (None, ValueKind::Seq) if method == "index" => Some(position(value, args)?),
        (None, ValueKind::Map) if method == "copy" => {
            let () = from_args(args)?;
            Some(value.clone())
        }
        _ => None,
    };
    match called {
        Some(result) => Ok(result),
        None => minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args),
    }
}

fn failure(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.into())
}

/// `list.index(item)`.
fn position(list: &Value, args: &[Value]) -> Result<Value, Error> {
    let (item,): (&Value,) = from_args(args)?;
    let found = list.try_iter()?.position(|other| other == *item);
    found.map(Value::from).ok_or_else(|| failure(format!("{item} is not in the list")))
}

fn of_string(text: &str, method: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    Ok(Some(match method {
        "isalnum" | "isalpha" | "isdigit" | "islower" | "isnumeric" | "isspace" | "isupper"
            if text.is_empty() =>
        {
            Value::from(false)
        }
        "find" | "index" => found(text, method, text.find(argument(args)?))?,
        "rfind" | "rindex" => found(text, method, text.rfind(argument(args)?))?,
        "removeprefix" => Value::from(text.strip_prefix(argument(args)?).unwrap_or(text)),
        "removesuffix" => Value::from(text.strip_suffix(argument(args)?).unwrap_or(text)),
        "partition" => {
            let separator = argument(args)?;
            let (before, after) = text.split_once(separator).unwrap_or((text, ""));
            let found = if before.len() == text.len() { "" } else { separator };
            Value::from_iter([before, found, after])
        }
        "rpartition" => {
            let separator = argument(args)?;
            let (before, after) = text.rsplit_once(separator).unwrap_or(("", text));
            let found = if after.len() == text.len() { "" } else { separator };
            Value::from_iter([before, found, after])
        }
        "rsplit" => rsplit(text, args)?,
        "swapcase" => {
            let () = from_args(args)?;
            Value::from(text.chars().map(swapped).collect::<String>())
        }
        "casefold" => {
            let () = from_args(args)?;
            Value::from(text.to_lowercase().replace('ß', "ss"))
        }
        "ljust" => Value::from(text.to_owned() + &fill(text, args)?),
        "rjust" => Value::from(fill(text, args)? + text),
        "zfill" => {
            let (width,): (usize,) = from_args(args)?;
            // A sign stays in front.
            let (sign, digits) = text.split_at(usize::from(text.starts_with(['+', '-'])));
            let zeros = fill(text, &[Value::from(width), Value::from("0")])?;
            Value::from(format!("{sign}{zeros}{digits}"))
        }
        _ => return Ok(None),
    }))
}

/// The only argument, which is text.
fn argument(args: &[Value]) -> Result<&str, Error> {
    let (text,) = from_args(args)?;
    Ok(text)
}

/// What `find` and `index` say of a byte's position.
fn found(text: &str, method: &str, at: Option<usize>) -> Result<Value, Error> {
    match at {
        Some(at) => Ok(Value::from(text[..at].chars().count())),
        None if method.ends_with("find") => Ok(Value::from(-1)),
        None => Err(failure("substring not found")),
    }
}

fn swapped(letter: char) -> String {
    match letter {
        _ if letter.is_uppercase() => letter.to_lowercase().collect(),
        _ => letter.to_uppercase().collect(),
    }
}

/// What makes `text` as wide as asked: `(width, fill=' ')`.
fn fill(text: &str, args: &[Value]) -> Result<String, Error> {
    let (width, letter): (usize, Option<char>) = from_args(args)?;
    if width > MAX_RENDERED_BYTES {
        return Err(failure(format!("width is {width}, limit is {MAX_RENDERED_BYTES}")));
    }
    let missing = width.saturating_sub(text.chars().count());
    Ok(String::from(letter.unwrap_or(' ')).repeat(missing))
}

/// `(separator=None, maxsplit=-1)`: without a separator, runs of white space are one.
fn rsplit(text: &str, args: &[Value]) -> Result<Value, Error> {
    let (separator, most): (Option<&str>, Option<i64>) = from_args(args)?;
    let most = most.and_then(|most| usize::try_from(most).ok()).unwrap_or(usize::MAX);
    let parts = match separator {
        Some("") => return Err(failure("empty separator")),
        Some(separator) => text.rsplitn(most.saturating_add(1), separator).collect::<Vec<_>>(),
        None => {
            let (mut parts, mut rest) = (Vec::new(), text.trim_end());
            while parts.len() < most
                && let Some((before, part)) = rest.rsplit_once(char::is_whitespace)
            {
                parts.push(part);
                rest = before.trim_end();
            }
            parts.extend((!rest.is_empty()).then_some(rest));
            parts
        }
    };
    Ok(parts.into_iter().rev().collect())
}
