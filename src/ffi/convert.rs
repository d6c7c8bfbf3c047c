//! Conversion of a model to other storage formats, and loading from other places than a path.

use std::ffi::c_void;
use std::sync::Arc;

use super::guard;
use super::memory::{self, Out};
use super::model::{
    ELORA_WEIGHT_FORMAT_BF16, ELORA_WEIGHT_FORMAT_F16, ELORA_WEIGHT_FORMAT_F32,
    ELORA_WEIGHT_FORMAT_INT, ELORA_WEIGHT_FORMAT_NM_BF16, ELORA_WEIGHT_FORMAT_NM_F16,
    ELORA_WEIGHT_FORMAT_SPARSE_BF16, ELORA_WEIGHT_FORMAT_SPARSE_F16,
    ELORA_WEIGHT_FORMAT_SPARSE_INT, elora_model, elora_model_options, elora_weight_format,
};
use super::options::{self, Growing};
use super::status::{Failure, Outcome, elora_status};
use crate::format::WeightFormat;
use crate::runtime::{FormatPlan, Model};

/// Stands for the format that fits that of the linear layers.
pub const ELORA_WEIGHT_FORMAT_AUTO: elora_weight_format = -1;

/// How a model is stored. Initialize it with elora_convert_options_init(), then set fields.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct elora_convert_options {
    /// sizeof(elora_convert_options); elora_convert_options_init() sets it.
    pub struct_size: usize,
    /// Number of columns that share a scale, for integer formats; 0 for one scale for each row. Codes
    /// that are stored already keep their groups, which must be these. Default: 128.
    pub group_size: usize,
    /// Format of the linear layers in the blocks: an ELORA_WEIGHT_FORMAT_ constant. Default:
    /// ELORA_WEIGHT_FORMAT_INT.
    pub format: elora_weight_format,
    /// Bits of a weight in ELORA_WEIGHT_FORMAT_INT: 2, 3, 4 or 8. Default: 4.
    pub bits: u32,
    /// If not 0, integers have no zero point. Default: 0.
    pub symmetric: u32,
    /// N of N:M, for the N:M formats. Default: 2.
    pub n: u32,
    /// M of N:M. Default: 4.
    pub m: u32,
    /// Format of the embedding, and of a head that shares it. ELORA_WEIGHT_FORMAT_AUTO for floats of
    /// 16 bits, or of 32 if format is ELORA_WEIGHT_FORMAT_F32. Default: ELORA_WEIGHT_FORMAT_AUTO.
    pub embedding_format: elora_weight_format,
    /// Bits of the embedding in ELORA_WEIGHT_FORMAT_INT. Default: 8.
    pub embedding_bits: u32,
    /// Format of a head of its own. ELORA_WEIGHT_FORMAT_AUTO as above. Default:
    /// ELORA_WEIGHT_FORMAT_AUTO.
    pub head_format: elora_weight_format,
    /// Bits of the head in ELORA_WEIGHT_FORMAT_INT. Default: 8.
    pub head_bits: u32,
    /// Format of the adapters: ELORA_WEIGHT_FORMAT_F32, _F16, _BF16 or _AUTO. Default:
    /// ELORA_WEIGHT_FORMAT_AUTO.
    pub adapter_format: elora_weight_format,
}

// SAFETY: `repr(C)` integers, the first of which is the size; no padding.
unsafe impl Growing for elora_convert_options {
    const NAME: &'static str = "elora_convert_options";
}

impl elora_convert_options {
    const DEFAULT: Self = Self {
        struct_size: size_of::<Self>(),
        group_size: 128,
        format: ELORA_WEIGHT_FORMAT_INT,
        bits: 4,
        symmetric: 0,
        n: 2,
        m: 4,
        embedding_format: ELORA_WEIGHT_FORMAT_AUTO,
        embedding_bits: 8,
        head_format: ELORA_WEIGHT_FORMAT_AUTO,
        head_bits: 8,
        adapter_format: ELORA_WEIGHT_FORMAT_AUTO,
    };

    fn format(&self, name: &str, format: elora_weight_format, bits: u32) -> Outcome<WeightFormat> {
        let group_size = (self.group_size > 0).then_some(self.group_size);
        let symmetric = self.symmetric != 0;
        let small = |what: &str, value: u32| {
            u8::try_from(value)
                .map_err(|_| Failure::argument(format!("{what} = {value}: too large")))
        };
        Ok(match format {
            ELORA_WEIGHT_FORMAT_F32 => WeightFormat::F32,
            ELORA_WEIGHT_FORMAT_F16 => WeightFormat::F16,
            ELORA_WEIGHT_FORMAT_BF16 => WeightFormat::Bf16,
            ELORA_WEIGHT_FORMAT_INT => WeightFormat::Int {
                bits: small("bits", bits)?,
                group_size,
                symmetric,
            },
            ELORA_WEIGHT_FORMAT_SPARSE_F16 => WeightFormat::SparseF16,
            ELORA_WEIGHT_FORMAT_SPARSE_BF16 => WeightFormat::SparseBf16,
            ELORA_WEIGHT_FORMAT_SPARSE_INT => WeightFormat::SparseInt4 {
                group_size,
                symmetric,
            },
            ELORA_WEIGHT_FORMAT_NM_F16 => WeightFormat::NmF16 {
                n: small("n", self.n)?,
                m: small("m", self.m)?,
            },
            ELORA_WEIGHT_FORMAT_NM_BF16 => WeightFormat::NmBf16 {
                n: small("n", self.n)?,
                m: small("m", self.m)?,
            },
            other => {
                return Err(Failure::argument(format!(
                    "{name} = {other}: no ELORA_WEIGHT_FORMAT_ constant that can be written"
                )));
            }
        })
    }

