//! Training data.
#![no_main]

use std::path::Path;

use elastic_lora::data::parse_records;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    for name in ["x.json", "x.csv", "x.tsv", "x.txt"] {
        let _ = parse_records(text, Path::new(name));
    }
});
