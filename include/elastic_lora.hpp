// elastic_lora.hpp: header-only C++ wrapper of elastic_lora.h, which documents all functions and
// options. Requires C++11. std::string_view is accepted from C++17 on, std::span from C++20 on.
//
// model and linear are shared handles: copies are cheap, and any number of threads may use one at
// once. A session is movable, not copyable, and may be used by one thread at a time. Each object
// keeps alive what it needs of the object that made it.
//
// Functions that fail throw elora::error. If ELASTIC_LORA_NO_EXCEPTIONS is defined or exceptions
// are disabled, they return an elora::result<T> instead, which holds either a T or a status and an
// error text. elora::returns<T> is T in the first case and result<T> in the second.

#ifndef ELASTIC_LORA_HPP
#define ELASTIC_LORA_HPP

#include "elastic_lora.h"

#if !defined(ELASTIC_LORA_NO_EXCEPTIONS) && !defined(__cpp_exceptions) && !defined(__EXCEPTIONS) && !defined(_CPPUNWIND)
#define ELASTIC_LORA_NO_EXCEPTIONS
#endif

#include <cstddef>
#include <cstdint>
#include <functional>
#include <iterator>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(ELASTIC_LORA_NO_EXCEPTIONS)
#include <cstdlib>
#else
#include <exception>
#include <stdexcept>
#endif

#if defined(_MSVC_LANG)
#define ELASTIC_LORA_CPLUSPLUS _MSVC_LANG
#else
#define ELASTIC_LORA_CPLUSPLUS __cplusplus
#endif

#if ELASTIC_LORA_CPLUSPLUS >= 201703L
#include <string_view>
#define ELASTIC_LORA_NODISCARD [[nodiscard]]
#else
#define ELASTIC_LORA_NODISCARD
#endif

namespace elora {

// Id of a token.
using token = elora_token;

// Outcome of a call; see the ELORA_STATUS_ constants.
enum class status : std::int32_t {
    ok = ELORA_STATUS_OK,
    null_pointer = ELORA_STATUS_NULL_POINTER,
    invalid_argument = ELORA_STATUS_INVALID_ARGUMENT,
    insufficient_size = ELORA_STATUS_INSUFFICIENT_SIZE,
    io = ELORA_STATUS_IO,
    invalid_format = ELORA_STATUS_INVALID_FORMAT,
    unsupported = ELORA_STATUS_UNSUPPORTED,
    not_found = ELORA_STATUS_NOT_FOUND,
    invalid_state = ELORA_STATUS_INVALID_STATE,
    cancelled = ELORA_STATUS_CANCELLED,
    context_full = ELORA_STATUS_CONTEXT_FULL,
    out_of_memory = ELORA_STATUS_OUT_OF_MEMORY,
    panic = ELORA_STATUS_PANIC
};

// When checksums are verified; see elora_verify.
enum class verify : std::int32_t {
    on_use = ELORA_VERIFY_ON_USE,
    on_load = ELORA_VERIFY_ON_LOAD,
    never = ELORA_VERIFY_NEVER
};

// Storage format of a weight; see elora_weight_format.
enum class weight_format : std::int32_t {
    f32 = ELORA_WEIGHT_FORMAT_F32,
    f16 = ELORA_WEIGHT_FORMAT_F16,
    bf16 = ELORA_WEIGHT_FORMAT_BF16,
    integer = ELORA_WEIGHT_FORMAT_INT,
    sparse_f16 = ELORA_WEIGHT_FORMAT_SPARSE_F16,
    sparse_bf16 = ELORA_WEIGHT_FORMAT_SPARSE_BF16,
    sparse_integer = ELORA_WEIGHT_FORMAT_SPARSE_INT,
    nm_f16 = ELORA_WEIGHT_FORMAT_NM_F16,
    nm_bf16 = ELORA_WEIGHT_FORMAT_NM_BF16,
    automatic = ELORA_WEIGHT_FORMAT_AUTO,
    other = ELORA_WEIGHT_FORMAT_OTHER
};

// Precision of the activations; see elora_activations.
enum class activations : std::int32_t { int16 = ELORA_ACTIVATIONS_INT16, int8 = ELORA_ACTIVATIONS_INT8 };

// Type of the elements of a buffer; see elora_dtype.
enum class dtype : std::int32_t { f32 = ELORA_DTYPE_F32, f16 = ELORA_DTYPE_F16, bf16 = ELORA_DTYPE_BF16 };

// Storage format of the key/value cache; see elora_cache_format.
enum class cache_format : std::int32_t { f32 = ELORA_CACHE_F32, f16 = ELORA_CACHE_F16 };

// Special tokens that the tokenizer adds; see elora_special.
enum class special : std::int32_t {
    none = ELORA_SPECIAL_NONE,
    prompt = ELORA_SPECIAL_PROMPT,
    full = ELORA_SPECIAL_FULL
};

// A token with a role; see elora_token_role.
enum class token_role : std::int32_t {
    begin = ELORA_TOKEN_BEGIN,
    end = ELORA_TOKEN_END,
    end_of_turn = ELORA_TOKEN_END_OF_TURN
};

// A view of elements that it does not own, like std::span of C++20.
template <class T>
class span {
public:
    using element_type = T;
    using value_type = typename std::remove_cv<T>::type;

    span() noexcept : data_(nullptr), size_(0) {}
    span(T *data, std::size_t size) noexcept : data_(data), size_(size) {}
    template <std::size_t N>
    span(T (&array)[N]) noexcept : data_(array), size_(N) {}
    // Accepts any container with data() and size(): std::vector, std::array, std::string,
    // std::span.
    template <class C, class = typename std::enable_if<std::is_convertible<
                           typename std::remove_pointer<decltype(std::declval<C &>().data())>::type (*)[],
                           T (*)[]>::value>::type,
              class = decltype(std::declval<C &>().size())>
    span(C &container) noexcept : data_(container.data()), size_(container.size()) {}
    template <class C, class = typename std::enable_if<std::is_convertible<
                           typename std::remove_pointer<decltype(std::declval<const C &>().data())>::type (*)[],
                           T (*)[]>::value>::type,
              class = decltype(std::declval<const C &>().size()), class = void>
    span(const C &container) noexcept : data_(container.data()), size_(container.size()) {}

