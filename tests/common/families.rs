//! The tiny models of `fixtures/families`, which transformers made and ran.

use std::path::PathBuf;

use elastic_lora::adapter::LoraConfig;
use elastic_lora::arch::BlockDims;
use elastic_lora::data::{Batcher, Sequence};
use elastic_lora::io::Checkpoint;
use elastic_lora::model::Decoder;
use elastic_lora::progress::Silent;
use elastic_lora::runtime::{Model, ModelOptions};
use elastic_lora::space::{Elastic, Group, LayerShape};
use elastic_lora::supernet::SuperNetConfig;
use elastic_lora::train::{TrainConfig, Trainer};
use elastic_lora::{SearchSpace, SubnetConfig, SuperNet};

use super::{load, load_i32, random_ids};

/// A model folder and what transformers computes with it, for two sequences of token ids.
pub struct Fixture {
    pub name: String,
    pub path: PathBuf,
    /// The token ids of each sequence.
    pub ids: Vec<Vec<u32>>,
    /// The logits after each token, `[len, vocab]` for each sequence.
    pub logits: Vec<Vec<f32>>,
    /// The same if the tokens are passed one by one, each after the cached tokens before it.
    pub stepped: Vec<Vec<f32>>,
    /// Whether `stepped` differs from `logits`, because rotary positions depend on the length.
    pub by_length: bool,
    /// The most probable continuation of each sequence.
    pub greedy: Vec<Vec<u32>>,
}

impl Fixture {
    /// Returns all fixtures of supported families, sorted by name.
    pub fn all() -> Vec<Self> {
        let root = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/families");
        let mut folders: Vec<PathBuf> = std::fs::read_dir(root)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.join("config.json").exists())
            .collect();
        folders.sort();
        assert!(folders.len() >= 25, "{} folders", folders.len());
        folders.into_iter().map(Self::open).collect()
    }

    fn open(path: PathBuf) -> Self {
        let reference = Checkpoint::open(path.join("reference.safetensors")).unwrap();
        let rows = |name: &str| -> Vec<Vec<u32>> {
            let values = load_i32(&reference, name);
            values.chunks(values.len() / 2).map(<[_]>::to_vec).collect()
        };
        let logits = |name: &str| -> Vec<Vec<f32>> {
            let values = reference.load_f32(name).unwrap();
            values.chunks(values.len() / 2).map(<[_]>::to_vec).collect()
        };
        let by_length = reference.info("stepped").is_ok();
        Self {
            name: path.file_name().unwrap().to_str().unwrap().to_string(),
            ids: rows("input_ids"),
            logits: logits("logits"),
            stepped: logits(if by_length { "stepped" } else { "logits" }),
            by_length,
            greedy: rows("greedy"),
            path,
        }
    }

    /// Loads the model on the Flex device.
    pub fn decoder(&self) -> Decoder {
        load(&self.path)
    }

    /// Opens the model in the runtime.
    pub fn runtime(&self) -> Model {
        Model::open(&self.path, &ModelOptions::default()).unwrap()
    }
}

/// Returns the name of a layer without its block: `q_proj`.
fn kind(layer: &LayerShape) -> &str {
    layer.name.rsplit('.').next().unwrap()
}

