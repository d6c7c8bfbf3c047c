// wrapper MODEL FOLDER TMP: elastic_lora.hpp with exceptions. FOLDER is a model with a tokenizer, or "-".
#include <array>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "elastic_lora.hpp"

#define CHECK(...)                                                                       \
    do {                                                                                 \
        if (!(__VA_ARGS__)) {                                                            \
            std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #__VA_ARGS__);       \
            std::exit(1);                                                                \
        }                                                                                \
    } while (0)

// Whether a call throws this status, with a text.
template <class Call>
bool fails(elora::status expected, Call call) {
    try {
        call();
    } catch (const elora::error &error) {
        return error.status() == expected && std::string(error.what()).size() > 3;
    }
    return false;
}

int main(int argc, char **argv) {
    CHECK(argc == 4);
    CHECK(elora::abi_matches() && std::string(elora::version()) == elora_version());
    CHECK(std::string(elora::name(elora::status::panic)) == "ELORA_STATUS_PANIC");
    CHECK(fails(elora::status::io, [] { elora::model::load("/nowhere"); }));

    const elora::model none;
    CHECK(!none && none.layer_count() == 0 && none.layers().size() == 0);
    CHECK(fails(elora::status::null_pointer, [&] { none.verify(); }));

    elora::model_options options;
    options.n_threads = 2;
    options.verify = elora::verify::on_load;
    elora::model model = elora::model::load(std::string(argv[1]), options);
    CHECK(model && model.vocab_size() > 0 && model.weight_bytes() > 0);

    std::size_t n = 0, bytes = 0;
    for (const elora::layer_info &layer : model.layers()) {
        CHECK(layer.index == n && layer.in_features > 0 && layer.out_features > 0 && !layer.name.empty());
        CHECK(model.find_layer(layer.name) == n);
        bytes += layer.weight_bytes;
        ++n;
    }
    CHECK(n == model.layer_count() && bytes > 0);
    n = 0;
    for (const elora::subnet_info &subnet : model.subnets()) {
        CHECK(subnet.index == n++ && model.find_subnet(subnet.name.c_str()) == subnet.index);
    }
    CHECK(n == model.subnet_count() && n >= 2);
    CHECK(fails(elora::status::not_found, [&] { model.find_layer("nothing"); }));
    CHECK(fails(elora::status::invalid_argument, [&] { model.layer(1000); }));
    CHECK(model.space_json().find("groups") != std::string::npos);
    CHECK(!model.stop_tokens().empty());
    CHECK(model.describe().vocab_size == model.vocab_size());

    // Copies share, moves leave nothing behind.
    elora::model copy = model;
    CHECK(copy.get() == model.get());
    elora::model moved = std::move(copy);
    CHECK(moved.get() == model.get());
    copy = moved;
    moved = elora::model();
    CHECK(!moved && copy.vocab_size() == model.vocab_size());
    const elora::model &self = copy;
    copy = self;
    CHECK(copy);

    elora::linear linear = model.linear(0);
    const elora::linear same = linear;
    CHECK(same.get() == linear.get() && linear.rank() > 0);
    std::vector<float> x(2 * linear.in_features(), 0.25f), y(2 * linear.out_features());
    linear.forward(2, x, y);
    std::vector<unsigned char> scratch(linear.scratch_size(2));
    std::vector<float> again(y.size());
    linear.forward(2, x, again, scratch);
    CHECK(y == again);
    const std::vector<float> &constant = x;
    linear.forward(1, elora::dtype::f32, constant.data(), x.size(), linear.in_features(), again.data(), again.size(),
                   linear.out_features());
    CHECK(fails(elora::status::insufficient_size, [&] { linear.forward(3, x, y); }));

    elora::session_options small;
    small.n_ctx = 20;
    elora::session session = model.session(small);
    CHECK(session.capacity() == 20 && session.position() == 0);
    const std::array<elora::token, 3> prompt{{1, 5, 9}};
    std::vector<float> logits(model.vocab_size()), other(model.vocab_size());
    session.decode(prompt, logits);
    CHECK(fails(elora::status::invalid_state, [&] { session.set_subnet(1); }));
    session.reset();
    session.set_subnet(1);
    session.decode(prompt, other);
    CHECK(logits != other);
    session.reset();
    session.set_subnet(model.subnets()[0].name);
    session.decode(prompt, other);
    CHECK(logits == other);
    session.truncate(2);
    session.decode({&prompt[2], 1}, other);
    CHECK(session.position() == 3);
    session.reset();
    std::vector<std::uint32_t> ranks = session.ranks();
    CHECK(ranks.size() == model.layer_count());
    ranks.assign(ranks.size(), 0);
    session.set_ranks(ranks);
    CHECK(session.ranks() == ranks);
    session.set_subnet(0);

    elora::generate_options greedy;
    greedy.max_new_tokens = 6;
    greedy.ignore_stop_tokens = true;
    std::vector<elora::token> seen;
    const std::vector<elora::token> made = session.generate(prompt, greedy, [&](elora::token token) {
        seen.push_back(token);
        return true;
    });
    CHECK(made.size() == 6 && seen == made);
    session.reset();
    CHECK(session.generate(prompt, greedy) == made);
    session.reset();
    seen.clear();
    const std::vector<elora::token> stopped = session.generate(prompt, greedy, [&](elora::token token) {
        seen.push_back(token);
        return seen.size() < 2;
    });
    CHECK(stopped.size() == 2 && stopped == seen);
    // What a callback throws goes through the library by hand, not by unwinding.
    session.reset();
    bool caught = false;
    try {
        session.generate(prompt, greedy, [](elora::token) -> bool { throw std::runtime_error("mine"); });
    } catch (const std::runtime_error &error) {
        caught = std::string(error.what()) == "mine";
    }
    CHECK(caught);

    // A batch computes what its sessions would alone.
    elora::session one = model.session(), two = model.session();
    one.decode({&prompt[0], 1});
    two.decode({&prompt[0], 2});
    elora_session *both[] = {one.get(), two.get()};
    const elora::token next[] = {7, 8};
    std::vector<float> rows(2 * model.vocab_size());
    elora::decode_batch(both, next, rows);
    CHECK(one.position() == 2 && two.position() == 3);
    CHECK(fails(elora::status::invalid_argument, [&] { elora::decode_batch(both, {next, 1}, rows); }));
    elora::session taken = std::move(one);
    CHECK(!one && taken.position() == 2);
    std::vector<float> all(2 * model.vocab_size());
    taken.reset();
    taken.decode_all({&prompt[0], 2}, all);

    // Any number of tokens for each session, copies and states.
    elora::session long_one = model.session(), short_one = model.session();
    short_one.set_subnet(1);
    std::vector<float> first(model.vocab_size()), second(2 * model.vocab_size());
    elora::decode_steps(std::vector<elora::step>{{&long_one, prompt, first}, {&short_one, {&prompt[0], 2}, second}},
                        model.vocab_size());
    CHECK(first == logits && short_one.position() == 2);
    elora::session twin = long_one.copy();
    CHECK((twin.tokens() == std::vector<elora::token>(prompt.begin(), prompt.end())));
    const std::vector<unsigned char> state = twin.state();
    twin.reset();
    twin.set_state(state);
    twin.decode({next, 1}, first);
    long_one.decode({next, 1}, other);
    CHECK(first == other);
    CHECK(fails(elora::status::invalid_state, [&] { short_one.set_state(state); }));
    const std::string file = std::string(argv[3]) + "/session";
    long_one.save(file, true);
    twin.load(file);
    CHECK(twin.tokens() == long_one.tokens() && std::remove(file.c_str()) == 0);
    twin.set_abort([](void *) { return true; });
    CHECK(fails(elora::status::cancelled, [&] { twin.decode({next, 1}); }));
    twin.set_adapters({});

    elora::sampler_options bias;
    bias.bias_tokens = {3};
    bias.bias_values = {1e9f};
    elora::sampler sampler = elora::sampler::create(bias);
    CHECK(sampler.sample(first) == 3);
    const std::uint32_t allowed[] = {1u << 5};
    CHECK(sampler.sample(first, allowed) == 5);
    CHECK(fails(elora::status::invalid_argument, [&] { sampler.sample(first, elora::span<const std::uint32_t>()); }));
    sampler.observe(prompt);
    sampler.accept(3);
    sampler.reset();

    elora::convert_options wide;
    wide.format = elora::weight_format::f32;
    const elora::model floats = model.convert(wide);
    CHECK(floats.layer(0).format == elora::weight_format::f32 && floats.weight_bytes() > model.weight_bytes());

    const std::string path = std::string(argv[3]) + "/part.elora";
    const elora::model part = model.extract(1);
    part.save(path, true);
    CHECK(fails(elora::status::io, [&] { part.save("/nowhere/part.elora"); }));
    const elora::model loaded = elora::model::load(path);
    loaded.verify();
    CHECK(loaded.subnet_count() == 1 && loaded.weight_bytes() == part.weight_bytes());
    std::remove(path.c_str());

    if (std::string(argv[2]) != "-") {
        const elora::model talks = elora::model::load(argv[2]);
        CHECK(talks.has_tokenizer());
        const std::vector<elora::token> tokens = talks.tokenize("How many pens", elora::special::none);
        CHECK(talks.detokenize(tokens) == "How many pens");
        elora::text text = elora::text::create(talks, {"pen"});
        std::string shown;
        std::vector<std::uint8_t> bytes;
        for (const elora::token token : tokens) {
            shown += text.push(token);
            const std::vector<std::uint8_t> piece = talks.piece(token);
            bytes.insert(bytes.end(), piece.begin(), piece.end());
        }
        CHECK(text.stopped() && shown + std::string(text.finish()) == "How many ");
        CHECK(std::string(bytes.begin(), bytes.end()) == "How many pens");
        CHECK(talks.special_token(elora::token_role::end) == 2 && talks.special_tokens().size() == 3);
        CHECK(talks.token_count() <= talks.vocab_size() && talks.notice_count() == 0);
        CHECK(!talks.has_chat_template());
        CHECK(fails(elora::status::not_found, [&] {
            talks.apply_chat_template(std::vector<elora::message>{{"user", "Hello"}});
        }));
#if ELASTIC_LORA_CPLUSPLUS >= 201703L
        CHECK(talks.tokenize(std::string_view("How many pens or not").substr(0, 13), elora::special::none) == tokens);
#endif
    }

    // One layer, many threads.
    std::vector<std::thread> threads;
    for (int i = 0; i < 4; ++i) {
        threads.emplace_back([linear, &x, &y] {
            std::vector<float> mine(y.size());
            linear.forward(2, x, mine);
            CHECK(mine == y);
        });
    }
    for (std::thread &thread : threads) {
        thread.join();
    }
    return 0;
}
