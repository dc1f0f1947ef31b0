//! The numbers of a step: an ordered map, one line of `metrics.jsonl`, one line of progress.
//!
//! Names are verl's where verl has one (`actor/entropy`, `critic/score/mean` ...), so that existing
//! plots work. Values that are not finite become `null` and are counted, never dropped. Nothing is
//! printed here.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use serde_json::{Map, Number, Value};

use crate::checkpoint::sync_dir;
use crate::error::{Error, Result};

/// The names of the metrics, in one place.
pub mod name {
    #![allow(missing_docs, reason = "the constants are named after what they hold")]
    pub const GLOBAL_STEP: &str = "training/global_step";
    pub const EPOCH: &str = "training/epoch";
    pub const ENTROPY: &str = "actor/entropy";
    pub const ENTROPY_PER_RESPONSE: &str = "train_entropy/all";
    pub const ENTROPY_DELTA: &str = "entropy/delta";
    pub const ENTROPY_PROBE_DELTA: &str = "entropy/probe_delta";
    pub const ENTROPY_PREDICTED_1: &str = "entropy/predicted_thm1";
    pub const ENTROPY_PREDICTED_2: &str = "entropy/predicted_thm2";
    pub const PG_LOSS: &str = "actor/pg_loss";
    pub const PG_CLIPFRAC: &str = "actor/pg_clipfrac";
    pub const PG_CLIPFRAC_LOWER: &str = "actor/pg_clipfrac_lower";
    pub const PPO_KL: &str = "actor/ppo_kl";
    pub const PPO_KL_ABS: &str = "actor/ppo_kl_abs";
    pub const GRAD_NORM: &str = "actor/grad_norm";
    pub const LR: &str = "actor/lr";
    pub const UPDATES: &str = "actor/updates";
    pub const UPDATES_SKIPPED: &str = "actor/updates_skipped";
    pub const VALID_TOKENS: &str = "actor/valid_tokens";
    pub const KL_LOSS: &str = "actor/kl_loss";
    pub const REWARD_KL: &str = "actor/reward_kl_penalty";
    pub const REWARD_KL_COEF: &str = "actor/reward_kl_penalty_coeff";
    pub const TOUCHED_TOKENS: &str = "actor/touched_tokens";
    pub const SCORE: &str = "critic/score";
    pub const SCORE_MEAN: &str = "critic/score/mean";
    pub const REWARDS: &str = "critic/rewards";
    pub const ADVANTAGES: &str = "critic/advantages";
    pub const RETURNS: &str = "critic/returns";
    pub const ACCURACY: &str = "train/accuracy";
    pub const ZERO_VARIANCE_GROUPS: &str = "train/frac_zero_variance_groups";
    pub const GEN_BATCHES: &str = "train/num_gen_batches";
    pub const GROUPS_DROPPED: &str = "train/groups_dropped";
    pub const GROUPS_SHORT: &str = "train/groups_short";
    pub const GROUPS_SURPLUS: &str = "train/groups_surplus";
    pub const MASKED_RESPONSES: &str = "train/masked_responses";
    pub const EMPTY_RESPONSES: &str = "train/empty_responses";
    pub const OVERLONG_RESPONSES: &str = "reward/overlong_responses";
    pub const RESPONSE_LENGTH: &str = "response_length";
    pub const RESPONSE_LENGTH_MEAN: &str = "response_length/mean";
    pub const RESPONSE_CLIP_RATIO: &str = "response_length/clip_ratio";
    pub const PROMPT_LENGTH: &str = "prompt_length";
    pub const COV_MEAN: &str = "cov/mean";
    pub const COV_PROB_WEIGHTED: &str = "cov/prob_weighted";
    pub const COV_SHARE_1_TO_5: &str = "cov/share_1_to_5";
    pub const COV_P99: &str = "cov/p99";
    pub const COV_MAX: &str = "cov/max";
    pub const COV_SELECTED_TOKENS: &str = "cov/selected_tokens";
    pub const MISMATCH_MAX: &str = "mismatch/max_abs_logp_diff";
    pub const MISMATCH_TOKENS: &str = "mismatch/tokens_ne";
    pub const SYNC_BYTES: &str = "sync/bytes";
    pub const SYNC_SECONDS: &str = "sync/seconds";
    pub const VERSION_MIN: &str = "rollout/weight_version_min";
    pub const VERSION_MAX: &str = "rollout/weight_version_max";
    pub const REWARD_FAILURES: &str = "reward/failures";
    pub const REWARD_TIMEOUTS: &str = "reward/timeouts";
    pub const VAL_ACCURACY: &str = "val/accuracy";
    pub const TIME_STEP: &str = "timing_s/step";
    pub const TIME_GEN: &str = "timing_s/gen";
    pub const TIME_REWARD: &str = "timing_s/reward";
    pub const TIME_OLD_LOG_PROB: &str = "timing_s/old_log_prob";
    pub const TIME_REF: &str = "timing_s/ref";
    pub const TIME_ADV: &str = "timing_s/adv";
    pub const TIME_UPDATE_ACTOR: &str = "timing_s/update_actor";
    pub const TIME_TESTING: &str = "timing_s/testing";
    pub const TIME_SAVE_CHECKPOINT: &str = "timing_s/save_checkpoint";
    pub const TOTAL_TOKENS: &str = "perf/total_num_tokens";
    pub const TIME_PER_STEP: &str = "perf/time_per_step";
    pub const THROUGHPUT: &str = "perf/throughput";
    pub const NON_FINITE: &str = "metrics/non_finite";
}

