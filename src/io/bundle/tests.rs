use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Map, Value, json};
use tempfile::TempDir;

use super::*;
use crate::error::Result;
use crate::format::testing::random_quantized;
use crate::format::{StoredMatrix, WeightFormat};
use crate::linalg::Matrix;

const TEXT: &str = "a text, of Ω bytes";

/// One matrix of each format, with odd sizes.
fn matrices() -> Vec<(String, StoredMatrix)> {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let mut random = |rows, cols| {
        Matrix::from_fn(rows, cols, |_, _| {
            if rng.random_bool(0.5) {
                rng.random_range(-1.0..1.0)
            } else {
                0.0
            }
        })
    };
    let mut all: Vec<(String, StoredMatrix)> = [
        WeightFormat::F32,
        WeightFormat::F16,
        WeightFormat::SparseBf16,
        WeightFormat::NmF16 { n: 3, m: 3 },
    ]
    .into_iter()
    .map(|format| {
        (
            format!("layer.{format:?}"),
            StoredMatrix::from_matrix(&random(5, 67), format).unwrap(),
        )
    })
    .collect();
    let mut rng = ChaCha8Rng::seed_from_u64(6);
    let codes = random_quantized(7, 70, 4, 16, false, &mut rng);
    all.push((
        "layer.int".into(),
        StoredMatrix::from_quantized(&codes, false).unwrap(),
    ));
    all.push((
        "layer.sparse int".into(),
        StoredMatrix::from_quantized(&codes, true).unwrap(),
    ));
    all
}

fn written(folder: &TempDir) -> Vec<u8> {
    let path = folder.path().join("good.elora");
    let matrices = matrices();
    let vector: Vec<f32> = (0..13).map(|i| i as f32 / 7.0).collect();
    let mut writer = BundleWriter::new(json!({"made by": "a test", "numbers": [1, 2.5]}));
    matrices
        .iter()
        .for_each(|(name, matrix)| writer.matrix(name, matrix));
    writer.vector("norm", &vector);
    writer.text("text", TEXT);
    writer.write(&path, true).unwrap();
    std::fs::read(path).unwrap()
}

/// Opens bytes as a file, both mapped and read. Both ways must agree on whether it is valid.
fn open(folder: &TempDir, bytes: &[u8]) -> Result<Bundle> {
    let path = folder.path().join("tried.elora");
    std::fs::write(&path, bytes).unwrap();
    let (mapped, read) = (Bundle::open(&path, true), Bundle::open(&path, false));
    assert_eq!(mapped.is_ok(), read.is_ok());
    read
}

fn refused(folder: &TempDir, bytes: &[u8]) -> String {
    open(folder, bytes)
        .and_then(|bundle| bundle.verify())
        .unwrap_err()
        .to_string()
}

/// Rewrites the header, with a matching checksum of the index if `fix` is true.
fn rewritten(
    bytes: &[u8],
    shift: usize,
    fix: bool,
    change: impl FnOnce(&mut Map<String, Value>, &mut Value),
) -> Vec<u8> {
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: Map<String, Value> = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let mut index: Value =
        serde_json::from_str(header["__metadata__"]["index"].as_str().unwrap()).unwrap();
    change(&mut header, &mut index);
    if header.contains_key("__metadata__") {
        let text = index.to_string();
        if fix {
            header["__metadata__"]["checksum"] =
                crc32fast::hash(text.as_bytes()).to_string().into();
            header["__metadata__"]["index"] = text.into();
        }
    }
    let mut text = serde_json::to_vec(&header).unwrap();
    text.resize((8 + text.len()).next_multiple_of(ALIGN) - 8 + shift, b' ');
    let mut out = (text.len() as u64).to_le_bytes().to_vec();
    out.extend(text);
    out.extend(&bytes[8 + length..]);
    out
}

