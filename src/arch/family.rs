//! The model families, as a table with one row each.
//!
//! A row defines how absent fields of the family's `config.json` are filled in, which layers have
//! biases, and which norms a block has and how their tensors are named. The defaults are those of
//! transformers.

use super::block::NormKind;
use super::decoder::Activation;
use super::linear::LinearKind;

/// The supported model families.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Family {
    /// Llama 1 to 3.3, SmolLM, SmolLM2 and all other checkpoints of model type `llama` (arXiv
    /// 2302.13971).
    Llama,
    /// Mistral 7B, Nemo and related models: Llama with a sliding window and without biases (arXiv
    /// 2310.06825).
    Mistral,
    /// Qwen2 and Qwen2.5 (arXiv 2407.10671): Llama with biases on queries, keys and values.
    Qwen2,
    /// The dense models of Qwen3 (arXiv 2505.09388): Llama with norms on queries and keys.
    Qwen3,
    /// SmolLM3: Llama in which some layers have no rotary positions.
    SmolLm3,
    /// Gemma (arXiv 2403.08295): GELU, a scaled embedding, and norms that multiply by 1 plus the
    /// weight.
    Gemma,
    /// Gemma 2 (arXiv 2408.00118): Gemma with norms after each sub-block, soft caps, and a window
    /// in every other layer.
    Gemma2,
    /// The text model of Gemma 3 (arXiv 2503.19786): Gemma 2 with norms on queries and keys instead
    /// of soft caps, and other rotary positions in the layers with a window.
    Gemma3,
    /// Phi-3, Phi-3.5, Phi-4 and Phi-4-mini (arXiv 2404.14219): Llama whose checkpoints store
    /// projections of the same input as one matrix.
    Phi3,
    /// DeciLM, also called "Nemotron-NAS": Llama whose blocks differ in key/value heads and MLP
    /// width or have no attention (`block_configs`).
    Deci,
    /// Llama whose blocks differ in more than DeciLM's `block_configs` can describe, such as the
    /// number of query heads. The format is this crate's own: its `block_configs` hold all sizes of
    /// each block. Models of the other families can be saved in this form too; the config then
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
    /// `sliding_window` applies to the layers that `layer_types` names. Without that field, to
    /// those for which `rule` holds.
    ByLayer {
        /// The layers with a window if `layer_types` is absent.
        rule: WindowRule,
        /// The window if the field is absent; `None` for all positions.
        default: Option<usize>,
    },
}

/// The layers with a window, where `layer_types` does not name them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum WindowRule {
    /// If `use_sliding_window` is true, those from `max_window_layers` on. Otherwise no layer has a
    /// window, even if `layer_types` says so.
    FromLayer {
        /// `max_window_layers` if the field is absent.
        default: usize,
    },
    /// If `use_sliding_window` is true, those without rotary positions. Otherwise no layer has a
    /// window, even if `layer_types` says so.
    WithoutRope,
    /// All but every n-th, where the field `sliding_window_pattern` may replace n.
    AllButEvery(usize),
}

/// The linear layers that have biases, according to a config.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Biases {
    /// `attention_bias` decides for the layers of attention, `mlp_bias` for those of the MLP; an
    /// absent field means false.
    ByFields,
    /// `attention_bias` decides for the layers of attention; those of the MLP have none.
    AttentionByField,
    /// These layers always; the config is not consulted.
    Always(&'static [LinearKind]),
}

