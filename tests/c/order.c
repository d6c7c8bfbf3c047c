/* order MODEL: handles freed in the wrong order, and sessions used from their own callback. */
#include "check.h"

static const elora_token TOKENS[3] = {1, 2, 3};

/* What a callback may do to the session that calls it. */
struct misuse {
    elora_session *session;
    int frees;
    size_t calls;
};

static bool misuse(void *userdata, elora_token token) {
    struct misuse *self = userdata;
    self->calls++;
    if (self->calls == 1) {
        FAILS(INVALID_STATE, elora_session_decode(self->session, &token, 1, NULL, 0));
        FAILS(INVALID_STATE, elora_session_reset(self->session));
        FAILS(INVALID_STATE, elora_session_set_subnet(self->session, 0));
        CHECK(elora_session_position(self->session) == 0);
        if (self->frees) {
            elora_session_free(self->session);
        }
    }
    return true;
}

int run_order(int argc, char **argv) {
    CHECK(argc == 1);
    const elora_model *model = load(argv[0]);
    CHECK(elora_model_retain(model) == model);
    elora_session *session = start(model, 1);
    const elora_linear *linear = NULL;
    OK(elora_linear_new(model, 0, 0, NULL, &linear));
    CHECK(elora_linear_retain(linear) == linear);
    const size_t vocab = elora_model_vocab_size(model);
    float *logits = allocate(vocab * sizeof *logits), *later = allocate(vocab * sizeof *later);
    OK(elora_session_decode(session, TOKENS, 3, logits, vocab));

    /* The model first, twice, then what was made of it goes on. */
    elora_model_free(model);
    elora_model_free(model);
    OK(elora_session_reset(session));
    OK(elora_session_decode(session, TOKENS, 3, later, vocab));
    CHECK(memcmp(logits, later, vocab * sizeof *logits) == 0);
    elora_linear_free(linear);
    const size_t inputs = elora_linear_in_features(linear), outputs = elora_linear_out_features(linear);
    float *x = allocate(inputs * sizeof *x), *y = allocate(outputs * sizeof *y);
    for (size_t i = 0; i < inputs; i++) {
        x[i] = number(i);
    }
    OK(elora_linear_forward(linear, 1, x, inputs, inputs, y, outputs, outputs, NULL, 0));
    elora_session_free(session);
    OK(elora_linear_forward(linear, 1, x, inputs, inputs, y, outputs, outputs, NULL, 0));
    elora_linear_free(linear);
    free(y);
    free(x);

    /* A part that was cut out outlives the whole. */
    model = load(argv[0]);
    const elora_model *part = NULL;
    OK(elora_model_extract(model, 1, &part));
    session = start(model, 1);
    OK(elora_session_decode(session, TOKENS, 3, logits, vocab));
    elora_model_free(model);
    elora_session_free(session);
    session = start(part, 0);
    elora_model_free(part);
    OK(elora_session_decode(session, TOKENS, 3, later, vocab));
    for (size_t i = 0; i < vocab; i++) {
        const float difference = later[i] > logits[i] ? later[i] - logits[i] : logits[i] - later[i];
        CHECK(difference <= 1e-4f * (logits[i] > 0 ? 1 + logits[i] : 1 - logits[i]));
    }
    elora_session_free(session);

    /* From the callback: refused, but freeing is not. */
    for (int frees = 0; frees < 2; frees++) {
        model = load(argv[0]);
        struct misuse self = {start(model, 0), frees, 0};
        elora_model_free(model);
        elora_generate_options options;
        OK(elora_generate_options_init(&options, sizeof options));
        options.max_new_tokens = 3;
        options.ignore_stop_tokens = 1;
        size_t n = 0;
        OK(elora_session_generate(self.session, TOKENS, 3, &options, misuse, &self, NULL, 0, &n));
        CHECK(n == 3 && self.calls == 3);
        if (!frees) {
            elora_session_free(self.session);
        }
    }
    free(later);
    free(logits);
    return 0;
}
