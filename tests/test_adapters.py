"""The adapter file and what it adapts: projections, rank, scale, dropout."""

import io
import json
import re
import zipfile

import numpy as np
import pytest
from conftest import QUICK, call_script, write_quick_model

from parts import adapters, device, dropout
from parts.adapters import PROJECTIONS
from parts.decoder import Decoder

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten

import lora
from models import LoRALinear, Model, ModelArgs, add_lora, quantizable

SMALL = {**QUICK, "vocab_size": 300, "n_layers": 2}
ALL = list(PROJECTIONS)
COMBINATIONS = [["wq"], ["wk", "w3"], ["wv", "wo", "w1"], ["w2"], ["w1", "w2", "w3"], ALL]


def small_model(bits: int = 16) -> Model:
    mx.random.seed(3)
    model = Model(ModelArgs(**SMALL))
    if bits < 16:
        nn.quantize(model, 32, bits, class_predicate=quantizable)
    return model


def fill(model: Model) -> Model:
    """Give every lora_b random values, so that all adapters count."""
    for i, module in enumerate(m for m in model.modules() if "lora_a" in m):
        module.lora_b = mx.random.normal(module.lora_b.shape, key=mx.random.key(i)) * 0.1
    return model


def content_of(model: Model) -> bytes:
    """What training would write."""
    file = io.BytesIO()
    matrices = adapters.to_numpy(model.trainable_parameters())
    adapters.write_adapter(file, matrices, adapters.scale_of(model))
    return file.getvalue()


def logits_of(model: Model) -> np.ndarray:
    return np.array(model(mx.array([[1, 5, 9, 3, 7]]))[0])


# -------------------------------------------------------------------------------------------------
# The file


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("projections", COMBINATIONS, ids=" ".join)
def test_a_file_says_by_itself_what_it_adapts(projections, bits, tmp_path):
    model = small_model(bits)
    add_lora(model, [1], projections, rank=3, scale=4.0)
    expected = logits_of(fill(model))
    file = tmp_path / "adapters.npz"
    file.write_bytes(content_of(model))

    with np.load(file) as archive:
        matrices = dict(archive)
    assert {name.split(".")[-2] for name in matrices} == set(projections)
    assert len(matrices) == 2 * len(projections)
    assert all(m.dtype == np.float32 and 3 in m.shape for m in matrices.values())
    assert mx.load(str(file)).keys() == matrices.keys()
    assert json.loads(zipfile.ZipFile(file).comment) == {"scale": 4.0}

    loaded = small_model(bits)
    lora.load_adapter(loaded, file)
    np.testing.assert_array_equal(logits_of(loaded), expected)
    names = {name for name, _ in tree_flatten(loaded.trainable_parameters())}
    assert names == matrices.keys()
    assert content_of(loaded) == file.read_bytes()


def test_a_file_of_the_usual_scale_is_what_numpy_writes_and_such_files_load(tmp_path):
    model = small_model()
    add_lora(model, [0, 1])
    matrices = adapters.to_numpy(fill(model).trainable_parameters())
    np.savez(tmp_path / "adapters.npz", **matrices)
    assert content_of(model) == (tmp_path / "adapters.npz").read_bytes()
    loaded = small_model()
    lora.load_adapter(loaded, tmp_path / "adapters.npz")
    assert adapters.scale_of(loaded) == 2.0
    np.testing.assert_array_equal(logits_of(loaded), logits_of(model))


def test_layers_may_differ_in_projections_and_rank(tmp_path):
    model = small_model()
    add_lora(model, [0], ["wq", "w2"], rank=2)
    add_lora(model, [1], ["wq"], rank=2)
    add_lora(model, [1], ["wo", "w3"], rank=5)
    (tmp_path / "adapters.npz").write_bytes(content_of(fill(model)))
    loaded = small_model()
    lora.load_adapter(loaded, tmp_path / "adapters.npz")
    np.testing.assert_array_equal(logits_of(loaded), logits_of(model))
    assert adapters.describe_lora(loaded) == "rank 2 and 5 in wq wo w2 w3 of 2 of 2 layers"


