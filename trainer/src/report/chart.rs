//! Charts as SVG: lines, dots, bands and bars over two axes, with a key below.
//!
//! A chart knows nothing of runs or metrics. Colours are custom properties of [`STYLE`], light or dark
//! as the reader's system is set: a palette that stays apart for the colour-blind (after Okabe and
//! Ito), told apart by dashes too. Long lines are thinned to [`MOST_POINTS`].

use std::fmt::Write;

use super::text::{escape, short};

/// Colours of the palette; dashes change after each round.
pub(super) const COLOURS: usize = 6;

/// Points of a line that are drawn; more cannot be seen.
const MOST_POINTS: usize = 1500;

/// The look of charts, wherever they stand.
pub(super) const STYLE: &str = "\
:root{color-scheme:light dark;--bg:#fff;--fg:#1a1c20;--dim:#5b626d;--line:#e1e4e9;\
--s0:#0072b2;--s1:#c4500a;--s2:#00805e;--s3:#a34a86;--s4:#7a6a00;--s5:#4f5661}\
@media(prefers-color-scheme:dark){:root{--bg:#15171b;--fg:#e4e7ec;--dim:#a0a8b4;--line:#30353e;\
--s0:#56b4e9;--s1:#ff9a57;--s2:#3fd0a0;--s3:#e79cc6;--s4:#e8dc4f;--s5:#c0c6cf}}\
svg text{fill:var(--dim);font:12px system-ui,sans-serif}svg .title{fill:var(--fg);font-weight:600;font-size:14px}\
.axis{stroke:var(--line);stroke-width:1}.l{fill:none;stroke-width:1.8;stroke-linejoin:round;stroke-linecap:round}\
.b{stroke:none;fill-opacity:.18}.o{fill:none;stroke-width:1.6}.d1{stroke-dasharray:7 4}.d2{stroke-dasharray:2 4}\
.d3{stroke-dasharray:9 3 2 3}.d4{stroke-dasharray:14 4}.d5{stroke-dasharray:5 2}\
.c0{stroke:var(--s0)}.c1{stroke:var(--s1)}.c2{stroke:var(--s2)}.c3{stroke:var(--s3)}.c4{stroke:var(--s4)}.c5{stroke:var(--s5)}\
.f0{fill:var(--s0)}.f1{fill:var(--s1)}.f2{fill:var(--s2)}.f3{fill:var(--s3)}.f4{fill:var(--s4)}.f5{fill:var(--s5)}";

/// A chart.
pub(super) struct Chart {
    /// Stands above it, with the unit of the upright axis.
    pub(super) title: String,
    /// What the flat axis shows.
    pub(super) x_label: &'static str,
    /// How the upright axis is divided.
    pub(super) scale: Scale,
    /// What is drawn, the first at the bottom.
    pub(super) marks: Vec<Mark>,
}

/// How an axis is divided.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Scale {
    Linear,
    /// By powers of ten, from below 1: for counts.
    Log,
}

/// Something drawn, with its name in the key; without a name it has no place there.
pub(super) struct Mark {
    pub(super) label: String,
    /// Which colour of the palette, and beyond it which dash.
    pub(super) colour: usize,
    /// Which dash, on top of that.
    pub(super) dash: usize,
    pub(super) shape: Shape,
}

/// The shape of a mark, in the units of the axes.
pub(super) enum Shape {
    /// A line; a point without a value is a gap.
    Line(Vec<(f64, Option<f64>)>),
    /// Filled dots.
    Dots(Vec<(f64, f64)>),
    /// Hollow dots.
    Rings(Vec<(f64, f64)>),
    /// The space between two lines: `(x, low, high)`.
    Band(Vec<(f64, f64, f64)>),
    /// Bars on the flat axis: `(from, to, height)`.
    Bars(Vec<(f64, f64, f64)>),
}

const WIDTH: f64 = 480.0;
const LEFT: f64 = 58.0;
const RIGHT: f64 = 468.0;
const TOP: f64 = 12.0;
const BOTTOM: f64 = 210.0;
/// Where the key begins, and the height of its rows.
const KEY: f64 = BOTTOM + 52.0;
const ROW: f64 = 18.0;
/// Room for the title in a file of its own.
const TITLE: f64 = 28.0;
/// Width of a character of the key; a guess that is rather too wide.
const CHARACTER: f64 = 6.6;

