//! Whether two answers are the same mathematics.
//!
//! Answers are LaTeX as models write it or plain text: numbers, fractions, radicals, powers, common
//! functions, sets, tuples, intervals, matrices, equations, units, words. Own design: a lexer, a
//! parser, an exact normal form, and evaluation at several points where there is none. The work is
//! linear in the text and bounded. Leaves out calculus, inequalities as intervals, and conversion of
//! units.

mod compare;
mod exact;
mod expression;
mod fuel;
mod lexer;
mod numeric;
mod parser;

use fuel::Fuel;
use lexer::{Commas, Token, tokens};
use parser::parse;

/// Longest answer that is read as mathematics, in bytes; longer ones have to be equal as text.
const MAX_BYTES: usize = 2000;
/// Work for one pair of answers.
const FUEL: u64 = 20_000;

/// Whether `a` and `b` are the same answer. An empty answer is never right.
///
/// ```
/// use trainer::verifier::equivalent;
/// assert!(equivalent(r"\dfrac{\sqrt{3}}{3}", r"1/\sqrt3") && equivalent("(x+1)^2", "x^2+2x+1"));
/// assert!(equivalent(r"50\%", "0.5") && equivalent(r"12\text{ cm}", "12"));
/// assert!(!equivalent("6.2832", r"2\pi") && !equivalent("[1,2]", "(1,2)"));
/// ```
pub fn equivalent(a: &str, b: &str) -> bool {
    let (a, b) = (a.trim(), b.trim());
    if a.is_empty() || b.is_empty() {
        return false;
    }
    if a.len() > MAX_BYTES || b.len() > MAX_BYTES {
        return a == b;
    }
    if let (Some(a), Some(b)) = (words(a), words(b)) {
        return a == b;
    }
    let mut fuel = Fuel::new(FUEL);
    let mut read = |commas| match (tokens(a, commas), tokens(b, commas)) {
        (Some(a), Some(b)) => same_tokens(a, b, &mut fuel),
        _ => squeezed(a) == squeezed(b),
    };
    // "1,234" is one number or two: whichever makes both sides the same.
    read(Commas::Thousands) || ((a.contains(',') || b.contains(',')) && read(Commas::Lists))
}

fn same_tokens(a: Vec<Token>, b: Vec<Token>, fuel: &mut Fuel) -> bool {
    if a == b {
        return !a.is_empty();
    }
    match (parse(a), parse(b)) {
        (Some(a), Some(b)) => compare::same(&a, &b, fuel),
        _ => false,
    }
}

/// Text without white space, for what is not mathematics.
fn squeezed(text: &str) -> String {
    text.split_whitespace().collect()
}

/// The words of an answer that is nothing else, in lower case: `Monday`, `\text{(B)}`.
fn words(text: &str) -> Option<String> {
    const WRAPPERS: [&str; 6] =
        ["\\text{", "\\textbf{", "\\mathbf{", "\\mathrm{", "\\textit{", "\\mbox{"];
    let mut rest = text.trim_matches(['$', '.', ' ']);
    loop {
        let inside = WRAPPERS.iter().find_map(|w| rest.strip_prefix(w)?.strip_suffix('}'));
        let inside = inside.or_else(|| rest.strip_prefix('(')?.strip_suffix(')'));
        match inside {
            Some(inside) => rest = inside.trim(),
            None => break,
        }
    }
    let plain = |c: char| c.is_alphabetic() || c.is_whitespace() || c == '-' || c == '\'';
    let text = rest.starts_with(char::is_alphabetic) && rest.chars().all(plain);
    text.then(|| rest.split_whitespace().collect::<Vec<_>>().join(" ").to_lowercase())
}

#[cfg(test)]
mod tests;
