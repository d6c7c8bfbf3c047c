//! Checkpoints: everything that a resumed run needs to continue as if it had never stopped.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor};
use serde::{Deserialize, Serialize};

use super::TrainConfig;
use super::log::StepLog;
use super::optimizer::{NamedAdamW, load_trainable, rank_counts, trainable};
use crate::data::{Batcher, Position};
use crate::error::{Error, Result};
use crate::input::{open_regular, read_capped};
use crate::io::{Checkpoint, DType, FolderWriter, HostTensor, atomic, tensors::write_safetensors};
use crate::model::Decoder;
use crate::nn::host_values;

const STATE: &str = "trainer.json";
const TENSORS: &str = "trainer.safetensors";

/// Contents of `trainer.json`. Checksums tell a changed bit of both files. Random draws depend only on the seed and the step, so no generator
/// state is stored.
#[derive(Serialize, Deserialize)]
pub(crate) struct State {
    version: u32,
    /// CRC-32 of this value as JSON without blanks, with 0 in this place.
    checksum: u32,
    /// CRC-32 of `trainer.safetensors`.
    tensors: u32,
    pub config: TrainConfig,
    /// Summary of the run's supernet and data. A checkpoint with another summary is rejected.
    pub about: BTreeMap<String, String>,
    pub step: usize,
    pub position: Position,
    pub logs: Vec<StepLog>,
    /// By parameter: the number of optimizer steps of each separately counted index.
    times: BTreeMap<String, Vec<usize>>,
}

/// Version of the format of `trainer.json` and `trainer.safetensors`.
const VERSION: u32 = 3;

/// Largest `trainer.json`, which has a line for each step.
const MAX_STATE_BYTES: u64 = 1 << 30;

#[derive(Deserialize)]
struct Version {
    version: u32,
}

impl State {
    pub fn new(
        config: &TrainConfig,
        about: BTreeMap<String, String>,
        position: Position,
        logs: Vec<StepLog>,
        optimizer: &NamedAdamW,
    ) -> Self {
        let times = optimizer.moments().1;
        Self {
            version: VERSION,
            checksum: 0,
            tensors: 0,
            config: config.clone(),
            about,
            step: logs.len(),
            position,
            logs,
            times,
        }
    }

    /// Returns the checksum that belongs to the other fields. `file` names the state in errors.
    fn sum(&mut self, file: &Path) -> Result<u32> {
        let before = std::mem::take(&mut self.checksum);
        let text = serde_json::to_vec(self).map_err(|e| Error::json(file, e));
        self.checksum = before;
        Ok(crc32fast::hash(&text?))
    }
}

/// Returns the CRC-32 of a file.
fn file_sum(path: &Path) -> Result<u32> {
    let (mut file, _) = open_regular(path)?;
    let mut hasher = crc32fast::Hasher::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        match file.read(&mut buffer).map_err(|e| Error::io(path, e))? {
            0 => return Ok(hasher.finalize()),
            n => hasher.update(&buffer[..n]),
        }
    }
}

/// A hash (FNV-1a) of the sequences and their order in the first epoch.
pub(crate) fn fingerprint(train: &Batcher) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let mut add = |value: u64| hash = (hash ^ value).wrapping_mul(0x0000_0100_0000_01b3);
    for sequence in train.sequences() {
        add(sequence.len() as u64);
        for (id, counts) in sequence.ids.iter().zip(&sequence.loss_mask) {
            add(u64::from(*id) << 1 | u64::from(*counts));
        }
    }
    for batch in train.plan().epoch(0) {
        add(batch.len() as u64);
        batch.into_iter().for_each(|index| add(index as u64));
    }
    for group in train.groups().into_iter().flatten() {
        add(group.len() as u64);
        group.iter().for_each(|index| add(*index as u64));
    }
    hash
}

/// Path of a run's checkpoint inside its folder.
pub(crate) fn path(folder: &Path) -> PathBuf {
    folder.join("checkpoint")
}

