/* What the functions of a caller's own loop must refuse: text, samplers, sessions. Part of hostile. */
#include <math.h>

#include "check.h"

#define UNTOUCHED 12345u

/* The functions that need a tokenizer, on a model without one and on a model with one. */
static void texts(const elora_model *none, const elora_model *with) {
    char buf[512];
    unsigned char piece[64];
    size_t n = UNTOUCHED;
    elora_token token = -7;
    const char *roles[2] = {"user", "assistant"}, *contents[2] = {"a", NULL};
    FAILS(NULL_POINTER, elora_model_special_token(NULL, ELORA_TOKEN_END, &token));
    FAILS(NULL_POINTER, elora_model_special_tokens(NULL, NULL, 0, &n));
    CHECK(elora_model_token_count(NULL) == 0 && says("NULL"));
    CHECK(elora_model_token_count(none) == elora_model_vocab_size(none));
    CHECK(elora_model_notice_count(NULL) == 0);
    FAILS(NULL_POINTER, elora_model_notice(NULL, 0, buf, sizeof buf, &n));
    FAILS(INVALID_ARGUMENT, elora_model_notice(none, elora_model_notice_count(none), buf, sizeof buf, &n));
    CHECK(!elora_model_has_chat_template(NULL) && !elora_model_has_chat_template(none));
    FAILS(NULL_POINTER, elora_model_token_piece(NULL, 1, piece, sizeof piece, &n));
    FAILS(NULL_POINTER, elora_model_apply_chat_template(NULL, roles, contents, 1, true, buf, sizeof buf, &n));
    FAILS(NULL_POINTER, elora_model_apply_chat_template(none, NULL, contents, 1, true, buf, sizeof buf, &n));
    FAILS(NULL_POINTER, elora_model_apply_chat_template(none, roles, contents, 2, true, buf, sizeof buf, &n));
    CHECK(says("contents[1]"));
    FAILS(INVALID_ARGUMENT, elora_model_apply_chat_template(none, roles, contents, (size_t)-1, true, NULL, 0, &n));
    FAILS(NOT_FOUND, elora_model_apply_chat_template(none, roles, contents, 1, true, buf, sizeof buf, &n));
    FAILS(NULL_POINTER, elora_model_apply_chat_template_json(NULL, "[]", NULL, true, buf, sizeof buf, &n));
    FAILS(NULL_POINTER, elora_model_apply_chat_template_json(none, NULL, NULL, true, buf, sizeof buf, &n));
    FAILS(INVALID_FORMAT, elora_model_apply_chat_template_json(none, "[{}", NULL, true, buf, sizeof buf, &n));
    FAILS(INVALID_FORMAT, elora_model_apply_chat_template_json(none, "[]", "{}", true, buf, sizeof buf, &n));
    FAILS(NOT_FOUND, elora_model_apply_chat_template_json(none, "[]", "[]", true, buf, sizeof buf, &n));

    elora_text_options o;
    elora_text *text = NULL;
    FAILS(NULL_POINTER, elora_text_options_init(NULL, sizeof o));
    FAILS(INVALID_ARGUMENT, elora_text_options_init(&o, 3));
    OK(elora_text_options_init(&o, sizeof o));
    CHECK(o.stop_strings == NULL && o.n_stop_strings == 0 && o.show_special == 0);
    FAILS(NULL_POINTER, elora_text_new(NULL, NULL, &text));
    FAILS(NULL_POINTER, elora_text_new(none, NULL, NULL));
    FAILS(NOT_FOUND, elora_text_new(none, NULL, &text));
    elora_text_free(NULL);
    const char *part = buf;
    bool stopped = false;
    FAILS(NULL_POINTER, elora_text_push(NULL, 1, &part, &n, &stopped));
    FAILS(NULL_POINTER, elora_text_finish(NULL, &part, &n));
    CHECK(text == NULL && n == UNTOUCHED && token == -7 && part == buf);
    if (with == NULL) {
        return;
    }
    FAILS(NULL_POINTER, elora_model_special_token(with, ELORA_TOKEN_END, NULL));
    FAILS(INVALID_ARGUMENT, elora_model_special_token(with, 77, &token));
    FAILS(INVALID_ARGUMENT, elora_model_special_token(with, -1, &token));
    FAILS(INSUFFICIENT_SIZE, elora_model_special_tokens(with, NULL, 0, &n));
    CHECK(n > 0 && token == -7);
    FAILS(INVALID_ARGUMENT, elora_model_token_piece(with, -1, piece, sizeof piece, &n));
    FAILS(INVALID_ARGUMENT, elora_model_token_piece(with, INT32_MAX, piece, sizeof piece, &n));
    FAILS(NULL_POINTER, elora_model_token_piece(with, 40, NULL, sizeof piece, &n));
    FAILS(INSUFFICIENT_SIZE, elora_model_token_piece(with, 40, NULL, 0, &n));
    CHECK(n == 1);
    for (int i = 0; i < 5; i++) {
        const char *stops[2] = {"a", ""};
        OK(elora_text_options_init(&o, sizeof o));
        o.stop_strings = stops;
        o.n_stop_strings = 2;
        switch (i) {
        case 0: break;
        case 1: stops[1] = "\xff"; break;
        case 2: o.n_stop_strings = (size_t)-1; break;
        case 3: o.n_stop_strings = 1; o.reserved = 1; break;
        default: o.struct_size = 1; break;
        }
        FAILS(INVALID_ARGUMENT, elora_text_new(with, &o, &text));
    }
    OK(elora_text_options_init(&o, sizeof o));
    o.n_stop_strings = 1;
    FAILS(NULL_POINTER, elora_text_new(with, &o, &text));
    CHECK(text == NULL);
    OK(elora_text_new(with, NULL, &text));
    FAILS(NULL_POINTER, elora_text_push(text, 40, NULL, &n, &stopped));
    FAILS(NULL_POINTER, elora_text_push(text, 40, &part, NULL, &stopped));
    FAILS(INVALID_ARGUMENT, elora_text_push(text, -1, &part, &n, &stopped));
    FAILS(INVALID_ARGUMENT, elora_text_push(text, INT32_MAX, &part, &n, &stopped));
    FAILS(NULL_POINTER, elora_text_finish(text, NULL, &n));
    FAILS(NULL_POINTER, elora_text_finish(text, &part, NULL));
    CHECK(part == buf && !stopped);
    OK(elora_text_push(text, 40, &part, &n, NULL));
    OK(elora_text_finish(text, &part, &n));
    elora_text_free(text);
}

