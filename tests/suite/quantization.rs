//! Quantizing and pruning a whole model, layer by layer, as seen by the caller.

use std::path::Path;

use crate::common::{Heard, load, max_diff, random_ids, shared, tiny, weight_bits};
use elastic_lora::Error;
use elastic_lora::calib::{
    PruneConfig, QuantizeConfig, QuantizeMethod, prune_model, prune_model_keeping, quantize_model,
    quantize_model_keeping, walk_blocks,
};
use elastic_lora::data::TextTokenizer;
use elastic_lora::linalg::FactorConfig;
use elastic_lora::model::Decoder;
use elastic_lora::nn::host_values;
use elastic_lora::progress::Silent;
use elastic_lora::quant::GridConfig;
use elastic_lora::sparsity::{Mask, Method, OwlConfig, Pattern};

fn samples(n: usize) -> Vec<Vec<u32>> {
    (0..n)
        .map(|i| random_ids(17 + i % 3, 41, 100 + i as u64))
        .collect()
}

fn logits(model: &Decoder, samples: &[Vec<u32>]) -> Vec<f32> {
    samples
        .iter()
        .flat_map(|ids| host_values(model.forward(model.tokens(ids, 1).unwrap())))
        .collect()
}

fn distance(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum()
}

#[test]
fn the_model_has_the_weights_that_the_codes_stand_for_and_every_zero() {
    let calibration = samples(12);
    let pattern = Pattern::Unstructured { ratio: 0.4 };
    let mut sparse = tiny(true, 3);
    prune_model(
        &mut sparse,
        &calibration,
        &PruneConfig::new(Method::Ria, pattern),
        &Silent,
    )
    .unwrap();
    let grid = GridConfig::new(4).with_group_size(Some(10));
    let joint = QuantizeMethod::SparseGptq(Pattern::NM { n: 2, m: 4 });
    for method in [QuantizeMethod::Nearest, QuantizeMethod::Gptq, joint] {
        let mut model = sparse.clone();
        let (config, heard) = (QuantizeConfig::new(method, grid), Heard::default());
        let quantized = quantize_model(&mut model, &calibration, &config, &heard).unwrap();
        assert_eq!(quantized.len(), 14);
        heard.assert_all("quantize", 14);
        for (name, found) in &quantized {
            let now = model.linear(name).unwrap().base.to_matrix();
            assert_eq!(now, found.dequantize(), "{name}");
            assert_ne!(now, sparse.linear(name).unwrap().base.to_matrix());
            if method != joint {
                let before = Mask::from_nonzero(&sparse.linear(name).unwrap().base.to_matrix());
                assert!(Mask::from_nonzero(&now).is_subset_of(&before), "{name}");
            }
        }
    }
}

#[test]
fn gptq_and_sparsegpt_leave_more_of_a_trained_model() {
    let Some(dir) = shared("models/story-llama-0.6M") else {
        return;
    };
    let Some(text) = shared("data/tinystories/sample.txt") else {
        return;
    };
    let model = load(&dir);
    let tokenizer = TextTokenizer::from_dir(&dir).unwrap();
    let ids = tokenizer
        .encode(&std::fs::read_to_string(text).unwrap(), true)
        .unwrap();
    let all: Vec<Vec<u32>> = ids.chunks_exact(64).take(40).map(<[u32]>::to_vec).collect();
    let (calibration, held_out) = all.split_at(30);
    let original = logits(&model, held_out);
    let off = |model: &Decoder| distance(&logits(model, held_out), &original);

    let quantized = |method, bits, order| {
        let mut model = model.clone();
        let config = QuantizeConfig::new(method, GridConfig::new(bits).with_group_size(Some(64)))
            .with_factor(FactorConfig::new().with_activation_order(order));
        quantize_model(&mut model, calibration, &config, &Silent).unwrap();
        off(&model)
    };
    for bits in [3, 4] {
        let (nearest, left, ordered) = (
            quantized(QuantizeMethod::Nearest, bits, false),
            quantized(QuantizeMethod::Gptq, bits, false),
            quantized(QuantizeMethod::Gptq, bits, true),
        );
        eprintln!(
            "{bits} bits: nearest {nearest:.0}, GPTQ {left:.0}, in activation order {ordered:.0}"
        );
        assert!(left < nearest && ordered < nearest);
    }
    for pattern in [
        Pattern::Unstructured { ratio: 0.5 },
        Pattern::NM { n: 2, m: 4 },
    ] {
        let pruned = |method| {
            let mut model = model.clone();
            prune_model(
                &mut model,
                calibration,
                &PruneConfig::new(method, pattern),
                &Silent,
            )
            .unwrap();
            off(&model)
        };
        let [magnitude, wanda, ria, sparsegpt] = Method::ALL.map(pruned);
        eprintln!(
            "{pattern}: magnitude {magnitude:.0}, Wanda {wanda:.0}, RIA {ria:.0}, SparseGPT {sparsegpt:.0}"
        );
        assert!(sparsegpt < wanda && wanda < magnitude && ria < magnitude);

        // Pruned and rounded in one pass, and one after the other.
        let joint = quantized(QuantizeMethod::SparseGptq(pattern), 4, false);
        let mut after = model.clone();
        prune_model(
            &mut after,
            calibration,
            &PruneConfig::new(Method::SparseGpt, pattern),
            &Silent,
        )
        .unwrap();
        let config = QuantizeConfig::new(
            QuantizeMethod::Gptq,
            GridConfig::new(4).with_group_size(Some(64)),
        );
        quantize_model(&mut after, calibration, &config, &Silent).unwrap();
        eprintln!(
            "{pattern} at 4 bits: jointly {joint:.0}, one after the other {:.0}",
            off(&after)
        );
        assert!(joint < 1.05 * off(&after));
    }
}

