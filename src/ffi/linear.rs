//! One linear layer on the caller's buffers.

use std::ffi::c_void;
use std::sync::Arc;

use half::{bf16, f16};

use super::guard;
use super::memory::{self, Out};
use super::model::{elora_model, reserved};
use super::options::{self, Growing};
use super::session::{ELORA_ACTIVATIONS_INT16, activations, elora_activations};
use super::status::{ELORA_STATUS_INSUFFICIENT_SIZE, Failure, Outcome, elora_status};
use crate::runtime::{LinearLayer, Number};

/// A linear layer of a model, with the rank and sizes of one subnet. Immutable and
/// reference-counted: any number of threads may use it at once. It keeps alive what it needs of the
/// model.
pub struct elora_linear {
    inner: LinearLayer,
}

/// Type of the elements of a buffer; one of the ELORA_DTYPE_ constants.
pub type elora_dtype = i32;

/// 32-bit float.
pub const ELORA_DTYPE_F32: elora_dtype = 0;
/// IEEE 754 half precision, 16 bits.
pub const ELORA_DTYPE_F16: elora_dtype = 1;
/// bfloat16, 16 bits.
pub const ELORA_DTYPE_BF16: elora_dtype = 2;

/// Options of a linear layer. Initialize them with elora_linear_options_init(), then set fields.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct elora_linear_options {
    /// sizeof(elora_linear_options); elora_linear_options_init() sets it.
    pub struct_size: usize,
    /// Precision of the activations: an ELORA_ACTIVATIONS_ constant. Default:
    /// ELORA_ACTIVATIONS_INT16.
    pub activations: elora_activations,
    /// Must be 0.
    pub reserved: u32,
}

// SAFETY: `repr(C)` integers, the first of which is the size; no padding.
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

/// Sets every field of `*options` to its default. `struct_size` is sizeof(elora_linear_options).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_linear_options_init(
    options: *mut elora_linear_options,
    struct_size: usize,
) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::status(|| unsafe { options::write(options, struct_size, elora_linear_options::DEFAULT) })
}

/// Creates a handle to a linear layer under a subnet, including its adapter.
///
/// `layer` is an index below elora_model_layer_count(); `subnet` is an index below
/// elora_model_subnet_count(), and 0 is the whole model. `options` may be NULL for the defaults. On
/// success `*out` is a new handle; release it with elora_linear_free().
///
/// ELORA_STATUS_INVALID_ARGUMENT if an index is out of range or the subnet leaves the layer out.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_linear_new(
    model: *const elora_model,
    layer: usize,
    subnet: usize,
    options: *const elora_linear_options,
    out: *mut *const elora_linear,
) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
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

/// Adds a reference to a layer and returns the same pointer. Each reference is released with
/// elora_linear_free(). Returns NULL if `linear` is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_linear_retain(linear: *const elora_linear) -> *const elora_linear {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::value(std::ptr::null(), || unsafe {
        memory::shared(linear, "linear").map(Arc::into_raw)
    })
}

/// Releases one reference to a layer. The layer is freed with its last reference. NULL is ignored.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_linear_free(linear: *const elora_linear) {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::quiet(|| unsafe { memory::free(linear) });
}

/// Number of active input features, which is the length of an input row. Returns 0 if `linear` is
/// NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_linear_in_features(linear: *const elora_linear) -> usize {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::value(0, || unsafe {
        Ok(memory::required(linear, "linear")?.inner.d_input())
    })
}

/// Number of active output features, which is the length of an output row. Returns 0 if `linear` is
/// NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_linear_out_features(linear: *const elora_linear) -> usize {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::value(0, || unsafe {
        Ok(memory::required(linear, "linear")?.inner.d_output())
    })
}

/// Active rank of the adapter. Returns 0 if no adapter is active, or if `linear` is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_linear_rank(linear: *const elora_linear) -> usize {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::value(0, || unsafe {
        Ok(memory::required(linear, "linear")?.inner.rank())
    })
}

/// Writes to `*bytes` the size in bytes of the scratch memory that elora_linear_forward() and
/// elora_linear_forward_typed() need for `n_rows` rows of any dtype.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_linear_scratch_size(
    linear: *const elora_linear,
    n_rows: usize,
    bytes: *mut usize,
) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::status(|| unsafe {
        let linear = memory::required(linear, "linear")?;
        let out = Out::required(bytes, "bytes")?;
        out.write(linear.inner.scratch_bytes(n_rows)?);
        Ok(())
    })
}

/// Applies the layer to `n_rows` rows: y = x W^T + s (x A^T) B^T + b. W is the weight, A and B are
/// the active part of the adapter, s is its scale, and b is the bias. The adapter and bias terms
/// are omitted if the layer has none.
///
/// Row i of the input is the in_features elements from x + i * ldx. Row i of the output is the
/// out_features elements from y + i * ldy; elements between the rows of y are not changed. `ldx`
/// and `ldy` count elements and must be at least in_features and out_features. `x_len` and `y_len`
/// are the lengths of the buffers in elements; each buffer must reach at least to the end of its
/// last row. `n_rows` may be 0.
///
/// `scratch` is working memory of `scratch_bytes` bytes, at least elora_linear_scratch_size(), at
/// any alignment. If it is NULL, the library allocates memory for this call and ignores
/// `scratch_bytes`.
///
/// `x`, `y` and `scratch` must not overlap. If the call fails, the contents of the output rows are
/// unspecified. The result does not depend on the number of threads or on concurrent calls.
///
/// ELORA_STATUS_INSUFFICIENT_SIZE if a buffer or `scratch` is too short.
/// ELORA_STATUS_INVALID_ARGUMENT if `ldx` or `ldy` is too small, or if buffers overlap.
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
    // SAFETY: the caller meets the requirements stated in the header.
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

/// Same as elora_linear_forward(), for buffers of another dtype. `x` and `y` point to elements of
/// type `dtype`, an ELORA_DTYPE_ constant; `x_len`, `ldx`, `y_len` and `ldy` count such elements.
/// The layer computes in 32-bit floats and rounds its results to nearest.
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
    // SAFETY: the caller meets the requirements stated in the header.
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

/// Arguments that both forward functions share.
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
    /// The caller meets the requirements stated in the header.
    unsafe fn run<T: Number>(self, x: *const T, y: *mut T) -> Outcome {
        // SAFETY: the caller meets the requirements stated in the header, and `disjoint` checks
        // that the buffers do not overlap before slices are made of them.
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

/// Returns the number of elements up to the end of the last row, which the buffer must contain.
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

/// Checks that a layer can be shared between threads.
const _: () = {
    const fn shared<T: Send + Sync>() {}
    shared::<elora_linear>();
};
