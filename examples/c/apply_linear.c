/* Lists the linear layers of a model and applies one of them to rows of this program.
 *
 *     apply_linear MODEL [LAYER [ROWS]]
 *
 * MODEL is a bundle or a Hugging Face folder. LAYER is a name such as model.layers.0.mlp.up_proj.
 * The layer is applied under every subnet of the model. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "elastic_lora.h"

static void check(elora_status status, const char *what) {
    if (status != ELORA_STATUS_OK) {
        char text[1024] = "";
        elora_last_error(text, sizeof text, NULL);
        fprintf(stderr, "%s: %s: %s\n", what, elora_status_name(status), text);
        exit(1);
    }
}

static const char *format_name(elora_weight_format format) {
    switch (format) {
    case ELORA_WEIGHT_FORMAT_F32: return "f32";
    case ELORA_WEIGHT_FORMAT_F16: return "f16";
    case ELORA_WEIGHT_FORMAT_BF16: return "bf16";
    case ELORA_WEIGHT_FORMAT_INT: return "codes";
    case ELORA_WEIGHT_FORMAT_SPARSE_F16: return "sparse f16";
    case ELORA_WEIGHT_FORMAT_SPARSE_BF16: return "sparse bf16";
    case ELORA_WEIGHT_FORMAT_SPARSE_INT: return "sparse codes";
    case ELORA_WEIGHT_FORMAT_NM_F16: return "N:M f16";
    case ELORA_WEIGHT_FORMAT_NM_BF16: return "N:M bf16";
    default: return "other";
    }
}

static elora_layer_info describe(const elora_model *model, size_t layer) {
    elora_layer_info info;
    info.struct_size = sizeof info;
    check(elora_model_layer_info(model, layer, &info), "elora_model_layer_info");
    return info;
}

static double seconds(void) {
    struct timespec now;
    timespec_get(&now, TIME_UTC);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* Applies one layer under one subnet. The rows are not contiguous, to show leading dimensions. */
static void apply(const elora_model *model, size_t layer, size_t subnet, size_t n_rows) {
    const elora_linear *linear = NULL;
    elora_status status = elora_linear_new(model, layer, subnet, NULL, &linear);
    if (status == ELORA_STATUS_INVALID_ARGUMENT) {
        printf("  %-12s leaves the layer out\n", elora_model_subnet_name(model, subnet));
        return;
    }
    check(status, "elora_linear_new");
    const size_t inputs = elora_linear_in_features(linear), outputs = elora_linear_out_features(linear);
    const size_t ldx = inputs + 3, ldy = outputs + 5;
    float *x = malloc(n_rows * ldx * sizeof *x), *y = malloc(n_rows * ldy * sizeof *y);
    size_t scratch_bytes = 0;
    check(elora_linear_scratch_size(linear, n_rows, &scratch_bytes), "elora_linear_scratch_size");
    void *scratch = malloc(scratch_bytes);
    if (x == NULL || y == NULL || scratch == NULL) {
        fprintf(stderr, "no memory\n");
        exit(1);
    }
    for (size_t i = 0; i < n_rows * ldx; i++) {
        x[i] = (float)(i % 17) / 8.0f - 1.0f;
    }
    double best = 1e9;
    for (int repeat = 0; repeat < 5; repeat++) {
        const double start = seconds();
        check(elora_linear_forward(linear, n_rows, x, n_rows * ldx, ldx, y, n_rows * ldy, ldy, scratch, scratch_bytes),
              "elora_linear_forward");
        const double took = seconds() - start;
        best = took < best ? took : best;
    }
    double sum = 0.0;
    for (size_t row = 0; row < n_rows; row++) {
        for (size_t i = 0; i < outputs; i++) {
            sum += (double)y[row * ldy + i] * (double)y[row * ldy + i];
        }
    }
    printf("  %-12s %zu -> %zu, rank %zu: %.3f us, root mean square of the output %.6f\n",
           elora_model_subnet_name(model, subnet), inputs, outputs, elora_linear_rank(linear), 1e6 * best,
           sqrt(sum / (double)(n_rows * outputs)));
    free(scratch);
    free(y);
    free(x);
    elora_linear_free(linear);
}

int main(int argc, char **argv) {
    if (argc < 2 || argc > 4) {
        fprintf(stderr, "usage: apply_linear MODEL [LAYER [ROWS]]\n");
        return 2;
    }
    if (elora_abi_version() != ELORA_ABI_VERSION) {
        fprintf(stderr, "the library %s has another binary interface than this program\n", elora_version());
        return 1;
    }
    const elora_model *model = NULL;
    check(elora_model_load(argv[1], NULL, &model), argv[1]);
    const size_t n_layers = elora_model_layer_count(model);
    printf("%zu linear layers, %zu bytes of weights\n", n_layers, elora_model_weight_bytes(model));
    for (size_t layer = 0; layer < n_layers; layer++) {
        const elora_layer_info info = describe(model, layer);
        printf("  %-36s %5zu -> %5zu  %-12s %2u bits  rank %2zu  %9zu bytes\n", info.name, info.in_features,
               info.out_features, format_name(info.format), (unsigned)info.bits, info.max_rank, info.weight_bytes);
    }
    size_t layer = 0;
    if (argc > 2) {
        check(elora_model_find_layer(model, argv[2], &layer), "LAYER");
    }
    const long rows = argc > 3 ? strtol(argv[3], NULL, 10) : 4;
    if (rows < 1 || rows > 65536) {
        fprintf(stderr, "ROWS must be in 1..65536\n");
        return 2;
    }
    printf("%s on %ld rows, under each subnet:\n", describe(model, layer).name, rows);
    for (size_t subnet = 0; subnet < elora_model_subnet_count(model); subnet++) {
        apply(model, layer, subnet, (size_t)rows);
    }
    elora_model_free(model);
    return 0;
}
