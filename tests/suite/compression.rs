//! The whole pipeline: prune, train, search, merge, write and read back.

use crate::common::{Heard, max_diff, shared};
use burn::tensor::Device;
use elastic_lora::adapter::LoraConfig;
use elastic_lora::arch::LinearKind;
use elastic_lora::calib::{PruneConfig, prune_model};
use elastic_lora::data::{Batcher, Sequence, TextTokenizer, fixed_batches, join_documents, pack};
use elastic_lora::eval::{Cost, Metric, SubnetObjective, mean_loss, perplexity};
use elastic_lora::format::WeightFormat;
use elastic_lora::io::hf::{HfConfig, HfFolder, LlamaDims};
use elastic_lora::io::{Checkpoint, DType};
use elastic_lora::linalg::Matrix;
use elastic_lora::merge::MergeMode;
use elastic_lora::model::{Decoder, Pretrained};
use elastic_lora::nn::host_values;
use elastic_lora::progress::Silent;
use elastic_lora::runtime::{Model, ModelOptions, Session, SessionConfig};
use elastic_lora::search::{NsgaConfig, StudyConfig};
use elastic_lora::sparsity::{InputNorms, Method, Pattern, prune};
use elastic_lora::supernet::SuperNetConfig;
use elastic_lora::train::{Sampling, TrainConfig, Trainer};
use elastic_lora::{Error, Merger, SearchSpace, SuperNet};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

const VOCAB: usize = 53;

fn tiny(seed: u64) -> Decoder {
    tiny_with_context(seed, 32)
}

fn tiny_with_context(seed: u64, context: usize) -> Decoder {
    let config = HfConfig::new_llama(&LlamaDims {
        vocab_size: VOCAB,
        hidden_size: 24,
        intermediate_size: 36,
        num_hidden_layers: 3,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        max_position_embeddings: context,
        rope_theta: 10_000.0,
        rms_norm_eps: 1e-5,
        tie_word_embeddings: true,
        bos_token_id: Some(1),
        eos_token_id: Some(2),
        pad_token_id: None,
        dtype: DType::F32,
    })
    .unwrap();
    let mut model = Decoder::init(&config, seed, &Device::flex()).unwrap();
    // The weights are larger than those of a fresh model, so that every layer matters.
    model
        .try_for_each_linear(|_, layer| {
            let mut weight = layer.base.to_matrix();
            weight.as_mut_slice().iter_mut().for_each(|v| *v *= 12.0);
            layer.base.set_matrix(&weight)
        })
        .unwrap();
    model
}

fn samples(n: usize, len: usize, seed: u64) -> Vec<Vec<u32>> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..n)
        .map(|_| {
            (0..len)
                .map(|_| rng.random_range(0..VOCAB as u32))
                .collect()
        })
        .collect()
}

fn weight(model: &Decoder, name: &str) -> Matrix {
    model.linear(name).unwrap().base.to_matrix()
}

fn logits(model: &Decoder, ids: &[u32]) -> Vec<f32> {
    host_values(model.forward(model.tokens(ids, 1).unwrap()))
}

#[test]
fn each_block_is_calibrated_on_what_the_pruned_ones_before_it_put_out() {
    let pattern = Pattern::Unstructured { ratio: 0.5 };
    let calibration = samples(7, 19, 3);
    let original = tiny(1);
    let mut pruned = original.clone();
    let (config, heard) = (PruneConfig::new(Method::Wanda, pattern), Heard::default());
    let report = prune_model(&mut pruned, &calibration, &config, &heard).unwrap();
    assert_eq!(report.len(), 21);
    heard.assert_all("prune", 21);
    assert_eq!(
        host_values(pruned.embed_tokens.val()),
        host_values(original.embed_tokens.val())
    );

    // Computed by hand: the inputs of the layers of block 1 in a model in which only block 0 is
    // pruned.
    let mut partly = original.clone();
    for kind in LinearKind::ALL {
        let name = kind.name(0);
        partly
            .linear_mut(&name)
            .unwrap()
            .base
            .set_matrix(&weight(&pruned, &name))
            .unwrap();
    }
    for kind in LinearKind::ALL {
        let mut w = weight(&original, &kind.name(1));
        let mut norms = InputNorms::new(w.cols());
        for sample in &calibration {
            let x = partly.block(0, partly.embed(partly.tokens(sample, 1).unwrap()), None);
            let mut tap = |shown: LinearKind, x: &burn::tensor::Tensor<3>| {
                if shown == kind {
                    norms.update(&host_values(x.clone()), 1).unwrap();
                }
            };
            partly.block(1, x, Some(&mut tap));
        }
        let scores = Method::Wanda.scores(&w, Some(&norms)).unwrap();
        prune(&mut w, &scores, &pattern).unwrap();
        let found = weight(&pruned, &kind.name(1));
        let same = w
            .as_slice()
            .iter()
            .zip(found.as_slice())
            .filter(|(a, b)| a == b)
            .count();
        // Scores are summed in another order, so ties at the threshold may be decided differently.
        assert!(
            same + 2 >= w.as_slice().len(),
            "{:?}: {same} of {}",
            kind,
            w.as_slice().len()
        );
        (0..found.rows()).for_each(|i| {
            assert_eq!(
                found.row(i).iter().filter(|v| **v == 0.0).count(),
                found.cols() / 2
            )
        });
    }
}

