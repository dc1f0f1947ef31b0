//! Grammars that an answer must follow: compiled once, then a mask of tokens before every draw.
//!
//! A [`GrammarCompiler`] holds the vocabulary as a trie, once for a model. [`GrammarCompiler::compile`]
//! turns a [`Grammar`] into a [`Constraint`] that a [`crate::Request`] carries; each of its samples
//! starts from it with a state of its own. Automata and masks are llguidance's. Grammars are
//! untrusted: they are compiled on a thread of their own under limits of time, size and work, and what
//! the limits of a step stop fails its own sample only. A step waits for all masks of its batch, so the masks
//! of one constraint share an account of time: what spends more than masks of schemas and expressions ever
//! do is cut off, whatever it has left of other limits. The library underneath installs a panic hook
//! that hands every panic but its own to the hook before it. Leaves out forced tokens: the model
//! chooses how text that is certain is cut into tokens.

mod multiples;

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, SimpleVob, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use parking_lot::{Condvar, Mutex};
use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::grammar::multiples::{check_multiples, schemas_of};
use crate::text::Tokenizer;

/// Longest grammar, in bytes of its text.
const MAX_GRAMMAR_BYTES: usize = 256 << 10;
/// Brackets a grammar may have open at once.
const MAX_DEPTH: usize = 128;
/// How long a compilation, and the wait for it to begin, may take.
const COMPILE_LIMIT: Duration = Duration::from_secs(2);
/// Compilations at once; one that is out of time counts until it ends.
const MAX_COMPILING: usize = 2;
/// Stack of a compiling thread, in bytes; memory only where it is touched.
const STACK_BYTES: usize = 256 << 20;
/// States of a grammar's automaton; 1 to 2 kB each.
const MAX_LEXER_STATES: usize = 25_000;
/// Time that the masks of a constraint may take: this, and this for each of them. Those of an object of 200
/// fields take 7 us on average and 0.7 ms at most, those of an ambiguous grammar 250 ms (2 cores, 49,152 words).
const MASKS: Allowance =
    Allowance { first: Duration::from_secs(1), each: Duration::from_millis(10) };
/// The same for masks behind guesses: a grammar that takes longer is not guessed.
const GUESSED_MASKS: Allowance =
    Allowance { first: Duration::from_millis(50), each: Duration::from_micros(500) };
/// White space that JSON may have between its parts: a blank, or a line break and an indentation.
const JSON_SPACE: &str = r"\x20|\r?\n[\x20\t]{0,64}";
/// Longest part of another library's message that is shown, in characters.
const MAX_MESSAGE_CHARS: usize = 200;

/// What an answer must spell.
#[derive(Clone, Debug, PartialEq)]
pub enum Grammar {
    /// A JSON value that a schema describes. References must be local.
    JsonSchema {
        /// The schema: an object or a boolean.
        schema: Value,
        /// Whether a keyword that is not enforced is an error.
        unknown: UnknownKeywords,
    },
    /// The whole answer matches a regular expression of Rust's `regex` crate.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// A grammar in llguidance's dialect of Lark.
    Lark(String),
}

/// What becomes of keywords of a JSON schema that cannot be enforced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnknownKeywords {
    /// They are an error.
    Refuse,
    /// They are left out.
    Ignore,
}

impl Grammar {
    /// Any JSON object.
    pub fn json_object() -> Self {
        let schema = json!({"type": "object"});
        Self::JsonSchema { schema, unknown: UnknownKeywords::Refuse }
    }

    fn lower(&self) -> Result<TopLevelGrammar> {
        let text = match self {
            Self::JsonSchema { schema, .. } => schema.to_string(),
            Self::Regex(text) | Self::Lark(text) => text.clone(),
            Self::Choice(choices) => choices.concat(),
        };
        if text.len() > MAX_GRAMMAR_BYTES {
            let bytes = text.len();
            return Err(Error::request(format!(
                "grammar has {bytes} bytes, limit is {MAX_GRAMMAR_BYTES}"
            )));
        }
        if matches!(self, Self::Lark(_)) && depth(&text) > MAX_DEPTH {
            return Err(Error::request(format!(
                "grammar has more than {MAX_DEPTH} brackets open at once"
            )));
        }
        if let Self::Lark(text) = self {
            check_multiples(&schemas_of(text))?;
        }
        Ok(match self {
            Self::JsonSchema { schema, unknown } => {
                TopLevelGrammar::from_json_schema(json_schema(schema.clone(), *unknown)?)
            }
            Self::Regex(text) => TopLevelGrammar::from_regex(text),
            Self::Choice(choices) if choices.is_empty() => {
                return Err(Error::request("grammar has no choices, limit is at least 1"));
            }
            Self::Choice(choices) => TopLevelGrammar::from_regex(&alternatives(choices)),
            Self::Lark(text) => TopLevelGrammar::from_lark(text.clone()),
        })
    }
}

