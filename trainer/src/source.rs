//! Where rows come from: files, or tasks made on demand; and what of them a run uses.

use std::ops::Range;
use std::path::Path;

use crate::config::DataConfig;
use crate::data::{
    self, Cursor, Duplicates, Loader, Part, Report, Row, Sampler, Scripts, Selection, Visit,
};
use crate::error::{Error, Result};
use crate::tasks::{Arith, Split, countdown, sum};

/// Built-in tasks that make up an epoch of training.
const TRAIN_TASKS: u64 = 20_000;
/// Built-in tasks that make up a validation set.
const VAL_TASKS: u64 = 256;
/// The key of the built-in tasks for validation: the same set for every run.
const VAL_SEED: u64 = 0;

/// The rows of a data set, and where they come from.
pub struct Rows {
    /// The rows, in the order of the files.
    pub rows: Vec<Row>,
    /// Their digest.
    pub hash: String,
    /// What messages call them: the names of the files.
    pub(crate) name: String,
    /// What happened to the rows that were read.
    pub report: Report,
    /// Which rows are of which file, in the order of the files.
    files: Vec<Range<usize>>,
}

impl Rows {
    /// Rows of one's own, as one file.
    pub fn new(rows: Vec<Row>) -> Self {
        let report = Report { read: rows.len(), ..Report::default() };
        let (hash, all) = (data::digest(&rows), 0..rows.len());
        Self { rows, hash, name: "own rows".to_owned(), report, files: vec![all] }
    }

    /// Drops the rows for which `long` has true, in their order, as longer than allowed.
    pub(crate) fn drop_overlong(&mut self, long: &[bool]) {
        let mut from = 0;
        for file in &mut self.files {
            let kept = long[file.clone()].iter().filter(|long| !**long).count();
            *file = from..from + kept;
            from += kept;
        }
        let mut long = long.iter();
        self.rows.retain(|_| !*long.next().expect("one for each row"));
        self.report.overlong += self.report.kept() - self.rows.len();
        self.hash = data::digest(&self.rows);
    }

    /// What visits the rows as `config` says, from `cursor` on.
    ///
    /// # Errors
    /// When no row is left to visit.
    pub fn sampler(&self, config: &DataConfig, cursor: Cursor) -> Result<Sampler> {
        let visit = match config.shuffle {
            true => Visit::Shuffled(config.seed),
            false => Visit::InOrder,
        };
        let weight = |file: usize| match config.weights.len() == self.files.len() {
            true => config.weights[file],
            // One share a row: every row once.
            false => self.files[file].len() as f64,
        };
        let files = self.files.iter().cloned().enumerate();
        let parts: Vec<Part> =
            files.map(|(file, rows)| Part { rows, weight: weight(file) }).collect();
        match parts.iter().any(|part| !part.rows.is_empty() && part.weight > 0.0) {
            true if config.weights.is_empty() => Ok(Sampler::new(self.rows.len(), visit, cursor)),
            true => Ok(Sampler::mixed(&parts, visit, cursor)),
            false => Err(none_left(&self.name, &self.report)),
        }
    }
}

/// The rows to train on.
///
/// # Errors
/// When a file cannot be read or has a bad line, or no row is kept.
pub fn train_rows(config: &DataConfig) -> Result<Rows> {
    load(&config.train_files, selection(config), Generated::Train(config.seed))
}

/// The rows to validate on; none of the built-in ones is ever trained on.
///
/// # Errors
/// When a file cannot be read or has a bad line, or no row is kept.
pub fn val_rows(config: &DataConfig) -> Result<Rows> {
    load(&config.val_files, selection(config), Generated::Validation)
}

/// The rows of `files` to evaluate on; built-in tasks are those of validation.
///
/// # Errors
/// When a file cannot be read or has a bad line, or no row is kept.
pub fn eval_rows(files: &[String], selection: Selection) -> Result<Rows> {
    load(files, selection, Generated::Validation)
}

fn selection(config: &DataConfig) -> Selection {
    Selection {
        duplicates: if config.deduplicate { Duplicates::Drop } else { Duplicates::Keep },
        scripts: if config.drop_cjk_prompts { Scripts::WithoutCjk } else { Scripts::All },
    }
}

/// Which of the built-in tasks.
#[derive(Clone, Copy)]
enum Generated {
    /// Those to train on, from this seed.
    Train(u64),
    Validation,
}