impl Chart {
    /// A chart over steps.
    pub(super) fn over_steps(title: impl Into<String>, marks: Vec<Mark>) -> Self {
        Self { title: title.into(), x_label: "step", scale: Scale::Linear, marks }
    }

    /// Whether there is nothing to draw.
    pub(super) fn is_empty(&self) -> bool {
        self.marks.iter().all(|mark| mark.shape.ys().is_empty())
    }

    /// The chart as a figure of an HTML page, which has [`STYLE`].
    pub(super) fn figure(&self) -> String {
        let (body, height) = self.body();
        format!(
            "<figure><figcaption>{}</figcaption><svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" \
             aria-label=\"{}\">{body}</svg></figure>",
            escape(&self.title),
            escape(&self.summary())
        )
    }

    /// The chart as an SVG file.
    pub(super) fn file(&self) -> String {
        let (body, height) = self.body();
        let (title, summary) = (escape(&self.title), escape(&self.summary()));
        let all = height + TITLE;
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{all}\" \
             viewBox=\"0 0 {WIDTH} {all}\" role=\"img\" aria-label=\"{summary}\"><style>{STYLE}</style>\
             <rect width=\"100%\" height=\"100%\" style=\"fill:var(--bg)\"/>\
             <text class=\"title\" x=\"12\" y=\"20\">{title}</text>\
             <g transform=\"translate(0 {TITLE})\">{body}</g></svg>\n"
        )
    }

    /// What a reader who does not see the chart is told.
    fn summary(&self) -> String {
        let mut out = self.title.clone();
        for mark in self.marks.iter().filter(|mark| !mark.label.is_empty()) {
            let ys = mark.shape.ys();
            let (Some(first), Some(last)) = (ys.first(), ys.last()) else { continue };
            let _infallible = match mark.shape {
                Shape::Line(_) => {
                    write!(out, "; {} from {} to {}", mark.label, short(*first), short(*last))
                }
                _ => write!(out, "; {}", mark.label),
            };
        }
        out
    }

    fn body(&self) -> (String, f64) {
        let whole = if self.x_label == "step" { Whole::Yes } else { Whole::No };
        let x = Axis::new(self.marks.iter().flat_map(|m| m.shape.xs()), Scale::Linear, whole);
        let y = Axis::new(self.marks.iter().flat_map(|m| m.shape.ys()), self.scale, Whole::No);
        let x = if whole == Whole::Yes { x } else { x.padded() };
        let y = if self.scale == Scale::Linear { y.padded() } else { y };
        let mut out = grid(&x, &y, self.x_label);
        self.marks.iter().for_each(|mark| mark.draw(&mut out, &x, &y));
        let rows = self.key(&mut out);
        (out, KEY - ROW + f64::from(rows) * ROW + 8.0)
    }

    /// Adds the key, and returns how many rows it has.
    fn key(&self, out: &mut String) -> u32 {
        let (mut x, mut row) = (LEFT, 0);
        let named =
            || self.marks.iter().filter(|m| !m.label.is_empty() && !m.shape.ys().is_empty());
        for mark in named() {
            let width = 34.0 + mark.label.chars().count() as f64 * CHARACTER;
            if x > LEFT && x + width > WIDTH {
                (x, row) = (LEFT, row + 1);
            }
            let y = KEY + f64::from(row) * ROW;
            mark.swatch(out, x, y - 4.0);
            *out += &format!("<text x=\"{}\" y=\"{y}\">{}</text>", x + 22.0, escape(&mark.label));
            x += width;
        }
        if named().next().is_some() { row + 1 } else { 0 }
    }
}

impl Mark {
    /// A line.
    pub(super) fn line(
        label: impl Into<String>,
        colour: usize,
        points: Vec<(f64, Option<f64>)>,
    ) -> Self {
        Self { label: label.into(), colour, dash: 0, shape: Shape::Line(points) }
    }

    fn hue(&self) -> usize {
        self.colour % COLOURS
    }

    /// Class of strokes in the mark's colour and dash.
    fn stroke(&self) -> String {
        format!("c{} d{}", self.hue(), (self.colour / COLOURS + self.dash) % COLOURS)
    }

