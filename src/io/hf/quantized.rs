//! Reads and writes model folders with quantized linear layers.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;

use serde_json::Value;

use super::config::HfConfig;
use super::folder::HfFolder;
use crate::arch::{Fused, LinearSpec};
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
            Some(config) if let Some((fused, rows)) = self.fused_of(checkpoint, layer) => {
                let shape = [fused.d_output(), fused.d_input];
                let matrix = config.read_layer(checkpoint, &fused.name, shape)?;
                matrix.row_range(rows).map(Some)
            }
            _ => checkpoint.load_quantized(&format!("{layer}.weight"), shape),
        }
    }

    /// The matrix that holds the codes of a layer together with others, and the layer's rows in it.
    fn fused_of(&self, checkpoint: &Checkpoint, layer: &str) -> Option<(Fused, Range<usize>)> {
        let config = self.quantization()?;
        let mut all = self.arch().fused().into_iter();
        let (fused, rows) = all
            .find_map(|fused| Some((fused.rows_of(layer)?, fused)))
            .map(|(rows, fused)| (fused, rows))?;
        config
            .has_layer(checkpoint, &fused.name)
            .then_some((fused, rows))
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
            let Some((fused, _)) = self.fused_of(checkpoint, layer) else {
                return Ok(false);
            };
            let shape = [fused.d_output(), fused.d_input];
            config.check_layer(checkpoint, &fused.name, shape)?;
            return Ok(true);
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
        tensors: Vec<HostTensor<'a>>,
        layers: &'a BTreeMap<String, QuantizedMatrix>,
        format: QuantFormat,
    ) -> Result<()> {
        let all = config.arch().linears();
        check_layers(layers, &all)?;
        let (stored, all) = fused(config, layers, all)?;
        let quantization = QuantizationConfig::for_layers(format, &stored, &all)?;
        let replaced = |name: &str| {
            name.strip_suffix(".weight")
                .is_some_and(|layer| layers.contains_key(layer))
        };
        let mut tensors: Vec<HostTensor<'_>> = tensors;
        tensors.retain(|tensor| !replaced(tensor.name()));
        for (name, matrix) in stored.iter() {
            tensors.extend(quantization.layer_tensors(name, matrix)?);
        }
        self.write_quantize_config(&quantization)?;
        self.write_parts(
            &config.with_quantization(Some(quantization)),
            dtype,
            tensors,
            replaced,
        )
    }

    /// Writes `quantize_config.json`, where the format has one.
    pub(super) fn write_quantize_config(&self, quantization: &QuantizationConfig) -> Result<()> {
        match quantization.format() {
            QuantFormat::CompressedTensors => Ok(()),
            _ => self.write_json(
                "quantize_config.json",
                &Value::Object(quantization.raw().clone()),
            ),
        }
    }
}

/// Checks that quantized layers are among `all`, in the same sizes.
pub(super) fn check_layers(layers: &Layers, all: &[LinearSpec]) -> Result<()> {
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
    Ok(())
}

/// Quantized layers by name.
pub(super) type Layers = BTreeMap<String, QuantizedMatrix>;

/// The layers as the family stores them: those that share a matrix become one.
///
/// # Errors
/// Returns [`Error::Unsupported`] if only some of the layers of a matrix are quantized, or in
/// different ways.
pub(super) fn fused<'a>(
    config: &HfConfig,
    layers: &'a Layers,
    mut all: Vec<LinearSpec>,
) -> Result<(Cow<'a, Layers>, Vec<LinearSpec>)> {
    let mut stored = Cow::Borrowed(layers);
    for fused in config.arch().fused() {
        let found: Vec<&QuantizedMatrix> = fused
            .parts
            .iter()
            .filter_map(|(layer, _)| layers.get(layer))
            .collect();
        let inside = |name: &str| fused.rows_of(name).is_some();
        if let Some(index) = all.iter().position(|layer| inside(&layer.name)) {
            all[index].name.clone_from(&fused.name);
            all[index].d_output = fused.d_output();
            all.retain(|layer| !inside(&layer.name));
        }
        if found.is_empty() {
            continue;
        }
        let all_of_them = (found.len() == fused.parts.len()).then_some(found);
        let Some(matrix) = all_of_them.and_then(|found| QuantizedMatrix::stacked(&found)) else {
            let what = format!(
                "layers of `{}`, which the family stores as one matrix, in different formats",
                fused.name
            );
            return Err(Error::Unsupported { what });
        };
        let stored = stored.to_mut();
        stored.retain(|name, _| !inside(name));
        stored.insert(fused.name, matrix);
    }
    Ok((stored, all))
}
