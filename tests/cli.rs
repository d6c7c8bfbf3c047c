//! The examples as users see them: what they refuse, with which message, and which files they
//! leave. `cargo test` builds the examples. If they do not exist because this test was built alone,
//! nothing is checked.
#![cfg(feature = "flex")]

#[allow(dead_code)]
#[path = "../examples/compress/report.rs"]
mod report;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

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
    let cases: [(&str, &[&str], &str); 34] = [
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
            &["--calibration-samples", "0"],
            "calibration-samples",
        ),
        (
            "compress",
            &["--calibration-length", "129"],
            "calibration-length",
        ),
        ("compress", &["--calibration", "nowhere"], "nowhere"),
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

#[test]
fn records_that_do_not_fit_are_named_and_the_rest_goes_on() {
    let root = tempfile::tempdir().unwrap();
    let write = |name: &str, lines: &[String]| {
        std::fs::write(root.path().join(name), lines.join("\n")).unwrap();
    };
    let record = |question: &str, answer: &str| {
        serde_json::json!({"question": question, "answer": answer}).to_string()
    };
    let sum = |i: usize| record(&format!("What is {i} + 1?"), &format!("#### {}", i + 1));
    let long = "Say hello to everybody in the house. ".repeat(40);
    let train = [
        sum(1),
        record(&long, "#### 1"),
        sum(2),
        record("Say nothing.", ""),
        r#"{"question": "What is 2 + 3?", "answer": 5}"#.into(),
    ];
    write("train.jsonl", &train);
    let valid = [sum(4), record("Explain.", "I cannot say."), sum(5)];
    write("valid.jsonl", &valid);
    write("test.jsonl", &[sum(6), record(&long, "#### 1")]);
    write("text.txt", &["Tom has 3 pens and finds 4 more.".into()]);
    write("long.jsonl", &[record(&long, "#### 1")]);
    let run = |more: &[&str]| -> Option<Output> {
        let mut command = example("compress", root.path())?;
        command.args(["--method", "lora", "--steps", "2", "--batch", "2"]);
        command.args(["--out", "out", "--overwrite"]);
        Some(command.args(more).output().unwrap())
    };
    let files = ["--train", "train.jsonl", "--valid", "valid.jsonl"];
    let Some(output) = run(&[&files[..], &["--test", "test.jsonl"]].concat()) else {
        return;
    };
    let text = stderr(&output);
    assert!(output.status.success(), "{text}");
    for said in [
        "train.jsonl: 2 of 5 records are left out: record 2: ",
        "they end before its answer; record 4: it has no answer",
        "valid.jsonl: 1 of 3 records are not counted in the accuracy: record 2: it has no final answer",
        "test.jsonl: 1 of 2 records are left out: record 2: ",
        "test.jsonl: 1 of 2 records are not counted in the accuracy: record 2: a prompt of ",
        "calibration: ",
    ] {
        assert!(text.contains(said), "no {said}: {text}");
    }
    let shown = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(shown.contains("accuracy"), "{shown}");

    // Packed, with a calibration text that is shorter than a sample.
    let more = ["--pack", "--calibration", "text.txt", "--max-len", "60"];
    let output = run(&[&files[..], &more].concat()).unwrap();
    let text = stderr(&output);
    assert!(output.status.success(), "{text}");
    for said in [
        "3 examples are packed into 2 sequences",
        "calibration: 1 sample of ",
        " tokens from text.txt, not 128 of 128: it has only ",
    ] {
        assert!(text.contains(said), "no {said}: {text}");
    }
    let more = ["--calibration-samples=2", "--calibration-length=16"];
    let text = stderr(&run(&[&files[..], &more].concat()).unwrap());
    let said = "calibration: 2 samples of 16 tokens from train.jsonl\n";
    assert!(text.contains(said), "{text}");

    // Nothing fits.
    let output = run(&["--train", "long.jsonl", "--valid", "valid.jsonl"]).unwrap();
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(
        text.contains("long.jsonl") && text.contains("record 1: "),
        "{text}"
    );
}
