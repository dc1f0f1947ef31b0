//! The comparison, shrunken to seconds.

use std::fs;

use clap::Parser;

use super::{Args, compare};

#[test]
fn a_shrunken_comparison_leaves_table_page_charts_and_curves() {
    let output = std::env::temp_dir().join(format!("engine-entropy-{}", std::process::id()));
    let args = Args::parse_from([
        "entropy",
        "--output",
        &output.display().to_string(),
        "--seeds",
        "2",
        "--samples",
        "2",
        "--methods",
        "grpo",
        "kl_cov",
        "--set=data.train_batch_size=8",
        "--set=rollout.n=4",
        "--set=trainer.total_steps=4",
        "--set=trainer.test_freq=4",
    ]);
    let table = compare(&args).expect("it runs");
    assert!(table.lines().nth(2).is_some_and(|row| row.starts_with("| grpo | ")), "{table}");
    assert!(table.lines().nth(3).is_some_and(|row| row.starts_with("| kl_cov | ")), "{table}");
    let read = |name: &str| fs::read_to_string(output.join(name)).expect(name);
    assert_eq!(read("results.md"), table);
    assert!(read("report.html").contains("means of 2 seeds"));
    let curves = read("curves.csv");
    // A line for the validation before the first step, and one a step, of 2 methods x 2 seeds.
    assert_eq!(curves.lines().count(), 1 + 4 * 5, "{curves}");
    assert!(fs::read_dir(output.join("charts")).expect("charts").count() > 3);
    // Done runs are not trained again.
    assert_eq!(compare(&args).expect("it runs again"), table);
    fs::remove_dir_all(&output).expect("it is there");
}
