//! `engine rl`: from flags and a file to a run of the trainer.

use std::path::Path;

use engine::decoder::{Keep, Tape};
use engine::{Engine, MemoryPlan, ModelSource};
use trainer::config::kept_for_backward;
use trainer::{Interrupt, Optimizer, Parts, Progress, Resume, RlConfig, run_rl};

use crate::args_run::{RlArgs, RunArgs};
use crate::device::DeviceArg;
use crate::exit::{Failure, Result};
use crate::layers::RunConfig;
use crate::signals::Signals;
use crate::terminal::Terminal;
use crate::{candle, model, output};

/// What a training command was asked to do; the trainer resolves the rest.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct RunRequest {
    /// The file of `--config`, if it describes a run.
    pub(crate) file: Option<RunConfig>,
    /// Dotted keys and their values, later ones win: `--set`, then the flags.
    pub(crate) overrides: Vec<(String, String)>,
    /// Settings of the engine.
    pub(crate) engine: engine::EngineConfig,
    /// What to do with the resolved configuration.
    pub(crate) mode: Mode,
}

/// Whether the run takes place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Run,
    /// Print the resolved configuration and the memory plan.
    DryRun,
}

/// Runs the command.
pub(crate) fn run(args: RlArgs, file: Option<RunConfig>, terminal: &Terminal) -> Result<()> {
    let resume = match args.resume.as_str() {
        "auto" => Resume::Auto,
        "never" => Resume::Never,
        dir => Resume::From(dir.into()),
    };
    let engine = model::engine_config(&args.common, &args.engine)?;
    let mut request = request(&args.run, args.common.seed, file, engine)?;
    if let Some(reward) = &args.reward {
        request.overrides.push(("reward.function".to_owned(), quoted(reward)));
    }
    let file = request.file.as_ref();
    let text = file.map(|file| file.text.as_str());
    let config = RlConfig::resolve(args.method.as_deref(), text, &request.overrides)
        .map_err(|error| in_file(error, file))?;
    let engine = sized(&request.engine, &config);
    if request.mode == Mode::DryRun {
        let keep = kept_for_backward(config.trainer.recompute);
        let source = model::open(&config.model.path, terminal)?;
        let copies = match config.algorithm.needs_reference() {
            true => Copies::WithReference,
            false => Copies::One,
        };
        let training = Footprint { copies, keep, tokens: config.trainer.max_tokens_per_microbatch };
        return dry_run(&config.to_toml(), &source, &engine, &training);
    }
    match (&args.device, &resume) {
        (DeviceArg::Cpu, _) => train(&config, &engine, &resume, terminal),
        (DeviceArg::Candle(name), Resume::From(_)) => {
            Err(Failure::usage(format!("--device {name} cannot go on from a checkpoint")))
        }
        (DeviceArg::Candle(name), _) => candle::rl(name, &config, &engine, terminal),
    }
}

/// The engine for a run: with its seed, and no more memory for keys and values than it can use.
fn sized(engine: &engine::EngineConfig, config: &RlConfig) -> engine::EngineConfig {
    let sequences = config.data.train_batch_size.saturating_mul(config.rollout.n);
    let longest = config.data.max_prompt_length.saturating_add(config.data.max_response_length);
    engine::EngineConfig {
        seed: config.trainer.seed,
        max_num_seqs: engine.max_num_seqs.min(sequences),
        useful_model_len: Some(longest),
        ..engine.clone()
    }
}

/// What the flags that all training commands share ask for.
pub(crate) fn request(
    args: &RunArgs,
    seed: u64,
    file: Option<RunConfig>,
    engine: engine::EngineConfig,
) -> Result<RunRequest> {
    let mut overrides = Vec::new();
    for set in &args.set {
        let (key, value) = set.split_once('=').ok_or_else(|| {
            Failure::usage(format!("--set {set} has no value, expected KEY=VALUE"))
        })?;
        overrides.push((key.trim().to_owned(), value.trim().to_owned()));
    }
    let mut flag = |key: &str, value: String| overrides.push((key.to_owned(), value));
    if let Some(model) = &args.model {
        flag("model.path", quoted(model));
    }
    for (key, files) in
        [("data.train_files", &args.train_files), ("data.val_files", &args.val_files)]
    {
        if !files.is_empty() {
            let names: Vec<String> =
                files.iter().map(|file| quoted(&file.to_string_lossy())).collect();
            flag(key, format!("[{}]", names.join(", ")));
        }
    }
    if let Some(output) = &args.output {
        flag("trainer.output", quoted(&output.to_string_lossy()));
    }
    if seed != 0 {
        flag("trainer.seed", seed.to_string());
    }
    let mode = if args.dry_run { Mode::DryRun } else { Mode::Run };
    Ok(RunRequest { file, overrides, engine, mode })
}

