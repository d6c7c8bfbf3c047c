//! Products with a stored weight on GPUs: it stays as it is stored, and is widened in registers.
//!
//! A cube computes one output of one row: its units take 32 columns in turn, and their sums meet in shared memory. That serves
//! decoding, which has few rows and is bound by reading the weight; with more rows the weight is unpacked once, and the product
//! is dense.

use std::any::Any;
use std::fmt;
use std::sync::{Arc, Mutex};

use burn::tensor::{DType, Shape};
use burn_cubecl::CubeDevice;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::empty_device_dtype;
use burn_cubecl::tensor::CubeTensor;
use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;

use self::layout::{Elements, Layout};
use super::{StoredWeight, stored_rows};

mod layout;

/// Most cubes of a launch along one axis, as WebGPU has it.
const MOST_CUBES: usize = 65_535;
/// Units of a cube; a power of two.
const UNITS: usize = 32;
/// Columns that a unit takes at a time: one word of a mask.
const COLUMNS: usize = 32;

/// What the kernel is compiled for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Form {
    elements: Elements,
    sparse: bool,
}

/// A weight in a device's memory.
struct OnDevice {
    device: CubeDevice,
    form: Form,
    n_groups: u32,
    words: Array,
    mask: Array,
    starts: Array,
    scales: Array,
    zeros: Array,
    groups: Array,
}

/// A buffer and the number of its elements.
struct Array(Handle, usize);

impl Array {
    fn new<T: bytemuck::NoUninit>(client: &Client, values: &[T]) -> Self {
        Self(client.create_from_slice(bytemuck::cast_slice(values)), values.len())
    }

    fn arg(&self) -> BufferArg {
        // SAFETY: the buffer was made of so many elements.
        unsafe { BufferArg::from_raw_parts(self.0.clone(), self.1) }
    }
}

impl OnDevice {
    fn new(layout: &Layout, device: &CubeDevice, client: &Client) -> Self {
        Self {
            device: device.clone(),
            form: Form { elements: layout.elements, sparse: layout.sparse },
            n_groups: layout.n_groups as u32,
            words: Array::new(client, &layout.words),
            mask: Array::new(client, &layout.mask),
            starts: Array::new(client, &layout.starts),
            scales: Array::new(client, &layout.scales),
            zeros: Array::new(client, &layout.zeros),
            groups: Array::new(client, &layout.groups),
        }
    }
}

/// The copies of a weight that devices hold, made when first used.
#[derive(Default)]
pub(in crate::nn) struct Copies(Mutex<Vec<Option<Arc<OnDevice>>>>);

impl fmt::Debug for Copies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Copies")
    }
}

impl Copies {
    /// None for a weight that has no such form.
    fn on(&self, weight: &StoredWeight, x: &CubeTensor) -> Option<Arc<OnDevice>> {
        let mut copies = self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(copy) = copies.iter().find(|copy| copy.as_ref().is_none_or(|copy| copy.device == x.device)) {
            return copy.clone();
        }
        let copy = Layout::new(weight.matrix()).map(|layout| Arc::new(OnDevice::new(&layout, &x.device, &x.client)));
        copies.push(copy.clone());
        copy
    }
}

/// `x W` for a few rows of `x`; none, with nothing done, where there are more rows, or another kind of tensor or weight than the kernel
/// has.
pub(super) fn stored_linear<T: Clone + 'static>(x: &T, weight: &StoredWeight) -> Option<T> {
    // With Burn's fusion, which another crate of the build may turn on, the backend's tensors are promises of it.
    let x = (x as &dyn Any).downcast_ref::<CubeTensor>()?;
    let shape = x.meta.shape().to_vec();
    let [d_input, d_output] = weight.dims();
    let rows = stored_rows(shape.iter().product(), weight)?;
    if x.dtype != DType::F32 || d_output == 0 || d_output > MOST_CUBES {
        return None;
    }
    let held = weight.copies().on(weight, x)?;
    let x = into_contiguous(x.clone());
    let mut shape = shape;
    *shape.last_mut()? = d_output;
    let y = empty_device_dtype(x.client.clone(), x.device.clone(), Shape::from(shape), DType::F32);
    let client = x.client.clone();
    // SAFETY: buffers have the elements that the layout's sizes say; each cube writes its own output.
    unsafe {
        product::launch_unchecked(
            &client,
            CubeCount::Static(d_output as u32, rows as u32, 1),
            CubeDim::new_1d(UNITS as u32),
            x.into_buffer_arg(),
            held.words.arg(),
            held.mask.arg(),
            held.starts.arg(),
            held.scales.arg(),
            held.zeros.arg(),
            held.groups.arg(),
            y.clone().into_buffer_arg(),
            d_input as u32,
            d_output as u32,
            held.n_groups,
            held.form,
        );
    }
    (&y as &dyn Any).downcast_ref::<T>().cloned()
}

