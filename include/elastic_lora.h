/* elastic_lora.h: models compressed by elastic low-rank adapters, in C and C++. Generated from src/ffi; do not edit.
 *
 * Handles are opaque. A `const` one is immutable and reference-counted, and any number of threads may use it at once;
 * one that is not const is one thread's at a time. A handle keeps what it needs of those that it was made from, so they
 * may be freed in any order, and every function that frees takes NULL.
 *
 * A function that can fail returns an elora_status, 0 for success. It writes its results only on success, unless its
 * comment says otherwise, and leaves a text with the calling thread: elora_last_error(). Those that return a value give
 * 0, false or NULL where they fail, and leave a text as well. No function throws, unwinds, ends the process, or prints,
 * but for a panic, a bug of the library: it becomes ELORA_STATUS_PANIC, and a line on the standard error stream.
 *
 * Strings are UTF-8 and end in a NUL. Buffers are a pointer and a number of elements; a pointer may be NULL where the
 * number is 0. What a pointer points to must be there for as long as the call takes, aligned as its type asks, and
 * written by nobody else meanwhile. Matrices are row-major. Options structs begin with their own size, which their
 * _init function sets, so that fields can be added. */

#ifndef ELASTIC_LORA_H
#define ELASTIC_LORA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// Major version of the library that this header belongs to.
#define ELORA_VERSION_MAJOR 0

// Minor version of the library that this header belongs to.
#define ELORA_VERSION_MINOR 1

// Patch version of the library that this header belongs to.
#define ELORA_VERSION_PATCH 0

// Counts the breaks of binary compatibility; compare with elora_abi_version().
#define ELORA_ABI_VERSION 0

// A linear layer of a model with a subnet's rank and sizes. Immutable and reference-counted: any number of threads
// may use it at once. It keeps what it needs of the model.
typedef struct elora_linear elora_linear;

// A model: weights, adapters, subnets, tokenizer. Immutable and reference-counted: any number of threads may use it
// at once.
typedef struct elora_model elora_model;

// One sequence on a model, with its key/value cache. Mutable: one thread at a time; a call that comes while another
// is in it, from another thread or from its own callback, is refused. It keeps what it needs of the model.
typedef struct elora_session elora_session;

// Outcome of a call: ELORA_STATUS_OK or the kind of failure. Numbers are never reused; take one that you do not know
// for a failure.
typedef int32_t elora_status;

// What is compared with the checksums in a bundle, and when.
typedef int32_t elora_verify;

// How a model is loaded. Fill it by elora_model_options_init(), then set fields.
typedef struct elora_model_options {
    // sizeof(elora_model_options), set by elora_model_options_init().
    size_t struct_size;
    // Threads that work on one call, the caller's among them; 0 for one per core.
    uint32_t n_threads;
    // Not 0: files are mapped, and must not change while the model lives. 0: they are read as a whole.
    uint32_t use_mmap;
    // An ELORA_VERIFY_ constant.
    elora_verify verify;
    // 0.
    uint32_t reserved;
} elora_model_options;

// How a weight is stored.
typedef int32_t elora_weight_format;

// A linear layer of a model, with the sizes that it has in the whole model.
typedef struct elora_layer_info {
    // In: sizeof(elora_layer_info).
    size_t struct_size;
    // Hugging Face's module path, such as "model.layers.0.self_attn.q_proj"; "lm_head" for the head. It lives as
    // long as the model.
    const char *name;
    // Numbers in a row of the layer's input.
    size_t in_features;
    // Numbers in a row of its output.
    size_t out_features;
    // Largest rank of its adapter; 0 where there is none.
    size_t max_rank;
    // Bytes of its weight, those of the adapter left out.
    size_t weight_bytes;
    // Bytes of its adapter.
    size_t adapter_bytes;
    // Columns that share a scale, in formats with codes; 0 where a row has one scale, or none.
    size_t group_size;
    // An ELORA_WEIGHT_FORMAT_ constant.
    elora_weight_format format;
    // Bits of a number or code.
    uint32_t bits;
    // 1 if it has a bias, else 0.
    uint32_t has_bias;
    // 0.
    uint32_t reserved;
} elora_layer_info;

// A token's id: 0 to the size of the vocabulary - 1.
typedef int32_t elora_token;

