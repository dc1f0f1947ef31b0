//! One request to a server and its answer as a stream of events, with the time of each piece.
//!
//! HTTP/1.1 over TCP, a connection a request, bodies chunked or up to the end of the connection. Leaves
//! out TLS, redirects and reuse of connections.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use engine::Tokenizer;
use engine::text::SkipSpecial;
use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::bench::dataset::{Content, Prompt};
use crate::bench::serve_args::Backend;

/// Longest head of an answer.
const MAX_HEAD_BYTES: usize = 64 << 10;
/// Longest chunk of a body.
const MAX_CHUNK_BYTES: usize = 16 << 20;
/// Longest piece of an error that is reported.
const MAX_ERROR_CHARS: usize = 300;

/// A server and how it is spoken to.
#[derive(Clone)]
pub(super) struct Target {
    /// Host and port.
    pub(super) address: String,
    pub(super) path: String,
    pub(super) backend: Backend,
    pub(super) model: String,
    pub(super) api_key: Option<String>,
    /// The model's, if it is known: turns tokens into the text of a chat.
    pub(super) tokenizer: Option<Arc<Tokenizer>>,
    /// Longest time for an answer.
    pub(super) timeout: Duration,
    /// What every request says.
    pub(super) extra: Vec<(&'static str, Value)>,
}

/// What became of a request.
#[derive(Clone, Debug, Default)]
pub(super) struct Outcome {
    /// When it was sent, in seconds from the beginning of the run.
    pub(super) start_s: f64,
    pub(super) input_tokens: usize,
    pub(super) output_tokens: usize,
    pub(super) ttft_s: f64,
    /// Times between the pieces of the answer.
    pub(super) itl_s: Vec<f32>,
    /// From sending to the last piece.
    pub(super) latency_s: f64,
    pub(super) text: String,
    /// Why it failed.
    pub(super) error: Option<String>,
}

impl Target {
    fn body(&self, prompt: &Prompt) -> Value {
        let mut body = json!({"model": self.model, "stream": true,
            "stream_options": {"include_usage": true}, "max_tokens": prompt.output});
        match (self.backend, &prompt.content) {
            (Backend::Openai, Content::Tokens(tokens)) => body["prompt"] = json!(tokens),
            (Backend::Openai, Content::Text(text)) => body["prompt"] = json!(text),
            (Backend::OpenaiChat, content) => {
                let text = match content {
                    Content::Text(text) => text.clone(),
                    Content::Tokens(tokens) => self.words(tokens),
                };
                body["messages"] = json!([{"role": "user", "content": text}]);
            }
        }
        self.extra.iter().for_each(|(key, value)| body[*key] = value.clone());
        body
    }

    /// A text of these tokens, or of as many words.
    fn words(&self, tokens: &[u32]) -> String {
        let text = self.tokenizer.as_ref().and_then(|t| t.decode(tokens, SkipSpecial::Yes).ok());
        text.unwrap_or_else(|| tokens.iter().map(|token| format!("{token} ")).collect())
    }

    fn head(&self, method: &str, path: &str, length: usize) -> String {
        let key = self.api_key.as_ref();
        let key = key.map(|key| format!("authorization: Bearer {key}\r\n")).unwrap_or_default();
        format!(
            "{method} {path} HTTP/1.1\r\nhost: {}\r\nconnection: close\r\n{key}\
             content-type: application/json\r\ncontent-length: {length}\r\n\r\n",
            self.address
        )
    }

    /// The whole answer to a `GET`.
    pub(super) async fn get(&self, path: &str) -> Result<String, String> {
        let request = self.head("GET", path, 0);
        let answer = async {
            let mut answer = Answer::begin(&self.address, request.as_bytes()).await?;
            while answer.more().await? {}
            match answer.status {
                200 => Ok(String::from_utf8_lossy(&answer.body).into_owned()),
                status => Err(format!("status {status}")),
            }
        };
        match timeout(self.timeout, answer).await {
            Ok(answer) => answer,
            Err(_) => Err(format!("no answer in {} s", self.timeout.as_secs_f64())),
        }
    }

    /// Asks for a stream and reads it to its end.
    pub(super) async fn stream(&self, prompt: &Prompt, begun: Instant) -> Outcome {
        let mut outcome = Outcome {
            start_s: begun.elapsed().as_secs_f64(),
            input_tokens: prompt.tokens().len(),
            ..Outcome::default()
        };
        let error = match timeout(self.timeout, self.pieces(prompt, &mut outcome)).await {
            Ok(ended) => ended.err(),
            Err(_) => Some(format!("not done in {} s", self.timeout.as_secs_f64())),
        };
        outcome.error = error;
        outcome
    }