/// The schema with the settings that the compiler reads from it, as a `%json` of a Lark grammar needs
/// it too. Settings that came with it are dropped.
///
/// # Errors
/// `ErrorKind::Request` when it is neither an object nor a boolean, or asks for numbers to be multiples of
/// more than can be followed.
pub fn json_schema(mut schema: Value, unknown: UnknownKeywords) -> Result<Value> {
    check_multiples(std::slice::from_ref(&schema))?;
    match &mut schema {
        Value::Object(fields) => {
            let lenient = unknown == UnknownKeywords::Ignore;
            let settings = json!({"whitespace_pattern": JSON_SPACE, "lenient": lenient});
            fields.insert("x-guidance".to_owned(), settings);
            Ok(schema)
        }
        Value::Bool(_) => Ok(schema),
        _ => Err(Error::request("grammar's schema is neither an object nor a boolean")),
    }
}

/// A regular expression for one of `choices`, taken literally.
fn alternatives(choices: &[String]) -> String {
    let escaped = choices.iter().map(|choice| {
        let escape = |c: char| match c {
            'a'..='z' | 'A'..='Z' | '0'..='9' => c.to_string(),
            other => format!(r"\x{{{:x}}}", u32::from(other)),
        };
        choice.chars().map(escape).collect::<String>()
    });
    escaped.collect::<Vec<_>>().join("|")
}

/// Most brackets that are open at once, quoted ones included.
fn depth(text: &str) -> usize {
    let (mut open, mut most) = (0_usize, 0);
    for byte in text.bytes() {
        match byte {
            b'(' | b'[' | b'{' => open += 1,
            b')' | b']' | b'}' => open = open.saturating_sub(1),
            _ => {}
        }
        most = most.max(open);
    }
    most
}

/// Compiles grammars for one vocabulary.
pub struct GrammarCompiler {
    factory: Arc<ParserFactory>,
    compiling: Arc<(Mutex<usize>, Condvar)>,
}

impl GrammarCompiler {
    /// Builds the trie of a model's vocabulary of `vocab_size` rows, in which `eos` end a text.
    ///
    /// # Errors
    /// `ErrorKind::Unsupported` when no token ends a text, or the vocabulary is beyond what the trie
    /// can hold.
    pub fn new(tokenizer: &Tokenizer, vocab_size: usize, eos: &[u32]) -> Result<Self> {
        let ends: Vec<u32> = eos.iter().copied().filter(|t| (*t as usize) < vocab_size).collect();
        let (Some(first), Ok(rows)) = (ends.first(), u32::try_from(vocab_size)) else {
            return Err(Error::unsupported("a grammar needs a token that ends a text"));
        };
        let words: Vec<Vec<u8>> = (0..rows)
            .map(|id| match tokenizer.is_special(id) || ends.contains(&id) {
                // Cannot be spelled: the marker is no byte of UTF-8.
                true => format!("[{id}]").bytes().fold(vec![TokTrie::SPECIAL_TOKEN_MARKER], push),
                false => tokenizer.token_bytes(id).to_vec(),
            })
            .collect();
        let build = || {
            let trie = TokTrie::from(&TokRxInfo::new(rows, *first), &words).with_eos_tokens(&ends);
            let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
            ParserFactory::new_simple(&env).map_err(|error| error.to_string())
        };
        let built = std::panic::catch_unwind(std::panic::AssertUnwindSafe(build));
        let mut factory = match built {
            Ok(Ok(factory)) => factory,
            _ => return Err(Error::unsupported("the vocabulary is beyond what grammars can hold")),
        };
        factory.quiet();
        let limits = factory.limits_mut();
        limits.verbose_errors = false;
        limits.max_lexer_states = MAX_LEXER_STATES;
        Ok(Self { factory: Arc::new(factory), compiling: Arc::default() })
    }