static void samplers(void) {
    elora_sampler_options o;
    elora_sampler *sampler = NULL;
    const elora_token tokens[2] = {1, 2}, wrong[2] = {1, -2};
    float values[2] = {1.0f, 2.0f};
    FAILS(NULL_POINTER, elora_sampler_options_init(NULL, sizeof o));
    FAILS(INVALID_ARGUMENT, elora_sampler_options_init(&o, 7));
    FAILS(NULL_POINTER, elora_sampler_new(NULL, NULL));
    for (int i = 0; i < 14; i++) {
        OK(elora_sampler_options_init(&o, sizeof o));
        o.bias_tokens = tokens;
        o.bias_values = values;
        values[1] = 2.0f;
        switch (i) {
        case 0: o.temperature = -1.0; break;
        case 1: o.temperature = (double)INFINITY; break;
        case 2: o.top_p = 0.0; break;
        case 3: o.min_p = 1.0; break;
        case 4: o.repetition_penalty = 0.0; break;
        case 5: o.repetition_penalty = (double)NAN; break;
        case 6: o.frequency_penalty = (double)NAN; break;
        case 7: o.presence_penalty = (double)INFINITY; break;
        case 8: o.n_bias = 2; values[1] = NAN; break;
        case 9: o.n_bias = 2; values[1] = INFINITY; break;
        case 10: o.n_bias = 2; o.bias_tokens = wrong; break;
        case 11: o.n_bias = (size_t)-1; break;
        case 12: o.reserved = 1; break;
        default: o.struct_size = 0; break;
        }
        FAILS(INVALID_ARGUMENT, elora_sampler_new(&o, &sampler));
    }
    OK(elora_sampler_options_init(&o, sizeof o));
    o.n_bias = 1;
    o.bias_values = values;
    FAILS(NULL_POINTER, elora_sampler_new(&o, &sampler));
    o.bias_tokens = tokens;
    o.bias_values = NULL;
    FAILS(NULL_POINTER, elora_sampler_new(&o, &sampler));
    CHECK(sampler == NULL);
    elora_sampler_free(NULL);
    OK(elora_sampler_new(NULL, &sampler));
    float logits[3] = {0.5f, 2.0f, 1.0f};
    const uint32_t none[1] = {0}, third[1] = {4};
    elora_token token = -7;
    FAILS(NULL_POINTER, elora_sampler_sample(NULL, logits, 3, NULL, 0, &token));
    FAILS(NULL_POINTER, elora_sampler_sample(sampler, NULL, 3, NULL, 0, &token));
    FAILS(NULL_POINTER, elora_sampler_sample(sampler, logits, 3, NULL, 0, NULL));
    FAILS(INVALID_ARGUMENT, elora_sampler_sample(sampler, logits, 0, NULL, 0, &token));
    FAILS(INVALID_ARGUMENT, elora_sampler_sample(sampler, logits, (size_t)-1, NULL, 0, &token));
    FAILS(INVALID_ARGUMENT, elora_sampler_sample(sampler, logits, 3, none, 1, &token));
    FAILS(INVALID_ARGUMENT, elora_sampler_sample(sampler, logits, 3, third, 0, &token));
    FAILS(INVALID_ARGUMENT, elora_sampler_sample(sampler, logits, 2, third, 1, &token));
    FAILS(INVALID_ARGUMENT, elora_sampler_sample(sampler, logits, 3, third, (size_t)-1, &token));
    CHECK(token == -7);
    OK(elora_sampler_sample(sampler, logits, 3, NULL, 99, &token));
    CHECK(token == 1);
    OK(elora_sampler_sample(sampler, logits, 3, third, 1, &token));
    CHECK(token == 2);
    FAILS(NULL_POINTER, elora_sampler_accept(NULL, tokens, 2));
    FAILS(NULL_POINTER, elora_sampler_accept(sampler, NULL, 2));
    FAILS(INVALID_ARGUMENT, elora_sampler_accept(sampler, wrong, 2));
    FAILS(NULL_POINTER, elora_sampler_observe(NULL, tokens, 2));
    FAILS(NULL_POINTER, elora_sampler_observe(sampler, NULL, 2));
    FAILS(INVALID_ARGUMENT, elora_sampler_observe(sampler, wrong, 2));
    FAILS(NULL_POINTER, elora_sampler_reset(NULL));
    OK(elora_sampler_accept(sampler, NULL, 0));
    OK(elora_sampler_reset(sampler));
    elora_sampler_free(sampler);
}

