//! A model as it is run.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use crate::arch::{Architecture, LinearSpec, NormKind, NormSpec, Rope, SubBlock};
use crate::data::TextTokenizer;
use crate::error::{Error, Result};
use crate::format::{StoredMatrix, WeightFormat};
use crate::io::HfConfig;
use crate::kernels::Pool;
use crate::linalg::Matrix;
use crate::space::{Elastic, SearchSpace, SubnetConfig, widths};

use super::linear::LinearLayer;
use super::shape::Shape;
use super::weights::{LayerWeights, Norms, Weight};

/// What is compared with its checksum, and when. Whatever is chosen, the contents of a weight are checked before its first use as far
/// as they could lead outside of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Verify {
    /// A weight at its first use, so that opening reads none.
    #[default]
    OnUse,
    /// All weights on opening.
    OnOpen,
    /// Nothing: where the file was verified before.
    Never,
}

/// How a model is opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelOptions {
    /// Threads of the kernels, the caller's among them; 0 for one per core.
    pub n_threads: usize,
    /// Whether files are mapped, so that only what is used is read, or else read as a whole. A mapped file must not change.
    pub mmap: bool,
    /// When checksums are compared; a Hugging Face folder has none.
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

impl ModelOptions {
    /// Sets the number of threads; 0 for one per core.
    pub fn with_n_threads(mut self, n_threads: usize) -> Self {
        self.n_threads = n_threads;
        self
    }

    /// Sets whether files are mapped.
    pub fn with_mmap(mut self, mmap: bool) -> Self {
        self.mmap = mmap;
        self
    }

    /// Sets when checksums are compared.
    pub fn with_verify(mut self, verify: Verify) -> Self {
        self.verify = verify;
        self
    }
}

/// A linear layer of a [`Model`].
#[derive(Clone, Debug, PartialEq)]
pub struct LayerInfo {
    /// Hugging Face's module path, such as `model.layers.0.self_attn.q_proj`; `lm_head` for the head.
    pub name: String,
    /// Inputs of the whole layer.
    pub d_input: usize,
    /// Outputs of the whole layer.
    pub d_output: usize,
    /// Largest rank of its adapter; 0 where there is none.
    pub max_rank: usize,
    /// How its weight is stored.
    pub format: WeightFormat,
    /// Bytes of its weight, those of its adapter left out. A tied head's are the embedding's.
    pub bytes: usize,
    /// Bytes of its adapter.
    pub adapter_bytes: usize,
    /// Whether there is a bias.
    pub bias: bool,
}

/// A subnet that a [`Model`] knows by name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedSubnet {
    /// The name.
    pub name: String,
    /// Its values; empty in a model without a search space.
    pub config: SubnetConfig,
}

/// The name of a model's first subnet, which is all of it.
pub(super) const WHOLE: &str = "whole";

/// The tokenizer, and the text that it was made of.
#[derive(Clone, Debug)]
pub(crate) struct Tokenizer {
    pub json: Arc<str>,
    pub inner: TextTokenizer,
}

/// Everything that does not change.
#[derive(Clone, Debug)]
pub(crate) struct Weights {
    pub config: HfConfig,
    /// `[vocab_size, d_model]`; the head as well where they are tied.
    pub embedding: Weight,
    /// The norms of each block.
    pub norms: Vec<Norms>,
    pub final_norm: Arc<[f32]>,
    /// The linear layers of the blocks in the config's order, and the head at last.
    pub layers: Vec<LayerWeights>,
    /// The first layer of the attention and of the MLP of each block.
    pub first: Vec<[Option<usize>; 2]>,
    pub rope: Rope,
    pub space: Option<SearchSpace>,
    pub subnets: Vec<NamedSubnet>,
    pub shapes: Vec<Arc<Shape>>,
    pub infos: Vec<LayerInfo>,
    pub tokenizer: Option<Tokenizer>,
    pub stop_ids: Vec<u32>,
}

