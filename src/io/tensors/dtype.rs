//! Dtypes, and conversion of elements from and to `f32`.

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;
use safetensors::Dtype;

use crate::error::{Error, Result};

/// Elements per parallel task. Conversions of at most this many elements run on the calling thread.
const PARALLEL_CHUNK: usize = 1 << 16;

/// Dtype of a tensor in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DType {
    /// IEEE 754 double precision.
    F64,
    /// IEEE 754 single precision.
    F32,
    /// IEEE 754 half precision.
    F16,
    /// Upper 16 bits of an `F32`.
    BF16,
    /// 8-bit float with 4 exponent bits.
    F8E4M3,
    /// 8-bit float with 5 exponent bits.
    F8E5M2,
    /// Signed 64-bit integer.
    I64,
    /// Unsigned 64-bit integer.
    U64,
    /// Signed 32-bit integer.
    I32,
    /// Unsigned 32-bit integer.
    U32,
    /// Signed 16-bit integer.
    I16,
    /// Unsigned 16-bit integer.
    U16,
    /// Signed byte.
    I8,
    /// Unsigned byte.
    U8,
    /// One byte, 0 or 1.
    Bool,
}

/// The variant here, its variant in the safetensors crate, its name in a header, its name in torch,
/// and bytes per element.
const TABLE: [(DType, Dtype, &str, &str, usize); 15] = [
    (DType::F64, Dtype::F64, "F64", "float64", 8),
    (DType::F32, Dtype::F32, "F32", "float32", 4),
    (DType::F16, Dtype::F16, "F16", "float16", 2),
    (DType::BF16, Dtype::BF16, "BF16", "bfloat16", 2),
    (DType::F8E4M3, Dtype::F8_E4M3, "F8_E4M3", "float8_e4m3fn", 1),
    (DType::F8E5M2, Dtype::F8_E5M2, "F8_E5M2", "float8_e5m2", 1),
    (DType::I64, Dtype::I64, "I64", "int64", 8),
    (DType::U64, Dtype::U64, "U64", "uint64", 8),
    (DType::I32, Dtype::I32, "I32", "int32", 4),
    (DType::U32, Dtype::U32, "U32", "uint32", 4),
    (DType::I16, Dtype::I16, "I16", "int16", 2),
    (DType::U16, Dtype::U16, "U16", "uint16", 2),
    (DType::I8, Dtype::I8, "I8", "int8", 1),
    (DType::U8, Dtype::U8, "U8", "uint8", 1),
    (DType::Bool, Dtype::BOOL, "BOOL", "bool", 1),
];

impl DType {
    fn row(self) -> &'static (DType, Dtype, &'static str, &'static str, usize) {
        // TABLE has the order of the variants, which a test checks.
        &TABLE[self as usize]
    }

    /// Returns the name in a safetensors header, such as `BF16`.
    pub fn name(self) -> &'static str {
        self.row().2
    }

    /// Returns the name in `config.json`, such as `bfloat16`.
    pub fn torch_name(self) -> &'static str {
        self.row().3
    }

    /// Returns the number of bytes per element.
    pub fn size(self) -> usize {
        self.row().4
    }

    /// Parses torch's name, with or without the `torch.` prefix.
    pub fn from_torch_name(name: &str) -> Option<Self> {
        let name = name.strip_prefix("torch.").unwrap_or(name);
        let name = match name {
            "half" => "float16",
            "float" => "float32",
            "double" => "float64",
            other => other,
        };
        TABLE.iter().find(|row| row.3 == name).map(|row| row.0)
    }

    pub(super) fn from_safetensors(dtype: Dtype) -> Option<Self> {
        TABLE.iter().find(|row| row.1 == dtype).map(|row| row.0)
    }
}