    /// Compiles `grammar`, waiting for it at most twice 2 s. Takes processor time: not for an async
    /// thread.
    ///
    /// # Errors
    /// `ErrorKind::Request` when it is no grammar, is beyond a limit, or nothing can follow it;
    /// `ErrorKind::Busy` when others are being compiled for as long.
    pub fn compile(&self, grammar: &Grammar) -> Result<Constraint> {
        let lowered = grammar.lower()?;
        let turn = self.turn()?;
        let (send, receive) = channel();
        let factory = Arc::clone(&self.factory);
        std::thread::Builder::new()
            .name("grammar".into())
            .stack_size(STACK_BYTES)
            .spawn(move || {
                let mut matcher = Matcher::new(factory.create_parser(lowered));
                // The first mask fills caches that samples share, and finds what nothing can follow.
                let checked = matcher.compute_mask().map(drop).map_err(|e| shown(&e.to_string()));
                drop(turn);
                // Nobody listens any more when the time is over.
                let _late = send.send(checked.map(|()| matcher));
            })
            .map_err(|error| Error::busy(format!("no thread to compile a grammar: {error}")))?;
        match receive.recv_timeout(COMPILE_LIMIT) {
            Ok(Ok(matcher)) => Ok(Constraint {
                ahead: Arc::new(Walker::new(matcher.deep_clone(), GUESSED_MASKS)),
                start: Arc::new(Walker::new(matcher, MASKS)),
            }),
            Ok(Err(why)) => Err(Error::request(format!("grammar cannot be used: {why}"))),
            Err(RecvTimeoutError::Timeout) => {
                let limit = COMPILE_LIMIT.as_secs();
                Err(Error::request(format!("grammar takes longer to compile than {limit} s")))
            }
            Err(RecvTimeoutError::Disconnected) => {
                Err(Error::request("grammar broke its compiler"))
            }
        }
    }

    /// Waits until fewer than [`MAX_COMPILING`] grammars are being compiled.
    fn turn(&self) -> Result<Turn> {
        let (count, ended) = &*self.compiling;
        let end = Instant::now() + COMPILE_LIMIT;
        let mut count = count.lock();
        while *count >= MAX_COMPILING {
            if ended.wait_until(&mut count, end).timed_out() && *count >= MAX_COMPILING {
                return Err(Error::busy("other grammars are being compiled"));
            }
        }
        *count += 1;
        Ok(Turn { compiling: Arc::clone(&self.compiling) })
    }
}

impl fmt::Debug for GrammarCompiler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GrammarCompiler").finish_non_exhaustive()
    }
}

fn push(mut bytes: Vec<u8>, byte: u8) -> Vec<u8> {
    bytes.push(byte);
    bytes
}

/// A place among those that compile, given back when dropped.
#[must_use]
struct Turn {
    compiling: Arc<(Mutex<usize>, Condvar)>,
}

impl Drop for Turn {
    fn drop(&mut self) {
        let (count, ended) = &*self.compiling;
        *count.lock() -= 1;
        ended.notify_one();
    }
}

/// Another library's message in one line; nothing of its inside.
fn shown(message: &str) -> String {
    if message.starts_with("panic") {
        return "it broke its compiler".to_owned();
    }
    if message.starts_with("NoExtension") {
        return "nothing matches it".to_owned();
    }
    let outside = message.split("<non-verbose/>").next().unwrap_or_default();
    let line = outside.split_whitespace().collect::<Vec<_>>().join(" ");
    line.chars().take(MAX_MESSAGE_CHARS).collect()
}

/// A compiled grammar; clones share it.
#[derive(Clone)]
pub struct Constraint {
    start: Arc<Walker>,
    /// The same once more, for guesses: what they spend or break of an automaton's limits is not the samples'.
    ahead: Arc<Walker>,
}

impl Constraint {
    /// The state of a sample that has no tokens yet.
    pub(crate) fn start(&self) -> GrammarState {
        let (here, ahead) = (Walker::clone(&self.start), Walker::clone(&self.ahead));
        GrammarState { here, next: None, ahead, behind: Vec::new() }
    }
}

impl fmt::Debug for Constraint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Constraint").finish_non_exhaustive()
    }
}

impl PartialEq for Constraint {
    /// Whether both came from one compilation.
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.start, &other.start)
    }
}

/// A place in a grammar. Clones share its automaton and its account of time.
#[derive(Clone)]
struct Walker {
    matcher: Matcher,
    account: Arc<Account>,
}

impl Walker {
    fn new(matcher: Matcher, allowance: Allowance) -> Self {
        Self { matcher, account: Arc::new(Account::new(allowance)) }
    }

    /// The tokens that may come next, if there is time left to find them.
    fn mask(&mut self) -> std::result::Result<SimpleVob, String> {
        self.account.check()?;
        let begun = Instant::now();
        let mask = self.matcher.compute_mask();
        self.account.book(begun.elapsed());
        mask.map_err(|error| shown(&error.to_string()))
    }
}

