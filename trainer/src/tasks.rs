//! Tasks made on demand, for machines without data. Here arithmetic: `12+7=`, `85-27=`, `6*7=`, and
//! their answers; beside it [`sum`] and [`countdown`], asked for in words.
//!
//! A task is a function of (seed, split, index): nothing is stored, any index can be asked for in any
//! order. Train and test have no task in common, whatever the seeds, because a hash of the operands
//! (in either order, where that makes no difference) decides the split. Differences are never
//! negative. The prompts use only digits, `+ - * =`; the answer is a plain integer.

pub mod countdown;
pub mod sum;

use crate::data::{Prompt, Row, SftRow};
use crate::random::{Purpose, Stream};
use engine::random::mix;

/// The `data_source` of the tasks, judged by exact match.
pub const DATA_SOURCE: &str = "arith";

/// One of this many operand pairs, or sets of numbers, belongs to the test split.
const TEST_SHARE: u64 = 8;

/// Which half of the operand pairs tasks are made from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// 7 of 8 operand pairs.
    Train,
    /// The others.
    Test,
}

/// A source of tasks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arith {
    /// Decides which tasks come in which order.
    pub seed: u64,
    /// Decides from which operand pairs.
    pub split: Split,
}

/// A task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    /// What the model is given, `12+7=`.
    pub prompt: String,
    /// What it should write before end of text, `19`.
    pub answer: String,
    /// Difficulty, 1 to 5.
    pub level: u32,
}

/// Largest operands of a level, and how many of 20 tasks are of it.
struct Level {
    operation: Operation,
    max: [u64; 2],
    share: u64,
}

#[derive(Clone, Copy, PartialEq)]
enum Operation {
    /// Sum or difference, equally often.
    AddOrSubtract,
    Multiply,
}

/// Level 1 a small model learns at once, level 5 hardly: the mixture leaves most groups of samples
/// with right and wrong answers over a whole run.
const LEVELS: [Level; 5] = [
    Level { operation: Operation::AddOrSubtract, max: [9, 9], share: 3 },
    Level { operation: Operation::Multiply, max: [9, 9], share: 3 },
    Level { operation: Operation::AddOrSubtract, max: [99, 99], share: 7 },
    Level { operation: Operation::Multiply, max: [99, 9], share: 4 },
    Level { operation: Operation::AddOrSubtract, max: [999, 999], share: 3 },
];

impl Arith {
    /// The task of an index.
    ///
    /// ```
    /// use trainer::tasks::{Arith, Split};
    /// let train = Arith { seed: 1, split: Split::Train };
    /// assert_eq!(train.task(7), train.task(7));
    /// assert!(train.task(7).prompt.ends_with('='));
    /// ```
    pub fn task(&self, index: u64) -> Task {
        let mut random = Stream::keyed(self.seed, Purpose::Tasks, &[self.split as u64, index]);
        loop {
            if let Some(task) = self.draw(&mut random) {
                return task;
            }
        }
    }

    /// The first `count` tasks, as rows for reinforcement learning.
    pub fn rows(&self, count: u64) -> Vec<Row> {
        (0..count).map(|index| self.task(index).into_row(index)).collect()
    }

    /// The first tasks as pairs to learn from. A share `stutter` of the answers repeats its last digit:
    /// a fault that a policy picks up and reinforcement learning can mend.
    pub fn sft_rows(&self, count: u64, stutter: f64) -> Vec<SftRow> {
        let row = |index| {
            let Task { prompt, mut answer, .. } = self.task(index);
            let mut random = Stream::keyed(self.seed, Purpose::Tasks, &[2, index]);
            if random.uniform() < stutter {
                answer.extend(answer.chars().next_back());
            }
            SftRow { prompt: Prompt::Text(prompt), completion: answer }
        };
        (0..count).map(row).collect()
    }

