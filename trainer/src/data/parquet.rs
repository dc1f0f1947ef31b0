//! Rows of a Parquet file, as the JSON objects that JSON lines would have held.
//!
//! Flat and nested columns (lists of messages, structs); uncompressed, Snappy, gzip and Zstandard.
//! Leaves out projections and filters: rows are small, and unknown columns are kept as `extra`.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use parquet::file::reader::{FileReader, SerializedFileReader};
use serde_json::Value;

use super::Columns;
use crate::error::{Error, Result};

/// Hands every row of the file to `take`, which may end the reading with an error.
pub(super) fn read(path: &Path, take: &mut dyn FnMut(&Columns) -> Result<()>) -> Result<()> {
    let file = File::open(path).map_err(|e| Error::io(path, e))?;
    // The reader checks lengths and magic numbers, but some damage inside a page makes it panic.
    match catch_unwind(AssertUnwindSafe(|| rows(file, path, take))) {
        Ok(result) => result,
        Err(_) => Err(Error::data(path, None, "the Parquet file is damaged")),
    }
}

fn rows(file: File, path: &Path, take: &mut dyn FnMut(&Columns) -> Result<()>) -> Result<()> {
    let bad = |what: String| Error::data(path, None, what);
    let reader = SerializedFileReader::new(file)
        .map_err(|e| bad(format!("not a Parquet file, or one cut short: {e}")))?;
    let rows = reader.get_row_iter(None).map_err(|e| bad(format!("unreadable Parquet: {e}")))?;
    for (index, row) in rows.enumerate() {
        let row = row.map_err(|e| bad(format!("row {}: unreadable Parquet: {e}", index + 1)))?;
        match row.to_json_value() {
            Value::Object(columns) => take(&columns)?,
            other => unreachable!("a row is an object, this is {other}"),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use parquet::basic::{Compression, GzipLevel, ZstdLevel};
    use parquet::data_type::{ByteArray, ByteArrayType, DataType, Int64Type};
    use parquet::file::properties::WriterProperties;
    use parquet::file::writer::{SerializedFileWriter, SerializedRowGroupWriter};
    use parquet::schema::parser::parse_message_type;

    use super::super::{Duplicates, Prompt, load};
    use crate::testing::TestDir;

    /// verl's columns as pandas writes them.
    const SCHEMA: &str = "message schema {
        optional binary data_source (UTF8);
        optional group prompt (LIST) { repeated group list { optional group element {
            optional binary content (UTF8); optional binary role (UTF8); } } }
        optional group reward_model {
            optional binary ground_truth (UTF8); optional binary style (UTF8); }
        optional group extra_info { optional int64 index; }
        optional binary answer (UTF8);
    }";

    fn column<T: DataType>(
        group: &mut SerializedRowGroupWriter<'_, Vec<u8>>,
        values: &[T::T],
        levels: (&[i16], Option<&[i16]>),
    ) {
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<T>().write_batch(values, Some(levels.0), levels.1).unwrap();
        column.close().unwrap();
    }

    /// Two rows: a system and a user message, then a user message alone.
    fn file(compression: Compression) -> Vec<u8> {
        let properties = WriterProperties::builder().set_compression(compression).build();
        let schema = Arc::new(parse_message_type(SCHEMA).unwrap());
        let mut writer =
            SerializedFileWriter::new(Vec::new(), schema, Arc::new(properties)).unwrap();
        let mut group = writer.next_row_group().unwrap();
        let texts = |texts: &[&str]| texts.iter().map(|t| ByteArray::from(*t)).collect::<Vec<_>>();
        let messages = (&[4, 4, 4][..], Some(&[0, 1, 0][..]));
        let long = "1+2? ".repeat(200);
        column::<ByteArrayType>(&mut group, &texts(&["sum", "sum"]), (&[1, 1], None));
        column::<ByteArrayType>(&mut group, &texts(&["be brief", "1+1?", &long]), messages);
        column::<ByteArrayType>(&mut group, &texts(&["system", "user", "user"]), messages);
        column::<ByteArrayType>(&mut group, &texts(&["2", "3"]), (&[2, 2], None));
        column::<ByteArrayType>(&mut group, &texts(&["rule", "rule"]), (&[2, 2], None));
        column::<Int64Type>(&mut group, &[7, 8], (&[2, 2], None));
        column::<ByteArrayType>(&mut group, &[], (&[0, 0], None));
        group.close().unwrap();
        writer.into_inner().unwrap()
    }

    #[test]
    fn rows_of_every_compression_are_those_of_json_lines() {
        let dir = TestDir::new("parquet");
        let long = "1+2? ".repeat(200);
        let jsonl = dir.write(
            "a.jsonl",
            format!(
                r#"{{"data_source": "sum", "prompt": [{{"content": "be brief", "role": "system"}}, {{"content": "1+1?", "role": "user"}}], "reward_model": {{"ground_truth": "2", "style": "rule"}}, "extra_info": {{"index": 7}}}}
{{"data_source": "sum", "prompt": [{{"content": "{long}", "role": "user"}}], "reward_model": {{"ground_truth": "3", "style": "rule"}}, "extra_info": {{"index": 8}}}}"#
            ),
        );
        let wanted = load(&[jsonl], Duplicates::Keep).unwrap();
        for compression in [
            Compression::UNCOMPRESSED,
            Compression::SNAPPY,
            Compression::GZIP(GzipLevel::default()),
            Compression::ZSTD(ZstdLevel::default()),
        ] {
            let path = dir.write("a.parquet", file(compression));
            assert_eq!(load(&[path], Duplicates::Keep).unwrap(), wanted, "{compression}");
        }
        assert!(matches!(&wanted[0].prompt, Prompt::Messages(messages) if messages.len() == 2));
    }

    #[test]
    fn damage_is_an_error_of_one_line() {
        let dir = TestDir::new("parquet-damage");
        let whole = file(Compression::SNAPPY);
        for len in 0..whole.len() {
            let path = dir.write("cut.parquet", &whole[..len]);
            let e = load(&[path], Duplicates::Keep).unwrap_err();
            assert!(matches!(e.kind(), crate::ErrorKind::Data { line: None, .. }), "{len}: {e}");
            assert_eq!(e.to_string().lines().count(), 1, "{len}: {e}");
        }
        // Some bytes can change without a trace; none may bring the program down.
        let mut refused = 0;
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x55;
            let path = dir.write("bent.parquet", bytes);
            refused += usize::from(load(&[path], Duplicates::Keep).is_err());
        }
        assert!(refused > whole.len() / 4, "{refused} of {}", whole.len());
    }
}
