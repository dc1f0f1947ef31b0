//! The scheduler's doors, and what each changes.
//!
//! # The regions of a running sequence
//!
//! ```text
//! tokens   0          cached            computed        computed+len          tokens.len()
//!          |-- taken ---|-- run earlier ---|--- the slice ---|-- later slices ---|
//! blocks   [  0  ][  1  ][  2  ][  3  ][  4  ][  5  ][  6  ][  7  ][  8  ][  9  ]
//!          |-- shared --|--- own, entered ---|-- own, pending --|---- own, not entered ----|
//! ```
//!
//! Guesses lie behind `tokens.len()`, from [`Scheduler::guess`] to the end of the plan, in blocks that
//! are not entered before a commit has confirmed them. `cached` lies on a block boundary; the other
//! marks may lie anywhere. A block belongs to the region in which it becomes full, so block 4, begun
//! earlier and filled by this slice, is pending.
//!
//! # Sharing within one step
//!
//! The samples of a group are added together, so the second one is admitted by the same plan that
//! computes their prompt for the first. It can take the prompt's blocks all the same: in each layer,
//! the engine writes the keys and values of *all* slices before any attention of that layer reads
//! them. So full blocks are entered into the prefix index when a slice is **planned**, not when it
//! is committed. Until the commit they are *pending*, and a plan holds together:
//!
//! ```text
//!   A  |======= slice of A =======|         writes blocks 0 1 2   (pending)
//!   B  |..0..|..1..|== slice of B =|        reads 0 1 of A, writes its own
//!   C  |..0..|..1..|== slice of C =|        likewise
//! ```
//!
//! * **A plan is run whole, or rolled back whole.** If A is finished or aborted between plan and
//!   commit, its slice is still a part of the plan: B and C rely on it. Who cannot run it any more
//!   (its tables are gone) calls [`Scheduler::rollback`] and plans anew. No block that comes free
//!   between plan and commit is given away before the next plan, so running it does no harm.
//! * **The last holder takes a pending block with it.** If A is aborted, blocks 0 and 1 stay, held by
//!   B and C, and become ready with the commit; block 2, which nobody else holds, leaves the index.
//! * **A rollback** empties the index of all pending blocks, then lets every sequence that this plan
//!   admitted wait again, as only those can have taken a pending block. Sequences that ran before
//!   keep their blocks and their computed tokens.
//! * **Preemption cannot break it**: within a plan, it happens only to sequences that have no slice,
//!   and only before the first admission (see `planner.rs`).
//!
//! # Phases
//!
//! ```text
//!   Ready --plan--> Planned --commit/rollback--> Ready --begin_update--> Updating --end_update--> Ready
//! ```
//!
//! Weights change while no sequence runs, and the prefix cache is emptied afterwards: no block outlives
//! its weights version. Sequences that are kept through an update wait without blocks, and are computed
//! anew after it.

use crate::config::{Config, NewSequence};
use crate::error::{Error, ErrorKind};
use crate::ids::{SeqId, WeightsVersion};
use crate::list::IndexList;
use crate::memory::KvMemory;
use crate::planner::{Plan, Room, Slice};
use crate::sequence::{Origin, Sequence, Sequences, State, root};

/// What may be called next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// No plan is in flight.
    Ready,
    /// A plan waits to be committed or rolled back.
    Planned,
    /// The weights are being written.
    Updating,
}

/// Counts since the scheduler was made, and the state of the KV memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stats {
    /// All blocks.
    pub total_blocks: usize,
    /// Blocks that nobody holds. Many of them may be in the prefix cache.
    pub free_blocks: usize,
    /// Blocks that sequences hold, each counted once.
    pub used_blocks: usize,
    /// Blocks in the prefix cache, free or used.
    pub cached_blocks: usize,
    /// Tokens looked up in the prefix cache, by admissions that were committed.
    pub query_tokens: u64,
    /// Tokens taken from the prefix cache, by admissions that were committed.
    pub hit_tokens: u64,
    /// Sequences that had to give up their blocks, each time counted.
    pub preemptions: u64,
    /// Sequences finished.
    pub finished: u64,
    /// Sequences aborted.
    pub aborted: u64,
}

