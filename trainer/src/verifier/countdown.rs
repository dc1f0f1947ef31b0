//! Judges answers to Countdown: an expression that uses each given number exactly once and reaches the
//! target.
//!
//! The answer is the last `<answer>` element or else the last line with `Answer:`; what follows a `=` in
//! it does not count. Values are exact fractions of 128-bit integers. Grammar: `sum = product {(+|-)
//! product}`, `product = value {(*|/) value}`, `value = ["-"] (integer | "(" sum ")")`; `×`, `·`, `÷` and
//! the minus sign of typesetting are read as their ASCII forms. Answers longer than [`MAX_LEN`] bytes are
//! wrong, so a verdict takes time linear in the response.

use serde_json::Value;

use super::Verdict;

/// Longest answer that is read, in bytes.
const MAX_LEN: usize = 512;
/// Deepest nesting that is followed.
const MAX_DEPTH: usize = 32;

/// Judges `response` by the JSON `ground_truth`, `{"target": 98, "numbers": [44, 19, 35]}`; a truth that
/// is none makes every response wrong.
pub(super) fn judge(response: &str, ground_truth: &str) -> Verdict {
    let answer = answer(response).unwrap_or("");
    let correct = truth(ground_truth).zip(evaluate(answer)).is_some_and(
        |((target, numbers), (value, used))| {
            value == Fraction { above: target, below: 1 } && numbers == used
        },
    );
    Verdict { score: f64::from(correct), correct, predicted: answer.to_owned() }
}

/// The target and the numbers, sorted.
fn truth(text: &str) -> Option<(i128, Vec<i128>)> {
    let truth: Value = serde_json::from_str(text).ok()?;
    let integer = |value: &Value| value.as_i64().map(i128::from);
    let mut numbers =
        truth["numbers"].as_array()?.iter().map(integer).collect::<Option<Vec<_>>>()?;
    numbers.sort_unstable();
    Some((integer(&truth["target"])?, numbers))
}

/// The expression a response gives as its answer.
fn answer(response: &str) -> Option<&str> {
    let text = match response.rsplit_once("<answer>") {
        Some((_, rest)) => rest.split("</answer>").next()?,
        None => {
            let (_, rest) = response.rsplit_once("Answer:")?;
            rest.trim_start().lines().next()?
        }
    };
    let text = text.split('=').next()?.trim().trim_matches(['$', '`', '*']).trim();
    (text.len() <= MAX_LEN).then_some(text)
}

/// The value of an expression and the numbers in it, sorted.
fn evaluate(text: &str) -> Option<(Fraction, Vec<i128>)> {
    let chars: Vec<char> = text.chars().filter(|c| !c.is_whitespace()).map(plain).collect();
    let mut parser = Parser { chars: &chars, at: 0, used: Vec::new() };
    let value = parser.sum(MAX_DEPTH)?;
    if parser.at < chars.len() {
        return None;
    }
    parser.used.sort_unstable();
    Some((value, parser.used))
}

fn plain(c: char) -> char {
    match c {
        '×' | '·' | '∗' => '*',
        '÷' => '/',
        '−' | '–' => '-',
        other => other,
    }
}

/// In lowest terms, with a positive denominator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Fraction {
    above: i128,
    below: i128,
}

impl Fraction {
    /// `None` when the denominator is 0 or the numbers are too large.
    fn new(above: i128, below: i128) -> Option<Self> {
        if below == 0 {
            return None;
        }
        let (mut a, mut b) = (above.checked_abs()?, below.checked_abs()?);
        while b != 0 {
            (a, b) = (b, a % b);
        }
        let divisor = a.max(1) * below.signum();
        Some(Self { above: above / divisor, below: below / divisor })
    }

    fn join(self, operation: char, other: Self) -> Option<Self> {
        let cross = |sign: i128| {
            let left = self.above.checked_mul(other.below)?;
            let right = other.above.checked_mul(self.below)?.checked_mul(sign)?;
            Self::new(left.checked_add(right)?, self.below.checked_mul(other.below)?)
        };
        match operation {
            '+' => cross(1),
            '-' => cross(-1),
            '*' => Self::new(
                self.above.checked_mul(other.above)?,
                self.below.checked_mul(other.below)?,
            ),
            _ => Self::new(
                self.above.checked_mul(other.below)?,
                self.below.checked_mul(other.above)?,
            ),
        }
    }
}

