//! Tools of the C API tests: the library as a C user has it, compilers, and programs linked to the
//! library.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;

/// Libraries that a static link needs in addition, as listed by rustc with `--print
/// native-static-libs`.
const SYSTEM: &[&str] = &["-lgcc_s", "-lutil", "-lrt", "-lpthread", "-lm", "-ldl"];

/// Returns the folder of the crate.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Returns a folder under `target` for these tests.
pub fn scratch(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR"))
        .join("capi")
        .join(name);
    let _ = std::fs::remove_dir_all(&path);
    std::fs::create_dir_all(&path).unwrap();
    path
}

/// Returns whether a tool exists, and prints a message if it does not.
pub fn has(tool: &str) -> bool {
    let found = Command::new(tool)
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    let found = found.is_ok_and(|status| status.success());
    if !found {
        eprintln!("skipped: there is no {tool}");
    }
    found
}

/// Returns the available C or C++ compilers, gcc's first.
pub fn compilers(language: &str) -> Vec<&'static str> {
    let all = if language == "c" {
        ["gcc", "clang"]
    } else {
        ["g++", "clang++"]
    };
    all.into_iter().filter(|compiler| has(compiler)).collect()
}

pub fn run(command: &mut Command) -> Output {
    command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error}"))
}

/// Runs a command that must succeed, and returns its output.
pub fn succeed(command: &mut Command) -> String {
    let output = run(command);
    let (out, err) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(
        output.status.success(),
        "{command:?}: {}\n{out}\n{err}",
        output.status
    );
    out.into_owned()
}

/// Returns the profile's folder that this test is in, such as `target/release`.
pub fn profile_dir() -> PathBuf {
    std::env::current_exe()
        .unwrap()
        .parent()
        .unwrap()
        .parent()
        .unwrap()
        .to_path_buf()
}

/// Returns the name of the profile.
pub fn profile() -> String {
    let name = profile_dir()
        .file_name()
        .unwrap()
        .to_string_lossy()
        .into_owned();
    if name == "debug" { "dev".into() } else { name }
}

/// Further arguments of rustc, which enable the hooks for tests.
pub const RUSTC_FLAGS: [&str; 2] = ["--cfg", "elastic_lora_test_hooks"];

pub fn soname() -> String {
    let (major, minor) = (
        env!("CARGO_PKG_VERSION_MAJOR"),
        env!("CARGO_PKG_VERSION_MINOR"),
    );
    let abi = if major == "0" {
        format!("0.{minor}")
    } else {
        major.to_string()
    };
    format!("libelastic_lora.so.{abi}")
}

/// Returns a `cargo rustc` command for the library with these crate types, as in the README and
/// CMakeLists.txt.
pub fn cargo(crate_types: &str, rustc: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command
        .current_dir(root())
        .env("CARGO_TARGET_DIR", profile_dir().parent().unwrap());
    command.args([
        "rustc",
        "--lib",
        "--profile",
        &profile(),
        "--no-default-features",
        "--features",
        "capi",
        "--crate-type",
        crate_types,
    ]);
    command.args(["--locked", "--"]).args(rustc);
    command
}

/// Returns a folder with the library under all its names. It is built once, into the target folder
/// and profile of this test.
pub fn library() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let soname = soname();
        succeed(&mut cargo("cdylib,staticlib", &RUSTC_FLAGS));
        let folder = scratch("lib");
        let shared = profile_dir().join("libelastic_lora.so");
        for name in [soname.as_str(), "libelastic_lora.so"] {
            std::os::unix::fs::symlink(&shared, folder.join(name)).unwrap();
        }
        let fixed = profile_dir().join("libelastic_lora.a");
        std::os::unix::fs::symlink(fixed, folder.join("libelastic_lora.a")).unwrap();
        folder
    })
}

/// Ways to link a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    Shared,
    Static,
}

/// Returns a compiler command without its output. Warnings are errors.
pub fn compile(compiler: &str, standard: &str) -> Command {
    let mut command = Command::new(compiler);
    command.arg(format!("-std={standard}")).args([
        "-Wall",
        "-Wextra",
        "-Wpedantic",
        "-Werror",
        "-g",
        "-O1",
    ]);
    command.arg("-I").arg(root().join("include"));
    command
}

/// Links the output of `command` to the library, and returns the path of the program.
pub fn link(mut command: Command, link: Link, name: &str) -> PathBuf {
    let program = scratch(name).join("program");
    command.arg("-o").arg(&program);
    match link {
        Link::Shared => {
            command
                .arg("-L")
                .arg(library())
                .arg("-lelastic_lora")
                .arg(format!("-Wl,-rpath,{}", library().display()));
            command.args(["-lpthread", "-lm"]);
        }
        Link::Static => {
            command
                .arg(library().join("libelastic_lora.a"))
                .args(SYSTEM);
        }
    }
    succeed(&mut command);
    program
}

/// Returns the sources of the C test program.
pub fn c_sources() -> Vec<PathBuf> {
    [
        "main",
        "adapt",
        "dump",
        "hostile",
        "hostile_loop",
        "order",
        "overhead",
        "panic",
        "threads",
    ]
    .map(|name| root().join("tests/c").join(name).with_extension("c"))
    .to_vec()
}