static bool stop_at_once(void *userdata) {
    ++*(size_t *)userdata;
    return true;
}

static void steps(const elora_model *model) {
    const size_t vocab = elora_model_vocab_size(model);
    elora_session *a = start(model, 0), *b = start(model, 1), *c = NULL;
    float *logits = allocate(3 * vocab * sizeof *logits);
    const elora_token tokens[3] = {1, 2, 3}, wrong[2] = {1, -1};
    elora_step s[2];
    FAILS(NULL_POINTER, elora_session_decode_steps(NULL, 1));
    OK(elora_session_decode_steps(NULL, 0));
    for (int i = 0; i < 13; i++) {
        memset(s, 0, sizeof s);
        for (int j = 0; j < 2; j++) {
            s[j].struct_size = sizeof *s;
            s[j].session = j == 0 ? a : b;
            s[j].tokens = tokens;
            s[j].n_tokens = 2;
            s[j].logits = logits + (size_t)j * vocab;
            s[j].logits_len = vocab;
            s[j].n_logits = 1;
        }
        size_t n = 2;
        elora_status expected = ELORA_STATUS_INVALID_ARGUMENT;
        switch (i) {
        case 0: s[0].struct_size = 0; break;
        case 1: s[1].struct_size = 16; break;
        case 2: n = (size_t)-1 / sizeof *s; break;
        case 3: s[1].session = NULL; expected = ELORA_STATUS_NULL_POINTER; break;
        case 4: s[1].session = a; expected = ELORA_STATUS_INVALID_STATE; break;
        case 5: s[1].tokens = NULL; expected = ELORA_STATUS_NULL_POINTER; break;
        case 6: s[1].n_tokens = 0; s[1].n_logits = 0; break;
        case 7: s[1].tokens = wrong; break;
        case 8: s[1].n_logits = 3; s[1].logits_len = 3 * vocab; break;
        case 9: s[1].logits_len = vocab - 1; expected = ELORA_STATUS_INSUFFICIENT_SIZE; break;
        case 10: s[1].logits = NULL; expected = ELORA_STATUS_NULL_POINTER; break;
        case 11: s[1].logits = logits + vocab - 1; break;
        default: s[1].n_tokens = (size_t)-1; break;
        }
        expect(expected, elora_session_decode_steps(s, n), "elora_session_decode_steps", __FILE__, __LINE__);
        CHECK(elora_session_position(a) == 0 && elora_session_position(b) == 0);
    }
    s[1].n_tokens = 2;
    s[1].logits = logits + vocab;
    OK(elora_session_decode_steps(s, 2));
    CHECK(elora_session_position(a) == 2 && elora_session_position(b) == 2);

    FAILS(NULL_POINTER, elora_session_copy(NULL, &c));
    FAILS(NULL_POINTER, elora_session_copy(a, NULL));
    elora_token held[3] = {-9, -9, -9};
    size_t n = UNTOUCHED;
    FAILS(NULL_POINTER, elora_session_tokens(NULL, held, 3, &n));
    FAILS(NULL_POINTER, elora_session_tokens(a, NULL, 3, &n));
    FAILS(INSUFFICIENT_SIZE, elora_session_tokens(a, held, 1, &n));
    CHECK(c == NULL && n == 2 && held[0] == -9);
    OK(elora_session_copy(a, &c));
    OK(elora_session_tokens(c, held, 3, &n));
    CHECK(n == 2 && held[0] == 1 && held[1] == 2 && held[2] == -9);

    FAILS(NULL_POINTER, elora_session_set_draft(NULL, c, 4));
    FAILS(INVALID_ARGUMENT, elora_session_set_draft(a, a, 4));
    FAILS(INVALID_ARGUMENT, elora_session_set_draft(a, c, 0));
    FAILS(INVALID_ARGUMENT, elora_session_set_draft(a, c, 8));
    FAILS(INVALID_ARGUMENT, elora_session_set_draft(a, c, (size_t)-1));
    OK(elora_session_set_draft(a, NULL, 0));
    OK(elora_session_set_draft(a, c, 4));
    FAILS(INVALID_ARGUMENT, elora_session_set_draft(c, a, 4)); /* it has a draft */
    {
        /* The same tokens with a draft, with and without its own handle. */
        elora_session *plain = NULL;
        elora_token one[6] = {0}, other[6] = {0};
        size_t made = 0, again = 0;
        OK(elora_session_copy(c, &plain));
        OK(elora_session_generate(a, tokens, 1, NULL, NULL, NULL, one, 4, &made));
        OK(elora_session_generate(plain, tokens, 1, NULL, NULL, NULL, other, 4, &again));
        CHECK(made == again && memcmp(one, other, sizeof one) == 0);
        elora_session_free(plain);
        OK(elora_session_truncate(a, 2));
        OK(elora_session_set_draft(a, NULL, 0));
    }

    size_t called = 0;
    FAILS(NULL_POINTER, elora_session_set_abort(NULL, stop_at_once, &called));
    OK(elora_session_set_abort(c, stop_at_once, &called));
    FAILS(CANCELLED, elora_session_decode(c, tokens, 3, NULL, 0));
    s[0].session = c;
    FAILS(CANCELLED, elora_session_decode_steps(s, 2));
    CHECK(called > 0 && elora_session_position(c) == 2 && elora_session_position(b) == 2);
    OK(elora_session_set_abort(c, NULL, NULL));
    OK(elora_session_decode(c, tokens, 1, NULL, 0));
    elora_session_free(c);
    elora_session_free(b);
    elora_session_free(a);
    free(logits);
}

