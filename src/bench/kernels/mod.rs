//! `engine bench kernels`: each operation at the shapes of real models, beside the machine's peaks.
//!
//! Bytes are those that memory has to give or take at least: weights, caches, and the rows of operations
//! that only stream through them. Activations around a product count as being in the cache. What is
//! read comes from more memory than caches hold, a different part in each call. Bytes that are written
//! count as if read. Exponentials count as one operation. The operations themselves are called as the
//! decoder, the sampler and the optimizer call them.

mod attention;
mod head;
mod products;
mod rows;
mod schedule;
mod table;

use std::time::Instant;

use engine::{Dtype, EngineConfig, Level};
use kernels::Kernels;
use serde_json::{Value, json};

use crate::args::{CommonArgs, EngineArgs};
use crate::bench::args::KernelsArgs;
use crate::bench::limits::{Peaks, kernels as kernels_of, machine};
use crate::bench::numbers::Values;
use crate::bench::{positive, save};
use crate::doctor::processor;
use crate::exit::{Failure, Result};
use crate::terminal::Terminal;
use crate::{model, output};

/// Memory that is gone through before a part of it comes again: more than caches hold.
const COLD_BYTES: usize = 192 << 20;
/// Rows of products where none are asked for.
const ROWS: [usize; 4] = [1, 8, 128, 1024];
/// Runs of a figure at least.
const MIN_RUNS: usize = 3;

/// The sizes that operations of a model have.
#[derive(Clone, Copy, Debug)]
struct Shape {
    name: &'static str,
    hidden: usize,
    inter: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    vocab: usize,
    /// Memory that is gone through, in bytes.
    cold_bytes: usize,
}

const SHAPES: [Shape; 3] = [
    Shape {
        name: "smollm2-135m",
        hidden: 576,
        inter: 1536,
        heads: 9,
        kv_heads: 3,
        head_dim: 64,
        vocab: 49152,
        cold_bytes: COLD_BYTES,
    },
    Shape {
        name: "qwen2.5-0.5b",
        hidden: 896,
        inter: 4864,
        heads: 14,
        kv_heads: 2,
        head_dim: 64,
        vocab: 151_936,
        cold_bytes: COLD_BYTES,
    },
    // To see that everything runs: too small to say anything about speed.
    Shape {
        name: "tiny",
        hidden: 64,
        inter: 96,
        heads: 2,
        kv_heads: 1,
        head_dim: 32,
        vocab: 512,
        cold_bytes: 1 << 20,
    },
];

impl Shape {
    fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }

    fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// How many things of `bytes` bytes are as much as is gone through.
    fn copies(&self, bytes: usize) -> usize {
        (self.cold_bytes / bytes.max(1)).max(1)
    }
}

/// One operation, measured.
struct Figure {
    operation: &'static str,
    model: &'static str,
    shape: String,
    bytes: f64,
    flop: f64,
    seconds: Values,
}

/// How everything is measured, and what has been.
struct Ctx<'a> {
    kernels: &'a Kernels,
    dtype: Dtype,
    rows: &'a [usize],
    only: Option<&'a str>,
    /// Time spent on a figure, in seconds.
    budget: f64,
    figures: Vec<Figure>,
}

/// What an operation has to do at least.
struct Work {
    bytes: usize,
    flop: usize,
}

impl Ctx<'_> {
    /// Whether an operation is asked for.
    fn wants(&self, operation: &str) -> bool {
        self.only.is_none_or(|only| operation.contains(only))
    }

    /// Measures `call` after a first run of it, which does not count.
    fn time(
        &mut self,
        (operation, shape, of): (&'static str, &Shape, String),
        work: Work,
        mut call: impl FnMut(),
    ) {
        call();
        let (begun, mut seconds) = (Instant::now(), Vec::new());
        while seconds.len() < MIN_RUNS || begun.elapsed().as_secs_f64() < self.budget {
            let clock = Instant::now();
            call();
            seconds.push(clock.elapsed().as_secs_f64());
        }
        self.figures.push(Figure {
            operation,
            model: shape.name,
            shape: of,
            bytes: work.bytes as f64,
            flop: work.flop as f64,
            seconds: Values::new(seconds),
        });
    }
}

