//! One transformer block: attention and a SwiGLU MLP, each with an RMSNorm before it and a residual
//! connection.

use burn::module::Module;
use burn::tensor::{Device, Tensor};

use crate::adapter::ElasticLoraLinear;
use crate::arch::{Architecture, BlockDims, LinearKind, NormKind, SubBlock};
use crate::error::Result;
use crate::nn::ops::{self, AttentionMask};
use crate::nn::{BaseLinear, KvCache, RmsNorm};

/// A callback that sees the input of each linear layer, `[batch, seq, d_input]`, just before the
/// layer runs.
pub type Tap<'a> = dyn FnMut(LinearKind, &Tensor<3>) + 'a;

/// State shared by the blocks of one forward pass.
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
#[doc(hidden)]
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
        let n_heads = self.q_proj.active_dims()[1] / self.head_dim;
        let n_kv_heads = self.k_proj.active_dims()[1] / self.head_dim;
        let q = ops::rotary(
            self.q_proj.forward(x.clone()),
            n_heads,
            pass.cos.clone(),
            pass.sin.clone(),
        );
        let k = ops::rotary(
            self.k_proj.forward(x.clone()),
            n_kv_heads,
            pass.cos.clone(),
            pass.sin.clone(),
        );
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
#[doc(hidden)]
pub struct Mlp {
    /// `[d_model] -> [d_mlp]`.
    pub gate_proj: ElasticLoraLinear,
    /// `[d_model] -> [d_mlp]`.
    pub up_proj: ElasticLoraLinear,
    /// `[d_mlp] -> [d_model]`.
    pub down_proj: ElasticLoraLinear,
}

impl Mlp {
    /// Creates an MLP whose output is always zero.
    pub(crate) fn zeros(arch: &Architecture, d_mlp: usize, device: &Device) -> Result<Self> {
        let dims = BlockDims {
            n_heads: 0,
            n_kv_heads: 0,
            d_mlp,
        };
        let linear = |kind: LinearKind| {
            let [d_input, d_output] = arch.linear_dims(&dims, kind);
            let bias = arch
                .has_bias(kind)
                .then(|| Tensor::zeros([d_output], device));
            let weight = Tensor::zeros([d_input, d_output], device);
            BaseLinear::from_tensors(weight, bias).map(ElasticLoraLinear::plain)
        };
        Ok(Self {
            gate_proj: linear(LinearKind::Gate)?,
            up_proj: linear(LinearKind::Up)?,
            down_proj: linear(LinearKind::Down)?,
        })
    }

    fn forward(&self, x: Tensor<3>, pass: &mut Pass<'_>) -> Tensor<3> {
        pass.show(&[LinearKind::Gate, LinearKind::Up], &x);
        let hidden = ops::swiglu(self.gate_proj.forward(x.clone()), self.up_proj.forward(x));
        pass.show(&[LinearKind::Down], &hidden);
        self.down_proj.forward(hidden)
    }
}

/// Which sub-blocks of a block run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Running {
    attention: bool,
    mlp: bool,
}

/// A block: `x + attention(norm(x))`, then `x + mlp(norm(x))`. Each sub-block may be missing
/// (`None`) or temporarily disabled by [`set_runs`](Self::set_runs).
#[derive(Module, Debug)]
#[doc(hidden)]
pub struct Block {
    /// Norm before attention.
    pub input_layernorm: Option<RmsNorm>,
    /// Attention sub-block.
    pub self_attn: Option<Attention>,
    /// Norm before the MLP.
    pub post_attention_layernorm: Option<RmsNorm>,
    /// MLP sub-block.
    pub mlp: Option<Mlp>,
    #[module(skip)]
    runs: Running,
}

impl Block {
    pub(crate) fn new(
        attention: Option<(RmsNorm, Attention)>,
        mlp: Option<(RmsNorm, Mlp)>,
    ) -> Self {
        let (input_layernorm, self_attn) = attention.unzip();
        let (post_attention_layernorm, mlp) = mlp.unzip();
        let runs = Running {
            attention: true,
            mlp: true,
        };
        Self {
            input_layernorm,
            self_attn,
            post_attention_layernorm,
            mlp,
            runs,
        }
    }

