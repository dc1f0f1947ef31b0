//! Where a flag's value comes from: command line, else environment, else `--config`, else default.
//!
//! A value from the file is put on the command line in front of a second parse, so it is checked and
//! reported like any other. Tables of the file belong to the training run and are handed on as text.

use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

use clap::builder::BoolishValueParser;
use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, CommandFactory, FromArgMatches};
use toml::{Table, Value};

use crate::args::{Cli, Command};
use crate::exit::{Failure, Result};

/// A command with its flags, and the part of its file that is not about flags.
#[derive(Debug)]
pub(crate) struct Parsed {
    /// The command and its flags.
    pub(crate) command: Command,
    /// The tables of the file, for the commands that take them.
    pub(crate) run_config: Option<RunConfig>,
    /// Where the flags have their values from.
    pub(crate) origins: Origins,
    /// What to say of a variable that was left out of account.
    pub(crate) note: Option<String>,
}

/// Where a flag has its value from; later ones win.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Origin {
    Default,
    File,
    Environment,
    CommandLine,
}

/// The origins of a command's flags, by their names with underscores.
#[derive(Debug)]
pub(crate) struct Origins(HashMap<String, Origin>);

impl Origins {
    /// The origin of a flag.
    pub(crate) fn of(&self, flag: &str) -> Origin {
        self.0.get(flag).copied().unwrap_or(Origin::Default)
    }
}

/// The part of a `--config` file that describes a training run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RunConfig {
    /// The file, for messages.
    pub(crate) path: PathBuf,
    /// Its tables, as TOML.
    pub(crate) text: String,
}

/// Commands whose file may hold tables.
const WITH_TABLES: [&str; 2] = ["rl", "sft"];

/// Parses arguments, the environment and the file they name. `None` when help or the version was asked
/// for and has been printed.
pub(crate) fn parse(args: impl Iterator<Item = OsString>) -> Result<Option<Parsed>> {
    let mut args: Vec<OsString> = args.collect();
    let grammar = grammar();
    let Some(matches) = matches(&grammar, &args)? else { return Ok(None) };
    let Chosen { name, depth, sub, given } = chosen(&grammar, &matches);
    let (mut run_config, mut in_file) = (None, Table::new());
    if let Some(path) = given.get_one::<PathBuf>("config") {
        let (flags, tables) = read_file(path)?;
        if !tables.is_empty() && !WITH_TABLES.contains(&name) {
            let table = tables.keys().next().expect("it is not empty");
            return Err(match flag_of(sub, table) {
                Some(_) => Failure::usage(format!(
                    "{}: `{table}` is a table, expected text",
                    path.display()
                )),
                None => unknown_key(path, table, sub),
            });
        }
        let extra = flag_arguments(path, &flags, sub, given)?;
        let text = toml::to_string(&tables).expect("a parsed table can be written");
        run_config = (!tables.is_empty()).then(|| RunConfig { path: path.clone(), text });
        args.splice(1 + depth..1 + depth, extra);
        in_file = flags;
    }
    let origins = origins(sub, given, &in_file);
    let note = flag_of(sub, "port").filter(|arg| arg.get_env().is_none());
    let note = note.and_then(|_| injected("ENGINE_PORT")).map(|value| {
        format!("ENGINE_PORT={value} is the address of a service, not a port, and has no effect")
    });
    let Some(matches) = self::matches(&grammar, &args)? else { return Ok(None) };
    let cli = Cli::from_arg_matches(&matches).map_err(|error| usage(&error))?;
    Ok(Some(Parsed { command: cli.command, run_config, origins, note }))
}

/// The command that was asked for.
struct Chosen<'a> {
    name: &'a str,
    /// Words that name it.
    depth: usize,
    sub: &'a clap::Command,
    given: &'a ArgMatches,
}

/// The innermost command of `matches`.
fn chosen<'a>(grammar: &'a clap::Command, matches: &'a ArgMatches) -> Chosen<'a> {
    let (mut sub, mut given, mut depth, mut chosen) = (grammar, matches, 0, "");
    while let Some((name, inner)) = given.subcommand() {
        sub = sub.find_subcommand(name).expect("clap found it before");
        (given, depth, chosen) = (inner, depth + 1, name);
    }
    Chosen { name: chosen, depth, sub, given }
}

