// A custom inference loop, with its own buffers, key/value cache, attention and threads. The
// library provides the compressed layers, the embedding, the norms' gains and the rotary angles.
// Each thread continues its own prompt, and all threads share the layers. At the end, the logits of
// each sequence are compared with those of a session of the library.
//
//     inference MODEL [SUBNET [TOKENS [THREADS]]]
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <functional>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "elastic_lora.hpp"

namespace {

// The immutable data that all threads share.
struct network {
    struct block {
        std::vector<float> attention_norm, mlp_norm;
        // Empty if the subnet leaves out the block's attention or MLP.
        std::optional<elora::linear> q, k, v, o, gate, up, down;
    };

    elora::model model;
    elora::model_info info;
    std::vector<block> blocks;
    std::vector<float> final_norm;
    elora::linear head;
    std::size_t scratch_bytes = 0;

    network(elora::model from, std::size_t subnet) : model(std::move(from)), info(model.describe()) {
        for (std::size_t i = 0; i < info.n_blocks; ++i) {
            const std::string path = "model.layers." + std::to_string(i);
            block made;
            made.q = layer(path + ".self_attn.q_proj", subnet);
            made.k = layer(path + ".self_attn.k_proj", subnet);
            made.v = layer(path + ".self_attn.v_proj", subnet);
            made.o = layer(path + ".self_attn.o_proj", subnet);
            made.gate = layer(path + ".mlp.gate_proj", subnet);
            made.up = layer(path + ".mlp.up_proj", subnet);
            made.down = layer(path + ".mlp.down_proj", subnet);
            if (made.q) {
                made.attention_norm = norm(path + ".input_layernorm.weight");
            }
            if (made.gate) {
                made.mlp_norm = norm(path + ".post_attention_layernorm.weight");
            }
            blocks.push_back(std::move(made));
        }
        head = *layer("lm_head", subnet);
        final_norm = norm("model.norm.weight");
    }

private:
    std::optional<elora::linear> layer(const std::string &name, std::size_t subnet) {
        std::size_t index = 0;
        try {
            index = model.find_layer(name);
        } catch (const elora::error &error) {
            if (error.status() == elora::status::not_found) {
                return std::nullopt;
            }
            throw;
        }
        try {
            elora::linear found = model.linear(index, subnet);
            scratch_bytes = std::max(scratch_bytes, found.scratch_size(1));
            return found;
        } catch (const elora::error &error) {
            if (error.status() == elora::status::invalid_argument) {
                return std::nullopt;
            }
            throw;
        }
    }

    std::vector<float> norm(const std::string &name) {
        std::vector<float> gain(info.hidden_size);
        model.norm(name, gain);
        return gain;
    }
};

// The mutable state of one sequence.
class sequence {
public:
    explicit sequence(const network &net)
        : net_(net), keys_(net.blocks.size()), values_(net.blocks.size()), x_(net.info.hidden_size),
          normed_(net.info.hidden_size), cos_(net.info.head_dim / 2), sin_(net.info.head_dim / 2),
          logits_(net.info.vocab_size), scratch_(net.scratch_bytes) {}

    // Appends a token and returns the logits after it.
    const std::vector<float> &step(elora::token token) {
        net_.model.embed({&token, 1}, x_);
        net_.model.rotary(position_, cos_, sin_);
        for (std::size_t i = 0; i < net_.blocks.size(); ++i) {
            const network::block &block = net_.blocks[i];
            if (block.q) {
                attention(block, keys_[i], values_[i]);
            }
            if (block.gate) {
                mlp(block);
            }
        }
        normalize(net_.final_norm);
        net_.head.forward(1, normed_, logits_, scratch_);
        ++position_;
        return logits_;
    }

private:
    const network &net_;
    std::vector<std::vector<float>> keys_, values_;
    std::vector<float> x_, normed_, q_, k_, v_, context_, gate_, up_, out_, scores_, cos_, sin_, logits_;
    std::vector<unsigned char> scratch_;
    std::size_t position_ = 0;

    void normalize(const std::vector<float> &gain) {
        double sum = 0.0;
        for (const float value : x_) {
            sum += static_cast<double>(value) * value;
        }
        const float factor =
            static_cast<float>(1.0 / std::sqrt(sum / static_cast<double>(x_.size()) + net_.info.norm_epsilon));
        for (std::size_t i = 0; i < x_.size(); ++i) {
            normed_[i] = x_[i] * factor * gain[i];
        }
    }

    void apply(const elora::linear &layer, const std::vector<float> &in, std::vector<float> &out) {
        out.resize(layer.out_features());
        layer.forward(1, in, out, scratch_);
    }

    void add(const elora::linear &layer, const std::vector<float> &in) {
        apply(layer, in, out_);
        for (std::size_t i = 0; i < x_.size(); ++i) {
            x_[i] += out_[i];
        }
    }

    void rotate(std::vector<float> &rows) const {
        const std::size_t dim = net_.info.head_dim, half = dim / 2;
        for (std::size_t start = 0; start < rows.size(); start += dim) {
            for (std::size_t i = 0; i < half; ++i) {
                const float a = rows[start + i], b = rows[start + i + half];
                rows[start + i] = a * cos_[i] - b * sin_[i];
                rows[start + i + half] = b * cos_[i] + a * sin_[i];
            }
        }
    }

