//! What a scheduler and a sequence are made from, and the limits of both.

use crate::error::{Error, ErrorKind};

/// Whether keys and values of equal prefixes are shared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PrefixCache {
    /// Full blocks are found by their content and taken instead of being computed.
    On,
    /// Nothing is taken from the cache.
    Off,
}

/// The limits of a [`Scheduler`](crate::Scheduler), fixed for its life.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Tokens in a block: a multiple of 16, at least 16.
    pub block_size: usize,
    /// Blocks in the KV memory: at least 1. `num_blocks * block_size` fits in a `u32`, because
    /// kernels name a slot by a `u32`.
    pub num_blocks: usize,
    /// The most sequences that run at once: at least 1.
    pub max_num_seqs: usize,
    /// The most tokens in a plan: at least `max_num_seqs`, so that every running sequence can
    /// decode in every step.
    pub max_num_batched_tokens: usize,
    /// The longest sequence in tokens, prompt and generated: at least 1.
    pub max_model_len: usize,
    /// `Off`: no block is ever shared, and nothing is hashed.
    pub prefix_cache: PrefixCache,
}

impl Config {
    /// Names the first value outside its limits.
    pub(crate) fn validate(&self) -> Result<(), Error> {
        if self.block_size == 0 || !self.block_size.is_multiple_of(16) {
            return Err(ErrorKind::BlockSize { value: self.block_size }.into());
        }
        at_least("num_blocks", self.num_blocks, 1)?;
        let limit = u32::MAX as usize / self.block_size;
        if self.num_blocks > limit {
            return Err(
                ErrorKind::TooLarge { name: "num_blocks", value: self.num_blocks, limit }.into()
            );
        }
        at_least("max_num_seqs", self.max_num_seqs, 1)?;
        at_least("max_num_batched_tokens", self.max_num_batched_tokens, self.max_num_seqs)?;
        at_least("max_model_len", self.max_model_len, 1)
    }
}

fn at_least(name: &'static str, value: usize, limit: usize) -> Result<(), Error> {
    if value < limit {
        return Err(ErrorKind::TooSmall { name, value, limit }.into());
    }
    Ok(())
}

/// A sequence to be scheduled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewSequence {
    /// The known tokens: at least one, at most `max_model_len`.
    pub prompt: Vec<u32>,
    /// The hard end in tokens, prompt and generated together: from the length of the prompt
    /// (nothing is sampled: scoring) to `max_model_len`.
    pub max_total_tokens: usize,
    /// Only sequences of equal salt share blocks. 0 for all who may share.
    pub salt: u64,
    /// `Off`: every token of this sequence is computed, as scoring needs it. Its blocks are still
    /// offered to others.
    pub prefix_cache: PrefixCache,
}

impl NewSequence {
    /// The most blocks this sequence can ever hold. The last generated token is never run, so it
    /// needs no room; a prompt that is scored is run to its end.
    pub(crate) fn max_blocks(&self, block_size: usize) -> usize {
        self.prompt.len().max(self.max_total_tokens - 1).div_ceil(block_size)
    }

    /// Names the first value outside the limits of `config`.
    pub(crate) fn validate(&self, config: &Config) -> Result<(), Error> {
        let (prompt, total, limit) =
            (self.prompt.len(), self.max_total_tokens, config.max_model_len);
        if prompt == 0 {
            return Err(ErrorKind::EmptyPrompt.into());
        }
        if prompt > limit {
            return Err(ErrorKind::PromptTooLong { tokens: prompt, limit }.into());
        }
        if total > limit {
            return Err(
                ErrorKind::TooLarge { name: "max_total_tokens", value: total, limit }.into()
            );
        }
        at_least("max_total_tokens", total, prompt)?;
        let blocks = self.max_blocks(config.block_size);
        if blocks > config.num_blocks {
            return Err(ErrorKind::NeverFits { blocks, limit: config.num_blocks }.into());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Config {
        Config {
            block_size: 16,
            num_blocks: 4,
            max_num_seqs: 2,
            max_num_batched_tokens: 32,
            max_model_len: 100,
            prefix_cache: PrefixCache::On,
        }
    }

    fn refused(change: impl FnOnce(&mut Config)) -> String {
        let mut config = config();
        change(&mut config);
        config.validate().expect_err("a value outside its limits").to_string()
    }

    #[test]
    fn every_bad_value_is_named_with_its_limit() {
        assert!(config().validate().is_ok());
        assert_eq!(refused(|c| c.block_size = 24), "block_size is 24, must be a multiple of 16");
        assert_eq!(refused(|c| c.block_size = 0), "block_size is 0, must be a multiple of 16");
        assert_eq!(refused(|c| c.num_blocks = 0), "num_blocks is 0, minimum is 1");
        assert_eq!(
            refused(|c| c.num_blocks = 1 << 28),
            "num_blocks is 268435456, limit is 268435455"
        );
        assert_eq!(refused(|c| c.max_num_seqs = 0), "max_num_seqs is 0, minimum is 1");
        assert_eq!(
            refused(|c| c.max_num_batched_tokens = 1),
            "max_num_batched_tokens is 1, minimum is 2"
        );
        assert_eq!(refused(|c| c.max_model_len = 0), "max_model_len is 0, minimum is 1");
    }

    fn sequence(prompt: usize, max_total_tokens: usize) -> Result<(), String> {
        let (salt, prefix_cache) = (0, PrefixCache::On);
        NewSequence { prompt: vec![0; prompt], max_total_tokens, salt, prefix_cache }
            .validate(&config())
            .map_err(|error| error.to_string())
    }

    #[test]
    fn sequences_outside_the_limits_are_named_with_them() {
        assert_eq!(sequence(0, 5), Err("prompt is empty".into()));
        assert_eq!(sequence(101, 101), Err("prompt has 101 tokens, limit is 100".into()));
        assert_eq!(sequence(9, 8), Err("max_total_tokens is 8, minimum is 9".into()));
        assert_eq!(sequence(9, 101), Err("max_total_tokens is 101, limit is 100".into()));
        assert_eq!(sequence(9, 66), Err("sequence needs 5 blocks of kv memory, limit is 4".into()));
    }

    #[test]
    fn the_last_generated_token_needs_no_room_but_a_scored_one_does() {
        assert_eq!(sequence(64, 65), Ok(()));
        assert_eq!(sequence(64, 64), Ok(()));
        assert!(sequence(65, 65).is_err());
    }
}
