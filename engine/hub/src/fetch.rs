//! One file from the hub to the cache: what it is, its bytes, the check, and trying again.
//!
//! ```text
//! HEAD -> etag, size -> blob there? done
//! lock -> blob there by now? done -> GET from what there is -> size, SHA-256 -> rename to the blob
//! ```

use std::fs::{self, File};
use std::io::{ErrorKind as Io, Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;

use engine::{Error, Result};
use sha2::{Digest, Sha256};
use ureq::Body;
use ureq::http::Response;

use crate::cache::Layout;
use crate::http::{Ask, Client, Trouble, header, shown};
use crate::{Event, Patience, Tell};

/// Bytes moved at a time.
const PIECE_BYTES: usize = 256 << 10;
/// Bytes that count as progress, after which tries are counted anew.
const PROGRESS_BYTES: u64 = 1 << 20;
/// Longest wait between two tries.
const MAX_WAIT: Duration = Duration::from_secs(60);

/// Fetches files of one model.
pub(crate) struct Fetch<'a> {
    client: &'a Client<'a>,
    layout: &'a Layout,
    patience: &'a Patience,
    tell: &'a mut Tell<'a>,
    /// Tries in a row that failed without progress.
    failures: u32,
}

/// A file as the hub describes it.
struct Remote<'f> {
    name: &'f str,
    url: &'f str,
    /// Names the blob; the SHA-256 of a large file.
    etag: String,
    size: u64,
}

impl<'a> Fetch<'a> {
    pub(crate) fn new(
        client: &'a Client<'a>,
        layout: &'a Layout,
        patience: &'a Patience,
        tell: &'a mut Tell<'a>,
    ) -> Self {
        Self { client, layout, patience, tell, failures: 0 }
    }

    /// The text of a small answer.
    pub(crate) fn text(&mut self, url: &str, limit: u64) -> Result<String> {
        self.persist(|fetch| {
            let response = fetch.client.ask(Ask::Bytes { from: 0 }, url)?;
            let body = response.into_body().into_with_config().limit(limit).read_to_string();
            body.map_err(|error| Trouble::again(format!("{}: {error}", shown(url))))
        })
    }

    /// Makes sure that the blob of a file is in the cache; returns its etag.
    pub(crate) fn file(&mut self, name: &str, url: &str) -> Result<String> {
        let remote = self.persist(|fetch| {
            let response = fetch.client.ask(Ask::Head, url)?;
            let (etag, size) = describe(&response).ok_or_else(|| {
                Error::network(format!("{}: an answer without etag or size", shown(url)))
            })?;
            Ok(Remote { name, url, etag, size })
        })?;
        let blob = self.layout.blob(&remote.etag);
        let there = || fs::metadata(&blob).is_ok_and(|meta| meta.len() == remote.size);
        if there() {
            return Ok(remote.etag);
        }
        let busy = || (self.tell)(Event::Waiting { file: name });
        let _lock = self.layout.lock(&remote.etag, busy)?;
        if there() {
            return Ok(remote.etag);
        }
        let partial = self.layout.partial(&remote.etag);
        self.persist(|fetch| fetch.transfer(&remote, &partial))?;
        verify(&remote, &partial)?;
        fs::rename(&partial, &blob).map_err(|error| Error::io(&blob, error))?;
        Ok(remote.etag)
    }

    /// Repeats `attempt` while that may help.
    fn persist<T>(
        &mut self,
        mut attempt: impl FnMut(&mut Self) -> Result<T, Trouble>,
    ) -> Result<T> {
        self.failures = 0;
        loop {
            let (why, asked) = match attempt(self) {
                Ok(value) => return Ok(value),
                Err(Trouble::Final(error)) => return Err(error),
                Err(Trouble::Again { why, wait }) => (why, wait),
            };
            self.failures += 1;
            if self.failures > self.patience.retries {
                return Err(Error::network(format!("{why}, tried {} times", self.failures)));
            }
            let doubled = 1 << (self.failures - 1).min(16);
            let wait = self.patience.backoff.saturating_mul(doubled).max(asked).min(MAX_WAIT);
            (self.tell)(Event::Retry { why: &why, wait });
            sleep(wait);
        }
    }

    /// Appends to `partial` what it lacks.
    fn transfer(&mut self, remote: &Remote<'_>, partial: &Path) -> Result<(), Trouble> {
        let failed = |error| Error::io(partial, error);
        let mut options = File::options();
        options.write(true).create(true).truncate(false);
        let mut file = options.open(partial).map_err(failed)?;
        let mut have = file.metadata().map_err(failed)?.len();
        if have >= remote.size {
            if have > remote.size {
                file.set_len(0).map_err(failed)?;
                return Err(Trouble::again(format!("{}: more than the whole", partial.display())));
            }
            self.progress(remote, have);
            return Ok(());
        }
        let response = self.client.ask(Ask::Bytes { from: have }, remote.url)?;
        let first = first_byte(&response, remote, have)?;
        if first != have {
            file.set_len(0).map_err(failed)?;
            have = 0;
        }
        file.seek(SeekFrom::Start(have)).map_err(failed)?;
        self.progress(remote, have);
        self.copy(remote, response, (&mut file, partial), have)?;
        file.sync_all().map_err(failed)?;
        Ok(())
    }

