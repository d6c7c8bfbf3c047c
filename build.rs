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

    use cbindgen::{Builder, Config};

    /// The sections of the header in their order: source files of `src/ffi`, and what stands above
    /// their items. cbindgen is given files because it would otherwise walk the whole crate.
    const SECTIONS: [(&[&str], &str); 8] = [
        (&["status"], "Versions, statuses and error texts"),
        (&["model"], "Models: loading, listing, subnets, saving"),
        (
            &["convert"],
            "Other formats, and loading from memory or a file descriptor",
        ),
        (
            &["tokenizer", "text"],
            "Text: tokens, special tokens, chat templates, text while tokens come",
        ),
        (
            &["session"],
            "Sessions: sequences on a model, and generation",
        ),
        (
            &["batch"],
            "Sessions of a server: batches, copies, states, interruption",
        ),
        (
            &["sampler", "adapter"],
            "Samplers for a loop of your own, and LoRA adapters at run time",
        ),
        (
            &["parts", "linear"],
            "Parts of a model for an engine of your own: embedding, norms, linear layers",
        ),
    ];

    /// Writes `elastic_lora.h` to the build's output folder, where `tests/header.rs` reads it.
    pub fn write() -> Result<(), Box<dyn Error>> {
        println!("cargo::rerun-if-changed=cbindgen.toml");
        let config = Config::from_file("cbindgen.toml")?;
        let mut text = String::new();
        for (sources, title) in SECTIONS {
            let line = "-".repeat(96usize.saturating_sub(title.len()));
            text.push_str(&format!("\n// --- {title} {line}\n\n"));
            for source in sources {
                text.push_str(section(&config, source)?.trim_start());
            }
        }
        // The frame around the items, which belongs to no source file.
        let guard = config.include_guard.clone().unwrap_or_default();
        let comment = config.header.clone().unwrap_or_default();
        let includes = config.sys_includes.iter();
        let includes: String = includes
            .map(|name| format!("#include <{name}>\n"))
            .collect();
        let header = format!(
            "{}\n\n#ifndef {guard}\n#define {guard}\n\n{includes}\n\
             #ifdef __cplusplus\nextern \"C\" {{\n#endif // __cplusplus\n{text}\n\
             #ifdef __cplusplus\n}} // extern \"C\"\n#endif // __cplusplus\n\n\
             #endif // {guard}\n",
            comment.trim()
        );
        let path = Path::new(&env::var("OUT_DIR")?).join("elastic_lora.h");
        std::fs::write(path, header)?;
        Ok(())
    }

    /// Returns the items of a source file.
    fn section(config: &Config, source: &str) -> Result<String, Box<dyn Error>> {
        let path = Path::new("src/ffi").join(source).with_extension("rs");
        println!("cargo::rerun-if-changed={}", path.display());
        let config = Config {
            header: None,
            include_guard: None,
            sys_includes: Vec::new(),
            cpp_compat: false,
            ..config.clone()
        };
        let mut bytes = Vec::new();
        let items = Builder::new().with_config(config).with_src(path);
        items.generate()?.write(&mut bytes);
        Ok(String::from_utf8(bytes)?)
    }
}
