//! `engine bench`: speed, beside the limits of the machine where it is computed here.
//!
//! [`throughput`], [`latency`] and [`rl`] drive an engine in this process, [`serve`] a server over HTTP,
//! [`kernels`] the operations one by one. What counts as the limit is in [`limits`].

pub(crate) mod args;
mod dataset;
mod generation;
mod kernels;
mod latency;
pub(crate) mod limits;
mod numbers;
mod rl;
mod serve;
pub(crate) mod serve_args;
mod throughput;

use std::path::Path;

use serde_json::Value;

use crate::exit::{Failure, Result};
use crate::output::Output;
use crate::terminal::Terminal;
use args::{BenchArgs, BenchCommand};

/// Runs the command.
pub(crate) fn run(args: &BenchArgs, terminal: &Terminal) -> Result<()> {
    match &args.what {
        BenchCommand::Throughput(args) => throughput::run(args, terminal),
        BenchCommand::Latency(args) => latency::run(args, terminal),
        BenchCommand::Serve(args) => serve::run(args, terminal),
        BenchCommand::Rl(args) => rl::run(args, terminal),
        BenchCommand::Kernels(args) => kernels::run(args, terminal),
    }
}

/// Writes results to a file, if one is named.
fn save(path: Option<&Path>, results: &Value) -> Result<()> {
    let Some(path) = path else { return Ok(()) };
    let mut output = Output::replace(path)?;
    output.line(results);
    output.finish()
}

/// Most of what a benchmark counts; products of two of them fit any integer.
const MAX_COUNT: usize = 1 << 24;

/// A count that has to be 1 or more.
fn positive(flag: &str, value: usize) -> Result<()> {
    if (1..=MAX_COUNT).contains(&value) {
        return Ok(());
    }
    Err(Failure::usage(format!("{flag} is {value}, limit is 1 to {MAX_COUNT}")))
}
