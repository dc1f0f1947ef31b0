//! AdamW (arXiv 1711.05101, as in `torch.optim.AdamW`) on f32 variables, out of candle operations.
//!
//! ```text
//! g = scale * grad            p = p (1 - lr wd)
//! m = m + (1 - b1) (g - m)    v = b2 v + (1 - b2) g^2
//! p = p - lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + eps)
//! ```
//! Every weight decays. Leaves out AMSGrad and speed: about ten temporaries a tensor.

use candle_core::{Result, Tensor, Var};

use crate::model::Gradients;

/// Settings of one optimizer step. The default is torch's but for the learning rate, which is 1e-6.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Learning rate of this step.
    pub lr: f64,
    /// Decay of the mean of the gradients.
    pub beta1: f64,
    /// Decay of the mean of their squares.
    pub beta2: f64,
    /// Added to the root of the corrected mean square.
    pub eps: f64,
    /// Decoupled weight decay, multiplied by the learning rate.
    pub weight_decay: f64,
}

impl Default for AdamW {
    fn default() -> Self {
        Self { lr: 1e-6, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.01 }
    }
}

/// Both moments of every variable, and the number of steps taken.
pub(crate) struct Moments {
    step: u64,
    moments: Vec<[Tensor; 2]>,
}

impl Moments {
    /// Zero moments for `vars`.
    pub(crate) fn new(vars: &[Var]) -> Result<Self> {
        let zeros = |var: &Var| var.zeros_like().map(|zeros| zeros.detach());
        let moments = vars.iter().map(|var| Ok([zeros(var)?, zeros(var)?]));
        Ok(Self { step: 0, moments: moments.collect::<Result<_>>()? })
    }

    /// One step on `vars` from `gradients` times `scale`.
    pub(crate) fn apply(
        &mut self,
        vars: &[Var],
        (gradients, scale): (&Gradients, f64),
        settings: &AdamW,
    ) -> Result<()> {
        self.step += 1;
        let AdamW { lr, beta1, beta2, eps, weight_decay } = *settings;
        let correction = |beta: f64| 1.0 - beta.powf(self.step as f64);
        let step_size = lr / correction(beta1);
        let root = 1.0 / correction(beta2).sqrt();
        for ((var, [m, v]), (_, grad)) in vars.iter().zip(&mut self.moments).zip(gradients.iter()) {
            let grad = (grad * scale)?;
            *m = (&*m + ((&grad - &*m)? * (1.0 - beta1))?)?;
            *v = ((&*v * beta2)? + (grad.sqr()? * (1.0 - beta2))?)?;
            let update = m.div(&v.sqrt()?.affine(root, eps)?)?;
            let kept = (var.as_detached_tensor() * (1.0 - lr * weight_decay))?;
            var.set(&(kept - (update * step_size)?)?)?;
        }
        Ok(())
    }
}
