// results MODEL: elastic_lora.hpp without exceptions, in C++11.
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#define ELASTIC_LORA_NO_EXCEPTIONS
#include "elastic_lora.hpp"

#define CHECK(...)                                                                       \
    do {                                                                                 \
        if (!(__VA_ARGS__)) {                                                            \
            std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #__VA_ARGS__);       \
            std::exit(1);                                                                \
        }                                                                                \
    } while (0)

int main(int argc, char **argv) {
    CHECK(argc == 2);
    const elora::result<elora::model> nothing = elora::model::load("/nowhere");
    CHECK(!nothing && nothing.status() == elora::status::io);
    CHECK(nothing.error().find("/nowhere") != std::string::npos);

    elora::result<elora::model> loaded = elora::model::load(argv[1]);
    CHECK(loaded.has_value());
    const elora::model model = *std::move(loaded);
    std::size_t n = 0;
    for (const elora::layer_info &layer : model.layers()) {
        n += layer.out_features > 0 ? 1 : 0;
    }
    CHECK(n == model.layer_count());

    elora::result<elora::session> opened = model.session();
    CHECK(opened);
    elora::session session = *std::move(opened);
    const elora::token prompt[] = {1, 5, 9};
    std::vector<float> logits(model.vocab_size());
    CHECK(session.decode(prompt, logits));
    const elora::result<void> refused = session.set_subnet(1);
    CHECK(!refused && refused.status() == elora::status::invalid_state && !refused.error().empty());
    CHECK(session.reset() && session.set_subnet(1));
    elora::generate_options options;
    options.max_new_tokens = 4;
    options.ignore_stop_tokens = true;
    elora::result<std::vector<elora::token>> made =
        session.generate(prompt, options, [](elora::token) { return true; });
    CHECK(made && made->size() == 4);

    elora::result<elora::linear> linear = model.linear(0, 1);
    CHECK(linear && linear->out_features() > 0);
    std::vector<float> x(linear->in_features(), 1.0f), y(linear->out_features());
    CHECK(linear->forward(1, x, y));
    CHECK(!linear->forward(2, x, y));
    CHECK(model.linear(0, 99).status() == elora::status::invalid_argument);
    return 0;
}
