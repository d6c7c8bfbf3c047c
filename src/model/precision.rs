//! In which float format the frozen weights are kept.

use burn::tensor::{FloatDType, Tensor};

use super::Decoder;
use crate::error::{Error, Result};
use crate::io::{DType, HfConfig};
use crate::nn::{BaseLinear, host_values};

impl Decoder {
    /// Stores the frozen weights of the linear layers, the head and the embedding as bf16 or f16, rounded to nearest, or as
    /// `f32`. Norms and biases stay `f32`, and so do activations and adapters, which train as before.
    ///
    /// 16 bits halve the memory of the model. A weight that was pruned stays zero; with f16 one below 6e-8 becomes zero, so
    /// make SparsePEFT's adapters after this, since their masks are where weights are not zero.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for another format, or for 16 bits where the device lacks them or where a weight is being
    /// trained; [`Error::TensorOverflow`] for a weight over 65504 and f16.
    pub fn with_weight_dtype(self, dtype: DType) -> Result<Self> {
        let target = match dtype {
            DType::F32 => FloatDType::F32,
            DType::BF16 => FloatDType::BF16,
            DType::F16 => FloatDType::F16,
            _ => return Err(Error::Unsupported { what: format!("weights stored as {}", dtype.name()) }),
        };
        let device = self.device().without_autodiff();
        if !device.supports_dtype(target) {
            return Err(Error::Unsupported { what: format!("weights stored as {} on {device:?}", dtype.name()) });
        }
        let trained = |weight: &Tensor<2>| target != FloatDType::F32 && weight.is_require_grad();
        let check = |name: String, weight: &Tensor<2>| {
            if trained(weight) {
                return Err(Error::Unsupported { what: format!("training `{name}` as {}", dtype.name()) });
            }
            let largest = f32::from(half::f16::MAX);
            if target == FloatDType::F16 && host_values(weight.clone().abs().max())[0] > largest {
                let values = host_values(weight.clone());
                let index = values.iter().position(|value| value.abs() > largest).unwrap_or(0);
                return Err(Error::TensorOverflow { tensor: name, index, value: values[index], dtype: dtype.name() });
            }
            Ok(())
        };
        check(HfConfig::EMBEDDING.into(), &self.embed_tokens.val())?;
        for (name, layer) in self.linears() {
            check(format!("{name}.weight"), &layer.base.stored())?;
        }
        if let Some(head) = &self.lm_head {
            check("lm_head.weight".into(), &head.stored())?;
        }
        let mut model = self;
        let frozen = |base: BaseLinear| base.with_dtype(target);
        model.try_for_each_linear(|_, layer| {
            layer.base = frozen(layer.base.clone());
            Ok(())
        })?;
        model.lm_head = model.lm_head.map(frozen);
        let trained = model.embed_tokens.val().is_require_grad();
        if !trained {
            model.embed_tokens = model.embed_tokens.map(|table| table.cast(target)).set_require_grad(false);
        }
        Ok(model)
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use burn::module::Module;
    use burn::tensor::Device;

    use super::*;
    use crate::adapter::LoraConfig;
    use crate::io::hf::{HfConfig, LlamaDims};
    use crate::supernet::SuperNetConfig;
    use crate::{SearchSpace, SuperNet};

    fn model(tied: bool) -> Decoder {
        let config = HfConfig::new_llama(&LlamaDims {
            vocab_size: 37,
            hidden_size: 24,
            intermediate_size: 40,
            num_hidden_layers: 2,
            num_attention_heads: 4,
            num_key_value_heads: 2,
            max_position_embeddings: 32,
            rope_theta: 10_000.0,
            rms_norm_eps: 1e-5,
            tie_word_embeddings: tied,
            bos_token_id: None,
            eos_token_id: None,
            pad_token_id: None,
            dtype: DType::F32,
        });
        Decoder::init(&config.unwrap(), 3, &Device::flex()).unwrap()
    }

    /// Logits, and the adapters' gradients, of a model with adapters at a rank under the largest.
    fn run(model: Decoder) -> (Vec<f32>, Vec<Vec<f32>>) {
        let groups = [&["q_proj", "v_proj"][..], &["down_proj"]];
        let space = SearchSpace::grouped(&model.layer_shapes(), &groups, &[4, 3]);
        let config = SuperNetConfig::new(LoraConfig::new(4)).with_seed(5);
        let mut net = SuperNet::new(model, space.unwrap(), config).unwrap();
        net.activate(&net.minimal()).unwrap();
        let mut model = net.into_model().train();
        model
            .try_for_each_linear(|_, layer| {
                if let Some(adapter) = &mut layer.adapter {
                    adapter.lora_b = adapter.lora_b.clone().map(|b| {
                        Tensor::from_inner(b.inner() + adapter.lora_a.val().inner().sum().unsqueeze() * 0.1)
                            .require_grad()
                    });
                }
                Ok(())
            })
            .unwrap();
        let ids: Vec<u32> = (0..18).map(|i| i * 7 % 37).collect();
        let tokens = model.tokens(&ids, 2).unwrap();
        let targets: Vec<(usize, u32)> = (0..8).map(|i| (i, ids[i + 1])).collect();
        let gradients = model.nll_sum(tokens.clone(), &targets).unwrap().backward();
        let adapters = model.linears().filter_map(|(_, layer)| layer.adapter.as_ref());
        let gradients = adapters.map(|adapter| host_values(adapter.lora_a.val().grad(&gradients).unwrap())).collect();
        (host_values(model.forward(tokens).inner()), gradients)
    }

    #[test]
    fn a_model_of_16_bits_computes_with_its_rounded_weights() {
        for (tied, dtype) in [(true, DType::BF16), (false, DType::F16)] {
            let half = model(tied).with_weight_dtype(dtype).unwrap();
            assert_eq!(half.count_base_params(), model(tied).count_base_params());
            // The same values as f32.
            let wide = half.clone().with_weight_dtype(DType::F32).unwrap();
            assert_ne!(host_values(wide.embed_tokens.val()), host_values(model(tied).embed_tokens.val()));
            let ((logits, gradients), (want, want_gradients)) = (run(half), run(wide));
            let close = |got: &[f32], want: &[f32]| {
                let size = want.iter().fold(1e-6_f32, |size, x| size.max(x.abs()));
                got.iter().zip(want).all(|(got, want)| (got - want).abs() <= 1e-5 * size)
            };
            assert!(close(&logits, &want));
            assert!(gradients.iter().zip(&want_gradients).all(|(got, want)| close(got, want)));
            assert!(gradients.iter().all(|gradient| gradient.iter().any(|x| *x != 0.0)));
        }
    }

    #[test]
    fn merging_into_16_bits_loses_nothing() {
        let half = model(false).with_weight_dtype(DType::BF16).unwrap();
        let space = SearchSpace::grouped(&half.layer_shapes(), &[&["q_proj"], &["down_proj"]], &[4, 3]).unwrap();
        let config = SuperNetConfig::new(LoraConfig::new(4)).with_sparse_peft(true);
        let mut net = SuperNet::new(half, space, config).unwrap();
        let mut random = |_: &str, layer: &mut crate::ElasticLoraLinear| {
            if let Some(adapter) = &mut layer.adapter {
                adapter.lora_b = adapter.lora_b.clone().map(|b| b.random_like(burn::tensor::Distribution::Default));
            }
            Ok(())
        };
        net.model_mut().try_for_each_linear(&mut random).unwrap();
        net.activate(&net.minimal()).unwrap();
        let merged = crate::Merger::new().merge(&net, &[vec![1, 5, 9, 2]]).unwrap();
        assert_eq!((merged.report.layers.len(), merged.report.zeros_lost), (4, 0));
        assert_eq!(merged.report.max_logit_difference, Some(0.0));
    }

    #[test]
    fn what_cannot_be_stored_is_refused() {
        assert!(matches!(model(true).with_weight_dtype(DType::I32), Err(Error::Unsupported { .. })));
        let trained = SuperNet::dense(model(true)).unwrap().into_model().train();
        assert!(matches!(trained.with_weight_dtype(DType::BF16), Err(Error::Unsupported { .. })));
        let half = model(true).with_weight_dtype(DType::BF16).unwrap();
        let sequences = vec![crate::data::Sequence::unmasked(vec![1, 2, 3])];
        let mut batches = crate::data::Batcher::new(sequences, 1, 0, 0).unwrap();
        let trainer = crate::train::Trainer::new(crate::train::TrainConfig::new(1)).unwrap();
        let error = trainer.run(&mut SuperNet::dense(half).unwrap(), &mut batches, &[]).unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }));
        let mut large = model(true);
        let layer = large.linear_mut("model.layers.1.mlp.up_proj").unwrap();
        let mut weight = layer.base.to_matrix();
        weight.row_mut(3)[2] = -7e4;
        layer.base.set_matrix(&weight).unwrap();
        assert!(large.clone().with_weight_dtype(DType::BF16).is_ok());
        let error = large.with_weight_dtype(DType::F16).unwrap_err();
        assert!(
            matches!(&error, Error::TensorOverflow { tensor, value, .. } if tensor.contains("up_proj") && *value == -7e4)
        );
    }
}
