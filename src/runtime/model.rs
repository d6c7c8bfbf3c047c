//! The model that sessions and layers run on.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use crate::arch::{Architecture, LinearSpec, NormKind, NormSpec, Rope, SubBlock};
use crate::data::{ChatTemplate, TextTokenizer};
use crate::error::{Error, Result};
use crate::format::{StoredMatrix, WeightFormat};
use crate::io::HfConfig;
use crate::kernels::Pool;
use crate::linalg::Matrix;
use crate::space::{Elastic, SearchSpace, SubnetConfig, widths};

use super::shape::Shape;
use super::weights::{LayerWeights, Norms, Weight};

/// When checksums are verified. In every mode, the indices stored in a weight are bounds-checked
/// before its first use, so a corrupt file cannot cause out-of-bounds access.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Verify {
    /// Each weight is verified at its first use, so opening a model reads no weights.
    #[default]
    OnUse,
    /// All weights are verified when the model is opened.
    OnOpen,
    /// Checksums are never verified. Use this for files that were verified before.
    Never,
}

/// Options for opening a model.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelOptions {
    /// Number of threads of the kernels, including the calling thread, at most 4096; 0 uses one per
    /// core. If the system does not start as many, fewer are used.
    pub n_threads: usize,
    /// Whether files are memory-mapped, so that only the parts in use are read, or else read
    /// completely. A mapped file must not change while the model is in use.
    pub mmap: bool,
    /// When checksums are verified. Hugging Face folders have no checksums.
    pub verify: Verify,
}

impl Default for ModelOptions {
    fn default() -> Self {
        Self {
            n_threads: 0,
            mmap: true,
            verify: Verify::default(),
        }
    }
}

/// Largest number of threads of a model. Each takes a stack, and a number above is a mistake.
const MAX_THREADS: usize = 4096;

/// Refuses a number of threads that is a mistake.
pub(super) fn check_threads(n_threads: usize) -> Result<()> {
    if n_threads > MAX_THREADS {
        let expected = format!("at most {MAX_THREADS}");
        return Err(Error::argument("n_threads", n_threads, expected));
    }
    Ok(())
}

impl ModelOptions {
    /// Sets the number of threads, including the calling thread, at most 4096; 0 uses one per core.
    pub fn with_n_threads(mut self, n_threads: usize) -> Self {
        self.n_threads = n_threads;
        self
    }

    /// Sets whether files are memory-mapped.
    pub fn with_mmap(mut self, mmap: bool) -> Self {
        self.mmap = mmap;
        self
    }

    /// Sets when checksums are verified.
    pub fn with_verify(mut self, verify: Verify) -> Self {
        self.verify = verify;
        self
    }
}

/// Description of a linear layer of a [`Model`].
#[derive(Clone, Debug, PartialEq)]
pub struct LayerInfo {
    /// Hugging Face's module path, such as `model.layers.0.self_attn.q_proj`; `lm_head` for the
    /// head.
    pub name: String,
    /// Number of inputs of the whole layer.
    pub d_input: usize,
    /// Number of outputs of the whole layer.
    pub d_output: usize,
    /// Largest rank of the adapter; 0 without one.
    pub max_rank: usize,
    /// Storage format of the weight.
    pub format: WeightFormat,
    /// Size of the weight in bytes, without the adapter; that of the first subnet if subnets have
    /// weights of their own. A tied head reports the size of the embedding.
    pub bytes: usize,
    /// Size of the adapter in bytes.
    pub adapter_bytes: usize,
    /// Whether the layer has a bias.
    pub bias: bool,
}

/// A subnet that a [`Model`] lists by name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedSubnet {
    /// Name of the subnet.
    pub name: String,
    /// Choices of the subnet; empty in a model without a search space.
    pub config: SubnetConfig,
}

/// Name of a model's first subnet, which is the whole model.
pub(super) const WHOLE: &str = "whole";

