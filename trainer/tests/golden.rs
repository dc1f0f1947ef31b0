//! The golden vectors of the RL math and of the verifiers, from both reference code bases.
//!
//! Files under `tests/data/golden` of the workspace, or under `ENGINE_GOLDEN_DIR`; formats in its
//! README. Every case of the files named here is compared in f64 and in f32; a case of an unknown
//! shape fails. Denominators here are exact, those of the references carry +1e-8, so aggregated
//! numbers agree to 1e-6 in f64 and per-token numbers to 1e-9.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "golden/advantage.rs"]
mod advantage;
#[path = "golden/agg.rs"]
mod agg;
#[path = "golden/common.rs"]
mod common;
#[path = "golden/kl.rs"]
mod kl;
#[path = "golden/losses.rs"]
mod losses;
#[path = "golden/science.rs"]
mod science;
#[path = "golden/verifiers.rs"]
mod verifiers;
