//! Tokens into a tree: a recursive descent of bounded depth.
//!
//! `list := relation (',' relation)*`, `relation := union (sign union)*`, `union := sum ('∪' sum)*`,
//! `sum := product (('+' | '-' | '±') product)*`, `product := factor (('*' | '/' | nothing) factor)*`,
//! `factor := atom ('^' atom | '!' | '%' | '°' | unit)*`. A whole number right before a fraction of
//! whole numbers is a mixed number. Division binds as multiplication does, from the left.

use num_bigint::BigInt;
use num_rational::BigRational;
use num_traits::{One, Zero};

use super::expression::{Expr, Function};
use super::lexer::{
    CEIL_CLOSE, CEIL_OPEN, DEGREE, FLOOR_CLOSE, FLOOR_OPEN, Literal, PLUS_MINUS, ROW, SET_CLOSE,
    SET_OPEN, Token, UNION,
};

/// Brackets, roots, exponents and the like within one another.
const MAX_DEPTH: usize = 48;
/// Digits of a number, its power of ten included.
const MAX_DIGITS: usize = 1200;

/// The tree of `tokens`; `None` if they are not a well-formed answer.
pub(super) fn parse(tokens: Vec<Token>) -> Option<Expr> {
    let mut parser = Parser { tokens, at: 0, depth: 0, bars: 0 };
    let mut items = parser.list()?;
    if parser.at < parser.tokens.len() {
        return None;
    }
    Some(if items.len() == 1 { items.remove(0) } else { Expr::Set(items) })
}

struct Parser {
    tokens: Vec<Token>,
    at: usize,
    depth: usize,
    /// Open absolute values: a bar closes the innermost.
    bars: usize,
}

impl Parser {
    fn peek(&self) -> Option<&Token> {
        self.tokens.get(self.at)
    }

    fn sign(&self) -> Option<char> {
        match self.peek() {
            Some(Token::Sign(c)) => Some(*c),
            _ => None,
        }
    }

    fn take(&mut self, sign: char) -> bool {
        let found = self.sign() == Some(sign);
        self.at += usize::from(found);
        found
    }

    fn expect(&mut self, sign: char) -> Option<()> {
        self.take(sign).then_some(())
    }

    /// Runs `inner` one level deeper.
    fn deeper<T>(&mut self, inner: impl FnOnce(&mut Self) -> Option<T>) -> Option<T> {
        if self.depth == MAX_DEPTH {
            return None;
        }
        self.depth += 1;
        let result = inner(self);
        self.depth -= 1;
        result
    }

    fn list(&mut self) -> Option<Vec<Expr>> {
        let mut items = vec![self.relation()?];
        while self.take(',') {
            // "1, or 2" and "1, 2," have a comma too many.
            if self.sign() == Some(',') || self.peek().is_none() {
                continue;
            }
            items.push(self.relation()?);
        }
        Some(items)
    }

    fn relation(&mut self) -> Option<Expr> {
        let mut sides = vec![self.union()?];
        let mut relations = Vec::new();
        while let Some(Token::Relation(relation)) = self.peek() {
            relations.push(*relation);
            self.at += 1;
            sides.push(self.union()?);
        }
        Some(match relations.is_empty() {
            true => sides.remove(0),
            false => Expr::Relation(sides, relations),
        })
    }

    fn union(&mut self) -> Option<Expr> {
        let mut parts = vec![self.sum()?];
        while self.take(UNION) {
            parts.push(self.sum()?);
        }
        Some(if parts.len() == 1 { parts.remove(0) } else { Expr::Union(parts) })
    }

    fn sum(&mut self) -> Option<Expr> {
        let mut terms = Vec::new();
        loop {
            let sign = self.sign().filter(|c| ['+', '-', PLUS_MINUS].contains(c));
            match sign {
                Some(_) => self.at += 1,
                None if terms.is_empty() => {}
                None => break,
            }
            let term = self.product()?;
            match sign {
                Some('-') => terms.push(negative(term)),
                Some(PLUS_MINUS) => {
                    let before = sum_of(std::mem::take(&mut terms));
                    terms.push(Expr::PlusMinus(before.into(), term.into()));
                }
                _ => terms.push(term),
            }
        }
        Some(sum_of(terms))
    }

