//! Rotary position frequencies, computed as Hugging Face transformers computes them (in f32).
//!
//! `inv_freq[i] = 1 / theta^(2i / head_dim)` for `i < head_dim / 2`, then the scaling of the
//! checkpoint. Source: transformers `modeling_rope_utils.py`; the `llama3` scaling is the one of
//! Llama 3.1 (frequencies with a wavelength beyond the original context are slowed by `factor`, those
//! well inside are kept, those between are blended). Leaves out `yarn`, `dynamic` and `longrope`.

/// Base and scaling of the rotary embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeConfig {
    /// Base of the geometric series of wavelengths.
    pub theta: f64,
    /// How the frequencies are stretched to a longer context.
    pub scaling: RopeScaling,
}

/// Stretching of the rotary frequencies.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Frequencies as they are.
    None,
    /// Every frequency divided by `factor`.
    Linear {
        /// The divisor, at least 1.
        factor: f64,
    },
    /// The piecewise scaling of Llama 3.1.
    Llama3 {
        /// Divisor of the slow frequencies.
        factor: f64,
        /// `original_max_position / low_freq_factor` is the wavelength from which frequencies are slow.
        low_freq_factor: f64,
        /// `original_max_position / high_freq_factor` is the wavelength up to which frequencies are kept.
        high_freq_factor: f64,
        /// Context length before stretching, in tokens.
        original_max_position: usize,
    },
    /// One divisor per frequency, `head_dim / 2` of them (the `rope_freqs.weight` of a GGUF file).
    Factors(Vec<f32>),
}

impl RopeConfig {
    /// Rotation per position in radians of each of the `head_dim / 2` pairs.
    ///
    /// ```
    /// # use engine::model::{RopeConfig, RopeScaling};
    /// let rope = RopeConfig { theta: 100.0, scaling: RopeScaling::Linear { factor: 2.0 } };
    /// assert_eq!(rope.inv_freq(4), [0.5, 0.05]);
    /// ```
    pub fn inv_freq(&self, head_dim: usize) -> Vec<f32> {
        let theta = f64::from(self.theta as f32);
        let plain = (0..head_dim / 2).map(|i| {
            // Rounded once from f64, so the same on every system's libm.
            let exponent = (2 * i) as f32 / head_dim as f32;
            1.0 / theta.powf(f64::from(exponent)) as f32
        });
        match &self.scaling {
            RopeScaling::None => plain.collect(),
            RopeScaling::Linear { factor } => plain.map(|f| f / *factor as f32).collect(),
            RopeScaling::Factors(factors) => plain.zip(factors).map(|(f, d)| f / d).collect(),
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position,
            } => {
                let llama3 = Llama3 {
                    factor: *factor as f32,
                    low: *low_freq_factor as f32,
                    high: *high_freq_factor as f32,
                    context: *original_max_position as f32,
                };
                plain.map(|f| llama3.scale(f)).collect()
            }
        }
    }

    /// Recognises the per-frequency divisors that the Llama 3 scaling leaves in a GGUF file, so that a
    /// checkpoint can name the scaling; anything else stays a list of divisors.
    pub(crate) fn from_factors(theta: f64, factors: Vec<f32>) -> Self {
        let head_dim = factors.len() * 2;
        let slowest = factors.iter().copied().fold(1.0f32, f32::max);
        let plain = Self { theta, scaling: RopeScaling::None }.inv_freq(head_dim);
        let llama3 = Self {
            theta,
            scaling: RopeScaling::Llama3 {
                factor: f64::from(slowest),
                low_freq_factor: 1.0,
                high_freq_factor: 4.0,
                original_max_position: 8192,
            },
        };
        let scaled = llama3.inv_freq(head_dim);
        let close = |i: usize| (plain[i] / scaled[i] / factors[i] - 1.0).abs() < 1e-4;
        if (0..factors.len()).all(close) {
            return llama3;
        }
        Self { theta, scaling: RopeScaling::Factors(factors) }
    }
}

/// The constants of the Llama 3 scaling in the precision transformers uses them in.
struct Llama3 {
    factor: f32,
    low: f32,
    high: f32,
    context: f32,
}

impl Llama3 {
    /// In torch, `scalar / tensor` is `reciprocal * scalar`; the order of operations follows it.
    fn scale(&self, inv_freq: f32) -> f32 {
        let wavelength = (1.0 / inv_freq) * (2.0 * std::f64::consts::PI) as f32;
        if wavelength > self.context / self.low {
            return inv_freq / self.factor;
        }
        if wavelength < self.context / self.high {
            return inv_freq;
        }
        let smooth = ((1.0 / wavelength) * self.context - self.low) / (self.high - self.low);
        (1.0 - smooth) * inv_freq / self.factor + smooth * inv_freq
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_frequencies_are_a_geometric_series() {
        let rope = RopeConfig { theta: 10_000.0, scaling: RopeScaling::None };
        let f = rope.inv_freq(16);
        let expected =
            [1.0, 0.316_227_76, 0.1, 0.031_622_775, 0.01, 0.003_162_277_6, 0.001, 0.000_316_227_76];
        for (a, b) in f.iter().zip(expected) {
            assert!((a / b - 1.0f32).abs() < 2e-7, "{a} {b}");
        }
    }

    #[test]
    fn llama3_keeps_fast_slows_slow_and_blends_between() {
        let plain = RopeConfig { theta: 500_000.0, scaling: RopeScaling::None }.inv_freq(128);
        let scaling = RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position: 8192,
        };
        let scaled = RopeConfig { theta: 500_000.0, scaling: scaling.clone() }.inv_freq(128);
        assert_eq!(scaled[0], plain[0]);
        assert_eq!(scaled[63], plain[63] / 8.0);
        // Pair 30: wavelength 2 pi 500000^(60/128) = 2948.6 tokens lies between 2048 and 8192.
        let wavelength = 2.0 * std::f64::consts::PI * 500_000f64.powf(60.0 / 128.0);
        let smooth = (8192.0 / wavelength - 1.0) / 3.0;
        let expected = f64::from(plain[30]) * ((1.0 - smooth) / 8.0 + smooth);
        assert!((f64::from(scaled[30]) / expected - 1.0).abs() < 1e-6);
        // The divisors a GGUF converter writes are recognised as this scaling.
        let factors = plain.iter().zip(&scaled).map(|(p, s)| p / s).collect();
        assert_eq!(RopeConfig::from_factors(500_000.0, factors).scaling, scaling);
    }

    #[test]
    fn other_divisors_stay_a_list() {
        let rope = RopeConfig::from_factors(10_000.0, vec![1.0, 3.0, 2.0, 1.0]);
        assert_eq!(rope.scaling, RopeScaling::Factors(vec![1.0, 3.0, 2.0, 1.0]));
        let f = rope.inv_freq(8);
        assert_eq!(f[2], RopeConfig { scaling: RopeScaling::None, ..rope }.inv_freq(8)[2] / 2.0);
    }
}