    T *data() const noexcept { return data_; }
    std::size_t size() const noexcept { return size_; }
    bool empty() const noexcept { return size_ == 0; }
    T &operator[](std::size_t index) const { return data_[index]; }
    T *begin() const noexcept { return data_; }
    T *end() const noexcept { return data_ + size_; }

private:
    T *data_;
    std::size_t size_;
};

// A NUL-terminated string argument. A const char * or std::string must stay alive during the call;
// a std::string_view is copied to add the NUL.
class text_arg {
public:
    text_arg(const char *text) : pointer_(text) {}
    text_arg(const std::string &text) : pointer_(text.c_str()) {}
#if ELASTIC_LORA_CPLUSPLUS >= 201703L
    text_arg(std::string_view text) : own_(text), pointer_(own_.c_str()) {}
    text_arg(const text_arg &) = delete;
    text_arg &operator=(const text_arg &) = delete;
#endif
    const char *c_str() const { return pointer_; }

private:
#if ELASTIC_LORA_CPLUSPLUS >= 201703L
    std::string own_;
#endif
    const char *pointer_;
};

// Name of a status, such as "ELORA_STATUS_OK".
inline const char *name(status code) { return elora_status_name(static_cast<elora_status>(code)); }

// Version of the linked library.
inline const char *version() { return elora_version(); }

// Whether the linked library has the binary interface of this header.
inline bool abi_matches() { return elora_abi_version() == ELORA_ABI_VERSION; }

// Error text of this thread's last failed call.
inline std::string last_error() {
    std::size_t size = 0;
    elora_last_error(nullptr, 0, &size);
    std::string text(size + 1, '\0');
    if (elora_last_error(&text[0], text.size(), &size) != ELORA_STATUS_OK) {
        size = 0;
    }
    text.resize(size);
    return text;
}

#if defined(ELASTIC_LORA_NO_EXCEPTIONS)

// A value, or a status and an error text.
template <class T>
class ELASTIC_LORA_NODISCARD result {
public:
    result(T value) : value_(std::move(value)), status_(elora::status::ok) {}
    result(elora::status code, std::string text) : value_(), status_(code), text_(std::move(text)) {}

    bool has_value() const noexcept { return status_ == elora::status::ok; }
    explicit operator bool() const noexcept { return has_value(); }
    elora::status status() const noexcept { return status_; }
    const std::string &error() const noexcept { return text_; }
    // Returns the value. If there is none, the program is aborted.
    T &value() & { return check(), value_; }
    const T &value() const & { return check(), value_; }
    T &&value() && { return check(), std::move(value_); }
    T &operator*() & { return value(); }
    T &&operator*() && { return std::move(*this).value(); }
    T *operator->() { return &value(); }

private:
    void check() const {
        if (!has_value()) {
            std::abort();
        }
    }

    T value_;
    elora::status status_;
    std::string text_;
};

// Success, or a status and an error text.
template <>
class ELASTIC_LORA_NODISCARD result<void> {
public:
    result() : status_(elora::status::ok) {}
    result(elora::status code, std::string text) : status_(code), text_(std::move(text)) {}

    bool has_value() const noexcept { return status_ == elora::status::ok; }
    explicit operator bool() const noexcept { return has_value(); }
    elora::status status() const noexcept { return status_; }
    const std::string &error() const noexcept { return text_; }

private:
    elora::status status_;
    std::string text_;
};

template <class T>
using returns = result<T>;

#else

// Exception thrown by a call that failed.
class error : public std::runtime_error {
public:
    error(elora::status code, const std::string &text) : std::runtime_error(text), status_(code) {}
    elora::status status() const noexcept { return status_; }

private:
    elora::status status_;
};

template <class T>
using returns = T;

#endif

namespace detail {

// Ends a call that returns a value: returns the value, or reports the failure.
template <class T>
returns<T> finish(elora_status code, T value) {
    if (code != ELORA_STATUS_OK) {
#if defined(ELASTIC_LORA_NO_EXCEPTIONS)
        return returns<T>(static_cast<status>(code), last_error());
#else
        throw error(static_cast<status>(code), last_error());
#endif
    }
    return returns<T>(std::move(value));
}

// Ends a call that returns no value: reports a failure, if there is one.
inline returns<void> finish(elora_status code) {
    if (code != ELORA_STATUS_OK) {
#if defined(ELASTIC_LORA_NO_EXCEPTIONS)
        return returns<void>(static_cast<status>(code), last_error());
#else
        throw error(static_cast<status>(code), last_error());
#endif
    }
    return returns<void>();
}

// Makes a call that copies elements out: the first call gets the number, the second the elements.
template <class T, class Call>
returns<std::vector<T>> elements(Call call) {
    std::size_t size = 0;
    elora_status code = call(nullptr, std::size_t(0), &size);
    std::vector<T> found;
    if (code == ELORA_STATUS_INSUFFICIENT_SIZE) {
        found.resize(size);
        code = call(found.data(), found.size(), &size);
    }
    return finish(code, std::move(found));
}

// Makes a call that copies a text out: the first call gets the length, the second the text.
template <class Call>
returns<std::string> text(Call call) {
    std::size_t size = 0;
    elora_status code = call(nullptr, std::size_t(0), &size);
    std::string found;
    if (code == ELORA_STATUS_INSUFFICIENT_SIZE) {
        found.resize(size + 1);
        code = call(&found[0], found.size(), &size);
        found.resize(code == ELORA_STATUS_OK ? size : 0);
    }
    return finish(code, std::move(found));
}

// A shared handle to an immutable object.
template <class T, const T *(*Retain)(const T *), void (*Free)(const T *)>
class shared_handle {
public:
    shared_handle() noexcept : pointer_(nullptr) {}
    explicit shared_handle(const T *pointer) noexcept : pointer_(pointer) {}
    shared_handle(const shared_handle &other) noexcept
        : pointer_(other.pointer_ == nullptr ? nullptr : Retain(other.pointer_)) {}
    shared_handle(shared_handle &&other) noexcept : pointer_(other.pointer_) { other.pointer_ = nullptr; }
    shared_handle &operator=(shared_handle other) noexcept {
        std::swap(pointer_, other.pointer_);
        return *this;
    }
    ~shared_handle() { Free(pointer_); }

