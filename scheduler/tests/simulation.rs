//! Random operations against an independent model of the KV memory.
//!
//! The scheduler is right if, whenever a slice runs, its block table shows the keys and values of
//! exactly its own earlier tokens. So the model has a memory of slots, and "running" a slice writes
//! into each slot what the key and value of that token depend on: the weights version, the salt, and
//! all tokens up to it, folded into one number. After all writes of a plan, every position of every
//! slice is read back through the block table and compared. A failed run writes garbage instead. Some
//! slices run guesses of what follows, most of which come true.
//!
//! The vocabulary has two tokens and the pool about a hundred blocks, so that prefixes coincide and
//! memory is short all the time. `SIM_SEED=n cargo test -p scheduler --test simulation` replays a
//! seed. Nothing here knows how the scheduler works, only what it promises.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::HashSet;

use scheduler::{Config, NewSequence, PrefixCache, Scheduler, SeqId, Slice};

/// SplitMix64: the operations of a seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    fn percent(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }
}

/// 64-bit FNV-1a over words: content of slots and the hash of the trace.
fn fold(state: u64, value: u64) -> u64 {
    value.to_le_bytes().iter().fold(state ^ 0xcbf2_9ce4_8422_2325, |hash, &byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    })
}

/// What the simulation knows of a sequence that it added and has not removed.
struct Model {
    id: SeqId,
    salt: u64,
    prefix_cache: PrefixCache,
    max_total_tokens: usize,
    tokens: Vec<u32>,
    /// What the slot of each token must hold.
    content: Vec<u64>,
}

impl Model {
    fn push(&mut self, token: u32, version: u64) {
        let before =
            self.content.last().copied().unwrap_or_else(|| fold(fold(1, version), self.salt));
        self.content.push(fold(before, u64::from(token)));
        self.tokens.push(token);
    }
}

/// What happened, to prove that the simulation visits what it should.
#[derive(Debug, Default, PartialEq, Eq)]
struct Seen {
    trace: u64,
    plans: usize,
    rollbacks: usize,
    updates: usize,
    ended: usize,
    kept: usize,
    removed_in_flight: usize,
    shared_in_step: usize,
    refused: usize,
    guessed: usize,
    confirmed: usize,
    hit_tokens: u64,
    preemptions: u64,
}

struct Simulation {
    random: Random,
    config: Config,
    scheduler: Scheduler,
    /// What each slot holds.
    memory: Vec<u64>,
    models: Vec<Model>,
    /// Slices of the plan in flight, with the tables of its sequences at planning time: a sequence
    /// may be removed before the plan is committed.
    in_flight: Vec<(Slice, Vec<u32>, Vec<u64>)>,
    version: u64,
    seen: Seen,
}

impl Simulation {
    fn new(seed: u64, config: Config) -> Self {
        Self {
            random: Random(seed),
            memory: vec![0; config.num_blocks * config.block_size],
            scheduler: Scheduler::new(config.clone()).unwrap(),
            config,
            models: Vec::new(),
            in_flight: Vec::new(),
            version: 0,
            seen: Seen::default(),
        }
    }

    fn run(mut self, operations: usize) -> Seen {
        for at in 0..operations {
            // Rough weather frees a lot at random; in calm weather sequences grow until memory is
            // short.
            let (add, remove) = if at / 1_000 % 2 == 0 { (15, 24) } else { (6, 1) };
            self.operate(add, remove);
            self.verify();
        }
        self.drain();
        let stats = self.scheduler.stats();
        assert_eq!((stats.used_blocks, stats.free_blocks), (0, stats.total_blocks));
        (self.seen.hit_tokens, self.seen.preemptions) = (stats.hit_tokens, stats.preemptions);
        self.seen
    }

    /// One operation; `add` and `remove` of a hundred are those.
    fn operate(&mut self, add: usize, remove: usize) {
        match self.random.below(100) {
            0..2 => self.update(),
            2..5 => self.refused_calls(),
            pick if pick < 5 + add => self.add(),
            pick if pick < 5 + add + remove => self.remove(),
            _ if self.in_flight.is_empty() => self.plan(),
            _ if self.random.percent(12) => self.fail(),
            _ => self.complete(),
        }
    }

