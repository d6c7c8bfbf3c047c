//! Bundles, models in one file: what was written is read back, and damaged files are rejected.

use crate::common::{random_ids, shared, tiny, tiny_dims, tiny_on};
use elastic_lora::adapter::LoraConfig;
use elastic_lora::data::{Batcher, Sequence};
use elastic_lora::format::WeightFormat;
use elastic_lora::io::HfConfig;
use elastic_lora::io::hf::LlamaDims;
use elastic_lora::progress::Silent;
use elastic_lora::runtime::{
    FormatPlan, GenerateConfig, Model, ModelOptions, Session, SessionConfig, Verify,
};
use elastic_lora::space::Elastic;
use elastic_lora::supernet::SuperNetConfig;
use elastic_lora::train::{TrainConfig, Trainer};
use elastic_lora::{Error, Result, SearchSpace, SuperNet};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tempfile::TempDir;

const INT4: WeightFormat = WeightFormat::Int {
    bits: 4,
    group_size: Some(8),
    symmetric: false,
};
const SPARSE_INT4: WeightFormat = WeightFormat::SparseInt4 {
    group_size: Some(8),
    symmetric: false,
};

fn options(verify: Verify) -> ModelOptions {
    ModelOptions::default()
        .with_n_threads(1)
        .with_verify(verify)
}

fn logits(model: &Model, subnet: usize) -> Result<Vec<f32>> {
    let mut session = Session::new(model, &SessionConfig::default())?;
    session.set_subnet(subnet)?;
    let (ids, mut logits) = (random_ids(7, 41, 3), vec![0.0; 7 * 41]);
    session.decode_all(&ids, &mut logits)?;
    Ok(logits)
}

