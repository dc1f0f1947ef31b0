//! One draw from a row of logits, as the fast engine draws without truncation and penalties.
//!
//! The distribution function is inverted at a uniform number, over the vocabulary in ascending order,
//! with sums in f64. At temperature 0 the largest logit is taken (the lowest token of equals), and its
//! log-probability is the one at temperature 1.

/// A drawn token and its log-probability in nats at the temperature it was drawn at; `None` when the
/// logits are not finite numbers.
pub(crate) fn draw(logits: &[f32], temperature: f32, uniform: f64) -> Option<(u32, f32)> {
    let divisor = if temperature == 0.0 { 1.0 } else { f64::from(temperature) };
    let (mut largest, mut max) = (0, f32::NEG_INFINITY);
    for (token, z) in logits.iter().enumerate() {
        if !z.is_finite() {
            return None;
        }
        if *z > max {
            (largest, max) = (token, *z);
        }
    }
    let scaled = |z: &f32| (f64::from(*z) - f64::from(max)) / divisor;
    let weight = |z: &f32| scaled(z).exp();
    let total: f64 = logits.iter().map(weight).sum();
    let token =
        if temperature == 0.0 { largest } else { pick(logits.iter().map(weight), uniform * total) };
    Some((token as u32, (scaled(&logits[token]) - total.ln()) as f32))
}

/// The first index at which the cumulated weight exceeds `rest`, or else the last one with any weight.
fn pick(weights: impl Iterator<Item = f64>, rest: f64) -> usize {
    let (mut cumulated, mut last) = (0.0, 0);
    for (i, weight) in weights.enumerate() {
        if weight > 0.0 {
            last = i;
            cumulated += weight;
            if cumulated > rest {
                break;
            }
        }
    }
    last
}

#[cfg(test)]
mod tests {
    use super::draw;

    #[test]
    fn draws_invert_the_distribution_function() {
        let logits: Vec<f32> = [0.5f32, 0.25, 0.125, 0.125].iter().map(|p| p.ln()).collect();
        let cases = [(0.0, 0), (0.49, 0), (0.51, 1), (0.74, 1), (0.76, 2), (0.9, 3), (0.999, 3)];
        for (uniform, want) in cases {
            let (token, logprob) = draw(&logits, 1.0, uniform).expect("finite logits");
            assert_eq!(token, want, "uniform {uniform}");
            assert!((logprob - logits[want as usize]).abs() < 1e-6, "{logprob}");
        }
    }

    #[test]
    fn temperature_sharpens_and_zero_takes_the_first_of_the_largest() {
        let logits = [1.0, 3.0, 3.0, 0.0];
        assert_eq!(draw(&logits, 0.0, 0.999).expect("finite logits").0, 1);
        let (_, warm) = draw(&logits, 1.0, 0.5).expect("finite logits");
        let (token, cold) = draw(&logits, 0.5, 0.25).expect("finite logits");
        // Weights at temperature 1/2: e^-4, 1, 1, e^-6.
        assert_eq!(token, 1);
        let want = -(2.0 + (-4.0f64).exp() + (-6.0f64).exp()).ln() as f32;
        assert!((cold - want).abs() < 1e-6 && cold > warm, "{cold} against {want}");
    }

    #[test]
    fn logits_that_are_not_numbers_draw_nothing() {
        assert_eq!(draw(&[0.0, f32::NAN], 1.0, 0.5), None);
        assert_eq!(draw(&[f32::INFINITY, 0.0], 0.0, 0.5), None);
    }
}
