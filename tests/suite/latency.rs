//! Costs of a subnet on this machine and in a file: tables of measured times, stored bytes, and
//! both as the cost of a search. No test compares one time with another, because other processes
//! may use the machine.

use std::collections::BTreeSet;

use crate::common::{Heard, random_ids, random_values, tiny_dims, tiny_on};
use burn::tensor::Device;
use elastic_lora::adapter::LoraConfig;
use elastic_lora::arch::BlockDims;
use elastic_lora::data::{Sequence, fixed_batches};
use elastic_lora::eval::{Cost, LatencyTable, Metric, Phase, SubnetObjective, measure_ms};
use elastic_lora::format::WeightFormat;
use elastic_lora::io::hf::LlamaDims;
use elastic_lora::linalg::Matrix;
use elastic_lora::model::Decoder;
use elastic_lora::progress::Silent;
use elastic_lora::space::{Elastic, Group};
use elastic_lora::supernet::SuperNetConfig;
use elastic_lora::{Error, Merger, SearchSpace, SuperNet};

/// Two blocks with 6 heads of size 4, 3 key/value heads and MLPs of width 37. About every third
/// weight is zero.
fn model() -> Decoder {
    let dims = LlamaDims {
        num_attention_heads: 6,
        num_key_value_heads: 3,
        ..tiny_dims(false)
    };
    let mut model = tiny_on(&dims, 3, &Device::flex());
    let mut seed = 0;
    model
        .try_for_each_linear(|_, layer| {
            seed += 1;
            let [d_input, d_output] = layer.base.dims();
            let values = random_values(d_input * d_output, seed);
            let values = values.into_iter().map(|v| if v < -0.3 { 0.0 } else { v });
            layer
                .base
                .set_matrix(&Matrix::new(d_output, d_input, values.collect()).unwrap())
        })
        .unwrap();
    model
}

fn net() -> SuperNet {
    let model = model();
    let layers = model.layer_shapes();
    let width = |names: &[&str], choices: &[usize]| {
        SearchSpace::groups_by_block(Elastic::Width, &layers, &[names], choices).unwrap()
    };
    let units = ["model.layers.1", "model.layers.0.mlp"]
        .map(String::from)
        .to_vec();
    let space = SearchSpace::per_layer(&layers[..2], &[4, 2])
        .unwrap()
        .with_groups(width(&["gate_proj", "up_proj"], &[37, 29, 11]))
        .unwrap()
        .with_groups(width(&["q_proj", "k_proj", "v_proj"], &[24, 8]))
        .unwrap()
        .with_groups([Group::of_kind(Elastic::Depth, "depth", units, vec![2, 1]).unwrap()])
        .unwrap();
    SuperNet::new(
        model,
        space,
        SuperNetConfig::new(LoraConfig::new(4).with_alpha(6.0)),
    )
    .unwrap()
}

const PHASES: [Phase; 2] = [Phase::Prefill { n_tokens: 9 }, Phase::Decode { context: 5 }];

#[test]
fn a_table_has_every_size_and_foretells_the_sum_of_parts() {
    let net = net();
    for phase in PHASES {
        let heard = Heard::default();
        let table = LatencyTable::measure(&net, phase, 2, &heard).unwrap();
        assert_eq!(table.phase, phase);
        let heads: Vec<(usize, usize)> = table
            .attention_ms
            .iter()
            .map(|part| (part.0, part.1))
            .collect();
        let widths: Vec<usize> = table.mlp_ms.iter().map(|part| part.0).collect();
        assert_eq!(
            heads.iter().copied().collect::<BTreeSet<_>>(),
            BTreeSet::from([(2, 1), (6, 3)])
        );
        assert_eq!(
            widths.iter().copied().collect::<BTreeSet<_>>(),
            BTreeSet::from([11, 29, 37])
        );
        assert_eq!((heads.len(), widths.len()), (2, 3));
        heard.assert_all("time parts", 6);
        let times = table
            .attention_ms
            .iter()
            .map(|part| part.2)
            .chain(table.mlp_ms.iter().map(|part| part.1));
        assert!(
            times
                .chain([table.rest_ms])
                .all(|ms| ms > 0.0 && ms.is_finite())
        );

        let attention = |n: usize| {
            table
                .attention_ms
                .iter()
                .find(|part| part.0 == n)
                .unwrap()
                .2
        };
        let mlp = |d: usize| table.mlp_ms.iter().find(|part| part.0 == d).unwrap().1;
        let block = |n_heads: usize, d_mlp: usize| BlockDims {
            n_heads,
            n_kv_heads: n_heads / 2,
            d_mlp,
        };
        for (blocks, parts) in [
            (
                vec![block(6, 37), block(2, 29)],
                attention(6) + mlp(37) + attention(2) + mlp(29),
            ),
            (
                vec![block(0, 11), block(6, 0), block(0, 0)],
                mlp(11) + attention(6),
            ),
            (vec![], 0.0),
        ] {
            let foretold = table.predict_ms(&blocks).unwrap();
            assert!(
                (foretold - table.rest_ms - parts).abs() < 1e-9 * foretold,
                "{blocks:?}"
            );
        }
        for missing in [
            block(6, 36),
            block(4, 37),
            BlockDims {
                n_heads: 6,
                n_kv_heads: 6,
                d_mlp: 0,
            },
        ] {
            let error = table.predict_ms(&[block(6, 37), missing]).unwrap_err();
            assert!(matches!(&error, Error::InvalidArgument { .. }), "{error}");
        }
        let text = serde_json::to_string(&table).unwrap();
        assert_eq!(serde_json::from_str::<LatencyTable>(&text).unwrap(), table);
        // Every subnet has a time, for any combination of choices.
        for subnet in [net.minimal(), net.heuristic(), net.maximal()] {
            assert!(table.predict_ms(&net.block_dims(&subnet).unwrap()).unwrap() > 0.0);
        }
    }
}

