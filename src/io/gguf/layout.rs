//! Conversion of a stored tensor into one of a Hugging Face folder.

use super::blocks::{BlockType, dequantize_rows};
use crate::error::Result;
use crate::format::QuantizedMatrix;
use crate::io::tensors::TensorInfo;

/// Layout of a tensor's numbers in its bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(in crate::io) struct Layout {
    /// Block type, if the numbers are stored in blocks.
    pub blocks: Option<&'static BlockType>,
    /// Number of heads, if llama.cpp's converter permuted the rows of each head. llama.cpp rotates
    /// neighbouring rows, Hugging Face rotates the two halves. Heads have an even number of rows.
    pub heads: Option<usize>,
    /// Number that llama.cpp's converter added to the values, which are `f32`.
    pub offset: f32,
}

/// Rows of a tensor in Hugging Face's order.
struct Rows<'a> {
    bytes: Vec<&'a [u8]>,
    cols: usize,
}

/// A matrix in quantized blocks.
#[derive(Debug)]
pub(crate) struct BlockRows<'a> {
    pub kind: &'static BlockType,
    /// Bytes of each row, in Hugging Face's order.
    pub rows: Vec<&'a [u8]>,
}

/// Place to which llama.cpp's converter moves a row, if heads have `size` rows.
pub(super) fn place(row: usize, size: usize) -> usize {
    let (head, row) = (row / size, row % size);
    head * size + 2 * (row % (size / 2)) + row / (size / 2)
}

impl Layout {
    /// Returns whether the bytes are those of a Hugging Face folder.
    pub fn is_plain(&self) -> bool {
        self.blocks.is_none() && self.heads.is_none() && self.offset == 0.0
    }

    /// Description for error messages.
    pub fn name(&self) -> String {
        match self.blocks {
            Some(blocks) => blocks.name.into(),
            None if self.offset != 0.0 => format!("values that are larger by {}", self.offset),
            None => "rows in another order".into(),
        }
    }

    fn rows<'a>(&self, info: &TensorInfo, bytes: &'a [u8]) -> Rows<'a> {
        // A bias is a matrix with one column.
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
            rows = (0..count)
                .filter_map(|row| rows.get(place(row, size)).copied())
                .collect();
        }
        Rows { bytes: rows, cols }
    }

    /// Splits the bytes of blocks into rows, in Hugging Face's order. Returns `None` for plain
    /// numbers.
    pub fn block_rows<'a>(&self, info: &TensorInfo, bytes: &'a [u8]) -> Option<BlockRows<'a>> {
        let kind = self.blocks?;
        let rows = self.rows(info, bytes).bytes;
        Some(BlockRows { kind, rows })
    }

    /// Converts the bytes to those of a Hugging Face folder, blocks to `f32`.
    pub fn bytes(&self, info: &TensorInfo, bytes: &[u8]) -> Vec<u8> {
        match self.blocks {
            Some(_) => bytemuck::cast_slice(&self.numbers(info, bytes)).to_vec(),
            None if self.offset != 0.0 => {
                let (numbers, _) = bytes.as_chunks::<4>();
                let moved = numbers
                    .iter()
                    .map(|bytes| f32::from_le_bytes(*bytes) - self.offset);
                moved.flat_map(f32::to_le_bytes).collect()
            }
            None => self.rows(info, bytes).bytes.concat(),
        }
    }

    /// Dequantizes blocks.
    pub fn numbers(&self, info: &TensorInfo, bytes: &[u8]) -> Vec<f32> {
        let rows = self.rows(info, bytes);
        let Some(blocks) = self.blocks else {
            return Vec::new();
        };
        dequantize_rows(blocks, &rows.bytes, rows.cols)
    }

    /// Converts blocks to codes, or returns `None` if codes cannot have exactly their values.
    ///
    /// # Errors
    /// Returns an error if a scale is not finite.
    pub fn quantized(&self, info: &TensorInfo, bytes: &[u8]) -> Result<Option<QuantizedMatrix>> {
        let Some(blocks) = self.blocks else {
            return Ok(None);
        };
        let rows = self.rows(info, bytes);
        blocks.quantized(&rows.bytes, rows.cols)
    }
}
