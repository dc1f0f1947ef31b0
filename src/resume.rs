//! What an earlier run of `engine generate` has left in its output file.

use std::collections::{HashMap, HashSet};
use std::fs::{self, OpenOptions};
use std::io::ErrorKind;
use std::path::Path;

use serde::Deserialize;

use crate::exit::{Failure, Result};
use crate::output;

/// The samples that are in the file, by the index of their prompt.
#[derive(Debug, Default)]
pub(crate) struct Done {
    samples: HashMap<usize, Found>,
}

/// The samples of one prompt.
#[derive(Debug)]
struct Found {
    prompt: Vec<u32>,
    samples: HashSet<usize>,
}

/// What is read back of a line.
#[derive(Deserialize)]
struct Record {
    index: usize,
    sample: usize,
    prompt_token_ids: Vec<u32>,
}

impl Done {
    /// Reads `path`, which need not exist, and cuts off a last line that was not written to its end. A
    /// pipe or a device has nothing to read back.
    pub(crate) fn read(path: &Path) -> Result<Self> {
        let mut done = Self::default();
        if output::is_special(path) {
            return Ok(done);
        }
        let bytes = match fs::read(path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(done),
            Err(error) => return Err(Failure::unreadable(path, &error)),
        };
        let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |last| last + 1);
        for (number, line) in bytes[..whole].split(|byte| *byte == b'\n').enumerate() {
            if line.trim_ascii().is_empty() {
                continue;
            }
            let record: Record = serde_json::from_slice(line).map_err(|_| {
                let (path, number) = (path.display(), number + 1);
                Failure::data(format!("{path}: line {number} is no result of generate"))
            })?;
            let found = || Found { prompt: record.prompt_token_ids, samples: HashSet::new() };
            let found = done.samples.entry(record.index).or_insert_with(found);
            found.samples.insert(record.sample);
        }
        if whole < bytes.len() {
            let file = OpenOptions::new().write(true).open(path);
            file.and_then(|file| file.set_len(whole as u64))
                .map_err(|error| Failure::unwritable(path, &error))?;
        }
        Ok(done)
    }

    /// How many prompts have samples in the file.
    pub(crate) fn prompts(&self) -> usize {
        self.samples.len()
    }

    /// Whether `sample` of prompt `index` is in the file.
    pub(crate) fn has(&self, index: usize, sample: usize) -> bool {
        self.samples.get(&index).is_some_and(|found| found.samples.contains(&sample))
    }

    /// How many of `n` samples of prompt `index` are in the file.
    pub(crate) fn count(&self, index: usize, n: usize) -> usize {
        (0..n).filter(|sample| self.has(index, *sample)).count()
    }

    /// Whether the file's prompt `index`, if it is there, is not `prompt`.
    pub(crate) fn differs(&self, index: usize, prompt: &[u32]) -> bool {
        self.samples.get(&index).is_some_and(|found| found.prompt != prompt)
    }
}