/// A space of ranks, MLP widths, heads and depth, each with several choices for each block. Layers
/// that share an input share a rank.
pub fn space(model: &Decoder, ranks: &[usize]) -> SearchSpace {
    let (layers, config) = (model.layer_shapes(), model.config());
    let BlockDims {
        n_heads,
        n_kv_heads,
        d_mlp,
    } = config.blocks()[0];
    let present = |names: &[&'static str]| -> Vec<&'static str> {
        let found = |name: &&&str| layers.iter().any(|layer| kind(layer) == **name);
        names.iter().filter(found).copied().collect()
    };
    let qkv = present(&["q_proj", "k_proj", "v_proj", "qkv_proj"]);
    let gate_up = present(&["gate_proj", "up_proj", "gate_up_proj"]);
    let step = n_heads / n_kv_heads * config.head_dim();
    let heads: Vec<usize> = (1..=n_kv_heads).rev().map(|n| n * step).collect();
    let width = |names: &[&str], choices: &[usize]| {
        SearchSpace::groups_by_block(Elastic::Width, &layers, &[names], choices).unwrap()
    };
    let blocks = config.num_hidden_layers();
    // The first to go is block 1, so that the blocks after it move up; the last are the halves of
    // the last block.
    let mut parts = vec![
        format!("model.layers.{}.mlp", blocks - 1),
        format!("model.layers.{}.self_attn", blocks - 1),
    ];
    parts.extend((1..blocks - 1).rev().map(|n| format!("model.layers.{n}")));
    let depths = (0..=parts.len()).rev().collect();
    SearchSpace::grouped(
        &layers,
        &[&qkv[..], &gate_up, &["o_proj"], &["down_proj"]],
        ranks,
    )
    .unwrap()
    .with_groups(width(&gate_up, &[d_mlp, d_mlp * 2 / 3, d_mlp / 4]))
    .unwrap()
    .with_groups(if heads.len() > 1 {
        width(&qkv, &heads)
    } else {
        Vec::new()
    })
    .unwrap()
    .with_groups([Group::of_kind(Elastic::Depth, "depth", parts, depths).unwrap()])
    .unwrap()
}

/// A supernet with fresh adapters on every linear layer.
pub fn fresh(model: Decoder) -> SuperNet {
    let space = space(&model, &[4, 3]);
    let config = SuperNetConfig::new(LoraConfig::new(4).with_alpha(6.0)).with_seed(3);
    SuperNet::new(model, space, config).unwrap()
}

/// A supernet whose adapters were trained for a few steps, so that they matter.
pub fn trained(model: Decoder) -> SuperNet {
    let mut net = fresh(model);
    train(&mut net, 4);
    net
}

pub fn train(net: &mut SuperNet, steps: usize) {
    let sequences = (0..4)
        .map(|seed| Sequence::unmasked(random_ids(11, 43, seed)))
        .collect();
    let mut batches = Batcher::new(sequences, 2, 0, 1).unwrap();
    let config = TrainConfig {
        lr: 0.03,
        ..TrainConfig::new(steps)
    };
    Trainer::new(config)
        .unwrap()
        .run(net, &mut batches, &[], &Silent)
        .unwrap();
}

/// Returns the maximal subnet with the smallest ranks in every other group of ranks.
pub fn mixed_ranks(net: &SuperNet) -> SubnetConfig {
    let mut subnet = net.maximal();
    for group in net.space().groups_of_kind(Elastic::Rank).step_by(2) {
        subnet.set(group.id(), *group.choices().last().unwrap());
    }
    subnet
}

/// Returns subnets whose blocks have equal sizes, smaller than those of the model: narrower MLPs
/// and fewer heads, fewer blocks, and all of these.
pub fn uniform_subnets(net: &SuperNet) -> Vec<(&'static str, SubnetConfig)> {
    let narrow = |mut subnet: SubnetConfig| {
        for group in net.space().groups_of_kind(Elastic::Width) {
            subnet.set(group.id(), group.choices()[1]);
        }
        subnet
    };
    let shallow = |mut subnet: SubnetConfig, depth| {
        subnet.set("depth", depth);
        subnet
    };
    let whole = net.space().group("depth").unwrap().layers().len();
    let mut subnets = vec![
        ("narrow", narrow(mixed_ranks(net))),
        ("one-block", shallow(narrow(net.maximal()), 0)),
    ];
    // Above two, blocks go before halves of blocks do.
    if whole > 2 {
        subnets.push(("shallow", shallow(net.maximal(), whole - 1)));
    }
    subnets
}
