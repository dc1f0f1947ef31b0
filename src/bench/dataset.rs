//! Prompts to measure with: random tokens, conversations as ShareGPT stores them, or lines of one's own.
//!
//! Conversations are pruned as `vllm bench` does: those with fewer than 4 tokens on either side, a prompt
//! above 1024 or 2048 in all are left out. Leaves out chat templates and images.

use std::fs;
use std::path::Path;

use engine::Tokenizer;
use engine::random::hash;
use engine::text::AddSpecial;
use serde_json::Value;

use crate::bench::args::{DatasetArgs, DatasetName};
use crate::bench::positive;
use crate::exit::{Failure, Result};

/// Tokens of an output where nothing says how many.
const DEFAULT_OUTPUT: usize = 128;

/// What a request asks.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Content {
    Tokens(Vec<u32>),
    /// For a server whose tokenizer is not known here.
    Text(String),
}

/// A prompt and the length of its answer.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Prompt {
    pub(crate) content: Content,
    /// Tokens to generate.
    pub(crate) output: usize,
}

impl Prompt {
    /// Its tokens; none where only the text is known.
    pub(crate) fn tokens(&self) -> &[u32] {
        match &self.content {
            Content::Tokens(tokens) => tokens,
            Content::Text(_) => &[],
        }
    }
}

/// Where the prompts of a run come from.
#[derive(Debug)]
pub(crate) enum Dataset {
    Random(Shape),
    /// The same in every run.
    Listed(Vec<Prompt>),
}

/// Random prompts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Shape {
    pub(crate) count: usize,
    /// Tokens of each prompt.
    pub(crate) input: usize,
    /// Tokens of each output.
    pub(crate) output: usize,
    /// Tokens are below this.
    pub(crate) vocabulary: usize,
    pub(crate) seed: u64,
}

impl Shape {
    /// The prompts of one run; those of another are others.
    pub(crate) fn prompts(&self, run: u64) -> Vec<Prompt> {
        let vocabulary = self.vocabulary.max(1) as u64;
        let token =
            |i: usize, j: usize| (hash(&[self.seed, run, i as u64, j as u64]) % vocabulary) as u32;
        let prompt = |i| Prompt {
            content: Content::Tokens((0..self.input).map(|j| token(i, j)).collect()),
            output: self.output,
        };
        (0..self.count).map(prompt).collect()
    }
}

impl Dataset {
    /// `count` prompts as the flags ask; `text` is the model's tokenizer, if it is known, and
    /// `vocabulary` its size or that of tokens that any model has.
    pub(crate) fn open(
        args: &DatasetArgs,
        (count, seed): (usize, u64),
        (text, vocabulary): (Option<&Tokenizer>, usize),
    ) -> Result<Self> {
        positive("--num-prompts", count)?;
        let (input, output) = (args.random_input_len, args.random_output_len);
        let path = match (args.dataset_name, args.dataset_path.as_deref()) {
            (DatasetName::Random, None) => {
                positive("--random-input-len", input)?;
                positive("--random-output-len", output)?;
                return Ok(Self::Random(Shape { count, input, output, vocabulary, seed }));
            }
            (DatasetName::Random, Some(path)) => {
                let path = path.display();
                let message =
                    format!("--dataset-path {path} needs --dataset-name sharegpt or custom");
                return Err(Failure::usage(message));
            }
            (_, None) => return Err(Failure::usage("--dataset-path FILE is missing")),
            (_, Some(path)) => path,
        };
        let rows = match args.dataset_name {
            DatasetName::Sharegpt => sharegpt(path, text, args.output_len)?,
            _ => custom(path, args.output_len.unwrap_or(DEFAULT_OUTPUT))?,
        };
        let mut prompts = rows
            .into_iter()
            .map(|(prompt, output)| Ok(Prompt { content: content(text, prompt)?, output }))
            .collect::<Result<Vec<Prompt>>>()?;
        if prompts.is_empty() {
            return Err(Failure::data(format!("{}: no prompt can be used", path.display())));
        }
        shuffle(&mut prompts, seed);
        Ok(Self::Listed(prompts.iter().cycle().take(count).cloned().collect()))
    }

    /// The prompts of run `run`.
    pub(crate) fn prompts(&self, run: u64) -> Vec<Prompt> {
        match self {
            Self::Random(shape) => shape.prompts(run),
            Self::Listed(prompts) => prompts.clone(),
        }
    }

