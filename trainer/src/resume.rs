//! Going on from a checkpoint: which one, what has to be as it was, and what else has changed since.
//!
//! A checkpoint holds the configuration of the run that wrote it. Those of older programs do not: of them only
//! data and seeds are compared. Leaves out what is learnt from there on, which is the run's.

use std::path::{Path, PathBuf};

use engine::{Dtype, Engine};
use serde::Serialize;
use toml::{Table, Value};

use crate::checkpoint::{CONFIG, Checkpoint, CheckpointStore, STATE, TrainState, verify};
use crate::config::RlConfig;
use crate::data::Cursor;
use crate::error::{Error, Result};
use crate::optimizer::Optimizer;
use crate::run::{Progress, Resume};
use crate::save::load_optimizer;
use crate::source::Rows;
use crate::surplus;
use crate::trainer::Trainer;

/// Keys whose change is no news to whoever goes on: where a run writes, how long it is, and how often it
/// saves and validates.
const FREE: [&str; 4] =
    ["trainer.output", "trainer.total_steps", "trainer.save_freq", "trainer.test_freq"];

/// What a run learns from; a checkpoint of one kind is none for the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Learning {
    /// Rewards: `engine rl`.
    Rewards,
    /// Completions: `engine sft`.
    Completions,
}

impl Learning {
    fn command(self) -> &'static str {
        match self {
            Self::Rewards => "engine rl",
            Self::Completions => "engine sft",
        }
    }
}

/// What has to be as it was for a run to be the one that it goes on with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Identity<'a> {
    /// Digest of the training rows.
    pub(crate) data_hash: &'a str,
    /// `trainer.seed`.
    pub(crate) seed: u64,
    /// `data.seed`.
    pub(crate) data_seed: u64,
}

impl Identity<'_> {
    /// What a checkpoint says about the run after `step`, where the data set stands at `cursor`.
    pub(crate) fn state(
        &self,
        (step, cursor): (u64, Cursor),
        (engine, optimizer): (&Engine, &Optimizer),
        config_hash: String,
    ) -> TrainState {
        TrainState {
            format: 1,
            step,
            optimizer_step: optimizer.step,
            seed: self.seed,
            data_seed: self.data_seed,
            cursor,
            data_hash: self.data_hash.to_owned(),
            config_hash,
            weights_version: engine.version().0,
            kl_coef: None,
            dtype: Some(engine.dtype().name().to_owned()),
            program_version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }
}

/// A checkpoint to go on from.
pub(crate) struct Earlier {
    /// Its folder.
    pub(crate) path: PathBuf,
    state: TrainState,
    /// The configuration it was written under; checkpoints of older programs have none.
    config: Option<Table>,
}

impl Earlier {
    /// The checkpoint that a run of `model.path` `model` goes on from; `None`: it begins anew.
    ///
    /// # Errors
    /// When the checkpoint asked for is not whole, cannot be read, or is of another kind of learning or another
    /// model; where the run begins anew, when the model lies among what makes way for it.
    pub(crate) fn find(
        resume: &Resume,
        store: &CheckpointStore,
        (learning, model): (Learning, &str),
        tell: &mut dyn FnMut(Progress),
    ) -> Result<Option<Self>> {
        let found = match resume {
            Resume::Never => None,
            Resume::From(path) => {
                verify(path)?;
                Some(path.clone())
            }
            Resume::Auto => {
                let found = store.find_latest()?;
                found.skipped.into_iter().for_each(|line| tell(Progress::Note(line)));
                let going_on = |Checkpoint { path, step }| {
                    let place = path.display();
                    tell(Progress::Note(format!("going on after step {step}, from {place}")));
                    path
                };
                found.checkpoint.map(going_on)
            }
        };
        let Some(path) = found else { return store.check_start(model).map(|()| None) };
        let earlier = Self::read(path, learning)?;
        earlier.check_model(model)?;
        Ok(Some(earlier))
    }

    fn read(path: PathBuf, learning: Learning) -> Result<Self> {
        let refused = |what: &str| {
            let (place, own) = (path.display(), learning.command());
            Err(Error::config(format!(
                "{place} {what}, {own} cannot go on from it: begin anew with --resume never or another --output"
            )))
        };
        if !path.join(STATE).exists() {
            return refused(&format!("has no {STATE}"));
        }
        let state = TrainState::read(&path)?;
        let file = path.join(CONFIG);
        let config = match file.exists() {
            true => {
                let text = std::fs::read_to_string(&file).map_err(|e| Error::io(&file, e))?;
                let bad = |e: toml::de::Error| {
                    Error::checkpoint(format!("{}: {}", file.display(), e.message()))
                };
                Some(text.parse::<Table>().map_err(bad)?)
            }
            false => None,
        };
        if let Some(config) = &config {
            let then = match config.contains_key("algorithm") {
                true => Learning::Rewards,
                false => Learning::Completions,
            };
            if then != learning {
                return refused(&format!("was written by {}", then.command()));
            }
        }
        Ok(Self { path, state, config })
    }