#[test]
fn what_cannot_be_timed_is_refused() {
    let net = net();
    for phase in [
        Phase::Prefill { n_tokens: 0 },
        Phase::Prefill { n_tokens: 41 },
        Phase::Decode { context: 40 },
    ] {
        assert!(measure_ms(net.model(), phase, 1).is_err(), "{phase:?}");
        assert!(
            LatencyTable::measure(&net, phase, 1, &Silent).is_err(),
            "{phase:?}"
        );
    }
    for phase in PHASES {
        assert!(measure_ms(net.model(), phase, 0).unwrap() > 0.0);
    }
}

#[test]
fn stored_bytes_are_those_of_the_extracted_weights() {
    let mut net = net();
    let int = WeightFormat::Int {
        bits: 4,
        group_size: Some(8),
        symmetric: false,
    };
    for subnet in [net.maximal(), net.heuristic(), net.minimal()] {
        net.activate(&subnet).unwrap();
        // Fresh adapters add nothing, so that the extracted weights are the base's own.
        let extracted = Merger::new().extract(&net, &[], &Silent).unwrap().model;
        let mut by_hand = [0; 4];
        for (_, layer) in extracted.linears() {
            let weight = layer.base.to_matrix();
            let (rows, cols) = (weight.rows(), weight.cols());
            by_hand[0] += 4 * rows * cols;
            by_hand[1] += 2 * rows * cols;
            // Half a byte for each code, and for each group two bytes for a scale and half a byte
            // for a zero point. Rows end at whole bytes.
            let groups = cols.div_ceil(8);
            by_hand[2] += rows * (cols.div_ceil(2) + 2 * groups + groups.div_ceil(2));
            // A bit for each weight, in words of 64, an offset for each row, and the nonzero
            // values.
            by_hand[3] +=
                rows * (8 * cols.div_ceil(64) + 4) + 2 * (rows * cols - weight.count_zeros());
        }
        let norms: usize = extracted
            .layers
            .iter()
            .map(|block| {
                let count = block.norms().count();
                24 * count
            })
            .sum();
        let rest = 2 * 41 * 24 + norms + 24;
        for (format, (linear, bytes)) in [
            WeightFormat::F32,
            WeightFormat::Bf16,
            int,
            WeightFormat::SparseF16,
        ]
        .into_iter()
        .zip(by_hand.into_iter().zip([4, 2, 2, 2]))
        {
            assert_eq!(
                net.stored_bytes(&subnet, format).unwrap(),
                linear + bytes * rest,
                "{format:?} {subnet}"
            );
        }
    }
}

#[test]
fn latency_is_a_cost_of_a_search() {
    let net = net();
    let table = LatencyTable::measure(&net, PHASES[1], 1, &Silent).unwrap();
    let sequences: Vec<Sequence> = (0..2)
        .map(|seed| Sequence::unmasked(random_ids(12, 41, seed)))
        .collect();
    let batches = fixed_batches(&sequences, 2, 0).unwrap();
    let objective =
        SubnetObjective::new(&net, Metric::Loss(&batches), Cost::Macs).with_latency(table.clone());
    assert!(format!("{:?}", objective.names()).contains("latency"));
    for subnet in [net.minimal(), net.maximal()] {
        let scores = objective.evaluate(&subnet, &Silent).unwrap();
        assert_eq!(
            scores[1],
            table.predict_ms(&net.block_dims(&subnet).unwrap()).unwrap()
        );
        let plain = SubnetObjective::new(&net, Metric::Loss(&batches), Cost::Macs);
        assert_eq!(scores[0], plain.evaluate(&subnet, &Silent).unwrap()[0]);
    }
    let without = SubnetObjective::new(&net, Metric::Loss(&batches), Cost::Latency);
    assert!(matches!(
        without.evaluate(&net.maximal(), &Silent),
        Err(Error::InvalidArgument { .. })
    ));
    // A table of another network does not have these sizes.
    let other = LatencyTable {
        mlp_ms: vec![(5, 1.0)],
        ..table
    };
    let objective =
        SubnetObjective::new(&net, Metric::Loss(&batches), Cost::Macs).with_latency(other);
    assert!(matches!(
        objective.evaluate(&net.maximal(), &Silent),
        Err(Error::InvalidArgument { .. })
    ));
}
