//! AdamW over the parameters of a module that require gradients, with state kept by parameter path.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::optim::{AdamW, AdamWConfig, AdamWState, AdaptiveMomentumState, Optimizer};
use burn::tensor::{Device, Gradients, Tensor, TensorData};

use crate::error::{Error, Result};
use crate::nn::host_values;

/// Gradients by parameter path, flattened.
pub(crate) type Grads = BTreeMap<String, Tensor<1>>;

/// The flattened values of every trainable parameter, by path.
pub(crate) fn trainable<M: Module>(module: &M) -> BTreeMap<String, Tensor<1>> {
    struct Collect {
        path: Vec<String>,
        out: BTreeMap<String, Tensor<1>>,
    }
    impl ModuleVisitor for Collect {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let value = param.base();
            if value.is_require_grad() {
                let n = value.shape().num_elements();
                self.out.insert(self.path.join("."), value.inner().reshape([n]));
            }
        }
        fn enter_module(&mut self, name: &str, _: &str) {
            self.path.push(name.to_string());
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.path.pop();
        }
    }
    let mut collect = Collect { path: Vec::new(), out: BTreeMap::new() };
    module.visit(&mut collect);
    collect.out
}

/// Adds a backward pass's gradients to `into`: those of the parameters that it reached.
pub(crate) fn collect<M: Module>(module: &M, grads: &mut Gradients, into: &mut Grads) {
    struct Collect<'a> {
        path: Vec<String>,
        grads: &'a mut Gradients,
        into: &'a mut Grads,
    }
    impl ModuleVisitor for Collect<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            let value = param.base();
            if !value.is_require_grad() {
                return;
            }
            if let Some(grad) = value.grad_remove(self.grads) {
                let n = grad.shape().num_elements();
                let grad: Tensor<1> = grad.reshape([n]);
                let path = self.path.join(".");
                add(self.into, path, grad);
            }
        }
        fn enter_module(&mut self, name: &str, _: &str) {
            self.path.push(name.to_string());
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.path.pop();
        }
    }
    module.visit(&mut Collect { path: Vec::new(), grads, into });
}

/// Adds a micro-batch's gradients to those of the step.
pub(crate) fn accumulate(into: &mut Grads, from: Grads) {
    from.into_iter().for_each(|(path, grad)| add(into, path, grad));
}

fn add(into: &mut Grads, path: String, grad: Tensor<1>) {
    let sum = match into.remove(&path) {
        Some(before) => before + grad,
        None => grad,
    };
    into.insert(path, sum);
}

/// The gradients' joint Euclidean norm. One read-back.
pub(crate) fn norm(grads: &Grads) -> f64 {
    if grads.is_empty() {
        return 0.0;
    }
    let squares: Vec<Tensor<1>> = grads.values().map(|grad| grad.clone().square().sum()).collect();
    f64::from(host_values(Tensor::cat(squares, 0).sum())[0]).sqrt()
}

/// Scales gradients of joint norm `norm` so that it is at most `max_norm`.
pub(crate) fn clip(grads: &mut Grads, norm: f64, max_norm: f64) {
    if norm > max_norm {
        let factor = max_norm / (norm + 1e-6);
        for grad in grads.values_mut() {
            *grad = grad.clone() * factor;
        }
    }
}

/// AdamW (arXiv 1711.05101) with state by parameter path, so that a checkpoint has names.
pub(crate) struct NamedAdamW {
    adamw: AdamW,
    state: BTreeMap<String, AdamWState<1>>,
}

impl NamedAdamW {
    pub fn new(betas: (f64, f64), eps: f64, weight_decay: f64) -> Self {
        let adamw = AdamWConfig::new()
            .with_beta_1(betas.0 as f32)
            .with_beta_2(betas.1 as f32)
            .with_epsilon(eps as f32)
            .with_weight_decay(weight_decay as f32)
            .build();
        Self { adamw, state: BTreeMap::new() }
    }

