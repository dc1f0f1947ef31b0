//! What a run has left in its folder, as far as it can be read: metrics, samples, configuration.
//!
//! A run may be in progress, have crashed, or have been copied in part. Whatever cannot be used is left
//! out and said in one line of [`Run::notes`].

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::metrics::name;
use crate::samples::Sample;

/// Samples of a step that are kept to be shown, and of each of its prompts.
const SHOWN_SAMPLES: usize = 24;
const SHOWN_PER_PROMPT: usize = 4;

/// A run, as its folder shows it.
#[derive(Clone, Debug, Default)]
pub struct Run {
    /// Its name among the others.
    pub label: String,
    /// Where it was read from.
    pub folder: PathBuf,
    /// Its metrics, one map a step, by step; of a step with several lines what they say together.
    pub steps: Vec<Map<String, Value>>,
    /// `config.toml`; empty if there is none.
    pub config: String,
    /// What could not be used, one line each.
    pub notes: Vec<String>,
    /// Of the first and the last step that have any.
    pub(super) samples: Vec<StepSamples>,
}

/// The samples of a step.
#[derive(Clone, Debug, Default)]
pub(super) struct StepSamples {
    pub(super) step: u64,
    /// Some of them.
    pub(super) shown: Vec<Sample>,
    /// Of every token of every response, with the advantage of its response.
    pub(super) log_probs: Vec<f64>,
    pub(super) advantages: Vec<f64>,
}

impl Run {
    /// Reads the folder of a run.
    ///
    /// # Errors
    /// If it is no folder, or a file in it cannot be read; what the files hold is never an error.
    pub fn read(folder: &Path) -> Result<Self> {
        if !folder.is_dir() {
            return Err(Error::data(folder, None, "no such folder of a run"));
        }
        let label = folder.file_name().map_or(folder.as_os_str(), |name| name);
        let mut run = Self {
            label: label.to_string_lossy().into_owned(),
            folder: folder.to_owned(),
            config: fs::read_to_string(folder.join("config.toml")).unwrap_or_default(),
            ..Self::default()
        };
        run.read_metrics(&folder.join("metrics.jsonl"))?;
        run.read_samples(&folder.join("samples"))?;
        Ok(run)
    }

    /// A metric over the steps that have it; `None` where it was not finite.
    pub fn series(&self, metric: &str) -> Vec<(f64, Option<f64>)> {
        let point =
            |line: &Map<String, Value>| Some((step_of(line)? as f64, line.get(metric)?.as_f64()));
        self.steps.iter().filter_map(point).collect()
    }

    /// All metrics, in the order they first appear.
    pub(super) fn names(&self) -> Vec<&str> {
        let mut seen = std::collections::HashSet::new();
        let names = self.steps.iter().flat_map(Map::keys).map(String::as_str);
        names.filter(|name| seen.insert(*name)).collect()
    }

    /// The last step; 0 without any.
    pub(super) fn last_step(&self) -> u64 {
        self.steps.last().and_then(step_of).unwrap_or(0)
    }

    fn read_metrics(&mut self, path: &Path) -> Result<()> {
        if !path.exists() {
            self.notes.push("no metrics.jsonl".to_owned());
            return Ok(());
        }
        let bytes = fs::read(path).map_err(|e| Error::io(path, e))?;
        let mut steps: BTreeMap<u64, Map<String, Value>> = BTreeMap::new();
        let (mut damaged, mut repeated) = (Vec::new(), 0);
        for (index, line) in bytes.split(|byte| *byte == b'\n').enumerate() {
            if line.trim_ascii().is_empty() {
                continue;
            }
            let line: Option<Map<String, Value>> = serde_json::from_slice(line).ok();
            match line.and_then(|line| Some((step_of(&line)?, line))) {
                Some((step, line)) => {
                    let known = steps.entry(step).or_default();
                    // A validation that is made good later has a line of its own.
                    let again =
                        |name: &String| name != name::GLOBAL_STEP && known.contains_key(name);
                    repeated += usize::from(line.keys().any(again));
                    known.extend(line);
                }
                None => damaged.push(index + 1),
            }
        }
        if let Some(first) = damaged.first() {
            let count = damaged.len();
            self.notes
                .push(format!("{count} damaged lines of metrics.jsonl, the first is {first}"));
        }
        if repeated > 0 {
            self.notes.push(format!(
                "{repeated} lines are of steps that were there, the later values count"
            ));
        }
        self.note_gaps(&steps);
        self.steps = steps.into_values().collect();
        Ok(())
    }

    fn note_gaps(&mut self, steps: &BTreeMap<u64, Map<String, Value>>) {
        let Some((last, _)) = steps.last_key_value() else {
            self.notes.push("no steps yet".to_owned());
            return;
        };
        let present = steps.range(1..).count() as u64;
        if present < *last
            && let Some(first) = (1..=*last).find(|step| !steps.contains_key(step))
        {
            self.notes.push(format!("{} steps have no line, the first is {first}", last - present));
        }
        let config: Option<toml::Table> = self.config.parse().ok();
        let total = config.and_then(|c| c.get("trainer")?.get("total_steps")?.as_integer());
        if let Some(total) = total.filter(|total| u64::try_from(*total).is_ok_and(|t| t > *last)) {
            self.notes.push(format!("{last} of {total} steps are done"));
        }
    }

