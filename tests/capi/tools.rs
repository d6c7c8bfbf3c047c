//! The library as a C user has it, compilers, and programs linked to it.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;

/// What a static link needs beside the library: what rustc says by `--print native-static-libs`.
const SYSTEM: &[&str] = &["-lgcc_s", "-lutil", "-lrt", "-lpthread", "-lm", "-ldl"];

/// The folder of the crate.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A folder of these tests' own, under `target`.
pub fn scratch(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR"))
        .join("capi")
        .join(name);
    let _ = std::fs::remove_dir_all(&path);
    std::fs::create_dir_all(&path).unwrap();
    path
}

/// Whether a tool is there; says so if it is not.
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

/// The C and C++ compilers that there are, each with its language's name: gcc's first.
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

/// Runs a command that must succeed, and gives what it wrote.
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

/// The profile's folder that this test lies in, such as `target/release`.
pub fn profile_dir() -> PathBuf {
    std::env::current_exe()
        .unwrap()
        .parent()
        .unwrap()
        .parent()
        .unwrap()
        .to_path_buf()
}

/// The profile's name.
pub fn profile() -> String {
    let name = profile_dir()
        .file_name()
        .unwrap()
        .to_string_lossy()
        .into_owned();
    if name == "debug" { "dev".into() } else { name }
}

/// Further arguments of rustc: the hooks that only tests have.
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

/// `cargo rustc` on the library with these crate types, as README and CMakeLists.txt have it.
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

/// A folder with the library under all its names. It is built once, into this test's own target folder and profile.
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

/// How a program is linked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    Shared,
    Static,
}

/// A compiler's call up to the output: warnings are errors.
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

/// Links what `command` compiles to the library, and gives the program's path.
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

/// The sources of the C test program.
pub fn c_sources() -> Vec<PathBuf> {
    [
        "main", "dump", "hostile", "order", "overhead", "panic", "threads",
    ]
    .map(|name| root().join("tests/c").join(name).with_extension("c"))
    .to_vec()
}
