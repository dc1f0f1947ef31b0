//! The fit of reward against entropy, `R = -a exp(H) + b` (arXiv 2505.22617, section 2), by ordinary
//! least squares in `x = exp(H)`.
//!
//! Intervals hold with 95 % confidence if the errors are independent, normal and of one size. The points
//! of a training curve are not quite that (neighbours resemble each other), so true intervals are
//! wider. `b - a` is the fitted reward at entropy 0, the ceiling. Textbook formulas; the quantile of
//! Student's t comes from its distribution function for whole degrees of freedom (Abramowitz and
//! Stegun, 26.7.3 and 26.7.4).

/// Confidence of all intervals.
pub const CONFIDENCE: f64 = 0.95;

/// Fewest points of a fit: with two there is nothing left to estimate the error from.
pub const MIN_POINTS: usize = 3;

/// One measurement: entropy in nats, reward.
pub type Point = (f64, f64);

/// A fitted value and half the width of its interval.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Estimate {
    /// The value.
    pub value: f64,
    /// The interval is `value - half ..= value + half`.
    pub half: f64,
}

/// A fit of `R = -a exp(H) + b`.
#[derive(Clone, Debug, PartialEq)]
pub struct Fit {
    /// Falls with entropy at this rate.
    pub a: Estimate,
    /// Intercept.
    pub b: Estimate,
    /// Share of the variance of R that is explained; 1 if R does not vary.
    pub r2: f64,
    /// Root of the mean squared residual (divided by the number of points).
    pub rmse: f64,
    /// Points fitted.
    pub points: usize,
    mean_x: f64,
    /// Sum of squared distances from `mean_x`.
    spread: f64,
    /// Standard error of a residual times the quantile of t.
    scale: f64,
}

impl Fit {
    /// Fits `points`; `None` with fewer than [`MIN_POINTS`], when entropy does not vary, or when a
    /// number is not finite.
    ///
    /// ```
    /// use trainer::fit::Fit;
    /// let points: Vec<_> = [0.1f64, 0.5, 0.9].map(|h| (h, 0.8 - 0.2 * h.exp())).to_vec();
    /// let fit = Fit::new(&points).unwrap();
    /// assert!((fit.ceiling().value - 0.6).abs() < 1e-12);
    /// ```
    pub fn new(points: &[Point]) -> Option<Self> {
        let n = points.len() as f64;
        if points.len() < MIN_POINTS {
            return None;
        }
        let mean_x = points.iter().map(|(h, _)| h.exp()).sum::<f64>() / n;
        let mean_r = points.iter().map(|(_, r)| r).sum::<f64>() / n;
        let sum = |of: &dyn Fn(f64, f64) -> f64| {
            points.iter().map(|(h, r)| of(h.exp() - mean_x, r - mean_r)).sum::<f64>()
        };
        let (spread, total) = (sum(&|x, _| x * x), sum(&|_, r| r * r));
        // Below this the differences of exp(H) are rounding.
        if spread <= (1e-12 * mean_x).powi(2) || !(spread + total).is_finite() {
            return None;
        }
        let slope = sum(&|x, r| x * r) / spread;
        let residual = sum(&|x, r| (r - slope * x).powi(2));
        let t = student_t(CONFIDENCE, points.len() - 2);
        let scale = t * (residual / (n - 2.0)).sqrt();
        let half_at = |x: f64| scale * (1.0 / n + (x - mean_x).powi(2) / spread).sqrt();
        Some(Self {
            a: Estimate { value: -slope, half: scale / spread.sqrt() },
            b: Estimate { value: mean_r - slope * mean_x, half: half_at(0.0) },
            r2: if total > 0.0 { 1.0 - residual / total } else { 1.0 },
            rmse: (residual / n).sqrt(),
            points: points.len(),
            mean_x,
            spread,
            scale,
        })
    }

    /// The mean reward at an entropy, in nats; its interval over all entropies is the band.
    pub fn at(&self, entropy: f64) -> Estimate {
        let x = entropy.exp();
        let distance = (x - self.mean_x).powi(2) / self.spread;
        Estimate {
            value: self.b.value - self.a.value * x,
            half: self.scale * (1.0 / self.points as f64 + distance).sqrt(),
        }
    }

    /// The reward at entropy 0: `b - a`.
    pub fn ceiling(&self) -> Estimate {
        self.at(0.0)
    }

    /// Root of the mean squared error of the fit on other points; `None` without any.
    pub fn rmse_on(&self, points: &[Point]) -> Option<f64> {
        let square = |(h, r): &Point| (r - self.at(*h).value).powi(2);
        let n = points.len() as f64;
        (!points.is_empty()).then(|| (points.iter().map(square).sum::<f64>() / n).sqrt())
    }
}

