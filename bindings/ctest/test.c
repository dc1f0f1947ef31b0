/*
 * The C ABI from C (and C++). `test layout` prints the structs as the compiler lays them out, for comparison
 * with the library's; `test run MODEL` uses a model with a tokenizer and exits 0 if all is as the header says.
 */
#if !defined(_WIN32) && !defined(_POSIX_C_SOURCE)
#define _POSIX_C_SOURCE 200112L
#endif

#include "engine.h"

#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#ifndef _WIN32
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>
#endif

#define MAX_TOKENS 12

static int failures = 0;

static void check(int ok, const char *what, int line)
{
    if (!ok) {
        fprintf(stderr, "test.c:%d: %s (last error: %s)\n", line, what, engine_last_error(NULL));
        failures++;
    }
}

#define CHECK(condition) check((condition) != 0, #condition, __LINE__)

#define FIELD(type, field) printf("%s.%s %lu\n", #type, #field, (unsigned long)offsetof(type, field))
#define SIZE(type) printf("%s %lu\n", #type, (unsigned long)sizeof(type))

static void layout(void)
{
    FIELD(engine_config, struct_size);
    FIELD(engine_config, dtype);
    FIELD(engine_config, max_model_len);
    FIELD(engine_config, max_num_seqs);
    FIELD(engine_config, max_num_batched_tokens);
    FIELD(engine_config, block_size);
    FIELD(engine_config, threads);
    FIELD(engine_config, prefix_cache);
    FIELD(engine_config, kv_cache_memory_bytes);
    FIELD(engine_config, seed);
    FIELD(engine_config, quantization);
    FIELD(engine_config, kv_cache_dtype);
    FIELD(engine_config, speculation);
    FIELD(engine_config, reserved);
    SIZE(engine_config);
    FIELD(engine_sampling, struct_size);
    FIELD(engine_sampling, temperature);
    FIELD(engine_sampling, top_p);
    FIELD(engine_sampling, min_p);
    FIELD(engine_sampling, presence_penalty);
    FIELD(engine_sampling, frequency_penalty);
    FIELD(engine_sampling, repetition_penalty);
    FIELD(engine_sampling, top_k);
    FIELD(engine_sampling, max_tokens);
    FIELD(engine_sampling, min_tokens);
    FIELD(engine_sampling, eos_rule);
    FIELD(engine_sampling, seed_rule);
    FIELD(engine_sampling, seed);
    FIELD(engine_sampling, stop_tokens);
    FIELD(engine_sampling, stop_token_count);
    SIZE(engine_sampling);
    FIELD(engine_token, struct_size);
    FIELD(engine_token, id);
    FIELD(engine_token, logprob);
    FIELD(engine_token, raw_logprob);
    FIELD(engine_token, entropy);
    FIELD(engine_token, reserved);
    FIELD(engine_token, text);
    FIELD(engine_token, text_len);
    SIZE(engine_token);
    FIELD(engine_output, struct_size);
    FIELD(engine_output, finish_reason);
    FIELD(engine_output, on_token);
    FIELD(engine_output, user_data);
    FIELD(engine_output, tokens);
    FIELD(engine_output, logprobs);
    FIELD(engine_output, capacity);
    FIELD(engine_output, count);
    FIELD(engine_output, cached_tokens);
    SIZE(engine_output);
}

/* What the callback has seen, and when it says stop. */
typedef struct seen {
    int32_t tokens[MAX_TOKENS];
    float logprobs[MAX_TOKENS];
    size_t count;
    size_t stop_after;
    char text[256];
    size_t text_len;
} seen;

static int32_t on_token(void *user_data, const engine_token *token)
{
    seen *s = (seen *)user_data;
    CHECK(token->struct_size >= sizeof(engine_token));
    CHECK(s->count < MAX_TOKENS && s->text_len + token->text_len <= sizeof(s->text));
    s->tokens[s->count] = token->id;
    s->logprobs[s->count] = token->logprob;
    s->count++;
    memcpy(s->text + s->text_len, token->text, token->text_len);
    s->text_len += token->text_len;
    return s->count != s->stop_after;
}