    /// A random task, unless it belongs to the other split.
    fn draw(&self, random: &mut Stream) -> Option<Task> {
        let mut ticket = random.below(LEVELS.iter().map(|level| level.share).sum());
        let index = LEVELS.iter().position(|level| {
            let here = ticket < level.share;
            ticket = ticket.saturating_sub(level.share);
            here
        })?;
        let Level { operation, max, .. } = &LEVELS[index];
        let (a, b) = (random.below(max[0] + 1), random.below(max[1] + 1));
        let (a, sign, b, answer) = match operation {
            Operation::Multiply => (a, '*', b, a * b),
            Operation::AddOrSubtract if random.below(2) == 0 => (a, '+', b, a + b),
            Operation::AddOrSubtract => (a.max(b), '-', a.min(b), a.abs_diff(b)),
        };
        (split(sign, a, b) == self.split).then(|| Task {
            prompt: format!("{a}{sign}{b}="),
            answer: answer.to_string(),
            level: index as u32 + 1,
        })
    }
}

/// The split that the operands belong to, in either order.
fn split(sign: char, a: u64, b: u64) -> Split {
    let hash = mix(mix(u64::from(sign)) ^ mix(a.min(b)).rotate_left(1) ^ mix(a.max(b)));
    if hash.is_multiple_of(TEST_SHARE) { Split::Test } else { Split::Train }
}

impl Task {
    /// The task as a row; `index` goes into `extra`.
    pub fn into_row(self, index: u64) -> Row {
        Row {
            data_source: Some(DATA_SOURCE.to_owned()),
            prompt: Prompt::Text(self.prompt),
            ground_truth: self.answer,
            extra: serde_json::json!({"index": index, "level": self.level}),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::verifier::Verifier;

    fn operands(prompt: &str) -> (u64, char, u64) {
        let at = prompt.find(['+', '-', '*']).unwrap();
        let (a, b) = (&prompt[..at], &prompt[at + 1..prompt.len() - 1]);
        (a.parse().unwrap(), prompt.as_bytes()[at] as char, b.parse().unwrap())
    }

    #[test]
    fn answers_are_right_and_levels_as_mixed() {
        let mut levels = [0u32; 5];
        for index in 0..4_000 {
            let task = Arith { seed: 5, split: Split::Train }.task(index);
            let (a, sign, b) = operands(&task.prompt);
            let answer = match sign {
                '+' => a + b,
                '-' => a - b,
                _ => a * b,
            };
            assert_eq!(task.answer, answer.to_string(), "{}", task.prompt);
            levels[task.level as usize - 1] += 1;
        }
        for (level, count) in LEVELS.iter().zip(levels) {
            let share = f64::from(count) / 4_000.0;
            assert!((share - level.share as f64 / 20.0).abs() < 0.04, "seed 5: {levels:?}");
        }
    }

    #[test]
    fn train_and_test_share_no_operands_whatever_the_seed() {
        let keys = |seed, split, count| -> HashSet<(char, u64, u64)> {
            let tasks = (0..count).map(|i| Arith { seed, split }.task(i));
            let parts = tasks.map(|t| operands(&t.prompt));
            parts.map(|(a, sign, b)| (sign, a.min(b), a.max(b))).collect()
        };
        let train = keys(1, Split::Train, 5_000);
        let test = keys(2, Split::Test, 1_000);
        assert!(train.len() > 2_000 && test.len() > 300, "{} {}", train.len(), test.len());
        assert!(train.is_disjoint(&test));
    }

    #[test]
    fn rows_are_judged_by_exact_match() {
        let row = &Arith { seed: 3, split: Split::Test }.rows(1)[0];
        let verifier = Verifier::for_source(row.data_source.as_deref().unwrap()).unwrap();
        assert!(verifier.judge(&row.ground_truth, &row.ground_truth).correct);
        let pair = &Arith { seed: 3, split: Split::Test }.sft_rows(1, 0.0)[0];
        assert_eq!((&pair.prompt, &pair.completion), (&row.prompt, &row.ground_truth));
    }
}
