//! verl's `math_dapo` rule, step by step.
//!
//! The last `Answer: ...` line within the last 300 characters, normalised as Minerva's answers are
//! (arXiv 2206.14858, appendix), has to equal the normalised ground truth; 1 or -1. Oddities of the
//! original are kept, because rewards must be comparable: characters, not bytes, are counted; the
//! list `1,2` becomes `12`; `\dfrac` stays. White space and digits are Python's. The regex engine is
//! linear in the text, unlike the original's.

use std::sync::LazyLock;

use regex::Regex;

use super::Verdict;

/// Characters at the end of a response that are read.
const WINDOW: usize = 300;
/// Characters at the end of the window in which the strict rule looks for a box.
const BOX_WINDOW: usize = 100;

const SUBSTITUTIONS: [(&str, &str); 10] = [
    ("an ", ""),
    ("a ", ""),
    (".$", "$"),
    ("\\$", ""),
    ("\\ ", ""),
    (" ", ""),
    ("mbox", "text"),
    (",\\text{and}", ","),
    ("\\text{and}", ","),
    ("\\text{m}", "\\text{}"),
];

const REMOVED: [&str; 40] = [
    "square",
    "ways",
    "integers",
    "dollars",
    "mph",
    "inches",
    "hours",
    "km",
    "units",
    "\\ldots",
    "sue",
    "points",
    "feet",
    "minutes",
    "digits",
    "cents",
    "degrees",
    "cm",
    "gm",
    "pounds",
    "meters",
    "meals",
    "edges",
    "students",
    "childrentickets",
    "multiples",
    "\\text{s}",
    "\\text{.}",
    "\\text{\ns}",
    "\\text{}^2",
    "\\text{}^3",
    "\\text{\n}",
    "\\text{}",
    "\\mathrm{th}",
    "^\\circ",
    "^{\\circ}",
    "\\;",
    ",\\!",
    "{,}",
    "\"",
];

/// Removed after [`REMOVED`].
const REMOVED_LAST: &str = "\\dots";

/// Pattern and replacement, in order.
const REWRITES: [(&str, &str); 7] = [
    (r"(.*?)(\$)(.*?)(\$)(.*)", "$$${3}$$"),
    (r"(\\text\{)(.*?)(\})", "${2}"),
    (r"(\\textbf\{)(.*?)(\})", "${2}"),
    (r"(\\overline\{)(.*?)(\})", "${2}"),
    (r"(\\boxed\{)(.*)(\})", "${2}"),
    (r"(frac)([^{])(.)", "frac{${2}}{${3}}"),
    (r"(sqrt)([^{])", "sqrt{${2}}"),
];

static ANSWER: LazyLock<Regex> =
    LazyLock::new(|| compile(r"(?i)Answer[\s\x1c-\x1f]*:[\s\x1c-\x1f]*([^\n]+)"));
static REWRITE: LazyLock<[(Regex, &str); 7]> =
    LazyLock::new(|| REWRITES.map(|(pattern, replacement)| (compile(pattern), replacement)));

/// Unicode digits that are not decimals: with `\p{Nd}`, what Python's `str.isdigit` accepts.
const OTHER_DIGITS: [(u32, u32); 20] = [
    (0xb2, 0xb3),
    (0xb9, 0xb9),
    (0x1369, 0x1371),
    (0x19da, 0x19da),
    (0x2070, 0x2070),
    (0x2074, 0x2079),
    (0x2080, 0x2089),
    (0x2460, 0x2468),
    (0x2474, 0x247c),
    (0x2488, 0x2490),
    (0x24ea, 0x24ea),
    (0x24f5, 0x24fd),
    (0x24ff, 0x24ff),
    (0x2776, 0x277e),
    (0x2780, 0x2788),
    (0x278a, 0x2792),
    (0x10a40, 0x10a43),
    (0x10e60, 0x10e68),
    (0x11052, 0x1105a),
    (0x1f100, 0x1f10a),
];
static DECIMAL: LazyLock<Regex> = LazyLock::new(|| compile(r"^\p{Nd}$"));

/// The verdict of the default rule.
pub(super) fn judge(response: &str, ground_truth: &str) -> Verdict {
    let window = last_chars(response, WINDOW);
    let last = ANSWER.captures_iter(window).last();
    let extracted = last.as_ref().and_then(|c| c.get(1)).map_or("[INVALID]", |m| m.as_str());
    let predicted = normalize_final_answer(extracted);
    let correct = predicted == normalize_final_answer(ground_truth);
    Verdict { score: score(correct), correct, predicted }
}

