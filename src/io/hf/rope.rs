//! Parses the settings of the rotary embedding, in all spellings that configs use.

use serde_json::{Map, Value, json};

use super::config::MAX_POSITIONS;
use crate::arch::{RopeConfig, RopeScaling};
use crate::error::{Error, Result};
use crate::io::fields::{Fields, bad_field};

/// The object of transformers 5 and later, and the older one beside `rope_theta`.
const NEW: &str = "rope_parameters";
const OLD: &str = "rope_scaling";

/// Names under which either object may hold one object for each kind of layer.
const FULL: &str = "full_attention";
const SLIDING: &str = "sliding_attention";

/// What a family assumes where its config says nothing.
#[derive(Clone, Copy, Debug)]
pub(super) struct Defaults {
    /// Base of the frequencies.
    pub theta: f64,
    /// Base in the layers with a sliding window, if it is another one there. `rope_local_base_freq`
    /// states it, and these layers are not scaled with the others.
    pub sliding_theta: Option<f64>,
    /// Share of a head's features that are rotated; `None` if the family always rotates all of
    /// them.
    pub partial: Option<f64>,
    /// Context length of the original training. Like the top-level field that states it, it
    /// supersedes what the objects say.
    pub original_max_positions: Option<usize>,
    /// Whether the family's first files say `yarn` and mean `longrope`.
    pub yarn_is_longrope: bool,
}

/// The rotary embeddings of a model.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Parsed {
    /// The embedding of the layers that attend to all positions, and of all others if `sliding` is
    /// `None`.
    pub full: RopeConfig,
    /// The embedding of the layers with a sliding window, if theirs is another one.
    pub sliding: Option<RopeConfig>,
}

/// Reads `rope_theta` and `rope_scaling` (transformers before 5) and `rope_parameters`
/// (transformers 5 and later). If a file has both they must agree, because different readers would
/// use different ones.
///
/// # Errors
/// Returns [`Error::Unsupported`] for an unknown kind of embedding, and [`Error::InvalidConfig`] if
/// a field is missing, of another type, out of range, or contradicts another one.
pub(super) fn parse(
    raw: &Map<String, Value>,
    head_dim: usize,
    max_positions: usize,
    defaults: &Defaults,
) -> Result<Parsed> {
    let top = Fields {
        map: raw,
        prefix: "",
    };
    let original = top
        .size("original_max_position_embeddings", MAX_POSITIONS)?
        .or(defaults.original_max_positions);
    let context = Context {
        head_dim,
        max_positions,
        defaults,
    };
    let (new, old) = (objects(raw, NEW)?, objects(raw, OLD)?);
    // In transformers, the flat new spelling says nothing to such a family.
    if defaults.sliding_theta.is_some()
        && let Some(Objects { nested: false, .. }) = new
    {
        return Err(bad_field(
            NEW,
            format!("expected the objects `{FULL}` and `{SLIDING}`"),
        ));
    }
    let nested = [&new, &old].into_iter().flatten().any(|o| o.nested);
    // The length at the top concerns the settings for all layers.
    let original = original.filter(|_| !nested);
    let full = [&new, &old].map(|objects| objects.as_ref().and_then(|o| o.full.as_ref()));
    let sliding = [&new, &old].map(|objects| objects.as_ref().and_then(|o| o.sliding.as_ref()));

    let whole = context.embedding(&full, &top, "rope_theta", defaults.theta, original)?;
    let sliding = match defaults.sliding_theta {
        Some(theta) => {
            Some(context.embedding(&sliding, &top, "rope_local_base_freq", theta, None)?)
        }
        None if sliding.iter().any(Option::is_some) => {
            Some(context.embedding(&sliding, &top, "rope_theta", defaults.theta, None)?)
        }
        None => None,
    };
    Ok(Parsed {
        sliding: sliding.filter(|sliding| *sliding != whole),
        full: whole,
    })
}

