//! Small models in every container, and damaged ones.

use super::*;
use crate::config::Quantization;
use crate::model::bytes::Bytes;
use crate::model::dequant::Format;
use crate::model::gguf::tests::Builder;
use crate::model::rope::RopeScaling;
use crate::model::safetensors::Writer;
use kernels::{Dtype, Kernels, Level};

/// Kernels that multiply quantised weights as they are, on so many threads.
fn kernels(threads: usize) -> Kernels {
    Kernels::new(Level::Portable, threads).unwrap()
}

/// A folder of one test, removed when dropped.
pub(crate) struct Scratch {
    pub(crate) path: PathBuf,
}

/// A fresh folder whose name starts with `name`.
pub(crate) fn scratch(name: &str) -> Scratch {
    let path = std::env::temp_dir().join(format!("engine-model-{name}-{}", std::process::id()));
    std::fs::remove_dir_all(&path).ok();
    std::fs::create_dir_all(&path).unwrap();
    Scratch { path }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.path).ok();
    }
}

const CONFIG: &str = r#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 32,
    "intermediate_size": 64, "max_position_embeddings": 128, "num_attention_heads": 2,
    "num_hidden_layers": 2, "num_key_value_heads": 1, "head_dim": 16, "rms_norm_eps": 1e-05,
    "eos_token_id": 3, "vocab_size": 40}"#;

/// The numbers of a weight: different for every weight, row and column, exact in bf16 products of f32.
fn values(t: &TensorSpec) -> Vec<f32> {
    let salt = t.name.bytes().fold(7u32, |h, b| h.wrapping_mul(31) ^ u32::from(b)) % 97;
    (0..t.elements()).map(|i| i as f32 + salt as f32 / 128.0).collect()
}

fn write_weights(path: &Path, tensors: &[TensorSpec]) {
    let mut writer = Writer::create(path, tensors, Dtype::F32).unwrap();
    tensors.iter().for_each(|t| writer.append(&values(t)).unwrap());
    writer.finish().unwrap();
}

fn directory(name: &str, config: &str, tensors: &[TensorSpec]) -> Scratch {
    let dir = scratch(name);
    std::fs::write(dir.path.join("config.json"), config).unwrap();
    write_weights(&dir.path.join("model.safetensors"), tensors);
    dir
}

fn tied() -> ModelConfig {
    let config = ModelConfig::from_hf_json(CONFIG).unwrap();
    ModelConfig { tied_embeddings: true, ..config }
}

/// The same model as a GGUF file, rows of query and key interleaved as the converter does for llama.
fn gguf(architecture: &str) -> Builder {
    gguf_of(architecture, &(0..40).map(|i| format!("t{i}")).collect::<Vec<_>>())
}

/// The same with these tokens.
fn gguf_of(architecture: &str, tokens: &[String]) -> Builder {
    let key = |k: &str| format!("{architecture}.{k}");
    let mut config = tied();
    config.architecture = Architecture::from_model_type(architecture).unwrap();
    config.qkv_bias = config.architecture == Architecture::Qwen2;
    config.qk_norm = config.architecture == Architecture::Qwen3;
    let mut b = Builder::new()
        .string("general.architecture", architecture)
        .number(&key("block_count"), 2)
        .number(&key("context_length"), 128)
        .number(&key("embedding_length"), 32)
        .number(&key("feed_forward_length"), 64)
        .number(&key("attention.head_count"), 2)
        .number(&key("attention.head_count_kv"), 1)
        .float(&key("attention.layer_norm_rms_epsilon"), 1e-5)
        .strings("tokenizer.ggml.tokens", tokens)
        .string("tokenizer.chat_template", "{{ messages }}")
        .number("tokenizer.ggml.eos_token_id", 3)
        .number("tokenizer.ggml.eot_token_id", 5);
    for t in config.tensors() {
        let mut data = values(&t);
        let rotated = t.name.contains("q_proj.weight") || t.name.contains("k_proj.weight");
        if architecture == "llama" && rotated {
            let plain = data.clone();
            for row in 0..t.shape[0] {
                // The converter: head, half, place becomes head, place, half.
                let (head, half, place) = (row / 16, row % 16 / 8, row % 8);
                let to = head * 16 + place * 2 + half;
                data[to * 32..][..32].copy_from_slice(&plain[row * 32..][..32]);
            }
        }
        let dims: Vec<u64> = t.shape.iter().rev().map(|n| *n as u64).collect();
        b = b.f32(&config_gguf::gguf_name(&t.name).unwrap(), &dims, &data);
    }
    b
}