/// Writes a checkpoint, replacing the previous one atomically.
pub(crate) fn save(
    folder: &Path,
    mut state: State,
    model: &Decoder,
    optimizer: &NamedAdamW,
) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(|e| Error::io(folder, e))?;
    let writer = FolderWriter::create(path(folder), true)?;
    let mut all: BTreeMap<String, Tensor<1>> = optimizer.moments().0;
    all.extend(
        trainable(model)
            .into_iter()
            .map(|(path, value)| (format!("p.{path}"), value)),
    );
    let tensors = all
        .into_iter()
        .map(|(name, value)| {
            let n = value.dims()[0];
            let values = host_values(value);
            HostTensor::from_f32(name, DType::F32, [n], values)
        })
        .collect();
    let file = writer.path().join(TENSORS);
    write_safetensors(&file, tensors, &BTreeMap::new())?;
    state.tensors = file_sum(&file)?;
    let file = writer.path().join(STATE);
    state.checksum = state.sum(&file)?;
    atomic::write_json(file, &state)?;
    writer.commit()
}

/// Loads a checkpoint, if there is one, into the model and the optimizer.
///
/// # Errors
/// Returns [`Error::CheckpointMismatch`] if the checkpoint belongs to a run with other settings, and
/// [`Error::InvalidFile`] if a file is not the one that was written.
pub(crate) fn load(
    folder: &Path,
    config: &TrainConfig,
    about: &BTreeMap<String, String>,
    model: Decoder,
    optimizer: &mut NamedAdamW,
    device: &Device,
) -> Result<(Decoder, Option<State>)> {
    let path = path(folder);
    let file = path.join(STATE);
    atomic::recover(&path)?;
    if !file.exists() {
        return Ok((model, None));
    }
    let text = read_capped(&file, MAX_STATE_BYTES)?;
    let mismatch = |field: &str, expected: String, found: String| Error::CheckpointMismatch {
        path: path.clone(),
        field: field.to_string(),
        expected,
        found,
    };
    // Checked first, because the other fields may have another form in another version.
    let Version { version } = serde_json::from_slice(&text).map_err(|e| Error::json(&file, e))?;
    if version != VERSION {
        return Err(mismatch(
            "version",
            VERSION.to_string(),
            version.to_string(),
        ));
    }
    let mut state: State = serde_json::from_slice(&text).map_err(|e| Error::json(&file, e))?;
    let changed = |file: &Path| {
        let reason = "not the file that was written: its checksum differs";
        Error::invalid_file(file, reason)
    };
    if state.checksum != state.sum(&file)? {
        return Err(changed(&file));
    }
    if state.tensors != file_sum(&path.join(TENSORS))? {
        return Err(changed(&path.join(TENSORS)));
    }
    // The checkpointing of activations depends on the machine and may change between runs.
    if (TrainConfig {
        checkpointing: config.checkpointing,
        ..state.config.clone()
    }) != *config
    {
        return Err(mismatch(
            "settings",
            format!("{config:?}"),
            format!("{:?}", state.config),
        ));
    }
    for (field, found) in &state.about {
        let expected = about.get(field).cloned().unwrap_or_default();
        if *found != expected {
            return Err(mismatch(field, expected, found.clone()));
        }
    }
    if state.step != state.logs.len() {
        return Err(Error::invalid_file(
            &file,
            format!("step {} with {} logged", state.step, state.logs.len()),
        ));
    }
    let tensors = Checkpoint::open(path.join(TENSORS))?;
    let mut values = BTreeMap::new();
    for name in trainable(&model).into_keys() {
        let stored = tensors.load_f32(&format!("p.{name}"))?;
        values.insert(name, stored);
    }
    let sizes: BTreeMap<String, usize> = values
        .iter()
        .map(|(name, v)| (name.clone(), v.len()))
        .collect();
    let model = load_trainable(model, values)?;
    let counted = rank_counts(&model);
    for (name, times) in &state.times {
        let expected = counted.get(name).copied().unwrap_or(1);
        if times.len() != expected {
            return Err(Error::invalid_file(
                &file,
                format!("{} step counts of `{name}`, not {expected}", times.len()),
            ));
        }
    }
    optimizer.restore(&state.times, device, |name| {
        let values = tensors.load_f32(name)?;
        let expected = sizes.get(&name[2..]).copied().unwrap_or(0);
        if values.len() != expected {
            return Err(Error::TensorShape {
                tensor: name.to_string(),
                expected: vec![expected],
                found: vec![values.len()],
            });
        }
        Ok(values)
    })?;
    Ok((model, Some(state)))
}