    /// Adds a group of samples of one prompt: runs of equal blocks, so that prefixes coincide.
    fn add(&mut self) {
        if self.models.len() > 40 {
            return;
        }
        let limit = self.config.max_model_len;
        let longest = if self.random.percent(50) { 40 } else { limit * 3 / 4 };
        let wanted = 1 + self.random.below(longest.min(limit));
        let (mut prompt, noise) = (Vec::new(), self.random.below(10));
        while prompt.len() < wanted {
            let token = self.random.below(2) as u32;
            for _ in 0..self.config.block_size {
                prompt.push(if self.random.percent(noise) { 1 - token } else { token });
            }
        }
        if self.random.percent(60) {
            prompt.truncate(wanted);
        }
        prompt.truncate(limit);
        let room = limit - prompt.len();
        let more = if self.random.percent(20) { 0 } else { self.random.below(room + 1) };
        let salt = u64::from(self.random.percent(10));
        let uncached = self.random.percent(10);
        for _ in 0..=self.random.below(4) {
            let new = NewSequence {
                prompt: prompt.clone(),
                max_total_tokens: prompt.len() + more,
                salt,
                prefix_cache: if uncached { PrefixCache::Off } else { PrefixCache::On },
            };
            let (prefix_cache, max_total_tokens) = (new.prefix_cache, new.max_total_tokens);
            let id = self.scheduler.add(new).unwrap();
            let (tokens, content) = (Vec::new(), Vec::new());
            let mut model = Model { id, salt, prefix_cache, max_total_tokens, tokens, content };
            for &token in &prompt {
                model.push(token, self.version);
            }
            self.models.push(model);
        }
    }

    fn remove(&mut self) {
        if self.models.is_empty() {
            return;
        }
        let at = self.random.below(self.models.len());
        let id = self.models.swap_remove(at).id;
        if self.random.percent(50) {
            assert!(self.scheduler.finish(id) && !self.scheduler.abort(id));
        } else {
            assert!(self.scheduler.abort(id) && !self.scheduler.finish(id));
        }
        // Its blocks are free, and part of the plan in flight.
        for at in 0..=self.in_flight.len() {
            assert_eq!(self.scheduler.guess(at, &[0; 20]), 0);
        }
        let planned = self.in_flight.iter().any(|(slice, ..)| slice.seq == id);
        self.seen.removed_in_flight += usize::from(planned);
        assert!(self.scheduler.tokens(id).is_empty() && self.scheduler.blocks(id).is_empty());
    }

    fn update(&mut self) {
        let busy = !self.scheduler.is_idle();
        let waits = !self.in_flight.is_empty();
        assert_eq!(self.scheduler.begin_update().is_err(), busy || waits);
        if busy && self.random.percent(20) {
            for model in self.models.drain(..) {
                assert!(self.scheduler.abort(model.id));
            }
            if waits {
                self.complete();
            }
            self.scheduler.begin_update().unwrap();
        } else if busy && !waits && self.random.percent(50) {
            self.scheduler.begin_update_keeping().unwrap();
            assert_eq!((self.scheduler.running(), self.scheduler.stats().used_blocks), (0, 0));
            for model in &mut self.models {
                model.content.clear();
                for token in std::mem::take(&mut model.tokens) {
                    model.push(token, self.version + 1);
                }
            }
            self.seen.kept += 1;
        } else if busy || waits {
            assert!(!waits || self.scheduler.begin_update_keeping().is_err());
            return;
        }
        // Sequences that have ended may stay; they never run again.
        assert!(self.scheduler.plan().is_err() && self.scheduler.begin_update().is_err());
        self.scheduler.end_update();
        self.version += 1;
        self.seen.updates += 1;
        assert_eq!(self.scheduler.stats().cached_blocks, 0);
    }

    /// Calls that must be refused and change nothing.
    fn refused_calls(&mut self) {
        let prompt = vec![0; self.config.max_model_len + 1];
        let new = NewSequence {
            max_total_tokens: prompt.len(),
            prompt,
            salt: 0,
            prefix_cache: PrefixCache::On,
        };
        assert!(self.scheduler.add(new).is_err());
        assert!(self.scheduler.commit(&[(SeqId(u64::MAX), 0)]).is_err());
        assert_eq!(self.scheduler.rollback().is_err(), self.in_flight.is_empty());
        if !self.in_flight.is_empty() {
            self.in_flight.clear();
            self.seen.rollbacks += 1;
        }
        self.seen.refused += 1;
    }