#[test]
fn what_was_written_is_read_in_place() {
    let folder = TempDir::new().unwrap();
    let bytes = written(&folder);
    let path = folder.path().join("good.elora");
    let (mapped, read) = (
        Bundle::open(&path, true).unwrap(),
        Bundle::open(&path, false).unwrap(),
    );
    for bundle in [mapped, read] {
        bundle.verify().unwrap();
        assert_eq!(bundle.document()["numbers"][1], 2.5);
        assert_eq!(bundle.matrices().count(), 6);
        for (name, want) in matrices() {
            let got = bundle.matrix(&name).unwrap();
            assert_eq!(got, want);
            assert!(
                got.parts()
                    .iter()
                    .all(|part| (part.bytes.as_ptr() as usize).is_multiple_of(64))
            );
            bundle.verify_matrix(&name).unwrap();
        }
        assert_eq!(bundle.vector("norm", 13).unwrap()[3], 3.0 / 7.0);
        assert_eq!(bundle.text("text").unwrap(), TEXT);
        assert!(
            bundle.vector("norm", 12).is_err()
                && bundle.text("norm").is_err()
                && bundle.text("none").is_err()
        );
        assert!(bundle.matrix("layer").is_err());
    }
    assert_eq!(
        written(&folder),
        bytes,
        "the same parts give the same bytes"
    );
    // An existing file is not overwritten.
    let writer = BundleWriter::new(Value::Null);
    assert!(
        writer
            .write(&path, false)
            .unwrap_err()
            .to_string()
            .contains("good.elora")
    );
    assert_eq!(std::fs::read(&path).unwrap(), bytes);
}

#[test]
fn one_bad_file_for_each_rule() {
    let folder = TempDir::new().unwrap();
    let good = written(&folder);
    type Change = fn(&mut Map<String, Value>, &mut Value);
    let rules: Vec<(&str, bool, Change)> = vec![
        ("no bundle", false, |header, _| {
            drop(header.remove("__metadata__"))
        }),
        ("no bundle", false, |header, _| {
            header["__metadata__"]["format"] = "pt".into()
        }),
        ("version 2", false, |header, _| {
            header["__metadata__"]["version"] = "2".into()
        }),
        ("version none", false, |header, _| {
            drop(
                header["__metadata__"]
                    .as_object_mut()
                    .unwrap()
                    .remove("version"),
            )
        }),
        ("without an index", false, |header, _| {
            drop(
                header["__metadata__"]
                    .as_object_mut()
                    .unwrap()
                    .remove("index"),
            )
        }),
        ("its checksum differs", false, |header, _| {
            header["__metadata__"]["checksum"] = "17".into()
        }),
        ("index: ", true, |_, index| index["more"] = 1.into()),
        ("index: ", true, |_, index| index["matrices"] = Value::Null),
        ("index: ", true, |_, index| {
            index["checksums"]["norm"] = (-1).into()
        }),
        ("`other`: the index does not know it", false, |header, _| {
            let info = header.remove("norm").unwrap();
            header.insert("other".into(), info);
        }),
        ("tensor `ghost` is missing", true, |_, index| {
            index["checksums"]["ghost"] = 5.into()
        }),
        (
            "`layer.int`: part = none: a part `scales`",
            true,
            |header, index| {
                let info = header.remove("layer.int.scales").unwrap();
                header.insert("layer.int.sizes".into(), info);
                let sums = index["checksums"].as_object_mut().unwrap();
                let sum = sums.remove("layer.int.scales").unwrap();
                sums.insert("layer.int.sizes".into(), sum);
            },
        ),
        (
            "`layer.F32`: bytes of a weight's `values`",
            true,
            |_, index| {
                index["matrices"]["layer.F32"]["rows"] = 6.into();
            },
        ),
        ("`layer.F16`: ", true, |_, index| {
            index["matrices"]["layer.F16"]["cols"] = u64::MAX.into()
        }),
        ("`layer.int`: ", true, |_, index| {
            index["matrices"]["layer.int"]["format"] =
                json!({"int": {"bits": 5, "group_size": 16, "symmetric": false}});
        }),
        (
            "`layer.F32.values`: F32 [67, 5], expected F32 [5, 67]",
            false,
            |header, _| {
                header["layer.F32.values"]["shape"] = json!([67, 5]);
            },
        ),
        ("`layer.F16.values`: BF16", false, |header, _| {
            header["layer.F16.values"]["dtype"] = "BF16".into()
        }),
    ];
    for (number, (message, fix, change)) in rules.into_iter().enumerate() {
        let error = refused(&folder, &rewritten(&good, 0, fix, change));
        assert!(
            error.contains(message) && error.contains("tried.elora"),
            "rule {number}, {message}: {error}"
        );
    }
    // A wrong size may also not fit the tensor, a tensor may be misaligned, and the file may be
    // truncated or too long.
    let error = refused(&folder, &rewritten(&good, 8, false, |_, _| ()));
    assert!(error.contains("no multiple of 64"), "{error}");
    for cut in [0, 7, 8, 100, good.len() / 2, good.len() - 1] {
        refused(&folder, &good[..cut]);
    }
    refused(&folder, &[&good[..], &[0]].concat());
    refused(&folder, b"not a bundle at all, but text of some length");
}