/// Decides which tokens of which sequences run next, and where their keys and values live. See the
/// crate's documentation for the loop around it.
///
/// In debug builds every call that changes something ends with [`check`](Self::check).
#[derive(Debug)]
pub struct Scheduler {
    pub(crate) config: Config,
    pub(crate) memory: KvMemory,
    pub(crate) sequences: Sequences,
    /// Slots of running sequences in the order of admission.
    pub(crate) running: IndexList,
    /// Slots of waiting sequences, the next to be admitted first.
    pub(crate) waiting: IndexList,
    pub(crate) plan: Plan,
    pub(crate) phase: Phase,
    pub(crate) version: WeightsVersion,
    /// Sequences from this one on are not admitted; `None` when all may be.
    pub(crate) held_from: Option<SeqId>,
    pub(crate) totals: Stats,
    /// Counts of the plan in flight, which a rollback drops.
    pub(crate) step: StepCounts,
}

/// See [`Stats`].
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct StepCounts {
    pub(crate) query_tokens: u64,
    pub(crate) hit_tokens: u64,
}

impl Scheduler {
    /// A scheduler without sequences, at weights version 0. Its memory is reserved here: about
    /// `4 * block_size + 100` bytes per block.
    ///
    /// ```
    /// # use scheduler::{Config, PrefixCache, Scheduler};
    /// let config = Config {
    ///     block_size: 20,
    ///     num_blocks: 64,
    ///     max_num_seqs: 8,
    ///     max_num_batched_tokens: 256,
    ///     max_model_len: 512,
    ///     prefix_cache: PrefixCache::On,
    /// };
    /// let error = Scheduler::new(config).unwrap_err();
    /// assert_eq!(error.to_string(), "block_size is 20, must be a multiple of 16");
    /// ```
    ///
    /// # Errors
    /// Names the first value of `config` outside its limits.
    pub fn new(config: Config) -> Result<Self, Error> {
        config.validate()?;
        // A sequence that runs holds a block of its own.
        let most_running = config.max_num_seqs.min(config.num_blocks);
        Ok(Self {
            memory: KvMemory::new(&config),
            sequences: Sequences::default(),
            running: IndexList::new(0),
            waiting: IndexList::new(0),
            plan: Plan::with_capacity(most_running),
            phase: Phase::Ready,
            version: WeightsVersion::default(),
            held_from: None,
            totals: Stats::default(),
            step: StepCounts::default(),
            config,
        })
    }

    /// Puts a sequence at the end of the waiting queue. Allowed between plan and commit.
    ///
    /// # Errors
    /// Refuses, naming the limit, a sequence outside the limits of [`NewSequence`] and one that
    /// would not fit the KV memory even alone; and any sequence during an update.
    pub fn add(&mut self, sequence: NewSequence) -> Result<SeqId, Error> {
        if self.phase == Phase::Updating {
            return Err(ErrorKind::Updating.into());
        }
        sequence.validate(&self.config)?;
        let root = root(self.config.prefix_cache, self.version, sequence.salt);
        let sequence = Sequence::new(sequence, self.config.block_size, root);
        let (id, slot) = self.sequences.insert(sequence);
        self.running.grow(self.sequences.capacity());
        self.waiting.grow(self.sequences.capacity());
        self.waiting.push_back(slot);
        self.debug_check();
        Ok(id)
    }

    /// Decides the next step: preempts, admits, allocates blocks. The plan is empty exactly when there is
    /// no [`has_work`](Self::has_work); an empty one need not be committed. Read the slices through
    /// [`planned`](Self::planned) to read tokens and tables beside them.
    ///
    /// # Errors
    /// Refuses while the last plan was neither committed nor rolled back, and during an update.
    pub fn plan(&mut self) -> Result<&Plan, Error> {
        match self.phase {
            Phase::Updating => return Err(ErrorKind::Updating.into()),
            Phase::Planned => return Err(ErrorKind::PlanInFlight.into()),
            Phase::Ready => self.plan.clear(),
        }
        let mut room = Room { tokens: self.config.max_num_batched_tokens, headroom: 0 };
        self.continue_running(&mut room);
        if self.plan.preempted.is_empty() {
            self.admit_waiting(&mut room);
        }
        if !self.plan.slices.is_empty() {
            self.plan.room = room.tokens;
            self.phase = Phase::Planned;
        }
        self.debug_check();
        Ok(&self.plan)
    }

    /// The plan in flight; empty if there is none. Slices of sequences that were finished or aborted
    /// since are still in it.
    pub fn planned(&self) -> &Plan {
        &self.plan
    }

