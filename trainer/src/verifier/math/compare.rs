//! Whether two trees are the same answer.
//!
//! Constants and polynomials are compared by their exact forms; what has none is evaluated at several
//! points. Sets and lists have no order, tuples and intervals do. A unit, a percent sign or `x =` that
//! only one side has is not held against it; different units are. Leaves out conversion of units.

use num_traits::ToPrimitive;

use super::exact::form;
use super::expression::{Expr, Relation};
use super::fuel::Fuel;
use super::numeric::{Complex, Point, value};

/// Items of a collection that are matched in any order; longer ones are compared as they stand.
const MAX_UNORDERED: usize = 64;
/// Points at which expressions with variables are compared.
const POINTS: u64 = 8;
/// Points at which both sides have to be finite.
const MIN_FINITE: usize = 4;
/// Relative difference of values that count as the same.
const TOLERANCE: f64 = 1e-10;
/// Values below this are compared absolutely.
const SMALL: f64 = 1e-2;
/// A rational with a larger denominator is not what an expression without exact form is.
const MAX_DENOMINATOR: u64 = 10_000_000;
/// Collections within one another.
const MAX_DEPTH: usize = 16;

/// How a `±` is read.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Signs {
    /// As two values.
    Both,
    Plus,
    Minus,
}

/// An expression and how its `±` is read.
#[derive(Clone, Copy)]
struct Item<'a> {
    expr: &'a Expr,
    signs: Signs,
}

/// Whether `a` and `b` are the same answer.
pub(super) fn same(a: &Expr, b: &Expr, fuel: &mut Fuel) -> bool {
    let item = |expr| Item { expr, signs: Signs::Both };
    Comparison { fuel, depth: 0 }.same(item(a), item(b))
}

struct Comparison<'a> {
    fuel: &'a mut Fuel,
    depth: usize,
}

impl<'e> Item<'e> {
    fn of(self, expr: &'e Expr) -> Self {
        Self { expr, ..self }
    }

    fn minus(self) -> bool {
        self.signs == Signs::Minus
    }
}

impl Comparison<'_> {
    fn same(&mut self, a: Item<'_>, b: Item<'_>) -> bool {
        if self.depth == MAX_DEPTH || self.fuel.take(1).is_none() {
            return false;
        }
        self.depth += 1;
        let same = self.same_structure(a, b);
        self.depth -= 1;
        same
    }

    fn same_structure(&mut self, a: Item<'_>, b: Item<'_>) -> bool {
        match (a.expr, b.expr) {
            (Expr::Relation(..), Expr::Relation(..)) => self.same_relation(a, b),
            (Expr::Relation(..), _) => stated(a).is_some_and(|(_, a)| self.same(a, b)),
            (_, Expr::Relation(..)) => stated(b).is_some_and(|(_, b)| self.same(a, b)),
            (Expr::Words(a), Expr::Words(b)) => a == b,
            (Expr::Quantity(x, u), Expr::Quantity(y, v)) => {
                same_unit(u, v) && self.same(a.of(x), b.of(y))
            }
            (Expr::Quantity(x, _), _) => self.same(a.of(x), b),
            (_, Expr::Quantity(y, _)) => self.same(a, b.of(y)),
            (Expr::Percent(x), Expr::Percent(y)) | (Expr::Degrees(x), Expr::Degrees(y)) => {
                self.same(a.of(x), b.of(y))
            }
            (Expr::Percent(x) | Expr::Degrees(x), _) => {
                self.same(a.of(x), b) || self.same_value(a, b)
            }
            (_, Expr::Percent(y) | Expr::Degrees(y)) => {
                self.same(a, b.of(y)) || self.same_value(a, b)
            }
            (Expr::Tuple(open, x, close), Expr::Tuple(other, y, end)) => {
                (open, close) == (other, end) && self.same_in_order(a, b, (x, y))
            }
            (Expr::Matrix(x), Expr::Matrix(y)) => {
                let rows = || x.iter().zip(y);
                x.len() == y.len() && rows().all(|(x, y)| self.same_in_order(a, b, (x, y)))
            }
            (Expr::Union(x), Expr::Union(y)) => self.matched(&parts(a, x), &parts(b, y)),
            _ => match (members(a), members(b)) {
                (None, None) => self.same_value(a, b),
                (x, y) => {
                    self.matched(&x.unwrap_or_else(|| vec![a]), &y.unwrap_or_else(|| vec![b]))
                }
            },
        }
    }

    fn same_in_order(&mut self, a: Item<'_>, b: Item<'_>, (x, y): (&[Expr], &[Expr])) -> bool {
        x.len() == y.len() && x.iter().zip(y).all(|(x, y)| self.same(a.of(x), b.of(y)))
    }

    /// Whether the items can be paired, in any order.
    fn matched(&mut self, a: &[Item<'_>], b: &[Item<'_>]) -> bool {
        if a.len() != b.len() {
            return false;
        }
        if a.len() > MAX_UNORDERED {
            return a.iter().zip(b).all(|(x, y)| self.same(*x, *y));
        }
        // Sameness is transitive, so it does not matter which of several partners is taken.
        let mut free: Vec<Item<'_>> = b.to_vec();
        a.iter().all(|x| {
            let partner = free.iter().position(|y| self.same(*x, *y));
            partner.is_some_and(|at| {
                free.swap_remove(at);
                true
            })
        })
    }

    fn same_relation(&mut self, a: Item<'_>, b: Item<'_>) -> bool {
        if let (Some((name, x)), Some((other, y))) = (stated(a), stated(b))
            && self.same(name, other)
        {
            return self.same(x, y);
        }
        let (Expr::Relation(x, f), Expr::Relation(y, g)) = (a.expr, b.expr) else { return false };
        if f == g && self.same_in_order(a, b, (x, y)) {
            return true;
        }
        let mirrored: Vec<Relation> = g.iter().rev().map(|r| r.mirrored()).collect();
        let reversed: Vec<Expr> = y.iter().rev().cloned().collect();
        if *f == mirrored && self.same_in_order(a, b, (x, &reversed)) {
            return true;
        }
        let equations = *f == [Relation::Equal] && *g == [Relation::Equal];
        equations && self.proportional((a, x), (b, y))
    }

    /// Whether left minus right of both equations differ by a constant factor.
    fn proportional(&mut self, (a, x): (Item<'_>, &[Expr]), (b, y): (Item<'_>, &[Expr])) -> bool {
        let (mut ratio, mut finite) = (None, 0);
        for index in 0..POINTS {
            let mut difference = |item: Item<'_>, sides: &[Expr]| {
                let point = Point { index, minus: item.minus() };
                value(&sides[0], point, self.fuel).minus(value(&sides[1], point, self.fuel))
            };
            let (d, e) = (difference(a, x), difference(b, y));
            if !(d.is_finite() && e.is_finite()) || d.size() < SMALL || e.size() < SMALL {
                continue;
            }
            finite += 1;
            let here = d.over(e);
            if !close(*ratio.get_or_insert(here), here) {
                return false;
            }
        }
        finite >= MIN_FINITE
    }

    /// Whether two expressions without structure have the same value.
    fn same_value(&mut self, a: Item<'_>, b: Item<'_>) -> bool {
        let forms = (form(a.expr, a.minus(), self.fuel), form(b.expr, b.minus(), self.fuel));
        match &forms {
            (Some(x), Some(y)) => return x == y,
            (Some(known), None) | (None, Some(known)) => {
                // A rounded decimal is not the irrational number that it is close to.
                let long =
                    |denominator: Option<u64>| denominator.is_none_or(|d| d > MAX_DENOMINATOR);
                if known.as_rational().is_some_and(|value| long(value.denom().to_u64())) {
                    return false;
                }
            }
            (None, None) => {}
        }
        let mut finite = 0;
        for index in 0..POINTS {
            let x = value(a.expr, Point { index, minus: a.minus() }, self.fuel);
            let y = value(b.expr, Point { index, minus: b.minus() }, self.fuel);
            if x.is_finite() && y.is_finite() {
                finite += 1;
                if !close(x, y) {
                    return false;
                }
            }
        }
        finite >= MIN_FINITE
    }
}