#[test]
fn n_of_m_and_magnitude_prune_without_touching_what_they_should_not() {
    let mut model = tiny(2);
    let report = prune_model(
        &mut model,
        &[],
        &PruneConfig::new(Method::Magnitude, Pattern::NM { n: 2, m: 4 }),
        &Silent,
    )
    .unwrap();
    assert!(report.iter().all(|layer| 2 * layer.zeros == layer.params));
    for (_, layer) in model.linears() {
        let w = layer.base.to_matrix();
        for i in 0..w.rows() {
            assert!(
                w.row(i)
                    .chunks(4)
                    .all(|group| group.iter().filter(|v| **v != 0.0).count() <= 2)
            );
        }
    }
}

#[test]
fn pruning_refuses_what_it_cannot_do() {
    let pattern = Pattern::Unstructured { ratio: 0.5 };
    let mut model = tiny(2);
    let before = weight(&model, "model.layers.0.mlp.up_proj");
    assert!(matches!(
        prune_model(
            &mut model,
            &[],
            &PruneConfig::new(Method::Wanda, pattern),
            &Silent
        ),
        Err(Error::InvalidArgument {
            name: "samples",
            ..
        })
    ));
    assert!(matches!(
        prune_model(
            &mut model,
            &[vec![1, 999]],
            &PruneConfig::new(Method::Wanda, pattern),
            &Silent
        ),
        Err(Error::TokenOutOfRange { found: 999, .. })
    ));
    assert!(matches!(
        prune_model(
            &mut model,
            &[vec![1; 33]],
            &PruneConfig::new(Method::Wanda, pattern),
            &Silent
        ),
        Err(Error::SequenceTooLong {
            found: 33,
            max: 32,
            ..
        })
    ));
    let ratio = Pattern::Unstructured { ratio: 1.5 };
    assert!(
        prune_model(
            &mut model,
            &samples(1, 5, 1),
            &PruneConfig::new(Method::Wanda, ratio),
            &Silent
        )
        .is_err()
    );
    assert_eq!(weight(&model, "model.layers.0.mlp.up_proj"), before);
}

/// A supernet on a half-pruned model, trained for a few steps so that its adapters are not zero.
fn trained(masked: bool) -> SuperNet {
    let mut model = tiny(5);
    let pattern = Pattern::Unstructured { ratio: 0.5 };
    prune_model(
        &mut model,
        &samples(4, 16, 8),
        &PruneConfig::new(Method::Wanda, pattern),
        &Silent,
    )
    .unwrap();
    let groups = [
        vec!["q_proj", "k_proj", "v_proj"],
        vec!["up_proj", "gate_proj"],
        vec!["down_proj"],
    ];
    let space = SearchSpace::grouped(&model.layer_shapes(), &groups, &[6, 4, 3]).unwrap();
    let lora = LoraConfig::new(6).with_alpha(9.0);
    let mut net = SuperNet::new(
        model,
        space,
        SuperNetConfig::new(lora).with_sparse_peft(masked),
    )
    .unwrap();
    let sequences = samples(12, 14, 9)
        .into_iter()
        .map(Sequence::unmasked)
        .collect();
    let mut batches = Batcher::new(sequences, 4, 0, 1).unwrap();
    let mut config = TrainConfig::new(6);
    config.lr = 2e-2;
    Trainer::new(config)
        .unwrap()
        .run(&mut net, &mut batches, &[], &Silent)
        .unwrap();
    net
}