#[test]
fn changed_contents_are_found_where_they_are() {
    let folder = TempDir::new().unwrap();
    let good = written(&folder);
    let length = u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    let header: Map<String, Value> = serde_json::from_slice(&good[8..8 + length]).unwrap();
    for (tensor, info) in header.iter().filter(|(name, _)| *name != "__metadata__") {
        let range: Vec<usize> = serde_json::from_value(info["data_offsets"].clone()).unwrap();
        for at in [range[0], range[1] - 1] {
            let mut bad = good.clone();
            bad[8 + length + at] ^= 0x20;
            let bundle = open(&folder, &bad).unwrap();
            let error = bundle.verify().unwrap_err().to_string();
            assert!(error.contains(&format!("`{tensor}`")), "{tensor}: {error}");
            for name in bundle.matrices() {
                let inside = tensor
                    .strip_prefix(name)
                    .is_some_and(|rest| rest.starts_with('.'));
                assert_eq!(
                    bundle.verify_matrix(name).is_err(),
                    inside,
                    "{tensor} and {name}"
                );
                // Reading corrupt contents stays in bounds.
                bundle.matrix(name).unwrap().to_matrix();
            }
            assert_eq!(bundle.vector("norm", 13).is_err(), tensor == "norm");
            assert_eq!(bundle.text("text").is_err(), tensor == "text");
        }
    }
}

#[test]
fn no_mutation_passes_or_crashes() {
    let folder = TempDir::new().unwrap();
    let good = written(&folder);
    let length = u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    for _ in 0..crate::io::testing::rounds(2000) {
        let mut bad = good.clone();
        for _ in 0..rng.random_range(1..4) {
            if bad.is_empty() {
                break;
            }
            // The header is short but has most of the rules, so mutate it more often.
            let end = if rng.random_bool(0.6) {
                8 + length
            } else {
                bad.len()
            };
            let at = rng.random_range(0..end.min(bad.len()));
            match rng.random_range(0..5) {
                0 => bad[at] ^= 1 << rng.random_range(0..8),
                1 => bad[at] = crate::io::testing::pick(&mut rng, b"0123456789{}[]\",:~ \xff"),
                2 => drop(bad.remove(at)),
                3 => bad.insert(
                    at,
                    crate::io::testing::pick(&mut rng, b"0123456789{}[]\",:"),
                ),
                _ => bad.truncate(at.max(1)),
            }
        }
        let Ok(bundle) = open(&folder, &bad) else {
            continue;
        };
        for name in bundle.matrices() {
            bundle.matrix(name).unwrap().to_matrix();
        }
        // A mutation may have replaced one whitespace character of the header by another.
        let same = bad.get(8 + length..) == good.get(8 + length..);
        assert!(same || bundle.verify().is_err());
    }
}
