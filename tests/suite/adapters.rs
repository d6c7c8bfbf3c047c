//! Elastic adapters on one layer: the meaning of a rank, what is trained, and the result of a
//! merge.

use crate::common::{max_diff, random, random_matrix, weight_bits};
use burn::module::{Module, Param};
use burn::nn::{Linear, LinearConfig};
use burn::tensor::{Device, Tensor};
use elastic_lora::adapter::{
    ElasticLora, ElasticLoraReparam, ElasticLoraReparameterizer, LoraConfig, RankSwitches,
    ScaleRule, seeded_dropout,
};
use elastic_lora::linalg::Matrix;
use elastic_lora::nn::{BaseLinear, host_values};
use elastic_lora::space::{Group, SearchSpace};
use elastic_lora::{ElasticLoraLinear, ElasticLoraLinearConfig, Error};

const D_IN: usize = 17;
const D_OUT: usize = 5;
const RANK: usize = 8;
const RULES: [ScaleRule; 3] = [
    ScaleRule::AlphaOverMaxRank,
    ScaleRule::AlphaOverRank,
    ScaleRule::AlphaOverSqrtRank,
];

fn tape() -> Device {
    Device::flex().autodiff()
}

fn config(rule: ScaleRule) -> LoraConfig {
    LoraConfig::new(RANK).with_alpha(11.0).with_scale_rule(rule)
}

/// A base layer with a bias, and with zeros in its weight.
fn base(device: &Device) -> BaseLinear {
    let weight = random_matrix(D_OUT, D_IN, 1);
    let sparse = Matrix::from_fn(D_OUT, D_IN, |o, i| {
        if (o * 7 + i * 3) % 5 < 2 {
            0.0
        } else {
            weight.row(o)[i]
        }
    });
    BaseLinear::from_matrix(
        &sparse,
        Some(&crate::common::random_values(D_OUT, 2)),
        device,
    )
    .unwrap()
}

fn factors() -> (Matrix, Matrix) {
    (random_matrix(RANK, D_IN, 3), random_matrix(D_OUT, RANK, 4))
}

fn layer(config: &LoraConfig, masked: bool, device: &Device) -> ElasticLoraLinear {
    let (a, b) = factors();
    let adapter = ElasticLora::from_factors(config, &a, &b, device).unwrap();
    let mut layer = ElasticLoraLinear {
        base: base(device),
        adapter: Some(adapter),
    };
    if masked {
        layer.mask_by_base().unwrap();
    }
    layer
}

/// Computes `y = x W^T + b + s (x A^T) B^T` in `f64` by hand, masked if requested.
fn by_hand(x: &[f32], rank: usize, scale: f64, masked: bool) -> Vec<f32> {
    let (a, b) = factors();
    let base = base(&Device::flex());
    let (weight, bias) = (base.to_matrix(), host_values(base.bias.unwrap().val()));
    let mut y = Vec::new();
    for row in x.chunks(D_IN) {
        for (o, bias) in bias.iter().enumerate() {
            let mut sum = f64::from(*bias);
            for (i, x) in row.iter().enumerate() {
                let product: f64 = (0..rank)
                    .map(|r| f64::from(b.row(o)[r]) * f64::from(a.row(r)[i]))
                    .sum();
                let kept = !masked || weight.row(o)[i] != 0.0;
                sum += f64::from(*x)
                    * (f64::from(weight.row(o)[i]) + if kept { scale * product } else { 0.0 });
            }
            y.push(sum as f32);
        }
    }
    y
}

