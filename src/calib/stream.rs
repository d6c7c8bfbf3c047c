//! Pruning and quantization from files to files, with one block in memory at a time.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor, TensorData};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::kept::samples_checksums;
use super::place::{Found, Place};
use super::states::StatesFile;
use super::{PruneConfig, PrunedLayer, QuantizeConfig, TOKENS_AT_ONCE, batches};
use crate::arch::{Architecture, LinearKind};
use crate::error::{Error, Result};
use crate::format::QuantizedMatrix;
use crate::io::hf::{FolderParts, Part};
use crate::io::source::{FolderSource, Held, ModelSource};
use crate::io::{DType, HfConfig, HostTensor, QuantFormat, atomic, hf, read_json_object};
use crate::model::Decoder;
use crate::progress::{Progress, Task};
use crate::sparsity::Pattern;

/// A model folder or GGUF file that is pruned or quantized into a folder, one block in memory at a
/// time: for models that do not fit into memory, and with the same result for those that do.
///
/// The weights of a block are loaded as `f32`, changed, and written as soon as they are done; the
/// hidden states of the samples are in a file. The work is in `NAME.unfinished` beside the folder
/// until it is complete. If it is interrupted or killed, the same call goes on at its block, and
/// the folder gets the same bytes. The folder has the tensors that
/// [`prune_model`](super::prune_model) and [`quantize_model`](super::quantize_model) give, bit for
/// bit, and the tokenizer and other files of the model.
///
/// ```no_run
/// use burn::tensor::Device;
/// use elastic_lora::calib::{PruneConfig, Streaming};
/// use elastic_lora::progress::TerminalProgress;
/// use elastic_lora::sparsity::{Method, Pattern};
///
/// # let samples: Vec<Vec<u32>> = vec![];
/// let config = PruneConfig::new(Method::Wanda, Pattern::Unstructured { ratio: 0.5 });
/// let streaming = Streaming::open("llama-7b", "llama-7b-sparse", &Device::flex())?;
/// streaming.prune(&samples, &config, &TerminalProgress::new())?;
/// # Ok::<(), elastic_lora::Error>(())
/// ```
#[derive(Debug)]
pub struct Streaming {
    source: FolderSource,
    destination: PathBuf,
    device: Device,
    dtype: DType,
    overwrite: bool,
    max_shard_bytes: u64,
}

/// What streaming needs, by estimate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamNeeds {
    /// Peak memory, in bytes.
    pub memory_bytes: u64,
    /// Space on the disk of the destination, in bytes: the folder and what is beside it until it is
    /// complete.
    pub disk_bytes: u64,
}

impl Streaming {
    /// Opens a Hugging Face folder, dense or quantized, or a GGUF file. `destination` is the folder
    /// to be written. By default numbers are written in the type of the embedding.
    ///
    /// # Errors
    /// Returns the errors of [`HfConfig::open`] and
    /// [`Checkpoint::open`](crate::io::Checkpoint::open), and [`Error::MissingTensor`].
    pub fn open(
        model: impl AsRef<Path>,
        destination: impl AsRef<Path>,
        device: &Device,
    ) -> Result<Self> {
        let source = FolderSource::open(model.as_ref())?;
        let dtype = match source.held(Architecture::EMBEDDING)? {
            Held::Numbers(dtype) => dtype,
            Held::Codes | Held::Blocks(_) => DType::F32,
        };
        Ok(Self {
            source,
            destination: destination.as_ref().into(),
            device: device.clone(),
            dtype,
            overwrite: false,
            max_shard_bytes: hf::MAX_SHARD_BYTES,
        })
    }

    /// Sets the type of the numbers that are written.
    pub fn with_dtype(mut self, dtype: DType) -> Self {
        self.dtype = dtype;
        self
    }

    /// Sets whether what is at the destination is replaced.
    pub fn with_overwrite(mut self, overwrite: bool) -> Self {
        self.overwrite = overwrite;
        self
    }

