//! Supervised training: cross-entropy of completions given prompts, by the same forward and backward.
//!
//! The loss of a step is the mean over its completion tokens, the end of text included. Leaves out
//! learning from prompts, and packing several conversations into one sequence.

use std::path::{Path, PathBuf};

use engine::model::ModelConfig;
use engine::model::param_specs;
use engine::model::safetensors::Writer;
use engine::{Dtype, Engine, EngineConfig, EosRule, WeightsUpdate};

use crate::checkpoint::CheckpointStore;
use crate::config::{SftConfig, kept_for_backward};
use crate::data::{self, Cursor, Sampler, SftRow, Visit};
use crate::encode::PromptEncoder;
use crate::error::{Error, Result};
use crate::eval::Evaluation;
use crate::learner::{LossGradient, Packed};
use crate::lock::RunLock;
use crate::memory::{Demand, planned_tokens_beside};
use crate::metrics::{Metrics, MetricsWriter, name};
use crate::optimizer::global_norm;
use crate::packing::pack;
use crate::random::{Purpose, Stream};
use crate::rollout::{self, RolloutSettings};
use crate::run::{Progress, due, make_way};
use crate::save::{ModelFiles, save_model, tensors};
use crate::tasks::{Arith, Split};
use crate::update::UpdateState;
use crate::validation::Validation;
use crate::verifier::Counts;

/// Built-in pairs that make up an epoch, and a validation set.
const TASKS: [u64; 2] = [50_000, 256];
/// Standard deviation of initial weights (GPT-2's, and the default of Llama configurations).
const INITIAL_STD: f64 = 0.02;
/// Longest answer that a validation waits for, in tokens.
const MAX_ANSWER: usize = 64;

/// A prompt with its completion, in tokens.
struct Pair {
    tokens: Vec<u32>,
    prompt_len: usize,
}

/// Writes a model with random weights of the shape `config` into `dir`; the tokenizer's files are
/// copied from `tokenizer_dir`. Matrices are normal with standard deviation 0.02 (those that write to
/// the residual stream divided by the square root of twice the layers), norms 1, biases 0.
///
/// # Errors
/// When a file cannot be read or written.
pub fn initial_weights(
    config: &ModelConfig,
    tokenizer_dir: &Path,
    seed: u64,
    dir: &Path,
) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))?;
    let path = dir.join("config.json");
    let json = config.to_hf_json(Dtype::F32).map_err(Error::engine)?;
    std::fs::write(&path, json).map_err(|e| Error::io(&path, e))?;
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        let from = tokenizer_dir.join(file);
        std::fs::copy(&from, dir.join(file)).map_err(|e| Error::io(&from, e))?;
    }
    let residual = 1.0 / (2.0 * config.layers as f64).sqrt();
    let tensors = tensors(&param_specs(config), "");
    let mut writer = Writer::create(&dir.join("model.safetensors"), &tensors, Dtype::F32)
        .map_err(Error::engine)?;
    for (index, tensor) in tensors.iter().enumerate() {
        let mut random = Stream::keyed(seed, Purpose::Init, &[index as u64]);
        let writes_back = ["o_proj.weight", "down_proj.weight"];
        let scale = writes_back.iter().any(|end| tensor.name.ends_with(end));
        let std = INITIAL_STD * if scale { residual } else { 1.0 };
        let mut value = || match (tensor.shape.len(), tensor.name.ends_with("bias")) {
            (1, true) => 0.0,
            (1, false) => 1.0,
            _ => (random.normal() * std) as f32,
        };
        let values: Vec<f32> = (0..tensor.shape.iter().product()).map(|_| value()).collect();
        writer.append(&values).map_err(Error::engine)?;
    }
    writer.finish().map_err(Error::engine)
}