    fn product(&mut self) -> Option<Expr> {
        let mut factors = vec![self.factor()?];
        loop {
            match self.sign() {
                Some('*') => {
                    self.at += 1;
                    factors.push(self.signed_factor()?);
                }
                Some('/') => {
                    self.at += 1;
                    let below = self.signed_factor()?;
                    let above = product_of(std::mem::take(&mut factors));
                    factors.push(Expr::Quotient(above.into(), below.into()));
                }
                _ if self.starts_factor() => {
                    let number = matches!(self.peek(), Some(Token::Number(_)));
                    match (number, self.mixed(&factors)) {
                        (_, Some(mixed)) => {
                            factors.pop();
                            factors.push(self.suffixes(mixed)?);
                        }
                        // Two numbers side by side are no product.
                        (true, None) if matches!(factors.last(), Some(Expr::Number(_))) => {
                            return None;
                        }
                        _ => factors.push(self.factor()?),
                    }
                }
                _ => return Some(product_of(factors)),
            }
        }
    }

    /// A mixed number whose whole part is the last of `factors`.
    fn mixed(&mut self, factors: &[Expr]) -> Option<Expr> {
        let integer = |token: Option<&Token>| match token {
            Some(Token::Number(literal)) if literal.is_integer() => rational(literal),
            _ => None,
        };
        // The whole part has to stand there as a number, not as the result of an operation.
        let whole = integer(self.at.checked_sub(1).and_then(|i| self.tokens.get(i)))?;
        let [Expr::Number(only)] = factors else { return None };
        if *only != whole {
            return None;
        }
        let token = |offset: usize| self.tokens.get(self.at + offset);
        let sign = |offset, c| token(offset) == Some(&Token::Sign(c));
        let (above, below, len) = match token(0)? {
            Token::Number(_) if sign(1, '/') => (integer(token(0))?, integer(token(2))?, 3),
            Token::Frac if sign(1, '{') && sign(3, '}') && sign(4, '{') && sign(6, '}') => {
                (integer(token(2))?, integer(token(5))?, 7)
            }
            Token::Frac => {
                let saved = self.at;
                self.at += 1;
                let parts = self.argument().and_then(|a| Some((a, self.argument()?)));
                return match parts {
                    Some((Expr::Number(a), Expr::Number(b))) if !b.is_zero() => {
                        Some(Expr::Number(whole + a / b))
                    }
                    _ => {
                        self.at = saved;
                        None
                    }
                };
            }
            _ => return None,
        };
        if below.is_zero() {
            return None;
        }
        self.at += len;
        Some(Expr::Number(whole + above / below))
    }

    fn starts_factor(&self) -> bool {
        match self.peek() {
            Some(Token::Sign('|')) => self.bars == 0,
            Some(Token::Sign(c)) => ['(', '[', '{', SET_OPEN, FLOOR_OPEN, CEIL_OPEN].contains(c),
            Some(Token::Relation(_) | Token::Words(_) | Token::MatrixEnd) | None => false,
            Some(_) => true,
        }
    }

    /// A factor after `*` or `/`, which may have a sign.
    fn signed_factor(&mut self) -> Option<Expr> {
        let mut negative = false;
        while let Some(c @ ('-' | '+')) = self.sign() {
            negative ^= c == '-';
            self.at += 1;
        }
        let factor = self.factor()?;
        Some(if negative { Expr::Negative(factor.into()) } else { factor })
    }

    fn factor(&mut self) -> Option<Expr> {
        let atom = self.deeper(Self::atom)?;
        self.suffixes(atom)
    }

