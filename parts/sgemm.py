"""Products of NumPy's float32 matrices by the BLAS that MLX has on a CPU.

NumPy's own BLAS has threads of its own; here several threads multiply side by side, and each takes
its share of the cores, as `device.open_streams` has set it.
"""

import ctypes

import numpy as np

from parts import device

import mlx.core as mx

ROW_MAJOR, AS_IT_IS, TRANSPOSED = 101, 111, 112
SIZE = 4  # bytes


def load_sgemm() -> "ctypes._FuncPointer | None":
    """Return `cblas_sgemm` of the fast BLAS; None without it."""
    if not device.FAST_BLAS:
        return None
    sgemm, integer, pointer = device.FAST_BLAS.cblas_sgemm, ctypes.c_int, ctypes.c_void_p
    sgemm.argtypes = [
        *([integer] * 6),
        *(ctypes.c_float, pointer, integer, pointer, integer),
        *(ctypes.c_float, pointer, integer),
    ]
    sgemm.restype = None
    return sgemm


SGEMM = load_sgemm()


def multiply(
    a: np.ndarray, b: np.ndarray, out: np.ndarray | None = None, add: bool = False
) -> np.ndarray:
    """The product (M, N) of float32 matrices (M, K) and (K, N), put into `out`, or with `add`
    added to it. Each may be a view, or transposed, if the values of a row or of a column lie side
    by side in memory; those of a row of `out` do.
    """
    if out is None:
        out = np.empty((a.shape[0], b.shape[1]), np.float32)
    if SGEMM is None:
        if add:
            out += a @ b
        else:
            np.matmul(a, b, out=out)
        return out
    form_a, step_a = form(a)
    form_b, step_b = form(b)
    SGEMM(
        *(ROW_MAJOR, form_a, form_b, *out.shape, a.shape[1]),
        *(1.0, address(a), step_a, address(b), step_b),
        *(1.0 if add else 0.0, address(out), max(out.strides[0] // SIZE, out.shape[1])),
    )
    return out


def form(matrix: np.ndarray) -> tuple[int, int]:
    """How a matrix lies in memory, and the values from one of its rows, or columns, to the next."""
    n_rows, n_columns = matrix.shape
    row, column = matrix.strides
    if column == SIZE and (row >= n_columns * SIZE or n_rows == 1):
        return AS_IT_IS, max(row // SIZE, n_columns)
    return TRANSPOSED, max(column // SIZE, n_rows)


def address(array: np.ndarray) -> int:
    """Where an array begins in memory."""
    return array.__array_interface__["data"][0]


def as_numpy(array: mx.array) -> np.ndarray:
    """The memory of an array, which is waited for."""
    return np.array(array, copy=False)