static engine *open_model(const char *path)
{
    engine_config config;
    engine *e = NULL;
    CHECK(engine_default_config(&config, sizeof config) == ENGINE_OK);
    CHECK(config.struct_size == sizeof config && config.max_num_seqs == 256 && config.block_size == 16);
    config.dtype = ENGINE_DTYPE_F32;
    config.max_model_len = 128;
    config.max_num_seqs = 4;
    config.kv_cache_memory_bytes = 8u << 20;
    config.threads = 2;
    CHECK(engine_open(path, strlen(path), &config, &e) == ENGINE_OK);
    CHECK(e != NULL && engine_last_error(NULL)[0] == '\0');
    CHECK(engine_max_model_len(e) == 128 && engine_vocab_size(e) > 0);
    return e;
}

/* The text's tokens, with the two-call pattern; the caller frees them. */
static int32_t *tokenize(const engine *e, const char *text, size_t *count)
{
    int32_t *tokens;
    size_t again = 0;
    CHECK(engine_tokenize(e, text, strlen(text), ENGINE_SPECIAL_NO, NULL, 0, count) == ENGINE_OK);
    CHECK(*count > 0);
    tokens = (int32_t *)malloc(*count * sizeof *tokens);
    if (tokens == NULL) {
        exit(1);
    }
    CHECK(engine_tokenize(e, text, strlen(text), ENGINE_SPECIAL_NO, tokens, *count - 1, &again)
          == ENGINE_ERR_BUFFER);
    CHECK(again == *count);
    CHECK(engine_tokenize(e, text, strlen(text), ENGINE_SPECIAL_NO, tokens, *count, &again) == ENGINE_OK);
    CHECK(again == *count);
    return tokens;
}

static void text_survives(const engine *e, const char *text)
{
    size_t count = 0, len = 0;
    int32_t *tokens = tokenize(e, text, &count);
    char back[64];
    CHECK(engine_detokenize(e, tokens, count, ENGINE_SPECIAL_NO, NULL, 0, &len) == ENGINE_OK);
    CHECK(len == strlen(text) && len <= sizeof back);
    CHECK(engine_detokenize(e, tokens, count, ENGINE_SPECIAL_NO, back, sizeof back, &len) == ENGINE_OK);
    CHECK(memcmp(back, text, len) == 0);
    free(tokens);
}

static void generate(const engine *e)
{
    engine_sampling sampling;
    engine_output output;
    seen all, some;
    int32_t tokens[MAX_TOKENS];
    float logprobs[MAX_TOKENS];
    size_t prompt_len = 0, len = 0, i;
    char text[256];
    int32_t *prompt = tokenize(e, "hello", &prompt_len);

    CHECK(engine_default_sampling(&sampling, sizeof sampling) == ENGINE_OK);
    CHECK(sampling.temperature == 1.0f && sampling.top_p == 1.0f && sampling.repetition_penalty == 1.0f);
    sampling.max_tokens = MAX_TOKENS;
    sampling.eos_rule = ENGINE_EOS_IGNORE;
    sampling.seed_rule = ENGINE_SEED_FIXED;
    sampling.seed = 5;

    memset(&all, 0, sizeof all);
    memset(&output, 0, sizeof output);
    output.struct_size = sizeof output;
    CHECK(engine_generate(e, prompt, prompt_len, &sampling, &output) == ENGINE_OK);
    CHECK(output.count == MAX_TOKENS && output.finish_reason == ENGINE_FINISH_NONE);

    output.on_token = on_token;
    output.user_data = &all;
    output.tokens = tokens;
    output.logprobs = logprobs;
    output.capacity = MAX_TOKENS - 1;
    CHECK(engine_generate(e, prompt, prompt_len, &sampling, &output) == ENGINE_ERR_BUFFER);
    CHECK(output.count == MAX_TOKENS && all.count == 0);

    output.capacity = MAX_TOKENS;
    CHECK(engine_generate(e, prompt, prompt_len, &sampling, &output) == ENGINE_OK);
    CHECK(output.count == MAX_TOKENS && output.finish_reason == ENGINE_FINISH_LENGTH);
    CHECK(all.count == MAX_TOKENS);
    CHECK(memcmp(all.tokens, tokens, sizeof tokens) == 0);
    CHECK(memcmp(all.logprobs, logprobs, sizeof logprobs) == 0);
    for (i = 0; i < MAX_TOKENS; i++) {
        CHECK(tokens[i] >= 0 && (uint32_t)tokens[i] < engine_vocab_size(e));
        CHECK(logprobs[i] < 0.0f && logprobs[i] > -100.0f);
    }
    CHECK(engine_detokenize(e, tokens, MAX_TOKENS, ENGINE_SPECIAL_NO, text, sizeof text, &len) == ENGINE_OK);
    CHECK(len == all.text_len && memcmp(text, all.text, len) == 0);

    memset(&some, 0, sizeof some);
    some.stop_after = 3;
    output.user_data = &some;
    CHECK(engine_generate(e, prompt, prompt_len, &sampling, &output) == ENGINE_OK);
    CHECK(output.count == 3 && output.finish_reason == ENGINE_FINISH_ABORT && some.count == 3);
    CHECK(memcmp(some.tokens, all.tokens, 3 * sizeof some.tokens[0]) == 0);

    sampling.stop_tokens = tokens + 1;
    sampling.stop_token_count = 1;
    output.on_token = NULL;
    CHECK(engine_generate(e, prompt, prompt_len, &sampling, &output) == ENGINE_OK);
    CHECK(output.finish_reason == ENGINE_FINISH_STOP && output.count >= 1 && output.count <= 2);
    CHECK(tokens[output.count - 1] == all.tokens[1]);
    free(prompt);
}

