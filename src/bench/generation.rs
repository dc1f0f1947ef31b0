//! A batch of prompts through an engine in this process, to its end.

use std::time::Instant;

use engine::random::hash;
use engine::{Constraint, Engine, EngineConfig, EosRule, Event, Grammar, GrammarCompiler};
use engine::{ModelSource, Request, SamplingParams, UnknownKeywords, load_text};

use crate::bench::args::DatasetArgs;
use crate::bench::dataset::{Dataset, Prompt};
use crate::bench::limits::{Generation, ModelCost, Peaks};
use crate::exit::{Failure, Result};
use crate::model;
use crate::terminal::Terminal;

/// An engine with prompts for it, and what they take at least.
pub(crate) struct Bench {
    pub(crate) engine: Engine,
    pub(crate) peaks: Peaks,
    pub(crate) cost: ModelCost,
}

/// How the samples of a batch are drawn.
pub(crate) struct Sampling {
    /// Their parameters; the number of tokens is each prompt's.
    pub(crate) params: SamplingParams,
    pub(crate) constraint: Option<Constraint>,
    pub(crate) seed: u64,
}

impl Bench {
    /// Loads `source` for sequences of up to `longest` tokens and measures the machine.
    pub(crate) fn load(
        source: &ModelSource,
        config: &EngineConfig,
        (sequences, longest): (usize, usize),
        terminal: &Terminal,
    ) -> Result<Self> {
        // A cache of what they take at most is in use after the first run, which does not count: memory that
        // is touched for the first time takes the system longer than the kernels.
        let config = EngineConfig {
            useful_model_len: Some(longest),
            max_num_seqs: config.max_num_seqs.min(sequences),
            ..config.clone()
        };
        let engine = model::load_source(source, &config, terminal)?;
        let room = engine.max_model_len();
        if longest > room {
            return Err(Failure::usage(format!(
                "a sequence takes {longest} tokens, the context has {room}"
            )));
        }
        let peaks = Peaks::measure(engine.kernels(), engine.dtype());
        terminal.info(&format!("limits of the machine: {}", peaks.describe()));
        let cost = ModelCost::new(peaks, engine.model(), engine.memory_plan());
        Ok(Self { engine, peaks, cost })
    }

    /// The constraint of a JSON schema given as text.
    pub(crate) fn constraint(&self, schema: &str) -> Result<Constraint> {
        let schema = serde_json::from_str(schema)
            .map_err(|error| Failure::usage(format!("--json-schema: {error}")))?;
        let Some(tokenizer) = self.engine.tokenizer() else {
            return Err(Failure::usage("--json-schema: the model has no tokenizer"));
        };
        let vocabulary = self.engine.model().vocab_size;
        let compiler = GrammarCompiler::new(tokenizer, vocabulary, self.engine.eos())?;
        Ok(compiler.compile(&Grammar::JsonSchema { schema, unknown: UnknownKeywords::Refuse })?)
    }

    /// Generates all tokens that are asked for; the seconds it took.
    pub(crate) fn generate(&mut self, prompts: &[Prompt], sampling: &Sampling) -> Result<f64> {
        let engine = &mut self.engine;
        let begun = Instant::now();
        for (i, prompt) in prompts.iter().enumerate() {
            let params = SamplingParams {
                max_tokens: Some(prompt.output),
                eos: EosRule::Ignore,
                seed: Some(hash(&[sampling.seed, i as u64])),
                ..sampling.params.clone()
            };
            let request = Request::new(prompt.tokens().to_vec(), params);
            engine.add(Request { constraint: sampling.constraint.clone(), ..request })?;
        }
        let mut tokens = 0;
        while engine.has_work() {
            for event in engine.step()? {
                match event {
                    Event::Token(_) => tokens += 1,
                    Event::Finished(end) => {
                        end.error
                            .map_or(Ok(()), |error| Err(Failure::numeric(error.to_string())))?;
                    }
                }
            }
        }
        let seconds = begun.elapsed().as_secs_f64();
        let asked = sampling.params.n * prompts.iter().map(|p| p.output).sum::<usize>();
        match tokens == asked {
            true => Ok(seconds),
            false => Err(Failure::running(format!("{tokens} tokens came, {asked} were asked for"))),
        }
    }

    /// What generating them takes at least, in seconds.
    pub(crate) fn limit(&self, prompts: &[Prompt], samples: usize) -> f64 {
        let lens: Vec<usize> = prompts.iter().map(|p| p.tokens().len()).collect();
        let outputs: Vec<usize> = prompts.iter().map(|p| p.output).collect();
        self.cost.generation(&Generation { prompts: &lens, samples, outputs: &outputs })
    }
}

/// Opens a model and the prompts for it, whose tokens have to be known here.
pub(crate) fn open(
    name: &str,
    args: &DatasetArgs,
    (count, seed): (usize, u64),
    terminal: &Terminal,
) -> Result<(ModelSource, Dataset)> {
    let source = model::open(name, terminal)?;
    let (tokenizer, _) = load_text(&source)?;
    let text = (tokenizer.as_ref(), source.config().vocab_size);
    let dataset = Dataset::open(args, (count, seed), text)?;
    if let (Dataset::Listed(_), None) = (&dataset, &tokenizer) {
        return Err(Failure::data(format!(
            "{name} has no tokenizer for the prompts of a data set"
        )));
    }
    Ok((source, dataset))
}
