//! Reader and writer of safetensors files, and of models sharded over several of them.
//!
//! Layout: header length u64, a JSON header `{name: {dtype, shape, data_offsets}}`, then the data, with no
//! holes and no overlaps. Reading checks all of that before anything is believed. Writing streams: shapes
//! are known first, then numbers are appended in order, and the file appears under its name only when it
//! is whole. Leaves out integer weights (an integer tensor may be present, but cannot be read).

use crate::error::{Error, Result};
use crate::model::bytes::{Bytes, Stored, Tensors, check_disjoint};
use crate::model::config::TensorSpec;
use crate::model::dequant::Format;
use kernels::Dtype;
use serde::Deserialize;
use serde::de::{self, MapAccess, Visitor};
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Longest header accepted, in bytes; the limit of the reference implementation.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Longest index file accepted, in bytes.
const MAX_INDEX_BYTES: u64 = 100_000_000;

/// The weights of a model in one or several safetensors files.
#[derive(Debug)]
pub struct SafeTensors {
    tensors: Tensors,
}

impl SafeTensors {
    /// Opens one file and checks its header.
    ///
    /// # Errors
    /// When it cannot be read, or its header is malformed or does not match its length.
    pub fn open(path: &Path) -> Result<Self> {
        Self::from_files(vec![Bytes::open(path)?])
    }

    /// Opens every file an index (`model.safetensors.index.json`) names, all beside it.
    ///
    /// # Errors
    /// When a file is missing or malformed, or a weight is not where the index says.
    pub fn open_index(index: &Path) -> Result<Self> {
        let map = read_index(index)?;
        let mut names: Vec<&String> = map.values().collect();
        names.sort_unstable();
        names.dedup();
        let open = |name: &&String| Bytes::open(&index.with_file_name(name));
        let model = Self::from_files(names.iter().map(open).collect::<Result<_>>()?)?;
        for (tensor, file) in &map {
            if model.tensors.file_of(tensor).map(|i| names[i]) != Some(file) {
                let message = format!("tensor {tensor:?} is not in {file:?}");
                return Err(Error::model(message).in_file(index));
            }
        }
        Ok(model)
    }

    /// Reads a file that is already in memory; `name` is for messages.
    ///
    /// # Errors
    /// As [`SafeTensors::open`].
    pub fn from_memory(name: &str, data: impl Into<Cow<'static, [u8]>>) -> Result<Self> {
        Self::from_files(vec![Bytes::memory(name, data.into())])
    }

    fn from_files(files: Vec<Bytes>) -> Result<Self> {
        let mut tensors = Tensors::default();
        for file in files {
            let found = read_header(&file).map_err(|e| e.in_file(file.path()))?;
            tensors.add(file, found)?;
        }
        Ok(Self { tensors })
    }

    /// Names of all weights, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.names()
    }

    /// Shape of a weight.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|t| t.shape.as_slice())
    }

    /// Format of a weight.
    pub fn format(&self, name: &str) -> Option<Format> {
        self.tensors.get(name).map(|t| t.format)
    }

    /// Reads rows of a weight as f32; a vector is one row.
    ///
    /// # Errors
    /// When there is no such weight or row, or the file cannot be read.
    ///
    /// # Panics
    /// When `out` does not hold `rows.len()` rows.
    pub fn read_rows(&self, name: &str, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        if self.shape(name).is_none() {
            return Err(Error::model(format!("tensor {name:?} is missing or holds integers")));
        }
        self.tensors.read_rows(name, rows, out)
    }
}

/// The names of the files that an index divides a model into, which lie beside it.
///
/// # Errors
/// When the index cannot be read or names something else.
pub fn shards(index: &Path) -> Result<BTreeSet<String>> {
    Ok(read_index(index)?.into_values().collect())
}

/// Weight name to file name; only plain names of files beside the index are accepted.
fn read_index(path: &Path) -> Result<BTreeMap<String, String>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let text = super::source::read_text(path, MAX_INDEX_BYTES)?;
    let index: Index =
        serde_json::from_str(&text).map_err(|e| Error::model(e.to_string()).in_file(path))?;
    let plain = |name: &str| {
        Path::new(name).file_name().is_some_and(|n| n == name) && name.ends_with(".safetensors")
    };
    if let Some(name) = index.weight_map.values().find(|name| !plain(name)) {
        let message = format!("{name:?} is not the name of a safetensors file beside the index");
        return Err(Error::model(message).in_file(path));
    }
    Ok(index.weight_map)
}

