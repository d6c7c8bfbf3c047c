//! `examples/inspect` as users see it. `cargo test` builds the example. If it does not exist because
//! this test was built alone, nothing is checked.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use elastic_lora::io::peft::{LoraAdapter, LoraWeights, PeftOptions};
use elastic_lora::io::{DType, HostTensor, tensors::write_safetensors};
use elastic_lora::linalg::Matrix;
use serde_json::{Value, json};

fn shipped_model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/arithmetic-llama")
}

/// Returns a command for the example next to this test's own binary.
fn inspect() -> Option<Command> {
    let test = std::env::current_exe().ok()?;
    let folder = test.parent()?.parent()?.join("examples");
    let path = folder
        .join("inspect")
        .with_extension(std::env::consts::EXE_EXTENSION);
    if !path.is_file() || !shipped_model().join("model.safetensors").is_file() {
        eprintln!("skipped: no example inspect, or no shipped model");
        return None;
    }
    Some(Command::new(path))
}

fn run(arguments: &[&str]) -> Option<Output> {
    Some(inspect()?.args(arguments).output().unwrap())
}

fn report(arguments: &[&str]) -> Option<Value> {
    let output = run(&[arguments, &["--json"]].concat())?;
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{errors}");
    Some(serde_json::from_slice(&output.stdout).unwrap())
}

#[test]
fn a_folder_is_described() {
    let model = shipped_model();
    let model = model.to_str().unwrap();
    let Some(found) = report(&["--model", model]) else {
        return;
    };
    assert_eq!(found["refused"], json!([]));
    assert_eq!(found["model"]["family"], "llama (LlamaForCausalLM)");
    assert_eq!(found["model"]["tokenizer"], "BPE");
    assert!(found["model"]["special_tokens"].is_object());
    let tensors = found["tensors"].as_array().unwrap();
    let names: Vec<&str> = tensors
        .iter()
        .map(|t| t["name"].as_str().unwrap())
        .collect();
    assert!(names.contains(&"model.layers.0.self_attn.q_proj.weight"));
    let sum = |field: &str| {
        tensors
            .iter()
            .map(|t| t[field].as_u64().unwrap())
            .sum::<u64>()
    };
    assert_eq!(found["totals"]["all"]["bytes"], sum("bytes"));
    assert_eq!(found["totals"]["all"]["zeros"], sum("zeros"));
    let quick = report(&["--model", model, "--no-weights"]).unwrap();
    assert_eq!(quick["totals"]["all"]["zeros"], Value::Null);
    assert_eq!(
        quick["totals"]["all"]["parameters"],
        found["totals"]["all"]["parameters"]
    );

    let text = String::from_utf8(run(&["--model", model]).unwrap().stdout).unwrap();
    for part in [
        "family",
        "linear layers",
        "rope theta",
        "nothing would be refused",
    ] {
        assert!(text.contains(part), "{text}");
    }
}

#[test]
fn an_unknown_family_is_listed_nevertheless() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    fs::write(
        path.join("config.json"),
        json!({"model_type": "mamba"}).to_string(),
    )
    .unwrap();
    let tensor = |name: &str, shape: [usize; 2], values: Vec<f32>| {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes());
        HostTensor::from_bytes(name, DType::F32, shape, bytes.collect::<Vec<u8>>())
    };
    let tensors = vec![
        tensor("layers.10.w", [2, 3], vec![0.0, 1.0, 0.0, -0.0, 2.0, 3.0]),
        tensor("layers.2.w", [1, 2], vec![1.0, f32::NAN]),
    ];
    write_safetensors(path.join("model.safetensors"), tensors, &BTreeMap::new()).unwrap();
    let Some(found) = report(&["--model", path.to_str().unwrap()]) else {
        return;
    };
    let parts: Vec<&str> = found["refused"]
        .as_array()
        .unwrap()
        .iter()
        .map(|item| item["part"].as_str().unwrap())
        .collect();
    assert_eq!(parts, ["config.json", "layers.2.w", "tokenizer"]);
    assert!(
        found["refused"][0]["reason"]
            .as_str()
            .unwrap()
            .contains("`mamba`")
    );
    // Blocks are in the order of their numbers.
    assert_eq!(found["tensors"][0]["name"], "layers.2.w");
    assert_eq!(found["tensors"][1]["zeros"], 3);
    assert_eq!(found["tensors"][1]["bits_per_weight"], 32.0);
}

