//! One decoder for Llama, Mistral, Qwen2 and Qwen3, forward and backward, for rollouts and training.
//!
//! Work is a batch of rows, each a token at a position of some sequence. What differs between a
//! rollout and training is where keys and values are kept (the paged cache, or one layer's worth that
//! is used again for every layer) and whether the layers' intermediate values are kept ([`Tape`]).
//! The arithmetic of a row is the same in both, to the bit.
//!
//! Leaves out mixture of experts, sliding windows and every dropout.

mod backward;
mod forward;
mod tape;
mod weights;

pub use backward::{Gradients, HeadGradient, PackedPass};
pub use forward::{Batch, Decoder, HeadInput, KvLayers};
pub use tape::{Keep, Tape};
pub use weights::{LayerWeights, ParamMut, Weights};
