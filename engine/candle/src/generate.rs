//! Generation over paged KV: the scheduler's plans, run slice by slice on a candle device.
//!
//! `plan` (scheduler) -> forward, one slice after the other -> sample -> `commit`. The order of slices is
//! the plan's, so a slice that takes blocks from an earlier one of the same plan finds them written.
//! Continuous batching, chunked prefill, prefix sharing and preemption are the scheduler's, as in the
//! fast engine; rows of different sequences are not run together. Leaves out text and streaming.

use std::collections::HashMap;

use candle_core::{DType, Device};
use engine::{
    Continuation, Dtype, EngineConfig, Error, FinishReason, ModelSource, Result, Score,
    check_prompt, random,
};
use scheduler::{NewSequence, PrefixCache, Scheduler, SeqId, Slice};

use crate::adamw::Moments;
use crate::error::internal;
use crate::model::{CandleModel, Record, check_temperature};
use crate::pool::KvPool;
use crate::sample::draw;

/// KV memory when none is asked for, in bytes: 1 GiB.
const DEFAULT_KV_BYTES: u64 = 1 << 30;

/// Longest sequence when none is asked for, in tokens.
const DEFAULT_MODEL_LEN: usize = 8192;

/// An engine on a candle device: a model, its paged KV memory, and its optimizer state.
pub struct CandleEngine {
    pub(crate) model: CandleModel,
    pub(crate) scheduler: Scheduler,
    /// Made by the first step that trains.
    pub(crate) moments: Option<Moments>,
    pool: KvPool,
    max_model_len: usize,
}

/// How to go on from every prompt of a call.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerateSettings {
    /// Samples per prompt; at least 1.
    pub samples: usize,
    /// Divides the logits; 0 takes the most likely token.
    pub temperature: f32,
    /// Most tokens of a completion; at least 1. The context's end comes first.
    pub max_tokens: usize,
    /// Tokens that end a completion; empty to ignore the end of text.
    pub eos: Vec<u32>,
    /// Key of the random streams.
    pub seed: Seed,
}

/// Where a prompt's random stream comes from. A draw is keyed by the prompt's seed, the sample's index
/// and the token's position.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seed {
    /// Every prompt has this seed, like a request with a seed of its own.
    Each(u64),
    /// Prompt `i` has `random::hash(&[seed, i])`, as in the trainer's rollouts.
    Derived(u64),
}

/// One sample's answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Completion {
    /// Index of its prompt.
    pub prompt: usize,
    /// Index among the prompt's samples.
    pub sample: usize,
    /// Generated tokens, with the one that ended it.
    pub tokens: Vec<u32>,
    /// Their log-probabilities in nats at the temperature they were drawn at (1 for temperature 0).
    pub logprobs: Vec<f32>,
    /// Why it ended.
    pub finish: FinishReason,
}

impl Seed {
    fn of_prompt(self, prompt: usize) -> u64 {
        match self {
            Self::Each(seed) => seed,
            Self::Derived(seed) => random::hash(&[seed, prompt as u64]),
        }
    }
}

impl CandleEngine {
    /// Loads a model onto `device` and reserves its KV memory; see [`CandleEngine::new`]. No dtype in
    /// `config` means f32 on the CPU and bf16 elsewhere.
    ///
    /// # Errors
    /// As [`CandleModel::load`] and [`CandleEngine::new`].
    pub fn load(source: &ModelSource, device: &Device, config: &EngineConfig) -> Result<Self> {
        let dtype = match config.dtype {
            Some(Dtype::F32) => DType::F32,
            Some(Dtype::Bf16) => DType::BF16,
            None if device.is_cpu() => DType::F32,
            None => DType::BF16,
        };
        Self::new(CandleModel::load(source, device, dtype)?, config)
    }

