//! From a model's files to numbers in f32: configuration, weights, and finding both on disk.
//!
//! Leaves out the decoder that computes with them and the tokenizer. Nothing here maps memory: files are
//! read at positions, in pieces, so loading needs a small constant amount besides the weights kept.

mod builtin;
mod bytes;
pub mod config;
mod config_gguf;
mod config_hf;
pub mod dequant;
pub mod gguf;
pub mod hub;
mod params;
pub mod rope;
pub mod safetensors;
pub mod source;

pub use builtin::open_builtin;
pub use config::{Architecture, GenerationDefaults, ModelConfig, TensorSpec};
pub use params::{ParamShape, ParamSpec, param_specs};
pub use rope::{RopeConfig, RopeScaling};
pub use source::{MemoryModel, ModelSource};
