//! Evaluation in complex floating point, for what has no exact form.
//!
//! Functions take their principal values, so nothing is outside a domain; poles and overflow give
//! values that are not finite. Variables get values that are a function of their name and of the number
//! of the point. Leaves out collections and relations: they evaluate to NaN.

use num_traits::ToPrimitive;

use super::expression::{Constant, Expr, Function};
use super::fuel::Fuel;

/// A complex number.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Complex {
    pub(super) re: f64,
    pub(super) im: f64,
}

const NAN: Complex = Complex { re: f64::NAN, im: 0.0 };
const I: Complex = Complex { re: 0.0, im: 1.0 };

/// Where expressions are evaluated.
#[derive(Clone, Copy, Debug)]
pub(super) struct Point {
    /// Which point: each gives variables other values.
    pub(super) index: u64,
    /// How `±` is read.
    pub(super) minus: bool,
}

/// The value of `expr`; NaN when the fuel runs out.
pub(super) fn value(expr: &Expr, point: Point, fuel: &mut Fuel) -> Complex {
    if fuel.take(1).is_none() {
        return NAN;
    }
    let mut inner = |expr: &Expr| value(expr, point, fuel);
    match expr {
        Expr::Number(number) => Complex::real(number.to_f64().unwrap_or(f64::NAN)),
        Expr::Constant(constant) => match constant {
            Constant::Pi => Complex::real(std::f64::consts::PI),
            Constant::E => Complex::real(std::f64::consts::E),
            Constant::I => I,
            Constant::Infinity => variable("infinity", point.index),
        },
        Expr::Variable(name) => variable(name, point.index),
        Expr::Negative(x) => inner(x).times(Complex::real(-1.0)),
        Expr::Sum(terms) => terms.iter().fold(Complex::real(0.0), |sum, x| sum.plus(inner(x))),
        Expr::Product(all) => all.iter().fold(Complex::real(1.0), |p, x| p.times(inner(x))),
        Expr::Quotient(above, below) => inner(above).over(inner(below)),
        Expr::Power(base, exponent) => inner(base).power(inner(exponent)),
        Expr::Root(radicand, degree) => root(inner(radicand), *degree),
        Expr::Call(function, argument) => call(*function, inner(argument)),
        Expr::Log(base, argument) => {
            let base = inner(base).ln();
            inner(argument).ln().over(base)
        }
        Expr::PlusMinus(left, right) => {
            let sign = Complex::real(if point.minus { -1.0 } else { 1.0 });
            let right = inner(right).times(sign);
            inner(left).plus(right)
        }
        Expr::Percent(x) => inner(x).times(Complex::real(0.01)),
        Expr::Degrees(x) => inner(x).times(Complex::real(std::f64::consts::PI / 180.0)),
        Expr::Quantity(x, _) => inner(x),
        _ => NAN,
    }
}

/// The value of a variable: between 0.4 and 2.4 in size; of half of the points on either side of 0.
fn variable(name: &str, index: u64) -> Complex {
    let state = name.bytes().fold(0x9e37_79b9_7f4a_7c15 ^ index, |state: u64, byte| {
        (state ^ u64::from(byte)).wrapping_mul(0xbf58_476d_1ce4_e5b9).rotate_left(29)
    });
    let mixed = (state ^ (state >> 31)).wrapping_mul(0x94d0_49bb_1331_11eb);
    let size = 0.4 + 2.0 * ((mixed >> 11) as f64 / (1u64 << 53) as f64);
    let negative = index % 2 == 1 && mixed & 1 == 1;
    Complex::real(if negative { -size } else { size })
}

fn root(x: Complex, degree: u32) -> Complex {
    let exponent = Complex::real(1.0 / f64::from(degree));
    // The root of odd degree that is real.
    if degree % 2 == 1 && x.im == 0.0 && x.re < 0.0 {
        return Complex::real(-x.re).power(exponent).times(Complex::real(-1.0));
    }
    x.power(exponent)
}

