"""Whether what fuse.py writes computes in each tool what model and adapter do here.

    python tests/benchmarks/exports.py --model base-model-mlx --adapter-file adapters.npz \
        --data mlx-doc-data --llama-cpp /a/folder

The test perplexity of the model, of it with the adapter, and of each export in the tool that it is
for; beside it, of the prompts of the test set, how many greedy texts are the same, and how far the
logits after a prompt are from ours. A text differs from where two tokens are nearly as likely.
llama.cpp is built from the source distribution of llama-cpp-python into a folder, unless it is
there (half an hour on one core).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import lora  # noqa: E402  from the repository's root
from parts.decoder import generate_step  # noqa: E402

import mlx.core as mx  # noqa: E402

N_TOKENS = 60
# Without the instructions of this very processor: a virtual machine may name some that it lacks.
NOT_BUILT = ("GGML_NATIVE", "MTMD_BUILD", "LLAMA_BUILD_TOOLS", "LLAMA_BUILD_TESTS")
BUILD_FLAGS = " ".join(f"-D{name}=OFF" for name in (*NOT_BUILT, "LLAMA_BUILD_SERVER"))
# For each line of [ids, whether to go on from them]: the file of their logits, or a greedy text.
ASK_LLAMA_CPP = """
import json, sys
import numpy as np
from llama_cpp import Llama
model = Llama(sys.argv[1], n_ctx=2048, logits_all=True, verbose=False)
print(json.dumps([model.tokenize(t.encode(), special=False) for t in json.loads(sys.argv[3])]))
for line in sys.stdin:
    ids, n_tokens = json.loads(line)
    model.reset()
    model.eval(ids)
    np.save(sys.argv[2], model.scores[: len(ids)])
    out = []
    while len(out) < n_tokens and out[-1:] != [model.token_eos()]:
        out.append(int(model.scores[model.n_tokens - 1].argmax()))
        model.eval(out[-1:])
    print(json.dumps(out), flush=True)
