//! Keeps the finished blocks of a walk in a folder, so that work that was interrupted goes on from
//! there with the same results.

use std::path::{Path, PathBuf};

use burn::tensor::{Tensor, TensorData};
use serde::Serialize;
use serde_json::{Value, json};

use crate::arch::LinearKind;
use crate::error::{Error, Result};
use crate::format::StoredMatrix;
use crate::io::bundle::{Bundle, BundleWriter};
use crate::model::Decoder;
use crate::nn::{BaseLinear, host_values};

/// Stores a layer that a walk has changed.
pub(super) type Store<'a> = &'a dyn Fn(&str, &BaseLinear) -> Result<StoredMatrix>;

/// Changes a layer as a walk did before.
pub(super) type Restore<'a> = &'a dyn Fn(&str, &mut BaseLinear, &StoredMatrix) -> Result<()>;

/// The folder of a walk. Each finished block is a file with the weights of its layers; another file
/// holds the hidden states behind the last one.
pub(super) struct Kept<'a> {
    folder: PathBuf,
    store: Store<'a>,
    restore: Restore<'a>,
}

/// Name of the file of hidden states.
const STATES: &str = "states.elora";

impl<'a> Kept<'a> {
    /// Chooses the folder of a walk within `parent`. Its name has a checksum of all that the walk
    /// depends on: the settings, the samples, the config and the weights of the model as they are
    /// now.
    ///
    /// # Errors
    /// Returns [`Error::Io`] if the folder cannot be made.
    pub fn new(
        parent: &Path,
        label: &str,
        settings: &impl Serialize,
        (model, samples): (&Decoder, &[Vec<u32>]),
        store: Store<'a>,
        restore: Restore<'a>,
    ) -> Result<Self> {
        let mut hash = crc32fast::Hasher::new();
        let settings = serde_json::to_string(settings).map_err(|e| Error::json(label, e))?;
        hash.update(settings.as_bytes());
        let config = serde_json::to_string(model.config().raw());
        hash.update(config.map_err(|e| Error::json(label, e))?.as_bytes());
        let of_samples = samples_checksums(samples);
        of_samples
            .iter()
            .for_each(|part| hash.update(&part.to_le_bytes()));
        let mut weights = crc32fast::Hasher::new();
        for (name, layer) in model.linears() {
            weights.update(name.as_bytes());
            weights.update(bytemuck::cast_slice(layer.base.to_matrix().as_slice()));
            if let Some(bias) = &layer.base.bias {
                weights.update(bytemuck::cast_slice(&host_values(bias.val())));
            }
        }
        for (_, norm) in model.layers.iter().flat_map(|block| block.norms()) {
            weights.update(bytemuck::cast_slice(&host_values(norm.weight.val())));
        }
        weights.update(bytemuck::cast_slice(&host_values(model.embed_tokens.val())));
        let (settings, weights) = (hash.finalize(), weights.finalize());
        let folder = parent.join(format!("{label}-{settings:08x}{weights:08x}"));
        std::fs::create_dir_all(&folder).map_err(|e| Error::io(&folder, e))?;
        Ok(Self {
            folder,
            store,
            restore,
        })
    }

    fn path(&self, block: usize) -> PathBuf {
        self.folder.join(format!("block-{block}.elora"))
    }

    /// Writes the layers of a block that has been changed.
    pub fn put(&self, model: &Decoder, block: usize) -> Result<()> {
        let mut layers = Vec::new();
        for kind in LinearKind::ALL {
            if let Some(layer) = model.layers[block].linear(kind) {
                let name = kind.name(block);
                layers.push(((self.store)(&name, &layer.base)?, name));
            }
        }
        let mut writer = BundleWriter::new(Value::Null);
        for (matrix, name) in &layers {
            writer.matrix(name, matrix);
        }
        writer.write(self.path(block), true)
    }

    /// Changes a block as it was changed before, layer by layer in the order of `kinds`. Returns
    /// false, and changes nothing, if the block was not finished.
    ///
    /// # Errors
    /// Returns [`Error::InvalidFile`] if its file is damaged, and the errors of `restore`.
    pub fn get(
        &self,
        model: &mut Decoder,
        block: usize,
        kinds: impl Iterator<Item = LinearKind>,
    ) -> Result<bool> {
        let path = self.path(block);
        if !path.is_file() {
            return Ok(false);
        }
        let bundle = Bundle::open(&path, false)?;
        bundle.verify()?;
        for kind in kinds {
            if let Some(layer) = model.layers[block].linear_mut(kind) {
                let name = kind.name(block);
                (self.restore)(&name, &mut layer.base, &bundle.matrix(&name)?)?;
            }
        }
        Ok(true)
    }

    /// Writes the hidden states behind a block, which begin the next one.
    pub fn put_states(&self, block: usize, states: &[Tensor<3>]) -> Result<()> {
        let states: Vec<Vec<f32>> = states.iter().map(|s| host_values(s.clone())).collect();
        let mut writer = BundleWriter::new(json!({ "block": block }));
        for (index, state) in states.iter().enumerate() {
            writer.vector(&format!("{index}"), state);
        }
        writer.write(self.folder.join(STATES), true)
    }

    /// Replaces `states`, the embedded samples, by those behind the last finished block, and
    /// returns the number of blocks before them; 0 if none are kept.
    ///
    /// # Errors
    /// Returns [`Error::InvalidFile`] if the file is damaged.
    pub fn get_states(&self, states: &mut [Tensor<3>]) -> Result<usize> {
        let path = self.folder.join(STATES);
        if !path.is_file() {
            return Ok(0);
        }
        let bundle = Bundle::open(&path, false)?;
        bundle.verify()?;
        let block = bundle.document().get("block").and_then(Value::as_u64);
        let block = block.ok_or_else(|| Error::invalid_file(&path, "`block` is missing"))?;
        for (index, state) in states.iter_mut().enumerate() {
            let dims = state.dims();
            let values = bundle.vector(&format!("{index}"), dims.iter().product())?;
            let data = TensorData::new(values, dims);
            let read = Tensor::<3>::from_data(data, &state.device());
            *state = read.cast(state.dtype());
        }
        Ok(block as usize + 1)
    }

    /// Removes the hidden states once all blocks are finished.
    pub fn finish(&self) -> Result<()> {
        let path = self.folder.join(STATES);
        match path.is_file() {
            true => std::fs::remove_file(&path).map_err(|e| Error::io(&path, e)),
            false => Ok(()),
        }
    }
}

/// Checksums of the tokens and of the lengths of samples.
pub(super) fn samples_checksums(samples: &[Vec<u32>]) -> [u32; 2] {
    let tokens = samples.iter().flatten().map(|id| id.to_le_bytes());
    let lengths = samples
        .iter()
        .map(|sample| (sample.len() as u64).to_le_bytes());
    [checksum(tokens), checksum(lengths)]
}

fn checksum<const N: usize>(parts: impl Iterator<Item = [u8; N]>) -> u32 {
    let mut hash = crc32fast::Hasher::new();
    parts.for_each(|part| hash.update(&part));
    hash.finalize()
}
