/*
 * engine.h - a language model in your process: open a model, tokenize, generate.
 *
 * Rules that hold for every function:
 *
 *  - Status. A function that returns engine_status returns ENGINE_OK (0) or one of ENGINE_ERR_*; the text of
 *    the thread's last failure is engine_last_error(). The library never ends the process, installs no
 *    signal handler and prints nothing. (A fault inside the library itself, ENGINE_ERR_INTERNAL, may leave the
 *    message of the Rust runtime on stderr.)
 *  - Threads. Every function may be called from every thread at any time. Calls of engine_generate on one
 *    engine from several threads share its batches; what one gets does not depend on the others.
 *  - Processes. Engines do not survive fork(): in the child of a process that has opened one, every function that
 *    takes or opens an engine returns ENGINE_ERR_HANDLE at once. Fork first, or exec.
 *  - Handles. An `engine *` is a name, never an address to look at. Names are not used twice: one that was
 *    freed is answered with ENGINE_ERR_HANDLE.
 *  - Strings are UTF-8 with a length in bytes. None needs a NUL at its end, and none gets one, except that of
 *    engine_last_error().
 *  - Arrays. A pointer may be NULL where its length is 0.
 *  - Buffers belong to the caller. A function that fills one reports the number of elements it needs: call
 *    it with (NULL, 0) to ask, allocate, call it again. With too little room nothing is written and the
 *    answer is ENGINE_ERR_BUFFER, with the number needed.
 *  - Structs that begin with struct_size hold sizeof the struct as the caller was compiled. Fields that only
 *    the caller knows are ignored; fields that only the library knows have their defaults.
 *
 * Left out: training, chat templates, several samples per request, stop strings, weight updates.
 */
#ifndef ENGINE_H
#define ENGINE_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32) && !defined(ENGINE_STATIC)
#define ENGINE_API __declspec(dllimport)
#else
#define ENGINE_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Of this header. Raised when a program compiled with an older one can no longer work. */
#define ENGINE_ABI_VERSION 1

/* An open model with its memory. */
typedef struct engine engine;

/* How a call went: one of the constants below. Later versions may add to them. */
typedef int32_t engine_status;
enum {
    ENGINE_OK = 0,
    /* The library is at fault. The engine may be unusable. */
    ENGINE_ERR_INTERNAL = 1,
    /* A NULL pointer, a text that is not UTF-8, an unknown constant, a wrong struct_size. */
    ENGINE_ERR_ARGUMENT = 2,
    /* No engine of this name is open. */
    ENGINE_ERR_HANDLE = 3,
    /* A buffer is too small; the number of elements needed was reported. */
    ENGINE_ERR_BUFFER = 4,
    /* A model is missing, damaged, or of an unknown kind. */
    ENGINE_ERR_MODEL = 5,
    /* The model, or the processor, asks for something that is not implemented. */
    ENGINE_ERR_UNSUPPORTED = 6,
    /* A field of engine_config is out of range. */
    ENGINE_ERR_CONFIG = 7,
    /* A prompt, a token or a field of engine_sampling is out of range. */
    ENGINE_ERR_REQUEST = 8,
    /* Not now; a later try can succeed. */
    ENGINE_ERR_BUSY = 9,
    /* An answer ended early: numbers that are not finite, or tokens that have no text. */
    ENGINE_ERR_GENERATION = 10,
    /* The operating system refused to read a file. */
    ENGINE_ERR_IO = 11
};

/* Values of engine_config.dtype. */
enum { ENGINE_DTYPE_AUTO = 0, ENGINE_DTYPE_F32 = 1, ENGINE_DTYPE_BF16 = 2 };

/* Values of engine_config.prefix_cache. */
enum { ENGINE_PREFIX_CACHE_OFF = 0, ENGINE_PREFIX_CACHE_ON = 1 };

/* Values of engine_config.quantization: quantised weights of a file are expanded to dtype, or stay as they are
 * stored, which takes less memory and decodes faster. */
enum { ENGINE_QUANTIZATION_NONE = 0, ENGINE_QUANTIZATION_AS_STORED = 1 };

/* Values of engine_config.kv_cache_dtype: the format of dtype, or 8-bit integers with a scale a head and token,
 * which takes half the memory of bf16. */
enum { ENGINE_KV_CACHE_AUTO = 0, ENGINE_KV_CACHE_INT8 = 1 };

/* Values of engine_config.speculation: whether what a text has said before is guessed to come again, which makes
 * answers that repeat themselves or their prompt faster and changes nothing in them. */
