//! The order in which rows are visited.
//!
//! Without weights an epoch visits every row once. With weights it is as long as all rows together, and
//! every part (a file) has its share of it: as many whole copies as fit, and a choice of its rows for the
//! rest, another one each epoch. Both are functions of (seed, epoch) alone, so a cursor of two numbers
//! resumes a run exactly. A batch that reaches the end of an epoch goes on into the next: no row is
//! dropped.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::random::{Purpose, Stream};

/// Where a sampler stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cursor {
    /// Epochs completed.
    pub epoch: u64,
    /// Rows visited in this epoch.
    pub position: u64,
}

/// The order within an epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Visit {
    /// As in the files.
    InOrder,
    /// A new random order each epoch, from this seed.
    Shuffled(u64),
}

/// Rows that belong together, and how often they are visited.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    /// Their indices.
    pub rows: Range<usize>,
    /// Their share of an epoch, relative to that of the other parts.
    pub weight: f64,
}

/// Hands out row indices, batch by batch, for ever.
#[derive(Clone, Debug)]
pub struct Sampler {
    visit: Visit,
    cursor: Cursor,
    /// Rows and how many of an epoch are theirs.
    parts: Vec<(Range<usize>, usize)>,
    order: Vec<usize>,
}

impl Sampler {
    /// A sampler over `rows` rows that stands at `cursor`.
    ///
    /// # Panics
    /// If there are no rows.
    ///
    /// ```
    /// use trainer::data::{Cursor, Sampler, Visit};
    /// let mut sampler = Sampler::new(3, Visit::InOrder, Cursor::default());
    /// assert_eq!(sampler.next_batch(4), [0, 1, 2, 0]);
    /// assert_eq!(sampler.cursor(), Cursor { epoch: 1, position: 1 });
    /// ```
    pub fn new(rows: usize, visit: Visit, cursor: Cursor) -> Self {
        Self::with_parts(vec![(0..rows, rows)], visit, cursor)
    }

    /// A sampler over parts by their weights. Shares are rounded by the largest remainder, the first part
    /// first; a part of weight 0 is not visited.
    ///
    /// # Panics
    /// If no part with rows has a weight above 0.
    ///
    /// ```
    /// use trainer::data::{Cursor, Part, Sampler, Visit};
    /// let parts = [Part { rows: 0..2, weight: 2.0 }, Part { rows: 2..6, weight: 1.0 }];
    /// let mut sampler = Sampler::mixed(&parts, Visit::InOrder, Cursor::default());
    /// assert_eq!(sampler.next_batch(6), [0, 1, 0, 1, 2, 3]);
    /// assert_eq!(sampler.next_batch(6), [0, 1, 0, 1, 4, 5]);
    /// ```
    pub fn mixed(parts: &[Part], visit: Visit, cursor: Cursor) -> Self {
        let weight = |part: &Part| if part.rows.is_empty() { 0.0 } else { part.weight };
        let sum: f64 = parts.iter().map(weight).sum();
        assert!(sum > 0.0, "no part has both rows and a weight above 0");
        let epoch: usize = parts.iter().map(|part| part.rows.len()).sum();
        let exact: Vec<f64> = parts.iter().map(|p| epoch as f64 * (weight(p) / sum)).collect();
        let mut shares: Vec<usize> = exact.iter().map(|share| share.floor() as usize).collect();
        let mut by_rest: Vec<usize> = (0..parts.len()).collect();
        by_rest.sort_by(|a, b| exact[*b].fract().total_cmp(&exact[*a].fract()));
        let missing = epoch.saturating_sub(shares.iter().sum());
        by_rest.iter().take(missing).for_each(|part| shares[*part] += 1);
        let parts = parts.iter().map(|part| part.rows.clone()).zip(shares);
        Self::with_parts(parts.collect(), visit, cursor)
    }

    fn with_parts(parts: Vec<(Range<usize>, usize)>, visit: Visit, cursor: Cursor) -> Self {
        let mut sampler = Self { visit, cursor, parts, order: Vec::new() };
        sampler.reorder();
        assert!(!sampler.order.is_empty(), "a sampler needs rows");
        sampler
    }