    void attention(const network::block &block, std::vector<float> &keys, std::vector<float> &values) {
        normalize(block.attention_norm);
        apply(*block.q, normed_, q_);
        apply(*block.k, normed_, k_);
        apply(*block.v, normed_, v_);
        rotate(q_);
        rotate(k_);
        keys.insert(keys.end(), k_.begin(), k_.end());
        values.insert(values.end(), v_.begin(), v_.end());
        const std::size_t dim = net_.info.head_dim, width = k_.size();
        const std::size_t heads = q_.size() / dim, shared = heads / (width / dim), n = position_ + 1;
        const std::size_t window = net_.info.sliding_window;
        const std::size_t first = window > 0 && n > window ? n - window : 0;
        const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
        context_.assign(q_.size(), 0.0f);
        scores_.resize(n);
        for (std::size_t head = 0; head < heads; ++head) {
            const float *q = &q_[head * dim];
            const std::size_t at = head / shared * dim;
            float largest = -INFINITY, sum = 0.0f;
            for (std::size_t t = first; t < n; ++t) {
                float score = 0.0f;
                for (std::size_t i = 0; i < dim; ++i) {
                    score += q[i] * keys[t * width + at + i];
                }
                scores_[t] = score * scale;
                largest = std::max(largest, scores_[t]);
            }
            for (std::size_t t = first; t < n; ++t) {
                scores_[t] = std::exp(scores_[t] - largest);
                sum += scores_[t];
            }
            for (std::size_t t = first; t < n; ++t) {
                for (std::size_t i = 0; i < dim; ++i) {
                    context_[head * dim + i] += scores_[t] / sum * values[t * width + at + i];
                }
            }
        }
        add(*block.o, context_);
    }

    void mlp(const network::block &block) {
        normalize(block.mlp_norm);
        apply(*block.gate, normed_, gate_);
        apply(*block.up, normed_, up_);
        for (std::size_t i = 0; i < gate_.size(); ++i) {
            gate_[i] = gate_[i] / (1.0f + std::exp(-gate_[i])) * up_[i];
        }
        add(*block.down, gate_);
    }
};

// Results of a thread.
struct outcome {
    std::vector<elora::token> tokens;
    float difference = 0.0f;
    std::exception_ptr failed;
};

// Continues a prompt of one token greedily, and compares the logits with those of a session that
// gets the same tokens.
void run(const network &net, std::size_t subnet, elora::token token, std::size_t n, outcome &result) try {
    sequence own(net);
    elora::session theirs = net.model.session();
    theirs.set_subnet(subnet);
    std::vector<float> expected(net.info.vocab_size);
    for (std::size_t i = 0; i < n; ++i) {
        const std::vector<float> &logits = own.step(token);
        theirs.decode({&token, 1}, expected);
        float largest = 1.0f;
        for (const float value : expected) {
            largest = std::max(largest, std::abs(value));
        }
        for (std::size_t j = 0; j < logits.size(); ++j) {
            result.difference = std::max(result.difference, std::abs(logits[j] - expected[j]) / largest);
        }
        token = static_cast<elora::token>(std::max_element(logits.begin(), logits.end()) - logits.begin());
        result.tokens.push_back(token);
    }
} catch (...) {
    result.failed = std::current_exception();
}

} // namespace

int main(int argc, char **argv) try {
    if (argc < 2 || argc > 5) {
        std::fprintf(stderr, "usage: inference MODEL [SUBNET [TOKENS [THREADS]]]\n");
        return 2;
    }
    if (!elora::abi_matches()) {
        std::fprintf(stderr, "the library %s has another binary interface than this program\n", elora::version());
        return 1;
    }
    // This program runs its own threads, so the library uses one thread per call.
    elora::model_options options;
    options.n_threads = 1;
    const elora::model model = elora::model::load(argv[1], options);
    const std::size_t subnet = argc > 2 ? model.find_subnet(argv[2]) : 0;
    const network net(model, subnet);
    const long n = argc > 3 ? std::strtol(argv[3], nullptr, 10) : 16;
    const long n_threads = argc > 4 ? std::strtol(argv[4], nullptr, 10) : 4;
    if (n < 1 || static_cast<std::size_t>(n) > net.info.context_size || n_threads < 1 || n_threads > 256) {
        std::fprintf(stderr, "TOKENS must be in 1..%zu, THREADS in 1..256\n", net.info.context_size);
        return 2;
    }
    std::vector<outcome> outcomes(static_cast<std::size_t>(n_threads));
    std::vector<std::thread> threads;
    for (std::size_t i = 0; i < outcomes.size(); ++i) {
        const elora::token start = static_cast<elora::token>((1 + 7 * i) % net.info.vocab_size);
        threads.emplace_back(run, std::cref(net), subnet, start, static_cast<std::size_t>(n), std::ref(outcomes[i]));
    }
    for (std::thread &thread : threads) {
        thread.join();
    }
    float difference = 0.0f;
    for (const outcome &result : outcomes) {
        if (result.failed) {
            std::rethrow_exception(result.failed);
        }
        for (const elora::token token : result.tokens) {
            std::printf(" %d", static_cast<int>(token));
        }
        std::printf("\n");
        difference = std::max(difference, result.difference);
    }
    std::printf("largest difference from the library's own sessions: %.2e of the largest logit\n",
                static_cast<double>(difference));
    return difference < 1e-3f ? 0 : 1;
} catch (const std::exception &error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
}