fn load(files: &[String], selection: Selection, generated: Generated) -> Result<Rows> {
    let mut loader = Loader::new(selection);
    let mut parts = Vec::with_capacity(files.len());
    for file in files {
        let from = loader.kept();
        match file.starts_with("builtin:") {
            true => generate(file, generated)?.into_iter().for_each(|row| loader.row(row)),
            false => loader.file(Path::new(file))?,
        }
        parts.push(from..loader.kept());
    }
    let (rows, report) = loader.finish();
    let name = files.join(", ");
    if rows.is_empty() && !files.is_empty() {
        return Err(none_left(&name, &report));
    }
    Ok(Rows { hash: data::digest(&rows), name, rows, report, files: parts })
}

fn generate(name: &str, generated: Generated) -> Result<Vec<Row>> {
    let (seed, split, count) = match generated {
        Generated::Train(seed) => (seed, Split::Train, TRAIN_TASKS),
        Generated::Validation => (VAL_SEED, Split::Test, VAL_TASKS),
    };
    match name {
        "builtin:arith" => Ok(Arith { seed, split }.rows(count)),
        "builtin:sum" => Ok((0..count).map(|index| sum::row(seed, split, index)).collect()),
        "builtin:countdown" => {
            Ok((0..count).map(|index| countdown::row(seed, split, index)).collect())
        }
        _ => Err(Error::config(format!(
            "there are no tasks {name}, there are builtin:arith, builtin:sum, builtin:countdown"
        ))),
    }
}

pub(crate) fn none_left(name: &str, report: &Report) -> Error {
    Error::data(name, None, format!("no row is left: {report}"))
}

impl From<Vec<Row>> for Rows {
    fn from(rows: Vec<Row>) -> Self {
        Self::new(rows)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::RlConfig;
    use crate::testing::TestDir;

    fn config(settings: &[(&str, &str)]) -> DataConfig {
        let set: Vec<_> =
            settings.iter().map(|(k, v)| (format!("data.{k}"), (*v).to_owned())).collect();
        RlConfig::resolve(None, None, &set).unwrap().data
    }

    #[test]
    fn files_are_mixed_by_weight_after_rows_are_dropped() {
        let dir = TestDir::new("mixed");
        let line = |i: usize| format!("{{\"prompt\": \"{i}\", \"answer\": {i}}}\n");
        let a = dir.write("a.jsonl", (0..4).map(line).collect::<String>());
        let b = dir.write("b.jsonl", (2..8).map(line).collect::<String>());
        let files = format!("{},{}", a.display(), b.display());
        let config = config(&[
            ("train_files", &files),
            ("weights", "1, 3"),
            ("deduplicate", "true"),
            ("shuffle", "false"),
        ]);
        let mut rows = train_rows(&config).unwrap();
        assert_eq!(rows.report, Report { read: 10, duplicates: 2, ..Report::default() });
        assert_eq!(rows.files, [0..4, 4..8]);
        let before = rows.hash.clone();
        let long: Vec<bool> = (0..8).map(|i| i == 0 || i == 5).collect();
        rows.drop_overlong(&long);
        assert_eq!((&rows.files[..], rows.report.overlong), (&[0..3, 3..6][..], 2));
        assert_ne!(rows.hash, before);
        let batch = rows.sampler(&config, Cursor::default()).unwrap().next_batch(6);
        // Shares of 6: 1.5 and 4.5, the first part is rounded up.
        assert_eq!(batch, [0, 1, 3, 4, 5, 3]);
    }

    #[test]
    fn nothing_left_is_an_error_with_the_counts() {
        let dir = TestDir::new("nothing");
        let file = dir.write("zh.jsonl", "{\"prompt\": \"求和\", \"answer\": 1}\n");
        let files = file.display().to_string();
        let config = config(&[("train_files", &files), ("drop_cjk_prompts", "true")]);
        let e = train_rows(&config).err().unwrap();
        assert_eq!(
            e.to_string(),
            format!(
                "{files}: no row is left: 1 rows read, 1 with Chinese, Japanese or Korean text, 0 kept"
            )
        );
    }

    #[test]
    fn built_in_tasks_have_validation_rows_of_their_own() {
        for name in ["builtin:arith", "builtin:sum", "builtin:countdown"] {
            let config = config(&[("train_files", name), ("val_files", name)]);
            let (train, val) = (train_rows(&config).unwrap(), val_rows(&config).unwrap());
            assert_eq!((train.rows.len(), val.rows.len()), (20_000, 256), "{name}");
            let seen: std::collections::HashSet<_> = train.rows.iter().map(|r| &r.prompt).collect();
            assert!(val.rows.iter().all(|row| !seen.contains(&row.prompt)), "{name}");
        }
        let unknown = Selection { duplicates: Duplicates::Keep, scripts: Scripts::All };
        let e = eval_rows(&["builtin:chess".to_owned()], unknown).err().unwrap();
        assert!(e.to_string().contains("builtin:countdown"), "{e}");
    }
}
