//! Reader of GGUF files, versions 2 and 3, little-endian.
//!
//! Layout (ggml `docs/gguf.md`): magic `GGUF`, version u32, tensor count u64, metadata count u64, then
//! key/value pairs, then tensor descriptions (name, dimensions innermost first, type, offset), padding to
//! `general.alignment`, then data. Every count and extent is checked against the file's length before
//! anything is allocated or believed. Split files (`-00001-of-0000N.gguf`) are read as one.
//! Leaves out what keys mean: see `config_gguf` and the tokenizer.

use crate::error::{Error, Result};
use crate::model::bytes::{Bytes, Reader, Stored, Tensors, check_disjoint};
use crate::model::dequant::Format;
use std::collections::BTreeMap;
use std::io::{BufReader, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// Most elements in all metadata arrays of a file together: several times the largest vocabularies.
const MAX_ARRAY_ELEMENTS: u64 = 1 << 23;
/// Longest metadata string, in bytes.
const MAX_STRING_BYTES: u64 = 16 << 20;
/// Longest tensor name, in bytes.
const MAX_NAME_BYTES: usize = 1024;
/// Deepest nesting of metadata arrays.
const MAX_DEPTH: usize = 4;
/// Most files a model may be split into.
const MAX_PARTS: u64 = 1000;

/// A metadata value.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// Any unsigned integer type.
    Unsigned(u64),
    /// Any signed integer type.
    Signed(i64),
    /// f32 or f64.
    Float(f64),
    /// A truth value.
    Bool(bool),
    /// UTF-8 text.
    String(String),
    /// An array of strings.
    Strings(Vec<String>),
    /// An array of integers of any type; values above `i64::MAX` are refused.
    Integers(Vec<i64>),
    /// An array of f32 or f64.
    Floats(Vec<f64>),
    /// An array of truth values.
    Bools(Vec<bool>),
    /// An array of arrays.
    Lists(Vec<Self>),
}

/// An open GGUF file: metadata in memory, weights read on demand.
#[derive(Debug)]
pub struct Gguf {
    metadata: BTreeMap<String, Value>,
    tensors: Tensors,
}

impl Gguf {
    /// Opens a file and checks all of it but the weights' values.
    ///
    /// # Errors
    /// When the file cannot be read, is not GGUF, is truncated, or holds weights in a format that is not
    /// implemented.
    pub fn open(path: &Path) -> Result<Self> {
        let mut model = Self::from_bytes(Bytes::open(path)?)?;
        let parts = model.unsigned("split.count").unwrap_or(1);
        if parts > 1 {
            model.open_parts(path, parts)?;
        }
        Ok(model)
    }

    pub(crate) fn from_bytes(bytes: Bytes) -> Result<Self> {
        let (metadata, found) = parse(&bytes).map_err(|e| e.in_file(bytes.path()))?;
        let mut tensors = Tensors::default();
        tensors.add(bytes, found)?;
        Ok(Self { metadata, tensors })
    }

    fn open_parts(&mut self, path: &Path, count: u64) -> Result<()> {
        for index in 1..count {
            let next = part_path(path, index, count).map_err(|e| e.in_file(path))?;
            let bytes = Bytes::open(&next)?;
            let (_, found) = parse(&bytes).map_err(|e| e.in_file(&next))?;
            self.tensors.add(bytes, found)?;
        }
        Ok(())
    }

    /// Path of the (first) file.
    pub fn path(&self) -> &Path {
        self.tensors.first_path()
    }

