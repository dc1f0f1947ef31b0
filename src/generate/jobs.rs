//! The prompts of `engine generate`: lines to requests, checked before anything runs.

use std::sync::Arc;

use engine::text::{AddSpecial, RenderOptions};
use engine::{
    ChatTemplate, Continuation, Engine, EosRule, GenerationDefaults, Request, SamplingParams,
    Tokenizer, check_prompt, random,
};
use serde_json::Value;
use server::{BadField, Fields};

use crate::args::{GenerateArgs, SamplingArgs};
use crate::exit::Result;
use crate::fingerprint;
use crate::input::{Input, Line};
use crate::terminal::Terminal;

/// What of a model prompts are read with and checked against, whatever computes.
pub(crate) struct Reader<'a> {
    pub(crate) tokenizer: Option<&'a Arc<Tokenizer>>,
    pub(crate) chat_template: Option<&'a Arc<ChatTemplate>>,
    pub(crate) generation: &'a GenerationDefaults,
    pub(crate) vocab_size: usize,
    pub(crate) max_model_len: usize,
    /// Number of the model: see [`fingerprint::model`].
    pub(crate) fingerprint: u64,
}

/// What a line does not say.
struct Defaults {
    params: SamplingParams,
    seed: u64,
    max_model_len: Option<u64>,
}

/// One prompt to work on.
pub(crate) struct Job {
    pub(crate) index: usize,
    pub(crate) id: Option<Value>,
    pub(crate) request: Request,
    /// What its samples depend on besides the prompt: see [`fingerprint::sample`].
    pub(crate) fingerprint: String,
}

impl Job {
    pub(crate) fn samples(&self) -> usize {
        self.request.params.n
    }
}

impl<'a> Reader<'a> {
    /// What `engine` reads with; `fingerprint` is the number of its model.
    pub(crate) fn of(engine: &'a Engine, fingerprint: u64) -> Self {
        Self {
            tokenizer: engine.tokenizer(),
            chat_template: engine.chat_template(),
            generation: engine.generation_defaults(),
            vocab_size: engine.model().vocab_size,
            max_model_len: engine.max_model_len(),
            fingerprint,
        }
    }

    /// All prompts of `input`, with what `args` says where a line does not.
    pub(crate) fn read(
        &self,
        input: &Input,
        args: &GenerateArgs,
        terminal: &Terminal,
    ) -> Result<Vec<Job>> {
        let params = defaults(&args.sampling, self)?;
        let (seed, max_model_len) = (args.common.seed, args.engine.max_model_len);
        read_jobs(input, self, &Defaults { params, seed, max_model_len }, terminal)
    }
}

/// The model's recommendation, changed by the flags.
fn defaults(flags: &SamplingArgs, reader: &Reader<'_>) -> Result<SamplingParams> {
    let mut params = server::default_params(reader.generation);
    flags.draw.apply(&mut params)?;
    params.n = flags.n.unwrap_or(params.n);
    params.max_tokens = flags.max_tokens;
    params.min_tokens = flags.min_tokens.unwrap_or(params.min_tokens);
    params.stop.clone_from(&flags.stop);
    params.stop_token_ids.clone_from(&flags.stop_token_ids);
    params.logprobs = flags.logprobs;
    if flags.ignore_eos {
        params.eos = EosRule::Ignore;
    }
    params.validate(reader.vocab_size)?;
    Ok(params)
}

fn read_jobs(
    input: &Input,
    reader: &Reader<'_>,
    defaults: &Defaults,
    terminal: &Terminal,
) -> Result<Vec<Job>> {
    let mut unknown = Vec::new();
    let mut jobs = Vec::new();
    for line in input.lines() {
        let Line { index, mut fields } = line?;
        let id = fields.take("id");
        let bad = |bad: BadField| input.bad(index, &bad);
        let mut params = server::sampling_params(&mut fields, &defaults.params).map_err(bad)?;
        params.logprobs = fields.count("logprobs").map_err(bad)?.or(params.logprobs);
        let seed = || random::hash(&[defaults.seed, index as u64]);
        params.seed = Some(params.seed.unwrap_or_else(seed));
        let prompt = prompt(&mut fields, reader).map_err(|fault| match fault {
            Fault::Field(bad) => input.bad(index, &bad),
            Fault::Engine(error) => input.refused(index, error),
        })?;
        check(&prompt, &params, reader).map_err(|error| input.refused(index, error))?;
        for name in fields.names() {
            if !unknown.iter().any(|known| known == name) {
                terminal.warn(&format!("field `{name}` is not known and has no effect"));
                unknown.push(name.to_owned());
            }
        }
        let fingerprint = fingerprint::sample(reader.fingerprint, &params, defaults.max_model_len);
        jobs.push(Job { index, id, request: Request::new(prompt, params), fingerprint });
    }
    Ok(jobs)
}

/// What is wrong with a line.
enum Fault {
    Field(BadField),
    Engine(engine::Error),
}

impl From<BadField> for Fault {
    fn from(bad: BadField) -> Self {
        Self::Field(bad)
    }
}

impl From<engine::Error> for Fault {
    fn from(error: engine::Error) -> Self {
        Self::Engine(error)
    }
}

/// The token ids of a line's prompt, in whichever form it is given.
fn prompt(fields: &mut Fields, reader: &Reader<'_>) -> Result<Vec<u32>, Fault> {
    let ids = fields.tokens("prompt_token_ids")?;
    let text = fields.string("prompt")?;
    let chat = fields.take("messages");
    let missing = |what: &str| {
        BadField::new(what, format!("has {what}, which the model has no tokenizer or template for"))
    };
    match (ids, text, chat) {
        (Some(ids), None, None) => Ok(ids),
        (None, Some(text), None) => {
            let tokenizer = reader.tokenizer.ok_or_else(|| missing("prompt"))?;
            Ok(tokenizer.encode(&text, AddSpecial::Yes)?)
        }
        (None, None, Some(chat)) => {
            let template = reader.chat_template.ok_or_else(|| missing("messages"))?;
            let messages = server::messages(&chat, template)?;
            let tokenizer = reader.tokenizer.ok_or_else(|| missing("messages"))?;
            let options = RenderOptions::new(std::time::SystemTime::now());
            Ok(template.encode(&messages, &options, tokenizer)?)
        }
        _ => {
            let message = "has not exactly one of prompt, prompt_token_ids and messages";
            Err(BadField::new("prompt", message).into())
        }
    }
}

/// What the engine would say later, said before anything runs.
fn check(prompt: &[u32], params: &SamplingParams, reader: &Reader<'_>) -> engine::Result<()> {
    params.validate(reader.vocab_size)?;
    check_prompt(prompt, Continuation::Sample, (reader.max_model_len, reader.vocab_size))
}
