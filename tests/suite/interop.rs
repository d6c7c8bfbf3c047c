//! PEFT and transformers on folders that this crate reads and writes.
//!
//! If there is a Python with torch, transformers and peft (`ELASTIC_LORA_PYTHON`, else `python3`),
//! the scripts of this test load the written folders and compare logits. Otherwise these tests
//! print that they were skipped.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::arithmetic::{Kind, Split, problems};
use crate::bpe::{bpe_tokenizer_config, train_bpe};
use crate::common::python::{ids_tensor, python, run, write_vectors};
use crate::common::{load, load_i32, max_diff, shared};
use burn::tensor::Device;
use elastic_lora::adapter::{LoraConfig, ScaleRule};
use elastic_lora::arch::{BlockDims, Family};
use elastic_lora::data::{Batcher, Sequence, TextTokenizer};
use elastic_lora::io::hf::{HfConfig, HfFolder, LlamaDims};
use elastic_lora::io::peft::PeftOptions;
use elastic_lora::io::{Checkpoint, DType, LoraAdapter, LoraWeights};
use elastic_lora::linalg::Matrix;
use elastic_lora::merge::MergeMode;
use elastic_lora::model::Decoder;
use elastic_lora::nn::{BaseLinear, host_values};
use elastic_lora::progress::Silent;
use elastic_lora::space::{Elastic, Group, SearchSpace, SubnetConfig};
use elastic_lora::sparsity::{Pattern, magnitude_scores, prune};
use elastic_lora::supernet::SuperNetConfig;
use elastic_lora::train::{TrainConfig, Trainer};
use elastic_lora::{Error, Merger, SuperNet};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

const TEXT: &str =
    "Once upon a time, Tom had 12 apples and 345 pears.\nHe gave 7 away: how many were left?";

/// A random Llama with everything that can differ: grouped heads, an untied head, a vocabulary from
/// its own tokenizer, and sizes that are not powers of two. The weights are large enough for every
/// layer to matter.
fn write_tiny_llama(folder: &Path) {
    let texts: Vec<String> = problems(Kind::AddSub, Split::Train, 200, 1)
        .unwrap()
        .into_iter()
        .map(|p| format!("{}\n{}", p.question, p.answer))
        .collect();
    let tokenizer = train_bpe(&texts, 347).unwrap();
    let vocab_size = TextTokenizer::from_json(&tokenizer, "tokenizer.json")
        .unwrap()
        .vocab_size();
    let config = HfConfig::new_llama(&LlamaDims {
        vocab_size,
        hidden_size: 60,
        intermediate_size: 92,
        num_hidden_layers: 3,
        num_attention_heads: 6,
        num_key_value_heads: 2,
        max_position_embeddings: 128,
        rope_theta: 5e4,
        rms_norm_eps: 1e-5,
        tie_word_embeddings: false,
        bos_token_id: Some(1),
        eos_token_id: Some(2),
        pad_token_id: Some(0),
        dtype: DType::F32,
    });
    let config = config.unwrap();
    let mut model = Decoder::init(&config, 11, &Device::flex()).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(12);
    let mut random = |rows, cols: usize| {
        let bound = (3.0 / cols as f32).sqrt();
        Matrix::from_fn(rows, cols, |_, _| rng.random_range(-bound..bound))
    };
    model
        .try_for_each_linear(|_, layer| {
            let [d_input, d_output] = layer.base.dims();
            layer.base.set_matrix(&random(d_output, d_input))
        })
        .unwrap();
    let head = model.lm_head.as_mut().unwrap();
    head.set_matrix(&random(vocab_size, 60)).unwrap();
    let out = HfFolder::create(folder, false).unwrap();
    out.write_model(&config, DType::F32, model.tensors(DType::F32).unwrap())
        .unwrap();
    out.write_text("tokenizer.json", &tokenizer).unwrap();
    out.write_text("tokenizer_config.json", &bpe_tokenizer_config(128))
        .unwrap();
    out.commit().unwrap();
}

/// The models to test: a random one, and a trained one if it exists.
fn bases(scratch: &Path) -> Vec<PathBuf> {
    let tiny = scratch.join("tiny");
    write_tiny_llama(&tiny);
    [Some(tiny), shared("models/story-llama-0.6M")]
        .into_iter()
        .flatten()
        .collect()
}

