//! Formats of weights by their names.

use clap::ValueEnum;
use elastic_lora::format::WeightFormat;
use elastic_lora::runtime::{Activations, FormatPlan};
use elastic_lora::{Error, Result};

/// Integers to which the inputs of integer weights are rounded.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Inputs {
    /// 16 bits, 128 inputs share a scale
    Int16,
    /// 8 bits, 32 inputs share a scale with AVX-512, and 128 without; faster, and less exact
    Int8,
}

impl From<Inputs> for Activations {
    fn from(inputs: Inputs) -> Self {
        match inputs {
            Inputs::Int16 => Self::Int16,
            Inputs::Int8 => Self::Int8,
        }
    }
}

/// Returns the format of a name, with groups of this size if it holds integers.
pub fn parse(text: &str, group_size: usize) -> Result<WeightFormat> {
    let group_size = Some(group_size);
    let int = |bits| WeightFormat::Int {
        bits,
        group_size,
        symmetric: false,
    };
    Ok(match text {
        "f32" => WeightFormat::F32,
        "f16" => WeightFormat::F16,
        "bf16" => WeightFormat::Bf16,
        "sparse-f16" => WeightFormat::SparseF16,
        "sparse-bf16" => WeightFormat::SparseBf16,
        "int8" => int(8),
        "int4" => int(4),
        "sparse-int4" => WeightFormat::SparseInt4 {
            group_size,
            symmetric: false,
        },
        other => {
            let pattern = other
                .split_once(':')
                .and_then(|(n, m)| Some((n.parse().ok()?, m.parse().ok()?)));
            let Some((n, m)) = pattern else {
                let expected = "a format that --help names";
                return Err(Error::argument("format", other, expected));
            };
            WeightFormat::NmF16 { n, m }
        }
    })
}

/// Returns the formats of the layers, and of the embedding and the head, if any is asked for.
pub fn plan(
    format: Option<&str>,
    embedding: Option<&str>,
    group_size: usize,
) -> Result<Option<FormatPlan>> {
    let format = format.map(|text| parse(text, group_size)).transpose()?;
    let embedding = embedding.map(|text| parse(text, group_size)).transpose()?;
    let plan = format.map(FormatPlan::new);
    Ok(match embedding {
        Some(format) => Some(
            plan.unwrap_or_default()
                .with_embedding(format)
                .with_head(format),
        ),
        None => plan,
    })
}
