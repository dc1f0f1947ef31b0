//! What the scheduler promises, one promise per test, on small numbers worked out by hand.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use scheduler::{Config, ErrorKind, NewSequence, PrefixCache, Scheduler, SeqId, Slice};

fn config() -> Config {
    Config {
        block_size: 16,
        num_blocks: 64,
        max_num_seqs: 8,
        max_num_batched_tokens: 64,
        max_model_len: 512,
        prefix_cache: PrefixCache::On,
    }
}

fn scheduler(config: Config) -> Scheduler {
    Scheduler::new(config).unwrap()
}

/// Adds a prompt of `len` tokens `first, first + 1, ..`, to end at `max_total_tokens`.
fn add(scheduler: &mut Scheduler, first: u32, len: u32, max_total_tokens: usize) -> SeqId {
    let prompt = (first..first + len).collect();
    let new = NewSequence { prompt, max_total_tokens, salt: 0, prefix_cache: PrefixCache::On };
    scheduler.add(new).unwrap()
}

fn plan(scheduler: &mut Scheduler) -> Vec<Slice> {
    scheduler.plan().unwrap().slices.clone()
}

/// Plans and commits one step in which every sampled token is `token`.
fn step(scheduler: &mut Scheduler, token: u32) -> Vec<Slice> {
    let slices = plan(scheduler);
    let sampled = slices.iter().filter(|slice| slice.samples);
    let sampled: Vec<_> = sampled.map(|slice| (slice.seq, token)).collect();
    scheduler.commit(&sampled).unwrap();
    slices
}

fn slice(seq: SeqId, start: usize, len: usize, samples: bool) -> Slice {
    Slice { seq, start, len, samples, guesses: 0 }
}

#[test]
fn a_long_prompt_is_run_in_chunks_beside_decodes() {
    let mut s = scheduler(config());
    let short = add(&mut s, 0, 10, 20);
    assert_eq!(step(&mut s, 7), [slice(short, 0, 10, true)]);
    let long = add(&mut s, 1000, 100, 120);
    assert_eq!(step(&mut s, 7), [slice(short, 10, 1, true), slice(long, 0, 63, false)]);
    let late = add(&mut s, 2000, 10, 20);
    let last = [slice(short, 11, 1, true), slice(long, 63, 37, true), slice(late, 0, 10, true)];
    assert_eq!(step(&mut s, 7), last);
    assert_eq!(s.tokens(long).len(), 101);
    assert_eq!((s.blocks(long).len(), s.running(), s.waiting()), (7, 3, 0));
}

#[test]
fn waiting_sequences_are_admitted_in_order_up_to_max_num_seqs() {
    let mut s = scheduler(Config { max_num_seqs: 2, ..config() });
    let ids = [0, 100, 200].map(|first| add(&mut s, first, 8, 40));
    let seqs: Vec<_> = step(&mut s, 7).iter().map(|slice| slice.seq).collect();
    assert_eq!(seqs, ids[..2]);
    assert!(s.finish(ids[0]));
    let seqs: Vec<_> = step(&mut s, 7).iter().map(|slice| slice.seq).collect();
    assert_eq!(seqs, ids[1..]);
}

#[test]
fn a_group_shares_its_prompt_within_one_step() {
    let mut s = scheduler(config());
    let group = [(); 4].map(|()| add(&mut s, 0, 40, 80));
    let slices = plan(&mut s);
    assert_eq!(slices[0], slice(group[0], 0, 40, true));
    for (at, &id) in group.iter().enumerate().skip(1) {
        assert_eq!(slices[at], slice(id, 32, 8, true));
        assert_eq!(s.blocks(id)[..2], s.blocks(group[0])[..2]);
        assert_ne!(s.blocks(id)[2], s.blocks(group[0])[2]);
    }
    assert_eq!(s.stats().used_blocks, 6);
    s.commit(&group.map(|id| (id, 7))).unwrap();
    let stats = s.stats();
    assert_eq!((stats.query_tokens, stats.hit_tokens), (160, 96));
}

#[test]
fn salts_and_scoring_do_not_share() {
    let mut s = scheduler(config());
    let prompt: Vec<u32> = (0..20).collect();
    let new = NewSequence { prompt, max_total_tokens: 30, salt: 0, prefix_cache: PrefixCache::On };
    let first = s.add(new.clone()).unwrap();
    let salted = s.add(NewSequence { salt: 1, ..new.clone() }).unwrap();
    let whole = s.add(NewSequence { prefix_cache: PrefixCache::Off, ..new }).unwrap();
    let starts: Vec<_> = step(&mut s, 7).iter().map(|slice| (slice.seq, slice.start)).collect();
    assert_eq!(starts, [(first, 0), (salted, 0), (whole, 0)]);
}

