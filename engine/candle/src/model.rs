//! A model as candle variables, one per Hugging Face tensor, differentiated by candle's autograd.
//!
//! Variables are f32 whatever the compute format is; with bf16 they are rounded where they are used, so
//! they serve as an optimizer's masters too. Two decoders read the same memory: one that records its
//! operations for a backward pass and one that does not. A whole sequence's graph is kept until its
//! results are dropped; nothing is computed again to save memory.

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use engine::{Error, ModelConfig, ModelSource, Result};

use crate::error::internal;
use crate::net::{Net, log_softmax};
use crate::pool::Kv;

/// A decoder over candle variables.
pub struct CandleModel {
    config: ModelConfig,
    device: Device,
    names: Arc<[String]>,
    vars: Vec<Var>,
    tracked: Net,
    detached: Net,
}

/// Whether a pass records what a backward pass needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Record {
    Yes,
    No,
}

/// Gradients in f32, one tensor per variable, in the order of [`CandleModel::names`].
#[derive(Clone, Debug)]
pub struct Gradients {
    names: Arc<[String]>,
    values: Vec<Tensor>,
}

impl CandleModel {
    /// Reads all weights of `source` onto `device`, one tensor at a time, to compute in `dtype`.
    ///
    /// # Errors
    /// `ErrorKind::Unsupported` for a format other than f32 and bf16; `ErrorKind::Model` when a tensor
    /// cannot be read.
    pub fn load(source: &ModelSource, device: &Device, dtype: DType) -> Result<Self> {
        Self::load_as(source.config().clone(), source, device, dtype)
    }

    /// Reads the weights that `config` asks for, which may differ from the one of `source` in what does
    /// not shape a weight: rotary embedding, context, epsilon.
    ///
    /// # Errors
    /// As [`CandleModel::load`], and `ErrorKind::Model` for a weight that `source` does not have.
    ///
    /// # Panics
    /// When a weight has another size in `source` than `config` says.
    pub fn load_as(
        config: ModelConfig,
        source: &ModelSource,
        device: &Device,
        dtype: DType,
    ) -> Result<Self> {
        if !matches!(dtype, DType::F32 | DType::BF16) {
            let name = dtype.as_str();
            return Err(Error::unsupported(format!("dtype is {name}, limit is f32 or bf16")));
        }
        let (mut names, mut vars) = (Vec::new(), Vec::new());
        for tensor in config.tensors() {
            let rows = if tensor.shape.len() == 1 { 1 } else { tensor.shape[0] };
            let mut values = vec![0.0; tensor.shape.iter().product()];
            source.read_rows(&tensor.name, 0..rows, &mut values)?;
            vars.push(Var::from_vec(values, tensor.shape, device).map_err(internal)?);
            names.push(tensor.name);
        }
        let index: HashMap<&str, &Var> = names.iter().map(String::as_str).zip(&vars).collect();
        let tracked = Net::new(&config, dtype, &|name| index[name].as_tensor().clone());
        let detached = Net::new(&config, dtype, &|name| index[name].as_detached_tensor());
        Ok(Self { config, device: device.clone(), names: names.into(), vars, tracked, detached })
    }

    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Where it computes.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Format of products, keys and values.
    pub fn dtype(&self) -> DType {
        self.tracked.dtype()
    }

    /// Hugging Face names of the weights, in the order of the checkpoint's tensors.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// The weights, in the order of [`CandleModel::names`]. Setting one changes the model.
    pub fn vars(&self) -> &[Var] {
        &self.vars
    }

    /// `[T, V]`: f32 logits after each of `T` tokens, recorded.
    ///
    /// # Errors
    /// `ErrorKind::Request` for no tokens, too many or an unknown one.
    pub fn logits(&self, tokens: &[u32]) -> Result<Tensor> {
        self.check("text", tokens)?;
        let hidden = self.tracked.hidden(tokens, 0, &Kv::Whole).map_err(internal)?;
        self.tracked.logits(&hidden).map_err(internal)
    }

    /// `[T - 1]`: log-probability in nats of token `i + 1` after the tokens up to `i`, with logits divided
    /// by `temperature`, recorded.
    ///
    /// # Errors
    /// `ErrorKind::Request` for fewer than two tokens, too many, an unknown one, or a temperature that is
    /// not above 0.
    pub fn log_probs(&self, tokens: &[u32], temperature: f32) -> Result<Tensor> {
        self.response_log_probs((tokens, 1), temperature, Record::Yes)
    }

    /// `[T]`: entropy in nats of the distribution after each token, with logits divided by `temperature`,
    /// recorded.
    ///
    /// # Errors
    /// As [`CandleModel::logits`], and for a temperature that is not above 0.
    pub fn entropy(&self, tokens: &[u32], temperature: f32) -> Result<Tensor> {
        check_temperature(temperature)?;
        let logits = self.logits(tokens)?;
        entropy(&logits, temperature).map_err(internal)
    }

    /// `[T - prompt_len]`: log-probabilities of the tokens from `prompt_len` on.
    pub(crate) fn response_log_probs(
        &self,
        (tokens, prompt_len): (&[u32], usize),
        temperature: f32,
        record: Record,
    ) -> Result<Tensor> {
        let rows = self.response_rows((tokens, prompt_len), temperature, record)?;
        self.pick(&rows, &tokens[prompt_len..]).map_err(internal)
    }

    /// Log-probabilities and entropies, each `[T - prompt_len]`, of the tokens from `prompt_len` on, not
    /// recorded; the former are to the bit those of [`CandleModel::response_log_probs`].
    pub(crate) fn response_stats(
        &self,
        (tokens, prompt_len): (&[u32], usize),
        temperature: f32,
    ) -> Result<(Vec<f32>, Vec<f32>)> {
        let rows = self.response_rows((tokens, prompt_len), temperature, Record::No)?;
        let stats = || {
            let entropies = (rows.exp()? * &rows)?.sum(1)?.neg()?;
            Ok((self.pick(&rows, &tokens[prompt_len..])?.to_vec1()?, entropies.to_vec1()?))
        };
        stats().map_err(internal)
    }

