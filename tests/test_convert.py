"""convert.py on small checkpoints in every layout, whole and damaged."""

import argparse
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from conftest import (
    MISTRAL_TOKENIZER,
    ROOT,
    TINY,
    call_script,
    script_in_forks,
    run_script,
    small_disk,
)

import convert
import lora
from models import Model, ModelArgs
from parts import model_folder
from parts.hugging_face import from_hugging_face, rename
from parts.torch_files import open_torch
from parts.module_names import TO_HUGGING_FACE, TO_META

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

WRITTEN = {"weights.npz", "params.json", "tokenizer.model"}  # of a SentencePiece model


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


def run(torch_path, mlx_path, *flags, by=call_script):
    """Run convert.py, in this process or, by `run_script`, in one of its own."""
    return by("convert.py", "--torch-path", torch_path, "--mlx-path", mlx_path, *flags)


def test_the_weights_are_the_checkpoints_in_float16_under_their_own_names(checkpoint, tmp_path):
    process = run(checkpoint, tmp_path / "mlx", by=run_script)
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
        "model_type": "llama",
        "max_position_embeddings": 4096,
        "bos_id": 1,
        "eos_ids": [2],
    }


def test_given_values_are_kept(tmp_path):
    given = {**META, "n_kv_heads": 2, "rope_theta": 1e6, "head_dim": 16, "vocab_size": 32000}
    folder = write_checkpoint(tmp_path / "torch", checkpoint_tensors(n_kv_heads=2), given)
    run(folder, tmp_path / "mlx")
    params = json.loads((tmp_path / "mlx" / "params.json").read_text())
    assert params["n_kv_heads"] == 2
    assert params["rope_theta"] == 1e6


