//! The metrics of runs as comma-separated values, for programs that draw on their own.

use super::data::{Run, step_of};

/// A line a step, all metrics that any run has as columns after `run` and `step`; a cell without a
/// value is empty. Quotes are RFC 4180's.
///
/// ```
/// use trainer::report::{Run, csv};
/// assert_eq!(csv(&[Run::default()]), "run,step\n");
/// ```
pub fn csv(runs: &[Run]) -> String {
    let mut names: Vec<&str> = Vec::new();
    for name in runs.iter().flat_map(Run::names) {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let head = names.iter().map(|name| format!(",{}", quoted(name)));
    let mut out = format!("run,step{}\n", head.collect::<String>());
    for (run, line) in runs.iter().flat_map(|run| run.steps.iter().map(move |line| (run, line))) {
        let step = step_of(line).map_or(String::new(), |step| step.to_string());
        out += &format!("{},{step}", quoted(&run.label));
        for name in &names {
            let value = line.get(*name).and_then(serde_json::Value::as_f64);
            out += &value.map_or(",".to_owned(), |value| format!(",{value}"));
        }
        out.push('\n');
    }
    out
}

fn quoted(text: &str) -> String {
    match text.contains([',', '"', '\n', '\r']) {
        true => format!("\"{}\"", text.replace('"', "\"\"")),
        false => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_stand_under_their_metrics() {
        let run = |label: &str, lines: &[&str]| Run {
            label: label.to_owned(),
            steps: lines.iter().map(|line| serde_json::from_str(line).unwrap()).collect(),
            ..Run::default()
        };
        let runs = [
            run("a", &[r#"{"training/global_step":1,"x":0.5}"#, r#"{"training/global_step":2}"#]),
            run("b, \"c\"", &[r#"{"training/global_step":1,"y,z":2,"x":null}"#]),
        ];
        assert_eq!(
            csv(&runs),
            "run,step,training/global_step,x,\"y,z\"\na,1,1,0.5,\na,2,2,,\n\"b, \"\"c\"\"\",1,1,,2\n"
        );
    }
}
