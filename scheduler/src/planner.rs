//! How a plan is made.
//!
//! One pass, under a budget of `max_num_batched_tokens`:
//!
//! ```text
//! for each running sequence, in the order of admission:
//!     take its unrun tokens, as many as the budget allows
//!     while it lacks a block and none is free:
//!         preempt the sequence admitted last (possibly this one: then stop)
//! if nobody was preempted:
//!     while budget is left and fewer than max_num_seqs run:
//!         the first waiting sequence takes what the prefix cache knows of it, and
//!         new blocks for all its other known tokens; if there are too few, stop
//!         take its unrun tokens, as many as the budget allows
//! ```
//!
//! What follows from it:
//!
//! * **Decoding never starves.** A sequence is admitted only while budget is left, so whoever is
//!   still in its prompt is the last one of the running list; those before it take one token each,
//!   and the budget is at least `max_num_seqs`.
//! * **Only generated tokens need new blocks**, without guesses at most one block per sequence and step,
//!   because an admission takes all blocks for the known tokens.
//! * **Preemption is rare.** An admission leaves one free block for every running sequence that may
//!   still grow; so memory that is just enough is not fought over in every step.
//! * **Preemption never touches a slice.** The victim is the last of the running list, slices are
//!   given from the front, so the victim has none yet. This matters: a slice that is taken back
//!   would leave blocks in the prefix index that nobody writes.
//! * **Someone always advances.** The first running sequence can preempt all others, and alone it
//!   fits: `add` refused it otherwise. If nobody runs, all blocks are free, and the first waiting
//!   sequence is admitted for the same reason.
//!
//! Guesses of what follows ([`Scheduler::guess`]) come after the plan. They take what is left of its
//! budget, and new blocks only while nobody waits and one is left for every running sequence; a new
//! block may have been in the prefix cache, as any may. Blocks that only wrong guesses needed are given
//! back.
//!
//! A step costs O(1) per running sequence, and O(known tokens) once per admission; the first waiting
//! sequence looks up its prefix again, without hashing it again, in each step in which it must wait
//! for memory.

use crate::config::PrefixCache;
use crate::ids::SeqId;
use crate::scheduler::Scheduler;
use crate::sequence::{Origin, Planned, State};

/// Work: run `tokens[start..start + len]` of one sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slice {
    /// The sequence.
    pub seq: SeqId,
    /// Position of the first token to be run. All before it are computed, or are written by this
    /// same plan.
    pub start: usize,
    /// How many tokens are run: at least 1.
    pub len: usize,
    /// Whether the commit expects a token: the slice ends with the last known token, and
    /// `max_total_tokens` is not reached. So the last slice of a prompt that is only scored
    /// (`max_total_tokens` equals its length) does not sample.
    pub samples: bool,
    /// How many guessed tokens are run behind `len` known ones; 0 unless it samples.
    pub guesses: usize,
}

impl Slice {
    /// Tokens that are run, known and guessed.
    pub fn rows(&self) -> usize {
        self.len + self.guesses
    }
}

/// The slices of one step.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// At most one slice per sequence, in the order of admission.
    pub slices: Vec<Slice>,
    /// Tokens that the budget leaves for guesses.
    pub room: usize,
    /// Sequences that gave up their blocks and wait again, the one admitted last first.
    pub preempted: Vec<SeqId>,
}

impl Plan {
    pub(crate) fn with_capacity(sequences: usize) -> Self {
        let (slices, preempted) = (Vec::with_capacity(sequences), Vec::with_capacity(sequences));
        Self { slices, room: 0, preempted }
    }

    pub(crate) fn clear(&mut self) {
        self.slices.clear();
        self.room = 0;
        self.preempted.clear();
    }
}

/// What is left for the rest of a plan.
pub(crate) struct Room {
    /// Tokens of the budget.
    pub(crate) tokens: usize,
    /// Blocks to be left free: one per running sequence that may still grow.
    pub(crate) headroom: usize,
}

impl Scheduler {
    /// Gives the running sequences their slices.
    pub(crate) fn continue_running(&mut self, room: &mut Room) {
        let mut next = self.running.first();
        while let Some(slot) = next {
            if room.tokens == 0 || !self.make_room(slot, room.tokens) {
                return;
            }
            self.give_slice(slot, Origin::Continued, room);
            next = self.running.next(slot);
        }
    }

    /// Admits waiting sequences, first come first served, and gives them their slices.
    pub(crate) fn admit_waiting(&mut self, room: &mut Room) {
        while room.tokens > 0 && self.running.len() < self.config.max_num_seqs {
            let Some(slot) = self.next_waiting() else { return };
            let sequence = &mut self.sequences[slot];
            let Some(cached) = self.memory.admit(sequence, room.headroom) else { return };
            let reads = [sequence.reads_cache, self.config.prefix_cache];
            if reads == [PrefixCache::On; 2] {
                self.step.query_tokens += sequence.tokens.len() as u64;
                self.step.hit_tokens += cached as u64;
            }
            sequence.cached.get_or_insert(cached);
            sequence.state = State::Running;
            self.waiting.remove(slot);
            self.running.push_back(slot);
            self.give_slice(slot, Origin::Admitted, room);
        }
    }

    /// Sees to it that the table of running sequence `slot` covers its next `tokens` unrun tokens,
    /// at the cost of those admitted last. `false`: it had to give up its own blocks.
    fn make_room(&mut self, slot: u32, tokens: usize) -> bool {
        let sequence = &self.sequences[slot];
        let end = sequence.computed + sequence.remaining().min(tokens);
        while self.sequences[slot].blocks.len() * self.config.block_size < end {
            if let Some(block) = self.memory.allocate() {
                self.sequences[slot].blocks.push(block);
                continue;
            }
            let victim = self.running.last().expect("the sequence itself is running");
            self.preempt(victim);
            if victim == slot {
                return false;
            }
        }
        true
    }

    /// Takes all blocks from a running sequence that has no slice, and lets it wait in front.
    fn preempt(&mut self, slot: u32) {
        debug_assert!(self.sequences[slot].planned.is_none(), "preempted with a slice");
        self.plan.preempted.push(self.sequences[slot].id);
        self.totals.preemptions += 1;
        self.wait_again(slot);
    }

    /// Moves a running sequence to the front of the waiting queue, without blocks.
    pub(crate) fn wait_again(&mut self, slot: u32) {
        let sequence = &mut self.sequences[slot];
        self.memory.release(&mut sequence.blocks);
        sequence.reset();
        sequence.state = State::Waiting;
        self.running.remove(slot);
        self.waiting.push_front(slot);
    }

    /// Puts the next tokens of `slot` into the plan; its table covers them. The blocks that will be
    /// full with them are entered into the prefix index as pending.
    fn give_slice(&mut self, slot: u32, origin: Origin, room: &mut Room) {
        let sequence = &mut self.sequences[slot];
        let (start, len) = (sequence.computed, sequence.remaining().min(room.tokens));
        let end = start + len;
        let chain_before = sequence.chain;
        let planned = Planned { len, guesses: 0, origin, confirmed: 0, token: None, chain_before };
        sequence.planned = Some(planned);
        self.memory.enter_full_blocks(sequence, end);
        let samples = sequence.samples_at(end);
        self.plan.slices.push(Slice { seq: sequence.id, start, len, samples, guesses: 0 });
        room.tokens -= len;
        room.headroom += usize::from(sequence.max_blocks > sequence.blocks.len());
    }
}
