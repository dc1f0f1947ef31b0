//! `engine plot`: the report of one run or several, from what they have left in their folders.
//!
//! Reading, fitting and drawing are the trainer's; here are the flags, the files and the table on
//! standard output. Loads no model.

use std::fs;
use std::path::PathBuf;

use clap::Args;
use trainer::report::{csv, read_runs, render};

use crate::args::CommonArgs;
use crate::exit::{Failure, Result};
use crate::output;
use crate::terminal::Terminal;

/// Shown under `engine plot --help`.
pub(crate) const EXAMPLES: &str = concat!(
    "Examples:\n",
    "  engine plot runs/kl_cov\n",
    "  engine plot runs/grpo runs/kl_cov runs/clip_cov --output compare.html --svg charts\n",
    "  engine plot runs/grpo runs/kl_cov --csv metrics.csv\n",
    "  engine plot runs/grpo --fit-until 36\n",
    "\n",
    "The table of fits R = -a exp(H) + b goes to standard output. A run may be in progress; what cannot\n",
    "be used of it is said and left out.",
);

/// `engine plot`.
#[derive(Debug, Args)]
pub(crate) struct PlotArgs {
    /// Folders that `engine rl` wrote (required)
    #[arg(value_name = "RUN_DIR", num_args = 1..)]
    pub(crate) runs: Vec<PathBuf>,
    /// HTML file for the report
    #[arg(long, value_name = "FILE", default_value = "report.html")]
    pub(crate) output: PathBuf,
    /// Fit reward against entropy up to this step, and compare later steps with what it predicts
    #[arg(long, value_name = "STEP")]
    pub(crate) fit_until: Option<u64>,
    /// Also write each chart as an SVG file into this folder
    #[arg(long, value_name = "DIR")]
    pub(crate) svg: Option<PathBuf>,
    /// Also write all metrics of all runs, a line a step, into this CSV file
    #[arg(long, value_name = "FILE")]
    pub(crate) csv: Option<PathBuf>,
    #[command(flatten, next_help_heading = "General")]
    pub(crate) common: CommonArgs,
}

/// Runs the command.
pub(crate) fn run(args: &PlotArgs, terminal: &Terminal) -> Result<()> {
    if args.runs.is_empty() {
        return Err(Failure::usage("no RUN_DIR given, expected folders that engine rl wrote"));
    }
    let runs = read_runs(&args.runs)?;
    let labels: Vec<&str> = runs.iter().map(|run| run.label.as_str()).collect();
    let report = render(&runs, &labels.join(", "), args.fit_until);
    report.notes.iter().for_each(|note| terminal.warn(note));
    fs::write(&args.output, &report.html)
        .map_err(|error| Failure::unwritable(&args.output, &error))?;
    if let Some(dir) = &args.svg {
        fs::create_dir_all(dir).map_err(|error| Failure::unwritable(dir, &error))?;
        for (name, svg) in &report.svgs {
            let path = dir.join(name);
            fs::write(&path, svg).map_err(|error| Failure::unwritable(&path, &error))?;
        }
    }
    if let Some(path) = &args.csv {
        fs::write(path, csv(&runs)).map_err(|error| Failure::unwritable(path, &error))?;
    }
    output::print(&report.fits)?;
    terminal.info(&format!("report {}", args.output.display()));
    Ok(())
}
