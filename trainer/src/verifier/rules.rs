//! The built-in rules that are a few lines each.
//!
//! Scores are 1 and 0. Every rule reads a response once or a fixed number of times, and regular
//! expressions are linear in the text, so none needs a time limit.

use std::ops::RangeInclusive;
use std::sync::LazyLock;

use regex::{Regex, RegexBuilder};

use super::{Verdict, equivalent};
use crate::error::{Error, Result};

/// Characters at the end of a response that `gsm8k` reads, as in verl.
const GSM8K_WINDOW: usize = 300;
/// Bytes a compiled regular expression of the user's may take.
const MAX_REGEX_BYTES: usize = 1 << 20;
/// The tags of `format` where none are named: those of R1 (arXiv 2501.12948).
const DEFAULT_TAGS: [&str; 2] = ["think", "answer"];

static AFTER_HASHES: LazyLock<Regex> = LazyLock::new(|| compile(r"#### (-?[0-9.,]+)"));
static NUMBER: LazyLock<Regex> = LazyLock::new(|| compile(r"-?[0-9.,]+"));
/// What comes before an answer. Without groups and Unicode classes, which are slow on long text.
static MARKER: LazyLock<Regex> = LazyLock::new(|| compile(r"(?i-u)answer(?:\s+is\b|\s*:)[\s:*]*"));

/// How `gsm8k` finds the answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gsm8k {
    /// The number after the last `#### `.
    Strict,
    /// The last number.
    Flexible,
}

fn compile(pattern: &str) -> Regex {
    Regex::new(pattern).expect("the patterns of this file are valid")
}

fn verdict(correct: bool, predicted: &str) -> Verdict {
    Verdict { score: f64::from(u8::from(correct)), correct, predicted: predicted.to_owned() }
}

/// The first line of the response is the truth.
pub(super) fn exact(response: &str, truth: &str) -> Verdict {
    let predicted = response.trim().lines().next().unwrap_or("").trim();
    verdict(predicted == truth.trim(), predicted)
}

/// What the last `\boxed{...}` holds; the inner one of nested ones. `None` if the last is not closed.
pub(super) fn last_boxed(text: &str) -> Option<&str> {
    const BOXED: &str = "\\boxed";
    let inside = text[text.rfind(BOXED)? + BOXED.len()..].strip_prefix('{')?;
    let mut depth = 1usize;
    for (at, byte) in inside.bytes().enumerate() {
        match byte {
            b'{' => depth += 1,
            b'}' => depth -= 1,
            _ => continue,
        }
        if depth == 0 {
            return Some(&inside[..at]);
        }
    }
    None
}

/// The last box is the truth, whose own box is opened.
pub(super) fn prime_math(response: &str, truth: &str) -> Verdict {
    let Some(predicted) = last_boxed(response) else { return verdict(false, "") };
    verdict(equivalent(predicted, last_boxed(truth).unwrap_or(truth)), predicted)
}

/// The number after `####`, or the last number, is the truth, digit by digit.
pub(super) fn gsm8k(response: &str, truth: &str, reading: Gsm8k) -> Verdict {
    let start = response.char_indices().rev().take(GSM8K_WINDOW).last().map_or(0, |(at, _)| at);
    let window = &response[start..];
    let found = match reading {
        Gsm8k::Strict => {
            let last = AFTER_HASHES.captures_iter(window).last();
            last.and_then(|c| c.get(1)).map(|m| m.as_str().replace([',', '$'], ""))
        }
        Gsm8k::Flexible => {
            let numbers = NUMBER.find_iter(window).map(|m| m.as_str());
            numbers.filter(|n| *n != ".").last().map(str::to_owned)
        }
    };
    let predicted = found.unwrap_or_default();
    verdict(!predicted.is_empty() && predicted == truth, &predicted)
}