/// Returns the value of `rope_scaling` for these settings. The base and the number of rotated
/// features have fields of their own.
pub(super) fn value(config: &RopeConfig) -> Value {
    match &config.scaling {
        RopeScaling::Default => Value::Null,
        RopeScaling::Linear { factor } => json!({ "rope_type": "linear", "factor": factor }),
        // The length from which it scales is the model's context length.
        RopeScaling::Dynamic { factor, .. } => json!({ "rope_type": "dynamic", "factor": factor }),
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
        RopeScaling::Yarn {
            factor,
            original_max_position_embeddings,
            attention_factor,
            beta_fast,
            beta_slow,
            truncate,
        } => json!({
            "rope_type": "yarn", "factor": factor, "attention_factor": attention_factor,
            "beta_fast": beta_fast, "beta_slow": beta_slow, "truncate": truncate,
            "original_max_position_embeddings": original_max_position_embeddings,
        }),
        RopeScaling::LongRope {
            short_factor,
            long_factor,
            original_max_position_embeddings,
            attention_factor,
        } => json!({
            "rope_type": "longrope", "short_factor": short_factor, "long_factor": long_factor,
            "attention_factor": attention_factor,
            "original_max_position_embeddings": original_max_position_embeddings,
        }),
    }
}

/// An object of settings and the prefix of its fields in errors.
struct Object<'a> {
    map: &'a Map<String, Value>,
    prefix: String,
}

impl Object<'_> {
    fn fields(&self) -> Fields<'_> {
        Fields {
            map: self.map,
            prefix: &self.prefix,
        }
    }
}

/// One spelling's settings for each kind of layer.
struct Objects<'a> {
    nested: bool,
    full: Option<Object<'a>>,
    sliding: Option<Object<'a>>,
}

fn dict<'a>(raw: &'a Map<String, Value>, prefix: &str, field: &str) -> Result<Option<Object<'a>>> {
    match raw.get(field) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Object(map)) => Ok(Some(Object {
            map,
            prefix: format!("{prefix}{field}."),
        })),
        Some(other) => Err(bad_field(
            format!("{prefix}{field}"),
            format!("{other}, expected an object"),
        )),
    }
}

fn objects<'a>(raw: &'a Map<String, Value>, field: &str) -> Result<Option<Objects<'a>>> {
    let Some(object) = dict(raw, "", field)?.filter(|object| !object.map.is_empty()) else {
        return Ok(None);
    };
    let nested = [FULL, SLIDING]
        .iter()
        .any(|name| object.map.contains_key(*name));
    if !nested {
        return Ok(Some(Objects {
            nested,
            full: Some(object),
            sliding: None,
        }));
    }
    // A field beside the two objects would belong to neither.
    let other = object
        .map
        .keys()
        .find(|key| ![FULL, SLIDING].contains(&key.as_str()));
    if let Some(key) = other {
        return Err(Error::Unsupported {
            what: format!("config field `{}{key}` beside `{FULL}`", object.prefix),
        });
    }
    Ok(Some(Objects {
        nested,
        full: dict(object.map, &object.prefix, FULL)?,
        sliding: dict(object.map, &object.prefix, SLIDING)?,
    }))
}

/// What the settings of a rotary embedding depend on.
struct Context<'a> {
    head_dim: usize,
    max_positions: usize,
    defaults: &'a Defaults,
}

