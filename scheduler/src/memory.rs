//! The KV memory as the scheduler sees it: the one place where the pool (who holds a block) and the
//! prefix index (what is in a block) meet.
//!
//! It keeps the promises that need both:
//!
//! * a block that is taken for new content leaves the index;
//! * a block that comes free stays in the index, and is used again last, if its content is there to
//!   be found; if it was never written it leaves the index, and is used again first;
//! * a block that is taken from the index is held before anything else is allocated.

use crate::config::{Config, PrefixCache};
use crate::pool::{BlockPool, Reuse};
use crate::prefix::PrefixIndex;
use crate::sequence::{ChainEnd, Sequence};

/// Blocks, their holders and their contents.
#[derive(Debug)]
pub(crate) struct KvMemory {
    pub(crate) pool: BlockPool,
    pub(crate) index: PrefixIndex,
    block_size: usize,
}

impl KvMemory {
    pub(crate) fn new(config: &Config) -> Self {
        Self {
            pool: BlockPool::new(config.num_blocks),
            index: PrefixIndex::new(config.num_blocks, config.block_size),
            block_size: config.block_size,
        }
    }

    /// Takes a block for new content. `None`: all are held.
    pub(crate) fn allocate(&mut self) -> Option<u32> {
        let block = self.pool.allocate()?;
        self.index.forget(block);
        Some(block)
    }

    /// Gives up all blocks of `table`, the last first: a prefix is worth more than what follows it,
    /// so it is used again later.
    pub(crate) fn release(&mut self, table: &mut Vec<u32>) {
        while let Some(block) = table.pop() {
            if self.pool.holders(block) == 1 && self.index.is_pending(block) {
                self.index.forget(block);
            }
            let reuse = if self.index.contains(block) { Reuse::Last } else { Reuse::First };
            self.pool.release(block, reuse);
        }
    }

    /// Gives up the blocks of `sequence` that no known token needs. Nothing was ever entered for them.
    pub(crate) fn trim(&mut self, sequence: &mut Sequence) {
        let needed = sequence.tokens.len().div_ceil(self.block_size);
        while sequence.blocks.len() > needed {
            let block = sequence.blocks.pop().expect("the table is not empty");
            self.pool.release(block, Reuse::First);
        }
    }

    /// Gives `sequence`, which holds no blocks, all blocks for its known tokens: those of its prefix
    /// that the index knows, and new ones behind them. Free blocks must be left: `headroom` of them,
    /// and one more if the sequence may grow. If there are not enough it changes nothing and returns
    /// `None`. Returns the number of tokens that need not be computed: never all of them, because
    /// somebody wants the outcome of the last one.
    pub(crate) fn admit(&mut self, sequence: &mut Sequence, headroom: usize) -> Option<usize> {
        let chain = self.find_prefix(sequence);
        let table = sequence.tokens.len().div_ceil(self.block_size);
        let found = &sequence.blocks;
        let revived = found.iter().filter(|&&block| self.pool.holders(block) == 0).count();
        let growth = usize::from(sequence.max_blocks > table);
        if revived + (table - found.len()) + growth + headroom > self.pool.free() {
            sequence.blocks.clear();
            return None;
        }
        for &block in found {
            self.pool.hold(block);
        }
        sequence.computed = found.len() * self.block_size;
        sequence.chain = chain;
        while sequence.blocks.len() < table {
            sequence.blocks.push(self.allocate().expect("counted as free above"));
        }
        Some(sequence.computed)
    }

    /// Offers the blocks of `sequence` that are full once its first `end` tokens are computed.
    pub(crate) fn enter_full_blocks(&mut self, sequence: &mut Sequence, end: usize) {
        if sequence.chain.prefix.is_none() {
            return;
        }
        sequence.hash_full_blocks(self.block_size);
        while sequence.chain.blocks < end / self.block_size {
            let Some(prefix) = sequence.chain.prefix else { return };
            let at = sequence.chain.blocks;
            let key = sequence.key(at, prefix, self.block_size);
            let prefix = self.index.enter(sequence.blocks[at], &key);
            sequence.chain = ChainEnd { blocks: at + 1, prefix };
        }
    }

