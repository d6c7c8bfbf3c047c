/* elastic_lora.h: C and C++ interface for running models that were compressed with elastic low-rank
 * adapters. Generated from src/ffi; do not edit.
 *
 * Prints the most likely token after a prompt (each call returns ELORA_STATUS_OK on success):
 *
 *     const elora_model *model = NULL;
 *     elora_session *session = NULL;
 *     elora_token prompt[64], next[1];
 *     size_t n = 0;
 *     elora_model_load("model.elora", NULL, &model);
 *     elora_session_new(model, NULL, &session);
 *     elora_model_tokenize(model, "Once upon a", ELORA_SPECIAL_PROMPT, prompt, 64, &n);
 *     elora_session_generate(session, prompt, n, NULL, NULL, NULL, next, 1, &n);
 *     printf("%d\n", n > 0 ? (int)next[0] : -1);
 *     elora_session_free(session), elora_model_free(model);
 *
 * The sections of this file: statuses and errors; models; conversion and other sources; text;
 * sessions; batches, copies and states; samplers and adapters; parts for an engine of your own.
 * docs/c-and-cpp.md describes building, linking and the rules; elastic_lora.hpp wraps it for C++.
 *
 * Handles are opaque. A `const` handle (elora_model, elora_linear, elora_adapter) is immutable and
 * reference-counted; any number of threads may use it at once. A handle without `const`
 * (elora_session, elora_sampler, elora_text) may be used by one thread at a time. A handle keeps
 * alive what it needs of the handles from which it was made, so handles may be freed in any order.
 * Every function that frees a handle accepts NULL.
 *
 * A function that can fail returns an elora_status, which is 0 on success. On failure it stores an
 * error text for the calling thread; see elora_last_error(). Results are written only on success,
 * unless the function's comment states otherwise. A function that returns a value instead returns
 * 0, false or NULL on failure, and stores an error text too.
 *
 * No function throws, unwinds into the caller, ends the process, or prints. A panic, which is a bug
 * in the library, is the exception: it becomes ELORA_STATUS_PANIC and prints a message to the
 * standard error stream.
 *
 * Strings are UTF-8 and end in a NUL. A buffer is a pointer and a number of elements; the pointer
 * may be NULL if the number is 0. Other pointers must not be NULL, unless the function's comment
 * allows it. The memory behind a pointer must be valid for the whole call, aligned for its type,
 * and not be written by another thread during the call. Matrices are row-major.
 *
 * Structs of options and descriptions begin with their own size, so that later versions can add
 * fields. Set struct_size to sizeof of the struct; the _init function of an options struct does so.
 * In an options struct, a field that this version of the library does not know must be 0; otherwise
 * the call fails with ELORA_STATUS_UNSUPPORTED. In a description, such a field is set to 0. */

#ifndef ELASTIC_LORA_H
#define ELASTIC_LORA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// --- Versions, statuses and error texts --------------------------------------------------------------

// Major version of the library that this header belongs to.
#define ELORA_VERSION_MAJOR 0

// Minor version of the library that this header belongs to.
#define ELORA_VERSION_MINOR 1

// Patch version of the library that this header belongs to.
#define ELORA_VERSION_PATCH 0

// Version of the binary interface. Within a version, functions, constants and types are only added,
// and structs only grow at their end: a program runs with any library of the same version that is
// at least as new as its header. Compare it with elora_abi_version().
#define ELORA_ABI_VERSION 1

// Outcome of a call: ELORA_STATUS_OK or another ELORA_STATUS_ constant. Numbers are never reused.
// Treat an unknown number as a failure.
typedef int32_t elora_status;

// Success.
#define ELORA_STATUS_OK 0

// A pointer that must not be NULL is NULL.
#define ELORA_STATUS_NULL_POINTER 1

// An argument is out of its range: a size, an index, an enumerator, a string that is not UTF-8, or
// buffers that overlap.
#define ELORA_STATUS_INVALID_ARGUMENT 2

// A buffer is too short for its contents.
#define ELORA_STATUS_INSUFFICIENT_SIZE 3

// The operating system could not read or write a file.
#define ELORA_STATUS_IO 4

// A file is damaged or does not have the expected format.
#define ELORA_STATUS_INVALID_FORMAT 5

// The file or request is valid, but this library does not support it.
#define ELORA_STATUS_UNSUPPORTED 6

// No item has the given name.
#define ELORA_STATUS_NOT_FOUND 7

// The handle's state does not allow this call, such as changing the subnet of a session that holds
// tokens.
#define ELORA_STATUS_INVALID_STATE 8

// The caller's callback stopped the call.
#define ELORA_STATUS_CANCELLED 9

// The session has no room for the tokens.
#define ELORA_STATUS_CONTEXT_FULL 10

// Memory could not be allocated.
#define ELORA_STATUS_OUT_OF_MEMORY 11

// A bug in the library. The process continues. Free the handle that was used and do not use it
// otherwise; a session refuses further calls with ELORA_STATUS_INVALID_STATE.
#define ELORA_STATUS_PANIC 100

// Name of a status, such as "ELORA_STATUS_OK", or "unknown status" for a number that this library
// does not know. The string is static and never NULL.
const char *elora_status_name(elora_status status);

// Copies the error text of this thread's last failed call, with a terminating NUL, to `buf`, a
// buffer of `cap` bytes. Writes the length of the text without the NUL to `*len`. The text is
// empty before the first failure. Calls that succeed do not change it, and neither does this one.
//
// `buf` may be NULL if `cap` is 0, and `len` may be NULL. ELORA_STATUS_INSUFFICIENT_SIZE if `cap`
// is less than the length plus 1; then only `*len` is written.
elora_status elora_last_error(char *buf, size_t cap, size_t *len);

// ELORA_ABI_VERSION of the linked library. A program must stop if it differs from the header's
// ELORA_ABI_VERSION.
uint32_t elora_abi_version(void);

// Version of the linked library, such as "0.1.0". The string is static and never NULL.
const char *elora_version(void);



// --- Models: loading, listing, subnets, saving -------------------------------------------------------

// A model: weights, adapters, subnets and tokenizer. Immutable and reference-counted: any number
// of threads may use it at once.
typedef struct elora_model elora_model;

// When the checksums in a bundle are verified; one of the ELORA_VERIFY_ constants. In every mode,
// indices stored in a weight are bounds-checked before its first use, so a corrupt file cannot
// cause out-of-bounds access.
typedef int32_t elora_verify;

// Callback that reports progress: `done` of `total` steps are done. `userdata` is the pointer that
// was given with the callback. Return false to stop the work, which then returns
// ELORA_STATUS_CANCELLED. The callback runs on the thread that called the function.
typedef bool (*elora_progress_fn)(void *userdata, size_t done, size_t total);

// Options for loading a model. Initialize them with elora_model_options_init(), then set fields.
typedef struct elora_model_options {
    // sizeof(elora_model_options); elora_model_options_init() sets it.
    size_t struct_size;
    // Number of threads that work on one call, including the calling thread; at most 4096. 0 uses
    // one per core. If several calls run at the same time, one of them uses the additional threads
    // and the others run on their calling threads alone. Default: 0.
    uint32_t n_threads;
    // If not 0, files are memory-mapped, and must not change as long as the model is alive. If 0,
    // files are read into memory. Default: 1.
    uint32_t use_mmap;
    // When checksums are verified: an ELORA_VERIFY_ constant. Default: ELORA_VERIFY_ON_USE.
    elora_verify verify;
    // Must be 0.
    uint32_t reserved;
    // Is called for each layer that is loaded; NULL for none. Default: NULL.
    elora_progress_fn progress;
    // Is passed to progress. Default: NULL.
    void *progress_userdata;
} elora_model_options;

