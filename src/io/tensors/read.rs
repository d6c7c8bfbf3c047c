//! Reads checkpoints.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use memmap2::Mmap;
use rayon::prelude::*;

use super::dtype::{self, DType};
use super::header;
use crate::arch::family;
use crate::error::{Error, Result};
use crate::format::{Buffer, Owner, QuantizedMatrix};
use crate::input::read_whole;
use crate::io::gguf::{BlockRows, Gguf, Layout, is_gguf};
use crate::io::{
    HfConfig, MAX_JSON_BYTES, cache, is_plain_file_name, open_regular, read_json_object,
    read_large_json_object, refuse_pointer,
};
use crate::linalg::Matrix;
use crate::threads;

/// Maximum number of shards in an index. Each shard is a memory mapping.
const MAX_SHARDS: usize = 4096;

/// Dtype and shape of a tensor, from the header.
#[derive(Clone, Debug, PartialEq, Eq)]
#[doc(hidden)]
pub struct TensorInfo {
    /// Dtype of the elements.
    pub dtype: DType,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
}

impl TensorInfo {
    /// Returns the number of elements. The product cannot overflow, because it was checked against
    /// the file size on opening.
    pub fn n_elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// Bytes of a file.
pub(in crate::io) type Bytes = Owner;

struct Shard {
    path: PathBuf,
    bytes: Bytes,
}

impl std::fmt::Debug for Shard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Shard({}, {} bytes)",
            self.path.display(),
            self.bytes.as_ref().len()
        )
    }
}

#[derive(Debug)]
struct Entry {
    shard: usize,
    range: Range<usize>,
    info: TensorInfo,
    layout: Layout,
}

impl Entry {
    /// The rows of a range, which is inside the matrix.
    fn rows(&self, rows: Range<usize>) -> Self {
        let (range, shape) = (&self.range, &self.info.shape);
        let size = range.len() / shape.first().copied().unwrap_or(1).max(1);
        let shape = std::iter::once(rows.len()).chain(shape.iter().skip(1).copied());
        Self {
            shard: self.shard,
            range: range.start + rows.start * size..range.start + rows.end * size,
            info: TensorInfo {
                dtype: self.info.dtype,
                shape: shape.collect(),
            },
            layout: self.layout,
        }
    }
}

/// Beginnings of the names that the text model's tensors have in models for several kinds of input,
/// and what stands for them in a plain text model.
const TEXT_PREFIXES: [(&str, &str); 3] = [
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
];

/// Returns the name that a tensor or module has in a plain text model.
pub(crate) fn plain_name(name: &str) -> Cow<'_, str> {
    let prefixed = TEXT_PREFIXES
        .iter()
        .find_map(|(prefix, plain)| Some((plain, name.strip_prefix(prefix)?)));
    match prefixed {
        Some((plain, rest)) => format!("{plain}{rest}").into(),
        None => name.into(),
    }
}

/// A checkpoint opened for reading, memory-mapped: one safetensors file, a folder of shards, or a
/// GGUF model.
///
/// Tensors have the names of a plain text model. A matrix that holds several linear layers, as in
/// Phi-3, appears as one tensor for each of them; the text model of Gemma 3 has the names that it
/// has alone.
///
/// The tensors of a GGUF model have Hugging Face's names and row order. Tensors in quantized blocks
/// have dtype `f32`: they are dequantized on access, and [`load_quantized`](Self::load_quantized)
/// gives their codes.
///
/// Opening reads only the headers; tensor data is read on access. The files must not change while
/// the checkpoint is open: truncating a mapped file can terminate the process.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    shards: Vec<Shard>,
    tensors: BTreeMap<String, Entry>,
    /// Tensors that the index names and the shard that it says does not hold.
    absent: BTreeMap<String, PathBuf>,
    metadata: BTreeMap<String, String>,
}

