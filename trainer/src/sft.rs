//! Supervised training: cross-entropy of completions given prompts, by the same forward and backward.
//!
//! The loss of a step is the mean over its completion tokens, the end of text included. A run goes on from
//! its checkpoints to the same bits, as one of reinforcement learning does. Leaves out learning from
//! prompts, and packing several conversations into one sequence.

use std::path::{Path, PathBuf};

use engine::model::ModelConfig;
use engine::model::param_specs;
use engine::model::safetensors::Writer;
use engine::{Dtype, Engine, EngineConfig, EosRule, WeightsUpdate};

use crate::checkpoint::{Checkpoint, CheckpointStore, TrainState};
use crate::config::{SftConfig, SftDataConfig, kept_for_backward};
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
use crate::resume::{Earlier, Identity, Learning, same_place};
use crate::rollout::{self, RolloutSettings};
use crate::run::{Progress, Resume, due, make_way, over};
use crate::save::{ModelFiles, save_learnt, tensors};
use crate::tasks::{Arith, Split};
use crate::update::UpdateState;
use crate::validation::Validation;
use crate::verifier::Counts;

/// Built-in pairs that make up an epoch, and a validation set.
const TASKS: [u64; 2] = [50_000, 256];
/// Standard deviation of initial weights (GPT-2's, and the default of Llama configurations).
const INITIAL_STD: f64 = 0.02;

/// A prompt with its completion, in tokens.
struct Pair {
    tokens: Vec<u32>,
    prompt_len: usize,
}

/// Writes a model with random weights of the shape `config` into `dir`; the files of tokenizer and chat template
/// are copied from `tokenizer_dir`. Matrices are normal with standard deviation 0.02 (those that write to
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
    let template = "chat_template.jinja";
    let has_template = tokenizer_dir.join(template).exists();
    let files = ["tokenizer.json", "tokenizer_config.json"].into_iter();
    for file in files.chain(has_template.then_some(template)) {
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

/// How a supervised run ended, with its last checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SftEnd {
    /// All steps are done.
    Done(PathBuf),
    /// It was asked to stop; the checkpoint goes on from there.
    Resumable(PathBuf),
}

/// Trains as `config` says from where `resume` says, to the end or until `stop` says so after a step. `open` loads
/// the engine: from the checkpoint given to it, or else what the configuration begins with; in the format given to
/// it where the caller has no choice of its own. What an older run left in the output folder, or this one at later
/// steps, is moved aside before the first step.
///
/// # Errors
/// When another run writes to the folder, a row is bad or too long, numbers are not finite, or files cannot be
/// written; what was published stays whole. Errors of `open` are its own.
pub fn run_sft<E: From<Error>>(
    config: &SftConfig,
    resume: &Resume,
    open: impl FnOnce(Option<&Path>, Option<Dtype>) -> Result<Engine, E>,
    stop: &dyn Fn() -> bool,
    tell: &mut dyn FnMut(Progress),
) -> Result<SftEnd, E> {
    let output = PathBuf::from(&config.trainer.output);
    let _lock = RunLock::take(&output)?;
    let store = CheckpointStore::open(&output, config.trainer.keep_checkpoints)?;
    let from = Earlier::find(resume, &store, (Learning::Completions, &config.model.path), tell)?;
    let checkpoint = from.as_ref().map(|from| &*from.path);
    if let Some(from) = &from {
        check_shape(from, &config.model.config_json)?;
    }
    let dtype = from.as_ref().map_or(Ok(None), Earlier::dtype)?;
    let engine = open(checkpoint, dtype)?;
    let mut config = config.clone();
    if let Some(from) = &from {
        from.check_dtype(engine.dtype())?;
        if config.trainer.max_tokens_per_microbatch == 0 {
            config.trainer.max_tokens_per_microbatch = from.budget();
        }
    }
    if config.trainer.max_tokens_per_microbatch == 0 {
        let demand = Demand::sft(&config, &EngineConfig::default());
        config.trainer.max_tokens_per_microbatch = planned_tokens_beside(&engine, &demand);
    }
    let files = ModelFiles::new(&engine)?;
    let mut sft = Sft::new(engine, &config)?;
    if let Some(from) = &from {
        sft.restore(from)?;
        from.changes(&config).into_iter().for_each(|line| tell(Progress::Note(line)));
    }
    over(sft.steps, config.trainer.total_steps, tell);
    make_way(&store, checkpoint, tell)?;
    let path = output.join("config.toml");
    std::fs::write(&path, config.to_toml()).map_err(|e| Error::io(&path, e))?;
    let path = output.join("metrics.jsonl");
    let metrics = match &from {
        Some(_) => MetricsWriter::resume(&path, sft.steps)?,
        None => MetricsWriter::create(&path)?,
    };
    let saved = from.map(|from| from.path);
    Ok(Run { sft, store, files, metrics, saved }.steps(stop, tell)?)
}

/// Fails unless a run that begins with random weights has the shape of the one that it goes on with.
fn check_shape(from: &Earlier, now: &str) -> Result<()> {
    let then = from.value("model", "config_json").and_then(toml::Value::as_str).unwrap_or(now);
    if same_place(then, now) {
        return Ok(());
    }
    Err(Error::config(format!(
        "model.config_json is {now:?}, was {then:?} when {} was written: go on with that, or begin anew with \
         --resume never or another --output",
        from.path.display()
    )))
}

/// A run, and the files it leaves.
struct Run<'a> {
    sft: Sft<'a>,
    store: CheckpointStore,
    files: ModelFiles,
    metrics: MetricsWriter,
    /// The last checkpoint, which may be the one gone on from.
    saved: Option<PathBuf>,
}