struct Parser<'a> {
    chars: &'a [char],
    at: usize,
    used: Vec<i128>,
}

impl Parser<'_> {
    /// Moves past the next character if it is one of `wanted`.
    fn eat(&mut self, wanted: &[char]) -> Option<char> {
        let c = *self.chars.get(self.at).filter(|c| wanted.contains(c))?;
        self.at += 1;
        Some(c)
    }

    fn sum(&mut self, depth: usize) -> Option<Fraction> {
        let mut value = self.product(depth)?;
        while let Some(operation) = self.eat(&['+', '-']) {
            value = value.join(operation, self.product(depth)?)?;
        }
        Some(value)
    }

    fn product(&mut self, depth: usize) -> Option<Fraction> {
        let mut value = self.value(depth)?;
        while let Some(operation) = self.eat(&['*', '/']) {
            value = value.join(operation, self.value(depth)?)?;
        }
        Some(value)
    }

    fn value(&mut self, depth: usize) -> Option<Fraction> {
        let depth = depth.checked_sub(1)?;
        if self.eat(&['-']).is_some() {
            let value = self.value(depth)?;
            return Fraction::new(value.above.checked_neg()?, value.below);
        }
        if self.eat(&['(']).is_some() {
            let value = self.sum(depth)?;
            return self.eat(&[')']).map(|_| value);
        }
        let digits = self.chars[self.at..].iter().take_while(|c| c.is_ascii_digit()).count();
        let number: String = self.chars[self.at..self.at + digits].iter().collect();
        let number = number.parse().ok()?;
        self.at += digits;
        self.used.push(number);
        Some(Fraction { above: number, below: 1 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRUTH: &str = r#"{"target": 98, "numbers": [44, 19, 35]}"#;

    fn right(response: &str) -> bool {
        let verdict = judge(response, TRUTH);
        assert_eq!(verdict.score, f64::from(verdict.correct));
        verdict.correct
    }

    #[test]
    fn answers_that_reach_the_target_are_right() {
        for response in [
            "Answer: 44 + 19 + 35",
            "<think>44+19</think>\n<answer> (35 + 19) + 44 = 98 </answer>",
            "Answer: 1\nAnswer: 19+(44+35)\n",
            "Answer: $44 − (−19) + 35$",
            "<answer>44+19+35",
        ] {
            assert!(right(response), "{response}");
        }
        let fraction = r#"{"target": 24, "numbers": [8, 3, 8, 3]}"#;
        assert!(judge("Answer: 8 ÷ (3 − 8/3)", fraction).correct);
        assert_eq!(judge("Answer: 44 + 1", TRUTH).predicted, "44 + 1");
    }

    #[test]
    fn other_answers_are_wrong() {
        for response in [
            "",
            "98",
            "Answer: 98",
            "Answer: 44 + 19",
            "Answer: 44 + 19 + 35 + 0",
            "Answer: 44 + 35 + 19 - 19 + 19",
            "Answer: 44 + 19 + 35 + ",
            "Answer: (44 + 19 + 35",
            "Answer: 44 + 19 + 35)",
            "Answer: 4419 + 35",
            "Answer: 44 + 19 + 35 + 1/0",
            "Answer: 44 19 35",
            "answer is 44 + 19 + 35",
        ] {
            assert!(!right(response), "{response}");
        }
        assert!(!judge("Answer: 1", "1").correct && !judge("Answer: 1", "{}").correct);
        assert!(!judge("Answer: 1/0", r#"{"target": 0, "numbers": [1, 0]}"#).correct);
    }

    #[test]
    fn hostile_answers_are_judged_at_once() {
        let begin = std::time::Instant::now();
        for hostile in ["(", "-", "9", "9*", "<answer>", "Answer:", "="] {
            assert!(!right(&format!("Answer: {}", hostile.repeat(1 << 17))), "{hostile}");
            assert!(
                !right(&format!("Answer: {}", hostile.repeat(400 / hostile.len()))),
                "{hostile}"
            );
        }
        assert!(begin.elapsed().as_secs_f64() < 1.0, "{:?}", begin.elapsed());
    }
}
