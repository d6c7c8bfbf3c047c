/* Continues a text, or a list of tokens, with a model.
 *
 *     generate MODEL PROMPT [SUBNET [TEMPERATURE [SEED]]]
 *
 * MODEL is a bundle or a Hugging Face folder. If it has no tokenizer, PROMPT is a list of token ids,
 * such as 1,17,5. */
#include <stdio.h>
#include <stdlib.h>

#include "elastic_lora.h"

enum { MAX_NEW = 64 };

static void check(elora_status status, const char *what) {
    if (status != ELORA_STATUS_OK) {
        char text[1024] = "";
        elora_last_error(text, sizeof text, NULL);
        fprintf(stderr, "%s: %s: %s\n", what, elora_status_name(status), text);
        exit(1);
    }
}

/* Prints each new token: its text, or its id if the model has no tokenizer. */
static bool show(void *userdata, elora_token token) {
    elora_text *text = userdata;
    if (text == NULL) {
        printf(" %d", (int)token);
    } else {
        const char *part = NULL;
        size_t len = 0;
        if (elora_text_push(text, token, &part, &len, NULL) != ELORA_STATUS_OK) {
            return false;
        }
        fwrite(part, 1, len, stdout);
    }
    fflush(stdout);
    return true;
}

/* Parses token ids, such as "1,17,5". */
static size_t parse(const char *list, elora_token *tokens, size_t cap) {
    size_t n = 0;
    while (n < cap) {
        char *end = NULL;
        tokens[n++] = (elora_token)strtol(list, &end, 10);
        if (end == list || (*end != ',' && *end != '\0')) {
            fprintf(stderr, "PROMPT must be token ids, as in 1,17,5: the model has no tokenizer\n");
            exit(2);
        }
        if (*end == '\0') {
            break;
        }
        list = end + 1;
    }
    return n;
}

int main(int argc, char **argv) {
    if (argc < 3 || argc > 6) {
        fprintf(stderr, "usage: generate MODEL PROMPT [SUBNET [TEMPERATURE [SEED]]]\n");
        return 2;
    }
    if (elora_abi_version() != ELORA_ABI_VERSION) {
        fprintf(stderr, "the library %s has another binary interface than this program\n", elora_version());
        return 1;
    }
    const elora_model *model = NULL;
    check(elora_model_load(argv[1], NULL, &model), argv[1]);
    elora_session *session = NULL;
    check(elora_session_new(model, NULL, &session), "elora_session_new");
    if (argc > 3) {
        check(elora_session_set_subnet_named(session, argv[3]), "SUBNET");
    }

    size_t n_prompt = 0;
    elora_token *prompt = NULL;
    if (elora_model_has_tokenizer(model)) {
        elora_status status = elora_model_tokenize(model, argv[2], ELORA_SPECIAL_PROMPT, NULL, 0, &n_prompt);
        if (status != ELORA_STATUS_INSUFFICIENT_SIZE) {
            check(status, "elora_model_tokenize");
        }
        prompt = calloc(n_prompt + 1, sizeof *prompt);
        if (prompt != NULL) {
            check(elora_model_tokenize(model, argv[2], ELORA_SPECIAL_PROMPT, prompt, n_prompt, NULL), "PROMPT");
        }
    } else {
        const size_t cap = elora_model_context_size(model);
        prompt = calloc(cap, sizeof *prompt);
        if (prompt != NULL) {
            n_prompt = parse(argv[2], prompt, cap);
        }
    }
    if (prompt == NULL) {
        fprintf(stderr, "no memory\n");
        return 1;
    }

    elora_generate_options options;
    check(elora_generate_options_init(&options, sizeof options), "elora_generate_options_init");
    options.max_new_tokens = MAX_NEW;
    if (argc > 4) {
        options.temperature = strtod(argv[4], NULL);
    }
    if (argc > 5) {
        options.seed = strtoull(argv[5], NULL, 10);
    }
    elora_text *text = NULL;
    if (elora_model_has_tokenizer(model)) {
        check(elora_text_new(model, NULL, &text), "elora_text_new");
    }
    elora_token tokens[MAX_NEW];
    size_t n = 0;
    check(elora_session_generate(session, prompt, n_prompt, &options, show, text, tokens, MAX_NEW, &n),
          "elora_session_generate");
    if (text != NULL) {
        const char *part = NULL;
        size_t len = 0;
        check(elora_text_finish(text, &part, &len), "elora_text_finish");
        fwrite(part, 1, len, stdout);
    }
    printf("\n%zu tokens\n", n);
    elora_text_free(text);
    free(prompt);
    elora_session_free(session);
    elora_model_free(model);
    return 0;
}