    fn draw(&self, out: &mut String, x: &Axis, y: &Axis) {
        let place = |px: f64, py: f64| {
            (LEFT + x.place(px) * (RIGHT - LEFT), BOTTOM - y.place(py) * (BOTTOM - TOP))
        };
        let at = |px: f64, py: f64| {
            let (px, py) = place(px, py);
            format!("{px:.1},{py:.1}")
        };
        let hue = self.hue();
        match &self.shape {
            Shape::Line(points) => {
                let class = self.stroke();
                for run in runs(points) {
                    let path: Vec<String> = run.iter().map(|(px, py)| at(*px, *py)).collect();
                    let path = path.join(" ");
                    *out += &format!("<polyline class=\"l {class}\" points=\"{path}\"/>");
                }
            }
            Shape::Dots(points) | Shape::Rings(points) => {
                let filled = matches!(self.shape, Shape::Dots(_));
                let class = if filled { format!("f{hue}") } else { format!("o c{hue}") };
                for (px, py) in points {
                    let (cx, cy) = place(*px, *py);
                    *out += &format!(
                        "<circle class=\"{class}\" r=\"3\" cx=\"{cx:.1}\" cy=\"{cy:.1}\"/>"
                    );
                }
            }
            Shape::Band(points) => {
                let low = points.iter().map(|(px, low, _)| at(*px, *low));
                let high = points.iter().rev().map(|(px, _, high)| at(*px, *high));
                let path: Vec<String> = low.chain(high).collect();
                *out += &format!("<polygon class=\"b f{hue}\" points=\"{}\"/>", path.join(" "));
            }
            Shape::Bars(bars) => {
                for (from, to, height) in bars.iter().filter(|(_, _, height)| *height > 0.0) {
                    let ((left, top), (right, _)) = (place(*from, *height), place(*to, *height));
                    *out += &format!(
                        "<rect class=\"f{hue}\" fill-opacity=\".75\" x=\"{left:.1}\" y=\"{top:.1}\" \
                         width=\"{:.1}\" height=\"{:.1}\"/>",
                        (right - left - 0.5).max(0.5),
                        BOTTOM - top
                    );
                }
            }
        }
    }

    /// The mark in small, for the key.
    fn swatch(&self, out: &mut String, x: f64, y: f64) {
        let hue = self.hue();
        *out += &match self.shape {
            Shape::Line(_) => {
                let (class, end) = (self.stroke(), x + 17.0);
                format!("<line class=\"l {class}\" x1=\"{x}\" x2=\"{end}\" y1=\"{y}\" y2=\"{y}\"/>")
            }
            Shape::Dots(_) => {
                format!("<circle class=\"f{hue}\" r=\"3.5\" cx=\"{}\" cy=\"{y}\"/>", x + 9.0)
            }
            Shape::Rings(_) => {
                format!("<circle class=\"o c{hue}\" r=\"3.5\" cx=\"{}\" cy=\"{y}\"/>", x + 9.0)
            }
            Shape::Band(_) | Shape::Bars(_) => {
                let opacity = if matches!(self.shape, Shape::Band(_)) { ".18" } else { ".75" };
                format!(
                    "<rect class=\"f{hue}\" fill-opacity=\"{opacity}\" x=\"{x}\" y=\"{}\" \
                     width=\"17\" height=\"10\"/>",
                    y - 5.0
                )
            }
        };
    }
}

/// The parts of a line between its gaps, thinned; a part of one point has it twice, because a line of
/// some width and round ends is then drawn.
fn runs(points: &[(f64, Option<f64>)]) -> Vec<Vec<(f64, f64)>> {
    let every = points.len().div_ceil(MOST_POINTS).max(1);
    let last = points.len().saturating_sub(1);
    let kept = points.iter().enumerate().filter(|(i, _)| i % every == 0 || *i == last);
    let kept: Vec<_> = kept.map(|(_, (x, y))| y.map(|y| (*x, y))).collect();
    let mut runs: Vec<Vec<(f64, f64)>> =
        kept.split(Option::is_none).map(|run| run.iter().copied().flatten().collect()).collect();
    runs.retain(|run| !run.is_empty());
    runs.iter_mut().filter(|run| run.len() == 1).for_each(|run| run.push(run[0]));
    runs
}

impl Shape {
    fn xs(&self) -> Vec<f64> {
        match self {
            Self::Line(points) => points.iter().map(|(x, _)| *x).collect(),
            Self::Dots(points) | Self::Rings(points) => points.iter().map(|(x, _)| *x).collect(),
            Self::Band(points) => points.iter().map(|(x, ..)| *x).collect(),
            Self::Bars(bars) => bars.iter().flat_map(|(from, to, _)| [*from, *to]).collect(),
        }
    }

