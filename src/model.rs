//! From the names and numbers of the command line to an engine.

use std::env;

use engine::model::hub::{self, HubSettings, Located};

use engine::{
    Dtype, Engine, EngineConfig, KvDtype, Level, ModelSource, PrefixCache, Quantization,
    Speculation,
};
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::args::{CommonArgs, DtypeArg, EngineArgs, KvCacheDtype, QuantizationArg};
use crate::download::download;
use crate::exit::{Failure, Result};
use crate::signals;
use crate::terminal::Terminal;

/// A count with an optional unit: `k`, `m`, `g` are powers of 1000; `K`, `M`, `G` and `KiB`, `MiB`,
/// `GiB` powers of 1024, as vLLM reads them.
pub(crate) fn count(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit: f64 = match unit {
        "" => 1.0,
        "k" => 1e3,
        "m" => 1e6,
        "g" => 1e9,
        "K" | "KiB" => 1024.0,
        "M" | "MiB" => 1024.0 * 1024.0,
        "G" | "GiB" => 1024.0 * 1024.0 * 1024.0,
        other => return Err(format!("unknown unit `{other}`, known are k m g K M G KiB MiB GiB")),
    };
    if unit == 1.0 {
        return number.parse().map_err(|_| "expected a whole number".to_owned());
    }
    let value = number.parse::<f64>().map_err(|_| "expected a number".to_owned())? * unit;
    if value < 2f64.powi(63) { Ok(value as u64) } else { Err("too large".to_owned()) }
}

/// `--speculative-config`, in vLLM's words.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SpeculativeConfig {
    method: Option<String>,
    num_speculative_tokens: Option<usize>,
    prompt_lookup_min: Option<usize>,
    prompt_lookup_max: Option<usize>,
}

/// What `--speculative-config` says.
pub(crate) fn speculation(text: &str) -> Result<Speculation, String> {
    if text == "off" {
        return Ok(Speculation::off());
    }
    let object: Map<String, Value> =
        serde_json::from_str(text).map_err(|_| "expected off or a JSON object".to_owned())?;
    let config: SpeculativeConfig =
        serde_json::from_value(Value::Object(object)).map_err(|error| error.to_string())?;
    if let Some(method) = config.method.filter(|method| method != "ngram") {
        return Err(format!("method is {method}, known is ngram"));
    }
    let defaults = Speculation::default();
    // One bound alone is both, as in vLLM.
    let (shortest_match, longest_match) = match (config.prompt_lookup_min, config.prompt_lookup_max)
    {
        (None, None) => (defaults.shortest_match, defaults.longest_match),
        (min, max) => (min.or(max).unwrap_or_default(), max.or(min).unwrap_or_default()),
    };
    let max_guesses = config.num_speculative_tokens.unwrap_or(defaults.max_guesses);
    let speculation = Speculation { max_guesses, shortest_match, longest_match, ..defaults };
    speculation.validate().map_err(|error| error.to_string())?;
    Ok(speculation)
}

/// A benchmark's settings: without guesses where none are asked for, so that rates are of the model's
/// work alone, whatever it writes.
pub(crate) fn measured(config: EngineConfig, args: &EngineArgs) -> EngineConfig {
    let speculation = args.speculative_config.unwrap_or_else(Speculation::off);
    EngineConfig { speculation, ..config }
}

/// The settings of the engine that these flags and `ENGINE_CPU` make.
pub(crate) fn engine_config(common: &CommonArgs, args: &EngineArgs) -> Result<EngineConfig> {
    let defaults = EngineConfig::default();
    let size = |count: u64| usize::try_from(count).unwrap_or(usize::MAX);
    Ok(EngineConfig {
        max_model_len: args.max_model_len.map(size),
        useful_model_len: None,
        max_num_seqs: args.max_num_seqs.unwrap_or(defaults.max_num_seqs),
        max_num_batched_tokens: args
            .max_num_batched_tokens
            .map_or(defaults.max_num_batched_tokens, size),
        block_size: args.block_size.unwrap_or(defaults.block_size),
        kv_cache_memory_bytes: args.kv_cache_memory_bytes,
        prefix_cache: match args.no_enable_prefix_caching {
            true => PrefixCache::Off,
            false => PrefixCache::On,
        },
        threads: common.threads,
        level: level()?,
        dtype: match common.dtype {
            DtypeArg::Auto => None,
            DtypeArg::F32 => Some(Dtype::F32),
            DtypeArg::Bf16 => Some(Dtype::Bf16),
        },
        kv_dtype: (args.kv_cache_dtype == KvCacheDtype::Int8).then_some(KvDtype::Int8),
        quantization: match args.quantization {
            QuantizationArg::Gguf => Quantization::AsStored,
            QuantizationArg::Auto | QuantizationArg::None => Quantization::None,
        },
        speculation: args.speculative_config.unwrap_or_default(),
        seed: common.seed,
    })
}

/// As [`engine_config`], for a command that never changes weights: `auto` keeps them quantised.
pub(crate) fn serving_config(common: &CommonArgs, args: &EngineArgs) -> Result<EngineConfig> {
    let mut config = engine_config(common, args)?;
    if args.quantization == QuantizationArg::Auto && common.dtype == DtypeArg::Auto {
        config.quantization = Quantization::AsStored;
    }
    Ok(config)
}