/// Integers up to this are exact in an f64 and written without a fraction.
const EXACT: f64 = 9_007_199_254_740_992.0;

/// An ordered map from name to value.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metrics {
    values: Vec<(String, f64)>,
}

impl Metrics {
    /// An empty map.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets a value; a name that is there keeps its place.
    pub fn set(&mut self, name: &str, value: f64) {
        match self.values.iter_mut().find(|(n, _)| n == name) {
            Some((_, old)) => *old = value,
            None => self.values.push((name.to_owned(), value)),
        }
    }

    /// Adds to a value, which starts at 0.
    pub fn add(&mut self, name: &str, value: f64) {
        let old = self.get(name).unwrap_or(0.0);
        self.set(name, old + value);
    }

    /// The value of a name.
    pub fn get(&self, name: &str) -> Option<f64> {
        self.values.iter().find(|(n, _)| n == name).map(|(_, v)| *v)
    }

    /// All values, in the order they were first set.
    pub fn iter(&self) -> impl Iterator<Item = (&str, f64)> {
        self.values.iter().map(|(n, v)| (n.as_str(), *v))
    }

    /// Sets `prefix/mean`, `prefix/max` and `prefix/min` of `values`; nothing if there are none.
    pub fn summarize(&mut self, prefix: &str, values: impl IntoIterator<Item = f64>) {
        let (mut n, mut sum, mut max, mut min) = (0u64, 0.0, f64::NEG_INFINITY, f64::INFINITY);
        for v in values {
            n += 1;
            sum += v;
            max = v.max(max);
            min = v.min(min);
        }
        if n > 0 {
            self.set(&format!("{prefix}/mean"), sum / n as f64);
            self.set(&format!("{prefix}/max"), max);
            self.set(&format!("{prefix}/min"), min);
        }
    }

    /// The map as one line of JSON, without the line's end. Values that are not finite are `null`,
    /// and [`name::NON_FINITE`] says how many.
    pub fn to_json(&self) -> String {
        let mut map: Map<String, Value> =
            self.values.iter().map(|(n, v)| (n.clone(), number(*v))).collect();
        let lost = self.values.iter().filter(|(_, v)| !v.is_finite()).count();
        if lost > 0 {
            map.insert(name::NON_FINITE.to_owned(), lost.into());
        }
        Value::Object(map).to_string()
    }

    /// The step as a line for people.
    pub fn progress(&self, total_steps: u64) -> String {
        let mut line = format!("step {}/{total_steps}", self.get(name::GLOBAL_STEP).unwrap_or(0.0));
        for (label, name, digits) in [
            ("reward", name::SCORE_MEAN, 3),
            ("acc", name::ACCURACY, 3),
            ("entropy", name::ENTROPY, 3),
            ("len", name::RESPONSE_LENGTH_MEAN, 1),
            ("kl", name::PPO_KL, 5),
            ("clipfrac", name::PG_CLIPFRAC, 4),
            ("cov", name::COV_MEAN, 4),
            ("selected", name::COV_SELECTED_TOKENS, 0),
            ("grad", name::GRAD_NORM, 3),
            ("mismatch", name::MISMATCH_MAX, 6),
            ("s", name::TIME_STEP, 2),
            ("tok/s", name::THROUGHPUT, 0),
        ] {
            if let Some(value) = self.get(name) {
                line += &format!("  {label} {value:.digits$}");
            }
        }
        if let Some(failures) = self.get(name::REWARD_FAILURES).filter(|n| *n > 0.0) {
            line += &format!("  failures {failures}");
        }
        for (name, value) in self.iter().filter(|(n, _)| n.starts_with("val-core/")) {
            line += &format!("  {name} {value:.3}");
        }
        line
    }
}

fn number(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < EXACT {
        return Value::from(value as i64);
    }
    Number::from_f64(value).map_or(Value::Null, Value::Number)
}

/// Appends to `metrics.jsonl`, one flushed line a step.
#[derive(Debug)]
pub struct MetricsWriter {
    path: PathBuf,
    file: File,
    /// What the lines of the last step that was kept of an older file say together.
    last: Map<String, Value>,
}

