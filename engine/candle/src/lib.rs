//! The second opinion and the portable path: the decoder as a plain composition of candle operations.
//!
//! The same families as `engine::decoder` (Llama, Mistral, Qwen2, Qwen3), differentiated by candle's
//! autograd instead of by hand, on any candle device. Forward and gradient tests of the fast engine
//! compare with it; [`CandleEngine`] generates over paged KV and takes RL steps with it. Every operation
//! used has a backward: candle's fused norms, rotary embeddings and softmax drop gradients silently, so
//! they do not occur here. Slow by design: ragged batches run one sequence at a time.
//!
//! Leaves out speed, flash attention, stop strings, penalties, truncated sampling and checkpoints.
//!
//! | file | what lives there |
//! |---|---|
//! | `device.rs` | [`device()`]: a candle device by name |
//! | `net.rs` | the forward pass, over whole sequences or paged KV |
//! | `model.rs` | [`CandleModel`]: weights as variables, log-probabilities, gradients |
//! | `pool.rs` | paged keys and values as candle tensors |
//! | `generate.rs` | [`CandleEngine`]: the scheduler's plans, run and sampled |
//! | `sample.rs` | one draw from a row of logits |
//! | `train.rs` | [`CandleEngine::rl_step`] |
//! | `adamw.rs` | AdamW on variables |
//!
//! ```
//! use candle_backend::{CandleEngine, GenerateSettings, Seed, device};
//! use engine::{EngineConfig, ModelSource};
//!
//! # let path = std::path::Path::new("../../tests/data/golden/models/tiny-llama");
//! let source = ModelSource::open(path)?;
//! let mut engine = CandleEngine::load(&source, &device("candle-cpu")?, &EngineConfig::default())?;
//! let settings = GenerateSettings {
//!     samples: 2,
//!     temperature: 1.0,
//!     max_tokens: 4,
//!     eos: source.eos().to_vec(),
//!     seed: Seed::Each(7),
//! };
//! let completions = engine.generate(&[vec![17, 4, 99]], &settings)?;
//! assert_eq!(completions.len(), 2);
//! assert!(completions.iter().all(|c| c.tokens.len() == c.logprobs.len()));
//! # Ok::<(), engine::Error>(())
//! ```
#![forbid(unsafe_code)]

mod adamw;
mod device;
mod error;
mod generate;
mod model;
mod net;
mod pool;
mod sample;
mod train;

pub use adamw::AdamW;
pub use candle_core;
pub use device::device;
pub use generate::{CandleEngine, Completion, GenerateSettings, Seed};
pub use model::{CandleModel, Gradients};
pub use train::{Episode, LossFn, ResponseScore, StepReport, StepSettings};