// Storage format of a weight; one of the ELORA_WEIGHT_FORMAT_ constants.
typedef int32_t elora_weight_format;

// Description of a linear layer of a model, with the sizes of the whole model.
typedef struct elora_layer_info {
    // Set it to sizeof(elora_layer_info) before the call.
    size_t struct_size;
    // Hugging Face's module path, such as "model.layers.0.self_attn.q_proj"; "lm_head" for the
    // head. The string is valid as long as the model is alive.
    const char *name;
    // Number of input features.
    size_t in_features;
    // Number of output features.
    size_t out_features;
    // Largest rank of the adapter; 0 without an adapter.
    size_t max_rank;
    // Size of the weight in bytes, without the adapter. A head that shares the embedding reports
    // the embedding's size.
    size_t weight_bytes;
    // Size of the adapter in bytes; 0 without an adapter.
    size_t adapter_bytes;
    // Number of columns (input features) that share a scale, for integer formats. 0 if a row has
    // one scale, and for formats without scales.
    size_t group_size;
    // Storage format of the weight: an ELORA_WEIGHT_FORMAT_ constant.
    elora_weight_format format;
    // Bits of a stored weight, such as 4 or 16.
    uint32_t bits;
    // 1 if the layer has a bias, otherwise 0.
    uint32_t has_bias;
    // Reserved; 0.
    uint32_t reserved;
} elora_layer_info;

// Id of a token, from 0 to elora_model_vocab_size() - 1.
typedef int32_t elora_token;

// Each weight is verified when it is first used, so loading reads no weights.
#define ELORA_VERIFY_ON_USE 0

// All weights are verified when the model is loaded.
#define ELORA_VERIFY_ON_LOAD 1

// Checksums are not verified. Bounds are checked in this mode too.
#define ELORA_VERIFY_NEVER 2

// Dense, 32-bit floats.
#define ELORA_WEIGHT_FORMAT_F32 0

// Dense, IEEE 754 half precision.
#define ELORA_WEIGHT_FORMAT_F16 1

// Dense, bfloat16.
#define ELORA_WEIGHT_FORMAT_BF16 2

// Dense integers of a few bits, with one scale for each group of columns.
#define ELORA_WEIGHT_FORMAT_INT 3

// Sparse: a bitmask of the nonzero weights, and their values in half precision.
#define ELORA_WEIGHT_FORMAT_SPARSE_F16 4

// Sparse: a bitmask of the nonzero weights, and their values in bfloat16.
#define ELORA_WEIGHT_FORMAT_SPARSE_BF16 5

// Sparse: a bitmask of the nonzero weights, and their values as 4-bit integers, with one scale for
// each group of columns.
#define ELORA_WEIGHT_FORMAT_SPARSE_INT 6

// N:M sparse, with at most N nonzero weights in each group of M: a bitmask of the nonzero weights,
// and their values in half precision.
#define ELORA_WEIGHT_FORMAT_NM_F16 7

// N:M sparse, with at most N nonzero weights in each group of M: a bitmask of the nonzero weights,
// and their values in bfloat16.
#define ELORA_WEIGHT_FORMAT_NM_BF16 8

// A format that this version of the header has no constant for.
#define ELORA_WEIGHT_FORMAT_OTHER 1000

// Sets every field of `*options` to its default. `struct_size` is sizeof(elora_model_options).
elora_status elora_model_options_init(struct elora_model_options *options, size_t struct_size);

// Loads a model from a bundle file, a Hugging Face folder (dense, GPTQ, AWQ or compressed-tensors)
// or a GGUF file.
//
// `path` is the file or folder. `options` may be NULL for the defaults. On success `*out` is a new
// handle; release it with elora_model_free().
elora_status elora_model_load(const char *path,
                              const struct elora_model_options *options,
                              const struct elora_model **out);

// Adds a reference to a model and returns the same pointer. Each reference is released with
// elora_model_free(). Returns NULL if `model` is NULL.
const struct elora_model *elora_model_retain(const struct elora_model *model);

// Releases one reference to a model. NULL is ignored. Layers and sessions keep alive what they
// need of the model, so handles may be freed in any order.
void elora_model_free(const struct elora_model *model);

// Writes the model to the file `path` as a bundle. The data is written under a temporary name
// first and then moved into place. If the file exists, it is replaced if `overwrite` is true;
// otherwise the call fails with ELORA_STATUS_INVALID_FORMAT.
elora_status elora_model_save(const struct elora_model *model, const char *path, bool overwrite);

// Reads and checks all weights, and verifies their checksums if the model came from a bundle.
// ELORA_STATUS_INVALID_FORMAT if a weight is damaged; the error text names the first one.
elora_status elora_model_verify(const struct elora_model *model);

// Extracts a subnet as a model of its own, with only the active ranks, channels and blocks. The
// new model computes what the original computes under that subnet.
//
// Weights keep their formats, and adapters stay separate; elora_model_merge() adds them to dense
// weights. `subnet` is an index below elora_model_subnet_count(). On success `*out` is a new
// handle, independent of `model`; release it with elora_model_free().
elora_status elora_model_extract(const struct elora_model *model, size_t subnet, const struct elora_model **out);

// Adds the adapters, at their largest ranks, to the weights. The result is a model without
// adapters and with the whole model as its only subnet. To merge another subnet, call
// elora_model_extract() first.
//
// On success `*out` is a new handle, independent of `model`; release it with elora_model_free().
// ELORA_STATUS_INVALID_STATE if a weight with an adapter is sparse or quantized; the error text
// names the layer.
elora_status elora_model_merge(const struct elora_model *model, const struct elora_model **out);

// Number of linear layers: those of the blocks in order of computation, followed by the head.
// Returns 0 if `model` is NULL.
size_t elora_model_layer_count(const struct elora_model *model);

// Describes layer `layer`, an index below elora_model_layer_count(). Set `info->struct_size`
// before the call.
elora_status elora_model_layer_info(const struct elora_model *model, size_t layer, struct elora_layer_info *info);

// Writes the index of the layer with this name to `*layer`. ELORA_STATUS_NOT_FOUND if there is
// none.
elora_status elora_model_find_layer(const struct elora_model *model, const char *name, size_t *layer);

// Number of named subnets. Subnet 0 always exists and is the whole model. Returns 0 if `model` is
// NULL.
size_t elora_model_subnet_count(const struct elora_model *model);

// Name of a subnet. The string is valid as long as the model is alive. Returns NULL if there is no
// such subnet, or if `model` is NULL.
const char *elora_model_subnet_name(const struct elora_model *model, size_t subnet);

// Writes the index of the subnet with this name to `*subnet`. ELORA_STATUS_NOT_FOUND if there is
// none.
elora_status elora_model_find_subnet(const struct elora_model *model, const char *name, size_t *subnet);