impl Context<'_> {
    /// Merges the spellings of one embedding, which are in order of precedence. `theta_field` is
    /// the field at the top that states its base, and `original` a length that supersedes that of
    /// the objects.
    fn embedding(
        &self,
        objects: &[Option<&Object<'_>>],
        top: &Fields<'_>,
        theta_field: &'static str,
        default_theta: f64,
        original: Option<usize>,
    ) -> Result<RopeConfig> {
        let objects = || objects.iter().copied().flatten();
        let theta = self.number(objects(), "rope_theta", top, theta_field)?;
        let theta = theta.unwrap_or(default_theta);
        if !(theta.is_finite() && theta > 0.0 && (theta as f32).is_normal()) {
            return Err(bad_field(
                theta_field,
                format!("{theta}, expected a positive number"),
            ));
        }
        let field = "partial_rotary_factor";
        let share = self.number(objects(), field, top, field)?;
        let dims = self.dims(share)?;
        let mut found: Option<(&Object<'_>, RopeScaling)> = None;
        for object in objects() {
            let scaling = self.scaling(&object.fields(), theta, dims, original)?;
            match &found {
                Some((first, other)) if *other != scaling => {
                    let (field, first) = (&object.prefix, &first.prefix);
                    return Err(bad_field(
                        field.trim_end_matches('.'),
                        format!(
                            "{scaling:?}, but {} is {other:?}",
                            first.trim_end_matches('.')
                        ),
                    ));
                }
                Some(_) => {}
                None => found = Some((object, scaling)),
            }
        }
        Ok(RopeConfig {
            theta,
            scaling: found.map_or(RopeScaling::Default, |(_, scaling)| scaling),
            dims,
        })
    }

    /// Returns a number that any of the objects or the top may state, under different names.
    fn number<'a>(
        &self,
        objects: impl Iterator<Item = &'a Object<'a>>,
        name: &str,
        top: &Fields<'_>,
        top_name: &str,
    ) -> Result<Option<f64>> {
        let mut all = Vec::new();
        for object in objects {
            let value = object.fields().f64(name)?;
            all.extend(value.map(|value| (format!("{}{name}", object.prefix), value)));
        }
        all.extend(
            top.f64(top_name)?
                .map(|value| (top_name.to_string(), value)),
        );
        match all.as_slice() {
            [] => Ok(None),
            [(first, value), others @ ..] => match others.iter().find(|(_, v)| v != value) {
                Some((field, other)) => {
                    Err(bad_field(field, format!("{other}, but {first} is {value}")))
                }
                None => Ok(Some(*value)),
            },
        }
    }

    /// Number of rotated features.
    fn dims(&self, share: Option<f64>) -> Result<usize> {
        let field = "partial_rotary_factor";
        let share = match (share, self.defaults.partial) {
            (Some(share), None) if share != 1.0 => {
                return Err(Error::Unsupported {
                    what: format!("config field `{field}` = {share}"),
                });
            }
            (share, default) => share.or(default).unwrap_or(1.0),
        };
        if !(share > 0.0 && share <= 1.0) {
            return Err(bad_field(
                field,
                format!("{share}, expected a number above 0 and up to 1"),
            ));
        }
        // Truncated as transformers does.
        let dims = (self.head_dim as f64 * share) as usize;
        if dims == 0 || !dims.is_multiple_of(2) {
            return Err(bad_field(
                field,
                format!(
                    "{share} of head_dim = {} are {dims} features; the rotary embedding rotates pairs",
                    self.head_dim
                ),
            ));
        }
        Ok(dims)
    }

    fn scaling(
        &self,
        fields: &Fields<'_>,
        theta: f64,
        dims: usize,
        original: Option<usize>,
    ) -> Result<RopeScaling> {
        // `rope_type`, which Llama 3.1 introduced, takes precedence over `type`, as in transformers.
        let kind = match fields.str("rope_type")? {
            Some(kind) => kind,
            None => fields.str("type")?.unwrap_or("default"),
        };
        let bad =
            |field: &str, reason: String| bad_field(format!("{}{field}", fields.prefix), reason);
        // The length of the original training.
        let original = || {
            let field = "original_max_position_embeddings";
            let stated = fields.size(field, MAX_POSITIONS)?;
            Ok::<_, Error>(original.or(stated).unwrap_or(self.max_positions))
        };
        let stretch = || Ok::<_, Error>(self.max_positions as f64 / original()? as f64);
        match kind {
            "default" => Ok(RopeScaling::Default),
            "linear" => Ok(RopeScaling::Linear {
                factor: required_factor(fields)?,
            }),
            "dynamic" if dims <= 2 => Err(bad(
                "rope_type",
                format!("dynamic needs more than {dims} rotated features"),
            )),
            "dynamic" => Ok(RopeScaling::Dynamic {
                factor: required_factor(fields)?,
                original_max_position_embeddings: self.max_positions,
            }),
            "llama3" => {
                let low_freq_factor = fields.required_f64("low_freq_factor")?;
                let high_freq_factor = fields.required_f64("high_freq_factor")?;
                if !(low_freq_factor > 0.0
                    && high_freq_factor > low_freq_factor
                    && high_freq_factor.is_finite())
                {
                    return Err(bad(
                        "high_freq_factor",
                        format!(
                            "{high_freq_factor}, expected more than low_freq_factor = {low_freq_factor}, and that over 0"
                        ),
                    ));
                }
                Ok(RopeScaling::Llama3 {
                    factor: required_factor(fields)?,
                    low_freq_factor,
                    high_freq_factor,
                    original_max_position_embeddings: original()?,
                })
            }
            "yarn" if !self.defaults.yarn_is_longrope => {
                if theta <= 1.0 {
                    return Err(bad(
                        "rope_theta",
                        format!("{theta}, but yarn needs more than 1"),
                    ));
                }
                let factor = match factor(fields)? {
                    Some(factor) => factor,
                    None => at_least_1(fields, "factor", stretch()?)?,
                };
                // Like transformers, these take 0 as absent.
                let turns = |name: &str, default: f64| match fields.f64(name)? {
                    Some(turns) if turns != 0.0 => positive(fields, name, turns),
                    _ => Ok(default),
                };
                let mscale = |name: &str| match fields.f64(name)? {
                    Some(scale) if scale != 0.0 => positive(fields, name, scale).map(Some),
                    _ => Ok(None),
                };
                let grown = |scale: f64| 0.1 * scale * factor.ln() + 1.0;
                let derived = match (mscale("mscale")?, mscale("mscale_all_dim")?) {
                    (Some(one), Some(all)) => grown(one) / grown(all),
                    _ => grown(1.0),
                };
                Ok(RopeScaling::Yarn {
                    factor,
                    original_max_position_embeddings: original()?,
                    attention_factor: attention_factor(fields)?.unwrap_or(derived),
                    beta_fast: turns("beta_fast", 32.0)?,
                    beta_slow: turns("beta_slow", 1.0)?,
                    truncate: fields.bool("truncate")?.unwrap_or(true),
                })
            }
            "longrope" | "su" | "yarn" => {
                let original = original()?;
                let factor = match factor(fields)? {
                    Some(factor) => factor,
                    None => stretch()?,
                };
                let attention_factor = match attention_factor(fields)? {
                    Some(factor) => factor,
                    None if factor <= 1.0 => 1.0,
                    None if original < 2 => {
                        let reason = format!("{original}, expected at least 2");
                        return Err(bad("original_max_position_embeddings", reason));
                    }
                    None => (1.0 + factor.ln() / (original as f64).ln()).sqrt(),
                };
                Ok(RopeScaling::LongRope {
                    short_factor: divisors(fields, "short_factor", dims / 2)?,
                    long_factor: divisors(fields, "long_factor", dims / 2)?,
                    original_max_position_embeddings: original,
                    attention_factor,
                })
            }
            other => Err(Error::Unsupported {
                what: format!("rotary embedding of kind `{other}`"),
            }),
        }
    }
}

