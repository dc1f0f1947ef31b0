//! Models compiled into the program: `builtin:arith`, the default wherever a model may be left out.
//!
//! A policy of two million parameters (Llama architecture, bytes as tokens) that answers `12+7=`; made
//! from a seed by `engine sft` (the command is in `engine/assets/README.md`).

use std::borrow::Cow;

use super::hub::Builtin;
use super::source::{MemoryModel, ModelSource};
use crate::error::Result;

/// Opens a built-in model.
///
/// # Errors
/// Only when the program was built with damaged files.
pub fn open_builtin(model: Builtin) -> Result<ModelSource> {
    match model {
        Builtin::Arith => ModelSource::from_memory(MemoryModel {
            name: "builtin:arith",
            config_json: include_str!("../../assets/arith/config.json"),
            tokenizer_json: include_str!("../../assets/arith/tokenizer.json"),
            chat_template: Some(include_str!("../../assets/arith/chat_template.jinja")),
            weights: Cow::Borrowed(include_bytes!("../../assets/arith/model.safetensors")),
        }),
    }
}
