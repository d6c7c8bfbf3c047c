//! Adapters on quantized bases, and training through a grid: the merged weights are the trained
//! ones, bit for bit.

use std::collections::BTreeMap;

use crate::common::{is_factor, max_diff, random_ids, tiny, weight_bits};
use burn::module::Module;
use elastic_lora::adapter::LoraConfig;
use elastic_lora::data::{Batch, Batcher, Sequence, fixed_batches};
use elastic_lora::eval::mean_loss;
use elastic_lora::format::{QuantizedMatrix, QuantizedParts, WeightFormat};
use elastic_lora::linalg::Matrix;
use elastic_lora::merge::MergeMode;
use elastic_lora::model::Decoder;
use elastic_lora::nn::{host_values, matrix_from_tensor};
use elastic_lora::progress::Silent;
use elastic_lora::quant::{GridConfig, ScaleDtype, round_to_nearest};
use elastic_lora::runtime::{Model, Session, SessionConfig};
use elastic_lora::space::Elastic;
use elastic_lora::sparsity::Mask;
use elastic_lora::supernet::{QaConfig, SuperNetConfig};
use elastic_lora::train::{Checkpointing, TrainConfig, Trainer};
use elastic_lora::{Error, Merger, SearchSpace, SuperNet};
use rand::SeedableRng;

type Layers = BTreeMap<String, QuantizedMatrix>;

/// Two fifths of each linear layer are zero.
fn sparse(seed: u64) -> Decoder {
    let mut model = tiny(false, seed);
    model
        .try_for_each_linear(|_, layer| {
            let mut weight = layer.base.to_matrix();
            weight
                .as_mut_slice()
                .iter_mut()
                .enumerate()
                .filter(|(i, _)| i * 7 % 5 < 2)
                .for_each(|(_, w)| *w = 0.0);
            layer.base.set_matrix(&weight)
        })
        .unwrap();
    model
}

fn rounded(model: &Decoder, grid: &GridConfig) -> Layers {
    let round = |weight: &Matrix| round_to_nearest(weight, grid, None).unwrap();
    model
        .linears()
        .map(|(name, layer)| (name, round(&layer.base.to_matrix())))
        .collect()
}

fn grid(bits: u8, group: Option<usize>, symmetric: bool) -> GridConfig {
    GridConfig::new(bits)
        .with_group_size(group)
        .with_symmetric(symmetric)
}

fn lora() -> LoraConfig {
    LoraConfig::new(5).with_alpha(7.0)
}

fn space(model: &Decoder) -> SearchSpace {
    let groups = [
        &["q_proj", "k_proj", "v_proj"][..],
        &["up_proj", "gate_proj"],
        &["down_proj"],
        &["o_proj"],
    ];
    SearchSpace::grouped(&model.layer_shapes(), &groups, &[5, 3, 2, 1]).unwrap()
}

fn net(model: Decoder, lora: LoraConfig, masked: bool) -> SuperNet {
    let space = space(&model);
    SuperNet::new(
        model,
        space,
        SuperNetConfig::new(lora)
            .with_sparse_peft(masked)
            .with_seed(6),
    )
    .unwrap()
}

fn sequences(n: usize, seed: u64) -> Vec<Sequence> {
    let draws = random_ids(2 * n, 40, seed);
    let ids = |draw: &[u32]| {
        (0..9)
            .map(|t| (draw[0] + (1 + draw[1] % 3) * t) % 41)
            .collect()
    };
    draws
        .chunks(2)
        .map(|draw| Sequence::unmasked(ids(draw)))
        .collect()
}

fn valid() -> Vec<Batch> {
    fixed_batches(&sequences(9, 2), 4, 0).unwrap()
}

fn config(steps: usize) -> TrainConfig {
    let mut config = TrainConfig::new(steps);
    config.lr = 3e-2;
    config.weight_decay = 0.01;
    config.seed = 9;
    config
}

fn train(net: &mut SuperNet, config: TrainConfig) -> Vec<f64> {
    let mut data = Batcher::new(sequences(37, 1), 4, 0, 5).unwrap();
    let report = Trainer::new(config)
        .unwrap()
        .run(net, &mut data, &[], &Silent)
        .unwrap();
    report.logs.iter().map(|log| log.loss).collect()
}