    /// Exponents, factorials, percent signs, degrees and units behind `value`.
    fn suffixes(&mut self, mut value: Expr) -> Option<Expr> {
        for _ in 0..MAX_DEPTH {
            value = match self.peek() {
                Some(Token::Sign('^')) => {
                    self.at += 1;
                    if self.degree_sign() {
                        Expr::Degrees(value.into())
                    } else {
                        let exponent = self.deeper(Self::exponent)?;
                        Expr::Power(value.into(), exponent.into())
                    }
                }
                Some(Token::Sign('!')) => {
                    self.at += 1;
                    if self.sign() == Some('!') {
                        return None;
                    }
                    Expr::Call(Function::Factorial, value.into())
                }
                Some(Token::Sign('%')) => {
                    self.at += 1;
                    Expr::Percent(value.into())
                }
                Some(Token::Sign(DEGREE)) => {
                    self.at += 1;
                    Expr::Degrees(value.into())
                }
                Some(Token::Sign('_')) => self.subscript(value)?,
                Some(Token::Words(_)) => self.unit(value),
                _ => return Some(value),
            };
        }
        None
    }

    /// `^\circ` and `^{\circ}`, after the caret.
    fn degree_sign(&mut self) -> bool {
        let ahead = |i: usize| self.tokens.get(self.at + i);
        let (open, degree, close) = (Token::Sign('{'), Token::Sign(DEGREE), Token::Sign('}'));
        let len = match (ahead(0), ahead(1), ahead(2)) {
            (Some(a), _, _) if *a == degree => 1,
            (Some(a), Some(b), Some(c)) if (a, b, c) == (&open, &degree, &close) => 3,
            _ => 0,
        };
        self.at += len;
        len > 0
    }

    /// What an exponent may be: a signed factor without suffixes of its own but a further exponent.
    fn exponent(&mut self) -> Option<Expr> {
        let mut negative = false;
        while let Some(c @ ('-' | '+')) = self.sign() {
            negative ^= c == '-';
            self.at += 1;
        }
        let mut value = self.atom()?;
        if self.take('^') {
            let exponent = self.deeper(Self::exponent)?;
            value = Expr::Power(value.into(), exponent.into());
        }
        Some(if negative { Expr::Negative(value.into()) } else { value })
    }

    /// A subscript: part of a variable's name, or the base a number is written in.
    fn subscript(&mut self, value: Expr) -> Option<Expr> {
        self.at += 1;
        let index = self.argument()?;
        let name = match (&value, index) {
            (Expr::Variable(name), Expr::Number(n)) => format!("{name}_{n}"),
            (Expr::Variable(name), Expr::Variable(index)) => format!("{name}_{index}"),
            // As a unit: a base that only one side states is not held against it.
            (Expr::Number(_), Expr::Number(base)) => {
                return Some(Expr::Quantity(value.into(), format!("base {base}")));
            }
            _ => return None,
        };
        Some(Expr::Variable(name))
    }

    fn unit(&mut self, value: Expr) -> Expr {
        let mut words = Vec::new();
        while let Some(Token::Words(word)) = self.peek() {
            words.push(word.clone());
            self.at += 1;
        }
        let mut unit = words.join(" ");
        if let (Some(Token::Sign('^')), Some(Token::Number(power))) =
            (self.peek(), self.tokens.get(self.at + 1))
        {
            unit = format!("{unit}^{}", power.whole);
            self.at += 2;
        }
        Expr::Quantity(value.into(), unit)
    }

    fn atom(&mut self) -> Option<Expr> {
        let token = self.peek()?.clone();
        self.at += 1;
        Some(match token {
            Token::Number(literal) => Expr::Number(rational(&literal)?),
            Token::Constant(constant) => Expr::Constant(constant),
            Token::Variable(name) => Expr::Variable(name),
            Token::Words(words) => Expr::Words(words),
            Token::Function(function) => self.call(function)?,
            Token::Log => self.log()?,
            Token::Frac => {
                let above = self.argument()?;
                Expr::Quotient(above.into(), self.argument()?.into())
            }
            Token::Binom => {
                let above = self.argument()?;
                Expr::Binomial(above.into(), self.argument()?.into())
            }
            Token::Sqrt => self.root()?,
            Token::MatrixBegin => self.matrix()?,
            Token::Sign(sign) => self.group(sign)?,
            Token::Relation(_) | Token::MatrixEnd => return None,
        })
    }

