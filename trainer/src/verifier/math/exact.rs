//! The exact normal form: sums of rational multiples of products of radicals, `pi`, `e`, `i`,
//! logarithms of primes, and variables.
//!
//! A radical is a product of primes to powers in (0, 1); such products are linearly independent over
//! the rationals (Besicovitch, "On the linear independence of fractional powers of integers", 1940),
//! so two constants made of them are equal only if their forms are. Everything is bounded, in the size
//! of numbers, in terms and in work: what exceeds a bound has no form. Leaves out quotients by sums,
//! roots of sums and trigonometric functions.

use std::collections::BTreeMap;

use num_bigint::BigInt;
use num_rational::{BigRational, Rational64};
use num_traits::{CheckedAdd, CheckedMul, One, Pow, Signed, ToPrimitive, Zero};

use super::expression::{Constant, Expr, Function};
use super::fuel::Fuel;

/// Bits of a numerator or denominator.
const MAX_BITS: u64 = 4096;
/// Terms of a form.
const MAX_TERMS: usize = 256;
/// Numerator and denominator of exponents.
const MAX_EXPONENT: i64 = 5000;
/// Largest argument of a factorial or binomial coefficient.
const MAX_FACTORIAL: u32 = 500;
/// Divisors tried when a radicand is taken apart.
const MAX_DIVISOR: u64 = 2000;

/// What is not rational about a term.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Atom {
    Prime(u64),
    Pi,
    E,
    /// Exponent 1 only.
    I,
    LogPrime(u64),
    Variable(String),
}

/// Atoms and their exponents, none of which is 0.
type Monomial = BTreeMap<Atom, Rational64>;

/// A value in normal form: coefficients, none of which is 0, of monomials.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Form(BTreeMap<Monomial, BigRational>);

/// The form of `expr`, or `None`. `minus` says how `±` is read.
pub(super) fn form(expr: &Expr, minus: bool, fuel: &mut Fuel) -> Option<Form> {
    Reader { minus, fuel }.form(expr)
}

struct Reader<'a> {
    minus: bool,
    fuel: &'a mut Fuel,
}