impl MetricsWriter {
    /// Starts a new file, in place of one that may be there.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn create(path: &Path) -> Result<Self> {
        let file = File::create(path).map_err(|e| Error::io(path, e))?;
        Ok(Self { path: path.to_owned(), file, last: Map::new() })
    }

    /// Continues a file after `step`: later lines, and a last line cut short by a crash, go.
    ///
    /// # Errors
    /// If the file cannot be read or replaced.
    pub fn resume(path: &Path, step: u64) -> Result<Self> {
        let fail = |e| Error::io(path, e);
        if !path.exists() {
            return Self::create(path);
        }
        let (mut kept, mut last) = (String::new(), Map::<String, Value>::new());
        for line in BufReader::new(File::open(path).map_err(fail)?).split(b'\n') {
            let line = String::from_utf8(line.map_err(fail)?).unwrap_or_default();
            let Ok(values) = serde_json::from_str::<Map<String, Value>>(&line) else { continue };
            let Some(own) = values.get(name::GLOBAL_STEP) else { continue };
            if own.as_u64().is_some_and(|own| own <= step) {
                kept += &line;
                kept.push('\n');
                if last.get(name::GLOBAL_STEP) != Some(own) {
                    last.clear();
                }
                last.extend(values);
            }
        }
        let temporary = path.with_extension("jsonl.tmp");
        let write = || {
            let mut file = File::create(&temporary)?;
            file.write_all(kept.as_bytes())?;
            // The lines are durable before they take the place of those there are.
            file.sync_all()
        };
        write().map_err(|e| Error::io(&temporary, e))?;
        std::fs::rename(&temporary, path).map_err(fail)?;
        path.parent()
            .filter(|dir| !dir.as_os_str().is_empty())
            .map_or(Ok(()), sync_dir)
            .map_err(fail)?;
        let file = OpenOptions::new().append(true).open(path).map_err(fail)?;
        Ok(Self { path: path.to_owned(), file, last })
    }

    /// A value of the last step kept by [`MetricsWriter::resume`].
    pub fn last(&self, name: &str) -> Option<f64> {
        self.last.get(name)?.as_f64()
    }

    /// Appends a line.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write(&mut self, metrics: &Metrics) -> Result<()> {
        let line = metrics.to_json() + "\n";
        let written = self.file.write_all(line.as_bytes()).and_then(|()| self.file.flush());
        written.map_err(|e| Error::io(&self.path, e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestDir;

    fn step(n: f64) -> Metrics {
        let mut m = Metrics::new();
        m.set(name::GLOBAL_STEP, n);
        m.set(name::SCORE_MEAN, n / 8.0);
        m
    }

    #[test]
    fn a_line_keeps_order_and_counts_what_is_not_finite() {
        let mut m = step(3.0);
        m.set("x/nan", f64::NAN);
        m.set(name::SCORE_MEAN, f64::INFINITY);
        m.add("x/sum", 1.5);
        m.add("x/sum", 1.0);
        assert_eq!(
            m.to_json(),
            r#"{"training/global_step":3,"critic/score/mean":null,"x/nan":null,"x/sum":2.5,"metrics/non_finite":2}"#
        );
    }

    #[test]
    fn summaries_and_the_progress_line() {
        let mut m = step(2.0);
        m.summarize(name::RESPONSE_LENGTH, [4.0, 8.0]);
        m.summarize("nothing", []);
        assert_eq!(m.get("response_length/max"), Some(8.0));
        assert_eq!(m.get("nothing/mean"), None);
        m.set(name::REWARD_FAILURES, 0.0);
        m.set("val-core/arith/acc/mean@1", 0.25);
        assert_eq!(
            m.progress(50),
            "step 2/50  reward 0.250  len 6.0  val-core/arith/acc/mean@1 0.250"
        );
        m.set(name::REWARD_FAILURES, 3.0);
        assert!(m.progress(50).contains("  len 6.0  failures 3  val-core"), "{}", m.progress(50));
    }

    #[test]
    fn a_resumed_file_holds_no_later_step_and_no_torn_line() {
        let dir = TestDir::new("metrics");
        let path = dir.path().join("metrics.jsonl");
        let mut w = MetricsWriter::create(&path).unwrap();
        (1..=3).for_each(|n| w.write(&step(f64::from(n))).unwrap());
        drop(w);
        let mut torn = std::fs::read(&path).unwrap();
        torn.extend(b"{\"training/global_");
        std::fs::write(&path, torn).unwrap();
        let mut w = MetricsWriter::resume(&path, 2).unwrap();
        assert_eq!(w.last(name::SCORE_MEAN), Some(0.25));
        w.write(&step(3.0)).unwrap();
        let mut made_good = Metrics::new();
        made_good.set(name::GLOBAL_STEP, 3.0);
        made_good.set(name::VAL_ACCURACY, 0.5);
        w.write(&made_good).unwrap();
        let w = MetricsWriter::resume(&path, 3).unwrap();
        assert_eq!(
            [name::SCORE_MEAN, name::VAL_ACCURACY].map(|n| w.last(n)),
            [Some(0.375), Some(0.5)]
        );
        let w = MetricsWriter::resume(&path, 2).unwrap();
        assert_eq!([name::SCORE_MEAN, name::VAL_ACCURACY].map(|n| w.last(n)), [Some(0.25), None]);
        drop(MetricsWriter::resume(&path, 2).unwrap().write(&step(3.0)));
        let text = std::fs::read_to_string(&path).unwrap();
        let expected: Vec<String> = (1..=3).map(|n| step(f64::from(n)).to_json()).collect();
        assert_eq!(text.lines().collect::<Vec<_>>(), expected);
    }
}