fn logits(model: &Decoder) -> Vec<f32> {
    let ids = random_ids(3 * 13, 41, 5);
    host_values(model.forward(model.tokens(&ids, 3).unwrap()))
}

fn bits(matrix: &Matrix) -> Vec<u32> {
    matrix
        .as_slice()
        .iter()
        .map(|value| value.to_bits())
        .collect()
}

/// Returns the weights of the training forward pass, on the autodiff tape, by layer.
fn trained_weights(net: &SuperNet) -> BTreeMap<String, Matrix> {
    let model = net.model().clone().train();
    let adapted = model.linears().filter(|(_, layer)| layer.adapter.is_some());
    adapted
        .map(|(name, layer)| (name, matrix_from_tensor(layer.merged_weight().inner())))
        .collect()
}

/// Merges the active subnet and compares it with what training computes. The zeros that must stay
/// are those of the masks.
fn check_merge(net: &SuperNet, masks: &BTreeMap<String, Mask>, context: &str) -> Decoder {
    let expected = trained_weights(net);
    let merged = Merger::new()
        .merge(net, &[random_ids(9, 41, 3)], &Silent)
        .unwrap();
    assert_eq!(
        (merged.report.zeros_lost, merged.report.layers.len()),
        (0, expected.len()),
        "{context}"
    );
    for (name, weight) in &expected {
        let layer = merged.model.linear(name).unwrap();
        let packed = layer
            .base
            .quantized()
            .unwrap_or_else(|| panic!("{context}: `{name}` is not packed"));
        assert!(layer.adapter.is_none());
        let quantized = packed.unpack();
        assert_eq!(
            bits(&quantized.dequantize()),
            bits(weight),
            "{context}: `{name}`"
        );
        assert_eq!(
            bits(&layer.base.to_matrix()),
            bits(weight),
            "{context}: `{name}`, as the layer has it"
        );
        let mask = &masks[name];
        let lost = (0..weight.rows()).flat_map(|i| (0..weight.cols()).map(move |j| (i, j)));
        assert_eq!(
            lost.filter(|(i, j)| !mask.get(*i, *j) && weight.row(*i)[*j] != 0.0)
                .count(),
            0,
            "{context}"
        );
    }
    for layer in &merged.report.layers {
        assert_eq!(
            layer.bits,
            Some(
                merged
                    .model
                    .linear(&layer.name)
                    .unwrap()
                    .base
                    .quantized()
                    .unwrap()
                    .bits()
            )
        );
    }
    let (got, want) = (logits(&merged.model), logits(&net.eval_model()));
    let size = want
        .iter()
        .fold(1.0_f32, |size, value| size.max(value.abs()));
    assert!(
        max_diff(&got, &want) < 1e-5 * size,
        "{context}: {} of {size}",
        max_diff(&got, &want)
    );
    assert!(merged.report.max_logit_difference.unwrap() < 1e-5 * size);
    merged.model
}

fn masks(model: &Decoder) -> BTreeMap<String, Mask> {
    model
        .linears()
        .map(|(name, layer)| (name, Mask::from_nonzero(&layer.base.to_matrix())))
        .collect()
}