impl Reader<'_> {
    fn form(&mut self, expr: &Expr) -> Option<Form> {
        self.fuel.take(1)?;
        match expr {
            Expr::Number(value) => Form::rational(value.clone()),
            Expr::Constant(constant) => Some(Form::constant(*constant)),
            Expr::Variable(name) => Some(Form::atom(Atom::Variable(name.clone()))),
            Expr::Negative(value) => self.form(value)?.scaled(&-BigRational::one()),
            Expr::Sum(terms) => {
                let mut sum = Form(BTreeMap::new());
                for term in terms {
                    let term = self.form(term)?;
                    sum.add(term, self.fuel)?;
                }
                Some(sum)
            }
            Expr::PlusMinus(left, right) => {
                let (mut sum, right) = (self.form(left)?, self.form(right)?);
                let sign = BigRational::from_integer(if self.minus { -1 } else { 1 }.into());
                sum.add(right.scaled(&sign)?, self.fuel)?;
                Some(sum)
            }
            Expr::Product(factors) => {
                let mut product = Form::rational(BigRational::one())?;
                for factor in factors {
                    let factor = self.form(factor)?;
                    product = product.times(&factor, self.fuel)?;
                }
                Some(product)
            }
            Expr::Quotient(above, below) => {
                let (above, below) = (self.form(above)?, self.form(below)?);
                above.times(&below.inverse()?, self.fuel)
            }
            Expr::Power(base, exponent) => {
                let (base, exponent) = (self.form(base)?, self.form(exponent)?);
                base.power(exponent.small_rational()?, self.fuel)
            }
            Expr::Root(radicand, degree) => {
                let radicand = self.form(radicand)?;
                let exponent = Rational64::new(1, i64::from(*degree));
                match radicand.as_rational() {
                    // The root of odd degree that is real.
                    Some(value) if value.is_negative() && degree % 2 == 1 => {
                        let positive = Form::rational(-value)?.power(exponent, self.fuel)?;
                        positive.scaled(&-BigRational::one())
                    }
                    _ => radicand.power(exponent, self.fuel),
                }
            }
            _ => self.rest(expr),
        }
    }

    fn rest(&mut self, expr: &Expr) -> Option<Form> {
        let over = |form: Form, n: i64| form.scaled(&BigRational::new(1.into(), n.into()));
        match expr {
            Expr::Percent(value) => over(self.form(value)?, 100),
            Expr::Degrees(value) => {
                let pi = Form::atom(Atom::Pi);
                over(self.form(value)?.times(&pi, self.fuel)?, 180)
            }
            Expr::Quantity(value, _) => self.form(value),
            Expr::Log(base, argument) => {
                let (base, argument) = (self.form(base)?.ln()?, self.form(argument)?.ln()?);
                argument.times(&base.inverse()?, self.fuel)
            }
            Expr::Binomial(n, k) => {
                let (n, k) = (self.form(n)?.small_integer()?, self.form(k)?.small_integer()?);
                let factors = (0..k.min(n.saturating_sub(k))).map(|i| (n - i, i + 1));
                self.fuel.take(n.into())?;
                let step = |value: BigInt, (above, below): (u32, u32)| value * above / below;
                let value = if k > n { BigInt::zero() } else { factors.fold(1.into(), step) };
                Form::rational(BigRational::from_integer(value))
            }
            Expr::Call(function, argument) => {
                let argument = self.form(argument)?;
                self.call(*function, argument)
            }
            _ => None,
        }
    }

    fn call(&mut self, function: Function, argument: Form) -> Option<Form> {
        let value = argument.as_rational();
        match function {
            Function::Ln => argument.ln(),
            Function::Exp => Form::atom(Atom::E).power(argument.small_rational()?, self.fuel),
            Function::Abs => Form::rational(value?.abs()),
            Function::Floor => Form::rational(value?.floor()),
            Function::Ceil => Form::rational(value?.ceil()),
            Function::Factorial => {
                let n = argument.small_integer()?;
                self.fuel.take(n.into())?;
                let value = (1..=n).fold(BigInt::one(), |product, i| product * i);
                Form::rational(BigRational::from_integer(value))
            }
            _ => None,
        }
    }
}

impl Form {
    fn rational(value: BigRational) -> Option<Self> {
        (bits(&value) <= MAX_BITS).then(|| Self::term(Monomial::new(), value))
    }

    fn term(monomial: Monomial, coefficient: BigRational) -> Self {
        let term = (!coefficient.is_zero()).then_some((monomial, coefficient));
        Self(term.into_iter().collect())
    }

    fn atom(atom: Atom) -> Self {
        Self::term(Monomial::from([(atom, Rational64::one())]), BigRational::one())
    }

    fn constant(constant: Constant) -> Self {
        Self::atom(match constant {
            Constant::Pi => Atom::Pi,
            Constant::E => Atom::E,
            Constant::I => Atom::I,
            Constant::Infinity => Atom::Variable("infinity".to_owned()),
        })
    }

    /// The value, if it is rational.
    pub(super) fn as_rational(&self) -> Option<BigRational> {
        match self.0.len() {
            0 => Some(BigRational::zero()),
            _ => self.single().filter(|(m, _)| m.is_empty()).map(|(_, value)| value.clone()),
        }
    }

    fn single(&self) -> Option<(&Monomial, &BigRational)> {
        self.0.first_key_value().filter(|_| self.0.len() == 1)
    }

    fn small_rational(&self) -> Option<Rational64> {
        let value = self.as_rational()?;
        bounded(Rational64::new(value.numer().to_i64()?, value.denom().to_i64()?))
    }

    fn small_integer(&self) -> Option<u32> {
        let value = self.as_rational().filter(BigRational::is_integer)?;
        value.numer().to_u32().filter(|n| *n <= MAX_FACTORIAL)
    }

    fn scaled(mut self, factor: &BigRational) -> Option<Self> {
        for value in self.0.values_mut() {
            *value *= factor;
        }
        self.within_bounds()
    }

