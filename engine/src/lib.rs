//! Generates: models, KV memory, sampling, text, and the engine around them.
//!
//! [`Engine`] is synchronous, [`Service`] puts it on a thread for concurrent callers. Weights are read
//! by rollouts and by training from the same memory and change only inside a [`WeightsUpdate`].
//!
//! Leaves out rewards and losses (`trainer`), HTTP (`server`) and every kind of printing.
#![forbid(unsafe_code)]

mod available;
mod config;
pub mod decoder;
mod draw;
mod engine;
pub mod error;
mod grammar;
mod guess;
mod guests;
mod histogram;
mod load;
mod memory;
pub mod model;
mod pause;
mod prompt;
pub mod random;
mod request;
mod runner;
mod sampler;
mod sequence;
mod service;
pub mod text;
mod timings;
mod update;

pub use available::{ResidentMemory, available_memory_bytes};
pub use config::{EngineConfig, Quantization, RunGuesses, Speculation};
pub use engine::{Engine, Score};
pub use error::{Error, ErrorKind, Result};
pub use grammar::{Constraint, Grammar, GrammarCompiler, UnknownKeywords, json_schema};
pub use guess::SpeculationStats;
pub use guests::{Guests, Host};
pub use histogram::Histogram;
pub use kernels::{Dtype, Kernels, KvDtype, Level, features, probe};
pub use load::{end_tokens, load_text};
pub use memory::{LOGIT_ROWS, MemoryPlan};
pub use model::{GenerationDefaults, ModelConfig, ModelSource};
pub use pause::PauseMode;
pub use prompt::PromptToken;
pub use request::{
    Continuation, EosRule, Event, FinishReason, Finished, LogprobsMode, MAX_LOGPROBS, MAX_SAMPLES,
    Request, RequestId, SampleError, SamplingParams, StopReason, StopText, Token, check_prompt,
};
pub use scheduler::{PrefixCache, WeightsVersion};
pub use service::{AfterEvents, Phase, Sent, Service, Sink, Status, TakenIn};
pub use text::{ChatTemplate, Message, Tokenizer};
pub use timings::Timings;
pub use update::WeightsUpdate;
