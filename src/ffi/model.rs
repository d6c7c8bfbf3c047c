//! Models: loading, listing, saving, and extraction of subnets.

use std::ffi::{CString, c_char, c_void};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::guard;
use super::memory::{self, Out};
use super::options::{self, Growing};
use super::status::{
    ELORA_STATUS_INVALID_FORMAT, ELORA_STATUS_NOT_FOUND, Failure, Outcome, elora_status,
};
use crate::format::WeightFormat;
use crate::progress::{Progress, Task};
use crate::runtime::{Model, ModelOptions, Verify};

/// Id of a token, from 0 to elora_model_vocab_size() - 1.
pub type elora_token = i32;

/// A model: weights, adapters, subnets and tokenizer. Immutable and reference-counted: any number
/// of threads may use it at once.
pub struct elora_model {
    inner: Model,
    layers: Vec<CString>,
    subnets: Vec<CString>,
}

/// When the checksums in a bundle are verified; one of the ELORA_VERIFY_ constants. In every mode,
/// indices stored in a weight are bounds-checked before its first use, so a corrupt file cannot
/// cause out-of-bounds access.
pub type elora_verify = i32;

/// Each weight is verified when it is first used, so loading reads no weights.
pub const ELORA_VERIFY_ON_USE: elora_verify = 0;
/// All weights are verified when the model is loaded.
pub const ELORA_VERIFY_ON_LOAD: elora_verify = 1;
/// Checksums are not verified. Bounds are checked in this mode too.
pub const ELORA_VERIFY_NEVER: elora_verify = 2;

/// Options for loading a model. Initialize them with elora_model_options_init(), then set fields.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct elora_model_options {
    /// sizeof(elora_model_options); elora_model_options_init() sets it.
    pub struct_size: usize,
    /// Number of threads that work on one call, including the calling thread; at most 4096. 0 uses
    /// one per core. If several calls run at the same time, one of them uses the additional threads
    /// and the others run on their calling threads alone. Default: 0.
    pub n_threads: u32,
    /// If not 0, files are memory-mapped, and must not change as long as the model is alive. If 0,
    /// files are read into memory. Default: 1.
    pub use_mmap: u32,
    /// When checksums are verified: an ELORA_VERIFY_ constant. Default: ELORA_VERIFY_ON_USE.
    pub verify: elora_verify,
    /// Must be 0.
    pub reserved: u32,
    /// Is called for each layer that is loaded; NULL for none. Default: NULL.
    pub progress: elora_progress_fn,
    /// Is passed to progress. Default: NULL.
    pub progress_userdata: *mut c_void,
}

/// Callback that reports progress: `done` of `total` steps are done. `userdata` is the pointer that
/// was given with the callback. Return false to stop the work, which then returns
/// ELORA_STATUS_CANCELLED. The callback runs on the thread that called the function.
pub type elora_progress_fn =
    Option<unsafe extern "C" fn(userdata: *mut c_void, done: usize, total: usize) -> bool>;

/// The caller's callback.
pub(super) struct Reporter {
    call: elora_progress_fn,
    userdata: *mut c_void,
    stopped: AtomicBool,
}

// SAFETY: models are loaded by the calling thread, which alone reports progress.
unsafe impl Sync for Reporter {}

impl Progress for Reporter {
    fn step(&self, task: &Task<'_>, _note: &str) {
        let Some(call) = self.call else {
            return;
        };
        // SAFETY: the header requires the callback and its data to be valid during the call.
        if !unsafe { call(self.userdata, task.done(), task.total()) } {
            self.stopped.store(true, Ordering::Relaxed);
        }
    }

    fn is_interrupted(&self) -> bool {
        self.stopped.load(Ordering::Relaxed)
    }
}

// SAFETY: `repr(C)` integers and pointers, the first of which is the size; no padding. A pointer to
// a function may have any bits, because the header requires it to be valid or NULL.
unsafe impl Growing for elora_model_options {
    const NAME: &'static str = "elora_model_options";
}

impl elora_model_options {
    const DEFAULT: Self = Self {
        struct_size: size_of::<Self>(),
        n_threads: 0,
        use_mmap: 1,
        verify: ELORA_VERIFY_ON_USE,
        reserved: 0,
        progress: None,
        progress_userdata: std::ptr::null_mut(),
    };