#ifndef _WIN32
/* A forked child gets an error from everything, at once, and the parent does not notice. */
static void row_34_a_forked_child_gets_an_error(engine *e, const char *model)
{
    int status = -1;
    int32_t token = 5;
    engine *other = NULL;
    engine_output output;
    pid_t child;
    memset(&output, 0, sizeof output);
    output.struct_size = sizeof output;
    child = fork();
    if (child == 0) {
        failures = 0;
        /* A deadlock ends by this signal. */
        alarm(20);
        CHECK(engine_generate(e, &token, 1, NULL, &output) == ENGINE_ERR_HANDLE);
        CHECK(engine_open(model, strlen(model), NULL, &other) == ENGINE_ERR_HANDLE);
        CHECK(strstr(engine_last_error(NULL), "this is process") != NULL);
        CHECK(engine_vocab_size(e) == 0);
        CHECK(engine_free(e) == ENGINE_ERR_HANDLE);
        _exit(failures);
    }
    CHECK(child > 0 && waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    CHECK(engine_vocab_size(e) != 0);
}
#endif

static void mistakes(engine *e)
{
    size_t len = 0;
    int32_t token = -1;
    engine_output output;
    memset(&output, 0, sizeof output);
    CHECK(engine_tokenize(e, "x", 1, ENGINE_SPECIAL_NO, NULL, 0, NULL) == ENGINE_ERR_ARGUMENT);
    CHECK(strcmp(engine_last_error(&len), "count is NULL") == 0 && len == strlen("count is NULL"));
    CHECK(engine_generate(e, &token, 1, NULL, &output) == ENGINE_ERR_ARGUMENT);
    output.struct_size = sizeof output;
    CHECK(engine_generate(e, &token, 1, NULL, &output) == ENGINE_ERR_REQUEST);
    CHECK(engine_free(NULL) == ENGINE_OK);
    CHECK(engine_free(e) == ENGINE_OK);
    CHECK(engine_free(e) == ENGINE_ERR_HANDLE);
    CHECK(engine_vocab_size(e) == 0);
}

int main(int argc, char **argv)
{
    engine *e;
    if (argc == 2 && strcmp(argv[1], "layout") == 0) {
        layout();
        return 0;
    }
    if (argc != 3) {
        return 2;
    }
    CHECK(engine_abi_version() == ENGINE_ABI_VERSION);
    e = open_model(argv[2]);
    text_survives(e, "hello, w\xc3\xb6rld \xf0\x9f\x90\x95");
    generate(e);
#ifndef _WIN32
    row_34_a_forked_child_gets_an_error(e, argv[2]);
#endif
    mistakes(e);
    return failures != 0;
}
