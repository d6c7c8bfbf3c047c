//! The model families, as rows of data.
//!
//! A row says how a family's `config.json` is read where fields are absent, which layers have biases,
//! which norms a block has and what their tensors are called. Defaults are those of transformers.

use super::block::NormKind;
use super::linear::LinearKind;

/// The model families that can be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Family {
    /// Llama 1 to 3.3, SmolLM and every other checkpoint of model type `llama` (arXiv 2302.13971).
    Llama,
    /// Mistral 7B, Nemo and their relatives: Llama with a sliding window and without biases
    /// (arXiv 2310.06825).
    Mistral,
    /// Qwen2 and Qwen2.5 (arXiv 2407.10671): Llama with biases on queries, keys and values.
    Qwen2,
    /// Llama whose blocks differ in key/value heads and MLP width or lack an attention: DeciLM,
    /// "Nemotron-NAS" (`block_configs`).
    Deci,
    /// Llama whose blocks differ in more than `block_configs` can say elsewhere, such as their number of
    /// query heads. This crate's own: `block_configs` with the sizes in full. A model of another family
    /// takes this form, too, and keeps its family; see `elastic_base` of its row.
    ElasticLlama,
}

/// Which positions attention sees, as a config says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Windows {
    /// All positions; the config has no such field, or it is ignored.
    Full,
    /// `sliding_window` on all layers, with its value where the field is absent.
    AllLayers {
        /// The window where the field is absent; `None` for all positions.
        default: Option<usize>,
    },
    /// All positions, unless this field is true, which is refused.
    FullUnless(&'static str),
}

/// Which linear layers have biases, as a config says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Biases {
    /// Those of attention by `attention_bias`, those of the MLP by `mlp_bias`; absent means false.
    ByFields,
    /// These, whatever the config says.
    Always(&'static [LinearKind]),
}

/// How a family differs from the others.
#[derive(Debug)]
pub(crate) struct FamilyRow {
    /// The family.
    pub family: Family,
    /// `model_type` in `config.json`.
    pub model_type: &'static str,
    /// The class that transformers loads it with: `architectures` in `config.json`.
    pub architecture: &'static str,
    /// Number of key/value heads where the field is absent; `None` for as many as query heads.
    pub key_value_heads: Option<usize>,
    /// Sliding windows.
    pub windows: Windows,
    /// Biases.
    pub biases: Biases,
    /// `max_position_embeddings` where the field is absent.
    pub max_positions: usize,
    /// Whether the family's models can take the form of [`Family::ElasticLlama`] and stay what they are:
    /// `base_model_type` in the config then names the family.
    pub elastic_base: bool,
    /// The norms of a block with the names of their modules inside it, in the order of computation.
    pub norms: &'static [(NormKind, &'static str)],
}

/// The norms of Llama and of most families after it.
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

    /// `model_type` as it stands in `config.json`.
    pub fn model_type(self) -> &'static str {
        self.row().model_type
    }

    /// The class that transformers loads it with.
    pub fn architecture(self) -> &'static str {
        self.row().architecture
    }

    /// Every family that is read, for error messages: `llama (LlamaForCausalLM), ...`.
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