    /// Reads the caller's options.
    ///
    /// # Safety
    /// As for [`options::read`].
    pub(super) unsafe fn read(options: *const Self) -> Outcome<(ModelOptions, Reporter)> {
        // SAFETY: the caller meets the requirements.
        let options = unsafe { options::read(options, Self::DEFAULT)? };
        let progress = Reporter {
            call: options.progress,
            userdata: options.progress_userdata,
            stopped: AtomicBool::new(false),
        };
        Ok((options.parse()?, progress))
    }

    fn parse(self) -> Outcome<ModelOptions> {
        let verify = match self.verify {
            ELORA_VERIFY_ON_USE => Verify::OnUse,
            ELORA_VERIFY_ON_LOAD => Verify::OnOpen,
            ELORA_VERIFY_NEVER => Verify::Never,
            other => {
                return Err(Failure::argument(format!(
                    "verify = {other}: no ELORA_VERIFY_ constant"
                )));
            }
        };
        reserved(self.reserved)?;
        // Each thread takes a stack, and a number above this limit is a mistake.
        if self.n_threads > 4096 {
            return Err(Failure::argument(format!(
                "n_threads = {}: at most 4096",
                self.n_threads
            )));
        }
        let options = ModelOptions::default().with_n_threads(self.n_threads as usize);
        Ok(options.with_mmap(self.use_mmap != 0).with_verify(verify))
    }
}

/// Refuses other values than 0, so that a later version can give the field a meaning.
pub(super) fn reserved(value: u32) -> Outcome {
    if value == 0 {
        Ok(())
    } else {
        Err(Failure::argument(format!("reserved = {value}: must be 0")))
    }
}

/// Storage format of a weight; one of the ELORA_WEIGHT_FORMAT_ constants.
pub type elora_weight_format = i32;

/// Dense, 32-bit floats.
pub const ELORA_WEIGHT_FORMAT_F32: elora_weight_format = 0;
/// Dense, IEEE 754 half precision.
pub const ELORA_WEIGHT_FORMAT_F16: elora_weight_format = 1;
/// Dense, bfloat16.
pub const ELORA_WEIGHT_FORMAT_BF16: elora_weight_format = 2;
/// Dense integers of a few bits, with one scale for each group of columns.
pub const ELORA_WEIGHT_FORMAT_INT: elora_weight_format = 3;
/// Sparse: a bitmask of the nonzero weights, and their values in half precision.
pub const ELORA_WEIGHT_FORMAT_SPARSE_F16: elora_weight_format = 4;
/// Sparse: a bitmask of the nonzero weights, and their values in bfloat16.
pub const ELORA_WEIGHT_FORMAT_SPARSE_BF16: elora_weight_format = 5;
/// Sparse: a bitmask of the nonzero weights, and their values as 4-bit integers, with one scale for
/// each group of columns.
pub const ELORA_WEIGHT_FORMAT_SPARSE_INT: elora_weight_format = 6;
/// N:M sparse, with at most N nonzero weights in each group of M: a bitmask of the nonzero weights,
/// and their values in half precision.
pub const ELORA_WEIGHT_FORMAT_NM_F16: elora_weight_format = 7;
/// N:M sparse, with at most N nonzero weights in each group of M: a bitmask of the nonzero weights,
/// and their values in bfloat16.
pub const ELORA_WEIGHT_FORMAT_NM_BF16: elora_weight_format = 8;
/// A format that this version of the header has no constant for.
pub const ELORA_WEIGHT_FORMAT_OTHER: elora_weight_format = 1000;