#[test]
fn every_rank_and_scale_rule_computes_what_the_formula_says() {
    let x = random([3, D_IN], 5, &Device::flex());
    for rule in RULES {
        for masked in [false, true] {
            let mut layer = layer(&config(rule), masked, &Device::flex());
            for rank in 1..=RANK {
                layer.set_active_rank(rank).unwrap();
                let scale = match rule {
                    ScaleRule::AlphaOverMaxRank => 11.0 / RANK as f64,
                    ScaleRule::AlphaOverRank => 11.0 / rank as f64,
                    ScaleRule::AlphaOverSqrtRank => 11.0 / (rank as f64).sqrt(),
                };
                let y = host_values(layer.forward(x.clone()));
                let expected = by_hand(&host_values(x.clone()), rank, scale, masked);
                assert!(
                    max_diff(&y, &expected) < 2e-5,
                    "{rule:?} rank {rank} masked {masked}"
                );
                // A merged layer is a plain layer.
                let merged = BaseLinear::from_tensors(
                    layer.merged_weight(),
                    layer.base.bias.as_ref().map(|bias| bias.val()),
                )
                .unwrap();
                assert!(max_diff(&host_values(merged.forward(x.clone())), &y) < 2e-5);
            }
        }
    }
}

#[test]
fn a_subnet_is_a_separate_lora_of_its_first_rows_and_columns() {
    let (a, b) = factors();
    let x = random([2, 3, D_IN], 6, &tape());
    let upstream = random([2, 3, D_OUT], 7, &Device::flex());
    for rule in RULES {
        for masked in [false, true] {
            for rank in [1, 3, RANK] {
                let mut elastic = layer(&config(rule), masked, &tape());
                elastic.set_active_rank(rank).unwrap();
                let scale = elastic.adapter.as_ref().unwrap().scale();
                let small = LoraConfig::new(rank).with_alpha(scale * rank as f64);
                let first = Matrix::new(rank, D_IN, a.as_slice()[..rank * D_IN].to_vec()).unwrap();
                let second = Matrix::from_fn(D_OUT, rank, |o, r| b.row(o)[r]);
                let adapter = ElasticLora::from_factors(&small, &first, &second, &tape()).unwrap();
                let mut apart = ElasticLoraLinear {
                    base: base(&tape()),
                    adapter: Some(adapter),
                };
                if masked {
                    apart.mask_by_base().unwrap();
                }

                let run = |layer: &ElasticLoraLinear| {
                    let x = x.clone().require_grad();
                    let y = layer.forward(x.clone());
                    let grads = (y.clone() * upstream.clone()).sum().backward();
                    let adapter = layer.adapter.as_ref().unwrap();
                    assert!(layer.base.weight().grad(&grads).is_none());
                    assert!(
                        layer
                            .base
                            .bias
                            .as_ref()
                            .unwrap()
                            .val()
                            .grad(&grads)
                            .is_none()
                    );
                    let grad_a = adapter.lora_a.val().grad(&grads).unwrap();
                    let grad_b = adapter.lora_b.val().grad(&grads).unwrap();
                    (
                        host_values(y.inner()),
                        host_values(x.grad(&grads).unwrap()),
                        grad_a,
                        grad_b,
                    )
                };
                let (y, grad_x, grad_a, grad_b) = run(&elastic);
                let (y1, grad_x1, grad_a1, grad_b1) = run(&apart);
                assert!(max_diff(&y, &y1) < 1e-5);
                assert!(max_diff(&grad_x, &grad_x1) < 1e-5);
                let close = |whole: Tensor<2>, dim: usize, expected: Tensor<2>| {
                    let active = host_values(whole.clone().narrow(dim, 0, rank));
                    assert!(max_diff(&active, &host_values(expected)) < 2e-5);
                    assert!(active.iter().any(|v| v.abs() > 1e-3));
                    if rank < RANK {
                        let rest = host_values(whole.narrow(dim, rank, RANK - rank));
                        assert!(
                            rest.iter().all(|v| *v == 0.0),
                            "a gradient beyond rank {rank}"
                        );
                    }
                };
                close(grad_a, 1, grad_a1);
                close(grad_b, 0, grad_b1);
            }
        }
    }
}

