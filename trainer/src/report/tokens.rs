//! Samples as tables whose tokens can be coloured: by log-probability, entropy or advantage.
//!
//! Three numbers a token go into the page as custom properties, and the choice among them is radio
//! buttons and style: no script. Log-probability colours by `1 - p`, so what was unlikely stands out;
//! entropy and advantage by their share of the largest one shown. Everything sampled is escaped.

use std::fmt::Write;

use super::data::{Run, StepSamples};
use super::text::{escape, short};
use crate::data::Prompt;
use crate::samples::Sample;

/// Characters of a prompt or answer, and tokens of a response, that are shown: the last ones, where
/// answers are.
const SHOWN_CHARS: usize = 600;
const SHOWN_TOKENS: usize = 300;

/// The look of the tables; the selectors need the buttons to stand before `.samples` as its siblings.
pub(super) const STYLE: &str = "\
.samples i{font-style:normal;border-radius:2px}.samples .w{opacity:.55}\
#k1:checked~.samples i{background:rgb(213 94 0/calc(var(--l,0)*.65))}\
#k2:checked~.samples i{background:rgb(163 74 134/calc(var(--h,0)*.65))}\
#k3:checked~.samples .p i{background:rgb(0 114 178/calc(var(--a,0)*.6))}\
#k3:checked~.samples .m i{background:rgb(213 94 0/calc(var(--a,0)*.6))}\
.k{margin-right:.3rem}.k+label{margin-right:1rem}";

/// The buttons and the tables of all runs; empty if there are no samples.
pub(super) fn tables(runs: &[Run]) -> String {
    let mut out = String::new();
    for run in runs {
        for (index, samples) in run.samples.iter().enumerate() {
            let open = if index + 1 == run.samples.len() { " open" } else { "" };
            let of = if runs.len() > 1 { format!(", {}", run.label) } else { String::new() };
            let summary = escape(&format!("Samples of step {}{of}", samples.step));
            let _infallible = write!(
                out,
                "<details{open}><summary>{summary}</summary><div class=\"scroll\">{}</div></details>",
                table(samples)
            );
        }
    }
    if out.is_empty() {
        return out;
    }
    let names = ["nothing", "log-probability", "entropy", "advantage"];
    let buttons: String = (0..names.len())
        .map(|i| {
            let checked = if i == 1 { " checked" } else { "" };
            format!(
                "<input class=\"k\" type=\"radio\" name=\"k\" id=\"k{i}\"{checked}>\
                 <label for=\"k{i}\">{}</label>",
                names[i]
            )
        })
        .collect();
    format!(
        "<h2>Samples</h2><p>Colour of a token (its numbers show when it is pointed at):</p>\
         {buttons}<div class=\"samples\">{out}</div>"
    )
}

fn table(samples: &StepSamples) -> String {
    let largest = |values: &mut dyn Iterator<Item = f64>| values.fold(1e-9, f64::max);
    let shown = || samples.shown.iter();
    let entropy = largest(&mut shown().flat_map(|s| &s.entropies).map(|h| f64::from(*h)));
    let advantage = largest(&mut shown().map(|s| s.advantage.abs()));
    let rows: String = shown().map(|sample| row(sample, entropy, advantage)).collect();
    format!(
        "<table><tr><th>prompt</th><th>response</th><th>read as</th><th>truth</th><th>reward</th>\
         <th>advantage</th><th>ended by</th></tr>{rows}</table>"
    )
}

fn row(sample: &Sample, entropy: f64, advantage: f64) -> String {
    let prompt = match &sample.prompt {
        Prompt::Text(text) => text.clone(),
        Prompt::Messages(messages) => {
            let turns = messages.iter().map(|m| format!("{}: {}", m.role, m.content));
            turns.collect::<Vec<_>>().join("\n")
        }
    };
    let verdict = if sample.correct { "good" } else { "bad" };
    let sign = if sample.advantage < 0.0 { "m" } else { "p" };
    format!(
        "<tr><td class=\"t\">{}</td><td class=\"t {sign}\" style=\"--a:{:.2}\">{}</td><td>{}</td>\
         <td>{}</td><td class=\"n {verdict}\">{}</td><td class=\"n\">{}</td><td>{}</td></tr>",
        escape(&cut(&prompt)),
        sample.advantage.abs() / advantage,
        coloured(sample, entropy),
        escape(&cut(&sample.predicted)),
        escape(&cut(&sample.ground_truth)),
        short(sample.reward),
        short(sample.advantage),
        escape(&sample.finish_reason)
    )
}

