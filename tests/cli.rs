//! The examples as users see them: what they refuse, with which message, and which files they
//! leave. `cargo test` builds the examples. If they do not exist because this test was built alone,
//! nothing is checked.
#![cfg(feature = "flex")]

#[allow(dead_code)]
#[path = "../examples/compress/report.rs"]
mod report;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

fn shipped_model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/arithmetic-llama")
}

/// Returns a command for the example next to this test's own binary, to be run in `folder`.
fn example(name: &str, folder: &Path) -> Option<Command> {
    let test = std::env::current_exe().ok()?;
    let path = test
        .parent()?
        .parent()?
        .join("examples")
        .join(name)
        .with_extension(std::env::consts::EXE_EXTENSION);
    if !path.is_file() || !shipped_model().join("model.safetensors").is_file() {
        eprintln!("skipped: no example {name}, or no shipped model");
        return None;
    }
    let mut command = Command::new(path);
    command.current_dir(folder);
    Some(command)
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Writes `n` problems in GSM8K's form.
fn problems(path: &Path, n: usize) {
    let line = |i: usize| {
        let (a, b) = (11 + i, 3 + 2 * i);
        format!(
            "{{\"question\": \"Tom has {a} pens and finds {b} more. How many pens does Tom have now?\", \
             \"answer\": \"{a} + {b} = {0}\\n#### {0}\"}}\n",
            a + b
        )
    };
    std::fs::write(path, (0..n).map(line).collect::<String>()).unwrap();
}

fn entries(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(folder)
        .unwrap()
        .map(|e| e.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

#[test]
fn bad_arguments_are_named_at_once_and_leave_nothing() {
    let root = tempfile::tempdir().unwrap();
    std::fs::write(root.path().join("empty.txt"), "").unwrap();
    problems(&root.path().join("p.jsonl"), 4);
    let before = entries(root.path());
    let cases: [(&str, &[&str], &str); 32] = [
        ("compress", &["--sparsity", "1.5"], "sparsity"),
        ("compress", &["--sparsity", "NaN"], "sparsity"),
        ("compress", &["--pattern", "4:2"], "4:2"),
        ("compress", &["--ranks", "0"], "ranks"),
        ("compress", &["--ranks", "65,8"], "k_proj"),
        ("compress", &["--ranks", "99999999999"], "99999999999"),
        ("compress", &["--groups", "q_proj,foo"], "`foo`"),
        ("compress", &["--search", "foo"], "--search"),
        ("compress", &["--cost", "foo"], "--cost"),
        ("compress", &["--steps", "0"], "steps"),
        ("compress", &["--batch", "0"], "batch"),
        ("compress", &["--evals", "0"], "evals"),
        ("compress", &["--device", "foo"], "device"),
        ("compress", &["--max-len", "129"], "max-len"),
        (
            "compress",
            &["--train", "empty.txt", "--valid", "p.jsonl"],
            "empty.txt",
        ),
        (
            "compress",
            &[
                "--model", "nowhere", "--train", "p.jsonl", "--valid", "p.jsonl",
            ],
            "nowhere",
        ),
        ("compress", &["--bits", "5"], "bits"),
        ("compress", &["--group-size", "0"], "group-size"),
        (
            "compress",
            &["--method", "sqft", "--group-size", "256"],
            "group-size",
        ),
        (
            "compress",
            &[
                "--method",
                "sqft",
                "--bits",
                "3",
                "--file-format",
                "compressed-tensors",
            ],
            "3",
        ),
        (
            "compress",
            &[
                "--method",
                "table2",
                "--quantize",
                "joint",
                "--qa-start",
                "sparse",
            ],
            "qa-start",
        ),
        ("compress", &["--quantize", "foo"], "--quantize"),
        ("evaluate", &["--text", "empty.txt"], "empty.txt"),
        (
            "evaluate",
            &["--text", "p.jsonl", "--context", "129"],
            "129",
        ),
        ("evaluate", &["--adapter", "nowhere"], "nowhere"),
        ("generate", &["--temperature", "-1"], "temperature"),
        ("generate", &["--min-p", "1"], "min_p"),
        ("generate", &["--format", "int5"], "int5"),
        ("generate", &["--subnet", "small"], "small"),
        ("generate", &["--threads", "4097"], "n_threads"),
        ("generate", &["--model", "empty.txt"], "empty.txt"),
        ("pretrain", &["--out", "."], "not empty"),
    ];
    for (name, arguments, named) in cases {
        let Some(mut command) = example(name, root.path()) else {
            return;
        };
        if name == "compress" {
            command.args(["--out", "out"]);
        }
        // A negative number would be parsed as an option.
        let arguments: Vec<String> = match arguments {
            [option, value] => vec![format!("{option}={value}")],
            more => more.iter().map(ToString::to_string).collect(),
        };
        let output = command.args(&arguments).output().unwrap();
        let text = stderr(&output);
        assert_eq!(
            output.status.code(),
            Some(1),
            "{name} {arguments:?}: {text}"
        );
        assert!(
            text.starts_with("error: ") && text.contains(named),
            "{name} {arguments:?}: {text}"
        );
        assert!(!text.contains("panicked"), "{name} {arguments:?}: {text}");
        assert_eq!(entries(root.path()), before, "{name} {arguments:?}");
    }
}

#[test]
fn a_run_goes_on_only_as_it_began_and_removes_only_its_own() {
    let root = tempfile::tempdir().unwrap();
    problems(&root.path().join("train.jsonl"), 24);
    problems(&root.path().join("valid.jsonl"), 6);
    let out = root.path().join("out");
    let run = |more: &[&str]| -> Option<Output> {
        let mut command = example("compress", root.path())?;
        command.args([
            "--train",
            "train.jsonl",
            "--valid",
            "valid.jsonl",
            "--method",
            "lora",
            "--steps",
            "3",
        ]);
        Some(
            command
                .args(["--batch", "4", "--out", "out"])
                .args(more)
                .output()
                .unwrap(),
        )
    };
    let rows = || {
        let text = std::fs::read(out.join("report.json")).unwrap();
        serde_json::from_slice::<serde_json::Value>(&text).unwrap()["rows"].clone()
    };
    let Some(first) = run(&[]) else { return };
    assert!(first.status.success(), "{}", stderr(&first));
    let expected = rows();
    std::fs::remove_file(out.join("report.json")).unwrap();
    assert!(run(&["--resume"]).unwrap().status.success());
    assert_eq!(rows(), expected);
    for (argument, named) in [
        ("--sparsity=0.6", "--sparsity"),
        ("--seed=1", "--seed"),
        ("--ranks=8", "--ranks"),
    ] {
        let refused = run(&["--resume", argument]).unwrap();
        let text = stderr(&refused);
        assert!(
            refused.status.code() == Some(1) && text.contains(named),
            "{text}"
        );
    }
    problems(&root.path().join("train.jsonl"), 23);
    let text = stderr(&run(&["--resume"]).unwrap());
    assert!(text.contains("training data"), "{text}");

    assert!(stderr(&run(&[]).unwrap()).contains("--overwrite"));
    std::fs::write(out.join("notes.txt"), "mine").unwrap();
    assert!(run(&["--overwrite"]).unwrap().status.success());
    assert_eq!(
        entries(&out),
        ["lora", "notes.txt", "pruned", "report.json", "run.json"]
    );
    // A folder that no run made is not changed at all.
    std::fs::remove_file(out.join("run.json")).unwrap();
    let before = entries(&out);
    assert!(stderr(&run(&["--overwrite"]).unwrap()).contains("run.json"));
    assert_eq!(entries(&out), before);
}

#[test]
fn a_bundle_answers_as_its_folder_does() {
    let root = tempfile::tempdir().unwrap();
    let run = |arguments: &[&str]| -> Option<Output> {
        Some(
            example("generate", root.path())?
                .args(arguments)
                .output()
                .unwrap(),
        )
    };
    let Some(folder) = run(&[]) else { return };
    let saved = run(&["--save", "model.elora", "--format", "f32"]).unwrap();
    assert!(
        saved.status.success() && saved.stdout.is_empty(),
        "{}",
        stderr(&saved)
    );
    for more in [
        &[][..],
        &["--half-cache", "--threads", "1"],
        &["--format", "f16"],
    ] {
        let bundle = run(&[&["--model", "model.elora"], more].concat()).unwrap();
        assert!(bundle.status.success(), "{}", stderr(&bundle));
        assert_eq!(bundle.stdout, folder.stdout);
    }
    assert!(String::from_utf8_lossy(&folder.stdout).contains("#### 41"));
    assert_eq!(run(&["--device", "flex"]).unwrap().stdout, folder.stdout);
    // Codes take less space. Existing files are only replaced on request.
    let bytes = || {
        std::fs::metadata(root.path().join("model.elora"))
            .unwrap()
            .len()
    };
    let before = bytes();
    let text = stderr(&run(&["--save", "model.elora", "--format", "int4"]).unwrap());
    assert!(
        text.starts_with("error: ") && text.contains("model.elora"),
        "{text}"
    );
    assert!(
        run(&["--save", "model.elora", "--format", "int4", "--overwrite"])
            .unwrap()
            .status
            .success()
    );
    assert!(3 * bytes() < before);
    assert!(run(&["--model", "model.elora"]).unwrap().status.success());
}

#[test]
fn table_2_measures_sparse_integers_as_written() {
    let root = tempfile::tempdir().unwrap();
    problems(&root.path().join("train.jsonl"), 12);
    problems(&root.path().join("valid.jsonl"), 3);
    let out = root.path().join("out");
    let run = |more: &[&str]| -> Option<Output> {
        let mut command = example("compress", root.path())?;
        command.args([
            "--train",
            "train.jsonl",
            "--valid",
            "valid.jsonl",
            "--method",
            "table2",
            "--steps",
            "2",
        ]);
        Some(
            command
                .args(["--batch", "4", "--bits", "4", "--out", "out"])
                .args(more)
                .output()
                .unwrap(),
        )
    };
    let report = || -> serde_json::Value {
        serde_json::from_slice(&std::fs::read(out.join("report.json")).unwrap()).unwrap()
    };
    let Some(first) = run(&[]) else { return };
    assert!(first.status.success(), "{}", stderr(&first));
    let expected = report()["rows"].clone();
    let row = |name: &str| {
        expected
            .as_array()
            .unwrap()
            .iter()
            .find(|row| row["name"] == name)
            .unwrap()
            .clone()
    };
    let precisions = [
        ("base", "F16"),
        ("pruned, rounded to nearest", "INT4"),
        ("LoRA", "F16 + F16"),
        ("Shears", "F16 + F16"),
        ("SparsePEFT, merged", "F16, merged"),
        ("SparsePEFT, merged, then GPTQ", "INT4"),
        ("SQFT", "INT4 + F16"),
        ("SQFT + QA-SparsePEFT", "INT4, merged"),
    ];
    for (name, precision) in precisions {
        assert_eq!(row(name)["precision"], precision, "{name}");
    }
    assert_eq!(row("LoRA")["relative"], 1.0);
    // No zero is lost on the way, and rounding adds some.
    let sparsity = |name: &str| row(name)["sparsity"].as_f64().unwrap();
    let merged = sparsity("SQFT + QA-SparsePEFT");
    assert!(
        (0.49..0.51).contains(&sparsity("SparsePEFT, merged")) && (0.49..0.75).contains(&merged),
        "{merged}"
    );
    let bytes = |name: &str| row(name)["bytes"].as_u64().unwrap();
    assert_eq!(
        bytes("base"),
        std::fs::metadata(shipped_model().join("model.safetensors"))
            .unwrap()
            .len()
    );
    assert!(bytes("SQFT + QA-SparsePEFT") < bytes("SQFT") && bytes("SQFT") < bytes("LoRA"));
    assert!(3 * bytes("SQFT + QA-SparsePEFT") < 2 * bytes("base"));

    let resumed = run(&["--resume"]).unwrap();
    assert!(resumed.status.success(), "{}", stderr(&resumed));
    assert_eq!(report()["rows"], expected);
    // All files and folders that a run makes are listed, so the next run removes all of them.
    let overwrite = ["--overwrite", "--method", "sqft-sparse-peft"];
    let mut command = example("compress", root.path()).unwrap();
    command.args([
        "--train",
        "train.jsonl",
        "--valid",
        "valid.jsonl",
        "--steps",
        "2",
        "--batch",
        "4",
        "--out",
        "out",
    ]);
    assert!(command.args(overwrite).output().unwrap().status.success());
    let listed = [
        "merge_report.json",
        "merged",
        "merged_ranks.json",
        "merged_space.json",
        "merged_subnet.json",
        "pruned",
    ];
    assert_eq!(
        entries(&out),
        [&listed[..], &["report.json", "run.json", "sparse-peft"]].concat()
    );
}

/// Number of rounds of a test that takes long; `ELASTIC_LORA_ROUNDS` sets another.
fn rounds(usual: usize) -> usize {
    std::env::var("ELASTIC_LORA_ROUNDS").map_or(usual, |n| n.parse().unwrap())
}

/// A command that trains for some steps in the folder `out`.
fn training(root: &Path) -> Option<Command> {
    let mut command = example("compress", root)?;
    command.args(["--train", "train.jsonl", "--valid", "valid.jsonl"]);
    command.args(["--method", "lora", "--steps", "3", "--batch", "2"]);
    command.args(["--out", "out"]);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    Some(command)
}

#[test]
fn of_several_runs_in_one_folder_one_goes_on() {
    let root = tempfile::tempdir().unwrap();
    problems(&root.path().join("train.jsonl"), 6);
    problems(&root.path().join("valid.jsonl"), 2);
    let out = root.path().join("out");
    for round in 0..rounds(1) {
        for n in [2, 8] {
            let mut running = Vec::new();
            for _ in 0..n {
                let Some(mut command) = training(root.path()) else {
                    return;
                };
                running.push(command.spawn().unwrap());
            }
            let ended = running
                .into_iter()
                .map(|one| one.wait_with_output().unwrap());
            let (good, refused): (Vec<_>, Vec<_>) = ended.partition(|o| o.status.success());
            assert_eq!(good.len(), 1, "{n} in round {round}");
            for output in refused {
                let text = stderr(&output);
                assert_eq!(output.status.code(), Some(1), "{text}");
                // Whoever comes after the first one has ended finds its results.
                let named = text.contains("process ") && text.contains("is writing here");
                assert!(named || text.contains("--overwrite"), "{text}");
            }
            assert_eq!(entries(&out), ["lora", "pruned", "report.json", "run.json"]);
            std::fs::remove_dir_all(&out).unwrap();
        }
    }
}

#[test]
fn a_run_that_was_killed_at_its_start_is_no_obstacle() {
    let root = tempfile::tempdir().unwrap();
    problems(&root.path().join("train.jsonl"), 6);
    problems(&root.path().join("valid.jsonl"), 2);
    let out = root.path().join("out");
    for option in ["", "--resume", "--overwrite"] {
        std::fs::create_dir(&out).unwrap();
        // What is there before `run.json` has its name.
        for name in ["run.lock", ".run.json-a1B2c3.tmp", ".run.json.lock"] {
            std::fs::write(out.join(name), "1").unwrap();
        }
        let Some(mut command) = training(root.path()) else {
            return;
        };
        let output = command
            .args([option].iter().filter(|o| !o.is_empty()))
            .output()
            .unwrap();
        assert!(output.status.success(), "{option}: {}", stderr(&output));
        assert_eq!(entries(&out), ["lora", "pruned", "report.json", "run.json"]);
        std::fs::remove_dir_all(&out).unwrap();
    }
}

/// Everything below a folder but for times, as names and contents.
#[cfg(unix)]
fn contents(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut all = Vec::new();
    let mut open = vec![folder.to_path_buf()];
    while let Some(at) = open.pop() {
        for entry in std::fs::read_dir(at).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
                continue;
            }
            let mut bytes = std::fs::read(&path).unwrap();
            let name = path.strip_prefix(folder).unwrap().to_path_buf();
            if name == Path::new("report.json") {
                let report: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
                bytes = report["rows"].to_string().into_bytes();
            }
            // They hold the seconds of each evaluation; `search.jsonl` holds the same without a plot.
            if name.to_string_lossy().starts_with("search_progression") {
                bytes.clear();
            }
            if name.ends_with("search.jsonl") {
                let text = String::from_utf8(bytes).unwrap();
                let without = |line: &str| {
                    let mut line: serde_json::Value = serde_json::from_str(line).unwrap();
                    line["seconds"] = 0.into();
                    line.to_string()
                };
                bytes = text
                    .lines()
                    .map(without)
                    .collect::<Vec<_>>()
                    .join("\n")
                    .into_bytes();
            }
            all.push((name, bytes));
        }
    }
    all.sort();
    all
}

/// `ELASTIC_LORA_ROUNDS=100 cargo test --release --test cli -- --ignored` kills a hundred runs.
#[cfg(unix)]
#[test]
#[ignore = "takes some seconds for each killed run"]
fn killed_runs_are_resumed_with_the_same_results() {
    use rand::{RngExt, SeedableRng};
    let root = tempfile::tempdir().unwrap();
    problems(&root.path().join("train.jsonl"), 12);
    problems(&root.path().join("valid.jsonl"), 3);
    let out = root.path().join("out");
    let command = |more: &[&str]| {
        let mut command = example("compress", root.path())?;
        command.args(["--train", "train.jsonl", "--valid", "valid.jsonl"]);
        command.args([
            "--method", "shears", "--steps", "8", "--batch", "2", "--evals", "4",
        ]);
        command.args(["--out", "out"]).args(more);
        command.stdout(Stdio::null()).stderr(Stdio::piped());
        Some(command)
    };
    let Some(mut first) = command(&[]) else {
        return;
    };
    let started = std::time::Instant::now();
    let output = first.output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let whole = started.elapsed();
    let expected = contents(&out);
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(22);
    let mut n_killed = 0;
    for round in 0..rounds(10) {
        std::fs::remove_dir_all(&out).unwrap();
        let mut running = command(&[]).unwrap().spawn().unwrap();
        // Killed up to three times, then left to end.
        for _ in 0..rng.random_range(1..4) {
            std::thread::sleep(whole.mul_f64(rng.random_range(0.0..1.1)));
            n_killed += usize::from(running.try_wait().unwrap().is_none());
            running.kill().unwrap();
            running.wait().unwrap();
            running = command(&["--resume"]).unwrap().spawn().unwrap();
        }
        let output = running.wait_with_output().unwrap();
        assert!(
            output.status.success(),
            "round {round}: {}",
            stderr(&output)
        );
        let found = contents(&out);
        let names = |all: &[(PathBuf, Vec<u8>)]| -> Vec<PathBuf> {
            all.iter().map(|(name, _)| name.clone()).collect()
        };
        assert_eq!(names(&found), names(&expected), "round {round}");
        for ((name, found), (_, expected)) in found.iter().zip(&expected) {
            assert!(found == expected, "round {round}: {}", name.display());
        }
    }
    eprintln!("{n_killed} runs were killed");
}
