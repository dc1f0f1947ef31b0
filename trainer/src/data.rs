//! Tasks from JSON lines and Parquet files, and the order in which a run visits them.
//!
//! Two schemas, told apart by their columns. verl's: `data_source`, `prompt` (messages or text),
//! `reward_model.ground_truth`, `extra_info`. TRL's: `prompt` (text or messages) and the truth in
//! `ground_truth`, `solution` or `answer`. Supervised rows: `prompt` with `completion` or
//! `response`, or `messages` whose last one is the completion. Numbers count as they are written, and a
//! truth that is a list or an object as its JSON. Errors name file and line (of a Parquet file: the
//! row). Leaves out: templates and lengths in tokens, which need a tokenizer.

mod loader;
#[cfg(feature = "parquet")]
mod parquet;
#[cfg(not(feature = "parquet"))]
#[path = "data/parquet_missing.rs"]
mod parquet;
mod row;
mod sampler;

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use serde::Serialize;
use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

pub use loader::{Duplicates, Loader, Report, Scripts, Selection};
pub use row::{Message, Prompt, Row, SftRow};
pub use sampler::{Cursor, Part, Sampler, Visit};

/// Reads the tasks of `files`, in order.
///
/// # Errors
/// If a file cannot be read, has no row, or a line is not a task.
///
/// ```
/// use trainer::data::{Duplicates, Prompt, load};
/// let file = std::env::temp_dir().join(format!("trainer-load-{}.jsonl", std::process::id()));
/// std::fs::write(&file, r#"{"prompt": "2+2=", "answer": 4}"#).unwrap();
/// let rows = load(&[&file], Duplicates::Keep)?;
/// assert_eq!(rows[0].prompt, Prompt::Text("2+2=".into()));
/// assert_eq!(rows[0].ground_truth, "4");
/// # std::fs::remove_file(&file).unwrap();
/// # Ok::<(), trainer::error::Error>(())
/// ```
pub fn load(files: &[impl AsRef<Path>], duplicates: Duplicates) -> Result<Vec<Row>> {
    let mut loader = Loader::new(Selection { duplicates, scripts: Scripts::All });
    files.iter().try_for_each(|file| loader.file(file.as_ref()))?;
    Ok(loader.finish().0)
}

/// Reads the supervised pairs of `files`, in order.
///
/// # Errors
/// If a file cannot be read, has no row, or a line is not a pair.
pub fn load_sft(files: &[impl AsRef<Path>]) -> Result<Vec<SftRow>> {
    let mut rows = Vec::new();
    files
        .iter()
        .try_for_each(|file| read(file.as_ref(), SftRow::parse, &mut |row| rows.push(row)))?;
    Ok(rows)
}

/// SHA-256 of the rows in their order, in hex: a resumed run must see the same data.
pub fn digest(rows: &[impl Serialize]) -> String {
    let mut hash = Sha256::new();
    for row in rows {
        let line = serde_json::to_vec(row).expect("a row is plain data with text keys");
        hash.update((line.len() as u64).to_le_bytes());
        hash.update(line);
    }
    format!("{:x}", hash.finalize())
}

type Columns = Map<String, Value>;

/// Reads a file row by row into `take`, so that rows which are not kept take no memory. `parse` gets the
/// columns of a row and, of a file of JSON lines, the line.
fn read<T>(
    path: &Path,
    parse: impl Fn(&Columns, &[u8]) -> Result<T, String>,
    take: &mut dyn FnMut(T),
) -> Result<()> {
    let mut rows = 0usize;
    if path.extension().is_some_and(|e| e == "parquet") {
        parquet::read(path, &mut |columns| {
            rows += 1;
            let bad = |message| Error::data(path, None, format!("row {rows}: {message}"));
            take(parse(columns, b"").map_err(bad)?);
            Ok(())
        })?;
    } else {
        let file = File::open(path).map_err(|e| Error::io(path, e))?;
        for (index, line) in BufReader::new(file).split(b'\n').enumerate() {
            let line = line.map_err(|e| Error::io(path, e))?;
            if !line.trim_ascii().is_empty() {
                let row = columns(&line).and_then(|columns| parse(&columns, &line));
                take(row.map_err(|message| Error::data(path, index + 1, message))?);
                rows += 1;
            }
        }
    }
    match rows {
        0 => Err(Error::data(path, None, "the file has no rows")),
        _ => Ok(()),
    }
}

/// That the row at `index` of a file has a fault that only shows once all are read; names its line where the
/// file has lines.
pub(crate) fn bad_row(path: &Path, index: usize, message: &str) -> Error {
    // A pipe can be read only once.
    let has_lines = path.extension().is_none_or(|e| e != "parquet") && path.is_file();
    let text = if has_lines { std::fs::read(path).unwrap_or_default() } else { Vec::new() };
    let lines = text.split(|byte| *byte == b'\n').enumerate();
    let mut rows = lines.filter(|(_, line)| !line.trim_ascii().is_empty());
    match rows.nth(index) {
        Some((line, _)) => Error::data(path, line + 1, message),
        None => Error::data(path, None, format!("row {}: {message}", index + 1)),
    }
}

