//! Importance order of channels, heads and blocks: moving, scoring and measuring them.

use std::path::Path;

use crate::arithmetic::{Kind, Problem, Split};
use crate::common::{Heard, is_factor, max_diff, random_ids, shared, tiny, weight_bits};
use burn::module::Module;
use burn::tensor::Tensor;
use elastic_lora::adapter::LoraConfig;
use elastic_lora::arch::{LinearKind, SubBlock};
use elastic_lora::calib::{
    BlockScores, ChannelOrder, ChannelScore, InfluenceMeasure, TaylorConfig, block_influence,
    channel_scores, sort_channels, taylor_scores,
};
use elastic_lora::data::{
    PromptTemplate, Record, Sequence, TokenizeOptions, fixed_batches, join_documents,
    tokenize_records,
};
use elastic_lora::eval::{mean_loss, perplexity};
use elastic_lora::io::{DType, HfConfig};
use elastic_lora::linalg::Matrix;
use elastic_lora::model::{Block, Decoder, Pretrained};
use elastic_lora::nn::host_values;
use elastic_lora::progress::Silent;
use elastic_lora::sparsity::InputNorms;
use elastic_lora::supernet::SuperNetConfig;
use elastic_lora::{Error, SearchSpace, SuperNet};
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Six heads over three key/value heads, so that groups have two heads, an MLP of width 37, and
/// biases everywhere.
fn biased(seed: u64) -> Decoder {
    let value = serde_json::json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 41, "hidden_size": 24,
        "intermediate_size": 37, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 3,
        "head_dim": 4, "max_position_embeddings": 40, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": false, "attention_bias": true, "mlp_bias": true,
    });
    let config = HfConfig::from_json(value.as_object().unwrap().clone()).unwrap();
    let device = burn::tensor::Device::flex();
    let mut model = Decoder::init(&config, seed, &device).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    model
        .try_for_each_linear(|_, layer| {
            // The units have different magnitudes, so that their order does not depend on rounding.
            let [d_input, d_output] = layer.base.dims();
            let weight = Matrix::from_fn(d_output, d_input, |o, i| {
                let size = 0.15 + 0.05 * ((o * 7 + i * 5) % 11) as f32;
                rng.random_range(-1.0f32..1.0) * size
            });
            let bias: Vec<f32> = (0..d_output)
                .map(|_| rng.random_range(-0.5f32..0.5))
                .collect();
            layer.base = elastic_lora::nn::BaseLinear::from_matrix(&weight, Some(&bias), &device)?;
            Ok(())
        })
        .unwrap();
    model
}

fn samples(n: usize, len: usize, seed: u64) -> Vec<Vec<u32>> {
    (0..n)
        .map(|i| random_ids(len + i % 3, 41, seed + i as u64))
        .collect()
}

fn logits(model: &Decoder) -> Vec<f32> {
    host_values(model.forward(model.tokens(&random_ids(3 * 17, 41, 5), 3).unwrap()))
}

fn shuffled(n: usize, rng: &mut ChaCha8Rng) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    order.shuffle(rng);
    order
}

fn inverse(order: &[usize]) -> Vec<usize> {
    let mut inverse = vec![0; order.len()];
    order
        .iter()
        .enumerate()
        .for_each(|(place, unit)| inverse[*unit] = place);
    inverse
}

