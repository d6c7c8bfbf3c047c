// server MODEL: the loop of a server, written from the header and the documentation alone. Four
// sequences share a prompt and run under two subnets, each with a sampler, stop strings and a text of
// its own, in one call for each step.
#include <cstdio>
#include <string>
#include <vector>

#include "elastic_lora.hpp"

struct request {
    elora::session session;
    elora::sampler sampler;
    elora::text text;
    std::vector<elora::token> next;
    std::vector<float> logits;
    std::string shown;
    std::size_t left;
};

int main(int argc, char **argv) try {
    if (argc != 2) {
        return 2;
    }
    const elora::model model = elora::model::load(argv[1]);
    const std::vector<elora::token> stops = model.stop_tokens(), prompt = model.tokenize("Question: Tom has ");
    std::vector<request> requests;
    for (std::size_t subnet = 0; subnet < 2; ++subnet) {
        elora::session prefix = model.session(); // the prompt, computed once for each subnet
        prefix.set_subnet(subnet % model.subnet_count());
        prefix.decode({prompt.data(), prompt.size() - 1});
        for (int i = 0; i < 2; ++i) {
            elora::sampler_options options;
            options.temperature = 0.7;
            options.repetition_penalty = 1.1;
            options.stream = requests.size();
            requests.push_back({prefix.copy(), elora::sampler::create(options),
                                elora::text::create(model, {"\n", "Answer:"}), {prompt.back()},
                                std::vector<float>(model.vocab_size()), "", 24});
            requests.back().sampler.observe(prompt);
        }
    }
    for (;;) {
        std::vector<elora::step> steps;
        for (request &one : requests) {
            if (one.left > 0) {
                steps.push_back({&one.session, one.next, one.logits});
            }
        }
        if (steps.empty()) {
            break;
        }
        elora::decode_steps(steps, model.vocab_size());
        for (request &one : requests) {
            if (one.left == 0) {
                continue;
            }
            const elora::token token = one.sampler.sample({one.logits.data(), model.token_count()});
            one.sampler.accept(token);
            one.next.assign(1, token);
            --one.left;
            for (const elora::token stop : stops) {
                one.left = token == stop ? 0 : one.left;
            }
            one.shown += one.text.push(token); // a server sends this to its client
            one.left = one.text.stopped() ? 0 : one.left;
            one.shown += one.left == 0 ? one.text.finish() : "";
        }
    }
    for (const request &one : requests) {
        std::printf("%s\n", one.shown.c_str());
    }
    return 0;
} catch (const elora::error &error) {
    std::fprintf(stderr, "%s: %s\n", elora::name(error.status()), error.what());
    return 1;
}
