//! Judges responses: a rule per data source, as verl dispatches them.
//!
//! Built in are the names of [`Verifier::named`], each linear in the response; rewards from a command, over
//! HTTP or from a caller's own function are in [`Judge`]. Leaves out judging by models and running code.

mod countdown;
mod external;
mod judge;
mod math;
mod math_dapo;
mod own;
mod rules;

use std::ops::RangeInclusive;

use regex::Regex;

use crate::error::{Error, Result};

pub use judge::{Counts, Judge, RewardRule, Session};
pub use math::equivalent;
pub use math_dapo::{StrictBox, normalize_final_answer, strict_box};
pub use own::{Answered, OwnReward};
pub use rules::{Gsm8k, Tags};

/// The rules that can be named in `reward.function`.
const AVAILABLE: &str = "auto, countdown, exact, format[:TAG,TAG], gsm8k, gsm8k:flexible, length[:MIN-MAX], \
                         math_dapo, math_verify, numeric, prime_math, regex[:PATTERN], \
                         command:PROGRAM, http://..., https://...";

/// The data sources that have a rule, for messages.
const SOURCES: &str = "math_dapo, math, math_dapo_reasoning, aime*, openai/gsm8k, lighteval/MATH, \
                       DigitalLearningGmbH/MATH-lighteval, HuggingFaceH4/MATH-500, numina_*, or the \
                       name of a rule: exact, arith, format, gsm8k, length, math_verify, numeric, \
                       prime_math, regex";

/// A rule that judges a response.
#[derive(Clone, Debug)]
pub enum Verifier {
    /// The last `Answer:` line equals the ground truth after normalisation; 1 or -1.
    MathDapo,
    /// The last `\boxed{...}` is [`equivalent`] to the ground truth; 1 or 0.
    PrimeMath,
    /// The number of a grade-school problem equals the ground truth; 1 or 0.
    Gsm8k(Gsm8k),
    /// The answer, boxed, marked or last, is [`equivalent`] to the ground truth; 1 or 0.
    Numeric,
    /// The response's first line equals the ground truth, white space at the ends aside; 1 or 0.
    Exact,
    /// The response matches a pattern, or where there is none the ground truth as one; 1 or 0.
    Regex(Option<Regex>),
    /// The response has each of some tags once and in order; 1 or 0.
    Format(Tags),
    /// The response's length in characters is within limits, or where there are none those of the
    /// ground truth, `MAX` or `MIN-MAX`; 1 or 0.
    Length(Option<RangeInclusive<usize>>),
    /// An expression over given numbers, each used once, reaches the target; 1 or 0. The ground truth is
    /// JSON, `{"target": 98, "numbers": [44, 19, 35]}`.
    Countdown,
}

/// What begins [`Verdict::predicted`] where no reward could be had; the reason follows.
const FAILED: &str = "reward failed: ";

/// A verdict.
#[derive(Clone, Debug, PartialEq)]
pub struct Verdict {
    /// The reward.
    pub score: f64,
    /// Whether the answer is right: what accuracy counts.
    pub correct: bool,
    /// The answer the rule read in the response.
    pub predicted: String,
}

impl Verdict {
    /// Why no reward could be had, if none could.
    pub fn failure(&self) -> Option<&str> {
        self.predicted.strip_prefix(FAILED)
    }
}

impl Verifier {
    /// The rule for a `data_source`: verl's names of data sets, or the name of a rule.
    ///
    /// # Errors
    /// If there is none, naming those there are.
    pub fn for_source(source: &str) -> Result<Self> {
        match source {
            "math" | "math_dapo_reasoning" | "sum" => Ok(Self::MathDapo),
            _ if source.starts_with("aime") => Ok(Self::MathDapo),
            "openai/gsm8k" => Ok(Self::Gsm8k(Gsm8k::Strict)),
            "lighteval/MATH" | "DigitalLearningGmbH/MATH-lighteval" | "HuggingFaceH4/MATH-500" => {
                Ok(Self::PrimeMath)
            }
            _ if source.starts_with("numina_") => Ok(Self::PrimeMath),
            "arith" => Ok(Self::Exact),
            _ if !source.contains(':') && Self::named(source).is_ok() => Self::named(source),
            _ => Err(Error::config(format!(
                "data source {source:?} has no verifier; those with one: {SOURCES}; or set \
                 reward.function"
            ))),
        }
    }

