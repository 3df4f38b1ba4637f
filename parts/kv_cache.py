"""The key-value cache of one layer."""

from parts import device  # noqa: F401  before MLX, for its BLAS

import mlx.core as mx

STEP = 512  # positions by which a cache grows


class KVCache:
    """The keys and values of a layer for the positions so far, with room for more.

    `keys` and `values` are (B, K, capacity, head_dim): B rows of a batch, K key-value heads. The
    first `offset` positions are filled.
    """

    def __init__(self, keys: mx.array, values: mx.array):
        """A cache of these positions (B, K, L, head_dim), full."""
        self.keys, self.values, self.offset = keys, values, keys.shape[2]

    @property
    def capacity(self) -> int:
        """The positions that the arrays hold, filled or not."""
        return self.keys.shape[2]

    @property
    def state(self) -> list[mx.array]:
        """Both arrays, to evaluate them or to hand them to a kernel."""
        return [self.keys, self.values]

    def copy(self) -> "KVCache":
        """A cache of the same positions; updates of one leave the other as it is."""
        cache = KVCache(self.keys[...], self.values[...])
        cache.offset = self.offset
        return cache

    def contiguous(self) -> "KVCache":
        """A copy whose arrays lie in row-major order, as the decoder's kernel needs."""
        cache = KVCache(mx.contiguous(self.keys), mx.contiguous(self.values))
        cache.offset = self.offset
        return cache

    def grow(self, length: int) -> None:
        """Make room for `length` positions, rounded up to a multiple of `STEP`."""
        self.keys, self.values = (self._padded(array, length) for array in self.state)

    def _padded(self, array: mx.array, length: int) -> mx.array:
        batch, n_kv_heads, _, head_dim = array.shape
        room = -(-length // STEP) * STEP - self.offset
        blank = mx.zeros((batch, n_kv_heads, room, head_dim), array.dtype)
        return mx.concatenate([array[:, :, : self.offset], blank], axis=2)

    def update(self, keys: mx.array, values: mx.array) -> None:
        """Append the keys and values (B, K, L, head_dim) of new positions, in place."""
        start, end = self.offset, self.offset + keys.shape[2]
        if end > self.capacity:
            self.grow(end)
        self.keys[:, :, start:end] = keys
        self.values[:, :, start:end] = values
        self.offset = end

    def filled(self) -> tuple[mx.array, mx.array]:
        """The keys and values (B, K, offset, head_dim) of the positions so far."""
        return self.keys[:, :, : self.offset], self.values[:, :, : self.offset]
