//! Draws and judges the responses that an evaluation is about.
//!
//! How a source is sampled follows the paper (arXiv 2505.22617, section on evaluation): temperature 0.6 for
//! AIME and AMC, greedy decoding for every other source, unless the settings name a temperature. A greedy
//! answer is always the same, so such a source gets one response a problem.

use engine::{EosRule, FinishReason, Host};

use super::{Evaluation, Problem};
use crate::data::Row;
use crate::encode::PromptEncoder;
use crate::error::Result;
use crate::rollout::{self, Episode, RolloutSettings};
use crate::verifier::{self, Verdict};

/// Temperature of the sources that the paper samples.
const SAMPLED: f32 = 0.6;

/// How responses are drawn.
#[derive(Clone, Debug, PartialEq)]
pub struct EvalSettings {
    /// Responses to a problem, where they are sampled.
    pub samples: usize,
    /// Temperature for all sources, 0 for greedy; `None`: by source.
    pub temperature: Option<f32>,
    /// Nucleus; 1 for none.
    pub top_p: f32,
    /// Only the most likely; `None` for all.
    pub top_k: Option<usize>,
    /// Most tokens of a response; the context may leave fewer.
    pub max_tokens: usize,
    /// Texts that end a response.
    pub stop: Vec<String>,
    /// Key of the random streams.
    pub seed: u64,
}

impl EvalSettings {
    /// How rows of `source` are sampled.
    pub fn sampling(&self, source: Option<&str>) -> RolloutSettings {
        let sampled = source.is_some_and(|s| s.starts_with("aime") || s.starts_with("amc"));
        let temperature = self.temperature.unwrap_or(if sampled { SAMPLED } else { 0.0 });
        RolloutSettings {
            samples: if temperature > 0.0 { self.samples } else { 1 },
            temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            max_tokens: self.max_tokens,
            stop: self.stop.clone(),
            eos: EosRule::Stop,
            seed: self.seed,
        }
    }
}

/// Rows and what is needed to ask and judge them.
#[derive(Clone, Copy)]
pub struct Judge<'a> {
    /// Makes prompts of rows.
    pub encoder: &'a PromptEncoder,
    /// Judges responses.
    pub rewards: &'a verifier::Judge,
    /// The problems.
    pub rows: &'a [Row],
}

/// One response and its verdict.
#[derive(Clone, Debug, PartialEq)]
pub struct Response {
    /// Index of its row.
    pub row: usize,
    /// Which of the responses to it.
    pub sample: usize,
    /// Its tokens.
    pub tokens: Vec<u32>,
    /// Its text.
    pub text: String,
    /// Why it ended.
    pub finish: FinishReason,
    /// How it was judged.
    pub verdict: Verdict,
}

/// Draws and judges responses to every row, calling `done` as each one ends, before its verdict is
/// known; returns them by row, then sample.
///
/// # Errors
/// When a row has no verifier or its prompt does not fit, or the model's numbers are not finite; nothing is
/// drawn in the first two cases.
pub fn evaluate<'a>(
    engine: impl Into<Host<'a>>,
    judge: Judge<'_>,
    settings: &EvalSettings,
    done: &mut dyn FnMut(&Response),
) -> Result<Vec<Response>> {
    let mut host = engine.into();
    let Judge { encoder, rewards, rows } = judge;
    let mut groups: Vec<(RolloutSettings, Vec<usize>, Vec<Vec<u32>>)> = Vec::new();
    for (index, row) in rows.iter().enumerate() {
        let source = row.data_source.as_deref();
        rewards.check(row)?;
        let (sampling, prompt) = (settings.sampling(source), encoder.encode(&row.prompt)?);
        match groups.iter_mut().find(|(other, ..)| *other == sampling) {
            Some((_, members, prompts)) => {
                members.push(index);
                prompts.push(prompt);
            }
            None => groups.push((sampling, vec![index], vec![prompt])),
        }
    }
    let mut responses = Vec::new();
    for (sampling, members, prompts) in groups {
        let mut session = rewards.session(prompts.len() * sampling.samples);
        let first = responses.len();
        let mut places = Vec::new();
        let mut end = |episode: &Episode| {
            let row = members[episode.prompt];
            let response = Response {
                row,
                sample: episode.sample,
                tokens: episode.tokens.clone(),
                text: episode.text.clone(),
                finish: episode.finish,
                verdict: Verdict { score: 0.0, correct: false, predicted: String::new() },
            };
            let place = episode.prompt * sampling.samples + episode.sample;
            session.submit(place, &rows[row], &episode.text);
            places.push(place);
            done(&response);
            responses.push(response);
        };
        rollout::generate(host.reborrow(), &prompts, &sampling, &mut end)?;
        let verdicts = session.finish_beside(&mut host)?;
        for (response, place) in responses[first..].iter_mut().zip(places) {
            response.verdict.clone_from(&verdicts[place]);
        }
    }
    responses.sort_unstable_by_key(|response| (response.row, response.sample));
    Ok(responses)
}

impl Evaluation {
    /// The evaluation of `rows` by the responses to them.
    pub fn of(rows: &[Row], responses: &[Response]) -> Self {
        let mut problems = vec![Problem::default(); rows.len()];
        for response in responses {
            let problem = &mut problems[response.row];
            problem.verdicts.push(response.verdict.clone());
            problem.tokens += response.tokens.len();
            problem.truncated += usize::from(response.finish == FinishReason::Length);
        }
        let mut evaluation = Self::default();
        for (row, problem) in rows.iter().zip(problems) {
            evaluation.add(row.data_source.as_deref(), problem);
        }
        evaluation
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_are_sampled_as_in_the_paper_unless_told_otherwise() {
        let settings = EvalSettings {
            samples: 8,
            temperature: None,
            top_p: 0.9,
            top_k: None,
            max_tokens: 16,
            stop: Vec::new(),
            seed: 1,
        };
        for (source, temperature, samples) in
            [("aime25", 0.6, 8), ("amc", 0.6, 8), ("math500", 0.0, 1), ("arith", 0.0, 1)]
        {
            let sampling = settings.sampling(Some(source));
            assert_eq!(
                (sampling.temperature, sampling.samples),
                (temperature, samples),
                "{source}"
            );
        }
        assert_eq!(settings.sampling(None).samples, 1);
        let told = EvalSettings { temperature: Some(1.0), ..settings };
        assert_eq!(told.sampling(Some("math500")).samples, 8);
    }
}