impl std::fmt::Display for DType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Converts `bytes` of any alignment from `dtype` to `f32`. Returns `None` if `dtype` is not a
/// float of at least 16 bits.
pub(in crate::io) fn decode(dtype: DType, bytes: &[u8]) -> Option<Vec<f32>> {
    fn each<const N: usize>(bytes: &[u8], convert: impl Fn([u8; N]) -> f32 + Sync) -> Vec<f32> {
        let mut out = vec![0.0f32; bytes.len() / N];
        let run = |(out, bytes): (&mut [f32], &[u8])| {
            for (o, b) in out.iter_mut().zip(bytes.as_chunks::<N>().0) {
                *o = convert(*b);
            }
        };
        if out.len() <= PARALLEL_CHUNK {
            run((&mut out, bytes));
        } else {
            out.par_chunks_mut(PARALLEL_CHUNK)
                .zip(bytes.par_chunks(PARALLEL_CHUNK * N))
                .for_each(run);
        }
        out
    }
    Some(match dtype {
        DType::F32 => each(bytes, f32::from_le_bytes),
        DType::F16 => each(bytes, |b| f16::from_le_bytes(b).to_f32()),
        DType::BF16 => each(bytes, |b| bf16::from_le_bytes(b).to_f32()),
        DType::F64 => each(bytes, |b| f64::from_le_bytes(b) as f32),
        _ => return None,
    })
}

/// Converts finite `values` to `dtype` (rounding to nearest, ties to even) and appends the
/// little-endian bytes to `out`. `first` is the index of `values[0]` in the tensor, which errors
/// report.
pub(in crate::io) fn encode(
    tensor: &str,
    dtype: DType,
    first: usize,
    values: &[f32],
    out: &mut Vec<u8>,
) -> Result<()> {
    // Converts elements, and returns whether all of them are finite in the dtype.
    let run: fn(&[f32], &mut [u8]) -> bool = match dtype {
        DType::F32 => encode_f32,
        DType::F64 => encode_f64,
        DType::F16 => encode_f16,
        DType::BF16 => encode_bf16,
        _ => {
            return Err(Error::TensorDtype {
                tensor: tensor.into(),
                expected: "F64, F32, F16 or BF16",
                found: dtype.to_string(),
            });
        }
    };
    let (start, size) = (out.len(), dtype.size());
    out.resize(start + values.len() * size, 0);
    let good = if values.len() <= PARALLEL_CHUNK {
        run(values, &mut out[start..])
    } else {
        out[start..]
            .par_chunks_mut(PARALLEL_CHUNK * size)
            .zip(values.par_chunks(PARALLEL_CHUNK))
            .map(|(out, values)| run(values, out))
            .reduce(|| true, |a, b| a && b)
    };
    if good {
        return Ok(());
    }
    // Rare: looks for the first element again.
    let mut one = [0; 8];
    let bad = values
        .iter()
        .position(|value| !run(std::slice::from_ref(value), &mut one[..size]));
    out.truncate(start);
    match bad {
        None => Ok(()),
        Some(i) if values[i].is_finite() => Err(Error::TensorOverflow {
            tensor: tensor.into(),
            index: first + i,
            value: values[i],
            dtype: dtype.name(),
        }),
        Some(i) => Err(Error::NotFinite {
            tensor: tensor.into(),
            index: first + i,
            value: values[i],
        }),
    }
}

/// All bits of the exponent, which only infinities and NaNs have, of an `f32` and of a bf16.
const EXPONENT: u32 = 0x7f80_0000;
const EXPONENT_BF16: u32 = EXPONENT >> 16;

fn encode_f32(values: &[f32], out: &mut [u8]) -> bool {
    let mut good = true;
    for (value, out) in values.iter().zip(out.as_chunks_mut::<4>().0) {
        good &= value.to_bits() & EXPONENT != EXPONENT;
        *out = value.to_le_bytes();
    }
    good
}

fn encode_f64(values: &[f32], out: &mut [u8]) -> bool {
    let mut good = true;
    for (value, out) in values.iter().zip(out.as_chunks_mut::<8>().0) {
        good &= value.is_finite();
        *out = f64::from(*value).to_le_bytes();
    }
    good
}