@pytest.mark.parametrize(
    ("shapes", "comment", "says"),
    [
        ({"attention.wx.lora_a": (64, 8)}, b"", "wx.lora_a, which is no LoRA matrix of wq, wk, wv"),
        ({"feed_forward.wq.lora_a": (64, 8)}, b"", "wq.lora_a, which is no LoRA matrix"),
        ({"attention.wk.lora_a": (64, 8)}, b"", "lacks layers.1.attention.wk.lora_b"),
        ({"attention.wk.lora_b": (8, 32)}, b"", "lacks layers.1.attention.wk.lora_a"),
        ({"attention.wk.lora_a": (64, 0), "attention.wk.lora_b": (0, 32)}, b"", "is empty"),
        ({"feed_forward.w1.lora_a": (64, 8), "feed_forward.w1.lora_b": (4, 96)}, b"", "(8, 96)"),
        ({"feed_forward.w2.lora_a": (96, 2), "feed_forward.w2.lora_b": (2, 64)},
         b'{"scale": "2"}', "the scale in a.npz is '2', and not a number above 0"),
        ({"feed_forward.w2.lora_a": (96, 2), "feed_forward.w2.lora_b": (2, 64)},
         b'{"scale": -1}', "the scale in a.npz is -1"),
        ({"feed_forward.w2.lora_a": (96, 2), "feed_forward.w2.lora_b": (2, 64)},
         b'{"scale": 1' + b"0" * 400 + b"}", "0000, and not a number above 0 and up to 10000"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(shapes, comment, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("a.npz", **{f"layers.1.{n}": np.ones(s, np.float32) for n, s in shapes.items()})
    with zipfile.ZipFile("a.npz", "a") as archive:
        archive.comment = comment
    with pytest.raises(ValueError, match=re.escape(says)):
        lora.load_adapter(small_model(), "a.npz")


def test_words_of_other_tools_in_the_archive_are_passed_over(tmp_path):
    for comment in (b"made by a tool", b"[1]", b'{"by": "a tool"}', b"\xff"):
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
            archive.comment = comment
        assert adapters.parse_scale((tmp_path / "a.npz").read_bytes(), "a.npz") == 2.0


# -------------------------------------------------------------------------------------------------
# Layers


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("projections", COMBINATIONS, ids=" ".join)
def test_a_decoder_gives_the_logits_of_the_model_whatever_is_adapted(projections, bits):
    model = small_model(bits)
    add_lora(model, [1], projections, rank=3, scale=3.0)
    expected = logits_of(fill(model))
    decoder = Decoder(model.eval())
    for i, token in enumerate([1, 5, 9, 3, 7]):
        logits = decoder(mx.array([[token]]))
        np.testing.assert_allclose(logits[0], expected[0, i], atol=1e-4, rtol=0)


def test_the_scale_is_the_factor_itself_whatever_the_rank():
    layer = LoRALinear.from_linear(nn.Linear(64, 32, bias=False), rank=5, scale=0.5)
    layer.lora_b = mx.random.normal((5, 32))
    x = mx.random.normal((3, 64))
    expected = layer.linear(x) + 0.5 * (x @ layer.lora_a @ layer.lora_b)
    np.testing.assert_allclose(layer(x), expected, atol=1e-5)


# -------------------------------------------------------------------------------------------------
# Dropout


def test_what_is_kept_is_scaled_so_that_the_mean_stays():
    keys = mx.random.split(mx.array([0, 1], mx.uint32), 4)
    x = mx.ones((4, 100, 200))
    y = np.array(dropout.drop(x, 0.25, keys))
    assert set(np.unique(y)) == {0, np.float32(1 / 0.75)}
    assert y.mean() == pytest.approx(1, abs=0.01)  # 6 standard deviations
    for i in range(4):  # a row's mask is its key's alone, and no other row's
        np.testing.assert_array_equal(dropout.drop(x[i : i + 1], 0.25, keys[i : i + 1])[0], y[i])
        assert (y[i] != y[i - 1]).mean() == pytest.approx(2 * 0.25 * 0.75, abs=0.03)
    assert dropout.drop(x.astype(mx.bfloat16), 0.25, keys).dtype == mx.bfloat16


def dropout_step(n_streams: int, grad_checkpoint: bool = False) -> dict[str, np.ndarray]:
    """The matrices after two steps with dropout, at a rate that shows what the gradients are."""
    model = small_model()
    add_lora(model, [0, 1], ALL, rank=2, dropout=0.5)
    fill(model).train()
    model.grad_checkpoint = grad_checkpoint
    step = lora.make_step(model, optim.SGD(0.5), lora.loss, device.open_streams(n_streams))
    tokens = mx.array(np.random.default_rng(0).integers(0, 300, (4, 9)))
    batch = tokens[:, :-1], tokens[:, 1:], mx.array([8, 8, 5, 8])
    for with_keys in dropout.add_keys(iter([batch, batch]), 0.5, seed=1, done=0):
        step(*with_keys)
    return adapters.to_numpy(model.trainable_parameters())


def test_masks_are_the_same_however_rows_are_split_and_in_layers_computed_again(monkeypatch):
    once = dropout_step(1)
    others = [dropout_step(4), dropout_step(1, grad_checkpoint=True)]
    with monkeypatch.context() as patch:
        patch.setattr(device, "ON_CPU", False)  # a GPU computes more than once, too
        mx.disable_compile()
        others.append(dropout_step(1))
        mx.enable_compile()
    for other in others:
        for name, value in once.items():
            np.testing.assert_allclose(other[name], value, atol=1e-5, err_msg=name)
    again = dropout_step(1)
    assert all(np.array_equal(again[name], value) for name, value in once.items())


def test_gradients_are_those_of_the_masked_inputs_and_each_batch_has_masks_of_its_own():
    layer = LoRALinear.from_linear(nn.Linear(8, 4, bias=False), rank=2, scale=3.0, dropout=0.5)
    layer.lora_b = mx.random.normal((2, 4))
    x, upstream = mx.random.normal((2, 3, 8)), mx.random.normal((2, 3, 4))
    blank = mx.zeros((2, 1), mx.int32)
    masks = []
    for *_, keys in dropout.add_keys(iter([(blank,)] * 2), 0.5, seed=1, done=0):
        layer._keys = keys
        seen = np.array(dropout.drop(x, 0.5, keys))
        gradient = mx.grad(lambda a: ((layer.update({"lora_a": a})(x)) * upstream).sum())(
            layer.lora_a
        )
        of_hidden = 3 * np.array(upstream).reshape(6, 4) @ np.array(layer.lora_b).T
        np.testing.assert_allclose(gradient, seen.reshape(6, 8).T @ of_hidden, atol=1e-4)
        masks.append(seen != 0)
    assert (masks[0] != masks[1]).any()


# -------------------------------------------------------------------------------------------------
# The script


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """A model of three layers in 4 bits, with few tokens."""
    mx.random.seed(7)
    model = Model(ModelArgs(**QUICK))
    nn.quantize(model, 32, 4, class_predicate=quantizable)
    quantization = {"group_size": 32, "bits": 4}
    return write_quick_model(tmp_path_factory.mktemp("q4"), model, quantization=quantization)


def train(model, data, adapter, iters, *flags):
    return call_script(
        "lora.py", "--model", model, "--data", data, "--train", "--adapter-file", adapter,
        "--iters", iters, "--learning-rate", "1e-2", "--val-batches", 1, "--lora-layers", 2,
        "--lora-projections", "w1", "all", "--lora-rank", 3, "--lora-scale", 4,
        "--lora-dropout", 0.3, *flags,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(quantized, data, tmp_path_factory):
    """QLoRA of all projections, with dropout: the process and its adapter file."""
    adapter = tmp_path_factory.mktemp("trained") / "adapters.npz"
    process = train(quantized, data, adapter, 6)
    assert process.returncode == 0, process.stderr
    return process, adapter


def test_a_training_says_and_writes_what_it_adapts(trained):
    process, adapter = trained
    assert "LoRA of rank 3 times 4 in wq wk wv wo w1 w2 w3 of 2 of 3 layers" in process.stdout
    # Inputs and outputs: wq, wo 64 and 64; wk, wv 64 and 32; w1, w2, w3 64 and 96.
    n_trainable = 2 * 3 * (2 * 128 + 2 * 96 + 3 * 160)
    assert f"Trainable parameters {n_trainable / 1e6:.3f}M" in process.stdout
    with np.load(adapter) as archive:
        assert len(archive.files) == 2 * 2 * 7
        assert sum(archive[name].size for name in archive.files) == n_trainable
    for file in (adapter, adapter.with_suffix(".best.npz")):
        assert adapters.parse_scale(file.read_bytes(), file) == 4.0


def test_a_run_from_adapters_alone_keeps_what_they_adapt_and_says_so(
    quantized, data, trained, tmp_path
):
    adapter = tmp_path / "alone.npz"
    adapter.write_bytes(trained[1].read_bytes())
    resumed = "--resume-adapter-file", adapter
    process = train(quantized, data, tmp_path / "same.npz", 1, *resumed)
    assert "decides what is adapted" not in process.stderr
    process = train(quantized, data, tmp_path / "new.npz", 1, *resumed, "--lora-rank", 8)
    assert f"{adapter} decides what is adapted, rather than --lora-projections" in process.stderr
    assert ": rank 3 times 4 in wq wk wv wo w1 w2 w3 of 2 of 3 layers" in process.stderr
    for name in ("same.npz", "new.npz"):
        content = (tmp_path / name).read_bytes()
        assert adapters.parse_scale(content, name) == 4.0
        assert adapters.parse_adapter(content, name).keys() == dict(np.load(adapter)).keys()


def test_a_resumed_run_with_dropout_ends_as_one_never_interrupted(
    quantized, data, trained, tmp_path
):
    adapter = tmp_path / "adapters.npz"
    assert train(quantized, data, adapter, 4).returncode == 0
    process = train(quantized, data, adapter, 6, "--resume-adapter-file", adapter)
    assert "The run resumes after iteration 4" in process.stdout
    assert adapter.read_bytes() == trained[1].read_bytes()


def test_nothing_is_dropped_in_evaluation(quantized, data, trained, tmp_path):
    """The last validation is that of the file, which knows no dropout, loaded on its own."""
    log = trained[1].with_suffix(".log.jsonl").read_text().splitlines()
    val_loss = [entry["val_loss"] for entry in map(json.loads, log) if entry["val_loss"]][-1]
    model, tokenizer = lora.load_model(quantized)
    lora.load_adapter(model, trained[1])
    val_set = lora.Dataset(data / "valid.jsonl")
    expected = lora.evaluate(model, val_set, lora.loss, tokenizer, 4, 1)
    assert val_loss == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--lora-projections", "wv", "w2"], "--lora-projections"),
        (["--lora-rank", "4"], "--lora-rank is not that of the run in"),
        (["--lora-scale", "2"], "--lora-scale is not that of the run in"),
        (["--lora-dropout", "0"], "(0.3 then)"),
    ],
)
def test_a_run_is_not_resumed_with_other_settings(quantized, data, trained, flags, says):
    before = trained[1].read_bytes()
    resumed = "--resume-adapter-file", trained[1], *flags
    process = train(quantized, data, trained[1], 8, *resumed)
    assert process.returncode == 2
    assert says in process.stderr.splitlines()[-1]
    assert trained[1].read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--lora-projections", "wq", "wx"], "--lora-projections: invalid choice: 'wx'"),
        (["--lora-projections"], "--lora-projections: expected at least one argument"),
        (["--lora-rank", "0"], "--lora-rank: '0' is not a whole number from 1 to 4096"),
        (["--lora-scale", "inf"], "--lora-scale: 'inf' is not a number above 0"),
        (["--lora-dropout", "1"], "--lora-dropout: '1' is not a number from 0 to below 1"),
    ],
)
def test_a_mistake_in_a_flag_is_named(flags, says):
    process = call_script("lora.py", "--train", *flags)
    assert process.returncode == 2
    assert says in process.stderr
    assert len(process.stderr.splitlines()) == 1


def test_projections_are_put_in_order():
    parse = lora.build_parser().parse_args
    assert parse([]).lora_projections == ["wq", "wv"]
    assert parse(["--lora-projections", "w3", "wq", "wq"]).lora_projections == ["wq", "w3"]
    assert parse(["--lora-projections", "all"]).lora_projections == ALL
