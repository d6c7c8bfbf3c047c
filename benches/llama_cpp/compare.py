"""Compares llama.cpp with this crate on the same machine in one run: a random Q4_0 model of 0.95
billion weights with LLaMA's shape (hidden 2048, MLP 5632, 16 layers, 32 heads, vocabulary 32000),
and `benches/decode.rs` with the same shape.

    pip install gguf numpy
    pip install --no-binary llama-cpp-python llama-cpp-python    # builds for this machine, some minutes
    python benches/llama_cpp/compare.py --threads 2

With `--model FILE.gguf` both run that file instead, this crate by `examples/generate.rs`: a prompt of
`--prompt` tokens and a continuation of `--steps`, mean rates of each run.

    python benches/llama_cpp/compare.py --threads 2 --model model-q4_0.gguf --prompt 512

The two take turns, so that other load on the machine affects both, and the best result of each
counts. llama.cpp rounds the inputs of Q4_0 layers to 8 bits (Q8_0, groups of 32); this crate rounds
them to 16 bits, or to 8 bits with `--int8`. Q4_0 takes 4.5 bits per weight with groups of 32; this
crate takes 4.16 bits with groups of 128, zero points included.
"""

import argparse
import os
import re
import subprocess
import tempfile
import time

import numpy as np

HIDDEN, MLP, LAYERS, HEADS, VOCAB = 2048, 5632, 16, 32, 32000