/// The origins of the flags of `sub`; of the file, `flags` are the values.
fn origins(sub: &clap::Command, given: &ArgMatches, flags: &Table) -> Origins {
    let in_file: HashSet<String> = flags.keys().map(|key| key.replace('-', "_")).collect();
    let ids = sub.get_arguments().map(|arg| arg.get_id().as_str()).filter(|id| *id != "help");
    let origin = |id: &str| match given.value_source(id) {
        Some(ValueSource::CommandLine) => Origin::CommandLine,
        Some(ValueSource::EnvVariable) => Origin::Environment,
        _ if in_file.contains(id) => Origin::File,
        _ => Origin::Default,
    };
    Origins(ids.map(|id| (id.to_owned(), origin(id))).collect())
}

/// The grammar of the command line, every argument with its environment variable.
fn grammar() -> clap::Command {
    with_variables(Cli::command())
}

/// `command` with a variable for each argument of it and of the commands within it.
fn with_variables(command: clap::Command) -> clap::Command {
    let named = |arg: Arg| {
        if arg.get_action().takes_values() || matches!(arg.get_action(), ArgAction::SetTrue) {
            // Leaked once per flag and process: clap keeps names for as long as it likes.
            let name = format!("ENGINE_{}", arg.get_id().as_str().to_ascii_uppercase());
            if arg.get_id() == "port" && injected(&name).is_some() {
                return arg;
            }
            let alone = matches!(arg.get_action(), ArgAction::SetTrue);
            let arg = arg.env(&*Box::leak(name.into_boxed_str())).hide_env(true);
            // What stands alone on the command line is 1 or 0, yes or no, true or false here.
            if alone { arg.value_parser(BoolishValueParser::new()) } else { arg }
        } else {
            arg
        }
    };
    let names: Vec<String> =
        command.get_subcommands().map(|sub| sub.get_name().to_owned()).collect();
    names
        .iter()
        .fold(command.mut_args(named), |command, name| command.mut_subcommand(name, with_variables))
}

/// The value of a variable that Kubernetes sets in every pod: a Service called `engine` gives them
/// `ENGINE_PORT=tcp://10.0.0.1:8000`.
fn injected(name: &str) -> Option<String> {
    let value = std::env::var(name).ok()?;
    let address = ["tcp://", "udp://", "sctp://"].iter().any(|scheme| value.starts_with(scheme));
    address.then_some(value)
}

fn matches(grammar: &clap::Command, args: &[OsString]) -> Result<Option<ArgMatches>> {
    match grammar.clone().try_get_matches_from(args) {
        Ok(matches) => Ok(Some(matches)),
        Err(error) if error.exit_code() == 0 => {
            // A reader that has left wants no help.
            let _closed = error.print();
            Ok(None)
        }
        Err(error) if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let outer = args.get(1).and_then(|word| grammar.find_subcommand(word));
            let within = outer.map_or("command", |outer| outer.get_name());
            let known = outer.unwrap_or(grammar).get_subcommands();
            let names: Vec<&str> = known.map(clap::Command::get_name).collect();
            let (what, names) =
                (if outer.is_some() { "subcommand of " } else { "" }, names.join(" "));
            Err(Failure::usage(format!("no {what}{within} given, known are {names} (see --help)")))
        }
        Err(error) => Err(usage(&error)),
    }
}

/// A refusal of clap's as one line, without its `error: ` and without the usage.
fn usage(error: &clap::Error) -> Failure {
    let text = error.to_string();
    let lines = text.lines().take_while(|line| !line.starts_with("Usage:"));
    let lines = lines.filter(|line| !line.starts_with("For more information"));
    let lines: Vec<&str> = lines.map(str::trim).filter(|line| !line.is_empty()).collect();
    Failure::usage(lines.join("; ").trim_start_matches("error: "))
}

/// The scalars and the tables of a file.
fn read_file(path: &Path) -> Result<(Table, Table)> {
    let text = fs::read_to_string(path)
        .map_err(|error| Failure::usage(format!("{}: {error}", path.display())))?;
    let table: Table = text.parse().map_err(|error: toml::de::Error| {
        let line = error.span().map_or(1, |span| text[..span.start].lines().count().max(1));
        Failure::usage(format!("{}: line {line}: {}", path.display(), error.message()))
    })?;
    Ok(table.into_iter().partition(|(_, value)| !value.is_table()))
}

