//! A whole reinforcement learning run: steps, validations, checkpoints, and the files they leave.
//!
//! `DIR/`: `config.toml` (resolved), `metrics.jsonl`, `samples/step_N.jsonl`, `checkpoints/step_N/`,
//! `latest`, TensorBoard events if asked for, and `report.html` at the end; `checkpoints.old-N/` with what an
//! older run left, and `.lock`. Prints nothing: the caller hears of each event.

use std::path::{Path, PathBuf};
use std::time::Instant;

use engine::{Dtype, Engine, Service};

use crate::checkpoint::{Checkpoint, CheckpointStore};
use crate::config::{FilterMetric, RlConfig};
use crate::data::Row;
use crate::dynamics::Dynamics;
use crate::error::{Error, ErrorKind, Result};
use crate::lock::RunLock;
use crate::metrics::{Metrics, name};
use crate::parts::Parts;
use crate::report::write_report;
use crate::resume::{Earlier, Learning};
use crate::samples::write_samples;
use crate::save::{ModelFiles, save_learnt};
use crate::source::{train_rows, val_rows};
use crate::surplus;
use crate::trackers::Trackers;
use crate::trainer::Trainer;
use crate::validation::Validation;

/// Where a run begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resume {
    /// At the newest whole checkpoint of the output folder, if there is one.
    Auto,
    /// Anew. What an older run left in the output folder is moved aside before the first step, so that
    /// [`Resume::Auto`] never takes its checkpoints for this run's.
    Never,
    /// At this checkpoint. What an older run left in the output folder is moved aside or, if it is one of
    /// this folder, what is of later steps.
    From(PathBuf),
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Interrupt {
    /// All steps are done; the report is there.
    Done {
        /// `report.html`.
        report: PathBuf,
        /// The last checkpoint.
        checkpoint: PathBuf,
    },
    /// It was asked to stop; this checkpoint goes on from there.
    Resumable(PathBuf),
}

/// What a run tells while it goes on.
#[derive(Clone, Debug)]
pub enum Progress {
    /// Something worth a line.
    Note(String),
    /// A validation.
    Validated(u64, Validation),
    /// A step is done.
    Step(Metrics),
    /// A checkpoint is on disk.
    Saved(PathBuf),
    /// The run is over; it serves its guests until their service has gone.
    Lingering,
}

/// Loads an engine: see [`RunHooks::open`].
pub type Open<'a> = dyn FnMut(Option<&Path>, Option<Dtype>) -> engine::Result<Engine> + 'a;

/// What a run asks its caller for, and tells it.
pub struct RunHooks<'a> {
    /// Loads the engine: from the checkpoint given to it, or else from the configured model; in the format
    /// given to it where the caller has no choice of its own, as the run that goes on began in it.
    pub open: &'a mut Open<'a>,
    /// Whether to stop after a step.
    pub stop: &'a dyn Fn() -> bool,
    /// Hears of each event.
    pub tell: &'a mut dyn FnMut(Progress),
    /// Takes the service over the weights in training and lets others ask it; called once, before the
    /// first step. `None`: the engine is the run's alone. What is served changes nothing of what is learnt.
    pub serve: Option<&'a mut dyn FnMut(Service)>,
}

/// Runs `config` to its end, or until `stop` says so after a step, made of `parts` where there are any. `open` loads the
/// engine, as [`RunHooks::open`] says.
///
/// # Errors
/// As [`Trainer::step`], and when another run writes to the folder, or files cannot be read or written; what was
/// published stays whole. Of a step that fails before its updates, the steps before it are saved first.
pub fn run_rl(
    config: &RlConfig,
    start: (&Resume, Parts),
    open: &mut Open<'_>,
    stop: &dyn Fn() -> bool,
    tell: &mut dyn FnMut(Progress),
) -> Result<Interrupt> {
    run_rl_serving(config, start, RunHooks { open, stop, tell, serve: None })
}

