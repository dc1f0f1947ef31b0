//! `engine bench serve`: load on a server over HTTP, a running one or one of its own in this process.
//!
//! Counts what clients see: time to the first token, per token, between pieces, of the whole. A server in
//! this process shares its cores and its memory with the client.

mod client;
mod load;
mod own;
mod report;

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use engine::{Tokenizer, load_text};
use serde_json::{Map, Value, json};
use tokio::runtime::Builder;

use crate::args::DEFAULT_MODEL;
use crate::bench::args::DatasetName;
use crate::bench::dataset::{Dataset, Prompt};
use crate::bench::save;
use crate::bench::serve_args::{Backend, LoadArgs, ServeBenchArgs, TargetArgs};
use crate::exit::{Failure, Result};
use crate::output::Output;
use crate::terminal::Terminal;
use crate::{model, output, serve};

use client::Target;
use load::{Keep, Plan, Requests, Run};
use own::OwnServer;
use report::{Figures, Wanted, details};

/// Requests where neither their number nor a duration is given.
const DEFAULT_PROMPTS: usize = 64;
/// Tokens that any model has: ids below are drawn where the vocabulary is not known.
const ANY_VOCABULARY: usize = 256;

/// Runs the command.
pub(crate) fn run(args: &ServeBenchArgs, terminal: &Terminal) -> Result<()> {
    let wanted = Wanted::new(
        &args.report.percentile_metrics,
        &args.report.metric_percentiles,
        &args.report.goodput,
    )?;
    let metadata = metadata(&args.report.metadata)?;
    let mut plan = plan(args)?;
    let address = address(&args.server)?;
    let named =
        args.serve_model.clone().or_else(|| address.is_none().then(|| DEFAULT_MODEL.to_owned()));
    let (dataset, tokenizer) = dataset(args, named.as_deref(), terminal)?;
    // One thread asks a server elsewhere: on the same machine it takes the least from that server.
    let runtime = match address {
        Some(_) => Builder::new_current_thread().enable_all().build(),
        None => serve::runtime(),
    };
    let runtime = runtime.map_err(|error| Failure::running(format!("runtime: {error}")))?;
    let own = match (&address, &named) {
        (None, Some(name)) => {
            let config = model::serving_config(&args.common, &args.engine)?;
            let config = model::measured(config, &args.engine);
            Some(OwnServer::start(&runtime, model::load(name, &config, terminal)?, name)?)
        }
        _ => None,
    };
    plan.process = plan.process.or(own.as_ref().map(|_| std::process::id()));
    let address = address.or(own.as_ref().map(|own| own.address.clone())).expect("one of the two");
    let known = tokenizer.is_some();
    let target = target(args, (address, tokenizer.map(Arc::new)));
    let loaded = runtime.block_on(load_server(args, &plan, target, &dataset));
    if let Some(own) = own {
        own.stop(&runtime)?;
    }
    let (run, target) = loaded?;
    let mut results = head(args, &plan, &target);
    results.insert("tokenizer_id".to_owned(), json!(named.filter(|_| known)));
    results.extend(metadata);
    report(args, (&run, &wanted), (&target, results), terminal)
}

/// Prints and stores what a run came to; a failure where nothing was answered.
fn report(
    args: &ServeBenchArgs,
    (run, wanted): (&Run, &Wanted),
    (target, mut results): (&Target, Map<String, Value>),
    terminal: &Terminal,
) -> Result<()> {
    let figures = Figures::new(run, wanted);
    output::print(&figures.block(run, wanted))?;
    figures.record(run, wanted, &mut results);
    if args.report.save_detailed {
        details(&run.outcomes, &mut results);
    }
    store(args, target, &Value::Object(results))?;
    let first_error = run.outcomes.iter().find_map(|outcome| outcome.error.as_deref());
    match (figures.completed(), first_error) {
        (0, Some(error)) => Err(Failure::running(format!("no request was answered: {error}"))),
        (_, Some(error)) => {
            terminal.warn(&format!("some requests failed: {error}"));
            Ok(())
        }
        _ => Ok(()),
    }
}

/// Refuses numbers that no load can have.
fn check(load: &LoadArgs) -> Result<()> {
    let above_0 = [
        ("--request-rate", load.request_rate),
        ("--burstiness", load.burstiness),
        ("--request-timeout", load.request_timeout),
        ("--duration", load.duration.unwrap_or(1.0)),
    ];
    for (flag, value) in above_0 {
        if value.is_nan() || value <= 0.0 {
            return Err(Failure::usage(format!("{flag} is {value}, limit is above 0")));
        }
    }
    for (flag, value) in &above_0[1..] {
        if value.is_infinite() || *value > 1e8 {
            return Err(Failure::usage(format!("{flag} is {value}, limit is 100000000")));
        }
    }
    match load.max_concurrency {
        Some(0) => Err(Failure::usage("--max-concurrency is 0, limit is 1 or more")),
        _ => Ok(()),
    }
}

