//! Guesses of what a sample draws next: n-gram speculation that changes no bit.
//!
//! A text that repeats itself or its prompt (code that is edited, a passage that is quoted, fields of a
//! table) goes on as it went on before. So the tokens that followed the last occurrence of the text's
//! end are run together with its last token, in the same step, and each of these rows is drawn from
//! as if the guesses before it were its text. As a row depends on nothing but its own text and a
//! draw on nothing but seed and position, the draw from a row whose guesses were all drawn *is* the
//! next token, with the log-probability it would have had; draws behind a wrong guess are dropped.
//! Greedy or sampled, with penalties or a grammar: no acceptance rule is needed, unlike in speculative
//! sampling (arXiv 2211.17192). The idea of the draft is that of prompt lookup decoding.
//!
//! # When a guess is run
//!
//! A step of `B` rows takes about `a + b B`: reading the weights, and multiplying for each row. With
//! `R = a / b` a further row costs `1 / (B + R)` of it and brings a token with the probability `p` that
//! it and the guesses before it come true; the rows there are bring about one each. It pays where
//!
//! ```text
//! p > B / (B + R)
//! ```
//!
//! `p` is what the sample's own guesses have been worth lately. They are compared with what is drawn
//! whether they were run or not, so a text that begins to repeat itself is noticed for the price of the
//! look-up: a pass over the text, and where its last token occurred before, over up to `longest_match`
//! tokens there. Only speed hangs on `R` and `p`.
//!
//! Leaves out drafts by a second model, by other samples, and by what a grammar forces; and that a sample
//! with guesses does not read a shared beginning together with its neighbours.

use kernels::{Dtype, Level};

use crate::config::{RunGuesses, Speculation};

/// What the newest guess counts in the share of those that came true.
const NEWEST: f64 = 0.125;

/// Counts since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SpeculationStats {
    /// Times that guesses of a sample were run.
    pub drafts: u64,
    /// Guesses that were run.
    pub guessed: u64,
    /// Those of them that came true.
    pub accepted: u64,
}

/// Rows whose products take as long as reading the weights that they share: `R` above. Fitted to what
/// decoding took at 1 to 32 sequences; with AMX, whose tiles multiply bf16 alone, to the records of
/// benchmarks.
pub(crate) fn balance(level: Level, dtype: Dtype, quantised: bool) -> f64 {
    match (level, dtype, quantised) {
        (Level::Portable | Level::Reference, ..) => 0.3,
        (Level::Amx, Dtype::Bf16, _) => 30.0,
        (_, _, true) => 2.0,
        (Level::Amx | Level::Avx512, _, false) => 12.0,
        (Level::Avx2, _, false) => 5.0,
    }
}

/// How many of `most` guesses are worth their rows in a step that has `rows` rows, where `hit_rate`
/// of them come true.
fn worthwhile(hit_rate: f64, most: usize, rows: usize, balance: f64) -> usize {
    let mut chance = 1.0;
    let pays = |guess: &usize| {
        chance *= hit_rate;
        let rows = (rows + guess) as f64;
        chance > rows / (rows + balance)
    };
    (0..most).take_while(pays).count()
}

/// What `text` may go on with, `most` tokens: what followed an earlier occurrence of its end, the one that
/// agrees with the end for longest, of equals the last one. Nothing if fewer tokens agree than asked
/// for. What followed may run into the end itself, and then repeats.
fn lookup(text: &[u32], most: usize, (shortest, longest): (usize, usize)) -> Vec<u32> {
    let Some((&last, before)) = text.split_last() else { return Vec::new() };
    let (mut best, mut from) = (shortest - 1, None);
    for end in (1..text.len()).rev().filter(|end| text[end - 1] == last) {
        let agree = |(a, b): &(&u32, &u32)| a == b;
        let earlier = text[..end - 1].iter().rev();
        let pairs = earlier.zip(before.iter().rev()).take(longest - 1);
        let len = 1 + pairs.take_while(agree).count();
        if len > best {
            (best, from) = (len, Some(end));
        }
        if best == longest {
            break;
        }
    }
    let Some(from) = from else { return Vec::new() };
    let period = text.len() - from;
    (0..most).map(|i| text[from + i % period]).collect()
}

/// A sample's guesses and what they were worth.
#[derive(Debug)]
pub(crate) struct Guesses {
    /// What is guessed to come next.
    next: Vec<u32>,
    /// How many of them have come since.
    come: usize,
    /// The share of guesses that came true, the newest counting most.
    hit_rate: f64,
}

impl Guesses {
    pub(crate) fn new() -> Self {
        Self { next: Vec::new(), come: 0, hit_rate: 0.5 }
    }

