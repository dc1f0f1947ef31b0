//! Arguments, their layers, and what bad input leads to.

use std::fs;

use super::support::{Folder, SMALL, engine, fails, run};

#[test]
fn every_command_has_help_with_examples() {
    let list = run(engine().arg("--help"));
    assert_eq!(list.code, Some(0));
    for command in ["serve", "generate", "score", "rl", "sft", "plot", "doctor"] {
        assert!(list.stdout.contains(&format!("  {command} ")), "{command}");
        let help = run(engine().args([command, "--help"]));
        assert_eq!(help.code, Some(0));
        for part in ["Examples:", "--threads", "--dtype", "--seed", "--log-format", "--config"] {
            assert!(help.stdout.contains(part), "{command} has no {part}");
        }
    }
}

#[test]
fn wrong_arguments_are_usage_errors() {
    fails(engine().args(["generate", "--prompt", "x"]), 2, "'--prompts'");
    fails(&mut engine(), 2, "");
    fails(engine().args(["serve", "--dtype", "int4"]), 2, "possible values: auto, f32, bf16");
    fails(engine().args(["generate"]), 2, "--prompts IN.jsonl is missing");
    fails(engine().args(["score"]), 2, "--input IN.jsonl is missing");
    fails(
        engine().args(["doctor"]).env("ENGINE_CPU", "quantum"),
        2,
        "available: reference portable",
    );
    fails(engine().args(["serve"]).env("ENGINE_PORT", "many"), 2, "'many' for '--port <PORT>'");
    fails(engine().args(["rl", "--set", "lr"]), 2, "expected KEY=VALUE");
    let several = ["serve", "m.gguf", "--served-model-name", "a", "b"];
    fails(engine().args(several), 2, "unexpected argument 'b'");
    if cfg!(not(feature = "candle")) {
        fails(engine().args(["rl", "--device", "candle-cpu"]), 2, "--features candle");
    }
}

#[test]
fn unknown_keys_of_a_file_name_the_nearest() {
    let folder = Folder::new();
    let config = folder.write("c.toml", "threads = 1\nmax_model_length = 64\n");
    let mut command = engine();
    fails(command.args(["doctor", "--config"]).arg(&config), 2, "nearest is `max_model_len`");
    let config = folder.write("d.toml", "[engine]\nthreads = 1\n");
    fails(engine().args(["doctor", "--config"]).arg(&config), 2, "unknown key `engine`");
    let config = folder.write("g.toml", "[speculative_config]\nmethod = \"ngram\"\n");
    let table = "`speculative_config` is a table, expected text";
    fails(engine().args(["doctor", "--config"]).arg(&config), 2, table);
    let config = folder.write("e.toml", "threads = \"two\"\n");
    fails(engine().args(["doctor", "--config"]).arg(&config), 2, "'two' for '--threads <N>'");
    let config = folder.write("f.toml", "threads = 1\nport = [\n");
    fails(engine().args(["serve", "--config"]).arg(&config), 2, "f.toml: line 2");
    fails(engine().args(["serve", "--config", "absent.toml"]), 2, "absent.toml: No such file");
}

#[test]
fn the_command_line_wins_over_the_environment_over_the_file() {
    let folder = Folder::new();
    let model = folder.tiny_model();
    let config = folder.write("c.toml", "max_model_len = 64\nkv-cache-memory-bytes = \"8MiB\"\n");
    let longest = |change: &dyn Fn(&mut std::process::Command)| {
        let mut command = engine();
        command.args(["doctor", "--quiet", "--config"]).arg(&config).arg(&model);
        change(&mut command);
        let ran = run(&mut command);
        assert_eq!(ran.code, Some(0), "{ran:?}");
        let line = ran.stdout.lines().find_map(|line| line.strip_prefix("longest sequence "));
        line.unwrap().to_owned()
    };
    assert_eq!(longest(&|_| {}), "64 tokens");
    assert_eq!(
        longest(&|c| {
            c.env("ENGINE_MAX_MODEL_LEN", "48");
        }),
        "48 tokens"
    );
    let both = |c: &mut std::process::Command| {
        c.env("ENGINE_MAX_MODEL_LEN", "48").args(["--max-model-len", "32"]);
    };
    assert_eq!(longest(&both), "32 tokens");
}

