//! The C and C++ interfaces as users see them. Headers compile alone, programs link to both kinds
//! of library and run, results are bit-identical to those of the Rust API, misuse is refused, and
//! other projects find the packages.
//!
//! The library is built by `cargo rustc`, so these tests need cargo. A test whose tools are missing
//! prints `skipped`. Linux only, because sonames, exported symbols and run paths are examined.
#![cfg(feature = "flex")]
#![cfg(target_os = "linux")]

mod common;
#[path = "capi/tools.rs"]
mod tools;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Instant;

use common::{random_ids, tiny_dims, tiny_on};
use elastic_lora::adapter::LoraConfig;
use elastic_lora::data::{Batcher, Sequence};
use elastic_lora::format::WeightFormat;
use elastic_lora::io::hf::LlamaDims;
use elastic_lora::io::peft::{LoraAdapter, LoraWeights, PeftOptions};
use elastic_lora::linalg::Matrix;
use elastic_lora::model::Pretrained;
use elastic_lora::nn::host_values;
use elastic_lora::progress::Silent;
use elastic_lora::runtime::{
    Adapter, GenerateConfig, Model, ModelOptions, SampleConfig, Session, SessionConfig, Step,
    decode_batch, decode_steps,
};
use elastic_lora::space::Elastic;
use elastic_lora::supernet::SuperNetConfig;
use elastic_lora::train::{TrainConfig, Trainer};
use elastic_lora::{SearchSpace, SuperNet};
use half::{bf16, f16};
use tools::{
    Link, c_sources, cargo, compile, compilers, has, library, link, root, run, scratch, succeed,
};

const INT4: WeightFormat = WeightFormat::Int {
    bits: 4,
    group_size: Some(8),
    symmetric: false,
};
const SPARSE_INT4: WeightFormat = WeightFormat::SparseInt4 {
    group_size: Some(8),
    symmetric: false,
};

/// A supernet with elastic ranks and widths. Its adapters are trained for a few steps.
fn net() -> &'static SuperNet {
    static NET: OnceLock<SuperNet> = OnceLock::new();
    NET.get_or_init(|| {
        let dims = LlamaDims {
            num_attention_heads: 6,
            num_key_value_heads: 3,
            ..tiny_dims(false)
        };
        let model = tiny_on(&dims, 4, &burn::tensor::Device::flex());
        let layers = model.layer_shapes();
        let widths = SearchSpace::groups_by_block(
            Elastic::Width,
            &layers,
            &[["gate_proj", "up_proj"]],
            &[37, 16],
        );
        let space = SearchSpace::grouped(&layers, &[["q_proj"], ["down_proj"]], &[4, 2]).unwrap();
        let config = SuperNetConfig::new(LoraConfig::new(4).with_alpha(6.0));
        let mut net =
            SuperNet::new(model, space.with_groups(widths.unwrap()).unwrap(), config).unwrap();
        let sequences = (0..4)
            .map(|seed| Sequence::unmasked(random_ids(12, 41, seed)))
            .collect();
        let config = TrainConfig {
            lr: 0.05,
            ..TrainConfig::new(4)
        };
        Trainer::new(config)
            .unwrap()
            .run(
                &mut net,
                &mut Batcher::new(sequences, 2, 0, 1).unwrap(),
                &[],
                &Silent,
            )
            .unwrap();
        net
    })
}

fn model(format: WeightFormat) -> Model {
    let net = net();
    let named = [("least", net.minimal()), ("middle", net.heuristic())]
        .map(|(name, config)| (name.into(), config));
    Model::from_supernet(net, &named, format)
        .unwrap()
        .with_stop_ids(vec![2, 5])
}

/// The bundle that most programs read.
fn bundle() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| {
        let path = scratch("bundle").join("model.elora");
        model(INT4).save(&path, true).unwrap();
        path
    })
}

/// A model folder with a tokenizer, or `-`.
fn folder() -> PathBuf {
    let path = root().join("assets/arithmetic-llama");
    if path.join("model.safetensors").is_file() {
        path
    } else {
        "-".into()
    }
}