/// Returns a format's constant, the bits of a stored weight, and the columns that share a scale.
fn format_parts(format: WeightFormat) -> (elora_weight_format, u32, usize) {
    match format {
        WeightFormat::F32 => (ELORA_WEIGHT_FORMAT_F32, 32, 0),
        WeightFormat::F16 => (ELORA_WEIGHT_FORMAT_F16, 16, 0),
        WeightFormat::Bf16 => (ELORA_WEIGHT_FORMAT_BF16, 16, 0),
        WeightFormat::Int {
            bits, group_size, ..
        } => (
            ELORA_WEIGHT_FORMAT_INT,
            u32::from(bits),
            group_size.unwrap_or(0),
        ),
        WeightFormat::SparseF16 => (ELORA_WEIGHT_FORMAT_SPARSE_F16, 16, 0),
        WeightFormat::SparseBf16 => (ELORA_WEIGHT_FORMAT_SPARSE_BF16, 16, 0),
        WeightFormat::SparseInt4 { group_size, .. } => {
            (ELORA_WEIGHT_FORMAT_SPARSE_INT, 4, group_size.unwrap_or(0))
        }
        WeightFormat::NmF16 { .. } => (ELORA_WEIGHT_FORMAT_NM_F16, 16, 0),
        WeightFormat::NmBf16 { .. } => (ELORA_WEIGHT_FORMAT_NM_BF16, 16, 0),
        // A format without a constant is reported as such, not as a wrong one.
        #[allow(unreachable_patterns)]
        _ => (ELORA_WEIGHT_FORMAT_OTHER, 0, 0),
    }
}

/// Description of a linear layer of a model, with the sizes of the whole model.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct elora_layer_info {
    /// Set it to sizeof(elora_layer_info) before the call.
    pub struct_size: usize,
    /// Hugging Face's module path, such as "model.layers.0.self_attn.q_proj"; "lm_head" for the
    /// head. The string is valid as long as the model is alive.
    pub name: *const c_char,
    /// Number of input features.
    pub in_features: usize,
    /// Number of output features.
    pub out_features: usize,
    /// Largest rank of the adapter; 0 without an adapter.
    pub max_rank: usize,
    /// Size of the weight in bytes, without the adapter. A head that shares the embedding reports
    /// the embedding's size.
    pub weight_bytes: usize,
    /// Size of the adapter in bytes; 0 without an adapter.
    pub adapter_bytes: usize,
    /// Number of columns (input features) that share a scale, for integer formats. 0 if a row has
    /// one scale, and for formats without scales.
    pub group_size: usize,
    /// Storage format of the weight: an ELORA_WEIGHT_FORMAT_ constant.
    pub format: elora_weight_format,
    /// Bits of a stored weight, such as 4 or 16.
    pub bits: u32,
    /// 1 if the layer has a bias, otherwise 0.
    pub has_bias: u32,
    /// Reserved; 0.
    pub reserved: u32,
}

// SAFETY: `repr(C)` integers and a pointer, the first of which is the size; no padding.
unsafe impl Growing for elora_layer_info {
    const NAME: &'static str = "elora_layer_info";
}

impl elora_model {
    /// Makes a handle with one reference, which the caller owns.
    pub(super) fn into_handle(inner: Model) -> Outcome<*const Self> {
        let names = |names: &mut dyn Iterator<Item = &str>| {
            let convert = |name: &str| {
                let text = || format!("the name `{}` has a NUL in it", name.escape_default());
                CString::new(name).map_err(|_| Failure::new(ELORA_STATUS_INVALID_FORMAT, text()))
            };
            names.map(convert).collect::<Outcome<Vec<_>>>()
        };
        let layers = names(&mut inner.layers().iter().map(|layer| layer.name.as_str()))?;
        let subnets = names(&mut inner.subnets().iter().map(|subnet| subnet.name.as_str()))?;
        Ok(Arc::into_raw(Arc::new(Self {
            inner,
            layers,
            subnets,
        })))
    }

    pub(super) fn inner(&self) -> &Model {
        &self.inner
    }
}

/// Sets every field of `*options` to its default. `struct_size` is sizeof(elora_model_options).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_options_init(
    options: *mut elora_model_options,
    struct_size: usize,
) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::status(|| unsafe { options::write(options, struct_size, elora_model_options::DEFAULT) })
}

/// Loads a model from a bundle file, a Hugging Face folder (dense, GPTQ, AWQ or compressed-tensors)
/// or a GGUF file.
///
/// `path` is the file or folder. `options` may be NULL for the defaults. On success `*out` is a new
/// handle; release it with elora_model_free().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_load(
    path: *const c_char,
    options: *const elora_model_options,
    out: *mut *const elora_model,
) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::status(|| unsafe {
        let path = memory::text(path, "path")?;
        let (options, progress) = elora_model_options::read(options)?;
        let out = Out::required(out, "out")?;
        let model = Model::open_with(path, &options, &progress)?;
        out.write(elora_model::into_handle(model)?);
        Ok(())
    })
}