#[test]
fn another_order_of_channels_and_heads_gives_the_same_logits() {
    let stored = |dtype: DType| biased(1).with_weight_dtype(dtype).unwrap();
    for (what, model) in [
        ("biases, three groups of two", biased(1)),
        ("no biases, two groups of two", tiny(false, 2)),
        ("bf16", stored(DType::BF16)),
        ("f16", stored(DType::F16)),
        (
            "trained",
            SuperNet::dense(biased(3)).unwrap().into_model().train(),
        ),
    ] {
        let mut rng = ChaCha8Rng::seed_from_u64(9);
        let mut moved = model.clone();
        let orders: Vec<_> = (0..model.layers.len())
            .map(|block| {
                let (channels, groups) = (
                    model.layers[block].n_mlp_channels(),
                    model.layers[block].n_kv_groups(),
                );
                (shuffled(channels, &mut rng), shuffled(groups, &mut rng))
            })
            .collect();
        for (block, (channels, groups)) in orders.iter().enumerate() {
            moved.permute_mlp(block, channels).unwrap();
            moved.permute_heads(block, groups).unwrap();
            let (old, new) = (&model.layers[block], &moved.layers[block]);
            let up = |block: &Block| block.linear(LinearKind::Up).unwrap().base.to_matrix();
            let (old, new) = (up(old), up(new));
            channels
                .iter()
                .enumerate()
                .for_each(|(place, unit)| assert_eq!(new.row(place), old.row(*unit)));
        }
        assert_ne!(weight_bits(&moved), weight_bits(&model), "{what}");
        let (before, after) = (logits(&model), logits(&moved));
        let largest = before.iter().fold(0.0f32, |a, b| a.max(b.abs()));
        assert!(
            max_diff(&before, &after) < 1e-5 * largest.max(1.0),
            "{what}"
        );
        assert_eq!(moved.device(), model.device(), "{what}");
        for ((name, a), (_, b)) in model.linears().zip(moved.linears()) {
            assert_eq!(
                a.base.weight().is_require_grad(),
                b.base.weight().is_require_grad(),
                "{what} {name}"
            );
        }
        for (block, (channels, groups)) in orders.iter().enumerate() {
            moved.permute_mlp(block, &inverse(channels)).unwrap();
            moved.permute_heads(block, &inverse(groups)).unwrap();
        }
        assert_eq!(weight_bits(&moved), weight_bits(&model), "{what}");
    }
}

#[test]
fn what_is_no_order_of_the_units_is_refused() {
    let mut model = biased(1);
    let before = weight_bits(&model);
    let identity: Vec<usize> = (0..37).collect();
    let mut twice = identity.clone();
    twice[4] = 9;
    let mut beyond = identity.clone();
    beyond[36] = 37;
    for bad in [&identity[..36], &twice, &beyond, &[]] {
        assert!(
            matches!(
                model.permute_mlp(1, bad),
                Err(Error::InvalidArgument { .. })
            ),
            "{bad:?}"
        );
    }
    // Six query heads, but three groups.
    assert!(model.permute_heads(0, &[0, 1, 2, 3, 4, 5]).is_err());
    assert!(model.permute_heads(0, &[0, 1, 1]).is_err());
    assert!(model.permute_mlp(3, &identity).is_err());
    let order = sort_channels(&mut model.clone(), &[], ChannelScore::L1, &Silent).unwrap();
    let mut broken = order.clone();
    broken.blocks[2].kv_groups = vec![0, 2, 2];
    assert!(broken.apply(&mut model).is_err() && broken.inverse().is_err());
    broken.blocks.pop();
    assert!(matches!(
        broken.apply(&mut model),
        Err(Error::ShapeMismatch { .. })
    ));
    for score in [ChannelScore::Activation, ChannelScore::Taylor] {
        for none in [vec![], vec![vec![]]] {
            assert!(matches!(
                sort_channels(&mut model, &none, score, &Silent),
                Err(Error::InvalidArgument {
                    name: "samples",
                    ..
                })
            ));
        }
        let outside = vec![vec![3, 41, 2]];
        assert!(matches!(
            sort_channels(&mut model, &outside, score, &Silent),
            Err(Error::TokenOutOfRange { found: 41, .. })
        ));
        assert!(sort_channels(&mut model, &[vec![1; 41]], score, &Silent).is_err());
    }
    assert!(sort_channels(&mut model, &[vec![7]], ChannelScore::Taylor, &Silent).is_err());
    assert!(block_influence(&model, &[], InfluenceMeasure::Cosine, &Silent).is_err());
    assert!(block_influence(&model, &[vec![7]], InfluenceMeasure::Loss, &Silent).is_err());
    let rank = TaylorConfig {
        rank: 0,
        ..TaylorConfig::default()
    };
    assert!(taylor_scores(&model, &[vec![7, 8]], &rank, &Silent).is_err());
    assert_eq!(weight_bits(&model), before);

    let space = SearchSpace::fixed(&model.layer_shapes(), 2).unwrap();
    let mut adapted = SuperNet::new(model, space, SuperNetConfig::new(LoraConfig::new(2)))
        .unwrap()
        .into_model();
    assert!(matches!(
        adapted.permute_mlp(0, &identity),
        Err(Error::HasAdapter { .. })
    ));
    assert!(matches!(
        adapted.permute_heads(0, &[2, 0, 1]),
        Err(Error::HasAdapter { .. })
    ));
    assert!(matches!(
        order.apply(&mut adapted),
        Err(Error::HasAdapter { .. })
    ));
    for score in ChannelScore::ALL {
        let refused = sort_channels(&mut adapted, &[vec![7, 8]], score, &Silent);
        assert!(matches!(refused, Err(Error::HasAdapter { .. })));
    }
}

