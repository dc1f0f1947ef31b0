//! Groups that dynamic sampling has kept for the next step, as a file of a checkpoint: `trainer/surplus.jsonl`,
//! one group a line.
//!
//! Floats are written as their bits, so that a run which goes on is the run it would have been. Leaves out
//! prompts as text and rows: a group names its row.

use std::path::Path;

use engine::FinishReason;
use serde::{Deserialize, Serialize};

use crate::batch::{Group, Response};
use crate::checkpoint::CheckpointWriter;
use crate::error::{Error, Result};
use crate::rollout::Episode;
use crate::verifier::Verdict;

/// Where it is, within a checkpoint; there is none without such groups.
const SURPLUS: &str = "trainer/surplus.jsonl";

/// What decides what a group is, how it was judged and whether it carries signal: keys, or with a dot at the
/// end all that begin so.
const KEYS: [&str; 9] = [
    "algorithm.adv_estimator",
    "algorithm.filter_groups_metric",
    "algorithm.overlong_buffer.",
    "data.max_response_length",
    "data.prompt_template",
    "reward.error_value",
    "reward.function",
    "reward.on_error",
    "rollout.",
];

/// Whether groups that were sampled under another value of `key`, a dotted one, are none of the run's.
pub(crate) fn depends_on(key: &str) -> bool {
    KEYS.iter().any(|own| key == *own || (own.ends_with('.') && key.starts_with(own)))
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedGroup {
    row: usize,
    prompt: Vec<u32>,
    baseline_bits: u64,
    responses: Vec<SavedResponse>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SavedResponse {
    sample: usize,
    tokens: Vec<u32>,
    text: String,
    text_ends: Vec<usize>,
    /// Cut off at the longest length; otherwise it stopped by itself.
    truncated: bool,
    version: u64,
    log_prob_bits: Vec<u32>,
    entropy_bits: Vec<u32>,
    old_bits: Vec<u32>,
    score_bits: u64,
    reward_bits: u64,
    correct: bool,
    predicted: String,
}

/// Writes `groups` into a checkpoint.
///
/// # Errors
/// When the file cannot be written.
pub(crate) fn save(writer: &CheckpointWriter<'_>, groups: &[Group]) -> Result<()> {
    if groups.is_empty() {
        return Ok(());
    }
    writer.file(SURPLUS, |out| {
        for group in groups {
            serde_json::to_writer(&mut *out, &SavedGroup::from(group))?;
            out.write_all(b"\n")?;
        }
        Ok(())
    })
}

/// Reads the groups of a checkpoint of a run on `rows` rows; none if it has no such file.
///
/// # Errors
/// When the file cannot be read, or holds anything but such groups.
pub(crate) fn load(checkpoint: &Path, rows: usize) -> Result<Vec<Group>> {
    let path = checkpoint.join(SURPLUS);
    if !path.exists() {
        return Ok(Vec::new());
    }
    let text = std::fs::read_to_string(&path).map_err(|e| Error::io(&path, e))?;
    let read = |(index, line): (usize, &str)| {
        let bad =
            |what: String| Error::checkpoint(format!("{}:{}: {what}", path.display(), index + 1));
        let group: SavedGroup = serde_json::from_str(line).map_err(|e| bad(e.to_string()))?;
        match group.row < rows {
            true => group.restored().ok_or_else(|| bad("tokens and their values differ".into())),
            false => Err(bad(format!("row is {}, there are {rows}", group.row))),
        }
    };
    text.lines().enumerate().map(read).collect()
}

impl From<&Group> for SavedGroup {
    fn from(group: &Group) -> Self {
        Self {
            row: group.row,
            prompt: group.prompt.clone(),
            baseline_bits: group.baseline.to_bits(),
            responses: group.responses.iter().map(SavedResponse::from).collect(),
        }
    }
}

impl From<&Response> for SavedResponse {
    fn from(response: &Response) -> Self {
        let Response { episode, verdict, reward, old } = response;
        Self {
            sample: episode.sample,
            tokens: episode.tokens.clone(),
            text: episode.text.clone(),
            text_ends: episode.text_ends.clone(),
            truncated: response.is_truncated(),
            version: episode.version,
            log_prob_bits: bits(&episode.logprobs),
            entropy_bits: bits(&episode.entropies),
            old_bits: bits(old),
            score_bits: verdict.score.to_bits(),
            reward_bits: reward.to_bits(),
            correct: verdict.correct,
            predicted: verdict.predicted.clone(),
        }
    }
}

impl SavedGroup {
    /// `None` if there is not one value for each token.
    fn restored(self) -> Option<Group> {
        let responses: Option<Vec<Response>> =
            self.responses.into_iter().map(SavedResponse::restored).collect();
        let baseline = f64::from_bits(self.baseline_bits);
        Some(Group { row: self.row, prompt: self.prompt, responses: responses?, baseline })
    }
}

impl SavedResponse {
    fn restored(self) -> Option<Response> {
        let values = [&self.log_prob_bits, &self.entropy_bits, &self.old_bits];
        if values.iter().any(|values| values.len() != self.tokens.len()) {
            return None;
        }
        Some(Response {
            episode: Episode {
                prompt: 0,
                sample: self.sample,
                logprobs: floats(&self.log_prob_bits),
                entropies: floats(&self.entropy_bits),
                tokens: self.tokens,
                text: self.text,
                text_ends: self.text_ends,
                finish: if self.truncated { FinishReason::Length } else { FinishReason::Stop },
                version: self.version,
            },
            verdict: Verdict {
                score: f64::from_bits(self.score_bits),
                correct: self.correct,
                predicted: self.predicted,
            },
            reward: f64::from_bits(self.reward_bits),
            old: floats(&self.old_bits),
        })
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

fn floats(bits: &[u32]) -> Vec<f32> {
    bits.iter().map(|bits| f32::from_bits(*bits)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::CheckpointStore;
    use crate::testing::TestDir;

    fn group() -> Group {
        let episode = Episode {
            prompt: 0,
            sample: 1,
            tokens: vec![5, 6],
            logprobs: vec![-0.1, -1.0e-7],
            entropies: vec![0.3, 0.0],
            text: "é\n".to_owned(),
            text_ends: vec![2, 3],
            finish: FinishReason::Length,
            version: 4,
        };
        let verdict = Verdict { score: 0.1 + 0.2, correct: true, predicted: "\"7\"".to_owned() };
        let response = Response { episode, verdict, reward: -1.0 / 3.0, old: vec![-0.1, 0.7] };
        Group { row: 2, prompt: vec![1, 2, 3], responses: vec![response], baseline: 0.7 }
    }

    #[test]
    fn groups_come_back_to_the_bit_or_are_refused() {
        let dir = TestDir::new("surplus");
        let store = CheckpointStore::open(dir.path(), 2).unwrap();
        let writer = store.begin(1).unwrap();
        save(&writer, &[]).unwrap();
        assert!(load(writer.path(), 3).unwrap().is_empty());
        save(&writer, &[group(), group()]).unwrap();
        let back = load(writer.path(), 3).unwrap();
        assert_eq!(format!("{back:?}"), format!("{:?}", [group(), group()]));
        let e = load(writer.path(), 2).unwrap_err().to_string();
        assert!(e.ends_with("surplus.jsonl:1: row is 2, there are 2"), "{e}");
        let path = writer.path().join(SURPLUS);
        let cut = std::fs::read_to_string(&path).unwrap().replace("[5,6]", "[5]");
        std::fs::write(&path, cut).unwrap();
        let e = load(writer.path(), 3).unwrap_err().to_string();
        assert!(e.contains("tokens and their values differ"), "{e}");
    }
}