// Copies the model's search space to `buf` as JSON: the groups of layers that share a choice, and
// the values that each group may take. `buf`, `cap` and `len` are as in elora_last_error().
// ELORA_STATUS_NOT_FOUND if the model has no search space.
elora_status elora_model_space_json(const struct elora_model *model, char *buf, size_t cap, size_t *len);

// Number of tokens in the vocabulary, which is the number of logits per token. Returns 0 if
// `model` is NULL.
size_t elora_model_vocab_size(const struct elora_model *model);

// Largest number of tokens in a session on this model. Returns 0 if `model` is NULL.
size_t elora_model_context_size(const struct elora_model *model);

// Size of all weights in bytes, including the embedding, the adapters and the head, but not the
// norms and biases. Returns 0 if `model` is NULL.
size_t elora_model_weight_bytes(const struct elora_model *model);

// Copies the tokens that end a generation to `tokens`, a buffer of `cap` elements, and writes
// their number to `*n`. `tokens` may be NULL if `cap` is 0, and `n` may be NULL.
// ELORA_STATUS_INSUFFICIENT_SIZE if there are more than `cap` tokens; then only `*n` is written.
elora_status elora_model_stop_tokens(const struct elora_model *model, elora_token *tokens, size_t cap, size_t *n);



// --- Other formats, and loading from memory or a file descriptor -------------------------------------

// How a model is stored. Initialize it with elora_convert_options_init(), then set fields.
typedef struct elora_convert_options {
    // sizeof(elora_convert_options); elora_convert_options_init() sets it.
    size_t struct_size;
    // Number of columns that share a scale, for integer formats; 0 for one scale for each row. Codes
    // that are stored already keep their groups, which must be these. Default: 128.
    size_t group_size;
    // Format of the linear layers in the blocks: an ELORA_WEIGHT_FORMAT_ constant. Default:
    // ELORA_WEIGHT_FORMAT_INT.
    elora_weight_format format;
    // Bits of a weight in ELORA_WEIGHT_FORMAT_INT: 2, 3, 4 or 8. Default: 4.
    uint32_t bits;
    // If not 0, integers have no zero point. Default: 0.
    uint32_t symmetric;
    // N of N:M, for the N:M formats. Default: 2.
    uint32_t n;
    // M of N:M. Default: 4.
    uint32_t m;
    // Format of the embedding, and of a head that shares it. ELORA_WEIGHT_FORMAT_AUTO for floats of
    // 16 bits, or of 32 if format is ELORA_WEIGHT_FORMAT_F32. Default: ELORA_WEIGHT_FORMAT_AUTO.
    elora_weight_format embedding_format;
    // Bits of the embedding in ELORA_WEIGHT_FORMAT_INT. Default: 8.
    uint32_t embedding_bits;
    // Format of a head of its own. ELORA_WEIGHT_FORMAT_AUTO as above. Default:
    // ELORA_WEIGHT_FORMAT_AUTO.
    elora_weight_format head_format;
    // Bits of the head in ELORA_WEIGHT_FORMAT_INT. Default: 8.
    uint32_t head_bits;
    // Format of the adapters: ELORA_WEIGHT_FORMAT_F32, _F16, _BF16 or _AUTO. Default:
    // ELORA_WEIGHT_FORMAT_AUTO.
    elora_weight_format adapter_format;
} elora_convert_options;

// Stands for the format that fits that of the linear layers.
#define ELORA_WEIGHT_FORMAT_AUTO -1

// Sets every field of `*options` to its default. `struct_size` is sizeof(elora_convert_options).
elora_status elora_convert_options_init(struct elora_convert_options *options, size_t struct_size);

// Makes a model whose weights are stored in other formats; elora_model_save() writes it as a
// bundle. Floats are rounded to nearest; integers that are stored already keep their values between
// dense and sparse storage. Adapters stay separate. `options` may be NULL for the defaults, which
// are 4-bit integers. On success `*out` is a new handle, independent of `model`; release it with
// elora_model_free().
//
// ELORA_STATUS_UNSUPPORTED if integers would have to change to another grid, or if a format cannot
// hold the weights; the error text names the tensor.
elora_status elora_model_convert(const elora_model *model,
                                 const struct elora_convert_options *options,
                                 const elora_model **out);

// Loads a model from a bundle of `size` bytes in memory. If `copy` is true, the bytes are copied.
// Otherwise they are used in place: they must begin at a multiple of 64, and must stay as they are
// as long as the model, or a layer, session or model that was made of it, is alive.
//
// `options` and `out` are as in elora_model_load(); use_mmap has no effect.
elora_status elora_model_load_memory(const void *bytes,
                                     size_t size,
                                     bool copy,
                                     const elora_model_options *options,
                                     const elora_model **out);

// Loads a model from a bundle that is open as the file descriptor `fd`: a regular file that can be
// read. It stays open, and its position may change. `options` and `out` are as in
// elora_model_load(). ELORA_STATUS_UNSUPPORTED where there are no file descriptors.
elora_status elora_model_load_fd(int32_t fd, const elora_model_options *options, const elora_model **out);



// --- Text: tokens, special tokens, chat templates, text while tokens come ----------------------------

// Special tokens that the tokenizer adds to a text; one of the ELORA_SPECIAL_ constants.
typedef int32_t elora_special;

// No special tokens.
#define ELORA_SPECIAL_NONE 0

// The special tokens that begin a text, for a text that will be continued.
#define ELORA_SPECIAL_PROMPT 1

// The special tokens that begin and end a text, for a complete text.
#define ELORA_SPECIAL_FULL 2

// Whether the model has a tokenizer. Returns false if `model` is NULL.
bool elora_model_has_tokenizer(const elora_model *model);

// Converts a text to tokens. Writes them to `tokens`, a buffer of `cap` elements, and their number
// to `*n`. `special` is an ELORA_SPECIAL_ constant. `tokens` may be NULL if `cap` is 0, and `n`
// may be NULL.
//
// ELORA_STATUS_INSUFFICIENT_SIZE if there are more than `cap` tokens; then only `*n` is written.
// ELORA_STATUS_NOT_FOUND if the model has no tokenizer.
elora_status elora_model_tokenize(const elora_model *model,
                                  const char *text,
                                  elora_special special,
                                  elora_token *tokens,
                                  size_t cap,
                                  size_t *n);

// Converts `n_tokens` tokens to text, without special tokens, and copies it to `buf`. `buf`, `cap`
// and `len` are as in elora_last_error(). ELORA_STATUS_NOT_FOUND if the model has no tokenizer.
//
// A character may consist of several tokens. To show text while it is generated, use
// elora_text_push().
elora_status elora_model_detokenize(const elora_model *model,
                                    const elora_token *tokens,
                                    size_t n_tokens,
                                    char *buf,
                                    size_t cap,
                                    size_t *len);


// A text that is made of tokens while they come, and ends at stop strings. Mutable: it may be used
// by one thread at a time.
typedef struct elora_text elora_text;

// A token with a role; one of the ELORA_TOKEN_ constants.
typedef int32_t elora_token_role;

