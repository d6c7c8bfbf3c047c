use std::collections::HashSet;
use std::fs;
use std::path::PathBuf;

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;

const SHEARS: [&[&str]; 3] = [
    &["q_proj", "k_proj", "v_proj"],
    &["up_proj", "gate_proj"],
    &["down_proj"],
];

fn llama(n_blocks: usize) -> Vec<LayerShape> {
    let names = [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
    ];
    let mlp = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"];
    (0..n_blocks)
        .flat_map(|block| {
            names
                .iter()
                .chain(&mlp)
                .map(move |name| LayerShape::new(format!("model.layers.{block}.{name}"), 24, 36))
        })
        .collect()
}

fn space() -> SearchSpace {
    SearchSpace::grouped(&llama(11), &SHEARS, &[16, 32, 24, 24]).unwrap()
}

fn write(dir: &tempfile::TempDir, text: &str) -> PathBuf {
    let path = dir.path().join("file.json");
    fs::write(&path, text).unwrap();
    path
}

#[test]
fn grouped_makes_the_space_of_shears() {
    let space = space();
    assert_eq!(space.len(), 33);
    let group = &space.groups()[3];
    assert_eq!(group.id(), "layers.1.q_proj+k_proj+v_proj");
    assert_eq!(group.layers()[2], "model.layers.1.self_attn.v_proj");
    assert_eq!(group.choices(), [32, 24, 16]);
    assert_eq!(space.groups()[5].id(), "layers.1.down_proj");
    assert_eq!(space.n_subnets_exact(), Some(3u128.pow(33)));
    assert!((space.n_subnets() / 3f64.powi(33) - 1.0).abs() < 1e-12);
    assert!((space.log10_n_subnets() - 33.0 * 3f64.log10()).abs() < 1e-9);
    assert!(
        space
            .group_of_layer("model.layers.1.self_attn.o_proj")
            .is_none()
    );
    assert_eq!(space.max_rank(), 32);

    let big = SearchSpace::per_layer(&llama(200), &[1, 2, 3]).unwrap();
    assert_eq!(big.n_subnets_exact(), None);
    assert!(big.log10_n_subnets() > 660.0);
}

#[test]
fn blocks_may_lack_a_suffix_but_not_all_of_them() {
    let mut layers = llama(3);
    layers.retain(|layer| layer.name != "model.layers.1.mlp.down_proj");
    let space = SearchSpace::grouped(&layers, &SHEARS, &[4, 2]).unwrap();
    assert_eq!(space.len(), 8);
    let wrong: [&[&str]; 2] = [&["q_proj"], &["c_fc", "c_proj"]];
    let error = SearchSpace::grouped(&layers, &wrong, &[4, 2]).unwrap_err();
    assert!(error.to_string().contains("c_fc"), "{error}");
    // "proj" matches no path at a dot
    assert!(SearchSpace::grouped(&layers, &[["proj"]], &[4]).is_err());
    // a layer in two groups
    let error =
        SearchSpace::grouped(&layers, &[["q_proj"], ["self_attn.q_proj"]], &[4]).unwrap_err();
    assert!(matches!(error, Error::InvalidSpace { .. }), "{error}");
}

#[test]
fn extremes_and_heuristic() {
    let group = |id: &str, choices: &[usize]| {
        Group::new(id, vec![format!("m.{id}")], choices.to_vec()).unwrap()
    };
    let space = SearchSpace::new(vec![
        group("a", &[32, 24, 16]),
        group("b", &[32, 28, 24, 20, 16]),
        group("c", &[32, 28]),
        group("d", &[11008, 9632, 8256, 6880, 5504]),
        group("e", &[7]),
    ])
    .unwrap();
    assert_eq!(
        space.values(&space.heuristic()).unwrap(),
        [24, 24, 32, 8256, 7]
    );
    assert_eq!(
        space.values(&space.maximal()).unwrap(),
        [32, 32, 32, 11008, 7]
    );
    assert_eq!(
        space.values(&space.minimal()).unwrap(),
        [16, 16, 28, 5504, 7]
    );
    assert_eq!(space.encode(&space.maximal()).unwrap(), [0; 5]);
    let fixed = SearchSpace::fixed(&llama(2), 8).unwrap();
    assert_eq!(fixed.n_subnets_exact(), Some(1));
    assert_eq!(fixed.maximal(), fixed.minimal());
}