    const T *get() const noexcept { return pointer_; }
    const T **out() noexcept { return &pointer_; }

private:
    const T *pointer_;
};

// An iterator over anything with size() and operator[].
template <class List, class Item>
class index_iterator {
public:
    using iterator_category = std::input_iterator_tag;
    using value_type = Item;
    using difference_type = std::ptrdiff_t;
    using pointer = const Item *;
    using reference = Item;

    index_iterator(const List *list, std::size_t index) : list_(list), index_(index) {}
    Item operator*() const { return (*list_)[index_]; }
    index_iterator &operator++() {
        ++index_;
        return *this;
    }
    index_iterator operator++(int) {
        index_iterator old = *this;
        ++index_;
        return old;
    }
    bool operator==(const index_iterator &other) const { return index_ == other.index_; }
    bool operator!=(const index_iterator &other) const { return index_ != other.index_; }

private:
    const List *list_;
    std::size_t index_;
};

// A range for range-based for loops. It keeps its owner alive.
template <class Owner, class Item, std::size_t (Owner::*Count)() const, Item (Owner::*At)(std::size_t) const>
class list {
public:
    using iterator = index_iterator<list, Item>;
    explicit list(Owner owner) : owner_(std::move(owner)), size_((owner_.*Count)()) {}
    std::size_t size() const noexcept { return size_; }
    Item operator[](std::size_t index) const { return (owner_.*At)(index); }
    iterator begin() const { return iterator(this, 0); }
    iterator end() const { return iterator(this, size_); }

private:
    Owner owner_;
    std::size_t size_;
};

} // namespace detail

// Options for loading a model; see elora_model_options.
struct model_options {
    std::uint32_t n_threads = 0;
    bool use_mmap = true;
    elora::verify verify = elora::verify::on_use;
    // Is called for each layer that is loaded, with `progress_userdata`; see elora_progress_fn.
    elora_progress_fn progress = nullptr;
    void *progress_userdata = nullptr;

    elora_model_options to_c() const {
        elora_model_options options;
        elora_model_options_init(&options, sizeof options);
        options.n_threads = n_threads;
        options.use_mmap = use_mmap ? 1u : 0u;
        options.verify = static_cast<elora_verify>(verify);
        options.progress = progress;
        options.progress_userdata = progress_userdata;
        return options;
    }
};

// Session options; see elora_session_options.
struct session_options {
    std::size_t n_ctx = 0;
    std::size_t prefill_rows = 0;
    cache_format cache = cache_format::f32;
    elora::activations activations = elora::activations::int16;

    elora_session_options to_c() const {
        elora_session_options options;
        elora_session_options_init(&options, sizeof options);
        options.n_ctx = n_ctx;
        options.prefill_rows = prefill_rows;
        options.cache_format = static_cast<elora_cache_format>(cache);
        options.activations = static_cast<elora_activations>(activations);
        return options;
    }
};

// Text-generation options; see elora_generate_options. max_new_tokens is also the size of the output
// buffer; 0 for as many tokens as the session has room for.
struct generate_options {
    std::size_t max_new_tokens = 128;
    std::vector<token> stop_tokens;
    bool ignore_stop_tokens = false;
    double temperature = 0.0;
    double top_p = 1.0;
    double min_p = 0.0;
    std::uint32_t top_k = 0;
    std::uint64_t seed = 0;

    elora_generate_options to_c() const {
        elora_generate_options options;
        elora_generate_options_init(&options, sizeof options);
        options.max_new_tokens = max_new_tokens;
        options.stop_tokens = stop_tokens.data();
        options.n_stop_tokens = stop_tokens.size();
        options.temperature = temperature;
        options.top_p = top_p;
        options.min_p = min_p;
        options.seed = seed;
        options.top_k = top_k;
        options.ignore_stop_tokens = ignore_stop_tokens ? 1u : 0u;
        return options;
    }
};

// Sampler options; see elora_sampler_options.
struct sampler_options {
    double temperature = 0.0;
    double top_p = 1.0;
    double min_p = 0.0;
    std::uint32_t top_k = 0;
    double repetition_penalty = 1.0;
    double frequency_penalty = 0.0;
    double presence_penalty = 0.0;
    std::uint64_t seed = 0;
    std::uint64_t stream = 0;
    // Tokens and the numbers that are added to their logits, as many as tokens.
    std::vector<token> bias_tokens;
    std::vector<float> bias_values;

    elora_sampler_options to_c() const {
        elora_sampler_options options;
        elora_sampler_options_init(&options, sizeof options);
        options.temperature = temperature;
        options.top_p = top_p;
        options.min_p = min_p;
        options.top_k = top_k;
        options.repetition_penalty = repetition_penalty;
        options.frequency_penalty = frequency_penalty;
        options.presence_penalty = presence_penalty;
        options.seed = seed;
        options.stream = stream;
        options.bias_tokens = bias_tokens.data();
        options.bias_values = bias_values.data();
        options.n_bias = bias_tokens.size() < bias_values.size() ? bias_tokens.size() : bias_values.size();
        return options;
    }
};

// How a model is stored; see elora_convert_options.
struct convert_options {
    weight_format format = weight_format::integer;
    std::uint32_t bits = 4;
    std::size_t group_size = 128;
    bool symmetric = false;
    std::uint32_t n = 2;
    std::uint32_t m = 4;
    weight_format embedding_format = weight_format::automatic;
    std::uint32_t embedding_bits = 8;
    weight_format head_format = weight_format::automatic;
    std::uint32_t head_bits = 8;
    weight_format adapter_format = weight_format::automatic;

