"""convert.py on small checkpoints in Meta's layout."""

import argparse
import json
import os
import shutil
import zipfile

import numpy as np
import pytest
import torch
from conftest import MISTRAL_TOKENIZER, TINY, run_script

import convert
import lora
from models import Model, ModelArgs

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

# What Meta writes, and what the model does not use.
META = {
    "dim": 64,
    "n_layers": 3,
    "n_heads": 4,
    "multiple_of": 32,
    "ffn_dim_multiplier": 1.3,
    "sliding_window": 4096,
    "norm_eps": 1e-5,
    "vocab_size": -1,
}


def checkpoint_tensors(n_kv_heads: int = 4, dtype=torch.bfloat16) -> dict[str, torch.Tensor]:
    shapes = ModelArgs(**{**TINY, "n_kv_heads": n_kv_heads})
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(*value.shape, generator=generator).mul(0.1).to(dtype)
        for name, value in tree_flatten(Model(shapes).parameters())
    }
    return {**tensors, "rope.freqs": torch.ones(8, dtype=dtype)}


def write_checkpoint(folder, tensors, params):
    folder.mkdir(exist_ok=True)
    torch.save(tensors, folder / "consolidated.00.pth")
    (folder / "params.json").write_text(params if isinstance(params, str) else json.dumps(params))
    shutil.copy(MISTRAL_TOKENIZER, folder / "tokenizer.model")
    return folder


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path / "torch", checkpoint_tensors(), META)


def run(torch_path, mlx_path, *flags):
    return run_script("convert.py", "--torch-path", torch_path, "--mlx-path", mlx_path, *flags)


def test_the_weights_are_the_checkpoints_in_float16_under_their_own_names(checkpoint, tmp_path):
    process = run(checkpoint, tmp_path / "mlx")
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    expected = {name: t.to(torch.float16).numpy() for name, t in checkpoint_tensors().items()}
    del expected["rope.freqs"]
    with np.load(tmp_path / "mlx" / "weights.npz") as by_numpy:
        by_mlx = mx.load(str(tmp_path / "mlx" / "weights.npz"))
        assert set(by_numpy.files) == set(by_mlx) == set(expected)
        for name, value in expected.items():
            assert by_numpy[name].dtype == np.float16
            np.testing.assert_array_equal(by_numpy[name], value)
            np.testing.assert_array_equal(np.array(by_mlx[name]), value)
    with zipfile.ZipFile(tmp_path / "mlx" / "weights.npz") as archive:
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
    tokenizer = tmp_path / "mlx" / "tokenizer.model"
    assert tokenizer.read_bytes() == MISTRAL_TOKENIZER.read_bytes()


def test_params_hold_what_the_model_uses_and_what_the_shapes_imply(checkpoint, tmp_path):
    run(checkpoint, tmp_path / "mlx")
    params = json.loads((tmp_path / "mlx" / "params.json").read_text())
    assert params == {
        "dim": 64,
        "n_layers": 3,
        "head_dim": 16,
        "hidden_dim": 96,
        "n_heads": 4,
        "n_kv_heads": 4,
        "norm_eps": 1e-5,
        "vocab_size": 32000,
        "rope_theta": 10000.0,
    }


def test_given_values_are_kept(tmp_path):
    given = {**META, "n_kv_heads": 2, "rope_theta": 1e6, "head_dim": 16, "vocab_size": 32000}
    folder = write_checkpoint(tmp_path / "torch", checkpoint_tensors(n_kv_heads=2), given)
    run(folder, tmp_path / "mlx")
    params = json.loads((tmp_path / "mlx" / "params.json").read_text())
    assert params["n_kv_heads"] == 2
    assert params["rope_theta"] == 1e6


def test_two_conversions_are_equal_byte_for_byte(checkpoint, tmp_path):
    for name in ("one", "two"):
        assert run(checkpoint, tmp_path / name, "-q", "--q-group-size", 32).returncode == 0
    for name in convert.FILES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_quantized_weights_are_within_the_error_that_their_bits_allow(bits, group_size):
    """Half a step of the range that a group of weights spans, and rounding to float16."""
    rng = np.random.default_rng(bits)
    config = {**TINY, "vocab_size": 96, "dim": 64, "hidden_dim": 128}
    weights = {
        name: rng.normal(size=value.shape).astype(np.float16)
        for name, value in tree_flatten(Model(ModelArgs(**config)).parameters())
    }
    before = dict(config)
    args = argparse.Namespace(q_group_size=group_size, q_bits=bits)
    quantized, quantized_config = convert.quantize(weights, config, args)
    assert config == before
    assert quantized_config == {
        **config, "quantization": {"group_size": group_size, "bits": bits}
    }  # fmt: skip

    for name, weight in weights.items():
        if name.startswith(("output", "tok_embeddings")) or weight.ndim == 1:
            np.testing.assert_array_equal(np.array(quantized[name]), weight)
            continue
        base = name.removesuffix(".weight")
        parts = [quantized[f"{base}.{part}"] for part in ("weight", "scales", "biases")]
        restored = np.array(mx.dequantize(*parts, group_size=group_size, bits=bits), np.float32)
        groups = weight.astype(np.float32).reshape(weight.shape[0], -1, group_size)
        span = groups.max(-1) - groups.min(-1)
        # MLX moves the grid so that the value farthest from zero is met: up to a whole step.
        allowed = np.repeat(span / (2**bits - 1) + 2e-3 * np.abs(groups).max(-1), group_size, 1)
        assert (np.abs(restored - weight) <= allowed).all()


