//! Every invariant of the scheduler, as code. It changes nothing and trusts no count.

use crate::planner::Slice;
use crate::scheduler::{Phase, Scheduler};
use crate::sequence::{Sequence, State};

/// Fails with a message unless the condition holds.
macro_rules! ensure {
    ($holds:expr, $($message:tt)+) => {
        if !$holds {
            return Err(format!($($message)+));
        }
    };
}

impl Scheduler {
    /// Verifies that:
    ///
    /// * free + used blocks are all blocks, a block is free exactly when nobody holds it, and its
    ///   count of holders is the number of tables it is in;
    /// * the prefix index is consistent, and pending blocks are held and belong to a plan in flight;
    /// * queues and sequences agree, only running sequences hold blocks, tables are long enough for
    ///   what is computed and planned and not longer than `add` promised, and no table has a block
    ///   twice;
    /// * slices name running sequences (or removed ones), once each, within the budget.
    ///
    /// O(blocks + sequences + table entries).
    ///
    /// # Errors
    /// Describes the first invariant that does not hold: a bug of this crate.
    pub fn check(&self) -> Result<(), String> {
        self.check_queues()?;
        self.check_tables()?;
        self.memory.index.check()?;
        self.check_plan()
    }

    fn check_queues(&self) -> Result<(), String> {
        let (mut running, mut waiting) = (0, 0);
        for (slot, sequence) in self.sequences.iter() {
            let id = sequence.id.0;
            let listed = (self.running.contains(slot), self.waiting.contains(slot));
            let expected = (sequence.state == State::Running, sequence.state == State::Waiting);
            ensure!(listed == expected, "sequence {id} is {:?}, lists {listed:?}", sequence.state);
            running += usize::from(expected.0);
            waiting += usize::from(expected.1);
            self.check_sequence(sequence).map_err(|broken| format!("sequence {id}: {broken}"))?;
        }
        let lists = (self.running.iter().count(), self.waiting.iter().count());
        ensure!(lists == (running, waiting), "{lists:?} listed, {running} run, {waiting} wait");
        let counts = (self.running.len(), self.waiting.len());
        ensure!(lists == counts, "{lists:?} listed, but counted as {counts:?}");
        let limit = self.config.max_num_seqs;
        ensure!(running <= limit, "{running} sequences run, limit is {limit}");
        Ok(())
    }

    fn check_sequence(&self, sequence: &Sequence) -> Result<(), String> {
        let (tokens, table) = (sequence.tokens.len(), sequence.blocks.len());
        let limit = sequence.max_total_tokens;
        ensure!(tokens <= limit, "has {tokens} tokens, limit is {limit}");
        if sequence.state != State::Running {
            ensure!(table == 0, "holds {table} blocks but does not run");
            ensure!(sequence.planned.is_none(), "has a slice but does not run");
            let unrun = sequence.computed == 0 && sequence.remaining() > 0;
            ensure!(sequence.state == State::Ended || unrun, "waits with computed tokens");
            return Ok(());
        }
        ensure!(sequence.remaining() > 0, "runs but has nothing to run");
        ensure!(table <= sequence.max_blocks, "{table} blocks, limit {}", sequence.max_blocks);
        let (end, guesses) = match sequence.planned {
            Some(planned) => (sequence.computed + planned.len, planned.guesses),
            None => (sequence.computed, 0),
        };
        let known = sequence.known();
        ensure!(end <= known, "is planned to {end} of {known} tokens");
        ensure!(guesses == 0 || end == known, "guesses behind {end} of {known} tokens");
        ensure!(guesses == 0 || tokens < limit, "guesses up to its limit of {limit} tokens");
        let room = table * self.config.block_size;
        let needed = tokens.div_ceil(self.config.block_size);
        ensure!(table <= needed, "{table} blocks, its tokens need {needed}");
        let rows = end + guesses;
        ensure!(rows <= room, "is planned to {rows}, its table has room for {room}");
        let offered = sequence.chain.blocks;
        let full = end / self.config.block_size;
        ensure!(offered <= full, "{offered} blocks offered, {full} are full");
        Ok(())
    }

    fn check_tables(&self) -> Result<(), String> {
        let pool = &self.memory.pool;
        let mut holders = vec![0; pool.total()];
        let mut last_holder = vec![None; pool.total()];
        for (slot, sequence) in self.sequences.iter() {
            for &block in &sequence.blocks {
                holders[block as usize] += 1;
                let before = last_holder[block as usize].replace(slot);
                ensure!(before != Some(slot), "block {block} is in a table twice");
            }
        }
        let mut free = vec![false; pool.total()];
        for block in pool.free_blocks() {
            free[block as usize] = true;
        }
        for block in 0..u32::try_from(pool.total()).expect("block numbers fit in a u32") {
            let (held, counted) = (holders[block as usize], pool.holders(block));
            ensure!(held == counted, "block {block} is in {held} tables, counted as {counted}");
            ensure!(free[block as usize] == (held == 0), "block {block} is free and in {held}");
            let pending = self.memory.index.is_pending(block);
            ensure!(!pending || held > 0, "block {block} is to be written by nobody");
            ensure!(!pending || self.phase == Phase::Planned, "block {block} waits for no plan");
        }
        let listed = free.iter().filter(|&&free| free).count();
        ensure!(listed == pool.free(), "{listed} blocks are free, counted as {}", pool.free());
        Ok(())
    }

    fn check_plan(&self) -> Result<(), String> {
        let mut budget = self.config.max_num_batched_tokens;
        let mut with_slice = 0;
        for slice in &self.plan.slices {
            let (Slice { seq, start, len, samples, guesses }, rows) = (*slice, slice.rows());
            ensure!(len > 0 && rows <= budget, "a slice of {rows} tokens, budget is {budget}");
            budget -= rows;
            let Some(sequence) = self.sequences.get(seq) else { continue };
            let planned = sequence.planned.map(|p| (sequence.computed, p.len, p.guesses));
            ensure!(planned == Some((start, len, guesses)), "sequence {} plans {planned:?}", seq.0);
            ensure!(samples == sequence.samples_at(start + len), "sequence {} samples", seq.0);
            with_slice += 1;
        }
        let planned = self.sequences.iter().filter(|(_, sequence)| sequence.planned.is_some());
        let planned = planned.count();
        ensure!(planned == with_slice, "{planned} sequences have slices, {with_slice} are in it");
        let in_flight = self.phase == Phase::Planned;
        let (room, left) = (self.plan.room, if in_flight { budget } else { 0 });
        ensure!(room == left || room == 0, "room for {room} tokens, {left} are left");
        ensure!(in_flight != self.plan.slices.is_empty(), "phase {:?}", self.phase);
        Ok(())
    }
}
