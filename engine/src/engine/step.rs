//! One step of the engine, and what becomes of a panic in it.
//!
//! ```text
//! plan, guess -> compute (forward, logits, draw) -> accept (samples take their tokens) -> commit
//! ```
//!
//! A slice with guesses (`guess.rs`) has several rows that are drawn from. *accept* takes what was drawn
//! from them one after the other, up to the first token that was guessed wrong; what was drawn behind it
//! was of a text that does not exist.
//!
//! *compute* changes nothing but buffers and the KV slots of its own slices, so it can run again, for
//! all or for some of the slices. That is how [`Engine::step_contained`] finds who is to blame: it runs
//! halves of a batch that has panicked, without guesses, and their halves. What such a run writes is
//! never read: whoever read blocks of a slice that was left out runs again, as the plan is rolled back
//! afterwards and the next one computes the same positions anew. A token depends on seed and position
//! only, so those that go on get the tokens they would have had.
//!
//! Leaves out panics of the scheduler: its state would be unknown, so they reach the caller.

use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};

use scheduler::{SeqId, Slice};

use super::Engine;
use crate::draw::{Drawn, SampleRow, Undrawn, draw, on_all_threads};
use crate::error::{Error, ErrorKind, Result};
use crate::grammar::GrammarState;
use crate::guess;
use crate::memory::LOGIT_ROWS;
use crate::prompt::{self, Scored};
use crate::request::{Continuation, Event, FinishReason, SampleError};
use crate::timings::Batch;

/// What the owner of a sample is told on which a step panicked.
fn panicked() -> SampleError {
    SampleError::Internal("a step panicked on this request".to_owned())
}

/// What the owner of a sample is told that cannot take its token.
fn failure(error: &Error) -> SampleError {
    match error.kind() {
        ErrorKind::Request(why) => SampleError::Request(why.clone()),
        _ => SampleError::Internal(error.to_string()),
    }
}

/// What a batch has computed.
struct Computed {
    /// What was drawn for each row of the sampling slices that is drawn from, in their order, or why
    /// nothing was: for a slice one more than it has guesses.
    draws: Vec<std::result::Result<Drawn, Undrawn>>,
    /// What is known of prompt tokens, for the slices whose samples want it.
    prompts: Vec<Scored>,
}

impl Engine {
    /// Runs one batch and returns what came of it, in the order of the batch.
    ///
    /// A sample whose numbers are not finite ends with `FinishReason::Abort` and an error; the others
    /// go on.
    ///
    /// # Errors
    /// Only for a fault of the engine itself.
    pub fn step(&mut self) -> Result<Vec<Event>> {
        let mut events = self.open_step();
        if self.plan_slices()? {
            self.add_guesses();
            let computed = self.compute(0..self.slices.len());
            self.accept(computed, &mut events)?;
        }
        Ok(events)
    }

    /// Like [`step`](Self::step), but a panic ends only the samples that cause it, each with
    /// `FinishReason::Abort` and an error; the others go on with the tokens they would have had.
    ///
    /// # Errors
    /// When the engine itself is at fault: a step panics twice though none of its sequences does so
    /// alone, or each of several requests does so alone. The engine must not be used any more then.
    pub fn step_contained(&mut self) -> Result<Vec<Event>> {
        let mut events = self.open_step();
        let (mut guessing, mut blameless) = (self.config.speculation.max_guesses > 0, false);
        while self.plan_slices()? {
            let all = 0..self.slices.len();
            let computed = self.attempt(|engine| {
                if guessing {
                    engine.add_guesses();
                }
                engine.compute(all.clone())
            });
            if let Ok(computed) = computed {
                self.accept(computed, &mut events)?;
                break;
            }
            let mut guilty = Vec::new();
            // Nobody is to blame for a text that was only guessed: the batch runs again without.
            if !std::mem::replace(&mut guessing, false) {
                self.blame(all.clone(), &mut guilty);
                if guilty.is_empty() && std::mem::replace(&mut blameless, true) {
                    return Err(Error::internal("a step panicked twice"));
                }
                if guilty.len() == all.len() && self.requests_of(&guilty) > 1 {
                    return Err(Error::internal("a step panicked for each of its requests"));
                }
            }
            self.scheduler.rollback().map_err(|e| Error::internal(e.to_string()))?;
            for seq in guilty {
                self.fail(seq, panicked(), &mut events);
            }
        }
        Ok(events)
    }