#[test]
fn broken_groups_and_spaces() {
    let layer = || vec!["l".to_string()];
    assert!(Group::new("", layer(), vec![1]).is_err());
    assert!(Group::new("g", vec![], vec![1]).is_err());
    assert!(Group::new("g", vec!["l".into(), "l".into()], vec![1]).is_err());
    assert!(Group::new("g", layer(), vec![]).is_err());
    assert!(Group::new("g", layer(), vec![4, 0]).is_err());
    assert!(SearchSpace::new(vec![]).is_err());
    let g = |id: &str, layer: &str| Group::new(id, vec![layer.into()], vec![2, 1]).unwrap();
    assert!(SearchSpace::new(vec![g("a", "l"), g("a", "m")]).is_err());
    let error = SearchSpace::new(vec![g("a", "l"), g("b", "l")]).unwrap_err();
    assert!(
        error.to_string().contains("`l`") && error.to_string().contains("`a`"),
        "{error}"
    );
}

#[test]
fn sampling_is_uniform_seeded_and_valid() {
    let space = space();
    let draw = |seed| {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        (0..600).map(|_| space.sample(&mut rng)).collect::<Vec<_>>()
    };
    let drawn = draw(5);
    assert_eq!(drawn, draw(5));
    assert_ne!(drawn, draw(6));
    for group in space.groups() {
        for &choice in group.choices() {
            let n = drawn
                .iter()
                .filter(|config| config.get(group.id()) == Some(choice))
                .count();
            assert!((140..260).contains(&n), "{} {choice}: {n}", group.id());
        }
    }
}

#[test]
fn genomes_and_values_round_trip() {
    let space = space();
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    for _ in 0..20 {
        let genome: Vec<usize> = (0..space.len()).map(|_| rng.random_range(0..3)).collect();
        let config = space.decode(&genome).unwrap();
        assert_eq!(space.encode(&config).unwrap(), genome);
        assert_eq!(
            space.from_values(&space.values(&config).unwrap()).unwrap(),
            config
        );
        assert_eq!(
            SubnetConfig::from_json(&config.to_json().unwrap()).unwrap(),
            config
        );
    }
    assert!(space.decode(&[0, 1]).is_err());
    assert!(space.decode(&[3; 33]).is_err());
    assert!(space.from_values(&[20; 33]).is_err());
    assert!(space.from_values(&[16; 32]).is_err());
}

#[test]
fn configs_are_checked() {
    let space = space();
    let mut config = space.maximal();
    config.set("layers.0.down_proj", 20);
    assert!(matches!(
        space.validate(&config),
        Err(Error::InvalidChoice { found: 20, .. })
    ));
    config.set("layers.0.down_proj", 16);
    let ranks = space.ranks(&config).unwrap();
    assert_eq!(
        (ranks.len(), ranks["model.layers.0.mlp.down_proj"]),
        (66, 16)
    );
    config.set("layers.99.down_proj", 16);
    assert!(matches!(
        space.validate(&config),
        Err(Error::UnknownGroup { .. })
    ));
    assert!(matches!(
        space.validate(&SubnetConfig::new()),
        Err(Error::UnknownGroup { .. })
    ));
}