    /// What an opening sign, already taken, encloses.
    fn group(&mut self, open: char) -> Option<Expr> {
        match open {
            '{' => {
                let inside = self.apart(Self::relation)?;
                self.expect('}')?;
                Some(inside)
            }
            SET_OPEN if self.take(SET_CLOSE) => Some(Expr::Words("emptyset".to_owned())),
            SET_OPEN => {
                let items = self.apart(Self::list)?;
                self.expect(SET_CLOSE)?;
                Some(Expr::Set(items))
            }
            '|' => {
                self.bars += 1;
                let inside = self.deeper(Self::sum);
                self.bars -= 1;
                self.expect('|')?;
                Some(Expr::Call(Function::Abs, inside?.into()))
            }
            FLOOR_OPEN => self.rounded(Function::Floor, FLOOR_CLOSE),
            CEIL_OPEN => self.rounded(Function::Ceil, CEIL_CLOSE),
            '(' | '[' => self.brackets(open),
            '-' | '+' => {
                let factor = self.signed_factor()?;
                Some(if open == '-' { Expr::Negative(factor.into()) } else { factor })
            }
            _ => None,
        }
    }

    /// Runs `inner` as if no absolute value were open.
    fn apart<T>(&mut self, inner: impl FnOnce(&mut Self) -> Option<T>) -> Option<T> {
        let bars = std::mem::take(&mut self.bars);
        let result = self.deeper(inner);
        self.bars = bars;
        result
    }

    fn rounded(&mut self, function: Function, close: char) -> Option<Expr> {
        let inside = self.apart(Self::sum)?;
        self.expect(close)?;
        Some(Expr::Call(function, inside.into()))
    }

    fn brackets(&mut self, open: char) -> Option<Expr> {
        let mut items = self.apart(Self::list)?;
        let close = self.sign().filter(|c| [')', ']'].contains(c))?;
        self.at += 1;
        if items.len() > 1 {
            return Some(Expr::Tuple(open, items, close));
        }
        let matched = (open == '(') == (close == ')');
        matched.then(|| items.remove(0))
    }

    /// The argument of a macro: a group, or one token, of a number its first digit.
    fn argument(&mut self) -> Option<Expr> {
        if let Some(Token::Number(literal)) = self.tokens.get_mut(self.at)
            && literal.is_integer()
            && literal.whole.len() > 1
        {
            let rest = literal.whole.split_off(1);
            let digit = std::mem::replace(&mut literal.whole, rest);
            return Some(Expr::Number(BigRational::from_integer(digit.parse().ok()?)));
        }
        self.deeper(Self::atom)
    }

    fn root(&mut self) -> Option<Expr> {
        let mut degree = 2;
        if self.take('[') {
            let Some(Token::Number(literal)) = self.peek() else { return None };
            degree = literal.whole.parse().ok().filter(|n| literal.is_integer() && *n >= 2)?;
            self.at += 1;
            self.expect(']')?;
        }
        let radicand = self.argument()?;
        Some(Expr::Root(radicand.into(), degree))
    }

    /// The argument of a function: a bracket, or the factors up to the next function or sign.
    fn call(&mut self, function: Function) -> Option<Expr> {
        let mut power = None;
        if self.take('^') {
            power = Some(self.deeper(Self::exponent)?);
        }
        let argument = self.operand()?;
        let inverse = Expr::Negative(Expr::Number(One::one()).into());
        let call = |function: Function| Expr::Call(function, argument.into());
        match (power, function) {
            (None, _) => Some(call(function)),
            (Some(power), Function::Sin) if power == inverse => Some(call(Function::Arcsin)),
            (Some(power), Function::Cos) if power == inverse => Some(call(Function::Arccos)),
            (Some(power), Function::Tan) if power == inverse => Some(call(Function::Arctan)),
            (Some(power), _) => Some(Expr::Power(call(function).into(), power.into())),
        }
    }

