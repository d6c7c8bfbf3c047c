//! What the tests of promises share.
#![allow(dead_code)]

use std::path::PathBuf;

use burn::tensor::Device;
use elastic_lora::io::{Checkpoint, HfConfig};
use elastic_lora::model::Decoder;

/// A file or folder of other implementations' models, data and outputs, where that folder is there.
pub fn shared(relative: &str) -> Option<PathBuf> {
    let root = std::env::var_os("ELASTIC_LORA_SHARED")
        .map_or_else(|| PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../shared")), PathBuf::from);
    let path = root.join(relative);
    if path.exists() {
        return Some(path);
    }
    eprintln!("skipped: {} is missing", path.display());
    None
}

/// A model folder on the Flex device.
pub fn load(dir: &std::path::Path) -> Decoder {
    let config = HfConfig::open(dir).unwrap();
    let checkpoint = Checkpoint::open(dir).unwrap();
    Decoder::load(&config, &checkpoint, &Device::flex()).unwrap()
}

/// Integers of a safetensors file.
pub fn load_i32(checkpoint: &Checkpoint, name: &str) -> Vec<u32> {
    checkpoint
        .bytes(name)
        .unwrap()
        .chunks_exact(4)
        .map(|b| u32::try_from(i32::from_le_bytes([b[0], b[1], b[2], b[3]])).unwrap())
        .collect()
}

/// The largest absolute difference.
pub fn max_diff(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}
