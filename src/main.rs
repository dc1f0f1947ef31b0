//! The `engine` command: arguments, configuration, the terminal, signals and exit codes.
//!
//! Arguments are parsed into plain values ([`args`]), completed from the environment and a file
//! ([`layers`]), and resolved once into what a command runs with. This is the only place that prints,
//! reads the environment, listens for signals or exits. No maths.
#![forbid(unsafe_code)]

mod args;
mod args_api;
mod args_eval;
mod args_run;
mod bench;
#[cfg(feature = "candle")]
mod candle;
#[cfg(not(feature = "candle"))]
#[path = "candle/missing.rs"]
mod candle;
mod device;
mod doctor;
mod download;
mod eval;
mod exit;
mod fingerprint;
mod generate;
mod input;
mod layers;
mod model;
mod output;
mod plot;
mod progress;
mod resume;
mod rl;
mod score;
mod serve;
mod sft;
mod signals;
mod sockets;
mod terminal;

use std::process::ExitCode;

/// Activations and gradients on lines and huge pages.
#[global_allocator]
static ALLOCATOR: kernels::HugePages = kernels::HugePages;

use args::Command;
use exit::{Failure, Result};
use layers::Parsed;
use terminal::Terminal;

fn main() -> ExitCode {
    let parsed = match layers::parse(std::env::args_os()) {
        Ok(Some(parsed)) => parsed,
        Ok(None) => return ExitCode::SUCCESS,
        Err(failure) => return report(&Terminal::plain(), &failure),
    };
    let terminal = Terminal::new(parsed.command.common());
    terminal.report_panics();
    match run(parsed, &terminal) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => report(&terminal, &failure),
    }
}

fn run(parsed: Parsed, terminal: &Terminal) -> Result<()> {
    let Parsed { command, run_config, origins, note } = parsed;
    if let Some(note) = note {
        terminal.warn(&note);
    }
    match command {
        Command::Serve(args) => serve::run(args, terminal),
        Command::Generate(args) => generate::run(&args, terminal),
        Command::Score(args) => score::run(args, terminal),
        Command::Rl(args) => rl::run(args, (run_config, &origins), terminal),
        Command::Sft(args) => sft::run(args, (run_config, &origins), terminal),
        Command::Eval(args) => eval::run(&args, terminal),
        Command::Plot(args) => plot::run(&args, terminal),
        Command::Bench(args) => bench::run(&args, terminal),
        Command::Doctor(args) => doctor::run(&args, terminal),
    }
}

fn report(terminal: &Terminal, failure: &Failure) -> ExitCode {
    if !failure.is_closed_pipe() {
        terminal.error(&failure.to_string());
    }
    failure.exit_code()
}
