//! The scheduler of the engine: which tokens of which sequences run next, and in which blocks of
//! KV memory their keys and values live.
//!
//! It is policy without tensors. It holds integers only, knows neither clocks nor threads, has no
//! dependencies, and is deterministic: the same calls give the same plans. The shape is that of
//! vLLM's V1 scheduler (paged KV memory as in *Efficient Memory Management for Large Language
//! Model Serving with PagedAttention*, arXiv 2309.06180): continuous batching under a token
//! budget, chunked prefill, a prefix cache of whole blocks, preemption by recompute.
//!
//! # The nouns
//!
//! * A **block** is room for the keys and values of `block_size` consecutive tokens of a
//!   sequence. Blocks are numbered `0..num_blocks`. The token at position `p` of a sequence lives
//!   in slot `blocks[p / block_size] * block_size + p % block_size`.
//! * A **sequence** is a prompt and what was generated behind it. It waits, runs, and ends.
//! * A **slice** is work: run `tokens[start..start + len]` of one sequence. There is no difference
//!   between prefill and decode, which is a slice of one token.
//! * A **guess** is a token that may follow the known ones: a slice that samples can run some, to be
//!   right or wrong when tokens are sampled.
//! * A **plan** is a list of slices that are run together, as one step.
//!
//! # The loop
//!
//! ```text
//!      add -> waiting --admitted--> running --commit--> running .. ended -> finish
//!                ^                     |
//!                +----- preempted -----+          (all its tokens are kept, its blocks are not)
//!
//!      plan -> run the slices, sample -> commit            the step worked
//!      plan -> run the slices, error  -> rollback          the step did not happen
//! ```
//!
//! # Example
//!
//! Two samples of one prompt: the second takes the prompt's full block from the first, although
//! both are admitted by the same plan.
//!
//! ```
//! use scheduler::{Config, NewSequence, PrefixCache, Scheduler};
//!
//! let mut scheduler = Scheduler::new(Config {
//!     block_size: 16,
//!     num_blocks: 64,
//!     max_num_seqs: 8,
//!     max_num_batched_tokens: 256,
//!     max_model_len: 512,
//!     prefix_cache: PrefixCache::On,
//! })?;
//! let request = NewSequence {
//!     prompt: (100..120).collect(),
//!     max_total_tokens: 22,
//!     salt: 0,
//!     prefix_cache: PrefixCache::On,
//! };
//! let first = scheduler.add(request.clone())?;
//! let second = scheduler.add(request)?;
//!
//! let mut work = Vec::new();
//! while !scheduler.is_idle() {
//!     scheduler.plan()?;
//!     let mut sampled = Vec::new();
//!     for slice in &scheduler.planned().slices {
//!         // Here the engine runs the tokens, over the blocks of `scheduler.blocks(slice.seq)`.
//!         work.push((slice.seq, slice.start, slice.len));
//!         if slice.samples {
//!             sampled.push((slice.seq, 7));
//!         }
//!     }
//!     scheduler.commit(&sampled)?;
//! }
//! assert_eq!(work, [(first, 0, 20), (second, 16, 4), (first, 20, 1), (second, 20, 1)]);
//! assert_eq!(scheduler.tokens(first)[20..], [7, 7]);
//! assert_eq!(scheduler.cached_tokens(second), 16);
//!
//! assert!(scheduler.finish(first) && scheduler.finish(second));
//! scheduler.begin_update()?; // here the trainer writes the weights
//! scheduler.end_update();
//! assert_eq!(scheduler.version().0, 1);
//! # Ok::<(), scheduler::Error>(())
//! ```
//!
//! # Code map
//!
//! | file | what lives there |
//! |---|---|
//! | `scheduler.rs` | [`Scheduler`]: the doors, and what a step changes |
//! | `planner.rs` | how a plan is made: running first, preemption, admission |
//! | `memory.rs` | the one place where pool and prefix index meet |
//! | `pool.rs` | reference counts and the free list |
//! | `prefix.rs` | the index of full blocks by their content |
//! | `sequence.rs` | a sequence and the table of sequences |
//! | `list.rs` | a doubly linked list over small integers |
//! | `check.rs` | [`Scheduler::check`]: every invariant, as code |

#![forbid(unsafe_code)]

mod check;
mod config;
mod error;
mod ids;
mod list;
mod memory;
mod planner;
mod pool;
mod prefix;
mod scheduler;
mod sequence;

pub use config::{Config, NewSequence, PrefixCache};
pub use error::{Error, ErrorKind};
pub use ids::{SeqId, WeightsVersion};
pub use planner::{Plan, Slice};
pub use scheduler::{Scheduler, Stats};