#[test]
fn switching_there_and_back_changes_nothing() {
    let x = random([2, D_IN], 8, &Device::flex());
    for masked in [false, true] {
        let mut layer = layer(
            &config(ScaleRule::AlphaOverSqrtRank),
            masked,
            &Device::flex(),
        );
        let before = weight_bits(&layer);
        layer.set_active_rank(5).unwrap();
        let first = host_values(layer.forward(x.clone()));
        layer.set_active_rank(2).unwrap();
        assert_ne!(first, host_values(layer.forward(x.clone())));
        layer.set_active_rank(5).unwrap();
        assert_eq!(first, host_values(layer.forward(x.clone())));
        assert_eq!(before, weight_bits(&layer));
    }
}

#[test]
fn a_masked_merge_keeps_every_zero() {
    let mut layer = layer(&config(ScaleRule::AlphaOverRank), true, &Device::flex());
    let weight = host_values(layer.base.weight());
    for rank in 1..=RANK {
        layer.set_active_rank(rank).unwrap();
        let merged = host_values(layer.merged_weight());
        let mut changed = 0;
        for (before, after) in weight.iter().zip(&merged) {
            assert!(*before != 0.0 || *after == 0.0);
            changed += usize::from(before != after);
        }
        assert!(changed > D_IN);
    }
    assert!(matches!(
        layer.adapter.as_ref().unwrap().active_factors(),
        Err(Error::Unsupported { .. })
    ));
}

#[test]
fn dropout_acts_in_training_alone_and_follows_its_seed() {
    for masked in [false, true] {
        let config = config(ScaleRule::AlphaOverMaxRank).with_dropout(0.4);
        let x = random([2, D_IN], 9, &Device::flex());
        let still = host_values(layer(&config, masked, &Device::flex()).forward(x.clone()));
        assert_eq!(
            still,
            host_values(
                layer(&config.clone().with_dropout(0.0), masked, &Device::flex()).forward(x)
            )
        );

        let x = random([2, D_IN], 9, &tape());
        let mut training = layer(&config, masked, &tape());
        let mut at = |seed: u64| {
            training.adapter.as_mut().unwrap().set_dropout_seed(seed);
            host_values(training.forward(x.clone()).inner())
        };
        let first = at(7);
        assert_ne!(first, at(8));
        assert_ne!(first, still);
        assert_eq!(first, at(7));
        let n = 3000;
        let mut mean = vec![0.0f64; first.len()];
        for seed in 0..n {
            mean.iter_mut()
                .zip(at(seed))
                .for_each(|(mean, y)| *mean += f64::from(y) / n as f64);
        }
        let mean: Vec<f32> = mean.into_iter().map(|v| v as f32).collect();
        assert!(
            max_diff(&mean, &still) < 0.25,
            "masked {masked}: {}",
            max_diff(&mean, &still)
        );
        let evaluated = training.valid();
        assert_eq!(still, host_values(evaluated.forward(x.clone().inner())));
    }
    // The masks of neighboring seeds are not shifts of each other.
    let ones = Tensor::<1>::ones([4096], &Device::flex());
    let (a, b) = (
        host_values(seeded_dropout(ones.clone(), 0.5, 10)),
        host_values(seeded_dropout(ones, 0.5, 11)),
    );
    for shift in 0..64 {
        let same = a[shift..].iter().zip(&b).filter(|(a, b)| a == b).count() as f64
            / (4096 - shift) as f64;
        assert!((same - 0.5).abs() < 0.06, "shift {shift}: {same}");
    }
}