    fn plan(&self) -> Outcome<FormatPlan> {
        let mut plan = FormatPlan::new(self.format("format", self.format, self.bits)?);
        if self.embedding_format != ELORA_WEIGHT_FORMAT_AUTO {
            let (format, bits) = (self.embedding_format, self.embedding_bits);
            plan = plan.with_embedding(self.format("embedding_format", format, bits)?);
        }
        if self.head_format != ELORA_WEIGHT_FORMAT_AUTO {
            plan = plan.with_head(self.format("head_format", self.head_format, self.head_bits)?);
        }
        if self.adapter_format != ELORA_WEIGHT_FORMAT_AUTO {
            plan = plan.with_adapters(self.format("adapter_format", self.adapter_format, 8)?);
        }
        Ok(plan)
    }
}

/// Sets every field of `*options` to its default. `struct_size` is sizeof(elora_convert_options).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_convert_options_init(
    options: *mut elora_convert_options,
    struct_size: usize,
) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::status(|| unsafe {
        options::write(options, struct_size, elora_convert_options::DEFAULT)
    })
}

/// Makes a model whose weights are stored in other formats; elora_model_save() writes it as a
/// bundle. Floats are rounded to nearest; integers that are stored already keep their values between
/// dense and sparse storage. Adapters stay separate. `options` may be NULL for the defaults, which
/// are 4-bit integers. On success `*out` is a new handle, independent of `model`; release it with
/// elora_model_free().
///
/// ELORA_STATUS_UNSUPPORTED if integers would have to change to another grid, or if a format cannot
/// hold the weights; the error text names the tensor.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_convert(
    model: *const elora_model,
    options: *const elora_convert_options,
    out: *mut *const elora_model,
) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::status(|| unsafe {
        let model = memory::required(model, "model")?;
        let plan = options::read(options, elora_convert_options::DEFAULT)?.plan()?;
        let out = Out::required(out, "out")?;
        out.write(elora_model::into_handle(model.inner().with_format(plan)?)?);
        Ok(())
    })
}

/// Bytes of the caller, which the header requires to stay.
struct Borrowed {
    first: *const u8,
    len: usize,
}

// SAFETY: the bytes are only read, and the header requires that nothing changes them.
unsafe impl Send for Borrowed {}
// SAFETY: as above.
unsafe impl Sync for Borrowed {}

impl AsRef<[u8]> for Borrowed {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: `elora_model_load_memory` checked the pointer and the length, and the header
        // requires the bytes to stay as long as the model and what was made of it.
        unsafe { std::slice::from_raw_parts(self.first, self.len) }
    }
}

/// Loads a model from a bundle of `size` bytes in memory. If `copy` is true, the bytes are copied.
/// Otherwise they are used in place: they must begin at a multiple of 64, and must stay as they are
/// as long as the model, or a layer, session or model that was made of it, is alive.
///
/// `options` and `out` are as in elora_model_load(); use_mmap has no effect.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_load_memory(
    bytes: *const c_void,
    size: usize,
    copy: bool,
    options: *const elora_model_options,
    out: *mut *const elora_model,
) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::status(|| unsafe {
        let (options, progress) = elora_model_options::read(options)?;
        let given = memory::slice(bytes.cast::<u8>(), size, "bytes")?;
        let out = Out::required(out, "out")?;
        let owner: Arc<dyn AsRef<[u8]> + Send + Sync> = if copy {
            let mut own = Vec::new();
            own.try_reserve_exact(size)
                .map_err(|_| crate::Error::OutOfMemory {
                    what: "a bundle",
                    bytes: size,
                })?;
            own.extend_from_slice(given);
            Arc::new(own)
        } else if given.as_ptr().align_offset(64) != 0 {
            return Err(Failure::argument(format!(
                "`bytes` is at {bytes:p}, which is no multiple of 64; copy the bytes"
            )));
        } else {
            let (first, len) = (given.as_ptr(), given.len());
            Arc::new(Borrowed { first, len })
        };
        let model = Model::from_bytes("bundle in memory", owner, &options, &progress)?;
        out.write(elora_model::into_handle(model)?);
        Ok(())
    })
}

/// Loads a model from a bundle that is open as the file descriptor `fd`: a regular file that can be
/// read. It stays open, and its position may change. `options` and `out` are as in
/// elora_model_load(). ELORA_STATUS_UNSUPPORTED where there are no file descriptors.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_load_fd(
    fd: i32,
    options: *const elora_model_options,
    out: *mut *const elora_model,
) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::status(|| unsafe {
        let (options, progress) = elora_model_options::read(options)?;
        let out = Out::required(out, "out")?;
        let name = format!("file descriptor {fd}");
        let file = file_of(fd, &name)?;
        let model = Model::from_file(&name, file, &options, &progress)?;
        out.write(elora_model::into_handle(model)?);
        Ok(())
    })
}

/// Returns a file of its own for a descriptor of the caller.
#[cfg(unix)]
fn file_of(fd: i32, name: &str) -> Outcome<std::fs::File> {
    use std::os::fd::BorrowedFd;
    if fd < 0 {
        return Err(Failure::argument(format!("fd = {fd}: not negative")));
    }
    // SAFETY: the descriptor is not -1. If it is not open, duplicating it fails and changes nothing.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    let own = borrowed
        .try_clone_to_owned()
        .map_err(|error| crate::Error::io(name, error))?;
    Ok(own.into())
}

#[cfg(not(unix))]
fn file_of(_fd: i32, name: &str) -> Outcome<std::fs::File> {
    let what = format!("loading from {name} on this system");
    Err(crate::Error::Unsupported { what }.into())
}