/// Whether a soft cap limits scores: `cap * tanh(score / cap)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum SoftCap {
    /// Never. A config that sets the field is rejected.
    None,
    /// As the field says; this value if it is absent.
    Field(Option<f64>),
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
    /// `head_dim` if the field is absent; `None` for the width divided by the number of heads.
    pub head_dim: Option<usize>,
    /// The rule for sliding windows.
    pub windows: Windows,
    /// The rule for biases.
    pub biases: Biases,
    /// `max_position_embeddings` if the field is absent.
    pub max_positions: usize,
    /// `rms_norm_eps` if the field is absent.
    pub norm_eps: f64,
    /// `tie_word_embeddings` if the field is absent.
    pub tied: bool,
    /// Name of the field that holds the activation, and the activation if it is absent.
    pub activation: (&'static str, Activation),
    /// What the name `gelu` means: the exact function, which is rejected, or its approximation.
    pub gelu_is_tanh: bool,
    /// Base of the rotary embedding if the config has none.
    pub rope_theta: f64,
    /// Base of the rotary embedding in layers with a window, if these have their own.
    pub local_rope_theta: Option<f64>,
    /// Whether `no_rope_layers` or `no_rope_layer_interval` takes rotary positions from some layers.
    pub without_rope: bool,
    /// `query_pre_attn_scalar` if the field is absent. Scores are divided by its square root;
    /// `None` for the head size.
    pub query_scalar: Option<f64>,
    /// Cap on the scores of attention, `attn_logit_softcapping`.
    pub attention_softcap: SoftCap,
    /// Cap on the logits, `final_logit_softcapping`.
    pub logit_softcap: SoftCap,
    /// Whether the embedding is multiplied by the square root of the width.
    pub scaled_embedding: bool,
    /// Number that is added to the weights of all norms.
    pub norm_offset: f32,
    /// The linear layers that checkpoints store as one matrix, and the name of its module inside
    /// the block. Their rows follow one another.
    pub fused: &'static [(&'static str, &'static [LinearKind])],
    /// Whether transformers rejects a width that the number of heads does not divide.
    pub even_heads: bool,
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

const QWEN3_NORMS: &[(NormKind, &str)] = &[
    (NormKind::Attention, "input_layernorm"),
    (NormKind::Q, "self_attn.q_norm"),
    (NormKind::K, "self_attn.k_norm"),
    (NormKind::Mlp, "post_attention_layernorm"),
];

const GEMMA2_NORMS: &[(NormKind, &str)] = &[
    (NormKind::Attention, "input_layernorm"),
    (NormKind::AttentionOut, "post_attention_layernorm"),
    (NormKind::Mlp, "pre_feedforward_layernorm"),
    (NormKind::MlpOut, "post_feedforward_layernorm"),
];

const GEMMA3_NORMS: &[(NormKind, &str)] = &[
    (NormKind::Attention, "input_layernorm"),
    (NormKind::Q, "self_attn.q_norm"),
    (NormKind::K, "self_attn.k_norm"),
    (NormKind::AttentionOut, "post_attention_layernorm"),
    (NormKind::Mlp, "pre_feedforward_layernorm"),
    (NormKind::MlpOut, "post_feedforward_layernorm"),
];

/// The matrices of Phi-3 that hold several layers.
const PHI3_FUSED: &[(&str, &[LinearKind])] = &[
    (
        "self_attn.qkv_proj",
        &[LinearKind::Q, LinearKind::K, LinearKind::V],
    ),
    ("mlp.gate_up_proj", &[LinearKind::Gate, LinearKind::Up]),
];

const LLAMA: FamilyRow = FamilyRow {
    family: Family::Llama,
    model_type: "llama",
    architecture: "LlamaForCausalLM",
    key_value_heads: None,
    head_dim: None,
    windows: Windows::Full,
    biases: Biases::ByFields,
    max_positions: 2048,
    norm_eps: 1e-6,
    tied: false,
    activation: ("hidden_act", Activation::Silu),
    gelu_is_tanh: false,
    rope_theta: 10_000.0,
    local_rope_theta: None,
    without_rope: false,
    query_scalar: None,
    attention_softcap: SoftCap::None,
    logit_softcap: SoftCap::None,
    scaled_embedding: false,
    norm_offset: 0.0,
    fused: &[],
    even_heads: true,
    elastic_base: false,
    norms: PRE_NORMS,
};

const QWEN2: FamilyRow = FamilyRow {
    family: Family::Qwen2,
    model_type: "qwen2",
    architecture: "Qwen2ForCausalLM",
    key_value_heads: Some(32),
    windows: Windows::ByLayer {
        rule: WindowRule::FromLayer { default: 28 },
        default: Some(4096),
    },
    biases: Biases::Always(&[LinearKind::Q, LinearKind::K, LinearKind::V]),
    max_positions: 32_768,
    even_heads: false,
    elastic_base: true,
    ..LLAMA
};

const GEMMA: FamilyRow = FamilyRow {
    family: Family::Gemma,
    model_type: "gemma",
    architecture: "GemmaForCausalLM",
    key_value_heads: Some(16),
    head_dim: Some(256),
    biases: Biases::AttentionByField,
    max_positions: 8192,
    tied: true,
    activation: ("hidden_act", Activation::GeluTanh),
    gelu_is_tanh: true,
    scaled_embedding: true,
    norm_offset: 1.0,
    even_heads: false,
    elastic_base: true,
    ..LLAMA
};

const GEMMA2: FamilyRow = FamilyRow {
    family: Family::Gemma2,
    model_type: "gemma2",
    architecture: "Gemma2ForCausalLM",
    key_value_heads: Some(4),
    windows: Windows::ByLayer {
        rule: WindowRule::AllButEvery(2),
        default: Some(4096),
    },
    activation: ("hidden_activation", Activation::GeluTanh),
    gelu_is_tanh: false,
    query_scalar: Some(256.0),
    attention_softcap: SoftCap::Field(Some(50.0)),
    logit_softcap: SoftCap::Field(Some(30.0)),
    even_heads: true,
    norms: GEMMA2_NORMS,
    ..GEMMA
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
        even_heads: false,
        ..LLAMA
    },
    QWEN2,
    FamilyRow {
        family: Family::Qwen3,
        model_type: "qwen3",
        architecture: "Qwen3ForCausalLM",
        head_dim: Some(128),
        biases: Biases::AttentionByField,
        norms: QWEN3_NORMS,
        ..QWEN2
    },
    FamilyRow {
        family: Family::SmolLm3,
        model_type: "smollm3",
        architecture: "SmolLM3ForCausalLM",
        key_value_heads: Some(4),
        windows: Windows::ByLayer {
            rule: WindowRule::WithoutRope,
            default: None,
        },
        max_positions: 32_768,
        tied: true,
        rope_theta: 2_000_000.0,
        without_rope: true,
        even_heads: false,
        elastic_base: true,
        ..LLAMA
    },
    GEMMA,
    GEMMA2,
    FamilyRow {
        family: Family::Gemma3,
        model_type: "gemma3_text",
        architecture: "Gemma3ForCausalLM",
        windows: Windows::ByLayer {
            rule: WindowRule::AllButEvery(6),
            default: Some(4096),
        },
        max_positions: 131_072,
        rope_theta: 1_000_000.0,
        local_rope_theta: Some(10_000.0),
        attention_softcap: SoftCap::None,
        logit_softcap: SoftCap::Field(None),
        norms: GEMMA3_NORMS,
        ..GEMMA2
    },
    FamilyRow {
        family: Family::Phi3,
        model_type: "phi3",
        architecture: "Phi3ForCausalLM",
        windows: Windows::AllLayers { default: None },
        biases: Biases::Always(&[]),
        max_positions: 4096,
        norm_eps: 1e-5,
        fused: PHI3_FUSED,
        even_heads: false,
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

/// Whether a tensor of this name holds several linear layers in some family.
pub(crate) fn is_fused(tensor: &str) -> bool {
    let mut modules = FAMILIES.iter().flat_map(|row| row.fused);
    modules.any(|(module, _)| {
        let end = tensor.strip_suffix(".weight").unwrap_or(tensor);
        end.strip_suffix(module)
            .is_some_and(|start| start.ends_with('.'))
    })
}

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