#[test]
fn sparse_peft_merges_without_losing_a_zero_and_reads_back_equal() {
    let mut net = trained(true);
    let ids = &samples(1, 20, 11)[0];
    for subnet in [net.maximal(), net.heuristic(), net.minimal()] {
        net.activate(&subnet).unwrap();
        let merged = Merger::new()
            .merge(&net, std::slice::from_ref(ids), &Silent)
            .unwrap();
        assert_eq!(merged.report.zeros_lost, 0);
        assert_eq!(merged.report.layers.len(), 18);
        assert!(
            merged
                .report
                .layers
                .iter()
                .all(|l| l.sparsity_before == 0.5 && l.sparsity_after >= 0.5)
        );
        assert!(merged.report.max_logit_difference.unwrap() < 1e-4);
        let difference = max_diff(&logits(net.model(), ids), &logits(&merged.model, ids));
        assert!(difference < 1e-4, "{difference}");
        // Training changed something, so the equality above is meaningful.
        let base = weight(net.model(), "model.layers.1.mlp.up_proj");
        assert!(
            max_diff(
                base.as_slice(),
                weight(&merged.model, "model.layers.1.mlp.up_proj").as_slice()
            ) > 1e-3
        );

        for dtype in [DType::F32, DType::F16, DType::BF16] {
            let parent = tempfile::tempdir().unwrap();
            let path = parent.path().join("merged");
            let folder = HfFolder::create(&path, false).unwrap();
            folder
                .write_model(
                    merged.model.config(),
                    dtype,
                    merged.model.tensors(dtype).unwrap(),
                )
                .unwrap();
            folder.commit().unwrap();
            let read = Decoder::load(
                &HfConfig::open(&path).unwrap(),
                &Checkpoint::open(&path).unwrap(),
                &Device::flex(),
            )
            .unwrap();
            if dtype == DType::F32 {
                assert_eq!(logits(&read, ids), logits(&merged.model, ids));
            }
            for (name, layer) in merged.model.linears() {
                let (before, after) = (layer.base.to_matrix(), weight(&read, &name));
                assert!(
                    before
                        .as_slice()
                        .iter()
                        .zip(after.as_slice())
                        .all(|(b, a)| *b != 0.0 || *a == 0.0)
                );
            }
        }
    }
}

#[test]
fn merged_subnets_switch_in_one_bundle() {
    let mut net = trained(true);
    let prompt = &samples(1, 20, 11)[0];
    let subnets = [
        ("largest", net.maximal()),
        ("heuristic", net.heuristic()),
        ("smallest", net.minimal()),
    ]
    .map(|(name, subnet)| (name.to_string(), subnet));
    let root = tempfile::tempdir().unwrap();
    let bundle = root.path().join("subnets.elora");
    let merger = Merger::new();
    merger
        .merge_subnets(&net, &subnets, WeightFormat::F32, &Silent)
        .unwrap()
        .save(&bundle, false)
        .unwrap();
    let model = Model::open(&bundle, &ModelOptions::default()).unwrap();
    let last = |model: &Model, subnet: &str| {
        let mut session = Session::new(model, &SessionConfig::default()).unwrap();
        session.set_subnet_named(subnet).unwrap();
        let mut logits = vec![0.0; VOCAB];
        session.decode(prompt, Some(&mut logits)).unwrap();
        logits
    };
    let mut seen: Vec<Vec<f32>> = Vec::new();
    for (name, subnet) in &subnets {
        net.activate(subnet).unwrap();
        let merged = merger.merge(&net, &[], &Silent).unwrap().model;
        let path = root.path().join(name);
        let folder = HfFolder::create(&path, false).unwrap();
        let tensors = merged.tensors(DType::F32).unwrap();
        folder
            .write_model(merged.config(), DType::F32, tensors)
            .unwrap();
        folder.commit().unwrap();
        let alone = Model::open(&path, &ModelOptions::default()).unwrap();
        let found = last(&model, name);
        assert_eq!(found, last(&alone, "whole"), "{name}");
        assert!(seen.iter().all(|other| *other != found));
        seen.push(found);
        // Shared: the embedding, and the layers without an adapter.
        assert!(model.bytes() < 3 * alone.bytes() && model.bytes() > alone.bytes());
    }
    assert!(
        merger
            .merge_subnets(&net, &[], WeightFormat::F32, &Silent)
            .is_err()
    );
}