/// A bundle with a tokenizer and two subnets, or `None` without the model folder.
fn talking() -> Option<&'static Path> {
    static PATH: OnceLock<Option<PathBuf>> = OnceLock::new();
    let made = PATH.get_or_init(|| {
        let folder = folder();
        if !folder.is_dir() {
            return None;
        }
        let shipped = Pretrained::open(&folder, &burn::tensor::Device::flex()).unwrap();
        let layers = shipped.model.layer_shapes();
        let pairs = [["gate_proj", "up_proj"]];
        let widths = SearchSpace::groups_by_block(Elastic::Width, &layers, &pairs, &[384, 256]);
        let space = SearchSpace::grouped(&layers, &[["q_proj"]], &[4, 2]).unwrap();
        let space = space.with_groups(widths.unwrap()).unwrap();
        let config = SuperNetConfig::new(LoraConfig::new(4));
        let net = SuperNet::new(shipped.model, space, config).unwrap();
        let named = [("least".to_string(), net.minimal())];
        let model = Model::from_supernet(&net, &named, WeightFormat::F16).unwrap();
        let path = scratch("talking").join("model.elora");
        let model = model.with_tokenizer(&folder).unwrap();
        model.save(&path, true).unwrap();
        Some(path)
    });
    made.as_deref()
}

/// A bundle of 32-bit floats, and a PEFT adapter for it.
fn adapted() -> &'static (PathBuf, PathBuf) {
    static PATHS: OnceLock<(PathBuf, PathBuf)> = OnceLock::new();
    PATHS.get_or_init(write_adapted)
}

fn write_adapted() -> (PathBuf, PathBuf) {
    let folder = scratch("adapted");
    let (bundle, peft) = (folder.join("model.elora"), folder.join("adapter"));
    let model = model(WeightFormat::F32);
    model.save(&bundle, true).unwrap();
    let mut adapter = LoraAdapter::default();
    for layer in model.layers() {
        if layer.name.ends_with("v_proj") || layer.name.ends_with("up_proj") {
            let wave = |i: usize, j: usize| 0.4 * number(31 * i + 7 * j + layer.d_output);
            let a = Matrix::from_fn(3, layer.d_input, wave);
            let b = Matrix::from_fn(layer.d_output, 3, wave);
            let pair = LoraWeights::new(a, b, 2.0).unwrap();
            adapter.layers.insert(layer.name.clone(), pair);
        }
    }
    let options = PeftOptions::for_model(model.config());
    adapter.write(&peft, &options).unwrap();
    (bundle, peft)
}

/// Returns the C test program linked in this way. It is compiled once.
fn program(kind: Link) -> Option<&'static Path> {
    static PROGRAMS: [OnceLock<Option<PathBuf>>; 2] = [OnceLock::new(), OnceLock::new()];
    let (index, compiler, name) = match kind {
        Link::Shared => (0, compilers("c").first().copied(), "shared"),
        Link::Static => (1, compilers("c").last().copied(), "static"),
    };
    let built = PROGRAMS[index].get_or_init(|| {
        let mut command = compile(compiler?, "gnu11");
        command.args(c_sources());
        Some(link(command, kind, name))
    });
    built.as_deref()
}

/// Runs `f` with a test program for each way of linking.
fn with_programs(f: impl Fn(&Path)) {
    [Link::Shared, Link::Static]
        .into_iter()
        .filter_map(program)
        .for_each(f);
}

/// Returns the names of the functions that the header declares.
fn declared() -> BTreeSet<String> {
    let header = std::fs::read_to_string(root().join("include/elastic_lora.h")).unwrap();
    let code: Vec<&str> = header
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"))
        .collect();
    let code = code.join("\n");
    let code = code.split_once("*/").unwrap().1;
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let mut names = BTreeSet::new();
    for (at, _) in code.match_indices('(') {
        let start = code[..at]
            .rfind(|c| !is_name(c))
            .map_or(0, |before| before + 1);
        if code[start..at].starts_with("elora_") {
            names.insert(code[start..at].to_string());
        }
    }
    names
}

#[test]
fn headers_compile_alone_in_every_standard() {
    let folder = scratch("headers");
    let check = |compiler: &str, standard: &str, header: &str, extension: &str, flags: &[&str]| {
        let file = folder.join(format!("{compiler}-{standard}.{extension}"));
        std::fs::write(
            &file,
            format!("#include \"{header}\"\n#include \"{header}\"\n"),
        )
        .unwrap();
        succeed(
            compile(compiler, standard)
                .args(flags)
                .arg("-fsyntax-only")
                .arg(&file),
        );
    };
    for compiler in compilers("c") {
        for standard in ["c99", "c11", "c17", "c2x"] {
            check(
                compiler,
                standard,
                "elastic_lora.h",
                "c",
                &["-Wstrict-prototypes"],
            );
        }
        succeed(
            compile(compiler, "c11")
                .arg("-fsyntax-only")
                .arg(root().join("tests/c/layout.c")),
        );
    }
    for compiler in compilers("c++") {
        for standard in ["c++11", "c++14", "c++17", "c++20", "c++2b"] {
            check(compiler, standard, "elastic_lora.h", "cc", &[]);
            check(
                compiler,
                standard,
                "elastic_lora.hpp",
                "cpp",
                &["-Wshadow=local"][..usize::from(compiler == "g++")],
            );
            check(
                compiler,
                standard,
                "elastic_lora.hpp",
                "cxx",
                &["-fno-exceptions"],
            );
        }
    }
}

