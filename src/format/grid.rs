//! The scales and zero points of a weight's groups, as stored beside packed codes.

use std::sync::Arc;

use half::f16;

use super::bits;
use super::buffer::{Aligned, Buffer};
use super::groups::QuantizedParts;
use super::{all_f16, expect_bytes};
use crate::error::{Error, Result};

/// Scales and zero points by row and group and, if the columns have their own order, the group of
/// each column.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Grid {
    pub rows: usize,
    pub cols: usize,
    pub bits: u8,
    pub group_size: usize,
    pub symmetric: bool,
    /// Whether scales have 32 bits instead of 16.
    pub wide: bool,
    pub scales: Buffer,
    /// Packed like codes, with each row starting at a whole byte; empty if the grid is symmetric.
    pub zeros: Buffer,
    pub group_of: Option<Arc<[u32]>>,
}

impl Grid {
    pub fn new(parts: &QuantizedParts) -> Self {
        let wide = !all_f16(&parts.scales);
        let groups = parts.cols.div_ceil(parts.group_size);
        let mut scales = Aligned::zeroed(parts.scales.len() * if wide { 4 } else { 2 });
        if wide {
            let (out, _) = scales.bytes_mut().as_chunks_mut::<4>();
            out.iter_mut()
                .zip(&parts.scales)
                .for_each(|(out, scale)| *out = scale.to_le_bytes());
        } else {
            let (out, _) = scales.bytes_mut().as_chunks_mut::<2>();
            out.iter_mut()
                .zip(&parts.scales)
                .for_each(|(out, scale)| *out = f16::from_f32(*scale).to_le_bytes());
        }
        Self {
            rows: parts.rows,
            cols: parts.cols,
            bits: parts.bits,
            group_size: parts.group_size,
            symmetric: parts.symmetric,
            wide,
            scales: scales.into(),
            zeros: if parts.symmetric {
                Buffer::from_vec(Vec::new())
            } else {
                pack_rows(&parts.zeros, parts.rows, groups, parts.bits)
            },
            group_of: parts.group_of.as_deref().map(Arc::from),
        }
    }

    /// Number of groups per row.
    pub fn groups(&self) -> usize {
        self.cols.div_ceil(self.group_size)
    }

    /// The scale and zero point of a group of a row.
    pub fn at(&self, row: usize, group: usize) -> (f32, u8) {
        let at = row * self.groups() + group;
        let scale = if self.wide {
            f32::from_le_bytes(self.scales.as_chunks::<4>().0[at])
        } else {
            f16::from_le_bytes(self.scales.as_chunks::<2>().0[at]).to_f32()
        };
        if self.symmetric {
            return (scale, 1 << (self.bits - 1));
        }
        (scale, bits::get(self.row_zeros(row), self.bits, group))
    }

    /// The packed zero points of a row. The grid must not be symmetric.
    pub fn row_zeros(&self, row: usize) -> &[u8] {
        let len = bits::packed_len(self.groups(), self.bits);
        &self.zeros[row * len..(row + 1) * len]
    }

    /// Reads `out.len()` zero points of a row, from group `first` on, which must be a multiple
    /// of 8. The grid must not be symmetric.
    pub fn some_zeros(&self, row: usize, first: usize, out: &mut [u8]) {
        bits::unpack(
            &self.row_zeros(row)[bits::packed_len(first, self.bits)..],
            self.bits,
            out,
        );
    }

    /// Calls `run` for each run of columns of the same group in `start..end`, in order, with the
    /// columns, the scale and the zero point.
    pub fn for_runs(
        &self,
        row: usize,
        start: usize,
        end: usize,
        mut run: impl FnMut(std::ops::Range<usize>, f32, u8),
    ) {
        if let Some(group_of) = &self.group_of {
            for column in start..end {
                let (scale, zero) = self.at(row, group_of[column] as usize);
                run(column..column + 1, scale, zero);
            }
            return;
        }
        let mut at = start;
        while at < end {
            let group = at / self.group_size;
            let next = (group + 1).saturating_mul(self.group_size).min(end);
            let (scale, zero) = self.at(row, group);
            run(at..next, scale, zero);
            at = next;
        }
    }

    pub fn bytes(&self) -> usize {
        self.scales.len()
            + self.zeros.len()
            + self
                .group_of
                .as_ref()
                .map_or(0, |group_of| 4 * group_of.len())
    }

    /// The scales and the zero points of all rows.
    pub fn values(&self) -> (Vec<f32>, Vec<u8>) {
        let groups = self.groups();
        (0..self.rows)
            .flat_map(|row| (0..groups).map(move |group| self.at(row, group)))
            .unzip()
    }

    /// Creates a grid from stored parts. It checks the sizes and, if the columns have their own
    /// order, the group of each column.
    #[allow(clippy::too_many_arguments)] // the fields of a header
    pub fn from_parts(
        [rows, cols]: [usize; 2],
        bits: u8,
        group_size: Option<usize>,
        symmetric: bool,
        wide: bool,
        ordered: bool,
        part: &mut dyn FnMut(&str) -> Result<Buffer>,
    ) -> Result<Self> {
        let group_size = group_size.unwrap_or(cols.max(1));
        if group_size == 0 {
            return Err(Error::argument("group_size", 0, "at least 1"));
        }
        let groups = cols.div_ceil(group_size);
        let scales = part("scales")?;
        expect_bytes("scales", &scales, &[rows, groups, if wide { 4 } else { 2 }])?;
        let zeros = if symmetric {
            Buffer::from_vec(Vec::new())
        } else {
            part("zeros")?
        };
        if !symmetric {
            expect_bytes("zeros", &zeros, &[rows, bits::packed_len(groups, bits)])?;
        }
        let group_of = if ordered {
            let bytes = part("groups")?;
            expect_bytes("groups", &bytes, &[cols, 4])?;
            let group_of: Arc<[u32]> = bytes
                .as_chunks::<4>()
                .0
                .iter()
                .map(|bytes| u32::from_le_bytes(*bytes))
                .collect();
            if let Some(group) = group_of.iter().find(|group| **group as usize >= groups) {
                return Err(Error::argument("group", group, format!("under {groups}")));
            }
            Some(group_of)
        } else {
            None
        };
        Ok(Self {
            rows,
            cols,
            bits,
            group_size,
            symmetric,
            wide,
            scales,
            zeros,
            group_of,
        })
    }

    /// Returns an error if a scale is negative or not finite.
    pub fn check(&self) -> Result<()> {
        let refused = |scale: f32| !(scale.is_finite() && scale >= 0.0);
        let bad = if self.wide {
            self.scales
                .as_chunks::<4>()
                .0
                .iter()
                .map(|bytes| f32::from_le_bytes(*bytes))
                .find(|scale| refused(*scale))
        } else {
            let scales = self
                .scales
                .as_chunks::<2>()
                .0
                .iter()
                .map(|bytes| f16::from_le_bytes(*bytes).to_f32());
            scales.into_iter().find(|scale| refused(*scale))
        };
        bad.map_or(Ok(()), |scale| {
            Err(Error::argument("scale", scale, "finite and not negative"))
        })
    }
}

/// Packs rows of `len` codes, each row starting at a whole byte.
pub(super) fn pack_rows(values: &[u8], rows: usize, len: usize, bits: u8) -> Buffer {
    let row_bytes = bits::packed_len(len, bits);
    let mut packed = Aligned::zeroed(rows * row_bytes);
    if row_bytes > 0 {
        for (row, out) in values
            .chunks(len)
            .zip(packed.bytes_mut().chunks_mut(row_bytes))
        {
            bits::pack(row, bits, out);
        }
    }
    packed.into()
}