/// The tokenizer, the JSON text that it was parsed from, and the chat template beside it.
#[derive(Clone, Debug)]
pub(crate) struct Tokenizer {
    pub json: Arc<str>,
    pub inner: TextTokenizer,
    /// The template, or why it cannot be used.
    pub chat: Result<Option<ChatTemplate>, String>,
}

/// The immutable contents of a model.
#[derive(Clone, Debug)]
pub(crate) struct Weights {
    pub config: HfConfig,
    /// Embedding, `[vocab_size, d_model]`; also the weight of a tied head.
    pub embedding: Weight,
    /// Norms of each block.
    pub norms: Vec<Norms>,
    pub final_norm: Arc<[f32]>,
    /// Linear layers of the blocks in the config's order, followed by the head.
    pub layers: Vec<LayerWeights>,
    /// Index of the first layer of the attention and of the MLP of each block.
    pub first: Vec<[Option<usize>; 2]>,
    /// What the norms of each block multiply by: their weights and the family's offset.
    gains: Vec<Norms>,
    /// What the final norm multiplies by.
    pub final_gain: Arc<[f32]>,
    /// The rotary embeddings that the blocks use.
    pub ropes: Vec<Rope>,
    pub space: Option<SearchSpace>,
    pub subnets: Vec<NamedSubnet>,
    pub shapes: Vec<Arc<Shape>>,
    pub infos: Vec<LayerInfo>,
    pub tokenizer: Option<Tokenizer>,
    pub stop_ids: Vec<u32>,
    /// What tells the model from others, once it was asked for.
    pub fingerprint: OnceLock<u64>,
}

/// Parts from which a model is built; see [`Weights`].
pub(crate) struct ModelParts {
    pub config: HfConfig,
    pub embedding: Weight,
    pub norms: Vec<Norms>,
    pub final_norm: Arc<[f32]>,
    /// Linear layers, without a tied head.
    pub layers: Vec<LayerWeights>,
    pub space: Option<SearchSpace>,
    pub subnets: Vec<SubnetParts>,
    pub tokenizer: Option<Tokenizer>,
    pub stop_ids: Vec<u32>,
}

/// A subnet from which a model is built.
#[derive(Clone, Debug)]
pub(crate) struct SubnetParts {
    pub name: String,
    /// Choices of the subnet; empty in a model without a search space.
    pub config: SubnetConfig,
    /// Index of each layer's weight ([`LayerWeights::weight_at`]); empty for the layers' own.
    pub weights: Vec<usize>,
}

impl SubnetParts {
    /// A subnet of a search space.
    pub fn new(name: impl Into<String>, config: SubnetConfig) -> Self {
        Self {
            name: name.into(),
            config,
            weights: Vec::new(),
        }
    }
}

fn expect(tensor: &str, expected: &[usize], found: &[usize]) -> Result<()> {
    if expected == found {
        return Ok(());
    }
    Err(Error::TensorShape {
        tensor: tensor.into(),
        expected: expected.to_vec(),
        found: found.to_vec(),
    })
}

fn expect_matrix(weight: &Weight, rows: usize, cols: usize) -> Result<()> {
    let matrix = weight.unchecked();
    expect(
        weight.name(),
        &[rows, cols],
        &[matrix.rows(), matrix.cols()],
    )
}

fn finite(tensor: &str, values: &[f32]) -> Result<()> {
    match values.iter().position(|value| !value.is_finite()) {
        None => Ok(()),
        Some(index) => Err(Error::NotFinite {
            tensor: tensor.into(),
            index,
            value: values[index],
        }),
    }
}

fn expect_vector(tensor: &str, len: usize, values: Option<&[f32]>) -> Result<()> {
    let values = values.unwrap_or(&[]);
    expect(tensor, &[len], &[values.len()])?;
    finite(tensor, values)
}

