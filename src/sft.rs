//! `engine sft`: from flags and a file to a supervised run of the trainer.

use std::fs;
use std::path::{Path, PathBuf};

use engine::{Engine, ModelConfig, ModelSource};
use trainer::memory::Demand;
use trainer::{Progress, SftConfig, initial_weights, run_sft};

use crate::args_run::SftArgs;
use crate::exit::{Failure, Result};
use crate::layers::RunConfig;
use crate::rl::{Mode, RunRequest, budgeted, dry_run, in_file, request, tell};
use crate::signals::Signals;
use crate::terminal::Terminal;
use crate::{model, output};

/// Runs the command.
pub(crate) fn run(args: SftArgs, file: Option<RunConfig>, terminal: &Terminal) -> Result<()> {
    let engine = model::training_config(&args.common, &args.engine, "engine sft")?;
    let mut request = request(&args.run, args.common.seed, file, engine)?;
    if let Some(path) = &args.config_json {
        let path = toml::Value::from(path.to_string_lossy().as_ref()).to_string();
        request.overrides.push(("model.config_json".to_owned(), path));
    }
    train(&request, terminal)
}

/// Resolves the configuration and runs the trainer.
fn train(request: &RunRequest, terminal: &Terminal) -> Result<()> {
    let file = request.file.as_ref();
    let config = SftConfig::resolve(file.map(|file| file.text.as_str()), &request.overrides)
        .map_err(|error| in_file(error, file))?;
    if request.mode == Mode::DryRun {
        let source = model::open(&config.model.path, terminal)?;
        let (mut config, engine) = (config, &request.engine);
        let demand = Demand::sft(&config, engine);
        let tokens = &mut config.trainer.max_tokens_per_microbatch;
        let demand = budgeted(tokens, &source, (engine, demand))?;
        return dry_run(&config.to_toml(), &source, (engine, &demand));
    }
    let signals = Signals::listen()?;
    let source = match config.model.config_json.as_str() {
        "" => model::open(&config.model.path, terminal)?,
        json => fresh(Path::new(json), &config)?,
    };
    let engine = Engine::load(&source, &request.engine)?;
    let mut tell = |progress: Progress| tell(terminal, config.trainer.total_steps, &progress);
    let checkpoint = run_sft(engine, &config, &|| signals.asked(), &mut tell)?;
    output::print(&format!("checkpoint {}", checkpoint.display()))?;
    if signals.asked() {
        return Err(Failure::interrupted("interrupted, the checkpoint holds what was learnt"));
    }
    Ok(())
}

/// A model of random weights in the output folder, with the tokenizer that lies beside `config_json`.
fn fresh(config_json: &Path, config: &SftConfig) -> Result<ModelSource> {
    let text = fs::read_to_string(config_json)
        .map_err(|error| Failure::unreadable(config_json, &error))?;
    let shape = ModelConfig::from_hf_json(&text)
        .map_err(|error| Failure::from(error).blame_data().at(config_json.display()))?;
    let beside = config_json.parent().unwrap_or(Path::new("."));
    let dir = PathBuf::from(&config.trainer.output).join("initial");
    initial_weights(&shape, beside, config.trainer.seed, &dir)?;
    Ok(ModelSource::open(&dir)?)
}
