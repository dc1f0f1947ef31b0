//! What the parser reads: a tree of numbers, operations and the collections answers come in.
//!
//! Nothing is simplified here, so that a percentage or a unit can still be told from its value.

use num_rational::BigRational;

/// A piece of mathematics.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Expr {
    /// An exact rational; decimals are exact as they are written.
    Number(BigRational),
    /// A named constant.
    Constant(Constant),
    /// A variable, or a letter of Greek.
    Variable(String),
    /// The negative.
    Negative(Box<Self>),
    /// Terms.
    Sum(Vec<Self>),
    /// Factors.
    Product(Vec<Self>),
    /// Numerator and denominator.
    Quotient(Box<Self>, Box<Self>),
    /// Base and exponent.
    Power(Box<Self>, Box<Self>),
    /// Radicand and degree.
    Root(Box<Self>, u32),
    /// A function of one argument.
    Call(Function, Box<Self>),
    /// Base, then argument.
    Log(Box<Self>, Box<Self>),
    /// Out of how many, how many are taken.
    Binomial(Box<Self>, Box<Self>),
    /// Both the first plus and the first minus the second.
    PlusMinus(Box<Self>, Box<Self>),
    /// Hundredths.
    Percent(Box<Self>),
    /// Degrees of an angle.
    Degrees(Box<Self>),
    /// A quantity in a unit.
    Quantity(Box<Self>, String),
    /// A set in braces, or items with nothing around them; order does not count.
    Set(Vec<Self>),
    /// Two items or more between brackets, which may be mixed: a tuple or an interval.
    Tuple(char, Vec<Self>, char),
    /// Rows of a matrix.
    Matrix(Vec<Vec<Self>>),
    /// Sets that are joined; order does not count.
    Union(Vec<Self>),
    /// Sides, and the relation between each and the next.
    Relation(Vec<Self>, Vec<Relation>),
    /// Words.
    Words(String),
}

/// Named constants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Constant {
    Pi,
    E,
    I,
    Infinity,
}

/// Functions of one argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Function {
    Sin,
    Cos,
    Tan,
    Cot,
    Sec,
    Csc,
    Arcsin,
    Arccos,
    Arctan,
    Sinh,
    Cosh,
    Tanh,
    Exp,
    Ln,
    Abs,
    Floor,
    Ceil,
    Factorial,
}

/// Relations between two sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Relation {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
    Within,
}

impl Relation {
    /// The same relation read from the other side.
    pub(super) fn mirrored(self) -> Self {
        match self {
            Self::Less => Self::Greater,
            Self::LessOrEqual => Self::GreaterOrEqual,
            Self::Greater => Self::Less,
            Self::GreaterOrEqual => Self::LessOrEqual,
            other => other,
        }
    }
}

impl Function {
    /// The function of a name, as LaTeX (without the backslash) or plain text writes it.
    pub(super) fn named(name: &str) -> Option<Self> {
        Some(match name {
            "sin" => Self::Sin,
            "cos" => Self::Cos,
            "tan" | "tg" => Self::Tan,
            "cot" => Self::Cot,
            "sec" => Self::Sec,
            "csc" => Self::Csc,
            "arcsin" | "asin" => Self::Arcsin,
            "arccos" | "acos" => Self::Arccos,
            "arctan" | "atan" => Self::Arctan,
            "sinh" => Self::Sinh,
            "cosh" => Self::Cosh,
            "tanh" => Self::Tanh,
            "exp" => Self::Exp,
            "ln" | "log" => Self::Ln,
            "abs" => Self::Abs,
            "floor" => Self::Floor,
            "ceil" => Self::Ceil,
            _ => return None,
        })
    }
}
