//! The block pool: who holds a block, and in which order free blocks are used again.
//!
//! It knows nothing of what is in a block. Invariant: a block is in the free list exactly when
//! nobody holds it, so `free + used == total` always.

use crate::list::IndexList;

/// When a block that comes free is used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Reuse {
    /// Before all others: there is nothing in it worth keeping.
    First,
    /// After all others: somebody may come back for what is in it.
    Last,
}

/// Reference counts and the free list. The front of the list is used next.
#[derive(Debug)]
pub(crate) struct BlockPool {
    holders: Vec<u32>,
    free: IndexList,
}

impl BlockPool {
    /// `total` free blocks, the lowest number to be used first.
    pub(crate) fn new(total: usize) -> Self {
        let mut free = IndexList::new(total);
        for block in 0..u32::try_from(total).expect("block numbers fit in a u32") {
            free.push_back(block);
        }
        Self { holders: vec![0; total], free }
    }

    pub(crate) fn total(&self) -> usize {
        self.holders.len()
    }

    pub(crate) fn free(&self) -> usize {
        self.free.len()
    }

    /// How many sequences hold `block`.
    pub(crate) fn holders(&self, block: u32) -> u32 {
        self.holders[block as usize]
    }

    /// Takes the free block that was left alone for the longest time. `None`: all are held.
    pub(crate) fn allocate(&mut self) -> Option<u32> {
        let block = self.free.pop_front()?;
        self.holders[block as usize] = 1;
        Some(block)
    }

    /// One more holder of `block`, which may be free.
    pub(crate) fn hold(&mut self, block: u32) {
        if self.holders(block) == 0 {
            self.free.remove(block);
        }
        self.holders[block as usize] += 1;
    }

    /// One holder less. Behind the last one the block is free.
    pub(crate) fn release(&mut self, block: u32, reuse: Reuse) {
        let holders = &mut self.holders[block as usize];
        assert!(*holders > 0, "block {block} is released but nobody holds it");
        *holders -= 1;
        if *holders == 0 {
            match reuse {
                Reuse::First => self.free.push_front(block),
                Reuse::Last => self.free.push_back(block),
            }
        }
    }

    /// The free blocks, the next to be used first.
    pub(crate) fn free_blocks(&self) -> impl Iterator<Item = u32> {
        self.free.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_come_free_with_their_last_holder_and_are_used_in_lru_order() {
        let mut pool = BlockPool::new(3);
        assert_eq!([pool.allocate(), pool.allocate()], [Some(0), Some(1)]);
        pool.hold(0);
        pool.release(0, Reuse::Last);
        assert_eq!((pool.free(), pool.holders(0)), (1, 1));
        pool.release(0, Reuse::Last);
        pool.release(1, Reuse::Last);
        assert_eq!(pool.free_blocks().collect::<Vec<_>>(), [2, 0, 1]);
        pool.hold(0);
        assert_eq!([pool.allocate(), pool.allocate(), pool.allocate()], [Some(2), Some(1), None]);
        pool.release(2, Reuse::Last);
        pool.release(1, Reuse::First);
        assert_eq!(pool.free_blocks().collect::<Vec<_>>(), [1, 2]);
        assert_eq!(pool.total(), 3);
    }

    #[test]
    #[should_panic(expected = "block 1 is released but nobody holds it")]
    fn a_block_cannot_be_freed_twice() {
        let mut pool = BlockPool::new(2);
        pool.release(1, Reuse::Last);
    }
}