    /// Sets the size in bytes above which each block gets a file of its own.
    pub fn with_max_shard_bytes(mut self, max_shard_bytes: u64) -> Self {
        self.max_shard_bytes = max_shard_bytes;
        self
    }

    /// The config of the model.
    pub fn config(&self) -> &HfConfig {
        self.source.config()
    }

    /// Sentences about what is stored in the folder and not used, or used in another way than its
    /// files say.
    pub fn notices(&self) -> &[String] {
        self.source.config().notices()
    }

    /// Prunes every linear layer inside the blocks; see [`prune_model`](super::prune_model).
    ///
    /// # Errors
    /// Returns the errors of [`prune_model`](super::prune_model) and of reading and writing the
    /// files, and [`Error::InvalidState`] if there is unfinished work with other settings.
    pub fn prune(
        &self,
        samples: &[Vec<u32>],
        config: &PruneConfig,
        progress: &dyn Progress,
    ) -> Result<Vec<PrunedLayer>> {
        config.validate()?;
        let samples = config.needed(samples)?;
        let parts = self.begin("prune", config, samples, None)?;
        let patterns = self.patterns(&parts, samples, config, progress)?;
        let report = RefCell::new(BTreeMap::<usize, Vec<PrunedLayer>>::new());
        let note = |layer: PrunedLayer| {
            let block = LinearKind::parse(&layer.name).map_or(0, |(block, _)| block);
            report.borrow_mut().entry(block).or_default().push(layer);
        };
        let finished = |block: usize| Ok((BTreeMap::new(), json!(report.borrow().get(&block))));
        let restore = |block: usize, found: Value| {
            let layers: Option<Vec<PrunedLayer>> = parsed(&self.destination, found)?;
            report
                .borrow_mut()
                .insert(block, layers.unwrap_or_default());
            Ok(())
        };
        let mut place = self.in_files(parts, &finished, &restore);
        config.walk(&mut place, samples, &patterns, &note, progress)?;
        drop(place);
        Ok(report.take().into_values().flatten().collect())
    }

    /// Quantizes every linear layer inside the blocks, and writes them as codes in `format`; see
    /// [`quantize_model`](super::quantize_model). Returns the number of layers.
    ///
    /// # Errors
    /// Returns the errors of [`quantize_model`](super::quantize_model) and of reading and writing
    /// the files, and [`Error::InvalidState`] if there is unfinished work with other settings.
    pub fn quantize(
        &self,
        samples: &[Vec<u32>],
        config: &QuantizeConfig,
        format: QuantFormat,
        progress: &dyn Progress,
    ) -> Result<usize> {
        config.validate()?;
        let samples = config.needed(samples)?;
        let parts = self.begin("quantize", config, samples, Some(format))?;
        let codes = RefCell::new(BTreeMap::<String, QuantizedMatrix>::new());
        let put = |name: &str, found: QuantizedMatrix| {
            codes.borrow_mut().insert(name.to_string(), found);
        };
        // Only the codes of one block are there.
        let finished = |_: usize| Ok((codes.take(), Value::Null));
        let restore = |_: usize, _: Value| Ok(());
        let mut place = self.in_files(parts, &finished, &restore);
        config.walk(&mut place, samples, &put, progress)?;
        Ok(self.config().arch().linears().len())
    }

    /// Estimates what [`prune`](Self::prune) needs.
    pub fn prune_needs(&self, samples: &[Vec<u32>], config: &PruneConfig) -> StreamNeeds {
        let hessians = config.method == crate::sparsity::Method::SparseGpt;
        let samples = match config.method.needs_calibration() {
            true => samples,
            false => &[],
        };
        self.needs(samples, hessians, self.dtype.size() as f64)
    }

