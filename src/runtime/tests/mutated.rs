//! GGUF files and configs of every family, with bytes changed: each is refused or runs.

use std::fs;
use std::path::{Path, PathBuf};

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::input::rounds;
use crate::io::{Gguf, GgufOptions, GgufType, write_gguf};
use crate::runtime::{Model, ModelOptions, Session, SessionConfig};

/// Opens a model and runs some tokens; the result does not matter, that there is one does.
fn exercise(path: &Path) -> bool {
    if path.is_file() {
        let _ = Gguf::open(path).map(|file| file.tokenizer().is_ok());
    }
    let options = ModelOptions::default().with_n_threads(1);
    let Ok(model) = Model::open(path, &options) else {
        return false;
    };
    let config = SessionConfig::default().with_n_ctx(8);
    let Ok(mut session) = Session::new(&model, &config) else {
        return false;
    };
    let mut logits = vec![0.0; model.config().vocab_size()];
    session.decode(&[1, 2, 3], Some(&mut logits)).is_ok()
}

/// Changes some bytes before `end`.
fn mutate(bytes: &mut Vec<u8>, end: usize, kind: usize, rng: &mut ChaCha8Rng) {
    for _ in 0..rng.random_range(1..4) {
        let at = rng.random_range(0..end);
        bytes[at] = match kind {
            0 => rng.random(),
            1 => b"0123456789.-e\x00\x08\xFF"[rng.random_range(0..16)],
            _ => bytes[at] ^ (1 << rng.random_range(0..8)),
        };
    }
    if rng.random_bool(0.05) {
        bytes.truncate(rng.random_range(0..=bytes.len()));
    }
}

#[test]
fn models_of_all_families_are_refused_or_run() {
    let root = tempfile::tempdir().unwrap();
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/families");
    let mut folders: Vec<PathBuf> = fs::read_dir(fixtures)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.join("config.json").is_file())
        .collect();
    folders.sort();
    // Each file with the number of its bytes that are no weights.
    let mut files = Vec::new();
    for folder in &folders {
        let path = root.path().join("m.gguf");
        let options = GgufOptions::default().with_overwrite(true);
        for kind in [GgufType::F16, GgufType::Q8_0] {
            let options = GgufOptions {
                linears: Some(kind),
                ..options.clone()
            };
            // Some have sizes or positions that GGUF cannot say.
            if write_gguf(folder, &path, &options).is_ok() {
                let bytes = fs::read(&path).unwrap();
                let header = bytes.len().min(6000);
                files.push((bytes, header));
            }
        }
    }
    assert!(files.len() > folders.len(), "{}", files.len());
    let mut rng = ChaCha8Rng::seed_from_u64(8);
    let (n, mut ran) = (rounds(2000), [0, 0]);
    let path = root.path().join("mutated.gguf");
    for round in 0..n {
        let (bytes, header) = &files[round / 3 % files.len()];
        let mut bytes = bytes.clone();
        mutate(&mut bytes, *header, round % 3, &mut rng);
        fs::write(&path, &bytes).unwrap();
        ran[0] += usize::from(exercise(&path));
    }
    let copy = root.path().join("folder");
    for round in 0..n {
        let folder = &folders[round / 3 % folders.len()];
        if round % 3 == 0 {
            let _ = fs::remove_dir_all(&copy);
            fs::create_dir(&copy).unwrap();
            for file in fs::read_dir(folder).unwrap() {
                let file = file.unwrap();
                fs::copy(file.path(), copy.join(file.file_name())).unwrap();
            }
        }
        let mut config = fs::read(folder.join("config.json")).unwrap();
        let end = config.len();
        mutate(&mut config, end, round % 3, &mut rng);
        fs::write(copy.join("config.json"), &config).unwrap();
        ran[1] += usize::from(exercise(&copy));
    }
    eprintln!("{ran:?} of {n} ran");
    assert!(ran.iter().all(|ran| *ran > 0 && *ran < n), "{ran:?} of {n}");
}
