//! The rules on responses as models write them, and on hostile ones.

use super::*;

fn right(rule: &str, response: &str, truth: &str) -> bool {
    let verdict = Verifier::named(rule).unwrap().judge(response, truth);
    assert_eq!(verdict.score, f64::from(u8::from(verdict.correct)));
    verdict.correct
}

fn read(rule: &str, response: &str) -> String {
    Verifier::named(rule).unwrap().judge(response, "1").predicted
}

#[test]
fn exact_reads_the_first_line_of_the_trimmed_response() {
    let judge = |response| right("exact", response, "58");
    assert!(judge("58") && judge(" 58 \n") && judge("\n58\nso"));
    assert!(!judge("58.") && !judge("") && !judge("5 8"));
    assert_eq!(read("exact", "59"), "59");
}

#[test]
fn prime_math_takes_the_last_closed_box() {
    assert!(right("prime_math", r"\boxed{1} or \boxed{\frac{1}{2}}", r"\boxed{0.5}"));
    assert!(right("prime_math", r"\boxed{\boxed{42}}", "42"));
    assert!(!right("prime_math", r"\boxed{42} \boxed{42", "42"));
    assert!(!right("prime_math", r"\boxed 42", "42") && !right("prime_math", "42", "42"));
    assert_eq!(read("prime_math", r"\boxed{a{b}c} }"), "a{b}c");
}

#[test]
fn gsm8k_is_strict_or_flexible() {
    assert!(right("gsm8k", "so 3\n#### 1,234", "1234"));
    assert!(!right("gsm8k", "so 1234", "1234") && !right("gsm8k", "####1234", "1234"));
    assert!(right("gsm8k:flexible", "it is 12 and then 1234 .", "1234"));
    assert!(!right("gsm8k:flexible", "no number", "1"));
    assert!(!right("gsm8k", &format!("#### 7{}", " ".repeat(300)), "7"), "beyond the window");
}

#[test]
fn numeric_finds_the_answer_where_it_stands() {
    assert!(right("numeric", "thus\n#### 0.5 \nbye", r"\frac12"));
    assert!(right("numeric", r"Answer: 3 \boxed{50\%}", "0.5"));
    assert!(right("math_verify", "The answer is: **(1, 2]**\n", "(1,2]"));
    assert!(right("numeric", "Answer: 1\nfinal answer: $x = 12 \\text{ cm}$.", "12"));
    assert!(right("numeric", "so\n\\{2, 1\\}\n", r"\{1,2\}"));
    assert!(!right("numeric", "so 5\n6", "5") && !right("numeric", "", "5"));
}

#[test]
fn patterns_come_from_the_name_or_the_row() {
    assert!(right(r"regex:^\d+$", "123", "") && !right(r"regex:^\d+$", "12a", ""));
    assert!(right("regex", "xaby", "a(b)"));
    assert_eq!(read("regex:a(b+)", "xabby"), "bb");
    let rule = Verifier::named("regex").unwrap();
    let e = rule.check("a(").unwrap_err().to_string();
    assert!(e.contains("regular expression \"a(\": unclosed group"), "{e}");
    assert!(!rule.judge("a(", "a(").correct);
    assert!(
        Verifier::named("regex:(").is_err() && Verifier::named("regex:\\w{9999}{9999}").is_err()
    );
}

#[test]
fn formats_want_each_tag_once_and_in_order() {
    let good = "<think>a</think>\n<answer> 5 </answer>";
    assert!(right("format", good, ""));
    assert_eq!(read("format", good), "5");
    assert!(!right("format", "<answer>5</answer><think>a</think>", ""));
    assert!(!right("format", &format!("{good}<think>"), "") && !right("format", "<think>", ""));
    assert!(right("format:plan,do", "<plan></plan><do>it</do>", ""));
    assert!(Verifier::named("format:a>b").is_err());
}

