/* panic MODEL: a bug inside becomes a status, and the program goes on. The hooks are only in the library that the
 * tests build. */
#include "check.h"

elora_status elora_test_panic(void);
elora_status elora_test_panic_in_session(elora_session *session);

int run_panic(int argc, char **argv) {
    CHECK(argc == 1);
    FAILS(PANIC, elora_test_panic());
    CHECK(says("elora_test_panic"));
    const elora_model *model = load(argv[0]);
    elora_session *session = start(model, 0), *other = start(model, 0);
    const elora_token token = 1;
    OK(elora_session_decode(session, &token, 1, NULL, 0));
    FAILS(PANIC, elora_test_panic_in_session(session));
    /* This session is over; the model and its other sessions are not. */
    FAILS(INVALID_STATE, elora_session_decode(session, &token, 1, NULL, 0));
    CHECK(says("PANIC"));
    FAILS(INVALID_STATE, elora_session_reset(session));
    CHECK(elora_session_position(session) == 0);
    OK(elora_session_decode(other, &token, 1, NULL, 0));
    elora_session *both[2];
    both[0] = other;
    both[1] = session;
    const elora_token tokens[2] = {1, 2};
    FAILS(INVALID_STATE, elora_session_decode_batch(both, 2, tokens, NULL, 0));
    /* The first of the batch was not touched. */
    CHECK(elora_session_position(other) == 1);
    OK(elora_session_decode_batch(both, 1, tokens, NULL, 0));
    FAILS(NULL_POINTER, elora_test_panic_in_session(NULL));
    elora_session_free(session);
    elora_session_free(other);
    elora_model_free(model);
    return 0;
}
