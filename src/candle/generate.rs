//! `engine generate` on a device of candle.
//!
//! One prompt after the other with all its samples. Leaves out truncated sampling, penalties, biases,
//! stop strings, fewest tokens and alternatives: a value for one of them is refused.

use candle_backend::{CandleEngine, Completion, GenerateSettings, Seed};
use engine::{EosRule, FinishReason, SamplingParams, StopReason};

use super::{Opened, text};
use crate::args::GenerateArgs;
use crate::exit::{Failure, Result};
use crate::generate::{End, Job, Reader, Sample, prompts, record, results};
use crate::model;
use crate::progress::Progress;
use crate::signals::Signals;
use crate::terminal::Terminal;

/// Runs the command on the device called `name`.
pub(crate) fn run(name: &str, args: &GenerateArgs, terminal: &Terminal) -> Result<()> {
    let input = prompts(args)?;
    let signals = Signals::listen()?;
    let config = model::engine_config(&args.common, &args.engine)?;
    let mut opened = Opened::new(name, &args.model, &config, terminal)?;
    let jobs = opened.reader().read(&input, args, terminal)?;
    jobs.iter().try_for_each(|job| supported(name, job))?;
    let (done, mut output) = results(args, &jobs, terminal)?;
    let total = jobs.iter().map(Job::samples).sum();
    let mut progress = Progress::new(terminal, "samples", total);
    let (mut written, mut tokens) = (0, 0);
    for job in &jobs {
        let there = done.count(job.index, job.samples());
        written += there;
        if there == job.samples() {
            continue;
        }
        if signals.asked() {
            let message = format!("interrupted with {written} of {total} samples done");
            return Err(Failure::interrupted(message));
        }
        let settings = settings(job, &opened.eos);
        let prompt = std::slice::from_ref(&job.request.prompt);
        for completion in opened.engine.generate(prompt, &settings)? {
            tokens += completion.tokens.len();
            if !done.has(job.index, completion.sample) {
                let end = end(job, &completion);
                output.line(&record(job, &opened.sample(job, completion)?, &end));
                written += 1;
            }
        }
        output.flush()?;
        progress.update(written, tokens);
    }
    output.finish()?;
    progress.finish(written, tokens);
    Ok(())
}

impl Opened {
    fn reader(&self) -> Reader<'_> {
        Reader {
            tokenizer: self.tokenizer.as_ref(),
            chat_template: self.chat_template.as_ref(),
            generation: &self.generation,
            vocab_size: self.engine.model().config().vocab_size,
            max_model_len: self.engine.max_model_len(),
            fingerprint: self.fingerprint,
        }
    }

    /// What a completion becomes in the output. The token that ended it is not part of its text.
    fn sample(&self, job: &Job, completion: Completion) -> Result<Sample> {
        let Completion { tokens, logprobs, finish, .. } = completion;
        let prompt = &job.request.prompt;
        let shown = tokens.len() - usize::from(finish == FinishReason::Stop);
        Ok(Sample {
            text: text(self.tokenizer.as_ref(), prompt, &tokens[..shown])?,
            raw_logprobs: raw_logprobs(&self.engine, job, &tokens, &logprobs)?,
            tokens,
            logprobs,
            top: Vec::new(),
        })
    }
}

/// Log-probabilities at temperature 1, which those at temperature 0 and 1 are already.
fn raw_logprobs(
    engine: &CandleEngine,
    job: &Job,
    tokens: &[u32],
    logprobs: &[f32],
) -> Result<Vec<f32>> {
    let Job { request, .. } = job;
    if request.params.temperature == 0.0 || request.params.temperature == 1.0 {
        return Ok(logprobs.to_vec());
    }
    let sequence = [&request.prompt[..], tokens].concat();
    let scores = engine.score(&[sequence], 1.0)?;
    Ok(scores[0].logprobs[request.prompt.len() - 1..].to_vec())
}

fn settings(job: &Job, eos: &[u32]) -> GenerateSettings {
    let params = &job.request.params;
    let mut ending = params.stop_token_ids.clone();
    if params.eos == EosRule::Stop {
        ending.extend_from_slice(eos);
    }
    GenerateSettings {
        samples: params.n,
        temperature: params.temperature,
        max_tokens: params.max_tokens.unwrap_or(usize::MAX),
        eos: ending,
        seed: Seed::Each(params.seed.expect("every job has one")),
    }
}

/// How `completion` has ended.
fn end(job: &Job, completion: &Completion) -> End {
    let stops = completion.finish == FinishReason::Stop;
    let last = completion.tokens.last().filter(|_| stops).copied();
    let listed = last.filter(|token| job.request.params.stop_token_ids.contains(token));
    End {
        sample: completion.sample,
        reason: completion.finish,
        stop_reason: listed.map(StopReason::Token),
    }
}

/// Fails for a job that asks for what this path does not do.
fn supported(name: &str, job: &Job) -> Result<()> {
    let Some(parameter) = unsupported(&job.request.params) else { return Ok(()) };
    let index = job.index;
    Err(Failure::usage(format!(
        "--device {name} does not support {parameter}, asked by prompt {index}"
    )))
}

/// The first parameter with a value that this path does not know.
fn unsupported(params: &SamplingParams) -> Option<&'static str> {
    let asked = [
        ("top_k", params.top_k.is_some()),
        ("top_p", params.top_p < 1.0),
        ("min_p", params.min_p > 0.0),
        ("presence_penalty", params.presence_penalty != 0.0),
        ("frequency_penalty", params.frequency_penalty != 0.0),
        ("repetition_penalty", params.repetition_penalty != 1.0),
        ("logit_bias", !params.logit_bias.is_empty()),
        ("stop", !params.stop.is_empty()),
        ("min_tokens", params.min_tokens > 0),
        ("logprobs", params.logprobs.is_some()),
    ];
    asked.into_iter().find(|(_, asked)| *asked).map(|(name, _)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_supported_is_named() {
        let plain = SamplingParams { temperature: 0.7, n: 4, ..SamplingParams::default() };
        assert_eq!(unsupported(&plain), None);
        let cases = [
            ("top_k", SamplingParams { top_k: Some(5), ..plain.clone() }),
            ("top_p", SamplingParams { top_p: 0.9, ..plain.clone() }),
            ("stop", SamplingParams { stop: vec!["\n".to_owned()], ..plain.clone() }),
            ("min_tokens", SamplingParams { min_tokens: 1, ..plain.clone() }),
            ("logprobs", SamplingParams { logprobs: Some(0), ..plain }),
        ];
        for (name, params) in cases {
            assert_eq!(unsupported(&params), Some(name));
        }
    }
}