// Options of a text. Initialize them with elora_text_options_init(), then set fields.
typedef struct elora_text_options {
    // sizeof(elora_text_options); elora_text_options_init() sets it.
    size_t struct_size;
    // Strings that end the text; they are not part of it. None may be empty. May be NULL if
    // n_stop_strings is 0. The strings are copied. Default: NULL.
    const char *const *stop_strings;
    // Number of elements of stop_strings. Default: 0.
    size_t n_stop_strings;
    // If not 0, special tokens are written by their names; otherwise they are left out. Default: 0.
    uint32_t show_special;
    // Must be 0.
    uint32_t reserved;
} elora_text_options;

// The token that begins a text.
#define ELORA_TOKEN_BEGIN 0

// The token that ends a text.
#define ELORA_TOKEN_END 1

// The token that ends a turn of the model in a conversation, as the chat template writes it.
#define ELORA_TOKEN_END_OF_TURN 2

// Writes the token with a role to `*token`. `role` is an ELORA_TOKEN_ constant.
// ELORA_STATUS_NOT_FOUND if the model has no such token.
elora_status elora_model_special_token(const elora_model *model, elora_token_role role, elora_token *token);

// Copies all special tokens to `tokens`, a buffer of `cap` elements, in ascending order, and writes
// their number to `*n`. `tokens` may be NULL if `cap` is 0, and `n` may be NULL.
// ELORA_STATUS_INSUFFICIENT_SIZE if there are more than `cap`; then only `*n` is written.
elora_status elora_model_special_tokens(const elora_model *model, elora_token *tokens, size_t cap, size_t *n);

// Number of tokens that may be drawn: logits from there on stand for no token, because many
// vocabularies are padded. At most elora_model_vocab_size(), and the number of logits to pass to
// elora_sampler_sample(). Returns 0 if `model` is NULL.
size_t elora_model_token_count(const elora_model *model);

// Copies the bytes that a token adds to a text, after other tokens, to `buf`, a buffer of `cap`
// bytes, and writes their number to `*n`. There is no NUL at the end. They may be a part of a
// character. Special tokens have their names, and ids that stand for no token have no bytes. `buf`
// may be NULL if `cap` is 0, and `n` may be NULL. ELORA_STATUS_INSUFFICIENT_SIZE if there are more
// than `cap` bytes; then only `*n` is written.
elora_status elora_model_token_piece(const elora_model *model, elora_token token, uint8_t *buf, size_t cap, size_t *n);

// Number of notices: sentences about what is stored in the model's files and not used, or used in
// another way than the files say. Returns 0 if `model` is NULL.
size_t elora_model_notice_count(const elora_model *model);

// Copies notice `index`, below elora_model_notice_count(), to `buf`. `buf`, `cap` and `len` are as
// in elora_last_error().
elora_status elora_model_notice(const elora_model *model, size_t index, char *buf, size_t cap, size_t *len);

// Whether the model has a chat template. Returns false if `model` is NULL.
bool elora_model_has_chat_template(const elora_model *model);

// Writes a conversation as one text, as the model was trained to read it, and copies it to `buf`.
// `roles` and `contents` have `n_messages` elements each; usual roles are "system", "user" and
// "assistant". If `add_generation_prompt` is true, the text ends where the model's answer begins.
// `buf`, `cap` and `len` are as in elora_last_error().
//
// The text holds the special tokens: pass it to elora_model_tokenize() with ELORA_SPECIAL_NONE.
//
// ELORA_STATUS_NOT_FOUND if the model has no chat template. ELORA_STATUS_INVALID_FORMAT if the
// template refuses the conversation; many want the roles to alternate.
elora_status elora_model_apply_chat_template(const elora_model *model,
                                             const char *const *roles,
                                             const char *const *contents,
                                             size_t n_messages,
                                             bool add_generation_prompt,
                                             char *buf,
                                             size_t cap,
                                             size_t *len);

// Same as elora_model_apply_chat_template(), for conversations with more than text: `messages` is a
// JSON array of objects as in OpenAI's API (role, content, tool_calls, ...), and `tools` a JSON
// array of the tools' schemas, or NULL for none.
elora_status elora_model_apply_chat_template_json(const elora_model *model,
                                                  const char *messages,
                                                  const char *tools,
                                                  bool add_generation_prompt,
                                                  char *buf,
                                                  size_t cap,
                                                  size_t *len);

// Sets every field of `*options` to its default. `struct_size` is sizeof(elora_text_options).
elora_status elora_text_options_init(struct elora_text_options *options, size_t struct_size);

// Creates an empty text for tokens of a model. `options` may be NULL for the defaults. On success
// `*out` is a new handle; release it with elora_text_free(). ELORA_STATUS_NOT_FOUND if the model
// has no tokenizer.
elora_status elora_text_new(const elora_model *model,
                            const struct elora_text_options *options,
                            struct elora_text **out);

// Frees a text. NULL is ignored. No other thread may be using it.
void elora_text_free(struct elora_text *text);

// Adds a token. Writes the text that can be shown now to `*part` and its length in bytes to `*len`.
// It is whole characters, without a NUL at the end; it may be empty, and it is valid until the next
// call with this text. Characters of several tokens come with their last token, and text that may
// be the beginning of a stop string comes once that is known.
//
// If `stopped` is not NULL, `*stopped` becomes true if a stop string was found, now or before. The
// text ended before it, and no more text comes. The cost of a call does not depend on the number of
// tokens before it.
elora_status elora_text_push(struct elora_text *text, elora_token token, const char **part, size_t *len, bool *stopped);

// Ends the text: writes what was held back, as elora_text_push() does. A part of a character
// becomes U+FFFD. The next token begins another text.
elora_status elora_text_finish(struct elora_text *text, const char **part, size_t *len);



// --- Sessions: sequences on a model, and generation --------------------------------------------------

// One sequence on a model, with its key/value cache. Mutable: it may be used by one thread at a
// time. A call that comes while another call uses the session, from another thread or from the
// session's own callback, fails with ELORA_STATUS_INVALID_STATE. It keeps alive what it needs of
// the model.
typedef struct elora_session elora_session;

// Storage format of the key/value cache; one of the ELORA_CACHE_ constants.
typedef int32_t elora_cache_format;

// Precision to which activations are quantized before multiplication with integer weights (formats
// ELORA_WEIGHT_FORMAT_INT and ELORA_WEIGHT_FORMAT_SPARSE_INT); one of the ELORA_ACTIVATIONS_
// constants. It has no effect on layers in other formats.
typedef int32_t elora_activations;

// Session options. Initialize them with elora_session_options_init(), then set fields.
typedef struct elora_session_options {
    // sizeof(elora_session_options); elora_session_options_init() sets it.
    size_t struct_size;
    // Largest number of tokens that the session can hold, at most elora_model_context_size(). 0
    // uses elora_model_context_size(). Default: 0.
    size_t n_ctx;
    // Number of prompt tokens that are processed together. More are faster and take more memory. 0
    // uses 256. Default: 0.
    size_t prefill_rows;
    // Storage format of keys and values: an ELORA_CACHE_ constant. Default: ELORA_CACHE_F32.
    elora_cache_format cache_format;
    // Precision of the activations: an ELORA_ACTIVATIONS_ constant. Default:
    // ELORA_ACTIVATIONS_INT16.
    elora_activations activations;
} elora_session_options;