/// Checks a layer against what the config requires at this index. `spec` is `None` for the head,
/// whose shape is `head`, `[vocab_size, d_model]`.
fn check_layer(
    layer: Option<&LayerWeights>,
    index: usize,
    spec: Option<&LinearSpec>,
    head: [usize; 2],
) -> Result<()> {
    let (name, [d_output, d_input], bias) = match spec {
        Some(spec) => (spec.name.as_str(), [spec.d_output, spec.d_input], spec.bias),
        None => (Architecture::HEAD_LAYER, head, false),
    };
    let Some(layer) = layer.filter(|layer| layer.name == name) else {
        return Err(Error::UnknownLayer {
            context: format!("layers of a model, at {index} `{name}`"),
            layer: layer.map_or(name, |layer| &layer.name).into(),
        });
    };
    for weight in std::iter::once(&layer.weight).chain(&layer.others) {
        expect_matrix(weight, d_output, d_input)?;
    }
    if bias || layer.bias.is_some() {
        let len = if bias { d_output } else { 0 };
        expect_vector(&format!("{name}.bias"), len, layer.bias.as_deref())?;
    }
    if let Some(adapter) = &layer.adapter {
        adapter.lora.validate()?;
        expect_matrix(&adapter.a, adapter.lora.rank, d_input)?;
        expect_matrix(&adapter.bt, adapter.lora.rank, d_output)?;
    }
    Ok(())
}

impl Weights {
    /// Builds a model and checks every size against the config and the search space.
    pub fn new(parts: ModelParts) -> Result<Self> {
        let config = parts.config.with_quantization(None);
        let arch = config.arch();
        let (d_model, vocab_size) = (arch.d_model, arch.vocab_size);
        expect_matrix(&parts.embedding, vocab_size, d_model)?;
        expect_vector(Architecture::FINAL_NORM, d_model, Some(&parts.final_norm))?;
        let mut layers = parts.layers;
        if arch.tied {
            layers.push(LayerWeights {
                name: Architecture::HEAD_LAYER.into(),
                weight: parts.embedding.clone(),
                bias: None,
                adapter: None,
                others: Vec::new(),
            });
        }
        let linears = arch.linears();
        let wanted = linears.iter().map(Some).chain([None]);
        let mut first = vec![[None; SubBlock::ALL.len()]; arch.blocks.len()];
        for (index, spec) in wanted.enumerate() {
            check_layer(layers.get(index), index, spec, [vocab_size, d_model])?;
            if let Some(LinearSpec { block, kind, .. }) = spec {
                first[*block][kind.sub_block() as usize].get_or_insert(index);
            }
        }
        if let Some(surplus) = layers.get(linears.len() + 1) {
            return Err(Error::UnknownLayer {
                context: "layers of a model".into(),
                layer: surplus.name.clone(),
            });
        }
        if parts.norms.len() != arch.blocks.len() {
            expect(
                "norms of the blocks",
                &[arch.blocks.len()],
                &[parts.norms.len()],
            )?;
        }
        for (block, norms) in parts.norms.iter().enumerate() {
            let wanted: Vec<NormSpec> = arch.block_norms(block).collect();
            for norm in &wanted {
                let gains = norms.get(&norm.kind).map(|gains| &gains[..]);
                expect_vector(&norm.tensor, norm.len, gains)?;
            }
            let known = |kind: &NormKind| wanted.iter().any(|norm| norm.kind == *kind);
            if let Some((kind, gains)) = norms.iter().find(|(kind, _)| !known(kind)) {
                expect(&arch.norm_tensor(block, *kind), &[0], &[gains.len()])?;
            }
        }
        let infos = layers.iter().map(info).collect();
        let ropes = arch.ropes.iter().map(Rope::new).collect();
        let offset = arch.norm_offset();
        let gain = |weight: &Arc<[f32]>| match offset {
            0.0 => weight.clone(),
            offset => weight.iter().map(|weight| weight + offset).collect(),
        };
        let of_block = |norms: &Norms| {
            norms
                .iter()
                .map(|(kind, norm)| (*kind, gain(norm)))
                .collect()
        };
        let gains = parts.norms.iter().map(of_block).collect();
        let final_gain = gain(&parts.final_norm);
        let mut weights = Self {
            config,
            embedding: parts.embedding,
            norms: parts.norms,
            final_norm: parts.final_norm,
            layers,
            first,
            gains,
            final_gain,
            ropes,
            space: None,
            subnets: Vec::new(),
            shapes: Vec::new(),
            infos,
            tokenizer: parts.tokenizer,
            stop_ids: parts.stop_ids,
            fingerprint: OnceLock::new(),
        };
        weights.set_space(parts.space, parts.subnets)?;
        Ok(weights)
    }

