//! New weights from files, and requests held back.
//!
//! Replacing checks names, shapes, settings and numbers first and writes in place afterwards, so nothing is
//! held twice. Leaves out tokenizer, chat template and sampling defaults: those of the first files stay.

use super::Engine;
use crate::error::{Error, Result};
use crate::model::{ModelConfig, ModelSource};
use crate::request::Event;
use scheduler::WeightsVersion;

/// Numbers that are looked at together.
const CHUNK: usize = 2 << 20;

/// Checks that `source` can take the place of the weights of a `served` model: the same tensors in the same
/// shapes, the same settings, and nothing but finite numbers. Reads the whole of it.
///
/// # Errors
/// `ErrorKind::Model`, naming the first difference; `ErrorKind::Io` when a file cannot be read.
pub(crate) fn check_replacement(served: &ModelConfig, source: &ModelSource) -> Result<()> {
    let differs = |message: String| Err(Error::model(format!("{}: {message}", source.name())));
    for wanted in served.tensors() {
        let (name, shape) = (&wanted.name, &wanted.shape);
        if !source.has(name) {
            return differs(format!("tensor {name:?} is missing, the served one is {shape:?}"));
        }
        let found = source.shape(name)?;
        if found != *shape {
            return differs(format!("tensor {name:?} is {found:?}, the served one is {shape:?}"));
        }
    }
    if let Some(setting) = other_setting(served, source.config()) {
        return differs(setting);
    }
    for tensor in served.tensors() {
        check_numbers(source, &tensor.name, &tensor.shape)?;
    }
    Ok(())
}

/// The first setting beside the shapes in which two models differ.
fn other_setting(served: &ModelConfig, other: &ModelConfig) -> Option<String> {
    let said = |name: &str, own: String, new: String| {
        (own != new).then(|| format!("{name} is {new}, the served one is {own}"))
    };
    let debug = |config: &ModelConfig| {
        [
            ("architecture", config.architecture.model_type().to_owned()),
            ("layers", config.layers.to_string()),
            ("heads", config.heads.to_string()),
            ("kv_heads", config.kv_heads.to_string()),
            ("head_dim", config.head_dim.to_string()),
            ("rms_eps", config.rms_eps.to_string()),
            ("rope", format!("{:?}", config.rope)),
            ("sliding_window", format!("{:?}", config.sliding_window)),
            ("tied_embeddings", config.tied_embeddings.to_string()),
            ("qkv_bias", config.qkv_bias.to_string()),
            ("qk_norm", config.qk_norm.to_string()),
        ]
    };
    let pairs = debug(served).into_iter().zip(debug(other));
    pairs.into_iter().find_map(|((name, own), (_, new))| said(name, own, new))
}

/// Checks that a tensor can be read and that its numbers are finite.
fn check_numbers(source: &ModelSource, name: &str, shape: &[usize]) -> Result<()> {
    let (rows, cols) = match *shape {
        [rows, cols] => (rows, cols),
        _ => (1, shape.iter().product()),
    };
    let step = (CHUNK / cols.max(1)).max(1);
    let mut numbers = Vec::new();
    for from in (0..rows).step_by(step) {
        let to = (from + step).min(rows);
        numbers.resize((to - from) * cols, 0.0);
        source.read_rows(name, from..to, &mut numbers)?;
        if let Some(at) = numbers.iter().position(|x: &f32| !x.is_finite()) {
            let (row, wrong) = (from + at / cols, numbers[at]);
            return Err(Error::model(format!(
                "{}: tensor {name:?} has {wrong} in row {row}",
                source.name()
            )));
        }
    }
    Ok(())
}

impl Engine {
    /// Overwrites the weights by those of `source`, which has to be [checked](crate::Service::check_weights) before.
    /// Requests that wait or run go on afterwards, their tokens so far computed anew.
    ///
    /// # Errors
    /// `ErrorKind::Unsupported` when weights were left quantised, `ErrorKind::Busy` after a step that has
    /// failed; nothing is changed then. `ErrorKind::Internal` when a file cannot be read any more: some
    /// weights are replaced and others are not, and the engine must not be used any more.
    pub fn replace_weights(&mut self, source: &ModelSource) -> Result<WeightsVersion> {
        let mut update = self.begin_update_keeping()?;
        let (decoder, kernels) = update.decoder();
        decoder.weights.read(source, kernels.pool()).map_err(|error| {
            Error::internal(format!("weights are replaced in part only: {error}"))
        })?;
        drop(update);
        Ok(self.version())
    }

    /// Requests added from here on wait until [`admit_newcomers`](Self::admit_newcomers).
    pub(crate) fn hold_newcomers(&mut self) {
        self.scheduler.hold_newcomers();
    }

    /// Lets those wait no longer that were held back.
    pub(crate) fn admit_newcomers(&mut self) {
        self.scheduler.admit_newcomers();
    }

    /// Whether ends of aborted samples wait to be handed on.
    pub(crate) fn has_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    /// The ends of aborted samples, without a step.
    pub(crate) fn take_pending(&mut self) -> Vec<Event> {
        std::mem::take(&mut self.pending)
    }
}