    fn plan(&mut self) {
        let idle = self.scheduler.is_idle();
        let planned = self.scheduler.plan().unwrap().slices.len();
        for at in 0..planned {
            self.guess(at);
        }
        let plan = self.scheduler.planned().clone();
        assert_eq!(plan.slices.is_empty(), idle, "a plan is empty exactly when there is no work");
        let tokens: usize = plan.slices.iter().map(Slice::rows).sum();
        assert_eq!(tokens + plan.room, if idle { 0 } else { self.config.max_num_batched_tokens });
        let mut seqs = HashSet::new();
        for slice in &plan.slices {
            assert!(seqs.insert(slice.seq), "two slices of one sequence");
            assert!(!plan.preempted.contains(&slice.seq), "a slice of a preempted sequence");
            let model = self.model(slice.seq);
            let end = slice.start + slice.len;
            let wants = end == model.tokens.len() && end < model.max_total_tokens;
            assert_eq!(slice.samples, wants);
            let table = self.scheduler.blocks(slice.seq).to_vec();
            let mut content = model.content[..end].to_vec();
            let guesses = &self.scheduler.tokens_and_guesses(slice.seq)[model.tokens.len()..];
            assert_eq!(guesses.len(), slice.guesses);
            assert!(guesses.is_empty() || slice.samples);
            for &guess in guesses {
                content.push(fold(*content.last().unwrap(), u64::from(guess)));
            }
            self.in_flight.push((*slice, table, content));
            for value in [slice.seq.0, slice.start as u64, slice.len as u64, slice.guesses as u64] {
                self.seen.trace = fold(self.seen.trace, value);
            }
        }
        for seq in &plan.preempted {
            assert!(self.scheduler.blocks(*seq).is_empty());
            self.seen.trace = fold(self.seen.trace, !seq.0);
        }
        if !idle {
            assert!(self.scheduler.plan().is_err(), "a plan is in flight");
        }
        self.seen.plans += 1;
    }

    /// Lets every third slice guess; one that has guesses is refused more.
    fn guess(&mut self, at: usize) {
        if !self.random.percent(33) {
            return;
        }
        let guesses: Vec<u32> = (0..=self.random.below(20)).map(|_| self.draw()).collect();
        let slice = self.scheduler.planned().slices[at];
        let preempted = self.scheduler.stats().preemptions;
        let given = self.scheduler.guess(at, &guesses);
        assert_eq!(self.scheduler.stats().preemptions, preempted, "a guess displaced a sequence");
        assert!(given == 0 || slice.samples);
        assert_eq!(self.scheduler.tokens_and_guesses(slice.seq).len() - given, {
            self.scheduler.tokens(slice.seq).len()
        });
        assert!(given == 0 || self.scheduler.guess(at, &guesses) == 0);
        self.seen.guessed += given;
    }

    /// A token: mostly 0, so that guesses come true.
    fn draw(&mut self) -> u32 {
        u32::from(self.random.percent(15))
    }

    /// Runs the plan in flight, samples, and commits.
    fn complete(&mut self) {
        self.write_and_read();
        let mut sampled = Vec::new();
        for (slice, ..) in std::mem::take(&mut self.in_flight) {
            if !slice.samples {
                continue;
            }
            // Of a sequence that is gone nobody knows what was guessed.
            let with_guesses = self.scheduler.tokens_and_guesses(slice.seq);
            let guesses = with_guesses.get(slice.start + slice.len..).unwrap_or_default().to_vec();
            let mut right = 0;
            loop {
                let token = self.draw();
                sampled.push((slice.seq, token));
                // A sequence may end before its guesses do.
                if guesses.get(right) != Some(&token) || self.random.percent(5) {
                    break;
                }
                right += 1;
            }
            self.seen.confirmed += right;
        }
        self.refused_commits(&sampled);
        if self.random.percent(50) {
            // Any order of slices, each with its tokens in theirs.
            sampled.sort_by_key(|(seq, _)| std::cmp::Reverse(seq.0));
        }
        self.scheduler.commit(&sampled).unwrap();
        let version = self.version;
        for &(seq, token) in &sampled {
            if let Some(model) = self.models.iter_mut().find(|model| model.id == seq) {
                model.push(token, version);
                self.seen.ended += usize::from(model.tokens.len() == model.max_total_tokens);
            }
        }
    }

    fn refused_commits(&mut self, sampled: &[(SeqId, u32)]) {
        let Some(&first) = sampled.iter().find(|(seq, _)| !self.scheduler.tokens(*seq).is_empty())
        else {
            return;
        };
        if self.random.percent(10) {
            let without: Vec<_> =
                sampled.iter().copied().filter(|(seq, _)| *seq != first.0).collect();
            assert!(self.scheduler.commit(&without).is_err());
            // No guess is 2.
            let twice: Vec<_> = sampled.iter().copied().chain([(first.0, 2); 2]).collect();
            assert!(self.scheduler.commit(&twice).is_err());
            self.verify();
        }
    }