#[test]
fn a_scored_prompt_is_run_to_its_end_and_samples_nothing() {
    let mut s = scheduler(config());
    let scored = add(&mut s, 0, 100, 100);
    assert_eq!(step(&mut s, 7), [slice(scored, 0, 64, false)]);
    assert_eq!(step(&mut s, 7), [slice(scored, 64, 36, false)]);
    assert!(s.is_idle() && plan(&mut s).is_empty());
    assert_eq!((s.tokens(scored).len(), s.stats().used_blocks), (100, 0));
    assert!(s.finish(scored) && !s.finish(scored));
}

#[test]
fn the_planner_never_runs_past_the_end() {
    let mut s = scheduler(config());
    let id = add(&mut s, 0, 31, 33);
    step(&mut s, 7);
    assert_eq!(step(&mut s, 8), [slice(id, 31, 1, true)]);
    assert!(s.is_idle());
    assert_eq!(s.tokens(id)[31..], [7, 8]);
    assert!(s.blocks(id).is_empty());
}

#[test]
fn an_admission_leaves_a_block_for_every_sequence_that_may_grow() {
    // The third would fit, but then the first decodes would fight for the last block.
    let mut s = scheduler(Config { num_blocks: 7, max_num_batched_tokens: 128, ..config() });
    let ids = [0, 100, 200].map(|first| add(&mut s, first, 16, 64));
    assert_eq!(step(&mut s, 1).len(), 3);
    assert!(ids.iter().all(|&id| s.abort(id)));
    let ids = [300, 400, 500].map(|first| add(&mut s, first, 32, 64));
    assert_eq!(step(&mut s, 1).len(), 2);
    assert_eq!((s.stats().free_blocks, s.blocks(ids[2]).len()), (3, 0));
}

#[test]
fn the_youngest_gives_way_and_comes_back_first_with_all_its_tokens() {
    // Each sequence begins with two blocks and ends with four; six blocks are too few for both.
    let mut s = scheduler(Config { num_blocks: 6, ..config() });
    let (old, young) = (add(&mut s, 0, 32, 64), add(&mut s, 100, 32, 64));
    let after = add(&mut s, 200, 32, 64);
    assert_eq!(step(&mut s, 1).len(), 2);
    for _ in 0..16 {
        assert_eq!(step(&mut s, 1).len(), 2);
    }
    assert_eq!((s.blocks(old).len(), s.blocks(young).len()), (3, 3));
    // Both need a fourth block.
    let plan = s.plan().unwrap().clone();
    assert_eq!(plan.slices, [slice(old, 48, 1, true)]);
    assert_eq!(plan.preempted, [young]);
    assert!(s.blocks(young).is_empty());
    s.commit(&[(old, 1)]).unwrap();
    while s.blocks(young).is_empty() {
        assert!(s.blocks(after).is_empty(), "the preempted sequence comes first");
        step(&mut s, 1);
    }
    assert_eq!(s.tokens(old).len(), 64, "the old one ended before the young one came back");
    assert_eq!(s.tokens(young)[..34], [(100..132).collect::<Vec<_>>(), vec![1, 1]].concat());
    assert_eq!(s.cached_tokens(young), 0, "the first admission counts");
    while !s.is_idle() {
        step(&mut s, 1);
    }
    assert!([old, young, after].iter().all(|&id| s.tokens(id).len() == 64));
    assert_eq!((s.stats().preemptions, s.stats().free_blocks), (1, 6));
}

#[test]
fn a_freed_prompt_is_found_again_until_its_blocks_are_used() {
    let mut s = scheduler(Config { num_blocks: 4, ..config() });
    let first = add(&mut s, 0, 40, 41);
    step(&mut s, 7);
    assert!(s.finish(first));
    let again = add(&mut s, 0, 40, 41);
    assert_eq!(step(&mut s, 7), [slice(again, 32, 8, true)]);
    assert_eq!(s.cached_tokens(again), 32);
    add(&mut s, 500, 60, 61);
    step(&mut s, 7);
    add(&mut s, 0, 40, 41);
    assert_eq!(step(&mut s, 7)[0].start, 0);
}