fn columns(line: &[u8]) -> Result<Columns, String> {
    match serde_json::from_slice(line) {
        Ok(Value::Object(columns)) => Ok(columns),
        Ok(other) => Err(format!("the line is {}, expected an object", row::kind(&other))),
        Err(e) => {
            let what = e.to_string();
            let what = what.split(" at line ").next().unwrap_or_default();
            Err(format!("not JSON at column {}: {what}", e.column()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestDir;

    const VERL: &str = r#"{"data_source": "math_dapo", "prompt": [{"role": "user", "content": "1+1?"}], "reward_model": {"style": "rule", "ground_truth": "2"}, "extra_info": {"index": "a-1"}}"#;

    fn error(name: &str, text: &str) -> String {
        let dir = TestDir::new(name);
        let file = dir.write("add.jsonl", text);
        let e = load(&[file], Duplicates::Keep).unwrap_err().to_string();
        e.strip_prefix(&format!("{}/", dir.path().display())).unwrap().to_owned()
    }

    #[test]
    fn both_schemas_are_read_and_duplicates_dropped() {
        let dir = TestDir::new("schemas");
        let trl = r#"{"prompt": "2+3=", "solution": "5", "level": 1}"#;
        let file = dir.write("a.jsonl", format!("{VERL}\n\n{trl}\n{VERL}\n"));
        let rows = load(&[&file], Duplicates::Drop).unwrap();
        assert_eq!(rows.len(), 2);
        assert_eq!(rows[0].data_source.as_deref(), Some("math_dapo"));
        assert_eq!(rows[0].extra["index"], "a-1");
        let Prompt::Messages(messages) = &rows[0].prompt else { panic!("{:?}", rows[0]) };
        assert_eq!((messages[0].role.as_str(), messages[0].content.as_str()), ("user", "1+1?"));
        assert_eq!((rows[1].ground_truth.as_str(), &rows[1].data_source), ("5", &None));
        assert_eq!(rows[1].extra["level"], 1);
        assert_eq!(load(&[&file], Duplicates::Keep).unwrap().len(), 3);
        assert_ne!(digest(&rows), digest(&rows[..1]));
    }

    #[test]
    fn numbers_count_as_they_are_written() {
        let dir = TestDir::new("numbers");
        let long = "12345678901234567890123";
        let numbers = [long, "1e5", "0.10", "-0", "7"];
        let lines = |column: &str| -> String {
            let line = |number: &&str| format!("{{\"prompt\": \"p\", {column}: {number} }}\n");
            numbers.iter().map(line).collect()
        };
        let flat = dir.write("a.jsonl", lines("\"answer\": 1, \"answer\""));
        let nested = lines("\"reward_model\": {\"ground_truth\"").replace(" }\n", "}}\n");
        let nested = dir.write("b.jsonl", nested);
        for file in [flat, nested] {
            let rows = load(&[file], Duplicates::Keep).unwrap();
            let truths: Vec<&str> = rows.iter().map(|row| row.ground_truth.as_str()).collect();
            assert_eq!(truths, numbers);
        }
        let rows = load_sft(&[dir.write("c.jsonl", lines("\"completion\""))]).unwrap();
        assert_eq!(rows[0].completion, long);
        let e = error("truth-kind", r#"{"prompt": "x", "answer": true}"#);
        assert_eq!(e, "add.jsonl:1: answer is a boolean, expected text");
    }

    #[test]
    fn errors_name_line_and_columns() {
        assert_eq!(
            error("broken", &format!("{VERL}\n\n{{\"prompt\": ")),
            "add.jsonl:3: not JSON at column 11: EOF while parsing a value"
        );
        assert_eq!(error("array", "[1]"), "add.jsonl:1: the line is an array, expected an object");
        assert_eq!(
            error("missing", r#"{"question": "x", "answer": "y"}"#),
            "add.jsonl:1: no column \"prompt\"; columns are: question, answer"
        );
        assert_eq!(
            error("truth", r#"{"prompt": "x", "reward_model": {}}"#),
            "add.jsonl:1: no column \"reward_model.ground_truth\" (or \"ground_truth\", \
             \"solution\", \"answer\"); columns are: prompt, reward_model"
        );
        assert_eq!(
            error("content", r#"{"prompt": [{"role": "user", "content": 3}], "answer": "y"}"#),
            "add.jsonl:1: prompt[0].content is a number, expected text"
        );
        assert_eq!(
            error("none", r#"{"prompt": [], "answer": "y"}"#),
            "add.jsonl:1: prompt has no messages"
        );
        assert_eq!(error("empty", "\n \n"), "add.jsonl: the file has no rows");
    }

    #[test]
    fn invalid_utf8_and_missing_files_are_errors() {
        let dir = TestDir::new("utf8");
        let file = dir.write("x.jsonl", b"{\"prompt\": \"\xff\"}");
        let e = load(&[file], Duplicates::Keep).unwrap_err().to_string();
        assert!(e.contains("x.jsonl:1: not JSON"), "{e}");
        assert!(load(&[dir.path().join("none.jsonl")], Duplicates::Keep).is_err());
        let parquet = dir.write("x.parquet", b"PAR1");
        let e = load_sft(&[parquet]).unwrap_err();
        assert!(matches!(e.kind(), crate::ErrorKind::Data { .. }), "{e}");
        let wanted =
            if cfg!(feature = "parquet") { "not a Parquet file" } else { "--features parquet" };
        assert!(e.to_string().contains(wanted), "{e}");
    }

    #[test]
    fn supervised_rows_of_each_shape() {
        let dir = TestDir::new("sft");
        let file = dir.write(
            "s.jsonl",
            r#"{"prompt": "1+1=", "completion": "2"}
{"prompt": [{"role": "user", "content": "q"}], "response": "r"}
{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}"#,
        );
        let rows = load_sft(&[&file]).unwrap();
        let completions: Vec<&str> = rows.iter().map(|r| r.completion.as_str()).collect();
        assert_eq!(completions, ["2", "r", "a"]);
        assert_eq!(rows[1].prompt, rows[2].prompt);
        let bad = dir.write("b.jsonl", r#"{"messages": [{"role": "user", "content": "q"}]}"#);
        let e = load_sft(&[bad]).unwrap_err().to_string();
        assert!(e.contains("b.jsonl:1: the last of messages is from \"user\""), "{e}");
    }
}
