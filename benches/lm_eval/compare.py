"""Compares `examples/evaluate --tasks` with lm-evaluation-harness 0.4.13 on the same rows: prompts,
log-likelihoods, scores, extracted answers and speed.

Needs lm_eval 0.4.13, torch and transformers, a model folder, and rows in this crate's layout
(`DATA/boolq/validation.jsonl`, ...), which `rows.py` beside this file makes of LLM-Adapters' files.
Nothing is downloaded: the harness' own descriptions are read, with their data sets replaced by the
files.

    python benches/lm_eval/compare.py --model qwen --data rows --tasks piqa,arc_easy --limit 50 \
        --evaluate target/release/examples/evaluate

Prints one line for each task, and a table of the times at the end. Exits with 1 if a log-likelihood
differs by more than 1e-3 of itself, a prompt by a character, or a score at all.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

FILES = {
    "boolq": "super_glue/boolq/default.yaml",
    "piqa": "piqa/piqa.yaml",
    "social_iqa": "siqa/siqa.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "gsm8k": "gsm8k/gsm8k.yaml",
    "gsm8k_cot": "gsm8k/gsm8k-cot.yaml",
    "gsm8k_cot_zeroshot": "gsm8k/gsm8k-cot-zeroshot.yaml",
    "wikitext": "wikitext/wikitext.yaml",
}
FOLDERS = {"gsm8k_cot": "gsm8k", "gsm8k_cot_zeroshot": "gsm8k"}
SPLITS = {"boolq": "validation", "piqa": "validation", "social_iqa": "validation",
          "hellaswag": "validation", "winogrande": "validation"}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--tasks", required=True)
    parser.add_argument("--limit", type=int, default=50)
    parser.add_argument("--num-fewshot", type=int)
    parser.add_argument("--max-new-tokens", type=int)
    parser.add_argument("--evaluate", required=True, type=Path, help="the built example")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8, help="of the harness")
    parser.add_argument("--also", default="", help="further formats to be timed, such as int4,int8")
    parser.add_argument("--prompts-only", action="store_true",
                        help="compares what is asked, without running the model in the harness")
    args = parser.parse_args()
    tasks = args.tasks.split(",")
    ours, times = {}, []
    for task in tasks:
        ours[task], seconds = run_ours(args, task, "f32")
        times.append((task, "f32", seconds))
        for kind in filter(None, args.also.split(",")):
            times.append((task, kind, run_ours(args, task, kind)[1]))
    failed = run_harness(args, tasks, ours, times)
    print(f"\n{'task':<22}{'what':<12}{'seconds':>9}{'times':>7}")
    for task in tasks:
        own = dict((kind, s) for name, kind, s in times if name == task)
        for kind, seconds in own.items():
            ratio = own.get("harness", float("nan")) / seconds
            print(f"{task:<22}{kind:<12}{seconds:>9.1f}{ratio:>7.2f}")
    sys.exit(1 if failed else 0)


def run_ours(args, task, kind):
    with tempfile.TemporaryDirectory() as folder:
        log, report = Path(folder, "log.jsonl"), Path(folder, "report.json")
        command = [args.evaluate, "--model", args.model, "--tasks", task, "--data", args.data,
                   "--limit", args.limit, "--log", log, "--json", report,
                   "--threads", args.threads, "--format", kind]
        command += ["--embedding", "f32"] if kind == "f32" else ["--embedding", "int8"]
        if args.num_fewshot is not None:
            command += ["--num-fewshot", args.num_fewshot]
        if args.max_new_tokens is not None:
            command += ["--max-new-tokens", args.max_new_tokens]
        subprocess.run([str(part) for part in command], check=True)
        samples = [json.loads(line) for line in log.read_text().splitlines()]
        found = json.loads(report.read_text())["tasks"][0]
        return (samples, found["scores"]), found["seconds"]


def read_task(args, task, root):
    """Returns the harness' task with its rows from a file."""
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(root / "tasks" / FILES[task], resolve_func=True)
    folder = args.data / FOLDERS.get(task, task)
    files = {}
    for split in ("train", "validation", "test"):
        for name in (f"{split}.jsonl", f"{split}.json"):
            if (folder / name).is_file() and split not in files:
                files[split] = str(folder / name)
    config["dataset_path"], config["dataset_name"] = "json", None
    config["dataset_kwargs"] = {"data_files": files}
    for key in ("training_split", "validation_split", "test_split", "fewshot_split"):
        if config.get(key) and config[key] not in files:
            config[key] = None
    config.pop("group", None)
    config.pop("include", None)
    if args.max_new_tokens is not None and "generation_kwargs" in config:
        config["generation_kwargs"]["max_gen_toks"] = args.max_new_tokens
    if args.num_fewshot is not None and config.get("num_fewshot") != 0:
        config["num_fewshot"] = args.num_fewshot
    task = ConfigurableTask(config=config)
    task.set_fewshot_seed(seed=1234)
    return task


