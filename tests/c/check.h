/* What the test programs share. A check that fails says where and ends the program. */
#ifndef CHECK_H
#define CHECK_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "elastic_lora.h"

#define CHECK(condition)                                                                       \
    do {                                                                                       \
        if (!(condition)) {                                                                    \
            fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition);      \
            exit(1);                                                                           \
        }                                                                                      \
    } while (0)

/* A call that succeeds. */
#define OK(call) expect(ELORA_STATUS_OK, (call), #call, __FILE__, __LINE__)
/* A call that fails with a status, and says why. */
#define FAILS(status, call) expect(ELORA_STATUS_##status, (call), #call, __FILE__, __LINE__)

static inline void expect(elora_status expected, elora_status found, const char *call, const char *file, int line) {
    char text[1024] = "";
    size_t len = 0;
    elora_status copied = elora_last_error(text, sizeof text, &len);
    if (found != expected) {
        fprintf(stderr, "%s:%d: %s: %s (%s), expected %s\n", file, line, call, elora_status_name(found), text,
                elora_status_name(expected));
        exit(1);
    }
    if (expected != ELORA_STATUS_OK && (copied != ELORA_STATUS_OK || len == 0 || len != strlen(text))) {
        fprintf(stderr, "%s:%d: %s: no text\n", file, line, call);
        exit(1);
    }
}

/* Whether the text of the last failure has a word in it. */
static inline int says(const char *word) {
    char text[1024] = "";
    return elora_last_error(text, sizeof text, NULL) == ELORA_STATUS_OK && strstr(text, word) != NULL;
}

static inline void *allocate(size_t bytes) {
    void *memory = malloc(bytes > 0 ? bytes : 1);
    CHECK(memory != NULL);
    return memory;
}

static inline const elora_model *load(const char *path) {
    const elora_model *model = NULL;
    OK(elora_model_load(path, NULL, &model));
    CHECK(model != NULL);
    return model;
}

static inline elora_session *start(const elora_model *model, size_t subnet) {
    elora_session *session = NULL;
    OK(elora_session_new(model, NULL, &session));
    OK(elora_session_set_subnet(session, subnet));
    return session;
}

/* Numbers in -1..1, the same in the Rust test. */
static inline float number(size_t i) {
    return (float)((i * 2654435761u) % 2001) / 1000.0f - 1.0f;
}

/* Parts of hostile in files of their own. */
void hostile_loop(const elora_model *model, const char *path, const char *tokenized, const char *folder);

int run_adapt(int argc, char **argv);
int run_dump(int argc, char **argv);
int run_hostile(int argc, char **argv);
int run_order(int argc, char **argv);
int run_overhead(int argc, char **argv);
int run_panic(int argc, char **argv);
int run_threads(int argc, char **argv);

#endif
