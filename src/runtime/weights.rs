//! The weights of a model, each looked at before its first use.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::arch::NormKind;
use crate::error::{Error, Result};
use crate::format::StoredMatrix;
use crate::io::bundle::Bundle;
use crate::space::LoraConfig;

/// The gains of the norms that a block has.
pub(crate) type Norms = BTreeMap<NormKind, Arc<[f32]>>;

/// A weight that may come from a file, of which nothing was read yet. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Weight(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    name: String,
    matrix: StoredMatrix,
    /// The file, and whether its checksums are to be compared.
    source: Option<(Arc<Bundle>, bool)>,
    checked: AtomicBool,
}

impl Weight {
    /// One that was made here.
    pub fn made(name: impl Into<String>, matrix: StoredMatrix) -> Self {
        Self(Arc::new(Inner {
            name: name.into(),
            matrix,
            source: None,
            checked: AtomicBool::new(true),
        }))
    }

    /// One that lies in a file without checksums.
    pub fn mapped(name: impl Into<String>, matrix: StoredMatrix) -> Self {
        Self(Arc::new(Inner {
            name: name.into(),
            matrix,
            source: None,
            checked: AtomicBool::new(false),
        }))
    }

    /// One that lies in a bundle; `compare` says whether its checksums are looked at before its first use.
    pub fn from_file(
        name: String,
        matrix: StoredMatrix,
        bundle: Arc<Bundle>,
        compare: bool,
    ) -> Self {
        Self(Arc::new(Inner {
            name,
            matrix,
            source: Some((bundle, compare)),
            checked: AtomicBool::new(false),
        }))
    }

    /// The tensor's name.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// The weight, its contents not looked at.
    pub fn unchecked(&self) -> &StoredMatrix {
        &self.0.matrix
    }

    /// The weight. At the first time, its contents are compared with their checksums, and checked.
    ///
    /// # Errors
    /// [`Error::InvalidFile`] that names the tensor.
    pub fn get(&self) -> Result<&StoredMatrix> {
        if !self.0.checked.load(Ordering::Acquire) {
            self.check()?;
        }
        Ok(&self.0.matrix)
    }

    #[cold]
    fn check(&self) -> Result<()> {
        if let Some((bundle, true)) = &self.0.source {
            bundle.verify_matrix(&self.0.name)?;
        }
        self.check_contents()
    }

    /// Checks the contents as far as they can be without checksums, whether that was done before or not.
    ///
    /// # Errors
    /// [`Error::InvalidFile`] that names the tensor.
    pub fn check_contents(&self) -> Result<()> {
        let Inner {
            name,
            matrix,
            source,
            checked,
        } = &*self.0;
        let path = source
            .as_ref()
            .map_or(name.as_ref(), |(bundle, _)| bundle.path());
        matrix
            .check()
            .map_err(|error| Error::invalid_file(path, format!("tensor `{name}`: {error}")))?;
        // Two threads may come here at once, and then find the same.
        checked.store(true, Ordering::Release);
        Ok(())
    }

    /// The file that it lies in, if that is a bundle.
    pub fn bundle(&self) -> Option<&Arc<Bundle>> {
        self.0.source.as_ref().map(|(bundle, _)| bundle)
    }
}

/// The factors of a low-rank adapter.
#[derive(Clone, Debug)]
pub(crate) struct AdapterWeights {
    /// PEFT's `lora_A`, `[r_max, d_input]`.
    pub a: Weight,
    /// PEFT's `lora_B`, turned, `[r_max, d_output]`.
    pub bt: Weight,
    /// Largest rank, alpha and scale rule.
    pub lora: LoraConfig,
}

/// A linear layer.
#[derive(Clone, Debug)]
pub(crate) struct LayerWeights {
    /// Hugging Face's module path.
    pub name: String,
    /// `[d_output, d_input]`.
    pub weight: Weight,
    /// `[d_output]`.
    pub bias: Option<Arc<[f32]>>,
    /// The update that rides on it.
    pub adapter: Option<AdapterWeights>,
}

impl LayerWeights {
    /// The largest rank; 0 without an adapter.
    pub fn max_rank(&self) -> usize {
        self.adapter.as_ref().map_or(0, |adapter| adapter.lora.rank)
    }

    /// All its matrices.
    pub fn weights(&self) -> impl Iterator<Item = &Weight> {
        let factors = self
            .adapter
            .iter()
            .flat_map(|adapter| [&adapter.a, &adapter.bt]);
        std::iter::once(&self.weight).chain(factors)
    }
}