    fn read_samples(&mut self, folder: &Path) -> Result<()> {
        let mut files = BTreeMap::new();
        if folder.is_dir() {
            for entry in fs::read_dir(folder).map_err(|e| Error::io(folder, e))? {
                let path = entry.map_err(|e| Error::io(folder, e))?.path();
                let step = path.file_name().and_then(|name| name.to_str()).and_then(|name| {
                    name.strip_prefix("step_")?.strip_suffix(".jsonl")?.parse::<u64>().ok()
                });
                files.extend(step.map(|step| (step, path)));
            }
        }
        let ends = [files.pop_first(), files.pop_last()];
        for (step, path) in ends.into_iter().flatten() {
            let samples = self.read_step(step, &path)?;
            self.samples.extend((!samples.shown.is_empty()).then_some(samples));
        }
        Ok(())
    }

    fn read_step(&mut self, step: u64, path: &Path) -> Result<StepSamples> {
        let fail = |e| Error::io(path, e);
        let mut out = StepSamples { step, ..StepSamples::default() };
        let mut damaged = 0;
        for line in BufReader::new(File::open(path).map_err(fail)?).split(b'\n') {
            let Ok(sample) = serde_json::from_slice::<Sample>(&line.map_err(fail)?) else {
                damaged += 1;
                continue;
            };
            let log_probs = sample.log_probs.iter().map(|x| f64::from(*x));
            out.advantages.extend(log_probs.clone().map(|_| sample.advantage));
            out.log_probs.extend(log_probs);
            if out.shown.len() < SHOWN_SAMPLES && sample.sample_index < SHOWN_PER_PROMPT {
                out.shown.push(sample);
            }
        }
        if damaged > 0 {
            self.notes.push(format!("{damaged} damaged lines of samples/step_{step}.jsonl"));
        }
        Ok(out)
    }
}

/// The step of a line of metrics.
pub(super) fn step_of(line: &Map<String, Value>) -> Option<u64> {
    line.get(name::GLOBAL_STEP)?.as_u64()
}

/// Gives runs that are called the same the names of their folders, and numbers if these are the same
/// too.
pub(super) fn distinguish(runs: &mut [Run]) {
    let labels: Vec<String> = runs.iter().map(|run| run.label.clone()).collect();
    for (index, run) in runs.iter_mut().enumerate() {
        if labels.iter().filter(|label| **label == labels[index]).count() > 1 {
            run.label = run.folder.display().to_string();
        }
    }
    for index in 1..runs.len() {
        let (before, rest) = runs.split_at_mut(index);
        if before.iter().any(|run| run.label == rest[0].label) {
            rest[0].label += &format!(" ({})", index + 1);
        }
    }
}

/// What is to be said about `runs`, in lines that name the run; the last one if lengths differ.
pub(super) fn notes(runs: &[Run]) -> Vec<String> {
    let of = |run: &Run| -> Vec<String> {
        run.notes.iter().map(|note| format!("{}: {note}", run.label)).collect()
    };
    let mut notes: Vec<String> = runs.iter().flat_map(of).collect();
    let started = || runs.iter().filter(|run| !run.steps.is_empty());
    let lengths: Vec<String> =
        started().map(|run| format!("{} {}", run.label, run.last_step())).collect();
    let mut last = started().map(Run::last_step);
    let first = last.next();
    if last.any(|step| Some(step) != first) {
        notes.push(format!("runs differ in length: last steps are {}", lengths.join(", ")));
    }
    notes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestDir;

    #[test]
    fn what_cannot_be_used_is_said_in_a_line() {
        let dir = TestDir::new("report-data");
        dir.write(
            "metrics.jsonl",
            "{\"training/global_step\":1,\"x\":1}\nnot json\n{\"x\":3}\n\n\
             {\"training/global_step\":4,\"x\":null}\n{\"training/global_step\":1,\"x\":2}\n\
             {\"training/global_step\":4,\"y\":5}\n\
             {\"training/global_st",
        );
        dir.write("config.toml", "[trainer]\ntotal_steps = 9\n");
        fs::create_dir(dir.path().join("samples")).unwrap();
        dir.write("samples/step_4.jsonl", "torn");
        let run = Run::read(dir.path()).unwrap();
        assert_eq!(run.series("x"), [(1.0, Some(2.0)), (4.0, None)]);
        assert_eq!(run.series("y"), [(4.0, Some(5.0))]);
        assert_eq!(
            run.notes,
            [
                "3 damaged lines of metrics.jsonl, the first is 2",
                "1 lines are of steps that were there, the later values count",
                "2 steps have no line, the first is 2",
                "4 of 9 steps are done",
                "1 damaged lines of samples/step_4.jsonl",
            ]
        );
        let error = Run::read(&dir.path().join("none")).unwrap_err().to_string();
        assert!(error.ends_with("none: no such folder of a run"), "{error}");
        dir.write("metrics.jsonl", "");
        assert_eq!(Run::read(dir.path()).unwrap().notes[0], "no steps yet");
    }

    #[test]
    fn runs_are_told_apart_and_lengths_compared() {
        let run = |folder: &str, last: u64| Run {
            label: "run".to_owned(),
            folder: folder.into(),
            steps: vec![Map::from_iter([(name::GLOBAL_STEP.to_owned(), last.into())])],
            ..Run::default()
        };
        let mut runs = [run("a/run", 3), run("b/run", 3), run("b/run", 5)];
        distinguish(&mut runs);
        let labels: Vec<&str> = runs.iter().map(|run| run.label.as_str()).collect();
        assert_eq!(labels, ["a/run", "b/run", "b/run (3)"]);
        assert_eq!(
            notes(&runs),
            ["runs differ in length: last steps are a/run 3, b/run 3, b/run (3) 5"]
        );
        assert!(notes(&runs[..2]).is_empty());
    }
}
