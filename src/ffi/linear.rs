//! One linear layer on the caller's buffers.

use std::ffi::c_void;
use std::sync::Arc;

use half::{bf16, f16};

use super::guard;
use super::memory::{self, Out};
use super::model::{elora_model, reserved};
use super::options::{self, Growing};
use super::status::{ELORA_STATUS_INSUFFICIENT_SIZE, Failure, Outcome, elora_status};
use crate::kernels::Activations;
use crate::runtime::{LinearLayer, Number};

/// A linear layer of a model with a subnet's rank and sizes. Immutable and reference-counted: any number of threads
/// may use it at once. It keeps what it needs of the model.
pub struct elora_linear {
    inner: LinearLayer,
}

/// How exactly the inputs of weights with codes are kept while they are multiplied.
pub type elora_activations = i32;

/// As 16-bit integers with a scale for each 128: as good as 32-bit numbers.
pub const ELORA_ACTIVATIONS_INT16: elora_activations = 0;
/// As 8-bit integers with a scale for each 128: less work, and an error that can be seen.
pub const ELORA_ACTIVATIONS_INT8: elora_activations = 1;

pub(super) fn activations(value: elora_activations) -> Outcome<Activations> {
    match value {
        ELORA_ACTIVATIONS_INT16 => Ok(Activations::Int16),
        ELORA_ACTIVATIONS_INT8 => Ok(Activations::Int8),
        other => Err(Failure::argument(format!(
            "activations = {other}: no ELORA_ACTIVATIONS_ constant"
        ))),
    }
}

/// Type of the numbers in a buffer.
pub type elora_dtype = i32;

/// 32 bits.
pub const ELORA_DTYPE_F32: elora_dtype = 0;
/// IEEE 754 half precision.
pub const ELORA_DTYPE_F16: elora_dtype = 1;
/// bfloat16.
pub const ELORA_DTYPE_BF16: elora_dtype = 2;

/// How a layer is applied. Fill it by elora_linear_options_init(), then set fields.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct elora_linear_options {
    /// sizeof(elora_linear_options), set by elora_linear_options_init().
    pub struct_size: usize,
    /// An ELORA_ACTIVATIONS_ constant.
    pub activations: elora_activations,
    /// 0.
    pub reserved: u32,
}

// SAFETY: integers, the first of which is the size; no padding.
unsafe impl Growing for elora_linear_options {
    const NAME: &'static str = "elora_linear_options";
}

impl elora_linear_options {
    const DEFAULT: Self = Self {
        struct_size: size_of::<Self>(),
        activations: ELORA_ACTIVATIONS_INT16,
        reserved: 0,
    };
}

/// Sets every field to its default. `struct_size` is sizeof(elora_linear_options).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_linear_options_init(
    options: *mut elora_linear_options,
    struct_size: usize,
) -> elora_status {
    // SAFETY: as the header asks of the caller.
    guard::status(|| unsafe { options::write(options, struct_size, elora_linear_options::DEFAULT) })
}

/// Makes a handle to layer `layer` as subnet `subnet` has it, with its adapter. `options` may be NULL for the
/// defaults. On success `*out` is a handle that elora_linear_free() gives back. ELORA_STATUS_INVALID_ARGUMENT for a
/// layer that the subnet leaves out.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_linear_new(
    model: *const elora_model,
    layer: usize,
    subnet: usize,
    options: *const elora_linear_options,
    out: *mut *const elora_linear,
) -> elora_status {
    // SAFETY: as the header asks of the caller.
    guard::status(|| unsafe {
        let model = memory::required(model, "model")?;
        let options = options::read(options, elora_linear_options::DEFAULT)?;
        let activations = activations(options.activations)?;
        reserved(options.reserved)?;
        let out = Out::required(out, "out")?;
        let inner = model
            .inner()
            .linear(layer, subnet)?
            .with_activations(activations);
        out.write(Arc::into_raw(Arc::new(elora_linear { inner })));
        Ok(())
    })
}

/// One more handle to the same layer: the same pointer, to be given back once more. NULL for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_linear_retain(linear: *const elora_linear) -> *const elora_linear {
    // SAFETY: as the header asks of the caller.
    guard::value(std::ptr::null(), || unsafe {
        memory::shared(linear, "linear").map(Arc::into_raw)
    })
}

/// Gives a handle back; NULL is ignored.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_linear_free(linear: *const elora_linear) {
    // SAFETY: as the header asks of the caller.
    guard::quiet(|| unsafe { memory::free(linear) });
}

/// Numbers in a row of the input that are active. 0 for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_linear_in_features(linear: *const elora_linear) -> usize {
    // SAFETY: as the header asks of the caller.
    guard::value(0, || unsafe {
        Ok(memory::required(linear, "linear")?.inner.d_input())
    })
}

/// Numbers in a row of the output that are active. 0 for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_linear_out_features(linear: *const elora_linear) -> usize {
    // SAFETY: as the header asks of the caller.
    guard::value(0, || unsafe {
        Ok(memory::required(linear, "linear")?.inner.d_output())
    })
}

/// Active rank of the adapter; 0 where none acts, and for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_linear_rank(linear: *const elora_linear) -> usize {
    // SAFETY: as the header asks of the caller.
    guard::value(0, || unsafe {
        Ok(memory::required(linear, "linear")?.inner.rank())
    })
}

/// Writes the bytes of scratch memory that `n_rows` rows of any type need to `*bytes`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_linear_scratch_size(
    linear: *const elora_linear,
    n_rows: usize,
    bytes: *mut usize,
) -> elora_status {
    // SAFETY: as the header asks of the caller.
    guard::status(|| unsafe {
        let linear = memory::required(linear, "linear")?;
        let out = Out::required(bytes, "bytes")?;
        out.write(linear.inner.scratch_bytes(n_rows)?);
        Ok(())
    })
}

