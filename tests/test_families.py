"""Each family of models, small but of its real shape in kind, against transformers' own class."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import transformers
from conftest import ROOT, SLOWNESS, call_script, write_model
from test_models import add_lora_to_both, go_as_on_a_gpu, loss_of_theirs, reference
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from parts import decoder, kv_cache
from parts.decoder import Decoder, generate_step
from parts.rope import amplitude, frequencies, make_rope

import mlx.core as mx
import mlx.nn as nn

import lora
from models import Model, ModelArgs, add_lora, quantizable

HEAD_DIM = 16
CONTEXT = 64  # of the models whose RoPE is scaled, before the scaling
WINDOW = 24
VOCABULARY = 300
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": CONTEXT,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": CONTEXT}


class Family(NamedTuple):
    """What config.json of a real model says, its sizes divided. heads: of queries, and of keys."""

    model_type: str
    heads: tuple[int, int]
    theta: float
    eps: float = 1e-5
    scaling: dict | None = None
    tied: bool = False
    window: int | None = None
    dim: int | None = None  # where it is not what all heads have


FAMILIES = {
    "Llama 2 7B": Family("llama", (4, 4), 1e4),
    "TinyLlama": Family("llama", (8, 1), 1e4),
    "Yi 6B": Family("llama", (8, 1), 5e6, 1e-6),
    "SmolLM 135M": Family("llama", (9, 3), 1e4, tied=True),
    "CodeLlama 7B": Family("llama", (4, 4), 1e6),
    "DeepSeek Coder 6.7B": Family(
        "llama", (4, 4), 1e5, 1e-6, {"rope_type": "linear", "factor": 4.0}
    ),
    "Llama 3 8B": Family("llama", (8, 2), 5e5),
    "Llama 3.1 8B": Family("llama", (8, 2), 5e5, scaling=LLAMA3),
    "Llama 3.2 1B": Family("llama", (8, 2), 5e5, scaling={**LLAMA3, "factor": 32.0}, tied=True),
    "Llama 3.3 70B": Family("llama", (8, 1), 5e5, scaling=LLAMA3),
    "Mistral 7B v0.1": Family("mistral", (8, 2), 1e4, window=WINDOW),
    "Mistral 7B v0.3": Family("mistral", (8, 2), 1e6),
    "Mistral Nemo": Family("mistral", (8, 2), 1e6, dim=160),
    "Codestral 22B": Family("mistral", (6, 1), 1e6),
    "Qwen 2 7B": Family("qwen2", (7, 1), 1e6, 1e-6),
    "Qwen 2.5 0.5B": Family("qwen2", (7, 1), 1e6, 1e-6, tied=True),
    "Qwen 2.5 7B with YaRN": Family("qwen2", (7, 1), 1e6, 1e-6, YARN),
    "Qwen 3 0.6B": Family("qwen3", (8, 4), 1e6, 1e-6, tied=True, dim=64),
    "Qwen 3 8B": Family("qwen3", (8, 2), 1e6, 1e-6),
}
ONE_OF_EACH_KIND = ["Llama 3.1 8B", "Mistral 7B v0.1", "Qwen 2 7B", "Qwen 3 0.6B"]


def our_args(family: Family) -> ModelArgs:
    n_heads, n_kv_heads = family.heads
    return ModelArgs(
        dim=family.dim or n_heads * HEAD_DIM,
        n_layers=3,
        head_dim=HEAD_DIM,
        hidden_dim=192,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        norm_eps=family.eps,
        vocab_size=VOCABULARY,
        rope_theta=family.theta,
        rope_scaling=family.scaling,
        sliding_window=family.window,
        attention_bias=family.model_type == "qwen2",
        qk_norm=family.model_type == "qwen3",
        tie_word_embeddings=family.tied,
        model_type=family.model_type,
        max_position_embeddings=4 * CONTEXT,
    )


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request) -> tuple[transformers.PreTrainedModel, Model]:
    return reference(our_args(FAMILIES[request.param]))


# More than the context before scaling, and than several windows.
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (2, 150))


def test_logits_equal_transformers(pair):
    theirs, ours = pair
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS)).logits.numpy()
    logits, _ = ours(mx.array(TOKENS))
    np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)
    assert np.abs(expected).max() > 1


def test_logits_with_a_cache_are_those_of_one_pass(pair, monkeypatch):
    """A prompt in pieces, then token by token. Both go past the window, and the cache grows."""
    theirs, ours = pair
    monkeypatch.setattr(decoder, "PREFILL_STEP", 40)
    monkeypatch.setattr(kv_cache, "STEP", 16)
    with torch.no_grad():
        expected = theirs(torch.tensor(TOKENS[:1])).logits.numpy()[0, 90:]
    decode = Decoder(ours)
    decode.prefill(TOKENS[0, :90].tolist())
    logits = [decode(mx.array([[token]]))[0] for token in TOKENS[0, 90:].tolist()]
    np.testing.assert_allclose(mx.stack(logits), expected, atol=1e-4, rtol=0)

    cache, logits = None, []
    for piece in np.split(TOKENS, [50, 51, 140], axis=1):
        some, cache = ours(mx.array(piece), cache)
        logits.append(some)
    at_once, _ = ours(mx.array(TOKENS))
    np.testing.assert_allclose(mx.concatenate(logits, 1), at_once, atol=1e-4, rtol=0)


def test_greedy_text_is_that_of_transformers(pair):
    theirs, ours = pair
    prompt = torch.tensor(TOKENS[:1, :60])
    settings = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    text = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)
    tokens = generate_step(ours, TOKENS[0, :60].tolist())
    assert [next(tokens) for _ in range(20)] == text[0, 60:].tolist()


@pytest.mark.parametrize(
    "name", [*ONE_OF_EACH_KIND, "Llama 3.2 1B", "Mistral Nemo", "Qwen 2.5 7B with YaRN"]
)
def test_lora_gradients_equal_torch_autograd(name):
    theirs, ours = reference(our_args(FAMILIES[name]))
    leaves = add_lora_to_both(ours.args, theirs, ours)
    tokens, lengths = TOKENS[:, :100], [99, 40]
    expected = loss_of_theirs(theirs, tokens, lengths)
    expected.backward()

    batch = mx.array(tokens[:, :-1]), mx.array(tokens[:, 1:]), mx.array(lengths)
    for checkpoint in (False, True):
        ours.grad_checkpoint = checkpoint
        (value, _), gradients = nn.value_and_grad(ours, lora.loss)(ours, *batch)
        assert value.item() == pytest.approx(expected.item(), abs=1e-5)
        for key, leaf in leaves.items():
            gradient = gradients
            for part in key.split("."):
                gradient = gradient[int(part) if part.isdigit() else part]
            scale = leaf.grad.abs().max().item()
            np.testing.assert_allclose(np.array(gradient) / scale, leaf.grad / scale, atol=1e-4)


# -------------------------------------------------------------------------------------------------
# All that the families have, in one model, in each form of its operations


EVERYTHING = ModelArgs(
    dim=64,
    n_layers=3,
    head_dim=16,
    hidden_dim=96,
    n_heads=6,
    n_kv_heads=2,
    norm_eps=1e-6,
    vocab_size=VOCABULARY,
    rope_scaling=YARN,
    sliding_window=WINDOW,
    attention_bias=True,
    qk_norm=True,
    tie_word_embeddings=True,
)


def randomized(model: Model) -> Model:
    """The model with random norms and biases, too."""
    randomly = lambda value: value + mx.random.normal(value.shape) * 0.3  # noqa: E731
    return model.apply(randomly, lambda module, name, value: getattr(value, "ndim", 0) == 1)


def gradients(model: Model, tokens: mx.array) -> mx.array:
    lengths = mx.array([len(tokens[0]) - 1, 40])
    _, tree = nn.value_and_grad(model, lora.loss)(model, tokens[:, :-1], tokens[:, 1:], lengths)
    return lora.to_vector(tree)


@pytest.mark.parametrize("bits", [16, 4])
def test_a_gpu_s_form_computes_what_a_cpu_s_does(bits, monkeypatch):
    mx.random.seed(3)
    model = randomized(Model(EVERYTHING))
    if bits < 16:
        nn.quantize(model, 32, bits, class_predicate=quantizable)
    add_lora(model, [1, 2])
    for layer in model.layers[1:]:
        for adapter in (layer.attention.wq, layer.attention.wv):
            adapter.lora_b = mx.random.normal(adapter.lora_b.shape) * 0.1
    tokens = mx.array(TOKENS)
    expected, gradient = model(tokens)[0], gradients(model, tokens)
    mx.eval(expected, gradient)

    go_as_on_a_gpu(monkeypatch)
    monkeypatch.setattr(kv_cache, "STEP", 16)
    np.testing.assert_allclose(model(tokens)[0], expected, atol=1e-4, rtol=0)
    tolerance = 1e-4 * mx.abs(gradient).max().item()
    np.testing.assert_allclose(gradients(model, tokens), gradient, atol=tolerance, rtol=0)
    decode = Decoder(model)
    decode.prefill(TOKENS[0, :90].tolist())
    logits = [decode(mx.array([[token]]))[0] for token in TOKENS[0, 90:].tolist()]
    np.testing.assert_allclose(mx.stack(logits), expected[0, 90:], atol=1e-4, rtol=0)


def test_a_cache_with_a_window_stays_bounded(monkeypatch):
    monkeypatch.setattr(decoder, "PREFILL_STEP", 40)
    monkeypatch.setattr(kv_cache, "STEP", 16)
    decode = Decoder(Model(EVERYTHING).eval())
    decode.prefill(TOKENS.flatten().tolist())
    assert decode.offset == TOKENS.size
    assert decode.caches[0].capacity <= WINDOW + 40 + 16


def test_a_window_longer_than_the_context_changes_no_bit():
    mx.random.seed(3)
    model = Model(EVERYTHING)
    logits = []
    for window in (None, 150, 10**6):
        for layer in model.layers:
            layer.attention.window = window
        logits.append(np.array(model(mx.array(TOKENS))[0]))
    assert np.array_equal(logits[0], logits[1])
    assert np.array_equal(logits[0], logits[2])


def test_a_tied_embedding_is_one_array():
    model = Model(EVERYTHING)
    assert model.output_weight is model.tok_embeddings.weight
    assert not any("output" in name for name, _ in model.named_modules())


# -------------------------------------------------------------------------------------------------
# What params.json says


@pytest.mark.parametrize(
    ("scaling", "theta", "head_dim", "context"),
    [
        ({**LLAMA3, "original_max_position_embeddings": 8192}, 5e5, 128, 131072),
        ({**LLAMA3, "factor": 32.0, "original_max_position_embeddings": 8192}, 5e5, 64, 131072),
        ({"rope_type": "linear", "factor": 4.0}, 1e5, 128, 16384),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
         1e6, 128, 131072),
        ({"rope_type": "yarn", "factor": 4.0}, 1e6, 128, 32768),
        ({"rope_type": "yarn", "factor": 32, "original_max_position_embeddings": 4096,
          "beta_fast": 20, "beta_slow": 2, "mscale": 1.0, "mscale_all_dim": 0.707},
         1e4, 64, 131072),
        ({"rope_type": "yarn", "factor": 32, "original_max_position_embeddings": 4096,
          "attention_factor": 1.3, "truncate": False}, 1e4, 64, 131072),
        ({"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 8}, 1e4, 16, 16),
    ],
)  # fmt: skip
def test_the_frequencies_are_those_of_transformers(scaling, theta, head_dim, context):
    config = transformers.LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        max_position_embeddings=context,
        rope_parameters={**scaling, "rope_theta": theta},
    )
    expected, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, "cpu")
    rope = make_rope(head_dim, theta, scaling, context)
    np.testing.assert_allclose(frequencies(rope), expected, rtol=1e-6)
    assert amplitude(rope) == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type is none of"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_type is none of"),
        ({"rope_scaling": [1]}, "rope_scaling is [1]"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor of rope_scaling (linear) is None"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -1}}, "(linear) is -1"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "original_max_position_embeddings"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, "not below high_freq_factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 10**400}}, "(linear) is 1"),
        ({"rope_theta": 1.0}, "rope_theta is 1.0"),
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"sliding_window": True}, "sliding_window is True"),
        ({"attention_bias": 1}, "attention_bias is 1"),
        ({"qk_norm": None}, "qk_norm is None"),
        ({"model_type": 3}, "model_type is 3"),
        ({"bos_id": VOCABULARY}, f"bos_id {VOCABULARY} is beyond"),
        ({"bos_id": -1}, "bos_id is -1"),
        ({"eos_ids": 2}, "eos_ids is 2"),
        ({"eos_ids": [2, 2.5]}, "eos_ids is [2, 2.5]"),
        ({"eos_ids": [2, -1]}, "eos_ids is [2, -1]"),
    ],
    ids=str,
)
def test_values_that_make_no_sense_are_named(change, says):
    values = {**vars(our_args(FAMILIES["Llama 2 7B"])), "max_position_embeddings": None}
    ModelArgs(**values)
    with pytest.raises(ValueError, match=re.escape(says)):
        ModelArgs(**{**values, **change})


# -------------------------------------------------------------------------------------------------
# The scripts


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_model) -> dict[str, Path]:
    """A model of 4 bits of each kind, as convert.py would write it."""
    mx.random.seed(5)
    folders = {}
    for name in ONE_OF_EACH_KIND:
        args = our_args(FAMILIES[name])
        args.n_layers, args.vocab_size, args.dim, args.head_dim = 2, 1000, 128, 32
        model = randomized(Model(args))
        nn.quantize(model, 32, 4, class_predicate=quantizable)
        folder = tmp_path_factory.mktemp("family")
        write_model(folder, model, **vars(args), quantization={"group_size": 32, "bits": 4})
        shutil.copy(tiny_model / "tokenizer.model", folder)
        folders[name] = folder
    return folders


def flags(folder: Path, data: Path, adapter: Path, iters: int) -> list[str]:
    return [
        "--model", str(folder), "--data", str(data), "--adapter-file", str(adapter), "--train",
        "--iters", str(iters), "--learning-rate", "1e-3", "--val-batches", "1",
        "--batch-size", "2",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(folders, data) -> dict[str, Path]:
    """The adapters of four steps of each."""
    adapters = {}
    for name, folder in folders.items():
        adapters[name] = folder / "adapters.npz"
        process = call_script("lora.py", *flags(folder, data, adapters[name], 4))
        assert process.returncode == 0, process.stderr
    return adapters


@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_a_resumed_run_with_recomputed_layers_ends_with_the_same_adapters(
    name, folders, data, trained, tmp_path
):
    adapter = tmp_path / "adapters.npz"
    first = flags(folders[name], data, adapter, 2)
    for arguments in (first, [*flags(folders[name], data, adapter, 4), "--grad-checkpoint"]):
        resumed = ["--resume-adapter-file", adapter] if adapter.exists() else []
        process = call_script("lora.py", *arguments, *resumed)
        assert process.returncode == 0, process.stderr
    assert_same_adapters(adapter, trained[name])


def test_two_ranks_train_as_one_process_does(folders, data, trained, tmp_path):
    runs = [flags(folders[name], data, tmp_path / f"{name}.npz", 4) for name in ONE_OF_EACH_KIND]
    code = (
        "import json, sys, lora\n"
        "with lora.Ranks.join(lora.COMMON_ENDS) as ranks:\n"
        "    for flags in json.loads(sys.argv[1]):\n"
        "        lora.run(lora.build_parser().parse_args(flags), ranks)\n"
    )
    port = random.randrange(20000, 32000, 10)
    hosts = tmp_path / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port + rank}"] for rank in range(2)]))
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(runs)],
            cwd=ROOT,
            env={**os.environ, "MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [rank.communicate(timeout=120 * SLOWNESS)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    for name, adapter in trained.items():
        assert_same_adapters(tmp_path / f"{name}.npz", adapter)


def assert_same_adapters(adapter: Path, expected: Path) -> None:
    ours, theirs = np.load(adapter), np.load(expected)
    assert set(ours.files) == set(theirs.files)
    for name in theirs.files:
        np.testing.assert_allclose(ours[name], theirs[name], atol=1e-4, rtol=0, err_msg=name)
        assert not name.endswith("lora_b") or np.abs(theirs[name]).max() > 1e-3


@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_generated_text_is_what_the_whole_network_says_again_and_again(name, folders, trained):
    prompt = "Applies the rectified linear unit. Then it normalises, and adds the input." * 3
    arguments = ["--num-tokens", "12", "--temp", "0", "--prompt", prompt]
    options = ["--model", folders[name], "--adapter-file", trained[name], *arguments]
    process = call_script("lora.py", *options)
    assert process.returncode == 0, process.stderr

    model, tokenizer = lora.load_model(folders[name], mx.float32)
    lora.load_adapter(model, trained[name])
    ids = tokenizer.encode(prompt)
    assert len(ids) > WINDOW
    for _ in range(12):
        ids.append(model(mx.array([ids]))[0][0, -1].argmax().item())
        if ids[-1] == tokenizer.eos_id:
            break
    assert process.stdout.partition("Generating\n")[2].rstrip("\n") == tokenizer.decode(ids)
