//! `samples/step_N.jsonl`: what was sampled in a step, one response a line.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::data::Prompt;
use crate::error::{Error, Result};

/// One response.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    /// Training step.
    pub step: u64,
    /// The prompt's place in the step.
    pub prompt_index: usize,
    /// The response's place in its group.
    pub sample_index: usize,
    /// The row's data source.
    pub data_source: Option<String>,
    /// The prompt before any template.
    pub prompt: Prompt,
    /// The prompt as the model saw it.
    pub prompt_token_ids: Vec<u32>,
    /// The tokens sampled.
    pub token_ids: Vec<u32>,
    /// Their text.
    pub text: String,
    /// Where each token's part of `text` ends, in bytes of UTF-8; what lies after the last belongs to
    /// the last token. Empty in files that have none.
    #[serde(default)]
    pub text_ends: Vec<usize>,
    /// Their log-probs when sampled, in nats.
    pub log_probs: Vec<f32>,
    /// Entropy of the distribution each was drawn from, in nats. Empty in files that have none.
    #[serde(default)]
    pub entropies: Vec<f32>,
    /// Why it ended: `stop` or `length`.
    pub finish_reason: String,
    /// What a right answer is.
    pub ground_truth: String,
    /// The answer the verifier read.
    pub predicted: String,
    /// Whether it is right.
    pub correct: bool,
    /// The reward.
    pub reward: f64,
    /// The advantage.
    pub advantage: f64,
    /// The weights that sampled it.
    pub weights_version: u64,
}

/// Writes the samples of `step` into `run/samples`, whole or not at all, and returns the file.
///
/// # Errors
/// If the file cannot be written.
pub fn write_samples(run: &Path, step: u64, samples: &[Sample]) -> Result<PathBuf> {
    let dir = run.join("samples");
    std::fs::create_dir_all(&dir).map_err(|e| Error::io(&dir, e))?;
    let path = dir.join(format!("step_{step}.jsonl"));
    let temporary = dir.join(format!(".tmp-step_{step}.jsonl"));
    let write = || -> std::io::Result<()> {
        let mut file = BufWriter::new(File::create(&temporary)?);
        for sample in samples {
            serde_json::to_writer(&mut file, sample)?;
            file.write_all(b"\n")?;
        }
        file.flush()?;
        std::fs::rename(&temporary, &path)
    };
    write().map_err(|e| {
        // The file is of no use half written; that it could not be removed changes nothing.
        let _ = std::fs::remove_file(&temporary);
        Error::io(&path, e)
    })?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestDir;

    #[test]
    fn samples_are_read_back_line_by_line() {
        let dir = TestDir::new("samples");
        let sample = Sample {
            step: 4,
            prompt_index: 1,
            sample_index: 0,
            data_source: Some("arith".into()),
            prompt: Prompt::Text("1+1=".into()),
            prompt_token_ids: vec![5, 6],
            token_ids: vec![7],
            text: "2\n</script>".into(),
            text_ends: vec![11],
            log_probs: vec![-0.25],
            entropies: vec![0.5],
            finish_reason: "stop".into(),
            ground_truth: "2".into(),
            predicted: "2".into(),
            correct: true,
            reward: 1.0,
            advantage: 0.5,
            weights_version: 3,
        };
        let path = write_samples(dir.path(), 4, &[sample.clone(), sample.clone()]).unwrap();
        assert_eq!(path, dir.path().join("samples/step_4.jsonl"));
        let text = std::fs::read_to_string(path).unwrap();
        let back: Vec<Sample> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        assert_eq!(back, [sample.clone(), sample]);
        assert_eq!(std::fs::read_dir(dir.path().join("samples")).unwrap().count(), 1);
    }
}
