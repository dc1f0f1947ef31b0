//! A hub that lives in a test: answers on a port of this machine, remembers what it was asked.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;

use sha2::{Digest, Sha256};

/// The revision of every repository.
pub(crate) const SHA: &str = "0123456789abcdef0123456789abcdef01234567";

/// A request as it came.
#[derive(Clone, Debug)]
pub(crate) struct Asked {
    pub(crate) method: String,
    pub(crate) path: String,
    headers: BTreeMap<String, String>,
}

impl Asked {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(String::as_str)
    }

    pub(crate) fn get(path: &str) -> Self {
        Self { method: "GET".to_owned(), path: path.to_owned(), headers: BTreeMap::new() }
    }

    /// The same request for the whole file.
    pub(crate) fn without_range(&self) -> Self {
        Self::get(&self.path)
    }

    /// `GET /path`, with the range if one was asked for.
    fn line(&self) -> String {
        let range = self.header("range").map_or(String::new(), |range| format!(" {range}"));
        format!("{} {}{range}", self.method, self.path)
    }

    /// The first byte asked for.
    fn from(&self) -> Option<usize> {
        self.header("range")?.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok()
    }
}

/// How a body ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Whole,
    /// The connection closes after so many bytes.
    Closed(usize),
    /// Nothing comes after so many bytes, until the client leaves.
    Silent(usize),
}

/// An answer.
#[derive(Clone, Debug)]
pub(crate) struct Reply {
    pub(crate) status: u16,
    pub(crate) headers: Vec<(&'static str, String)>,
    pub(crate) body: Vec<u8>,
    pub(crate) end: End,
}

impl Reply {
    pub(crate) fn status(status: u16) -> Self {
        Self { status, headers: Vec::new(), body: Vec::new(), end: End::Whole }
    }

    pub(crate) fn body(body: impl Into<Vec<u8>>) -> Self {
        Self { body: body.into(), ..Self::status(200) }
    }

    /// Sets a header; an empty value leaves it out, also a length that would be sent otherwise.
    pub(crate) fn header(mut self, name: &'static str, value: impl ToString) -> Self {
        self.headers.retain(|(there, _)| *there != name);
        self.headers.push((name, value.to_string()));
        self
    }

    fn send(self, asked: &Asked, mut stream: &TcpStream) -> std::io::Result<()> {
        let mut head = format!("HTTP/1.1 {} x\r\nconnection: close\r\n", self.status);
        for (name, value) in self.headers.iter().filter(|(_, value)| !value.is_empty()) {
            head += &format!("{name}: {value}\r\n");
        }
        if !self.headers.iter().any(|(name, _)| *name == "content-length") {
            head += &format!("content-length: {}\r\n", self.body.len());
        }
        stream.write_all(format!("{head}\r\n").as_bytes())?;
        if asked.method == "HEAD" {
            return Ok(());
        }
        match self.end {
            End::Whole => stream.write_all(&self.body),
            End::Closed(bytes) => stream.write_all(&self.body[..bytes]),
            End::Silent(bytes) => {
                stream.write_all(&self.body[..bytes])?;
                std::io::copy(&mut stream, &mut std::io::sink()).map(drop)
            }
        }
    }
}

/// A server that answers for as long as the test process lives.
pub(crate) struct StandIn {
    pub(crate) url: String,
    asked: Arc<Mutex<Vec<Asked>>>,
}

impl StandIn {
    pub(crate) fn start(answer: impl Fn(&Asked) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (log, answer) = (Arc::clone(&asked), Arc::new(answer));
        thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                let (log, answer) = (Arc::clone(&log), Arc::clone(&answer));
                thread::spawn(move || {
                    let Some(request) = read(&stream) else { return };
                    log.lock().unwrap().push(request.clone());
                    // A client may leave in the middle.
                    let _left = answer(&request).send(&request, &stream);
                });
            }
        });
        Self { url, asked }
    }

    /// A hub with one repository.
    pub(crate) fn of(repository: Repository) -> Self {
        Self::start(move |asked| repository.answer(asked))
    }

    /// What it was asked up to here; forgets it.
    pub(crate) fn take(&self) -> Vec<Asked> {
        std::mem::take(&mut *self.asked.lock().unwrap())
    }

    /// The same as lines.
    pub(crate) fn lines(&self) -> Vec<String> {
        self.take().iter().map(Asked::line).collect()
    }
}

fn read(stream: &TcpStream) -> Option<Asked> {
    let mut lines = BufReader::new(stream).lines().map_while(Result::ok);
    let first = lines.next()?;
    let mut words = first.split(' ').map(str::to_owned);
    let (method, path) = (words.next()?, words.next()?);
    let headers = lines.take_while(|line| !line.is_empty()).filter_map(|line| {
        let (name, value) = line.split_once(':')?;
        Some((name.to_lowercase(), value.trim().to_owned()))
    });
    Some(Asked { method, path, headers: headers.collect() })
}

/// The files of `org/tiny`.
#[derive(Clone, Default)]
pub(crate) struct Repository {
    files: BTreeMap<String, Vec<u8>>,
}

impl Repository {
    pub(crate) fn new(files: impl IntoIterator<Item = (&'static str, Vec<u8>)>) -> Self {
        Self { files: files.into_iter().map(|(name, data)| (name.to_owned(), data)).collect() }
    }

    /// The same with a file more.
    pub(crate) fn with(mut self, name: &str, data: &[u8]) -> Self {
        self.files.insert(name.to_owned(), data.to_vec());
        self
    }

    /// As the hub answers: the listing, and files with etag, size and ranges.
    pub(crate) fn answer(&self, asked: &Asked) -> Reply {
        if asked.path == "/api/models/org/tiny/revision/main" {
            let names: Vec<String> =
                self.files.keys().map(|name| format!("{{\"rfilename\": {name:?}}}")).collect();
            let names = names.join(", ");
            return Reply::body(format!("{{\"sha\": \"{SHA}\", \"siblings\": [{names}]}}"));
        }
        let path = asked.path.split('?').next().unwrap();
        let name = path.strip_prefix(&format!("/org/tiny/resolve/{SHA}/"));
        let Some((name, data)) = name.and_then(|name| self.files.get_key_value(name)) else {
            return Reply::status(404);
        };
        let etag = etag(name, data);
        match asked.from() {
            None => Reply::body(data.clone()),
            Some(from) => {
                let range = format!("bytes {from}-{}/{}", data.len() - 1, data.len());
                let reply = Reply::body(&data[from..]).header("content-range", range);
                Reply { status: 206, ..reply }
            }
        }
        .header("etag", format!("\"{etag}\""))
    }
}

/// The SHA-256 of weights; another unique name for the rest, as git gives it.
pub(crate) fn etag(name: &str, data: &[u8]) -> String {
    let mut hash = format!("{:x}", Sha256::digest(data));
    if !name.ends_with(".safetensors") && !name.ends_with(".gguf") {
        hash.truncate(40);
    }
    hash
}
