//! The prefix index: finds the block that holds the keys and values of given tokens behind a given
//! prefix.
//!
//! Only full blocks are in it. A key is the chained hash of all tokens up to the end of the block,
//! begun with the version of the weights and the salt of the sequence:
//!
//! ```text
//! hash[-1] = mix(version, salt)      hash[i] = mix over (hash[i - 1], tokens of block i)
//! ```
//!
//! A hash may collide, and a wrong block would be a silently wrong answer. So an entry also stores
//! its own tokens and the identity of the entry of the block before it, and both are compared on a
//! hit. An identity is a block number together with a serial number that is never used twice; by
//! induction from the root, equal identity means equal tokens from position 0 on. When two different
//! prefixes collide, the first stays in the index and the second is not entered.
//!
//! An entry outlives its holders: a freed block keeps it until the block is used for something else.
//! If a block is used again while a later block of the same prefix is not, that later one can no
//! longer be found; it grows old in the free list. Sequences release their last block first, so this
//! is rare.
//!
//! Entries are *pending* from the plan that will write their block until its commit; see
//! `scheduler.rs` for why they are entered so early.

use std::collections::HashMap;

use crate::ids::{BuildMixer, WeightsVersion, mix};

/// What lies before a block: the identity of a prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Prefix {
    /// Nothing: the block is the first of its sequence.
    Root { version: WeightsVersion, salt: u64 },
    /// The tokens up to the end of `block` as it was entered under `serial`.
    Entry { block: u32, serial: u64 },
}

impl Prefix {
    /// The hash that the chain of a sequence begins with.
    pub(crate) fn root_hash(version: WeightsVersion, salt: u64) -> u64 {
        mix(mix(0, version.0), salt)
    }
}

/// The next link of the chain: the hash of a prefix that ends with `tokens`.
pub(crate) fn chain(before: u64, tokens: &[u32]) -> u64 {
    tokens.iter().fold(before, |hash, &token| mix(hash, u64::from(token)))
}

/// A full block to look for or to enter.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Key<'a> {
    /// The chained hash up to the end of the block.
    pub(crate) hash: u64,
    /// What lies before the block.
    pub(crate) prefix: Prefix,
    /// The tokens of the block: `block_size` of them.
    pub(crate) tokens: &'a [u32],
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    /// To be written by the slices of the plan in flight.
    Pending,
    /// Written.
    Ready,
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    hash: u64,
    prefix: Prefix,
    serial: u64,
    content: Content,
}

/// The index. Its memory is taken at the start: `4 * block_size + 88` bytes per block or so.
#[derive(Debug)]
pub(crate) struct PrefixIndex {
    block_size: usize,
    entries: Vec<Option<Entry>>,
    /// The tokens of entered blocks, `block_size` per block.
    tokens: Vec<u32>,
    by_hash: HashMap<u64, u32, BuildMixer>,
    pending: Vec<u32>,
    serials: u64,
}

impl PrefixIndex {
    pub(crate) fn new(num_blocks: usize, block_size: usize) -> Self {
        Self {
            block_size,
            entries: vec![None; num_blocks],
            tokens: vec![0; num_blocks * block_size],
            // Twice the entries: a map at most half full cleans up in place and never grows.
            by_hash: HashMap::with_capacity_and_hasher(2 * num_blocks, BuildMixer::default()),
            pending: Vec::with_capacity(num_blocks),
            serials: 0,
        }
    }

    /// Blocks that can be found.
    pub(crate) fn len(&self) -> usize {
        self.by_hash.len()
    }

    pub(crate) fn contains(&self, block: u32) -> bool {
        self.entries[block as usize].is_some()
    }

    /// Whether `block` is entered but not written yet.
    pub(crate) fn is_pending(&self, block: u32) -> bool {
        self.entries[block as usize].is_some_and(|entry| entry.content == Content::Pending)
    }

    /// The block that holds `key`, and its identity as a prefix. Changes nothing.
    pub(crate) fn find(&self, key: &Key<'_>) -> Option<(u32, Prefix)> {
        let block = *self.by_hash.get(&key.hash)?;
        let entry = self.entries[block as usize].expect("the map names entered blocks only");
        let same = entry.prefix == key.prefix && self.tokens_of(block) == key.tokens;
        same.then_some((block, Prefix::Entry { block, serial: entry.serial }))
    }

    /// Enters `block` as pending under `key`. Returns the identity under which the key can be found:
    /// that of an older block if there is one with the same key. `None`: the key cannot be found,
    /// because its hash collides or its prefix is gone.
    pub(crate) fn enter(&mut self, block: u32, key: &Key<'_>) -> Option<Prefix> {
        assert!(!self.contains(block), "block {block} is entered already");
        if self.by_hash.contains_key(&key.hash) {
            return self.find(key).map(|(_, prefix)| prefix);
        }
        if !self.is_alive(key.prefix) {
            return None;
        }
        self.serials += 1;
        let Key { hash, prefix, tokens } = *key;
        self.entries[block as usize] =
            Some(Entry { hash, prefix, serial: self.serials, content: Content::Pending });
        let first = block as usize * self.block_size;
        self.tokens[first..first + self.block_size].copy_from_slice(tokens);
        self.by_hash.insert(hash, block);
        self.pending.push(block);
        Some(Prefix::Entry { block, serial: self.serials })
    }

    /// Forgets `block`, if it is entered.
    pub(crate) fn forget(&mut self, block: u32) {
        if let Some(entry) = self.entries[block as usize].take() {
            self.by_hash.remove(&entry.hash);
        }
    }