fn logits(model: &Decoder, ids: &[u32]) -> Vec<f32> {
    host_values(model.forward(model.tokens(ids, 1).unwrap()))
}

fn random_ids(model: &Decoder, n: usize, seed: u64) -> Vec<u32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..n)
        .map(|_| rng.random_range(3..model.config().vocab_size() as u32))
        .collect()
}

/// A supernet whose factors are all set by training: two steps at a rate that moves them far.
fn trained(model: Decoder, lora: LoraConfig) -> SuperNet {
    let layers: Vec<_> = model
        .layer_shapes()
        .into_iter()
        .filter(|layer| {
            ["q_proj", "v_proj", "down_proj"]
                .iter()
                .any(|name| layer.name.ends_with(name))
        })
        .collect();
    let space = SearchSpace::per_layer(&layers, &[8, 5, 3]).unwrap();
    let ids = random_ids(&model, 30, 21);
    // Every `up_proj` except one has an adapter of fixed rank, so that the names alone do not tell
    // which layers are adapted.
    let fixed = vec!["model.layers.1.mlp.up_proj".to_string()];
    let config = SuperNetConfig::new(lora)
        .with_fixed_layers(fixed)
        .with_seed(4);
    let mut net = SuperNet::new(model, space, config).unwrap();
    let mut batcher = Batcher::new(
        ids.chunks(15)
            .map(|c| Sequence::unmasked(c.to_vec()))
            .collect(),
        2,
        0,
        5,
    )
    .unwrap();
    let config = TrainConfig {
        lr: 0.05,
        sampling: elastic_lora::train::Sampling::Fixed,
        ..TrainConfig::new(2)
    };
    Trainer::new(config)
        .unwrap()
        .run(&mut net, &mut batcher, &[], &Silent)
        .unwrap();
    net
}

#[test]
fn peft_computes_our_adapters_logits() {
    let Some(python) = python() else { return };
    let scratch = tempfile::tempdir().unwrap();
    for (which, base) in bases(scratch.path()).into_iter().enumerate() {
        let mut arguments = vec![base.clone()];
        for (rule, scale_rule) in [ScaleRule::AlphaOverMaxRank, ScaleRule::AlphaOverSqrtRank]
            .into_iter()
            .enumerate()
        {
            let model = load(&base);
            let ids = random_ids(&model, 41, 31);
            let mut net = trained(
                model,
                LoraConfig::new(8)
                    .with_alpha(13.0)
                    .with_scale_rule(scale_rule),
            );
            let subnet = net.sample(&mut ChaCha8Rng::seed_from_u64(7));
            net.activate(&subnet).unwrap();
            let adapter = net.extract_adapter().unwrap();
            let ranks: std::collections::BTreeSet<usize> =
                adapter.layers.values().map(LoraWeights::rank).collect();
            assert!(ranks.len() > 1, "{ranks:?}");
            let vectors = scratch.path().join(format!("{which}-{rule}.safetensors"));
            write_vectors(
                &vectors,
                &net.eval_model(),
                &ids,
                Vec::new(),
                &BTreeMap::new(),
            );
            let model_layers = net
                .model()
                .layer_shapes()
                .into_iter()
                .map(|layer| layer.name)
                .collect::<Vec<_>>();
            for (pad_to_max_rank, model_layers) in [(false, model_layers), (true, Vec::new())] {
                let folder = scratch
                    .path()
                    .join(format!("{which}-{rule}-{pad_to_max_rank}"));
                let options = PeftOptions {
                    pad_to_max_rank,
                    model_layers,
                    ..PeftOptions::default()
                };
                adapter.write(&folder, &options).unwrap();
                arguments.extend([folder, vectors.clone()]);
            }
        }
        run(python, "check_peft.py", &arguments);
    }
}

/// Returns the number of zeros of each linear layer by the name of its weight.
fn zeros(model: &Decoder) -> BTreeMap<String, usize> {
    model
        .linears()
        .map(|(name, layer)| {
            (
                format!("{name}.weight"),
                layer.base.to_matrix().count_zeros(),
            )
        })
        .collect()
}

