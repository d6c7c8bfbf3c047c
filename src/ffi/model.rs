//! Models: opened, listed, cut to a subnet, written.

use std::ffi::{CString, c_char};
use std::sync::Arc;

use super::guard;
use super::memory::{self, Out};
use super::options::{self, Growing};
use super::status::{
    ELORA_STATUS_INVALID_FORMAT, ELORA_STATUS_NOT_FOUND, Failure, Outcome, elora_status,
};
use crate::format::WeightFormat;
use crate::runtime::{Model, ModelOptions, Verify};

/// A token's id: 0 to the size of the vocabulary - 1.
pub type elora_token = i32;

/// A model: weights, adapters, subnets, tokenizer. Immutable and reference-counted: any number of threads may use it
/// at once.
pub struct elora_model {
    inner: Model,
    layers: Vec<CString>,
    subnets: Vec<CString>,
}

/// What is compared with the checksums in a bundle, and when.
pub type elora_verify = i32;

/// A weight when it is first used, so that loading reads none.
pub const ELORA_VERIFY_ON_USE: elora_verify = 0;
/// All weights when the model is loaded.
pub const ELORA_VERIFY_ON_LOAD: elora_verify = 1;
/// Nothing. What could make the library read outside a weight is checked all the same.
pub const ELORA_VERIFY_NEVER: elora_verify = 2;

/// How a model is loaded. Fill it by elora_model_options_init(), then set fields.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct elora_model_options {
    /// sizeof(elora_model_options), set by elora_model_options_init().
    pub struct_size: usize,
    /// Threads that work on one call, the caller's among them; 0 for one per core.
    pub n_threads: u32,
    /// Not 0: files are mapped, and must not change while the model lives. 0: they are read as a whole.
    pub use_mmap: u32,
    /// An ELORA_VERIFY_ constant.
    pub verify: elora_verify,
    /// 0.
    pub reserved: u32,
}

// SAFETY: integers, the first of which is the size; no padding.
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
    };

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
        // More threads than any machine has are a mistake, and each takes a stack.
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

/// Refuses what a later version may give a meaning.
pub(super) fn reserved(value: u32) -> Outcome {
    if value == 0 {
        Ok(())
    } else {
        Err(Failure::argument(format!("reserved = {value}: must be 0")))
    }
}

/// How a weight is stored.
pub type elora_weight_format = i32;

/// Dense, 32 bits.
pub const ELORA_WEIGHT_FORMAT_F32: elora_weight_format = 0;
/// Dense, IEEE 754 half precision.
pub const ELORA_WEIGHT_FORMAT_F16: elora_weight_format = 1;
/// Dense, bfloat16.
pub const ELORA_WEIGHT_FORMAT_BF16: elora_weight_format = 2;
/// Codes of a few bits, with a scale for each group of columns.
pub const ELORA_WEIGHT_FORMAT_INT: elora_weight_format = 3;
/// A bit for each weight, and half-precision numbers for those that are not 0.
pub const ELORA_WEIGHT_FORMAT_SPARSE_F16: elora_weight_format = 4;
/// A bit for each weight, and bfloat16 numbers for those that are not 0.
pub const ELORA_WEIGHT_FORMAT_SPARSE_BF16: elora_weight_format = 5;
/// A bit for each weight, and 4-bit codes for those that are not 0, with a scale for each group of columns.
pub const ELORA_WEIGHT_FORMAT_SPARSE_INT: elora_weight_format = 6;
/// At most so many of each group of weights are not 0: a bit for each weight, and half-precision numbers.
pub const ELORA_WEIGHT_FORMAT_NM_F16: elora_weight_format = 7;
/// At most so many of each group of weights are not 0: a bit for each weight, and bfloat16 numbers.
pub const ELORA_WEIGHT_FORMAT_NM_BF16: elora_weight_format = 8;
/// A format that this version of the header does not know.
pub const ELORA_WEIGHT_FORMAT_OTHER: elora_weight_format = 1000;

/// A format's number, the bits of a stored weight, and the columns that share a scale.
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
        // A format that was added without a number: the caller is told, rather than something wrong.
        #[allow(unreachable_patterns)]
        _ => (ELORA_WEIGHT_FORMAT_OTHER, 0, 0),
    }
}

