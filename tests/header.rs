//! Checks that `include/elastic_lora.h` is what the build script generates from `src/ffi`. To run
//! the check:
//!
//! ```sh
//! cargo test --release --no-default-features --features header --test header
//! ```
//!
//! With `ELASTIC_LORA_WRITE_HEADER=1` in the environment, this writes the header instead, and adds
//! its new declarations to `tests/c/abi-1.txt`, which holds those that programs may rely on.

use std::collections::BTreeMap;

/// Declarations of a binary interface by name, in the order of the header, each on one line.
fn declarations(header: &str) -> Vec<(String, String)> {
    let header = header.split_once("*/").map_or(header, |(_, rest)| rest);
    let lines = header.lines().filter(|line| !line.starts_with("//"));
    let (mut found, mut open, mut depth) = (Vec::new(), String::new(), 0);
    for line in lines {
        if line.starts_with('#') {
            let mut words = line.split_whitespace();
            let value = (words.next(), words.next(), words.clone().next());
            if let (Some("#define"), Some(name), Some(_)) = value {
                let value: Vec<&str> = words.collect();
                found.push((name.into(), format!("#define {name} {}", value.join(" "))));
            }
            continue;
        }
        let code = line.split("//").next().unwrap_or_default();
        if code.starts_with("extern") || (code.starts_with('}') && depth == 0) {
            continue;
        }
        for part in code.split_inclusive([';', '{', '}']) {
            open.push_str(part);
            open.push(' ');
            depth += i32::from(part.ends_with('{')) - i32::from(part.ends_with('}'));
            if depth == 0 && part.ends_with(';') {
                let words: Vec<&str> = open.split_whitespace().collect();
                let text = words.join(" ").replace(" ;", ";");
                found.push((name_of(&text), text));
                open.clear();
            }
        }
    }
    assert!(open.trim().is_empty(), "{open}");
    found
}

/// Name of a function, a type or a type of functions.
fn name_of(declaration: &str) -> String {
    let before = match declaration.find('{') {
        Some(_) => declaration.trim_end_matches(';'),
        None => match declaration.find("(*") {
            Some(at) => {
                let name = &declaration[at + 2..];
                return name[..name.find(')').unwrap()].into();
            }
            None => declaration.split(['(', ';']).next().unwrap(),
        },
    };
    before.split([' ', '*']).next_back().unwrap().to_string()
}

/// Whether `new` is `old`, or the same struct with more fields at its end, which its size makes
/// safe.
fn goes_on(old: &str, new: &str) -> bool {
    let fields = |text: &str| text.rfind('}').map(|at| text[..at].trim_end().to_string());
    let (Some(first), Some(more)) = (fields(old), fields(new)) else {
        return old == new;
    };
    old == new || (old.contains("{ size_t struct_size;") && more.starts_with(&first))
}

/// Functions, constants and structs of version 1 of the binary interface stay as they are.
#[test]
fn the_binary_interface_only_grows() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/c/abi-1.txt");
    let header = include_str!(concat!(env!("OUT_DIR"), "/elastic_lora.h"));
    let new = declarations(header);
    let stored = std::fs::read_to_string(path).unwrap_or_default();
    let old: Vec<(String, &str)> = stored
        .lines()
        .map(|line| (define_or_name(line), line))
        .collect();
    let now: BTreeMap<&str, &str> = new
        .iter()
        .map(|(n, text)| (n.as_str(), text.as_str()))
        .collect();
    assert_eq!(now.len(), new.len(), "a name is declared twice");
    for (name, line) in &old {
        let found = now.get(name.as_str()).copied().unwrap_or("nothing");
        assert!(
            goes_on(line, found),
            "{name} is part of ELORA_ABI_VERSION 1 and may not change:\n{line}\n{found}"
        );
    }
    let known =
        |name: &str| old.iter().any(|(old, _)| old == name) || name.starts_with("ELORA_VERSION_");
    let added: Vec<&str> = new
        .iter()
        .filter(|(name, _)| !known(name))
        .map(|(_, text)| text.as_str())
        .collect();
    if !added.is_empty() && std::env::var_os("ELASTIC_LORA_WRITE_HEADER").is_some_and(|v| v == "1")
    {
        std::fs::write(path, stored + &added.join("\n") + "\n").unwrap();
        return;
    }
    assert!(
        added.is_empty(),
        "not in tests/c/abi-1.txt, to which ELASTIC_LORA_WRITE_HEADER=1 adds them: {added:#?}"
    );
}

/// Name of a line of `abi-1.txt`.
fn define_or_name(line: &str) -> String {
    match line.strip_prefix("#define ") {
        Some(rest) => rest.split(' ').next().unwrap_or_default().into(),
        None => name_of(line),
    }
}

#[test]
fn changes_of_the_interface_are_seen() {
    let old = "typedef struct a { size_t struct_size; int32_t x; } a;";
    let more = "typedef struct a { size_t struct_size; int32_t x; float y; } a;";
    let moved = "typedef struct a { size_t struct_size; float y; int32_t x; } a;";
    assert!(goes_on(old, old) && goes_on(old, more));
    assert!(!goes_on(more, old) && !goes_on(old, moved));
    let bare = "typedef struct b { int32_t x; } b;";
    assert!(!goes_on(
        bare,
        "typedef struct b { int32_t x; float y; } b;"
    ));
    assert!(!goes_on("int f(int x);", "int f(long x);") && !goes_on("int f(void);", "nothing"));
    let found = declarations(
        "/* */\n#ifndef H\n#define H\nextern \"C\" {\n// c\n#define A_B 3\ntypedef struct s s;\n\
         typedef bool (*call)(void *x,\n    int y);\nint f(const s *x,\n    int y); // c\n} // end\n",
    );
    let names: Vec<&str> = found.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["A_B", "s", "call", "f"]);
    assert_eq!(found[3].1, "int f(const s *x, int y);");
}

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