    elora_convert_options to_c() const {
        elora_convert_options options;
        elora_convert_options_init(&options, sizeof options);
        options.format = static_cast<elora_weight_format>(format);
        options.bits = bits;
        options.group_size = group_size;
        options.symmetric = symmetric ? 1u : 0u;
        options.n = n;
        options.m = m;
        options.embedding_format = static_cast<elora_weight_format>(embedding_format);
        options.embedding_bits = embedding_bits;
        options.head_format = static_cast<elora_weight_format>(head_format);
        options.head_bits = head_bits;
        options.adapter_format = static_cast<elora_weight_format>(adapter_format);
        return options;
    }
};

// A turn of a conversation.
struct message {
    std::string role;
    std::string content;
};

// Description of a linear layer, with the sizes of the whole model; see elora_layer_info.
struct layer_info {
    std::size_t index = 0;
    std::string name;
    std::size_t in_features = 0;
    std::size_t out_features = 0;
    std::size_t max_rank = 0;
    std::size_t weight_bytes = 0;
    std::size_t adapter_bytes = 0;
    std::size_t group_size = 0;
    weight_format format = weight_format::other;
    std::uint32_t bits = 0;
    bool has_bias = false;
};

// Sizes and constants of a model; see elora_model_info.
struct model_info {
    std::size_t vocab_size = 0;
    std::size_t context_size = 0;
    std::size_t hidden_size = 0;
    std::size_t n_blocks = 0;
    std::size_t head_dim = 0;
    std::size_t sliding_window = 0;
    double norm_epsilon = 0.0;
};

// Index and name of a subnet.
struct subnet_info {
    std::size_t index = 0;
    std::string name;
};

class adapter;
class linear;
class session;

// A model. Immutable; copies share it. Each function calls elora_model_ and its name.
class model {
public:
    // Creates an empty object, which holds no model. Functions that need a model fail on it.
    model() = default;
    // Takes ownership of a handle of the C interface.
    explicit model(const elora_model *handle) : handle_(handle) {}

    // Loads a model from a bundle file, a Hugging Face folder or a GGUF file.
    static returns<model> load(const text_arg &path, const model_options &options = model_options()) {
        const elora_model_options c = options.to_c();
        model loaded;
        const elora_status code = elora_model_load(path.c_str(), &c, loaded.handle_.out());
        return detail::finish(code, std::move(loaded));
    }

    // Loads a bundle from memory. If `copy` is false, the bytes are used in place and must stay; see
    // elora_model_load_memory().
    static returns<model> load_memory(const void *bytes, std::size_t size, bool copy = true,
                                      const model_options &options = model_options()) {
        const elora_model_options c = options.to_c();
        model loaded;
        const elora_status code = elora_model_load_memory(bytes, size, copy, &c, loaded.handle_.out());
        return detail::finish(code, std::move(loaded));
    }

    // Loads a bundle from an open file descriptor.
    static returns<model> load_fd(int fd, const model_options &options = model_options()) {
        const elora_model_options c = options.to_c();
        model loaded;
        const elora_status code = elora_model_load_fd(fd, &c, loaded.handle_.out());
        return detail::finish(code, std::move(loaded));
    }

    explicit operator bool() const noexcept { return get() != nullptr; }
    // Returns the handle of the C interface; this object keeps its ownership.
    const elora_model *get() const noexcept { return handle_.get(); }

    // Counts and sizes; see the functions of the C interface. An empty object returns 0.
    std::size_t vocab_size() const { return elora_model_vocab_size(get()); }
    std::size_t context_size() const { return elora_model_context_size(get()); }
    std::size_t weight_bytes() const { return elora_model_weight_bytes(get()); }
    std::size_t layer_count() const { return elora_model_layer_count(get()); }
    std::size_t subnet_count() const { return elora_model_subnet_count(get()); }

    // Returns the description of a layer.
    returns<layer_info> layer(std::size_t index) const {
        elora_layer_info c = elora_layer_info();
        c.struct_size = sizeof c;
        const elora_status code = elora_model_layer_info(get(), index, &c);
        layer_info info;
        if (code == ELORA_STATUS_OK) {
            info.index = index;
            info.name = c.name;
            info.in_features = c.in_features;
            info.out_features = c.out_features;
            info.max_rank = c.max_rank;
            info.weight_bytes = c.weight_bytes;
            info.adapter_bytes = c.adapter_bytes;
            info.group_size = c.group_size;
            info.format = static_cast<weight_format>(c.format);
            info.bits = c.bits;
            info.has_bias = c.has_bias != 0;
        }
        return detail::finish(code, std::move(info));
    }

    // Returns the index of the layer with this name.
    returns<std::size_t> find_layer(const text_arg &layer_name) const {
        std::size_t index = 0;
        const elora_status code = elora_model_find_layer(get(), layer_name.c_str(), &index);
        return detail::finish(code, index);
    }

    // Returns the index of the subnet with this name.
    returns<std::size_t> find_subnet(const text_arg &subnet_name) const {
        std::size_t index = 0;
        const elora_status code = elora_model_find_subnet(get(), subnet_name.c_str(), &index);
        return detail::finish(code, index);
    }

    // Returns the description of a layer, or an empty one if there is no layer of this index.
    layer_info layer_at(std::size_t index) const {
        if (index >= layer_count()) {
            return layer_info();
        }
#if defined(ELASTIC_LORA_NO_EXCEPTIONS)
        result<layer_info> found = layer(index);
        return found ? *std::move(found) : layer_info();
#else
        return layer(index);
#endif
    }

    // Returns the description of a subnet, or an empty one if there is no subnet of this index.
    subnet_info subnet_at(std::size_t index) const {
        subnet_info info;
        const char *found = elora_model_subnet_name(get(), index);
        if (found != nullptr) {
            info.index = index;
            info.name = found;
        }
        return info;
    }

    using layer_list = detail::list<model, layer_info, &model::layer_count, &model::layer_at>;
    using subnet_list = detail::list<model, subnet_info, &model::subnet_count, &model::subnet_at>;