static void states(const elora_model *model, const char *folder) {
    char path[1024];
    snprintf(path, sizeof path, "%s/session", folder);
    elora_session *a = start(model, 0), *b = start(model, 1);
    const elora_token tokens[3] = {1, 2, 3};
    OK(elora_session_decode(a, tokens, 3, NULL, 0));
    size_t size = UNTOUCHED;
    FAILS(NULL_POINTER, elora_session_get_state(NULL, NULL, 0, &size));
    FAILS(NULL_POINTER, elora_session_get_state(a, NULL, 0, NULL));
    FAILS(NULL_POINTER, elora_session_get_state(a, NULL, 100, &size));
    CHECK(size == UNTOUCHED);
    FAILS(INSUFFICIENT_SIZE, elora_session_get_state(a, NULL, 0, &size));
    CHECK(size > 100 && size != UNTOUCHED);
    unsigned char *state = allocate(size + 1);
    FAILS(INSUFFICIENT_SIZE, elora_session_get_state(a, state, size - 1, &size));
    OK(elora_session_get_state(a, state, size, &size));
    FAILS(NULL_POINTER, elora_session_set_state(NULL, state, size));
    FAILS(NULL_POINTER, elora_session_set_state(a, NULL, size));
    FAILS(INVALID_ARGUMENT, elora_session_set_state(a, state, (size_t)-1));
    FAILS(INVALID_STATE, elora_session_set_state(b, state, size));
    CHECK(says("subnet"));
    state[size] = 0;
    FAILS(INVALID_FORMAT, elora_session_set_state(a, state, size + 1));
    for (size_t at = 0; at < size; at += 1 + size / 61) {
        FAILS(INVALID_FORMAT, elora_session_set_state(a, state, at));
        state[at] ^= 1;
        FAILS(INVALID_FORMAT, elora_session_set_state(a, state, size));
        state[at] ^= 1;
    }
    CHECK(elora_session_position(a) == 3 && elora_session_position(b) == 0);
    OK(elora_session_reset(a));
    OK(elora_session_set_state(a, state, size));
    CHECK(elora_session_position(a) == 3);
    free(state);

    FAILS(NULL_POINTER, elora_session_save(NULL, path, true));
    FAILS(NULL_POINTER, elora_session_save(a, NULL, true));
    FAILS(IO, elora_session_save(a, "/nowhere/at/all", true));
    FAILS(NULL_POINTER, elora_session_load(NULL, path));
    FAILS(NULL_POINTER, elora_session_load(a, NULL));
    FAILS(IO, elora_session_load(a, "/nowhere/at/all"));
    FAILS(INVALID_FORMAT, elora_session_load(a, folder));
    OK(elora_session_save(a, path, true));
    FAILS(INVALID_FORMAT, elora_session_save(a, path, false));
    FAILS(INVALID_STATE, elora_session_load(b, path));
    OK(elora_session_load(a, path));
    CHECK(remove(path) == 0);
    elora_session_free(b);
    elora_session_free(a);
}