    /// Lets slice `at` of the plan in flight run `guesses` behind its known tokens: as many of them as the
    /// budget has room for, the sequence may still become long, and there are blocks for. Returns how
    /// many; 0 if the slice does not sample or has guesses already, and once a sequence was removed since
    /// the plan, whose blocks are given away by the next one only.
    ///
    /// A guess costs no correctness: [`commit`](Self::commit) takes the tokens that were sampled, and
    /// keeps what was computed for guesses as far as they were the same.
    pub fn guess(&mut self, at: usize, guesses: &[u32]) -> usize {
        let Some(&Slice { seq, samples: true, guesses: 0, .. }) = self.plan.slices.get(at) else {
            return 0;
        };
        let Some(slot) = self.sequences.slot(seq) else { return 0 };
        let sequence = &mut self.sequences[slot];
        let (known, block_size) = (sequence.known(), self.config.block_size);
        // The token drawn after the last guess must fit too.
        let most = sequence.max_total_tokens - known - 1;
        let wanted = guesses.len().min(self.plan.room).min(most);
        while sequence.blocks.len() * block_size < known + wanted
            && self.waiting.len() == 0
            && self.memory.pool.free() > self.running.len()
        {
            sequence.blocks.extend(self.memory.allocate());
        }
        let given = wanted.min(sequence.blocks.len() * block_size - known);
        let planned = sequence.planned.as_mut().expect("sequences of the plan have their slice");
        planned.guesses = given;
        sequence.tokens.extend_from_slice(&guesses[..given]);
        self.plan.slices[at].guesses = given;
        self.plan.room -= given;
        self.debug_check();
        given
    }

    /// The plan was run: its tokens are computed, its full blocks can be found by others from here
    /// on, and `sampled` is appended: one token for each slice that [`samples`](crate::Slice::samples), and
    /// up to as many more as it had guesses, as long as the tokens before them are those that were
    /// guessed. The tokens of a slice come in their order, slices in any. Tokens of sequences finished or
    /// aborted since are ignored. A sequence that has thereby reached its `max_total_tokens` gives up its
    /// blocks and is neither running nor waiting any more; its tokens can be read until it is finished.
    /// Committing an empty plan does nothing.
    ///
    /// # Errors
    /// Refuses, and changes nothing, if a token is missing, given behind one that was not guessed, or given
    /// for a sequence that does not sample in this plan; and during an update.
    pub fn commit(&mut self, sampled: &[(SeqId, u32)]) -> Result<(), Error> {
        if self.phase == Phase::Updating {
            return Err(ErrorKind::Updating.into());
        }
        if let Err(error) = self.stage(sampled) {
            self.unstage();
            return Err(error);
        }
        self.memory.index.confirm_pending();
        for at in 0..self.plan.slices.len() {
            if let Some(slot) = self.sequences.slot(self.plan.slices[at].seq) {
                self.apply(slot);
            }
        }
        self.totals.query_tokens += self.step.query_tokens;
        self.totals.hit_tokens += self.step.hit_tokens;
        self.close_plan();
        Ok(())
    }

    /// The plan could not be run: its tokens are not computed, what it entered into the prefix cache
    /// is forgotten, and the sequences it admitted wait again, in front and in their order. Those it
    /// preempted stay preempted. What the failed run may have written is never read.
    ///
    /// # Errors
    /// Refuses if no plan is in flight.
    pub fn rollback(&mut self) -> Result<(), Error> {
        if self.phase != Phase::Planned {
            return Err(ErrorKind::NoPlan.into());
        }
        self.memory.index.forget_pending();
        for at in (0..self.plan.slices.len()).rev() {
            if let Some(slot) = self.sequences.slot(self.plan.slices[at].seq) {
                self.undo(slot);
            }
        }
        self.close_plan();
        Ok(())
    }

    /// Removes a sequence that is done, and returns its blocks at once. Usable at any time; between
    /// plan and commit its slice remains part of the plan, which must still be run whole. (Blocks that
    /// only this slice fills are then lost to the prefix cache: commit first, then finish.) Returns
    /// whether there was such a sequence.
    pub fn finish(&mut self, id: SeqId) -> bool {
        let found = self.remove(id);
        self.totals.finished += u64::from(found);
        found
    }