/// What is sent, and when; the process is filled in later.
fn plan(args: &ServeBenchArgs) -> Result<Plan> {
    let load = &args.load;
    check(load)?;
    let unlimited = load.max_concurrency.is_none() && load.request_rate.is_infinite();
    let requests = match (load.duration, load.num_prompts) {
        (Some(_), Some(_)) => {
            return Err(Failure::usage("--duration and --num-prompts exclude each other"));
        }
        (Some(_), None) if unlimited => {
            return Err(Failure::usage("--duration needs --max-concurrency or --request-rate"));
        }
        (Some(seconds), None) => Requests::For(seconds),
        (None, count) => Requests::Count(count.unwrap_or(DEFAULT_PROMPTS)),
    };
    Ok(Plan {
        requests,
        rate: load.request_rate,
        burstiness: load.burstiness,
        concurrency: load.max_concurrency.unwrap_or(usize::MAX),
        idle_connections: load.idle_connections,
        process: args.server.server_pid,
        seed: args.common.seed,
        keep: if args.report.save_detailed { Keep::Everything } else { Keep::Times },
    })
}

/// Host and port of the server that is named, if one is.
fn address(args: &TargetArgs) -> Result<Option<String>> {
    let Some(url) = &args.base_url else {
        let named = args.host.is_some() || args.port.is_some();
        let host = args.host.as_deref().unwrap_or("127.0.0.1");
        return Ok(named.then(|| format!("{host}:{}", args.port.unwrap_or(8000))));
    };
    let rest = url.strip_prefix("http://").map(|rest| rest.trim_end_matches('/'));
    let rest = rest.filter(|rest| !rest.is_empty() && !rest.contains('/'));
    let address = rest.ok_or_else(|| {
        Failure::usage(format!("--base-url {url} is not http://HOST:PORT, which alone is spoken"))
    })?;
    let has_port = address.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
    Ok(Some(if has_port { address.to_owned() } else { format!("{address}:80") }))
}

/// The prompts, in a form that the server understands, and the tokenizer, if it is known.
fn dataset(
    args: &ServeBenchArgs,
    named: Option<&str>,
    terminal: &Terminal,
) -> Result<(Dataset, Option<Tokenizer>)> {
    let (tokenizer, vocabulary) = match named {
        Some(name) => {
            let source = model::open(name, terminal)?;
            (load_text(&source)?.0, source.config().vocab_size)
        }
        None => (None, ANY_VOCABULARY),
    };
    let count = args.load.num_prompts.unwrap_or(DEFAULT_PROMPTS);
    // A chat is text: the server encodes it with its template.
    let chat = args.server.backend == Backend::OpenaiChat;
    let text = tokenizer.as_ref().filter(|_| !chat);
    let dataset = Dataset::open(&args.dataset, (count, args.common.seed), (text, vocabulary))?;
    Ok((dataset, tokenizer))
}

/// Finds the model's name, sends requests that do not count, and runs the plan.
async fn load_server(
    args: &ServeBenchArgs,
    plan: &Plan,
    mut target: Target,
    dataset: &Dataset,
) -> Result<(Run, Target)> {
    let at = |error: String| Failure::running(format!("http://{}: {error}", target.address));
    if args.server.model.is_none() {
        let listed = target.get("/v1/models").await.map_err(at)?;
        let listed: Value = serde_json::from_str(&listed).unwrap_or_default();
        let name = listed["data"][0]["id"].as_str();
        let name = name.ok_or_else(|| at("it lists no model, name one with --model".to_owned()))?;
        target.model = name.to_owned();
    }
    let target = Arc::new(target);
    let warmups: Vec<Prompt> =
        dataset.prompts(u64::MAX).into_iter().cycle().take(args.load.num_warmups).collect();
    for prompt in &warmups {
        let outcome = target.stream(prompt, std::time::Instant::now()).await;
        if let Some(error) = outcome.error {
            let address = &target.address;
            return Err(Failure::running(format!("http://{address}: the first request: {error}")));
        }
    }
    let run = plan.run(&target, dataset).await;
    Ok((run, Arc::unwrap_or_clone(target)))
}