def test_two_conversions_are_equal_byte_for_byte(checkpoint, tmp_path):
    for name, by in (("one", call_script), ("two", run_script)):
        process = run(checkpoint, tmp_path / name, "-q", "--q-group-size", 32, by=by)
        assert process.returncode == 0, process.stderr
    assert contents(tmp_path / "one").keys() == WRITTEN
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


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
    config = json.loads((tmp_path / "f16" / "params.json").read_text())
    args = argparse.Namespace(q_group_size=32, q_bits=8)
    arrays, _ = convert.quantize(dict(np.load(tmp_path / "f16" / "weights.npz")), config, args)
    stored = np.load(tmp_path / "q8" / "weights.npz")
    assert stored.files == list(arrays)
    for name, array in arrays.items():  # of float16; the checkpoint's bfloat16 gives the same
        assert stored[name].tobytes() == np.array(array).tobytes()
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


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_would_run_a_command_is_refused_and_does_not_run(
    checkpoint, tmp_path, legacy
):
    class Command:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'it-ran'}",)

    file = checkpoint / "consolidated.00.pth"
    torch.save({"norm.weight": Command()}, file, _use_new_zipfile_serialization=not legacy)
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
    assert "do not divide into groups of 128: give --q-group-size " in error_of(
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


# -------------------------------------------------------------------------------------------------
# Layouts


def shards(tensors: dict[str, torch.Tensor], n: int, embeddings_axis: int) -> list[dict]:
    """What each of `n` model-parallel ranks stores, as Meta's releases split it."""
    axes = {"wo": 1, "w2": 1, "tok_embeddings": embeddings_axis}
    files = [{} for _ in range(n)]
    for name, tensor in tensors.items():
        if tensor.ndim == 1:
            parts = [tensor] * n
        else:
            parts = tensor.chunk(n, axes.get(name.split(".")[-2], 0))
        for file, part in zip(files, parts, strict=True):
            file[name] = part.clone()
    return files


THEIR_NAMES = {  # transformers' names
    "tok_embeddings": "embed_tokens",
    "output": "lm_head",
    "attention": "self_attn",
    "wq": "q_proj",
    "wk": "k_proj",
    "wv": "v_proj",
    "wo": "o_proj",
    "feed_forward": "mlp",
    "w1": "gate_proj",
    "w2": "down_proj",
    "w3": "up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def hugging_face_model(folder) -> transformers.LlamaForCausalLM:
    """The checkpoint as transformers' Llama, written into a folder with sharded safetensors."""
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        vocab_size=32000,
        rope_theta=1e6,
        max_position_embeddings=16384,  # CodeLlama's, which rope_theta tells in Meta's layout
    )
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    state = {}
    for name, tensor in checkpoint_tensors(n_kv_heads=2).items():
        name = ".".join(THEIR_NAMES.get(part, part) for part in name.split("."))
        name = name if name.startswith("lm_head") else f"model.{name}"
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # pairs of rows become two halves
            heads = 4 if "q_proj" in name else 2
            tensor = tensor.reshape(heads, -1, 2, 64).transpose(1, 2).reshape(-1, 64)
        state[name] = tensor
    del state["model.rope.freqs"]
    model.load_state_dict(state)
    model.save_pretrained(folder, max_shard_size="3MB")
    shutil.copy(MISTRAL_TOKENIZER, folder / "tokenizer.model")
    return model


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hugging-face")
    return folder, hugging_face_model(folder)


GROUPED = {**META, "n_kv_heads": 2, "rope_theta": 1e6}


def write_shards(n: int, embeddings_axis: int):
    def write(folder):
        files = shards(checkpoint_tensors(n_kv_heads=2), n, embeddings_axis)
        write_checkpoint(folder, files[0], GROUPED)
        for i, file in enumerate(files):
            torch.save(file, folder / f"consolidated.{i:02}.pth")

    return write


def write_legacy(folder):
    tensors = checkpoint_tensors(n_kv_heads=2)
    write_checkpoint(folder, {}, GROUPED)
    file = folder / "consolidated.00.pth"  # as torch before 1.6 wrote it
    torch.save(tensors, file, _use_new_zipfile_serialization=False)


def write_safetensors(folder):
    write_checkpoint(folder, {}, GROUPED)
    (folder / "consolidated.00.pth").unlink()
    tensors = checkpoint_tensors(n_kv_heads=2)
    safetensors.torch.save_file(tensors, folder / "consolidated.safetensors")
    (folder / "tokenizer.model").rename(folder / "tokenizer.model.v3")


def write_hugging_face(folder):
    hugging_face_model(folder)
    assert len(list(folder.glob("model-*.safetensors"))) > 2


def write_pytorch_bin(folder):
    model = hugging_face_model(folder)
    for path in folder.glob("model*"):
        path.unlink()
    names = list(model.state_dict())
    for i in range(2):
        part = {name: model.state_dict()[name].clone() for name in names[i::2]}
        torch.save(part, folder / f"pytorch_model-{i + 1:05}-of-00002.bin")


@pytest.mark.parametrize(
    "write",
    [
        write_shards(2, 0),
        write_shards(2, 1),
        write_legacy,
        write_safetensors,
        write_hugging_face,
        write_pytorch_bin,
    ],
)
def test_every_layout_of_one_model_gives_the_same_bytes(write, tmp_path):
    write_checkpoint(tmp_path / "one", checkpoint_tensors(n_kv_heads=2), GROUPED)
    write(tmp_path / "other")
    for name in ("one", "other"):
        process = run(tmp_path / name, tmp_path / f"{name}-mlx")
        assert process.returncode == 0, process.stderr
    assert contents(tmp_path / "one-mlx") == contents(tmp_path / "other-mlx")


def test_other_files_of_the_folder_are_no_part_of_the_model(hugging_face, tmp_path):
    write_checkpoint(tmp_path / "meta", checkpoint_tensors(), META)
    assert run(tmp_path / "meta", tmp_path / "meta-mlx").returncode == 0
    other = {name: tensor + 1 for name, tensor in checkpoint_tensors().items()}
    torch.save(other, tmp_path / "meta" / "consolidated.00.bak.pth")
    assert run(tmp_path / "meta", tmp_path / "meta-again").returncode == 0
    assert contents(tmp_path / "meta-again") == contents(tmp_path / "meta-mlx")

    folder = shutil.copytree(hugging_face[0], tmp_path / "hf")
    assert run(folder, tmp_path / "hf-mlx").returncode == 0
    tensors = {}
    for path in folder.glob("model-*.safetensors"):
        tensors.update(safetensors.torch.load_file(path))
    stale = {name: tensor + 1 for name, tensor in tensors.items()}
    safetensors.torch.save_file(stale, folder / "model-0-old.safetensors")  # the index knows it not
    assert run(folder, tmp_path / "hf-again").returncode == 0
    assert contents(tmp_path / "hf-again") == contents(tmp_path / "hf-mlx")

    (folder / "model.safetensors.index.json").rename(tmp_path / "index.json")
    assert "is in more than one file" in error_of(run(folder, tmp_path / "none"))

    safetensors.torch.save_file(tensors, folder / "model.safetensors")  # which stands for itself
    assert run(folder, tmp_path / "hf-whole").returncode == 0
    assert contents(tmp_path / "hf-whole") == contents(tmp_path / "hf-mlx")


def test_parameters_are_tensors(checkpoint, tmp_path):
    assert run(checkpoint, tmp_path / "one").returncode == 0
    parameters = {name: torch.nn.Parameter(t) for name, t in checkpoint_tensors().items()}
    torch.save(parameters, checkpoint / "consolidated.00.pth")
    assert run(checkpoint, tmp_path / "two").returncode == 0
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_the_logits_are_those_of_transformers_on_the_same_folder(hugging_face, tmp_path):
    folder, reference = hugging_face
    assert run(folder, tmp_path / "mlx").returncode == 0
    model, _ = lora.load_model(tmp_path / "mlx", mx.float32)
    tokens = np.random.default_rng(0).integers(0, 32000, (2, 33))
    with torch.no_grad():
        expected = reference.to(torch.float32)(torch.tensor(tokens)).logits.numpy()
    reference.to(torch.bfloat16)
    np.testing.assert_allclose(np.array(model(mx.array(tokens))[0]), expected, atol=1e-3)


def test_the_names_are_those_of_transformers_and_back_again(hugging_face):
    ours = {name for name, _ in tree_flatten(Model(ModelArgs(**TINY)).parameters())}
    theirs = {rename(name, TO_HUGGING_FACE) for name in ours}
    assert theirs == set(hugging_face[1].state_dict())
    assert {rename(name, TO_META) for name in theirs} == ours


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}, "Mamba"),
        ({"model_type": "t5", "architectures": ["T5Model"]}, "the architecture t5"),
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM"),
        ({"d_model": 768, "n_layer": 24}, "that it does not name"),
    ],
)
def test_another_architecture_is_named(config, name):
    with pytest.raises(ValueError, match=f"config.json: .*{name}.* is not supported: take"):
        from_hugging_face(config, {})