#[test]
fn only_the_functions_of_the_header_are_exported() {
    let declared = declared();
    assert!(
        declared.len() > 50 && declared.contains("elora_session_decode"),
        "{declared:?}"
    );
    // Each function must be called with arguments that it must refuse.
    let hostile: String = ["hostile.c", "hostile_loop.c"]
        .map(|name| std::fs::read_to_string(root().join("tests/c").join(name)).unwrap())
        .concat();
    let missing: Vec<_> = declared
        .iter()
        .filter(|name| !hostile.contains(&format!("{name}(")))
        .collect();
    assert!(missing.is_empty(), "not in the hostile tests: {missing:?}");
    if !has("nm") || !cfg!(target_os = "linux") {
        return;
    }
    let symbols = succeed(
        Command::new("nm")
            .args(["-D", "--defined-only"])
            .arg(library().join("libelastic_lora.so")),
    );
    let exported: BTreeSet<String> = symbols
        .lines()
        .filter_map(|line| line.split_whitespace().nth(2))
        .map(str::to_string)
        .collect();
    let hooks = ["elora_test_panic", "elora_test_panic_in_session"].map(str::to_string);
    let expected: BTreeSet<String> = declared.into_iter().chain(hooks).collect();
    assert_eq!(exported, expected);
    if has("readelf") {
        let dynamic = succeed(
            Command::new("readelf")
                .arg("-d")
                .arg(library().join("libelastic_lora.so")),
        );
        assert!(
            dynamic.contains(&format!("soname: [{}]", tools::soname())),
            "{dynamic}"
        );
    }
}

#[test]
fn misuse_is_a_status_and_a_text() {
    with_programs(|program| {
        succeed(
            Command::new(program)
                .arg("hostile")
                .arg(bundle())
                .arg(folder())
                .arg(scratch("hostile")),
        );
    });
}

#[test]
fn handles_are_freed_in_any_order() {
    with_programs(|program| {
        succeed(Command::new(program).arg("order").arg(bundle()));
    });
}

#[test]
fn eight_threads_share_a_model() {
    with_programs(|program| {
        succeed(Command::new(program).arg("threads").arg(bundle()));
    });
}

#[test]
fn an_adapter_goes_onto_a_bundle_and_into_a_sparse_one() {
    let (bundle, adapter) = adapted();
    with_programs(|program| {
        succeed(
            Command::new(program)
                .arg("adapt")
                .arg(bundle)
                .arg(adapter)
                .arg(scratch("adapt")),
        );
    });
}

#[test]
fn a_panic_is_a_status_and_the_host_lives_on() {
    with_programs(|program| {
        succeed(Command::new(program).arg("panic").arg(bundle()));
    });
}

/// Same as in `tests/c/check.h`.
fn number(i: usize) -> f32 {
    (i.wrapping_mul(2_654_435_761) % 2001) as f32 / 1000.0 - 1.0
}

/// A model with subnets that have weights of their own.
fn merged_subnets() -> Model {
    let model = model(WeightFormat::F32);
    let whole = model.extract(0).unwrap().merged().unwrap();
    let adapter = LoraAdapter::open(&adapted().1).unwrap();
    let adapter = Adapter::from_lora(&whole, &adapter, "adapter").unwrap();
    let other = |scale| whole.with_adapter(&adapter, scale).unwrap().merged();
    let first = whole.with_subnet("one", &other(1.0).unwrap()).unwrap();
    first.with_subnet("two", &other(-0.5).unwrap()).unwrap()
}