// What the tokenizer puts around a text.
typedef int32_t elora_special;

// Sizes and numbers of a whole model.
typedef struct elora_model_info {
    // In: sizeof(elora_model_info).
    size_t struct_size;
    // Tokens of the vocabulary.
    size_t vocab_size;
    // Tokens that the model can take in at most.
    size_t context_size;
    // Numbers in a row between the blocks.
    size_t hidden_size;
    // Blocks.
    size_t n_blocks;
    // Numbers of an attention head.
    size_t head_dim;
    // Tokens that a query sees at most, its own included; 0 for all.
    size_t sliding_window;
    // What is added to the mean square in the norms.
    double norm_epsilon;
} elora_model_info;

// How exactly the inputs of weights with codes are kept while they are multiplied.
typedef int32_t elora_activations;

// How a layer is applied. Fill it by elora_linear_options_init(), then set fields.
typedef struct elora_linear_options {
    // sizeof(elora_linear_options), set by elora_linear_options_init().
    size_t struct_size;
    // An ELORA_ACTIVATIONS_ constant.
    elora_activations activations;
    // 0.
    uint32_t reserved;
} elora_linear_options;

// Type of the numbers in a buffer.
typedef int32_t elora_dtype;

// How keys and values are kept.
typedef int32_t elora_cache_format;

// What a session is like. Fill it by elora_session_options_init(), then set fields.
typedef struct elora_session_options {
    // sizeof(elora_session_options), set by elora_session_options_init().
    size_t struct_size;
    // Tokens that it holds at most; 0 for as many as the model can take in.
    size_t n_ctx;
    // Tokens of a prompt that are processed together; 0 for the default. More are faster, and take more memory.
    size_t prefill_rows;
    // An ELORA_CACHE_ constant.
    elora_cache_format cache_format;
    // An ELORA_ACTIVATIONS_ constant.
    elora_activations activations;
} elora_session_options;

// How text goes on. Fill it by elora_generate_options_init(), then set fields.
typedef struct elora_generate_options {
    // sizeof(elora_generate_options), set by elora_generate_options_init().
    size_t struct_size;
    // New tokens at most; 0 for as many as the output has room for.
    size_t max_new_tokens;
    // Tokens that end the generation, beside the model's own; they are not part of the output.
    const elora_token *stop_tokens;
    // Number of them.
    size_t n_stop_tokens;
    // Logits are divided by it; 0 takes the most likely token each time.
    double temperature;
    // Only the most likely tokens that together reach this probability, in 0..=1; 1 for all.
    double top_p;
    // Only tokens at least this share as likely as the most likely one, in 0..1; 0 for all.
    double min_p;
    // Seed of the draws: the same seed gives the same tokens.
    uint64_t seed;
    // Only the most likely so many; 0 for all.
    uint32_t top_k;
    // Not 0: the model's own stop tokens do not end the generation.
    uint32_t ignore_stop_tokens;
} elora_generate_options;

// Called with each new token; false stops the generation. The session must not be used from it, but may be freed.
typedef bool (*elora_token_fn)(void *userdata, elora_token token);

// Success.
#define ELORA_STATUS_OK 0

// A pointer that must not be NULL is.
#define ELORA_STATUS_NULL_POINTER 1

// An argument is out of its range: a size, an index, an enumerator, a string that is not UTF-8, buffers that overlap.
#define ELORA_STATUS_INVALID_ARGUMENT 2

// A buffer is too short for what would be written to it.
#define ELORA_STATUS_INSUFFICIENT_SIZE 3

// The operating system refused to read or write a file.
#define ELORA_STATUS_IO 4

// A file is damaged, or not what it should be.
#define ELORA_STATUS_INVALID_FORMAT 5

// The file or request is well-formed, but this library does not implement it.
#define ELORA_STATUS_UNSUPPORTED 6

// There is nothing of that name.
#define ELORA_STATUS_NOT_FOUND 7

// The handle is not in a state for this call, as a session with tokens when its subnet is to change.
#define ELORA_STATUS_INVALID_STATE 8

// The caller's callback asked to stop.
#define ELORA_STATUS_CANCELLED 9

// The session has no room for so many tokens.
#define ELORA_STATUS_CONTEXT_FULL 10

// The system gave no memory.
#define ELORA_STATUS_OUT_OF_MEMORY 11