fn close(x: Complex, y: Complex) -> bool {
    x.minus(y).size() <= TOLERANCE * x.size().max(y.size()).max(SMALL)
}

/// What `x = ...` or `x in ...` names and states.
fn stated(item: Item<'_>) -> Option<(Item<'_>, Item<'_>)> {
    let Expr::Relation(sides, relations) = item.expr else { return None };
    let stating = relations.iter().all(|r| matches!(r, Relation::Equal | Relation::Within));
    let (name, last) = (sides.first()?, sides.last()?);
    (stating && is_name(name)).then(|| (item.of(name), item.of(last)))
}

/// Whether an expression is a name: `x`, `f(x)`, `(x, y)`.
fn is_name(expr: &Expr) -> bool {
    let variable = |part: &Expr| matches!(part, Expr::Variable(_) | Expr::Words(_));
    match expr {
        Expr::Product(parts) => parts.len() == 2 && parts.iter().all(variable),
        Expr::Tuple('(', parts, ')') => parts.iter().all(variable),
        other => variable(other),
    }
}

/// Singular and plural of a unit are the same.
fn same_unit(a: &str, b: &str) -> bool {
    let stem = |unit: &str| unit.trim().trim_end_matches('s').to_owned();
    stem(a) == stem(b)
}

fn parts<'e>(item: Item<'e>, parts: &'e [Expr]) -> Vec<Item<'e>> {
    parts.iter().map(|part| item.of(part)).collect()
}

/// The members of a set, a list, or a value with `±`.
fn members(item: Item<'_>) -> Option<Vec<Item<'_>>> {
    let both = |expr| [Signs::Plus, Signs::Minus].map(|signs| Item { expr, signs });
    let two = |expr: &Expr| item.signs == Signs::Both && has_two_signs(expr, 0);
    match item.expr {
        Expr::Set(all) => {
            let spread = |expr| match two(expr) {
                true => both(expr).to_vec(),
                false => vec![item.of(expr)],
            };
            Some(all.iter().flat_map(spread).collect())
        }
        expr if two(expr) => Some(both(expr).to_vec()),
        _ => None,
    }
}

/// Whether a value has a `±`, as far as it is looked for: not within functions.
fn has_two_signs(expr: &Expr, depth: usize) -> bool {
    let inner = |expr: &Expr| depth < MAX_DEPTH && has_two_signs(expr, depth + 1);
    match expr {
        Expr::PlusMinus(..) => true,
        Expr::Negative(x) | Expr::Percent(x) | Expr::Degrees(x) | Expr::Quantity(x, _) => inner(x),
        Expr::Sum(parts) | Expr::Product(parts) => parts.iter().any(inner),
        Expr::Quotient(above, below) => inner(above) || inner(below),
        _ => false,
    }
}