fn call(function: Function, x: Complex) -> Complex {
    let one = Complex::real(1.0);
    match function {
        Function::Sin => x.sin(),
        Function::Cos => x.cos(),
        Function::Tan => x.sin().over(x.cos()),
        Function::Cot => x.cos().over(x.sin()),
        Function::Sec => one.over(x.cos()),
        Function::Csc => one.over(x.sin()),
        Function::Arcsin => x.arcsin(),
        Function::Arccos => Complex::real(std::f64::consts::FRAC_PI_2).minus(x.arcsin()),
        Function::Arctan => x.arctan(),
        Function::Sinh => x.times(I).sin().over(I),
        Function::Cosh => x.times(I).cos(),
        Function::Tanh => x.times(I).sin().over(I).over(x.times(I).cos()),
        Function::Exp => x.exp(),
        Function::Ln => x.ln(),
        Function::Abs => Complex::real(x.size()),
        Function::Floor if x.im == 0.0 => Complex::real(x.re.floor()),
        Function::Ceil if x.im == 0.0 => Complex::real(x.re.ceil()),
        Function::Factorial
            if x.im == 0.0 && x.re >= 0.0 && x.re.fract() == 0.0 && x.re < 171.0 =>
        {
            Complex::real((1..=x.re as u32).map(f64::from).product())
        }
        Function::Floor | Function::Ceil | Function::Factorial => NAN,
    }
}

impl Complex {
    fn real(re: f64) -> Self {
        Self { re, im: 0.0 }
    }

    /// Whether both parts are finite.
    pub(super) fn is_finite(self) -> bool {
        self.re.is_finite() && self.im.is_finite()
    }

    /// The absolute value.
    pub(super) fn size(self) -> f64 {
        self.re.hypot(self.im)
    }

    fn plus(self, other: Self) -> Self {
        Self { re: self.re + other.re, im: self.im + other.im }
    }

    /// The difference.
    pub(super) fn minus(self, other: Self) -> Self {
        Self { re: self.re - other.re, im: self.im - other.im }
    }

    fn times(self, other: Self) -> Self {
        Self {
            re: self.re * other.re - self.im * other.im,
            im: self.re * other.im + self.im * other.re,
        }
    }

    /// The quotient.
    pub(super) fn over(self, other: Self) -> Self {
        let norm = other.re * other.re + other.im * other.im;
        let turned = self.times(Self { re: other.re, im: -other.im });
        Self { re: turned.re / norm, im: turned.im / norm }
    }

    fn exp(self) -> Self {
        let size = self.re.exp();
        match self.im == 0.0 {
            true => Self::real(size),
            false => Self { re: size * self.im.cos(), im: size * self.im.sin() },
        }
    }

    fn ln(self) -> Self {
        Self { re: self.size().ln(), im: self.im.atan2(self.re) }
    }

    fn power(self, exponent: Self) -> Self {
        let whole = exponent.im == 0.0 && exponent.re.fract() == 0.0;
        if self.im == 0.0 && exponent.im == 0.0 && (self.re >= 0.0 || whole) {
            return Self::real(self.re.powf(exponent.re));
        }
        self.ln().times(exponent).exp()
    }

    fn sin(self) -> Self {
        Self { re: self.re.sin() * self.im.cosh(), im: self.re.cos() * self.im.sinh() }
    }

    fn cos(self) -> Self {
        Self { re: self.re.cos() * self.im.cosh(), im: -self.re.sin() * self.im.sinh() }
    }

    fn arcsin(self) -> Self {
        if self.im == 0.0 && self.re.abs() <= 1.0 {
            return Self::real(self.re.asin());
        }
        let root = Self::real(1.0).minus(self.times(self)).power(Self::real(0.5));
        self.times(I).plus(root).ln().over(I)
    }

    fn arctan(self) -> Self {
        if self.im == 0.0 {
            return Self::real(self.re.atan());
        }
        let (one, turned) = (Self::real(1.0), self.times(I));
        one.plus(turned).ln().minus(one.minus(turned).ln()).over(I.times(Self::real(2.0)))
    }
}
