"""The steps of decoder_batch on a CPU, in NumPy and in float32: for so few rows MLX takes longer to
queue most operations than NumPy takes to compute them, and ten times as long for exponentials.

The weights are copied into blocks of columns. The cores multiply these side by side, each in less
time than it takes for as much of a whole matrix.
"""

import ctypes
from collections.abc import Callable

import numpy as np

from parts import device, ops  # before MLX, for its BLAS
from parts.merged_linear import base_linear, same_arrays
from parts.numpy_layers import Norm
from parts.rope import Rope, cos_sin, rotate_half_matrix
from parts.sgemm import AS_IT_IS, ROW_MAJOR, address, as_numpy

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

WIDEST = 384  # columns of a block
MAX_CORES = 8  # that have equal shares of a product


def cpu_decoder(model: nn.Module) -> Callable | None:
    """A function `run(tokens, position, columns, visible, caches)` that returns the logits (B, V)
    after tokens (B) at this position, and writes their keys and values into the last of the caches'
    `columns`, a slice. Returns None where the model is not in float32, or the memory has no room
    for copies of its weights, also of quantized ones. The model keeps the function.

    visible: which of the columns each row sees (B, columns), or None where it sees all.
    """
    arrays = [array for _, array in tree_flatten(model.parameters())]
    kept, run = getattr(model, "cpu_decoder", ([], None))
    if not same_arrays(kept, arrays):
        is_float32 = all(array.dtype in (mx.float32, mx.uint32) for array in arrays)
        run = make_decoder(model) if is_float32 and has_room(model.args) else None
        object.__setattr__(model, "cpu_decoder", (arrays, run))  # it is no parameter
    return run


def has_room(args: object) -> bool:
    """Whether the memory has room for a model's weights in float32, and for as much beside them."""
    free = device.free_memory()
    of_attention = 2 * (args.n_heads + args.n_kv_heads) * args.head_dim
    n_rows = args.n_layers * (of_attention + 3 * args.hidden_dim) + args.vocab_size
    return free is None or free > 2 * mx.float32.size * n_rows * args.dim


def make_decoder(model: nn.Module) -> Callable:
    """See `cpu_decoder`."""
    layers = [prepare_layer(layer) for layer in model.layers]
    embeddings, norm = as_numpy(model.tok_embeddings.weight), prepare_norm(model.norm)
    output, args = BlockProduct(model.output_layer), model.args

    def run(
        tokens: mx.array, position: int, columns: slice, visible: np.ndarray | None, caches: list
    ) -> mx.array:
        x, rotation = embeddings[as_numpy(tokens)], rotation_matrix(position, args.rope)
        rotations = rotation * np.float32(args.head_dim**-0.5), rotation  # queries are scaled, too
        mask = None
        if visible is not None:
            mask = np.where(visible, np.float32(0), np.float32(-np.inf))[:, None, None]
        with np.errstate(over="ignore"):  # an exponential may be infinite in SwiGLU
            for run_layer, cache in zip(layers, caches, strict=True):
                x = run_layer(x, rotations, columns, mask, *map(as_numpy, cache))
            return mx.array(output(norm(x)))

    return run


def rotation_matrix(position: int, rope: Rope) -> np.ndarray:
    """The matrix (head_dim, head_dim) that rotates the channels of a head at this position."""
    cosines, sines = (as_numpy(table[0]) for table in cos_sin(position, 1, rope))
    half = as_numpy(rotate_half_matrix(rope.head_dim, mx.float32))
    return np.eye(rope.head_dim, dtype=np.float32) * cosines + half * sines


def prepare_layer(layer: nn.Module) -> Callable:
    """What a layer makes of x (B, D); see `cpu_decoder`."""
    attention, feed_forward = layer.attention, layer.feed_forward
    n_heads, n_kv_heads, head_dim = attention.n_heads, attention.n_kv_heads, attention.head_dim
    wqkv = BlockProduct(attention.wq, attention.wk, attention.wv)
    wo, w2 = BlockProduct(attention.wo), BlockProduct(feed_forward.w2)
    w13 = BlockProduct(feed_forward.w1, feed_forward.w3)
    attention_norm, ffn_norm = prepare_norm(layer.attention_norm), prepare_norm(layer.ffn_norm)
    q_norm, k_norm = (prepare_norm(attention.get(name)) for name in ("q_norm", "k_norm"))

    def run_layer(
        x: np.ndarray,
        rotations: tuple[np.ndarray, np.ndarray],
        columns: slice,
        mask: np.ndarray | None,
        keys: np.ndarray,
        values: np.ndarray,
    ) -> np.ndarray:
        # (B, heads, head_dim)
        heads = wqkv(attention_norm(x)).reshape(len(x), -1, head_dim)
        queries, new_keys, new_values = np.split(heads, [n_heads, n_heads + n_kv_heads], axis=1)
        keys[:, :, columns.stop - 1] = k_norm(new_keys) @ rotations[1]
        values[:, :, columns.stop - 1] = new_values
        # The queries that share a key head are one matrix: (B, K, H / K, head_dim).
        queries = (q_norm(queries) @ rotations[0]).reshape(len(x), n_kv_heads, -1, head_dim)
        scores = queries @ keys[:, :, columns].swapaxes(-1, -2)
        if mask is not None:
            scores += mask
        scores -= scores.max(-1, keepdims=True)
        exps = np.exp(scores, out=scores)
        attended = exps @ values[:, :, columns]
        attended /= exps.sum(-1, keepdims=True)
        x = x + wo(attended.reshape(len(x), -1))
        gate, up = np.split(w13(ffn_norm(x)), 2, axis=1)
        return x + w2(gate / (1 + np.exp(-gate)) * up)  # SwiGLU

    return run_layer