#[test]
fn spaces_are_checked_against_layers() {
    let space = space();
    space.validate_layers(&llama(11), 32).unwrap();
    let error = space.validate_layers(&llama(10), 32).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("model.layers.10.self_attn.q_proj"),
        "{error}"
    );
    let error = space.validate_layers(&llama(11), 31).unwrap_err();
    assert!(
        matches!(
            error,
            Error::InvalidRank {
                found: 32,
                max: 31,
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn display_counts_runs_in_natural_order() {
    let config: SubnetConfig = [
        ("layers.10.a", 16),
        ("layers.2.a", 24),
        ("layers.1.a", 32),
        ("layers.0.a", 32),
        ("layers.9.a", 24),
    ]
    .map(|(id, value)| (id.to_string(), value))
    .into_iter()
    .collect();
    assert_eq!(config.to_string(), "32x2,24x2,16");
    assert_eq!(config.mean(), 25.6);
    assert_eq!(config.iter().count(), config.len());
    assert_eq!(SubnetConfig::new().to_string(), "");
    let set: HashSet<SubnetConfig> = [config.clone(), config].into();
    assert_eq!(set.len(), 1);
}

#[test]
fn own_json_round_trips_and_refuses_broken_rules() {
    let space = space();
    let text = space.to_json().unwrap();
    assert!(!text.contains("kind"));
    assert_eq!(SearchSpace::from_json(&text).unwrap(), space);
    let dir = tempfile::tempdir().unwrap();
    let path = write(&dir, &text);
    assert_eq!(SearchSpace::from_file(&path, &llama(11)).unwrap(), space);
    let error = SearchSpace::from_file(&path, &llama(2))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("file.json") && error.contains("model.layers.2"),
        "{error}"
    );

    let bad = [
        ("", "EOF"),
        ("{}", "groups"),
        (r#"{"groups": []}"#, "at least one group"),
        (
            r#"{"groups": [{"id": "a", "layers": ["l"], "choices": [2, 0]}]}"#,
            "over 0",
        ),
        (
            r#"{"groups": [{"id": "a", "layers": ["l"], "choices": [2, -1]}]}"#,
            "-1",
        ),
        (
            r#"{"groups": [{"id": "a", "layers": ["l"], "choices": [2, 1.5]}]}"#,
            "1.5",
        ),
        (
            r#"{"groups": [{"id": "a", "layers": [], "choices": [2]}]}"#,
            "no layers",
        ),
        (r#"{"groups": [{"id": "a", "layers": ["l"]}]}"#, "choices"),
        (
            r#"{"groups": [{"id": "a", "layers": ["l"], "choices": [2], "kind": "height"}]}"#,
            "height",
        ),
        (
            r#"{"groups": [{"id": "a", "layers": ["l"], "choices": [2], "rank": 3}]}"#,
            "rank",
        ),
        (r#"{"groups": [], "extra": 1}"#, "extra"),
    ];
    for (text, part) in bad {
        let error = SearchSpace::from_json(text).unwrap_err().to_string();
        assert!(error.contains(part), "{text}: {error}");
        assert!(SearchSpace::from_file(write(&dir, text), &llama(2)).is_err());
    }
    assert!(matches!(
        SearchSpace::from_file(dir.path().join("none"), &[]),
        Err(Error::Io { .. })
    ));
}

#[test]
fn reads_elastic_adapter_configs() {
    let dir = tempfile::tempdir().unwrap();
    let text = r#"[
        {"target": ["base_model.model.model.layers.0.self_attn.q_proj.lora_A",
                    "base_model.model.model.layers.0.self_attn.v_proj.lora_A.default.weight",
                    "base_model.model.model.layers.0.self_attn.v_proj.lora_B"], "search_space": [8, 4, 2]},
        {"target": ["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"], "search_space": [2, 8]}]"#;
    let space = SearchSpace::from_file(write(&dir, text), &llama(2)).unwrap();
    assert_eq!(space.groups()[0].id(), "layers.0.q_proj+v_proj");
    assert_eq!(
        space.groups()[0].layers(),
        [
            "model.layers.0.self_attn.q_proj",
            "model.layers.0.self_attn.v_proj"
        ]
    );
    assert_eq!(space.groups()[1].choices(), [8, 2]);
    let error = SearchSpace::from_file(write(&dir, text), &llama(1))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("file.json: field `[1].target`") && error.contains("layers.1"),
        "{error}"
    );

    let bad = [
        ("[]", "at least one"),
        ("[3]", "[0]"),
        (
            r#"[{"target": ["model.layers.0.self_attn.q_proj"]}]"#,
            "[0].search_space",
        ),
        (
            r#"[{"target": ["model.layers.0.self_attn.q_proj"], "active_rank_value": 4}]"#,
            "subnet",
        ),
        (r#"[{"search_space": [4]}]"#, "[0].target"),
        (r#"[{"target": [7], "search_space": [4]}]"#, "[0].target[0]"),
        (r#"[{"target": [], "search_space": [4]}]"#, "no layers"),
        (
            r#"[{"target": ["model.layers.0.self_attn.q_proj"], "search_space": [4, 0]}]"#,
            "[0].search_space[1]",
        ),
        (
            r#"[{"target": ["model.layers.0.self_attn.q_proj"], "search_space": []}]"#,
            "no choices",
        ),
        (
            r#"[{"target": ["model.layers.0.self_attn.q_proj"], "search_space": 4}]"#,
            "not a list",
        ),
    ];
    for (text, part) in bad {
        let error = SearchSpace::from_file(write(&dir, text), &llama(2))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains(part) && error.contains("file.json"),
            "{text}: {error}"
        );
    }
}

#[test]
fn reads_subnets_in_three_forms() {
    let dir = tempfile::tempdir().unwrap();
    let space = SearchSpace::grouped(&llama(2), &[["q_proj", "v_proj"]], &[8, 4, 2]).unwrap();
    let expected = space.from_values(&[4, 2]).unwrap();
    let custom = r#"[
        {"target": ["base_model.model.model.layers.1.self_attn.q_proj.lora_A"], "active_rank_value": 2},
        {"target": ["base_model.model.model.layers.0.self_attn.q_proj.lora_A",
                    "base_model.model.model.layers.0.self_attn.v_proj.lora_A"], "active_rank_value": 4}]"#;
    for text in [custom, "[4, 2]", &expected.to_json().unwrap()] {
        assert_eq!(space.config_from_file(write(&dir, text)).unwrap(), expected);
    }

    let bad = [
        ("[4]", "expected [2]"),
        ("[4, 3]", "3 is not one of"),
        ("[4, \"a\"]", "[1]"),
        ("7", "a number"),
        (r#"{"layers.0.q_proj+v_proj": 4}"#, "layers.1.q_proj+v_proj"),
        (
            r#"[{"target": ["model.layers.0.self_attn.q_proj"], "active_rank_value": 3}]"#,
            "[0].active_rank_value",
        ),
        (
            r#"[{"target": ["model.layers.0.self_attn.q_proj"], "active_rank_value": "4"}]"#,
            "[0].active_rank_value",
        ),
        (
            r#"[{"target": ["model.layers.0.mlp.up_proj"], "active_rank_value": 4}]"#,
            "up_proj",
        ),
        (
            r#"[{"target": ["model.layers.0.self_attn.q_proj"], "active_rank_value": 4}]"#,
            "layers.1.q_proj+v_proj",
        ),
        (
            r#"[{"target": ["model.layers.0.self_attn.q_proj"], "active_rank_value": 4},
                {"target": ["model.layers.0.self_attn.v_proj"], "active_rank_value": 8}]"#,
            "4 already",
        ),
    ];
    for (text, part) in bad {
        let error = space
            .config_from_file(write(&dir, text))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains(part) && error.contains("file.json"),
            "{text}: {error}"
        );
    }
}

fn nncf(groups: &str, widths: &str) -> String {
    format!(
        r#"{{"input_info": [{{"keyword": "input_ids"}}], "bootstrapNAS": {{"training": {{"algorithm": "progressive_shrinking",
        "elasticity": {{"available_elasticity_dims": ["width"],
        "width": {{"overwrite_groups": {groups}, "overwrite_groups_widths": {widths}}}}}}}}}}}"#
    )
}