    /// Of each row of log-probabilities the one of its target.
    fn pick(&self, rows: &Tensor, targets: &[u32]) -> candle_core::Result<Tensor> {
        let targets = Tensor::new(targets, &self.device)?.unsqueeze(1)?;
        rows.gather(&targets, 1)?.squeeze(1)
    }

    /// `[T - prompt_len, V]`: log-probabilities of the whole vocabulary at the places of the tokens from
    /// `prompt_len` on. Only the rows that predict them go through the head.
    fn response_rows(
        &self,
        (tokens, prompt_len): (&[u32], usize),
        temperature: f32,
        record: Record,
    ) -> Result<Tensor> {
        check_temperature(temperature)?;
        self.check("text", tokens)?;
        let len = tokens.len();
        if prompt_len == 0 || prompt_len >= len {
            let message =
                format!("prompt has {prompt_len} of {len} tokens, limit is 1 to all but 1");
            return Err(Error::request(message));
        }
        let net = self.net(record);
        let rows = || {
            // Nothing follows the last token, so it is not run.
            let hidden = net.hidden(&tokens[..len - 1], 0, &Kv::Whole)?;
            let hidden = hidden.narrow(0, prompt_len - 1, len - prompt_len)?;
            log_softmax(&(net.logits(&hidden)? / f64::from(temperature))?)
        };
        rows().map_err(internal)
    }

    /// Log-probabilities `[T - 1]` and entropies `[T]`, not recorded.
    pub(crate) fn score(
        &self,
        tokens: &[u32],
        temperature: f32,
    ) -> candle_core::Result<(Vec<f32>, Vec<f32>)> {
        let hidden = self.detached.hidden(tokens, 0, &Kv::Whole)?;
        let logits = self.detached.logits(&hidden)?;
        let rows = tokens.len() - 1;
        let entropies = entropy(&logits, temperature)?.to_vec1()?;
        if rows == 0 {
            return Ok((Vec::new(), entropies));
        }
        let log_probs = log_softmax(&(logits.narrow(0, 0, rows)? / f64::from(temperature))?)?;
        Ok((self.pick(&log_probs, &tokens[1..])?.to_vec1()?, entropies))
    }

    pub(crate) fn net(&self, record: Record) -> &Net {
        match record {
            Record::Yes => &self.tracked,
            Record::No => &self.detached,
        }
    }

    /// The gradient of a scalar `loss` computed from recorded results of this model.
    ///
    /// # Errors
    /// `ErrorKind::Internal` when it does not reach every weight: an operation without a backward was
    /// used on the way.
    pub fn gradients(&self, loss: &Tensor) -> Result<Gradients> {
        let mut gradients = self.zero_gradients()?;
        gradients.add(&self.vars, &mut loss.backward().map_err(internal)?)?;
        Ok(gradients)
    }

    pub(crate) fn zero_gradients(&self) -> Result<Gradients> {
        let zeros = self.vars.iter().map(|var| var.zeros_like().map(|zeros| zeros.detach()));
        let values = zeros.collect::<candle_core::Result<_>>().map_err(internal)?;
        Ok(Gradients { names: Arc::clone(&self.names), values })
    }

    pub(crate) fn check(&self, name: &str, tokens: &[u32]) -> Result<()> {
        let (len, limit) = (tokens.len(), self.config.max_context());
        if len == 0 || len > limit {
            return Err(Error::request(format!("{name} has {len} tokens, limit is 1 to {limit}")));
        }
        let vocab = self.config.vocab_size;
        match tokens.iter().find(|token| **token as usize >= vocab) {
            Some(token) => {
                Err(Error::request(format!("{name} has token {token}, vocabulary has {vocab}")))
            }
            None => Ok(()),
        }
    }
}

impl Gradients {
    /// Adds what a backward pass left for `vars`.
    pub(crate) fn add(&mut self, vars: &[Var], store: &mut GradStore) -> Result<()> {
        for (i, var) in vars.iter().enumerate() {
            let grad = store.remove(var).ok_or_else(|| {
                Error::internal(format!("no gradient reached tensor {:?}", self.names[i]))
            })?;
            self.values[i] = (&self.values[i] + grad).map_err(internal)?;
        }
        Ok(())
    }

    /// Name and gradient of every weight.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.names.iter().map(String::as_str).zip(&self.values)
    }

    /// Euclidean norm of all gradients together.
    ///
    /// # Errors
    /// `ErrorKind::Internal` when the device fails.
    pub fn norm(&self) -> Result<f64> {
        let square = |x: &Tensor| x.sqr()?.sum_all()?.to_scalar::<f32>().map(f64::from);
        let squares = self.values.iter().map(square).sum::<candle_core::Result<f64>>();
        Ok(squares.map_err(internal)?.sqrt())
    }
}

/// Fails for a temperature that log-probabilities cannot be taken at.
pub(crate) fn check_temperature(temperature: f32) -> Result<()> {
    if temperature.is_finite() && temperature > 0.0 {
        return Ok(());
    }
    Err(Error::request(format!("temperature is {temperature}, limit is above 0")))
}

/// `-sum p log p` of each row of logits.
fn entropy(logits: &Tensor, temperature: f32) -> candle_core::Result<Tensor> {
    let log_probs = log_softmax(&(logits / f64::from(temperature))?)?;
    (log_probs.exp()? * log_probs)?.sum(1)?.neg()
}
