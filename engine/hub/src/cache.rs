//! The cache on disk, as Python's `huggingface_hub` lays it out.
//!
//! ```text
//! CACHE/models--org--name/blobs/ETAG              a file's bytes
//!                         blobs/ETAG.incomplete   as much of them as there is
//!                         snapshots/SHA/FILE      a relative link to its blob
//!                         refs/main               SHA
//! CACHE/.locks/models--org--name/ETAG.lock        held while a blob is written
//! ```
//!
//! Everything readers see appears by a rename or a link, never by writing.

use std::fs::{self, File, TryLockError};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use engine::model::hub::HubId;
use engine::{Error, Result};

/// The places of one model.
#[derive(Debug)]
pub(crate) struct Layout {
    folder: PathBuf,
    locks: PathBuf,
}

/// Held while a blob is written; dropping it lets the next process in.
#[must_use]
#[derive(Debug)]
pub(crate) struct BlobLock(#[expect(dead_code, reason = "dropping it unlocks")] File);

impl Layout {
    pub(crate) fn new(id: &HubId, cache: &Path) -> Self {
        Self { folder: id.folder(cache), locks: id.folder(&cache.join(".locks")) }
    }

    /// Where the bytes of a file are.
    pub(crate) fn blob(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(etag)
    }

    /// Where they are while they are not whole.
    pub(crate) fn partial(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(format!("{etag}.incomplete"))
    }

    /// The directory of one revision.
    pub(crate) fn snapshot(&self, sha: &str) -> PathBuf {
        self.folder.join("snapshots").join(sha)
    }

    /// Waits until no other process writes this blob; `busy` is called if one does.
    pub(crate) fn lock(&self, etag: &str, busy: impl FnOnce()) -> Result<BlobLock> {
        let path = self.locks.join(format!("{etag}.lock"));
        create_parent(&path)?;
        create_parent(&self.blob(etag))?;
        let failed = |error| Error::io(&path, error);
        let mut options = File::options();
        let file = options.write(true).create(true).truncate(false).open(&path).map_err(failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                busy();
                file.lock().map_err(failed)?;
            }
            Err(TryLockError::Error(error)) => return Err(failed(error)),
        }
        Ok(BlobLock(file))
    }

    /// Shows a blob under its name in a snapshot; returns that path.
    pub(crate) fn link(&self, sha: &str, name: &str, etag: &str) -> Result<PathBuf> {
        let path = self.snapshot(sha).join(name);
        let up = "../".repeat(2 + name.matches('/').count());
        let target = PathBuf::from(format!("{up}blobs/{etag}"));
        if fs::read_link(&path).is_ok_and(|there| there == target) {
            return Ok(path);
        }
        create_parent(&path)?;
        let new = self.unique();
        symlink(&target, &new).map_err(|error| Error::io(&new, error))?;
        fs::rename(&new, &path).map_err(|error| Error::io(&path, error))?;
        Ok(path)
    }

    /// Makes a revision the one that `main` means.
    pub(crate) fn publish(&self, sha: &str) -> Result<()> {
        let path = self.folder.join("refs").join("main");
        create_parent(&path)?;
        let new = self.unique();
        fs::write(&new, sha).map_err(|error| Error::io(&new, error))?;
        fs::rename(&new, &path).map_err(|error| Error::io(&path, error))
    }

    /// Leaves a note for [`engine::model::hub::cached`].
    pub(crate) fn note(&self, path: &Path) -> Result<()> {
        create_parent(path)?;
        fs::write(path, "").map_err(|error| Error::io(path, error))
    }

    /// A name that no other thread or process uses.
    fn unique(&self) -> PathBuf {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        self.folder.join(format!(".new-{}-{number}", std::process::id()))
    }
}

fn create_parent(path: &Path) -> Result<()> {
    path.parent().map_or(Ok(()), |parent| {
        fs::create_dir_all(parent).map_err(|error| Error::io(parent, error))
    })
}
