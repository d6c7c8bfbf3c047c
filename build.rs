//! Names the shared library of the C ABI and, with the feature `header`, writes its header.

use std::env;
use std::error::Error;

fn main() -> Result<(), Box<dyn Error>> {
    // Without this line any changed file, a test's too, would compile the library again.
    println!("cargo::rerun-if-changed=build.rs");
    if cfg!(feature = "capi") {
        name_library()?;
    }
    #[cfg(feature = "header")]
    header::write()?;
    Ok(())
}

/// Gives the shared library the name by which loaders look for it. It holds the versions that share a
/// binary interface: of 0.x, those with the same x. CMakeLists.txt and cargo-c have the same rule.
fn name_library() -> Result<(), Box<dyn Error>> {
    let major = env::var("CARGO_PKG_VERSION_MAJOR")?;
    let abi = match major.as_str() {
        "0" => format!("0.{}", env::var("CARGO_PKG_VERSION_MINOR")?),
        _ => major,
    };
    let is = |name: &str, value: &str| env::var(name).is_ok_and(|found| found == value);
    // cargo warns of an argument for cdylibs alone where Cargo.toml names no such crate type. A soname is
    // given to all that is linked, as linkers ignore it for programs; an install name they would refuse.
    if is("CARGO_CFG_TARGET_VENDOR", "apple") {
        println!(
            "cargo::rustc-cdylib-link-arg=-Wl,-install_name,@rpath/libelastic_lora.{abi}.dylib"
        );
    } else if is("CARGO_CFG_TARGET_OS", "android") {
        // Android's packages hold no versioned names.
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

    /// The files whose items are in the header, in its order. cbindgen is given files because it would
    /// walk the whole crate otherwise.
    const SOURCES: [&str; 6] = ["status", "model", "tokenizer", "parts", "linear", "session"];

    /// Writes `elastic_lora.h` to the build's own folder, where `tests/header.rs` finds it.
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