/// Trains the engine that `open` loads as `config` says, or until `stop` says so, and returns the last
/// checkpoint. What an older run left in the output folder is moved aside before the first step.
///
/// # Errors
/// When another run writes to the folder, a row is bad or too long, numbers are not finite, or files cannot be
/// written.
pub fn run_sft(
    open: impl FnOnce() -> Result<Engine>,
    config: &SftConfig,
    stop: &dyn Fn() -> bool,
    tell: &mut dyn FnMut(Progress),
) -> Result<PathBuf> {
    let output = PathBuf::from(&config.trainer.output);
    let _lock = RunLock::take(&output)?;
    let store = CheckpointStore::open(&output, config.trainer.keep_checkpoints)?;
    store.check_start(&config.model.path)?;
    let engine = open()?;
    let files = ModelFiles::new(&engine)?;
    let mut config = config.clone();
    if config.trainer.max_tokens_per_microbatch == 0 {
        let demand = Demand::sft(&config, &EngineConfig::default());
        config.trainer.max_tokens_per_microbatch = planned_tokens_beside(&engine, &demand);
    }
    let mut sft = Sft::new(engine, &config)?;
    make_way(&store, None, tell)?;
    let path = output.join("config.toml");
    std::fs::write(&path, config.to_toml()).map_err(|e| Error::io(&path, e))?;
    let mut metrics = MetricsWriter::create(&output.join("metrics.jsonl"))?;
    let t = &config.trainer;
    for step in 1..=t.total_steps {
        let mut line = sft.step(step)?;
        let last = step == t.total_steps || stop();
        if !sft.val.is_empty() && (due(t.test_freq, step) || (last && t.test_freq > 0)) {
            let validation = sft.validate()?;
            line.set(name::VAL_ACCURACY, validation.accuracy);
            tell(Progress::Validated(step, validation));
        }
        metrics.write(&line)?;
        tell(Progress::Step(line));
        if due(t.save_freq, step) || last {
            let writer = store.begin(step)?;
            let optimizer = &sft.state.optimizer;
            save_model(&files, writer.path(), optimizer.specs(), optimizer.masters())
                .map_err(|e| writer.named(e))?;
            let path = writer.publish()?.path;
            tell(Progress::Saved(path.clone()));
            if last {
                return Ok(path);
            }
        }
    }
    unreachable!("the last step returns, and there is at least one")
}

struct Sft<'a> {
    engine: Engine,
    config: &'a SftConfig,
    state: UpdateState,
    rows: Vec<SftRow>,
    val: Vec<SftRow>,
    sampler: Sampler,
    pairs: Pairs,
}

/// Makes tokens of rows.
struct Pairs {
    encoder: PromptEncoder,
    eos: u32,
    /// `data.max_length`, in tokens.
    longest: usize,
    /// The model's context, in tokens.
    context: usize,
}

impl Pairs {
    fn pair(&self, row: &SftRow) -> Result<Pair> {
        let mut tokens = self.encoder.tokens(&row.prompt)?;
        let prompt_len = tokens.len();
        tokens.extend(self.encoder.encode_completion(&row.completion)?);
        tokens.push(self.eos);
        Ok(Pair { tokens, prompt_len })
    }

    /// What is wrong with the length of a row to train on.
    fn pair_fault(&self, row: &SftRow) -> Result<Option<String>> {
        let Pair { tokens, prompt_len } = self.pair(row)?;
        Ok(self.fault("prompt and completion have", prompt_len, tokens.len()))
    }

    /// The same for one to validate on, of which the answer is one token or more.
    fn prompt_fault(&self, row: &SftRow) -> Result<Option<String>> {
        let len = self.encoder.tokens(&row.prompt)?.len();
        Ok(self.fault("prompt and one token to answer have", len, len + 1))
    }

    fn fault(&self, what: &str, prompt_len: usize, len: usize) -> Option<String> {
        let (longest, context) = (self.longest, self.context);
        match len {
            _ if prompt_len == 0 => Some("prompt has 0 tokens, limit is 1 or more".to_owned()),
            _ if len > longest => {
                Some(format!("{what} {len} tokens, data.max_length is {longest}"))
            }
            _ if len > context => {
                Some(format!("{what} {len} tokens, the context of the model is {context}"))
            }
            _ => None,
        }
    }
}

impl<'a> Sft<'a> {
    fn new(mut engine: Engine, config: &'a SftConfig) -> Result<Self> {
        let d = &config.data;
        let text = (engine.tokenizer(), engine.chat_template());
        let encoder = PromptEncoder::new(text, d.prompt_template, d.max_length)?;
        let eos = *engine.eos().first().ok_or_else(|| {
            Error::engine(engine::Error::model("the model has no end-of-text token"))
        })?;
        let pairs = Pairs { encoder, eos, longest: d.max_length, context: engine.max_model_len() };
        let train = || Arith { seed: d.seed, split: Split::Train }.sft_rows(TASKS[0], d.stutter);
        let rows = load(&d.train_files, &train, &|row| pairs.pair_fault(row))?;
        let test = || Arith { seed: 0, split: Split::Test }.sft_rows(TASKS[1], 0.0);
        let val = load(&d.val_files, &test, &|row| match config.trainer.test_freq {
            0 => Ok(None),
            _ => pairs.prompt_fault(row),
        })?;
        let visit = if d.shuffle { Visit::Shuffled(d.seed) } else { Visit::InOrder };
        let sampler = Sampler::new(rows.len(), visit, Cursor::default());
        let mut update = engine.begin_update().map_err(Error::engine)?;
        let state =
            UpdateState::new(update.decoder().0, kept_for_backward(config.trainer.recompute));
        drop(update);
        Ok(Self { engine, config, state, rows, val, sampler, pairs })
    }