#[test]
fn wrong_ranks_settings_and_shapes_are_refused() {
    let device = Device::flex();
    let mut adapted = layer(&config(ScaleRule::default()), false, &device);
    for rank in [0, RANK + 1, usize::MAX] {
        assert!(matches!(
            adapted.set_active_rank(rank),
            Err(Error::InvalidRank { max: RANK, .. })
        ));
        assert_eq!(adapted.active_rank(), RANK);
    }
    let mut plain = ElasticLoraLinear::plain(base(&device));
    assert!(matches!(
        plain.set_active_rank(1),
        Err(Error::InvalidRank { .. })
    ));
    assert_eq!(plain.active_rank(), 0);
    plain.mask_by_base().unwrap();

    let (a, b) = factors();
    let good = LoraConfig::new(RANK);
    let refused = |config: &LoraConfig, a: &Matrix, b: &Matrix| {
        ElasticLora::from_factors(config, a, b, &Device::flex()).unwrap_err()
    };
    assert!(matches!(
        refused(&LoraConfig::new(7), &a, &b),
        Error::ShapeMismatch { .. }
    ));
    assert!(matches!(
        refused(&good, &a.transposed(), &b),
        Error::ShapeMismatch { .. }
    ));
    assert!(matches!(
        refused(&good, &a, &b.transposed()),
        Error::ShapeMismatch { .. }
    ));
    let empty = |rows, cols| Matrix::zeros(rows, cols);
    assert!(matches!(
        refused(&good, &empty(RANK, 0), &b),
        Error::InvalidArgument { .. }
    ));
    assert!(matches!(
        refused(&good, &a, &empty(0, RANK)),
        Error::InvalidArgument { .. }
    ));
    for bad in [
        LoraConfig::new(0),
        good.clone().with_alpha(0.0),
        good.clone().with_alpha(f64::NAN),
        good.clone().with_alpha(f64::INFINITY),
        good.clone().with_dropout(1.0),
        good.clone().with_dropout(-0.1),
        good.clone().with_dropout(f64::NAN),
    ] {
        assert!(
            matches!(refused(&bad, &a, &b), Error::InvalidArgument { .. }),
            "{bad:?}"
        );
        assert!(ElasticLora::new(&bad, D_IN, D_OUT, 0, &device).is_err());
        assert!(ElasticLoraReparameterizer::new(bad, 0).is_err());
    }
    assert!(ElasticLora::new(&good, 0, D_OUT, 0, &device).is_err());
    let adapter = adapted.adapter.as_mut().unwrap();
    assert!(matches!(
        adapter.set_mask(Some(
            Tensor::<2>::ones([D_OUT, D_IN], &device).equal_elem(1.0)
        )),
        Err(Error::ShapeMismatch { .. })
    ));
    assert!(!adapter.is_masked());

    assert!(
        ElasticLoraLinearConfig::new(D_IN, D_OUT, RANK)
            .init_on(base(&device), &device)
            .is_ok()
    );
    let other = ElasticLoraLinearConfig::new(D_OUT, D_IN, RANK).init_on(base(&device), &device);
    assert!(matches!(other, Err(Error::ShapeMismatch { .. })));
    assert!(
        ElasticLoraLinearConfig::new(D_IN, D_OUT, 0)
            .init(&device)
            .is_err()
    );
}

#[test]
fn a_fresh_adapter_adds_nothing_and_its_seed_makes_it() {
    let device = Device::flex();
    let config = ElasticLoraLinearConfig::new(D_IN, D_OUT, RANK).with_seed(5);
    let layer = config.init_on(base(&device), &device).unwrap();
    let x = random([2, D_IN], 1, &device);
    assert_eq!(
        host_values(layer.forward(x.clone())),
        host_values(layer.base.forward(x))
    );
    let adapter = layer.adapter.unwrap();
    let a = host_values(adapter.lora_a.val());
    let bound = 1.0 / (D_IN as f32).sqrt();
    assert!(a.iter().all(|v| v.abs() <= bound) && a.iter().any(|v| v.abs() > 0.8 * bound));
    let again = config
        .init_on(base(&device), &device)
        .unwrap()
        .adapter
        .unwrap();
    assert_eq!(a, host_values(again.lora_a.val()));
    let other = config
        .with_seed(6)
        .init_on(base(&device), &device)
        .unwrap()
        .adapter
        .unwrap();
    assert_ne!(a, host_values(other.lora_a.val()));
}

// --- on any Burn module ---

fn burn_linear(device: &Device) -> Linear {
    let base = base(device);
    let mut linear = LinearConfig::new(D_IN, D_OUT).init(device);
    linear.weight = Param::from_tensor(base.weight());
    linear.bias = base.bias.map(|bias| Param::from_tensor(bias.val()));
    linear
}