    fn within_bounds(self) -> Option<Self> {
        let fits = self.0.len() <= MAX_TERMS && self.0.values().all(|v| bits(v) <= MAX_BITS);
        fits.then_some(self)
    }

    fn add(&mut self, other: Self, fuel: &mut Fuel) -> Option<()> {
        for (monomial, value) in other.0 {
            fuel.take(1 + cost(&value))?;
            let slot = self.0.entry(monomial.clone()).or_insert_with(BigRational::zero);
            *slot += value;
            match slot.is_zero() {
                true => drop(self.0.remove(&monomial)),
                false if bits(slot) > MAX_BITS => return None,
                false => {}
            }
        }
        (self.0.len() <= MAX_TERMS).then_some(())
    }

    fn times(&self, other: &Self, fuel: &mut Fuel) -> Option<Self> {
        let mut product = Self(BTreeMap::new());
        for (left, a) in &self.0 {
            for (right, b) in &other.0 {
                fuel.take(2 + cost(a) + cost(b))?;
                let (monomial, factor) = join(left, right)?;
                product.add(Self::term(monomial, a * b * factor), fuel)?;
            }
        }
        product.within_bounds()
    }

    /// One over a single term.
    fn inverse(&self) -> Option<Self> {
        let (monomial, value) = self.single()?;
        let mut inverse = Self::term(Monomial::new(), value.recip());
        // A lone fuel of its own: one term has few atoms.
        let mut fuel = Fuel::new(1000);
        for (atom, exponent) in monomial {
            let turned = match atom {
                Atom::I => Self::atom(Atom::I).scaled(&-BigRational::one())?,
                _ => {
                    let (monomial, factor) = settled(atom, -*exponent)?;
                    Self::term(monomial, factor)
                }
            };
            inverse = inverse.times(&turned, &mut fuel)?;
        }
        Some(inverse)
    }

    fn power(&self, exponent: Rational64, fuel: &mut Fuel) -> Option<Self> {
        if exponent.is_negative() {
            return self.inverse()?.power(-exponent, fuel);
        }
        if exponent.is_integer() {
            return self.whole_power(exponent.to_u32()?, fuel);
        }
        if self.0.is_empty() {
            return Some(self.clone());
        }
        let (monomial, value) = self.single()?;
        let mut power = match value.is_negative() {
            false => Self::rational(BigRational::one())?,
            true if *exponent.denom() == 2 => {
                Self::atom(Atom::I).whole_power(exponent.numer().to_u32()?, fuel)?
            }
            true => return None,
        };
        let mut atoms: Vec<(Atom, Rational64)> = monomial.clone().into_iter().collect();
        atoms.extend(factors(value.numer().abs().to_u64()?, 1, fuel)?);
        atoms.extend(factors(value.denom().to_u64()?, -1, fuel)?);
        for (atom, old) in atoms {
            // Of anything else a root may be negative or complex.
            if !matches!(atom, Atom::Prime(_) | Atom::Pi | Atom::E) {
                return None;
            }
            let (monomial, factor) = settled(&atom, bounded(old.checked_mul(&exponent)?)?)?;
            power = power.times(&Self::term(monomial, factor), fuel)?;
        }
        Some(power)
    }

    fn whole_power(&self, exponent: u32, fuel: &mut Fuel) -> Option<Self> {
        if let Some(value) = self.as_rational() {
            let small = value.is_zero() || value.numer().magnitude().is_one();
            let small = small && value.denom().is_one();
            if !small && bits(&value).checked_mul(exponent.into())? > 2 * MAX_BITS {
                return None;
            }
            fuel.take(32)?;
            return Self::rational(Pow::pow(value, exponent));
        }
        if i64::from(exponent) > MAX_EXPONENT {
            return None;
        }
        let (mut power, mut square) = (Self::rational(BigRational::one())?, self.clone());
        let mut left = exponent;
        while left > 0 {
            if left % 2 == 1 {
                power = power.times(&square, fuel)?;
            }
            left /= 2;
            if left > 0 {
                square = square.times(&square, fuel)?;
            }
        }
        Some(power)
    }