/// Runs the command.
pub(crate) fn run(args: &KernelsArgs, terminal: &Terminal) -> Result<()> {
    if !(args.seconds > 0.0 && args.seconds <= 60.0) {
        let seconds = args.seconds;
        return Err(Failure::usage(format!("--seconds is {seconds}, limit is above 0, up to 60")));
    }
    args.rows.iter().try_for_each(|rows| positive("--rows", *rows))?;
    let shapes = shapes(&args.models)?;
    let config = config(&args.common)?;
    let kernels = kernels_of(&config)?;
    let peaks = Peaks::measure(&kernels, config.resolved_dtype());
    output::print(&format!(
        "{}: {} kernels, {} threads, weights {}; {}. Medians.\n",
        processor(),
        kernels.level(),
        config.resolved_threads(),
        config.resolved_dtype().name(),
        peaks.describe()
    ))?;
    let figures = measure(args, (&kernels, config.resolved_dtype()), &shapes, terminal)?;
    if figures.is_empty() {
        let only = args.only.as_deref().unwrap_or_default();
        return Err(Failure::usage(format!("--only {only} names no operation")));
    }
    let single = match args.compare_threads {
        true => {
            let one = EngineConfig { threads: Some(1), ..config.clone() };
            let kernels = kernels_of(&one)?;
            Some(measure(args, (&kernels, config.resolved_dtype()), &shapes, terminal)?)
        }
        false => None,
    };
    output::print(&table::markdown(&figures, single.as_deref(), &peaks))?;
    let results = json!({
        "machine": machine(&config, &peaks),
        "operations": table::to_json(&figures, single.as_deref(), &peaks),
    });
    save(args.json.as_deref(), &results)
}

/// The shapes of these models, or of the real ones.
fn shapes(names: &[String]) -> Result<Vec<&'static Shape>> {
    if names.is_empty() {
        return Ok(SHAPES.iter().take(2).collect());
    }
    let find = |name: &String| {
        let known = || SHAPES.map(|shape| shape.name).join(", ");
        let found = SHAPES.iter().find(|shape| shape.name == name);
        found.ok_or_else(|| {
            Failure::usage(format!("--models {name} is unknown, known are {}", known()))
        })
    };
    names.iter().map(find).collect()
}

fn config(common: &CommonArgs) -> Result<EngineConfig> {
    let config = model::engine_config(common, &EngineArgs::default())?;
    if config.resolved_level() == Level::Reference {
        return Err(Failure::usage(
            "the reference kernels are one thread of plain loops, not measured",
        ));
    }
    Ok(config)
}

/// All figures that are asked for.
fn measure(
    args: &KernelsArgs,
    (kernels, dtype): (&Kernels, Dtype),
    shapes: &[&Shape],
    terminal: &Terminal,
) -> Result<Vec<Figure>> {
    let rows = if args.rows.is_empty() { &ROWS[..] } else { &args.rows };
    let (only, budget) = (args.only.as_deref(), args.seconds);
    let mut ctx = Ctx { kernels, dtype, rows, only, budget, figures: Vec::new() };
    for shape in shapes {
        let threads = kernels.pool().threads();
        terminal.info(&format!("{}: {threads} threads", shape.name));
        products::measure(&mut ctx, shape);
        attention::measure(&mut ctx, shape);
        head::measure(&mut ctx, shape);
        rows::measure(&mut ctx, shape);
    }
    if let [shape, ..] = shapes {
        schedule::measure(&mut ctx, &Shape { name: "any", ..**shape })?;
    }
    Ok(ctx.figures)
}

/// Values between -1 and 1 without a pattern that matters.
fn numbers(len: usize) -> Vec<f32> {
    let mixed = |i: u32| {
        let i = (i ^ i >> 16).wrapping_mul(0x85eb_ca6b);
        let i = (i ^ i >> 13).wrapping_mul(0xc2b2_ae35);
        i ^ i >> 16
    };
    (0..len as u32).map(|i| (mixed(i) >> 8) as f32 / 8_388_608.0 - 1.0).collect()
}

/// One figure as JSON.
fn figure_json(figure: &Figure, single: Option<&Figure>, peaks: &Peaks) -> Value {
    let (limit, median) = (figure.limit(peaks), figure.seconds.median());
    let (low, high) = figure.seconds.spread();
    json!({
        "operation": figure.operation, "model": figure.model, "shape": figure.shape,
        "bytes": figure.bytes, "flop": figure.flop, "limit_s": limit, "seconds": median,
        "share_of_limit": limit / median, "runs": figure.seconds.len(), "min_s": low, "max_s": high,
        "flop_per_second": figure.flop / median, "bytes_per_second": figure.bytes / median,
        "one_thread_s": single.map(|figure| figure.seconds.median()),
        "threads_speedup": single.map(|figure| figure.seconds.median() / median),
    })
}

impl Figure {
    /// Seconds that the bytes or the operations take at least, whichever is longer.
    fn limit(&self, peaks: &Peaks) -> f64 {
        (self.bytes / peaks.bytes).max(self.flop / peaks.flops)
    }
}
