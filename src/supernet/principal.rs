//! Adapters that begin as parts of the weights (PiSSA, arXiv 2404.02948).

use super::SuperNet;
use crate::error::{Error, Result};
use crate::nn::mix_seed;
use crate::progress::{Progress, Task};

impl SuperNet {
    /// Moves the principal part of each adapted weight into its adapter: the part in as many of the
    /// largest singular values as the smallest rank of the layer has; see
    /// [`ElasticLora::init_from_principal`](crate::adapter::ElasticLora::init_from_principal). The
    /// model computes the same as before at each rank, and its zeros stay zeros. Optional; call it
    /// before training.
    ///
    /// # Errors
    /// Returns [`Error::Unsupported`] for a weight with zeros and an adapter without a mask: what
    /// is left of the weight would not be sparse; and for a quantized weight, which cannot hold what
    /// is left. Returns [`Error::InvalidState`] for a second call, [`Error::Interrupted`], and the
    /// errors of
    /// [`ElasticLora::init_from_principal`](crate::adapter::ElasticLora::init_from_principal). The
    /// supernet is then unchanged.
    pub fn init_from_principal(&mut self, progress: &dyn Progress) -> Result<()> {
        let ranks = self.ranks(&self.minimal())?;
        let mut seed = mix_seed(self.config.seed, u64::MAX - 1);
        let (mut model, mut taken) = (self.model.clone(), self.taken.clone());
        let mut task = Task::begin(progress, "begin adapters", ranks.len(), "layers")?;
        model.try_for_each_linear(|name, layer| {
            let Some(adapter) = &mut layer.adapter else {
                return Ok(());
            };
            if layer.base.stored_matrix().is_some() {
                return Err(Error::Unsupported {
                    what: format!("taking the principal part of `{name}`, whose weight is packed,"),
                });
            }
            let weight = layer.base.to_matrix();
            let lost = weight.count_zeros();
            if lost > 0 && !adapter.is_masked() {
                return Err(Error::Unsupported {
                    what: format!(
                        "taking the principal part of `{name}`, which would fill {lost} zeros of \
                         the weight (give its adapter a mask, `sparse_peft`),"
                    ),
                });
            }
            seed = mix_seed(seed, 1);
            let rank = ranks.get(name).copied().unwrap_or(adapter.max_rank());
            let (left, first) = adapter.init_from_principal(&weight, rank, seed)?;
            layer.base.set_matrix(&left)?;
            if taken.insert(name.into(), first).is_some() {
                return Err(Error::InvalidState {
                    what: "taking the principal part of weights",
                    reason: format!("it was taken of `{name}` before"),
                });
            }
            task.step("")
        })?;
        drop(task);
        (self.model, self.taken) = (model, taken);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::Device;

    use super::*;
    use crate::io::DType;
    use crate::io::hf::{HfConfig, LlamaDims};
    use crate::linalg::Matrix;
    use crate::model::Decoder;
    use crate::nn::{host_values, matrix_from_tensor};
    use crate::progress::Silent;
    use crate::space::{LoraConfig, ScaleRule, SearchSpace};
    use crate::supernet::SuperNetConfig;

    fn model() -> Decoder {
        let dims = LlamaDims {
            vocab_size: 19,
            hidden_size: 12,
            intermediate_size: 10,
            num_hidden_layers: 2,
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
        let mut model =
            Decoder::init(&HfConfig::new_llama(&dims).unwrap(), 5, &Device::flex()).unwrap();
        // Larger weights, so that the layers matter.
        model
            .try_for_each_linear(|_, layer| {
                let mut weight = layer.base.to_matrix();
                weight.as_mut_slice().iter_mut().for_each(|w| *w *= 20.0);
                layer.base.set_matrix(&weight)
            })
            .unwrap();
        model
    }

    fn pruned() -> Decoder {
        let mut model = model();
        model
            .try_for_each_linear(|_, layer| {
                let mut weight = layer.base.to_matrix();
                let values = weight.as_mut_slice().iter_mut().enumerate();
                values
                    .filter(|(i, _)| i % 3 == 1)
                    .for_each(|(_, w)| *w = 0.0);
                layer.base.set_matrix(&weight)
            })
            .unwrap();
        model
    }

    fn net(model: Decoder, masked: bool, lora: LoraConfig) -> SuperNet {
        let space = SearchSpace::per_layer(&model.layer_shapes(), &[5, 3]).unwrap();
        let config = SuperNetConfig::new(lora).with_sparse_peft(masked);
        SuperNet::new(model, space, config).unwrap()
    }

    fn lora() -> LoraConfig {
        LoraConfig::new(5).with_alpha(12.0)
    }

    fn logits(model: &Decoder) -> Vec<f32> {
        let ids: Vec<u32> = (0..11).map(|i| (i * 5 + 2) % 19).collect();
        host_values(model.forward(model.tokens(&ids, 1).unwrap()))
    }

    fn near(a: &[f32], b: &[f32]) {
        let off = a
            .iter()
            .zip(b)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f32::max);
        assert!(off < 1e-4, "off by {off}");
    }

    #[test]
    fn the_model_is_the_same_at_each_rank_and_keeps_its_zeros() {
        for (before, masked) in [(model(), false), (pruned(), true)] {
            let mut net = net(before.clone(), masked, lora());
            net.init_from_principal(&Silent).unwrap();
            for subnet in [net.maximal(), net.minimal()] {
                net.activate(&subnet).unwrap();
                near(&logits(net.model()), &logits(&before));
            }
            for (name, layer) in net.model().linears() {
                let old = before.linear(&name).unwrap().base.to_matrix();
                let (new, merged) = (
                    layer.base.to_matrix(),
                    matrix_from_tensor(layer.merged_weight()),
                );
                let zeros =
                    |m: &Matrix| -> Vec<bool> { m.as_slice().iter().map(|w| *w == 0.0).collect() };
                assert_eq!(zeros(&new), zeros(&old), "{name}");
                assert_eq!(zeros(&merged), zeros(&old), "{name}");
                // Without a mask, what is left is smaller by the largest singular values.
                let square = |m: &Matrix| m.as_slice().iter().map(|w| w * w).sum::<f32>();
                assert!(square(&new) < 0.8 * square(&old), "{name}");
            }
        }
    }

    #[test]
    fn the_extracted_adapter_fits_the_model_from_before() {
        let before = model();
        let mut net = net(before.clone(), false, lora());
        net.init_from_principal(&Silent).unwrap();
        // As if trained.
        net.model
            .try_for_each_linear(|_, layer| {
                let adapter = layer.adapter.as_mut().unwrap();
                adapter.lora_b = adapter.lora_b.clone().map(|b| b * 1.5 + 0.01);
                Ok(())
            })
            .unwrap();
        for (subnet, rank) in [(net.maximal(), 5), (net.minimal(), 3)] {
            net.activate(&subnet).unwrap();
            let adapter = net.extract_adapter().unwrap();
            assert!(adapter.layers.values().all(|pair| pair.rank() == rank + 3));
            let again = SuperNet::from_adapter(before.clone(), &adapter).unwrap();
            near(&logits(again.model()), &logits(net.model()));
        }
        let off = logits(net.model());
        assert!(
            off.iter()
                .zip(logits(&before))
                .any(|(a, b)| (a - b).abs() > 0.01)
        );
    }

    #[test]
    fn what_cannot_be_is_refused_and_nothing_changes() {
        let before = pruned();
        let mut unmasked = net(before.clone(), false, lora());
        let error = unmasked.init_from_principal(&Silent).unwrap_err();
        assert!(error.to_string().contains("zeros"), "{error}");
        near(&logits(unmasked.model()), &logits(&before));
        let ruled = lora().with_scale_rule(ScaleRule::AlphaOverRank);
        let error = net(model(), false, ruled)
            .init_from_principal(&Silent)
            .unwrap_err();
        assert!(error.to_string().contains("scale"), "{error}");
        let mut twice = net(model(), false, lora());
        twice.init_from_principal(&Silent).unwrap();
        assert!(matches!(
            twice.init_from_principal(&Silent),
            Err(Error::InvalidState { .. })
        ));
        near(&logits(twice.model()), &logits(&model()));
    }
}
