/* hostile MODEL FOLDER TMP: every function with what it must refuse. MODEL is a bundle with several subnets, FOLDER a
 * model with a tokenizer, TMP a folder to write to. Outputs must be as they were wherever a call fails. */
#include "check.h"

#define UNTOUCHED 12345u

static const elora_model *model;
static const elora_linear *linear;
static elora_session *session;
static size_t vocab, inputs, outputs;

/* A number whose address is no multiple of its size. */
static void *misaligned(void *memory) {
    return (unsigned char *)memory + 1;
}

static void texts(void) {
    CHECK(strcmp(elora_status_name(ELORA_STATUS_OK), "ELORA_STATUS_OK") == 0);
    for (elora_status status = -300; status < 300; status++) {
        CHECK(elora_status_name(status) != NULL && strlen(elora_status_name(status)) > 0);
    }
    CHECK(elora_abi_version() == ELORA_ABI_VERSION);
    char version[32];
    snprintf(version, sizeof version, "%d.%d.%d", ELORA_VERSION_MAJOR, ELORA_VERSION_MINOR, ELORA_VERSION_PATCH);
    CHECK(strcmp(version, elora_version()) == 0);

    /* No failure yet. */
    char buf[256];
    size_t len = UNTOUCHED;
    CHECK(elora_last_error(buf, sizeof buf, &len) == ELORA_STATUS_OK && len == 0 && buf[0] == '\0');
    FAILS(NULL_POINTER, elora_model_verify(NULL));
    CHECK(elora_last_error(NULL, 0, &len) == ELORA_STATUS_INSUFFICIENT_SIZE);
    CHECK(len == strlen("`model` is NULL"));
    memset(buf, 'x', sizeof buf);
    CHECK(elora_last_error(buf, len, NULL) == ELORA_STATUS_INSUFFICIENT_SIZE);
    CHECK(buf[0] == 'x' && buf[len] == 'x');
    CHECK(elora_last_error(buf, len + 1, NULL) == ELORA_STATUS_OK);
    CHECK(strcmp(buf, "`model` is NULL") == 0 && buf[len + 1] == 'x');
    CHECK(elora_last_error(NULL, 5, &len) == ELORA_STATUS_NULL_POINTER);
    CHECK(elora_last_error(NULL, 0, NULL) == ELORA_STATUS_INSUFFICIENT_SIZE);
    CHECK(elora_last_error(buf, sizeof buf, misaligned(&len)) == ELORA_STATUS_INVALID_ARGUMENT);
    /* The text is still that of the call that failed. */
    CHECK(says("`model` is NULL"));
}

static void options(const char *path) {
    const elora_model *out = NULL;
    elora_model_options o;
    FAILS(NULL_POINTER, elora_model_options_init(NULL, sizeof o));
    FAILS(INVALID_ARGUMENT, elora_model_options_init(&o, 0));
    FAILS(INVALID_ARGUMENT, elora_model_options_init(&o, (size_t)-1));
    OK(elora_model_options_init(&o, sizeof o));
    CHECK(o.struct_size == sizeof o && o.n_threads == 0 && o.use_mmap == 1 && o.verify == ELORA_VERIFY_ON_USE);
    for (int i = 0; i < 6; i++) {
        OK(elora_model_options_init(&o, sizeof o));
        switch (i) {
        case 0: o.verify = 3; break;
        case 1: o.verify = -1; break;
        case 2: o.reserved = 1; break;
        case 3: o.n_threads = 1000000; break;
        case 4: o.struct_size = 0; break;
        default: o.struct_size = (size_t)-1; break;
        }
        FAILS(INVALID_ARGUMENT, elora_model_load(path, &o, &out));
        CHECK(out == NULL);
    }
    /* An older header knows fewer fields, a newer one more. */
    OK(elora_model_options_init(&o, sizeof o));
    o.struct_size = offsetof(elora_model_options, use_mmap);
    o.verify = 77;
    OK(elora_model_load(path, &o, &out));
    elora_model_free(out);
    out = NULL;
    struct {
        elora_model_options known;
        uint64_t unknown;
    } newer;
    memset(&newer, 0xff, sizeof newer);
    OK(elora_model_options_init(&newer.known, sizeof newer));
    CHECK(newer.unknown == 0 && newer.known.struct_size == sizeof newer);
    newer.known.use_mmap = 0;
    newer.known.verify = ELORA_VERIFY_ON_LOAD;
    OK(elora_model_load(path, &newer.known, &out));
    elora_model_free(out);
    out = NULL;
    newer.unknown = 1;
    FAILS(UNSUPPORTED, elora_model_load(path, &newer.known, &out));
    CHECK(out == NULL);
}