#[test]
fn lengths_are_in_characters() {
    assert!(right("length:3", "äöü", "") && !right("length:3", "abcd", ""));
    assert!(right("length", "ab", "2-3") && !right("length", "a", "2-3"));
    assert!(Verifier::named("length").unwrap().check("3-2").is_err());
    assert!(Verifier::named("length:x").is_err());
}

#[test]
fn sources_and_names_are_dispatched_or_refused_by_name() {
    let rule = |source| format!("{:?}", Verifier::for_source(source).unwrap());
    for (source, want) in [
        ("math_dapo", "MathDapo"),
        ("math", "MathDapo"),
        ("aime25", "MathDapo"),
        ("openai/gsm8k", "Gsm8k(Strict)"),
        ("gsm8k", "Gsm8k(Strict)"),
        ("lighteval/MATH", "PrimeMath"),
        ("HuggingFaceH4/MATH-500", "PrimeMath"),
        ("numina_olympiads", "PrimeMath"),
        ("math_verify", "Numeric"),
        ("arith", "Exact"),
    ] {
        assert_eq!(rule(source), want, "{source}");
    }
    let e = Verifier::for_source("codeforces").unwrap_err().to_string();
    assert!(e.contains("\"codeforces\"") && e.contains("openai/gsm8k"), "{e}");
    let e = Verifier::named("exat").unwrap_err().to_string();
    assert!(e.contains("\"exat\" is unknown") && e.contains("prime_math"), "{e}");
    assert!(Verifier::for_source("regex:.").is_err());
}

/// Seconds this thread has computed; what others do on the machine does not count. 0 where the
/// system does not tell.
pub(super) fn cpu_seconds() -> f64 {
    let told = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let nanoseconds = told.split(' ').next().and_then(|n| n.parse::<f64>().ok());
    nanoseconds.unwrap_or(0.0) / 1e9
}

/// Texts of a megabyte that make a careless reader quadratic or deep.
fn hostile() -> Vec<String> {
    const SIZE: usize = 1 << 20;
    let fill = |unit: &str| unit.repeat(SIZE / unit.len());
    let boxed = |inside: &str| format!("\\boxed{{{inside}}}");
    let mut texts: Vec<String> = [
        "$",
        "\\boxed{",
        "Answer:",
        "answer is ",
        "#### 1",
        "{",
        "}",
        "(",
        "9",
        "1,",
        "-",
        "^9",
        "\\frac",
        "\\sqrt{",
        "<think>",
        "<think></think>",
        "\\text{",
        "\n",
        "Answer \t ",
        "é",
        "####",
        ".",
    ]
    .map(fill)
    .into();
    let long = [fill("("), fill("9"), fill("1,"), fill("\\frac{1}{"), fill("x+"), fill("{}")];
    texts.extend(long.iter().map(|inside| boxed(inside)));
    texts.push(format!("{}{}", fill("("), fill(")")));
    texts.push(format!("Answer: {}", fill("9")));
    texts.push(format!("{}\\boxed{{{}}}", fill("a"), "(".repeat(1000)));
    texts
}

#[test]
fn a_megabyte_of_hostile_text_gets_a_verdict_from_every_rule() {
    let texts = hostile();
    let names = [
        "math_dapo",
        "prime_math",
        "gsm8k",
        "gsm8k:flexible",
        "numeric",
        "exact",
        "regex:(a|b)*cc$",
        "format",
        "length:10",
    ];
    let mut slowest = (0.0, "");
    for name in names {
        let rule = Verifier::named(name).unwrap();
        for text in &texts {
            let start = cpu_seconds();
            let verdict = rule.judge(text, "17/3+x^7");
            let seconds = cpu_seconds() - start;
            assert!(!verdict.correct, "{name}: {}", &text[..20]);
            if seconds > slowest.0 {
                slowest = (seconds, name);
            }
        }
    }
    println!("slowest verdict: {:.1} ms by {}", slowest.0 * 1e3, slowest.1);
    assert!(slowest.0 < 2.0, "{slowest:?}");
}