#[test]
fn a_merge_is_the_training_forward_bit_for_bit() {
    for (index, width) in [2, 3, 4, 8].into_iter().enumerate() {
        for symmetric in [false, true] {
            // Groups with a ragged last one, groups that fit, and one group; scales of 16 and of 32
            // bits.
            let group = [Some(7), Some(8), None, Some(5)][index];
            let mut grid = grid(width, group, symmetric);
            grid.scale_dtype = if symmetric {
                ScaleDtype::F16
            } else {
                ScaleDtype::F32
            };
            let model = sparse(4);
            let (layers, masks) = (rounded(&model, &grid), masks(&model));
            // From the sparse weights with fixed scales, and from the integers with trained scales.
            for (packed, scales) in [(false, false), (false, true), (true, true)] {
                let context = format!(
                    "{width} bits, symmetric {symmetric}, packed {packed}, scales {scales}"
                );
                let (model, qa) = if packed {
                    let qa = QaConfig::default()
                        .with_masks(masks.clone())
                        .with_train_scales(scales);
                    (model.clone().with_quantized(&layers).unwrap(), qa)
                } else {
                    (
                        model.clone(),
                        QaConfig::new(layers.clone()).with_train_scales(scales),
                    )
                };
                let mut net = net(model, lora(), true).with_quantization(&qa).unwrap();
                let untrained = trained_weights(&net);
                for (name, weight) in &untrained {
                    assert_eq!(
                        bits(weight),
                        bits(&layers[name].dequantize()),
                        "{context}: `{name}`, before training"
                    );
                }
                let before = mean_loss(&net.eval_model(), &valid(), &Silent).unwrap();
                train(&mut net, config(25));
                let after = mean_loss(&net.eval_model(), &valid(), &Silent).unwrap();
                assert!(after < before, "{context}: {before} {after}");
                let mut subnets = vec![net.maximal(), net.heuristic(), net.minimal()];
                let names = ["large", "middle", "small"].map(String::from);
                let named: Vec<_> = names.into_iter().zip(subnets.clone()).collect();
                let format = WeightFormat::Int {
                    bits: width,
                    group_size: grid.group_size,
                    symmetric,
                };
                let together = Merger::new()
                    .merge_subnets(&net, &named, format, &Silent)
                    .unwrap();
                subnets.push(net.sample(&mut rand_chacha::ChaCha8Rng::from_seed([3; 32])));
                let mut seen = Vec::new();
                for (index, subnet) in subnets.into_iter().enumerate() {
                    net.activate(&subnet).unwrap();
                    let merged = check_merge(&net, &masks, &context);
                    // In one file with the others it is the same model.
                    if let Some((name, _)) = named.get(index) {
                        let alone = Model::from_decoder(&merged, format).unwrap();
                        let last = |model: &Model, name: &str| {
                            let config = SessionConfig::default();
                            let mut session = Session::new(model, &config).unwrap();
                            session.set_subnet_named(name).unwrap();
                            let mut logits = vec![0.0; 41];
                            session.decode(&[1, 5, 9, 30], Some(&mut logits)).unwrap();
                            logits
                        };
                        assert_eq!(last(&together, name), last(&alone, "whole"), "{context}");
                    }
                    seen.push(logits(&merged));
                    for (name, layer) in merged.linears() {
                        let (now, then) = (
                            layer.base.quantized().unwrap().unpack(),
                            layers[&name].parts(),
                        );
                        assert_eq!(
                            now.parts().scales != then.scales,
                            scales,
                            "{context}: `{name}`, scales"
                        );
                        assert_eq!(now.parts().zeros, then.zeros);
                        assert_ne!(now.parts().codes, then.codes, "{context}: `{name}`, codes");
                        // A grid that fits into 16 bits still fits.
                        let half = |scale: &f32| half::f16::from_f32(*scale).to_f32() == *scale;
                        assert!(!symmetric || now.parts().scales.iter().all(half));
                    }
                }
                assert!(seen[0] != seen[2], "{context}");
            }
        }
    }
}

#[test]
fn without_a_mask_every_weight_moves_and_with_widths_a_part_is_merged() {
    let model = tiny(false, 4);
    let layers = rounded(&model, &grid(4, Some(8), false));
    let all = model.linears().map(|(name, layer)| {
        let [d_input, d_output] = layer.base.dims();
        (name, Mask::filled(d_output, d_input, true))
    });
    let mut whole = net(model.clone(), lora(), false)
        .with_quantization(&QaConfig::new(layers.clone()))
        .unwrap();
    train(&mut whole, config(10));
    check_merge(&whole, &all.collect(), "no mask");
    assert!(matches!(
        whole.extract_adapter(),
        Err(Error::Unsupported { .. })
    ));

    let widths = SearchSpace::groups_by_block(
        Elastic::Width,
        &model.layer_shapes(),
        &[&["gate_proj", "up_proj"][..]],
        &[37, 22],
    );
    let space = space(&model).with_groups(widths.unwrap()).unwrap();
    let mut net = SuperNet::new(
        sparse(4),
        space,
        SuperNetConfig::new(lora()).with_sparse_peft(true),
    )
    .unwrap();
    net = net.with_quantization(&QaConfig::new(layers)).unwrap();
    train(&mut net, config(10));
    net.activate(&net.minimal()).unwrap();
    let expected = trained_weights(&net);
    let merged = Merger::new()
        .extract(&net, &[random_ids(9, 41, 3)], &Silent)
        .unwrap();
    for (name, layer) in merged.model.linears() {
        let got = layer.base.quantized().unwrap().unpack().dequantize();
        assert_eq!(bits(&got), bits(&expected[&name]), "`{name}`");
    }
    assert!(merged.report.max_logit_difference.unwrap() < 1e-4);
}

