//! Runs the trainer for `engine rl` and `engine sft`: resolves the configuration, loads the engine,
//! shows progress, and turns signals and errors into what the command ends with.

use std::path::{Path, PathBuf};

use engine::decoder::{Keep, Tape};
use engine::model::ModelConfig;
use engine::{Engine, EngineConfig, MemoryPlan, ModelSource};
use trainer::{Interrupt, Optimizer, Progress, Resume, RlConfig, SftConfig};

use crate::exit::{Failure, Result};
use crate::model;
use crate::output;
use crate::rl::{Mode, RunRequest};
use crate::signals::Signals;
use crate::terminal::Terminal;

/// `engine rl`.
pub(crate) fn rl(
    method: Option<&str>,
    request: &RunRequest,
    resume: &Resume,
    terminal: &Terminal,
) -> Result<()> {
    let file = request.file.as_ref().map(|file| file.text.as_str());
    let config = RlConfig::resolve(method, file, &request.overrides).map_err(|e| in_file(e, request))?;
    let longest = config.data.max_prompt_length + config.data.max_response_length;
    let settings = (&request.engine, longest);
    if request.mode == Mode::DryRun {
        let budget = config.trainer.max_tokens_per_microbatch;
        return dry_run(&config.to_toml(), &config.model.path, settings, budget);
    }
    let mut open = |checkpoint: Option<&Path>| open(checkpoint, &config.model.path, settings);
    let total = config.trainer.total_steps;
    let console = config.trainer.trackers.iter().any(|tracker| tracker == "console");
    let mut tell = |progress| show(terminal, &progress, (total, console));
    let signals = Signals::listen()?;
    let stop = || signals.asked();
    match trainer::run_rl(&config, resume, &mut open, &stop, &mut tell)? {
        Interrupt::Done { report, checkpoint } => {
            terminal.info(&format!("report {}", report.display()));
            line(&checkpoint.display().to_string())
        }
        Interrupt::Resumable(checkpoint) => Err(Failure::resumable(format!(
            "stopped after a finished step; the same command goes on from {}",
            checkpoint.display()
        ))),
    }
}

/// `engine sft`, from random weights if `config_json` is given.
pub(crate) fn sft(request: &RunRequest, config_json: Option<&Path>, terminal: &Terminal) -> Result<()> {
    let file = request.file.as_ref().map(|file| file.text.as_str());
    let mut overrides = request.overrides.clone();
    if let Some(path) = config_json {
        let value = toml::Value::from(path.to_string_lossy().into_owned()).to_string();
        overrides.push(("model.config_json".to_owned(), value));
    }
    let config = SftConfig::resolve(file, &overrides).map_err(|e| in_file(e, request))?;
    let path = match config.model.config_json.as_str() {
        "" => config.model.path.clone(),
        json => initial(Path::new(json), &config, request.mode)?,
    };
    let settings = (&request.engine, config.data.max_length);
    if request.mode == Mode::DryRun {
        let budget = config.trainer.max_tokens_per_microbatch;
        return dry_run(&config.to_toml(), &path, settings, budget);
    }
    let engine = open(None, &path, settings)?;
    let total = config.trainer.total_steps;
    let mut tell = |progress| show(terminal, &progress, (total, true));
    let signals = Signals::listen()?;
    let stop = || signals.asked();
    let checkpoint = trainer::run_sft(engine, &config, &stop, &mut tell)?;
    if stop() {
        return Err(Failure::interrupted(format!(
            "stopped early; the model so far is {}",
            checkpoint.display()
        )));
    }
    line(&checkpoint.display().to_string())
}

/// Makes a model with random weights in the run's folder and returns where it is.
fn initial(json: &Path, config: &SftConfig, mode: Mode) -> Result<String> {
    let text = std::fs::read_to_string(json).map_err(|e| Failure::unreadable(json, &e))?;
    let model = ModelConfig::from_hf_json(&text).map_err(|e| Failure::from(e.in_file(json)).blame_data())?;
    let dir = PathBuf::from(&config.trainer.output).join("init");
    if mode == Mode::Run {
        let tokenizer = json.parent().unwrap_or(Path::new("."));
        trainer::initial_weights(&model, tokenizer, config.trainer.seed, &dir)?;
    }
    Ok(dir.display().to_string())
}

/// Loads the engine, with no more context than the run can use unless flags ask for more.
fn open(
    checkpoint: Option<&Path>,
    name: &str,
    (config, longest): (&EngineConfig, usize),
) -> engine::Result<Engine> {
    let source = match checkpoint {
        Some(path) => engine::ModelSource::open(path)?,
        None => model::source(name)?,
    };
    Engine::load(&source, &sized(config, longest, &source))
}

fn sized(config: &EngineConfig, longest: usize, source: &ModelSource) -> EngineConfig {
    let useful = longest.min(source.config().max_context());
    EngineConfig { max_model_len: config.max_model_len.or(Some(useful)), ..config.clone() }
}

/// Prints what would run and what it would take.
fn dry_run(
    toml: &str,
    name: &str,
    (config, longest): (&EngineConfig, usize),
    budget: usize,
) -> Result<()> {
    line(toml.trim_end())?;
    if !Path::new(name).exists() && name.ends_with("/init") {
        return Ok(());
    }
    let source = model::open(name)?;
    let plan = MemoryPlan::new(source.config(), &sized(config, longest, &source))?;
    let model = source.config();
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    let optimizer = Optimizer::bytes(model.parameters());
    let tape = Tape::bytes(model, Keep::AllLayers, budget);
    line("\n# memory")?;
    for row in plan.to_string().lines() {
        line(&format!("# {row}"))?;
    }
    line(&format!("# optimizer    {:>10.1} MiB  f32 masters, two moments, gradients", mib(optimizer)))?;
    line(&format!("# tape         {:>10.1} MiB  {budget} tokens a micro-batch", mib(tape)))?;
    let all = plan.total_bytes() + optimizer + tape;
    line(&format!("# all together {:>10.1} MiB", mib(all)))
}

/// A line of results.
fn line(text: &str) -> Result<()> {
    output::print(&format!("{text}\n"))
}

fn show(terminal: &Terminal, progress: &Progress, (total, console): (u64, bool)) {
    match progress {
        Progress::Note(note) => terminal.warn(note),
        Progress::Step(metrics) if console => terminal.info(&metrics.progress(total)),
        Progress::Step(_) => {}
        Progress::Validated(step, v) => terminal.info(&format!(
            "step {step}/{total} validation: accuracy {:.3} reward {:.3} on {} rows",
            v.accuracy, v.reward, v.rows
        )),
        Progress::Saved(path) => terminal.info(&format!("saved {}", path.display())),
    }
}

/// Names the file of `--config` where a configuration error came from it.
fn in_file(error: trainer::Error, request: &RunRequest) -> Failure {
    let failure = Failure::from(error);
    match &request.file {
        Some(file) if request.overrides.is_empty() => failure.at(file.path.display()),
        _ => failure,
    }
}
