use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

use super::*;
use crate::error::{Error, Result};
use crate::io::testing::{pick, shared};

fn file_of(header: &str, data: &[u8]) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.extend_from_slice(data);
    bytes
}

fn open_bytes(bytes: &[u8]) -> Result<Checkpoint> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bad.safetensors");
    fs::write(&path, bytes).unwrap();
    // On Unix the mapping stays valid after the file is removed.
    Checkpoint::open(&path)
}

fn values(seed: u64, n: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..n).map(|_| rng.random_range(-2.0f32..2.0)).collect()
}

#[test]
fn every_type_round_trips_in_a_fixed_order() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("t.safetensors");
    let v = values(1, 51);
    let halves: Vec<f32> = v.iter().map(|&x| half::f16::from_f32(x).to_f32()).collect();
    let write = |reversed: bool| {
        let mut tensors = vec![
            HostTensor::from_f32("b", DType::F16, [3, 17], v.as_slice()),
            HostTensor::from_f32("a", DType::F32, [51], v.clone()),
            HostTensor::lazy_f32("c", DType::BF16, [17, 3], || Ok(halves.clone())),
            HostTensor::from_f32("d", DType::F64, [1, 51], v.as_slice()),
            HostTensor::from_bytes("i8", DType::I8, [3], vec![1u8, 255, 128]),
            HostTensor::lazy_bytes("i32", DType::I32, [1], || Ok(vec![1, 0, 0, 128])),
            HostTensor::from_f32("empty", DType::F32, [0, 4], vec![]),
            HostTensor::from_f32("scalar", DType::F32, [], vec![0.25]),
        ];
        if reversed {
            tensors.reverse();
        }
        write_safetensors(
            &path,
            tensors,
            &BTreeMap::from([("note".into(), "x".into())]),
        )
        .unwrap();
        fs::read(&path).unwrap()
    };
    let bytes = write(false);
    assert_eq!(bytes, write(true));
    assert_eq!(u64::from_le_bytes(bytes[..8].try_into().unwrap()) % 8, 0);
    // The reference implementation can read the file.
    let theirs = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(theirs.len(), 8);

    let ours = Checkpoint::open(&path).unwrap();
    assert_eq!(
        ours.names().collect::<Vec<_>>(),
        ["a", "b", "c", "d", "empty", "i32", "i8", "scalar"]
    );
    assert_eq!(ours.metadata()["format"], "pt");
    assert_eq!(ours.metadata()["note"], "x");
    assert_eq!(ours.load_f32("a").unwrap(), v);
    assert_eq!(ours.load_f32("d").unwrap(), v);
    assert_eq!(ours.load_matrix("b", [3, 17]).unwrap().as_slice(), halves);
    assert_eq!(
        ours.load_vector("empty", 0).unwrap_err().to_string(),
        "tensor `empty`: shape [0, 4], expected [0]"
    );
    assert_eq!(ours.load_f32("scalar").unwrap(), [0.25]);
    assert_eq!(ours.bytes("i8").unwrap(), [1, 255, 128]);
    assert_eq!(
        ours.info("c").unwrap(),
        &TensorInfo {
            dtype: DType::BF16,
            shape: vec![17, 3]
        }
    );
    assert_eq!(ours.total_bytes(), 51 * (2 + 4 + 2 + 8) + 3 + 4 + 4);
}