    /// Estimates what [`quantize`](Self::quantize) needs.
    pub fn quantize_needs(&self, samples: &[Vec<u32>], config: &QuantizeConfig) -> StreamNeeds {
        let hessians = config.method != super::QuantizeMethod::Nearest;
        let samples = if hessians { samples } else { &[] };
        let grid = &config.gptq.grid;
        // A scale in 16 bits, and a zero point, for each group.
        let group = grid.group_size.unwrap_or(4096).max(1) as f64;
        let bits = f64::from(grid.bits);
        self.needs(samples, hessians, (bits + (16.0 + bits) / group) / 8.0)
    }

    /// `weight_bytes`: bytes that a weight of a layer takes in the folder.
    fn needs(&self, samples: &[Vec<u32>], hessians: bool, weight_bytes: f64) -> StreamNeeds {
        let arch = self.config().arch();
        let linears = arch.linears();
        let of_block = |block: usize, value: &dyn Fn(u64, u64) -> u64| -> u64 {
            let layers = linears.iter().filter(|layer| layer.block == block);
            let values = layers.map(|layer| value(layer.d_output as u64, layer.d_input as u64));
            values.sum()
        };
        let blocks = 0..arch.blocks.len();
        let weights = |rows, cols| rows * cols;
        let block = blocks.clone().map(|b| of_block(b, &weights)).max();
        let (block, layers) = (block.unwrap_or(0), linears.iter());
        let largest = layers.map(|layer| layer.d_output as u64 * layer.d_input as u64);
        let table = (arch.vocab_size * arch.d_model) as u64;
        let largest_block = arch.blocks.iter().map(|dims| dims.d_mlp as u64).max();
        let d_mlp = largest_block.unwrap_or(0);
        let d_model = arch.d_model as u64;
        let attention = arch.blocks.iter().map(|dims| dims.n_heads * arch.head_dim);
        let attention = attention.max().unwrap_or(0) as u64;
        // One for each input that layers share, and a second copy while one is factored.
        let squares = if hessians {
            2 * d_model * d_model + attention * attention + 2 * d_mlp * d_mlp
        } else {
            0
        };
        let lens = samples.iter().map(Vec::len);
        let n_tokens: u64 = lens.clone().map(|len| len as u64).sum();
        let at_once = n_tokens.min(TOKENS_AT_ONCE.max(lens.max().unwrap_or(0)) as u64);
        let activations = at_once * (6 * d_model + 4 * attention + 4 * d_mlp);
        // A layer is there as a tensor, a matrix, its transpose, scores and the new weight.
        let largest = largest.max().unwrap_or(0);
        let in_walk = block + 4 * largest + squares + activations;
        let numbers = in_walk.max(2 * table);
        let in_blocks: u64 = linears
            .iter()
            .map(|layer| layer.d_output as u64 * layer.d_input as u64)
            .sum();
        let tensors = arch.tensors().into_iter();
        let all: u64 = tensors
            .map(|(_, shape)| shape.iter().product::<usize>() as u64)
            .sum();
        let outside = all - in_blocks;
        let folder = (in_blocks as f64 * weight_bytes) as u64 + outside * self.dtype.size() as u64;
        // A folder of one file is joined from those of its blocks.
        let joined = if folder <= self.max_shard_bytes {
            folder
        } else {
            0
        };
        StreamNeeds {
            memory_bytes: 4 * numbers + (100 << 20),
            disk_bytes: folder + joined + 2 * 4 * n_tokens * d_model,
        }
    }

    fn begin(
        &self,
        work: &str,
        settings: &impl Serialize,
        samples: &[Vec<u32>],
        format: Option<QuantFormat>,
    ) -> Result<FolderParts> {
        let checkpoint = self.source.checkpoint();
        let outside = checkpoint.names().filter(|name| !name.starts_with(BLOCKS));
        let job = json!({
            "work": work,
            "settings": settings,
            "samples": samples_checksums(samples),
            "outside": checkpoint.checksum(outside)?,
        });
        let (destination, config) = (&self.destination, self.config());
        FolderParts::begin(
            destination,
            self.overwrite,
            config,
            self.dtype,
            format,
            &job,
        )
    }