enum { ENGINE_SPECULATION_OFF = 0, ENGINE_SPECULATION_ON = 1 };

/* Values of engine_sampling.eos_rule: end-of-text tokens end an answer, or are tokens like any other. */
enum { ENGINE_EOS_STOP = 0, ENGINE_EOS_IGNORE = 1 };

/* Values of engine_sampling.seed_rule: the engine picks the random stream, or the field seed does. */
enum { ENGINE_SEED_AUTO = 0, ENGINE_SEED_FIXED = 1 };

/* Values of engine_output.finish_reason. */
enum {
    ENGINE_FINISH_NONE = 0,
    /* An end-of-text token or one of stop_tokens, which is the answer's last token. */
    ENGINE_FINISH_STOP = 1,
    /* max_tokens, or the end of the context. */
    ENGINE_FINISH_LENGTH = 2,
    /* on_token returned 0, or the answer failed. */
    ENGINE_FINISH_ABORT = 3
};

/* Whether engine_tokenize adds the tokens that begin a text, and engine_detokenize shows special ones. */
enum { ENGINE_SPECIAL_NO = 0, ENGINE_SPECIAL_YES = 1 };

/* How an engine is set up. */
typedef struct engine_config {
    uint32_t struct_size;
    /* Format of weights and KV cache; ENGINE_DTYPE_AUTO is bf16. */
    int32_t dtype;
    /* Longest sequence, prompt and answer together, in tokens; 0: the model's own, up to 8192. */
    uint32_t max_model_len;
    /* Sequences that run at once, 1 to 65536. Default 256. */
    uint32_t max_num_seqs;
    /* Tokens of one step, 1 to 1048576. Default 2048. */
    uint32_t max_num_batched_tokens;
    /* Tokens of a KV block, a multiple of 16 up to 1024. Default 16. */
    uint32_t block_size;
    /* Compute threads, up to 1024; 0: all cores. */
    uint32_t threads;
    /* Whether prompts reuse the blocks of earlier ones. Default ENGINE_PREFIX_CACHE_ON. */
    int32_t prefix_cache;
    /* Bytes for the KV cache; 0: planned from free memory. */
    uint64_t kv_cache_memory_bytes;
    /* Key of the random streams of requests with ENGINE_SEED_AUTO. Default 0. */
    uint64_t seed;
    /* Default ENGINE_QUANTIZATION_NONE. */
    int32_t quantization;
    /* Default ENGINE_KV_CACHE_AUTO. */
    int32_t kv_cache_dtype;
    /* Default ENGINE_SPECULATION_ON. */
    int32_t speculation;
    /* 0. */
    uint32_t reserved;
} engine_config;

/* How tokens are chosen. The default draws from the model's own distribution. */
typedef struct engine_sampling {
    uint32_t struct_size;
    /* Logits are divided by it, 0 to 100; 0 takes the most likely token. Default 1. */
    float temperature;
    /* Only the smallest set of most likely tokens whose probability reaches it; above 0, to 1. Default 1. */
    float top_p;
    /* Only tokens at least this share as likely as the most likely one, 0 to 1. Default 0. */
    float min_p;
    /* Subtracted from the logit of each token generated before, -2 to 2. Default 0. */
    float presence_penalty;
    /* Subtracted once per earlier occurrence in the answer, -2 to 2. Default 0. */
    float frequency_penalty;
    /* Divides positive and multiplies negative logits of tokens in prompt or answer. Default 1. */
    float repetition_penalty;
    /* Only this many most likely tokens; 0: all. */
    uint32_t top_k;
    /* Most tokens of the answer; 0: what the context leaves. */
    uint32_t max_tokens;
    /* Nothing that ends an answer is drawn before this many tokens. Default 0. */
    uint32_t min_tokens;
    /* Default ENGINE_EOS_STOP. */
    int32_t eos_rule;
    /* Default ENGINE_SEED_AUTO. */
    int32_t seed_rule;
    /* The random stream under ENGINE_SEED_FIXED: equal seeds give equal answers to equal prompts. */
    uint64_t seed;
    /* Further tokens that end an answer. Default none. */
    const int32_t *stop_tokens;
    size_t stop_token_count;
} engine_sampling;

