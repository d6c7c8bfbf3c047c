//! Runs scripts of `fixtures/interop`, and writes what they compare with.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use elastic_lora::io::tensors::write_safetensors;
use elastic_lora::io::{DType, HostTensor};
use elastic_lora::model::Decoder;

/// Returns a Python that has the modules.
pub fn python() -> Option<&'static Path> {
    static FOUND: OnceLock<Option<PathBuf>> = OnceLock::new();
    let found = FOUND.get_or_init(|| {
        let python =
            std::env::var_os("ELASTIC_LORA_PYTHON").map_or_else(|| "python3".into(), PathBuf::from);
        let probe = Command::new(&python)
            .args(["-c", "import torch, transformers, peft"])
            .output();
        probe
            .is_ok_and(|probe| probe.status.success())
            .then_some(python)
    });
    if found.is_none() {
        eprintln!(
            "skipped: no Python with torch, transformers and peft (name one in ELASTIC_LORA_PYTHON)"
        );
    }
    found.as_deref()
}

/// Runs a script of `fixtures/interop` without network access and copies its output to stderr.
/// Returns whether its modules were found.
pub fn run(python: &Path, script: &str, arguments: &[PathBuf]) -> bool {
    let script = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/interop")
        .join(script);
    let mut command = Command::new(python);
    command
        .arg(script)
        .args(arguments)
        .args(["--tolerance", "1e-4"]);
    let output = command
        .env("HF_HUB_OFFLINE", "1")
        .env("CUDA_VISIBLE_DEVICES", "")
        .output()
        .unwrap();
    let (out, err) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    eprint!("{out}");
    if output.status.code() == Some(77) {
        eprintln!("skipped: {err}");
        return false;
    }
    assert!(output.status.success(), "{out}\n{err}");
    true
}

/// Returns a tensor of token ids.
pub fn ids_tensor<'a>(name: &str, ids: &[u32]) -> HostTensor<'a> {
    let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    HostTensor::from_bytes(name, DType::I32, [ids.len()], bytes)
}

/// Writes the values that the scripts compare with.
pub fn write_vectors(
    path: &Path,
    model: &Decoder,
    ids: &[u32],
    more: Vec<HostTensor<'_>>,
    metadata: &BTreeMap<String, String>,
) {
    let logits = HostTensor::from_f32(
        "logits",
        DType::F32,
        [ids.len(), model.config().vocab_size()],
        super::runtime::full(model, ids),
    );
    let mut tensors = vec![ids_tensor("input_ids", ids), logits];
    tensors.extend(more);
    write_safetensors(path, tensors, metadata).unwrap();
}
