//! LoRA adapters in GGUF files, as llama.cpp's converter writes them.

use std::collections::BTreeMap;
use std::path::Path;

use super::Gguf;
use super::blocks::{Encoding, dequantize_rows};
use super::config::Row;
use super::container::{File, Tensor};
use super::layout::place;
use crate::error::{Error, Result};
use crate::io::tensors::decode;
use crate::io::{HfConfig, LoraAdapter, LoraWeights};
use crate::linalg::Matrix;

impl LoraAdapter {
    /// Reads a LoRA adapter from a GGUF file, for a base model whose configuration is `config`.
    ///
    /// # Errors
    /// Returns the errors of reading a GGUF file. Returns [`Error::Unsupported`] if the file is no
    /// LoRA, or is for another architecture or of an embedding or head; [`Error::InvalidFile`] for an
    /// A without its B; [`Error::TensorShape`] and [`Error::NotFinite`] for an invalid tensor; and
    /// the errors of [`check`](Self::check).
    pub fn open_gguf(path: impl AsRef<Path>, config: &HfConfig) -> Result<Self> {
        let gguf = Gguf::open(path)?;
        let (file, row) = (gguf.first(), Row::of(config)?);
        for (key, expected) in [
            ("general.type", "adapter"),
            ("adapter.type", "lora"),
            ("general.architecture", row.name),
        ] {
            let found = file.text(key)?.unwrap_or("nothing");
            if found != expected {
                let what = format!("key `{key}` = `{found}` (expected `{expected}`)");
                return Err(gguf.unsupported(what));
            }
        }
        let alpha = match file.float("adapter.lora.alpha")? {
            Some(alpha) => alpha as f32,
            None => return Err(file.bad_key("adapter.lora.alpha", "missing")),
        };
        let tensors: BTreeMap<&str, &Tensor> = file
            .tensors
            .iter()
            .map(|tensor| (tensor.name.as_str(), tensor))
            .collect();
        let mut adapter = Self::default();
        for (name, tensor) in &tensors {
            let whole = name
                .strip_suffix(".lora_a")
                .or_else(|| name.strip_suffix(".lora_b"));
            let pair = whole.and_then(|whole| {
                let of = |suffix: &str| tensors.get(format!("{whole}.{suffix}").as_str()).copied();
                Some((whole, of("lora_a")?, of("lora_b")?))
            });
            let Some((whole, a, b)) = pair else {
                let reason = format!("tensor `{name}` is not one of a pair of LoRA tensors");
                return Err(Error::invalid_file(&file.path, reason));
            };
            if tensor.name == b.name {
                continue;
            }
            let (layer, heads) = layer_of(&gguf, row, config, whole)?;
            let weights = weights(file, a, b, heads, alpha)?;
            adapter.layers.insert(layer, weights);
        }
        if adapter.layers.is_empty() {
            return Err(Error::invalid_file(&file.path, "no LoRA tensor"));
        }
        adapter.check(config)?;
        Ok(adapter)
    }
}

/// Returns the module that a tensor belongs to, and the number of heads by which its rows are
/// permuted, if they are.
fn layer_of(
    gguf: &Gguf,
    row: &Row,
    config: &HfConfig,
    tensor: &str,
) -> Result<(String, Option<usize>)> {
    let unknown = || gguf.unsupported(format!("LoRA of the tensor `{tensor}`"));
    let names = row.hf_names(tensor);
    let first = names.first().ok_or_else(unknown)?;
    let layer = first.strip_suffix(".weight").ok_or_else(unknown)?;
    if names.len() == 1 {
        let linears = config.arch().linears();
        if !linears.iter().any(|linear| linear.name == *layer) {
            return Err(unknown());
        }
        return Ok((layer.into(), row.permuted_heads(first, config.blocks())));
    }
    // A matrix that holds several layers.
    let fused = config.arch().fused();
    let holds = |parts: &[(String, _)]| parts.first().is_some_and(|(part, _)| part == layer);
    let matrix = fused.into_iter().find(|matrix| holds(&matrix.parts));
    Ok((matrix.ok_or_else(unknown)?.name, None))
}

fn weights(
    file: &File,
    a: &Tensor,
    b: &Tensor,
    heads: Option<usize>,
    alpha: f32,
) -> Result<LoraWeights> {
    let (a, b) = (matrix(file, a)?, matrix(file, b)?);
    let rank = a.rows();
    // llama.cpp takes an alpha of 0 for no scale.
    let scale = match alpha {
        0.0 => 1.0,
        alpha => alpha / rank.max(1) as f32,
    };
    let b = match heads {
        Some(heads) if heads > 0 && b.rows().is_multiple_of(2 * heads) => {
            let size = b.rows() / heads;
            Matrix::from_fn(b.rows(), b.cols(), |i, k| b.row(place(i, size))[k])
        }
        Some(_) => {
            let reason = format!("{} rows, no multiple of two for each head", b.rows());
            return Err(Error::invalid_file(&file.path, reason));
        }
        None => b,
    };
    LoraWeights::new(a, b, scale)
}

/// Loads a matrix as finite numbers.
fn matrix(file: &File, tensor: &Tensor) -> Result<Matrix> {
    let &[rows, cols] = tensor.shape.as_slice() else {
        let reason = format!(
            "tensor `{}`: shape {:?}, no matrix",
            tensor.name, tensor.shape
        );
        return Err(Error::invalid_file(&file.path, reason));
    };
    let bytes = file.bytes.as_ref();
    let bytes = bytes.get(tensor.range.clone()).unwrap_or_default();
    let values = match tensor.encoding {
        Encoding::Plain(dtype) => decode(dtype, bytes),
        Encoding::Blocks(blocks) => {
            let size = (bytes.len() / rows.max(1)).max(1);
            let all: Vec<&[u8]> = bytes.chunks_exact(size).collect();
            Some(dequantize_rows(blocks, &all, cols))
        }
    };
    let Some(values) = values else {
        let reason = format!("tensor `{}` holds no numbers", tensor.name);
        return Err(Error::invalid_file(&file.path, reason));
    };
    if let Some(index) = values.iter().position(|value| !value.is_finite()) {
        return Err(Error::NotFinite {
            tensor: tensor.name.clone(),
            index,
            value: values[index],
        });
    }
    Matrix::new(rows, cols, values)
}