    /// What the last step computed.
    pub(crate) fn last_batch(&self) -> Batch<'_> {
        Batch { begun: &self.begun, tokens: self.step_tokens }
    }

    /// Forgets what the step before computed; the events that have waited for this one.
    fn open_step(&mut self) -> Vec<Event> {
        self.begun.clear();
        self.step_tokens = 0;
        std::mem::take(&mut self.pending)
    }

    /// Lets the planned slices run what their samples are guessed to draw next. Costs a look through each
    /// sample's text.
    fn add_guesses(&mut self) {
        let speculation = self.config.speculation;
        if speculation.max_guesses == 0 {
            return;
        }
        let weights = &self.runner.decoder.weights;
        let (level, dtype) = (self.runner.kernels.level(), weights.dtype());
        let balance = guess::balance(level, dtype, weights.quantised());
        let mut rows: usize = self.slices.iter().map(Slice::rows).sum();
        for (at, slice) in self.slices.iter_mut().enumerate().filter(|(_, slice)| slice.samples) {
            let Some(sample) = self.samples.get_mut(&slice.seq) else { continue };
            sample.guesses.renew(self.scheduler.tokens(slice.seq), &speculation);
            let mut guesses = sample.guesses.to_run(speculation.run, rows, balance);
            if let Some(grammar) = &mut sample.grammar {
                guesses = &guesses[..grammar.look_ahead(guesses)];
            }
            slice.guesses = self.scheduler.guess(at, guesses);
            rows += slice.guesses;
        }
    }

    /// Notes what the planned slices compute.
    fn note_batch(&mut self) {
        self.step_tokens = self.slices.iter().map(Slice::rows).sum();
        for slice in &self.slices {
            self.speculation.drafts += u64::from(slice.guesses > 0);
            self.speculation.guessed += slice.guesses as u64;
            if let Some(sample) = self.samples.get_mut(&slice.seq)
                && !std::mem::replace(&mut sample.begun, true)
            {
                self.begun.push((sample.request, sample.index));
            }
        }
    }

    /// Has `fault` called before each batch, with the tokens of its sequences and its guesses; it may
    /// panic. For tests of what a panic leaves behind.
    #[doc(hidden)]
    pub fn inject_fault(&mut self, fault: impl FnMut(&[&[u32]]) + Send + 'static) {
        self.fault = Some(Box::new(fault));
    }

    /// Runs these of the planned slices, scores their prompts, and draws for those that sample.
    fn compute(&mut self, range: std::ops::Range<usize>) -> Computed {
        if let Some(fault) = &mut self.fault {
            let tokens = |slice: &Slice| self.scheduler.tokens_and_guesses(slice.seq);
            fault(&self.slices[range.clone()].iter().map(tokens).collect::<Vec<_>>());
        }
        self.forward(range.clone());
        let slices = &self.slices[range];
        let mut rows = Vec::with_capacity(slices.len());
        let mut end = 0;
        for slice in slices {
            end += slice.rows();
            if slice.samples {
                let row = |guessed| SampleRow {
                    seq: slice.seq,
                    row: end - 1 - slice.guesses + guessed,
                    guessed,
                };
                rows.extend((0..=slice.guesses).map(row));
            }
        }
        let held = (slices, LOGIT_ROWS.min(self.config.max_num_seqs));
        let prompts = prompt::score(&mut self.runner, &self.scheduler, &self.samples, held);
        let mut draws = Vec::with_capacity(rows.len());
        for rows in rows.chunks(LOGIT_ROWS) {
            draws.extend(draw(&mut self.runner, &self.scheduler, &self.samples, rows));
        }
        Computed { draws, prompts }
    }

    /// Runs these slices, then finds what the grammars of their samples allow next.
    fn forward(&mut self, range: std::ops::Range<usize>) {
        let slices = &self.slices[range];
        self.runner.forward(&self.scheduler, slices);
        let has_grammar = |slice: &&Slice| self.samples[&slice.seq].grammar.is_some();
        let guided: HashSet<SeqId> = slices
            .iter()
            .filter(|slice| slice.samples)
            .filter(has_grammar)
            .map(|slice| slice.seq)
            .collect();
        let grammars: Vec<&mut GrammarState> = self
            .samples
            .iter_mut()
            .filter(|(seq, _)| guided.contains(seq))
            .filter_map(|(_, sample)| sample.grammar.as_mut())
            .collect();
        on_all_threads(&self.runner.kernels, grammars.into_iter(), GrammarState::prepare);
    }

    /// What `part` of a step computes, with a panic as a value.
    fn attempt(
        &mut self,
        part: impl FnOnce(&mut Self) -> Computed,
    ) -> std::thread::Result<Computed> {
        // Guesses go with the plan, and buffers are filled anew by each run, see the head of the file.
        catch_unwind(AssertUnwindSafe(|| part(self)))
    }

    /// Appends to `guilty` who of `range`, which has panicked together, does so alone.
    fn blame(&mut self, range: std::ops::Range<usize>, guilty: &mut Vec<SeqId>) {
        if range.len() == 1 {
            if self.attempt(|engine| engine.compute(range.clone())).is_err() {
                guilty.push(self.slices[range.start].seq);
            }
            return;
        }
        let middle = range.start + range.len() / 2;
        for half in [range.start..middle, middle..range.end] {
            if self.attempt(|engine| engine.compute(half.clone())).is_err() {
                self.blame(half, guilty);
            }
        }
    }

    /// Requests that these sequences belong to.
    fn requests_of(&self, sequences: &[SeqId]) -> usize {
        let mut requests: Vec<_> =
            sequences.iter().filter_map(|seq| self.samples.get(seq)).map(|s| s.request).collect();
        requests.sort_unstable();
        requests.dedup();
        requests.len()
    }

    /// Hands the drawn tokens to their samples and commits the plan. A sample that cannot take its
    /// token, be it by a panic of the tokenizer, ends alone.
    fn accept(&mut self, computed: Computed, events: &mut Vec<Event>) -> Result<()> {
        self.note_batch();
        self.accept_prompts(computed.prompts, events);
        let mut sampled = Vec::with_capacity(computed.draws.len());
        let mut draws = computed.draws.into_iter();
        for at in 0..self.slices.len() {
            let slice = self.slices[at];
            if slice.samples {
                let mut rows = draws.by_ref().take(1 + slice.guesses);
                self.take_tokens(&slice, &mut rows, (&mut sampled, events));
                // What is left was drawn behind a wrong guess.
                rows.for_each(drop);
            }
        }
        self.scheduler.commit(&sampled).map_err(|e| Error::internal(e.to_string()))?;
        for (seq, _) in &sampled {
            if !self.samples.contains_key(seq) {
                self.scheduler.finish(*seq);
            }
        }
        self.end_read_prompts(events);
        Ok(())
    }

    /// Hands a sample what was drawn from its rows, as far as its guesses came true.
    fn take_tokens(
        &mut self,
        slice: &Slice,
        rows: &mut dyn Iterator<Item = std::result::Result<Drawn, Undrawn>>,
        (sampled, events): (&mut Vec<(SeqId, u32)>, &mut Vec<Event>),
    ) {
        let (seq, known) = (slice.seq, slice.start + slice.len);
        for (taken, drawn) in rows.enumerate() {
            if !self.samples.contains_key(&seq) {
                return;
            }
            let drawn = match drawn {
                Ok(drawn) => drawn,
                Err(why) => return self.fail_undrawn(seq, &why, events),
            };
            let (token, out) = (drawn.token, (&mut *sampled, &mut *events));
            // What a panic leaves half done is the sample's own text, and the sample goes.
            match catch_unwind(AssertUnwindSafe(|| self.take_token(seq, taken, drawn, out))) {
                Ok(Ok(())) => {}
                Ok(Err(error)) => return self.fail(seq, failure(&error), events),
                Err(_panic) => return self.fail(seq, panicked(), events),
            }
            if self.scheduler.tokens_and_guesses(seq).get(known + taken) != Some(&token) {
                return;
            }
            self.speculation.accepted += 1;
        }
    }

    /// Ends a sample whose numbers allow no token.
    fn fail_undrawn(&mut self, seq: SeqId, why: &Undrawn, events: &mut Vec<Event>) {
        self.nan_logits += u64::from(*why == Undrawn::NotFinite);
        let error = match why {
            Undrawn::NotFinite => SampleError::Internal(why.to_string()),
            Undrawn::Refused(_) => SampleError::Request(why.to_string()),
        };
        self.fail(seq, error, events);
    }

    /// Hands what is known of prompts to their samples; a sample whose numbers are not finite ends.
    fn accept_prompts(&mut self, prompts: Vec<Scored>, events: &mut Vec<Event>) {
        for (seq, start, tokens) in prompts {
            match tokens {
                Err(why) => self.fail_undrawn(seq, &why, events),
                Ok(tokens) => {
                    if let Some(sample) = self.samples.get_mut(&seq) {
                        sample.prompt.take(start, tokens);
                    }
                }
            }
        }
    }

    /// Ends the samples of this batch that draw no token and have read their prompt.
    fn end_read_prompts(&mut self, events: &mut Vec<Event>) {
        for at in 0..self.slices.len() {
            let Slice { seq, start, len, .. } = self.slices[at];
            let Some(sample) = self.samples.get_mut(&seq) else { continue };
            if sample.continuation == Continuation::Sample || start + len < sample.prompt_len {
                continue;
            }
            let cached = self.scheduler.cached_tokens(seq);
            let mut finished = sample.finished(FinishReason::Length, cached);
            finished.prompt = sample.prompt.give();
            events.push(Event::Finished(finished));
            self.forget(seq);
            self.scheduler.finish(seq);
        }
    }
}
