//! The model families, as a table with one row each.
//!
//! A row defines how absent fields of the family's `config.json` are filled in, which layers have
//! biases, and which norms a block has and how their tensors are named. The defaults are those of
//! transformers.

use super::block::NormKind;
use super::linear::LinearKind;

/// The supported model families.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Family {
    /// Llama 1 to 3.3, SmolLM and all other checkpoints of model type `llama` (arXiv 2302.13971).
    Llama,
    /// Mistral 7B, Nemo and related models: Llama with a sliding window and without biases (arXiv
    /// 2310.06825).
    Mistral,
    /// Qwen2 and Qwen2.5 (arXiv 2407.10671): Llama with biases on queries, keys and values.
    Qwen2,
    /// DeciLM, also called "Nemotron-NAS": Llama whose blocks differ in key/value heads and MLP
    /// width or have no attention (`block_configs`).
    Deci,
    /// Llama whose blocks differ in more than DeciLM's `block_configs` can describe, such as the
    /// number of query heads. The format is this crate's own: its `block_configs` hold all sizes of
    /// each block. Models of some other families can be saved in this form too; the config then
    /// names their family as `base_model_type`.
    ElasticLlama,
}

/// The positions that attention sees, according to a config.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Windows {
    /// All positions; the config has no such field, or the field is ignored.
    Full,
    /// `sliding_window` applies to all layers.
    AllLayers {
        /// The window if the field is absent; `None` for all positions.
        default: Option<usize>,
    },
    /// All positions; a config in which this field is true is rejected.
    FullUnless(&'static str),
}

/// The linear layers that have biases, according to a config.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Biases {
    /// `attention_bias` decides for the layers of attention, `mlp_bias` for those of the MLP; an
    /// absent field means false.
    ByFields,
    /// These layers always; the config is not consulted.
    Always(&'static [LinearKind]),
}

/// The properties in which families differ.
#[derive(Debug)]
pub(crate) struct FamilyRow {
    /// The family.
    pub family: Family,
    /// `model_type` in `config.json`.
    pub model_type: &'static str,
    /// The model class in transformers, which is `architectures` in `config.json`.
    pub architecture: &'static str,
    /// Number of key/value heads if the field is absent; `None` for the number of query heads.
    pub key_value_heads: Option<usize>,
    /// The rule for sliding windows.
    pub windows: Windows,
    /// The rule for biases.
    pub biases: Biases,
    /// `max_position_embeddings` if the field is absent.
    pub max_positions: usize,
    /// Whether models of the family can be saved as [`Family::ElasticLlama`] and remain of this
    /// family, which `base_model_type` in the config then names.
    pub elastic_base: bool,
    /// The norms of a block and the names of their modules inside it, in the order of computation.
    pub norms: &'static [(NormKind, &'static str)],
}

/// The norms of Llama and of most later families.
const PRE_NORMS: &[(NormKind, &str)] = &[
    (NormKind::Attention, "input_layernorm"),
    (NormKind::Mlp, "post_attention_layernorm"),
];

const LLAMA: FamilyRow = FamilyRow {
    family: Family::Llama,
    model_type: "llama",
    architecture: "LlamaForCausalLM",
    key_value_heads: None,
    windows: Windows::Full,
    biases: Biases::ByFields,
    max_positions: 2048,
    elastic_base: false,
    norms: PRE_NORMS,
};

/// All families.
pub(crate) static FAMILIES: &[FamilyRow] = &[
    LLAMA,
    FamilyRow {
        family: Family::Mistral,
        model_type: "mistral",
        architecture: "MistralForCausalLM",
        key_value_heads: Some(8),
        windows: Windows::AllLayers {
            default: Some(4096),
        },
        biases: Biases::Always(&[]),
        max_positions: 131_072,
        ..LLAMA
    },
    FamilyRow {
        family: Family::Qwen2,
        model_type: "qwen2",
        architecture: "Qwen2ForCausalLM",
        key_value_heads: Some(32),
        windows: Windows::FullUnless("use_sliding_window"),
        biases: Biases::Always(&[LinearKind::Q, LinearKind::K, LinearKind::V]),
        max_positions: 32_768,
        elastic_base: true,
        ..LLAMA
    },
    FamilyRow {
        family: Family::Deci,
        model_type: "nemotron-nas",
        architecture: "DeciLMForCausalLM",
        ..LLAMA
    },
    FamilyRow {
        family: Family::ElasticLlama,
        model_type: "elastic-llama",
        architecture: "ElasticLlamaForCausalLM",
        windows: Windows::AllLayers { default: None },
        ..LLAMA
    },
];

impl Family {
    /// The family's row.
    pub(crate) fn row(self) -> &'static FamilyRow {
        FAMILIES
            .iter()
            .find(|row| row.family == self)
            .unwrap_or(&LLAMA)
    }

    /// The family's `model_type` in `config.json`.
    pub fn model_type(self) -> &'static str {
        self.row().model_type
    }

    /// The model class in transformers.
    pub fn architecture(self) -> &'static str {
        self.row().architecture
    }

    /// Lists all supported families, for error messages: `llama (LlamaForCausalLM), ...`.
    pub fn supported() -> String {
        let names = FAMILIES
            .iter()
            .map(|row| format!("{} ({})", row.model_type, row.architecture));
        names.collect::<Vec<_>>().join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_family_has_one_row_and_names_of_its_own() {
        for (index, row) in FAMILIES.iter().enumerate() {
            assert!(std::ptr::eq(row.family.row(), row), "{:?}", row.family);
            for other in &FAMILIES[..index] {
                assert_ne!(row.model_type, other.model_type);
                assert_ne!(row.architecture, other.architecture);
            }
            for kind in NormKind::ALL {
                let n = row.norms.iter().filter(|(norm, _)| *norm == kind).count();
                assert!(n <= 1, "{:?} names {kind:?} {n} times", row.family);
            }
        }
    }
}