/// Where a sample stands in its grammar.
pub(crate) struct GrammarState {
    here: Walker,
    /// The tokens that may come next, once they are known; or why there are none.
    next: Option<std::result::Result<SimpleVob, String>>,
    /// The same place for guesses; it has failed once a step of it has.
    ahead: Walker,
    /// The tokens that may come behind each of the guesses that are run.
    behind: Vec<SimpleVob>,
}

/// How much time the masks of a constraint may take: this, and this for each of them.
#[derive(Clone, Copy, Debug)]
struct Allowance {
    first: Duration,
    each: Duration,
}

/// What the masks of a constraint have taken, those of all its samples together.
#[derive(Debug)]
struct Account {
    allowance: Allowance,
    micros: AtomicU64,
    masks: AtomicU64,
}

impl Account {
    fn new(allowance: Allowance) -> Self {
        Self { allowance, micros: AtomicU64::new(0), masks: AtomicU64::new(0) }
    }

    fn book(&self, time: Duration) {
        let micros = u64::try_from(time.as_micros()).unwrap_or(u64::MAX);
        self.micros.fetch_add(micros, Ordering::Relaxed);
        self.masks.fetch_add(1, Ordering::Relaxed);
    }

    /// Fails when more is spent than there was.
    fn check(&self) -> std::result::Result<(), String> {
        let (micros, masks) =
            (self.micros.load(Ordering::Relaxed), self.masks.load(Ordering::Relaxed));
        let Allowance { first, each } = self.allowance;
        let spent = Duration::from_micros(micros);
        if spent <= first + Duration::from_micros(masks * each.as_micros() as u64) {
            return Ok(());
        }
        let (spent, first) = (spent.as_secs_f64(), first.as_secs());
        let each = each.as_millis();
        Err(format!("{masks} masks took {spent:.1} s, limit is {first} s and {each} ms each"))
    }
}

impl GrammarState {
    /// Finds the tokens that may come behind the first of `guesses`, as far as those may come themselves.
    /// Returns how many. A grammar that fails or takes long allows no guesses; its sample goes on.
    pub(crate) fn look_ahead(&mut self, guesses: &[u32]) -> usize {
        self.behind.clear();
        if guesses.is_empty() || self.ahead.account.check().is_err() {
            return 0;
        }
        // The sample needs this one anyway.
        self.prepare();
        let Some(Ok(next)) = &self.next else { return 0 };
        let mut walker = self.ahead.clone();
        for guess in guesses {
            let allowed = self.behind.last().unwrap_or(next);
            if !allowed.is_allowed(*guess) || walker.matcher.consume_token(*guess).is_err() {
                break;
            }
            let Ok(mask) = walker.mask() else { break };
            self.behind.push(mask);
        }
        self.behind.len()
    }

    /// Finds the tokens that may come next, if that is still to be done.
    pub(crate) fn prepare(&mut self) {
        if self.next.is_none() {
            self.next = Some(self.here.mask());
        }
    }

    /// The tokens that may come next behind so many guesses, a bit each.
    pub(crate) fn allowed(&self, guessed: usize) -> std::result::Result<&[u32], String> {
        let mask = match guessed {
            0 => self.next.as_ref().map(|mask| mask.as_ref().map_err(String::clone)),
            _ => self.behind.get(guessed - 1).map(Ok),
        };
        match mask {
            Some(Ok(mask)) => Ok(mask.as_slice()),
            Some(Err(why)) => Err(format!("the grammar allows no token here: {why}")),
            None => Err("the grammar was not asked".to_owned()),
        }
    }

    /// Takes in a drawn token. True when nothing can follow it.
    pub(crate) fn advance(&mut self, token: u32) -> Result<bool> {
        self.next = None;
        if self.ahead.account.check().is_ok() {
            // What fails here, or stays behind, allows no guesses any more.
            let _failed = self.ahead.matcher.consume_token(token);
        }
        self.here
            .matcher
            .consume_token(token)
            .map_err(|e| Error::request(format!("the grammar fails: {}", shown(&e.to_string()))))?;
        Ok(self.here.matcher.is_stopped())
    }
}