    /// Finds a block's norm by the name of its tensor.
    fn norm_in<'a>(&self, norms: &'a [Norms], tensor: &str) -> Option<&'a [f32]> {
        let arch = self.config.arch();
        norms.iter().enumerate().find_map(|(block, norms)| {
            let mut norms = norms.iter();
            let found = norms.find(|(kind, _)| arch.norm_tensor(block, **kind) == tensor);
            found.map(|(_, norm)| &norm[..])
        })
    }

    /// What a norm of a block multiplies by; `None` if the block has no such norm.
    pub fn gain(&self, block: usize, kind: NormKind) -> Option<&[f32]> {
        self.gains.get(block)?.get(&kind).map(|gain| &gain[..])
    }

    /// Checks the search space and the subnets, then sets them.
    fn set_space(&mut self, space: Option<SearchSpace>, subnets: Vec<SubnetParts>) -> Result<()> {
        let whole = NamedSubnet {
            name: WHOLE.into(),
            config: SubnetConfig::new(),
        };
        self.subnets = vec![whole];
        self.shapes = vec![Arc::new(Shape::full(self))];
        let Some(space) = space.filter(|space| !space.groups().is_empty()) else {
            // Without a space, subnets differ in their weights.
            for SubnetParts {
                name,
                config,
                weights,
            } in subnets
            {
                if !config.is_empty() {
                    let known = WHOLE.into();
                    return Err(Error::UnknownSubnet { name, known });
                }
                let shape = Shape::full(self).with_weights(self, weights)?;
                self.add_subnet(name, config, Arc::new(shape))?;
            }
            return Ok(());
        };
        let linear = self.config.arch().linears();
        let shapes: Vec<_> = linear
            .iter()
            .map(|layer| crate::space::LayerShape::new(&layer.name, layer.d_input, layer.d_output))
            .collect();
        let largest = self
            .layers
            .iter()
            .map(LayerWeights::max_rank)
            .max()
            .unwrap_or(0);
        space.validate_layers(&shapes, largest)?;
        widths::check(self.config.blocks(), self.config.head_dim(), &space)?;
        for group in space.groups_of_kind(Elastic::Rank) {
            let found = group.choices().first().copied().unwrap_or(0);
            for name in group.layers() {
                let max = self
                    .layers
                    .iter()
                    .find(|layer| layer.name == *name)
                    .map_or(0, LayerWeights::max_rank);
                if found > max {
                    return Err(Error::InvalidRank {
                        layer: name.clone(),
                        found,
                        max,
                    });
                }
            }
        }
        // The largest choices of the space may be smaller than the model.
        let whole = space.maximal();
        self.shapes[0] = Arc::new(Shape::of_subnet(self, &space, &whole)?);
        self.subnets[0].config = whole;
        for SubnetParts {
            name,
            config,
            weights,
        } in subnets
        {
            let shape = Shape::of_subnet(self, &space, &config)?.with_weights(self, weights)?;
            self.add_subnet(name, config, Arc::new(shape))?;
        }
        self.space = Some(space);
        Ok(())
    }

    fn add_subnet(&mut self, name: String, config: SubnetConfig, shape: Arc<Shape>) -> Result<()> {
        if name.is_empty()
            || name.contains('\0')
            || self.subnets.iter().any(|subnet| subnet.name == name)
        {
            return Err(Error::argument(
                "subnets",
                format!("`{name}`"),
                "names that differ, are not empty and hold no NUL",
            ));
        }
        self.subnets.push(NamedSubnet { name, config });
        self.shapes.push(shape);
        Ok(())
    }

    /// Returns every weight. It uses a loop because valgrind reports a false uninitialized read in
    /// the code that the compiler generates for chained iterators.
    pub fn all(&self) -> Vec<&Weight> {
        let mut all = vec![&self.embedding];
        for layer in &self.layers {
            all.push(&layer.weight);
            for other in &layer.others {
                all.push(other);
            }
            if let Some(adapter) = &layer.adapter {
                all.extend([&adapter.a, &adapter.bt]);
            }
        }
        all
    }
}