    /// A metadata value.
    pub fn metadata(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    /// A metadata value that is text.
    pub fn string(&self, key: &str) -> Option<&str> {
        match self.metadata(key)? {
            Value::String(text) => Some(text),
            _ => None,
        }
    }

    /// A metadata value that is an integer and not negative.
    pub fn unsigned(&self, key: &str) -> Option<u64> {
        match self.metadata(key)? {
            Value::Unsigned(n) => Some(*n),
            Value::Signed(n) => u64::try_from(*n).ok(),
            _ => None,
        }
    }

    /// A metadata value that is a number.
    pub fn float(&self, key: &str) -> Option<f64> {
        match self.metadata(key)? {
            Value::Float(x) => Some(*x),
            Value::Unsigned(n) => Some(*n as f64),
            Value::Signed(n) => Some(*n as f64),
            _ => None,
        }
    }

    /// A metadata value that is a truth value.
    pub fn boolean(&self, key: &str) -> Option<bool> {
        match self.metadata(key)? {
            Value::Bool(b) => Some(*b),
            _ => None,
        }
    }

    /// A metadata value that is an array of strings.
    pub fn strings(&self, key: &str) -> Option<&[String]> {
        match self.metadata(key)? {
            Value::Strings(list) => Some(list),
            _ => None,
        }
    }

    /// A metadata value that is an array of integers.
    pub fn integers(&self, key: &str) -> Option<&[i64]> {
        match self.metadata(key)? {
            Value::Integers(list) => Some(list),
            _ => None,
        }
    }

    /// Names of all weights, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.names()
    }

    /// Shape of a weight, outermost dimension first.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|t| t.shape.as_slice())
    }

    /// Format of a weight.
    pub fn format(&self, name: &str) -> Option<Format> {
        self.tensors.get(name).map(|t| t.format)
    }

    /// Reads rows of a weight as f32, in the file's row order.
    ///
    /// # Errors
    /// When there is no such weight or row, or the file cannot be read.
    ///
    /// # Panics
    /// When `out` does not hold `rows.len()` rows.
    pub fn read_rows(&self, name: &str, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        self.tensors.read_rows(name, rows, out)
    }

    /// The bytes of one row of a weight.
    ///
    /// # Errors
    /// When there is no such weight or row, or the file cannot be read.
    ///
    /// # Panics
    /// When `out` does not have the length of a row.
    pub(crate) fn row_bytes(&self, name: &str, row: usize, out: &mut [u8]) -> Result<()> {
        let (file, stored) = self.tensors.rows(name, &(row..row + 1))?;
        let bytes = stored.format.bytes(stored.cols() as u64);
        assert_eq!(bytes, Some(out.len() as u64), "bytes of a row of {name:?}");
        file.read_at(stored.offset + (row * out.len()) as u64, out)
    }
}

/// `x-00001-of-00003.gguf` names the first of three; part `index` counts from 0.
fn part_path(path: &Path, index: u64, count: u64) -> Result<PathBuf> {
    if count > MAX_PARTS {
        return Err(Error::model(format!("split into {count} files, limit is {MAX_PARTS}")));
    }
    let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
    let tail = format!("-00001-of-{count:05}.gguf");
    let Some(stem) = name.strip_suffix(&tail) else {
        let message = format!("one of {count} split files: open the one that ends in {tail}");
        return Err(Error::model(message));
    };
    Ok(path.with_file_name(format!("{stem}-{:05}-of-{count:05}.gguf", index + 1)))
}

type Contents = (BTreeMap<String, Value>, BTreeMap<String, Stored>);

fn parse(bytes: &Bytes) -> Result<Contents> {
    let mut cursor = Cursor {
        reader: BufReader::with_capacity(64 << 10, bytes.reader()),
        position: 0,
        len: bytes.len(),
        elements: 0,
    };
    let (tensor_count, metadata_count) = cursor.preamble()?;
    let mut metadata = BTreeMap::new();
    for _ in 0..metadata_count {
        let key = cursor.string()?;
        let kind = cursor.u32()?;
        let value = cursor.value(kind, 0).map_err(|e| Error::model(format!("{key:?}: {e}")))?;
        if metadata.insert(key.clone(), value).is_some() {
            return Err(Error::model(format!("metadata key {key:?} appears twice")));
        }
    }
    let mut tensors = BTreeMap::new();
    for _ in 0..tensor_count {
        let (name, stored) = cursor.tensor()?;
        if tensors.insert(name.clone(), stored).is_some() {
            return Err(Error::model(format!("tensor {name:?} appears twice")));
        }
    }
    let start = data_start(&metadata, cursor.position)?;
    place(&mut tensors, start, bytes.len())?;
    Ok((metadata, tensors))
}