    /// The model in its files, whose changed blocks are written to `parts`; see [`Output`].
    fn in_files<'a>(
        &'a self,
        parts: FolderParts,
        finished: &'a dyn Fn(usize) -> Result<(Codes, Value)>,
        restore: &'a dyn Fn(usize, Value) -> Result<()>,
    ) -> InFiles<'a> {
        let notes = parts.notes().to_path_buf();
        let output = Output {
            parts,
            dtype: self.dtype,
            max_shard_bytes: self.max_shard_bytes,
            finished,
            restore,
        };
        InFiles::new(&self.source, &self.device, notes, Some(output))
    }

    /// The pattern of each block, which is kept once it is known.
    fn patterns(
        &self,
        parts: &FolderParts,
        samples: &[Vec<u32>],
        config: &PruneConfig,
        progress: &dyn Progress,
    ) -> Result<Vec<Pattern>> {
        if config.owl.is_none() {
            return Ok(vec![config.pattern; self.config().arch().blocks.len()]);
        }
        let path = parts.notes().join("patterns.json");
        if path.exists() {
            let mut found = read_json_object(&path)?;
            return parsed(&path, found.remove("patterns").unwrap_or_default());
        }
        let notes = parts.notes().join("first-pass");
        std::fs::create_dir_all(&notes).map_err(|e| Error::io(&notes, e))?;
        let mut place = InFiles::new(&self.source, &self.device, notes, None);
        let patterns = config.patterns(&mut place, samples, progress)?;
        atomic::write_json(&path, &json!({ "patterns": patterns }))?;
        Ok(patterns)
    }
}

/// Beginning of the names of tensors of blocks.
const BLOCKS: &str = "model.layers.";

fn parsed<T: DeserializeOwned>(path: &Path, value: Value) -> Result<T> {
    serde_json::from_value(value).map_err(|e| Error::json(path, e))
}

/// Codes of quantized layers by name.
type Codes = BTreeMap<String, QuantizedMatrix>;

/// A folder that the changed blocks are written to.
struct Output<'a> {
    parts: FolderParts,
    dtype: DType,
    max_shard_bytes: u64,
    /// Takes the codes of a block, and gives a report about it.
    finished: &'a dyn Fn(usize) -> Result<(Codes, Value)>,
    /// Takes the report about a block that an earlier process finished.
    restore: &'a dyn Fn(usize, Value) -> Result<()>,
}

/// A model in files, of which one block is in memory, and hidden states in a file.
struct InFiles<'a> {
    source: &'a FolderSource,
    model: Decoder,
    /// Folder of the hidden states.
    notes: PathBuf,
    states: StatesFile,
    output: Option<Output<'a>>,
    /// The block that was entered last.
    block: usize,
    /// Number of blocks that were finished before.
    first: usize,
}

impl<'a> InFiles<'a> {
    /// Without an `output`, the model is only looked at.
    fn new(
        source: &'a FolderSource,
        device: &Device,
        notes: PathBuf,
        output: Option<Output<'a>>,
    ) -> Self {
        let model = Decoder::without_weights(source.config(), device);
        Self {
            source,
            states: StatesFile::new(&notes, &[], 0, device),
            model,
            notes,
            output,
            block: 0,
            first: 0,
        }
    }

    /// Checksum of all that the checkpoint has of a block.
    fn checksum(&self, block: usize) -> Result<u32> {
        let checkpoint = self.source.checkpoint();
        let prefix = format!("{BLOCKS}{block}.");
        checkpoint.checksum(checkpoint.names().filter(|name| name.starts_with(&prefix)))
    }

