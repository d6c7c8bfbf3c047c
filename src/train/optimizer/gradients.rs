//! The gradients of a step by parameter path, and the parts of the parameters that the step used.

use std::collections::BTreeMap;

use burn::module::Module;
use burn::tensor::{Gradients, Tensor};

use super::params::for_each_param;
use crate::adapter::ElasticLora;
use crate::arch::LinearKind;
use crate::model::Decoder;

/// Gradients by parameter path, flattened.
pub(crate) type Grads = BTreeMap<String, Tensor<1>>;

/// Adds the gradients of a backward pass to `into`, for the parameters that it reached.
pub(crate) fn collect<M: Module>(module: &M, grads: &mut Gradients, into: &mut Grads) {
    for_each_param(module, |path, param| {
        if let Some(grad) = param.take_gradient(grads) {
            add(into, path.to_string(), grad);
        }
    });
}

/// Adds the gradients of a micro-batch to those of the step.
pub(crate) fn accumulate(into: &mut Grads, from: Grads) {
    from.into_iter()
        .for_each(|(path, grad)| add(into, path, grad));
}

fn add(into: &mut Grads, path: String, grad: Tensor<1>) {
    let sum = match into.remove(&path) {
        Some(before) => before + grad,
        None => grad,
    };
    into.insert(path, sum);
}

/// The part of a parameter that a step used: the first `active` indices along `axis`. Each index
/// has its own step count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Prefix {
    pub axis: usize,
    pub active: usize,
}

/// Prefixes by parameter path. A parameter without a prefix is used as a whole.
pub(crate) type Prefixes = BTreeMap<String, Prefix>;

/// The parts of the adapters' factors that the active subnet uses. Factors in disabled sub-blocks
/// are left out; they have no gradient.
pub(crate) fn active_prefixes(model: &Decoder) -> Prefixes {
    let mut prefixes = Prefixes::new();
    for_each_factor(model, |path, axis, adapter, runs| {
        if runs {
            prefixes.insert(
                path,
                Prefix {
                    axis,
                    active: adapter.active_rank(),
                },
            );
        }
    });
    prefixes
}

/// The number of separately counted indices, for each parameter that has them.
pub(crate) fn rank_counts(model: &Decoder) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for_each_factor(model, |path, _, adapter, _| {
        counts.insert(path, adapter.max_rank());
    });
    counts
}

/// Calls `f` with each adapter factor's parameter path and rank axis, its adapter, and whether its
/// layer runs.
fn for_each_factor(model: &Decoder, mut f: impl FnMut(String, usize, &ElasticLora, bool)) {
    for (name, layer) in model.linears() {
        if let Some(adapter) = &layer.adapter {
            let runs = LinearKind::parse(&name)
                .is_none_or(|(block, kind)| model.layers[block].runs(kind.sub_block()));
            // Parameter paths inside the module lack Hugging Face's prefix.
            let path = name.strip_prefix("model.").unwrap_or(&name);
            f(format!("{path}.adapter.lora_a"), 1, adapter, runs);
            f(format!("{path}.adapter.lora_b"), 0, adapter, runs);
        }
    }
}

/// Extends the prefixes in `into` to cover those in `from`.
pub(crate) fn widen(into: &mut Prefixes, from: Prefixes) {
    for (path, prefix) in from {
        into.entry(path)
            .and_modify(|before| before.active = before.active.max(prefix.active))
            .or_insert(prefix);
    }
}

/// The factor that scales gradients of joint norm `norm` down to `max_norm`; 1 if the norm is no
/// larger.
pub(crate) fn clip_factor(norm: f64, max_norm: f64) -> f64 {
    if norm > max_norm {
        max_norm / (norm + 1e-6)
    } else {
        1.0
    }
}
