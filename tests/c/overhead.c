/* overhead MODEL: nanoseconds of a call that does nothing, of one that looks something up in a session, and of one that
 * applies layer 0 to a row; the least of several runs of many. */
#include <time.h>

#include "check.h"

enum { RUNS = 9, CALLS = 20000 };

static double now(void) {
    struct timespec time;
    timespec_get(&time, TIME_UTC);
    return 1e9 * (double)time.tv_sec + (double)time.tv_nsec;
}

#define MEASURE(result, call)                                        \
    do {                                                             \
        result = 1e18;                                               \
        for (int run = 0; run < RUNS; run++) {                       \
            const double from = now();                               \
            for (int i = 0; i < CALLS; i++) {                        \
                call;                                                \
            }                                                        \
            const double each = (now() - from) / CALLS;              \
            result = each < result ? each : result;                  \
        }                                                            \
    } while (0)

int run_overhead(int argc, char **argv) {
    CHECK(argc == 1);
    elora_model_options options;
    OK(elora_model_options_init(&options, sizeof options));
    options.n_threads = 1;
    const elora_model *model = NULL;
    OK(elora_model_load(argv[0], &options, &model));
    elora_session *session = start(model, 0);
    const elora_linear *linear = NULL;
    OK(elora_linear_new(model, 0, 0, NULL, &linear));
    const size_t inputs = elora_linear_in_features(linear), outputs = elora_linear_out_features(linear);
    float *x = allocate(inputs * sizeof *x), *y = allocate(outputs * sizeof *y);
    for (size_t i = 0; i < inputs; i++) {
        x[i] = number(i);
    }
    size_t bytes = 0;
    OK(elora_linear_scratch_size(linear, 1, &bytes));
    void *scratch = allocate(bytes);
    double nothing, look, apply;
    volatile size_t sink = 0;
    MEASURE(nothing, sink += elora_linear_rank(linear));
    MEASURE(look, sink += elora_session_position(session));
    MEASURE(apply, sink += (size_t)elora_linear_forward(linear, 1, x, inputs, inputs, y, outputs, outputs, scratch,
                                                        bytes));
    CHECK(elora_linear_forward(linear, 1, x, inputs, inputs, y, outputs, outputs, scratch, bytes) == ELORA_STATUS_OK);
    CHECK(sink != 1);
    printf("%.1f %.1f %.1f\n", nothing, look, apply);
    free(scratch);
    free(y);
    free(x);
    elora_linear_free(linear);
    elora_session_free(session);
    elora_model_free(model);
    return 0;
}