/* A copy of a file without its last bytes, or with one of them changed. */
static void spoil(const char *from, const char *to, long cut, long change) {
    FILE *in = fopen(from, "rb");
    CHECK(in != NULL && fseek(in, 0, SEEK_END) == 0);
    const long size = ftell(in);
    CHECK(size > 0 && fseek(in, 0, SEEK_SET) == 0);
    unsigned char *bytes = allocate((size_t)size);
    CHECK(fread(bytes, 1, (size_t)size, in) == (size_t)size && fclose(in) == 0);
    if (change > 0) {
        bytes[size - change] ^= 0x15;
    }
    FILE *out = fopen(to, "wb");
    const size_t kept = cut < size ? (size_t)(size - cut) : 0;
    CHECK(out != NULL && fwrite(bytes, 1, kept, out) == kept && fclose(out) == 0);
    free(bytes);
}

static void files(const char *path, const char *folder) {
    const elora_model *out = NULL;
    FAILS(NULL_POINTER, elora_model_load(NULL, NULL, &out));
    FAILS(NULL_POINTER, elora_model_load(path, NULL, NULL));
    void *place = allocate(2 * sizeof(void *));
    FAILS(INVALID_ARGUMENT, elora_model_load(path, NULL, misaligned(place)));
    free(place);
    FAILS(IO, elora_model_load("/nowhere/at/all", NULL, &out));
    CHECK(says("/nowhere/at/all"));
    FAILS(IO, elora_model_load("", NULL, &out));
    FAILS(INVALID_ARGUMENT, elora_model_load("caf\xe9", NULL, &out));
    CHECK(says("UTF-8"));
    CHECK(out == NULL);

    char spoiled[1024];
    snprintf(spoiled, sizeof spoiled, "%s/spoiled.elora", folder);
    const long cuts[] = {1, 64, 5000, 1000000000};
    for (size_t i = 0; i < sizeof cuts / sizeof *cuts; i++) {
        spoil(path, spoiled, cuts[i], 0);
        FAILS(INVALID_FORMAT, elora_model_load(spoiled, NULL, &out));
        CHECK(out == NULL && says("spoiled.elora"));
    }
    /* A bit of a weight: found where the weight is looked at. */
    spoil(path, spoiled, 0, 200);
    elora_model_options o;
    OK(elora_model_options_init(&o, sizeof o));
    o.verify = ELORA_VERIFY_ON_LOAD;
    FAILS(INVALID_FORMAT, elora_model_load(spoiled, &o, &out));
    CHECK(out == NULL);
    OK(elora_model_load(spoiled, NULL, &out));
    FAILS(INVALID_FORMAT, elora_model_verify(out));
    elora_model_free(out);

    FAILS(NULL_POINTER, elora_model_save(NULL, spoiled, true));
    FAILS(NULL_POINTER, elora_model_save(model, NULL, true));
    FAILS(INVALID_ARGUMENT, elora_model_save(model, "\xff", true));
    FAILS(IO, elora_model_save(model, "/nowhere/at/all", true));
    CHECK(elora_model_save(model, spoiled, false) != ELORA_STATUS_OK && says("spoiled.elora"));
    OK(elora_model_save(model, spoiled, true));
    out = load(spoiled);
    OK(elora_model_verify(out));
    CHECK(elora_model_subnet_count(out) == elora_model_subnet_count(model));
    elora_model_free(out);
    /* A file that is gone is still mapped. */
    out = load(spoiled);
    CHECK(remove(spoiled) == 0);
    elora_session *late = start(out, 1);
    elora_model_free(out);
    const elora_token token = 3;
    OK(elora_session_decode(late, &token, 1, NULL, 0));
    elora_session_free(late);
    FAILS(IO, elora_model_load(spoiled, NULL, &out));
    /* Neither a bundle nor a folder with a model. */
    out = NULL;
    CHECK(elora_model_load("/dev/null", NULL, &out) != ELORA_STATUS_OK && says("/dev/null"));
    CHECK(elora_model_load(folder, NULL, &out) != ELORA_STATUS_OK && says(folder));
    CHECK(out == NULL);
    FAILS(NULL_POINTER, elora_model_verify(NULL));
}

