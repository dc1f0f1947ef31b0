//! What a sample depends on besides its prompt, as one number, by which `engine generate` knows whether the
//! samples in a file are those it would draw.
//!
//! Made of what the caller chooses, so that a run goes on elsewhere: not of the model's path, the kernels,
//! the threads or the memory at hand. Tells models apart, does not protect from forged ones.

use engine::{ModelSource, SamplingParams, random};

use crate::exit::{Failure, Result};

/// The number of a model whose texts end with `eos` and whose numbers are in the format `form`: of these, its
/// rotations, and the names and first rows of its weights, of which training changes nearly all.
pub(crate) fn model(source: &ModelSource, eos: &[u32], form: &str) -> Result<u64> {
    let mut key = text(form);
    let mut add = |word: u64| key = random::hash(&[key, word]);
    eos.iter().for_each(|id| add(u64::from(*id)));
    source.config().inv_freq().iter().for_each(|f| add(u64::from(f.to_bits())));
    for weight in source.config().tensors() {
        add(text(&weight.name));
        let mut row = vec![0.0; weight.shape.last().copied().unwrap_or(0)];
        let read = source.read_rows(&weight.name, 0..1, &mut row);
        read.map_err(|error| Failure::from(error).blame_data())?;
        row.iter().for_each(|value| add(u64::from(value.to_bits())));
    }
    Ok(key)
}

/// What stands beside a sample: the number of `model`, the sampling parameters and the longest sequence that
/// was asked for. How many samples there are says nothing of each, nor the seed where nothing is drawn.
pub(crate) fn sample(model: u64, params: &SamplingParams, max_model_len: Option<u64>) -> String {
    let seed = params.seed.filter(|_| params.temperature > 0.0);
    let all = SamplingParams { n: 1, seed, ..params.clone() };
    // Every field by its name, whatever fields there are.
    format!("{:016x}", random::hash(&[model, text(&format!("{all:?} {max_model_len:?}"))]))
}

fn text(text: &str) -> u64 {
    text.bytes().fold(text.len() as u64, |key, byte| random::hash(&[key, u64::from(byte)]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changes_a_sample_changes_its_number() {
        let source = engine::model::open_builtin(engine::model::hub::Builtin::Arith).unwrap();
        let bf16 = model(&source, &[256], "bf16").unwrap();
        assert_eq!(model(&source, &[256], "bf16").unwrap(), bf16);
        assert_ne!(model(&source, &[256], "f32").unwrap(), bf16);
        assert_ne!(model(&source, &[256, 257], "bf16").unwrap(), bf16);
        let drawn = SamplingParams { seed: Some(1), ..SamplingParams::default() };
        let first = sample(bf16, &drawn, None);
        assert_eq!(sample(bf16, &SamplingParams { n: 4, ..drawn.clone() }, None), first);
        let others = [
            SamplingParams { seed: Some(2), ..drawn.clone() },
            SamplingParams { temperature: 0.5, ..drawn.clone() },
            SamplingParams { max_tokens: Some(9), ..drawn.clone() },
            SamplingParams { stop: vec!["x".to_owned()], ..drawn.clone() },
        ];
        for other in others {
            assert_ne!(sample(bf16, &other, None), first, "{other:?}");
        }
        assert_ne!(sample(bf16, &drawn, Some(64)), first);
        assert_ne!(sample(bf16 + 1, &drawn, None), first);
        let greedy = |seed| SamplingParams { temperature: 0.0, seed, ..SamplingParams::default() };
        assert_eq!(sample(bf16, &greedy(Some(1)), None), sample(bf16, &greedy(Some(2)), None));
    }
}