#[test]
fn a_quantized_layer_is_one_weight() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let mut config = json!({
        "model_type": "llama", "hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1,
        "num_attention_heads": 2, "vocab_size": 8, "tie_word_embeddings": true,
    });
    config["quantization_config"] =
        json!({"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"});
    fs::write(path.join("config.json"), config.to_string()).unwrap();
    let awq = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/awq/groups.safetensors");
    fs::copy(awq, path.join("model.safetensors")).unwrap();
    let Some(found) = report(&["--model", path.to_str().unwrap()]) else {
        return;
    };
    let tensors = found["tensors"].as_array().unwrap();
    let name = "model.layers.0.mlp.up_proj.weight";
    let layer = tensors
        .iter()
        .find(|tensor| tensor["name"] == name)
        .unwrap();
    assert_eq!(layer["shape"], json!([32, 64]));
    // 4 bits, and 20 bits for a group of 16.
    assert_eq!(layer["bits_per_weight"], 5.25);
    assert!(layer["zeros"].as_u64().unwrap() > 32 * 64 / 4);
    // The rest of the model is missing.
    assert!(found["refused"].to_string().contains("is missing"));
}

#[test]
fn ids_are_found_in_the_cache() {
    let cache = tempfile::tempdir().unwrap();
    let folder = cache.path().join("models--org--name");
    let snapshot = folder.join("snapshots/0123abcd");
    for folder in [&folder.join("refs"), &folder.join("blobs"), &snapshot] {
        fs::create_dir_all(folder).unwrap();
    }
    fs::write(folder.join("refs/main"), "0123abcd").unwrap();
    for entry in fs::read_dir(shipped_model()).unwrap() {
        let name = entry.unwrap().file_name();
        let blob = folder.join("blobs").join(&name);
        fs::copy(shipped_model().join(&name), &blob).unwrap();
        #[cfg(unix)]
        std::os::unix::fs::symlink(Path::new("../../blobs").join(&name), snapshot.join(&name))
            .unwrap();
        #[cfg(not(unix))]
        fs::copy(&blob, snapshot.join(&name)).unwrap();
    }
    let Some(mut command) = inspect() else { return };
    let output = command
        .env("HF_HUB_CACHE", cache.path())
        .args(["--model", "org/name", "--json"])
        .output()
        .unwrap();
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(found["refused"], json!([]));
    assert_eq!(found["model"]["path"], snapshot.display().to_string());
    assert!(found["model"]["bytes"].as_u64().unwrap() > 100_000);

    for (id, part) in [
        ("org/other", "`hf download org/other`"),
        ("org/name@v2", "`hf download org/name --revision v2`"),
        ("nowhere", "nowhere"),
    ] {
        let output = inspect()
            .unwrap()
            .env("HF_HUB_CACHE", cache.path())
            .args(["--model", id])
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1));
        assert!(text.contains(part), "{text}");
    }
}

#[test]
fn an_adapter_is_described_and_compared_with_its_model() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("adapter");
    let matrix = |rows, cols| Matrix::new(rows, cols, vec![0.5; rows * cols]).unwrap();
    let layer = |rank| LoraWeights::new(matrix(rank, 9), matrix(7, rank), 2.0).unwrap();
    let mut adapter = LoraAdapter::default();
    for (name, rank) in [
        ("0.self_attn.q_proj", 4),
        ("1.self_attn.q_proj", 2),
        ("0.mlp.up_proj", 4),
    ] {
        adapter
            .layers
            .insert(format!("model.layers.{name}"), layer(rank));
    }
    adapter.write(&path, &PeftOptions::new()).unwrap();
    let path = path.to_str().unwrap();
    let Some(found) = report(&["--adapter", path]) else {
        return;
    };
    assert_eq!(found["refused"], json!([]));
    let adapter = &found["adapter"];
    assert_eq!(
        (&adapter["layers"], &adapter["ranks"]),
        (&json!(3), &json!("2 to 4"))
    );
    assert_eq!(
        adapter["ranks_of_targets"],
        json!({"q_proj": "2 to 4", "up_proj": 4})
    );
    assert_eq!(adapter["parameters"], (4 + 2 + 4) * (9 + 7));
    // It does not fit the shipped model.
    let model = shipped_model();
    let found = report(&["--model", model.to_str().unwrap(), "--adapter", path]).unwrap();
    assert_eq!(found["refused"][0]["part"], "adapter");
}

#[test]
fn an_adapter_that_is_refused_is_still_shown() {
    let folder = tempfile::tempdir().unwrap();
    let config = json!({"peft_type": "IA3", "r": 8, "target_modules": ["q_proj"]});
    fs::write(
        folder.path().join("adapter_config.json"),
        config.to_string(),
    )
    .unwrap();
    let Some(found) = report(&["--adapter", folder.path().to_str().unwrap()]) else {
        return;
    };
    assert_eq!(found["adapter"]["kind"], "IA3");
    assert_eq!(found["adapter"]["target_modules"], json!(["q_proj"]));
    assert_eq!(found["refused"][0]["part"], "adapter");
}
