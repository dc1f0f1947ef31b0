//! Text into tokens: LaTeX, plain maths and the Unicode signs that models write.
//!
//! Spacing commands, `\left`, `\right` and dollar signs that delimit maths are dropped. One pass over
//! the text; macros are not expanded.

use super::expression::{Constant, Function, Relation};

/// A token.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Token {
    Number(Literal),
    Constant(Constant),
    Function(Function),
    Variable(String),
    /// Words of `\text{...}`, or a word after a number.
    Words(String),
    Relation(Relation),
    /// `+ - * / ^ _ ! % ( ) [ ] { } , | &`, and those of the constants below.
    Sign(char),
    Frac,
    Binom,
    Sqrt,
    /// A logarithm that may have a base.
    Log,
    MatrixBegin,
    MatrixEnd,
}

pub(super) const SET_OPEN: char = '⦃';
pub(super) const SET_CLOSE: char = '⦄';
pub(super) const FLOOR_OPEN: char = '⌊';
pub(super) const FLOOR_CLOSE: char = '⌋';
pub(super) const CEIL_OPEN: char = '⌈';
pub(super) const CEIL_CLOSE: char = '⌉';
pub(super) const ROW: char = '␤';
pub(super) const DEGREE: char = '°';
pub(super) const UNION: char = '∪';
pub(super) const PLUS_MINUS: char = '±';

/// A number as it stands in the text.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Literal {
    /// Digits before the point, without separators; may be empty.
    pub(super) whole: String,
    /// Digits after the point; `None` without a point.
    pub(super) fraction: Option<String>,
    /// Power of ten, from `1.5e3`.
    pub(super) exponent: i32,
    /// Digits of the fraction that repeat for ever, from `\overline{3}`.
    pub(super) repeating: String,
}

/// Whether `1,234` is one number or two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Commas {
    Thousands,
    Lists,
}

/// Units that may follow a number as plain words.
const UNITS: [&str; 64] = [
    "cm", "mm", "km", "kg", "mg", "ml", "ft", "mph", "lb", "lbs", "oz", "sq", "inch", "inches",
    "foot", "feet", "yard", "yards", "mile", "miles", "meter", "meters", "metre", "metres", "gram",
    "grams", "pound", "pounds", "ounce", "ounces", "sec", "second", "seconds", "min", "mins",
    "minute", "minutes", "hr", "hrs", "hour", "hours", "day", "days", "week", "weeks", "month",
    "months", "year", "years", "dollar", "dollars", "cent", "cents", "euro", "euros", "unit",
    "units", "square", "cubic", "liter", "liters", "points", "people", "ways",
];
/// A word this long after a number is a unit of some kind, not a product of variables.
const LONG_WORD: usize = 5;

const GREEK: [&str; 22] = [
    "alpha",
    "beta",
    "gamma",
    "delta",
    "epsilon",
    "varepsilon",
    "zeta",
    "eta",
    "theta",
    "iota",
    "kappa",
    "lambda",
    "mu",
    "nu",
    "xi",
    "rho",
    "sigma",
    "tau",
    "phi",
    "varphi",
    "psi",
    "omega",
];

/// Commands without meaning for a value.
const DROPPED: [&str; 21] = [
    "left",
    "right",
    "big",
    "Big",
    "bigg",
    "Bigg",
    "bigl",
    "bigr",
    "Bigl",
    "Bigr",
    "biggl",
    "biggr",
    "quad",
    "qquad",
    "displaystyle",
    "limits",
    "mathstrut",
    "hspace",
    "thinspace",
    "middle",
    "textstyle",
];

/// Commands whose argument is words.
const WORDS: [&str; 13] = [
    "text",
    "textbf",
    "textit",
    "textrm",
    "mathrm",
    "mathbf",
    "mathit",
    "mbox",
    "operatorname",
    "mathbb",
    "mathcal",
    "textnormal",
    "mathsf",
];

/// The tokens of `text`; `None` if it holds something that is not mathematics.
pub(super) fn tokens(text: &str, commas: Commas) -> Option<Vec<Token>> {
    let mut lexer = Lexer { rest: text, out: Vec::new(), commas, depth: 0, spaced: false };
    while !lexer.rest.is_empty() {
        lexer.next()?;
    }
    Some(lexer.out)
}