#[test]
fn sorting_puts_scores_in_order_and_can_be_undone() {
    let model = biased(4);
    let (before, data) = (weight_bits(&model), samples(7, 13, 1));
    for score in ChannelScore::ALL {
        let mut sorted = model.clone();
        let heard = Heard::default();
        let order = sort_channels(&mut sorted, &data, score, &heard).unwrap();
        heard.assert_all("score channels", heard.steps().len());
        let (first, after) = (logits(&model), logits(&sorted));
        assert!(max_diff(&first, &after) < 1e-4, "{score}");
        let old = channel_scores(&model, &data, score, &Silent).unwrap();
        for (block, (scores, order)) in old.iter().zip(&order.blocks).enumerate() {
            for (scores, order) in [
                (&scores.mlp, &order.mlp),
                (&scores.kv_groups, &order.kv_groups),
            ] {
                assert!(scores.iter().all(|score| *score > 0.0));
                assert!(
                    order.windows(2).all(|w| scores[w[0]] >= scores[w[1]]),
                    "{score} {block}"
                );
            }
        }
        assert_ne!(weight_bits(&sorted), before);
        let json = serde_json::to_string(&order).unwrap();
        let read: ChannelOrder = serde_json::from_str(&json).unwrap();
        assert_eq!(read, order);
        read.inverse().unwrap().apply(&mut sorted).unwrap();
        assert_eq!(weight_bits(&sorted), before, "{score}");
    }
}

#[test]
fn parts_that_are_missing_or_narrowed() {
    // No attention in the first block, and no MLP in the second.
    let mut model = biased(4);
    model.layers[0].self_attn = None;
    model.layers[1].mlp = None;
    for score in ChannelScore::ALL {
        let mut sorted = model.clone();
        let order = sort_channels(&mut sorted, &samples(4, 13, 1), score, &Silent).unwrap();
        let lengths: Vec<_> = order
            .blocks
            .iter()
            .map(|block| (block.mlp.len(), block.kv_groups.len()))
            .collect();
        assert_eq!(lengths, [(37, 0), (0, 3), (37, 3)], "{score}");
        assert!(
            max_diff(&logits(&model), &logits(&sorted)) < 1e-4,
            "{score}"
        );
        assert_ne!(weight_bits(&sorted), weight_bits(&model));
    }
    let mut narrowed = biased(4);
    narrowed.layers[2]
        .linear_mut(LinearKind::Up)
        .unwrap()
        .base
        .set_active_dims([24, 30])
        .unwrap();
    for score in ChannelScore::ALL {
        let refused = sort_channels(&mut narrowed, &samples(4, 13, 1), score, &Silent);
        assert!(matches!(refused, Err(Error::Unsupported { .. })), "{score}");
    }
    assert!(matches!(
        narrowed.permute_heads(0, &[2, 0, 1]),
        Err(Error::Unsupported { .. })
    ));
}

#[test]
fn equal_units_stay_where_they_are() {
    let mut model = tiny(true, 3);
    model
        .try_for_each_linear(|_, layer| {
            let [d_input, d_output] = layer.base.dims();
            layer
                .base
                .set_matrix(&Matrix::from_fn(d_output, d_input, |_, _| 0.25))
        })
        .unwrap();
    let order = sort_channels(&mut model, &samples(3, 9, 2), ChannelScore::L2, &Silent).unwrap();
    for block in &order.blocks {
        assert_eq!(block.mlp, (0..37).collect::<Vec<_>>());
        assert_eq!(block.kv_groups, [0, 1]);
    }
}