/// One entry of the header.
#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: [u64; 2],
}

/// The header in file order; a name that appears twice is refused.
struct Entries(Vec<(String, Entry)>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: de::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries_;
        impl<'de> Visitor<'de> for Entries_ {
            type Value = Entries;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                let mut entries = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<BTreeMap<String, String>>()?;
                    } else {
                        entries.push((name, map.next_value()?));
                    }
                }
                Ok(Entries(entries))
            }
        }
        deserializer.deserialize_map(Entries_)
    }
}

/// Reads and checks a header; tensors of integers are checked and left out.
fn read_header(file: &Bytes) -> Result<BTreeMap<String, Stored>> {
    if file.len() < 8 {
        return Err(Error::model(format!("file of {} bytes is not safetensors", file.len())));
    }
    let mut length = [0; 8];
    file.read_at(0, &mut length)?;
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER_BYTES {
        let message = format!("header of {length} bytes, limit is {MAX_HEADER_BYTES}");
        return Err(Error::model(message));
    }
    let start = 8 + length;
    if start > file.len() {
        let len = file.len();
        return Err(Error::model(format!(
            "file is truncated: header ends at {start}, file at {len}"
        )));
    }
    let mut header = vec![0; length as usize];
    file.read_at(8, &mut header)?;
    let Entries(entries) = serde_json::from_slice(&header)
        .map_err(|e| Error::model(format!("header is malformed: {e}")))?;
    check_layout(&entries, file.len() - start)?;
    let mut tensors = BTreeMap::new();
    for (name, entry) in entries {
        let Some(format) = float_format(&entry.dtype) else { continue };
        let offset = start + entry.data_offsets[0];
        let stored = Stored { format, shape: entry.shape, offset };
        if tensors.insert(name.clone(), stored).is_some() {
            return Err(Error::model(format!("tensor {name:?} appears twice")));
        }
    }
    Ok(tensors)
}

/// Data must be covered exactly: no holes, no overlaps, nothing missing at the end.
fn check_layout(entries: &[(String, Entry)], data_bytes: u64) -> Result<()> {
    for (name, entry) in entries {
        let [from, to] = entry.data_offsets;
        let bytes = entry_bytes(entry);
        if from > to || bytes != Some(to - from) {
            let (dtype, shape) = (&entry.dtype, &entry.shape);
            return Err(Error::model(format!(
                "tensor {name:?}: {dtype} {shape:?} does not fit offsets {from}..{to}"
            )));
        }
    }
    let extents = entries.iter().map(|(name, e)| {
        let [from, to] = e.data_offsets;
        (from, to - from, name.as_str())
    });
    let sorted = check_disjoint(extents)?;
    let mut end = 0;
    for (from, bytes, name) in sorted {
        if from != end {
            return Err(Error::model(format!(
                "{} unused bytes before tensor {name:?}",
                from - end
            )));
        }
        end = from + bytes;
    }
    if end > data_bytes {
        return Err(Error::model(format!(
            "file is truncated: weights take {end} bytes, {data_bytes} are there"
        )));
    }
    if end < data_bytes {
        return Err(Error::model(format!("{} bytes after the last tensor", data_bytes - end)));
    }
    Ok(())
}

fn float_format(dtype: &str) -> Option<Format> {
    match dtype {
        "F32" => Some(Format::F32),
        "F16" => Some(Format::F16),
        "BF16" => Some(Format::BF16),
        _ => None,
    }
}

fn entry_bytes(entry: &Entry) -> Option<u64> {
    if let Some(format) = float_format(&entry.dtype) {
        return Stored::bytes(format, &entry.shape);
    }
    let size: u64 = match entry.dtype.as_str() {
        "BOOL" | "U8" | "I8" | "F8_E4M3" | "F8_E5M2" | "F8_E8M0" => 1,
        "U16" | "I16" => 2,
        "U32" | "I32" => 4,
        "U64" | "I64" | "F64" | "C64" => 8,
        _ => return None,
    };
    entry.shape.iter().try_fold(size, |product, n| product.checked_mul(*n as u64))
}

