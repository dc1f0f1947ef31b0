//! The order in which rows are visited.
//!
//! Each epoch visits every row once, in an order that is a function of (seed, epoch) alone, so a
//! cursor of two numbers resumes a run exactly. A batch that reaches the end of an epoch goes on into
//! the next: no row is dropped.

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

/// Hands out row indices, batch by batch, for ever.
#[derive(Clone, Debug)]
pub struct Sampler {
    visit: Visit,
    cursor: Cursor,
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
        assert!(rows > 0, "a sampler needs rows");
        let mut sampler = Self { visit, cursor, order: (0..rows).collect() };
        sampler.reorder();
        sampler
    }

    /// Where it stands; [`Self::new`] with this cursor continues.
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

    fn reorder(&mut self) {
        if let Visit::Shuffled(seed) = self.visit {
            self.order.sort_unstable();
            Stream::keyed(seed, Purpose::Shuffle, &[self.cursor.epoch]).shuffle(&mut self.order);
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
}
