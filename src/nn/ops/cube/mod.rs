//! Products with a stored weight on GPUs. The device holds the weight in its compressed format, and
//! the kernel decodes it in registers.
//!
//! This serves decoding, which has few rows and is bound by reading the weight. For products with
//! more rows, and in a backward pass, the same kernel writes the dense weight to device memory for
//! one product. The kernel reads everything as 32-bit words and decodes it with integer arithmetic,
//! since not every device supports bytes or 16-bit numbers.

use std::sync::Arc;

use burn::backend::ops::FloatTensorOps;
use burn::tensor::{Bytes, DType, Shape};
use burn_cubecl::kernel::{cast, into_contiguous};
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{CubeBackend, CubeDevice};
use cubecl::prelude::*;
use cubecl::server::Handle;

use self::kernel::{UNITS, stored_product};
use self::layout::{Form, Layout};
use super::extension::DecoderOps;
use super::portable;
use super::terms::{Weight, stored_rows};
use crate::nn::StoredWeight;

mod fusion;
mod kernel;
mod layout;

/// Maximum number of cubes along the first axis of a launch; WebGPU allows 65535.
const MOST_CUBES: usize = 32_768;

/// A buffer and its number of elements.
struct Words(Handle, usize);

impl Words {
    fn new(client: &Client, values: Vec<u32>) -> Self {
        let len = values.len();
        Self(client.create(Bytes::from_elems(values)), len)
    }

    fn arg(&self) -> BufferArg {
        // SAFETY: `new` created the buffer with exactly `self.1` elements.
        unsafe { BufferArg::from_raw_parts(self.0.clone(), self.1) }
    }
}

/// A weight in device memory.
struct OnDevice {
    form: Form,
    n_groups: u32,
    words: Words,
    mask: Words,
    starts: Words,
    grid: Words,
    groups: Words,
}

impl OnDevice {
    fn new(layout: Layout, client: &Client) -> Self {
        Self {
            form: layout.form,
            n_groups: layout.n_groups as u32,
            words: Words::new(client, layout.words),
            mask: Words::new(client, layout.mask),
            starts: Words::new(client, layout.starts),
            grid: Words::new(client, layout.grid),
            groups: Words::new(client, layout.groups),
        }
    }
}

/// A device's copy of a [`StoredWeight`]; without a weight if [`Layout::new`] cannot represent it.
struct Copy {
    device: CubeDevice,
    weight: Option<OnDevice>,
}

/// The weight's copy on the device of `x`, created at the first request.
fn copy_beside(x: &CubeTensor, weight: &StoredWeight) -> Arc<Copy> {
    weight.copy(
        |copy: &Copy| copy.device == x.device,
        || Copy {
            device: x.device.clone(),
            weight: Layout::new(weight.matrix()).map(|layout| OnDevice::new(layout, &x.client)),
        },
    )
}

/// Computes `[inputs, d_output]` for a contiguous `x`, `[inputs, d_input]`, in `f32`. If `inputs`
/// is 0, returns the dense weight, `[d_output, d_input]`, and does not read `x`.
fn launch(x: CubeTensor, weight: &StoredWeight, inputs: usize) -> Option<CubeTensor> {
    let client = x.client.clone();
    if client.properties().hardware.max_units_per_cube < UNITS as u32 {
        return None;
    }
    let copy = copy_beside(&x, weight);
    let held = copy.weight.as_ref()?;
    let [cols, rows] = weight.dims();
    let shape = if inputs == 0 {
        [rows, cols]
    } else {
        [inputs, rows]
    };
    let y = empty_device_contiguous_dtype(
        client.clone(),
        x.device.clone(),
        Shape::from(shape),
        DType::F32,
    );
    let cubes = [rows.min(MOST_CUBES), rows.div_ceil(MOST_CUBES)].map(|count| count as u32);
    // SAFETY: `Layout::new` checked the weight's arrays, so that every index that the kernel
    // derives from them and from these sizes is in bounds. `x` has `inputs * cols` elements, and
    // `y` was allocated with `shape` above.
    unsafe {
        stored_product::launch_unchecked(
            &client,
            CubeCount::Static(cubes[0], cubes[1], 1),
            CubeDim::new_1d(UNITS as u32),
            x.into_buffer_arg(),
            held.words.arg(),
            held.mask.arg(),
            held.starts.arg(),
            held.grid.arg(),
            held.groups.arg(),
            y.clone().into_buffer_arg(),
            rows as u32,
            cols as u32,
            held.n_groups,
            held.form,
            inputs,
        );
    }
    Some(y)
}

/// Computes `x W` for a few rows of `x`. Returns `None`, with nothing computed, if there are more
/// rows or if [`Layout::new`] cannot represent the weight.
fn few(x: &CubeTensor, weight: &StoredWeight) -> Option<CubeTensor> {
    let mut shape = x.meta.shape().to_vec();
    let inputs = stored_rows(shape.iter().product(), weight)?;
    let dtype = x.dtype;
    let x = if dtype == DType::F32 {
        x.clone()
    } else {
        cast(x.clone(), DType::F32)
    };
    let y = launch(into_contiguous(x), weight, inputs)?;
    *shape.last_mut()? = weight.dims()[1];
    let y = CubeBackend::float_reshape(y, Shape::from(shape));
    Some(if dtype == DType::F32 {
        y
    } else {
        cast(y, dtype)
    })
}

impl DecoderOps for CubeBackend {
    fn stored_dense(beside: CubeTensor, weight: StoredWeight) -> CubeTensor {
        let usable = beside.dtype == DType::F32 && beside.meta.shape().num_elements() > 0;
        let dense = if usable {
            launch(into_contiguous(beside.clone()), &weight, 0)
        } else {
            None
        };
        match dense {
            Some(dense) => Self::float_swap_dims(dense, 0, 1),
            None => portable::unpacked::<Self>(&weight, &beside),
        }
    }

    fn mixed_linear(x: CubeTensor, weight: Weight<Self>) -> CubeTensor {
        if let Weight::Stored(stored) = &weight
            && let Some(y) = few(&x, stored)
        {
            return y;
        }
        let weight = weight.dense(&x);
        portable::linear::<Self>(x, weight)
    }
}