use crate::model::config::Architecture;

fn from_gguf(bytes: Vec<u8>) -> Result<ModelSource> {
    ModelSource::from_gguf(Gguf::from_bytes(Bytes::memory("test.gguf", bytes.into()))?)
}

fn assert_weights(source: &ModelSource) {
    for t in source.config().tensors() {
        let (rows, cols) = match t.shape[..] {
            [rows, cols] => (rows, cols),
            _ => (1, t.shape[0]),
        };
        let all = values(&t);
        let mut out = vec![0.0; rows * cols];
        source.read_rows(&t.name, 0..rows, &mut out).unwrap();
        assert_eq!(out, all, "{}", t.name);
        let some = rows / 3..rows - rows / 4;
        let out = &mut out[..some.len() * cols];
        source.read_rows(&t.name, some.clone(), out).unwrap();
        assert_eq!(out, &all[some.start * cols..some.end * cols], "{}", t.name);
    }
}

#[test]
fn every_container_gives_the_same_weights() {
    let dir = directory("source-dir", CONFIG, &tied().tensors());
    let source = ModelSource::open(&dir.path).unwrap();
    assert!(source.config().tied_embeddings && !source.has("lm_head.weight"));
    assert_eq!(source.shape("model.norm.weight").unwrap(), [32]);
    assert_eq!((source.hf_dir(), source.eos()), (Some(dir.path.as_path()), &[3][..]));
    assert_weights(&source);
    for architecture in ["llama", "qwen2", "qwen3"] {
        let source = from_gguf(gguf(architecture).build()).unwrap();
        assert!(source.config().tied_embeddings && source.gguf().is_some());
        assert_eq!((source.eos(), source.config().rms_eps), (&[3, 5][..], 1e-5));
        assert_eq!(source.chat_template().unwrap().as_deref(), Some("{{ messages }}"));
        assert_weights(&source);
    }
    let weights = std::fs::read(dir.path.join("model.safetensors")).unwrap();
    let memory = MemoryModel {
        name: "builtin:test",
        config_json: CONFIG,
        tokenizer_json: "{}",
        chat_template: None,
        weights: weights.into(),
    };
    let source = ModelSource::from_memory(memory).unwrap();
    assert_eq!(source.tokenizer_json().unwrap().as_deref(), Some("{}"));
    assert_weights(&source);
    std::fs::remove_file(dir.path.join("config.json")).unwrap();
    std::fs::write(dir.path.join("jack-of-all-trades.gguf"), gguf("llama").build()).unwrap();
    assert_weights(&ModelSource::open(&dir.path).unwrap());
}

#[test]
fn missing_and_misshapen_weights_are_named_with_both_shapes() {
    let opened = |name: &str, config: &str, tensors: &[TensorSpec]| {
        ModelSource::open(&directory(name, config, tensors).path).unwrap_err().to_string()
    };
    let mut tensors = tied().tensors();
    let q = tensors.iter_mut().find(|t| t.name.contains("1.self_attn.q_proj")).unwrap();
    q.shape = vec![16, 32];
    let error = opened("source-shape", CONFIG, &tensors);
    let expected =
        "\"model.layers.1.self_attn.q_proj.weight\" has shape [16, 32], expected [32, 32]";
    assert!(error.contains(expected), "{error}");
    tensors.retain(|t| !t.name.contains("1.self_attn.q_proj"));
    let error = opened("source-missing", CONFIG, &tensors);
    assert!(error.contains("q_proj.weight\" is missing, expected shape [32, 32]"), "{error}");
    let untied = CONFIG.replacen('{', "{\"tie_word_embeddings\": false,", 1);
    let error = opened("source-untied", &untied, &tied().tensors());
    assert!(error.contains("\"lm_head.weight\" is missing"), "{error}");
    let empty = scratch("source-empty");
    let error = ModelSource::open(&empty.path).unwrap_err().to_string();
    assert!(error.contains("neither config.json nor a gguf file"), "{error}");
    let error = ModelSource::open(&empty.path.join("no")).unwrap_err().to_string();
    assert!(error.ends_with("no such file or directory"), "{error}");
}

