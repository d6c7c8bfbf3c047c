//! Search spaces and subnets.
#![no_main]

use elastic_lora::{SearchSpace, SubnetConfig};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let _ = SubnetConfig::from_json(text);
    let _ = SearchSpace::from_json(text);
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("space.json");
    std::fs::write(&path, text).expect("a file");
    let _ = SearchSpace::from_file(&path, &[]);
});
