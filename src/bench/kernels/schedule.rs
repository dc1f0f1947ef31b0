//! What the scheduler itself takes for a step of decoding: planning it, and entering its tokens. No model
//! runs, so there is no limit to compare with; what counts is the share of a model's step, and that the
//! time grows with the number of sequences only.

use scheduler::{Config, NewSequence, PrefixCache, Scheduler, SeqId};

use super::{Ctx, Shape, Work};
use crate::exit::{Failure, Result};

const STEP: &str = "scheduler step";

/// Tokens of a prompt, and of the answer to it.
const LENGTHS: (usize, usize) = (128, 64);
/// Positions of a block.
const BLOCK: usize = 16;

/// Measures steps of 64 to 4,096 sequences; they do not depend on a model.
pub(super) fn measure(ctx: &mut Ctx<'_>, shape: &Shape) -> Result<()> {
    if !ctx.wants(STEP) {
        return Ok(());
    }
    for count in [64, 256, 1024, 4096] {
        let of = format!("{count} sequences at {}", LENGTHS.0);
        let failed = |error: scheduler::Error| Failure::running(format!("{STEP}, {of}: {error}"));
        let mut decoding = Decoding::new(count).map_err(failed)?;
        let mut failure = None;
        ctx.time((STEP, shape, of.clone()), Work { bytes: 0, flop: 0 }, || {
            if failure.is_none() {
                failure = decoding.step().err();
            }
        });
        failure.map_or(Ok(()), |error| Err(failed(error)))?;
    }
    Ok(())
}

/// Sequences that have their prompts behind them.
struct Decoding {
    scheduler: Scheduler,
    count: usize,
    sampled: Vec<(SeqId, u32)>,
}

impl Decoding {
    fn new(count: usize) -> std::result::Result<Self, scheduler::Error> {
        let (input, output) = LENGTHS;
        let length = input + output;
        let scheduler = Scheduler::new(Config {
            block_size: BLOCK,
            num_blocks: count * length.div_ceil(BLOCK),
            max_num_seqs: count,
            max_num_batched_tokens: count * input,
            max_model_len: length,
            prefix_cache: PrefixCache::On,
        })?;
        let mut decoding = Self { scheduler, count, sampled: Vec::new() };
        decoding.begin()?;
        Ok(decoding)
    }

    /// Takes in as many prompts as there are sequences, and runs them.
    fn begin(&mut self) -> std::result::Result<(), scheduler::Error> {
        let (input, output) = LENGTHS;
        for sequence in 0..self.count {
            // No two prompts have a block in common.
            let first = (sequence * input) as u32;
            let prompt = (first..first + input as u32).collect();
            let prefix_cache = PrefixCache::On;
            let new =
                NewSequence { prompt, max_total_tokens: input + output, salt: 0, prefix_cache };
            self.scheduler.add(new)?;
        }
        self.run()
    }

    /// A step of decoding; where the last ended all sequences, new ones are begun.
    fn step(&mut self) -> std::result::Result<(), scheduler::Error> {
        if self.scheduler.is_idle() {
            self.scheduler = Self::new(self.count)?.scheduler;
        }
        self.run()
    }

    fn run(&mut self) -> std::result::Result<(), scheduler::Error> {
        self.sampled.clear();
        let samples = self.scheduler.plan()?.slices.iter().filter(|slice| slice.samples);
        self.sampled.extend(samples.map(|slice| (slice.seq, 7)));
        self.scheduler.commit(&self.sampled)
    }
}
