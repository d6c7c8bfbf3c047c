//! Reads and writes model folders with quantized linear layers.

use std::collections::BTreeMap;

use serde_json::Value;

use super::config::HfConfig;
use super::folder::HfFolder;
use crate::error::{Error, Result};
use crate::format::QuantizedMatrix;
use crate::io::quantized::{QuantFormat, QuantizationConfig};
use crate::io::tensors::{Checkpoint, DType, HostTensor};
use crate::linalg::Matrix;

impl HfConfig {
    /// Loads the codes of a layer, or returns `None` if the checkpoint holds it dense, or in GGUF
    /// blocks that codes cannot represent exactly.
    ///
    /// # Shapes
    /// - `shape`: `[d_output, d_input]` of the layer
    ///
    /// # Errors
    /// Returns the errors of [`QuantizationConfig::read_layer`] and
    /// [`Checkpoint::load_quantized`].
    pub fn load_quantized(
        &self,
        checkpoint: &Checkpoint,
        layer: &str,
        shape: [usize; 2],
    ) -> Result<Option<QuantizedMatrix>> {
        match self.quantization() {
            Some(config) if config.has_layer(checkpoint, layer) => {
                config.read_layer(checkpoint, layer, shape).map(Some)
            }
            _ => checkpoint.load_quantized(&format!("{layer}.weight"), shape),
        }
    }

    /// Loads the weight of a layer as `f32`, and dequantizes it if the checkpoint holds codes.
    ///
    /// # Shapes
    /// - `shape` and result: `[d_output, d_input]`
    ///
    /// # Errors
    /// Returns the errors of [`load_quantized`](Self::load_quantized) and
    /// [`Checkpoint::load_matrix`].
    pub fn load_linear(
        &self,
        checkpoint: &Checkpoint,
        layer: &str,
        shape: [usize; 2],
    ) -> Result<Matrix> {
        match self.load_quantized(checkpoint, layer, shape)? {
            Some(matrix) => Ok(matrix.dequantize()),
            None => checkpoint.load_matrix(&format!("{layer}.weight"), shape),
        }
    }

    /// Loads all quantized linear layers of the blocks by name. The result is empty for a dense
    /// checkpoint.
    ///
    /// # Errors
    /// Returns the errors of [`load_quantized`](Self::load_quantized).
    pub fn quantized_layers(
        &self,
        checkpoint: &Checkpoint,
    ) -> Result<BTreeMap<String, QuantizedMatrix>> {
        let mut layers = BTreeMap::new();
        for layer in self.arch().linears() {
            if let Some(matrix) =
                self.load_quantized(checkpoint, &layer.name, [layer.d_output, layer.d_input])?
            {
                layers.insert(layer.name, matrix);
            }
        }
        Ok(layers)
    }

    /// Returns whether the checkpoint holds the weight `name` as codes, and checks their tensors if
    /// it does.
    pub(super) fn check_quantized(
        &self,
        checkpoint: &Checkpoint,
        name: &str,
        shape: &[usize],
    ) -> Result<bool> {
        let (Some(config), Some(layer), [rows, cols]) =
            (self.quantization(), name.strip_suffix(".weight"), shape)
        else {
            return Ok(false);
        };
        if !config.has_layer(checkpoint, layer) {
            return Ok(false);
        }
        config.check_layer(checkpoint, layer, [*rows, *cols])?;
        Ok(true)
    }
}

impl HfFolder {
    /// Writes `config.json` and the weights: `layers` as codes in `format`, all other weights from
    /// `tensors`. Dense weights of `layers` in `tensors` are ignored. For GPTQ it also writes
    /// `quantize_config.json`. `dtype` is the dtype of `tensors`, which the config names.
    ///
    /// [`HfConfig::quantized_layers`] reads back exactly the same codes, scales and zero points.
    ///
    /// # Errors
    /// Returns [`Error::UnknownLayer`] or [`Error::TensorShape`] if `layers` do not match the
    /// config, and the errors of [`write_model`](Self::write_model),
    /// [`QuantizationConfig::for_layers`] and [`QuantizationConfig::layer_tensors`].
    pub fn write_quantized<'a>(
        &self,
        config: &HfConfig,
        dtype: DType,
        mut tensors: Vec<HostTensor<'a>>,
        layers: &'a BTreeMap<String, QuantizedMatrix>,
        format: QuantFormat,
    ) -> Result<()> {
        let all = config.arch().linears();
        for (name, matrix) in layers {
            let Some(layer) = all.iter().find(|layer| layer.name == *name) else {
                return Err(Error::UnknownLayer {
                    context: "quantized layers".into(),
                    layer: name.clone(),
                });
            };
            let (expected, found) = (
                vec![layer.d_output, layer.d_input],
                vec![matrix.rows(), matrix.cols()],
            );
            if expected != found {
                return Err(Error::TensorShape {
                    tensor: format!("{name}.weight"),
                    expected,
                    found,
                });
            }
        }
        let quantization = QuantizationConfig::for_layers(format, layers, &all)?;
        let replaced = |name: &str| {
            name.strip_suffix(".weight")
                .is_some_and(|layer| layers.contains_key(layer))
        };
        tensors.retain(|tensor| !replaced(tensor.name()));
        for (name, matrix) in layers {
            tensors.extend(quantization.layer_tensors(name, matrix)?);
        }
        if format != QuantFormat::CompressedTensors {
            self.write_json(
                "quantize_config.json",
                &Value::Object(quantization.raw().clone()),
            )?;
        }
        self.write_parts(
            &config.with_quantization(Some(quantization)),
            dtype,
            tensors,
            replaced,
        )
    }
}