#[test]
fn an_unmasked_adapter_is_merged_into_zeros_only_when_asked() {
    let net = trained(false);
    let ids = &samples(1, 20, 12)[0];
    assert!(matches!(
        Merger::new().merge(&net, &[], &Silent),
        Err(Error::ZerosLost { lost: 1.., .. })
    ));
    let merged = Merger::new()
        .with_mode(MergeMode::Dense)
        .merge(&net, std::slice::from_ref(ids), &Silent)
        .unwrap();
    assert!(merged.report.zeros_lost > 1000);
    assert!(merged.report.max_logit_difference.unwrap() < 1e-4);
    assert!(
        merged
            .report
            .layers
            .iter()
            .all(|layer| layer.sparsity_after < 0.1)
    );
}

#[test]
fn an_objective_leaves_the_super_network_as_it_is() {
    let net = trained(false);
    let valid = fixed_batches(
        &samples(5, 9, 13)
            .into_iter()
            .map(Sequence::unmasked)
            .collect::<Vec<_>>(),
        2,
        0,
    )
    .unwrap();
    let objective = SubnetObjective::new(&net, Metric::Loss(&valid), Cost::Macs);
    let small = objective.evaluate(&net.minimal(), &Silent).unwrap();
    let large = objective.evaluate(&net.maximal(), &Silent).unwrap();
    assert!(small[1] < large[1] && small[0] != large[0]);
    assert_eq!(net.active(), &net.maximal());
    assert_eq!(objective.evaluate(&net.minimal(), &Silent).unwrap(), small);
    let mut by_hand = net.clone();
    by_hand.activate(&net.minimal()).unwrap();
    assert_eq!(
        mean_loss(by_hand.model(), &valid, &Silent).unwrap(),
        small[0]
    );
}

#[test]
fn perplexity_predicts_every_token_but_the_first_of_each_window() {
    let model = tiny(4);
    let ids = &samples(1, 23, 6)[0];
    let result = perplexity(&model, ids, 8, &Silent).unwrap();
    // Windows of 8, 8 and 7 tokens.
    assert_eq!(result.predicted_tokens, 7 + 7 + 6);
    let mut sum = 0.0;
    for window in ids.chunks(8) {
        let logits = logits(&model, window);
        for t in 1..window.len() {
            let row = &logits[(t - 1) * VOCAB..t * VOCAB];
            let max = row.iter().copied().fold(f32::MIN, f32::max);
            let log_sum = f64::from(max)
                + row
                    .iter()
                    .map(|v| f64::from(v - max).exp())
                    .sum::<f64>()
                    .ln();
            sum += log_sum - f64::from(row[window[t] as usize]);
        }
    }
    approx::assert_relative_eq!(result.nll, sum / 20.0, epsilon = 1e-5);
    approx::assert_relative_eq!(result.perplexity, result.nll.exp());
    assert!(perplexity(&model, &ids[..1], 8, &Silent).is_err());
    assert!(perplexity(&model, ids, 1, &Silent).is_err());
    let long = &samples(1, 40, 6)[0];
    assert!(matches!(
        perplexity(&model, long, 40, &Silent),
        Err(Error::SequenceTooLong {
            found: 40,
            max: 32,
            ..
        })
    ));
}

#[test]
fn a_window_too_long_for_one_piece_gives_the_same_perplexity() {
    let model = tiny_with_context(4, 6000);
    let ids = &samples(1, 5000, 6)[0];
    let whole = perplexity(&model, ids, 6000, &Silent).unwrap();
    let targets: Vec<(usize, u32)> = (1..ids.len()).map(|t| (t - 1, ids[t])).collect();
    let sum = host_values(
        model
            .nll_sum(model.tokens(ids, 1).unwrap(), &targets)
            .unwrap(),
    )[0];
    assert_eq!(whole.predicted_tokens, 4999);
    approx::assert_relative_eq!(whole.nll, f64::from(sum) / 4999.0, epsilon = 1e-4);
    assert!(matches!(
        model.nll_sum(model.tokens(ids, 1).unwrap(), &[(0, VOCAB as u32)]),
        Err(Error::TokenOutOfRange { .. })
    ));
    assert!(
        model
            .nll_sum(model.tokens(ids, 1).unwrap(), &[(5000, 1)])
            .is_err()
    );
}

