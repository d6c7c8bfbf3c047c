"""Plain Wanda and GPTQ on one layer in PyTorch, the baseline of benches/quantize.rs.

A process measures one method, so that its peak memory is that of the method.
"""

import argparse
import json
import time

import torch

BLOCK = 128
BITS = 4
DAMPING = 0.01


def status_mib(field):
    """Returns a field of /proc/self/status in MiB, or None if that file does not exist."""
    try:
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) / 1024 for line in status if line.startswith(field + ":"))
    except (OSError, StopIteration):
        return None


def inputs(tokens, cols):
    """Returns activations whose columns depend on the previous ones and differ in size."""
    x = torch.randn(tokens, cols)
    for j in range(1, cols):
        x[:, j] += 0.8 * x[:, j - 1]
    return x * (0.3 + 0.2 * (torch.arange(cols) * 7 % 11))


def wanda(weight, norms, ratio):
    scores = weight.abs() * norms.sqrt()
    order = torch.sort(scores, dim=-1, stable=True)[1]
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask.scatter_(1, order[:, : int(weight.shape[1] * ratio)], True)
    weight[mask] = 0
    return weight


def grid(weights):
    """Returns the scale and zero point of each row of a group."""
    low = weights.min(dim=1)[0].clamp(max=0)
    high = weights.max(dim=1)[0].clamp(min=0)
    empty = (low == 0) & (high == 0)
    low[empty], high[empty] = -1, 1
    scale = (high - low) / (2**BITS - 1)
    return scale, torch.round(-low / scale)


def gptq(weight, hessian, group):
    """GPTQ as in its paper: the Cholesky factor of the inverse Hessian distributes the errors."""
    weight = weight.clone()
    cols = weight.shape[1]
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1
    weight[:, dead] = 0
    diagonal += DAMPING * diagonal.mean()
    hessian = torch.linalg.cholesky(hessian)
    hessian = torch.cholesky_inverse(hessian)
    inverse = torch.linalg.cholesky(hessian, upper=True)
    del hessian
    rounded = torch.zeros_like(weight)
    for start in range(0, cols, BLOCK):
        end = min(start + BLOCK, cols)
        block = weight[:, start:end].clone()
        errors = torch.zeros_like(block)
        corner = inverse[start:end, start:end]
        for i in range(end - start):
            column = block[:, i]
            if (start + i) % group == 0:
                scale, zero = grid(weight[:, start + i : start + i + group])
            codes = torch.clamp(torch.round(column / scale) + zero, 0, 2**BITS - 1)
            value = scale * (codes - zero)
            rounded[:, start + i] = value
            error = (column - value) / corner[i, i]
            block[:, i:] -= error.unsqueeze(1) @ corner[i, i:].unsqueeze(0)
            errors[:, i] = error
        weight[:, end:] -= errors @ inverse[start:end, end:]
    return rounded


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=("wanda", "hessian", "gptq"), required=True)
    parser.add_argument("--rows", type=int, required=True)
    parser.add_argument("--cols", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--repeats", type=int, default=1)
    args = parser.parse_args()
    torch.manual_seed(1)
    torch.set_grad_enabled(False)
    x = inputs(args.tokens, args.cols)
    weight = torch.randn(args.rows, args.cols) * 0.02
    norms = x.square().sum(dim=0)
    hessian = x.t() @ x if args.method == "gptq" else None
    if args.method != "hessian":
        del x
    seconds = []
    for _ in range(args.repeats):
        start = time.perf_counter()
        if args.method == "wanda":
            wanda(weight.clone(), norms, 0.5)
        elif args.method == "hessian":
            hessian = torch.zeros(args.cols, args.cols)
            hessian += x.t() @ x
        else:
            own = hessian.clone() if args.repeats > 1 else hessian
            start = time.perf_counter()
            gptq(weight, own, 128)
        seconds.append(time.perf_counter() - start)
    print(json.dumps({"seconds": seconds, "peak_mib": status_mib("VmHWM"), "version": torch.__version__}))


if __name__ == "__main__":
    main()