    /// Moves the rest of a file from the answer to the disk.
    fn copy(
        &mut self,
        remote: &Remote<'_>,
        response: Response<Body>,
        (file, path): (&mut File, &Path),
        first: u64,
    ) -> Result<(), Trouble> {
        let (size, mut have) = (remote.size, first);
        let mut body = response.into_body().into_reader();
        let mut piece = vec![0; PIECE_BYTES];
        loop {
            let read = body.read(&mut piece).map_err(|error| {
                Trouble::again(format!("{}: {error} after {have} of {size} bytes", remote.name))
            })?;
            if read == 0 && have < size {
                let why = format!("{}: ended after {have} of {size} bytes", remote.name);
                return Err(Trouble::again(why));
            }
            if read as u64 > size - have {
                // Whatever this is, it is not the file that was described.
                file.set_len(0).map_err(|error| Error::io(path, error))?;
                let message = format!("{}: more than the {size} bytes announced", remote.name);
                return Err(Error::network(message).into());
            }
            if read == 0 {
                return Ok(());
            }
            let written = file.write_all(&piece[..read]);
            written.map_err(|error| unwritten(path, remote, have, error))?;
            have += read as u64;
            if have - first >= PROGRESS_BYTES {
                self.failures = 0;
            }
            self.progress(remote, have);
        }
    }

    fn progress(&mut self, remote: &Remote<'_>, done_bytes: u64) {
        let total_bytes = remote.size;
        (self.tell)(Event::Progress { file: remote.name, done_bytes, total_bytes });
    }
}

/// Etag and size from the headers: those of the large file that a redirect leads to, else the answer's.
fn describe(response: &Response<Body>) -> Option<(String, u64)> {
    let etag = header(response, "x-linked-etag").or_else(|| header(response, "etag"))?;
    let etag = etag.strip_prefix("W/").unwrap_or(etag).trim_matches('"');
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    let valid =
        (1..=128).contains(&etag.len()) && !etag.starts_with('.') && etag.chars().all(plain);
    let size = header(response, "x-linked-size").or_else(|| header(response, "content-length"))?;
    Some((etag.to_owned(), size.parse().ok()?)).filter(|_| valid)
}

/// The first byte that an answer holds: the one asked for, or 0 where the server sends everything.
fn first_byte(response: &Response<Body>, remote: &Remote<'_>, asked: u64) -> Result<u64, Trouble> {
    let (place, size) = (shown(remote.url), remote.size);
    match response.status().as_u16() {
        206 => {
            let range = header(response, "content-range").unwrap_or_default();
            if range == format!("bytes {asked}-{}/{size}", size - 1) {
                return Ok(asked);
            }
            let message = format!("{place}: range {range:?} instead of {asked} to {size}");
            Err(Error::network(message).into())
        }
        200 => match header(response, "content-length").map(str::parse::<u64>) {
            Some(Ok(length)) if length != size => {
                let message = format!("{place}: {length} bytes, announced were {size}");
                Err(Error::network(message).into())
            }
            _ => Ok(0),
        },
        status => Err(Error::network(format!("{place}: unexpected status {status}")).into()),
    }
}

/// Checks a whole file against its hash, where the etag is one; removes it if it is not what it should be.
fn verify(remote: &Remote<'_>, partial: &Path) -> Result<()> {
    let hex = |c: char| c.is_ascii_digit() || ('a'..='f').contains(&c);
    if remote.etag.len() != 64 || !remote.etag.chars().all(hex) {
        return Ok(());
    }
    let failed = |error| Error::io(partial, error);
    let mut file = File::open(partial).map_err(failed)?;
    let (mut hash, mut piece) = (Sha256::new(), vec![0; PIECE_BYTES]);
    loop {
        match file.read(&mut piece).map_err(failed)? {
            0 => break,
            read => hash.update(&piece[..read]),
        }
    }
    let found = format!("{:x}", hash.finalize());
    if found == remote.etag {
        return Ok(());
    }
    fs::remove_file(partial).map_err(failed)?;
    let (name, wanted) = (remote.name, &remote.etag);
    Err(Error::network(format!(
        "{name}: damaged on the way, sha256 is {found} instead of {wanted}"
    )))
}

/// A write that failed; a full disk is said with how much there is still to write.
fn unwritten(path: &Path, remote: &Remote<'_>, have: u64, error: std::io::Error) -> Error {
    if error.kind() != Io::StorageFull {
        return Error::io(path, error);
    }
    let (name, size) = (remote.name, remote.size);
    let message = format!("disk full after {have} of {size} bytes of {name}");
    Error::io(path, std::io::Error::new(Io::StorageFull, message))
}
