//! Elastic adapters in a Burn module of one's own: a training loop, and a searcher of one's own.
//!
//! The base layers are frozen; only the factors of the adapters are trained. `backward` needs a tape,
//! so the module and its inputs lie on `device.autodiff()`.

use burn::module::{Module, Param};
use burn::tensor::activation::relu;
use burn::tensor::{Device, Distribution, Gradients, Tensor};
use elastic_lora::progress::Silent;
use elastic_lora::search::{Evaluation, StudyConfig};
use elastic_lora::space::Group;
use elastic_lora::{ElasticLoraLinear, ElasticLoraLinearConfig, Result, SearchSpace};
use elastic_lora::{Searcher, SubnetConfig};

#[derive(Module, Debug)]
struct Mlp {
    up: ElasticLoraLinear,
    down: ElasticLoraLinear,
}

impl Mlp {
    fn forward(&self, x: Tensor<2>) -> Tensor<2> {
        self.down.forward(relu(self.up.forward(x)))
    }

    fn set_ranks(&mut self, ranks: &[usize]) -> Result<()> {
        self.up.set_active_rank(ranks[0])?;
        self.down.set_active_rank(ranks[1])
    }
}

/// One step of gradient descent on the factors of an adapter.
fn descend(layer: &mut ElasticLoraLinear, gradients: &Gradients, rate: f64) {
    let Some(adapter) = &mut layer.adapter else {
        return;
    };
    for factor in [&mut adapter.lora_a, &mut adapter.lora_b] {
        // Ranks above the active one have a gradient of zero.
        if let Some(gradient) = factor.val().grad(gradients) {
            let value = factor.val().inner() - gradient.mul_scalar(rate);
            *factor = Param::from_tensor(Tensor::from_inner(value));
        }
    }
}

/// Asks for every subnet once, the one with the largest ranks first.
struct InOrder(Vec<SubnetConfig>);

impl Searcher for InOrder {
    fn name(&self) -> &str {
        "in order"
    }

    fn ask(&mut self, n: usize) -> Vec<SubnetConfig> {
        self.0.drain(..n.min(self.0.len())).collect()
    }

    fn tell(&mut self, _evaluated: &[Evaluation]) -> Result<()> {
        Ok(())
    }

    fn is_finished(&self) -> bool {
        self.0.is_empty()
    }
}

fn main() -> Result<()> {
    let device = Device::flex().autodiff();
    device.seed(1);
    let layer = |d_input, d_output, seed| {
        let config = ElasticLoraLinearConfig::new(d_input, d_output, 8).with_alpha(16.0);
        config.with_seed(seed).init(&device)
    };
    let mut mlp = Mlp {
        up: layer(16, 32, 1)?,
        down: layer(32, 4, 2)?,
    };
    // A function that the frozen layers do not compute.
    let x = Tensor::<2>::random([64, 16], Distribution::Default, &device);
    let y = x.clone().slice([0..64, 0..4]).powi_scalar(2);

    // Neural low-rank adapter search: each step trains the ranks of another subnet.
    for step in 0..600 {
        let rank = [8, 4, 2][step % 3];
        mlp.set_ranks(&[rank.min(8), rank.min(4)])?;
        let loss = (mlp.forward(x.clone()) - y.clone()).square().mean();
        if step % 150 < 3 {
            println!(
                "step {step:3}, rank {rank}: loss {:.5}",
                loss.clone().into_scalar::<f32>()
            );
        }
        let gradients = loss.backward();
        for layer in [&mut mlp.up, &mut mlp.down] {
            descend(layer, &gradients, 0.02);
        }
    }

    // The search needs the choices of each group of layers, and a way to evaluate a subnet.
    let group = |name: &str, ranks: &[usize]| Group::new(name, vec![name.into()], ranks.to_vec());
    let space = SearchSpace::new(vec![group("up", &[8, 4, 2])?, group("down", &[4, 2])?])?;
    let all = [8, 4, 2].into_iter().flat_map(|up| [[up, 4], [up, 2]]);
    let subnets = all
        .map(|ranks| space.from_values(&ranks))
        .collect::<Result<_>>()?;
    let trained = mlp.valid();
    let (x, y) = (x.inner(), y.inner());
    let outcome = StudyConfig::new(6).init(&space)?.run(
        &mut InOrder(subnets),
        |subnet| {
            let (mut mlp, ranks) = (trained.clone(), space.values(subnet)?);
            mlp.set_ranks(&ranks)?;
            let loss = (mlp.forward(x.clone()) - y.clone()).square().mean();
            let cost = ranks[0] * (16 + 32) + ranks[1] * (32 + 4);
            Ok(vec![f64::from(loss.into_scalar::<f32>()), cost as f64])
        },
        &Silent,
    )?;
    for one in outcome.front() {
        println!(
            "front: ranks {:?}, {} adapter weights, loss {:.5}",
            space.values(&one.config)?,
            one.cost(),
            one.score()
        );
    }
    Ok(())
}
