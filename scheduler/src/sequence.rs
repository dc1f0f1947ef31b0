//! A sequence, and the table of all sequences.
//!
//! The table keeps sequences in slots that are used again, so that the queues can be lists over
//! small integers; an id leads to its slot through one map look-up.

use std::collections::HashMap;
use std::ops::{Index, IndexMut};

use crate::config::{NewSequence, PrefixCache};
use crate::ids::{BuildMixer, SeqId, WeightsVersion};
use crate::prefix::{Key, Prefix, chain};

/// Where a sequence is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// In the waiting queue, without blocks.
    Waiting,
    /// In the running list, with blocks.
    Running,
    /// All that was asked for is done: in no list and without blocks, but its tokens can be read.
    Ended,
}

/// How a sequence came into the plan in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// It was running before.
    Continued,
    /// This plan admitted it.
    Admitted,
}

/// The part of a sequence in the plan in flight, with what a rollback needs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Planned {
    pub(crate) len: usize,
    /// Guesses that run behind them; the sequence's tokens end with these until the plan is closed.
    pub(crate) guesses: usize,
    pub(crate) origin: Origin,
    /// How many guesses the tokens given for this slice confirm, while a commit is being verified...
    pub(crate) confirmed: usize,
    /// ... and the token given after those.
    pub(crate) token: Option<u32>,
    pub(crate) chain_before: ChainEnd,
}

/// How far the blocks of a sequence were offered to the prefix index.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ChainEnd {
    /// Leading blocks of the table that were offered, or taken from the index.
    pub(crate) blocks: usize,
    /// Under what identity those blocks can be found together. `None`: they cannot.
    pub(crate) prefix: Option<Prefix>,
}

#[derive(Debug)]
pub(crate) struct Sequence {
    pub(crate) id: SeqId,
    pub(crate) state: State,
    /// Prompt and generated tokens, and guesses of the plan in flight.
    pub(crate) tokens: Vec<u32>,
    pub(crate) prompt_len: usize,
    pub(crate) max_total_tokens: usize,
    pub(crate) max_blocks: usize,
    pub(crate) reads_cache: PrefixCache,
    /// The block table.
    pub(crate) blocks: Vec<u32>,
    /// Leading tokens whose keys and values are in the blocks, or will be once the plan in flight
    /// has run.
    pub(crate) computed: usize,
    pub(crate) chain: ChainEnd,
    /// Tokens taken from the cache at the first admission.
    pub(crate) cached: Option<usize>,
    /// Whether a slice of it was ever committed.
    pub(crate) has_run: bool,
    pub(crate) planned: Option<Planned>,
    root: Option<Prefix>,
    /// The chained hash at the end of each full block, as far as anyone asked.
    hashes: Vec<u64>,
}

impl Sequence {
    /// A waiting sequence. `root` is the identity its blocks are shared under, if they are.
    /// Reserves the memory that it can ever need, so that its steps allocate nothing.
    pub(crate) fn new(new: NewSequence, block_size: usize, root: Option<Prefix>) -> Self {
        let max_blocks = new.max_blocks(block_size);
        let NewSequence { prompt: mut tokens, max_total_tokens, prefix_cache, .. } = new;
        let prompt_len = tokens.len();
        tokens.reserve_exact(max_total_tokens - prompt_len);
        Self {
            id: SeqId(0),
            state: State::Waiting,
            tokens,
            prompt_len,
            max_total_tokens,
            max_blocks,
            reads_cache: prefix_cache,
            blocks: Vec::with_capacity(max_blocks),
            computed: 0,
            chain: ChainEnd { blocks: 0, prefix: root },
            cached: None,
            has_run: false,
            planned: None,
            root,
            hashes: Vec::with_capacity(if root.is_some() { max_blocks + 1 } else { 0 }),
        }
    }

    /// How many tokens are known: all but guesses.
    pub(crate) fn known(&self) -> usize {
        self.tokens.len() - self.planned.map_or(0, |planned| planned.guesses)
    }

    /// Known tokens that are still to be run.
    pub(crate) fn remaining(&self) -> usize {
        self.known() - self.computed
    }

    /// Takes its slice off, and with it the guesses that were not confirmed.
    pub(crate) fn close_planned(&mut self) -> Planned {
        let known = self.known();
        let planned = self.planned.take().expect("sequences of the plan have their slice");
        self.tokens.truncate(known + planned.confirmed);
        planned
    }

    /// Whether a slice up to `end` wants a token: it ends with the last known token and there may
    /// be another.
    pub(crate) fn samples_at(&self, end: usize) -> bool {
        end == self.known() && end < self.max_total_tokens
    }

    /// Whether all that was asked for is done. A generated last token is never run; a prompt that
    /// is scored is run to its end.
    pub(crate) fn is_over(&self) -> bool {
        self.known() == self.max_total_tokens
            && (self.prompt_len < self.max_total_tokens || self.remaining() == 0)
    }

    /// Forgets what was computed. The blocks have been released.
    pub(crate) fn reset(&mut self) {
        assert!(self.blocks.is_empty(), "sequence {} still holds blocks", self.id.0);
        self.computed = 0;
        self.chain = ChainEnd { blocks: 0, prefix: self.root };
    }

    /// Is shared under the identity of a new version from here on; nothing of it is computed.
    pub(crate) fn renew(&mut self, version: WeightsVersion) {
        if let Some(Prefix::Root { salt, .. }) = self.root {
            self.root = Some(Prefix::Root { version, salt });
        }
        self.hashes.clear();
        self.reset();
    }