    /// Puts a model to work, with KV memory beside it.
    ///
    /// Of `config`, dtype, threads, kernel level and seed do not apply; no KV memory means 1 GiB.
    ///
    /// # Errors
    /// `ErrorKind::Config` for a setting out of range.
    pub fn new(model: CandleModel, config: &EngineConfig) -> Result<Self> {
        config.validate()?;
        let context = model.config().max_context();
        let max_model_len = config.max_model_len.unwrap_or(context.min(DEFAULT_MODEL_LEN));
        if max_model_len == 0 || max_model_len > context {
            let message = format!("max_model_len is {max_model_len}, limit is 1 to {context}");
            return Err(Error::config(message));
        }
        let max_num_seqs = config.max_num_seqs.min(config.max_num_batched_tokens);
        let bytes = config.kv_cache_memory_bytes.unwrap_or(DEFAULT_KV_BYTES);
        let block_bytes = KvPool::block_bytes(model.config(), model.dtype(), config.block_size);
        let useful = max_num_seqs.saturating_mul(max_model_len.div_ceil(config.block_size));
        let num_blocks = usize::try_from(bytes / block_bytes).unwrap_or(usize::MAX).min(useful);
        let scheduler = Scheduler::new(scheduler::Config {
            block_size: config.block_size,
            num_blocks,
            max_num_seqs,
            max_num_batched_tokens: config.max_num_batched_tokens,
            max_model_len,
            prefix_cache: config.prefix_cache,
        })
        .map_err(|e| Error::config(e.to_string()))?;
        let place = (model.dtype(), model.device());
        let size = (num_blocks, config.block_size);
        let pool = KvPool::new(model.config(), place, size).map_err(internal)?;
        Ok(Self { model, scheduler, moments: None, pool, max_model_len })
    }

    /// The model.
    pub fn model(&self) -> &CandleModel {
        &self.model
    }

    /// Longest sequence, prompt and output together, in tokens.
    pub fn max_model_len(&self) -> usize {
        self.max_model_len
    }

    /// Blocks, cache hits and preemptions so far.
    pub fn stats(&self) -> scheduler::Stats {
        self.scheduler.stats()
    }

    /// How often the weights have changed.
    pub fn version(&self) -> scheduler::WeightsVersion {
        self.scheduler.version()
    }

    /// Completes every prompt `settings.samples` times; the completions come prompt by prompt.
    ///
    /// # Errors
    /// `ErrorKind::Request` for a prompt or a setting out of range; `ErrorKind::Numeric` when the model's
    /// logits are not finite. Nothing runs on then.
    pub fn generate(
        &mut self,
        prompts: &[Vec<u32>],
        settings: &GenerateSettings,
    ) -> Result<Vec<Completion>> {
        self.check_settings(settings)?;
        let limits = (self.max_model_len, self.model.config().vocab_size);
        let check = |prompt: &Vec<u32>| check_prompt(prompt, Continuation::Sample, limits);
        prompts.iter().try_for_each(check)?;
        let mut completions = Vec::with_capacity(prompts.len() * settings.samples);
        let mut running = HashMap::new();
        let result = self.add_all(prompts, settings, (&mut completions, &mut running));
        let result = result.and_then(|()| {
            while !self.scheduler.is_idle() {
                self.step(settings, (&mut completions, &mut running))?;
            }
            Ok(())
        });
        running.keys().for_each(|seq| {
            self.scheduler.abort(*seq);
        });
        result.map(|()| completions)
    }

    /// Log-probabilities and entropies of `sequences` under `temperature`, each as one pass without KV
    /// memory.
    ///
    /// # Errors
    /// `ErrorKind::Request` for an empty or too long sequence, an unknown token or a temperature that is
    /// not above 0; `ErrorKind::Numeric` when the model gives no finite numbers.
    pub fn score(&self, sequences: &[Vec<u32>], temperature: f32) -> Result<Vec<Score>> {
        check_temperature(temperature)?;
        let score = |tokens: &Vec<u32>| {
            self.model.check("text", tokens)?;
            let (logprobs, entropy) = self.model.score(tokens, temperature).map_err(internal)?;
            if logprobs.iter().chain(&entropy).all(|x| x.is_finite()) {
                return Ok(Score { logprobs, entropy });
            }
            Err(Error::numeric("the model's log-probabilities are not finite numbers"))
        };
        sequences.iter().map(score).collect()
    }