#[test]
fn dropout_leaves_the_base_alone_and_what_is_kept_of_a_step_changes_nothing() {
    let model = sparse(4);
    let layers = rounded(
        &model,
        &grid(4, Some(8), false).with_scale_dtype(ScaleDtype::F16),
    );
    let run = |dropout: f64, checkpointing: Checkpointing| {
        let qa = QaConfig::new(layers.clone()).with_train_scales(true);
        let mut net = net(model.clone(), lora().with_dropout(dropout), true)
            .with_quantization(&qa)
            .unwrap();
        let before = weight_bits(net.model());
        let losses = train(
            &mut net,
            TrainConfig {
                checkpointing,
                ..config(8)
            },
        );
        for (path, bits) in weight_bits(net.model()) {
            let trained = is_factor(&path) || path.ends_with("grid.scales");
            assert_eq!(bits != before[&path], trained, "{path}");
        }
        check_merge(&net, &masks(&model), "dropout");
        losses
    };
    let (plain, dropped) = (run(0.0, Checkpointing::None), run(0.3, Checkpointing::None));
    assert!(plain != dropped && plain[0] != plain[7]);
    for (dropout, whole) in [(0.0, plain), (0.3, dropped)] {
        for (got, want) in run(dropout, Checkpointing::Blocks).iter().zip(whole) {
            assert!((got - want).abs() < 1e-3 * want, "{got} {want}");
        }
    }
}

#[test]
fn an_interrupted_run_goes_on_with_its_scales_and_refuses_another_grid() {
    let model = sparse(4);
    let make = |width: u8| {
        let qa =
            QaConfig::new(rounded(&model, &grid(width, Some(8), false))).with_train_scales(true);
        net(model.clone(), lora(), true)
            .with_quantization(&qa)
            .unwrap()
    };
    let data = || Batcher::new(sequences(37, 1), 4, 0, 5).unwrap();
    let settings = TrainConfig {
        checkpoint_every: 3,
        ..config(6)
    };
    let mut whole = make(4);
    Trainer::new(settings.clone())
        .unwrap()
        .run(&mut whole, &mut data(), &[], &Silent)
        .unwrap();
    let dir = tempfile::tempdir().unwrap();
    let trainer = Trainer::new(TrainConfig {
        eval_every: 4,
        ..settings.clone()
    })
    .unwrap();
    let trainer = trainer.with_folder(dir.path()).with_resume(true);
    // The run ends at the validation of step 4, with the checkpoint of step 3.
    let broken = fixed_batches(&[Sequence::unmasked(vec![1, 41])], 1, 0).unwrap();
    assert!(
        trainer
            .run(&mut make(4), &mut data(), &broken, &Silent)
            .is_err()
    );
    assert!(matches!(
        trainer.run(&mut make(3), &mut data(), &[], &Silent),
        Err(Error::CheckpointMismatch { .. })
    ));
    let mut late = make(4);
    let report = trainer.run(&mut late, &mut data(), &[], &Silent).unwrap();
    assert_eq!(report.steps_done, 3);
    assert_eq!(weight_bits(late.model()), weight_bits(whole.model()));
}

