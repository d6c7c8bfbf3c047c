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

void hostile_loop(const elora_model *model, const char *tokenized) {
    const elora_model *with = strcmp(tokenized, "-") == 0 ? NULL : load(tokenized);
    texts(model, with);
    samplers();
    elora_model_free(with);
}
