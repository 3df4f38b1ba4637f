"""The layers of a model in training, with fewer and larger operations. A GPU that trains a small
model waits for the processor, which launches operations one by one.

Linear layers with the same input are one product, their LoRA matrices one pair, and a residual
connection is part of the product before it. RoPE of queries and keys is one kernel, SwiGLU another
(ops_cuda). A layer is two functions with gradients of their own, before and after attention.

Shapes in comments: B rows of a batch, L positions, N = B L, D = `dim`, H = `n_heads`, K =
`n_kv_heads`.
"""

from collections.abc import Callable

import numpy as np

from parts import device  # noqa: F401  before MLX, for its BLAS
from parts import ops, ops_cuda
from parts.joined_linear import JoinedLinear, waits_for_launches
from parts.merged_linear import base_linear
from parts.separate_layers import SeparateLayers

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

# A matrix begins at a multiple of so many numbers, as products want it.
MULTIPLE = 128


def later(x: mx.array, others: list[mx.array]) -> mx.array:
    """x, for what is to be computed after `others`: computed before, it would live that long."""
    return mx.depends([x], others)[0]


class JoinedBlock(nn.Module):
    """A transformer block in training. Between the first and the last, all positions of a batch are
    one axis.
    """

    def __init__(self, block: nn.Module, batch: dict, is_last: bool):
        super().__init__()
        attention, feed_forward = block.attention, block.feed_forward
        self.qkv = JoinedLinear(attention.wq, attention.wk, attention.wv)
        self.wo = JoinedLinear(attention.wo)
        self.gate_up = JoinedLinear(feed_forward.w1, feed_forward.w3)
        self.w2 = JoinedLinear(feed_forward.w2)
        self._attention = attention
        self._norms = block.attention_norm, block.ffn_norm
        norms, eps = None, 0.0
        if "q_norm" in attention:
            weights = attention.q_norm.weight, attention.k_norm.weight
            norms, eps = mx.concatenate(weights), attention.q_norm.eps
            mx.eval(norms)
        self._heads = ops_cuda.Heads(
            attention.n_heads, attention.n_kv_heads, attention.rope, norms, eps
        )
        self._batch = batch  # what all blocks have in common: its shape (B, L), and positions
        self._has_gradient = True
        self._is_last = is_last

    def __call__(
        self, x: mx.array, cache: None = None, packed: ops.PackedRows | None = None
    ) -> tuple[mx.array, None]:
        """(B, L, D) or (N, D) to the same shape, but that only the last returns (B, L, D).

        packed: of rows that hold several texts; see `ops.attention`.
        """
        if x.ndim == 3:
            positions = ops_cuda.position_table(0, x.shape[1])
            positions = mx.contiguous(packed.positions) if packed else positions
            self._batch.update(shape=x.shape[:2], positions=positions)
            x = x.flatten(0, 1)
        shape = self._batch["shape"]
        before = self.before_attention(shape, self._batch["positions"])
        x, queries, keys, values = before(x, self.qkv.pair())[:4]
        out = ops.attention(
            queries.swapaxes(1, 2),
            keys,
            values,
            self._attention.scale,
            self._attention.window,
            packed,
        )
        out = out.swapaxes(1, 2).reshape(len(x), -1)
        pairs = [layer.pair() for layer in (self.wo, self.gate_up, self.w2)]
        x = self.after_attention()(x, out, pairs)[0]
        return x.reshape(*shape, -1) if self._is_last else x, None

    def before_attention(self, shape: tuple[int, int], positions: mx.array) -> Callable:
        """A function of x (N, D) and the pair of `qkv`, which returns x, queries (B, L, H,
        head_dim), keys and values (B, K, L, head_dim), and what else it keeps for its gradients.
        """
        norm, heads = self._norms[0], self._heads

        def before(x: mx.array, pair: list[mx.array]) -> tuple:
            normed = mx.fast.rms_norm(x, norm.weight, norm.eps)
            y, inner = self.qkv.product(normed, pair)
            split = ops_cuda.split_heads(y, shape, positions, heads)
            if not waits_for_launches(x.size):
                return x, *split, [], []
            return x, *split, [normed, *inner] if pair else [], [y] if heads.are_normed else []

        if not self._has_gradient:
            return before

        def before_vjp(primals: tuple, cotangents: tuple, outputs: tuple) -> tuple:
            (x, pair), (residual, *split) = primals, cotangents[:4]
            of_pair, products = outputs[4:]
            if not of_pair + products and (pair or heads.are_normed):
                normed = mx.fast.rms_norm(later(x, split), norm.weight, norm.eps)
                if heads.are_normed:
                    y, inner = self.qkv.product(normed, pair)
                    products = [y]
                else:
                    inner = [normed @ pair[0].T]
                of_pair = [normed, *inner]
            normed, *inner = of_pair or [None]
            cotangent = ops_cuda.join_heads(*split, *products or [None], positions, heads)
            gradient, of_pair = self.qkv.gradients(normed, inner, cotangent, pair)
            gradient = ops_cuda.rms_norm_gradient(x, norm.weight, residual, gradient, norm.eps)
            return gradient, of_pair

        function = mx.custom_function(before)
        function.vjp(before_vjp)
        return function

    def after_attention(self) -> Callable:
        """A function of x (N, D), what attention returns (N, H head_dim), and the pairs of `wo`,
        `gate_up` and `w2`. It returns the block's output (N, D), and what it keeps for its
        gradients.
        """
        norm, layers = self._norms[1], (self.wo, self.gate_up, self.w2)

        def after(x: mx.array, out: mx.array, pairs: list) -> tuple:
            x, inner_out = self.wo.product(out, pairs[0], x)
            normed = mx.fast.rms_norm(x, norm.weight, norm.eps)
            gate_up, inner_up = self.gate_up.product(normed, pairs[1])
            product = ops_cuda.joined_swiglu(gate_up)
            y, inner_down = self.w2.product(product, pairs[2], x)
            keep = waits_for_launches(x.size)
            inputs = [normed] if keep and pairs[1] else [], [product] if keep and pairs[2] else []
            return y, x, gate_up, [inner_out, inner_up, inner_down], inputs

        if not self._has_gradient:
            return after

        def after_vjp(primals: tuple, cotangents: tuple, outputs: tuple) -> tuple:
            (_, out, pairs), (cotangent, *_) = primals, cotangents
            _, x, gate_up, inners, (normed, product) = outputs
            wo, both, w2 = zip(layers, inners, pairs, strict=True)

            def back(layer: tuple, inputs: list, cotangent: mx.array) -> tuple:
                linear, inner, pair = layer
                return linear.gradients(inputs[0] if inputs else None, inner, cotangent, pair)

            if pairs[2] and not product:
                product = [ops_cuda.joined_swiglu(later(gate_up, [cotangent]))]
            of_product, pair_2 = back(w2, product, cotangent)
            of_gate_up = ops_cuda.joined_swiglu_gradient(gate_up, of_product)
            if pairs[1] and not normed:
                normed = [mx.fast.rms_norm(later(x, [of_gate_up]), norm.weight, norm.eps)]
            of_normed, pair_1 = back(both, normed, of_gate_up)
            gradient = ops_cuda.rms_norm_gradient(x, norm.weight, cotangent, of_normed, norm.eps)
            of_out, pair_0 = back(wo, [out], gradient)
            return gradient, of_out, [pair_0, pair_1, pair_2]

        function = mx.custom_function(after)
        function.vjp(after_vjp)
        return function