def test_mistrals_mamba_is_named(checkpoint, tmp_path):
    mamba = {"dim": 64, "n_layers": 3, "vocab_size": 32000, "model_type": "mamba"}
    (checkpoint / "params.json").write_text(json.dumps(mamba))
    assert "params.json: the architecture mamba is not" in error_of(
        run(checkpoint, tmp_path / "mlx")
    )


def test_integers_are_no_weights(checkpoint, tmp_path):
    tensors = checkpoint_tensors()
    tensors["layers.1.attention.wo.weight"] = tensors["layers.1.attention.wo.weight"].to(torch.int8)
    torch.save(tensors, checkpoint / "consolidated.00.pth")
    error = error_of(run(checkpoint, tmp_path / "mlx"))
    assert "layers.1.attention.wo.weight cannot be read (its values are int8" in error


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    tensors = checkpoint_tensors()
    for name in ("tok_embeddings.weight", "output.weight"):
        tensors[name] = tensors[name][:1000].clone()
    folder = write_checkpoint(tmp_path / "torch", tensors, {**META, "vocab_size": 1000})
    error = error_of(run(folder, tmp_path / "mlx"))
    assert "has 32000 tokens, the model 1000: it is of another" in error


def test_params_that_no_machine_could_hold_are_one_line(checkpoint, tmp_path):
    (checkpoint / "params.json").write_text(json.dumps({**META, "head_dim": 2 * 10**9}))
    assert "params.json: " in error_of(run(checkpoint, tmp_path / "mlx"))