fn out_of_range(fields: &Fields<'_>, name: &str, found: f64, expected: &str) -> Error {
    let prefix = fields.prefix;
    bad_field(
        format!("{prefix}{name}"),
        format!("{found}, expected {expected}"),
    )
}

fn at_least_1(fields: &Fields<'_>, name: &str, value: f64) -> Result<f64> {
    if value.is_finite() && value >= 1.0 {
        return Ok(value);
    }
    Err(out_of_range(fields, name, value, "a number of at least 1"))
}

fn positive(fields: &Fields<'_>, name: &str, value: f64) -> Result<f64> {
    // What is too small or too large for f32 would become zero or infinite in the tables.
    if value > 0.0 && (value as f32).is_normal() {
        return Ok(value);
    }
    Err(out_of_range(fields, name, value, "a positive number"))
}

fn factor(fields: &Fields<'_>) -> Result<Option<f64>> {
    let factor = fields.f64("factor")?;
    factor
        .map(|factor| at_least_1(fields, "factor", factor))
        .transpose()
}

fn required_factor(fields: &Fields<'_>) -> Result<f64> {
    at_least_1(fields, "factor", fields.required_f64("factor")?)
}

fn attention_factor(fields: &Fields<'_>) -> Result<Option<f64>> {
    let name = "attention_factor";
    fields
        .f64(name)?
        .map(|factor| positive(fields, name, factor))
        .transpose()
}

