//! Reads rows from several places and keeps those that are wanted, counting the others.
//!
//! Made for sets like DAPO-Math-17k, which holds each of its prompts a hundred times and one in five in
//! Chinese: a row is judged as it is read, so memory is that of the rows kept. Leaves out lengths in
//! tokens, which need a tokenizer; who knows them adds to [`Report::overlong`].

use std::collections::HashMap;
use std::fmt;
use std::path::Path;

use super::{Prompt, Row, read};
use crate::error::Result;

/// What to do with a prompt that occurs again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Duplicates {
    /// Keep every row.
    Keep,
    /// Keep the first row of each prompt.
    Drop,
}

/// Prompts in which scripts are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scripts {
    /// All.
    All,
    /// Those without a Chinese, Japanese or Korean character; formulas and accents are no reason to drop
    /// a prompt.
    WithoutCjk,
}

/// Which rows are kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Selection {
    /// Prompts that occur again.
    pub duplicates: Duplicates,
    /// Prompts by their characters.
    pub scripts: Scripts,
}

/// What the rows of a data set went through, in rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Read or generated.
    pub read: usize,
    /// Dropped: the prompt was there before.
    pub duplicates: usize,
    /// Those of the duplicates whose answer differs from the one kept.
    pub conflicts: usize,
    /// Dropped: Chinese, Japanese or Korean characters.
    pub cjk: usize,
    /// Dropped: more tokens than allowed.
    pub overlong: usize,
}

impl Report {
    /// Rows that are left.
    pub fn kept(&self) -> usize {
        self.read - self.duplicates - self.cjk - self.overlong
    }
}

impl fmt::Display for Report {
    /// `1791700 rows read, 1773800 duplicates, 3282 with Chinese, Japanese or Korean text, 14618 kept`;
    /// what did not occur is left out.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} rows read", self.read)?;
        if self.duplicates > 0 {
            write!(f, ", {} duplicates", self.duplicates)?;
        }
        if self.conflicts > 0 {
            write!(f, " ({} of them with another answer)", self.conflicts)?;
        }
        if self.cjk > 0 {
            write!(f, ", {} with Chinese, Japanese or Korean text", self.cjk)?;
        }
        if self.overlong > 0 {
            write!(f, ", {} too long", self.overlong)?;
        }
        write!(f, ", {} kept", self.kept())
    }
}

/// Collects rows.
#[derive(Debug)]
pub struct Loader {
    selection: Selection,
    /// The answer of each prompt, where duplicates are dropped.
    seen: HashMap<Prompt, String>,
    rows: Vec<Row>,
    report: Report,
}

impl Loader {
    /// A loader without rows.
    pub fn new(selection: Selection) -> Self {
        Self { selection, seen: HashMap::new(), rows: Vec::new(), report: Report::default() }
    }

    /// Adds the rows of a file.
    ///
    /// # Errors
    /// If it cannot be read, has no row, or a line is not a task.
    pub fn file(&mut self, path: &Path) -> Result<()> {
        read(path, Row::parse, &mut |row| self.row(row))
    }

    /// Adds a row, or counts why not.
    pub fn row(&mut self, row: Row) {
        self.report.read += 1;
        if self.selection.duplicates == Duplicates::Drop {
            if let Some(answer) = self.seen.get(&row.prompt) {
                self.report.duplicates += 1;
                self.report.conflicts += usize::from(*answer != row.ground_truth);
                return;
            }
            self.seen.insert(row.prompt.clone(), row.ground_truth.clone());
        }
        if self.selection.scripts == Scripts::WithoutCjk && has_cjk(&row.prompt) {
            self.report.cjk += 1;
            return;
        }
        self.rows.push(row);
    }

    /// Rows kept so far.
    pub fn kept(&self) -> usize {
        self.rows.len()
    }

    /// The rows and what happened to the others.
    pub fn finish(self) -> (Vec<Row>, Report) {
        (self.rows, self.report)
    }
}

fn has_cjk(prompt: &Prompt) -> bool {
    match prompt {
        Prompt::Text(text) => text.contains(is_cjk),
        Prompt::Messages(messages) => messages.iter().any(|m| m.content.contains(is_cjk)),
    }
}

/// Han, kana, hangul and the punctuation that goes with them (Unicode 16, by block).
fn is_cjk(c: char) -> bool {
    matches!(c,
        '\u{1100}'..='\u{11ff}' | '\u{2e80}'..='\u{303f}' | '\u{3040}'..='\u{31ff}'
        | '\u{3200}'..='\u{4dbf}' | '\u{4e00}'..='\u{9fff}' | '\u{ac00}'..='\u{d7af}'
        | '\u{f900}'..='\u{faff}' | '\u{ff00}'..='\u{ffef}' | '\u{20000}'..='\u{3ffff}')
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::TestDir;

    fn row(prompt: &str, answer: &str) -> String {
        serde_json::json!({"prompt": prompt, "answer": answer}).to_string() + "\n"
    }

    #[test]
    fn duplicates_and_scripts_are_dropped_and_counted() {
        let dir = TestDir::new("loader");
        let copies: String = (0..100).map(|_| row("2²≤ Café?", "4")).collect();
        let text = format!("{copies}{}{}{}", row("求和", "1"), row("求和", "1"), row("b", "2"));
        let files = [dir.write("a.jsonl", text), dir.write("b.jsonl", row("b", "3"))];
        let mut loader =
            Loader::new(Selection { duplicates: Duplicates::Drop, scripts: Scripts::WithoutCjk });
        files.iter().for_each(|file| loader.file(file).unwrap());
        let (rows, report) = loader.finish();
        let prompts: Vec<_> = rows.iter().map(|row| row.prompt.clone()).collect();
        assert_eq!(prompts, [Prompt::Text("2²≤ Café?".into()), Prompt::Text("b".into())]);
        assert_eq!(
            report,
            Report { read: 104, duplicates: 101, conflicts: 1, cjk: 1, overlong: 0 }
        );
        assert_eq!(
            report.to_string(),
            "104 rows read, 101 duplicates (1 of them with another answer), 1 with Chinese, \
             Japanese or Korean text, 2 kept"
        );
        assert_eq!(Report { read: 3, ..Report::default() }.to_string(), "3 rows read, 3 kept");
    }

    #[test]
    fn formulas_are_not_taken_for_another_script() {
        for text in ["x² + √2 ≤ π·α", "“naïve” — 5°", "Ω → ∞, ½"] {
            assert!(!text.contains(is_cjk), "{text}");
        }
        for text in ["设x", "かな", "한글", "答：3"] {
            assert!(text.contains(is_cjk), "{text}");
        }
    }
}