#[test]
fn a_runs_keys_come_from_the_command_line_else_the_environment_else_the_file() {
    let folder = Folder::new();
    let tables = "[trainer]\nseed = 9\noutput = \"table\"\n[algorithm]\nmethod = \"rloo\"\n";
    let config = folder.write("c.toml", &format!("seed = 8\n{tables}"));
    let tables = folder.write("d.toml", tables);
    let resolved = |change: &dyn Fn(&mut std::process::Command)| {
        let mut command = engine();
        command.args(["rl", "--dry-run", "--quiet"]).args(SMALL);
        change(&mut command);
        let ran = run(&mut command);
        assert_eq!(ran.code, Some(0), "{ran:?}");
        let config: toml::Table = ran.stdout.parse().unwrap();
        let text = |section: &str, key: &str| config[section][key].as_str().unwrap().to_owned();
        let seed = config["trainer"]["seed"].as_integer().unwrap();
        (text("algorithm", "method"), text("trainer", "output"), seed)
    };
    let of = |method: &str, output: &str, seed| (method.to_owned(), output.to_owned(), seed);
    let set = |c: &mut std::process::Command| {
        c.args(["--set", "trainer.output=set", "--set", "trainer.seed=5"]);
        c.args(["--set", "algorithm.method=gspo"]);
    };
    let environment = |c: &mut std::process::Command| {
        c.envs([("ENGINE_OUTPUT", "env"), ("ENGINE_SEED", "7"), ("ENGINE_METHOD", "dapo")]);
    };
    let with_file = |c: &mut std::process::Command| {
        c.arg("--config").arg(&config);
    };
    assert_eq!(resolved(&with_file), of("rloo", "table", 8));
    let all = |c: &mut std::process::Command| {
        with_file(c);
        environment(c);
    };
    assert_eq!(resolved(&all), of("dapo", "env", 7));
    let all = |c: &mut std::process::Command| {
        with_file(c);
        environment(c);
        set(c);
    };
    assert_eq!(resolved(&all), of("gspo", "set", 5));
    let all = |c: &mut std::process::Command| {
        c.arg("--config").arg(&tables).args(["--seed", "0", "--output", "flag"]);
        c.args(["--set", "trainer.output=set", "--set", "trainer.seed=5"]);
        c.args(["--method", "grpo"]).env("ENGINE_SET", "algorithm.method=opo");
    };
    assert_eq!(resolved(&all), of("grpo", "flag", 0));
    let mut both = engine();
    both.args(["rl", "--dry-run", "--method", "grpo", "--set", "algorithm.method=dapo"]);
    fails(&mut both, 2, "method is grpo, but algorithm.method is set to dapo");
}

#[test]
fn flags_that_stand_alone_are_switched_by_their_variables() {
    let folder = Folder::new();
    let model = folder.tiny_model();
    let input = folder.write("in.jsonl", "{\"text\": \"a\"}\n");
    let score = |quiet: &str| {
        let mut command = engine();
        command.arg("score").arg(&model).arg("--input").arg(&input).args(SMALL);
        run(command.env("ENGINE_QUIET", quiet))
    };
    for (quiet, silent) in [("1", true), ("true", true), ("0", false), ("no", false)] {
        let ran = score(quiet);
        assert_eq!((ran.code, ran.stderr.is_empty()), (Some(0), silent), "{quiet}: {ran:?}");
    }
    let ran = score("maybe");
    assert_eq!(ran.code, Some(2), "{ran:?}");
    assert!(ran.stderr.contains("'maybe' for '--quiet'"), "{ran:?}");
}

