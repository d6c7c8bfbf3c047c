//! `include/elastic_lora.h` is what `src/ffi` says. With `ELASTIC_LORA_WRITE_HEADER=1` in the environment it is
//! written instead of compared.

use std::path::Path;
use std::process::Command;

#[test]
fn the_header_is_in_step_with_the_source() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args([
            "run",
            "--quiet",
            "--locked",
            "--manifest-path",
            "tools/header/Cargo.toml",
            "--target-dir",
        ])
        .arg(Path::new(env!("CARGO_TARGET_TMPDIR")).join("header"))
        .args(["--", "."])
        .current_dir(root)
        .output()
        .unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "the header cannot be generated:\n{errors}"
    );
    let header = String::from_utf8(output.stdout).unwrap();
    assert!(header.contains("elora_session_generate"));
    let path = root.join("include/elastic_lora.h");
    if std::env::var_os("ELASTIC_LORA_WRITE_HEADER").is_some_and(|value| value == "1") {
        std::fs::write(&path, header).unwrap();
        return;
    }
    let committed = std::fs::read_to_string(&path).unwrap();
    let line = committed
        .lines()
        .zip(header.lines())
        .position(|(old, new)| old != new);
    let line = line.unwrap_or_else(|| committed.lines().count().min(header.lines().count())) + 1;
    assert!(
        committed == header,
        "include/elastic_lora.h is stale from line {line} on: run \
         `ELASTIC_LORA_WRITE_HEADER=1 cargo test --release --test header`"
    );
}
