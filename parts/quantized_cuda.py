"""Weights of 4 bits on CUDA: in 16 bits, and multiplied by a few vectors. See quantized_cuda.cu.

MLX's own product with a few vectors takes up to four times as long, and half a minute to compile
where it has never run. Dequantized weights take the time and the memory of all of them in 16 bits.
"""

from parts import device, nvrtc  # noqa: F401  device before MLX, for its BLAS

import mlx.core as mx

THREADS = 256  # of a block
ROWS = 32  # of weights that a block multiplies
STEP = 64  # numbers of a row that a warp takes at once
TILE = 8  # vectors that tensor cores multiply them by at once
MOST_TILES = 8  # of a block
MOST_VECTORS = 128  # with more, to dequantize the weights is faster
AT_ONCE = 16  # weights that a thread dequantizes


def has_kernels(scales: mx.array, bits: int) -> bool:
    """Whether the kernels read weights of so many bits with these scales."""
    return bits == 4 and scales.dtype != mx.float32


def compiled_kernels(dtype: mx.Dtype, group_size: int, n_tiles: int = 1) -> bytes | None:
    """The code of the kernels; None where they do not compile."""
    source = nvrtc.read_source("tensor_cores.cuh", "quantized_cuda.cu")
    constants = {"Number": nvrtc.NUMBER[dtype], "GROUP_SIZE": group_size}
    constants |= {"TILES": n_tiles, "THREADS": THREADS}
    return nvrtc.compile_kernels(source, tuple(constants.items()))


def dequantize(
    weight: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int
) -> mx.array:
    """What `mx.dequantize` returns; MLX's own kernel takes twice as long for 4 bits."""
    code = compiled_kernels(scales.dtype, group_size) if has_kernels(scales, bits) else None
    if not code:
        return mx.dequantize(weight, scales, biases, group_size, bits)
    n_rows, n_groups = scales.shape
    n_threads = scales.size * group_size // AT_ONCE
    return mx.fast.precompiled_cuda_kernel(
        name="dequantize",
        compiled_source=code,
        inputs=[weight, scales, biases],
        output_shapes=[(n_rows, n_groups * group_size)],
        output_dtypes=[scales.dtype],
        scalars=[n_threads],
        grid=(n_threads, 1, 1),
        threadgroup=(THREADS, 1, 1),
        ensure_row_contiguous=True,
    )[0]


def multiply(
    x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int
) -> mx.array | None:
    """x (..., K) times the transpose of N quantized rows: (..., N), without a gradient; None where
    no kernel serves for these.
    """
    *shape, n_numbers = x.shape
    n_vectors, n_rows = x.size // n_numbers, len(weight)
    fits = n_vectors <= MOST_VECTORS and not n_rows % ROWS and not n_numbers % STEP
    if not fits or x.dtype != scales.dtype or not has_kernels(scales, bits):
        return None
    # Each power of two is a kernel of its own.
    n_tiles = min(MOST_TILES, 1 << (-(-n_vectors // TILE) - 1).bit_length())
    code = compiled_kernels(x.dtype, group_size, n_tiles)
    if not code:
        return None
    n_blocks = n_rows // ROWS * -(-n_vectors // (TILE * n_tiles))
    return mx.fast.precompiled_cuda_kernel(
        name="quantized_product",
        compiled_source=code,
        inputs=[x, weight, scales, biases],
        output_shapes=[(*shape, n_rows)],
        output_dtypes=[x.dtype],
        scalars=[n_vectors, n_rows, n_numbers],
        grid=(n_blocks * THREADS, 1, 1),
        threadgroup=(THREADS, 1, 1),
        ensure_row_contiguous=True,
    )[0]