    fn ys(&self) -> Vec<f64> {
        match self {
            Self::Line(points) => points.iter().filter_map(|(_, y)| *y).collect(),
            Self::Dots(points) | Self::Rings(points) => points.iter().map(|(_, y)| *y).collect(),
            Self::Band(points) => points.iter().flat_map(|(_, low, high)| [*low, *high]).collect(),
            Self::Bars(bars) => bars.iter().map(|(.., height)| *height).collect(),
        }
    }
}

/// Whether an axis has only whole numbers.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Whole {
    Yes,
    No,
}

/// The range of an axis.
struct Axis {
    low: f64,
    high: f64,
    scale: Scale,
    whole: Whole,
}

impl Axis {
    /// Covers the values; never empty.
    fn new(values: impl Iterator<Item = f64>, scale: Scale, whole: Whole) -> Self {
        let (mut low, mut high) =
            values.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
        if scale == Scale::Log {
            (low, high) = (0.5, high.max(1.0) * 1.5);
        } else if high <= low {
            let margin = low.abs() * 0.1;
            (low, high) = if low == 0.0 { (0.0, 1.0) } else { (low - margin, high + margin) };
        }
        Self { low, high, scale, whole }
    }

    /// With a little room on both sides.
    fn padded(self) -> Self {
        let margin = (self.high - self.low) * 0.04;
        Self { low: self.low - margin, high: self.high + margin, ..self }
    }

    /// Where a value lies, 0 to 1.
    fn place(&self, value: f64) -> f64 {
        match self.scale {
            Scale::Linear => (value - self.low) / (self.high - self.low),
            Scale::Log => (value / self.low).log10() / (self.high / self.low).log10(),
        }
    }

    /// Round numbers in the range, about `count`, with their texts.
    fn ticks(&self, count: f64) -> Vec<(f64, String)> {
        if self.scale == Scale::Log {
            let powers = (0..=self.high.log10().floor() as i32).map(|p| 10f64.powi(p));
            return powers.map(|value| (value, short(value))).collect();
        }
        let rough = (self.high - self.low) / count;
        let power = 10f64.powf(rough.log10().floor());
        let mut step = [1.0, 2.0, 5.0, 10.0].map(|m| m * power).into_iter().find(|s| *s >= rough);
        if self.whole == Whole::Yes {
            step = step.map(|step| step.max(1.0));
        }
        let step = step.unwrap_or(rough);
        let from = (self.low / step).ceil();
        let last = (self.high / step).floor();
        let digits = (-step.log10().floor()).clamp(0.0, 12.0) as usize;
        let text = |value: f64| match value.abs().max(step) {
            // Rounding may leave a minus before zero.
            _ if value.abs() < step * 1e-6 => "0".to_owned(),
            size if size >= 1e6 || step < 1e-5 => format!("{value:.1e}"),
            _ => format!("{value:.digits$}"),
        };
        (0..=(last - from).max(0.0) as u32)
            .map(|i| (from + f64::from(i)) * step)
            .map(|value| (value, text(value)))
            .collect()
    }
}

