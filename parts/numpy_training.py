"""Loss and gradients of a batch on a CPU, in NumPy: each stream's rows in a thread of their own.

The layers run forward in the threads (`numpy_layers`), then `lora.loss` asks MLX for the loss of
what they have made and for its gradient, then they run backward. Only the cross-entropy in the
middle is NumPy's, too (`linear_cross_entropy.in_numpy`), and uses the threads.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from parts import device  # before MLX, for its BLAS
from parts.adapters import to_vector
from parts.joined_layers import lora_positions
from parts.linear_cross_entropy import at_once
from parts.numpy_layers import Batch, Layer, Norm, Pair, make_blocks, rotation
from parts.ranks import SINGLE, Ranks, split_rows
from parts.sgemm import as_numpy, to_float32
from parts.separate_layers import SeparateLayers

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten


class Computed:
    """A model whose layers have been computed, for `lora.loss`."""

    def __init__(self, output_weight: mx.array, x: mx.array, training: bool):
        self.output_weight, self.training, self._x = output_weight, training, x

    def hidden(self, _: mx.array) -> tuple[mx.array, None]:
        """See `Model.hidden`."""
        return self._x, None


def is_adapted(model: nn.Module) -> bool:
    """Whether a model has LoRA matrices."""
    return any("lora_a" in module for module in model.modules())


class NumpyLayers(SeparateLayers):
    """`numpy_layers` in the place of a model's own."""

    def __init__(self, model: nn.Module, loss: Callable):
        super().__init__(model, loss)
        self.embedding = as_numpy(model.tok_embeddings.weight)
        self.layers, self.norm = [Layer(block) for block in model.layers], Norm(model.norm)
        # Where the matrices of each adapted layer are in the vector.
        self.places = {}
        for layer, name, shape, start in lora_positions(model)[0] if is_adapted(model) else ():
            self.places.setdefault(id(layer), {})[name] = start, shape
        self.first = len(self.layers)  # layer that a gradient is needed for
        if model.training:
            adapted = [any(line.is_adapted for line in layer.linears) for layer in self.layers]
            self.first = adapted.index(True)

    def on_each_stream(
        self, streams: list[mx.Stream], vector: mx.array, batch: tuple[mx.array, ...], ranks: Ranks
    ) -> list[tuple]:
        """See `SeparateLayers`. A thread for each stream computes its rows. The threads do nothing
        in MLX, whose streams belong to the thread that made them.
        """
        numbers, shares = as_numpy(vector), [rows for _, rows in split_rows(streams, batch, ranks)]
        pairs = self.pairs(numbers)
        passes = [Pass(self, pairs, as_numpy(inputs)) for inputs, *_ in shares]
        with ThreadPoolExecutor(len(streams)) as threads, at_once(threads):
            hidden = threads.map(Pass.forward, passes)
            results = [
                self.loss_of_hidden(x, *rows) for x, rows in zip(hidden, shares, strict=True)
            ]
            gradients = [np.zeros_like(numbers) for _ in results]
            of_hidden = [np.array(gradient) for _, gradient in results]
            of_pairs = map(self.pairs, gradients)
            list(threads.map(Pass.backward, passes, of_hidden, of_pairs))
        return [
            (values, mx.array(gradient))
            for (values, _), gradient in zip(results, gradients, strict=True)
        ]

    def value_and_grad(self, vector: mx.array, *batch: mx.array) -> tuple:
        stream = mx.default_stream(mx.default_device())
        return self.on_each_stream([stream], vector, batch, SINGLE)[0]

    def loss_of_hidden(self, x: np.ndarray, *rows: mx.array) -> tuple:
        """What the loss returns where the layers have made x (B, L, D), and its gradient of x."""

        def loss(x: mx.array) -> tuple[mx.array, mx.array]:
            return self.loss(Computed(self.model.output_weight, x, training=True), *rows)

        result = mx.value_and_grad(loss)(mx.array(x))
        mx.eval(result)
        return result

    def losses(self, streams: list[mx.Stream], ranks: Ranks, *batch: mx.array) -> list[tuple]:
        """See `SeparateLayers`."""
        trained = self.model.trainable_parameters() if self.places else None
        pairs = self.pairs(as_numpy(to_vector(trained)) if trained else np.zeros(0, np.float32))
        shares = [rows for _, rows in split_rows(streams, batch, ranks)]
        passes = [Pass(self, pairs, as_numpy(inputs)) for inputs, *_ in shares]
        with ThreadPoolExecutor(len(streams)) as threads, at_once(threads):
            hidden = threads.map(Pass.forward, passes)
            return [
                self.loss(Computed(self.model.output_weight, mx.array(x), training=False), *rows)
                for x, rows in zip(hidden, shares, strict=True)
            ]

    def pairs(self, vector: np.ndarray) -> list[list[Pair | None]]:
        """The LoRA matrices of each layer, or their gradients, as views of a vector."""

        def matrix(start: int, shape: tuple[int, int]) -> np.ndarray:
            return vector[start : start + shape[0] * shape[1]].reshape(shape)

        def pair(linear: object) -> Pair | None:
            places = self.places.get(id(linear.layer))
            return places and Pair(matrix(*places["lora_a"]), matrix(*places["lora_b"]))

        return [[pair(linear) for linear in layer.linears] for layer in self.layers]


