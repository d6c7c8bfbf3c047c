//! Visits and maps the parameters of a module by their path, such as
//! `layers.0.mlp.up_proj.adapter.lora_a`.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{Gradients, Tensor, TensorData};

use crate::error::{Error, Result};

/// A parameter with any number of dimensions.
pub trait Parameter {
    /// Whether the parameter requires a gradient.
    fn is_trained(&self) -> bool;

    /// The elements in one dimension, without autodiff.
    fn flattened(&self) -> Tensor<1>;

    /// Removes the parameter's gradient from `gradients` and returns its elements; `None` if the
    /// backward pass did not reach the parameter.
    fn take_gradient(&self, gradients: &mut Gradients) -> Option<Tensor<1>>;
}

impl<const D: usize> Parameter for Param<Tensor<D>> {
    fn is_trained(&self) -> bool {
        self.base().is_require_grad()
    }

    fn flattened(&self) -> Tensor<1> {
        flatten(self.base().without_autodiff())
    }

    fn take_gradient(&self, gradients: &mut Gradients) -> Option<Tensor<1>> {
        let value = self.base();
        if !value.is_require_grad() {
            return None;
        }
        value.grad_remove(gradients).map(flatten)
    }
}

fn flatten<const D: usize>(tensor: Tensor<D>) -> Tensor<1> {
    let n = tensor.shape().num_elements();
    tensor.reshape([n])
}

/// Calls `f` with each float parameter and its path.
pub fn for_each_param<M: Module>(module: &M, f: impl FnMut(&str, &dyn Parameter)) {
    struct Visit<F> {
        path: Vec<String>,
        f: F,
    }
    impl<F: FnMut(&str, &dyn Parameter)> ModuleVisitor for Visit<F> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            (self.f)(&self.path.join("."), param);
        }
        fn enter_module(&mut self, name: &str, _: &str) {
            self.path.push(name.to_string());
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.path.pop();
        }
    }
    module.visit(&mut Visit {
        path: Vec::new(),
        f,
    });
}

/// Replaces the elements of every trained parameter by the result of `f`, which receives the path,
/// the elements without autodiff, and the shape. If the tensor is not shared elsewhere, `f`
/// receives the only handle to its memory.
pub(super) fn map_trained<M: Module>(
    module: M,
    f: impl FnMut(&str, Tensor<1>, &[usize]) -> Tensor<1>,
) -> M {
    struct Map<F> {
        path: Vec<String>,
        f: F,
    }
    impl<F: FnMut(&str, Tensor<1>, &[usize]) -> Tensor<1>> ModuleMapper for Map<F> {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            if !param.is_trained() {
                return param;
            }
            let path = self.path.join(".");
            param.map(|value| {
                let shape = value.dims();
                let value = (self.f)(&path, flatten(value.inner()), &shape);
                Tensor::from_inner(value.reshape(shape)).require_grad()
            })
        }
        fn enter_module(&mut self, name: &str, _: &str) {
            self.path.push(name.to_string());
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.path.pop();
        }
    }
    module.map(&mut Map {
        path: Vec::new(),
        f,
    })
}

/// The flattened values of every trained parameter, by path.
pub(crate) fn trainable<M: Module>(module: &M) -> BTreeMap<String, Tensor<1>> {
    let mut values = BTreeMap::new();
    for_each_param(module, |path, param| {
        if param.is_trained() {
            values.insert(path.to_string(), param.flattened());
        }
    });
    values
}

/// Replaces the values of trained parameters, by path.
pub(crate) fn load_trainable<M: Module>(
    module: M,
    mut values: BTreeMap<String, Vec<f32>>,
) -> Result<M> {
    let unknown = |path: &str| Error::UnknownLayer {
        context: "checkpoint".into(),
        layer: path.to_string(),
    };
    let mut error = None;
    let module = map_trained(module, |path, old, shape| {
        let n = old.dims()[0];
        match values.remove(path) {
            Some(values) if values.len() == n => {
                Tensor::from_data(TensorData::new(values, [n]), &old.device())
            }
            found => {
                error.get_or_insert_with(|| match found {
                    Some(values) => Error::TensorShape {
                        tensor: path.to_string(),
                        expected: shape.to_vec(),
                        found: vec![values.len()],
                    },
                    None => unknown(path),
                });
                old
            }
        }
    });
    match error.or_else(|| values.keys().next().map(|path| unknown(path))) {
        Some(error) => Err(error),
        None => Ok(module),
    }
}
