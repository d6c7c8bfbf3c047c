/* elastic_lora.h: C and C++ interface for running models that were compressed with elastic low-rank
 * adapters. Generated from src/ffi; do not edit.
 *
 * Handles are opaque. A `const` handle (elora_model, elora_linear) is immutable and
 * reference-counted; any number of threads may use it at once. A handle without `const`
 * (elora_session) may be used by one thread at a time. A handle keeps alive what it needs of the
 * handles from which it was made, so handles may be freed in any order. Every function that frees a
 * handle accepts NULL.
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

// Major version of the library that this header belongs to.
#define ELORA_VERSION_MAJOR 0

// Minor version of the library that this header belongs to.
#define ELORA_VERSION_MINOR 1

// Patch version of the library that this header belongs to.
#define ELORA_VERSION_PATCH 0

// Version of the binary interface, which changes when binary compatibility breaks. Compare it with
// elora_abi_version().
#define ELORA_ABI_VERSION 0

// A linear layer of a model, with the rank and sizes of one subnet. Immutable and
// reference-counted: any number of threads may use it at once. It keeps alive what it needs of the
// model.
typedef struct elora_linear elora_linear;

// A model: weights, adapters, subnets and tokenizer. Immutable and reference-counted: any number
// of threads may use it at once.
typedef struct elora_model elora_model;

// One sequence on a model, with its key/value cache. Mutable: it may be used by one thread at a
// time. A call that comes while another call uses the session, from another thread or from the
// session's own callback, fails with ELORA_STATUS_INVALID_STATE. It keeps alive what it needs of
// the model.
typedef struct elora_session elora_session;

// Outcome of a call: ELORA_STATUS_OK or another ELORA_STATUS_ constant. Numbers are never reused.
// Treat an unknown number as a failure.
typedef int32_t elora_status;

// When the checksums in a bundle are verified; one of the ELORA_VERIFY_ constants. In every mode,
// indices stored in a weight are bounds-checked before its first use, so a corrupt file cannot
// cause out-of-bounds access.
typedef int32_t elora_verify;

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

// Special tokens that the tokenizer adds to a text; one of the ELORA_SPECIAL_ constants.
typedef int32_t elora_special;

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

// Precision to which activations are quantized before multiplication with integer weights (formats
// ELORA_WEIGHT_FORMAT_INT and ELORA_WEIGHT_FORMAT_SPARSE_INT); one of the ELORA_ACTIVATIONS_
// constants. It has no effect on layers in other formats.
typedef int32_t elora_activations;

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

// Storage format of the key/value cache; one of the ELORA_CACHE_ constants.
typedef int32_t elora_cache_format;

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

// No special tokens.
#define ELORA_SPECIAL_NONE 0

// The special tokens that begin a text, for a text that will be continued.
#define ELORA_SPECIAL_PROMPT 1

// The special tokens that begin and end a text, for a complete text.
#define ELORA_SPECIAL_FULL 2

// 16-bit integers with one scale for each 128 activations. The rounding error is at most 1.6e-5 of
// the largest of the 128.
#define ELORA_ACTIVATIONS_INT16 0

// 8-bit integers with one scale for each 128 activations. The rounding error is at most 0.4 % of
// the largest of the 128; the multiplications take about half the work.
#define ELORA_ACTIVATIONS_INT8 1

// 32-bit float.
#define ELORA_DTYPE_F32 0

// IEEE 754 half precision, 16 bits.
#define ELORA_DTYPE_F16 1

// bfloat16, 16 bits.
#define ELORA_DTYPE_BF16 2

// 32-bit floats. Keys and values are stored exactly as computed.
#define ELORA_CACHE_F32 0

// IEEE 754 half precision: half the memory. Keys and values are rounded to nearest.
#define ELORA_CACHE_F16 1

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

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

// Sets every field of `*options` to its default. `struct_size` is sizeof(elora_model_options).
elora_status elora_model_options_init(struct elora_model_options *options, size_t struct_size);

// Loads a model from a bundle file or a Hugging Face folder (dense, GPTQ or compressed-tensors).
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

// Whether the model has a tokenizer. Returns false if `model` is NULL.
bool elora_model_has_tokenizer(const struct elora_model *model);

// Converts a text to tokens. Writes them to `tokens`, a buffer of `cap` elements, and their number
// to `*n`. `special` is an ELORA_SPECIAL_ constant. `tokens` may be NULL if `cap` is 0, and `n`
// may be NULL.
//
// ELORA_STATUS_INSUFFICIENT_SIZE if there are more than `cap` tokens; then only `*n` is written.
// ELORA_STATUS_NOT_FOUND if the model has no tokenizer.
elora_status elora_model_tokenize(const struct elora_model *model,
                                  const char *text,
                                  elora_special special,
                                  elora_token *tokens,
                                  size_t cap,
                                  size_t *n);

// Converts `n_tokens` tokens to text, without special tokens, and copies it to `buf`. `buf`, `cap`
// and `len` are as in elora_last_error(). ELORA_STATUS_NOT_FOUND if the model has no tokenizer.
//
// A character may consist of several tokens. To show text while it is generated, convert all
// tokens so far, not each token alone.
elora_status elora_model_detokenize(const struct elora_model *model,
                                    const elora_token *tokens,
                                    size_t n_tokens,
                                    char *buf,
                                    size_t cap,
                                    size_t *len);

// Describes the whole model. Set `info->struct_size` before the call. The number of heads and the
// MLP width of a block follow from the sizes of its layers.
elora_status elora_model_describe(const struct elora_model *model, struct elora_model_info *info);

// Writes the embeddings of `n_tokens` tokens to `out`: `n_tokens` rows of hidden_size elements.
// `out_len` is the length of `out` in elements. ELORA_STATUS_INSUFFICIENT_SIZE if it is too short.
elora_status elora_model_embed(const struct elora_model *model,
                               const elora_token *tokens,
                               size_t n_tokens,
                               float *out,
                               size_t out_len);

// Copies the gains of a norm, hidden_size elements, to `out`, a buffer of `out_len` elements.
// `name` is the tensor's name in Hugging Face's files, such as
// "model.layers.0.input_layernorm.weight" or "model.norm.weight". ELORA_STATUS_NOT_FOUND if there
// is no norm of that name; ELORA_STATUS_INSUFFICIENT_SIZE if `out` is too short.
elora_status elora_model_norm(const struct elora_model *model, const char *name, float *out, size_t out_len);

// Writes the cosines and sines of the rotary embedding at `position`, head_dim / 2 elements each.
// `cos` and `sin` are buffers of `len` elements each and must not overlap. Element i rotates
// elements i and i + head_dim / 2 of a head. ELORA_STATUS_INSUFFICIENT_SIZE if `len` is too small;
// ELORA_STATUS_UNSUPPORTED if the blocks of the model compute more or other than those of Llama,
// as those of Qwen3, SmolLM3, Gemma and some of Phi do: use a session for them.
elora_status elora_model_rotary(const struct elora_model *model, size_t position, float *cos, float *sin, size_t len);

// Sets every field of `*options` to its default. `struct_size` is sizeof(elora_linear_options).
elora_status elora_linear_options_init(struct elora_linear_options *options, size_t struct_size);

// Creates a handle to a linear layer under a subnet, including its adapter.
//
// `layer` is an index below elora_model_layer_count(); `subnet` is an index below
// elora_model_subnet_count(), and 0 is the whole model. `options` may be NULL for the defaults. On
// success `*out` is a new handle; release it with elora_linear_free().
//
// ELORA_STATUS_INVALID_ARGUMENT if an index is out of range or the subnet leaves the layer out.
elora_status elora_linear_new(const struct elora_model *model,
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

// Sets every field of `*options` to its default. `struct_size` is sizeof(elora_session_options).
elora_status elora_session_options_init(struct elora_session_options *options, size_t struct_size);

// Creates an empty session on a model. The whole model (subnet 0) is active. `options` may be NULL
// for the defaults. On success `*out` is a new handle; release it with elora_session_free().
elora_status elora_session_new(const struct elora_model *model,
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

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* ELASTIC_LORA_H */


