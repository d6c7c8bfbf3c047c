//! One transformer block: attention and SwiGLU MLP, each behind an RMSNorm and a residual.

use burn::module::Module;
use burn::tensor::Tensor;

use crate::adapter::ElasticLoraLinear;
use crate::nn::ops::{self, AttentionMask};
use crate::nn::{KvCache, RmsNorm};

/// Which linear layer of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LinearKind {
    /// Queries.
    Q,
    /// Keys.
    K,
    /// Values.
    V,
    /// Attention's output.
    O,
    /// The MLP's gate.
    Gate,
    /// The MLP's up projection.
    Up,
    /// The MLP's down projection.
    Down,
}

impl LinearKind {
    /// All, in the order of computation.
    pub const ALL: [Self; 7] = [Self::Q, Self::K, Self::V, Self::O, Self::Gate, Self::Up, Self::Down];

    /// Path inside the block, as Hugging Face names it.
    pub fn path(self) -> &'static str {
        match self {
            Self::Q => "self_attn.q_proj",
            Self::K => "self_attn.k_proj",
            Self::V => "self_attn.v_proj",
            Self::O => "self_attn.o_proj",
            Self::Gate => "mlp.gate_proj",
            Self::Up => "mlp.up_proj",
            Self::Down => "mlp.down_proj",
        }
    }

    /// Hugging Face's module path of this layer in block `block`.
    pub fn name(self, block: usize) -> String {
        format!("model.layers.{block}.{}", self.path())
    }

    /// The inverse of [`name`](Self::name).
    pub fn parse(name: &str) -> Option<(usize, Self)> {
        let (block, path) = name.strip_prefix("model.layers.")?.split_once('.')?;
        let kind = Self::ALL.into_iter().find(|kind| kind.path() == path)?;
        Some((block.parse().ok()?, kind))
    }
}

/// Is shown the input of each linear layer just before it is used, `[batch, seq, d_input]`.
pub type Tap<'a> = dyn FnMut(LinearKind, &Tensor<3>) + 'a;

/// What the blocks of one forward pass share.
pub(crate) struct Pass<'a> {
    /// `[seq, head_dim / 2]`.
    pub cos: Tensor<2>,
    /// `[seq, head_dim / 2]`.
    pub sin: Tensor<2>,
    pub mask: AttentionMask,
    pub cache: Option<&'a mut KvCache>,
    pub tap: Option<&'a mut Tap<'a>>,
}

impl Pass<'_> {
    fn show(&mut self, kinds: &[LinearKind], x: &Tensor<3>) {
        if let Some(tap) = &mut self.tap {
            kinds.iter().for_each(|kind| tap(*kind, x));
        }
    }
}

/// Causal self-attention with rotary positions and grouped key/value heads.
#[derive(Module, Debug)]
pub struct Attention {
    /// `[d_model] -> [n_heads * head_dim]`.
    pub q_proj: ElasticLoraLinear,
    /// `[d_model] -> [n_kv_heads * head_dim]`.
    pub k_proj: ElasticLoraLinear,
    /// `[d_model] -> [n_kv_heads * head_dim]`.
    pub v_proj: ElasticLoraLinear,
    /// `[n_heads * head_dim] -> [d_model]`.
    pub o_proj: ElasticLoraLinear,
    pub(crate) head_dim: usize,
}

impl Attention {
    fn forward(&self, x: Tensor<3>, block: usize, pass: &mut Pass<'_>) -> Tensor<3> {
        pass.show(&[LinearKind::Q, LinearKind::K, LinearKind::V], &x);
        let n_heads = self.q_proj.base.dims()[1] / self.head_dim;
        let n_kv_heads = self.k_proj.base.dims()[1] / self.head_dim;
        let q = ops::rotary(self.q_proj.forward(x.clone()), n_heads, pass.cos.clone(), pass.sin.clone());
        let k = ops::rotary(self.k_proj.forward(x.clone()), n_kv_heads, pass.cos.clone(), pass.sin.clone());
        let v = ops::split_heads(self.v_proj.forward(x), n_kv_heads);
        let (k, v) = match &mut pass.cache {
            Some(cache) => cache.append(block, k, v),
            None => (k, v),
        };
        let scale = 1.0 / (self.head_dim as f64).sqrt();
        let context = ops::causal_attention(q, k, v, scale, &pass.mask);
        pass.show(&[LinearKind::O], &context);
        self.o_proj.forward(context)
    }
}

/// The gated MLP: `down(silu(gate(x)) * up(x))`.
#[derive(Module, Debug)]
pub struct Mlp {
    /// `[d_model] -> [d_mlp]`.
    pub gate_proj: ElasticLoraLinear,
    /// `[d_model] -> [d_mlp]`.
    pub up_proj: ElasticLoraLinear,
    /// `[d_mlp] -> [d_model]`.
    pub down_proj: ElasticLoraLinear,
}

impl Mlp {
    fn forward(&self, x: Tensor<3>, pass: &mut Pass<'_>) -> Tensor<3> {
        pass.show(&[LinearKind::Gate, LinearKind::Up], &x);
        let hidden = ops::swiglu(self.gate_proj.forward(x.clone()), self.up_proj.forward(x));
        pass.show(&[LinearKind::Down], &hidden);
        self.down_proj.forward(hidden)
    }
}

/// A block: `x + attention(norm(x))`, then `x + mlp(norm(x))`.
#[derive(Module, Debug)]
pub struct Block {
    /// Before attention.
    pub input_layernorm: RmsNorm,
    /// Attention.
    pub self_attn: Attention,
    /// Before the MLP.
    pub post_attention_layernorm: RmsNorm,
    /// MLP.
    pub mlp: Mlp,
}

impl Block {
    pub(crate) fn forward(&self, x: Tensor<3>, block: usize, pass: &mut Pass<'_>) -> Tensor<3> {
        let x = x.clone() + self.self_attn.forward(self.input_layernorm.forward(x), block, pass);
        x.clone() + self.mlp.forward(self.post_attention_layernorm.forward(x), pass)
    }

    /// One of its linear layers.
    pub fn linear(&self, kind: LinearKind) -> &ElasticLoraLinear {
        match kind {
            LinearKind::Q => &self.self_attn.q_proj,
            LinearKind::K => &self.self_attn.k_proj,
            LinearKind::V => &self.self_attn.v_proj,
            LinearKind::O => &self.self_attn.o_proj,
            LinearKind::Gate => &self.mlp.gate_proj,
            LinearKind::Up => &self.mlp.up_proj,
            LinearKind::Down => &self.mlp.down_proj,
        }
    }

    /// One of its linear layers.
    pub fn linear_mut(&mut self, kind: LinearKind) -> &mut ElasticLoraLinear {
        match kind {
            LinearKind::Q => &mut self.self_attn.q_proj,
            LinearKind::K => &mut self.self_attn.k_proj,
            LinearKind::V => &mut self.self_attn.v_proj,
            LinearKind::O => &mut self.self_attn.o_proj,
            LinearKind::Gate => &mut self.mlp.gate_proj,
            LinearKind::Up => &mut self.mlp.up_proj,
            LinearKind::Down => &mut self.mlp.down_proj,
        }
    }
}
