"""fuse.py: what it writes, against transformers, mlx-lm, llama.cpp's own reader, and lora.py."""

import dataclasses
import json
import re
import resource
import shutil
import signal
import tracemalloc
from argparse import Namespace
from itertools import islice, pairwise
from pathlib import Path
from typing import NamedTuple

import gguf
import mlx_lm
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from conftest import QUICK, call_script, script_in_forks, write_quick_tokenizer
from jinja2.sandbox import ImmutableSandboxedEnvironment
from mlx_lm.generate import generate_step as mlx_generate_step
from sentencepiece import SentencePieceProcessor
from sentencepiece import sentencepiece_model_pb2 as sentencepiece_proto
from test_families import FAMILIES, our_args
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

import convert
import fuse
import lora
from models import Model, ModelArgs, add_lora
from parts import adapters, chat, export_hugging_face, fusing
from parts.byte_level_bpe import LLAMA3_PATTERN, begin_with
from parts.decoder import generate_step
from parts.gguf_vocabulary import TEKKEN, GGUFVocabulary, read_gguf_vocabulary

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
    ids: list[int] | None = None
    logits: np.ndarray | None = None
    text: list[int] | None = None


def write_byte_level_tokenizer(folder: Path, texts: list[str], bos: bool) -> None:
    """Write a tokenizer.json such as Llama 3's or Qwen's, with few tokens."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=bos))
    pattern = LLAMA3_PATTERN if bos else LLAMA3_PATTERN.replace("{1,3}", "")
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
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


def keep_spaces(path: Path) -> None:
    """Have a SentencePiece model keep all spaces, as Llama's and Mistral's do."""
    proto = sentencepiece_proto.ModelProto()
    proto.ParseFromString(path.read_bytes())
    proto.normalizer_spec.remove_extra_whitespaces = False
    path.write_bytes(proto.SerializeToString())


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
    if args.model_type in ("llama", "mistral") and args.rope_scaling is None:
        write_quick_tokenizer(folder)
        if args.sliding_window is None:
            keep_spaces(folder / "tokenizer.model")
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
    return list(islice(generate_step(model, ids), n))


FAMILIES_TO_EXPORT = {
    "grouped": "TinyLlama",
    "biases": "Qwen 2.5 0.5B",
    "scaled": "Llama 3.1 8B",
    "qk_norm": "Qwen 3 0.6B",
    "yarn": "Qwen 2.5 7B with YaRN",
    "window": "Mistral 7B v0.1",
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
    if case.folder.name != "window":  # which mlx-lm does not apply
        assert [token for token, _ in ids] == case.text


def test_lora_reads_the_same_logits_and_text(case, tmp_path):
    succeed(run(case, tmp_path / "mlx", "--format", "mlx"))
    model, _ = load(tmp_path / "mlx")
    np.testing.assert_allclose(model(mx.array([case.ids]))[0], case.logits, atol=1e-4)
    assert greedy(model, case.ids) == case.text


def test_a_gguf_file_holds_the_same_weights(case, exported, tmp_path):
    """By transformers' own reader, which knows nothing of scaled positions: its config is given,
    but for Mistral's, which is a Llama there.
    """
    window = case.folder.name == "window"
    process = run(case, tmp_path / "model.gguf", "--format", "gguf")
    assert process.returncode == 0, process.stderr
    warnings = "lets a position see all before it", "makes one space of several"
    assert [warning in process.stderr for warning in warnings] == [window, window]
    assert len(process.stderr.splitlines()) == 2 * window
    config = None if window else transformers.AutoConfig.from_pretrained(exported)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", config=config, dtype=torch.float32
    )
    with torch.no_grad():
        logits = model(torch.tensor([case.ids])).logits.numpy()
    np.testing.assert_allclose(logits, case.logits, atol=1e-4)


# -------------------------------------------------------------------------------------------------
# A tokenizer as llama.cpp reads it


def read_as_llama_cpp(vocabulary: GGUFVocabulary, text: str) -> list[int]:
    """What llama.cpp does for "llama": it joins the two neighbours whose joint text has the highest
    score, the first of them; what is no token then is bytes. A space is ▁ to it.
    """
    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    parts = list(text.replace(" ", "▁"))
    while True:
        joints = [a + b for a, b in pairwise(parts)]
        scores = [(vocabulary.scores[ids[j]], -i) for i, j in enumerate(joints) if j in ids]
        if not scores:
            break
        i = -max(scores)[1]
        parts[i : i + 2] = [joints[i]]
    bytes_of = [
        [part] if part in ids else [f"<0x{b:02X}>" for b in part.encode()] for part in parts
    ]
    return [ids[token] for tokens in bytes_of for token in tokens]


def test_llama_cpp_reads_the_pieces_of_the_base_model(tmp_path):
    """It knows no unused pieces, and no space that is a byte alone."""
    proto = sentencepiece_proto.ModelProto()
    kinds = proto.SentencePiece
    for piece, kind in (("<unk>", kinds.UNKNOWN), ("<s>", kinds.CONTROL), ("</s>", kinds.CONTROL)):
        proto.pieces.add(piece=piece, type=kind)
    for byte in range(256):
        proto.pieces.add(piece=f"<0x{byte:02X}>", type=kinds.BYTE)
    for rank, piece in enumerate(["ab", " a", " ab", "  ", "\n\n", "\n ", "\t\t\t"]):
        kind = kinds.UNUSED if piece[0] in "\n\t" else kinds.NORMAL
        proto.pieces.add(piece=piece, type=kind, score=-float(rank))
    proto.trainer_spec.model_type = sentencepiece_proto.TrainerSpec.BPE
    proto.trainer_spec.byte_fallback = True
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = False
    proto.normalizer_spec.remove_extra_whitespaces = False
    proto.normalizer_spec.escape_whitespaces = False
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    vocabulary = read_gguf_vocabulary(tmp_path, len(proto.pieces) + 1)
    theirs = SentencePieceProcessor(model_proto=proto.SerializeToString())
    for text in ("ab 3 ab  a", "ab\n\nab\n a\n3\n\n\n", " é🙂 \t\t ", "  ab   ab\n \nb"):
        assert read_as_llama_cpp(vocabulary, text) == theirs.encode(text), text
    shown = [vocabulary.tokens[theirs.piece_to_id(piece)] for piece in ("\n\n", "\n ", "<0x20>")]
    assert shown == ["\n \n", "\n ", "▁"]


# -------------------------------------------------------------------------------------------------
# Of an adapter whose sums float16 does not hold


@pytest.fixture(scope="module")
def uneven(case, tmp_path_factory) -> Case:
    """The case with an adapter of random numbers: merged, float16 rounds the weights."""
    matrices, rng = adapters.read_adapter(case.adapter), np.random.default_rng(2)
    adapter = tmp_path_factory.mktemp("uneven") / "adapters.npz"
    with open(adapter, "wb") as file:
        scaled = {k: m * rng.uniform(0.5, 1, m.shape) for k, m in matrices.items()}
        adapters.write_adapter(file, {k: m.astype(np.float32) for k, m in scaled.items()}, 3.0)
    model, _ = load(case.folder, adapter)
    return case._replace(adapter=adapter, logits=np.array(model(mx.array([case.ids]))[0]))


def logits_of_transformers(folder: Path, ids: list[int]) -> np.ndarray:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits.numpy()


def test_float32_has_the_adapter_as_exact_as_beside_the_model(uneven, tmp_path):
    succeed(run(uneven, tmp_path / "hf", "--dtype", "float32"))
    succeed(run(uneven, tmp_path / "mlx", "--dtype", "float32", "--format", "mlx"))
    logits = logits_of_transformers(tmp_path / "hf", uneven.ids)
    np.testing.assert_allclose(logits, uneven.logits, atol=1e-4)
    ids = mx.array([uneven.ids])
    theirs, _ = mlx_lm.load(str(tmp_path / "hf"))
    ours, _ = load(tmp_path / "mlx")
    for logits in (theirs(ids), ours(ids)[0]):
        assert logits.dtype == mx.float32
        np.testing.assert_allclose(logits, uneven.logits, atol=1e-4)


def test_float16_rounds_to_the_same_weights_everywhere(uneven, tmp_path):
    """The tools agree with each other, and differ from the adapter beside the model."""
    succeed(run(uneven, tmp_path / "hf"))
    succeed(run(uneven, tmp_path / "mlx", "--format", "mlx"))
    ours = load(tmp_path / "mlx")[0](mx.array([uneven.ids]))[0]
    logits = logits_of_transformers(tmp_path / "hf", uneven.ids)
    np.testing.assert_allclose(logits, ours, atol=1e-4)
    assert 5e-4 < np.abs(logits - uneven.logits).max() < 0.1


# -------------------------------------------------------------------------------------------------
# There and back again


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_convert_reads_an_export_back_as_it_was(case, tmp_path):
    def circle(source: Path, name: str) -> Path:
        succeed(run(case._replace(folder=source), tmp_path / name, "--no-adapter"))
        process = call_script(
            "convert.py", "--torch-path", tmp_path / name, "--mlx-path", tmp_path / f"{name}-mlx"
        )
        assert process.returncode == 0, process.stderr
        return tmp_path / f"{name}-mlx"

    once = circle(case.folder, "once")
    with np.load(case.folder / "weights.npz") as ours, np.load(once / "weights.npz") as back:
        assert set(ours.files) == set(back.files)
        assert all((ours[name] == back[name]).all() for name in ours.files)
    params = (json.loads((f / "params.json").read_text()) for f in (once, case.folder))
    ours, back = (ModelArgs(**values) for values in params)
    assert ours == back
    for name in ("tokenizer.model", "tokenizer.json", "chat_template.jinja"):
        assert contents(once).get(name) == contents(case.folder).get(name)
    assert contents(circle(once, "twice")) == contents(once)


# -------------------------------------------------------------------------------------------------
# Types and sizes


@pytest.fixture(scope="module")
def plain(tmp_path_factory, docstrings) -> Case:
    """A model and its adapter, without what they compute."""
    return Case(*write_case(tmp_path_factory.mktemp("plain") / "m", "TinyLlama", docstrings))


def read_safetensors(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in folder.glob("*.safetensors"):
        tensors |= safetensors.torch.load_file(path)
    return tensors


def test_bfloat16_is_what_torch_rounds_to(plain, tmp_path):
    succeed(run(plain, tmp_path / "half"))
    succeed(run(plain, tmp_path / "brain", "--dtype", "bfloat16"))
    half, brain = read_safetensors(tmp_path / "half"), read_safetensors(tmp_path / "brain")
    assert half.keys() == brain.keys()
    for name, tensor in half.items():
        assert tensor.dtype == torch.float16
        assert torch.equal(tensor.to(torch.bfloat16), brain[name])


def test_shards_hold_no_more_than_their_limit_and_are_one_model(plain, tmp_path, monkeypatch):
    succeed(run(plain, tmp_path / "one"))
    monkeypatch.setattr(export_hugging_face, "SHARD_BYTES", 300_000)
    succeed(run(plain, tmp_path / "many"))
    shards = list((tmp_path / "many").glob("model-*-of-*.safetensors"))
    sizes = [sum(t.nbytes for t in safetensors.torch.load_file(p).values()) for p in shards]
    assert len(shards) > 3 and max(sizes) <= 300_000
    one, many = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()
        for name in ("one", "many")
    )
    assert all(torch.equal(one[name], many[name]) for name in one)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)


def test_q8_0_holds_each_weight_within_half_a_step(plain, tmp_path):
    for name, flags in (("f16", []), ("q8", ["--dtype", "q8_0"])):
        succeed(run(plain, tmp_path / f"{name}.gguf", "--format", "gguf", *flags))
    full, packed = (gguf.GGUFReader(tmp_path / f"{name}.gguf").tensors for name in ("f16", "q8"))
    for ours, theirs in zip(full, packed, strict=True):
        assert ours.name == theirs.name
        expected = gguf.dequantize(ours.data, ours.tensor_type)
        restored = gguf.dequantize(theirs.data, theirs.tensor_type)
        if expected.ndim == 2:
            assert theirs.tensor_type == gguf.GGMLQuantizationType.Q8_0
        step = np.abs(expected).max() / 127
        np.testing.assert_allclose(restored, expected, atol=0.6 * step)  # of integers and scale


def test_memory_does_not_grow_with_the_model(plain, tmp_path, monkeypatch):
    """With blocks of 4,096 values, the merging of 64,000 and more holds a few of them."""
    monkeypatch.setattr(fusing, "BLOCK", 2**12)
    model, _, weights = fuse.open_model(plain.folder)
    updates = fuse.read_updates(model, plain.adapter)
    fused = fusing.fuse(weights, updates, None)
    largest = 0
    for weight in export_hugging_face.to_hugging_face(map(fusing.cast, fused), 16):
        tracemalloc.start()
        for block in weight.blocks():
            largest = max(largest, block.size)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 32 * 4 * 2**12, weight.name
    assert largest == 2**12


# -------------------------------------------------------------------------------------------------
# Quantized models


@pytest.fixture(scope="module", params=[4, 8])
def quantized(request, plain, tmp_path_factory) -> Case:
    """The plain model in few bits, with the same adapter."""
    folder = shutil.copytree(plain.folder, tmp_path_factory.mktemp("few") / "bits")
    params = json.loads((folder / "params.json").read_text())
    args = Namespace(q_group_size=32, q_bits=request.param)
    with np.load(plain.folder / "weights.npz") as weights:
        arrays, params = convert.quantize(dict(weights), params, args)
    np.savez(folder / "weights.npz", **arrays)
    (folder / "params.json").write_text(json.dumps(params))
    model, tokenizer = load(folder, plain.adapter)
    ids = tokenizer.encode(PROMPT)
    return Case(folder, plain.adapter, ids, np.array(model(mx.array([ids]))[0]))


def test_a_quantized_model_is_dequantized(quantized, tmp_path):
    succeed(run(quantized, tmp_path / "hf"))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([quantized.ids])).logits.numpy()
    np.testing.assert_allclose(logits, quantized.logits, atol=1e-2)  # of float16's rounding


def test_kept_bits_change_in_the_adapted_layers_alone(quantized, tmp_path):
    succeed(run(quantized, tmp_path / "bits", "--format", "mlx", "--keep-quantized"))
    succeed(run(quantized, tmp_path / "floats", "--format", "mlx"))
    settings = json.loads((tmp_path / "bits" / "params.json").read_text())["quantization"]
    before, after, floats = (
        np.load(folder / "weights.npz")
        for folder in (quantized.folder, tmp_path / "bits", tmp_path / "floats")
    )
    assert before.files == after.files
    for name in before.files:
        if not name.startswith(("layers.1.", "layers.2.")) or "norm" in name:
            np.testing.assert_array_equal(after[name], before[name])
        elif name.endswith(".weight"):
            expected = mx.quantize(mx.array(floats[name]), **settings)
            for kind, value in zip(("weight", "scales", "biases"), expected, strict=True):
                np.testing.assert_array_equal(after[name.replace("weight", kind)], value)


def test_mlx_lm_reads_kept_bits(quantized, tmp_path):
    succeed(run(quantized, tmp_path / "mlx", "--format", "mlx", "--keep-quantized"))
    succeed(run(quantized, tmp_path / "hf", "--keep-quantized"))
    ours, _ = load(tmp_path / "mlx")
    theirs, _ = mlx_lm.load(str(tmp_path / "hf"))
    theirs.set_dtype(mx.float32)
    ids = mx.array([quantized.ids])
    np.testing.assert_allclose(theirs(ids), ours(ids)[0], atol=1e-3)


def test_data_tell_what_kept_bits_cost(quantized, data, tmp_path):
    process = run(quantized, tmp_path / "m", "--format", "mlx", "--keep-quantized", "--data", data)
    assert process.returncode == 0, process.stderr
    before, after = map(float, re.findall(r"([\d.]+) (?:with the adapter|merged)", process.stdout))
    test = lora.Dataset(data / "test.jsonl")
    for expected, (folder, adapter) in {
        before: (quantized.folder, quantized.adapter),
        after: (tmp_path / "m", None),
    }.items():
        model, tokenizer = lora.load_model(folder)
        if adapter:
            lora.load_adapter(model, adapter)
        loss = lora.evaluate(model, test, lora.loss, tokenizer, 4, -1)
        assert np.exp(loss) == pytest.approx(expected, rel=1e-3)


# -------------------------------------------------------------------------------------------------
# Mistakes, and what is there already


def error_of(process, status: int = 2) -> str:
    assert process.returncode == status, process.stdout + process.stderr
    (line,) = process.stderr.splitlines()
    assert line.startswith("fuse.py: error: ")
    return line


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--model", "nowhere"], "nowhere/params.json is missing"),
        (["--adapter-file", "none.npz"], "there is no adapter file none.npz"),
        (["--dtype", "q8_0"], "--format hf takes --dtype float16, bfloat16, float32"),
        (["--format", "mlx", "--dtype", "bfloat16"], "--format mlx takes --dtype float16, float32"),
        (["--keep-quantized"], "is not quantized"),
        (["--keep-quantized", "--format", "gguf"], "goes with --format hf or mlx"),
        (["--no-adapter", "--data", "."], "leave out --no-adapter"),
        (["--data", "nowhere"], "nowhere/test.jsonl is missing"),
        (["--mask-prompt"], "is for the test set of --data"),
        (["--chat-template", "nowhere"], "--chat-template nowhere is no file, and none of chatml"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(plain, tmp_path, flags, says):
    assert says in error_of(run(plain, tmp_path / "out", *flags))
    assert list(tmp_path.iterdir()) == []


def test_chats_without_a_template_are_refused_before_anything_is_written(plain, tmp_path):
    turns = [("user", "What is ReLU?"), ("assistant", "A function.")]
    chat = {"messages": [{"role": role, "content": content} for role, content in turns]}
    (tmp_path / "test.jsonl").write_text(json.dumps(chat) + "\n")
    folder = shutil.copytree(plain.folder, tmp_path / "m")
    (folder / "chat_template.jinja").unlink()
    case, flags = plain._replace(folder=folder), ["--format", "mlx", "--data", tmp_path]
    says = error_of(run(case, tmp_path / "out", *flags))
    assert "has no chat_template.jinja, which chats need: give --chat-template" in says
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "test.jsonl"]
    costs = []
    for more in ([], ["--mask-prompt"]):
        process = run(case, tmp_path / "out", *flags, "--chat-template", "chatml", *more)
        assert process.returncode == 0, process.stderr
        costs.append(process.stdout.splitlines()[-1])
    assert "with the adapter" in costs[0] and costs[0] != costs[1]


def test_the_template_of_the_training_goes_out_with_the_model(plain, tmp_path):
    """In the GGUF without marks of answers, which llama-cpp-python does not know."""
    chosen = ["--chat-template", "chatml"]
    for kind, target in (("hf", "hf"), ("mlx", "mlx"), ("gguf", "model.gguf")):
        succeed(run(plain, tmp_path / target, "--format", kind, *chosen))
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    expected = "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>\n"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.apply_chat_template(turns, tokenize=False) == expected
    assert (tmp_path / "mlx" / "chat_template.jinja").read_text() == chat.BUILT_IN["chatml"]
    field = gguf.GGUFReader(tmp_path / "model.gguf").fields["tokenizer.chat_template"].contents()
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    assert environment.from_string(field).render(messages=turns) == expected
    succeed(run(plain, tmp_path / "own"))
    assert (tmp_path / "own" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_config_vouches_for_the_pattern_that_splits_words(plain, tmp_path, docstrings):
    """Not for Llama 3's, which many a Mistral's tokenizer.json has by mistake: transformers warns
    of these, where they have Mistral's 131,072 tokens.
    """
    for name, pattern in (("wrong", LLAMA3_PATTERN), ("right", TEKKEN)):
        case = Case(*write_case(tmp_path / name, "Llama 3.1 8B", docstrings))
        tokenizer = case.folder / "tokenizer.json"
        content = tokenizer.read_text()
        assert json.dumps(LLAMA3_PATTERN) in content
        tokenizer.write_text(content.replace(json.dumps(LLAMA3_PATTERN), json.dumps(pattern)))
        succeed(run(case, tmp_path / f"hf-{name}"))
    succeed(run(plain, tmp_path / "hf-pieces"))
    configs = {
        name: json.loads((tmp_path / f"hf-{name}" / "config.json").read_text())
        for name in ("wrong", "right", "pieces")
    }
    versions = {name: config.get("transformers_version") for name, config in configs.items()}
    assert versions == {"wrong": None, "right": "5.0.0", "pieces": "5.0.0"}


def test_a_damaged_model_is_named(plain, tmp_path):
    def says(edit, *flags) -> str:
        folder = shutil.copytree(plain.folder, tmp_path / "m")
        edit(folder)
        error = error_of(run(plain._replace(folder=folder), tmp_path / "out", *flags))
        shutil.rmtree(folder)
        assert list(tmp_path.iterdir()) == []
        return error

    def other_kind(folder: Path) -> None:
        params = json.loads((folder / "params.json").read_text())
        (folder / "params.json").write_text(json.dumps({**params, "model_type": "x"}))

    def integers(folder: Path) -> None:
        with np.load(folder / "weights.npz") as weights:
            arrays = dict(weights)
        arrays["norm.weight"] = arrays["norm.weight"].astype(np.uint32)
        np.savez(folder / "weights.npz", **arrays)

    def bytes_of_another(folder: Path) -> None:
        (folder / "chat_template.jinja").write_bytes(b"\xff")

    assert "params.json has model_type 'x': run convert.py" in says(other_kind)
    assert "norm.weight does not go with params.json" in says(integers)
    for kind in ("hf", "gguf"):
        assert "chat_template.jinja is not UTF-8" in says(bytes_of_another, "--format", kind)


def test_what_does_not_fit_is_named(plain, tmp_path):
    folder = shutil.copytree(plain.folder, tmp_path / "m")
    damaged = bytearray((folder / "weights.npz").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (folder / "weights.npz").write_bytes(damaged)
    assert "is damaged" in error_of(run(plain._replace(folder=folder), tmp_path / "out"))
    with np.load(plain.folder / "weights.npz") as weights:
        arrays = {name: weights[name] for name in weights.files[1:]}
        lost = weights.files[0]
    np.savez(folder / "weights.npz", **arrays)
    assert f"{lost} does not go with params.json" in error_of(
        run(plain._replace(folder=folder), tmp_path / "out")
    )
    matrices = adapters.read_adapter(plain.adapter)
    far = {name.replace("layers.2", "layers.7"): m * 1e5 for name, m in matrices.items()}
    np.savez(tmp_path / "far.npz", **far)
    says = error_of(run(plain._replace(adapter=tmp_path / "far.npz"), tmp_path / "out"))
    assert "adapts layer 7 of a model that has 3 layers" in says
    np.savez(tmp_path / "large.npz", **{name: m * 1e5 for name, m in matrices.items()})
    says = error_of(run(plain._replace(adapter=tmp_path / "large.npz"), tmp_path / "out"))
    assert "holds values that are not finite in float16" in says and "bfloat16" in says
    large, flags = plain._replace(adapter=tmp_path / "large.npz"), ["--format", "gguf"]
    np.savez(tmp_path / "large.npz", **{name: m * 1e7 for name, m in matrices.items()})
    says = error_of(run(large, tmp_path / "out", *flags, "--dtype", "q8_0"))
    assert "holds values that are not finite in q8_0" in says
    np.savez(tmp_path / "large.npz", **{name: m * 1e25 for name, m in matrices.items()})
    says = error_of(run(large, tmp_path / "out", "--dtype", "float32"))
    assert "are not finite in float32" in says and "bfloat16" not in says
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*unfinished"))


def test_what_fuse_did_not_make_is_left_alone(plain, tmp_path):
    assert "the model's own folder" in error_of(run(plain, plain.folder, "--format", "mlx"))
    theirs = {
        "hf": {"config.json": b"{}", "model.safetensors": b"weights"},
        "words": {"tokenizer.json": b"somebody's"},
        "mlx": {"weights.npz": b"arrays", "params.json": b"{}"},
        "meta": {"consolidated.00.pth": b"weights"},
        "adapter": {"adapter_config.json": b"{}"},
    }
    for name, files in theirs.items():
        (tmp_path / name).mkdir()
        for file, content in files.items():
            (tmp_path / name / file).write_bytes(content)
        for kind in ("hf",) if name == "adapter" else ("hf", "mlx"):
            assert "name another" in error_of(run(plain, tmp_path / name, "--format", kind))
        assert contents(tmp_path / name) == files
    (tmp_path / "their.gguf").write_bytes(b"GGUF of another")
    for name, says in (("their.gguf", "did not make"), ("hf", "is a folder: name a file")):
        assert says in error_of(run(plain, tmp_path / name, "--format", "gguf"))
    assert "is a file, not a folder" in error_of(run(plain, tmp_path / "their.gguf"))
    says = error_of(run(plain, tmp_path / "no" / "m.gguf", "--format", "gguf"))
    assert "m.gguf does not exist: make it" in says and "the folder of --save-path" in says
    assert (tmp_path / "their.gguf").read_bytes() == b"GGUF of another"


def test_an_export_takes_the_place_of_an_older_one(plain, tmp_path, monkeypatch):
    """Of more files, too; what else lies there stays. The same export gives the same bytes."""
    succeed(run(plain, tmp_path / "new"))
    monkeypatch.setattr(export_hugging_face, "SHARD_BYTES", 300_000)
    succeed(run(plain, tmp_path / "hf", "--no-adapter"))
    monkeypatch.undo()
    (tmp_path / "hf" / "notes.txt").write_text("mine")
    succeed(run(plain, tmp_path / "hf"))
    assert contents(tmp_path / "hf") == {**contents(tmp_path / "new"), "notes.txt": b"mine"}
    for _ in range(2):
        succeed(run(plain, tmp_path / "m.gguf", "--format", "gguf"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "m.gguf", "new"]


def test_kills_leave_a_whole_folder_or_none(plain, tmp_path):
    """Six kills at random moments, and then an export that is not killed."""
    target = tmp_path / "hf"
    flags = ["--model", plain.folder, "--adapter-file", plain.adapter, "--save-path", target]
    with script_in_forks("fuse", *flags) as export_once:
        seconds = export_once()
        whole = contents(target)
        for moment in np.random.default_rng(0).uniform(0, 1.1, 6) * seconds:
            shutil.rmtree(target, ignore_errors=True)
            export_once(moment)
            assert not target.exists() or contents(target) == whole
        export_once()
    assert contents(target) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_full_disk_is_status_1_and_leaves_nothing(plain, tmp_path, monkeypatch):
    """Too little space is seen before anything is written; else the file that fails is removed."""
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100_000))
        for name, kind in (("hf", "hf"), ("mlx", "mlx"), ("m.gguf", "gguf")):
            says = error_of(run(plain, tmp_path / name, "--format", kind), status=1)
            assert "are free on the disk" in says
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for name, kind in (("hf", "hf"), ("mlx", "mlx"), ("m.gguf", "gguf")):
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
            process = run(plain, tmp_path / name, "--format", kind)
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            assert "File too large" in error_of(process, status=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert list(tmp_path.iterdir()) == []
