/* adapt MODEL ADAPTER TMP: written from the header and the documentation alone. Loads a PEFT adapter
 * onto a bundle, stores the sum as sparse 4-bit integers, opens it again, and compares the logits. */
#include <math.h>

#include "check.h"

static const elora_token PROMPT[5] = {1, 17, 5, 9, 3};

/* The logits after the prompt, which the caller frees. */
static float *logits_of(const elora_model *model, const elora_adapter *adapter, float scale) {
    const size_t vocab = elora_model_vocab_size(model);
    float *logits = allocate(vocab * sizeof *logits);
    elora_session *session = start(model, 0);
    if (adapter != NULL) {
        OK(elora_session_set_adapters(session, &adapter, &scale, 1));
    }
    OK(elora_session_decode(session, PROMPT, 5, logits, vocab));
    elora_session_free(session);
    return logits;
}

/* The largest difference, as a part of the largest number. */
static float difference(const float *a, const float *b, size_t n) {
    float most = 0.0f, largest = 0.0f;
    for (size_t i = 0; i < n; i++) {
        most = fmaxf(most, fabsf(a[i] - b[i]));
        largest = fmaxf(largest, fabsf(a[i]));
    }
    return most / largest;
}

int run_adapt(int argc, char **argv) {
    CHECK(argc == 3);
    char path[1024];
    snprintf(path, sizeof path, "%s/adapted.elora", argv[2]);
    const elora_model *model = load(argv[0]), *attached = NULL, *converted = NULL;
    const elora_adapter *adapter = NULL;
    const size_t vocab = elora_model_vocab_size(model);
    OK(elora_adapter_load(model, argv[1], &adapter));
    float *plain = logits_of(model, NULL, 0.0f), *at_run_time = logits_of(model, adapter, 0.5f);
    CHECK(difference(plain, at_run_time, vocab) > 1e-3f);

    OK(elora_model_attach_adapter(model, adapter, 0.5f, &attached));
    float *with = logits_of(attached, NULL, 0.0f);
    CHECK(difference(at_run_time, with, vocab) < 1e-5f);

    elora_layer_info info = {0};
    info.struct_size = sizeof info;
    OK(elora_model_layer_info(model, 0, &info));
    elora_convert_options options;
    OK(elora_convert_options_init(&options, sizeof options));
    options.format = ELORA_WEIGHT_FORMAT_SPARSE_INT;
    options.group_size = info.group_size > 0 ? info.group_size : 8;
    OK(elora_model_convert(attached, &options, &converted));
    float *sparse = logits_of(converted, NULL, 0.0f);
    CHECK(difference(with, sparse, vocab) < 0.25f);
    OK(elora_model_save(converted, path, true));
    const elora_model *reopened = load(path);
    OK(elora_model_verify(reopened));
    float *again = logits_of(reopened, NULL, 0.0f);
    CHECK(memcmp(sparse, again, vocab * sizeof *again) == 0);
    OK(elora_model_layer_info(reopened, 0, &info));
    CHECK(info.format == ELORA_WEIGHT_FORMAT_SPARSE_INT && info.bits == 4);
    CHECK(remove(path) == 0);
    free(again);
    free(sparse);
    free(with);
    free(at_run_time);
    free(plain);
    elora_model_free(reopened);
    elora_model_free(converted);
    elora_model_free(attached);
    elora_adapter_free(adapter);
    elora_model_free(model);
    return 0;
}
