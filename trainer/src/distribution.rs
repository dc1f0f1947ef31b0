//! A next-token distribution from its logits, the plain way in f64: the definition that the kernels'
//! streaming f32 version is held to.
//!
//! With `z` the logits over the temperature: `log p = z - logsumexp(z)`, `H = logsumexp(z) - sum p z`,
//! `dH/dlogit_j = -p_j (log p_j + H) / temperature`. A logit of minus infinity is a token that cannot come;
//! it adds nothing to the entropy.

/// Log-probabilities and entropy of one distribution.
#[derive(Clone, Debug, PartialEq)]
pub struct Distribution {
    /// Of each token, in nats.
    pub log_probs: Vec<f64>,
    /// In nats.
    pub entropy: f64,
    /// What the logits were divided by.
    pub temperature: f64,
}

impl Distribution {
    /// The distribution of `logits` at a temperature above 0.
    ///
    /// ```
    /// use trainer::distribution::Distribution;
    /// let d = Distribution::new(&[1000.0, 1000.0, f64::NEG_INFINITY], 0.5);
    /// assert!((d.entropy - 2f64.ln()).abs() < 1e-12);
    /// assert!(d.entropy_gradient().iter().all(|g| g.abs() < 1e-12));
    /// ```
    pub fn new(logits: &[f64], temperature: f64) -> Self {
        let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let shifted: Vec<f64> = logits.iter().map(|z| (z - largest) / temperature).collect();
        let log_sum = shifted.iter().map(|z| z.exp()).sum::<f64>().ln();
        let log_probs: Vec<f64> = shifted.iter().map(|z| z - log_sum).collect();
        let surprise = log_probs.iter().filter(|l| **l > f64::NEG_INFINITY).map(|l| l.exp() * -l);
        Self { entropy: surprise.sum(), log_probs, temperature }
    }

    /// The derivative of the entropy by each logit.
    pub fn entropy_gradient(&self) -> Vec<f64> {
        let one = |l: &f64| match *l > f64::NEG_INFINITY {
            true => -l.exp() * (l + self.entropy) / self.temperature,
            false => 0.0,
        };
        self.log_probs.iter().map(one).collect()
    }
}
