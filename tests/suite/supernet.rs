//! The supernet: its space on a model, the costs of subnets, and the results of extracting them.

use crate::common::{is_factor, max_diff, random_ids, tiny, tiny_dims, weight_bits};
use burn::tensor::Device;
use elastic_lora::adapter::{ElasticLoraLinearConfig, LoraConfig, ScaleRule};
use elastic_lora::data::{Batcher, Sequence};
use elastic_lora::linalg::Matrix;
use elastic_lora::model::Decoder;
use elastic_lora::nn::host_values;
use elastic_lora::progress::Silent;
use elastic_lora::space::Group;
use elastic_lora::supernet::{SubnetCost, SuperNetConfig};
use elastic_lora::train::{Schedule, TrainConfig, Trainer};
use elastic_lora::{Error, SearchSpace, SuperNet};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

const QKV: [&str; 3] = ["q_proj", "k_proj", "v_proj"];

fn lora() -> LoraConfig {
    LoraConfig::new(6).with_alpha(9.0)
}

/// Two groups per block: q, k and v, and up.
fn space(model: &Decoder) -> SearchSpace {
    SearchSpace::grouped(
        &model.layer_shapes(),
        &[&QKV[..], &["up_proj"]],
        &[6, 4, 3, 1],
    )
    .unwrap()
}

fn net(tied: bool, config: SuperNetConfig) -> SuperNet {
    let model = tiny(tied, 3);
    let space = space(&model);
    SuperNet::new(model, space, config).unwrap()
}

fn logits(model: &Decoder) -> Vec<f32> {
    let ids = random_ids(3 * 13, 41, 5);
    host_values(model.forward(model.tokens(&ids, 3).unwrap()))
}

#[test]
fn a_fresh_super_network_is_the_base_model() {
    for tied in [true, false] {
        let expected = logits(&tiny(tied, 3));
        let mut net = net(
            tied,
            SuperNetConfig::new(lora())
                .with_fixed_layers(vec!["model.layers.1.mlp.down_proj".into()]),
        );
        assert_eq!(logits(net.model()), expected);
        net.activate(&net.minimal()).unwrap();
        assert_eq!(logits(net.model()), expected);
        assert_eq!(logits(&net.eval_model()), expected);
        assert_eq!(logits(&net.into_model()), expected);
    }
}

#[test]
fn what_does_not_fit_the_model_is_refused() {
    let layer = |name: &str| name.to_string();
    let one = |layers: Vec<String>, choices: Vec<usize>| {
        SearchSpace::new(vec![Group::new("g", layers, choices).unwrap()]).unwrap()
    };
    let q = "model.layers.0.self_attn.q_proj";
    let refused = |space: SearchSpace, config: SuperNetConfig| {
        SuperNet::new(tiny(true, 3), space, config).unwrap_err()
    };
    let plain = || SuperNetConfig::new(lora());
    for unknown in [
        "model.layers.2.self_attn.q_proj",
        "model.layers.0.self_attn.q",
        "lm_head",
        "",
        "model.layers.-1.mlp.up_proj",
    ] {
        let error = refused(one(vec![layer(unknown)], vec![2]), plain());
        assert!(matches!(error, Error::UnknownLayer { .. }), "{error}");
        let error = refused(
            one(vec![layer(q)], vec![2]),
            plain().with_fixed_layers(vec![layer(unknown)]),
        );
        assert!(matches!(error, Error::UnknownLayer { .. }), "{error}");
    }
    assert!(matches!(
        refused(one(vec![layer(q)], vec![7, 2]), plain()),
        Error::InvalidRank {
            found: 7,
            max: 6,
            ..
        }
    ));
    let twice = plain().with_fixed_layers(vec![layer(q)]);
    assert!(matches!(
        refused(one(vec![layer(q)], vec![2]), twice),
        Error::InvalidSpace { .. }
    ));
    let up = layer("model.layers.1.mlp.up_proj");
    let twice = plain().with_fixed_layers(vec![up.clone(), up]);
    assert!(matches!(
        refused(one(vec![layer(q)], vec![2]), twice),
        Error::InvalidSpace { .. }
    ));
    for bad in [
        LoraConfig::new(0),
        lora().with_alpha(-1.0),
        lora().with_alpha(f64::NAN),
        lora().with_dropout(1.0),
    ] {
        let error = refused(one(vec![layer(q)], vec![1]), SuperNetConfig::new(bad));
        assert!(matches!(error, Error::InvalidArgument { .. }), "{error}");
    }

    // A model that already has an adapter, on a layer that is in the space or not.
    for (adapted, in_space) in [(q, q), ("model.layers.1.mlp.gate_proj", q)] {
        let mut model = tiny(true, 3);
        let layer = model.linear_mut(adapted).unwrap();
        let [d_input, d_output] = layer.base.dims();
        let config = ElasticLoraLinearConfig::new(d_input, d_output, 2);
        *layer = config.init_on(layer.base.clone(), &Device::flex()).unwrap();
        assert!(matches!(
            SuperNet::dense(model.clone()),
            Err(Error::HasAdapter { .. })
        ));
        let result = SuperNet::new(model, one(vec![in_space.to_string()], vec![2]), plain());
        assert!(matches!(result, Err(Error::HasAdapter { .. })));
    }
}