#[test]
fn owl_gives_blocks_ratios_of_their_own() {
    let calibration = samples(6);
    let config = PruneConfig::new(Method::Wanda, Pattern::Unstructured { ratio: 0.5 });
    let owl = OwlConfig::new().with_threshold(3.0);
    let mut model = tiny(true, 5);
    let report = prune_model(&mut model, &calibration, &config.with_owl(owl), &Silent).unwrap();
    let share = |block: usize| {
        let layers = &report[block * 7..(block + 1) * 7];
        layers.iter().map(|l| l.zeros).sum::<usize>() as f64
            / layers.iter().map(|l| l.params).sum::<usize>() as f64
    };
    // The blocks are at the two ends of the range of ratios. Rows are too short for exact ratios.
    assert!((share(0) - share(1)).abs() > 0.1 && (share(0) + share(1) - 1.0).abs() < 0.06);
    let nm = PruneConfig::new(Method::Wanda, Pattern::NM { n: 2, m: 4 }).with_owl(owl);
    assert!(matches!(
        prune_model(&mut model, &calibration, &nm, &Silent),
        Err(Error::InvalidArgument { name: "owl", .. })
    ));
}

#[test]
fn layers_of_one_input_share_what_was_seen_of_it() {
    let mut model = tiny(false, 6);
    let before = weight_bits(&model);
    let (mut made, mut seen, mut layers) = (std::cell::Cell::new(0), 0, Vec::new());
    walk_blocks(
        &mut model,
        &samples(3),
        "walk",
        |d_input| {
            made.set(made.get() + 1);
            vec![d_input]
        },
        |statistic, x| {
            seen += 1;
            assert_eq!(x.dims()[2], statistic[0]);
            Ok(())
        },
        |name, layer, statistic| {
            assert_eq!(layer.dims()[0], statistic[0]);
            statistic.push(0);
            layers.push((
                name.rsplit('.').next().unwrap().to_string(),
                statistic.len() - 1,
            ));
            Ok(())
        },
        &Silent,
    )
    .unwrap();
    let expected = [
        ("q", 1),
        ("k", 2),
        ("v", 3),
        ("o", 1),
        ("gate", 1),
        ("up", 2),
        ("down", 1),
    ];
    let expected: Vec<_> = expected.map(|(name, n)| (format!("{name}_proj"), n)).into();
    assert_eq!((*made.get_mut(), seen), (8, 8 * 3));
    assert_eq!((&layers[..7], &layers[7..]), (&expected[..], &expected[..]));
    assert_eq!(weight_bits(&model), before);
}

