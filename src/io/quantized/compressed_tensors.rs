//! Tensors of a linear layer in compressed-tensors' `pack-quantized` format. The layer is
//! `[out, in]`, with groups along the input:
//!
//! | tensor | shape | content |
//! |---|---|---|
//! | `weight_packed` | I32 `[out, ceil(in * bits / 32)]` | codes, packed along the input |
//! | `weight_scale` | float `[out, groups]` | scales |
//! | `weight_zero_point` | I32 `[ceil(out * bits / 32), groups]` | zero points, packed along the output; absent if symmetric |
//! | `weight_shape` | I64 `[2]` | `[out, in]` |
//! | `weight_g_idx` | I32 `[in]` | group of each input: read but not written, since newer readers ignore it |
//!
//! The format's integers are signed. The packed code is the integer plus `2^(bits - 1)`, and
//! likewise for the zero point. 3-bit codes are refused, because older versions pack ten codes per
//! word and newer versions pack them without gaps.

use super::config::QuantizationConfig;
use super::layout::{self, tensor_name, wrong};
use crate::error::{Error, Result};
use crate::format::{QuantizedMatrix, QuantizedParts};
use crate::io::{Checkpoint, DType, HostTensor};

pub(super) const CODES: &str = "weight_packed";
const ZEROS: &str = "weight_zero_point";
const SCALES: &str = "weight_scale";
const SHAPE: &str = "weight_shape";
const GROUP_OF: &str = "weight_g_idx";
/// All of them.
pub(super) const TENSORS: [&str; 5] = [CODES, ZEROS, SCALES, SHAPE, GROUP_OF];

pub(super) fn check(
    config: &QuantizationConfig,
    checkpoint: &Checkpoint,
    layer: &str,
    [rows, cols]: [usize; 2],
) -> Result<()> {
    let bits = config.bits();
    let groups = cols.div_ceil(config.group_size().unwrap_or(cols));
    let name = |suffix: &str| tensor_name(layer, suffix);
    layout::check(
        checkpoint,
        &name(CODES),
        &[DType::I32],
        &[rows, layout::word_count(cols, bits)],
    )?;
    layout::check_floats(checkpoint, &name(SCALES), &[rows, groups])?;
    if !config.symmetric() {
        let packed = [layout::word_count(rows, bits), groups];
        layout::check(checkpoint, &name(ZEROS), &[DType::I32], &packed)?;
    } else if checkpoint.contains(&name(ZEROS)) {
        return Err(wrong(
            checkpoint,
            &name(ZEROS),
            "zero points, but the config says that the grid is symmetric",
        ));
    }
    layout::check(checkpoint, &name(SHAPE), &[DType::I64, DType::I32], &[2])?;
    let bytes = checkpoint.bytes(&name(SHAPE))?;
    let stored: Vec<i64> = match checkpoint.info(&name(SHAPE))?.dtype {
        DType::I64 => bytes
            .as_chunks::<8>()
            .0
            .iter()
            .map(|b| i64::from_le_bytes(*b))
            .collect(),
        _ => bytes
            .as_chunks::<4>()
            .0
            .iter()
            .map(|b| i32::from_le_bytes(*b).into())
            .collect(),
    };
    if !stored.iter().copied().eq([rows as i64, cols as i64]) {
        return Err(wrong(
            checkpoint,
            &name(SHAPE),
            format!("{stored:?}, expected {:?}", [rows, cols]),
        ));
    }
    if checkpoint.contains(&name(GROUP_OF)) {
        layout::check(checkpoint, &name(GROUP_OF), &[DType::I32], &[cols])?;
    }
    Ok(())
}

/// Reads the tensors of a layer that was checked.
pub(super) fn read(
    config: &QuantizationConfig,
    checkpoint: &Checkpoint,
    layer: &str,
    [rows, cols]: [usize; 2],
) -> Result<QuantizedParts> {
    let bits = config.bits();
    let group_size = config.group_size().unwrap_or(cols);
    let groups = cols.div_ceil(group_size);
    let codes = layout::unpack_rows(
        layout::words(checkpoint, &tensor_name(layer, CODES))?,
        cols,
        bits,
    );
    let middle = 1 << (bits - 1);
    let zeros = if config.symmetric() {
        vec![middle; rows * groups]
    } else {
        let words = layout::words(checkpoint, &tensor_name(layer, ZEROS))?;
        let words = layout::transposed(words, layout::word_count(rows, bits), groups);
        layout::transposed(&layout::unpack_rows(&words, rows, bits), groups, rows)
    };
    let name = tensor_name(layer, GROUP_OF);
    // Versions with this tensor fill it with -1 if it is not used.
    let used = checkpoint.contains(&name)
        && layout::words(checkpoint, &name)?
            .iter()
            .any(|word| *word != [0xFF; 4]);
    let group_of = if used {
        layout::column_groups(checkpoint, &name, group_size, groups)?
    } else if config.act_order() {
        return Err(Error::MissingTensor {
            path: checkpoint.path().to_path_buf(),
            tensor: name,
        });
    } else {
        None
    };
    Ok(QuantizedParts {
        rows,
        cols,
        bits,
        group_size,
        symmetric: zeros.iter().all(|zero| *zero == middle),
        codes,
        scales: checkpoint.load_f32(&tensor_name(layer, SCALES))?,
        zeros,
        group_of,
    })
}

pub(super) fn tensors<'a>(
    config: &QuantizationConfig,
    layer: &str,
    matrix: &'a QuantizedMatrix,
) -> Result<Vec<HostTensor<'a>>> {
    let parts = matrix.parts();
    let (rows, cols, bits, groups) = (parts.rows, parts.cols, parts.bits, matrix.groups());
    let name = |suffix: &str| tensor_name(layer, suffix);
    let unsupported = |suffix: &str, what: String| {
        Err(Error::Unsupported {
            what: format!("tensor `{}`: {what}", name(suffix)),
        })
    };
    if rows == 0 || cols == 0 {
        return unsupported(
            CODES,
            format!("a weight of {rows} x {cols} in compressed-tensors"),
        );
    }
    if parts.group_of.is_some() {
        return unsupported(
            GROUP_OF,
            "columns whose groups are out of order, in compressed-tensors (GPTQ can)".into(),
        );
    }
    if groups > 1 && !cols.is_multiple_of(parts.group_size) {
        let what = format!(
            "{cols} inputs in groups of {}, which do not divide them, in compressed-tensors",
            parts.group_size
        );
        return unsupported(SCALES, what);
    }
    let shape: Vec<u8> = [rows as i64, cols as i64]
        .iter()
        .flat_map(|n| n.to_le_bytes())
        .collect();
    let mut tensors = vec![
        layout::words_tensor(
            name(CODES),
            [rows, layout::word_count(cols, bits)],
            move || layout::pack_rows(&parts.codes, cols, bits),
        ),
        HostTensor::from_f32(
            name(SCALES),
            layout::scale_dtype(&parts.scales),
            [rows, groups],
            &parts.scales,
        ),
        HostTensor::from_bytes(name(SHAPE), DType::I64, [2], shape),
    ];
    if !config.symmetric() {
        let per_group = layout::word_count(rows, bits);
        tensors.push(layout::words_tensor(
            name(ZEROS),
            [per_group, groups],
            move || {
                let zeros = layout::transposed(&parts.zeros, rows, groups);
                layout::transposed(&layout::pack_rows(&zeros, rows, bits), groups, per_group)
            },
        ));
    }
    Ok(tensors)
}