#[test]
fn experts_and_unknown_architectures_are_refused() {
    let error = from_gguf(gguf("llama").number("llama.expert_count", 8).build()).unwrap_err();
    assert!(error.to_string().contains("mixture of experts"), "{error}");
    let other = Builder::new().string("general.architecture", "gemma").build();
    let error = from_gguf(other).unwrap_err().to_string();
    assert!(error.contains("\"gemma\", supported are llama, mistral"), "{error}");
    for name in ["blk.1.attn_q.bias", "output_norm.bias", "blk.0.attn_q_norm.weight"] {
        let error = from_gguf(gguf("llama").f32(name, &[32], &[0.0; 32]).build()).unwrap_err();
        let expected = format!("test.gguf: tensor {name:?} is not implemented");
        assert_eq!(error.to_string(), expected);
    }
    let harmless = gguf("llama").f32("cls.output.weight", &[32], &[0.0; 32]);
    assert!(from_gguf(harmless.build()).is_ok());
}

#[test]
fn rope_factors_in_a_gguf_file_are_used() {
    let factors: Vec<f32> = (0..8).map(|i| 1.0 + i as f32).collect();
    let source = from_gguf(gguf("llama").f32("rope_freqs.weight", &[8], &factors).build()).unwrap();
    let plain = tied().inv_freq();
    let scaled = source.config().inv_freq();
    assert_eq!((scaled[0], scaled[7]), (plain[0], plain[7] / 8.0));
    let short = gguf("llama").f32("rope_freqs.weight", &[4], &factors[..4]).build();
    let error = from_gguf(short).unwrap_err().to_string();
    assert!(error.contains("4 rope factors, expected 8"), "{error}");
}

#[test]
fn rope_factors_of_gguf_metadata_are_linear_unless_they_are_none() {
    let scaling = |file: Builder| from_gguf(file.build()).unwrap().config().rope.scaling.clone();
    let factor = || gguf("llama").float("llama.rope.scaling.factor", 4.0);
    let linear = RopeScaling::Linear { factor: 4.0 };
    assert_eq!(scaling(factor()), linear);
    assert_eq!(scaling(gguf("llama").float("llama.rope.scale_linear", 4.0)), linear);
    assert_eq!(scaling(factor().string("llama.rope.scaling.type", "linear")), linear);
    assert_eq!(scaling(factor().string("llama.rope.scaling.type", "none")), RopeScaling::None);
    assert_eq!(scaling(gguf("llama").float("llama.rope.scaling.factor", 0.0)), RopeScaling::None);
    assert_eq!(scaling(gguf("llama").float("llama.rope.scaling.factor", 1.0)), RopeScaling::None);
}

