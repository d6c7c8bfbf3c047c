//! Reads bundles.

use std::path::Path;
use std::sync::{Mutex, PoisonError};

use serde_json::Value;

use super::{ALIGN, FORMAT, GAP, Index, VERSION, dtype};
use crate::error::{Error, Result};
use crate::format::StoredMatrix;
use crate::io::tensors::{Checkpoint, DType};
use crate::kernels::Pool;

/// An open bundle. The [module](super) documentation lists what is checked on opening and what is
/// checked later.
#[derive(Debug)]
pub struct Bundle {
    checkpoint: Checkpoint,
    index: Index,
}

impl Bundle {
    /// Opens a bundle. `mmap` has the same meaning as for [`Checkpoint::open_with`].
    ///
    /// # Errors
    /// Returns the errors of [`Checkpoint::open`]. Returns [`Error::InvalidFile`] if the format or
    /// version differs, if the index was changed, or, naming the tensor, if a tensor is missing in
    /// the index or a part of a weight is missing or has another dtype, size or alignment. Returns
    /// [`Error::MissingTensor`] if the file lacks a tensor of the index.
    pub fn open(path: impl AsRef<Path>, mmap: bool) -> Result<Self> {
        let path = path.as_ref();
        Self::from_checkpoint(path, Checkpoint::open_with(path, mmap)?)
    }

    /// Opens a bundle whose bytes are in memory. `path` names it in errors.
    ///
    /// # Errors
    /// Returns the errors of [`open`](Self::open).
    pub fn from_bytes(path: impl AsRef<Path>, bytes: crate::format::Owner) -> Result<Self> {
        let path = path.as_ref();
        Self::from_checkpoint(path, Checkpoint::from_bytes(path, bytes)?)
    }

    fn from_checkpoint(path: &Path, checkpoint: Checkpoint) -> Result<Self> {
        let bad = |reason: String| Error::invalid_file(path, reason);
        let field = |name: &str| checkpoint.metadata().get(name).map(String::as_str);
        if field("format") != Some(FORMAT) {
            return Err(bad(format!(
                "a safetensors file, but no bundle: its metadata does not say `format` = `{FORMAT}` \
                 (give the folder of a model, not one of its files)"
            )));
        }
        let version = field("version").unwrap_or("none");
        if version != VERSION.to_string() {
            return Err(bad(format!(
                "a bundle of version {version}; {VERSION} is read"
            )));
        }
        let text = field("index").ok_or_else(|| bad("a bundle without an index".into()))?;
        if field("checksum") != Some(crc32fast::hash(text.as_bytes()).to_string().as_str()) {
            return Err(bad(
                "the index is not the one that was written: its checksum differs".into(),
            ));
        }
        let index: Index = serde_json::from_str(text).map_err(|e| bad(format!("index: {e}")))?;
        let bundle = Self { checkpoint, index };
        bundle.check(path)?;
        Ok(bundle)
    }

    fn check(&self, path: &Path) -> Result<()> {
        let bad = |tensor: &str, reason: String| {
            Error::invalid_file(path, format!("tensor `{tensor}`: {reason}"))
        };
        for name in self.checkpoint.names() {
            if !self.index.checksums.contains_key(name) {
                return Err(bad(name, "the index does not know it".into()));
            }
            let offset = self.checkpoint.offset(name)?;
            if !offset.is_multiple_of(ALIGN) && !name.starts_with(GAP) {
                return Err(bad(
                    name,
                    format!("begins at byte {offset}, which is no multiple of {ALIGN}"),
                ));
            }
        }
        if let Some(name) = self
            .index
            .checksums
            .keys()
            .find(|name| !self.checkpoint.contains(name))
        {
            return Err(Error::MissingTensor {
                path: path.into(),
                tensor: name.clone(),
            });
        }
        for name in self.index.matrices.keys() {
            let matrix = self.matrix(name)?;
            for part in matrix.parts() {
                let tensor = format!("{name}.{}", part.name);
                let info = self.checkpoint.info(&tensor)?;
                if (info.dtype, info.shape.as_slice())
                    != (dtype(part.element), part.shape.as_slice())
                {
                    let expected = format!("{} {:?}", dtype(part.element), part.shape);
                    return Err(bad(
                        &tensor,
                        format!("{} {:?}, expected {expected}", info.dtype, info.shape),
                    ));
                }
            }
        }
        Ok(())
    }

    /// Returns the path of the file.
    pub fn path(&self) -> &Path {
        self.checkpoint.path()
    }

