//! Writes bundles.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::Value;

use super::{ALIGN, FORMAT, GAP, Index, VERSION, dtype};
use crate::error::{Error, Result};
use crate::format::StoredMatrix;
use crate::io::tensors::{DType, HostTensor, write_in_order};

/// Collects the contents of a bundle and writes it. The [module](super) documentation describes the
/// format.
#[derive(Debug)]
pub struct BundleWriter<'a> {
    index: Index,
    tensors: Vec<HostTensor<'a>>,
    at: usize,
}

impl<'a> BundleWriter<'a> {
    /// Creates a bundle that holds only the model's own description.
    pub fn new(document: Value) -> Self {
        let index = Index {
            matrices: BTreeMap::new(),
            checksums: BTreeMap::new(),
            document,
        };
        Self {
            index,
            tensors: Vec::new(),
            at: 0,
        }
    }

    /// Adds a weight. Add weights in the order of their use, so that they are read sequentially.
    pub fn matrix(&mut self, name: &str, matrix: &'a StoredMatrix) {
        self.index
            .matrices
            .insert(name.to_string(), matrix.header());
        for part in matrix.parts() {
            let tensor = format!("{name}.{}", part.name);
            self.push(tensor, dtype(part.element), part.shape, part.bytes);
            // A mapped weight is read for the checksum, and again when it is written.
            if let Some(last) = self.tensors.pop() {
                self.tensors.push(last.then(|| matrix.release()));
            }
        }
        matrix.release();
    }

    /// Adds a vector.
    pub fn vector(&mut self, name: &str, values: &'a [f32]) {
        if cfg!(target_endian = "little") {
            self.push(
                name.to_string(),
                DType::F32,
                vec![values.len()],
                bytemuck::cast_slice(values),
            );
        } else {
            let bytes: Vec<u8> = values
                .iter()
                .flat_map(|value| value.to_le_bytes())
                .collect();
            self.push(name.to_string(), DType::F32, vec![values.len()], bytes);
        }
    }

    /// Adds a text.
    pub fn text(&mut self, name: &str, text: &'a str) {
        self.push(
            name.to_string(),
            DType::U8,
            vec![text.len()],
            text.as_bytes(),
        );
    }

    fn push(
        &mut self,
        name: String,
        dtype: DType,
        shape: Vec<usize>,
        bytes: impl Into<std::borrow::Cow<'a, [u8]>>,
    ) {
        self.gap(self.at.next_multiple_of(ALIGN) - self.at);
        self.put(name, dtype, shape, bytes.into());
    }

    fn put(
        &mut self,
        name: String,
        dtype: DType,
        shape: Vec<usize>,
        bytes: std::borrow::Cow<'a, [u8]>,
    ) {
        self.at += bytes.len();
        self.index
            .checksums
            .insert(name.clone(), crc32fast::hash(&bytes));
        self.tensors
            .push(HostTensor::from_bytes(name, dtype, shape, bytes));
    }

    fn gap(&mut self, len: usize) {
        if len > 0 {
            let name = format!("{GAP}{}", self.tensors.len());
            self.put(name, DType::U8, vec![len], vec![0; len].into());
        }
    }

    /// Writes the file atomically.
    ///
    /// # Errors
    /// Returns [`Error::InvalidFile`] if the file exists and `overwrite` is false, or if a name was
    /// added twice, and [`Error::Io`] if writing fails.
    pub fn write(mut self, path: impl AsRef<Path>, overwrite: bool) -> Result<()> {
        let path = path.as_ref();
        if !overwrite && path.exists() {
            return Err(Error::invalid_file(
                path,
                "there is a file of that name already",
            ));
        }
        // A kernel may read up to one cache line past the end of a weight.
        self.gap(self.at.next_multiple_of(ALIGN) - self.at + ALIGN);
        let index = serde_json::to_string(&self.index).map_err(|e| Error::json(path, e))?;
        let metadata = BTreeMap::from([
            (
                "checksum".to_string(),
                crc32fast::hash(index.as_bytes()).to_string(),
            ),
            ("format".to_string(), FORMAT.to_string()),
            ("index".to_string(), index),
            ("version".to_string(), VERSION.to_string()),
        ]);
        write_in_order(path, self.tensors, &metadata, ALIGN, overwrite)
    }
}
