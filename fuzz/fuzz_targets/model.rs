//! Model files of every kind, and folders: the first byte says which file is fuzzed.
#![no_main]

use elastic_lora::io::{Checkpoint, Gguf, HfConfig};
use elastic_lora::runtime::{Model, ModelOptions, Verify};
use libfuzzer_sys::fuzz_target;

const CONFIG: &str = r#"{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 8, "hidden_size": 4,
    "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1, "max_position_embeddings": 16}"#;

fuzz_target!(|data: &[u8]| {
    let Some((kind, data)) = data.split_first() else {
        return;
    };
    let folder = tempfile::tempdir().expect("a temporary folder");
    let names = ["model.safetensors", "config.json", "model.safetensors.index.json", "m.gguf", "m.elora"];
    std::fs::write(folder.path().join("config.json"), CONFIG).expect("a file");
    let path = folder.path().join(names[usize::from(*kind) % names.len()]);
    std::fs::write(&path, data).expect("a file");
    let options = ModelOptions::default().with_n_threads(1).with_verify(Verify::OnOpen);
    for path in [path.as_path(), folder.path()] {
        let _ = Model::open(path, &options);
        let _ = HfConfig::open(path);
        let _ = Gguf::open(path);
        if let Ok(file) = Checkpoint::open(path) {
            for name in file.names() {
                let _ = file.load_f32(name);
            }
        }
    }
});