    fn check_settings(&self, settings: &GenerateSettings) -> Result<()> {
        for (name, value) in [("samples", settings.samples), ("max_tokens", settings.max_tokens)] {
            if value == 0 {
                return Err(Error::request(format!("{name} is 0, limit is at least 1")));
            }
        }
        match settings.temperature {
            0.0 => Ok(()),
            temperature => check_temperature(temperature),
        }
    }

    fn add_all(
        &mut self,
        prompts: &[Vec<u32>],
        settings: &GenerateSettings,
        (completions, running): (&mut Vec<Completion>, &mut HashMap<SeqId, usize>),
    ) -> Result<()> {
        for (prompt, tokens) in prompts.iter().enumerate() {
            let room = self.max_model_len - tokens.len();
            for sample in 0..settings.samples {
                let added = self.scheduler.add(NewSequence {
                    prompt: tokens.clone(),
                    max_total_tokens: tokens.len() + settings.max_tokens.min(room),
                    salt: 0,
                    prefix_cache: PrefixCache::On,
                });
                let seq = added.map_err(|e| Error::request(e.to_string()))?;
                running.insert(seq, completions.len());
                completions.push(Completion {
                    prompt,
                    sample,
                    tokens: Vec::new(),
                    logprobs: Vec::new(),
                    finish: FinishReason::Length,
                });
            }
        }
        Ok(())
    }

    /// Runs one plan and hands its tokens to the completions.
    fn step(
        &mut self,
        settings: &GenerateSettings,
        (completions, running): (&mut [Completion], &mut HashMap<SeqId, usize>),
    ) -> Result<()> {
        let plan = self.scheduler.plan().map_err(|e| Error::internal(e.to_string()))?;
        let slices = plan.slices.clone();
        let drawn = slices.iter().map(|slice| {
            let completion = &completions[running[&slice.seq]];
            Ok(self.run_slice(slice, settings, completion)?.map(|drawn| (slice.seq, drawn)))
        });
        let drawn: Vec<_> = match drawn.collect::<Result<Vec<_>>>() {
            Ok(drawn) => drawn.into_iter().flatten().collect(),
            Err(error) => {
                self.scheduler.rollback().map_err(|e| Error::internal(e.to_string()))?;
                return Err(error);
            }
        };
        let sampled: Vec<(SeqId, u32)> =
            drawn.iter().map(|(seq, (token, _))| (*seq, *token)).collect();
        self.scheduler.commit(&sampled).map_err(|e| Error::internal(e.to_string()))?;
        for (seq, (token, logprob)) in drawn {
            let completion = &mut completions[running[&seq]];
            completion.tokens.push(token);
            completion.logprobs.push(logprob);
            let total = self.scheduler.tokens(seq).len();
            let stops = settings.eos.contains(&token);
            if stops {
                completion.finish = FinishReason::Stop;
            }
            let full =
                completion.tokens.len() == settings.max_tokens || total == self.max_model_len;
            if stops || full {
                self.scheduler.finish(seq);
                running.remove(&seq);
            }
        }
        Ok(())
    }

    /// Runs a slice and draws the token after it, if it is one that samples.
    fn run_slice(
        &self,
        slice: &Slice,
        settings: &GenerateSettings,
        completion: &Completion,
    ) -> Result<Option<(u32, f32)>> {
        let known = self.scheduler.tokens(slice.seq);
        let (start, end) = (slice.start, slice.start + slice.len);
        let logits = || {
            let net = self.model.net(Record::No);
            let blocks = self.scheduler.blocks(slice.seq);
            let pages = self.pool.pages(blocks, (start, end), self.model.device())?;
            let hidden = net.hidden(&known[start..end], start, &pages)?;
            if !slice.samples {
                return Ok(None);
            }
            let logits = net.logits(&hidden.narrow(0, slice.len - 1, 1)?)?;
            logits.squeeze(0)?.to_vec1::<f32>().map(Some)
        };
        let Some(logits) = logits().map_err(internal)? else { return Ok(None) };
        let seed = settings.seed.of_prompt(completion.prompt);
        let uniform = random::uniform(&[seed, completion.sample as u64, known.len() as u64]);
        match draw(&logits, settings.temperature, uniform) {
            Some(drawn) => Ok(Some(drawn)),
            None => Err(Error::numeric("the model's logits are not finite numbers")),
        }
    }
}
