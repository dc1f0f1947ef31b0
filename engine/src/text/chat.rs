//! Chat templates: messages to the text a model was trained on, with Hugging Face semantics.
//!
//! Source: `transformers`' `render_jinja_template` (jinja2 with `trim_blocks`, `lstrip_blocks`,
//! loop controls, an overridden `tojson`, `raise_exception`, `strftime_now`, `{% generation %}`),
//! here on minijinja with the methods of Python's strings, lists and dicts that `methods.rs` names. A template is untrusted: it
//! can read neither files nor the environment, the number of its operations, its recursion and its
//! output are limited, and it is compiled and runs on a thread of its own whose stack holds the
//! deepest expression its length allows and the deepest value those operations can nest. Not limited are
//! the time it takes to compile (a chain of 50,000 `x or` takes a minute) and the size of one string inside it (doubled 40 times
//! by 40 operations): render templates of unknown origin where memory is limited from outside. Left
//! out: masks of assistant tokens, and `~` and `join` print booleans and none in lower case.

use std::collections::BTreeMap;
use std::error::Error as _;
use std::io;
use std::time::SystemTime;

use minijinja::{Environment, ErrorKind, UndefinedBehavior, Value};
use serde_json::Map;

use super::{Tokenizer, TokenizerConfig, methods, one_line, python};
use crate::error::{Error, Result};

/// Longest template, in bytes; those of real models have up to 50,000. Each byte can nest an expression
/// one level deeper, and parsing and compiling it recurse.
pub const MAX_TEMPLATE_BYTES: usize = 256 << 10;
/// Longest rendered chat, in bytes.
pub const MAX_RENDERED_BYTES: usize = 64 << 20;
/// Operations one rendering may take.
const FUEL: u64 = 1_000_000;
/// Macros and blocks that may be open at once.
const MAX_RECURSION: usize = 100;
/// Stack of the compiling or rendering thread, in bytes; memory only where it is touched. Each operation
/// can nest a value one level deeper, and dropping, comparing or printing it recurses. A level of the
/// costliest expression, `-`, takes 440 bytes to compile (release).
const STACK_BYTES: usize = 512 << 20;
/// Names a template is given in any case.
const RESERVED: [&str; 4] = ["messages", "tools", "add_generation_prompt", "strftime_now"];

/// One message of a chat: a JSON object as the OpenAI API has it.
#[derive(Clone, Debug, PartialEq)]
pub struct Message {
    fields: Map<String, serde_json::Value>,
}

impl Message {
    /// A message of plain text.
    pub fn new(role: &str, content: &str) -> Self {
        let mut fields = Map::new();
        fields.insert("role".into(), role.into());
        fields.insert("content".into(), content.into());
        Self { fields }
    }

    /// A message with whatever fields its template reads (`tool_calls`, `name`, ...).
    ///
    /// # Errors
    /// When it is not an object with a `role`, or its `content` is neither text, nor null, nor a
    /// list of parts with a `type`.
    pub fn from_json(value: serde_json::Value) -> Result<Self> {
        let serde_json::Value::Object(fields) = value else {
            return Err(Error::request("message is not an object"));
        };
        if !fields.get("role").is_some_and(serde_json::Value::is_string) {
            return Err(Error::request("message has no role"));
        }
        let valid = match fields.get("content") {
            None | Some(serde_json::Value::Null | serde_json::Value::String(_)) => true,
            Some(serde_json::Value::Array(parts)) => {
                parts.iter().all(|part| part.get("type").is_some_and(serde_json::Value::is_string))
            }
            Some(_) => false,
        };
        if !valid {
            return Err(Error::request("message content is neither text nor a list of parts"));
        }
        Ok(Self { fields })
    }

    /// The fields as given.
    pub fn fields(&self) -> &Map<String, serde_json::Value> {
        &self.fields
    }
}

/// Whether the text ends where the assistant begins to speak.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GenerationPrompt {
    /// It ends with the beginning of an assistant's turn.
    #[default]
    Add,
    /// It ends with the last message.
    Omit,
}

/// What a template is given besides the messages.
#[derive(Clone, Debug)]
pub struct RenderOptions<'a> {
    /// Whether to begin the assistant's turn.
    pub generation_prompt: GenerationPrompt,
    /// Tools as JSON schemas, a list.
    pub tools: Option<&'a serde_json::Value>,
    /// Further variables, e.g. `enable_thinking`; they override the names of special tokens.
    pub extra: Map<String, serde_json::Value>,
    /// The time `strftime_now` tells, in UTC.
    pub now: SystemTime,
}

impl RenderOptions<'_> {
    /// Begins the assistant's turn, without tools or further variables.
    pub fn new(now: SystemTime) -> Self {
        Self { generation_prompt: GenerationPrompt::Add, tools: None, extra: Map::new(), now }
    }
}