"""


class Tool(NamedTuple):
    """A model in some tool: logits (L, V) of ids, and the ids that it adds to some, greedy; and
    the ids that it reads in texts, where it has a tokenizer of its own.
    """

    logits: Callable[[list[int]], np.ndarray]
    greedy: Callable[[list[int]], list[int]]
    encoded: list[list[int]] | None = None


def until_end(ids: Iterator[int], eos_id: int) -> list[int]:
    """The first tokens of a text, up to its end."""
    text = []
    for token in islice(ids, N_TOKENS):
        text.append(token)
        if token == eos_id:
            break
    return text


def in_lora(folder: Path, adapter: str | None = None) -> Tool:
    model, tokenizer = lora.load_model(folder, mx.float32)
    if adapter:
        lora.load_adapter(model, adapter)
    return Tool(
        lambda ids: np.array(model(mx.array([ids]))[0][0]),
        lambda ids: until_end(generate_step(model, ids, 0), tokenizer.eos_id),
    )


def in_transformers(folder: Path, texts: list[str], eos_id: int) -> Tool:
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def logits(ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0].numpy()

    def greedy(ids: list[int]) -> list[int]:
        out = model.generate(torch.tensor([ids]), max_new_tokens=N_TOKENS, do_sample=False)
        return until_end(iter(out[0, len(ids) :].tolist()), eos_id)

    return Tool(logits, greedy, [tokenizer.encode(text) for text in texts])


def in_mlx_lm(folder: Path, texts: list[str], eos_id: int) -> Tool:
    import mlx_lm
    from mlx_lm.generate import generate_step as their_step

    model, tokenizer = mlx_lm.load(str(folder))
    model.set_dtype(mx.float32)

    def greedy(ids: list[int]) -> list[int]:
        steps = their_step(mx.array(ids), model, max_tokens=N_TOKENS)
        return until_end((token for token, _ in steps), eos_id)

    encoded = [tokenizer.encode(text) for text in texts]
    return Tool(lambda ids: np.array(model(mx.array([ids]))[0]), greedy, encoded)


def in_llama_cpp(library: Path, file: Path, texts: list[str]) -> Tool:
    if not (library / "llama_cpp").exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", library]
        command += ["--no-binary", "llama-cpp-python", "llama-cpp-python"]
        subprocess.run(command, env={**os.environ, "CMAKE_ARGS": BUILD_FLAGS}, check=True)
    path = file.with_suffix(".npy")
    process = subprocess.Popen(
        [sys.executable, "-c", ASK_LLAMA_CPP, file, path, json.dumps(texts)],
        env={**os.environ, "PYTHONPATH": str(library)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )

    def ask(ids: list[int], n_tokens: int) -> list[int]:
        process.stdin.write(json.dumps([ids, n_tokens]) + "\n")
        return json.loads(process.stdout.readline())

    def logits(ids: list[int]) -> np.ndarray:
        ask(ids, 0)
        return np.load(path)

    encoded = json.loads(process.stdout.readline())
    return Tool(logits, lambda ids: ask(ids, N_TOKENS), encoded)


def perplexity(tool: Tool, rows: list[list[int]]) -> float:
    """The perplexity of texts of ids."""
    total = 0.0
    for row in rows:
        logits = tool.logits(row[:-1]).astype(np.float64)
        top = logits.max(-1, keepdims=True)
        total += (np.log(np.exp(logits - top).sum(-1)) + top[:, 0]).sum()
        total -= logits[np.arange(len(row) - 1), row[1:]].sum()
    return float(np.exp(total / sum(len(row) - 1 for row in rows)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=ROOT / "base-model-mlx")
    parser.add_argument("--adapter-file", default=str(ROOT / "adapters.npz"))
    parser.add_argument("--data", type=Path, default=ROOT / "mlx-doc-data")
    parser.add_argument("--texts", type=int, default=20, help="of the test set")
    parser.add_argument("--llama-cpp", type=Path, help="folder of llama-cpp-python, or for it")
    args = parser.parse_args()

    _, tokenizer = lora.load_model(args.model)
    dataset = lora.Dataset(args.data / "test.jsonl")
    texts = [dataset[i] for i in range(len(dataset))][: args.texts]
    rows = [tokenizer.encode(text, eos=True) for text in texts]
    prompts = [f"{text.partition('A: ')[0]}A:" for text in texts]
    prompt_ids = [tokenizer.encode(prompt) for prompt in prompts]
    ids_of_texts = [tokenizer.encode(text) for text in texts]
    end = tokenizer.eos_id
    print(f"| of {len(rows)} texts | perplexity | same ids | same greedy text | logits |")
    print("|---|---|---|---|---|")

    ours = in_lora(args.model, args.adapter_file)
    expected = [ours.greedy(ids) for ids in prompt_ids]
    logits = [ours.logits(ids)[-1] for ids in prompt_ids]

    def report(what: str, tool: Tool) -> None:
        texts_here = [tool.greedy(ids) for ids in prompt_ids]
        same = sum(a == b for a, b in zip(texts_here, expected, strict=True))
        pairs = zip(prompt_ids, logits, strict=True)
        far = max(np.abs(tool.logits(ids)[-1] - of_ours).max() for ids, of_ours in pairs)
        ids = "" if tool.encoded is None else sum(map(list.__eq__, tool.encoded, ids_of_texts))
        value = perplexity(tool, rows)
        print(f"| {what} | {value:.3f} | {ids} | {same} | {far:.4f} |", flush=True)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def export(target: str, *flags: str, source: Path = args.model) -> Path:
            command = [sys.executable, ROOT / "fuse.py", "--model", source]
            command += ["--adapter-file", args.adapter_file, "--save-path", folder / target]
            subprocess.run([*command, *flags], check=True, stdout=subprocess.DEVNULL)
            return folder / target

        report("model alone", in_lora(args.model))
        report("with the adapter", ours)
        report("mlx in lora.py", in_lora(export("mlx", "--format", "mlx")))
        half = export("half")
        report("hf in transformers", in_transformers(half, texts, end))
        report("hf in mlx-lm", in_mlx_lm(half, texts, end))
        brain = export("brain", "--dtype", "bfloat16")
        report("hf, bfloat16, in transformers", in_transformers(brain, texts, end))
        if args.llama_cpp:
            for dtype in ("float16", "q8_0"):
                file = export(f"{dtype}.gguf", "--format", "gguf", "--dtype", dtype)
                report(f"gguf, {dtype}, in llama.cpp", in_llama_cpp(args.llama_cpp, file, texts))
        plain = export("plain", "--no-adapter")
        for bits in ("8", "4"):
            few = folder / f"few-{bits}"
            command = [sys.executable, ROOT / "convert.py", "--torch-path", plain]
            command += ["--mlx-path", few, "-q", "--q-bits", bits]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            report(f"{bits} bits with the adapter", in_lora(few, args.adapter_file))
            report(
                f"{bits} bits, dequantized", in_lora(export(f"d{bits}", "--format=mlx", source=few))
            )
            kept = export(f"k{bits}", "--format=mlx", "--keep-quantized", source=few)
            report(f"{bits} bits, kept", in_lora(kept))


if __name__ == "__main__":
    main()