fn target(args: &ServeBenchArgs, (address, tokenizer): (String, Option<Arc<Tokenizer>>)) -> Target {
    let path = match args.server.backend {
        Backend::Openai => "/v1/completions",
        Backend::OpenaiChat => "/v1/chat/completions",
    };
    let random = args.dataset.dataset_name == DatasetName::Random;
    let mut extra = Vec::new();
    if args.load.ignore_eos || random {
        extra.push(("ignore_eos", json!(true)));
    }
    if let Some(temperature) = args.load.temperature {
        extra.push(("temperature", json!(temperature)));
    }
    Target {
        address,
        path: args.server.endpoint.clone().unwrap_or_else(|| path.to_owned()),
        backend: args.server.backend,
        model: args.server.model.clone().unwrap_or_default(),
        api_key: args.server.api_key.clone(),
        tokenizer,
        timeout: Duration::from_secs_f64(args.load.request_timeout),
        extra,
    }
}

/// Keys and values that are added to the results.
fn metadata(pairs: &[String]) -> Result<Map<String, Value>> {
    let pair = |text: &String| {
        let pair = text.split_once('=').map(|(key, value)| (key.to_owned(), json!(value)));
        pair.ok_or_else(|| Failure::usage(format!("--metadata {text} is not KEY=VALUE")))
    };
    pairs.iter().map(pair).collect()
}

/// The keys of the results that say what was run.
fn head(args: &ServeBenchArgs, plan: &Plan, target: &Target) -> Map<String, Value> {
    let rate = match plan.rate.is_finite() {
        true => json!(plan.rate),
        false => json!("inf"),
    };
    let prompts = match plan.requests {
        Requests::Count(count) => json!(count),
        Requests::For(_) => Value::Null,
    };
    let head = json!({
        "date": date(), "endpoint_type": backend(target.backend), "backend": backend(target.backend),
        "label": args.report.label, "model_id": target.model, "num_prompts": prompts,
        "request_rate": rate, "burstiness": plan.burstiness,
        "max_concurrency": args.load.max_concurrency, "seed": plan.seed,
        "planned_duration": args.load.duration, "version": env!("CARGO_PKG_VERSION"),
    });
    let Value::Object(head) = head else { unreachable!("it was made as an object") };
    head
}

fn backend(backend: Backend) -> &'static str {
    match backend {
        Backend::Openai => "openai",
        Backend::OpenaiChat => "openai-chat",
    }
}

/// Writes the results where they are asked for.
fn store(args: &ServeBenchArgs, target: &Target, results: &Value) -> Result<()> {
    save(args.report.json.as_deref(), results)?;
    if !(args.report.save_result || args.report.append_result) {
        return Ok(());
    }
    let label = args.report.label.as_deref().unwrap_or(backend(target.backend));
    let rate = args.load.request_rate;
    let concurrency = args.load.max_concurrency;
    let concurrency = concurrency.map(|n| format!("-concurrency{n}")).unwrap_or_default();
    let model = target.model.rsplit('/').next().unwrap_or_default().replace(':', "-");
    let name = format!("{label}-{rate}qps{concurrency}-{model}-{}.json", date());
    let name = args.report.result_filename.clone().unwrap_or(name);
    let dir = args.report.result_dir.clone().unwrap_or_default();
    if !dir.as_os_str().is_empty() {
        std::fs::create_dir_all(&dir).map_err(|error| Failure::unwritable(&dir, &error))?;
    }
    let path = dir.join(name);
    let mut output = match args.report.append_result {
        true => Output::append(&path)?,
        false => Output::replace(&path)?,
    };
    output.line(results);
    output.finish()
}

/// The time of day in UTC, as `YYYYmmdd-HHMMSS`.
fn date() -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    date_of(now)
}

/// The same of a time in seconds since 1970 (days to a date as in Hinnant, "chrono-compatible low-level
/// date algorithms").
fn date_of(seconds: u64) -> String {
    let (days, second) = (seconds / 86_400 + 719_468, seconds % 86_400);
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    // Months count from March.
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}{month:02}{day:02}-{hour:02}{minute:02}{second:02}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        assert_eq!(date_of(0), "19700101-000000");
        assert_eq!(date_of(951_827_696), "20000229-123456");
        assert_eq!(date_of(1_795_473_164), "20261123-223244");
    }

    #[test]
    fn addresses_are_read_and_others_refused() {
        let with = |url: &str| {
            let args = TargetArgs {
                base_url: Some(url.to_owned()),
                host: None,
                port: None,
                backend: Backend::Openai,
                endpoint: None,
                model: None,
                api_key: None,
                server_pid: None,
            };
            address(&args).ok().flatten()
        };
        assert_eq!(with("http://a:81/").as_deref(), Some("a:81"));
        assert_eq!(with("http://a").as_deref(), Some("a:80"));
        assert_eq!([with("https://a"), with("a:80"), with("http://a/v1")], [None, None, None]);
    }
}
