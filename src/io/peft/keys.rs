//! Names of the tensors in an adapter's file.

use std::collections::{BTreeMap, BTreeSet};

use super::PREFIX;
use crate::error::{Error, Result};

/// A parameter of a module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Field {
    Weight,
    Bias,
}

impl Field {
    pub fn name(self) -> &'static str {
        match self {
            Self::Weight => "weight",
            Self::Bias => "bias",
        }
    }

    fn parse(name: &str) -> Option<Self> {
        [Self::Weight, Self::Bias]
            .into_iter()
            .find(|field| field.name() == name)
    }
}

/// What a tensor is to its module.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    /// LoRA's A of a linear layer, `[rank, d_input]`.
    A,
    /// LoRA's B of a linear layer, `[d_output, rank]`.
    B,
    /// Bias of LoRA's B, `[d_output]`.
    BBias,
    /// LoRA's A of an embedding, `[rank, vocab_size]`.
    EmbeddingA,
    /// LoRA's B of an embedding, `[d_model, rank]`.
    EmbeddingB,
    /// DoRA's magnitudes, one for each output.
    Magnitude,
    /// New rows of an embedding, `[tokens, d_model]`.
    Tokens,
    /// A parameter of the layer under the adapter.
    Base(Field),
    /// A parameter of a module that is stored whole.
    Whole(Field),
    /// The same, by the name that it has in memory (`modules_to_save`).
    Copy(Field),
    /// A parameter of the module in whose place such a copy stands.
    Original(Field),
}

/// A tensor's name, taken apart.
#[derive(Debug, PartialEq)]
pub(super) struct Key<'a> {
    /// Module path in the base model.
    pub module: &'a str,
    pub part: Part,
    /// Name of the adapter, which PEFT leaves out where it saves by itself.
    pub adapter: Option<&'a str>,
}

/// Takes the name of a tensor apart.
///
/// # Errors
/// Returns [`Error::Unsupported`] for a name of another form.
pub(super) fn parse(name: &str) -> Result<Key<'_>> {
    let unsupported = |kind: &str| Error::Unsupported {
        what: format!("adapter tensor `{name}` ({kind})"),
    };
    let Some(path) = name.strip_prefix(PREFIX) else {
        return Err(unsupported(
            "its name does not begin with `base_model.model.`",
        ));
    };
    let marker = |part: &str| {
        part.starts_with("lora_")
            || [
                "base_layer",
                "modules_to_save",
                "original_module",
                "token_adapter",
            ]
            .contains(&part)
    };
    let segments: Vec<&str> = path.split('.').collect();
    let Some(at) = segments.iter().position(|part| marker(part)) else {
        let (module, field) = path.rsplit_once('.').unwrap_or(("", path));
        return match Field::parse(field) {
            Some(field) if !module.is_empty() => Ok(Key {
                module,
                part: Part::Whole(field),
                adapter: None,
            }),
            _ => Err(unsupported("a kind unknown here")),
        };
    };
    let (part, adapter) = match &segments[at..] {
        ["lora_A", adapter @ .., "weight"] => (Part::A, adapter),
        ["lora_B", adapter @ .., "weight"] => (Part::B, adapter),
        ["lora_B", adapter @ .., "bias"] => (Part::BBias, adapter),
        ["lora_embedding_A", adapter @ ..] => (Part::EmbeddingA, adapter),
        ["lora_embedding_B", adapter @ ..] => (Part::EmbeddingB, adapter),
        ["lora_magnitude_vector", adapter @ .., "weight"] => (Part::Magnitude, adapter),
        ["lora_magnitude_vector", adapter @ ..] => (Part::Magnitude, adapter),
        ["token_adapter", "trainable_tokens_delta", adapter @ ..] => (Part::Tokens, adapter),
        ["base_layer", field] | ["token_adapter", "base_layer", field] => match Field::parse(field)
        {
            Some(field) => (Part::Base(field), &[][..]),
            None => return Err(unsupported("a parameter unknown here")),
        },
        ["original_module", field] => match Field::parse(field) {
            Some(field) => (Part::Original(field), &[][..]),
            None => return Err(unsupported("a parameter unknown here")),
        },
        ["modules_to_save", adapter @ .., field] => match Field::parse(field) {
            Some(field) => (Part::Copy(field), adapter),
            None => return Err(unsupported("a parameter unknown here")),
        },
        _ => return Err(unsupported("a kind of LoRA tensor unknown here")),
    };
    let adapter = match adapter {
        [] => None,
        [adapter] => Some(*adapter),
        _ => return Err(unsupported("a kind of LoRA tensor unknown here")),
    };
    let length: usize = segments[..at].iter().map(|part| part.len() + 1).sum();
    if length == 0 {
        return Err(unsupported("it names no module"));
    }
    Ok(Key {
        module: &path[..length - 1],
        part,
        adapter,
    })
}

