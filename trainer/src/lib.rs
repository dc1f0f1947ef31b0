//! Learns: reinforcement learning on an engine's own rollouts, and supervised training.
//!
//! A [`Trainer`] owns an [`engine::Engine`] and the data it learns from; [`Trainer::step`] reads like
//! the paper (arXiv 2505.22617). Algorithms are pure functions ([`advantage`], [`loss`]); everything
//! around them does not know which one runs, and one's own is as good as a built-in one ([`Algorithm`]).
//! Rewards and rows of one's own go in by [`Parts`]. Leaves out HTTP, but for rewards asked
//! for over it, and every kind of printing.
#![forbid(unsafe_code)]

pub mod advantage;
pub mod agg;
pub mod algorithm;
mod batch;
pub mod checkpoint;
pub mod config;
pub mod correction;
pub mod covariance;
pub mod data;
pub mod distribution;
pub mod dynamics;
mod encode;
pub mod error;
pub mod eval;
pub mod filter;
pub mod fit;
pub mod kl;
mod learner;
mod lock;
pub mod loss;
pub mod memory;
pub mod metrics;
mod objective;
mod optimizer;
pub mod packing;
mod parts;
pub mod random;
mod reference;
pub mod report;
mod resume;
pub mod rollout;
mod run;
pub mod samples;
mod sampling;
mod save;
pub mod schedule;
mod score;
mod sft;
pub mod shaping;
mod source;
mod surplus;
pub mod tasks;
pub mod tensorboard;
#[cfg(test)]
mod testing;
pub mod trackers;
mod trainer;
mod update;
mod validation;
pub mod verifier;

pub use algorithm::Algorithm;
pub use config::{RlConfig, SftConfig};
pub use encode::{Overlong, PromptEncoder};
pub use error::{Error, ErrorKind, Result};
pub use learner::{Learner, LossGradient, Packed};
pub use lock::RunLock;
pub use optimizer::{Optimizer, clip_scale, global_norm};
pub use parts::Parts;
pub use run::{Interrupt, Open, Progress, Resume, RunHooks, begin_anew, run_rl, run_rl_serving};
pub use save::{ModelFiles, save_model};
pub use score::score_train_path;
pub use sft::{SftEnd, initial_weights, run_sft};
pub use source::{Rows, eval_rows, train_rows, val_rows};
pub use trainer::Trainer;
pub use validation::Validation;