impl Checkpoint {
    /// Opens a safetensors file, a folder that contains `model.safetensors`, or else
    /// `model.safetensors.index.json` and its shards, or a GGUF file. For a GGUF model in several
    /// files, pass the first one. Of a folder with none of these names, the file that
    /// `quantize_config.json` names is opened, as in old GPTQ folders, or else its only safetensors
    /// file.
    ///
    /// A tensor that the index names and no shard holds is missed when it is read.
    ///
    /// # Errors
    /// Returns [`Error::Io`] or [`Error::Json`] if a file cannot be read or parsed. Returns
    /// [`Error::InvalidFile`] if a header is truncated, states wrong lengths, leaves holes or
    /// overlaps; if the index names a file outside the folder or a shard that does not exist; and
    /// if two shards hold the same tensor. Returns [`Error::MissingTensor`] if a tensor is in
    /// another shard than the index names, and [`Error::Unsupported`] for an unknown dtype.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_with(path, true)
    }

    /// Opens a checkpoint like [`open`](Self::open), and either maps the files or reads them into
    /// memory. Files that were read into memory may change while the checkpoint is open.
    ///
    /// # Errors
    /// Returns the errors of [`open`](Self::open), and [`Error::OutOfMemory`] if a file does not
    /// fit into memory.
    pub fn open_with(path: impl AsRef<Path>, mmap: bool) -> Result<Self> {
        threads::ready()?;
        let path = &*cache::resolve(path.as_ref())?;
        let meta = std::fs::metadata(path).map_err(|e| Error::io(path, e))?;
        if is_gguf(path) {
            return Self::from_gguf(path, mmap);
        }
        if !meta.is_dir() {
            return Self::from_shards(path, vec![path.to_path_buf()], mmap);
        }
        // transformers looks for the files in this order.
        let single = path.join("model.safetensors");
        if single.exists() {
            return Self::from_shards(&single, vec![single.clone()], mmap)?.adapted(path);
        }
        let index = path.join("model.safetensors.index.json");
        if index.exists() {
            return Self::from_index(path, &index, mmap)?.adapted(path);
        }
        if let Some(other) = other_name(path)? {
            return Self::from_shards(&other, vec![other.clone()], mmap)?.adapted(path);
        }
        let mut entries = std::fs::read_dir(path).into_iter().flatten().flatten();
        let hint = if path.join("pytorch_model.bin").exists()
            || path.join("pytorch_model.bin.index.json").exists()
        {
            " (there is a pytorch_model.bin, but pickled weights are not read: save them as safetensors)"
        } else if entries.any(|entry| is_gguf(&entry.path())) {
            " (there is a GGUF file: give its own path)"
        } else {
            ""
        };
        Err(Error::invalid_file(
            path,
            format!("no model.safetensors and no model.safetensors.index.json{hint}"),
        ))
    }

    fn from_index(folder: &Path, index: &Path, mmap: bool) -> Result<Self> {
        let object = read_large_json_object(index, MAX_JSON_BYTES)?;
        let Some(map) = object.get("weight_map").and_then(|v| v.as_object()) else {
            return Err(Error::invalid_file(
                index,
                "`weight_map` is missing or not an object",
            ));
        };
        // List each shard once, in the order of first mention.
        let mut files: Vec<&str> = Vec::new();
        let mut number_of: BTreeMap<&str, usize> = BTreeMap::new();
        for (tensor, file) in map {
            let Some(file) = file.as_str() else {
                return Err(Error::invalid_file(
                    index,
                    format!("tensor `{tensor}`: its shard is {file}, not a name"),
                ));
            };
            if !is_plain_file_name(file) {
                return Err(Error::invalid_file(
                    index,
                    format!(
                        "tensor `{tensor}`: shard `{file}` is not the name of a file in this folder"
                    ),
                ));
            }
            if !number_of.contains_key(file) {
                if files.len() == MAX_SHARDS {
                    return Err(Error::invalid_file(
                        index,
                        format!("more than {MAX_SHARDS} shards"),
                    ));
                }
                number_of.insert(file, files.len());
                files.push(file);
            }
        }
        if files.is_empty() {
            return Err(Error::invalid_file(index, "`weight_map` is empty"));
        }
        for file in &files {
            let shard = folder.join(file);
            if !shard.exists() {
                return Err(Error::invalid_file(
                    index,
                    format!("shard `{file}` is missing"),
                ));
            }
        }
        let mut checkpoint =
            Self::from_shards(folder, files.iter().map(|f| folder.join(f)).collect(), mmap)?;
        for (tensor, file) in map {
            let expected = file.as_str().and_then(|f| number_of.get(f)).copied();
            let path = folder.join(file.as_str().unwrap_or_default());
            match checkpoint.tensors.get(tensor).map(|entry| entry.shard) {
                found if found == expected => {}
                // It may not be needed, such as a head that is tied.
                None => _ = checkpoint.absent.insert(plain_name(tensor).into(), path),
                Some(_) => {
                    return Err(Error::MissingTensor {
                        path,
                        tensor: tensor.clone(),
                    });
                }
            }
        }
        Ok(checkpoint)
    }

    /// Gives the tensors of a model folder the names of a plain text model, and splits matrices
    /// that hold several linear layers.
    fn adapted(mut self, folder: &Path) -> Result<Self> {
        for (prefix, plain) in TEXT_PREFIXES {
            let found: Vec<String> = self
                .tensors
                .range(prefix.to_string()..)
                .map(|(name, _)| name)
                .take_while(|name| name.starts_with(prefix))
                .cloned()
                .collect();
            for name in found {
                let new = format!("{plain}{}", &name[prefix.len()..]);
                if let Some(entry) = self.tensors.remove(&name)
                    && self.tensors.insert(new.clone(), entry).is_some()
                {
                    let reason = format!("both tensors `{name}` and `{new}`");
                    return Err(Error::invalid_file(folder, reason));
                }
            }
        }
        if !self.tensors.keys().any(|name| family::is_fused(name)) {
            return Ok(self);
        }
        let config = HfConfig::open(folder)?;
        for fused in config.arch().fused() {
            let name = format!("{}.weight", fused.name);
            let Some(entry) = self.tensors.get(&name) else {
                continue;
            };
            let expected = vec![fused.d_output(), fused.d_input];
            if entry.info.shape != expected {
                return Err(Error::TensorShape {
                    tensor: name,
                    expected,
                    found: entry.info.shape.clone(),
                });
            }
            for (layer, _) in &fused.parts {
                if let Some(rows) = fused.rows_of(layer)
                    && let Some(part) = self.tensors.get(&name).map(|entry| entry.rows(rows))
                {
                    self.tensors.insert(format!("{layer}.weight"), part);
                }
            }
            self.tensors.remove(&name);
        }
        Ok(self)
    }

    fn from_gguf(path: &Path, mmap: bool) -> Result<Self> {
        let model = Gguf::open_with(path, mmap)?;
        let tensors = model.entries()?.into_iter().map(|entry| {
            let (name, shard) = (entry.name, entry.file);
            let (range, info, layout) = (entry.range, entry.info, entry.layout);
            let entry = Entry {
                shard,
                range,
                info,
                layout,
            };
            (name, entry)
        });
        Ok(Self {
            path: path.to_path_buf(),
            tensors: tensors.collect(),
            shards: model
                .files()
                .map(|(path, bytes)| Shard { path, bytes })
                .collect(),
            absent: BTreeMap::new(),
            metadata: BTreeMap::new(),
        })
    }

    /// Opens a safetensors file whose bytes are in memory. `path` names it in errors.
    ///
    /// # Errors
    /// Returns the errors of [`open`](Self::open) for the contents of a file.
    pub(in crate::io) fn from_bytes(path: &Path, bytes: Bytes) -> Result<Self> {
        let mut checkpoint = Self::from_shards(path, Vec::new(), false)?;
        checkpoint.add_bytes(path.into(), bytes)?;
        Ok(checkpoint)
    }

    fn from_shards(path: &Path, files: Vec<PathBuf>, mmap: bool) -> Result<Self> {
        let mut checkpoint = Self {
            path: path.to_path_buf(),
            shards: Vec::with_capacity(files.len()),
            tensors: BTreeMap::new(),
            absent: BTreeMap::new(),
            metadata: BTreeMap::new(),
        };
        for file in files {
            checkpoint.add_shard(file, mmap)?;
        }
        Ok(checkpoint)
    }

    fn add_shard(&mut self, path: PathBuf, mmap: bool) -> Result<()> {
        let bytes = read_file(&path, mmap)?;
        self.add_bytes(path, bytes)
    }

    fn add_bytes(&mut self, path: PathBuf, bytes: Bytes) -> Result<()> {
        let (start, header) = header::parse(&path, bytes.as_ref())?;
        let number = self.shards.len();
        for name in header.offset_keys() {
            let Some(info) = header.info(&name) else {
                continue;
            };
            let Some(dtype) = DType::from_safetensors(info.dtype) else {
                return Err(Error::Unsupported {
                    what: format!("{}: tensor `{name}`: dtype {}", path.display(), info.dtype),
                });
            };
            let range = start + info.data_offsets.0..start + info.data_offsets.1;
            let entry = Entry {
                shard: number,
                range,
                info: TensorInfo {
                    dtype,
                    shape: info.shape.clone(),
                },
                layout: Layout::default(),
            };
            if let Some(other) = self.tensors.insert(name.clone(), entry) {
                let first = self.shards.get(other.shard).map_or(&path, |s| &s.path);
                return Err(Error::invalid_file(
                    &path,
                    format!("tensor `{name}` is also in {}", first.display()),
                ));
            }
        }
        if let Some(metadata) = header.metadata() {
            self.metadata
                .extend(metadata.iter().map(|(k, v)| (k.clone(), v.clone())));
        }
        self.shards.push(Shard { path, bytes });
        Ok(())
    }

    /// Returns the file or folder that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the names of all tensors, sorted.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Returns whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Returns the dtype and shape of a tensor.
    ///
    /// # Errors
    /// Returns [`Error::MissingTensor`] if there is no tensor of this name.
    pub fn info(&self, name: &str) -> Result<&TensorInfo> {
        Ok(&self.entry(name)?.info)
    }

    /// Returns the `__metadata__` of the file, or of all shards combined.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Returns the total size of all tensors in bytes, without headers.
    pub fn total_bytes(&self) -> u64 {
        self.tensors.values().map(|e| e.range.len() as u64).sum()
    }

    /// Returns a tensor's bytes as stored in the file: row-major, little-endian, at any alignment.
    ///
    /// # Errors
    /// Returns [`Error::MissingTensor`] if there is no tensor of this name, and
    /// [`Error::TensorDtype`] if a GGUF file stores it in blocks or with permuted rows.
    pub fn bytes(&self, name: &str) -> Result<&[u8]> {
        let entry = self.entry(name)?;
        if !entry.layout.is_plain() {
            return Err(Error::TensorDtype {
                tensor: name.into(),
                expected: "plain numbers in Hugging Face's order",
                found: entry.layout.name(),
            });
        }
        self.raw(name, entry)
    }

    /// Returns the bytes of a tensor as stored, whatever their layout.
    fn raw(&self, name: &str, entry: &Entry) -> Result<&[u8]> {
        // The range was checked on opening. `get` turns a mistake there into an error instead of a
        // panic.
        self.shards
            .get(entry.shard)
            .and_then(|shard| shard.bytes.as_ref().get(entry.range.clone()))
            .ok_or_else(|| Error::MissingTensor {
                path: self.path.clone(),
                tensor: name.into(),
            })
    }

    /// Returns a tensor's bytes in a buffer that may outlive the checkpoint. They are not copied,
    /// unless a GGUF file stores them in another layout.
    ///
    /// # Errors
    /// Returns [`Error::MissingTensor`] if there is no tensor of this name.
    pub fn buffer(&self, name: &str) -> Result<Buffer> {
        let entry = self.entry(name)?;
        if !entry.layout.is_plain() {
            let bytes = entry.layout.bytes(&entry.info, self.raw(name, entry)?);
            return Ok(Buffer::from_vec(bytes));
        }
        let missing = || Error::MissingTensor {
            path: self.path.clone(),
            tensor: name.into(),
        };
        let shard = self.shards.get(entry.shard).ok_or_else(missing)?;
        Buffer::new(shard.bytes.clone(), entry.range.clone())
    }

    /// Returns the offset in bytes of a tensor in its file.
    ///
    /// # Errors
    /// Returns [`Error::MissingTensor`] if there is no tensor of this name.
    pub fn offset(&self, name: &str) -> Result<usize> {
        Ok(self.entry(name)?.range.start)
    }

    /// Returns how a tensor is stored: the name of its dtype or of its GGUF block type, and the
    /// number of its bytes in the file.
    ///
    /// # Errors
    /// Returns [`Error::MissingTensor`] if there is no tensor of this name.
    #[doc(hidden)]
    pub fn stored(&self, name: &str) -> Result<(&'static str, usize)> {
        let entry = self.entry(name)?;
        let blocks = entry.layout.blocks.map(|blocks| blocks.name);
        let kind = blocks.unwrap_or(entry.info.dtype.name());
        Ok((kind, entry.range.len()))
    }

    /// Loads a float tensor (f64, f32, f16 or bf16) as row-major `f32`.
    ///
    /// # Errors
    /// Returns [`Error::MissingTensor`], [`Error::TensorDtype`] for another dtype, and
    /// [`Error::NotFinite`] if a value is NaN or infinite, or is an f64 that overflows f32.
    pub fn load_f32(&self, name: &str) -> Result<Vec<f32>> {
        let values = self.load_f32_unchecked(name)?;
        check_finite(name, &values)?;
        Ok(values)
    }

    /// Loads a float tensor like [`load_f32`](Self::load_f32), but accepts NaN and infinities.
    ///
    /// # Errors
    /// Returns [`Error::MissingTensor`], or [`Error::TensorDtype`] for another dtype.
    pub fn load_f32_unchecked(&self, name: &str) -> Result<Vec<f32>> {
        let entry = self.entry(name)?;
        let values = self.numbers(name, entry)?;
        self.release_entry(entry);
        Ok(values)
    }

    /// Returns the bytes of a tensor that is stored as plain numbers of type `dtype`, all of them
    /// finite; `None` if it is stored otherwise.
    ///
    /// # Errors
    /// Returns [`Error::MissingTensor`], and [`Error::NotFinite`] for NaN or an infinity.
    pub(in crate::io) fn finite_bytes(&self, name: &str, dtype: DType) -> Result<Option<&[u8]>> {
        let entry = self.entry(name)?;
        if entry.info.dtype != dtype || !entry.layout.is_plain() {
            return Ok(None);
        }
        let bytes = self.raw(name, entry)?;
        match dtype::not_finite(dtype, bytes) {
            None => Ok(Some(bytes)),
            Some((index, value)) => Err(Error::NotFinite {
                tensor: name.into(),
                index,
                value,
            }),
        }
    }

    /// Loads rows of a float matrix, one after the other in the order of `rows`, without reading
    /// the others.
    ///
    /// # Errors
    /// Returns the errors of [`load_f32`](Self::load_f32), [`Error::TensorShape`] if the tensor is
    /// no matrix, and [`Error::InvalidArgument`] for a row that it has not.
    #[doc(hidden)]
    pub fn load_rows(&self, name: &str, rows: &[u32]) -> Result<Vec<f32>> {
        let entry = self.entry(name)?;
        let &[n_rows, cols] = entry.info.shape.as_slice() else {
            return Err(Error::TensorShape {
                tensor: name.into(),
                expected: vec![0, 0],
                found: entry.info.shape.clone(),
            });
        };
        let mut values = Vec::with_capacity(rows.len().saturating_mul(cols));
        for &row in rows {
            let row = row as usize;
            if row >= n_rows {
                let expected = format!("a row of `{name}`, which has {n_rows}");
                return Err(Error::argument("row", row, expected));
            }
            values.extend(self.numbers(name, &entry.rows(row..row + 1))?);
        }
        check_finite(name, &values)?;
        Ok(values)
    }

    /// Computes a checksum of the bytes of tensors as they are stored.
    ///
    /// # Errors
    /// Returns [`Error::MissingTensor`] if there is no tensor of a name.
    #[doc(hidden)]
    pub fn checksum<'n>(&self, names: impl Iterator<Item = &'n str>) -> Result<u32> {
        let mut hash = crc32fast::Hasher::new();
        for name in names {
            let entry = self.entry(name)?;
            hash.update(name.as_bytes());
            hash.update(entry.info.dtype.name().as_bytes());
            hash.update(self.raw(name, entry)?);
            self.release_entry(entry);
        }
        Ok(hash.finalize())
    }

    /// Decodes or dequantizes the numbers of a tensor, or of a part of one.
    fn numbers(&self, name: &str, entry: &Entry) -> Result<Vec<f32>> {
        let (raw, dtype) = (self.raw(name, entry)?, entry.info.dtype);
        let values = if entry.layout.blocks.is_some() {
            Some(entry.layout.numbers(&entry.info, raw))
        } else if entry.layout.is_plain() {
            dtype::decode(dtype, raw)
        } else {
            dtype::decode(dtype, &entry.layout.bytes(&entry.info, raw))
        };
        values.ok_or_else(|| Error::TensorDtype {
            tensor: name.into(),
            expected: "F64, F32, F16 or BF16",
            found: dtype.to_string(),
        })
    }

    /// Loads a matrix that a GGUF file stores in quantized blocks, as codes of exactly the same
    /// values. Returns `None` for other matrices, and for blocks whose minimum is not a multiple of
    /// their scale.
    ///
    /// # Errors
    /// Returns [`Error::TensorShape`] if the shape is not `[rows, cols]`, and
    /// [`Error::InvalidFile`] if a scale is not finite.
    pub fn load_quantized(&self, name: &str, shape: [usize; 2]) -> Result<Option<QuantizedMatrix>> {
        let entry = self.tensors.get(name);
        let Some(entry) = entry.filter(|entry| entry.layout.blocks.is_some()) else {
            return Ok(None);
        };
        self.check_shape(name, &shape)?;
        let codes = entry.layout.quantized(&entry.info, self.raw(name, entry)?);
        self.release_entry(entry);
        codes.map_err(|error| Error::invalid_file(&self.path, format!("tensor `{name}`: {error}")))
    }

    /// Blocks of a tensor that a GGUF file stores in quantized blocks, or `None` for other tensors.
    ///
    /// # Errors
    /// Returns [`Error::MissingTensor`] if there is no tensor of this name.
    pub(in crate::io) fn blocks(&self, name: &str) -> Result<Option<BlockRows<'_>>> {
        let entry = self.entry(name)?;
        Ok(entry.layout.block_rows(&entry.info, self.raw(name, entry)?))
    }

    /// Loads a float matrix of shape `[rows, cols]`.
    ///
    /// # Errors
    /// Returns the errors of [`load_f32`](Self::load_f32), and [`Error::TensorShape`] if the shape
    /// differs.
    pub fn load_matrix(&self, name: &str, shape: [usize; 2]) -> Result<Matrix> {
        self.check_shape(name, &shape)?;
        Matrix::new(shape[0], shape[1], self.load_f32(name)?)
    }

    /// Loads a float vector of length `len`.
    ///
    /// # Errors
    /// Returns the errors of [`load_f32`](Self::load_f32), and [`Error::TensorShape`] if the shape
    /// differs.
    pub fn load_vector(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        self.check_shape(name, &[len])?;
        self.load_f32(name)
    }

    /// Checks a tensor's shape without reading its contents.
    ///
    /// # Errors
    /// Returns [`Error::MissingTensor`], or [`Error::TensorShape`] if the shape differs.
    pub fn check_shape(&self, name: &str, expected: &[usize]) -> Result<()> {
        let found = &self.entry(name)?.info.shape;
        if found != expected {
            return Err(Error::TensorShape {
                tensor: name.into(),
                expected: expected.to_vec(),
                found: found.clone(),
            });
        }
        Ok(())
    }

    /// Returns whether two tensors have the same shape and values.
    ///
    /// # Errors
    /// Returns [`Error::MissingTensor`], or [`Error::TensorDtype`] if a tensor has no numbers.
    pub(in crate::io) fn same(&self, one: &str, other: &str) -> Result<bool> {
        let (a, b) = (self.entry(one)?, self.entry(other)?);
        if a.info.shape != b.info.shape {
            return Ok(false);
        }
        if a.info.dtype == b.info.dtype && a.layout.is_plain() && b.layout.is_plain() {
            return Ok(self.raw(one, a)? == self.raw(other, b)?);
        }
        Ok(self.load_f32_unchecked(one)? == self.load_f32_unchecked(other)?)
    }

    /// Returns whether all values of a tensor are zero; `false` if it has no numbers.
    ///
    /// # Errors
    /// Returns [`Error::MissingTensor`].
    pub(in crate::io) fn is_zero(&self, name: &str) -> Result<bool> {
        match self.load_f32_unchecked(name) {
            Err(Error::TensorDtype { .. }) => Ok(false),
            values => Ok(values?.iter().all(|value| *value == 0.0)),
        }
    }

    /// Gives the memory of a tensor that was read back to the system. It is read from the file
    /// again when it is used again.
    ///
    /// # Errors
    /// Returns [`Error::MissingTensor`] if there is no tensor of this name.
    #[doc(hidden)]
    pub fn release(&self, name: &str) -> Result<()> {
        self.release_entry(self.entry(name)?);
        Ok(())
    }

    fn release_entry(&self, entry: &Entry) {
        if let Some(shard) = self.shards.get(entry.shard) {
            shard.bytes.release(entry.range.clone());
        }
    }

    fn entry(&self, name: &str) -> Result<&Entry> {
        self.tensors.get(name).ok_or_else(|| Error::MissingTensor {
            path: self.absent.get(name).unwrap_or(&self.path).clone(),
            tensor: name.into(),
        })
    }
}