/// Computes with the Rust API what `tests/c/dump.c` computes.
fn dump(model: &Model) -> Vec<f32> {
    const PROMPT: [u32; 7] = [1, 17, 40, 3, 0, 22, 9];
    let (vocab, mut all) = (model.config().vocab_size(), Vec::new());
    let new = || Session::new(model, &SessionConfig::default()).unwrap();
    let mut session = new();
    let step = |session: &mut Session, tokens: &[u32], all: &mut Vec<f32>| {
        let mut logits = vec![0.0; vocab];
        session.decode(tokens, Some(&mut logits)).unwrap();
        all.extend(logits);
    };
    for subnet in 0..model.subnets().len() {
        session.reset();
        session.set_subnet(subnet).unwrap();
        step(&mut session, &PROMPT, &mut all);
        step(&mut session, &[5], &mut all);
        session.truncate(7);
        step(&mut session, &[6], &mut all);
    }
    session.reset();
    session.set_subnet(0).unwrap();
    let ranks: Vec<u32> = session
        .ranks()
        .iter()
        .map(|rank| (*rank as u32).min(2))
        .collect();
    session.set_ranks(&ranks).unwrap();
    let mut logits = vec![0.0; 7 * vocab];
    session.decode_all(&PROMPT, &mut logits).unwrap();
    all.extend(logits);
    // A batch.
    let mut three = [new(), new(), new()];
    for (i, session) in three.iter_mut().enumerate() {
        session.set_subnet(1).unwrap();
        session.decode(&PROMPT[i..2 * i + 2], None).unwrap();
    }
    let mut logits = vec![0.0; 3 * vocab];
    decode_batch(
        &mut three.iter_mut().collect::<Vec<_>>(),
        &[4, 30, 12],
        &mut logits,
    )
    .unwrap();
    all.extend(logits);
    // Generations.
    session.reset();
    session.set_subnet(1).unwrap();
    let greedy = GenerateConfig::new(9, model.stop_ids().to_vec());
    let mut drawn = GenerateConfig::new(9, Vec::new());
    drawn.sample = SampleConfig {
        temperature: 0.8,
        top_k: 10,
        top_p: 0.95,
        seed: 7,
        ..SampleConfig::default()
    };
    for (config, limit) in [(&greedy, 9), (&drawn, 9), (&drawn, 4)] {
        session.reset();
        let mut seen = 0;
        let show = |_| {
            seen += 1;
            seen < limit
        };
        let tokens = session.generate(&PROMPT, config, show).unwrap();
        all.push(tokens.len() as f32);
        all.extend(tokens.iter().map(|token| *token as f32));
    }
    // Layers.
    for layer in 0..model.layers().len() {
        for subnet in 0..model.subnets().len() {
            let Ok(linear) = model.linear(layer, subnet) else {
                continue;
            };
            let (inputs, outputs) = (linear.d_input(), linear.d_output());
            let (ldx, ldy) = (inputs + 2, outputs + 1);
            let x: Vec<f32> = (0..2 * ldx + inputs).map(|i| number(i + layer)).collect();
            let mut y = vec![-7.0; 2 * ldy + outputs];
            linear.forward(3, &x, ldx, &mut y, ldy, None).unwrap();
            all.extend(y);
            let halves = |i: usize| if i.is_multiple_of(2) { 1.5 } else { 0.25 };
            let x: Vec<f16> = (0..inputs).map(|i| f16::from_f32(halves(i))).collect();
            let mut y = vec![f16::ZERO; outputs];
            linear
                .forward(1, &x, inputs, &mut y, outputs, None)
                .unwrap();
            all.extend(y.iter().map(|y| f32::from(y.to_bits())));
            let x: Vec<bf16> = (0..inputs).map(|i| bf16::from_f32(halves(i))).collect();
            let mut y = vec![bf16::ZERO; outputs];
            linear
                .forward(1, &x, inputs, &mut y, outputs, None)
                .unwrap();
            all.extend(y.iter().map(|y| f32::from(y.to_bits())));
        }
    }
    all
}

#[test]
fn results_are_those_of_the_rust_api_bit_by_bit() {
    let folder = scratch("dump");
    for (index, format) in [
        WeightFormat::F32,
        WeightFormat::SparseF16,
        INT4,
        SPARSE_INT4,
    ]
    .into_iter()
    .enumerate()
    {
        let (bundle, numbers) = (
            folder.join(format!("{index}.elora")),
            folder.join("numbers"),
        );
        let model = match format {
            WeightFormat::F32 => merged_subnets(),
            format => model(format),
        };
        model.save(&bundle, true).unwrap();
        let expected = dump(&Model::open(&bundle, &ModelOptions::default()).unwrap());
        with_programs(|program| {
            succeed(Command::new(program).arg("dump").arg(&bundle).arg(&numbers));
            let bytes = std::fs::read(&numbers).unwrap();
            let found: Vec<f32> = bytes
                .chunks_exact(4)
                .map(|b| f32::from_le_bytes(b.try_into().unwrap()))
                .collect();
            assert_eq!(found.len(), expected.len(), "{format:?}");
            let differs = found
                .iter()
                .zip(&expected)
                .position(|(a, b)| a.to_bits() != b.to_bits());
            assert_eq!(
                differs,
                None,
                "{format:?}: {:?}",
                differs.map(|at| (found[at], expected[at]))
            );
        });
    }
}

