//! Countdown: make a target from three or four numbers by `+ - * /` and parentheses, each number used
//! once (the game of TinyZero's experiments). Judged by [`crate::verifier`]'s rule of that name.
//!
//! A task is a function of (seed, split, index). It is made from a solution, so there is one, and its
//! intermediate results are positive integers. A hash of the sorted numbers decides its split, so no
//! set of numbers is in both.

use serde_json::json;

use super::{Split, TEST_SHARE};
use crate::data::{Message, Prompt, Row};
use crate::random::{Purpose, Stream};
use engine::random::mix;

/// The `data_source` of the tasks.
pub const DATA_SOURCE: &str = "countdown";

/// Largest target.
const MAX_TARGET: u64 = 999;

/// The row of an index.
pub fn row(seed: u64, split: Split, index: u64) -> Row {
    let mut random = Stream::keyed(seed, Purpose::Tasks, &[4, split as u64, index]);
    loop {
        let count = 3 + random.below(2);
        let numbers: Vec<u64> = (0..count).map(|_| 1 + random.below(99)).collect();
        if split_of(&numbers) == split
            && let Some(target) = reach(&numbers, &mut random)
        {
            return row_of(&numbers, target, index);
        }
    }
}

/// Joins two random values by a random operation until one is left.
fn reach(numbers: &[u64], random: &mut Stream) -> Option<u64> {
    let mut values = numbers.to_vec();
    while values.len() > 1 {
        let a = values.swap_remove(random.below(values.len() as u64) as usize);
        let b = values.swap_remove(random.below(values.len() as u64) as usize);
        let (a, b) = (a.max(b), a.min(b));
        values.push(match random.below(4) {
            0 => a + b,
            1 if a > b => a - b,
            2 if a * b <= MAX_TARGET => a * b,
            3 if a.is_multiple_of(b) => a / b,
            _ => return None,
        });
    }
    // A target that is given is no task.
    let target = values[0];
    (target <= MAX_TARGET && !numbers.contains(&target)).then_some(target)
}

fn split_of(numbers: &[u64]) -> Split {
    let mut sorted = numbers.to_vec();
    sorted.sort_unstable();
    let hash = sorted.iter().fold(2, |hash, number| mix(hash ^ mix(*number)));
    if hash.is_multiple_of(TEST_SHARE) { Split::Test } else { Split::Train }
}

fn row_of(numbers: &[u64], target: u64, index: u64) -> Row {
    let list: Vec<String> = numbers.iter().map(u64::to_string).collect();
    let content = format!(
        "Make {target} from the numbers {}. Use each of them exactly once, with +, -, *, / and \
         parentheses. Your last line must be of the form \"Answer: expression\".",
        list.join(", ")
    );
    Row {
        data_source: Some(DATA_SOURCE.to_owned()),
        prompt: Prompt::Messages(vec![Message { role: "user".to_owned(), content }]),
        ground_truth: json!({"target": target, "numbers": numbers}).to_string(),
        extra: json!({"index": index, "numbers": numbers.len()}),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    fn numbers(row: &Row) -> Vec<u64> {
        let truth: serde_json::Value = serde_json::from_str(&row.ground_truth).unwrap();
        let mut numbers: Vec<u64> =
            truth["numbers"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).collect();
        numbers.sort_unstable();
        numbers
    }

    #[test]
    fn splits_share_no_numbers_and_tasks_repeat() {
        let keys = |seed, split, count| -> HashSet<Vec<u64>> {
            (0..count).map(|index| numbers(&row(seed, split, index))).collect()
        };
        let (train, test) = (keys(1, Split::Train, 3_000), keys(2, Split::Test, 400));
        assert!(train.len() > 2_500 && test.len() > 300, "{} {}", train.len(), test.len());
        assert!(train.is_disjoint(&test));
        assert_eq!(row(4, Split::Test, 9), row(4, Split::Test, 9));
    }

    #[test]
    fn every_target_can_be_reached() {
        /// Tries everything over exact fractions.
        fn reachable(values: &[(i64, i64)], target: i64) -> bool {
            if let [(a, b)] = values {
                return *a == target * *b;
            }
            for i in 0..values.len() {
                for j in 0..values.len() {
                    if i == j {
                        continue;
                    }
                    let rest = values.iter().enumerate().filter(|(k, _)| *k != i && *k != j);
                    let rest: Vec<_> = rest.map(|(_, value)| *value).collect();
                    let ((a, b), (c, d)) = (values[i], values[j]);
                    let all = [
                        (a * d + c * b, b * d),
                        (a * d - c * b, b * d),
                        (a * c, b * d),
                        (a * d, b * c),
                    ];
                    for joined in all.into_iter().filter(|(_, below)| *below != 0) {
                        if reachable(&[&rest[..], &[joined]].concat(), target) {
                            return true;
                        }
                    }
                }
            }
            false
        }
        for index in 0..60 {
            let row = row(8, Split::Train, index);
            let truth: serde_json::Value = serde_json::from_str(&row.ground_truth).unwrap();
            let values: Vec<(i64, i64)> = numbers(&row).iter().map(|n| (*n as i64, 1)).collect();
            assert!(reachable(&values, truth["target"].as_i64().unwrap()), "{row:?}");
        }
    }
}
