//! Code shared by the examples.
#![allow(dead_code)]

pub mod arithmetic;
pub mod format;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

#[cfg(feature = "burn")]
use burn::tensor::Device;
#[cfg(feature = "burn")]
use elastic_lora::SuperNet;
#[cfg(feature = "burn")]
use elastic_lora::data::TextTokenizer;
use elastic_lora::data::{self, Misfit, Record, Template};
#[cfg(feature = "burn")]
use elastic_lora::io::peft::LoraAdapter;
#[cfg(feature = "burn")]
use elastic_lora::model::Pretrained;
use elastic_lora::progress::TerminalProgress;
use elastic_lora::{Error, Result};

/// Same as `println!`, but ignores a closed pipe (`| head`), because the results are in files.
macro_rules! say {
    ($($text:tt)*) => {{
        use std::io::Write;
        let _ = writeln!(std::io::stdout(), $($text)*);
    }};
}
#[allow(unused_imports)]
pub(crate) use say;

/// Returns the path of the bundled model.
pub fn shipped_model() -> PathBuf {
    PathBuf::from(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/assets/arithmetic-llama"
    ))
}

/// Returns a device by the name of its backend's feature.
#[cfg(feature = "burn")]
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

/// Parses the command line. Errors are printed to stderr and end the process with exit code 1, as
/// all errors do.
pub fn parse<T: clap::Parser>() -> T {
    T::try_parse().unwrap_or_else(|error| {
        let _ = error.print();
        std::process::exit(i32::from(error.use_stderr()))
    })
}

/// Parses the command line like [`parse`]. Returns also which options were given.
pub fn parse_with_matches<T: clap::Parser>() -> (T, clap::ArgMatches) {
    let parsed = T::command().try_get_matches().and_then(|matches| {
        let args = T::from_arg_matches(&matches).map_err(|e| e.format(&mut T::command()))?;
        Ok((args, matches))
    });
    parsed.unwrap_or_else(|error| {
        let _ = error.print();
        std::process::exit(i32::from(error.use_stderr()))
    })
}

/// Prints what is stored in a model's files and not used.
pub fn show_notices(notices: &[String]) {
    for notice in notices {
        eprintln!("notice: {notice}");
    }
}

/// Reads the records of a file, as plain text if asked for.
pub fn load_records(path: &Path, plain_text: bool) -> Result<Vec<Record>> {
    if plain_text {
        return data::load_documents(path);
    }
    let records = data::load_records(path)?;
    show_notices(&data::notices(&records));
    Ok(records)
}

/// Number of records that a message names.
const NAMED: usize = 3;

/// Prints how many of the `total` records of a file do not fit, and the first of them. `fate` says
/// what becomes of them.
pub fn show_misfits(file: &str, fate: &str, misfits: &[Misfit], total: usize) {
    if misfits.is_empty() {
        return;
    }
    let named: Vec<String> = misfits.iter().take(NAMED).map(Misfit::to_string).collect();
    let more = match misfits.len().saturating_sub(NAMED) {
        0 => String::new(),
        n => format!("; and {n} more"),
    };
    let count = misfits.len();
    eprintln!(
        "{file}: {count} of {total} records {fate}: {}{more}",
        named.join("; ")
    );
}

/// Prints the first records as the model sees them, with the parts that it learns between `[[` and
/// `]]`.
pub fn show_examples(records: &[Record], template: &Template, count: usize) -> Result<()> {
    for (i, record) in records.iter().take(count).enumerate() {
        let rendered = template.render(record)?;
        let mut shown = String::new();
        let mut at = 0;
        for part in &rendered.trained {
            shown.push_str(&rendered.text[at..part.start]);
            shown.push_str("[[");
            shown.push_str(&rendered.text[part.clone()]);
            shown.push_str("]]");
            at = part.end;
        }
        shown.push_str(&rendered.text[at..]);
        say!("--- record {}; learned: [[...]]\n{shown}", i + 1);
    }
    Ok(())
}

/// Opens a model folder, or the bundled model, and adds an adapter if one is given.
#[cfg(feature = "burn")]
pub fn open(model: Option<&Path>, adapter: Option<&Path>, device: &str) -> Result<Pretrained> {
    let folder = model.map_or_else(shipped_model, Path::to_path_buf);
    let mut pretrained = Pretrained::open(folder, &self::device(device)?)?;
    show_notices(&pretrained.notices());
    if let Some(path) = adapter {
        let adapter = LoraAdapter::open(path)?;
        show_notices(adapter.notices());
        let before = pretrained.model.config().vocab_size();
        pretrained.model = SuperNet::from_adapter(pretrained.model, &adapter)?.into_model();
        if pretrained.model.config().vocab_size() != before
            && let Some(folder) = tokenizer_of(path)?
        {
            let old = &pretrained.tokenizer;
            let tokenizer = TextTokenizer::from_dir(folder)?;
            pretrained.tokenizer = tokenizer.with_special_ids(old.bos_id(), old.eos_id());
        }
    }
    Ok(pretrained)
}

/// Returns the folder of an adapter if it has a tokenizer. Where an adapter adds tokens, that
/// tokenizer alone knows them.
pub fn tokenizer_of(adapter: &Path) -> Result<Option<PathBuf>> {
    let folder = elastic_lora::io::model_path(adapter)?;
    Ok(folder.join("tokenizer.json").is_file().then_some(folder))
}

/// Reports progress on standard error. The first Ctrl-C interrupts the work; the second ends the
/// process.
pub fn progress() -> TerminalProgress {
    let stop = Arc::new(AtomicBool::new(false));
    let flag = stop.clone();
    let handler = move || {
        if flag.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
        eprintln!("stopping; interrupt again to stop at once");
    };
    // Without a handler, an interrupt ends the process and loses only the steps since the last
    // checkpoint.
    let _ = ctrlc::set_handler(handler);
    TerminalProgress::new().with_interrupt(stop)
}

/// Prints an error with its cause and ends the process with exit code 1, or 130 after an interrupt.
pub fn exit_on_error(result: Result<()>) {
    if let Err(error) = result {
        eprintln!("error: {error}");
        let interrupted = matches!(error, Error::Interrupted { .. });
        std::process::exit(if interrupted { 130 } else { 1 });
    }
}
