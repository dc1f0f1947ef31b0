//! A line chart as inline SVG.

/// A named line; a point without a value is a gap.
pub(super) struct Series {
    pub(super) label: String,
    pub(super) points: Vec<(f64, Option<f64>)>,
}

const WIDTH: f64 = 420.0;
const HEIGHT: f64 = 220.0;
const LEFT: f64 = 52.0;
const RIGHT: f64 = 410.0;
const TOP: f64 = 10.0;
const BOTTOM: f64 = 196.0;
const COLOURS: usize = 4;

/// The range of an axis.
struct Axis {
    low: f64,
    high: f64,
}

impl Axis {
    /// Covers the values; never empty.
    fn new(values: impl Iterator<Item = f64>) -> Self {
        let (low, high) =
            values.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
        if high > low {
            Self { low, high }
        } else {
            let margin = if low == 0.0 { 1.0 } else { low.abs() * 0.1 };
            Self { low: low - margin, high: low + margin }
        }
    }

    /// Where a value lies, 0 to 1.
    fn place(&self, value: f64) -> f64 {
        (value - self.low) / (self.high - self.low)
    }
}

/// The chart of some series; empty if none has a point.
pub(super) fn chart(title: &str, series: &[Series]) -> String {
    if series.iter().all(|s| s.points.iter().all(|(_, y)| y.is_none())) {
        return String::new();
    }
    let points = || series.iter().flat_map(|s| &s.points);
    let x = Axis::new(points().map(|(x, _)| *x));
    let y = Axis::new(points().filter_map(|(_, y)| *y));
    let mut body = grid(&x, &y);
    let mut keys = String::new();
    for (index, s) in series.iter().enumerate() {
        let colour = index % COLOURS;
        for run in s.points.split(|(_, value)| value.is_none()).filter(|run| !run.is_empty()) {
            let place = |(px, py): &(f64, Option<f64>)| {
                let across = LEFT + x.place(*px) * (RIGHT - LEFT);
                let down = BOTTOM - y.place(py.unwrap_or(y.low)) * (BOTTOM - TOP);
                format!("{across:.1},{down:.1}")
            };
            let path: Vec<String> = run.iter().map(place).collect();
            // A line of one point would not be drawn; with round ends of some length it is.
            let path = if path.len() == 1 { vec![path[0].clone(); 2] } else { path };
            body += &format!(
                "<polyline class=\"line c{colour}\" stroke-linecap=\"round\" points=\"{}\"/>",
                path.join(" ")
            );
        }
        keys += &format!("<span class=\"key k{colour}\">■ {}</span>", escape(&s.label));
    }
    let title = escape(title);
    format!(
        "<figure><figcaption>{title}</figcaption><svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" \
         aria-label=\"{title}\">{body}</svg><div>{keys}</div></figure>"
    )
}

/// Lines at five heights with their values, and the first and last step.
fn grid(x: &Axis, y: &Axis) -> String {
    let mut out = String::new();
    for tick in 0..5 {
        let share = f64::from(tick) / 4.0;
        let (at, value) = (BOTTOM - share * (BOTTOM - TOP), y.low + share * (y.high - y.low));
        out += &format!(
            "<line class=\"axis\" x1=\"{LEFT}\" x2=\"{RIGHT}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>\
             <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            LEFT - 6.0,
            at + 4.0,
            short(value)
        );
    }
    for (at, value, anchor) in [(LEFT, x.low, "start"), (RIGHT, x.high, "end")] {
        out += &format!(
            "<text x=\"{at}\" y=\"{}\" text-anchor=\"{anchor}\">step {}</text>",
            BOTTOM + 18.0,
            short(value)
        );
    }
    out
}

/// A number with four significant digits.
pub(super) fn short(value: f64) -> String {
    if value == 0.0 {
        return "0".to_owned();
    }
    let magnitude = value.abs().log10().floor();
    if !(-4.0..7.0).contains(&magnitude) {
        return format!("{value:.3e}");
    }
    let digits = (3.0 - magnitude).max(0.0) as usize;
    let text = format!("{value:.digits$}");
    if text.contains('.') {
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    } else {
        text
    }
}

/// Text as it may stand in HTML, in an attribute too.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            '\'' => out += "&#39;",
            // HTML has no way to write the others.
            '\n' | '\t' => out.push(c),
            c if c.is_control() => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        let shown = [0.0, 0.25, -1.0, 1234.56, 12_345_678.0, 1e-5, 0.000_123_4, 100.0].map(short);
        assert_eq!(shown, ["0", "0.25", "-1", "1235", "1.235e7", "1.000e-5", "0.0001234", "100"]);
    }

    #[test]
    fn points_span_the_axes_and_gaps_split_the_line() {
        let points = vec![(1.0, Some(0.0)), (2.0, None), (3.0, Some(2.0)), (5.0, Some(4.0))];
        let svg = chart("a<b", &[Series { label: "x".into(), points }]);
        assert!(svg.contains("points=\"52.0,196.0 52.0,196.0\""), "{svg}");
        assert!(svg.contains("points=\"231.0,103.0 410.0,10.0\""), "{svg}");
        assert!(svg.contains("a&lt;b"));
        let flat = vec![(1.0, Some(3.0))];
        assert!(!chart("flat", &[Series { label: "x".into(), points: flat }]).contains("NaN"));
        assert_eq!(chart("none", &[Series { label: "x".into(), points: vec![(1.0, None)] }]), "");
    }
}