// A bug in the library. The process goes on; free the handle, and do not use it again.
#define ELORA_STATUS_PANIC 100

// A weight when it is first used, so that loading reads none.
#define ELORA_VERIFY_ON_USE 0

// All weights when the model is loaded.
#define ELORA_VERIFY_ON_LOAD 1

// Nothing. What could make the library read outside a weight is checked all the same.
#define ELORA_VERIFY_NEVER 2

// Dense, 32 bits.
#define ELORA_WEIGHT_FORMAT_F32 0

// Dense, IEEE 754 half precision.
#define ELORA_WEIGHT_FORMAT_F16 1

// Dense, bfloat16.
#define ELORA_WEIGHT_FORMAT_BF16 2

// Codes of a few bits, with a scale for each group of columns.
#define ELORA_WEIGHT_FORMAT_INT 3

// A bit for each weight, and half-precision numbers for those that are not 0.
#define ELORA_WEIGHT_FORMAT_SPARSE_F16 4

// A bit for each weight, and bfloat16 numbers for those that are not 0.
#define ELORA_WEIGHT_FORMAT_SPARSE_BF16 5

// A bit for each weight, and 4-bit codes for those that are not 0, with a scale for each group of columns.
#define ELORA_WEIGHT_FORMAT_SPARSE_INT 6

// At most so many of each group of weights are not 0: a bit for each weight, and half-precision numbers.
#define ELORA_WEIGHT_FORMAT_NM_F16 7

// At most so many of each group of weights are not 0: a bit for each weight, and bfloat16 numbers.
#define ELORA_WEIGHT_FORMAT_NM_BF16 8

// A format that this version of the header does not know.
#define ELORA_WEIGHT_FORMAT_OTHER 1000

// Nothing: the text alone.
#define ELORA_SPECIAL_NONE 0

// What stands before a text, for one that goes on.
#define ELORA_SPECIAL_PROMPT 1

// What stands before and after a text, for one that is complete.
#define ELORA_SPECIAL_FULL 2

// As 16-bit integers with a scale for each 128: as good as 32-bit numbers.
#define ELORA_ACTIVATIONS_INT16 0

// As 8-bit integers with a scale for each 128: less work, and an error that can be seen.
#define ELORA_ACTIVATIONS_INT8 1

// 32 bits.
#define ELORA_DTYPE_F32 0

// IEEE 754 half precision.
#define ELORA_DTYPE_F16 1

// bfloat16.
#define ELORA_DTYPE_BF16 2

// At 32 bits: results are those without a cache.
#define ELORA_CACHE_F32 0

// At 16 bits: half the memory.
#define ELORA_CACHE_F16 1

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// The name of a status, such as "ELORA_STATUS_OK"; "unknown status" for a number that this library does not know.
// Static, never NULL.
const char *elora_status_name(elora_status status);

// Copies the text of this thread's last failed call to `buf`, with a NUL, and writes its length without the NUL to
// `*len`; an empty text before the first failure. Calls that succeed leave it as it is, and so does this one.
//
// `buf` may be NULL where `cap` is 0, and `len` may be NULL. ELORA_STATUS_INSUFFICIENT_SIZE, with nothing written to
// `buf` but the length to `*len`, where `cap` is less than the length plus 1.
elora_status elora_last_error(char *buf, size_t cap, size_t *len);

// ELORA_ABI_VERSION of the library that is linked: a program must not go on if it differs from that of its header.
uint32_t elora_abi_version(void);

// Version of the library that is linked, such as "0.1.0". Static, never NULL.
const char *elora_version(void);

// Sets every field to its default. `struct_size` is sizeof(elora_model_options).
elora_status elora_model_options_init(struct elora_model_options *options, size_t struct_size);

// Loads a bundle, or a Hugging Face folder (dense, GPTQ or compressed-tensors). `options` may be NULL for the
// defaults. On success `*out` is a handle that elora_model_free() gives back.
elora_status elora_model_load(const char *path,
                              const struct elora_model_options *options,
                              const struct elora_model **out);

// One more handle to the same model: the same pointer, to be given back once more. NULL for NULL.
const struct elora_model *elora_model_retain(const struct elora_model *model);

// Gives a handle back; NULL is ignored. Layers and sessions keep what they need of the model, so the order of
// freeing does not matter.
void elora_model_free(const struct elora_model *model);