def prepare_norm(norm: nn.Module | None) -> Callable:
    """What an RMSNorm makes of x (..., D); without one, x."""
    if norm is None:
        return lambda x: x
    normalize = Norm(norm)
    return lambda x: normalize(x)[0]


# -------------------------------------------------------------------------------------------------
# Products


class BlockProduct:
    """Returns what linear layers make of x (B, K), side by side: (B, all outputs)."""

    def __init__(self, *layers: nn.Module):
        weights = [whole_weight(layer) for layer in layers]
        self._n_outputs = sum(map(len, weights))
        self._blocks = as_numpy(column_blocks(weights))
        self._bias = None
        if any("bias" in base_linear(layer) for layer in layers):
            pairs = zip(layers, weights, strict=True)
            biases = [base_linear(layer).get("bias", mx.zeros(len(w))) for layer, w in pairs]
            self._bias = as_numpy(mx.concatenate(biases))
        self._prepare_call()

    def __call__(self, x: np.ndarray) -> np.ndarray:
        x, (n_blocks, _, width) = np.ascontiguousarray(x), self._blocks.shape
        y = np.empty((len(x), n_blocks * width), np.float32)
        if device.FAST_BLAS:
            self._n_rows.value = len(x)
            self._addresses[0], self._addresses[2] = address(x), address(y) + self._steps
            device.FAST_BLAS.cblas_sgemm_batch(*self._arguments)
        else:
            np.matmul(x, self._blocks, out=y.reshape(len(x), n_blocks, width).swapaxes(0, 1))
        y = y[:, : self._n_outputs]
        return y if self._bias is None else y + self._bias

    def _prepare_call(self) -> None:
        """Make the arguments with which MKL multiplies all blocks at once."""
        n_blocks, n_inputs, width = self._blocks.shape
        # The addresses of each block's x, weights and outputs.
        self._steps = np.arange(n_blocks) * width * self._blocks.itemsize
        weights = address(self._blocks) + self._steps * n_inputs
        self._addresses = np.stack([np.zeros_like(weights), weights, np.zeros_like(weights)])
        x, weights, y = (row.ctypes.data_as(ctypes.c_void_p) for row in self._addresses)
        self._n_rows = ctypes.c_int()
        as_it_lies, n_groups = pointer_to(AS_IT_IS), 1
        n_inputs, width, row = map(pointer_to, (n_inputs, width, n_blocks * width))
        self._arguments = (
            *(ROW_MAJOR, as_it_lies, as_it_lies, ctypes.byref(self._n_rows), width, n_inputs),
            *(pointer_to(1.0), x, n_inputs, weights, width, pointer_to(0.0), y, row),
            *(n_groups, pointer_to(n_blocks)),
        )


def pointer_to(value: float) -> object:
    """A pointer to an int or a float of C."""
    kind = ctypes.c_int if isinstance(value, int) else ctypes.c_float
    return ctypes.byref(kind(value))


def whole_weight(layer: nn.Module) -> mx.array:
    """The matrix (N, K) of a linear layer, dequantized, and its LoRA matrices added."""
    linear = base_linear(layer)
    weight = linear.weight
    if "scales" in linear:
        quantized = weight, linear.scales, linear.biases
        weight = ops.dequantize(*quantized, linear.group_size, linear.bits)
    if "lora_a" in layer:
        weight = weight + layer.scale * (layer.lora_a @ layer.lora_b).T
    return weight


def column_blocks(weights: list[mx.array]) -> mx.array:
    """Matrices (N, K), one after the other, transposed, in blocks of as many columns, (n, K, W), so
    many that the cores have equal shares. The last block is filled up with zeros.
    """
    n_outputs, n_inputs = sum(map(len, weights)), weights[0].shape[1]
    n_cores = min(len(device.available_cores()), MAX_CORES)
    n_blocks = -(-n_outputs // (WIDEST * n_cores)) * n_cores
    width = -(-n_outputs // n_blocks)
    n_blank = n_blocks * width - n_outputs
    rows = mx.concatenate([*weights, mx.zeros((n_blank, n_inputs))] if n_blank else weights)
    return mx.contiguous(rows.reshape(n_blocks, width, n_inputs).swapaxes(1, 2))
