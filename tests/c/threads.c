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
};

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
    struct worker workers[THREADS];
    pthread_t threads[THREADS];
    for (size_t i = 0; i < THREADS; i++) {
        workers[i].index = i;
        workers[i].logits = allocate(vocab * sizeof(float));
        workers[i].y = allocate(outputs * sizeof(float));
        compute(i, workers[i].logits, workers[i].y);
    }
    for (size_t i = 0; i < THREADS; i++) {
        CHECK(pthread_create(&threads[i], NULL, work, &workers[i]) == 0);
    }
    for (size_t i = 0; i < THREADS; i++) {
        CHECK(pthread_join(threads[i], NULL) == 0);
        free(workers[i].logits);
        free(workers[i].y);
    }
    elora_linear_free(linear);
    elora_model_free(model);
    return 0;
}