// Writes the model to a file as a bundle: under another name first, then moved into place. A file that is there is
// replaced only where `overwrite` says so.
elora_status elora_model_save(const struct elora_model *model, const char *path, bool overwrite);

// Reads all weights, and compares them with their checksums where the model came from a bundle.
// ELORA_STATUS_INVALID_FORMAT names the first weight that is not what was written.
elora_status elora_model_verify(const struct elora_model *model);

// Cuts a subnet out: a model of its active ranks, channels and blocks alone, which computes what the whole model
// computes with that subnet. Formats stay as they are, and adapters stay apart; elora_model_merge() puts them into
// dense weights. On success `*out` is a handle of its own, that elora_model_free() gives back and elora_model_save()
// writes.
elora_status elora_model_extract(const struct elora_model *model, size_t subnet, const struct elora_model **out);

// Puts the adapters into the weights, at their largest ranks: a model without adapters. The weights must be dense;
// ELORA_STATUS_INVALID_STATE names one that is sparse or quantized. On success `*out` is a handle of its own. For a
// subnet, call elora_model_extract() first.
elora_status elora_model_merge(const struct elora_model *model, const struct elora_model **out);

// Number of linear layers: those of the blocks in the order of computation, and the head at last. 0 for NULL.
size_t elora_model_layer_count(const struct elora_model *model);

// Describes a layer. Set `info->struct_size` before.
elora_status elora_model_layer_info(const struct elora_model *model, size_t layer, struct elora_layer_info *info);

// Finds a layer by its name.
elora_status elora_model_find_layer(const struct elora_model *model, const char *name, size_t *layer);

// Number of subnets with a name. The first is always there: the whole model. 0 for NULL.
size_t elora_model_subnet_count(const struct elora_model *model);

// A subnet's name, which lives as long as the model; NULL where there is no such subnet.
const char *elora_model_subnet_name(const struct elora_model *model, size_t subnet);

// Finds a subnet by its name.
elora_status elora_model_find_subnet(const struct elora_model *model, const char *name, size_t *subnet);

// Copies the search space of the model's subnets to `buf` as JSON: groups of layers that share a value, and the
// values that each may take. ELORA_STATUS_NOT_FOUND where the model has none. `buf`, `cap` and `len` as in
// elora_last_error().
elora_status elora_model_space_json(const struct elora_model *model, char *buf, size_t cap, size_t *len);

// Tokens of the model's vocabulary, which is the number of logits after each. 0 for NULL.
size_t elora_model_vocab_size(const struct elora_model *model);

// Tokens that the model can take in at most. 0 for NULL.
size_t elora_model_context_size(const struct elora_model *model);

// Bytes of all weights, with embedding, adapters and head. 0 for NULL.
size_t elora_model_weight_bytes(const struct elora_model *model);

// Copies the tokens that end a generation to `tokens`, and their number to `*n`. ELORA_STATUS_INSUFFICIENT_SIZE,
// with only `*n` written, where there are more than `cap`; `tokens` may be NULL where `cap` is 0, and `n` may be
// NULL.
elora_status elora_model_stop_tokens(const struct elora_model *model, elora_token *tokens, size_t cap, size_t *n);

// Whether the model has a tokenizer. false for NULL.
bool elora_model_has_tokenizer(const struct elora_model *model);

// Writes the tokens of a text to `tokens`, and their number to `*n`. `special` is an ELORA_SPECIAL_ constant. Where
// there are more than `cap`, ELORA_STATUS_INSUFFICIENT_SIZE with only `*n` written; `tokens` may be NULL where `cap`
// is 0, and `n` may be NULL. ELORA_STATUS_NOT_FOUND where the model has no tokenizer.
elora_status elora_model_tokenize(const struct elora_model *model,
                                  const char *text,
                                  elora_special special,
                                  elora_token *tokens,
                                  size_t cap,
                                  size_t *n);

// Copies the text of tokens to `buf`, special tokens left out. `buf`, `cap` and `len` as in elora_last_error().
// ELORA_STATUS_NOT_FOUND where the model has no tokenizer.
//
// A character may take several tokens: text that is shown as it comes should be made of all tokens so far, not of
// each alone.
elora_status elora_model_detokenize(const struct elora_model *model,
                                    const elora_token *tokens,
                                    size_t n_tokens,
                                    char *buf,
                                    size_t cap,
                                    size_t *len);