    async fn pieces(&self, prompt: &Prompt, outcome: &mut Outcome) -> Result<(), String> {
        let body = self.body(prompt).to_string();
        let request = self.head("POST", &self.path, body.len()) + &body;
        let sent = Instant::now();
        let mut answer = Answer::begin(&self.address, request.as_bytes()).await?;
        if answer.status != 200 {
            while answer.more().await? {}
            let body = String::from_utf8_lossy(&answer.body);
            let body: String = body.chars().take(MAX_ERROR_CHARS).collect();
            return Err(format!("status {}: {}", answer.status, body.trim()));
        }
        let (mut last, mut done) = (None, false);
        loop {
            for event in answer.events() {
                if event == "[DONE]" {
                    done = true;
                    continue;
                }
                let event =
                    serde_json::from_str(&event).map_err(|error| format!("event: {error}"))?;
                outcome.take(event, (sent, &mut last))?;
            }
            if !answer.more().await? {
                break;
            }
        }
        outcome.latency_s = last.map_or(0.0, |last: Instant| (last - sent).as_secs_f64());
        match (done, last) {
            (true, Some(_)) => Ok(()),
            (true, None) => Err("the stream had no output".to_owned()),
            (false, _) => Err("the stream broke off".to_owned()),
        }
    }
}

/// What is read of an event: the client takes little from a server on the same machine.
#[derive(Deserialize)]
struct StreamEvent {
    error: Option<Value>,
    usage: Option<Usage>,
    choices: Option<Vec<Choice>>,
}

#[derive(Default, Deserialize)]
struct Usage {
    prompt_tokens: Option<usize>,
    completion_tokens: Option<usize>,
}

#[derive(Deserialize)]
struct Choice {
    text: Option<String>,
    delta: Option<Delta>,
    finish_reason: Option<IgnoredAny>,
}

#[derive(Deserialize)]
struct Delta {
    content: Option<String>,
}

impl Outcome {
    /// Takes in an event of the stream.
    fn take(
        &mut self,
        event: StreamEvent,
        (sent, last): (Instant, &mut Option<Instant>),
    ) -> Result<(), String> {
        if let Some(error) = event.error {
            return Err(error["message"].as_str().unwrap_or("an error").to_owned());
        }
        let usage = event.usage.unwrap_or_default();
        self.input_tokens = usage.prompt_tokens.unwrap_or(self.input_tokens);
        self.output_tokens = usage.completion_tokens.unwrap_or(self.output_tokens);
        let Some(choice) = event.choices.unwrap_or_default().into_iter().next() else {
            return Ok(());
        };
        let text = choice.text.or(choice.delta.and_then(|delta| delta.content));
        let text = text.unwrap_or_default();
        if text.is_empty() && choice.finish_reason.is_none() {
            return Ok(());
        }
        let now = Instant::now();
        match last.replace(now) {
            None => self.ttft_s = (now - sent).as_secs_f64(),
            Some(last) => self.itl_s.push((now - last).as_secs_f32()),
        }
        self.text.push_str(&text);
        Ok(())
    }
}

/// An answer as it comes.
struct Answer {
    stream: TcpStream,
    status: u16,
    /// Whether the body comes in chunks.
    chunked: bool,
    /// Bytes that are not decoded yet.
    raw: Vec<u8>,
    /// The decoded body that nobody has taken.
    body: Vec<u8>,
    over: bool,
}

impl Answer {
    /// Sends a request and reads the answer's head.
    async fn begin(address: &str, request: &[u8]) -> Result<Self, String> {
        let io = |error: io::Error| error.to_string();
        let mut stream = TcpStream::connect(address).await.map_err(io)?;
        stream.set_nodelay(true).map_err(io)?;
        stream.write_all(request).await.map_err(io)?;
        let mut raw = Vec::new();
        let end = loop {
            if let Some(at) = find(&raw, b"\r\n\r\n") {
                break at;
            }
            if raw.len() > MAX_HEAD_BYTES {
                return Err(format!("the head is longer than {MAX_HEAD_BYTES} bytes"));
            }
            if stream.read_buf(&mut raw).await.map_err(io)? == 0 {
                return Err("the connection was closed before an answer".to_owned());
            }
        };
        let (status, chunked) = head(&raw[..end])?;
        raw.drain(..end + 4);
        let mut answer = Self { stream, status, chunked, raw, body: Vec::new(), over: false };
        answer.decode()?;
        Ok(answer)
    }

    /// Waits for more of the body; false when all of it has been read.
    async fn more(&mut self) -> Result<bool, String> {
        if self.over {
            return Ok(false);
        }
        let read = self.stream.read_buf(&mut self.raw).await.map_err(|error| error.to_string())?;
        match read {
            0 if self.chunked => Err("the stream broke off".to_owned()),
            0 => {
                self.over = true;
                Ok(false)
            }
            _ => self.decode().map(|()| true),
        }
    }