/// Compares one layer with its adapter to Burn's own product. C gets the same bits, as the test
/// above checks.
#[test]
fn a_layer_is_the_decoders_own() {
    let (model, name) = (model(WeightFormat::F32), "model.layers.1.mlp.down_proj");
    let linear = model.linear(model.layer_index(name).unwrap(), 0).unwrap();
    assert_eq!((linear.rank(), linear.d_input()), (4, 37));
    let x: Vec<f32> = (0..2 * 37).map(number).collect();
    let mut y = vec![0.0; 2 * linear.d_output()];
    linear
        .forward(2, &x, 37, &mut y, linear.d_output(), None)
        .unwrap();
    let mut net = net().clone();
    net.activate(&net.maximal()).unwrap();
    let decoder = net.eval_model();
    let (_, layer) = decoder.linears().find(|(found, _)| found == name).unwrap();
    let data = burn::tensor::TensorData::new(x, [2, 37]);
    let expected = host_values(layer.forward(burn::tensor::Tensor::<2>::from_data(
        data,
        &burn::tensor::Device::flex(),
    )));
    let largest = expected.iter().fold(0.0f32, |max, y| max.max(y.abs()));
    assert!(
        largest > 0.1 && common::max_diff(&y, &expected) < 1e-5 * largest,
        "{y:?} {expected:?}"
    );
}

#[test]
fn c_plus_plus_programs_run() {
    let source = |name: &str| root().join("tests/cpp").join(name);
    for (index, compiler) in compilers("c++").into_iter().enumerate() {
        let kind = [Link::Shared, Link::Static][index];
        let mut command = compile(compiler, ["c++17", "c++20"][index]);
        command.arg(source("wrapper.cpp"));
        let wrapper = link(command, kind, &format!("wrapper-{index}"));
        succeed(
            Command::new(wrapper)
                .arg(bundle())
                .arg(folder())
                .arg(scratch(&format!("parts-{index}"))),
        );
        if let Some(talking) = talking() {
            let mut command = compile(compiler, ["c++17", "c++20"][index]);
            command.arg(source("server.cpp"));
            let server = link(command, kind, &format!("server-{index}"));
            let printed = succeed(Command::new(server).arg(talking));
            let texts: Vec<&str> = printed.lines().collect();
            // Each sequence draws for itself, and the subnets differ.
            assert_eq!(texts.len(), 4, "{printed}");
            let differ: BTreeSet<&&str> = texts.iter().collect();
            assert!(differ.len() > 2, "{printed}");
        }
        let mut command = compile(compiler, "c++11");
        command.arg("-fno-exceptions").arg(source("results.cpp"));
        let results = link(command, kind, &format!("results-{index}"));
        succeed(Command::new(results).arg(bundle()));
    }
}

#[test]
fn programs_are_clean_under_address_sanitizer() {
    let Some(compiler) = compilers("c").first().copied() else {
        return;
    };
    let folder_in = scratch("asan-probe");
    std::fs::write(folder_in.join("probe.c"), "int main(void) { return 0; }\n").unwrap();
    let mut probe = Command::new(compiler);
    probe
        .args(["-fsanitize=address,undefined", "-o"])
        .arg(folder_in.join("probe"))
        .arg(folder_in.join("probe.c"));
    if !run(&mut probe).status.success()
        || !run(&mut Command::new(folder_in.join("probe")))
            .status
            .success()
    {
        eprintln!("skipped: {compiler} has no AddressSanitizer");
        return;
    }
    let mut command = compile(compiler, "gnu11");
    command
        .args(["-fsanitize=address,undefined", "-fno-sanitize-recover=all"])
        .args(c_sources());
    let program = link(command, Link::Shared, "asan");
    let asan = |arguments: &[&Path]| {
        let mut command = Command::new(&program);
        command
            .env(
                "ASAN_OPTIONS",
                "detect_leaks=1:detect_stack_use_after_return=1",
            )
            .args(arguments);
        succeed(&mut command);
    };
    asan(&[
        "hostile".as_ref(),
        bundle(),
        &folder(),
        &scratch("asan-hostile"),
    ]);
    asan(&[
        "dump".as_ref(),
        bundle(),
        &scratch("asan-dump").join("numbers"),
    ]);
    for name in ["order", "threads", "panic"] {
        asan(&[name.as_ref(), bundle()]);
    }
    let (model, adapter) = adapted();
    let folder = scratch("asan-adapt");
    asan(&["adapt".as_ref(), model, adapter, &folder]);
}

