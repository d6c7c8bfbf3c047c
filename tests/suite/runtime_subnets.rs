//! A session's subnet equals that of the supernet: ranks, widths and depth, alone and in a batch,
//! from many threads.

use crate::common::runtime::{F32, agrees, in_pieces, largest, llama, session};
use crate::common::{max_diff, random_ids, tiny, tiny_dims, tiny_mistral};
use elastic_lora::adapter::{LoraConfig, ScaleRule};
use elastic_lora::data::{Batcher, Sequence};
use elastic_lora::format::WeightFormat;
use elastic_lora::io::hf::LlamaDims;
use elastic_lora::progress::Silent;
use elastic_lora::runtime::{CacheFormat, Model, Session, SessionConfig, decode_batch};
use elastic_lora::space::{Elastic, Group};
use elastic_lora::supernet::SuperNetConfig;
use elastic_lora::train::{TrainConfig, Trainer};
use elastic_lora::{Error, Merger, SearchSpace, SubnetConfig, SuperNet};

const QKV: [&str; 3] = ["q_proj", "k_proj", "v_proj"];
const GATE_UP: [&str; 2] = ["gate_proj", "up_proj"];

fn units() -> Vec<String> {
    [
        "model.layers.0",
        "model.layers.2.self_attn",
        "model.layers.1",
        "model.layers.2.mlp",
    ]
    .map(String::from)
    .to_vec()
}

/// Ranks, widths, head counts and depth on three blocks with biases. Alpha differs from the rank.
fn net(tied: bool, rule: ScaleRule) -> SuperNet {
    let dims = LlamaDims {
        num_hidden_layers: 3,
        num_attention_heads: 6,
        num_key_value_heads: 3,
        ..tiny_dims(tied)
    };
    let model = llama(
        &dims,
        serde_json::json!({"attention_bias": true, "mlp_bias": true}),
        13,
    );
    let layers = model.layer_shapes();
    let width = |groups: &[&[&str]], choices: &[usize]| {
        SearchSpace::groups_by_block(Elastic::Width, &layers, groups, choices).unwrap()
    };
    let space = SearchSpace::grouped(&layers, &[&QKV[..], &GATE_UP, &["down_proj"]], &[5, 3])
        .unwrap()
        .with_groups(width(&[&GATE_UP], &[37, 29, 11]))
        .unwrap()
        .with_groups(width(&[&QKV], &[24, 16, 8]))
        .unwrap()
        .with_groups([Group::of_kind(Elastic::Depth, "depth", units(), vec![4, 3, 2, 1]).unwrap()])
        .unwrap();
    let lora = LoraConfig::new(5).with_alpha(7.0).with_scale_rule(rule);
    let config =
        SuperNetConfig::new(lora).with_fixed_layers(vec!["model.layers.1.self_attn.o_proj".into()]);
    let mut net = SuperNet::new(model, space, config).unwrap();
    // A fresh adapter adds nothing, so it is trained for a few steps.
    let sequences = (0..4)
        .map(|seed| Sequence::unmasked(random_ids(12, 41, seed)))
        .collect();
    let config = TrainConfig {
        lr: 0.05,
        ..TrainConfig::new(6)
    };
    Trainer::new(config)
        .unwrap()
        .run(
            &mut net,
            &mut Batcher::new(sequences, 2, 0, 1).unwrap(),
            &[],
            &Silent,
        )
        .unwrap();
    net
}

fn subnet(
    space: &SearchSpace,
    rank: usize,
    mlp: [usize; 3],
    heads: [usize; 3],
    depth: usize,
) -> SubnetConfig {
    let value = |group: &Group| {
        let block = group.layers()[0]
            .split('.')
            .nth(2)
            .and_then(|block| block.parse::<usize>().ok());
        match (group.kind(), group.layers()[0].contains("mlp")) {
            (Elastic::Rank, _) => rank,
            (Elastic::Width, true) => mlp[block.unwrap()],
            (Elastic::Width, false) => heads[block.unwrap()],
            _ => depth,
        }
    };
    space
        .groups()
        .iter()
        .map(|group| (group.id().to_string(), value(group)))
        .collect()
}

