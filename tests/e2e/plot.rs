//! `engine plot`, as a process: what it writes, what it says of damaged runs, what it refuses.

use std::fs;
use std::path::PathBuf;

use super::support::{Folder, engine, fails, run};

/// A run folder whose reward is 0.8 - 0.2 exp(H), with `extra` behind its lines.
fn run_folder(folder: &Folder, name: &str, steps: u32, extra: &str) -> PathBuf {
    let path = folder.path(name);
    fs::create_dir(&path).unwrap();
    let line = |step: u32| {
        let entropy = 1.0 / f64::from(step);
        let reward = 0.8 - 0.2 * entropy.exp();
        format!(
            "{{\"training/global_step\":{step},\"actor/entropy\":{entropy},\"train/accuracy\":{reward}}}\n"
        )
    };
    let lines: String = (1..=steps).map(line).collect();
    fs::write(path.join("metrics.jsonl"), lines + extra).unwrap();
    path
}

#[test]
fn runs_are_compared_and_what_is_damaged_is_said() {
    let folder = Folder::new();
    let good = run_folder(&folder, "good", 9, "");
    let torn = run_folder(&folder, "torn", 5, "{\"training/glo");
    let (html, svg) = (folder.path("out.html"), folder.path("svg"));
    let csv = folder.path("out.csv");
    let mut plot = engine();
    plot.arg("plot").arg(&good).arg(&torn).arg("--output").arg(&html).arg("--svg").arg(&svg);
    let ran = run(plot.args(["--fit-until", "4"]).arg("--csv").arg(&csv));
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let rows: Vec<&str> = ran.stdout.lines().collect();
    assert_eq!(rows.len(), 3, "{}", ran.stdout);
    assert!(rows[1].starts_with("good  training accuracy  4       0.2000 [0.2000, 0.2000]"));
    assert!(rows[1].ends_with("0.6000 [0.6000, 0.6000]  5             0.0000"), "{}", rows[1]);
    assert!(ran.stderr.contains("torn: 1 damaged lines of metrics.jsonl, the first is 6"));
    assert!(ran.stderr.contains("runs differ in length: last steps are good 9, torn 5"));
    let page = fs::read_to_string(&html).unwrap();
    assert!(page.starts_with("<!DOCTYPE html>") && page.trim_end().ends_with("</html>"));
    assert!(!page.contains("<script") && !page.contains("http"));
    let charts: Vec<_> = fs::read_dir(&svg).unwrap().collect();
    assert_eq!(charts.len(), page.matches("<svg").count());
    let lines = fs::read_to_string(&csv).unwrap();
    let lines: Vec<&str> = lines.lines().collect();
    assert_eq!(lines[0], "run,step,training/global_step,actor/entropy,train/accuracy");
    assert!(lines.len() == 1 + 9 + 5 && lines[11].starts_with("torn,2,2,0.5,"), "{lines:?}");
}

#[test]
fn folders_that_are_no_runs_are_refused() {
    let folder = Folder::new();
    let plot = || {
        let mut command = engine();
        command.arg("plot");
        command
    };
    fails(&mut plot(), 2, "no RUN_DIR given");
    fails(plot().arg(folder.path("none")), 3, "none: no such folder of a run");
    let empty = folder.path("empty");
    fs::create_dir(&empty).unwrap();
    fails(plot().arg(&empty), 3, "empty: no metrics.jsonl");
}
