//! One transformer block: attention and a gated MLP, each with norms and a residual connection.

use burn::module::Module;
use burn::tensor::{Device, Tensor};

use crate::adapter::ElasticLoraLinear;
use crate::arch::{Architecture, BlockDims, LinearKind, NormKind, SubBlock};
use crate::error::{Error, Result};
use crate::nn::ops::{self, AttentionMask};
use crate::nn::{BaseLinear, KvCache, RmsNorm};

/// A callback that sees the input of each linear layer, `[batch, seq, d_input]`, just before the
/// layer runs.
pub type Tap<'a> = dyn FnMut(LinearKind, &Tensor<3>) + 'a;

/// State shared by the blocks of one forward pass.
pub(crate) struct Pass<'m, 'a> {
    pub arch: &'m Architecture,
    /// Cosines and sines of the positions for each of the model's rotary embeddings,
    /// `[seq, pairs]` each, or `[batch * seq, pairs]` if rows have positions of their own.
    pub rotations: Vec<[Tensor<2>; 2]>,
    /// The mask without a window.
    pub mask: AttentionMask,
    pub cache: Option<&'a mut KvCache>,
    pub tap: Option<&'a mut Tap<'a>>,
}

impl Pass<'_, '_> {
    fn show(&mut self, kinds: &[LinearKind], x: &Tensor<3>) {
        if let Some(tap) = &mut self.tap {
            kinds.iter().for_each(|kind| tap(*kind, x));
        }
    }
}

/// Causal self-attention with grouped key/value heads, with its norms.
#[derive(Module, Debug)]
#[doc(hidden)]
pub struct Attention {
    /// Norm of the input.
    pub norm: RmsNorm,
    /// `[d_model] -> [n_heads * head_dim]`.
    pub q_proj: ElasticLoraLinear,
    /// `[d_model] -> [n_kv_heads * head_dim]`.
    pub k_proj: ElasticLoraLinear,
    /// `[d_model] -> [n_kv_heads * head_dim]`.
    pub v_proj: ElasticLoraLinear,
    /// `[n_heads * head_dim] -> [d_model]`.
    pub o_proj: ElasticLoraLinear,
    /// Norm of each head of the queries.
    pub q_norm: Option<RmsNorm>,
    /// Norm of each head of the keys.
    pub k_norm: Option<RmsNorm>,
    /// Norm of the output.
    pub out_norm: Option<RmsNorm>,
    pub(crate) head_dim: usize,
}

impl Attention {
    /// Splits heads, normalizes them and rotates them by position.
    fn heads(
        &self,
        x: Tensor<3>,
        norm: Option<&RmsNorm>,
        rotation: Option<&[Tensor<2>; 2]>,
    ) -> Tensor<4> {
        let [batch, seq, width] = x.dims();
        let n_heads = width / self.head_dim;
        let x = match norm {
            Some(norm) => norm
                .forward(x.reshape([batch, seq * n_heads, self.head_dim]))
                .reshape([batch, seq, width]),
            None => x,
        };
        match rotation {
            Some([cos, sin]) => ops::rotary(x, n_heads, cos.clone(), sin.clone()),
            None => ops::split_heads(x, n_heads),
        }
    }

    /// `x` plus the sub-block's output.
    fn forward(&self, x: Tensor<3>, block: usize, pass: &mut Pass<'_, '_>) -> Tensor<3> {
        let normed = self.norm.forward(x.clone());
        pass.show(&[LinearKind::Q, LinearKind::K, LinearKind::V], &normed);
        let positions = pass.arch.positions(block);
        let rotation = positions.rope.and_then(|rope| pass.rotations.get(rope));
        let q = self.q_proj.forward(normed.clone());
        let q = self.heads(q, self.q_norm.as_ref(), rotation);
        let k = self.k_proj.forward(normed.clone());
        let k = self.heads(k, self.k_norm.as_ref(), rotation);
        let v = self.heads(self.v_proj.forward(normed), None, None);
        let (k, v) = match &mut pass.cache {
            Some(cache) => cache.append(block, k, v),
            None => (k, v),
        };
        let mask = AttentionMask {
            window: positions.window,
            ..pass.mask.clone()
        };
        let context = ops::causal_attention(q, k, v, pass.arch.scores, &mask);
        pass.show(&[LinearKind::O], &context);
        added(x, self.o_proj.forward(context), self.out_norm.as_ref())
    }

    fn norm(&self, kind: NormKind) -> Option<&RmsNorm> {
        match kind {
            NormKind::Attention => Some(&self.norm),
            NormKind::Q => self.q_norm.as_ref(),
            NormKind::K => self.k_norm.as_ref(),
            NormKind::AttentionOut => self.out_norm.as_ref(),
            NormKind::Mlp | NormKind::MlpOut => None,
        }
    }

    fn norm_mut(&mut self, kind: NormKind) -> Option<&mut RmsNorm> {
        match kind {
            NormKind::Attention => Some(&mut self.norm),
            NormKind::Q => self.q_norm.as_mut(),
            NormKind::K => self.k_norm.as_mut(),
            NormKind::AttentionOut => self.out_norm.as_mut(),
            NormKind::Mlp | NormKind::MlpOut => None,
        }
    }
}

