//! Reading a bundle.

use std::path::Path;
use std::sync::{Mutex, PoisonError};

use serde_json::Value;

use super::{ALIGN, FORMAT, GAP, Index, VERSION, dtype};
use crate::error::{Error, Result};
use crate::format::StoredMatrix;
use crate::io::tensors::{Checkpoint, DType};
use crate::kernels::Pool;

/// A bundle, opened: see the [module](super) for what was checked then, and what is checked later.
#[derive(Debug)]
pub struct Bundle {
    checkpoint: Checkpoint,
    index: Index,
}

impl Bundle {
    /// Opens a bundle; `mmap` as for [`Checkpoint::open_with`].
    ///
    /// # Errors
    /// Those of [`Checkpoint::open`]; [`Error::InvalidFile`] that names the tensor for anything that a bundle must not be: of another
    /// format or version, an index that was changed, tensors that the index does not know or the other way round, parts of a weight that
    /// are missing, of another type, size or alignment.
    pub fn open(path: impl AsRef<Path>, mmap: bool) -> Result<Self> {
        let path = path.as_ref();
        let checkpoint = Checkpoint::open_with(path, mmap)?;
        let bad = |reason: String| Error::invalid_file(path, reason);
        let field = |name: &str| checkpoint.metadata().get(name).map(String::as_str);
        if field("format") != Some(FORMAT) {
            return Err(bad(format!(
                "no bundle: its metadata does not say `format` = `{FORMAT}`"
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

    /// The file.
    pub fn path(&self) -> &Path {
        self.checkpoint.path()
    }

    /// The model's own description.
    pub fn document(&self) -> &Value {
        &self.index.document
    }

    /// The names of its weights.
    pub fn matrices(&self) -> impl Iterator<Item = &str> {
        self.index.matrices.keys().map(String::as_str)
    }

    /// Whether there is a tensor of this name: a vector, a text or a part of a weight.
    pub fn contains(&self, name: &str) -> bool {
        self.checkpoint.contains(name)
    }

    /// A weight, in place. Its sizes are checked, its contents not; see [`verify_matrix`](Self::verify_matrix) and
    /// [`StoredMatrix::check`].
    ///
    /// # Errors
    /// [`Error::MissingTensor`] where there is none of this name; [`Error::InvalidFile`].
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

    /// A vector, compared with its checksum.
    ///
    /// # Errors
    /// [`Error::MissingTensor`], [`Error::TensorShape`], [`Error::TensorDtype`], [`Error::NotFinite`], [`Error::InvalidFile`].
    pub fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        self.checkpoint.check_shape(name, &[len])?;
        self.verify_tensor(name)?;
        self.checkpoint.load_vector(name, len)
    }

    /// A text, compared with its checksum.
    ///
    /// # Errors
    /// [`Error::MissingTensor`]; [`Error::InvalidFile`] where its bytes are no text, or not those that were written.
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
    /// [`Error::InvalidFile`] that names the tensor; [`Error::MissingTensor`].
    pub fn verify_matrix(&self, name: &str) -> Result<()> {
        for part in self.matrix(name)?.parts() {
            self.verify_tensor(&format!("{name}.{}", part.name))?;
        }
        Ok(())
    }

    /// Compares all that the file holds with its checksums.
    ///
    /// # Errors
    /// [`Error::InvalidFile`] that names the tensor.
    pub fn verify(&self) -> Result<()> {
        self.checkpoint
            .names()
            .try_for_each(|name| self.verify_tensor(name))
    }

    /// [`verify`](Self::verify) on several threads.
    ///
    /// # Errors
    /// As [`verify`](Self::verify); of several, that of the first tensor by name.
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
