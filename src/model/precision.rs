//! In which format the frozen weights are kept.

use std::collections::BTreeMap;

use burn::tensor::{FloatDType, Tensor};

use super::Decoder;
use crate::arch::Architecture;
use crate::error::{Error, Result};
use crate::format::{PackedMatrix, QuantizedMatrix};
use crate::io::DType;
use crate::nn::{BaseLinear, host_values};

impl Decoder {
    /// Stores linear layers, by Hugging Face's module path, as these quantized weights, packed; biases stay as they are. Where a layer
    /// held the same weights as floats, what the model computes stays the same but for the rounding of sums.
    ///
    /// # Errors
    /// [`Error::UnknownLayer`] for a layer that there is not, [`Error::HasAdapter`] for one with an adapter, whose mask is the old
    /// weight's; [`Error::ShapeMismatch`] for a weight of another shape.
    pub fn with_quantized(mut self, layers: &BTreeMap<String, QuantizedMatrix>) -> Result<Self> {
        for (name, weight) in layers {
            let unknown = || Error::UnknownLayer {
                context: "quantized layers".into(),
                layer: name.clone(),
            };
            let layer = self.linear_mut(name).ok_or_else(unknown)?;
            if layer.adapter.is_some() {
                return Err(Error::HasAdapter {
                    layer: name.clone(),
                    reason: "quantize before adapters are put on",
                });
            }
            layer.base = layer.base.replaced_quantized(PackedMatrix::new(weight))?;
        }
        Ok(self)
    }

    /// What the embedding, and with it every frozen weight, is stored as; see [`with_weight_dtype`](Self::with_weight_dtype).
    pub fn weight_dtype(&self) -> DType {
        match self.embed_tokens.val().dtype() {
            burn::tensor::DType::BF16 => DType::BF16,
            burn::tensor::DType::F16 => DType::F16,
            _ => DType::F32,
        }
    }

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
            _ => {
                return Err(Error::Unsupported {
                    what: format!("weights stored as {}", dtype.name()),
                });
            }
        };
        let device = self.device().without_autodiff();
        if !device.supports_dtype(target) {
            return Err(Error::Unsupported {
                what: format!("weights stored as {} on {device:?}", dtype.name()),
            });
        }
        let trained = |weight: &Tensor<2>| target != FloatDType::F32 && weight.is_require_grad();
        let check = |name: String, weight: &Tensor<2>| {
            if trained(weight) {
                return Err(Error::Unsupported {
                    what: format!("training `{name}` as {}", dtype.name()),
                });
            }
            let largest = f32::from(half::f16::MAX);
            if target == FloatDType::F16 && host_values(weight.clone().abs().max())[0] > largest {
                let values = host_values(weight.clone());
                let index = values
                    .iter()
                    .position(|value| value.abs() > largest)
                    .unwrap_or(0);
                return Err(Error::TensorOverflow {
                    tensor: name,
                    index,
                    value: values[index],
                    dtype: dtype.name(),
                });
            }
            Ok(())
        };
        check(Architecture::EMBEDDING.into(), &self.embed_tokens.val())?;
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
            model.embed_tokens = model
                .embed_tokens
                .map(|table| table.cast(target))
                .set_require_grad(false);
        }
        Ok(model)
    }
}
