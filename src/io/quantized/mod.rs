//! Quantized linear layers in the formats of other tools: GPTQ (arXiv 2210.17323) as stored by
//! AutoGPTQ (v1) and by GPTQModel (v2), compressed-tensors' `pack-quantized`, and AWQ (read only).
//!
//! A [`QuantizationConfig`] describes how the layers of a folder are stored, and reads and writes
//! each of them as a [`QuantizedMatrix`]. [`HfConfig`](crate::io::HfConfig) and
//! [`HfFolder`](crate::io::hf::HfFolder) do this for a whole folder.

mod awq;
mod compressed_tensors;
mod config;
mod gptq;
mod layout;

pub(in crate::io) use config::GridKind;
pub use config::{QuantFormat, QuantizationConfig};

use crate::error::{Error, Result};
use crate::format::QuantizedMatrix;
use crate::io::{Checkpoint, HostTensor};

impl QuantizationConfig {
    /// Returns whether `checkpoint` holds packed codes for a layer.
    pub fn has_layer(&self, checkpoint: &Checkpoint, layer: &str) -> bool {
        let codes = match self.format() {
            QuantFormat::Gptq | QuantFormat::GptqV2 => gptq::CODES,
            QuantFormat::CompressedTensors => compressed_tensors::CODES,
            QuantFormat::Awq => awq::CODES,
        };
        checkpoint.contains(&layout::tensor_name(layer, codes))
    }

    /// Returns the names of the tensors that a quantized layer may have.
    pub(in crate::io) fn tensor_names(&self, layer: &str) -> impl Iterator<Item = String> {
        let suffixes: &[&str] = match self.format() {
            QuantFormat::Gptq | QuantFormat::GptqV2 => &gptq::TENSORS,
            QuantFormat::CompressedTensors => &compressed_tensors::TENSORS,
            QuantFormat::Awq => &awq::TENSORS,
        };
        suffixes
            .iter()
            .map(move |suffix| layout::tensor_name(layer, suffix))
    }

    /// Checks the dtypes and shapes of a layer's tensors without reading their contents.
    ///
    /// # Shapes
    /// - `shape`: `[d_output, d_input]` of the layer
    ///
    /// # Errors
    /// Returns [`Error::MissingTensor`], or [`Error::InvalidFile`], naming the file and the tensor,
    /// if a dtype or shape is wrong, and [`Error::InvalidArgument`] if `shape` is zero or
    /// overflows.
    pub fn check_layer(
        &self,
        checkpoint: &Checkpoint,
        layer: &str,
        shape: [usize; 2],
    ) -> Result<()> {
        let [rows, cols] = shape;
        // The number of bits of all codes is the largest value computed from a shape.
        if rows == 0
            || cols == 0
            || rows
                .checked_mul(cols)
                .and_then(|n| n.checked_mul(8))
                .is_none()
        {
            return Err(Error::argument(
                "shape",
                format!("{shape:?}"),
                "positive sizes whose product fits the memory",
            ));
        }
        match self.format() {
            QuantFormat::Gptq | QuantFormat::GptqV2 => gptq::check(self, checkpoint, layer, shape),
            QuantFormat::CompressedTensors => {
                compressed_tensors::check(self, checkpoint, layer, shape)
            }
            QuantFormat::Awq => awq::check(self, checkpoint, layer, shape),
        }
    }

    /// Reads a layer without its bias, which is a separate tensor under the same name as in a dense
    /// checkpoint.
    ///
    /// # Shapes
    /// - `shape`: `[d_output, d_input]` of the layer
    ///
    /// # Errors
    /// Returns the errors of [`check_layer`](Self::check_layer). Returns [`Error::InvalidFile`] if
    /// a column's group does not exist, if readers disagree on the meaning of a zero point, or if a
    /// scale is negative, and [`Error::NotFinite`] if a scale is not finite.
    pub fn read_layer(
        &self,
        checkpoint: &Checkpoint,
        layer: &str,
        shape: [usize; 2],
    ) -> Result<QuantizedMatrix> {
        self.check_layer(checkpoint, layer, shape)?;
        let parts = match self.format() {
            QuantFormat::Gptq | QuantFormat::GptqV2 => gptq::read(self, checkpoint, layer, shape)?,
            QuantFormat::CompressedTensors => {
                compressed_tensors::read(self, checkpoint, layer, shape)?
            }
            QuantFormat::Awq => awq::read(self, checkpoint, layer, shape)?,
        };
        QuantizedMatrix::new(parts).map_err(|reason| {
            Error::invalid_file(checkpoint.path(), format!("layer `{layer}`: {reason}"))
        })
    }

    /// Returns the tensors of a layer. Their contents are produced only when they are written.
    ///
    /// Scales are written as `f16`, or as `f32` if `f16` would change one of the layer's scales
    /// (readers that use `f16` then round it).
    ///
    /// # Errors
    /// Returns [`Error::Unsupported`], naming the tensor, if the format cannot represent the layer:
    /// sizes that do not fill whole words, a zero point of 0 in GPTQ v1, or columns with groups out
    /// of order in compressed-tensors; and for AWQ, which is not written. Returns [`Error::InvalidArgument`] if the matrix has other
    /// bits or groups than this config, or is not symmetric although the config is.
    pub fn layer_tensors<'a>(
        &self,
        layer: &str,
        matrix: &'a QuantizedMatrix,
    ) -> Result<Vec<HostTensor<'a>>> {
        self.format().check_written()?;
        if matrix.parts().bits != self.bits() {
            let expected = format!("{}, as the config of `{layer}` says", self.bits());
            return Err(Error::argument("bits", matrix.parts().bits, expected));
        }
        let group_size = self.group_size().unwrap_or(matrix.cols());
        if matrix.groups() != matrix.cols().div_ceil(group_size)
            || matrix.groups() > 1 && matrix.parts().group_size != group_size
        {
            let expected = format!("{group_size}, as the config of `{layer}` says");
            return Err(Error::argument(
                "group_size",
                matrix.parts().group_size,
                expected,
            ));
        }
        if self.symmetric() && !matrix.parts().symmetric {
            return Err(Error::argument(
                "symmetric",
                false,
                format!("true, as the config of `{layer}` says"),
            ));
        }
        match self.format() {
            QuantFormat::Gptq | QuantFormat::GptqV2 | QuantFormat::Awq => {
                gptq::tensors(self, layer, matrix)
            }
            QuantFormat::CompressedTensors => compressed_tensors::tensors(self, layer, matrix),
        }
    }
}

#[cfg(test)]
mod tests;
