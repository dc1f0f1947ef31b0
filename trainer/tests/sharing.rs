//! Samples of one prompt that pass together, the prompt's rows once, against each of them alone: equal
//! log-probabilities to the bit, and gradients up to rounding.
#![allow(clippy::unwrap_used)]

use std::path::Path;

use engine::decoder::{Gradients, Keep};
use engine::{Dtype, Engine, EngineConfig, Level, ModelSource};
use kernels::TokenStats;
use trainer::{Learner, LossGradient, Packed};

const INV_TEMPERATURE: f32 = 1.0 / 0.7;
/// Prompts around the edges of the blocks of 16 positions.
const PROMPTS: [usize; 7] = [1, 2, 15, 16, 17, 33, 48];
/// Responses of a group: none, one token, up to an edge and past it.
const RESPONSES: [usize; 8] = [5, 1, 0, 20, 16, 2, 17, 33];

fn load(model: &str, dtype: Dtype, level: Level) -> Engine {
    let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/golden/models");
    let source = ModelSource::open(&models.join(model)).unwrap();
    let config = EngineConfig {
        dtype: Some(dtype),
        level: Some(level),
        threads: Some(2),
        kv_cache_memory_bytes: Some(8 << 20),
        max_model_len: Some(512),
        ..EngineConfig::default()
    };
    Engine::load(&source, &config).unwrap()
}

fn tokens(key: &[u64], len: usize) -> Vec<u32> {
    let token = |i: usize| (engine::random::hash(&[key, &[i as u64]].concat()) % 500) as u32;
    (0..len).map(token).collect()
}

/// A group of each length of prompt, the first one twice with other prompts, and single sequences
/// between them; with the length of the prompt.
fn sequences() -> Vec<(Vec<u32>, usize)> {
    let mut all = Vec::new();
    for (group, prompt_len) in PROMPTS.into_iter().chain([15]).enumerate() {
        let prompt = tokens(&[1, group as u64], prompt_len);
        for (i, len) in RESPONSES.into_iter().cycle().skip(group).take(2 + group % 4).enumerate() {
            let response = tokens(&[2, group as u64, i as u64], len);
            all.push(([&prompt[..], &response].concat(), prompt_len));
        }
        all.push((tokens(&[3, group as u64], 7 + 11 * group), 6));
    }
    all
}

fn packed(sequences: &[(Vec<u32>, usize)]) -> Vec<Packed<'_>> {
    sequences.iter().map(|(tokens, len)| Packed { tokens, prompt_len: *len }).collect()
}

fn bits(stats: &[TokenStats]) -> Vec<[u32; 3]> {
    let bits = |s: &TokenStats| [s.log_prob, s.entropy, s.log_sum_exp].map(f32::to_bits);
    stats.iter().map(bits).collect()
}

fn engines() -> impl Iterator<Item = (String, Dtype, Engine)> {
    // The reference is slow, and the kernels' own tests hold the others against it.
    let models = ["tiny-llama", "tiny-qwen2", "tiny-qwen3"];
    let fast = |level: &Level| level.available() && *level != Level::Reference;
    let levels = Level::ALL.into_iter().filter(fast);
    levels.flat_map(move |level| {
        let dtypes = models.into_iter().flat_map(|model| {
            [Dtype::F32, Dtype::Bf16].into_iter().map(move |dtype| (model, dtype))
        });
        dtypes.map(move |(model, dtype)| {
            (format!("{model} {dtype:?} {level}"), dtype, load(model, dtype, level))
        })
    })
}

#[test]
fn log_probs_have_the_bits_of_each_sequence_alone() {
    let sequences = sequences();
    let packed = packed(&sequences);
    for (name, _, engine) in engines() {
        let (decoder, kernels) = (engine.decoder(), engine.kernels());
        let mut learner = Learner::new(decoder, Keep::OneLayer);
        let shared = bits(&learner.forward(decoder, kernels, &packed, INV_TEMPERATURE));
        let mut rest = &shared[..];
        for (i, one) in packed.iter().enumerate() {
            let alone = learner.forward(decoder, kernels, &[*one], INV_TEMPERATURE);
            let found;
            (found, rest) = rest.split_at(one.targets());
            assert!(found == bits(&alone), "{name}: sequence {i}");
        }
        assert!(rest.is_empty());
    }
}

/// Adds the gradients of a loss whose derivatives by log-probability and entropy are those given.
fn gradients(
    (engine, keep): (&Engine, Keep),
    packed: &[Packed<'_>],
    (dlogp, dentropy): (&[f32], &[f32]),
    grads: &mut Gradients,
) {
    let (decoder, kernels) = (engine.decoder(), engine.kernels());
    let mut learner = Learner::new(decoder, keep);
    let stats = learner.forward(decoder, kernels, packed, INV_TEMPERATURE);
    let loss = LossGradient {
        stats: &stats,
        inv_temperature: INV_TEMPERATURE,
        dlogp,
        dentropy: Some(dentropy),
    };
    learner.backward(decoder, kernels, &loss, grads);
}

/// Derivatives of some loss by the targets' log-probabilities and entropies.
fn derivatives(packed: &[Packed<'_>]) -> (Vec<f32>, Vec<f32>) {
    let targets: usize = packed.iter().map(Packed::targets).sum();
    let numbers = |key: u64| -> Vec<f32> {
        tokens(&[key], targets).iter().map(|t| *t as f32 / 256.0 - 1.0).collect()
    };
    (numbers(4), numbers(5))
}

#[test]
fn layers_that_run_again_give_the_same_bits() {
    let sequences = sequences();
    let packed = packed(&sequences);
    let (dlogp, dentropy) = derivatives(&packed);
    for (name, dtype, engine) in engines() {
        let [kept, again] = [Keep::AllLayers, Keep::Inputs].map(|keep| {
            let mut grads = Gradients::new(engine.model(), dtype);
            gradients((&engine, keep), &packed, (&dlogp, &dentropy), &mut grads);
            let bits = |sum: &Vec<f32>| sum.iter().map(|x| x.to_bits()).collect();
            grads.sums().iter().map(bits).collect::<Vec<Vec<u32>>>()
        });
        assert!(kept.iter().flatten().any(|bits| *bits != 0), "{name}: no gradient");
        assert!(kept == again, "{name}");
    }
}

#[test]
fn gradients_are_those_of_the_sequences_alone_summed() {
    let sequences = sequences();
    let packed = packed(&sequences);
    let (dlogp, dentropy) = derivatives(&packed);
    for (name, dtype, engine) in engines() {
        let mut shared = Gradients::new(engine.model(), dtype);
        gradients((&engine, Keep::AllLayers), &packed, (&dlogp, &dentropy), &mut shared);
        let mut alone = Gradients::new(engine.model(), dtype);
        let mut first = 0;
        for one in &packed {
            let part = first..first + one.targets();
            first = part.end;
            let derivatives = (&dlogp[part.clone()], &dentropy[part]);
            gradients(
                (&engine, Keep::AllLayers),
                std::slice::from_ref(one),
                derivatives,
                &mut alone,
            );
        }
        let limit = if dtype == Dtype::F32 { 1e-5 } else { 2e-2 };
        for (i, (a, b)) in shared.sums().iter().zip(alone.sums()).enumerate() {
            let square = |x: f32| f64::from(x) * f64::from(x);
            let difference: f64 = a.iter().zip(b).map(|(a, b)| square(a - b)).sum();
            let norm: f64 = b.iter().map(|b| square(*b)).sum();
            let off = (difference / norm).sqrt();
            assert!(off < limit, "{name}: parameter {i} is off by {off:e}");
        }
    }
}