/// Adds a reference to a model and returns the same pointer. Each reference is released with
/// elora_model_free(). Returns NULL if `model` is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_retain(model: *const elora_model) -> *const elora_model {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::value(std::ptr::null(), || unsafe {
        memory::shared(model, "model").map(Arc::into_raw)
    })
}

/// Releases one reference to a model. NULL is ignored. Layers and sessions keep alive what they
/// need of the model, so handles may be freed in any order.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_free(model: *const elora_model) {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::quiet(|| unsafe { memory::free(model) });
}

/// Writes the model to the file `path` as a bundle. The data is written under a temporary name
/// first and then moved into place. If the file exists, it is replaced if `overwrite` is true;
/// otherwise the call fails with ELORA_STATUS_INVALID_FORMAT.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_save(
    model: *const elora_model,
    path: *const c_char,
    overwrite: bool,
) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::status(|| unsafe {
        let model = memory::required(model, "model")?;
        Ok(model.inner.save(memory::text(path, "path")?, overwrite)?)
    })
}

/// Reads and checks all weights, and verifies their checksums if the model came from a bundle.
/// ELORA_STATUS_INVALID_FORMAT if a weight is damaged; the error text names the first one.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_verify(model: *const elora_model) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::status(|| unsafe { Ok(memory::required(model, "model")?.inner.verify()?) })
}

/// Extracts a subnet as a model of its own, with only the active ranks, channels and blocks. The
/// new model computes what the original computes under that subnet.
///
/// Weights keep their formats, and adapters stay separate; elora_model_merge() adds them to dense
/// weights. `subnet` is an index below elora_model_subnet_count(). On success `*out` is a new
/// handle, independent of `model`; release it with elora_model_free().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_extract(
    model: *const elora_model,
    subnet: usize,
    out: *mut *const elora_model,
) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::status(|| unsafe {
        let model = memory::required(model, "model")?;
        let out = Out::required(out, "out")?;
        out.write(elora_model::into_handle(model.inner.extract(subnet)?)?);
        Ok(())
    })
}

/// Adds the adapters, at their largest ranks, to the weights. The result is a model without
/// adapters and with the whole model as its only subnet. To merge another subnet, call
/// elora_model_extract() first.
///
/// On success `*out` is a new handle, independent of `model`; release it with elora_model_free().
/// ELORA_STATUS_INVALID_STATE if a weight with an adapter is sparse or quantized; the error text
/// names the layer.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_merge(
    model: *const elora_model,
    out: *mut *const elora_model,
) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::status(|| unsafe {
        let model = memory::required(model, "model")?;
        let out = Out::required(out, "out")?;
        out.write(elora_model::into_handle(model.inner.merged()?)?);
        Ok(())
    })
}

/// Number of linear layers: those of the blocks in order of computation, followed by the head.
/// Returns 0 if `model` is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_layer_count(model: *const elora_model) -> usize {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::value(0, || unsafe {
        Ok(memory::required(model, "model")?.layers.len())
    })
}

/// Describes layer `layer`, an index below elora_model_layer_count(). Set `info->struct_size`
/// before the call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_layer_info(
    model: *const elora_model,
    layer: usize,
    info: *mut elora_layer_info,
) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::status(|| unsafe {
        let model = memory::required(model, "model")?;
        options::fill(info, || {
            let (Some(found), Some(name)) =
                (model.inner.layers().get(layer), model.layers.get(layer))
            else {
                let text = format!(
                    "layer = {layer}: the model has {} layers",
                    model.layers.len()
                );
                return Err(Failure::argument(text));
            };
            let (format, bits, group_size) = format_parts(found.format);
            Ok(elora_layer_info {
                struct_size: 0,
                name: name.as_ptr(),
                in_features: found.d_input,
                out_features: found.d_output,
                max_rank: found.max_rank,
                weight_bytes: found.bytes,
                adapter_bytes: found.adapter_bytes,
                group_size,
                format,
                bits,
                has_bias: u32::from(found.bias),
                reserved: 0,
            })
        })
    })
}

