/* threads MODEL: eight threads on one model, with sessions of their own and a layer that they share, get what one
 * thread gets. */
#include <pthread.h>

#include "check.h"

enum { THREADS = 8, ROUNDS = 3, PROMPT = 6 };

static const elora_model *model;
static const elora_linear *linear;
static size_t vocab, inputs, outputs;

struct worker {
    size_t index;
    float *logits;
    float *y;
    /* A copy of a session that all workers have copies of, and what comes after it. */
    elora_session *branch;
    float *after;
};

/* Goes on with a copy of the worker's branch. */
static void go_on(const struct worker *self, float *logits) {
    elora_session *own = NULL;
    const elora_token token = (elora_token)(self->index % vocab);
    OK(elora_session_copy(self->branch, &own));
    OK(elora_session_decode(own, &token, 1, logits, vocab));
    elora_sampler *sampler = NULL;
    elora_token drawn = -1;
    OK(elora_sampler_new(NULL, &sampler));
    OK(elora_sampler_sample(sampler, logits, vocab, NULL, 0, &drawn));
    CHECK(drawn >= 0 && (size_t)drawn < vocab);
    elora_sampler_free(sampler);
    elora_session_free(own);
}

static void compute(size_t index, float *logits, float *y) {
    elora_session *session = start(model, index % elora_model_subnet_count(model));
    elora_token tokens[PROMPT];
    for (size_t i = 0; i < PROMPT; i++) {
        tokens[i] = (elora_token)((7 * index + 3 * i + 1) % vocab);
    }
    OK(elora_session_decode(session, tokens, PROMPT, NULL, 0));
    OK(elora_session_decode(session, tokens, 1, logits, vocab));
    elora_session_free(session);
    float *x = allocate(inputs * sizeof *x);
    for (size_t i = 0; i < inputs; i++) {
        x[i] = number(i + index);
    }
    OK(elora_linear_forward(linear, 1, x, inputs, inputs, y, outputs, outputs, NULL, 0));
    free(x);
}

static void *work(void *argument) {
    struct worker *self = argument;
    float *logits = allocate(vocab * sizeof *logits), *y = allocate(outputs * sizeof *y);
    for (size_t round = 0; round < ROUNDS; round++) {
        const elora_model *mine = elora_model_retain(model);
        const elora_linear *my_linear = elora_linear_retain(linear);
        compute(self->index, logits, y);
        CHECK(memcmp(logits, self->logits, vocab * sizeof *logits) == 0);
        CHECK(memcmp(y, self->y, outputs * sizeof *y) == 0);
        go_on(self, logits);
        CHECK(memcmp(logits, self->after, vocab * sizeof *logits) == 0);
        /* Each thread has a text of its own. */
        char name[32];
        snprintf(name, sizeof name, "nothing-%zu", self->index);
        size_t found = 77;
        FAILS(NOT_FOUND, elora_model_find_layer(model, name, &found));
        CHECK(found == 77 && says(name));
        elora_linear_free(my_linear);
        elora_model_free(mine);
    }
    free(y);
    free(logits);
    return NULL;
}

int run_threads(int argc, char **argv) {
    CHECK(argc == 1);
    model = load(argv[0]);
    OK(elora_linear_new(model, 0, 0, NULL, &linear));
    vocab = elora_model_vocab_size(model);
    inputs = elora_linear_in_features(linear);
    outputs = elora_linear_out_features(linear);
    elora_session *prefix = start(model, 0);
    const elora_token common[4] = {1, 2, 3, 4};
    OK(elora_session_decode(prefix, common, 4, NULL, 0));
    struct worker workers[THREADS];
    pthread_t threads[THREADS];
    for (size_t i = 0; i < THREADS; i++) {
        workers[i].index = i;
        workers[i].logits = allocate(vocab * sizeof(float));
        workers[i].y = allocate(outputs * sizeof(float));
        compute(i, workers[i].logits, workers[i].y);
        workers[i].after = allocate(vocab * sizeof(float));
        OK(elora_session_copy(prefix, &workers[i].branch));
        go_on(&workers[i], workers[i].after);
    }
    elora_session_free(prefix);
    for (size_t i = 0; i < THREADS; i++) {
        CHECK(pthread_create(&threads[i], NULL, work, &workers[i]) == 0);
    }
    for (size_t i = 0; i < THREADS; i++) {
        CHECK(pthread_join(threads[i], NULL) == 0);
        free(workers[i].logits);
        free(workers[i].y);
        free(workers[i].after);
        elora_session_free(workers[i].branch);
    }
    elora_linear_free(linear);
    elora_model_free(model);
    return 0;
}