    /// Where it stands; a sampler over the same rows with this cursor continues.
    pub fn cursor(&self) -> Cursor {
        self.cursor
    }

    /// The next `count` rows, and moves past them.
    pub fn next_batch(&mut self, count: usize) -> Vec<usize> {
        (0..count).map(|_| self.next_row()).collect()
    }

    fn next_row(&mut self) -> usize {
        if self.cursor.position >= self.order.len() as u64 {
            self.cursor = Cursor { epoch: self.cursor.epoch + 1, position: 0 };
            self.reorder();
        }
        let row = self.order[self.cursor.position as usize];
        self.cursor.position += 1;
        row
    }

    /// Makes the order of the epoch that the cursor is in.
    fn reorder(&mut self) {
        let epoch = self.cursor.epoch;
        self.order.clear();
        for (index, (rows, share)) in self.parts.iter().enumerate() {
            let len = rows.len().max(1);
            (0..share / len).for_each(|_| self.order.extend(rows.clone()));
            let rest = share % len;
            match self.visit {
                Visit::InOrder => {
                    let from = (epoch as u128 * rest as u128 % len as u128) as usize;
                    self.order.extend((from..from + rest).map(|i| rows.start + i % len));
                }
                Visit::Shuffled(seed) if rest > 0 => {
                    let mut all: Vec<usize> = rows.clone().collect();
                    let key = [epoch, index as u64];
                    let taken = Stream::keyed(seed, Purpose::Shuffle, &key).choose(&mut all, rest);
                    self.order.extend(&all[..taken]);
                }
                Visit::Shuffled(_) => {}
            }
        }
        if let Visit::Shuffled(seed) = self.visit {
            Stream::keyed(seed, Purpose::Shuffle, &[epoch]).shuffle(&mut self.order);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn epochs_are_permutations_and_a_cursor_resumes_anywhere() {
        let mut sampler = Sampler::new(10, Visit::Shuffled(4), Cursor::default());
        let all = sampler.next_batch(30);
        assert_ne!(all[..10], all[10..20]);
        for epoch in all.chunks(10) {
            let mut sorted = epoch.to_vec();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..10).collect::<Vec<_>>());
        }
        for stop in 0..30 {
            let mut first = Sampler::new(10, Visit::Shuffled(4), Cursor::default());
            first.next_batch(stop);
            let mut rest = Sampler::new(10, Visit::Shuffled(4), first.cursor());
            assert_eq!(rest.next_batch(30 - stop), all[stop..], "seed 4, stop {stop}");
        }
    }

    #[test]
    fn weights_give_shares_and_a_cursor_resumes_a_mixture() {
        let parts = [
            Part { rows: 0..10, weight: 1.0 },
            Part { rows: 10..14, weight: 1.0 },
            Part { rows: 14..20, weight: 0.0 },
        ];
        let mut sampler = Sampler::mixed(&parts, Visit::Shuffled(7), Cursor::default());
        let all = sampler.next_batch(60);
        let mut seen = [0; 20];
        all[..20].iter().for_each(|row| seen[*row] += 1);
        assert_eq!(seen[..10], [1; 10]);
        assert!(seen[10..14].iter().all(|n| *n == 2 || *n == 3), "{seen:?}");
        assert_eq!((seen[10..14].iter().sum::<i32>(), seen[14..].iter().sum()), (10, 0));
        for stop in [1, 20, 33] {
            let mut first = Sampler::mixed(&parts, Visit::Shuffled(7), Cursor::default());
            first.next_batch(stop);
            let mut rest = Sampler::mixed(&parts, Visit::Shuffled(7), first.cursor());
            assert_eq!(rest.next_batch(60 - stop), all[stop..], "stop {stop}");
        }
        // Over many epochs the rows of the part that is cut come equally often.
        let mut cut = Sampler::mixed(
            &[Part { rows: 0..5, weight: 3.0 }, Part { rows: 5..15, weight: 1.0 }],
            Visit::InOrder,
            Cursor::default(),
        );
        let mut seen = [0; 15];
        cut.next_batch(15 * 20).iter().for_each(|row| seen[*row] += 1);
        assert_eq!((seen[0], seen[5], seen[14]), (44, 8, 8), "{seen:?}");
    }
}
