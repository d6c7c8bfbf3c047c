//! Hidden states of calibration samples in a file, so that memory holds one batch of them.

use std::fs::{self, File};
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor, TensorData};

use super::{TOKENS_AT_ONCE, batches};
use crate::error::{Error, Result};
use crate::nn::host_values;

/// Hidden states in `f32`: a file with those before a block, and another one in the making with
/// those behind it. Without samples there are no files.
pub(super) struct StatesFile {
    folder: PathBuf,
    /// Sequences and length of each batch.
    shapes: Vec<[usize; 2]>,
    d_model: usize,
    device: Device,
    /// The file that is read.
    file: Option<File>,
    writer: Option<Writer>,
}

/// A file in the making.
struct Writer {
    path: PathBuf,
    sink: BufWriter<File>,
    hash: crc32fast::Hasher,
    /// Number of batches that it holds.
    batches: usize,
}

impl StatesFile {
    /// Chooses the folder of the files, and the batches of the samples.
    pub fn new(folder: &Path, samples: &[Vec<u32>], d_model: usize, device: &Device) -> Self {
        let shapes = batches(samples, TOKENS_AT_ONCE).into_iter();
        Self {
            folder: folder.into(),
            shapes: shapes.map(|(rows, ids)| [rows, ids.len() / rows]).collect(),
            d_model,
            device: device.clone(),
            file: None,
            writer: None,
        }
    }

    /// Number of batches.
    pub fn n_batches(&self) -> usize {
        self.shapes.len()
    }

    fn path(&self, block: usize) -> PathBuf {
        self.folder.join(format!("states-{block}"))
    }

    fn n_values(&self, batch: usize) -> usize {
        self.shapes[batch].iter().product::<usize>() * self.d_model
    }

    /// Opens the states before a block. Returns false if they are not there, or not whole.
    ///
    /// # Errors
    /// Returns [`Error::Io`].
    pub fn open(&mut self, block: usize, checksum: u32) -> Result<bool> {
        if self.shapes.is_empty() {
            return Ok(true);
        }
        let path = self.path(block);
        let at = |e| Error::io(&path, e);
        if !path.is_file() {
            return Ok(false);
        }
        let mut file = File::open(&path).map_err(at)?;
        let expected: usize = (0..self.n_batches())
            .map(|batch| self.n_values(batch))
            .sum();
        if file.metadata().map_err(at)?.len() != 4 * expected as u64 {
            return Ok(false);
        }
        let (mut hash, mut buffer) = (crc32fast::Hasher::new(), vec![0; 1 << 20]);
        loop {
            match file.read(&mut buffer).map_err(at)? {
                0 => break,
                n => hash.update(&buffer[..n]),
            }
        }
        let whole = hash.finalize() == checksum;
        self.file = whole.then_some(file);
        Ok(whole)
    }

    /// Reads a batch, `[sequences, seq, d_model]`.
    ///
    /// # Errors
    /// Returns [`Error::Io`].
    pub fn get(&mut self, batch: usize) -> Result<Tensor<3>> {
        let before: usize = (0..batch).map(|batch| self.n_values(batch)).sum();
        let [rows, len] = self.shapes[batch];
        let mut values = vec![0.0_f32; self.n_values(batch)];
        let at = |e| Error::io(&self.folder, e);
        let Some(file) = &mut self.file else {
            return Err(at(std::io::ErrorKind::NotFound.into()));
        };
        file.seek(SeekFrom::Start(4 * before as u64))
            .and_then(|_| file.read_exact(bytemuck::cast_slice_mut(&mut values)))
            .map_err(at)?;
        let data = TensorData::new(values, [rows, len, self.d_model]);
        Ok(Tensor::from_data(data, &self.device))
    }

    /// Writes the next batch of the states before block `block`.
    ///
    /// # Errors
    /// Returns [`Error::Io`].
    pub fn put(&mut self, block: usize, batch: usize, states: Tensor<3>) -> Result<()> {
        if batch == 0 {
            let mut path = self.path(block).into_os_string();
            path.push(".tmp");
            let path = PathBuf::from(path);
            let file = File::create(&path).map_err(|e| Error::io(&path, e))?;
            self.writer = Some(Writer {
                path,
                sink: BufWriter::with_capacity(1 << 18, file),
                hash: crc32fast::Hasher::new(),
                batches: 0,
            });
        }
        let n = self.n_values(batch);
        match &mut self.writer {
            Some(writer) if writer.batches == batch => {
                let values = host_values(states);
                debug_assert_eq!(values.len(), n);
                let bytes = bytemuck::cast_slice(&values);
                writer.hash.update(bytes);
                writer.batches += 1;
                let written = writer.sink.write_all(bytes);
                written.map_err(|e| Error::io(&writer.path, e))
            }
            _ => Err(Error::InvalidState {
                what: "writing hidden states",
                reason: format!("batch {batch} is out of order"),
            }),
        }
    }

    /// Gives the states before block `block`, all of which have been put, their name, and reads
    /// from them. Returns their checksum.
    ///
    /// # Errors
    /// Returns [`Error::Io`].
    pub fn advance(&mut self, block: usize) -> Result<u32> {
        let Some(writer) = self.writer.take() else {
            return Ok(0);
        };
        let (
            path,
            Writer {
                path: from,
                sink,
                hash,
                ..
            },
        ) = (self.path(block), writer);
        let at = |e| Error::io(&path, e);
        let file = sink.into_inner().map_err(|e| at(e.into_error()))?;
        file.sync_data().map_err(at)?;
        fs::rename(&from, &path).map_err(at)?;
        self.file = Some(File::open(&path).map_err(at)?);
        Ok(hash.finalize())
    }

    /// Removes the states before a block.
    ///
    /// # Errors
    /// Returns [`Error::Io`].
    pub fn remove(&self, block: usize) -> Result<()> {
        let path = self.path(block);
        match path.is_file() {
            true => fs::remove_file(&path).map_err(|e| Error::io(&path, e)),
            false => Ok(()),
        }
    }
}