/// Runs `config` like [`run_rl`] and serves others meanwhile, if the hooks ask for it.
///
/// # Errors
/// As [`run_rl`]; whoever is being served then is cut off.
pub fn run_rl_serving(
    config: &RlConfig,
    (resume, mut parts): (&Resume, Parts),
    hooks: RunHooks<'_>,
) -> Result<Interrupt> {
    let RunHooks { open, stop, tell, serve } = hooks;
    let output = PathBuf::from(&config.trainer.output);
    let lock = RunLock::take(&output)?;
    let store = CheckpointStore::open(&output, config.trainer.keep_checkpoints)?;
    config.warnings().into_iter().for_each(|warning| tell(Progress::Note(warning)));
    let from = Earlier::find(resume, &store, (Learning::Rewards, &config.model.path), tell)?;
    let checkpoint = from.as_ref().map(|from| &*from.path);
    let dtype = from.as_ref().map_or(Ok(None), Earlier::dtype)?;
    parts.rows = Some(parts.rows.map_or_else(|| train_rows(&config.data), Ok)?);
    let mut val = parts.validation.take().map_or_else(|| val_rows(&config.data), Ok)?;
    let reference = match config.algorithm.needs_reference() {
        true => Some(open(None, dtype).map_err(Error::engine)?.into_decoder()),
        false => None,
    };
    let engine = open(checkpoint, dtype).map_err(Error::engine)?;
    if let Some(from) = &from {
        from.check_dtype(engine.dtype())?;
    }
    let files = ModelFiles::new(&engine)?;
    let mut own = config.clone();
    if let (0, Some(from)) = (own.trainer.max_tokens_per_microbatch, &from) {
        own.trainer.max_tokens_per_microbatch = from.budget();
    }
    let mut trainer = Trainer::with_parts(engine, own, parts)?;
    if let Some(decoder) = reference {
        trainer.set_reference(decoder)?;
    }
    trainer.encoder.fit(&mut val, config.data.overlong())?;
    if config.trainer.test_freq > 0 || config.trainer.val_before_train {
        val.rows.iter().try_for_each(|row| trainer.rewards.check(row))?;
    }
    for (what, report) in [("training", trainer.rows.report), ("validation", val.report)] {
        tell(Progress::Note(format!("{what} data: {report}")));
    }
    let val = val.rows;
    if let Some(from) = &from {
        trainer.restore(from, tell)?;
        from.changes(&trainer.config).into_iter().for_each(|line| tell(Progress::Note(line)));
    }
    over(trainer.steps(), config.trainer.total_steps, tell);
    make_way(&store, checkpoint, tell)?;
    let path = output.join("config.toml");
    std::fs::write(&path, trainer.config.to_toml()).map_err(|e| Error::io(&path, e))?;
    let metrics = Trackers::open(&trainer.config.trainer, checkpoint.map(|_| trainer.steps()))?;
    trainer.dynamics = Dynamics::after(metrics.last(name::ENTROPY));
    let saved = checkpoint.map(|_| trainer.steps());
    let mut run = Run { trainer, store, files, metrics, val, output, saved, _lock: lock };
    let Some(serve) = serve else { return run.steps(stop, tell) };
    let (service, guests) = Service::attach(&run.trainer.engine);
    run.trainer.guests = Some(guests);
    serve(service);
    let ended = run.steps(stop, tell)?;
    tell(Progress::Lingering);
    let Trainer { engine, guests, .. } = &mut run.trainer;
    if let Some(guests) = guests {
        guests.linger(engine).map_err(Error::engine)?;
    }
    Ok(ended)
}

/// Makes way in the folder `output` for a run from the start whose steps are the caller's own, on the model at
/// `model`: what an older run left is moved aside. No other run writes to the folder while the lock lives.
///
/// # Errors
/// When another run has the folder, the model lies among what would be moved, or the folder cannot be changed.
pub fn begin_anew(output: &Path, model: &str, tell: &mut dyn FnMut(Progress)) -> Result<RunLock> {
    let lock = RunLock::take(output)?;
    let store = CheckpointStore::open(output, 0)?;
    store.check_start(model)?;
    make_way(&store, None, tell)?;
    Ok(lock)
}

/// Moves aside what does not belong to a run from `checkpoint`, or from the start, and says where it is.
pub(crate) fn make_way(
    store: &CheckpointStore,
    checkpoint: Option<&Path>,
    tell: &mut dyn FnMut(Progress),
) -> Result<()> {
    if let Some(aside) = store.restart(checkpoint)? {
        let what = match checkpoint {
            Some(_) => "what was left of other or later steps",
            None => "what an older run left",
        };
        tell(Progress::Note(format!("{what} is now in {}", aside.display())));
    }
    Ok(())
}

/// Says so where a run that begins after `step` has no step of its `total` left.
pub(crate) fn over(step: u64, total: u64, tell: &mut dyn FnMut(Progress)) {
    if step >= total {
        tell(Progress::Note(format!(
            "nothing is left to do: trainer.total_steps is {total}; make it larger, or begin anew with --resume \
             never or another --output"
        )));
    }
}

