//! `engine sft`: from flags and a file to a supervised run of the trainer.

use std::fs;
use std::path::{Path, PathBuf};

use engine::{Engine, EngineConfig, ModelConfig, ModelSource, Tokenizer};
use trainer::memory::Demand;
use trainer::{Progress, Resume, SftConfig, SftEnd, initial_weights, run_sft};

use crate::args_run::SftArgs;
use crate::exit::{Failure, Result};
use crate::layers::{Origins, RunConfig};
use crate::rl::{Mode, RunRequest, budgeted, dry_run, in_file, quoted, request, resume, tell};
use crate::signals::Signals;
use crate::terminal::Terminal;
use crate::{model, output};

/// Runs the command.
pub(crate) fn run(
    args: SftArgs,
    (file, origins): (Option<RunConfig>, &Origins),
    terminal: &Terminal,
) -> Result<()> {
    let engine = model::training_config(&args.common, &args.engine, "engine sft")?;
    let mut request = request(&args.run, args.common.seed, (file, origins), engine)?;
    if let Some(path) = &args.config_json {
        let path = quoted(&path.to_string_lossy());
        request.set(origins.of("config_json"), "model.config_json", path);
    }
    train(&request, &resume(&args.run), terminal)
}

/// Resolves the configuration and runs the trainer.
fn train(request: &RunRequest, resume: &Resume, terminal: &Terminal) -> Result<()> {
    let file = request.file.as_ref();
    let config = SftConfig::resolve(file.map(|file| file.text.as_str()), &request.overrides())
        .map_err(|error| in_file(error, file))?;
    if request.mode == Mode::DryRun {
        let start = Start::of(&config, terminal)?;
        let (mut config, engine) = (config, &request.engine);
        let demand = Demand::sft(&config, engine);
        let tokens = &mut config.trainer.max_tokens_per_microbatch;
        let demand = budgeted(tokens, start.shape(), (engine, demand))?;
        let _text = start.text()?;
        return dry_run(&config.to_toml(), start.shape(), (engine, &demand));
    }
    let signals = Signals::listen()?;
    let open = |checkpoint: Option<&Path>, dtype| {
        let source = match checkpoint {
            Some(path) => ModelSource::open(path)?,
            None => match Start::of(&config, terminal)? {
                Start::Model(source) => source,
                Start::Shape(shape, json) => fresh(&shape, &json, &config)?,
            },
        };
        let dtype = request.engine.dtype.or(dtype);
        Ok(Engine::load(&source, &EngineConfig { dtype, ..request.engine.clone() })?)
    };
    let mut tell = |progress: Progress| tell(terminal, config.trainer.total_steps, &progress);
    match run_sft::<Failure>(&config, resume, open, &|| signals.asked(), &mut tell)? {
        SftEnd::Done(checkpoint) => output::print(&format!("checkpoint {}", checkpoint.display())),
        SftEnd::Resumable(checkpoint) => Err(Failure::resumable(&checkpoint)),
    }
}

/// What a run begins with.
enum Start {
    Model(ModelSource),
    /// Random weights of this shape, which the file says.
    Shape(ModelConfig, PathBuf),
}

impl Start {
    /// What `config` says; fails if it is not there, or bad.
    fn of(config: &SftConfig, terminal: &Terminal) -> Result<Self> {
        let path = Path::new(&config.model.config_json);
        if path.as_os_str().is_empty() {
            return model::open(&config.model.path, terminal).map(Self::Model);
        }
        let text = fs::read_to_string(path).map_err(|error| Failure::unreadable(path, &error))?;
        let shape = ModelConfig::from_hf_json(&text)
            .map_err(|error| Failure::from(error).blame_data().at(path.display()))?;
        Ok(Self::Shape(shape, path.to_owned()))
    }

    fn shape(&self) -> &ModelConfig {
        match self {
            Self::Model(source) => source.config(),
            Self::Shape(shape, _) => shape,
        }
    }

    /// The tokenizer, which a real run holds, so that a plan's program is as large.
    fn text(&self) -> Result<Option<Tokenizer>> {
        match self {
            Self::Model(source) => Ok(engine::load_text(source)?.0),
            Self::Shape(_, json) => {
                let path = json.with_file_name("tokenizer.json");
                let bytes = fs::read(&path).map_err(|error| Failure::unreadable(&path, &error))?;
                let tokenizer = Tokenizer::from_json_bytes(&bytes);
                let tokenizer =
                    tokenizer.map_err(|error| Failure::from(error).at(path.display()))?;
                Ok(Some(tokenizer))
            }
        }
    }
}

/// A model of random weights in the output folder, with the tokenizer that lies beside `config_json`.
fn fresh(
    shape: &ModelConfig,
    config_json: &Path,
    config: &SftConfig,
) -> trainer::Result<ModelSource> {
    let beside = config_json.parent().unwrap_or(Path::new("."));
    let dir = PathBuf::from(&config.trainer.output).join("initial");
    initial_weights(shape, beside, config.trainer.seed, &dir)?;
    ModelSource::open(&dir).map_err(trainer::Error::engine)
}