#[test]
fn errors_name_the_tensor() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("t.safetensors");
    let nan = f32::NAN.to_le_bytes();
    let tensors = vec![
        HostTensor::from_bytes("nan", DType::F32, [2], [1f32.to_le_bytes(), nan].concat()),
        HostTensor::from_bytes("inf", DType::F16, [1], vec![0x00, 0x7c]),
        HostTensor::from_bytes("huge", DType::F64, [1], 1e300f64.to_le_bytes().to_vec()),
        HostTensor::from_bytes("ints", DType::I64, [1], vec![0; 8]),
    ];
    write_safetensors(&path, tensors, &BTreeMap::new()).unwrap();
    let file = Checkpoint::open(&path).unwrap();
    assert!(
        matches!(file.load_f32("nan"), Err(Error::NotFinite { index: 1, tensor, .. }) if tensor == "nan")
    );
    assert!(file.load_f32_unchecked("nan").unwrap()[1].is_nan());
    assert!(matches!(
        file.load_f32("inf"),
        Err(Error::NotFinite { index: 0, .. })
    ));
    assert!(matches!(
        file.load_f32("huge"),
        Err(Error::NotFinite { .. })
    ));
    assert!(
        matches!(file.load_f32("ints"), Err(Error::TensorDtype { tensor, .. }) if tensor == "ints")
    );
    assert!(matches!(
        file.load_matrix("nan", [2, 1]),
        Err(Error::TensorShape { .. })
    ));
    let missing = file.load_f32("none").unwrap_err().to_string();
    assert!(
        missing.contains("`none`") && missing.contains("t.safetensors"),
        "{missing}"
    );

    // An error leaves no file behind.
    let out = folder.path().join("out.safetensors");
    let empty = BTreeMap::new();
    let bad = [
        HostTensor::from_f32("t", DType::F16, [2], vec![1.0, 70_000.0]),
        HostTensor::from_f32("t", DType::F32, [2], vec![1.0, f32::INFINITY]),
        HostTensor::from_f32("t", DType::F32, [3], vec![1.0, 2.0]),
        HostTensor::from_f32("t", DType::U8, [1], vec![1.0]),
        HostTensor::from_bytes("t", DType::I8, [3], vec![1]),
        HostTensor::lazy_f32("t", DType::F32, [1], || Err(Error::argument("t", 1, "2"))),
        HostTensor::from_f32("t", DType::F32, [usize::MAX, 2], vec![]),
    ];
    for tensor in bad {
        let shown = format!("{tensor:?}");
        let error = write_safetensors(&out, vec![tensor], &empty).unwrap_err();
        assert!(
            matches!(error, Error::InvalidArgument { .. }) || error.to_string().contains("`t`"),
            "{shown}: {error}"
        );
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "{shown}");
    }
    let one = || HostTensor::from_f32("t", DType::F32, [1], vec![1.0]);
    assert!(write_safetensors(&out, vec![one(), one()], &empty).is_err());
}