struct Lexer<'a> {
    rest: &'a str,
    out: Vec<Token>,
    commas: Commas,
    /// Open round and square brackets and sets.
    depth: usize,
    /// Whether white space came before the rest.
    spaced: bool,
}

impl Lexer<'_> {
    fn next(&mut self) -> Option<()> {
        let c = self.rest.chars().next()?;
        let spaced = std::mem::take(&mut self.spaced);
        let starts_number = self.rest[c.len_utf8()..].starts_with(|d: char| d.is_ascii_digit());
        match c {
            '\\' => return self.command(),
            _ if c.is_ascii_digit() || (c == '.' && starts_number) => return self.number(),
            _ if c.is_ascii_alphabetic() => return self.word(spaced),
            _ => self.rest = &self.rest[c.len_utf8()..],
        }
        match c {
            _ if c.is_whitespace() || c == '~' => self.spaced = true,
            '$' => {}
            '*' if self.rest.starts_with('*') => {
                self.rest = &self.rest[1..];
                self.sign('^');
            }
            '(' | '[' => self.open(c),
            ')' | ']' => self.close(c),
            '+' | '-' | '*' | '/' | '^' | '_' | '!' | '%' | '{' | '}' | ',' | '|' | '&' => {
                self.sign(c);
            }
            ';' => self.sign(','),
            // A full stop ends a sentence.
            '.' if self.rest.trim_end().is_empty() => {}
            '<' | '>' | '=' => self.relation(c),
            _ => return self.unicode(c),
        }
        Some(())
    }

    fn sign(&mut self, c: char) {
        self.out.push(Token::Sign(c));
    }

    fn open(&mut self, c: char) {
        self.depth += 1;
        self.sign(c);
    }

    fn close(&mut self, c: char) {
        self.depth = self.depth.saturating_sub(1);
        self.sign(c);
    }

    fn relation(&mut self, c: char) {
        let or_equal = c != '=' && self.rest.starts_with('=');
        if or_equal || (c == '=' && self.rest.starts_with('=')) {
            self.rest = &self.rest[1..];
        }
        self.out.push(Token::Relation(match (c, or_equal) {
            ('<', false) => Relation::Less,
            ('<', true) => Relation::LessOrEqual,
            ('>', false) => Relation::Greater,
            ('>', true) => Relation::GreaterOrEqual,
            _ => Relation::Equal,
        }));
    }

    fn unicode(&mut self, c: char) -> Option<()> {
        let token = match c {
            '−' | '–' => Token::Sign('-'),
            '×' | '·' | '⋅' | '∗' => Token::Sign('*'),
            '÷' => Token::Sign('/'),
            '√' => Token::Sqrt,
            'π' => Token::Constant(Constant::Pi),
            '∞' => Token::Constant(Constant::Infinity),
            '≤' => Token::Relation(Relation::LessOrEqual),
            '≥' => Token::Relation(Relation::GreaterOrEqual),
            '≠' => Token::Relation(Relation::NotEqual),
            '∈' => Token::Relation(Relation::Within),
            DEGREE | UNION | PLUS_MINUS => Token::Sign(c),
            '²' | '³' => {
                self.sign('^');
                Token::Number(Literal::integer(if c == '²' { "2" } else { "3" }))
            }
            _ => return None,
        };
        self.out.push(token);
        Some(())
    }

    fn number(&mut self) -> Option<()> {
        let mut whole = self.digits();
        let thousands = self.commas == Commas::Thousands && self.depth == 0;
        while let Some(group) = self.group(thousands) {
            whole.push_str(group);
        }
        let mut fraction = None;
        if let Some(after) = self.rest.strip_prefix('.') {
            // A full stop at the end is not a decimal point.
            if !(after.is_empty() || after.starts_with(char::is_whitespace)) {
                self.rest = after;
                fraction = Some(self.digits());
            }
        }
        let mut repeating = String::new();
        if let (Some(_), Some(after)) = (&fraction, self.rest.strip_prefix("\\overline{")) {
            let end = after.find('}')?;
            repeating = after[..end].to_owned();
            self.rest = &after[end + 1..];
            if repeating.is_empty() || !repeating.bytes().all(|b| b.is_ascii_digit()) {
                return None;
            }
        }
        let exponent = self.exponent();
        self.out.push(Token::Number(Literal { whole, fraction, exponent, repeating }));
        Some(())
    }

    fn digits(&mut self) -> String {
        let end = self.rest.bytes().take_while(u8::is_ascii_digit).count();
        let (digits, rest) = self.rest.split_at(end);
        self.rest = rest;
        digits.to_owned()
    }

    /// Three digits after a separator: `1{,}234`, `1,\!234` and, if allowed, `1,234`.
    fn group(&mut self, thousands: bool) -> Option<&str> {
        let after = match self.rest.strip_prefix("{,}") {
            Some(after) => after,
            None => match self.rest.strip_prefix(",\\!") {
                Some(after) => after,
                None if thousands => self.rest.strip_prefix(',')?,
                None => return None,
            },
        };
        let digits = after.bytes().take_while(u8::is_ascii_digit).count();
        if digits != 3 {
            return None;
        }
        self.rest = &after[3..];
        Some(&after[..3])
    }

    /// `e3`, `E-3`: a power of ten right behind a number.
    fn exponent(&mut self) -> i32 {
        let Some(after) = self.rest.strip_prefix(['e', 'E']) else { return 0 };
        let (sign, digits) = match after.strip_prefix('-') {
            Some(digits) => (-1, digits),
            None => (1, after.strip_prefix('+').unwrap_or(after)),
        };
        let end = digits.bytes().take_while(u8::is_ascii_digit).count();
        match digits[..end].parse::<i32>() {
            Ok(value) if end <= 4 => {
                self.rest = &digits[end..];
                sign * value
            }
            _ => 0,
        }
    }

    fn word(&mut self, spaced: bool) -> Option<()> {
        let end = self.rest.bytes().take_while(u8::is_ascii_alphabetic).count();
        let (word, rest) = self.rest.split_at(end);
        self.rest = rest;
        let after_value = matches!(
            self.out.last(),
            Some(Token::Number(_) | Token::Words(_) | Token::Sign(')' | '}'))
        );
        match word {
            "or" | "and" if spaced => self.sign(','),
            "percent" => self.sign('%'),
            "degree" | "degrees" if after_value => self.sign(DEGREE),
            _ if after_value && (UNITS.contains(&word) || (spaced && end >= LONG_WORD)) => {
                self.out.push(Token::Words(word.to_owned()));
            }
            _ if self.named(word) => {}
            _ => word.chars().for_each(|c| self.letter(c)),
        }
        Some(())
    }

    /// Constants and functions that have the same name with and without a backslash.
    fn named(&mut self, word: &str) -> bool {
        self.out.push(match word {
            "pi" => Token::Constant(Constant::Pi),
            "inf" | "infinity" | "infty" | "oo" => Token::Constant(Constant::Infinity),
            "sqrt" => Token::Sqrt,
            "log" => Token::Log,
            _ if GREEK.contains(&word) => Token::Variable(word.to_owned()),
            _ => match Function::named(word) {
                Some(function) => Token::Function(function),
                None => return false,
            },
        });
        true
    }

    fn letter(&mut self, c: char) {
        self.out.push(match c {
            'e' => Token::Constant(Constant::E),
            'i' => Token::Constant(Constant::I),
            _ => Token::Variable(c.to_string()),
        });
    }

    /// A backslash and what belongs to it.
    fn command(&mut self) -> Option<()> {
        let after = &self.rest[1..];
        let end = after.bytes().take_while(u8::is_ascii_alphabetic).count();
        if end == 0 {
            return self.escaped(after);
        }
        let (name, rest) = after.split_at(end);
        self.rest = rest;
        match name {
            "left" | "right" if rest.starts_with('.') => self.rest = &rest[1..],
            _ if DROPPED.contains(&name) => {}
            _ if WORDS.contains(&name) => return self.words(),
            "boxed" | "overline" => {}
            "frac" | "dfrac" | "tfrac" | "cfrac" => self.out.push(Token::Frac),
            "binom" | "dbinom" | "tbinom" => self.out.push(Token::Binom),
            "lg" => {
                self.out.extend([Token::Log, Token::Sign('_')]);
                self.out.push(Token::Number(Literal::integer("10")));
            }
            "begin" | "end" => return self.environment(name),
            _ if self.symbol(name) || self.named(name) => {}
            _ => return None,
        }
        Some(())
    }

    fn escaped(&mut self, after: &str) -> Option<()> {
        let c = after.chars().next()?;
        self.rest = &self.rest[1 + c.len_utf8()..];
        match c {
            '{' => self.open(SET_OPEN),
            '}' => self.close(SET_CLOSE),
            '%' => self.sign('%'),
            '\\' => self.sign(ROW),
            '|' => self.sign('|'),
            '$' | '(' | ')' | '[' | ']' | ',' | ';' | ':' | '!' => {}
            _ if c.is_whitespace() => self.spaced = true,
            _ => return None,
        }
        Some(())
    }

    fn symbol(&mut self, name: &str) -> bool {
        self.out.push(match name {
            "cdot" | "times" | "ast" => Token::Sign('*'),
            "div" => Token::Sign('/'),
            "pm" => Token::Sign(PLUS_MINUS),
            "cup" => Token::Sign(UNION),
            "circ" | "degree" => Token::Sign(DEGREE),
            "lfloor" => Token::Sign(FLOOR_OPEN),
            "rfloor" => Token::Sign(FLOOR_CLOSE),
            "lceil" => Token::Sign(CEIL_OPEN),
            "rceil" => Token::Sign(CEIL_CLOSE),
            "lvert" | "rvert" | "vert" | "mid" => Token::Sign('|'),
            "lbrace" => Token::Sign(SET_OPEN),
            "rbrace" => Token::Sign(SET_CLOSE),
            "lparen" | "langle" => Token::Sign('('),
            "rparen" | "rangle" => Token::Sign(')'),
            "lbrack" => Token::Sign('['),
            "rbrack" => Token::Sign(']'),
            "in" => Token::Relation(Relation::Within),
            "le" | "leq" | "leqslant" => Token::Relation(Relation::LessOrEqual),
            "ge" | "geq" | "geqslant" => Token::Relation(Relation::GreaterOrEqual),
            "lt" => Token::Relation(Relation::Less),
            "gt" => Token::Relation(Relation::Greater),
            "ne" | "neq" => Token::Relation(Relation::NotEqual),
            "emptyset" | "varnothing" => Token::Words("emptyset".to_owned()),
            _ => return false,
        });
        true
    }

    /// The argument of `\text` and its relatives.
    fn words(&mut self) -> Option<()> {
        let inside = self.rest.trim_start().strip_prefix('{')?;
        let end = inside.find('}')?;
        self.rest = &inside[end + 1..];
        let words = inside[..end].split_whitespace().collect::<Vec<_>>().join(" ");
        match words.as_str() {
            "" => {}
            "or" | "and" | ", and" | ", or" => self.sign(','),
            "e" => self.out.push(Token::Constant(Constant::E)),
            "i" => self.out.push(Token::Constant(Constant::I)),
            "degrees" | "degree" => self.sign(DEGREE),
            "percent" | "%" => self.sign('%'),
            _ => self.out.push(Token::Words(words.to_lowercase())),
        }
        Some(())
    }

    fn environment(&mut self, name: &str) -> Option<()> {
        let inside = self.rest.strip_prefix('{')?;
        let end = inside.find('}')?;
        if !inside[..end].trim_end_matches('*').ends_with("matrix") {
            return None;
        }
        self.rest = &inside[end + 1..];
        self.out.push(if name == "begin" { Token::MatrixBegin } else { Token::MatrixEnd });
        Some(())
    }
}

impl Literal {
    /// A whole number.
    pub(super) fn integer(digits: &str) -> Self {
        Self { whole: digits.to_owned(), fraction: None, exponent: 0, repeating: String::new() }
    }

    /// Whether it is written as a whole number.
    pub(super) fn is_integer(&self) -> bool {
        self.fraction.is_none() && self.exponent == 0
    }
}
