"""The training kernels of ops_cuda.cu: what MLX computes in several passes over memory, in one."""

from functools import lru_cache

import numpy as np

from parts import device, nvrtc
from parts.rope import Rope, amplitude, frequency_table

import mlx.core as mx


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
    name: str, n_threads: int, inputs: list[mx.array], n_outputs: int, *scalars: int
) -> list[mx.array]:
    """The outputs of a kernel, each in the shape and dtype of the first input."""
    first = inputs[0]
    return mx.fast.precompiled_cuda_kernel(
        name=name,
        compiled_source=compiled_kernels(first.dtype),
        inputs=inputs,
        output_shapes=[first.shape] * n_outputs,
        output_dtypes=[first.dtype] * n_outputs,
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
    return run_kernel("swiglu_gradients", gate.size // 8, [gate, up, cotangent], 2)


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
        inputs, dim = [x, weight, *cotangents], x.shape[-1]
        n_threads = x.size // dim * 32
        return run_kernel("rms_norm_gradient", n_threads, inputs, 1, dim, float_bits(eps))[0]

    return both(x)


def rope(x: mx.array, offset: int | mx.array, rope: Rope) -> mx.array:
    """See `ops.rope`; for training."""
    _, length, heads, head_dim = x.shape
    positions = offset if isinstance(offset, mx.array) else position_table(offset, length)
    tables, amplitude_bits = [frequency_table(rope), positions], float_bits(amplitude(rope))

    def rotate(x: mx.array, direction: int) -> mx.array:
        sizes = positions.size, heads, head_dim, direction, amplitude_bits
        return run_kernel("rope", x.size // 8, [x, *tables], 1, *sizes)[0]

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