/// The response, token by token where the file says where they are.
fn coloured(sample: &Sample, largest_entropy: f64) -> String {
    let Some(pieces) = pieces(sample) else { return escape(&cut(&sample.text)) };
    let first = pieces.len().saturating_sub(SHOWN_TOKENS);
    let mut out = if first > 0 { "… ".to_owned() } else { String::new() };
    for (index, piece) in pieces.iter().enumerate().skip(first) {
        let log_prob = sample.log_probs.get(index).map(|x| f64::from(*x));
        let entropy = sample.entropies.get(index).map(|x| f64::from(*x));
        let number = |value: Option<f64>| value.map_or("unknown".to_owned(), short);
        let (text, class) = match *piece {
            // The end of text, a special token, or part of a character.
            "" => ("·".to_owned(), " class=\"w\""),
            piece => (escape(&piece.replace('\n', "↵\n")), ""),
        };
        let _infallible = write!(
            out,
            "<i{class} style=\"--l:{:.2};--h:{:.2}\" title=\"log-probability {}, entropy {}, advantage {}\">\
             {text}</i>",
            1.0 - log_prob.unwrap_or(0.0).exp().min(1.0),
            entropy.unwrap_or(0.0) / largest_entropy,
            number(log_prob),
            number(entropy),
            short(sample.advantage)
        );
    }
    out
}

/// The text of each token; `None` if the positions are missing or do not fit the text.
fn pieces(sample: &Sample) -> Option<Vec<&str>> {
    let ends = &sample.text_ends;
    let (last, before) = ends.split_last()?;
    if ends.len() != sample.token_ids.len() || *last > sample.text.len() {
        return None;
    }
    let mut start = 0;
    let mut pieces = Vec::with_capacity(ends.len());
    for end in before.iter().copied().chain([sample.text.len()]) {
        pieces.push(sample.text.get(start..end)?);
        start = end;
    }
    Some(pieces)
}

/// The end of a long text.
fn cut(text: &str) -> String {
    let count = text.chars().count();
    if count <= SHOWN_CHARS {
        return text.to_owned();
    }
    let tail: String = text.chars().skip(count - SHOWN_CHARS).collect();
    format!("… {tail}")
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A sample whose every text is markup.
    pub(in super::super) fn hostile() -> Sample {
        let evil = "<script>alert(1)</script>\"' onload='x";
        Sample {
            step: 3,
            prompt_index: 0,
            sample_index: 0,
            data_source: Some(evil.into()),
            prompt: Prompt::Text(evil.into()),
            prompt_token_ids: vec![],
            token_ids: vec![7, 8, 9],
            text: evil.into(),
            text_ends: vec![8, 8, 25],
            log_probs: vec![-0.5, f32::MIN, 0.0],
            entropies: vec![0.25, 0.5, 0.0],
            finish_reason: evil.into(),
            ground_truth: evil.into(),
            predicted: evil.into(),
            correct: false,
            reward: -1.0,
            advantage: -0.5,
            weights_version: 0,
        }
    }

    #[test]
    fn tokens_carry_their_numbers_and_no_markup() {
        let samples = StepSamples { step: 3, shown: vec![hostile()], ..StepSamples::default() };
        let run = Run { samples: vec![samples], ..Run::default() };
        let html = tables(&[run]);
        assert!(html.contains(
            "<i style=\"--l:0.39;--h:0.50\" title=\"log-probability -0.5, entropy 0.25, advantage -0.5\">\
             &lt;script&gt;</i><i class=\"w\" style=\"--l:1.00;--h:1.00\""
        ), "{html}");
        assert!(html.contains("<td class=\"t m\" style=\"--a:1.00\">"), "{html}");
        assert!(html.contains(">alert(1)&lt;/script&gt;&quot;&#39; onload=&#39;x</i>"), "the tail");
        assert!(!html.contains("<script") && !html.contains("onload='"), "{html}");
        assert_eq!(tables(&[Run::default()]), "");
    }

    #[test]
    fn positions_that_do_not_fit_are_not_used() {
        let with = |text: &str, ends: &[usize]| Sample {
            text: text.into(),
            text_ends: ends.to_vec(),
            token_ids: vec![0; ends.len().max(1)],
            ..hostile()
        };
        assert_eq!(pieces(&with("äb", &[2, 3])), Some(vec!["ä", "b"]));
        assert_eq!(pieces(&with("äb", &[1, 3])), None, "inside a character");
        assert_eq!(pieces(&with("ab", &[2, 1, 2])), None, "backwards");
        assert_eq!(pieces(&with("ab", &[1, 9])), None, "behind the end");
        assert_eq!(pieces(&with("ab", &[])), None);
        let mut other = with("ab", &[1, 2]);
        other.token_ids.pop();
        assert_eq!(coloured(&other, 1.0), "ab");
    }
}