    pub(crate) fn forward(&self, x: Tensor<3>, block: usize, pass: &mut Pass<'_>) -> Tensor<3> {
        let x = match (&self.input_layernorm, &self.self_attn) {
            (Some(norm), Some(attention)) if self.runs.attention => {
                x.clone() + attention.forward(norm.forward(x), block, pass)
            }
            _ => x,
        };
        match (&self.post_attention_layernorm, &self.mlp) {
            (Some(norm), Some(mlp)) if self.runs.mlp => {
                x.clone() + mlp.forward(norm.forward(x), pass)
            }
            _ => x,
        }
    }

    /// Whether the block has a sub-block.
    pub fn has(&self, part: SubBlock) -> bool {
        match part {
            SubBlock::Attention => self.self_attn.is_some(),
            SubBlock::Mlp => self.mlp.is_some(),
        }
    }

    /// Whether a sub-block is present and enabled.
    pub fn runs(&self, part: SubBlock) -> bool {
        self.has(part)
            && match part {
                SubBlock::Attention => self.runs.attention,
                SubBlock::Mlp => self.runs.mlp,
            }
    }

    /// Enables or disables a sub-block. Has no effect if the sub-block is missing.
    pub fn set_runs(&mut self, part: SubBlock, runs: bool) {
        match part {
            SubBlock::Attention => self.runs.attention = runs,
            SubBlock::Mlp => self.runs.mlp = runs,
        }
    }

    /// The block without its disabled sub-blocks; `None` if nothing remains.
    pub(crate) fn running(self) -> Option<Self> {
        let (attention, mlp) = (self.runs(SubBlock::Attention), self.runs(SubBlock::Mlp));
        let attention = self
            .input_layernorm
            .zip(self.self_attn)
            .filter(|_| attention);
        let mlp = self.post_attention_layernorm.zip(self.mlp).filter(|_| mlp);
        (attention.is_some() || mlp.is_some()).then(|| Self::new(attention, mlp))
    }

    /// Joins a block without an MLP and a following block without attention into one block that
    /// computes the same.
    pub(crate) fn joined(self, next: Self) -> Self {
        Self::new(
            self.input_layernorm.zip(self.self_attn),
            next.post_attention_layernorm.zip(next.mlp),
        )
    }

    /// Gives an MLP to a block without one.
    pub(crate) fn set_mlp(&mut self, norm: RmsNorm, mlp: Mlp) {
        (self.post_attention_layernorm, self.mlp) = (Some(norm), Some(mlp));
    }

    /// One of the block's norms, if present.
    pub fn norm(&self, kind: NormKind) -> Option<&RmsNorm> {
        match kind {
            NormKind::Attention => self.input_layernorm.as_ref(),
            NormKind::Mlp => self.post_attention_layernorm.as_ref(),
        }
    }

    /// The norms of the block, in the order of computation.
    pub fn norms(&self) -> impl Iterator<Item = (NormKind, &RmsNorm)> {
        let kinds = NormKind::ALL.into_iter();
        kinds.filter_map(|kind| Some((kind, self.norm(kind)?)))
    }

    /// One of the block's linear layers, if present.
    pub fn linear(&self, kind: LinearKind) -> Option<&ElasticLoraLinear> {
        let (attention, mlp) = (self.self_attn.as_ref(), self.mlp.as_ref());
        match kind {
            LinearKind::Q => attention.map(|attention| &attention.q_proj),
            LinearKind::K => attention.map(|attention| &attention.k_proj),
            LinearKind::V => attention.map(|attention| &attention.v_proj),
            LinearKind::O => attention.map(|attention| &attention.o_proj),
            LinearKind::Gate => mlp.map(|mlp| &mlp.gate_proj),
            LinearKind::Up => mlp.map(|mlp| &mlp.up_proj),
            LinearKind::Down => mlp.map(|mlp| &mlp.down_proj),
        }
    }

    /// One of the block's linear layers, if present.
    pub fn linear_mut(&mut self, kind: LinearKind) -> Option<&mut ElasticLoraLinear> {
        let (attention, mlp) = (self.self_attn.as_mut(), self.mlp.as_mut());
        match kind {
            LinearKind::Q => attention.map(|attention| &mut attention.q_proj),
            LinearKind::K => attention.map(|attention| &mut attention.k_proj),
            LinearKind::V => attention.map(|attention| &mut attention.v_proj),
            LinearKind::O => attention.map(|attention| &mut attention.o_proj),
            LinearKind::Gate => mlp.map(|mlp| &mut mlp.gate_proj),
            LinearKind::Up => mlp.map(|mlp| &mut mlp.up_proj),
            LinearKind::Down => mlp.map(|mlp| &mut mlp.down_proj),
        }
    }
}
