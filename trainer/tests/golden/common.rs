//! Reading cases and comparing numbers.

use std::ops::Range;
use std::path::{Path, PathBuf};

use serde_json::Value;

/// Relative and absolute tolerance.
#[derive(Clone, Copy)]
pub(crate) struct Tolerance {
    pub(crate) relative: f64,
    pub(crate) absolute: f64,
}

/// Per-token numbers in f64.
pub(crate) const TOKEN: Tolerance = Tolerance { relative: 1e-9, absolute: 1e-12 };
/// Numbers whose reference has +1e-8 in a denominator, in f64. Losses are sums of larger terms, so
/// the absolute part covers cancellation.
pub(crate) const REDUCED: Tolerance = Tolerance { relative: 1e-6, absolute: 1e-9 };
/// Numbers rounded to f32.
pub(crate) const SINGLE: Tolerance = Tolerance { relative: 1e-5, absolute: 1e-6 };

/// Where the vectors are.
pub(crate) fn folder() -> PathBuf {
    let default = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/data/golden");
    std::env::var_os("ENGINE_GOLDEN_DIR").map_or(PathBuf::from(default), PathBuf::from)
}

/// The files with vectors, by name.
pub(crate) fn files() -> Vec<PathBuf> {
    let folder = folder();
    let entries =
        std::fs::read_dir(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "json"));
    files.sort();
    files
}

/// The cases of a file; never none.
pub(crate) fn cases(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut file: Value = serde_json::from_str(&text).unwrap();
    let Value::Array(cases) = file["cases"].take() else {
        panic!("no cases in {}", path.display())
    };
    assert!(!cases.is_empty());
    cases
}

/// Fails if an object has a field that is not listed: nothing is passed over.
pub(crate) fn known(object: &Value, fields: &[&str]) {
    let object = object.as_object().unwrap_or_else(|| panic!("{object} is not an object"));
    for field in object.keys() {
        assert!(fields.contains(&field.as_str()), "unknown field {field}, known: {fields:?}");
    }
}

/// A flat list of numbers.
pub(crate) fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().unwrap().iter().map(required).collect()
}

/// A list of counts or indices.
pub(crate) fn indices(value: &Value) -> Vec<usize> {
    numbers(value).iter().map(|v| *v as usize).collect()
}

/// A number, or one of the words for what JSON cannot say; `None` for null: do not compare.
pub(crate) fn number(value: &Value) -> Option<f64> {
    match value {
        Value::Null => None,
        Value::String(word) => Some(match word.as_str() {
            "nan" => f64::NAN,
            "inf" => f64::INFINITY,
            "-inf" => f64::NEG_INFINITY,
            other => panic!("{other:?} is not a number"),
        }),
        other => Some(other.as_f64().unwrap_or_else(|| panic!("{other} is not a number"))),
    }
}

/// A number that has to be there.
pub(crate) fn required(value: &Value) -> f64 {
    number(value).expect("the number is given")
}

/// A matrix, row after row.
pub(crate) fn matrix(value: &Value) -> Vec<f64> {
    rows(value).iter().flat_map(|row| row.as_array().unwrap().iter().map(required)).collect()
}

/// The rows of a matrix.
pub(crate) fn rows(value: &Value) -> &[Value] {
    value.as_array().unwrap_or_else(|| panic!("{value} is not a matrix"))
}

/// The length of each row.
pub(crate) fn lengths(value: &Value) -> Vec<usize> {
    rows(value).iter().map(|row| row.as_array().unwrap().len()).collect()
}

/// A mask of zeros and ones.
pub(crate) fn mask(value: &Value) -> Vec<bool> {
    matrix(value).iter().map(|m| *m == 1.0).collect()
}

/// Pairs of (row, column) as indices into the flat tokens, ascending.
pub(crate) fn tokens(value: &Value, columns: usize) -> Vec<usize> {
    let pair = |p: &Value| {
        let at = |i: usize| p[i].as_u64().unwrap() as usize;
        at(0) * columns + at(1)
    };
    let mut out: Vec<usize> = value.as_array().unwrap().iter().map(pair).collect();
    out.sort_unstable();
    out
}

/// Compares two numbers; both NaN is equal.
pub(crate) fn close(got: f64, want: f64, tolerance: Tolerance, what: &str) {
    let near = (got - want).abs() <= tolerance.absolute + tolerance.relative * want.abs();
    assert!(near || got == want || got.is_nan() && want.is_nan(), "{what}: {got}, expected {want}");
}

/// Compares per-token numbers with a matrix wherever `mask` is set and the matrix is not null.
pub(crate) fn close_tokens(
    got: &[f64],
    want: &Value,
    mask: &[bool],
    tolerance: Tolerance,
    what: &str,
) {
    let want: Vec<&Value> = rows(want).iter().flat_map(|row| row.as_array().unwrap()).collect();
    assert_eq!((got.len(), want.len()), (mask.len(), mask.len()), "{what}");
    for i in (0..mask.len()).filter(|i| mask[*i]) {
        if let Some(want) = number(want[i]) {
            close(got[i], want, tolerance, &format!("{what}, token {i}"));
        }
    }
}

/// Rounded to f32, as log-probs of the kernels are.
pub(crate) fn single(values: &[f64]) -> Vec<f32> {
    values.iter().map(|v| *v as f32).collect()
}

/// Numbers rounded to f32 and back.
pub(crate) fn rounded(values: &[f64]) -> Vec<f64> {
    values.iter().map(|v| f64::from(*v as f32)).collect()
}

/// The flat tokens of each row.
pub(crate) fn row_ranges(lengths: &[usize]) -> Vec<Range<usize>> {
    let mut end = 0;
    let range = |len: &usize| {
        end += len;
        end - len..end
    };
    lengths.iter().map(range).collect()
}