    // The layers, for use as: for (const elora::layer_info &layer : model.layers()) ...
    layer_list layers() const { return layer_list(*this); }
    // The subnets, for use as: for (const elora::subnet_info &subnet : model.subnets()) ...
    subnet_list subnets() const { return subnet_list(*this); }

    // The search space as JSON.
    returns<std::string> space_json() const {
        const elora_model *handle = get();
        return detail::text([handle](char *buf, std::size_t cap, std::size_t *len) {
            return elora_model_space_json(handle, buf, cap, len);
        });
    }

    // Returns a subnet as a model of its own.
    returns<model> extract(std::size_t subnet) const {
        model cut;
        const elora_status code = elora_model_extract(get(), subnet, cut.handle_.out());
        return detail::finish(code, std::move(cut));
    }

    // Returns the model with its adapters added to its weights, which must be dense.
    returns<model> merge() const {
        model merged;
        const elora_status code = elora_model_merge(get(), merged.handle_.out());
        return detail::finish(code, std::move(merged));
    }

    // Returns the model with its weights stored in other formats.
    returns<model> convert(const convert_options &options = convert_options()) const {
        const elora_convert_options c = options.to_c();
        model converted;
        const elora_status code = elora_model_convert(get(), &c, converted.handle_.out());
        return detail::finish(code, std::move(converted));
    }

    // Returns the model with an adapter as a part of it.
    returns<model> attach(const adapter &added, float scale = 1.0f) const;

    // Writes the model to a file as a bundle.
    returns<void> save(const text_arg &path, bool overwrite = false) const {
        return detail::finish(elora_model_save(get(), path.c_str(), overwrite));
    }

    // Reads and checks all weights.
    returns<void> verify() const { return detail::finish(elora_model_verify(get())); }

    // The tokens that end a generation.
    returns<std::vector<token>> stop_tokens() const {
        const elora_model *handle = get();
        return detail::elements<token>([handle](token *buf, std::size_t cap, std::size_t *n) {
            return elora_model_stop_tokens(handle, buf, cap, n);
        });
    }

    // The token with a role.
    returns<token> special_token(token_role role) const {
        token found = 0;
        const elora_status code = elora_model_special_token(get(), static_cast<elora_token_role>(role), &found);
        return detail::finish(code, found);
    }
    // All special tokens.
    returns<std::vector<token>> special_tokens() const {
        const elora_model *handle = get();
        return detail::elements<token>([handle](token *buf, std::size_t cap, std::size_t *n) {
            return elora_model_special_tokens(handle, buf, cap, n);
        });
    }
    // Number of tokens that may be drawn: the number of logits to pass to a sampler.
    std::size_t token_count() const { return elora_model_token_count(get()); }
    // The bytes that a token adds to a text, perhaps a part of a character.
    returns<std::vector<std::uint8_t>> piece(token id) const {
        const elora_model *handle = get();
        return detail::elements<std::uint8_t>([=](std::uint8_t *buf, std::size_t cap, std::size_t *n) {
            return elora_model_token_piece(handle, id, buf, cap, n);
        });
    }
    // What is stored in the model's files and not used, or used in another way than they say.
    std::size_t notice_count() const { return elora_model_notice_count(get()); }
    returns<std::string> notice(std::size_t index) const {
        const elora_model *handle = get();
        return detail::text([=](char *buf, std::size_t cap, std::size_t *len) {
            return elora_model_notice(handle, index, buf, cap, len);
        });
    }
    // Whether the model has a chat template.
    bool has_chat_template() const { return elora_model_has_chat_template(get()); }
    // Writes a conversation as one text. Tokenize it with special::none.
    returns<std::string> apply_chat_template(span<const message> messages, bool add_generation_prompt = true) const {
        std::vector<const char *> roles, contents;
        for (const message &turn : messages) {
            roles.push_back(turn.role.c_str());
            contents.push_back(turn.content.c_str());
        }
        const elora_model *handle = get();
        return detail::text([&](char *buf, std::size_t cap, std::size_t *len) {
            return elora_model_apply_chat_template(handle, roles.data(), contents.data(), roles.size(),
                                                   add_generation_prompt, buf, cap, len);
        });
    }

    // Whether the model has a tokenizer.
    bool has_tokenizer() const { return elora_model_has_tokenizer(get()); }

    // Converts a text to tokens.
    returns<std::vector<token>> tokenize(const text_arg &text, special around = special::prompt) const {
        const elora_model *handle = get();
        const char *pointer = text.c_str();
        return detail::elements<token>([=](token *buf, std::size_t cap, std::size_t *n) {
            return elora_model_tokenize(handle, pointer, static_cast<elora_special>(around), buf, cap, n);
        });
    }

    // Converts tokens to text, without special tokens.
    returns<std::string> detokenize(span<const token> tokens) const {
        const elora_model *handle = get();
        return detail::text([=](char *buf, std::size_t cap, std::size_t *len) {
            return elora_model_detokenize(handle, tokens.data(), tokens.size(), buf, cap, len);
        });
    }

    // Sizes and constants for a custom inference loop.
    returns<model_info> describe() const {
        elora_model_info c = elora_model_info();
        c.struct_size = sizeof c;
        const elora_status code = elora_model_describe(get(), &c);
        model_info info;
        if (code == ELORA_STATUS_OK) {
            info.vocab_size = c.vocab_size;
            info.context_size = c.context_size;
            info.hidden_size = c.hidden_size;
            info.n_blocks = c.n_blocks;
            info.head_dim = c.head_dim;
            info.sliding_window = c.sliding_window;
            info.norm_epsilon = c.norm_epsilon;
        }
        return detail::finish(code, info);
    }
    // Writes the embeddings of tokens: one row of hidden_size elements for each.
    returns<void> embed(span<const token> tokens, span<float> out) const {
        return detail::finish(elora_model_embed(get(), tokens.data(), tokens.size(), out.data(), out.size()));
    }
    // Writes the gains of a norm, hidden_size elements. `tensor` is the name of its tensor.
    returns<void> norm(const text_arg &tensor, span<float> out) const {
        return detail::finish(elora_model_norm(get(), tensor.c_str(), out.data(), out.size()));
    }
    // Writes the cosines and sines of the rotary embedding at a position, head_dim / 2 elements
    // each.
    returns<void> rotary(std::size_t position, span<float> cos, span<float> sin) const {
        const std::size_t len = cos.size() < sin.size() ? cos.size() : sin.size();
        return detail::finish(elora_model_rotary(get(), position, cos.data(), sin.data(), len));
    }