#[test]
fn a_packed_base_trains_and_infers_as_its_dense_twin() {
    for width in [3, 4] {
        let model = sparse(4);
        let layers = rounded(
            &model,
            &grid(width, Some(8), false).with_scale_dtype(ScaleDtype::F16),
        );
        let packed = model.clone().with_quantized(&layers).unwrap();
        let mut dense = model;
        dense
            .try_for_each_linear(|name, layer| layer.base.set_matrix(&layers[name].dequantize()))
            .unwrap();
        assert_eq!(packed.count_base_params(), dense.count_base_params());
        assert!(max_diff(&logits(&packed), &logits(&dense)) < 1e-4);
        let bytes: usize = packed
            .linears()
            .map(|(_, layer)| layer.base.quantized().unwrap().bytes())
            .sum();
        let weights: usize = packed
            .linears()
            .map(|(_, layer)| layer.base.dims().iter().product::<usize>())
            .sum();
        assert!(
            bytes * 8 < weights * (usize::from(width) + 4),
            "{bytes} bytes for {weights} weights"
        );
        let tensors = |model: &Decoder| {
            let tensors = model.tensors(elastic_lora::io::DType::F32).unwrap();
            tensors
                .iter()
                .map(|tensor| tensor.name().to_string())
                .collect::<Vec<_>>()
        };
        assert_eq!(tensors(&packed), tensors(&dense));
        for masked in [false, true] {
            let lora = || lora().with_dropout(0.2);
            let mut of_packed = net(packed.clone(), lora(), masked);
            let mut of_dense = net(dense.clone(), lora(), masked);
            let (a, b) = (
                train(&mut of_packed, config(12)),
                train(&mut of_dense, config(12)),
            );
            for (a, b) in a.iter().zip(&b) {
                assert!((a - b).abs() < 2e-3 * b, "masked {masked}: {a} {b}");
            }
            assert!(a[11] < a[0]);
            let checkpointed = TrainConfig {
                checkpointing: Checkpointing::Blocks,
                ..config(12)
            };
            let mut again = net(packed.clone(), lora(), masked);
            for (a, b) in train(&mut again, checkpointed).iter().zip(&a) {
                assert!(
                    (a - b).abs() < 2e-3 * b,
                    "masked {masked}, by blocks: {a} {b}"
                );
            }
            for (name, layer) in of_packed.model().linears() {
                assert_eq!(
                    layer.base.quantized().unwrap().unpack(),
                    layers[&name],
                    "`{name}`"
                );
            }
            assert_eq!(
                of_packed.cost(of_packed.active()).unwrap(),
                of_dense.cost(of_dense.active()).unwrap()
            );
            // Merged into floats, because the grid cannot represent the sum.
            let merger = Merger::new();
            assert_eq!(merger.merge(&of_packed, &[], &Silent).is_ok(), masked);
            let merged = merger
                .with_mode(MergeMode::Dense)
                .merge(&of_packed, &[random_ids(9, 41, 3)], &Silent)
                .unwrap();
            assert!(merged.report.max_logit_difference.unwrap() < 1e-3);
            assert!(
                merged
                    .model
                    .linears()
                    .all(|(_, layer)| layer.base.quantized().is_none())
            );
            assert_eq!(of_packed.extract_adapter().is_ok(), !masked);
        }
    }
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    let model = sparse(4);
    let layers = rounded(&model, &grid(4, Some(8), false));
    let first = layers.keys().next().unwrap().clone();
    let make = || net(model.clone(), lora(), true);
    let mut some = layers.clone();
    some.remove(&first);
    let error = make()
        .with_quantization(&QaConfig::new(some))
        .unwrap_err()
        .to_string();
    assert!(error.contains(&first), "{error}");
    let mut other = layers.clone();
    other.insert("model.layers.7.mlp.up_proj".into(), layers[&first].clone());
    assert!(matches!(
        make().with_quantization(&QaConfig::new(other.clone())),
        Err(Error::UnknownLayer { .. })
    ));
    assert!(matches!(
        model.clone().with_quantized(&other),
        Err(Error::UnknownLayer { .. })
    ));
    let mut swapped = layers.clone();
    swapped.insert(first.clone(), layers["model.layers.0.mlp.up_proj"].clone());
    assert!(matches!(
        make().with_quantization(&QaConfig::new(swapped.clone())),
        Err(Error::ShapeMismatch { .. })
    ));
    assert!(matches!(
        model.clone().with_quantized(&swapped),
        Err(Error::ShapeMismatch { .. })
    ));
    let masks = BTreeMap::from([(first.clone(), Mask::filled(2, 3, true))]);
    let qa = QaConfig::new(layers.clone()).with_masks(masks);
    assert!(matches!(
        make().with_quantization(&qa),
        Err(Error::ShapeMismatch { .. })
    ));
    let bare = SuperNet::new(
        model.clone(),
        SearchSpace::single(),
        SuperNetConfig::new(lora()),
    )
    .unwrap();
    assert!(bare.with_quantization(&QaConfig::default()).is_err());

    let packed = model.clone().with_quantized(&layers).unwrap();
    assert!(matches!(
        SuperNet::dense(packed.clone()),
        Err(Error::Unsupported { .. })
    ));
    let mut layer = packed.linear(&first).unwrap().clone();
    let [d_input, d_output] = layer.base.dims();
    assert!(matches!(
        layer.set_active_dims([d_input - 1, d_output]),
        Err(Error::Unsupported { .. })
    ));
    assert_eq!(layer.active_dims(), [d_input, d_output]);
    assert!(make().into_model().with_quantized(&layers).is_err());

    // Groups in a custom order are allowed as long as all inputs are active.
    let mut parts: QuantizedParts = layers[&first].clone().into_parts();
    parts.group_of = Some((0..d_input as u32).map(|input| (input * 5) % 3).collect());
    let mut ordered = layers;
    ordered.insert(first.clone(), QuantizedMatrix::new(parts).unwrap());
    let mut net = make().with_quantization(&QaConfig::new(ordered)).unwrap();
    train(&mut net, config(4));
    check_merge(&net, &self::masks(&model), "groups in their own order");
    let mut layer = net.model().linear(&first).unwrap().clone();
    assert!(matches!(
        layer.set_active_dims([d_input - 1, d_output]),
        Err(Error::Unsupported { .. })
    ));
    assert_eq!(layer.base.active_dims(), [d_input, d_output]);
}