static void listing(const char *tokenized) {
    CHECK(elora_model_retain(NULL) == NULL);
    elora_model_free(NULL);
    CHECK(elora_model_layer_count(NULL) == 0 && says("NULL"));
    CHECK(elora_model_subnet_count(NULL) == 0);
    CHECK(elora_model_vocab_size(NULL) == 0);
    CHECK(elora_model_context_size(NULL) == 0);
    CHECK(elora_model_weight_bytes(NULL) == 0);
    CHECK(elora_model_weight_bytes(model) > 0 && elora_model_context_size(model) > 0);
    CHECK(elora_model_subnet_name(NULL, 0) == NULL);
    CHECK(elora_model_subnet_name(model, elora_model_subnet_count(model)) == NULL && says("subnet"));
    CHECK(elora_model_subnet_name(model, (size_t)-1) == NULL);

    elora_layer_info info;
    info.struct_size = sizeof info;
    info.max_rank = UNTOUCHED;
    FAILS(NULL_POINTER, elora_model_layer_info(NULL, 0, &info));
    FAILS(NULL_POINTER, elora_model_layer_info(model, 0, NULL));
    FAILS(INVALID_ARGUMENT, elora_model_layer_info(model, elora_model_layer_count(model), &info));
    FAILS(INVALID_ARGUMENT, elora_model_layer_info(model, (size_t)-1, &info));
    info.struct_size = 3;
    FAILS(INVALID_ARGUMENT, elora_model_layer_info(model, 0, &info));
    CHECK(info.max_rank == UNTOUCHED);
    info.struct_size = offsetof(elora_layer_info, max_rank);
    OK(elora_model_layer_info(model, 0, &info));
    CHECK(info.max_rank == UNTOUCHED && strcmp(info.name, "model.layers.0.self_attn.q_proj") == 0);

    size_t found = UNTOUCHED;
    FAILS(NULL_POINTER, elora_model_find_layer(NULL, "lm_head", &found));
    FAILS(NULL_POINTER, elora_model_find_layer(model, NULL, &found));
    FAILS(NULL_POINTER, elora_model_find_layer(model, "lm_head", NULL));
    FAILS(NOT_FOUND, elora_model_find_layer(model, "", &found));
    FAILS(INVALID_ARGUMENT, elora_model_find_layer(model, "\xc3", &found));
    FAILS(NULL_POINTER, elora_model_find_subnet(NULL, "whole", &found));
    FAILS(NULL_POINTER, elora_model_find_subnet(model, NULL, &found));
    FAILS(NULL_POINTER, elora_model_find_subnet(model, "whole", NULL));
    FAILS(NOT_FOUND, elora_model_find_subnet(model, "nothing", &found));
    CHECK(found == UNTOUCHED && says("nothing"));
    OK(elora_model_find_layer(model, "lm_head", &found));
    CHECK(found == elora_model_layer_count(model) - 1);
    OK(elora_model_find_subnet(model, elora_model_subnet_name(model, 1), &found));
    CHECK(found == 1);

    const elora_model *part = NULL;
    FAILS(NULL_POINTER, elora_model_extract(NULL, 0, &part));
    FAILS(NULL_POINTER, elora_model_extract(model, 0, NULL));
    FAILS(INVALID_ARGUMENT, elora_model_extract(model, 99, &part));
    FAILS(NULL_POINTER, elora_model_merge(NULL, &part));
    FAILS(NULL_POINTER, elora_model_merge(model, NULL));
    CHECK(part == NULL);

    char buf[8] = "xxxxxxx";
    size_t len = 0;
    FAILS(NULL_POINTER, elora_model_space_json(NULL, buf, sizeof buf, &len));
    FAILS(INSUFFICIENT_SIZE, elora_model_space_json(model, buf, sizeof buf, &len));
    CHECK(len > sizeof buf && buf[0] == 'x');
    char *json = allocate(len + 1);
    OK(elora_model_space_json(model, json, len + 1, NULL));
    CHECK(strlen(json) == len && json[0] == '{');
    free(json);

    elora_token tokens[8] = {-7};
    size_t n = UNTOUCHED;
    FAILS(NULL_POINTER, elora_model_stop_tokens(NULL, tokens, 8, &n));
    FAILS(NULL_POINTER, elora_model_stop_tokens(model, NULL, 8, &n));
    CHECK(n == UNTOUCHED);
    FAILS(INSUFFICIENT_SIZE, elora_model_stop_tokens(model, NULL, 0, &n));
    CHECK(n >= 1 && n <= 8 && tokens[0] == -7);
    OK(elora_model_stop_tokens(model, tokens, 8, NULL));

    CHECK(!elora_model_has_tokenizer(NULL) && !elora_model_has_tokenizer(model));
    FAILS(NOT_FOUND, elora_model_tokenize(model, "a", ELORA_SPECIAL_NONE, tokens, 8, &n));
    FAILS(NOT_FOUND, elora_model_detokenize(model, tokens, 1, buf, sizeof buf, &len));
    FAILS(NULL_POINTER, elora_model_tokenize(NULL, "a", ELORA_SPECIAL_NONE, tokens, 8, &n));
    FAILS(NULL_POINTER, elora_model_detokenize(NULL, tokens, 1, buf, sizeof buf, &len));
    if (strcmp(tokenized, "-") == 0) {
        return;
    }
    const elora_model *talks = load(tokenized);
    CHECK(elora_model_has_tokenizer(talks));
    FAILS(NULL_POINTER, elora_model_tokenize(talks, NULL, ELORA_SPECIAL_NONE, tokens, 8, &n));
    FAILS(INVALID_ARGUMENT, elora_model_tokenize(talks, "a", 3, tokens, 8, &n));
    FAILS(INVALID_ARGUMENT, elora_model_tokenize(talks, "a", -1, tokens, 8, &n));
    FAILS(INVALID_ARGUMENT, elora_model_tokenize(talks, "\xf0\x9f", ELORA_SPECIAL_NONE, tokens, 8, &n));
    FAILS(INSUFFICIENT_SIZE, elora_model_tokenize(talks, "Tom has 12 pens", ELORA_SPECIAL_NONE, NULL, 0, &n));
    elora_token *text = allocate(n * sizeof *text);
    OK(elora_model_tokenize(talks, "Tom has 12 pens", ELORA_SPECIAL_NONE, text, n, &n));
    char said[64];
    OK(elora_model_detokenize(talks, text, n, said, sizeof said, &len));
    CHECK(strcmp(said, "Tom has 12 pens") == 0 && len == strlen(said));
    FAILS(INSUFFICIENT_SIZE, elora_model_detokenize(talks, text, n, said, len, &len));
    FAILS(NULL_POINTER, elora_model_detokenize(talks, NULL, n, said, sizeof said, &len));
    text[0] = -3;
    FAILS(INVALID_ARGUMENT, elora_model_detokenize(talks, text, n, said, sizeof said, &len));
    text[0] = INT32_MAX;
    FAILS(INVALID_ARGUMENT, elora_model_detokenize(talks, text, n, said, sizeof said, &len));
    free(text);
    const elora_model *dense = NULL;
    OK(elora_model_merge(talks, &dense));
    elora_model_free(talks);
    elora_model_free(dense);
}