#[test]
fn a_port_that_is_the_address_of_a_service_is_left_out_of_account() {
    let folder = Folder::new();
    let config = folder.write("c.toml", "port = 0\n");
    let serve = |port: &str| {
        let mut command = engine();
        command.args(["serve", "/nowhere", "--config"]).arg(&config).env("ENGINE_PORT", port);
        run(&mut command)
    };
    for port in ["tcp://10.0.0.1:8000", "udp://10.0.0.1:53", "sctp://[fd00::1]:9"] {
        let ran = serve(port);
        assert_eq!(ran.code, Some(3), "{ran:?}");
        let lines: Vec<&str> = ran.stderr.lines().collect();
        assert!(lines[0].starts_with(&format!("warning: ENGINE_PORT={port} is ")), "{ran:?}");
        assert!(lines[1].starts_with("error: no model at \"/nowhere\""), "{ran:?}");
    }
    let ran = serve("http://10.0.0.1");
    assert_eq!(ran.code, Some(2), "{ran:?}");
    // Commands without a port say nothing of it.
    let ran = run(engine().arg("doctor").env("ENGINE_PORT", "tcp://10.0.0.1:8000"));
    assert_eq!((ran.code, ran.stderr.contains("ENGINE_PORT")), (Some(0), false), "{ran:?}");
}

#[test]
fn bad_models_are_named_in_one_line() {
    let folder = Folder::new();
    let prompts = folder.write("in.jsonl", "{\"prompt\": \"a\"}\n");
    let with = |model: &str| {
        let mut command = engine();
        command.args(["generate", model, "--prompts"]).arg(&prompts).args(SMALL);
        command
    };
    fails(&mut with("/nowhere/model.gguf"), 3, "/nowhere/model.gguf");
    fails(&mut with("some-org/some-model"), 3, "some-org/some-model");
    let model = folder.tiny_model();
    let name = model.to_str().unwrap();
    let weights = model.join("model.safetensors");
    let bytes = fs::read(&weights).unwrap();
    fs::write(&weights, &bytes[..bytes.len() / 2]).unwrap();
    fails(&mut with(name), 3, "model.safetensors");
    fs::write(&weights, &bytes[..5]).unwrap();
    fails(&mut with(name), 3, "model.safetensors");
    fs::remove_file(&weights).unwrap();
    fails(&mut with(name), 3, "tiny");
    fs::write(&weights, &bytes).unwrap();
    let config = fs::read_to_string(model.join("config.json")).unwrap();
    let other = config.replace("\"llama\"", "\"mamba\"").replace("LlamaForCausalLM", "Mamba");
    fs::write(model.join("config.json"), other).unwrap();
    fails(&mut with(name), 3, "supported are llama");
    fs::write(model.join("config.json"), "{").unwrap();
    fails(&mut with(name), 3, "config.json");
    let gguf = folder.write("m.gguf", "GGUF");
    fails(&mut with(gguf.to_str().unwrap()), 3, "m.gguf");
}

#[test]
fn settings_out_of_range_are_usage_errors() {
    let folder = Folder::new();
    let model = folder.tiny_model();
    let prompts = folder.write("in.jsonl", "{\"prompt\": \"a\"}\n");
    let with = |flags: &[&str]| {
        let mut command = engine();
        command.arg("generate").arg(&model).arg("--prompts").arg(&prompts).args(flags);
        command
    };
    fails(&mut with(&["--max-model-len", "100000"]), 2, "max_model_len is 100000");
    fails(&mut with(&["--block-size", "17"]), 2, "block_size is 17");
    fails(&mut with(&["--temperature", "1000"]), 2, "temperature is 1000");
    fails(&mut with(&["--top-k", "-2"]), 2, "--top-k is -2");
    fails(&mut with(&["--n", "1000"]), 2, "n is 1000");
}

#[test]
fn doctor_says_what_will_run() {
    let folder = Folder::new();
    let mut command = engine();
    command.arg("doctor").arg(folder.tiny_model()).args(SMALL).env("ENGINE_CPU", "portable");
    let ran = run(&mut command);
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let found = ::engine::features().join(" ");
    assert!(ran.stdout.contains(&format!("cpu features {found}")), "{}", ran.stdout);
    for part in ["cores", "kernels      portable", "weights", "kv cache", "vocabulary 512", "GB/s"]
    {
        assert!(ran.stdout.contains(part), "no {part}: {}", ran.stdout);
    }
}