/// A compiled chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    env: Environment<'static>,
    special_tokens: Map<String, serde_json::Value>,
}

impl ChatTemplate {
    /// Compiles a template. `special_tokens` are variables it may use, e.g. `bos_token`.
    ///
    /// ```
    /// use engine::text::{ChatTemplate, Message, RenderOptions};
    /// let source = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}";
    /// let template = ChatTemplate::new(source, Default::default())?;
    /// let options = RenderOptions::new(std::time::SystemTime::UNIX_EPOCH);
    /// let text = template.render(&[Message::new("user", "hi")], &options)?;
    /// assert_eq!(text, "[user] hi\n");
    /// # Ok::<(), engine::Error>(())
    /// ```
    ///
    /// # Errors
    /// When the template is too long or not a template.
    pub fn new(source: &str, special_tokens: Map<String, serde_json::Value>) -> Result<Self> {
        let mut this = Self { env: environment(), special_tokens };
        this.add("default", source)?;
        Ok(this)
    }

    /// Compiles the templates of a `tokenizer_config.json`.
    ///
    /// # Errors
    /// When there is none, or as [`new`](Self::new).
    pub fn from_config(config: &TokenizerConfig) -> Result<Self> {
        let Some(source) = config.chat_template("default") else {
            return Err(Error::request("model has no chat template"));
        };
        let mut this = Self::new(source, config.special_tokens())?;
        if let Some(source) = config.chat_template("tool_use") {
            this.add("tool_use", source)?;
        }
        Ok(this)
    }

    /// Whether a template has a variable of that name in any case: one of its own, or a special token.
    pub fn is_given(&self, name: &str) -> bool {
        RESERVED.contains(&name) || name == "documents" || self.special_tokens.contains_key(name)
    }

    /// Whether `word` is somewhere in the template's source.
    pub fn mentions(&self, word: &str) -> bool {
        self.env.templates().any(|(_, template)| template.source().contains(word))
    }

    fn add(&mut self, name: &'static str, source: &str) -> Result<()> {
        if source.len() > MAX_TEMPLATE_BYTES {
            let bytes = source.len();
            return Err(Error::model(format!(
                "chat template has {bytes} bytes, limit is {MAX_TEMPLATE_BYTES}"
            )));
        }
        let source = replace_generation_tags(source);
        let env = &mut self.env;
        on_deep_stack(Error::model, move || {
            env.add_template_owned(name, source).map_err(|error| Error::model(describe(&error)))
        })
    }

    /// Tokens of a chat. Text of messages and tools that spells a control token stays text.
    ///
    /// # Errors
    /// As [`render`](Self::render), [`Controls::mark`](super::Controls::mark) and [`Tokenizer::encode`].
    pub fn encode(
        &self,
        messages: &[Message],
        options: &RenderOptions<'_>,
        tokenizer: &Tokenizer,
    ) -> Result<Vec<u32>> {
        let spoken = tokenizer.controls().mark(messages, options.tools)?;
        let options = RenderOptions { tools: spoken.tools.as_ref(), ..options.clone() };
        spoken.encode(&self.render(&spoken.messages, &options)?, tokenizer)
    }

    /// Text of a chat. A control token that a message spells is one there, see [`encode`](Self::encode).
    ///
    /// # Errors
    /// When the template refuses the messages (its own words), fails, or exceeds a limit.
    pub fn render(&self, messages: &[Message], options: &RenderOptions<'_>) -> Result<String> {
        let context = self.context(messages, options)?;
        on_deep_stack(Error::request, || self.render_here(context, options.tools.is_some()))
    }

    fn render_here(&self, context: BTreeMap<String, Value>, with_tools: bool) -> Result<String> {
        let tool_use = with_tools.then(|| self.env.get_template("tool_use").ok()).flatten();
        let template = match tool_use {
            Some(template) => template,
            None => self.env.get_template("default").map_err(|e| Error::model(describe(&e)))?,
        };
        let mut output = Limited { bytes: Vec::new(), limit: MAX_RENDERED_BYTES };
        template
            .render_captured_to(Value::from(context), &mut output)
            .map_err(|error| Error::request(describe(&error)))?;
        String::from_utf8(output.bytes)
            .map_err(|_| Error::request("chat template: output is not UTF-8"))
    }