/// Adds the output of a sub-block, normalized if the family has the norm.
fn added(x: Tensor<3>, output: Tensor<3>, norm: Option<&RmsNorm>) -> Tensor<3> {
    match norm {
        Some(norm) => x + norm.forward(output),
        None => x + output,
    }
}

/// The gated MLP, `down(activation(gate(x)) * up(x))`, with its norms.
#[derive(Module, Debug)]
#[doc(hidden)]
pub struct Mlp {
    /// Norm of the input.
    pub norm: RmsNorm,
    /// `[d_model] -> [d_mlp]`.
    pub gate_proj: ElasticLoraLinear,
    /// `[d_model] -> [d_mlp]`.
    pub up_proj: ElasticLoraLinear,
    /// `[d_mlp] -> [d_model]`.
    pub down_proj: ElasticLoraLinear,
    /// Norm of the output.
    pub out_norm: Option<RmsNorm>,
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
        let norm = |kind: NormKind| {
            let len = arch.norms_of(&dims).find(|(norm, _)| *norm == kind)?.1;
            let weight = Tensor::ones([len], device) - arch.norm_offset();
            let norm = RmsNorm::from_tensor(weight, arch.norm_eps);
            Some(norm.with_offset(arch.norm_offset().into()))
        };
        let missing = || Error::InvalidConfig {
            field: "model_type".into(),
            reason: "a family without a norm before the MLP".into(),
        };
        Ok(Self {
            norm: norm(NormKind::Mlp).ok_or_else(missing)?,
            gate_proj: linear(LinearKind::Gate)?,
            up_proj: linear(LinearKind::Up)?,
            down_proj: linear(LinearKind::Down)?,
            out_norm: norm(NormKind::MlpOut),
        })
    }

    /// `x` plus the sub-block's output.
    fn forward(&self, x: Tensor<3>, pass: &mut Pass<'_, '_>) -> Tensor<3> {
        let normed = self.norm.forward(x.clone());
        pass.show(&[LinearKind::Gate, LinearKind::Up], &normed);
        let hidden = ops::gated(
            self.gate_proj.forward(normed.clone()),
            self.up_proj.forward(normed),
            pass.arch.activation,
        );
        pass.show(&[LinearKind::Down], &hidden);
        added(x, self.down_proj.forward(hidden), self.out_norm.as_ref())
    }

    fn norm(&self, kind: NormKind) -> Option<&RmsNorm> {
        match kind {
            NormKind::Mlp => Some(&self.norm),
            NormKind::MlpOut => self.out_norm.as_ref(),
            _ => None,
        }
    }

    fn norm_mut(&mut self, kind: NormKind) -> Option<&mut RmsNorm> {
        match kind {
            NormKind::Mlp => Some(&mut self.norm),
            NormKind::MlpOut => self.out_norm.as_mut(),
            _ => None,
        }
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
    /// Attention sub-block.
    pub self_attn: Option<Attention>,
    /// MLP sub-block.
    pub mlp: Option<Mlp>,
    #[module(skip)]
    runs: Running,
}

impl Block {
    pub(crate) fn new(self_attn: Option<Attention>, mlp: Option<Mlp>) -> Self {
        let runs = Running {
            attention: true,
            mlp: true,
        };
        Self {
            self_attn,
            mlp,
            runs,
        }
    }

    /// A block without sub-blocks, which passes its input on.
    pub(crate) fn empty() -> Self {
        Self::new(None, None)
    }

    pub(crate) fn forward(&self, x: Tensor<3>, block: usize, pass: &mut Pass<'_, '_>) -> Tensor<3> {
        let x = match &self.self_attn {
            Some(attention) if self.runs.attention => attention.forward(x, block, pass),
            _ => x,
        };
        match &self.mlp {
            Some(mlp) if self.runs.mlp => mlp.forward(x, pass),
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
        let attention = self.self_attn.filter(|_| attention);
        let mlp = self.mlp.filter(|_| mlp);
        (attention.is_some() || mlp.is_some()).then(|| Self::new(attention, mlp))
    }

    /// Joins a block without an MLP and a following block without attention into one block that
    /// computes the same.
    pub(crate) fn joined(self, next: Self) -> Self {
        Self::new(self.self_attn, next.mlp)
    }

    /// Gives an MLP to a block without one.
    pub(crate) fn set_mlp(&mut self, mlp: Mlp) {
        self.mlp = Some(mlp);
    }

    /// One of the block's norms, if present.
    pub fn norm(&self, kind: NormKind) -> Option<&RmsNorm> {
        match kind.sub_block() {
            SubBlock::Attention => self.self_attn.as_ref()?.norm(kind),
            SubBlock::Mlp => self.mlp.as_ref()?.norm(kind),
        }
    }

    /// One of the block's norms, if present.
    pub(crate) fn norm_mut(&mut self, kind: NormKind) -> Option<&mut RmsNorm> {
        match kind.sub_block() {
            SubBlock::Attention => self.self_attn.as_mut()?.norm_mut(kind),
            SubBlock::Mlp => self.mlp.as_mut()?.norm_mut(kind),
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
