//! Quantized linear layers in other tools' checkpoints: GPTQ (arXiv 2210.17323) as AutoGPTQ stores it (v1) and as GPTQModel
//! does (v2), and compressed-tensors' `pack-quantized`.
//!
//! A [`QuantizationConfig`] says how the layers of a folder are stored, and reads and writes each of them as a
//! [`QuantizedMatrix`]; [`HfConfig`](crate::io::HfConfig) and [`HfFolder`](crate::io::hf::HfFolder) do so for a folder.

mod compressed_tensors;
mod config;
mod gptq;
mod layout;

pub use config::{QuantFormat, QuantizationConfig};

use crate::error::{Error, Result};
use crate::format::QuantizedMatrix;
use crate::io::{Checkpoint, HostTensor};

impl QuantizationConfig {
    /// Whether `checkpoint` holds the packed codes of a layer.
    pub fn has_layer(&self, checkpoint: &Checkpoint, layer: &str) -> bool {
        let codes = match self.format() {
            QuantFormat::Gptq | QuantFormat::GptqV2 => gptq::CODES,
            QuantFormat::CompressedTensors => compressed_tensors::CODES,
        };
        checkpoint.contains(&layout::tensor_name(layer, codes))
    }

    /// Checks the types and shapes of a layer's tensors, without reading them.
    ///
    /// # Shapes
    /// - `shape`: `[d_output, d_input]` of the layer
    ///
    /// # Errors
    /// [`Error::MissingTensor`]; [`Error::InvalidFile`] that names file and tensor.
    pub fn check_layer(
        &self,
        checkpoint: &Checkpoint,
        layer: &str,
        shape: [usize; 2],
    ) -> Result<()> {
        let [rows, cols] = shape;
        // The widest that is computed from a shape: bits of all codes.
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
        }
    }

    /// Reads a layer. Its bias is a tensor of its own, under the name that it has in a dense checkpoint.
    ///
    /// # Shapes
    /// - `shape`: `[d_output, d_input]` of the layer
    ///
    /// # Errors
    /// Those of [`check_layer`](Self::check_layer); [`Error::InvalidFile`] for a group of a column that there is not, a zero
    /// point that two readers would take for two, or a negative scale; [`Error::NotFinite`].
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
        };
        QuantizedMatrix::new(parts).map_err(|reason| {
            Error::invalid_file(checkpoint.path(), format!("layer `{layer}`: {reason}"))
        })
    }

    /// The tensors of a layer, each made when its turn comes to be written.
    ///
    /// Scales are written as `f16`, or as `f32` where one of the layer's would change (readers that keep `f16` then round
    /// it).
    ///
    /// # Errors
    /// [`Error::Unsupported`], naming the tensor, for what the format cannot hold: sizes that are no whole words, a zero
    /// point of 0 in GPTQ v1, columns in an order of their own in compressed-tensors; [`Error::InvalidArgument`] for a matrix
    /// whose bits or groups are not those of this config.
    pub fn layer_tensors<'a>(
        &self,
        layer: &str,
        matrix: &'a QuantizedMatrix,
    ) -> Result<Vec<HostTensor<'a>>> {
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
            QuantFormat::Gptq | QuantFormat::GptqV2 => gptq::tensors(self, layer, matrix),
            QuantFormat::CompressedTensors => compressed_tensors::tensors(self, layer, matrix),
        }
    }
}

#[cfg(test)]
mod tests;
