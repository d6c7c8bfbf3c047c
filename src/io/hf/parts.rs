//! Model folders that are written block by block, and gone on with after an interruption.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::config::HfConfig;
use super::folder::{self, HfFolder};
use super::quantized::{self, Layers};
use crate::error::{Error, Result};
use crate::io::quantized::{GridKind, QuantFormat, QuantizationConfig};
use crate::io::tensors::{Checkpoint, DType, HostTensor, write_safetensors};
use crate::io::{MAX_JSON_BYTES, atomic, read_capped};

/// A model folder in the making. Each finished block is a file, which becomes a shard of the folder
/// or, in a folder of one file, a part of that.
///
/// The work is in `NAME.unfinished` beside the folder until [`finish`](Self::finish). A later
/// process that begins the same job finds there what is done, wherever the first one was ended.
#[derive(Debug)]
#[doc(hidden)]
pub struct FolderParts {
    folder: HfFolder,
    config: HfConfig,
    dtype: DType,
    format: Option<QuantFormat>,
}

/// What is noted about a finished block.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[doc(hidden)]
pub struct Part {
    /// Checksum of the tensors that the block was made of.
    pub source: u32,
    /// Checksum of the hidden states behind the block.
    pub states: u32,
    /// What the caller reports about the block.
    pub report: Value,
    /// The grids of its quantized layers.
    grids: BTreeMap<String, GridKind>,
}

impl Part {
    /// Creates a note about a block.
    pub fn new(source: u32, states: u32, report: Value) -> Self {
        Self {
            source,
            states,
            report,
            grids: BTreeMap::new(),
        }
    }
}

impl FolderParts {
    /// Begins the folder `destination`, or goes on with it. `job` describes all that the result
    /// depends on, except the weights of the blocks. With a `format`, layers are stored as codes.
    ///
    /// # Errors
    /// Returns the errors of [`FolderWriter::create`](crate::io::FolderWriter::create), and
    /// [`Error::InvalidState`] if the work that is there belongs to another job.
    pub fn begin(
        destination: &Path,
        overwrite: bool,
        config: &HfConfig,
        dtype: DType,
        format: Option<QuantFormat>,
        job: &Value,
    ) -> Result<Self> {
        let folder = HfFolder::go_on(destination, overwrite)?;
        clear_temporary(folder.path())?;
        clear_temporary(folder.notes())?;
        let path = folder.notes().join("job.json");
        let job = json!({
            "version": env!("CARGO_PKG_VERSION"),
            "config": config.raw(),
            "dtype": dtype.name(),
            "format": format.map(QuantFormat::name),
            "job": job,
        });
        if path.exists() {
            let found: Value = read_json(&path)?;
            // As text, since numbers that were written and read may be of another kind.
            let [found, expected] = [found, job].map(|value| value.to_string());
            if found != expected {
                return Err(Error::InvalidState {
                    what: "going on with an unfinished folder",
                    reason: format!(
                        "{} holds work with other settings, samples or another model; remove it \
                         to begin again",
                        folder.notes().display()
                    ),
                });
            }
        } else {
            atomic::write_json(&path, &job)?;
        }
        Ok(Self {
            folder,
            // The config may come from a quantized folder, but unchanged weights are plain.
            config: config.with_quantization(None),
            dtype,
            format,
        })
    }

    /// The folder for files of the caller, such as hidden states.
    pub fn notes(&self) -> &Path {
        self.folder.notes()
    }

    fn note_path(&self, block: usize) -> PathBuf {
        self.notes().join(format!("block-{}.json", block + 1))
    }

    /// The file of a block, or of what is not in a block (0).
    fn shard_path(&self, index: usize) -> PathBuf {
        let n = self.config.num_hidden_layers() + 1;
        let name = format!("model-{:05}-of-{n:05}.safetensors", index + 1);
        self.folder.path().join(name)
    }