#[test]
fn a_model_with_adapters_is_neither_pruned_nor_written_as_if_it_had_none() {
    let Some(dir) = shared("models/story-llama-0.6M") else {
        return;
    };
    let pretrained = Pretrained::open(&dir, &Device::flex()).unwrap();
    let layers = pretrained.model.layer_shapes();
    let space = SearchSpace::fixed(&layers[..3], 2).unwrap();
    let net = SuperNet::new(
        pretrained.model.clone(),
        space,
        SuperNetConfig::new(LoraConfig::new(2)),
    )
    .unwrap();
    let parent = tempfile::tempdir().unwrap();
    let written = pretrained.write_variant(net.model(), parent.path().join("x"), false);
    assert!(matches!(written, Err(Error::HasAdapter { .. })));
    assert!(!parent.path().join("x").exists());
    let pattern = Pattern::Unstructured { ratio: 0.5 };
    let pruned = prune_model(
        &mut net.into_model(),
        &[],
        &PruneConfig::new(Method::Magnitude, pattern),
        &Silent,
    );
    assert!(matches!(pruned, Err(Error::HasAdapter { .. })));
}

#[test]
fn on_a_real_model_pruning_hurts_training_recovers_and_the_search_beats_the_heuristic() {
    let (Some(dir), Some(text)) = (
        shared("models/story-llama-0.6M"),
        shared("data/tinystories/sample.txt"),
    ) else {
        return;
    };
    let pretrained = Pretrained::open(&dir, &Device::flex()).unwrap();
    let text = std::fs::read_to_string(text).unwrap();
    let cut = |from: usize, len: usize| -> Vec<Sequence> {
        let piece: String = text.chars().skip(from).take(len).collect();
        let tokenizer: &TextTokenizer = &pretrained.tokenizer;
        pack(&join_documents(&[piece], tokenizer, false).unwrap(), 64).unwrap()
    };
    let (train, valid) = (
        cut(0, 200_000),
        fixed_batches(&cut(300_000, 20_000), 16, 0).unwrap(),
    );
    let base = mean_loss(&pretrained.model, &valid, &Silent).unwrap();
    let calibration: Vec<Vec<u32>> = train.iter().take(32).map(|s| s.ids.clone()).collect();
    let mut pruned = pretrained.model.clone();
    let pattern = Pattern::Unstructured { ratio: 0.5 };
    prune_model(
        &mut pruned,
        &calibration,
        &PruneConfig::new(Method::Wanda, pattern),
        &Silent,
    )
    .unwrap();
    let hurt = mean_loss(&pruned, &valid, &Silent).unwrap();
    assert!(hurt > base + 0.2, "{base} {hurt}");

    let groups = [
        vec!["q_proj", "k_proj", "v_proj"],
        vec!["up_proj", "gate_proj"],
        vec!["down_proj"],
    ];
    let space = SearchSpace::grouped(&pruned.layer_shapes(), &groups, &[32, 24, 16]).unwrap();
    let mut net = SuperNet::new(pruned, space, SuperNetConfig::new(LoraConfig::new(32))).unwrap();
    let mut config = TrainConfig::new(40);
    config.lr = 2e-3;
    config.sampling = Sampling::PerStep;
    let mut batches = Batcher::new(train, 16, 0, 0).unwrap();
    Trainer::new(config)
        .unwrap()
        .run(&mut net, &mut batches, &[], &Silent)
        .unwrap();
    let recovered = mean_loss(&net.eval_model(), &valid, &Silent).unwrap();
    assert!(
        recovered < hurt - 0.5 * (hurt - base),
        "{base} {hurt} {recovered}"
    );

    let mut searcher = NsgaConfig::new()
        .with_population(6)
        .with_seed(1)
        .init(net.space())
        .unwrap();
    let objective = SubnetObjective::new(&net, Metric::Loss(&valid), Cost::Macs);
    let mut study = StudyConfig::new(18).init(net.space()).unwrap();
    let outcome = study
        .run(
            &mut searcher,
            |subnet| objective.evaluate(subnet, &Silent),
            &Silent,
        )
        .unwrap();
    let heuristic = outcome.get(&net.heuristic()).unwrap();
    let best = outcome.best_under(heuristic.cost()).unwrap();
    assert!(best.score() <= heuristic.score() && best.cost() <= heuristic.cost());
}