/// A linear layer of a model, with the sizes that it has in the whole model.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct elora_layer_info {
    /// In: sizeof(elora_layer_info).
    pub struct_size: usize,
    /// Hugging Face's module path, such as "model.layers.0.self_attn.q_proj"; "lm_head" for the head. It lives as
    /// long as the model.
    pub name: *const c_char,
    /// Numbers in a row of the layer's input.
    pub in_features: usize,
    /// Numbers in a row of its output.
    pub out_features: usize,
    /// Largest rank of its adapter; 0 where there is none.
    pub max_rank: usize,
    /// Bytes of its weight, those of the adapter left out.
    pub weight_bytes: usize,
    /// Bytes of its adapter.
    pub adapter_bytes: usize,
    /// Columns that share a scale, in formats with codes; 0 where a row has one scale, or none.
    pub group_size: usize,
    /// An ELORA_WEIGHT_FORMAT_ constant.
    pub format: elora_weight_format,
    /// Bits of a number or code.
    pub bits: u32,
    /// 1 if it has a bias, else 0.
    pub has_bias: u32,
    /// 0.
    pub reserved: u32,
}

// SAFETY: integers and a pointer, the first of which is the size; no padding.
unsafe impl Growing for elora_layer_info {
    const NAME: &'static str = "elora_layer_info";
}

impl elora_model {
    /// A handle, whose one count is the caller's.
    fn into_handle(inner: Model) -> Outcome<*const Self> {
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

/// Sets every field to its default. `struct_size` is sizeof(elora_model_options).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_options_init(
    options: *mut elora_model_options,
    struct_size: usize,
) -> elora_status {
    // SAFETY: as the header asks of the caller.
    guard::status(|| unsafe { options::write(options, struct_size, elora_model_options::DEFAULT) })
}

/// Loads a bundle, or a Hugging Face folder (dense, GPTQ or compressed-tensors). `options` may be NULL for the
/// defaults. On success `*out` is a handle that elora_model_free() gives back.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_load(
    path: *const c_char,
    options: *const elora_model_options,
    out: *mut *const elora_model,
) -> elora_status {
    // SAFETY: as the header asks of the caller.
    guard::status(|| unsafe {
        let path = memory::text(path, "path")?;
        let options = options::read(options, elora_model_options::DEFAULT)?.parse()?;
        let out = Out::required(out, "out")?;
        out.write(elora_model::into_handle(Model::open(path, &options)?)?);
        Ok(())
    })
}

/// One more handle to the same model: the same pointer, to be given back once more. NULL for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_retain(model: *const elora_model) -> *const elora_model {
    // SAFETY: as the header asks of the caller.
    guard::value(std::ptr::null(), || unsafe {
        memory::shared(model, "model").map(Arc::into_raw)
    })
}

/// Gives a handle back; NULL is ignored. Layers and sessions keep what they need of the model, so the order of
/// freeing does not matter.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_free(model: *const elora_model) {
    // SAFETY: as the header asks of the caller.
    guard::quiet(|| unsafe { memory::free(model) });
}

/// Writes the model to a file as a bundle: under another name first, then moved into place. A file that is there is
/// replaced only where `overwrite` says so.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_save(
    model: *const elora_model,
    path: *const c_char,
    overwrite: bool,
) -> elora_status {
    // SAFETY: as the header asks of the caller.
    guard::status(|| unsafe {
        let model = memory::required(model, "model")?;
        Ok(model.inner.save(memory::text(path, "path")?, overwrite)?)
    })
}

/// Reads all weights, and compares them with their checksums where the model came from a bundle.
/// ELORA_STATUS_INVALID_FORMAT names the first weight that is not what was written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_verify(model: *const elora_model) -> elora_status {
    // SAFETY: as the header asks of the caller.
    guard::status(|| unsafe { Ok(memory::required(model, "model")?.inner.verify()?) })
}

/// Cuts a subnet out: a model of its active ranks, channels and blocks alone, which computes what the whole model
/// computes with that subnet. Formats stay as they are, and adapters stay apart; elora_model_merge() puts them into
/// dense weights. On success `*out` is a handle of its own, that elora_model_free() gives back and elora_model_save()
/// writes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_extract(
    model: *const elora_model,
    subnet: usize,
    out: *mut *const elora_model,
) -> elora_status {
    // SAFETY: as the header asks of the caller.
    guard::status(|| unsafe {
        let model = memory::required(model, "model")?;
        let out = Out::required(out, "out")?;
        out.write(elora_model::into_handle(model.inner.extract(subnet)?)?);
        Ok(())
    })
}