#[test]
fn scores_and_influence_are_the_same_at_any_number_of_threads() {
    let (model, data) = (biased(5), samples(9, 16, 3));
    let pools = [1, 2, 5].map(|n| {
        rayon::ThreadPoolBuilder::new()
            .num_threads(n)
            .build()
            .unwrap()
    });
    let runs = pools.map(|pool| {
        pool.install(|| {
            let scores = ChannelScore::ALL
                .map(|score| channel_scores(&model, &data, score, &Silent).unwrap());
            let units = block_influence(&model, &data, InfluenceMeasure::Loss, &Silent).unwrap();
            (scores, units)
        })
    });
    assert!(runs.windows(2).all(|pair| pair[0] == pair[1]));
}

#[test]
fn activation_scores_are_those_of_the_inputs_as_they_are() {
    let (model, data) = (biased(6), samples(5, 11, 4));
    let scores = channel_scores(&model, &data, ChannelScore::Activation, &Silent).unwrap();
    let mut states: Vec<Tensor<3>> = data
        .iter()
        .map(|ids| model.embed(model.tokens(ids, 1).unwrap()))
        .collect();
    for (block, scores) in scores.iter().enumerate() {
        let mut norms = [InputNorms::new(24), InputNorms::new(37)];
        for state in &mut states {
            let mut tap = |kind: LinearKind, x: &Tensor<3>| match kind {
                LinearKind::O => norms[0].update(&host_values(x.clone()), 1).unwrap(),
                LinearKind::Down => norms[1].update(&host_values(x.clone()), 1).unwrap(),
                _ => (),
            };
            *state = model.block(block, state.clone(), Some(&mut tap));
        }
        let weight = |kind| model.layers[block].linear(kind).unwrap().base.to_matrix();
        // Sums of Wanda's scores over the columns of each channel.
        let sums = |kind, width: usize, norms: &InputNorms| -> Vec<f64> {
            let (weight, norms) = (weight(kind), norms.mean_sq_norms());
            let score = |i: usize, j: usize| f64::from(weight.row(i)[j].abs() * norms[j].sqrt());
            (0..weight.cols() / width)
                .map(|channel| {
                    let columns = channel * width..(channel + 1) * width;
                    let rows = 0..weight.rows();
                    rows.map(|i| columns.clone().map(|j| score(i, j)).sum::<f64>())
                        .sum()
                })
                .collect()
        };
        let heads = sums(LinearKind::O, 8, &norms[0]);
        let mlp = sums(LinearKind::Down, 1, &norms[1]);
        assert_eq!((scores.mlp.len(), scores.kv_groups.len()), (37, 3));
        for (a, b) in scores
            .mlp
            .iter()
            .chain(&scores.kv_groups)
            .zip(mlp.iter().chain(&heads))
        {
            approx::assert_relative_eq!(a, b, max_relative = 1e-5);
        }
    }
}

/// Returns `|<w, dL/dw>|` from the gradients of the weights themselves.
fn exact_taylor(model: &Decoder, ids: &[u32], rows: usize) -> Vec<BlockScores> {
    let trained = SuperNet::dense(model.clone()).unwrap().into_model().train();
    let length = ids.len() / rows;
    let targets: Vec<(usize, u32)> = (0..ids.len())
        .filter(|i| i % length > 0)
        .map(|i| (i - 1, ids[i]))
        .collect();
    let loss = trained
        .nll_sum(trained.tokens(ids, rows).unwrap(), &targets)
        .unwrap()
        / targets.len() as f64;
    let grads = loss.backward();
    (trained.layers.iter())
        .map(|block| {
            let units = |kinds: &[LinearKind], n: usize| -> Vec<f64> {
                let mut scores = vec![0.0; n];
                for kind in kinds {
                    let weight = block.linear(*kind).unwrap().base.weight();
                    let products = host_values(weight.grad(&grads).unwrap() * weight.inner());
                    let [_, d_output] = block.linear(*kind).unwrap().base.dims();
                    let mut rows = vec![0.0f64; d_output];
                    products
                        .iter()
                        .enumerate()
                        .for_each(|(i, v)| rows[i % d_output] += f64::from(*v));
                    rows.iter()
                        .enumerate()
                        .for_each(|(row, sum)| scores[row / (d_output / n)] += sum.abs());
                }
                scores
            };
            BlockScores {
                mlp: units(&[LinearKind::Gate, LinearKind::Up], block.n_mlp_channels()),
                kv_groups: units(
                    &[LinearKind::Q, LinearKind::K, LinearKind::V],
                    block.n_kv_groups(),
                ),
            }
        })
        .collect()
}