#[test]
fn chat_templates_come_from_the_right_file() {
    let dir = directory("source-template", CONFIG, &tied().tensors());
    let template = || ModelSource::open(&dir.path).unwrap().chat_template().unwrap();
    let write = |name: &str, text: &str| std::fs::write(dir.path.join(name), text).unwrap();
    assert_eq!(template(), None);
    write("tokenizer_config.json", r#"{"chat_template": "one"}"#);
    assert_eq!(template().as_deref(), Some("one"));
    let list = r#"{"chat_template": [{"name": "tool_use", "template": "t"},
        {"name": "default", "template": "d"}]}"#;
    write("tokenizer_config.json", list);
    assert_eq!(template().as_deref(), Some("d"));
    write("chat_template.jinja", "file");
    assert_eq!(template().as_deref(), Some("file"));
    write("generation_config.json", r#"{"eos_token_id": [4, 5], "top_k": 20}"#);
    let source = ModelSource::open(&dir.path).unwrap();
    assert_eq!((source.eos(), source.generation().top_k), (&[4, 5][..], Some(20)));
    write("generation_config.json", r#"{"eos_token_id": [4, 999999]}"#);
    let error = ModelSource::open(&dir.path).unwrap_err().to_string();
    let expected =
        "generation_config.json: special token id 999999 is outside the vocabulary of 40";
    assert!(error.ends_with(expected), "{error}");
}

/// A chat model's file names the end of a turn; a text that is no chat ends with another token.
#[test]
fn control_tokens_of_a_gguf_file_end_a_text_by_their_names() {
    let mut tokens: Vec<String> = (0..40).map(|i| format!("t{i}")).collect();
    for (id, name) in [(1, "<|endoftext|>"), (3, "<|im_end|>"), (8, "<EOT>"), (9, "<|fim_pad|>")] {
        tokens[id] = name.to_owned();
    }
    let types = |control: &[usize]| -> Vec<i32> {
        (0..40).map(|id| if control.contains(&id) { 3 } else { 1 }).collect()
    };
    let eos = |file: Builder| from_gguf(file.build()).unwrap().eos().to_vec();
    let file = || gguf_of("qwen2", &tokens).number("tokenizer.ggml.eom_token_id", 7);
    assert_eq!(eos(file()), [3, 5, 7], "without types there are no control tokens");
    let typed = file().integers("tokenizer.ggml.token_type", &types(&[1, 3, 9]));
    assert_eq!(eos(typed), [3, 5, 7, 1], "the named ones first; 8 is a word like any other");
}

/// Opens damaged bytes and reads everything: an error or numbers, never a panic.
fn survives(bytes: Vec<u8>, open: fn(Vec<u8>) -> Result<ModelSource>) -> bool {
    let Ok(source) = open(bytes) else { return false };
    for t in source.config().tensors() {
        let mut out = vec![0.0; t.elements() as usize];
        let rows = if t.shape.len() == 2 { t.shape[0] } else { 1 };
        source.read_rows(&t.name, 0..rows, &mut out).expect("checked when it was opened");
    }
    true
}

fn from_safetensors(weights: Vec<u8>) -> Result<ModelSource> {
    ModelSource::from_memory(MemoryModel {
        name: "test",
        config_json: CONFIG,
        tokenizer_json: "",
        chat_template: None,
        weights: weights.into(),
    })
}

#[test]
fn cut_and_flipped_files_never_panic() {
    let dir = directory("source-fuzz", CONFIG, &tied().tensors());
    let safetensors = std::fs::read(dir.path.join("model.safetensors")).unwrap();
    type Open = fn(Vec<u8>) -> Result<ModelSource>;
    let header = u64::from_le_bytes(safetensors[..8].try_into().unwrap()) as usize + 8;
    let gguf = gguf("llama").build();
    let cases: [(Vec<u8>, Open, usize); 2] =
        [(safetensors, from_safetensors, header), (gguf, from_gguf, 2600)];
    for (bytes, open, header) in cases {
        assert!(survives(bytes.clone(), open));
        for part in 0..50 {
            assert!(!survives(bytes[..bytes.len() * part / 50].to_vec(), open), "{part}/50");
        }
        let (mut state, mut valid) = (0x5eed_u64, 0);
        println!("seed {state:#x}");
        for _ in 0..3000 {
            let mut damaged = bytes.clone();
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let (at, bit) = ((state >> 33) as usize % header, state >> 20 & 7);
            damaged[at] ^= 1 << bit;
            valid += usize::from(survives(damaged, open));
        }
        assert!((1..3000).contains(&valid), "{valid} of 3000 damaged files were valid");
    }
}

/// Bytes of a quantised weight whose blocks' scales have this high byte, but for the lowest three bits.
fn quantised(format: Format, elements: usize, seed: u64, high: u8) -> Vec<u8> {
    let mut state = seed;
    let mut bytes = vec![0; format.bytes(elements as u64).unwrap() as usize];
    for byte in &mut bytes {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        *byte = (state >> 33) as u8;
    }
    let halves: &[usize] = match format {
        Format::Q4_0 | Format::Q5_0 | Format::Q8_0 => &[0],
        Format::Q4_1 | Format::Q5_1 | Format::Q4_K | Format::Q5_K => &[0, 2],
        Format::Q2_K => &[80, 82],
        Format::Q3_K => &[108],
        _ => &[208],
    };
    for block in bytes.chunks_exact_mut(format.block_bytes()) {
        halves.iter().for_each(|at| block[at + 1] = high | block[at + 1] & 3);
    }
    bytes
}

/// A llama with every tensor in the format that `format` gives for its name; `None` keeps it in full.
/// Scales of blocks lie between 0.002 and 0.004.
fn quantised_model(format: impl Fn(&str) -> Option<Format>) -> ModelSource {
    quantised_model_of_scale(0x18, format)
}

fn quantised_model_of_scale(high: u8, format: impl Fn(&str) -> Option<Format>) -> ModelSource {
    const H: usize = 256;
    let shape = CONFIG.replace("\"hidden_size\": 32", "\"hidden_size\": 256");
    let shape = shape.replace("\"intermediate_size\": 64", "\"intermediate_size\": 512");
    let shape = shape.replace("\"num_attention_heads\": 2", "\"num_attention_heads\": 16");
    let config = ModelConfig::from_hf_json(&shape).unwrap();
    let config = ModelConfig { tied_embeddings: true, ..config };
    let key = |k: &str| format!("llama.{k}");
    let mut b = Builder::new()
        .string("general.architecture", "llama")
        .number(&key("block_count"), 2)
        .number(&key("context_length"), 128)
        .number(&key("embedding_length"), H as u32)
        .number(&key("feed_forward_length"), 512)
        .number(&key("attention.head_count"), 16)
        .number(&key("attention.head_count_kv"), 1)
        .float(&key("attention.layer_norm_rms_epsilon"), 1e-5)
        .strings("tokenizer.ggml.tokens", &(0..40).map(|i| format!("t{i}")).collect::<Vec<_>>())
        .number("tokenizer.ggml.eos_token_id", 3);
    for (seed, t) in config.tensors().into_iter().enumerate() {
        let dims: Vec<u64> = t.shape.iter().rev().map(|n| *n as u64).collect();
        let name = config_gguf::gguf_name(&t.name).unwrap();
        b = match format(&t.name).filter(|_| t.shape.len() == 2) {
            None => b.f32(&name, &dims, &vec![0.5; t.elements() as usize]),
            Some(format) => {
                let number = Format::GGML.iter().find(|(_, f)| *f == format).unwrap().0;
                b.tensor(
                    &name,
                    &dims,
                    number,
                    quantised(format, t.elements() as usize, seed as u64, high),
                )
            }
        };
    }
    from_gguf(b.build()).unwrap()
}

/// All parameters of `weights`, row-major.
fn parameters(weights: &mut crate::decoder::Weights, config: &ModelConfig) -> Vec<Vec<f32>> {
    let specs = super::super::param_specs(config);
    let read = |(spec, param): (&super::super::ParamSpec, crate::decoder::ParamMut<'_>)| {
        let mut values = vec![0.0; spec.len()];
        param.read(&mut values);
        values
    };
    specs.iter().zip(weights.params_mut()).map(read).collect()
}

#[test]
fn weights_kept_as_stored_are_the_expanded_ones() {
    use crate::decoder::Weights;
    let formats = [
        Format::Q4_0,
        Format::Q4_1,
        Format::Q5_0,
        Format::Q5_1,
        Format::Q8_0,
        Format::Q2_K,
        Format::Q3_K,
        Format::Q4_K,
        Format::Q5_K,
        Format::Q6_K,
    ];
    for (i, format) in formats.into_iter().enumerate() {
        // Values are of another format than queries and keys, as in the usual mixtures.
        let other = formats[(i + 3) % formats.len()];
        let source =
            quantised_model(|name| Some(if name.contains("v_proj") { other } else { format }));
        let load =
            |quantization| Weights::load(&source, Dtype::F32, quantization, &kernels(2)).unwrap();
        let (mut full, mut stored) = (load(Quantization::None), load(Quantization::AsStored));
        assert!(stored.quantised() && !full.quantised());
        assert_eq!(stored.bytes(), Weights::bytes_as_stored(&source, Dtype::F32));
        assert!(stored.bytes() < full.bytes() / 2, "{format:?}: {} bytes", stored.bytes());
        let config = source.config();
        let pairs = parameters(&mut full, config).into_iter().zip(parameters(&mut stored, config));
        for (full, stored) in pairs {
            for (a, b) in full.iter().zip(&stored) {
                // Half a unit of an f16 for the scale and for the minimum, which is below 0.5.
                assert!((a - b).abs() <= 5e-4 * (a.abs() + 1.0), "{format:?}: {a}, {b}");
            }
        }
    }
}

#[test]
fn a_matrix_with_one_tensor_in_full_is_kept_in_full() {
    use crate::decoder::Weights;
    use kernels::Linear;
    let source = quantised_model(|name| (!name.contains("up_proj")).then_some(Format::Q4_0));
    let (stored, kernels) = (Quantization::AsStored, kernels(1));
    let weights = Weights::load(&source, Dtype::Bf16, stored, &kernels).unwrap();
    for layer in &weights.layers {
        assert!(matches!(layer.gate_up, Linear::Full(_)));
        assert!(matches!(layer.down, Linear::Quantised(_)));
    }
    let mut row = [0.0; 256];
    weights.layers[1].gate_up.get_row(512, &mut row);
    assert_eq!(row, [0.5; 256]);
}

#[test]
fn a_scale_that_does_not_fit_names_its_tensor() {
    use crate::decoder::Weights;
    // Scales of 16,384 and more, times the scales within a block.
    let source = quantised_model_of_scale(0x74, |_| Some(Format::Q4_K));
    let kernels = kernels(2);
    let error =
        Weights::load(&source, Dtype::Bf16, Quantization::AsStored, &kernels).err().unwrap();
    let message = error.to_string();
    assert!(message.contains("limit is what f16 holds"), "{message}");
    assert!(message.contains("tensor \"model."), "{message}");
    assert!(Weights::load(&source, Dtype::Bf16, Quantization::None, &kernels).is_ok());
}
