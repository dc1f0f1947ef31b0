//! The synchronous engine: requests in, events out, one step at a time.
//!
//! `plan` (scheduler) -> forward over ragged slices -> logits -> sample -> `commit`. No threads of its
//! own besides the kernels', no channels, no clock: see [`crate::Service`] for concurrent callers.
//! `engine/step.rs` has the step, and what becomes of a panic in it.

use std::collections::HashMap;
use std::sync::Arc;

use kernels::{Dtype, Kernels};
use scheduler::{NewSequence, PrefixCache, Scheduler, SeqId, Slice, WeightsVersion};

use crate::config::EngineConfig;
use crate::decoder::{Decoder, Weights};
use crate::draw::Drawn;
use crate::error::{Error, Result};
use crate::guess::SpeculationStats;
use crate::load::{end_tokens, load_text};
use crate::memory::MemoryPlan;
use crate::model::{GenerationDefaults, ModelConfig, ModelSource};
use crate::random;
use crate::request::{
    Continuation, Event, FinishReason, Request, RequestId, SampleError, Token, check_prompt,
    token_in_vocabulary,
};
use crate::runner::Runner;
use crate::sequence::{Sample, Stops};
use crate::text::{ChatTemplate, Tokenizer};
use crate::update::WeightsUpdate;

mod replace;
mod step;

pub(crate) use replace::check_replacement;

/// Called with the tokens of each sequence of a batch before it runs: a test's way to make it panic.
pub(crate) type Fault = Box<dyn FnMut(&[&[u32]]) + Send>;

/// Log-probabilities of given tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct Score {
    /// `[T - 1]`: log-probability in nats of token `i + 1` given the tokens up to `i`.
    pub logprobs: Vec<f32>,
    /// `[T]`: entropy in nats of the distribution after each token.
    pub entropy: Vec<f32>,
}

/// An engine: one model, its KV memory, and the requests it works on.
pub struct Engine {
    runner: Runner,
    scheduler: Scheduler,
    plan: MemoryPlan,
    config: EngineConfig,
    tokenizer: Option<Arc<Tokenizer>>,
    chat_template: Option<Arc<ChatTemplate>>,
    defaults: GenerationDefaults,
    /// Tokens that end a text.
    eos: Vec<u32>,
    samples: HashMap<SeqId, Sample>,
    sequences: HashMap<RequestId, Vec<SeqId>>,
    next_request: u64,
    /// Events that wait for the next step: ends of aborted samples.
    pending: Vec<Event>,
    slices: Vec<Slice>,
    /// Samples that the last step computed something of for the first time.
    begun: Vec<(RequestId, usize)>,
    /// Tokens that the last step computed.
    step_tokens: usize,
    /// Samples that ended for logits that were no finite numbers.
    nan_logits: u64,
    speculation: SpeculationStats,
    /// Only ever set by tests.
    fault: Option<Fault>,
}

impl Engine {
    /// Loads a model and reserves its memory.
    ///
    /// # Errors
    /// `ErrorKind::Model` for files that are missing, damaged or of an unknown kind;
    /// `ErrorKind::Config` for a setting out of range, and for memory that does not suffice.
    pub fn load(source: &ModelSource, config: &EngineConfig) -> Result<Self> {
        config.validate()?;
        let plan = MemoryPlan::for_source(source, config)?;
        plan.check_room()?;
        let level = config.resolved_level();
        let kernels = Kernels::new(level, config.resolved_threads())
            .ok_or_else(|| Error::unsupported(format!("this processor has no {level} kernels")))?;
        let dtype = config.resolved_dtype();
        let weights = Weights::load(source, dtype, config.quantization, &kernels)?;
        let decoder = Decoder::new(source.config().clone(), weights, plan.max_model_len);
        let scheduler = Scheduler::new(scheduler::Config {
            block_size: config.block_size,
            num_blocks: plan.kv_blocks,
            // A row of a step belongs to one sequence, so more than rows cannot run.
            max_num_seqs: config.max_num_seqs.min(config.max_num_batched_tokens),
            max_num_batched_tokens: config.max_num_batched_tokens,
            max_model_len: plan.max_model_len,
            prefix_cache: config.prefix_cache,
        })
        .map_err(|e| Error::config(e.to_string()))?;
        let (tokenizer, chat_template) = load_text(source)?;
        Ok(Self {
            runner: Runner::new(kernels, decoder, &plan, config.resolved_kv_dtype()),
            scheduler,
            plan,
            config: config.clone(),
            eos: end_tokens(source, tokenizer.as_ref()),
            tokenizer: tokenizer.map(Arc::new),
            chat_template: chat_template.map(Arc::new),
            defaults: source.generation().clone(),
            samples: HashMap::new(),
            sequences: HashMap::new(),
            next_request: 0,
            pending: Vec::new(),
            slices: Vec::new(),
            begun: Vec::new(),
            step_tokens: 0,
            nan_logits: 0,
            speculation: SpeculationStats::default(),
            fault: None,
        })
    }