/// Puts the adapters into the weights, at their largest ranks: a model without adapters. The weights must be dense;
/// ELORA_STATUS_INVALID_STATE names one that is sparse or quantized. On success `*out` is a handle of its own. For a
/// subnet, call elora_model_extract() first.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_merge(
    model: *const elora_model,
    out: *mut *const elora_model,
) -> elora_status {
    // SAFETY: as the header asks of the caller.
    guard::status(|| unsafe {
        let model = memory::required(model, "model")?;
        let out = Out::required(out, "out")?;
        out.write(elora_model::into_handle(model.inner.merged()?)?);
        Ok(())
    })
}

/// Number of linear layers: those of the blocks in the order of computation, and the head at last. 0 for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_layer_count(model: *const elora_model) -> usize {
    // SAFETY: as the header asks of the caller.
    guard::value(0, || unsafe {
        Ok(memory::required(model, "model")?.layers.len())
    })
}

/// Describes a layer. Set `info->struct_size` before.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_layer_info(
    model: *const elora_model,
    layer: usize,
    info: *mut elora_layer_info,
) -> elora_status {
    // SAFETY: as the header asks of the caller.
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

/// Finds a layer by its name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_find_layer(
    model: *const elora_model,
    name: *const c_char,
    layer: *mut usize,
) -> elora_status {
    // SAFETY: as the header asks of the caller.
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

/// Number of subnets with a name. The first is always there: the whole model. 0 for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_subnet_count(model: *const elora_model) -> usize {
    // SAFETY: as the header asks of the caller.
    guard::value(0, || unsafe {
        Ok(memory::required(model, "model")?.subnets.len())
    })
}

/// A subnet's name, which lives as long as the model; NULL where there is no such subnet.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_subnet_name(
    model: *const elora_model,
    subnet: usize,
) -> *const c_char {
    // SAFETY: as the header asks of the caller.
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

/// Finds a subnet by its name.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_find_subnet(
    model: *const elora_model,
    name: *const c_char,
    subnet: *mut usize,
) -> elora_status {
    // SAFETY: as the header asks of the caller.
    guard::status(|| unsafe {
        let model = memory::required(model, "model")?;
        let out = Out::required(subnet, "subnet")?;
        out.write(model.inner.subnet_index(memory::text(name, "name")?)?);
        Ok(())
    })
}

/// Copies the search space of the model's subnets to `buf` as JSON: groups of layers that share a value, and the
/// values that each may take. ELORA_STATUS_NOT_FOUND where the model has none. `buf`, `cap` and `len` as in
/// elora_last_error().
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_space_json(
    model: *const elora_model,
    buf: *mut c_char,
    cap: usize,
    len: *mut usize,
) -> elora_status {
    // SAFETY: as the header asks of the caller.
    guard::status(|| unsafe {
        let model = memory::required(model, "model")?;
        let space = model.inner.space();
        let space = space
            .ok_or_else(|| Failure::new(ELORA_STATUS_NOT_FOUND, "the model has no search space"))?;
        memory::copy_text(&space.to_json()?, buf, cap, len)
    })
}

/// Tokens of the model's vocabulary, which is the number of logits after each. 0 for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_vocab_size(model: *const elora_model) -> usize {
    // SAFETY: as the header asks of the caller.
    guard::value(0, || unsafe {
        Ok(memory::required(model, "model")?
            .inner
            .config()
            .vocab_size())
    })
}

/// Tokens that the model can take in at most. 0 for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_context_size(model: *const elora_model) -> usize {
    // SAFETY: as the header asks of the caller.
    guard::value(0, || unsafe {
        Ok(memory::required(model, "model")?
            .inner
            .config()
            .max_position_embeddings())
    })
}

/// Bytes of all weights, with embedding, adapters and head. 0 for NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_weight_bytes(model: *const elora_model) -> usize {
    // SAFETY: as the header asks of the caller.
    guard::value(0, || unsafe {
        Ok(memory::required(model, "model")?.inner.bytes())
    })
}

/// Copies the tokens that end a generation to `tokens`, and their number to `*n`. ELORA_STATUS_INSUFFICIENT_SIZE,
/// with only `*n` written, where there are more than `cap`; `tokens` may be NULL where `cap` is 0, and `n` may be
/// NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_stop_tokens(
    model: *const elora_model,
    tokens: *mut elora_token,
    cap: usize,
    n: *mut usize,
) -> elora_status {
    // SAFETY: as the header asks of the caller.
    guard::status(|| unsafe {
        let model = memory::required(model, "model")?;
        // The same bits: an id is under the vocabulary's size, which is far under 2^31.
        memory::copy_elements(model.inner.stop_ids(), tokens.cast::<u32>(), cap, n)
    })
}

/// A model is shared by threads.
const _: () = {
    const fn shared<T: Send + Sync>() {}
    shared::<elora_model>();
};