/// Returns Spearman's rank correlation. Ties do not occur.
fn rank_correlation(a: &[f64], b: &[f64]) -> f64 {
    let ranks = |values: &[f64]| {
        let mut order: Vec<usize> = (0..values.len()).collect();
        order.sort_by(|i, j| values[*i].total_cmp(&values[*j]));
        inverse(&order)
    };
    let squares: f64 = ranks(a)
        .iter()
        .zip(ranks(b))
        .map(|(x, y)| (*x as f64 - y as f64).powi(2))
        .sum();
    let n = a.len() as f64;
    1.0 - 6.0 * squares / (n * (n * n - 1.0))
}

#[test]
fn the_sketch_of_the_gradient_tends_to_the_gradient() {
    let model = biased(7);
    let ids = random_ids(8 * 15, 41, 6);
    let data: Vec<Vec<u32>> = ids.chunks(15).map(<[u32]>::to_vec).collect();
    let exact = exact_taylor(&model, &ids, 8);
    // The remaining error is a fraction 1/sqrt(rank) of |w| |dL/dw|.
    for (rank, expected) in [(32, 0.4), (1 << 16, 0.99)] {
        let config = TaylorConfig {
            rank,
            seed: 3,
            ..TaylorConfig::default()
        };
        let scores = taylor_scores(&model, &data, &config, &Silent).unwrap();
        for (scores, exact) in scores.iter().zip(&exact) {
            let found = rank_correlation(&scores.mlp, &exact.mlp);
            assert!(found > expected, "rank {rank}: {found}");
            if rank > 1000 {
                let largest = exact.kv_groups.iter().fold(0.0f64, |a, b| a.max(*b));
                for (a, b) in scores.kv_groups.iter().zip(&exact.kv_groups) {
                    assert!((a - b).abs() < 0.1 * largest, "{a} against {b}");
                }
            }
        }
    }
    // The same seed gives the same result.
    let config = TaylorConfig {
        seed: 4,
        ..TaylorConfig::default()
    };
    let first = taylor_scores(&model, &data, &config, &Silent).unwrap();
    assert_eq!(
        first,
        taylor_scores(&model, &data, &config, &Silent).unwrap()
    );
    assert_ne!(
        first,
        taylor_scores(&model, &data, &TaylorConfig::default(), &Silent).unwrap()
    );
    // The scored model is left without adapters, whether its weights were trained or not.
    let trained = SuperNet::dense(model.clone()).unwrap().into_model().train();
    assert_eq!(
        first,
        taylor_scores(&trained, &data, &config, &Silent).unwrap()
    );
    assert!(weight_bits(&trained).keys().all(|path| !is_factor(path)));
}

