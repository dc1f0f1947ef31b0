//! Writes the series of requests and of the engine.

use std::fmt::Write;

use engine::{EngineConfig, Histogram, MemoryPlan, PrefixCache, Status, Timings};

use super::{Counts, REASONS};

/// How series are called, and their labels.
pub(super) struct Names<'a> {
    pub(super) prefix: &'a str,
    pub(super) label: &'a str,
}

/// Where their values come from.
pub(super) struct Sources<'a> {
    pub(super) counts: &'a Counts,
    pub(super) status: &'a Status,
    pub(super) timings: &'a Timings,
    /// Labels of `cache_config_info`.
    pub(super) cache: &'a str,
}

/// All series of these sources.
pub(super) fn write(out: &mut String, names: &Names<'_>, sources: &Sources<'_>) {
    gauges(out, names, sources);
    totals(out, names, sources);
    histograms(out, names, sources);
}

/// What is known of the KV cache, as vLLM labels it: its blocks are called those of a GPU there.
pub(super) fn cache_labels(plan: &MemoryPlan, config: &EngineConfig) -> String {
    let prefix_cache = match config.prefix_cache {
        PrefixCache::On => "True",
        PrefixCache::Off => "False",
    };
    format!(
        "block_size=\"{}\",cache_dtype=\"{}\",enable_prefix_caching=\"{prefix_cache}\",\
         kv_cache_memory_bytes=\"{}\",num_gpu_blocks=\"{}\"",
        plan.block_size,
        config.resolved_kv_dtype().name(),
        plan.kv_bytes,
        plan.kv_blocks
    )
}

fn gauges(out: &mut String, names: &Names<'_>, sources: &Sources<'_>) {
    let Sources { status, cache, .. } = sources;
    let gauges = [
        ("num_requests_running", "Sequences that run.", status.running as f64),
        ("num_requests_waiting", "Sequences that wait.", status.waiting as f64),
        ("kv_cache_usage_perc", "Share of the KV blocks in use, 0 to 1.", status.kv_usage()),
        ("weights_version", "How often the weights have changed.", status.version.0 as f64),
    ];
    for (name, help, value) in gauges {
        head(out, (names.prefix, name), "gauge", help);
        line(out, (names.prefix, name, ""), names.label, value);
    }
    head(out, (names.prefix, "cache_config_info"), "gauge", "The KV cache, in labels.");
    let label = format!("{},{cache}", names.label);
    line(out, (names.prefix, "cache_config_info", ""), &label, 1.0);
}

fn totals(out: &mut String, names: &Names<'_>, sources: &Sources<'_>) {
    let Sources { counts, status, .. } = sources;
    let (stats, guesses) = (&status.stats, &status.speculation);
    let totals = [
        ("prompt_tokens_total", "Tokens of prompts taken in.", counts.prompt_tokens),
        ("generation_tokens_total", "Tokens generated for requests.", counts.generated_tokens),
        ("num_preemptions_total", "Sequences that gave up their blocks.", stats.preemptions),
        ("prefix_cache_queries_total", "Tokens looked up in the prefix cache.", stats.query_tokens),
        ("prefix_cache_hits_total", "Tokens taken from the prefix cache.", stats.hit_tokens),
        ("nan_logits_total", "Samples ended for logits that were not finite.", status.nan_logits),
        (
            "spec_decode_num_drafts_total",
            "Times that guesses of a sample were run.",
            guesses.drafts,
        ),
        ("spec_decode_num_draft_tokens_total", "Guesses that were run.", guesses.guessed),
        ("spec_decode_num_accepted_tokens_total", "Guesses that came true.", guesses.accepted),
    ];
    for (name, help, value) in totals {
        head(out, (names.prefix, name), "counter", help);
        line(out, (names.prefix, name, ""), names.label, value as f64);
    }
    head(out, (names.prefix, "request_success_total"), "counter", "Samples ended, by reason.");
    for (reason, count) in REASONS.iter().zip(counts.finished) {
        let label = format!("{},finished_reason=\"{reason}\"", names.label);
        line(out, (names.prefix, "request_success_total", ""), &label, count as f64);
    }
}

fn histograms(out: &mut String, names: &Names<'_>, sources: &Sources<'_>) {
    let Sources { counts, timings, .. } = sources;
    let histograms = [
        ("time_to_first_token_seconds", "Until a sample's first token.", &counts.first_token),
        (
            "inter_token_latency_seconds",
            "Between two tokens of a sample; those of one step come together.",
            &counts.between,
        ),
        ("e2e_request_latency_seconds", "Until a sample's end.", &counts.whole),
        ("request_queue_time_seconds", "Until a sample's first step.", &timings.queue),
        (
            "request_prefill_time_seconds",
            "From a sample's first step to its first token.",
            &timings.prefill,
        ),
        (
            "request_decode_time_seconds",
            "From a sample's first to its last token.",
            &timings.decode,
        ),
        (
            "request_inference_time_seconds",
            "From a sample's first step to its last token.",
            &timings.inference,
        ),
        ("iteration_tokens_total", "Tokens of a step.", &timings.step_tokens),
        ("request_prompt_tokens", "Tokens of a prompt.", &counts.prompt_lengths),
        ("request_generation_tokens", "Tokens of a sample.", &counts.generated_lengths),
        (
            "request_max_num_generation_tokens",
            "Tokens of the longest sample of a request.",
            &counts.longest,
        ),
        ("request_params_n", "Samples asked for.", &counts.samples),
        ("request_params_max_tokens", "Most tokens of a sample asked for.", &counts.max_tokens),
    ];
    for (name, help, values) in histograms {
        head(out, (names.prefix, name), "histogram", help);
        histogram(out, (names.prefix, name), names.label, values);
    }
}

/// The lines of one histogram.
pub(super) fn histogram(
    out: &mut String,
    (prefix, name): (&str, &str),
    label: &str,
    values: &Histogram,
) {
    for (bound, below) in values.cumulative() {
        let label = format!("{label},le=\"{bound}\"");
        line(out, (prefix, name, "_bucket"), &label, below as f64);
    }
    let (all, count) = (format!("{label},le=\"+Inf\""), values.count() as f64);
    line(out, (prefix, name, "_bucket"), &all, count);
    line(out, (prefix, name, "_sum"), label, values.sum());
    line(out, (prefix, name, "_count"), label, count);
}

/// What a family of series is.
pub(super) fn head(out: &mut String, (prefix, name): (&str, &str), kind: &str, help: &str) {
    // Writing to a string cannot fail.
    let _ = writeln!(out, "# HELP {prefix}{name} {help}\n# TYPE {prefix}{name} {kind}");
}

/// One value.
pub(super) fn line(
    out: &mut String,
    (prefix, name, suffix): (&str, &str, &str),
    label: &str,
    value: f64,
) {
    // As above.
    let _ = writeln!(out, "{prefix}{name}{suffix}{{{label}}} {value}");
}

/// Label values escape backslashes, quotes and line ends.
pub(super) fn escaped(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_escaped() {
        assert_eq!(escaped("a\"b\\c\nd"), "a\\\"b\\\\c\\nd");
    }
}
