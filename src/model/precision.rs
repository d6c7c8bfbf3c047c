//! The storage formats of the frozen weights.

use std::collections::BTreeMap;

use burn::tensor::{FloatDType, Tensor};

use super::Decoder;
use crate::arch::Architecture;
use crate::error::{Error, Result};
use crate::format::{PackedMatrix, QuantizedMatrix};
use crate::io::DType;
use crate::nn::{BaseLinear, host_values};

impl Decoder {
    /// Stores linear layers, named by Hugging Face's module path, as the given quantized weights,
    /// packed. Biases are kept. If a layer already held the same values as floats, the output
    /// changes only by the rounding of sums.
    ///
    /// # Errors
    /// Returns [`Error::UnknownLayer`] if there is no such layer, [`Error::HasAdapter`] if a layer
    /// has an adapter (its mask belongs to the old weight), and [`Error::ShapeMismatch`] for a
    /// weight of another shape.
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

    /// The dtype in which the embedding, and with it every frozen weight, is stored; see
    /// [`with_weight_dtype`](Self::with_weight_dtype).
    pub fn weight_dtype(&self) -> DType {
        match self.embed_tokens.val().dtype() {
            burn::tensor::DType::BF16 => DType::BF16,
            burn::tensor::DType::F16 => DType::F16,
            _ => DType::F32,
        }
    }

    /// Stores the frozen weights of the linear layers, the head and the embedding as `f32`, or
    /// rounded to nearest as bf16 or f16. Norms, biases, activations and adapters stay `f32`, and
    /// adapters train as before.
    ///
    /// A 16-bit dtype halves the memory of the model. A pruned weight stays zero, but f16 also
    /// turns weights below 6e-8 into zeros. Create SparsePEFT's adapters afterwards, since their
    /// masks are derived from the non-zero weights.
    ///
    /// # Errors
    /// Returns [`Error::Unsupported`] for any other dtype, or for a 16-bit one if the device does
    /// not support it or a weight is trainable, and [`Error::TensorOverflow`] if a weight is above
    /// 65504 in magnitude and `dtype` is f16.
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
