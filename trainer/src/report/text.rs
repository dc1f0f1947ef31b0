//! Numbers and foreign text as they may stand in HTML and SVG.

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
    fn nothing_foreign_is_markup() {
        assert_eq!(
            escape("<a b='\"c\"'>&\u{0}\n"),
            "&lt;a b=&#39;&quot;c&quot;&#39;&gt;&amp;\u{fffd}\n"
        );
    }
}
