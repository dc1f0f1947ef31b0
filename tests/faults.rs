//! Faults of requests, clients and resources against a real `engine serve`: whatever comes, it is answered as
//! documented, and the next good request is answered too.
//!
//! Rows are those of the table of faults (bad input, clients, resources); files and training have their own
//! tests. The whole table:
//!
//! | row | where |
//! |---|---|
//! | 1-9 | `input.rs`, `row_01_...` to `row_09_...` |
//! | 10-15 | `content.rs`; also `engine/tests/engine/sampling.rs` (10), the server's `routes/tests/structured.rs` (11, 12), `engine/src/text/tests/` (13), `no_value_in_the_weights_stops_the_engine` of `engine/tests/engine.rs` (14) |
//! | 16, 17, 19-21, 24 | `clients.rs`; also `an_abort_returns_all_blocks_within_one_step` of `engine/tests/engine.rs` (17) |
//! | 18 | the server's `routes/tests/limits.rs`, `tests/e2e/serve_doors.rs` |
//! | 22, 23, 25, 26 | `process.rs`; a run killed: `a_killed_run_goes_on_with_the_same_command` of `tests/e2e/rl.rs` (26) |
//! | 27 | the server's `routes/tests/panics.rs`; the exit code: `an_engine_that_has_failed_ends_the_command_with_code_1` of `src/serve.rs` |
//! | 28 | `numbers_that_are_not_end_a_request_and_the_engine_lives_on` of `engine/tests/engine.rs` |
//! | 29 | `process.rs`; training: `a_seed_gives_the_same_run_on_any_number_of_threads_and_in_any_batch` of `tests/e2e/rl.rs` |
//! | 30 | not tested: there is no device to lose; an engine that fails is row 27 |
//! | 31-33 | `process.rs`; also `tests/e2e/serve.rs` (31, 32) |
//! | 34 | `row_34_a_forked_child_gets_an_error` of `bindings/ctest/test.c` |
//! | 35 | `the_thread_ends_with_the_service` of `engine/tests/engine/service.rs` |
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "faults/clients.rs"]
mod clients;
#[path = "faults/content.rs"]
mod content;
#[path = "faults/input.rs"]
mod input;
#[path = "faults/known.rs"]
mod known;
#[path = "faults/process.rs"]
mod process;
#[path = "faults/server.rs"]
mod server;
#[expect(dead_code, reason = "the rest is for the tests of the other commands")]
#[path = "e2e/support.rs"]
mod support;