fn info(layer: &LayerWeights) -> LayerInfo {
    let matrix = layer.weight.unchecked();
    let factor = |weight: &Weight| weight.unchecked().bytes();
    LayerInfo {
        name: layer.name.clone(),
        d_input: matrix.cols(),
        d_output: matrix.rows(),
        max_rank: layer.max_rank(),
        format: matrix.format(),
        bytes: matrix.bytes(),
        adapter_bytes: layer
            .adapter
            .as_ref()
            .map_or(0, |adapter| factor(&adapter.a) + factor(&adapter.bt)),
        bias: layer.bias.is_some(),
    }
}

/// A compressed model for inference: weights, adapters that are not merged, a search space with
/// named subnets, and a tokenizer.
///
/// A model is immutable, is shared by all its clones, and can be used from any number of threads.
/// Each [`Session`](super::Session) selects the subnet that is active in it.
///
/// ```no_run
/// # use elastic_lora::format::WeightFormat;
/// # use elastic_lora::runtime::{GenerateConfig, Model, ModelOptions, Session, SessionConfig};
/// # fn main() -> elastic_lora::Result<()> {
/// // Convert a Hugging Face folder, dense or quantized, to a bundle of 4-bit weights.
/// let folder = Model::open("llama", &ModelOptions::default())?;
/// let int4 = WeightFormat::Int { bits: 4, group_size: Some(128), symmetric: false };
/// folder.with_format(int4)?.save("llama.elora", false)?;
/// // Open the bundle through a memory map and generate.
/// let model = Model::open("llama.elora", &ModelOptions::default())?;
/// let mut session = Session::new(&model, &SessionConfig::default())?;
/// let config = GenerateConfig::new(64, model.stop_ids().to_vec());
/// let ids = session.generate(&[1, 2, 3], &config, |_| true)?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Model {
    pub(super) weights: Arc<Weights>,
    pub(super) pool: Arc<Pool>,
}

impl Model {
    /// Makes a model with `n_threads` threads, which [`check_threads`] has seen.
    pub(crate) fn from_weights(weights: Weights, n_threads: usize) -> Self {
        Self {
            weights: Arc::new(weights),
            pool: Arc::new(Pool::new(n_threads)),
        }
    }

    pub(super) fn with_weights(&self, weights: Weights) -> Self {
        Self {
            weights: Arc::new(weights),
            pool: self.pool.clone(),
        }
    }

    /// Returns the same model with its own pool of `n_threads` threads; 0 uses one per core. The
    /// weights are shared. If the system does not start as many threads, fewer are used.
    ///
    /// # Errors
    /// Returns [`Error::InvalidArgument`] for more than 4096 threads.
    pub fn with_n_threads(&self, n_threads: usize) -> Result<Self> {
        check_threads(n_threads)?;
        Ok(Self {
            weights: self.weights.clone(),
            pool: Arc::new(Pool::new(n_threads)),
        })
    }

    /// The config, with the sizes of the whole model.
    pub fn config(&self) -> &HfConfig {
        &self.weights.config
    }