fn subnets(space: &SearchSpace) -> Vec<(String, SubnetConfig)> {
    [
        ("small", subnet(space, 3, [11, 29, 37], [8, 16, 24], 4)),
        ("shallow", subnet(space, 5, [37; 3], [24; 3], 2)),
        ("least", space.minimal()),
        ("middle", space.heuristic()),
    ]
    .map(|(name, config)| (name.to_string(), config))
    .to_vec()
}

#[test]
fn a_sessions_subnet_is_the_super_networks() {
    for (tied, rule) in [
        (false, ScaleRule::AlphaOverMaxRank),
        (true, ScaleRule::AlphaOverRank),
        (false, ScaleRule::AlphaOverSqrtRank),
    ] {
        let mut net = net(tied, rule);
        let named = subnets(net.space());
        // The result must not depend on which subnet is active while the net is read.
        net.activate(&net.minimal()).unwrap();
        let model = Model::from_supernet(&net, &named, F32).unwrap();
        let whole = model.subnets()[0].config.clone();
        assert_eq!((model.subnets().len(), &whole), (5, &net.maximal()));
        let mut session = session(&model);
        let ids = random_ids(21, 41, 9);
        let mut seen: Vec<Vec<f32>> = Vec::new();
        let order = [
            ("whole", &whole),
            ("small", &named[0].1),
            ("shallow", &named[1].1),
            ("least", &named[2].1),
        ];
        for (name, config) in order.iter().chain([&("middle", &named[3].1), &order[0]]) {
            net.activate(config).unwrap();
            session.reset();
            session.set_subnet_named(name).unwrap();
            agrees(&net.eval_model(), &mut session, &ids, 1e-4, name);
            session.reset();
            seen.push(in_pieces(&mut session, &ids, &[ids.len()]));
            // The same subnet by its values, and as a model of its own.
            let mut other = Session::new(&model, &SessionConfig::default()).unwrap();
            other.set_config(config).unwrap();
            assert_eq!(
                in_pieces(&mut other, &ids, &[ids.len()]),
                *seen.last().unwrap()
            );
            let alone = model.extract(model.subnet_index(name).unwrap()).unwrap();
            let mut other = Session::new(&alone, &SessionConfig::default()).unwrap();
            let got = in_pieces(&mut other, &ids, &[ids.len()]);
            assert!(
                max_diff(&got, seen.last().unwrap()) / largest(&got) < 1e-5,
                "{name}"
            );
            let merged = alone.merged().unwrap();
            assert!(merged.layers().iter().all(|layer| layer.max_rank == 0));
            let got = in_pieces(
                &mut Session::new(&merged, &SessionConfig::default()).unwrap(),
                &ids,
                &[4],
            );
            assert!(
                max_diff(&got, seen.last().unwrap()) / largest(&got) < 1e-4,
                "{name}"
            );
            let merger = Merger::new()
                .with_mode(elastic_lora::merge::MergeMode::Dense)
                .extract(&net, &[], &Silent)
                .unwrap();
            assert_eq!(merger.model.config().blocks(), merged.config().blocks());
        }
        // Back at the first subnet, the result is unchanged, and all other results differ.
        assert_eq!(seen[0], seen[5]);
        assert!((1..5).all(|i| max_diff(&seen[0], &seen[i]) > 1e-3));
    }
}

