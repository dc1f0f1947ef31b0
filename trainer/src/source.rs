//! Where rows come from: files, or tasks made on demand.

use std::path::Path;

use crate::data::{self, Duplicates, Row};
use crate::error::{Error, Result};
use crate::tasks::{Arith, Split};

/// The name of the built-in tasks among the files of a configuration.
const ARITH: &str = "builtin:arith";
/// Built-in tasks that make up an epoch of training.
const TRAIN_TASKS: u64 = 20_000;
/// Built-in tasks that make up a validation set.
const VAL_TASKS: u64 = 256;

/// The rows of a data set, and their digest.
pub struct Rows {
    /// The rows, in the order of the files.
    pub rows: Vec<Row>,
    /// Their digest.
    pub hash: String,
}

/// The rows to train on.
///
/// # Errors
/// When a file cannot be read or has a bad line.
pub fn train_rows(files: &[String], seed: u64) -> Result<Rows> {
    rows(files, &Arith { seed, split: Split::Train }, TRAIN_TASKS)
}

/// The rows to validate on; none of the built-in ones is ever trained on.
///
/// # Errors
/// When a file cannot be read or has a bad line.
pub fn val_rows(files: &[String]) -> Result<Rows> {
    rows(files, &Arith { seed: 0, split: Split::Test }, VAL_TASKS)
}

fn rows(files: &[String], tasks: &Arith, count: u64) -> Result<Rows> {
    let mut rows = Vec::new();
    for file in files {
        match file.as_str() {
            ARITH => rows.extend(tasks.rows(count)),
            name if name.starts_with("builtin:") => {
                return Err(Error::config(format!("there are no tasks {name}, there is {ARITH}")));
            }
            path => rows.extend(data::load(&[Path::new(path)], Duplicates::Keep)?),
        }
    }
    let hash = data::digest(&rows);
    Ok(Rows { rows, hash })
}