/// Writes the index of the layer with this name to `*layer`. ELORA_STATUS_NOT_FOUND if there is
/// none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_find_layer(
    model: *const elora_model,
    name: *const c_char,
    layer: *mut usize,
) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::status(|| unsafe {
        let model = memory::required(model, "model")?;
        let name = memory::text(name, "name")?;
        let out = Out::required(layer, "layer")?;
        let Some(index) = model.inner.layer_index(name) else {
            return Err(Failure::new(
                ELORA_STATUS_NOT_FOUND,
                format!("there is no layer `{name}`"),
            ));
        };
        out.write(index);
        Ok(())
    })
}

/// Number of named subnets. Subnet 0 always exists and is the whole model. Returns 0 if `model` is
/// NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_subnet_count(model: *const elora_model) -> usize {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::value(0, || unsafe {
        Ok(memory::required(model, "model")?.subnets.len())
    })
}

/// Name of a subnet. The string is valid as long as the model is alive. Returns NULL if there is no
/// such subnet, or if `model` is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_subnet_name(
    model: *const elora_model,
    subnet: usize,
) -> *const c_char {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::value(std::ptr::null(), || unsafe {
        let model = memory::required(model, "model")?;
        let name = model.subnets.get(subnet).map(|name| name.as_ptr());
        name.ok_or_else(|| {
            Failure::argument(format!(
                "subnet = {subnet}: the model has {} subnets",
                model.subnets.len()
            ))
        })
    })
}

/// Writes the index of the subnet with this name to `*subnet`. ELORA_STATUS_NOT_FOUND if there is
/// none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_find_subnet(
    model: *const elora_model,
    name: *const c_char,
    subnet: *mut usize,
) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::status(|| unsafe {
        let model = memory::required(model, "model")?;
        let out = Out::required(subnet, "subnet")?;
        out.write(model.inner.subnet_index(memory::text(name, "name")?)?);
        Ok(())
    })
}

/// Copies the model's search space to `buf` as JSON: the groups of layers that share a choice, and
/// the values that each group may take. `buf`, `cap` and `len` are as in elora_last_error().
/// ELORA_STATUS_NOT_FOUND if the model has no search space.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_space_json(
    model: *const elora_model,
    buf: *mut c_char,
    cap: usize,
    len: *mut usize,
) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::status(|| unsafe {
        let model = memory::required(model, "model")?;
        let space = model.inner.space();
        let space = space
            .ok_or_else(|| Failure::new(ELORA_STATUS_NOT_FOUND, "the model has no search space"))?;
        memory::copy_text(&space.to_json()?, buf, cap, len)
    })
}

/// Number of tokens in the vocabulary, which is the number of logits per token. Returns 0 if
/// `model` is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_vocab_size(model: *const elora_model) -> usize {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::value(0, || unsafe {
        Ok(memory::required(model, "model")?
            .inner
            .config()
            .vocab_size())
    })
}

/// Largest number of tokens in a session on this model. Returns 0 if `model` is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_context_size(model: *const elora_model) -> usize {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::value(0, || unsafe {
        Ok(memory::required(model, "model")?
            .inner
            .config()
            .max_position_embeddings())
    })
}

/// Size of all weights in bytes, including the embedding, the adapters and the head, but not the
/// norms and biases. Returns 0 if `model` is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_weight_bytes(model: *const elora_model) -> usize {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::value(0, || unsafe {
        Ok(memory::required(model, "model")?.inner.bytes())
    })
}

/// Copies the tokens that end a generation to `tokens`, a buffer of `cap` elements, and writes
/// their number to `*n`. `tokens` may be NULL if `cap` is 0, and `n` may be NULL.
/// ELORA_STATUS_INSUFFICIENT_SIZE if there are more than `cap` tokens; then only `*n` is written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_stop_tokens(
    model: *const elora_model,
    tokens: *mut elora_token,
    cap: usize,
    n: *mut usize,
) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::status(|| unsafe {
        let model = memory::required(model, "model")?;
        // The cast keeps the bits: ids are below the vocabulary size, which is far below 2^31.
        memory::copy_elements(model.inner.stop_ids(), tokens.cast::<u32>(), cap, n)
    })
}

/// Checks that a model can be shared between threads.
const _: () = {
    const fn shared<T: Send + Sync>() {}
    shared::<elora_model>();
};