#[test]
fn a_rollback_forgets_what_the_plan_would_have_written() {
    let mut s = scheduler(config());
    let (first, second) = (add(&mut s, 0, 40, 80), add(&mut s, 0, 40, 80));
    let planned = plan(&mut s);
    assert_eq!(s.cached_tokens(second), 32);
    s.rollback().unwrap();
    assert_eq!((s.running(), s.waiting(), s.stats().cached_blocks), (0, 2, 0));
    assert_eq!((s.cached_tokens(second), s.stats().query_tokens), (0, 0));
    assert_eq!(*s.rollback().unwrap_err().kind(), ErrorKind::NoPlan);
    assert_eq!(plan(&mut s), planned, "the same step again");
    s.commit(&[(first, 1), (second, 2)]).unwrap();
    let decode = plan(&mut s);
    s.rollback().unwrap();
    assert_eq!((s.running(), s.waiting()), (2, 0));
    assert_eq!(plan(&mut s), decode);
}

#[test]
fn an_abort_in_flight_takes_along_only_what_nobody_else_reads() {
    let mut s = scheduler(config());
    let (long, short) = (add(&mut s, 0, 50, 80), add(&mut s, 0, 20, 80));
    assert_eq!(plan(&mut s)[1], slice(short, 16, 4, true));
    let shared = s.blocks(long)[0];
    assert!(s.abort(long));
    assert_eq!((s.blocks(short)[0], s.stats().used_blocks), (shared, 2));
    s.commit(&[(long, 1), (short, 1)]).unwrap();
    let again = add(&mut s, 0, 50, 80);
    assert_eq!(plan(&mut s)[1], slice(again, 16, 34, true));
}

#[test]
fn a_commit_with_wrong_tokens_is_refused_and_changes_nothing() {
    let mut s = scheduler(config());
    let (sampling, chunked) = (add(&mut s, 0, 20, 30), add(&mut s, 100, 200, 300));
    let (never, waiting) = (SeqId(99), add(&mut s, 200, 20, 30));
    plan(&mut s);
    let refused = |s: &mut Scheduler, sampled: &[(SeqId, u32)]| {
        let kind = s.commit(sampled).unwrap_err().kind().clone();
        assert_eq!((s.tokens(sampling).len(), s.planned().slices.len()), (20, 2));
        kind
    };
    assert_eq!(refused(&mut s, &[]), ErrorKind::MissingSample(sampling));
    let twice = [(sampling, 1), (sampling, 1)];
    assert_eq!(refused(&mut s, &twice), ErrorKind::NotGuessed { seq: sampling, after: 1 });
    for id in [chunked, waiting] {
        assert_eq!(refused(&mut s, &[(sampling, 1), (id, 1)]), ErrorKind::NotSampling(id));
    }
    assert_eq!(refused(&mut s, &[(never, 1)]), ErrorKind::UnknownSequence(never));
    assert_eq!(*s.plan().unwrap_err().kind(), ErrorKind::PlanInFlight);
    s.commit(&[(sampling, 5)]).unwrap();
    assert_eq!(s.tokens(sampling)[20..], [5]);
}

#[test]
fn an_update_waits_for_silence_and_empties_the_cache() {
    let mut s = scheduler(config());
    let id = add(&mut s, 0, 40, 41);
    add(&mut s, 0, 40, 41);
    let error = s.begin_update().unwrap_err();
    assert_eq!(*error.kind(), ErrorKind::Busy { running: 0, waiting: 2 });
    let message = "weights cannot be updated while 0 sequences run and 2 wait";
    assert_eq!(error.to_string(), message);
    step(&mut s, 7);
    assert_eq!(s.stats().cached_blocks, 2);
    s.begin_update().unwrap();
    let prompt = vec![1];
    let new = NewSequence { prompt, max_total_tokens: 2, salt: 0, prefix_cache: PrefixCache::On };
    assert_eq!(*s.add(new).unwrap_err().kind(), ErrorKind::Updating);
    assert_eq!(*s.plan().unwrap_err().kind(), ErrorKind::Updating);
    s.end_update();
    s.end_update();
    assert_eq!((s.version().0, s.stats().cached_blocks), (1, 0));
    assert_eq!(s.tokens(id).len(), 41, "what was generated can still be read");
    add(&mut s, 0, 40, 41);
    assert_eq!(step(&mut s, 7)[0].start, 0);
}