/// The verdict of [`strict_box`].
#[derive(Clone, Debug, PartialEq)]
pub struct StrictBox {
    /// 1 or -1.
    pub score: f64,
    /// Whether the box holds the ground truth, character by character.
    pub correct: bool,
    /// What the box holds; `None` without a closed box.
    pub predicted: Option<String>,
}

/// verl's variant `strict_box_verify`: the last `\boxed{...}` in the last 100 characters.
pub fn strict_box(response: &str, ground_truth: &str) -> StrictBox {
    let predicted = last_box(last_chars(last_chars(response, WINDOW), BOX_WINDOW));
    let correct = predicted == Some(ground_truth);
    StrictBox { score: score(correct), correct, predicted: predicted.map(str::to_owned) }
}

/// The normal form in which answers are compared.
pub fn normalize_final_answer(answer: &str) -> String {
    let mut text = answer.rsplit('=').next().unwrap_or("").to_owned();
    for (from, to) in SUBSTITUTIONS {
        text = text.replace(from, to);
    }
    for removed in REMOVED.iter().chain([&REMOVED_LAST]) {
        text = text.replace(removed, "");
    }
    for (pattern, replacement) in REWRITE.iter() {
        text = pattern.replace_all(&text, *replacement).into_owned();
    }
    text = text.replace('$', "");
    let without_commas = text.replace(',', "");
    if !without_commas.is_empty() && without_commas.chars().all(is_digit) {
        text = without_commas;
    }
    text.trim_matches(is_space).to_owned()
}

fn score(correct: bool) -> f64 {
    if correct { 1.0 } else { -1.0 }
}

fn compile(pattern: &str) -> Regex {
    Regex::new(pattern).expect("the patterns of this file are valid")
}

fn last_chars(text: &str, count: usize) -> &str {
    let start = text.char_indices().rev().take(count).last();
    &text[start.map_or(text.len(), |(at, _)| at)..]
}

/// What the last `\boxed{` holds, up to its matching brace.
fn last_box(text: &str) -> Option<&str> {
    const OPEN: &str = "\\boxed{";
    let inside = &text[text.rfind(OPEN)? + OPEN.len()..];
    let mut depth = 1;
    for (at, c) in inside.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => {}
        }
        if depth == 0 {
            return Some(&inside[..at]);
        }
    }
    None
}

/// Python's `str.isdigit` of one character.
fn is_digit(c: char) -> bool {
    if c.is_ascii() {
        return c.is_ascii_digit();
    }
    let code = u32::from(c);
    OTHER_DIGITS.iter().any(|(first, last)| (*first..=*last).contains(&code))
        || DECIMAL.is_match(c.encode_utf8(&mut [0; 4]))
}

/// Python's `str.isspace` of one character.
fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn digits_are_pythons() {
        assert!(['7', '²', '٣', '①', '𝟗'].into_iter().all(is_digit));
        assert!(!['½', 'Ⅷ', '一', '-', ','].into_iter().any(is_digit));
    }

    #[test]
    fn invalid_as_ground_truth_scores_as_in_the_original() {
        assert_eq!(judge("no marker", "[INVALID]").score, 1.0);
    }

    /// Text that makes a backtracking engine take quadratic time or worse.
    #[test]
    fn hostile_text_of_a_megabyte_is_judged_quickly() {
        let start = std::time::Instant::now();
        for text in ["$".repeat(1 << 20), "Answer:".repeat(150_000), "\\boxed{".repeat(150_000)] {
            assert_eq!(judge(&text, "7").score, -1.0);
            assert!(!strict_box(&text, "7").correct);
        }
        assert!(start.elapsed().as_secs_f64() < 1.0, "took {:?}", start.elapsed());
    }

    proptest! {
        #[test]
        fn any_text_gets_a_verdict(text in "\\PC{0,400}", truth in "\\PC{0,20}") {
            let verdict = judge(&text, &truth);
            prop_assert_eq!(verdict.score, if verdict.correct { 1.0 } else { -1.0 });
            strict_box(&text, &truth);
        }

        #[test]
        fn an_answer_line_with_the_truth_is_right(prefix in "[a-z \n]{0,500}", n in any::<i32>()) {
            let text = format!("{prefix}\nAnswer: {n}");
            prop_assert!(judge(&text, &n.to_string()).correct);
        }
    }
}
