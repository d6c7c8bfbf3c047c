"""One optimizer step of LoRA, NLS or SparsePEFT in eager PyTorch, for benches/train_step.rs.

The model, shapes, batch and optimizer are the same, and PyTorch's fused operations are used where
they exist. A process measures one configuration, so that its peak memory is that of the
configuration.
"""

import argparse
import json
import random
import statistics
import time

import torch
import torch.nn.functional as F
from torch import nn

# The layers with an adapter, in groups that share a rank. The o projection has none.
GROUPS = (("q", "k", "v"), ("up", "gate"), ("down",))
CHOICES = (32, 24, 16)
WARM_UP = 2
EPS = 1e-5


def status_mib(field):
    """Returns a field of /proc/self/status in MiB, or None if that file does not exist."""
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) / 1024 for line in status if line.startswith(field + ":"))
    except (OSError, StopIteration):
        return None


class WideProduct(torch.autograd.Function):
    """x W^T with a narrow frozen weight that is widened for each product, forward and backward."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.weight = weight
        return F.linear(x, weight.to(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.weight.to(grad.dtype), None


class Wide(nn.Module):
    """Operations with activations in f32, the adapters' dtype, for any dtype of the weights."""

    def product(self, x, weight):
        return F.linear(x, weight) if weight.dtype == x.dtype else WideProduct.apply(x, weight)

    def factor(self, factor):
        return factor

    def frozen(self, weight):
        return weight.float()


class Narrow(nn.Module):
    """Operations with activations in the weights' dtype; the f32 adapters are cast at each use."""

    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def product(self, x, weight):
        return F.linear(x, weight)

    def factor(self, factor):
        return factor.to(self.dtype)

    def frozen(self, weight):
        return weight


class Linear(nn.Module):
    """A frozen linear layer, with a low-rank adapter if rank > 0: A uniform, B zero, as in PEFT."""

    def __init__(self, d_input, d_output, rank, args, ops):
        super().__init__()
        weight = torch.randn(d_output, d_input, device=args.device) * 0.02
        mask = None
        if args.method == "sparse-peft":
            mask = torch.rand_like(weight) < 0.5
            weight *= mask
        self.register_buffer("weight", weight.to(args.base_dtype))
        self.register_buffer("mask", mask if rank else None)
        self.ops = ops
        self.rank = rank
        self.scale = 2.0  # alpha / rank
        if rank:
            bound = d_input**-0.5
            self.lora_a = nn.Parameter(torch.empty(rank, d_input, device=args.device).uniform_(-bound, bound))
            self.lora_b = nn.Parameter(torch.zeros(d_output, rank, device=args.device))

    def forward(self, x):
        if not self.rank:
            return self.ops.product(x, self.weight)
        a, b = self.ops.factor(self.lora_a), self.ops.factor(self.lora_b)
        if self.mask is not None:
            return F.linear(x, self.ops.frozen(self.weight) + (b * self.scale) @ a * self.mask)
        if self.rank < a.shape[0]:
            a, b = a[: self.rank], b[:, : self.rank]
        return self.ops.product(x, self.weight) + F.linear(F.linear(x, a) * self.scale, b)


