//! Names the shared library of the C ABI and, with the feature `header`, generates the C header.

use std::env;
use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    // Without this line, a change to any file, including tests, would recompile the library.
    println!("cargo::rerun-if-changed=build.rs");
    if cfg!(feature = "capi") {
        name_library()?;
    }
    #[cfg(feature = "header")]
    header::write()?;
    Ok(())
}

/// Sets the name by which loaders look for the shared library. Versions with the same name have the
/// same binary interface: for 0.x, those with the same x. CMakeLists.txt and cargo-c follow the
/// same rule.
fn name_library() -> Result<(), Box<dyn Error>> {
    let major = env::var("CARGO_PKG_VERSION_MAJOR")?;
    let abi = match major.as_str() {
        "0" => format!("0.{}", env::var("CARGO_PKG_VERSION_MINOR")?),
        _ => major,
    };
    let is = |name: &str, value: &str| env::var(name).is_ok_and(|found| found == value);
    // cargo warns about an argument for cdylibs if Cargo.toml names no such crate type. A soname is
    // therefore passed to every link, because linkers ignore it for programs; they would refuse an
    // install name.
    if is("CARGO_CFG_TARGET_VENDOR", "apple") {
        println!(
            "cargo::rustc-cdylib-link-arg=-Wl,-install_name,@rpath/libelastic_lora.{abi}.dylib"
        );
    } else if is("CARGO_CFG_TARGET_OS", "android") {
        // Android packages cannot contain versioned library names.
        println!("cargo::rustc-link-arg=-Wl,-soname,libelastic_lora.so");
    } else if is("CARGO_CFG_TARGET_FAMILY", "unix") {
        println!("cargo::rustc-link-arg=-Wl,-soname,libelastic_lora.so.{abi}");
    }
    Ok(())
}

#[cfg(feature = "header")]
mod header {
    use std::env;
    use std::error::Error;
    use std::path::Path;

    /// Source files of the items in the header, in the header's order. cbindgen is given files
    /// because it would otherwise walk the whole crate.
    const SOURCES: [&str; 8] = [
        "status",
        "model",
        "tokenizer",
        "text",
        "parts",
        "linear",
        "session",
        "sampler",
    ];

    /// Writes `elastic_lora.h` to the build's output folder, where `tests/header.rs` reads it.
    pub fn write() -> Result<(), Box<dyn Error>> {
        println!("cargo::rerun-if-changed=cbindgen.toml");
        let mut builder =
            cbindgen::Builder::new().with_config(cbindgen::Config::from_file("cbindgen.toml")?);
        for source in SOURCES {
            let path = Path::new("src/ffi").join(source).with_extension("rs");
            println!("cargo::rerun-if-changed={}", path.display());
            builder = builder.with_src(path);
        }
        let path = Path::new(&env::var("OUT_DIR")?).join("elastic_lora.h");
        builder.generate()?.write_to_file(path);
        Ok(())
    }
}