    /// Like [`finish`](Self::finish), for a sequence that nobody wants any more; counted apart.
    pub fn abort(&mut self, id: SeqId) -> bool {
        let found = self.remove(id);
        self.totals.aborted += u64::from(found);
        found
    }

    /// Prompt and generated tokens of a sequence; empty for one that does not exist.
    pub fn tokens(&self, id: SeqId) -> &[u32] {
        self.sequences.get(id).map_or(&[], |sequence| &sequence.tokens[..sequence.known()])
    }

    /// The same with the guesses behind them that the plan in flight runs.
    pub fn tokens_and_guesses(&self, id: SeqId) -> &[u32] {
        self.sequences.get(id).map_or(&[], |sequence| &sequence.tokens)
    }

    /// The block table of a sequence: the block of positions `i * block_size..` at index `i`. It
    /// covers every planned slice. Empty for a sequence that waits, has ended, or does not exist.
    pub fn blocks(&self, id: SeqId) -> &[u32] {
        self.sequences.get(id).map_or(&[], |sequence| &sequence.blocks)
    }

    /// How many tokens of its prompt a sequence took from the prefix cache when it was first
    /// admitted; 0 before.
    pub fn cached_tokens(&self, id: SeqId) -> usize {
        self.sequences.get(id).and_then(|sequence| sequence.cached).unwrap_or(0)
    }

    /// Sequences that hold blocks.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Sequences that wait to be admitted, for the first time or again.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Whether no sequence runs or waits.
    pub fn is_idle(&self) -> bool {
        self.running.len() == 0 && self.waiting.len() == 0
    }

    /// Whether the next plan would not be empty: a sequence runs, or waits and is not held back.
    pub fn has_work(&self) -> bool {
        self.running.len() > 0 || self.next_waiting().is_some()
    }

    /// Sequences added from here on wait until [`admit_newcomers`](Self::admit_newcomers); those added
    /// before go on. Does nothing while newcomers are held back already.
    pub fn hold_newcomers(&mut self) {
        let next = self.sequences.next_id();
        self.held_from.get_or_insert(next);
    }

    /// Ends [`hold_newcomers`](Self::hold_newcomers).
    pub fn admit_newcomers(&mut self) {
        self.held_from = None;
    }

    /// The slot of the sequence to be admitted next. Whoever waits again waits in front, so nobody who is
    /// held back stands before one who is not.
    pub(crate) fn next_waiting(&self) -> Option<u32> {
        let slot = self.waiting.first()?;
        let held = self.held_from.is_some_and(|first| self.sequences[slot].id >= first);
        (!held).then_some(slot)
    }

    /// Begins an update of the weights. Until its end nothing can be added or planned.
    ///
    /// # Errors
    /// Refuses while sequences run or wait, naming how many; while a plan is in flight; and during
    /// an update.
    pub fn begin_update(&mut self) -> Result<(), Error> {
        if self.phase == Phase::Updating {
            return Err(ErrorKind::Updating.into());
        }
        if !self.is_idle() {
            let (running, waiting) = (self.running(), self.waiting());
            return Err(ErrorKind::Busy { running, waiting }.into());
        }
        if self.phase == Phase::Planned {
            return Err(ErrorKind::PlanInFlight.into());
        }
        self.phase = Phase::Updating;
        Ok(())
    }

    /// Like [`begin_update`](Self::begin_update), but sequences are kept: those that run give up their
    /// blocks and wait in front, in their order. All go on after the update from their first token, under
    /// the new version.
    ///
    /// # Errors
    /// Refuses while a plan is in flight, and during an update.
    pub fn begin_update_keeping(&mut self) -> Result<(), Error> {
        match self.phase {
            Phase::Updating => return Err(ErrorKind::Updating.into()),
            Phase::Planned => return Err(ErrorKind::PlanInFlight.into()),
            Phase::Ready => {}
        }
        while let Some(slot) = self.running.last() {
            self.totals.preemptions += 1;
            self.wait_again(slot);
        }
        self.phase = Phase::Updating;
        self.debug_check();
        Ok(())
    }

    /// Ends an update: the version counts up, the prefix cache is empty. Does nothing if no update
    /// was begun, so that a guard may call it on every path.
    pub fn end_update(&mut self) {
        if self.phase == Phase::Updating {
            self.version.0 += 1;
            self.memory.index.clear();
            for slot in self.waiting.iter() {
                self.sequences[slot].renew(self.version);
            }
            self.phase = Phase::Ready;
            self.debug_check();
        }
    }

