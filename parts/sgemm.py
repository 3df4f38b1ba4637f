"""Products of NumPy's matrices by the BLAS that MLX has on a CPU, in float32 or from bfloat16.

NumPy's own BLAS has threads of its own; here several threads multiply side by side, and each takes
its share of the cores, as `device.open_streams` has set it.
"""

import ctypes

import numpy as np

from parts import device

import mlx.core as mx

ROW_MAJOR, AS_IT_IS, TRANSPOSED = 101, 111, 112


def load_product(name: str) -> "ctypes._FuncPointer | None":
    """Return a product of matrices of the fast BLAS; None without it."""
    function = getattr(device.FAST_BLAS, name, None)
    if function is not None:
        integer, pointer = ctypes.c_int, ctypes.c_void_p
        function.argtypes = [
            *([integer] * 6),
            *(ctypes.c_float, pointer, integer, pointer, integer),
            *(ctypes.c_float, pointer, integer),
        ]
        function.restype = None
    return function


SGEMM = load_product("cblas_sgemm")
BFLOAT16_GEMM = load_product("cblas_gemm_bf16bf16f32")


def multiply(
    a: np.ndarray, b: np.ndarray, out: np.ndarray | None = None, add: bool = False
) -> np.ndarray:
    """The product (M, N), float32, of matrices (M, K) and (K, N), put into `out`, or with `add`
    added to it. Both are float32, or the bits of bfloat16. Each may be a view, or transposed, if
    the values of a row or of a column lie side by side in memory; those of a row of `out` do.
    """
    if out is None:
        out = np.empty((a.shape[0], b.shape[1]), np.float32)
    gemm = BFLOAT16_GEMM if a.dtype == np.uint16 else SGEMM
    if gemm is None:
        a, b = to_float32(a), to_float32(b)
        if add:
            out += a @ b
        else:
            np.matmul(a, b, out=out)
        return out
    form_a, step_a = form(a)
    form_b, step_b = form(b)
    gemm(
        *(ROW_MAJOR, form_a, form_b, *out.shape, a.shape[1]),
        *(1.0, address(a), step_a, address(b), step_b),
        *(1.0 if add else 0.0, address(out), max(out.strides[0] // out.itemsize, out.shape[1])),
    )
    return out


def form(matrix: np.ndarray) -> tuple[int, int]:
    """How a matrix lies in memory, and the values from one of its rows, or columns, to the next."""
    n_rows, n_columns = matrix.shape
    row, column = (stride // matrix.itemsize for stride in matrix.strides)
    if column == 1 and (row >= n_columns or n_rows == 1):
        return AS_IT_IS, max(row, n_columns)
    return TRANSPOSED, max(column, n_rows)


def address(array: np.ndarray) -> int:
    """Where an array begins in memory."""
    return array.__array_interface__["data"][0]


def as_numpy(array: mx.array) -> np.ndarray:
    """The memory of an array, which is waited for; of bfloat16, which NumPy lacks, the bits."""
    return np.array(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array, copy=False)


def to_float32(x: np.ndarray) -> np.ndarray:
    """The values of bfloat16's bits; of float32, x itself."""
    return (x.astype(np.uint32) << 16).view(np.float32) if x.dtype == np.uint16 else x


def in_type_of(weight: np.ndarray, x: np.ndarray) -> np.ndarray:
    """x, float32, as `multiply` takes it with this weight: x itself, or the bits of bfloat16, to
    which it is rounded, halves away from zero.
    """
    if weight.dtype != np.uint16:
        return x
    rounded = np.ascontiguousarray(x).view(np.uint32) + np.uint32(0x8000)
    return np.ascontiguousarray(rounded.view(np.uint16)[..., 1::2])  # the upper halves