    /// As the engine does it: all writes of a layer come before all its reads.
    fn write_and_read(&mut self) {
        let block_size = self.config.block_size;
        let slot = |table: &[u32], at: usize| {
            table[at / block_size] as usize * block_size + at % block_size
        };
        let mut written = HashSet::new();
        for (slice, table, content) in &self.in_flight {
            for (at, &value) in content.iter().enumerate().skip(slice.start) {
                assert!(written.insert(slot(table, at)), "a slot is written twice in one step");
                self.memory[slot(table, at)] = value;
            }
        }
        for (slice, table, content) in &self.in_flight {
            for (at, &expected) in content.iter().enumerate() {
                let found = self.memory[slot(table, at)];
                assert_eq!(found, expected, "position {at} of {slice:?} reads a wrong slot");
            }
            let early = (0..slice.start).any(|at| written.contains(&slot(table, at)));
            self.seen.shared_in_step += usize::from(early);
        }
    }

    /// The run fails half-way: some slots hold garbage.
    fn fail(&mut self) {
        let block_size = self.config.block_size;
        for (slice, table, _) in std::mem::take(&mut self.in_flight) {
            for at in slice.start..slice.start + slice.rows() {
                let slot = table[at / block_size] as usize * block_size + at % block_size;
                if self.random.percent(70) {
                    self.memory[slot] = u64::MAX;
                }
            }
        }
        self.scheduler.rollback().unwrap();
        self.seen.rollbacks += 1;
        assert!(self.scheduler.planned().slices.is_empty());
    }

    /// Everything ends once nobody interferes, and in a bounded number of steps.
    fn drain(&mut self) {
        let mut steps = 0;
        while !self.in_flight.is_empty() || !self.scheduler.is_idle() {
            if self.in_flight.is_empty() {
                self.plan();
            }
            self.complete();
            self.verify();
            steps += 1;
            assert!(steps < 20_000, "the scheduler goes round in circles");
        }
        for model in std::mem::take(&mut self.models) {
            assert_eq!(model.tokens.len(), model.max_total_tokens);
            assert!(self.scheduler.finish(model.id));
        }
    }

    /// What holds after every operation.
    fn verify(&self) {
        self.scheduler.check().unwrap();
        assert_eq!(self.scheduler.version().0, self.version);
        assert!(self.scheduler.running() <= self.config.max_num_seqs);
        for model in &self.models {
            assert_eq!(self.scheduler.tokens(model.id), model.tokens);
            if model.prefix_cache == PrefixCache::Off {
                assert_eq!(self.scheduler.cached_tokens(model.id), 0);
            }
        }
    }

    fn model(&self, id: SeqId) -> &Model {
        self.models.iter().find(|model| model.id == id).expect("only known sequences are planned")
    }
}

fn config() -> Config {
    Config {
        block_size: 16,
        num_blocks: 100,
        max_num_seqs: 24,
        max_num_batched_tokens: 300,
        max_model_len: 320,
        prefix_cache: PrefixCache::On,
    }
}

fn seed() -> u64 {
    let seed = match std::env::var("SIM_SEED") {
        Ok(text) => text.parse().expect("SIM_SEED is a number"),
        Err(_) => 20_260_101,
    };
    println!("SIM_SEED={seed}");
    seed
}

#[test]
fn a_hundred_thousand_operations_keep_every_promise() {
    let seen = Simulation::new(seed(), config()).run(100_000);
    println!("{seen:?}");
    assert!(seen.plans > 20_000 && seen.rollbacks > 2_000 && seen.refused > 2_000);
    assert!(
        seen.updates > 20 && seen.kept > 20 && seen.ended > 500 && seen.removed_in_flight > 1_000
    );
    assert!(seen.guessed > 100_000 && seen.confirmed > 20_000);
    assert!(seen.shared_in_step > 500 && seen.hit_tokens > 100_000 && seen.preemptions > 100);
}

#[test]
fn the_same_seed_gives_the_same_trace() {
    let seed = seed();
    let first = Simulation::new(seed, config()).run(5_000);
    assert_eq!(first, Simulation::new(seed, config()).run(5_000));
    assert_ne!(first.trace, Simulation::new(seed + 1, config()).run(5_000).trace);
}

#[test]
fn other_shapes_keep_every_promise() {
    let seed = seed();
    // A pool that just holds one sequence; a budget of one token per sequence; no cache; large blocks.
    let shapes = [
        Config { num_blocks: 20, ..config() },
        Config { max_num_batched_tokens: 24, ..config() },
        Config { prefix_cache: PrefixCache::Off, ..config() },
        Config { block_size: 48, num_blocks: 30, max_num_seqs: 3, ..config() },
        Config { max_num_seqs: 1, max_num_batched_tokens: 1, max_model_len: 40, ..config() },
    ];
    for (number, shape) in (0..).zip(shapes) {
        println!("{shape:?}");
        let cache = shape.prefix_cache;
        let seen = Simulation::new(seed + number, shape).run(6_000);
        println!("{seen:?}");
        assert!(seen.plans > 1_000);
        assert_eq!(seen.hit_tokens > 0, cache == PrefixCache::On);
    }
}