#[test]
fn programs_are_clean_under_valgrind() {
    if !has("valgrind") {
        return;
    }
    // Valgrind reports no AVX-512 to the program, so the kernels choose narrower instructions.
    let Some(program) = program(Link::Shared) else {
        return;
    };
    let valgrind = |kinds: &str, arguments: &[&Path]| {
        let mut command = Command::new("valgrind");
        command.args([
            "-q",
            "--error-exitcode=99",
            "--leak-check=full",
            "--fair-sched=yes",
        ]);
        command
            .arg(format!("--errors-for-leak-kinds={kinds}"))
            .arg(format!("--show-leak-kinds={kinds}"));
        succeed(command.arg(program).args(arguments));
    };
    // The standard library keeps a handle of the main thread, 48 bytes, once a file is written or
    // something panics. It keeps it by a pointer into its middle, which valgrind reports as
    // possibly lost. Without a tokenizer, because reading it would take most of the time and is not
    // tested here.
    valgrind(
        "definite,indirect",
        &[
            "hostile".as_ref(),
            bundle(),
            "-".as_ref(),
            &scratch("valgrind-hostile"),
        ],
    );
    valgrind("definite,indirect", &["panic".as_ref(), bundle()]);
    let (model, adapter) = adapted();
    let folder = scratch("valgrind-adapt");
    valgrind(
        "definite,indirect",
        &["adapt".as_ref(), model, adapter, &folder],
    );
    valgrind("all", &["order".as_ref(), bundle()]);
    valgrind("all", &["threads".as_ref(), bundle()]);
}

/// The least time of a call in nanoseconds, of several runs of many.
fn time_of(mut call: impl FnMut()) -> f64 {
    const CALLS: u32 = 4000;
    let runs = (0..7).map(|_| {
        let start = Instant::now();
        for _ in 0..CALLS {
            call();
        }
        start.elapsed().as_secs_f64() * 1e9 / f64::from(CALLS)
    });
    runs.fold(f64::INFINITY, f64::min)
}

/// What the Rust API takes for the work that `tests/c/overhead.c` has in some of its calls.
fn work_in_rust(model: &Model) -> [(&'static str, f64); 4] {
    let linear = model.linear(0, 0).unwrap();
    let (inputs, outputs) = (linear.d_input(), linear.d_output());
    let x: Vec<f32> = (0..inputs).map(number).collect();
    let (mut y, mut scratch) = (
        vec![0.0; outputs],
        vec![0u8; linear.scratch_bytes(1).unwrap()],
    );
    let linear = time_of(|| {
        linear
            .forward(1, &x, inputs, &mut y, outputs, Some(&mut scratch))
            .unwrap();
    });
    let mut session = Session::new(model, &SessionConfig::default()).unwrap();
    let mut logits = vec![0.0; model.config().vocab_size()];
    session.decode(&[1, 5, 9], None).unwrap();
    let decode = time_of(|| {
        session.decode(&[1], Some(&mut logits)).unwrap();
        session.truncate(3);
    });
    let steps = time_of(|| {
        decode_steps(&mut [Step {
            session: &mut session,
            tokens: &[1],
            logits: &mut logits,
        }])
        .unwrap();
        session.truncate(3);
    });
    let copy = time_of(|| drop(session.copy()));
    [
        ("linear", linear),
        ("decode", decode),
        ("decode_steps", steps),
        ("copy", copy),
    ]
}

/// No call of C takes a microsecond more than its work. Run with `--nocapture` for the times.
#[test]
fn a_call_costs_well_under_a_microsecond() {
    let Some(program) = program(Link::Shared) else {
        return;
    };
    let model = Model::open(bundle(), &ModelOptions::default().with_n_threads(1)).unwrap();
    let (adapted, adapter) = adapted();
    let talking = talking().unwrap_or(Path::new("-"));
    // Other processes may use the machine, so the best of several attempts counts.
    let mut best: BTreeMap<String, f64> = BTreeMap::new();
    for attempt in 0..6 {
        let rust = work_in_rust(&model);
        let mut command = Command::new(program);
        command.arg("overhead").arg(bundle()).arg(talking);
        let printed = succeed(command.arg(adapted).arg(adapter));
        for line in printed.lines() {
            let (name, time) = line.split_once(' ').unwrap();
            let mut time: f64 = time.parse().unwrap();
            if let Some((_, work)) = rust.iter().find(|(work, _)| *work == name) {
                println!("{name}: {time:.0} ns from C, {work:.0} ns from Rust");
                time -= work;
            }
            let least = best.entry(name.to_string()).or_insert(f64::INFINITY);
            *least = least.min(time);
        }
        if attempt > 1 && best.values().all(|time| *time < 500.0) {
            break;
        }
    }
    assert!(best.len() > 50, "{best:?}");
    let slow: Vec<_> = best.iter().filter(|(_, time)| **time >= 1000.0).collect();
    for (name, time) in &best {
        println!("{name} {time:.1}");
    }
    assert!(slow.is_empty(), "{slow:?}");
}

#[test]
fn a_build_whose_panics_abort_is_refused() {
    let output = run(&mut cargo("rlib", &["-C", "panic=abort"]));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && text.contains("feature `capi` needs `panic = \\\"unwind\\\"`"),
        "{text}"
    );
}