def test_a_layer_of_the_outputs_size_is_quantized_and_the_output_is_not():
    """With `hidden_dim` equal to `vocab_size`, w1 and w3 have the output's shape."""
    config = {**TINY, "vocab_size": 96, "hidden_dim": 96}
    weights = dict(tree_flatten(Model(ModelArgs(**config)).parameters()))
    args = argparse.Namespace(q_group_size=32, q_bits=4)
    quantized, _ = convert.quantize(weights, config, args)
    assert "output.scales" not in quantized
    assert "layers.0.feed_forward.w1.scales" in quantized


def test_a_quantized_folder_loads_and_computes_what_its_weights_say(checkpoint, tmp_path):
    assert (
        run(checkpoint, tmp_path / "q8", "-q", "--q-bits", 8, "--q-group-size", 32).returncode == 0
    )
    assert run(checkpoint, tmp_path / "f16").returncode == 0
    quantized, _ = lora.load_model(tmp_path / "q8", mx.float32)
    full, _ = lora.load_model(tmp_path / "f16", mx.float32)
    assert isinstance(quantized.layers[0].attention.wq, nn.QuantizedLinear)
    assert not isinstance(quantized.output, nn.QuantizedLinear)
    tokens = mx.array([[1, 500, 7, 31999]])
    expected = np.array(full(tokens)[0])
    np.testing.assert_allclose(quantized(tokens)[0], expected, atol=0.02 * np.abs(expected).max())


# -------------------------------------------------------------------------------------------------
# Errors


def error_of(process, status=2) -> str:
    assert process.returncode == status, process.stdout + process.stderr
    lines = process.stderr.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("convert.py: error: ")
    return lines[0]


def test_a_pickle_that_would_run_a_command_is_refused_and_does_not_run(checkpoint, tmp_path):
    class Command:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'it-ran'}",)

    torch.save({"norm.weight": Command()}, checkpoint / "consolidated.00.pth")
    assert "holds more than tensors" in error_of(run(checkpoint, tmp_path / "mlx"))
    assert not (tmp_path / "it-ran").exists()
    assert not (tmp_path / "mlx").exists()


def changed(**tensors):
    return {**checkpoint_tensors(), **tensors}


@pytest.mark.parametrize(
    ("tensors", "params", "says"),
    [
        (None, "{", "params.json is not JSON"),
        (None, "[]", "params.json does not hold an object"),
        (None, {**META, "dim": "64"}, "params.json: dim is '64', not a positive int"),
        (None, {**META, "n_layers": 2.5}, "params.json: n_layers is 2.5, not a positive int"),
        (None, {k: v for k, v in META.items() if k != "n_heads"}, "params.json: lacks head_dim"),
        (None, {**META, "n_layers": 4}, "lacks layers.3."),
        (None, {**META, "n_layers": 2}, "holds an unknown layers.2."),
        (None, {**META, "dim": 128}, "where the params imply"),
        ({"layers.1.attention.wq.bias": torch.zeros(64)}, META, "unknown layers.1"),
        ({"norm.weight": torch.full((64,), float("nan"))}, META, "norm.weight holds values that"),
        ({"norm.weight": torch.full((64,), 1e6)}, META, "norm.weight holds values that"),
        ({"norm.weight": torch.ones(32)}, META, "norm.weight has the shape (32,)"),
    ],
)  # fmt: skip
def test_a_checkpoint_that_does_not_fit_is_one_line_and_nothing_is_written(
    tmp_path, tensors, params, says
):
    folder = write_checkpoint(tmp_path / "torch", changed(**(tensors or {})), params)
    assert says in error_of(run(folder, tmp_path / "mlx"))
    assert [path.name for path in tmp_path.iterdir()] == ["torch"]


def test_impossible_calls_are_one_line(checkpoint, tmp_path):
    assert "nowhere holds no checkpoint" in error_of(run("nowhere", tmp_path / "mlx"))
    assert "own folder" in error_of(run(checkpoint, checkpoint))
    assert "--q-bits" in error_of(run(checkpoint, tmp_path / "mlx", "-q", "--q-bits", 7))
    assert "do not divide into groups of 128" in error_of(
        run(checkpoint, tmp_path / "mlx", "-q", "--q-group-size", 128)
    )
    (checkpoint / "tokenizer.model").unlink()
    assert "tokenizer.model is missing" in error_of(run(checkpoint, tmp_path / "mlx"))
    whole = (checkpoint / "consolidated.00.pth").read_bytes()
    (checkpoint / "consolidated.00.pth").write_bytes(whole[:-5000])
    assert "is damaged" in error_of(run(checkpoint, tmp_path / "mlx"))
    assert not (tmp_path / "mlx").exists()


def test_a_failed_conversion_leaves_the_model_that_was_there(checkpoint, tmp_path):
    assert run(checkpoint, tmp_path / "mlx").returncode == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "mlx").iterdir()}
    assert run(checkpoint, tmp_path / "mlx", "-q", "--q-group-size", 128).returncode == 2
    assert {path.name: path.read_bytes() for path in (tmp_path / "mlx").iterdir()} == before
