//! Elastic widths, heads and depth: results and costs of a subnet, and that an extracted model
//! equals the subnet.

use crate::common::{max_diff, random_ids, random_values, tiny_dims, tiny_on, weight_bits};
use burn::tensor::Device;
use elastic_lora::adapter::LoraConfig;
use elastic_lora::arch::{BlockDims, Family, LinearKind, SubBlock};
use elastic_lora::data::{Batcher, Sequence};
use elastic_lora::io::hf::{HfConfig, LlamaDims};
use elastic_lora::io::{Checkpoint, DType};
use elastic_lora::linalg::Matrix;
use elastic_lora::model::Decoder;
use elastic_lora::nn::{BaseLinear, KvCache, host_values};
use elastic_lora::progress::Silent;
use elastic_lora::space::{Elastic, Group};
use elastic_lora::supernet::{SubnetCost, SuperNetConfig};
use elastic_lora::train::{TrainConfig, Trainer};
use elastic_lora::{Error, Merger, Result, SearchSpace, SubnetConfig, SuperNet};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

const QKV: [&str; 3] = ["q_proj", "k_proj", "v_proj"];
const GATE_UP: [&str; 2] = ["gate_proj", "up_proj"];

/// Three blocks with 6 heads of size 4, 3 key/value heads, and MLPs of width 37.
fn dims(tied: bool) -> LlamaDims {
    LlamaDims {
        num_hidden_layers: 3,
        num_attention_heads: 6,
        num_key_value_heads: 3,
        ..tiny_dims(tied)
    }
}

/// A model with biases everywhere and a third of the weights zero.
fn model(tied: bool) -> Decoder {
    let mut raw = HfConfig::new_llama(&dims(tied)).unwrap().raw().clone();
    raw.insert("attention_bias".into(), true.into());
    raw.insert("mlp_bias".into(), true.into());
    let device = Device::flex();
    let mut model = tiny_on(&dims(tied), 3, &device);
    let biased = Decoder::init(&HfConfig::from_json(raw).unwrap(), 3, &device).unwrap();
    let weights: Vec<Matrix> = model
        .linears()
        .map(|(_, layer)| layer.base.to_matrix())
        .collect();
    model = biased;
    let mut seed = 70;
    let mut weights = weights.into_iter();
    model
        .try_for_each_linear(|_, layer| {
            let mut weight = weights.next().unwrap();
            seed += 1;
            let hidden = random_values(weight.as_slice().len(), seed);
            weight
                .as_mut_slice()
                .iter_mut()
                .zip(hidden)
                .filter(|(_, h)| *h < -0.33)
                .for_each(|(w, _)| *w = 0.0);
            let bias: Vec<f32> = random_values(weight.rows(), 100 + seed)
                .into_iter()
                .map(|b| 0.3 * b.max(-0.5))
                .collect();
            layer.base = BaseLinear::from_matrix(&weight, Some(&bias), &device)?;
            Ok(())
        })
        .unwrap();
    model
}

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

/// A space with ranks, MLP widths, head counts (in channels) and a depth.
fn space(model: &Decoder) -> SearchSpace {
    let layers = model.layer_shapes();
    let width = |groups: &[&[&str]], choices: &[usize]| {
        SearchSpace::groups_by_block(Elastic::Width, &layers, groups, choices).unwrap()
    };
    SearchSpace::grouped(
        &layers,
        &[&QKV[..], &GATE_UP, &["down_proj"], &["o_proj"]],
        &[5, 3],
    )
    .unwrap()
    .with_groups(width(&[&GATE_UP], &[37, 29, 11]))
    .unwrap()
    .with_groups(width(&[&QKV], &[24, 16, 8]))
    .unwrap()
    .with_groups([Group::of_kind(Elastic::Depth, "depth", units(), vec![4, 3, 2, 1]).unwrap()])
    .unwrap()
}