/// Writes a model, reads it back, and records what transformers must find in it.
fn write_checked(
    model: &Decoder,
    source: &Path,
    folder: &Path,
    dtype: DType,
    shard: u64,
) -> [PathBuf; 2] {
    let out = HfFolder::create(folder, false)
        .unwrap()
        .with_max_shard_bytes(shard);
    out.write_model(model.config(), dtype, model.tensors(dtype).unwrap())
        .unwrap();
    assert!(out.carry_over(source).unwrap().contains(&"tokenizer.json"));
    out.commit().unwrap();
    let read = load(folder);
    let zeros = self::zeros(&read);
    assert_eq!(zeros, self::zeros(model));
    let ids = TextTokenizer::from_dir(folder)
        .unwrap()
        .encode(TEXT, true)
        .unwrap();
    let metadata = BTreeMap::from([
        ("zeros".to_string(), serde_json::to_string(&zeros).unwrap()),
        ("text".to_string(), TEXT.to_string()),
    ]);
    let vectors = folder.with_extension("safetensors");
    write_vectors(
        &vectors,
        &read,
        &random_ids(&read, 41, 32),
        vec![ids_tensor("text_ids", &ids)],
        &metadata,
    );
    [folder.to_path_buf(), vectors]
}

/// Random factors of mixed ranks on a few layers, to be masked.
fn random_adapter(model: &Decoder) -> LoraAdapter {
    let mut rng = ChaCha8Rng::seed_from_u64(41);
    let mut adapter = LoraAdapter {
        sparse: true,
        ..LoraAdapter::default()
    };
    for (i, layer) in model
        .layer_shapes()
        .into_iter()
        .enumerate()
        .filter(|(i, _)| i % 3 != 1)
    {
        let rank = 2 + i % 4;
        let a = Matrix::from_fn(rank, layer.d_input, |_, _| rng.random_range(-0.3..0.3));
        let b = Matrix::from_fn(layer.d_output, rank, |_, _| rng.random_range(-0.3..0.3));
        adapter.layers.insert(
            layer.name,
            LoraWeights::new(a, b, 0.3 + i as f32 / 10.0).unwrap(),
        );
    }
    adapter
}

#[test]
fn transformers_reads_pruned_and_merged_models() {
    let Some(python) = python() else { return };
    let scratch = tempfile::tempdir().unwrap();
    let mut arguments = Vec::new();
    for (which, base) in bases(scratch.path()).into_iter().enumerate() {
        let mut model = load(&base);
        model
            .try_for_each_linear(|_, layer| {
                let mut weight = layer.base.to_matrix();
                let scores = magnitude_scores(&weight);
                prune(&mut weight, &scores, &Pattern::Unstructured { ratio: 0.5 })?;
                layer.base.set_matrix(&weight)
            })
            .unwrap();
        let sparsity = zeros(&model).values().sum::<usize>() as f64
            / model
                .layer_shapes()
                .iter()
                .map(|l| l.d_input * l.d_output)
                .sum::<usize>() as f64;
        assert!((0.49..=0.51).contains(&sparsity), "{sparsity}");
        // Half precision in shards, and bfloat16 in one file.
        let (dtype, shard) = if which == 0 {
            (DType::BF16, u64::MAX)
        } else {
            (DType::F16, 300_000)
        };
        let folder = scratch.path().join(format!("pruned-{which}"));
        arguments.extend(write_checked(&model, &base, &folder, dtype, shard));

        // Merged with SparsePEFT: other weights, the same zeros.
        let net = SuperNet::from_adapter(model.clone(), &random_adapter(&model)).unwrap();
        let ids = random_ids(&model, 41, 33);
        let unmerged = logits(net.model(), &ids);
        let merged = Merger::new().merge(&net, &[], &Silent).unwrap().model;
        assert!(max_diff(&logits(&model, &ids), &unmerged) > 1e-2);
        assert!(max_diff(&logits(&merged, &ids), &unmerged) < 1e-4);
        assert_eq!(zeros(&merged), zeros(&model));
        let folder = scratch.path().join(format!("merged-{which}"));
        arguments.extend(write_checked(&merged, &base, &folder, DType::F32, u64::MAX));
    }
    run(python, "check_transformers.py", &arguments);
}

