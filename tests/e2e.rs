//! Behaviour at the doors of the product, in one binary.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod e2e {
    mod cli;
    mod generate;
    mod rl;
    mod rl_faults;
    mod score;
    mod serve;
    pub(crate) mod support;
    mod train;
}