    /// Moves whole chunks, or everything where there are none, to the body.
    fn decode(&mut self) -> Result<(), String> {
        if !self.chunked {
            self.body.append(&mut self.raw);
            return Ok(());
        }
        while let Some(line) = find(&self.raw, b"\r\n") {
            let size = String::from_utf8_lossy(&self.raw[..line]);
            let digits = size.split(';').next().unwrap_or_default().trim();
            let size = usize::from_str_radix(digits, 16)
                .ok()
                .filter(|size| *size <= MAX_CHUNK_BYTES)
                .ok_or_else(|| format!("a chunk has the size {digits:?}"))?;
            let chunk = line + 2..line + 2 + size;
            if self.raw.len() < chunk.end + 2 {
                break;
            }
            self.over |= size == 0;
            self.body.extend_from_slice(&self.raw[chunk.clone()]);
            self.raw.drain(..chunk.end + 2);
        }
        Ok(())
    }

    /// The data of the events that are whole.
    fn events(&mut self) -> Vec<String> {
        let mut events = Vec::new();
        while let Some(end) = find(&self.body, b"\n\n") {
            let event = String::from_utf8_lossy(&self.body[..end]).into_owned();
            self.body.drain(..end + 2);
            let data = event.lines().filter_map(|line| line.strip_prefix("data:"));
            let data: Vec<&str> = data.map(str::trim).collect();
            if !data.is_empty() {
                events.push(data.join("\n"));
            }
        }
        events
    }
}

/// Status of an answer, and whether its body comes in chunks.
fn head(bytes: &[u8]) -> Result<(u16, bool), String> {
    let head = String::from_utf8_lossy(bytes).to_ascii_lowercase();
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
    let chunked = |line: &str| line.starts_with("transfer-encoding:") && line.contains("chunked");
    Ok((status.ok_or("the answer is not HTTP")?, head.lines().any(chunked)))
}

/// Where `part` begins in `bytes`.
fn find(bytes: &[u8], part: &[u8]) -> Option<usize> {
    bytes.windows(part.len()).position(|window| window == part)
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;
    use tokio::runtime::Builder;

    use super::*;

    /// What a client makes of these pieces of an answer.
    fn outcome(pieces: &[&str]) -> Outcome {
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap().to_string();
            let server = async {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut request = vec![0; 1 << 16];
                assert!(stream.read(&mut request).await.unwrap() > 0);
                for piece in pieces {
                    stream.write_all(piece.as_bytes()).await.unwrap();
                    tokio::task::yield_now().await;
                }
            };
            let target = Target {
                address,
                path: "/v1/completions".to_owned(),
                backend: Backend::Openai,
                model: "m".to_owned(),
                api_key: None,
                tokenizer: None,
                timeout: Duration::from_secs(20),
                extra: Vec::new(),
            };
            let prompt = Prompt { content: Content::Tokens(vec![1, 2, 3]), output: 2 };
            tokio::join!(target.stream(&prompt, Instant::now()), server).0
        })
    }

    #[test]
    fn chunks_may_be_cut_anywhere() {
        let body = "data: {\"choices\": [{\"text\": \"a\"}]}\n\ndata: {\"choices\": [{\"text\": \"b\"}]}\n\n\
                    data: {\"choices\": [], \"usage\": {\"prompt_tokens\": 5, \"completion_tokens\": 7}}\n\n\
                    data: [DONE]\n\n";
        let (first, second) = body.split_at(50);
        let chunk = |text: &str| format!("{:x}\r\n{text}\r\n", text.len());
        let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
        let answer = format!("{head}{}{}0\r\n\r\n", chunk(first), chunk(second));
        let pieces: Vec<&str> =
            (0..answer.len()).step_by(7).map(|at| &answer[at..answer.len().min(at + 7)]).collect();
        let outcome = outcome(&pieces);
        assert_eq!(outcome.error, None);
        assert_eq!((outcome.text.as_str(), outcome.itl_s.len()), ("ab", 1));
        assert_eq!((outcome.input_tokens, outcome.output_tokens), (5, 7));
        assert!(outcome.latency_s >= outcome.ttft_s && outcome.ttft_s > 0.0);
    }

    #[test]
    fn failures_are_told_and_not_fatal() {
        let error = |pieces: &[&str]| outcome(pieces).error.unwrap();
        let refused = error(&["HTTP/1.1 429 Too Many\r\n\r\n{\"error\": \"full\"}"]);
        assert_eq!(refused, "status 429: {\"error\": \"full\"}");
        let head = "HTTP/1.1 200 OK\r\n\r\n";
        assert_eq!(error(&[head, "data: {\"error\": {\"message\": \"oh\"}}\n\n"]), "oh");
        assert_eq!(error(&[head, "data: {\"choices\": []}\n\n"]), "the stream broke off");
        assert_eq!(error(&[head, "data: [DONE]\n\n"]), "the stream had no output");
        assert_eq!(error(&["garbage\r\n\r\n"]), "the answer is not HTTP");
        assert_eq!(error(&[]), "the connection was closed before an answer");
        let chunked = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n";
        assert_eq!(error(&[chunked, "zz\r\n"]), "a chunk has the size \"zz\"");
    }
}
