//! Bytes of a model file, on disk or in memory, and weights stored in them.
//!
//! Files are read at positions (no mapping, no shared cursor), so several threads may read at once.
//! Leaves out what the bytes mean: see `safetensors` and `gguf`.

use crate::error::{Error, Result};
use crate::model::dequant::{Format, dequantize};
use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Bytes read from a file at a time while weights stream through.
const CHUNK_BYTES: usize = 256 << 10;

/// A readable file of known length.
#[derive(Debug)]
pub(crate) struct Bytes {
    path: PathBuf,
    len: u64,
    data: Data,
}

#[derive(Debug)]
enum Data {
    File(File),
    Memory(Cow<'static, [u8]>),
}

impl Bytes {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|e| Error::io(path, e))?;
        let meta = file.metadata().map_err(|e| Error::io(path, e))?;
        if !meta.is_file() {
            return Err(Error::model("is not a regular file").in_file(path));
        }
        Ok(Self { path: path.to_owned(), len: meta.len(), data: Data::File(file) })
    }

    pub(crate) fn memory(name: &str, data: Cow<'static, [u8]>) -> Self {
        Self { path: PathBuf::from(name), len: data.len() as u64, data: Data::Memory(data) }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// Fills `out` from `offset`; a file that shrank since it was opened is an error.
    pub(crate) fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        match &self.data {
            Data::File(file) => file.read_exact_at(out, offset).map_err(|e| self.failed(e)),
            Data::Memory(data) => {
                let from = usize::try_from(offset).ok().and_then(|o| data.get(o..));
                let part = from.and_then(|d| d.get(..out.len()));
                out.copy_from_slice(part.ok_or_else(|| self.failed(eof()))?);
                Ok(())
            }
        }
    }

    /// A sequential reader from the first byte.
    pub(crate) fn reader(&self) -> Reader<'_> {
        Reader { bytes: self, position: 0 }
    }

    /// Reads whole rows of a weight as f32.
    pub(crate) fn read_rows(&self, t: &Stored, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        assert_eq!(out.len(), rows.len() * t.cols(), "output does not match the rows asked for");
        let row_bytes = t.format.bytes(t.cols() as u64).expect("checked when the file was opened");
        let offset = t.offset + rows.start as u64 * row_bytes;
        let (block, block_bytes) = (t.format.block_elements(), t.format.block_bytes());
        let blocks = (CHUNK_BYTES / block_bytes).min(out.len() / block).max(1);
        let mut buffer = vec![0; blocks * block_bytes];
        let chunks = out.chunks_mut(blocks * block);
        for (chunk, at) in chunks.zip((offset..).step_by(blocks * block_bytes)) {
            let raw = &mut buffer[..chunk.len() / block * block_bytes];
            self.read_at(at, raw)?;
            dequantize(t.format, raw, chunk);
        }
        Ok(())
    }

    fn failed(&self, source: io::Error) -> Error {
        match source.kind() {
            io::ErrorKind::UnexpectedEof => Error::model("file is truncated").in_file(&self.path),
            _ => Error::io(&self.path, source),
        }
    }
}

fn eof() -> io::Error {
    io::Error::from(io::ErrorKind::UnexpectedEof)
}

/// [`io::Read`] over [`Bytes`].
pub(crate) struct Reader<'a> {
    bytes: &'a Bytes,
    position: u64,
}

impl io::Read for Reader<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let n = match &self.bytes.data {
            Data::File(file) => file.read_at(out, self.position)?,
            Data::Memory(data) => {
                let start = usize::try_from(self.position).unwrap_or(usize::MAX).min(data.len());
                io::Read::read(&mut &data[start..], out)?
            }
        };
        self.position += n as u64;
        Ok(n)
    }
}

/// Where and how a weight lies in a file. The extent is checked against the file when it is made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Stored {
    pub(crate) format: Format,
    /// Outermost dimension first, as Hugging Face writes it.
    pub(crate) shape: Vec<usize>,
    /// First byte, from the start of the file.
    pub(crate) offset: u64,
}

