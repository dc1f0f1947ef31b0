//! `engine rl`: from flags and a file to a run of the trainer.

use std::cell::RefCell;
use std::path::Path;

use engine::{Engine, MemoryPlan, ModelConfig, ModelSource, Service};
use trainer::memory::{Demand, TrainingPlan, planned_tokens};
use trainer::{Interrupt, Parts, Progress, Resume, RlConfig, RunHooks, run_rl_serving};

use crate::args_run::{RlArgs, RunArgs};
use crate::device::DeviceArg;
use crate::exit::{Failure, Result};
use crate::layers::{Origin, Origins, RunConfig};
use crate::signals::Signals;
use crate::terminal::Terminal;
use crate::{candle, model, output};

mod door;

use door::{Door, Served, point};

/// Sequences of others that may run beside a rollout.
const GUESTS: usize = 16;
/// Longest context that others get at least, where the model has it, in tokens.
const GUEST_TOKENS: usize = 1024;

/// What a training command was asked to do; the trainer resolves the rest.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct RunRequest {
    /// The file of `--config`, if it describes a run.
    pub(crate) file: Option<RunConfig>,
    /// Dotted keys and their values: `--set`, then the flags, each with where it comes from.
    overrides: Vec<(Origin, String, String)>,
    /// Settings of the engine.
    pub(crate) engine: engine::EngineConfig,
    /// What to do with the resolved configuration.
    pub(crate) mode: Mode,
}

impl RunRequest {
    /// Sets a key.
    pub(crate) fn set(&mut self, origin: Origin, key: &str, value: String) {
        self.overrides.push((origin, key.to_owned(), value));
    }

    /// Keys and their values, later ones win: those of the file's flags, then of the environment, then of
    /// the command line; of each, flags after `--set`.
    pub(crate) fn overrides(&self) -> Vec<(String, String)> {
        let mut all = self.overrides.clone();
        all.sort_by_key(|(origin, ..)| *origin);
        all.into_iter().map(|(_, key, value)| (key, value)).collect()
    }
}

/// Whether the run takes place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Run,
    /// Print the resolved configuration and the memory plan.
    DryRun,
}

/// Runs the command.
pub(crate) fn run(
    args: RlArgs,
    (file, origins): (Option<RunConfig>, &Origins),
    terminal: &Terminal,
) -> Result<()> {
    let resume = resume(&args.run);
    let engine = model::training_config(&args.common, &args.engine, "engine rl")?;
    let mut request = request(&args.run, args.common.seed, (file, origins), engine)?;
    if let Some(reward) = &args.reward {
        request.set(origins.of("reward"), "reward.function", quoted(reward));
    }
    let mut method = args.method.as_deref();
    // Where both are from one place they are to agree; else the later place wins.
    if let Some(method) = method.take_if(|_| origins.of("method") != origins.of("set")) {
        request.set(origins.of("method"), "algorithm.method", quoted(method));
    }
    let file = request.file.as_ref();
    let text = file.map(|file| file.text.as_str());
    let config = RlConfig::resolve(method, text, &request.overrides())
        .map_err(|error| in_file(error, file))?;
    let engine = sized(&request.engine, &config, args.serve.is_some());
    if request.mode == Mode::DryRun {
        let source = model::open(&config.model.path, terminal)?;
        let mut config = config;
        let mut demand = Demand::rl(&config, &engine);
        let tokens = &mut config.trainer.max_tokens_per_microbatch;
        demand = budgeted(tokens, source.config(), (&engine, demand))?;
        // The real run holds the tokenizer and the template, so that the program is as large here.
        let _text = engine::load_text(&source)?;
        return dry_run(&config.to_toml(), source.config(), (&engine, &demand));
    }
    match (&args.device, &resume) {
        (DeviceArg::Candle(name), _) if args.serve.is_some() => {
            Err(Failure::usage(format!("--device {name} cannot --serve")))
        }
        (DeviceArg::Cpu, _) => {
            let door = Door::open(&args, &config, terminal)?;
            train((&config, &engine), &resume, door, terminal)
        }
        (DeviceArg::Candle(name), Resume::From(_)) => {
            Err(Failure::usage(format!("--device {name} cannot go on from a checkpoint")))
        }
        (DeviceArg::Candle(name), _) => candle::rl(name, &config, &engine, terminal),
    }
}

/// The engine for a run: with its seed, and no more memory for keys and values than it and its guests can
/// use.
fn sized(engine: &engine::EngineConfig, config: &RlConfig, serves: bool) -> engine::EngineConfig {
    let sequences = config.data.train_batch_size.saturating_mul(config.rollout.n);
    let longest = config.data.max_prompt_length.saturating_add(config.data.max_response_length);
    let (guests, useful) = match serves {
        true => (GUESTS, longest.max(GUEST_TOKENS)),
        false => (0, longest),
    };
    engine::EngineConfig {
        seed: config.trainer.seed,
        max_num_seqs: engine.max_num_seqs.min(sequences.saturating_add(guests)),
        useful_model_len: Some(useful),
        ..engine.clone()
    }
}

/// Where a training command is to begin.
pub(crate) fn resume(args: &RunArgs) -> Resume {
    match args.resume.as_str() {
        "auto" => Resume::Auto,
        "never" => Resume::Never,
        dir => Resume::From(dir.into()),
    }
}

