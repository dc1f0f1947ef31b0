//! A straight line through points, by ordinary least squares. With `x = exp(entropy)` and `y` the
//! validation reward it is the paper's law `R = -a exp(H) + b` (arXiv 2505.22617): `a` is the slope
//! negated, `b` the intercept, and `b - a` the reward that is left at entropy 0.

/// A fitted line.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Line {
    /// Of `y` per unit of `x`.
    pub slope: f64,
    /// `y` at `x` = 0.
    pub intercept: f64,
    /// Share of the variance of `y` that the line explains; 1 if `y` does not vary.
    pub r2: f64,
}

/// The line through points (x, y). `None` if there are fewer than two, all `x` are equal, or a number is
/// not finite.
///
/// ```
/// use trainer::fit::fit;
/// let line = fit(&[(0.0, 1.0), (1.0, -1.0), (2.0, -3.0)]).expect("there is one");
/// assert_eq!((line.slope, line.intercept, line.r2), (-2.0, 1.0, 1.0));
/// assert_eq!(fit(&[(1.0, 2.0), (1.0, 3.0)]), None);
/// ```
pub fn fit(points: &[(f64, f64)]) -> Option<Line> {
    let n = points.len() as f64;
    if points.len() < 2 || points.iter().any(|(x, y)| !(x.is_finite() && y.is_finite())) {
        return None;
    }
    let mean_x = points.iter().map(|p| p.0).sum::<f64>() / n;
    let mean_y = points.iter().map(|p| p.1).sum::<f64>() / n;
    let sum = |of: &dyn Fn(f64, f64) -> f64| -> f64 {
        points.iter().map(|(x, y)| of(x - mean_x, y - mean_y)).sum()
    };
    let (xx, xy, yy) = (sum(&|x, _| x * x), sum(&|x, y| x * y), sum(&|_, y| y * y));
    if xx == 0.0 {
        return None;
    }
    let slope = xy / xx;
    let r2 = if yy == 0.0 { 1.0 } else { xy * xy / (xx * yy) };
    Some(Line { slope, intercept: mean_y - slope * mean_x, r2 })
}
