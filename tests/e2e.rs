//! Behaviour at the doors of the product, in one binary.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod e2e {
    mod bench;
    mod cli;
    mod eval;
    mod generate;
    mod hub;
    #[cfg(target_os = "linux")]
    mod memory;
    mod plot;
    mod process;
    mod rewards;
    mod rl;
    mod rl_faults;
    mod rl_resume;
    mod rl_serve;
    mod score;
    mod serve;
    mod serve_doors;
    mod sft;
    #[expect(dead_code, reason = "the rest is for the tests of the client")]
    #[path = "../../engine/hub/tests/download/stand_in.rs"]
    mod stand_in;
    pub(crate) mod support;
    mod train;
}