static void parts(void) {
    elora_model_info info;
    info.struct_size = sizeof info;
    info.n_blocks = UNTOUCHED;
    FAILS(NULL_POINTER, elora_model_describe(NULL, &info));
    FAILS(NULL_POINTER, elora_model_describe(model, NULL));
    info.struct_size = 1;
    FAILS(INVALID_ARGUMENT, elora_model_describe(model, &info));
    CHECK(info.n_blocks == UNTOUCHED);
    info.struct_size = sizeof info;
    OK(elora_model_describe(model, &info));
    CHECK(info.vocab_size == vocab);
    const size_t width = info.hidden_size;
    float *out = allocate((width + 1) * sizeof *out);
    elora_token token = 1;
    FAILS(NULL_POINTER, elora_model_embed(NULL, &token, 1, out, width));
    FAILS(NULL_POINTER, elora_model_embed(model, NULL, 1, out, width));
    FAILS(NULL_POINTER, elora_model_embed(model, &token, 1, NULL, width));
    FAILS(INSUFFICIENT_SIZE, elora_model_embed(model, &token, 1, out, width - 1));
    FAILS(INVALID_ARGUMENT, elora_model_embed(model, &token, 1, misaligned(out), width));
    FAILS(INVALID_ARGUMENT, elora_model_embed(model, &token, (size_t)-1, out, width));
    token = (elora_token)vocab;
    FAILS(INVALID_ARGUMENT, elora_model_embed(model, &token, 1, out, width));
    token = -1;
    FAILS(INVALID_ARGUMENT, elora_model_embed(model, &token, 1, out, width));
    OK(elora_model_embed(model, NULL, 0, NULL, 0));
    FAILS(NULL_POINTER, elora_model_norm(NULL, "model.norm.weight", out, width));
    FAILS(NULL_POINTER, elora_model_norm(model, NULL, out, width));
    FAILS(NULL_POINTER, elora_model_norm(model, "model.norm.weight", NULL, width));
    FAILS(NOT_FOUND, elora_model_norm(model, "model.norm", out, width));
    FAILS(INSUFFICIENT_SIZE, elora_model_norm(model, "model.norm.weight", out, width - 1));
    OK(elora_model_norm(model, "model.layers.0.post_attention_layernorm.weight", out, width));
    const size_t half = info.head_dim / 2;
    float *cos = allocate(half * sizeof *cos), *sin = allocate(half * sizeof *sin);
    FAILS(NULL_POINTER, elora_model_rotary(NULL, 0, cos, sin, half));
    FAILS(NULL_POINTER, elora_model_rotary(model, 0, NULL, sin, half));
    FAILS(NULL_POINTER, elora_model_rotary(model, 0, cos, NULL, half));
    FAILS(INSUFFICIENT_SIZE, elora_model_rotary(model, 0, cos, sin, half - 1));
    FAILS(INVALID_ARGUMENT, elora_model_rotary(model, 0, cos, cos, half));
    OK(elora_model_rotary(model, (size_t)-1, cos, sin, half));
    OK(elora_model_rotary(model, 0, cos, sin, half));
    CHECK(cos[half - 1] == 1.0f && sin[half - 1] == 0.0f);
    free(sin);
    free(cos);
    free(out);
}