#[test]
fn adapters_that_begin_as_the_error_of_compression_are_nearer_to_the_original() {
    let original = tiny(false, 4);
    let distance = |model: &Decoder| {
        let pairs = original.linears().zip(model.linears());
        pairs
            .map(|((_, before), (_, after))| {
                let (before, after) = (
                    before.base.to_matrix(),
                    matrix_from_tensor(after.merged_weight()),
                );
                before
                    .as_slice()
                    .iter()
                    .zip(after.as_slice())
                    .map(|(a, b)| f64::from(a - b).powi(2))
                    .sum::<f64>()
            })
            .sum::<f64>()
    };
    let layers = rounded(&original, &grid(2, Some(8), false));
    let mut net = net(
        original.clone().with_quantized(&layers).unwrap(),
        lora(),
        false,
    );
    let fresh = distance(net.model());
    net.init_from_error(&original, &BTreeMap::new(), &Silent)
        .unwrap();
    let mut before = fresh;
    for subnet in [net.minimal(), net.heuristic(), net.maximal()] {
        net.activate(&subnet).unwrap();
        let now = distance(net.model());
        assert!(now < before, "{now} {before}");
        before = now;
    }
    assert!(before < 0.6 * fresh, "{before} {fresh}");
    // The output of the model is closer, too.
    let off = |model: &Decoder| {
        let (got, want) = (logits(model), logits(&original));
        got.iter()
            .zip(&want)
            .map(|(a, b)| f64::from(a - b).powi(2))
            .sum::<f64>()
    };
    let (plain, begun) = (
        off(&original.clone().with_quantized(&layers).unwrap()),
        off(&net.eval_model()),
    );
    assert!(begun < 0.9 * plain, "{begun} {plain}");
    train(&mut net, config(3));
    // This also holds under a mask, and never through a grid.
    let sparse_layers = rounded(&sparse(4), &grid(3, Some(8), false));
    let mut masked = self::net(
        sparse(4).with_quantized(&sparse_layers).unwrap(),
        lora(),
        true,
    );
    let fresh = distance(masked.model());
    let norms = masked
        .model()
        .linears()
        .map(|(name, layer)| (name, vec![0.5; layer.base.dims()[0]]))
        .collect();
    masked.init_from_error(&original, &norms, &Silent).unwrap();
    assert!(distance(masked.model()) < fresh);
    let mut aware = masked.with_quantization(&QaConfig::default()).unwrap();
    assert!(matches!(
        aware.init_from_error(&original, &norms, &Silent),
        Err(Error::Unsupported { .. })
    ));
}