    /// Tokens of the longest prompt with its output, as far as they are known.
    pub(crate) fn longest(&self) -> usize {
        match self {
            Self::Random(shape) => shape.input + shape.output,
            Self::Listed(prompts) => {
                prompts.iter().map(|p| p.tokens().len() + p.output).max().unwrap_or(0)
            }
        }
    }
}

fn content(text: Option<&Tokenizer>, prompt: String) -> Result<Content> {
    Ok(match text {
        Some(tokenizer) => Content::Tokens(tokenizer.encode(&prompt, AddSpecial::Yes)?),
        None => Content::Text(prompt),
    })
}

/// Puts them into an order that the seed decides.
fn shuffle(prompts: &mut [Prompt], seed: u64) {
    for last in (1..prompts.len()).rev() {
        prompts.swap(last, (hash(&[seed, last as u64]) % (last as u64 + 1)) as usize);
    }
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(|error| Failure::unreadable(path, &error))
}

/// First question and length of its answer in each conversation worth measuring.
fn sharegpt(
    path: &Path,
    text: Option<&Tokenizer>,
    output: Option<usize>,
) -> Result<Vec<(String, usize)>> {
    let wrong = |what: &str| Failure::data(format!("{}: {what}", path.display()));
    let value: Value =
        serde_json::from_str(&read(path)?).map_err(|error| wrong(&error.to_string()))?;
    let list = value.as_array().ok_or_else(|| wrong("expected a list of conversations"))?;
    let mut rows = Vec::new();
    for item in list {
        let said = |i: usize| item["conversations"][i]["value"].as_str();
        let (Some(prompt), Some(answer)) = (said(0), said(1)) else { continue };
        let Some(tokenizer) = text else {
            rows.push((prompt.to_owned(), output.unwrap_or(DEFAULT_OUTPUT)));
            continue;
        };
        let count = |text: &str| tokenizer.encode(text, AddSpecial::No).map(|ids| ids.len());
        let (input, answered) = (count(prompt)?, count(answer)?);
        let output = output.unwrap_or(answered);
        if input >= 4 && output >= 4 && input <= 1024 && input + output <= 2048 {
            rows.push((prompt.to_owned(), output));
        }
    }
    Ok(rows)
}

/// The prompt of each line.
fn custom(path: &Path, output: usize) -> Result<Vec<(String, usize)>> {
    let text = read(path)?;
    let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
    let row = |(index, line): (usize, &str)| {
        let value: Option<Value> = serde_json::from_str(line).ok();
        let prompt = value.as_ref().and_then(|value| value["prompt"].as_str());
        let prompt = prompt.map(|prompt| (prompt.to_owned(), output));
        let number = index + 1;
        prompt.ok_or_else(|| {
            let path = path.display();
            Failure::data(format!(
                "{path}: line {number}: expected an object with a string \"prompt\""
            ))
        })
    };
    lines.map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn random_prompts_are_keyed_by_seed_and_run() {
        let shape = Shape { count: 3, input: 5, output: 7, vocabulary: 11, seed: 1 };
        let prompts = shape.prompts(0);
        assert_eq!((prompts.len(), prompts[0].output), (3, 7));
        assert!(prompts.iter().all(|p| p.tokens().len() == 5));
        assert!(prompts.iter().flat_map(Prompt::tokens).all(|token| *token < 11));
        assert_eq!(prompts, shape.prompts(0));
        assert_ne!(prompts, shape.prompts(1));
        assert_ne!(prompts, Shape { seed: 2, ..shape }.prompts(0));
        assert_eq!(Dataset::Random(shape).longest(), 12);
    }

    #[test]
    fn an_order_depends_on_the_seed_and_loses_nothing() {
        let prompt = |i: u32| Prompt { content: Content::Tokens(vec![i]), output: 1 };
        let order = |seed| {
            let mut prompts: Vec<Prompt> = (0..20).map(prompt).collect();
            shuffle(&mut prompts, seed);
            prompts.iter().map(|p| p.tokens()[0]).collect::<Vec<_>>()
        };
        let (one, mut other) = (order(1), order(2));
        assert_ne!(one, other);
        other.sort_unstable();
        assert_eq!(other, (0..20).collect::<Vec<_>>());
    }
}