/// Finds the weights of a folder that has none under transformers' names: the file that the
/// settings of a GPTQ folder name, or the only safetensors file.
fn other_name(folder: &Path) -> Result<Option<PathBuf>> {
    let settings = folder.join("quantize_config.json");
    if settings.exists()
        && let Some(name) = read_json_object(&settings)?.get("model_file_base_name")
        && let Some(name) = name.as_str().map(|name| format!("{name}.safetensors"))
        && is_plain_file_name(&name)
        && folder.join(&name).exists()
    {
        return Ok(Some(folder.join(name)));
    }
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut files = entries.map(|entry| entry.path()).filter(|path| {
        path.extension().is_some_and(|ext| ext == "safetensors")
            && !path.ends_with("adapter_model.safetensors")
    });
    Ok(match (files.next(), files.next()) {
        (Some(only), None) => Some(only),
        _ => None,
    })
}

/// Maps a file, or reads it into memory.
pub(in crate::io) fn read_file(path: &Path, mmap: bool) -> Result<Bytes> {
    let (file, len) = open_regular(path)?;
    read_open(path, file, len, mmap)
}

/// Maps an open file of `len` bytes, or reads it into memory. `path` names it in errors.
pub(in crate::io) fn read_open(
    path: &Path,
    file: std::fs::File,
    len: u64,
    mmap: bool,
) -> Result<Bytes> {
    if !mmap {
        // Aligned to a cache line.
        let bytes = Buffer::from_vec(read_whole(path, file, len, len)?);
        refuse_pointer(path, &bytes)?;
        return Ok(Arc::new(bytes).into());
    }
    // SAFETY: the mapping is read-only, and all accesses go through bounds-checked slices of bytes.
    // A change of the file by another process cannot be checked; the documentation of `Checkpoint`
    // forbids it.
    let map = unsafe { Mmap::map(&file) };
    let map = map.map_err(|e| Error::io(path, e))?;
    refuse_pointer(path, &map)?;
    Ok(Owner::Map(Arc::new(map)))
}

/// Returns an error for the first value that is NaN or infinite.
fn check_finite(name: &str, values: &[f32]) -> Result<()> {
    let bad = |value: &f32| !value.is_finite();
    let part = |part: &[f32]| part.iter().fold(false, |any, value| any | bad(value));
    // Large tensors are read by several threads, since there are billions of values in a model. Small
    // ones are not: a program that opens a bundle should not get rayon's threads for that.
    let found = match values.len() <= PART {
        true => part(values).then_some(0),
        false => values.par_chunks(PART).position_first(part),
    };
    let Some(found) = found else {
        return Ok(());
    };
    let (start, rest) = (found * PART, &values[found * PART..]);
    match rest.iter().position(bad) {
        None => Ok(()),
        Some(index) => Err(Error::NotFinite {
            tensor: name.into(),
            index: start + index,
            value: rest[index],
        }),
    }
}

/// Number of values that a thread looks at.
const PART: usize = 1 << 16;
