//! Stands in for Parquet where the program is built without it.

use std::path::Path;

use super::Columns;
use crate::error::{Error, Result};

/// Fails, naming the feature.
pub(super) fn read(path: &Path, _take: &mut dyn FnMut(&Columns) -> Result<()>) -> Result<()> {
    let message = "Parquet is not part of this program, \
                   build it with cargo build --release --features parquet, or convert the file to JSON lines";
    Err(Error::data(path, None, message))
}