/// Returns the linear layer with adapters whose factors are those of [`factors`].
fn reparameterized(rule: ScaleRule, masked: bool, device: &Device) -> (Linear, RankSwitches) {
    let mut adapters = ElasticLoraReparameterizer::new(config(rule), 1).unwrap();
    if masked {
        adapters = adapters.masked();
    }
    let linear = burn_linear(device).apply_reparameterization(&mut adapters);
    let switches = adapters.switches();
    struct Fill;
    impl burn::module::ModuleMapper for Fill {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            let (a, b) = factors();
            let value = match param.lazy_shape().as_slice() {
                [D_IN, RANK] => a.transposed(),
                [RANK, D_OUT] => b.transposed(),
                _ => return param,
            };
            param.map(|old| {
                let data = burn::tensor::TensorData::new(value.into_vec(), old.shape());
                Tensor::from_data(data, &old.device()).require_grad()
            })
        }
    }
    let device_is_tape = device.is_autodiff();
    let linear = if device_is_tape {
        linear.map(&mut Fill)
    } else {
        linear.train().map(&mut Fill).valid()
    };
    (linear, switches)
}

#[test]
fn a_reparameterized_burn_layer_computes_what_an_elastic_one_does() {
    let x = random([3, D_IN], 11, &Device::flex());
    for rule in RULES {
        for masked in [false, true] {
            let mut elastic = layer(&config(rule), masked, &Device::flex());
            let (linear, switches) = reparameterized(rule, masked, &Device::flex());
            let before = weight_bits(&linear);
            for rank in [RANK, 1, 5, RANK] {
                elastic.set_active_rank(rank).unwrap();
                switches.set("weight", rank).unwrap();
                assert_eq!(switches.get("weight"), Some(rank));
                let y = host_values(linear.forward(x.clone()));
                assert!(
                    max_diff(&y, &host_values(elastic.forward(x.clone()))) < 2e-5,
                    "{rule:?} {rank} {masked}"
                );
                let merged = linear.clone().materialize();
                let merged_weight = host_values(merged.weight.val());
                assert!(max_diff(&merged_weight, &host_values(elastic.merged_weight())) < 1e-5);
                if masked {
                    let weight = host_values(elastic.base.weight());
                    assert!(
                        weight
                            .iter()
                            .zip(&merged_weight)
                            .all(|(before, after)| *before != 0.0 || *after == 0.0)
                    );
                }
                assert!(max_diff(&host_values(merged.forward(x.clone())), &y) < 2e-5);
            }
            assert_eq!(before, weight_bits(&linear));
        }
    }
}

#[test]
fn a_reparameterized_layer_trains_its_factors_alone() {
    let x = random([3, D_IN], 12, &tape());
    for (masked, device) in [
        (false, tape()),
        (true, tape()),
        (false, Device::flex()),
        (true, Device::flex()),
    ] {
        let (linear, switches) = reparameterized(ScaleRule::AlphaOverMaxRank, masked, &device);
        let linear = if device.is_autodiff() {
            linear
        } else {
            linear.train()
        };
        let mut elastic = layer(&config(ScaleRule::AlphaOverMaxRank), masked, &tape());
        elastic.set_active_rank(3).unwrap();
        switches.set("weight", 3).unwrap();
        let grads = linear.forward(x.clone()).powi_scalar(2).sum().backward();
        let expected = elastic.forward(x.clone()).powi_scalar(2).sum().backward();
        assert!(linear.weight.base().grad(&grads).is_none());
        assert!(linear.bias.as_ref().unwrap().base().grad(&grads).is_none());
        let found = linear
            .weight
            .reparameterization::<ElasticLoraReparam>()
            .unwrap();
        let adapter = elastic.adapter.as_ref().unwrap();
        for (found, expected) in [
            (
                found.lora_a.val().grad(&grads),
                adapter.lora_a.val().grad(&expected),
            ),
            (
                found.lora_b.val().grad(&grads),
                adapter.lora_b.val().grad(&expected),
            ),
        ] {
            let (found, expected) = (host_values(found.unwrap()), host_values(expected.unwrap()));
            let size = expected.iter().fold(0.0f32, |m, v| m.max(v.abs()));
            assert!(size > 0.1 && max_diff(&found, &expected) < 1e-5 * size);
        }
    }
}

