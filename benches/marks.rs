//! First speed marks: batched generation, a group with log-probabilities, and a GRPO step, beside the
//! limits of the machine; and what it saves to run a prompt once for its samples.
//!
//! ```text
//! cargo bench --bench marks -- MODEL [peak GFLOP/s] [read GB/s] [MARK ...]
//! ```
//!
//! The two limits are measured where they are not given. Marks are `generate` (or `generate-N` for N
//! sequences), `prefill`, `group`, `grpo` and `shared`; all are run where none is named. The limit of
//! a phase is, step by step, the longer of reading the weights once and of the multiplications;
//! attention and everything else count as nothing, and the head counts for every row, though a prefill
//! needs it for its last only. In training a prompt counts once for its group. Prompts are random tokens and end-of-text is
//! ignored, so lengths are exact. Leaves out text, rewards and files.

use std::path::Path;
use std::time::Instant;

use engine::decoder::{Gradients, Keep};
use engine::{Engine, EngineConfig, EosRule, ModelSource};
use kernels::{AdamW, probe};
use trainer::config::RlConfig;
use trainer::loss::{ChoiceKey, TokenBatch};
use trainer::packing::{Order, pack};
use trainer::rollout::{Episode, RolloutSettings, generate};
use trainer::{Learner, LossGradient, Optimizer, Packed, clip_scale, global_norm};

/// Rows of a training pass.
const MICRO_BATCH_TOKENS: usize = 4096;

struct Limits {
    flops: f64,
    bytes: f64,
    params: f64,
}

impl Limits {
    /// Seconds of one forward step over `rows` rows: weights are 2 bytes, a row costs 2 FLOP a weight.
    fn step(&self, rows: f64) -> f64 {
        (2.0 * self.params / self.bytes).max(2.0 * self.params * rows / self.flops)
    }

    fn generation(&self, sequences: usize, prompts: usize, prompt: usize, new: usize) -> f64 {
        self.step((prompts * prompt) as f64) + (new - 1) as f64 * self.step(sequences as f64)
    }
}

fn main() {
    // `cargo bench` adds a flag of its own.
    let arguments: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let Some(model) = arguments.first() else {
        println!("marks: left out, no model was named (cargo bench --bench marks -- MODEL)");
        return;
    };
    let mut numbers = arguments[1..].iter().map_while(|text| text.parse::<f64>().ok());
    let (flops, bytes) = (numbers.next(), numbers.next());
    let named: Vec<&str> = arguments[1..]
        .iter()
        .map(String::as_str)
        .filter(|text| text.parse::<f64>().is_err())
        .collect();
    for name in &named {
        let known = ["generate", "prefill", "group", "grpo", "shared"].contains(name);
        assert!(known || name.starts_with("generate-"), "unknown mark {name}");
    }
    let wanted = |name: &str| named.is_empty() || named.contains(&name);
    let source = ModelSource::open(Path::new(model)).expect("the model opens");
    let config = EngineConfig { max_model_len: Some(512), ..EngineConfig::default() };
    let mut engine = Engine::load(&source, &config).expect("the model loads");
    let limits = Limits {
        flops: flops
            .map(|n| 1e9 * n)
            .or_else(|| probe::multiply_peak(engine.kernels(), engine.dtype()))
            .expect("the peak of these kernels is not measured, name it"),
        bytes: bytes
            .map(|n| 1e9 * n)
            .unwrap_or_else(|| probe::read_bandwidth(engine.kernels().pool())),
        params: source.config().parameters() as f64,
    };
    println!(
        "{model}: {} kernels, {} threads",
        engine.kernels().level(),
        engine.kernels().pool().threads()
    );
    println!(
        "limits: {:.0} GFLOP/s, {:.0} GB/s, {:.0} M weights",
        limits.flops / 1e9,
        limits.bytes / 1e9,
        limits.params / 1e6
    );
    for sequences in [1, 8, 32, 64] {
        if wanted("generate") || wanted(&format!("generate-{sequences}")) {
            throughput(&mut engine, &limits, (sequences, 1), (128, 64));
        }
    }
    if wanted("prefill") {
        throughput(&mut engine, &limits, (16, 1), (512 - 2, 1));
    }
    if wanted("group") {
        throughput(&mut engine, &limits, (8, 8), (128, 128));
    }
    if wanted("grpo") {
        grpo_step(&mut engine, &limits, (8, 8), (120, 128));
    }
    if wanted("shared") {
        shared_prompts(&mut engine, (2, 8), (128, 16));
    }
}