    /// Extends the chained hashes to all full blocks of known tokens. Each token is hashed once in
    /// the life of the sequence.
    pub(crate) fn hash_full_blocks(&mut self, block_size: usize) {
        let Some(Prefix::Root { version, salt }) = self.root else { return };
        let mut hash =
            self.hashes.last().copied().unwrap_or_else(|| Prefix::root_hash(version, salt));
        let known = self.hashes.len() * block_size;
        for block in self.tokens[known..].chunks_exact(block_size) {
            hash = chain(hash, block);
            self.hashes.push(hash);
        }
    }

    /// The key of full block number `index`, whose hash is known, behind `prefix`.
    pub(crate) fn key(&self, index: usize, prefix: Prefix, block_size: usize) -> Key<'_> {
        let tokens = &self.tokens[index * block_size..][..block_size];
        Key { hash: self.hashes[index], prefix, tokens }
    }
}

/// All sequences that were added and not yet finished.
#[derive(Debug, Default)]
pub(crate) struct Sequences {
    slots: Vec<Option<Sequence>>,
    vacant: Vec<u32>,
    by_id: HashMap<u64, u32, BuildMixer>,
    next_id: u64,
}

impl Sequences {
    /// Puts `sequence` into a slot under a new id.
    pub(crate) fn insert(&mut self, mut sequence: Sequence) -> (SeqId, u32) {
        let id = SeqId(self.next_id);
        self.next_id += 1;
        sequence.id = id;
        let slot = self.vacant.pop().unwrap_or_else(|| {
            self.slots.push(None);
            u32::try_from(self.slots.len() - 1).expect("fewer than u32::MAX sequences at once")
        });
        self.slots[slot as usize] = Some(sequence);
        self.by_id.insert(id.0, slot);
        (id, slot)
    }

    /// The id that the next sequence is going to have.
    pub(crate) fn next_id(&self) -> SeqId {
        SeqId(self.next_id)
    }

    pub(crate) fn remove(&mut self, slot: u32) {
        let sequence = self.slots[slot as usize].take().expect("callers name occupied slots");
        self.by_id.remove(&sequence.id.0);
        self.vacant.push(slot);
    }

    pub(crate) fn slot(&self, id: SeqId) -> Option<u32> {
        self.by_id.get(&id.0).copied()
    }

    pub(crate) fn get(&self, id: SeqId) -> Option<&Sequence> {
        self.slot(id).map(|slot| &self[slot])
    }

    /// Whether `id` was ever given out.
    pub(crate) fn existed(&self, id: SeqId) -> bool {
        id.0 < self.next_id
    }

    /// Slots, occupied or not.
    pub(crate) fn capacity(&self) -> usize {
        self.slots.len()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, &Sequence)> {
        (0..).zip(&self.slots).filter_map(|(slot, sequence)| Some((slot, sequence.as_ref()?)))
    }
}

impl Index<u32> for Sequences {
    type Output = Sequence;

    fn index(&self, slot: u32) -> &Sequence {
        self.slots[slot as usize].as_ref().expect("callers name occupied slots")
    }
}

impl IndexMut<u32> for Sequences {
    fn index_mut(&mut self, slot: u32) -> &mut Sequence {
        self.slots[slot as usize].as_mut().expect("callers name occupied slots")
    }
}

/// The identity under which the blocks of a new sequence are shared, if they are.
pub(crate) fn root(sharing: PrefixCache, version: WeightsVersion, salt: u64) -> Option<Prefix> {
    match sharing {
        PrefixCache::On => Some(Prefix::Root { version, salt }),
        PrefixCache::Off => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sequence(prompt: usize, max_total_tokens: usize) -> Sequence {
        let prompt = (0..u32::try_from(prompt).unwrap()).collect();
        let new = NewSequence { prompt, max_total_tokens, salt: 5, prefix_cache: PrefixCache::On };
        Sequence::new(new, 16, root(PrefixCache::On, WeightsVersion(3), 5))
    }

    #[test]
    fn only_the_last_known_token_samples_and_never_past_the_end() {
        let mut generating = sequence(20, 21);
        assert!(!generating.samples_at(19) && generating.samples_at(20));
        generating.computed = 20;
        assert!(!generating.is_over());
        generating.tokens.push(1);
        assert!(generating.is_over() && !generating.samples_at(21));

        let mut scored = sequence(20, 20);
        assert!(!scored.samples_at(20) && !scored.is_over());
        scored.computed = 20;
        assert!(scored.is_over());
    }

    #[test]
    fn hashes_grow_with_the_tokens() {
        let (mut grown, mut whole) = (sequence(30, 64), sequence(33, 64));
        grown.hash_full_blocks(16);
        assert_eq!(grown.hashes.len(), 1);
        grown.tokens.extend([30, 31, 32]);
        grown.hash_full_blocks(16);
        whole.hash_full_blocks(16);
        assert_eq!(grown.hashes, whole.hashes);
        assert_eq!(whole.hashes.len(), 2);
        assert_eq!(whole.key(1, whole.root.unwrap(), 16).tokens[0], 16);
    }

    #[test]
    fn slots_are_used_again_but_ids_are_not() {
        let mut sequences = Sequences::default();
        let (first, slot) = sequences.insert(sequence(1, 1));
        sequences.remove(slot);
        assert_eq!((sequences.slot(first), sequences.existed(first)), (None, true));
        let (second, again) = sequences.insert(sequence(1, 1));
        assert_eq!((second, again, sequences.capacity()), (SeqId(1), slot, 1));
        assert!(!sequences.existed(SeqId(2)));
    }
}