fn encode_f16(values: &[f32], out: &mut [u8]) -> bool {
    const PART: usize = 256;
    let (mut halves, mut good) = ([f16::ZERO; PART], true);
    for (values, out) in values.chunks(PART).zip(out.chunks_mut(2 * PART)) {
        let halves = &mut halves[..values.len()];
        halves.convert_from_f32_slice(values);
        for (half, out) in halves.iter().zip(out.as_chunks_mut::<2>().0) {
            good &= half.is_finite();
            *out = half.to_le_bytes();
        }
    }
    good
}

fn encode_bf16(values: &[f32], out: &mut [u8]) -> bool {
    let mut good = true;
    for (value, out) in values.iter().zip(out.as_chunks_mut::<2>().0) {
        let bits = value.to_bits();
        // Half of the last place, less a bit if the place is even.
        let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
        good &= bits & EXPONENT != EXPONENT && rounded & EXPONENT_BF16 != EXPONENT_BF16;
        *out = (rounded as u16).to_le_bytes();
    }
    good
}

/// Returns the first element that is NaN or infinite among the bytes of a tensor of numbers.
/// Returns `None` if there is none, or if the dtype is not a float of 16 bits or more.
pub(in crate::io) fn not_finite(dtype: DType, bytes: &[u8]) -> Option<(usize, f32)> {
    fn first<const N: usize>(
        bytes: &[u8],
        bad: impl Fn([u8; N]) -> bool + Sync,
        value: impl Fn([u8; N]) -> f32,
    ) -> Option<(usize, f32)> {
        let elements = bytes.as_chunks::<N>().0;
        let any = |part: &[[u8; N]]| part.iter().fold(false, |any, b| any | bad(*b));
        let part = match elements.len() <= PARALLEL_CHUNK {
            true => any(elements).then_some(0),
            false => elements.par_chunks(PARALLEL_CHUNK).position_first(any),
        }?;
        let start = part * PARALLEL_CHUNK;
        let index = start + elements[start..].iter().position(|b| bad(*b))?;
        Some((index, value(elements[index])))
    }
    match dtype {
        DType::F32 => first(
            bytes,
            |b| u32::from_le_bytes(b) & EXPONENT == EXPONENT,
            f32::from_le_bytes,
        ),
        DType::F64 => first(
            bytes,
            |b| !f64::from_le_bytes(b).is_finite(),
            |b| f64::from_le_bytes(b) as f32,
        ),
        DType::F16 => first(
            bytes,
            |b| u16::from_le_bytes(b) & 0x7c00 == 0x7c00,
            |b| f16::from_le_bytes(b).to_f32(),
        ),
        DType::BF16 => first(
            bytes,
            |b| u32::from(u16::from_le_bytes(b)) & EXPONENT_BF16 == EXPONENT_BF16,
            |b| bf16::from_le_bytes(b).to_f32(),
        ),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_is_in_the_order_of_the_variants() {
        for (i, row) in TABLE.iter().enumerate() {
            assert_eq!(row.0 as usize, i);
            assert_eq!(row.0.name(), row.1.to_string());
            assert_eq!(row.0.size() * 8, row.1.bitsize());
            assert_eq!(
                DType::from_torch_name(&format!("torch.{}", row.3)),
                Some(row.0)
            );
        }
    }

    #[test]
    fn rounding_is_to_nearest_even_and_overflow_is_refused() {
        let mut out = Vec::new();
        // Halfway between 1 and the next f16 (1 + 2^-10), and between that and the one after it.
        encode(
            "t",
            DType::F16,
            0,
            &[1.0 + 2f32.powi(-11), 1.0 + 3.0 * 2f32.powi(-11), 65519.0],
            &mut out,
        )
        .unwrap();
        assert_eq!(
            decode(DType::F16, &out).unwrap(),
            [1.0, 1.0 + 2f32.powi(-9), 65504.0]
        );
        let mut out = Vec::new();
        encode(
            "t",
            DType::BF16,
            0,
            &[1.0 + 2f32.powi(-8), 1.0 + 3.0 * 2f32.powi(-8)],
            &mut out,
        )
        .unwrap();
        assert_eq!(
            decode(DType::BF16, &out).unwrap(),
            [1.0, 1.0 + 2f32.powi(-6)]
        );
        for (dtype, v) in [(DType::F16, 65520.0), (DType::BF16, f32::MAX)] {
            match encode("t", dtype, 10, &[1.0, -v], &mut Vec::new()) {
                Err(Error::TensorOverflow {
                    index: 11, value, ..
                }) => assert_eq!(value, -v),
                other => panic!("{other:?}"),
            }
        }
        for dtype in [DType::F32, DType::F16, DType::BF16, DType::F64] {
            assert!(matches!(
                encode("t", dtype, 0, &[f32::NAN], &mut Vec::new()),
                Err(Error::NotFinite { .. })
            ));
        }
        assert!(matches!(
            encode("t", DType::I8, 0, &[1.0], &mut Vec::new()),
            Err(Error::TensorDtype { .. })
        ));
    }

    #[test]
    fn every_bf16_is_rounded_as_the_crate_half_does_and_bad_numbers_are_found() {
        // Each upper half with lower halves around the middle.
        let lower = [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff];
        let all = (0..=u16::MAX)
            .flat_map(|upper| lower.map(|lower| f32::from_bits(u32::from(upper) << 16 | lower)));
        for value in all {
            let mut out = Vec::new();
            let result = encode("t", DType::BF16, 0, &[value], &mut out);
            let expected = bf16::from_f32(value);
            assert_eq!(result.is_ok(), expected.is_finite(), "{value}");
            if result.is_ok() {
                assert_eq!(out, expected.to_le_bytes(), "{value}");
            }
        }
        let n = 2 * PARALLEL_CHUNK + 13;
        for (dtype, at) in [
            (DType::F32, n - 1),
            (DType::F16, 3),
            (DType::BF16, n - 40),
            (DType::F64, PARALLEL_CHUNK),
        ] {
            let mut bytes = Vec::new();
            encode("t", dtype, 0, &vec![0.5; n], &mut bytes).unwrap();
            assert_eq!(not_finite(dtype, &bytes), None);
            // All bits of the exponent and of what follows.
            let bytes_of_one = &mut bytes[at * dtype.size()..(at + 1) * dtype.size()];
            bytes_of_one.fill(0xff);
            let (index, value) = not_finite(dtype, &bytes).unwrap();
            assert!(index == at && value.is_nan(), "{dtype}");
            let mut values = vec![0.5; n];
            values[at] = f32::INFINITY;
            let mut out = vec![9; 3];
            let error = encode("t", dtype, 5, &values, &mut out).unwrap_err();
            assert!(matches!(error, Error::NotFinite { index, .. } if index == 5 + at));
            assert_eq!(out, [9; 3]);
        }
    }

    #[test]
    fn large_and_unaligned_decoding_agrees_with_one_by_one() {
        let n = 2 * PARALLEL_CHUNK + 13;
        let values: Vec<f32> = (0..n).map(|i| (i as f32 * 0.37).sin()).collect();
        for dtype in [DType::F32, DType::F16, DType::BF16, DType::F64] {
            let mut bytes = vec![7u8]; // shifts the data to an odd address
            encode("t", dtype, 0, &values, &mut bytes).unwrap();
            let back = decode(dtype, &bytes[1..]).unwrap();
            assert_eq!(back.len(), n);
            for (i, (&v, &b)) in values.iter().zip(&back).enumerate() {
                let expected = match dtype {
                    DType::F16 => f16::from_f32(v).to_f32(),
                    DType::BF16 => bf16::from_f32(v).to_f32(),
                    _ => v,
                };
                assert_eq!(b, expected, "{dtype} {i}");
            }
        }
        assert!(decode(DType::I32, &[0; 8]).is_none());
    }
}
