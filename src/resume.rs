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
    /// Those of its samples; `None` is of an older program, which wrote none.
    fingerprints: HashSet<Option<String>>,
}

/// How the samples of a prompt are not those that would be drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Difference {
    Prompt,
    Settings,
}

/// What is read back of a line.
#[derive(Deserialize)]
struct Record {
    index: usize,
    sample: usize,
    prompt_token_ids: Vec<u32>,
    fingerprint: Option<String>,
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
            let found = || Found {
                prompt: record.prompt_token_ids,
                samples: HashSet::new(),
                fingerprints: HashSet::new(),
            };
            let found = done.samples.entry(record.index).or_insert_with(found);
            found.samples.insert(record.sample);
            found.fingerprints.insert(record.fingerprint);
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

    /// How the file's prompt `index`, if it is there, and its samples are not those of `prompt` and
    /// `fingerprint`.
    pub(crate) fn difference(
        &self,
        index: usize,
        prompt: &[u32],
        fingerprint: &str,
    ) -> Option<Difference> {
        let found = self.samples.get(&index)?;
        if found.prompt != prompt {
            return Some(Difference::Prompt);
        }
        let mut others = found.fingerprints.iter().flatten();
        others.any(|other| other != fingerprint).then_some(Difference::Settings)
    }

    /// Whether the file does not say how samples of one of these prompts were drawn.
    pub(crate) fn unknown(&self, mut indices: impl Iterator<Item = usize>) -> bool {
        let unknown = |found: &Found| found.fingerprints.contains(&None);
        indices.any(|index| self.samples.get(&index).is_some_and(unknown))
    }
}