def run_harness(args, tasks, ours, times):
    import lm_eval
    import torch
    from lm_eval.models.huggingface import HFLM

    torch.set_num_threads(args.threads)
    model = None
    if not args.prompts_only:
        model = HFLM(pretrained=str(args.model), dtype="float32", device="cpu",
                     batch_size=args.batch)
    failed = False
    for name in tasks:
        task = read_task(args, name, Path(lm_eval.__file__).parent)
        task.build_all_requests(limit=args.limit, rank=0, world_size=1)
        samples, scores = ours[name]
        faults = compare_prompts(task, samples)
        line = f"{name}: {len(task.instances)} requests, {len(faults)} prompts differ"
        if faults:
            print(faults[0])
        if not args.prompts_only:
            started = time.monotonic()
            kind = task.instances[0].request_type
            results = getattr(model, kind)(task.instances)
            times.append((name, "harness", time.monotonic() - started))
            for instance, result in zip(task.instances, results):
                instance.resps.append(result)
            task.apply_filters()
            more, said = compare_results(task, samples, scores)
            line, faults = line + said, faults + more
            if more:
                print(more[0])
        print(line, flush=True)
        failed |= bool(faults)
    return failed


def compare_prompts(task, samples):
    faults = []
    for instance in task.instances:
        sample = samples[instance.doc_id]
        context = instance.args[0]
        if task.OUTPUT_TYPE == "multiple_choice":
            prompts = sample["prompts"]
            theirs = (context, instance.args[1])
            own = (prompts[min(instance.idx, len(prompts) - 1)],
                   sample["continuations"][instance.idx])
        elif task.OUTPUT_TYPE == "generate_until":
            theirs, own = context, sample["prompt"]
        else:
            theirs, own = context, sample["text"]
        if theirs != own:
            faults.append(f"document {instance.doc_id}:\n{theirs!r}\n{own!r}")
    return faults


def compare_results(task, samples, scores):
    faults, worst = [], 0.0
    said = ""
    if task.OUTPUT_TYPE == "generate_until":
        equal = sum(i.resps[0] == samples[i.doc_id]["output"] for i in task.instances)
        said += f", {equal} of {len(task.instances)} outputs equal"
        # Extraction is compared on the harness' outputs that equal ours.
        for instance in task.instances:
            sample = samples[instance.doc_id]
            for own in sample["filtered"]:
                theirs = instance.filtered_resps[own["filter"]]
                if instance.resps[0] == sample["output"] and theirs != own["answer"]:
                    faults.append(f"document {instance.doc_id}: {theirs!r} {own['answer']!r}")
        theirs = aggregate(task)
    else:
        for instance in task.instances:
            sample = samples[instance.doc_id]
            if task.OUTPUT_TYPE == "multiple_choice":
                found, (expected, greedy) = sample["log_likelihoods"][instance.idx], instance.resps[0]
                if greedy != sample["is_greedy"][instance.idx]:
                    faults.append(f"document {instance.doc_id}: greedy {greedy}")
            else:
                found, expected = sample["log_likelihood"], instance.resps[0]
            off = abs(found - expected) / max(abs(expected), 1e-3)
            worst = max(worst, off)
            if off > 1e-3:
                faults.append(f"document {instance.doc_id}: {expected} {found}")
        said += f", log-likelihoods within {worst:.1e} of themselves"
        theirs = aggregate(task)
    for score in scores:
        key = (score["metric"], score["filter"])
        value = theirs.get(key)
        said += f"; {' '.join(key)} {score['value']:.4f} (harness {value:.4f})"
        if task.OUTPUT_TYPE == "multiple_choice" and abs(value - score["value"]) > 1e-9:
            faults.append(f"{key}: {value} {score['value']}")
        if task.OUTPUT_TYPE == "loglikelihood_rolling" and abs(value / score["value"] - 1) > 1e-3:
            faults.append(f"{key}: {value} {score['value']}")
    return faults, said


def aggregate(task):
    """Returns the harness' scores by metric and filter."""
    import collections

    documents = collections.defaultdict(list)
    for instance in task.instances:
        documents[instance.doc_id].append(instance)
    values = collections.defaultdict(list)
    for filter_name in task.instances[0].filtered_resps:
        for requests in documents.values():
            requests.sort(key=lambda request: request.idx)
            responses = [request.filtered_resps[filter_name] for request in requests]
            for metric, value in task.process_results(requests[0].doc, responses).items():
                values[(metric, filter_name)].append(value)
    aggregated = {key: task.aggregation()[key[0]](items) for key, items in values.items()}
    # The harness adds one filter of its own where a task has none.
    return {(m, "none" if f == "none" or f == "take_first" else f): v
            for (m, f), v in aggregated.items()}


if __name__ == "__main__":
    main()
