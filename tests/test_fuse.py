"""fuse.py: what it writes, against transformers, mlx-lm, llama.cpp's own reader, and lora.py."""

import dataclasses
import json
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import mlx_lm
from mlx_lm.generate import generate_step as mlx_generate_step

import numpy as np
import pytest
import torch
import transformers
from conftest import QUICK, call_script, write_quick_tokenizer
from test_families import FAMILIES, our_args
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers


import lora
from models import Model, ModelArgs, add_lora
from parts import adapters
from parts.byte_level_bpe import LLAMA3_PATTERN, begin_with
from parts.decoder import generate_step

import mlx.core as mx
from mlx.utils import tree_flatten

ALL = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")
PROMPT = "Applies the function\n\n  ``x``, é 🙂."


class Case(NamedTuple):
    """A model folder, an adapter file for it, and what both compute: logits (1, L, V) and the ids
    of a greedy text of 60 tokens, of ids.
    """

    folder: Path
    adapter: Path
    ids: list[int]
    logits: np.ndarray
    text: list[int]


def write_byte_level_tokenizer(folder: Path, texts: list[str], bos: bool) -> None:
    """Write a tokenizer.json such as Llama 3's or Qwen's, with few tokens."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=bos))
    pattern = LLAMA3_PATTERN if bos else LLAMA3_PATTERN.replace("{1,3}", "")
    split = pre_tokenizers.Split(pre_tokenizers_regex(pattern), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=QUICK["vocab_size"] - 5,
        special_tokens=["<|begin|>", "<|end|>", "<|eot_id|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    content = json.loads(tokenizer.to_str())
    content["post_processor"] = begin_with(0, "<|begin|>") if bos else None
    (folder / "tokenizer.json").write_text(json.dumps(content))


def pre_tokenizers_regex(pattern: str):
    from tokenizers import Regex

    return Regex(pattern)


def random_model(args: ModelArgs, seed: int = 0) -> Model:
    """A model of weights that are multiples of 1/1024, below 2: float16 holds them, and what an
    adapter of multiples of 1/32 makes of them. So nothing is rounded but by what computes.
    """
    rng = np.random.default_rng(seed)
    model = Model(args)
    weights = []
    for name, value in tree_flatten(model.parameters()):
        array = rng.normal(size=value.shape) * (0.3 if value.ndim == 1 else 0.08)
        array += name.endswith("norm.weight")
        weights.append((name, mx.array(round_to(array, 1024))))
    model.load_weights(weights)
    return model


def round_to(array: np.ndarray, steps: int) -> np.ndarray:
    """The nearest multiples of 1 / steps, float32."""
    return (np.round(array * steps) / steps).astype(np.float32)


def write_case(folder: Path, name: str, texts: list[str]) -> tuple[Path, Path]:
    """Write a random model of a family, as convert.py does, and an adapter for it."""
    folder.mkdir()
    args = dataclasses.replace(our_args(FAMILIES[name]), vocab_size=QUICK["vocab_size"])
    if args.model_type == "llama" and args.rope_scaling is None:
        write_quick_tokenizer(folder)
        args = dataclasses.replace(args, bos_id=1, eos_ids=[2])
    else:
        bos = args.model_type == "llama"
        write_byte_level_tokenizer(folder, texts, bos)
        args = dataclasses.replace(args, bos_id=0 if bos else None, eos_ids=[1, 2])
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    model = random_model(args)
    arrays = {k: np.array(v.astype(mx.float16)) for k, v in tree_flatten(model.parameters())}
    np.savez(folder / "weights.npz", **arrays)
    (folder / "params.json").write_text(json.dumps(dataclasses.asdict(args), indent=2) + "\n")

    add_lora(model, [1, 2], ALL, rank=4, scale=3.0)
    rng = np.random.default_rng(1)
    matrices = {
        name: round_to(rng.normal(size=value.shape) * 0.1, 32)
        for name, value in tree_flatten(model.trainable_parameters())
    }
    adapter = folder.parent / f"{folder.name}.npz"
    with open(adapter, "wb") as file:
        adapters.write_adapter(file, matrices, 3.0)
    return folder, adapter


def load(folder: Path, adapter: Path | None = None):
    model, tokenizer = lora.load_model(folder, mx.float32)
    if adapter:
        lora.load_adapter(model, adapter)
    return model, tokenizer


def greedy(model: Model, ids: list[int], n: int = 60) -> list[int]:
    return list(islice(generate_step(model, ids, 0), n))


FAMILIES_TO_EXPORT = {
    "grouped": "TinyLlama",
    "biases": "Qwen 2.5 0.5B",
    "scaled": "Llama 3.1 8B",
    "qk_norm": "Qwen 3 0.6B",
    "yarn": "Qwen 2.5 7B with YaRN",
}


@pytest.fixture(scope="module", params=FAMILIES_TO_EXPORT)
def case(request, tmp_path_factory, docstrings) -> Case:
    folder = tmp_path_factory.mktemp("case") / request.param
    folder, adapter = write_case(folder, FAMILIES_TO_EXPORT[request.param], docstrings)
    model, tokenizer = load(folder, adapter)
    ids = tokenizer.encode(PROMPT)
    logits = np.array(model(mx.array([ids]))[0])
    return Case(folder, adapter, ids, logits, greedy(model, ids))


def run(case: Case, target: Path, *flags, by=call_script):
    """Run fuse.py, in this process or, by `run_script`, in one of its own."""
    arguments = ["--model", case.folder, "--adapter-file", case.adapter, "--save-path", target]
    return by("fuse.py", *arguments, *flags)


def succeed(process) -> None:
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""


@pytest.fixture(scope="module")
def exported(case, tmp_path_factory) -> Path:
    """The case's folder for transformers."""
    target = tmp_path_factory.mktemp("exported") / "hf"
    succeed(run(case, target))
    return target


