"""The training kernels of ops_cuda.cu: what MLX computes in several passes over memory, in one."""

import math
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from parts import device, nvrtc
from parts.rope import Rope, amplitude, frequency_table

import mlx.core as mx


NORMED_HEADS = 8, 16, 32, 64, 128, 256  # head_dim: as many threads as sums in a warp want
ARRAYS = 32  # that `concatenate` takes at once


def has_kernels(x: mx.array) -> bool:
    """Whether the kernels serve for arrays like this one."""
    if not device.has_cuda() or x.shape[-1] % 8 or x.size // 8 >= 2**31:
        return False
    return compiled_kernels(x.dtype) is not None


def compiled_kernels(dtype: mx.Dtype) -> bytes | None:
    """The code of the kernels for arrays of `dtype`; None where they do not compile."""
    return nvrtc.compile_kernels(
        nvrtc.read_source("ops_cuda.cu"), (("Number", nvrtc.NUMBER[dtype]),)
    )


def run_kernel(
    name: str,
    n_threads: int,
    inputs: list[mx.array],
    shapes: list[tuple[int, ...]],
    *scalars: int,
) -> list[mx.array]:
    """The outputs of a kernel, of these shapes, in the dtype of the first input."""
    dtype = inputs[0].dtype
    return mx.fast.precompiled_cuda_kernel(
        name=name,
        compiled_source=compiled_kernels(dtype),
        inputs=inputs,
        output_shapes=shapes,
        output_dtypes=[dtype] * len(shapes),
        scalars=[n_threads, *scalars],
        grid=(n_threads, 1, 1),
        threadgroup=(256, 1, 1),
        ensure_row_contiguous=True,
    )


def float_bits(x: float) -> int:
    """The bits of a float32 as an integer: MLX passes integers alone to a kernel."""
    return np.float32(x).view(np.int32).item()