/// What the flags that all training commands share ask for.
pub(crate) fn request(
    args: &RunArgs,
    seed: u64,
    (file, origins): (Option<RunConfig>, &Origins),
    engine: engine::EngineConfig,
) -> Result<RunRequest> {
    let mode = if args.dry_run { Mode::DryRun } else { Mode::Run };
    let mut request = RunRequest { file, overrides: Vec::new(), engine, mode };
    for set in &args.set {
        let (key, value) = set.split_once('=').ok_or_else(|| {
            Failure::usage(format!("--set {set} has no value, expected KEY=VALUE"))
        })?;
        request.set(origins.of("set"), key.trim(), value.trim().to_owned());
    }
    if let Some(model) = &args.model {
        request.set(origins.of("model"), "model.path", quoted(model));
    }
    for (flag, files) in [("train_files", &args.train_files), ("val_files", &args.val_files)] {
        if !files.is_empty() {
            let names: Vec<String> =
                files.iter().map(|file| quoted(&file.to_string_lossy())).collect();
            let list = format!("[{}]", names.join(", "));
            request.set(origins.of(flag), &format!("data.{flag}"), list);
        }
    }
    if let Some(output) = &args.output {
        request.set(origins.of("output"), "trainer.output", quoted(&output.to_string_lossy()));
    }
    if origins.of("seed") != Origin::Default {
        request.set(origins.of("seed"), "trainer.seed", seed.to_string());
    }
    Ok(request)
}

/// A string as TOML writes it.
pub(crate) fn quoted(text: &str) -> String {
    toml::Value::from(text).to_string()
}

/// Runs the trainer, and the server behind its door.
fn train(
    (config, engine_config): (&RlConfig, &engine::EngineConfig),
    resume: &Resume,
    mut door: Option<Door>,
    terminal: &Terminal,
) -> Result<()> {
    let signals = Signals::listen()?;
    let mut open = |checkpoint: Option<&Path>, dtype| {
        let source = match checkpoint {
            Some(path) => ModelSource::open(path)?,
            None => model::source(&config.model.path, terminal)?,
        };
        let dtype = engine_config.dtype.or(dtype);
        Engine::load(&source, &engine::EngineConfig { dtype, ..engine_config.clone() })
    };
    let total = config.trainer.total_steps;
    let curves = door.as_ref().and_then(Door::curves);
    let served: RefCell<Option<Served>> = RefCell::new(None);
    let mut begin = |service: Service| {
        served.replace(door.take().map(|door| door.serve(service, *terminal)));
    };
    let console = config.trainer.tracks("console");
    let mut tell = |progress: Progress| {
        if console || !matches!(progress, Progress::Step(_)) {
            self::tell(terminal, total, &progress);
        }
        match (&progress, &curves) {
            (Progress::Step(metrics), Some(curves)) => curves.push(point(metrics)),
            (Progress::Lingering, _) => {
                if let Some(served) = &mut *served.borrow_mut() {
                    served.shut_down();
                }
            }
            _ => {}
        }
    };
    let hooks = RunHooks {
        open: &mut open,
        stop: &|| signals.asked(),
        tell: &mut tell,
        serve: curves.is_some().then_some(&mut begin as &mut dyn FnMut(Service)),
    };
    let ended = run_rl_serving(config, (resume, Parts::new()), hooks);
    if let Some(served) = served.take() {
        served.join(terminal);
    }
    match ended? {
        Interrupt::Done { report, checkpoint } => {
            output::print(&format!("checkpoint {}", checkpoint.display()))?;
            output::print(&format!("report {}", report.display()))
        }
        Interrupt::Resumable(checkpoint) => Err(Failure::resumable(&checkpoint)),
    }
}

/// Plans the tokens of a training pass where they are left open; what a run with them demands.
pub(crate) fn budgeted(
    tokens: &mut usize,
    model: &ModelConfig,
    (engine, demand): (&engine::EngineConfig, Demand),
) -> Result<Demand> {
    if *tokens == 0 {
        let plan = MemoryPlan::new(model, engine)?;
        *tokens = planned_tokens(model, engine.resolved_dtype(), &plan, &demand);
    }
    Ok(demand.with_budget(*tokens))
}

/// Prints the resolved configuration and what the model and its training will take.
pub(crate) fn dry_run(
    config: &str,
    model: &ModelConfig,
    (engine, demand): (&engine::EngineConfig, &Demand),
) -> Result<()> {
    let plan = MemoryPlan::new(model, engine)?;
    let training = TrainingPlan::new(model, engine.resolved_dtype(), &plan, demand);
    let lines = training.to_string();
    let lines: Vec<String> = lines.lines().map(|line| format!("# {line}")).collect();
    output::print(&format!(
        "{}\n\n# memory of the run\n{}\n# {} blocks of {} tokens, longest sequence {} tokens",
        config.trim_end(),
        lines.join("\n"),
        plan.kv_blocks,
        plan.block_size,
        plan.max_model_len
    ))
}

/// A refusal of the configuration, with the file it may stand in.
pub(crate) fn in_file(error: trainer::Error, file: Option<&RunConfig>) -> Failure {
    let failure = Failure::from(error);
    match file {
        Some(file) => failure.at(file.path.display()),
        None => failure,
    }
}

/// Shows what a run tells.
pub(crate) fn tell(terminal: &Terminal, total_steps: u64, progress: &Progress) {
    match progress {
        Progress::Note(note) => terminal.info(note),
        Progress::Validated(step, validation) => {
            let failed = match validation.failed.failures {
                0 => String::new(),
                failures => format!(", {failures} rewards failed"),
            };
            terminal.info(&format!(
                "step {step}: validation reward {:.3}, accuracy {:.3} on {} rows{failed}",
                validation.reward, validation.accuracy, validation.rows
            ));
        }
        Progress::Step(metrics) => terminal.info(&metrics.progress(total_steps)),
        Progress::Saved(path) => terminal.info(&format!("saved {}", path.display())),
        Progress::Lingering => {}
    }
}
