//! `[validation]`: how responses are sampled when a run validates.

use serde::{Deserialize, Serialize};

use super::validate::{limit, positive};
use crate::error::Result;

/// `[validation]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ValidationConfig {
    /// Responses a prompt of a source that is sampled; one that is decoded greedily gets 1; default 1.
    pub n: usize,
    /// At least 0, or -1 (default): 0.6 for `aime*` and `amc*`, greedy for the others, as in the paper.
    pub temperature: f64,
    /// In (0, 1]; default 1.
    pub top_p: f64,
    /// At least 1, or -1 for no limit (default).
    pub top_k: i64,
}

impl Default for ValidationConfig {
    fn default() -> Self {
        Self { n: 1, temperature: -1.0, top_p: 1.0, top_k: -1 }
    }
}

impl ValidationConfig {
    pub(super) fn validate(&self) -> Result<()> {
        positive("validation.n", self.n)?;
        let most = engine::MAX_SAMPLES;
        limit(self.n <= most, "validation.n", self.n, &most.to_string())?;
        let t = self.temperature;
        let known = t == -1.0 || (0.0..=100.0).contains(&t);
        limit(known, "validation.temperature", t, "0 to 100, or -1")?;
        let p = self.top_p;
        limit(p > 0.0 && p <= 1.0, "validation.top_p", p, "above 0, up to 1")?;
        limit(
            self.top_k >= 1 || self.top_k == -1,
            "validation.top_k",
            self.top_k,
            "1 or more, or -1",
        )
    }
}