/// A supernet with two named subnets. Its adapters are trained for a few steps.
fn net() -> SuperNet {
    let dims = LlamaDims {
        num_attention_heads: 6,
        num_key_value_heads: 3,
        ..tiny_dims(false)
    };
    let model = tiny_on(&dims, 4, &burn::tensor::Device::flex());
    let layers = model.layer_shapes();
    let widths = SearchSpace::groups_by_block(
        Elastic::Width,
        &layers,
        &[["gate_proj", "up_proj"]],
        &[37, 16],
    )
    .unwrap();
    let space = SearchSpace::grouped(&layers, &[["q_proj"], ["down_proj"]], &[4, 2]).unwrap();
    let config = SuperNetConfig::new(LoraConfig::new(4).with_alpha(6.0));
    let mut net = SuperNet::new(model, space.with_groups(widths).unwrap(), config).unwrap();
    let sequences = (0..4)
        .map(|seed| Sequence::unmasked(random_ids(12, 41, seed)))
        .collect();
    let config = TrainConfig {
        lr: 0.05,
        ..TrainConfig::new(4)
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

fn supernet(format: WeightFormat) -> Model {
    let net = net();
    let named = [("least", net.minimal()), ("middle", net.heuristic())]
        .map(|(name, config)| (name.into(), config));
    Model::from_supernet(&net, &named, format)
        .unwrap()
        .with_stop_ids(vec![2, 5])
}

#[test]
fn a_saved_model_is_the_model() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("model.elora");
    let plain = |format| Model::from_decoder(&tiny(true, 1), FormatPlan::new(format)).unwrap();
    let mut models: Vec<Model> = [
        WeightFormat::F32,
        WeightFormat::Bf16,
        WeightFormat::SparseF16,
        INT4,
        SPARSE_INT4,
    ]
    .map(plain)
    .to_vec();
    models.push(supernet(WeightFormat::F16));
    models.push(supernet(INT4));
    for model in models {
        model.save(&path, true).unwrap();
        for options in [
            options(Verify::OnUse),
            options(Verify::OnOpen).with_mmap(false),
            options(Verify::Never),
        ] {
            let opened = Model::open(&path, &options).unwrap();
            assert_eq!(opened.config(), model.config());
            assert_eq!(
                (opened.layers(), opened.subnets()),
                (model.layers(), model.subnets())
            );
            assert_eq!(
                (opened.space(), opened.stop_ids()),
                (model.space(), model.stop_ids())
            );
            for subnet in 0..model.subnets().len() {
                assert_eq!(
                    logits(&opened, subnet).unwrap(),
                    logits(&model, subnet).unwrap()
                );
            }
            opened.verify().unwrap();
            // Writing the bundle again gives the same file.
            let again = folder.path().join("again.elora");
            opened.save(&again, true).unwrap();
            assert_eq!(
                std::fs::read(&again).unwrap(),
                std::fs::read(&path).unwrap()
            );
        }
        let error = model.save(&path, false).unwrap_err();
        assert!(error.to_string().contains("model.elora"), "{error}");
    }
}

#[test]
fn the_tokenizer_and_the_stop_tokens_come_along() {
    let shipped = concat!(env!("CARGO_MANIFEST_DIR"), "/assets/arithmetic-llama");
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("arithmetic.elora");
    let model = Model::open(shipped, &ModelOptions::default()).unwrap();
    model
        .with_format(WeightFormat::F32)
        .unwrap()
        .save(&path, false)
        .unwrap();
    let bundle = Model::open(&path, &ModelOptions::default()).unwrap();
    let text = "Question: Mia has 23 shells and finds 18 more. How many shells does Mia have now?\nAnswer:";
    let answer = |model: &Model| {
        let tokenizer = model.tokenizer().unwrap();
        let ids = tokenizer.encode_prompt(text).unwrap();
        let config = GenerateConfig::new(40, model.stop_ids().to_vec());
        let output = Session::new(model, &SessionConfig::default())
            .unwrap()
            .generate(&ids, &config, |_| true)
            .unwrap();
        (
            ids,
            tokenizer.decode(&output).unwrap(),
            tokenizer.bos_id(),
            tokenizer.eos_id(),
        )
    };
    assert_eq!(answer(&bundle), answer(&model));
    assert!(answer(&model).1.contains("41"), "{:?}", answer(&model));
    assert!(!bundle.stop_ids().is_empty());
    // A decoder has no tokenizer until it is given a folder.
    let decoder = crate::common::load(shipped.as_ref());
    let made = Model::from_decoder(&decoder, WeightFormat::F32).unwrap();
    assert!(made.tokenizer().is_none());
    assert_eq!(
        answer(&made.with_tokenizer(shipped).unwrap()).1,
        answer(&model).1
    );
    if let Some(dir) = shared("models/story-llama-0.6M") {
        let story = Model::open(&dir, &ModelOptions::default()).unwrap();
        assert_eq!(story.config(), &HfConfig::open(&dir).unwrap());
        assert!(story.tokenizer().is_some());
    }
}

/// Returns the position of the data behind the header of a file, and the header.
fn header(bytes: &[u8]) -> (usize, serde_json::Value) {
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    (
        8 + length,
        serde_json::from_slice(&bytes[8..8 + length]).unwrap(),
    )
}

#[test]
fn a_changed_weight_is_named_when_it_is_used() {
    let folder = TempDir::new().unwrap();
    let (good, bad) = (
        folder.path().join("good.elora"),
        folder.path().join("bad.elora"),
    );
    supernet(INT4).save(&good, false).unwrap();
    let bytes = std::fs::read(&good).unwrap();
    let (start, header) = header(&bytes);
    let tensors = header
        .as_object()
        .unwrap()
        .iter()
        .filter(|(name, _)| *name != "__metadata__");
    for (tensor, info) in tensors {
        let at = start + info["data_offsets"][0].as_u64().unwrap() as usize;
        let mut changed = bytes.clone();
        changed[at] ^= 1;
        std::fs::write(&bad, changed).unwrap();
        let named = |error: Error| {
            assert!(
                error.to_string().contains(&format!("`{tensor}`")),
                "{tensor}: {error}"
            )
        };
        named(Model::open(&bad, &options(Verify::OnOpen)).unwrap_err());
        match Model::open(&bad, &options(Verify::OnUse)) {
            // Norms and texts are read when the file is opened.
            Err(error) => named(error),
            Ok(model) => {
                named(model.verify().unwrap_err());
                if !tensor.starts_with('~') {
                    let mut session = Session::new(&model, &SessionConfig::default()).unwrap();
                    let mut logits = vec![0.0; 41];
                    named(session.decode(&[1, 2], Some(&mut logits)).unwrap_err());
                    // The error stays, and nothing was appended.
                    named(session.decode(&[1], Some(&mut logits)).unwrap_err());
                    assert_eq!(session.position(), 0);
                }
            }
        }
        // Without checksums, the result is numbers or an error, and never anything worse.
        if let Ok(model) = Model::open(&bad, &options(Verify::Never)) {
            let _ = logits(&model, 0);
        }
    }
}

/// Returns a file with a changed index and a matching checksum.
fn lie(bytes: &[u8], change: impl FnOnce(&str) -> String) -> Vec<u8> {
    let (start, mut header) = header(bytes);
    let index = change(header["__metadata__"]["index"].as_str().unwrap());
    header["__metadata__"]["checksum"] = crc32fast::hash(index.as_bytes()).to_string().into();
    header["__metadata__"]["index"] = index.into();
    let mut text = serde_json::to_vec(&header).unwrap();
    text.resize((8 + text.len()).next_multiple_of(64) - 8, b' ');
    [
        &(text.len() as u64).to_le_bytes()[..],
        &text,
        &bytes[start..],
    ]
    .concat()
}

#[test]
fn one_lie_for_each_rule_of_the_model() {
    let folder = TempDir::new().unwrap();
    let (good, bad) = (
        folder.path().join("good.elora"),
        folder.path().join("bad.elora"),
    );
    supernet(WeightFormat::F16).save(&good, false).unwrap();
    let bytes = std::fs::read(&good).unwrap();
    let refused = |from: &str, to: &str| {
        let changed = lie(&bytes, |index| {
            assert!(index.contains(from), "{from} is not in {index}");
            index.replacen(from, to, 1)
        });
        std::fs::write(&bad, changed).unwrap();
        Model::open(&bad, &options(Verify::OnUse))
            .unwrap_err()
            .to_string()
    };
    for (from, to, message) in [
        (
            "\"hidden_size\":24",
            "\"hidden_size\":48",
            "input_layernorm.weight",
        ),
        (
            "\"num_hidden_layers\":2",
            "\"num_hidden_layers\":3",
            "model.layers.2",
        ),
        (
            "\"intermediate_size\":37",
            "\"intermediate_size\":36",
            "mlp.gate_proj.weight",
        ),
        (
            "\"tie_word_embeddings\":false",
            "\"tie_word_embeddings\":\"no\"",
            "tie_word_embeddings",
        ),
        (
            "\"model_type\":\"llama\"",
            "\"model_type\":\"lama\"",
            "lama",
        ),
        (
            "\"attention_bias\":false",
            "\"attention_bias\":true",
            "q_proj.bias",
        ),
        ("\"rank\":4", "\"rank\":3", "lora_A"),
        ("\"alpha\":6.0", "\"alpha\":-6.0", "alpha"),
        (
            "\"model.layers.0.mlp.down_proj\":{\"rank\"",
            "\"model.layers.9.mlp.down_proj\":{\"rank\"",
            "down_proj",
        ),
        ("\"choices\":[4,2]", "\"choices\":[5,2]", "rank"),
        ("\"choices\":[37,16]", "\"choices\":[99,16]", "99"),
        ("\"choices\":[4,2]", "\"choices\":[]", "choices"),
        ("\"name\":\"least\"", "\"name\":\"middle\"", "middle"),
        ("\"name\":\"least\"", "\"name\":\"\"", "subnets"),
        ("\"stop_ids\":", "\"stop_idss\":", "stop_idss"),
        ("\"f16\"", "\"f17\"", "f17"),
        ("\"f16\"", "\"bf16\"", "expected BF16"),
        ("\"rows\":", "\"rows\":1", "bytes of a weight"),
    ] {
        let error = refused(from, to);
        assert!(error.contains(message), "{from} -> {to}: {error}");
    }
}

/// Rounds of a test with mutations: `ELASTIC_LORA_MUTATIONS` if it is set.
fn rounds(usual: usize) -> usize {
    let given = std::env::var("ELASTIC_LORA_MUTATIONS").ok();
    given.and_then(|n| n.parse().ok()).unwrap_or(usual)
}

#[test]
fn no_mutation_crashes_or_computes_something_else() {
    let folder = TempDir::new().unwrap();
    let (good, bad) = (
        folder.path().join("good.elora"),
        folder.path().join("bad.elora"),
    );
    let mut rng = ChaCha8Rng::seed_from_u64(8);
    for format in [SPARSE_INT4, WeightFormat::SparseF16, INT4] {
        supernet(format).save(&good, true).unwrap();
        let bytes = std::fs::read(&good).unwrap();
        let (start, _) = header(&bytes);
        let want = logits(&Model::open(&good, &options(Verify::OnUse)).unwrap(), 1).unwrap();
        for case in 0..rounds(150) {
            let mut changed = bytes.clone();
            let at = rng.random_range(if case % 3 == 0 {
                0..start
            } else {
                start..bytes.len()
            });
            match case % 5 {
                0 => changed.truncate(at),
                1 => changed[at..]
                    .iter_mut()
                    .take(70)
                    .for_each(|byte| *byte = rng.random()),
                _ => changed[at] ^= 1 << rng.random_range(0..8),
            }
            std::fs::write(&bad, changed).unwrap();
            // Parts that are not used may be damaged; the used parts are correct.
            if let Ok(got) =
                Model::open(&bad, &options(Verify::OnUse)).and_then(|model| logits(&model, 1))
            {
                assert_eq!(got, want);
            }
            // Without checksums the numbers may be wrong, but no access is out of bounds.
            let _ = Model::open(&bad, &options(Verify::Never)).and_then(|model| logits(&model, 2));
        }
        // Changed indices with matching checksums: each time, a random number of the index is
        // changed.
        for _ in 0..rounds(250) {
            let changed = lie(&bytes, |index| {
                let digits: Vec<usize> = index
                    .char_indices()
                    .filter(|(_, c)| c.is_ascii_digit())
                    .map(|(at, _)| at)
                    .collect();
                let at = digits[rng.random_range(0..digits.len())];
                let end = at + index[at..].find(|c: char| !c.is_ascii_digit()).unwrap_or(0);
                let numbers = [
                    "0",
                    "1",
                    "2",
                    "3",
                    "7",
                    "64",
                    "65536",
                    "4294967296",
                    "18446744073709551615",
                    "-1",
                    "0.5",
                ];
                format!(
                    "{}{}{}",
                    &index[..at],
                    numbers[rng.random_range(0..numbers.len())],
                    &index[end..]
                )
            });
            std::fs::write(&bad, changed).unwrap();
            let _ = Model::open(&bad, &options(Verify::Never)).and_then(|model| logits(&model, 1));
        }
    }
}