/// Subnets of smaller width, fewer heads and less depth that are the same in all blocks have stock
/// configs.
#[test]
fn transformers_reads_extracted_models() {
    let Some(python) = python() else { return };
    let scratch = tempfile::tempdir().unwrap();
    let mut arguments = Vec::new();
    for (which, base) in bases(scratch.path()).into_iter().enumerate() {
        let model = load(&base);
        let (layers, n_blocks) = (model.layer_shapes(), model.layers.len());
        let (all, head_dim) = (model.config().blocks()[0], model.config().head_dim());
        let adapted: Vec<_> = layers
            .iter()
            .filter(|l| l.name.ends_with("q_proj") || l.name.ends_with("down_proj"))
            .cloned()
            .collect();
        // Fewer heads whose number divides the hidden size, as transformers requires of a Llama,
        // and fewer heads whose number does not.
        let of_groups = |n: usize| BlockDims {
            n_heads: all.n_heads / all.n_kv_heads * n,
            n_kv_heads: n,
            d_mlp: all.d_mlp * 2 / 3,
        };
        let groups = BTreeSet::from([all.n_kv_heads / 2, all.n_kv_heads - 1]);
        let mut heads = vec![all.n_heads];
        heads.extend(groups.iter().rev().map(|n| of_groups(*n).n_heads));
        let width = |names: &[&str], choices: &[usize]| {
            SearchSpace::groups_by_block(Elastic::Width, &layers, &[names], choices).unwrap()
        };
        let channels: Vec<usize> = heads.iter().map(|n| n * head_dim).collect();
        let blocks = (0..n_blocks)
            .rev()
            .map(|block| format!("model.layers.{block}"))
            .collect();
        let space = SearchSpace::per_layer(&adapted, &[8, 3])
            .unwrap()
            .with_groups(width(
                &["gate_proj", "up_proj"],
                &[all.d_mlp, all.d_mlp * 2 / 3],
            ))
            .unwrap()
            .with_groups(width(&["q_proj", "k_proj", "v_proj"], &channels))
            .unwrap()
            .with_groups([Group::of_kind(
                Elastic::Depth,
                "depth",
                blocks,
                vec![n_blocks, n_blocks - 1],
            )
            .unwrap()])
            .unwrap();
        let ids = random_ids(&model, 30, 71);
        let mut net = SuperNet::new(
            model,
            space,
            SuperNetConfig::new(LoraConfig::new(8).with_alpha(13.0)),
        )
        .unwrap();
        let sequences = ids
            .chunks(15)
            .map(|c| Sequence::unmasked(c.to_vec()))
            .collect();
        let config = TrainConfig {
            lr: 0.05,
            ..TrainConfig::new(2)
        };
        Trainer::new(config)
            .unwrap()
            .run(
                &mut net,
                &mut Batcher::new(sequences, 2, 0, 5).unwrap(),
                &[],
                &Silent,
            )
            .unwrap();
        for (n_kv_heads, depth) in groups
            .iter()
            .flat_map(|n| [(*n, n_blocks), (*n, n_blocks - 1)])
        {
            let fewer = of_groups(n_kv_heads);
            let mut subnet = net.minimal();
            for group in net
                .space()
                .groups_of_kind(Elastic::Width)
                .filter(|g| g.layers()[0].contains("self_attn"))
            {
                subnet.set(group.id(), fewer.n_heads * head_dim);
            }
            subnet.set("depth", depth);
            net.activate(&subnet).unwrap();
            let unmerged = logits(&net.eval_model(), &ids);
            let extracted = Merger::new()
                .with_mode(MergeMode::Dense)
                .extract(&net, &[], &Silent)
                .unwrap()
                .model;
            assert!(max_diff(&logits(&extracted, &ids), &unmerged) < 1e-4);
            let config = extracted.config();
            assert_eq!(config.blocks(), vec![fewer; depth]);
            assert_eq!(
                (config.sliding_window(), config.head_dim()),
                (None, head_dim)
            );
            assert!(!config.raw().contains_key("block_configs"));
            let folder = scratch
                .path()
                .join(format!("extracted-{which}-{n_kv_heads}-{depth}"));
            if config.hidden_size().is_multiple_of(fewer.n_heads) {
                assert_eq!(config.family(), Family::Llama);
                arguments.extend(write_checked(
                    &extracted,
                    &base,
                    &folder,
                    DType::F32,
                    u64::MAX,
                ));
                continue;
            }
            // The same model under another name, for which transformers uses another class of
            // tokenizers.
            assert_eq!(config.family(), Family::Mistral);
            let out = HfFolder::create(&folder, false).unwrap();
            out.write_model(config, DType::F32, extracted.tensors(DType::F32).unwrap())
                .unwrap();
            out.commit().unwrap();
            let vectors = folder.with_extension("safetensors");
            write_vectors(
                &vectors,
                &load(&folder),
                &random_ids(&extracted, 41, 72),
                Vec::new(),
                &BTreeMap::new(),
            );
            arguments.extend([folder, vectors]);
        }
    }
    run(python, "check_transformers.py", &arguments);
}

