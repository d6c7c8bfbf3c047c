/* The layout of the public structs on machines with 64-bit pointers: a change is a break of the binary interface. */
#include <stddef.h>

#include "elastic_lora.h"

#define AT(type, field, offset) _Static_assert(offsetof(type, field) == (offset), #type "." #field)
#define SIZE(type, size) _Static_assert(sizeof(type) == (size), #type)

_Static_assert(sizeof(elora_status) == 4 && (elora_status)-1 < 0, "elora_status is int32_t");
_Static_assert(sizeof(elora_token) == 4 && (elora_token)-1 < 0, "elora_token is int32_t");
_Static_assert(ELORA_STATUS_OK == 0 && ELORA_STATUS_PANIC == 100, "statuses keep their numbers");
_Static_assert(ELORA_STATUS_NULL_POINTER == 1 && ELORA_STATUS_INVALID_ARGUMENT == 2, "statuses keep their numbers");
_Static_assert(ELORA_STATUS_INSUFFICIENT_SIZE == 3 && ELORA_STATUS_IO == 4, "statuses keep their numbers");
_Static_assert(ELORA_STATUS_INVALID_FORMAT == 5 && ELORA_STATUS_UNSUPPORTED == 6, "statuses keep their numbers");
_Static_assert(ELORA_STATUS_NOT_FOUND == 7 && ELORA_STATUS_INVALID_STATE == 8, "statuses keep their numbers");
_Static_assert(ELORA_STATUS_CANCELLED == 9 && ELORA_STATUS_CONTEXT_FULL == 10, "statuses keep their numbers");
_Static_assert(ELORA_STATUS_OUT_OF_MEMORY == 11, "statuses keep their numbers");

#if UINTPTR_MAX == 0xffffffffffffffff
SIZE(elora_model_options, 40);
AT(elora_model_options, struct_size, 0);
AT(elora_model_options, n_threads, 8);
AT(elora_model_options, use_mmap, 12);
AT(elora_model_options, verify, 16);
AT(elora_model_options, reserved, 20);
AT(elora_model_options, progress, 24);
AT(elora_model_options, progress_userdata, 32);

SIZE(elora_layer_info, 80);
AT(elora_layer_info, struct_size, 0);
AT(elora_layer_info, name, 8);
AT(elora_layer_info, in_features, 16);
AT(elora_layer_info, out_features, 24);
AT(elora_layer_info, max_rank, 32);
AT(elora_layer_info, weight_bytes, 40);
AT(elora_layer_info, adapter_bytes, 48);
AT(elora_layer_info, group_size, 56);
AT(elora_layer_info, format, 64);
AT(elora_layer_info, bits, 68);
AT(elora_layer_info, has_bias, 72);
AT(elora_layer_info, reserved, 76);

SIZE(elora_model_info, 64);
AT(elora_model_info, struct_size, 0);
AT(elora_model_info, vocab_size, 8);
AT(elora_model_info, context_size, 16);
AT(elora_model_info, hidden_size, 24);
AT(elora_model_info, n_blocks, 32);
AT(elora_model_info, head_dim, 40);
AT(elora_model_info, sliding_window, 48);
AT(elora_model_info, norm_epsilon, 56);

SIZE(elora_linear_options, 16);
AT(elora_linear_options, struct_size, 0);
AT(elora_linear_options, activations, 8);
AT(elora_linear_options, reserved, 12);

SIZE(elora_session_options, 32);
AT(elora_session_options, struct_size, 0);
AT(elora_session_options, n_ctx, 8);
AT(elora_session_options, prefill_rows, 16);
AT(elora_session_options, cache_format, 24);
AT(elora_session_options, activations, 28);

SIZE(elora_generate_options, 72);
AT(elora_generate_options, struct_size, 0);
AT(elora_generate_options, max_new_tokens, 8);
AT(elora_generate_options, stop_tokens, 16);
AT(elora_generate_options, n_stop_tokens, 24);
AT(elora_generate_options, temperature, 32);
AT(elora_generate_options, top_p, 40);
AT(elora_generate_options, min_p, 48);
AT(elora_generate_options, seed, 56);
AT(elora_generate_options, top_k, 64);
AT(elora_generate_options, ignore_stop_tokens, 68);

SIZE(elora_sampler_options, 104);
AT(elora_sampler_options, struct_size, 0);
AT(elora_sampler_options, temperature, 8);
AT(elora_sampler_options, top_p, 16);
AT(elora_sampler_options, min_p, 24);
AT(elora_sampler_options, repetition_penalty, 32);
AT(elora_sampler_options, frequency_penalty, 40);
AT(elora_sampler_options, presence_penalty, 48);
AT(elora_sampler_options, seed, 56);
AT(elora_sampler_options, stream, 64);
AT(elora_sampler_options, bias_tokens, 72);
AT(elora_sampler_options, bias_values, 80);
AT(elora_sampler_options, n_bias, 88);
AT(elora_sampler_options, top_k, 96);
AT(elora_sampler_options, reserved, 100);

SIZE(elora_text_options, 32);
AT(elora_text_options, struct_size, 0);
AT(elora_text_options, stop_strings, 8);
AT(elora_text_options, n_stop_strings, 16);
AT(elora_text_options, show_special, 24);
AT(elora_text_options, reserved, 28);

SIZE(elora_step, 56);
AT(elora_step, struct_size, 0);
AT(elora_step, session, 8);
AT(elora_step, tokens, 16);
AT(elora_step, n_tokens, 24);
AT(elora_step, logits, 32);
AT(elora_step, logits_len, 40);
AT(elora_step, n_logits, 48);

SIZE(elora_convert_options, 56);
AT(elora_convert_options, struct_size, 0);
AT(elora_convert_options, group_size, 8);
AT(elora_convert_options, format, 16);
AT(elora_convert_options, bits, 20);
AT(elora_convert_options, symmetric, 24);
AT(elora_convert_options, n, 28);
AT(elora_convert_options, m, 32);
AT(elora_convert_options, embedding_format, 36);
AT(elora_convert_options, embedding_bits, 40);
AT(elora_convert_options, head_format, 44);
AT(elora_convert_options, head_bits, 48);
AT(elora_convert_options, adapter_format, 52);
#endif
