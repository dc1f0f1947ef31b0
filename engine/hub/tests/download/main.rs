//! Downloads from a stand-in hub: what lands in the cache, and what happens when something goes wrong.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod faults;
mod models;
mod stand_in;
mod support;
