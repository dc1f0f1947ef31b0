//! Pairs of answers that are the same or not, hostile answers, and random ones.

use proptest::prelude::*;

use super::equivalent;
use crate::verifier::tests::cpu_seconds;

/// Pairs that are the same answer.
const SAME: [(&str, &str); 75] = [
    ("42.0", "42"),
    (r"\frac{2}{4}", r"\frac12"),
    (r"\frac1{72}", "1/72"),
    (r"\tfrac{1}{2}", ".5"),
    (r"0.\overline{3}", r"\frac13"),
    (r"-\frac{7}{3}", r"\frac{-7}{3}"),
    (r"-\frac{7}{3}", r"\frac{7}{-3}"),
    ("1,234,567", "1234567"),
    (r"1{,}234", "1234"),
    ("1.5e3", "1500"),
    (r"1.5 \times 10^{3}", "1500"),
    (r"2^{10}", "1024"),
    ("2**10", "1024"),
    ("5!", "120"),
    (r"\binom{5}{2}", "10"),
    (r"3\frac{1}{2}", "7/2"),
    ("3 1/2", "3.5"),
    (r"33\frac13\%", r"\frac{100}{3}\%"),
    (r"\sqrt{12}", r"2\sqrt3"),
    (r"\frac{1}{\sqrt{3}}", r"\frac{\sqrt{3}}{3}"),
    (r"\sqrt[3]{54}", r"3\sqrt[3]{2}"),
    (r"\sqrt[3]{-8}", "-2"),
    (r"8^{2/3}", "4"),
    (r"\sqrt{3+2\sqrt{2}}", r"1+\sqrt2"),
    (r"\frac{1}{1+\sqrt2}", r"\sqrt{2}-1"),
    (r"\sqrt{-4}", "2i"),
    (r"i^2", "-1"),
    (r"\frac{1}{i}", "-i"),
    (r"(1+i)(1-i)", "2"),
    (r"2\pi", r"2 \cdot \pi"),
    ("2pi", r"2\pi"),
    (r"\frac{\pi}{2}+\frac{\pi}{2}", "π"),
    (r"e^{\ln 5}", "5"),
    (r"\log_2 8", "3"),
    (r"\log_{10} 1000", "3"),
    (r"\ln 12", r"2\ln 2 + \ln 3"),
    (r"\log_{6} 36", "2"),
    (r"\sin 30^\circ", r"\frac{1}{2}"),
    (r"\sin^2 x + \cos^2 x", "1"),
    (r"\sin 2x", r"2 \sin x \cos x"),
    (r"\tan\left(\frac{\pi}{4}\right)", "1"),
    (r"\cos^{-1} 0", r"\pi/2"),
    (r"|{-3}|", "3"),
    (r"|x|", r"\sqrt{x^2}"),
    (r"\lfloor 2.7 \rfloor", "2"),
    ("(x+1)^2", "x^2+2x+1"),
    (r"\frac{x^2-1}{x-1}", "x+1"),
    (r"x\cdot y^{-1}", r"\frac{x}{y}"),
    ("ab+ba", "2ab"),
    ("(1, 2)", r"\left(1,2\right)"),
    (r"(-\infty, 3]", r"\left(-\infty,\, \frac{6}{2}\right]"),
    (r"\{1,2,3\}", r"\{3,1,2\}"),
    ("1, 2 and 3", "3,2,1"),
    (r"\pm 3", "3, -3"),
    (r"1\pm\sqrt{2}", r"1+\sqrt2, 1-\sqrt2"),
    (r"x=\pm 2", "-2,2"),
    (r"(1,2)\cup(3,4)", r"(3,4) \cup (1,2)"),
    (r"\begin{bmatrix}1&2\\3&4\end{bmatrix}", r"\begin{pmatrix} 1 & 4/2 \\ 3 & 4 \end{pmatrix}"),
    ("x = 5", "5"),
    ("f(x) = x^2+1", "1+x^2"),
    (r"x \in [1,2]", "[1,2]"),
    ("y=2x+1", "2x-y+1=0"),
    ("x=1, y=2", "y=2, x=1"),
    ("x>3", "3<x"),
    ("B", r"\text{(B)}"),
    (r"\textbf{b}", "(B)"),
    ("No solution", r"\text{no solution}"),
    (r"90^{\circ}", "90"),
    ("90 degrees", r"90^\circ"),
    ("30°", r"\frac{\pi}{6}"),
    (r"50\%", "1/2"),
    ("12 apples", "12"),
    (r"2\pi\text{ cm}^2", r"2\pi"),
    (r"\$1,000.50", "1000.5"),
    ("$x^2$.", r"x^{2}"),
];