    /// Puts the longest run of known blocks from the front of `sequence` into its empty table,
    /// without holding them. Returns how far its chain reaches with them.
    fn find_prefix(&self, sequence: &mut Sequence) -> ChainEnd {
        let mut end = sequence.chain;
        if sequence.reads_cache == PrefixCache::Off {
            return end;
        }
        sequence.hash_full_blocks(self.block_size);
        while end.blocks < (sequence.tokens.len() - 1) / self.block_size {
            let Some(prefix) = end.prefix else { break };
            let key = sequence.key(end.blocks, prefix, self.block_size);
            let Some((block, prefix)) = self.index.find(&key) else { break };
            sequence.blocks.push(block);
            end = ChainEnd { blocks: end.blocks + 1, prefix: Some(prefix) };
        }
        end
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::NewSequence;
    use crate::ids::WeightsVersion;
    use crate::sequence::root;

    const ON: PrefixCache = PrefixCache::On;

    fn memory(num_blocks: usize) -> KvMemory {
        KvMemory::new(&Config {
            block_size: 16,
            num_blocks,
            max_num_seqs: 8,
            max_num_batched_tokens: 64,
            max_model_len: 256,
            prefix_cache: ON,
        })
    }

    fn sequence(prompt: usize, max_total_tokens: usize) -> Sequence {
        let prompt = (0..u32::try_from(prompt).unwrap()).collect();
        let new = NewSequence { prompt, max_total_tokens, salt: 0, prefix_cache: ON };
        Sequence::new(new, 16, root(ON, WeightsVersion(0), 0))
    }

    #[test]
    fn a_second_sequence_takes_full_blocks_but_never_the_last_token() {
        let mut memory = memory(8);
        let (mut first, mut second, mut third) =
            (sequence(32, 33), sequence(32, 33), sequence(33, 34));
        assert_eq!(memory.admit(&mut first, 0), Some(0));
        memory.enter_full_blocks(&mut first, 32);
        assert_eq!(memory.admit(&mut second, 0), Some(16));
        assert_eq!(memory.admit(&mut third, 0), Some(32));
        assert_eq!((&first.blocks, &second.blocks), (&vec![0, 1], &vec![0, 2]));
        assert_eq!(third.blocks, [0, 1, 3]);
        assert_eq!(memory.pool.free(), 4);
    }

    #[test]
    fn free_blocks_are_kept_for_growth_and_headroom() {
        let mut memory = memory(3);
        assert_eq!(memory.admit(&mut sequence(32, 50), 1), None);
        assert_eq!((memory.pool.free(), memory.index.len()), (3, 0));
        assert_eq!(memory.admit(&mut sequence(32, 33), 1), Some(0));
        let mut growing = sequence(10, 18);
        assert_eq!(memory.admit(&mut growing, 0), None);
        assert!(growing.blocks.is_empty());
    }

    #[test]
    fn a_freed_prefix_is_revived_from_the_free_list_and_its_tail_is_used_again_first() {
        let mut memory = memory(4);
        let (mut first, mut second) = (sequence(49, 50), sequence(49, 50));
        memory.admit(&mut first, 0);
        memory.enter_full_blocks(&mut first, 48);
        memory.index.confirm_pending();
        memory.release(&mut first.blocks);
        // The unfinished block first, then the full ones from the last to the first.
        assert_eq!(memory.pool.free_blocks().collect::<Vec<_>>(), [3, 2, 1, 0]);
        assert_eq!([memory.allocate(), memory.allocate()], [Some(3), Some(2)]);
        memory.release(&mut vec![3]);
        memory.release(&mut vec![2]);
        assert_eq!(memory.admit(&mut second, 0), Some(32));
        assert_eq!(second.blocks[..2], [0, 1]);
        assert_eq!(memory.pool.free(), 0);
    }

    #[test]
    fn an_unwritten_block_is_forgotten_with_its_last_holder() {
        let mut memory = memory(8);
        let (mut writer, mut reader) = (sequence(33, 34), sequence(20, 21));
        memory.admit(&mut writer, 0);
        memory.enter_full_blocks(&mut writer, 33);
        assert_eq!(memory.admit(&mut reader, 0), Some(16));
        memory.release(&mut writer.blocks);
        assert!(memory.index.is_pending(0) && !memory.index.contains(1));
        memory.release(&mut reader.blocks);
        assert_eq!((memory.index.len(), memory.pool.free()), (0, 8));
    }
}