#[test]
fn subnets_are_activated_and_foreign_ones_refused() {
    let mut net = net(
        true,
        SuperNetConfig::new(lora()).with_fixed_layers(vec!["model.layers.0.mlp.down_proj".into()]),
    );
    assert_eq!(net.n_subnets(), 256.0);
    let follows = SuperNetConfig::for_space(net.space());
    assert_eq!(follows, SuperNetConfig::new(LoraConfig::new(6)));
    assert_eq!(net.active(), &net.maximal());
    let values = |net: &SuperNet, subnet| net.space().values(&subnet).unwrap();
    assert_eq!(values(&net, net.maximal()), [6; 4]);
    assert_eq!(values(&net, net.minimal()), [1; 4]);
    assert_eq!(values(&net, net.heuristic()), [4; 4]);
    let subnet = net.space().from_values(&[3, 6, 1, 4]).unwrap();
    net.activate(&subnet).unwrap();
    assert_eq!(net.active(), &subnet);
    let rank = |net: &SuperNet, name: &str| net.model().linear(name).unwrap().active_rank();
    for kind in QKV {
        assert_eq!(rank(&net, &format!("model.layers.0.self_attn.{kind}")), 3);
        assert_eq!(rank(&net, &format!("model.layers.1.self_attn.{kind}")), 1);
    }
    assert_eq!(rank(&net, "model.layers.0.mlp.up_proj"), 6);
    assert_eq!(rank(&net, "model.layers.1.mlp.up_proj"), 4);
    assert_eq!(rank(&net, "model.layers.0.mlp.down_proj"), 6);
    assert_eq!(rank(&net, "model.layers.1.mlp.down_proj"), 0);
    assert_eq!(net.ranks(&subnet).unwrap().len(), 9);

    let mut foreign = subnet.clone();
    let group = net.space().groups()[0].id().to_string();
    foreign.set(group, 5);
    assert!(matches!(
        net.activate(&foreign),
        Err(Error::InvalidChoice { found: 5, .. })
    ));
    assert!(net.cost(&foreign).is_err());
    let mut extra = subnet.clone();
    extra.set("nothing", 1);
    assert!(matches!(
        net.activate(&extra),
        Err(Error::UnknownGroup { .. })
    ));
    assert!(matches!(
        net.activate(&Default::default()),
        Err(Error::UnknownGroup { .. })
    ));
    assert_eq!(
        (net.active(), rank(&net, "model.layers.0.mlp.up_proj")),
        (&subnet, 6)
    );

    let draw = |seed| {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        (0..200).map(|_| net.sample(&mut rng)).collect::<Vec<_>>()
    };
    assert_eq!(draw(1), draw(1));
    assert_ne!(draw(1), draw(2));
    let mut counts = [[0usize; 7]; 4];
    for subnet in draw(1) {
        net.space()
            .values(&subnet)
            .unwrap()
            .into_iter()
            .zip(&mut counts)
            .for_each(|(value, counts)| counts[value] += 1);
    }
    assert!(counts.iter().all(|counts| {
        [1, 3, 4, 6]
            .iter()
            .all(|value| (25..80).contains(&counts[*value]))
    }));
}