// Text-generation options. Initialize them with elora_generate_options_init(), then set fields.
typedef struct elora_generate_options {
    // sizeof(elora_generate_options); elora_generate_options_init() sets it.
    size_t struct_size;
    // Maximum number of new tokens. 0 uses the length of the output buffer. Default: 0.
    size_t max_new_tokens;
    // Additional tokens that end the generation; they are not part of the output. The array must
    // be valid during the call. May be NULL if n_stop_tokens is 0. Default: NULL.
    const elora_token *stop_tokens;
    // Number of elements of stop_tokens. Default: 0.
    size_t n_stop_tokens;
    // Temperature by which the logits are divided, at least 0. 0 selects the most likely token
    // each time (greedy decoding). Default: 0.
    double temperature;
    // Sample only from the most likely tokens that together reach this probability, above 0 and at
    // most 1. 1 for no limit. Default: 1.
    double top_p;
    // Sample only from tokens whose probability is at least this fraction of the most likely
    // token's, at least 0 and below 1. 0 for no limit. Default: 0.
    double min_p;
    // Seed of the random draws; the same seed gives the same tokens. Default: 0.
    uint64_t seed;
    // Sample only from this many most likely tokens. 0 for no limit. Default: 0.
    uint32_t top_k;
    // If not 0, the model's own stop tokens do not end the generation. Default: 0.
    uint32_t ignore_stop_tokens;
} elora_generate_options;

// Callback that receives each new token. `userdata` is the pointer passed to
// elora_session_generate(). Return false to stop the generation. The callback runs on the thread
// that called elora_session_generate(). It must not use the session, but it may free it.
typedef bool (*elora_token_fn)(void *userdata, elora_token token);

// 16-bit integers with one scale for each 128 activations. The rounding error is at most 1.6e-5 of
// the largest of the 128.
#define ELORA_ACTIVATIONS_INT16 0

// 8-bit integers with one scale for each 32 activations with AVX-512, and for each 128 with other
// instruction sets. The rounding error is at most 0.4 % of the largest of them; the multiplications
// take about half the work.
#define ELORA_ACTIVATIONS_INT8 1

// 32-bit floats. Keys and values are stored exactly as computed.
#define ELORA_CACHE_F32 0

// IEEE 754 half precision: half the memory. Keys and values are rounded to nearest.
#define ELORA_CACHE_F16 1

// Sets every field of `*options` to its default. `struct_size` is sizeof(elora_session_options).
elora_status elora_session_options_init(struct elora_session_options *options, size_t struct_size);

// Creates an empty session on a model. The whole model (subnet 0) is active. `options` may be NULL
// for the defaults. On success `*out` is a new handle; release it with elora_session_free().
elora_status elora_session_new(const elora_model *model,
                               const struct elora_session_options *options,
                               struct elora_session **out);

// Frees a session. NULL is ignored. No other thread may be using the session. The callback of
// elora_session_generate() may free the session that calls it.
void elora_session_free(struct elora_session *session);

// Activates a subnet. `subnet` is an index below elora_model_subnet_count(); 0 is the whole model.
// ELORA_STATUS_INVALID_STATE if the subnet would change while the session holds tokens, because
// their keys and values belong to the previous subnet; call elora_session_reset() first.
elora_status elora_session_set_subnet(struct elora_session *session, size_t subnet);

// Activates a subnet by name, as elora_session_set_subnet() does by index. ELORA_STATUS_NOT_FOUND
// if there is no subnet of that name.
elora_status elora_session_set_subnet_named(struct elora_session *session, const char *name);

// Activates any subnet of the model's search space. `json` is an object with a value for each
// group of the space, such as {"layers.0.q_proj+k_proj+v_proj": 24, ...}, as a search produces it;
// see elora_model_space_json(). ELORA_STATUS_INVALID_STATE if the model has no search space, and
// as in elora_session_set_subnet().
elora_status elora_session_set_subnet_json(struct elora_session *session, const char *json);

// Sets the active rank of every linear layer. `ranks` has `n_ranks` elements, one for each layer
// in the order of elora_model_layer_info(); 0 disables the layer's adapter. The channels and
// blocks of the active subnet do not change. ELORA_STATUS_INVALID_ARGUMENT if `n_ranks` differs
// from elora_model_layer_count() or a rank is larger than the layer's max_rank;
// ELORA_STATUS_INVALID_STATE as in elora_session_set_subnet().
elora_status elora_session_set_ranks(struct elora_session *session, const uint32_t *ranks, size_t n_ranks);

// Copies the active rank of every linear layer to `ranks`, a buffer of `cap` elements, and writes
// the number of layers to `*n`. `ranks` may be NULL if `cap` is 0, and `n` may be NULL.
// ELORA_STATUS_INSUFFICIENT_SIZE if there are more than `cap` layers; then only `*n` is written.
elora_status elora_session_ranks(struct elora_session *session, uint32_t *ranks, size_t cap, size_t *n);

// Removes all tokens from the session. Its memory is kept for the next tokens.
elora_status elora_session_reset(struct elora_session *session);

// Removes all tokens but the first `n_tokens`. Does nothing if the session holds no more than
// that. Layers with a sliding window keep little more than their window: after going back farther,
// the next call that adds tokens computes all of them again.
elora_status elora_session_truncate(struct elora_session *session, size_t n_tokens);

// Number of tokens that the session holds. Returns 0 if `session` is NULL or another call is using
// it.
size_t elora_session_position(struct elora_session *session);

// Largest number of tokens that the session can hold. Returns 0 if `session` is NULL or another
// call is using it.
size_t elora_session_capacity(struct elora_session *session);

// Appends one or more tokens and writes the logits after the last one to `logits`:
// elora_model_vocab_size() elements. `logits_len` is the length of `logits` in elements. `logits`
// may be NULL. If the call fails, the session holds the same tokens as before.
//
// ELORA_STATUS_CONTEXT_FULL if the session has no room for all tokens.
// ELORA_STATUS_INVALID_ARGUMENT if `n_tokens` is 0, a token is not in the vocabulary, or `tokens`
// and `logits` overlap.
// ELORA_STATUS_INSUFFICIENT_SIZE if `logits` is too short.
elora_status elora_session_decode(struct elora_session *session,
                                  const elora_token *tokens,
                                  size_t n_tokens,
                                  float *logits,
                                  size_t logits_len);

// Same as elora_session_decode(), but writes the logits after every token: `n_tokens` rows of
// elora_model_vocab_size() elements.
elora_status elora_session_decode_all(struct elora_session *session,
                                      const elora_token *tokens,
                                      size_t n_tokens,
                                      float *logits,
                                      size_t logits_len);

// Appends one token to each of several sessions on the same model with the same active subnet and
// activation precision. The weights are read once for all sessions.
//
// `sessions` and `tokens` have `n_sessions` elements each; no session may occur twice. `logits`
// receives `n_sessions` rows of elora_model_vocab_size() elements, or is NULL; `logits_len` is its
// length in elements. If the call fails, all sessions hold the same tokens as before.
//
// ELORA_STATUS_INVALID_STATE if the sessions differ in model, subnet or activation precision, or
// if a session occurs twice or is in use.
elora_status elora_session_decode_batch(struct elora_session *const *sessions,
                                        size_t n_sessions,
                                        const elora_token *tokens,
                                        float *logits,
                                        size_t logits_len);