    // Returns a layer under a subnet; subnet 0 is the whole model.
    returns<elora::linear> linear(std::size_t layer, std::size_t subnet = 0,
                                  activations kept = activations::int16) const;
    // Creates an empty session.
    returns<elora::session> session(const session_options &options = session_options()) const;

private:
    detail::shared_handle<elora_model, elora_model_retain, elora_model_free> handle_;
};

// A LoRA adapter that sessions use at run time. Immutable; copies share it.
class adapter {
public:
    adapter() = default;
    // Takes ownership of a handle of the C interface.
    explicit adapter(const elora_adapter *handle) : handle_(handle) {}

    // Loads a PEFT adapter from its folder, or a LoRA in a GGUF file.
    static returns<adapter> load(const model &base, const text_arg &path) {
        adapter loaded;
        const elora_status code = elora_adapter_load(base.get(), path.c_str(), loaded.handle_.out());
        return detail::finish(code, std::move(loaded));
    }

    explicit operator bool() const noexcept { return get() != nullptr; }
    const elora_adapter *get() const noexcept { return handle_.get(); }
    std::size_t max_rank() const { return elora_adapter_max_rank(get()); }
    std::size_t layer_count() const { return elora_adapter_layer_count(get()); }
    std::size_t bytes() const { return elora_adapter_bytes(get()); }

private:
    detail::shared_handle<elora_adapter, elora_adapter_retain, elora_adapter_free> handle_;
};

// A linear layer that is applied to the caller's buffers. Immutable; copies share it.
class linear {
public:
    linear() = default;
    // Takes ownership of a handle of the C interface.
    explicit linear(const elora_linear *handle) : handle_(handle) {}

    explicit operator bool() const noexcept { return get() != nullptr; }
    const elora_linear *get() const noexcept { return handle_.get(); }
    // Active sizes and rank; see the functions of the C interface. An empty object returns 0.
    std::size_t in_features() const { return elora_linear_in_features(get()); }
    std::size_t out_features() const { return elora_linear_out_features(get()); }
    std::size_t rank() const { return elora_linear_rank(get()); }

    // Returns the bytes of scratch memory for n_rows rows of any dtype.
    returns<std::size_t> scratch_size(std::size_t n_rows) const {
        std::size_t bytes = 0;
        const elora_status code = elora_linear_scratch_size(get(), n_rows, &bytes);
        return detail::finish(code, bytes);
    }

    // Applies the layer to contiguous rows. If `scratch` is empty, the library allocates the
    // memory.
    returns<void> forward(std::size_t n_rows, span<const float> x, span<float> y,
                          span<unsigned char> scratch = span<unsigned char>()) const {
        return forward(n_rows, x, in_features(), y, out_features(), scratch);
    }

    // Applies the layer to rows that begin every ldx and ldy elements.
    returns<void> forward(std::size_t n_rows, span<const float> x, std::size_t ldx, span<float> y, std::size_t ldy,
                          span<unsigned char> scratch = span<unsigned char>()) const {
        return detail::finish(elora_linear_forward(get(), n_rows, x.data(), x.size(), ldx, y.data(), y.size(), ldy,
                                                   scratch.data(), scratch.size()));
    }

    // Applies the layer to elements of another dtype. Lengths count elements, not bytes.
    returns<void> forward(std::size_t n_rows, dtype type, const void *x, std::size_t x_len, std::size_t ldx, void *y,
                          std::size_t y_len, std::size_t ldy,
                          span<unsigned char> scratch = span<unsigned char>()) const {
        return detail::finish(elora_linear_forward_typed(get(), n_rows, static_cast<elora_dtype>(type), x, x_len, ldx,
                                                         y, y_len, ldy, scratch.data(), scratch.size()));
    }

private:
    friend class model;
    detail::shared_handle<elora_linear, elora_linear_retain, elora_linear_free> handle_;
};

// One sequence on a model. It may be used by one thread at a time.
class session {
public:
    session() noexcept : handle_(nullptr) {}
    // Takes ownership of a handle of the C interface.
    explicit session(elora_session *handle) noexcept : handle_(handle) {}
    session(session &&other) noexcept : handle_(other.handle_) { other.handle_ = nullptr; }
    session &operator=(session &&other) noexcept {
        std::swap(handle_, other.handle_);
        return *this;
    }
    session(const session &) = delete;
    session &operator=(const session &) = delete;
    ~session() { elora_session_free(handle_); }

    explicit operator bool() const noexcept { return handle_ != nullptr; }
    elora_session *get() const noexcept { return handle_; }

    // Activates a subnet by index or by name. Fails if the session holds tokens.
    returns<void> set_subnet(std::size_t subnet) {
        return detail::finish(elora_session_set_subnet(handle_, subnet));
    }
    returns<void> set_subnet(const text_arg &subnet_name) {
        return detail::finish(elora_session_set_subnet_named(handle_, subnet_name.c_str()));
    }
    // Activates the subnet given by a JSON object with a value for each group of the search space.
    returns<void> set_subnet_json(const text_arg &json) {
        return detail::finish(elora_session_set_subnet_json(handle_, json.c_str()));
    }
    // Sets the active ranks, one for each linear layer of the model.
    returns<void> set_ranks(span<const std::uint32_t> ranks) {
        return detail::finish(elora_session_set_ranks(handle_, ranks.data(), ranks.size()));
    }
    // The active rank of each linear layer.
    returns<std::vector<std::uint32_t>> ranks() {
        elora_session *handle = handle_;
        return detail::elements<std::uint32_t>([handle](std::uint32_t *buf, std::size_t cap, std::size_t *n) {
            return elora_session_ranks(handle, buf, cap, n);
        });
    }

