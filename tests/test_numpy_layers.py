"""A training step of a CPU in NumPy (parts/numpy_layers.py, parts/numpy_training.py) next to the
network's own code and MLX's gradients of it.
"""

import numpy as np
import pytest
from conftest import TINY

from parts import device, numpy_layers, numpy_training, sgemm  # before MLX, for its BLAS
from parts.adapters import PROJECTIONS, to_vector
from parts.batches import pad_batch
from parts.packing import pack_batch
from parts.ranks import SINGLE
from parts.separate_layers import SeparateLayers

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

import lora
from models import Model, ModelArgs, add_lora, quantizable

ALL = list(PROJECTIONS)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch):
    """A machine with a GPU computes as one without; streams are of a CPU."""
    monkeypatch.setattr(device, "ON_CPU", True)
    if mx.default_device() != mx.Device(mx.cpu):
        pytest.skip("MLX computes on a GPU here")


def make_model(
    projections: list[str], layers: tuple[int, ...] = (1, 2), dropout: float = 0.0, **config
) -> Model:
    """A tiny model in training; nothing in it is zero or one."""
    mx.random.seed(3)
    model = Model(ModelArgs(**{**TINY, "vocab_size": 50, **config}))
    add_lora(model, layers, projections, rank=4, scale=1.5, dropout=dropout)
    model.update(tree_map(lambda p: p + 0.1 * mx.random.normal(p.shape), model.parameters()))
    return model.train()