// Describes the model. Set `info->struct_size` before. Heads and widths of a block are those of its layers.
elora_status elora_model_describe(const struct elora_model *model, struct elora_model_info *info);

// Writes the embeddings of tokens: `n_tokens` rows of hidden_size numbers, for which `out_len` must have room.
elora_status elora_model_embed(const struct elora_model *model,
                               const elora_token *tokens,
                               size_t n_tokens,
                               float *out,
                               size_t out_len);

// Copies the gain of a norm, hidden_size numbers, to `out`. `name` is that of its tensor in Hugging Face's files,
// such as "model.layers.0.input_layernorm.weight" or "model.norm.weight". ELORA_STATUS_NOT_FOUND where there is none
// of that name.
elora_status elora_model_norm(const struct elora_model *model, const char *name, float *out, size_t out_len);

// Writes the cosines and sines of rotary attention at a position: head_dim / 2 numbers each, for which `len` must
// have room. Number i turns elements i and i + head_dim / 2 of a head.
elora_status elora_model_rotary(const struct elora_model *model, size_t position, float *cos, float *sin, size_t len);

// Sets every field to its default. `struct_size` is sizeof(elora_linear_options).
elora_status elora_linear_options_init(struct elora_linear_options *options, size_t struct_size);

// Makes a handle to layer `layer` as subnet `subnet` has it, with its adapter. `options` may be NULL for the
// defaults. On success `*out` is a handle that elora_linear_free() gives back. ELORA_STATUS_INVALID_ARGUMENT for a
// layer that the subnet leaves out.
elora_status elora_linear_new(const struct elora_model *model,
                              size_t layer,
                              size_t subnet,
                              const struct elora_linear_options *options,
                              const struct elora_linear **out);

// One more handle to the same layer: the same pointer, to be given back once more. NULL for NULL.
const struct elora_linear *elora_linear_retain(const struct elora_linear *linear);

// Gives a handle back; NULL is ignored.
void elora_linear_free(const struct elora_linear *linear);

// Numbers in a row of the input that are active. 0 for NULL.
size_t elora_linear_in_features(const struct elora_linear *linear);

// Numbers in a row of the output that are active. 0 for NULL.
size_t elora_linear_out_features(const struct elora_linear *linear);

// Active rank of the adapter; 0 where none acts, and for NULL.
size_t elora_linear_rank(const struct elora_linear *linear);

// Writes the bytes of scratch memory that `n_rows` rows of any type need to `*bytes`.
elora_status elora_linear_scratch_size(const struct elora_linear *linear, size_t n_rows, size_t *bytes);

// y = x W^T + s (x A^T) B^T + b, for `n_rows` rows: W is the layer's weight, A and B the active part of its adapter,
// s the adapter's scale, b the bias, where there is one.
//
// Row i of the input is the in_features numbers from x + i * ldx, row i of the output the out_features numbers from
// y + i * ldy; what lies between rows of y is left alone. `x_len` and `y_len` are the numbers that the buffers hold,
// of which those up to the end of the last row are needed.
//
// `scratch` is `scratch_bytes` bytes at any address, elora_linear_scratch_size() of them at least; where it is NULL,
// the library allocates what it needs. `x`, `y` and `scratch` must not overlap. `y` is unspecified unless the call
// succeeds. The result does not depend on the number of threads, nor on what other threads do.
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

// elora_linear_forward() for buffers of another type: `x` and `y` hold numbers of `dtype`, an ELORA_DTYPE_ constant.
// The layer computes with 32 bits and rounds its results to nearest.
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

// Sets every field to its default. `struct_size` is sizeof(elora_session_options).
elora_status elora_session_options_init(struct elora_session_options *options, size_t struct_size);

// Makes an empty session on a model, with the whole model active. `options` may be NULL for the defaults. On success
// `*out` is a handle that elora_session_free() gives back.
elora_status elora_session_new(const struct elora_model *model,
                               const struct elora_session_options *options,
                               struct elora_session **out);

// Gives a session back; NULL is ignored.
void elora_session_free(struct elora_session *session);

