//! The runtime computes the same as the decoder: every family and format, with and without a cache,
//! and real models.

use std::sync::atomic::{AtomicBool, Ordering};

use crate::common::runtime::{F32, agrees, full, in_pieces, largest, llama, session};
use crate::common::{
    load, load_i32, max_diff, random_ids, shared, tiny, tiny_dims, tiny_mistral, tiny_on,
};
use burn::module::Param;
use burn::tensor::{Device, Tensor, TensorData};
use elastic_lora::Error;
use elastic_lora::arch::BlockDims;
use elastic_lora::format::{PackedMatrix, WeightFormat};
use elastic_lora::io::hf::{HfFolder, LlamaDims};
use elastic_lora::io::{Checkpoint, DType, HfConfig, QuantFormat};
use elastic_lora::kernels::Activations;
use elastic_lora::linalg::Matrix;
use elastic_lora::model::Decoder;
use elastic_lora::model::DeviceSession;
use elastic_lora::nn::{BaseLinear, host_values};
use elastic_lora::quant::{GridConfig, ScaleDtype, round_to_nearest};
use elastic_lora::runtime::{
    CacheFormat, FormatPlan, GenerateConfig, Model, ModelOptions, SampleConfig, Session,
    SessionConfig,
};

/// The models of the tests: all families, tied and untied, with biases, windows, rotary scalings,
/// and blocks that differ or lack a sub-block.
fn models() -> Vec<(&'static str, Decoder)> {
    let dims = tiny_dims(false);
    let long = LlamaDims {
        max_position_embeddings: 300,
        ..tiny_dims(true)
    };
    let one = LlamaDims {
        num_key_value_heads: 1,
        hidden_size: 20,
        num_attention_heads: 5,
        ..dims.clone()
    };
    let wide = LlamaDims {
        hidden_size: 160,
        num_attention_heads: 4,
        num_key_value_heads: 4,
        ..dims.clone()
    };
    let blocks = [
        BlockDims {
            n_heads: 6,
            n_kv_heads: 2,
            d_mlp: 11,
        },
        BlockDims {
            n_heads: 0,
            n_kv_heads: 0,
            d_mlp: 37,
        },
        BlockDims {
            n_heads: 2,
            n_kv_heads: 2,
            d_mlp: 0,
        },
    ];
    let uneven = HfConfig::new_llama(&dims)
        .unwrap()
        .with_blocks(&blocks)
        .unwrap();
    let uneven = serde_json::Value::Object(uneven.raw().clone());
    let llama3 = serde_json::json!({"rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }, "rope_theta": 100.0});
    let none = serde_json::json!({});
    vec![
        ("tied", tiny(true, 1)),
        ("untied", tiny(false, 2)),
        ("mistral, window 5", tiny_mistral(Some(5), 3)),
        ("mistral, no window", tiny_mistral(None, 4)),
        (
            "biases",
            llama(
                &dims,
                serde_json::json!({"attention_bias": true, "mlp_bias": true}),
                5,
            ),
        ),
        ("llama3 rope", llama(&long, llama3, 6)),
        (
            "linear rope",
            llama(
                &dims,
                serde_json::json!({"rope_scaling": {"type": "linear", "factor": 2.0}}),
                7,
            ),
        ),
        (
            "head_dim apart",
            llama(&dims, serde_json::json!({"head_dim": 34}), 8),
        ),
        ("uneven blocks", llama(&dims, uneven, 9)),
        ("one key/value head", llama(&one, none.clone(), 10)),
        ("heads of 40", llama(&wide, none, 11)),
    ]
}

#[test]
fn logits_are_the_decoders_for_every_family() {
    for (name, decoder) in models() {
        let model = Model::from_decoder(&decoder, F32).unwrap();
        agrees(
            &decoder,
            &mut session(&model),
            &random_ids(29, 41, 7),
            1e-4,
            name,
        );
        let small = SessionConfig::default().with_prefill_rows(4).with_n_ctx(31);
        let mut small = Session::new(&model, &small).unwrap();
        agrees(&decoder, &mut small, &random_ids(29, 41, 7), 1e-4, name);
        let half = SessionConfig::default().with_cache(CacheFormat::F16);
        agrees(
            &decoder,
            &mut Session::new(&model, &half).unwrap(),
            &random_ids(29, 41, 7),
            4e-3,
            name,
        );
    }
}

#[test]
fn contexts_of_many_tiles_are_the_decoders() {
    let dims = LlamaDims {
        max_position_embeddings: 700,
        ..tiny_dims(false)
    };
    let llama = tiny_on(&dims, 3, &Device::flex());
    let mut mistral = llama.config().raw().clone();
    mistral.insert("model_type".into(), "mistral".into());
    mistral.insert(
        "architectures".into(),
        serde_json::json!(["MistralForCausalLM"]),
    );
    mistral.insert("sliding_window".into(), 70.into());
    let mistral =
        Decoder::init(&HfConfig::from_json(mistral).unwrap(), 4, &Device::flex()).unwrap();
    for decoder in [llama, mistral] {
        let ids = random_ids(611, 41, 1);
        let want = full(&decoder, &ids);
        for threads in [1, 2, 5] {
            let model = Model::from_decoder(&decoder, F32)
                .unwrap()
                .with_n_threads(threads)
                .unwrap();
            let mut session = session(&model);
            let got = in_pieces(&mut session, &ids, &[300, 63, 1, 1, 200]);
            let off = max_diff(&got, &want) / largest(&want);
            assert!(off < 1e-4, "{threads} threads: off by {off}");
            // Discarded tokens are overwritten.
            session.truncate(65);
            let again = in_pieces(&mut session, &ids[65..], &[7, 400]);
            assert!(max_diff(&again, &want[65 * 41..]) / largest(&want) < 1e-4);
        }
    }
}

/// Returns the decoder with the numbers that the model stores.
fn as_stored(decoder: &Decoder, model: &Model) -> Decoder {
    let mut decoder = decoder.clone();
    let device = Device::flex();
    decoder
        .try_for_each_linear(|name, layer| {
            layer
                .base
                .set_matrix(&model.weight(model.layer_index(name).unwrap())?.to_matrix())
        })
        .unwrap();
    if let Some(head) = &mut decoder.lm_head {
        head.set_matrix(
            &model
                .weight(model.layer_index("lm_head").unwrap())
                .unwrap()
                .to_matrix(),
        )
        .unwrap();
    }
    let table = model.embedding().unwrap().to_matrix();
    let shape = [table.rows(), table.cols()];
    decoder.embed_tokens = Param::from_tensor(Tensor::from_data(
        TensorData::new(table.into_vec(), shape),
        &device,
    ));
    decoder
}

fn formats() -> Vec<WeightFormat> {
    use WeightFormat as F;
    vec![
        F::F16,
        F::Bf16,
        F::SparseF16,
        F::SparseBf16,
        F::NmF16 { n: 4, m: 4 },
        F::Int {
            bits: 4,
            group_size: Some(8),
            symmetric: false,
        },
        F::Int {
            bits: 4,
            group_size: Some(5),
            symmetric: true,
        },
        F::Int {
            bits: 8,
            group_size: None,
            symmetric: false,
        },
        F::Int {
            bits: 3,
            group_size: Some(16),
            symmetric: false,
        },
        F::SparseInt4 {
            group_size: Some(8),
            symmetric: false,
        },
        F::SparseInt4 {
            group_size: None,
            symmetric: true,
        },
    ]
}

#[test]
fn every_format_gives_what_a_decoder_with_its_numbers_does() {
    let mut decoder = llama(
        &tiny_dims(false),
        serde_json::json!({"attention_bias": true}),
        12,
    );
    decoder
        .try_for_each_linear(|_, layer| {
            let mut weight = layer.base.to_matrix();
            weight
                .as_mut_slice()
                .iter_mut()
                .step_by(3)
                .for_each(|w| *w = 0.0);
            layer.base.set_matrix(&weight)
        })
        .unwrap();
    let ids = random_ids(17, 41, 3);
    for format in formats() {
        for plan in [
            FormatPlan::new(format),
            FormatPlan::new(format)
                .with_head(format)
                .with_embedding(format),
        ] {
            let model = Model::from_decoder(&decoder, plan).unwrap();
            let rounded = as_stored(&decoder, &model);
            let tolerance = if matches!(
                format,
                WeightFormat::Int { .. } | WeightFormat::SparseInt4 { .. }
            ) {
                5e-4 // activations of 16 bits
            } else {
                1e-4
            };
            agrees(
                &rounded,
                &mut session(&model),
                &ids,
                tolerance,
                &format!("{format:?}"),
            );
        }
    }
}

#[test]
fn formats_turn_into_each_other_exactly_or_not_at_all() {
    use WeightFormat as F;
    let decoder = tiny(false, 2);
    let codes = F::Int {
        bits: 4,
        group_size: Some(8),
        symmetric: false,
    };
    let sparse = F::SparseInt4 {
        group_size: Some(8),
        symmetric: false,
    };
    let dense = Model::from_decoder(&decoder, codes).unwrap();
    let other = dense.with_format(sparse).unwrap();
    assert!(matches!(other.layers()[0].format, F::SparseInt4 { .. }));
    for layer in 0..dense.layers().len() {
        assert_eq!(
            dense.weight(layer).unwrap().to_matrix(),
            other.weight(layer).unwrap().to_matrix()
        );
    }
    let back = other.with_format(codes).unwrap();
    assert_eq!(back.weight(3).unwrap(), dense.weight(3).unwrap());
    // Codes keep their groups, and their number of bits or nothing.
    let int = |bits, group_size| F::Int {
        bits,
        group_size: Some(group_size),
        symmetric: false,
    };
    let kept = dense.with_format(int(4, 4)).unwrap();
    assert_eq!(kept.layers()[0].format, codes);
    assert_eq!(kept.weight(3).unwrap(), dense.weight(3).unwrap());
    let error = dense.with_format(int(8, 8)).unwrap_err();
    assert!(
        matches!(&error, Error::Unsupported { what } if what.contains("q_proj")),
        "{error}"
    );
    // More than 2 of 4 weights are not zero.
    let error = Model::from_decoder(&decoder, F::NmF16 { n: 2, m: 4 }).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("model.layers.0.self_attn.q_proj"),
        "{error}"
    );
    let wide = dense.with_format(F32).unwrap();
    assert_eq!(
        wide.weight(2).unwrap().to_matrix(),
        dense.weight(2).unwrap().to_matrix()
    );
}

#[test]
fn generation_is_the_decoders_and_stops_where_it_should() {
    for decoder in [tiny(true, 1), tiny(false, 2), tiny_mistral(Some(5), 3)] {
        let model = Model::from_decoder(&decoder, F32).unwrap();
        for sample in [
            SampleConfig::default(),
            SampleConfig {
                temperature: 1.3,
                top_k: 20,
                top_p: 0.9,
                min_p: 0.02,
                seed: 4,
                ..SampleConfig::default()
            },
        ] {
            let prompt = random_ids(6, 41, 2);
            let mut config = GenerateConfig {
                sample,
                ..GenerateConfig::new(1000, vec![])
            };
            let want = DeviceSession::new(&decoder)
                .generate(&prompt, &config, |_| true)
                .unwrap();
            let mut shown = Vec::new();
            let show = |token| {
                shown.push(token);
                true
            };
            let got = session(&model).generate(&prompt, &config, show).unwrap();
            // Generation up to the end of the context.
            assert_eq!((got.len(), &got, &shown), (35, &want, &want));
            config.stop_ids = vec![want[7]];
            let first = want.iter().position(|id| *id == want[7]).unwrap();
            assert_eq!(
                session(&model)
                    .generate(&prompt, &config, |_| true)
                    .unwrap(),
                want[..first]
            );
            config.stop_ids.clear();
            let stop = AtomicBool::new(false);
            let mut session = session(&model);
            let got = session
                .generate(&prompt, &config, |_| !stop.swap(true, Ordering::Relaxed))
                .unwrap();
            assert_eq!(got, want[..2]);
            config.max_new_tokens = 3;
            session.reset();
            assert_eq!(
                session.generate(&prompt, &config, |_| true).unwrap(),
                want[..3]
            );
            config.max_new_tokens = 0;
            session.reset();
            assert!(
                session
                    .generate(&prompt, &config, |_| true)
                    .unwrap()
                    .is_empty()
            );
        }
    }
}

#[test]
fn bad_input_is_refused_and_changes_nothing() {
    let model = Model::from_decoder(&tiny(true, 1), F32).unwrap();
    let with = |config: SessionConfig| Session::new(&model, &config);
    for bad in [
        SessionConfig::default().with_n_ctx(0),
        SessionConfig::default().with_n_ctx(41),
    ] {
        assert!(matches!(
            with(bad),
            Err(Error::InvalidArgument { name: "n_ctx", .. })
        ));
    }
    assert!(with(SessionConfig::default().with_prefill_rows(0)).is_err());
    let mut session = with(SessionConfig::default().with_n_ctx(12).with_prefill_rows(5)).unwrap();
    let mut logits = vec![0.0; 41];
    session.decode(&[1, 2, 3], Some(&mut logits)).unwrap();
    assert!(matches!(
        session.decode(&[], None),
        Err(Error::InvalidArgument { .. })
    ));
    assert!(matches!(
        session.decode(&[1, 41], None),
        Err(Error::TokenOutOfRange {
            found: 41,
            vocab_size: 41
        })
    ));
    assert!(matches!(
        session.decode(&[1; 10], None),
        Err(Error::SequenceTooLong {
            found: 13,
            max: 12,
            ..
        })
    ));
    assert!(matches!(
        session.decode(&[1], Some(&mut logits[1..])),
        Err(Error::ShapeMismatch { .. })
    ));
    assert!(matches!(
        session.decode_all(&[1, 2], &mut logits),
        Err(Error::ShapeMismatch { .. })
    ));
    assert!(
        session
            .generate(&[], &GenerateConfig::new(1, vec![]), |_| true)
            .is_err()
    );
    assert_eq!(session.position(), 3);
    session.decode(&[1; 9], None).unwrap();
    assert_eq!((session.position(), session.n_ctx()), (12, 12));
    session.reset();
    let mut again = vec![0.0; 41];
    session.decode(&[1, 2, 3], Some(&mut again)).unwrap();
    assert_eq!(again, logits);
}

#[test]
fn quantized_folders_run_with_the_codes_that_they_hold() {
    let dims = LlamaDims {
        hidden_size: 64,
        intermediate_size: 96,
        ..tiny_dims(false)
    };
    let mut decoder = llama(&dims, serde_json::json!({"attention_bias": true}), 21);
    // Smaller weights, so that no score is large enough to amplify the last bits of its inputs.
    decoder
        .try_for_each_linear(|_, layer| {
            let weight = layer.base.to_matrix();
            layer
                .base
                .set_matrix(&Matrix::from_fn(weight.rows(), weight.cols(), |i, j| {
                    0.4 * weight.row(i)[j]
                }))
        })
        .unwrap();
    let scratch = tempfile::TempDir::new().unwrap();
    for (format, symmetric) in [
        (QuantFormat::Gptq, false),
        (QuantFormat::GptqV2, false),
        (QuantFormat::CompressedTensors, true),
    ] {
        let grid = GridConfig::new(4)
            .with_group_size(Some(32))
            .with_symmetric(symmetric)
            .with_scale_dtype(ScaleDtype::F16)
            .with_zero_from_one(true);
        let quantize = |(name, layer): (String, &elastic_lora::ElasticLoraLinear)| {
            (
                name,
                round_to_nearest(&layer.base.to_matrix(), &grid, None).unwrap(),
            )
        };
        let layers = decoder.linears().map(quantize).collect();
        let path = scratch.path().join(format!("{format:?}"));
        let folder = HfFolder::create(&path, false).unwrap();
        let tensors = decoder.tensors(DType::F32).unwrap();
        folder
            .write_quantized(decoder.config(), DType::F32, tensors, &layers, format)
            .unwrap();
        folder.commit().unwrap();
        let model = Model::open(&path, &ModelOptions::default()).unwrap();
        assert!(matches!(
            model.layers()[0].format,
            WeightFormat::Int {
                bits: 4,
                group_size: Some(32),
                ..
            }
        ));
        let ids = random_ids(19, 41, 5);
        agrees(
            &load(&path),
            &mut session(&model),
            &ids,
            5e-4,
            &format!("{format:?}"),
        );
        let sparse = model
            .with_format(WeightFormat::SparseInt4 {
                group_size: Some(32),
                symmetric,
            })
            .unwrap();
        agrees(
            &load(&path),
            &mut session(&sparse),
            &ids,
            5e-4,
            &format!("{format:?}, sparse"),
        );
        // From a decoder whose weights stayed packed.
        let mut packed = decoder.clone();
        packed
            .try_for_each_linear(|name, layer| {
                let bias = layer.base.bias.as_ref().map(|bias| host_values(bias.val()));
                let codes = PackedMatrix::new(&layers[name]);
                layer.base = BaseLinear::from_quantized(codes, bias.as_deref(), &Device::flex())?;
                Ok(())
            })
            .unwrap();
        let made = Model::from_decoder(&packed, F32).unwrap();
        assert_eq!(made.weight(3).unwrap(), model.weight(3).unwrap());
        assert_eq!(
            in_pieces(&mut session(&made), &ids, &[9]),
            in_pieces(&mut session(&model), &ids, &[9])
        );
    }
}

#[test]
fn real_models_give_transformers_logits() {
    for name in ["stories260K", "story-llama-0.6M"] {
        let (Some(dir), Some(vectors)) = (
            shared(&format!("models/{name}")),
            shared(&format!("vectors/logits/{name}.safetensors")),
        ) else {
            return;
        };
        let vectors = Checkpoint::open(vectors).unwrap();
        let (ids, want) = (
            load_i32(&vectors, "input_ids"),
            vectors.load_f32("logits").unwrap(),
        );
        let model = Model::open(&dir, &ModelOptions::default()).unwrap();
        for pieces in [vec![ids.len()], vec![5]] {
            let got = in_pieces(&mut session(&model), &ids, &pieces);
            assert!(
                max_diff(&got, &want) < 1e-4,
                "{name}: {}",
                max_diff(&got, &want)
            );
        }
        let expected = load_i32(&vectors, "greedy_from_first4");
        let config = GenerateConfig::new(expected.len() - 4, vec![]);
        assert_eq!(
            session(&model)
                .generate(&ids[..4], &config, |_| true)
                .unwrap(),
            &expected[4..],
            "{name}"
        );
        // The error of rounding the inputs of integer weights, compared with the same weights in 32
        // bits.
        let format = WeightFormat::Int {
            bits: 4,
            group_size: Some(32),
            symmetric: false,
        };
        let int4 = model.with_format(format).unwrap();
        let exact = in_pieces(
            &mut session(&int4.with_format(F32).unwrap()),
            &ids,
            &[ids.len()],
        );
        for (activations, most) in [(Activations::Int16, 2e-4), (Activations::Int8, 5e-2)] {
            let config = SessionConfig::default().with_activations(activations);
            let got = in_pieces(
                &mut Session::new(&int4, &config).unwrap(),
                &ids,
                &[ids.len()],
            );
            let off = max_diff(&got, &exact) / largest(&exact);
            println!("{name}: {activations:?}: {off:.1e} of the largest logit");
            assert!(off < most, "{name}, {activations:?}: {off}");
        }
        // From the same file read as a whole, and from the decoder.
        let read = Model::open(&dir, &ModelOptions::default().with_mmap(false)).unwrap();
        let made = Model::from_decoder(&load(&dir), F32).unwrap();
        let mapped = in_pieces(&mut session(&model), &ids, &[ids.len()]);
        assert_eq!(in_pieces(&mut session(&read), &ids, &[ids.len()]), mapped);
        assert!(max_diff(&in_pieces(&mut session(&made), &ids, &[ids.len()]), &mapped) < 1e-4);
    }
}