/// A random Llama whose blocks already differ in key/value heads and MLP width, with biases if
/// `bias`.
fn uneven_llama(bias: bool, seed: u64) -> Decoder {
    let config = HfConfig::new_llama(&LlamaDims {
        vocab_size: 300,
        hidden_size: 96,
        intermediate_size: 768,
        num_hidden_layers: 5,
        num_attention_heads: 6,
        num_key_value_heads: 6,
        max_position_embeddings: 128,
        rope_theta: 5e4,
        rms_norm_eps: 1e-5,
        tie_word_embeddings: bias,
        bos_token_id: Some(1),
        eos_token_id: Some(2),
        pad_token_id: None,
        dtype: DType::F32,
    });
    let mut raw = config.unwrap().raw().clone();
    raw.insert("attention_bias".into(), bias.into());
    raw.insert("mlp_bias".into(), bias.into());
    let config = HfConfig::from_json(raw).unwrap();
    let mut blocks = config.blocks().to_vec();
    for (block, n_kv_heads) in blocks.iter_mut().zip([3, 6, 2, 1, 3]) {
        block.n_kv_heads = n_kv_heads;
    }
    let config = config.with_blocks(&blocks).unwrap();
    assert_eq!(config.family(), Family::Deci);
    random_model(&config, seed)
}

/// A model of a configuration with random weights and biases that are large enough to matter.
fn random_model(config: &HfConfig, seed: u64) -> Decoder {
    let mut model = Decoder::init(config, seed, &Device::flex()).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    model
        .try_for_each_linear(|_, layer| {
            let [d_input, d_output] = layer.base.dims();
            let bound = (3.0 / d_input as f32).sqrt();
            let weight = Matrix::from_fn(d_output, d_input, |_, _| rng.random_range(-bound..bound));
            let biases: Vec<f32> = (0..d_output).map(|_| rng.random_range(-0.3..0.3)).collect();
            let biases = layer.base.bias.is_some().then_some(&biases[..]);
            layer.base = BaseLinear::from_matrix(&weight, biases, &Device::flex())?;
            Ok(())
        })
        .unwrap();
    model
}

/// Qwen2 with biases on some projections only, tied and untied, with an explicit head size.
#[test]
fn transformers_reads_qwen2() {
    let Some(python) = python() else { return };
    let scratch = tempfile::tempdir().unwrap();
    let mut arguments = Vec::new();
    for (tied, seed) in [(true, 91), (false, 92)] {
        let config = serde_json::json!({
            "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
            "vocab_size": 301, "hidden_size": 56, "intermediate_size": 99, "num_hidden_layers": 3,
            "num_attention_heads": 7, "num_key_value_heads": 1, "max_position_embeddings": 128,
            "rope_theta": 1e6, "rms_norm_eps": 1e-6, "tie_word_embeddings": tied,
            "use_sliding_window": false, "torch_dtype": "float32",
        });
        let serde_json::Value::Object(config) = config else {
            unreachable!()
        };
        let model = random_model(&HfConfig::from_json(config).unwrap(), seed);
        let folder = scratch.path().join(format!("qwen2-{tied}"));
        let writer = HfFolder::create(&folder, false).unwrap();
        let tensors = model.tensors(DType::F32).unwrap();
        writer
            .write_model(model.config(), DType::F32, tensors)
            .unwrap();
        writer.commit().unwrap();
        let vectors = folder.with_extension("safetensors");
        let ids = random_ids(&model, 41, seed);
        write_vectors(&vectors, &load(&folder), &ids, Vec::new(), &BTreeMap::new());
        arguments.extend([folder, vectors]);
    }
    run(python, "check_transformers.py", &arguments);
}