/// Lines at round heights, and the texts of both axes.
fn grid(x: &Axis, y: &Axis, x_label: &str) -> String {
    let mut out = String::new();
    for (value, text) in y.ticks(5.0) {
        let at = BOTTOM - y.place(value) * (BOTTOM - TOP);
        let _infallible = write!(
            out,
            "<line class=\"axis\" x1=\"{LEFT}\" x2=\"{RIGHT}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>\
             <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{text}</text>",
            LEFT - 6.0,
            at + 4.0
        );
    }
    for (value, text) in x.ticks(6.0) {
        let at = LEFT + x.place(value) * (RIGHT - LEFT);
        let _infallible = write!(
            out,
            "<line class=\"axis\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{BOTTOM}\" y2=\"{}\"/>\
             <text x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\">{text}</text>",
            BOTTOM + 4.0,
            BOTTOM + 17.0
        );
    }
    let middle = (LEFT + RIGHT) / 2.0;
    let _infallible = write!(
        out,
        "<text x=\"{middle}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
        BOTTOM + 33.0,
        escape(x_label)
    );
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(axis: &Axis) -> Vec<String> {
        axis.ticks(5.0).into_iter().map(|(_, text)| text).collect()
    }

    #[test]
    fn ticks_are_round_and_inside() {
        let axis =
            |low: f64, high: f64| Axis::new([low, high].into_iter(), Scale::Linear, Whole::No);
        assert_eq!(texts(&axis(0.0, 1.0)), ["0", "0.2", "0.4", "0.6", "0.8", "1.0"]);
        assert_eq!(texts(&axis(-0.03, 0.05)), ["-0.02", "0", "0.02", "0.04"]);
        assert_eq!(texts(&axis(3.0, 3.0)), ["2.8", "3.0", "3.2"]);
        assert_eq!(texts(&axis(0.0, 4e7)), ["0", "1.0e7", "2.0e7", "3.0e7", "4.0e7"]);
        let steps = Axis::new([1.0, 3.0].into_iter(), Scale::Linear, Whole::Yes);
        assert_eq!(texts(&steps), ["1", "2", "3"]);
        let counts = Axis::new([0.0, 70.0].into_iter(), Scale::Log, Whole::No);
        assert_eq!(texts(&counts), ["1", "10", "100"]);
        assert_eq!(counts.place(0.5), 0.0);
    }

    #[test]
    fn points_span_the_axes_and_gaps_split_the_line() {
        let points = vec![(1.0, Some(0.0)), (2.0, None), (3.0, Some(2.0)), (5.0, Some(4.0))];
        let chart = Chart::over_steps("a<b", vec![Mark::line("x", 0, points)]);
        let svg = chart.figure();
        // The upright axis goes from -0.16 to 4.16.
        assert!(svg.contains("points=\"58.0,202.7 58.0,202.7\""), "{svg}");
        assert!(svg.contains("points=\"263.0,111.0 468.0,19.3\""), "{svg}");
        assert!(svg.contains("<figcaption>a&lt;b</figcaption>"));
        assert!(svg.contains("aria-label=\"a&lt;b; x from 0 to 4\""), "{svg}");
        let flat = Chart::over_steps("flat", vec![Mark::line("", 0, vec![(1.0, Some(3.0))])]);
        assert!(!flat.figure().contains("NaN"));
        assert!(Chart::over_steps("none", vec![Mark::line("x", 0, vec![(1.0, None)])]).is_empty());
    }

    #[test]
    fn all_shapes_are_drawn_and_a_file_stands_alone() {
        let mark =
            |label: &str, colour, shape| Mark { label: label.into(), colour, dash: 0, shape };
        let chart = Chart {
            title: "shapes".into(),
            x_label: "entropy (nats)",
            scale: Scale::Linear,
            marks: vec![
                mark("band", 0, Shape::Band(vec![(0.0, 0.0, 1.0), (1.0, 1.0, 2.0)])),
                mark("bars", 7, Shape::Bars(vec![(0.0, 0.5, 3.0), (0.5, 1.0, 0.0)])),
                mark("dots", 2, Shape::Dots(vec![(0.5, 1.0)])),
                mark("rings & more", 3, Shape::Rings(vec![(0.6, 1.0)])),
            ],
        };
        let svg = chart.file();
        assert!(svg.starts_with("<svg xmlns=") && svg.ends_with("</svg>\n"));
        assert_eq!(svg.matches("<polygon class=\"b f0\"").count(), 1);
        assert_eq!(svg.matches("<rect class=\"f1\"").count(), 2, "one bar and its key");
        assert_eq!(svg.matches("<circle class=\"f2\"").count(), 2);
        assert_eq!(svg.matches("<circle class=\"o c3\"").count(), 2);
        assert!(svg.contains(">rings &amp; more</text>"));
        assert!(svg.contains("prefers-color-scheme:dark"));
    }

    #[test]
    fn long_lines_are_thinned_and_keep_their_end() {
        let points: Vec<_> = (0..10_000).map(|i| (f64::from(i), Some(f64::from(i)))).collect();
        let svg = Chart::over_steps("long", vec![Mark::line("", 0, points)]).figure();
        let path = svg.split("points=\"").nth(1).unwrap().split('"').next().unwrap();
        assert!(path.split(' ').count() <= MOST_POINTS + 1);
        assert!(path.ends_with("468.0,19.3"), "{path}");
    }
}
