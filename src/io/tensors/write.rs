//! Writes safetensors files with one tensor in memory at a time.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::{Map, Value, json};

use super::dtype::{self, DType};
use crate::error::{Error, Result};
use crate::io::atomic::{self, Sink};

/// Number of values converted at a time.
const CHUNK: usize = 1 << 21;

/// Makes the elements of a tensor and passes them on.
type Producer<'a> = Box<dyn FnOnce(Receiver<'_>) -> Result<()> + Send + 'a>;

/// Takes the elements of a tensor.
pub(crate) type Receiver<'r> = &'r mut dyn FnMut(Content<'_>) -> Result<()>;

/// The elements of a tensor.
pub(crate) enum Content<'a> {
    /// Numbers, which are stored as the tensor's dtype.
    Values(Cow<'a, [f32]>),
    /// The bytes in the file.
    Bytes(Cow<'a, [u8]>),
}

enum Source<'a> {
    Ready(Content<'a>),
    Lazy(Producer<'a>),
}

/// A tensor to be written: its name, dtype and shape, and its elements or a closure that produces
/// them when they are written.
#[doc(hidden)]
pub struct HostTensor<'a> {
    name: String,
    dtype: DType,
    shape: Vec<usize>,
    source: Source<'a>,
    /// Called when the bytes have been written.
    written: Option<Box<dyn FnOnce() + Send + 'a>>,
}

impl std::fmt::Debug for HostTensor<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "HostTensor({} {} {:?})",
            self.name, self.dtype, self.shape
        )
    }
}

impl<'a> HostTensor<'a> {
    /// Creates a tensor from row-major `values`. They are stored as `dtype` (F64, F32, F16 or
    /// BF16), rounded to nearest, ties to even.
    pub fn from_f32(
        name: impl Into<String>,
        dtype: DType,
        shape: impl Into<Vec<usize>>,
        values: impl Into<Cow<'a, [f32]>>,
    ) -> Self {
        Self {
            name: name.into(),
            dtype,
            shape: shape.into(),
            source: Source::Ready(Content::Values(values.into())),
            written: None,
        }
    }

    /// Creates a tensor like [`from_f32`](Self::from_f32), whose values are produced when they are
    /// written and dropped right after.
    pub fn lazy_f32(
        name: impl Into<String>,
        dtype: DType,
        shape: impl Into<Vec<usize>>,
        values: impl FnOnce() -> Result<Vec<f32>> + Send + 'a,
    ) -> Self {
        let content = move |put: Receiver<'_>| put(Content::Values(values()?.into()));
        Self::lazy(name, dtype, shape, content)
    }

    /// Creates a tensor whose elements are produced when they are written: `content` passes them on,
    /// once.
    pub(crate) fn lazy(
        name: impl Into<String>,
        dtype: DType,
        shape: impl Into<Vec<usize>>,
        content: impl FnOnce(Receiver<'_>) -> Result<()> + Send + 'a,
    ) -> Self {
        Self {
            name: name.into(),
            dtype,
            shape: shape.into(),
            source: Source::Lazy(Box::new(content)),
            written: None,
        }
    }

    /// Creates a tensor from its bytes in the file: row-major, little-endian.
    pub fn from_bytes(
        name: impl Into<String>,
        dtype: DType,
        shape: impl Into<Vec<usize>>,
        bytes: impl Into<Cow<'a, [u8]>>,
    ) -> Self {
        Self {
            name: name.into(),
            dtype,
            shape: shape.into(),
            source: Source::Ready(Content::Bytes(bytes.into())),
            written: None,
        }
    }

    /// Creates a tensor like [`from_bytes`](Self::from_bytes), whose bytes are produced when they
    /// are written and dropped right after.
    pub fn lazy_bytes(
        name: impl Into<String>,
        dtype: DType,
        shape: impl Into<Vec<usize>>,
        bytes: impl FnOnce() -> Result<Vec<u8>> + Send + 'a,
    ) -> Self {
        let content = move |put: Receiver<'_>| put(Content::Bytes(bytes()?.into()));
        Self::lazy(name, dtype, shape, content)
    }

    /// Creates a matrix from the rows of several matrices, one after the other.
    ///
    /// # Errors
    /// Returns [`Error::TensorShape`] or [`Error::TensorDtype`] if one of them is not a matrix, or
    /// has another number of columns or another dtype than the first.
    pub(crate) fn stacked(name: impl Into<String>, parts: Vec<HostTensor<'a>>) -> Result<Self> {
        let (mut rows, mut of) = (0, None);
        for part in &parts {
            let &[part_rows, cols] = part.shape.as_slice() else {
                return Err(Error::TensorShape {
                    tensor: part.name.clone(),
                    expected: vec![0, 0],
                    found: part.shape.clone(),
                });
            };
            let &mut (expected, dtype) = of.get_or_insert((cols, part.dtype));
            if cols != expected {
                return Err(Error::TensorShape {
                    tensor: part.name.clone(),
                    expected: vec![part_rows, expected],
                    found: part.shape.clone(),
                });
            }
            if part.dtype != dtype {
                return Err(Error::TensorDtype {
                    tensor: part.name.clone(),
                    expected: "the dtype of the layers with the same input",
                    found: part.dtype.to_string(),
                });
            }
            rows += part_rows;
        }
        let (cols, dtype) = of.unwrap_or((0, DType::F32));
        Ok(Self::lazy_bytes(name, dtype, [rows, cols], move || {
            let mut bytes = Vec::new();
            for part in parts {
                part.encode(&mut |chunk| {
                    bytes.extend_from_slice(chunk);
                    Ok(())
                })?;
            }
            Ok(bytes)
        }))
    }

    /// Returns the name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the dtype in the file.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Returns the sizes, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    pub(crate) fn rename(&mut self, name: &str) {
        self.name = name.into();
    }

