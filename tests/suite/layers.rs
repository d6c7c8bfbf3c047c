//! Single linear layers on buffers of the caller, and decoding of tokens without memory allocation.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use crate::common::{random_matrix, random_values, tiny, tiny_dims, tiny_on};
use elastic_lora::Error;
use elastic_lora::SearchSpace;
use elastic_lora::SuperNet;
use elastic_lora::adapter::LoraConfig;
use elastic_lora::data::{Batcher, Sequence};
use elastic_lora::format::WeightFormat;
use elastic_lora::io::hf::LlamaDims;
use elastic_lora::progress::Silent;
use elastic_lora::runtime::{
    CacheFormat, FormatPlan, LinearLayer, Model, ModelOptions, Number, Session, SessionConfig,
    decode_batch,
};
use elastic_lora::space::Elastic;
use elastic_lora::supernet::SuperNetConfig;
use elastic_lora::train::{TrainConfig, Trainer};
use half::{bf16, f16};

/// An allocator that counts the allocations of each thread.
struct Counting;

thread_local! {
    static TAKEN: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: all calls are forwarded to the system allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let _ = TAKEN.try_with(|taken| taken.set(taken.get() + 1));
        // SAFETY: the caller upholds the contract of `GlobalAlloc::alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller upholds the contract of `GlobalAlloc::dealloc`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn taken() -> usize {
    TAKEN.with(Cell::get)
}

const FORMATS: [WeightFormat; 5] = [
    WeightFormat::F32,
    WeightFormat::Bf16,
    WeightFormat::SparseF16,
    WeightFormat::Int {
        bits: 4,
        group_size: Some(8),
        symmetric: false,
    },
    WeightFormat::SparseInt4 {
        group_size: Some(8),
        symmetric: true,
    },
];

/// A supernet with two widths and two ranks. Its adapters are trained for a few steps.
fn supernet(format: WeightFormat) -> Model {
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
    )
    .unwrap();
    let space = SearchSpace::grouped(&layers, &[["up_proj"], ["down_proj"]], &[4, 2]).unwrap();
    let config = SuperNetConfig::new(LoraConfig::new(4).with_alpha(6.0));
    let mut net = SuperNet::new(model, space.with_groups(widths).unwrap(), config).unwrap();
    let sequences = (0..4)
        .map(|seed| Sequence::unmasked(crate::common::random_ids(12, 41, seed)))
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
    let plan = FormatPlan::new(format).with_adapters(WeightFormat::F32);
    Model::from_supernet(&net, &[("least".into(), net.minimal())], plan).unwrap()
}

/// Computes the layer by definition in `f64`, from the leading part of the weight and of the
/// factors as the model stores them.
fn expected(model: &Model, layer: &LinearLayer, index: usize, x: &[f32]) -> Vec<f64> {
    let weight = model.weight(index).unwrap().to_matrix();
    let factors = model.factors(index).unwrap();
    let (d_input, d_output) = (layer.d_input(), layer.d_output());
    let mut y = Vec::new();
    for x in x.chunks(d_input) {
        let dot = |row: &[f32]| -> f64 {
            row.iter()
                .zip(x)
                .map(|(w, x)| f64::from(*w) * f64::from(*x))
                .sum()
        };
        for out in 0..d_output {
            let mut sum = dot(&weight.row(out)[..d_input]);
            if let Some((a, bt, scale)) = &factors {
                for rank in 0..layer.rank() {
                    sum += f64::from(*scale)
                        * dot(&a.row(rank)[..d_input])
                        * f64::from(bt.row(rank)[out]);
                }
            }
            y.push(sum);
        }
    }
    y
}

/// Applies a layer to rows with gaps, with unaligned scratch memory, and compares the results.
fn check<T: Number + std::fmt::Debug + PartialEq>(
    model: &Model,
    index: usize,
    subnet: usize,
    rows: usize,
    off: f64,
) {
    let layer = model.linear(index, subnet).unwrap();
    let (d_input, d_output) = (layer.d_input(), layer.d_output());
    let (ldx, ldy) = (d_input + 3, d_output + 2);
    let values = random_values(rows * ldx, 5 + index as u64);
    let x: Vec<T> = values.iter().map(|value| T::from_f32(*value)).collect();
    let gap = T::from_f32(77.0);
    let mut y = vec![gap; rows * ldy];
    let mut scratch = vec![0_u8; layer.scratch_bytes(rows).unwrap() + 5];
    let before = taken();
    layer
        .forward(rows, &x, ldx, &mut y, ldy, Some(&mut scratch[5..]))
        .unwrap();
    assert_eq!(taken(), before, "memory was taken");
    let packed: Vec<f32> = x
        .chunks(ldx)
        .flat_map(|row| row[..d_input].iter().map(|x| x.to_f32()))
        .collect();
    let want = expected(model, &layer, index, &packed);
    let largest = want.iter().fold(0.0_f64, |a, b| a.max(b.abs()));
    for (row, want) in want.chunks(d_output).enumerate() {
        for (out, want) in want.iter().enumerate() {
            let got = f64::from(y[row * ldy + out].to_f32());
            assert!(
                (got - want).abs() < off * largest,
                "layer {index}, {row}, {out}: {got} and {want}"
            );
        }
        assert!(
            y[row * ldy + d_output..(row + 1) * ldy]
                .iter()
                .all(|value| *value == gap),
            "a gap was written to"
        );
    }
    // The same without scratch memory of the caller.
    let mut again = vec![gap; rows * ldy];
    layer.forward(rows, &x, ldx, &mut again, ldy, None).unwrap();
    assert_eq!(again, y);
}