/// The arguments that say what `flags` say, without those that are given already.
fn flag_arguments(
    path: &Path,
    flags: &Table,
    sub: &clap::Command,
    given: &ArgMatches,
) -> Result<Vec<OsString>> {
    let mut arguments = Vec::new();
    for (key, value) in flags {
        let id = key.replace('-', "_");
        let arg = flag_of(sub, key).ok_or_else(|| unknown_key(path, key, sub))?;
        let source = given.value_source(&id);
        if matches!(source, Some(ValueSource::CommandLine | ValueSource::EnvVariable)) {
            continue;
        }
        let wrong = || {
            let kind = value.type_str();
            Failure::usage(format!("{}: {key} cannot be a {kind}", path.display()))
        };
        let values = match value {
            Value::Array(values) => values.as_slice(),
            one => std::slice::from_ref(one),
        };
        for value in values {
            match (meaning(arg, value).ok_or_else(wrong)?, arg.get_long()) {
                (Meaning::Off, _) => {}
                (Meaning::On, _) => arguments.push(format!("--{}", id.replace('_', "-")).into()),
                (Meaning::Text(text), Some(long)) => {
                    arguments.push(format!("--{long}={text}").into());
                }
                (Meaning::Text(text), None) => arguments.push(text.into()),
            }
        }
    }
    Ok(arguments)
}

/// What a value of the file does to a flag.
enum Meaning {
    /// It is left out.
    Off,
    /// It stands alone.
    On,
    /// It has this value.
    Text(String),
}

/// What `value` means for `arg`; `None` when it does not fit.
fn meaning(arg: &Arg, value: &Value) -> Option<Meaning> {
    match (arg.get_action(), value) {
        (ArgAction::SetTrue, Value::Boolean(true)) => Some(Meaning::On),
        (ArgAction::SetTrue, Value::Boolean(false)) => Some(Meaning::Off),
        (ArgAction::SetTrue, _) => None,
        (_, Value::String(text)) => Some(Meaning::Text(text.clone())),
        (_, Value::Integer(_) | Value::Float(_)) => Some(Meaning::Text(value.to_string())),
        _ => None,
    }
}

/// The flag of `sub` that a key of a file names.
fn flag_of<'a>(sub: &'a clap::Command, key: &str) -> Option<&'a Arg> {
    let id = key.replace('-', "_");
    sub.get_arguments().find(|arg| arg.get_id() == id.as_str() && id != "help")
}

fn unknown_key(path: &Path, key: &str, sub: &clap::Command) -> Failure {
    let known = sub.get_arguments().map(|arg| arg.get_id().as_str()).filter(|id| *id != "help");
    let nearest = nearest(&key.replace('-', "_"), known);
    let hint = nearest.map(|name| format!(", nearest is `{name}`")).unwrap_or_default();
    Failure::usage(format!("{}: unknown key `{key}`{hint}", path.display()))
}

/// The one of `known` with the fewest edits to `name`.
pub(crate) fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    known.min_by_key(|candidate| edits(name, candidate))
}

/// Insertions, deletions and replacements from `from` to `to` (Levenshtein's distance).
fn edits(from: &str, to: &str) -> usize {
    let to: Vec<char> = to.chars().collect();
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (i, a) in from.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, b) in to.iter().enumerate() {
            let replaced = diagonal + usize::from(a != *b);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[to.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances_and_the_nearest_name() {
        assert_eq!(edits("kitten", "sitting"), 3);
        assert_eq!(edits("", "abc"), 3);
        let known = ["max_num_seqs", "max_model_len", "block_size"];
        assert_eq!(nearest("max_model_length", known.into_iter()), Some("max_model_len"));
    }

    #[test]
    fn the_grammar_is_sound_and_every_flag_has_a_variable() {
        let grammar = grammar();
        grammar.clone().debug_assert();
        let within = grammar.find_subcommand("bench").unwrap().get_subcommands();
        for sub in grammar.get_subcommands().chain(within) {
            for arg in sub.get_arguments().filter(|arg| arg.get_id() != "help") {
                let name = format!("ENGINE_{}", arg.get_id().as_str().to_uppercase());
                assert_eq!(arg.get_env().unwrap(), name.as_str(), "{}", sub.get_name());
            }
        }
    }
}
