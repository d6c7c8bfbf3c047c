/* dump MODEL FILE: what the functions compute, as 32-bit numbers one after the other, for the Rust test to compare by
 * bits. */
#include "check.h"

static FILE *file;

static void put(const float *numbers, size_t n) {
    CHECK(fwrite(numbers, sizeof *numbers, n, file) == n);
}

static void put_tokens(const elora_token *tokens, size_t n) {
    float count = (float)n;
    put(&count, 1);
    for (size_t i = 0; i < n; i++) {
        float token = (float)tokens[i];
        put(&token, 1);
    }
}

static const elora_token PROMPT[7] = {1, 17, 40, 3, 0, 22, 9};

/* One session goes through all subnets: prefill, a step, a step back and another. */
static void sessions(const elora_model *model) {
    const size_t vocab = elora_model_vocab_size(model);
    float *logits = allocate(7 * vocab * sizeof *logits);
    elora_session *session = NULL;
    OK(elora_session_new(model, NULL, &session));
    for (size_t subnet = 0; subnet < elora_model_subnet_count(model); subnet++) {
        OK(elora_session_reset(session));
        if (subnet % 2 == 0) {
            OK(elora_session_set_subnet(session, subnet));
        } else {
            OK(elora_session_set_subnet_named(session, elora_model_subnet_name(model, subnet)));
        }
        OK(elora_session_decode(session, PROMPT, 7, logits, vocab));
        put(logits, vocab);
        const elora_token next = 5, other = 6;
        OK(elora_session_decode(session, &next, 1, logits, vocab));
        put(logits, vocab);
        CHECK(elora_session_position(session) == 8);
        OK(elora_session_truncate(session, 7));
        OK(elora_session_decode(session, &other, 1, logits, vocab));
        put(logits, vocab);
    }
    OK(elora_session_reset(session));
    OK(elora_session_set_subnet(session, 0));
    size_t n_ranks = 0;
    FAILS(INSUFFICIENT_SIZE, elora_session_ranks(session, NULL, 0, &n_ranks));
    CHECK(n_ranks == elora_model_layer_count(model));
    uint32_t *ranks = allocate(n_ranks * sizeof *ranks);
    OK(elora_session_ranks(session, ranks, n_ranks, &n_ranks));
    for (size_t i = 0; i < n_ranks; i++) {
        ranks[i] = ranks[i] > 2 ? 2 : ranks[i];
    }
    OK(elora_session_set_ranks(session, ranks, n_ranks));
    OK(elora_session_decode_all(session, PROMPT, 7, logits, 7 * vocab));
    put(logits, 7 * vocab);
    free(ranks);
    elora_session_free(session);
    free(logits);
}

static void batch(const elora_model *model) {
    const size_t vocab = elora_model_vocab_size(model);
    float *logits = allocate(3 * vocab * sizeof *logits);
    elora_session *three[3];
    elora_token tokens[3] = {4, 30, 12};
    for (size_t i = 0; i < 3; i++) {
        three[i] = start(model, 1);
        OK(elora_session_decode(three[i], PROMPT + i, 2 + i, NULL, 0));
    }
    OK(elora_session_decode_batch(three, 3, tokens, logits, 3 * vocab));
    put(logits, 3 * vocab);
    for (size_t i = 0; i < 3; i++) {
        CHECK(elora_session_position(three[i]) == 3 + i);
        elora_session_free(three[i]);
    }
    free(logits);
}

static bool count(void *userdata, elora_token token) {
    (void)token;
    ++*(size_t *)userdata;
    return *(size_t *)userdata < 4;
}