/// What to say of a step that dynamic sampling, by `metric`, found too few groups for.
fn short_step(metrics: &Metrics, metric: FilterMetric) -> Option<String> {
    let get = |name: &str| metrics.get(name);
    let short = get(name::GROUPS_SHORT).filter(|short| *short > 0.0)?;
    Some(format!(
        "step {} is {short} groups short: {} that {} were dropped from {} batches; {}make \
         algorithm.max_num_gen_batches or rollout.n larger, or train on prompts of another difficulty",
        get(name::GLOBAL_STEP)?,
        get(name::GROUPS_DROPPED)?,
        metric.flat(),
        get(name::GEN_BATCHES)?,
        metric.hint()
    ))
}

/// Whether what is done every so many steps, 0 for never, is done after `step`.
pub(crate) fn due(every: u64, step: u64) -> bool {
    every > 0 && step.is_multiple_of(every)
}

struct Run {
    trainer: Trainer,
    store: CheckpointStore,
    files: ModelFiles,
    metrics: Trackers,
    val: Vec<Row>,
    output: PathBuf,
    /// The step of the last checkpoint, which may be the one gone on from.
    saved: Option<u64>,
    _lock: RunLock,
}

impl Run {
    fn steps(
        &mut self,
        stop: &dyn Fn() -> bool,
        tell: &mut dyn FnMut(Progress),
    ) -> Result<Interrupt> {
        let settings = self.trainer.config.trainer.clone();
        let begun = self.trainer.steps();
        let owed = (begun == 0 && settings.val_before_train) || self.owes_validation();
        if owed && !self.val.is_empty() {
            let mut metrics = Metrics::new();
            metrics.set(name::GLOBAL_STEP, begun as f64);
            self.validate(&mut metrics, tell)?;
            self.metrics.write(&metrics)?;
        }
        let mut saved = None;
        while self.trainer.steps() < settings.total_steps {
            let (mut metrics, samples) =
                self.trainer.step().map_err(|error| self.rescue(error, None, tell))?;
            let metric = self.trainer.config.algorithm.filter_groups_metric;
            short_step(&metrics, metric).into_iter().for_each(|note| tell(Progress::Note(note)));
            let step = self.trainer.steps();
            self.tell_failure(&format!("step {step}"), tell);
            let last = step == settings.total_steps;
            write_samples(&self.output, step, &samples)?;
            if self.validates(step)
                && let Err(error) = self.validate(&mut metrics, tell)
            {
                return Err(self.rescue(error, Some(&mut metrics), tell));
            }
            let stopping = stop() && !last;
            saved = match due(settings.save_freq, step) || last || stopping {
                true => Some(self.save(Some(&mut metrics))?),
                false => None,
            };
            if let Some(path) = &saved {
                tell(Progress::Saved(path.clone()));
            } else {
                self.metrics.write(&metrics)?;
            }
            tell(Progress::Step(metrics));
            if let Some(path) = saved.take_if(|_| stopping) {
                return Ok(Interrupt::Resumable(path));
            }
        }
        let report = self.report()?;
        let checkpoint = match saved {
            Some(path) => path,
            // Resumed after its last step: the checkpoint is there already.
            None => self.store.find_latest()?.checkpoint.map_or(self.output.clone(), |c| c.path),
        };
        Ok(Interrupt::Done { report, checkpoint })
    }

    /// Whether a validation follows the step.
    fn validates(&self, step: u64) -> bool {
        let settings = &self.trainer.config.trainer;
        let every = settings.test_freq;
        due(every, step) || (every > 0 && step == settings.total_steps)
    }

    /// Whether the step that the run goes on from has no validation yet, as that has failed.
    fn owes_validation(&self) -> bool {
        let step = self.trainer.steps();
        self.saved == Some(step)
            && self.validates(step)
            && self.metrics.last(name::GLOBAL_STEP) == Some(step as f64)
            && self.metrics.last(name::VAL_ACCURACY).is_none()
    }

    fn report(&self) -> Result<PathBuf> {
        let config = &self.trainer.config;
        let title = format!("{} on {}", config.algorithm.method.name(), config.model.path);
        write_report(&self.output, &title)
    }