impl Stored {
    /// Numbers in a row; a vector (or scalar) is one row.
    pub(crate) fn cols(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Rows: all dimensions but the last.
    pub(crate) fn rows(&self) -> usize {
        self.shape.iter().rev().skip(1).product()
    }

    /// Checks that rows asked for exist.
    pub(crate) fn check_rows(&self, name: &str, rows: &Range<usize>) -> Result<()> {
        if rows.start <= rows.end && rows.end <= self.rows() {
            return Ok(());
        }
        let have = self.rows();
        Err(Error::model(format!("tensor {name:?}: rows {rows:?} asked for, it has {have}")))
    }

    /// Bytes in the file, `None` when the shape overflows or does not fill whole blocks.
    pub(crate) fn bytes(format: Format, shape: &[usize]) -> Option<u64> {
        // Zeros count as ones here: no product of some of the dimensions may overflow either.
        shape.iter().try_fold(1u64, |product, n| product.checked_mul((*n).max(1) as u64))?;
        let cols = format.bytes(shape.last().copied().unwrap_or(1) as u64)?;
        let rows = shape.iter().rev().skip(1);
        rows.map(|n| *n as u64).try_fold(cols, u64::checked_mul)
    }
}

/// The weights of a model in one or several files, by name.
#[derive(Debug, Default)]
pub(crate) struct Tensors {
    files: Vec<Bytes>,
    by_name: BTreeMap<String, (usize, Stored)>,
}

impl Tensors {
    /// Adds a file and what it holds.
    ///
    /// # Errors
    /// When a weight is in an earlier file already.
    pub(crate) fn add(&mut self, file: Bytes, tensors: BTreeMap<String, Stored>) -> Result<()> {
        let index = self.files.len();
        for (name, stored) in tensors {
            if self.by_name.contains_key(&name) {
                let message = format!("tensor {name:?} is in an earlier file too");
                return Err(Error::model(message).in_file(file.path()));
            }
            self.by_name.insert(name, (index, stored));
        }
        self.files.push(file);
        Ok(())
    }

    /// Path of the first file.
    ///
    /// # Panics
    /// When there is none.
    pub(crate) fn first_path(&self) -> &Path {
        self.files[0].path()
    }

    /// Names, sorted.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.by_name.keys().map(String::as_str)
    }

    /// Which file a weight is in.
    pub(crate) fn file_of(&self, name: &str) -> Option<usize> {
        self.by_name.get(name).map(|(file, _)| *file)
    }

    pub(crate) fn get(&self, name: &str) -> Option<&Stored> {
        self.by_name.get(name).map(|(_, stored)| stored)
    }

    /// A weight with the file it is in, where it has these rows.
    pub(crate) fn rows(&self, name: &str, rows: &Range<usize>) -> Result<(&Bytes, &Stored)> {
        let Some((file, stored)) = self.by_name.get(name) else {
            let message = format!("tensor {name:?} is missing");
            return Err(Error::model(message).in_file(self.first_path()));
        };
        let file = &self.files[*file];
        stored.check_rows(name, rows).map_err(|e| e.in_file(file.path()))?;
        Ok((file, stored))
    }

    /// Reads rows of a weight as f32.
    pub(crate) fn read_rows(&self, name: &str, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        let (file, stored) = self.rows(name, &rows)?;
        file.read_rows(stored, rows, out)
    }
}

/// Checks that extents (offset, bytes, name) do not overlap; returns those that are not empty, sorted.
pub(crate) fn check_disjoint<'a>(
    extents: impl Iterator<Item = (u64, u64, &'a str)>,
) -> Result<Vec<(u64, u64, &'a str)>> {
    let mut sorted: Vec<_> = extents.filter(|e| e.1 > 0).collect();
    sorted.sort_unstable();
    for pair in sorted.windows(2) {
        if pair[0].0 + pair[0].1 > pair[1].0 {
            let (a, b) = (pair[0].2, pair[1].2);
            return Err(Error::model(format!("tensors {a:?} and {b:?} overlap")));
        }
    }
    Ok(sorted)
}
