//! Configurations as transformers 4 and 5 write them.

use super::*;
use crate::error::ErrorKind;

const LLAMA3_V5: &str = r#"{"architectures": ["LlamaForCausalLM"], "attention_bias": false,
    "attention_dropout": 0.0, "bos_token_id": 1, "dtype": "bfloat16", "eos_token_id": 2, "head_dim": 16,
    "hidden_act": "silu", "hidden_size": 64, "initializer_range": 0.02, "intermediate_size": 160,
    "max_position_embeddings": 4096, "mlp_bias": false, "model_type": "llama", "num_attention_heads": 4,
    "num_hidden_layers": 3, "num_key_value_heads": 2, "pad_token_id": 0, "pretraining_tp": 1,
    "rms_norm_eps": 1e-06, "rope_parameters": {"factor": 8.0, "high_freq_factor": 4.0,
    "low_freq_factor": 1.0, "original_max_position_embeddings": 64, "rope_theta": 500000.0,
    "rope_type": "llama3"}, "tie_word_embeddings": false, "transformers_version": "5.23.0",
    "use_cache": true, "vocab_size": 512}"#;

const LLAMA3_V4: &str = r#"{"architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
    "head_dim": 16, "hidden_act": "silu", "hidden_size": 64, "intermediate_size": 160,
    "max_position_embeddings": 4096, "model_type": "llama", "num_attention_heads": 4,
    "num_hidden_layers": 3, "num_key_value_heads": 2, "pad_token_id": 0, "rms_norm_eps": 1e-06,
    "rope_scaling": {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
    "original_max_position_embeddings": 64, "rope_type": "llama3"}, "rope_theta": 500000.0,
    "tie_word_embeddings": false, "torch_dtype": "bfloat16", "vocab_size": 512}"#;

const QWEN2_V5: &str = r#"{"architectures": ["Qwen2ForCausalLM"], "bos_token_id": 1,
    "dtype": "bfloat16", "eos_token_id": [2, 3], "hidden_act": "silu", "hidden_size": 64,
    "intermediate_size": 160, "layer_types": ["full_attention", "full_attention", "full_attention"],
    "max_position_embeddings": 4096, "max_window_layers": 28, "model_type": "qwen2",
    "num_attention_heads": 4, "num_hidden_layers": 3, "num_key_value_heads": 2, "pad_token_id": null,
    "rms_norm_eps": 1e-06, "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    "sliding_window": null, "tie_word_embeddings": true, "use_sliding_window": false,
    "vocab_size": 512}"#;

/// `base` with keys replaced; `null` removes nothing, it is written.
fn with(base: &str, changes: Value) -> String {
    let mut map = object(base).unwrap();
    for (key, value) in changes.as_object().unwrap() {
        map.insert(key.clone(), value.clone());
    }
    Value::Object(map).to_string()
}

fn refused(changes: Value, part: &str) {
    let error = parse(&with(LLAMA3_V5, changes)).unwrap_err().to_string();
    assert!(error.contains(part), "{error}");
}

#[test]
fn both_spellings_mean_the_same() {
    let new = parse(LLAMA3_V5).unwrap();
    let old = parse(LLAMA3_V4).unwrap();
    assert_eq!(new.architecture, Architecture::Llama);
    assert_eq!((new.layers, new.heads, new.kv_heads, new.head_dim), (3, 4, 2, 16));
    assert_eq!((new.bos, &new.eos[..], new.pad), (Some(1), &[2][..], Some(0)));
    assert_eq!(new.rms_eps, 1e-6);
    let scaling = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position: 64,
    };
    assert_eq!(new.rope, RopeConfig { theta: 500_000.0, scaling });
    assert_eq!(
        ModelConfig { original: Map::new(), ..new },
        ModelConfig { original: Map::new(), ..old }
    );
}

#[test]
fn families_differ_where_they_should() {
    let qwen2 = parse(QWEN2_V5).unwrap();
    assert!(qwen2.qkv_bias && !qwen2.qk_norm && qwen2.tied_embeddings);
    assert_eq!((qwen2.head_dim, qwen2.rope.theta, qwen2.eos), (16, 1e6, vec![2, 3]));
    assert_eq!((qwen2.pad, qwen2.sliding_window), (None, None));
    let qwen3 = parse(&with(QWEN2_V5, json!({"architectures": ["Qwen3ForCausalLM"]}))).unwrap();
    assert!(qwen3.qk_norm && !qwen3.qkv_bias);
    assert_eq!(qwen3.head_dim, 128);
    let no_name = with(LLAMA3_V5, json!({"architectures": null, "model_type": "mistral"}));
    let mistral = parse(&no_name).unwrap();
    assert_eq!(mistral.architecture, Architecture::Mistral);
    assert_eq!(mistral.sliding_window, Some(4096));
}

#[test]
fn windows_limit_the_context_only_where_they_are_used() {
    let mistral = json!({"architectures": ["MistralForCausalLM"], "sliding_window": 1024});
    let config = parse(&with(LLAMA3_V5, mistral)).unwrap();
    assert_eq!((config.sliding_window, config.max_context()), (Some(1024), 1024));
    let none = json!({"architectures": ["MistralForCausalLM"], "sliding_window": null});
    assert_eq!(parse(&with(LLAMA3_V5, none)).unwrap().max_context(), 4096);
    let qwen = |changes: Value| parse(&with(QWEN2_V5, changes)).unwrap().max_context();
    assert_eq!(qwen(json!({"sliding_window": 128})), 4096);
    let old = |first: usize| {
        json!({"sliding_window": 128, "use_sliding_window": true, "max_window_layers": first,
            "layer_types": null})
    };
    assert_eq!((qwen(old(3)), qwen(old(2))), (4096, 128));
    let types =
        json!({"sliding_window": 128, "layer_types": ["full_attention", "sliding_attention"]});
    assert_eq!(qwen(types), 128);
}