#[derive(Module, Debug)]
struct TwoLayers {
    first: Linear,
    second: Linear,
}

#[test]
fn a_search_space_switches_a_whole_burn_module() {
    let device = Device::flex();
    let model = TwoLayers {
        first: burn_linear(&device),
        second: LinearConfig::new(D_OUT, 9).init(&device),
    };
    let mut adapters = ElasticLoraReparameterizer::new(LoraConfig::new(4), 1).unwrap();
    let model = model.apply_reparameterization(&mut adapters);
    let switches = adapters.switches();
    let layers = switches.layers();
    let shapes: Vec<_> = layers
        .iter()
        .map(|l| (l.name.as_str(), l.d_input, l.d_output))
        .collect();
    assert_eq!(
        shapes,
        [("first.weight", D_IN, D_OUT), ("second.weight", D_OUT, 9)]
    );
    let space = SearchSpace::per_layer(&layers, &[4, 2, 1]).unwrap();
    let x = random([2, D_IN], 3, &device);
    // With fresh adapters, every subnet equals the base.
    let forward = |x: Tensor<2>| host_values(model.second.forward(model.first.forward(x)));
    let fresh = forward(x.clone());
    switches.activate(&space, &space.minimal()).unwrap();
    assert_eq!(
        (switches.get("first.weight"), switches.get("second.weight")),
        (Some(1), Some(1))
    );
    assert_eq!(fresh, forward(x));
    switches
        .activate(&space, &space.from_values(&[2, 4]).unwrap())
        .unwrap();
    assert_eq!(
        (switches.get("first.weight"), switches.get("second.weight")),
        (Some(2), Some(4))
    );

    // Settings that do not fit change nothing.
    let over = SearchSpace::per_layer(&layers, &[5, 1]).unwrap();
    assert!(matches!(
        switches.activate(&over, &over.from_values(&[1, 5]).unwrap()),
        Err(Error::InvalidRank { .. })
    ));
    let unknown = Group::new(
        "g",
        vec!["first.weight".into(), "third.weight".into()],
        vec![1],
    )
    .unwrap();
    let unknown = SearchSpace::new(vec![unknown]).unwrap();
    assert!(matches!(
        switches.activate(&unknown, &unknown.maximal()),
        Err(Error::UnknownLayer { .. })
    ));
    assert!(
        switches
            .activate(&space, &over.from_values(&[1, 5]).unwrap())
            .is_err()
    );
    assert_eq!(
        (switches.get("first.weight"), switches.get("second.weight")),
        (Some(2), Some(4))
    );
    assert!(matches!(
        switches.set("first.bias", 1),
        Err(Error::UnknownLayer { .. })
    ));
    assert!(matches!(
        switches.set("first.weight", 0),
        Err(Error::InvalidRank { .. })
    ));
    assert_eq!(switches.get("third.weight"), None);

    // A filter selects layers.
    let model = TwoLayers {
        first: burn_linear(&device),
        second: LinearConfig::new(D_OUT, 9).init(&device),
    };
    let mut adapters = ElasticLoraReparameterizer::new(LoraConfig::new(4), 1)
        .unwrap()
        .matching(|path| path.starts_with("second"));
    let model = model.apply_reparameterization(&mut adapters);
    assert_eq!(adapters.switches().layers().len(), 1);
    assert!(
        model
            .first
            .weight
            .reparameterization::<ElasticLoraReparam>()
            .is_none()
    );
    assert!(
        model
            .second
            .weight
            .reparameterization::<ElasticLoraReparam>()
            .is_some()
    );
}