    /// The model's shape.
    pub fn model(&self) -> &ModelConfig {
        &self.runner.decoder.config
    }

    /// The tokenizer, if the model came with one.
    pub fn tokenizer(&self) -> Option<&Arc<Tokenizer>> {
        self.tokenizer.as_ref()
    }

    /// The chat template, if the model came with one.
    pub fn chat_template(&self) -> Option<&Arc<ChatTemplate>> {
        self.chat_template.as_ref()
    }

    /// The sampling settings that the model's makers suggest.
    pub fn generation_defaults(&self) -> &GenerationDefaults {
        &self.defaults
    }

    /// Tokens that end a text: the model's, then its tokenizer's.
    pub fn eos(&self) -> &[u32] {
        &self.eos
    }

    /// Longest sequence, prompt and output together, in tokens.
    pub fn max_model_len(&self) -> usize {
        self.plan.max_model_len
    }

    /// How often the weights have changed.
    pub fn version(&self) -> WeightsVersion {
        self.scheduler.version()
    }

    /// Blocks, cache hits and preemptions so far.
    pub fn stats(&self) -> scheduler::Stats {
        self.scheduler.stats()
    }

    /// Samples so far that ended with an error because their logits were not finite numbers.
    pub fn nan_logits(&self) -> u64 {
        self.nan_logits
    }

    /// Guesses so far.
    pub fn speculation(&self) -> SpeculationStats {
        self.speculation
    }

    /// How the engine was set up.
    pub fn config(&self) -> &EngineConfig {
        &self.config
    }

    /// Sequences that run and that wait.
    pub fn load_counts(&self) -> (usize, usize) {
        (self.scheduler.running(), self.scheduler.waiting())
    }

    /// What was reserved.
    pub fn memory_plan(&self) -> &MemoryPlan {
        &self.plan
    }

    /// Format of weights, products and KV cache.
    pub fn dtype(&self) -> Dtype {
        self.runner.decoder.weights.dtype()
    }

    /// The kernels in use.
    pub fn kernels(&self) -> &Kernels {
        &self.runner.kernels
    }

    /// The model.
    pub fn decoder(&self) -> &Decoder {
        &self.runner.decoder
    }

    /// Gives up all but the model: its weights as they are now.
    pub fn into_decoder(self) -> Decoder {
        self.runner.decoder
    }

    /// Takes in a request; its samples begin with the next step.
    ///
    /// # Errors
    /// `ErrorKind::Request` when the prompt or a parameter is out of range; nothing is changed then.
    pub fn add(&mut self, request: Request) -> Result<RequestId> {
        self.validate(&request)?;
        let id = RequestId(self.next_request);
        let seed =
            request.params.seed.unwrap_or_else(|| random::hash(&[self.config.seed, id.0, 1]));
        let room = self.plan.max_model_len - request.prompt.len();
        let max_new = match request.continuation {
            Continuation::Sample => request.params.max_tokens.unwrap_or(room).min(room),
            Continuation::Omit => 0,
        };
        let params = Arc::new(request.params.clone());
        let stops = Stops::new(&params, &self.eos)?;
        let mut sequences = Vec::with_capacity(params.n);
        for index in 0..params.n {
            // Who wants to know of the prompt computes it; the other samples take it from there.
            let scored = index == 0 && request.prompt_logprobs.is_some();
            let added = self.scheduler.add(NewSequence {
                prompt: request.prompt.clone(),
                max_total_tokens: request.prompt.len() + max_new,
                salt: request.cache_salt,
                prefix_cache: if scored { PrefixCache::Off } else { PrefixCache::On },
            });
            let seq = match added {
                Ok(seq) => seq,
                Err(error) => {
                    self.drop_sequences(&sequences);
                    return Err(Error::request(error.to_string()));
                }
            };
            sequences.push(seq);
            let key = (id, index, seed);
            let sample = Sample::new(key, &request, &params, &stops, self.tokenizer.as_ref());
            self.samples.insert(seq, sample);
        }
        self.next_request += 1;
        self.sequences.insert(id, sequences);
        Ok(id)
    }

    fn validate(&self, request: &Request) -> Result<()> {
        let vocab_size = self.model().vocab_size;
        request.params.validate(vocab_size)?;
        request.validate_prompt_logprobs()?;
        let limits = (self.plan.max_model_len, vocab_size);
        check_prompt(&request.prompt, request.continuation, limits)?;
        if !request.params.stop.is_empty() && self.tokenizer.is_none() {
            return Err(Error::request("stop strings need a tokenizer, the model has none"));
        }
        Ok(())
    }