/* One generated token; read-only, and gone when on_token returns. */
typedef struct engine_token {
    uint32_t struct_size;
    int32_t id;
    /* In nats, under the distribution it was drawn from (at temperature 0: as at 1). */
    float logprob;
    /* In nats, at temperature 1 with nothing cut off. */
    float raw_logprob;
    /* In nats, of the whole distribution at the request's temperature. */
    float entropy;
    /* 0. */
    uint32_t reserved;
    /* UTF-8 text that became certain with this token; may be empty, and is for a model without tokenizer. */
    const char *text;
    size_t text_len;
} engine_token;

/*
 * Called once per token, in order, on the thread that called engine_generate. Returns nonzero to go on, 0 to
 * end the answer. May call any function of this header. Must return: no exception, no longjmp.
 */
typedef int32_t (*engine_token_fn)(void *user_data, const engine_token *token);

/* Where an answer goes. Set every field (0 and NULL where a thing is not wanted). */
typedef struct engine_output {
    uint32_t struct_size;
    /* Out: why the answer ended. */
    int32_t finish_reason;
    /* NULL, or called for every token, with user_data as its first argument. */
    engine_token_fn on_token;
    void *user_data;
    /* NULL, or room for `capacity` ids. */
    int32_t *tokens;
    /* NULL, or room for `capacity` log-probabilities (engine_token.logprob). */
    float *logprobs;
    /* Elements that tokens and logprobs have room for, each. */
    size_t capacity;
    /* Out: tokens of the answer; in a size query and with ENGINE_ERR_BUFFER, the capacity needed. */
    size_t count;
    /* Out: prompt tokens that were found in the prefix cache. */
    size_t cached_tokens;
} engine_output;

/* The library's ENGINE_ABI_VERSION. Refuse to go on when it is not the header's. */
ENGINE_API uint32_t engine_abi_version(void);

/*
 * The message of this thread's last call that returns a status, or that of engine_vocab_size or
 * engine_max_model_len; empty if that succeeded. One line of UTF-8 of *len bytes (len may be NULL), ended by
 * a NUL. Valid until the next such call on this thread.
 */
ENGINE_API const char *engine_last_error(size_t *len);

/*
 * Fill in the defaults; struct_size is sizeof *config (sizeof *sampling). Call it first, then change fields.
 */
ENGINE_API engine_status engine_default_config(engine_config *config, size_t struct_size);
ENGINE_API engine_status engine_default_sampling(engine_sampling *sampling, size_t struct_size);

/*
 * Opens a model: a Hugging Face directory, a .gguf file, or "builtin:arith". config may be NULL for the
 * defaults. *out is the engine, or NULL after a failure. Starts the engine's threads.
 */
ENGINE_API engine_status engine_open(const char *path, size_t path_len, const engine_config *config,
                                     engine **out);

/*
 * Closes an engine. NULL is fine. Calls that other threads, or a callback's caller, have begun are
 * carried out; memory and threads are given back with the last of them.
 */
ENGINE_API engine_status engine_free(engine *e);

/* Tokens the model knows: ids are 0 up to less than this. 0 after a failure. */
ENGINE_API uint32_t engine_vocab_size(const engine *e);

/* Longest sequence, prompt and answer together, in tokens. 0 after a failure. */
ENGINE_API uint32_t engine_max_model_len(const engine *e);

/*
 * Token ids of a text; *count is their number. special: ENGINE_SPECIAL_YES adds the tokens that begin a
 * text. ENGINE_ERR_UNSUPPORTED if the model has no tokenizer.
 */
ENGINE_API engine_status engine_tokenize(const engine *e, const char *text, size_t text_len, int32_t special,
                                         int32_t *tokens, size_t capacity, size_t *count);

/*
 * Text of tokens; *text_len is its length in bytes. special: ENGINE_SPECIAL_YES writes special tokens by name.
 * Ids the tokenizer does not know leave no text; bytes that are not UTF-8 become U+FFFD.
 */
ENGINE_API engine_status engine_detokenize(const engine *e, const int32_t *tokens, size_t count, int32_t special,
                                           char *text, size_t capacity, size_t *text_len);

/*
 * Generates an answer to a prompt of at least one token and returns when it has ended. sampling may be NULL for
 * the defaults. If tokens or logprobs are given, they must have room for the longest answer that max_tokens
 * and the context allow; else ENGINE_ERR_BUFFER, before anything is generated. Without on_token, tokens and
 * logprobs nothing is generated: output->count is that capacity. After ENGINE_ERR_GENERATION, output holds what
 * was generated until then.
 */
ENGINE_API engine_status engine_generate(const engine *e, const int32_t *prompt, size_t prompt_len,
                                         const engine_sampling *sampling, engine_output *output);

#ifdef __cplusplus
}
#endif

#endif