static void adapters(const elora_model *model, const char *folder) {
    const elora_adapter *out = NULL;
    const elora_model *made = NULL;
    elora_session *session = start(model, 0);
    const float scale = 1.0f;
    FAILS(NULL_POINTER, elora_adapter_load(NULL, folder, &out));
    FAILS(NULL_POINTER, elora_adapter_load(model, NULL, &out));
    FAILS(NULL_POINTER, elora_adapter_load(model, folder, NULL));
    FAILS(IO, elora_adapter_load(model, folder, &out));
    FAILS(INVALID_ARGUMENT, elora_adapter_load(model, "\xff", &out));
    CHECK(elora_adapter_retain(NULL) == NULL);
    elora_adapter_free(NULL);
    CHECK(elora_adapter_max_rank(NULL) == 0 && elora_adapter_layer_count(NULL) == 0 && elora_adapter_bytes(NULL) == 0);
    FAILS(NULL_POINTER, elora_session_set_adapters(NULL, &out, &scale, 0));
    FAILS(NULL_POINTER, elora_session_set_adapters(session, NULL, &scale, 1));
    FAILS(NULL_POINTER, elora_session_set_adapters(session, &out, &scale, 1));
    FAILS(INVALID_ARGUMENT, elora_session_set_adapters(session, &out, &scale, (size_t)-1));
    OK(elora_session_set_adapters(session, NULL, NULL, 0));
    FAILS(NULL_POINTER, elora_model_attach_adapter(NULL, NULL, 1.0f, &made));
    FAILS(NULL_POINTER, elora_model_attach_adapter(model, NULL, 1.0f, &made));
    CHECK(out == NULL && made == NULL);
    elora_session_free(session);
}

