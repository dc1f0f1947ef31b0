//! The one copy of a model's weights, in the layout the kernels read. Optimizer state is not kept here.

use std::path::Path;

use kernels::{Dtype, Kernels, Linear, Matrix, QuantFormat, QuantMatrix, QuantRow, ThreadPool};
use parking_lot::Mutex;

use crate::config::Quantization;
use crate::error::{Error, Result};
use crate::model::{ModelConfig, ModelSource, ParamShape, ParamSpec, param_specs};

/// The weights of one transformer layer. `H` hidden, `I` intermediate, `d` head size.
pub struct LayerWeights {
    /// `[H]`, of the norm before attention.
    pub attn_norm: Vec<f32>,
    /// `[(heads + 2 kv_heads) d, H]`: query, key and value rows.
    pub qkv: Linear,
    /// `[(heads + 2 kv_heads) d]`, Qwen2's.
    pub qkv_bias: Option<Vec<f32>>,
    /// `[d]` each, Qwen3's norms of queries and keys.
    pub qk_norm: Option<(Vec<f32>, Vec<f32>)>,
    /// `[H, heads d]`.
    pub o: Linear,
    /// `[H]`, of the norm before the feed-forward part.
    pub mlp_norm: Vec<f32>,
    /// `[2 I, H]`: gate rows, then up rows.
    pub gate_up: Linear,
    /// `[H, I]`.
    pub down: Linear,
}

/// All weights of a model.
pub struct Weights {
    /// `[V, H]`; also the head when embeddings are tied.
    pub embed: Linear,
    /// The layers, first to last.
    pub layers: Vec<LayerWeights>,
    /// `[H]`, of the norm after the last layer.
    pub norm: Vec<f32>,
    /// `[V, H]`, unless tied.
    pub head: Option<Linear>,
    dtype: Dtype,
}

