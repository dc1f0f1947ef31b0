//! Log-probabilities of given tokens by the training path: packed sequences, no cache.

use engine::decoder::Keep;
use engine::{Engine, Error, Result, Score};

use crate::learner::{Learner, Packed};

/// Rows of one pass.
const ROWS: usize = 2048;

/// Scores `sequences` under `temperature` as a training step would see them; see [`Engine::score`] for
/// the same by the path of rollouts.
///
/// # Errors
/// `ErrorKind::Request` for an empty or too long sequence, an unknown token or a temperature that is
/// not above 0; `ErrorKind::Numeric` when the model gives no finite numbers.
pub fn score_train_path(
    engine: &Engine,
    sequences: &[Vec<u32>],
    temperature: f32,
) -> Result<Vec<Score>> {
    engine.check_scored(sequences, temperature)?;
    let mut learner = Learner::new(engine.decoder(), Keep::OneLayer);
    let mut scores = Vec::with_capacity(sequences.len());
    let mut rest = sequences;
    while !rest.is_empty() {
        let mut rows = 0;
        let fits = rest.iter().take_while(|tokens| {
            rows += tokens.len();
            rows <= ROWS
        });
        let (now, later) = rest.split_at(fits.count().max(1));
        score_pass(engine, &mut learner, now, temperature.recip(), &mut scores);
        rest = later;
    }
    match scores.iter().flat_map(|score| &score.entropy).all(|entropy| entropy.is_finite()) {
        true => Ok(scores),
        false => Err(Error::numeric("the model's log-probabilities are not finite numbers")),
    }
}

/// Scores one packed pass. A token is appended to each sequence, so that the distribution after its
/// last token is computed too; only its entropy is kept.
fn score_pass(
    engine: &Engine,
    learner: &mut Learner,
    sequences: &[Vec<u32>],
    inv_temperature: f32,
    scores: &mut Vec<Score>,
) {
    let extended: Vec<Vec<u32>> =
        sequences.iter().map(|tokens| [&tokens[..], &[0]].concat()).collect();
    let packed: Vec<Packed<'_>> =
        extended.iter().map(|tokens| Packed { tokens, prompt_len: 1 }).collect();
    let stats = learner.forward(engine.decoder(), engine.kernels(), &packed, inv_temperature);
    let mut stats = &stats[..];
    for tokens in sequences {
        let (now, later) = stats.split_at(tokens.len());
        let logprobs = now[..tokens.len() - 1].iter().map(|s| s.log_prob).collect();
        scores.push(Score { logprobs, entropy: now.iter().map(|s| s.entropy).collect() });
        stats = later;
    }
}