/// As [`engine_config`], for a command that needs the weights in full to do `what`.
pub(crate) fn training_config(
    common: &CommonArgs,
    args: &EngineArgs,
    what: &str,
) -> Result<EngineConfig> {
    let config = engine_config(common, args)?;
    if config.quantization == Quantization::AsStored {
        return Err(Failure::usage(format!(
            "--quantization is gguf, limit is none for {what}: it needs the weights in full"
        )));
    }
    if config.kv_dtype.is_some() {
        return Err(Failure::usage(format!(
            "--kv-cache-dtype is int8, limit is auto for {what}: log-probabilities would not be those of \
             training"
        )));
    }
    Ok(config)
}

/// The kernels that `ENGINE_CPU` forces, if it does.
fn level() -> Result<Option<Level>> {
    let Some(name) = env::var_os("ENGINE_CPU").filter(|name| !name.is_empty()) else {
        return Ok(None);
    };
    let name = name.to_string_lossy();
    let level = Level::parse(&name).filter(|level| level.available());
    level.map(Some).ok_or_else(|| {
        let here = Level::ALL.into_iter().filter(|level| level.available());
        let here: Vec<&str> = here.map(Level::name).collect();
        let why = if Level::parse(&name).is_some() { "not available here" } else { "unknown" };
        Failure::usage(format!(
            "ENGINE_CPU is {name}, which is {why}; available: {}",
            here.join(" ")
        ))
    })
}

/// Opens a model by path, hub id or name; every fault but that of a download is the model's. A signal ends the
/// command at once, which loses nothing yet.
pub(crate) fn open(name: &str, terminal: &Terminal) -> Result<ModelSource> {
    let _at_once = signals::end_at_once();
    let found = locate(name, terminal)?;
    found.open().map_err(|error| Failure::from(error).blame_data())
}

/// Opens a model by path, hub id or name.
pub(crate) fn source(name: &str, terminal: &Terminal) -> engine::Result<ModelSource> {
    locate(name, terminal)?.open()
}

/// Finds a model, downloading what the cache lacks of a hub id.
fn locate(name: &str, terminal: &Terminal) -> engine::Result<Located> {
    let settings = HubSettings::from_lookup(|variable| env::var(variable).ok());
    hub::resolve(name, &settings, |id, settings| download(id, settings, terminal))
}

/// Opens a model and loads it, saying so.
pub(crate) fn load(name: &str, config: &EngineConfig, terminal: &Terminal) -> Result<Engine> {
    load_source(&open(name, terminal)?, config, terminal)
}

/// Loads a model that is open, saying so. A signal ends the command at once, as in [`open`].
pub(crate) fn load_source(
    source: &ModelSource,
    config: &EngineConfig,
    terminal: &Terminal,
) -> Result<Engine> {
    let _at_once = signals::end_at_once();
    let begun = std::time::Instant::now();
    let engine = Engine::load(source, config)?;
    let took = begun.elapsed().as_secs_f64();
    let form = match engine.decoder().weights.quantised() {
        true => "quantised as stored",
        false => engine.dtype().name(),
    };
    let name = source.name();
    terminal.info(&format!("{name}: loaded in {took:.1} s, weights {form}"));
    Ok(engine)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_have_units() {
        let cases = [("0", 0), ("4096", 4096), ("1k", 1000), ("1K", 1024), ("25.5k", 25_500)];
        for (text, value) in cases {
            assert_eq!(count(text), Ok(value), "{text}");
        }
        assert_eq!(count("2GiB"), Ok(2 << 30));
        assert_eq!(count("18446744073709551615"), Ok(u64::MAX));
        for text in ["", "-1", "1.5", "1T", "k", "99999999999G", "1e3"] {
            assert!(count(text).is_err(), "{text}");
        }
    }

    #[test]
    fn guesses_are_off_or_described_in_vllms_words() {
        assert_eq!(speculation("off"), Ok(Speculation::off()));
        assert_eq!(speculation("{}"), Ok(Speculation::default()));
        let json = r#"{"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 3}"#;
        let Speculation { max_guesses, shortest_match, longest_match, .. } =
            speculation(json).unwrap();
        assert_eq!((max_guesses, shortest_match, longest_match), (5, 3, 3));
        let refused = |json: &str| speculation(json).unwrap_err();
        assert_eq!(refused(r#"{"method": "eagle"}"#), "method is eagle, known is ngram");
        let many = r#"{"num_speculative_tokens": 65}"#;
        assert_eq!(refused(many), "num_speculative_tokens is 65, limit is 0 to 64");
        let crossed = r#"{"prompt_lookup_min": 5, "prompt_lookup_max": 4}"#;
        assert_eq!(refused(crossed), "prompt_lookup_min is 5, limit is 1 to 4");
        assert!(refused(r#"{"model": "x"}"#).contains("unknown field `model`"));
        for other in ["5", "on", r#"["ngram", 4]"#, "null", "{"] {
            assert_eq!(refused(other), "expected off or a JSON object", "{other}");
        }
    }
}