static void conversions(const elora_model *model) {
    const elora_model *out = NULL;
    elora_convert_options o;
    FAILS(NULL_POINTER, elora_convert_options_init(NULL, sizeof o));
    FAILS(INVALID_ARGUMENT, elora_convert_options_init(&o, 2));
    FAILS(NULL_POINTER, elora_model_convert(NULL, NULL, &out));
    FAILS(NULL_POINTER, elora_model_convert(model, NULL, NULL));
    for (int i = 0; i < 8; i++) {
        OK(elora_convert_options_init(&o, sizeof o));
        o.group_size = 8;
        switch (i) {
        case 0: o.format = 99; break;
        case 1: o.format = ELORA_WEIGHT_FORMAT_AUTO; break;
        case 2: o.bits = 1000; break;
        case 3: o.bits = 5; break;
        case 4: o.embedding_format = ELORA_WEIGHT_FORMAT_OTHER; break;
        case 5: o.head_format = INT32_MIN; break;
        case 6: o.adapter_format = ELORA_WEIGHT_FORMAT_INT; break;
        default: o.format = ELORA_WEIGHT_FORMAT_NM_F16; o.m = 0; break;
        }
        CHECK(elora_model_convert(model, &o, &out) != ELORA_STATUS_OK && out == NULL);
        CHECK(!says("elastic-lora: "));
    }
    OK(elora_convert_options_init(&o, sizeof o));
    o.format = ELORA_WEIGHT_FORMAT_F32;
    o.embedding_format = ELORA_WEIGHT_FORMAT_INT;
    OK(elora_model_convert(model, &o, &out));
    elora_layer_info info;
    info.struct_size = sizeof info;
    OK(elora_model_layer_info(out, 0, &info));
    CHECK(info.format == ELORA_WEIGHT_FORMAT_F32);
    elora_model_free(out);
}

/* Counts the calls, and stops at the third. */
static bool third(void *userdata, size_t done, size_t total) {
    CHECK(done <= total);
    return ++*(size_t *)userdata < 3;
}

