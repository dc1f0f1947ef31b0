//! Judges responses: a rule per data source, as verl dispatches them.
//!
//! Built in: `math_dapo` (also for `math`, `math_dapo_reasoning` and `aime*`) and `exact` (also for
//! `arith`). Every rule takes linear time, so none needs a time limit.

mod math;
mod math_dapo;

use crate::error::{Error, Result};

pub use math::equivalent;
pub use math_dapo::{StrictBox, normalize_final_answer, strict_box};

/// The rules that can be named in `reward.function`.
const AVAILABLE: &str = "auto, exact, math_dapo";

/// Names the documentation lists whose rules do not exist yet.
const LATER: [&str; 8] =
    ["gsm8k", "prime_math", "math_verify", "numeric", "regex", "format", "length", "command"];

/// A rule that judges a response.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verifier {
    /// The last `Answer:` line equals the ground truth after normalisation; 1 or -1.
    MathDapo,
    /// The response's first line equals the ground truth, white space at the ends aside; 1 or 0.
    Exact,
}

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

impl Verifier {
    /// The rule for a `data_source`.
    ///
    /// # Errors
    /// If there is none, naming those there are.
    pub fn for_source(source: &str) -> Result<Self> {
        match source {
            "math_dapo" | "math" | "math_dapo_reasoning" => Ok(Self::MathDapo),
            "exact" | "arith" => Ok(Self::Exact),
            _ if source.starts_with("aime") => Ok(Self::MathDapo),
            _ => Err(Error::config(format!(
                "data source {source:?} has no verifier yet; set reward.function to one of: \
                 exact, math_dapo"
            ))),
        }
    }

    /// The rule of a given name.
    ///
    /// # Errors
    /// If there is none, naming those there are.
    pub fn named(name: &str) -> Result<Self> {
        match name {
            "math_dapo" => Ok(Self::MathDapo),
            "exact" => Ok(Self::Exact),
            _ if LATER.contains(&name) || name.starts_with("http") || name.contains(':') => {
                Err(Error::config(format!(
                    "reward function {name:?} is not available yet; available: {AVAILABLE}"
                )))
            }
            _ => Err(Error::config(format!(
                "reward function {name:?} is unknown; available: {AVAILABLE}"
            ))),
        }
    }

    /// Judges `response`.
    ///
    /// ```
    /// use trainer::verifier::Verifier;
    /// let verdict = Verifier::MathDapo.judge("4 + 3 = 7\nAnswer: 7", "7");
    /// assert_eq!((verdict.score, verdict.correct), (1.0, true));
    /// assert_eq!(Verifier::Exact.judge("8", "7").score, 0.0);
    /// ```
    pub fn judge(self, response: &str, ground_truth: &str) -> Verdict {
        match self {
            Self::MathDapo => math_dapo::judge(response, ground_truth),
            Self::Exact => {
                let predicted = response.trim().lines().next().unwrap_or("").trim();
                let correct = predicted == ground_truth.trim();
                Verdict { score: f64::from(correct), correct, predicted: predicted.to_owned() }
            }
        }
    }
}

/// How a run gets its rewards: one rule for all rows, or by data source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RewardRule {
    /// By each row's `data_source`.
    BySource,
    /// One rule for all.
    Fixed(Verifier),
}

impl RewardRule {
    /// The rule that `reward.function` names; `auto` means by data source.
    ///
    /// # Errors
    /// If there is none of that name.
    pub fn named(function: &str) -> Result<Self> {
        match function {
            "auto" => Ok(Self::BySource),
            name => Verifier::named(name).map(Self::Fixed),
        }
    }

    /// The verifier for a row of `source` (`None`: the row names none).
    ///
    /// # Errors
    /// If the source has no verifier.
    pub fn verifier(self, source: Option<&str>) -> Result<Verifier> {
        match (self, source) {
            (Self::Fixed(verifier), _) => Ok(verifier),
            (Self::BySource, Some(source)) => Verifier::for_source(source),
            (Self::BySource, None) => Err(Error::config(
                "rows without data_source need reward.function, one of: exact, math_dapo",
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exact_reads_the_first_line_of_the_trimmed_response() {
        let judge = |response| Verifier::Exact.judge(response, "58");
        assert!(judge("58").correct && judge(" 58 \n").correct && judge("\n58\nso").correct);
        assert!(!judge("58.").correct && !judge("").correct && !judge("5 8").correct);
        assert_eq!(judge("59").predicted, "59");
    }

    #[test]
    fn sources_and_names_are_dispatched_or_refused_by_name() {
        assert_eq!(Verifier::for_source("aime25").unwrap(), Verifier::MathDapo);
        assert_eq!(Verifier::for_source("arith").unwrap(), Verifier::Exact);
        let e = Verifier::for_source("gsm8k").unwrap_err().to_string();
        assert!(e.contains("\"gsm8k\"") && e.contains("exact, math_dapo"), "{e}");
        let e = RewardRule::named("command:./score.py").unwrap_err().to_string();
        assert!(e.contains("not available yet"), "{e}");
        assert!(RewardRule::named("exat").unwrap_err().to_string().contains("unknown"));
        assert!(RewardRule::BySource.verifier(None).is_err());
        let fixed = RewardRule::named("exact").unwrap();
        assert_eq!(fixed.verifier(None).unwrap(), Verifier::Exact);
    }
}