// Sets every field of `*options` to its default, which is greedy decoding. `struct_size` is
// sizeof(elora_generate_options).
elora_status elora_generate_options_init(struct elora_generate_options *options, size_t struct_size);

// Appends a prompt of `n_prompt` tokens, at least 1, and generates tokens from there. The
// generation ends at a stop token, after `options->max_new_tokens` tokens, or when the session is
// full. `options` may be NULL for the defaults.
//
// If `on_token` is not NULL, it is called with `userdata` and each new token as soon as the token
// is known. If `out` is not NULL, the new tokens are written to it; it has room for `cap` tokens.
// If `n_out` is not NULL, the number of new tokens is written to `*n_out`. If `out` is NULL,
// `options->max_new_tokens` must not be 0. `out` must not overlap the prompt and the stop tokens,
// which is ELORA_STATUS_INVALID_ARGUMENT.
//
// ELORA_STATUS_CANCELLED if `on_token` returned false; the tokens generated until then are written
// to `out` and `*n_out`. ELORA_STATUS_CONTEXT_FULL if the prompt does not fit into the session.
// ELORA_STATUS_INSUFFICIENT_SIZE if `options->max_new_tokens` is larger than `cap`. If memory runs
// out during the generation, `out` and `*n_out` are not written, and the session keeps the prompt
// and the tokens that it already holds.
//
// Unless a stop token ended the generation, the session does not yet hold the last new token; pass
// it at the start of the next call.
elora_status elora_session_generate(struct elora_session *session,
                                    const elora_token *prompt,
                                    size_t n_prompt,
                                    const struct elora_generate_options *options,
                                    elora_token_fn on_token,
                                    void *userdata,
                                    elora_token *out,
                                    size_t cap,
                                    size_t *n_out);



// --- Sessions of a server: batches, copies, states, interruption -------------------------------------

// What one session does in a batch.
typedef struct elora_step {
    // sizeof(elora_step); the same for all elements of an array.
    size_t struct_size;
    // The session. No session may occur twice in a batch.
    elora_session *session;
    // The session's new tokens: a token that was drawn, or a prompt or a part of it.
    const elora_token *tokens;
    // Number of elements of tokens, at least 1.
    size_t n_tokens;
    // Receives the logits after each of the last n_logits tokens: n_logits rows of
    // elora_model_vocab_size() elements. May be NULL if n_logits is 0.
    float *logits;
    // Length of logits in elements.
    size_t logits_len;
    // Number of rows to write: 0 for none, 1 for the logits after the last token; at most
    // n_tokens.
    size_t n_logits;
} elora_step;

// Callback that is asked whether to stop. `userdata` is the pointer passed to
// elora_session_set_abort(). Return true to stop. It runs on the thread that called the function
// that it may stop. It must neither use nor free the session.
typedef bool (*elora_abort_fn)(void *userdata);

// Appends tokens to several sessions, any number to each: prompts, parts of prompts and single
// tokens together. Sessions may come and go between calls.
//
// `steps` has `n_steps` elements. Sessions on the same model with the same widths and activation
// precision go through the model together, so that its weights are read once for all of them;
// their ranks and adapters may differ. Other widths, and subnets with weights of their own, take a
// pass each. If the call fails, all sessions hold the same tokens as before.
//
// ELORA_STATUS_INVALID_STATE if a session occurs twice or is in use. Otherwise as in
// elora_session_decode().
elora_status elora_session_decode_steps(const struct elora_step *steps, size_t n_steps);

// Copies a session: its tokens with their keys and values, its subnet and adapters. Both go on by
// themselves. The memory of keys and values is shared until one of the two writes to it, so that
// sequences with a common beginning can share it: decode the beginning once, then copy. On success
// `*out` is a new handle; release it with elora_session_free(). A callback of
// elora_session_set_abort() is not copied. A draft is.
elora_status elora_session_copy(elora_session *session, elora_session **out);

// Lets a draft propose up to `n_tokens` tokens at a time, 1 to 7, in elora_session_generate(),
// which checks them in one pass. The output is the same as without a draft, up to the rounding of
// sums, which decides between logits that are all but equal. It comes sooner if the draft is much
// faster and often right, such as a session on a small subnet of the same supernet. The session
// takes a copy of `draft`, which can be freed, and which follows the session's tokens by itself. A
// `draft` of NULL removes the draft.
//
// ELORA_STATUS_INVALID_ARGUMENT if `n_tokens` is out of range, if `draft` is the session itself,
// if its model has another number of tokens in its vocabulary, or if it has a draft.
elora_status elora_session_set_draft(elora_session *session, elora_session *draft, size_t n_tokens);

// Copies the tokens that the session holds to `tokens`, a buffer of `cap` elements, and writes
// their number to `*n`. `tokens` may be NULL if `cap` is 0, and `n` may be NULL.
// ELORA_STATUS_INSUFFICIENT_SIZE if there are more than `cap` tokens; then only `*n` is written.
elora_status elora_session_tokens(elora_session *session, elora_token *tokens, size_t cap, size_t *n);

// Copies the session's state, its tokens with their keys and values, to `buf`, a buffer of `cap`
// bytes, and writes its size to `*size`. `buf` may be NULL if `cap` is 0.
// ELORA_STATUS_INSUFFICIENT_SIZE if the state has more than `cap` bytes; then only `*size` is
// written.
elora_status elora_session_get_state(elora_session *session, void *buf, size_t cap, size_t *size);

// Replaces the session's tokens by those of a state that elora_session_get_state() gave, with
// their keys and values. The session must be on the same model, with the same subnet, adapters,
// precision of activations and format of the cache. If layers have sliding windows, n_ctx and
// prefill_rows must be the same, too.
//
// ELORA_STATUS_INVALID_FORMAT if the state is damaged. ELORA_STATUS_INVALID_STATE if it is of
// another model or setting; the error text says which. ELORA_STATUS_CONTEXT_FULL if the session
// has no room for its tokens. The session then holds the same tokens as before.
elora_status elora_session_set_state(elora_session *session, const void *state, size_t size);

// Writes the session's state to the file `path`, under a temporary name first. If the file exists,
// it is replaced if `overwrite` is true; otherwise the call fails with
// ELORA_STATUS_INVALID_FORMAT.
elora_status elora_session_save(elora_session *session, const char *path, bool overwrite);

// Replaces the session's tokens by those of a file that elora_session_save() wrote, as
// elora_session_set_state() does.
elora_status elora_session_load(elora_session *session, const char *path);

// Sets a callback that is asked, between the blocks of the model, whether to stop a call that adds
// tokens to the session; NULL for none. A call that is stopped returns ELORA_STATUS_CANCELLED, and
// the session holds the same tokens as before. In a batch, the callback of any session stops the
// call. `userdata` must be valid as long as the callback is set.
elora_status elora_session_set_abort(elora_session *session, elora_abort_fn abort, void *userdata);



// --- Samplers for a loop of your own, and LoRA adapters at run time ----------------------------------

// Draws the next token of a sequence from logits. Mutable: it may be used by one thread at a time.
typedef struct elora_sampler elora_sampler;

