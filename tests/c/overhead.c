/* overhead MODEL TALKING ADAPTED ADAPTER: nanoseconds of a call of each function that computes little, and of some that
 * compute something that Rust is asked to compute too. TALKING is a model with a tokenizer, or `-`; ADAPTER a LoRA for the
 * model ADAPTED. Prints a name and a time in each line: the least of several runs of many calls. */
#include <time.h>

#include "check.h"

enum { RUNS = 7, CALLS = 4000 };

static volatile size_t sink;

static double now(void) {
    struct timespec time;
    timespec_get(&time, TIME_UTC);
    return 1e9 * (double)time.tv_sec + (double)time.tv_nsec;
}

/* Measures an expression, whose value is a number. */
#define TIME(name, value)                                            \
    do {                                                             \
        double least = 1e18;                                         \
        for (int run = 0; run < RUNS; run++) {                       \
            const double from = now();                               \
            for (int i = 0; i < CALLS; i++) {                        \
                sink += (size_t)(value);                             \
            }                                                        \
            const double each = (now() - from) / CALLS;              \
            least = each < least ? each : least;                     \
        }                                                            \
        printf("%s %.1f\n", name, least);                            \
    } while (0)

/* Measures a call that succeeds. */
#define CALL(function, ...)                                          \
    do {                                                             \
        OK(function(__VA_ARGS__));                                   \
        TIME(#function, function(__VA_ARGS__));                      \
    } while (0)

/* Measures a function that returns a number. */
#define ASK(function, ...) TIME(#function, function(__VA_ARGS__))

static void describe(const elora_model *model) {
    char text[64];
    size_t n = 0, index = 0;
    elora_token tokens[16];
    elora_layer_info layer = {.struct_size = sizeof layer};
    elora_model_info info = {.struct_size = sizeof info};
    TIME("elora_abi_version", elora_abi_version());
    TIME("elora_version", elora_version() != NULL);
    TIME("elora_status_name", elora_status_name(0) != NULL);
    CALL(elora_last_error, text, sizeof text, &n);
    ASK(elora_model_layer_count, model);
    CALL(elora_model_layer_info, model, 3, &layer);
    CALL(elora_model_find_layer, model, "model.layers.0.mlp.down_proj", &index);
    ASK(elora_model_subnet_count, model);
    TIME("elora_model_subnet_name", elora_model_subnet_name(model, 1) != NULL);
    CALL(elora_model_find_subnet, model, "least", &index);
    ASK(elora_model_vocab_size, model);
    ASK(elora_model_context_size, model);
    ASK(elora_model_weight_bytes, model);
    CALL(elora_model_stop_tokens, model, tokens, 16, &n);
    ASK(elora_model_has_tokenizer, model);
    ASK(elora_model_has_chat_template, model);
    ASK(elora_model_token_count, model);
    CALL(elora_model_describe, model, &info);
    float numbers[64];
    const elora_token token = 3;
    CALL(elora_model_embed, model, &token, 1, numbers, 64);
    CALL(elora_model_norm, model, "model.layers.0.input_layernorm.weight", numbers, 64);
    CALL(elora_model_rotary, model, 5, numbers, numbers + 32, 32);
    TIME("elora_model_retain+free", (elora_model_free(elora_model_retain(model)), 1));
}

static void options(void) {
    elora_model_options model;
    elora_session_options session;
    elora_generate_options generate;
    elora_sampler_options sampler;
    elora_linear_options linear;
    elora_text_options text;
    elora_convert_options convert;
    CALL(elora_model_options_init, &model, sizeof model);
    CALL(elora_session_options_init, &session, sizeof session);
    CALL(elora_generate_options_init, &generate, sizeof generate);
    CALL(elora_sampler_options_init, &sampler, sizeof sampler);
    CALL(elora_linear_options_init, &linear, sizeof linear);
    CALL(elora_text_options_init, &text, sizeof text);
    CALL(elora_convert_options_init, &convert, sizeof convert);
}

static bool never(void *userdata) {
    return userdata != NULL;
}

static void sessions(const elora_model *model) {
    elora_session *session = start(model, 0);
    const size_t vocab = elora_model_vocab_size(model);
    uint32_t ranks[64];
    size_t n = 0, size = 0;
    elora_token tokens[8] = {1, 5, 9};
    CALL(elora_session_set_subnet, session, 0);
    CALL(elora_session_set_subnet_named, session, "whole");
    CALL(elora_session_ranks, session, ranks, 64, &n);
    const size_t n_ranks = n;
    CALL(elora_session_set_ranks, session, ranks, n_ranks);
    CALL(elora_session_set_adapters, session, NULL, NULL, 0);
    CALL(elora_session_set_draft, session, NULL, 0);
    CALL(elora_session_set_abort, session, never, NULL);
    CALL(elora_session_set_abort, session, NULL, NULL);
    OK(elora_session_decode(session, tokens, 3, NULL, 0));
    ASK(elora_session_position, session);
    ASK(elora_session_capacity, session);
    CALL(elora_session_tokens, session, tokens, 8, &n);
    CALL(elora_session_truncate, session, 3);
    /* A call that fails, with its text. */
    TIME("elora_session_get_state(size)", elora_session_get_state(session, NULL, 0, &size));
    CALL(elora_session_decode_steps, NULL, 0);
    CALL(elora_session_decode_batch, NULL, 0, NULL, NULL, 0);
    /* With the work: one token, taken back each time. */
    float *logits = allocate(vocab * sizeof *logits);
    const elora_step step = {sizeof step, session, tokens, 1, logits, vocab, 1};
    TIME("decode", (elora_session_decode(session, tokens, 1, logits, vocab), elora_session_truncate(session, 3)));
    TIME("decode_steps", (elora_session_decode_steps(&step, 1), elora_session_truncate(session, 3)));
    elora_session *copy = NULL;
    TIME("copy", (elora_session_copy(session, &copy), elora_session_free(copy), 1));
    CALL(elora_session_reset, session);
    /* A sampler that has one token to choose from. */
    elora_sampler *sampler = NULL;
    elora_token token = 0;
    OK(elora_sampler_new(NULL, &sampler));
    CALL(elora_sampler_sample, sampler, logits, 1, NULL, 0, &token);
    CALL(elora_sampler_accept, sampler, &token, 1);
    CALL(elora_sampler_reset, sampler);
    CALL(elora_sampler_observe, sampler, &token, 1);
    elora_sampler_free(sampler);
    free(logits);
    elora_session_free(session);
}

static void texts(const char *path) {
    const elora_model *model = load(path);
    uint8_t piece[64];
    char text[64];
    size_t n = 0;
    elora_token token = 40, tokens[16];
    CALL(elora_model_token_piece, model, token, piece, sizeof piece, &n);
    CALL(elora_model_detokenize, model, &token, 1, text, sizeof text, &n);
    CALL(elora_model_special_token, model, ELORA_TOKEN_END, tokens);
    CALL(elora_model_special_tokens, model, tokens, 16, &n);
    ASK(elora_model_token_count, model);
    ASK(elora_model_notice_count, model);
    elora_text *stream = NULL;
    const char *part = NULL;
    bool stopped = false;
    OK(elora_text_new(model, NULL, &stream));
    CALL(elora_text_push, stream, token, &part, &n, &stopped);
    elora_text_free(stream);
    elora_model_free(model);
}

static void adapters(const char *path, const char *adapter_path) {
    const elora_model *model = load(path);
    const elora_adapter *adapter = NULL;
    OK(elora_adapter_load(model, adapter_path, &adapter));
    elora_session *session = start(model, 0);
    const float scale = 0.5f;
    ASK(elora_adapter_max_rank, adapter);
    ASK(elora_adapter_layer_count, adapter);
    ASK(elora_adapter_bytes, adapter);
    TIME("elora_adapter_retain+free", (elora_adapter_free(elora_adapter_retain(adapter)), 1));
    OK(elora_session_set_adapters(session, &adapter, &scale, 1));
    TIME("elora_session_set_adapters(same)", elora_session_set_adapters(session, &adapter, &scale, 1));
    elora_session_free(session);
    elora_adapter_free(adapter);
    elora_model_free(model);
}

static void layers(const elora_model *model) {
    const elora_linear *linear = NULL;
    OK(elora_linear_new(model, 0, 0, NULL, &linear));
    const size_t inputs = elora_linear_in_features(linear), outputs = elora_linear_out_features(linear);
    float *x = allocate(inputs * sizeof *x), *y = allocate(outputs * sizeof *y);
    for (size_t i = 0; i < inputs; i++) {
        x[i] = number(i);
    }
    size_t bytes = 0;
    ASK(elora_linear_rank, linear);
    ASK(elora_linear_in_features, linear);
    ASK(elora_linear_out_features, linear);
    CALL(elora_linear_scratch_size, linear, 1, &bytes);
    TIME("elora_linear_retain+free", (elora_linear_free(elora_linear_retain(linear)), 1));
    void *scratch = allocate(bytes);
    OK(elora_linear_forward(linear, 1, x, inputs, inputs, y, outputs, outputs, scratch, bytes));
    TIME("linear", elora_linear_forward(linear, 1, x, inputs, inputs, y, outputs, outputs, scratch, bytes));
    free(scratch);
    free(y);
    free(x);
    elora_linear_free(linear);
}

int run_overhead(int argc, char **argv) {
    CHECK(argc == 4);
    elora_model_options options_of;
    OK(elora_model_options_init(&options_of, sizeof options_of));
    options_of.n_threads = 1;
    const elora_model *model = NULL;
    OK(elora_model_load(argv[0], &options_of, &model));
    describe(model);
    options();
    sessions(model);
    layers(model);
    if (strcmp(argv[1], "-") != 0) {
        texts(argv[1]);
    }
    adapters(argv[2], argv[3]);
    elora_model_free(model);
    return 0;
}