def make_batch(length: int, kind: str = "padded") -> tuple[mx.array, ...]:
    """Two rows of random tokens, one with padding or with two texts; in the second kind most of the
    tokens do not count.
    """
    rng, short = np.random.default_rng(4), length // 3
    ids = [rng.integers(0, 50, n + 1).astype(np.int32) for n in (length, short, length - short)]
    if kind == "packed":
        return pack_batch([ids[:1], ids[1:]], length)
    if kind == "masked":
        for row in ids:
            row[: len(row) * 3 // 4] = ~row[: len(row) * 3 // 4]
    return pad_batch(ids[:2], length, masked=kind == "masked")


def check(model: Model, batch: tuple[mx.array, ...]) -> None:
    """Compare loss, tokens and gradients with those of the network."""
    vector = to_vector(model.trainable_parameters())
    assert numpy_training.fits(model)
    results = numpy_training.NumpyLayers(model, lora.loss).value_and_grad(vector, *batch)
    expected = SeparateLayers(model, lora.loss).value_and_grad(vector, *batch)
    assert results[0][1].item() == expected[0][1].item()
    assert results[0][0].item() == pytest.approx(expected[0][0].item(), abs=1e-5)
    gradient, scale = np.array(expected[1]), abs(np.array(expected[1])).max()
    np.testing.assert_allclose(np.array(results[1]), gradient, atol=1e-5 * scale, rtol=0)


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_gradients_are_those_of_the_network(n_kv_heads):
    check(make_model(ALL, n_kv_heads=n_kv_heads), make_batch(40))


@pytest.mark.parametrize("projection", ALL)
def test_gradients_of_each_projection_alone(projection):
    check(make_model([projection]), make_batch(20))


@pytest.mark.parametrize("kind", ["padded", "packed"])
@pytest.mark.parametrize("window", [None, 24])
def test_gradients_of_several_blocks_of_queries(monkeypatch, window, kind):
    monkeypatch.setattr(numpy_layers, "QUERY_BLOCK", 16)
    check(make_model(["wk", "w1"], sliding_window=window), make_batch(72, kind))


def test_gradients_with_biases_and_scaled_rotations():
    model = make_model(["wq", "wv"], (0, 2), attention_bias=True, rope_scaling=YARN)
    check(model, make_batch(40))


def test_gradients_where_few_tokens_count_and_the_embedding_is_the_output():
    batch = make_batch(40, "masked")
    assert len(batch) == 4
    check(make_model(["wo", "w2"], tie_word_embeddings=True), batch)


def test_gradients_without_a_fast_blas(monkeypatch):
    monkeypatch.setattr(sgemm, "SGEMM", None)
    check(make_model(ALL), make_batch(20))


@pytest.mark.parametrize("has_blas", [True, False])
def test_gradients_from_bfloat16_are_near_those_of_float32(monkeypatch, has_blas):
    monkeypatch.setattr(device, "fast_dtypes", lambda: {mx.float32, mx.bfloat16})
    if not has_blas:
        monkeypatch.setattr(sgemm, "SGEMM", None)
        monkeypatch.setattr(sgemm, "BFLOAT16_GEMM", None)
    model, batch = make_model(ALL), make_batch(40)
    model.set_dtype(mx.bfloat16)
    vector = to_vector(model.trainable_parameters()).astype(mx.float32)
    assert numpy_training.fits(model)
    layers = numpy_training.NumpyLayers(model, lora.loss)
    assert layers.layers[0].linears[0].weight.dtype == np.uint16
    (value, _), gradient = layers.value_and_grad(vector, *batch)
    model.set_dtype(mx.float32)
    (expected, _), exact = SeparateLayers(model, lora.loss).value_and_grad(vector, *batch)
    gradient, exact = np.array(gradient), np.array(exact)
    assert value.item() == pytest.approx(expected.item(), rel=0.01)
    assert np.linalg.norm(gradient - exact) < 0.03 * np.linalg.norm(exact)


@pytest.mark.parametrize("projections", [[], ["wq", "w2"]], ids=["base", "adapted"])
def test_losses_without_training_are_those_of_the_network(projections):
    model, batch = make_model(projections).eval(), make_batch(40)
    assert numpy_training.fits(model)
    streams = device.open_streams(2)
    results = numpy_training.NumpyLayers(model, lora.loss).losses(streams, SINGLE, *batch)
    expected = SeparateLayers(model, lora.loss).losses(streams, SINGLE, *batch)
    assert len(results) == len(expected) == len(streams)
    for (value, n_tokens), (expected_value, expected_tokens) in zip(results, expected, strict=True):
        assert n_tokens.item() == expected_tokens.item()
        assert value.item() == pytest.approx(expected_value.item(), abs=1e-5)


def test_a_batch_in_which_nothing_counts_has_no_gradient():
    inputs, targets, lengths = make_batch(20)
    model = make_model(["w1"])
    layers = numpy_training.NumpyLayers(model, lora.loss)
    vector = to_vector(model.trainable_parameters())
    (value, n_tokens), gradient = layers.value_and_grad(vector, inputs, targets, 0 * lengths)
    assert value.item() == n_tokens.item() == 0 and not np.array(gradient).any()


def test_each_stream_has_the_results_of_its_rows():
    model, batch = make_model(["wv", "w3"]), make_batch(20)
    layers = numpy_training.NumpyLayers(model, lora.loss)
    vector, streams = to_vector(model.trainable_parameters()), device.open_streams(2)
    results = layers.on_each_stream(streams, vector, batch, SINGLE)
    assert len(results) == len(streams)
    for i, ((value, _), gradient) in enumerate(results):
        rows = [array[i :: len(streams)] for array in batch]
        (expected, _), expected_gradient = layers.value_and_grad(vector, *rows)
        assert value.item() == pytest.approx(expected.item(), abs=1e-6)
        np.testing.assert_allclose(np.array(gradient), np.array(expected_gradient), atol=1e-6)


def test_what_it_does_not_serve_for_is_left_to_the_network():
    half, quantized, recomputing = (make_model(["w2"]) for _ in range(3))
    half.set_dtype(mx.float16)
    nn.quantize(quantized, 32, 4, class_predicate=quantizable)
    recomputing.grad_checkpoint = True
    others = make_model(["w2"], dropout=0.1), make_model(["wq"], qk_norm=True)
    for model in (half, quantized, recomputing, *others):
        assert not numpy_training.fits(model)
    assert not numpy_training.fits(make_model([]))  # nothing to train
    assert numpy_training.fits(make_model(["w2"]))