def test_a_byte_order_mark_is_no_part_of_the_params(checkpoint, tmp_path):
    params = checkpoint / "params.json"
    params.write_text(params.read_text(), encoding="utf-8-sig")
    assert run(checkpoint, tmp_path / "mlx").returncode == 0


# -------------------------------------------------------------------------------------------------
# Faults


def test_a_part_that_is_missing_is_named(tmp_path):
    write_shards(4, 0)(tmp_path / "shards")
    (tmp_path / "shards" / "consolidated.01.pth").unlink()
    says = error_of(run(tmp_path / "shards", tmp_path / "mlx"))
    assert "consolidated.01.pth is missing" in says
    write_hugging_face(tmp_path / "hf")
    lost = sorted((tmp_path / "hf").glob("model-*.safetensors"))[-1]
    lost.unlink()
    assert f"{lost.name} is missing" in error_of(run(tmp_path / "hf", tmp_path / "mlx"))
    (tmp_path / "hf" / "model.safetensors.index.json").write_text('{"weight_map": {"norm": 1}}')
    says = error_of(run(tmp_path / "hf", tmp_path / "mlx"))
    assert "index.json does not name the file of each tensor" in says
    write_shards(4, 0)(tmp_path / "shards")
    (tmp_path / "shards" / "consolidated.03.pth").unlink()  # the last: only the shapes can tell
    says = error_of(run(tmp_path / "shards", tmp_path / "mlx"))
    assert "consolidated.03.pth is missing: of the model's 4 parts, the folder has 3" in says
    (tmp_path / "hf" / "model.safetensors.index.json").unlink()  # and then the names tell
    assert f"{lost.name} is missing" in error_of(run(tmp_path / "hf", tmp_path / "mlx"))


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("write", [write_shards(1, 0), write_safetensors, write_pytorch_bin])
def test_a_truncated_file_is_named(write, keep, tmp_path):
    write(tmp_path / "cut")
    patterns = ("consolidated*", "pytorch_model*")
    path = next(path for pattern in patterns for path in (tmp_path / "cut").glob(pattern))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole))])
    assert f"{path.name} is damaged" in error_of(run(tmp_path / "cut", tmp_path / "mlx"))
    assert not (tmp_path / "mlx").exists()


@pytest.mark.parametrize("keep", [0.001, 0.9])
def test_a_truncated_file_of_an_old_torch_is_named(keep, tmp_path):
    write_legacy(tmp_path / "cut")
    file = tmp_path / "cut" / "consolidated.00.pth"
    file.write_bytes(file.read_bytes()[: int(keep * file.stat().st_size)])
    assert f"{file.name} is damaged" in error_of(run(tmp_path / "cut", tmp_path / "mlx"))


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("existing", [False, True])
def test_kills_leave_a_whole_model_or_none(checkpoint, tmp_path, existing):
    """Ten kills at random moments: over a model that is there, and where none is."""
    assert run(checkpoint, tmp_path / "old", "-q", "--q-group-size", 32).returncode == 0
    assert run(checkpoint, tmp_path / "new").returncode == 0
    old, new = contents(tmp_path / "old"), contents(tmp_path / "new")
    target = tmp_path / "target"
    flags = "--torch-path", checkpoint, "--mlx-path", target
    with script_in_forks("convert", *flags) as convert_once:
        seconds = convert_once()
        assert contents(target) == new
        rng = np.random.default_rng(existing)
        for moment in rng.uniform(0, 1.1, 10) * seconds:
            shutil.rmtree(target, ignore_errors=True)
            if existing:
                shutil.copytree(tmp_path / "old", target)
            convert_once(moment)
            if existing or target.exists():
                left = contents(target)
                # While files replace others, params.json is away: no model, but whole files.
                is_replacing = existing and "params.json" not in left
                whole_files = old.items() | new.items()
                assert left in (old, new) or (is_replacing and left.items() <= whole_files)
    assert run(checkpoint, target).returncode == 0
    assert contents(target) == new
    assert not list(tmp_path.glob("*.unfinished")) and not list(target.glob("unfinished"))