// Makes a subnet the active one, by its index among the model's. ELORA_STATUS_INVALID_STATE while the session holds
// tokens: their keys belong to the subnet before; call elora_session_reset() first.
elora_status elora_session_set_subnet(struct elora_session *session, size_t subnet);

// Makes a subnet the active one, by its name; otherwise as elora_session_set_subnet().
elora_status elora_session_set_subnet_named(struct elora_session *session, const char *name);

// Makes any subnet of the model's search space the active one. `json` is an object with a value for each group of
// the space, such as {"layers.0.q_proj+k_proj+v_proj": 24, ...}: what a search gives; otherwise as
// elora_session_set_subnet().
elora_status elora_session_set_subnet_json(struct elora_session *session, const char *json);

// Sets the active rank of every linear layer, in the order of elora_model_layer_info(); 0 turns an adapter off.
// Channels and blocks stay those of the subnet that is active; otherwise as elora_session_set_subnet().
elora_status elora_session_set_ranks(struct elora_session *session, const uint32_t *ranks, size_t n_ranks);

// Copies the active rank of every linear layer to `ranks`, and their number to `*n`. ELORA_STATUS_INSUFFICIENT_SIZE,
// with only `*n` written, where there are more than `cap`; `ranks` may be NULL where `cap` is 0, and `n` may be
// NULL.
elora_status elora_session_ranks(struct elora_session *session, uint32_t *ranks, size_t cap, size_t *n);

// Forgets all tokens.
elora_status elora_session_reset(struct elora_session *session);

// Forgets all tokens but the first `n_tokens`; nothing where the session holds no more than that.
elora_status elora_session_truncate(struct elora_session *session, size_t n_tokens);

// Tokens that the session holds. 0 for NULL, and while another call is in the session.
size_t elora_session_position(struct elora_session *session);

// Tokens that the session holds at most. 0 for NULL, and while another call is in the session.
size_t elora_session_capacity(struct elora_session *session);

// Appends tokens, one or many, and writes the logits after the last to `logits`: elora_model_vocab_size() numbers,
// for which `logits_len` must have room. `logits` may be NULL. On failure the session holds the tokens that it held
// before. ELORA_STATUS_CONTEXT_FULL where there is no room for so many.
elora_status elora_session_decode(struct elora_session *session,
                                  const elora_token *tokens,
                                  size_t n_tokens,
                                  float *logits,
                                  size_t logits_len);

// elora_session_decode() with the logits after every token: `n_tokens` rows of elora_model_vocab_size() numbers.
elora_status elora_session_decode_all(struct elora_session *session,
                                      const elora_token *tokens,
                                      size_t n_tokens,
                                      float *logits,
                                      size_t logits_len);

// Appends one token to each of several sessions on one model with the same subnet: the weights are read once for all
// of them. `tokens` has one for each session, and `logits` has room for `n_sessions` rows of
// elora_model_vocab_size() numbers, or is NULL. No session may be there twice. On failure every session holds the
// tokens that it held before.
elora_status elora_session_decode_batch(struct elora_session *const *sessions,
                                        size_t n_sessions,
                                        const elora_token *tokens,
                                        float *logits,
                                        size_t logits_len);

// Sets every field to its default, greedy decoding. `struct_size` is sizeof(elora_generate_options).
elora_status elora_generate_options_init(struct elora_generate_options *options, size_t struct_size);

// Appends a prompt and goes on from it, token by token, until a stop token, `options->max_new_tokens`, or the end of
// the context. `options` may be NULL for the defaults.
//
// Each new token is shown to `on_token`, with `userdata`, as soon as it is there, if `on_token` is not NULL. All of
// them are written to `out`, which has room for `cap`, and their number to `*n_out`, if `out` and `n_out` are not
// NULL; without `out`, `options->max_new_tokens` must be set. ELORA_STATUS_CANCELLED where `on_token` returned
// false; the tokens so far are written then, too. Unless a stop token ended it, the last token of the output is not yet
// in the session: give it with what comes next.
elora_status elora_session_generate(struct elora_session *session,
                                    const elora_token *prompt,
                                    size_t n_prompt,
                                    const struct elora_generate_options *options,
                                    elora_token_fn on_token,
                                    void *userdata,
                                    elora_token *out,
                                    size_t cap,
                                    size_t *n_out);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* ELASTIC_LORA_H */


