//! Measures one adapted layer, forward and backward, and one training step, by method:
//! `cargo bench --bench training -- layer`, or any other part of a name.
//!
//! A layer takes turns with its frozen base, and a step takes turns with that of LoRA. A table
//! after criterion's output shows the ratios. The `train_step` bench compares steps with other
//! programs and measures memory.
//!
//! Settings: `BENCH_SHAPE` (inputs x outputs) and `BENCH_TOKENS` for the layer, `BENCH_HIDDEN` and
//! `BENCH_BLOCKS` for the model.

mod common;

use std::time::Duration;

use burn::module::Module;
use burn::tensor::{Device, Distribution, Tensor};
use clap::ValueEnum;
use common::training::{Case, Method, Weights, data, net, run};
use common::{Shape, Subject, best, in_turns, median, setting, timed};
use criterion::Criterion;
use elastic_lora::adapter::ElasticLoraLinear;
use elastic_lora::nn::host_values;
use elastic_lora::{ElasticLoraLinearConfig, Result};

/// Returns a measurement of a layer, forward and backward: the gradients of its input and of its
/// adapter, if it has one.
fn layer(layer: ElasticLoraLinear, tokens: usize) -> impl FnMut() -> Result<Duration> {
    let layer = layer.train();
    let shape = [1, tokens, layer.base.dims()[0]];
    let device = Device::flex();
    let x = Tensor::<3>::random(shape, Distribution::Default, &device);
    move || {
        let x = x.clone().autodiff().require_grad();
        timed(|| {
            let gradients = layer.forward(x.clone()).sum().backward();
            Ok(x.grad(&gradients).map(host_values))
        })
    }
}

fn layers(criterion: &mut Criterion) -> Result<()> {
    let Shape([d_input, d_output]) = setting("BENCH_SHAPE", "1024x2730");
    let tokens = setting("BENCH_TOKENS", if common::quick() { "128" } else { "1024" });
    let make = |name: &str| -> Result<ElasticLoraLinear> {
        let config = ElasticLoraLinearConfig::new(d_input, d_output, 32).with_alpha(64.0);
        let mut layer = config.init(&Device::flex())?;
        match name {
            "rank-16" => layer.set_active_rank(16)?,
            "sparse-peft" => {
                let mut weight = layer.base.to_matrix();
                let scores = elastic_lora::sparsity::magnitude_scores(&weight);
                let half = elastic_lora::sparsity::Pattern::Unstructured { ratio: 0.5 };
                elastic_lora::sparsity::prune(&mut weight, &scores, &half)?;
                layer.base.set_matrix(&weight)?;
                layer.mask_by_base()?;
            }
            _ => {}
        }
        Ok(layer)
    };
    let mut group = criterion.benchmark_group("layer");
    let mut lines = Vec::new();
    for name in ["rank-32", "rank-16", "sparse-peft"] {
        let subjects = || {
            let adapted = make(name)?;
            let plain = ElasticLoraLinear::plain(adapted.base.clone());
            Ok([
                Box::new(layer(adapted, tokens)) as Subject,
                Box::new(layer(plain, tokens)),
            ])
        };
        if let Some(seconds) = in_turns(&mut group, name, subjects) {
            lines.push((name.to_string(), seconds));
        }
    }
    show("layer, against its frozen base", &lines);
    Ok(())
}

fn steps(criterion: &mut Criterion) -> Result<()> {
    let case = |method| Case {
        hidden: setting("BENCH_HIDDEN", "288"),
        layers: setting("BENCH_BLOCKS", if common::quick() { "2" } else { "6" }),
        heads: 6,
        method,
        weights: Weights::F32,
        bf16_gradient: false,
    };
    let subject = |method| -> Result<Subject<'static>> {
        let (mut net, mut data, mut seed) = (net(&case(method), "flex")?, data()?, 0);
        Ok(Box::new(move || {
            seed += 1;
            Ok(Duration::from_secs_f64(
                1e-3 * run(&mut net, &mut data, 1, seed)?,
            ))
        }))
    };
    let mut group = criterion.benchmark_group("step");
    group.sample_size(10);
    let mut lines = Vec::new();
    for method in Method::value_variants() {
        let name = common::name(*method);
        let subjects = || Ok([subject(*method)?, subject(Method::Lora)?]);
        if let Some(seconds) = in_turns(&mut group, &name, subjects) {
            lines.push((name, seconds));
        }
    }
    show("step, against LoRA's", &lines);
    Ok(())
}

fn show(what: &str, lines: &[(String, [Vec<f64>; 2])]) {
    if lines.is_empty() {
        return;
    }
    println!(
        "{what:<34} {:>9} {:>9} {:>7} {:>7}",
        "best ms", "median", "ratio", "median"
    );
    for (name, [own, base]) in lines {
        println!(
            "{name:<34} {:>9.2} {:>9.2} {:>7.3} {:>7.3}",
            1e3 * best(own),
            1e3 * median(own),
            best(own) / best(base),
            median(own) / median(base)
        );
    }
    println!();
}

fn main() {
    common::main(|criterion| {
        layers(criterion)?;
        steps(criterion)
    });
}