    fn drop_sequences(&mut self, sequences: &[SeqId]) {
        for seq in sequences {
            self.scheduler.abort(*seq);
            self.samples.remove(seq);
        }
    }

    /// Ends a request; the next step reports the end of each of its samples. False if it is unknown or
    /// over already.
    pub fn abort(&mut self, id: RequestId) -> bool {
        let Some(sequences) = self.sequences.remove(&id) else { return false };
        for seq in sequences {
            let cached = self.scheduler.cached_tokens(seq);
            self.scheduler.abort(seq);
            if let Some(mut sample) = self.samples.remove(&seq) {
                let mut finished = sample.finished(FinishReason::Abort, cached);
                // An aborted answer may end in half a character; nobody is waiting for it.
                finished.text = sample.flush().unwrap_or_default().text;
                self.pending.push(Event::Finished(finished));
            }
        }
        true
    }

    /// Whether a step would do something.
    pub fn has_work(&self) -> bool {
        !self.pending.is_empty() || self.scheduler.has_work()
    }

    /// Plans the next batch into `slices`; false when there is nothing to run.
    fn plan_slices(&mut self) -> Result<bool> {
        self.slices.clear();
        let plan = self.scheduler.plan().map_err(|e| Error::internal(e.to_string()))?;
        self.slices.extend_from_slice(&plan.slices);
        Ok(!self.slices.is_empty())
    }

    /// Hands a drawn token to its sample, which has `taken` others in this step before, and reports it, and
    /// the sample's end if it is one.
    fn take_token(
        &mut self,
        seq: SeqId,
        taken: usize,
        drawn: Drawn,
        (sampled, events): (&mut Vec<(SeqId, u32)>, &mut Vec<Event>),
    ) -> Result<()> {
        let total = self.scheduler.tokens(seq).len() + taken + 1;
        let cached_tokens = self.scheduler.cached_tokens(seq);
        let version = self.scheduler.version();
        let sample = self.samples.get_mut(&seq).expect("a planned sequence has a sample");
        let generated = total - sample.prompt_len;
        let max_new = sample.params.max_tokens.unwrap_or(usize::MAX);
        let room = (max_new - generated).min(self.plan.max_model_len - total);
        sample.guesses.drawn(drawn.token);
        let step = sample.push(drawn.token, generated, room)?;
        sampled.push((seq, drawn.token));
        events.push(Event::Token(Token {
            request: sample.request,
            sample: sample.index,
            token: drawn.token,
            text: step.text,
            logprob: drawn.logprob,
            raw_logprob: drawn.raw_logprob,
            entropy: drawn.entropy,
            top: drawn.top,
            version,
            prompt: sample.prompt.give(),
        }));
        if let Some((reason, stop_reason)) = step.end {
            let mut finished = sample.finished(reason, cached_tokens);
            finished.stop_reason = stop_reason;
            events.push(Event::Finished(finished));
            self.forget(seq);
        }
        Ok(())
    }

    /// Ends a sample that cannot go on.
    fn fail(&mut self, seq: SeqId, why: SampleError, events: &mut Vec<Event>) {
        let cached_tokens = self.scheduler.cached_tokens(seq);
        if let Some(sample) = self.samples.get(&seq) {
            let mut finished = sample.finished(FinishReason::Abort, cached_tokens);
            finished.error = Some(why);
            events.push(Event::Finished(finished));
        }
        self.forget(seq);
        self.scheduler.abort(seq);
    }

    /// Forgets an ended sample, and its request with its last one.
    fn forget(&mut self, seq: SeqId) {
        let Some(sample) = self.samples.remove(&seq) else { return };
        if let Some(rest) = self.sequences.get_mut(&sample.request) {
            rest.retain(|other| *other != seq);
            if rest.is_empty() {
                self.sequences.remove(&sample.request);
            }
        }
    }

    /// Log-probabilities of `sequences` under `temperature`, by the path of rollouts: in chunks over
    /// paged KV, nothing taken from the prefix cache.
    ///
    /// # Errors
    /// `ErrorKind::Busy` while requests run; `ErrorKind::Request` for an empty or too long sequence or
    /// an unknown token; `ErrorKind::Numeric` when the model gives no finite numbers.
    pub fn score(&mut self, sequences: &[Vec<u32>], temperature: f32) -> Result<Vec<Score>> {
        if self.has_work() {
            return Err(Error::busy("scoring needs an engine without running requests"));
        }
        self.check_scored(sequences, temperature)?;
        let mut scores = Vec::with_capacity(sequences.len());
        let mut index = HashMap::new();
        for tokens in sequences {
            match self.add_scored(tokens) {
                Ok(seq) => index.insert(seq, scores.len()),
                Err(error) => {
                    index.keys().for_each(|seq| {
                        self.scheduler.abort(*seq);
                    });
                    return Err(error);
                }
            };
            scores.push(Score { logprobs: Vec::new(), entropy: Vec::new() });
        }
        while self.plan_slices()? {
            self.runner.forward(&self.scheduler, &self.slices);
            self.score_slices(&index, temperature.recip(), &mut scores);
            self.scheduler.commit(&[]).map_err(|e| Error::internal(e.to_string()))?;
            for slice in &self.slices {
                if slice.start + slice.len == self.scheduler.tokens(slice.seq).len() {
                    self.scheduler.finish(slice.seq);
                }
            }
        }
        match scores.iter().flat_map(|s| &s.entropy).all(|e| e.is_finite()) {
            true => Ok(scores),
            false => Err(Error::numeric("the model's log-probabilities are not finite numbers")),
        }
    }

