//! Builds a supernet from an adapter that was trained elsewhere.

use std::collections::BTreeMap;
use std::sync::Arc;

use burn::module::Module;

use super::cost::Nonzeros;
use super::{SuperNet, SuperNetConfig, shape};
use crate::adapter::{ElasticLora, LoraConfig};
use crate::error::{Error, Result};
use crate::io::peft::LoraAdapter;
use crate::model::Decoder;
use crate::space::{SearchSpace, SubnetConfig};

impl SuperNet {
    /// Puts a LoRA on `model`. Each layer keeps its own rank and scale, and the search space holds
    /// this one subnet.
    ///
    /// What the adapter changes besides is changed in the base: the part that PiSSA or OLoRA took
    /// from a weight, DoRA's norms of rows, embedding and head with their pairs, and modules that
    /// the adapter stores whole. The model may then have a larger vocabulary, and a head apart from
    /// its embedding. [`extract_adapter`](Self::extract_adapter) gives an adapter of this changed
    /// base.
    ///
    /// An adapter that was trained under the base's mask ([`LoraAdapter::sparse`]) is masked by the
    /// zeros of `model`, so `model` must be the pruned model that it was trained on.
    /// [`SuperNet::config`] reports the adapter's largest rank with that layer's alpha, and no
    /// dropout.
    ///
    /// # Errors
    /// Returns the errors of [`LoraAdapter::check`], [`Error::TensorShape`] if embedding and head
    /// do not get the same number of rows, [`Error::InvalidConfig`] if an initialization does not
    /// follow from the weights, [`Error::InvalidArgument`] for an adapter without layers,
    /// [`Error::HasAdapter`] if the model already has an adapter, and [`Error::Unsupported`] if the
    /// adapter was trained through a quantizer, a scale is not positive, or an initialization
    /// changes quantized weights.
    pub fn from_adapter(model: Decoder, adapter: &LoraAdapter) -> Result<Self> {
        if adapter.quantization_aware {
            return Err(Error::Unsupported {
                what: "an adapter with `quantization_aware` on a model that is not quantized"
                    .into(),
            });
        }
        if adapter.layers.is_empty() && adapter.changes.is_empty() {
            return Err(Error::argument(
                "adapter",
                "without layers",
                "at least one layer",
            ));
        }
        model.refuse_adapters("merge it first")?;
        let (model, mut pairs) = model.with_base_of(adapter)?;
        let nonzeros = Arc::new(Nonzeros::new(&model));
        let mut model = model.set_require_grad(false);
        let device = model.device();
        let mut groups = Vec::with_capacity(pairs.len());
        let mut largest: Option<LoraConfig> = None;
        // Uses the order of computation. The order of names differs from ten blocks on.
        for shape in model.layer_shapes() {
            let (Some(weights), Some(layer)) =
                (pairs.remove(&shape.name), model.linear_mut(&shape.name))
            else {
                continue;
            };
            let (rank, scale) = (weights.rank(), f64::from(weights.scale()));
            if scale <= 0.0 {
                return Err(Error::Unsupported {
                    what: format!("LoRA adapter, layer `{}`: scale {scale}", shape.name),
                });
            }
            // Exact: the product of a 24-bit scale and the rank fits an f64, and dividing gives the
            // scale back.
            let lora = LoraConfig::new(rank).with_alpha(scale * rank as f64);
            layer.adapter = Some(ElasticLora::from_factors(
                &lora,
                weights.a(),
                weights.b(),
                &device,
            )?);
            if adapter.sparse {
                layer.mask_by_base()?;
            }
            groups.extend_from_slice(SearchSpace::per_layer(&[shape], &[rank])?.groups());
            if largest.as_ref().is_none_or(|largest| rank > largest.rank) {
                largest = Some(lora);
            }
        }
        let lora = largest.unwrap_or_else(|| LoraConfig::new(1));
        let config = SuperNetConfig::new(lora).with_sparse_peft(adapter.sparse);
        let space = match groups.is_empty() {
            true => SearchSpace::single(),
            false => SearchSpace::new(groups)?,
        };
        let blocks = shape::full_dims(&model);
        let mut net = Self {
            model,
            space,
            config,
            active: SubnetConfig::new(),
            blocks,
            nonzeros,
            taken: BTreeMap::new(),
        };
        net.activate(&net.maximal())?;
        Ok(net)
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;
    use crate::io::hf::{HfConfig, HfFolder, LlamaDims};
    use crate::io::peft::{BaseInit, Stored};
    use crate::io::{Conversion, DType, FolderOptions, LoraWeights};
    use crate::linalg::{Matrix, without_principal};
    use crate::nn::host_values;

    /// A model with twelve blocks, so that the order of names differs from the order of blocks.
    fn model() -> Decoder {
        let dims = LlamaDims {
            vocab_size: 19,
            hidden_size: 12,
            intermediate_size: 10,
            num_hidden_layers: 12,
            num_attention_heads: 3,
            num_key_value_heads: 1,
            max_position_embeddings: 16,
            rope_theta: 1e4,
            rms_norm_eps: 1e-5,
            tie_word_embeddings: true,
            bos_token_id: None,
            eos_token_id: None,
            pad_token_id: None,
            dtype: DType::F32,
        };
        Decoder::init(&HfConfig::new_llama(&dims).unwrap(), 5, &Device::flex()).unwrap()
    }

    fn random(rows: usize, cols: usize, rng: &mut ChaCha8Rng) -> Matrix {
        Matrix::from_fn(rows, cols, |_, _| rng.random_range(-0.5..0.5))
    }

    /// An adapter whose rank and scale differ from layer to layer; alpha never equals the rank.
    fn adapter(model: &Decoder) -> LoraAdapter {
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let mut adapter = LoraAdapter::default();
        for (i, shape) in model
            .layer_shapes()
            .into_iter()
            .enumerate()
            .filter(|(i, _)| i % 5 == 2)
        {
            let rank = 1 + i % 4;
            let (a, b) = (
                random(rank, shape.d_input, &mut rng),
                random(shape.d_output, rank, &mut rng),
            );
            adapter.layers.insert(
                shape.name,
                LoraWeights::new(a, b, 0.1 + i as f32 / 7.0).unwrap(),
            );
        }
        adapter
    }

    #[test]
    fn extraction_gives_the_adapter_back() {
        let adapter = adapter(&model());
        let mut net = SuperNet::from_adapter(model(), &adapter).unwrap();
        assert_eq!(net.extract_adapter().unwrap(), adapter);
        assert_eq!(net.n_subnets(), 1.0);
        let ranks: Vec<usize> = adapter.layers.values().map(LoraWeights::rank).collect();
        assert_eq!(
            net.ranks(net.active())
                .unwrap()
                .into_values()
                .collect::<Vec<_>>(),
            ranks
        );
        let cost: usize = adapter
            .layers
            .values()
            .map(|w| w.rank() * (w.d_input() + w.d_output()))
            .sum();
        assert_eq!(
            net.cost(net.active()).unwrap().params,
            model().count_base_params().total + cost
        );
        assert_eq!(net.config().lora.rank, adapter.max_rank());
        // Groups follow the blocks.
        let order: Vec<String> = net
            .space()
            .groups()
            .iter()
            .map(|g| g.layers()[0].clone())
            .collect();
        let blocks: Vec<String> = model()
            .layer_shapes()
            .into_iter()
            .map(|s| s.name)
            .filter(|n| adapter.layers.contains_key(n))
            .collect();
        assert_eq!(order, blocks);
        let subnet = net.heuristic();
        net.activate(&subnet).unwrap();
        assert_eq!(net.extract_adapter().unwrap(), adapter);
    }

    /// Merging from file to file gives the weights that merging in memory gives.
    fn check_from_files(model: &Decoder, adapter: &LoraAdapter) {
        let scratch = tempfile::tempdir().unwrap();
        let (base, out) = (scratch.path().join("base"), scratch.path().join("merged"));
        let folder = HfFolder::create(&base, false).unwrap();
        let tensors = model.tensors(DType::F32).unwrap();
        folder
            .write_model(model.config(), DType::F32, tensors)
            .unwrap();
        folder.commit().unwrap();
        let conversion = Conversion::open(&base).unwrap();
        let options = FolderOptions::default().with_max_shard_bytes(4000);
        conversion
            .with_adapter(adapter)
            .unwrap()
            .write_folder(&out, &options, &crate::progress::Silent)
            .unwrap();
        let net = SuperNet::from_adapter(model.clone(), adapter).unwrap();
        let config = HfConfig::open(&out).unwrap();
        assert_eq!(
            config.arch().tensors(),
            net.model().config().arch().tensors()
        );
        let found = Decoder::load(
            &config,
            &crate::io::Checkpoint::open(&out).unwrap(),
            &Device::flex(),
        )
        .unwrap();
        let near = |what: &str, a: &[f32], b: &[f32]| {
            assert_eq!(a.len(), b.len(), "{what}");
            let off = a.iter().zip(b).map(|(a, b)| (a - b).abs());
            assert!(off.fold(0.0, f32::max) < 1e-5, "{what}");
        };
        for ((name, layer), (_, merged)) in found.linears().zip(net.model().linears()) {
            let (a, b) = (
                layer.base.to_matrix(),
                crate::nn::matrix_from_tensor(merged.merged_weight()),
            );
            near(&name, a.as_slice(), b.as_slice());
        }
        let vector =
            |weight: &burn::module::Param<burn::tensor::Tensor<1>>| host_values(weight.val());
        near(
            "final norm",
            &vector(&found.norm.weight),
            &vector(&net.model().norm.weight),
        );
        let table = |model: &Decoder| host_values(model.embed_tokens.val());
        near("embedding", &table(&found), &table(net.model()));
        let head = |model: &Decoder| model.lm_head.as_ref().map(|head| head.to_matrix());
        if let (Some(a), Some(b)) = (head(&found), head(net.model())) {
            near("head", a.as_slice(), b.as_slice());
        }
    }

    #[test]
    fn a_sparse_adapter_is_masked_by_the_models_zeros() {
        let mut model = model();
        let mut sparse = adapter(&model);
        sparse.sparse = true;
        let name = sparse.layers.keys().next().unwrap().clone();
        let mut weight = model.linear(&name).unwrap().base.to_matrix();
        weight
            .as_mut_slice()
            .iter_mut()
            .step_by(3)
            .for_each(|w| *w = 0.0);
        model
            .linear_mut(&name)
            .unwrap()
            .base
            .set_matrix(&weight)
            .unwrap();
        check_from_files(&model, &sparse);
        let net = SuperNet::from_adapter(model, &sparse).unwrap();
        assert!(net.config().sparse_peft);
        let merged =
            crate::nn::matrix_from_tensor(net.model().linear(&name).unwrap().merged_weight());
        let delta = sparse.layers[&name].delta();
        for i in 0..weight.rows() {
            for j in 0..weight.cols() {
                let w = weight.row(i)[j];
                let expected = if w == 0.0 { 0.0 } else { w + delta.row(i)[j] };
                assert!((merged.row(i)[j] - expected).abs() < 1e-6);
                assert_eq!(merged.row(i)[j] == 0.0, w == 0.0);
            }
        }
        assert!(matches!(
            net.extract_adapter(),
            Err(Error::Unsupported { .. })
        ));
    }

    #[test]
    fn what_an_adapter_changes_besides_is_changed_in_the_base() {
        let mut rng = ChaCha8Rng::seed_from_u64(8);
        let q = "model.layers.3.self_attn.q_proj";
        let mut changed = LoraAdapter::default();
        for (module, rows) in [(q, 12), ("lm_head", 19)] {
            let (a, b) = (random(3, 12, &mut rng), random(rows, 3, &mut rng));
            let pair = LoraWeights::new(a, b, 0.75).unwrap();
            changed.layers.insert(module.into(), pair);
        }
        let magnitudes: Vec<f32> = (0..12).map(|i| 0.5 + i as f32 / 8.0).collect();
        changed.changes.init = BaseInit::Pissa;
        changed.changes.magnitudes = [(q.to_string(), magnitudes.clone())].into();
        let gains: Vec<f32> = (0..12).map(|i| 1.5 - i as f32 / 9.0).collect();
        for name in ["model.norm.weight", "model.layers.7.input_layernorm.weight"] {
            let stored = Stored {
                shape: vec![12],
                values: gains.clone(),
            };
            changed.changes.copies.insert(name.into(), stored);
        }
        let before = model();
        check_from_files(&before, &changed);
        let net = SuperNet::from_adapter(before.clone(), &changed).unwrap();
        let after = net.model();
        let merged = crate::nn::matrix_from_tensor(after.linear(q).unwrap().merged_weight());
        let near = |a: &Matrix, b: &Matrix| {
            let pairs = a.as_slice().iter().zip(b.as_slice());
            assert!(
                pairs.clone().all(|(a, b)| (a - b).abs() < 1e-5),
                "{a:?} {b:?}"
            );
        };
        let sum = |base: Matrix, module: &str| {
            let delta = changed.layers[module].delta();
            Matrix::from_fn(base.rows(), base.cols(), |i, j| {
                base.row(i)[j] + delta.row(i)[j]
            })
        };
        let left = without_principal(&before.linear(q).unwrap().base.to_matrix(), 3).unwrap();
        let direction = sum(left, q);
        let norm = |i: usize| direction.row(i).iter().map(|v| v * v).sum::<f32>().sqrt();
        let expected =
            Matrix::from_fn(12, 12, |i, j| magnitudes[i] / norm(i) * direction.row(i)[j]);
        near(&merged, &expected);
        // PEFT takes the part of the head out of the matrix that embedding and head share.
        let table = Matrix::new(19, 12, host_values(before.embed_tokens.val())).unwrap();
        let left = without_principal(&table, 3).unwrap();
        let embedding = Matrix::new(19, 12, host_values(after.embed_tokens.val())).unwrap();
        near(&embedding, &left);
        let head = after.lm_head.as_ref().unwrap().to_matrix();
        near(&head, &sum(left, "lm_head"));
        assert!(!after.config().tie_word_embeddings());
        assert_eq!(host_values(after.norm.weight.val()), gains);
        let norm = after.layers[7]
            .norm(crate::arch::NormKind::Attention)
            .unwrap();
        assert_eq!(host_values(norm.weight.val()), gains);
        // A whole module alone is enough; a larger vocabulary is the config's too.
        let mut rows = LoraAdapter::default();
        let stored = Stored {
            shape: vec![23, 12],
            values: random(23, 12, &mut rng).into_vec(),
        };
        let name = "model.embed_tokens.weight".to_string();
        rows.changes.tensors = [(name.clone(), stored)].into();
        check_from_files(&model(), &rows);
        let net = SuperNet::from_adapter(model(), &rows).unwrap();
        assert_eq!(net.model().config().vocab_size(), 23);
        assert!(net.model().lm_head.is_none() && net.n_subnets() == 1.0);
        let unknown = |name: &str| {
            let mut adapter = rows.clone();
            let stored = adapter.changes.tensors.values().next().unwrap().clone();
            adapter.changes.tensors.insert(name.into(), stored);
            SuperNet::from_adapter(model(), &adapter)
                .map(|_| ())
                .unwrap_err()
                .to_string()
        };
        for name in ["score.weight", "model.norm.weight", &format!("{q}.bias")] {
            assert!(unknown(name).contains(name), "{}", unknown(name));
        }
    }

    #[test]
    fn what_does_not_fit_is_refused_by_name() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let good = adapter(&model());
        let named =
            |name: &str, d_input: usize, d_output: usize, scale: f32, rng: &mut ChaCha8Rng| {
                let weights =
                    LoraWeights::new(random(2, d_input, rng), random(d_output, 2, rng), scale)
                        .unwrap();
                LoraAdapter {
                    layers: [(name.to_string(), weights)].into(),
                    ..LoraAdapter::default()
                }
            };
        let q = "model.layers.11.self_attn.q_proj";
        let refused = |adapter: &LoraAdapter| {
            SuperNet::from_adapter(model(), adapter)
                .map(|_| ())
                .unwrap_err()
        };
        for (name, bad) in [
            ("block", "model.layers.12.self_attn.q_proj"),
            ("module", "model.vision.proj"),
        ] {
            let error = refused(&named(bad, 12, 12, 1.0, &mut rng));
            assert!(
                matches!(&error, Error::UnknownLayer { layer, .. } if layer == bad),
                "{name}: {error}"
            );
        }
        let error = refused(&named(q, 11, 12, 1.0, &mut rng));
        assert!(
            matches!(&error, Error::TensorShape { tensor, .. } if tensor.starts_with(q)),
            "{error}"
        );
        for scale in [0.0, -2.0] {
            let error = refused(&named(q, 12, 12, scale, &mut rng)).to_string();
            assert!(error.contains(q), "{error}");
        }
        let quantized = LoraAdapter {
            quantization_aware: true,
            ..good.clone()
        };
        assert!(
            refused(&quantized)
                .to_string()
                .contains("quantization_aware")
        );
        assert!(matches!(
            refused(&LoraAdapter::default()),
            Error::InvalidArgument {
                name: "adapter",
                ..
            }
        ));
        let adapted = SuperNet::from_adapter(model(), &good).unwrap().into_model();
        assert!(matches!(
            SuperNet::from_adapter(adapted, &good),
            Err(Error::HasAdapter { .. })
        ));
    }
}