#[test]
fn an_update_that_keeps_sequences_lets_them_go_on_in_their_order_from_the_start() {
    let mut s = scheduler(Config { max_num_batched_tokens: 128, ..config() });
    let ids = [add(&mut s, 0, 40, 50), add(&mut s, 100, 20, 30)];
    step(&mut s, 7);
    step(&mut s, 8);
    let late = add(&mut s, 0, 40, 50);
    s.begin_update_keeping().unwrap();
    assert_eq!((s.running(), s.waiting(), s.stats().used_blocks), (0, 3, 0));
    assert_eq!(*s.begin_update_keeping().unwrap_err().kind(), ErrorKind::Updating);
    s.end_update();
    assert_eq!((s.version().0, s.stats().cached_blocks), (1, 0));
    let slices = step(&mut s, 9);
    let ran: Vec<_> = slices.iter().map(|slice| (slice.seq, slice.start, slice.len)).collect();
    // The late one shares what the first computes anew under the same version.
    assert_eq!(ran, [(ids[0], 0, 42), (ids[1], 0, 22), (late, 32, 8)]);
    assert_eq!(s.tokens(ids[0])[40..], [7, 8, 9]);
}

#[test]
fn newcomers_are_held_back_through_preemption_and_updates() {
    // As above: six blocks are too few for both to the end, so the young one gives way and comes back.
    let mut s = scheduler(Config { num_blocks: 6, ..config() });
    let early = [add(&mut s, 0, 32, 64), add(&mut s, 100, 32, 64)];
    step(&mut s, 1);
    s.hold_newcomers();
    let late = add(&mut s, 200, 32, 40);
    // A second time changes nothing: the held one stays held.
    s.hold_newcomers();
    while s.stats().preemptions == 0 {
        assert!(step(&mut s, 1).iter().all(|slice| slice.seq != late));
    }
    s.begin_update_keeping().unwrap();
    s.end_update();
    while s.has_work() {
        assert!(step(&mut s, 1).iter().all(|slice| slice.seq != late));
    }
    assert_eq!(early.map(|id| s.tokens(id).len()), [64, 64]);
    assert_eq!((s.running(), s.waiting(), s.is_idle(), plan(&mut s)), (0, 1, false, vec![]));
    s.admit_newcomers();
    assert!(s.has_work());
    assert_eq!(step(&mut s, 1), [slice(late, 0, 32, true)]);
}

#[test]
fn four_thousand_sequences_run_together() {
    let mut s = scheduler(Config {
        num_blocks: 3 * 4096,
        max_num_seqs: 4096,
        max_num_batched_tokens: 8192,
        ..config()
    });
    // 512 prompts of 8 samples; each computes its first block once.
    let ids: Vec<_> = (0..4096).map(|at| add(&mut s, at / 8 * 100, 20, 40)).collect();
    let mut steps = 0;
    while !s.is_idle() {
        step(&mut s, 7);
        steps += 1;
    }
    // A sample costs 6 tokens of prefill on average, and one per step from then on: 1365, 2503, 3451
    // and then all 4096 are admitted after 1, 2, 3 and 4 steps. The last decode in 19 more.
    assert_eq!(steps, 23);
    assert_eq!(s.stats().hit_tokens, 512 * 7 * 16);
    assert!(ids.iter().all(|&id| s.tokens(id).len() == 40 && s.finish(id)));
    assert_eq!(s.stats().free_blocks, 3 * 4096);
}

/// A scheduler with one sequence of 14 tokens, to end at 40, in whose plan these guesses run.
fn guessing(guesses: &[u32]) -> (Scheduler, SeqId) {
    let mut s = scheduler(config());
    let seq = add(&mut s, 0, 14, 40);
    s.plan().unwrap();
    assert_eq!(s.guess(0, guesses), guesses.len());
    (s, seq)
}

#[test]
fn guesses_run_behind_the_known_tokens_and_right_ones_are_kept() {
    let (mut s, seq) = guessing(&[7, 8, 9]);
    let guessed = Slice { guesses: 3, ..slice(seq, 0, 14, true) };
    assert_eq!((s.planned().slices[0], s.planned().room), (guessed, 64 - 17));
    assert_eq!((s.tokens(seq).len(), &s.tokens_and_guesses(seq)[14..]), (14, &[7, 8, 9][..]));
    assert_eq!(s.blocks(seq).len(), 2);
    // The first two were right, and a third token follows them.
    s.commit(&[(seq, 7), (seq, 8), (seq, 5)]).unwrap();
    assert_eq!(s.tokens(seq)[14..], [7, 8, 5]);
    assert_eq!(s.tokens_and_guesses(seq), s.tokens(seq));
    // What the guesses filled can be found at once; only the last token is still to be run.
    assert_eq!(s.stats().cached_blocks, 1);
    assert_eq!(step(&mut s, 1), [slice(seq, 16, 1, true)]);
}