#[test]
fn one_bad_file_per_rule() {
    let tensor = |shape: &str, begin: u64, end: u64| {
        format!(r#"{{"dtype":"F32","shape":{shape},"data_offsets":[{begin},{end}]}}"#)
    };
    let one = format!(r#"{{"w":{}}}"#, tensor("[2]", 0, 8));
    assert!(open_bytes(&file_of(&one, &[0; 8])).is_ok());
    let pair = |a: String, b: String| format!(r#"{{"a":{a},"b":{b}}}"#);
    let mut lying = file_of(&one, &[0; 8]);
    lying[..8].copy_from_slice(&(1u64 << 40).to_le_bytes());
    let mut long = file_of(&one, &[0; 8]);
    long[..8].copy_from_slice(&500u64.to_le_bytes());
    // The last tensor ends just below 2^64, so that adding the header's length overflows.
    let wrapping = {
        let size = 1u64 << 61;
        let last_end = u64::MAX - 7;
        let mut parts: Vec<String> = (0..7)
            .map(|i| {
                format!(
                    r#""t{i}":{{"dtype":"U8","shape":[{size}],"data_offsets":[{},{}]}}"#,
                    i * size,
                    (i + 1) * size
                )
            })
            .collect();
        parts.push(format!(
            r#""t7":{{"dtype":"U8","shape":[{}],"data_offsets":[{},{last_end}]}}"#,
            last_end - 7 * size,
            7 * size
        ));
        format!("{{{}}}", parts.join(","))
    };
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("empty file", vec![]),
        ("only a part of the length", vec![1, 2, 3]),
        ("header longer than the cap", lying),
        ("header longer than the file", long),
        ("header cut off", file_of(&one, &[])[..30].to_vec()),
        ("data cut off", file_of(&one, &[0; 7])),
        ("data too long", file_of(&one, &[0; 9])),
        ("not JSON", file_of("{\"w\": nothing}", &[0; 8])),
        ("not an object", file_of("[1, 2]", &[])),
        ("not UTF-8", {
            let mut f = file_of(&one, &[0; 8]);
            f[10] = 0xff;
            f
        }),
        (
            "deeply nested",
            file_of(&format!("{{\"a\":{}", "[".repeat(100_000)), &[]),
        ),
        (
            "offsets out of range",
            file_of(&format!(r#"{{"w":{}}}"#, tensor("[4]", 0, 16)), &[0; 8]),
        ),
        (
            "offsets past 2^64",
            file_of(
                r#"{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,99999999999999999999]}}"#,
                &[0],
            ),
        ),
        (
            "negative offset",
            file_of(
                r#"{"w":{"dtype":"U8","shape":[1],"data_offsets":[-1,0]}}"#,
                &[],
            ),
        ),
        (
            "end before begin",
            file_of(&format!(r#"{{"w":{}}}"#, tensor("[2]", 8, 0)), &[0; 8]),
        ),
        (
            "overlap",
            file_of(&pair(tensor("[2]", 0, 8), tensor("[2]", 4, 12)), &[0; 12]),
        ),
        (
            "hole",
            file_of(&pair(tensor("[1]", 0, 4), tensor("[1]", 8, 12)), &[0; 12]),
        ),
        (
            "shape larger than the data",
            file_of(&format!(r#"{{"w":{}}}"#, tensor("[3]", 0, 8)), &[0; 8]),
        ),
        (
            "shape whose product overflows",
            file_of(
                &format!(r#"{{"w":{}}}"#, tensor("[4294967296,4294967296]", 0, 8)),
                &[0; 8],
            ),
        ),
        ("sum of lengths that wraps around", file_of(&wrapping, &[])),
        (
            "unknown dtype",
            file_of(&one.replace("F32", "F31"), &[0; 8]),
        ),
        (
            "metadata of numbers",
            file_of(
                &format!(
                    r#"{{"__metadata__":{{"a":1}},"w":{}}}"#,
                    tensor("[2]", 0, 8)
                ),
                &[0; 8],
            ),
        ),
    ];
    for (rule, bytes) in cases {
        match open_bytes(&bytes) {
            Err(error @ Error::InvalidFile { .. }) => {
                assert!(error.to_string().contains("bad.safetensors"), "{error}")
            }
            other => panic!("{rule}: {other:?}"),
        }
    }
    let complex = file_of(
        r#"{"w":{"dtype":"C64","shape":[1],"data_offsets":[0,8]}}"#,
        &[0; 8],
    );
    assert!(matches!(
        open_bytes(&complex),
        Err(Error::Unsupported { .. })
    ));
}

#[test]
fn shards_round_trip_and_bad_indexes_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let v = values(2, 300);
    let tensors = || -> Vec<HostTensor<'_>> {
        (0..5)
            .map(|i| HostTensor::from_f32(format!("t{i}"), DType::F32, [20 * i], &v[..20 * i]))
            .collect()
    };
    write_sharded(folder.path(), tensors(), 300).unwrap();
    let index_path = folder.path().join("model.safetensors.index.json");
    let good: Value = serde_json::from_slice(&fs::read(&index_path).unwrap()).unwrap();
    assert_eq!(good["metadata"]["total_size"], 4 * 200);
    assert_eq!(good["weight_map"]["t4"], "model-00003-of-00003.safetensors");
    let file = Checkpoint::open(folder.path()).unwrap();
    for i in 0..5 {
        assert_eq!(
            file.load_vector(&format!("t{i}"), 20 * i).unwrap(),
            v[..20 * i]
        );
    }
    drop(file);

    let refused = |index: Value| {
        fs::write(&index_path, index.to_string()).unwrap();
        Checkpoint::open(folder.path()).unwrap_err().to_string()
    };
    let with = |tensor: &str, shard: &str| {
        let mut index = good.clone();
        index["weight_map"][tensor] = shard.into();
        index
    };
    for escaping in [
        "../model.safetensors",
        "/etc/passwd",
        "a/b",
        "..",
        ".",
        "",
        "a\\b",
        "c:x",
    ] {
        let error = refused(with("t1", escaping));
        assert!(
            error.contains("`t1`") && error.contains("not the name"),
            "{escaping}: {error}"
        );
    }
    assert!(refused(with("t1", "absent.safetensors")).contains("`absent.safetensors` is missing"));
    // What no shard holds is missed when it is read.
    let index = with("t9", "model-00001-of-00003.safetensors");
    fs::write(&index_path, index.to_string()).unwrap();
    let file = Checkpoint::open(folder.path()).unwrap();
    let error = file.load_f32("t9").unwrap_err().to_string();
    assert!(
        error.contains("`t9` is missing") && error.contains("00001-of"),
        "{error}"
    );
    drop(file);
    assert!(refused(with("t0", "model-00002-of-00003.safetensors")).contains("`t0` is missing"));
    assert!(refused(json!({"weight_map": {}})).contains("empty"));
    assert!(refused(json!({"weight_map": {"t1": 3}})).contains("`t1`"));
    assert!(refused(json!([])).contains("index.json"));
    // Two shards hold the same tensor.
    fs::copy(
        folder.path().join("model-00003-of-00003.safetensors"),
        folder.path().join("copy.safetensors"),
    )
    .unwrap();
    assert!(refused(with("t0", "copy.safetensors")).contains("`t4` is also in"));

    assert!(write_sharded(folder.path(), tensors(), 0).is_err());
    let empty = tempfile::tempdir().unwrap();
    assert!(
        Checkpoint::open(empty.path())
            .unwrap_err()
            .to_string()
            .contains("no model.safetensors")
    );
    fs::write(empty.path().join("pytorch_model.bin"), b"x").unwrap();
    assert!(
        Checkpoint::open(empty.path())
            .unwrap_err()
            .to_string()
            .contains("pytorch_model.bin")
    );
    assert!(matches!(
        Checkpoint::open(empty.path().join("none")),
        Err(Error::Io { .. })
    ));
    fs::create_dir(empty.path().join("model.safetensors")).unwrap();
    assert!(matches!(
        Checkpoint::open(empty.path()),
        Err(Error::InvalidFile { .. })
    ));
}

/// Opens and reads everything. Only completion matters, not the result.
fn exercise(path: &Path) -> bool {
    let Ok(file) = Checkpoint::open(path) else {
        return false;
    };
    for name in file.names() {
        let _ = file.load_f32(name);
        assert_eq!(
            file.bytes(name).unwrap().len(),
            file.info(name).unwrap().n_elements() * file.info(name).unwrap().dtype.size()
        );
    }
    true
}

#[test]
fn mutated_files_never_panic() {
    let folder = tempfile::tempdir().unwrap();
    let v = values(3, 24);
    let tensors = vec![
        HostTensor::from_f32("model.a.weight", DType::F32, [3, 4], &v[..12]),
        HostTensor::from_f32("b", DType::F16, [7], &v[..7]),
        HostTensor::from_f32("c", DType::BF16, [5, 1], &v[..5]),
    ];
    let path = folder.path().join("m.safetensors");
    write_safetensors(&path, tensors, &BTreeMap::new()).unwrap();
    let good = fs::read(&path).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    let mut opened = 0;
    for round in 0..crate::io::testing::rounds(4000) {
        let mut bytes = good.clone();
        for _ in 0..rng.random_range(1..4) {
            let at = rng.random_range(0..bytes.len());
            match rng.random_range(0..6) {
                0 => bytes[at] = rng.random(),
                1 => bytes[at] ^= 1 << rng.random_range(0..8),
                2 => bytes.truncate(at.max(1)),
                3 => bytes.insert(at, rng.random()),
                4 => drop(bytes.remove(at)),
                // Mutate digits and brackets of the header.
                _ => bytes[at] = pick(&mut rng, b"0123456789[]{},:\"-eF"),
            }
            if bytes.is_empty() {
                break;
            }
        }
        let target = folder.path().join(format!("m{}.safetensors", round % 2));
        fs::write(&target, &bytes).unwrap();
        opened += usize::from(exercise(&target));
    }
    assert!(
        opened > 50,
        "the loop should also reach what lies behind the header: {opened}"
    );
}

#[test]
fn other_models_read_and_rewritten() {
    for name in ["stories260K", "story-llama-0.6M"] {
        let Some(source) = shared(&format!("models/{name}")) else {
            return;
        };
        let source = Checkpoint::open(source).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let tensors = source
            .names()
            .map(|n| {
                let source = &source;
                HostTensor::lazy_f32(
                    n,
                    DType::F32,
                    source.info(n).unwrap().shape.clone(),
                    move || source.load_f32(n),
                )
            })
            .collect();
        write_sharded(folder.path(), tensors, 1 << 19).unwrap();
        let back = Checkpoint::open(folder.path()).unwrap();
        assert!(back.names().eq(source.names()));
        for n in source.names() {
            assert_eq!(back.bytes(n).unwrap(), source.bytes(n).unwrap(), "{n}");
        }
    }
}

#[test]
fn mutated_indexes_never_panic() {
    let folder = tempfile::tempdir().unwrap();
    let v = values(5, 12);
    let tensors = (1..4)
        .map(|i| HostTensor::from_f32(format!("t{i}"), DType::F32, [4], &v[4 * i - 4..4 * i]))
        .collect();
    write_sharded(folder.path(), tensors, 20).unwrap();
    let index = folder.path().join("model.safetensors.index.json");
    let good = fs::read(&index).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(6);
    for _ in 0..crate::io::testing::rounds(2000) {
        let mut bytes = good.clone();
        for _ in 0..rng.random_range(1..3) {
            let at = rng.random_range(0..bytes.len());
            bytes[at] = if rng.random_bool(0.3) {
                rng.random()
            } else {
                pick(&mut rng, b"0123456789./\\{}\",:tm-")
            };
        }
        fs::write(&index, &bytes).unwrap();
        exercise(folder.path());
    }
}