/// One parameter, borrowed from the weights.
pub enum ParamMut<'a> {
    /// A matrix in tile layout.
    Matrix(&'a mut Matrix),
    /// A matrix as a file stores it, which never changes.
    Quantised(&'a mut QuantMatrix),
    /// A vector, holding only values that the compute format can represent.
    Vector(&'a mut Vec<f32>),
}

impl Weights {
    /// Zeroed weights of this shape.
    pub fn zeros(config: &ModelConfig, dtype: Dtype) -> Self {
        Self::build(config, dtype, |spec| Linear::Full(Matrix::zeros(dtype, spec.rows, spec.cols)))
    }

    /// All vectors zero, and matrices made one after the other, in the order of their parameters.
    fn build(config: &ModelConfig, dtype: Dtype, matrix: impl Fn(&ParamSpec) -> Linear) -> Self {
        let specs = param_specs(config);
        let mut matrices = specs.iter().filter(|spec| spec.shape == ParamShape::Matrix);
        let mut next = || matrix(matrices.next().expect("as many as are asked for here"));
        let zeros = |len| vec![0.0; len];
        let (hidden, head) = (config.hidden_size, config.head_dim);
        let qkv = (config.heads + 2 * config.kv_heads) * head;
        let embed = next();
        let layers = (0..config.layers).map(|_| LayerWeights {
            attn_norm: zeros(hidden),
            qkv: next(),
            qkv_bias: config.qkv_bias.then(|| zeros(qkv)),
            qk_norm: config.qk_norm.then(|| (zeros(head), zeros(head))),
            o: next(),
            mlp_norm: zeros(hidden),
            gate_up: next(),
            down: next(),
        });
        let layers = layers.collect();
        let head = if config.tied_embeddings { None } else { Some(next()) };
        Self { embed, layers, norm: zeros(hidden), head, dtype }
    }

    /// Reads all tensors of `source`, a few rows at a time, on the threads of `pool`. Matrices all of
    /// whose tensors are quantised stay so if `quantization` says it.
    ///
    /// # Errors
    /// `ErrorKind::Model` when a tensor is missing, has another shape or cannot be read, or a scale of a
    /// quantised one does not fit where it is kept.
    pub fn load(
        source: &ModelSource,
        dtype: Dtype,
        quantization: Quantization,
        kernels: &Kernels,
    ) -> Result<Self> {
        let mut weights = Self::build(source.config(), dtype, |spec| {
            match stored_format(source, spec).filter(|_| quantization == Quantization::AsStored) {
                Some(format) => {
                    Linear::Quantised(kernels.quant_matrix(dtype, format, spec.rows, spec.cols))
                }
                None => Linear::Full(Matrix::zeros(dtype, spec.rows, spec.cols)),
            }
        });
        weights.read(source, kernels.pool())?;
        Ok(weights)
    }

    /// Overwrites all parameters by those of `source`, whose configuration has the same shapes.
    ///
    /// # Errors
    /// As [`load`](Self::load); some parameters are overwritten then and others are not.
    pub fn read(&mut self, source: &ModelSource, pool: &ThreadPool) -> Result<()> {
        let (dtype, specs) = (self.dtype, param_specs(source.config()));
        let mut work: Vec<_> = specs.iter().zip(self.params_mut()).collect();
        // Taken from the end: the largest first, so that no thread is left alone with one.
        work.sort_by_key(|(spec, _)| spec.len());
        let work = Mutex::new((work, Ok(())));
        pool.run(pool.threads(), &|_| {
            loop {
                let Some((spec, param)) = work.lock().0.pop() else { return };
                let read = fill(source, spec, param, dtype);
                if read.is_err() {
                    *work.lock() = (Vec::new(), read);
                }
            }
        });
        let (_, read) = work.into_inner();
        read
    }

    /// Bytes of the weights with matrices kept as they are stored.
    pub fn bytes_as_stored(source: &ModelSource, dtype: Dtype) -> u64 {
        let bytes = |spec: &ParamSpec| match (spec.shape, stored_format(source, spec)) {
            (ParamShape::Vector, _) => 4 * spec.len() as u64,
            (_, Some(format)) => format.bytes(spec.rows, spec.cols),
            (_, None) => (dtype.size_bytes() * spec.len()) as u64,
        };
        param_specs(source.config()).iter().map(bytes).sum()
    }

    /// The format of the matrices.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Whether any of the matrices is quantised.
    pub fn quantised(&self) -> bool {
        let quantised = |w: &Linear| matches!(w, Linear::Quantised(_));
        let layer = |l: &LayerWeights| [&l.qkv, &l.o, &l.gate_up, &l.down].map(quantised);
        quantised(&self.embed)
            || quantised(self.head())
            || self.layers.iter().any(|l| layer(l).contains(&true))
    }

    /// The matrix that turns hidden states into logits.
    pub fn head(&self) -> &Linear {
        self.head.as_ref().unwrap_or(&self.embed)
    }

    /// Bytes held.
    pub fn bytes(&mut self) -> u64 {
        self.params_mut()
            .map(|param| match param {
                ParamMut::Matrix(matrix) => matrix.bytes() as u64,
                ParamMut::Quantised(matrix) => matrix.bytes() as u64,
                ParamMut::Vector(vector) => 4 * vector.len() as u64,
            })
            .sum()
    }

    /// All parameters in the order of [`param_specs`].
    pub fn params_mut(&mut self) -> impl Iterator<Item = ParamMut<'_>> {
        let layers = self.layers.iter_mut().flat_map(|layer| {
            let (q_norm, k_norm) = match layer.qk_norm.as_mut() {
                Some((q, k)) => (Some(q), Some(k)),
                None => (None, None),
            };
            [
                Some(ParamMut::Vector(&mut layer.attn_norm)),
                Some(ParamMut::linear(&mut layer.qkv)),
                layer.qkv_bias.as_mut().map(ParamMut::Vector),
                q_norm.map(ParamMut::Vector),
                k_norm.map(ParamMut::Vector),
                Some(ParamMut::linear(&mut layer.o)),
                Some(ParamMut::Vector(&mut layer.mlp_norm)),
                Some(ParamMut::linear(&mut layer.gate_up)),
                Some(ParamMut::linear(&mut layer.down)),
            ]
            .into_iter()
            .flatten()
        });
        std::iter::once(ParamMut::linear(&mut self.embed))
            .chain(layers)
            .chain(std::iter::once(ParamMut::Vector(&mut self.norm)))
            .chain(self.head.as_mut().map(ParamMut::linear))
    }
}

impl<'a> ParamMut<'a> {
    fn linear(linear: &'a mut Linear) -> Self {
        match linear {
            Linear::Full(matrix) => Self::Matrix(matrix),
            Linear::Quantised(matrix) => Self::Quantised(matrix),
        }
    }

    /// Copies the parameter to `out`, row-major `[rows, cols]`.
    pub fn read(&self, out: &mut [f32]) {
        match self {
            Self::Vector(vector) => out.copy_from_slice(vector),
            Self::Matrix(matrix) => {
                for (row, out) in out.chunks_exact_mut(matrix.cols()).enumerate() {
                    matrix.get_row(row, out);
                }
            }
            Self::Quantised(matrix) => {
                for (row, out) in out.chunks_exact_mut(matrix.cols()).enumerate() {
                    matrix.get_row(row, out);
                }
            }
        }
    }

    /// Replaces the parameter by `values` (row-major), rounded to `dtype`.
    ///
    /// # Panics
    /// When the parameter is quantised: such weights do not change.
    pub fn write(&mut self, kernels: &Kernels, dtype: Dtype, values: &[f32]) {
        match self {
            Self::Vector(vector) => {
                vector.copy_from_slice(values);
                round(dtype, vector);
            }
            Self::Matrix(matrix) => kernels.load_matrix(values, matrix),
            Self::Quantised(_) => panic!("a quantised parameter cannot be written"),
        }
    }
}

/// Reads one parameter.
fn fill(source: &ModelSource, spec: &ParamSpec, param: ParamMut<'_>, dtype: Dtype) -> Result<()> {
    match param {
        ParamMut::Vector(vector) => {
            for (name, range) in &spec.tensors {
                source.read_rows(name, 0..1, &mut vector[range.clone()])?;
            }
            round(dtype, vector);
            Ok(())
        }
        ParamMut::Matrix(matrix) => fill_matrix(source, spec, matrix),
        ParamMut::Quantised(matrix) => fill_quantised(source, spec, matrix),
    }
}

/// Reads a matrix, a few rows at a time.
fn fill_matrix(source: &ModelSource, spec: &ParamSpec, matrix: &mut Matrix) -> Result<()> {
    const CHUNK_BYTES: usize = 8 << 20;
    // Whole tiles of 16 rows are written at once.
    let step = (CHUNK_BYTES / 4 / spec.cols).next_multiple_of(16);
    let mut buffer = Vec::new();
    for (name, range) in &spec.tensors {
        for from in (0..range.len()).step_by(step) {
            let rows = from..(from + step).min(range.len());
            buffer.resize(rows.len() * spec.cols, 0.0);
            source.read_rows(name, rows.clone(), &mut buffer)?;
            matrix.set_rows(range.start + rows.start, &buffer);
        }
    }
    Ok(())
}

/// The format that holds all tensors of a matrix as they are stored; `None` when one is not quantised.
fn stored_format(source: &ModelSource, spec: &ParamSpec) -> Option<QuantFormat> {
    let formats = spec.tensors.iter().map(|(name, _)| source.quant_format(name));
    formats.reduce(|a, b| Some(a?.join(b?))).flatten()
}

/// Reads a matrix as it is stored.
fn fill_quantised(source: &ModelSource, spec: &ParamSpec, matrix: &mut QuantMatrix) -> Result<()> {
    for (name, range) in &spec.tensors {
        let mut fits = Ok(());
        source.quantised_rows(name, &mut |row, numbers: QuantRow<'_>| {
            if fits.is_ok() {
                fits = matrix.set_row(range.start + row, numbers);
            }
        })?;
        fits.map_err(|e| {
            let message = format!("tensor {name:?}: {e}; --quantization none expands it");
            Error::model(message).in_file(Path::new(&source.name()))
        })?;
    }
    Ok(())
}

/// Rounds to what `dtype` can represent, so that a saved and reloaded vector is the same.
fn round(dtype: Dtype, values: &mut [f32]) {
    if dtype == Dtype::Bf16 {
        values.iter_mut().for_each(|x| *x = half::bf16::from_f32(*x).to_f32());
    }
}