/// CMake's first call on a project. The crate is built as in the other tests, so that cargo has
/// nothing to do.
fn configure(source: &Path, build: &Path) -> Command {
    let mut command = Command::new("cmake");
    command
        .arg("-S")
        .arg(source)
        .arg("-B")
        .arg(build)
        .arg("-DCMAKE_BUILD_TYPE=Release");
    let target = tools::profile_dir().parent().unwrap().to_path_buf();
    command.arg(format!("-DELASTIC_LORA_TARGET_DIR={}", target.display()));
    command.arg(format!("-DELASTIC_LORA_PROFILE={}", tools::profile()));
    command.arg(format!(
        "-DELASTIC_LORA_RUSTC_FLAGS={}",
        tools::RUSTC_FLAGS.join(";")
    ));
    command
}

fn cmake_build(build: &Path) {
    succeed(Command::new("cmake").arg("--build").arg(build));
}

/// Runs the examples in these folders, and checks what they print.
fn try_examples(c: &Path, cpp: &Path) {
    let printed = succeed(
        Command::new(c.join("apply_linear"))
            .arg(bundle())
            .args(["model.layers.0.mlp.down_proj", "3"]),
    );
    assert!(
        printed.contains("16 -> 24, rank 2") && printed.contains("37 -> 24, rank 4"),
        "{printed}"
    );
    let printed = succeed(
        Command::new(c.join("generate"))
            .arg(bundle())
            .args(["1,17,5", "least", "0.7", "3"]),
    );
    assert!(printed.contains("tokens"), "{printed}");
    if folder().is_dir() {
        let question =
            "Question: Tom has 12 pens and finds 5 more. How many pens does Tom have now?\nAnswer:";
        let printed = succeed(Command::new(c.join("generate")).arg(folder()).arg(question));
        assert!(printed.len() > 20, "{printed}");
    }
    let refused = run(Command::new(c.join("generate"))
        .arg(bundle())
        .args(["1,x", "least"]));
    assert_eq!(refused.status.code(), Some(2));
    for subnet in ["whole", "least", "middle"] {
        let printed = succeed(
            Command::new(cpp.join("inference"))
                .arg(bundle())
                .args([subnet, "20", "5"]),
        );
        assert!(
            printed.lines().count() == 6 && printed.contains("largest difference"),
            "{printed}"
        );
    }
}

