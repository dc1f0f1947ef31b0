//! Judges the responses of a rollout while others are still being generated.
//!
//! Built-in rules and a caller's own function judge at once; requests to a program or a server are sent as
//! responses end and awaited at the end of the rollout, when a function of whole batches is asked too. What a failure does is stated in the configuration, and every
//! failure is counted.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::time::Duration;

use engine::Host;
use serde_json::json;

use super::external::{Answer, Endpoint, Failure, Limits, Pool};
use super::own::{Answered, OwnReward};
use super::{FAILED, Verdict, Verifier};
use crate::config::{OnError, RewardConfig};
use crate::data::Row;
use crate::error::{Error, Result};
use crate::metrics::{Metrics, name};

/// How long guests are served before it is looked again whether rewards have come.
const MOMENT: Duration = Duration::from_millis(5);

/// Gets the next answer of those that are on their way.
type NextAnswer<'a> = dyn FnMut(&Receiver<(usize, Answer)>) -> Result<(usize, Answer)> + 'a;

/// How a run gets its rewards: one rule for all rows, by data source, or from outside.
#[derive(Clone, Debug)]
pub struct RewardRule(Source);

#[derive(Clone, Debug)]
enum Source {
    Row,
    Fixed(Verifier),
    External(Endpoint),
}

/// Rewards that could not be had.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Responses without a valid answer.
    pub failures: u64,
    /// Those among them whose answer took too long.
    pub timeouts: u64,
}

/// Judges responses as a configuration says.
#[derive(Debug)]
pub struct Judge {
    rule: RewardRule,
    pool: Option<Pool>,
    /// In place of the rule.
    own: Option<OwnReward>,
    /// What a failure scores; `None`: it ends the run.
    on_error: Option<f64>,
    function: String,
    requests: AtomicU64,
    failures: AtomicU64,
    timeouts: AtomicU64,
}

/// The judgement of one rollout, under way.
#[derive(Debug)]
pub struct Session<'a> {
    judge: &'a Judge,
    verdicts: Vec<Option<Verdict>>,
    reply: Sender<(usize, Answer)>,
    answers: Receiver<(usize, Answer)>,
    pending: usize,
    /// What waits for an own function of batches.
    waiting: Vec<(usize, Answered)>,
    error: Option<Error>,
}

impl Counts {
    /// Adds to the metrics of a step.
    pub fn record(self, metrics: &mut Metrics) {
        metrics.add(name::REWARD_FAILURES, self.failures as f64);
        metrics.add(name::REWARD_TIMEOUTS, self.timeouts as f64);
    }
}

impl RewardRule {
    /// The rule that `reward.function` names; `auto` means by data source.
    ///
    /// # Errors
    /// If there is none of that name.
    pub fn named(function: &str) -> Result<Self> {
        Ok(Self(match (function, Endpoint::parse(function)?) {
            (_, Some(endpoint)) => Source::External(endpoint),
            ("auto", None) => Source::Row,
            (name, None) => Source::Fixed(Verifier::named(name)?),
        }))
    }

    /// The built-in rule for a row of `data_source`; `None` if rewards come from outside.
    ///
    /// # Errors
    /// If the source has no rule, or the row names no source and one is needed.
    fn verifier(&self, data_source: Option<&str>) -> Result<Option<Verifier>> {
        match (&self.0, data_source) {
            (Source::External(_), _) => Ok(None),
            (Source::Fixed(verifier), _) => Ok(Some(verifier.clone())),
            (Source::Row, Some(source)) => Verifier::for_source(source).map(Some),
            (Source::Row, None) => Err(Error::config(format!(
                "rows without data_source need reward.function, one of: {}",
                super::AVAILABLE
            ))),
        }
    }
}

impl Judge {
    /// A judge as `config` says. Programs are started when they are first needed.
    ///
    /// # Errors
    /// If the reward function is unknown.
    pub fn new(config: &RewardConfig) -> Result<Self> {
        let rule = RewardRule::named(&config.function)?;
        let seconds = |key: &str, value: f64| {
            let bad = |error| Error::config(format!("reward.{key}: {error}"));
            Duration::try_from_secs_f64(value).map_err(bad)
        };
        let limits = Limits {
            answer: seconds("timeout_s", config.timeout_s)?,
            start: seconds("start_timeout_s", config.start_timeout_s)?,
        };
        let pool = match &rule.0 {
            Source::External(endpoint) => Some(Pool::new(endpoint, config.workers, limits)),
            _ => None,
        };
        let on_error = match config.on_error {
            OnError::Zero => Some(0.0),
            OnError::Value => Some(config.error_value),
            OnError::Fail => None,
        };
        Ok(Self {
            rule,
            pool,
            own: None,
            on_error,
            function: config.function.clone(),
            requests: AtomicU64::new(0),
            failures: AtomicU64::new(0),
            timeouts: AtomicU64::new(0),
        })
    }