    fn step(&mut self, step: u64) -> Result<Metrics> {
        let begin = std::time::Instant::now();
        let batch = self.sampler.next_batch(self.config.data.train_batch_size);
        let pairs =
            batch.iter().map(|i| self.pairs.pair(&self.rows[*i])).collect::<Result<Vec<_>>>()?;
        let packed: Vec<Packed<'_>> = pairs
            .iter()
            .map(|pair| Packed { tokens: &pair.tokens, prompt_len: pair.prompt_len })
            .collect();
        let lr = self.config.optimizer.schedule(self.config.trainer.total_steps).rate(step);
        let mut update = self.engine.begin_update().map_err(Error::engine)?;
        let (loss, norm) = learn(&mut self.state, &mut update, self.config, &packed, lr)?;
        drop(update);
        let tokens: usize = pairs.iter().map(|pair| pair.tokens.len()).sum();
        let seconds = begin.elapsed().as_secs_f64();
        let mut metrics = Metrics::new();
        metrics.set(name::GLOBAL_STEP, step as f64);
        metrics.set("train/loss", loss);
        metrics.set(name::GRAD_NORM, norm);
        metrics.set(name::LR, lr);
        metrics.set(name::TOTAL_TOKENS, tokens as f64);
        metrics.set(name::TIME_STEP, seconds);
        metrics.set(name::THROUGHPUT, tokens as f64 / seconds);
        Ok(metrics)
    }

    /// Share of held-out prompts that are answered, greedily, with exactly the completion.
    fn validate(&mut self) -> Result<Validation> {
        let tokens = |row: &SftRow| self.pairs.encoder.tokens(&row.prompt);
        let prompts: Vec<Vec<u32>> = self.val.iter().map(tokens).collect::<Result<_>>()?;
        let settings = RolloutSettings {
            samples: 1,
            temperature: 0.0,
            top_p: 1.0,
            top_k: None,
            max_tokens: MAX_ANSWER,
            stop: Vec::new(),
            eos: EosRule::Stop,
            seed: 0,
        };
        let mut right = 0;
        let val = &self.val;
        rollout::generate(&mut self.engine, &prompts, &settings, &mut |episode| {
            right += usize::from(episode.text == val[episode.prompt].completion);
        })?;
        let accuracy = right as f64 / self.val.len() as f64;
        let (failed, evaluation) = (Counts::default(), Evaluation::default());
        Ok(Validation { reward: accuracy, accuracy, rows: self.val.len(), failed, evaluation })
    }
}

/// One update on `packed`; returns its loss in nats a token, and the norm of its gradient.
fn learn(
    state: &mut UpdateState,
    update: &mut WeightsUpdate<'_>,
    config: &SftConfig,
    packed: &[Packed<'_>],
    lr: f64,
) -> Result<(f64, f64)> {
    let (decoder, kernels) = update.decoder();
    let targets: usize = packed.iter().map(Packed::targets).sum();
    let mut loss = 0.0;
    state.grads.clear();
    for micro in pack(packed, config.trainer.max_tokens_per_microbatch) {
        let micro = &packed[micro];
        let stats = state.learner.forward(decoder, kernels, micro, 1.0);
        loss -= stats.iter().map(|s| f64::from(s.log_prob)).sum::<f64>() / targets as f64;
        let dlogp = vec![-1.0 / targets as f32; stats.len()];
        let gradient =
            LossGradient { stats: &stats, inv_temperature: 1.0, dlogp: &dlogp, dentropy: None };
        state.learner.backward(decoder, kernels, &gradient, &mut state.grads);
    }
    let norm = global_norm(kernels, &state.grads);
    if !(loss.is_finite() && norm.is_finite()) {
        return Err(Error::numeric(format!("loss is {loss}, norm of its gradient is {norm}")));
    }
    let settings = config.optimizer.adamw(lr, norm);
    state.optimizer.apply(decoder, kernels, &state.grads, &settings);
    Ok((loss, norm))
}

/// The rows of `files`, of which `built_in` are those of `builtin:arith`; fails at the first one with a `fault`.
fn load(
    files: &[String],
    built_in: &dyn Fn() -> Vec<SftRow>,
    fault: &dyn Fn(&SftRow) -> Result<Option<String>>,
) -> Result<Vec<SftRow>> {
    let mut all = Vec::new();
    for file in files {
        let rows = match file.as_str() {
            "builtin:arith" => built_in(),
            path => data::load_sft(&[Path::new(path)])?,
        };
        for (index, row) in rows.iter().enumerate() {
            if let Some(message) = fault(row)? {
                return Err(data::bad_row(Path::new(file), index, &message));
            }
        }
        all.extend(rows);
    }
    Ok(all)
}