#[test]
fn a_token_behind_a_wrong_guess_is_refused() {
    let (mut s, seq) = guessing(&[7, 8]);
    let refused = |error: scheduler::Error| error.to_string();
    let wrong = s.commit(&[(seq, 6), (seq, 8)]).unwrap_err();
    assert_eq!(refused(wrong), "sequence 0 was given a token after 6, not guessed there");
    let beyond = s.commit(&[(seq, 7), (seq, 8), (seq, 1), (seq, 1)]).unwrap_err();
    assert_eq!(refused(beyond), "sequence 0 was given a token after 1, not guessed there");
    s.commit(&[(seq, 7), (seq, 8), (seq, 1)]).unwrap();
    assert_eq!(s.tokens(seq)[14..], [7, 8, 1]);
}

#[test]
fn a_rollback_and_an_end_forget_guesses() {
    let (mut s, seq) = guessing(&[7, 8, 9]);
    s.rollback().unwrap();
    assert_eq!((s.tokens_and_guesses(seq).len(), s.stats().used_blocks), (14, 0));
    assert_eq!(step(&mut s, 7), [slice(seq, 0, 14, true)]);
    s.plan().unwrap();
    assert_eq!(s.guess(0, &[8]), 1);
    assert!(s.abort(seq));
    assert_eq!((s.guess(0, &[8]), s.stats().used_blocks), (0, 0));
    s.commit(&[(seq, 8), (seq, 9)]).unwrap();
}

#[test]
fn guesses_take_no_block_from_who_waits_and_keep_none() {
    let mut s = scheduler(Config { max_num_seqs: 1, ..config() });
    let first = add(&mut s, 0, 14, 40);
    s.plan().unwrap();
    assert_eq!((s.guess(0, &[9; 8]), s.blocks(first).len()), (8, 2));
    s.commit(&[(first, 9)]).unwrap();
    assert_eq!((s.tokens(first).len(), s.blocks(first).len()), (15, 1), "given back");
    let waiting = add(&mut s, 100, 10, 20);
    s.plan().unwrap();
    assert_eq!(
        (s.guess(0, &[9; 8]), s.blocks(first).len()),
        (1, 1),
        "a place is left in its block"
    );
    assert!(s.abort(waiting));
    s.commit(&[(first, 8)]).unwrap();
}

#[test]
fn once_a_sequence_has_left_a_plan_nothing_is_guessed() {
    let mut s = scheduler(config());
    let (gone, stays) = (add(&mut s, 0, 20, 30), add(&mut s, 100, 15, 40));
    s.plan().unwrap();
    assert!(s.abort(gone));
    assert_eq!((s.guess(1, &[9; 8]), s.blocks(stays).len()), (0, 1));
    s.commit(&[(gone, 1), (stays, 1)]).unwrap();
}

#[test]
fn guesses_stay_within_budget_length_and_free_memory() {
    // Two blocks are free beside the two that run: one for each of them.
    let mut s = scheduler(Config { num_blocks: 4, max_num_batched_tokens: 40, ..config() });
    let (first, second) = (add(&mut s, 0, 14, 30), add(&mut s, 100, 14, 17));
    s.plan().unwrap();
    assert_eq!(s.planned().room, 12);
    assert_eq!(s.guess(0, &[9; 8]), 2, "the block of 16 tokens is full");
    assert_eq!(s.guess(0, &[9; 8]), 0, "once a plan");
    assert_eq!(s.guess(1, &[9; 8]), 2, "17 tokens, of which the last is drawn");
    assert_eq!((s.planned().room, s.guess(2, &[9])), (8, 0));
    s.commit(&[(first, 9), (second, 9), (second, 9), (second, 9)]).unwrap();
    assert_eq!((s.tokens(second).len(), s.running()), (17, 1), "the second is over");
    s.plan().unwrap();
    assert_eq!(s.guess(0, &[9; 30]), 14, "30 tokens, of which 15 are known and the last is drawn");
}
