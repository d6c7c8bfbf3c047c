//! Shared parts of the operations' tests: devices, reproducible inputs, and the comparison with a
//! plain composition.

mod blocks;
mod linear;
mod plain;
mod quantized;
#[cfg(any(feature = "wgpu", feature = "vulkan", feature = "metal"))]
mod stored;
mod summed;

use std::sync::OnceLock;

use burn::tensor::{Device, Tensor, TensorData};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Every device that this build has a backend for and this machine offers, without autodiff. Flex
/// comes first.
fn devices() -> &'static [Device] {
    static DEVICES: OnceLock<Vec<Device>> = OnceLock::new();
    DEVICES.get_or_init(|| hosts().into_iter().chain(adapters()).collect())
}

/// The devices that compute with the processor's own `f32`.
fn hosts() -> Vec<Device> {
    vec![
        #[cfg(feature = "flex")]
        Device::flex(),
        #[cfg(feature = "ndarray")]
        Device::ndarray(),
    ]
}

/// The devices that Burn reaches through wgpu. Listing adapters does not open any, so a machine
/// without a GPU only has fewer devices.
#[cfg(any(feature = "wgpu", feature = "vulkan", feature = "metal"))]
fn adapters() -> Vec<Device> {
    let adapters = Device::enumerate(burn::tensor::DeviceType::Wgpu);
    if adapters.is_empty() {
        eprintln!("skipped on wgpu: no adapter");
    }
    adapters.to_vec()
}

#[cfg(not(any(feature = "wgpu", feature = "vulkan", feature = "metal")))]
fn adapters() -> Vec<Device> {
    Vec::new()
}

/// Factor by which a device may be less accurate than the host. Vulkan allows `exp(x)` an error of
/// `3 + 2 |x|` units in the last place, a relative error of about 3e-6 at the `|x| < 12` of these
/// tests, and divisions an error of 2.5 units. On the host all errors are within one unit.
fn slack(device: &Device) -> f32 {
    if hosts().contains(&device.clone().without_autodiff()) {
        1.0
    } else {
        10.0
    }
}

/// Reproducible inputs, drawn on the host: the same on every device.
struct Random(ChaCha8Rng);

impl Random {
    fn new(seed: u64) -> Self {
        Self(ChaCha8Rng::seed_from_u64(seed))
    }

    fn values(&mut self, n: usize, size: f32) -> Vec<f32> {
        (0..n).map(|_| self.0.random_range(-size..size)).collect()
    }

    fn tensor<const D: usize>(
        &mut self,
        shape: [usize; D],
        size: f32,
        device: &Device,
    ) -> Tensor<D> {
        let values = self.values(shape.iter().product(), size);
        Tensor::from_data(TensorData::new(values, shape), device)
    }
}

fn values<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data().try_to_vec().unwrap()
}

/// Fails if an element differs by more than `tolerance` times the largest of `want`.
fn close(name: &str, got: &[f32], want: &[f32], tolerance: f32) {
    assert_eq!(got.len(), want.len(), "{name}: length");
    let size = want.iter().fold(1e-2_f32, |size, x| size.max(x.abs()));
    for (index, (got, want)) in got.iter().zip(want).enumerate() {
        assert!(
            (got - want).abs() <= tolerance * size,
            "{name}[{index}]: {got} instead of {want}, of at most {size}"
        );
    }
}

/// [`compare_all`] for a fixed number of inputs.
fn compare<const D: usize, const R: usize, const N: usize>(
    name: &str,
    inputs: [Tensor<D>; N],
    fused: impl Fn([Tensor<D>; N]) -> Tensor<R>,
    plain: impl Fn([Tensor<D>; N]) -> Tensor<R>,
) {
    let array = |inputs: Vec<Tensor<D>>| <[Tensor<D>; N]>::try_from(inputs).unwrap();
    compare_all(
        name,
        inputs.to_vec(),
        |inputs| fused(array(inputs)),
        |inputs| plain(array(inputs)),
    );
}

/// Runs `fused` and `plain` on the same tracked inputs of any shapes, with the same weighted sum,
/// on the inputs' device. Compares results and all gradients, and also compares the gradients with
/// finite differences.
fn compare_all<const D: usize, const R: usize>(
    name: &str,
    inputs: Vec<Tensor<D>>,
    fused: impl Fn(Vec<Tensor<D>>) -> Tensor<R>,
    plain: impl Fn(Vec<Tensor<D>>) -> Tensor<R>,
) {
    let device = inputs[0].device().without_autodiff();
    let (tape, slack) = (device.clone().autodiff(), slack(&device));
    let name = format!("{name} on {device:?}");
    let run = |op: &dyn Fn(Vec<Tensor<D>>) -> Tensor<R>| {
        let tracked: Vec<Tensor<D>> = inputs
            .iter()
            .map(|input| Tensor::from_data(input.to_data(), &tape).require_grad())
            .collect();
        let result = op(tracked.clone());
        let weights = Random::new(7).tensor(result.dims(), 1.0, &tape);
        let gradients = (result.clone() * weights).sum().backward();
        let gradients: Vec<_> = tracked
            .iter()
            .map(|input| values(input.grad(&gradients).unwrap()))
            .collect();
        (values(result.inner()), gradients)
    };
    let ((got, got_gradients), (want, want_gradients)) = (run(&fused), run(&plain));
    close(&name, &got, &want, 2e-6 * slack);
    for (index, (got, want)) in got_gradients.iter().zip(&want_gradients).enumerate() {
        close(
            &format!("{name}, gradient {index}"),
            got,
            want,
            5e-6 * slack,
        );
    }
    // The kernels without autodiff, and the portable definitions under autodiff with constant
    // inputs.
    close(
        &format!("{name}, untracked"),
        &values(fused(inputs.clone())),
        &want,
        2e-6 * slack,
    );
    let loss = |inputs: Vec<Tensor<D>>| {
        let result = values(fused(inputs));
        let weights = Random::new(7).values(result.len(), 1.0);
        result
            .iter()
            .zip(weights)
            .map(|(x, weight)| f64::from(*x) * f64::from(weight))
            .sum::<f64>()
    };
    for (index, gradient) in got_gradients.iter().enumerate() {
        let n = gradient.len();
        let size = gradient.iter().fold(1e-2_f32, |size, x| size.max(x.abs()));
        for element in [0, n / 2, n - 1] {
            let moved = |by: f32| {
                let mut moved = inputs.clone();
                let mut data = values(moved[index].clone());
                data[element] += by;
                moved[index] =
                    Tensor::from_data(TensorData::new(data, moved[index].dims()), &device);
                loss(moved)
            };
            let slope = ((moved(1e-2) - moved(-1e-2)) / 2e-2) as f32;
            let got = gradient[element];
            assert!(
                (slope - got).abs() < 0.02 * size,
                "{name}, gradient {index}[{element}]: {got}, measured {slope}"
            );
        }
    }
}
