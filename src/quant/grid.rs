//! The quantization grid of a group of weights: a scale and an integer zero point.

use half::{bf16, f16};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::format::QuantizedMatrix;

/// The dtype in which scales will be stored. Scales are rounded to it before codes are chosen, so
/// the codes match the stored scales.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScaleDtype {
    /// Scales are not rounded.
    #[default]
    F32,
    /// The dtype of GPTQ checkpoints.
    F16,
    /// The dtype of compressed-tensors checkpoints of bf16 models.
    Bf16,
}

impl ScaleDtype {
    /// Rounds a scale to this dtype.
    pub fn round(self, scale: f32) -> f32 {
        match self {
            Self::F32 => scale,
            Self::F16 => f16::from_f32(scale).to_f32(),
            Self::Bf16 => bf16::from_f32(scale).to_f32(),
        }
    }
}

/// Settings of quantization grids.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GridConfig {
    /// Number of bits per code: 2, 3, 4 or 8.
    pub bits: u8,
    /// Number of columns of a row that share a grid; `None` for the whole row. The last group may
    /// be shorter.
    pub group_size: Option<usize>,
    /// Whether the grid is symmetric: the zero point is the middle of the grid, and the scale
    /// follows from the largest absolute value.
    pub symmetric: bool,
    /// Dtype of the scales.
    pub scale_dtype: ScaleDtype,
    /// Whether to avoid a zero point of 0, which a GPTQ v1 checkpoint cannot store.
    pub zero_from_one: bool,
}

impl GridConfig {
    /// Creates settings for an asymmetric grid of `bits` bits for each group of 128 columns, with
    /// unrounded scales.
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
    /// Returns [`Error::InvalidArgument`] if the number of bits is not 2, 3, 4 or 8, or the group
    /// size is 0.
    pub fn validate(&self) -> Result<()> {
        if ![2, 3, 4, 8].contains(&self.bits) {
            return Err(Error::argument("bits", self.bits, "2, 3, 4 or 8"));
        }
        if self.group_size == Some(0) {
            return Err(Error::argument("group_size", 0, "at least 1"));
        }
        Ok(())
    }

    /// Number of columns per group in rows of `cols` columns; at least 1, and at most `cols` unless
    /// that is 0.
    pub(crate) fn group_len(&self, cols: usize) -> usize {
        self.group_size.unwrap_or(cols).min(cols).max(1)
    }

    /// Computes the grid of a group: the smallest one that contains 0 and reaches from the least to
    /// the greatest of `weights`.
    ///
    /// - Asymmetric: `scale = (max - min) / (2^bits - 1)` with `min <= 0 <= max`, and
    ///   `zero = round(-min / scale)`.
    /// - Symmetric: `scale = 2 max |w| / (2^bits - 1)` and `zero = 2^(bits - 1)`, as in GPTQ's
    ///   code.
    ///
    /// The scale is 0 if all weights are 0, or too small for a scale of the chosen dtype.
    ///
    /// # Errors
    /// Returns [`Error::NotFinite`] if a weight is NaN or infinite, and [`Error::TensorOverflow`]
    /// if the scale is too large for its dtype.
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

/// The grid of a group: the values `scale * (code - zero)`.
#[derive(Clone, Copy, Debug, PartialEq)]
#[doc(hidden)]
pub struct GroupGrid {
    /// Distance between neighboring values; 0 if the only value is 0.
    pub scale: f32,
    /// The zero point, which is the code of 0.
    pub zero: u8,
    /// The largest code.
    pub top: u8,
}

impl GroupGrid {
    /// Returns the code nearest to a weight: `clamp(round(w / scale) + zero)`, with ties to even.
    pub fn code(&self, weight: f32) -> u8 {
        if self.scale == 0.0 {
            return self.zero;
        }
        // Adding and subtracting 1.5 * 2^23 rounds like `round_ties_even`, without a function call,
        // for all values that the clamp allows. The clamp is wide enough to change no code.
        const ROUND: f32 = 12_582_912.0;
        let steps = (weight / self.scale).clamp(-512.0, 512.0) + ROUND - ROUND;
        (steps + f32::from(self.zero)).clamp(0.0, f32::from(self.top)) as u8
    }

    /// Returns the weight of a code.
    pub fn value(&self, code: u8) -> f32 {
        QuantizedMatrix::value(self.scale, self.zero, code)
    }
}