/// A supernet with adapters that are not zero.
fn net(tied: bool) -> SuperNet {
    let model = model(tied);
    let space = space(&model);
    let mut net = SuperNet::new(
        model,
        space,
        SuperNetConfig::new(LoraConfig::new(5).with_alpha(7.0)),
    )
    .unwrap();
    let sequences = (0..4)
        .map(|seed| Sequence::unmasked(random_ids(12, 41, seed)))
        .collect();
    let mut config = TrainConfig::new(6);
    config.lr = 0.05;
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

fn logits(model: &Decoder) -> Vec<f32> {
    let ids = random_ids(3 * 13, 41, 5);
    host_values(model.forward(model.tokens(&ids, 3).unwrap()))
}

/// Returns the subnet with the given choice for each kind of group.
fn subnet(
    space: &SearchSpace,
    rank: usize,
    mlp: [usize; 3],
    heads: [usize; 3],
    depth: usize,
) -> SubnetConfig {
    let block = |group: &Group| {
        group.layers()[0]
            .split('.')
            .nth(2)
            .unwrap()
            .parse::<usize>()
            .unwrap()
    };
    let value = |group: &Group| match group.kind() {
        Elastic::Rank => rank,
        Elastic::Width if group.layers()[0].contains("mlp") => mlp[block(group)],
        Elastic::Width => heads[block(group)],
        _ => depth,
    };
    space
        .groups()
        .iter()
        .map(|group| (group.id().to_string(), value(group)))
        .collect()
}

fn subnets(space: &SearchSpace) -> Vec<SubnetConfig> {
    vec![
        subnet(space, 3, [29, 11, 37], [24, 24, 24], 4),
        subnet(space, 5, [37, 37, 37], [8, 16, 24], 4),
        subnet(space, 5, [37, 37, 37], [24, 24, 24], 3),
        subnet(space, 3, [11, 29, 37], [16, 24, 8], 2),
        subnet(space, 5, [11, 11, 11], [8, 8, 8], 1),
        subnet(space, 5, [29, 29, 29], [16, 16, 16], 4),
    ]
}

#[test]
fn an_extracted_model_gives_the_subnets_logits_and_costs_what_was_counted() {
    for tied in [true, false] {
        let mut net = net(tied);
        let full = logits(&net.eval_model());
        let size = full.iter().fold(1.0f32, |m, v| m.max(v.abs()));
        for (index, subnet) in subnets(net.space()).into_iter().enumerate() {
            net.activate(&subnet).unwrap();
            let expected = logits(&net.eval_model());
            assert!(max_diff(&expected, &full) > 1e-2, "{subnet}");
            let merged = Merger::new().with_mode(elastic_lora::merge::MergeMode::Dense);
            assert!(matches!(
                merged.merge(&net, &[], &Silent),
                Err(Error::Unsupported { .. })
            ));
            let merged = merged
                .extract(&net, &[random_ids(9, 41, 3)], &Silent)
                .unwrap();
            let off = max_diff(&logits(&merged.model), &expected);
            assert!(off < 1e-4 * size, "{subnet}: {off} of {size}");
            assert!(merged.report.max_logit_difference.unwrap() < 1e-4 * size);
            assert_eq!(merged.report.blocks, merged.model.config().blocks());
            assert_eq!(merged.report.left_out, net.model().left_out());

            // The costs that were counted are those of the extracted model: the base's part of
            // them, weight by weight.
            let (cost, count) = (net.cost(&subnet).unwrap(), merged.model.count_base_params());
            assert_eq!(cost.params - cost.adapter_params, count.total, "{subnet}");
            let plain = SubnetCost::of_config(merged.model.config());
            assert_eq!(
                (plain.params, plain.attention_width),
                (count.total, cost.attention_width)
            );
            let linear: usize = merged
                .model
                .layer_shapes()
                .iter()
                .map(|l| l.d_input * l.d_output)
                .sum();
            assert_eq!(plain.macs_per_token, linear + 41 * 24);
            assert_eq!(
                cost.macs_per_token,
                plain.macs_per_token + cost.adapter_params
            );
            assert_eq!(plain.attention_macs(10), cost.attention_width * 110);

            // Cached decoding of the narrowed supernet equals its full forward pass.
            if index == 3 {
                let (model, ids) = (net.eval_model(), random_ids(7, 41, 8));
                let mut cache = KvCache::new(model.layers.len());
                let mut last = Vec::new();
                for id in &ids {
                    let hidden =
                        model.hidden_states(model.tokens(&[*id], 1).unwrap(), Some(&mut cache));
                    last = host_values(model.logits(hidden));
                }
                let whole = host_values(model.forward(model.tokens(&ids, 1).unwrap()));
                assert!(max_diff(&last, &whole[6 * 41..]) < 1e-4 * size);
            }
        }
    }
}

/// Remaining halves of consecutive blocks are combined into one block, and a missing MLP may be
/// replaced by one of zeros.
#[test]
fn what_is_left_of_blocks_is_put_together() {
    for tied in [true, false] {
        let model = model(tied);
        let parts: Vec<String> = ["0.mlp", "1.self_attn", "2.mlp"]
            .map(|part| format!("model.layers.{part}"))
            .to_vec();
        let depth = Group::of_kind(
            Elastic::Depth,
            "depth",
            parts.into_iter().rev().collect(),
            vec![3, 2, 1, 0],
        )
        .unwrap();
        let space = SearchSpace::new(vec![depth]).unwrap();
        let mut net = SuperNet::new(model, space, SuperNetConfig::new(LoraConfig::new(4))).unwrap();
        // For each number of listed sub-blocks that stay: the sub-blocks of each block.
        let shapes = [
            (0, vec![(true, true), (true, false)]),
            (2, vec![(true, false), (true, true), (true, true)]),
        ];
        for stay in [0, 1, 2, 3] {
            net.activate(&SubnetConfig::from_iter([("depth".to_string(), stay)]))
                .unwrap();
            let expected = logits(&net.eval_model());
            for zero_mlps in [false, true] {
                let merged = Merger::new()
                    .with_zero_mlps(zero_mlps)
                    .extract(&net, &[random_ids(9, 41, 3)], &Silent)
                    .unwrap();
                let config = merged.model.config();
                let found: Vec<_> = config
                    .blocks()
                    .iter()
                    .map(|b| (b.has_attention(), b.has_mlp()))
                    .collect();
                if let Some((_, shape)) = shapes
                    .iter()
                    .find(|(n, _)| *n == stay)
                    .filter(|_| !zero_mlps)
                {
                    assert_eq!(&found, shape);
                }
                assert!(!zero_mlps || config.blocks().iter().all(BlockDims::has_mlp));
                assert_eq!(merged.report.blocks, config.blocks());
                assert!(max_diff(&logits(&merged.model), &expected) < 1e-5);
                assert_eq!(
                    SubnetCost::of_config(config).params,
                    merged.model.count_base_params().total
                );
            }
        }
    }
}

#[test]
fn zeros_are_counted_channel_by_channel() {
    let model = model(true);
    let mut net = SuperNet::new(
        model.clone(),
        space(&model),
        SuperNetConfig::new(LoraConfig::new(5)),
    )
    .unwrap();
    for subnet in subnets(net.space()) {
        net.activate(&subnet).unwrap();
        // Fresh adapters add nothing, so that the merged weights are the base's own.
        let merged = Merger::new().extract(&net, &[], &Silent).unwrap();
        let (cost, count) = (net.cost(&subnet).unwrap(), merged.model.count_base_params());
        assert_eq!(
            cost.nonzero_params - cost.adapter_params,
            count.nonzero,
            "{subnet}"
        );
        assert!(count.nonzero < count.total);
        assert_eq!(merged.report.zeros_lost, 0);
    }
    let counted = model.count_base_params();
    assert_eq!(
        (net.base_params().total, net.base_params().nonzero),
        (counted.total, counted.nonzero)
    );
}

#[test]
fn choosing_another_subnet_moves_no_weight() {
    let mut net = net(false);
    let (before, first) = (weight_bits(net.model()), logits(&net.eval_model()));
    let mut seen = Vec::new();
    for subnet in subnets(net.space()) {
        net.activate(&subnet).unwrap();
        seen.push((subnet, logits(&net.eval_model())));
    }
    for (subnet, expected) in seen.iter().rev() {
        net.activate(subnet).unwrap();
        assert_eq!(&logits(&net.eval_model()), expected);
    }
    net.activate(&net.maximal()).unwrap();
    assert_eq!(logits(&net.eval_model()), first);
    assert_eq!(weight_bits(net.model()), before);
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    for _ in 0..20 {
        let subnet = net.sample(&mut rng);
        net.activate(&subnet).unwrap();
        assert!(logits(&net.eval_model()).iter().all(|v| v.is_finite()));
    }
}

/// A smaller width equals the same model with the other channels cut off by hand.
#[test]
fn a_width_is_a_prefix_of_the_channels() {
    let mut net = net(true);
    let subnet = subnet(net.space(), 5, [29, 37, 37], [24, 16, 24], 4);
    net.activate(&net.maximal()).unwrap();
    let dense = elastic_lora::merge::MergeMode::Dense;
    let mut by_hand = Merger::new()
        .with_mode(dense)
        .merge(&net, &[], &Silent)
        .unwrap()
        .model;
    net.activate(&subnet).unwrap();
    for (name, kept) in [
        ("model.layers.0.mlp.down_proj", 29),
        ("model.layers.1.self_attn.o_proj", 16),
    ] {
        let layer = by_hand.linear_mut(name).unwrap();
        let mut weight = layer.base.to_matrix();
        (0..weight.rows()).for_each(|row| weight.row_mut(row)[kept..].fill(0.0));
        layer.base.set_matrix(&weight).unwrap();
    }
    let (expected, got) = (logits(&by_hand), logits(&net.eval_model()));
    let size = expected.iter().fold(1.0f32, |m, v| m.max(v.abs()));
    assert!(max_diff(&got, &expected) < 1e-5 * size);
}

#[test]
fn extracted_models_are_written_and_read_back() {
    let mut net = net(true);
    let dir = tempfile::tempdir().unwrap();
    for (index, subnet) in subnets(net.space()).into_iter().enumerate() {
        net.activate(&subnet).unwrap();
        let mode = elastic_lora::merge::MergeMode::Dense;
        let model = Merger::new()
            .with_mode(mode)
            .extract(&net, &[], &Silent)
            .unwrap()
            .model;
        let alike = model
            .config()
            .blocks()
            .windows(2)
            .all(|pair| pair[0] == pair[1]);
        let family = if alike {
            Family::Llama
        } else {
            Family::ElasticLlama
        };
        assert_eq!(
            model.config().family(),
            family,
            "{:?}",
            model.config().blocks()
        );
        assert_eq!(model.config().raw().contains_key("block_configs"), !alike);
        let folder =
            elastic_lora::io::hf::HfFolder::create(dir.path().join(index.to_string()), false)
                .unwrap();
        folder
            .write_model(
                model.config(),
                DType::F32,
                model.tensors(DType::F32).unwrap(),
            )
            .unwrap();
        folder.commit().unwrap();
        let path = dir.path().join(index.to_string());
        let config = HfConfig::open(&path).unwrap();
        assert_eq!(config.blocks(), model.config().blocks());
        let read =
            Decoder::load(&config, &Checkpoint::open(&path).unwrap(), &Device::flex()).unwrap();
        assert_eq!(logits(&read), logits(&model));
    }
}

fn llama_7b() -> HfConfig {
    HfConfig::new_llama(&LlamaDims {
        vocab_size: 32_000,
        hidden_size: 4096,
        intermediate_size: 11_008,
        num_hidden_layers: 32,
        num_attention_heads: 32,
        num_key_value_heads: 32,
        max_position_embeddings: 2048,
        rope_theta: 1e4,
        rms_norm_eps: 1e-6,
        tie_word_embeddings: false,
        bos_token_id: Some(1),
        eos_token_id: Some(2),
        pad_token_id: None,
        dtype: DType::F16,
    })
    .unwrap()
}

/// LoNAS, table 1: numbers of parameters, and the numbers that the paper calls TFLOPs.
#[test]
fn costs_of_llama_7b_are_the_published_ones() {
    let config = llama_7b();
    for (width, params, macs) in [
        (11_008, 6.738, 1.691),
        (8256, 5.656, 1.414),
        (6880, 5.115, 1.276),
        (5504, 4.574, 1.137),
    ] {
        let blocks = vec![
            BlockDims {
                d_mlp: width,
                ..config.blocks()[0]
            };
            32
        ];
        let cost = SubnetCost::of_config(&config.with_blocks(&blocks).unwrap());
        assert!(
            (cost.params as f64 / 1e9 - params).abs() < 5e-4,
            "{width}: {}",
            cost.params
        );
        assert!(
            (cost.macs(256) as f64 / 1e12 - macs).abs() < 5e-4,
            "{width}: {}",
            cost.macs(256)
        );
    }
    // Counted by hand: embedding and head, 32 blocks of attention, MLP and two norms, and the last
    // norm.
    let by_hand = 2 * 32_000 * 4096 + 32 * (4 * 4096 * 4096 + 3 * 4096 * 11_008 + 2 * 4096) + 4096;
    assert_eq!(SubnetCost::of_config(&config).params, by_hand);
}

#[test]
fn blocks_that_differ_are_said_as_decilm_says_them_where_it_can() {
    let config = llama_7b();
    let mut blocks = config.blocks().to_vec();
    for (index, block) in blocks.iter_mut().enumerate() {
        block.d_mlp = 256 * (1 + index);
        block.n_kv_heads = [32, 16, 8, 4][index % 4];
    }
    blocks[7] = BlockDims {
        n_heads: 0,
        n_kv_heads: 0,
        ..blocks[7]
    };
    let deci = config.with_blocks(&blocks).unwrap();
    assert_eq!((deci.family(), deci.blocks()), (Family::Deci, &blocks[..]));
    assert_eq!(deci.raw()["architectures"][0], "DeciLMForCausalLM");
    let item = &deci.raw()["block_configs"][2];
    assert_eq!(item["attention"]["n_heads_in_group"], 4);
    let factor = item["ffn"]["ffn_mult"].as_f64().unwrap();
    assert_eq!(
        ((2.0 * factor * 4096.0 / 3.0) as usize).next_multiple_of(256),
        768
    );
    assert_eq!(deci.raw()["block_configs"][7]["attention"]["no_op"], true);
    let names: Vec<String> = deci
        .arch()
        .tensors()
        .into_iter()
        .map(|(name, _)| name)
        .collect();
    assert!(!names.iter().any(|name| name.contains("layers.7.self_attn")));
    assert!(!names.contains(&"model.layers.7.input_layernorm.weight".to_string()));
    assert!(names.contains(&"model.layers.7.post_attention_layernorm.weight".to_string()));

    // Readers of this form round factors to 6 decimals; every width survives this.
    for heads in [7, 12, 32, 64] {
        let mut raw = config.raw().clone();
        raw.insert("hidden_size".into(), (128 * heads).into());
        raw.insert("num_attention_heads".into(), heads.into());
        raw.insert("num_key_value_heads".into(), heads.into());
        let config = HfConfig::from_json(raw).unwrap();
        for start in [0, 32, 64, 96] {
            let block = |index: usize| BlockDims {
                n_heads: heads,
                n_kv_heads: heads,
                d_mlp: 256 * (1 + index),
            };
            let blocks: Vec<BlockDims> = (start..start + 32).map(block).collect();
            let deci = config.with_blocks(&blocks).unwrap();
            assert_eq!((deci.family(), deci.blocks()), (Family::Deci, &blocks[..]));
            for (item, block) in deci.raw()["block_configs"]
                .as_array()
                .unwrap()
                .iter()
                .zip(&blocks)
            {
                let factor = item["ffn"]["ffn_mult"].as_f64().unwrap();
                assert_eq!(factor, format!("{factor:.6}").parse::<f64>().unwrap());
                assert_eq!(
                    ((2.0 * factor * 128.0 * heads as f64 / 3.0) as usize).next_multiple_of(256),
                    block.d_mlp
                );
            }
        }
    }
    // Some readers compute the size of a head as the hidden size divided by the number of heads.
    let fewer: Vec<BlockDims> = (1..5)
        .map(|n| BlockDims {
            n_heads: 16,
            n_kv_heads: 8,
            d_mlp: 256 * n,
        })
        .collect();
    assert_eq!(
        config.with_blocks(&fewer).unwrap().family(),
        Family::ElasticLlama
    );
    // Fields that other models' blocks have and this crate's do not.
    for (part, field, value) in [
        ("attention", "window_length", serde_json::json!(512)),
        ("attention", "unshifted_sink", true.into()),
        ("attention", "replace_with_linear", true.into()),
        ("ffn", "moe", serde_json::json!({"num_local_experts": 4})),
        ("ffn", "hidden_act", "gelu".into()),
        ("ffn", "gated", false.into()),
    ] {
        let mut raw = deci.raw().clone();
        for (index, refused) in [
            (
                if part == "ffn" { 9 } else { 7 },
                field == "replace_with_linear",
            ),
            (2, true),
        ] {
            raw["block_configs"][9]["ffn"]["no_op"] = true.into();
            raw["block_configs"][index][part][field] = value.clone();
            let result = HfConfig::from_json(raw.clone());
            assert_eq!(
                result.is_err(),
                refused,
                "{part}.{field} of block {index}: {result:?}"
            );
            raw = deci.raw().clone();
        }
    }

    // Fewer query heads in one block, or a width that is not a multiple of 256, can only be written
    // in this crate's own form.
    for change in [
        |b: &mut BlockDims| b.n_heads = 16,
        |b: &mut BlockDims| b.d_mlp = 300,
    ] {
        let mut blocks = blocks.clone();
        change(&mut blocks[0]);
        blocks[0].n_kv_heads = 16;
        let own = config.with_blocks(&blocks).unwrap();
        assert_eq!(
            (own.family(), own.blocks()),
            (Family::ElasticLlama, &blocks[..])
        );
        // Blocks that are all alike again are written as a stock config.
        let alike = own
            .with_blocks(
                &[BlockDims {
                    n_heads: 16,
                    n_kv_heads: 8,
                    d_mlp: 100,
                }; 5],
            )
            .unwrap();
        assert_eq!(alike.family(), Family::Llama);
        assert_eq!(
            (
                alike.num_hidden_layers(),
                alike.intermediate_size(),
                alike.head_dim()
            ),
            (5, 100, 128)
        );
    }
    // Configurations that some readers of DeciLM's form would compute differently, or not at all: a
    // first block without attention, a block without an MLP, scaled positions.
    let own = |config: &HfConfig, blocks: &[BlockDims]| {
        let other = config.with_blocks(blocks).unwrap();
        assert_eq!(
            (other.family(), other.blocks()),
            (Family::ElasticLlama, blocks)
        );
    };
    let mut first = blocks.clone();
    first[0] = BlockDims {
        n_heads: 0,
        n_kv_heads: 0,
        ..first[0]
    };
    own(&config, &first);
    let mut gap = blocks.clone();
    gap[9].d_mlp = 0;
    own(&config, &gap);
    let llama3 = |length: usize| {
        serde_json::json!({
            "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": length, "rope_theta": 5e5,
        })
    };
    let scaled = |parameters: serde_json::Value| {
        let mut raw = config.raw().clone();
        raw.remove("rope_theta");
        raw.insert("rope_parameters".into(), parameters);
        HfConfig::from_json(raw).unwrap()
    };
    own(
        &scaled(serde_json::json!({"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5})),
        &blocks,
    );
    own(&scaled(llama3(4096)), &blocks);
    // A scaling that they know is also written in the old way.
    let known = scaled(llama3(8192));
    let other = known.with_blocks(&blocks).unwrap();
    assert_eq!(
        (other.family(), other.rope_scaling()),
        (Family::Deci, known.rope_scaling())
    );
    assert_eq!(other.raw()["rope_theta"], 5e5);
    assert_eq!(other.raw()["rope_scaling"]["rope_type"], "llama3");
    assert_eq!(HfConfig::from_json(other.raw().clone()).unwrap(), other);

    let nothing = BlockDims {
        n_heads: 0,
        n_kv_heads: 0,
        d_mlp: 0,
    };
    for bad in [
        vec![],
        vec![nothing],
        vec![blocks[0], nothing],
        vec![
            BlockDims {
                n_heads: 7,
                n_kv_heads: 3,
                d_mlp: 4
            };
            2
        ],
    ] {
        assert!(
            matches!(config.with_blocks(&bad), Err(Error::InvalidConfig { .. })),
            "{bad:?}"
        );
    }
}

#[test]
fn spaces_that_make_no_model_are_refused() {
    let model = model(true);
    let layer = |block: usize, kind: LinearKind| kind.name(block);
    let qkv = |block| {
        [LinearKind::Q, LinearKind::K, LinearKind::V]
            .map(|kind| layer(block, kind))
            .to_vec()
    };
    let gate_up = |block| {
        [LinearKind::Gate, LinearKind::Up]
            .map(|kind| layer(block, kind))
            .to_vec()
    };
    let refused = |kind: Elastic, layers: Vec<String>, choices: &[usize]| {
        let space = SearchSpace::new(vec![
            Group::of_kind(kind, "it", layers, choices.to_vec()).unwrap(),
        ])
        .unwrap();
        match SuperNet::new(
            model.clone(),
            space,
            SuperNetConfig::new(LoraConfig::new(4)),
        ) {
            Err(Error::InvalidSpace { group, reason }) => {
                assert_eq!(group, "it");
                reason
            }
            other => panic!("{other:?}"),
        }
    };
    // 6 heads of size 4 over 3 key/value heads: steps of 8.
    for width in [23, 12, 4] {
        let reason = refused(Elastic::Width, qkv(0), &[24, width]);
        assert!(
            reason.contains(&format!("{width} is no whole number of heads")),
            "{reason}"
        );
    }
    let mixed = refused(Elastic::Width, [qkv(0), gate_up(0)].concat(), &[24]);
    assert!(mixed.contains("differ in shape"), "{mixed}");
    let alone = refused(Elastic::Width, vec![layer(1, LinearKind::Up)], &[20]);
    assert!(alone.contains("model.layers.1.mlp.gate_proj"), "{alone}");
    let stream = refused(Elastic::Width, vec![layer(1, LinearKind::O)], &[20]);
    assert!(stream.contains("residual stream"), "{stream}");
    let all = (0..3)
        .map(|block| format!("model.layers.{block}"))
        .collect::<Vec<_>>();
    let nothing = refused(Elastic::Depth, all.clone(), &[3, 0]);
    assert!(nothing.contains("nothing is left"), "{nothing}");
    let unit = refused(
        Elastic::Depth,
        vec!["model.layers.1.mlp.up_proj".into()],
        &[1, 0],
    );
    assert!(unit.contains("neither a block"), "{unit}");
    let empty = Group::of_kind(Elastic::Depth, "it", all, vec![]).unwrap_err();
    assert!(
        matches!(&empty, Error::InvalidSpace { reason, .. } if reason.contains("no choices")),
        "{empty}"
    );

    // A group over blocks of different sizes.
    let mut blocks = model.config().blocks().to_vec();
    blocks[1].d_mlp = 20;
    let config = model.config().with_blocks(&blocks).unwrap();
    let other = Decoder::init(&config, 1, &Device::flex()).unwrap();
    let space = SearchSpace::new(vec![
        Group::of_kind(
            Elastic::Width,
            "it",
            [gate_up(0), gate_up(1)].concat(),
            vec![20, 10],
        )
        .unwrap(),
    ])
    .unwrap();
    let error = SuperNet::new(other, space, SuperNetConfig::new(LoraConfig::new(4))).unwrap_err();
    assert!(error.to_string().contains("differ in shape"), "{error}");
}

#[test]
fn a_space_may_have_no_ranks_at_all() -> Result<()> {
    let model = model(true);
    let layers = model.layer_shapes();
    let widths = SearchSpace::groups_by_block(Elastic::Width, &layers, &[GATE_UP], &[37, 20])?;
    let mut net = SuperNet::new(
        model,
        SearchSpace::new(widths)?,
        SuperNetConfig::new(LoraConfig::new(4)),
    )?;
    net.activate(&net.minimal())?;
    assert!(
        net.model()
            .layers
            .iter()
            .all(|block| block.runs(SubBlock::Mlp) && block.has(SubBlock::Attention))
    );
    let extracted = Merger::new().extract(&net, &[], &Silent)?.model;
    assert_eq!(extracted.config().intermediate_size(), 20);
    assert_eq!(
        max_diff(&logits(&extracted), &logits(&net.eval_model())),
        0.0
    );
    assert!(net.extract_adapter()?.layers.is_empty());
    Ok(())
}

/// Even the lowest rank is an adapter that trains at every width.
#[test]
fn factors_are_as_wide_as_the_layer() {
    let mut net = net(true);
    let subnet = subnet(net.space(), 3, [11, 29, 37], [16, 24, 8], 2);
    net.activate(&subnet).unwrap();
    let lora = net.extract_adapter().unwrap();
    let up = &lora.layers["model.layers.0.mlp.up_proj"];
    assert_eq!((up.rank(), up.d_input(), up.d_output()), (3, 24, 11));
    let q = &lora.layers["model.layers.2.self_attn.q_proj"];
    assert_eq!((q.rank(), q.d_input(), q.d_output()), (3, 24, 8));
    // The second block and the MLP of the last block are left out.
    assert!(
        !lora
            .layers
            .keys()
            .any(|name| name.contains("layers.1.") || name.contains("layers.2.mlp"))
    );
}