/// DeciLM's form, which llama.cpp converts and runs: uneven MLPs, uneven key/value heads, one block
/// without attention, and one without an MLP. Runs if `ELASTIC_LORA_LLAMA_CPP` is the path of
/// llama.cpp's sources and Python has `llama_cpp`.
#[test]
fn llama_cpp_reads_extracted_models_whose_blocks_differ() {
    let Some(python) = python() else { return };
    let Some(sources) = std::env::var_os("ELASTIC_LORA_LLAMA_CPP").map(PathBuf::from) else {
        eprintln!("skipped: no sources of llama.cpp (name them in ELASTIC_LORA_LLAMA_CPP)");
        return;
    };
    let scratch = tempfile::tempdir().unwrap();
    let mut arguments = vec![sources];
    for (bias, seed) in [(false, 81), (true, 82)] {
        let model = uneven_llama(bias, seed);
        let layers = model.layer_shapes();
        let parts = ["model.layers.1.mlp", "model.layers.3.self_attn"]
            .map(String::from)
            .to_vec();
        let space = SearchSpace::per_layer(&layers, &[8, 3])
            .unwrap()
            .with_groups(
                SearchSpace::groups_by_block(
                    Elastic::Width,
                    &layers,
                    &[&["gate_proj", "up_proj"]],
                    &[768, 512, 256],
                )
                .unwrap(),
            )
            .unwrap()
            .with_groups([Group::of_kind(Elastic::Depth, "depth", parts, vec![2, 1, 0]).unwrap()])
            .unwrap();
        let ids = random_ids(&model, 60, 83);
        let mut net = SuperNet::new(
            model,
            space,
            SuperNetConfig::new(LoraConfig::new(8).with_alpha(13.0)),
        )
        .unwrap();
        let sequences = ids
            .chunks(15)
            .map(|c| Sequence::unmasked(c.to_vec()))
            .collect();
        let config = TrainConfig {
            lr: 0.02,
            ..TrainConfig::new(2)
        };
        Trainer::new(config)
            .unwrap()
            .run(
                &mut net,
                &mut Batcher::new(sequences, 2, 0, 5).unwrap(),
                &[],
                &Silent,
            )
            .unwrap();
        for depth in [2, 1, 0] {
            let mut subnet = net.minimal();
            let groups: Vec<String> = net
                .space()
                .groups_of_kind(Elastic::Width)
                .map(|group| group.id().to_string())
                .collect();
            groups
                .iter()
                .zip([512, 768, 256, 256, 768])
                .for_each(|(group, width)| {
                    subnet.set(group, width);
                });
            subnet.set("depth", depth);
            net.activate(&subnet).unwrap();
            let merger = Merger::new().with_mode(MergeMode::Dense);
            let extracted = merger.extract(&net, &[], &Silent).unwrap().model;
            // A block without an MLP requires this crate's own form, unless the block gets an MLP
            // of zeros.
            assert_eq!(
                extracted.config().family(),
                if depth == 0 {
                    Family::ElasticLlama
                } else {
                    Family::Deci
                }
            );
            let filled = merger
                .with_zero_mlps(true)
                .extract(&net, &[], &Silent)
                .unwrap()
                .model;
            assert_eq!(filled.config().family(), Family::Deci);
            assert!(max_diff(&logits(&filled, &ids), &logits(&net.eval_model(), &ids)) < 1e-4);
            let folder = scratch.path().join(format!("deci-{bias}-{depth}"));
            let out = HfFolder::create(&folder, false).unwrap();
            out.write_model(
                filled.config(),
                DType::F32,
                filled.tensors(DType::F32).unwrap(),
            )
            .unwrap();
            out.commit().unwrap();
            let vectors = folder.with_extension("safetensors");
            write_vectors(&vectors, &load(&folder), &ids, Vec::new(), &BTreeMap::new());
            arguments.extend([folder, vectors]);
        }
    }
    run(python, "check_llama_cpp.py", &arguments);
}