static void generations(const elora_model *model) {
    elora_session *session = start(model, 1);
    elora_token out[9];
    size_t n = 0;
    elora_generate_options options;
    OK(elora_generate_options_init(&options, sizeof options));
    OK(elora_session_generate(session, PROMPT, 7, NULL, NULL, NULL, out, 9, &n));
    put_tokens(out, n);
    OK(elora_session_reset(session));
    options.temperature = 0.8;
    options.top_k = 10;
    options.top_p = 0.95;
    options.seed = 7;
    options.ignore_stop_tokens = 1;
    OK(elora_session_generate(session, PROMPT, 7, &options, NULL, NULL, out, 9, &n));
    put_tokens(out, n);
    /* Stopped by the callback after four tokens, which are there. */
    OK(elora_session_reset(session));
    size_t seen = 0;
    FAILS(CANCELLED, elora_session_generate(session, PROMPT, 7, &options, count, &seen, out, 9, &n));
    CHECK(seen == 4 && n == 4);
    put_tokens(out, n);
    elora_session_free(session);
}

/* Every layer under every subnet, rows apart by more than their length. */
static void layers(const elora_model *model) {
    for (size_t layer = 0; layer < elora_model_layer_count(model); layer++) {
        for (size_t subnet = 0; subnet < elora_model_subnet_count(model); subnet++) {
            const elora_linear *linear = NULL;
            elora_status status = elora_linear_new(model, layer, subnet, NULL, &linear);
            if (status == ELORA_STATUS_INVALID_ARGUMENT) {
                continue;
            }
            OK(status);
            const size_t inputs = elora_linear_in_features(linear), outputs = elora_linear_out_features(linear);
            const size_t rows = 3, ldx = inputs + 2, ldy = outputs + 1;
            const size_t x_len = (rows - 1) * ldx + inputs, y_len = (rows - 1) * ldy + outputs;
            float *x = allocate(x_len * sizeof *x), *y = allocate(y_len * sizeof *y);
            for (size_t i = 0; i < x_len; i++) {
                x[i] = number(i + layer);
            }
            for (size_t i = 0; i < y_len; i++) {
                y[i] = -7.0f;
            }
            size_t bytes = 0;
            OK(elora_linear_scratch_size(linear, rows, &bytes));
            /* At an odd address. */
            unsigned char *scratch = allocate(bytes + 1);
            OK(elora_linear_forward(linear, rows, x, x_len, ldx, y, y_len, ldy, scratch + 1, bytes));
            put(y, y_len);
            /* The library's own memory gives the same. */
            float *again = allocate(y_len * sizeof *again);
            memcpy(again, y, y_len * sizeof *y);
            OK(elora_linear_forward_typed(linear, rows, ELORA_DTYPE_F32, x, x_len, ldx, again, y_len, ldy, NULL, 0));
            CHECK(memcmp(again, y, y_len * sizeof *y) == 0);
            /* 1.5 and 0.25 are numbers of both 16-bit types, in these bits. */
            const uint16_t halves[2][2] = {{0x3e00, 0x3400}, {0x3fc0, 0x3e80}};
            const elora_dtype dtypes[2] = {ELORA_DTYPE_F16, ELORA_DTYPE_BF16};
            uint16_t *x16 = allocate(inputs * sizeof *x16), *y16 = allocate(outputs * sizeof *y16);
            for (size_t type = 0; type < 2; type++) {
                for (size_t i = 0; i < inputs; i++) {
                    x16[i] = halves[type][i % 2];
                }
                OK(elora_linear_forward_typed(linear, 1, dtypes[type], x16, inputs, inputs, y16, outputs, outputs,
                                              scratch, bytes));
                for (size_t i = 0; i < outputs; i++) {
                    float bits = (float)y16[i];
                    put(&bits, 1);
                }
            }
            free(y16);
            free(x16);
            free(again);
            free(scratch);
            free(y);
            free(x);
            elora_linear_free(linear);
        }
    }
}

int run_dump(int argc, char **argv) {
    CHECK(argc == 2);
    file = fopen(argv[1], "wb");
    CHECK(file != NULL);
    const elora_model *model = load(argv[0]);
    sessions(model);
    batch(model);
    generations(model);
    layers(model);
    elora_model_free(model);
    CHECK(fclose(file) == 0);
    return 0;
}