// Sampler options. Initialize them with elora_sampler_options_init(), then set fields.
//
// Biases are added first, then the penalties apply: repetition, frequency, presence. Then the
// logits are divided by the temperature, and the limits apply in the order top_k, min_p, top_p,
// each to the tokens that the previous one left.
typedef struct elora_sampler_options {
    // sizeof(elora_sampler_options); elora_sampler_options_init() sets it.
    size_t struct_size;
    // Temperature by which the logits are divided, at least 0. 0 selects the most likely token
    // each time (greedy decoding). Default: 0.
    double temperature;
    // Sample only from the most likely tokens that together reach this probability, above 0 and at
    // most 1. 1 for no limit. Default: 1.
    double top_p;
    // Sample only from tokens whose probability is at least this fraction of the most likely
    // token's, at least 0 and below 1. 0 for no limit. Default: 0.
    double min_p;
    // Factor by which the logit of a token that occurred, in the prompt or after it, is divided if
    // it is positive and multiplied if it is negative; above 0. 1 for none. Default: 1.
    double repetition_penalty;
    // Number that is subtracted from the logit of a token for each time that it was generated.
    // Default: 0.
    double frequency_penalty;
    // Number that is subtracted from the logit of a token that was generated. Default: 0.
    double presence_penalty;
    // Seed of the random draws; the same seed gives the same tokens. Default: 0.
    uint64_t seed;
    // Number of the sequence: samplers with the same seed and different streams draw independently.
    // Default: 0.
    uint64_t stream;
    // Tokens whose logits are changed. May be NULL if n_bias is 0. The array is copied. Default:
    // NULL.
    const elora_token *bias_tokens;
    // Number that is added to the logit of each of bias_tokens: a finite number, or minus infinity,
    // which forbids the token. May be NULL if n_bias is 0. The array is copied. Default: NULL.
    const float *bias_values;
    // Number of elements of bias_tokens and of bias_values. Default: 0.
    size_t n_bias;
    // Sample only from this many most likely tokens. 0 for no limit. Default: 0.
    uint32_t top_k;
    // Must be 0.
    uint32_t reserved;
} elora_sampler_options;

// Sets every field of `*options` to its default, which is greedy decoding. `struct_size` is
// sizeof(elora_sampler_options).
elora_status elora_sampler_options_init(struct elora_sampler_options *options, size_t struct_size);

// Creates a sampler. `options` may be NULL for the defaults. On success `*out` is a new handle;
// release it with elora_sampler_free(). ELORA_STATUS_INVALID_ARGUMENT if an option is out of range.
elora_status elora_sampler_new(const struct elora_sampler_options *options, struct elora_sampler **out);

// Frees a sampler. NULL is ignored. No other thread may be using it.
void elora_sampler_free(struct elora_sampler *sampler);

// Draws a token from `n_logits` logits and writes it to `*token`. Pass elora_model_token_count()
// logits, the first ones. Among equal logits the lowest token wins; NaN is never chosen. The logits
// are not changed, and the token is not counted: call elora_sampler_accept() once it is taken.
//
// `allowed` is a mask of the tokens that may be drawn, as grammar engines make it: bit i % 32 of
// element i / 32 for token i, the lowest bit first. Tokens behind its `n_allowed` elements may not
// be drawn. NULL allows all tokens.
//
// ELORA_STATUS_INVALID_ARGUMENT if no token is left.
elora_status elora_sampler_sample(struct elora_sampler *sampler,
                                  const float *logits,
                                  size_t n_logits,
                                  const uint32_t *allowed,
                                  size_t n_allowed,
                                  elora_token *token);

// Counts `n_tokens` tokens as generated, for the penalties.
elora_status elora_sampler_accept(struct elora_sampler *sampler, const elora_token *tokens, size_t n_tokens);

// Counts `n_tokens` tokens of the prompt, which the repetition penalty sees and the others do not.
elora_status elora_sampler_observe(struct elora_sampler *sampler, const elora_token *tokens, size_t n_tokens);

// Forgets all tokens and begins the random draws anew.
elora_status elora_sampler_reset(struct elora_sampler *sampler);


// A LoRA adapter for a model. Immutable and reference-counted: any number of threads may use it at
// once.
typedef struct elora_adapter elora_adapter;

// Loads a PEFT adapter from its folder (adapter_config.json and adapter_model.safetensors), or a
// LoRA in a GGUF file, for a model. It can be used with every model that has layers of the same names and sizes, such as the
// same model in another format. On success `*out` is a new handle; release it with
// elora_adapter_free().
//
// ELORA_STATUS_NOT_FOUND or ELORA_STATUS_INVALID_FORMAT if the adapter is for another model.
// ELORA_STATUS_UNSUPPORTED if it does what is not implemented; the error text says what.
elora_status elora_adapter_load(const elora_model *model,
                                const char *path,
                                const struct elora_adapter **out);

// Adds a reference to an adapter and returns the same pointer. Each reference is released with
// elora_adapter_free(). Returns NULL if `adapter` is NULL.
const struct elora_adapter *elora_adapter_retain(const struct elora_adapter *adapter);

// Releases one reference to an adapter. NULL is ignored. Sessions and models keep alive what they
// need of it.
void elora_adapter_free(const struct elora_adapter *adapter);

// Largest rank of a layer of the adapter. Returns 0 if `adapter` is NULL.
size_t elora_adapter_max_rank(const struct elora_adapter *adapter);

// Number of layers that the adapter changes. Returns 0 if `adapter` is NULL.
size_t elora_adapter_layer_count(const struct elora_adapter *adapter);

// Size of the adapter's factors in bytes. Returns 0 if `adapter` is NULL.
size_t elora_adapter_bytes(const struct elora_adapter *adapter);

// Uses these adapters in a session, in place of those that were set before; none if `n_adapters` is
// 0. `adapters` has `n_adapters` elements. `scales` has as many, the factor of each adapter's
// update, or is NULL for 1 each. Adapters that belong to the model stay as the subnet has them.
//
// ELORA_STATUS_INVALID_STATE if the adapters would change while the session holds tokens, because
// their keys and values belong to the previous adapters; call elora_session_reset() first.
// ELORA_STATUS_NOT_FOUND or ELORA_STATUS_INVALID_FORMAT if an adapter is for another model.
elora_status elora_session_set_adapters(elora_session *session,
                                        const struct elora_adapter *const *adapters,
                                        const float *scales,
                                        size_t n_adapters);

// Makes a model of which an adapter is a part, so that it is saved with the model, used by every
// session, and added to dense weights by elora_model_merge(). `scale` is a factor of the adapter's
// update. On success `*out` is a new handle, which shares the weights of `model`; release it with
// elora_model_free().
//
// ELORA_STATUS_UNSUPPORTED if the rank of an adapter of the model is a choice of its search space:
// call elora_model_extract() first.
elora_status elora_model_attach_adapter(const elora_model *model,
                                        const struct elora_adapter *adapter,
                                        float scale,
                                        const elora_model **out);



// --- Parts of a model for an engine of your own: embedding, norms, linear layers ---------------------