    /// Sentences about what is stored in the model's files and not used, or used in another way
    /// than the files say.
    pub fn notices(&self) -> Vec<String> {
        let tokenizer = self.weights.tokenizer.as_ref();
        let of_tokenizer = tokenizer.map_or(&[][..], |tokenizer| tokenizer.inner.notices());
        let mut all = [self.config().notices(), of_tokenizer].concat();
        if let Some(Err(reason)) = tokenizer.map(|tokenizer| &tokenizer.chat) {
            all.push(format!("the chat template cannot be used: {reason}"));
        }
        all
    }

    /// Number of tokens that may be drawn: the logits from there on stand for no token, because
    /// vocabularies are often padded.
    pub fn n_ids(&self) -> usize {
        let n = self.config().vocab_size();
        let tokenizer = self.weights.tokenizer.as_ref();
        tokenizer.map_or(n, |tokenizer| tokenizer.inner.n_ids().clamp(1, n.max(1)))
    }

    /// Number of threads of the kernels, including the calling thread.
    pub fn n_threads(&self) -> usize {
        self.pool.threads()
    }

    /// The linear layers: those of the blocks in order of computation, followed by the head.
    pub fn layers(&self) -> &[LayerInfo] {
        &self.weights.infos
    }

    /// Returns the index of a layer in [`layers`](Self::layers).
    pub fn layer_index(&self, name: &str) -> Option<usize> {
        self.weights
            .infos
            .iter()
            .position(|layer| layer.name == name)
    }

    /// The named subnets. The first always exists and is the whole model.
    pub fn subnets(&self) -> &[NamedSubnet] {
        &self.weights.subnets
    }

    /// Returns the index of a subnet in [`subnets`](Self::subnets).
    ///
    /// # Errors
    /// Returns [`Error::UnknownSubnet`] if there is no subnet of that name.
    pub fn subnet_index(&self, name: &str) -> Result<usize> {
        let found = self
            .weights
            .subnets
            .iter()
            .position(|subnet| subnet.name == name);
        found.ok_or_else(|| {
            let known: Vec<&str> = self
                .weights
                .subnets
                .iter()
                .map(|subnet| subnet.name.as_str())
                .collect();
            Error::UnknownSubnet {
                name: name.into(),
                known: known.join(", "),
            }
        })
    }

    /// The search space, if the model is a supernet.
    pub fn space(&self) -> Option<&SearchSpace> {
        self.weights.space.as_ref()
    }

    /// The tokenizer, if the model has one.
    pub fn tokenizer(&self) -> Option<&TextTokenizer> {
        self.weights
            .tokenizer
            .as_ref()
            .map(|tokenizer| &tokenizer.inner)
    }