fn prompts(engine: &Engine, count: usize, len: usize, key: u64) -> Vec<Vec<u32>> {
    let vocab = engine.model().vocab_size as u64;
    let token =
        |i: usize, j: usize| (engine::random::hash(&[key, i as u64, j as u64]) % vocab) as u32;
    (0..count).map(|i| (0..len).map(|j| token(i, j)).collect()).collect()
}

fn sample(engine: &mut Engine, prompts: &[Vec<u32>], samples: usize, new: usize) -> Vec<Episode> {
    let settings = RolloutSettings {
        samples,
        temperature: 1.0,
        top_p: 1.0,
        top_k: None,
        max_tokens: new,
        stop: Vec::new(),
        eos: EosRule::Ignore,
        seed: 1,
    };
    generate(engine, prompts, &settings, &mut |_| {}).expect("generation runs")
}

/// Output tokens a second, median of five.
fn throughput(
    engine: &mut Engine,
    limits: &Limits,
    (count, samples): (usize, usize),
    (prompt, new): (usize, usize),
) {
    let mut seconds: Vec<f64> = (0..5)
        .map(|run| {
            let prompts = prompts(engine, count, prompt, 100 + run);
            let begin = Instant::now();
            sample(engine, &prompts, samples, new);
            begin.elapsed().as_secs_f64()
        })
        .collect();
    seconds.sort_by(f64::total_cmp);
    let median = seconds[2];
    let sequences = count * samples;
    let limit = limits.generation(sequences, count, prompt, new);
    println!(
        "{count:>3} prompts x {samples}, {prompt} in / {new} out: {:>7.1} tokens/s out, {:>7.1} in all, {:.0} % of the limit, spread {:.2}-{:.2} s",
        (sequences * new) as f64 / median,
        (sequences * new + count * prompt) as f64 / median,
        100.0 * limit / median,
        seconds[0],
        seconds[4],
    );
}

/// One GRPO step with one update: generate, forward, loss, backward, clip, AdamW.
fn grpo_step(
    engine: &mut Engine,
    limits: &Limits,
    (count, group): (usize, usize),
    (prompt, new): (usize, usize),
) {
    let mut state = State::new(engine);
    for run in 0..3 {
        let begin = Instant::now();
        let prompts = prompts(engine, count, prompt, 200 + run);
        let episodes = sample(engine, &prompts, group, new);
        let generated = begin.elapsed().as_secs_f64();
        let sequences: Vec<Vec<u32>> =
            episodes.iter().map(|e| [&prompts[e.prompt][..], &e.tokens].concat()).collect();
        let [forward, backward, optimized] = state.learn(engine, &episodes, &sequences);
        let all = begin.elapsed().as_secs_f64();
        let rows = count * (prompt + group * new);
        let limit = limits.generation(count * group, count, prompt, new)
            + 6.0 * limits.params * rows as f64 / limits.flops;
        println!(
            "GRPO step {count} x {group}, {prompt} + {new} tokens: {all:.2} s (generate {generated:.2}, \
             forward {forward:.2}, backward {backward:.2}, optimizer {optimized:.2}), \
             {:.0} % of the limit {limit:.2} s",
            100.0 * limit / all
        );
    }
}

struct State {
    optimizer: Optimizer,
    learner: Learner,
    grads: Gradients,
}

impl State {
    fn new(engine: &mut Engine) -> Self {
        let mut update = engine.begin_update().expect("the engine is idle");
        let (decoder, _) = update.decoder();
        Self {
            optimizer: Optimizer::new(decoder),
            learner: Learner::new(decoder, Keep::AllLayers),
            grads: Gradients::new(&decoder.config, decoder.weights.dtype()),
        }
    }

    /// One update; seconds of forward, backward and optimizer.
    fn learn(
        &mut self,
        engine: &mut Engine,
        episodes: &[Episode],
        sequences: &[Vec<u32>],
    ) -> [f64; 3] {
        let (len, new) = (sequences[0].len(), episodes[0].tokens.len());
        let tokens = episodes.len() * new;
        let (mut forward, mut backward) = (0.0, 0.0);
        let mut update = engine.begin_update().expect("the engine is idle");
        let (decoder, kernels) = update.decoder();
        self.grads.clear();
        let packed = pack_all(sequences, len - new);
        for members in pack(&packed, MICRO_BATCH_TOKENS, Order::Given) {
            let members = members[0]..members[members.len() - 1] + 1;
            let (episodes, packed) = (&episodes[members.clone()], &packed[members]);
            let clock = Instant::now();
            let stats = self.learner.forward(decoder, kernels, packed, 1.0);
            forward += clock.elapsed().as_secs_f64();
            let new: Vec<f32> = stats.iter().map(|s| s.log_prob).collect();
            let dlogp = derivatives(episodes, &new, tokens);
            let gradient =
                LossGradient { stats: &stats, inv_temperature: 1.0, dlogp: &dlogp, dentropy: None };
            let clock = Instant::now();
            self.learner.backward(decoder, kernels, &gradient, &mut self.grads);
            backward += clock.elapsed().as_secs_f64();
        }
        let clock = Instant::now();
        let grad_scale = clip_scale(global_norm(kernels, &self.grads), 1.0);
        let settings = AdamW {
            lr: 1e-6,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.0,
            step: 0,
            grad_scale,
        };
        self.optimizer.apply(decoder, kernels, &self.grads, &settings);
        [forward, backward, clock.elapsed().as_secs_f64()]
    }