fn node(block: &str, tail: &str) -> String {
    format!(
        "PeftModelForCausalLM/LoraModel[base_model]/LlamaForCausalLM[model]/LlamaModel[model]/ModuleList[layers]/\
        LlamaDecoderLayer[{block}]/{tail}/NNCFLinear[default]/linear_0"
    )
}

#[test]
fn reads_nncf_groups_and_templates() {
    let dir = tempfile::tempdir().unwrap();
    let q = "LlamaAttention[self_attn]/Linear[q_proj]/ModuleDict[lora_A]";
    let v = "LlamaAttention[self_attn]/Linear[v_proj]/ModuleDict[lora_A]";
    let up = "LlamaMLP[mlp]/Linear[up_proj]/ModuleDict[lora_A]";

    let groups = format!(
        r#"[["{}", "{}"], ["{}"]]"#,
        node("0", q),
        node("0", v),
        node("1", up)
    );
    let space = SearchSpace::from_file(
        write(&dir, &nncf(&groups, "[[16, 12, 8], [32, 28]]")),
        &llama(3),
    )
    .unwrap();
    assert_eq!(space.groups()[0].id(), "layers.0.q_proj+v_proj");
    assert_eq!(space.groups()[1].layers(), ["model.layers.1.mlp.up_proj"]);
    assert_eq!(space.groups()[1].choices(), [32, 28]);

    // The template form: all blocks of the first group, then all of the second.
    let re = |tail: &str| format!("{{re}}{}", node("{*}", tail));
    let groups = format!(r#"[["{}", "{}"], ["{}"]]"#, re(q), re(v), re(up));
    let space = SearchSpace::from_file(
        write(&dir, &nncf(&groups, "[[32, 24, 16], [32, 24]]")),
        &llama(12),
    )
    .unwrap();
    assert_eq!(space.len(), 24);
    assert_eq!(space.groups()[11].id(), "layers.11.q_proj+v_proj");
    assert_eq!(space.groups()[12].id(), "layers.0.up_proj");
    assert_eq!(space.groups()[12].choices(), [32, 24]);

    // Without PEFT's wrapper, as NNCF prints a bare model.
    let bare = "LlamaForCausalLM/LlamaModel[model]/ModuleList[layers]/LlamaDecoderLayer[2]/LlamaAttention[self_attn]/\
        Linear[k_proj]/ModuleDict[lora_A]/NNCFLinear[default]/linear_0";
    let space = SearchSpace::from_file(
        write(&dir, &nncf(&format!(r#"[["{bare}"]]"#), "[[8]]")),
        &llama(3),
    )
    .unwrap();
    assert_eq!(
        space.groups()[0].layers(),
        ["model.layers.2.self_attn.k_proj"]
    );
}

#[test]
fn reads_lonas_widths() {
    let dir = tempfile::tempdir().unwrap();
    let re = |tail: &str| format!("{{re}}{}", node("{*}", tail));
    let base = |name: &str| {
        "{re}PeftModelForCausalLM/LoraModel[base_model]/LlamaForCausalLM[model]/LlamaModel[model]/ModuleList[layers]/\
        LlamaDecoderLayer[{*}]/LlamaMLP[mlp]/Linear[NAME]/NNCFUserSelfLinear[self_linear]/linear_0"
            .replace("NAME", name)
    };
    let factor = |name: &str, factor: &str| {
        re(&format!(
            "LlamaMLP[mlp]/Linear[{name}]/ModuleDict[{factor}]"
        ))
    };
    let groups = serde_json::json!([
        [
            base("gate_proj"),
            factor("gate_proj", "lora_B"),
            base("up_proj"),
            factor("up_proj", "lora_B")
        ],
        [factor("gate_proj", "lora_A"), factor("up_proj", "lora_A")],
    ]);
    let file = write(&dir, &nncf(&groups.to_string(), "[[7, 5, 3], [4, 2]]"));
    let space = SearchSpace::from_file(file, &llama(2)).unwrap();
    assert_eq!(space.len(), 4);
    let (width, rank) = (&space.groups()[1], &space.groups()[3]);
    assert_eq!(
        (width.id(), width.kind()),
        ("layers.1.gate_proj+up_proj.width", Elastic::Width)
    );
    assert_eq!(
        (rank.id(), rank.kind()),
        ("layers.1.gate_proj+up_proj", Elastic::Rank)
    );
    assert_eq!(width.layers(), rank.layers());
    let heuristic = space.heuristic();
    assert_eq!(
        space.widths(&heuristic).unwrap()["model.layers.0.mlp.up_proj"],
        5
    );
    assert_eq!(
        space.ranks(&heuristic).unwrap()["model.layers.0.mlp.up_proj"],
        4
    );
    assert_eq!(space.max_rank(), 4);
}

#[test]
fn widths_and_depths_are_prefixes_too() {
    let layers = llama(3);
    let mlp = SearchSpace::groups_by_block(
        Elastic::Width,
        &layers,
        &[["gate_proj", "up_proj"]],
        &[5, 7],
    )
    .unwrap();
    let parts = [
        "model.layers.0",
        "model.layers.2",
        "model.layers.1.mlp",
        "model.layers.1",
    ]
    .map(String::from)
    .to_vec();
    let depth = Group::of_kind(Elastic::Depth, "depth", parts, vec![2, 4, 3]).unwrap();
    let ranks = SearchSpace::grouped(&layers, &SHEARS, &[4, 2]).unwrap();
    let space = ranks
        .clone()
        .with_groups(mlp)
        .unwrap()
        .with_groups([depth])
        .unwrap();
    assert_eq!((space.len(), space.max_rank()), (ranks.len() + 4, 4));
    space.validate_layers(&layers, 4).unwrap();
    assert_eq!(
        SearchSpace::from_json(&space.to_json().unwrap()).unwrap(),
        space
    );

    let smallest = space.minimal();
    assert_eq!(
        space
            .left_out(&smallest)
            .unwrap()
            .into_iter()
            .collect::<Vec<_>>(),
        ["model.layers.1", "model.layers.1.mlp"]
    );
    assert!(space.left_out(&space.maximal()).unwrap().is_empty());
    assert_eq!(
        space.widths(&smallest).unwrap()["model.layers.2.mlp.gate_proj"],
        5
    );
    assert_eq!(
        space.ranks(&smallest).unwrap(),
        ranks.ranks(&ranks.minimal()).unwrap()
    );
    assert_eq!(
        space
            .group_of(Elastic::Width, "model.layers.0.mlp.up_proj")
            .unwrap()
            .choices(),
        [7, 5]
    );
    assert_eq!(
        space
            .group_of(Elastic::Depth, "model.layers.2")
            .unwrap()
            .id(),
        "depth"
    );
    assert!(
        space
            .group_of(Elastic::Depth, "model.layers.0.mlp")
            .is_none()
    );
}

#[test]
fn widths_and_depths_that_make_no_sense_are_refused() {
    let mut layers = llama(2);
    let down = layers
        .iter_mut()
        .filter(|layer| layer.name.ends_with("down_proj"));
    down.for_each(|layer| (layer.d_input, layer.d_output) = (36, 24));
    let group = |kind, names: &[&str], choices: &[usize]| {
        Group::of_kind(
            kind,
            "it",
            names.iter().map(ToString::to_string).collect(),
            choices.to_vec(),
        )
    };
    let error = |result: Result<Group>| result.unwrap_err().to_string();
    assert!(error(group(Elastic::Depth, &["model.layers.0"], &[])).contains("no choices"));
    assert!(
        error(group(Elastic::Depth, &["model.layers.0"], &[2]))
            .contains("cannot keep 2 of 1 parts")
    );
    assert!(
        error(group(
            Elastic::Width,
            &["model.layers.0.mlp.up_proj"],
            &[3, 0]
        ))
        .contains("over 0")
    );
    assert_eq!(
        group(Elastic::Depth, &["model.layers.0"], &[0, 1])
            .unwrap()
            .choices(),
        [1, 0]
    );

    let check = |kind, names: &[&str], choices: &[usize]| {
        let group = group(kind, names, choices).unwrap();
        SearchSpace::new(vec![group])
            .unwrap()
            .validate_layers(&layers, 4)
            .unwrap_err()
    };
    let unknown = check(Elastic::Depth, &["model.layers.0", "model.layers.2"], &[1]);
    assert!(
        matches!(&unknown, Error::UnknownLayer { layer, .. } if layer == "model.layers.2"),
        "{unknown}"
    );
    let mixed = check(
        Elastic::Width,
        &["model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"],
        &[3],
    );
    assert!(mixed.to_string().contains("differ in shape"), "{mixed}");
    let wide = check(
        Elastic::Width,
        &["model.layers.0.mlp.up_proj"],
        &[1_000_000],
    );
    assert!(wide.to_string().contains("1000000 is more than"), "{wide}");

    let depth = |id: &str, part: &str| {
        Group::of_kind(Elastic::Depth, id, vec![part.into()], vec![1, 0]).unwrap()
    };
    let overlap = SearchSpace::new(vec![
        depth("a", "model.layers.1.mlp"),
        depth("b", "model.layers.1"),
    ])
    .unwrap_err();
    assert!(
        overlap
            .to_string()
            .contains("`model.layers.1.mlp` is part of `model.layers.1`"),
        "{overlap}"
    );
    SearchSpace::new(vec![
        depth("a", "model.layers.1"),
        depth("b", "model.layers.10"),
    ])
    .unwrap();
}

#[test]
fn refuses_broken_nncf_files() {
    let dir = tempfile::tempdir().unwrap();
    let q = |block: &str| {
        node(
            block,
            "LlamaAttention[self_attn]/Linear[q_proj]/ModuleDict[lora_A]",
        )
    };
    let with = |name: &str| format!(r#"[["{name}"]]"#);
    let moe = node("{*}", "Experts[{*}]/Linear[up]/ModuleDict[lora_A]");
    let bad = [
        (with(&q("0")), "[[8], [8]]", "2 lists for 1 groups"),
        (with(&q("0")), "[[]]", "no choices"),
        (with(&q("0")), "[8]", "overwrite_groups_widths[0]"),
        (with(&q("0")), "{}", "not a list"),
        (with(&q("7")), "[[8]]", "model.layers.7.self_attn.q_proj"),
        (with("a/b/c"), "[[8]]", "`b`"),
        (with("linear_0"), "[[8]]", "names no layer"),
        (with(&moe), "[[8]]", "exactly one"),
        (
            with(&node("{*}", "X[y]/ModuleDict[lora_A]")),
            "[[8]]",
            "model.layers.{*}.y",
        ),
        (
            format!(r#"[["{}"], ["{}"]]"#, q("0"), q("0")),
            "[[8], [4]]",
            "in a group already",
        ),
        (
            format!(r#"[["{}", "{}"]]"#, q("{*}"), q("0")),
            "[[8]]",
            "exactly one",
        ),
        (
            format!(
                r#"[["{}", "{}"]]"#,
                q("0"),
                q("0").replace("lora_A", "lora_B")
            ),
            "[[8]]",
            "ranks and widths",
        ),
        ("[[1]]".into(), "[[8]]", "overwrite_groups[0][0]"),
        ("[1]".into(), "[[8]]", "overwrite_groups[0]"),
    ];
    for (groups, widths, part) in &bad {
        let error = SearchSpace::from_file(write(&dir, &nncf(groups, widths)), &llama(1))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains(part) && error.contains("file.json"),
            "{groups} {widths}: {error}"
        );
    }
    let error = SearchSpace::from_file(write(&dir, r#"{"a": {"b": 1}}"#), &llama(1))
        .unwrap_err()
        .to_string();
    assert!(error.contains("overwrite_groups"), "{error}");
}

/// Reading a mutated file returns a value or an error, but never panics.
#[test]
fn mutated_files_do_not_panic() {
    let dir = tempfile::tempdir().unwrap();
    let layers = llama(2);
    let name = format!(
        "{{re}}{}",
        node(
            "{*}",
            "LlamaAttention[self_attn]/Linear[q_proj]/ModuleDict[lora_A]"
        )
    );
    let seeds = [
        SearchSpace::grouped(&layers, &SHEARS, &[4, 2]).unwrap().to_json().unwrap(),
        nncf(&format!(r#"[["{name}"]]"#), "[[8, 4]]"),
        r#"[{"target": ["base_model.model.model.layers.0.self_attn.q_proj.lora_A"], "search_space": [8, 4]}]"#.into(),
    ];
    let space = space();
    let mut rng = ChaCha8Rng::seed_from_u64(9);
    for round in 0..crate::input::rounds(2000) {
        let mut bytes = seeds[round % seeds.len()].clone().into_bytes();
        for _ in 0..rng.random_range(1..5) {
            let at = rng.random_range(0..bytes.len());
            match rng.random_range(0..3) {
                0 => bytes[at] = rng.random_range(0..=255),
                1 => bytes.truncate(at.max(1)),
                _ => bytes.insert(at, b"[]{}\",:0-/."[rng.random_range(0..11)]),
            }
        }
        let path = dir.path().join("file.json");
        fs::write(&path, &bytes).unwrap();
        let _ = SearchSpace::from_file(&path, &layers);
        let _ = space.config_from_file(&path);
    }
}
