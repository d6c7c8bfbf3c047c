//! What the examples share.
#![allow(dead_code)]

pub mod arithmetic;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use burn::tensor::Device;
use elastic_lora::io::peft::LoraAdapter;
use elastic_lora::model::Pretrained;
use elastic_lora::progress::TerminalProgress;
use elastic_lora::{Error, Result, SuperNet};

/// `println!` that does not mind when nobody reads any more (`| head`): what counts is in files.
macro_rules! say {
    ($($text:tt)*) => {{
        use std::io::Write;
        let _ = writeln!(std::io::stdout(), $($text)*);
    }};
}
#[allow(unused_imports)]
pub(crate) use say;

/// The model that the crate ships.
pub fn shipped_model() -> PathBuf {
    PathBuf::from(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/assets/arithmetic-llama"
    ))
}

/// A device by the name of its backend's feature.
pub fn device(name: &str) -> Result<Device> {
    match name {
        #[cfg(feature = "flex")]
        "flex" => Ok(Device::flex()),
        #[cfg(feature = "ndarray")]
        "ndarray" => Ok(Device::ndarray()),
        #[cfg(feature = "wgpu")]
        "wgpu" => Ok(Device::wgpu(burn::tensor::DeviceKind::DefaultDevice)),
        #[cfg(feature = "vulkan")]
        "vulkan" => Ok(Device::vulkan(burn::tensor::DeviceKind::DefaultDevice)),
        #[cfg(feature = "metal")]
        "metal" => Ok(Device::metal(burn::tensor::DeviceKind::DefaultDevice)),
        #[cfg(feature = "cuda")]
        "cuda" => Ok(Device::cuda(0)),
        #[cfg(feature = "rocm")]
        "rocm" => Ok(Device::rocm(0)),
        _ => Err(Error::InvalidArgument {
            name: "device",
            found: name.into(),
            expected:
                "flex, ndarray, wgpu, vulkan, metal, cuda or rocm, each where the build has the feature of that name"
                    .into(),
        }),
    }
}

/// The arguments of the command line. What is wrong with them is told on stderr and ends the
/// process with 1, as every error.
pub fn parse<T: clap::Parser>() -> T {
    T::try_parse().unwrap_or_else(|error| {
        let _ = error.print();
        std::process::exit(i32::from(error.use_stderr()))
    })
}

/// A model folder, or the shipped model, with an adapter on it where one is named.
pub fn open(model: Option<&Path>, adapter: Option<&Path>, device: &str) -> Result<Pretrained> {
    let folder = model.map_or_else(shipped_model, Path::to_path_buf);
    let mut pretrained = Pretrained::open(folder, &self::device(device)?)?;
    if let Some(adapter) = adapter {
        let adapter = LoraAdapter::open(adapter)?;
        pretrained.model = SuperNet::from_adapter(pretrained.model, &adapter)?.into_model();
    }
    Ok(pretrained)
}

/// Progress on standard error. The first Ctrl-C interrupts the work; the second ends the process.
pub fn progress() -> TerminalProgress {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = stop.clone();
    let handler = move || {
        if flag.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
        eprintln!("stopping; interrupt again to stop at once");
    };
    // Without a handler an interrupt ends the process, which loses no more than the steps since the
    // last checkpoint.
    let _ = ctrlc::set_handler(handler);
    TerminalProgress::new().with_interrupt(stop)
}

/// Prints an error with its cause and ends the process with 1, or with 130 after an interrupt.
pub fn exit_on_error(result: Result<()>) {
    if let Err(error) = result {
        eprintln!("error: {error}");
        let interrupted = matches!(error, Error::Interrupted { .. });
        std::process::exit(if interrupted { 130 } else { 1 });
    }
}