    /// The chat template, if the model has one that can be used; see [`notices`](Self::notices).
    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        let tokenizer = self.weights.tokenizer.as_ref()?;
        tokenizer.chat.as_ref().ok()?.as_ref()
    }

    /// Tokens that end a generation.
    pub fn stop_ids(&self) -> &[u32] {
        &self.weights.stop_ids
    }

    /// Size of all weights in bytes, including the embedding, the adapters and the head, but not
    /// the norms and biases.
    pub fn bytes(&self) -> usize {
        let tied = self.weights.config.tie_word_embeddings();
        let shared = if tied {
            self.weights.embedding.unchecked().bytes()
        } else {
            0
        };
        self.weights
            .all()
            .iter()
            .map(|weight| weight.unchecked().bytes())
            .sum::<usize>()
            - shared
    }

    /// The embedding, `[vocab_size, d_model]`.
    ///
    /// # Errors
    /// Returns [`Error::InvalidFile`] if its contents are damaged.
    pub fn embedding(&self) -> Result<&StoredMatrix> {
        self.weights.embedding.get()
    }

    /// Returns what a norm multiplies by: its weights, plus 1 for Gemma. `tensor` is the name of its
    /// tensor ([`Architecture::norm_tensor`]).
    pub fn norm(&self, tensor: &str) -> Option<&[f32]> {
        if tensor == Architecture::FINAL_NORM {
            return Some(&self.weights.final_gain);
        }
        self.weights.norm_in(&self.weights.gains, tensor)
    }

    /// Returns the weights of a norm by the name of its tensor, as files hold them.
    pub(super) fn norm_weights(&self, tensor: &str) -> Option<&[f32]> {
        if tensor == Architecture::FINAL_NORM {
            return Some(&self.weights.final_norm);
        }
        self.weights.norm_in(&self.weights.norms, tensor)
    }

    /// Writes the cosines and sines by which the attention of a block rotates a position of a
    /// sequence of `len` tokens, and returns the number of pairs of a head's features that are
    /// rotated: feature `i` with feature `i + pairs`. 0 if the block has no rotary positions.
    ///
    /// # Shapes
    /// - `cos`, `sin`: at least `[head_dim / 2]` each, of which the first `pairs` are written
    pub fn rotary(
        &self,
        block: usize,
        position: usize,
        len: usize,
        cos: &mut [f32],
        sin: &mut [f32],
    ) -> usize {
        let rope = self.weights.config.arch().positions(block).rope;
        let Some(rope) = rope.and_then(|rope| self.weights.ropes.get(rope)) else {
            return 0;
        };
        rope.rotation_at(position, len, cos, sin);
        rope.half()
    }

    /// The weight of a layer, `[d_output, d_input]`, without its adapter; that of the first subnet
    /// if subnets have weights of their own.
    ///
    /// # Errors
    /// Returns [`Error::InvalidArgument`] if there is no such layer, and [`Error::InvalidFile`] if
    /// the weight's contents are damaged.
    pub fn weight(&self, layer: usize) -> Result<&StoredMatrix> {
        self.layer(layer)?.weight.get()
    }

    /// Returns the factors of a layer's adapter, A `[r_max, d_input]` and B transposed
    /// `[r_max, d_output]`, and the scale at the largest rank. Returns `None` if the layer has no
    /// adapter.
    ///
    /// # Errors
    /// Returns the same errors as [`weight`](Self::weight).
    pub fn factors(&self, layer: usize) -> Result<Option<(Matrix, Matrix, f32)>> {
        let Some(adapter) = &self.layer(layer)?.adapter else {
            return Ok(None);
        };
        let scale = super::shape::scale(&adapter.lora, adapter.lora.rank);
        Ok(Some((
            adapter.a.get()?.to_matrix(),
            adapter.bt.get()?.to_matrix(),
            scale,
        )))
    }

    /// Reads all weights, checks their contents, and compares checksums if the model came from a
    /// bundle.
    ///
    /// # Errors
    /// Returns [`Error::InvalidFile`], naming the first damaged tensor.
    pub fn verify(&self) -> Result<()> {
        // A bundle is verified completely, including gaps and texts. The weights of a converted
        // model are not in a bundle.
        if let Some(bundle) = self.weights.embedding.bundle() {
            bundle.verify_on(&self.pool)?;
        }
        let (weights, failed): (Vec<&Weight>, _) = (self.weights.all(), Mutex::new(None));
        self.pool.for_each(weights.len(), |_, index| {
            if let Err(error) = weights[index].check_contents() {
                failed
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .get_or_insert(error);
            }
        });
        failed
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner)
            .map_or(Ok(()), Err)
    }

    pub(super) fn layer(&self, layer: usize) -> Result<&LayerWeights> {
        let n = self.weights.layers.len();
        let found = self.weights.layers.get(layer);
        found.ok_or_else(|| {
            Error::argument(
                "layer",
                layer,
                format!("less than {n}, the number of layers"),
            )
        })
    }

    pub(super) fn shape(&self, subnet: usize) -> Result<&Arc<Shape>> {
        let n = self.weights.shapes.len();
        let found = self.weights.shapes.get(subnet);
        found.ok_or_else(|| {
            Error::argument(
                "subnet",
                subnet,
                format!("less than {n}, the number of subnets"),
            )
        })
    }
}
