"""Whether what fuse.py writes computes in each tool what model and adapter do here.

    python tests/benchmarks/exports.py --model base-model-mlx --adapter-file adapters.npz \
        --data mlx-doc-data --llama-cpp /a/folder
    python tests/benchmarks/exports.py --families --llama-cpp /a/folder

The test perplexity of the model, of it with the adapter, and of each export in the tool that it is
for. Of the prompts of the test set, how many greedy texts are the same as with the adapter; a text
differs from where two tokens are nearly as likely. And how far the logits after a prompt are, at
most, from those of the adapter beside the model, and from those of `mlx`, float16, in lora.py:
float16 rounds merged weights, in each tool to the same.
--families: of small random models instead, of the kinds of tests/test_families.py.

llama.cpp is built from the source distribution of llama-cpp-python into a folder, unless it is
there (half an hour on one core). Its cache of keys and values is in float16, if not that of
float32 weights.
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
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

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
kinds = dict.fromkeys(("type_k", "type_v"), int(sys.argv[4])) if sys.argv[4] else {}
model = Llama(sys.argv[1], n_ctx=2048, logits_all=True, verbose=False, **kinds)
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
GGML_FLOAT32 = "0"


class Tool(NamedTuple):
    """A model in some tool: logits (L, V) of ids, and the ids that it adds to some, greedy; and
    the ids that it reads in texts, where it has a tokenizer of its own.
    """

    logits: Callable[[list[int]], np.ndarray]
    greedy: Callable[[list[int]], list[int]]
    encoded: list[list[int]] | None = None


class Texts:
    """Texts, what begins some, and their ids."""

    def __init__(self, folder: Path, texts: list[str], prompts: list[str]):
        _, tokenizer = lora.load_model(folder)
        self.texts, self.eos_id = texts, tokenizer.eos_id
        self.ids = [tokenizer.encode(text) for text in texts]
        self.rows = [tokenizer.encode(text, eos=True) for text in texts]
        self.prompts = [tokenizer.encode(prompt) for prompt in prompts]


def until_end(ids: Iterator[int], eos_id: int) -> list[int]:
    """The first tokens of a text, up to its end."""
    text = []
    for token in islice(ids, N_TOKENS):
        text.append(token)
        if token == eos_id:
            break
    return text


# -------------------------------------------------------------------------------------------------
# The tools


def in_lora(folder: Path, adapter: str | Path | None = None) -> Tool:
    model, tokenizer = lora.load_model(folder, mx.float32)
    if adapter:
        lora.load_adapter(model, adapter)
    return Tool(
        lambda ids: np.array(model(mx.array([ids]))[0][0]),
        lambda ids: until_end(generate_step(model, ids), tokenizer.eos_id),
    )


def in_transformers(
    folder: Path, texts: Texts, adapter: Path | None = None, gguf_file: str | None = None
) -> Tool:
    """adapter: a folder for PEFT. gguf_file: in the folder, in place of what else is there."""
    import torch
    import transformers

    settings = {"dtype": torch.float32}
    if gguf_file:
        settings["gguf_file"] = gguf_file
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **settings)
    encoded = None
    if gguf_file is None:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        encoded = [tokenizer.encode(text) for text in texts.texts]
    if adapter:
        import peft

        model = peft.PeftModel.from_pretrained(model, adapter)

    def logits(ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0].numpy()

    def greedy(ids: list[int]) -> list[int]:
        ids = torch.tensor([ids])
        out = model.generate(input_ids=ids, max_new_tokens=N_TOKENS, do_sample=False)
        return until_end(iter(out[0, ids.shape[1] :].tolist()), texts.eos_id)

    return Tool(logits, greedy, encoded)


def in_mlx_lm(folder: Path, texts: Texts, adapter: Path | None = None) -> Tool:
    import mlx_lm
    from mlx_lm.generate import generate_step as their_step

    model, tokenizer = mlx_lm.load(str(folder), adapter_path=adapter and str(adapter))
    model.set_dtype(mx.float32)

    def greedy(ids: list[int]) -> list[int]:
        steps = their_step(mx.array(ids), model, max_tokens=N_TOKENS)
        return until_end((token for token, _ in steps), texts.eos_id)

    encoded = [tokenizer.encode(text) for text in texts.texts]
    return Tool(lambda ids: np.array(model(mx.array([ids]))[0]), greedy, encoded)


def in_llama_cpp(library: Path, file: Path, texts: Texts, cache: str = "") -> Tool:
    """cache: the type of its keys and values."""
    if not (library / "llama_cpp").exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--target", library]
        command += ["--no-binary", "llama-cpp-python", "llama-cpp-python"]
        subprocess.run(command, env={**os.environ, "CMAKE_ARGS": BUILD_FLAGS}, check=True)
    path = file.with_suffix(".npy")
    process = subprocess.Popen(
        [sys.executable, "-c", ASK_LLAMA_CPP, file, path, json.dumps(texts.texts), cache],
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


# -------------------------------------------------------------------------------------------------
# The comparison


def perplexity(tool: Tool, rows: list[list[int]]) -> float:
    """The perplexity of texts of ids."""
    total = 0.0
    for row in rows:
        logits = tool.logits(row[:-1]).astype(np.float64)
        top = logits.max(-1, keepdims=True)
        total += (np.log(np.exp(logits - top).sum(-1)) + top[:, 0]).sum()
        total -= logits[np.arange(len(row) - 1), row[1:]].sum()
    return float(np.exp(total / sum(len(row) - 1 for row in rows)))


class Report:
    """A table of tools, against one with the adapter beside the model, and one with it merged."""

    def __init__(self, texts: Texts, beside: Tool, merged: Tool):
        self.texts = texts
        self.expected = [beside.greedy(ids) for ids in texts.prompts]
        self.logits = [[t.logits(ids)[-1] for ids in texts.prompts] for t in (beside, merged)]
        largest = max(np.abs(logits).max() for logits in self.logits[0])
        counts = f"{len(texts.ids)} texts, {len(texts.prompts)} prompts"
        print(f"\n{counts}, logits up to {largest:.1f}\n")
        print("| | perplexity | same ids | same greedy text | logits | merged |")
        print("|---|---|---|---|---|---|")

    def add(self, what: str, tool: Tool) -> None:
        """Print the line of a tool."""
        prompts = self.texts.prompts
        texts = [tool.greedy(ids) for ids in prompts]
        same = sum(a == b for a, b in zip(texts, self.expected, strict=True))
        here = [tool.logits(ids)[-1] for ids in prompts]
        far = " | ".join(
            f"{max(np.abs(a - b).max() for a, b in zip(here, there, strict=True)):.5f}"
            for there in self.logits
        )
        ids = "" if tool.encoded is None else sum(map(list.__eq__, tool.encoded, self.texts.ids))
        value = perplexity(tool, self.texts.rows)
        print(f"| {what} | {value:.3f} | {ids} | {same} | {far} |", flush=True)


def compare(model: Path, adapter: str | Path, texts: Texts, args, folder: Path) -> None:
    """Print the table of a model and its adapter. folder: to write into."""

    def export(target: str, *flags: str, source: Path = model) -> Path:
        command = [sys.executable, ROOT / "fuse.py", "--model", source]
        command += ["--adapter-file", adapter, "--save-path", folder / target]
        subprocess.run([*command, *flags], check=True, stdout=subprocess.DEVNULL)
        return folder / target

    def export_gguf(dtype: str) -> Path:
        (folder / dtype).mkdir()
        return export(f"{dtype}/model.gguf", "--format", "gguf", "--dtype", dtype)

    beside, merged = in_lora(model, adapter), in_lora(export("mlx", "--format", "mlx"))
    report = Report(texts, beside, merged)
    report.add("model alone", in_lora(model))
    report.add("with the adapter", beside)
    report.add("mlx in lora.py", merged)
    exact = export("mlx32", "--format", "mlx", "--dtype", "float32")
    report.add("mlx, float32, in lora.py", in_lora(exact))

    plain = export("plain", "--no-adapter")
    report.add(
        "peft on the base in PEFT", in_transformers(plain, texts, export("peft", "--format=peft"))
    )
    report.add(
        "mlx-lm on the base in mlx-lm", in_mlx_lm(plain, texts, export("lm", "--format=mlx-lm"))
    )
    for dtype in ("float16", "float32", "bfloat16"):
        target = export(dtype + "-hf", "--dtype", dtype)
        report.add(f"hf, {dtype}, in transformers", in_transformers(target, texts))
        report.add(f"hf, {dtype}, in mlx-lm", in_mlx_lm(target, texts))
    for dtype in ("float16", "float32", "q8_0"):
        file = export_gguf(dtype)
        if dtype != "q8_0" and args.families is None:  # scaled positions are not read there
            tool = in_transformers(file.parent, texts, gguf_file=file.name)
            report.add(f"gguf, {dtype}, in transformers", tool)
        if args.llama_cpp:
            cache = GGML_FLOAT32 if dtype == "float32" else ""
            tool = in_llama_cpp(args.llama_cpp, file, texts, cache)
            report.add(f"gguf, {dtype}, in llama.cpp", tool)
    if args.families is not None:
        return
    for bits in ("8", "4"):
        few = folder / f"few-{bits}"
        command = [sys.executable, ROOT / "convert.py", "--torch-path", plain]
        command += ["--mlx-path", few, "-q", "--q-bits", bits]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        report.add(f"{bits} bits with the adapter", in_lora(few, adapter))
        report.add(
            f"{bits} bits, dequantized", in_lora(export(f"d{bits}", "--format=mlx", source=few))
        )
        kept = export(f"k{bits}", "--format=mlx", "--keep-quantized", source=few)
        report.add(f"{bits} bits, kept", in_lora(kept))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=ROOT / "base-model-mlx")
    parser.add_argument("--adapter-file", default=str(ROOT / "adapters.npz"))
    parser.add_argument("--data", type=Path, default=ROOT / "mlx-doc-data")
    parser.add_argument("--texts", type=int, help="of the test set, for the perplexity")
    parser.add_argument("--prompts", type=int, default=5, help="of these texts, to go on from")
    parser.add_argument("--families", nargs="*", help="small models instead: all, or some by name")
    parser.add_argument("--llama-cpp", type=Path, help="folder of llama-cpp-python, or for it")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.families is not None:
            compare_families(args, folder)
            return
        dataset = lora.Dataset(args.data / "test.jsonl")
        texts = [dataset[i] for i in range(len(dataset))][: args.texts]
        prompts = [f"{text.partition('A: ')[0]}A:" for text in texts[: args.prompts]]
        compare(args.model, args.adapter_file, Texts(args.model, texts, prompts), args, folder)


def compare_families(args: argparse.Namespace, folder: Path) -> None:
    """Print the table of each kind of small model that test_fuse.py exports, of real texts."""
    from conftest import texts_of_mlx
    from test_fuse import FAMILIES_TO_EXPORT, PROMPT, write_case

    texts = [PROMPT, *texts_of_mlx()][: args.texts or 20]
    for kind in args.families or FAMILIES_TO_EXPORT:
        family = FAMILIES_TO_EXPORT[kind]
        print(f"\n{kind}: {family}, small")
        (folder / kind).mkdir()
        model, adapter = write_case(folder / kind / "model", family, texts_of_mlx())
        examples = Texts(model, texts, [text[:30] for text in texts[: args.prompts]])
        compare(model, adapter, examples, args, folder / kind)


if __name__ == "__main__":
    main()