/// The `t` with `P(|T| <= t) = confidence` for Student's t with `freedom` degrees of freedom.
///
/// # Panics
/// If `freedom` is 0 or `confidence` is not inside 0 to 1.
pub fn student_t(confidence: f64, freedom: usize) -> f64 {
    assert!(freedom > 0 && confidence > 0.0 && confidence < 1.0, "{confidence} of {freedom}");
    let (mut low, mut high) = (0.0, std::f64::consts::FRAC_PI_2);
    // Each round halves the interval: after 60 it is as narrow as an f64 can tell.
    for _ in 0..60 {
        let middle = 0.5 * (low + high);
        if central_share(middle, freedom) < confidence {
            low = middle;
        } else {
            high = middle;
        }
    }
    low.tan() * (freedom as f64).sqrt()
}

/// `P(|T| <= tan(angle) sqrt(freedom))`, as a sum over even or odd powers of the cosine.
fn central_share(angle: f64, freedom: usize) -> f64 {
    let (sin, cos) = angle.sin_cos();
    let odd = freedom % 2;
    let mut term = if odd == 1 { cos } else { 1.0 };
    let mut sum = if freedom == 1 { 0.0 } else { term };
    // The factor from one power to the next: k/(k+1), k = 1, 3, 5 ... or 2, 4, 6 ...
    for k in (1 + odd..freedom - 1).step_by(2) {
        term *= cos * cos * k as f64 / (k + 1) as f64;
        sum += term;
    }
    match odd {
        1 => (angle + sin * sum) * std::f64::consts::FRAC_2_PI,
        _ => sin * sum,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_those_of_the_tables() {
        for (confidence, freedom, want) in [
            (0.95, 1, 12.706_205),
            (0.95, 2, 4.302_653),
            (0.95, 3, 3.182_446),
            (0.95, 4, 2.776_445),
            (0.95, 5, 2.570_582),
            (0.95, 10, 2.228_139),
            (0.95, 29, 2.045_230),
            (0.95, 30, 2.042_272),
            (0.95, 120, 1.979_930),
            (0.99, 7, 3.499_483),
            (0.5, 9, 0.702_722),
        ] {
            let got = student_t(confidence, freedom);
            assert!((got - want).abs() < 2e-6, "{confidence} {freedom}: {got}, expected {want}");
        }
        // The normal distribution, within the first order of 1 / freedom.
        assert!((student_t(0.95, 100_000) - 1.959_964).abs() < 5e-5);
    }

    #[test]
    fn a_line_through_noise_has_the_intervals_of_the_textbook() {
        // x = 1, 2, 3, 4, 5 and R = 2, 4, 5, 4, 5: slope 0.6, intercept 2.2, s^2 = 0.8.
        let points: Vec<Point> = [2.0, 4.0, 5.0, 4.0, 5.0]
            .iter()
            .zip(1..)
            .map(|(r, x)| (f64::from(x).ln(), *r))
            .collect();
        let fit = Fit::new(&points).unwrap();
        let close = |got: f64, want: f64| assert!((got - want).abs() < 1e-6, "{got} {want}");
        close(fit.a.value, -0.6);
        close(fit.b.value, 2.2);
        close(fit.r2, 0.6);
        close(fit.rmse, 0.48f64.sqrt());
        let t = 3.182_446;
        close(fit.a.half, t * 0.08f64.sqrt());
        close(fit.b.half, t * 0.88f64.sqrt());
        close(fit.ceiling().value, 2.8);
        close(fit.ceiling().half, t * 0.48f64.sqrt());
        close(fit.at(3f64.ln()).half, t * 0.16f64.sqrt());
        close(fit.rmse_on(&[(6f64.ln(), 6.8), (6f64.ln(), 4.8)]).unwrap(), 1.0);
        assert_eq!(fit.rmse_on(&[]), None);
    }

    #[test]
    fn what_cannot_be_fitted_is_not() {
        assert_eq!(Fit::new(&[(0.1, 0.5), (0.2, 0.4)]), None);
        assert_eq!(Fit::new(&[(0.1, 0.5), (0.1, 0.4), (0.1, 0.3)]), None);
        assert_eq!(Fit::new(&[(0.1, f64::NAN), (0.2, 0.4), (0.3, 0.3)]), None);
        assert_eq!(Fit::new(&[(1e9, 0.5), (0.2, 0.4), (0.3, 0.3)]), None);
        let flat = Fit::new(&[(0.1, 0.5), (0.2, 0.5), (0.3, 0.5)]).unwrap();
        assert_eq!((flat.r2, flat.rmse, flat.ceiling().value), (1.0, 0.0, 0.5));
    }
}