class JoinedLayers(SeparateLayers):
    """`JoinedBlock`s in their place. Their matrices hold the vector's numbers in another order.

    All but the vector is constant to a compiled step: hundreds of weights that it is called with
    would take it longer to look at than their products.
    """

    def __init__(self, model: nn.Module, loss: Callable):
        super().__init__(model, loss)
        self.state, self.outputs = [], [{}]
        self.dim, self.dtype = model.args.dim, model.layers[0].attention_norm.weight.dtype
        self.parameters, positions = lora_positions(model)
        self.blocks, batch = [], {}
        self.matrices = []  # layer, name, shape, and start in `order` of each
        orders, factors, start = [], [], 0
        for block in model.layers:
            joined = JoinedBlock(block, batch, block is model.layers[-1])
            self.blocks.append(joined)
            for layer in (joined.qkv, joined.wo, joined.gate_up, joined.w2):
                for name, order, factor in layer.pair_positions(positions):
                    self.matrices.append((layer, name, order.shape, start))
                    orders.append(order.flatten())
                    factors.append(factor.flatten())
                    start += -(-order.size // MULTIPLE) * MULTIPLE
            joined._has_gradient = bool(self.matrices)
        # Which number of the vector each of the matrices' is, and the other way; factors of both,
        # few, so that an index of a byte takes less memory.
        order, factor = np.concatenate(orders), np.concatenate(factors)
        place = np.empty(order.max() + 1, np.int32)
        place[order[order >= 0]] = np.flatnonzero(order >= 0)
        scales = np.unique(factor)
        self.scales, self.place = mx.array(scales, mx.float32), mx.array(place)
        self.factor_back = mx.array(np.searchsorted(scales, factor[place]), mx.uint8)
        order, factor = (np.concatenate([*map(padded, each)]) for each in (orders, factors))
        self.order = mx.array(np.maximum(order, 0), mx.int32)
        self.factor = mx.array(np.searchsorted(scales, factor), mx.uint8)
        mx.eval(self.order, self.factor, self.place, self.factor_back, model.parameters())

    def value_and_grad(self, vector: mx.array, *batch: mx.array) -> tuple:
        """See `SeparateLayers`; with the matrices of the vector."""
        numbers = (vector[self.order] * self.scales[self.factor]).astype(self.dtype)
        for layer, name, shape, start in self.matrices:
            layer[name] = mx.as_strided(numbers, shape, offset=start)
        layers, self.model.layers = self.model.layers, self.blocks
        try:
            result, gradients = self.loss_and_grad(self.model, *batch)
        finally:
            self.model.layers = layers
            for layer, name, *_ in self.matrices:
                del layer[name]
        gradient = ops_cuda.concatenate([gradient for _, gradient in tree_flatten(gradients)])
        gradient = gradient[self.place].astype(mx.float32)
        return result, gradient * self.scales[self.factor_back]

    def put(self, vector: mx.array) -> None:
        # One operation a matrix, where `from_vector` takes two.
        self.outputs[0]["matrices"] = [
            mx.as_strided(vector, shape, offset=start) for *_, shape, start in self.parameters
        ]

    def prepare(self, inputs: mx.array, targets: mx.array, *others: mx.array) -> tuple:
        """The batch, padded to one of few lengths where it waits for launches: a GPU prepares
        itself for a new length as long as it takes for ten steps. Targets that are not those of
        the inputs, position by position, stay as they are.
        """
        rows, length = inputs.shape[:2]
        padding = few_lengths(length) - length
        is_small = waits_for_launches(rows * (length + padding) * self.dim)
        if not padding or not is_small or inputs.ndim > 2:
            return inputs, targets, *others
        more = (0, 0), (0, padding)
        targets = mx.pad(targets, more) if targets.shape == inputs.shape else targets
        return mx.pad(inputs, more), targets, *others

    def finish_step(self) -> None:
        matrices = self.outputs[0].get("matrices", [])
        for (layer, name, *_), matrix in zip(self.parameters, matrices, strict=False):
            layer[name] = matrix


def few_lengths(length: int) -> int:
    """The next of 32, 48, 64, 96, 128, ... positions."""
    power = 2 ** max(5, (length - 1).bit_length())
    return power * 3 // 4 if length <= power * 3 // 4 and power > 32 else power


def padded(numbers: np.ndarray) -> np.ndarray:
    """A vector with zeros up to a size that is a `MULTIPLE`."""
    return np.pad(numbers, (0, -len(numbers) % MULTIPLE))


def lora_positions(model: nn.Module) -> tuple[list[tuple], dict[int, dict[str, np.ndarray]]]:
    """Layer, name and shape of each LoRA matrix, and where it begins in the vector of all
    (`adapters.to_vector`); and where each of its numbers is there, by the layer's `id` and the
    name.
    """
    modules, parameters, positions, start = dict(model.named_modules()), [], {}, 0
    for path, matrix in tree_flatten(model.trainable_parameters()):
        module, _, name = path.rpartition(".")
        parameters.append((modules[module], name, matrix.shape, start))
        numbers = np.arange(start, start + matrix.size).reshape(matrix.shape)
        positions.setdefault(id(modules[module]), {})[name] = numbers
        start += matrix.size
    return parameters, positions


def fits(model: nn.Module) -> bool:
    """Whether `JoinedLayers` and their kernels serve for this model."""
    if not hasattr(model, "hidden"):
        return False
    args, block = model.args, model.layers[0]
    norm, linear = block.attention_norm.weight, base_linear(block.attention.wq)
    trained = (name.rpartition(".")[2] for name, _ in tree_flatten(model.trainable_parameters()))
    return (
        all(size % 8 == 0 for size in (args.dim, args.head_dim, args.hidden_dim))
        and not any(module.dropout for module in model.modules() if "lora_a" in module)
        and set(trained) == {"lora_a", "lora_b"}
        and norm.dtype == linear.get("scales", linear.weight).dtype
        and (not args.qk_norm or args.head_dim in ops_cuda.NORMED_HEADS)
        and ops_cuda.has_kernels(norm)
    )
