//! `MANIFEST.sha256`: the files of a checkpoint and their SHA-256, as `sha256sum -c` reads it.

use std::fs::{self, File};
use std::io;
use std::path::{Component, Path};

use sha2::{Digest, Sha256};

use super::entries;
use crate::error::{Error, Result};

/// The manifest's name within a checkpoint.
pub const MANIFEST: &str = "MANIFEST.sha256";

/// Writes the manifest of all files below `dir`.
pub(super) fn write(dir: &Path) -> Result<()> {
    let mut names = Vec::new();
    collect(dir, "", &mut names)?;
    names.retain(|name| name != MANIFEST);
    if names.is_empty() {
        return Err(Error::checkpoint(format!("{}: no file was written", dir.display())));
    }
    names.sort();
    let mut text = String::new();
    for name in names {
        text += &format!("{}  {name}\n", hash(&dir.join(&name))?);
    }
    let path = dir.join(MANIFEST);
    fs::write(&path, text).map_err(|e| Error::io(&path, e))
}

/// Checks that the checkpoint in `dir` is whole: every file of its manifest is there, unchanged.
///
/// # Errors
/// If it is not, naming the file.
pub fn verify(dir: &Path) -> Result<()> {
    let path = dir.join(MANIFEST);
    let broken = |what: String| Error::checkpoint(format!("{}: {what}", dir.display()));
    let text =
        fs::read_to_string(&path).map_err(|e| broken(format!("{MANIFEST} cannot be read: {e}")))?;
    if text.is_empty() || !text.ends_with('\n') {
        return Err(broken(format!("{MANIFEST} is cut short")));
    }
    for line in text.lines() {
        let (expected, name) = line
            .split_once("  ")
            .filter(|(_, name)| is_inside(name))
            .ok_or_else(|| broken(format!("{MANIFEST} has the line {line:?}")))?;
        let actual = hash(&dir.join(name)).map_err(|e| broken(e.to_string()))?;
        if actual != expected {
            return Err(broken(format!("{name} is not the file that was written")));
        }
    }
    Ok(())
}

/// Whether a name stays below the folder it is joined to.
fn is_inside(name: &str) -> bool {
    !name.is_empty() && Path::new(name).components().all(|c| matches!(c, Component::Normal(_)))
}

fn collect(dir: &Path, prefix: &str, out: &mut Vec<String>) -> Result<()> {
    for (name, path) in entries(dir)? {
        if path.is_dir() {
            collect(&path, &format!("{prefix}{name}/"), out)?;
        } else {
            out.push(format!("{prefix}{name}"));
        }
    }
    Ok(())
}

fn hash(path: &Path) -> Result<String> {
    let mut hash = Sha256::new();
    let read = File::open(path).and_then(|mut file| {
        let mut buffer = vec![0; 1 << 20];
        loop {
            match io::Read::read(&mut file, &mut buffer)? {
                0 => return Ok(()),
                n => hash.update(&buffer[..n]),
            }
        }
    });
    read.map_err(|e| Error::io(path, e))?;
    Ok(format!("{:x}", hash.finalize()))
}