/// y = x W^T + s (x A^T) B^T + b, for `n_rows` rows: W is the layer's weight, A and B the active part of its adapter,
/// s the adapter's scale, b the bias, where there is one.
///
/// Row i of the input is the in_features numbers from x + i * ldx, row i of the output the out_features numbers from
/// y + i * ldy; what lies between rows of y is left alone. `x_len` and `y_len` are the numbers that the buffers hold,
/// of which those up to the end of the last row are needed.
///
/// `scratch` is `scratch_bytes` bytes at any address, elora_linear_scratch_size() of them at least; where it is NULL,
/// the library allocates what it needs. `x`, `y` and `scratch` must not overlap. `y` is unspecified unless the call
/// succeeds. The result does not depend on the number of threads, nor on what other threads do.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_linear_forward(
    linear: *const elora_linear,
    n_rows: usize,
    x: *const f32,
    x_len: usize,
    ldx: usize,
    y: *mut f32,
    y_len: usize,
    ldy: usize,
    scratch: *mut c_void,
    scratch_bytes: usize,
) -> elora_status {
    // SAFETY: as the header asks of the caller.
    guard::status(|| unsafe {
        let call = Call {
            linear,
            n_rows,
            x_len,
            ldx,
            y_len,
            ldy,
            scratch,
            scratch_bytes,
        };
        call.run(x, y)
    })
}

/// elora_linear_forward() for buffers of another type: `x` and `y` hold numbers of `dtype`, an ELORA_DTYPE_ constant.
/// The layer computes with 32 bits and rounds its results to nearest.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_linear_forward_typed(
    linear: *const elora_linear,
    n_rows: usize,
    dtype: elora_dtype,
    x: *const c_void,
    x_len: usize,
    ldx: usize,
    y: *mut c_void,
    y_len: usize,
    ldy: usize,
    scratch: *mut c_void,
    scratch_bytes: usize,
) -> elora_status {
    // SAFETY: as the header asks of the caller.
    guard::status(|| unsafe {
        let call = Call {
            linear,
            n_rows,
            x_len,
            ldx,
            y_len,
            ldy,
            scratch,
            scratch_bytes,
        };
        match dtype {
            ELORA_DTYPE_F32 => call.run(x.cast::<f32>(), y.cast::<f32>()),
            ELORA_DTYPE_F16 => call.run(x.cast::<f16>(), y.cast::<f16>()),
            ELORA_DTYPE_BF16 => call.run(x.cast::<bf16>(), y.cast::<bf16>()),
            other => Err(Failure::argument(format!(
                "dtype = {other}: no ELORA_DTYPE_ constant"
            ))),
        }
    })
}

/// What both ways of applying a layer share.
struct Call {
    linear: *const elora_linear,
    n_rows: usize,
    x_len: usize,
    ldx: usize,
    y_len: usize,
    ldy: usize,
    scratch: *mut c_void,
    scratch_bytes: usize,
}

impl Call {
    /// # Safety
    /// As the header asks of the caller.
    unsafe fn run<T: Number>(self, x: *const T, y: *mut T) -> Outcome {
        // SAFETY: as asked of the caller; the buffers are apart before slices are made of them.
        unsafe {
            let linear = &memory::required(self.linear, "linear")?.inner;
            let x_len = rows_len("x", self.n_rows, linear.d_input(), self.ldx, self.x_len)?;
            let y_len = rows_len("y", self.n_rows, linear.d_output(), self.ldy, self.y_len)?;
            let scratch = self.scratch.cast::<u8>();
            let scratch_bytes = if scratch.is_null() {
                0
            } else {
                self.scratch_bytes
            };
            memory::disjoint(&[
                ("x", memory::region(x, x_len)),
                ("y", memory::region(y, y_len)),
                ("scratch", memory::region(scratch, scratch_bytes)),
            ])?;
            if !scratch.is_null() {
                let needed = linear.scratch_bytes(self.n_rows)?;
                if scratch_bytes < needed {
                    let text =
                        format!("`scratch` has {scratch_bytes} bytes, and {needed} are needed");
                    return Err(Failure::new(ELORA_STATUS_INSUFFICIENT_SIZE, text));
                }
            }
            let x = memory::slice(x, x_len, "x")?;
            let y = memory::slice_mut(y, y_len, "y")?;
            let scratch = match scratch.is_null() {
                true => None,
                false => Some(memory::slice_mut(scratch, scratch_bytes, "scratch")?),
            };
            Ok(linear.forward(self.n_rows, x, self.ldx, y, self.ldy, scratch)?)
        }
    }
}

/// Numbers of a buffer up to the end of its last row, which must be there.
fn rows_len(
    name: &str,
    n_rows: usize,
    width: usize,
    stride: usize,
    found: usize,
) -> Outcome<usize> {
    if stride < width {
        let text = format!("ld{name} = {stride}: a row has {width} numbers");
        return Err(Failure::argument(text));
    }
    let Some(before) = n_rows.checked_sub(1) else {
        return Ok(0);
    };
    let needed = before
        .checked_mul(stride)
        .and_then(|len| len.checked_add(width));
    match needed.filter(|needed| *needed <= found) {
        Some(needed) => Ok(needed),
        None => Err(memory::short(name, found, needed.unwrap_or(usize::MAX))),
    }
}

/// A layer is shared by threads.
const _: () = {
    const fn shared<T: Send + Sync>() {}
    shared::<elora_linear>();
};