/// A string as TOML writes it.
fn quoted(text: &str) -> String {
    toml::Value::from(text).to_string()
}

/// Runs the trainer.
fn train(
    config: &RlConfig,
    engine_config: &engine::EngineConfig,
    resume: &Resume,
    terminal: &Terminal,
) -> Result<()> {
    let signals = Signals::listen()?;
    let mut open = |checkpoint: Option<&Path>| match checkpoint {
        Some(path) => Engine::load(&ModelSource::open(path)?, engine_config),
        None => Engine::load(&model::source(&config.model.path, terminal)?, engine_config),
    };
    let total = config.trainer.total_steps;
    let mut tell = |progress: Progress| self::tell(terminal, total, &progress);
    match run_rl(config, (resume, Parts::new()), &mut open, &|| signals.asked(), &mut tell)? {
        Interrupt::Done { report, checkpoint } => {
            output::print(&format!("checkpoint {}", checkpoint.display()))?;
            output::print(&format!("report {}", report.display()))
        }
        Interrupt::Resumable(checkpoint) => Err(Failure::resumable(format!(
            "interrupted, {} goes on from here with --resume auto",
            checkpoint.display()
        ))),
    }
}

/// How many sets of weights a run holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Copies {
    /// Those that are trained.
    One,
    /// And those of the reference policy.
    WithReference,
}

/// What training holds in memory besides the engine.
pub(crate) struct Footprint {
    /// Sets of weights.
    pub(crate) copies: Copies,
    /// What a pass keeps,
    pub(crate) keep: Keep,
    /// of how many tokens.
    pub(crate) tokens: usize,
}

/// Prints the resolved configuration and what the model and its training will take.
pub(crate) fn dry_run(
    config: &str,
    source: &ModelSource,
    engine: &engine::EngineConfig,
    &Footprint { copies, keep, tokens }: &Footprint,
) -> Result<()> {
    let model = source.config();
    let plan = MemoryPlan::new(model, engine)?;
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let optimizer = Optimizer::bytes(model.parameters());
    let tape = Tape::bytes(model, keep, tokens);
    let mut lines: Vec<String> = plan.to_string().lines().map(|line| format!("# {line}")).collect();
    lines.push("# memory of training".to_owned());
    lines.push(format!(
        "# optimizer    {:>10.1} MiB  f32 masters, two moments, gradients",
        mib(optimizer)
    ));
    lines.push(format!("# activations  {:>10.1} MiB  {tokens} tokens a pass", mib(tape)));
    let reference = match copies {
        Copies::One => 0,
        Copies::WithReference => plan.weights_bytes + Tape::bytes(model, Keep::OneLayer, tokens),
    };
    if reference > 0 {
        lines.push(format!(
            "# reference    {:>10.1} MiB  weights of the policy at the start, {tokens} tokens a pass",
            mib(reference)
        ));
    }
    let all = plan.total_bytes() + optimizer + tape + reference;
    lines.push(format!("# all together {:>10.1} MiB", mib(all)));
    output::print(&format!("{}\n\n# memory of the engine\n{}", config.trim_end(), lines.join("\n")))
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
        Progress::Validated(step, validation) => terminal.info(&format!(
            "step {step}: validation reward {:.3}, accuracy {:.3} on {} rows",
            validation.reward, validation.accuracy, validation.rows
        )),
        Progress::Step(metrics) => terminal.info(&metrics.progress(total_steps)),
        Progress::Saved(path) => terminal.info(&format!("saved {}", path.display())),
    }
}