#[test]
fn switching_moves_no_weight_and_comes_back_exactly() {
    for sparse in [false, true] {
        let mut net = trained(net(
            false,
            SuperNetConfig::new(lora()).with_sparse_peft(sparse),
        ));
        let subnets: Vec<_> = [[6, 6, 6, 6], [1, 3, 4, 6], [4, 1, 1, 3]]
            .iter()
            .map(|v| net.space().from_values(v).unwrap())
            .collect();
        let weights = weight_bits(net.model());
        let first: Vec<_> = subnets.iter().map(|s| outputs(&mut net, s)).collect();
        let again: Vec<_> = subnets.iter().map(|s| outputs(&mut net, s)).collect();
        assert_eq!(first, again);
        assert_ne!(first[0], first[1]);
        assert_eq!(weights, weight_bits(net.model()));
    }
}

fn outputs(net: &mut SuperNet, subnet: &elastic_lora::SubnetConfig) -> Vec<f32> {
    net.activate(subnet).unwrap();
    logits(net.model())
}

/// Moves the factors far from their fresh values by a few large steps on noise.
fn trained(mut net: SuperNet) -> SuperNet {
    let mut config = TrainConfig::new(5);
    config.lr = 0.05;
    config.schedule = Schedule::Constant;
    let sequences = (0..8)
        .map(|i| Sequence::unmasked(random_ids(11, 41, 100 + i)))
        .collect();
    let mut batcher = Batcher::new(sequences, 4, 0, 1).unwrap();
    Trainer::new(config)
        .unwrap()
        .run(&mut net, &mut batcher, &[], &Silent)
        .unwrap();
    net
}

#[test]
fn costs_are_what_counting_by_hand_gives() {
    for tied in [true, false] {
        let mut model = tiny(tied, 3);
        // Some zeros, counted by hand.
        let mut zeros = 0;
        for name in [
            "model.layers.0.self_attn.q_proj",
            "model.layers.1.mlp.down_proj",
        ] {
            let layer = model.linear_mut(name).unwrap();
            let weight = layer.base.to_matrix();
            let pruned = Matrix::from_fn(weight.rows(), weight.cols(), |o, i| {
                if (o + i) % 3 == 0 {
                    0.0
                } else {
                    weight.row(o)[i]
                }
            });
            zeros += pruned.count_zeros();
            layer.base.set_matrix(&pruned).unwrap();
        }
        let dims = tiny_dims(tied);
        let (d, kv, mlp, vocab) = (24, 12, 37, 41);
        assert_eq!(
            (dims.hidden_size, dims.intermediate_size, dims.vocab_size),
            (d, mlp, vocab)
        );
        let linears = 2 * (2 * d * d + 2 * d * kv + 3 * d * mlp);
        let head = vocab * d;
        let base = linears + 2 * 2 * d + d + if tied { head } else { 2 * head };
        // q, k, v at ranks 3 and 1, up at 6 and 4, down of block 0 fixed at 6.
        let adapters = (3 + 1) * ((d + d) + 2 * (d + kv)) + (6 + 4) * (d + mlp) + 6 * (mlp + d);
        let space = space(&model);
        let config = SuperNetConfig::new(lora())
            .with_fixed_layers(vec!["model.layers.0.mlp.down_proj".into()]);
        let net = SuperNet::new(model, space, config).unwrap();
        let cost = net
            .cost(&net.space().from_values(&[3, 6, 1, 4]).unwrap())
            .unwrap();
        let expected = SubnetCost {
            params: base + adapters,
            nonzero_params: base - zeros + adapters,
            adapter_params: adapters,
            macs_per_token: linears + head + adapters,
            weight_bytes: 2 * (base + adapters),
            attention_width: 2 * d,
        };
        assert_eq!(cost, expected);
        assert_eq!(
            (net.base_params().total, net.base_params().nonzero),
            (base, base - zeros)
        );
        assert_eq!(
            weight_bits(net.model())
                .values()
                .map(Vec::len)
                .sum::<usize>(),
            net.cost(&net.maximal()).unwrap().params
        );
    }
}