#[test]
fn influence_is_what_a_unit_does_to_the_stream_and_to_the_loss() {
    let model = biased(8);
    let data: Vec<Vec<u32>> = (0..5).map(|i| random_ids(12, 41, 40 + i)).collect();
    let heard = Heard::default();
    let units = block_influence(&model, &data, InfluenceMeasure::Loss, &heard).unwrap();
    assert_eq!(units.len(), 9);
    heard.assert_all("measure influence", 3);
    assert!(
        units
            .windows(2)
            .all(|w| w[0].loss_increase >= w[1].loss_increase)
    );
    let by_cosine = block_influence(&model, &data, InfluenceMeasure::Cosine, &Silent).unwrap();
    assert!(
        by_cosine
            .windows(2)
            .all(|w| w[0].cosine_change >= w[1].cosine_change)
    );
    assert!(by_cosine.iter().all(|unit| unit.loss_increase.is_none()));

    let ids: Vec<u32> = data.concat();
    let loss = |model: &Decoder| perplexity(model, &ids, 12, &Silent).unwrap().nll;
    let silent = |block: usize, kinds: &[LinearKind]| {
        let mut model = model.clone();
        for kind in kinds {
            let layer = model.layers[block].linear_mut(*kind).unwrap();
            let [d_input, d_output] = layer.base.dims();
            layer
                .base
                .set_matrix(&Matrix::zeros(d_output, d_input))
                .unwrap();
            layer.base.bias = None;
        }
        model
    };
    let mut state = model.embed(model.tokens(&ids, 5).unwrap());
    for block in 0..3 {
        let after = model.block(block, state.clone(), None);
        // Without the MLP, the output of a block is its intermediate state after the attention.
        let between = silent(block, &[LinearKind::Down]).block(block, state.clone(), None);
        for (name, kinds, from, to) in [
            (
                format!("model.layers.{block}"),
                &[LinearKind::O, LinearKind::Down][..],
                &state,
                &after,
            ),
            (
                SubBlock::Attention.name(block),
                &[LinearKind::O],
                &state,
                &between,
            ),
            (
                SubBlock::Mlp.name(block),
                &[LinearKind::Down],
                &between,
                &after,
            ),
        ] {
            let (a, b) = (host_values(from.clone()), host_values(to.clone()));
            let expected: f64 = (a.chunks(24).zip(b.chunks(24)))
                .map(|(a, b)| {
                    let dot = |a: &[f32], b: &[f32]| -> f64 {
                        a.iter()
                            .zip(b)
                            .map(|(a, b)| f64::from(*a) * f64::from(*b))
                            .sum()
                    };
                    1.0 - dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
                })
                .sum::<f64>()
                / 60.0;
            let found = units.iter().find(|unit| unit.name == name).unwrap();
            assert!((found.cosine_change - expected).abs() < 1e-5, "{name}");
            assert!(
                expected > 1e-3,
                "{name}: the test's own model does too little"
            );
            let increase = loss(&silent(block, kinds)) - loss(&model);
            assert!(
                (found.loss_increase.unwrap() - increase).abs() < 1e-5,
                "{name}"
            );
        }
        state = after;
    }
    // Sub-blocks that do not run are not listed, and a block is represented by its remaining
    // sub-block.
    let mut shallow = model.clone();
    shallow.layers[1].set_runs(SubBlock::Mlp, false);
    shallow.layers[2].set_runs(SubBlock::Attention, false);
    shallow.layers[2].set_runs(SubBlock::Mlp, false);
    let units = block_influence(&shallow, &data, InfluenceMeasure::Cosine, &Silent).unwrap();
    let change = |name: &str| {
        units
            .iter()
            .find(|unit| unit.name == name)
            .map(|unit| unit.cosine_change)
    };
    assert_eq!(units.len(), 5);
    assert!(change("model.layers.1.mlp").is_none() && change("model.layers.2").is_none());
    assert_eq!(change("model.layers.1"), change("model.layers.1.self_attn"));
}

/// Returns the model with only the given share of the MLP channels, the first ones.
fn first_channels(model: &Decoder, share: f64) -> Decoder {
    let mut model = model.clone();
    for block in 0..model.layers.len() {
        let down = &mut model.layers[block]
            .linear_mut(LinearKind::Down)
            .unwrap()
            .base;
        let mut weight = down.to_matrix();
        let kept = (weight.cols() as f64 * share).round() as usize;
        (0..weight.rows()).for_each(|row| weight.row_mut(row)[kept..].fill(0.0));
        down.set_matrix(&weight).unwrap();
    }
    model
}