def swiglu_gradients(gate: mx.array, up: mx.array, cotangent: mx.array) -> list[mx.array]:
    """The gradients of gate and up in `silu(gate) * up`, all of one shape and dtype."""
    inputs = [gate, up, cotangent]
    return run_kernel("swiglu_gradients", gate.size // 8, inputs, [gate.shape] * 2)


def joined_swiglu(gate_up: mx.array) -> mx.array:
    """`silu(gate) * up` (N, F), of rows of both (N, 2 F)."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    n_threads = rows * size // 8
    return run_kernel("joined_swiglu", n_threads, [gate_up], [(rows, size)], size // 8)[0]


def joined_swiglu_gradient(gate_up: mx.array, cotangent: mx.array) -> mx.array:
    """The gradient of gate_up (N, 2 F) in `joined_swiglu`."""
    inputs, n_threads, size = [gate_up, cotangent], cotangent.size // 8, cotangent.shape[1]
    return run_kernel("joined_swiglu_gradient", n_threads, inputs, [gate_up.shape], size // 8)[0]


def lora_inner(x: mx.array, matrix: mx.array) -> mx.array:
    """x (N, D) times the transpose of a matrix (R, D) of few rows: (N, R)."""
    (rows, dim), ranks = x.shape, len(matrix)
    shapes, n_threads = [(rows, ranks)], rows * -(-ranks // 8) * 32
    return run_kernel("lora_inner", n_threads, [x, matrix], shapes, dim // 8, ranks)[0]


def lora_add(y: mx.array, inner: mx.array, matrix: mx.array) -> mx.array:
    """y (N, O), plus inner (N, R) times a matrix (R, O) of few rows."""
    inputs, (ranks, dim) = [y, inner, matrix], matrix.shape
    return run_kernel("lora_add", y.size // 8, inputs, [y.shape], dim // 8, ranks)[0]


def lora_gradients(
    x: mx.array, inner_gradient: mx.array, cotangent: mx.array, inner: mx.array
) -> list[mx.array]:
    """The gradients (R, D) and (R, O) of a pair of LoRA matrices.

    x: (N, D); cotangent: (N, O); inner: (N, R), the first matrix's product, and its gradient.
    """
    (rows, ranks), sizes = inner.shape, [x.shape[1] // 8, cotangent.shape[1] // 8]
    n_threads = sum(sizes) * -(-ranks // 4) * 32
    shapes = [(ranks, x.shape[1]), (ranks, cotangent.shape[1])]
    inputs = [x, inner_gradient, cotangent, inner]
    return run_kernel("lora_gradients", n_threads, inputs, shapes, rows, *sizes, ranks)


def concatenate(arrays: list[mx.array]) -> mx.array:
    """The numbers of all arrays as one vector; the size of each is a multiple of 8."""
    vectors = []
    for start in range(0, len(arrays), ARRAYS):
        some = arrays[start : start + ARRAYS]
        ends = np.cumsum([array.size // 8 for array in some])
        ends = np.pad(ends, (0, ARRAYS - len(some)), mode="edge").astype(np.int32)
        inputs = [*some, *some[:1] * (ARRAYS - len(some)), mx.array(ends)]
        n_threads = ends[-1].item()
        vectors += run_kernel("concatenate", n_threads, inputs, [(n_threads * 8,)])
    return mx.concatenate(vectors) if len(vectors) > 1 else vectors[0]


def rms_norm_gradient(
    x: mx.array, weight: mx.array, residual: mx.array, cotangent: mx.array, eps: float
) -> mx.array:
    """The gradient of x (..., D), whose cotangents are those of x itself, `residual`, and of x
    normalised.
    """
    inputs, dim = [x, weight, residual, cotangent], x.shape[-1]
    n_threads = x.size // dim * 32
    return run_kernel("rms_norm_gradient", n_threads, inputs, [x.shape], dim, float_bits(eps))[0]


def rms_norm_residual(x: mx.array, weight: mx.array, eps: float) -> tuple[mx.array, mx.array]:
    """x (..., D), and x normalised; weight (D). The backward pass adds both gradients of x in one
    kernel. There is none of the weight.
    """

    @mx.custom_function
    def both(x: mx.array) -> tuple[mx.array, mx.array]:
        return x, mx.fast.rms_norm(x, weight, eps)

    @both.vjp
    def both_vjp(
        x: mx.array, cotangents: tuple[mx.array, mx.array], _: tuple[mx.array, mx.array]
    ) -> mx.array:
        return rms_norm_gradient(x, weight, *cotangents, eps)

    return both(x)


def rope(x: mx.array, offset: int | mx.array, rope: Rope) -> mx.array:
    """See `ops.rope`; for training."""
    _, length, heads, head_dim = x.shape
    positions = offset if isinstance(offset, mx.array) else position_table(offset, length)
    tables, amplitude_bits = [frequency_table(rope), positions], float_bits(amplitude(rope))

    def rotate(x: mx.array, direction: int) -> mx.array:
        sizes = positions.size, heads, head_dim, direction, amplitude_bits
        return run_kernel("rope", x.size // 8, [x, *tables], [x.shape], *sizes)[0]

    @mx.custom_function
    def rotated(x: mx.array) -> mx.array:
        return rotate(x, 1)

    @rotated.vjp
    def rotated_vjp(_: mx.array, cotangent: mx.array, __: mx.array) -> mx.array:
        return rotate(cotangent, -1)

    return rotated(x)


@lru_cache(maxsize=256)  # a length of a batch each
def position_table(offset: int, length: int) -> mx.array:
    """The positions (length,), int32, from `offset` on."""
    return mx.array(np.arange(offset, offset + length, dtype=np.int32))


class Heads(NamedTuple):
    """How `split_heads` splits, normalises and rotates."""

    heads: int
    key_heads: int
    rope: Rope
    norms: mx.array | None = None  # weights (2 head_dim), of queries, then of keys
    eps: float = 0.0

    @property
    def are_normed(self) -> bool:
        """Whether queries and keys are normalised."""
        return self.norms is not None


def split_heads(
    x: mx.array, shape: tuple[int, int], positions: mx.array, settings: Heads
) -> list[mx.array]:
    """Queries (B, L, heads, head_dim), keys and values (B, key_heads, L, head_dim) from all of them
    (B L, (heads + 2 key_heads) head_dim); queries and keys are normalised and rotated.

    shape: B, L. positions: (L,), which all rows have, or (B, L), int32.
    """
    batch, length = shape
    heads, key_heads, rope, *_ = settings
    keys = batch, key_heads, length, rope.head_dim
    shapes = [(batch, length, heads, rope.head_dim), keys, keys]
    norms = x if settings.norms is None else settings.norms  # as x, it is not read
    inputs = [x, frequency_table(rope), positions, norms]
    scalars = head_scalars(settings, length, positions)
    return run_kernel("split_heads", x.size // 8, inputs, shapes, *scalars)


def join_heads(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    products: mx.array | None,
    positions: mx.array,
    settings: Heads,
) -> mx.array:
    """The gradient of `split_heads`, for those of what it returns. products: its `x`; None where
    heads are not normalised.
    """
    batch, length, heads, head_dim = queries.shape
    shape = batch * length, (heads + 2 * settings.key_heads) * head_dim
    read = [queries, queries] if settings.norms is None else [products, settings.norms]
    tables = [frequency_table(settings.rope), positions]
    inputs, scalars = (
        [queries, keys, values, *tables, *read],
        head_scalars(settings, length, positions),
    )
    return run_kernel("join_heads", math.prod(shape) // 8, inputs, [shape], *scalars)[0]


def head_scalars(settings: Heads, length: int, positions: mx.array) -> list[int]:
    """The last parameters of `split_heads` and `join_heads`."""
    heads, key_heads, rope, _, eps = settings
    sizes = [positions.size, length, heads, key_heads, rope.head_dim]
    return [*sizes, float_bits(amplitude(rope)), int(settings.are_normed), float_bits(eps)]