#[test]
fn an_extracted_subnet_on_the_base_is_the_active_subnet() {
    for rule in [
        ScaleRule::AlphaOverMaxRank,
        ScaleRule::AlphaOverRank,
        ScaleRule::AlphaOverSqrtRank,
    ] {
        for tied in [true, false] {
            let config = SuperNetConfig::new(lora().with_scale_rule(rule))
                .with_fixed_layers(vec!["model.layers.1.self_attn.o_proj".into()]);
            let mut net = trained(net(tied, config));
            let base = logits(&tiny(tied, 3));
            for values in [[6, 6, 6, 6], [3, 1, 4, 6], [1, 1, 1, 1]] {
                let subnet = net.space().from_values(&values).unwrap();
                let expected = outputs(&mut net, &subnet);
                assert!(max_diff(&expected, &base) > 0.1);
                let lora = net.extract_adapter().unwrap();
                lora.check(net.model().config()).unwrap();
                assert_eq!(lora.layers.len(), 9);
                assert_eq!(
                    lora.layers["model.layers.0.self_attn.k_proj"].rank(),
                    values[0]
                );
                assert_eq!(lora.layers["model.layers.1.self_attn.o_proj"].rank(), 6);
                let mut merged = tiny(tied, 3);
                for (name, weights) in &lora.layers {
                    let layer = merged.linear_mut(name).unwrap();
                    let (weight, delta) = (layer.base.to_matrix(), weights.delta());
                    let sum = Matrix::from_fn(weight.rows(), weight.cols(), |o, i| {
                        weight.row(o)[i] + delta.row(o)[i]
                    });
                    layer.base.set_matrix(&sum).unwrap();
                }
                let size = expected.iter().fold(1.0f32, |m, v| m.max(v.abs()));
                let off = max_diff(&logits(&merged), &expected);
                assert!(off < 2e-5 * size, "{rule:?} {values:?}: {off} of {size}");
            }
        }
    }
    let net = net(true, SuperNetConfig::new(lora()).with_sparse_peft(true));
    assert!(matches!(
        net.extract_adapter(),
        Err(Error::Unsupported { .. })
    ));
}

#[test]
fn seeds_make_the_factors() {
    let factors = |seed: u64| {
        let net = net(true, SuperNetConfig::new(lora()).with_seed(seed));
        weight_bits(net.model())
            .into_iter()
            .filter(|(path, _)| is_factor(path))
            .collect::<Vec<_>>()
    };
    assert_eq!(factors(1), factors(1));
    let (one, two) = (factors(1), factors(2));
    assert!(
        one.iter()
            .zip(&two)
            .all(|(a, b)| a.0.ends_with("lora_b") || a.1 != b.1)
    );
    // Layers of the same shape do not share their factors.
    let as_: Vec<_> = one
        .iter()
        .filter(|(path, _)| path.ends_with("lora_a"))
        .collect();
    assert!(
        as_.iter()
            .enumerate()
            .all(|(i, a)| as_[..i].iter().all(|b| a.1 != b.1))
    );
}