    /// The version of the weights that plans are made for.
    pub fn version(&self) -> WeightsVersion {
        self.version
    }

    /// Counts for metrics. O(1).
    pub fn stats(&self) -> Stats {
        let (total, free) = (self.memory.pool.total(), self.memory.pool.free());
        Stats {
            total_blocks: total,
            free_blocks: free,
            used_blocks: total - free,
            cached_blocks: self.memory.index.len(),
            ..self.totals
        }
    }

    /// Writes each token beside the slice that it was sampled for.
    fn stage(&mut self, sampled: &[(SeqId, u32)]) -> Result<(), Error> {
        for &(id, token) in sampled {
            let Some(slot) = self.sequences.slot(id) else {
                if self.sequences.existed(id) {
                    continue;
                }
                return Err(ErrorKind::UnknownSequence(id).into());
            };
            let sequence = &mut self.sequences[slot];
            let end = sequence.computed + sequence.planned.map_or(0, |planned| planned.len);
            let samples = sequence.samples_at(end);
            match &mut sequence.planned {
                Some(planned) if samples => {
                    let guess = &sequence.tokens[end + planned.confirmed..];
                    match planned.token.replace(token) {
                        Some(before) if guess.first() == Some(&before) => planned.confirmed += 1,
                        Some(before) => {
                            return Err(ErrorKind::NotGuessed { seq: id, after: before }.into());
                        }
                        None => {}
                    }
                }
                _ => return Err(ErrorKind::NotSampling(id).into()),
            }
        }
        for slice in self.plan.slices.iter().filter(|slice| slice.samples) {
            let Some(sequence) = self.sequences.get(slice.seq) else { continue };
            if sequence.planned.is_some_and(|planned| planned.token.is_none()) {
                return Err(ErrorKind::MissingSample(slice.seq).into());
            }
        }
        Ok(())
    }

    /// Takes the tokens of a refused commit away again.
    fn unstage(&mut self) {
        for slice in &self.plan.slices {
            let Some(slot) = self.sequences.slot(slice.seq) else { continue };
            if let Some(planned) = &mut self.sequences[slot].planned {
                (planned.confirmed, planned.token) = (0, None);
            }
        }
    }

    /// Commits the slice of `slot`.
    fn apply(&mut self, slot: u32) {
        let sequence = &mut self.sequences[slot];
        let planned = sequence.close_planned();
        sequence.computed += planned.len + planned.confirmed;
        sequence.has_run = true;
        sequence.tokens.extend(planned.token);
        if planned.confirmed > 0 {
            // What was known is entered when it is planned; whether a guess was right is known now.
            self.memory.enter_full_blocks(sequence, sequence.computed);
            self.memory.index.confirm_pending();
        }
        self.memory.trim(sequence);
        if sequence.is_over() {
            self.memory.release(&mut sequence.blocks);
            sequence.state = State::Ended;
            self.running.remove(slot);
        }
    }

    /// Rolls the slice of `slot` back.
    fn undo(&mut self, slot: u32) {
        let sequence = &mut self.sequences[slot];
        let planned = sequence.close_planned();
        self.memory.trim(sequence);
        sequence.chain = planned.chain_before;
        if planned.origin == Origin::Admitted {
            if !sequence.has_run {
                sequence.cached = None;
            }
            self.wait_again(slot);
        }
    }

    fn close_plan(&mut self) {
        self.step = StepCounts::default();
        self.plan.clear();
        self.phase = Phase::Ready;
        self.debug_check();
    }

    fn remove(&mut self, id: SeqId) -> bool {
        let Some(slot) = self.sequences.slot(id) else { return false };
        let sequence = &mut self.sequences[slot];
        self.plan.room = 0;
        self.memory.release(&mut sequence.blocks);
        match sequence.state {
            State::Running => self.running.remove(slot),
            State::Waiting => self.waiting.remove(slot),
            State::Ended => {}
        }
        self.sequences.remove(slot);
        self.debug_check();
        true
    }

    fn debug_check(&self) {
        if cfg!(debug_assertions)
            && let Err(broken) = self.check()
        {
            panic!("the scheduler broke an invariant: {broken}");
        }
    }
}