#[test]
fn ranks_are_set_one_by_one_and_a_cache_belongs_to_its_subnet() {
    let mut net = net(false, ScaleRule::AlphaOverMaxRank);
    let model = Model::from_supernet(&net, &subnets(net.space()), F32).unwrap();
    let mut session = session(&model);
    let ids = random_ids(9, 41, 3);
    // With all adapters off, the model is the base.
    let none = vec![0; model.layers().len()];
    session.set_ranks(&none).unwrap();
    let mut base = net.eval_model();
    base.try_for_each_linear(|_, layer| {
        layer.adapter = None;
        Ok(())
    })
    .unwrap();
    agrees(&base, &mut session, &ids, 1e-4, "base");
    // One layer at a rank that no group offers.
    session.reset();
    let mut ranks: Vec<u32> = model
        .layers()
        .iter()
        .map(|layer| layer.max_rank as u32)
        .collect();
    let layer = model.layer_index("model.layers.2.mlp.down_proj").unwrap();
    ranks[layer] = 2;
    session.set_ranks(&ranks).unwrap();
    net.activate(&net.maximal()).unwrap();
    let mut one = net.eval_model();
    one.linear_mut("model.layers.2.mlp.down_proj")
        .unwrap()
        .set_active_rank(2)
        .unwrap();
    agrees(&one, &mut session, &ids, 1e-4, "one rank");
    assert_eq!(session.ranks()[layer], 2);

    let state = |error: Error| assert!(matches!(error, Error::InvalidState { .. }), "{error}");
    let before = in_pieces(&mut session, &ids[..2], &[]);
    state(session.set_subnet(1).unwrap_err());
    state(session.set_ranks(&none).unwrap_err());
    state(session.set_config(&net.minimal()).unwrap_err());
    session.set_ranks(&ranks).unwrap();
    session.truncate(ids.len());
    assert_eq!(in_pieces(&mut session, &ids[..2], &[]), before);
    session.reset();
    assert!(matches!(
        session.set_subnet(5),
        Err(Error::InvalidArgument { .. })
    ));
    assert!(matches!(
        session.set_subnet_named("large"),
        Err(Error::UnknownSubnet { .. })
    ));
    assert!(matches!(
        session.set_ranks(&none[1..]),
        Err(Error::ShapeMismatch { .. })
    ));
    ranks[layer] = 6;
    assert!(matches!(
        session.set_ranks(&ranks),
        Err(Error::InvalidRank {
            found: 6,
            max: 5,
            ..
        })
    ));
    let mut wrong = net.maximal();
    wrong.set("depth", 9);
    assert!(session.set_config(&wrong).is_err());
    // A model that is not a supernet has exactly one subnet.
    let plain = Model::from_decoder(&base, F32).unwrap();
    let mut session = Session::new(&plain, &SessionConfig::default()).unwrap();
    state(session.set_config(&net.minimal()).unwrap_err());
    session.set_subnet(0).unwrap();
}

#[test]
fn adapters_that_no_pair_of_factors_expresses_are_refused() {
    let model = tiny(false, 3);
    let space = SearchSpace::per_layer(&model.layer_shapes(), &[4, 2]).unwrap();
    let masked = SuperNetConfig::new(LoraConfig::new(4)).with_sparse_peft(true);
    let net = SuperNet::new(model, space, masked).unwrap();
    let error = Model::from_supernet(&net, &[], F32).unwrap_err();
    assert!(
        matches!(&error, Error::HasAdapter { layer, .. } if layer == "model.layers.0.self_attn.q_proj"),
        "{error}"
    );
    assert!(error.to_string().contains("merge it first"));
    let merged = Merger::new().merge(&net, &[], &Silent).unwrap().model;
    agrees(
        &merged,
        &mut session(&Model::from_decoder(&merged, F32).unwrap()),
        &random_ids(9, 41, 3),
        1e-4,
        "merged",
    );
    let net = self::net(false, ScaleRule::default());
    let taken = vec![
        ("a".to_string(), net.minimal()),
        ("a".to_string(), net.maximal()),
    ];
    assert!(matches!(
        Model::from_supernet(&net, &taken, F32),
        Err(Error::InvalidArgument { .. })
    ));
}

