//! Products with a stored weight on the host, by the kernels for stored weights.

use std::sync::OnceLock;

use burn::backend::tensor::FloatTensor;
use burn::backend::{Backend, TensorMetadata};
use burn::tensor::{DType, TensorData, try_read_sync};

#[cfg(feature = "ndarray")]
use super::extension::DecoderOps;
use super::terms::{Weight, stored_rows};
use crate::format::StoredMatrix;
use crate::kernels::{Activations, Linear, Pool, Rows, RowsMut, Scratch, forward, scratch_bytes};

/// A pool with as many threads as the backend uses.
fn pool() -> &'static Pool {
    static POOL: OnceLock<Pool> = OnceLock::new();
    POOL.get_or_init(|| Pool::new(rayon::current_num_threads()))
}

/// `x W^T`, row-major `[rows, out]`, for `x` `[rows, in]`; `None` if the shapes do not match.
fn multiply(weight: &StoredMatrix, x: &[f32], rows: usize) -> Option<Vec<f32>> {
    let (inputs, outputs) = (weight.cols(), weight.rows());
    let layer = [Linear {
        weight,
        outputs,
        bias: None,
        adapter: None,
    }];
    let mut y = vec![0.0; rows * outputs];
    let mut scratch = vec![0; scratch_bytes(pool(), &layer, rows, inputs, Activations::default())];
    let x = Rows {
        values: x,
        rows,
        stride: inputs,
    };
    let mut out = [RowsMut {
        values: &mut y,
        rows,
        stride: outputs,
    }];
    forward(
        pool(),
        &layer,
        x,
        inputs,
        &mut out,
        Activations::default(),
        &mut Scratch::new(&mut scratch),
    )
    .ok()?;
    Some(y)
}

/// `x W` for a stored weight and a few rows of `x`.
pub(super) fn few<B: Backend>(x: &FloatTensor<B>, weight: &Weight<B>) -> Option<FloatTensor<B>> {
    let Weight::Stored(weight) = weight else {
        return None;
    };
    let rows = stored_rows(x.shape().num_elements(), weight).filter(|_| x.dtype() == DType::F32)?;
    let data = try_read_sync(B::float_into_data(x.clone()))?.ok()?;
    let y = multiply(weight.matrix(), data.as_slice().ok()?, rows)?;
    let mut shape = x.shape();
    let last = shape.num_dims() - 1;
    shape[last] = weight.dims()[1];
    Some(B::float_from_data(TensorData::new(y, shape), &x.device()))
}

#[cfg(feature = "ndarray")]
impl DecoderOps for burn::backend::NdArray {
    fn mixed_linear(x: FloatTensor<Self>, weight: Weight<Self>) -> FloatTensor<Self> {
        few::<Self>(&x, &weight).unwrap_or_else(|| {
            let weight = weight.dense(&x);
            super::portable::linear::<Self>(x, weight)
        })
    }
}