    // Uses these adapters, each with a factor of its update; none for the model alone. Fails if the
    // session holds tokens.
    returns<void> set_adapters(span<const adapter> adapters, span<const float> scales = span<const float>()) {
        std::vector<const elora_adapter *> handles;
        for (const adapter &one : adapters) {
            handles.push_back(one.get());
        }
        std::vector<float> factors(scales.begin(), scales.end());
        factors.resize(handles.size(), 1.0f);
        return detail::finish(elora_session_set_adapters(handle_, handles.data(), factors.data(), handles.size()));
    }

    // Lets a copy of another session propose up to n_tokens tokens at a time, 1 to 7, in generate();
    // see elora_session_set_draft().
    returns<void> set_draft(session &draft, std::size_t n_tokens) {
        return detail::finish(elora_session_set_draft(handle_, draft.handle_, n_tokens));
    }
    returns<void> remove_draft() { return detail::finish(elora_session_set_draft(handle_, nullptr, 0)); }

    // Returns a copy, which goes on by itself and shares the memory of the tokens so far.
    returns<session> copy() {
        elora_session *made = nullptr;
        const elora_status code = elora_session_copy(handle_, &made);
        return detail::finish(code, session(made));
    }
    // The tokens that the session holds.
    returns<std::vector<token>> tokens() {
        elora_session *handle = handle_;
        return detail::elements<token>([handle](token *buf, std::size_t cap, std::size_t *n) {
            return elora_session_tokens(handle, buf, cap, n);
        });
    }
    // The tokens with their keys and values.
    returns<std::vector<unsigned char>> state() {
        elora_session *handle = handle_;
        return detail::elements<unsigned char>([handle](unsigned char *buf, std::size_t cap, std::size_t *n) {
            return elora_session_get_state(handle, buf, cap, n);
        });
    }
    // Replaces the tokens by those of a state.
    returns<void> set_state(span<const unsigned char> state) {
        return detail::finish(elora_session_set_state(handle_, state.data(), state.size()));
    }
    // Writes the state to a file, and reads it again.
    returns<void> save(const text_arg &path, bool overwrite = false) {
        return detail::finish(elora_session_save(handle_, path.c_str(), overwrite));
    }
    returns<void> load(const text_arg &path) { return detail::finish(elora_session_load(handle_, path.c_str())); }
    // Sets a callback that is asked whether to stop; see elora_session_set_abort().
    returns<void> set_abort(elora_abort_fn abort, void *userdata = nullptr) {
        return detail::finish(elora_session_set_abort(handle_, abort, userdata));
    }

    // Removes all tokens.
    returns<void> reset() { return detail::finish(elora_session_reset(handle_)); }
    // Removes all tokens but the first n_tokens.
    returns<void> truncate(std::size_t n_tokens) { return detail::finish(elora_session_truncate(handle_, n_tokens)); }
    // Number of tokens that the session holds.
    std::size_t position() { return elora_session_position(handle_); }
    // Largest number of tokens that the session can hold.
    std::size_t capacity() { return elora_session_capacity(handle_); }

    // Appends tokens and writes the logits after the last one to `logits`, unless `logits` is
    // empty.
    returns<void> decode(span<const token> tokens, span<float> logits = span<float>()) {
        return detail::finish(
            elora_session_decode(handle_, tokens.data(), tokens.size(), logits.data(), logits.size()));
    }
    // Appends tokens and writes the logits after each one to a row of `logits`.
    returns<void> decode_all(span<const token> tokens, span<float> logits) {
        return detail::finish(
            elora_session_decode_all(handle_, tokens.data(), tokens.size(), logits.data(), logits.size()));
    }

    // Appends a prompt and generates tokens. `on_token` is called with each new token; if it
    // returns false, the tokens generated until then are returned. An exception thrown by it is
    // rethrown from this function.
    returns<std::vector<token>> generate(span<const token> prompt,
                                         const generate_options &options = generate_options(),
                                         const std::function<bool(token)> &on_token = nullptr) {
        const elora_generate_options c = options.to_c();
        std::vector<token> out(options.max_new_tokens > 0 ? options.max_new_tokens : capacity());
        std::size_t n = 0;
        callback call = {&on_token
#if !defined(ELASTIC_LORA_NO_EXCEPTIONS)
                         ,
                         nullptr
#endif
        };
        elora_status code =
            elora_session_generate(handle_, prompt.data(), prompt.size(), &c, on_token ? &callback::run : nullptr,
                                   &call, out.data(), out.size(), &n);
#if !defined(ELASTIC_LORA_NO_EXCEPTIONS)
        if (call.thrown) {
            std::rethrow_exception(call.thrown);
        }
#endif
        if (code == ELORA_STATUS_CANCELLED) {
            code = ELORA_STATUS_OK;
        }
        out.resize(n);
        return detail::finish(code, std::move(out));
    }

private:
    friend class model;

    // Exceptions must not pass through the library, so the callback catches them.
    struct callback {
        const std::function<bool(token)> *on_token;
#if !defined(ELASTIC_LORA_NO_EXCEPTIONS)
        std::exception_ptr thrown;
#endif

        static bool run(void *userdata, token id) {
            callback &self = *static_cast<callback *>(userdata);
#if defined(ELASTIC_LORA_NO_EXCEPTIONS)
            return (*self.on_token)(id);
#else
            try {
                return (*self.on_token)(id);
            } catch (...) {
                self.thrown = std::current_exception();
                return false;
            }
#endif
        }
    };