    /// The value of a key under which the checkpoint was written.
    pub(crate) fn value(&self, section: &str, key: &str) -> Option<&Value> {
        self.config.as_ref()?.get(section)?.get(key)
    }

    /// Fails unless `now`, the `model.path` of a run, is the model that the checkpoint was trained from.
    ///
    /// # Errors
    /// `ErrorKind::Config`, naming both.
    fn check_model(&self, now: &str) -> Result<()> {
        let Some(then) = self.value("model", "path").and_then(Value::as_str) else { return Ok(()) };
        if same_place(then, now) {
            return Ok(());
        }
        Err(Error::config(format!(
            "model.path is {now}, {} was trained from {then}: go on with --model {then}, or begin anew with \
             --resume never or another --output",
            self.path.display()
        )))
    }

    /// The format that the run computes in, if the checkpoint says so.
    ///
    /// # Errors
    /// When it is one that this program does not know.
    pub(crate) fn dtype(&self) -> Result<Option<Dtype>> {
        let Some(name) = &self.state.dtype else { return Ok(None) };
        let known = [Dtype::F32, Dtype::Bf16].into_iter().find(|dtype| dtype.name() == name);
        known.map(Some).ok_or_else(|| {
            let place = self.path.join(STATE);
            Error::checkpoint(format!("{}: dtype is {name}, limit is f32, bf16", place.display()))
        })
    }

    /// Fails unless the engine computes in the format of the run that wrote the checkpoint.
    ///
    /// # Errors
    /// `ErrorKind::Config`, naming both.
    pub(crate) fn check_dtype(&self, now: Dtype) -> Result<()> {
        match &self.state.dtype {
            Some(then) if then != now.name() => Err(Error::config(format!(
                "dtype is {}, the run that wrote {} computes in {then}: go on without --dtype, or begin anew \
                 with --resume never or another --output",
                now.name(),
                self.path.display()
            ))),
            _ => Ok(()),
        }
    }

    /// The tokens of a pass when the checkpoint was written, so that gradients go on being summed as they
    /// were; 0, to be planned, where no configuration says so.
    pub(crate) fn budget(&self) -> usize {
        let tokens = |value: &Value| usize::try_from(value.as_integer()?).ok();
        let own = self.value("trainer", "max_tokens_per_microbatch").and_then(tokens);
        own.unwrap_or_else(|| self.budget_of_the_folder())
    }

    /// The same as the `config.toml` of the run's folder has it, for checkpoints of older programs.
    fn budget_of_the_folder(&self) -> usize {
        let run = self.path.parent().and_then(Path::parent);
        let text = run.and_then(|run| std::fs::read_to_string(run.join("config.toml")).ok());
        let config = text.and_then(|text| RlConfig::resolve(None, Some(&text), &[]).ok());
        config.map_or(0, |config| config.trainer.max_tokens_per_microbatch)
    }

    /// One line for each key that has another value under `config`, the sections of a run.
    pub(crate) fn changes(&self, config: &impl Serialize) -> Vec<String> {
        let (now, step) = (table(config), self.state.step);
        let line = |(key, then, now)| format!("{key} was {then} up to step {step}, is {now}");
        self.changed(&now).into_iter().map(line).collect()
    }

    /// The keys that have another value in `now`, with the values of then and now.
    fn changed<'a>(&'a self, now: &'a Table) -> Vec<(String, &'a Value, &'a Value)> {
        let mut changed = Vec::new();
        if let Some(then) = &self.config {
            compare(then, now, "", &mut changed);
        }
        changed
    }

    /// Puts optimizer and weights' version, of an engine that was loaded from the checkpoint, where they were
    /// when it was written. Returns what else it says.
    ///
    /// # Errors
    /// When it was written with other data or seeds, or does not fit the model.
    pub(crate) fn restore(
        &self,
        own: Identity<'_>,
        (engine, optimizer): (&mut Engine, &mut Optimizer),
    ) -> Result<&TrainState> {
        let state = &self.state;
        let differs = |what: &str, then: &str, now: &str| {
            Error::checkpoint(format!(
                "{what} was {then} when the checkpoint was written, is {now}"
            ))
        };
        if state.data_hash != own.data_hash {
            return Err(differs("the training data's digest", &state.data_hash, own.data_hash));
        }
        for (what, then, now) in
            [("trainer.seed", state.seed, own.seed), ("data.seed", state.data_seed, own.data_seed)]
        {
            if then != now {
                return Err(differs(what, &then.to_string(), &now.to_string()));
            }
        }
        load_optimizer(&self.path, optimizer)?;
        optimizer.step = state.optimizer_step;
        // The version goes on counting from where it was.
        while engine.version().0 < state.weights_version {
            drop(engine.begin_update().map_err(Error::engine)?);
        }
        Ok(state)
    }
}