#[test]
fn a_layer_is_its_definition_in_every_format_and_subnet() {
    for format in FORMATS {
        let model = supernet(format).with_n_threads(1).unwrap();
        let off = if matches!(
            format,
            WeightFormat::Int { .. } | WeightFormat::SparseInt4 { .. }
        ) {
            2e-4
        } else {
            1e-5
        };
        for index in 0..model.layers().len() {
            for subnet in 0..2 {
                for rows in [1, 3, 40] {
                    check::<f32>(&model, index, subnet, rows, off);
                }
                check::<f16>(&model, index, subnet, 2, 2e-3);
                check::<bf16>(&model, index, subnet, 2, 1e-2);
            }
        }
        let up = model.layer_index("model.layers.1.mlp.up_proj").unwrap();
        let least = model.linear(up, 1).unwrap();
        assert_eq!(
            (least.d_input(), least.d_output(), least.rank()),
            (24, 16, 2)
        );
    }
}

#[test]
fn what_does_not_fit_a_layer_is_refused() {
    let model = supernet(WeightFormat::F32);
    let n = model.layers().len();
    assert!(matches!(
        model.linear(n, 0),
        Err(Error::InvalidArgument { name: "layer", .. })
    ));
    assert!(matches!(
        model.linear(0, 2),
        Err(Error::InvalidArgument { name: "subnet", .. })
    ));
    let layer = model.linear(0, 0).unwrap();
    // The model is dropped; the layer keeps it alive.
    drop(model);
    let (x, mut y) = (vec![1.0_f32; 60], vec![0.0_f32; 60]);
    let mut scratch = vec![0; layer.scratch_bytes(2).unwrap()];
    let mut forward = |rows, ldx, ldy, n_x: usize, n_y: usize, scratch: Option<&mut [u8]>| {
        layer.forward(rows, &x[..n_x], ldx, &mut y[..n_y], ldy, scratch)
    };
    forward(2, 24, 24, 48, 48, Some(&mut scratch)).unwrap();
    assert!(matches!(
        forward(2, 23, 24, 60, 60, None),
        Err(Error::InvalidArgument { name: "ldx", .. })
    ));
    assert!(matches!(
        forward(2, 24, 23, 60, 60, None),
        Err(Error::InvalidArgument { name: "ldy", .. })
    ));
    assert!(matches!(
        forward(2, 24, 24, 47, 60, None),
        Err(Error::ShapeMismatch { .. })
    ));
    assert!(matches!(
        forward(2, 24, 24, 60, 47, None),
        Err(Error::ShapeMismatch { .. })
    ));
    assert!(matches!(
        forward(usize::MAX, 24, 24, 60, 60, None),
        Err(Error::ShapeMismatch { .. })
    ));
    assert!(matches!(
        forward(3, usize::MAX / 2, 24, 60, 60, None),
        Err(Error::ShapeMismatch { .. })
    ));
    let short = scratch.len() - 1;
    assert!(matches!(
        forward(2, 24, 24, 60, 60, Some(&mut scratch[..short])),
        Err(Error::ShapeMismatch { .. })
    ));
    forward(0, 24, 24, 0, 0, None).unwrap();
    assert!(layer.scratch_bytes(usize::MAX).is_err());
}

#[test]
fn a_token_takes_no_memory() {
    for format in FORMATS {
        let model = supernet(format).with_n_threads(1).unwrap();
        let half = SessionConfig::default().with_cache(CacheFormat::F16);
        let mut sessions: Vec<Session> = [SessionConfig::default(), half]
            .iter()
            .map(|config| Session::new(&model, config).unwrap())
            .collect();
        let mut logits = vec![0.0; 2 * 41];
        for session in &mut sessions {
            session.decode(&[1, 2, 3], Some(&mut logits[..41])).unwrap();
            let before = taken();
            for token in 0..10 {
                session.decode(&[token], Some(&mut logits[..41])).unwrap();
            }
            assert_eq!(taken(), before, "{format:?}");
        }
        let (a, b) = sessions.split_at_mut(1);
        let mut both = [&mut a[0], &mut b[0]];
        decode_batch(&mut both, &[4, 5], &mut logits).unwrap();
        let before = taken();
        (0..10).for_each(|token| decode_batch(&mut both, &[token, 7], &mut logits).unwrap());
        assert_eq!(taken(), before, "{format:?}");
    }
}

#[test]
fn models_and_sessions_go_where_they_are_needed() {
    fn shared<T: Send + Sync + Clone + 'static>() {}
    fn moved<T: Send + 'static>() {}
    shared::<Model>();
    shared::<LinearLayer>();
    moved::<Session>();
    shared::<ModelOptions>();
    // A model whose weights the caller also has.
    let decoder = tiny(true, 3);
    let made = Model::from_matrices(
        decoder.config(),
        |_, [rows, cols]| {
            elastic_lora::format::StoredMatrix::from_matrix(
                &random_matrix(rows, cols, 3),
                WeightFormat::F32,
            )
        },
        |_, len| Ok(vec![1.0; len]),
    )
    .unwrap();
    assert_eq!(made.layers().len(), 15);
    let wrong = Model::from_matrices(
        decoder.config(),
        |_, [rows, cols]| {
            elastic_lora::format::StoredMatrix::from_matrix(
                &random_matrix(rows + 1, cols, 3),
                WeightFormat::F32,
            )
        },
        |_, len| Ok(vec![1.0; len]),
    );
    assert!(matches!(wrong, Err(Error::TensorShape { .. })));
}