class Pass:
    """A forward pass, and then a backward pass, over a share of a batch."""

    def __init__(self, layers: NumpyLayers, pairs: list[list[Pair | None]], inputs: np.ndarray):
        """pairs: see `NumpyLayers.pairs`. inputs: (B, L) token ids; see `Model.hidden`."""
        args, positions = layers.model.args, None
        if inputs.ndim == 3:
            inputs, positions = inputs[..., 0], inputs[..., 1]
        self.layers, self.pairs, self.ids = layers, pairs, inputs
        table = rotation(inputs.shape[1], args.rope)
        table = (table if positions is None else table[positions])[..., None, :]
        blocks = make_blocks(inputs.shape[1], args.sliding_window, positions)
        self.batch = Batch(inputs.shape, table, blocks)

    @np.errstate(all="ignore")  # what is not finite shows in the loss
    def forward(self) -> np.ndarray:
        """Return what the layers make of the ids, normalised: (B, L, D)."""
        x, self.kept = to_float32(self.layers.embedding[self.ids]), []
        shape = x.shape
        x = x.reshape(-1, shape[-1])
        for i, layer in enumerate(self.layers.layers):
            x, kept = layer(x, self.pairs[i], self.batch)
            self.kept.append(kept if i >= self.layers.first else None)
        normed, factor = self.layers.norm(x)
        self.kept.append((x, normed, factor))
        return normed.reshape(shape)

    @np.errstate(all="ignore")
    def backward(self, gradient: np.ndarray, of_pairs: list[list[Pair | None]]) -> None:
        """Put the gradients of the pairs to `of_pairs`. gradient: of what `forward` returned, which
        it overwrites.
        """
        x, normed, factor = self.kept.pop()
        of_x = self.layers.norm.backward(x, normed, factor, gradient.reshape(x.shape))
        for i in reversed(range(self.layers.first, len(self.kept))):
            kept, layer = self.kept.pop(), self.layers.layers[i]
            of_x = layer.backward(of_x, kept, self.pairs[i], of_pairs[i], self.batch)


def fits(model: nn.Module) -> bool:
    """Whether `NumpyLayers` serve for this model: of a type that has fast products, with plain
    weights, and LoRA matrices that are all trained.
    """
    if not hasattr(model, "hidden"):
        return False
    modules = list(model.modules())
    adapted = [module for module in modules if "lora_a" in module]
    trained = [name.rpartition(".")[2] for name, _ in tree_flatten(model.trainable_parameters())]
    all_trained = ["lora_a"] * len(adapted) + ["lora_b"] * len(adapted)
    return (
        (bool(adapted) or not model.training)
        and (sorted(trained) == all_trained or not adapted)
        and not (model.training and any(module.dropout for module in adapted))
        and not any("scales" in module for module in modules)
        and model.norm.weight.dtype in device.fast_dtypes()
        and not model.args.qk_norm
        and not (model.training and model.grad_checkpoint)
    )
