//! Prints `include/elastic_lora.h`. The argument is the folder of the crate.

use std::path::Path;
use std::process::ExitCode;

/// What is in the header, in its order. The rest of `src/ffi` is inside the library. cbindgen is given files, since
/// it would walk the whole crate otherwise.
const SOURCES: [&str; 6] = ["status", "model", "tokenizer", "parts", "linear", "session"];

fn main() -> ExitCode {
    let Some(root) = std::env::args_os().nth(1) else {
        eprintln!("usage: elastic-lora-header FOLDER");
        return ExitCode::FAILURE;
    };
    let root = Path::new(&root);
    let config = match cbindgen::Config::from_file(root.join("cbindgen.toml")) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("cbindgen.toml: {error}");
            return ExitCode::FAILURE;
        }
    };
    let mut builder = cbindgen::Builder::new().with_config(config);
    for source in SOURCES {
        builder = builder.with_src(root.join("src/ffi").join(source).with_extension("rs"));
    }
    match builder.generate() {
        Ok(header) => {
            header.write(std::io::stdout());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("src/ffi: {error}");
            ExitCode::FAILURE
        }
    }
}