def q4_0(rng, rows, cols):
    """Returns random blocks of 32 weights: a 16-bit scale and 16 bytes of codes."""
    blocks = rng.integers(0, 256, size=(rows, cols // 32, 18), dtype=np.uint8)
    scale = np.frombuffer(np.float16(0.004).tobytes(), dtype=np.uint8)
    blocks[:, :, :2] = scale
    return blocks.reshape(rows, cols // 32 * 18)


def write(path):
    import gguf

    rng = np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("random")
    writer.add_context_length(2048)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    # llama.cpp requires a vocabulary, but this program does not use it.
    writer.add_tokenizer_model("llama")
    tokens = [b"<unk>", b"<s>", b"</s>"] + [b"<0x%02X>" % i for i in range(256)]
    tokens += [b"t%d" % i for i in range(VOCAB - len(tokens))]
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * VOCAB)
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * (VOCAB - 259))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    def matrix(name, rows, cols):
        kind = gguf.GGMLQuantizationType.Q4_0
        writer.add_tensor(name, q4_0(rng, rows, cols), raw_dtype=kind)

    def norm(name):
        writer.add_tensor(name, np.ones(HIDDEN, dtype=np.float32))

    matrix("token_embd.weight", VOCAB, HIDDEN)
    for i in range(LAYERS):
        norm(f"blk.{i}.attn_norm.weight")
        for name in ["attn_q", "attn_k", "attn_v", "attn_output"]:
            matrix(f"blk.{i}.{name}.weight", HIDDEN, HIDDEN)
        norm(f"blk.{i}.ffn_norm.weight")
        matrix(f"blk.{i}.ffn_gate.weight", MLP, HIDDEN)
        matrix(f"blk.{i}.ffn_up.weight", MLP, HIDDEN)
        matrix(f"blk.{i}.ffn_down.weight", HIDDEN, MLP)
    norm("output_norm.weight")
    matrix("output.weight", VOCAB, HIDDEN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    def __init__(self, path, threads):
        from llama_cpp import Llama

        self.llama = Llama(
            path, n_ctx=2048, n_batch=512, n_ubatch=512, n_threads=threads, n_threads_batch=threads, verbose=False
        )

    def rates(self, context, prompt, steps):
        ids = [3 + i * 7919 % (VOCAB - 3) for i in range(max(context, prompt, steps))]
        self.llama.reset()
        self.llama.eval(ids[:context])
        best = float("inf")
        for token in ids[:steps]:
            started = time.perf_counter()
            self.llama.eval([token])
            best = min(best, time.perf_counter() - started)
        self.llama.reset()
        started = time.perf_counter()
        self.llama.eval(ids[:prompt])
        return 1 / best, prompt / (time.perf_counter() - started)

    def prompt(self, n):
        """Returns a text of at least n tokens."""
        text = "Here is a list of notes.\n"
        number = 0
        while len(self.ids(text)) < n:
            number += 1
            text += f"Note {number}: the quick brown fox jumps over the lazy dog. "
        return text

    def ids(self, text):
        return self.llama.tokenize(text.encode(), add_bos=True, special=True)

    def continuation(self, text, steps):
        """Returns the rates of a prompt and of the tokens after it, which are not sampled."""
        ids = self.ids(text)
        self.llama.reset()
        started = time.perf_counter()
        self.llama.eval(ids)
        read = time.perf_counter()
        for token in ids[: steps - 1]:
            self.llama.eval([token])
        return (steps - 1) / (time.perf_counter() - read), len(ids) / (read - started)


def ours_on_file(binary, path, text, threads, steps):
    """Returns the decode and prefill rates of `examples/generate.rs`."""
    command = [binary] if binary else ["cargo", "run", "--locked", "--release", "--example", "generate", "--"]
    command += ["--model", path, "--prompt", text, "--threads", str(threads), "--max-new-tokens", str(steps)]
    output = subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True).stderr
    prefill, decode = re.search(r"ms, (\S+) tokens/s; generated \d+ tokens, (\S+) tokens/s", output).groups()
    return float(decode), float(prefill)


def ours(binary, arguments):
    """Returns the decode and prefill rates by format."""
    command = [binary, "--bench"] if binary else ["cargo", "bench", "--locked", "--bench", "decode", "--"]
    output = subprocess.run([*command, "--sizes", "one", *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout
    rates = {}
    for line in output.splitlines():
        found = re.match(r"(int4|sparse-int4) +(\S+) +(\S+) +(\S+) +(\S+) +(\S+) +(\S+)", line)
        if found:
            rates[found[1]] = (float(found[3]), float(found[7]))
    return rates


def arguments(args):
    """Returns the options of the bench of random weights."""
    options = ["--formats", "int4,sparse-int4", "--threads", str(args.threads), "--context", str(args.context)]
    return options + ["--prompt", str(args.prompt)] + (["--int8"] if args.int8 else [])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--int8", action="store_true", help="round inputs to 8 bits in this crate too")
    parser.add_argument("--binary", help="path of the built bench or example; by default cargo builds and runs it")
    parser.add_argument("--model", help="GGUF file that both run, instead of random weights")
    parser.add_argument("--steps", type=int, default=64, help="tokens after the prompt, with --model")
    args = parser.parse_args()
    if args.model and args.int8:
        parser.error("--int8 is for random weights")
    best = {}
    with tempfile.TemporaryDirectory() as folder:
        path = args.model or os.path.join(folder, "random-q4_0.gguf")
        if not args.model:
            write(path)
        print(f"llama.cpp's model: {os.path.getsize(path) / 1e6:.0f} MB, the embedding among them")
        for turn in range(args.turns):
            model = LlamaCpp(path, args.threads)
            if args.model:
                text = model.prompt(args.prompt)
                turns = {"llama.cpp": model.continuation(text, args.steps)}
                del model
                turns["this crate"] = ours_on_file(args.binary, path, text, args.threads, args.steps)
            else:
                turns = {"llama.cpp": model.rates(args.context, args.prompt, 24)}
                del model
                turns.update(ours(args.binary, arguments(args)))
            for name, rates in turns.items():
                print(f"turn {turn + 1}: {name:<15} decode {rates[0]:6.1f} tokens/s, prefill {rates[1]:6.0f}", flush=True)
                before = best.get(name, (0.0, 0.0))
                best[name] = (max(before[0], rates[0]), max(before[1], rates[1]))
    decode, prefill = best["llama.cpp"]
    for name, rates in best.items():
        print(
            f"best: {name:<15} decode {rates[0]:6.1f} tokens/s, {rates[0] / decode:.2f} of llama.cpp; "
            f"prefill {rates[1]:6.0f} tokens/s, {rates[1] / prefill:.2f}"
        )


if __name__ == "__main__":
    main()