impl Run<'_> {
    fn steps(mut self, stop: &dyn Fn() -> bool, tell: &mut dyn FnMut(Progress)) -> Result<SftEnd> {
        let t = &self.sft.config.trainer;
        while self.sft.steps < t.total_steps {
            let mut line = self.sft.step()?;
            let step = self.sft.steps;
            let stopping = stop() && step < t.total_steps;
            let last = stopping || step == t.total_steps;
            if !self.sft.val.is_empty() && (due(t.test_freq, step) || (last && t.test_freq > 0)) {
                let validation = self.sft.validate()?;
                line.set(name::VAL_ACCURACY, validation.accuracy);
                tell(Progress::Validated(step, validation));
            }
            // Before the checkpoint appears: whoever goes on from it finds the lines of all its steps.
            self.metrics.write(&line)?;
            tell(Progress::Step(line));
            if due(t.save_freq, step) || last {
                let path = self.save()?;
                tell(Progress::Saved(path.clone()));
                if stopping {
                    return Ok(SftEnd::Resumable(path));
                }
                self.saved = Some(path);
            }
        }
        Ok(SftEnd::Done(self.saved.expect("a run is saved after its last step")))
    }

    fn save(&self) -> Result<PathBuf> {
        let Sft { state, config, steps, .. } = &self.sft;
        let writer = self.store.begin(*steps)?;
        save_learnt(&self.files, &writer, &state.optimizer)?;
        writer.state(&self.sft.train_state(), &config.to_toml())?;
        let Checkpoint { path, .. } = writer.publish()?;
        Ok(path)
    }
}

struct Sft<'a> {
    engine: Engine,
    config: &'a SftConfig,
    state: UpdateState,
    /// Steps completed.
    steps: u64,
    rows: Vec<SftRow>,
    /// Digest of the rows.
    hash: String,
    val: Vec<SftRow>,
    /// Longest answer that a validation waits for, in tokens.
    max_answer: usize,
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

    /// Tokens of the longest completion of `rows`, the end of text included, as far as a sequence may go. A longer
    /// answer is wrong.
    fn longest_answer(&self, rows: &[SftRow]) -> Result<usize> {
        let mut longest = 1;
        for row in rows {
            longest = longest.max(self.encoder.encode_completion(&row.completion)?.len() + 1);
        }
        Ok(longest.min(self.longest).min(self.context))
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
        let sampler = sampler(&rows, d, Cursor::default());
        let mut update = engine.begin_update().map_err(Error::engine)?;
        let state =
            UpdateState::new(update.decoder().0, kept_for_backward(config.trainer.recompute));
        drop(update);
        let hash = data::digest(&rows);
        let max_answer = pairs.longest_answer(&val)?;
        Ok(Self { engine, config, state, steps: 0, rows, hash, val, max_answer, sampler, pairs })
    }

    /// What a checkpoint says about the run.
    fn train_state(&self) -> TrainState {
        let place = (self.steps, self.sampler.cursor());
        let learnt = (&self.engine, &self.state.optimizer);
        identity(&self.hash, self.config).state(place, learnt, self.config.hash())
    }

    /// Goes on where the checkpoint `from`, from which the engine was loaded, was written.
    fn restore(&mut self, from: &Earlier) -> Result<()> {
        let own = identity(&self.hash, self.config);
        let state = from.restore(own, (&mut self.engine, &mut self.state.optimizer))?;
        self.steps = state.step;
        self.sampler = sampler(&self.rows, &self.config.data, state.cursor);
        Ok(())
    }

    fn step(&mut self) -> Result<Metrics> {
        let begin = std::time::Instant::now();
        let step = self.steps + 1;
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
        self.steps = step;
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
            max_tokens: self.max_answer,
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

/// What makes a run on rows of this digest the same as an earlier one.
fn identity<'a>(data_hash: &'a str, config: &SftConfig) -> Identity<'a> {
    Identity { data_hash, seed: config.trainer.seed, data_seed: config.data.seed }
}

/// Hands out `rows` as `data` says, from `cursor` on.
fn sampler(rows: &[SftRow], data: &SftDataConfig, cursor: Cursor) -> Sampler {
    let visit = if data.shuffle { Visit::Shuffled(data.seed) } else { Visit::InOrder };
    Sampler::new(rows.len(), visit, cursor)
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

#[cfg(test)]
mod tests {
    use engine::model::hub::Builtin;
    use engine::model::open_builtin;

    use super::*;
    use crate::config::PromptTemplate;
    use crate::data::Prompt;

    #[test]
    fn a_validation_waits_for_as_long_an_answer_as_its_longest_completion() {
        let source = open_builtin(Builtin::Arith).unwrap();
        let engine = Engine::load(&source, &EngineConfig::default()).unwrap();
        let text = (engine.tokenizer(), engine.chat_template());
        let encoder = PromptEncoder::new(text, PromptTemplate::Raw, 200).unwrap();
        let pairs = Pairs { encoder, eos: engine.eos()[0], longest: 200, context: 128 };
        let row = |digits: usize| SftRow {
            prompt: Prompt::Text("1+1=".to_owned()),
            completion: "7".repeat(digits),
        };
        let tokens = |row: &SftRow| pairs.pair(row).unwrap();
        let long = tokens(&row(100));
        let answer = long.tokens.len() - long.prompt_len;
        assert!(answer > 64, "{answer}");
        assert_eq!(pairs.longest_answer(&[row(1), row(100), row(2)]).unwrap(), answer);
        assert_eq!(pairs.longest_answer(&[row(150)]).unwrap(), 128);
        assert_eq!(Pairs { longest: 90, ..pairs }.longest_answer(&[row(150)]).unwrap(), 90);
    }
}