#[test]
fn interrupted_work_goes_on_after_its_finished_blocks() {
    let (calibration, start) = (samples(12), tiny(true, 3));
    let pattern = Pattern::Unstructured { ratio: 0.4 };
    let pruning = PruneConfig::new(Method::SparseGpt, pattern);
    let grid = GridConfig::new(4).with_group_size(Some(10));
    let rounding = QuantizeConfig::new(QuantizeMethod::Gptq, grid);
    // Weights and what else is returned, of a run in a folder or in none.
    let prune = |folder: Option<&Path>, heard: &Heard| {
        let mut model = start.clone();
        let report = match folder {
            Some(folder) => prune_model_keeping(&mut model, &calibration, &pruning, folder, heard)?,
            None => prune_model(&mut model, &calibration, &pruning, heard)?,
        };
        Ok::<_, Error>((weight_bits(&model), format!("{report:?}")))
    };
    let quantize = |folder: Option<&Path>, heard: &Heard| {
        let mut model = start.clone();
        let codes = match folder {
            Some(folder) => {
                quantize_model_keeping(&mut model, &calibration, &rounding, folder, heard)?
            }
            None => quantize_model(&mut model, &calibration, &rounding, heard)?,
        };
        Ok((weight_bits(&model), format!("{codes:?}")))
    };
    type Bits = std::collections::BTreeMap<String, Vec<u32>>;
    type Work<'a> = &'a dyn Fn(Option<&Path>, &Heard) -> Result<(Bits, String), Error>;
    for (label, work) in [("prune", &prune as Work<'_>), ("quantize", &quantize)] {
        let heard = Heard::default();
        let expected = work(None, &heard).unwrap();
        heard.assert_all(label, 14);
        let asked = heard.asked();
        for stop in (1..asked).step_by(5) {
            let root = tempfile::tempdir().unwrap();
            let folder = Some(root.path());
            let error = work(folder, &Heard::stopping_at(stop)).unwrap_err();
            assert!(matches!(error, Error::Interrupted { .. }), "{error}");
            let heard = Heard::default();
            assert!(work(folder, &heard).unwrap() == expected, "{label}, {stop}");
            // More than half way, the first block is not calibrated again.
            assert!(
                2 * stop < asked + 8 || 4 * heard.asked() < 3 * asked,
                "{label}, {stop}"
            );
            let again = Heard::default();
            assert!(work(folder, &again).unwrap() == expected);
        }
        // What is damaged is not used.
        let root = tempfile::tempdir().unwrap();
        work(Some(root.path()), &Heard::default()).unwrap();
        let kept = root.path().read_dir().unwrap().next().unwrap().unwrap();
        let file = kept.path().join("block-1.elora");
        let mut bytes = std::fs::read(&file).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(&file, bytes).unwrap();
        let error = work(Some(root.path()), &Heard::default()).unwrap_err();
        assert!(matches!(error, Error::InvalidFile { .. }), "{error}");
    }
    // Another model, other samples and other settings have folders of their own.
    let root = tempfile::tempdir().unwrap();
    let other = PruneConfig::new(Method::Wanda, pattern);
    for (seed, n, config) in [
        (3, 12, pruning),
        (4, 12, pruning),
        (3, 11, pruning),
        (3, 12, other),
    ] {
        let mut model = tiny(true, seed);
        prune_model_keeping(&mut model, &samples(n), &config, root.path(), &Silent).unwrap();
    }
    assert_eq!(root.path().read_dir().unwrap().count(), 4);
}

#[test]
fn results_are_the_same_at_any_number_of_threads() {
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| {
            let mut model = tiny(true, 8);
            let config = QuantizeConfig::new(
                QuantizeMethod::Gptq,
                GridConfig::new(3).with_group_size(None),
            );
            (
                quantize_model(&mut model, &samples(5), &config, &Silent).unwrap(),
                logits(&model, &samples(2)),
            )
        })
    };
    let (one, two) = (run(1), run(2));
    assert!(one.0 == two.0);
    assert!(max_diff(&one.1, &two.1) < 1e-4);
}

#[test]
fn what_cannot_be_quantized_is_refused() {
    let mut model = tiny(true, 2);
    let before = weight_bits(&model);
    let good = QuantizeConfig::new(QuantizeMethod::Gptq, GridConfig::new(4));
    let refused = |model: &mut Decoder, samples: &[Vec<u32>], config: &QuantizeConfig| {
        quantize_model(model, samples, config, &Silent)
            .unwrap_err()
            .to_string()
    };
    assert!(refused(&mut model, &[vec![]], &good).contains("gptq needs calibration samples"));
    assert!(refused(&mut model, &[vec![1, 999]], &good).contains("999"));
    let bits = QuantizeConfig::new(QuantizeMethod::Nearest, GridConfig::new(7));
    assert!(refused(&mut model, &[], &bits).contains("bits = 7"));
    let damping = good.with_factor(FactorConfig::new().with_damping(-1.0));
    assert!(refused(&mut model, &samples(2), &damping).contains("damping"));
    // Three tokens contain too little information about 24 columns.
    let undamped = good.with_factor(FactorConfig::new().with_damping(0.0));
    let error = refused(&mut model, &[vec![1, 2, 3]], &undamped);
    assert!(
        error.contains("model.layers.0.self_attn.q_proj")
            && error.contains("not positive definite"),
        "{error}"
    );
    assert_eq!(weight_bits(&model), before);
    let name = "model.layers.1.mlp.up_proj";
    let mut weight = model.linear(name).unwrap().base.to_matrix();
    weight.as_mut_slice()[5] = f32::NAN;
    model
        .linear_mut(name)
        .unwrap()
        .base
        .set_matrix(&weight)
        .unwrap();
    let error = refused(
        &mut model,
        &[],
        &QuantizeConfig::new(QuantizeMethod::Nearest, GridConfig::new(4)),
    );
    assert!(
        error.contains(name) && error.contains("element 5"),
        "{error}"
    );
    // With data, the error is first found in the input of the next layer.
    let error = refused(&mut model, &samples(2), &good);
    assert!(
        error.contains("model.layers.1.mlp.down_proj") && error.contains("NaN"),
        "{error}"
    );
}