/// A script that finds a difference must report it. Otherwise the tests above would always pass.
#[test]
fn the_scripts_can_fail() {
    let Some(python) = python() else { return };
    let scratch = tempfile::tempdir().unwrap();
    let base = scratch.path().join("tiny");
    write_tiny_llama(&base);
    let model = load(&base);
    let ids = random_ids(&model, 9, 51);
    let vectors = scratch.path().join("vectors.safetensors");
    let mut counts = zeros(&model);
    *counts.values_mut().next().unwrap() += 1;
    let metadata = BTreeMap::from([
        ("zeros".to_string(), serde_json::to_string(&counts).unwrap()),
        ("text".to_string(), TEXT.to_string()),
    ]);
    write_vectors(
        &vectors,
        &model,
        &ids,
        vec![ids_tensor("text_ids", &ids)],
        &metadata,
    );
    let script =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/interop/check_transformers.py");
    let output = Command::new(python)
        .args([&script, &base, &vectors])
        .env("HF_HUB_OFFLINE", "1")
        .output()
        .unwrap();
    let out = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{out}");
    for message in ["0 zeros, expected 1", "tokenizer: "] {
        assert!(out.contains(message), "{out}");
    }
}

#[test]
fn an_adapter_of_peft_gives_pefts_logits() {
    let (Some(dir), Some(folder)) = (
        shared("models/story-llama-0.6M"),
        shared("vectors/peft/q_v_r8"),
    ) else {
        return;
    };
    let adapter = LoraAdapter::open(&folder).unwrap();
    let vectors = Checkpoint::open(folder.join("reference.safetensors")).unwrap();
    let ids = load_i32(&vectors, "input_ids");
    let expected = vectors.load_f32("logits").unwrap();
    let expected_merged = vectors.load_f32("logits_merged").unwrap();

    let model = load(&dir);
    assert!(
        max_diff(&logits(&model, &ids), &expected) > 0.1,
        "an adapter that does nothing proves nothing"
    );
    let net = SuperNet::from_adapter(model.clone(), &adapter).unwrap();
    assert_eq!(net.extract_adapter().unwrap().layers, adapter.layers);
    let unmerged = max_diff(&logits(net.model(), &ids), &expected);

    // Merged in two ways: by the merger, and by a product of the factors in the file on the host.
    let by_merger = Merger::new().merge(&net, &[], &Silent).unwrap().model;
    let mut by_hand = model;
    by_hand
        .try_for_each_linear(|name, layer| {
            let Some(lora) = adapter.layers.get(name) else {
                return Ok(());
            };
            let mut weight = layer.base.to_matrix();
            let delta = lora.delta();
            weight
                .as_mut_slice()
                .iter_mut()
                .zip(delta.as_slice())
                .for_each(|(w, d)| *w += d);
            layer.base.set_matrix(&weight)
        })
        .unwrap();
    let q_proj = vectors.load_f32("merged_q_proj_l0").unwrap();
    let name = "model.layers.0.self_attn.q_proj";
    for merged in [&by_merger, &by_hand] {
        let difference = max_diff(&logits(merged, &ids), &expected_merged);
        let weight = merged.linear(name).unwrap().base.to_matrix();
        let weight_difference = max_diff(weight.as_slice(), &q_proj);
        eprintln!(
            "max abs diff unmerged {unmerged:.3e}, merged {difference:.3e}, weight {weight_difference:.3e}"
        );
        assert!(difference <= 1e-4 && weight_difference <= 1e-6);
    }
    assert!(unmerged <= 1e-4);
}

#[test]
fn an_adapter_for_another_model_is_refused() {
    let scratch = tempfile::tempdir().unwrap();
    let base = scratch.path().join("tiny");
    write_tiny_llama(&base);
    let net = trained(load(&base), LoraConfig::new(8));
    assert_eq!(net.active(), &net.maximal());
    assert_ne!(net.active(), &SubnetConfig::new());
    let folder = scratch.path().join("adapter");
    net.extract_adapter()
        .unwrap()
        .write(&folder, &PeftOptions::default())
        .unwrap();
    let mut read = LoraAdapter::open(&folder).unwrap();
    let ids = random_ids(net.model(), 17, 61);
    let again = SuperNet::from_adapter(load(&base), &read).unwrap();
    assert!(max_diff(&logits(again.model(), &ids), &logits(net.model(), &ids)) < 1e-6);
    let lora = read.layers.remove("model.layers.2.mlp.down_proj").unwrap();
    read.layers
        .insert("model.layers.3.mlp.down_proj".into(), lora);
    let error = SuperNet::from_adapter(load(&base), &read)
        .map(|_| ())
        .unwrap_err();
    assert!(
        matches!(&error, Error::UnknownLayer { layer, .. } if layer == "model.layers.3.mlp.down_proj"),
        "{error}"
    );
}