/// Element `index` of those that lie in `words` one after the other, of `bits` bits each.
#[cube]
fn element(words: &[u32], index: usize, #[comptime] bits: usize) -> u32 {
    // In two steps, so that a large weight's bits need not be counted in 32 bits.
    let word = index / 32 * bits + index % 32 * bits / 32;
    let shift = u32::cast_from(index % 32 * bits % 32);
    let mut value = words[word] >> shift;
    if comptime!(32 % bits != 0) {
        if shift + comptime!(bits as u32) > 32 {
            value |= words[word + 1] << (32 - shift);
        }
    }
    value & comptime!(u32::MAX >> (32 - bits))
}

/// An IEEE 754 half as `f32`. What is stored is finite.
#[cube]
fn half_value(half: u32) -> f32 {
    let exponent = (half >> 10) & 31;
    let mantissa = half & 1023;
    let mut size = f32::cast_from(mantissa) * 5.960_464_5e-8;
    if exponent != 0 {
        size = f32::reinterpret(((exponent + 112) << 23) | (mantissa << 13));
    }
    if half >= 0x8000 { -size } else { size }
}

/// A stored 16-bit number as `f32`.
#[cube]
fn number(bits: u32, #[comptime] elements: Elements) -> f32 {
    match elements {
        Elements::Bf16 => f32::reinterpret(bits << 16),
        _ => half_value(bits),
    }
}

/// `y = x W^T`. Cube `(row of W, row of x)`.
#[cube(launch_unchecked)]
fn product(
    x: &[f32],
    words: &[u32],
    mask: &[u32],
    starts: &[u32],
    scales: &[f32],
    zeros: &[f32],
    groups: &[u32],
    y: &mut [f32],
    cols: u32,
    rows: u32,
    n_groups: u32,
    #[comptime] form: Form,
) {
    let (row, input) = (CUBE_POS_X as usize, CUBE_POS_Y as usize);
    let (cols, rows, n_groups) = (cols as usize, rows as usize, n_groups as usize);
    let blocks = cols.div_ceil(COLUMNS);
    let x_row = input * cols;
    let unit = UNIT_POS_X as usize;
    let mut sum = 0.0f32;
    let mut block = unit;
    while block < blocks {
        let first = block * COLUMNS;
        let mut bits = u32::MAX.runtime();
        let mut next = (row * blocks + block) * COLUMNS;
        if comptime!(form.sparse) {
            bits = mask[row * blocks + block];
            next = starts[row * blocks + block] as usize;
        }
        for column in 0..COLUMNS {
            let at = first + column;
            if at < cols && (bits >> column as u32) & 1 == 1 {
                let stored = element(words, next, comptime!(form.elements.bits()));
                next += 1;
                let weight = if comptime!(form.elements.is_code()) {
                    let group = row * n_groups + groups[at] as usize;
                    scales[group] * (f32::cast_from(stored) - zeros[group])
                } else {
                    number(stored, form.elements)
                };
                sum += weight * x[x_row + at];
            }
        }
        block += UNITS;
    }
    let mut sums = Shared::<[f32]>::new_slice(UNITS);
    sums[unit] = sum;
    let mut half = comptime!(UNITS / 2).runtime();
    while half > 0 {
        sync_cube();
        if unit < half {
            sums[unit] = sums[unit] + sums[unit + half];
        }
        half /= 2;
    }
    if unit == 0 {
        y[input * rows + row] = sums[0];
    }
}