/// Returns the model without the last key/value group of each block.
fn all_but_one_group(model: &Decoder) -> Decoder {
    let mut model = model.clone();
    for block in 0..model.layers.len() {
        let groups = model.layers[block].n_kv_groups();
        let o = &mut model.layers[block].linear_mut(LinearKind::O).unwrap().base;
        let mut weight = o.to_matrix();
        let kept = weight.cols() / groups * (groups - 1);
        (0..weight.rows()).for_each(|row| weight.row_mut(row)[kept..].fill(0.0));
        o.set_matrix(&weight).unwrap();
    }
    model
}

/// Prints the losses of prefixes of the unsorted model and of each order, and returns those for
/// half of the channels.
fn compare(
    name: &str,
    model: &Decoder,
    calibration: &[Vec<u32>],
    loss: &dyn Fn(&Decoder) -> f64,
) -> Vec<f64> {
    eprintln!("{name}: loss {:.4}", loss(model));
    eprintln!(
        "{:12} {:>9} {:>9} {:>14}",
        "order", "75 % MLP", "50 % MLP", "one group less"
    );
    let mut halves = Vec::new();
    let mut report = |order: &str, model: &Decoder| {
        let [three, half] = [0.75, 0.5].map(|share| loss(&first_channels(model, share)));
        eprintln!(
            "{order:12} {three:>9.4} {half:>9.4} {:>14.4}",
            loss(&all_but_one_group(model))
        );
        halves.push(half);
    };
    report("none", model);
    for score in ChannelScore::ALL {
        let mut sorted = model.clone();
        sort_channels(&mut sorted, calibration, score, &Silent).unwrap();
        assert!((loss(&sorted) - loss(model)).abs() < 1e-3);
        report(&score.to_string(), &sorted);
    }
    halves
}

#[test]
fn sorted_channels_are_worth_more_than_unsorted_ones() {
    let open = |folder: &Path| Pretrained::open(folder, &burn::tensor::Device::flex()).unwrap();
    let shipped = open(Path::new(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/assets/arithmetic-llama"
    )));
    let kinds = [Kind::Sum, Kind::Difference, Kind::Product, Kind::AddSub].map(|kind| (kind, 1.0));
    let sequences = |split: Split, n: usize| -> Vec<Sequence> {
        let problems = crate::arithmetic::mixture(&kinds, split, n, 3).unwrap();
        let records: Vec<Record> = problems.into_iter().map(Problem::into_record).collect();
        let options = TokenizeOptions::new(shipped.model.config().max_position_embeddings());
        tokenize_records(&records, PromptTemplate::Auto, &shipped.tokenizer, &options)
            .unwrap()
            .sequences
    };
    let calibration: Vec<Vec<u32>> = sequences(Split::Train, 128)
        .into_iter()
        .map(|sequence| sequence.ids)
        .collect();
    let held_out = fixed_batches(&sequences(Split::Test, 128), 32, shipped.pad_id()).unwrap();
    let loss = |model: &Decoder| mean_loss(model, &held_out, &Silent).unwrap();
    let halves = compare("arithmetic-llama", &shipped.model, &calibration, &loss);
    assert!(
        halves[1..].iter().all(|half| *half < halves[0]),
        "{halves:?}"
    );

    let Some(folder) = shared("models/story-llama-0.6M") else {
        return;
    };
    let Some(text) = shared("data/tinystories/sample.txt") else {
        return;
    };
    let story = open(&folder);
    let text = std::fs::read_to_string(text).unwrap();
    let ids = join_documents(&[text], &story.tokenizer, false).unwrap();
    let (calibration, held_out) = ids.split_at(ids.len() / 2);
    let calibration: Vec<Vec<u32>> = calibration
        .chunks_exact(128)
        .take(64)
        .map(<[u32]>::to_vec)
        .collect();
    let held_out = &held_out[..held_out.len().min(8192)];
    let loss = |model: &Decoder| perplexity(model, held_out, 128, &Silent).unwrap().nll;
    let halves = compare("story-llama-0.6M", &story.model, &calibration, &loss);
    // Magnitudes alone do not show which channels of this model matter: their order is worse than
    // none.
    let [none, _, _, activation, taylor] = halves[..] else {
        panic!("{halves:?}")
    };
    assert!(activation < none && taylor < none, "{halves:?}");
}