    /// A judge by a function of one's own; of `config` it takes what a failure does.
    ///
    /// # Errors
    /// As [`Self::new`].
    ///
    /// ```
    /// use trainer::{RlConfig, data::{Prompt, Row}, verifier::{Judge, OwnReward}};
    /// let config = RlConfig::resolve(None, None, &[])?.reward;
    /// let judge = Judge::own(&config, OwnReward::each(|_, response| response.len() as f64))?;
    /// let row = Row {
    ///     data_source: None,
    ///     prompt: Prompt::Text("say much".to_owned()),
    ///     ground_truth: String::new(),
    ///     extra: serde_json::Value::Null,
    /// };
    /// let mut session = judge.session(1);
    /// session.submit(0, &row, "well");
    /// assert_eq!(session.finish()?[0].score, 4.0);
    /// # Ok::<(), trainer::Error>(())
    /// ```
    pub fn own(config: &RewardConfig, reward: OwnReward) -> Result<Self> {
        // The configured rule is not asked, so no program is started for it.
        let config = RewardConfig { function: "auto".to_owned(), ..config.clone() };
        let function = "the reward function".to_owned();
        Ok(Self { own: Some(reward), function, ..Self::new(&config)? })
    }

    /// Checks that a row can be judged.
    ///
    /// # Errors
    /// If its data source has no rule, or its ground truth is none for the rule.
    pub fn check(&self, row: &Row) -> Result<()> {
        if self.own.is_some() {
            return Ok(());
        }
        match self.rule.verifier(row.data_source.as_deref())? {
            Some(verifier) => verifier.check(&row.ground_truth),
            None => Ok(()),
        }
    }

    /// Begins to judge `responses` responses.
    ///
    /// ```
    /// use trainer::{RlConfig, data::{Prompt, Row}, verifier::Judge};
    /// let judge = Judge::new(&RlConfig::resolve(None, None, &[])?.reward)?;
    /// let row = Row {
    ///     data_source: Some("openai/gsm8k".to_owned()),
    ///     prompt: Prompt::Text("1+1?".to_owned()),
    ///     ground_truth: "2".to_owned(),
    ///     extra: serde_json::Value::Null,
    /// };
    /// let mut session = judge.session(2);
    /// session.submit(0, &row, "#### 2");
    /// session.submit(1, &row, "#### 3");
    /// let scores: Vec<f64> = session.finish()?.iter().map(|verdict| verdict.score).collect();
    /// assert_eq!(scores, [1.0, 0.0]);
    /// # Ok::<(), trainer::Error>(())
    /// ```
    pub fn session(&self, responses: usize) -> Session<'_> {
        let (reply, answers) = channel();
        let verdicts = vec![None; responses];
        let waiting = Vec::new();
        Session { judge: self, verdicts, reply, answers, pending: 0, waiting, error: None }
    }

    /// The failures since the last call.
    pub fn take_counts(&self) -> Counts {
        let take = |count: &AtomicU64| count.swap(0, Ordering::Relaxed);
        Counts { failures: take(&self.failures), timeouts: take(&self.timeouts) }
    }

    /// Why the first of `verdicts`, those of a rollout, that failed did so; `None` if none has.
    ///
    /// # Errors
    /// `ErrorKind::Reward` if a program or a server gave none of several: it is out of order, whatever a single
    /// failure does.
    pub(crate) fn first_failure<'v>(
        &self,
        verdicts: impl Iterator<Item = &'v Verdict> + Clone,
    ) -> Result<Option<String>> {
        let function = &self.function;
        let Some(reason) = verdicts.clone().find_map(Verdict::failure) else { return Ok(None) };
        let all = verdicts.clone().count();
        let failed = verdicts.filter(|verdict| verdict.failure().is_some()).count();
        match self.pool.is_some() && failed == all && all > 1 {
            true => Err(Error::reward(format!(
                "{function}: all {all} rewards of a rollout failed; the first: {reason}"
            ))),
            false => Ok(Some(format!(
                "{function}: {failed} of {all} rewards failed; the first: {reason}"
            ))),
        }
    }

    /// The verdict on a response whose reward failed.
    fn failed(&self, failure: Failure) -> Result<Verdict> {
        self.failures.fetch_add(1, Ordering::Relaxed);
        let reason = match failure {
            Failure::Broken(reason) => reason,
            Failure::Timeout(reason) => {
                self.timeouts.fetch_add(1, Ordering::Relaxed);
                reason
            }
        };
        let score = self.on_error;
        let score = score.ok_or_else(|| Error::reward(format!("{}: {reason}", self.function)))?;
        Ok(Verdict { score, correct: false, predicted: format!("{FAILED}{reason}") })
    }
}