    /// Seconds of forward and backward, for some loss.
    fn pass(&mut self, engine: &Engine, packed: &[Packed<'_>]) -> f64 {
        let (decoder, kernels) = (engine.decoder(), engine.kernels());
        let clock = Instant::now();
        for members in pack(packed, MICRO_BATCH_TOKENS, Order::Given) {
            let packed = &packed[members[0]..members[members.len() - 1] + 1];
            let stats = self.learner.forward(decoder, kernels, packed, 1.0);
            let dlogp = vec![1e-3; stats.len()];
            let gradient =
                LossGradient { stats: &stats, inv_temperature: 1.0, dlogp: &dlogp, dentropy: None };
            self.learner.backward(decoder, kernels, &gradient, &mut self.grads);
        }
        clock.elapsed().as_secs_f64()
    }
}

/// Forward and backward over the samples of some prompts, in an order in which those of a prompt are
/// neighbours and pass with it once, and in one in which nothing is shared; medians of three.
fn shared_prompts(
    engine: &mut Engine,
    (count, group): (usize, usize),
    (prompt, new): (usize, usize),
) {
    let mut state = State::new(engine);
    let heads = prompts(engine, count, prompt, 300);
    let tails = prompts(engine, count * group, new, 301);
    let sequence = |p: usize, i: usize| [&heads[p][..], &tails[p * group + i]].concat();
    let samples = |p: usize| (0..group).map(move |i| (p, i));
    let together: Vec<_> = (0..count).flat_map(samples).map(|(p, i)| sequence(p, i)).collect();
    let apart: Vec<_> = (0..group)
        .flat_map(|i| (0..count).map(move |p| (p, i)))
        .map(|(p, i)| sequence(p, i))
        .collect();
    let mut seconds = [[0.0; 3]; 2];
    for run in 0..3 {
        for (seconds, sequences) in seconds.iter_mut().zip([&together, &apart]) {
            seconds[run] = state.pass(engine, &pack_all(sequences, prompt));
        }
    }
    seconds.iter_mut().for_each(|seconds| seconds.sort_by(f64::total_cmp));
    let [together, apart] = seconds;
    println!(
        "forward and backward {count} x {group}, {prompt} + {new} tokens: {:.2} s (spread {:.2}-{:.2}), \
         {:.2} s (spread {:.2}-{:.2}) with nothing shared",
        together[1], together[0], together[2], apart[1], apart[0], apart[2]
    );
}

fn pack_all(sequences: &[Vec<u32>], prompt_len: usize) -> Vec<Packed<'_>> {
    sequences.iter().map(|tokens| Packed { tokens, prompt_len }).collect()
}

/// Derivatives of the GRPO loss by log-probabilities `new` of a pass, as a mean over `tokens` tokens;
/// every other response counts as right.
fn derivatives(episodes: &[Episode], new: &[f32], tokens: usize) -> Vec<f32> {
    let old: Vec<f32> = episodes.iter().flat_map(|e| e.logprobs.clone()).collect();
    assert_eq!(new, old, "rollout and training agree");
    let advantage =
        |e: &Episode| vec![if e.sample.is_multiple_of(2) { 1.0 } else { -1.0 }; e.tokens.len()];
    let advantages: Vec<f32> = episodes.iter().flat_map(advantage).collect();
    let scope = 0..new.len();
    let batch = TokenBatch {
        log_prob: new,
        old_log_prob: &old,
        advantage: &advantages,
        mask: &vec![true; new.len()],
        weight: &vec![1.0 / tokens as f64; new.len()],
        scopes: std::slice::from_ref(&scope),
        responses: &[],
    };
    let config = RlConfig::resolve(Some("grpo"), None, &[]).expect("the preset resolves");
    let key = ChoiceKey { seed: 0, step: 0, update: 0 };
    let loss = config.algorithm.policy_loss().evaluate(&batch, key).expect("it is finite");
    loss.dlogp.iter().map(|d| *d as f32).collect()
}