    /// Guesses anew what follows a text.
    pub(crate) fn renew(&mut self, text: &[u32], speculation: &Speculation) {
        let Speculation { max_guesses, shortest_match, longest_match, .. } = *speculation;
        self.next = lookup(text, max_guesses, (shortest_match, longest_match));
        self.come = 0;
    }

    /// Those to be run in a step that has `rows` rows.
    pub(crate) fn to_run(&self, run: RunGuesses, rows: usize, balance: f64) -> &[u32] {
        match run {
            RunGuesses::All => &self.next,
            RunGuesses::Paying => {
                &self.next[..worthwhile(self.hit_rate, self.next.len(), rows, balance)]
            }
        }
    }

    /// Notes a token that was drawn.
    pub(crate) fn drawn(&mut self, token: u32) {
        let Some(guess) = self.next.get(self.come) else { return };
        let hit = *guess == token;
        self.hit_rate += NEWEST * (f64::from(u8::from(hit)) - self.hit_rate);
        self.come = if hit { self.come + 1 } else { self.next.len() };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_goes_on_as_it_went_on_after_the_longest_match() {
        assert_eq!(lookup(&[1, 2, 3, 4, 1, 2], 3, (2, 16)), [3, 4, 1]);
        // The newer occurrence of 1 2 is shorter than the older one of 9 1 2.
        assert_eq!(lookup(&[9, 1, 2, 5, 1, 2, 6, 9, 1, 2], 1, (2, 16)), [5]);
        // Of equally long ones the newest.
        assert_eq!(lookup(&[1, 2, 5, 1, 2, 6, 1, 2], 1, (2, 16)), [6]);
        assert!(lookup(&[7, 1, 2, 8, 2], 4, (2, 16)).is_empty());
        assert_eq!(lookup(&[7, 1, 2, 8, 2], 2, (1, 16)), [8, 2]);
        assert!(lookup(&[], 4, (1, 16)).is_empty());
        assert!(lookup(&[3], 4, (1, 16)).is_empty());
    }

    #[test]
    fn no_more_is_compared_than_asked_for() {
        let text = [9, 1, 2, 5, 1, 2, 6, 9, 1, 2];
        assert_eq!(lookup(&text, 1, (2, 2)), [6]);
        assert_eq!(lookup(&text, 1, (3, 3)), [5]);
        assert!(lookup(&text, 1, (4, 8)).is_empty());
    }

    #[test]
    fn what_runs_into_the_end_repeats() {
        assert_eq!(lookup(&[5, 5, 5], 4, (2, 16)), [5, 5, 5, 5]);
        assert_eq!(lookup(&[0, 1, 2, 3, 1, 2, 3, 1, 2, 3], 7, (2, 16)), [1, 2, 3, 1, 2, 3, 1]);
    }

    #[test]
    fn guesses_are_run_where_they_pay() {
        // 8 rows for the price of reading the weights: 0.9 > 1 / 9, ..., 0.9^6 = 0.53 > 6 / 14,
        // 0.9^7 = 0.478 > 7 / 15, 0.9^8 = 0.43 < 8 / 16.
        assert_eq!(worthwhile(0.9, 20, 1, 8.0), 7);
        assert_eq!(worthwhile(0.9, 4, 1, 8.0), 4);
        assert_eq!(worthwhile(0.1, 20, 1, 8.0), 0);
        assert_eq!(worthwhile(0.9, 20, 500, 8.0), 0);
        assert_eq!(worthwhile(1.0, 20, 500, 8.0), 20, "a certain token is never lost");
    }

    #[test]
    fn guesses_are_judged_by_what_is_drawn() {
        let mut guesses = Guesses::new();
        let of = Speculation { max_guesses: 3, ..Speculation::default() };
        guesses.renew(&[8, 9, 1, 2, 3, 8, 9], &of);
        assert_eq!(guesses.to_run(RunGuesses::All, 1, 8.0), [1, 2, 3]);
        assert_eq!(guesses.to_run(RunGuesses::Paying, 1, 8.0), [1, 2]);
        guesses.drawn(1);
        guesses.drawn(2);
        assert_eq!(guesses.hit_rate, 0.5 + 0.125 * 0.5 + 0.125 * (1.0 - 0.5625));
        // After a wrong one nothing was guessed.
        let before = guesses.hit_rate;
        guesses.drawn(9);
        guesses.drawn(3);
        assert_eq!(guesses.hit_rate, before * 0.875);
        guesses.renew(&[8, 9], &of);
        guesses.drawn(4);
        assert_eq!(guesses.hit_rate, before * 0.875);
        assert!(guesses.to_run(RunGuesses::All, 1, 8.0).is_empty());
    }
}
