//! Means, deviations and percentiles of measured values.

use serde_json::{Map, Value, json};

/// Measured values, in ascending order; none of them NaN.
#[derive(Clone, Debug, Default)]
pub(crate) struct Values(Vec<f64>);

impl Values {
    /// Sorts them.
    pub(crate) fn new(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        Self(values)
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    /// Their mean; 0 without any.
    pub(crate) fn mean(&self) -> f64 {
        self.0.iter().fold(0.0, |sum, x| sum + x) / self.0.len().max(1) as f64
    }

    /// The standard deviation of the values themselves (not of a sample); 0 without any.
    pub(crate) fn deviation(&self) -> f64 {
        let mean = self.mean();
        let squares: f64 = self.0.iter().map(|x| (x - mean).powi(2)).sum();
        (squares / self.0.len().max(1) as f64).sqrt()
    }

    /// The value that `percent` of them do not exceed, linear between neighbours; 0 without any.
    pub(crate) fn percentile(&self, percent: f64) -> f64 {
        let Some(last) = self.0.len().checked_sub(1) else { return 0.0 };
        let place = percent.clamp(0.0, 100.0) / 100.0 * last as f64;
        let (low, share) = (place.floor() as usize, place.fract());
        self.0[low] + share * (self.0[(low + 1).min(last)] - self.0[low])
    }

    /// The one in the middle; 0 without any.
    pub(crate) fn median(&self) -> f64 {
        self.percentile(50.0)
    }

    /// The smallest and the largest; 0 without any.
    pub(crate) fn spread(&self) -> (f64, f64) {
        (self.percentile(0.0), self.percentile(100.0))
    }

    /// Number, median, mean, deviation, smallest, largest and all values, as JSON.
    pub(crate) fn to_json(&self) -> Value {
        let (min, max) = self.spread();
        json!({
            "count": self.len(), "median": self.median(), "mean": self.mean(), "std": self.deviation(),
            "min": min, "max": max, "values": self.0,
        })
    }

    /// `mean_KEY`, `median_KEY`, `std_KEY` and `pNN_KEY` for each of `percentiles`.
    pub(crate) fn record(&self, key: &str, percentiles: &[f64], out: &mut Map<String, Value>) {
        out.insert(format!("mean_{key}"), json!(self.mean()));
        out.insert(format!("median_{key}"), json!(self.median()));
        out.insert(format!("std_{key}"), json!(self.deviation()));
        for percent in percentiles {
            out.insert(format!("p{percent}_{key}"), json!(self.percentile(*percent)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statistics_of_five_values() {
        let values = Values::new(vec![5.0, 1.0, 2.0, 4.0, 3.0]);
        assert_eq!((values.mean(), values.median(), values.spread()), (3.0, 3.0, (1.0, 5.0)));
        assert_eq!(values.deviation(), 2f64.sqrt());
        assert_eq!([values.percentile(25.0), values.percentile(90.0)], [2.0, 4.6]);
        let mut keys = Map::new();
        values.record("ttft_ms", &[50.0, 99.9], &mut keys);
        let names: Vec<&str> = keys.keys().map(String::as_str).collect();
        assert_eq!(
            names,
            ["mean_ttft_ms", "median_ttft_ms", "std_ttft_ms", "p50_ttft_ms", "p99.9_ttft_ms"]
        );
    }

    #[test]
    fn no_values_give_zeros() {
        let none = Values::default();
        assert_eq!((none.mean(), none.deviation(), none.median()), (0.0, 0.0, 0.0));
    }
}