    /// What is noted about a block, or `None` if it is not finished.
    ///
    /// # Errors
    /// Returns [`Error::Json`] or [`Error::Io`] if the note cannot be read.
    pub fn part(&self, block: usize) -> Result<Option<Part>> {
        let (note, shard) = (self.note_path(block), self.shard_path(block + 1));
        let joined = self.folder.path().join(JOINED);
        match note.exists() && (shard.exists() || joined.exists()) {
            true => read_json(&note).map(Some),
            false => Ok(None),
        }
    }

    /// Writes a block: its tensors, except the weights of `layers`, which become codes.
    ///
    /// # Errors
    /// Returns the errors of writing tensors and of
    /// [`HfFolder::write_quantized`].
    pub fn put(
        &self,
        block: usize,
        tensors: Vec<HostTensor<'_>>,
        layers: &Layers,
        mut part: Part,
    ) -> Result<()> {
        let shard = self.shard_path(block + 1);
        part.grids = self.write(&shard, tensors, layers, block)?;
        atomic::write_json(self.note_path(block), &part)
    }

    fn write(
        &self,
        path: &Path,
        mut tensors: Vec<HostTensor<'_>>,
        layers: &Layers,
        block: usize,
    ) -> Result<BTreeMap<String, GridKind>> {
        let replaced = |name: &str| {
            name.strip_suffix(".weight")
                .is_some_and(|layer| layers.contains_key(layer))
        };
        tensors.retain(|tensor| !replaced(tensor.name()));
        let all: Vec<_> = self.config.arch().block_linears(block).collect();
        quantized::check_layers(layers, &all)?;
        let (stored, all) = quantized::fused(&self.config, layers, all)?;
        let mut tensors = folder::fused(&self.config, tensors, replaced)?;
        let grids = stored.iter();
        let grids: BTreeMap<_, _> = grids
            .map(|(name, matrix)| (name.clone(), GridKind::of(matrix)))
            .collect();
        if let Some(format) = self.format.filter(|_| !stored.is_empty()) {
            let quantization = QuantizationConfig::for_grids(format, &grids, &all)?;
            for (name, matrix) in stored.iter() {
                tensors.extend(quantization.layer_tensors(name, matrix)?);
            }
        }
        write_safetensors(path, tensors, &BTreeMap::new())?;
        Ok(grids)
    }

    /// Writes `rest`, the tensors outside the blocks, and moves the folder to its destination, with
    /// the tokenizer and other files of `source`. If all weights fit into `max_shard_bytes`, they
    /// become one file, with the bytes that [`HfFolder`] writes; otherwise each block is a shard.
    ///
    /// # Errors
    /// Returns [`Error::InvalidState`] if a block is missing, [`Error::MissingTensor`] or
    /// [`Error::TensorShape`] if the tensors do not match the config, and the errors of
    /// [`HfFolder`].
    pub fn finish(
        self,
        rest: Vec<HostTensor<'_>>,
        source: &Path,
        max_shard_bytes: u64,
    ) -> Result<()> {
        let n_blocks = self.config.num_hidden_layers();
        let mut grids = BTreeMap::new();
        for block in 0..n_blocks {
            let part = self.part(block)?.ok_or_else(|| Error::InvalidState {
                what: "finishing a folder",
                reason: format!("block {block} is missing"),
            })?;
            grids.extend(part.grids);
        }
        let quantization = match self.format {
            Some(format) => Some(self.quantization(format, &grids)?),
            None => None,
        };
        let config = self.config.with_quantization(quantization);
        let joined = self.folder.path().join(JOINED);
        if !joined.exists() {
            write_safetensors(self.shard_path(0), rest, &BTreeMap::new())?;
            let shards = (0..=n_blocks).map(|index| self.shard_path(index));
            self.join_or_index(shards.collect(), max_shard_bytes)?;
        }
        if joined.exists() {
            // What an earlier process may have left, too.
            let shards = (0..=n_blocks).map(|index| self.shard_path(index));
            for path in shards.chain([self.folder.path().join(INDEX)]) {
                if path.exists() {
                    std::fs::remove_file(&path).map_err(|e| Error::io(&path, e))?;
                }
            }
        }
        let path = self.folder.path();
        config.write(path, self.dtype, config.tie_word_embeddings())?;
        if let Some(quantization) = config.quantization() {
            self.folder.write_quantize_config(quantization)?;
        }
        self.folder.carry_over(source)?;
        config.check(&Checkpoint::open(path)?)?;
        self.folder.commit()
    }