    /// The plan in flight was run: what was pending is ready.
    pub(crate) fn confirm_pending(&mut self) {
        for block in self.pending.drain(..) {
            if let Some(entry) = &mut self.entries[block as usize] {
                entry.content = Content::Ready;
            }
        }
    }

    /// The plan in flight was not run: what was pending is forgotten.
    pub(crate) fn forget_pending(&mut self) {
        while let Some(block) = self.pending.pop() {
            self.forget(block);
        }
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        self.entries.fill(None);
        self.by_hash.clear();
        self.pending.clear();
    }

    /// Whether map and entries agree, for [`Scheduler::check`](crate::Scheduler::check).
    pub(crate) fn check(&self) -> Result<(), String> {
        let (mut entered, mut pending) = (0, 0);
        for (block, entry) in self.entries.iter().enumerate() {
            let Some(entry) = entry else { continue };
            entered += 1;
            pending += usize::from(entry.content == Content::Pending);
            let mapped = self.by_hash.get(&entry.hash).map(|&found| found as usize);
            if mapped != Some(block) {
                return Err(format!("block {block} is entered, but its hash finds {mapped:?}"));
            }
        }
        let listed = self.pending.iter().filter(|&&block| self.is_pending(block)).count();
        if pending != listed {
            return Err(format!("{pending} blocks are pending, {listed} of them are listed"));
        }
        if entered != self.by_hash.len() {
            return Err(format!("{entered} blocks are entered, {} hashes", self.by_hash.len()));
        }
        Ok(())
    }

    fn is_alive(&self, prefix: Prefix) -> bool {
        match prefix {
            Prefix::Root { .. } => true,
            Prefix::Entry { block, serial } => {
                self.entries[block as usize].is_some_and(|entry| entry.serial == serial)
            }
        }
    }

    fn tokens_of(&self, block: u32) -> &[u32] {
        let first = block as usize * self.block_size;
        &self.tokens[first..first + self.block_size]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOT: Prefix = Prefix::Root { version: WeightsVersion(0), salt: 0 };

    fn key(hash: u64, prefix: Prefix, tokens: &[u32]) -> Key<'_> {
        Key { hash, prefix, tokens }
    }

    #[test]
    fn finds_a_block_only_by_hash_prefix_and_tokens_together() {
        let mut index = PrefixIndex::new(4, 2);
        let first = index.enter(3, &key(10, ROOT, &[1, 2])).unwrap();
        assert_eq!(index.find(&key(10, ROOT, &[1, 2])), Some((3, first)));
        assert_eq!(index.find(&key(11, ROOT, &[1, 2])), None);
        assert_eq!(index.find(&key(10, ROOT, &[1, 3])), None);
        assert_eq!(index.find(&key(10, first, &[1, 2])), None);
        let salted = Prefix::Root { version: WeightsVersion(0), salt: 9 };
        assert_eq!(index.find(&key(10, salted, &[1, 2])), None);
    }

    #[test]
    fn a_collision_is_not_entered_and_ends_the_chain() {
        let mut index = PrefixIndex::new(4, 2);
        let first = index.enter(0, &key(10, ROOT, &[1, 2])).unwrap();
        assert_eq!(index.enter(1, &key(10, ROOT, &[2, 1])), None);
        assert!(!index.contains(1));
        assert_eq!(index.enter(1, &key(10, ROOT, &[1, 2])), Some(first));
        assert!(!index.contains(1));
        assert_eq!(index.check(), Ok(()));
    }

    #[test]
    fn what_follows_a_forgotten_block_is_not_found_behind_its_successor() {
        let mut index = PrefixIndex::new(4, 2);
        let first = index.enter(0, &key(10, ROOT, &[1, 2])).unwrap();
        index.enter(1, &key(11, first, &[3, 4])).unwrap();
        index.confirm_pending();
        index.forget(0);
        // The same place and the same hash again, but other tokens.
        let other = index.enter(0, &key(10, ROOT, &[2, 2])).unwrap();
        assert_ne!(first, other);
        assert_eq!(index.find(&key(11, other, &[3, 4])), None);
        assert_eq!(index.enter(2, &key(12, first, &[5, 6])), None);
        assert_eq!(index.check(), Ok(()));
    }

    #[test]
    fn pending_blocks_are_confirmed_or_forgotten_together() {
        let mut index = PrefixIndex::new(4, 2);
        index.enter(0, &key(10, ROOT, &[1, 2]));
        assert!(index.is_pending(0));
        index.confirm_pending();
        assert!(index.contains(0) && !index.is_pending(0));
        index.enter(1, &key(11, ROOT, &[1, 3]));
        index.forget_pending();
        assert!(index.contains(0) && !index.contains(1));
        assert_eq!((index.len(), index.check()), (1, Ok(())));
        index.clear();
        assert_eq!((index.len(), index.check()), (0, Ok(())));
    }

    #[test]
    fn the_chain_depends_on_version_salt_and_every_token() {
        let root = Prefix::root_hash(WeightsVersion(1), 2);
        assert_ne!(root, Prefix::root_hash(WeightsVersion(2), 1));
        assert_ne!(root, Prefix::root_hash(WeightsVersion(1), 3));
        assert_ne!(chain(root, &[1, 2]), chain(root, &[2, 1]));
        assert_eq!(chain(chain(root, &[1]), &[2]), chain(root, &[1, 2]));
    }
}