/// Tensors of one module, by what they are.
pub(super) type Parts<'a> = BTreeMap<Part, &'a str>;

/// Groups the tensors of a file by their modules.
///
/// # Errors
/// Returns the errors of [`parse`], and [`Error::Unsupported`] for tensors of several adapters, or
/// for two that are the same thing.
pub(super) fn by_module<'a>(
    names: impl Iterator<Item = &'a str>,
) -> Result<BTreeMap<&'a str, Parts<'a>>> {
    let mut modules: BTreeMap<&str, Parts<'_>> = BTreeMap::new();
    let mut adapters = BTreeSet::new();
    for name in names {
        let key = parse(name)?;
        adapters.extend(key.adapter);
        let before = modules
            .entry(key.module)
            .or_default()
            .insert(key.part, name);
        if let Some(before) = before {
            return Err(Error::Unsupported {
                what: format!("an adapter with both `{before}` and `{name}`"),
            });
        }
    }
    if adapters.len() > 1 {
        return Err(Error::Unsupported {
            what: format!("a file with several adapters ({adapters:?}), not saved one by one,"),
        });
    }
    Ok(modules)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key<'a>(module: &'a str, part: Part, adapter: Option<&'a str>) -> Key<'a> {
        Key {
            module,
            part,
            adapter,
        }
    }

    #[test]
    fn names_with_and_without_the_adapters_name_are_read() {
        let (q, e) = ("model.layers.0.self_attn.q_proj", "model.embed_tokens");
        for (end, part) in [
            ("lora_A{}.weight", Part::A),
            ("lora_B{}.weight", Part::B),
            ("lora_B{}.bias", Part::BBias),
            ("lora_embedding_A{}", Part::EmbeddingA),
            ("lora_embedding_B{}", Part::EmbeddingB),
            ("lora_magnitude_vector{}", Part::Magnitude),
            ("lora_magnitude_vector{}.weight", Part::Magnitude),
            ("token_adapter.trainable_tokens_delta{}", Part::Tokens),
            ("modules_to_save{}.weight", Part::Copy(Field::Weight)),
        ] {
            for (inserted, adapter) in [("", None), (".default", Some("default"))] {
                for module in [q, e] {
                    let name = format!("{PREFIX}{module}.{}", end.replace("{}", inserted));
                    assert_eq!(parse(&name).unwrap(), key(module, part, adapter), "{name}");
                }
            }
        }
        for (name, expected) in [
            (
                "lm_head.weight",
                key("lm_head", Part::Whole(Field::Weight), None),
            ),
            (
                "lm_head.original_module.weight",
                key("lm_head", Part::Original(Field::Weight), None),
            ),
            (
                "lm_head.base_layer.weight",
                key("lm_head", Part::Base(Field::Weight), None),
            ),
            ("l.q.bias", key("l.q", Part::Whole(Field::Bias), None)),
            (
                "l.q.base_layer.bias",
                key("l.q", Part::Base(Field::Bias), None),
            ),
            (
                "e.token_adapter.base_layer.weight",
                key("e", Part::Base(Field::Weight), None),
            ),
        ] {
            assert_eq!(parse(&format!("{PREFIX}{name}")).unwrap(), expected);
        }
    }

    #[test]
    fn other_names_are_refused() {
        for name in [
            "model.l.q.lora_A.weight",
            "base_model.model.l.q.lora_C.weight",
            "base_model.model.l.q.lora_A.a.b.weight",
            "base_model.model.l.q.lora_A.default",
            "base_model.model.l.q.modules_to_save.default.running_mean",
            "base_model.model.lora_A.weight",
            "base_model.model.weight",
            "base_model.model.",
        ] {
            assert!(
                parse(name).unwrap_err().to_string().contains(name),
                "{name}"
            );
        }
        let names =
            |second: &'static str| ["base_model.model.q.lora_A.one.weight", second].into_iter();
        for second in [
            "base_model.model.q.lora_B.two.weight",
            "base_model.model.q.lora_A.weight",
        ] {
            let error = by_module(names(second)).unwrap_err().to_string();
            assert!(error.contains("one"), "{error}");
        }
        assert!(by_module(names("base_model.model.q.lora_B.one.weight")).is_ok());
    }
}
