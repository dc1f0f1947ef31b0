//! Sums and differences of two or three numbers below 100, asked for in words: for chat models that
//! have to be taught the form of an answer as well. Judged by `math_dapo`'s rule, the last line that
//! begins with `Answer:`.
//!
//! As with [`super::Arith`], a task is a function of (seed, split, index), and a hash of the expression
//! decides its split. Sums can be negative.

use super::{Split, TEST_SHARE};
use crate::data::{Message, Prompt, Row};
use crate::random::{Purpose, Stream};
use engine::random::mix;

/// The `data_source` of the tasks.
pub const DATA_SOURCE: &str = "sum";

/// The row of an index.
pub fn row(seed: u64, split: Split, index: u64) -> Row {
    let mut random = Stream::keyed(seed, Purpose::Tasks, &[3, split as u64, index]);
    loop {
        let terms: Vec<i64> = (0..2 + random.below(2)).map(|_| term(&mut random)).collect();
        if split_of(&terms) == split {
            return row_of(&terms, index);
        }
    }
}

/// One or two digits, equally often; negative for a difference.
fn term(random: &mut Stream) -> i64 {
    let max = if random.below(2) == 0 { 10 } else { 100 };
    let value = random.below(max) as i64;
    if random.below(2) == 0 { value } else { -value }
}

/// Belongs to the numbers and their signs, in whatever order.
fn split_of(terms: &[i64]) -> Split {
    let mut sorted = terms.to_vec();
    sorted.sort_unstable();
    let hash = sorted.iter().fold(1, |hash, term| mix(hash ^ mix(*term as u64)));
    if hash.is_multiple_of(TEST_SHARE) { Split::Test } else { Split::Train }
}

fn row_of(terms: &[i64], index: u64) -> Row {
    let mut expression = terms[0].to_string();
    for term in &terms[1..] {
        let sign = if *term < 0 { '-' } else { '+' };
        expression += &format!(" {sign} {}", term.abs());
    }
    let content = format!(
        "What is {expression}? Think step by step if you like. Your last line must be of the form \
         \"Answer: N\", where N is the result."
    );
    Row {
        data_source: Some(DATA_SOURCE.to_owned()),
        prompt: Prompt::Messages(vec![Message { role: "user".to_owned(), content }]),
        ground_truth: terms.iter().sum::<i64>().to_string(),
        extra: serde_json::json!({"index": index, "terms": terms.len()}),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::verifier::Verifier;

    fn expression(row: &Row) -> String {
        let Prompt::Messages(messages) = &row.prompt else { panic!("{row:?}") };
        let text = messages[0].content.strip_prefix("What is ").unwrap();
        text.split('?').next().unwrap().to_owned()
    }

    fn terms(expression: &str) -> Vec<i64> {
        expression
            .replace("- ", "-")
            .replace("+ ", "")
            .split(' ')
            .map(|t| t.parse().unwrap())
            .collect()
    }

    #[test]
    fn truths_are_the_sums_and_splits_disjoint() {
        let key = |row: &Row| {
            let mut terms = terms(&expression(row));
            assert_eq!(terms.iter().sum::<i64>().to_string(), row.ground_truth, "{row:?}");
            terms.sort_unstable();
            terms
        };
        let keys = |seed, split, count| -> HashSet<Vec<i64>> {
            (0..count).map(|index| key(&row(seed, split, index))).collect()
        };
        let (train, test) = (keys(1, Split::Train, 3_000), keys(2, Split::Test, 400));
        assert!(train.len() > 2_000 && test.len() > 300, "{} {}", train.len(), test.len());
        assert!(train.is_disjoint(&test));
        assert_eq!(row(4, Split::Test, 9), row(4, Split::Test, 9));
        let one = row(4, Split::Test, 9);
        let verifier = Verifier::for_source(DATA_SOURCE).unwrap();
        assert!(
            verifier.judge(&format!("so\nAnswer: {}", one.ground_truth), &one.ground_truth).correct
        );
        assert!(!verifier.judge("Answer: 1000", &one.ground_truth).correct);
    }
}
