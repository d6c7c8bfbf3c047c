//! Weights of a model, each checked before its first use.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::arch::NormKind;
use crate::error::{Error, Result};
use crate::format::StoredMatrix;
use crate::io::bundle::Bundle;
use crate::space::LoraConfig;

/// Gains of the norms of a block.
pub(crate) type Norms = BTreeMap<NormKind, Arc<[f32]>>;

/// A weight, which may be in a file that has not been read yet. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Weight(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    name: String,
    matrix: StoredMatrix,
    /// The bundle, and whether its checksums are verified.
    source: Option<(Arc<Bundle>, bool)>,
    checked: AtomicBool,
}

impl Weight {
    /// Wraps a matrix that was made in memory and needs no check.
    pub fn made(name: impl Into<String>, matrix: StoredMatrix) -> Self {
        Self(Arc::new(Inner {
            name: name.into(),
            matrix,
            source: None,
            checked: AtomicBool::new(true),
        }))
    }

    /// Wraps a matrix that may be mapped from a file without checksums. Its contents are checked
    /// before its first use.
    pub fn mapped(name: impl Into<String>, matrix: StoredMatrix) -> Self {
        Self(Arc::new(Inner {
            name: name.into(),
            matrix,
            source: None,
            checked: AtomicBool::new(false),
        }))
    }

    /// Wraps a matrix of a bundle. If `compare` is true, its checksums are verified before its
    /// first use.
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

    /// Name of the tensor.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Returns the weight without checking its contents.
    pub fn unchecked(&self) -> &StoredMatrix {
        &self.0.matrix
    }

    /// Returns the weight. The first call checks its contents, and its checksums if they are to be
    /// verified.
    ///
    /// # Errors
    /// Returns [`Error::InvalidFile`], naming the tensor, if the contents are damaged, and
    /// [`Error::NotFinite`] if it holds NaN or an infinity.
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

    /// Checks the contents without checksums, even if they were checked before.
    ///
    /// # Errors
    /// Returns the errors of [`get`](Self::get).
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
        matrix.check().map_err(|error| match error {
            Error::NotFinite { index, value, .. } => Error::NotFinite {
                tensor: name.clone(),
                index,
                value,
            },
            error => Error::invalid_file(path, format!("tensor `{name}`: {error}")),
        })?;
        // Two threads may check the same weight at once; both get the same result.
        checked.store(true, Ordering::Release);
        Ok(())
    }

    /// The bundle that holds the weight, if there is one.
    pub fn bundle(&self) -> Option<&Arc<Bundle>> {
        self.0.source.as_ref().map(|(bundle, _)| bundle)
    }
}

/// Factors of a low-rank adapter.
#[derive(Clone, Debug)]
pub(crate) struct AdapterWeights {
    /// PEFT's `lora_A`, `[r_max, d_input]`.
    pub a: Weight,
    /// PEFT's `lora_B`, transposed, `[r_max, d_output]`.
    pub bt: Weight,
    /// Largest rank, alpha and scale rule.
    pub lora: LoraConfig,
}

/// A linear layer.
#[derive(Clone, Debug)]
pub(crate) struct LayerWeights {
    /// Hugging Face's module path.
    pub name: String,
    /// Weight, `[d_output, d_input]`.
    pub weight: Weight,
    /// Bias, `[d_output]`.
    pub bias: Option<Arc<[f32]>>,
    /// Low-rank adapter of the layer.
    pub adapter: Option<AdapterWeights>,
    /// Weights of the same sizes that some subnets have in place of `weight`.
    pub others: Vec<Weight>,
}

impl LayerWeights {
    /// Largest rank of the adapter; 0 without one.
    pub fn max_rank(&self) -> usize {
        self.adapter.as_ref().map_or(0, |adapter| adapter.lora.rank)
    }

    /// Returns the weight that a subnet has: 0 for the layer's own, or one more than an index of
    /// `others`, which was checked.
    pub fn weight_at(&self, index: usize) -> &Weight {
        let other = index.checked_sub(1).and_then(|at| self.others.get(at));
        other.unwrap_or(&self.weight)
    }

    /// Returns the matrices of the layer: its own weight, then the adapter's factors.
    pub fn weights(&self) -> impl Iterator<Item = &Weight> {
        let factors = self
            .adapter
            .iter()
            .flat_map(|adapter| [&adapter.a, &adapter.bt]);
        std::iter::once(&self.weight).chain(factors)
    }
}