    fn n_elements(&self) -> Result<usize> {
        let overflow = || Error::TensorShape {
            tensor: self.name.clone(),
            expected: vec![],
            found: self.shape.clone(),
        };
        let n = self
            .shape
            .iter()
            .try_fold(1usize, |n, &d| n.checked_mul(d))
            .ok_or_else(overflow)?;
        n.checked_mul(self.dtype.size()).ok_or_else(overflow)?;
        Ok(n)
    }

    /// Returns the number of bytes in the file.
    ///
    /// # Errors
    /// Returns [`Error::TensorShape`] if the size of the shape overflows.
    pub fn n_bytes(&self) -> Result<usize> {
        Ok(self.n_elements()? * self.dtype.size())
    }

    fn check_len(&self, unit: &str, found: usize, expected: usize) -> Result<()> {
        if found == expected {
            return Ok(());
        }
        Err(Error::ShapeMismatch {
            what: format!(
                "{unit} of tensor `{}` with shape {:?}",
                self.name, self.shape
            ),
            expected: vec![expected],
            found: vec![found],
        })
    }

    /// Sets what is done when the bytes have been written.
    pub(crate) fn then(mut self, written: impl FnOnce() + Send + 'a) -> Self {
        self.written = Some(Box::new(written));
        self
    }

    fn write_to(mut self, sink: &mut Sink<'_>) -> Result<()> {
        let written = self.written.take();
        self.encode(&mut |bytes| sink.put(bytes))?;
        if let Some(written) = written {
            written();
        }
        Ok(())
    }

    /// Passes the bytes of the tensor to `put`.
    fn encode(mut self, put: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let nothing = Content::Bytes(Cow::Borrowed(&[]));
        let source = std::mem::replace(&mut self.source, Source::Ready(nothing));
        let mut n_passed = 0;
        let mut pass = |content: Content<'_>| {
            n_passed += 1;
            self.encode_content(content, put)
        };
        match source {
            Source::Ready(content) => pass(content)?,
            Source::Lazy(make) => make(&mut pass)?,
        }
        self.check_len("passes", n_passed, 1)
    }

    fn encode_content(
        &self,
        content: Content<'_>,
        put: &mut dyn FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let values = match content {
            Content::Values(values) => values,
            Content::Bytes(bytes) => {
                self.check_len("bytes", bytes.len(), self.n_bytes()?)?;
                return put(&bytes);
            }
        };
        let n = self.n_elements()?;
        self.check_len("elements", values.len(), n)?;
        let mut bytes = Vec::with_capacity(CHUNK.min(n) * self.dtype.size());
        for (i, chunk) in values.chunks(CHUNK).enumerate() {
            bytes.clear();
            dtype::encode(&self.name, self.dtype, i * CHUNK, chunk, &mut bytes)?;
            put(&bytes)?;
        }
        Ok(())
    }
}

/// Writes a safetensors file atomically. The metadata always holds `"format": "pt"`, which
/// transformers requires.
///
/// Tensors are written in the order of the reference implementation: wide dtypes first, so that
/// every tensor is aligned, then by name. The same tensors give the same bytes.
///
/// # Errors
/// Returns [`Error::Io`]; [`Error::NotFinite`] if a value is NaN or infinite;
/// [`Error::TensorOverflow`] if a value is too large for its dtype; [`Error::ShapeMismatch`] if the
/// shape does not match the number of elements; [`Error::InvalidFile`] if two tensors have the same
/// name; and any error of a closure. No file is left behind.
#[doc(hidden)]
pub fn write_safetensors(
    path: impl AsRef<Path>,
    mut tensors: Vec<HostTensor<'_>>,
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    tensors.sort_by(|a, b| {
        b.dtype
            .size()
            .cmp(&a.dtype.size())
            .then_with(|| a.name.cmp(&b.name))
    });
    let mut metadata = metadata.clone();
    metadata.insert("format".into(), "pt".into());
    write_in_order(path.as_ref(), tensors, &metadata, 8, true)
}

