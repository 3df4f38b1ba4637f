"""Rotary positions: the frequencies, and the tables of cosines and sines.

Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021. The pairs
are neighbouring channels (interleaved, "traditional"), as Meta's checkpoints need.
"""

from functools import lru_cache

import numpy as np

from parts import device  # noqa: F401  before MLX, for its BLAS

import mlx.core as mx


def frequencies(head_dim: int, theta: float) -> np.ndarray:
    """The angle in radians (head_dim / 2) by which one position rotates each pair of channels."""
    return theta ** (-np.arange(0, head_dim, 2) / head_dim)


@lru_cache
def frequency_table(head_dim: int, theta: float) -> mx.array:
    """`frequencies` as an MLX array (head_dim / 2) of float32, which CUDA's kernels read."""
    return mx.array(frequencies(head_dim, theta), mx.float32)


@lru_cache(maxsize=2)
def cos_sin(offset: int, length: int, head_dim: int, theta: float) -> tuple[mx.array, mx.array]:
    """Cosines and sines (length, 1, head_dim), float32, of the angles of the positions from
    `offset` on.
    """
    angles = np.arange(offset, offset + length)[:, None, None]
    angles = angles * frequencies(head_dim, theta).repeat(2)
    return mx.array(np.cos(angles), mx.float32), mx.array(np.sin(angles), mx.float32)


@lru_cache
def rotate_half_matrix(head_dim: int, dtype: mx.Dtype) -> mx.array:
    """The matrix (head_dim, head_dim) that maps each pair of channels (a, b) to (-b, a)."""
    return mx.array(np.kron(np.eye(head_dim // 2), [[0, 1], [-1, 0]]), dtype)
