//! The closed forms against brute-force enumeration.

use super::*;

/// Verdicts from answers; those that begin with `r` are right.
fn verdicts(answers: &[&str]) -> Vec<Verdict> {
    let one = |answer: &&str| {
        let correct = answer.starts_with('r');
        Verdict { score: f64::from(u8::from(correct)), correct, predicted: (*answer).to_owned() }
    };
    answers.iter().map(one).collect()
}

/// The mean of `of` over all subsets of `k` of `n`.
fn over_subsets(n: usize, k: usize, of: impl Fn(&[usize]) -> f64) -> f64 {
    let subsets = (0u32..1 << n).filter(|set| set.count_ones() as usize == k);
    let (mut sum, mut count) = (0.0, 0.0);
    for set in subsets {
        let members: Vec<usize> = (0..n).filter(|i| set >> i & 1 == 1).collect();
        sum += of(&members);
        count += 1.0;
    }
    sum / count
}

fn close(a: f64, b: f64, what: &str) {
    assert!((a - b).abs() < 1e-12, "{what}: {a} and {b}");
}

#[test]
fn pass_at_k_is_the_share_of_subsets_with_a_right_response() {
    for n in 1..=9 {
        for right in 0..=n {
            for k in 1..=n {
                let brute =
                    over_subsets(n, k, |set| f64::from(u8::from(set.iter().any(|i| *i < right))));
                close(pass_at_k(n, right, k).unwrap(), brute, &format!("{n} {right} {k}"));
            }
        }
        assert_eq!((pass_at_k(n, 0, 0), pass_at_k(n, 0, n + 1)), (None, None));
    }
    // One of a million: 1 - (1 - k/n).
    close(pass_at_k(1_000_000, 1, 1000).unwrap(), 1e-3, "large");
}

#[test]
fn maj_at_k_is_the_share_of_subsets_whose_vote_is_right() {
    let vote = |verdicts: &[Verdict], set: &[usize]| {
        let count = |answer: &str| set.iter().filter(|i| verdicts[**i].predicted == answer).count();
        let most = set.iter().map(|i| count(&verdicts[*i].predicted)).max().unwrap();
        let mut winners: Vec<&str> = set.iter().map(|i| verdicts[*i].predicted.as_str()).collect();
        winners.sort_unstable();
        winners.dedup();
        winners.retain(|answer| count(answer) == most);
        let right = winners.iter().filter(|answer| answer.starts_with('r')).count();
        right as f64 / winners.len() as f64
    };
    for answers in [
        &["r", "r", "a", "b", "b", "b", "c"][..],
        &["r", "r2", "a", "a", "r2", "", "", "r"],
        &["a", "b", "c", "d", "r"],
        &["a", "a"],
        &["r"],
    ] {
        let verdicts = verdicts(answers);
        for k in 1..=answers.len() {
            let brute = over_subsets(answers.len(), k, |set| vote(&verdicts, set));
            close(maj_at_k(&verdicts, k).unwrap(), brute, &format!("{answers:?} {k}"));
        }
        assert_eq!(maj_at_k(&verdicts, answers.len() + 1), None);
    }
    let many: Vec<&str> = (0..MAX_RESPONSES).map(|i| if i < 600 { "r" } else { "a" }).collect();
    close(maj_at_k(&verdicts(&many), MAX_RESPONSES).unwrap(), 1.0, "all of many");
    close(maj_at_k(&verdicts(&many), 1).unwrap(), 0.6, "one of many");
    // The share of right ones among 101 is 0.6 with a deviation of 0.046.
    close((maj_at_k(&verdicts(&many), 101).unwrap() * 20.0).round(), 20.0, "some of many");
}

#[test]
fn best_and_worst_are_those_of_all_draws_with_replacement() {
    let values = [0.25, 1.0, -0.5, 0.25];
    for k in 1..=4u32 {
        let draws = (0..4usize.pow(k)).map(|code| {
            (0..k).map(|place| values[code / 4usize.pow(place) % 4]).collect::<Vec<f64>>()
        });
        let best: Vec<f64> =
            draws.clone().map(|d| d.into_iter().fold(f64::NEG_INFINITY, f64::max)).collect();
        let worst: Vec<f64> = draws.map(|d| d.into_iter().fold(f64::INFINITY, f64::min)).collect();
        for (got, all) in
            [(best_at_k(&values, k as usize), best), (worst_at_k(&values, k as usize), worst)]
        {
            let mean = all.iter().sum::<f64>() / all.len() as f64;
            let var = all.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / all.len() as f64;
            close(got.mean, mean, "mean");
            close(got.std, var.sqrt(), "std");
        }
    }
}

fn problem(answers: &[&str]) -> Problem {
    Problem { verdicts: verdicts(answers), tokens: 10 * answers.len(), truncated: 1 }
}

#[test]
fn summaries_are_means_over_problems_and_metrics_have_verls_names() {
    let mut evaluation = Evaluation::default();
    evaluation.add(Some("amc"), problem(&["r", "a", "a", "a"]));
    evaluation.add(None, problem(&["r", "r"]));
    evaluation.add(Some("amc"), problem(&["r", "r", "r", "a"]));
    let summaries = evaluation.summaries(&[1, 2, 4, 8]);
    let (name, amc) = &summaries[0];
    assert_eq!((*name, amc.problems, amc.n, amc.mean), ("amc", 2, 4, 0.5));
    assert_eq!(amc.pass, BTreeMap::from([(1, 0.5), (2, 0.75), (4, 1.0)]));
    assert_eq!(amc.maj, BTreeMap::from([(1, 0.5), (2, 0.5), (4, 0.5)]));
    assert_eq!((amc.tokens, amc.truncated, amc.mean_error), (10.0, 0.25, 0.25));
    let all = evaluation.overall(&[1, 2, 4]).unwrap();
    assert_eq!((all.problems, all.n), (3, 2));
    close(all.mean, 2.0 / 3.0, "overall");
    assert_eq!(all.pass.keys().collect::<Vec<_>>(), [&1, &2]);
    assert_eq!(Evaluation::default().overall(&[1]), None);

    let mut metrics = Metrics::new();
    evaluation.record(&mut metrics);
    assert_eq!(metrics.get("val-core/amc/acc/mean@4"), Some(0.5));
    assert_eq!(metrics.get("val-core/amc/acc/maj@4/mean"), Some(0.5));
    assert_eq!(metrics.get("val-aux/amc/acc/maj@2/mean"), Some(0.5));
    assert_eq!(metrics.get("val-aux/amc/acc/pass@2"), Some(0.75));
    assert_eq!(metrics.get("val-aux/amc/reward/mean@4"), Some(0.5));
    // 1 - (3/4)^4 and 1 - (1/4)^4.
    close(metrics.get("val-core/amc/acc/best@4/mean").unwrap(), 0.839_843_75, "best");
    assert_eq!(metrics.get("val-core/unknown/acc/mean@2"), Some(1.0));
    assert!(metrics.get("val-aux/amc/acc/std@4").is_some());
    let core: Vec<&str> =
        metrics.iter().map(|(n, _)| n).filter(|n| n.starts_with("val-core/amc")).collect();
    assert_eq!(core.len(), 4, "{core:?}");
}
