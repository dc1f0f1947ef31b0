//! The structs of the header and what they mean to the engine.
//!
//! No struct has padding, and a new field goes to the end: what an older caller has is whole fields from the
//! front. Constants come as `i32` and are checked, because C may put anything into an enum.

use std::ffi::{c_char, c_void};

use engine::{
    Dtype, EngineConfig, EosRule, KvDtype, PrefixCache, Quantization, SamplingParams, Speculation,
};

use crate::ffi::Fault;
use crate::memory::{array, token_ids};

/// A struct that begins with its size.
///
/// # Safety
/// `repr(C)`, begins with a `u32` that is its size, has no padding, and every bit pattern is a value.
pub(crate) unsafe trait Versioned: Copy + Default {
    /// Its name in the header.
    const NAME: &'static str;
    /// Names and offsets of its fields.
    const FIELDS: &'static [(&'static str, usize)];

    /// The size it came with.
    fn struct_size(&self) -> u32;
}

/// Defines a struct of the header.
macro_rules! versioned {
    ($(#[$doc:meta])* $name:ident = $c_name:literal {
        $($(#[$field_doc:meta])* $field:ident: $type:ty,)*
    }) => {
        $(#[$doc])*
        #[repr(C)]
        #[derive(Clone, Copy, Debug)]
        pub struct $name {
            $($(#[$field_doc])* pub $field: $type,)*
        }

        impl $name {
            /// Names and offsets in bytes of the fields, in order.
            pub const FIELDS: &'static [(&'static str, usize)] =
                &[$((stringify!($field), std::mem::offset_of!(Self, $field)),)*];
        }

        // SAFETY: `repr(C)`; the definitions below begin with `struct_size: u32` and hold integers, floats,
        // raw pointers and optional functions; the next line refuses padding.
        unsafe impl Versioned for $name {
            const NAME: &'static str = $c_name;
            const FIELDS: &'static [(&'static str, usize)] = Self::FIELDS;

            fn struct_size(&self) -> u32 {
                self.struct_size
            }
        }

        const _: () = assert!(size_of::<$name>() == 0 $(+ size_of::<$type>())*, "padding");
    };
}

versioned! {
    /// How an engine is set up.
    Config = "engine_config" {
        /// The size of this struct as the caller knows it, in bytes.
        struct_size: u32,
        /// 0 is bf16, 1 f32, 2 bf16.
        dtype: i32,
        /// Longest sequence in tokens; 0 for the model's own.
        max_model_len: u32,
        /// Sequences that run at once.
        max_num_seqs: u32,
        /// Tokens of one step.
        max_num_batched_tokens: u32,
        /// Tokens of a KV block.
        block_size: u32,
        /// Compute threads; 0 for all cores.
        threads: u32,
        /// 0 is off, 1 on.
        prefix_cache: i32,
        /// Bytes for the KV cache; 0 plans from free memory.
        kv_cache_memory_bytes: u64,
        /// Key of the random streams of requests without a seed.
        seed: u64,
        /// 0 expands quantised weights, 1 keeps them as they are stored.
        quantization: i32,
        /// 0 is as the weights, 1 8-bit integers.
        kv_cache_dtype: i32,
        /// 0 is off, 1 on.
        speculation: i32,
        /// 0.
        reserved: u32,
    }
}

versioned! {
    /// How tokens are chosen; fields as in [`SamplingParams`].
    Sampling = "engine_sampling" {
        /// The size of this struct as the caller knows it, in bytes.
        struct_size: u32,
        /// Logits are divided by it; 0 takes the most likely token.
        temperature: f32,
        /// Smallest set of most likely tokens whose probability reaches it.
        top_p: f32,
        /// Least share of the most likely token's probability.
        min_p: f32,
        /// Subtracted from logits of tokens generated before.
        presence_penalty: f32,
        /// Subtracted once per earlier occurrence.
        frequency_penalty: f32,
        /// Divides or multiplies logits of tokens seen before.
        repetition_penalty: f32,
        /// Only so many most likely tokens; 0 for all.
        top_k: u32,
        /// Most tokens of the answer; 0 for what the context leaves.
        max_tokens: u32,
        /// Nothing that ends an answer is drawn before so many tokens.
        min_tokens: u32,
        /// 0 ends at end-of-text, 1 ignores it.
        eos_rule: i32,
        /// 0 leaves the seed to the engine, 1 takes `seed`.
        seed_rule: i32,
        /// Key of the random stream.
        seed: u64,
        /// Further tokens that end an answer.
        stop_tokens: *const i32,
        /// How many.
        stop_token_count: usize,
    }
}

versioned! {
    /// One generated token.
    Token = "engine_token" {
        /// The size of this struct, in bytes.
        struct_size: u32,
        /// The token's id.
        id: i32,
        /// Log-probability in nats under the distribution it was drawn from.
        logprob: f32,
        /// Log-probability in nats at temperature 1 with nothing cut off.
        raw_logprob: f32,
        /// Entropy in nats of the whole distribution at the request's temperature.
        entropy: f32,
        /// 0.
        reserved: u32,
        /// Text that became certain with this token, in UTF-8.
        text: *const c_char,
        /// Its length in bytes.
        text_len: usize,
    }
}

/// Called with `user_data` for every token; 0 ends the answer.
pub type TokenFn = unsafe extern "C" fn(*mut c_void, *const Token) -> i32;

versioned! {
    /// Where an answer goes.
    Output = "engine_output" {
        /// The size of this struct as the caller knows it, in bytes.
        struct_size: u32,
        /// Why the answer ended: 1 stop, 2 length, 3 abort.
        finish_reason: i32,
        /// Called for every token.
        on_token: Option<TokenFn>,
        /// Its first argument.
        user_data: *mut c_void,
        /// Takes the ids.
        tokens: *mut i32,
        /// Takes the log-probabilities.
        logprobs: *mut f32,
        /// Room of each, in elements.
        capacity: usize,
        /// Tokens of the answer, or the capacity needed.
        count: usize,
        /// Prompt tokens found in the prefix cache.
        cached_tokens: usize,
    }
}

/// The size of a struct as C keeps it.
const fn size<T>() -> u32 {
    size_of::<T>() as u32
}

impl Default for Config {
    fn default() -> Self {
        let config = EngineConfig::default();
        Self {
            struct_size: size::<Self>(),
            dtype: 0,
            max_model_len: 0,
            max_num_seqs: config.max_num_seqs as u32,
            max_num_batched_tokens: config.max_num_batched_tokens as u32,
            block_size: config.block_size as u32,
            threads: 0,
            prefix_cache: i32::from(config.prefix_cache == PrefixCache::On),
            kv_cache_memory_bytes: 0,
            seed: config.seed,
            quantization: i32::from(config.quantization == Quantization::AsStored),
            kv_cache_dtype: i32::from(config.kv_dtype == Some(KvDtype::Int8)),
            speculation: i32::from(config.speculation != Speculation::off()),
            reserved: 0,
        }
    }
}

impl Config {
    /// What it means; ranges are the engine's to check.
    pub(crate) fn resolve(&self) -> Result<EngineConfig, Fault> {
        let set = |value: u32| (value != 0).then_some(value as usize);
        Ok(EngineConfig {
            max_model_len: set(self.max_model_len),
            useful_model_len: None,
            max_num_seqs: self.max_num_seqs as usize,
            max_num_batched_tokens: self.max_num_batched_tokens as usize,
            block_size: self.block_size as usize,
            kv_cache_memory_bytes: (self.kv_cache_memory_bytes != 0)
                .then_some(self.kv_cache_memory_bytes),
            prefix_cache: match self.prefix_cache {
                0 => PrefixCache::Off,
                1 => PrefixCache::On,
                other => return Err(unknown("prefix_cache", other, 1)),
            },
            threads: set(self.threads),
            level: None,
            dtype: match self.dtype {
                0 => None,
                1 => Some(Dtype::F32),
                2 => Some(Dtype::Bf16),
                other => return Err(unknown("dtype", other, 2)),
            },
            kv_dtype: match self.kv_cache_dtype {
                0 => None,
                1 => Some(KvDtype::Int8),
                other => return Err(unknown("kv_cache_dtype", other, 1)),
            },
            quantization: match self.quantization {
                0 => Quantization::None,
                1 => Quantization::AsStored,
                other => return Err(unknown("quantization", other, 1)),
            },
            speculation: match self.speculation {
                0 => Speculation::off(),
                1 => Speculation::default(),
                other => return Err(unknown("speculation", other, 1)),
            },
            seed: self.seed,
        })
    }
}

impl Default for Sampling {
    fn default() -> Self {
        let params = SamplingParams::default();
        Self {
            struct_size: size::<Self>(),
            temperature: params.temperature,
            top_p: params.top_p,
            min_p: params.min_p,
            presence_penalty: params.presence_penalty,
            frequency_penalty: params.frequency_penalty,
            repetition_penalty: params.repetition_penalty,
            top_k: 0,
            max_tokens: 0,
            min_tokens: 0,
            eos_rule: 0,
            seed_rule: 0,
            seed: 0,
            stop_tokens: std::ptr::null(),
            stop_token_count: 0,
        }
    }
}

impl Sampling {
    /// What it means; ranges are the engine's to check.
    ///
    /// # Safety
    /// `stop_tokens` is NULL or has `stop_token_count` elements.
    pub(crate) unsafe fn resolve(&self) -> Result<SamplingParams, Fault> {
        let set = |value: u32| (value != 0).then_some(value as usize);
        // SAFETY: handed on from the caller; the reference ends on the next line.
        let stop = unsafe { array("stop_tokens", self.stop_tokens, self.stop_token_count) }?;
        let stop_token_ids = token_ids("stop_tokens", stop)?;
        Ok(SamplingParams {
            temperature: self.temperature,
            top_k: set(self.top_k),
            top_p: self.top_p,
            min_p: self.min_p,
            presence_penalty: self.presence_penalty,
            frequency_penalty: self.frequency_penalty,
            repetition_penalty: self.repetition_penalty,
            stop_token_ids,
            eos: match self.eos_rule {
                0 => EosRule::Stop,
                1 => EosRule::Ignore,
                other => return Err(unknown("eos_rule", other, 1)),
            },
            max_tokens: set(self.max_tokens),
            min_tokens: self.min_tokens as usize,
            seed: match self.seed_rule {
                0 => None,
                1 => Some(self.seed),
                other => return Err(unknown("seed_rule", other, 1)),
            },
            ..SamplingParams::default()
        })
    }
}

impl Default for Token {
    fn default() -> Self {
        Self {
            struct_size: size::<Self>(),
            id: 0,
            logprob: 0.0,
            raw_logprob: 0.0,
            entropy: 0.0,
            reserved: 0,
            text: c"".as_ptr(),
            text_len: 0,
        }
    }
}

impl Default for Output {
    fn default() -> Self {
        Self {
            struct_size: size::<Self>(),
            finish_reason: 0,
            on_token: None,
            user_data: std::ptr::null_mut(),
            tokens: std::ptr::null_mut(),
            logprobs: std::ptr::null_mut(),
            capacity: 0,
            count: 0,
            cached_tokens: 0,
        }
    }
}

fn unknown(name: &str, value: i32, limit: i32) -> Fault {
    Fault::argument(format!("{name} is {value}, limit is 0 to {limit}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_is_the_engines_and_its_fields_say_what_they_say() {
        let resolve = |config: Config| config.resolve().ok();
        assert_eq!(resolve(Config::default()), Some(EngineConfig::default()));
        let set =
            Config { quantization: 1, kv_cache_dtype: 1, speculation: 0, ..Config::default() };
        let want = EngineConfig {
            quantization: Quantization::AsStored,
            kv_dtype: Some(KvDtype::Int8),
            speculation: Speculation::off(),
            ..EngineConfig::default()
        };
        assert_eq!(resolve(set), Some(want));
    }
}