    /// The natural logarithm of a positive constant that is one term.
    fn ln(&self) -> Option<Self> {
        let (monomial, value) = self.single()?;
        if !value.is_positive() {
            return None;
        }
        let mut fuel = Fuel::new(2 * MAX_DIVISOR);
        let mut atoms: Vec<(Atom, Rational64)> = monomial.clone().into_iter().collect();
        atoms.extend(factors(value.numer().to_u64()?, 1, &mut fuel)?);
        atoms.extend(factors(value.denom().to_u64()?, -1, &mut fuel)?);
        let mut sum = Self(BTreeMap::new());
        for (atom, exponent) in atoms {
            let (numer, denom) = (BigInt::from(*exponent.numer()), BigInt::from(*exponent.denom()));
            let ln = match atom {
                Atom::Prime(p) => Self::atom(Atom::LogPrime(p)),
                Atom::E => Self::rational(BigRational::one())?,
                _ => return None,
            };
            sum.add(ln.scaled(&BigRational::new(numer, denom))?, &mut fuel)?;
        }
        Some(sum)
    }
}

/// The product of two monomials: a monomial and a rational factor.
fn join(left: &Monomial, right: &Monomial) -> Option<(Monomial, BigRational)> {
    let (mut product, mut factor) = (left.clone(), BigRational::one());
    for (atom, exponent) in right {
        let old = product.remove(atom).unwrap_or_else(Rational64::zero);
        let (settled, more) = settled(atom, bounded(old.checked_add(exponent)?)?)?;
        product.extend(settled);
        factor *= more;
    }
    Some((product, factor))
}

/// `atom^exponent` with the rational part taken out.
fn settled(atom: &Atom, exponent: Rational64) -> Option<(Monomial, BigRational)> {
    let (left, factor) = match atom {
        Atom::Prime(p) => {
            let whole = exponent.floor();
            let power = i32::try_from(*whole.numer()).ok().filter(|n| n.abs() <= 64)?;
            let base = BigRational::from_integer((*p).into());
            (exponent - whole, Pow::pow(base, power))
        }
        Atom::I => {
            let turns = exponent.to_i64()?.rem_euclid(4);
            let sign = if turns >= 2 { -1 } else { 1 };
            (Rational64::from_integer(turns % 2), BigRational::from_integer(sign.into()))
        }
        _ => (exponent, BigRational::one()),
    };
    let monomial = (!left.is_zero()).then(|| (atom.clone(), left));
    Some((monomial.into_iter().collect(), factor))
}

/// The primes of `n`, with their exponents times `sign`; `None` if one might be large.
fn factors(mut n: u64, sign: i64, fuel: &mut Fuel) -> Option<Vec<(Atom, Rational64)>> {
    fuel.take(20)?;
    let mut found = Vec::new();
    let mut divisor = 2;
    while n > 1 {
        if divisor * divisor > n {
            divisor = n;
        } else if divisor > MAX_DIVISOR {
            return None;
        }
        let mut count = 0;
        while n.is_multiple_of(divisor) {
            n /= divisor;
            count += sign;
        }
        if count != 0 {
            found.push((Atom::Prime(divisor), Rational64::from_integer(count)));
        }
        divisor += if divisor == 2 { 1 } else { 2 };
    }
    Some(found)
}

fn bounded(exponent: Rational64) -> Option<Rational64> {
    let fits = |n: i64| n.checked_abs().is_some_and(|n| n <= MAX_EXPONENT);
    (fits(*exponent.numer()) && fits(*exponent.denom())).then_some(exponent)
}

fn bits(value: &BigRational) -> u64 {
    value.numer().bits().max(value.denom().bits())
}

/// Fuel for an operation on `value`: reducing fractions takes up to the square of their length.
fn cost(value: &BigRational) -> u64 {
    bits(value) / 16 + (bits(value) / 128).pow(2) / 4
}
