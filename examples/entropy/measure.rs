//! What a trained policy is worth on the rows of validation, decoded greedily and sampled at temperature 1.

use engine::Engine;
use trainer::eval::{EvalSettings, Evaluation, Judge, Summary, evaluate};
use trainer::{PromptEncoder, Result, RlConfig, verifier};

use super::plan::Plan;

/// pass@k is given for these k, up to the number of samples.
pub(crate) const KS: [usize; 3] = [2, 8, 32];

/// A policy's results.
#[derive(Clone, Debug)]
pub(crate) struct Measured {
    /// Share of right answers, decoded greedily.
    pub(crate) greedy: f64,
    /// Sampled.
    pub(crate) sampled: Summary,
}

pub(crate) fn measure(engine: &mut Engine, plan: &Plan, config: &RlConfig) -> Result<Measured> {
    let [_, rows] = plan.rows(config)?;
    let text = (engine.tokenizer(), engine.chat_template());
    let data = &config.data;
    let encoder = PromptEncoder::new(text, data.prompt_template, data.max_prompt_length)?;
    let rewards = verifier::Judge::new(&config.reward)?;
    let judge = Judge { encoder: &encoder, rewards: &rewards, rows: &rows.rows };
    let mut at = |temperature: f32| -> Result<Summary> {
        let settings = EvalSettings {
            samples: plan.samples,
            temperature: Some(temperature),
            top_p: 1.0,
            top_k: None,
            max_tokens: data.max_response_length,
            stop: Vec::new(),
            seed: config.trainer.seed,
        };
        let responses = evaluate(&mut *engine, judge, &settings, &mut |_| {})?;
        Ok(Evaluation::of(&rows.rows, &responses).overall(&KS).expect("there are rows"))
    };
    Ok(Measured { greedy: at(0.0)?.mean, sampled: at(1.0)? })
}