    /// Finds the finished blocks and the hidden states behind the last of them.
    fn find(&mut self, task: &Task<'_>) -> Result<()> {
        let Some(output) = &self.output else {
            return Ok(());
        };
        let mut found = Vec::new();
        while found.len() < self.model.layers.len()
            && let Some(part) = output.parts.part(found.len())?
        {
            task.check()?;
            if part.source != self.checksum(found.len())? {
                return Err(Error::InvalidState {
                    what: "going on with an unfinished folder",
                    reason: format!(
                        "block {} of {} has changed since; remove {} to begin again",
                        found.len(),
                        self.source.path().display(),
                        output.parts.notes().display()
                    ),
                });
            }
            found.push(part);
        }
        // Nothing comes after the last block.
        if found.len() < self.model.layers.len() {
            while let Some(last) = found.last() {
                if self.states.open(found.len(), last.states)? {
                    break;
                }
                found.pop();
            }
        }
        self.first = found.len();
        if let Some(before) = self.first.checked_sub(1) {
            self.states.remove(before)?;
        }
        for (block, part) in found.into_iter().enumerate() {
            (output.restore)(block, part.report)?;
        }
        Ok(())
    }

    /// Writes the embedded samples.
    fn embed(&mut self, samples: &[Vec<u32>], task: &Task<'_>) -> Result<()> {
        let source = self.source;
        let name = source.stored_name(Architecture::EMBEDDING)?;
        let d_model = self.model.config().hidden_size();
        for (batch, (rows, ids)) in batches(samples, TOKENS_AT_ONCE).into_iter().enumerate() {
            task.check()?;
            // Checks them.
            self.model.tokens(&ids, rows)?;
            let values = source.checkpoint().load_rows(name, &ids)?;
            let data = TensorData::new(values, [rows, ids.len() / rows, d_model]);
            let states = self
                .model
                .embedded(Tensor::from_data(data, &self.model.device()));
            self.states.put(0, batch, states)?;
        }
        source.release(name);
        self.states.advance(0)?;
        Ok(())
    }
}

impl Place for InFiles<'_> {
    fn model(&self) -> &Decoder {
        &self.model
    }

    fn model_mut(&mut self) -> &mut Decoder {
        &mut self.model
    }

    fn begin(&mut self, samples: &[Vec<u32>], task: &Task<'_>) -> Result<()> {
        let d_model = self.model.config().hidden_size();
        self.states = StatesFile::new(&self.notes, samples, d_model, &self.model.device());
        self.find(task)?;
        match self.first {
            0 => self.embed(samples, task),
            _ => Ok(()),
        }
    }

    fn enter(&mut self, block: usize) -> Result<Found> {
        self.block = block;
        if block < self.first {
            return Ok(Found::Passed);
        }
        self.model.load_block(self.source.checkpoint(), block)?;
        Ok(Found::Open)
    }

    fn n_batches(&self) -> usize {
        self.states.n_batches()
    }

    fn states(&mut self, batch: usize) -> Result<Tensor<3>> {
        self.states.get(batch)
    }

    fn set_states(&mut self, batch: usize, states: Tensor<3>) -> Result<()> {
        self.states.put(self.block + 1, batch, states)
    }

    fn changed(&mut self, _block: usize) -> Result<()> {
        Ok(())
    }

    fn leave(&mut self, block: usize) -> Result<()> {
        let states = self.states.advance(block + 1)?;
        if let Some(output) = &self.output {
            let (codes, report) = (output.finished)(block)?;
            let part = Part::new(self.checksum(block)?, states, report);
            let tensors = self.model.block_tensors(block, output.dtype);
            output.parts.put(block, tensors, &codes, part)?;
        }
        // Until here, the block could be done again.
        self.states.remove(block)?;
        self.model.drop_block(block);
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        let Some(output) = self.output.take() else {
            return Ok(());
        };
        let (source, dtype) = (self.source, output.dtype);
        let tensors = source.config().arch().tensors().into_iter();
        let rest = tensors.filter(|(name, _)| !name.starts_with(BLOCKS));
        let rest = rest.map(|(name, shape)| {
            let (tensor, from) = (name.clone(), shape.clone());
            HostTensor::lazy_f32(name, dtype, shape, move || source.numbers(&tensor, &from))
        });
        let (parts, most) = (output.parts, output.max_shard_bytes);
        parts.finish(rest.collect(), source.path(), most)
    }
}
