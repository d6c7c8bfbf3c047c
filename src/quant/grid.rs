//! The grid of a group of weights: a scale and an integer zero point.

use half::{bf16, f16};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::format::QuantizedMatrix;

/// The format in which scales will be stored. They are rounded to it before codes are chosen, so that what is stored is what
/// was meant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScaleDtype {
    /// Not rounded.
    #[default]
    F32,
    /// As GPTQ checkpoints have them.
    F16,
    /// As a bf16 model's compressed-tensors checkpoint has them.
    Bf16,
}

impl ScaleDtype {
    /// A scale as it will be read back.
    pub fn round(self, scale: f32) -> f32 {
        match self {
            Self::F32 => scale,
            Self::F16 => f16::from_f32(scale).to_f32(),
            Self::Bf16 => bf16::from_f32(scale).to_f32(),
        }
    }
}

/// How grids are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GridConfig {
    /// Bits of a code: 2, 3, 4 or 8.
    pub bits: u8,
    /// Columns of a row that share a grid, the last group may be shorter; none for the whole row.
    pub group_size: Option<usize>,
    /// Whether the zero point is the middle of the grid, and the scale as large as the largest weight of either sign needs.
    pub symmetric: bool,
    /// Format of the scales.
    pub scale_dtype: ScaleDtype,
    /// Whether a zero point of 0, which a GPTQ v1 checkpoint cannot hold, is avoided.
    pub zero_from_one: bool,
}

impl GridConfig {
    /// An asymmetric grid of that many bits for each group of 128 columns, its scales not rounded.
    pub fn new(bits: u8) -> Self {
        Self {
            bits,
            group_size: Some(128),
            symmetric: false,
            scale_dtype: ScaleDtype::F32,
            zero_from_one: false,
        }
    }

    setters! {
        with_group_size(group_size: Option<usize>);
        with_symmetric(symmetric: bool);
        with_scale_dtype(scale_dtype: ScaleDtype);
        with_zero_from_one(zero_from_one: bool);
    }

    /// Checks the fields.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for bits other than 2, 3, 4 and 8 and for a group size of 0.
    pub fn validate(&self) -> Result<()> {
        if ![2, 3, 4, 8].contains(&self.bits) {
            return Err(Error::argument("bits", self.bits, "2, 3, 4 or 8"));
        }
        if self.group_size == Some(0) {
            return Err(Error::argument("group_size", 0, "at least 1"));
        }
        Ok(())
    }

    /// Columns of a group in rows of `cols`, at least 1 and at most the row.
    pub(crate) fn group_len(&self, cols: usize) -> usize {
        self.group_size.unwrap_or(cols).min(cols).max(1)
    }

    /// The grid of a group: the least one whose ends reach the smallest and the largest of `weights`, and 0 on it.
    ///
    /// Asymmetric: `scale = (max - min) / (2^bits - 1)` with `min <= 0 <= max`, `zero = round(-min / scale)`. Symmetric:
    /// `scale = 2 max |w| / (2^bits - 1)`, `zero = 2^(bits - 1)`, as GPTQ's code has them. The scale is 0 where no weight is
    /// other than 0, or none is large enough for a scale of its format.
    ///
    /// # Errors
    /// [`Error::NotFinite`] for a weight that is NaN or infinite, [`Error::TensorOverflow`] for a scale that its format
    /// cannot hold.
    pub fn grid(&self, weights: &[f32]) -> Result<GroupGrid> {
        let (mut min, mut max) = (0.0_f32, 0.0_f32);
        for (index, weight) in weights.iter().enumerate() {
            if !weight.is_finite() {
                return Err(Error::NotFinite {
                    tensor: "weight".into(),
                    index,
                    value: *weight,
                });
            }
            (min, max) = (min.min(*weight), max.max(*weight));
        }
        let top = u8::MAX >> (8 - self.bits);
        let middle = 1_u8 << (self.bits - 1);
        if self.symmetric {
            max = max.max(-min);
            min = -max;
        }
        let stored = |scale: f32| {
            let rounded = self.scale_dtype.round(scale);
            if rounded.is_finite() {
                return Ok(rounded);
            }
            let dtype = match self.scale_dtype {
                ScaleDtype::F32 => "f32",
                ScaleDtype::F16 => "f16",
                ScaleDtype::Bf16 => "bf16",
            };
            Err(Error::TensorOverflow {
                tensor: "scale".into(),
                index: 0,
                value: scale,
                dtype,
            })
        };
        let scale = stored((max - min) / f32::from(top))?;
        if scale == 0.0 {
            return Ok(GroupGrid {
                scale,
                zero: middle,
                top,
            });
        }
        if self.symmetric {
            return Ok(GroupGrid {
                scale,
                zero: middle,
                top,
            });
        }
        let zero = (-min / scale).round_ties_even().clamp(0.0, f32::from(top)) as u8;
        if zero == 0 && self.zero_from_one {
            let scale = stored((max / f32::from(top - 1)).max(scale))?;
            return Ok(GroupGrid {
                scale,
                zero: 1,
                top,
            });
        }
        Ok(GroupGrid { scale, zero, top })
    }
}

/// A group's grid: the weights `scale * (code - zero)`.
#[derive(Clone, Copy, Debug, PartialEq)]
#[doc(hidden)]
pub struct GroupGrid {
    /// Distance between neighbours; 0 where the only weight is 0.
    pub scale: f32,
    /// The code of 0.
    pub zero: u8,
    /// The largest code.
    pub top: u8,
}

impl GroupGrid {
    /// The code nearest to a weight: `clamp(round(w / scale) + zero)`, ties to even.
    pub fn code(&self, weight: f32) -> u8 {
        if self.scale == 0.0 {
            return self.zero;
        }
        // Adding and taking away 1.5 * 2^23 rounds as `round_ties_even` does, without a call, for what the clamp leaves; it
        // is wide enough to change no code.
        const ROUND: f32 = 12_582_912.0;
        let steps = (weight / self.scale).clamp(-512.0, 512.0) + ROUND - ROUND;
        (steps + f32::from(self.zero)).clamp(0.0, f32::from(self.top)) as u8
    }

    /// The weight that a code stands for.
    pub fn value(&self, code: u8) -> f32 {
        QuantizedMatrix::value(self.scale, self.zero, code)
    }
}
