//! Dynamic sampling (DAPO, 2503.14476): groups without signal are left out, and further ones sampled until
//! there are enough, up to a limit.
//!
//! ```text
//!            offer                     enough: Train, the surplus stays for the next step
//! kept, 0 --------> kept, generation --<
//!                                      not enough: Generate, or at the limit Short
//! ```
//!
//! verl throws surplus groups away and fails at the limit; here both are for the caller to decide, and
//! nothing is lost. Where no limit is set, [`MAX_BARREN_BATCHES`] in a row without a single group of signal are
//! one, so that sampling always ends. Leaves out what a group is and how it is sampled.

/// Batches in a row that may bring nothing, whatever the limit on all of them.
pub const MAX_BARREN_BATCHES: usize = 100;

/// Groups kept for a step.
#[derive(Clone, Debug)]
pub struct GroupFilter<G> {
    wanted: usize,
    /// 0 for no limit.
    max_batches: usize,
    batches: usize,
    /// The latest of them, without a group to keep.
    barren: usize,
    dropped: usize,
    kept: Vec<G>,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Sample another batch.
    Generate,
    /// There are enough groups.
    Train,
    /// There are too few, and as many batches as allowed have been sampled, of all or of those that bring
    /// nothing.
    Short,
}

impl<G> GroupFilter<G> {
    /// A filter that wants `wanted` groups a step from at most `max_batches` batches (0: any number).
    /// `kept` are groups of an earlier step.
    ///
    /// ```
    /// use trainer::filter::{GroupFilter, Next};
    /// let mut filter = GroupFilter::new(2, 10, vec![]);
    /// assert_eq!(filter.next(), Next::Generate);
    /// filter.offer([("a", true), ("b", false)]);
    /// assert_eq!(filter.next(), Next::Generate);
    /// filter.offer([("c", true), ("d", true)]);
    /// assert_eq!(filter.next(), Next::Train);
    /// assert_eq!(filter.take(), ["a", "c"]);
    /// assert_eq!(filter.into_kept(), ["d"]);
    /// ```
    pub fn new(wanted: usize, max_batches: usize, kept: Vec<G>) -> Self {
        Self { wanted, max_batches, batches: 0, barren: 0, dropped: 0, kept }
    }

    /// Takes a sampled batch: each group and whether it carries signal
    /// ([`crate::advantage::has_signal`]).
    pub fn offer(&mut self, batch: impl IntoIterator<Item = (G, bool)>) {
        self.batches += 1;
        let before = self.kept.len();
        for (group, has_signal) in batch {
            match has_signal {
                true => self.kept.push(group),
                false => self.dropped += 1,
            }
        }
        self.barren = if self.kept.len() > before { 0 } else { self.barren + 1 };
    }

    /// What to do next.
    pub fn next(&self) -> Next {
        if self.kept.len() >= self.wanted {
            Next::Train
        } else if self.max_batches > 0 && self.batches >= self.max_batches
            || self.barren >= MAX_BARREN_BATCHES
        {
            Next::Short
        } else {
            Next::Generate
        }
    }

    /// Takes the groups of the step out, in the order they came: as many as wanted, or all there are.
    pub fn take(&mut self) -> Vec<G> {
        let count = self.wanted.min(self.kept.len());
        self.kept.drain(..count).collect()
    }

    /// The groups kept so far.
    pub fn kept(&self) -> &[G] {
        &self.kept
    }

    /// The groups that are left for the next step.
    pub fn into_kept(self) -> Vec<G> {
        self.kept
    }

    /// Batches taken so far.
    pub fn batches(&self) -> usize {
        self.batches
    }

    /// Groups left out so far.
    pub fn dropped(&self) -> usize {
        self.dropped
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn at_the_limit_the_step_is_short_and_keeps_what_it_has() {
        let mut filter = GroupFilter::new(3, 2, vec![7]);
        filter.offer([(8, false), (9, false)]);
        assert_eq!(filter.next(), Next::Generate);
        filter.offer([(10, true), (11, false)]);
        assert_eq!((filter.next(), filter.batches(), filter.dropped()), (Next::Short, 2, 3));
        assert_eq!(filter.take(), [7, 10]);
        assert!(filter.into_kept().is_empty());
    }

    #[test]
    fn without_a_limit_sampling_ends_when_it_brings_nothing() {
        let mut filter = GroupFilter::new(2, 0, vec![]);
        for batch in 0..500 {
            assert_eq!(filter.next(), Next::Generate, "batch {batch}");
            filter.offer([(batch, batch == 400)]);
            if filter.next() == Next::Short {
                break;
            }
        }
        assert_eq!((filter.batches(), filter.kept().len()), (MAX_BARREN_BATCHES, 0));
        let mut some = GroupFilter::new(2, 0, vec![]);
        (0..MAX_BARREN_BATCHES - 1).for_each(|batch| some.offer([(batch, false)]));
        some.offer([(0, true)]);
        assert_eq!(some.next(), Next::Generate, "one group begins the count anew");
    }

    #[test]
    fn groups_left_over_may_be_enough_for_a_step() {
        let filter = GroupFilter::new(2, 1, vec![1, 2, 3]);
        assert_eq!((filter.next(), filter.batches()), (Next::Train, 0));
        assert_eq!(GroupFilter::<u8>::new(1, 0, vec![]).next(), Next::Generate);
    }
}