    /// Returns the model's own description.
    pub fn document(&self) -> &Value {
        &self.index.document
    }

    /// Returns the names of the weights.
    pub fn matrices(&self) -> impl Iterator<Item = &str> {
        self.index.matrices.keys().map(String::as_str)
    }

    /// Returns whether there is a tensor of this name: a vector, a text or a part of a weight.
    pub fn contains(&self, name: &str) -> bool {
        self.checkpoint.contains(name)
    }

    /// Returns a weight without copying it. Its sizes are checked, but not its contents; see
    /// [`verify_matrix`](Self::verify_matrix) and [`StoredMatrix::check`].
    ///
    /// # Errors
    /// Returns [`Error::MissingTensor`] if there is no weight of this name, and
    /// [`Error::InvalidFile`] if its parts do not match its header.
    pub fn matrix(&self, name: &str) -> Result<StoredMatrix> {
        let missing = || Error::MissingTensor {
            path: self.path().into(),
            tensor: name.into(),
        };
        let header = self.index.matrices.get(name).ok_or_else(missing)?;
        let part = |part: &str| self.checkpoint.buffer(&format!("{name}.{part}")).ok();
        StoredMatrix::from_parts(header, part)
            .map_err(|error| Error::invalid_file(self.path(), format!("tensor `{name}`: {error}")))
    }

    /// Returns a vector after comparing it with its checksum.
    ///
    /// # Errors
    /// Returns [`Error::MissingTensor`], [`Error::TensorShape`], [`Error::TensorDtype`],
    /// [`Error::NotFinite`], or [`Error::InvalidFile`] if the checksum differs.
    pub fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        self.checkpoint.check_shape(name, &[len])?;
        self.verify_tensor(name)?;
        self.checkpoint.load_vector(name, len)
    }

    /// Returns a text after comparing it with its checksum.
    ///
    /// # Errors
    /// Returns [`Error::MissingTensor`], or [`Error::InvalidFile`] if the tensor is not UTF-8 text
    /// or its checksum differs.
    pub fn text(&self, name: &str) -> Result<String> {
        self.verify_tensor(name)?;
        let bad =
            |reason: &str| Error::invalid_file(self.path(), format!("tensor `{name}`: {reason}"));
        if self.checkpoint.info(name)?.dtype != DType::U8 {
            return Err(bad("no text"));
        }
        String::from_utf8(self.checkpoint.bytes(name)?.to_vec()).map_err(|_| bad("not UTF-8"))
    }

    /// Compares the contents of a weight with their checksums.
    ///
    /// # Errors
    /// Returns [`Error::InvalidFile`], naming the tensor, if a checksum differs, and
    /// [`Error::MissingTensor`] if there is no weight of this name.
    pub fn verify_matrix(&self, name: &str) -> Result<()> {
        for part in self.matrix(name)?.parts() {
            self.verify_tensor(&format!("{name}.{}", part.name))?;
        }
        Ok(())
    }

    /// Compares the whole contents of the file with their checksums.
    ///
    /// # Errors
    /// Returns [`Error::InvalidFile`], naming the tensor, if a checksum differs.
    pub fn verify(&self) -> Result<()> {
        self.checkpoint
            .names()
            .try_for_each(|name| self.verify_tensor(name))
    }

    /// Runs [`verify`](Self::verify) on several threads.
    ///
    /// # Errors
    /// Returns the errors of [`verify`](Self::verify). If several tensors fail, the error is that
    /// of the first one by name.
    pub fn verify_on(&self, pool: &Pool) -> Result<()> {
        let names: Vec<&str> = self.checkpoint.names().collect();
        let failed: Mutex<Option<(usize, Error)>> = Mutex::new(None);
        pool.for_each(names.len(), |_, index| {
            if let Err(error) = self.verify_tensor(names[index]) {
                let mut failed = failed.lock().unwrap_or_else(PoisonError::into_inner);
                if failed.as_ref().is_none_or(|(first, _)| index < *first) {
                    *failed = Some((index, error));
                }
            }
        });
        failed
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner)
            .map_or(Ok(()), |(_, error)| Err(error))
    }

    fn verify_tensor(&self, name: &str) -> Result<()> {
        let found = crc32fast::hash(self.checkpoint.bytes(name)?);
        match self.index.checksums.get(name) {
            Some(expected) if *expected == found => Ok(()),
            _ => {
                let reason = format!(
                    "tensor `{name}`: its contents are not those that were written (checksum {found:08x})"
                );
                Err(Error::invalid_file(self.path(), reason))
            }
        }
    }
}