static void linears(void) {
    const elora_linear *out = NULL;
    elora_linear_options o;
    FAILS(NULL_POINTER, elora_linear_options_init(NULL, sizeof o));
    FAILS(INVALID_ARGUMENT, elora_linear_options_init(&o, 7));
    FAILS(NULL_POINTER, elora_linear_new(NULL, 0, 0, NULL, &out));
    FAILS(NULL_POINTER, elora_linear_new(model, 0, 0, NULL, NULL));
    FAILS(INVALID_ARGUMENT, elora_linear_new(model, 9999, 0, NULL, &out));
    FAILS(INVALID_ARGUMENT, elora_linear_new(model, 0, 9999, NULL, &out));
    for (int i = 0; i < 3; i++) {
        OK(elora_linear_options_init(&o, sizeof o));
        switch (i) {
        case 0: o.activations = 2; break;
        case 1: o.activations = -1; break;
        default: o.reserved = 9; break;
        }
        FAILS(INVALID_ARGUMENT, elora_linear_new(model, 0, 0, &o, &out));
    }
    CHECK(out == NULL);
    OK(elora_linear_options_init(&o, sizeof o));
    o.activations = ELORA_ACTIVATIONS_INT8;
    OK(elora_linear_new(model, 0, 0, &o, &out));
    elora_linear_free(out);

    CHECK(elora_linear_retain(NULL) == NULL);
    elora_linear_free(NULL);
    CHECK(elora_linear_in_features(NULL) == 0 && elora_linear_out_features(NULL) == 0 && elora_linear_rank(NULL) == 0);
    size_t bytes = UNTOUCHED;
    FAILS(NULL_POINTER, elora_linear_scratch_size(NULL, 1, &bytes));
    FAILS(NULL_POINTER, elora_linear_scratch_size(linear, 1, NULL));
    FAILS(INVALID_ARGUMENT, elora_linear_scratch_size(linear, (size_t)-1, &bytes));
    FAILS(INVALID_ARGUMENT, elora_linear_scratch_size(linear, (size_t)1 << 60, &bytes));
    CHECK(bytes == UNTOUCHED);

    enum { ROWS = 2 };
    OK(elora_linear_scratch_size(linear, ROWS, &bytes));
    const size_t x_len = ROWS * inputs, y_len = ROWS * outputs;
    float *x = allocate((x_len + 1) * sizeof *x), *y = allocate((y_len + 1) * sizeof *y);
    unsigned char *scratch = allocate(bytes + 64);
    for (size_t i = 0; i <= x_len; i++) {
        x[i] = 0.5f;
    }
#define FORWARD(handle, rows, xp, xl, xs, yp, yl, ys, sp, sb) \
    elora_linear_forward(handle, rows, xp, xl, xs, yp, yl, ys, sp, sb)
    FAILS(NULL_POINTER, FORWARD(NULL, ROWS, x, x_len, inputs, y, y_len, outputs, scratch, bytes));
    FAILS(NULL_POINTER, FORWARD(linear, ROWS, NULL, x_len, inputs, y, y_len, outputs, scratch, bytes));
    FAILS(NULL_POINTER, FORWARD(linear, ROWS, x, x_len, inputs, NULL, y_len, outputs, scratch, bytes));
    FAILS(INSUFFICIENT_SIZE, FORWARD(linear, ROWS, x, x_len - 1, inputs, y, y_len, outputs, scratch, bytes));
    FAILS(INSUFFICIENT_SIZE, FORWARD(linear, ROWS, x, x_len, inputs, y, y_len - 1, outputs, scratch, bytes));
    FAILS(INSUFFICIENT_SIZE, FORWARD(linear, ROWS, x, x_len, inputs, y, y_len, outputs, scratch, bytes - 1));
    FAILS(INSUFFICIENT_SIZE, FORWARD(linear, ROWS, x, x_len, inputs, y, y_len, outputs, scratch, 0));
    FAILS(INSUFFICIENT_SIZE, FORWARD(linear, (size_t)-1, x, x_len, inputs, y, y_len, outputs, NULL, 0));
    FAILS(INSUFFICIENT_SIZE, FORWARD(linear, ROWS, x, x_len, (size_t)-1, y, y_len, outputs, NULL, 0));
    FAILS(INVALID_ARGUMENT, FORWARD(linear, ROWS, x, x_len, inputs - 1, y, y_len, outputs, NULL, 0));
    FAILS(INVALID_ARGUMENT, FORWARD(linear, ROWS, x, x_len, inputs, y, y_len, outputs - 1, NULL, 0));
    FAILS(INVALID_ARGUMENT, FORWARD(linear, ROWS, x, x_len, 0, y, y_len, outputs, NULL, 0));
    FAILS(INVALID_ARGUMENT, FORWARD(linear, ROWS, misaligned(x), x_len, inputs, y, y_len, outputs, NULL, 0));
    FAILS(INVALID_ARGUMENT, FORWARD(linear, ROWS, x, x_len, inputs, misaligned(y), y_len, outputs, NULL, 0));
    /* In place, or over the other's end. */
    FAILS(INVALID_ARGUMENT, FORWARD(linear, ROWS, x, x_len, inputs, x, y_len, outputs, NULL, 0));
    CHECK(says("overlap"));
    FAILS(INVALID_ARGUMENT, FORWARD(linear, ROWS, y + 1, x_len, inputs, y, y_len, outputs, NULL, 0));
    FAILS(INVALID_ARGUMENT, FORWARD(linear, ROWS, x, x_len, inputs, y, y_len, outputs, y, bytes));
    /* Scratch memory at every address of a line. */
    OK(FORWARD(linear, ROWS, x, x_len, inputs, y, y_len, outputs, NULL, 12));
    float *again = allocate(y_len * sizeof *again);
    for (size_t shift = 0; shift < 64; shift++) {
        OK(FORWARD(linear, ROWS, x, x_len, inputs, again, y_len, outputs, scratch + shift, bytes));
        CHECK(memcmp(y, again, y_len * sizeof *y) == 0);
    }
    OK(FORWARD(linear, 0, NULL, 0, inputs, NULL, 0, outputs, NULL, 0));
    free(again);
#undef FORWARD
#define FORWARD(handle, type, xp, yp) \
    elora_linear_forward_typed(handle, 1, type, xp, inputs, inputs, yp, outputs, outputs, NULL, 0)
    FAILS(NULL_POINTER, FORWARD(NULL, ELORA_DTYPE_F32, x, y));
    FAILS(NULL_POINTER, FORWARD(linear, ELORA_DTYPE_F16, NULL, y));
    FAILS(NULL_POINTER, FORWARD(linear, ELORA_DTYPE_BF16, x, NULL));
    FAILS(INVALID_ARGUMENT, FORWARD(linear, 3, x, y));
    FAILS(INVALID_ARGUMENT, FORWARD(linear, INT32_MIN, x, y));
    FAILS(INVALID_ARGUMENT, FORWARD(linear, ELORA_DTYPE_F16, misaligned(x), y));
    FAILS(INVALID_ARGUMENT, FORWARD(linear, ELORA_DTYPE_F16, x, x));
#undef FORWARD
    free(scratch);
    free(y);
    free(x);
}

