//! Generation and training on a device of candle, for `--device candle-cpu` and `--device cuda:N`.
//!
//! The same lines, rows and configurations go in as with this project's kernels, and the same records
//! come out; what is left out is refused or said. Slow: the point is another device, and a second
//! opinion.

mod generate;
mod rl;

use std::sync::Arc;

use candle_backend::CandleEngine;
use engine::text::{Detokenizer, SkipSpecial};
use engine::{ChatTemplate, EngineConfig, GenerationDefaults, Tokenizer, end_tokens, load_text};

use crate::exit::{Failure, Result};
use crate::terminal::Terminal;
use crate::{fingerprint, model};

pub(crate) use generate::run as generate;
pub(crate) use rl::run as rl;

/// Prompt tokens that a detokenizer is shown, so that it knows what the answer joins on to.
const CONTEXT_TOKENS: usize = 8;

/// A model on a device of candle, and what turns text into its tokens and back.
struct Opened {
    engine: CandleEngine,
    tokenizer: Option<Arc<Tokenizer>>,
    chat_template: Option<Arc<ChatTemplate>>,
    generation: GenerationDefaults,
    /// Tokens that end a text.
    eos: Vec<u32>,
    /// Number of the model: see [`fingerprint::model`].
    fingerprint: u64,
}

impl Opened {
    /// Loads `model` onto the device called `name`.
    fn new(name: &str, model: &str, config: &EngineConfig, terminal: &Terminal) -> Result<Self> {
        let device =
            candle_backend::device(name).map_err(|error| match cfg!(feature = "cuda") {
                true => Failure::usage(error.to_string()),
                false => crate::device::missing(name),
            })?;
        if config.threads.is_some() {
            terminal.warn(&format!("--threads has no effect with --device {name}"));
        }
        let source = model::open(model, terminal)?;
        let (tokenizer, chat_template) = load_text(&source)?;
        let engine = CandleEngine::load(&source, &device, config)?;
        terminal.info(&format!("{} on {name}, {:?}", source.name(), engine.model().dtype()));
        let form = format!("candle {:?}", engine.model().dtype());
        let eos = end_tokens(&source, tokenizer.as_ref());
        Ok(Self {
            fingerprint: fingerprint::model(&source, &eos, &form)?,
            engine,
            eos,
            tokenizer: tokenizer.map(Arc::new),
            chat_template: chat_template.map(Arc::new),
            generation: source.generation().clone(),
        })
    }
}

/// The text of `tokens` after `prompt`, without special tokens; empty without a tokenizer.
fn text(
    tokenizer: Option<&Arc<Tokenizer>>,
    prompt: &[u32],
    tokens: &[u32],
) -> engine::Result<String> {
    let Some(tokenizer) = tokenizer else { return Ok(String::new()) };
    let tail = &prompt[prompt.len().saturating_sub(CONTEXT_TOKENS)..];
    let mut detokenizer = Detokenizer::after_prompt(Arc::clone(tokenizer), SkipSpecial::Yes, tail);
    let mut text = String::new();
    for token in tokens {
        text.push_str(detokenizer.push(*token)?);
    }
    Ok(text + &detokenizer.finish()?)
}
