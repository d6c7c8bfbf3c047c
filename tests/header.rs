//! Checks that `include/elastic_lora.h` is what the build script generates from `src/ffi`. To run
//! the check:
//!
//! ```sh
//! cargo test --release --no-default-features --features header --test header
//! ```
//!
//! With `ELASTIC_LORA_WRITE_HEADER=1` in the environment, this writes the header instead.

#[test]
fn the_header_is_in_step_with_the_source() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/include/elastic_lora.h");
    let header = include_str!(concat!(env!("OUT_DIR"), "/elastic_lora.h"));
    assert!(header.contains("elora_session_generate"));
    if std::env::var_os("ELASTIC_LORA_WRITE_HEADER").is_some_and(|value| value == "1") {
        std::fs::write(path, header).unwrap();
        return;
    }
    let committed = std::fs::read_to_string(path).unwrap();
    let (old, new) = (committed.lines(), header.lines());
    let line = 1 + old.zip(new).take_while(|(old, new)| old == new).count();
    assert!(
        committed == header,
        "include/elastic_lora.h is stale from line {line} on: run `ELASTIC_LORA_WRITE_HEADER=1 \
         cargo test --release --no-default-features --features header --test header`"
    );
}
