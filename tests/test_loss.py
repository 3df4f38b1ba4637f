"""The loss: the cross-entropy of an output projection, in blocks."""

from functools import partial

import numpy as np
import pytest
import torch
from conftest import QUICK

from parts import device, linear_cross_entropy, ops, recompute
from parts.batches import keep_targets

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten

import lora
from models import Model, ModelArgs, add_lora

N_ROWS, DIM = 13, 16
FORMS = {"CPU": True, "GPU": False}


@pytest.fixture(params=FORMS)
def form(request, monkeypatch) -> str:
    """Each form of the operation, on a CPU."""
    monkeypatch.setattr(device, "ON_CPU", FORMS[request.param])
    return request.param


def in_blocks(monkeypatch, n_logits: int) -> None:
    """Make blocks of so many logits, and of 4 positions or 4 tokens at the least."""
    monkeypatch.setattr(linear_cross_entropy, "MULTIPLE", 4)
    for name in ("LOGITS_ON_CPU", "LOGITS_ON_GPU"):
        monkeypatch.setattr(linear_cross_entropy, name, n_logits)


def random_case(vocabulary: int, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, a weight, and targets of which some do not count."""
    rng = np.random.default_rng(vocabulary)
    x = rng.normal(size=(N_ROWS, DIM)).astype(np.float32) * scale
    weight = rng.normal(size=(vocabulary, DIM)).astype(np.float32)
    targets = rng.integers(0, vocabulary, N_ROWS)
    targets[[0, 5, N_ROWS - 1]] = -1
    return x, weight, targets.astype(np.int32)


def by_torch(x, weight, targets, cotangent) -> tuple[np.ndarray, np.ndarray]:
    """Losses, and the gradient of x, in float64."""
    rows = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    losses = torch.nn.functional.cross_entropy(
        rows @ torch.tensor(weight, dtype=torch.float64).T,
        torch.tensor(targets, dtype=torch.int64),
        ignore_index=-1,
        reduction="none",
    )
    losses.backward(torch.tensor(cotangent, dtype=torch.float64))
    return losses.detach().numpy(), rows.grad.numpy()


def by_us(x, weight, targets, cotangent, dtype=mx.float32) -> tuple[np.ndarray, np.ndarray]:
    """Losses, and the gradient of x."""
    weight, targets = mx.array(weight, dtype), mx.array(targets)
    losses, gradients = mx.vjp(
        lambda x: ops.linear_cross_entropy(x, weight, targets),
        [mx.array(x, dtype)],
        [mx.array(cotangent, mx.float32)],
    )
    assert losses[0].dtype == mx.float32
    assert gradients[0].dtype == dtype
    return np.array(losses[0]), np.array(gradients[0].astype(mx.float32))


@pytest.mark.parametrize("vocabulary", [3, 128, 129, 300])
@pytest.mark.parametrize("n_logits", [1, 100, 1000, 2**20])
def test_losses_and_gradients_are_torchs_at_each_size_of_a_block(
    form, vocabulary, n_logits, monkeypatch
):
    in_blocks(monkeypatch, n_logits)
    case = *random_case(vocabulary), np.linspace(-1, 2, N_ROWS)
    for actual, expected in zip(by_us(*case), by_torch(*case), strict=True):
        np.testing.assert_allclose(actual, expected, atol=1e-5, rtol=1e-5)


def test_losses_and_gradients_are_those_of_the_plain_form(form, monkeypatch):
    in_blocks(monkeypatch, 500)
    x, weight, targets = map(mx.array, random_case(300))

    def plain(x: mx.array) -> mx.array:
        losses = nn.losses.cross_entropy(x @ weight.T, mx.maximum(targets, 0))
        return mx.where(targets < 0, 0, losses).sum()

    value, gradient = mx.value_and_grad(plain)(x)
    ours = mx.value_and_grad(lambda x: ops.linear_cross_entropy(x, weight, targets).sum())(x)
    np.testing.assert_allclose(ours[0], value, rtol=1e-5)
    np.testing.assert_allclose(ours[1], gradient, atol=1e-5, rtol=1e-5)


def test_large_logits_neither_overflow_nor_vanish(form, monkeypatch):
    in_blocks(monkeypatch, 500)
    case = *random_case(300, scale=100.0), np.ones(N_ROWS)
    losses, gradient = by_us(*case)
    expected_losses, expected_gradient = by_torch(*case)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5, atol=1e-3)
    np.testing.assert_allclose(gradient, expected_gradient, atol=2e-3)


def test_bfloat16_is_as_exact_as_its_rounding(form, monkeypatch):
    in_blocks(monkeypatch, 500)
    x, weight, targets = random_case(300)
    x, weight = (np.array(mx.array(a).astype(mx.bfloat16).astype(mx.float32)) for a in (x, weight))
    case = x, weight, targets, np.ones(N_ROWS)
    expected_losses, expected_gradient = by_torch(*case)
    losses, gradient = by_us(*case, dtype=mx.bfloat16)
    np.testing.assert_allclose(losses, expected_losses, atol=0.1)
    np.testing.assert_allclose(gradient, expected_gradient, atol=0.03)


def test_without_training_the_losses_are_the_same(form, monkeypatch):
    in_blocks(monkeypatch, 500)
    x, weight, targets = map(mx.array, random_case(300))
    losses = [ops.linear_cross_entropy(x, weight, targets, training) for training in (True, False)]
    assert np.array(losses[0]).tolist() == np.array(losses[1]).tolist()


@pytest.mark.parametrize("training", [True, False])
def test_no_more_than_a_few_blocks_of_logits_live_at_once(form, training, monkeypatch):
    in_blocks(monkeypatch, 2**16)
    x, weight = mx.ones((1024, 8)), mx.ones((4096, 8))
    targets = mx.zeros(1024, mx.int32)
    mx.eval(x, weight, targets)
    compute = lambda x: ops.linear_cross_entropy(x, weight, targets, training).sum()  # noqa: E731
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(mx.value_and_grad(compute)(x) if training else compute(x))
    assert mx.get_peak_memory() - before < 4 * len(x) * len(weight) / 4  # a quarter of the logits


# -------------------------------------------------------------------------------------------------
# The loss of a model


@pytest.fixture(scope="module")
def model() -> Model:
    mx.random.seed(0)
    model = Model(ModelArgs(**QUICK))
    add_lora(model, [0, 1])
    for layer in model.layers[:2]:
        layer.attention.wq.lora_b = mx.random.normal(layer.attention.wq.lora_b.shape) * 0.1
    return model


class Logits(nn.Module):
    """A model of which no more is known than that it returns logits."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.inner = model

    def __call__(self, inputs: mx.array) -> tuple[mx.array, None]:
        return self.inner(inputs)[0], None


def random_batch() -> tuple[mx.array, mx.array, mx.array]:
    tokens = mx.array(np.random.default_rng(0).integers(0, QUICK["vocab_size"], (3, 12)), mx.int32)
    return tokens[:, :-1], tokens[:, 1:], mx.array([11, 0, 4])


def test_a_model_that_returns_logits_has_the_same_loss_and_gradients(form, model):
    results = []
    for each in (model, Logits(model)):
        (value, n_tokens), tree = nn.value_and_grad(each, lora.loss)(each, *random_batch())
        layers = tree["inner"]["layers"] if "inner" in tree else tree["layers"]
        results.append((value.item(), np.array(layers[0]["attention"]["wq"]["lora_a"])))
        assert n_tokens.item() == 15
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    np.testing.assert_allclose(results[0][1], results[1][1], atol=1e-5)
    assert np.abs(results[0][1]).max() > 1e-4


def test_negative_targets_do_not_count(form, model):
    inputs, targets, lengths = random_batch()
    shorter = mx.array([11, 0, 2])
    masked = mx.where(mx.arange(11) == 3, -1, targets)
    masked = mx.where((mx.arange(11) == 2) & (mx.arange(3) == 2)[:, None], -1, masked)
    value, n_tokens = lora.loss(model, inputs, masked, lengths)
    assert n_tokens.item() == 15 - 1 - 2
    # By hand: the mean over what is left.
    losses = nn.losses.cross_entropy(model(inputs)[0], targets)
    left = [losses[0, i].item() for i in range(11) if i != 3] + losses[2, :2].tolist()
    assert value.item() == pytest.approx(np.mean(left), rel=1e-5)
    assert lora.loss(model, inputs, targets, shorter)[1].item() == 13


def test_targets_that_do_not_count_are_dropped_without_moving_loss_or_gradients(form, model):
    inputs, targets, _ = random_batch()
    counts = np.zeros(targets.shape, bool)
    counts[0, [1, 4, 5]] = counts[2, 10] = True
    kept, lengths, positions = map(mx.array, keep_targets(np.array(targets), counts))
    assert kept.shape == positions.shape == (3, 4)  # two eighths of 11, rounded up
    compute = nn.value_and_grad(model, lora.loss)
    whole = mx.where(mx.array(counts), targets, -1), mx.full((3,), 11)
    (value, n_tokens), tree = compute(model, inputs, kept, lengths, positions)
    (expected, n_expected), expected_tree = compute(model, inputs, *whole)
    assert n_tokens.item() == n_expected.item() == 4
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    a, b = (np.array(t["layers"][0]["attention"]["wq"]["lora_a"]) for t in (tree, expected_tree))
    np.testing.assert_allclose(a, b, atol=1e-6)
    assert np.abs(a).max() > 1e-4
    as_logits, _ = lora.loss(Logits(model), inputs, kept, lengths, positions)
    assert as_logits.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("n_counted", [0, 1, 7, 8])
def test_the_targets_that_are_kept_have_one_of_eight_sizes(n_counted):
    counts = np.arange(64) < n_counted
    kept, lengths, positions = keep_targets(np.arange(64)[None], counts[None])
    assert kept.tolist() == positions.tolist() == [list(range(8))]
    assert lengths.tolist() == [n_counted]


def test_where_nothing_counts_loss_gradients_and_tokens_are_zero(form, model):
    inputs, targets, lengths = random_batch()
    compute = nn.value_and_grad(model, lora.loss)
    (value, n_tokens), tree = compute(model, inputs, mx.full(targets.shape, -1), lengths)
    assert (value.item(), n_tokens.item()) == (0, 0)
    assert not np.array(tree["layers"][0]["attention"]["wq"]["lora_a"]).any()


def test_a_stream_without_targets_that_count_does_not_move_a_step(model):
    """A step of two streams, of which one has none, against that of the other alone."""
    inputs, targets, _ = random_batch()
    results = []
    for n_rows in (1, 2):
        mx.random.seed(1)
        twin = Model(ModelArgs(**QUICK))
        add_lora(twin, [0])
        step = lora.make_step(twin, optim.Adam(1e-3), lora.loss, device.open_streams(n_rows))
        result = step(inputs[:n_rows], targets[:n_rows], mx.array([11, 0][:n_rows]))
        assert result.finite.item()
        matrix = twin.layers[0].attention.wq.lora_b
        results.append((result.loss.item(), result.n_tokens.item(), np.array(matrix)))
    assert results[0][:2] == pytest.approx(results[1][:2], rel=1e-6)
    np.testing.assert_allclose(results[0][2], results[1][2], atol=1e-6)
    assert np.abs(results[0][2]).max() > 0


# -------------------------------------------------------------------------------------------------
# What is computed again


def test_what_is_computed_again_does_not_change_loss_or_gradients(model, monkeypatch):
    batch = random_batch()
    results = []
    for on_cpu in (True, False):
        monkeypatch.setattr(device, "ON_CPU", on_cpu)
        matrices = model.trainable_parameters()
        (value, _), tree = nn.value_and_grad(model, lora.loss)(model, *batch)
        model.update(matrices)
        results.append([value, *(array for _, array in tree_flatten(tree))])
    assert len(results[0]) == len(results[1]) == 1 + 2 * 2 * 2
    for expected, actual in zip(*results, strict=True):
        np.testing.assert_allclose(np.array(actual), np.array(expected), atol=1e-6)


def test_what_is_computed_again_does_not_live_before():
    """The gate and up of each layer, of which the step keeps the input instead."""
    module = nn.Linear(8, 4096, bias=False)

    def network(weight: mx.array, x: mx.array, call) -> mx.array:
        for _ in range(6):
            (y,) = call(lambda x: (mx.fast.rms_norm(x @ weight.T, None, 1e-5) ** 2,))(x)
            x = x + y @ weight
        return x.sum()

    peaks = []
    for call in (lambda function: function, partial(recompute.recomputed, module)):
        x = mx.ones((256, 8))
        mx.eval(x, module.weight)
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(mx.grad(lambda x, call=call: network(module.weight, x, call))(x))
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[1] < 0.75 * peaks[0]