def test_another_models_folder_is_left_alone(checkpoint, tmp_path):
    assert run(checkpoint, tmp_path / "ours").returncode == 0
    ours = contents(tmp_path / "ours")
    theirs = {
        "meta": {"consolidated.00.pth": b"weights", "params.json": b"{}"},
        "hugging-face": {"config.json": b"{}", "tokenizer.model": b"pieces"},
        "mixed": {**ours, "model.safetensors": b"weights"},
        "mlx-examples": {**ours, "params.json": b'{"dim": 64, "n_layers": 3}'},
        "arrays": {"weights.npz": b"no archive"},
        "words": {"tokenizer.model": b"somebody's"},
    }
    for name, files in theirs.items():
        folder = tmp_path / name
        folder.mkdir()
        for file, content in files.items():
            (folder / file).write_bytes(content)
        with pytest.raises(ValueError, match=f"--mlx-path {folder} .*: name another"):
            model_folder.check_replaceable(folder)
    assert "is another model's, with config.json" in error_of(
        run(checkpoint, tmp_path / "hugging-face")
    )
    assert contents(tmp_path / "hugging-face") == theirs["hugging-face"]


def test_a_killed_runs_model_and_a_folder_of_other_things_are_written_into(checkpoint, tmp_path):
    assert run(checkpoint, tmp_path / "mlx").returncode == 0
    whole = contents(tmp_path / "mlx")
    (tmp_path / "mlx" / "params.json").unlink()  # as a kill leaves it
    (tmp_path / "mlx" / "notes.txt").write_text("mine")
    assert run(checkpoint, tmp_path / "mlx").returncode == 0
    assert contents(tmp_path / "mlx") == {**whole, "notes.txt": b"mine"}


def test_the_checkpoints_folder_is_known_by_any_spelling(checkpoint, tmp_path):
    """A mount gives it another path, as another case does where the file system ignores it."""
    (tmp_path / "TORCH").mkdir()
    mount = f"mount --bind {checkpoint} {tmp_path / 'TORCH'} && exec "
    paths = f"--torch-path {checkpoint} --mlx-path {tmp_path / 'TORCH'}"
    command = f"{mount} {sys.executable} {ROOT / 'convert.py'} {paths}"
    process = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", command],
        capture_output=True,
        encoding="utf-8",
    )
    if process.returncode != 2 or "convert.py" not in process.stderr:
        pytest.skip(f"nothing can be mounted here: {process.stderr.strip()}")
    assert "is the checkpoint's own folder" in error_of(process)