    /// Checks what is to be scored: the temperature, and every sequence's length and tokens.
    ///
    /// # Errors
    /// `ErrorKind::Request`, naming the value and its limit.
    pub fn check_scored(&self, sequences: &[Vec<u32>], temperature: f32) -> Result<()> {
        if !(temperature.is_finite() && temperature > 0.0) {
            return Err(Error::request(format!("temperature is {temperature}, limit is above 0")));
        }
        let (limit, vocab_size) = (self.plan.max_model_len, self.model().vocab_size);
        for tokens in sequences {
            let len = tokens.len();
            if len == 0 || len > limit {
                return Err(Error::request(format!(
                    "text has {len} tokens, limit is 1 to {limit}"
                )));
            }
            tokens.iter().try_for_each(|t| token_in_vocabulary("text", *t, vocab_size))?;
        }
        Ok(())
    }

    fn add_scored(&mut self, tokens: &[u32]) -> Result<SeqId> {
        self.scheduler
            .add(NewSequence {
                prompt: tokens.to_vec(),
                max_total_tokens: tokens.len(),
                salt: 0,
                prefix_cache: PrefixCache::Off,
            })
            .map_err(|e| Error::request(e.to_string()))
    }

    fn score_slices(
        &mut self,
        index: &HashMap<SeqId, usize>,
        inv_temperature: f32,
        scores: &mut [Score],
    ) {
        let rows: Vec<usize> = (0..self.slices.iter().map(|slice| slice.len).sum()).collect();
        let mut targets = Vec::with_capacity(rows.len());
        for slice in &self.slices {
            let tokens = self.scheduler.tokens(slice.seq);
            let next = slice.start + 1..slice.start + slice.len + 1;
            // The last token has no successor; its target is not reported.
            targets.extend(next.map(|i| tokens.get(i).copied().unwrap_or(0)));
        }
        let mut stats = self.runner.head_stats(&rows, &targets, inv_temperature).into_iter();
        for slice in &self.slices {
            let len = self.scheduler.tokens(slice.seq).len();
            let score = &mut scores[index[&slice.seq]];
            // A preempted sequence comes again from its beginning.
            score.entropy.truncate(slice.start);
            score.logprobs.truncate(slice.start);
            for (i, stat) in (slice.start..slice.start + slice.len).zip(&mut stats) {
                score.entropy.push(stat.entropy);
                if i + 1 < len {
                    score.logprobs.push(stat.log_prob);
                }
            }
        }
    }

    /// Exclusive access to the weights; ends, with the version one higher, when the value is dropped.
    ///
    /// # Errors
    /// `ErrorKind::Busy` while requests wait or run; `ErrorKind::Unsupported` when weights were left
    /// quantised, which do not change.
    pub fn begin_update(&mut self) -> Result<WeightsUpdate<'_>> {
        self.check_in_full()?;
        self.scheduler.begin_update().map_err(|e| Error::busy(e.to_string()))?;
        Ok(self.update())
    }

    /// Like [`begin_update`](Self::begin_update), but requests that wait or run are kept: they go on after
    /// the update, and the new weights compute anew what they read.
    ///
    /// # Errors
    /// `ErrorKind::Busy` after a step that has failed; `ErrorKind::Unsupported` as `begin_update`.
    pub fn begin_update_keeping(&mut self) -> Result<WeightsUpdate<'_>> {
        self.check_in_full()?;
        self.scheduler.begin_update_keeping().map_err(|e| Error::busy(e.to_string()))?;
        Ok(self.update())
    }

    /// Refuses to change weights that were left quantised.
    pub(crate) fn check_in_full(&self) -> Result<()> {
        match self.runner.decoder.weights.quantised() {
            true => Err(Error::unsupported(
                "weights are quantised as their file stores them: load them in full to change them",
            )),
            false => Ok(()),
        }
    }

    fn update(&mut self) -> WeightsUpdate<'_> {
        let Runner { kernels, decoder, .. } = &mut self.runner;
        WeightsUpdate { decoder, kernels, scheduler: &mut self.scheduler }
    }
}
