//! AdamW on f32 masters (arXiv 1711.05101), and the global norm that gradients are clipped by.
//!
//! The masters hold more digits than the weights that are served; after a step the weights are the
//! masters, rounded, in place.

use engine::decoder::{Decoder, Gradients};
use engine::model::{ParamSpec, param_specs};
use kernels::{AdamW, Kernels};

/// f32 masters and both moments, one buffer per parameter.
pub struct Optimizer {
    specs: Vec<ParamSpec>,
    /// Steps taken.
    pub(crate) step: u64,
    pub(crate) masters: Vec<Vec<f32>>,
    pub(crate) first: Vec<Vec<f32>>,
    pub(crate) second: Vec<Vec<f32>>,
}

impl Optimizer {
    /// Masters equal to the weights, moments zero.
    pub fn new(decoder: &mut Decoder) -> Self {
        let specs = param_specs(&decoder.config);
        let zeros = || specs.iter().map(|spec| vec![0.0; spec.len()]).collect::<Vec<_>>();
        let mut masters = zeros();
        for (param, master) in decoder.weights.params_mut().zip(&mut masters) {
            param.read(master);
        }
        let (first, second) = (zeros(), zeros());
        Self { step: 0, masters, first, second, specs }
    }

    /// The parameters, in order.
    pub fn specs(&self) -> &[ParamSpec] {
        &self.specs
    }

    /// The f32 masters, in the order of the parameters.
    pub fn masters(&self) -> &[Vec<f32>] {
        &self.masters
    }

    /// One step: moments and masters from `grads`, then the weights from the masters.
    pub fn apply(
        &mut self,
        decoder: &mut Decoder,
        kernels: &Kernels,
        grads: &Gradients,
        settings: &AdamW,
    ) {
        self.step += 1;
        let settings = AdamW { step: self.step, ..*settings };
        let dtype = decoder.weights.dtype();
        for (i, mut param) in decoder.weights.params_mut().enumerate() {
            let (master, m, v) = (&mut self.masters[i], &mut self.first[i], &mut self.second[i]);
            kernels.adamw(&settings, master, m, v, &grads.sums()[i]);
            param.write(kernels, dtype, master);
        }
    }
}

/// Euclidean norm of all gradients together.
pub fn global_norm(kernels: &Kernels, grads: &Gradients) -> f64 {
    grads.sums().iter().map(|sum| kernels.sum_squares(sum)).sum::<f64>().sqrt()
}

/// What gradients of this norm are multiplied by so that their norm is at most `limit`
/// (`torch.nn.utils.clip_grad_norm_`: `limit / (norm + 1e-6)`, at most 1).
pub fn clip_scale(norm: f64, limit: f64) -> f32 {
    (limit / (norm + 1e-6)).min(1.0) as f32
}

#[cfg(test)]
mod tests {
    use super::clip_scale;

    #[test]
    fn small_norms_pass_and_large_ones_are_scaled() {
        assert_eq!(clip_scale(0.5, 1.0), 1.0);
        assert!((clip_scale(4.0, 1.0) - 0.25).abs() < 1e-6);
    }
}