static void sources(const char *path, const char *folder) {
    const elora_model *out = NULL;
    elora_model_options o;
    size_t called = 0;
    OK(elora_model_options_init(&o, sizeof o));
    CHECK(o.progress == NULL && o.progress_userdata == NULL);
    o.progress = third;
    o.progress_userdata = &called;
    FAILS(CANCELLED, elora_model_load(path, &o, &out));
    CHECK(called == 3 && out == NULL);

    FILE *in = fopen(path, "rb");
    CHECK(in != NULL && fseek(in, 0, SEEK_END) == 0);
    const size_t size = (size_t)ftell(in);
    CHECK(fseek(in, 0, SEEK_SET) == 0);
    unsigned char *memory = allocate(size + 128);
    unsigned char *aligned = memory + (64 - (uintptr_t)memory % 64) % 64;
    CHECK(fread(aligned, 1, size, in) == size);
    FAILS(NULL_POINTER, elora_model_load_memory(NULL, size, true, NULL, &out));
    FAILS(NULL_POINTER, elora_model_load_memory(aligned, size, true, NULL, NULL));
    FAILS(INVALID_FORMAT, elora_model_load_memory(aligned, 0, true, NULL, &out));
    FAILS(INVALID_FORMAT, elora_model_load_memory(aligned, size - 1, true, NULL, &out));
    FAILS(INVALID_FORMAT, elora_model_load_memory(aligned, 7, false, NULL, &out));
    FAILS(INVALID_ARGUMENT, elora_model_load_memory(aligned, (size_t)-1, true, NULL, &out));
    FAILS(INVALID_ARGUMENT, elora_model_load_memory(aligned + 1, size - 1, false, NULL, &out));
    called = 0;
    FAILS(CANCELLED, elora_model_load_memory(aligned, size, false, &o, &out));
    CHECK(out == NULL);
    OK(elora_model_load_memory(aligned, size, false, NULL, &out));
    OK(elora_model_verify(out));
    elora_model_free(out);
    out = NULL;
    OK(elora_model_load_memory(aligned, size, true, NULL, &out));
    free(memory);
    OK(elora_model_verify(out));
    elora_model_free(out);
    out = NULL;

    const int fd = fileno(in);
    FAILS(INVALID_ARGUMENT, elora_model_load_fd(-1, NULL, &out));
    FAILS(IO, elora_model_load_fd(1000000, NULL, &out));
    FAILS(NULL_POINTER, elora_model_load_fd(fd, NULL, NULL));
    CHECK(out == NULL);
    OK(elora_model_options_init(&o, sizeof o));
    for (uint32_t map = 0; map < 2; map++) {
        o.use_mmap = map;
        OK(elora_model_load_fd(fd, &o, &out));
        OK(elora_model_verify(out));
        elora_model_free(out);
        out = NULL;
    }
    CHECK(fclose(in) == 0);

    /* Files of other kinds are called what they are. */
    static const struct {
        const char *content, *kind;
    } others[] = {
        {"#include <stdio.h>\nint main(void)", "a text file"},
        {"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"},
        {"PK\x03\x04 and more of a zip archive", "a ZIP archive"},
    };
    char other[1024];
    snprintf(other, sizeof other, "%s/other", folder);
    for (size_t i = 0; i < sizeof others / sizeof *others; i++) {
        FILE *file = fopen(other, "wb");
        CHECK(file != NULL && fputs(others[i].content, file) >= 0 && fclose(file) == 0);
        FAILS(INVALID_FORMAT, elora_model_load(other, NULL, &out));
        CHECK(says(others[i].kind) && says("other"));
    }
    CHECK(remove(other) == 0);
}

/* A value that is missing and a group that is not there have their own texts. */
static void subnets(const elora_model *model) {
    elora_session *session = start(model, 0);
    FAILS(NOT_FOUND, elora_session_set_subnet_json(session, "{}"));
    CHECK(says("no value for group"));
    FAILS(NOT_FOUND, elora_session_set_subnet_json(session, "{\"nothing\": 1}"));
    CHECK(says("no group `nothing`"));
    elora_session_free(session);
}

void hostile_loop(const elora_model *model, const char *path, const char *tokenized, const char *folder) {
    const elora_model *with = strcmp(tokenized, "-") == 0 ? NULL : load(tokenized);
    texts(model, with);
    samplers();
    steps(model);
    states(model, folder);
    adapters(model, folder);
    conversions(model);
    sources(path, folder);
    subnets(model);
    elora_model_free(with);
}