/// The answer, wherever it stands, is equivalent to the truth: in the last box, or after the last
/// `####`, or after the last `answer is` or `answer:`, or the last line.
pub(super) fn numeric(response: &str, truth: &str) -> Verdict {
    let hashes = || response.rfind("####").map(|at| first_line(&response[at + 4..]));
    let marked = || {
        let last = MARKER.find_iter(response).last()?;
        Some(first_line(&response[last.end()..])).filter(|text| !text.trim().is_empty())
    };
    let line = || response.trim_end().rsplit('\n').next().unwrap_or("");
    let found = last_boxed(response).or_else(hashes).or_else(marked).unwrap_or_else(line);
    let predicted = found.trim().trim_matches('*');
    verdict(equivalent(predicted, last_boxed(truth).unwrap_or(truth)), predicted)
}

fn first_line(text: &str) -> &str {
    text.split('\n').next().unwrap_or("")
}

/// A regular expression of the user's.
///
/// # Errors
/// If it is not one, or too large.
pub(super) fn pattern(text: &str) -> Result<Regex> {
    RegexBuilder::new(text).size_limit(MAX_REGEX_BYTES).build().map_err(|error| {
        let error = error.to_string();
        let last = error.lines().last().unwrap_or("invalid").trim();
        Error::config(format!(
            "regular expression {text:?}: {}",
            last.trim_start_matches("error: ")
        ))
    })
}

/// The response matches; what is read is the first group, or the whole match.
pub(super) fn regex(response: &str, pattern: &Regex) -> Verdict {
    let found = pattern.captures(response);
    let read = found.as_ref().and_then(|c| c.get(1).or(c.get(0))).map_or("", |m| m.as_str());
    verdict(found.is_some(), read)
}

/// Tags, each of which has to be opened and closed once, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tags(Vec<String>);

impl Tags {
    /// Reads names separated by commas; none at all are `think,answer`.
    ///
    /// # Errors
    /// If a name is not one of letters, digits, `_` and `-`.
    pub(super) fn parse(names: &str) -> Result<Self> {
        let names: Vec<String> = match names {
            "" => DEFAULT_TAGS.map(str::to_owned).into(),
            names => names.split(',').map(|name| name.trim().to_owned()).collect(),
        };
        let fine = |c: char| c.is_alphanumeric() || c == '_' || c == '-';
        match names.iter().find(|name| name.is_empty() || !name.chars().all(fine)) {
            Some(bad) => Err(Error::config(format!("reward function format: {bad:?} is no tag"))),
            None => Ok(Self(names)),
        }
    }
}

/// The response has the tags; what is read is what the last one holds.
pub(super) fn format(response: &str, tags: &Tags) -> Verdict {
    let (mut rest, mut last) = (response, "");
    for name in &tags.0 {
        let (open, close) = (format!("<{name}>"), format!("</{name}>"));
        let once = |tag: &str| response.matches(tag).take(2).count() == 1;
        let inside = rest.find(&open).map(|at| &rest[at + open.len()..]);
        let end = inside.and_then(|inside| Some((inside, inside.find(&close)?)));
        match end {
            Some((inside, end)) if once(&open) && once(&close) => {
                last = &inside[..end];
                rest = &inside[end + close.len()..];
            }
            _ => return verdict(false, ""),
        }
    }
    verdict(true, last.trim())
}

/// Reads `MAX` or `MIN-MAX`, in characters.
///
/// # Errors
/// If it is neither.
pub(super) fn lengths(text: &str) -> Result<RangeInclusive<usize>> {
    let number = |text: &str| text.trim().parse::<usize>().ok();
    let range = match text.split_once('-') {
        Some((least, most)) => number(least).zip(number(most)),
        None => number(text).map(|most| (0, most)),
    };
    let range = range.filter(|(least, most)| least <= most);
    let wrong = || Error::config(format!("length {text:?} is not MAX or MIN-MAX in characters"));
    range.map(|(least, most)| least..=most).ok_or_else(wrong)
}

/// The response has as many characters as it should.
pub(super) fn length(response: &str, range: &RangeInclusive<usize>) -> Verdict {
    let count = response.chars().count();
    verdict(range.contains(&count), &count.to_string())
}