    /// The rule of a given name, with what follows its colon.
    ///
    /// # Errors
    /// If there is none, naming those there are, or what follows the colon is not understood.
    pub fn named(name: &str) -> Result<Self> {
        let (rule, rest) = name.split_once(':').map_or((name, None), |(r, rest)| (r, Some(rest)));
        Ok(match (rule, rest) {
            ("math_dapo", None) => Self::MathDapo,
            ("prime_math", None) => Self::PrimeMath,
            ("gsm8k", None | Some("strict")) => Self::Gsm8k(Gsm8k::Strict),
            ("gsm8k", Some("flexible")) => Self::Gsm8k(Gsm8k::Flexible),
            ("numeric" | "math_verify", None) => Self::Numeric,
            ("exact", None) => Self::Exact,
            ("countdown", None) => Self::Countdown,
            ("regex", rest) => Self::Regex(rest.map(rules::pattern).transpose()?),
            ("format", rest) => Self::Format(Tags::parse(rest.unwrap_or(""))?),
            ("length", rest) => Self::Length(rest.map(rules::lengths).transpose()?),
            _ => {
                return Err(Error::config(format!(
                    "reward function {name:?} is unknown; available: {AVAILABLE}"
                )));
            }
        })
    }

    /// Checks that a ground truth is one for this rule.
    ///
    /// # Errors
    /// If it is to be a pattern or a length and is not.
    pub fn check(&self, ground_truth: &str) -> Result<()> {
        match self {
            Self::Regex(None) => rules::pattern(ground_truth).map(drop),
            Self::Length(None) => rules::lengths(ground_truth).map(drop),
            _ => Ok(()),
        }
    }

    /// Judges `response`. A ground truth that [`Self::check`] refuses makes every response wrong.
    ///
    /// ```
    /// use trainer::verifier::Verifier;
    /// let verdict = Verifier::MathDapo.judge("4 + 3 = 7\nAnswer: 7", "7");
    /// assert_eq!((verdict.score, verdict.correct), (1.0, true));
    /// assert_eq!(Verifier::PrimeMath.judge(r"so \boxed{\frac{2}{4}}", "0.5").score, 1.0);
    /// assert_eq!(Verifier::Exact.judge("8", "7").score, 0.0);
    /// ```
    pub fn judge(&self, response: &str, ground_truth: &str) -> Verdict {
        let wrong = || Verdict { score: 0.0, correct: false, predicted: String::new() };
        match self {
            Self::MathDapo => math_dapo::judge(response, ground_truth),
            Self::PrimeMath => rules::prime_math(response, ground_truth),
            Self::Gsm8k(reading) => rules::gsm8k(response, ground_truth, *reading),
            Self::Numeric => rules::numeric(response, ground_truth),
            Self::Countdown => countdown::judge(response, ground_truth),
            Self::Exact => rules::exact(response, ground_truth),
            Self::Regex(Some(pattern)) => rules::regex(response, pattern),
            Self::Regex(None) => rules::pattern(ground_truth)
                .map_or_else(|_| wrong(), |pattern| rules::regex(response, &pattern)),
            Self::Format(tags) => rules::format(response, tags),
            Self::Length(Some(range)) => rules::length(response, range),
            Self::Length(None) => rules::lengths(ground_truth)
                .map_or_else(|_| wrong(), |range| rules::length(response, &range)),
        }
    }
}

#[cfg(test)]
mod tests;