/// Every option that a config can have, each in a model of its own. Sequences are longer than the
/// windows and the original contexts.
#[test]
fn transformers_computes_the_same_for_every_variant_of_a_family() {
    let Some(python) = python() else { return };
    let scratch = tempfile::tempdir().unwrap();
    let common = serde_json::json!({
        "hidden_size": 48, "intermediate_size": 68, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 91, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
        "hidden_act": "silu", "tie_word_embeddings": true, "bos_token_id": 1, "eos_token_id": 2
    });
    let llama3 = serde_json::json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16
    });
    let mut llama3_new = llama3.clone();
    llama3_new["rope_theta"] = 500.0.into();
    let variants = [
        (
            "llama3 scaling, old spelling",
            "llama",
            serde_json::json!({"rope_theta": 500.0, "rope_scaling": llama3}),
        ),
        (
            "llama3 scaling, new spelling",
            "llama",
            serde_json::json!({"rope_parameters": llama3_new}),
        ),
        (
            "linear scaling, legacy name",
            "llama",
            serde_json::json!({"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 4.0}}),
        ),
        (
            "biases, untied head",
            "llama",
            serde_json::json!({
                "attention_bias": true, "mlp_bias": true, "tie_word_embeddings": false
            }),
        ),
        (
            "explicit head size",
            "llama",
            serde_json::json!({"head_dim": 20}),
        ),
        (
            "sliding window, wide heads",
            "mistral",
            serde_json::json!({"sliding_window": 7, "head_dim": 16}),
        ),
        (
            "no window",
            "mistral",
            serde_json::json!({"sliding_window": null, "tie_word_embeddings": false}),
        ),
    ];
    let mut arguments = Vec::new();
    for (index, (name, family, fields)) in variants.into_iter().enumerate() {
        let mut raw = common.as_object().unwrap().clone();
        let architecture = if family == "llama" {
            "LlamaForCausalLM"
        } else {
            "MistralForCausalLM"
        };
        raw.insert("model_type".into(), family.into());
        raw.insert("architectures".into(), serde_json::json!([architecture]));
        raw.extend(fields.as_object().unwrap().clone());
        let config = HfConfig::from_json(raw).unwrap();
        let mut model = Decoder::init(&config, 5 + index as u64, &Device::flex()).unwrap();
        let mut rng = ChaCha8Rng::seed_from_u64(index as u64);
        model
            .try_for_each_linear(|_, layer| {
                let [d_input, d_output] = layer.base.dims();
                let bound = (3.0 / d_input as f32).sqrt();
                let weight =
                    Matrix::from_fn(d_output, d_input, |_, _| rng.random_range(-bound..bound));
                let bias: Vec<f32> = (0..d_output).map(|_| rng.random_range(-0.5..0.5)).collect();
                let bias = layer.base.bias.is_some().then_some(bias.as_slice());
                layer.base = BaseLinear::from_matrix(&weight, bias, &Device::flex())?;
                Ok(())
            })
            .unwrap();
        let folder = scratch.path().join(format!("variant-{index}"));
        let out = HfFolder::create(&folder, false).unwrap();
        out.write_model(&config, DType::F32, model.tensors(DType::F32).unwrap())
            .unwrap();
        out.commit().unwrap();
        let ids = random_ids(&model, 60, 9);
        let vectors = folder.with_extension("safetensors");
        write_vectors(&vectors, &load(&folder), &ids, Vec::new(), &BTreeMap::new());
        eprintln!("{}: {name}", folder.display());
        arguments.extend([folder, vectors]);
    }
    run(python, "check_transformers.py", &arguments);
}