    fn operand(&mut self) -> Option<Expr> {
        if matches!(self.sign(), Some('(' | '[' | '{' | '|')) {
            let atom = self.deeper(Self::atom)?;
            return match self.sign() {
                Some(DEGREE) => self.suffixes(atom),
                _ => Some(atom),
            };
        }
        let mut factors = vec![self.deeper(Self::factor)?];
        while self.starts_factor()
            && !matches!(self.peek(), Some(Token::Function(_) | Token::Log | Token::Sign(_)))
        {
            factors.push(self.deeper(Self::factor)?);
        }
        Some(product_of(factors))
    }

    fn log(&mut self) -> Option<Expr> {
        if !self.take('_') {
            return self.call(Function::Ln);
        }
        // As in LaTeX, a base without braces is one digit; plain text writes `log_10`.
        let base = match self.peek() {
            Some(Token::Number(literal)) if literal.whole == "10" => self.deeper(Self::atom)?,
            _ => self.argument()?,
        };
        let argument = self.operand()?;
        Some(Expr::Log(base.into(), argument.into()))
    }

    fn matrix(&mut self) -> Option<Expr> {
        let mut rows = vec![Vec::new()];
        loop {
            let item = self.apart(Self::sum)?;
            rows.last_mut()?.push(item);
            match self.peek()?.clone() {
                Token::Sign('&') => self.at += 1,
                Token::Sign(ROW) => {
                    self.at += 1;
                    if self.peek() == Some(&Token::MatrixEnd) {
                        break;
                    }
                    rows.push(Vec::new());
                }
                Token::MatrixEnd => break,
                _ => return None,
            }
        }
        self.at += 1;
        Some(Expr::Matrix(rows))
    }
}

fn sum_of(mut terms: Vec<Expr>) -> Expr {
    match terms.len() {
        0 => Expr::Number(BigRational::zero()),
        1 => terms.remove(0),
        _ => unit_outside(terms, Expr::Sum),
    }
}

fn product_of(mut factors: Vec<Expr>) -> Expr {
    match factors.len() {
        1 => factors.remove(0),
        _ => unit_outside(factors, Expr::Product),
    }
}

/// `2 pi cm` is a quantity of `2 pi`: a unit at the end belongs to the whole.
fn unit_outside(mut parts: Vec<Expr>, join: fn(Vec<Expr>) -> Expr) -> Expr {
    match parts.pop() {
        Some(Expr::Quantity(value, unit)) => {
            parts.push(*value);
            Expr::Quantity(join(parts).into(), unit)
        }
        last => {
            parts.extend(last);
            join(parts)
        }
    }
}

/// The negative, with units, percent and degree signs left outside.
fn negative(value: Expr) -> Expr {
    match value {
        Expr::Quantity(value, unit) => Expr::Quantity(negative(*value).into(), unit),
        Expr::Percent(value) => Expr::Percent(negative(*value).into()),
        Expr::Degrees(value) => Expr::Degrees(negative(*value).into()),
        other => Expr::Negative(other.into()),
    }
}

/// The exact value of a literal; `None` if it has too many digits.
fn rational(literal: &Literal) -> Option<BigRational> {
    let fraction = literal.fraction.as_deref().unwrap_or("");
    let digits = literal.whole.len() + fraction.len() + literal.repeating.len();
    if digits == 0 || digits + literal.exponent.unsigned_abs() as usize > MAX_DIGITS {
        return None;
    }
    let integer = |digits: String| digits.parse::<BigInt>().ok();
    let tens = |n: usize| num_traits::pow(BigInt::from(10), n);
    let plain = integer(format!("0{}{fraction}", literal.whole))?;
    let mut value = BigRational::new(plain, tens(fraction.len()));
    if !literal.repeating.is_empty() {
        let nines = tens(literal.repeating.len()) - BigInt::one();
        let period = BigRational::new(integer(literal.repeating.clone())?, nines);
        value += period / BigRational::from_integer(tens(fraction.len()));
    }
    let power = BigRational::from_integer(tens(literal.exponent.unsigned_abs() as usize));
    Some(if literal.exponent < 0 { value / power } else { value * power })
}