/// Sets the logits of all tokens that `mask` does not allow to negative infinity.
pub(crate) fn apply(mask: &[u32], logits: &mut [f32]) {
    for (i, logits) in logits.chunks_mut(32).enumerate() {
        match mask.get(i).copied().unwrap_or(0) {
            0 => logits.fill(f32::NEG_INFINITY),
            u32::MAX => {}
            word => {
                for (bit, logit) in logits.iter_mut().enumerate() {
                    *logit = if word >> bit & 1 == 1 { *logit } else { f32::NEG_INFINITY };
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use kernels::TokenMask;

    use super::*;

    #[test]
    fn a_mask_bans_what_it_does_not_name() {
        let mask = [0b101, 0, 1];
        let mut logits = vec![1.0; 70];
        apply(&mask, &mut logits);
        let left: Vec<u32> = (0..70).filter(|t| logits[*t as usize] == 1.0).collect();
        assert_eq!(left, [0, 2, 64]);
        assert!(
            (0..70).all(|token| TokenMask(&mask).allows(token) == left.contains(&(token as u32)))
        );
        assert!(!TokenMask(&mask).allows(200), "beyond the mask");
    }

    #[test]
    fn masks_share_an_account_that_usual_ones_never_exhaust() {
        let account = Account::new(MASKS);
        (0..1000).for_each(|_| account.book(Duration::from_millis(9)));
        assert_eq!(account.check(), Ok(()));
        let account = Account::new(MASKS);
        (0..5).for_each(|_| account.book(Duration::from_millis(250)));
        let error = account.check().unwrap_err();
        assert_eq!(error, "5 masks took 1.2 s, limit is 1 s and 10 ms each");
    }

    /// The state of a sample that is to spell `abc` over and over, and what its guesses may take.
    fn abc() -> (GrammarState, Arc<Account>) {
        let json = include_bytes!("../../tests/data/tiny-text/tokenizer.json");
        let tokenizer = Tokenizer::from_json_bytes(json).expect("a tokenizer");
        let compiler = GrammarCompiler::new(&tokenizer, 300, &[2]).expect("a compiler");
        let constraint = compiler.compile(&Grammar::Regex("(abc){5}".into())).expect("a regex");
        (constraint.start(), Arc::clone(&constraint.ahead.account))
    }

    /// Tokens of these bytes.
    fn bytes(text: &str) -> Vec<u32> {
        text.bytes().map(|byte| u32::from(byte) + 3).collect()
    }

    #[test]
    fn guesses_are_followed_as_far_as_a_grammar_allows() {
        let (mut state, _) = abc();
        state.prepare();
        let first = state.allowed(0).expect("a mask").to_vec();
        assert_eq!(state.look_ahead(&bytes("abcax")), 4);
        assert!(TokenMask(state.allowed(2).expect("a mask")).allows(bytes("c")[0] as usize));
        assert_eq!(state.allowed(3), Ok(&first[..]), "as at the beginning");
        assert!(state.allowed(5).is_err() && state.allowed(0) == Ok(&first[..]));
        assert_eq!(state.look_ahead(&bytes("b")), 0);
        // Nothing of that has moved the sample.
        for token in bytes("abcabcabcabcab") {
            assert!(!state.advance(token).expect("allowed"));
        }
        assert_eq!(state.look_ahead(&bytes("c")), 0, "what ends a text is not followed");
        assert!(state.advance(bytes("c")[0]).expect("allowed"));
    }

    #[test]
    fn a_grammar_that_takes_long_or_fails_is_not_guessed_and_goes_on() {
        let (mut state, account) = abc();
        account.book(Duration::from_secs(1));
        assert_eq!(state.look_ahead(&bytes("abc")), 0);
        let (mut broken, _) = abc();
        assert!(broken.ahead.matcher.consume_token(bytes("x")[0]).is_err());
        assert_eq!(broken.look_ahead(&bytes("abc")), 0);
        for mut state in [state, broken] {
            state.prepare();
            assert!(state.allowed(0).is_ok() && !state.advance(bytes("a")[0]).expect("allowed"));
        }
    }

    #[test]
    fn choices_are_literal_and_depth_counts_open_brackets() {
        let choices = ["a.b".to_owned(), "é/".to_owned()];
        assert_eq!(alternatives(&choices), r"a\x{2e}b|\x{e9}\x{2f}");
        assert_eq!((depth("(a(b)[c]"), depth("))(")), (2, 1));
    }

    #[test]
    fn a_schema_keeps_no_settings_of_its_own() {
        let schema = json!({"type": "object", "x-guidance": {"lenient": true}});
        let set = json_schema(schema, UnknownKeywords::Refuse).expect("an object");
        assert_eq!(set["x-guidance"]["lenient"], false);
        let error = json_schema(json!(5), UnknownKeywords::Refuse).expect_err("a number");
        assert_eq!(error.to_string(), "grammar's schema is neither an object nor a boolean");
    }

    #[test]
    fn messages_show_one_line_and_nothing_of_the_inside() {
        assert_eq!(shown("bad\n  thing\n<non-verbose/>"), "bad thing");
        assert_eq!(shown("panic: x\n<backtrace>"), "it broke its compiler");
    }
}