fn data_start(metadata: &BTreeMap<String, Value>, header_end: u64) -> Result<u64> {
    let alignment = match metadata.get("general.alignment") {
        None => 32,
        Some(Value::Unsigned(n)) if n.is_power_of_two() && *n <= 1 << 20 => *n,
        Some(other) => {
            let message =
                format!("general.alignment is {other:?}, must be a power of two to 1048576");
            return Err(Error::model(message));
        }
    };
    Ok(header_end.next_multiple_of(alignment))
}

/// Makes offsets absolute and checks that every weight lies inside the file, apart from the others.
fn place(tensors: &mut BTreeMap<String, Stored>, start: u64, len: u64) -> Result<()> {
    let mut extents = Vec::with_capacity(tensors.len());
    for (name, t) in tensors.iter_mut() {
        let size = Stored::bytes(t.format, &t.shape).ok_or_else(|| {
            let (shape, format) = (&t.shape, t.format);
            Error::model(format!("tensor {name:?}: shape {shape:?} does not fit {format:?}"))
        })?;
        let end = t.offset.checked_add(start).and_then(|at| at.checked_add(size));
        if end.is_none_or(|end| end > len) {
            return Err(Error::model(format!(
                "file is truncated: tensor {name:?} needs {size} bytes at {} + {start}, file has {len}",
                t.offset
            )));
        }
        t.offset += start;
        extents.push((t.offset, size, name.as_str()));
    }
    check_disjoint(extents.into_iter())?;
    Ok(())
}

/// Reads the header while counting what is left of the file.
struct Cursor<'a> {
    reader: BufReader<Reader<'a>>,
    position: u64,
    len: u64,
    /// Elements of arrays read so far.
    elements: u64,
}