    fn context(
        &self,
        messages: &[Message],
        options: &RenderOptions<'_>,
    ) -> Result<BTreeMap<String, Value>> {
        let mut context = BTreeMap::new();
        context.insert("documents".to_owned(), Value::from(()));
        for (name, value) in self.special_tokens.iter().chain(&options.extra) {
            if RESERVED.contains(&name.as_str()) {
                return Err(Error::request(format!("chat template variable {name} is reserved")));
            }
            context.insert(name.clone(), Value::from_serialize(value));
        }
        let messages = messages.iter().map(|message| Value::from_serialize(&message.fields));
        context.insert("messages".to_owned(), Value::from(messages.collect::<Vec<_>>()));
        context.insert("tools".to_owned(), Value::from_serialize(options.tools));
        let add = options.generation_prompt == GenerationPrompt::Add;
        context.insert("add_generation_prompt".to_owned(), Value::from(add));
        let now = options.now;
        let strftime_now = move |format: &str| python::strftime(format, now);
        context.insert("strftime_now".to_owned(), Value::from_function(strftime_now));
        Ok(context)
    }
}

/// Does the work on a thread of [`STACK_BYTES`].
fn on_deep_stack<T: Send>(
    failed: fn(String) -> Error,
    work: impl FnOnce() -> Result<T> + Send,
) -> Result<T> {
    std::thread::scope(|scope| {
        std::thread::Builder::new()
            .name("chat-template".into())
            .stack_size(STACK_BYTES)
            .spawn_scoped(scope, work)
            .map_err(|error| failed(format!("chat template gets no thread: {error}")))?
            .join()
            .unwrap_or_else(|_| Err(failed("chat template broke its interpreter".into())))
    })
}

/// Words of a template's own `raise_exception`.
#[derive(Debug)]
struct Raised(String);

impl std::fmt::Display for Raised {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

fn raise_exception(message: String) -> std::result::Result<Value, minijinja::Error> {
    let error = minijinja::Error::new(ErrorKind::InvalidOperation, message.clone());
    Err(error.with_source(Raised(message)))
}

fn environment() -> Environment<'static> {
    let mut env = Environment::new();
    env.set_trim_blocks(true);
    env.set_lstrip_blocks(true);
    env.set_undefined_behavior(UndefinedBehavior::Lenient);
    env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    env.set_fuel(Some(FUEL));
    env.set_recursion_limit(MAX_RECURSION);
    env.set_debug(false);
    env.set_unknown_method_callback(methods::call);
    env.set_formatter(|out, _, value| {
        out.write_str(&python::to_str(value)?).map_err(minijinja::Error::from)
    });
    env.add_filter("tojson", python::tojson);
    env.add_filter("string", |value: &Value| python::to_str(value));
    env.add_test("iterable", python::is_iterable);
    env.add_test("sequence", python::is_sequence);
    env.add_test("number", python::is_number);
    env.add_function("raise_exception", raise_exception);
    env
}

/// One line saying what is wrong; the template's own words when it raised them itself.
fn describe(error: &minijinja::Error) -> String {
    let mut source = error.source();
    while let Some(cause) = source {
        if let Some(Raised(message)) = cause.downcast_ref() {
            return one_line(format!("chat template: {message}"));
        }
        source = cause.source();
    }
    let line = error.line().map_or_else(String::new, |line| format!(" line {line}"));
    let what = match (error.kind(), error.detail()) {
        (ErrorKind::OutOfFuel, _) => format!("takes more than {FUEL} operations"),
        (ErrorKind::WriteFailure, _) => format!("writes more than {MAX_RENDERED_BYTES} bytes"),
        (kind, Some(detail)) => format!("{kind}: {detail}"),
        (kind, None) => kind.to_string(),
    };
    one_line(format!("chat template{line}: {what}"))
}

/// A buffer that refuses to grow past a limit.
struct Limited {
    bytes: Vec<u8>,
    limit: usize,
}

impl io::Write for Limited {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > self.limit {
            return Err(io::Error::other("output limit"));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Turns `{% generation %}`..`{% endgeneration %}`, which only mark the assistant's tokens, into
/// `{% with %}`..`{% endwith %}`: the same scope and the same handling of white space.
fn replace_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    let mut raw = false;
    while let Some(start) = tag_start(rest, raw) {
        let (before, tag) = rest.split_at(start);
        out.push_str(before);
        let close = if tag.starts_with("{#") { "#}" } else { "%}" };
        let end = tag.find(close).map_or(tag.len(), |end| end + 2);
        let (tag, after) = tag.split_at(end);
        let word = tag.trim_matches(['{', '}', '%', '-', '+']).trim();
        let with = match word {
            _ if close == "#}" => None,
            "endraw" => {
                raw = false;
                None
            }
            "raw" => {
                raw = true;
                None
            }
            "generation" if !raw => Some("with"),
            "endgeneration" if !raw => Some("endwith"),
            _ => None,
        };
        match with {
            Some(with) => out.push_str(&tag.replace(word, with)),
            None => out.push_str(tag),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

/// Where the next tag or comment begins; inside `raw` there are no comments.
fn tag_start(text: &str, raw: bool) -> Option<usize> {
    let pairs = text.as_bytes().windows(2);
    pairs.into_iter().position(|pair| pair == b"{%" || (pair == b"{#" && !raw))
}