/// The sections of a run as TOML has them.
fn table(config: &impl Serialize) -> Table {
    Table::try_from(config).expect("the sections hold only what TOML can say")
}

/// Whether two paths are equal, or of one file or folder.
pub(crate) fn same_place(a: &str, b: &str) -> bool {
    let place = |path: &str| Path::new(path).canonicalize().ok();
    a == b || place(a).is_some_and(|a| place(b) == Some(a))
}

/// Collects the dotted keys that `then` and `now` both have, with the values in which they differ; `prefix` is
/// the name of both tables, with a dot after it.
fn compare<'a>(
    then: &'a Table,
    now: &'a Table,
    prefix: &str,
    out: &mut Vec<(String, &'a Value, &'a Value)>,
) {
    for (name, now) in now {
        let key = format!("{prefix}{name}");
        match (then.get(name), now) {
            (Some(Value::Table(then)), Value::Table(now)) => {
                compare(then, now, &format!("{key}."), out);
            }
            (Some(then), now) if then != now && !FREE.contains(&&*key) => {
                out.push((key, then, now));
            }
            _ => {}
        }
    }
}

/// What makes a run with these rows and settings the same as an earlier one.
fn identity<'a>(rows: &'a Rows, config: &RlConfig) -> Identity<'a> {
    Identity { data_hash: &rows.hash, seed: config.trainer.seed, data_seed: config.data.seed }
}

impl Trainer {
    /// What a checkpoint says about the run.
    pub(crate) fn train_state(&self) -> TrainState {
        let place = (self.steps, self.sampler.cursor());
        let learnt = (&self.engine, &self.state.optimizer);
        let own = identity(&self.rows, &self.config);
        let state = own.state(place, learnt, self.config.hash());
        TrainState { kl_coef: Some(self.kl_coef), ..state }
    }

    /// Goes on where the checkpoint `earlier`, from which the engine was loaded, was written. Groups left over
    /// that are not what this run samples are dropped, which `tell` hears.
    ///
    /// # Errors
    /// When it was written with other data or seeds, or does not fit the model.
    pub(crate) fn restore(
        &mut self,
        earlier: &Earlier,
        tell: &mut dyn FnMut(Progress),
    ) -> Result<()> {
        let own = identity(&self.rows, &self.config);
        let state = earlier.restore(own, (&mut self.engine, &mut self.state.optimizer))?;
        self.steps = state.step;
        self.kl_coef = state.kl_coef.unwrap_or(self.kl_coef);
        self.surplus = surplus::load(&earlier.path, self.rows.rows.len())?;
        if let Some(why) = self.surplus_fault(earlier) {
            let groups = std::mem::take(&mut self.surplus).len();
            tell(Progress::Note(format!(
                "{groups} groups left over for the next step are dropped: {why}"
            )));
        }
        self.sampler = self.rows.sampler(&self.config.data, state.cursor)?;
        Ok(())
    }

    /// Why the groups left over in the checkpoint `earlier` are not what this run samples; `None` if they are.
    fn surplus_fault(&self, earlier: &Earlier) -> Option<String> {
        let n = self.config.rollout.n;
        let other = self.surplus.iter().map(|group| group.responses.len()).find(|len| *len != n);
        let now = table(&self.config);
        let key = earlier.changed(&now).into_iter().find(|(key, ..)| surplus::depends_on(key));
        match (key, other) {
            _ if self.surplus.is_empty() => None,
            (Some((key, then, now)), _) => Some(format!("{key} was {then}, is {now}")),
            (None, Some(other)) => Some(format!("one has {other} responses, rollout.n is {n}")),
            (None, None) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changed_keys_are_named_but_for_those_that_are_free() {
        let resolve = |sets: &[(&str, &str)]| {
            let set: Vec<_> = sets.iter().map(|(k, v)| (k.to_string(), v.to_string())).collect();
            RlConfig::resolve(None, None, &set).unwrap()
        };
        let then = resolve(&[("rollout.stop", "a"), ("algorithm.kl_ctrl.horizon", "5")]);
        let now = resolve(&[
            ("optimizer.lr", "1e-3"),
            ("rollout.stop", "a,b"),
            ("trainer.total_steps", "7"),
            ("trainer.output", "x"),
        ]);
        let mut table = Table::try_from(&then).unwrap();
        // As a program without this key would have written it.
        table["optimizer"].as_table_mut().unwrap().remove("eps");
        let (mut out, now) = (Vec::new(), Table::try_from(&now).unwrap());
        compare(&table, &now, "", &mut out);
        let lines: Vec<String> = out.iter().map(|(k, a, b)| format!("{k}: {a} -> {b}")).collect();
        assert_eq!(
            lines,
            [
                "algorithm.kl_ctrl.horizon: 5.0 -> 10000.0",
                "optimizer.lr: 0.00001 -> 0.001",
                "rollout.stop: [\"a\"] -> [\"a\", \"b\"]",
            ]
        );
    }
}
