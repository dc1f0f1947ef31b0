//! One run at a time writes to a folder: an advisory lock on a file in it.
//!
//! The system lets go of the lock when the process ends, however it ends, so that none is ever stale; the file
//! stays. Whoever only reads the folder takes no lock.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::path::Path;

use crate::error::{Error, Result};

/// Keeps other runs out of a folder for as long as it lives.
#[derive(Debug)]
#[must_use = "the folder is free again when the lock is dropped"]
pub struct RunLock {
    _file: File,
}

impl RunLock {
    /// Takes the lock of the folder `run`, which is created if it is not there.
    ///
    /// # Errors
    /// `ErrorKind::Config` if another run has it, and if the file cannot be written.
    pub(crate) fn take(run: &Path) -> Result<Self> {
        fs::create_dir_all(run).map_err(|e| Error::io(run, e))?;
        let path = run.join(".lock");
        let file = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
        let file = file.map_err(|e| Error::io(&path, e))?;
        match file.try_lock() {
            Ok(()) => Ok(Self { _file: file }),
            Err(TryLockError::WouldBlock) => Err(Error::config(format!(
                "another run writes to {}: wait until it has ended, or choose another --output",
                run.display()
            ))),
            // Some network file systems know no locks, and say so in different ways: nobody could run there.
            Err(TryLockError::Error(_)) => Ok(Self { _file: file }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;
    use crate::testing::TestDir;

    #[test]
    fn a_folder_is_one_runs_until_it_lets_go() {
        let dir = TestDir::new("lock");
        let run = dir.path().join("run");
        let lock = RunLock::take(&run).unwrap();
        let e = RunLock::take(&run).unwrap_err();
        assert!(matches!(e.kind(), ErrorKind::Config(_)));
        assert!(e.to_string().contains(&*run.to_string_lossy()), "{e}");
        drop(lock);
        let _again = RunLock::take(&run).unwrap();
    }
}
