//! Frozen weights of 16 bits: the same training as with their values in `f32`, exact merging, and
//! clear errors.

use crate::common::{is_factor, max_diff, random_ids, tiny, weight_bits};
use burn::module::Module;
use elastic_lora::adapter::LoraConfig;
use elastic_lora::data::{Batcher, Sequence};
use elastic_lora::io::DType;
use elastic_lora::model::Decoder;
use elastic_lora::nn::host_values;
use elastic_lora::progress::Silent;
use elastic_lora::supernet::SuperNetConfig;
use elastic_lora::train::{TrainConfig, Trainer};
use elastic_lora::{Error, Merger, SearchSpace, SuperNet};

fn batches() -> Batcher {
    Batcher::new(
        (0..6)
            .map(|i| Sequence::unmasked(random_ids(11, 41, i)))
            .collect(),
        3,
        0,
        1,
    )
    .unwrap()
}

/// Trains three steps on random subnets, with adapters on two layers of each block.
fn trained(model: Decoder, masked: bool) -> SuperNet {
    let groups = [&["q_proj", "v_proj"][..], &["down_proj"]];
    let space = SearchSpace::grouped(&model.layer_shapes(), &groups, &[4, 3]).unwrap();
    let config = SuperNetConfig::new(LoraConfig::new(4))
        .with_sparse_peft(masked)
        .with_seed(5);
    let mut net = SuperNet::new(model, space, config).unwrap();
    let mut config = TrainConfig::new(3);
    config.lr = 0.02;
    Trainer::new(config)
        .unwrap()
        .run(&mut net, &mut batches(), &[], &Silent)
        .unwrap();
    net
}

#[test]
fn a_model_of_16_bits_trains_as_its_rounded_weights_do() {
    for (tied, dtype) in [(true, DType::BF16), (false, DType::F16)] {
        let half = tiny(tied, 3).with_weight_dtype(dtype).unwrap();
        assert_eq!(half.count_base_params(), tiny(tied, 3).count_base_params());
        let wide = half.clone().with_weight_dtype(DType::F32).unwrap();
        assert_ne!(weight_bits(&wide), weight_bits(&tiny(tied, 3)));
        for masked in [false, true] {
            let (half, wide) = (trained(half.clone(), masked), trained(wide.clone(), masked));
            let (got, want) = (weight_bits(half.model()), weight_bits(wide.model()));
            // With bf16 the summed weight is rounded at every step, and AdamW amplifies small
            // differences where a gradient is small.
            let rounded = masked && dtype == DType::BF16;
            let floats = |bits: &Vec<u32>| {
                bits.iter()
                    .map(|bits| f32::from_bits(*bits))
                    .collect::<Vec<_>>()
            };
            for (path, got) in got.iter().filter(|(path, _)| is_factor(path)) {
                let difference = max_diff(&floats(got), &floats(&want[path]));
                assert!(
                    rounded || difference < 1e-4,
                    "{path}, {dtype:?}, masked {masked}: off by {difference}"
                );
            }
            let logits = |net: &SuperNet| {
                let model = net.eval_model();
                host_values(model.forward(model.tokens(&random_ids(12, 41, 9), 2).unwrap()))
            };
            let (got, want) = (logits(&half), logits(&wide));
            let size = want.iter().fold(0.0_f32, |size, x| size.max(x.abs()));
            let difference = max_diff(&got, &want) / size;
            let tolerance = if rounded { 5e-2 } else { 1e-3 };
            assert!(
                difference < tolerance,
                "{dtype:?}, masked {masked}: logits are off by {difference} of their size"
            );
        }
    }
}

#[test]
fn merging_into_16_bits_loses_nothing() {
    let mut net = trained(tiny(false, 3).with_weight_dtype(DType::BF16).unwrap(), true);
    net.activate(&net.minimal()).unwrap();
    let merged = Merger::new()
        .merge(&net, &[vec![1, 5, 9, 2]], &Silent)
        .unwrap();
    assert_eq!(
        (merged.report.layers.len(), merged.report.zeros_lost),
        (6, 0)
    );
    assert_eq!(merged.report.max_logit_difference, Some(0.0));
}

#[test]
fn what_cannot_be_stored_or_trained_is_refused() {
    let model = || tiny(true, 3);
    assert!(matches!(
        model().with_weight_dtype(DType::I32),
        Err(Error::Unsupported { .. })
    ));
    let trained = SuperNet::dense(model()).unwrap().into_model().train();
    assert!(matches!(
        trained.with_weight_dtype(DType::BF16),
        Err(Error::Unsupported { .. })
    ));
    let mut dense = SuperNet::dense(model().with_weight_dtype(DType::BF16).unwrap()).unwrap();
    let error = Trainer::new(TrainConfig::new(1))
        .unwrap()
        .run(&mut dense, &mut batches(), &[], &Silent)
        .unwrap_err();
    assert!(matches!(error, Error::Unsupported { .. }), "{error}");

    let mut large = model();
    let layer = large.linear_mut("model.layers.1.mlp.up_proj").unwrap();
    let mut weight = layer.base.to_matrix();
    weight.row_mut(3)[2] = -7e4;
    layer.base.set_matrix(&weight).unwrap();
    assert!(large.clone().with_weight_dtype(DType::BF16).is_ok());
    let error = large.with_weight_dtype(DType::F16).unwrap_err();
    let found = matches!(&error, Error::TensorOverflow { tensor, value, .. } if tensor.contains("up_proj") && *value == -7e4);
    assert!(found, "{error}");
}