    elora_session *handle_;
};

inline returns<linear> model::linear(std::size_t layer, std::size_t subnet, activations kept) const {
    elora_linear_options c;
    elora_linear_options_init(&c, sizeof c);
    c.activations = static_cast<elora_activations>(kept);
    elora::linear made;
    const elora_status code = elora_linear_new(get(), layer, subnet, &c, made.handle_.out());
    return detail::finish(code, std::move(made));
}

inline returns<session> model::session(const session_options &options) const {
    const elora_session_options c = options.to_c();
    elora_session *made = nullptr;
    const elora_status code = elora_session_new(get(), &c, &made);
    return detail::finish(code, elora::session(made));
}

inline returns<model> model::attach(const adapter &added, float scale) const {
    model attached;
    const elora_status code = elora_model_attach_adapter(get(), added.get(), scale, attached.handle_.out());
    return detail::finish(code, std::move(attached));
}

// A handle that has one owner.
namespace detail {
template <class T, void (*Free)(T *)>
class unique_handle {
public:
    unique_handle() noexcept : pointer_(nullptr) {}
    unique_handle(unique_handle &&other) noexcept : pointer_(other.pointer_) { other.pointer_ = nullptr; }
    unique_handle &operator=(unique_handle &&other) noexcept {
        std::swap(pointer_, other.pointer_);
        return *this;
    }
    unique_handle(const unique_handle &) = delete;
    unique_handle &operator=(const unique_handle &) = delete;
    ~unique_handle() { Free(pointer_); }

    T *get() const noexcept { return pointer_; }
    T **out() noexcept { return &pointer_; }

private:
    T *pointer_;
};
} // namespace detail

// Draws tokens from logits. Movable; it may be used by one thread at a time.
class sampler {
public:
    sampler() = default;
    // Creates a sampler.
    static returns<sampler> create(const sampler_options &options = sampler_options()) {
        const elora_sampler_options c = options.to_c();
        sampler made;
        const elora_status code = elora_sampler_new(&c, made.handle_.out());
        return detail::finish(code, std::move(made));
    }

    elora_sampler *get() const noexcept { return handle_.get(); }
    // Draws a token; call accept() once it is taken.
    returns<token> sample(span<const float> logits) {
        token drawn = 0;
        const elora_status code = elora_sampler_sample(get(), logits.data(), logits.size(), nullptr, 0, &drawn);
        return detail::finish(code, drawn);
    }
    // Draws a token that a mask allows, one bit for each.
    returns<token> sample(span<const float> logits, span<const std::uint32_t> allowed) {
        static const std::uint32_t none = 0;
        token drawn = 0;
        const elora_status code = elora_sampler_sample(get(), logits.data(), logits.size(),
                                                       allowed.empty() ? &none : allowed.data(), allowed.size(), &drawn);
        return detail::finish(code, drawn);
    }
    // Counts a token as generated.
    returns<void> accept(token id) { return detail::finish(elora_sampler_accept(get(), &id, 1)); }
    // Counts tokens of the prompt.
    returns<void> observe(span<const token> tokens) {
        return detail::finish(elora_sampler_observe(get(), tokens.data(), tokens.size()));
    }
    // Forgets all tokens and begins the random draws anew.
    returns<void> reset() { return detail::finish(elora_sampler_reset(get())); }

private:
    detail::unique_handle<elora_sampler, elora_sampler_free> handle_;
};

// A text that is made of tokens while they come, and ends at stop strings. Movable; it may be used by
// one thread at a time.
class text {
public:
    text() = default;
    // Creates an empty text for tokens of a model.
    static returns<text> create(const model &of, const std::vector<std::string> &stop_strings = {},
                                bool show_special = false) {
        std::vector<const char *> stops;
        for (const std::string &stop : stop_strings) {
            stops.push_back(stop.c_str());
        }
        elora_text_options c;
        elora_text_options_init(&c, sizeof c);
        c.stop_strings = stops.data();
        c.n_stop_strings = stops.size();
        c.show_special = show_special ? 1u : 0u;
        text made;
        const elora_status code = elora_text_new(of.get(), &c, made.handle_.out());
        return detail::finish(code, std::move(made));
    }

    elora_text *get() const noexcept { return handle_.get(); }
    // Whether a stop string was found.
    bool stopped() const noexcept { return stopped_; }
    // Adds a token, and returns the text that can be shown.
    returns<std::string> push(token id) {
        const char *part = nullptr;
        std::size_t len = 0;
        const elora_status code = elora_text_push(get(), id, &part, &len, &stopped_);
        return detail::finish(code, code == ELORA_STATUS_OK ? std::string(part, len) : std::string());
    }
    // Ends the text, and returns what was held back.
    returns<std::string> finish() {
        const char *part = nullptr;
        std::size_t len = 0;
        const elora_status code = elora_text_finish(get(), &part, &len);
        stopped_ = false;
        return detail::finish(code, code == ELORA_STATUS_OK ? std::string(part, len) : std::string());
    }

private:
    detail::unique_handle<elora_text, elora_text_free> handle_;
    bool stopped_ = false;
};

// What one session does in a batch: its new tokens, and the rows of logits that it wants, for the
// last of them; see elora_step.
struct step {
    elora::session *session;
    span<const token> tokens;
    span<float> logits;
};

// Appends any number of tokens to each of several sessions.
inline returns<void> decode_steps(span<const step> steps, std::size_t vocab_size) {
    std::vector<elora_step> all;
    for (const step &one : steps) {
        elora_step c = elora_step();
        c.struct_size = sizeof c;
        c.session = one.session == nullptr ? nullptr : one.session->get();
        c.tokens = one.tokens.data();
        c.n_tokens = one.tokens.size();
        c.logits = one.logits.data();
        c.logits_len = one.logits.size();
        c.n_logits = vocab_size == 0 ? 0 : one.logits.size() / vocab_size;
        all.push_back(c);
    }
    return detail::finish(elora_session_decode_steps(all.data(), all.size()));
}

// Appends one token to each of several sessions, reading the weights once for all of them. `logits`
// receives one row for each session.
inline returns<void> decode_batch(span<elora_session *const> sessions, span<const token> tokens, span<float> logits) {
    if (tokens.size() != sessions.size()) {
#if defined(ELASTIC_LORA_NO_EXCEPTIONS)
        return returns<void>(status::invalid_argument, "as many tokens as sessions");
#else
        throw error(status::invalid_argument, "as many tokens as sessions");
#endif
    }
    return detail::finish(elora_session_decode_batch(sessions.data(), sessions.size(), tokens.data(), logits.data(),
                                                     logits.size()));
}

} // namespace elora

#endif // ELASTIC_LORA_HPP