    /// The config of all quantized layers, which has to be the one by which each block was written.
    fn quantization(
        &self,
        format: QuantFormat,
        grids: &BTreeMap<String, GridKind>,
    ) -> Result<QuantizationConfig> {
        let no_layers = BTreeMap::new();
        let (_, all) = quantized::fused(&self.config, &no_layers, self.config.arch().linears())?;
        let whole = QuantizationConfig::for_grids(format, grids, &all)?;
        for block in 0..self.config.num_hidden_layers() {
            let prefix = format!("model.layers.{block}.");
            let here = grids.iter().filter(|(name, _)| name.starts_with(&prefix));
            let here: BTreeMap<_, _> = here.map(|(name, grid)| (name.clone(), *grid)).collect();
            if here.is_empty() {
                continue;
            }
            let of_block = all.iter().filter(|layer| layer.block == block).cloned();
            let of_block: Vec<_> = of_block.collect();
            let own = QuantizationConfig::for_grids(format, &here, &of_block)?;
            if (own.bits(), own.group_size(), own.symmetric())
                != (whole.bits(), whole.group_size(), whole.symmetric())
            {
                return Err(Error::Unsupported {
                    what: format!("block {block} with grids of another kind, in one folder"),
                });
            }
        }
        Ok(whole)
    }

    /// Joins the shards to one file if they fit, or writes their index.
    fn join_or_index(&self, shards: Vec<PathBuf>, max_shard_bytes: u64) -> Result<()> {
        // Each by itself, since a folder shows some tensors under other names.
        let open = shards.iter().map(Checkpoint::open);
        let open = open.collect::<Result<Vec<_>>>()?;
        let total: u64 = open.iter().map(Checkpoint::total_bytes).sum();
        if total <= max_shard_bytes {
            let mut tensors = Vec::new();
            for shard in &open {
                for name in shard.names() {
                    let info = shard.info(name)?;
                    let (dtype, shape) = (info.dtype, info.shape.clone());
                    let tensor = HostTensor::from_bytes(name, dtype, shape, shard.bytes(name)?);
                    // There is nothing to give back for a tensor that is not there.
                    tensors.push(tensor.then(move || _ = shard.release(name)));
                }
            }
            return write_safetensors(self.folder.path().join(JOINED), tensors, &BTreeMap::new());
        }
        let mut weight_map = BTreeMap::new();
        for (shard, path) in open.iter().zip(&shards) {
            let file = path.file_name().unwrap_or_default().to_string_lossy();
            weight_map.extend(
                shard
                    .names()
                    .map(|name| (name.to_string(), file.to_string())),
            );
        }
        atomic::write_json(
            self.folder.path().join(INDEX),
            &json!({"metadata": {"total_size": total}, "weight_map": weight_map}),
        )
    }
}

/// Name of the file of all weights.
const JOINED: &str = "model.safetensors";

/// Name of the list of all files of weights, if there are several.
const INDEX: &str = "model.safetensors.index.json";

/// Removes temporary files, whose names begin with a dot, of killed processes. Nobody else writes
/// into the folder, whose destination is locked.
fn clear_temporary(folder: &Path) -> Result<()> {
    let at = |e| Error::io(folder, e);
    for entry in std::fs::read_dir(folder).map_err(at)? {
        let entry = entry.map_err(at)?;
        if entry.file_name().as_encoded_bytes().starts_with(b".") {
            std::fs::remove_file(entry.path()).map_err(|e| Error::io(entry.path(), e))?;
        }
    }
    Ok(())
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T> {
    let text = read_capped(path, MAX_JSON_BYTES)?;
    serde_json::from_slice(&text).map_err(|e| Error::json(path, e))
}