def rotate(x, cos, sin):
    """Applies the rotary embedding; each pair has one member in each half of a head."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Block(nn.Module):
    def __init__(self, args, ops):
        super().__init__()
        d, mlp, rank = args.hidden, args.hidden * 8 // 3, args.rank
        self.heads = args.heads
        self.q, self.k, self.v = (Linear(d, d, rank, args, ops) for _ in range(3))
        self.o = Linear(d, d, 0, args, ops)
        self.gate, self.up = (Linear(d, mlp, rank, args, ops) for _ in range(2))
        self.down = Linear(mlp, d, rank, args, ops)
        for name in ("norm_attention", "norm_mlp"):
            self.register_buffer(name, torch.ones(d, dtype=args.activation_dtype, device=args.device))

    def forward(self, x, cos, sin):
        rows, length, d = x.shape
        y = F.rms_norm(x, (d,), self.norm_attention, EPS)
        q, k, v = (layer(y).view(rows, length, self.heads, -1).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        x = x + self.o(y.transpose(1, 2).reshape(rows, length, d))
        y = F.rms_norm(x, (d,), self.norm_mlp, EPS)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    """A Llama whose head is the transpose of its embedding."""

    def __init__(self, args, ops):
        super().__init__()
        self.ops = ops
        table = torch.randn(args.vocab, args.hidden, device=args.device) * 0.02
        self.register_buffer("embedding", table.to(args.base_dtype))
        del table
        self.blocks = nn.ModuleList(Block(args, ops) for _ in range(args.layers))
        self.register_buffer("norm", torch.ones(args.hidden, dtype=args.activation_dtype, device=args.device))
        head_dim = args.hidden // args.heads
        rates = 10_000.0 ** (-torch.arange(0, head_dim, 2, device=args.device) / head_dim)
        angles = torch.outer(torch.arange(args.len, device=args.device), rates).repeat(1, 2)
        self.register_buffer("cos", angles.cos().to(args.activation_dtype))
        self.register_buffer("sin", angles.sin().to(args.activation_dtype))

    def loss(self, ids):
        x = F.embedding(ids, self.embedding).to(self.norm.dtype)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        x = F.rms_norm(x, x.shape[-1:], self.norm, EPS)
        logits = self.ops.product(x[:, :-1].reshape(-1, x.shape[-1]), self.embedding)
        return F.cross_entropy(logits.float(), ids[:, 1:].reshape(-1))


def fastest_compute(args):
    """Returns "autocast" if the processor supports narrow products, else "wide".

    Emulated narrow products are many times slower than widening the weights.
    """
    supported = {
        "f32": lambda: False,
        "bf16": lambda: args.device != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        "f16": lambda: args.device != "cpu" or torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    return "autocast" if supported[args.dtype]() else "wide"


def activate_random_subnet(model, rng):
    for block in model.blocks:
        for group in GROUPS:
            rank = rng.choice(CHOICES)
            for name in group:
                getattr(block, name).rank = rank


def measure(args):
    start_mib = status_mib("VmRSS")
    torch.manual_seed(1)
    rng = random.Random(2)
    ops = Narrow(args.base_dtype) if args.compute == "narrow" else Wide()
    if args.compute == "autocast":
        ops = Narrow(args.base_dtype)
        ops.factor = lambda factor: factor
    model = Decoder(args, ops)
    parameters = list(model.parameters())
    kind = {} if args.adamw == "default" else {args.adamw: True}
    optimizer = torch.optim.AdamW(parameters, lr=3e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, **kind)
    data = torch.randint(args.vocab, (4 * args.rows, args.len), device=args.device)
    cuda = args.device.startswith("cuda")
    steps, losses = [], []
    for step in range(WARM_UP + args.steps):
        if cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        batch = data.view(4, args.rows, args.len)[step % 4]
        if args.method == "nls":
            activate_random_subnet(model, rng)
        with torch.autocast(args.device.split(":")[0], args.base_dtype, enabled=args.compute == "autocast"):
            loss = model.loss(batch)
        loss.backward()
        losses.append(loss.item())
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if cuda:
            torch.cuda.synchronize()
        steps.append(1e3 * (time.perf_counter() - started))
    steps = steps[WARM_UP:]
    assert all(parameter.dtype == torch.float32 for parameter in parameters)
    return {
        "median_ms": statistics.median(steps),
        "steps_ms": steps,
        "peak_mib": torch.cuda.max_memory_allocated() / 2**20 if cuda else status_mib("VmHWM"),
        "start_mib": 0.0 if cuda else start_mib,
        "loss": losses[-1],
        "compute": args.compute,
        "adamw": args.adamw,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=288)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--len", type=int, default=256)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--method", choices=("lora", "nls", "sparse-peft"), default="lora")
    parser.add_argument("--dtype", choices=("f32", "bf16", "f16"), default="f32", help="dtype of the frozen weights")
    parser.add_argument("--compute", choices=("wide", "narrow", "autocast"))
    parser.add_argument("--adamw", choices=("default", "foreach", "fused"), default="fused")
    parser.add_argument("--steps", type=int, default=6, help="number of timed steps")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    args = parser.parse_args()
    args.base_dtype = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[args.dtype]
    args.compute = args.compute or fastest_compute(args)
    args.activation_dtype = torch.float32 if args.compute == "wide" else args.base_dtype
    result = measure(args)
    if args.json:
        print(json.dumps(result))
    else:
        print(f"{result['median_ms']:.1f} ms a step, peak {result['peak_mib'] or 0:.0f} MiB")


if __name__ == "__main__":
    main()