/// Returns a list of `len` divisors of frequencies.
fn divisors(fields: &Fields<'_>, name: &str, len: usize) -> Result<Vec<f64>> {
    let bad = |reason: String| bad_field(format!("{}{name}", fields.prefix), reason);
    let list = match fields.map.get(name) {
        None | Some(Value::Null) => return Err(bad("missing".into())),
        Some(Value::Array(list)) => list,
        Some(_) => return Err(bad("expected a list of numbers".into())),
    };
    if list.len() != len {
        return Err(bad(format!(
            "{} numbers, expected {len}, one for each pair of rotated features",
            list.len()
        )));
    }
    let number = |(i, value): (usize, &Value)| match value.as_f64() {
        Some(value) => positive(fields, &format!("{name}[{i}]"), value),
        None => Err(bad(format!("{value} at {i}, expected a number"))),
    };
    list.iter().enumerate().map(number).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LLAMA: Defaults = Defaults {
        theta: 1e4,
        sliding_theta: None,
        partial: None,
        original_max_positions: None,
        yarn_is_longrope: false,
    };
    const GEMMA3: Defaults = Defaults {
        theta: 1e6,
        sliding_theta: Some(1e4),
        ..LLAMA
    };
    const PHI3: Defaults = Defaults {
        partial: Some(1.0),
        original_max_positions: Some(4096),
        yarn_is_longrope: true,
        ..LLAMA
    };

    /// Parses the settings of a model with heads of 16 features and a context of 4096.
    fn read(value: Value, defaults: &Defaults) -> Result<Parsed> {
        match value {
            Value::Object(raw) => parse(&raw, 16, 4096, defaults),
            other => panic!("{other}"),
        }
    }

    #[track_caller]
    fn full(value: Value, defaults: &Defaults) -> RopeConfig {
        let parsed = read(value, defaults).unwrap();
        assert_eq!(parsed.sliding, None);
        parsed.full
    }

    fn yarn(fields: Value) -> Value {
        let mut yarn = json!({"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6,
            "original_max_position_embeddings": 1024});
        let (Value::Object(all), Value::Object(fields)) = (&mut yarn, fields) else {
            panic!("expected objects");
        };
        all.extend(fields);
        json!({"rope_parameters": yarn})
    }

    fn longrope(kind: &str, fields: Value) -> Value {
        let mut scaling = json!({"type": kind, "short_factor": [1.0, 1.1, 1.25, 1.5, 2, 3.0],
            "long_factor": [1, 2.0, 4.0, 7.5, 12.0, 32.0]});
        let (Value::Object(all), Value::Object(fields)) = (&mut scaling, fields) else {
            panic!("expected objects");
        };
        all.extend(fields);
        json!({"rope_theta": 1e4, "partial_rotary_factor": 0.75, "rope_scaling": scaling})
    }

    #[test]
    fn absent_settings_are_those_of_the_family() {
        assert_eq!(full(json!({}), &LLAMA), RopeConfig::new(1e4, 16));
        let null = json!({"rope_scaling": null, "rope_parameters": {}, "rope_theta": 5e5});
        assert_eq!(full(null, &LLAMA), RopeConfig::new(5e5, 16));
        let half = Defaults {
            partial: Some(0.5),
            ..LLAMA
        };
        assert_eq!(full(json!({}), &half), RopeConfig::new(1e4, 8));
        let stated = json!({"partial_rotary_factor": 0.75});
        assert_eq!(full(stated, &half), RopeConfig::new(1e4, 12));
        // 0.4 * 16 is 6.4.
        let stated = json!({"rope_parameters": {"partial_rotary_factor": 0.4}});
        assert_eq!(full(stated, &half).dims, 6);
        let gemma = read(json!({}), &GEMMA3).unwrap();
        assert_eq!(gemma.full, RopeConfig::new(1e6, 16));
        assert_eq!(gemma.sliding, Some(RopeConfig::new(1e4, 16)));
    }

    #[test]
    fn lengths_of_the_original_training_come_from_the_top_first() {
        let original = |value: Value, defaults: &Defaults| match full(value, defaults).scaling {
            RopeScaling::Llama3 {
                original_max_position_embeddings,
                ..
            } => original_max_position_embeddings,
            other => panic!("{other:?}"),
        };
        let llama3 = |fields: Value| {
            let mut value = json!({"rope_scaling": {"rope_type": "llama3", "factor": 8,
                "low_freq_factor": 1, "high_freq_factor": 4}});
            for (key, length) in fields.as_object().unwrap() {
                let at = match key.as_str() {
                    "top" => &mut value,
                    _ => &mut value["rope_scaling"],
                };
                at["original_max_position_embeddings"] = length.clone();
            }
            value
        };
        assert_eq!(original(llama3(json!({})), &LLAMA), 4096);
        assert_eq!(original(llama3(json!({"in": 512})), &LLAMA), 512);
        let both = llama3(json!({"in": 512, "top": 256}));
        assert_eq!(original(both, &LLAMA), 256);
        assert_eq!(original(llama3(json!({"in": 512})), &PHI3), 4096);
        // Dynamic scaling starts at the context length.
        let dynamic = json!({"rope_scaling": {"type": "dynamic", "factor": 2}});
        let scaling = RopeScaling::Dynamic {
            factor: 2.0,
            original_max_position_embeddings: 4096,
        };
        assert_eq!(full(dynamic, &LLAMA).scaling, scaling);
    }

    // The attention factors are `attention_scaling` of LlamaRotaryEmbedding and
    // Phi3RotaryEmbedding of transformers 5.24 with these settings.
    #[test]
    fn yarn_settings_are_resolved_as_in_transformers() {
        let settings = |fields: Value| match full(yarn(fields), &LLAMA).scaling {
            RopeScaling::Yarn {
                factor,
                attention_factor,
                beta_fast,
                beta_slow,
                truncate,
                original_max_position_embeddings: 1024,
            } => (factor, attention_factor, beta_fast, beta_slow, truncate),
            other => panic!("{other:?}"),
        };
        let derived = 1.138629436111989;
        let expected = (4.0, derived, 32.0, 1.0, true);
        assert_eq!(settings(json!({})), expected);
        // An absent factor is the quotient of the lengths, and 0 is no number of turns.
        assert_eq!(settings(json!({"factor": null, "beta_fast": 0})), expected);
        assert_eq!(settings(json!({"mscale": 0.7})), expected);
        let all = json!({"beta_fast": 8, "beta_slow": 2, "mscale": 1.0, "mscale_all_dim": 0.5,
            "truncate": false});
        let (factor, attention, fast, slow, truncate) = settings(all);
        assert_eq!((factor, fast, slow, truncate), (4.0, 8.0, 2.0, false));
        approx::assert_relative_eq!(attention, 1.0648216253695715, epsilon = 1e-15);
        let given = settings(json!({"attention_factor": 0.8, "mscale": 1, "mscale_all_dim": 1}));
        assert_eq!(given.1, 0.8);
    }

    #[test]
    fn phi3_says_su_and_yarn_and_means_longrope() {
        let expected = |attention_factor| RopeConfig {
            theta: 1e4,
            dims: 12,
            scaling: RopeScaling::LongRope {
                short_factor: vec![1.0, 1.1, 1.25, 1.5, 2.0, 3.0],
                long_factor: vec![1.0, 2.0, 4.0, 7.5, 12.0, 32.0],
                original_max_position_embeddings: 64,
                attention_factor,
            },
        };
        for kind in ["su", "yarn", "longrope"] {
            let mut value = longrope(kind, json!({}));
            value["original_max_position_embeddings"] = 64.into();
            let Value::Object(raw) = value else {
                panic!("expected an object");
            };
            let parsed = parse(&raw, 16, 256, &PHI3).unwrap();
            assert_eq!(
                (parsed.full, parsed.sliding),
                (expected(1.1547005383792517), None)
            );
        }
        for (fields, factor) in [
            (json!({"factor": 16.0}), 1.2909944487358056),
            (json!({"factor": 1}), 1.0),
            (json!({"attention_factor": 1.25, "factor": 16}), 1.25),
        ] {
            let mut value = longrope("longrope", fields);
            value["original_max_position_embeddings"] = 64.into();
            assert_eq!(full(value, &PHI3), expected(factor));
        }
    }

    #[test]
    fn nested_settings_are_those_of_each_kind_of_layer() {
        let old = json!({"rope_theta": 1e6, "rope_local_base_freq": 1e4,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0}});
        let new = json!({"rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}});
        let old = read(old, &GEMMA3).unwrap();
        assert_eq!(old, read(new.clone(), &GEMMA3).unwrap());
        assert_eq!(old.full.scaling, RopeScaling::Linear { factor: 8.0 });
        assert_eq!(old.sliding, Some(RopeConfig::new(1e4, 16)));
        // Without a rule of the family, each kind of layer has what its object says.
        assert_eq!(old, read(new, &LLAMA).unwrap());
        let one = json!({"rope_theta": 5e5, "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 2}, "sliding_attention": null}});
        let one = read(one, &LLAMA).unwrap();
        assert_eq!((one.full.theta, one.sliding), (5e5, None));
        let alike = json!({"rope_parameters": {"full_attention": {"rope_theta": 5e5},
            "sliding_attention": {"rope_theta": 5e5}}});
        assert_eq!(full(alike, &LLAMA), RopeConfig::new(5e5, 16));
    }

    #[test]
    fn written_settings_are_read_back() {
        let mut su = longrope("su", json!({}));
        su["original_max_position_embeddings"] = 64.into();
        let all = [
            json!({}),
            json!({"rope_scaling": {"type": "linear", "factor": 2}}),
            json!({"rope_scaling": {"type": "dynamic", "factor": 2}}),
            json!({"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1,
                "high_freq_factor": 4, "original_max_position_embeddings": 512}}),
            yarn(json!({"mscale": 1.0, "mscale_all_dim": 0.5, "truncate": false})),
            su,
        ];
        for from in all {
            let first = full(from.clone(), &PHI3_NOT_YARN);
            let written = json!({"rope_theta": first.theta, "rope_scaling": value(&first),
                "partial_rotary_factor": first.dims as f64 / 16.0});
            assert_eq!(full(written, &PHI3_NOT_YARN), first, "{from}");
        }
    }

    const PHI3_NOT_YARN: Defaults = Defaults {
        partial: Some(1.0),
        ..LLAMA
    };

    #[test]
    fn contradictions_are_refused() {
        let linear = json!({"rope_type": "linear", "factor": 2});
        let sliding = json!({"sliding_attention": {"rope_theta": 2e4}, "full_attention": {}});
        for (value, defaults, field) in [
            (
                json!({"rope_theta": 5e5, "rope_parameters": {"rope_theta": 1e4}}),
                LLAMA,
                "rope_theta",
            ),
            (
                json!({"rope_scaling": linear, "rope_parameters": {"rope_type": "default"}}),
                LLAMA,
                "rope_scaling",
            ),
            (
                json!({"partial_rotary_factor": 0.5, "rope_scaling": {"partial_rotary_factor": 1}}),
                PHI3,
                "partial_rotary_factor",
            ),
            (
                json!({"rope_local_base_freq": 1e4, "rope_parameters": sliding}),
                GEMMA3,
                "rope_local_base_freq",
            ),
            (
                json!({"rope_parameters": {"rope_type": "default"}}),
                GEMMA3,
                "rope_parameters",
            ),
        ] {
            match read(value.clone(), &defaults) {
                Err(Error::InvalidConfig { field: found, .. }) => assert_eq!(found, field),
                other => panic!("{value}: {other:?}"),
            }
        }
    }

    #[test]
    fn bad_settings_name_their_field() {
        let long = |fields: Value| longrope("longrope", fields);
        for (value, field) in [
            (json!({"rope_theta": 0}), "rope_theta"),
            (json!({"rope_theta": 1e300}), "rope_theta"),
            (json!({"rope_theta": "x"}), "rope_theta"),
            (json!({"rope_parameters": 3}), "rope_parameters"),
            (
                json!({"rope_parameters": {"full_attention": 1}}),
                "rope_parameters.full_attention",
            ),
            (
                json!({"rope_scaling": {"type": "dynamic"}}),
                "rope_scaling.factor",
            ),
            (
                json!({"rope_scaling": {"type": "dynamic", "factor": 0.5}}),
                "rope_scaling.factor",
            ),
            (
                json!({"rope_scaling": {"type": "dynamic", "factor": 2}, "partial_rotary_factor": 0.125}),
                "rope_scaling.rope_type",
            ),
            (json!({"partial_rotary_factor": 0}), "partial_rotary_factor"),
            (
                json!({"partial_rotary_factor": 1.5}),
                "partial_rotary_factor",
            ),
            (
                json!({"partial_rotary_factor": 0.2}),
                "partial_rotary_factor",
            ),
            (yarn(json!({"beta_fast": -1})), "rope_parameters.beta_fast"),
            (
                yarn(json!({"attention_factor": 0})),
                "rope_parameters.attention_factor",
            ),
            (
                yarn(json!({"mscale": -1, "mscale_all_dim": 1})),
                "rope_parameters.mscale",
            ),
            (
                yarn(json!({"factor": null, "original_max_position_embeddings": 8192})),
                "rope_parameters.factor",
            ),
            (yarn(json!({"rope_theta": 1})), "rope_parameters.rope_theta"),
            (yarn(json!({"truncate": 1})), "rope_parameters.truncate"),
            (
                long(json!({"short_factor": [1, 2]})),
                "rope_scaling.short_factor",
            ),
            (
                long(json!({"short_factor": null})),
                "rope_scaling.short_factor",
            ),
            (long(json!({"long_factor": 1})), "rope_scaling.long_factor"),
            (
                long(json!({"long_factor": [1, 2, 3, 0, 5, 6]})),
                "rope_scaling.long_factor[3]",
            ),
            (
                long(json!({"long_factor": [1, 2, 3, null, 5, 6]})),
                "rope_scaling.long_factor",
            ),
            (
                long(json!({"original_max_position_embeddings": 1})),
                "rope_scaling.original_max_position_embeddings",
            ),
            (
                long(json!({"original_max_position_embeddings": 0})),
                "rope_scaling.original_max_position_embeddings",
            ),
        ] {
            match read(value.clone(), &PHI3_NOT_YARN) {
                Err(Error::InvalidConfig { field: found, .. }) => assert_eq!(found, field),
                other => panic!("{value}: {other:?}"),
            }
        }
        for value in [
            json!({"rope_scaling": {"type": "mrope"}}),
            json!({"rope_parameters": {"full_attention": {}, "rope_theta": 1e4}}),
        ] {
            let found = read(value.clone(), &LLAMA);
            assert!(
                matches!(found, Err(Error::Unsupported { .. })),
                "{value}: {found:?}"
            );
        }
        let partial = read(json!({"partial_rotary_factor": 0.5}), &LLAMA);
        assert!(
            matches!(partial, Err(Error::Unsupported { .. })),
            "{partial:?}"
        );
    }
}