/// Streams weights into a new safetensors file.
///
/// The file takes its name when [`Writer::finish`] returns; until then the data is in a file beside it
/// whose name ends in `.partial`, removed when the writer is dropped.
///
/// ```
/// # use engine::model::{TensorSpec, safetensors::{SafeTensors, Writer}};
/// # let path = std::env::temp_dir().join(format!("writer-doc-{}.safetensors", std::process::id()));
/// let tensors = [TensorSpec { name: "w".into(), shape: vec![2, 2] }];
/// let mut writer = Writer::create(&path, &tensors, kernels::Dtype::F32)?;
/// writer.append(&[1.0, 2.0])?;
/// writer.append(&[3.0, 4.0])?;
/// writer.finish()?;
/// let mut row = [0.0; 2];
/// SafeTensors::open(&path)?.read_rows("w", 1..2, &mut row)?;
/// assert_eq!(row, [3.0, 4.0]);
/// # std::fs::remove_file(&path).ok();
/// # Ok::<(), engine::Error>(())
/// ```
#[derive(Debug)]
pub struct Writer {
    path: PathBuf,
    partial: PathBuf,
    file: Option<BufWriter<File>>,
    dtype: Dtype,
    /// Numbers still to come.
    left: u64,
}

impl Writer {
    /// Creates the file and writes its header. All weights are stored in `dtype`, in the given order.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn create(path: &Path, tensors: &[TensorSpec], dtype: Dtype) -> Result<Self> {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let partial = path.with_file_name(format!("{name}.partial"));
        let file = File::create(&partial).map_err(|e| Error::io(path, e))?;
        let mut writer = Self {
            path: path.to_owned(),
            partial,
            file: Some(BufWriter::with_capacity(1 << 20, file)),
            dtype,
            left: tensors.iter().map(TensorSpec::elements).sum(),
        };
        let header = header(tensors, dtype);
        writer.write(&(header.len() as u64).to_le_bytes())?;
        writer.write(header.as_bytes())?;
        Ok(writer)
    }

    /// Appends the next numbers, rounded to nearest even where the format is bf16. Where one weight ends
    /// and the next begins follows from the shapes.
    ///
    /// # Errors
    /// When the file cannot be written.
    ///
    /// # Panics
    /// When there are more numbers than the shapes hold.
    pub fn append(&mut self, values: &[f32]) -> Result<()> {
        let (n, left) = (values.len() as u64, self.left);
        assert!(n <= left, "{n} numbers appended, {left} are left to write");
        self.left -= n;
        let mut buffer = Vec::with_capacity(16 << 10);
        for values in values.chunks(4096) {
            buffer.clear();
            match self.dtype {
                Dtype::F32 => values.iter().for_each(|v| buffer.extend(v.to_le_bytes())),
                Dtype::Bf16 => {
                    let round = |v: &f32| half::bf16::from_f32(*v).to_le_bytes();
                    values.iter().for_each(|v| buffer.extend(round(v)));
                }
            }
            self.write(&buffer)?;
        }
        Ok(())
    }

    /// Flushes to disk and gives the file its name.
    ///
    /// # Errors
    /// When the file cannot be written.
    ///
    /// # Panics
    /// When numbers are missing.
    pub fn finish(mut self) -> Result<()> {
        assert_eq!(self.left, 0, "{} numbers were not written", self.left);
        let file = self.file.take().expect("taken only here, by value");
        let failed = |e| Error::io(&self.path, e);
        let file = file.into_inner().map_err(|e| failed(e.into_error()))?;
        file.sync_all().map_err(failed)?;
        std::fs::rename(&self.partial, &self.path).map_err(failed)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let file = self.file.as_mut().expect("taken only by finish, by value");
        file.write_all(bytes).map_err(|e| Error::io(&self.path, e))
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        // After a successful finish the name is gone and this does nothing.
        std::fs::remove_file(&self.partial).ok();
    }
}

/// The JSON header, padded with spaces so that the data is aligned to 8 bytes.
fn header(tensors: &[TensorSpec], dtype: Dtype) -> String {
    let name = match dtype {
        Dtype::F32 => "F32",
        Dtype::Bf16 => "BF16",
    };
    let mut map = serde_json::Map::new();
    map.insert("__metadata__".into(), serde_json::json!({"format": "pt"}));
    let mut offset = 0;
    for t in tensors {
        let end = offset + t.elements() * dtype.size_bytes() as u64;
        let entry =
            serde_json::json!({"dtype": name, "shape": t.shape, "data_offsets": [offset, end]});
        map.insert(t.name.clone(), entry);
        offset = end;
    }
    let mut text = serde_json::Value::Object(map).to_string();
    let padding = text.len().next_multiple_of(8) - text.len();
    text.extend(std::iter::repeat_n(' ', padding));
    text
}

#[cfg(test)]
mod tests;
