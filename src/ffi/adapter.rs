//! LoRA adapters that are loaded at run time.

use std::ffi::c_char;
use std::sync::Arc;

use super::guard;
use super::memory::{self, Out};
use super::model::elora_model;
use super::session::elora_session;
use super::status::elora_status;
use crate::runtime::Adapter;

/// A LoRA adapter for a model. Immutable and reference-counted: any number of threads may use it at
/// once.
pub struct elora_adapter {
    inner: Adapter,
}

/// Loads a PEFT adapter from its folder (adapter_config.json and adapter_model.safetensors), or a
/// LoRA in a GGUF file, for a model. It can be used with every model that has layers of the same names and sizes, such as the
/// same model in another format. On success `*out` is a new handle; release it with
/// elora_adapter_free().
///
/// ELORA_STATUS_NOT_FOUND or ELORA_STATUS_INVALID_FORMAT if the adapter is for another model.
/// ELORA_STATUS_UNSUPPORTED if it does what is not implemented; the error text says what.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_adapter_load(
    model: *const elora_model,
    path: *const c_char,
    out: *mut *const elora_adapter,
) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::status(|| unsafe {
        let model = memory::required(model, "model")?;
        let path = memory::text(path, "path")?;
        let out = Out::required(out, "out")?;
        let inner = Adapter::open(model.inner(), path)?;
        out.write(Arc::into_raw(Arc::new(elora_adapter { inner })));
        Ok(())
    })
}

/// Adds a reference to an adapter and returns the same pointer. Each reference is released with
/// elora_adapter_free(). Returns NULL if `adapter` is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_adapter_retain(
    adapter: *const elora_adapter,
) -> *const elora_adapter {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::value(std::ptr::null(), || unsafe {
        memory::shared(adapter, "adapter").map(Arc::into_raw)
    })
}

/// Releases one reference to an adapter. NULL is ignored. Sessions and models keep alive what they
/// need of it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_adapter_free(adapter: *const elora_adapter) {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::quiet(|| unsafe { memory::free(adapter) });
}

/// Largest rank of a layer of the adapter. Returns 0 if `adapter` is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_adapter_max_rank(adapter: *const elora_adapter) -> usize {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::value(0, || unsafe {
        Ok(memory::required(adapter, "adapter")?.inner.max_rank())
    })
}

/// Number of layers that the adapter changes. Returns 0 if `adapter` is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_adapter_layer_count(adapter: *const elora_adapter) -> usize {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::value(0, || unsafe {
        Ok(memory::required(adapter, "adapter")?.inner.layers().len())
    })
}

/// Size of the adapter's factors in bytes. Returns 0 if `adapter` is NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_adapter_bytes(adapter: *const elora_adapter) -> usize {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::value(0, || unsafe {
        Ok(memory::required(adapter, "adapter")?.inner.bytes())
    })
}

/// Uses these adapters in a session, in place of those that were set before; none if `n_adapters` is
/// 0. `adapters` has `n_adapters` elements. `scales` has as many, the factor of each adapter's
/// update, or is NULL for 1 each. Adapters that belong to the model stay as the subnet has them.
///
/// ELORA_STATUS_INVALID_STATE if the adapters would change while the session holds tokens, because
/// their keys and values belong to the previous adapters; call elora_session_reset() first.
/// ELORA_STATUS_NOT_FOUND or ELORA_STATUS_INVALID_FORMAT if an adapter is for another model.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_session_set_adapters(
    session: *mut elora_session,
    adapters: *const *const elora_adapter,
    scales: *const f32,
    n_adapters: usize,
) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::status(|| unsafe {
        let session = memory::required(session.cast_const(), "session")?;
        let handles = memory::slice(adapters, n_adapters, "adapters")?;
        let scales = match scales.is_null() {
            true => None,
            false => Some(memory::slice(scales, n_adapters, "scales")?),
        };
        let mut chosen = Vec::with_capacity(handles.len());
        for (at, handle) in handles.iter().enumerate() {
            let adapter = memory::required(*handle, "adapters[i]")?;
            let scale = scales.and_then(|scales| scales.get(at).copied());
            chosen.push((adapter.inner.clone(), scale.unwrap_or(1.0)));
        }
        session.with(|session| Ok(session.set_adapters(&chosen)?))
    })
}

/// Makes a model of which an adapter is a part, so that it is saved with the model, used by every
/// session, and added to dense weights by elora_model_merge(). `scale` is a factor of the adapter's
/// update. On success `*out` is a new handle, which shares the weights of `model`; release it with
/// elora_model_free().
///
/// ELORA_STATUS_UNSUPPORTED if the rank of an adapter of the model is a choice of its search space:
/// call elora_model_extract() first.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn elora_model_attach_adapter(
    model: *const elora_model,
    adapter: *const elora_adapter,
    scale: f32,
    out: *mut *const elora_model,
) -> elora_status {
    // SAFETY: the caller meets the requirements stated in the header.
    guard::status(|| unsafe {
        let model = memory::required(model, "model")?;
        let adapter = memory::required(adapter, "adapter")?;
        let out = Out::required(out, "out")?;
        let attached = model.inner().with_adapter(&adapter.inner, scale)?;
        out.write(elora_model::into_handle(attached)?);
        Ok(())
    })
}

/// Checks that an adapter can be shared between threads.
const _: () = {
    const fn shared<T: Send + Sync>() {}
    shared::<elora_adapter>();
};