def test_one_tensor_of_an_old_file_is_in_memory_at_a_time(tmp_path):
    tensors = {str(i): torch.full((1024, 1024), float(i)) for i in range(8)}
    tensors["view"] = tensors["7"].T[3:5]
    torch.save(tensors, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    tracemalloc.start()
    opened = open_torch(tmp_path / "old.pth")
    for name, stored in opened.items():
        assert stored.shape == tensors[name].shape
        assert torch.equal(torch.from_numpy(stored.read()), tensors[name])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert opened.keys() == tensors.keys()
    assert peak < 1.5 * tensors["0"].nbytes


def test_a_folder_that_is_none_of_ours_is_left_alone(checkpoint, tmp_path):
    staged = checkpoint.rename(tmp_path / "mlx.unfinished")
    before = contents(staged)
    assert "mlx.unfinished is in the way" in error_of(run(staged, tmp_path / "mlx"))
    assert contents(staged) == before


@pytest.mark.parametrize("existing", [False, True])
def test_two_at_a_time_do_not_write_into_one_folder(checkpoint, tmp_path, existing):
    target = tmp_path / "mlx"
    staged = target / "unfinished" if existing else tmp_path / "mlx.unfinished"
    staged.mkdir(parents=True)
    first = os.open(staged, os.O_RDONLY)
    fcntl.flock(first, fcntl.LOCK_EX)
    assert "another convert.py writes into" in error_of(run(checkpoint, target))
    assert list(staged.iterdir()) == []
    os.close(first)
    assert run(checkpoint, target).returncode == 0
    assert contents(target).keys() == WRITTEN


def test_names_that_the_terminal_lacks_are_printed_with_question_marks(checkpoint, tmp_path):
    flags = "--torch-path", checkpoint, "--mlx-path", tmp_path / "é"
    process = run_script("convert.py", *flags, PYTHONIOENCODING="ascii")
    assert process.returncode == 0, process.stderr
    assert "/?, " in process.stdout


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_leave_nothing_behind(tmp_path, number, status):
    big = {**checkpoint_tensors(), "tok_embeddings.weight": torch.ones(32000, 64)}
    checkpoint = write_checkpoint(tmp_path / "torch", big, META)
    command = [sys.executable, ROOT / "convert.py", "--torch-path", checkpoint, "-q"]
    process = subprocess.Popen(
        [*command, "--q-group-size", "32", "--mlx-path", tmp_path / "mlx"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    while process.poll() is None and not (tmp_path / "mlx.unfinished").exists():
        time.sleep(0.001)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert b"Traceback" not in errors
    assert process.returncode in (status, 0)  # 0: it was done before the signal came
    names = {"torch"} if process.returncode else {"torch", "mlx"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_a_full_disk_is_status_1_and_leaves_nothing(checkpoint, tmp_path):
    """A real file system: too small from the start, and one that shrinks while it is written."""
    disk = tmp_path / "disk"
    with small_disk(disk, "6m"):
        assert "are free on the disk" in error_of(
            run(checkpoint, disk / "mlx", by=run_script), status=1
        )
        assert "are free on the disk" in error_of(run(checkpoint, disk), status=1)
        assert list(disk.iterdir()) == []
    limited = f"ulimit -f 4096; exec {sys.executable} {ROOT / 'convert.py'} --torch-path torch"
    process = subprocess.run(
        ["bash", "-c", f"trap '' XFSZ; {limited} --mlx-path mlx"],
        cwd=tmp_path,
        capture_output=True,
        encoding="utf-8",
    )
    assert "File too large" in error_of(process, status=1)
    assert {path.name for path in tmp_path.iterdir()} == {"torch", "disk"}


def test_a_value_that_float16_cannot_hold_is_refused_whatever_its_place(checkpoint, tmp_path):
    tensors = checkpoint_tensors()
    tensors["layers.1.feed_forward.w2.weight"][17, 31] = 70000.0  # finite in bfloat16
    write_checkpoint(checkpoint, tensors, META)
    says = error_of(run(checkpoint, tmp_path / "mlx"))
    assert "layers.1.feed_forward.w2.weight holds values that are not finite in float16" in says
    assert [path.name for path in tmp_path.iterdir()] == ["torch"]


def test_an_empty_tokenizer_is_named(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    (folder / "tokenizer.model").write_bytes(b"")
    process = run_script("convert.py", "--torch-path", folder, "--mlx-path", tmp_path / "mlx")
    assert process.returncode == 2
    assert f"{folder / 'tokenizer.model'} is empty: download it again" in process.stderr


@pytest.mark.parametrize("name", ["weights.npz", "params.json"])
def test_what_is_no_file_is_not_replaced_nor_waited_for(checkpoint, tmp_path, name):
    (tmp_path / "mlx").mkdir()
    os.mkfifo(tmp_path / "mlx" / name)
    process = run_script("convert.py", "--torch-path", checkpoint, "--mlx-path", tmp_path / "mlx")
    assert process.returncode == 2
    assert f"holds a {name} that convert.py did not make" in process.stderr
