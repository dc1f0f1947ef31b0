//! Figures as a Markdown table, and as JSON.

use serde_json::Value;

use super::{Figure, figure_json};
use crate::bench::limits::Peaks;

/// The table, with a column for one thread where `single` has the same figures on one.
pub(super) fn markdown(figures: &[Figure], single: Option<&[Figure]>, peaks: &Peaks) -> String {
    let mut lines = vec![
        format!(
            "| operation | model | shape | MB | GFLOP | limit ms | measured ms | share |{}",
            if single.is_some() { " threads |" } else { "" }
        ),
        format!("|---|---|---|--:|--:|--:|--:|--:|{}", if single.is_some() { "--:|" } else { "" }),
    ];
    for (i, figure) in figures.iter().enumerate() {
        let (limit, median) = (figure.limit(peaks), figure.seconds.median());
        let speedup = single.map(|single| single[i].seconds.median() / median);
        lines.push(format!(
            "| {} | {} | {} | {:.2} | {:.3} | {:.3} | {:.3} | {} |{}",
            figure.operation,
            figure.model,
            figure.shape,
            figure.bytes / 1e6,
            figure.flop / 1e9,
            1e3 * limit,
            1e3 * median,
            if limit > 0.0 { format!("{:.0} %", 100.0 * limit / median) } else { "-".to_owned() },
            speedup.map(|speedup| format!(" {speedup:.2} x |")).unwrap_or_default()
        ));
    }
    lines.join("\n")
}

/// The same with all that was measured.
pub(super) fn to_json(figures: &[Figure], single: Option<&[Figure]>, peaks: &Peaks) -> Vec<Value> {
    let one = |(i, figure)| figure_json(figure, single.map(|single| &single[i]), peaks);
    figures.iter().enumerate().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::numbers::Values;

    fn figure(seconds: f64) -> Figure {
        Figure {
            operation: "product forward",
            model: "tiny",
            shape: "M 1".to_owned(),
            bytes: 2e6,
            flop: 1e6,
            seconds: Values::new(vec![seconds; 3]),
        }
    }

    #[test]
    fn a_row_has_the_limit_the_share_and_the_gain_of_threads() {
        let peaks = Peaks { flops: 1e9, bytes: 1e9 };
        let (two, one) = ([figure(4e-3)], [figure(6e-3)]);
        let table = markdown(&two, Some(&one), &peaks);
        let row = "| product forward | tiny | M 1 | 2.00 | 0.001 | 2.000 | 4.000 | 50 % | 1.50 x |";
        assert_eq!(table.lines().nth(2), Some(row));
        let json = &to_json(&two, None, &peaks)[0];
        assert_eq!((&json["share_of_limit"], &json["one_thread_s"]), (&0.5.into(), &Value::Null));
    }
}