impl Session<'_> {
    /// Judges the response at `place`, at once or later. Errors are kept for [`Self::finish`].
    ///
    /// # Panics
    /// If there is no such place.
    pub fn submit(&mut self, place: usize, row: &Row, response: &str) {
        if let Some(own) = &self.judge.own {
            match own.now(row, response) {
                Some(answer) => self.settle(place, answer),
                None => {
                    let response = response.to_owned();
                    self.waiting.push((place, Answered { row: row.clone(), response }));
                }
            }
            return;
        }
        let rule = self.judge.rule.verifier(row.data_source.as_deref());
        let checked = rule.and_then(|rule| match rule {
            Some(rule) => rule.check(&row.ground_truth).map(|()| Some(rule)),
            None => Ok(None),
        });
        match (checked, &self.judge.pool) {
            (Ok(Some(rule)), _) => {
                self.verdicts[place] = Some(rule.judge(response, &row.ground_truth));
            }
            (Ok(None), Some(pool)) => {
                let id = self.judge.requests.fetch_add(1, Ordering::Relaxed);
                let request = json!({
                    "id": id,
                    "data_source": row.data_source,
                    "prompt": row.prompt,
                    "response": response,
                    "ground_truth": row.ground_truth,
                    "extra_info": row.extra,
                });
                pool.submit((id, place), request.to_string(), &self.reply);
                self.pending += 1;
            }
            (Ok(None), None) => unreachable!("a judge of rewards from outside has a pool"),
            (Err(error), _) => self.error = self.error.take().or(Some(error)),
        }
    }

    /// Takes an answer; one that ends the run is kept as its error.
    fn settle(&mut self, place: usize, answer: Answer) {
        match answer.or_else(|failure| self.judge.failed(failure)) {
            Ok(verdict) => self.verdicts[place] = Some(verdict),
            Err(error) => self.error = self.error.take().or(Some(error)),
        }
    }

    /// Asks an own function about the responses that wait for it, in the order of their places.
    fn ask_own(&mut self) {
        let Some(own) = self.judge.own.as_ref().filter(|_| !self.waiting.is_empty()) else {
            return;
        };
        self.waiting.sort_by_key(|(place, _)| *place);
        let (places, all): (Vec<usize>, Vec<Answered>) =
            std::mem::take(&mut self.waiting).into_iter().unzip();
        for (place, answer) in places.into_iter().zip(own.later(&all)) {
            self.settle(place, answer);
        }
    }

    /// The verdicts by place, once all are there.
    ///
    /// # Errors
    /// `ErrorKind::Reward` if one failed and failures end the run, or a place was not submitted; else
    /// what [`Judge::check`] says of a row.
    pub fn finish(self) -> Result<Vec<Verdict>> {
        let ended = |_| Error::reward("a worker for rewards has ended");
        self.collect(&mut |answers| answers.recv().map_err(ended))
    }

    /// Like [`finish`](Self::finish); an engine with guests serves them meanwhile.
    ///
    /// # Errors
    /// Those of [`finish`](Self::finish), and when the engine fails.
    pub fn finish_beside(self, host: &mut Host<'_>) -> Result<Vec<Verdict>> {
        if !host.has_guests() {
            return self.finish();
        }
        self.collect(&mut |answers| {
            loop {
                match answers.try_recv() {
                    Ok(answer) => return Ok(answer),
                    Err(TryRecvError::Empty) => host.serve_for(MOMENT).map_err(Error::engine)?,
                    Err(TryRecvError::Disconnected) => {
                        return Err(Error::reward("a worker for rewards has ended"));
                    }
                }
            }
        })
    }

    fn collect(mut self, next: &mut NextAnswer<'_>) -> Result<Vec<Verdict>> {
        self.ask_own();
        if let Some(error) = self.error {
            return Err(error);
        }
        // Without a sender of its own, the session ends even if a worker does not answer.
        drop(self.reply);
        for _ in 0..self.pending {
            let (place, answer) = next(&self.answers)?;
            self.verdicts[place] = Some(answer.or_else(|failure| self.judge.failed(failure))?);
        }
        let all: Option<Vec<Verdict>> = self.verdicts.into_iter().collect();
        all.ok_or_else(|| Error::reward("a response was not judged"))
    }
}

#[cfg(test)]
mod tests;