#[test]
fn other_projects_find_the_library() {
    if !has("cmake") || compilers("c++").is_empty() {
        return;
    }
    library();
    let work = scratch("consumers");
    // The examples use the source tree that they are in. CMake has cargo build it.
    let (c, cpp) = (work.join("c"), work.join("cpp"));
    succeed(&mut configure(&root().join("examples/c"), &c));
    cmake_build(&c);
    succeed(configure(&root().join("examples/cpp"), &cpp).arg("-DELASTIC_LORA_LINK_STATIC=ON"));
    cmake_build(&cpp);
    try_examples(&c, &cpp);

    // The installation is moved afterwards: no file in it contains its path.
    let (build, stage, prefix) = (work.join("build"), work.join("stage"), work.join("prefix"));
    let install = format!("-DCMAKE_INSTALL_PREFIX={}", stage.display());
    succeed(configure(root(), &build).args([install.as_str(), "-DCMAKE_INSTALL_LIBDIR=lib"]));
    cmake_build(&build);
    succeed(Command::new("cmake").arg("--install").arg(&build));
    std::fs::rename(&stage, &prefix).unwrap();
    assert!(prefix.join("include/elastic_lora.hpp").is_file());

    // A project that only knows the installation.
    let outside = tempfile::tempdir().unwrap();
    std::fs::copy(
        root().join("tests/cpp/results.cpp"),
        outside.path().join("app.cpp"),
    )
    .unwrap();
    std::fs::copy(
        root().join("examples/c/apply_linear.c"),
        outside.path().join("app.c"),
    )
    .unwrap();
    std::fs::write(
        outside.path().join("CMakeLists.txt"),
        "cmake_minimum_required(VERSION 3.16)\n\
         project(app LANGUAGES C CXX)\n\
         find_package(elastic_lora 0.1 REQUIRED)\n\
         add_executable(app app.cpp)\n\
         target_link_libraries(app PRIVATE elastic_lora::shared)\n\
         add_executable(app_static app.c)\n\
         target_link_libraries(app_static PRIVATE elastic_lora::static m)\n",
    )
    .unwrap();
    let build = outside.path().join("build");
    let mut command = Command::new("cmake");
    command
        .arg("-S")
        .arg(outside.path())
        .arg("-B")
        .arg(&build)
        .arg(format!("-DCMAKE_PREFIX_PATH={}", prefix.display()));
    succeed(&mut command);
    cmake_build(&build);
    succeed(Command::new(build.join("app")).arg(bundle()));
    succeed(Command::new(build.join("app_static")).arg(bundle()));
    // Another minor version has another binary interface.
    let wrong = outside.path().join("wrong");
    std::fs::create_dir(&wrong).unwrap();
    std::fs::write(
        wrong.join("CMakeLists.txt"),
        "cmake_minimum_required(VERSION 3.16)\nproject(app C)\nfind_package(elastic_lora 0.2 REQUIRED)\n",
    )
    .unwrap();
    let mut command = Command::new("cmake");
    command
        .arg("-S")
        .arg(&wrong)
        .arg("-B")
        .arg(wrong.join("build"));
    assert!(
        !run(command.arg(format!("-DCMAKE_PREFIX_PATH={}", prefix.display())))
            .status
            .success()
    );

    let lib = prefix.join("lib");
    let rpath = format!("-Wl,-rpath,{}", lib.display());
    // The compiler commands of the README, shared and static.
    let compiler = compilers("c")[0];
    let app = outside.path().join("plain");
    let source = outside.path().join("app.c");
    let mut command = Command::new(compiler);
    command
        .arg(&source)
        .arg("-I")
        .arg(prefix.join("include"))
        .arg("-L")
        .arg(&lib)
        .arg(&rpath);
    succeed(command.args(["-lelastic_lora", "-lm", "-o"]).arg(&app));
    succeed(Command::new(&app).arg(bundle()));
    let mut command = Command::new(compiler);
    command
        .arg(&source)
        .arg("-I")
        .arg(prefix.join("include"))
        .arg(lib.join("libelastic_lora.a"));
    succeed(
        command
            .args([
                "-lgcc_s",
                "-lutil",
                "-lrt",
                "-lpthread",
                "-lm",
                "-ldl",
                "-o",
            ])
            .arg(&app),
    );
    succeed(Command::new(&app).arg(bundle()));

    // The Makefile of the guide, in a folder that holds nothing else.
    if has("make") {
        let guide = std::fs::read_to_string(root().join("docs/c-and-cpp.md")).unwrap();
        let makefile = guide.split_once("```make\n").unwrap().1;
        let makefile = makefile.split_once("```").unwrap().0;
        let empty = tempfile::tempdir().unwrap();
        std::fs::write(empty.path().join("Makefile"), makefile).unwrap();
        std::fs::copy(&source, empty.path().join("app.c")).unwrap();
        let mut command = Command::new("make");
        command.current_dir(empty.path());
        succeed(command.arg(format!("P={}", prefix.display())));
        succeed(Command::new(empty.path().join("app")).arg(bundle()));
    }

    if has("pkg-config") {
        let ask = |what: &[&str]| {
            let mut command = Command::new("pkg-config");
            command
                .env("PKG_CONFIG_PATH", lib.join("pkgconfig"))
                .args(what)
                .arg("elastic_lora");
            succeed(&mut command)
        };
        assert_eq!(ask(&["--modversion"]).trim(), env!("CARGO_PKG_VERSION"));
        assert!(ask(&["--libs", "--static"]).contains("-lpthread"));
        let flags = ask(&["--cflags", "--libs"]);
        let mut command = Command::new(compiler);
        command
            .arg(&source)
            .args(flags.split_whitespace())
            .arg(&rpath)
            .args(["-lm", "-o"])
            .arg(&app);
        succeed(&mut command);
        succeed(Command::new(&app).arg(bundle()));
    }
}