/// What a model is made of; see [`Weights`].
pub(crate) struct ModelParts {
    pub config: HfConfig,
    pub embedding: Weight,
    pub norms: Vec<Norms>,
    pub final_norm: Arc<[f32]>,
    /// Without a tied head.
    pub layers: Vec<LayerWeights>,
    pub space: Option<SearchSpace>,
    pub subnets: Vec<(String, SubnetConfig)>,
    pub tokenizer: Option<Tokenizer>,
    pub stop_ids: Vec<u32>,
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

/// Checks a layer against what the config asks for at this index; without a specification that is the
/// head, `[vocab_size, d_model]`.
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
    expect_matrix(&layer.weight, d_output, d_input)?;
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
    /// Puts a model together, checking every size against the config and the space.
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
        let rope = arch.rope();
        let mut weights = Self {
            config,
            embedding: parts.embedding,
            norms: parts.norms,
            final_norm: parts.final_norm,
            layers,
            first,
            rope,
            space: None,
            subnets: Vec::new(),
            shapes: Vec::new(),
            infos,
            tokenizer: parts.tokenizer,
            stop_ids: parts.stop_ids,
        };
        weights.set_space(parts.space, parts.subnets)?;
        Ok(weights)
    }

    /// Sets space and subnets, having checked them.
    fn set_space(
        &mut self,
        space: Option<SearchSpace>,
        subnets: Vec<(String, SubnetConfig)>,
    ) -> Result<()> {
        let whole = NamedSubnet {
            name: WHOLE.into(),
            config: SubnetConfig::new(),
        };
        self.subnets = vec![whole];
        self.shapes = vec![Arc::new(Shape::full(self))];
        let Some(space) = space.filter(|space| !space.groups().is_empty()) else {
            return match subnets.into_iter().next() {
                None => Ok(()),
                Some((name, _)) => Err(Error::UnknownSubnet {
                    name,
                    known: WHOLE.into(),
                }),
            };
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
        for (name, config) in std::iter::once((WHOLE.to_string(), space.maximal())).chain(subnets) {
            let shape = Arc::new(Shape::of_subnet(self, &space, &config)?);
            if name == WHOLE && self.subnets[0].config.is_empty() {
                // The largest choices may be less than the model has.
                (self.subnets[0].config, self.shapes[0]) = (config, shape);
                continue;
            }
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
        }
        self.space = Some(space);
        Ok(())
    }

    /// Every weight. A loop, since valgrind takes what the compiler makes of chained iterators for a read of nothing in particular, and
    /// would say so to whoever loads a model.
    pub fn all(&self) -> Vec<&Weight> {
        let mut all = vec![&self.embedding];
        for layer in &self.layers {
            all.push(&layer.weight);
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

/// A model as it is run: compressed weights, adapters that are not merged, a search space with named subnets, a tokenizer.
///
/// It does not change, is shared by all its clones, and may be used from any number of threads. What is active in it is a
/// [`Session`](super::Session)'s business.
///
/// ```no_run
/// # use elastic_lora::format::WeightFormat;
/// # use elastic_lora::runtime::{GenerateConfig, Model, ModelOptions, Session, SessionConfig};
/// # fn main() -> elastic_lora::Result<()> {
/// // A Hugging Face folder, dense or quantized, becomes a bundle; a bundle is opened by memory map.
/// let folder = Model::open("llama", &ModelOptions::default())?;
/// folder.with_format(WeightFormat::Int { bits: 4, group_size: Some(128), symmetric: false })?.save("llama.elora", false)?;
/// let model = Model::open("llama.elora", &ModelOptions::default())?;
/// let mut session = Session::new(&model, &SessionConfig::default())?;
/// let ids = session.generate(&[1, 2, 3], &GenerateConfig::new(64, model.stop_ids().to_vec()), |_| true)?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Model {
    pub(super) weights: Arc<Weights>,
    pub(super) pool: Arc<Pool>,
}

impl Model {
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

    /// The same model with a pool of its own of so many threads; 0 for one per core. Weights are shared.
    pub fn with_n_threads(&self, n_threads: usize) -> Self {
        Self {
            weights: self.weights.clone(),
            pool: Arc::new(Pool::new(n_threads)),
        }
    }

    /// The architecture, with the sizes of the whole model.
    pub fn config(&self) -> &HfConfig {
        &self.weights.config
    }

    /// Threads of the kernels, the caller's among them.
    pub fn n_threads(&self) -> usize {
        self.pool.threads()
    }

    /// The linear layers: those of the blocks in the order of computation, and the head at last.
    pub fn layers(&self) -> &[LayerInfo] {
        &self.weights.infos
    }

    /// The position of a layer in [`layers`](Self::layers).
    pub fn layer_index(&self, name: &str) -> Option<usize> {
        self.weights
            .infos
            .iter()
            .position(|layer| layer.name == name)
    }

    /// The subnets that it knows by name. The first is always there, and is the whole model.
    pub fn subnets(&self) -> &[NamedSubnet] {
        &self.weights.subnets
    }

    /// The position of a subnet in [`subnets`](Self::subnets).
    ///
    /// # Errors
    /// [`Error::UnknownSubnet`].
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

    /// The space of its subnets, where it is a super-network.
    pub fn space(&self) -> Option<&SearchSpace> {
        self.weights.space.as_ref()
    }

    /// The tokenizer, where there is one.
    pub fn tokenizer(&self) -> Option<&TextTokenizer> {
        self.weights
            .tokenizer
            .as_ref()
            .map(|tokenizer| &tokenizer.inner)
    }

    /// The tokens that end a generation.
    pub fn stop_ids(&self) -> &[u32] {
        &self.weights.stop_ids
    }

    /// Bytes of all weights, embedding, adapters and head included, norms and biases left out.
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
    /// [`Error::InvalidFile`] where its contents are not those that were written.
    pub fn embedding(&self) -> Result<&StoredMatrix> {
        self.weights.embedding.get()
    }

    /// The gains of a norm, by the name of its tensor ([`Architecture::norm_tensor`]).
    pub fn norm(&self, tensor: &str) -> Option<&[f32]> {
        if tensor == Architecture::FINAL_NORM {
            return Some(&self.weights.final_norm);
        }
        let arch = self.weights.config.arch();
        self.weights
            .norms
            .iter()
            .enumerate()
            .find_map(|(block, norms)| {
                let found = norms
                    .iter()
                    .find(|(kind, _)| arch.norm_tensor(block, **kind) == tensor);
                found.map(|(_, gains)| &gains[..])
            })
    }

    /// Cosines and sines of rotary attention at a position.
    ///
    /// # Shapes
    /// - `cos`, `sin`: `[head_dim / 2]` each
    pub fn rotary(&self, position: usize, cos: &mut [f32], sin: &mut [f32]) {
        self.weights.rope.rotation_at(position, cos, sin);
    }

    /// The weight of a layer, `[d_output, d_input]`, without its adapter.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a layer that there is not; [`Error::InvalidFile`] where its contents are not those that were written.
    pub fn weight(&self, layer: usize) -> Result<&StoredMatrix> {
        self.layer(layer)?.weight.get()
    }

    /// The factors of a layer's adapter, A `[r_max, d_input]` and B transposed `[r_max, d_output]`, and the scale of the largest rank;
    /// nothing where there is no adapter.
    ///
    /// # Errors
    /// As [`weight`](Self::weight).
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

    /// One linear layer under a subnet, to be applied to the caller's numbers. It keeps the model alive.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for a layer or subnet that there is not, or a layer that the subnet leaves out;
    /// [`Error::InvalidFile`] where its contents are not those that were written.
    pub fn linear(&self, layer: usize, subnet: usize) -> Result<LinearLayer> {
        LinearLayer::new(self, layer, subnet)
    }

    /// Reads all weights, and compares them with their checksums where there are any.
    ///
    /// # Errors
    /// [`Error::InvalidFile`] that names the first tensor whose contents are not those that were written.
    pub fn verify(&self) -> Result<()> {
        // Of a bundle everything, gaps and texts included; the weights of a converted model lie in none.
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
            Error::argument("layer", layer, format!("under the number of layers, {n}"))
        })
    }

    pub(super) fn shape(&self, subnet: usize) -> Result<&Arc<Shape>> {
        let n = self.weights.shapes.len();
        let found = self.weights.shapes.get(subnet);
        found.ok_or_else(|| {
            Error::argument(
                "subnet",
                subnet,
                format!("under the number of subnets, {n}"),
            )
        })
    }

    /// Opens a bundle, a Hugging Face folder (dense, GPTQ or compressed-tensors) or a GGUF file. Dense weights are used as they lie
    /// in the file, and the codes of blocks stay the codes that they are.
    ///
    /// # Errors
    /// Those of [`Bundle::open`](crate::io::bundle::Bundle::open) or [`HfConfig::open`] and
    /// [`Checkpoint::open`](crate::io::Checkpoint::open); whatever makes no model, by name.
    pub fn open(path: impl AsRef<Path>, options: &ModelOptions) -> Result<Self> {
        let path = path.as_ref();
        let is_folder = std::fs::metadata(path)
            .map_err(|e| Error::io(path, e))?
            .is_dir();
        let parts = if is_folder || crate::io::gguf::is_gguf(path) {
            super::build::from_folder(path, options)?
        } else {
            super::bundle::read(path, options)?
        };
        let model = Self::from_weights(Weights::new(parts)?, options.n_threads);
        if options.verify == Verify::OnOpen {
            model.verify()?;
        }
        Ok(model)
    }
}
