"""The next token: logits to a distribution, as its flags shape it, and a draw from that.

Each step means what transformers' logits processors mean by it, in their order: the penalty on
repetition, the temperature, the top k, the top p, the min p. All is computed on the device, which
nobody waits for; but a CPU that sorts does (`ops.sort`).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from parts import device, ops  # before MLX, for its BLAS

import mlx.core as mx

MIN_TEMPERATURE = 1e-6  # below it the maximum logit leaves nothing to the others


class Sampling(NamedTuple):
    """How a token is chosen; by default, the one of the maximum logit.

    temp: what logits are divided by; 0 is greedy. top_k: only so many tokens of the highest logits;
    0 means all. top_p: only those of the highest probabilities that together reach it (Holtzman et
    al., 2020). min_p: only those of at least this share of the highest probability (Nguyen et al.,
    2024). repetition_penalty: what positive logits of tokens that were there are divided by, and
    negative ones multiplied with (Keskar et al., 2019). repetition_window: of the prompt and the
    text so far, only so many of the last tokens; None means all.
    """

    temp: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    repetition_window: int | None = None


GREEDY = Sampling()


class Sampler:
    """Chooses the next token of each of B texts. That of one depends on its ids, its key and its
    logits alone, not on the others.

    histories: the ids of each text so far, at least one. keys: (B, 2), uint32; by default
    `new_keys`.
    """

    def __init__(
        self, sampling: Sampling, histories: list[list[int]], keys: mx.array | None = None
    ):
        self.sampling = sampling
        # Whether a call waits until its logits are computed, rather than to leave that to MLX.
        self.waits = sampling.top_p < 1 and sampling.temp >= MIN_TEMPERATURE and ops.sort_waits()
        self._draw = make_draw(sampling)
        self._keys = new_keys(len(histories)) if keys is None else keys
        self._recent = self._last_ids(histories)  # (B, W)

    def __call__(self, logits: mx.array) -> mx.array:
        """The token ids (B,) that logits (B, V), float32, give; they become part of the texts."""
        if self._recent is not None:
            logits = penalized(logits, self._recent, self.sampling.repetition_penalty)
        tokens, self._keys = self._draw(logits, self._keys)
        if self._recent is not None:
            recent = mx.concatenate([self._recent, tokens[:, None]], axis=1)
            window = self.sampling.repetition_window
            n_over = 0 if window is None else max(0, recent.shape[1] - window)
            self._recent = recent[:, n_over:]
        return tokens

    def replace(self, row: int, ids: list[int], key: mx.array) -> None:
        """Have another text in a row: its ids so far, and its key (2,)."""
        self._keys = mx.concatenate([self._keys[:row], key[None], self._keys[row + 1 :]])
        if self._recent is not None:
            histories = self._recent.tolist()
            histories[row] = ids
            self._recent = self._last_ids(histories)

    def join(self, rows: list[int], other: "Sampler", width: int) -> None:
        """Have the texts of another sampler in these rows. width: ids of the longest text."""
        places = mx.array(rows)
        self._keys[places] = other._keys
        if self._recent is not None:
            width = min(width, self.sampling.repetition_window or width)
            self._recent = as_wide(self._recent, width)
            self._recent[places] = as_wide(other._recent, width)

    def keep(self, rows: list[int]) -> None:
        """Forget all texts but these."""
        self._keys = self._keys[mx.array(rows)]
        if self._recent is not None:
            self._recent = self._recent[mx.array(rows)]

    def _last_ids(self, histories: list[list[int]]) -> mx.array | None:
        """The ids that the penalty is for; None without one. A short text's first is repeated."""
        if self.sampling.repetition_penalty == 1:
            return None
        longest = max(map(len, histories))
        width = min(longest, self.sampling.repetition_window or longest)
        rows = [ids[-width:] for ids in histories]
        return mx.array(np.array([ids[:1] * (width - len(ids)) + ids for ids in rows], np.uint32))


def as_wide(ids: mx.array, width: int) -> mx.array:
    """The last `width` of each row's ids (B, W); the first is repeated where there are fewer."""
    ids = ids[:, -width:]
    return mx.concatenate([mx.repeat(ids[:, :1], width - ids.shape[1], axis=1), ids], axis=1)


def new_keys(n: int) -> mx.array:
    """Keys (n, 2), uint32, of the random numbers of n texts, which MLX's global seed decides."""
    return mx.random.randint(0, 2**32 - 1, (n, 2), mx.uint32)


def make_draw(sampling: Sampling) -> Callable[..., tuple[mx.array, mx.array]]:
    """A function of logits (B, V) and keys (B, 2) that returns tokens (B,) and the next keys."""
    if sampling.temp < MIN_TEMPERATURE:
        return lambda logits, keys: (logits.argmax(-1), keys)

    def draw(logits: mx.array, keys: mx.array) -> tuple[mx.array, mx.array]:
        now, later = mx.vmap(mx.random.split)(keys).swapaxes(0, 1)
        logits = shaped(logits, sampling)
        return mx.vmap(lambda row, key: mx.random.categorical(row, key=key))(logits, now), later

    return device.compiled(draw)


def penalized(logits: mx.array, ids: mx.array, penalty: float) -> mx.array:
    """logits (B, V), where those of `ids` (B, W) are divided by the penalty if they are positive,
    and multiplied with it if not. An id that stands there twice counts once. They are below V.
    """
    chosen = mx.take_along_axis(logits, ids, axis=1)
    chosen = mx.where(chosen < 0, chosen * penalty, chosen / penalty)
    return mx.put_along_axis(logits, ids, chosen, axis=1)


def shaped(logits: mx.array, sampling: Sampling) -> mx.array:
    """The logits (B, V) of the distribution to draw from; -inf where a token is left out."""
    logits = logits / sampling.temp
    ascending = ops.sort(logits) if sampling.top_p < 1 else None
    if 0 < sampling.top_k < logits.shape[-1]:
        if ascending is None:
            least = mx.topk(logits, sampling.top_k).min(-1, keepdims=True)
        else:
            least = ascending[:, -sampling.top_k, None]
            ascending = mx.where(ascending < least, -mx.inf, ascending)
        logits = mx.where(logits < least, -mx.inf, logits)
    if sampling.top_p < 1:
        logits = mx.where(beyond_top_p(logits, ascending, sampling.top_p), -mx.inf, logits)
    if sampling.min_p > 0:
        least = logits.max(-1, keepdims=True) + math.log(sampling.min_p)
        logits = mx.where(logits < least, -mx.inf, logits)
    return logits


def beyond_top_p(logits: mx.array, ascending: mx.array, top_p: float) -> mx.array:
    """Whether each token of logits (B, V) is among the least probable, which together have no more
    than 1 - top_p. The most probable one is not. Of equal ones, the first are.

    ascending: the logits in this order.
    """
    beyond = mx.cumsum(mx.softmax(ascending, axis=-1, precise=True), axis=-1) <= 1 - top_p
    n_beyond = beyond[:, :-1].sum(-1, keepdims=True)
    least = mx.take_along_axis(ascending, n_beyond, axis=-1)  # of those that stay
    below, equal = logits < least, logits == least
    n_equal = n_beyond - below.sum(-1, keepdims=True)
    return below | (equal & (mx.cumsum(equal.astype(mx.int32), axis=-1) <= n_equal))
