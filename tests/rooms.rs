//! Checks the order of the crate's modules: each uses only the modules above it, and only the
//! modules below a certain line use Burn.

use std::fs;
use std::path::{Path, PathBuf};

/// The modules of the crate, from the top down. A module may use itself and the modules before it.
const ROOMS: [&str; 26] = [
    "settings", "error", "input", "progress", "threads", "arch", "space", "linalg", "format",
    "sparsity", "quant", "kernels", "io", "data", "search", "runtime", "tasks", "ffi", "nn",
    "adapter", "model", "supernet", "calib", "train", "eval", "merge",
];

/// The last module that does not use Burn.
const LAST_WITHOUT_BURN: &str = "ffi";

fn rank(room: &str) -> Option<usize> {
    ROOMS.iter().position(|known| *known == room)
}

fn source_files(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(source_files(&path));
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files.sort();
    files
}

/// Returns the code of a file without line comments, because documentation may refer to any module.
fn code(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap();
    let lines = text
        .lines()
        .map(|line| line.split("//").next().unwrap_or(""));
    lines.collect::<Vec<_>>().join("\n")
}

/// Returns the modules that follow `crate::` in the code, in paths and in groups such as
/// `crate::{a, b::c}`.
fn named(code: &str) -> Vec<String> {
    let mut names = Vec::new();
    for (at, _) in code.match_indices("crate::") {
        let rest = &code[at + "crate::".len()..];
        let before = code[..at].chars().next_back();
        if before.is_some_and(|c| c.is_alphanumeric() || c == '_') {
            continue;
        }
        let Some(group) = rest.strip_prefix('{') else {
            names.push(rest);
            continue;
        };
        let (mut depth, mut start) = (0, 0);
        for (index, c) in group.char_indices() {
            match c {
                '{' => depth += 1,
                '}' if depth == 0 => {
                    names.push(&group[start..index]);
                    break;
                }
                '}' => depth -= 1,
                ',' if depth == 0 => {
                    names.push(&group[start..index]);
                    start = index + 1;
                }
                _ => {}
            }
        }
    }
    let word = |name: &&str| {
        let word = name.trim_start().chars();
        word.take_while(|c| c.is_alphanumeric() || *c == '_')
            .collect()
    };
    names.iter().map(word).collect()
}

fn room_of(path: &Path, src: &Path) -> Option<String> {
    let first = path.strip_prefix(src).unwrap().components().next()?;
    let name = first.as_os_str().to_str()?.trim_end_matches(".rs");
    (name != "lib").then(|| name.to_string())
}

#[test]
fn a_module_names_only_those_above_it() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut faults = Vec::new();
    for path in source_files(&src) {
        let Some(room) = room_of(&path, &src) else {
            continue;
        };
        let own = rank(&room).unwrap_or_else(|| panic!("`{room}` has no place in the order"));
        for name in named(&code(&path)) {
            if rank(&name).is_some_and(|other| other > own) {
                faults.push(format!("{}: names `{name}`", path.display()));
            }
        }
    }
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn burn_stops_at_the_line() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let last = rank(LAST_WITHOUT_BURN).unwrap();
    for path in source_files(&src) {
        let above = room_of(&path, &src).is_some_and(|room| rank(&room).is_some_and(|r| r <= last));
        let text = code(&path);
        for word in ["burn::", "burn_cubecl", "burn_fusion", "cubecl::"] {
            assert!(
                !(above && text.contains(word)),
                "{} names `{word}`",
                path.display()
            );
        }
    }
}
