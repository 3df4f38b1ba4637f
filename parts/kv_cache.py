"""The keys and values of the positions so far, which attention looks at again."""

import math

from parts import device  # noqa: F401  before MLX, for its BLAS

import mlx.core as mx

STEP = 512  # positions by which a cache grows
# Positions at the beginning that a cache of a bounded size keeps. Without them a model that was
# trained to see all falls apart (Xiao et al., "StreamingLLM", 2023).
N_FIRST = 4


class KVCache:
    """The keys and values of a layer for the positions so far, with room for more.

    `keys` and `values` are (B, K, capacity, head_dim): B rows of a batch, K key-value heads.
    `offset` is the next position. The arrays begin with that of position `start`, and so the first
    `offset - start` places are filled. With a sliding window, positions that no later query sees
    are dropped whenever the cache grows, and so it stays below window + 2 STEP + an update.

    With a `max_size`, the cache never holds more positions. When it is full, the oldest but for the
    first `N_FIRST` are dropped, a quarter of `max_size` at once, and no later query sees them. Then
    `start` is how many were dropped.
    """

    def __init__(
        self,
        keys: mx.array,
        values: mx.array,
        window: int | None = None,
        max_size: int | None = None,
    ):
        """A cache of these positions (B, K, L, head_dim), full. window: the positions that a query
        sees, its own included; None where it sees all.
        """
        self.keys, self.values, self.window, self.max_size = keys, values, window, max_size
        self.start, self.offset = 0, keys.shape[2]

    @property
    def capacity(self) -> int:
        """The positions that the arrays hold, filled or not."""
        return self.keys.shape[2]

    @property
    def n_filled(self) -> int:
        """The positions whose keys and values are there."""
        return self.offset - self.start

    @property
    def max_update(self) -> float:
        """The positions that one update may append."""
        return math.inf if self.max_size is None else (self.max_size - N_FIRST) // 2

    @property
    def state(self) -> list[mx.array]:
        """Both arrays, to evaluate them or to hand them to a kernel."""
        return [self.keys, self.values]

    def copy(self) -> "KVCache":
        """A cache of the same positions; updates of one leave the other as it is."""
        return self._with_arrays(self.keys[...], self.values[...])

    def contiguous(self) -> "KVCache":
        """A copy whose arrays lie in row-major order, as the decoder's kernel needs."""
        return self._with_arrays(mx.contiguous(self.keys), mx.contiguous(self.values))

    def _with_arrays(self, keys: mx.array, values: mx.array) -> "KVCache":
        cache = KVCache(keys, values, self.window, self.max_size)
        cache.start, cache.offset = self.start, self.offset
        return cache

    def grow(self, n: int) -> None:
        """Make room for `n` more positions, up to a multiple of `STEP` in all. Drop those that no
        later query sees.
        """
        n_first, n_last = self._n_kept(n)
        n_kept = n_first + n_last
        n_dropped = self.n_filled - n_kept
        room = max(n, STEP) if n_dropped else n  # else it would soon be full again
        capacity = -(-(n_kept + room) // STEP) * STEP
        room = min(capacity, self.max_size or capacity) - n_kept
        self.keys, self.values = (
            self._moved(array, n_first, n_last, room) for array in (self.keys, self.values)
        )
        self.start += n_dropped

    def _n_kept(self, n: int) -> tuple[int, int]:
        """How many of the first positions, and of the last, stay where there are `n` more."""
        if self.max_size is not None and self.n_filled + n > self.max_size:
            room = max(n, self.max_size // 4)
            return N_FIRST, min(self.n_filled, self.max_size - room) - N_FIRST
        return 0, self.n_filled if self.window is None else min(self.n_filled, self.window - 1)

    def _moved(self, array: mx.array, n_first: int, n_last: int, room: int) -> mx.array:
        batch, n_kv_heads, _, head_dim = array.shape
        blank = mx.zeros((batch, n_kv_heads, room, head_dim), array.dtype)
        if not n_first + n_last:
            return blank
        last = array[:, :, self.n_filled - n_last : self.n_filled]
        return mx.concatenate([array[:, :, :n_first], last, blank], axis=2)

    def trim(self, offset: int) -> bool:
        """Forget the positions from `offset` on. Return whether that was possible: not where some
        are dropped that the next one sees; with a `max_size`, where half of it would not be filled.
        """
        n_left = offset - self.start
        if self.max_size is not None:
            n_needed = self.max_size // 2
        else:
            n_needed = offset if self.window is None else self.window - 1
        if offset > self.offset or (self.start and n_left < n_needed):
            return False
        self.offset = offset
        return True

    def update(self, keys: mx.array, values: mx.array) -> None:
        """Append the keys and values (B, K, L, head_dim) of new positions, in place."""
        n = keys.shape[2]
        if self.n_filled + n > self.capacity:
            self.grow(n)
        places = slice(self.n_filled, self.n_filled + n)
        self.keys[:, :, places] = keys
        self.values[:, :, places] = values
        self.offset += n

    def filled(self) -> tuple[mx.array, mx.array]:
        """The keys and values (B, K, n_filled, head_dim) of the positions from `start` on."""
        return self.keys[:, :, : self.n_filled], self.values[:, :, : self.n_filled]