    /// One step; parameters without a gradient stay as they are.
    pub fn step<M: Module>(&mut self, module: M, grads: Grads, lr: f64) -> M {
        struct Apply<'a> {
            path: Vec<String>,
            optimizer: &'a mut NamedAdamW,
            grads: Grads,
            lr: f64,
        }
        impl ModuleMapper for Apply<'_> {
            fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
                let path = self.path.join(".");
                let Some(grad) = self.grads.remove(&path) else {
                    return param;
                };
                let state = self.optimizer.state.remove(&path);
                let adamw = &self.optimizer.adamw;
                let mut next = None;
                let param = param.map(|value| {
                    let shape = value.dims();
                    let n = value.shape().num_elements();
                    let (value, state) = adamw.step(self.lr, value.inner().reshape([n]), grad, state);
                    next = state;
                    Tensor::from_inner(value.reshape(shape)).require_grad()
                });
                if let Some(state) = next {
                    self.optimizer.state.insert(path, state);
                }
                param
            }
            fn enter_module(&mut self, name: &str, _: &str) {
                self.path.push(name.to_string());
            }
            fn exit_module(&mut self, _: &str, _: &str) {
                self.path.pop();
            }
        }
        module.map(&mut Apply { path: Vec::new(), optimizer: self, grads, lr })
    }

    /// The moments, by `m.<path>`, `v.<path>`, and the number of steps each parameter has had.
    pub fn moments(&self) -> (BTreeMap<String, Tensor<1>>, BTreeMap<String, usize>) {
        let mut tensors = BTreeMap::new();
        let mut times = BTreeMap::new();
        for (path, state) in &self.state {
            tensors.insert(format!("m.{path}"), state.momentum.moment_1.clone());
            tensors.insert(format!("v.{path}"), state.momentum.moment_2.clone());
            times.insert(path.clone(), state.momentum.time);
        }
        (tensors, times)
    }

    /// Takes up where [`moments`](Self::moments) left off; `read` gives a tensor's elements by its name.
    pub fn restore(
        &mut self,
        times: &BTreeMap<String, usize>,
        device: &Device,
        mut read: impl FnMut(&str) -> Result<Vec<f32>>,
    ) -> Result<()> {
        let tensor = |values: Vec<f32>| {
            let n = values.len();
            Tensor::<1>::from_data(TensorData::new(values, [n]), device)
        };
        let mut state = BTreeMap::new();
        for (path, time) in times {
            let (m, v) = (read(&format!("m.{path}"))?, read(&format!("v.{path}"))?);
            let momentum = AdaptiveMomentumState::new(*time, tensor(m), tensor(v));
            state.insert(path.clone(), AdamWState::new(momentum));
        }
        self.state = state;
        Ok(())
    }
}

/// Replaces the values of trainable parameters by path.
pub(crate) fn load_trainable<M: Module>(module: M, values: BTreeMap<String, Vec<f32>>) -> Result<M> {
    struct Load {
        path: Vec<String>,
        values: BTreeMap<String, Vec<f32>>,
        error: Option<Error>,
    }
    impl ModuleMapper for Load {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            if !param.base().is_require_grad() {
                return param;
            }
            let path = self.path.join(".");
            let Some(values) = self.values.remove(&path) else {
                self.error.get_or_insert(Error::UnknownLayer { context: "checkpoint".into(), layer: path });
                return param;
            };
            let shape = param.base().dims();
            if values.len() != shape.iter().product::<usize>() {
                self.error.get_or_insert(Error::TensorShape {
                    tensor: path,
                    expected: shape.to_vec(),
                    found: vec![values.len()],
                });
                return param;
            }
            param.map(|old| {
                let value = Tensor::<D>::from_data(TensorData::new(values, shape), &old.device().without_autodiff());
                Tensor::from_inner(value).require_grad()
            })
        }
        fn enter_module(&mut self, name: &str, _: &str) {
            self.path.push(name.to_string());
        }
        fn exit_module(&mut self, _: &str, _: &str) {
            self.path.pop();
        }
    }
    let mut load = Load { path: Vec::new(), values, error: None };
    let module = module.map(&mut load);
    match (load.error, load.values.into_keys().next()) {
        (Some(error), _) => Err(error),
        (None, Some(path)) => Err(Error::UnknownLayer { context: "checkpoint".into(), layer: path }),
        (None, None) => Ok(module),
    }
}