impl Cursor<'_> {
    /// Magic, version and counts.
    fn preamble(&mut self) -> Result<(u64, u64)> {
        if self.len < 24 || self.array::<4>()? != *b"GGUF" {
            return Err(Error::model("not a gguf file"));
        }
        match self.u32()? {
            2 | 3 => {}
            swapped if swapped.swap_bytes() < 1 << 16 => {
                return Err(Error::unsupported("big-endian gguf is not supported"));
            }
            version => {
                return Err(Error::unsupported(format!(
                    "gguf version {version}, supported are 2 and 3"
                )));
            }
        }
        let (tensors, metadata) = (self.u64()?, self.u64()?);
        // A tensor description takes at least 32 bytes, a metadata pair 13.
        self.fits("tensors", tensors, 32)?;
        self.fits("metadata pairs", metadata, 13)?;
        Ok((tensors, metadata))
    }

    fn fits(&self, what: &str, count: u64, least_bytes: u64) -> Result<()> {
        let left = self.len - self.position;
        if count.checked_mul(least_bytes).is_some_and(|bytes| bytes <= left) {
            return Ok(());
        }
        Err(Error::model(format!("file is truncated: {count} {what}, {left} bytes left")))
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let mut out = [0; N];
        self.fill(&mut out)?;
        Ok(out)
    }

    fn fill(&mut self, out: &mut [u8]) -> Result<()> {
        let left = self.len - self.position;
        if out.len() as u64 > left {
            return Err(Error::model("file is truncated inside its header"));
        }
        self.reader
            .read_exact(out)
            .map_err(|e| Error::model(format!("header cannot be read: {e}")))?;
        self.position += out.len() as u64;
        Ok(())
    }

    fn u32(&mut self) -> Result<u32> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn string(&mut self) -> Result<String> {
        let bytes = self.u64()?;
        self.fits("bytes of text", bytes, 1)?;
        if bytes > MAX_STRING_BYTES {
            let message = format!("text of {bytes} bytes, limit is {MAX_STRING_BYTES}");
            return Err(Error::model(message));
        }
        let mut out = vec![0; bytes as usize];
        self.fill(&mut out)?;
        String::from_utf8(out).map_err(|_| Error::model("text is not utf-8"))
    }

    fn value(&mut self, kind: u32, depth: usize) -> Result<Value> {
        Ok(match kind {
            0 | 2 | 4 | 10 => Value::Unsigned(self.unsigned(kind)?),
            1 | 3 | 5 | 11 => Value::Signed(self.signed(kind)?),
            6 | 12 => Value::Float(self.float(kind)?),
            7 => Value::Bool(self.boolean()?),
            8 => Value::String(self.string()?),
            9 => self.list(depth)?,
            _ => return Err(Error::model(format!("unknown metadata type {kind}"))),
        })
    }

    fn unsigned(&mut self, kind: u32) -> Result<u64> {
        Ok(match kind {
            0 => self.array::<1>()?[0].into(),
            2 => u16::from_le_bytes(self.array()?).into(),
            4 => self.u32()?.into(),
            _ => self.u64()?,
        })
    }

    fn signed(&mut self, kind: u32) -> Result<i64> {
        Ok(match kind {
            1 => self.array::<1>()?[0].cast_signed().into(),
            3 => i16::from_le_bytes(self.array()?).into(),
            5 => self.u32()?.cast_signed().into(),
            _ => self.u64()?.cast_signed(),
        })
    }

    fn float(&mut self, kind: u32) -> Result<f64> {
        Ok(match kind {
            6 => f32::from_le_bytes(self.array()?).into(),
            _ => f64::from_le_bytes(self.array()?),
        })
    }

    fn boolean(&mut self) -> Result<bool> {
        match self.array::<1>()?[0] {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(Error::model(format!("truth value is {other}"))),
        }
    }

    fn list(&mut self, depth: usize) -> Result<Value> {
        let kind = self.u32()?;
        let count = self.u64()?;
        let least_bytes = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            _ => 12,
        };
        self.fits("array elements", count, least_bytes)?;
        self.elements += count;
        if self.elements > MAX_ARRAY_ELEMENTS {
            let message = format!("more than {MAX_ARRAY_ELEMENTS} array elements");
            return Err(Error::model(message));
        }
        let each = 0..count;
        Ok(match kind {
            0 | 2 | 4 | 10 => {
                Value::Integers(each.map(|_| self.element(kind)).collect::<Result<_>>()?)
            }
            1 | 3 | 5 | 11 => {
                Value::Integers(each.map(|_| self.signed(kind)).collect::<Result<_>>()?)
            }
            6 | 12 => Value::Floats(each.map(|_| self.float(kind)).collect::<Result<_>>()?),
            7 => Value::Bools(each.map(|_| self.boolean()).collect::<Result<_>>()?),
            8 => Value::Strings(each.map(|_| self.string()).collect::<Result<_>>()?),
            9 if depth < MAX_DEPTH => {
                Value::Lists(each.map(|_| self.list(depth + 1)).collect::<Result<_>>()?)
            }
            9 => return Err(Error::model(format!("arrays nested deeper than {MAX_DEPTH}"))),
            _ => return Err(Error::model(format!("unknown metadata type {kind}"))),
        })
    }

    fn element(&mut self, kind: u32) -> Result<i64> {
        let value = self.unsigned(kind)?;
        i64::try_from(value).map_err(|_| Error::model(format!("integer {value} is out of range")))
    }

    /// A tensor description; the offset is still relative to the data.
    fn tensor(&mut self) -> Result<(String, Stored)> {
        let name = self.string()?;
        if name.len() > MAX_NAME_BYTES {
            let length = name.len();
            let message = format!("tensor name of {length} bytes, limit is {MAX_NAME_BYTES}");
            return Err(Error::model(message));
        }
        let dimensions = self.u32()?;
        if !(1..=4).contains(&dimensions) {
            return Err(Error::model(format!("tensor {name:?} has {dimensions} dimensions")));
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            let n = self.u64()?;
            if !(1..=1 << 40).contains(&n) {
                return Err(Error::model(format!("tensor {name:?} has a dimension of {n}")));
            }
            shape.push(n as usize);
        }
        shape.reverse();
        let kind = self.u32()?;
        let Some(format) = Format::from_ggml(kind) else {
            let known = Format::GGML.map(|(_, f)| format!("{f:?}")).join(", ");
            let message = format!("tensor {name:?} has ggml type {kind}, supported are {known}");
            return Err(Error::unsupported(message));
        };
        let offset = self.u64()?;
        Ok((name, Stored { format, shape, offset }))
    }
}

#[cfg(test)]
pub(super) mod tests;
