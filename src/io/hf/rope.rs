//! Parses the settings of the rotary embedding, in all spellings that configs use.

use serde_json::{Map, Value, json};

use crate::arch::RopeScaling;
use crate::error::{Error, Result};
use crate::io::fields::{Fields, bad_field};

/// Default base of transformers.
const DEFAULT_THETA: f64 = 10_000.0;

/// Reads `rope_theta` and `rope_scaling` (transformers before 5) and `rope_parameters`
/// (transformers 5 and later). If a file has both they must agree, because different readers would
/// use different ones.
pub(super) fn parse(raw: &Map<String, Value>) -> Result<(f64, RopeScaling)> {
    let top = Fields {
        map: raw,
        prefix: "",
    };
    let old_theta = top.f64("rope_theta")?;
    let old = dict(raw, "rope_scaling")?
        .map(|m| parse_dict("rope_scaling.", m))
        .transpose()?;
    let new = dict(raw, "rope_parameters")?
        .map(|m| parse_dict("rope_parameters.", m))
        .transpose()?;
    if let (Some((_, old)), Some((_, new))) = (&old, &new)
        && old != new
    {
        return Err(bad_field(
            "rope_parameters",
            format!("{new:?}, but rope_scaling is {old:?}"),
        ));
    }
    let mut theta = None;
    let named = [
        ("rope_parameters.rope_theta", new.and_then(|(t, _)| t)),
        ("rope_scaling.rope_theta", old.and_then(|(t, _)| t)),
        ("rope_theta", old_theta),
    ];
    for (field, value) in named {
        match (theta, value) {
            (None, Some(v)) => theta = Some((field, v)),
            (Some((first, v)), Some(w)) if v != w => {
                return Err(bad_field(field, format!("{w}, but {first} is {v}")));
            }
            _ => {}
        }
    }
    let theta = theta.map_or(DEFAULT_THETA, |(_, v)| v);
    if !(theta.is_finite() && theta > 0.0) {
        return Err(bad_field(
            "rope_theta",
            format!("{theta}, expected a positive number"),
        ));
    }
    Ok((theta, new.or(old).map_or(RopeScaling::Default, |(_, s)| s)))
}

/// Returns the value of `rope_scaling` for these settings.
pub(super) fn value(scaling: RopeScaling) -> Value {
    match scaling {
        RopeScaling::Default => Value::Null,
        RopeScaling::Linear { factor } => json!({ "rope_type": "linear", "factor": factor }),
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } => json!({
            "rope_type": "llama3", "factor": factor, "low_freq_factor": low_freq_factor,
            "high_freq_factor": high_freq_factor,
            "original_max_position_embeddings": original_max_position_embeddings,
        }),
    }
}

fn dict<'a>(raw: &'a Map<String, Value>, field: &str) -> Result<Option<&'a Map<String, Value>>> {
    match raw.get(field) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Object(map)) => Ok(Some(map)),
        Some(other) => Err(bad_field(field, format!("{other}, expected an object"))),
    }
}

fn parse_dict(
    prefix: &'static str,
    map: &Map<String, Value>,
) -> Result<(Option<f64>, RopeScaling)> {
    let fields = Fields { map, prefix };
    let theta = fields.f64("rope_theta")?;
    if let Some(share) = fields.f64("partial_rotary_factor")?
        && share != 1.0
    {
        return Err(Error::Unsupported {
            what: format!("config field `{prefix}partial_rotary_factor` = {share}"),
        });
    }
    // `rope_type`, which Llama 3.1 introduced, takes precedence over `type`, as in transformers.
    let kind = match fields.str("rope_type")? {
        Some(kind) => kind,
        None => fields.str("type")?.unwrap_or("default"),
    };
    let scaling = match kind {
        "default" => RopeScaling::Default,
        "linear" => RopeScaling::Linear {
            factor: factor(&fields)?,
        },
        "llama3" => {
            let low_freq_factor = fields.required_f64("low_freq_factor")?;
            let high_freq_factor = fields.required_f64("high_freq_factor")?;
            if !(low_freq_factor > 0.0
                && high_freq_factor > low_freq_factor
                && high_freq_factor.is_finite())
            {
                return Err(bad_field(
                    format!("{prefix}high_freq_factor"),
                    format!(
                        "{high_freq_factor}, expected more than low_freq_factor = {low_freq_factor}, and that over 0"
                    ),
                ));
            }
            RopeScaling::Llama3 {
                factor: factor(&fields)?,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings: fields
                    .required_size("original_max_position_embeddings", 1 << 31)?,
            }
        }
        other => {
            return Err(Error::Unsupported {
                what: format!("rotary embedding of kind `{other}`"),
            });
        }
    };
    Ok((theta, scaling))
}

fn factor(fields: &Fields<'_>) -> Result<f64> {
    let factor = fields.required_f64("factor")?;
    if !(factor.is_finite() && factor >= 1.0) {
        return Err(bad_field(
            format!("{}factor", fields.prefix),
            format!("{factor}, expected a number of at least 1"),
        ));
    }
    Ok(factor)
}