/// Pairs that are not.
const DIFFERENT: [(&str, &str); 50] = [
    ("41", "42"),
    ("", ""),
    ("6.2832", r"2\pi"),
    ("3.14159265358979", r"\pi"),
    ("1.4142135623730951", r"\sqrt{2}"),
    ("2.414213562373095", r"\sqrt{3+2\sqrt{2}}"),
    ("0.333333", r"\frac13"),
    (r"10^{300}", r"10^{300}+1"),
    (r"2^{4000}", r"2^{4000}+1"),
    (r"2^{100000}", r"2^{100001}"),
    ("9^9^9", "9^9^8"),
    ("1,2", "12"),
    ("(1234)", "(1,234)"),
    ("1,23", "123"),
    ("(2,1)", "(1,2)"),
    ("[1,2]", "(1,2)"),
    ("(1,2]", "(1,2)"),
    ("(1,2)", "(1,2,3)"),
    (r"\{1,2\}", r"\{1,2,3\}"),
    ("1,1,2", "1,2,2"),
    (r"\pm 3", "3"),
    (r"\sqrt{x^2}", "x"),
    (r"\ln x^2", r"2 \ln(-x)"),
    ("x^2", "x^3"),
    ("x+y", "x-y"),
    ("1 million", "1000000"),
    ("12 cm", "12 m"),
    (r"12\text{ cm}", r"12\text{ inches}"),
    ("50%", "5"),
    ("90", r"91^\circ"),
    ("x=5", "y=5"),
    ("x=5", "x=6"),
    ("x=5", "x^2=25"),
    ("x>3", "x<3"),
    ("x>3", "x \\ge 3"),
    ("A", "B"),
    ("Monday", "Tuesday"),
    ("xyz", "zyx"),
    ("no", "on"),
    ("Monday", "5"),
    (r"\frac{1}{0}", r"\frac{2}{0}"),
    ("3 4", "12"),
    ("5!!", "120"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}"),
    (r"\sqrt{-4}", "2"),
    (r"0^{-1}", "0"),
    (r"\text{even}", r"\text{odd}"),
    (r"\infty", r"-\infty"),
    (r"\sin x", r"\sin y"),
    (r"{", r"}"),
];

#[test]
fn the_same_answers_are_equivalent_both_ways() {
    for (a, b) in SAME {
        assert!(equivalent(a, b), "{a} is {b}");
        assert!(equivalent(b, a), "{b} is {a}");
        assert!(equivalent(a, a), "{a} is itself");
    }
}

#[test]
fn different_answers_are_not_equivalent() {
    for (a, b) in DIFFERENT {
        assert!(!equivalent(a, b), "{a} is not {b}");
        assert!(!equivalent(b, a), "{b} is not {a}");
    }
}

/// Answers that would take for ever, or a deep stack, if nothing were bounded.
#[test]
fn hostile_answers_end_quickly() {
    let within = |open: &str, close: &str| format!("{}x{}", open.repeat(300), close.repeat(300));
    let hostile = [
        within("(", ")"),
        within("{", "}"),
        within("-(", ")"),
        within("|", "|"),
        within(r"\sqrt{", "}"),
        "9^".repeat(900) + "9",
        "500!*".repeat(390) + "1",
        "(a+b+c+d)^9*".repeat(160) + "1",
        "(1/3+x)^400*".repeat(160) + "1",
        "1/1234567+".repeat(190) + "x",
        r"\sqrt{99999999977}+".repeat(100) + "1",
        "1,".repeat(990) + "1",
        "x!!!!!".repeat(300),
        "9".repeat(1990),
        "-".repeat(1990) + "1",
        r"\frac".repeat(390) + "1",
        r"\frac12".repeat(280),
        "1 1/2 ".repeat(300),
        r"\binom{500}{250}*".repeat(110) + "1",
        "7^4999*".repeat(280) + "1",
        "\\pm 1".repeat(390),
    ];
    let mut slowest: f64 = 0.0;
    for text in &hostile {
        let start = cpu_seconds();
        assert!(!equivalent(text, "17/3+x^7"), "{text}");
        let seconds = cpu_seconds() - start;
        if seconds > slowest {
            println!("{:.1} ms for {}", seconds * 1e3, &text[..20]);
            slowest = seconds;
        }
        let _either = equivalent(text, &format!("1*{text}"));
    }
    assert!(slowest < 2.0, "{slowest} s");
}

proptest! {
    #[test]
    fn any_text_gets_a_verdict(a in "\\PC{0,80}", b in "\\PC{0,80}") {
        prop_assert_eq!(equivalent(&a, &b), equivalent(&b, &a));
    }

    #[test]
    fn any_mathematics_gets_a_verdict(
        parts in prop::collection::vec(prop::sample::select(&PIECES[..]), 0..40),
        other in prop::collection::vec(prop::sample::select(&PIECES[..]), 0..40),
    ) {
        let (a, b) = (parts.concat(), other.concat());
        prop_assert_eq!(equivalent(&a, &b), equivalent(&b, &a));
    }

    #[test]
    fn rationals_are_compared_exactly(a in -999i64..999, b in 1i64..999, k in 1i64..99) {
        let (plain, scaled) = (format!("{a}/{b}"), format!(r"\frac{{{}}}{{{}}}", a * k, b * k));
        prop_assert!(equivalent(&plain, &scaled));
        let next = format!("{}/{}", a * k + 1, b * k);
        prop_assert!(!equivalent(&plain, &next));
    }
}

/// What random mathematics is made of.
const PIECES: [&str; 48] = [
    "1",
    "23",
    "0",
    "4.5",
    ".",
    ",",
    "x",
    "y",
    "n",
    "e",
    "i",
    "+",
    "-",
    "*",
    "/",
    "^",
    "_",
    "!",
    "%",
    "(",
    ")",
    "[",
    "]",
    "{",
    "}",
    "|",
    "=",
    "<",
    " ",
    "$",
    "\\frac",
    "\\sqrt",
    "\\sqrt[3]",
    "\\pi",
    "\\infty",
    "\\left(",
    "\\right)",
    "\\{",
    "\\}",
    "\\text{ cm}",
    "\\cdot",
    "\\sin",
    "\\log_2",
    "\\pm",
    "^\\circ",
    "\\%",
    "\\begin{pmatrix}",
    "\\end{pmatrix}",
];
