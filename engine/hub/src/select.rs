//! Which files of a repository an engine reads. Pure: names in, names out.

use engine::model::hub::{HubId, gguf_parts, is_file_name, is_later_part};
use engine::{Error, Result};

/// Files beside the weights that are read when they are there.
const SIDE: [&str; 5] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
];
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// Names of a message at most.
const SHOWN: usize = 12;

/// What to fetch.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Choice {
    /// A directory with one file of weights.
    Single {
        /// Everything, weights last.
        files: Vec<String>,
    },
    /// A directory with an index, which names files still to fetch.
    Sharded {
        /// Everything but the weights.
        files: Vec<String>,
        /// The index among them.
        index: &'static str,
    },
    /// A GGUF file, which holds configuration and tokenizer too.
    Gguf {
        /// The file, or its parts in order.
        files: Vec<String>,
    },
}

impl Choice {
    /// What to fetch first.
    pub(crate) fn files(&self) -> &[String] {
        match self {
            Self::Single { files } | Self::Sharded { files, .. } | Self::Gguf { files } => files,
        }
    }
}

/// Chooses among the files of a repository: the named file, else safetensors, else the only GGUF file.
pub(crate) fn choose(id: &HubId, names: &[&str]) -> Result<Choice> {
    if let Some(file) = id.file() {
        return gguf(id, file, names);
    }
    let has = |name: &str| names.contains(&name);
    let mut files: Vec<String> =
        SIDE.into_iter().filter(|name| has(name)).map(str::to_owned).collect();
    if has("config.json") && has(SINGLE) {
        files.push(SINGLE.to_owned());
        return Ok(Choice::Single { files });
    }
    if has("config.json") && has(INDEX) {
        files.push(INDEX.to_owned());
        return Ok(Choice::Sharded { files, index: INDEX });
    }
    let ggufs = ggufs(names);
    match ggufs.as_slice() {
        [one] => gguf(id, one, names),
        [] => Err(Error::model(format!(
            "{id} holds neither config.json with {SINGLE} nor a gguf file"
        ))),
        [first, ..] => Err(Error::model(format!(
            "{id} holds {} gguf files, name one, for example {id}:{first}: {}",
            ggufs.len(),
            shown(&ggufs)
        ))),
    }
}

/// What a model can be opened from: GGUF files that are no later part of a split one.
fn ggufs<'n>(names: &[&'n str]) -> Vec<&'n str> {
    let first = |name: &&str| name.ends_with(".gguf") && is_file_name(name) && !is_later_part(name);
    names.iter().copied().filter(first).collect()
}

fn gguf(id: &HubId, first: &str, names: &[&str]) -> Result<Choice> {
    let files = gguf_parts(first);
    match files.iter().find(|part| !names.contains(&part.as_str())) {
        None => Ok(Choice::Gguf { files }),
        Some(missing) => {
            let ggufs = ggufs(names);
            let there = if ggufs.is_empty() { "none".to_owned() } else { shown(&ggufs) };
            let repository = id.as_str();
            Err(Error::model(format!("{repository} holds no {missing}, its gguf files: {there}")))
        }
    }
}

fn shown(names: &[&str]) -> String {
    let more = if names.len() > SHOWN { ", ..." } else { "" };
    format!("{}{more}", names[..names.len().min(SHOWN)].join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(id: &str, names: &[&str]) -> Result<Choice, String> {
        choose(&HubId::parse(id).unwrap(), names).map_err(|error| error.to_string())
    }

    fn owned(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn safetensors_come_before_gguf_and_nothing_unread_is_fetched() {
        let names =
            ["README.md", "a.gguf", SINGLE, "pytorch_model.bin", "tokenizer.json", "config.json"];
        let files = owned(&["config.json", "tokenizer.json", SINGLE]);
        assert_eq!(chosen("o/n", &names), Ok(Choice::Single { files }));
        let names = ["config.json", INDEX, "model-00001-of-00002.safetensors"];
        let files = owned(&["config.json", INDEX]);
        assert_eq!(chosen("o/n", &names), Ok(Choice::Sharded { files, index: INDEX }));
    }

    #[test]
    fn one_gguf_is_taken_and_several_are_listed() {
        let only = Ok(Choice::Gguf { files: owned(&["a.gguf"]) });
        assert_eq!(chosen("o/n", &["config.json", "a.gguf"]), only);
        assert_eq!(chosen("o/n:a.gguf", &["b.gguf", "a.gguf"]), only);
        let named = Ok(Choice::Gguf { files: owned(&["jack-of-all-trades.gguf"]) });
        assert_eq!(chosen("o/n", &["jack-of-all-trades.gguf"]), named);
        let parts = ["x-00001-of-00002.gguf", "x-00002-of-00002.gguf"];
        assert_eq!(chosen("o/n", &parts), Ok(Choice::Gguf { files: owned(&parts) }));
        let error = chosen("o/n", &["b.gguf", "a.gguf"]).unwrap_err();
        assert_eq!(
            error,
            "o/n holds 2 gguf files, name one, for example o/n:b.gguf: b.gguf, a.gguf"
        );
        let error = chosen("o/n:c.gguf", &["b.gguf"]).unwrap_err();
        assert_eq!(error, "o/n holds no c.gguf, its gguf files: b.gguf");
        let error = chosen("o/n", &["../a.gguf", "model.bin"]).unwrap_err();
        assert!(error.contains("neither"), "{error}");
    }
}