# -------------------------------------------------------------------------------------------------
# The same numbers everywhere


def test_transformers_reads_the_same_logits_and_text(case, exported):
    model = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    assert tokenizer.encode(PROMPT) == case.ids
    ids = torch.tensor([case.ids])
    with torch.no_grad():
        np.testing.assert_allclose(model(ids).logits.numpy(), case.logits, atol=1e-4)
        out = model.generate(ids, max_new_tokens=60, do_sample=False)
    assert out[0, len(case.ids) :].tolist() == case.text


def test_mlx_lm_reads_the_same_logits_and_text(case, exported):
    model, tokenizer = mlx_lm.load(str(exported))
    assert tokenizer.encode(PROMPT) == case.ids
    model.set_dtype(mx.float32)
    np.testing.assert_allclose(model(mx.array([case.ids])), case.logits, atol=1e-4)

    ids = mlx_generate_step(mx.array(case.ids), model, max_tokens=60)
    assert [token for token, _ in ids] == case.text


def test_lora_reads_the_same_logits_and_text(case, tmp_path):
    succeed(run(case, tmp_path / "mlx", "--format", "mlx"))
    model, _ = load(tmp_path / "mlx")
    np.testing.assert_allclose(model(mx.array([case.ids]))[0], case.logits, atol=1e-4)
    assert greedy(model, case.ids) == case.text


def test_a_gguf_file_holds_the_same_weights(case, exported, tmp_path):
    """By transformers' own reader, which knows nothing of scaled positions: its config is given."""
    succeed(run(case, tmp_path / "model.gguf", "--format", "gguf"))
    config = transformers.AutoConfig.from_pretrained(exported)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", config=config, dtype=torch.float32
    )
    with torch.no_grad():
        logits = model(torch.tensor([case.ids])).logits.numpy()
    np.testing.assert_allclose(logits, case.logits, atol=1e-4)