static void sessions(void) {
    elora_session *out = NULL;
    elora_session_options o;
    FAILS(NULL_POINTER, elora_session_options_init(NULL, sizeof o));
    FAILS(INVALID_ARGUMENT, elora_session_options_init(&o, 1));
    FAILS(NULL_POINTER, elora_session_new(NULL, NULL, &out));
    FAILS(NULL_POINTER, elora_session_new(model, NULL, NULL));
    for (int i = 0; i < 5; i++) {
        OK(elora_session_options_init(&o, sizeof o));
        switch (i) {
        case 0: o.cache_format = 2; break;
        case 1: o.cache_format = -2; break;
        case 2: o.activations = 55; break;
        case 3: o.n_ctx = elora_model_context_size(model) + 1; break;
        default: o.n_ctx = (size_t)-1; break;
        }
        FAILS(INVALID_ARGUMENT, elora_session_new(model, &o, &out));
    }
    CHECK(out == NULL);
    OK(elora_session_options_init(&o, sizeof o));
    o.n_ctx = 5;
    o.prefill_rows = 2;
    o.cache_format = ELORA_CACHE_F16;
    OK(elora_session_new(model, &o, &out));
    CHECK(elora_session_capacity(out) == 5 && elora_session_position(out) == 0);

    /* More rows at a time than there can be tokens. */
    elora_session *wide = NULL;
    o.prefill_rows = (size_t)-1;
    OK(elora_session_new(model, &o, &wide));
    float *all = allocate(3 * vocab * sizeof *all);
    const elora_token few[3] = {1, 2, 3};
    OK(elora_session_decode_all(wide, few, 3, all, 3 * vocab));
    OK(elora_session_decode(wide, few, 1, all, vocab));
    free(all);
    elora_session_free(wide);

    elora_session_free(NULL);
    CHECK(elora_session_position(NULL) == 0 && elora_session_capacity(NULL) == 0);
    FAILS(NULL_POINTER, elora_session_reset(NULL));
    FAILS(NULL_POINTER, elora_session_truncate(NULL, 0));
    FAILS(NULL_POINTER, elora_session_set_subnet(NULL, 0));
    FAILS(NULL_POINTER, elora_session_set_subnet_named(NULL, "whole"));
    FAILS(NULL_POINTER, elora_session_set_subnet_named(out, NULL));
    FAILS(NULL_POINTER, elora_session_set_subnet_json(NULL, "{}"));
    FAILS(NULL_POINTER, elora_session_set_subnet_json(out, NULL));
    uint32_t ranks[512] = {0};
    const size_t n_layers = elora_model_layer_count(model);
    CHECK(n_layers < 512);
    FAILS(NULL_POINTER, elora_session_set_ranks(NULL, ranks, n_layers));
    FAILS(NULL_POINTER, elora_session_set_ranks(out, NULL, n_layers));
    FAILS(NULL_POINTER, elora_session_ranks(NULL, ranks, 512, NULL));
    FAILS(NULL_POINTER, elora_session_ranks(out, NULL, 512, NULL));
    FAILS(INSUFFICIENT_SIZE, elora_session_ranks(out, ranks, n_layers - 1, NULL));
    FAILS(INVALID_ARGUMENT, elora_session_set_subnet(out, 99));
    FAILS(NOT_FOUND, elora_session_set_subnet_named(out, "nothing"));
    FAILS(INVALID_FORMAT, elora_session_set_subnet_json(out, "{"));
    CHECK(elora_session_set_subnet_json(out, "{\"nothing\": 3}") != ELORA_STATUS_OK);
    FAILS(INVALID_ARGUMENT, elora_session_set_ranks(out, ranks, n_layers - 1));
    FAILS(INVALID_ARGUMENT, elora_session_set_ranks(out, ranks, (size_t)-1));
    ranks[0] = 1000;
    FAILS(INVALID_ARGUMENT, elora_session_set_ranks(out, ranks, n_layers));

    elora_token tokens[6] = {1, 2, 3, 4, 5, 6};
    float *logits = allocate(7 * vocab * sizeof *logits);
    logits[0] = -3.0f;
    FAILS(NULL_POINTER, elora_session_decode(NULL, tokens, 1, logits, vocab));
    FAILS(NULL_POINTER, elora_session_decode(out, NULL, 1, logits, vocab));
    FAILS(INVALID_ARGUMENT, elora_session_decode(out, tokens, 0, logits, vocab));
    FAILS(INVALID_ARGUMENT, elora_session_decode(out, NULL, 0, logits, vocab));
    FAILS(INVALID_ARGUMENT, elora_session_decode(out, tokens, (size_t)-1, logits, vocab));
    FAILS(INSUFFICIENT_SIZE, elora_session_decode(out, tokens, 1, logits, vocab - 1));
    FAILS(INSUFFICIENT_SIZE, elora_session_decode(out, tokens, 1, logits, 0));
    FAILS(INVALID_ARGUMENT, elora_session_decode(out, tokens, 1, misaligned(logits), vocab));
    FAILS(CONTEXT_FULL, elora_session_decode(out, tokens, 6, logits, vocab));
    tokens[3] = (elora_token)vocab;
    FAILS(INVALID_ARGUMENT, elora_session_decode(out, tokens, 5, logits, vocab));
    tokens[3] = INT32_MIN;
    FAILS(INVALID_ARGUMENT, elora_session_decode(out, tokens, 5, logits, vocab));
    tokens[3] = 4;
    FAILS(NULL_POINTER, elora_session_decode_all(NULL, tokens, 2, logits, 2 * vocab));
    FAILS(NULL_POINTER, elora_session_decode_all(out, NULL, 2, logits, 2 * vocab));
    FAILS(INSUFFICIENT_SIZE, elora_session_decode_all(out, tokens, 2, logits, 2 * vocab - 1));
    FAILS(CONTEXT_FULL, elora_session_decode_all(out, tokens, 6, logits, 7 * vocab));
    /* An output that overlaps an input. */
    elora_token *inside = (elora_token *)(void *)(logits + 3);
    inside[0] = inside[1] = 1;
    elora_session *alone = out;
    FAILS(INVALID_ARGUMENT, elora_session_decode(out, inside, 1, logits, vocab));
    CHECK(says("overlap"));
    FAILS(INVALID_ARGUMENT, elora_session_decode_all(out, inside, 2, logits, 2 * vocab));
    CHECK(says("overlap"));
    FAILS(INVALID_ARGUMENT, elora_session_decode_batch(&alone, 1, inside, logits, vocab));
    CHECK(says("overlap"));
    FAILS(INVALID_ARGUMENT, elora_session_generate(out, tokens, 2, NULL, NULL, NULL, tokens + 1, 4, NULL));
    CHECK(says("overlap"));
    CHECK(logits[0] == -3.0f && elora_session_position(out) == 0);
    OK(elora_session_decode(out, tokens, 4, NULL, 0));
    FAILS(INVALID_STATE, elora_session_set_subnet(out, 1));
    FAILS(INVALID_STATE, elora_session_set_subnet_named(out, elora_model_subnet_name(model, 1)));
    FAILS(CONTEXT_FULL, elora_session_decode(out, tokens, 2, logits, vocab));
    OK(elora_session_truncate(out, 100));
    CHECK(elora_session_position(out) == 4);

    elora_session *both[2];
    both[0] = out;
    both[1] = out;
    FAILS(INVALID_STATE, elora_session_decode_batch(both, 2, tokens, logits, 2 * vocab));
    both[1] = NULL;
    FAILS(NULL_POINTER, elora_session_decode_batch(both, 2, tokens, logits, 2 * vocab));
    FAILS(NULL_POINTER, elora_session_decode_batch(NULL, 2, tokens, logits, 2 * vocab));
    FAILS(NULL_POINTER, elora_session_decode_batch(both, 1, NULL, logits, vocab));
    FAILS(INSUFFICIENT_SIZE, elora_session_decode_batch(both, 1, tokens, logits, vocab - 1));
    both[1] = session;
    OK(elora_session_reset(session));
    OK(elora_session_set_subnet(session, 1));
    FAILS(INVALID_STATE, elora_session_decode_batch(both, 2, tokens, logits, 2 * vocab));
    CHECK(elora_session_position(out) == 4 && elora_session_position(session) == 0);
    OK(elora_session_decode_batch(NULL, 0, NULL, NULL, 0));

    elora_generate_options g;
    size_t n = UNTOUCHED;
    elora_token made[4] = {-9, -9, -9, -9};
    FAILS(NULL_POINTER, elora_generate_options_init(NULL, sizeof g));
    FAILS(INVALID_ARGUMENT, elora_generate_options_init(&g, 5));
    OK(elora_session_reset(out));
    FAILS(NULL_POINTER, elora_session_generate(NULL, tokens, 2, NULL, NULL, NULL, made, 4, &n));
    FAILS(NULL_POINTER, elora_session_generate(out, NULL, 2, NULL, NULL, NULL, made, 4, &n));
    FAILS(INVALID_ARGUMENT, elora_session_generate(out, tokens, 0, NULL, NULL, NULL, made, 4, &n));
    FAILS(INVALID_ARGUMENT, elora_session_generate(out, tokens, 2, NULL, NULL, NULL, NULL, 4, &n));
    FAILS(CONTEXT_FULL, elora_session_generate(out, tokens, 6, NULL, NULL, NULL, made, 4, &n));
    const double nan = strtod("nan", NULL);
    for (int i = 0; i < 9; i++) {
        OK(elora_generate_options_init(&g, sizeof g));
        switch (i) {
        case 0: g.temperature = -1.0; break;
        case 1: g.temperature = nan; break;
        case 2: g.top_p = 0.0; break;
        case 3: g.top_p = nan; break;
        case 4: g.min_p = 1.0; break;
        case 5: g.n_stop_tokens = (size_t)-1; g.stop_tokens = tokens; break;
        case 6: tokens[5] = -1; g.n_stop_tokens = 6; g.stop_tokens = tokens; break;
        case 7: g.struct_size = 2; break;
        default: g.top_p = 1.5; break;
        }
        FAILS(INVALID_ARGUMENT, elora_session_generate(out, tokens, 2, &g, NULL, NULL, made, 4, &n));
    }
    OK(elora_generate_options_init(&g, sizeof g));
    g.n_stop_tokens = 1;
    FAILS(NULL_POINTER, elora_session_generate(out, tokens, 2, &g, NULL, NULL, made, 4, &n));
    g.n_stop_tokens = 0;
    g.max_new_tokens = 5;
    FAILS(INSUFFICIENT_SIZE, elora_session_generate(out, tokens, 2, &g, NULL, NULL, made, 4, &n));
    CHECK(n == UNTOUCHED && made[0] == -9 && elora_session_position(out) == 0);
    g.max_new_tokens = (size_t)-1;
    g.ignore_stop_tokens = 1;
    OK(elora_session_generate(out, tokens, 2, &g, NULL, NULL, NULL, 0, &n));
    CHECK(n == 4 && elora_session_position(out) == 5);
    free(logits);
    elora_session_free(out);
}

int run_hostile(int argc, char **argv) {
    CHECK(argc == 3);
    texts();
    model = load(argv[0]);
    session = start(model, 0);
    OK(elora_linear_new(model, 0, 0, NULL, &linear));
    vocab = elora_model_vocab_size(model);
    inputs = elora_linear_in_features(linear);
    outputs = elora_linear_out_features(linear);
    options(argv[0]);
    files(argv[0], argv[2]);
    listing(argv[1]);
    parts();
    linears();
    sessions();
    hostile_loop(model, argv[0], argv[1], argv[2]);
    elora_linear_free(linear);
    elora_session_free(session);
    elora_model_free(model);
    return 0;
}
