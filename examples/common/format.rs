//! Formats of weights by their names.

use elastic_lora::format::WeightFormat;
use elastic_lora::runtime::FormatPlan;
use elastic_lora::{Error, Result};

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
