//! Counts of values by upper bound, as Prometheus' histograms have them.
//!
//! Leaves out how they are written down.

/// How many values lay up to each bound, and what they add up to.
///
/// ```
/// use engine::Histogram;
/// let mut seconds = Histogram::new(&[0.5, 1.0]);
/// [0.5, 0.75, 3.0].into_iter().for_each(|value| seconds.add(value));
/// assert_eq!(seconds.cumulative().collect::<Vec<_>>(), [(0.5, 1), (1.0, 2)]);
/// assert_eq!((seconds.count(), seconds.sum()), (3, 4.25));
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Histogram {
    bounds: &'static [f64],
    /// Values above the bound before, up to this one.
    counts: Vec<u64>,
    count: u64,
    sum: f64,
}

impl Histogram {
    /// No values yet; `bounds` rise.
    pub fn new(bounds: &'static [f64]) -> Self {
        Self { bounds, counts: vec![0; bounds.len()], count: 0, sum: 0.0 }
    }

    /// Counts a value, at the first bound that is not below it.
    pub fn add(&mut self, value: f64) {
        if let Some(count) = self.counts.get_mut(self.bounds.partition_point(|b| *b < value)) {
            *count += 1;
        }
        self.count += 1;
        self.sum += value;
    }

    /// Each bound and how many values lay up to it.
    pub fn cumulative(&self) -> impl Iterator<Item = (f64, u64)> + '_ {
        self.bounds.iter().zip(&self.counts).scan(0, |below, (bound, count)| {
            *below += count;
            Some((*bound, *below))
        })
    }

    /// Values so far.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// What they add up to.
    pub fn sum(&self) -> f64 {
        self.sum
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_histogram_counts_up_to_and_including_its_bounds() {
        let mut histogram = Histogram::new(&[1.0, 2.0, 5.0, 10.0, 20.0]);
        for value in [1.0, 1.5, 2.0, 20.0, 21.0] {
            histogram.add(value);
        }
        assert_eq!(histogram.counts, [1, 2, 0, 0, 1]);
        assert_eq!((histogram.count, histogram.sum), (5, 45.5));
        let below: Vec<u64> = histogram.cumulative().map(|(_, below)| below).collect();
        assert_eq!(below, [1, 3, 3, 3, 4]);
    }
}
