//! A model as a Hugging Face directory, and the optimizer beside it.
//!
//! What is written is what `transformers` reads: `config.json`, `generation_config.json`,
//! `model.safetensors`, `tokenizer.json` and `tokenizer_config.json`. The optimizer's numbers are under
//! `trainer/`, in f32.

use std::path::Path;

use engine::model::safetensors::{SafeTensors, Writer};
use engine::model::{ParamShape, ParamSpec, TensorSpec};
use engine::{Dtype, Engine};
use serde_json::json;

use crate::checkpoint::CheckpointWriter;
use crate::error::{Error, Result};
use crate::optimizer::Optimizer;

/// The optimizer's file within a checkpoint.
const OPTIMIZER: &str = "trainer/optimizer.safetensors";

/// The small files of a model's directory.
#[derive(Clone, Debug)]
pub struct ModelFiles {
    files: Vec<(&'static str, String)>,
    dtype: Dtype,
}

impl ModelFiles {
    /// Collects them from a loaded model.
    ///
    /// # Errors
    /// When the configuration cannot be said in `config.json`.
    pub fn new(engine: &Engine) -> Result<Self> {
        let config = engine.model();
        let mut files =
            vec![("config.json", config.to_hf_json(engine.dtype()).map_err(Error::engine)?)];
        let mut generation = serde_json::Map::new();
        generation.insert("eos_token_id".to_owned(), json!(engine.eos()));
        for (name, id) in [("bos_token_id", config.bos), ("pad_token_id", config.pad)] {
            if let Some(id) = id {
                generation.insert(name.to_owned(), json!(id));
            }
        }
        files.push(("generation_config.json", serde_json::Value::Object(generation).to_string()));
        if let Some(tokenizer) = engine.tokenizer() {
            files.push(("tokenizer.json", tokenizer.to_json().map_err(Error::engine)?));
            files.push(("tokenizer_config.json", tokenizer.tokenizer_config_json()));
        }
        Ok(Self { files, dtype: engine.dtype() })
    }
}

/// Writes a model whose parameters are `values`, in the order of `specs`, into the folder `dir`.
///
/// # Errors
/// When a file cannot be written.
pub fn save_model(
    files: &ModelFiles,
    dir: &Path,
    specs: &[ParamSpec],
    values: &[Vec<f32>],
) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))?;
    for (name, text) in &files.files {
        let path = dir.join(name);
        std::fs::write(&path, text).map_err(|e| Error::io(&path, e))?;
    }
    let mut writer =
        Writer::create(&dir.join("model.safetensors"), &tensors(specs, ""), files.dtype)
            .map_err(Error::engine)?;
    append(&mut writer, specs, values)?;
    writer.finish().map_err(Error::engine)
}

/// Writes the model and the optimizer of a run into its checkpoint.
///
/// # Errors
/// When a file cannot be written; named by the place it was to have.
pub(crate) fn save_learnt(
    files: &ModelFiles,
    writer: &CheckpointWriter<'_>,
    optimizer: &Optimizer,
) -> Result<()> {
    save_model(files, writer.path(), optimizer.specs(), optimizer.masters())
        .and_then(|()| save_optimizer(writer.path(), optimizer))
        .map_err(|e| writer.named(e))
}

/// Writes masters and moments.
///
/// # Errors
/// When the file cannot be written.
fn save_optimizer(dir: &Path, optimizer: &Optimizer) -> Result<()> {
    let path = dir.join(OPTIMIZER);
    let folder = path.parent().expect("the file is in a folder");
    std::fs::create_dir_all(folder).map_err(|e| Error::io(folder, e))?;
    let specs = optimizer.specs();
    let parts = [
        ("master.", &optimizer.masters),
        ("first.", &optimizer.first),
        ("second.", &optimizer.second),
    ];
    let all: Vec<TensorSpec> =
        parts.iter().flat_map(|(prefix, _)| tensors(specs, prefix)).collect();
    let mut writer = Writer::create(&path, &all, Dtype::F32).map_err(Error::engine)?;
    for (_, values) in parts {
        append(&mut writer, specs, values)?;
    }
    writer.finish().map_err(Error::engine)
}

/// Reads masters and moments back into `optimizer`.
///
/// # Errors
/// When the file is missing or belongs to another model.
pub(crate) fn load_optimizer(dir: &Path, optimizer: &mut Optimizer) -> Result<()> {
    let file = SafeTensors::open(&dir.join(OPTIMIZER)).map_err(Error::engine)?;
    let specs = optimizer.specs().to_vec();
    let parts = [
        ("master.", &mut optimizer.masters),
        ("first.", &mut optimizer.first),
        ("second.", &mut optimizer.second),
    ];
    for (prefix, values) in parts {
        for (spec, values) in specs.iter().zip(values) {
            let width = match spec.shape {
                ParamShape::Matrix => spec.cols,
                ParamShape::Vector => 1,
            };
            for ((name, range), tensor) in
                spec.tensors.iter().zip(tensors(std::slice::from_ref(spec), prefix))
            {
                if file.shape(&tensor.name) != Some(&tensor.shape[..]) {
                    return Err(Error::checkpoint(format!(
                        "{OPTIMIZER} does not fit tensor {name}"
                    )));
                }
                let rows = if tensor.shape.len() == 1 { 0..1 } else { 0..range.len() };
                let out = &mut values[range.start * width..range.end * width];
                file.read_rows(&tensor.name, rows, out).map_err(Error::engine)?;
            }
        }
    }
    Ok(())
}

/// The named tensors of the parameters, in their order.
pub(crate) fn tensors(specs: &[ParamSpec], prefix: &str) -> Vec<TensorSpec> {
    let named = |spec: TensorSpec| TensorSpec { name: format!("{prefix}{}", spec.name), ..spec };
    specs.iter().flat_map(ParamSpec::specs).map(named).collect()
}

/// Appends whole parameters: the tensors of one lie one after the other in it.
fn append(writer: &mut Writer, specs: &[ParamSpec], values: &[Vec<f32>]) -> Result<()> {
    assert_eq!(specs.len(), values.len(), "one buffer per parameter");
    values.iter().try_for_each(|values| writer.append(values).map_err(Error::engine))
}
