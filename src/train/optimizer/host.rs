//! Access to tensors whose elements are in this process's memory.

use burn::tensor::{Device, Tensor};

#[cfg(feature = "flex")]
pub(super) fn lies_on_host(device: &Device) -> bool {
    device.clone().without_autodiff() == Device::flex()
}

#[cfg(not(feature = "flex"))]
pub(super) fn lies_on_host(_: &Device) -> bool {
    false
}

/// Calls `f` with a tensor's elements, which it may change. On Flex, nothing is copied if the
/// tensor is not shared.
pub(super) fn on_host<R>(tensor: Tensor<1>, f: impl FnOnce(&mut [f32]) -> R) -> (Tensor<1>, R) {
    let device = tensor.device();
    let mut data = tensor.into_data();
    let result = f(data
        .as_mut_slice()
        .expect("weights, gradients and moments are f32"));
    (Tensor::from_data(data, &device), result)
}