/// Writes a safetensors file with the tensors in the given order. The first of them begins at a
/// multiple of `align` bytes. An existing file is replaced if `overwrite` is true. See
/// [`write_safetensors`].
pub(crate) fn write_in_order(
    path: &Path,
    tensors: Vec<HostTensor<'_>>,
    metadata: &BTreeMap<String, String>,
    align: usize,
    overwrite: bool,
) -> Result<()> {
    check_names(path, &tensors)?;
    let mut header = Map::new();
    header.insert("__metadata__".into(), json!(metadata));
    let mut begin = 0usize;
    for tensor in &tensors {
        let end = begin
            .checked_add(tensor.n_bytes()?)
            .ok_or_else(|| Error::invalid_file(path, "too large"))?;
        header.insert(
            tensor.name.clone(),
            json!({"dtype": tensor.dtype.name(), "shape": tensor.shape, "data_offsets": [begin, end]}),
        );
        begin = end;
    }
    let mut header =
        serde_json::to_vec(&Value::Object(header)).map_err(|e| Error::json(path, e))?;
    let length = size_of::<u64>();
    header.resize(
        (length + header.len()).next_multiple_of(align) - length,
        b' ',
    );
    if header.len() as u64 > super::MAX_HEADER_BYTES {
        return Err(Error::invalid_file(
            path,
            format!(
                "a header of {} bytes is more than readers take",
                header.len()
            ),
        ));
    }
    atomic::write_file_or_refuse(path, overwrite, |sink| {
        sink.put(&(header.len() as u64).to_le_bytes())?;
        sink.put(&header)?;
        tensors
            .into_iter()
            .try_for_each(|tensor| tensor.write_to(sink))
    })
}

/// Writes `tensors` into `folder` as `model.safetensors`, or as shards with an index if they exceed
/// `max_shard_bytes`. Shards are filled in the given order; a tensor larger than a shard gets a
/// shard of its own.
///
/// # Errors
/// Returns the errors of [`write_safetensors`], and [`Error::InvalidArgument`] if the limit is
/// zero. Each file is written atomically; to write the whole folder atomically, use
/// [`FolderWriter`](crate::io::FolderWriter).
pub(crate) fn write_sharded(
    folder: impl AsRef<Path>,
    tensors: Vec<HostTensor<'_>>,
    max_shard_bytes: u64,
) -> Result<()> {
    let folder = folder.as_ref();
    if max_shard_bytes == 0 {
        return Err(Error::argument(
            "max_shard_bytes",
            max_shard_bytes,
            "at least 1",
        ));
    }
    check_names(folder, &tensors)?;
    let mut shards: Vec<Vec<HostTensor<'_>>> = vec![Vec::new()];
    let (mut in_shard, mut total) = (0u64, 0u64);
    for tensor in tensors {
        let bytes = tensor.n_bytes()? as u64;
        if in_shard > 0 && in_shard.saturating_add(bytes) > max_shard_bytes {
            shards.push(Vec::new());
            in_shard = 0;
        }
        in_shard = in_shard.saturating_add(bytes);
        total = total.saturating_add(bytes);
        if let Some(last) = shards.last_mut() {
            last.push(tensor);
        }
    }
    let metadata = BTreeMap::new();
    let n = shards.len();
    if n == 1 {
        return shards.into_iter().try_for_each(|tensors| {
            write_safetensors(folder.join("model.safetensors"), tensors, &metadata)
        });
    }
    let mut weight_map = BTreeMap::new();
    for (i, tensors) in shards.into_iter().enumerate() {
        let name = format!("model-{:05}-of-{n:05}.safetensors", i + 1);
        weight_map.extend(tensors.iter().map(|t| (t.name.clone(), name.clone())));
        write_safetensors(folder.join(&name), tensors, &metadata)?;
    }
    atomic::write_json(
        folder.join("model.safetensors.index.json"),
        &json!({"metadata": {"total_size": total}, "weight_map": weight_map}),
    )
}

fn check_names(path: &Path, tensors: &[HostTensor<'_>]) -> Result<()> {
    let mut seen = BTreeSet::new();
    for tensor in tensors {
        if tensor.name == "__metadata__" || !seen.insert(tensor.name.as_str()) {
            return Err(Error::invalid_file(
                path,
                format!("two tensors named `{}`", tensor.name),
            ));
        }
    }
    Ok(())
}