// Sizes and constants of a model.
typedef struct elora_model_info {
    // Set it to sizeof(elora_model_info) before the call.
    size_t struct_size;
    // Number of tokens in the vocabulary.
    size_t vocab_size;
    // Largest number of tokens in a session.
    size_t context_size;
    // Width of the residual stream: the number of elements in a row between the blocks.
    size_t hidden_size;
    // Number of blocks.
    size_t n_blocks;
    // Number of elements of an attention head.
    size_t head_dim;
    // Number of tokens that a query attends to at most, including its own; 0 for no limit.
    size_t sliding_window;
    // Epsilon that the RMS norms add to the mean square.
    double norm_epsilon;
} elora_model_info;

// Describes the whole model. Set `info->struct_size` before the call. The number of heads and the
// MLP width of a block follow from the sizes of its layers.
elora_status elora_model_describe(const elora_model *model, struct elora_model_info *info);

// Writes the embeddings of `n_tokens` tokens to `out`: `n_tokens` rows of hidden_size elements.
// `out_len` is the length of `out` in elements. ELORA_STATUS_INSUFFICIENT_SIZE if it is too short.
elora_status elora_model_embed(const elora_model *model,
                               const elora_token *tokens,
                               size_t n_tokens,
                               float *out,
                               size_t out_len);

// Copies the gains of a norm, hidden_size elements, to `out`, a buffer of `out_len` elements.
// `name` is the tensor's name in Hugging Face's files, such as
// "model.layers.0.input_layernorm.weight" or "model.norm.weight". ELORA_STATUS_NOT_FOUND if there
// is no norm of that name; ELORA_STATUS_INSUFFICIENT_SIZE if `out` is too short.
elora_status elora_model_norm(const elora_model *model, const char *name, float *out, size_t out_len);

// Writes the cosines and sines of the rotary embedding at `position`, head_dim / 2 elements each.
// `cos` and `sin` are buffers of `len` elements each and must not overlap. Element i rotates
// elements i and i + head_dim / 2 of a head. ELORA_STATUS_INSUFFICIENT_SIZE if `len` is too small;
// ELORA_STATUS_UNSUPPORTED if the blocks of the model compute more or other than those of Llama,
// as those of Qwen3, SmolLM3, Gemma and some of Phi do: use a session for them.
elora_status elora_model_rotary(const elora_model *model, size_t position, float *cos, float *sin, size_t len);


// A linear layer of a model, with the rank and sizes of one subnet. Immutable and
// reference-counted: any number of threads may use it at once. It keeps alive what it needs of the
// model.
typedef struct elora_linear elora_linear;

// Options of a linear layer. Initialize them with elora_linear_options_init(), then set fields.
typedef struct elora_linear_options {
    // sizeof(elora_linear_options); elora_linear_options_init() sets it.
    size_t struct_size;
    // Precision of the activations: an ELORA_ACTIVATIONS_ constant. Default:
    // ELORA_ACTIVATIONS_INT16.
    elora_activations activations;
    // Must be 0.
    uint32_t reserved;
} elora_linear_options;

// Type of the elements of a buffer; one of the ELORA_DTYPE_ constants.
typedef int32_t elora_dtype;

// 32-bit float.
#define ELORA_DTYPE_F32 0

// IEEE 754 half precision, 16 bits.
#define ELORA_DTYPE_F16 1

// bfloat16, 16 bits.
#define ELORA_DTYPE_BF16 2

// Sets every field of `*options` to its default. `struct_size` is sizeof(elora_linear_options).
elora_status elora_linear_options_init(struct elora_linear_options *options, size_t struct_size);

// Creates a handle to a linear layer under a subnet, including its adapter.
//
// `layer` is an index below elora_model_layer_count(); `subnet` is an index below
// elora_model_subnet_count(), and 0 is the whole model. `options` may be NULL for the defaults. On
// success `*out` is a new handle; release it with elora_linear_free().
//
// ELORA_STATUS_INVALID_ARGUMENT if an index is out of range or the subnet leaves the layer out.
elora_status elora_linear_new(const elora_model *model,
                              size_t layer,
                              size_t subnet,
                              const struct elora_linear_options *options,
                              const struct elora_linear **out);

// Adds a reference to a layer and returns the same pointer. Each reference is released with
// elora_linear_free(). Returns NULL if `linear` is NULL.
const struct elora_linear *elora_linear_retain(const struct elora_linear *linear);

// Releases one reference to a layer. The layer is freed with its last reference. NULL is ignored.
void elora_linear_free(const struct elora_linear *linear);

// Number of active input features, which is the length of an input row. Returns 0 if `linear` is
// NULL.
size_t elora_linear_in_features(const struct elora_linear *linear);

// Number of active output features, which is the length of an output row. Returns 0 if `linear` is
// NULL.
size_t elora_linear_out_features(const struct elora_linear *linear);

// Active rank of the adapter. Returns 0 if no adapter is active, or if `linear` is NULL.
size_t elora_linear_rank(const struct elora_linear *linear);

// Writes to `*bytes` the size in bytes of the scratch memory that elora_linear_forward() and
// elora_linear_forward_typed() need for `n_rows` rows of any dtype.
elora_status elora_linear_scratch_size(const struct elora_linear *linear, size_t n_rows, size_t *bytes);

// Applies the layer to `n_rows` rows: y = x W^T + s (x A^T) B^T + b. W is the weight, A and B are
// the active part of the adapter, s is its scale, and b is the bias. The adapter and bias terms
// are omitted if the layer has none.
//
// Row i of the input is the in_features elements from x + i * ldx. Row i of the output is the
// out_features elements from y + i * ldy; elements between the rows of y are not changed. `ldx`
// and `ldy` count elements and must be at least in_features and out_features. `x_len` and `y_len`
// are the lengths of the buffers in elements; each buffer must reach at least to the end of its
// last row. `n_rows` may be 0.
//
// `scratch` is working memory of `scratch_bytes` bytes, at least elora_linear_scratch_size(), at
// any alignment. If it is NULL, the library allocates memory for this call and ignores
// `scratch_bytes`.
//
// `x`, `y` and `scratch` must not overlap. If the call fails, the contents of the output rows are
// unspecified. The result does not depend on the number of threads or on concurrent calls.
//
// ELORA_STATUS_INSUFFICIENT_SIZE if a buffer or `scratch` is too short.
// ELORA_STATUS_INVALID_ARGUMENT if `ldx` or `ldy` is too small, or if buffers overlap.
elora_status elora_linear_forward(const struct elora_linear *linear,
                                  size_t n_rows,
                                  const float *x,
                                  size_t x_len,
                                  size_t ldx,
                                  float *y,
                                  size_t y_len,
                                  size_t ldy,
                                  void *scratch,
                                  size_t scratch_bytes);

// Same as elora_linear_forward(), for buffers of another dtype. `x` and `y` point to elements of
// type `dtype`, an ELORA_DTYPE_ constant; `x_len`, `ldx`, `y_len` and `ldy` count such elements.
// The layer computes in 32-bit floats and rounds its results to nearest.
elora_status elora_linear_forward_typed(const struct elora_linear *linear,
                                        size_t n_rows,
                                        elora_dtype dtype,
                                        const void *x,
                                        size_t x_len,
                                        size_t ldx,
                                        void *y,
                                        size_t y_len,
                                        size_t ldy,
                                        void *scratch,
                                        size_t scratch_bytes);



#ifdef __cplusplus
} // extern "C"
#endif // __cplusplus

#endif // ELASTIC_LORA_H
