//! Counts and lists that follow from a configuration.

use super::*;

/// SmolLM2 135M, whose size is public.
const SMOLLM2: &str = r#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 576,
    "intermediate_size": 1536, "max_position_embeddings": 8192, "num_attention_heads": 9,
    "num_hidden_layers": 30, "num_key_value_heads": 3, "rms_norm_eps": 1e-05, "rope_theta": 100000,
    "tie_word_embeddings": true, "vocab_size": 49152}"#;

#[test]
fn sizes_of_a_known_model() {
    let config = ModelConfig::from_hf_json(SMOLLM2).unwrap();
    assert_eq!(config.parameters(), 134_515_008);
    let vectors = 61 * 576;
    assert_eq!(config.weights_bytes(Dtype::F32), 4 * 134_515_008);
    assert_eq!(config.weights_bytes(Dtype::Bf16), 2 * 134_515_008 + 2 * vectors);
    assert_eq!((config.q_size(), config.kv_size(), config.max_context()), (576, 192, 8192));
    assert_eq!(config.inv_freq().len(), 32);
}

#[test]
fn tensors_follow_the_family() {
    let mut config = ModelConfig::from_hf_json(SMOLLM2).unwrap();
    let shape = |config: &ModelConfig, name: &str| {
        config.tensors().into_iter().find(|t| t.name == name).map(|t| t.shape)
    };
    assert_eq!(config.tensors().len(), 2 + 30 * 9);
    assert_eq!(shape(&config, "lm_head.weight"), None);
    assert_eq!(shape(&config, "model.layers.29.mlp.down_proj.weight"), Some(vec![576, 1536]));
    assert_eq!(shape(&config, "model.layers.0.self_attn.k_proj.weight"), Some(vec![192, 576]));
    assert_eq!(shape(&config, "model.layers.0.self_attn.k_proj.bias"), None);
    config.tied_embeddings = false;
    config.qkv_bias = true;
    config.qk_norm = true;
    assert_eq!(config.tensors().len(), 3 + 30 * 14);
    assert_eq!(shape(&config, "lm_head.weight"), Some(vec![49152, 576]));
    assert_eq!(shape(&config, "model.layers.0.self_attn.k_proj.bias"), Some(vec![192]));
    assert_eq!(shape(&config, "model.layers.7.self_attn.q_norm.weight"), Some(vec![64]));
}