    /// Saves what has been learnt before `error` ends the run, so that it can go on from there, and writes the
    /// report. `metrics` are those of the last step if they have not been written. Returns the error.
    fn rescue(
        &mut self,
        error: Error,
        metrics: Option<&mut Metrics>,
        tell: &mut dyn FnMut(Progress),
    ) -> Error {
        if self.trainer.steps() == 0 {
            return error;
        }
        let mut told = |what: &str, done: Result<Progress>| {
            let failed = |e| Progress::Note(format!("{what} could not be written: {e}"));
            tell(done.unwrap_or_else(failed));
        };
        // Between the updates of a step the weights are those of no step, and weights that give numbers which
        // are not finite are of no use to anybody: no good checkpoint is to make room for either.
        let usable = self.trainer.whole && !matches!(error.kind(), ErrorKind::Numeric(_));
        if usable && self.saved != Some(self.trainer.steps()) {
            told("the checkpoint", self.save(metrics).map(Progress::Saved));
        }
        let report = self.report();
        told("the report", report.map(|path| Progress::Note(format!("report {}", path.display()))));
        error
    }

    fn validate(&mut self, metrics: &mut Metrics, tell: &mut dyn FnMut(Progress)) -> Result<()> {
        if self.val.is_empty() {
            return Ok(());
        }
        let begin = Instant::now();
        let validation = self.trainer.validate(&self.val)?;
        validation.record(metrics);
        metrics.set(name::TIME_TESTING, begin.elapsed().as_secs_f64());
        let step = self.trainer.steps();
        tell(Progress::Validated(step, validation));
        self.tell_failure(&format!("step {step}: validation"), tell);
        Ok(())
    }

    /// Says why rewards failed, where some have.
    fn tell_failure(&mut self, of: &str, tell: &mut dyn FnMut(Progress)) {
        if let Some(failure) = self.trainer.failure.take() {
            tell(Progress::Note(format!("{of}: {failure}")));
        }
    }

    /// Writes a checkpoint, and before it appears the step's line, if that is not written yet: whoever goes
    /// on from it finds the lines of all its steps.
    fn save(&mut self, metrics: Option<&mut Metrics>) -> Result<PathBuf> {
        let begin = Instant::now();
        let writer = self.store.begin(self.trainer.steps())?;
        save_learnt(&self.files, &writer, &self.trainer.state.optimizer)?;
        surplus::save(&writer, &self.trainer.surplus)?;
        writer.state(&self.trainer.train_state(), &self.trainer.config.to_toml())?;
        if let Some(metrics) = metrics {
            metrics.set(name::TIME_SAVE_CHECKPOINT, begin.elapsed().as_secs_f64());
            self.metrics.write(metrics)?;
        }
        let Checkpoint { path, step } = writer.publish()?;
        self.saved = Some(step);
        Ok(path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestDir;

    #[test]
    fn a_run_of_ones_own_keeps_what_an_older_one_left_and_others_out() {
        let dir = TestDir::new("anew");
        dir.write("metrics.jsonl", "{}\n");
        dir.write("config.toml", "old");
        let checkpoint = dir.path().join("checkpoints/step_3");
        std::fs::create_dir_all(&checkpoint).unwrap();
        let begin = |model: &str| begin_anew(dir.path(), model, &mut |_| {});
        let within = begin(checkpoint.to_str().unwrap()).unwrap_err();
        assert!(within.to_string().contains("lies among the checkpoints"), "{within}");
        let mut notes = Vec::new();
        let lock = begin_anew(dir.path(), "builtin:arith", &mut |progress| match progress {
            Progress::Note(note) => notes.push(note),
            other => panic!("{other:?}"),
        });
        let lock = lock.unwrap();
        assert!(notes[0].starts_with("what an older run left is now in "), "{notes:?}");
        let left = |name: &str| dir.path().join(name).exists();
        assert!(!left("metrics.jsonl") && !left("config.toml") && !left("checkpoints/step_3"));
        let old = |name: &str| dir.path().join("checkpoints.old-1").join(name);
        assert_eq!(std::fs::read_to_string(old("metrics.jsonl")).unwrap(), "{}\n");
        assert_eq!(std::fs::read_to_string(old("config.toml")).unwrap(), "old");
        assert!(old("step_3").is_dir());
        let taken = begin("builtin:arith").unwrap_err();
        assert!(matches!(taken.kind(), ErrorKind::Config(_)), "{taken}");
        drop(lock);
        let _again = begin("builtin:arith").unwrap();
    }
}