#[test]
fn sessions_in_a_batch_are_what_they_are_alone() {
    let net = net(true, ScaleRule::AlphaOverMaxRank);
    let decoders = [tiny_mistral(Some(5), 3), tiny(false, 2)];
    let mut models: Vec<Model> = decoders
        .iter()
        .map(|decoder| Model::from_decoder(decoder, F32).unwrap())
        .collect();
    models.push(Model::from_supernet(&net, &subnets(net.space()), F32).unwrap());
    models.push(
        models[1]
            .with_format(WeightFormat::Int {
                bits: 4,
                group_size: Some(8),
                symmetric: false,
            })
            .unwrap(),
    );
    for model in &models {
        let subnet = model.subnets().len() - 1;
        let make = |i: usize| {
            let format = if i == 1 {
                CacheFormat::F16
            } else {
                CacheFormat::F32
            };
            let mut session =
                Session::new(model, &SessionConfig::default().with_cache(format)).unwrap();
            session.set_subnet(subnet).unwrap();
            session
                .decode(&random_ids(1 + 4 * i, 41, i as u64), None)
                .unwrap();
            session
        };
        let (mut alone, mut together): (Vec<Session>, Vec<Session>) =
            (0..4).map(|i| (make(i), make(i))).unzip();
        for step in 0..5 {
            let tokens = random_ids(4, 41, 60 + step);
            let mut logits = vec![0.0; 4 * 41];
            let mut batch: Vec<&mut Session> = together.iter_mut().collect();
            decode_batch(&mut batch, &tokens, &mut logits).unwrap();
            for (i, session) in alone.iter_mut().enumerate() {
                let mut want = vec![0.0; 41];
                session.decode(&tokens[i..=i], Some(&mut want)).unwrap();
                let off = max_diff(&logits[i * 41..(i + 1) * 41], &want) / largest(&want);
                assert!(off < 1e-4, "session {i}, step {step}: {off}");
            }
        }
        let positions: Vec<usize> = together.iter().map(Session::position).collect();
        assert_eq!(positions, [6, 10, 14, 18]);
    }
    // Sessions that cannot be in one batch.
    let (mut a, mut b) = (session(&models[0]), session(&models[1]));
    let mut logits = vec![0.0; 82];
    assert!(matches!(
        decode_batch(&mut [&mut a, &mut b], &[1, 2], &mut logits),
        Err(Error::InvalidState { .. })
    ));
    let mut c = session(&models[0]);
    assert!(matches!(
        decode_batch(&mut [&mut a, &mut c], &[1], &mut logits),
        Err(Error::ShapeMismatch { .. })
    ));
    assert!(matches!(
        decode_batch(&mut [&mut a, &mut c], &[1, 41], &mut logits),
        Err(Error::TokenOutOfRange { .. })
    ));
    assert_eq!((a.position(), c.position()), (0, 0));
    decode_batch(&mut [], &[], &mut []).unwrap();
}

#[test]
fn threads_share_a_model_and_get_the_same_bits() {
    let net = net(false, ScaleRule::AlphaOverMaxRank);
    let model = Model::from_supernet(&net, &subnets(net.space()), F32)
        .unwrap()
        .with_n_threads(3)
        .unwrap();
    let run = |subnet: usize| {
        let mut session = Session::new(&model, &SessionConfig::default()).unwrap();
        session.set_subnet(subnet).unwrap();
        in_pieces(&mut session, &random_ids(30, 41, subnet as u64), &[17])
    };
    let want: Vec<Vec<f32>> = (0..5).map(run).collect();
    std::thread::scope(|scope| {
        for worker in 0..8 {
            let (want, run) = (&want, &run);
            scope.spawn(move || {
                (0..10).for_each(|i| assert_eq!(run((worker + i) % 5), want[(worker + i) % 5]))
            });
        }
    });
    let one = model.with_n_threads(1).unwrap();
    let mut session = Session::new(&one, &SessionConfig::default()).unwrap();
    assert_eq!(
        in_pieces(&mut session, &random_ids(30, 41, 0), &[17]),
        want[0]
    );
}