#[test]
fn what_is_not_implemented_is_refused_by_name() {
    refused(
        json!({"architectures": ["GPT2LMHeadModel"]}),
        "supported are llama, mistral, qwen2, qwen3",
    );
    refused(json!({"architectures": ["LlamaForSequenceClassification"]}), "unknown architecture");
    refused(json!({"hidden_act": "gelu"}), "hidden_act \"gelu\"");
    refused(json!({"attention_bias": true}), "attention_bias is true");
    refused(json!({"mlp_bias": true}), "mlp_bias is true");
    refused(json!({"partial_rotary_factor": 0.5}), "partial_rotary_factor 0.5");
    refused(json!({"quantization_config": {"quant_method": "awq"}}), "quantization_config");
    refused(
        json!({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}),
        "rope scaling \"yarn\"",
    );
    let error = parse(&with(LLAMA3_V5, json!({"mlp_bias": true}))).unwrap_err();
    assert!(matches!(error.kind(), ErrorKind::Unsupported(_)));
}

#[test]
fn values_out_of_range_are_refused_with_their_limits() {
    refused(json!({"vocab_size": 0}), "vocab_size is 0, must be 1 to 4194304");
    refused(json!({"vocab_size": null}), "vocab_size is missing");
    refused(json!({"hidden_size": "64"}), "hidden_size is \"64\", must be a whole number");
    refused(json!({"hidden_size": 1u64 << 60}), "hidden_size is 1152921504606846976");
    refused(json!({"num_hidden_layers": 1_000_000_000}), "num_hidden_layers is 1000000000");
    refused(json!({"num_key_value_heads": 3}), "4 attention heads do not divide over 3 kv heads");
    refused(json!({"num_attention_heads": 0}), "num_attention_heads is 0");
    refused(json!({"head_dim": 24}), "head_dim 24 is not a multiple of 16");
    refused(json!({"head_dim": null, "num_attention_heads": 6}), "does not divide over 6");
    refused(json!({"rms_norm_eps": -1.0}), "rms_norm_eps -1");
    refused(json!({"eos_token_id": 512}), "special token id 512 is outside the vocabulary of 512");
    refused(json!({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}), "low_freq_factor");
    refused(json!({"rope_parameters": {"rope_type": "linear", "factor": 0.0}}), "rope factor 0");
    refused(json!({"rope_parameters": null, "rope_theta": -1.0}), "rope_theta -1");
    let error = parse("[1, 2]").unwrap_err().to_string();
    assert!(error.starts_with("not a json object"), "{error}");
}

#[test]
fn a_written_configuration_reads_back_and_keeps_what_it_does_not_know() {
    for text in [LLAMA3_V5, LLAMA3_V4, QWEN2_V5] {
        let config = parse(text).unwrap();
        let written = config.to_hf_json(Dtype::Bf16).unwrap();
        let again = parse(&written).unwrap();
        let bare = |c: &ModelConfig| ModelConfig { original: Map::new(), ..c.clone() };
        assert_eq!(bare(&again), bare(&config));
        assert_eq!(again.to_hf_json(Dtype::Bf16).unwrap(), written);
    }
    let written = parse(LLAMA3_V5).unwrap().to_hf_json(Dtype::F32).unwrap();
    let map = object(&written).unwrap();
    assert_eq!(map["initializer_range"], json!(0.02));
    assert_eq!((&map["torch_dtype"], &map["dtype"]), (&json!("float32"), &json!("float32")));
    assert_eq!(map["rope_theta"], json!(500_000.0));
    assert_eq!(map["rope_scaling"]["rope_type"], json!("llama3"));
    assert_eq!(map["rope_parameters"]["rope_theta"], json!(500_000.0));
    assert_eq!(map["rms_norm_eps"], json!(1e-6));
    let mut config = parse(LLAMA3_V5).unwrap();
    config.rope.scaling = RopeScaling::Factors(vec![1.0; 8]);
    assert!(config.to_hf_json(Dtype::F32).is_err());
}

#[test]
fn generation_defaults_are_read() {
    let text = r#"{"eos_token_id": [7, 8], "do_sample": true, "max_new_tokens": 9, "temperature": 0.6, "top_p": 0.9,
        "top_k": 20, "repetition_penalty": 1.05, "pad_token_id": 7, "transformers_version": "4.37.0"}"#;
    let g = parse_generation(text).unwrap();
    assert_eq!((g.eos, g.max_new_tokens, g.top_k), (vec![7, 8], Some(9), Some(20)));
    assert_eq!((g.temperature, g.top_p, g.min_p), (Some(0.6), Some(0.9), None));
    assert_eq!(g.repetition_penalty, Some(1.05));
    assert!(parse_generation(r#"{"temperature": "hot"}"#).is_err());
    assert_eq!(parse_generation(r#"{"top_k": -1}"#).unwrap().top_k, None);
}
