"""Compares NSGA-II and NSGA-III with pymoo's on ZDT1-4, 6 and DTLZ2, at equal settings.

    pip install pymoo
    cargo bench --bench fronts -- fronts.csv 10     # with an absolute path
    python benches/pymoo/compare.py fronts.csv REFERENCES [--seeds 10]

REFERENCES is a folder with the reference fronts ZDT1.csv, ..., DTLZ2.3D.csv, as jMetal has them.
Both sides search integer genomes of 101 choices for each variable with the same population, number
of evaluations, crossover (probability 0.9, index 10) and mutation (1 / n, index 3), and eliminate
duplicates. Hypervolume and inverted generational distance of both are computed by pymoo.
"""

import argparse
import collections
import pathlib

import numpy as np
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.algorithms.moo.nsga3 import NSGA3
from pymoo.core.problem import Problem
from pymoo.indicators.hv import HV
from pymoo.indicators.igd import IGD
from pymoo.operators.crossover.sbx import SBX
from pymoo.operators.mutation.pm import PM
from pymoo.operators.repair.rounding import RoundingRepair
from pymoo.operators.sampling.rnd import IntegerRandomSampling
from pymoo.optimize import minimize
from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting
from pymoo.util.ref_dirs import get_reference_directions

STEPS = 100

# Name: variables, population, evaluations, parts of each axis for directions.
PROBLEMS = {
    "ZDT1": (30, 100, 10_000, None),
    "ZDT2": (30, 100, 10_000, None),
    "ZDT3": (30, 100, 10_000, None),
    "ZDT4": (10, 100, 20_000, None),
    "ZDT6": (10, 100, 20_000, None),
    "DTLZ2": (12, 92, 18_400, 12),
}


def value(name, x):
    if name == "DTLZ2":
        g = 1 + ((x[:, 2:] - 0.5) ** 2).sum(1)
        a, b = x[:, 0] * np.pi / 2, x[:, 1] * np.pi / 2
        return np.stack([g * np.cos(a) * np.cos(b), g * np.cos(a) * np.sin(b), g * np.sin(a)], 1)
    mean = x[:, 1:].mean(1)
    f = x[:, 0]
    if name == "ZDT6":
        f = 1 - np.exp(-4 * f) * np.sin(6 * np.pi * f) ** 6
    if name == "ZDT4":
        wave = 10 * x[:, 1:] - 5
        g = 1 + (10 + wave**2 - 10 * np.cos(4 * np.pi * wave)).sum(1)
    else:
        g = 1 + 9 * (mean**0.25 if name == "ZDT6" else mean)
    if name in ("ZDT2", "ZDT6"):
        h = 1 - (f / g) ** 2
    else:
        h = 1 - np.sqrt(f / g)
        if name == "ZDT3":
            h = h - f / g * np.sin(10 * np.pi * f)
    return np.stack([f, g * h], 1)


class Grid(Problem):
    def __init__(self, name, n_var):
        n_obj = 3 if name == "DTLZ2" else 2
        super().__init__(n_var=n_var, n_obj=n_obj, xl=0, xu=STEPS, vtype=int)
        self.of = name

    def _evaluate(self, x, out, *args, **kwargs):
        out["F"] = value(self.of, x / STEPS)


def search(name, seed):
    n_var, population, n_evals, partitions = PROBLEMS[name]
    settings = dict(
        pop_size=population,
        sampling=IntegerRandomSampling(),
        crossover=SBX(prob=0.9, eta=10, vtype=float, repair=RoundingRepair()),
        mutation=PM(prob=1.0, prob_var=1 / n_var, eta=3, vtype=float, repair=RoundingRepair()),
        eliminate_duplicates=True,
    )
    if partitions is None:
        algorithm = NSGA2(**settings)
    else:
        directions = get_reference_directions("das-dennis", 3, n_partitions=partitions)
        algorithm = NSGA3(ref_dirs=directions, **settings)
    found = minimize(Grid(name, n_var), algorithm, ("n_eval", n_evals), seed=seed)
    return found.pop.get("F")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("fronts", type=pathlib.Path)
    parser.add_argument("references", type=pathlib.Path)
    parser.add_argument("--seeds", type=int, default=10)
    args = parser.parse_args()

    ours = collections.defaultdict(lambda: collections.defaultdict(list))
    for line in args.fronts.read_text().splitlines():
        name, seed, *objectives = line.split(",")
        ours[name][int(seed)].append([float(x) for x in objectives])

    print("| problem | hypervolume, ours | pymoo | IGD, ours | pymoo |")
    print("|---|---|---|---|---|")
    for name in PROBLEMS:
        file = "DTLZ2.3D.csv" if name == "DTLZ2" else f"{name}.csv"
        reference = np.loadtxt(args.references / file, delimiter=",")
        worst = reference.max(0) * 1.1 + (reference.max(0) <= 0) * 0.1
        volume, distance = HV(ref_point=worst), IGD(reference)
        cells = []
        for indicator in (volume, distance):
            for side in ("ours", "pymoo"):
                values = []
                for seed in range(args.seeds):
                    front = np.array(ours[name][seed]) if side == "ours" else fronts(name, seed)
                    first = NonDominatedSorting().do(front, only_non_dominated_front=True)
                    values.append(indicator(front[first]))
                cells.append(f"{np.mean(values):.4f} ({np.std(values):.4f})")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


CACHE = {}


def fronts(name, seed):
    if (name, seed) not in CACHE:
        CACHE[name, seed] = search(name, seed)
    return CACHE[name, seed]


if __name__ == "__main__":
    main()
