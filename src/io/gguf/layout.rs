//! How a tensor of a file becomes one of a Hugging Face folder.

use super::blocks::{BlockType, dequantize_rows};
use crate::error::Result;
use crate::format::QuantizedMatrix;
use crate::io::tensors::TensorInfo;

/// How the numbers of a tensor lie in its bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::io) struct Layout {
    /// The blocks that they are in.
    pub blocks: Option<&'static BlockType>,
    /// The number of heads whose rows llama.cpp's converter put in another order: it rotates neighbours, Hugging
    /// Face rotates halves. The rows divide into that many heads of even sizes.
    pub heads: Option<usize>,
}

/// A tensor's rows in Hugging Face's order.
struct Rows<'a> {
    bytes: Vec<&'a [u8]>,
    cols: usize,
}

impl Layout {
    /// Whether the bytes are those of a Hugging Face folder.
    pub fn is_plain(&self) -> bool {
        self.blocks.is_none() && self.heads.is_none()
    }

    /// What the file holds, for error messages.
    pub fn name(&self) -> String {
        match self.blocks {
            Some(blocks) => blocks.name.into(),
            None => "rows in another order".into(),
        }
    }

    fn rows<'a>(&self, info: &TensorInfo, bytes: &'a [u8]) -> Rows<'a> {
        // Numbers of a bias are rows of one.
        let cols = match (info.shape.as_slice(), self.heads) {
            ([_], Some(_)) => 1,
            (shape, _) => shape.last().copied().unwrap_or(1).max(1),
        };
        let count = info.n_elements() / cols;
        let mut rows: Vec<&[u8]> = bytes
            .chunks_exact((bytes.len() / count.max(1)).max(1))
            .collect();
        if let Some(heads) = self.heads {
            let size = count / heads.max(1);
            let place = |row: usize| {
                let (head, row) = (row / size, row % size);
                head * size + 2 * (row % (size / 2)) + row / (size / 2)
            };
            rows = (0..count)
                .filter_map(|row| rows.get(place(row)).copied())
                .collect();
        }
        Rows { bytes: rows, cols }
    }

    /// The tensor's bytes in a Hugging Face folder; those of blocks as `f32`.
    pub fn bytes(&self, info: &TensorInfo, bytes: &[u8]) -> Vec<u8> {
        match self.blocks {
            Some(_) => bytemuck::cast_slice(&self.numbers(info, bytes)).to_vec(),
            None => self.rows(info, bytes).bytes.concat(),
        }
    }

    /// The numbers of blocks, dequantized.
    pub fn numbers(&self, info: &TensorInfo, bytes: &[u8]) -> Vec<f32> {
        let rows = self.rows(info, bytes);
        let Some(blocks) = self.blocks else {
            return Vec::new();
        };
        dequantize_rows(blocks, &rows.bytes, rows.cols)
    }

    /// The codes of blocks, where they are the numbers exactly.
    ///
    /// # Errors
    /// A scale that is not finite.
    pub fn quantized(&self, info: &TensorInfo, bytes: &[u8]) -> Result<Option<QuantizedMatrix>> {
        let Some(blocks) = self.blocks else {
            return Ok(None);
        };
        let rows = self.rows(info, bytes);
        blocks.quantized(&rows.bytes, rows.cols)
    }
}
